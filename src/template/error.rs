//! Why something about templates failed.

use std::path::{Path, PathBuf};

use rewake_sys::CallError;
use rustix::io::Errno;

use super::cpu::OtherCpu;
use super::digest::Sha256Hex;
use super::manifest::ManifestError;
use crate::fault::{FailedCall, Faults};
use crate::ids::TemplateId;
use crate::resource::disk::DiskError;
use crate::snapshot::{ReserveError, SnapshotError};
use crate::units::Bytes;
use crate::vmm::api::Version;

/// Why an operation on the store of templates failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// A system call failed.
    #[error("Cannot {step}")]
    Call {
        /// What the call was for.
        step: String,
        /// The call and its error number.
        source: CallError,
    },
    /// There is no template of this name.
    #[error("There is no template {id}")]
    Missing {
        /// The name.
        id: TemplateId,
    },
    /// A template of this name exists.
    #[error("Template {id} exists already; templates are never overwritten")]
    Occupied {
        /// The name.
        id: TemplateId,
    },
    /// The template is in use.
    #[error("Template {id} is in use: {by}")]
    Busy {
        /// Its name.
        id: TemplateId,
        /// By whom, as far as that can be told.
        by: Users,
    },
    /// The manifest is refused.
    #[error("The manifest {path} is refused")]
    Manifest {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: ManifestError,
    },
    /// The manifest is of a template of another name.
    #[error("{path} is the manifest of template {name}")]
    OtherName {
        /// Its path.
        path: PathBuf,
        /// The name in it.
        name: TemplateId,
    },
    /// The snapshot is refused.
    #[error("The snapshot in {path} is refused")]
    Snapshot {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: SnapshotError,
    },
    /// The template is not what its manifest says.
    #[error("Template {id} is damaged")]
    Damaged {
        /// Its name.
        id: TemplateId,
        /// What differs.
        source: Damage,
    },
    /// The template cannot run here.
    #[error("Template {id} cannot run here")]
    Incompatible {
        /// Its name.
        id: TemplateId,
        /// Why.
        source: Incompatible,
    },
    /// Something lies in a staging directory that does not belong into a template.
    #[error("{path} does not belong into a template")]
    Stray {
        /// What it is.
        path: PathBuf,
    },
    /// The disks that stand on the template's image could not be looked at.
    #[error("Cannot tell which disks stand on {image}")]
    Disks {
        /// The image.
        image: PathBuf,
        /// Why.
        source: DiskError,
    },
    /// Guest memory is in no file of the snapshot.
    #[error("There is no memory file in {path}: the guest's memory is elsewhere, or lost")]
    NoMemory {
        /// The directory.
        path: PathBuf,
    },
    /// The template's memory could not be looked at.
    #[error(transparent)]
    Memory(ReserveError),
    /// The work did not end in time.
    #[error("Out of time: {step}")]
    Timeout {
        /// What was due.
        step: &'static str,
    },
}

impl TemplateError {
    /// Whether the template is in use.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }

    /// Whether a time limit passed.
    #[must_use]
    pub const fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }

    /// Whether there is no such template.
    #[must_use]
    pub const fn is_missing(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }

    /// The error number of a failed call.
    pub(super) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Call { source, .. } => Some(Errno::from_raw_os_error(source.errno())),
            _ => None,
        }
    }
}

/// Who uses a template.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Users {
    /// How many VMs have its memory mapped.
    pub vms: usize,
    /// The sandboxes whose disks stand on its image, running or not.
    pub disks: Vec<String>,
    /// Whether a sandbox is being launched from it.
    pub launching: bool,
}

impl Users {
    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.vms == 0 && !self.launching && self.disks.is_empty()
    }
}

impl std::fmt::Display for Users {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        /// Names that are listed; of the others only the number.
        const LISTED: usize = 8;
        if self.launching {
            return f.write_str("a sandbox is being launched from it");
        }
        match self.vms {
            0 => {}
            1 => f.write_str("a VM has its memory mapped")?,
            vms => write!(f, "{vms} VMs have its memory mapped")?,
        }
        if self.disks.is_empty() {
            return Ok(());
        }
        let comma = if self.vms > 0 { ", " } else { "" };
        write!(f, "{comma}its disk is the base of ")?;
        let listed = &self.disks[..self.disks.len().min(LISTED)];
        f.write_str(&listed.join(", "))?;
        match self.disks.len() - listed.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// How a template differs from its manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// A file is missing, or is no regular file.
    #[error("There is no file {file}")]
    Missing {
        /// Which.
        file: PathBuf,
    },
    /// A file has another length.
    #[error("{file} has {actual}, the manifest says {expected}")]
    Length {
        /// Which.
        file: PathBuf,
        /// In the manifest.
        expected: Bytes,
        /// On the disk.
        actual: Bytes,
    },
    /// A file has other contents.
    #[error("{file} has the checksum {actual}, the manifest says {expected}")]
    Checksum {
        /// Which.
        file: PathBuf,
        /// In the manifest.
        expected: Sha256Hex,
        /// Of the file.
        actual: Sha256Hex,
    },
    /// The base image elsewhere is not the recorded one.
    #[error("{path} has changed since the template was made")]
    BaseChanged {
        /// The image.
        path: PathBuf,
    },
}

/// Why a template cannot run on a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Incompatible {
    /// Its snapshot is of another major version of Cloud Hypervisor, which promises nothing
    /// about that.
    #[error(
        "Cloud Hypervisor {template} froze it, this is {host}; \
         build it again, or name a binary of version {}", .template.major
    )]
    Vmm {
        /// The template's.
        template: Version,
        /// This machine's.
        host: Version,
    },
    /// Its guest needs another processor.
    #[error("Its guest was started on another processor")]
    Cpu(#[source] OtherCpu),
}

/// Runs one call under the name of its step.
pub(super) fn call<T>(
    faults: &Faults,
    step: impl Into<String>,
    call: impl FnOnce() -> Result<T, CallError>,
) -> Result<T, TemplateError> {
    faults
        .syscall(step, call)
        .map_err(|FailedCall { step, source }| TemplateError::Call { step, source })
}

/// A step about a path.
pub(super) fn about(verb: &str, path: &Path) -> String {
    format!("{verb} {}", path.display())
}
