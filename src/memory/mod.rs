//! What guest memory costs the host, as the kernel tells it.
//!
//! A guest of 4 GiB in a private mapping costs what it has written, and shares the rest with
//! its siblings; the same guest on demand costs 4 GiB. Neither shows in the size of the
//! process. It shows in `/proc/PID/smaps` (proc_pid_smaps(5)), mapping by mapping.

mod smaps;
mod working_set;

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

pub use smaps::{Mapping, SmapsError, parse};
pub use working_set::{Extent, Malformed, WORKING_SET_FILE, WorkingSet, WorkingSetError};

use crate::units::Bytes;

/// Most bytes that are read of a process's `smaps`.
const MAX_SMAPS: u64 = 16 << 20;

/// Why the memory of a process is not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UsageError {
    /// The file cannot be read: the process is gone, or somebody else's.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel said more than is read.
    #[error("{} has more than {}", path.display(), Bytes(MAX_SMAPS))]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The kernel said something else than expected.
    #[error("Cannot understand {}", path.display())]
    Smaps {
        /// The file.
        path: PathBuf,
        /// What.
        #[source]
        source: SmapsError,
    },
}

/// Memory of one kind, by who has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// The size of the mappings.
    pub size: Bytes,
    /// Pages that are present. A page that several processes map counts in each.
    pub resident: Bytes,
    /// The same, with pages of several processes counted as their share.
    pub proportional: Bytes,
    /// Pages that are this process's alone and in no file: what it costs. Swapped ones too.
    pub private: Bytes,
    /// Pages of files: they belong to the page cache, and to everybody who maps the file.
    pub file: Bytes,
    /// Of all these, pages that another process maps, too.
    pub shared: Bytes,
}

impl Share {
    fn add(&mut self, mapping: &Mapping) {
        let plus = |to: &mut Bytes, more: u64| to.0 = to.0.saturating_add(more);
        plus(&mut self.size, mapping.size());
        plus(&mut self.resident, mapping.resident);
        plus(&mut self.proportional, mapping.proportional);
        plus(&mut self.private, mapping.private());
        plus(&mut self.file, mapping.file());
        plus(&mut self.shared, mapping.shared);
    }
}

/// The memory of one Cloud Hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Usage {
    /// Guest RAM alone.
    pub guest: Share,
    /// All of the process.
    pub process: Share,
    /// Each mapping of guest RAM, by address.
    pub mappings: Vec<Mapping>,
}

impl Usage {
    /// Sums up mappings. Which of them are guest RAM shows in what CH tells the kernel: that
    /// they do not belong into a core dump (`MADV_DONTDUMP`).
    #[must_use]
    pub fn of(mappings: Vec<Mapping>) -> Self {
        let mut usage = Self::default();
        for mapping in mappings {
            usage.process.add(&mapping);
            if mapping.is_guest_ram() {
                usage.guest.add(&mapping);
                usage.mappings.push(mapping);
            }
        }
        usage
    }

    /// For programs that read JSON.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let share = |share: &Share| {
            serde_json::json!({
                "size_bytes": share.size.0,
                "resident_bytes": share.resident.0,
                "proportional_bytes": share.proportional.0,
                "private_bytes": share.private.0,
                "file_bytes": share.file.0,
                "shared_bytes": share.shared.0,
            })
        };
        serde_json::json!({ "guest": share(&self.guest), "process": share(&self.process) })
    }
}

/// The memory of a process, now. The kernel walks its page tables for it: some milliseconds
/// for each GiB that is present. The stand-in has no guest RAM to show.
///
/// # Errors
/// [`UsageError`].
pub fn usage(pid: u32) -> Result<Usage, UsageError> {
    let path = PathBuf::from(format!("/proc/{pid}/smaps"));
    let read = |text: &mut Vec<u8>| {
        File::open(&path)?
            .take(MAX_SMAPS + 1)
            .read_to_end(text)
            .map(|count| count as u64)
    };
    let mut text = Vec::new();
    match read(&mut text) {
        Ok(count) if count > MAX_SMAPS => Err(UsageError::TooLarge { path }),
        Ok(_) => match parse(&text) {
            Ok(mappings) => Ok(Usage::of(mappings)),
            Err(source) => Err(UsageError::Smaps { path, source }),
        },
        Err(source) => Err(UsageError::Read { path, source }),
    }
}

/// What many VMs cost together, beside what they would without sharing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Saving {
    /// Guest RAM that is present in each, summed up: what it would cost if nothing was shared.
    pub alone: Bytes,
    /// What it costs: every page once.
    pub together: Bytes,
}

impl Saving {
    /// Of these VMs.
    #[must_use]
    pub fn of<'u>(usages: impl IntoIterator<Item = &'u Usage>) -> Self {
        let mut saving = Self::default();
        for usage in usages {
            saving.alone.0 = saving.alone.0.saturating_add(usage.guest.resident.0);
            saving.together.0 = saving.together.0.saturating_add(usage.guest.proportional.0);
        }
        saving
    }

    /// What sharing saves.
    #[must_use]
    pub const fn saved(&self) -> Bytes {
        Bytes(self.alone.0.saturating_sub(self.together.0))
    }
}
