//! Locks of directories: who makes, launches from or removes a template.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rewake_sys::error::Named;
use rustix::fs::{FlockOperation, Mode, OFlags};

use super::error::{TemplateError, about, call};
use crate::fault::Faults;

/// Opens a directory and says which one it is.
pub(super) fn open_directory(
    path: &Path,
    faults: &Faults,
) -> Result<(OwnedFd, (u64, u64)), TemplateError> {
    call(faults, about("open", path), || {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty()).named("open")?;
        let found = rustix::fs::fstat(&directory).named("fstat")?;
        Ok((directory, (found.st_dev, found.st_ino)))
    })
}

/// Locks a directory for us alone; `false` where somebody else has it.
pub(super) fn lock(
    directory: &OwnedFd,
    path: &Path,
    faults: &Faults,
) -> Result<bool, TemplateError> {
    let locked = call(faults, about("lock", path), || {
        rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive).named("flock")
    });
    match locked {
        Err(TemplateError::Call { source, .. }) if source.is_busy() => Ok(false),
        other => other.map(|()| true),
    }
}

/// Device and inode under a name.
pub(super) fn identity_of(path: &Path) -> Option<(u64, u64)> {
    let found = std::fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}
