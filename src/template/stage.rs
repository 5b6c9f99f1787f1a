//! Where a template grows until it is whole.
//!
//! A staging directory lies beside the templates under a name that no template can have, and
//! is locked (`flock`) for as long as its maker lives. So whoever finds one that is not
//! locked knows that nobody will finish it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use rewake_sys::error::Named;
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

use super::cpu::Cpu;
use super::digest::Sha256Hex;
use super::error::{TemplateError, about, call};
use super::facts::HostFacts;
use super::journal::{DISK_DIR, JOURNAL_FILE, StageLog, append};
use super::lock::{identity_of, lock, open_directory};
use super::manifest::{
    AgentRecord, DiskPath, FileRecord, HostRecord, Kind, Lineage, MANIFEST_FILE, Manifest,
    MemoryImage, MemoryRecord, ROOTFS_FILE, TemplateDisk, VmmRecord, words,
};
use super::store::{TemplateStore, sync_directory};
use super::{Template, check};
use crate::fault::Faults;
use crate::ids::TemplateId;
use crate::memory::WORKING_SET_FILE;
use crate::resource::disk::BaseIdentity;
use crate::resource::ledger::{Step, StepLog};
use crate::snapshot::dir::{CONFIG_FILE, STATE_FILE};
use crate::snapshot::{MEMORY_FILE, SnapshotDir, SnapshotLimits, ZONE_FILE};
use crate::vmm::api::Version;

/// Begins the names of staging directories.
pub(super) const STAGE_PREFIX: &str = ".stage-";
/// Begins the names of templates that are being removed.
pub(super) const GONE_PREFIX: &str = ".gone-";
/// What a template may consist of.
const FILES: [&str; 7] = [
    MANIFEST_FILE,
    CONFIG_FILE,
    STATE_FILE,
    MEMORY_FILE,
    ZONE_FILE,
    ROOTFS_FILE,
    WORKING_SET_FILE,
];

/// What the files of a snapshot do not tell of a template.
#[derive(Debug, Clone)]
pub struct Origin {
    /// How it came to be.
    pub kind: Kind,
    /// The version of the Cloud Hypervisor that froze it, where that is known.
    pub vmm: Option<Version>,
    /// The same with the suffixes of its build.
    pub vmm_build: String,
    /// The machine that it was frozen on. The processor counts only where the snapshot does
    /// not name one.
    pub host: HostFacts,
    /// The kernel that the guest booted.
    pub guest_kernel: Option<FileRecord>,
    /// An image elsewhere that its disk stands on, where the staging directory has none.
    pub base: Option<BaseIdentity>,
    /// How CH must find its disk.
    pub disk_path: DiskPath,
    /// Who answered in the guest.
    pub agent: Option<AgentRecord>,
    /// What it was made from.
    pub lineage: Lineage,
    /// Whether all of guest memory was really there.
    pub materialised: bool,
}

impl Origin {
    /// An origin of which nothing is known but the machine.
    #[must_use]
    pub fn new(kind: Kind, host: HostFacts) -> Self {
        Self {
            kind,
            vmm: None,
            vmm_build: String::new(),
            host,
            guest_kernel: None,
            base: None,
            disk_path: DiskPath::default(),
            agent: None,
            lineage: Lineage::default(),
            materialised: true,
        }
    }
}

/// A directory in which a template is being made. Dropping it removes it with all that is in
/// it.
#[derive(Debug)]
#[must_use = "dropping it removes it"]
pub struct Stage {
    path: PathBuf,
    /// Locked.
    directory: OwnedFd,
    identity: (u64, u64),
    /// Where it may have got while it was published.
    target: Option<PathBuf>,
    /// It is a sweep's now.
    left: bool,
    faults: Faults,
}

impl Stage {
    pub(super) fn make(templates: &Path, faults: &Faults) -> Result<Self, TemplateError> {
        loop {
            let random = uuid::Uuid::new_v4().simple().to_string();
            let path = templates.join(format!("{STAGE_PREFIX}{}", &random[..12]));
            let made = call(faults, about("make", &path), || {
                let mut builder = std::fs::DirBuilder::new();
                builder.mode(0o700).create(&path).named("mkdir")
            });
            if let Err(error) = made {
                // The name is new: what is there was made just now, and reported as failed.
                let _ = std::fs::remove_dir(&path);
                return Err(error);
            }
            let held = open_directory(&path, faults).and_then(|(directory, identity)| {
                let locked = lock(&directory, &path, faults)?;
                Ok((directory, identity, locked))
            });
            match held {
                Ok((directory, identity, locked)) => {
                    let stage = Self {
                        path,
                        directory,
                        identity,
                        target: None,
                        left: false,
                        faults: faults.clone(),
                    };
                    // A sweep may have come between making it and locking it.
                    if locked && identity_of(&stage.path) == Some(identity) {
                        return Ok(stage);
                    }
                }
                Err(error) => {
                    let _ = std::fs::remove_dir(&path);
                    return Err(error);
                }
            }
        }
    }

    /// Where it is: the directory that CH writes its snapshot to.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the memory file of a zone belongs.
    #[must_use]
    pub fn memory(&self) -> PathBuf {
        self.path.join(ZONE_FILE)
    }

    /// Where the image of the root disk belongs.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.path.join(ROOTFS_FILE)
    }

    /// Notes what is about to be made in the kernel, so that a sweep can undo it where the
    /// maker dies. It is no part of the template.
    ///
    /// # Errors
    /// [`TemplateError::Call`].
    pub fn note(&self, step: &Step) -> Result<(), TemplateError> {
        let path = self.path.join(JOURNAL_FILE);
        call(&self.faults, about("write", &path), || {
            append(&path, step).named("write")
        })
    }

    /// The same for the steps of a ledger ([`Ledger::logged`]).
    #[must_use]
    pub fn log(&self) -> Arc<dyn StepLog> {
        Arc::new(StageLog {
            path: self.path.join(JOURNAL_FILE),
        })
    }

    /// Where a disk for the making may be kept: a sweep looks for one there.
    #[must_use]
    pub fn disk_dir(&self) -> PathBuf {
        self.path.join(DISK_DIR)
    }

    /// Opens and checks the snapshot in here, and describes it as the template `name`.
    ///
    /// Blocks for as long as the small files take to read; memory is not read.
    ///
    /// # Errors
    /// [`TemplateError::Snapshot`], and those of the calls.
    pub fn describe(&self, name: &TemplateId, origin: Origin) -> Result<Manifest, TemplateError> {
        let snapshot = SnapshotDir::open(&self.path, &SnapshotLimits::default());
        let snapshot = snapshot.map_err(|source| TemplateError::Snapshot {
            path: self.path.clone(),
            source,
        })?;
        let config_sha256 = check::checksum(&self.path.join(CONFIG_FILE), &self.faults)?;
        let state = snapshot.state();
        let Some(memory) = snapshot.memory() else {
            return Err(TemplateError::NoMemory {
                path: self.path.clone(),
            });
        };
        let disk = match check::length(&self.rootfs(), &self.faults)? {
            Some(bytes) => Some(TemplateDisk::Own { bytes }),
            None => origin.base.map(TemplateDisk::Base),
        };
        let frozen_on = state.cpuid().ok().and_then(|table| Cpu::of_table(&table));
        Ok(Manifest {
            format: Manifest::FORMAT,
            name: name.clone(),
            created: Timestamp::now(),
            kind: origin.kind,
            vmm: VmmRecord {
                version: origin.vmm,
                build: words(&origin.vmm_build),
            },
            host: HostRecord {
                kernel: words(&origin.host.kernel),
                cpu: frozen_on.or(origin.host.cpu),
            },
            guest_kernel: origin.guest_kernel,
            vcpus: u32::try_from(state.vcpus()).unwrap_or(u32::MAX),
            memory: MemoryRecord {
                bytes: state.memory().ram().0,
                image: if memory.name() == ZONE_FILE {
                    MemoryImage::Zone
                } else {
                    MemoryImage::Ranges
                },
                length: memory.size().0,
                layout_sha256: Sha256Hex::of_layout(snapshot.config(), state.memory()),
                materialised: origin.materialised,
            },
            config_sha256,
            state_sha256: Sha256Hex::of_bytes(state.as_bytes()),
            disk,
            disk_path: origin.disk_path,
            agent: origin.agent,
            lineage: origin.lineage,
        })
    }

    /// Removes it with all that is in it.
    ///
    /// # Errors
    /// What removing says; a later sweep tries again.
    pub fn discard(mut self) -> Result<(), TemplateError> {
        self.clear()
    }

    /// Lets it lie for a sweep, with its journal: not everything could be undone that it
    /// tells of.
    pub(super) fn leave(mut self) {
        self.left = true;
    }

    fn clear(&mut self) -> Result<(), TemplateError> {
        if self.left {
            return Ok(());
        }
        if let Some(target) = self.target.take()
            && identity_of(&target) == Some(self.identity)
        {
            // It was published, but that was reported as failed.
            let back =
                rustix::fs::renameat_with(CWD, &target, CWD, &self.path, RenameFlags::NOREPLACE);
            call(&Faults::NONE, about("take back", &target), || {
                back.named("renameat2")
            })?;
        }
        if identity_of(&self.path) != Some(self.identity) {
            return Ok(());
        }
        call(&Faults::NONE, about("remove", &self.path), || {
            std::fs::remove_dir_all(&self.path).named("unlink")
        })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            log::warn!("Left over: {}: {error}", self.path.display());
        }
    }
}

impl TemplateStore {
    /// Makes a staging directory.
    ///
    /// # Errors
    /// [`TemplateError::Call`]; nothing is left then.
    pub fn stage(&self) -> Result<Stage, TemplateError> {
        Stage::make(self.templates(), self.faults())
    }

    /// Makes a template of what has been staged: writes the manifest, brings every file to
    /// the disk, and gives the directory its name, in one step. An existing template is never
    /// replaced.
    ///
    /// Blocks for as long as writing memory and disk to the storage takes.
    ///
    /// # Errors
    /// [`TemplateError::Occupied`], [`TemplateError::Stray`], [`TemplateError::Damaged`]
    /// where the manifest does not fit the files, else what the calls say. Nothing is left of
    /// the stage then, under either name.
    pub fn publish(
        &self,
        mut stage: Stage,
        manifest: &Manifest,
    ) -> Result<Template, TemplateError> {
        let target = self.directory_of(&manifest.name);
        if target.exists() {
            return Err(TemplateError::Occupied {
                id: manifest.name.clone(),
            });
        }
        let files = stage.files()?;
        let staged = Template::new(stage.path.clone(), manifest.clone());
        staged.check_lengths(self.faults())?;
        stage.write_manifest(manifest)?;
        for file in files.iter().map(|name| stage.path.join(name)) {
            call(self.faults(), about("write to the disk", &file), || {
                let file = File::open(&file).named("open")?;
                rustix::fs::fsync(&file).named("fsync")
            })?;
        }
        sync_directory(&stage.path, self.faults())?;
        stage.target = Some(target.clone());
        let renamed = call(self.faults(), about("name", &target), || {
            rustix::fs::renameat_with(CWD, &stage.path, CWD, &target, RenameFlags::NOREPLACE)
                .named("renameat2")
        });
        match renamed {
            Err(error) if error.errno() == Some(Errno::EXIST) => {
                return Err(TemplateError::Occupied {
                    id: manifest.name.clone(),
                });
            }
            other => other?,
        }
        sync_directory(self.templates(), self.faults())?;
        // From here on it is nobody's to take back. Unlocked by hand: a process that is just
        // being forked may have a copy of the descriptor.
        stage.target = None;
        let _ = rustix::fs::flock(&stage.directory, FlockOperation::Unlock);
        log::info!("Template {}: published", manifest.name);
        Ok(Template::new(target, manifest.clone()))
    }
}

impl Stage {
    /// The files of the template to be, without its manifest. The journal goes.
    fn files(&self) -> Result<Vec<&'static str>, TemplateError> {
        let journal = self.path.join(JOURNAL_FILE);
        match std::fs::remove_file(&journal) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return call(&Faults::NONE, about("remove", &journal), || {
                    Err(error).named("unlink")
                });
            }
            _ => {}
        }
        let names = call(&self.faults, about("list", &self.path), || {
            let entries = std::fs::read_dir(&self.path).named("open")?;
            let names = entries.map(|entry| entry.map(|it| it.file_name()));
            names.collect::<Result<Vec<_>, _>>().named("getdents64")
        })?;
        let mut files = Vec::new();
        for name in names {
            let known = FILES.iter().find(|file| name == **file);
            let path = self.path.join(&name);
            let regular = std::fs::symlink_metadata(&path).is_ok_and(|found| found.is_file());
            match known {
                Some(file) if regular && *file != MANIFEST_FILE => files.push(*file),
                _ => return Err(TemplateError::Stray { path }),
            }
        }
        Ok(files)
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<(), TemplateError> {
        let path = self.path.join(MANIFEST_FILE);
        let bytes = manifest.to_bytes();
        let bytes = bytes.map_err(|source| TemplateError::Manifest {
            path: path.clone(),
            source,
        })?;
        call(&self.faults, about("write", &path), || {
            let mut file = File::create_new(&path).named("open")?;
            file.write_all(&bytes).named("write")?;
            rustix::fs::fsync(&file).named("fsync")
        })
    }
}
