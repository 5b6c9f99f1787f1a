//! Slots prepared ahead of their sandboxes, and removed behind them.
//!
//! A pool owns one background thread, started by [`SlotPool::start`] and ended by
//! [`SlotPool::close`] or drop. It builds slots until the target is reached, at a limited
//! rate so that it leaves the machine to those who use it, and removes retired slots in
//! batches. Handing a slot out takes no kernel lock and waits for nothing.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::create::{CreateError, Slot};
use super::error::SlotFailure;
use super::host::HostNet;
use crate::deadline::Deadline;
use crate::resource::refill::{Limits, Maker, Stock};
use crate::resource::slot::SlotError;

/// The owner that slots in the pool have in their records.
const OWNER: &str = "pool";

/// Sizes and limits of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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

/// What could not be removed, with its reason.
#[derive(Debug)]
struct Left(SlotFailure);

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0, self.0.source)
    }
}

/// Builds slots, and removes them.
#[derive(Debug)]
struct Builder(Arc<HostNet>);

impl Maker for Builder {
    type Item = Slot;
    type Error = CreateError;
    type Leftover = Left;
    const THREAD: &'static str = "rw-slot-pool";
    const NAME: &'static str = "slot";

    fn make(&self, deadline: Deadline) -> Result<Slot, CreateError> {
        self.0.create(OWNER, deadline)
    }

    fn is_healthy(&self, slot: &Slot) -> bool {
        self.0.is_healthy(slot)
    }

    fn remove(&self, slots: Vec<Slot>, deadline: Deadline) -> Vec<Left> {
        let failures = self.0.destroy_all(slots, deadline);
        failures.into_iter().map(Left).collect()
    }
}

/// A pool of slots and the thread that serves it.
#[derive(Debug)]
pub struct SlotPool {
    stock: Stock<Builder>,
}

impl SlotPool {
    /// Starts the pool's thread, which begins to build at once.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn start(host: Arc<HostNet>, options: PoolOptions) -> io::Result<Self> {
        let limits = Limits {
            target: options.target,
            interval: Duration::from_millis(options.refill_interval_ms),
            quiet: Duration::ZERO,
            budget: Duration::from_millis(options.step_budget_ms),
        };
        let stock = Stock::start(Builder(host), limits)?;
        Ok(Self { stock })
    }

    /// Hands out a slot that was looked at just now, for `owner`; `None` where none is
    /// ready, which is when the caller builds one. Takes some microseconds.
    ///
    /// # Errors
    /// [`SlotError::File`] where the record cannot be changed; the slot is then retired.
    pub fn take(&self, owner: &str) -> Result<Option<Slot>, SlotError> {
        let Some(mut slot) = self.stock.take() else {
            return Ok(None);
        };
        match slot.lease.set_owner(owner) {
            Ok(()) => Ok(Some(slot)),
            Err(error) => {
                self.retire(slot);
                Err(error)
            }
        }
    }

    /// Leaves a slot to the pool's thread to be removed. Does not wait.
    pub fn retire(&self, slot: Slot) {
        self.stock.retire(slot);
    }

    /// What the pool holds and has done.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let counts = self.stock.counts();
        PoolStats {
            ready: counts.ready,
            retiring: counts.retiring,
            taken: counts.taken,
            unhealthy: counts.unhealthy,
            failed_builds: counts.failed,
            failed_removals: counts.failed_removals,
        }
    }

    /// Waits until the target is reached and all retired slots are removed, and says whether
    /// that was so before the deadline.
    #[must_use]
    pub fn wait_settled(&self, deadline: Deadline) -> bool {
        self.stock.wait_settled(deadline)
    }

    /// Ends the thread and removes every slot that was not handed out.
    #[must_use]
    pub fn close(self, deadline: Deadline) -> Vec<SlotFailure> {
        let left = self.stock.close(deadline).into_iter();
        left.map(|left| left.0).collect()
    }
}
