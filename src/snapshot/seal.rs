//! What CH wrote becomes a snapshot: complete, checked, and as durable as the caller asks.
//!
//! `vm.snapshot` writes into a staging directory without `fsync`, and a full disk can leave a
//! torn file behind a 204. [`seal`] puts the memory file beside what was written, reads all of
//! it as [`SnapshotDir::open`] does, and syncs; [`install`] gives the directory its name. A
//! crash or power loss leaves one of these:
//!
//! | after | on the disk | under the final name |
//! |---|---|---|
//! | any call of [`seal`] | a staging directory, whole or not, which nobody opens | nothing new |
//! | the rename in [`install`], before the sync of its parent | either name | nothing, or the whole snapshot |
//! | the sync of its parent | the final name | the whole snapshot |
//!
//! With [`Durability::Warm`] the same holds for crashes of programs, and after a power loss
//! nothing is promised but that a torn snapshot is refused when it is opened, or ends before
//! its memory. (Its pages may be stale; whoever cares for power losses asks for
//! [`Durability::Synced`].)

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rewake_sys::reflink;
use rustix::fs::{self, AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::dir::{CONFIG_FILE, STATE_FILE, SnapshotDir, SnapshotError, SnapshotLimits};
use super::extents::{CopyError, copy_sparse};
use super::image::{MEMORY_FILE, ZONE_FILE};
use crate::fault::Faults;
use crate::units::Bytes;

/// When a snapshot counts as kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// When the kernel has it: it survives every program, not a power loss.
    Warm,
    /// When the disk has it.
    #[default]
    Synced,
}

/// The memory of the VM that was snapshotted.
#[derive(Debug, Clone, Copy, Default)]
pub enum SealedMemory<'a> {
    /// CH wrote it into the staging directory, or it stays where the configuration says.
    #[default]
    Written,
    /// It is this file, which the VM writes to and which from now on belongs to the snapshot:
    /// it gets a second name. The VM must not run again from here.
    Linked(BorrowedFd<'a>),
    /// It is this file, of which the snapshot gets a copy: by reflink where the file system
    /// can, else extent by extent. The VM must stay paused until [`seal`] returns.
    Copied(BorrowedFd<'a>),
}

/// How a snapshot is sealed.
#[derive(Debug, Clone, Default)]
pub struct Seal<'a> {
    /// Where its memory is.
    pub memory: SealedMemory<'a>,
    /// What is promised.
    pub durability: Durability,
    /// The bounds of what is read.
    pub limits: SnapshotLimits,
    /// A shim for tests.
    pub faults: Faults,
}

/// Why a snapshot could not be sealed. The staging directory is what it was, or has a memory
/// file more: its maker removes it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// A call failed.
    #[error("Cannot seal {}: {call}", path.display())]
    Call {
        /// The file or directory.
        path: PathBuf,
        /// The call.
        call: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// Memory could not be copied.
    #[error("Cannot copy memory to {}", path.display())]
    Copy {
        /// The copy.
        path: PathBuf,
        /// Why.
        #[source]
        source: CopyError,
    },
    /// What is in the staging directory is no snapshot.
    #[error("What was written to {} is no snapshot", path.display())]
    NoSnapshot {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<SnapshotError>,
    },
    /// CH wrote no memory, and there is no file that it would be in.
    #[error("There is no memory in {}", path.display())]
    NoMemory {
        /// The directory.
        path: PathBuf,
    },
    /// The disk has less room than the snapshot may take.
    #[error("{} has room for {free}, the snapshot may take {needed}", path.display())]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// What is free for this user.
        free: Bytes,
        /// What may be needed.
        needed: Bytes,
    },
}

impl SealError {
    /// Whether it is the disk that is full.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            Self::Call { source, .. } => matches!(*source, Errno::NOSPC | Errno::DQUOT),
            Self::Copy { source, .. } => matches!(source.errno(), Errno::NOSPC | Errno::DQUOT),
            _ => false,
        }
    }
}

/// Room for `config.json` and `state.json` in [`require_space`].
const SMALL_FILES: Bytes = Bytes::mib(4);

/// Checks that there is room for a snapshot, before CH writes one: it does not notice when
/// there is none. `memory` is what CH will write of RAM, nothing where it is in a file.
///
/// # Errors
/// [`SealError::NoSpace`]; [`SealError::Call`] if the file system does not say.
pub fn require_space(directory: &Path, memory: Bytes) -> Result<(), SealError> {
    let found = fs::statvfs(directory).map_err(call(directory, "statvfs"))?;
    let free = Bytes(found.f_bavail.saturating_mul(found.f_frsize));
    let needed = Bytes(memory.0.saturating_add(SMALL_FILES.0));
    if free < needed {
        return Err(SealError::NoSpace {
            path: directory.to_owned(),
            free,
            needed,
        });
    }
    Ok(())
}

/// Finishes what CH wrote into `staging`. Blocks for the copy and the syncs that were asked
/// for; a linked file whose pages are on the disk already costs next to nothing.
///
/// # Errors
/// [`SealError`].
pub fn seal(staging: &Path, how: &Seal<'_>) -> Result<SnapshotDir, SealError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory =
        fs::openat(CWD, staging, flags, Mode::empty()).map_err(call(staging, "openat"))?;
    match how.memory {
        SealedMemory::Written => {}
        SealedMemory::Linked(own) => link(&directory, staging, own, &how.faults)?,
        SealedMemory::Copied(own) => copy(&directory, staging, own, &how.faults)?,
    }
    let snapshot =
        SnapshotDir::open(staging, &how.limits).map_err(|source| SealError::NoSnapshot {
            path: staging.to_owned(),
            source: Box::new(source),
        })?;
    let needs_file = !matches!(how.memory, SealedMemory::Written);
    if needs_file && snapshot.memory().is_none() {
        return Err(SealError::NoMemory {
            path: staging.to_owned(),
        });
    }
    if how.durability == Durability::Synced {
        sync_all(&directory, staging, &how.faults)?;
    }
    Ok(snapshot)
}

/// Gives a sealed staging directory its name. Nothing is ever replaced.
///
/// # Errors
/// [`SealError::Call`], with `EEXIST` where the name is taken. After an error of the last
/// step, the sync of the parent, the snapshot has its name, but may lose it in a power loss.
pub fn install(
    staging: &Path,
    target: &Path,
    durability: Durability,
    faults: &Faults,
) -> Result<(), SealError> {
    faults
        .call("snapshot.rename", || {
            fs::renameat_with(CWD, staging, CWD, target, RenameFlags::NOREPLACE)
        })
        .map_err(call(target, "renameat2"))?;
    if durability == Durability::Warm {
        return Ok(());
    }
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = fs::openat(CWD, parent, flags, Mode::empty()).map_err(call(parent, "openat"))?;
    faults
        .call("snapshot.sync-parent", || fs::fsync(&opened))
        .map_err(call(parent, "fsync"))
}

/// The file that a VM in `Map` or `Shared` has its memory in, whatever it is called now,
/// opened with `O_PATH`.
///
/// It is the one that the process has both open and mapped (`/proc/PID/fd`, `/proc/PID/maps`),
/// so it does not matter how it got there.
///
/// # Errors
/// [`SealError::Call`]: the process is gone or somebody else's, or has no such file (`ENOENT`).
pub fn memory_of(pid: u32) -> Result<OwnedFd, SealError> {
    let maps = PathBuf::from(format!("/proc/{pid}/maps"));
    let failed = |path: &Path, call: &'static str, error: &std::io::Error| SealError::Call {
        path: path.to_owned(),
        call,
        source: Errno::from_io_error(error).unwrap_or(Errno::IO),
    };
    let text = std::fs::read(&maps).map_err(|error| failed(&maps, "read", &error))?;
    let mappings = crate::memory::parse(&text).map_err(|_| call(&maps, "read")(Errno::BADMSG))?;
    let is_mapped = |inode: u64| {
        let mut files = mappings.iter().filter(|mapping| mapping.has_file());
        files.any(|mapping| mapping.inode == inode)
    };
    let fds = PathBuf::from(format!("/proc/{pid}/fd"));
    let entries = std::fs::read_dir(&fds).map_err(|error| failed(&fds, "open", &error))?;
    for entry in entries.flatten() {
        let path = entry.path();
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        // It may be closed by now, and then it is not the one.
        let Ok(fd) = fs::openat(CWD, &path, flags, Mode::empty()) else {
            continue;
        };
        let stat = fs::fstat(&fd).map_err(call(&path, "fstat"))?;
        let regular = fs::FileType::from_raw_mode(stat.st_mode) == fs::FileType::RegularFile;
        if regular && is_mapped(stat.st_ino) {
            return Ok(fd);
        }
    }
    Err(call(&fds, "openat")(Errno::NOENT))
}

/// A second name for the memory file.
fn link(
    directory: &OwnedFd,
    staging: &Path,
    own: BorrowedFd<'_>,
    faults: &Faults,
) -> Result<(), SealError> {
    let source = proc_path(own);
    faults
        .call("snapshot.link", || {
            fs::linkat(CWD, &source, directory, ZONE_FILE, AtFlags::SYMLINK_FOLLOW)
        })
        .map_err(call(&staging.join(ZONE_FILE), "linkat"))
}

/// A copy of the memory file.
fn copy(
    directory: &OwnedFd,
    staging: &Path,
    own: BorrowedFd<'_>,
    faults: &Faults,
) -> Result<(), SealError> {
    let path = staging.join(ZONE_FILE);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let own =
        fs::openat(CWD, proc_path(own), flags, Mode::empty()).map_err(call(&path, "openat"))?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let copy = faults
        .call("snapshot.create", || {
            fs::openat(directory, ZONE_FILE, flags, Mode::RUSR | Mode::WUSR)
        })
        .map_err(call(&path, "openat"))?;
    let cloned = faults.syscall("snapshot.clone", || reflink::clone_file(&own, &copy));
    if cloned.is_ok() {
        return Ok(());
    }
    faults
        .call("snapshot.copy", || copy_sparse(&own, &copy))
        .map_err(|source| SealError::Copy { path, source })
}

fn sync_all(directory: &OwnedFd, staging: &Path, faults: &Faults) -> Result<(), SealError> {
    for name in [ZONE_FILE, MEMORY_FILE, CONFIG_FILE, STATE_FILE] {
        let path = staging.join(name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match fs::openat(directory, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => continue,
            file => file.map_err(call(&path, "openat"))?,
        };
        faults
            .call("snapshot.sync-file", || fs::fsync(&file))
            .map_err(call(&path, "fsync"))?;
    }
    faults
        .call("snapshot.sync-directory", || fs::fsync(directory))
        .map_err(call(staging, "fsync"))
}

/// Leads to what the descriptor is of, whatever that is called.
fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

fn call(path: &Path, call: &'static str) -> impl FnOnce(Errno) -> SealError {
    let path = path.to_owned();
    move |source| SealError::Call { path, call, source }
}
