//! `/memory/preload`: the walk over all RAM after a lazy restore, and its flags.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::World;

/// Pages that one step touches (the agent's own step on `/dev/mem`).
const STEP: u64 = 1024;
/// Pause between steps.
const PACE: Duration = Duration::from_millis(1);
/// Where the walk says it reads.
const SOURCE: &str = "/proc/kcore";

/// The flags and counters. They live in guest RAM and survive a snapshot, `done` included.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Preload {
    generation: u64,
    started: bool,
    finished: bool,
    cancel: bool,
    error: Option<String>,
    regions: u64,
    pages: u64,
    elapsed_us: u64,
    source: String,
    walks: Vec<Walk>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Walk {
    generation: u64,
    next: u64,
    elapsed_us: u64,
    #[serde(skip)]
    stepped_at: Option<Instant>,
}

/// The JSON both calls answer with, in its order.
#[derive(Serialize)]
pub(super) struct Status {
    state: &'static str,
    regions: u64,
    pages: u64,
    bytes: u64,
    elapsed_sec: f64,
    source: String,
    error: Option<String>,
}

/// Disturbances of the walk, on order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Disturb {
    pub(crate) fail: bool,
    pub(crate) stall: bool,
}

impl Preload {
    /// Starts a walk unless this lifecycle has seen one.
    pub(super) fn start(&mut self) {
        if self.started {
            return;
        }
        self.started = true;
        self.walks.push(Walk {
            generation: self.generation,
            next: 0,
            elapsed_us: 0,
            stepped_at: None,
        });
    }

    /// Sticky, in every state.
    pub(super) fn cancel(&mut self) {
        self.cancel = true;
    }

    /// A new lifecycle: everything is forgotten, a running walk is orphaned.
    pub(super) fn reset(&mut self) {
        *self = Self {
            generation: self.generation + 1,
            walks: std::mem::take(&mut self.walks),
            ..Self::default()
        };
    }

    pub(super) fn status(&self) -> Status {
        let state = if !self.started {
            "idle"
        } else if !self.finished {
            "running"
        } else if self.error.is_some() {
            "failed"
        } else if self.cancel {
            "cancelled"
        } else {
            "done"
        };
        Status {
            state,
            regions: self.regions,
            pages: self.pages,
            bytes: self.pages * 4096,
            elapsed_sec: self.elapsed_us as f64 / 1e6,
            source: self.source.clone(),
            error: self.error.clone(),
        }
    }

    /// Whether a walk has work to do.
    pub(super) fn is_walking(&self) -> bool {
        !self.walks.is_empty()
    }

    /// One step of each walk; when to take the next.
    pub(super) fn step(
        &mut self,
        world: &mut dyn World,
        disturb: Disturb,
        now: Instant,
    ) -> Option<Instant> {
        if disturb.stall {
            return None;
        }
        let total = world.ram_pages();
        for mut walk in std::mem::take(&mut self.walks) {
            if let Some(last) = walk.stepped_at {
                let since = now.saturating_duration_since(last);
                if since < PACE {
                    self.walks.push(walk);
                    continue;
                }
                walk.elapsed_us += since.as_micros() as u64;
            }
            walk.stepped_at = Some(now);
            if walk.generation != self.generation {
                // The thread of an earlier life writes its counter once more and ends.
                self.pages = walk.next;
                continue;
            }
            if self.cancel || walk.next >= total {
                self.publish(&walk, world.ram_regions());
                continue;
            }
            let count = STEP.min(total - walk.next);
            let read = if disturb.fail && walk.next > 0 {
                Err(
                    "/dev/mem: Operation not permitted (os error 1); /proc/kcore: ordered to fail"
                        .to_owned(),
                )
            } else {
                world.touch(walk.next, count)
            };
            match read {
                Ok(()) => {
                    walk.next += count;
                    self.pages = walk.next;
                    self.walks.push(walk);
                }
                Err(error) => {
                    self.finished = true;
                    self.elapsed_us = walk.elapsed_us;
                    self.error = Some(error);
                }
            }
        }
        self.is_walking().then(|| now + PACE)
    }

    fn publish(&mut self, walk: &Walk, regions: u64) {
        self.finished = true;
        self.regions = regions;
        self.pages = walk.next;
        self.elapsed_us = walk.elapsed_us.max(8);
        SOURCE.clone_into(&mut self.source);
    }
}
