//! One loop device per base image, shared by all disks of the machine.
//!
//! Nobody counts the users. Each mapping holds the device open, and the kernel unbinds it
//! when the last one is gone (`LO_FLAGS_AUTOCLEAR`), also after a crash. Whether a device
//! is already bound to the image is asked of the kernel, by device and inode number of the
//! file behind it. A small file per image serialises that question among processes and
//! remembers the last answer, which is a hint and nothing more.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewake_sys::error::Named;
use rewake_sys::loopdev::{self, LoopDevice, LoopOptions};
use rustix::event::Timespec;
use rustix::fs::FlockOperation;

use super::error::{DiskError, call};
use super::record::Base;
use crate::deadline::Deadline;
use crate::fault::Faults;

/// All stores and images are seen in sectors of this size, whatever they lie on.
pub(super) const SECTOR: u32 = 512;
const HINT_MAX: u64 = 16;
const LOCK_WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Finds the device bound to the image, or binds one. While it is open it stays bound.
pub(super) fn share(
    base: &Base,
    runtime_dir: &Path,
    faults: &Faults,
    deadline: Deadline,
) -> Result<LoopDevice, DiskError> {
    let mut file = lock(base, runtime_dir, faults, deadline)?;
    let mut hint = Vec::new();
    call(faults, "read the hint to the base image's device", || {
        (&file).take(HINT_MAX).read_to_end(&mut hint).named("read")
    })?;
    if let Ok(number) = String::from_utf8_lossy(&hint).trim().parse()
        && let Some(device) = open_if_ours(number, base, runtime_dir)
    {
        return Ok(device);
    }
    let device = match find(base, runtime_dir, faults)? {
        Some(device) => device,
        None => call(faults, "bind the base image to a loop device", || {
            LoopDevice::bind_in(
                base.file.as_fd(),
                LoopOptions {
                    read_only: true,
                    autoclear: true,
                    // Through the page cache, which all sandboxes of the image share.
                    direct_io: false,
                    block_size: SECTOR,
                },
                &nodes(runtime_dir),
            )
        })?,
    };
    call(faults, "write the hint to the base image's device", || {
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| write!(file, "{}", device.number()))
            .named("write")
    })?;
    Ok(device)
}

/// The device bound to the image, if there is one.
pub(super) fn find(
    base: &Base,
    runtime_dir: &Path,
    faults: &Faults,
) -> Result<Option<LoopDevice>, DiskError> {
    let numbers = call(faults, "list the loop devices", loopdev::bound)?;
    Ok(numbers
        .into_iter()
        .find_map(|number| open_if_ours(number, base, runtime_dir)))
}

/// Where nodes are made that `/dev` has not.
pub(super) fn nodes(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("nodes")
}

/// Opens the device if it shows the whole image, read-only, and goes by itself. Checked
/// after opening: from then on it stays bound.
fn open_if_ours(number: u32, base: &Base, runtime_dir: &Path) -> Option<LoopDevice> {
    let device = LoopDevice::open_in(number, true, &nodes(runtime_dir)).ok()?;
    let status = device.status().ok()??;
    let same_file = (status.device, status.inode) == (base.device, base.identity.inode);
    let whole = status.offset == 0 && status.size_limit == 0;
    (same_file && whole && status.read_only && status.autoclear && !status.direct_io)
        .then_some(device)
}

fn lock(
    base: &Base,
    runtime_dir: &Path,
    faults: &Faults,
    deadline: Deadline,
) -> Result<File, DiskError> {
    let dir = runtime_dir.join("bases");
    let path = dir.join(format!("{:x}-{:x}", base.device, base.identity.inode));
    let file = call(faults, format!("open {}", path.display()), || {
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
        };
        open()
            .or_else(|error| match error.kind() {
                std::io::ErrorKind::NotFound => {
                    std::fs::create_dir_all(&dir)?;
                    open()
                }
                _ => Err(error),
            })
            .named("open")
    })?;
    let step = format!("lock {}", path.display());
    loop {
        match call(faults, step.clone(), || {
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).named("flock")
        }) {
            Err(DiskError::Call { source, .. }) if source.is_busy() => {}
            other => return other.map(|()| file),
        }
        if deadline.has_passed() {
            return Err(DiskError::Timeout { step });
        }
        wait_for_holder(deadline);
    }
}

/// `flock` has no time limit of its own: asked again each millisecond, which is about how
/// long a holder needs.
fn wait_for_holder(deadline: Deadline) {
    let limit = deadline.remaining().unwrap_or(Duration::MAX);
    let limit = Timespec::try_from(limit).map_or(LOCK_WAIT, |it| it.min(LOCK_WAIT));
    // Interrupted or not, the lock is tried next.
    let _ = rustix::event::poll(&mut [], Some(&limit));
}
