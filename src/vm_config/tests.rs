use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Every `config.json` that a real CH wrote.
fn captured() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for version in ["ch-v52", "ch-v53"] {
        let snapshots = fixtures().join("snapshots").join(version);
        for entry in fs::read_dir(&snapshots).unwrap() {
            found.push(entry.unwrap().path().join("config.json"));
        }
    }
    assert!(found.len() >= 11, "{found:?}");
    found
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => map
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key, without_nulls(value)))
            .collect(),
        Value::Array(items) => items.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

/// Every field of every type, at a value that is not its default.
const EVERYTHING: &str = r#"{
        "cpus": {
            "boot_vcpus": 2, "max_vcpus": 4, "kvm_hyperv": true, "max_phys_bits": 40,
            "topology": {"threads_per_core": 1, "cores_per_die": 2, "dies_per_package": 1, "packages": 2},
            "affinity": [{"vcpu": 0, "host_cpus": [1, 3]}], "features": {"amx": true}, "nested": false,
            "core_scheduling": "Off", "profile": "Host"
        },
        "memory": {
            "size": 0, "mergeable": true, "hotplug_method": "VirtioMem", "hotplug_size": 1, "hotplugged_size": 1,
            "shared": true, "hugepages": true, "hugepage_size": 2097152, "prefault": true, "reserve": true,
            "thp": false,
            "zones": [{"id": "mem0", "size": 4096, "file": "/m", "shared": true, "hugepages": true,
                "hugepage_size": 1, "host_numa_node": 1, "hotplug_size": 1, "hotplugged_size": 1,
                "prefault": true, "reserve": true, "mergeable": true}]
        },
        "payload": {"firmware": "/f", "kernel": "/k", "cmdline": "c", "initramfs": "/i", "igvm": "/g",
            "host_data": "d", "fw_cfg_config": {"e820": false, "kernel": false, "cmdline": false,
                "initramfs": false, "acpi_tables": false,
                "items": {"item_list": [{"name": "n", "file": "/x", "string": "s"}]}}},
        "rate_limit_groups": [{"id": "g", "rate_limiter_config": {
            "bandwidth": {"size": 1, "one_time_burst": 2, "refill_time": 3}, "ops": {"size": 1, "refill_time": 3}}}],
        "disks": [{"id": "d", "iommu": true, "pci_segment": 1, "pci_device_id": 9, "path": "/d", "readonly": true,
            "direct": true, "num_queues": 4, "queue_size": 64, "vhost_user": true, "vhost_socket": "/s",
            "rate_limit_group": "g", "rate_limiter_config": {}, "disable_io_uring": true, "disable_aio": true,
            "serial": "x", "queue_affinity": [{"queue_index": 0, "host_cpus": [0]}], "backing_files": true,
            "sparse": false, "image_type": "Qcow2", "lock_granularity": "Full"}],
        "net": [{"id": "n", "pci_segment": 0, "tap": "tap0", "ip": "10.0.0.1", "mask": "255.0.0.0",
            "mac": "02:fc:00:00:00:05", "host_mac": "02:00:00:00:00:01", "mtu": 1400, "num_queues": 4,
            "queue_size": 64, "vhost_user": true, "vhost_socket": "/s", "vhost_mode": "Server", "fds": [-1, -1],
            "rate_limiter_config": {}, "offload_tso": false, "offload_ufo": false, "offload_csum": false}],
        "rng": {"id": "r", "pci_segment": 0, "src": "/dev/random"},
        "balloon": {"pci_segment": 0, "size": 1, "deflate_on_oom": true, "free_page_reporting": true},
        "generic_vhost_user": [{"pci_segment": 0, "socket": "/s", "queue_sizes": [1], "device_type": 26}],
        "fs": [{"pci_segment": 0, "tag": "t", "socket": "/s", "num_queues": 2, "queue_size": 64}],
        "pmem": [{"pci_segment": 0, "file": "/p", "size": 1, "discard_writes": true}],
        "serial": {"mode": "Socket", "socket": "/s"},
        "console": {"mode": "File", "file": "/c", "socket": "/s", "id": "c", "pci_segment": 0},
        "debug_console": {"mode": "File", "file": "/c", "iobase": 1},
        "devices": [{"pci_segment": 0, "path": "/sys/d", "fd": -1, "x_nv_gpudirect_clique": 1,
            "x_exclude_mmap_bars": [1]}],
        "user_devices": [{"pci_segment": 0, "socket": "/s"}],
        "vdpa": [{"pci_segment": 0, "path": "/dev/v", "num_queues": 2}],
        "vsock": {"pci_segment": 0, "cid": 3, "socket": "/s"},
        "pvmemcontrol": {},
        "pvpanic": true, "iommu": true, "watchdog": true,
        "numa": [{"guest_numa_id": 1, "cpus": [0], "distances": [{"destination": 1, "distance": 20}],
            "memory_zones": ["mem0"], "pci_segments": [0], "device_id": "d"}],
        "rtc": {"id": "c", "pci_segment": 0},
        "gdb": true,
        "pci_segments": [{"pci_segment": 1, "mmio32_aperture_weight": 2, "mmio64_aperture_weight": 3}],
        "platform": {"num_pci_segments": 2, "iommu_segments": [1], "iommu_address_width_bits": 48,
            "serial_number": "s", "system_serial_number": "s", "uuid": "u", "system_uuid": "u",
            "oem_strings": ["o"], "system_manufacturer": "m", "system_product_name": "p", "system_version": "v",
            "system_family": "f", "system_sku_number": "k", "chassis_asset_tag": "a", "tdx": true, "sev_snp": true,
            "iommufd": true, "iommufd_fd": -1, "vfio_p2p_dma": false},
        "tpm": {"socket": "/s"},
        "landlock_enable": true,
        "landlock_rules": [{"path": "/l", "access": "rw"}],
        "ivshmem": {"pci_segment": 0, "path": "/i", "size": 1}
    }"#;

fn everything() -> Value {
    serde_json::from_str(EVERYTHING).unwrap()
}

#[test]
fn every_captured_configuration_is_written_back_as_it_was_read() {
    for path in captured() {
        let bytes = fs::read(&path).unwrap();
        let (config, unknown) = VmConfig::parse(&bytes).unwrap();
        assert!(unknown.is_empty(), "{}: {unknown}", path.display());
        let original: Value = serde_json::from_slice(&bytes).unwrap();
        let written = serde_json::to_value(&config).unwrap();
        assert_eq!(written, without_nulls(original), "{}", path.display());
    }
}

#[test]
fn every_field_is_known_and_written_back() {
    let text = serde_json::to_vec(&everything()).unwrap();
    let (config, unknown) = VmConfig::parse(&text).unwrap();
    assert!(unknown.is_empty(), "{unknown}");
    assert_eq!(serde_json::to_value(&config).unwrap(), everything());
}

#[test]
fn a_foreign_key_is_named_wherever_it_stands() {
    /// A copy of `value` for every object inside it, with one foreign key added there.
    fn plant(
        value: &Value,
        path: &str,
        put: &dyn Fn(Value) -> Value,
        out: &mut Vec<(String, Value)>,
    ) {
        let join = |segment: &str| match path {
            "" => segment.to_owned(),
            _ => format!("{path}.{segment}"),
        };
        match value {
            Value::Object(map) => {
                for foreign in [Value::Null, json!({"deep": [1]})] {
                    let mut with = map.clone();
                    with.insert("foreign".to_owned(), foreign);
                    out.push((join("foreign"), put(Value::Object(with))));
                }
                for (key, child) in map {
                    let put_child = |planted: Value| {
                        let mut with = map.clone();
                        with.insert(key.clone(), planted);
                        put(Value::Object(with))
                    };
                    plant(child, &join(key), &put_child, out);
                }
            }
            Value::Array(items) => {
                for (index, child) in items.iter().enumerate() {
                    let put_child = |planted: Value| {
                        let mut with = items.clone();
                        with[index] = planted;
                        put(Value::Array(with))
                    };
                    plant(child, &join(&index.to_string()), &put_child, out);
                }
            }
            _ => {}
        }
    }
    let mut planted = Vec::new();
    plant(&everything(), "", &|value| value, &mut planted);
    assert!(planted.len() > 80, "{}", planted.len());
    for (path, value) in planted {
        let (config, unknown) = VmConfig::parse(&serde_json::to_vec(&value).unwrap()).unwrap();
        assert_eq!(unknown.paths(), std::slice::from_ref(&path));
        assert_eq!(
            serde_json::to_value(&config).unwrap(),
            everything(),
            "{path}"
        );
    }
}

#[test]
fn absent_keys_read_as_cloud_hypervisor_reads_them() {
    let (config, _) = VmConfig::parse(b"{}").unwrap();
    assert_eq!(config, VmConfig::default());
    assert_eq!(config.memory.size, 512 << 20);
    assert!(config.memory.thp && config.cpus.nested);
    assert_eq!(config.cpus.max_phys_bits, 46);
    assert_eq!(config.rng.src, Path::new("/dev/urandom"));
    assert_eq!(config.serial.mode, ConsoleOutputMode::Null);
    assert_eq!(config.console.mode, ConsoleOutputMode::Tty);
    assert_eq!(config.debug_console.iobase, Some(233));

    let text = br#"{"disks":[{}],"net":[{}],"fs":[{"tag":"t","socket":"s"}],"platform":{},"vdpa":[{"path":"p"}]}"#;
    let (config, _) = VmConfig::parse(text).unwrap();
    assert_eq!(config.disks.unwrap(), [DiskConfig::default()]);
    assert_eq!(config.net.unwrap(), [NetConfig::default()]);
    assert_eq!(config.platform.unwrap(), PlatformConfig::default());
    assert_eq!(config.fs.unwrap()[0].queue_size, 1024);
    assert_eq!(config.vdpa.unwrap()[0].num_queues, 1);
}

#[test]
fn what_cloud_hypervisor_requires_is_required() {
    for (name, text) in [
        ("vcpus", r#"{"cpus":{"boot_vcpus":1}}"#),
        ("memory size", r#"{"memory":{}}"#),
        ("zone id", r#"{"memory":{"size":0,"zones":[{"size":1}]}}"#),
        ("balloon size", r#"{"balloon":{}}"#),
        ("console mode", r#"{"console":{}}"#),
        ("vsock cid", r#"{"vsock":{"socket":"s"}}"#),
        ("null flag", r#"{"iommu":null}"#),
        ("case of a variant", r#"{"console":{"mode":"off"}}"#),
        ("doubled key", r#"{"iommu":true,"iommu":false}"#),
    ] {
        let refused = VmConfig::parse(text.as_bytes());
        assert!(
            matches!(refused, Err(JsonError::Malformed(_))),
            "{name}: {refused:?}"
        );
    }
}
