//! Root disks: each a copy-on-write view of a base image that is shared and never written to.
//!
//! ```text
//!   base.raw ── loop, read-only, one for all ──┐
//!                                              ├── dm snapshot ── /dev/dm-N ── VM
//!   DIR/ID.cow ── loop ────────────────────────┘
//!   DIR/ID.json: what kind of disk, which base image
//! ```
//!
//! Where there is no device-mapper, the disk is a file `DIR/ID.raw`: a clone that shares the
//! image's blocks, or a sparse copy. Callers see the same interface.
//!
//! # What a power loss leaves
//!
//! Files are made without a name, written to the disk (`fsync`), named (`linkat`), and the
//! directory is written to the disk (`fsync`): first the record, then the store, then, once attached,
//! what the guest flushes. So a store that has a name is whole, and a record without a store
//! is the worst that can be left; removing the disk removes it. With
//! [`DiskConfig::defer_sync`] all that is left to [`DiskPool::sync`], and what is left before
//! may be torn: it can be removed, and nothing else. The snapshot target writes
//! its bookkeeping after the data, behind a flush; the loop device turns flushes into
//! `fsync`. A flattened image appears under its name when all of it is on the disk.

mod base_loop;
mod dm_snapshot;
mod error;
mod file;
mod flatten;
mod in_use;
mod pressure;
mod record;
mod remove;
mod rename;
mod show;
mod step;
mod stock;
mod sync;
mod watch;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewake_sys::CallError;
use rewake_sys::dm::Control;
use rewake_sys::loopdev;
use serde::{Deserialize, Serialize};

use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::ids::SandboxId;
use crate::resource::ledger::Step;
use crate::units::Bytes;
use dm_snapshot::Mapping;
use error::call;
use file::{Reaches, Unnamed};
use record::{Base, Lock};

pub use error::{DiskError, DiskFailure, DiskLeftover};
pub use file::Progress;
pub use pressure::{CowStatus, PressureWatch, StoreState, Thresholds};
pub use record::{BaseIdentity, DiskRecord};
pub use show::DiskInfo;
pub use step::DiskStep;
pub use stock::{DiskStock, DiskStockOptions, DiskStockStats, StockSweep};
pub use watch::{DiskEvent, DiskWatch, WatchOptions};

/// Rolling back has a budget of its own: the caller's may be used up.
const UNDO_BUDGET: Duration = Duration::from_secs(10);

/// How a disk shall be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskMode {
    /// The first of the others that works here.
    #[default]
    Auto,
    /// This kind or none.
    Only(DiskKind),
}

/// How a disk is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskKind {
    /// A device-mapper snapshot over a shared loop device.
    DmSnapshot,
    /// A file that shares its blocks with the base image (`FICLONE`: XFS, btrfs and others).
    Reflink,
    /// A sparse copy.
    Copy,
}

impl fmt::Display for DiskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::DmSnapshot => "dm-snapshot",
            Self::Reflink => "reflink",
            Self::Copy => "copy",
        })
    }
}

/// How disks are made.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// Where processes meet: locks, and device nodes where `/dev` has none. Not for data.
    pub runtime_dir: PathBuf,
    /// Size of the copy-on-write store of new disks; `None` is room for a write to every
    /// block of the base image. Stores are sparse, so that costs nothing before it is used.
    pub store_size: Option<Bytes>,
    /// When a store counts as under pressure.
    pub thresholds: Thresholds,
    /// Leaves new disks to the kernel's own time, which saves four waits for the host's disk.
    /// After a power loss such a disk can be gone, or in pieces that can only be removed,
    /// until [`DiskPool::sync`] was called for it: right where a VM shall run first, whose
    /// memory does not outlive the machine either.
    pub defer_sync: bool,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            runtime_dir: PathBuf::from("/run/rewake"),
            store_size: None,
            thresholds: Thresholds::default(),
            defer_sync: false,
        }
    }
}

/// Makes, finds and removes disks. Shared by threads; several processes may each have one.
#[derive(Debug)]
pub struct DiskPool {
    config: DiskConfig,
    faults: Faults,
    control: Result<Control, CallError>,
}

/// A disk that a VM can be given.
///
/// It holds the disk against other processes of ours. Dropping it keeps the disk as it is;
/// [`DiskPool::attach`] finds it again.
#[derive(Debug)]
#[must_use = "a dropped disk stays"]
pub struct Disk {
    id: SandboxId,
    dir: PathBuf,
    record: DiskRecord,
    path: PathBuf,
    mapping: Option<Mapping>,
    steps: Vec<DiskStep>,
    /// The record's file, locked.
    lock: Lock,
}

impl Disk {
    /// Whose disk it is.
    #[must_use]
    pub const fn id(&self) -> &SandboxId {
        &self.id
    }

    /// What the VM opens: a block device or a raw image file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How it is kept.
    #[must_use]
    pub const fn kind(&self) -> DiskKind {
        self.record.kind
    }

    /// What is known of it.
    #[must_use]
    pub const fn record(&self) -> &DiskRecord {
        &self.record
    }

    /// Its size in bytes: the base image's.
    #[must_use]
    pub const fn size(&self) -> Bytes {
        Bytes(self.record.base.bytes)
    }

    /// The directory that its store and its record are in.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All that exists because of it, oldest first, for a journal: undone last first, the
    /// disk and what the guest wrote are gone.
    #[must_use]
    pub fn steps(&self) -> &[DiskStep] {
        &self.steps
    }

    /// The same as steps of a ledger. The disk itself must be dropped before they are undone.
    #[must_use]
    pub fn ledger_steps(&self) -> Vec<Step> {
        let steps = self.steps.iter().cloned();
        steps.map(|disk| Step::Disk { disk }).collect()
    }

    /// What stands in the kernel only: undone, the store is kept for another
    /// [`DiskPool::attach`].
    #[must_use]
    pub fn attachment_steps(&self) -> Vec<Step> {
        let steps = self.steps.iter().filter(|it| !is_stored(it)).cloned();
        steps.map(|disk| Step::Disk { disk }).collect()
    }
}

/// Whether the step is about data, and not about the kernel's present state.
const fn is_stored(step: &DiskStep) -> bool {
    matches!(step, DiskStep::File { .. })
}

impl DiskPool {
    /// Opens the device-mapper if there is one. Does not block.
    #[must_use]
    pub fn open(config: DiskConfig, faults: Faults) -> Self {
        Self {
            config,
            faults,
            control: Control::open(),
        }
    }

    /// How disks are made.
    #[must_use]
    pub const fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// Makes the disk `id` of a base image, with its store in `dir`, which must exist, and
    /// attaches it. [`DiskKind::Copy`] copies the image meanwhile; the others block for
    /// milliseconds, on the kernel's own locks and on what `fsync` costs.
    ///
    /// # Errors
    /// [`DiskFailure`]; everything made so far has been undone, or is named in it.
    pub fn create(
        &self,
        id: &SandboxId,
        base: &Path,
        dir: &Path,
        mode: DiskMode,
        deadline: Deadline,
    ) -> Result<Disk, DiskFailure> {
        let mut steps = Vec::new();
        let mut kind = None;
        let outcome = (|| {
            let dir = absolute(dir)?;
            let base = Base::open(base, &self.faults)?;
            let chosen = self.choose(id, &base, &dir, mode)?;
            kind = Some(chosen);
            let (record, lock) = self.make_record(id, &base, &dir, chosen, &mut steps)?;
            let store = self.make_store(id, &base, &dir, &record, &mut steps, deadline)?;
            self.attached(id, &dir, record, &base, &store, &mut steps, deadline)
                .map(|attached| attached.locked(lock))
        })();
        self.settle(id, kind, outcome, steps)
    }

    /// Attaches a disk that was made before: after its VM was stopped, after a crash of the
    /// process that made it, or after a restart of the machine.
    ///
    /// # Errors
    /// [`DiskFailure`]; what was attached has been detached again, the store is kept.
    pub fn attach(
        &self,
        id: &SandboxId,
        dir: &Path,
        deadline: Deadline,
    ) -> Result<Disk, DiskFailure> {
        let mut steps = Vec::new();
        let mut kind = None;
        let outcome = (|| {
            let dir = absolute(dir)?;
            let held = DiskRecord::read(id, &dir, &self.faults)?;
            kind = Some(held.record.kind);
            let (record, lock) = held.lock(id, &self.faults)?;
            let base = Base::open(&record.base.path, &self.faults)?;
            base.expect(&record.base)?;
            let path = record.store(id, &dir);
            let store = file::open(&path, true, &self.faults)?;
            if record.kind == DiskKind::DmSnapshot {
                dm_snapshot::check_store(&store, &path, record.store_bytes, &self.faults)?;
            }
            self.attached(id, &dir, record, &base, &store, &mut steps, deadline)
                .map(|attached| attached.locked(lock))
        })();
        let mut disk = self.settle(id, kind, outcome, steps)?;
        match self.stored_steps(&disk) {
            Ok(stored) => disk.steps.splice(..0, stored),
            Err(source) => {
                return Err(DiskFailure {
                    id: id.clone(),
                    kind,
                    source,
                    leftovers: self.undo_all(disk.steps),
                });
            }
        };
        Ok(disk)
    }

    /// Rolls back what a failed operation did.
    fn settle(
        &self,
        id: &SandboxId,
        kind: Option<DiskKind>,
        outcome: Result<Disk, DiskError>,
        steps: Vec<DiskStep>,
    ) -> Result<Disk, DiskFailure> {
        match outcome {
            Ok(mut disk) => {
                disk.steps = steps;
                Ok(disk)
            }
            Err(source) => Err(DiskFailure {
                id: id.clone(),
                kind,
                source,
                leftovers: self.undo_all(steps),
            }),
        }
    }

    fn undo_all(&self, steps: Vec<DiskStep>) -> Vec<DiskLeftover> {
        let deadline = Deadline::after(UNDO_BUDGET);
        let undo =
            |step: DiskStep| match step.undo_with(Some(&self.control), &self.faults, deadline) {
                Ok(()) => None,
                Err(error) => Some(DiskLeftover { step, error }),
            };
        steps.into_iter().rev().filter_map(undo).collect()
    }

    /// Settles on a kind and says why.
    fn choose(
        &self,
        id: &SandboxId,
        base: &Base,
        dir: &Path,
        mode: DiskMode,
    ) -> Result<DiskKind, DiskError> {
        let (kind, reason) = match mode {
            DiskMode::Only(kind) => (kind, "as asked for".to_owned()),
            DiskMode::Auto => match self.snapshots_work() {
                Ok(()) => (DiskKind::DmSnapshot, "the kernel has it".to_owned()),
                Err(error) => {
                    let trial = Unnamed::new(&dir.join(format!("{id}.trial")), &self.faults)?;
                    if file::clone(&base.file, &trial.file, &self.faults)? {
                        (DiskKind::Reflink, format!("no device-mapper: {error}"))
                    } else {
                        let why = "and the file system shares no blocks";
                        (DiskKind::Copy, format!("no device-mapper: {error}, {why}"))
                    }
                }
            },
        };
        log::info!("Disk {id}: {kind}, {reason}");
        Ok(kind)
    }

    /// Whether the kernel offers snapshots and loop devices to this process.
    ///
    /// # Errors
    /// The call that says it does not.
    pub fn snapshots_work(&self) -> Result<(), CallError> {
        let control = self.control.as_ref().map_err(|error| *error)?;
        control.target_version("snapshot")?;
        loopdev::available()
    }

    /// When the files of a new disk reach the host's disk.
    const fn new_files(&self) -> Reaches {
        if self.config.defer_sync {
            Reaches::Later
        } else {
            Reaches::Now
        }
    }

    fn make_record(
        &self,
        id: &SandboxId,
        base: &Base,
        dir: &Path,
        kind: DiskKind,
        steps: &mut Vec<DiskStep>,
    ) -> Result<(DiskRecord, Lock), DiskError> {
        let store = match kind {
            DiskKind::DmSnapshot => self
                .config
                .store_size
                .unwrap_or_else(|| dm_snapshot::full_store(base.size())),
            DiskKind::Reflink | DiskKind::Copy => base.size(),
        };
        let record = DiskRecord {
            version: DiskRecord::VERSION,
            kind,
            base: base.identity.clone(),
            store_bytes: store.0,
        };
        let unnamed = Unnamed::new(&DiskRecord::path(id, dir), &self.faults)?;
        record.write(&unnamed.file, &self.faults)?;
        record::lock(&unnamed.file, id, &self.faults)?;
        steps.push(unnamed.step.clone());
        let lock = Lock(unnamed.publish(self.new_files(), &self.faults)?);
        Ok((record, lock))
    }

    fn make_store(
        &self,
        id: &SandboxId,
        base: &Base,
        dir: &Path,
        record: &DiskRecord,
        steps: &mut Vec<DiskStep>,
        deadline: Deadline,
    ) -> Result<File, DiskError> {
        let path = record.store(id, dir);
        let unnamed = Unnamed::new(&path, &self.faults)?;
        match record.kind {
            DiskKind::DmSnapshot => call(&self.faults, "set the size of the store", || {
                use rewake_sys::error::Named;
                unnamed.file.set_len(record.store_bytes).named("ftruncate")
            })?,
            DiskKind::Reflink => {
                if !file::clone(&base.file, &unnamed.file, &self.faults)? {
                    let why = "its blocks cannot be shared with that directory";
                    return Err(DiskError::unusable(&base.identity.path, why));
                }
            }
            DiskKind::Copy => file::Copy {
                from: &base.file,
                size: base.size().0,
                to: &unnamed.file,
                shared: None,
                faults: &self.faults,
                deadline,
            }
            .run(&mut |_| {})?,
        }
        // An image that is written to while it is copied makes a disk of neither state.
        let after = Base::open(&base.identity.path, &self.faults)?;
        after.expect(&base.identity)?;
        steps.push(unnamed.step.clone());
        let made = unnamed.publish(self.new_files(), &self.faults)?;
        // Opened again by its name: `losetup` shows the name under which a file was opened.
        let store = file::open(&path, true, &self.faults)?;
        if dm_snapshot::uuid(&store, &path)? != dm_snapshot::uuid(&made, &path)? {
            return Err(DiskError::unusable(&path, "it was replaced at once"));
        }
        Ok(store)
    }

    /// Makes a store usable for a VM.
    #[expect(clippy::too_many_arguments, reason = "one step of two operations")]
    fn attached(
        &self,
        id: &SandboxId,
        dir: &Path,
        record: DiskRecord,
        base: &Base,
        store: &File,
        steps: &mut Vec<DiskStep>,
        deadline: Deadline,
    ) -> Result<Attached, DiskError> {
        let store_path = record.store(id, dir);
        let mapping = match record.kind {
            DiskKind::DmSnapshot => {
                Some(self.map(id, (store, &store_path), base, steps, deadline)?)
            }
            DiskKind::Reflink | DiskKind::Copy => None,
        };
        let path = mapping.as_ref().map_or(store_path, |it| it.path.clone());
        Ok(Attached {
            id: id.clone(),
            dir: dir.to_owned(),
            record,
            path,
            mapping,
        })
    }
}

/// A disk before it holds its lock and its steps.
struct Attached {
    id: SandboxId,
    dir: PathBuf,
    record: DiskRecord,
    path: PathBuf,
    mapping: Option<Mapping>,
}

impl Attached {
    fn locked(self, lock: Lock) -> Disk {
        Disk {
            id: self.id,
            dir: self.dir,
            record: self.record,
            path: self.path,
            mapping: self.mapping,
            steps: Vec::new(),
            lock,
        }
    }
}

/// Steps outlive the working directory.
fn absolute(dir: &Path) -> Result<PathBuf, DiskError> {
    std::path::absolute(dir).map_err(|error| DiskError::Call {
        step: format!("find {}", dir.display()),
        source: CallError::from_io("getcwd", &error),
    })
}
