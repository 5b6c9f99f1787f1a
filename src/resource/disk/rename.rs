//! Giving a disk to somebody else than it was made for.

use std::path::Path;

use rewake_sys::dm::DeviceRef;

use super::dm_snapshot::{self, Mapping};
use super::error::{DiskError, DiskFailure, call};
use super::pressure::{self, SnapshotWords};
use super::record::{Base, DiskRecord};
use super::{Disk, DiskPool, DiskStep, file};
use crate::ids::SandboxId;

impl DiskPool {
    /// Makes the disk of one sandbox that of `id`, with its store in `dir`: a directory of the
    /// same file system, where `id` has no disk. Its contents and its device stay, with
    /// another name. Costs two renames and an ioctl; a caller that needs the names to outlive
    /// a power loss calls [`DiskPool::sync`].
    ///
    /// The record goes first, as it comes first when a disk is made. Whoever dies in between
    /// leaves a store without a record behind.
    ///
    /// # Errors
    /// [`DiskFailure`]; the disk has been removed, or what is left of it is named in it.
    pub fn rename(&self, mut disk: Disk, id: &SandboxId, dir: &Path) -> Result<Disk, DiskFailure> {
        let mut steps = disk.steps.clone();
        match self.renamed(&mut disk, id, dir, &mut steps) {
            Ok(()) => Ok(disk),
            Err(source) => {
                // Undone last: the files, by which the rest is found.
                steps.sort_by_key(|step| !super::is_stored(step));
                Err(DiskFailure {
                    id: id.clone(),
                    kind: Some(disk.record.kind),
                    source,
                    leftovers: self.undo_all(steps),
                })
            }
        }
    }

    /// `all` grows by what the disk has under its new name.
    fn renamed(
        &self,
        disk: &mut Disk,
        id: &SandboxId,
        dir: &Path,
        all: &mut Vec<DiskStep>,
    ) -> Result<(), DiskError> {
        let dir = super::absolute(dir)?;
        let moves = [
            (
                DiskRecord::path(&disk.id, &disk.dir),
                DiskRecord::path(id, &dir),
            ),
            (
                disk.record.store(&disk.id, &disk.dir),
                disk.record.store(id, &dir),
            ),
        ];
        for (from, to) in moves {
            let moved = disk.steps.iter_mut().find_map(|step| match step {
                DiskStep::File { path, .. } if *path == from => {
                    path.clone_from(&to);
                    Some(step.clone())
                }
                _ => None,
            });
            all.extend(moved);
            file::rename(&from, &to, &self.faults)?;
            if disk.path == from {
                disk.path = to;
            }
        }
        if let Some(mapping) = &mut disk.mapping {
            let name = dm_snapshot::name_of(id);
            let moved = disk.steps.iter_mut().find_map(|step| match step {
                DiskStep::Mapping { name: it, .. } => {
                    it.clone_from(&name);
                    Some(step.clone())
                }
                _ => None,
            });
            all.extend(moved);
            let control = self.control()?;
            call(&self.faults, format!("rename {}", mapping.name), || {
                control.rename(&mapping.name, &name)
            })?;
            mapping.name = name;
        }
        disk.id = id.clone();
        disk.dir = dir;
        Ok(())
    }

    /// Whether a disk is as it was made: `image` leads to the file that it was made of, which
    /// has not changed, its own files are where they were, its device is up, and the kernel
    /// has counted no write to it. Takes some ten microseconds.
    pub(super) fn is_as_made(&self, disk: &Disk, image: &Path) -> bool {
        let image = Base::open(image, &self.faults);
        image.is_ok_and(|image| image.identity == disk.record.base)
            && disk.steps.iter().all(DiskStep::is_in_place)
            && disk.mapping.as_ref().is_none_or(|it| self.is_unwritten(it))
    }

    fn is_unwritten(&self, mapping: &Mapping) -> bool {
        let Ok(control) = &self.control else {
            return false;
        };
        let device = DeviceRef::Uuid(&mapping.uuid);
        let found = control.info(device).ok().flatten();
        let is_up = found.is_some_and(|it| {
            it.name == mapping.name && it.active && !it.suspended && !it.deferred_remove
        });
        let status = control.status(device).unwrap_or_default();
        is_up
            && matches!(
                status.first().map(pressure::parse),
                Some(SnapshotWords::Usage { used, own, .. }) if own == Some(used)
            )
    }
}
