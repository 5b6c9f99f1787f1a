//! The file that holds a snapshot's RAM, and who may use it meanwhile.
//!
//! A memory file is used by processes that outlive the program that started them: clones map
//! a template's file, a sandbox writes to its own. So who uses it is told by a lock of the
//! open file description (`flock(2)`) that Cloud Hypervisor inherits: every process sees it,
//! and it ends with Cloud Hypervisor, however that ends.
//!
//! | use | lock |
//! |---|---|
//! | a private mapping; reading on restore | shared |
//! | a shared mapping, that is, writing | exclusive |
//! | removing or replacing it ([`reserve`]) | exclusive, never waited for |

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, CWD, FileType, FlockOperation, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::dir::SnapshotError;
use crate::units::Bytes;

/// The name of RAM as CH saved it.
pub const MEMORY_FILE: &str = "memory-ranges";
/// The name of the file that a shared memory zone mapped, so that CH saved nothing.
pub const ZONE_FILE: &str = "memory";

/// `f_type` of hugetlbfs (`linux/magic.h`, `HUGETLBFS_MAGIC`).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// The memory file of a snapshot, as it was checked.
#[derive(Debug)]
pub struct MemoryFile {
    name: &'static str,
    fd: OwnedFd,
    stat: Stat,
    on_hugetlbfs: bool,
}

impl MemoryFile {
    /// Opens one of the two names beneath `directory`; `None` where it is not there.
    pub(super) fn open(
        directory: &OwnedFd,
        name: &'static str,
    ) -> Result<Option<Self>, SnapshotError> {
        let Some((fd, stat)) = open_regular(directory, name)? else {
            return Ok(None);
        };
        let filesystem =
            fs::fstatfs(&fd).map_err(|source| SnapshotError::Open { file: name, source })?;
        // The kernel's type for it differs between architectures; the number does not.
        let magic = filesystem.f_type as u64 & 0xffff_ffff;
        Ok(Some(Self {
            name,
            fd,
            stat,
            on_hugetlbfs: magic == HUGETLBFS_MAGIC,
        }))
    }

    /// Its name in the directory: [`MEMORY_FILE`] or [`ZONE_FILE`].
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The length.
    #[must_use]
    pub fn size(&self) -> Bytes {
        Bytes(size_of(&self.stat))
    }

    /// The bytes that the file takes on disk; less than [`Self::size`] where it has holes.
    #[must_use]
    pub fn allocated(&self) -> Bytes {
        // st_blocks counts 512 bytes whatever the filesystem (stat(2)).
        Bytes(
            u64::try_from(self.stat.st_blocks)
                .unwrap_or(0)
                .saturating_mul(512),
        )
    }

    /// Whether it is made of huge pages, which a zone of base pages cannot map.
    #[must_use]
    pub const fn is_on_hugetlbfs(&self) -> bool {
        self.on_hugetlbfs
    }

    /// Checks that the length is still the one that was checked.
    ///
    /// A file can be cut after it was opened. CH would read zeros, or die with SIGBUS; so this
    /// is worth asking right before CH starts. It does not replace leaving the file alone.
    ///
    /// # Errors
    /// [`SnapshotError::Changed`], or [`SnapshotError::Open`] if `fstat` fails.
    pub fn check_unchanged(&self) -> Result<(), SnapshotError> {
        let file = self.name;
        let now = fs::fstat(&self.fd).map_err(|source| SnapshotError::Open { file, source })?;
        if size_of(&now) == size_of(&self.stat) {
            Ok(())
        } else {
            Err(SnapshotError::Changed { file })
        }
    }

    /// Takes the file for a use. It is opened once more beneath `directory`, so that the lock
    /// is of a description that can be handed on alone.
    pub(super) fn claim(
        &self,
        directory: &OwnedFd,
        access: MemoryAccess,
    ) -> Result<MemoryClaim, ClaimError> {
        let file = self.name;
        let call = |call| move |source| ClaimError::Call { file, call, source };
        let mode = match access {
            MemoryAccess::Read => OFlags::RDONLY,
            MemoryAccess::Own => OFlags::RDWR,
        };
        let flags = mode | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = match fs::openat2(directory, file, flags, Mode::empty(), BENEATH) {
            Ok(fd) => fd,
            Err(source @ (Errno::ACCESS | Errno::PERM | Errno::ROFS))
                if access == MemoryAccess::Own =>
            {
                return Err(ClaimError::NotWritable { file, source });
            }
            Err(source) => return Err(call("openat2")(source)),
        };
        lock(&fd, access).map_err(|errno| match errno {
            Errno::WOULDBLOCK => ClaimError::Busy { file },
            source => call("flock")(source),
        })?;
        // Only now is it sure that nobody is about to remove it.
        let stat = fs::fstat(&fd).map_err(call("fstat"))?;
        let same = (stat.st_dev, stat.st_ino) == (self.stat.st_dev, self.stat.st_ino);
        if !same || stat.st_nlink == 0 {
            return Err(ClaimError::Gone { file });
        }
        Ok(MemoryClaim { fd, file, access })
    }
}

impl AsFd for MemoryFile {
    /// The open file: read-only, close-on-exec, without a lock.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a memory file is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryAccess {
    /// To read it, or to map it privately: beside others who do.
    Read,
    /// To write to it: alone.
    Own,
}

/// Why a memory file cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClaimError {
    /// Running VMs, or somebody who removes it, hold it.
    #[error("{file} is in use")]
    Busy {
        /// Its name.
        file: &'static str,
    },
    /// It may not be written to.
    #[error("{file} cannot be opened for writing")]
    NotWritable {
        /// Its name.
        file: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// It was removed or replaced since it was checked.
    #[error("{file} was removed or replaced")]
    Gone {
        /// Its name.
        file: &'static str,
    },
    /// A call failed.
    #[error("Cannot take {file}: {call}")]
    Call {
        /// Its name.
        file: &'static str,
        /// The call.
        call: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
}

impl ClaimError {
    /// Whether others use the file.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }
}

/// A memory file that was taken for a use, by a lock of its open file description.
///
/// The lock lasts until every copy of the descriptor is closed: a process that inherits it
/// holds it for as long as it lives.
#[derive(Debug)]
pub struct MemoryClaim {
    fd: OwnedFd,
    file: &'static str,
    access: MemoryAccess,
}

impl MemoryClaim {
    /// What it was taken for.
    #[must_use]
    pub const fn access(&self) -> MemoryAccess {
        self.access
    }

    /// Gives up writing, and goes on as a reader. Others may have it in between: the kernel
    /// does not exchange locks in one step.
    ///
    /// # Errors
    /// [`ClaimError::Busy`], after which nothing is held.
    pub fn into_reader(mut self) -> Result<Self, ClaimError> {
        let file = self.file;
        lock(&self.fd, MemoryAccess::Read).map_err(|errno| match errno {
            Errno::WOULDBLOCK => ClaimError::Busy { file },
            source => ClaimError::Call {
                file,
                call: "flock",
                source,
            },
        })?;
        self.access = MemoryAccess::Read;
        Ok(self)
    }
}

impl AsFd for MemoryClaim {
    /// The locked open file, close-on-exec.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The memory files of a directory, kept from everybody else: nobody can begin to use them
/// while this lives.
#[derive(Debug)]
pub struct Reserved {
    _locked: Vec<OwnedFd>,
}

/// The memory file of a directory is in use, or cannot be looked at.
#[derive(Debug, thiserror::Error)]
#[error("Cannot have the memory of {} alone", path.display())]
pub struct ReserveError {
    path: PathBuf,
    #[source]
    source: ClaimError,
}

impl ReserveError {
    /// Whether running VMs use it.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        self.source.is_busy()
    }
}

/// Takes the memory files of a snapshot directory for somebody who will remove or replace
/// them. Never waits. A directory without memory files is reserved, too.
///
/// # Errors
/// [`ReserveError`]: in use by a running VM, or not accessible.
pub fn reserve(directory: &Path) -> Result<Reserved, ReserveError> {
    let refuse = |source| ReserveError {
        path: directory.to_owned(),
        source,
    };
    let failed = |file, call, source| refuse(ClaimError::Call { file, call, source });
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = fs::openat(CWD, directory, flags, Mode::empty())
        .map_err(|errno| failed(".", "openat", errno))?;
    let mut locked = Vec::new();
    for file in [ZONE_FILE, MEMORY_FILE] {
        let found = match fs::statat(&opened, file, fs::AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            found => found.map_err(|errno| failed(file, "statat", errno))?,
        };
        // Nobody maps what is not a regular file.
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = fs::openat2(&opened, file, flags, Mode::empty(), BENEATH)
            .map_err(|errno| failed(file, "openat2", errno))?;
        match lock(&fd, MemoryAccess::Own) {
            Ok(()) => locked.push(fd),
            Err(Errno::WOULDBLOCK) => return Err(refuse(ClaimError::Busy { file })),
            Err(errno) => return Err(failed(file, "flock", errno)),
        }
    }
    Ok(Reserved { _locked: locked })
}

fn lock(fd: &OwnedFd, access: MemoryAccess) -> Result<(), Errno> {
    let operation = match access {
        MemoryAccess::Read => FlockOperation::NonBlockingLockShared,
        MemoryAccess::Own => FlockOperation::NonBlockingLockExclusive,
    };
    rustix::io::retry_on_intr(|| fs::flock(fd, operation))
}

/// Nothing outside the directory, no links of any kind.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// Opens a regular file beneath `directory` for reading; `None` if there is no such name.
///
/// The name is looked at with `O_PATH` first, because to open a device or FIFO can itself have
/// an effect. That the second look found the same file is checked.
pub(super) fn open_regular(
    directory: &OwnedFd,
    file: &'static str,
) -> Result<Option<(OwnedFd, Stat)>, SnapshotError> {
    let open = |flags: OFlags| {
        let flags = flags | OFlags::CLOEXEC;
        let fd = fs::openat2(directory, file, flags, Mode::empty(), BENEATH)?;
        let stat = fs::fstat(&fd)?;
        Ok((fd, stat))
    };
    let refuse = |source: Errno| match source {
        Errno::LOOP => SnapshotError::SymbolicLink { file },
        source => SnapshotError::Open { file, source },
    };
    let (_, seen) = match open(OFlags::PATH) {
        Err(Errno::NOENT) => return Ok(None),
        result => result.map_err(refuse)?,
    };
    check_regular(file, &seen)?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let (fd, stat) = open(flags).map_err(refuse)?;
    check_regular(file, &stat)?;
    if (seen.st_dev, seen.st_ino) != (stat.st_dev, stat.st_ino) {
        return Err(SnapshotError::Changed { file });
    }
    Ok(Some((fd, stat)))
}

fn check_regular(file: &'static str, stat: &Stat) -> Result<(), SnapshotError> {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "a directory",
        FileType::Symlink => return Err(SnapshotError::SymbolicLink { file }),
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Unknown => "something unknown",
    };
    Err(SnapshotError::NotRegular { file, kind })
}

pub(super) fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}
