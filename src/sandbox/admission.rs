//! Who is let in: a host that is full says so at once, and says what it is full of.

use std::sync::{Arc, Mutex, PoisonError};

use super::error::Full;
use crate::units::Bytes;

/// What a host admits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// How many sandboxes may run or be on their way, as far as this process knows; `None`:
    /// as many as there are network slots.
    pub sandboxes: Option<usize>,
    /// How much memory must stay available to the machine (`MemAvailable`) whatever is
    /// launched. Zero: memory is not looked at.
    pub memory_reserve: Bytes,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sandboxes: None,
            memory_reserve: Bytes::mib(256),
        }
    }
}

/// The door.
#[derive(Debug)]
pub(crate) struct Admission {
    limits: Limits,
    promised: Arc<Mutex<Promised>>,
}

#[derive(Debug, Default)]
struct Promised {
    /// Operations under way.
    count: usize,
    /// What they may take and have not taken yet.
    memory: u64,
}

/// A place that an operation under way has. Dropped, it is free again: by then what the
/// sandbox takes shows in the kernel's numbers.
#[derive(Debug)]
pub(crate) struct Place {
    promised: Arc<Mutex<Promised>>,
    memory: u64,
}

impl Admission {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            promised: Arc::default(),
        }
    }

    /// Lets one sandbox in that may take `memory` at once; `running` tells how many run.
    pub(crate) fn enter(
        &self,
        memory: Bytes,
        running: impl FnOnce() -> usize,
    ) -> Result<Place, Full> {
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(limit) = self.limits.sandboxes
            && promised.count + running() >= limit
        {
            return Err(Full::Sandboxes { limit });
        }
        let reserve = self.limits.memory_reserve;
        if reserve > Bytes(0)
            && let Some(free) = available()
        {
            let available = Bytes(free.0.saturating_sub(promised.memory));
            let needed = Bytes(reserve.0.saturating_add(memory.0));
            if available < needed {
                return Err(Full::Memory { available, needed });
            }
        }
        promised.count += 1;
        promised.memory = promised.memory.saturating_add(memory.0);
        Ok(Place {
            promised: Arc::clone(&self.promised),
            memory: memory.0,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        promised.count = promised.count.saturating_sub(1);
        promised.memory = promised.memory.saturating_sub(self.memory);
    }
}

/// `MemAvailable` of `/proc/meminfo` (`Documentation/filesystems/proc.rst`); `None` where
/// that cannot be read: then memory is no reason to refuse.
fn available() -> Option<Bytes> {
    parse(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse(meminfo: &str) -> Option<Bytes> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib.checked_mul(1024)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_host_says_what_it_is_full_of_and_has_room_again_later() {
        let door = Admission::new(Limits {
            sandboxes: Some(2),
            memory_reserve: Bytes(1),
        });
        let first = door.enter(Bytes(0), || 1).unwrap();
        let full = door.enter(Bytes(0), || 1).unwrap_err();
        assert_eq!(full.to_string(), "2 sandboxes run already");
        drop(first);
        assert!(door.enter(Bytes(0), || 1).is_ok());
        let full = door.enter(Bytes(u64::MAX), || 0).unwrap_err();
        assert!(matches!(full, Full::Memory { .. }), "{full}");
    }

    #[test]
    fn what_others_were_promised_is_not_available() {
        let door = Admission::new(Limits {
            sandboxes: None,
            memory_reserve: Bytes(1),
        });
        let all = available().unwrap();
        let half = Bytes(all.0 / 4 * 3);
        let first = door.enter(half, || 0).unwrap();
        assert!(door.enter(half, || 0).is_err());
        drop(first);
        assert!(door.enter(half, || 0).is_ok());
    }

    #[test]
    fn meminfo_is_read_and_nothing_else_is_taken_for_it() {
        let text = "MemTotal: 9 kB\nMemAvailable:   24105000 kB\n";
        assert_eq!(parse(text), Some(Bytes(24_105_000 << 10)));
        for bad in [
            "",
            "MemAvailable: x kB",
            "MemAvailable: 5",
            "MemAvail: 5 kB",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
