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
    let device = open()?;
    // SAFETY: the call takes no argument and touches no memory of ours.
    let version = unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION.into(), 0) };
    if version < 0 {
        return Err(std::io::Error::last_os_error()).named("KVM_GET_API_VERSION");
    }
    Ok(version)
}

fn open() -> Result<File, CallError> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .named("open /dev/kvm")
}

/// One entry of a CPUID table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidEntry {
    /// The leaf: what the guest puts into EAX.
    pub function: u32,
    /// The sub-leaf: what it puts into ECX.
    pub index: u32,
    /// The answer in EAX.
    pub eax: u32,
    /// The answer in EBX.
    pub ebx: u32,
    /// The answer in ECX.
    pub ecx: u32,
    /// The answer in EDX.
    pub edx: u32,
}

/// `struct kvm_cpuid_entry2` (`asm/kvm.h`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawEntry {
    function: u32,
    index: u32,
    flags: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
    padding: [u32; 3],
}

/// The most entries that the kernel writes (`KVM_MAX_CPUID_ENTRIES`).
const CPUID_ENTRIES: usize = 256;

/// `struct kvm_cpuid2` with room for them.
#[repr(C)]
struct RawTable {
    count: u32,
    padding: u32,
    entries: [RawEntry; CPUID_ENTRIES],
}

const _: () = assert!(size_of::<RawEntry>() == 40);
const _: () = assert!(std::mem::offset_of!(RawTable, entries) == 8);

/// `_IOWR(KVMIO, 0x05, struct kvm_cpuid2)`; the table behind the head is not counted.
const KVM_GET_SUPPORTED_CPUID: Opcode = ioctl::opcode::read_write::<[u32; 2]>(0xAE, 0x05);

/// What KVM can show to a guest of this processor's CPUID: what CH starts from when it makes
/// a guest's table, and what it compares a snapshot's with.
///
/// # Errors
/// Those of [`api_version`], `ENOTTY` on other architectures.
#[doc(alias = "KVM_GET_SUPPORTED_CPUID")]
pub fn supported_cpuid() -> Result<Vec<CpuidEntry>, CallError> {
    let device = open()?;
    let mut table = Box::new(RawTable {
        count: CPUID_ENTRIES as u32,
        padding: 0,
        entries: [RawEntry::default(); CPUID_ENTRIES],
    });
    let argument: *mut RawTable = &raw mut *table;
    // SAFETY: the argument points to a `kvm_cpuid2` of ours that lives through the call and
    // has room for the number of entries that its head says; the kernel writes no more.
    let outcome =
        unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_SUPPORTED_CPUID.into(), argument) };
    if outcome < 0 {
        return Err(std::io::Error::last_os_error()).named("KVM_GET_SUPPORTED_CPUID");
    }
    let count = (table.count as usize).min(CPUID_ENTRIES);
    let entries = table.entries[..count].iter().map(|raw| CpuidEntry {
        function: raw.function,
        index: raw.index,
        eax: raw.eax,
        ebx: raw.ebx,
        ecx: raw.ecx,
        edx: raw.edx,
    });
    Ok(entries.collect())
}
