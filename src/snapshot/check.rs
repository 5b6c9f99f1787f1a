//! Whether `config.json` and `state.json` belong together. CH does not ask: a device whose
//! state is missing starts afresh behind the guest's back, and the API says 204.

use std::collections::BTreeSet;

use super::layout::DEFAULT_ZONE;
use super::state::State;
use crate::vm_config::{ConsoleOutputMode, VmConfig};
use crate::wire::excerpt::excerpt;

/// How configuration and state contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// More vCPUs are configured than were saved: the others would start uninitialised.
    #[error("cpus.boot_vcpus is {configured}, but {saved} vCPUs were saved")]
    Vcpus {
        /// In `config.json`.
        configured: u32,
        /// In `state.json`.
        saved: usize,
    },
    /// A configured device has no saved state: it would start afresh.
    #[error("{at}: there is no saved state of the device {id}")]
    NoState {
        /// The key in `config.json`.
        at: String,
        /// The device's id, escaped and cut.
        id: String,
    },
    /// A device that CH names at first boot has no name.
    #[error("{at}: the device has no id, so its state cannot be found")]
    NoId {
        /// The key in `config.json`.
        at: String,
    },
    /// Two devices have the same id.
    #[error("{at}: another device has the id {id}, too")]
    DuplicateId {
        /// The key in `config.json` of the second.
        at: String,
        /// The id, escaped and cut.
        id: String,
    },
    /// A saved device is not configured: it would be gone.
    #[error("The saved device {id} is not configured")]
    NotConfigured {
        /// The device's id, escaped and cut.
        id: String,
    },
    /// A RAM mapping is of a zone that is not configured: CH would leave it out.
    #[error("guest_ram_mappings[{index}] is of the unknown zone {zone}")]
    UnknownZone {
        /// The mapping.
        index: usize,
        /// Its zone, escaped and cut.
        zone: String,
    },
    /// RAM that is in no shared file was not saved either: it would read as zeros.
    #[error("guest_ram_mappings[{index}] was neither saved nor is it in a shared file")]
    NotSaved {
        /// The mapping.
        index: usize,
    },
}

/// Checks that each device has its state and each state its device, that there are enough
/// vCPUs, and that all RAM is somewhere.
pub(super) fn check(config: &VmConfig, state: &State) -> Result<(), Mismatch> {
    let saved = state.vcpus();
    let configured = config.cpus.boot_vcpus;
    if usize::try_from(configured).is_ok_and(|configured| configured > saved) {
        return Err(Mismatch::Vcpus { configured, saved });
    }
    check_devices(config, state)?;
    check_memory(config, state)
}

/// Prefix of the node that holds a virtio device's PCI side (CH: device_manager.rs,
/// `VIRTIO_PCI_DEVICE_NAME_PREFIX`).
const VIRTIO_PCI: &str = "_virtio-pci-";

fn check_devices(config: &VmConfig, state: &State) -> Result<(), Mismatch> {
    let nodes: BTreeSet<&str> = state.device_ids().collect();
    let mut known = BTreeSet::new();
    for (at, id) in configured_devices(config) {
        let id = id.ok_or_else(|| Mismatch::NoId { at: at.clone() })?;
        if !nodes.contains(id) {
            let id = excerpt(id);
            return Err(Mismatch::NoState { at, id });
        }
        if !known.insert(id) {
            let id = excerpt(id);
            return Err(Mismatch::DuplicateId { at, id });
        }
    }
    // Devices that no key of their own stands for.
    known.insert("__iommu");
    let zones = config.memory.zones.iter().flatten();
    let virtio_mem = zones.clone().any(|zone| zone.hotplug_size.is_some())
        || config.memory.hotplug_size.is_some();
    let stranger = nodes
        .iter()
        .filter_map(|node| node.strip_prefix(VIRTIO_PCI))
        .find(|id| !known.contains(id));
    match stranger {
        Some(id) if !virtio_mem => Err(Mismatch::NotConfigured { id: excerpt(id) }),
        _ => Ok(()),
    }
}

/// Every device that has a state, with its key in `config.json` and its id. Those that there
/// is at most one of have a name of CH's where the configuration gives none.
fn configured_devices(config: &VmConfig) -> Vec<(String, Option<&str>)> {
    fn list<'c, T>(
        out: &mut Vec<(String, Option<&'c str>)>,
        key: &str,
        list: Option<&'c Vec<T>>,
        id: impl Fn(&'c T) -> Option<&'c str>,
    ) {
        for (index, device) in list.into_iter().flatten().enumerate() {
            out.push((format!("{key}.{index}.id"), id(device)));
        }
    }
    let mut out = Vec::new();
    list(&mut out, "disks", config.disks.as_ref(), |d| {
        d.id.as_deref()
    });
    list(&mut out, "net", config.net.as_ref(), |d| d.id.as_deref());
    list(&mut out, "fs", config.fs.as_ref(), |d| d.id.as_deref());
    list(&mut out, "pmem", config.pmem.as_ref(), |d| d.id.as_deref());
    list(&mut out, "vdpa", config.vdpa.as_ref(), |d| d.id.as_deref());
    let vhost_user = config.generic_vhost_user.as_ref();
    list(&mut out, "generic_vhost_user", vhost_user, |d| {
        d.id.as_deref()
    });
    if let Some(vsock) = &config.vsock {
        out.push(("vsock.id".to_owned(), vsock.id.as_deref()));
    }
    let console = config.console.mode != ConsoleOutputMode::Off;
    let serial = config.serial.mode != ConsoleOutputMode::Off;
    let balloon = config.balloon.as_ref().map(|b| b.id.as_deref());
    let rtc = config.rtc.as_ref().map(|rtc| rtc.id.as_deref());
    let ivshmem = config.ivshmem.as_ref().map(|i| i.id.as_deref());
    let singles = [
        ("rng", Some(config.rng.id.as_deref()), "__rng"),
        ("balloon", balloon, "__balloon"),
        (
            "console",
            console.then_some(config.console.id.as_deref()),
            "__console",
        ),
        ("serial", serial.then_some(None), "__serial"),
        ("watchdog", config.watchdog.then_some(None), "__watchdog"),
        ("pvpanic", config.pvpanic.then_some(None), "__pvpanic"),
        ("rtc", rtc, "__rtc"),
        ("ivshmem", ivshmem, "__ivshmem"),
    ];
    for (at, present, name) in singles {
        if let Some(id) = present {
            out.push((at.to_owned(), Some(id.unwrap_or(name))));
        }
    }
    out
}

fn check_memory(config: &VmConfig, state: &State) -> Result<(), Mismatch> {
    let memory = state.memory();
    let zones = config.memory.zones.as_deref().unwrap_or_default();
    let mut ranges: Vec<_> = memory.ranges().to_vec();
    ranges.sort_unstable_by_key(|range| range.gpa);
    for (index, mapping) in memory.mappings().iter().enumerate() {
        let zone = zones.iter().find(|zone| zone.id == mapping.zone_id);
        if zone.is_none() && !(zones.is_empty() && mapping.zone_id == DEFAULT_ZONE) {
            let zone = excerpt(&mapping.zone_id);
            return Err(Mismatch::UnknownZone { index, zone });
        }
        // Of virtio-mem only the plugged blocks are saved.
        if mapping.virtio_mem || zone.is_some_and(|zone| zone.shared && zone.file.is_some()) {
            continue;
        }
        // The ranges do not overlap, and each is inside one mapping.
        let first = ranges.partition_point(|range| range.gpa < mapping.gpa);
        let inside = ranges[first..]
            .iter()
            .take_while(|range| range.gpa < mapping.gpa + mapping.size);
        if inside.map(|range| range.length).sum::<u64>() != mapping.size {
            return Err(Mismatch::NotSaved { index });
        }
    }
    Ok(())
}
