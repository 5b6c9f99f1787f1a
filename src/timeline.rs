//! The phases of an operation, with monotonic times.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

/// A moment that every restore passes, in the order in which a healthy one does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Phase {
    /// The network slot stood. Where one is built for the operation: after CH was started.
    SlotAcquired,
    /// The disk stood.
    DiskAcquired,
    /// The sandbox had a memory file of its own, which shares the template's blocks.
    MemoryOwned,
    /// The snapshot directory was opened, bounded and checked.
    SnapshotChecked,
    /// The plan stood, and the rewritten snapshot lay in the run directory.
    Planned,
    /// The slot that was being built had a namespace for CH to start in.
    NetnsPinned,
    /// CH's process existed (`exec` had succeeded).
    Spawned,
    /// What must be on record before the vCPUs run was.
    GatePassed,
    /// CH had begun to restore: the first device event, or the restore's own.
    Restoring,
    /// CH reported the VM as restored, vCPUs still parked.
    Restored,
    /// CH's event monitor reported vCPUs running.
    Resumed,
    /// CH answered the API call.
    ApiAccepted,
    /// The guest answered a SYN for the first time.
    FirstSynAnswered,
    /// The guest sent the first byte of an answer.
    FirstByte,
    /// envd answered `/health` with 200 or 204.
    Ready,
    /// `/init` was acknowledged.
    InitDone,
    /// The balloon was told to deflate.
    BalloonDone,
    /// All of the guest's memory was known to be there.
    Materialised,
    /// The agent had prepared the guest for a snapshot, or could not.
    GuestPrepared,
    /// The vCPUs stood still.
    VcpusPaused,
    /// CH had written its snapshot.
    SnapshotWritten,
    /// Memory that CH had written had its holes.
    ZerosPunched,
    /// The snapshot was complete and checked, and on the disk where that was asked for.
    SnapshotSealed,
    /// The disk was copied for a template.
    DiskFlattened,
    /// The snapshot was in its place: from here on it counts.
    Committed,
    /// The vCPUs ran on.
    VcpusResumed,
    /// CH was gone.
    VmmGone,
    /// Everything that the operation had to undo was.
    Undone,
}

impl Phase {
    /// The name used in JSON and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SlotAcquired => "slot_acquired",
            Self::DiskAcquired => "disk_acquired",
            Self::MemoryOwned => "memory_owned",
            Self::SnapshotChecked => "snapshot_checked",
            Self::Planned => "planned",
            Self::NetnsPinned => "netns_pinned",
            Self::Spawned => "spawned",
            Self::GatePassed => "gate_passed",
            Self::Restoring => "restoring",
            Self::Restored => "restored",
            Self::Resumed => "resumed",
            Self::ApiAccepted => "api_accepted",
            Self::FirstSynAnswered => "first_syn_answered",
            Self::FirstByte => "first_byte",
            Self::Ready => "ready",
            Self::InitDone => "init_done",
            Self::BalloonDone => "balloon_done",
            Self::Materialised => "materialised",
            Self::GuestPrepared => "guest_prepared",
            Self::VcpusPaused => "vcpus_paused",
            Self::SnapshotWritten => "snapshot_written",
            Self::ZerosPunched => "zeros_punched",
            Self::SnapshotSealed => "snapshot_sealed",
            Self::DiskFlattened => "disk_flattened",
            Self::Committed => "committed",
            Self::VcpusResumed => "vcpus_resumed",
            Self::VmmGone => "vmm_gone",
            Self::Undone => "undone",
        }
    }
}

/// An event of Cloud Hypervisor's monitor, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmEvent {
    /// `source/event`, and the device where it names one.
    pub name: String,
    /// Time since CH made its monitor.
    pub timestamp: Duration,
    /// When we read it.
    pub arrived: Instant,
}

/// Events of one operation that are kept: a healthy one has some twenty.
const MAX_EVENTS: usize = 256;

/// When each phase of one operation was reached, and what is worth knowing about it.
#[derive(Debug, Clone)]
pub struct Timeline {
    origin: Instant,
    marks: Vec<(Phase, Duration)>,
    notes: Vec<String>,
    events: Vec<VmmEvent>,
}

impl Timeline {
    /// A timeline that begins now.
    #[must_use]
    pub fn start() -> Self {
        Self {
            origin: Instant::now(),
            marks: Vec::with_capacity(16),
            notes: Vec::new(),
            events: Vec::new(),
        }
    }

    /// Marks a phase as reached now. A phase counts once; later calls are ignored.
    pub fn mark(&mut self, phase: Phase) {
        self.mark_at(phase, Instant::now());
    }

    /// Marks a phase as reached at the given instant.
    pub fn mark_at(&mut self, phase: Phase, at: Instant) {
        if self.at(phase).is_none() {
            let offset = at.saturating_duration_since(self.origin);
            self.marks.push((phase, offset));
        }
    }

    /// Adds a remark: a fallback and its reason, a warning.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Keeps an event of CH's monitor, the first 256.
    pub fn vmm_event(&mut self, event: VmmEvent) {
        if self.events.len() < MAX_EVENTS {
            self.events.push(event);
        }
    }

    /// What CH's monitor has told, in order.
    #[must_use]
    pub fn vmm_events(&self) -> &[VmmEvent] {
        &self.events
    }

    /// When a phase was reached, counted from the start of the operation.
    #[must_use]
    pub fn at(&self, phase: Phase) -> Option<Duration> {
        self.marks
            .iter()
            .find_map(|(p, at)| (*p == phase).then_some(*at))
    }

    /// All phases reached, by time.
    #[must_use]
    pub fn marks(&self) -> Vec<(Phase, Duration)> {
        let mut marks = self.marks.clone();
        marks.sort_by_key(|(phase, at)| (*at, *phase));
        marks
    }

    /// The remarks, in order.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The monotonic instant at which the operation began.
    #[must_use]
    pub const fn origin(&self) -> Instant {
        self.origin
    }

    /// `{"phases":[{"phase","at_us"}],"notes":[…]}`, times in microseconds from the start.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let phases: Vec<_> = self
            .marks()
            .into_iter()
            .map(|(phase, at)| {
                let at_us = u64::try_from(at.as_micros()).unwrap_or(u64::MAX);
                serde_json::json!({"phase": phase.name(), "at_us": at_us})
            })
            .collect();
        serde_json::json!({"phases": phases, "notes": self.notes})
    }
}

impl fmt::Display for Timeline {
    /// A table: phase, time since the start, time since the phase before.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<20}{:>12}{:>12}", "phase", "at ms", "+ ms")?;
        let mut before = Duration::ZERO;
        for (phase, at) in self.marks() {
            writeln!(
                f,
                "{:<20}{:>12.3}{:>12.3}",
                phase.name(),
                at.as_secs_f64() * 1e3,
                (at - before).as_secs_f64() * 1e3
            )?;
            before = at;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_sorted_by_time_and_count_once() {
        let mut timeline = Timeline::start();
        let origin = timeline.origin();
        timeline.mark_at(Phase::Ready, origin + Duration::from_millis(9));
        timeline.mark_at(Phase::Spawned, origin + Duration::from_millis(2));
        timeline.mark_at(Phase::Ready, origin + Duration::from_millis(30));
        let names: Vec<_> = timeline.marks().iter().map(|(p, _)| p.name()).collect();
        assert_eq!(names, ["spawned", "ready"]);
        assert_eq!(timeline.at(Phase::Ready), Some(Duration::from_millis(9)));
        assert_eq!(timeline.to_json()["phases"][1]["at_us"], 9000);
        assert!(timeline.to_string().contains("ready"));
    }
}
