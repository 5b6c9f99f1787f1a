//! What a disk left in the kernel and in the file system, as data, and how it is undone.
//!
//! Loop devices are missing here on purpose: the kernel unbinds them when the mapping that
//! uses them goes, or the process that bound them (`LO_FLAGS_AUTOCLEAR`).

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewake_sys::CallError;
use rewake_sys::dm::{Control, DeviceRef};
use rewake_sys::error::Named;
use serde::{Deserialize, Serialize};

use super::error::{DiskError, call};
use crate::deadline::Deadline;
use crate::fault::Faults;

/// How long a device may stay busy, mostly with a scanner that looks at every new one,
/// before its removal is left to the kernel.
const REMOVE_BUDGET: Duration = Duration::from_secs(3);
const FIRST_WAIT: Duration = Duration::from_millis(1);
const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// One piece of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum DiskStep {
    /// A file. It is ours if device and inode agree; both are known before it has a name.
    File {
        /// Absolute path.
        path: PathBuf,
        /// `st_dev`.
        device: u64,
        /// `st_ino`.
        inode: u64,
    },
    /// A device-mapper device. It is ours if name and uuid agree: the name has a random part
    /// made for this attachment, the uuid names the store.
    Mapping {
        /// Its name.
        name: String,
        /// Its uuid.
        uuid: String,
    },
    /// A device node of ours, where `/dev` does not show the device.
    Node {
        /// Absolute path.
        path: PathBuf,
        /// The device it stands for, `st_rdev`.
        device: u64,
    },
}

impl fmt::Display for DiskStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, .. } => write!(f, "file {}", path.display()),
            Self::Mapping { name, .. } => write!(f, "device {name}"),
            Self::Node { path, .. } => write!(f, "node {}", path.display()),
        }
    }
}

impl DiskStep {
    /// Undoes this one step. What is gone already, or is not ours any more, counts as undone.
    /// Blocks while a device is busy, for three seconds or until the deadline.
    ///
    /// # Errors
    /// [`DiskError`]; the thing may still be there, and the call may be repeated.
    pub fn undo(&self, deadline: Deadline) -> Result<(), DiskError> {
        self.undo_with(None, &Faults::NONE, deadline)
    }

    /// Whether a file or node is there, and ours. Of a device only the kernel can tell.
    pub(super) fn is_in_place(&self) -> bool {
        let found = |path: &Path| std::fs::symlink_metadata(path).ok();
        match self {
            Self::File {
                path,
                device,
                inode,
            } => found(path).is_some_and(|it| (it.dev(), it.ino()) == (*device, *inode)),
            Self::Node { path, device } => found(path).is_some_and(|it| it.rdev() == *device),
            Self::Mapping { .. } => true,
        }
    }

    /// [`DiskStep::undo`] through a control device that is open already.
    pub(super) fn undo_with(
        &self,
        control: Option<&Result<Control, CallError>>,
        faults: &Faults,
        deadline: Deadline,
    ) -> Result<(), DiskError> {
        match self {
            Self::File {
                path,
                device,
                inode,
            } => unlink(path, faults, |found| {
                (found.dev(), found.ino()) == (*device, *inode)
            }),
            Self::Node { path, device } => unlink(path, faults, |found| found.rdev() == *device),
            Self::Mapping { name, uuid } => {
                let opened;
                let control = match control {
                    Some(control) => control,
                    None => {
                        opened = Control::open();
                        &opened
                    }
                };
                let control = match control {
                    Ok(control) => control,
                    // No driver, no device.
                    Err(error) if error.is_gone() => return Ok(()),
                    Err(source) => {
                        return Err(DiskError::Call {
                            step: "open the device-mapper".to_owned(),
                            source: *source,
                        });
                    }
                };
                unmap(control, name, uuid, faults, deadline)
            }
        }
    }
}

fn unlink(
    path: &Path,
    faults: &Faults,
    is_ours: impl Fn(&std::fs::Metadata) -> bool,
) -> Result<(), DiskError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if is_ours(&found) => {}
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(error).named("lstat").map_err(|source| DiskError::Call {
                step: format!("look at {}", path.display()),
                source,
            });
        }
    }
    let removed = call(faults, format!("remove {}", path.display()), || {
        std::fs::remove_file(path).named("unlink")
    });
    match removed {
        Err(DiskError::Call { source, .. }) if source.is_gone() => Ok(()),
        other => other,
    }
}

fn unmap(
    control: &Control,
    name: &str,
    uuid: &str,
    faults: &Faults,
    deadline: Deadline,
) -> Result<(), DiskError> {
    let is_there = || {
        let step = format!("look for {name}");
        let found = call(faults, step, || control.info(DeviceRef::Name(name)))?;
        Ok::<bool, DiskError>(found.is_some_and(|it| it.uuid == uuid))
    };
    let remove = |deferred| {
        let step = format!("remove {name}");
        match call(faults, step, || {
            control.remove(DeviceRef::Name(name), deferred)
        }) {
            Err(DiskError::Call { source, .. }) if source.is_gone() => Ok(true),
            Err(DiskError::Call { source, .. }) if source.is_busy() => Ok(false),
            other => other.map(|()| true),
        }
    };
    if !is_there()? {
        return Ok(());
    }
    let patience = deadline.within(REMOVE_BUDGET);
    let mut wait = FIRST_WAIT;
    loop {
        if remove(false)? {
            return Ok(());
        }
        let left = patience.remaining().unwrap_or(LONGEST_WAIT);
        if left.is_zero() {
            break;
        }
        pause(control, wait.min(left))?;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
    remove(true)?;
    if is_there()? {
        return Err(DiskError::InUse {
            name: name.to_owned(),
            deferred: true,
        });
    }
    Ok(())
}

/// Waits for the device-mapper to report something, as it does on many changes, or for the
/// time given: closing a device is no event.
fn pause(control: &Control, limit: Duration) -> Result<(), DiskError> {
    let waited = control.arm().and_then(|()| control.wait_any(limit));
    waited.map(drop).map_err(|source| DiskError::Call {
        step: "wait for the device-mapper".to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_under_the_name_is_left_alone() {
        let path = std::env::temp_dir().join(format!("rewake-step-{}", std::process::id()));
        std::fs::write(&path, "mine").unwrap();
        let found = std::fs::metadata(&path).unwrap();
        let step = |inode| DiskStep::File {
            path: path.clone(),
            device: found.dev(),
            inode,
        };
        step(found.ino() + 1).undo(Deadline::NEVER).unwrap();
        assert!(path.exists());
        step(found.ino()).undo(Deadline::NEVER).unwrap();
        assert!(!path.exists());
        step(found.ino()).undo(Deadline::NEVER).unwrap();
    }
}
