//! A template's snapshot as a sandbox's own, without a copy of its memory.
//!
//! Where the file system shares blocks between files (XFS, btrfs), a memory file of one's own
//! takes a call and no room: blocks part as they are written to. A VM may map it shared at
//! once, so that already its first pause writes no memory. What it does not share is the page
//! cache: pages of the new file are read from the disk again, which is why clones that are to
//! be many map the template's file instead.

use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rewake_sys::CallError;
use rewake_sys::error::Named;
use rewake_sys::reflink;
use rustix::fs::{Mode, OFlags, openat};

use super::dir::{CONFIG_FILE, STATE_FILE, SnapshotDir};
use super::image::{ClaimError, MemoryAccess, MemoryClaim};
use super::layout::NotMappable;
use super::seal::{SealError, require_space};
use crate::fault::Faults;
use crate::memory::WorkingSet;

/// Why a snapshot cannot be had as one's own. Nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OwnError {
    /// Its RAM cannot be mapped from one file, so a file of one's own would be of no use.
    #[error("RAM cannot be mapped from one file")]
    NotMappable(#[source] NotMappable),
    /// There is no memory file in it.
    #[error("The snapshot has no memory file of its own")]
    NoFile,
    /// Its memory file cannot be read now.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// There is less room than the guest's RAM may take once all of it was written to.
    #[error(transparent)]
    Space(SealError),
    /// The file system shares no blocks, or not between these two places.
    #[error("The blocks of {file} cannot be shared")]
    Clone {
        /// The memory file.
        file: &'static str,
        /// What the kernel said.
        #[source]
        source: CallError,
    },
    /// Another file could not be made.
    #[error("Cannot make {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: CallError,
    },
}

/// Makes `into`, which must not exist, a snapshot with the same content as `from` and a memory
/// file of its own. Blocks for the two small files and one call for memory, whatever its size;
/// it is longer for a file in many pieces.
///
/// # Errors
/// [`OwnError`].
pub fn make_own(from: &SnapshotDir, into: &Path, faults: &Faults) -> Result<(), OwnError> {
    from.layout().map_err(OwnError::NotMappable)?;
    let memory = from.memory().ok_or(OwnError::NoFile)?;
    // Against whoever would write to it or remove it meanwhile.
    let claim = from.claim(MemoryAccess::Read)?.ok_or(OwnError::NoFile)?;
    let parent = into.parent().unwrap_or(into);
    require_space(parent, from.state().memory().ram()).map_err(OwnError::Space)?;
    make(into, faults, || {
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o700).create(into).named("mkdir")
    })?;
    let filled = share(&claim, memory.name(), into, faults).and_then(|()| {
        copy(from, CONFIG_FILE, into, faults)?;
        copy(from, STATE_FILE, into, faults)
    });
    if filled.is_err()
        && let Err(error) = std::fs::remove_dir_all(into)
    {
        log::warn!("Left over: {}: {error}", into.display());
    }
    filled?;
    // Without it the first life is slower, not wrong.
    if let Ok(Some(set)) = WorkingSet::load(from)
        && let Err(error) = set.save(into)
    {
        log::debug!("{error}");
    }
    Ok(())
}

/// A memory file that shares all blocks with the template's.
fn share(
    template: &MemoryClaim,
    name: &'static str,
    into: &Path,
    faults: &Faults,
) -> Result<(), OwnError> {
    let file = create(&into.join(name), faults)?;
    let cloned = faults.syscall("snapshot.own-clone", || {
        reflink::clone_file(template, &file)
    });
    cloned.map_err(|failed| OwnError::Clone {
        file: name,
        source: failed.source,
    })
}

/// A copy of one of the small files, which were bounded when the snapshot was opened.
fn copy(
    from: &SnapshotDir,
    name: &'static str,
    into: &Path,
    faults: &Faults,
) -> Result<(), OwnError> {
    let path = into.join(name);
    let mut to = create(&path, faults)?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    make(&path, faults, || {
        let source = openat(from, name, flags, Mode::empty()).named("openat")?;
        std::io::copy(&mut File::from(source), &mut to).named("copy")?;
        Ok(())
    })
}

fn create(path: &Path, faults: &Faults) -> Result<File, OwnError> {
    make(path, faults, || {
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        options.open(path).named("open")
    })
}

fn make<T>(
    path: &Path,
    faults: &Faults,
    call: impl FnOnce() -> Result<T, CallError>,
) -> Result<T, OwnError> {
    let made = faults.syscall("snapshot.own", call);
    made.map_err(|failed| OwnError::File {
        path: path.to_owned(),
        source: failed.source,
    })
}
