//! Slots prepared ahead of their sandboxes, and removed behind them.
//!
//! A pool owns one background thread, started by [`SlotPool::start`] and ended by
//! [`SlotPool::close`] or drop. It builds slots until the target is reached, at a limited
//! rate so that it leaves the machine to those who use it, and removes retired slots in
//! batches. Handing a slot out takes no kernel lock and waits for nothing.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::create::Slot;
use super::error::SlotFailure;
use super::host::HostNet;
use crate::deadline::Deadline;
use crate::resource::slot::SlotError;

/// The owner that slots in the pool have in their records.
const OWNER: &str = "pool";
/// After a failed build, nothing is tried for this long.
const BACK_OFF: Duration = Duration::from_secs(1);

/// Sizes and limits of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolOptions {
    /// How many slots stand ready; 0 for a pool that only removes.
    pub target: usize,
    /// The least time between two builds, in milliseconds.
    pub refill_interval_ms: u64,
    /// How long one build or one removal of a batch may take, in milliseconds.
    pub step_budget_ms: u64,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            target: 0,
            refill_interval_ms: 10,
            step_budget_ms: 10_000,
        }
    }
}

/// What a pool holds and has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Slots ready to be handed out.
    pub ready: usize,
    /// Slots waiting to be removed, or being removed.
    pub retiring: usize,
    /// Slots handed out so far.
    pub taken: u64,
    /// Slots that failed the check before they were handed out.
    pub unhealthy: u64,
    /// Builds that failed.
    pub failed_builds: u64,
    /// Removals that failed; a sweep tries those again.
    pub failed_removals: u64,
}

/// A pool of slots and the thread that serves it.
#[derive(Debug)]
pub struct SlotPool {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    host: Arc<HostNet>,
    options: PoolOptions,
    state: Mutex<State>,
    /// Something for the worker to do, or to stop for.
    wanted: Condvar,
    /// The worker has done something.
    done: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Slot>,
    retired: Vec<Slot>,
    stats: PoolStats,
    stop: bool,
}

impl SlotPool {
    /// Starts the pool's thread, which begins to build at once.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn start(host: Arc<HostNet>, options: PoolOptions) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            host,
            options,
            state: Mutex::default(),
            wanted: Condvar::new(),
            done: Condvar::new(),
        });
        let worker = Arc::clone(&shared);
        let worker = std::thread::Builder::new()
            .name("rw-slot-pool".to_owned())
            .spawn(move || worker.serve())?;
        Ok(Self {
            shared,
            worker: Some(worker),
        })
    }

    /// Hands out a slot that was looked at just now, for `owner`; `None` where none is
    /// ready, which is when the caller builds one. Takes some microseconds.
    ///
    /// # Errors
    /// [`SlotError::File`] where the record cannot be changed; the slot is then retired.
    pub fn take(&self, owner: &str) -> Result<Option<Slot>, SlotError> {
        loop {
            let mut state = self.shared.lock();
            let Some(mut slot) = state.ready.pop_front() else {
                return Ok(None);
            };
            self.shared.wanted.notify_one();
            if !self.shared.host.is_healthy(&slot) {
                state.stats.unhealthy += 1;
                state.retired.push(slot);
                continue;
            }
            state.stats.taken += 1;
            drop(state);
            return match slot.lease.set_owner(owner) {
                Ok(()) => Ok(Some(slot)),
                Err(error) => {
                    self.retire(slot);
                    Err(error)
                }
            };
        }
    }

    /// Leaves a slot to the pool's thread to be removed. Does not wait.
    pub fn retire(&self, slot: Slot) {
        self.shared.lock().retired.push(slot);
        self.shared.wanted.notify_one();
    }

    /// What the pool holds and has done.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let state = self.shared.lock();
        PoolStats {
            ready: state.ready.len(),
            retiring: state.stats.retiring + state.retired.len(),
            ..state.stats.clone()
        }
    }

    /// Waits until the target is reached and all retired slots are removed, and says whether
    /// that was so before the deadline.
    #[must_use]
    pub fn wait_settled(&self, deadline: Deadline) -> bool {
        let mut state = self.shared.lock();
        while state.ready.len() < self.shared.options.target
            || state.stats.retiring + state.retired.len() > 0
        {
            let left = deadline.remaining().unwrap_or(Duration::MAX);
            if left.is_zero() {
                return false;
            }
            state = wait(&self.shared.done, state, left);
        }
        true
    }

    /// Ends the thread and removes every slot that was not handed out.
    #[must_use]
    pub fn close(mut self, deadline: Deadline) -> Vec<SlotFailure> {
        self.stop();
        let slots = self.shared.lock().take_all();
        self.shared.host.destroy_all(slots, deadline)
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

impl Drop for SlotPool {
    fn drop(&mut self) {
        self.stop();
        let slots = self.shared.lock().take_all();
        for failure in self.shared.host.destroy_all(slots, self.shared.budget()) {
            log::warn!("{failure}: {}", failure.source);
        }
    }
}

impl State {
    fn take_all(&mut self) -> Vec<Slot> {
        let mut slots = std::mem::take(&mut self.retired);
        slots.extend(self.ready.drain(..));
        slots
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

    /// The thread: builds while there is room and removes what was retired. Building comes
    /// first, somebody may be waiting for it; nobody waits for a removal.
    fn serve(&self) {
        let mut next_build = Instant::now();
        let mut state = self.lock();
        while !state.stop {
            let now = Instant::now();
            let wants = state.ready.len() < self.options.target;
            if wants && now >= next_build {
                next_build = now + Duration::from_millis(self.options.refill_interval_ms);
                drop(state);
                let built = self.host.create(OWNER, self.budget());
                state = self.lock();
                match built {
                    Ok(slot) => state.ready.push_back(slot),
                    Err(error) => {
                        next_build = now + BACK_OFF;
                        state.stats.failed_builds += 1;
                        log::warn!("Cannot prepare a slot: {error}");
                    }
                }
            } else if !state.retired.is_empty() {
                let retired = std::mem::take(&mut state.retired);
                state.stats.retiring = retired.len();
                drop(state);
                let failures = self.host.destroy_all(retired, self.budget());
                state = self.lock();
                state.stats.retiring = 0;
                state.stats.failed_removals += failures.len() as u64;
                for failure in failures {
                    log::warn!("{failure}: {}", failure.source);
                }
            } else {
                let idle = if wants {
                    next_build - now
                } else {
                    Duration::MAX
                };
                state = wait(&self.wanted, state, idle);
                continue;
            }
            self.done.notify_all();
        }
    }
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
