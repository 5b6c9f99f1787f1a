//! The merged view of a disk as an image that stands alone.

use std::fs::File;
use std::path::Path;

use rewake_sys::error::Named;
use rustix::io::Errno;

use super::error::{DiskError, call};
use super::file::{self, Copy, Progress, Reaches, Unnamed};
use super::pressure::StoreState;
use super::record::Base;
use super::{Disk, DiskKind, DiskPool};
use crate::deadline::Deadline;

impl DiskPool {
    /// Writes the disk as it is now to a new raw image: sparse, without zero blocks, sharing
    /// blocks with the base image where the file system can. The image appears under its
    /// name when it is complete and on the disk; until then there is nothing.
    ///
    /// The VM must be paused or gone, or the image is of no moment in particular. Blocks for
    /// as long as reading the disk takes; `progress` is called about once a megabyte.
    ///
    /// # Errors
    /// [`DiskError::Occupied`] where `to` exists, [`DiskError::Invalid`] where the disk's
    /// contents are not to be trusted, [`DiskError::Timeout`], else what the calls say.
    pub fn flatten(
        &self,
        disk: &Disk,
        to: &Path,
        progress: &mut dyn FnMut(Progress),
        deadline: Deadline,
    ) -> Result<(), DiskError> {
        self.refuse_invalid(disk)?;
        if to.exists() {
            return Err(DiskError::Occupied {
                path: to.to_owned(),
            });
        }
        let from = file::open(&disk.path, false, &self.faults)?;
        call(&self.faults, "write the disk's cache back", || {
            rustix::fs::fsync(&from).named("fsync")
        })?;
        let image = Unnamed::new(to, &self.faults)?;
        let size = disk.size();
        let shared = if disk.kind() == DiskKind::DmSnapshot {
            self.clone_base(disk, &image)?
        } else if file::clone(&from, &image.file, &self.faults)? {
            progress(Progress {
                done: size,
                total: size,
            });
            return self.publish(image, deadline);
        } else {
            None
        };
        Copy {
            from: &from,
            size: size.0,
            to: &image.file,
            shared: shared.as_ref(),
            faults: &self.faults,
            deadline,
        }
        .run(progress)?;
        // What was read of a disk that failed meanwhile may be wrong.
        self.refuse_invalid(disk)?;
        self.publish(image, deadline)
    }

    /// Lets the image begin as a clone of the base image, where both are there and the file
    /// system can. Returns the base image then.
    fn clone_base(&self, disk: &Disk, image: &Unnamed) -> Result<Option<File>, DiskError> {
        let recorded = &disk.record.base;
        let base = match Base::open(&recorded.path, &self.faults) {
            Ok(base) => base,
            // The device still has it.
            Err(error) if error.errno() == Some(Errno::NOENT.raw_os_error()) => return Ok(None),
            Err(error) => return Err(error),
        };
        let shares =
            base.expect(recorded).is_ok() && file::clone(&base.file, &image.file, &self.faults)?;
        Ok(shares.then_some(base.file))
    }

    fn publish(&self, image: Unnamed, deadline: Deadline) -> Result<(), DiskError> {
        let step = image.step.clone();
        let published = image.publish(Reaches::Now, &self.faults);
        if published.is_err() {
            // It may have got its name already.
            step.undo_with(Some(&self.control), &self.faults, deadline)?;
        }
        published.map(drop)
    }

    fn refuse_invalid(&self, disk: &Disk) -> Result<(), DiskError> {
        if self.status(disk)?.state == StoreState::Invalid {
            return Err(DiskError::Invalid {
                id: disk.id.clone(),
            });
        }
        Ok(())
    }
}
