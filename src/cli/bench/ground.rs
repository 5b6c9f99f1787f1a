//! The ground that a run stands on: directories of its own, marked as its own, and a process
//! in which nothing outlives it.
//!
//! ```text
//!   TMP/rewake-bench-ID/
//!     lock             held as long as the run lives, the kernel frees it; names who waits for
//!                      it
//!     inside           the first process of its pid namespace
//!     bound            images elsewhere that were bound to loop devices
//!     ..               templates and disks
//!   /run/rewake-bench-ID/, or in /dev/shm: what rewake keeps in `/run`
//! ```
//!
//! The run itself is a child in a pid namespace and a mount namespace of its own: whatever
//! ends it, the kernel ends its processes and undoes its mounts, and with both its network
//! namespaces. What the kernel keeps (files, loop devices, device-mapper) is removed by the
//! process that waits for it, and where that died too, by the next run.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rewake::ids::SandboxId;
use rewake::resource::slot::ProcessIdentity;
use rewake_sys::contain::{Contained, Ended, contain};
use rewake_sys::process::{Exit, start_time};
use rewake_sys::{CallError, netns};
use rustix::fs::FlockOperation;
use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};

use super::sweep;
use crate::cli::{Failure, Global, report};

/// What the directories of all runs are called, before their ids.
pub(super) const PREFIX: &str = "rewake-bench-";
/// Held by a run that lives; names the process that waits for it.
pub(super) const LOCK: &str = "lock";
/// Names the first process of its pid namespace.
pub(super) const INSIDE: &str = "inside";
/// The images that it bound and that lie elsewhere, one a line, as JSON strings.
pub(super) const BOUND: &str = "bound";

/// A run could not begin, or did not end by itself.
#[derive(Debug, thiserror::Error)]
enum GroundError {
    #[error("Cannot give the run a process of its own")]
    Contain(#[source] CallError),
    #[error("Cannot wait for the run")]
    Wait(#[source] CallError),
    #[error("Cannot mark {path} as this run's")]
    Mark { path: PathBuf, source: io::Error },
    #[error("Cannot hide the names of others' network namespaces")]
    Mount(#[source] io::Error),
    #[error("The run was ended by {0}")]
    Killed(Exit),
    #[error("Left over: {0}")]
    LeftOver(String),
}

/// Directories of one run, and the lock on them.
#[derive(Debug)]
pub(super) struct Ground {
    /// Templates and disks.
    pub(super) dir: PathBuf,
    /// What rewake keeps in `/run`.
    pub(super) run: PathBuf,
    /// Tells what it makes in the kernel from what other runs make there.
    pub(super) tag: String,
    /// Held as long as the run lives.
    pub(super) lock: File,
}

impl Ground {
    /// Removes what dead runs have left, and stakes out a ground for this one. Returns in a
    /// process of its own; the caller's waits for that one, removes what it leaves, and ends
    /// as it ended.
    pub(super) fn take(global: Global) -> Result<Self, Failure> {
        sweep::all();
        let ground = Self::stake()?;
        match contain().map_err(GroundError::Contain) {
            Ok(None) => {
                hide_names().map_err(GroundError::Mount)?;
                Ok(ground)
            }
            Ok(Some(contained)) => {
                let ended = ground.oversee(contained);
                std::process::exit(ground.clear(ended, global))
            }
            Err(error) => {
                let _ = sweep::reclaim(&ground.dir);
                Err(error.into())
            }
        }
    }

    /// Makes the directories. The first one is locked from when its lock has a name.
    fn stake() -> Result<Self, Failure> {
        let id = SandboxId::random();
        let name = format!("{PREFIX}{id}");
        let dir = std::env::temp_dir().join(&name);
        let run = runtime_parent().map_or_else(|| dir.join("run"), |parent| parent.join(&name));
        let tag = id.as_str().chars().rev().take(8).collect();
        private(&dir)?;
        let lock = lock(&dir).map_err(|source| {
            let _ = fs::remove_dir_all(&dir);
            GroundError::Mark {
                path: dir.clone(),
                source,
            }
        })?;
        let ground = Self {
            dir,
            run,
            tag,
            lock,
        };
        match private(&ground.run) {
            Ok(()) => Ok(ground),
            Err(error) => {
                let _ = sweep::reclaim(&ground.dir);
                Err(error.into())
            }
        }
    }

    /// Waits for the run, having noted who it is.
    fn oversee(&self, mut contained: Contained) -> Result<Ended, GroundError> {
        let path = self.dir.join(INSIDE);
        let noted = Mark::of(contained.process().pid()).and_then(|mark| mark.write(&path));
        noted.map_err(|source| GroundError::Mark { path, source })?;
        contained.let_go().map_err(GroundError::Contain)?;
        contained.wait().map_err(GroundError::Wait)
    }

    /// Removes all that the run has left; the exit code.
    fn clear(&self, ended: Result<Ended, GroundError>, global: Global) -> i32 {
        let tell = |error: GroundError| {
            report::error(&error, global);
            1
        };
        let code = match ended {
            Ok(Ended::By(Exit::Code(code))) => code,
            Ok(Ended::By(exit)) => tell(GroundError::Killed(exit)),
            // As shells have it.
            Ok(Ended::Asked(signal)) => 128 + signal,
            Err(error) => tell(error),
        };
        let left = sweep::reclaim(&self.dir).left;
        if left.is_empty() {
            return code;
        }
        let told = tell(GroundError::LeftOver(left.join(", ")));
        if code == 0 { told } else { code }
    }
}

/// Names a process for whoever comes after it.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    /// Which start of the machine it belongs to.
    boot: String,
    process: ProcessIdentity,
}

impl Mark {
    fn of(pid: u32) -> io::Result<Self> {
        let start_time = start_time(pid).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self {
            boot: boot_id()?,
            process: ProcessIdentity { pid, start_time },
        })
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_vec(self)?)
    }
}

/// The process that a run has noted, unless the machine has been restarted since.
pub(super) fn noted(path: &Path) -> Option<ProcessIdentity> {
    let mark: Mark = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (mark.boot == boot_id().ok()?).then_some(mark.process)
}

/// The kernel makes it anew at every start.
fn boot_id() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
}

/// Notes an image that lies elsewhere, before it is bound to a loop device.
pub(super) fn note_bound(dir: &Path, image: &Path) -> io::Result<()> {
    let mut file = File::options()
        .append(true)
        .create(true)
        .open(dir.join(BOUND))?;
    writeln!(file, "{}", serde_json::to_string(image)?)
}

/// A lock that has its name only once it is held.
fn lock(dir: &Path) -> io::Result<File> {
    let path = dir.join(LOCK);
    let unnamed = path.with_extension("new");
    let file = File::create_new(&unnamed)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Mark::of(std::process::id())?.write(&unnamed)?;
    fs::rename(unnamed, path)?;
    Ok(file)
}

fn private(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// `ip netns` keeps names in one place, which is empty for this run and gone with it.
fn hide_names() -> io::Result<()> {
    fs::create_dir_all(netns::RUN_DIR)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    Ok(mount(
        "rewake",
        netns::RUN_DIR,
        "tmpfs",
        flags,
        c"mode=0755",
    )?)
}

/// The type of file systems in memory: `linux/magic.h`, TMPFS_MAGIC.
pub(super) const TMPFS: i64 = 0x0102_1994;

/// Where directories in memory can be.
pub(super) const IN_MEMORY: [&str; 2] = ["/run", "/dev/shm"];

/// A place in memory for what rewake keeps in `/run`. Whoever names a directory for
/// temporary files gets everything there.
fn runtime_parent() -> Option<PathBuf> {
    if std::env::var_os("TMPDIR").is_some() {
        return None;
    }
    let mut usable = IN_MEMORY.map(PathBuf::from).into_iter().filter(|path| {
        let in_memory = rustix::fs::statfs(path).is_ok_and(|it| it.f_type == TMPFS);
        in_memory && rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
    });
    usable.next()
}
