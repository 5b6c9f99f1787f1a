//! Resume: a paused sandbox goes on, with its id, its slot and its disk.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rewake_sys::netns;

use super::context::Context;
use super::error::{Cause, Error, Operation};
use super::expected::One;
use super::hold::Hold;
use super::making::{Got, Making};
use super::state::{State, Status};
use super::untouched::{Print, Ran, prints};
use crate::deadline::Deadline;
use crate::envd::init::{Init, Lifecycle};
use crate::ids::{SandboxId, SlotIndex};
use crate::plan::MemoryMode;
use crate::resource::net::{CreateError, Slot};
use crate::restore::Gate;
use crate::restore::kit::{Kit, KitError};
use crate::snapshot::{MEMORY_FILE, ZONE_FILE};
use crate::timeline::Timeline;

/// How a sandbox is resumed.
#[derive(Debug, Clone)]
pub struct ResumeOptions {
    /// What its agent is told. Lifecycle and ids are filled in.
    pub init: Init,
    /// How its memory comes back; absent: the best that works.
    pub memory_mode: Option<MemoryMode>,
    /// When to give up. [`Deadline::NEVER`]: the host's patience.
    pub deadline: Deadline,
}

impl Default for ResumeOptions {
    fn default() -> Self {
        Self {
            init: Init::new(),
            memory_mode: None,
            deadline: Deadline::NEVER,
        }
    }
}

/// Takes up everything that the restore needs.
pub(crate) fn prepare(
    ctx: &Arc<Context>,
    id: &SandboxId,
    options: ResumeOptions,
) -> Result<Making, Error> {
    let timeline = Timeline::start();
    let deadline = ctx.deadline(options.deadline);
    let failed = |cause| Error::new(id, Operation::Resume, cause);
    let hold = Hold::take(ctx, id, Operation::Resume)?;
    let paused = hold.expect(State::Paused).map_err(failed)?;
    let memory = hold.journal.story().identity.memory;
    let place = ctx
        .admission
        .enter(ctx.needs(options.memory_mode, memory), || ctx.running())
        .map_err(|full| failed(Cause::Full(full)))?;
    let snapshot = hold.dir.snapshot(paused.generation);
    let mut resuming = paused.now(State::Resuming);
    resuming.generation += 1;
    hold.change(resuming).map_err(failed)?;
    let mut making = Making::new(hold, Operation::Resume, place, timeline, deadline);
    if let Err(cause) = acquire(ctx, &paused, &mut making) {
        return Err(making.abandon(cause, Ran::No));
    }
    // The memory file of this life, written to in one mode only: where it is not, the proof
    // is as good.
    let memory = [ZONE_FILE, MEMORY_FILE].map(|name| snapshot.join(name));
    let memory = memory.iter().find(|path| path.exists());
    let proof = prints(making.disk(), memory.map(std::path::PathBuf::as_path));
    let gate = consume(&making.hold, proof);
    let init = Init {
        lifecycle: Lifecycle::random(),
        sandbox_id: Some(id.to_string()),
        ..options.init
    };
    let mode = options.memory_mode;
    making.specify(
        &snapshot,
        |inputs| inputs.memory_mode = Context::memory_policy(mode, true),
        init,
        gate,
    );
    Ok(making)
}

/// Slot and disk, neither waiting for the other.
fn acquire(ctx: &Context, paused: &Status, making: &mut Making) -> Result<(), Cause> {
    let (id, disks) = (making.hold.id.clone(), making.hold.dir.disk());
    let has_disk = making.hold.journal.story().identity.disk;
    let deadline = making.deadline;
    let take_slot = || -> Result<Option<Got>, Cause> {
        let Some(index) = paused.slot else {
            return Ok(None);
        };
        let slot = take_up(ctx, &id, index, deadline)?;
        let kit = ctx.expected.take(&id, &slot);
        Ok(Some(Got::Standing(Box::new((slot, kit)))))
    };
    let attach = || ctx.disks.attach(&id, &disks, deadline);
    making.acquire(take_slot, has_disk.then_some(attach), "attach")
}

/// The slot that is kept for a paused sandbox, made anew where it does not stand any more.
fn take_up(
    ctx: &Context,
    id: &SandboxId,
    index: SlotIndex,
    deadline: Deadline,
) -> Result<Slot, Cause> {
    let lease = ctx.net.slots().reserve(index, id.as_str())?;
    let slot = ctx.net.revive(lease, deadline);
    slot.map_err(|failure| Cause::Slot(CreateError::Build(failure)))
}

/// The snapshot is marked as consumed, durably, before the vCPUs may run: from then on it
/// does not go with disk and memory any more, unless it is proven that they did not run.
fn consume(hold: &Hold, proof: Option<Vec<Print>>) -> Gate {
    let (journal, dir) = (Arc::clone(&hold.journal), hold.dir.clone());
    Gate(Arc::new(move || {
        if dir.is_doomed() {
            return Err(io::Error::other("the sandbox is being destroyed"));
        }
        let mut status = journal.status();
        status.consumed = true;
        status.proof.clone_from(&proof);
        journal.commit(status).map_err(io::Error::other)
    }))
}

/// Starts a process that waits for the resume of a paused sandbox, in its slot. A second one
/// takes the place of the first.
pub(crate) fn expect(
    ctx: &Arc<Context>,
    id: &SandboxId,
    wait: Duration,
    asked: Deadline,
) -> Result<(), Error> {
    let deadline = ctx.deadline(asked);
    let failed = |cause| Error::new(id, Operation::Resume, cause);
    let hold = Hold::take(ctx, id, Operation::Resume)?;
    let paused = hold.expect(State::Paused).map_err(failed)?;
    let Some(index) = paused.slot else {
        // Without a slot it is in the caller's namespace, whichever that will be.
        return Ok(());
    };
    let mut slot = take_up(ctx, id, index, deadline).map_err(failed)?;
    let started = start(ctx, &slot, wait, deadline);
    // It is kept for the sandbox as before, whatever came of it.
    let parked = slot.lease().set_parked(true);
    drop(slot);
    let one = started.map_err(|error| failed(Cause::Kit(error)))?;
    parked.map_err(|error| failed(error.into()))?;
    ctx.expected.put(id, one).map_err(|source| {
        let (what, path) = ("start a thread for", hold.dir.path().to_owned());
        failed(Cause::File { what, path, source })
    })
}

fn start(ctx: &Context, slot: &Slot, wait: Duration, deadline: Deadline) -> Result<One, KitError> {
    let netns = netns::identity(slot.netns()).map_err(KitError::Descriptors)?;
    let (spec, runtime_dir) = (&ctx.config.vmm, &ctx.config.runtime_dir);
    let kit = Kit::prepare(spec, runtime_dir, Some(slot.netns()), deadline)?;
    let now = Instant::now();
    // As good as for ever.
    let longest = Duration::from_secs(365 * 24 * 3600);
    Ok(One {
        kit,
        netns,
        until: now + wait.min(longest),
    })
}
