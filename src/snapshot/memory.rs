//! Guest memory as `state.json` describes it: what was saved, and how RAM is rebuilt.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::units::Bytes;

/// The unit of guest memory in a snapshot: an x86 or arm64 base page.
pub const PAGE_SIZE: u64 = 4096;

/// One range of guest memory inside `memory-ranges`, in the order of the file.
///
/// CH: vm-migration/src/protocol.rs, `MemoryRange`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRange {
    /// Guest physical address, in bytes.
    pub gpa: u64,
    /// Length in bytes.
    pub length: u64,
}

/// One region of guest RAM, as CH maps it again on restore.
///
/// CH: vmm/src/memory_manager.rs, `GuestRamMapping`. An unknown field is an error, because
/// rewriting would drop it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct RamMapping {
    /// Slot number towards the hypervisor.
    pub slot: u32,
    /// Guest physical address, in bytes.
    pub gpa: u64,
    /// Size in bytes.
    pub size: u64,
    /// The memory zone it belongs to; `mem0` where the configuration names no zones.
    pub zone_id: String,
    /// Whether a virtio-mem device owns it. Such a region is rebuilt without the zone's file.
    pub virtio_mem: bool,
    /// Where the region begins in the zone's file, in bytes. CH records 0 for memory that
    /// had no file.
    pub file_offset: u64,
}

/// Why the memory description of a snapshot was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// There are more ranges or mappings than the limit.
    #[error("{what} has {count} entries, the limit is {limit}")]
    TooMany {
        /// The list.
        what: &'static str,
        /// How many entries it has.
        count: usize,
        /// How many it may have.
        limit: usize,
    },
    /// The guest has no RAM at all.
    #[error("There is no guest RAM mapping")]
    NoMapping,
    /// An entry has no bytes.
    #[error("{what}[{index}] is empty")]
    Empty {
        /// The list.
        what: &'static str,
        /// The entry.
        index: usize,
    },
    /// An entry does not begin and end on a page.
    #[error("{what}[{index}] is not aligned to pages of 4096 bytes")]
    Unaligned {
        /// The list.
        what: &'static str,
        /// The entry.
        index: usize,
    },
    /// An entry, or the sum of all, runs past 2^64.
    #[error("{what}[{index}] runs past the address space")]
    Overflow {
        /// The list.
        what: &'static str,
        /// The entry.
        index: usize,
    },
    /// Two entries of one list share bytes.
    #[error("{what}[{first}] and {what}[{second}] overlap")]
    Overlap {
        /// The list.
        what: &'static str,
        /// The one with the lower address.
        first: usize,
        /// The other.
        second: usize,
    },
    /// A saved range is not inside one RAM mapping.
    #[error("memory_ranges[{index}] is not inside one guest RAM mapping")]
    OutsideMapping {
        /// The saved range.
        index: usize,
    },
    /// The guest has more RAM than the limit.
    #[error("The guest has {size} of RAM, the limit is {limit}")]
    TooLarge {
        /// All mappings together.
        size: Bytes,
        /// The limit.
        limit: Bytes,
    },
}

/// How much memory a snapshot may describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimits {
    /// Most entries in each list.
    pub max_regions: usize,
    /// Most guest RAM.
    pub max_ram: Bytes,
}

impl Default for MemoryLimits {
    fn default() -> Self {
        Self {
            max_regions: 4096,
            max_ram: Bytes::gib(64 << 10),
        }
    }
}

/// The checked memory description of a snapshot.
///
/// Both lists are free of overflow, overlap, empty and unaligned entries, and every saved
/// range is inside one mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryState {
    ranges: Vec<SavedRange>,
    mappings: Vec<RamMapping>,
    boot_ram: Option<Bytes>,
    current_ram: Option<Bytes>,
    saved: Bytes,
    ram: Bytes,
}

/// The state of the `memory-manager` node. What is not needed is not looked at.
#[derive(Deserialize)]
pub(super) struct MemoryDocument<'a> {
    #[serde(borrow)]
    pub(super) memory_ranges: &'a RawValue,
    #[serde(borrow)]
    pub(super) guest_ram_mappings: &'a RawValue,
    boot_ram: Option<u64>,
    current_ram: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RangeTable {
    data: Vec<SavedRange>,
}

impl MemoryState {
    /// Reads the two lists. The caller then checks them with [`Self::check`].
    pub(super) fn read(document: &MemoryDocument<'_>) -> Result<Self, serde_json::Error> {
        let table: RangeTable = serde_json::from_str(document.memory_ranges.get())?;
        Ok(Self {
            ranges: table.data,
            mappings: serde_json::from_str(document.guest_ram_mappings.get())?,
            boot_ram: document.boot_ram.map(Bytes),
            current_ram: document.current_ram.map(Bytes),
            saved: Bytes(0),
            ram: Bytes(0),
        })
    }

    /// Checks both lists, and sums them up.
    pub(super) fn check(mut self, limits: &MemoryLimits) -> Result<Self, MemoryError> {
        let ranges = self.ranges.iter().map(|range| (range.gpa, range.length));
        self.saved = check_list("memory_ranges", ranges, limits)?;
        let mappings = self.mappings.iter().map(|m| (m.gpa, m.size));
        self.ram = check_list("guest_ram_mappings", mappings, limits)?;
        if self.mappings.is_empty() {
            return Err(MemoryError::NoMapping);
        }
        if self.ram > limits.max_ram {
            return Err(MemoryError::TooLarge {
                size: self.ram,
                limit: limits.max_ram,
            });
        }
        for (index, mapping) in self.mappings.iter().enumerate() {
            let what = "guest_ram_mappings.file_offset";
            if mapping.file_offset % PAGE_SIZE != 0 {
                return Err(MemoryError::Unaligned { what, index });
            }
            // The kernel's file offsets are signed.
            let end = mapping.file_offset.checked_add(mapping.size);
            if end.is_none_or(|end| i64::try_from(end).is_err()) {
                return Err(MemoryError::Overflow { what, index });
            }
        }
        let mut by_address: Vec<&RamMapping> = self.mappings.iter().collect();
        by_address.sort_unstable_by_key(|mapping| mapping.gpa);
        for (index, range) in self.ranges.iter().enumerate() {
            let after = by_address.partition_point(|mapping| mapping.gpa <= range.gpa);
            let inside = after
                .checked_sub(1)
                .map(|before| by_address[before])
                .is_some_and(|m| range.gpa + range.length <= m.gpa + m.size);
            if !inside {
                return Err(MemoryError::OutsideMapping { index });
            }
        }
        Ok(self)
    }

    /// What `memory-ranges` contains, in the order of the file.
    #[must_use]
    pub fn ranges(&self) -> &[SavedRange] {
        &self.ranges
    }

    /// How RAM is rebuilt.
    #[must_use]
    pub fn mappings(&self) -> &[RamMapping] {
        &self.mappings
    }

    /// The length that `memory-ranges` must have: the sum of all saved ranges.
    #[must_use]
    pub fn saved(&self) -> Bytes {
        self.saved
    }

    /// All RAM mappings together, with those of virtio-mem.
    #[must_use]
    pub fn ram(&self) -> Bytes {
        self.ram
    }

    /// RAM at boot, if recorded.
    #[must_use]
    pub fn boot_ram(&self) -> Option<Bytes> {
        self.boot_ram
    }

    /// RAM when the snapshot was taken, if recorded. It differs from [`Self::boot_ram`] after
    /// ACPI hotplug.
    #[must_use]
    pub fn current_ram(&self) -> Option<Bytes> {
        self.current_ram
    }
}

/// Checks one list of (address, length), and returns the sum of the lengths.
fn check_list(
    what: &'static str,
    list: impl ExactSizeIterator<Item = (u64, u64)>,
    limits: &MemoryLimits,
) -> Result<Bytes, MemoryError> {
    if list.len() > limits.max_regions {
        return Err(MemoryError::TooMany {
            what,
            count: list.len(),
            limit: limits.max_regions,
        });
    }
    let mut sum = 0u64;
    let mut sorted = Vec::with_capacity(list.len());
    for (index, (gpa, length)) in list.enumerate() {
        if length == 0 {
            return Err(MemoryError::Empty { what, index });
        }
        if gpa % PAGE_SIZE != 0 || length % PAGE_SIZE != 0 {
            return Err(MemoryError::Unaligned { what, index });
        }
        let (Some(end), Some(total)) = (gpa.checked_add(length), sum.checked_add(length)) else {
            return Err(MemoryError::Overflow { what, index });
        };
        sum = total;
        sorted.push((gpa, end, index));
    }
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        let ((_, end, first), (start, _, second)) = (pair[0], pair[1]);
        if start < end {
            return Err(MemoryError::Overlap {
                what,
                first,
                second,
            });
        }
    }
    Ok(Bytes(sum))
}
