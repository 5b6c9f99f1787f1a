//! The ledger: how everything that was made is unmade, last first.
//!
//! Kernel objects with names do not vanish with the program that made them. Each gets a
//! [`Step`]: data that says how to undo it, pushed before the call that may half-succeed.
//! Steps are data and not closures, so that they print, compare, go into a journal and can
//! be replayed after a crash. The ledger that rolls back a failed restore is the one that
//! destroys a healthy sandbox: the rare path is the everyday path.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rewake_sys::CallError;
use rewake_sys::process::{self, Process};
use serde::{Deserialize, Serialize};

use super::disk::{DiskError, DiskStep};
use super::net::{NetError, NetStep};
use super::slot::{self, SlotError};
use crate::deadline::Deadline;

/// How long a killed process may take to be gone; its memory is unmapped meanwhile.
const KILL_BUDGET: Duration = Duration::from_secs(10);
/// How long an unwinding ledger may take that nobody waits for.
const DROP_BUDGET: Duration = Duration::from_secs(10);

/// One thing that exists because of us, and what identifies it.
///
/// Undoing is idempotent: what is gone already counts as undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Step {
    /// A directory of ours and all that is in it. Its name carries a random part that was
    /// made for it, which is its identity.
    Directory {
        /// Absolute path.
        path: PathBuf,
    },
    /// A process, by pid and start time (`/proc/PID/stat`, clock ticks since boot).
    Process {
        /// Process id.
        pid: u32,
        /// Field 22 of its `stat`; another one means another process.
        start_time: u64,
    },
    /// The index of a network slot, by its file and the token of this use. Undone after
    /// everything that hangs off the slot.
    Slot {
        /// The slot file.
        path: PathBuf,
        /// What tells this use of the index from others.
        token: String,
    },
    /// A kernel object of a network slot.
    Net {
        /// Which one.
        net: NetStep,
    },
    /// A piece of a disk.
    Disk {
        /// Which one.
        disk: DiskStep,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory { path } => write!(f, "directory {}", path.display()),
            Self::Process { pid, .. } => write!(f, "process {pid}"),
            Self::Slot { path, .. } => write!(f, "slot {}", path.display()),
            Self::Net { net } => fmt::Display::fmt(net, f),
            Self::Disk { disk } => fmt::Display::fmt(disk, f),
        }
    }
}

/// Why a step could not be undone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UndoError {
    /// A file operation failed.
    #[error("Cannot remove {path}")]
    Remove {
        /// What was to be removed.
        path: PathBuf,
        /// The operation's error.
        source: io::Error,
    },
    /// A process could not be signalled or watched.
    #[error("Cannot end process {pid}")]
    Process {
        /// Its pid.
        pid: u32,
        /// The call's error.
        source: CallError,
    },
    /// A killed process was still there at the deadline.
    #[error("Process {pid} was killed and is not gone yet")]
    StillThere {
        /// Its pid.
        pid: u32,
    },
    /// A slot's index could not be freed.
    #[error(transparent)]
    Slot(SlotError),
    /// An object of a network slot could not be removed.
    #[error(transparent)]
    Net(NetError),
    /// A piece of a disk could not be removed.
    #[error(transparent)]
    Disk(DiskError),
}

impl Step {
    /// Undoes this one thing. Blocks, until the deadline at the latest.
    ///
    /// # Errors
    /// [`UndoError`]; the thing may still be there, and the call may be repeated.
    pub fn undo(&self, deadline: Deadline) -> Result<(), UndoError> {
        match self {
            Self::Directory { path } => remove_directory(path),
            Self::Process { pid, start_time } => end_process(*pid, *start_time, deadline),
            Self::Slot { path, token } => {
                slot::release_by_token(path, token).map_err(UndoError::Slot)
            }
            Self::Net { net } => net.undo(deadline).map_err(UndoError::Net),
            Self::Disk { disk } => disk.undo(deadline).map_err(UndoError::Disk),
        }
    }
}

fn remove_directory(path: &Path) -> Result<(), UndoError> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(UndoError::Remove {
            path: path.to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

fn end_process(pid: u32, start_time: u64, deadline: Deadline) -> Result<(), UndoError> {
    let failed = |source| UndoError::Process { pid, source };
    let process = match Process::open(pid) {
        Ok(process) => process,
        Err(error) if error.is_gone() => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    // Compared after the pidfd was opened: now the pid cannot change its owner any more.
    if process::start_time(pid) != Some(start_time) {
        return Ok(());
    }
    process.kill().map_err(failed)?;
    if !process
        .wait_ended(deadline.within(KILL_BUDGET).remaining())
        .map_err(failed)?
    {
        return Err(UndoError::StillThere { pid });
    }
    // A child of ours is reaped; anybody else's child has a parent to do that.
    let _ = process.try_wait();
    Ok(())
}

/// An undo step that failed, with its reason.
#[derive(Debug)]
pub struct Leftover<S = Step, E = UndoError> {
    /// What may still be there.
    pub step: S,
    /// Why.
    pub error: E,
}

impl<S: fmt::Display, E: fmt::Display> fmt::Display for Leftover<S, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.step, self.error)
    }
}

/// The steps that were left over, at the end of a message: nothing where there are none.
pub(crate) struct Remains<'a, S, E>(pub(crate) &'a [Leftover<S, E>]);

impl<S: fmt::Display, E> fmt::Display for Remains<'_, S, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, leftover) in self.0.iter().enumerate() {
            f.write_str(if i == 0 { ", left over: " } else { ", " })?;
            write!(f, "{}", leftover.step)?;
        }
        Ok(())
    }
}

/// Where a ledger's steps are written down, so that they outlive the process.
pub trait StepLog: Send + Sync + fmt::Debug {
    /// Called before the thing exists, or right after it where only the call says what it
    /// made.
    ///
    /// # Errors
    /// Where the step cannot be written down; then the thing must not be made.
    fn made(&self, step: &Step) -> io::Result<()>;

    /// Called when the thing is proven gone. A step that stays on record though it is gone
    /// does no harm, so this cannot fail.
    fn undone(&self, step: &Step);
}

/// The steps of one operation or one sandbox, undone last first.
///
/// A ledger that is dropped undoes what it still holds and logs what it could not; callers
/// that can wait and report call [`Ledger::unwind`] themselves.
#[derive(Debug, Default)]
#[must_use = "a dropped ledger undoes everything in it"]
pub struct Ledger {
    steps: Vec<Step>,
    log: Option<Arc<dyn StepLog>>,
    log_error: Option<io::Error>,
}

impl Ledger {
    /// An empty ledger.
    pub const fn new() -> Self {
        Self {
            steps: Vec::new(),
            log: None,
            log_error: None,
        }
    }

    /// An empty ledger whose steps are written down.
    pub const fn logged(log: Arc<dyn StepLog>) -> Self {
        Self {
            steps: Vec::new(),
            log: Some(log),
            log_error: None,
        }
    }

    /// Adds a step, before the call that makes the thing, or at the latest right after it
    /// where only the call says what it made.
    ///
    /// Where the ledger is written down and that fails, [`Ledger::check`] says so: to be
    /// asked before the thing is made.
    pub fn push(&mut self, step: Step) {
        if let Some(log) = &self.log
            && let Err(error) = log.made(&step)
        {
            self.log_error.get_or_insert(error);
        }
        self.steps.push(step);
    }

    /// Whether every step so far was written down.
    ///
    /// # Errors
    /// The first failure since the last time that this was asked.
    pub fn check(&mut self) -> io::Result<()> {
        self.log_error.take().map_or(Ok(()), Err)
    }

    /// Forgets a step whose call is known to have made nothing.
    pub fn forget(&mut self, step: &Step) {
        if let Some(at) = self.steps.iter().rposition(|s| s == step) {
            self.steps.remove(at);
            if let Some(log) = &self.log {
                log.undone(step);
            }
        }
    }

    /// Takes over steps that are written down already.
    pub fn adopt(&mut self, steps: impl IntoIterator<Item = Step>) {
        self.steps.extend(steps);
    }

    /// What stands to be undone, oldest first.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Gives the steps away: from here on somebody else answers for them.
    #[must_use]
    pub fn release(mut self) -> Vec<Step> {
        std::mem::take(&mut self.steps)
    }

    /// Undoes everything, last first. Blocks, until the deadline at the latest.
    ///
    /// A step that fails does not keep the others from being undone. Steps that failed stay
    /// in the ledger, so that another call tries them again.
    pub fn unwind(&mut self, deadline: Deadline) -> Vec<Leftover> {
        self.unwind_with(|step| step.undo(deadline))
    }

    /// [`Ledger::unwind`] by way of `undo`, for steps that must be undone somewhere else:
    /// links in another network namespace than the calling thread's.
    pub fn unwind_with(
        &mut self,
        mut undo: impl FnMut(&Step) -> Result<(), UndoError>,
    ) -> Vec<Leftover> {
        let mut leftovers = Vec::new();
        for step in std::mem::take(&mut self.steps).into_iter().rev() {
            match undo(&step) {
                Ok(()) => {
                    if let Some(log) = &self.log {
                        log.undone(&step);
                    }
                }
                Err(error) => {
                    self.steps.insert(0, step.clone());
                    leftovers.push(Leftover { step, error });
                }
            }
        }
        leftovers
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        for leftover in self.unwind(Deadline::after(DROP_BUDGET)) {
            log::warn!("Left over: {leftover}");
        }
        self.steps.clear();
    }
}

impl From<Vec<Step>> for Ledger {
    fn from(steps: Vec<Step>) -> Self {
        let mut ledger = Self::new();
        ledger.adopt(steps);
        ledger
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("rewake-ledger-{}-{name}", std::process::id()))
    }

    fn sleeper() -> (std::process::Child, Step) {
        let child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let step = Step::Process {
            pid: child.id(),
            start_time: process::start_time(child.id()).unwrap(),
        };
        (child, step)
    }

    #[test]
    fn unwinding_removes_everything_and_twice_is_harmless() {
        let path = scratch("twice");
        let (_child, running) = sleeper();
        let mut ledger = Ledger::new();
        ledger.push(Step::Directory { path: path.clone() });
        fs::create_dir_all(path.join("deep/er")).unwrap();
        ledger.push(running.clone());
        assert!(ledger.unwind(Deadline::NEVER).is_empty());
        assert!(!path.exists());
        let Step::Process { pid, start_time } = running else {
            unreachable!()
        };
        assert_ne!(process::start_time(pid), Some(start_time));
        assert!(running.undo(Deadline::NEVER).is_ok());
        assert!(ledger.steps().is_empty());
    }

    #[test]
    fn a_process_with_another_start_time_is_left_alone() {
        let (mut child, step) = sleeper();
        let Step::Process { pid, start_time } = step else {
            unreachable!()
        };
        let stranger = Step::Process {
            pid,
            start_time: start_time + 1,
        };
        stranger.undo(Deadline::NEVER).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "it must still run");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_step_that_fails_is_reported_and_kept() {
        let file = scratch("file");
        fs::write(&file, "x").unwrap();
        let path = scratch("after");
        fs::create_dir(&path).unwrap();
        let mut ledger = Ledger::new();
        ledger.push(Step::Directory { path: path.clone() });
        // A file where a directory was expected cannot be removed as one.
        ledger.push(Step::Directory {
            path: file.join("x"),
        });
        let leftovers = ledger.unwind(Deadline::NEVER);
        assert_eq!(leftovers.len(), 1);
        assert!(
            !path.exists(),
            "the steps before it are undone all the same"
        );
        assert_eq!(ledger.steps().len(), 1);
        fs::remove_file(&file).unwrap();
        assert!(ledger.unwind(Deadline::NEVER).is_empty());
    }

    #[test]
    fn a_dropped_ledger_unwinds_and_a_released_one_does_not() {
        let path = scratch("dropped");
        for (release, left) in [(false, false), (true, true)] {
            fs::create_dir_all(&path).unwrap();
            let mut ledger = Ledger::new();
            ledger.push(Step::Directory { path: path.clone() });
            if release {
                assert_eq!(ledger.release().len(), 1);
            } else {
                drop(ledger);
            }
            assert_eq!(path.exists(), left);
        }
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn steps_survive_a_journal() {
        let steps = vec![
            Step::Directory {
                path: "/run/rewake/x".into(),
            },
            Step::Process {
                pid: 7,
                start_time: 9,
            },
        ];
        let text = serde_json::to_string(&steps).unwrap();
        let read: Vec<Step> = serde_json::from_str(&text).unwrap();
        assert_eq!(read, steps);
    }
}
