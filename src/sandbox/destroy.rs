//! Destroy: a sandbox is removed, whatever state it is in.

use std::sync::Arc;

use super::context::Context;
use super::dir::{DirLock, SandboxDir};
use super::error::{Cause, Error, Operation, file};
use super::hold::{Hold, is_gone};
use super::journal::Journal;
use crate::deadline::Deadline;
use crate::ids::SandboxId;
use crate::resource::ledger::Step;
use crate::timeline::{Phase, Timeline};

/// Removes a sandbox and all that it has. What is gone already counts as removed.
///
/// An operation that is under way, in any process, is ended: its VM is killed, it undoes what
/// it made, and then the sandbox is removed.
pub(crate) fn destroy(
    ctx: &Arc<Context>,
    id: &SandboxId,
    asked: Deadline,
) -> Result<Timeline, Error> {
    let mut timeline = Timeline::start();
    let deadline = ctx.deadline(asked);
    let failed = |cause| Error::new(id, Operation::Destroy, cause);
    // Also where another process has removed the sandbox.
    ctx.expected.forget(id);
    let dir = SandboxDir::of(&ctx.config.root, id);
    if !dir.path().exists() {
        return Ok(timeline);
    }
    dir.doom()
        .map_err(|error| failed(file("mark", dir.path())(error)))?;
    let Some(lock) = seize(&dir, deadline).map_err(failed)? else {
        return Ok(timeline);
    };
    let hold = match Hold::locked(ctx, id, dir, lock) {
        Ok(hold) => hold,
        Err(Cause::Journal(error)) if is_gone(&error) => return Ok(timeline),
        Err(cause) => return Err(failed(cause)),
    };
    let left = hold.remove_all(deadline);
    if !left.is_empty() {
        return Err(failed(Cause::LeftOver).with_leftovers(left));
    }
    timeline.mark(Phase::Undone);
    Ok(timeline)
}

/// Gets the lock; whoever has it is made to give it up. `None` where the sandbox went.
fn seize(dir: &SandboxDir, deadline: Deadline) -> Result<Option<DirLock>, Cause> {
    let gone = |error: std::io::Error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            return Ok(None);
        }
        Err(file("lock", dir.path())(error))
    };
    match dir.try_lock() {
        Ok(Some(lock)) => return Ok(Some(lock)),
        Ok(None) => {}
        Err(error) => return gone(error),
    }
    // Whoever is at work wrote its VM down before it looks whether the sandbox is doomed: it
    // sees that, or we see the VM.
    end_noted_vm(dir);
    match dir.lock(deadline) {
        Ok(Some(lock)) => Ok(Some(lock)),
        Ok(None) => Err(Cause::UnderWay),
        Err(error) => gone(error),
    }
}

fn end_noted_vm(dir: &SandboxDir) {
    let Ok(story) = Journal::story_of(&dir.journal()) else {
        return;
    };
    for step in &story.steps {
        if matches!(step, Step::Process { .. })
            && let Err(error) = step.undo(Deadline::after(super::hold::UNDO_BUDGET))
        {
            log::warn!("{step}: {error}");
        }
    }
}
