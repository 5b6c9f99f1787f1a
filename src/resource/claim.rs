//! A file that its owner keeps locked: the kernel drops the lock when the owner dies. So whoever
//! can lock it knows that what it stands for is nobody's.
//!
//! A directory is claimed by such a file in it. It cannot be claimed before it is there, so it is
//! made under a name that says that, claimed, and named last. A sweep claims what it finds under
//! such a name before it removes it, and a maker that comes second makes another one.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

use super::private::private;

/// Begins the names of directories that are just being claimed.
pub(crate) const UNNAMED: &str = ".new-";

/// Takes the lock where nobody has it, and says whether somebody has.
pub(crate) fn is_locked(claim: &File) -> io::Result<bool> {
    loop {
        match rustix::fs::flock(claim, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(false),
            Err(Errno::WOULDBLOCK) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether the open file is still the one at `path`, and not one that was removed meanwhile.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Opens the file at `path`, or makes it.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// Locks the file that was opened at `path`; `None` where somebody has it.
///
/// # Errors
/// `NotFound` where it was removed before it was locked.
pub(crate) fn lock(file: File, path: &Path) -> io::Result<Option<File>> {
    if is_locked(&file)? {
        Ok(None)
    } else if is_at(&file, path) {
        Ok(Some(file))
    } else {
        Err(ErrorKind::NotFound.into())
    }
}

/// Opens the file at `path`, or makes it, and locks it; `None` where somebody else has it, or had
/// it and has removed it.
pub(crate) fn take(path: &Path) -> io::Result<Option<File>> {
    match open(path).and_then(|file| lock(file, path)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other,
    }
}

/// Makes the directory `target` with a claim in it: nobody ever sees it under its name without.
/// The claim ends when the file is closed.
pub(crate) fn make(target: &Path, claim: &str) -> io::Result<File> {
    loop {
        let random = uuid::Uuid::new_v4().simple().to_string();
        let unnamed = target.with_file_name(format!("{UNNAMED}{}", &random[..12]));
        private().create(&unnamed)?;
        let named = take(&unnamed.join(claim)).and_then(|file| {
            file.map(|file| rename_new(&unnamed, target).map(|()| file))
                .transpose()
        });
        match named {
            Ok(Some(file)) => return Ok(file),
            // A sweep has come first: the directory is its.
            Ok(None) => {}
            Err(error) => {
                remove(&unnamed, claim);
                return Err(error);
            }
        }
    }
}

/// Renames without ever replacing anything.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(Into::into)
}

/// Removes the directories in `parent` whose makers died before they were named. Others are not
/// touched, nor is one in which there is more than a claim.
pub(crate) fn sweep(parent: &Path, claim: &str) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if !name.as_encoded_bytes().starts_with(UNNAMED.as_bytes()) {
            continue;
        }
        let path = entry.path();
        if let Ok(Some(_held)) = take(&path.join(claim)) {
            remove(&path, claim);
        }
    }
}

/// What is left where this fails, the next sweep finds.
fn remove(unnamed: &Path, claim: &str) {
    let _ = std::fs::remove_file(unnamed.join(claim));
    let _ = std::fs::remove_dir(unnamed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Scratch(PathBuf);
    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("rewake-claim-{}-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }
        fn entries(&self) -> usize {
            std::fs::read_dir(&self.0).unwrap().count()
        }
    }
    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_directory_that_is_just_being_made_is_not_taken_from_its_maker() {
        let scratch = Scratch::new("made");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        sweep(&scratch.0, "claim");
                    }
                });
            }
            let ended = scope.spawn(|| {
                for number in 0..500 {
                    let path = scratch.0.join(number.to_string());
                    let claim = make(&path, "claim").unwrap();
                    assert!(is_at(&claim, &path.join("claim")));
                    let other = File::open(path.join("claim")).unwrap();
                    assert!(is_locked(&other).unwrap(), "it was never unclaimed");
                    std::fs::remove_dir_all(&path).unwrap();
                }
            });
            let ended = ended.join();
            done.store(true, Ordering::Relaxed);
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
        sweep(&scratch.0, "claim");
        assert_eq!(scratch.entries(), 0);
    }

    #[test]
    fn what_the_dead_left_unnamed_goes_and_nothing_else() {
        let scratch = Scratch::new("dead");
        for name in [
            ".new-bare",
            ".new-claimed",
            ".new-full",
            "named",
            ".new-held",
        ] {
            std::fs::create_dir(scratch.0.join(name)).unwrap();
        }
        std::fs::write(scratch.0.join(".new-claimed/claim"), "").unwrap();
        std::fs::write(scratch.0.join(".new-full/file"), "").unwrap();
        std::fs::write(scratch.0.join(".new-file"), "").unwrap();
        let held = open(&scratch.0.join(".new-held/claim")).unwrap();
        assert!(!is_locked(&held).unwrap());
        sweep(&scratch.0, "claim");
        let left = [".new-full/file", ".new-file", "named", ".new-held/claim"];
        for name in left {
            assert!(scratch.0.join(name).exists(), "{name}");
        }
        assert_eq!(scratch.entries(), left.len());
    }

    #[test]
    fn a_name_that_is_taken_is_an_error_and_leaves_nothing() {
        let scratch = Scratch::new("taken");
        std::fs::create_dir(scratch.0.join("name")).unwrap();
        let error = make(&scratch.0.join("name"), "claim").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(scratch.entries(), 1);
        let error = make(&scratch.0.join("absent/name"), "claim").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
