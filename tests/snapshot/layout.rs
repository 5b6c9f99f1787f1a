//! Which snapshots can be mapped from a file, and what is written for them.

use std::path::PathBuf;

use rewake::snapshot::{
    MemoryLayout, MemorySource, NotMappable, SnapshotDir, SnapshotLimits, State, StateLimits,
};
use rewake::units::Bytes;
use rewake::vm_config::{
    DeviceConfig, DiskConfig, FsConfig, HotplugMethod, NetConfig, VdpaConfig, VmConfig,
};
use serde_json::Value;

use crate::scratch::{CAPTURED, Scratch};

fn open(name: &str) -> SnapshotDir {
    let scratch = Scratch::snapshot(name);
    SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).unwrap()
}

fn analyse(snapshot: &SnapshotDir) -> Result<MemoryLayout, NotMappable> {
    MemoryLayout::analyse(snapshot.config(), snapshot.state().memory())
}

/// The memory manager's state, decoded twice.
fn memory_manager(state: &[u8]) -> Value {
    let tree: Value = serde_json::from_slice(state).unwrap();
    let text = &tree["snapshots"]["memory-manager"]["snapshot_data"]["state"];
    serde_json::from_str(text.as_str().unwrap()).unwrap()
}

#[test]
fn finds_true_offsets_in_captured_snapshots() {
    let zone_file = MemorySource::ZoneFile(PathBuf::from("ram"));
    for version in ["ch-v52", "ch-v53"] {
        for (name, source, offsets, size) in [
            ("private-128m", MemorySource::Saved, &[0][..], 128 << 20),
            (
                "memfd-shared-4g",
                MemorySource::Saved,
                &[0, 3 << 30],
                4 << 30,
            ),
            (
                "zone-file-shared-4g",
                zone_file.clone(),
                &[0, 3 << 30],
                4 << 30,
            ),
            ("hotplug-acpi-512m", MemorySource::Saved, &[0], 512 << 20),
        ] {
            let layout = analyse(&open(&format!("{version}/{name}"))).unwrap();
            assert_eq!(layout.source(), &source, "{name}");
            assert_eq!(layout.offsets(), offsets, "{name}");
            assert_eq!(layout.file_size(), Bytes(size), "{name}");
            assert_eq!(layout.zone_size(), Bytes(size), "{name}");
            assert_eq!(layout.zone(), "mem0", "{name}");
        }
    }
    let layout = analyse(&open("ch-v53/linux-guest-256m")).unwrap();
    assert_eq!(layout.offsets(), [0]);
}

#[test]
fn rewrites_memory_and_nothing_else() {
    let mut rewritten = 0;
    for name in CAPTURED {
        let snapshot = open(name);
        let state = snapshot.state();
        let Ok(layout) = analyse(&snapshot) else {
            assert!(name.ends_with("two-zones-256m"), "{name}");
            continue;
        };
        rewritten += 1;
        let bytes = state.mapped_from_file(&layout).unwrap();

        // The same but for the two lists.
        let mut expected = memory_manager(state.as_bytes());
        expected["memory_ranges"]["data"] = Value::Array(Vec::new());
        for (index, offset) in layout.offsets().iter().enumerate() {
            expected["guest_ram_mappings"][index]["file_offset"] = (*offset).into();
        }
        assert_eq!(memory_manager(&bytes), expected, "{name}");

        // Outside the memory manager to the byte.
        let tail = |bytes: &[u8]| {
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            let (head, tail) = text.split_once(r#""memory-manager""#).unwrap();
            let (_, tail) = tail.split_once(r#"next_hotplug_slot"#).unwrap();
            (head.to_owned(), tail.to_owned())
        };
        assert_eq!(tail(&bytes), tail(state.as_bytes()), "{name}");

        // It is a state again, and rewriting it changes nothing more.
        let again = State::parse(bytes.clone(), &StateLimits::default()).unwrap();
        assert_eq!(again.memory().saved(), Bytes(0), "{name}");
        assert_eq!(again.mapped_from_file(&layout).unwrap(), bytes, "{name}");
    }
    assert_eq!(rewritten, 9);
}

#[test]
fn refuses_the_layout_of_another_snapshot() {
    let layout = analyse(&open("ch-v53/memfd-shared-4g")).unwrap();
    let other = open("ch-v53/private-128m");
    assert!(other.state().mapped_from_file(&layout).is_err());
}

#[test]
fn says_why_memory_cannot_be_mapped() {
    let vhost_user = |at: &str| NotMappable::VhostUser { at: at.to_owned() };
    let host_device = |at: &str| NotMappable::HostDevice { at: at.to_owned() };
    type Change = fn(&mut VmConfig);
    let cases: [(&str, Change, NotMappable); 8] = [
        (
            "huge pages",
            |config| config.memory.hugepages = true,
            NotMappable::HugePages {
                at: "memory.hugepages".to_owned(),
            },
        ),
        (
            "virtio-mem",
            |config| {
                config.memory.hotplug_method = HotplugMethod::VirtioMem;
                config.memory.hotplug_size = Some(1 << 30);
            },
            NotMappable::VirtioMem,
        ),
        (
            "vhost-user disk",
            |config| {
                config.disks = Some(vec![
                    DiskConfig::default(),
                    DiskConfig {
                        vhost_user: true,
                        ..DiskConfig::default()
                    },
                ]);
            },
            vhost_user("disks.1.vhost_user"),
        ),
        (
            "vhost-user network",
            |config| {
                config.net = Some(vec![NetConfig {
                    vhost_user: true,
                    ..NetConfig::default()
                }]);
            },
            vhost_user("net.0.vhost_user"),
        ),
        (
            "virtio-fs",
            |config| config.fs = Some(vec![FsConfig::default()]),
            vhost_user("fs"),
        ),
        (
            "VFIO",
            |config| config.devices = Some(vec![DeviceConfig::default()]),
            host_device("devices"),
        ),
        (
            "vDPA",
            |config| config.vdpa = Some(vec![VdpaConfig::default()]),
            host_device("vdpa"),
        ),
        (
            "empty lists are no devices",
            |config| {
                config.devices = Some(Vec::new());
                config.memory.hugepages = true;
            },
            NotMappable::HugePages {
                at: "memory.hugepages".to_owned(),
            },
        ),
    ];
    let snapshot = open("ch-v53/memfd-shared-4g");
    for (name, change, expected) in cases {
        let mut config = snapshot.config().clone();
        change(&mut config);
        let found = MemoryLayout::analyse(&config, snapshot.state().memory());
        assert_eq!(found, Err(expected), "{name}");
    }
    for version in ["ch-v52", "ch-v53"] {
        let found = analyse(&open(&format!("{version}/two-zones-256m")));
        assert_eq!(found, Err(NotMappable::SeveralZones { count: 2 }));
    }
}

#[test]
fn follows_the_order_of_the_file_not_of_memory() {
    const LOW: &str = r#"{\"gpa\":0,\"length\":3221225472}"#;
    const HIGH: &str = r#"{\"gpa\":4294967296,\"length\":1073741824}"#;
    const PARTS: [&str; 2] = [
        r#"{\"gpa\":0,\"length\":4096}"#,
        r#"{\"gpa\":4096,\"length\":3221221376}"#,
    ];
    let both = format!("{LOW},{HIGH}");
    let scattered = NotMappable::Scattered { index: 0 };
    for (name, ranges, expected) in [
        ("swapped", format!("{HIGH},{LOW}"), Ok(vec![1 << 30, 0])),
        (
            "one mapping in two ranges",
            format!("{},{},{HIGH}", PARTS[0], PARTS[1]),
            Ok(vec![0, 3 << 30]),
        ),
        (
            "two ranges in the wrong order",
            format!("{},{},{HIGH}", PARTS[1], PARTS[0]),
            Err(scattered.clone()),
        ),
        (
            "two ranges with another between",
            format!("{},{HIGH},{}", PARTS[0], PARTS[1]),
            Err(scattered),
        ),
    ] {
        let scratch = Scratch::snapshot("ch-v53/memfd-shared-4g");
        scratch.edit("state.json", &both, &ranges);
        let snapshot = SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).unwrap();
        let offsets = analyse(&snapshot).map(|layout| layout.offsets().to_vec());
        assert_eq!(offsets, expected, "{name}");
    }
}

#[test]
fn refuses_two_mappings_at_one_place_of_the_zone_file() {
    let scratch = Scratch::snapshot("ch-v53/zone-file-shared-4g");
    scratch.edit(
        "state.json",
        r#"\"file_offset\":3221225472"#,
        r#"\"file_offset\":4096"#,
    );
    let snapshot = SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).unwrap();
    let aliased = NotMappable::Aliased {
        first: 0,
        second: 1,
    };
    assert_eq!(analyse(&snapshot), Err(aliased));
}
