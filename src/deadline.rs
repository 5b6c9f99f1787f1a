//! One absolute time budget, handed down unchanged through every layer.

use std::fmt;
use std::time::{Duration, Instant};

/// A point on the monotonic clock after which an operation gives up.
///
/// A deadline is made once, at the top, and passed down by value: layers below never add
/// time of their own, so a chain of slow steps cannot take longer than its caller allowed.
/// Steps that want a shorter limit for themselves take [`Deadline::within`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    at: Option<Instant>,
}

impl Deadline {
    /// A deadline that never passes.
    pub const NEVER: Self = Self { at: None };

    /// The instant `budget` from now. A budget too large for the clock never passes.
    #[must_use]
    pub fn after(budget: Duration) -> Self {
        Self {
            at: Instant::now().checked_add(budget),
        }
    }

    /// The given instant.
    #[must_use]
    pub const fn at(instant: Instant) -> Self {
        Self { at: Some(instant) }
    }

    /// The earlier of this deadline and `budget` from now.
    #[must_use]
    pub fn within(self, budget: Duration) -> Self {
        self.earlier(Self::after(budget))
    }

    /// The earlier of two deadlines.
    #[must_use]
    pub fn earlier(self, other: Self) -> Self {
        match (self.at, other.at) {
            (Some(a), Some(b)) => Self::at(a.min(b)),
            (Some(a), None) | (None, Some(a)) => Self::at(a),
            (None, None) => Self::NEVER,
        }
    }

    /// The instant, or `None` where the deadline never passes.
    #[must_use]
    pub const fn instant(self) -> Option<Instant> {
        self.at
    }

    /// Time left, zero once the deadline has passed, `None` where it never passes.
    #[must_use]
    pub fn remaining(self) -> Option<Duration> {
        self.at
            .map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Whether the deadline has passed.
    #[must_use]
    pub fn has_passed(self) -> bool {
        self.at.is_some_and(|at| Instant::now() >= at)
    }
}

impl fmt::Debug for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.remaining() {
            Some(left) => write!(f, "Deadline(in {left:?})"),
            None => f.write_str("Deadline(never)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earlier_of_two_deadlines_wins() {
        let soon = Deadline::after(Duration::from_millis(5));
        let late = Deadline::after(Duration::from_secs(5));
        assert_eq!(soon.earlier(late), soon);
        assert_eq!(late.earlier(soon), soon);
        assert_eq!(Deadline::NEVER.earlier(late), late);
    }

    #[test]
    fn a_passed_deadline_has_no_time_left() {
        let passed = Deadline::after(Duration::ZERO);
        assert!(passed.has_passed());
        assert_eq!(passed.remaining(), Some(Duration::ZERO));
        assert!(!Deadline::NEVER.has_passed());
        assert_eq!(Deadline::after(Duration::MAX), Deadline::NEVER);
    }
}
