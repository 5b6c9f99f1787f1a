//! Processes that wait for resumes which are expected: each in the slot of its sandbox, for a
//! limited time.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rewake_sys::netns;

use super::context::Context;
use super::error::{Cause, Error, Operation};
use super::hold::{Hold, UNDO_BUDGET};
use super::state::State;
use crate::deadline::Deadline;
use crate::ids::SandboxId;
use crate::resource::net::{CreateError, Slot};
use crate::restore::kit::{Kit, KitError};

/// The processes of one host. Dropping it ends them.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    shared: Arc<Shared>,
    /// Ends what nobody came for; started with the first process.
    reaper: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    kits: HashMap<SandboxId, One>,
    stop: bool,
}

/// A process that waits.
#[derive(Debug)]
struct One {
    kit: Kit,
    /// Device and inode of the namespace that it stands in. While it stands there they are no
    /// other's.
    netns: (u64, u64),
    until: Instant,
}

impl Expected {
    /// Whether a process waits for the sandbox.
    pub(crate) fn has(&self, id: &SandboxId) -> bool {
        self.shared.lock().kits.contains_key(id)
    }

    /// The process that waits for the sandbox in this very slot, if it is still well.
    pub(crate) fn take(&self, id: &SandboxId, slot: &Slot) -> Option<Kit> {
        let one = self.shared.lock().kits.remove(id)?;
        let is_there = netns::identity(slot.netns()).is_ok_and(|it| it == one.netns);
        if is_there && one.kit.is_healthy() {
            return Some(one.kit);
        }
        log::info!("Sandbox {id}: the process that waited for it cannot be used");
        None
    }

    /// Ends the process that waits for the sandbox, if there is one.
    pub(crate) fn forget(&self, id: &SandboxId) {
        let one = self.shared.lock().kits.remove(id);
        end(one.into_iter().collect());
    }

    fn put(&self, id: &SandboxId, one: One) -> std::io::Result<()> {
        let mut reaper = self.reaper.lock().unwrap_or_else(PoisonError::into_inner);
        if reaper.is_none() {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("rw-expected".to_owned());
            *reaper = Some(thread.spawn(move || shared.reap())?);
        }
        drop(reaper);
        let before = self.shared.lock().kits.insert(id.clone(), one);
        self.shared.changed.notify_one();
        end(before.into_iter().collect());
        Ok(())
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let kits = {
            let mut state = self.shared.lock();
            state.stop = true;
            std::mem::take(&mut state.kits)
        };
        self.shared.changed.notify_one();
        end(kits.into_values().collect());
        let reaper = self.reaper.get_mut();
        let reaper = reaper.unwrap_or_else(PoisonError::into_inner);
        if let Some(reaper) = reaper.take() {
            // One that panicked has nothing more to say here.
            let _ = reaper.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // No call that can panic is made while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: ends what has waited for as long as it was to.
    fn reap(&self) {
        let mut state = self.lock();
        while !state.stop {
            let now = Instant::now();
            let late = state.kits.extract_if(|_, one| one.until <= now);
            let late: Vec<_> = late.map(|(_, one)| one).collect();
            if !late.is_empty() {
                drop(state);
                end(late);
                state = self.lock();
                continue;
            }
            let next = state.kits.values().map(|one| one.until).min();
            // The platform's clock cannot add the largest duration there is.
            let limit = next.map_or(Duration::from_secs(3600), |next| next - now);
            let waited = self.changed.wait_timeout(state, limit);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn end(all: Vec<One>) {
    for one in all {
        for left in one.kit.destroy(Deadline::after(UNDO_BUDGET)) {
            log::warn!("Left over of a process that waited: {left}");
        }
    }
}

/// Starts a process for a paused sandbox, in its slot. A second one takes the place of the
/// first.
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
    let lease = ctx.net.slots().reserve(index, id.as_str());
    let lease = lease.map_err(|error| failed(error.into()))?;
    let slot = ctx.net.revive(lease, deadline);
    let mut slot = slot.map_err(|it| failed(Cause::Slot(CreateError::Build(it))))?;
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
