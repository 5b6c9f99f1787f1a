//! Disks that a VM has open.

use std::path::Path;

use super::dm_snapshot::{self, Mapping};
use super::error::{DiskError, DiskFailure};
use super::file;
use super::record::DiskRecord;
use super::{Attached, Disk, DiskKind, DiskPool};
use crate::ids::SandboxId;

impl DiskPool {
    /// Takes up a disk as it stands, whether a VM has it open or not: to look at it, or to
    /// [flatten](DiskPool::flatten) it while the VM stands still. Changes nothing.
    ///
    /// # Errors
    /// [`DiskError::Detached`] where it is not attached, and those of
    /// [`DiskPool::attach`].
    pub fn in_use(&self, id: &SandboxId, dir: &Path) -> Result<Disk, DiskFailure> {
        let mut steps = Vec::new();
        let mut kind = None;
        let outcome = (|| {
            let dir = super::absolute(dir)?;
            let held = DiskRecord::read(id, &dir, &self.faults)?;
            kind = Some(held.record.kind);
            let (record, lock) = held.lock(id, &self.faults)?;
            let path = record.store(id, &dir);
            let mapping = match record.kind {
                DiskKind::DmSnapshot => {
                    let store = file::open(&path, false, &self.faults)?;
                    let uuid = dm_snapshot::uuid(&store, &path)?;
                    let Some(found) = self.mapping(&uuid)? else {
                        return Err(DiskError::Detached { id: id.clone() });
                    };
                    let path = self.node(found.device, &mut steps)?;
                    let name = found.name;
                    Some(Mapping { name, uuid, path })
                }
                DiskKind::Reflink | DiskKind::Copy => None,
            };
            let attached = Attached {
                id: id.clone(),
                dir,
                record,
                path: mapping.as_ref().map_or(path, |it| it.path.clone()),
                mapping,
            };
            Ok(attached.locked(lock))
        })();
        outcome.map_err(|source| DiskFailure {
            id: id.clone(),
            kind,
            source,
            leftovers: Vec::new(),
        })
    }
}
