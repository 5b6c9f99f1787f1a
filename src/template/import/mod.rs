//! A template from a snapshot directory that another tool made.
//!
//! Two kinds are known: what Cloud Hypervisor writes by itself (`config.json`, `state.json`,
//! `memory-ranges`), and the same with the `wrenn-snapshot.json` of a Wrenn host. The source
//! is only read. Whether the result can be restored is tried out, on paper, before it becomes
//! a template.

mod transfer;
mod wrenn;

use std::path::{Path, PathBuf};

use rewake_sys::error::Named;

use super::Template;
use super::check;
use super::error::{TemplateError, about, call};
use super::facts::HostFacts;
use super::manifest::{DiskPath, Kind, Lineage, ROOTFS_FILE, words};
use super::stage::{Origin, Stage};
use super::store::TemplateStore;
use crate::deadline::Deadline;
use crate::ids::{IfName, SandboxId, TemplateId};
use crate::memory::WorkingSet;
use crate::plan::{self, Circumstances, PlanError, RestoreInputs, RootDisk};
use crate::resource::disk::{BaseIdentity, DiskError, DiskPool};
use crate::snapshot::dir::{CONFIG_FILE, STATE_FILE};
use crate::snapshot::extents::{PunchError, Puncher};
use crate::snapshot::{MEMORY_FILE, MemoryFile, SnapshotDir, SnapshotLimits, ZONE_FILE};
use crate::units::Bytes;
use crate::vm_config::VmConfig;
use crate::vmm::api::Version;
use transfer::Carrier;
use wrenn::{META_ROOTFS, Meta};

pub use wrenn::MetaError;

/// How files come into a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transfer {
    /// As a clone that shares its blocks with the source, else as a copy with its holes.
    #[default]
    Auto,
    /// As a copy with its holes.
    Copy,
    /// Memory and disk as second names of the source's files, on the same file system. For a
    /// source that is never written to again: that would change the template.
    Link,
}

/// The image of the root disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ImportDisk {
    /// The `rootfs.ext4` beside a Wrenn host's snapshot, if there is one.
    #[default]
    Beside,
    /// This raw image, brought into the template.
    Adopted(PathBuf),
    /// This raw image, where it is. Nobody may change it as long as the template is there.
    InPlace(PathBuf),
}

/// How Cloud Hypervisor will find its disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PathStrategy {
    /// Under any path, by rewriting the configuration, where that is as good; else under the
    /// recorded one, where the sandbox directory is known.
    #[default]
    Auto,
    /// Under any path.
    Rewrite,
    /// Under the recorded path, beneath this directory; absent, the one that
    /// `wrenn-snapshot.json` names, or the disk's own.
    Recorded(Option<PathBuf>),
}

/// What is to be imported.
#[derive(Debug, Clone)]
pub struct ImportSpec {
    /// The template's name.
    pub name: TemplateId,
    /// The snapshot directory.
    pub source: PathBuf,
    /// The image of the root disk.
    pub disk: ImportDisk,
    /// The file that guest memory is in, where Cloud Hypervisor saved none because a zone was
    /// mapped from it.
    pub memory: Option<PathBuf>,
    /// How files come into the template.
    pub transfer: Transfer,
    /// How Cloud Hypervisor will find its disk.
    pub path: PathStrategy,
    /// Whether zeros in saved memory become holes.
    pub punch_zeros: bool,
    /// The version that wrote the snapshot; absent, it is guessed from the configuration.
    pub vmm: Option<Version>,
}

impl ImportSpec {
    /// The usual: files shared or copied, zeros punched, everything else found out.
    #[must_use]
    pub fn new(name: TemplateId, source: impl Into<PathBuf>) -> Self {
        Self {
            name,
            source: source.into(),
            disk: ImportDisk::default(),
            memory: None,
            transfer: Transfer::default(),
            path: PathStrategy::default(),
            punch_zeros: true,
            vmm: None,
        }
    }
}

/// How far an import has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportProgress {
    /// The file that is being brought.
    pub file: &'static str,
    /// Bytes of it that are done.
    pub done: Bytes,
    /// Bytes of it.
    pub total: Bytes,
}

/// Why a snapshot could not be imported. Nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The store, the source's files, or the snapshot itself.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// What a Wrenn host wrote beside it is refused.
    #[error(transparent)]
    Wrenn(#[from] MetaError),
    /// A Wrenn host recorded another machine than the one that was frozen.
    #[error("wrenn-snapshot.json says {recorded} {what}, the snapshot has {snapshot}")]
    Contradiction {
        /// What differs.
        what: &'static str,
        /// In `wrenn-snapshot.json`.
        recorded: u64,
        /// In the snapshot.
        snapshot: u64,
    },
    /// The guest has a disk, and its image is not here.
    #[error(
        "The guest's disk was {recorded}; give its image with --rootfs or --rootfs-in-place{hint}"
    )]
    NoDisk {
        /// The recorded path.
        recorded: PathBuf,
        /// What a Wrenn host says of it.
        hint: String,
    },
    /// An image was given for a guest without a disk.
    #[error("The guest has no disk that {image} could be")]
    NeedlessDisk {
        /// The image.
        image: PathBuf,
    },
    /// Guest memory was mapped from a file elsewhere.
    #[error("The guest's memory was mapped from {recorded}; give that file with --memory")]
    MemoryElsewhere {
        /// The recorded path.
        recorded: PathBuf,
    },
    /// A memory file was given for a snapshot that has its memory.
    #[error("The snapshot has its memory in memory-ranges; --memory is not needed")]
    NeedlessMemory,
    /// A VM has the image open.
    #[error("A VM has {path} open; stop it first")]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// The image cannot serve as one.
    #[error("The disk's image is refused")]
    Image(#[source] DiskError),
    /// Zeros could not be punched.
    #[error(transparent)]
    Punch(PunchError),
    /// It could not be restored.
    #[error("A sandbox could not be launched from it")]
    NotRestorable(#[source] PlanError),
}

impl ImportError {
    /// Whether a time limit passed.
    #[must_use]
    pub const fn is_timeout(&self) -> bool {
        matches!(self, Self::Template(error) if error.is_timeout())
    }
}

/// Imports a snapshot directory. Blocks for as long as copying its memory and its disk takes,
/// where they must be copied.
///
/// # Errors
/// [`ImportError`]; nothing is left then.
pub fn import(
    spec: &ImportSpec,
    store: &TemplateStore,
    progress: &mut dyn FnMut(ImportProgress),
    deadline: Deadline,
) -> Result<Template, ImportError> {
    if store.directory_of(&spec.name).exists() {
        let id = spec.name.clone();
        return Err(TemplateError::Occupied { id }.into());
    }
    let meta = Meta::read(&spec.source)?;
    let stage = store.stage()?;
    let mut import = Import {
        spec,
        store,
        stage: &stage,
        progress,
        deadline,
    };
    import.bring_snapshot()?;
    let snapshot = import.open()?;
    if let Some(meta) = &meta {
        agree(meta, &snapshot)?;
    }
    import.bring_working_set(&snapshot)?;
    let base = import.bring_disk(snapshot.config(), meta.as_ref())?;
    let disk_path = import.choose_path(&snapshot, meta.as_ref())?;
    if spec.punch_zeros && spec.transfer != Transfer::Link {
        import.punch()?;
    }
    let guessed = guess_version(snapshot.config());
    let origin = Origin {
        vmm: spec.vmm.or(guessed),
        vmm_build: match (spec.vmm, guessed) {
            (None, Some(version)) => format!("v{}, guessed from config.json", version.major),
            _ => String::new(),
        },
        base,
        disk_path,
        lineage: Lineage {
            origin: Some(words(&match &meta {
                Some(meta) => meta.origin(),
                None => format!("Cloud Hypervisor, {}", spec.source.display()),
            })),
            ..Lineage::default()
        },
        // Where it was frozen is not known; its processor is in the snapshot.
        ..Origin::new(Kind::Imported, HostFacts::default())
    };
    let manifest = stage.describe(&spec.name, origin)?;
    Ok(store.publish(stage, &manifest)?)
}

/// One import under way.
struct Import<'a> {
    spec: &'a ImportSpec,
    store: &'a TemplateStore,
    stage: &'a Stage,
    progress: &'a mut dyn FnMut(ImportProgress),
    deadline: Deadline,
}

impl Import<'_> {
    /// Configuration, state and memory.
    fn bring_snapshot(&mut self) -> Result<(), ImportError> {
        let source = &self.spec.source;
        for name in [CONFIG_FILE, STATE_FILE] {
            self.bring(&source.join(name), name, Transfer::Copy)?;
        }
        let transfer = self.spec.transfer;
        let saved = source.join(MEMORY_FILE);
        let zone = source.join(ZONE_FILE);
        let has = |path: &Path| check::length(path, self.store.faults());
        match (&self.spec.memory, has(&saved)?, has(&zone)?) {
            (None, Some(_), _) => self.bring(&saved, MEMORY_FILE, transfer),
            (Some(_), Some(_), _) => Err(ImportError::NeedlessMemory),
            (Some(file), None, _) => self.bring(file, ZONE_FILE, transfer),
            (None, None, Some(_)) => self.bring(&zone, ZONE_FILE, transfer),
            (None, None, None) => Ok(()),
        }
    }

    /// The list of pages that a guest needs first, where the source has one that is of this
    /// memory file.
    fn bring_working_set(&self, snapshot: &SnapshotDir) -> Result<(), ImportError> {
        let source = &self.spec.source;
        let directory = call(self.store.faults(), about("open", source), || {
            std::fs::File::open(source).named("open")
        })?;
        let length = snapshot.memory().map(MemoryFile::size).unwrap_or_default();
        let kept = match WorkingSet::load(directory) {
            Ok(Some(set)) if set.end() <= length => set.save(self.stage.path()),
            Ok(Some(_)) => {
                log::warn!("{}: its working set is of other memory", source.display());
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            log::warn!("{}: its working set is left out: {error}", source.display());
        }
        Ok(())
    }

    fn bring(
        &mut self,
        from: &Path,
        name: &'static str,
        transfer: Transfer,
    ) -> Result<(), ImportError> {
        let progress = &mut *self.progress;
        let mut carrier = Carrier {
            transfer,
            faults: self.store.faults(),
            progress: &mut |done, total| {
                progress(ImportProgress {
                    file: name,
                    done,
                    total,
                });
            },
            deadline: self.deadline,
        };
        carrier.bring(from, &self.stage.path().join(name))
    }

    /// Opens and checks what was brought.
    fn open(&self) -> Result<SnapshotDir, ImportError> {
        let opened = SnapshotDir::open(self.stage.path(), &SnapshotLimits::default());
        let snapshot = opened.map_err(|source| TemplateError::Snapshot {
            path: self.spec.source.clone(),
            source,
        })?;
        if snapshot.memory().is_none() {
            let zones = snapshot.config().memory.zones.iter().flatten();
            let recorded = zones.filter_map(|zone| zone.file.clone()).next();
            return Err(match recorded {
                Some(recorded) => ImportError::MemoryElsewhere { recorded },
                None => TemplateError::NoMemory {
                    path: self.spec.source.clone(),
                }
                .into(),
            });
        }
        Ok(snapshot)
    }

    /// The disk's image; the result is an image that stays where it is.
    fn bring_disk(
        &mut self,
        config: &VmConfig,
        meta: Option<&Meta>,
    ) -> Result<Option<BaseIdentity>, ImportError> {
        let recorded = config.disks.iter().flatten().next();
        let recorded = recorded.map(|disk| disk.path.clone().unwrap_or_default());
        let beside = self.spec.source.join(META_ROOTFS);
        let (image, adopted) = match &self.spec.disk {
            ImportDisk::Adopted(image) => (image.clone(), true),
            ImportDisk::InPlace(image) => (image.clone(), false),
            ImportDisk::Beside => {
                let there = check::length(&beside, self.store.faults())?.is_some();
                match recorded {
                    None => return Ok(None),
                    Some(_) if meta.is_some() && there => (beside, true),
                    Some(recorded) => {
                        let hint = hint(meta);
                        return Err(ImportError::NoDisk { recorded, hint });
                    }
                }
            }
        };
        if recorded.is_none() {
            return Err(ImportError::NeedlessDisk { image });
        }
        let image = call(self.store.faults(), about("find", &image), || {
            image.canonicalize().named("realpath")
        })?;
        transfer::refuse_open_image(&image, self.store.faults())?;
        let identity = DiskPool::identify(&image).map_err(ImportError::Image)?;
        if adopted {
            self.bring(&image, ROOTFS_FILE, self.spec.transfer)?;
            return Ok(None);
        }
        Ok(Some(identity))
    }

    /// Settles on how CH will find its disk, by working out both plans.
    fn choose_path(
        &self,
        snapshot: &SnapshotDir,
        meta: Option<&Meta>,
    ) -> Result<DiskPath, ImportError> {
        let disks = snapshot.config().disks.as_deref().unwrap_or_default();
        let Some(recorded) = disks.first().and_then(|disk| disk.path.as_deref()) else {
            self.try_out(snapshot, RootDisk::AsRecorded)?;
            return Ok(DiskPath::Rewritten);
        };
        let told = meta.and_then(|meta| meta.sandbox_dir.clone());
        let at_recorded = |sandbox_dir: PathBuf| {
            let device = PathBuf::from("/dev/null");
            let disk = RootDisk::AtRecordedPath {
                device,
                sandbox_dir: sandbox_dir.clone(),
            };
            self.try_out(snapshot, disk)?;
            Ok(DiskPath::Recorded { sandbox_dir })
        };
        let rewritten = || {
            let disk = RootDisk::At("/dev/null".into());
            self.try_out(snapshot, disk).map(|()| DiskPath::Rewritten)
        };
        match &self.spec.path {
            PathStrategy::Rewrite => rewritten(),
            PathStrategy::Recorded(given) => {
                let own = recorded.parent().map(Path::to_owned);
                at_recorded(given.clone().or(told).or(own).unwrap_or_default())
            }
            PathStrategy::Auto => match (rewritten(), told) {
                (Err(error), Some(dir)) => {
                    log::info!("{}: {error}", self.spec.name);
                    at_recorded(dir).map_err(|_: ImportError| error)
                }
                (outcome, _) => outcome,
            },
        }
    }

    /// Plans a restore without making anything.
    fn try_out(&self, snapshot: &SnapshotDir, disk: RootDisk) -> Result<(), ImportError> {
        let mut inputs = RestoreInputs::new(SandboxId::random(), self.stage.path());
        inputs.disk = disk;
        if snapshot.config().net.iter().flatten().next().is_some() {
            inputs.tap = IfName::new("tap0").ok();
        }
        let around = Circumstances {
            vsock_socket: "/run/rewake/vsock.sock".into(),
            memory_path: "/proc/self/fd/5".into(),
            ..Circumstances::default()
        };
        let planned = plan::plan(&inputs, snapshot, &around);
        planned.map(drop).map_err(ImportError::NotRestorable)
    }

    /// Gives memory that was saved densely its holes. Where the file system knows none, it
    /// stays as it is.
    fn punch(&mut self) -> Result<(), ImportError> {
        let puncher = Puncher::open(self.stage.path(), self.store.faults());
        let Some(mut puncher) = puncher.map_err(ImportError::Punch)? else {
            return Ok(());
        };
        match puncher.run(|| !self.deadline.has_passed()) {
            Ok(_) => {
                log::info!("{}: {} of zeros freed", self.spec.name, puncher.freed());
                Ok(())
            }
            Err(error) if error.is_unsupported() => Ok(()),
            Err(error) => Err(ImportError::Punch(error)),
        }
    }
}

/// A Wrenn host's record and the snapshot must be about one machine.
fn agree(meta: &Meta, snapshot: &SnapshotDir) -> Result<(), ImportError> {
    let vcpus = snapshot.state().vcpus() as u64;
    let memory = snapshot.state().memory().ram().0 >> 20;
    for (what, recorded, found) in [
        ("vCPUs", meta.vcpus, vcpus),
        ("MiB of memory", meta.memory_mb, memory),
    ] {
        // Zero is what Go writes where nothing was set.
        if let Some(recorded) = recorded.filter(|told| *told != 0 && *told != found) {
            return Err(ImportError::Contradiction {
                what,
                recorded,
                snapshot: found,
            });
        }
    }
    Ok(())
}

/// Which files a paused sandbox's disk consists of, for whoever has to make an image of it.
fn hint(meta: Option<&Meta>) -> String {
    match meta.and_then(|meta| Some((meta.base_template.as_ref()?, meta.cow_path.as_ref()?))) {
        Some((base, cow)) => format!(
            " (it is {} with the changes in {}: flatten them first)",
            base.display(),
            cow.display()
        ),
        None => String::new(),
    }
}

/// The least version that writes such a configuration: since v53 it names a CPU profile,
/// since v52 core scheduling. Earlier ones cannot be told apart.
fn guess_version(config: &VmConfig) -> Option<Version> {
    let cpus = &config.cpus;
    match (cpus.profile, cpus.core_scheduling) {
        (Some(_), _) => Some(Version::V53),
        (None, Some(_)) => Some(Version::V52),
        (None, None) => None,
    }
}
