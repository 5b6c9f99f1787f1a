//! Bringing a disk to the disk of the host.

use std::path::Path;

use super::file;
use super::record::DiskRecord;
use super::{DiskError, DiskFailure, DiskPool};
use crate::ids::SandboxId;

impl DiskPool {
    /// Makes a disk outlive a power loss: its record, its store with all that has been written
    /// to it, and their names. Blocks on the host's disk.
    ///
    /// What the VM's own kernel has in memory is not in it, nor what waits in the device: the
    /// VM stands still, and its agent has flushed its file systems.
    ///
    /// # Errors
    /// [`DiskError::Missing`] where there is none, and what the
    /// file system says.
    pub fn sync(&self, id: &SandboxId, dir: &Path) -> Result<(), DiskFailure> {
        let mut kind = None;
        let outcome = (|| {
            let dir = super::absolute(dir)?;
            let record = DiskRecord::read(id, &dir, &self.faults)?.record;
            kind = Some(record.kind);
            for path in [DiskRecord::path(id, &dir), record.store(id, &dir)] {
                self.sync_file(&path)?;
            }
            file::sync_directory(&dir, &self.faults)
        })();
        outcome.map_err(|source| DiskFailure {
            id: id.clone(),
            kind,
            source,
            leftovers: Vec::new(),
        })
    }

    /// The same with one of its files.
    pub(super) fn sync_file(&self, path: &Path) -> Result<(), DiskError> {
        let file = file::open(path, false, &self.faults)?;
        file::sync_file(&file, path, &self.faults)
    }
}
