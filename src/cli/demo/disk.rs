//! The disk of the demo's guest: a view of a base image that takes its own writes.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::ids::SandboxId;
use rewake::resource::disk::{Disk, DiskConfig, DiskFailure, DiskKind, DiskMode, DiskPool};
use rewake::units::Bytes;
use rewake::vm_config::{DiskConfig as VmDisk, VmConfig};
use rustix::fs::FlockOperation;
use serde_json::{Value, json};

use super::super::Failure;
use super::{BUDGET, Forgotten};

const SIZE: Bytes = Bytes::mib(64);
/// What the base image has everywhere in its first part, and where the disk has another.
const ORIGINAL: &[u8; 16] = b"the base image. ";
const MARK: &[u8; 16] = b"the disk's own. ";
const MARK_AT: u64 = 8192;

/// A disk, its base image, and the path that the first VM knows it by.
pub(super) struct GuestDisk {
    pool: DiskPool,
    base: PathBuf,
    recorded: PathBuf,
    /// Gone once it was removed.
    disk: Option<Disk>,
}

impl GuestDisk {
    /// Makes the best kind of disk that can be had here, and writes a mark to it.
    pub(super) fn make(dir: &Path, deadline: Deadline) -> Result<Self, Failure> {
        let (base, disks) = (dir.join("base.raw"), dir.join("disks"));
        let image = File::create_new(&base)?;
        image.set_len(SIZE.0)?;
        image.write_all_at(&ORIGINAL.repeat(1 << 16), 0)?;
        fs::create_dir(&disks)?;
        let config = DiskConfig {
            runtime_dir: dir.join("disk-run"),
            ..DiskConfig::default()
        };
        let pool = DiskPool::open(config, Faults::default());
        let id = SandboxId::random();
        let disk = pool.create(&id, &base, &disks, DiskMode::Auto, deadline)?;
        let mut made = Self {
            pool,
            base,
            recorded: dir.join("rootfs"),
            disk: Some(disk),
        };
        made.mark().inspect_err(|_| {
            let _ = made.remove();
        })?;
        Ok(made)
    }

    fn mark(&self) -> Result<(), Failure> {
        let path = self.path();
        let file = File::options().write(true).open(&path)?;
        file.write_all_at(MARK, MARK_AT)?;
        file.sync_all()?;
        // Another path than the one after the restore.
        Ok(symlink(path, &self.recorded)?)
    }

    /// Where it is now.
    pub(super) fn path(&self) -> PathBuf {
        let path = self.disk.as_ref().map(Disk::path);
        path.unwrap_or(&self.recorded).to_owned()
    }

    /// What the first VM is told.
    pub(super) fn device(&self) -> VmDisk {
        VmDisk::raw(&self.recorded)
    }

    fn kind(&self) -> Option<DiskKind> {
        self.disk.as_ref().map(Disk::kind)
    }

    /// How it is kept, and why not in a better way.
    pub(super) fn words(&self) -> String {
        let how = match self.kind() {
            Some(DiskKind::DmSnapshot) => "a dm-snapshot of",
            Some(DiskKind::Reflink) => "a clone that shares its blocks with",
            _ => "a sparse copy of",
        };
        let why = match self.pool.snapshots_work() {
            Ok(()) => String::new(),
            Err(error) => format!(" (no dm-snapshot here: {error})"),
        };
        format!("Its disk is {how} a base image of {SIZE}{why}.")
    }

    /// As between two lives of a sandbox: detached, attached again, and the recorded path
    /// leads nowhere.
    pub(super) fn attach_again(&mut self, deadline: Deadline) -> Result<(), Failure> {
        fs::remove_file(&self.recorded)?;
        if let Some(disk) = self.disk.take() {
            let (id, dir) = (disk.id().clone(), disk.dir().to_owned());
            self.pool.remove(disk, true, deadline)?;
            self.disk = Some(self.pool.attach(&id, &dir, deadline)?);
        }
        Ok(())
    }

    /// What can be seen of it while a VM has it; `config` is what the VM says of itself.
    pub(super) fn seen(&self, config: &VmConfig) -> Result<Seen, Failure> {
        let disk = self.disk.as_ref().ok_or_else(|| forgotten("no disk"))?;
        let info = self.pool.inspect(disk.id(), disk.dir())?;
        let disks = config.disks.as_deref().unwrap_or_default();
        let [told] = disks else {
            return Err(forgotten("the VM has not one disk").into());
        };
        if told.path.as_deref() != Some(disk.path()) {
            return Err(forgotten("the VM has another disk").into());
        }
        let read = |path: &Path| -> Result<[u8; 16], Failure> {
            let mut bytes = [0; 16];
            File::open(path)?.read_exact_at(&mut bytes, MARK_AT)?;
            Ok(bytes)
        };
        if read(disk.path())? != *MARK || read(&self.base)? != *ORIGINAL {
            return Err(forgotten("a write to the disk is not where it belongs").into());
        }
        let status = info.status;
        Ok(Seen {
            document: json!({
                "kind": disk.kind(),
                "path": disk.path(),
                "recorded_path": self.recorded,
                "image_type": told.image_type,
                "locked": is_locked(disk.path())?,
                "open_count": info.open_count,
                "used_bytes": status.map(|it| it.used.0),
                "total_bytes": status.map(|it| it.total.0),
                "state": status.map(|it| it.state),
            }),
            used: status.map_or(Bytes(0), |it| it.used),
        })
    }

    /// Removes it; the result is what is left.
    pub(super) fn remove(&mut self) -> Option<String> {
        let disk = self.disk.take()?;
        let removed = self.pool.remove(disk, false, Deadline::after(BUDGET));
        removed.err().as_ref().map(DiskFailure::to_string)
    }
}

/// A look at a disk in use.
pub(super) struct Seen {
    pub(super) document: Value,
    used: Bytes,
}

impl Seen {
    pub(super) fn words(&self) -> String {
        let locked = if self.document["locked"] == true {
            "locked"
        } else {
            "not locked"
        };
        let name = |key: &str| {
            let path = Path::new(self.document[key].as_str().unwrap_or_default());
            path.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        };
        format!(
            "Its disk is now {} (recorded: {}), {locked} by the VM; {} used, what was written is there.",
            name("path"),
            name("recorded_path"),
            self.used,
        )
    }
}

fn forgotten(what: &str) -> Forgotten {
    Forgotten(what.to_owned())
}

/// Whether somebody holds the lock that Cloud Hypervisor takes on its disks.
fn is_locked(path: &Path) -> Result<bool, Failure> {
    let file = File::options().read(true).write(true).open(path)?;
    match rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS) => Ok(true),
        Err(error) => Err(std::io::Error::from(error).into()),
    }
}
