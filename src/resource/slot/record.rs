//! What a slot file says.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rewake_sys::CallError;
use rewake_sys::process::{self, Process};
use serde::{Deserialize, Serialize};

use super::super::net::NetStep;
use super::{SlotError, file_error};

/// A record above this size was not written by us.
pub(super) const RECORD_BYTES: u64 = 16 << 10;

/// A process: pid and start time (`/proc/PID/stat` field 22, clock ticks since boot).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time; another one means another process.
    pub start_time: u64,
}

impl ProcessIdentity {
    /// The calling process.
    #[must_use]
    pub fn current() -> Self {
        let pid = std::process::id();
        Self {
            pid,
            start_time: process::start_time(pid).unwrap_or_default(),
        }
    }

    /// Whether this very process has not ended yet. A zombie has ended, unless a thread of
    /// it still runs: its pidfd knows.
    ///
    /// # Errors
    /// What `pidfd_open` or `poll` say, other than that it is gone.
    pub fn is_alive(self) -> Result<bool, CallError> {
        let process = match Process::open(self.pid) {
            Ok(process) => process,
            Err(error) if error.is_gone() => return Ok(false),
            Err(error) => return Err(error),
        };
        // Compared after the pidfd was opened: now the pid cannot change its owner any more.
        if process::start_time(self.pid) != Some(self.start_time) {
            return Ok(false);
        }
        Ok(!process.has_ended()?)
    }
}

/// What a slot file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotRecord {
    /// Random, new with every allocation: tells one use of the index from the next.
    pub token: String,
    /// Whom the slot is for: a sandbox id, or a word like `pool`.
    pub owner: String,
    /// The process that allocated it.
    pub holder: ProcessIdentity,
    /// The VMM that may run on it.
    pub vmm: Option<ProcessIdentity>,
    /// Whether the owner comes back to it without anybody holding the lock meanwhile.
    pub parked: bool,
    /// What exists in the kernel because of it, oldest first.
    pub steps: Vec<NetStep>,
}

/// Reads a record; `None` where the file is empty.
pub(super) fn read_record(file: &File, path: &Path) -> Result<Option<SlotRecord>, SlotError> {
    let failed = |source| file_error("read the slot record", path, source);
    let length = file.metadata().map_err(failed)?.len();
    if length > RECORD_BYTES {
        let large = io::Error::new(io::ErrorKind::FileTooLarge, "above 16 KiB");
        return Err(failed(large));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| SlotError::Record {
            path: path.to_owned(),
            source,
        })
}
