//! A restore as a state machine.

use std::io::{self, Read};
use std::mem;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry};

use super::api::ApiDone;
use super::error::{Cause, RestoreError, Stage};
use super::kit::Kit;
use super::start::{Start, Started};
use super::{RestoreSpec, Restored, undo};
use crate::deadline::Deadline;
use crate::envd::client::{Acknowledged, Client, ClientOptions, Incarnation, InitCall};
use crate::envd::ready::{self, Prober, Ready};
use crate::plan::{MemoryMode, Unfit};
use crate::resource::ledger::Ledger;
use crate::timeline::{Phase, Timeline, VmmEvent};
use crate::vmm::events::{Event as VmmReport, EventKind, EventParser};
use crate::vmm::launch::Vmm;
use crate::wire::conn::Stream;
use crate::wire::excerpt::excerpt;
use crate::wire::reactor::{Machine, TokenRange, earliest};

/// The tokens of a restore: one for each descriptor of CH, the rest for the prober.
pub(super) const API: usize = 0;
const EVENTS: usize = 1;
const LOG: usize = 2;
const PIDFD: usize = 3;
const OWN_TOKENS: usize = 4;

/// A restore under way: a [`Machine`] whose output is the running VM.
///
/// Dropping it destroys the partial VM.
pub struct Restoring {
    spec: RestoreSpec,
    stage: Stage,
    timeline: Timeline,
    /// The caller's.
    deadline: Deadline,
    tokens: TokenRange,
    registered: bool,
    started: Started,
    /// Gone once it was handed over or ended.
    vmm: Option<Vmm>,
    events: EventParser,
    /// The tap has its reader, so probes can arrive.
    guest_may_hear: bool,
    prober: Option<Prober>,
    /// Probes that did not win. They end after `/init`: each costs the guest a packet.
    losers: Option<Prober>,
    ready: Option<Ready>,
    init: Init,
    ledger: Ledger,
}

/// `/init`, from the moment that the agent is ready.
enum Init {
    /// Not asked for, or not its turn yet.
    Waiting,
    Calling(Box<InitCall>),
    Done(Acknowledged),
}

impl Restoring {
    /// Number of event tokens it needs.
    pub const TOKENS: usize = OWN_TOKENS + Prober::TOKENS;

    /// Checks the snapshot, plans, prepares and starts CH. Blocks for these few milliseconds;
    /// what takes longer is waited for by the machine.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing is left then but what it names.
    ///
    /// # Panics
    /// With fewer than [`Restoring::TOKENS`] tokens: a programming error.
    pub fn begin(
        spec: &RestoreSpec,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Result<Self, RestoreError> {
        Self::begin_with(spec, None, deadline, tokens)
    }

    /// The same on the process of a warm kit, where there is one: how `spec` starts CH, its
    /// namespace and its runtime directory do not count then, the kit's do. Blocks for less
    /// than a millisecond.
    ///
    /// # Errors
    /// [`RestoreError`]; the kit's process is gone then, too.
    ///
    /// # Panics
    /// As [`Restoring::begin`].
    pub fn begin_with(
        spec: &RestoreSpec,
        kit: Option<Kit>,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Result<Self, RestoreError> {
        assert!(tokens.len() >= Self::TOKENS, "too few event tokens");
        let mut start = Start::new(spec);
        let api_tokens = TokenRange::new(tokens.token(API).0, 1);
        match start.run(spec, kit, deadline, api_tokens) {
            Ok((started, vmm)) => Ok(Self {
                spec: spec.clone(),
                stage: Stage::Restore,
                timeline: start.timeline,
                deadline,
                tokens,
                registered: false,
                started,
                vmm: Some(vmm),
                events: EventParser::new(),
                // Without events nobody says when; a probe that is lost costs little.
                guest_may_hear: spec.vmm.without_events,
                prober: None,
                losers: None,
                ready: None,
                init: Init::Waiting,
                ledger: start.ledger,
            }),
            Err(cause) => Err(undo(
                spec.inputs.sandbox_id.clone(),
                start.stage,
                cause,
                None,
                start.ledger,
                start.timeline,
            )),
        }
    }

    /// Gives up: destroys the partial VM, and says so with the cause given.
    #[must_use]
    pub fn abandon(mut self, cause: Cause) -> RestoreError {
        self.fail(cause)
    }

    fn fail(&mut self, cause: Cause) -> RestoreError {
        undo(
            self.spec.inputs.sandbox_id.clone(),
            self.stage,
            cause,
            self.vmm.take(),
            mem::take(&mut self.ledger),
            self.timeline.clone(),
        )
    }

    fn register(&mut self, registry: &Registry) -> io::Result<()> {
        let Some(vmm) = &self.vmm else { return Ok(()) };
        for (fd, index) in [
            (vmm.events.as_fd(), EVENTS),
            (vmm.log.as_fd(), LOG),
            (vmm.process().as_fd(), PIDFD),
        ] {
            let token = self.tokens.token(index);
            registry.register(&mut SourceFd(&fd.as_raw_fd()), token, Interest::READABLE)?;
        }
        self.registered = true;
        Ok(())
    }

    /// Stops watching CH's pipes and pidfd, which the caller keeps.
    fn deregister(&self, registry: &Registry) {
        let Some(vmm) = &self.vmm else { return };
        for fd in [vmm.events.as_fd(), vmm.log.as_fd(), vmm.process().as_fd()] {
            // It was registered by us and is still open, so this cannot fail.
            let _ = registry.deregister(&mut SourceFd(&fd.as_raw_fd()));
        }
    }

    fn run(&mut self, registry: &Registry, now: Instant) -> Result<Option<Restored>, Cause> {
        if !self.registered {
            self.register(registry).map_err(Cause::Poll)?;
        }
        self.read_pipes();
        self.watch_process()?;
        self.advance_api(registry, now)?;
        self.probe(registry, now)?;
        self.say_init(registry, now)?;
        self.deflate_balloon(registry, now)?;
        let init_is_over = self.spec.init.is_none() || matches!(self.init, Init::Done(_));
        let over = self.ready.is_some() && init_is_over;
        if over && self.started.api.is_running() && self.started.api.is_quiet() {
            self.deregister(registry);
            return Ok(self.finish());
        }
        Ok(None)
    }

    /// Each call that ends may begin the next one, which must be sent before anybody waits.
    fn advance_api(&mut self, registry: &Registry, now: Instant) -> Result<(), Cause> {
        while let ControlFlow::Break(done) =
            self.started.api.advance(registry, now, &mut self.timeline)
        {
            self.api_done(done)?;
        }
        Ok(())
    }

    /// Once the agent is ready the balloon is told to deflate, beside `/init`. A failure is a
    /// warning.
    fn deflate_balloon(&mut self, registry: &Registry, now: Instant) -> Result<(), Cause> {
        let api = &mut self.started.api;
        let its_turn = self.ready.is_some() && api.is_running() && api.is_quiet();
        if !its_turn || !self.started.plan.has_balloon || api.balloon_was_tried() {
            return Ok(());
        }
        let deadline = self.deadline.within(self.spec.budgets.balloon);
        if let Err(error) = api.deflate_balloon(deadline) {
            self.api_done(ApiDone::Balloon(Err(error)))?;
        }
        self.advance_api(registry, now)
    }

    fn finish(&mut self) -> Option<Restored> {
        let (vmm, ready) = (self.vmm.take()?, self.ready.take()?);
        // CH has opened the file by now; that it may be removed harms nobody.
        self.started.reading = None;
        Some(Restored {
            sandbox_id: self.spec.inputs.sandbox_id.clone(),
            vmm,
            version: self.started.api.version(),
            build: excerpt(self.started.api.build()),
            memory_mode: self.memory_mode_in_truth(),
            memory: self.started.plan.memory,
            agent: ready.agent,
            sockets: self.started.sockets.clone(),
            init: match mem::replace(&mut self.init, Init::Waiting) {
                Init::Done(acknowledged) => Some(acknowledged),
                _ => None,
            },
            vm_dir: self.started.vm_dir.clone(),
            timeline: self.timeline.clone(),
            ledger: mem::take(&mut self.ledger),
        })
    }

    /// A CH that does not know `memory_restore_mode` has copied, whatever it was told.
    fn memory_mode_in_truth(&mut self) -> MemoryMode {
        let asked = self.started.plan.memory_mode;
        if asked == MemoryMode::OnDemand && !self.started.api.features().restore_on_demand {
            let version = self.started.api.version();
            self.timeline.note(format!(
                "Cloud Hypervisor {version} knows no on-demand restore: memory was copied"
            ));
            return MemoryMode::Copy;
        }
        asked
    }

    fn api_done(&mut self, done: ApiDone) -> Result<(), Cause> {
        match done {
            ApiDone::Failed(error) => {
                // A connection that breaks is how a death shows first: the pidfd may follow
                // a moment later, and says more.
                if error.is_disconnected() {
                    self.watch_process_briefly()?;
                }
                Err(Cause::Api(error))
            }
            ApiDone::WritesPrivateFiles(version) => Err(Cause::MemoryMode {
                mode: self.started.plan.memory_mode,
                reason: Unfit::WritesPrivateFiles { version },
            }),
            ApiDone::Restored => {
                self.started.passing = None;
                self.guest_may_hear = true;
                self.stage = Stage::Resume;
                Ok(())
            }
            ApiDone::Running => {
                let (id, version) = (&self.spec.inputs.sandbox_id, self.started.api.version());
                log::info!("Sandbox {id}: runs again on Cloud Hypervisor {version}");
                self.stage = Stage::Ready;
                Ok(())
            }
            ApiDone::Balloon(Ok(())) => {
                self.timeline.mark(Phase::BalloonDone);
                Ok(())
            }
            ApiDone::Balloon(Err(error)) => {
                let id = &self.spec.inputs.sandbox_id;
                log::warn!("Sandbox {id}: the balloon stays as it is: {error}");
                self.timeline
                    .note(format!("The balloon stays as it is: {error}"));
                Ok(())
            }
        }
    }

    fn read_pipes(&mut self) {
        let Some(vmm) = &mut self.vmm else { return };
        vmm.drain_log();
        let mut buffer = [0; 4096];
        // Events are hints: a flood of them is cut off, and nothing waits for one.
        for _ in 0..64 {
            match vmm.events.read(&mut buffer) {
                Ok(count) if count > 0 => {
                    let (timeline, hear) = (&mut self.timeline, &mut self.guest_may_hear);
                    self.events.feed(&buffer[..count], |record| {
                        if let Ok(event) = record {
                            note_event(event.kind(), timeline, hear);
                            keep_event(&event, timeline);
                        }
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
    }

    fn watch_process(&mut self) -> Result<(), Cause> {
        let Some(vmm) = &mut self.vmm else {
            return Ok(());
        };
        match vmm.process().has_ended() {
            Ok(false) => Ok(()),
            Ok(true) => Err(Cause::Ended { exit: vmm.reap() }),
            Err(error) => Err(Cause::Poll(error.into())),
        }
    }

    /// Gives a dying process a moment to be dead.
    fn watch_process_briefly(&mut self) -> Result<(), Cause> {
        if let Some(vmm) = &self.vmm {
            let _ = vmm.process().wait_ended(Some(Duration::from_millis(50)));
        }
        self.watch_process()
    }

    fn probe(&mut self, registry: &Registry, now: Instant) -> Result<(), Cause> {
        if self.ready.is_some() || !self.guest_may_hear {
            return Ok(());
        }
        let (_, tokens) = self.tokens.split(OWN_TOKENS);
        let prober = match &mut self.prober {
            Some(prober) => prober,
            none => {
                let ram = self.started.plan.memory;
                let budget = self
                    .spec
                    .budgets
                    .ready
                    .unwrap_or_else(|| ready::budget(ram));
                let deadline = self.deadline.within(budget);
                none.insert(new_prober(&self.spec, &self.started, deadline, tokens)?)
            }
        };
        let outcome = prober.advance(registry, now);
        let probes = *prober.probes();
        if let Some(at) = probes.first_syn_answered {
            self.timeline.mark_at(Phase::FirstSynAnswered, at);
        }
        if let Some(at) = probes.first_byte {
            self.timeline.mark_at(Phase::FirstByte, at);
        }
        match outcome {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(Err(error)) => {
                self.stage = Stage::Ready;
                Err(Cause::Ready(error))
            }
            ControlFlow::Break(Ok(mut ready)) => {
                self.timeline.mark_at(Phase::Ready, ready.at);
                let (id, probes) = (&self.spec.inputs.sandbox_id, ready.probes);
                log::info!("Sandbox {id}: envd is ready ({probes})");
                self.losers = self.prober.take();
                let connection = ready.connection.take();
                self.ready = Some(ready);
                self.begin_init(connection)
            }
        }
    }

    /// `/init` goes over the connection that won; without one asked for, that is closed here:
    /// it must not live until the next snapshot.
    fn begin_init(&mut self, connection: Option<Stream>) -> Result<(), Cause> {
        let Some(init) = &self.spec.init else {
            self.losers = None;
            return Ok(());
        };
        let incarnation = Incarnation {
            sandbox: self.spec.inputs.sandbox_id.clone(),
            lifecycle: init.lifecycle,
        };
        let options = ClientOptions {
            sockets: self.started.sockets.clone(),
            ..ClientOptions::default()
        };
        let client = Client::new(self.spec.guest, incarnation, options);
        let (_, tokens) = self.tokens.split(OWN_TOKENS);
        let call = client
            .begin_init(init, connection, self.deadline, tokens)
            .map_err(Cause::Init)?;
        self.init = Init::Calling(Box::new(call));
        Ok(())
    }

    fn say_init(&mut self, registry: &Registry, now: Instant) -> Result<(), Cause> {
        let Init::Calling(call) = &mut self.init else {
            return Ok(());
        };
        match call.advance(registry, now) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(Ok(acknowledged)) => {
                self.timeline.mark_at(Phase::InitDone, acknowledged.at);
                self.losers = None;
                self.init = Init::Done(acknowledged);
                Ok(())
            }
            ControlFlow::Break(Err(error)) => {
                self.stage = Stage::Init;
                Err(Cause::Init(error))
            }
        }
    }
}

fn new_prober(
    spec: &RestoreSpec,
    started: &Started,
    deadline: Deadline,
    tokens: TokenRange,
) -> Result<Prober, Cause> {
    let sockets = started.sockets.clone();
    let hedge = spec.hedge.clone();
    let keep = spec.init.is_some();
    Prober::new(spec.guest, sockets, hedge, keep, deadline, tokens).map_err(Cause::Ready)
}

/// What an event of CH's monitor means for the timeline, and for when to begin probing: a
/// SYN that is sent before the tap has its reader is lost.
fn note_event(kind: EventKind, timeline: &mut Timeline, guest_may_hear: &mut bool) {
    match kind {
        EventKind::DeviceActivated => *guest_may_hear = true,
        EventKind::Restoring => {
            timeline.mark(Phase::Restoring);
            *guest_may_hear = true;
        }
        EventKind::Restored => timeline.mark(Phase::Restored),
        EventKind::Resumed => timeline.mark(Phase::Resumed),
        _ => {}
    }
}

/// For a trace.
fn keep_event(event: &VmmReport, timeline: &mut Timeline) {
    let mut name = format!("{}/{}", excerpt(&event.source), excerpt(&event.event));
    if let Some(id) = event.id() {
        name = format!("{name} {}", excerpt(id));
    }
    timeline.vmm_event(VmmEvent {
        name,
        timestamp: event.timestamp,
        arrived: Instant::now(),
    });
}

impl Machine for Restoring {
    type Output = Result<Restored, RestoreError>;

    fn on_event(&mut self, registry: &Registry, event: &Event) {
        match self.tokens.index(event.token()) {
            Some(API) => self.started.api.on_event(registry, event),
            // Pipes and pidfd are looked at in every advance.
            Some(EVENTS | LOG | PIDFD) | None => {}
            Some(_) => {
                // `/init` takes the prober's tokens over.
                if let Some(prober) = &mut self.prober {
                    prober.on_event(registry, event);
                } else if let Init::Calling(call) = &mut self.init {
                    call.on_event(registry, event);
                }
            }
        }
    }

    fn advance(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Self::Output> {
        match self.run(registry, now) {
            Ok(None) => ControlFlow::Continue(()),
            Ok(Some(restored)) => ControlFlow::Break(Ok(restored)),
            Err(cause) => ControlFlow::Break(Err(self.fail(cause))),
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let prober = self.prober.as_ref().and_then(Machine::wake_at);
        let init = match &self.init {
            Init::Calling(call) => call.wake_at(),
            _ => None,
        };
        earliest([self.started.api.wake_at(), prober, init])
    }
}
