//! How disks fare.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rewake_sys::dm::DeviceRef;
use rewake_sys::error::Named;

use super::error::{DiskError, call};
use super::pressure::{self, CowStatus, SnapshotWords, StoreState};
use super::record::{Base, BaseIdentity, DiskRecord};
use super::{Disk, DiskKind, DiskPool, dm_snapshot, file};
use crate::fault::Faults;
use crate::ids::SandboxId;
use crate::units::Bytes;

/// A disk as seen from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskInfo {
    /// Whose disk it is.
    pub id: SandboxId,
    /// What is known of it.
    pub record: DiskRecord,
    /// What the VM opens; `None` while it is not attached.
    pub path: Option<PathBuf>,
    /// How many have the device open; `None` for files, of which nobody knows.
    pub open_count: Option<i32>,
    /// How full its store is; `None` while it is not attached.
    pub status: Option<CowStatus>,
    /// The disks of this machine that stand on the same loop device, this one included.
    pub sharers: Vec<String>,
}

impl DiskPool {
    /// How full the store of a disk is. One ioctl, nothing is flushed: cheap enough to be
    /// asked every second.
    ///
    /// # Errors
    /// [`DiskError::Detached`] where the device is gone, else what the calls say.
    pub fn status(&self, disk: &Disk) -> Result<CowStatus, DiskError> {
        let uuid = disk.mapping.as_ref().map(|it| it.uuid.as_str());
        self.status_of(&disk.id, &disk.dir, &disk.record, uuid)
    }

    /// The same, with a store that has failed as an error.
    ///
    /// # Errors
    /// [`DiskError::Overflowed`], [`DiskError::Invalid`], and those of [`DiskPool::status`].
    pub fn check(&self, disk: &Disk) -> Result<CowStatus, DiskError> {
        let status = self.status(disk)?;
        let id = disk.id.clone();
        match status.state {
            StoreState::Healthy | StoreState::Pressure => Ok(status),
            StoreState::Overflowed => Err(DiskError::Overflowed { id }),
            StoreState::Invalid => Err(DiskError::Invalid { id }),
        }
    }

    pub(super) fn status_of(
        &self,
        id: &SandboxId,
        dir: &Path,
        record: &DiskRecord,
        uuid: Option<&str>,
    ) -> Result<CowStatus, DiskError> {
        let path = record.store(id, dir);
        let free = file::filesystem_free(&path)?;
        let total = Bytes(record.store_bytes);
        let judged = |used, total| CowStatus {
            used,
            total,
            filesystem_free: free,
            state: self.config.thresholds.judge(used, total, free),
        };
        let Some(uuid) = uuid else {
            let found = call(&self.faults, format!("look at {}", path.display()), || {
                std::fs::metadata(&path).named("stat")
            })?;
            // A file of full size takes no more: what it holds is no pressure of its own.
            let mut status = judged(Bytes(0), total);
            status.used = Bytes(found.blocks().saturating_mul(512));
            return Ok(status);
        };
        let control = self.control()?;
        let read = call(&self.faults, "read the status of the disk", || {
            control.status(DeviceRef::Uuid(uuid))
        });
        let targets = match read {
            Err(DiskError::Call { source, .. }) if source.is_gone() => {
                return Err(DiskError::Detached { id: id.clone() });
            }
            other => other?,
        };
        let failed = |state| CowStatus {
            used: total,
            total,
            filesystem_free: free,
            state,
        };
        Ok(match targets.first().map(pressure::parse) {
            Some(SnapshotWords::Usage { used, total, .. }) => judged(
                used.bytes().unwrap_or(Bytes(u64::MAX)),
                total.bytes().unwrap_or(Bytes(u64::MAX)),
            ),
            Some(SnapshotWords::Overflowed) => failed(StoreState::Overflowed),
            Some(SnapshotWords::Invalid) | None => failed(StoreState::Invalid),
        })
    }

    /// Looks at a disk without holding it.
    ///
    /// # Errors
    /// [`DiskError::Missing`] where there is none, else what the calls say.
    pub fn inspect(&self, id: &SandboxId, dir: &Path) -> Result<DiskInfo, DiskError> {
        let dir = super::absolute(dir)?;
        let record = DiskRecord::read(id, &dir, &self.faults)?.record;
        let path = record.store(id, &dir);
        let mut info = DiskInfo {
            id: id.clone(),
            path: None,
            open_count: None,
            status: None,
            sharers: Vec::new(),
            record,
        };
        if info.record.kind != DiskKind::DmSnapshot {
            info.status = Some(self.status_of(id, &dir, &info.record, None)?);
            info.path = Some(path);
            return Ok(info);
        }
        let store = file::open(&path, false, &self.faults)?;
        let uuid = dm_snapshot::uuid(&store, &path)?;
        if let Some(found) = self.mapping(&uuid)? {
            info.path = Some(self.shown(found.device));
            info.open_count = Some(found.open_count);
            info.status = Some(self.status_of(id, &dir, &info.record, Some(&uuid))?);
        }
        // Without the base image there is nothing to share.
        if let Ok(base) = Base::open(&info.record.base.path, &self.faults) {
            info.sharers = self.sharers(&base)?;
        }
        Ok(info)
    }

    /// The attached disks of this machine that stand on an image, by their sandboxes.
    ///
    /// # Errors
    /// What opening the image and asking the kernel say.
    pub fn sharers_of(&self, image: &Path) -> Result<Vec<String>, DiskError> {
        let base = Base::open(image, &self.faults)?;
        self.sharers(&base)
    }

    /// How an image is recognised again. Refuses what cannot be a base image.
    ///
    /// # Errors
    /// [`DiskError::Unusable`], else what opening the image says.
    pub fn identify(image: &Path) -> Result<BaseIdentity, DiskError> {
        Ok(Base::open(image, &Faults::NONE)?.identity)
    }

    /// The disks whose records are in a directory.
    ///
    /// # Errors
    /// What reading the directory says.
    pub fn list(&self, dir: &Path) -> Result<Vec<SandboxId>, DiskError> {
        let names = call(&self.faults, format!("list {}", dir.display()), || {
            let entries = std::fs::read_dir(dir).named("open")?;
            entries
                .map(|entry| entry.map(|it| it.file_name()).named("getdents64"))
                .collect::<Result<Vec<_>, _>>()
        })?;
        let id = |name: &std::ffi::OsString| {
            let name = name.to_str()?.strip_suffix(".json")?;
            SandboxId::new(name).ok()
        };
        let mut ids: Vec<SandboxId> = names.iter().filter_map(id).collect();
        ids.sort_unstable();
        Ok(ids)
    }
}
