//! What real Cloud Hypervisors wrote is accepted and understood.

use rewake::snapshot::{MemoryFile, SnapshotDir, SnapshotLimits};
use rewake::units::Bytes;
use rewake::vm_config::MacAddr;

use crate::scratch::{CAPTURED, Scratch, chain};

fn open(scratch: &Scratch) -> SnapshotDir {
    SnapshotDir::open(scratch.root(), &SnapshotLimits::default())
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}

#[test]
fn opens_every_captured_snapshot() {
    for name in CAPTURED {
        let scratch = Scratch::snapshot(name);
        let before = scratch.census();
        let snapshot = SnapshotDir::open(scratch.root(), &SnapshotLimits::default())
            .unwrap_or_else(|error| panic!("{name}: {}", chain(&error)));
        let saved = snapshot.state().memory().saved();
        let file = snapshot.memory().map_or(Bytes(0), MemoryFile::size);
        assert_eq!(saved, file, "{name}");
        assert_eq!(
            before,
            scratch.census(),
            "{name}: opening changed something"
        );
    }
}

#[test]
fn reads_memory_as_recorded() {
    type Case<'a> = (&'a str, u64, &'a [(u64, u64)], &'a [(u64, u64, u64)]);
    let cases: [Case<'_>; 4] = [
        (
            "private-128m",
            128 << 20,
            &[(0, 128 << 20)],
            &[(0, 128 << 20, 0)],
        ),
        (
            "memfd-shared-4g",
            4 << 30,
            &[(0, 3 << 30), (4 << 30, 1 << 30)],
            &[(0, 3 << 30, 0), (4 << 30, 1 << 30, 0)],
        ),
        (
            "zone-file-shared-4g",
            4 << 30,
            &[],
            &[(0, 3 << 30, 0), (4 << 30, 1 << 30, 3 << 30)],
        ),
        (
            "two-zones-256m",
            256 << 20,
            &[(128 << 20, 128 << 20), (0, 128 << 20)],
            &[(128 << 20, 128 << 20, 0), (0, 128 << 20, 0)],
        ),
    ];
    for version in ["ch-v52", "ch-v53"] {
        for (name, ram, ranges, mappings) in cases {
            let snapshot = open(&Scratch::snapshot(&format!("{version}/{name}")));
            let memory = snapshot.state().memory();
            assert_eq!(memory.ram(), Bytes(ram), "{name}");
            assert_eq!(memory.boot_ram(), Some(Bytes(ram)), "{name}");
            let found: Vec<_> = memory.ranges().iter().map(|r| (r.gpa, r.length)).collect();
            assert_eq!(found, ranges, "{name}");
            let found: Vec<_> = memory
                .mappings()
                .iter()
                .map(|m| (m.gpa, m.size, m.file_offset))
                .collect();
            assert_eq!(found, mappings, "{name}");
        }
    }
}

#[test]
fn reads_cpus_devices_clock_and_mac_of_a_linux_guest() {
    let snapshot = open(&Scratch::snapshot("ch-v53/linux-guest-256m"));
    let state = snapshot.state();
    assert_eq!(state.vcpus(), 2);
    assert!(state.has_clock().unwrap());
    assert_eq!(
        state.guest_mac("_net1").unwrap(),
        MacAddr([0x02, 0xfc, 0, 0, 0, 0x05])
    );
    for id in ["__balloon", "__serial", "_disk0", "_net1", "_vsock2"] {
        assert!(state.has_device(id), "{id}");
    }
    assert!(!state.has_device("__console"));
    let cpu = state.cpu().unwrap().unwrap();
    assert_eq!(cpu.vendor, "AuthenticAMD");
    assert_eq!(cpu.signature, 8_589_072);
}

#[test]
fn refuses_the_mac_of_what_is_no_network_device() {
    let snapshot = open(&Scratch::snapshot("ch-v53/linux-guest-256m"));
    for (id, expected) in [
        ("_disk0", "The state of _disk0 cannot be read"),
        ("_net7", "The state of _net7 is missing"),
    ] {
        let error = snapshot.state().guest_mac(id).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn ignores_every_other_file_in_the_directory() {
    let scratch = Scratch::snapshot("ch-v53/private-128m");
    std::fs::write(scratch.path("wrenn-snapshot.json"), "not JSON").unwrap();
    std::fs::write(scratch.path("rewake.json"), [0xff; 64]).unwrap();
    std::fs::create_dir(scratch.path("sub")).unwrap();
    std::os::unix::fs::symlink("/", scratch.path("link")).unwrap();
    open(&scratch);
}
