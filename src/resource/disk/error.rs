//! What making, using or removing a disk failed at.

use std::path::{Path, PathBuf};

use rewake_sys::CallError;

use super::{DiskKind, DiskStep};
use crate::fault::{FailedCall, Faults};
use crate::ids::SandboxId;
use crate::resource::ledger::{Leftover, Remains};

/// Why a disk operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// A system call failed.
    #[error("Cannot {step}")]
    Call {
        /// What the call was for.
        step: String,
        /// The call and its error number.
        source: CallError,
    },
    /// A base image or a store cannot serve as one.
    #[error("{path} cannot be used: {why}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// The base image is not the one that the disk was made of.
    #[error("{path} has changed since the disk was made: {what}")]
    BaseChanged {
        /// The base image.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// A disk of this name, or a destination, exists.
    #[error("{path} exists already")]
    Occupied {
        /// The file.
        path: PathBuf,
    },
    /// There is no such disk.
    #[error("There is no disk {id} in {dir}")]
    Missing {
        /// The disk.
        id: SandboxId,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// The record beside a disk cannot be understood.
    #[error("{path} is no record of a disk")]
    Record {
        /// The record.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Another process works with the disk.
    #[error("Disk {id} is held by another process")]
    Held {
        /// The disk.
        id: SandboxId,
    },
    /// The device is open, normally by a VM.
    #[error("{name} is in use{}", if *.deferred { ", the kernel removes it once closed" } else { "" })]
    InUse {
        /// The device-mapper name.
        name: String,
        /// Whether the kernel was told to remove it when it is closed.
        deferred: bool,
    },
    /// The disk's device is gone: it was removed behind our back, or never attached.
    #[error("Disk {id} is not attached")]
    Detached {
        /// The disk.
        id: SandboxId,
    },
    /// The store is full: writes to new places fail, what was written before is there.
    #[error("The copy-on-write store of {id} is full")]
    Overflowed {
        /// The disk.
        id: SandboxId,
    },
    /// The kernel has given the disk up: its contents are not to be trusted.
    #[error("The copy-on-write store of {id} is invalid")]
    Invalid {
        /// The disk.
        id: SandboxId,
    },
    /// The work did not end in time.
    #[error("Out of time: {step}")]
    Timeout {
        /// What was due.
        step: String,
    },
}

impl From<FailedCall> for DiskError {
    fn from(FailedCall { step, source }: FailedCall) -> Self {
        Self::Call { step, source }
    }
}

impl DiskError {
    /// Whether the disk, or something of it, is in use by somebody else.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        matches!(self, Self::Held { .. } | Self::InUse { .. })
    }

    /// Whether a time limit passed.
    #[must_use]
    pub const fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }

    pub(super) fn unusable(path: &Path, why: &'static str) -> Self {
        Self::Unusable {
            path: path.to_owned(),
            why,
        }
    }

    /// The error number of a failed call.
    pub(super) const fn errno(&self) -> Option<i32> {
        match self {
            Self::Call { source, .. } => Some(source.errno()),
            _ => None,
        }
    }
}

/// A piece of a disk that could not be removed.
pub type DiskLeftover = Leftover<DiskStep, DiskError>;

/// A disk that could not be made, attached or removed, and what is left of it.
#[derive(Debug, thiserror::Error)]
#[error("Disk {id}{}", Remains(.leftovers))]
pub struct DiskFailure {
    /// The disk.
    pub id: SandboxId,
    /// The kind that was tried, once that was settled.
    pub kind: Option<DiskKind>,
    /// What failed first.
    pub source: DiskError,
    /// What could not be undone.
    pub leftovers: Vec<DiskLeftover>,
}

/// Runs one call under the name of its step.
pub(super) fn call<T>(
    faults: &Faults,
    step: impl Into<String>,
    call: impl FnOnce() -> Result<T, CallError>,
) -> Result<T, DiskError> {
    faults.syscall(step, call).map_err(DiskError::from)
}
