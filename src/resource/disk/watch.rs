//! Watching many stores on one thread, through one descriptor.
//!
//! The kernel reports by itself that a snapshot has become invalid: a device-mapper event
//! (`__invalidate_snapshot`, drivers/md/dm-snap.c), which makes the control device readable
//! (`DM_DEV_ARM_POLL`). It reports neither that a store fills up nor that it is full
//! (`snapshot_overflowed` is only noted there). So stores are looked at as well, one ioctl
//! each: now and then while all is well, and closely once one is under pressure.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry};
use rewake_sys::CallError;
use rustix::io::Errno;

use super::error::{DiskError, call};
use super::pressure::{CowStatus, PressureWatch, StoreState};
use super::record::DiskRecord;
use super::{DiskConfig, DiskKind, DiskPool, dm_snapshot, file};
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::ids::SandboxId;
use crate::wire::reactor::{Machine, TokenRange, earliest, wait};

/// How often stores are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchOptions {
    /// The time between two looks at a store that is healthy, or lost.
    pub every: Duration,
    /// The same for a store under pressure, which may be full soon.
    pub under_pressure: Duration,
}

impl Default for WatchOptions {
    fn default() -> Self {
        Self {
            every: Duration::from_secs(1),
            under_pressure: Duration::from_millis(100),
        }
    }
}

/// Something has changed about a disk. There is one event for each change.
#[derive(Debug)]
#[non_exhaustive]
pub enum DiskEvent {
    /// Its store is in another state: under pressure, full, given up by the kernel, or healthy
    /// again. A disk that is added counts as healthy before.
    State {
        /// The disk.
        id: SandboxId,
        /// What it was.
        from: StoreState,
        /// What it is now, with its figures.
        status: CowStatus,
    },
    /// It is not watched any more.
    Ended {
        /// The disk.
        id: SandboxId,
        /// Why: [`DiskError::Detached`] where the disk was removed or detached.
        error: DiskError,
    },
}

impl DiskEvent {
    /// Whose disk it is about.
    #[must_use]
    pub const fn id(&self) -> &SandboxId {
        match self {
            Self::State { id, .. } | Self::Ended { id, .. } => id,
        }
    }
}

/// A disk that is watched.
#[derive(Debug)]
struct Watched {
    dir: PathBuf,
    record: DiskRecord,
    /// Its device's; `None` for disks that are files.
    uuid: Option<String>,
    seen: PressureWatch,
    /// The number of its device's last event.
    event: Option<u32>,
    look_at: Instant,
}

/// Watches any number of disks. As a [`Machine`] it runs on the caller's loop, with
/// [`DiskWatch::next_event`] asked after each [`advance`](Machine::advance); it ends only
/// where the device-mapper cannot be watched at all. [`DiskWatch::wait`] is the blocking form.
#[derive(Debug)]
pub struct DiskWatch {
    /// A pool of its own: which events a control descriptor has seen is kept by descriptor.
    pool: DiskPool,
    options: WatchOptions,
    tokens: TokenRange,
    disks: BTreeMap<SandboxId, Watched>,
    events: VecDeque<DiskEvent>,
    registered: bool,
    /// The kernel has reported something since it was last asked what.
    woken: bool,
}

impl DiskWatch {
    /// How many event tokens it needs.
    pub const TOKENS: usize = 1;

    /// A watch on nothing yet. Which store is under pressure is said by the thresholds of
    /// the configuration.
    #[must_use]
    pub fn new(config: DiskConfig, options: WatchOptions, tokens: TokenRange) -> Self {
        Self {
            pool: DiskPool::open(config, Faults::NONE),
            options,
            tokens,
            disks: BTreeMap::new(),
            events: VecDeque::new(),
            registered: false,
            woken: false,
        }
    }

    /// Watches a disk, whoever holds it, from now on. It must be attached.
    ///
    /// # Errors
    /// [`DiskError::Missing`] where there is none, else what the calls say.
    pub fn add(&mut self, id: &SandboxId, dir: &Path) -> Result<(), DiskError> {
        let dir = super::absolute(dir)?;
        let record = DiskRecord::read(id, &dir, &Faults::NONE)?.record;
        let uuid = match record.kind {
            DiskKind::DmSnapshot => {
                let path = record.store(id, &dir);
                let store = file::open(&path, false, &Faults::NONE)?;
                Some(dm_snapshot::uuid(&store, &path)?)
            }
            DiskKind::Reflink | DiskKind::Copy => None,
        };
        let watched = Watched {
            dir,
            record,
            uuid,
            seen: PressureWatch::new(),
            event: None,
            look_at: Instant::now(),
        };
        self.disks.insert(id.clone(), watched);
        Ok(())
    }

    /// Watches a disk no more. Returns whether it was watched.
    pub fn remove(&mut self, id: &SandboxId) -> bool {
        self.disks.remove(id).is_some()
    }

    /// The next of the events that have been found.
    pub fn next_event(&mut self) -> Option<DiskEvent> {
        self.events.pop_front()
    }

    /// Waits for an event, until the deadline. Blocks. The poll must be the same each time.
    ///
    /// # Errors
    /// Where the device-mapper cannot be watched, what the calls say.
    pub fn wait(
        &mut self,
        poll: &mut Poll,
        deadline: Deadline,
    ) -> Result<Option<DiskEvent>, DiskError> {
        let mut events = Events::with_capacity(8);
        loop {
            if let ControlFlow::Break(error) = self.advance(poll.registry(), Instant::now()) {
                return Err(error);
            }
            if let Some(event) = self.next_event() {
                return Ok(Some(event));
            }
            if deadline.has_passed() {
                return Ok(None);
            }
            let until = earliest([self.wake_at(), deadline.instant()]);
            wait(poll, &mut events, until).map_err(|error| polled("epoll_wait", &error))?;
            for event in &events {
                self.on_event(poll.registry(), event);
            }
        }
    }

    /// Looks at the control descriptor for as long as the watch lives: closing it ends that.
    fn register(&mut self, registry: &Registry) -> Result<(), DiskError> {
        if let Ok(control) = &self.pool.control {
            let fd = control.as_fd().as_raw_fd();
            let token = self.tokens.token(0);
            registry
                .register(&mut SourceFd(&fd), token, Interest::READABLE)
                .map_err(|error| polled("epoll_ctl", &error))?;
            self.woken = true;
        }
        self.registered = true;
        Ok(())
    }

    /// Asks which devices have had an event; those are looked at now.
    fn note_events(&mut self, now: Instant) -> Result<(), DiskError> {
        let Ok(control) = &self.pool.control else {
            return Ok(());
        };
        // First armed, then asked: what happens in between wakes us again.
        let listed = call(&Faults::NONE, "watch the devices", || {
            control.arm()?;
            control.list()
        })?;
        let events: HashMap<&str, Option<u32>> = listed
            .iter()
            .filter_map(|it| Some((it.uuid.as_deref()?, it.event)))
            .collect();
        for watched in self.disks.values_mut() {
            let Some(uuid) = &watched.uuid else { continue };
            // Not in the list: gone, or the kernel does not list uuids.
            let event = events.get(uuid.as_str()).copied().flatten();
            if event.is_none() || event != watched.event {
                watched.event = event;
                watched.look_at = now;
            }
        }
        Ok(())
    }

    fn look(&mut self, now: Instant) {
        let mut ended = Vec::new();
        for (id, watched) in &mut self.disks {
            if watched.look_at > now {
                continue;
            }
            let uuid = watched.uuid.as_deref();
            let looked = self.pool.status_of(id, &watched.dir, &watched.record, uuid);
            let status = match looked {
                Ok(status) => status,
                // The store itself is gone.
                Err(error) if error.errno() == Some(Errno::NOENT.raw_os_error()) => {
                    ended.push((id.clone(), DiskError::Detached { id: id.clone() }));
                    continue;
                }
                Err(error) => {
                    ended.push((id.clone(), error));
                    continue;
                }
            };
            let from = watched.seen.state();
            if watched.seen.observe(&status).is_some() {
                let id = id.clone();
                self.events.push_back(DiskEvent::State { id, from, status });
            }
            let pause = match status.state {
                StoreState::Pressure => self.options.under_pressure,
                _ => self.options.every,
            };
            // A time too far away for the clock is never.
            watched.look_at = now.checked_add(pause).unwrap_or(now + FAR);
        }
        for (id, error) in ended {
            self.disks.remove(&id);
            self.events.push_back(DiskEvent::Ended { id, error });
        }
    }
}

/// Longer than any watch.
const FAR: Duration = Duration::from_secs(1 << 32);

fn polled(name: &'static str, error: &io::Error) -> DiskError {
    DiskError::Call {
        step: "watch the device-mapper".to_owned(),
        source: CallError::from_io(name, error),
    }
}

impl Machine for DiskWatch {
    type Output = DiskError;

    fn on_event(&mut self, _: &Registry, event: &Event) {
        self.woken |= self.tokens.index(event.token()).is_some();
    }

    fn advance(&mut self, registry: &Registry, now: Instant) -> ControlFlow<DiskError> {
        let noted = if self.registered {
            Ok(())
        } else {
            self.register(registry)
        };
        let noted = noted.and_then(|()| {
            if std::mem::take(&mut self.woken) {
                self.note_events(now)
            } else {
                Ok(())
            }
        });
        if let Err(error) = noted {
            return ControlFlow::Break(error);
        }
        self.look(now);
        ControlFlow::Continue(())
    }

    fn wake_at(&self) -> Option<Instant> {
        self.disks.values().map(|watched| watched.look_at).min()
    }
}
