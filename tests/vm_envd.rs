//! The second generation: a guest restored on demand is given a new life by `/init`, its
//! memory is preloaded, it is frozen again, and what comes back from that has every page.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use machine::restored::{Marks, Restored, check, frozen};
use machine::{
    AGENT_PORT, BOOT_LIMIT, GUEST, GUEST_MEMORY_BYTES, Guest, Namespace, Scratch, Vm, plain_options,
};
use rewake::deadline::Deadline;
use rewake::envd::client::{Applied, Client, ClientOptions, Incarnation};
use rewake::envd::init::Init;
use rewake::envd::materialise::materialise;
use rewake::envd::preload::{Limits, Preload, State};
use rewake::envd::socket::InNetns;
use rewake::ids::SandboxId;
use rewake::units::Bytes;
use rewake::vmm::api;
use rewake_sys::netns;

const RAM: Bytes = Bytes(GUEST_MEMORY_BYTES);

fn agent(namespace: &Namespace, init: &Init) -> Client {
    let netns = netns::open(&netns::named_path(namespace.name())).unwrap();
    let incarnation = Incarnation {
        sandbox: SandboxId::random(),
        lifecycle: init.lifecycle,
    };
    let options = ClientOptions {
        sockets: Arc::new(InNetns::new(netns)),
        ..ClientOptions::default()
    };
    Client::new(SocketAddr::from((GUEST, AGENT_PORT)), incarnation, options)
}

#[test]
fn vm_a_preloaded_guest_is_frozen_again_without_losing_a_page() {
    let test = "vm_a_preloaded_guest_is_frozen_again_without_losing_a_page";
    if !machine::inside_with_vmm(test) {
        return;
    }
    let scratch = Scratch::new("preload");
    let namespace = Namespace::new("rwtest-preload");
    let guest = Guest(&namespace);
    let disk = scratch.disk("disk.raw", 32 << 20);
    let (first, second) = (scratch.join("first"), scratch.join("second"));
    let vm = Vm::start(&namespace, &scratch, &plain_options(&disk, &scratch));
    let marks = frozen(vm, guest, &first);

    let restored = Restored::new(&namespace, &first, "on-demand");
    let mut init = Init::new();
    init.env
        .insert("GENERATION".to_owned(), "second".to_owned());
    let mut client = agent(&namespace, &init);
    let long = Deadline::after(2 * BOOT_LIMIT);
    let mut preload = Preload::restored(RAM, Limits::of(RAM));
    materialise(&mut preload, &mut client, Some(&init), long).unwrap();
    assert_eq!(preload.state(), State::Materialised);
    assert!(preload.pages() > 0, "nothing was walked");
    assert_eq!(client.verify_applied(&init, long).unwrap(), Applied::Yes);
    client.prepare_snapshot(RAM, long).unwrap();

    guest.shell("echo kept >/disk/file && sync");
    let marks = Marks {
        count: guest.counter(),
        ..marks
    };
    std::fs::create_dir(&second).unwrap();
    let mut vmm = api::Client::connect(restored.socket(), long).unwrap();
    vmm.pause(long).unwrap();
    // CH's own thread may still be filling in what the guest's walk left out.
    while let Err(error) = vmm.snapshot(&second, long) {
        assert!(error.is_restoring() && !long.has_passed(), "{error:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    drop(vmm);
    restored.shut_down();

    let again = Restored::new(&namespace, &second, "copy");
    check(&again, guest, &marks, "copy");
    again.shut_down();
}
