//! Many sandboxes on their way at once, on one thread and an event loop of the caller's.

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::time::Instant;

use mio::Registry;
use mio::event::Event;

use super::{Host, source};
use crate::ids::SandboxId;
use crate::restore::Restoring;
use crate::sandbox::{self, Error, LaunchOptions, Making, Operation, ResumeOptions, Sandbox};
use crate::template::{Hold, Template};
use crate::wire::reactor::{Machine, TokenRange, earliest};

/// Tells one sandbox on its way from the others of the same driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(u64);

/// Launches and resumes under way.
///
/// The caller polls. For each event, [`Driver::on_event`]; after that, and when
/// [`Driver::wake_at`] has come, [`Driver::advance`], which returns what has come to an end.
/// Nothing here waits for a VM or a guest; beginning a launch blocks for the milliseconds that
/// slot, disk and the start of the process take.
///
/// Dropping it destroys what is under way.
pub struct Driver {
    host: Host,
    tokens: TokenRange,
    free: VecDeque<usize>,
    under_way: BTreeMap<usize, UnderWay>,
    next_key: u64,
}

struct UnderWay {
    key: Key,
    /// Something happened that it has not been told to look at yet.
    stirred: bool,
    // Dropped in this order: the partial VM before its slot and disk.
    restoring: Restoring,
    making: Making,
    _held: Option<Hold>,
}

impl Driver {
    /// Number of event tokens that each sandbox on its way needs.
    pub const TOKENS_EACH: usize = Restoring::TOKENS;

    /// A driver with room for as many as fit into `tokens`.
    #[must_use]
    pub fn new(host: Host, tokens: TokenRange) -> Self {
        Self {
            host,
            tokens,
            free: (0..tokens.len() / Self::TOKENS_EACH).collect(),
            under_way: BTreeMap::new(),
            next_key: 0,
        }
    }

    /// How many are under way.
    #[must_use]
    pub fn len(&self) -> usize {
        self.under_way.len()
    }

    /// Whether none is under way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Begins a launch. See [`Host::launch`].
    ///
    /// # Errors
    /// [`Error`]; nothing is left then. [`Error::is_busy`] where there is no room.
    pub fn launch(&mut self, template: &Template, options: LaunchOptions) -> Result<Key, Error> {
        self.room(Operation::Launch)?;
        self.host.ready(options.deadline)?;
        let held = template
            .hold()
            .map_err(|error| Error::of_host(Operation::Launch, error.into()))?;
        let making = sandbox::prepare_launch(self.host.context(), &source(template), options)?;
        self.begin(making, Some(held))
    }

    /// Begins a resume. See [`Host::resume`].
    ///
    /// # Errors
    /// [`Error`]; the sandbox is paused as before then.
    pub fn resume(&mut self, id: &SandboxId, options: ResumeOptions) -> Result<Key, Error> {
        self.room(Operation::Resume)?;
        self.host.ready(options.deadline)?;
        let making = sandbox::prepare_resume(self.host.context(), id, options)?;
        self.begin(making, None)
    }

    fn room(&self, operation: Operation) -> Result<(), Error> {
        if self.free.is_empty() {
            let limit = self.tokens.len() / Self::TOKENS_EACH;
            let full = sandbox::Full::Sandboxes { limit };
            return Err(Error::of_host(operation, sandbox::Cause::Full(full)));
        }
        Ok(())
    }

    fn begin(&mut self, mut making: Making, held: Option<Hold>) -> Result<Key, Error> {
        // Invariant: there is room, which was asked before anything was made.
        let place = self.free.pop_front().unwrap_or_default();
        let tokens = self.tokens_of(place);
        let kit = making.take_kit();
        let begun = Restoring::begin_with(making.spec(), kit, making.deadline, tokens);
        let restoring = match begun {
            Ok(restoring) => restoring,
            Err(error) => {
                self.free.push_front(place);
                return Err(match making.conclude(Err(error)) {
                    Err(error) => error,
                    Ok(_) => unreachable!("a restore that failed makes no sandbox"),
                });
            }
        };
        let key = Key(self.next_key);
        self.next_key += 1;
        let under_way = UnderWay {
            key,
            stirred: true,
            restoring,
            making,
            _held: held,
        };
        self.under_way.insert(place, under_way);
        Ok(key)
    }

    fn tokens_of(&self, place: usize) -> TokenRange {
        let start = self.tokens.token(place * Self::TOKENS_EACH).0;
        TokenRange::new(start, Self::TOKENS_EACH)
    }

    /// Takes note of one event. Events with foreign tokens are ignored.
    pub fn on_event(&mut self, registry: &Registry, event: &Event) {
        let Some(index) = self.tokens.index(event.token()) else {
            return;
        };
        if let Some(one) = self.under_way.get_mut(&(index / Self::TOKENS_EACH)) {
            one.restoring.on_event(registry, event);
            one.stirred = true;
        }
    }

    /// Does all that can be done without waiting, and returns those that came to an end.
    pub fn advance(
        &mut self,
        registry: &Registry,
        now: Instant,
    ) -> Vec<(Key, Result<Sandbox, Error>)> {
        let mut ended = Vec::new();
        for (place, one) in &mut self.under_way {
            // Looking costs system calls: a crowd must not be looked at for each one's sake.
            let its_time = one.restoring.wake_at().is_some_and(|at| at <= now);
            if !std::mem::take(&mut one.stirred) && !its_time {
                continue;
            }
            if let ControlFlow::Break(outcome) = one.restoring.advance(registry, now) {
                ended.push((*place, outcome));
            }
        }
        ended
            .into_iter()
            .filter_map(|(place, outcome)| {
                let one = self.under_way.remove(&place)?;
                self.free.push_back(place);
                Some((one.key, one.making.conclude(outcome)))
            })
            .collect()
    }

    /// When to call [`Driver::advance`] at the latest though nothing happened.
    #[must_use]
    pub fn wake_at(&self) -> Option<Instant> {
        earliest(self.under_way.values().map(|one| one.restoring.wake_at()))
    }
}
