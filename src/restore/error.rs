//! Why a restore failed, and what is left of it.

use std::fmt;
use std::io;

use rewake_sys::CallError;
use rewake_sys::process::Exit;

use super::kit::KitMisuse;
use crate::envd::client::ClientError;
use crate::envd::ready::ReadyError;
use crate::ids::SandboxId;
use crate::plan::{MemoryMode, PlanError, Unfit};
use crate::resource::ledger::Leftover;
use crate::resource::net::PendingError;
use crate::snapshot::{ClaimError, RunDirError, SnapshotError, StateError};
use crate::timeline::Timeline;
use crate::vmm::api::ApiError;
use crate::vmm::launch::LaunchError;
use crate::wire::conn::ConnError;

/// How far a restore had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Opening and checking the snapshot directory.
    Check,
    /// Working out what to make.
    Plan,
    /// Making what CH needs: directory, socket, namespace.
    Prepare,
    /// Starting CH.
    Launch,
    /// What must happen before the vCPUs may run.
    Gate,
    /// CH restoring the VM.
    Restore,
    /// CH letting the vCPUs run.
    Resume,
    /// Waiting for envd.
    Ready,
    /// Telling envd who it is now.
    Init,
}

impl Stage {
    /// The word for it in errors and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Check => "check snapshot",
            Self::Plan => "plan",
            Self::Prepare => "prepare",
            Self::Launch => "launch",
            Self::Gate => "commit",
            Self::Restore => "restore",
            Self::Resume => "resume",
            Self::Ready => "wait for envd",
            Self::Init => "init",
        }
    }
}

/// What went wrong in a stage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// The snapshot directory is refused.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Inputs and snapshot do not go together.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The memory file cannot be had: it is being written to, or removed.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// `state.json` cannot be rewritten for the memory mode.
    #[error("Cannot rewrite state.json")]
    State(#[source] StateError),
    /// CH turned out to be one that cannot serve the memory mode. The guest has not run.
    #[error("Memory mode {mode} cannot be used")]
    MemoryMode {
        /// The mode.
        mode: MemoryMode,
        /// Why not.
        #[source]
        reason: Unfit,
    },
    /// A directory or file for CH could not be made.
    #[error("Cannot make {path}")]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The snapshot could not be laid out for CH.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The connection to CH's API cannot be used.
    #[error("Cannot use the API connection")]
    Socket(#[source] ConnError),
    /// The network namespace cannot be used.
    #[error("Cannot use network namespace {path}")]
    Netns {
        /// Its path.
        path: std::path::PathBuf,
        /// Why.
        source: CallError,
    },
    /// The slot that was still being built cannot be used.
    #[error(transparent)]
    Slot(#[from] PendingError),
    /// The warm kit cannot be used.
    #[error(transparent)]
    Kit(#[from] KitMisuse),
    /// CH could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// CH refused, or did not answer in time.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// CH ended. Its exit status proves nothing: it is 0 after many failures too.
    #[error("Cloud Hypervisor ended{}", .exit.map(|exit| format!(" ({exit})")).unwrap_or_default())]
    Ended {
        /// How, where that is known.
        exit: Option<Exit>,
    },
    /// envd did not answer.
    #[error(transparent)]
    Ready(#[from] ReadyError),
    /// envd did not take `/init`.
    #[error(transparent)]
    Init(ClientError),
    /// A step could not be written down, so what it undoes was not made.
    #[error("Cannot write down what is to be undone")]
    Log(#[source] io::Error),
    /// What must happen before the vCPUs may run did not.
    #[error("The VM must not run yet")]
    Gate(#[source] io::Error),
    /// The event loop failed.
    #[error("Cannot wait for events")]
    Poll(#[source] io::Error),
    /// The caller gave up.
    #[error("The restore was abandoned")]
    Abandoned,
}

/// Why a restore failed. The partial VM is gone.
#[derive(Debug)]
pub struct RestoreError {
    /// Whose VM it was to be.
    pub sandbox_id: SandboxId,
    /// How far it had come.
    pub stage: Stage,
    /// What went wrong.
    pub cause: Box<Cause>,
    /// The last lines that CH logged, escaped and cut.
    pub log: Vec<String>,
    /// What could not be undone, with reasons. Empty: nothing is left.
    pub leftovers: Vec<Leftover>,
    /// When what had been reached.
    pub timeline: Box<Timeline>,
}

impl Cause {
    /// Whether a time limit passed.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::Api(ApiError::NoAnswer { source, .. }) => source.is_timeout(),
            Self::Ready(ReadyError::Timeout { .. }) => true,
            Self::Init(error) => error.is_timeout(),
            _ => false,
        }
    }
}

impl RestoreError {
    /// Whether a time limit passed.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        self.cause.is_timeout()
    }

    /// Whether CH ended by itself.
    #[must_use]
    pub fn is_vmm_death(&self) -> bool {
        matches!(*self.cause, Cause::Ended { .. })
    }
}

impl fmt::Display for RestoreError {
    /// `Sandbox a1: restore`; the cause is its source.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sandbox {}: {}", self.sandbox_id, self.stage.name())
    }
}

impl std::error::Error for RestoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.cause)
    }
}
