//! Timelines as a trace that standard viewers open: Chrome's JSON, which Perfetto reads.
//!
//! Each operation is a process of the trace, named after its sandbox, with two threads: our
//! phases, each a slice from the phase before it, and what Cloud Hypervisor's event monitor
//! told, as instants.
//!
//! **One clock.** Our phases are instants of the monotonic clock. CH's events bear the time
//! since CH made its monitor, by the same clock but from an origin that nobody tells. Every
//! event arrives here after it was written, so arrival minus timestamp is an upper bound of
//! that origin, and the smallest of them the best: as late as the quickest delivery of all.
//! For a process that we started, its start is a lower bound. Events are placed by their own
//! timestamps from there; the trace says how wide the bounds are apart (`origin_slack_us`).
//!
//! Format: "Trace Event Format", Google; `ph` X is a complete slice, i an instant, M metadata;
//! times in microseconds.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::timeline::{Phase, Timeline};

const PHASES: u32 = 1;
const EVENTS: u32 = 2;

/// Operations on one axis of time.
#[derive(Debug)]
pub struct Trace {
    origin: Instant,
    events: Vec<Value>,
    operations: u32,
}

impl Trace {
    /// An empty trace; its times count from `origin`, which should not be later than the
    /// first operation's.
    #[must_use]
    pub const fn new(origin: Instant) -> Self {
        Self {
            origin,
            events: Vec::new(),
            operations: 0,
        }
    }

    /// Adds an operation under a name for people.
    pub fn add(&mut self, name: &str, timeline: &Timeline) {
        self.operations += 1;
        let pid = self.operations;
        self.name("process_name", pid, 0, name);
        self.name("thread_name", pid, PHASES, "rewake");
        let begin = timeline.origin();
        let mut before = Duration::ZERO;
        for (phase, at) in timeline.marks() {
            self.events.push(json!({
                "name": phase.name(), "cat": "phase", "ph": "X", "pid": pid, "tid": PHASES,
                "ts": self.micros(begin + before), "dur": micros(at - before),
                "args": {"reached_ms": at.as_secs_f64() * 1e3},
            }));
            before = at;
        }
        for note in timeline.notes() {
            self.events.push(json!({
                "name": "note", "cat": "note", "ph": "i", "s": "t", "pid": pid, "tid": PHASES,
                "ts": self.micros(begin + before), "args": {"text": note},
            }));
        }
        self.add_vmm_events(pid, timeline);
    }

    fn add_vmm_events(&mut self, pid: u32, timeline: &Timeline) {
        let Some(clock) = VmmClock::of(timeline) else {
            return;
        };
        self.name("thread_name", pid, EVENTS, "cloud-hypervisor");
        for event in timeline.vmm_events() {
            let at = clock.origin + event.timestamp;
            self.events.push(json!({
                "name": event.name, "cat": "vmm", "ph": "i", "s": "t", "pid": pid, "tid": EVENTS,
                "ts": self.micros(at),
                "args": {
                    "timestamp_us": micros(event.timestamp),
                    "arrived_us": self.micros(event.arrived),
                    "origin_slack_us": clock.slack.map(micros),
                },
            }));
        }
    }

    fn name(&mut self, kind: &str, pid: u32, tid: u32, name: &str) {
        self.events.push(json!({
            "name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name},
        }));
    }

    /// A moment on the trace's axis. A process that was started before the trace began lies
    /// left of it, until [`Trace::into_json`].
    fn micros(&self, at: Instant) -> f64 {
        match at.checked_duration_since(self.origin) {
            Some(later) => micros(later),
            None => -micros(self.origin - at),
        }
    }

    /// The document: `{"traceEvents":[…],"displayTimeUnit":"ms"}`. Its axis begins with the
    /// first event of all, where that is older than the origin: Perfetto drops what lies
    /// before zero.
    #[must_use]
    pub fn into_json(mut self) -> Value {
        let times = self.events.iter().filter_map(|event| event["ts"].as_f64());
        let first = times.fold(0.0, f64::min);
        for event in &mut self.events {
            for place in ["/ts", "/args/arrived_us"] {
                if let Some(time) = event.pointer_mut(place)
                    && let Some(at) = time.as_f64()
                {
                    *time = (at - first).into();
                }
            }
        }
        json!({"traceEvents": self.events, "displayTimeUnit": "ms"})
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1e3
}

/// When CH's event monitor was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct VmmClock {
    origin: Instant,
    /// How much earlier it may have been, where that is known.
    slack: Option<Duration>,
}

impl VmmClock {
    fn of(timeline: &Timeline) -> Option<Self> {
        let bounds = timeline.vmm_events().iter();
        let latest = bounds.filter_map(|event| event.arrived.checked_sub(event.timestamp));
        let latest = latest.min()?;
        // A process that was warm is older than its operation: nothing bounds it from below.
        let spawned = timeline.at(Phase::Spawned).map(|at| timeline.origin() + at);
        let slack = spawned.and_then(|spawned| latest.checked_duration_since(spawned));
        Some(Self {
            origin: latest,
            slack,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::VmmEvent;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn timeline(at: Instant) -> Timeline {
        let mut timeline = Timeline::start();
        let shift = at.saturating_duration_since(timeline.origin());
        let origin = timeline.origin() + shift;
        for (phase, after) in [(Phase::Planned, 2), (Phase::Spawned, 3), (Phase::Ready, 20)] {
            timeline.mark_at(phase, origin + ms(after));
        }
        // The monitor was made at 5 ms; the second event travelled quickest.
        for (name, timestamp, travelled) in [("vmm/starting", 0, 4), ("vm/resumed", 8, 1)] {
            timeline.vmm_event(VmmEvent {
                name: name.to_owned(),
                timestamp: ms(timestamp),
                arrived: origin + ms(5 + timestamp + travelled),
            });
        }
        timeline.note("a note");
        timeline
    }

    #[test]
    fn events_of_the_vmm_stand_where_the_quickest_delivery_puts_them() {
        let timeline = timeline(Instant::now());
        let clock = VmmClock::of(&timeline).unwrap();
        let origin = timeline.origin() + timeline.at(Phase::Planned).unwrap() - ms(2);
        assert_eq!(clock.origin - origin, ms(6), "1 ms late, not 4");
        assert_eq!(clock.slack, Some(ms(3)), "spawned at 3 ms");
        let mut trace = Trace::new(timeline.origin());
        trace.add("sandbox a1", &timeline);
        let document = trace.into_json();
        let named = |name: &str| {
            let all = document["traceEvents"].as_array().unwrap();
            all.iter()
                .find(|event| event["name"] == name)
                .unwrap()
                .clone()
        };
        let distance = named("vm/resumed")["ts"].as_f64().unwrap()
            - named("vmm/starting")["ts"].as_f64().unwrap();
        assert!((distance - 8000.0).abs() < 0.01, "{distance}");
    }

    /// A process that waited in a pool has told things long before.
    #[test]
    fn nothing_lies_before_the_beginning_of_the_axis() {
        let early = timeline(Instant::now());
        let mut trace = Trace::new(early.origin() + ms(50));
        trace.add("early", &early);
        let document = trace.into_json();
        let events = document["traceEvents"].as_array().unwrap();
        let at = |name: &str| {
            let event = events.iter().find(|event| event["name"] == name).unwrap();
            event["ts"].as_f64().unwrap()
        };
        assert!(at("planned").abs() < 0.01, "{document}");
        let between = at("vm/resumed") - at("planned");
        assert!((between - 14_000.0).abs() < 1000.0, "{document}");
        let arrived = &events.last().unwrap()["args"]["arrived_us"];
        assert!(arrived.as_f64().unwrap() >= at("vm/resumed"), "{document}");
    }

    /// What a viewer insists on, by the published format.
    #[test]
    fn the_document_is_a_chrome_trace() {
        let begun = Instant::now();
        let mut trace = Trace::new(begun);
        trace.add("first", &timeline(begun));
        trace.add("second", &timeline(begun));
        let text = trace.into_json().to_string();
        let document: Value = serde_json::from_str(&text).unwrap();
        let events = document["traceEvents"].as_array().unwrap();
        assert_eq!(document["displayTimeUnit"], "ms");
        let mut ends = std::collections::BTreeMap::new();
        for event in events {
            assert!(event["name"].is_string() && event["pid"].is_u64() && event["tid"].is_u64());
            match event["ph"].as_str().unwrap() {
                "M" => assert!(event["args"]["name"].is_string(), "{event}"),
                "i" => assert!(event["ts"].is_f64() && event["s"] == "t", "{event}"),
                "X" => {
                    let (ts, dur) = (
                        event["ts"].as_f64().unwrap(),
                        event["dur"].as_f64().unwrap(),
                    );
                    assert!(dur >= 0.0, "{event}");
                    let key = (event["pid"].as_u64(), event["tid"].as_u64());
                    let end = ends.insert(key, ts + dur).unwrap_or(0.0);
                    // Slices of one thread follow one another: viewers drop those that cross.
                    assert!(ts >= end - 0.002, "{event} begins before {end}");
                }
                other => panic!("unknown phase {other}"),
            }
        }
        let processes = events
            .iter()
            .filter(|event| event["name"] == "process_name");
        assert_eq!(processes.count(), 2);
        assert!(text.contains("a note"));
    }
}
