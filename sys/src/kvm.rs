//! Whether `/dev/kvm` can be used (`linux/kvm.h`).

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::ioctl::{self, Opcode};

use crate::error::{CallError, Named};

/// `_IO(KVMIO, 0x00)`.
const KVM_GET_API_VERSION: Opcode = ioctl::opcode::none(0xAE, 0x00);

/// Opens `/dev/kvm` for reading and writing, as CH does, and asks for its API version,
/// which has been 12 since Linux 2.6.22.
///
/// # Errors
/// `ENOENT` without the module, `EACCES` without the permission.
#[doc(alias = "KVM_GET_API_VERSION")]
pub fn api_version() -> Result<i32, CallError> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .named("open /dev/kvm")?;
    // SAFETY: the call takes no argument and touches no memory of ours.
    let version = unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION.into(), 0) };
    if version < 0 {
        return Err(std::io::Error::last_os_error()).named("KVM_GET_API_VERSION");
    }
    Ok(version)
}
