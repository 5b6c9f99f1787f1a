//! Whether a snapshot's RAM can be mapped from one file, and where each part is in it.
//!
//! CH restores a memory zone from a file without reading it if `config.json` names the file,
//! the list of saved ranges in `state.json` is empty, and every RAM mapping says where it is in
//! the file. A snapshot of memory that had no file records offset 0 for every mapping: without
//! true offsets a guest of more than 3 GiB would run on the wrong memory, and CH would still
//! answer 204.

use std::path::PathBuf;

use super::memory::{MemoryState, RamMapping, SavedRange};
use crate::units::Bytes;
use crate::vm_config::{HotplugMethod, MemoryConfig, VmConfig};

/// The zone that CH makes where the configuration names none (vmm/src/memory_manager.rs,
/// `DEFAULT_MEMORY_ZONE`).
pub const DEFAULT_ZONE: &str = "mem0";

/// Where RAM is in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    zone: String,
    zone_size: Bytes,
    source: MemorySource,
    offsets: Vec<u64>,
    file_size: Bytes,
}

/// Which file holds the RAM of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemorySource {
    /// The snapshot's own `memory-ranges`.
    Saved,
    /// The file of the zone, which was mapped shared and therefore was not saved. The path is
    /// the recorded one.
    ZoneFile(PathBuf),
}

/// Why RAM cannot be mapped from one file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotMappable {
    /// Huge pages need a file on hugetlbfs.
    #[error("{at}: the memory is made of huge pages")]
    HugePages {
        /// The key in `config.json`.
        at: String,
    },
    /// Each zone would need a file of its own.
    #[error("The memory has {count} zones")]
    SeveralZones {
        /// How many.
        count: usize,
    },
    /// virtio-mem regions are rebuilt without the zone's file.
    #[error("Memory hotplug by virtio-mem is in use")]
    VirtioMem,
    /// A device in another process shares the memory, and knows the old file.
    #[error("{at}: a vhost-user device shares the memory")]
    VhostUser {
        /// The key in `config.json`.
        at: String,
    },
    /// A host device has the memory pinned.
    #[error("{at}: a host device accesses the memory")]
    HostDevice {
        /// The key in `config.json`.
        at: String,
    },
    /// The mapping names a zone that is not configured.
    #[error("guest_ram_mappings[{index}] is of an unknown zone")]
    UnknownZone {
        /// The mapping.
        index: usize,
    },
    /// The ranges that make up a mapping do not follow one another in the file.
    #[error("guest_ram_mappings[{index}] is in several places of the memory file")]
    Scattered {
        /// The mapping.
        index: usize,
    },
    /// A part of a mapping was not saved, and no file has it.
    #[error("guest_ram_mappings[{index}] was not saved as a whole")]
    NotSaved {
        /// The mapping.
        index: usize,
    },
    /// Two mappings are at the same place of the zone's file.
    #[error("guest_ram_mappings[{first}] and [{second}] share bytes of the zone's file")]
    Aliased {
        /// The one that begins earlier in the file.
        first: usize,
        /// The other.
        second: usize,
    },
}

impl MemoryLayout {
    /// Finds where each RAM mapping is in the snapshot's memory file, or in its zone's file.
    ///
    /// # Errors
    /// [`NotMappable`]: the reason to fall back to another memory mode.
    pub fn analyse(config: &VmConfig, memory: &MemoryState) -> Result<Self, NotMappable> {
        refuse_foreign_access(config)?;
        let zone = single_zone(&config.memory, memory)?;
        let (source, offsets) = match zone.file {
            Some(file) if memory.ranges().is_empty() && zone.shared => {
                let offsets = recorded_offsets(memory.mappings())?;
                (MemorySource::ZoneFile(file), offsets)
            }
            _ => {
                let offsets = saved_offsets(memory.ranges(), memory.mappings())?;
                (MemorySource::Saved, offsets)
            }
        };
        let end = offsets
            .iter()
            .zip(memory.mappings())
            .map(|(offset, mapping)| offset + mapping.size)
            .max();
        Ok(Self {
            zone: zone.id,
            zone_size: zone.size,
            source,
            offsets,
            file_size: Bytes(end.unwrap_or(0)),
        })
    }

    /// The id that the one memory zone must have.
    #[must_use]
    pub fn zone(&self) -> &str {
        &self.zone
    }

    /// The size that the zone must have in `config.json`. CH derives RAM totals from it.
    #[must_use]
    pub fn zone_size(&self) -> Bytes {
        self.zone_size
    }

    /// Which file holds the RAM.
    #[must_use]
    pub fn source(&self) -> &MemorySource {
        &self.source
    }

    /// Where each mapping begins in the file, in bytes, in the order of
    /// [`MemoryState::mappings`].
    #[must_use]
    pub fn offsets(&self) -> &[u64] {
        &self.offsets
    }

    /// The least length of the file. CH does not check it: a guest that touches what is
    /// missing dies.
    #[must_use]
    pub fn file_size(&self) -> Bytes {
        self.file_size
    }

    /// The mappings as ranges in the order of the file, so that CH can read the file as if it
    /// had saved it. `None` where they do not follow one another from its beginning.
    #[must_use]
    pub fn as_ranges(&self, memory: &MemoryState) -> Option<Vec<SavedRange>> {
        let mut placed: Vec<_> = self.offsets.iter().zip(memory.mappings()).collect();
        placed.sort_unstable_by_key(|(offset, _)| **offset);
        let mut end = 0;
        placed
            .into_iter()
            .map(|(offset, mapping)| {
                let follows = *offset == end;
                end += mapping.size;
                follows.then_some(SavedRange {
                    gpa: mapping.gpa,
                    length: mapping.size,
                })
            })
            .collect()
    }
}

/// Devices that reach the memory by themselves.
fn refuse_foreign_access(config: &VmConfig) -> Result<(), NotMappable> {
    fn any<T>(list: Option<&Vec<T>>) -> bool {
        list.is_some_and(|list| !list.is_empty())
    }
    let disk = config.disks.iter().flatten().position(|d| d.vhost_user);
    let net = config.net.iter().flatten().position(|n| n.vhost_user);
    let vhost_user = [
        disk.map(|index| format!("disks.{index}.vhost_user")),
        net.map(|index| format!("net.{index}.vhost_user")),
        any(config.fs.as_ref()).then(|| "fs".to_owned()),
        any(config.generic_vhost_user.as_ref()).then(|| "generic_vhost_user".to_owned()),
    ];
    if let Some(at) = vhost_user.into_iter().flatten().next() {
        return Err(NotMappable::VhostUser { at });
    }
    let host_device = [
        any(config.devices.as_ref()).then_some("devices"),
        any(config.user_devices.as_ref()).then_some("user_devices"),
        any(config.vdpa.as_ref()).then_some("vdpa"),
    ];
    match host_device.into_iter().flatten().next() {
        Some(at) => Err(NotMappable::HostDevice { at: at.to_owned() }),
        None => Ok(()),
    }
}

struct Zone {
    id: String,
    size: Bytes,
    file: Option<PathBuf>,
    shared: bool,
}

/// The one zone that all RAM belongs to.
fn single_zone(config: &MemoryConfig, memory: &MemoryState) -> Result<Zone, NotMappable> {
    let zones = config.zones.as_deref().unwrap_or_default();
    let zone = match zones {
        [] => Zone {
            id: DEFAULT_ZONE.to_owned(),
            size: Bytes(config.size),
            file: None,
            shared: config.shared,
        },
        [zone] => Zone {
            id: zone.id.clone(),
            size: Bytes(zone.size),
            file: zone.file.clone(),
            shared: zone.shared,
        },
        zones => return Err(NotMappable::SeveralZones { count: zones.len() }),
    };
    if config.hugepages && zones.is_empty() {
        let at = "memory.hugepages".to_owned();
        return Err(NotMappable::HugePages { at });
    }
    if zones.iter().any(|zone| zone.hugepages) {
        let at = "memory.zones.0.hugepages".to_owned();
        return Err(NotMappable::HugePages { at });
    }
    let by_virtio_mem = config.hotplug_method == HotplugMethod::VirtioMem
        && (config.hotplug_size.is_some() || zones.iter().any(|z| z.hotplug_size.is_some()));
    if by_virtio_mem || memory.mappings().iter().any(|m| m.virtio_mem) {
        return Err(NotMappable::VirtioMem);
    }
    match memory.mappings().iter().position(|m| m.zone_id != zone.id) {
        Some(index) => Err(NotMappable::UnknownZone { index }),
        None => Ok(zone),
    }
}

/// The recorded offsets, where no two mappings share bytes of the file.
fn recorded_offsets(mappings: &[RamMapping]) -> Result<Vec<u64>, NotMappable> {
    let mut sorted: Vec<_> = mappings
        .iter()
        .enumerate()
        .map(|(index, m)| (m.file_offset, m.file_offset + m.size, index))
        .collect();
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        let ((_, end, first), (start, _, second)) = (pair[0], pair[1]);
        if start < end {
            return Err(NotMappable::Aliased { first, second });
        }
    }
    Ok(mappings.iter().map(|m| m.file_offset).collect())
}

/// The offset of each mapping inside `memory-ranges`: the sum of the lengths before the range
/// that holds its first byte. A mapping saved in several ranges is fine if they follow one
/// another in the file as they do in memory.
fn saved_offsets(ranges: &[SavedRange], mappings: &[RamMapping]) -> Result<Vec<u64>, NotMappable> {
    let mut offset = 0;
    let mut placed: Vec<(SavedRange, u64)> = Vec::with_capacity(ranges.len());
    for range in ranges {
        placed.push((*range, offset));
        offset += range.length;
    }
    placed.sort_unstable_by_key(|(range, _)| range.gpa);
    let mut offsets = Vec::with_capacity(mappings.len());
    for (index, mapping) in mappings.iter().enumerate() {
        let first = placed.partition_point(|(range, _)| range.gpa < mapping.gpa);
        let start = match placed.get(first) {
            Some((range, start)) if range.gpa == mapping.gpa => *start,
            _ => return Err(NotMappable::NotSaved { index }),
        };
        let mut covered = 0;
        for (range, at) in &placed[first..] {
            if covered == mapping.size {
                break;
            }
            if range.gpa != mapping.gpa + covered {
                return Err(NotMappable::NotSaved { index });
            }
            if *at != start + covered {
                return Err(NotMappable::Scattered { index });
            }
            covered += range.length;
        }
        if covered != mapping.size {
            return Err(NotMappable::NotSaved { index });
        }
        offsets.push(start);
    }
    Ok(offsets)
}
