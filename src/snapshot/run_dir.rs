//! The snapshot directory that CH is given: made anew for one restore.
//!
//! CH opens what it restores by path. So it gets a directory that nobody else writes to, with
//! exactly the bytes that were checked, and with the memory file as a link to a descriptor
//! that it inherits: what was checked is what is used.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use super::dir::{CONFIG_FILE, STATE_FILE};
use super::image::MEMORY_FILE;
use crate::vm_config::VmConfig;

/// What goes into a run directory.
#[derive(Debug, Clone, Copy)]
pub struct RunFiles<'a> {
    /// The configuration, rewritten.
    pub config: &'a VmConfig,
    /// The bytes of `state.json`: as checked, or rewritten.
    pub state: &'a [u8],
    /// Where `memory-ranges` shall point: `/proc/self/fd/N` for the descriptor N that CH
    /// inherits. `None` where no memory is to be read.
    pub memory: Option<&'a Path>,
}

/// Why a run directory could not be made. What had been made of it is gone again, but for
/// [`RunDirError::left`].
#[derive(Debug, thiserror::Error)]
#[error("Cannot make {} in {}: {call}", name.to_string_lossy(), path.display())]
pub struct RunDirError {
    path: PathBuf,
    name: Box<OsStr>,
    call: &'static str,
    #[source]
    source: RunDirCause,
    left: Vec<PathBuf>,
}

/// What failed underneath.
#[derive(Debug, thiserror::Error)]
pub enum RunDirCause {
    /// The kernel refused a call.
    #[error(transparent)]
    Call(#[from] Errno),
    /// The configuration cannot be written as JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

impl RunDirError {
    /// Whether something of that name is there already.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        matches!(self.source, RunDirCause::Call(Errno::EXIST))
    }

    /// What could not be removed again.
    #[must_use]
    pub fn left(&self) -> &[PathBuf] {
        &self.left
    }
}

/// A directory that CH can restore from. It stays when this value is dropped: whoever made it
/// notes that in a ledger, or calls [`RunDir::remove`].
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    directory: OwnedFd,
}

impl RunDir {
    /// Makes the directory `path`, which must not exist, and its files.
    ///
    /// The directory has mode 0700 and the files 0600. Nothing is synced: the place for it is
    /// a tmpfs, and after a crash of the machine there is no VM to restore.
    ///
    /// # Errors
    /// [`RunDirError`], after which the directory is gone again. A directory that was there
    /// already is left alone.
    pub fn create(path: &Path, files: &RunFiles<'_>) -> Result<Self, RunDirError> {
        let error = |name: &str, call, source, left| RunDirError {
            path: path.to_owned(),
            name: OsStr::new(name).into(),
            call,
            source,
            left,
        };
        let config = serde_json::to_vec(files.config)
            .map_err(|source| error(CONFIG_FILE, "serialise", source.into(), Vec::new()))?;
        fs::mkdirat(CWD, path, Mode::RWXU)
            .map_err(|errno| error(".", "mkdirat", errno.into(), Vec::new()))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = match fs::openat(CWD, path, flags, Mode::empty()) {
            Ok(directory) => directory,
            Err(errno) => {
                let left = match fs::unlinkat(CWD, path, AtFlags::REMOVEDIR) {
                    Ok(()) => Vec::new(),
                    Err(_) => vec![path.to_owned()],
                };
                return Err(error(".", "openat", errno.into(), left));
            }
        };
        let run_dir = Self {
            path: path.to_owned(),
            directory,
        };
        match run_dir.fill(&config, files) {
            Ok(()) => Ok(run_dir),
            Err((name, call, errno)) => {
                let left = run_dir.remove().err().map(|left| left.path);
                Err(error(name, call, errno.into(), left.into_iter().collect()))
            }
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the three files, then the directory. What is gone already counts as removed.
    ///
    /// # Errors
    /// [`RemoveError`], for example where somebody else put a file into it.
    pub fn remove(self) -> Result<(), RemoveError> {
        let error = |name: &str, source| RemoveError {
            path: self.path.join(name),
            source,
        };
        for name in [CONFIG_FILE, STATE_FILE, MEMORY_FILE] {
            match fs::unlinkat(&self.directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(error(name, errno)),
            }
        }
        match fs::unlinkat(CWD, &self.path, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(source) => Err(RemoveError {
                path: self.path,
                source,
            }),
        }
    }

    fn fill(
        &self,
        config: &[u8],
        files: &RunFiles<'_>,
    ) -> Result<(), (&'static str, &'static str, Errno)> {
        write_new(&self.directory, CONFIG_FILE, config)?;
        write_new(&self.directory, STATE_FILE, files.state)?;
        if let Some(target) = files.memory {
            fs::symlinkat(target, &self.directory, MEMORY_FILE)
                .map_err(|errno| (MEMORY_FILE, "symlinkat", errno))?;
        }
        Ok(())
    }
}

impl AsFd for RunDir {
    /// The directory, opened with `O_PATH`.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// A run directory, or a file of it, could not be removed.
#[derive(Debug, thiserror::Error)]
#[error("Cannot remove {}", path.display())]
pub struct RemoveError {
    path: PathBuf,
    #[source]
    source: Errno,
}

/// Writes a file that did not exist before.
fn write_new(
    directory: &OwnedFd,
    name: &'static str,
    mut bytes: &[u8],
) -> Result<(), (&'static str, &'static str, Errno)> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| (name, "openat", errno))?;
    while !bytes.is_empty() {
        match rustix::io::write(&file, bytes) {
            // A regular file takes something or fails.
            Ok(0) => return Err((name, "write", Errno::IO)),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err((name, "write", errno)),
        }
    }
    Ok(())
}
