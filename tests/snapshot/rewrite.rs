//! Configurations for a new life: what is replaced, what stays, what is refused by name.

use std::path::PathBuf;

use rewake::ids::IfName;
use rewake::snapshot::{
    ConfigOverrides, ConsoleOverride, DiskOverride, HostItemKind, HostPathPolicy, MemoryBacking,
    MemoryLayout, SnapshotDir, SnapshotLimits, TapOverride, TapSource, review, rewrite,
};
use rewake::vm_config::{ConsoleOutputMode, CoreScheduling, ImageType, VmConfig};
use serde_json::{Value, json};

use crate::scratch::{CAPTURED, Scratch};

fn open(name: &str) -> SnapshotDir {
    let scratch = Scratch::snapshot(name);
    SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).unwrap()
}

/// Everything that a launch of the captured Linux guest replaces.
fn launch() -> ConfigOverrides {
    ConfigOverrides {
        disks: vec![DiskOverride {
            disk: None,
            path: PathBuf::from("/dev/dm-7"),
            image_type: None,
        }],
        taps: vec![TapOverride {
            device: Some("_net1".to_owned()),
            tap: TapSource::Name(IfName::new("tap9").unwrap()),
        }],
        vsock_socket: Some(PathBuf::from("/run/rewake/1/vsock")),
        ..ConfigOverrides::default()
    }
}

/// A configuration after some keys were set; `null` stays.
fn with(config: &VmConfig, changes: &[(&str, Value)]) -> VmConfig {
    let mut value = serde_json::to_value(config).unwrap();
    for (pointer, new) in changes {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        let parent = value
            .pointer_mut(parent)
            .unwrap_or_else(|| panic!("{pointer}"));
        parent[key] = new.clone();
    }
    let (config, unknown) = VmConfig::parse(&serde_json::to_vec(&value).unwrap()).unwrap();
    assert!(unknown.is_empty(), "{unknown}");
    config
}

#[test]
fn replaces_what_is_of_the_host_and_keeps_the_rest() {
    let snapshot = open("ch-v53/linux-guest-256m");
    let rebuilt = rewrite(snapshot.config(), &launch()).unwrap();
    let mut expected = serde_json::to_value(snapshot.config()).unwrap();
    expected["disks"][0]["path"] = json!("/dev/dm-7");
    expected["disks"][0]["backing_files"] = json!(false);
    expected["net"][0]["tap"] = json!("tap9");
    expected["net"][0]
        .as_object_mut()
        .unwrap()
        .remove("host_mac");
    expected["vsock"]["socket"] = json!("/run/rewake/1/vsock");
    expected["payload"]
        .as_object_mut()
        .unwrap()
        .remove("initramfs");
    expected["serial"]["mode"] = json!("Null");
    expected["cpus"]["core_scheduling"] = json!("Off");
    assert_eq!(serde_json::to_value(&rebuilt).unwrap(), expected);
}

#[test]
fn rewriting_twice_is_rewriting_once() {
    for name in CAPTURED {
        let overrides = ConfigOverrides {
            memory: MemoryBacking::Anonymous,
            ..if name.contains("linux") {
                launch()
            } else {
                ConfigOverrides::default()
            }
        };
        let once = rewrite(open(name).config(), &overrides)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(rewrite(&once, &overrides).unwrap(), once, "{name}");
    }
}

#[test]
fn keeps_recorded_paths_only_where_asked() {
    let snapshot = open("ch-v53/linux-guest-256m");
    let refusal = rewrite(snapshot.config(), &ConfigOverrides::default()).unwrap_err();
    let refused: Vec<&str> = refusal.items.iter().map(|item| item.at.as_str()).collect();
    assert_eq!(refused, ["disks.0.path", "net.0.tap", "vsock.socket"]);
    assert_eq!(
        refusal.items[0].to_string(),
        "disks.0.path: /dev/mapper/rw-1 is of the host that wrote it, and nothing replaces it"
    );

    let kept = ConfigOverrides {
        policy: HostPathPolicy::AS_RECORDED,
        ..ConfigOverrides::default()
    };
    let rebuilt = rewrite(snapshot.config(), &kept).unwrap();
    let disks = rebuilt.disks.unwrap();
    assert_eq!(disks[0].path, Some(PathBuf::from("/dev/mapper/rw-1")));
    let nets = rebuilt.net.unwrap();
    assert_eq!(nets[0].tap.as_deref(), Some("tap0"));
    assert_eq!(nets[0].host_mac, None);
}

#[test]
fn refuses_each_reference_to_the_host_by_name() {
    let device = |key: &str| json!([{key: "/h", "pci_segment": 0}]);
    let cases: Vec<(&str, Value, &str)> = vec![
        ("/disks/0/vhost_socket", json!("/h"), "disks.0.vhost_socket"),
        ("/disks/0/vhost_user", json!(true), "disks.0.vhost_socket"),
        ("/net/0/vhost_socket", json!("/h"), "net.0.vhost_socket"),
        ("/net/0/vhost_user", json!(true), "net.0.vhost_socket"),
        ("/rng/src", json!("/etc/shadow"), "rng.src"),
        ("/rng/src", json!("/dev/../dev/urandom"), "rng.src"),
        ("/payload/igvm", json!("/h"), "payload.igvm"),
        ("/payload/host_data", json!("00"), "payload.host_data"),
        ("/payload/fw_cfg_config", json!({}), "payload.fw_cfg_config"),
        ("/payload/firmware", json!("/h"), "payload"),
        ("/payload", json!({}), "payload"),
        (
            "/generic_vhost_user",
            json!([{"socket": "/h", "queue_sizes": [1], "device_type": 1}]),
            "generic_vhost_user.0.socket",
        ),
        ("/fs", json!([{"tag": "t", "socket": "/h"}]), "fs.0.socket"),
        ("/pmem", device("file"), "pmem.0.file"),
        ("/devices", device("path"), "devices.0.path"),
        ("/user_devices", device("socket"), "user_devices.0.socket"),
        ("/vdpa", device("path"), "vdpa.0.path"),
        ("/tpm", json!({"socket": "/h"}), "tpm.socket"),
        ("/ivshmem", json!({"path": "/h", "size": 1}), "ivshmem.path"),
        ("/gdb", json!(true), "gdb"),
        (
            "/landlock_rules",
            json!([{"path": "/", "access": "rw"}]),
            "landlock_rules.0.path",
        ),
        ("/platform", json!({"tdx": true}), "platform.tdx"),
        ("/platform", json!({"sev_snp": true}), "platform.sev_snp"),
        ("/platform", json!({"iommufd": true}), "platform.iommufd"),
        ("/platform", json!({"iommufd_fd": 3}), "platform.iommufd_fd"),
        (
            "/memory/zones",
            json!([{"id": "mem0", "size": 4096, "file": "/etc/shadow"}]),
            "memory.zones.0.file",
        ),
    ];
    let snapshot = open("ch-v53/linux-guest-256m");
    for (pointer, value, expected) in cases {
        let config = with(snapshot.config(), &[(pointer, value)]);
        let refusal = match rewrite(&config, &launch()) {
            Ok(_) => panic!("{pointer} was accepted"),
            Err(refusal) => refusal,
        };
        let refused: Vec<&str> = refusal.items.iter().map(|item| item.at.as_str()).collect();
        assert_eq!(refused, [expected], "{pointer}: {refusal}");
    }
}

#[test]
fn refuses_what_the_disk_and_tap_of_another_process_were() {
    let snapshot = open("ch-v53/linux-guest-256m");
    let mut overrides = launch();
    overrides.disks[0].image_type = Some(ImageType::Qcow2);
    let config = with(
        snapshot.config(),
        &[("/disks/0/backing_files", json!(true))],
    );
    let refusal = rewrite(&config, &overrides).unwrap_err();
    assert_eq!(refusal.items[0].at, "disks.0.backing_files");

    overrides = launch();
    overrides.taps.clear();
    overrides.policy = HostPathPolicy::AS_RECORDED;
    for (pointer, value, at) in [
        ("/net/0/fds", json!([3]), "net.0.fds"),
        ("/net/0/tap", json!("../../etc"), "net.0.tap"),
        ("/net/0/tap", json!("sixteen-letters-"), "net.0.tap"),
    ] {
        let config = with(snapshot.config(), &[(pointer, value)]);
        let refusal = rewrite(&config, &overrides).unwrap_err();
        assert_eq!(refusal.items[0].at, at);
        assert_eq!(refusal.items.len(), 1);
    }
}

#[test]
fn refuses_recorded_paths_that_depend_on_a_working_directory() {
    let kept = ConfigOverrides {
        policy: HostPathPolicy::AS_RECORDED,
        ..ConfigOverrides::default()
    };
    let refusal = rewrite(open("ch-v53/zone-file-shared-4g").config(), &kept).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "The configuration is refused: memory.zones.0.file: ram is not an absolute path"
    );
}

#[test]
fn refuses_overrides_that_fit_no_device() {
    let snapshot = open("ch-v53/linux-guest-256m");
    type Change = fn(&mut ConfigOverrides);
    let cases: [(&str, Change); 9] = [
        ("overrides.disks.0: There is no such device", |o| {
            o.disks[0].disk = Some("_disk1".to_owned());
            o.policy = HostPathPolicy::AS_RECORDED;
        }),
        ("overrides.disks.1: Another override", |o| {
            o.disks.push(o.disks[0].clone());
        }),
        ("overrides.taps.1: Another override", |o| {
            o.taps.push(o.taps[0].clone());
        }),
        (
            "overrides.disks.0.path: disk is not an absolute path",
            |o| {
                o.disks[0].path = PathBuf::from("disk");
            },
        ),
        ("overrides.disks.0.path: /a\\0b cannot be written", |o| {
            o.disks[0].path = PathBuf::from("/a\0b");
        }),
        ("overrides.rng_source: /dev/zero is not one of", |o| {
            o.rng_source = Some(PathBuf::from("/dev/zero"));
        }),
        ("overrides.console: The device was off", |o| {
            o.console = ConsoleOverride::File(PathBuf::from("/c"));
        }),
        ("vsock.socket: The socket path has 201 bytes", |o| {
            o.vsock_socket = Some(PathBuf::from(format!("/{}", "s".repeat(200))));
        }),
        ("overrides.boot_image: k is not an absolute path", |o| {
            o.boot_image = Some(PathBuf::from("k"));
        }),
    ];
    for (expected, change) in cases {
        let mut overrides = launch();
        change(&mut overrides);
        let text = rewrite(snapshot.config(), &overrides)
            .unwrap_err()
            .to_string();
        assert!(text.contains(expected), "{expected}: {text}");
        assert_eq!(text.matches("; ").count(), 0, "{expected}: {text}");
    }
    let two = with(
        snapshot.config(),
        &[(
            "/disks",
            json!([{"id": "a", "path": "/a"}, {"id": "b", "path": "/b"}]),
        )],
    );
    let text = rewrite(&two, &launch()).unwrap_err().to_string();
    assert!(
        text.contains("overrides.disks.0: There are 2 such devices"),
        "{text}"
    );
}

#[test]
fn consoles_keep_their_presence_and_lose_their_files() {
    let snapshot = open("ch-v53/linux-guest-256m");
    let file = ConsoleOverride::File(PathBuf::from("/run/serial"));
    let recorded_file = json!({"mode": "File", "file": "/var/log/x"});
    for (recorded, wanted, mode, path) in [
        (json!({"mode": "Tty"}), ConsoleOverride::Quiet, "Null", None),
        (json!({"mode": "Pty"}), ConsoleOverride::Quiet, "Null", None),
        (json!({"mode": "Off"}), ConsoleOverride::Quiet, "Off", None),
        (
            json!({"mode": "Null"}),
            ConsoleOverride::Quiet,
            "Null",
            None,
        ),
        (
            json!({"mode": "Tty"}),
            file.clone(),
            "File",
            Some("/run/serial"),
        ),
        (recorded_file.clone(), file, "File", Some("/run/serial")),
        (recorded_file.clone(), ConsoleOverride::Quiet, "Null", None),
        (
            recorded_file,
            ConsoleOverride::Recorded,
            "File",
            Some("/var/log/x"),
        ),
        (
            json!({"mode": "Tty"}),
            ConsoleOverride::Recorded,
            "Tty",
            None,
        ),
    ] {
        let config = with(snapshot.config(), &[("/serial", recorded.clone())]);
        let overrides = ConfigOverrides {
            serial: wanted.clone(),
            ..launch()
        };
        let serial = rewrite(&config, &overrides).unwrap().serial;
        let name = format!("{recorded} {wanted:?}");
        assert_eq!(format!("{:?}", serial.mode), mode, "{name}");
        assert_eq!(serial.file, path.map(PathBuf::from), "{name}");
        assert_eq!(serial.socket, None, "{name}");
    }
}

#[test]
fn states_the_image_type() {
    let snapshot = open("ch-v53/linux-guest-256m");
    for (recorded, wanted, expected) in [
        (json!("Unknown"), None, ImageType::Raw),
        (Value::Null, None, ImageType::Raw),
        (json!("Qcow2"), None, ImageType::Qcow2),
        (json!("Qcow2"), Some(ImageType::Raw), ImageType::Raw),
    ] {
        let config = with(snapshot.config(), &[("/disks/0/image_type", recorded)]);
        let mut overrides = launch();
        overrides.disks[0].image_type = wanted;
        let disks = rewrite(&config, &overrides).unwrap().disks.unwrap();
        assert_eq!(disks[0].image_type, Some(expected));
    }
}

#[test]
fn passes_taps_by_descriptor_one_per_queue_pair() {
    let snapshot = open("ch-v53/linux-guest-256m");
    for (queues, expected) in [(2, 1), (4, 2)] {
        let config = with(snapshot.config(), &[("/net/0/num_queues", json!(queues))]);
        let mut overrides = launch();
        overrides.taps[0].tap = TapSource::Descriptors;
        let nets = rewrite(&config, &overrides).unwrap().net.unwrap();
        assert_eq!(nets[0].tap, None);
        assert_eq!(nets[0].fds, Some(vec![-1; expected]));
    }
}

#[test]
fn puts_memory_into_one_zone_with_a_file() {
    for (name, zone) in [
        (
            "ch-v53/memfd-shared-4g",
            json!({"id": "mem0", "size": 4_u64 << 30, "file": "/m", "shared": false,
                "hugepages": false, "prefault": false}),
        ),
        (
            "ch-v53/zone-file-shared-4g",
            json!({"id": "mem0", "size": 4_u64 << 30, "file": "/m", "shared": false,
                "hugepages": false, "prefault": false, "reserve": false, "mergeable": false}),
        ),
    ] {
        let snapshot = open(name);
        let layout = MemoryLayout::analyse(snapshot.config(), snapshot.state().memory()).unwrap();
        let overrides = ConfigOverrides {
            memory: MemoryBacking::File {
                path: PathBuf::from("/m"),
                shared: false,
                layout,
            },
            ..ConfigOverrides::default()
        };
        let memory = rewrite(snapshot.config(), &overrides).unwrap().memory;
        assert_eq!(memory.size, 0, "{name}");
        assert!(!memory.prefault, "{name}");
        let zones = serde_json::to_value(memory.zones).unwrap();
        assert_eq!(zones, json!([zone]), "{name}");
    }
}

#[test]
fn refuses_a_layout_of_other_memory() {
    let layout = |name| {
        let snapshot = open(name);
        MemoryLayout::analyse(snapshot.config(), snapshot.state().memory()).unwrap()
    };
    let overrides = ConfigOverrides {
        memory: MemoryBacking::File {
            path: PathBuf::from("/m"),
            shared: true,
            layout: layout("ch-v53/private-128m"),
        },
        ..ConfigOverrides::default()
    };
    for name in ["ch-v53/memfd-shared-4g", "ch-v53/two-zones-256m"] {
        assert!(rewrite(open(name).config(), &overrides).is_err(), "{name}");
    }
}

#[test]
fn leaves_out_placement_on_the_host_unless_it_is_kept() {
    let snapshot = open("ch-v53/linux-guest-256m");
    let cpus = json!([{"vcpu": 0, "host_cpus": [1]}]);
    let queues = json!([{"queue_index": 0, "host_cpus": [1]}]);
    let config = with(
        snapshot.config(),
        &[
            ("/cpus/affinity", cpus),
            ("/disks/0/queue_affinity", queues),
        ],
    );
    let rebuilt = rewrite(&config, &launch()).unwrap();
    assert_eq!(rebuilt.cpus.affinity, None);
    assert_eq!(rebuilt.disks.unwrap()[0].queue_affinity, None);
    let mut overrides = launch();
    overrides.policy = HostPathPolicy::AS_RECORDED;
    overrides.core_scheduling = CoreScheduling::Vcpu;
    let rebuilt = rewrite(&config, &overrides).unwrap();
    assert_eq!(rebuilt.cpus.affinity, config.cpus.affinity);
    assert_eq!(rebuilt.cpus.core_scheduling, Some(CoreScheduling::Vcpu));
    assert!(rebuilt.disks.unwrap()[0].queue_affinity.is_some());
}

#[test]
fn reviews_a_linux_guest() {
    let found = review(open("ch-v53/linux-guest-256m").config());
    let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        [
            "payload.kernel = /l2/vmlinuz (boot image)",
            "payload.initramfs = /l2/initrd.gz (initramfs)",
            "disks.0.path = /dev/mapper/rw-1 (disk)",
            "net.0.tap = tap0 (tap interface)",
            "net.0.mac = 02:fc:00:00:00:05 (Ethernet address of the guest)",
            "net.0.host_mac = 02:00:00:00:00:01 (Ethernet address of the tap)",
            "rng.src = /dev/urandom (source of random numbers)",
            "serial.mode = Tty (terminal)",
            "vsock.socket = /tmp/v.sock (listening socket)",
        ]
    );
}

#[test]
fn both_versions_spell_the_same_review() {
    for name in ["private-128m", "zone-file-shared-4g", "two-zones-256m"] {
        let of = |version: &str| review(open(&format!("{version}/{name}")).config());
        assert_eq!(of("ch-v52"), of("ch-v53"), "{name}");
    }
    let found = review(open("ch-v52/zone-file-shared-4g").config());
    assert!(
        found.iter().any(|item| {
            item.kind == HostItemKind::MemoryFile && item.at == "memory.zones.0.file"
        })
    );
}

#[test]
fn a_rewritten_console_never_turns_off() {
    let snapshot = open("ch-v53/linux-guest-256m");
    let config = with(
        snapshot.config(),
        &[
            ("/console", json!({"mode": "Tty"})),
            ("/debug_console/mode", json!("Tty")),
        ],
    );
    let rebuilt = rewrite(&config, &launch()).unwrap();
    assert_eq!(rebuilt.console.mode, ConsoleOutputMode::Null);
    assert_eq!(rebuilt.debug_console.mode, ConsoleOutputMode::Null);
}
