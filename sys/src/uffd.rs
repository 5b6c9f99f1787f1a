//! Whether `userfaultfd(2)` can be had, in the ways CH asks for it.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::ioctl::{self, Opcode};

use crate::error::{CallError, Named};

/// `_IO(USERFAULTFD_IOC, 0x00)` of `linux/userfaultfd.h`.
const USERFAULTFD_IOC_NEW: Opcode = ioctl::opcode::none(0xAA, 0x00);

/// Which way to a userfaultfd is open to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// `/dev/userfaultfd` may be opened: its permissions decide.
    Device,
    /// The system call works (`CAP_SYS_PTRACE`, or `vm.unprivileged_userfaultfd=1`).
    Syscall,
}

/// Tries the device and then the system call, as CH does, for kernel-mode faults too.
///
/// # Errors
/// What the system call says where neither works.
#[doc(alias = "USERFAULTFD_IOC_NEW")]
pub fn probe() -> Result<Access, CallError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if let Ok(device) = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
    {
        // SAFETY: the call takes its flags by value; it touches no memory of ours, and the
        // descriptor that it returns is ignored by the wrapper, see below.
        let made = unsafe {
            libc::ioctl(
                std::os::fd::AsRawFd::as_raw_fd(&device),
                USERFAULTFD_IOC_NEW.into(),
                flags,
            )
        };
        if made >= 0 {
            // SAFETY: the kernel has just made this descriptor for us alone.
            drop(unsafe { OwnedFd::from_raw_fd(made) });
            return Ok(Access::Device);
        }
    }
    // SAFETY: userfaultfd takes flags by value and returns a fresh descriptor.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if made < 0 {
        return Err(std::io::Error::last_os_error()).named("userfaultfd");
    }
    // SAFETY: the kernel has just made this descriptor for us alone; it fits an int.
    drop(unsafe { OwnedFd::from_raw_fd(made as i32) });
    Ok(Access::Syscall)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_call() {
        match probe() {
            Ok(access) => assert!(matches!(access, Access::Device | Access::Syscall)),
            Err(error) => assert_eq!(error.call(), "userfaultfd"),
        }
    }
}
