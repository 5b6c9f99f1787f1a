//! The directory of one sandbox, and the lock on it.
//!
//! ```text
//!   ROOT/sandboxes/ID/
//!     journal          what it is and what exists because of it
//!     lock             held by whoever performs an operation on it
//!     doomed           there once it is to be destroyed
//!     disk/            its copy-on-write disk
//!     snapshot.N/      life N, frozen; one of them counts, the journal says which
//! ```
//!
//! A directory gets its name when its journal and lock are in it, and loses the name before
//! anything in it is removed: what bears a sandbox's name is whole.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::ids::SandboxId;
use crate::resource::claim;
use crate::resource::private::private;

/// Beneath the root.
const SANDBOXES: &str = "sandboxes";
/// What directories are called that have no name yet, and no name any more.
const UNNAMED: [&str; 2] = [claim::UNNAMED, ".gone-"];

/// Where sandboxes live.
#[must_use]
pub(crate) fn all(root: &Path) -> PathBuf {
    root.join(SANDBOXES)
}

/// The directory of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SandboxDir {
    path: PathBuf,
}

/// The lock of a sandbox: whoever has it may change the sandbox. Freed when dropped, and when
/// the process dies.
#[derive(Debug)]
pub(crate) struct DirLock {
    file: File,
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // Closing it is not enough while a process that was just forked has a copy.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

impl SandboxDir {
    pub(crate) fn of(root: &Path, id: &SandboxId) -> Self {
        Self {
            path: all(root).join(id.as_str()),
        }
    }

    /// Makes a directory without a name, locked. Nothing is left of it where that fails.
    ///
    /// A directory cannot be locked before it is there, so a sweep may come first: then it has
    /// the lock and removes the directory, and the next one is made.
    pub(crate) fn unnamed(
        root: &Path,
        id: &SandboxId,
        faults: &Faults,
    ) -> io::Result<(Self, DirLock)> {
        let parent = all(root);
        private().recursive(true).create(&parent)?;
        loop {
            let random = uuid::Uuid::new_v4().simple().to_string();
            let path = parent.join(format!("{}{id}-{}", UNNAMED[0], &random[..8]));
            let dir = Self { path };
            let make = || {
                private().create(&dir.path)?;
                let lock = dir.try_lock_unnamed()?;
                lock.map(|lock| private().create(dir.disk()).map(|()| lock))
                    .transpose()
            };
            match faults.call("make the sandbox directory", make) {
                Ok(Some(lock)) => return Ok((dir, lock)),
                Ok(None) => {}
                Err(error) => {
                    let _ = std::fs::remove_dir_all(&dir.path);
                    return Err(error);
                }
            }
        }
    }

    /// The lock of a directory without a name; `None` where somebody else has it, or had it and
    /// has removed the directory.
    fn try_lock_unnamed(&self) -> io::Result<Option<DirLock>> {
        let taken = claim::take(&self.lock_file())?;
        Ok(taken.map(|file| DirLock { file }))
    }

    /// Gives the directory its name; fails with `AlreadyExists` where that is taken.
    pub(crate) fn name(self, root: &Path, id: &SandboxId) -> Result<Self, (Self, io::Error)> {
        let named = Self::of(root, id);
        match claim::rename_new(&self.path, &named.path) {
            Ok(()) => Ok(named),
            Err(error) => Err((self, error)),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.path.join("journal")
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.path.join("disk")
    }

    /// The snapshot of one life.
    pub(crate) fn snapshot(&self, generation: u64) -> PathBuf {
        self.path.join(format!("snapshot.{generation}"))
    }

    /// Where the snapshot of one life is put together.
    pub(crate) fn staging(&self, generation: u64) -> PathBuf {
        self.path.join(format!("snapshot.{generation}.new"))
    }

    /// All snapshot directories, finished and not.
    pub(crate) fn snapshots(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.path)
            .into_iter()
            .flatten()
            .flatten();
        let named = |entry: &std::fs::DirEntry| {
            entry.file_name().to_string_lossy().starts_with("snapshot.")
        };
        entries.filter(named).map(|entry| entry.path()).collect()
    }

    /// The log of Cloud Hypervisor, as far as anybody saved it.
    pub(crate) fn vmm_log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    /// Marks the sandbox as one that is to be destroyed: operations under way end, and no
    /// other begins.
    pub(crate) fn doom(&self) -> io::Result<()> {
        match File::create(self.path.join("doomed")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    pub(crate) fn is_doomed(&self) -> bool {
        self.path.join("doomed").exists()
    }

    fn lock_file(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// Whether the lock can be had at once. `NotFound` where the sandbox is gone.
    pub(crate) fn try_lock(&self) -> io::Result<Option<DirLock>> {
        self.try_lock_on(claim::open(&self.lock_file())?)
    }

    fn try_lock_on(&self, file: File) -> io::Result<Option<DirLock>> {
        let locked = claim::lock(file, &self.lock_file())?;
        Ok(locked.map(|file| DirLock { file }))
    }

    /// Waits for the lock; `None` once the deadline has passed.
    ///
    /// `flock` knows no time limit, so a thread waits in it. Where the deadline passes first,
    /// the thread goes on waiting and lets go of the lock when it gets it.
    pub(crate) fn lock(&self, deadline: Deadline) -> io::Result<Option<DirLock>> {
        if let Some(lock) = self.try_lock()? {
            return Ok(Some(lock));
        }
        let file = claim::open(&self.lock_file())?;
        let (sender, receiver) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("rw-lock".to_owned())
            .spawn(move || {
                let locked = loop {
                    match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                        Err(Errno::INTR) => {}
                        other => break other,
                    }
                };
                // Nobody listens any more after the deadline: the file is closed here then.
                let _ = sender.try_send(locked.map(|()| file));
            })?;
        let received = match deadline.remaining() {
            Some(left) => receiver.recv_timeout(left).ok(),
            None => receiver.recv().ok(),
        };
        match received {
            None => Ok(None),
            Some(Err(errno)) => Err(errno.into()),
            Some(Ok(file)) => self.checked(file).map(Some),
        }
    }

    /// The lock counts only if its file is still the one under the sandbox's name.
    fn checked(&self, file: File) -> io::Result<DirLock> {
        if claim::is_at(&file, &self.lock_file()) {
            Ok(DirLock { file })
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Removes the directory and all in it. It loses its name first, so that nobody ever sees
    /// half of it.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let Some(parent) = self.path.parent() else {
            return Ok(());
        };
        let random = uuid::Uuid::new_v4().simple().to_string();
        let gone = parent.join(format!("{}{}", UNNAMED[1], &random[..16]));
        match std::fs::rename(&self.path, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        }
        // From here on a failure leaves something that every recovery removes.
        remove_tree(&gone).map(drop)
    }
}

/// Removes a directory without a name, unless somebody is at work on it or it is gone. Whether
/// it did.
pub(crate) fn remove_unnamed(path: &Path) -> io::Result<bool> {
    let dir = SandboxDir {
        path: path.to_owned(),
    };
    if has_prefix(path, UNNAMED[1]) {
        // Its lock file goes with the rest of it. A new one would only keep it from going.
        let lock = match File::open(dir.lock_file()) {
            Ok(file) => dir.try_lock_on(file),
            Err(error) => Err(error),
        };
        return match lock {
            Ok(None) => Ok(false),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => remove_tree(path),
        };
    }
    // With the lock, or its maker could be about to take it.
    match dir.try_lock_unnamed()? {
        Some(_lock) => dir.remove().map(|()| true),
        None => Ok(false),
    }
}

/// Removes a directory and all in it, perhaps while somebody else does. Whether it was there.
fn remove_tree(path: &Path) -> io::Result<bool> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        other => other.map(|()| true),
    }
}

fn has_prefix(path: &Path, prefix: &str) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.as_encoded_bytes().starts_with(prefix.as_bytes())
}

/// What lies in the directory of all sandboxes.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// Sandboxes.
    pub(crate) ids: Vec<SandboxId>,
    /// Directories without a name: of somebody at work, or left by somebody who died.
    pub(crate) unnamed: Vec<PathBuf>,
    /// Whatever else there is.
    pub(crate) foreign: Vec<PathBuf>,
}

/// Lists what lies in the directory of all sandboxes.
pub(crate) fn list(root: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    let entries = match std::fs::read_dir(all(root)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(listing),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let name = entry.file_name();
        if UNNAMED.iter().any(|prefix| has_prefix(&path, prefix)) {
            listing.unnamed.push(path);
        } else if let Ok(id) = SandboxId::new(name.to_string_lossy())
            && path.is_dir()
        {
            listing.ids.push(id);
        } else {
            listing.foreign.push(path);
        }
    }
    listing.ids.sort_unstable();
    Ok(listing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    struct Scratch(PathBuf);
    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("rewake-sandboxdir-{}-{name}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
    }
    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn id(text: &str) -> SandboxId {
        SandboxId::new(text).unwrap()
    }

    #[test]
    fn a_directory_is_locked_from_birth_and_its_name_is_taken_once() {
        let scratch = Scratch::new("birth");
        let (dir, lock) = SandboxDir::unnamed(&scratch.0, &id("a1"), &Faults::NONE).unwrap();
        assert!(list(&scratch.0).unwrap().ids.is_empty());
        assert_eq!(list(&scratch.0).unwrap().unnamed, [dir.path().to_owned()]);
        assert!(!remove_unnamed(dir.path()).unwrap(), "it is held");
        let named = dir.name(&scratch.0, &id("a1")).unwrap();
        assert!(named.try_lock().unwrap().is_none());
        assert_eq!(list(&scratch.0).unwrap().ids, [id("a1")]);
        let (other, _) = SandboxDir::unnamed(&scratch.0, &id("a1"), &Faults::NONE).unwrap();
        let (other, error) = other.name(&scratch.0, &id("a1")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(remove_unnamed(other.path()).unwrap(), "nobody holds it");
        assert!(!remove_unnamed(other.path()).unwrap(), "it is gone");
        assert!(list(&scratch.0).unwrap().unnamed.is_empty());
        drop(lock);
        assert!(named.try_lock().unwrap().is_some());
    }

    #[test]
    fn whoever_waits_for_a_lock_gets_it_or_learns_that_the_sandbox_is_gone() {
        let scratch = Scratch::new("wait");
        for remove in [false, true] {
            let name = id(if remove { "gone" } else { "stays" });
            let (dir, lock) = SandboxDir::unnamed(&scratch.0, &name, &Faults::NONE).unwrap();
            let dir = dir.name(&scratch.0, &name).unwrap();
            let timed_out = dir.lock(Deadline::after(Duration::from_millis(10)));
            assert!(timed_out.unwrap().is_none());
            let waiter = std::thread::spawn({
                let dir = dir.clone();
                move || dir.lock(Deadline::after(Duration::from_secs(20)))
            });
            if remove {
                dir.remove().unwrap();
            }
            drop(lock);
            match waiter.join().unwrap() {
                Ok(Some(_)) => assert!(!remove),
                Err(error) if error.kind() == io::ErrorKind::NotFound => assert!(remove),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn removing_twice_is_harmless_and_leaves_nothing() {
        let scratch = Scratch::new("remove");
        let (dir, _lock) = SandboxDir::unnamed(&scratch.0, &id("a"), &Faults::NONE).unwrap();
        let dir = dir.name(&scratch.0, &id("a")).unwrap();
        std::fs::create_dir(dir.snapshot(1)).unwrap();
        dir.remove().unwrap();
        dir.remove().unwrap();
        assert_eq!(std::fs::read_dir(all(&scratch.0)).unwrap().count(), 0);
    }

    #[test]
    fn what_is_being_made_and_removed_is_nobodys_leftover() {
        let scratch = Scratch::new("sweeps");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        for path in list(&scratch.0).unwrap().unnamed {
                            remove_unnamed(&path).unwrap();
                        }
                    }
                });
            }
            let ended = scope.spawn(|| {
                for number in 0..500 {
                    let name = id(&format!("n{number}"));
                    let (dir, _lock) =
                        SandboxDir::unnamed(&scratch.0, &name, &Faults::NONE).unwrap();
                    std::fs::write(dir.journal(), "x").unwrap();
                    let dir = dir.name(&scratch.0, &name).unwrap();
                    assert!(dir.disk().is_dir() && dir.journal().exists());
                    dir.remove().unwrap();
                }
            });
            let ended = ended.join();
            done.store(true, Ordering::Relaxed);
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
        assert_eq!(std::fs::read_dir(all(&scratch.0)).unwrap().count(), 0);
    }

    #[test]
    fn what_was_left_by_the_dead_is_removed_however_far_they_came() {
        let scratch = Scratch::new("dead");
        let parent = all(&scratch.0);
        let bare = [".new-a-00000000", ".gone-0000000000000000"].map(|name| parent.join(name));
        let locked = [".new-b-00000000", ".gone-1111111111111111"].map(|name| parent.join(name));
        for path in bare.iter().chain(&locked) {
            std::fs::create_dir_all(path.join("disk")).unwrap();
        }
        for path in &locked {
            std::fs::write(path.join("lock"), "").unwrap();
        }
        for path in bare.iter().chain(&locked) {
            assert!(remove_unnamed(path).unwrap(), "{}", path.display());
        }
        assert_eq!(std::fs::read_dir(&parent).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_sandbox_is_foreign() {
        let scratch = Scratch::new("foreign");
        let parent = all(&scratch.0);
        std::fs::create_dir_all(parent.join("UPPER")).unwrap();
        std::fs::write(parent.join("file"), "").unwrap();
        let listing = list(&scratch.0).unwrap();
        assert_eq!(listing.foreign.len(), 2);
        assert!(listing.ids.is_empty());
    }
}
