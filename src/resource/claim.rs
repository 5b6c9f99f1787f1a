//! A file that its owner keeps locked: the kernel drops the lock when the owner dies.

use std::fs::File;
use std::io;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// Takes the lock where nobody has it, and says whether somebody has.
pub(crate) fn is_locked(claim: &File) -> io::Result<bool> {
    match rustix::fs::flock(claim, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}
