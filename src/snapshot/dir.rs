//! Opening a snapshot directory that nobody vouches for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, CWD, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::check::{self, Mismatch};
use super::image::{
    ClaimError, MEMORY_FILE, MemoryAccess, MemoryClaim, MemoryFile, ZONE_FILE, open_regular,
    size_of,
};
use super::layout::{MemoryLayout, MemorySource, NotMappable};
use super::state::{State, StateError, StateLimits};
use crate::units::Bytes;
use crate::vm_config::VmConfig;
use crate::wire::json::{JsonError, UnknownKeys};

/// The name of the VM's configuration in a snapshot directory.
pub const CONFIG_FILE: &str = "config.json";
/// The name of the device states.
pub const STATE_FILE: &str = "state.json";

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
    /// There is both RAM that CH saved and the file of a memory zone. A guest has its memory
    /// in one of them, and which one cannot be told.
    #[error("There is {MEMORY_FILE} and {ZONE_FILE}")]
    TwoMemoryFiles,
    /// Where each part of RAM is in the file of the memory zone cannot be told.
    #[error("{ZONE_FILE} cannot be the memory of this machine")]
    ZoneLayout(#[source] NotMappable),
    /// The file of the memory zone ends before the RAM that it must hold. CH would not notice.
    #[error("{ZONE_FILE} has {actual}, but its mappings end at {needed}")]
    ZoneFileShort {
        /// The end of the last mapping.
        needed: Bytes,
        /// The length of the file.
        actual: Bytes,
    },
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
        let memory = open_memory(&directory, &config, &state)?;
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

    /// The memory file; `None` where the snapshot saved no memory and has none: it is in a
    /// file that the configuration names, then.
    #[must_use]
    pub fn memory(&self) -> Option<&MemoryFile> {
        self.memory.as_ref()
    }

    /// Where each part of RAM is in [`Self::memory`].
    ///
    /// # Errors
    /// [`NotMappable`]: why it cannot be mapped from one file.
    pub fn layout(&self) -> Result<MemoryLayout, NotMappable> {
        MemoryLayout::analyse(&self.config, self.state.memory())
    }

    /// Takes the memory file for a use, by a lock that everybody sees. `None` where there is
    /// no memory file. Never waits.
    ///
    /// # Errors
    /// [`ClaimError`]: in use, gone, or not writable.
    pub fn claim(&self, access: MemoryAccess) -> Result<Option<MemoryClaim>, ClaimError> {
        let memory = self.memory.as_ref();
        memory
            .map(|memory| memory.claim(&self.directory, access))
            .transpose()
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

/// Opens the file that holds RAM, and compares its length with what must be in it.
fn open_memory(
    directory: &OwnedFd,
    config: &VmConfig,
    state: &State,
) -> Result<Option<MemoryFile>, SnapshotError> {
    let expected = state.memory().saved().0;
    let saved = MemoryFile::open(directory, MEMORY_FILE)?;
    let zone = MemoryFile::open(directory, ZONE_FILE)?;
    match (saved, zone) {
        (None, None) if expected == 0 => Ok(None),
        (None, None) => Err(SnapshotError::MemoryMissing { expected }),
        (Some(file), None) if file.size().0 == expected => Ok(Some(file)),
        (Some(file), None) => Err(SnapshotError::MemorySize {
            expected,
            actual: file.size().0,
        }),
        (None, Some(file)) => {
            let layout = MemoryLayout::analyse(config, state.memory());
            let layout = layout.map_err(SnapshotError::ZoneLayout)?;
            if !matches!(layout.source(), MemorySource::ZoneFile(_)) {
                return Err(SnapshotError::MemoryMissing { expected });
            }
            let (needed, actual) = (layout.file_size(), file.size());
            if actual < needed {
                return Err(SnapshotError::ZoneFileShort { needed, actual });
            }
            Ok(Some(file))
        }
        (Some(_), Some(_)) => Err(SnapshotError::TwoMemoryFiles),
    }
}
