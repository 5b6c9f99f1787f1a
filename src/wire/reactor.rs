//! The event loop: state machines that own sockets, pipes and pidfds, and the loop that
//! drives one of them to its end.
//!
//! A [`Machine`] never blocks. It registers what it waits for with a [`mio::Registry`],
//! under tokens of its own [`TokenRange`], and says when it wants to be woken at the latest.
//! Callers with a loop of their own (a thousand restores on one thread) hand events to the
//! machine themselves; everybody else calls [`drive`].

use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::{Events, Poll, Registry, Token};

use crate::deadline::Deadline;

/// A consecutive range of event tokens that belongs to one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRange {
    start: usize,
    len: usize,
}

impl TokenRange {
    /// The tokens `start` to `start + len - 1`.
    #[must_use]
    pub const fn new(start: usize, len: usize) -> Self {
        Self { start, len }
    }

    /// The token at `index`.
    ///
    /// # Panics
    /// Where `index` is not below the range's length: a programming error.
    #[must_use]
    pub fn token(self, index: usize) -> Token {
        assert!(index < self.len, "token {index} of a range of {}", self.len);
        Token(self.start + index)
    }

    /// The index of a token inside this range, `None` for somebody else's.
    #[must_use]
    pub fn index(self, token: Token) -> Option<usize> {
        token.0.checked_sub(self.start).filter(|i| *i < self.len)
    }

    /// Number of tokens.
    #[must_use]
    pub const fn len(self) -> usize {
        self.len
    }

    /// Whether the range has no token.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first `len` tokens and the rest.
    ///
    /// # Panics
    /// Where the range is shorter than `len`: a programming error.
    #[must_use]
    pub fn split(self, len: usize) -> (Self, Self) {
        assert!(len <= self.len, "{len} tokens of a range of {}", self.len);
        (
            Self::new(self.start, len),
            Self::new(self.start + len, self.len - len),
        )
    }
}

/// A state machine that waits on descriptors and the clock, never in a system call.
///
/// Readiness is edge-triggered: a machine drains what is ready until `WouldBlock`.
pub trait Machine {
    /// What it comes to, errors included.
    type Output;

    /// Takes note of one event. Events with foreign tokens are ignored.
    fn on_event(&mut self, registry: &Registry, event: &Event);

    /// Does all that can be done without waiting. `Break` ends the machine; it must not be
    /// called again after that. Spurious calls are harmless.
    fn advance(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Self::Output>;

    /// When to call [`advance`](Machine::advance) at the latest though nothing happened.
    fn wake_at(&self) -> Option<Instant>;
}

/// Drives one machine to its end on a poll of its own. Blocks the calling thread.
///
/// The machine watches its own deadline (through [`Machine::wake_at`]).
///
/// # Errors
/// Only what `epoll` itself reports; interruptions by signals are retried.
pub fn drive<M: Machine>(poll: &mut Poll, machine: &mut M) -> io::Result<M::Output> {
    let mut events = Events::with_capacity(64);
    loop {
        if let ControlFlow::Break(output) = machine.advance(poll.registry(), Instant::now()) {
            return Ok(output);
        }
        wait(poll, &mut events, machine.wake_at())?;
        for event in &events {
            machine.on_event(poll.registry(), event);
        }
    }
}

/// One wait for events, until `wake_at` at the latest. A signal ends it without events.
///
/// # Errors
/// What `epoll_wait` reports, except for `EINTR`.
pub fn wait(poll: &mut Poll, events: &mut Events, wake_at: Option<Instant>) -> io::Result<()> {
    let timeout = wake_at.map(|at| at.saturating_duration_since(Instant::now()));
    match poll.poll(events, timeout) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            events.clear();
            Ok(())
        }
        other => other,
    }
}

/// The earliest of several optional wake-up times.
#[must_use]
pub fn earliest(times: impl IntoIterator<Item = Option<Instant>>) -> Option<Instant> {
    times.into_iter().flatten().min()
}

/// [`earliest`] of a deadline and a delay from `now`, for retries within a budget.
#[must_use]
pub fn retry_at(deadline: Deadline, now: Instant, delay: Duration) -> Option<Instant> {
    earliest([deadline.instant(), now.checked_add(delay)])
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sleeper {
        until: Instant,
        calls: u32,
    }

    impl Machine for Sleeper {
        type Output = u32;
        fn on_event(&mut self, _registry: &Registry, _event: &Event) {}
        fn advance(&mut self, _registry: &Registry, now: Instant) -> ControlFlow<u32> {
            self.calls += 1;
            if now >= self.until {
                ControlFlow::Break(self.calls)
            } else {
                ControlFlow::Continue(())
            }
        }
        fn wake_at(&self) -> Option<Instant> {
            Some(self.until)
        }
    }

    #[test]
    fn a_machine_is_woken_at_its_time_and_not_by_spinning() {
        let mut poll = Poll::new().unwrap();
        let mut sleeper = Sleeper {
            until: Instant::now() + Duration::from_millis(20),
            calls: 0,
        };
        let calls = drive(&mut poll, &mut sleeper).unwrap();
        assert!(Instant::now() >= sleeper.until);
        assert!(calls <= 4, "{calls} wake-ups for one timer");
    }

    #[test]
    fn token_ranges_do_not_overlap_after_a_split() {
        let (a, b) = TokenRange::new(10, 5).split(2);
        assert_eq!(a.token(1), Token(11));
        assert_eq!(b.token(0), Token(12));
        assert_eq!(a.index(Token(12)), None);
        assert_eq!(b.index(Token(12)), Some(0));
        assert_eq!(b.len(), 3);
    }
}
