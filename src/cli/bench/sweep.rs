//! Removing what runs have left that ended without taking it down.
//!
//! A run is dead when nobody holds its lock, or when the process is gone that waited for it.
//! Its own is what lies in its directories, what stands on files in there, and what it has
//! noted. Nothing else is touched, and of runs that live nothing at all.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::resource::disk::DiskStep;
use rewake::resource::ledger::{Step, UndoError};
use rewake::resource::slot::ProcessIdentity;
use rewake_sys::dm::{Control, DeviceRef};
use rewake_sys::loopdev::{self, LoopDevice, LoopStatus};
use rewake_sys::process::{Process, start_time};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::ground::{self, BOUND, IN_MEMORY, INSIDE, LOCK, PREFIX};

const BUDGET: Duration = Duration::from_secs(30);
/// No lock takes this long to get its name.
const ABANDONED: Duration = Duration::from_secs(60);

/// How long a lock may outlive its owner.
const DYING: Duration = Duration::from_secs(1);

/// What became of a dead run.
#[derive(Debug, Default)]
pub(super) struct Reclaimed {
    /// What was there and is gone.
    removed: Vec<String>,
    /// What could not be removed.
    pub(super) left: Vec<String>,
}

impl Reclaimed {
    fn undo(&mut self, step: &Step) {
        match step.undo(Deadline::after(BUDGET)) {
            Ok(()) => self.removed.push(step.to_string()),
            Err(error) => self.left.push(format!("{step} ({error})")),
        }
    }
}

/// Removes what all dead runs have left, and says so.
pub(super) fn all() {
    for dir in runs() {
        if is_nameless(&dir) {
            remove_if_abandoned(&dir);
        } else if let Ok(Some(_lock)) = take_over(&dir) {
            let Reclaimed { removed, left } = reclaim(&dir);
            if !removed.is_empty() {
                let what = removed.join(", ");
                eprintln!("A run that was killed had left, now removed: {what}");
            }
            if !left.is_empty() {
                eprintln!("A run that was killed has left: {}", left.join(", "));
            }
        }
    }
}

/// The directories of all runs, those that this user made.
fn runs() -> Vec<PathBuf> {
    let entries = fs::read_dir(std::env::temp_dir()).into_iter().flatten();
    let named = entries.flatten().filter(|entry| {
        let name = entry.file_name();
        name.to_string_lossy().starts_with(PREFIX)
    });
    let mut runs: Vec<_> = named.map(|entry| entry.path()).collect();
    runs.retain(|path| is_own(path));
    runs
}

/// Anybody may make a directory of that name in `/tmp`.
fn is_own(path: &Path) -> bool {
    let us = rustix::process::geteuid().as_raw();
    fs::symlink_metadata(path).is_ok_and(|it| it.is_dir() && it.uid() == us)
}

fn is_nameless(dir: &Path) -> bool {
    !dir.join(LOCK).exists()
}

/// A run that died before its lock had a name has left that and nothing else: `rmdir` sees
/// to it. One that is just beginning is younger.
fn remove_if_abandoned(dir: &Path) {
    let age = dir.metadata().and_then(|it| it.modified());
    let age = age.map(|it| it.elapsed().unwrap_or_default());
    if age.is_ok_and(|age| age > ABANDONED) {
        let _ = fs::remove_file(dir.join(LOCK).with_extension("new"));
        let _ = fs::remove_dir(dir);
    }
}

/// The lock of a run that is dead. One whose owner has died may still be dying.
fn take_over(dir: &Path) -> io::Result<Option<File>> {
    if let Some(lock) = try_lock(dir)? {
        return Ok(Some(lock));
    }
    if !ground::noted(&dir.join(LOCK)).is_some_and(has_ended) {
        return Ok(None);
    }
    let _ = end_inside(dir);
    // Files are closed a moment before or after a process counts as ended, and no event tells.
    let patience = Deadline::after(DYING);
    loop {
        match try_lock(dir)? {
            None if !patience.has_passed() => std::thread::sleep(Duration::from_millis(1)),
            lock => return Ok(lock),
        }
    }
}

/// Ends the first process of a run, and so all of them.
fn end_inside(dir: &Path) -> Result<(), UndoError> {
    let Some(ProcessIdentity { pid, start_time }) = ground::noted(&dir.join(INSIDE)) else {
        return Ok(());
    };
    Step::Process { pid, start_time }.undo(Deadline::after(BUDGET))
}

fn try_lock(dir: &Path) -> io::Result<Option<File>> {
    let file = File::open(dir.join(LOCK))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        // Somebody else has just removed it.
        Ok(()) if file.metadata()?.nlink() == 0 => Ok(None),
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn has_ended(identity: ProcessIdentity) -> bool {
    match Process::open(identity.pid) {
        Ok(process) => {
            start_time(identity.pid) != Some(identity.start_time)
                || process.has_ended().unwrap_or(false)
        }
        Err(error) => error.is_gone(),
    }
}

/// Removes all that a dead run has left: what stands on its files, then the files, its mark
/// last. The caller holds its lock.
pub(super) fn reclaim(dir: &Path) -> Reclaimed {
    let mut found = Reclaimed::default();
    // When its first process is gone, all others are.
    if let Err(error) = end_inside(dir) {
        found.left.push(format!("its processes ({error})"));
        return found;
    }
    let Bound { own, noted } = bound(dir);
    unmap(&own, &mut found);
    for device in &own {
        unbind(device, &mut found);
    }
    // Another run may be about to use what this one has bound elsewhere, as `losetup -j`
    // finds it: then it stays for a later sweep.
    let wait = noted.iter().any(is_bound) && is_any_alive_beside(dir);
    for device in noted.iter().filter(|_| !wait) {
        unbind(device, &mut found);
    }
    if !found.left.is_empty() {
        return found;
    }
    let name = dir.file_name().unwrap_or_default();
    for run in IN_MEMORY.map(|parent| Path::new(parent).join(name)) {
        if is_own(&run) {
            found.undo(&Step::Directory { path: run });
        }
    }
    let kept: &[&str] = if wait { &[LOCK, BOUND] } else { &[LOCK] };
    match empty(dir, kept) {
        Ok(()) if wait => {}
        Ok(()) => found.undo(&Step::Directory {
            path: dir.to_owned(),
        }),
        Err(error) => found.left.push(format!("{} ({error})", dir.display())),
    }
    found
}

/// Loop devices of a run.
#[derive(Default)]
struct Bound {
    /// Over files in its directory.
    own: Vec<LoopDevice>,
    /// Over images elsewhere, which it has noted. Those that the kernel unbinds by itself were
    /// bound by somebody else.
    noted: Vec<LoopDevice>,
}

fn bound(dir: &Path) -> Bound {
    let mut files = HashSet::new();
    collect(dir, &mut files);
    let noted = fs::read_to_string(dir.join(BOUND)).unwrap_or_default();
    let noted = noted
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    let noted: HashSet<_> = noted
        .filter_map(|path: PathBuf| fs::metadata(path).ok())
        .map(|it| (it.dev(), it.ino()))
        .collect();
    let mut found = Bound::default();
    for number in loopdev::bound().unwrap_or_default() {
        let Ok(device) = LoopDevice::open(number, true) else {
            continue;
        };
        let Ok(Some(status)) = device.status() else {
            continue;
        };
        let LoopStatus {
            device: on, inode, ..
        } = status;
        if files.contains(&(on, inode)) {
            found.own.push(device);
        } else if noted.contains(&(on, inode)) && !status.autoclear {
            found.noted.push(device);
        }
    }
    found
}

/// Device and inode of every file beneath a directory.
fn collect(dir: &Path, files: &mut HashSet<(u64, u64)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(found) if found.is_dir() => collect(&entry.path(), files),
            Ok(found) if found.is_file() => drop(files.insert((found.dev(), found.ino()))),
            _ => {}
        }
    }
}

/// Removes the mappings that stand on loop devices of the run.
fn unmap(devices: &[LoopDevice], found: &mut Reclaimed) {
    let Ok(control) = Control::open() else {
        // No driver, no mapping.
        return;
    };
    let own: HashSet<_> = devices.iter().map(LoopDevice::device).collect();
    for mapping in control.list().unwrap_or_default() {
        let device = DeviceRef::Name(&mapping.name);
        let stands_on = control.deps(device).unwrap_or_default();
        let Ok(Some(info)) = control.info(device) else {
            continue;
        };
        if !stands_on.iter().any(|it| own.contains(it)) {
            continue;
        }
        let node = Path::new("/dev/mapper").join(&info.name);
        for disk in [
            DiskStep::Mapping {
                name: info.name,
                uuid: info.uuid,
            },
            DiskStep::Node {
                path: node,
                device: info.device,
            },
        ] {
            found.undo(&Step::Disk { disk });
        }
    }
}

fn is_bound(device: &LoopDevice) -> bool {
    matches!(device.status(), Ok(Some(_)))
}

fn unbind(device: &LoopDevice, found: &mut Reclaimed) {
    let name = device.path().display().to_string();
    match device.unbind() {
        Ok(()) => found.removed.push(name),
        // With the mapping that stood on it.
        Err(error) if error.is_gone() => {}
        Err(error) => found.left.push(format!("{name} ({error})")),
    }
}

fn is_any_alive_beside(dir: &Path) -> bool {
    let others = runs().into_iter().filter(|it| it != dir);
    let mut alive = others.map(|other| matches!(take_over(&other), Ok(None)));
    alive.any(|alive| alive)
}

/// Removes everything in a directory but these files.
fn empty(dir: &Path, kept: &[&str]) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if kept.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(path)?;
        } else {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}
