//! Descriptors that this process was started with (`--api-socket fd=3`).

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::error::CallError;

/// A duplicate of an inherited descriptor, closed on exec.
///
/// The inherited number itself stays open until the process ends.
///
/// # Errors
/// `EBADF` where no descriptor has this number.
#[doc(alias = "F_DUPFD_CLOEXEC")]
pub fn duplicate(number: RawFd) -> Result<OwnedFd, CallError> {
    // SAFETY: F_DUPFD_CLOEXEC takes integers and touches no memory; a number that is no open
    // descriptor gives EBADF.
    let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if fd < 0 {
        return Err(CallError::from_io(
            "F_DUPFD_CLOEXEC",
            &std::io::Error::last_os_error(),
        ));
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn duplicates_an_open_descriptor_and_refuses_a_closed_one() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let copy = duplicate(file.as_raw_fd()).unwrap();
        assert_ne!(copy.as_raw_fd(), file.as_raw_fd());
        assert_eq!(duplicate(-1).unwrap_err().errno(), libc::EBADF);
    }
}
