//! Templates: frozen guests that sandboxes are launched from.
//!
//! ```text
//!   ROOT/templates/NAME/rewake.json      what it is: the manifest
//!                       config.json      as Cloud Hypervisor wrote them
//!                       state.json
//!                       memory           guest memory, mapped from a file; or
//!                       memory-ranges    as Cloud Hypervisor wrote it
//!                       rootfs.raw       the root disk, shared by all clones
//!                       working-set      which pages its clones need first, once recorded
//! ```
//!
//! A template never changes, but for the working set, which is a hint: it may come later, be
//! replaced, or be missing or damaged, and only costs time then. It is made in a staging directory beside the others and gets its
//! name when all of it is on the disk, in one step that never replaces anything; it loses its
//! name in one step, too, and only when nobody uses it. So a crash leaves the whole template
//! or none, and [`TemplateStore::sweep`] clears away the rest.

mod build;
mod check;
mod cpu;
mod digest;
mod error;
mod facts;
mod import;
mod journal;
mod lock;
mod manifest;
mod stage;
mod store;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rewake_sys::error::Named;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::fault::Faults;
use crate::ids::TemplateId;
use crate::memory::{WorkingSet, WorkingSetError};
use crate::plan::RootDisk;

pub use build::{
    BuildCause, BuildError, BuildLeftover, BuildNetwork, BuildProgress, BuildSpec, BuildStage,
    Workshop, build,
};
pub use cpu::{Cpu, FeatureWord, OtherCpu, Register};
pub use digest::{DigestError, Sha256Hex};
pub use error::{Damage, Incompatible, TemplateError, Users};
pub use facts::HostFacts;
pub use import::{
    ImportDisk, ImportError, ImportProgress, ImportSpec, MetaError, PathStrategy, Transfer, import,
};
pub use manifest::{
    AgentRecord, DiskPath, FileRecord, HostRecord, Kind, Lineage, MANIFEST_FILE, Manifest,
    ManifestError, MemoryImage, MemoryRecord, ROOTFS_FILE, TemplateDisk, VmmRecord,
};
pub use stage::{Origin, Stage};
pub use store::{Swept, TemplateStore};

/// A template, as its manifest describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    dir: PathBuf,
    manifest: Manifest,
}

/// Keeps a template from being removed, until it is dropped.
#[derive(Debug)]
#[must_use = "a dropped hold holds nothing"]
pub struct Hold {
    /// The template's directory, with a shared lock.
    directory: OwnedFd,
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Closing it is not enough while a process that was just forked has a copy.
        let _ = rustix::fs::flock(&self.directory, FlockOperation::Unlock);
    }
}

impl Template {
    pub(crate) const fn new(dir: PathBuf, manifest: Manifest) -> Self {
        Self { dir, manifest }
    }

    /// Its name.
    #[must_use]
    pub const fn id(&self) -> &TemplateId {
        &self.manifest.name
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is known of it.
    #[must_use]
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The snapshot directory: its own.
    #[must_use]
    pub fn snapshot_dir(&self) -> &Path {
        &self.dir
    }

    /// The file that holds guest memory.
    #[must_use]
    pub fn memory_image(&self) -> PathBuf {
        self.dir.join(self.manifest.memory.image.file_name())
    }

    /// The pages that its clones need first; `None` where nobody has recorded them.
    ///
    /// # Errors
    /// [`WorkingSetError`]. A clone is launched without it then.
    pub fn working_set(&self) -> Result<Option<WorkingSet>, WorkingSetError> {
        let directory = std::fs::File::open(&self.dir);
        let directory = directory.map_err(|source| WorkingSetError::File {
            path: self.dir.clone(),
            call: "open",
            source,
        })?;
        WorkingSet::load(directory)
    }

    /// The image that disks of its clones stand on; `None` where the guest has no disk.
    #[must_use]
    pub fn disk(&self) -> Option<PathBuf> {
        match self.manifest.disk.as_ref()? {
            TemplateDisk::Own { .. } => Some(self.dir.join(ROOTFS_FILE)),
            TemplateDisk::Base(base) => Some(base.path.clone()),
        }
    }

    /// How a restore is told of a clone's disk: under a path of its own, or under the
    /// recorded one where the template demands that. `None` is for a guest without disk.
    #[must_use]
    pub fn root_disk(&self, device: Option<PathBuf>) -> RootDisk {
        match (device, &self.manifest.disk_path) {
            (None, _) => RootDisk::AsRecorded,
            (Some(device), DiskPath::Rewritten) => RootDisk::At(device),
            (Some(device), DiskPath::Recorded { sandbox_dir }) => RootDisk::AtRecordedPath {
                device,
                sandbox_dir: sandbox_dir.clone(),
            },
        }
    }

    /// Keeps it from being removed while a sandbox is launched from it: from before its disk
    /// is made until the disk is on record and its memory is mapped, which keep it then.
    ///
    /// # Errors
    /// [`TemplateError::Missing`] where it is being removed, or was.
    pub fn hold(&self) -> Result<Hold, TemplateError> {
        let missing = || TemplateError::Missing {
            id: self.id().clone(),
        };
        let (directory, identity) = match lock::open_directory(&self.dir, &Faults::NONE) {
            Err(error) if error.errno() == Some(Errno::NOENT) => return Err(missing()),
            other => other?,
        };
        let locked = error::call(&Faults::NONE, error::about("lock", &self.dir), || {
            rustix::fs::flock(&directory, FlockOperation::NonBlockingLockShared).named("flock")
        });
        match locked {
            Err(TemplateError::Call { source, .. }) if source.is_busy() => return Err(missing()),
            other => other?,
        }
        if lock::identity_of(&self.dir) != Some(identity) {
            return Err(missing());
        }
        Ok(Hold { directory })
    }
}
