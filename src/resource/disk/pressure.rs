//! How full a store is, and when to say so.

use std::fmt;

use rewake_sys::dm::Target;
use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Sectors};

/// How a disk's store fares, from good to lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreState {
    /// There is room.
    Healthy,
    /// A threshold has been passed: act now.
    Pressure,
    /// The store is full: writes to new places fail, all that was written before is there.
    Overflowed,
    /// The kernel has given the disk up; reads and writes fail.
    Invalid,
}

impl fmt::Display for StoreState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Healthy => "healthy",
            Self::Pressure => "pressure",
            Self::Overflowed => "overflowed",
            Self::Invalid => "invalid",
        })
    }
}

/// How full a store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CowStatus {
    /// What the store holds, with its bookkeeping.
    pub used: Bytes,
    /// What it can hold.
    pub total: Bytes,
    /// Room left in the file system that the store is in: stores are sparse.
    pub filesystem_free: Bytes,
    /// The verdict, by the thresholds.
    pub state: StoreState,
}

/// When a store counts as under pressure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    /// Share of the store in use, in percent.
    pub used_percent: u8,
    /// Room that the file system shall keep, unless the store cannot grow any more.
    pub filesystem_free: Bytes,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            used_percent: 80,
            filesystem_free: Bytes::mib(512),
        }
    }
}

impl Thresholds {
    pub(super) fn judge(&self, used: Bytes, total: Bytes, free: Bytes) -> StoreState {
        let percent = u128::from(used.0) * 100;
        let full = percent >= u128::from(total.0) * u128::from(self.used_percent);
        // A store that is not large any more needs less than the reserve.
        let may_grow = Bytes(total.0.saturating_sub(used.0));
        if full || free < self.filesystem_free.min(may_grow) {
            StoreState::Pressure
        } else {
            StoreState::Healthy
        }
    }
}

/// What the snapshot target says (`snapshot_status`, drivers/md/dm-snap.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SnapshotWords {
    /// `own` is what its bookkeeping takes of what is used; Linux says so since 2.6.35.
    Usage {
        used: Sectors,
        total: Sectors,
        own: Option<Sectors>,
    },
    Overflowed,
    Invalid,
}

/// Reads `16/2048 16`, `Overflow` or `Invalid`; all else counts as invalid, too.
pub(super) fn parse(status: &Target) -> SnapshotWords {
    let usage = || {
        let (used, rest) = status.text.split_once('/')?;
        let mut rest = rest.split(' ');
        Some(SnapshotWords::Usage {
            used: Sectors(used.parse().ok()?),
            total: Sectors(rest.next()?.parse().ok()?),
            own: rest.next().and_then(|own| own.parse().ok()).map(Sectors),
        })
    };
    match status.text.trim() {
        "Overflow" => SnapshotWords::Overflowed,
        _ => usage().unwrap_or(SnapshotWords::Invalid),
    }
}

/// Turns a row of status reports into events: one whenever the state changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PressureWatch {
    last: StoreState,
}

impl PressureWatch {
    /// A watch on a disk that was healthy when last seen.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            last: StoreState::Healthy,
        }
    }

    /// The state that was seen last.
    #[must_use]
    pub const fn state(&self) -> StoreState {
        self.last
    }

    /// Takes a report. Returns the new state if it is another one than before.
    pub fn observe(&mut self, status: &CowStatus) -> Option<StoreState> {
        let changed = status.state != self.last;
        self.last = status.state;
        changed.then_some(status.state)
    }
}

impl Default for PressureWatch {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_words_of_the_snapshot_target() {
        for (text, words) in [
            (
                "16/2048 16",
                SnapshotWords::Usage {
                    used: Sectors(16),
                    total: Sectors(2048),
                    own: Some(Sectors(16)),
                },
            ),
            (
                "24/2048",
                SnapshotWords::Usage {
                    used: Sectors(24),
                    total: Sectors(2048),
                    own: None,
                },
            ),
            ("Overflow", SnapshotWords::Overflowed),
            ("Invalid", SnapshotWords::Invalid),
            ("Merge failed", SnapshotWords::Invalid),
            ("Unknown", SnapshotWords::Invalid),
            ("", SnapshotWords::Invalid),
            ("x/2048 16", SnapshotWords::Invalid),
        ] {
            let target = Target {
                start: 0,
                length: 8,
                kind: "snapshot".into(),
                text: text.into(),
            };
            assert_eq!(parse(&target), words, "{text:?}");
        }
    }

    #[test]
    fn pressure_begins_at_the_thresholds() {
        let thresholds = Thresholds {
            used_percent: 80,
            filesystem_free: Bytes(100),
        };
        for (name, used, total, free, state) in [
            ("empty", 0, 1000, 5000, StoreState::Healthy),
            ("just below", 799, 1000, 5000, StoreState::Healthy),
            ("at the share", 800, 1000, 5000, StoreState::Pressure),
            ("file system full", 0, 1000, 99, StoreState::Pressure),
            (
                "needs less than the reserve",
                20,
                50,
                30,
                StoreState::Healthy,
            ),
            ("largest", u64::MAX, u64::MAX, 0, StoreState::Pressure),
        ] {
            let judged = thresholds.judge(Bytes(used), Bytes(total), Bytes(free));
            assert_eq!(judged, state, "{name}");
        }
    }

    #[test]
    fn a_watch_reports_changes_only() {
        let status = |state| CowStatus {
            used: Bytes(0),
            total: Bytes(1),
            filesystem_free: Bytes(0),
            state,
        };
        let mut watch = PressureWatch::new();
        assert_eq!(watch.observe(&status(StoreState::Healthy)), None);
        for state in [
            StoreState::Pressure,
            StoreState::Overflowed,
            StoreState::Healthy,
        ] {
            assert_eq!(watch.observe(&status(state)), Some(state));
            assert_eq!(watch.observe(&status(state)), None);
        }
    }
}
