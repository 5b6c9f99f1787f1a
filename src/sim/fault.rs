//! Faults on order: what goes wrong, where, and how often.
//!
//! A fault is written `PHASE:WHAT[:TIMES]`. It strikes each time its phase is reached, or
//! only the first `TIMES` times.

use std::cell::RefCell;
use std::str::FromStr;
use std::time::Duration;

/// Every phase at which a fault can be placed.
pub(super) const PHASES: &[&str] = &[
    "start",
    "before-api",
    "on-ping",
    "on-info",
    "on-counters",
    "on-create",
    "on-boot",
    "on-restore",
    "after-restored",
    "on-resume",
    "after-resumed",
    "on-pause",
    "after-paused",
    "on-snapshot",
    "mid-snapshot",
    "after-snapshot",
    "on-resize",
    "on-add",
    "on-delete",
    "on-shutdown",
    "on-vmm-shutdown",
    "guest",
];

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    /// Dies as by SIGKILL.
    Die,
    /// Ends with this status and no word about it.
    Exit(u8),
    /// Never answers, and nothing behind it in the queue is served.
    Hang,
    /// Answers with bytes that are no HTTP.
    Garbage,
    /// Cuts the answer in half and closes the connection.
    Truncated,
    /// Closes the connection without an answer.
    Drop,
    /// Does the work, answers this much later.
    Late(Duration),
    /// Refuses with status 500.
    Error,
    /// Writes this many bytes to the log first.
    Flood(u64),
    /// Guest: takes no frame and accepts no connection.
    Never,
    /// Guest: takes requests and never answers one.
    Silent,
    /// Guest: the first byte of each answer comes this much later.
    SlowFirstByte(Duration),
    /// Guest: the first N connection attempts are lost.
    DropSyn(u64),
    /// Guest: resets the connection in the middle of the body.
    ResetMidBody,
    /// Guest: a body without end.
    EndlessBody,
    /// Guest: one byte of the answer every this long.
    Trickle(Duration),
    /// Guest: the preload fails.
    PreloadFail,
    /// Guest: the preload stops making progress.
    PreloadStall,
    /// Guest: stops running, as after a triple fault; the process ends with status 0.
    Crash,
}

impl FromStr for What {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        let number = |default: u64| -> Result<u64, String> {
            value.map_or(Ok(default), |v| {
                v.parse().map_err(|_| format!("{name}={v}: not a number"))
            })
        };
        let millis = |default| number(default).map(Duration::from_millis);
        Ok(match name {
            "die" => Self::Die,
            "exit" => Self::Exit(number(0)? as u8),
            "hang" => Self::Hang,
            "garbage" => Self::Garbage,
            "truncated" => Self::Truncated,
            "drop" => Self::Drop,
            "late" => Self::Late(millis(1000)?),
            "error" => Self::Error,
            "flood" => Self::Flood(number(1 << 20)?),
            "never" => Self::Never,
            "silent" => Self::Silent,
            "slow-first-byte" => Self::SlowFirstByte(millis(1000)?),
            "drop-syn" => Self::DropSyn(number(1)?),
            "reset-mid-body" => Self::ResetMidBody,
            "endless-body" => Self::EndlessBody,
            "trickle" => Self::Trickle(millis(200)?),
            "preload-fail" => Self::PreloadFail,
            "preload-stall" => Self::PreloadStall,
            "crash" => Self::Crash,
            _ => return Err(format!("unknown fault {name:?}")),
        })
    }
}

#[derive(Debug, Clone)]
struct Fault {
    phase: String,
    what: What,
    /// How many times it still strikes; `None` for every time.
    left: Option<u64>,
}

/// All faults that were ordered.
#[derive(Debug, Default, Clone)]
pub(super) struct Faults {
    list: RefCell<Vec<Fault>>,
}

impl Faults {
    /// Adds one fault, written `PHASE:WHAT[:TIMES]`.
    pub(super) fn order(&mut self, text: &str) -> Result<(), String> {
        let mut parts = text.splitn(3, ':');
        let phase = parts.next().unwrap_or_default();
        if !PHASES.contains(&phase) {
            return Err(format!("unknown phase {phase:?}"));
        }
        let what = parts
            .next()
            .ok_or("a fault is PHASE:WHAT[:TIMES]")?
            .parse()?;
        let left = match parts.next() {
            Some(times) => Some(
                times
                    .parse()
                    .map_err(|_| format!("{times:?}: not a count"))?,
            ),
            None => None,
        };
        self.list.get_mut().push(Fault {
            phase: phase.to_owned(),
            what,
            left,
        });
        Ok(())
    }

    /// What strikes now at `phase`; each call counts as one time.
    pub(super) fn strike(&self, phase: &str) -> Vec<What> {
        let mut list = self.list.borrow_mut();
        let mut struck = Vec::new();
        for fault in list.iter_mut().filter(|f| f.phase == phase) {
            match &mut fault.left {
                Some(0) => continue,
                Some(left) => *left -= 1,
                None => {}
            }
            struck.push(fault.what.clone());
        }
        struck
    }

    /// What is ordered for `phase`, without counting.
    pub(super) fn standing(&self, phase: &str) -> Vec<What> {
        let list = self.list.borrow();
        let at_phase = list.iter().filter(|f| f.phase == phase);
        at_phase.map(|f| f.what.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_with_a_count_strikes_that_often() {
        let mut faults = Faults::default();
        faults.order("on-ping:error:2").unwrap();
        faults.order("on-ping:late=5").unwrap();
        let late = What::Late(Duration::from_millis(5));
        assert_eq!(faults.strike("on-ping"), [What::Error, late.clone()]);
        assert_eq!(faults.strike("on-ping"), [What::Error, late.clone()]);
        assert_eq!(faults.strike("on-ping"), [late]);
        assert_eq!(faults.strike("on-info"), []);
    }

    #[test]
    fn refuses_faults_that_do_not_exist() {
        for text in [
            "",
            "on-ping",
            "nowhere:die",
            "on-ping:sing",
            "on-ping:late=x",
            "on-ping:die:x",
        ] {
            assert!(Faults::default().order(text).is_err(), "{text:?}");
        }
    }
}
