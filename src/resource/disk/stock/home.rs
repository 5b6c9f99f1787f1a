//! Where a program keeps its prepared disks, and what becomes of them when it has died.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::PREFIX;
use crate::deadline::Deadline;
use crate::ids::SandboxId;
use crate::resource::claim::{self, is_locked};
use crate::resource::disk::{DiskFailure, DiskPool};
use crate::resource::private::private;

/// The file that its owner keeps locked.
const CLAIM: &str = "claim";
/// So many hexadecimal digits are its name.
const RANDOM: usize = 12;

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
        let path = parent.join(&random[..RANDOM]);
        let claim = claim::make(&path, CLAIM)?;
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
    claim::sweep(home, CLAIM);
    for entry in entries {
        let owner = entry?.path();
        let name = owner.file_name().and_then(OsStr::to_str).unwrap_or("");
        if !is_random(name) {
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
    use std::time::Duration;

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
    fn what_is_no_owners_directory_is_left_alone() {
        let scratch = Scratch::new("foreign");
        std::fs::write(scratch.0.join("file"), "").unwrap();
        std::fs::create_dir(scratch.0.join("lost+found")).unwrap();
        let dead = scratch.0.join("0123456789ab");
        std::fs::create_dir(&dead).unwrap();
        std::fs::write(dead.join(CLAIM), "").unwrap();
        let unborn = scratch.0.join(".new-0123456789ab");
        std::fs::create_dir(&unborn).unwrap();
        let swept = scratch.sweep();
        assert!(swept.in_use.is_empty() && swept.stuck.is_empty());
        assert_eq!(names(&scratch.0).len(), 2);
        assert!(!dead.exists() && !unborn.exists());
    }
}
