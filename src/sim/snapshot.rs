//! The files of a snapshot, written and read as Cloud Hypervisor does.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::config::mac;
use super::devices::{Device, Kind, device_tree, pci_devices};
use super::ram::{Chain, Ram};
use super::release::Release;

/// Bit of the clock's flags that lets KVM add the time since (`KVM_CLOCK_REALTIME`).
const CLOCK_REALTIME: u64 = 4;

/// A directory given as `file://PATH`.
///
/// # Errors
/// The two innermost messages of the original. Both sides speak of sending.
pub(super) fn directory(url: &str) -> Result<PathBuf, Chain> {
    let refused = |reason: String| {
        Err(vec![
            "Failed to send migratable component snapshot".to_owned(),
            reason,
        ])
    };
    let Some(path) = url.strip_prefix("file://") else {
        return refused(format!("Could not extract path from URL: {url}"));
    };
    let path = PathBuf::from(path);
    if path.is_dir() {
        Ok(path)
    } else {
        refused(format!("Destination is not a directory: {path:?}"))
    }
}

/// Reads one of the two JSON files.
pub(super) fn read(dir: &Path, name: &str, what: &str) -> Result<Value, Chain> {
    let path = dir.join(name);
    let outer = "Failed to receive migratable component snapshot".to_owned();
    let bytes = std::fs::read(&path).map_err(|error| {
        let reason = format!("Error opening VM {what} snapshot file {path:?}");
        vec![outer.clone(), reason, error.to_string()]
    })?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let reason = format!("Error deserialising VM {what} snapshot");
        vec![outer, reason, error.to_string()]
    })
}

/// The state of one component, which is JSON inside a JSON string.
pub(super) fn state_of(state: &Value, path: &[&str]) -> Value {
    let mut node = state;
    for id in path {
        node = &node["snapshots"][id];
    }
    let text = node["snapshot_data"]["state"].as_str();
    text.and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default()
}

/// Ids of the devices that a guest was driving.
pub(super) fn activated_devices(state: &Value) -> Vec<String> {
    let devices = state["snapshots"]["device-manager"]["snapshots"].as_object();
    let mut active = Vec::new();
    for id in devices.into_iter().flatten().map(|(id, _)| id) {
        let Some(inner) = id.strip_prefix("_virtio-pci-") else {
            continue;
        };
        if state_of(state, &["device-manager", id])["device_activated"] == true {
            active.push(inner.to_owned());
        }
    }
    active
}

/// Whether the guest's clock may be moved on by the age of the snapshot.
pub(super) fn clock_catches_up(state: &Value) -> bool {
    let flags = state_of(state, &[])["clock"]["Kvm"][8].as_u64();
    flags.is_some_and(|flags| flags & CLOCK_REALTIME != 0)
}

/// Creates a file of a snapshot: it must not exist, and is nobody else's to read.
pub(super) fn create(dir: &Path, name: &str, what: &str, release: Release) -> Result<File, Chain> {
    let path = dir.join(name);
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(&path).map_err(|error| {
        let mut chain = vec!["Failed to send migratable component snapshot".to_owned()];
        if release.names_snapshot_files() {
            chain.push(match what {
                "memory" => format!("Error creating memory snapshot file {path:?}"),
                _ => format!("Error creating VM {what} snapshot file"),
            });
        }
        chain.push(error.to_string());
        chain
    })
}

/// Writes JSON in one go.
pub(super) fn write_json(mut file: &File, value: &Value) -> io::Result<()> {
    file.write_all(value.to_string().as_bytes())
}

/// Builds `state.json`. It says what wrote it; Cloud Hypervisor cannot use it, as there is no
/// vCPU in it.
pub(super) fn state(
    config: &Value,
    ram: &Ram,
    active: &[String],
    device_ids: u64,
    release: Release,
) -> Value {
    let ranges = ram.saved_ranges();
    let mut devices = Map::new();
    let ioapic = json!({
        "id_reg": 0, "reg_sel": 0, "reg_entries": vec![65_536; 24],
        "used_entries": vec![false; 24], "apic_address": 4_276_092_928_u64,
    });
    devices.insert("__ioapic".to_owned(), leaf(&ioapic));
    if config["serial"]["mode"] != "Off" {
        let serial = json!({
            "interrupt_enable": 0, "interrupt_identification": 1, "line_control": 3,
            "line_status": 96, "modem_control": 8, "modem_status": 176, "scratch": 0,
            "baud_divisor": 12, "in_buffer": [],
        });
        devices.insert("__serial".to_owned(), leaf(&serial));
    }
    for device in pci_devices(config) {
        let live = active.contains(&device.id);
        let function = json!({
            "device_activated": live,
            "queues": [{"max_size": 256, "size": 256, "ready": live, "desc_table": 0, "avail_ring": 0, "used_ring": 0}],
            "interrupt_status": 0, "cap_pci_cfg_offset": 118, "cap_pci_cfg": vec![0; 18],
        });
        devices.insert(format!("_virtio-pci-{}", device.id), leaf(&function));
        devices.insert(
            device.id.clone(),
            leaf(&device_state(config, &device, live)),
        );
    }
    let vcpus = config["cpus"]["boot_vcpus"].as_u64().unwrap_or(1);
    let vcpu = json!({"Kvm": {"rewake_sim": "no vCPU", "tsc_khz": null}});
    let vcpus: Map<_, _> = (0..vcpus.min(1024))
        .map(|n| (n.to_string(), leaf(&vcpu)))
        .collect();
    let manager = json!({"device_tree": device_tree(config, release), "device_id_cnt": device_ids});
    let root = json!({
        "clock": clock(),
        "common_cpuid": [],
        "rewake_sim": "written by rewake-sim, a stand-in, not by Cloud Hypervisor",
    });
    node(
        Some(&root),
        &json!({
            "cpu-manager": node(None, &Value::Object(vcpus)),
            "memory-manager": leaf(&ram.state(&ranges)),
            "device-manager": node(Some(&manager), &Value::Object(devices)),
        }),
    )
}

fn leaf(state: &Value) -> Value {
    node(Some(state), &json!({}))
}

fn node(state: Option<&Value>, children: &Value) -> Value {
    let data = state.map_or(Value::Null, |state| json!({"state": state.to_string()}));
    json!({"snapshots": children, "snapshot_data": data})
}

/// `struct kvm_clock_data` (`linux/kvm.h`): clock, flags, padding, realtime, the rest zero.
fn clock() -> Value {
    let now = jiff::Timestamp::now().as_nanosecond();
    let mut bytes = [0_u8; 48];
    bytes[8] = CLOCK_REALTIME as u8;
    bytes[16..24].copy_from_slice(&(now as u64).to_le_bytes());
    json!({"Kvm": bytes.to_vec()})
}

fn device_state(config: &Value, device: &Device, live: bool) -> Value {
    let features = 1_u64 << 32;
    let acked = if live { features } else { 0 };
    let mut state = json!({"avail_features": features, "acked_features": acked});
    let find = |key: &str| {
        let list = config[key].as_array().into_iter().flatten();
        list.into_iter()
            .find(|d| d["id"] == device.id.as_str())
            .cloned()
            .unwrap_or_default()
    };
    match device.kind {
        Kind::Disk => {
            let disk = find("disks");
            let path = disk["path"].as_str().unwrap_or_default();
            let sectors = std::fs::metadata(path).map_or(0, |meta| meta.len() / 512);
            state["disk_path"] = json!(path);
            state["disk_nsectors"] = json!(sectors);
            state["config"] =
                json!({"capacity": sectors, "seg_max": 126, "blk_size": 512, "writeback": 1});
        }
        Kind::Net => {
            let net = find("net");
            let address = net["mac"].as_str().and_then(mac).unwrap_or_default();
            state["config"] = json!({"mac": address, "status": 0, "max_virtqueue_pairs": 1, "mtu": 1500, "speed": 0, "duplex": 0});
            state["queue_size"] = json!([256, 256, 256]);
        }
        Kind::Vsock => state["connections"] = json!([]),
        Kind::Balloon => {
            let pages = config["balloon"]["size"].as_u64().unwrap_or(0) >> 12;
            state["config"] = json!({"num_pages": pages, "actual": pages});
        }
        Kind::Console | Kind::Rng | Kind::Watchdog => {}
    }
    state
}
