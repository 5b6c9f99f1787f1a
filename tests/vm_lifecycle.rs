//! The story of sandboxes with real Cloud Hypervisor and a real Linux guest, through the
//! library's front door.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::error::Error as _;
use std::time::Duration;

use machine::{GUEST_COMMAND_LINE, GUEST_INITRD, GUEST_KERNEL, Guest, Namespace, Scratch, run};
use rewake::deadline::Deadline;
use rewake::host::{
    Durability, Error, Host, HostConfig, LaunchOptions, PauseOptions, ResumeOptions, Sandbox,
};
use rewake::ids::TemplateId;
use rewake::resource::disk::{DiskKind, DiskMode};
use rewake::sandbox::state::State;
use rewake::template::BuildSpec;
use rewake::units::Bytes;

const DISK_BYTES: u64 = 32 << 20;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(400))
}

fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn done<T>(outcome: Result<T, Error>) -> T {
    outcome.unwrap_or_else(|error| panic!("{}; left over: {:?}", chain(&error), error.leftovers))
}

/// Everything that sandboxes could leave in the kernel.
fn census() -> String {
    [
        "ip netns list",
        "ip -o link",
        "losetup -a",
        "dmsetup ls",
        "pidof cloud-hypervisor || true",
    ]
    .map(|list| run("sh", ["-c", list]))
    .join("--\n")
}

/// Runs `work` with the guest of a sandbox.
fn with_guest<T>(sandbox: &Sandbox, work: impl FnOnce(Guest<'_>) -> T) -> T {
    let slot = sandbox.slot().unwrap();
    let namespace = Namespace::existing(&format!("rw-{slot}"));
    work(Guest(&namespace))
}

fn write(sandbox: &Sandbox, word: &str) {
    let script = format!("echo {word} >/disk/mark && sync");
    with_guest(sandbox, |guest| guest.shell(&script));
}

fn read(sandbox: &Sandbox) -> String {
    let script = "cat /disk/mark 2>/dev/null || echo none";
    let found = with_guest(sandbox, |guest| guest.shell(script));
    found.trim().to_owned()
}

/// The same guest, which has gone on: nonce, counter and every checksummed byte.
fn goes_on(sandbox: &Sandbox, nonce: &str, count: u64) -> u64 {
    with_guest(sandbox, |guest| {
        assert_eq!(guest.nonce(), nonce);
        guest.check_pattern();
        guest.await_counter_above(count)
    })
}

fn mode(sandbox: &Sandbox) -> String {
    sandbox.story().unwrap().status.vm.unwrap().memory_mode
}

#[test]
fn vm_build_launch_write_pause_resume_snapshot_launch_destroy() {
    let test = "vm_build_launch_write_pause_resume_snapshot_launch_destroy";
    if !machine::inside_with_vmm(test) {
        return;
    }
    let scratch = Scratch::new("lifecycle");
    let image = scratch.disk("image.raw", DISK_BYTES);
    let mut config = HostConfig::new(scratch.join("root"));
    config.vmm.program = machine::vmm_path();
    config.disk_mode = DiskMode::Only(DiskKind::DmSnapshot);
    config.disk_stock.target = 1;
    config.patience = Duration::from_secs(400);
    let host = done(Host::open(config));
    done(host.recover(soon()));
    let spec = BuildSpec {
        initramfs: Some(GUEST_INITRD.into()),
        command_line: GUEST_COMMAND_LINE.to_owned(),
        rootfs: Some(image),
        memory: Bytes::mib(192),
        boot_budget: Duration::from_secs(300),
        ..BuildSpec::new(
            TemplateId::new("linux").unwrap(),
            GUEST_KERNEL,
            host.config().vmm.clone(),
        )
    };
    let template = host.build(&spec, &mut |_| {}, soon()).unwrap();
    let sums = |path: &std::path::Path| run("sha256sum", [path]);
    let untouched = [template.memory_image(), template.disk().unwrap()].map(|it| sums(&it));
    let before = census();

    // Both get disks that were ready.
    done(host.keep_ready(&template));
    let stock = host.disk_stock().unwrap();
    let launch = || {
        assert!(stock.wait_settled(soon()), "{:?}", stock.stats());
        done(host.launch(&template, LaunchOptions::default()))
    };
    let (mut first, second) = (launch(), launch());
    assert_eq!(stock.stats().taken, 2);
    assert_eq!(mode(&first), "map");
    assert_ne!(first.host_ip(), second.host_ip());
    let (nonce, mut count) = with_guest(&first, |guest| (guest.nonce(), guest.counter()));
    write(&first, "one");
    write(&second, "two");

    // Two rounds: the first makes the memory file its own, the second writes no memory.
    let address = first.host_ip();
    for (round, durability) in [Durability::Warm, Durability::Synced]
        .into_iter()
        .enumerate()
    {
        let options = PauseOptions {
            durability: Some(durability),
            ..PauseOptions::default()
        };
        done(first.pause_with(options));
        println!("pause {round}: {}", first.timeline());
        assert_eq!(first.state().unwrap(), State::Paused);
        first = done(host.resume(first.id(), ResumeOptions::default()));
        println!("resume {round}: {}", first.timeline());
        assert_eq!(mode(&first), "shared");
        assert_eq!(first.host_ip(), address);
        count = goes_on(&first, &nonce, count);
        assert_eq!(read(&first), "one");
        assert_eq!(read(&second), "two");
    }

    let warm = done(first.snapshot("warm"));
    count = goes_on(&first, &nonce, count);
    write(&first, "one again");
    let third = done(host.launch(&warm, LaunchOptions::default()));
    goes_on(&third, &nonce, 0);
    assert_eq!(read(&third), "one", "as it was at the snapshot");
    assert_eq!(read(&first), "one again");
    goes_on(&first, &nonce, count);

    // Another program opens the same root and finds all three.
    let other = done(Host::open(host.config().clone()));
    let found = done(other.recover(soon()));
    assert_eq!(found.adopted.len(), 3, "{found:?}");
    for sandbox in [first, second, third] {
        done(sandbox.destroy());
    }
    let now = [template.memory_image(), template.disk().unwrap()].map(|it| sums(&it));
    assert_eq!(now, untouched, "the template");
    // That disks are ready of them keeps no template.
    assert!(stock.wait_settled(soon()), "{:?}", stock.stats());
    assert_eq!((stock.stats().images, stock.stats().ready), (2, 2));
    for template in [template, warm] {
        host.templates().remove(template.id(), soon()).unwrap();
    }
    drop((host, other));
    assert_eq!(census(), before);
}
