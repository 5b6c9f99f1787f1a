//! Opening a snapshot directory that nobody vouches for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, CWD, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::check::{self, Mismatch};
use super::state::{State, StateError, StateLimits};
use crate::units::Bytes;
use crate::vm_config::VmConfig;
use crate::wire::json::{JsonError, UnknownKeys};

/// The name of the VM's configuration in a snapshot directory.
pub const CONFIG_FILE: &str = "config.json";
/// The name of the device states.
pub const STATE_FILE: &str = "state.json";
/// The name of the saved memory.
pub const MEMORY_FILE: &str = "memory-ranges";

/// How much of a snapshot directory is accepted. Depth and size of `config.json` are bounded by
/// [`VmConfig::LIMITS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotLimits {
    /// Most bytes of `state.json`.
    pub max_state: Bytes,
    /// Bounds of the tree in `state.json`, and of the memory that it describes.
    pub state: StateLimits,
}

impl Default for SnapshotLimits {
    fn default() -> Self {
        Self {
            max_state: Bytes::mib(16),
            state: StateLimits::default(),
        }
    }
}

/// Why a snapshot directory was refused. Nothing was changed or created before.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The directory cannot be opened.
    #[error("Cannot open the snapshot directory {}", path.display())]
    OpenDirectory {
        /// The directory.
        path: PathBuf,
        /// The errno of `openat`.
        #[source]
        source: Errno,
    },
    /// A file cannot be opened.
    #[error("Cannot open {file}")]
    Open {
        /// The file's name in the directory.
        file: &'static str,
        /// The errno of `openat2` or `fstat`.
        #[source]
        source: Errno,
    },
    /// A file that every snapshot has is not there.
    #[error("There is no {file}")]
    Missing {
        /// The file's name.
        file: &'static str,
    },
    /// A name is a symbolic link. Links are never followed.
    #[error("{file} is a symbolic link")]
    SymbolicLink {
        /// The file's name.
        file: &'static str,
    },
    /// A name is neither a regular file nor a link.
    #[error("{file} is not a regular file but {kind}")]
    NotRegular {
        /// The file's name.
        file: &'static str,
        /// What it is: `a FIFO`, `a directory`, ...
        kind: &'static str,
    },
    /// A file is larger than its limit.
    #[error("{file} has {size}, the limit is {limit}")]
    TooLarge {
        /// The file's name.
        file: &'static str,
        /// Its size.
        size: Bytes,
        /// The limit.
        limit: Bytes,
    },
    /// A file changed while it was read.
    #[error("{file} changed while it was read")]
    Changed {
        /// The file's name.
        file: &'static str,
    },
    /// A file cannot be read.
    #[error("Cannot read {file}")]
    Read {
        /// The file's name.
        file: &'static str,
        /// The errno of `pread`.
        #[source]
        source: Errno,
    },
    /// `config.json` is refused.
    #[error("{CONFIG_FILE} is refused")]
    Config(#[source] JsonError),
    /// `config.json` has keys that no known version of CH has. What they mean cannot be
    /// judged, and to leave them out could change the machine.
    #[error("{CONFIG_FILE} has unknown keys: {keys}")]
    UnknownKeys {
        /// The keys, each with its path.
        keys: UnknownKeys,
    },
    /// `state.json` is refused.
    #[error("{STATE_FILE} is refused")]
    State(#[source] StateError),
    /// Configuration and state do not belong together.
    #[error("{CONFIG_FILE} and {STATE_FILE} contradict each other")]
    Mismatch(#[source] Mismatch),
    /// `state.json` says that memory was saved, but there is no memory file.
    #[error("{MEMORY_FILE} is missing, it must have {expected} bytes")]
    MemoryMissing {
        /// The sum of the saved ranges, in bytes.
        expected: u64,
    },
    /// The memory file is not as long as the saved ranges. CH would not notice: a short file
    /// reads as zeros.
    #[error("{MEMORY_FILE} has {actual} bytes, but the saved ranges have {expected}")]
    MemorySize {
        /// The sum of the saved ranges, in bytes.
        expected: u64,
        /// The length of the file, in bytes.
        actual: u64,
    },
}

/// The memory file of a snapshot, as it was checked.
#[derive(Debug)]
pub struct MemoryFile {
    fd: OwnedFd,
    stat: Stat,
}

impl MemoryFile {
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

    /// Checks that the length is still the one that was checked.
    ///
    /// A file can be cut after it was opened. CH would read zeros, or die with SIGBUS; so this
    /// is worth asking right before CH starts. It does not replace leaving the file alone.
    ///
    /// # Errors
    /// [`SnapshotError::Changed`], or [`SnapshotError::Open`] if `fstat` fails.
    pub fn check_unchanged(&self) -> Result<(), SnapshotError> {
        let file = MEMORY_FILE;
        let now = fs::fstat(&self.fd).map_err(|source| SnapshotError::Open { file, source })?;
        if size_of(&now) == size_of(&self.stat) {
            Ok(())
        } else {
            Err(SnapshotError::Changed { file })
        }
    }
}

impl AsFd for MemoryFile {
    /// The open file: read-only, close-on-exec.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A snapshot directory that passed every check.
///
/// It holds what was checked: configuration and state in memory, the memory file as a descriptor. What
/// happens to the directory afterwards does not matter, save that the memory file's content
/// can still be changed by whoever may write to it.
///
/// Other files in the directory are neither opened nor looked at.
#[derive(Debug)]
pub struct SnapshotDir {
    path: PathBuf,
    directory: OwnedFd,
    config: VmConfig,
    state: State,
    memory: Option<MemoryFile>,
}

impl SnapshotDir {
    /// Opens and checks a snapshot directory. It changes nothing.
    ///
    /// The directory is opened once, and each file beneath it by name from that descriptor,
    /// without following links; only regular files are read. Blocks for as long as the
    /// filesystem needs for the two small files; the memory file is not read.
    ///
    /// # Errors
    /// [`SnapshotError`]: which file, and why.
    pub fn open(path: &Path, limits: &SnapshotLimits) -> Result<Self, SnapshotError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = fs::openat(CWD, path, flags, Mode::empty()).map_err(|source| {
            SnapshotError::OpenDirectory {
                path: path.to_owned(),
                source,
            }
        })?;
        let config = read_file(
            &directory,
            CONFIG_FILE,
            Bytes(VmConfig::LIMITS.bytes as u64),
        )?;
        let (config, keys) = VmConfig::parse(&config).map_err(SnapshotError::Config)?;
        if !keys.is_empty() {
            return Err(SnapshotError::UnknownKeys { keys });
        }
        let state = read_file(&directory, STATE_FILE, limits.max_state)?;
        let state = State::parse(state, &limits.state).map_err(SnapshotError::State)?;
        check::check(&config, &state).map_err(SnapshotError::Mismatch)?;
        let memory = open_memory(&directory, state.memory().saved())?;
        Ok(Self {
            path: path.to_owned(),
            directory,
            config,
            state,
            memory,
        })
    }

    /// The path it was opened by. For messages only: the directory may have moved.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration, as recorded.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The checked `state.json`.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The memory file; `None` where the snapshot saved no memory and has none.
    #[must_use]
    pub fn memory(&self) -> Option<&MemoryFile> {
        self.memory.as_ref()
    }

    /// Gives up the memory file, to be handed to CH.
    #[must_use]
    pub fn into_memory(self) -> Option<MemoryFile> {
        self.memory
    }
}

impl AsFd for SnapshotDir {
    /// The directory, opened with `O_PATH`.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// Opens a regular file beneath `directory` for reading; `None` if there is no such name.
///
/// The name is looked at with `O_PATH` first, because to open a device or FIFO can itself have
/// an effect. That the second look found the same file is checked.
fn open_regular(
    directory: &OwnedFd,
    file: &'static str,
) -> Result<Option<(OwnedFd, Stat)>, SnapshotError> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let open = |flags: OFlags| {
        let fd = fs::openat2(
            directory,
            file,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )?;
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

/// Reads a whole file of at most `limit` bytes, and notices if it changes meanwhile.
fn read_file(
    directory: &OwnedFd,
    file: &'static str,
    limit: Bytes,
) -> Result<Vec<u8>, SnapshotError> {
    let (fd, before) = open_regular(directory, file)?.ok_or(SnapshotError::Missing { file })?;
    let size = Bytes(size_of(&before));
    let too_large = SnapshotError::TooLarge { file, size, limit };
    if size > limit {
        return Err(too_large);
    }
    let Ok(length) = usize::try_from(size.0) else {
        return Err(too_large);
    };
    // One byte more than the file has: filling it shows that the file grew.
    let mut bytes = vec![0; length + 1];
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::io::pread(&fd, &mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(source) => return Err(SnapshotError::Read { file, source }),
        }
    }
    let after = fs::fstat(&fd).map_err(|source| SnapshotError::Open { file, source })?;
    if filled != length || version(&before) != version(&after) {
        return Err(SnapshotError::Changed { file });
    }
    bytes.truncate(length);
    Ok(bytes)
}

/// What changes when a file's content does.
fn version(stat: &Stat) -> impl PartialEq + use<> {
    (
        stat.st_size,
        (stat.st_mtime, stat.st_mtime_nsec),
        (stat.st_ctime, stat.st_ctime_nsec),
    )
}

/// Opens the memory file, and compares its length with the saved ranges.
fn open_memory(directory: &OwnedFd, saved: Bytes) -> Result<Option<MemoryFile>, SnapshotError> {
    let expected = saved.0;
    match open_regular(directory, MEMORY_FILE)? {
        None if expected == 0 => Ok(None),
        None => Err(SnapshotError::MemoryMissing { expected }),
        Some((fd, stat)) if size_of(&stat) == expected => Ok(Some(MemoryFile { fd, stat })),
        Some((_, stat)) => Err(SnapshotError::MemorySize {
            expected,
            actual: size_of(&stat),
        }),
    }
}

fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}
