//! A stock of things that take long to make: one background thread makes them in advance, at
//! a limited rate so that it leaves the machine to those who use it, and removes what is
//! thrown away.
//!
//! The thread is started by [`Stock::start`] and ended by [`Stock::close`] or drop. Taking
//! something out waits for nobody.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::deadline::Deadline;

/// After a failure, nothing is made for this long; twice as long after each further one.
const BACK_OFF: Duration = Duration::from_secs(1);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(8);

/// So often, what is ready is looked at while nobody takes it.
const ROUND: Duration = Duration::from_secs(5);

/// What makes things, and removes them.
pub(crate) trait Maker: Send + Sync + 'static {
    /// What is made.
    type Item: Send + 'static;
    /// Why there is none.
    type Error: std::error::Error;
    /// What could not be removed.
    type Leftover: fmt::Display;
    /// The name of the thread.
    const THREAD: &'static str;
    /// A word for one of them.
    const NAME: &'static str;

    /// Makes one. Blocks, until the deadline at the latest.
    fn make(&self, deadline: Deadline) -> Result<Self::Item, Self::Error>;
    /// Whether any are wanted: what they are made of is still there.
    fn is_wanted(&self) -> bool {
        true
    }
    /// Whether it can still be used. Takes microseconds.
    fn is_healthy(&self, item: &Self::Item) -> bool;
    /// Removes some. Blocks, until the deadline at the latest.
    fn remove(&self, items: Vec<Self::Item>, deadline: Deadline) -> Vec<Self::Leftover>;
}

/// How much is in stock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// How many stand ready; 0 for a stock that only removes.
    pub(crate) target: usize,
    /// The least time between the beginnings of two.
    pub(crate) interval: Duration,
    /// The least time between taking one and beginning the next, while some are left, and
    /// between starting the stock and beginning the first.
    pub(crate) quiet: Duration,
    /// How long making one, or removing some, may take.
    pub(crate) budget: Duration,
}

/// What a stock holds and has done.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    pub(crate) ready: usize,
    /// Waiting to be removed, or being removed.
    pub(crate) retiring: usize,
    pub(crate) taken: u64,
    /// Times that none was ready.
    pub(crate) exhausted: u64,
    pub(crate) unhealthy: u64,
    pub(crate) failed: u64,
    pub(crate) failed_removals: u64,
}

/// Things made in advance, and the thread that makes them.
pub(crate) struct Stock<M: Maker> {
    shared: Arc<Shared<M>>,
    worker: Option<JoinHandle<()>>,
}

struct Shared<M: Maker> {
    maker: M,
    limits: Limits,
    state: Mutex<State<M::Item>>,
    /// Something for the worker to do, or to stop for.
    wanted: Condvar,
    /// The worker has done something.
    done: Condvar,
}

struct State<T> {
    ready: VecDeque<T>,
    retired: Vec<T>,
    last_taken: Option<Instant>,
    /// What they are made of was there when it was looked for last.
    is_wanted: bool,
    counts: Counts,
    stop: bool,
}

impl<M: Maker> fmt::Debug for Stock<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stock")
            .field("of", &M::NAME)
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

impl<M: Maker> Stock<M> {
    /// Starts the thread, which begins to make things at once.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub(crate) fn start(maker: M, limits: Limits) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            maker,
            limits,
            state: Mutex::new(State {
                ready: VecDeque::new(),
                retired: Vec::new(),
                last_taken: None,
                is_wanted: true,
                counts: Counts::default(),
                stop: false,
            }),
            wanted: Condvar::new(),
            done: Condvar::new(),
        });
        let worker = Arc::clone(&shared);
        let worker = std::thread::Builder::new()
            .name(M::THREAD.to_owned())
            .spawn(move || worker.serve())?;
        Ok(Self {
            shared,
            worker: Some(worker),
        })
    }

    /// Hands out one that was looked at just now; `None` where none is ready. Takes some
    /// microseconds.
    pub(crate) fn take(&self) -> Option<M::Item> {
        let mut state = self.shared.lock();
        loop {
            let Some(item) = state.ready.pop_front() else {
                state.counts.exhausted += 1;
                return None;
            };
            state.last_taken = Some(Instant::now());
            self.shared.wanted.notify_one();
            if self.shared.maker.is_healthy(&item) {
                state.counts.taken += 1;
                return Some(item);
            }
            state.counts.unhealthy += 1;
            state.retired.push(item);
        }
    }

    /// Leaves one to the thread to be removed. Does not wait.
    pub(crate) fn retire(&self, item: M::Item) {
        self.shared.lock().retired.push(item);
        self.shared.wanted.notify_one();
    }

    /// What it holds and has done.
    pub(crate) fn counts(&self) -> Counts {
        let state = self.shared.lock();
        Counts {
            ready: state.ready.len(),
            retiring: state.counts.retiring + state.retired.len(),
            ..state.counts.clone()
        }
    }

    /// A sum over what is ready.
    pub(crate) fn sum(&self, of: impl Fn(&M::Item) -> u64) -> u64 {
        self.shared.lock().ready.iter().map(of).sum()
    }

    /// Waits until the target is reached, where any are wanted, and all that was retired is
    /// removed, and says whether that was so before the deadline.
    pub(crate) fn wait_settled(&self, deadline: Deadline) -> bool {
        let mut state = self.shared.lock();
        while (state.is_wanted && state.ready.len() < self.shared.limits.target)
            || state.counts.retiring + state.retired.len() > 0
        {
            let left = deadline.remaining().unwrap_or(Duration::MAX);
            if left.is_zero() {
                return false;
            }
            state = wait(&self.shared.done, state, left);
        }
        true
    }

    /// Ends the thread and removes everything that was not handed out.
    pub(crate) fn close(mut self, deadline: Deadline) -> Vec<M::Leftover> {
        self.clear(deadline)
    }

    /// Has the thread end once it is done with what it is at. Does not wait.
    pub(crate) fn stop(&self) {
        self.shared.lock().stop = true;
        self.shared.wanted.notify_one();
    }

    fn clear(&mut self, deadline: Deadline) -> Vec<M::Leftover> {
        self.stop();
        if let Some(worker) = self.worker.take() {
            // A worker that panicked has nothing more to say here.
            let _ = worker.join();
        }
        let all = {
            let mut state = self.shared.lock();
            let mut all = std::mem::take(&mut state.retired);
            all.extend(state.ready.drain(..));
            all
        };
        if all.is_empty() {
            return Vec::new();
        }
        self.shared.maker.remove(all, deadline)
    }
}

impl<M: Maker> Drop for Stock<M> {
    fn drop(&mut self) {
        let deadline = self.shared.budget();
        for left in self.clear(deadline) {
            log::warn!("Left over of a {}: {left}", M::NAME);
        }
    }
}

impl<M: Maker> Shared<M> {
    fn lock(&self) -> MutexGuard<'_, State<M::Item>> {
        // No call that can panic is made while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn budget(&self) -> Deadline {
        Deadline::after(self.limits.budget)
    }

    /// The thread: makes things while there is room and removes what was retired. Making comes
    /// first, somebody may be waiting for it; nobody waits for a removal.
    fn serve(&self) {
        let mut earliest = Instant::now() + self.limits.quiet;
        let mut next_round = Instant::now() + ROUND;
        let mut back_off = BACK_OFF;
        let mut state = self.lock();
        while !state.stop {
            let now = Instant::now();
            if now >= next_round {
                next_round = now + ROUND;
                self.look_through(&mut state);
                self.done.notify_all();
            }
            let wants = state.is_wanted && state.ready.len() < self.limits.target;
            let taken = state.last_taken.filter(|_| !state.ready.is_empty());
            let next = taken.map_or(earliest, |taken| earliest.max(taken + self.limits.quiet));
            if wants && now >= next {
                earliest = now + self.limits.interval;
                drop(state);
                let made = self.maker.make(self.budget());
                state = self.lock();
                match made {
                    Ok(item) => {
                        state.ready.push_back(item);
                        back_off = BACK_OFF;
                    }
                    // There is nothing to make it of any more.
                    Err(_) if !self.maker.is_wanted() => self.look_through(&mut state),
                    Err(error) => {
                        earliest = Instant::now() + back_off;
                        back_off = (back_off * 2).min(LONGEST_BACK_OFF);
                        state.counts.failed += 1;
                        log::warn!("Cannot prepare a {}: {}", M::NAME, chain(&error));
                    }
                }
            } else if !state.retired.is_empty() {
                let retired = std::mem::take(&mut state.retired);
                state.counts.retiring = retired.len();
                drop(state);
                let left = self.maker.remove(retired, self.budget());
                state = self.lock();
                state.counts.retiring = 0;
                state.counts.failed_removals += left.len() as u64;
                for left in left {
                    log::warn!("Left over of a {}: {left}", M::NAME);
                }
            } else {
                let round = next_round.saturating_duration_since(now);
                let idle = match wants {
                    true => round.min(next - now),
                    false if self.limits.target == 0 => Duration::MAX,
                    false => round,
                };
                state = wait(&self.wanted, state, idle);
                continue;
            }
            self.done.notify_all();
        }
    }

    /// Throws out what cannot be used any more, or all of it where none is wanted.
    fn look_through(&self, state: &mut State<M::Item>) {
        state.is_wanted = self.maker.is_wanted();
        let ready = std::mem::take(&mut state.ready);
        let (healthy, rest): (Vec<_>, Vec<_>) = ready
            .into_iter()
            .partition(|item| state.is_wanted && self.maker.is_healthy(item));
        state.ready = healthy.into();
        if state.is_wanted {
            state.counts.unhealthy += rest.len() as u64;
        }
        state.retired.extend(rest);
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

fn wait<'a, T>(
    condition: &Condvar,
    state: MutexGuard<'a, T>,
    limit: Duration,
) -> MutexGuard<'a, T> {
    // The platform's clock cannot add the largest duration there is.
    let limit = limit.min(Duration::from_secs(3600));
    let (state, _) = condition
        .wait_timeout(state, limit)
        .unwrap_or_else(PoisonError::into_inner);
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails, and takes longer for that than the first pause after a failure.
    struct Slow(Arc<Mutex<Vec<(Instant, Instant)>>>);

    impl Maker for Slow {
        type Item = ();
        type Error = io::Error;
        type Leftover = String;
        const THREAD: &'static str = "rw-slow";
        const NAME: &'static str = "slow thing";

        fn make(&self, _: Deadline) -> Result<(), io::Error> {
            let begun = Instant::now();
            std::thread::sleep(BACK_OFF + Duration::from_millis(100));
            self.0.lock().unwrap().push((begun, Instant::now()));
            Err(io::ErrorKind::TimedOut.into())
        }

        fn is_healthy(&self, (): &()) -> bool {
            true
        }

        fn remove(&self, _: Vec<()>, _: Deadline) -> Vec<String> {
            Vec::new()
        }
    }

    #[test]
    fn after_a_failure_that_took_long_nothing_is_made_for_a_while() {
        let made = Arc::new(Mutex::new(Vec::new()));
        let limits = Limits {
            target: 1,
            interval: Duration::ZERO,
            quiet: Duration::ZERO,
            budget: Duration::from_secs(10),
        };
        let stock = Stock::start(Slow(Arc::clone(&made)), limits).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while made.lock().unwrap().len() < 2 {
            assert!(Instant::now() < until);
            assert!(!stock.wait_settled(Deadline::after(Duration::from_millis(50))));
        }
        let made = made.lock().unwrap().clone();
        let [(_, failed), (again, _)] = made[..] else {
            panic!("{made:?}")
        };
        assert!(again - failed >= BACK_OFF, "{:?}", again - failed);
    }
}
