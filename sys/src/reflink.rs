//! Files that share their blocks until one of them is written to (XFS, btrfs and others).

use std::os::fd::AsFd;

use rustix::io::Errno;

use crate::error::{CallError, Named};

/// Why the kernel can share blocks at all, but not between these two files (ioctl_ficlone(2)):
/// another file system, one that cannot, a kernel or a kind of file that does not know it.
const UNSUPPORTED: [Errno; 5] = [
    Errno::XDEV,
    Errno::OPNOTSUPP,
    Errno::INVAL,
    Errno::NOTTY,
    Errno::NOSYS,
];

/// Lets `to` have all blocks of `source` in place of its own. What was written to the source is
/// brought to the disk first: unwritten extents may be missed. Blocks for that.
///
/// # Errors
/// That of `fdatasync`, or of `FICLONE`, where [`is_unsupported`] tells whether a copy would
/// do better.
#[doc(alias = "FICLONE")]
pub fn clone_file(source: impl AsFd, to: impl AsFd) -> Result<(), CallError> {
    rustix::fs::fdatasync(&source).named("fdatasync")?;
    rustix::fs::ioctl_ficlone(to, source).named("FICLONE")
}

/// Whether [`clone_file`] failed because blocks cannot be shared here.
#[must_use]
pub fn is_unsupported(error: &CallError) -> bool {
    error.call() == "FICLONE"
        && UNSUPPORTED
            .iter()
            .any(|errno| errno.raw_os_error() == error.errno())
}

/// [`clone_file`] for those who can make a copy instead: whether the kernel could.
///
/// # Errors
/// As [`clone_file`], but for what [`is_unsupported`] names.
pub fn try_clone_file(source: impl AsFd, to: impl AsFd) -> Result<bool, CallError> {
    match clone_file(source, to) {
        Err(error) if is_unsupported(&error) => Ok(false),
        other => other.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_shared_is_told_from_what_failed() {
        let to = tempfile("to");
        let null = std::fs::File::open("/dev/null").unwrap();
        // /dev/null cannot be synced, which is no word about sharing.
        let error = clone_file(&null, &to).unwrap_err();
        assert_eq!(error.call(), "fdatasync");
        assert!(!is_unsupported(&error), "{error}");
        let elsewhere = std::fs::File::open("/proc/self/exe").unwrap();
        match clone_file(&elsewhere, &to) {
            Ok(()) => assert!(try_clone_file(&elsewhere, &to).unwrap()),
            Err(error) => {
                assert!(is_unsupported(&error), "{error}");
                assert!(!try_clone_file(&elsewhere, &to).unwrap());
            }
        }
        let full = CallError::new("FICLONE", Errno::NOSPC);
        assert!(!is_unsupported(&full));
    }

    fn tempfile(name: &str) -> std::fs::File {
        let name = format!("rewake-reflink-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = std::fs::File::create(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }
}
