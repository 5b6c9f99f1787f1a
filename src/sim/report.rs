//! What the stand-in says about itself: its log and its event monitor.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use rustix::fs::OFlags;
use serde::Serialize;
use serde_json::Value;

/// How important a line of the log is; `-v` shows `Info`, `-vv` `Debug`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

enum Target {
    Stderr,
    File(File),
}

/// The log: blocking writes to stderr or a file, as in Cloud Hypervisor, so a pipe that
/// nobody drains stops everything here as well.
pub(super) struct Log {
    start: Instant,
    level: Level,
    target: RefCell<Target>,
}

impl Log {
    /// A log on stderr, or in a file that is truncated first.
    pub(super) fn open(start: Instant, verbosity: u8, file: Option<&Path>) -> io::Result<Self> {
        let target = match file {
            Some(path) => Target::File(File::create(path)?),
            None => Target::Stderr,
        };
        let level = match verbosity {
            0 => Level::Warn,
            1 => Level::Info,
            _ => Level::Debug,
        };
        Ok(Self {
            start,
            level,
            target: RefCell::new(target),
        })
    }

    pub(super) fn say(&self, level: Level, message: &str) {
        if level > self.level {
            return;
        }
        let time = self.start.elapsed().as_secs_f64();
        let name = format!("{level:?}").to_uppercase();
        let line = format!("rewake-sim: {time:>10.6}s: <vmm> {name}:stand-in -- {message}\n");
        self.write(line.as_bytes());
    }

    /// Writes about `bytes` bytes of lines, as a guest does that triggers warnings.
    pub(super) fn flood(&self, bytes: u64) {
        let line = [
            b"rewake-sim: flood as ordered ".as_slice(),
            &[b'.'; 98],
            b"\n",
        ]
        .concat();
        for _ in 0..bytes.div_ceil(line.len() as u64) {
            self.write(&line);
        }
    }

    fn write(&self, bytes: &[u8]) {
        // A log that cannot be written is no reason to stop a VM.
        let _ignored = match &mut *self.target.borrow_mut() {
            Target::Stderr => io::stderr().write_all(bytes),
            Target::File(file) => file.write_all(bytes),
        };
    }
}

/// One record, in the order of its fields.
#[derive(Serialize)]
struct Record<'a> {
    timestamp: Timestamp,
    source: &'a str,
    event: &'a str,
    properties: Value,
}

#[derive(Serialize)]
struct Timestamp {
    secs: u64,
    nanos: u32,
}

/// The event monitor: pretty-printed JSON objects, each followed by an empty line.
///
/// The descriptor becomes non-blocking and events are dropped when it is full (event_monitor
/// crate of Cloud Hypervisor).
pub(super) struct Monitor {
    start: Instant,
    out: Option<File>,
}

impl Monitor {
    /// A monitor that writes to `out`, or nowhere.
    pub(super) fn new(start: Instant, out: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(fd) = &out {
            let flags = rustix::fs::fcntl_getfl(fd.as_fd())?;
            rustix::fs::fcntl_setfl(fd.as_fd(), flags | OFlags::NONBLOCK)?;
        }
        Ok(Self {
            start,
            out: out.map(File::from),
        })
    }

    /// Reports an event of the VM.
    pub(super) fn vm(&self, event: &str) {
        self.emit("vm", event, Value::Null);
    }

    /// Reports any event.
    pub(super) fn emit(&self, source: &str, event: &str, properties: Value) {
        let Some(mut out) = self.out.as_ref() else {
            return;
        };
        let since = self.start.elapsed();
        let record = Record {
            timestamp: Timestamp {
                secs: since.as_secs(),
                nanos: since.subsec_nanos(),
            },
            source,
            event,
            properties,
        };
        if let Ok(mut text) = serde_json::to_string_pretty(&record) {
            text.push_str("\n\n");
            // Full pipe: the event is lost, as in the original.
            let _dropped = out.write_all(text.as_bytes());
        }
    }
}
