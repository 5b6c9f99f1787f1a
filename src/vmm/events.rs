//! What Cloud Hypervisor writes to `--event-monitor`.
//!
//! Each record is a pretty-printed JSON object with a blank line after it
//! (`event_monitor/src/lib.rs`, `vmm/src/lib.rs`). CH never waits for its reader: when the
//! pipe is full a record is dropped, or cut in the middle. Events are hints, not truth:
//! nothing may hang on one of them arriving.
//!
//! Order to know: `vm/restored` comes before the vCPUs run, `vm/resumed` after, and
//! `vm/snapshotted` before any file is written. `pausing`, `resuming` and `snapshotting`
//! come also for requests that are then refused.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::wire::json::{self, JsonError, JsonLimits};

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Time since the process made its event monitor, shortly after its start.
    pub timestamp: Duration,
    /// Who speaks: `vmm`, `vm`, `virtio-device`, `guest`, `vdpa`.
    pub source: String,
    /// What happened, in CH's word.
    pub event: String,
    /// Details, by CH's names: the `id` of a device, for instance.
    pub properties: BTreeMap<String, String>,
}

impl Event {
    /// What happened, where rewake knows it.
    #[must_use]
    pub fn kind(&self) -> EventKind {
        EventKind::of(&self.source, &self.event)
    }

    /// The `id` property: which device.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.properties.get("id").map(String::as_str)
    }
}

macro_rules! event_kinds {
    ($($(#[$doc:meta])* $variant:ident = $source:literal / $event:literal,)*) => {
        /// The events of CH v50 to v53.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum EventKind {
            $($(#[$doc])* $variant,)*
            /// One that rewake does not know.
            Other,
        }

        impl EventKind {
            fn of(source: &str, event: &str) -> Self {
                match (source, event) {
                    $(($source, $event) => Self::$variant,)*
                    _ => Self::Other,
                }
            }
        }
    };
}

event_kinds! {
    /// The process has begun; neither API nor VM is there yet.
    VmmStarting = "vmm" / "starting",
    /// `vmm.shutdown` was called.
    VmmShutdown = "vmm" / "shutdown",
    /// `vm.boot` has begun.
    Booting = "vm" / "booting",
    /// The vCPUs run.
    Booted = "vm" / "booted",
    /// Memory, vCPUs and devices of a snapshot exist.
    Restoring = "vm" / "restoring",
    /// The vCPU threads exist, but are parked.
    Restored = "vm" / "restored",
    /// `vm.resume`, or the resume of a restore, has begun.
    Resuming = "vm" / "resuming",
    /// The vCPUs run.
    Resumed = "vm" / "resumed",
    /// `vm.pause` was asked for.
    Pausing = "vm" / "pausing",
    /// vCPUs and device threads are parked.
    Paused = "vm" / "paused",
    /// `vm.snapshot` was asked for.
    Snapshotting = "vm" / "snapshotting",
    /// The state is collected; no file is written yet.
    Snapshotted = "vm" / "snapshotted",
    /// `vm.resize` has begun.
    Resizing = "vm" / "resizing",
    /// The request for another size is on its way to the guest.
    Resized = "vm" / "resized",
    /// The VM has been shut down; its configuration is kept.
    VmShutdown = "vm" / "shutdown",
    /// The VM is gone. The only event of a failed restore.
    VmDeleted = "vm" / "deleted",
    /// The VM starts again.
    Rebooting = "vm" / "rebooting",
    /// The vCPUs run again.
    Rebooted = "vm" / "rebooted",
    /// The guest has let go of a device that `vm.remove-device` named.
    DeviceRemoved = "vm" / "device-removed",
    /// A core dump is being written.
    Coredumping = "vm" / "coredumping",
    /// An outgoing migration has begun.
    MigrationStarted = "vm" / "migration-started",
    /// One pass over dirty memory is done.
    MigrationMemoryIteration = "vm" / "migration-memory-iteration",
    /// An outgoing migration has ended well.
    MigrationFinished = "vm" / "migration-finished",
    /// An outgoing migration has failed.
    MigrationFailed = "vm" / "migration-failed",
    /// Waiting for an incoming migration.
    MigrationReceiveReady = "vm" / "migration-receive-ready",
    /// An incoming migration has begun.
    MigrationReceiveStarted = "vm" / "migration-receive-started",
    /// An incoming migration has ended well.
    MigrationReceiveFinished = "vm" / "migration-receive-finished",
    /// An incoming migration has failed.
    MigrationReceiveFailed = "vm" / "migration-receive-failed",
    /// The last page of a post-copy migration has arrived.
    PostcopyMigrationCompleted = "vm" / "postcopy-migration-completed",
    /// The guest's driver uses the device `id`.
    DeviceActivated = "virtio-device" / "activated",
    /// The guest's driver has reset the device `id`.
    DeviceReset = "virtio-device" / "reset",
    /// The same of a vDPA device.
    VdpaActivated = "vdpa" / "activated",
    /// The same of a vDPA device.
    VdpaReset = "vdpa" / "reset",
    /// The guest reports its own panic.
    GuestPanic = "guest" / "panic",
}

/// Bytes that should have been a record and were not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// Cut, or no JSON of the expected shape. Normal where the pipe was full.
    #[error("Event record of {bytes} bytes cannot be read")]
    Torn {
        /// Its length.
        bytes: usize,
        /// Why.
        #[source]
        source: JsonError,
    },
    /// More than [`EventParser::RECORD_LIMITS`] allows without a blank line.
    #[error("Event record exceeds {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
}

/// Turns a stream of bytes, however it is cut, into events.
///
/// ```
/// use rewake::vmm::events::{EventKind, EventParser};
///
/// let mut parser = EventParser::new();
/// let mut kinds = Vec::new();
/// let record = b"{\n  \"timestamp\": {\n    \"secs\": 0,\n    \"nanos\": 7\n  },\n  \
///     \"source\": \"vm\",\n  \"event\": \"resumed\",\n  \"properties\": null\n}\n\n";
/// for chunk in record.chunks(10) {
///     parser.feed(chunk, |event| kinds.extend(event.map(|event| event.kind())));
/// }
/// assert_eq!(kinds, [EventKind::Resumed]);
/// ```
#[derive(Debug, Default)]
pub struct EventParser {
    block: Vec<u8>,
    /// The block grew too long: skip to the next blank line.
    skipping: bool,
    after_newline: bool,
}

/// How `serde_json`'s pretty printer begins an object at the left margin, and only there: line
/// feeds inside texts are escaped, and inner objects are indented further.
const RECORD_START: &[u8] = b"{\n  \"";

#[derive(Deserialize)]
struct Record {
    timestamp: Timestamp,
    source: String,
    event: String,
    properties: Option<BTreeMap<String, Value>>,
}

#[derive(Deserialize)]
struct Timestamp {
    secs: u64,
    nanos: u32,
}

impl EventParser {
    /// Bounds of one record. The longest of CH v53 has some 200 bytes.
    pub const RECORD_LIMITS: JsonLimits = JsonLimits {
        bytes: 16 * 1024,
        depth: 4,
    };

    /// A parser at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes and hands over every record that they complete. After damage it
    /// goes on with the next record.
    pub fn feed(&mut self, bytes: &[u8], mut on_record: impl FnMut(Result<Event, Damage>)) {
        for &byte in bytes {
            let ends = byte == b'\n' && self.after_newline;
            self.after_newline = byte == b'\n';
            if ends {
                self.skipping = false;
                self.end_block(&mut on_record);
            } else if !self.skipping {
                self.block.push(byte);
                self.skip_if_too_long(&mut on_record);
            }
        }
    }

    /// Takes the end of the stream: a last record may lack its blank line.
    pub fn finish(mut self, mut on_record: impl FnMut(Result<Event, Damage>)) {
        self.end_block(&mut on_record);
    }

    fn skip_if_too_long(&mut self, on_record: &mut impl FnMut(Result<Event, Damage>)) {
        let limit = Self::RECORD_LIMITS.bytes;
        if self.block.len() > limit {
            self.block = Vec::new();
            self.skipping = true;
            on_record(Err(Damage::TooLong { limit }));
        }
    }

    /// A block is one record, unless a write before it was lost: then it is the pieces of
    /// several, of which the last may be whole.
    fn end_block(&mut self, on_record: &mut impl FnMut(Result<Event, Damage>)) {
        let mut rest = self.block.trim_ascii();
        while !rest.is_empty() {
            let next = rest[1..]
                .windows(RECORD_START.len())
                .position(|window| window == RECORD_START);
            let (piece, tail) = rest.split_at(next.map_or(rest.len(), |at| at + 1));
            on_record(Event::parse(piece.trim_ascii()));
            rest = tail;
        }
        self.block.clear();
    }
}

impl Event {
    fn parse(record: &[u8]) -> Result<Self, Damage> {
        let limits = EventParser::RECORD_LIMITS;
        let read: Result<Record, _> = json::from_slice_bounded(record, limits);
        let read = read.map_err(|source| Damage::Torn {
            bytes: record.len(),
            source,
        })?;
        let text = |value: Value| match value {
            Value::String(text) => text,
            other => other.to_string(),
        };
        Ok(Self {
            // More than a second's nanoseconds could overflow `Duration::new`.
            timestamp: Duration::from_secs(read.timestamp.secs)
                .saturating_add(Duration::from_nanos(read.timestamp.nanos.into())),
            source: read.source,
            event: read.event,
            properties: read
                .properties
                .unwrap_or_default()
                .into_iter()
                .map(|(name, value)| (name, text(value)))
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs;
    use std::path::Path;

    fn captures() -> Vec<(String, Vec<u8>)> {
        let mut found = Vec::new();
        for version in ["ch-v52", "ch-v53"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
            for entry in fs::read_dir(dir.join(version).join("events")).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                if !name.ends_with(".stderr.txt") {
                    found.push((format!("{version}/{name}"), fs::read(path).unwrap()));
                }
            }
        }
        assert!(found.len() >= 13, "{}", found.len());
        found
    }

    fn parse(bytes: &[u8], chunk: usize) -> Vec<Result<Event, Damage>> {
        let mut parser = EventParser::new();
        let mut records = Vec::new();
        for piece in bytes.chunks(chunk) {
            parser.feed(piece, |record| records.push(record));
        }
        parser.finish(|record| records.push(record));
        records
    }

    fn record(event: &str) -> String {
        format!(
            "{{\n  \"timestamp\": {{\n    \"secs\": 1,\n    \"nanos\": 2\n  }},\n  \
             \"source\": \"vm\",\n  \"event\": \"{event}\",\n  \"properties\": null\n}}"
        )
    }

    fn names(records: &[Result<Event, Damage>]) -> Vec<String> {
        let name = |record: &Result<Event, Damage>| match record {
            Ok(event) => event.event.clone(),
            Err(Damage::Torn { .. }) => "torn".to_owned(),
            Err(Damage::TooLong { .. }) => "too long".to_owned(),
        };
        records.iter().map(name).collect()
    }

    #[test]
    fn every_captured_stream_is_read_without_damage() {
        for (name, bytes) in captures() {
            let records = parse(&bytes, bytes.len());
            let written = bytes.windows(8).filter(|w| w == b"\"event\":").count();
            assert_eq!(records.len(), written, "{name}");
            let mut last = Duration::ZERO;
            for record in records {
                let event = record.unwrap();
                assert_ne!(event.kind(), EventKind::Other, "{name}: {event:?}");
                assert!(event.timestamp > last, "{name}");
                last = event.timestamp;
            }
        }
    }

    #[test]
    fn the_captured_linux_guest_tells_its_story() {
        let path = "fixtures/ch-v53/events/linux-guest-boot-pause-snapshot.txt";
        let bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
        let records = parse(&bytes, 100);
        let events: Vec<Event> = records.into_iter().map(Result::unwrap).collect();
        let kinds: Vec<EventKind> = events.iter().map(Event::kind).collect();
        assert_eq!(
            kinds[..6],
            [
                EventKind::VmmStarting,
                EventKind::Booting,
                EventKind::Booted,
                EventKind::DeviceActivated,
                EventKind::DeviceActivated,
                EventKind::DeviceActivated,
            ]
        );
        assert_eq!(events[0].timestamp, Duration::from_nanos(5_137_010));
        let ids: Vec<_> = events[3..6].iter().map(|event| event.id()).collect();
        assert_eq!(ids, [Some("_net1"), Some("_disk0"), Some("__balloon")]);
    }

    #[test]
    fn the_cut_of_the_stream_does_not_matter() {
        let torn = format!("{}{}\n\n", &record("a")[..50], record("b"));
        let long = format!("{}\n\n{}\n\n", "x".repeat(20_000), record("c"));
        let mut inputs = captures();
        inputs.push(("torn".to_owned(), torn.into_bytes()));
        inputs.push(("long".to_owned(), long.into_bytes()));
        for (name, bytes) in inputs {
            let whole = parse(&bytes, bytes.len());
            for chunk in [1, 2, 3, 7, 64, 1000] {
                assert_eq!(parse(&bytes, chunk), whole, "{name} by {chunk}");
            }
        }
    }

    #[test]
    fn goes_on_after_lost_and_cut_writes() {
        let (a, b) = (record("a"), record("b"));
        for cut in 1..a.len() {
            let merged = format!("{}{b}\n\n", &a[..cut]);
            assert_eq!(names(&parse(merged.as_bytes(), 9)), ["torn", "b"], "{cut}");
            let closed = format!("{}\n\n{b}\n\n", &a[..cut]);
            assert_eq!(names(&parse(closed.as_bytes(), 9)), ["torn", "b"], "{cut}");
        }
        for (name, text, expected) in [
            (
                "no blank line between",
                format!("{a}{b}\n\n"),
                &["a", "b"][..],
            ),
            (
                "no blank line at the end",
                format!("{a}\n\n{b}"),
                &["a", "b"],
            ),
            ("blank lines alone", format!("\n\n\n\n{a}\n\n\n\n"), &["a"]),
            (
                "foreign text before",
                format!("noise\n\n{a}\n\n"),
                &["torn", "a"],
            ),
            (
                "head lost",
                format!("{}\n\n{b}\n\n", &a[40..]),
                &["torn", "b"],
            ),
            ("nothing", String::new(), &[]),
        ] {
            assert_eq!(names(&parse(text.as_bytes(), 5)), expected, "{name}");
        }
    }

    #[test]
    fn a_record_without_end_costs_no_memory() {
        let mut parser = EventParser::new();
        let mut damage = Vec::new();
        for _ in 0..1000 {
            parser.feed(&[b'x'; 1024], |record| damage.push(record));
        }
        let limit = EventParser::RECORD_LIMITS.bytes;
        assert_eq!(damage, [Err(Damage::TooLong { limit })]);
        assert!(parser.block.capacity() <= limit);
        let next = format!("\n\n{}\n\n", record("a"));
        parser.feed(next.as_bytes(), |record| damage.push(record));
        assert_eq!(names(&damage), ["too long", "a"]);
    }

    #[test]
    fn odd_records_are_damage_or_harmless() {
        let with = |from: &str, to: &str| record("a").replace(from, to) + "\n\n";
        for (name, text, fine) in [
            ("number as property", with("null", "{\"n\": 1}"), true),
            (
                "more nanoseconds than a second",
                with("\"nanos\": 2", "\"nanos\": 4294967295"),
                true,
            ),
            (
                "latest time",
                with("\"secs\": 1", "\"secs\": 18446744073709551615"),
                true,
            ),
            ("negative time", with("\"secs\": 1", "\"secs\": -1"), false),
            ("source missing", with("\"source\": \"vm\",", ""), false),
            (
                "too deep",
                with("null", "{\"a\":{\"b\":{\"c\":{}}}}"),
                false,
            ),
            (
                "more fields than known",
                with("\"source\"", "\"host\": 1, \"source\""),
                true,
            ),
        ] {
            let records = parse(text.as_bytes(), 11);
            assert_eq!(records.len(), 1, "{name}");
            assert_eq!(records[0].is_ok(), fine, "{name}: {records:?}");
        }
    }
}
