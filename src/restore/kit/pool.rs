//! A pool of warm kits, each on a network slot of its own.
//!
//! The pool owns one background thread, started by [`KitPool::start`] and ended by
//! [`KitPool::close`] or drop. It makes kits until the target is reached, at a limited rate:
//! each takes some milliseconds of a processor that a restore may be waiting for.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Kit, KitError};
use crate::deadline::Deadline;
use crate::resource::net::{CreateError, HostNet, Slot, SlotFailure, SlotPool};
use crate::resource::slot::SlotError;
use crate::units::Bytes;
use crate::vmm::launch::LaunchSpec;

/// The owner that slots of idle kits have in their records.
const OWNER: &str = "kit";
/// After a failure, nothing is tried for this long.
const BACK_OFF: Duration = Duration::from_secs(1);

/// Sizes and limits of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KitPoolOptions {
    /// How many kits stand ready.
    pub target: usize,
    /// The least time between the starts of two kits, in milliseconds, and while some are
    /// left, between taking one and starting the next: a restore has the processors to itself
    /// for so long.
    pub refill_interval_ms: u64,
    /// How long making one kit, or removing one, may take, in milliseconds.
    pub step_budget_ms: u64,
}

impl Default for KitPoolOptions {
    fn default() -> Self {
        Self {
            target: 0,
            refill_interval_ms: 20,
            step_budget_ms: 10_000,
        }
    }
}

/// What a pool holds and has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KitPoolStats {
    /// Kits ready to be taken.
    pub ready: usize,
    /// Kits handed out so far.
    pub taken: u64,
    /// Times that none was ready.
    pub exhausted: u64,
    /// Kits that failed the check before they were handed out.
    pub unhealthy: u64,
    /// Kits that could not be made.
    pub failed: u64,
    /// Private memory of the ready ones, as measured when each had been made.
    pub private_memory: Bytes,
}

/// Where kits stand.
#[derive(Debug, Clone)]
pub enum Places {
    /// In the network namespace of the pool's thread: whoever started the pool.
    Here,
    /// Each in a network slot of its own, out of the pool where that has one ready.
    Slots {
        /// The host that builds them.
        host: Arc<HostNet>,
        /// Slots that stand already.
        pool: Option<Arc<SlotPool>>,
    },
}

/// A kit, and the slot it stands in.
#[derive(Debug)]
#[must_use = "dropping it ends the process and leaves the slot to a sweep"]
pub struct Warm {
    /// The process, for one restore.
    pub kit: Kit,
    /// Its place; the caller answers for it from now on, whatever becomes of the restore.
    pub slot: Option<Slot>,
}

/// Why a kit could not be added to the pool.
#[derive(Debug, thiserror::Error)]
enum FillError {
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(transparent)]
    Kit(#[from] KitError),
}

/// A pool of kits and the thread that fills it.
#[derive(Debug)]
pub struct KitPool {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    spec: LaunchSpec,
    runtime_dir: PathBuf,
    places: Places,
    options: KitPoolOptions,
    state: Mutex<State>,
    /// Something for the worker to do, or to stop for.
    wanted: Condvar,
    /// The worker has done something.
    done: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<(Warm, Bytes)>,
    dead: Vec<Warm>,
    last_taken: Option<Instant>,
    stats: KitPoolStats,
    stop: bool,
}

impl KitPool {
    /// Starts the pool's thread, which begins to make kits at once: Cloud Hypervisors as
    /// `spec` says, their directories under `runtime_dir`.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn start(
        spec: LaunchSpec,
        runtime_dir: PathBuf,
        places: Places,
        options: KitPoolOptions,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            spec,
            runtime_dir,
            places,
            options,
            state: Mutex::default(),
            wanted: Condvar::new(),
            done: Condvar::new(),
        });
        let worker = Arc::clone(&shared);
        let worker = std::thread::Builder::new()
            .name("rw-kit-pool".to_owned())
            .spawn(move || worker.serve())?;
        Ok(Self {
            shared,
            worker: Some(worker),
        })
    }

    /// Hands out a kit that was looked at just now, its slot for `owner`; `None` where none
    /// is ready, which is when the caller starts cold. Takes some microseconds and never
    /// waits for the pool's thread.
    ///
    /// # Errors
    /// [`SlotError::File`] where the slot's record cannot be changed; the kit is gone then.
    pub fn take(&self, owner: &str) -> Result<Option<Warm>, SlotError> {
        loop {
            let mut state = self.shared.lock();
            let Some((mut warm, _)) = state.ready.pop_front() else {
                state.stats.exhausted += 1;
                return Ok(None);
            };
            state.last_taken = Some(Instant::now());
            self.shared.wanted.notify_one();
            if !self.shared.is_healthy(&warm) {
                state.stats.unhealthy += 1;
                state.dead.push(warm);
                continue;
            }
            state.stats.taken += 1;
            // Writing the record may wait for a disk: nobody else shall wait with it.
            drop(state);
            let renamed = match &mut warm.slot {
                Some(slot) => slot.lease().set_owner(owner),
                None => Ok(()),
            };
            if let Err(error) = renamed {
                self.shared.lock().dead.push(warm);
                return Err(error);
            }
            return Ok(Some(warm));
        }
    }

    /// What the pool holds and has done.
    #[must_use]
    pub fn stats(&self) -> KitPoolStats {
        let state = self.shared.lock();
        KitPoolStats {
            ready: state.ready.len(),
            private_memory: Bytes(state.ready.iter().map(|(_, bytes)| bytes.0).sum()),
            ..state.stats.clone()
        }
    }

    /// Waits until the target is reached and what was found dead is removed, and says whether
    /// that was so before the deadline.
    #[must_use]
    pub fn wait_settled(&self, deadline: Deadline) -> bool {
        let mut state = self.shared.lock();
        while state.ready.len() < self.shared.options.target || !state.dead.is_empty() {
            let left = deadline.remaining().unwrap_or(Duration::MAX);
            if left.is_zero() {
                return false;
            }
            state = wait(&self.shared.done, state, left);
        }
        true
    }

    /// Ends the thread, and every kit that was not taken, with its slot. The result says what
    /// is left of each.
    #[must_use]
    pub fn close(mut self, deadline: Deadline) -> Vec<String> {
        self.stop();
        let all = self.shared.lock().take_all();
        self.shared.remove(all, deadline)
    }

    fn stop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wanted.notify_one();
        if let Some(worker) = self.worker.take() {
            // A worker that panicked has nothing more to say here.
            let _ = worker.join();
        }
    }
}

impl Drop for KitPool {
    fn drop(&mut self) {
        self.stop();
        let all = self.shared.lock().take_all();
        for left in self.shared.remove(all, self.shared.budget()) {
            log::warn!("Left over of a kit: {left}");
        }
    }
}

impl State {
    fn take_all(&mut self) -> Vec<Warm> {
        let mut all = std::mem::take(&mut self.dead);
        all.extend(self.ready.drain(..).map(|(warm, _)| warm));
        all
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No call that can panic is made while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn budget(&self) -> Deadline {
        Deadline::after(Duration::from_millis(self.options.step_budget_ms))
    }

    fn is_healthy(&self, warm: &Warm) -> bool {
        let slot = match (&self.places, &warm.slot) {
            (Places::Slots { host, .. }, Some(slot)) => host.is_healthy(slot),
            _ => true,
        };
        slot && warm.kit.is_healthy()
    }

    /// The thread: makes kits while there is room, and removes those that were found dead.
    fn serve(&self) {
        let interval = Duration::from_millis(self.options.refill_interval_ms);
        let mut earliest = Instant::now();
        let mut state = self.lock();
        while !state.stop {
            let now = Instant::now();
            let wants = state.ready.len() < self.options.target;
            let quiet_from = state.last_taken.filter(|_| !state.ready.is_empty());
            let next = quiet_from.map_or(earliest, |taken| earliest.max(taken + interval));
            if wants && now >= next {
                earliest = now + interval;
                drop(state);
                let made = self.make();
                state = self.lock();
                match made {
                    Ok(made) => state.ready.push_back(made),
                    Err(error) => {
                        earliest = now + BACK_OFF;
                        state.stats.failed += 1;
                        log::warn!("Cannot prepare a kit: {}", chain(&error));
                    }
                }
            } else if !state.dead.is_empty() {
                let dead = std::mem::take(&mut state.dead);
                drop(state);
                for left in self.remove(dead, self.budget()) {
                    log::warn!("Left over of a kit: {left}");
                }
                state = self.lock();
            } else {
                let idle = if wants { next - now } else { Duration::MAX };
                state = wait(&self.wanted, state, idle);
                continue;
            }
            self.done.notify_all();
        }
    }

    fn make(&self) -> Result<(Warm, Bytes), FillError> {
        let deadline = self.budget();
        let mut slot = self.slot(deadline)?;
        let netns = slot.as_ref().map(Slot::netns);
        let made = Kit::prepare(&self.spec, &self.runtime_dir, netns, deadline);
        let kit = match (made, &mut slot) {
            (Ok(kit), None) => kit,
            (Ok(kit), Some(place)) => match place.set_vmm(Some(kit.process())) {
                Ok(()) => kit,
                Err(error) => {
                    self.remove(vec![Warm { kit, slot }], deadline);
                    return Err(error.into());
                }
            },
            (Err(error), _) => {
                self.give_back(slot, deadline);
                return Err(error.into());
            }
        };
        let private = kit.private_memory().unwrap_or_default();
        Ok((Warm { kit, slot }, private))
    }

    fn slot(&self, deadline: Deadline) -> Result<Option<Slot>, FillError> {
        let Places::Slots { host, pool } = &self.places else {
            return Ok(None);
        };
        let ready = match pool {
            Some(pool) => pool.take(OWNER)?,
            None => None,
        };
        match ready {
            Some(slot) => Ok(Some(slot)),
            None => Ok(Some(host.create(OWNER, deadline)?)),
        }
    }

    fn give_back(&self, slot: Option<Slot>, deadline: Deadline) -> Option<SlotFailure> {
        let (Places::Slots { host, .. }, Some(slot)) = (&self.places, slot) else {
            return None;
        };
        host.destroy(slot, deadline).err()
    }

    /// Ends kits and removes their slots; says what is left.
    fn remove(&self, all: Vec<Warm>, deadline: Deadline) -> Vec<String> {
        let mut left = Vec::new();
        let mut slots = Vec::new();
        for Warm { kit, slot } in all {
            let leftovers = kit.destroy(deadline);
            left.extend(leftovers.iter().map(ToString::to_string));
            slots.extend(slot);
        }
        if let Places::Slots { host, .. } = &self.places {
            let failures = host.destroy_all(slots, deadline);
            left.extend(failures.iter().map(|it| format!("{it}: {}", it.source)));
        }
        left
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

fn wait<'a>(
    condition: &Condvar,
    state: MutexGuard<'a, State>,
    limit: Duration,
) -> MutexGuard<'a, State> {
    // The platform's clock cannot add the largest duration there is.
    let limit = limit.min(Duration::from_secs(3600));
    let (state, _) = condition
        .wait_timeout(state, limit)
        .unwrap_or_else(PoisonError::into_inner);
    state
}
