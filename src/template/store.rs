//! The directory of templates.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rewake_sys::error::Named;
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use super::Template;
use super::error::{TemplateError, Users, about, call};
use super::manifest::{MANIFEST_FILE, Manifest, ROOTFS_FILE};
use super::stage::{GONE_PREFIX, STAGE_PREFIX};
use super::{journal, lock};
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::ids::TemplateId;
use crate::resource::disk::{DiskConfig, DiskError, DiskPool, DiskRecord, DiskStock};
use crate::resource::ledger::Leftover;
use crate::snapshot::{self, MEMORY_FILE, Reserved, ZONE_FILE};

/// The name of the directory of templates under the root.
const TEMPLATES: &str = "templates";
/// The name of the directory of sandboxes there.
const SANDBOXES: &str = "sandboxes";
/// The name of the directory of disks in a sandbox's.
const DISKS: &str = "disk";
/// The files that hold guest memory: a template has one of them.
const IMAGES: [&str; 2] = [ZONE_FILE, MEMORY_FILE];
/// Most of `/proc/locks` that is read.
const LOCKS_MAX: u64 = 4 << 20;
/// Records of disks are small; what is larger is none.
const DISK_RECORD_MAX: u64 = 64 << 10;

/// All templates under one root. Shared by threads; several processes may each have one.
#[derive(Debug)]
pub struct TemplateStore {
    templates: PathBuf,
    sandboxes: PathBuf,
    stock: PathBuf,
    faults: Faults,
}

/// A staging directory that its maker left behind, and what became of it.
#[derive(Debug)]
pub struct Swept {
    /// The directory.
    pub path: PathBuf,
    /// What of it could not be undone; then the directory is still there.
    pub leftovers: Vec<Leftover>,
}

impl TemplateStore {
    /// Opens `ROOT/templates`, and makes it where it is missing. What dead makers left there
    /// is cleared away by [`TemplateStore::sweep`], not here.
    ///
    /// # Errors
    /// [`TemplateError::Call`].
    pub fn open(root: &Path, faults: Faults) -> Result<Self, TemplateError> {
        let root = call(&Faults::NONE, about("find", root), || {
            std::path::absolute(root).named("getcwd")
        })?;
        let templates = root.join(TEMPLATES);
        call(&faults, about("make", &templates), || {
            let mut builder = std::fs::DirBuilder::new();
            let builder = builder.recursive(true).mode(0o700);
            builder.create(&templates).named("mkdir")
        })?;
        Ok(Self {
            templates,
            sandboxes: root.join(SANDBOXES),
            stock: DiskStock::home_under(&root),
            faults,
        })
    }

    /// The names of all templates, in their order. Whether each can be read shows
    /// [`TemplateStore::get`].
    ///
    /// # Errors
    /// [`TemplateError::Call`].
    pub fn list(&self) -> Result<Vec<TemplateId>, TemplateError> {
        let names = self.entries()?;
        // Names of other things cannot be those of templates.
        let ids = names.iter().filter_map(|name| TemplateId::new(name).ok());
        let mut ids: Vec<TemplateId> = ids.filter(|id| self.directory_of(id).is_dir()).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// Reads a template's manifest.
    ///
    /// # Errors
    /// [`TemplateError::Missing`], [`TemplateError::Manifest`], [`TemplateError::OtherName`],
    /// else what the calls say.
    pub fn get(&self, id: &TemplateId) -> Result<Template, TemplateError> {
        let directory = self.directory_of(id);
        let path = directory.join(MANIFEST_FILE);
        let read = call(&self.faults, about("read", &path), || {
            let file = File::open(&path).named("open")?;
            let mut bytes = Vec::new();
            let limit = Manifest::LIMITS.bytes as u64 + 1;
            file.take(limit).read_to_end(&mut bytes).named("read")?;
            Ok(bytes)
        });
        let bytes = match read {
            Err(error) if error.errno() == Some(Errno::NOENT) && !directory.exists() => {
                return Err(TemplateError::Missing { id: id.clone() });
            }
            other => other?,
        };
        let manifest = match Manifest::parse(&bytes) {
            Ok(manifest) => manifest,
            Err(source) => return Err(TemplateError::Manifest { path, source }),
        };
        if manifest.name != *id {
            let name = manifest.name;
            return Err(TemplateError::OtherName { path, name });
        }
        Ok(Template::new(directory, manifest))
    }

    /// Clears away what dead makers and removers left: first what they had in the kernel, as
    /// far as they had noted it, then their directories. What is locked is left alone.
    ///
    /// # Errors
    /// [`TemplateError::Call`] where the directory cannot be listed. One entry that fails is
    /// logged, and does not keep the others from being cleared.
    pub fn sweep(&self) -> Result<Vec<Swept>, TemplateError> {
        let mut swept = Vec::new();
        for name in self.entries()? {
            if !name.starts_with(STAGE_PREFIX) && !name.starts_with(GONE_PREFIX) {
                continue;
            }
            let path = self.templates.join(name);
            match journal::sweep_one(&path, &self.faults) {
                Ok(Some(leftovers)) => swept.push(Swept { path, leftovers }),
                Ok(None) => {}
                Err(error) => log::warn!("{error}"),
            }
        }
        Ok(swept)
    }

    /// Who uses a template: VMs that have its memory mapped, as far as `/proc/locks` shows
    /// them, and disks that stand on its image, those of paused sandboxes too.
    ///
    /// For people: [`TemplateStore::remove`] looks for itself.
    ///
    /// # Errors
    /// [`TemplateError::Disks`].
    pub fn users(&self, id: &TemplateId) -> Result<Users, TemplateError> {
        let directory = self.directory_of(id);
        Ok(Users {
            vms: lockers(&directory),
            disks: self.disks_on(&directory.join(ROOTFS_FILE))?,
            launching: false,
        })
    }

    /// Removes a template that nobody uses. It vanishes under its name in one step; its files
    /// are deleted after that, and a crash meanwhile leaves them to a sweep.
    ///
    /// # Errors
    /// [`TemplateError::Missing`], [`TemplateError::Busy`], [`TemplateError::Timeout`], else
    /// what the calls say: the template is whole then, or gone from the list.
    pub fn remove(&self, id: &TemplateId, deadline: Deadline) -> Result<(), TemplateError> {
        let path = self.directory_of(id);
        let busy = |by| TemplateError::Busy { id: id.clone(), by };
        let (directory, identity) = match lock::open_directory(&path, &self.faults) {
            Err(error) if error.errno() == Some(Errno::NOENT) => {
                return Err(TemplateError::Missing { id: id.clone() });
            }
            other => other?,
        };
        // Against launches, which hold it until their disks are on record.
        if !lock::lock(&directory, &path, &self.faults)? {
            return Err(busy(Users {
                launching: true,
                ..Users::default()
            }));
        }
        let Some(reserved) = self.reserve_memory(&path)? else {
            let disks = self.disks_on(&path.join(ROOTFS_FILE))?;
            return Err(busy(Users {
                vms: lockers(&path).max(1),
                disks,
                launching: false,
            }));
        };
        let disks = self.disks_on(&path.join(ROOTFS_FILE))?;
        if !disks.is_empty() {
            return Err(busy(Users {
                disks,
                ..Users::default()
            }));
        }
        if deadline.has_passed() {
            let step = "remove the template";
            return Err(TemplateError::Timeout { step });
        }
        let random = uuid::Uuid::new_v4().simple().to_string();
        let gone = self
            .templates
            .join(format!("{GONE_PREFIX}{}", &random[..12]));
        self.move_aside(&path, &gone, identity)?;
        drop(reserved);
        call(&self.faults, about("remove", &gone), || {
            std::fs::remove_dir_all(&gone).named("unlink")
        })?;
        drop(directory);
        log::info!("Template {id}: removed");
        Ok(())
    }

    /// Renames a template out of sight. Where that fails, it is under its name again.
    fn move_aside(&self, path: &Path, gone: &Path, ours: (u64, u64)) -> Result<(), TemplateError> {
        let rename = |from: &Path, to: &Path| {
            rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).named("renameat2")
        };
        let moved = call(&self.faults, about("move aside", path), || {
            rename(path, gone)
        })
        .and_then(|()| sync_directory(&self.templates, &self.faults));
        if moved.is_err() && lock::identity_of(gone) == Some(ours) {
            call(&Faults::NONE, about("take back", path), || {
                rename(gone, path)
            })?;
        }
        moved
    }

    /// Keeps everybody from mapping the template's memory; `None` where a VM has it mapped.
    fn reserve_memory(&self, directory: &Path) -> Result<Option<Reserved>, TemplateError> {
        let step = format!("reserve the memory of {}", directory.display());
        match call(&self.faults, step, || Ok(snapshot::reserve(directory)))? {
            Err(error) if error.is_busy() => Ok(None),
            Err(error) => Err(TemplateError::Memory(error)),
            Ok(reserved) => Ok(Some(reserved)),
        }
    }

    /// The sandboxes whose disks stand on an image: attached ones as the kernel knows them,
    /// all others by their records.
    fn disks_on(&self, image: &Path) -> Result<Vec<String>, TemplateError> {
        let Some((_, inode)) = lock::identity_of(image) else {
            return Ok(Vec::new());
        };
        let pool = DiskPool::open(DiskConfig::default(), Faults::NONE);
        let mut found = match pool.sharers_of(image) {
            // What cannot be a base image is none.
            Err(DiskError::Unusable { .. }) => return Ok(Vec::new()),
            other => other.map_err(|source| TemplateError::Disks {
                image: image.to_owned(),
                source,
            })?,
        };
        let Ok(sandboxes) = std::fs::read_dir(&self.sandboxes) else {
            return Ok(found);
        };
        for sandbox in sandboxes.flatten() {
            let Ok(disks) = std::fs::read_dir(sandbox.path().join(DISKS)) else {
                continue;
            };
            for record in disks.flatten().map(|entry| entry.path()) {
                let Some(base) = base_of(&record) else {
                    continue;
                };
                // Moved with its root, it is the same image under another path.
                if base.inode == inode && (base.path == image || !base.path.exists()) {
                    let owner = record.file_stem().unwrap_or_default();
                    found.push(owner.to_string_lossy().into_owned());
                }
            }
        }
        // Disks that are kept ready are nobody's yet: whoever keeps them sees that the image
        // is gone, and removes them.
        let ready = DiskStock::ids(&self.stock);
        found.retain(|name| !ready.iter().any(|id| id.as_str() == name));
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    pub(super) fn templates(&self) -> &Path {
        &self.templates
    }

    pub(super) const fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Where a template of this name is, or would be.
    pub(super) fn directory_of(&self, id: &TemplateId) -> PathBuf {
        self.templates.join(id.as_str())
    }

    fn entries(&self) -> Result<Vec<String>, TemplateError> {
        let names = call(&self.faults, about("list", &self.templates), || {
            let entries = std::fs::read_dir(&self.templates).named("open")?;
            let names = entries.map(|entry| entry.map(|it| it.file_name()));
            names.collect::<Result<Vec<_>, _>>().named("getdents64")
        })?;
        let texts = names.into_iter().filter_map(|name| name.into_string().ok());
        Ok(texts.collect())
    }
}

/// The base image that the record of a disk names; `None` where the file is none.
fn base_of(record: &Path) -> Option<crate::resource::disk::BaseIdentity> {
    if record
        .extension()
        .is_none_or(|extension| extension != "json")
    {
        return None;
    }
    let mut bytes = Vec::new();
    let file = File::open(record).ok()?;
    file.take(DISK_RECORD_MAX).read_to_end(&mut bytes).ok()?;
    let record: DiskRecord = serde_json::from_slice(&bytes).ok()?;
    Some(record.base)
}

/// How many open files hold a lock on a template's memory (`proc_locks(5)`). Each VM that has
/// it mapped inherits one.
fn lockers(directory: &Path) -> usize {
    let images = IMAGES.map(|name| lock::identity_of(&directory.join(name)));
    let keys = images.into_iter().flatten().map(|(device, inode)| {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        format!("{major:02x}:{minor:02x}:{inode}")
    });
    let keys: Vec<String> = keys.collect();
    let mut text = String::new();
    let read =
        File::open("/proc/locks").and_then(|file| file.take(LOCKS_MAX).read_to_string(&mut text));
    if let Err(error) = read {
        log::debug!("/proc/locks: {error}");
    }
    let held = text.lines().filter(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        words.next() == Some("FLOCK") && words.any(|word| keys.iter().any(|key| key == word))
    });
    held.count()
}

/// Makes the names in a directory outlive a power loss.
pub(super) fn sync_directory(directory: &Path, faults: &Faults) -> Result<(), TemplateError> {
    call(faults, about("write to the disk", directory), || {
        let directory = File::open(directory).named("open")?;
        rustix::fs::fsync(&directory).named("fsync")
    })
}
