//! Writing a paused sandbox out to the disk after its caller was answered.

use std::fs::File;
use std::sync::Arc;

use super::context::Context;
use super::error::Operation;
use super::hold::Hold;
use super::pause::sync_disk;
use super::state::State;
use crate::ids::SandboxId;

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

fn write(
    ctx: &Arc<Context>,
    id: &SandboxId,
    generation: u64,
) -> Result<(), Box<dyn std::error::Error>> {
    // Without the lock: nobody shall wait for the disk. What is written out too much does no
    // harm, and whether it still counts is asked under the lock.
    let dir = super::dir::SandboxDir::of(&ctx.config.root, id);
    let snapshot = dir.snapshot(generation);
    for entry in std::fs::read_dir(&snapshot)? {
        File::open(entry?.path())?.sync_all()?;
    }
    File::open(&snapshot)?.sync_all()?;
    sync_disk(&dir, &ctx.config.faults)?;
    File::open(dir.path())?.sync_all()?;
    let hold = Hold::take(ctx, id, Operation::Pause)?;
    let mut status = hold.status();
    if status.state == State::Paused && status.generation == generation {
        status.durable = true;
        hold.journal.commit(status)?;
    }
    Ok(())
}
