//! What a failed system call says.

use std::fmt;
use std::io;

use rustix::io::Errno;

/// A system call that failed: its name and its error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallError {
    call: &'static str,
    errno: i32,
}

impl CallError {
    /// An error of the call `call`.
    #[must_use]
    pub const fn new(call: &'static str, errno: Errno) -> Self {
        Self {
            call,
            errno: errno.raw_os_error(),
        }
    }

    /// Wraps an [`io::Error`]; one without an error number counts as `EIO`.
    #[must_use]
    pub fn from_io(call: &'static str, error: &io::Error) -> Self {
        Self {
            call,
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    /// The name of the call, as the kernel spells it.
    #[must_use]
    pub const fn call(&self) -> &'static str {
        self.call
    }

    /// The error number, such as `libc::EBUSY`.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        self.errno
    }

    /// Whether the object was busy (`EBUSY`, `EAGAIN`, `ETXTBSY`).
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        matches!(self.errno, libc::EBUSY | libc::EAGAIN | libc::ETXTBSY)
    }

    /// Whether the object was gone already.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        matches!(
            self.errno,
            libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::ESRCH
        )
    }

    /// Whether the caller lacked a privilege.
    #[must_use]
    pub const fn is_denied(&self) -> bool {
        matches!(self.errno, libc::EPERM | libc::EACCES)
    }
}

impl fmt::Display for CallError {
    /// `TUNSETIFF: EBUSY`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = nix::errno::Errno::from_raw(self.errno);
        if name == nix::errno::Errno::UnknownErrno {
            write!(f, "{}: error {}", self.call, self.errno)
        } else {
            write!(f, "{}: {name:?}", self.call)
        }
    }
}

impl std::error::Error for CallError {}

impl From<CallError> for io::Error {
    fn from(error: CallError) -> Self {
        Self::from_raw_os_error(error.errno)
    }
}

/// Names the call behind a failed result.
pub trait Named<T> {
    /// Turns the bare error number into a [`CallError`] of `call`.
    ///
    /// # Errors
    /// The same failure, with its name.
    fn named(self, call: &'static str) -> Result<T, CallError>;
}

impl<T> Named<T> for Result<T, Errno> {
    fn named(self, call: &'static str) -> Result<T, CallError> {
        self.map_err(|errno| CallError::new(call, errno))
    }
}

impl<T> Named<T> for io::Result<T> {
    fn named(self, call: &'static str) -> Result<T, CallError> {
        self.map_err(|error| CallError::from_io(call, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_its_call_and_its_number() {
        let busy = CallError::new("TUNSETIFF", Errno::BUSY);
        assert_eq!(busy.to_string(), "TUNSETIFF: EBUSY");
        assert!(busy.is_busy() && !busy.is_gone());
        assert_eq!(io::Error::from(busy).raw_os_error(), Some(libc::EBUSY));
        let odd = CallError::new("ioctl", Errno::from_raw_os_error(3999));
        assert_eq!(odd.to_string(), "ioctl: error 3999");
    }
}
