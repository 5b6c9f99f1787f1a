//! Where a program keeps its prepared disks, and what becomes of them when it has died.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::PREFIX;
use crate::deadline::Deadline;
use crate::ids::SandboxId;
use crate::resource::claim::is_locked;
use crate::resource::disk::{DiskFailure, DiskPool};

/// The file that its owner keeps locked.
const CLAIM: &str = "claim";
/// What a directory is called until its claim is locked.
const UNNAMED: &str = ".new-";
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
        let name = &random[..12];
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
        let is_named = !owner.file_name().is_some_and(is_unnamed);
        // Held until all is gone, so no other sweep is at work there.
        let _claim = match File::open(owner.join(CLAIM)) {
            Ok(claim) if !is_locked(&claim)? => Some(claim),
            Ok(_) => {
                found.in_use.push(owner);
                continue;
            }
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            // It goes last, so there is nothing else; or it is yet to be made.
            Err(_) => None,
        };
        if !is_named && !is_abandoned(&owner) {
            continue;
        }
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

fn is_unnamed(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with(UNNAMED)
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

fn private() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder
}
