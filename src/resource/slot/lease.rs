//! A slot in the hands of this process, and how it is given back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::super::net::NetStep;
use super::record::{ProcessIdentity, RECORD_BYTES, SlotRecord, read_record};
use super::{SlotError, file_error};
use crate::fault::Faults;
use crate::ids::SlotIndex;

/// A slot that this process holds. Dropping it lets go of the lock and leaves the record:
/// the slot is then stale, and a sweep reclaims it.
#[derive(Debug)]
#[must_use = "a dropped lease leaves a stale slot"]
pub struct SlotLease {
    pub(super) index: SlotIndex,
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) record: Option<SlotRecord>,
    pub(super) faults: Faults,
}

impl Drop for SlotLease {
    fn drop(&mut self) {
        // Closing it is not enough while a process that was just forked has a copy.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

impl SlotLease {
    /// The slot.
    #[must_use]
    pub const fn index(&self) -> SlotIndex {
        self.index
    }

    /// The slot file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the slot file says; `None` where its maker died before writing anything, so
    /// that nothing else of it can exist.
    #[must_use]
    pub const fn record(&self) -> Option<&SlotRecord> {
        self.record.as_ref()
    }

    /// Notes the VMM that is about to run on the slot. From here on the slot is freed only
    /// when this process has ended.
    ///
    /// # Errors
    /// [`SlotError::File`].
    pub fn set_vmm(&mut self, vmm: Option<ProcessIdentity>) -> Result<(), SlotError> {
        self.change(|record| record.vmm = vmm)
    }

    /// Gives the slot to another owner, such as from a pool to a sandbox.
    ///
    /// # Errors
    /// [`SlotError::File`].
    pub fn set_owner(&mut self, owner: &str) -> Result<(), SlotError> {
        self.change(|record| record.owner = owner.to_owned())
    }

    /// Notes what exists in the kernel because of the slot.
    ///
    /// # Errors
    /// [`SlotError::File`].
    pub fn set_steps(&mut self, steps: Vec<NetStep>) -> Result<(), SlotError> {
        self.change(|record| record.steps = steps)
    }

    /// Marks the slot as kept for its owner when nobody holds it, or no longer.
    ///
    /// # Errors
    /// [`SlotError::File`].
    pub fn set_parked(&mut self, parked: bool) -> Result<(), SlotError> {
        self.change(|record| record.parked = parked)
    }

    /// Lets go of the slot but keeps it for its owner, who comes back with
    /// [`Slots::reserve`].
    ///
    /// # Errors
    /// [`SlotError::File`].
    pub fn park(mut self) -> Result<(), SlotError> {
        self.set_parked(true)
    }

    /// Whether the VMM noted in the record has not been proven dead.
    ///
    /// # Errors
    /// [`SlotError::Process`].
    pub fn running_vmm(&self) -> Result<Option<ProcessIdentity>, SlotError> {
        let Some(vmm) = self.record.as_ref().and_then(|record| record.vmm) else {
            return Ok(None);
        };
        let alive = vmm.is_alive().map_err(|source| SlotError::Process {
            pid: vmm.pid,
            source,
        })?;
        Ok(alive.then_some(vmm))
    }

    /// Frees the slot, once everything in the kernel is gone. The lease comes back with the
    /// error where it could not be.
    ///
    /// # Errors
    /// [`SlotError::StillRuns`], [`SlotError::File`].
    pub fn release(self) -> Result<(), Box<StillHeld>> {
        match self.running_vmm() {
            Ok(None) => {}
            Ok(Some(vmm)) => {
                let index = self.index;
                let error = SlotError::StillRuns {
                    index,
                    pid: vmm.pid,
                };
                return Err(Box::new(StillHeld { lease: self, error }));
            }
            Err(error) => return Err(Box::new(StillHeld { lease: self, error })),
        }
        // The lock is held until the file has lost its name, so nobody can take it between.
        match self
            .faults
            .call("remove the slot file", || std::fs::remove_file(&self.path))
        {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let error = file_error("remove the slot file", &self.path, error);
                Err(Box::new(StillHeld { lease: self, error }))
            }
            _ => Ok(()),
        }
    }

    fn change(&mut self, edit: impl FnOnce(&mut SlotRecord)) -> Result<(), SlotError> {
        let Some(mut record) = self.record.clone() else {
            return Err(SlotError::Stale(self.index));
        };
        edit(&mut record);
        self.update(record)
    }

    pub(super) fn update(&mut self, record: SlotRecord) -> Result<(), SlotError> {
        let failed = |source| file_error("write the slot record", &self.path, source);
        let mut bytes = serde_json::to_vec(&record).map_err(|source| SlotError::Record {
            path: self.path.clone(),
            source,
        })?;
        bytes.push(b'\n');
        // One write covers all that was there before, so a process that is killed leaves
        // the old record or the new one. White space behind the value does not disturb it.
        let before = self.file.metadata().map_err(failed)?.len();
        let before = usize::try_from(before.min(RECORD_BYTES)).unwrap_or(0);
        if bytes.len() < before {
            bytes.resize(before, b' ');
        }
        let write = || self.file.write_all_at(&bytes, 0);
        self.faults
            .call("write the slot record", write)
            .map_err(failed)?;
        self.record = Some(record);
        Ok(())
    }
}

/// A slot that could not be freed, with the lease on it.
#[derive(Debug)]
pub struct StillHeld {
    /// The slot.
    pub lease: SlotLease,
    /// Why it is not free.
    pub error: SlotError,
}

/// Frees a slot by path if it is still in the use that `token` names: the undo step of an
/// allocation, also after a crash.
///
/// # Errors
/// [`SlotError::StillRuns`], [`SlotError::Process`], and those of files.
pub fn release_by_token(path: &Path, token: &str) -> Result<(), SlotError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(file_error("open the slot file", path, source)),
    };
    let Some(record) = read_record(&file, path)?.filter(|record| record.token == token) else {
        return Ok(());
    };
    if let Some(vmm) = record.vmm {
        let alive = vmm.is_alive().map_err(|source| SlotError::Process {
            pid: vmm.pid,
            source,
        })?;
        if alive {
            let name = path.file_name().and_then(|name| name.to_str());
            let index = name
                .and_then(|name| name.parse().ok())
                .and_then(|index| SlotIndex::new(index).ok());
            if let Some(index) = index {
                return Err(SlotError::StillRuns {
                    index,
                    pid: vmm.pid,
                });
            }
        }
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(file_error("remove the slot file", path, error))
        }
        _ => Ok(()),
    }
}
