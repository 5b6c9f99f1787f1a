//! Why a template could not be built, and what is left of the attempt.

use std::fmt;
use std::path::PathBuf;

use rewake_sys::CallError;

use super::super::error::TemplateError;
use crate::envd::client::ClientError;
use crate::envd::ready::ReadyError;
use crate::ids::TemplateId;
use crate::resource::disk::{DiskError, DiskFailure};
use crate::resource::net::{CreateError, SlotFailure};
use crate::snapshot::SealError;
use crate::units::Bytes;
use crate::vmm::api::ApiError;
use crate::vmm::launch::{LaunchError, StopError};

/// How far a build had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BuildStage {
    /// Looking at what was given.
    Check,
    /// Making the disk that the guest boots on.
    Disk,
    /// Making the network slot.
    Network,
    /// Starting CH.
    Launch,
    /// CH booting the guest.
    Boot,
    /// Waiting for envd.
    Ready,
    /// Telling envd who it is.
    Init,
    /// The guest getting ready for the snapshot.
    Prepare,
    /// Pausing and snapshotting.
    Freeze,
    /// Ending CH.
    Stop,
    /// Writing the disk as an image that stands alone.
    Flatten,
    /// Removing disk, network and process.
    Clear,
    /// Writing all of it to the disk and giving it its name.
    Publish,
}

impl BuildStage {
    /// The words for it in errors, progress and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Disk => "make a disk",
            Self::Network => "make a network slot",
            Self::Launch => "launch",
            Self::Boot => "boot",
            Self::Ready => "wait for envd",
            Self::Init => "init",
            Self::Prepare => "prepare",
            Self::Freeze => "freeze",
            Self::Stop => "stop",
            Self::Flatten => "flatten the disk",
            Self::Clear => "clear away",
            Self::Publish => "publish",
        }
    }
}

/// What went wrong in a stage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildCause {
    /// The store, or a file of the staging directory.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The memory cannot be a guest's.
    #[error("{0} of memory are no multiple of 2 MiB")]
    Memory(Bytes),
    /// There is too little room for it.
    #[error(transparent)]
    Space(#[from] SealError),
    /// The image of the root disk cannot serve as one.
    #[error("The disk's image is refused")]
    Image(#[source] DiskError),
    /// The disk could not be made.
    #[error(transparent)]
    Disk(#[from] DiskFailure),
    /// The disk could not be flattened.
    #[error("Cannot write the disk to the template")]
    Flatten(#[source] DiskError),
    /// The network slot could not be made.
    #[error(transparent)]
    Network(#[from] CreateError),
    /// The host could not be readied.
    #[error(transparent)]
    Host(crate::host::Error),
    /// CH could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A directory or file for CH could not be made, or a step could not be written down.
    #[error("Cannot make {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A call failed that is not about a file.
    #[error("Cannot {step}")]
    Call {
        /// What it was for.
        step: &'static str,
        /// The call and its error number.
        source: CallError,
    },
    /// CH refused, or did not answer in time.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// envd did not answer.
    #[error("The guest did not come up; see what it says with --console FILE")]
    Ready(#[source] ReadyError),
    /// envd did not take `/init`.
    #[error("envd did not take /init")]
    Init(#[source] ClientError),
    /// CH could not be ended.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// All was well, but not everything that was needed for it could be removed.
    #[error("Not everything could be removed that was needed for it")]
    LeftOver,
}

/// Something that a build made and could not remove.
#[derive(Debug)]
#[non_exhaustive]
pub enum BuildLeftover {
    /// A step of the ledger: CH, its directory.
    Step(crate::resource::ledger::Leftover),
    /// The network slot.
    Slot(SlotFailure),
    /// The disk.
    Disk(DiskFailure),
}

impl fmt::Display for BuildLeftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(leftover) => fmt::Display::fmt(leftover, f),
            Self::Slot(failure) => write!(f, "{failure} ({})", failure.source),
            Self::Disk(failure) => write!(f, "{failure} ({})", failure.source),
        }
    }
}

/// Why there is no template.
#[derive(Debug)]
pub struct BuildError {
    /// The name it was to have.
    pub name: TemplateId,
    /// How far it had come.
    pub stage: BuildStage,
    /// What went wrong.
    pub cause: Box<BuildCause>,
    /// The last lines that CH logged, escaped and cut.
    pub log: Vec<String>,
    /// What could not be removed, with reasons. Empty: nothing is left.
    pub leftovers: Vec<BuildLeftover>,
}

impl BuildError {
    /// Whether a time limit passed.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        match &*self.cause {
            BuildCause::Template(error) => error.is_timeout(),
            BuildCause::Disk(failure) => failure.source.is_timeout(),
            BuildCause::Flatten(error) => error.is_timeout(),
            BuildCause::Host(error) => error.is_timeout(),
            BuildCause::Api(ApiError::NoAnswer { source, .. }) => source.is_timeout(),
            BuildCause::Ready(ReadyError::Timeout { .. }) => true,
            BuildCause::Init(error) => error.is_timeout(),
            _ => false,
        }
    }
}

impl fmt::Display for BuildError {
    /// `Template python: boot`; the cause is its source.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Template {}: {}", self.name, self.stage.name())
    }
}

impl std::error::Error for BuildError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.cause)
    }
}
