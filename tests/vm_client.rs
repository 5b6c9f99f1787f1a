//! The client, the launcher, the event parser and the snapshot reader against the real
//! Cloud Hypervisor with a Linux guest.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use machine::{BOOT_LIMIT, GUEST_MEMORY_BYTES, Guest, Namespace, SHELL_PORT, STEP_LIMIT, Scratch};
use rewake::deadline::Deadline;
use rewake::resource::ledger::Ledger;
use rewake::snapshot::{SnapshotDir, SnapshotLimits};
use rewake::units::Bytes;
use rewake::vm_config::NetConfig;
use rewake::vmm::api::{Client, MemoryRestoreMode, Resize, RestoreConfig, VmState, file_url};
use rewake::vmm::events::{EventKind, EventParser};
use rewake::vmm::launch::{ApiSocket, LaunchSpec, StopLimits, Vmm, launch};
use rewake_sys::{netns, tun};

const MIB: u64 = 1 << 20;

fn soon() -> Deadline {
    Deadline::after(STEP_LIMIT)
}

/// A Cloud Hypervisor started by the launcher, with a client.
struct Launched {
    vmm: Vmm,
    client: Client,
    events: EventParser,
    kinds: Vec<EventKind>,
    _ledger: Ledger,
}

impl Launched {
    fn new(namespace: &Namespace, socket: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let spec = LaunchSpec {
            program: machine::vmm_path(),
            ..LaunchSpec::default()
        };
        let netns = netns::open(&netns::named_path(namespace.name())).unwrap();
        let (api, _first) = ApiSocket::bind(socket).unwrap();
        let mut ledger = Ledger::default();
        let vmm = launch(&spec, api, Some(netns.as_fd()), &[], &mut ledger).unwrap();
        let client = Client::connect(socket, soon()).unwrap();
        Self {
            vmm,
            client,
            events: EventParser::new(),
            kinds: Vec::new(),
            _ledger: ledger,
        }
    }

    /// Ends it; what its event monitor said.
    fn stop(mut self) -> Vec<EventKind> {
        let limits = StopLimits {
            api: STEP_LIMIT,
            ..StopLimits::default()
        };
        let client = &mut self.client;
        let stopped = self.vmm.stop(limits, soon(), |_, deadline| {
            client.shutdown_vmm(deadline).unwrap();
        });
        let log = String::from_utf8_lossy(&self.vmm.log.tail()).into_owned();
        println!("ended by {stopped:?}; its log:\n{log}");
        self.read_events();
        self.kinds
    }

    /// What its event monitor said so far.
    fn read_events(&mut self) -> &[EventKind] {
        let mut bytes = Vec::new();
        // The pipe is non-blocking: the error at its end is expected.
        let _ = self.vmm.events.read_to_end(&mut bytes);
        let kinds = &mut self.kinds;
        self.events
            .feed(&bytes, |event| kinds.push(event.unwrap().kind()));
        kinds
    }
}

/// Waits until the guest has done what was asked of it.
fn await_true(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < STEP_LIMIT, "{what}: still not so");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn assert_in_order(kinds: &[EventKind], wanted: &[EventKind]) {
    let mut rest = kinds.iter();
    for kind in wanted {
        assert!(
            rest.any(|seen| seen == kind),
            "{kind:?} not seen in its place: {kinds:?}"
        );
    }
}

/// Hot-plugs a second tap as a passed descriptor, sees it in the guest, takes it away.
fn plug_and_unplug_a_tap(namespace: &Namespace, vm: &mut Launched, guest: Guest<'_>) {
    let netns = netns::open(&netns::named_path(namespace.name())).unwrap();
    let options = tun::TapOptions {
        vnet_header: true,
        ..tun::TapOptions::default()
    };
    let tap = netns::run_in(netns.as_fd(), || tun::Tap::open("tap1", options))
        .unwrap()
        .unwrap();
    let tap = tap.into_fd();
    let second = NetConfig {
        id: Some("second".to_owned()),
        mac: Some("02:fc:00:00:00:09".parse().unwrap()),
        ..NetConfig::default()
    };
    let added = vm.client.add_net(&second, &[tap.as_fd()], soon()).unwrap();
    assert_eq!(added.unwrap().id, "second");
    await_true("the second interface is in the guest", || {
        guest
            .shell("cat /sys/class/net/*/address")
            .contains("02:fc:00:00:00:09")
    });
    vm.client.remove_device("second", soon()).unwrap();
    await_true("the second interface is gone", || {
        vm.read_events().contains(&EventKind::DeviceRemoved)
    });
}

#[test]
fn vm_client_takes_a_linux_guest_through_its_life() {
    if !machine::inside_with_vmm("vm_client_takes_a_linux_guest_through_its_life") {
        return;
    }
    let scratch = Scratch::new("client");
    let namespace = Namespace::new("rwtest-client");
    let guest = Guest(&namespace);
    let disk = scratch.disk("disk.raw", 32 << 20);
    let snapshot = scratch.join("snapshot");
    let socket = scratch.join("api.sock");

    let mut first = Launched::new(&namespace, &socket);
    let client = &mut first.client;
    assert!(client.info(soon()).unwrap_err().is_vm_missing());
    client
        .create(&machine::guest_config(&disk, &scratch), soon())
        .unwrap();
    assert_eq!(client.info(soon()).unwrap().state, VmState::Created);
    assert!(client.pause(soon()).unwrap_err().is_not_running());
    client.boot(soon()).unwrap();
    guest.await_answer(SHELL_PORT, "/nonce", BOOT_LIMIT);
    let nonce = guest.nonce();
    assert!(!client.counters(soon()).unwrap().is_empty());

    let inflate = Resize {
        desired_balloon: Some(32 * MIB),
        ..Resize::default()
    };
    client.resize(&inflate, soon()).unwrap();
    await_true("the balloon holds 32 MiB", || {
        client.info(soon()).unwrap().memory_actual_size == GUEST_MEMORY_BYTES - 32 * MIB
    });
    plug_and_unplug_a_tap(&namespace, &mut first, guest);
    let client = &mut first.client;

    let count = guest.counter();
    client.pause(soon()).unwrap();
    assert!(client.pause(soon()).unwrap_err().is_invalid_transition());
    std::fs::create_dir(&snapshot).unwrap();
    client.snapshot(&snapshot, soon()).unwrap();
    let taken = client.snapshot(&snapshot, soon()).unwrap_err();
    assert!(taken.is_destination_taken(), "{taken:?}");
    let kinds = first.stop();
    assert_in_order(
        &kinds,
        &[
            EventKind::VmmStarting,
            EventKind::Booting,
            EventKind::Booted,
            EventKind::Resized,
            EventKind::DeviceRemoved,
            EventKind::Paused,
            EventKind::Snapshotted,
        ],
    );

    let opened = SnapshotDir::open(&snapshot, &SnapshotLimits::default()).unwrap();
    assert_eq!(opened.config().balloon.as_ref().unwrap().size, 32 * MIB);
    assert_eq!(opened.state().vcpus(), 1);
    assert_eq!(opened.memory().unwrap().size(), Bytes(GUEST_MEMORY_BYTES));
    drop(opened);

    for mode in [MemoryRestoreMode::Copy, MemoryRestoreMode::OnDemand] {
        let mut next = Launched::new(&namespace, &socket);
        let restore = RestoreConfig {
            source_url: file_url(&snapshot).unwrap(),
            memory_restore_mode: mode,
            resume: true,
            ..RestoreConfig::default()
        };
        next.client.restore(&restore, &[], soon()).unwrap();
        assert_eq!(guest.nonce(), nonce, "{mode:?}");
        guest.await_counter_above(count);
        guest.check_pattern();
        let deflate = Resize {
            desired_balloon: Some(0),
            ..Resize::default()
        };
        next.client.resize(&deflate, soon()).unwrap();
        await_true("the balloon is empty", || {
            next.client.info(soon()).unwrap().memory_actual_size == GUEST_MEMORY_BYTES
        });
        let kinds = next.stop();
        let wanted = [
            EventKind::Restoring,
            EventKind::Restored,
            EventKind::Resumed,
            EventKind::Resized,
        ];
        assert_in_order(&kinds, &wanted);
    }
}
