//! Processes that wait for resumes which are expected: each in the slot of its sandbox, for a
//! limited time.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rewake_sys::netns;

use crate::deadline::Deadline;
use crate::ids::SandboxId;
use crate::resource::net::Slot;
use crate::restore::kit::Kit;

/// For ending a process.
const END_BUDGET: Duration = Duration::from_secs(10);

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
pub(crate) struct One {
    pub(crate) kit: Kit,
    /// Device and inode of the namespace that it stands in. While it stands there they are no
    /// other's.
    pub(crate) netns: (u64, u64),
    pub(crate) until: Instant,
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

    /// Lets a process wait for the sandbox. It takes the place of another.
    ///
    /// # Errors
    /// Where the thread that ends it cannot be started; it is gone then.
    pub(crate) fn put(&self, id: &SandboxId, one: One) -> std::io::Result<()> {
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
        for left in one.kit.destroy(Deadline::after(END_BUDGET)) {
            log::warn!("Left over of a process that waited: {left}");
        }
    }
}
