//! Files on their way into a staging directory.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rewake_sys::CallError;
use rewake_sys::error::Named;
use rewake_sys::reflink;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::{ImportError, Transfer};
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::snapshot::extents;
use crate::template::check::open_regular;
use crate::template::error::{TemplateError, about, call};
use crate::units::Bytes;

/// What is copied before progress is told and the deadline is looked at.
const PIECE: u64 = 64 << 20;

/// What a transfer is told with, and how it ends.
pub(super) struct Carrier<'a> {
    pub(super) transfer: Transfer,
    pub(super) faults: &'a Faults,
    pub(super) progress: &'a mut dyn FnMut(Bytes, Bytes),
    pub(super) deadline: Deadline,
}

impl Carrier<'_> {
    /// Brings the file `from` to the new name `to`: as a second name of the same file, as a
    /// clone that shares its blocks, or as a copy with the same holes.
    pub(super) fn bring(&mut self, from: &Path, to: &Path) -> Result<(), ImportError> {
        let source = call(self.faults, about("open", from), || open_regular(from))?;
        if self.transfer == Transfer::Link {
            let linked = call(self.faults, about("link", from), || {
                std::fs::hard_link(from, to).named("link")
            });
            return Ok(linked?);
        }
        let target = call(self.faults, about("make", to), || {
            let mut options = File::options();
            let options = options.read(true).write(true).create_new(true).mode(0o600);
            options.open(to).named("open")
        })?;
        let shared = self.transfer == Transfer::Auto
            && call(self.faults, about("clone to", to), || {
                reflink::try_clone_file(&source, &target)
            })?;
        if shared {
            return Ok(());
        }
        self.copy(&source, &target, to)
    }

    fn copy(&mut self, source: &File, target: &File, to: &Path) -> Result<(), ImportError> {
        let length = source.metadata().named("fstat").map_err(|source| {
            let step = about("look at the source of", to);
            TemplateError::Call { step, source }
        })?;
        let length = length.len();
        call(self.faults, about("set the size of", to), || {
            target.set_len(length).named("ftruncate")
        })?;
        let mut at = 0;
        loop {
            (self.progress)(Bytes(at), Bytes(length));
            if self.deadline.has_passed() {
                let step = "copy the snapshot";
                return Err(TemplateError::Timeout { step }.into());
            }
            let next = call(self.faults, about("copy to", to), || {
                extents::copy_piece(source, target, at, PIECE).map_err(named)
            })?;
            match next {
                Some(next) => at = next,
                None => break,
            }
        }
        (self.progress)(Bytes(length), Bytes(length));
        Ok(())
    }
}

fn named(error: extents::CopyError) -> CallError {
    CallError::new(error.call(), error.errno())
}

/// Refuses an image that a VM has open for writing: what is copied then is of no moment in
/// particular. Cloud Hypervisor locks its images.
pub(super) fn refuse_open_image(path: &Path, faults: &Faults) -> Result<(), ImportError> {
    let file = call(faults, about("open", path), || open_regular(path))?;
    let locked = call(faults, about("look for a lock on", path), || {
        rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockShared).named("fcntl F_SETLK")
    });
    match locked {
        Err(error) if matches!(error.errno(), Some(Errno::AGAIN | Errno::ACCESS)) => {
            Err(ImportError::InUse {
                path: path.to_owned(),
            })
        }
        other => Ok(other?),
    }
}
