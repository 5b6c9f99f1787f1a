//! Why an operation on a sandbox failed, and what is left of it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::journal::JournalError;
use super::state::State;
use crate::envd::client::ClientError;
use crate::envd::materialise::MaterialiseError;
use crate::ids::{NameError, SandboxId};
use crate::resource::disk::{DiskError, DiskFailure};
use crate::resource::ledger::Leftover;
use crate::resource::net::{CreateError, NetError, SlotFailure};
use crate::resource::slot::SlotError;
use crate::restore::kit::KitError;
use crate::restore::{self, Stage};
use crate::snapshot::SealError;
use crate::template::TemplateError;
use crate::units::Bytes;
use crate::vmm::api::ApiError;

/// What was to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Opening the host.
    Open,
    /// A fresh sandbox from a template.
    Launch,
    /// A paused sandbox goes on.
    Resume,
    /// A running sandbox is frozen.
    Pause,
    /// A template is made of a running sandbox.
    Snapshot,
    /// A sandbox is removed.
    Destroy,
    /// A sandbox is found again after its host process died.
    Recover,
    /// A sandbox is looked at.
    Inspect,
}

impl Operation {
    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Launch => "launch",
            Self::Resume => "resume",
            Self::Pause => "pause",
            Self::Snapshot => "snapshot",
            Self::Destroy => "destroy",
            Self::Recover => "recover",
            Self::Inspect => "inspect",
        }
    }
}

/// What there is not enough of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Full {
    /// As many sandboxes as the host is configured for.
    #[error("{limit} sandboxes run already")]
    Sandboxes {
        /// The limit.
        limit: usize,
    },
    /// The machine has too little memory left.
    #[error("{available} of memory are left, {needed} are needed")]
    Memory {
        /// What the kernel says is available, less what operations under way were promised.
        available: Bytes,
        /// What the sandbox may take at once, with the reserve.
        needed: Bytes,
    },
    /// No network slot is free.
    #[error("All {slots} network slots are in use")]
    Slots {
        /// How many there are.
        slots: u16,
    },
    /// The file system has too little room for the snapshot.
    #[error("{} has {available} left, the snapshot needs {needed}", .path.display())]
    Disk {
        /// Where the snapshot goes.
        path: PathBuf,
        /// What is left there.
        available: Bytes,
        /// What it needs.
        needed: Bytes,
    },
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// There is no sandbox of that id.
    #[error("There is no such sandbox")]
    Unknown,
    /// The id is taken.
    #[error("There is a sandbox of that id already")]
    Exists,
    /// Another operation on the sandbox is under way.
    #[error("Another operation on it is under way")]
    UnderWay,
    /// The sandbox is not in the state that this operation begins from.
    #[error("It is {state}; this needs one that is {needs}")]
    State {
        /// Its state.
        state: State,
        /// What was needed.
        needs: State,
    },
    /// The sandbox was lost.
    #[error("It is lost: {why}")]
    Lost {
        /// Why.
        why: String,
    },
    /// The sandbox is being destroyed.
    #[error("It is being destroyed")]
    Doomed,
    /// There is no room.
    #[error("The host is full")]
    Full(#[source] Full),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A file operation failed.
    #[error("Cannot {what} {}", .path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The host's side of the network cannot be used.
    #[error("Cannot ready the host's network")]
    Network(#[source] NetError),
    /// No network slot.
    #[error("Cannot acquire a network slot")]
    Slot(#[source] CreateError),
    /// No process that waits for a resume.
    #[error("Cannot start a process ahead of its resume")]
    Kit(#[source] KitError),
    /// The network slot's record.
    #[error("Cannot keep the network slot")]
    SlotRecord(#[from] SlotError),
    /// The network slot could not be removed.
    #[error("Cannot remove the network slot")]
    SlotRemoval(#[source] SlotFailure),
    /// No disk.
    #[error("Cannot {what} the disk")]
    Disk {
        /// What was attempted.
        what: &'static str,
        /// Why.
        source: Box<DiskFailure>,
    },
    /// The disk could not be looked at or flattened.
    #[error("Cannot {what} the disk")]
    DiskFile {
        /// What was attempted.
        what: &'static str,
        /// Why.
        source: DiskError,
    },
    /// The VM could not be brought back.
    #[error("{}", .stage.name())]
    Restore {
        /// How far it had come.
        stage: Stage,
        /// Why.
        source: Box<restore::Cause>,
        /// The last lines that Cloud Hypervisor logged.
        log: Vec<String>,
    },
    /// Cloud Hypervisor refused, or did not answer.
    #[error("Cannot {what}")]
    Api {
        /// What was attempted.
        what: &'static str,
        /// Why.
        source: ApiError,
    },
    /// The agent refused, or did not answer.
    #[error("Cannot {what}")]
    Guest {
        /// What was attempted.
        what: &'static str,
        /// Why.
        source: ClientError,
    },
    /// The guest's memory is not all there, so a snapshot would have holes.
    #[error("It cannot be frozen yet")]
    Memory(#[source] MaterialiseError),
    /// What Cloud Hypervisor wrote could not be made a snapshot of.
    #[error("The new snapshot cannot be used")]
    Seal(#[source] SealError),
    /// A name is refused.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Its Cloud Hypervisor has ended.
    #[error("Its Cloud Hypervisor has ended")]
    Ended,
    /// The sandbox runs, but its journal does not say so.
    #[error("It runs, but that cannot be written down; once it can, recovery adopts it")]
    Unrecorded(#[source] Box<Self>),
    /// The VM stands still and does not go on.
    #[error("Its vCPUs stand still and cannot be let run on; destroy it or try to recover")]
    Stuck(#[source] Box<Self>),
    /// What could not be undone, where that was the whole operation.
    #[error("Not all of it could be removed")]
    LeftOver,
}

/// Something that may still be there.
#[derive(Debug)]
#[non_exhaustive]
pub enum Remains {
    /// An undo step that failed.
    Step(Leftover),
    /// A network slot.
    Slot(SlotFailure),
    /// A disk.
    Disk(Box<DiskFailure>),
    /// A directory or file.
    File(PathBuf, io::Error),
}

impl fmt::Display for Remains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(leftover) => fmt::Display::fmt(leftover, f),
            Self::Slot(failure) => write!(f, "{failure} ({})", failure.source),
            Self::Disk(failure) => write!(f, "{failure} ({})", failure.source),
            Self::File(path, error) => write!(f, "{} ({error})", path.display()),
        }
    }
}

/// An operation on a sandbox failed.
///
/// Displayed it says whose operation it was; the cause is its source.
#[derive(Debug)]
pub struct Error {
    /// Whose it was; `None` where it was about all of them.
    pub sandbox: Option<SandboxId>,
    /// What was to be done.
    pub operation: Operation,
    /// What went wrong.
    pub cause: Box<Cause>,
    /// What could not be undone. Empty: nothing is left.
    pub leftovers: Vec<Remains>,
}

impl Error {
    pub(crate) fn new(id: &SandboxId, operation: Operation, cause: impl Into<Cause>) -> Self {
        Self {
            sandbox: Some(id.clone()),
            operation,
            cause: Box::new(cause.into()),
            leftovers: Vec::new(),
        }
    }

    pub(crate) fn of_host(operation: Operation, cause: Cause) -> Self {
        Self {
            sandbox: None,
            operation,
            cause: Box::new(cause),
            leftovers: Vec::new(),
        }
    }

    pub(crate) fn with_leftovers(mut self, leftovers: Vec<Remains>) -> Self {
        self.leftovers.extend(leftovers);
        self
    }

    /// Whether the same call may succeed later without anything being mended: another
    /// operation is under way, or the host is full.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        matches!(*self.cause, Cause::UnderWay | Cause::Full(_))
    }

    /// Whether there is no such sandbox.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(*self.cause, Cause::Unknown)
    }

    /// Whether its VM has ended without anybody having asked for that.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        matches!(*self.cause, Cause::Ended)
    }

    /// Whether the sandbox is in another state than the operation begins from.
    #[must_use]
    pub fn is_wrong_state(&self) -> bool {
        matches!(*self.cause, Cause::State { .. })
    }

    /// Whether a time limit passed.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        match &*self.cause {
            Cause::Restore { source, .. } => source.is_timeout(),
            Cause::Api { source, .. } => source.is_timeout(),
            Cause::Guest { source, .. } => source.is_timeout(),
            Cause::Memory(error) => matches!(error, MaterialiseError::Deadline { .. }),
            Cause::Network(error) => matches!(error, NetError::Timeout { .. }),
            _ => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.sandbox {
            Some(id) => write!(f, "Sandbox {id}: {}", self.operation.name()),
            None => write!(f, "Host: {}", self.operation.name()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.cause)
    }
}

/// The cause of a failed file operation.
pub(crate) fn file(
    what: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> Cause {
    let path = path.into();
    move |source| Cause::File { what, path, source }
}

/// The cause of a failed API call.
pub(crate) const fn api(what: &'static str) -> impl FnOnce(ApiError) -> Cause {
    move |source| Cause::Api { what, source }
}

/// The cause of a failed request to the agent.
pub(crate) const fn guest(what: &'static str) -> impl FnOnce(ClientError) -> Cause {
    move |source| Cause::Guest { what, source }
}
