//! Detaching and removing disks.
//!
//! Nearly all that removing a device costs is the kernel's: it waits several times until no
//! processor uses the device any more, ends threads, and unbinds the loop device. Callers
//! that remove many share these waits ([`DiskPool::remove_all`]); callers that need not see
//! the end leave them to the kernel ([`DiskPool::retire`]).

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rewake_sys::dm::DeviceRef;
use rewake_sys::error::Named;

use super::dm_snapshot::Mapping;
use super::error::{DiskError, DiskFailure, DiskLeftover, call};
use super::record::{self, DiskRecord, Lock};
use super::{Disk, DiskKind, DiskPool, DiskStep, dm_snapshot, file, is_stored};
use crate::deadline::Deadline;
use crate::ids::SandboxId;

/// So many removals wait at the same time.
const TOGETHER: usize = 16;

impl DiskPool {
    /// Detaches a disk; with `keep_store` what the guest wrote stays for another
    /// [`DiskPool::attach`], otherwise it is gone. Blocks while the device is busy, for
    /// three seconds or until the deadline, then leaves it to the kernel to remove it.
    ///
    /// The VM must have ended: a file is removed under a VM that still runs on it.
    ///
    /// # Errors
    /// [`DiskFailure`] with what is left; [`DiskPool::remove_by_id`] may be tried later.
    pub fn remove(
        &self,
        disk: Disk,
        keep_store: bool,
        deadline: Deadline,
    ) -> Result<(), DiskFailure> {
        let Disk {
            id,
            dir,
            record,
            steps,
            lock,
            ..
        } = disk;
        let store = record.store(&id, &dir);
        let outcome =
            self.remove_steps(&id, Some(record.kind), steps, keep_store, &store, deadline);
        // Held until nothing of the disk is left to be found.
        drop(lock);
        outcome
    }

    /// Removes or detaches several disks, in hardly more time than one. Returns those that
    /// failed. Blocks as [`DiskPool::remove`] does, with up to 16 threads of its own that end
    /// before it returns.
    #[must_use]
    pub fn remove_all(
        &self,
        disks: Vec<Disk>,
        keep_store: bool,
        deadline: Deadline,
    ) -> Vec<DiskFailure> {
        let workers = disks.len().min(TOGETHER);
        let (waiting, failures) = (Mutex::new(disks), Mutex::new(Vec::new()));
        let work = || {
            let next = || lock(&waiting).pop();
            while let Some(disk) = next() {
                if let Err(failure) = self.remove(disk, keep_store, deadline) {
                    lock(&failures).push(failure);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..workers {
                // Where no thread can be had, those that are there do its work.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        failures
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes a disk with all that was written to it, without waiting until the kernel has
    /// taken its device down: the files are gone when this returns, the device and the loop
    /// devices follow by themselves, also if this process ends. Costs two ioctls and two
    /// unlinks, and waits for none of what makes [`DiskPool::remove`] slow.
    ///
    /// The kernel is told to remove the device as soon as it is closed, while it is held open
    /// here; so from the first call on that changes anything, nothing can be left behind.
    /// A device that somebody else has open is removed as by [`DiskPool::remove`].
    ///
    /// # Errors
    /// Those of [`DiskPool::remove`].
    pub fn retire(&self, mut disk: Disk, deadline: Deadline) -> Result<(), DiskFailure> {
        let doomed = match &disk.mapping {
            Some(mapping) => self.doom(mapping).map_err(|source| DiskFailure {
                id: disk.id.clone(),
                kind: Some(disk.record.kind),
                source,
                leftovers: Vec::new(),
            })?,
            None => None,
        };
        if doomed.is_some() {
            disk.steps
                .retain(|step| !matches!(step, DiskStep::Mapping { .. }));
        }
        let outcome = self.remove(disk, false, deadline);
        // Closed only now: the kernel's work would hold up the removal of the files.
        drop(doomed);
        outcome
    }

    /// Holds the device open and has the kernel remove it once it is closed. `None` where
    /// that is not possible: it is gone, or somebody else has it open.
    fn doom(&self, mapping: &Mapping) -> Result<Option<File>, DiskError> {
        let name = &mapping.name;
        let Ok(held) = file::open(&mapping.path, false, &self.faults) else {
            return Ok(None);
        };
        let node = file::metadata(&held, &mapping.path)?.rdev();
        let control = self.control()?;
        let found = call(&self.faults, format!("look for {name}"), || {
            control.info(DeviceRef::Name(name))
        })?;
        let is_ours_alone = found
            .is_some_and(|it| it.uuid == mapping.uuid && it.device == node && it.open_count == 1);
        if !is_ours_alone {
            return Ok(None);
        }
        call(&self.faults, format!("let {name} go"), || {
            control.remove(DeviceRef::Name(name), true)
        })?;
        Ok(Some(held))
    }

    /// [`DiskPool::remove`] for a disk that this process does not hold. One of which only a part is
    /// left, after a crash, is removed as well.
    ///
    /// # Errors
    /// [`DiskError::Missing`] where there is none, [`DiskError::Held`] where another process
    /// works with it, and those of [`DiskPool::remove`].
    pub fn remove_by_id(
        &self,
        id: &SandboxId,
        dir: &Path,
        keep_store: bool,
        deadline: Deadline,
    ) -> Result<(), DiskFailure> {
        let found = super::absolute(dir).and_then(|dir| {
            for path in DiskRecord::files(id, &dir) {
                file::forget_unfinished(&path)?;
            }
            let held = match DiskRecord::read(id, &dir, &self.faults) {
                Err(DiskError::Record { .. }) if !keep_store => return self.torn(id, &dir),
                other => other?,
            };
            let (record, lock) = held.lock(id, &self.faults)?;
            let store = record.store(id, &dir);
            let mut steps = self.files(&[DiskRecord::path(id, &dir), store.clone()])?;
            if record.kind == DiskKind::DmSnapshot {
                steps.extend(self.attached_steps(&store)?);
            }
            Ok((Some(record.kind), lock, steps, store))
        });
        let (kind, lock, steps, store) = found.map_err(|source| DiskFailure {
            id: id.clone(),
            kind: None,
            source,
            leftovers: Vec::new(),
        })?;
        let outcome = self.remove_steps(id, kind, steps, keep_store, &store, deadline);
        drop(lock);
        outcome
    }

    /// [`DiskPool::remove_by_id`] also where there is no record whose lock says whether anybody
    /// works with the disk. The caller knows that nobody does.
    pub(super) fn remove_stray(
        &self,
        id: &SandboxId,
        dir: &Path,
        deadline: Deadline,
    ) -> Result<(), DiskFailure> {
        let failure = match self.remove_by_id(id, dir, false, deadline) {
            Err(failure) if matches!(failure.source, DiskError::Missing { .. }) => failure,
            other => return other,
        };
        let (steps, store) = self
            .all_of(id, dir)
            .map_err(|source| DiskFailure { source, ..failure })?;
        self.remove_steps(id, None, steps, false, &store, deadline)
    }

    /// What is left of a disk whose record had not reached the host's disk when that lost its
    /// power: any of its files.
    fn torn(
        &self,
        id: &SandboxId,
        dir: &Path,
    ) -> Result<(Option<DiskKind>, Lock, Vec<DiskStep>, PathBuf), DiskError> {
        let path = DiskRecord::path(id, dir);
        log::warn!("{} cannot be read: its disk is removed", path.display());
        let lock = Lock(file::open(&path, false, &self.faults)?);
        record::lock(&lock.0, id, &self.faults)?;
        let (steps, store) = self.all_of(id, dir)?;
        Ok((None, lock, steps, store))
    }

    /// Whatever there is by the name of a disk of which nothing is known, and where its store
    /// would be.
    fn all_of(&self, id: &SandboxId, dir: &Path) -> Result<(Vec<DiskStep>, PathBuf), DiskError> {
        let mut steps = self.files(&DiskRecord::files(id, dir))?;
        let store = dir.join(format!("{id}.cow"));
        steps.extend(self.attached_steps(&store)?);
        Ok((steps, store))
    }

    fn remove_steps(
        &self,
        id: &SandboxId,
        kind: Option<DiskKind>,
        steps: Vec<DiskStep>,
        keep_store: bool,
        store: &Path,
        deadline: Deadline,
    ) -> Result<(), DiskFailure> {
        let failure = |source, leftovers| DiskFailure {
            id: id.clone(),
            kind,
            source,
            leftovers,
        };
        let mut failed: Vec<DiskLeftover> = Vec::new();
        for step in steps.into_iter().rev() {
            if keep_store && is_stored(&step) {
                continue;
            }
            // The files stay until all before them is gone: by them the rest is found.
            if is_stored(&step) && !failed.is_empty() {
                continue;
            }
            if let Err(error) = step.undo_with(Some(&self.control), &self.faults, deadline) {
                failed.push(DiskLeftover { step, error });
            }
        }
        if !failed.is_empty() {
            let first = failed.remove(0);
            return Err(failure(first.error, failed));
        }
        if keep_store && store.exists() {
            self.sync_file(store)
                .map_err(|source| failure(source, Vec::new()))?;
        }
        Ok(())
    }

    /// The files of an attached disk as steps.
    pub(super) fn stored_steps(&self, disk: &Disk) -> Result<Vec<DiskStep>, DiskError> {
        let store = disk.record.store(&disk.id, &disk.dir);
        self.files(&[DiskRecord::path(&disk.id, &disk.dir), store])
    }

    /// Those of the files that are there, as steps.
    fn files(&self, paths: &[PathBuf]) -> Result<Vec<DiskStep>, DiskError> {
        let mut steps = Vec::new();
        for path in paths {
            match call(&self.faults, format!("look at {}", path.display()), || {
                match std::fs::symlink_metadata(path) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    other => other.map(Some).named("lstat"),
                }
            })? {
                Some(found) => steps.push(DiskStep::File {
                    path: path.clone(),
                    device: found.dev(),
                    inode: found.ino(),
                }),
                None => log::debug!("{} is missing", path.display()),
            }
        }
        Ok(steps)
    }

    /// The mapping of a store as a step, if there is one, and the node that we made of it.
    fn attached_steps(&self, path: &Path) -> Result<Vec<DiskStep>, DiskError> {
        if !path.exists() {
            return Ok(Vec::new());
        }
        let store = file::open(path, false, &self.faults)?;
        let uuid = dm_snapshot::uuid(&store, path)?;
        let Some(found) = self.mapping(&uuid)? else {
            return Ok(Vec::new());
        };
        let mut steps = vec![DiskStep::Mapping {
            name: found.name,
            uuid,
        }];
        if let Some(path) = self.made_node(found.device) {
            let device = found.device;
            steps.push(DiskStep::Node { path, device });
        }
        Ok(steps)
    }
}

/// What the lock guards is whole whatever thread panicked.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
