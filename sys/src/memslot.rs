//! What KVM charges for memory, apart from everything that a VMM does with it.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::ioctl::{self, Opcode};

use crate::error::{CallError, Named};

/// `_IO(KVMIO, 0x01)` of `linux/kvm.h`.
const KVM_CREATE_VM: Opcode = ioctl::opcode::none(0xAE, 0x01);
/// `_IOW(KVMIO, 0x46, struct kvm_userspace_memory_region)`.
const KVM_SET_USER_MEMORY_REGION: Opcode = ioctl::opcode::write::<Region>(0xAE, 0x46);

/// `struct kvm_userspace_memory_region` (`linux/kvm.h`).
#[repr(C)]
struct Region {
    slot: u32,
    flags: u32,
    guest_address: u64,
    size: u64,
    host_address: u64,
}

const _: () = assert!(size_of::<Region>() == 32);

/// Address space that is reserved and never touched.
struct Reserved {
    start: *mut libc::c_void,
    length: usize,
}

impl Reserved {
    fn new(length: usize) -> Result<Self, CallError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes; no memory of ours is touched.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).named("mmap");
        }
        Ok(Self { start, length })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and nothing points into it.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

/// How long KVM takes to register a region of guest memory of this size that nobody has
/// touched (`KVM_SET_USER_MEMORY_REGION` on a VM that is made for it).
///
/// With hardware virtualisation next to nothing; where KVM keeps shadow page tables it
/// allocates its own bookkeeping for every page.
///
/// # Errors
/// Those of `/dev/kvm`, and `ENOMEM`.
#[doc(alias = "KVM_SET_USER_MEMORY_REGION")]
pub fn registration_time(bytes: u64) -> Result<Duration, CallError> {
    let length =
        usize::try_from(bytes).map_err(|_| CallError::new("mmap", rustix::io::Errno::NOMEM))?;
    let memory = Reserved::new(length)?;
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .named("open /dev/kvm")?;
    // SAFETY: the call takes the type of VM by value and returns a fresh descriptor.
    let vm = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM.into(), 0) };
    if vm < 0 {
        return Err(std::io::Error::last_os_error()).named("KVM_CREATE_VM");
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    let vm = unsafe { OwnedFd::from_raw_fd(vm) };
    let region = Region {
        slot: 0,
        flags: 0,
        guest_address: 0,
        size: bytes,
        host_address: memory.start as u64,
    };
    let begun = Instant::now();
    // SAFETY: the region is a struct of the right size that lives through the call. The
    // memory that it names outlives the VM, which has no processor that could touch it.
    let outcome = unsafe {
        libc::ioctl(
            vm.as_raw_fd(),
            KVM_SET_USER_MEMORY_REGION.into(),
            &raw const region,
        )
    };
    let took = begun.elapsed();
    if outcome < 0 {
        return Err(std::io::Error::last_os_error()).named("KVM_SET_USER_MEMORY_REGION");
    }
    drop(vm);
    drop(memory);
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registration_is_measured_or_refused_with_the_name_of_a_call() {
        match registration_time(64 << 20) {
            Ok(took) => assert!(took < Duration::from_secs(10)),
            Err(error) => assert!(!error.call().is_empty()),
        }
    }
}
