//! A pool of warm kits, each on a network slot of its own.
//!
//! The pool owns one background thread, started by [`KitPool::start`] and ended by
//! [`KitPool::close`] or drop. It makes kits until the target is reached, at a limited rate:
//! each takes some milliseconds of a processor that a restore may be waiting for.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Kit, KitError};
use crate::deadline::Deadline;
use crate::resource::net::{CreateError, HostNet, Slot, SlotFailure, SlotPool};
use crate::resource::refill::{Limits, Maker, Stock};
use crate::resource::slot::SlotError;
use crate::units::Bytes;
use crate::vmm::launch::LaunchSpec;

/// The owner that slots of idle kits have in their records.
const OWNER: &str = "kit";

/// Sizes and limits of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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

/// Makes kits, and ends them.
#[derive(Debug)]
struct Workshop {
    spec: LaunchSpec,
    runtime_dir: PathBuf,
    places: Places,
}

/// A pool of kits and the thread that fills it.
#[derive(Debug)]
pub struct KitPool {
    stock: Stock<Workshop>,
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
        let interval = Duration::from_millis(options.refill_interval_ms);
        let limits = Limits {
            target: options.target,
            interval,
            quiet: interval,
            budget: Duration::from_millis(options.step_budget_ms),
        };
        let workshop = Workshop {
            spec,
            runtime_dir,
            places,
        };
        let stock = Stock::start(workshop, limits)?;
        Ok(Self { stock })
    }

    /// Hands out a kit that was looked at just now, its slot for `owner`; `None` where none
    /// is ready, which is when the caller starts cold. Takes some microseconds and never
    /// waits for the pool's thread.
    ///
    /// # Errors
    /// [`SlotError::File`] where the slot's record cannot be changed; the kit is gone then.
    pub fn take(&self, owner: &str) -> Result<Option<Warm>, SlotError> {
        let Some((mut warm, private)) = self.stock.take() else {
            return Ok(None);
        };
        let renamed = match &mut warm.slot {
            Some(slot) => slot.lease().set_owner(owner),
            None => Ok(()),
        };
        if let Err(error) = renamed {
            self.stock.retire((warm, private));
            return Err(error);
        }
        Ok(Some(warm))
    }

    /// What the pool holds and has done.
    #[must_use]
    pub fn stats(&self) -> KitPoolStats {
        let counts = self.stock.counts();
        KitPoolStats {
            ready: counts.ready,
            taken: counts.taken,
            exhausted: counts.exhausted,
            unhealthy: counts.unhealthy,
            failed: counts.failed,
            private_memory: Bytes(self.stock.sum(|(_, bytes)| bytes.0)),
        }
    }

    /// Waits until the target is reached and what was found dead is removed, and says whether
    /// that was so before the deadline.
    #[must_use]
    pub fn wait_settled(&self, deadline: Deadline) -> bool {
        self.stock.wait_settled(deadline)
    }

    /// Ends the thread, and every kit that was not taken, with its slot. The result says what
    /// is left of each.
    #[must_use]
    pub fn close(self, deadline: Deadline) -> Vec<String> {
        self.stock.close(deadline)
    }
}

impl Maker for Workshop {
    /// With its private memory, as measured when it had been made.
    type Item = (Warm, Bytes);
    type Error = FillError;
    type Leftover = String;
    const THREAD: &'static str = "rw-kit-pool";
    const NAME: &'static str = "kit";

    fn make(&self, deadline: Deadline) -> Result<(Warm, Bytes), FillError> {
        let mut slot = self.slot(deadline)?;
        let netns = slot.as_ref().map(Slot::netns);
        let made = Kit::prepare(&self.spec, &self.runtime_dir, netns, deadline);
        let kit = match (made, &mut slot) {
            (Ok(kit), None) => kit,
            (Ok(kit), Some(place)) => match place.set_vmm(Some(kit.process())) {
                Ok(()) => kit,
                Err(error) => {
                    self.end(vec![Warm { kit, slot }], deadline);
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

    fn is_healthy(&self, (warm, _): &(Warm, Bytes)) -> bool {
        let slot = match (&self.places, &warm.slot) {
            (Places::Slots { host, .. }, Some(slot)) => host.is_healthy(slot),
            _ => true,
        };
        slot && warm.kit.is_healthy()
    }

    fn remove(&self, all: Vec<(Warm, Bytes)>, deadline: Deadline) -> Vec<String> {
        self.end(all.into_iter().map(|(warm, _)| warm).collect(), deadline)
    }
}

impl Workshop {
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
    fn end(&self, all: Vec<Warm>, deadline: Deadline) -> Vec<String> {
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
