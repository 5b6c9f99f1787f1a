//! Writing a paused sandbox out to the disk, which zeros need not go to.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::context::Context;
use super::dir::SandboxDir;
use super::error::{Cause, Operation};
use super::hold::Hold;
use super::state::State;
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::ids::SandboxId;
use crate::resource::disk::DiskError;
use crate::snapshot::Puncher;
use crate::units::Bytes;

/// Starts a thread that brings the snapshot to the disk, and notes when it is there. Where
/// the sandbox has gone on meanwhile, there is nothing to note.
pub(crate) fn write_out(ctx: &Arc<Context>, id: &SandboxId, generation: u64) {
    let (ctx, name) = (Arc::clone(ctx), id.clone());
    let started = std::thread::Builder::new()
        .name("rw-write-out".to_owned())
        .spawn(move || {
            if let Err(error) = write(&ctx, &name, generation) {
                log::warn!("Sandbox {name}: it is not on the disk yet: {error}");
            }
        });
    if let Err(error) = started {
        log::warn!("Sandbox {id}: it is not on the disk yet: {error}");
    }
}

/// Gives memory that Cloud Hypervisor wrote the holes that it has no notion of: most of a young
/// guest's RAM is zeros. Worth it before that is brought to the disk, and for whoever maps or
/// copies the file later. Blocks for some hundred milliseconds a GiB.
///
/// Without the holes the snapshot takes more room, and is the same.
pub(crate) fn punch(directory: &Path, faults: &Faults, deadline: Deadline) -> Option<Bytes> {
    // One step for tests, however many holes there are.
    faults.before("punch zeros").ok()?;
    let punched = Puncher::open(directory, &Faults::NONE).and_then(|puncher| {
        let Some(mut puncher) = puncher else {
            return Ok(None);
        };
        puncher.run(|| !deadline.has_passed())?;
        Ok(Some(puncher.freed()))
    });
    match punched {
        Ok(freed) => freed,
        Err(error) => {
            if !error.is_unsupported() {
                log::warn!("{error}");
            }
            None
        }
    }
}

/// Starts a thread that brings the disk of a sandbox that was just launched to the host's. Its
/// VM does not outlive the machine, so nobody waits for it; but what its guest flushes shall
/// be found again.
pub(crate) fn sync_behind(ctx: &Context, id: &SandboxId, dir: &SandboxDir) {
    let (disks, name, dir) = (Arc::clone(&ctx.disks), id.clone(), dir.disk());
    let started = std::thread::Builder::new()
        .name("rw-sync-disk".to_owned())
        .spawn(move || {
            if let Err(failure) = disks.sync(&name, &dir) {
                // Destroyed again, mostly.
                log::debug!("{failure}: {}", failure.source);
            }
        });
    if let Err(error) = started {
        log::warn!("Sandbox {id}: its disk is left to the kernel's own time: {error}");
    }
}

/// Brings the disk, which nothing has waited for until now, to the host's.
pub(crate) fn sync_disk(ctx: &Context, id: &SandboxId, dir: &SandboxDir) -> Result<(), Cause> {
    match ctx.disks.sync(id, &dir.disk()) {
        Err(failure) if matches!(failure.source, DiskError::Missing { .. }) => Ok(()),
        other => other.map_err(|failure| Cause::Disk {
            what: "write out",
            source: Box::new(failure),
        }),
    }
}

fn write(
    ctx: &Arc<Context>,
    id: &SandboxId,
    generation: u64,
) -> Result<(), Box<dyn std::error::Error>> {
    // Without the lock: nobody shall wait for the disk. What is written out too much does no
    // harm, and whether it still counts is asked under the lock.
    let dir = SandboxDir::of(&ctx.config.root, id);
    let snapshot = dir.snapshot(generation);
    for entry in std::fs::read_dir(&snapshot)? {
        File::open(entry?.path())?.sync_all()?;
    }
    File::open(&snapshot)?.sync_all()?;
    sync_disk(ctx, id, &dir)?;
    File::open(dir.path())?.sync_all()?;
    let hold = Hold::take(ctx, id, Operation::Pause)?;
    let mut status = hold.status();
    if status.state == State::Paused && status.generation == generation {
        status.durable = true;
        hold.journal.commit(status)?;
    }
    Ok(())
}
