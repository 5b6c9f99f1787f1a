//! Files that are mapped only to be seen: in `/proc/PID/maps`, where others look for them.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::error::{CallError, Named};

/// A file in the address space of this process that nobody may read or write there
/// (`PROT_NONE`). Unmapped when dropped.
#[derive(Debug)]
pub struct MappedFile {
    start: *mut libc::c_void,
    length: usize,
}

// SAFETY: nobody reaches memory through the pointer. It is only unmapped, once.
unsafe impl Send for MappedFile {}
// SAFETY: the same.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps `length` bytes from the file's beginning, `MAP_SHARED` or `MAP_PRIVATE`.
    ///
    /// # Errors
    /// What `mmap` says; `EINVAL` for a length of 0.
    #[doc(alias = "mmap")]
    pub fn new(file: BorrowedFd<'_>, length: usize, shared: bool) -> Result<Self, CallError> {
        let kind = if shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        let (anywhere, fd) = (std::ptr::null_mut(), file.as_raw_fd());
        // SAFETY: a new mapping where the kernel likes; no memory of ours is touched.
        let start = unsafe { libc::mmap(anywhere, length, libc::PROT_NONE, kind, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).named("mmap");
        }
        Ok(Self { start, length })
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and nobody reaches it.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_mapped_file_is_seen_and_gone_when_dropped() {
        let path = std::env::temp_dir().join(format!("rewake-mapped-{}", std::process::id()));
        std::fs::write(&path, [7; 100]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let is_seen = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            maps.contains(path.to_str().unwrap())
        };
        for shared in [true, false] {
            let mapped = MappedFile::new(file.as_fd(), 4096, shared).unwrap();
            assert!(is_seen());
            drop(mapped);
            assert!(!is_seen());
        }
        let refused = MappedFile::new(file.as_fd(), 0, true).unwrap_err();
        assert_eq!(refused.errno(), libc::EINVAL);
        std::fs::remove_file(&path).unwrap();
    }
}
