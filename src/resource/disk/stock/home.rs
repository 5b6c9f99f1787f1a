//! Where a program keeps its prepared disks, and what becomes of them when it has died.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::PREFIX;
use crate::deadline::Deadline;
use crate::ids::SandboxId;
use crate::resource::claim::is_locked;
use crate::resource::disk::{DiskFailure, DiskPool};
use crate::resource::private::private;

/// The file that its owner keeps locked.
const CLAIM: &str = "claim";
/// What a directory is called until its claim is locked.
const UNNAMED: &str = ".new-";
/// So many hexadecimal digits are its name.
const RANDOM: usize = 12;
/// No claim takes this long to be made.
const ABANDONED: Duration = Duration::from_secs(60);

/// What a sweep has found.
#[derive(Debug, Default)]
pub struct StockSweep {
    /// Directories of living programs.
    pub in_use: Vec<PathBuf>,
    /// Disks that are gone now.
    pub reclaimed: Vec<SandboxId>,
    /// Disks that could not be removed.
    pub stuck: Vec<DiskFailure>,
}

/// The directory of one program. It goes with it, where no disk is left.
#[derive(Debug)]
pub(super) struct Home {
    path: PathBuf,
    /// Locked until it is dropped, or the kernel drops it.
    _claim: File,
}

impl Home {
    /// Makes a directory in `parent`, claimed from the start.
    pub(super) fn claim(parent: &Path) -> io::Result<Self> {
        private().recursive(true).create(parent)?;
        let random = uuid::Uuid::new_v4().simple().to_string();
        let name = &random[..RANDOM];
        let unnamed = parent.join(format!("{UNNAMED}{name}"));
        let path = parent.join(name);
        private().create(&unnamed)?;
        let claim = || {
            let claim = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(unnamed.join(CLAIM))?;
            rustix::fs::flock(&claim, FlockOperation::NonBlockingLockExclusive)?;
            std::fs::rename(&unnamed, &path)?;
            Ok(claim)
        };
        let claim = claim().inspect_err(|_: &io::Error| remove_empty(&unnamed))?;
        Ok(Self {
            path,
            _claim: claim,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // What could not be removed is left to a sweep.
        if disks(&self.path).is_empty() {
            remove_empty(&self.path);
        }
    }
}

/// Removes a directory in which nothing is but a claim and files that never became a disk's.
fn remove_empty(dir: &Path) {
    for name in names(dir) {
        let name_text = name.to_string_lossy();
        if *name == *CLAIM || (name_text.starts_with('.') && name_text.ends_with(".part")) {
            let _ = std::fs::remove_file(dir.join(&name));
        }
    }
    // Where anything else is in it, it stays.
    let _ = std::fs::remove_dir(dir);
}

pub(super) fn ids(home: &Path) -> Vec<SandboxId> {
    let owners = names(home).into_iter().map(|name| home.join(name));
    owners.flat_map(|owner| disks(&owner)).collect()
}

pub(super) fn sweep(pool: &DiskPool, home: &Path, deadline: Deadline) -> io::Result<StockSweep> {
    let mut found = StockSweep::default();
    let entries = match home.read_dir() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
        other => other?,
    };
    for entry in entries {
        let owner = entry?.path();
        let name = owner.file_name().and_then(OsStr::to_str).unwrap_or("");
        let is_young = name.starts_with(UNNAMED) && !is_abandoned(&owner);
        // Whoever makes one finds its claim free, so nobody else may touch it.
        if is_young || !is_random(name.strip_prefix(UNNAMED).unwrap_or(name)) {
            continue;
        }
        // Held until all is gone, so no other sweep is at work there.
        let _claim = match File::open(owner.join(CLAIM)) {
            Ok(claim) if !is_locked(&claim)? => Some(claim),
            Ok(_) => {
                found.in_use.push(owner);
                continue;
            }
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            // It goes last, so there is nothing else.
            Err(_) => None,
        };
        let mut is_empty = true;
        for id in disks(&owner) {
            match pool.remove_stray(&id, &owner, deadline) {
                Ok(()) => found.reclaimed.push(id),
                Err(failure) => {
                    is_empty = false;
                    found.stuck.push(failure);
                }
            }
        }
        if is_empty {
            remove_empty(&owner);
        }
    }
    Ok(found)
}

/// Whether the name is one that [`Home::claim`] gives; all else is somebody else's.
fn is_random(name: &str) -> bool {
    name.len() == RANDOM && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_abandoned(dir: &Path) -> bool {
    let age = dir.metadata().and_then(|it| it.modified());
    age.is_ok_and(|age| age.elapsed().unwrap_or_default() > ABANDONED)
}

/// The disks of which anything is in a directory.
fn disks(owner: &Path) -> Vec<SandboxId> {
    let id = |name: std::ffi::OsString| {
        let (stem, _) = name.to_str()?.split_once('.')?;
        let is_ours = stem.starts_with(PREFIX);
        is_ours.then(|| SandboxId::new(stem).ok()).flatten()
    };
    let mut ids: Vec<_> = names(owner).into_iter().filter_map(id).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn names(dir: &Path) -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Faults;
    use crate::resource::disk::DiskConfig;

    struct Scratch(PathBuf);
    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("rewake-stockhome-{}-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }
        fn sweep(&self) -> StockSweep {
            let pool = DiskPool::open(DiskConfig::default(), Faults::NONE);
            sweep(&pool, &self.0, Deadline::after(Duration::from_secs(10))).unwrap()
        }
    }
    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_claim_of_a_directory_that_is_just_being_made_is_not_touched() {
        let scratch = Scratch::new("young");
        let unnamed = scratch.0.join(format!("{UNNAMED}0123456789ab"));
        std::fs::create_dir(&unnamed).unwrap();
        let claim = File::create(unnamed.join(CLAIM)).unwrap();
        assert!(!is_locked(&claim).unwrap());
        // Nobody tried to lock it, or it would count as a living program's.
        assert!(scratch.sweep().in_use.is_empty());
        assert!(unnamed.join(CLAIM).exists());
    }

    #[test]
    fn what_is_no_owners_directory_is_left_alone() {
        let scratch = Scratch::new("foreign");
        std::fs::write(scratch.0.join("file"), "").unwrap();
        std::fs::create_dir(scratch.0.join("lost+found")).unwrap();
        let dead = scratch.0.join("0123456789ab");
        std::fs::create_dir(&dead).unwrap();
        std::fs::write(dead.join(CLAIM), "").unwrap();
        let swept = scratch.sweep();
        assert!(swept.in_use.is_empty() && swept.stuck.is_empty());
        assert_eq!(names(&scratch.0).len(), 2);
        assert!(!dead.exists());
    }
}
