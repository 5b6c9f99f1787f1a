//! The client against the real Cloud Hypervisor.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rewake::vm_config::{
    BalloonConfig, ConsoleConfig, CoreScheduling, CpusConfig, DiskConfig, MemoryConfig, NetConfig,
    PayloadConfig, SerialConfig, VmConfig,
};
use rewake::vmm::api::{
    ApiError, Client, MemoryRestoreMode, Resize, ResizeDisk, RestoreConfig, RestoredNet,
    SendMigration, Version, VmState, file_url,
};
use rewake::vmm::events::{EventKind, EventParser};

use crate::pvh::halting_guest;
use crate::scratch::Scratch;
use crate::soon;

const PROGRAM: &str = "cloud-hypervisor";
/// A library to preload where the host's nested virtualisation needs it for snapshots.
const SHIM: &str = "REWAKE_NESTED_STATE_SHIM";

/// A running `cloud-hypervisor` in a directory of its own, killed and reaped when dropped.
struct Vmm {
    child: Child,
    scratch: Scratch,
}

impl Vmm {
    /// `None`, said aloud, where this machine cannot.
    fn start(test: &str) -> Option<Self> {
        Self::start_with(test, |_| {})
    }

    fn start_with(test: &str, prepare: impl FnOnce(&mut Command)) -> Option<Self> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            eprintln!("SKIP {test}: /dev/kvm: {error}");
            return None;
        }
        let scratch = Scratch::new();
        fs::write(scratch.path("guest.elf"), halting_guest()).unwrap();
        let mut command = Command::new(PROGRAM);
        command
            .arg("--api-socket")
            .arg(format!("path={}", scratch.path("api.sock").display()))
            .arg("--event-monitor")
            .arg(format!("path={}", scratch.path("events").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(scratch.path("log")).unwrap());
        prepare(&mut command);
        match command.spawn() {
            Ok(child) => Some(Self { child, scratch }),
            Err(error) => {
                eprintln!("SKIP {test}: {PROGRAM}: {error}");
                None
            }
        }
    }

    /// Connects as soon as the socket is there.
    fn client(&mut self) -> Client {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match Client::connect(self.scratch.path("api.sock"), soon()) {
                Ok(client) => return client,
                Err(error) if error.is_disconnected() && Instant::now() < deadline => {
                    let exited = self.child.try_wait().unwrap();
                    assert!(exited.is_none(), "{exited:?}: {}", self.log());
                    sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error:?}: {}", self.log()),
            }
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.scratch.path("log")).unwrap()
    }

    fn events(&self) -> Vec<EventKind> {
        let mut kinds = Vec::new();
        let mut parser = EventParser::new();
        let bytes = fs::read(self.scratch.path("events")).unwrap();
        parser.feed(&bytes, |event| kinds.push(event.unwrap().kind()));
        kinds
    }

    /// Waits until `expected` have come one behind the other. A thread of its own writes
    /// events: they may come after the answer to the call.
    fn await_events(&self, expected: &[EventKind]) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let kinds = self.events();
            if kinds
                .windows(expected.len())
                .any(|window| window == expected)
            {
                return;
            }
            assert!(Instant::now() < deadline, "{expected:?} in {kinds:?}");
            sleep(Duration::from_millis(1));
        }
    }

    /// A machine with as little as possible.
    fn config(&self) -> VmConfig {
        VmConfig {
            cpus: CpusConfig {
                core_scheduling: Some(CoreScheduling::Off),
                ..CpusConfig::default()
            },
            memory: MemoryConfig {
                size: 64 << 20,
                shared: true,
                thp: false,
                ..MemoryConfig::default()
            },
            payload: Some(PayloadConfig {
                kernel: Some(self.scratch.path("guest.elf")),
                ..PayloadConfig::default()
            }),
            serial: SerialConfig::OFF,
            console: ConsoleConfig::OFF,
            balloon: Some(BalloonConfig::default()),
            ..VmConfig::default()
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn state(client: &mut Client) -> VmState {
    client.info(soon()).unwrap().state
}

#[test]
fn kvm_ping_tells_the_version_that_the_command_tells() {
    let Some(mut vmm) = Vmm::start("kvm_ping_tells_the_version_that_the_command_tells") else {
        return;
    };
    let mut client = vmm.client();
    let output = Command::new(PROGRAM)
        .arg("--version")
        .output()
        .unwrap()
        .stdout;
    let text = String::from_utf8(output).unwrap();
    let told: Version = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert_eq!(client.version(), told);
    let ping = client.ping(soon()).unwrap();
    assert_eq!(ping.pid, i64::from(vmm.child.id()));
    assert!(ping.features.contains(&"kvm".to_owned()), "{ping:?}");
}

#[test]
fn kvm_calls_without_a_vm_are_refused_with_a_reason() {
    let Some(mut vmm) = Vmm::start("kvm_calls_without_a_vm_are_refused_with_a_reason") else {
        return;
    };
    let mut client = vmm.client();
    let nothing = Resize::default();
    for (name, refused) in [
        ("info", client.info(soon()).map(drop)),
        ("boot", client.boot(soon())),
        ("resize", client.resize(&nothing, soon())),
    ] {
        let error = refused.unwrap_err();
        assert!(error.is_vm_missing(), "{name}: {error}");
        let missing = if client.features().missing_vm_is_404 {
            404
        } else {
            500
        };
        assert_eq!(error.status(), Some(missing), "{name}: {error}");
    }
    for (name, refused) in [
        ("pause", client.pause(soon())),
        ("resume", client.resume(soon())),
        ("counters", client.counters(soon()).map(drop)),
        (
            "snapshot",
            client.snapshot(Path::new("/nonexistent"), soon()),
        ),
        ("nmi", client.nmi(soon())),
        ("power button", client.power_button(soon())),
    ] {
        let error = refused.unwrap_err();
        assert!(error.is_not_running(), "{name}: {error}");
    }
    client.delete(soon()).unwrap();
    let restore = RestoreConfig {
        source_url: "file:///nonexistent".to_owned(),
        ..RestoreConfig::default()
    };
    let error = client.restore(&restore, &[], soon()).unwrap_err();
    assert!(error.says("Destination is not a directory"), "{error}");
    // Only builds for debugging have it.
    let error = client
        .coredump(Path::new("/nonexistent/core"), soon())
        .unwrap_err();
    assert!(
        error.is_unknown_operation() || error.is_not_running(),
        "{error}"
    );
}

#[test]
fn kvm_a_vm_lives_through_every_call() {
    let Some(mut vmm) = Vmm::start("kvm_a_vm_lives_through_every_call") else {
        return;
    };
    let mut client = vmm.client();
    let config = vmm.config();
    client.create(&config, soon()).unwrap();
    let info = client.info(soon()).unwrap();
    assert_eq!(info.state, VmState::Created);
    assert_eq!(
        (&info.config.memory.zones, info.config.memory.size),
        (&None, 64 << 20)
    );
    assert_eq!(info.config.payload, config.payload);
    assert!(
        client
            .create(&config, soon())
            .unwrap_err()
            .is_already_created()
    );

    client.boot(soon()).unwrap();
    let info = client.info(soon()).unwrap();
    assert_eq!(
        (info.state, info.memory_actual_size),
        (VmState::Running, 64 << 20)
    );
    assert!(info.device_tree.unwrap().contains_key("__balloon"));
    assert!(client.counters(soon()).unwrap().is_empty());

    let balloon = |bytes| Resize {
        desired_balloon: Some(bytes),
        ..Resize::default()
    };
    client.resize(&balloon(1 << 20), soon()).unwrap();
    client.resize(&balloon(0), soon()).unwrap();
    let error = client.snapshot(vmm.scratch.root(), soon()).unwrap_err();
    assert!(error.says("while VM is running"), "{error}");

    client.pause(soon()).unwrap();
    assert_eq!(state(&mut client), VmState::Paused);
    assert!(client.pause(soon()).unwrap_err().is_invalid_transition());
    client.resume(soon()).unwrap();
    assert!(client.resume(soon()).unwrap_err().is_invalid_transition());
    assert_eq!(state(&mut client), VmState::Running);
    client.nmi(soon()).unwrap();
    client.power_button(soon()).unwrap();

    client.shutdown(soon()).unwrap();
    assert_eq!(state(&mut client), VmState::Created);
    client.delete(soon()).unwrap();
    assert!(client.info(soon()).unwrap_err().is_vm_missing());
    client.shutdown_vmm(soon()).unwrap();

    for expected in [
        [
            EventKind::VmmStarting,
            EventKind::Booting,
            EventKind::Booted,
        ],
        [EventKind::Pausing, EventKind::Paused, EventKind::Pausing],
        [EventKind::Resuming, EventKind::Resumed, EventKind::Resuming],
    ] {
        vmm.await_events(&expected);
    }
}

#[test]
fn kvm_devices_come_and_go() {
    let Some(mut vmm) = Vmm::start("kvm_devices_come_and_go") else {
        return;
    };
    let mut client = vmm.client();
    client.create(&vmm.config(), soon()).unwrap();
    let image = |name: &str| {
        let path = vmm.scratch.path(name);
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        DiskConfig::raw(path)
    };
    // Before boot only the configuration changes, and nothing is told.
    assert_eq!(client.add_disk(&image("a.img"), soon()).unwrap(), None);
    client.boot(soon()).unwrap();
    let mut second = image("b.img");
    second.id = Some("second".to_owned());
    let added = client.add_disk(&second, soon()).unwrap().unwrap();
    assert_eq!(added.id, "second");
    assert!(added.bdf.starts_with("0000:00:"), "{added:?}");
    let info = client.info(soon()).unwrap();
    assert_eq!(info.config.disks.unwrap().len(), 2);
    assert_eq!(
        info.device_tree.unwrap()["_virtio-pci-second"]
            .pci_bdf
            .as_ref(),
        Some(&added.bdf)
    );
    let counters = client.counters(soon()).unwrap();
    assert_eq!(counters["second"]["read_bytes"], 0);

    let error = client.add_disk(&second, soon()).unwrap_err();
    assert!(
        matches!(error, ApiError::Refused { status: 500, .. }),
        "{error}"
    );
    let larger = ResizeDisk {
        id: "second".to_owned(),
        desired_size: 2 << 20,
    };
    client.resize_disk(&larger, soon()).unwrap();
    assert_eq!(
        fs::metadata(vmm.scratch.path("b.img")).unwrap().len(),
        2 << 20
    );
    // The guest has no driver, so it is only asked.
    client.remove_device("second", soon()).unwrap();
    let error = client.remove_device("nobody", soon()).unwrap_err();
    assert_eq!(error.status(), Some(500), "{error}");
    client.delete(soon()).unwrap();
}

#[test]
fn kvm_the_eleventh_connection_is_refused() {
    let Some(mut vmm) = Vmm::start("kvm_the_eleventh_connection_is_refused") else {
        return;
    };
    let mut clients = vec![vmm.client()];
    while clients.len() < 10 {
        clients.push(vmm.client());
    }
    let socket = vmm.scratch.path("api.sock");
    // CH refuses when it accepts, and closes: the request may or may not get that far.
    let error = Client::connect(&socket, soon()).unwrap_err();
    assert!(
        error.is_too_many_connections() || error.is_disconnected(),
        "{error:?}"
    );
    clients[3].disconnect();
    clients[4].ping(soon()).unwrap();
    let mut replacement = vmm.client();
    replacement.ping(soon()).unwrap();
}

#[test]
fn kvm_a_bad_request_does_not_spoil_the_next_one() {
    let Some(mut vmm) = Vmm::start("kvm_a_bad_request_does_not_spoil_the_next_one") else {
        return;
    };
    let mut client = vmm.client();
    let mut never = SendMigration::to("unix:/nonexistent");
    never.downtime_ms = Some(0);
    for _ in 0..3 {
        let error = client.send_migration(&never, soon()).unwrap_err();
        assert_eq!(error.status(), Some(400), "{error}");
        assert!(error.says("Failed to deserialize JSON"), "{error}");
        client.ping(soon()).unwrap();
    }
}

/// Opens a tap in a network namespace of its own, which lives as long as the descriptor.
fn tap(test: &str) -> Option<std::os::fd::OwnedFd> {
    use rewake_sys::netns::run_in_new;
    use rewake_sys::tun::{Tap, TapOptions};
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP {test}: not root");
        return None;
    }
    match run_in_new(|_| Tap::open("tap0", TapOptions::default())) {
        Ok(Ok(tap)) => Some(tap.into_fd()),
        Ok(Err(error)) | Err(error) => {
            eprintln!("SKIP {test}: {error}");
            None
        }
    }
}

#[test]
fn root_kvm_a_tap_is_handed_over_as_a_descriptor() {
    let test = "root_kvm_a_tap_is_handed_over_as_a_descriptor";
    let Some(mut vmm) = Vmm::start(test) else {
        return;
    };
    let Some(tap) = tap(test) else { return };
    let mut client = vmm.client();
    client.create(&vmm.config(), soon()).unwrap();
    client.boot(soon()).unwrap();
    let net = NetConfig {
        id: Some("net".to_owned()),
        ..NetConfig::default()
    };
    let added = client
        .add_net(&net, &[tap.as_fd()], soon())
        .unwrap()
        .unwrap();
    drop(tap);
    assert_eq!(added.id, "net");
    let info = client.info(soon()).unwrap();
    let nets = info.config.net.unwrap();
    assert_eq!(
        (nets.len(), nets[0].fds.as_ref().map(Vec::len)),
        (1, Some(1))
    );
    assert!(client.counters(soon()).unwrap().contains_key("net"));
}

/// Snapshots a paused VM with `config` into a directory of `vmm`, and deletes it.
fn snapshot(
    vmm: &Vmm,
    client: &mut Client,
    config: &VmConfig,
    net: Option<BorrowedFd<'_>>,
) -> RestoreConfig {
    let directory = vmm.scratch.path("snapshot");
    fs::create_dir(&directory).unwrap();
    client.create(config, soon()).unwrap();
    client.boot(soon()).unwrap();
    if let Some(tap) = net {
        client
            .add_net(&NetConfig::default(), &[tap], soon())
            .unwrap();
    }
    client.pause(soon()).unwrap();
    client.snapshot(&directory, soon()).unwrap();
    let error = client.snapshot(&directory, soon()).unwrap_err();
    assert!(error.is_destination_taken(), "{error}");
    let bytes = fs::read(directory.join("config.json")).unwrap();
    let (written, unknown) = VmConfig::parse(&bytes).unwrap();
    assert!(unknown.is_empty(), "{unknown}");
    assert_eq!(written, client.info(soon()).unwrap().config);
    client.delete(soon()).unwrap();
    RestoreConfig {
        source_url: file_url(&directory).unwrap(),
        ..RestoreConfig::default()
    }
}

/// A VMM that can take snapshots on this machine.
fn start_for_snapshots(test: &str) -> Option<Vmm> {
    let nested = fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("hypervisor"));
    match std::env::var_os(SHIM) {
        Some(shim) => Vmm::start_with(test, |command| {
            command.env("LD_PRELOAD", shim);
        }),
        None if nested => {
            eprintln!("SKIP {test}: snapshots of nested virtualisation need {SHIM}");
            None
        }
        None => Vmm::start(test),
    }
}

#[test]
fn kvm_a_snapshot_is_restored_paused_and_running() {
    let test = "kvm_a_snapshot_is_restored_paused_and_running";
    let Some(mut vmm) = start_for_snapshots(test) else {
        return;
    };
    let mut client = vmm.client();
    let mut restore = snapshot(&vmm, &mut client, &vmm.config(), None);
    client.restore(&restore, &[], soon()).unwrap();
    assert_eq!(state(&mut client), VmState::Paused);
    assert!(
        client
            .restore(&restore, &[], soon())
            .unwrap_err()
            .is_already_created()
    );
    client.resume(soon()).unwrap();
    assert_eq!(state(&mut client), VmState::Running);
    client.delete(soon()).unwrap();

    restore.resume = true;
    client.restore(&restore, &[], soon()).unwrap();
    assert_eq!(state(&mut client), VmState::Running);
    client.delete(soon()).unwrap();

    restore.memory_restore_mode = MemoryRestoreMode::OnDemand;
    if client.features().restore_on_demand {
        client.restore(&restore, &[], soon()).unwrap();
        assert_eq!(state(&mut client), VmState::Running);
    }
    vmm.await_events(&[
        EventKind::Restoring,
        EventKind::Restored,
        EventKind::Resuming,
    ]);
}

#[test]
fn root_kvm_a_restored_device_gets_its_tap_as_a_descriptor() {
    let test = "root_kvm_a_restored_device_gets_its_tap_as_a_descriptor";
    let Some(mut vmm) = start_for_snapshots(test) else {
        return;
    };
    let (Some(first), Some(second)) = (tap(test), tap(test)) else {
        return;
    };
    let mut client = vmm.client();
    let mut restore = snapshot(&vmm, &mut client, &vmm.config(), Some(first.as_fd()));
    drop(first);
    let error = client.restore(&restore, &[], soon()).unwrap_err();
    assert_eq!(error.status(), Some(500), "{error}");
    let config = fs::read(vmm.scratch.path("snapshot").join("config.json")).unwrap();
    let (written, _) = VmConfig::parse(&config).unwrap();
    restore.net_fds = Some(vec![RestoredNet {
        id: written.net.unwrap()[0].id.clone().unwrap(),
        num_fds: 1,
    }]);
    client.restore(&restore, &[second.as_fd()], soon()).unwrap();
    assert_eq!(state(&mut client), VmState::Paused);
    client.resume(soon()).unwrap();
    assert_eq!(state(&mut client), VmState::Running);
}
