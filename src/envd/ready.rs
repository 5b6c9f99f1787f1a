//! Waiting for the agent's first answer, with hedged probes.
//!
//! A probe is a connection of its own that sends `GET /health`. Many are begun, the first to
//! *answer* wins: a connection that stands proves that the guest's kernel runs, not that the
//! agent does. Whatever a single connection does, be refused, fall silent, answer nonsense or
//! without end, costs that one probe. How eagerly to probe is [`Hedge`]'s matter.
//!
//! Only one asks at a time, for the agent works for every question: a connection that comes to
//! stand while another one waits for its answer keeps its own question back, and puts it when
//! the other has failed or has waited for as long as a further probe would.
//!
//! A probe that is given up is closed. Towards the guest that is a SYN whose answer is met
//! with RST, or a connection that ends before or after its request: nothing stays behind. Those
//! that lose are closed with the prober, by RST: that is one packet, which needs no answer.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mio::Registry;
use mio::event::Event;
use rustix::io::Errno;
use rustix::net::sockopt;

use super::dialect::{Agent, Family};
use super::hedge::{Hedge, Schedule, give_up};
use super::reply;
use super::socket::Sockets;
use super::text::GuestText;
use super::watch::{Interrupt, Interruptible, drive_while_alive};
use crate::deadline::Deadline;
use crate::units::Bytes;
use crate::wire::conn::{ConnError, Exchange, Finished, Peer, Stream};
use crate::wire::http::{EncodedRequest, Limits, Method, Request, RequestError};
use crate::wire::reactor::{Machine, TokenRange, earliest};

/// How long to wait for a guest with `ram` at most: 120 s, or 8 s per GiB where that is more.
#[must_use]
pub fn budget(ram: Bytes) -> Duration {
    let per_gib = Duration::from_secs(8);
    let gib = u32::try_from(ram.gib_rounded_up()).unwrap_or(u32::MAX);
    per_gib.saturating_mul(gib).max(Duration::from_secs(120))
}

/// The agent's answer to `/health` is a version; more than this is not read of it.
const PEER: Peer = Peer {
    limits: Limits {
        body_bytes: 4 << 10,
        ..Limits::GUEST
    },
    ..Peer::GUEST
};

/// Sockets that could not be had one after the other, none in flight, before giving up.
const SOCKET_FAILURES: u32 = 20;

/// What probing came to so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probes {
    /// When the first one was sent.
    pub begun: Instant,
    /// Number sent.
    pub sent: u64,
    /// Of these, refused by the guest's kernel: nobody listens yet.
    pub refused: u64,
    /// Of these, answered with a status that is not ready.
    pub unready: u64,
    /// Of these, ended otherwise: reset, closed early, not HTTP, too slow.
    pub broken: u64,
    /// Of these, given up for younger ones, unanswered.
    pub given_up: u64,
    /// The first connection stood.
    pub first_syn_answered: Option<Instant>,
    /// The first byte of any answer came.
    pub first_byte: Option<Instant>,
}

impl fmt::Display for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            sent,
            refused,
            unready,
            broken,
            ..
        } = self;
        let connected = match self.first_syn_answered {
            Some(_) => "some connected",
            None => "none connected",
        };
        write!(
            f,
            "{sent} probes, {connected}, {refused} refused, {unready} not ready, {broken} broken"
        )
    }
}

/// The agent has answered.
#[derive(Debug)]
pub struct Ready {
    /// Who answered.
    pub agent: Agent,
    /// When its answer was complete.
    pub at: Instant,
    /// What it took.
    pub probes: Probes,
    /// The connection that won, where it may carry one more request. Use it for `/init` at
    /// once or close it: it must not live until the next snapshot.
    pub connection: Option<Stream>,
}

/// How one probe ended that did not win.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No answer, or none that can be read.
    #[error("Probe failed")]
    Conn(#[source] ConnError),
    /// An answer other than 200 or 204.
    #[error("The guest answered with HTTP status {status}: {text}")]
    Status {
        /// The status.
        status: u16,
        /// What it said.
        text: GuestText,
    },
    /// Connected, but silent for longer than the guest had taken for everything before.
    #[error("The guest took the connection and did not answer for {0:?}")]
    Silent(Duration),
    /// No socket to probe with.
    #[error("Cannot make a socket")]
    Socket(#[source] io::Error),
}

/// Why the agent was not found ready.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// The deadline passed.
    #[error("envd did not become ready ({probes})")]
    Timeout {
        /// What was tried.
        probes: Box<Probes>,
        /// How the last probe ended that did end.
        #[source]
        last: Option<ProbeError>,
    },
    /// The wait was ended from outside.
    #[error("The wait for envd was ended ({probes})")]
    Interrupted {
        /// What was tried.
        probes: Box<Probes>,
        /// By what.
        #[source]
        why: Interrupt,
    },
    /// No sockets to probe with.
    #[error("Cannot make sockets to probe envd with")]
    Sockets(#[source] io::Error),
    /// The caller's token range is empty, so nothing can be watched.
    #[error("No event tokens to probe with")]
    NoTokens,
    /// The request cannot be encoded.
    #[error("The request for /health is refused")]
    Request(#[source] RequestError),
    /// The event loop failed.
    #[error("Cannot wait for envd")]
    Poll(#[source] io::Error),
}

struct Probe {
    number: u64,
    exchange: Exchange,
    /// When the connection was seen to stand, and until when it may wait for its answer.
    connected: Option<(Instant, Instant)>,
}

/// Probes an agent until it answers: a [`Machine`] with one token per probe in flight.
pub struct Prober {
    target: SocketAddr,
    sockets: Sockets,
    request: EncodedRequest,
    deadline: Deadline,
    tokens: TokenRange,
    slots: Vec<Option<Probe>>,
    schedule: Schedule,
    /// All slots hold connected probes: no new one before one of them ends.
    full: bool,
    probes: Probes,
    version: Option<GuestText>,
    last: Option<ProbeError>,
    socket_failures: u32,
    interrupt: Option<Interrupt>,
}

impl Prober {
    /// Number of event tokens that the default [`Hedge`] makes use of. With fewer, fewer
    /// probes are in flight.
    pub const TOKENS: usize = 12;

    /// A prober of the agent at `target`. The first probe goes out with the first
    /// [`advance`](Machine::advance), so make it when the guest may run.
    ///
    /// With `keep` the winning probe asks for keep-alive and hands its connection over: one
    /// handshake less before `/init`, about half of its time on loopback (benches/ready.rs).
    ///
    /// # Errors
    /// [`ReadyError::NoTokens`], [`ReadyError::Request`].
    pub fn new(
        target: SocketAddr,
        sockets: Sockets,
        hedge: Hedge,
        keep: bool,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Result<Self, ReadyError> {
        if tokens.is_empty() {
            return Err(ReadyError::NoTokens);
        }
        let now = Instant::now();
        let mut request = Request::new(Method::Get, "/health");
        request.host = target.to_string();
        request.close = !keep;
        let in_flight = hedge.in_flight.clamp(1, tokens.len());
        Ok(Self {
            target,
            sockets,
            request: request.encode().map_err(ReadyError::Request)?,
            deadline,
            slots: (0..in_flight).map(|_| None).collect(),
            tokens,
            schedule: Schedule::new(hedge, now),
            full: false,
            probes: Probes {
                begun: now,
                sent: 0,
                refused: 0,
                unready: 0,
                broken: 0,
                given_up: 0,
                first_syn_answered: None,
                first_byte: None,
            },
            version: None,
            last: None,
            socket_failures: 0,
            interrupt: None,
        })
    }

    /// What probing came to so far.
    #[must_use]
    pub const fn probes(&self) -> &Probes {
        &self.probes
    }

    fn run(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Result<Ready, ReadyError>> {
        if let Some(why) = self.interrupt {
            let probes = Box::new(self.probes);
            return ControlFlow::Break(Err(ReadyError::Interrupted { probes, why }));
        }
        self.tend(registry, now).map_break(Ok)?;
        if self.deadline.has_passed() {
            let (probes, last) = (Box::new(self.probes), self.last.take());
            return ControlFlow::Break(Err(ReadyError::Timeout { probes, last }));
        }
        self.send(registry, now)
    }

    /// Gives every probe in flight the time it asks for. `Break`: one of them won.
    fn tend(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Ready> {
        for index in 0..self.slots.len() {
            if let Some(finished) = self.tend_one(index, registry, now) {
                self.winner(finished)?;
            }
        }
        ControlFlow::Continue(())
    }

    /// Advances one probe; its answer, if that is complete now.
    fn tend_one(&mut self, index: usize, registry: &Registry, now: Instant) -> Option<Finished> {
        let asks = |slot: &Option<Probe>| slot.as_ref().is_some_and(|it| it.connected.is_some());
        let another_asks = self.slots.iter().any(asks);
        let probe = self.slots[index].as_mut()?;
        if probe.exchange.times().connected.is_none() {
            probe.exchange.hold(another_asks);
        }
        let result = probe.exchange.advance(registry, now);
        let times = probe.exchange.times();
        if let (Some(at), None, false) =
            (times.connected, probe.connected, probe.exchange.is_held())
        {
            // One that was held back begins to wait now.
            let at = if another_asks { now } else { at };
            let waited = at.saturating_duration_since(self.probes.begun);
            let limit = self.schedule.hedge().answer_limit(waited);
            probe.connected = Some((at, at + limit));
            self.schedule.connected(at);
        }
        let late = probe.connected.filter(|(_, until)| now >= *until);
        note_first(&mut self.probes.first_syn_answered, times.connected);
        note_first(&mut self.probes.first_byte, times.first_byte);
        match result {
            ControlFlow::Break(Ok(finished)) => {
                self.free(index);
                return Some(finished);
            }
            ControlFlow::Break(Err(error)) => {
                self.free(index);
                self.failed(error, now);
            }
            ControlFlow::Continue(()) => {
                if let Some((since, until)) = late {
                    self.free(index);
                    self.probes.broken += 1;
                    self.last = Some(ProbeError::Silent(until - since));
                    self.schedule.turned_down(now);
                }
            }
        }
        None
    }

    fn free(&mut self, index: usize) {
        self.slots[index] = None;
        self.full = false;
    }

    fn failed(&mut self, error: ConnError, now: Instant) {
        if error.is_refused() {
            self.probes.refused += 1;
            self.schedule.turned_down(now);
        } else {
            self.probes.broken += 1;
            // Without a route there is nothing to hurry for.
            if self.probes.first_syn_answered.is_some() {
                self.schedule.turned_down(now);
            }
        }
        self.last = Some(ProbeError::Conn(error));
    }

    fn winner(&mut self, finished: Finished) -> ControlFlow<Ready> {
        let Finished {
            response,
            stream,
            times,
        } = finished;
        let at = times.complete.unwrap_or_else(Instant::now);
        if let Some(version) = response.headers.get("X-Envd-Version") {
            self.version = Some(GuestText::new(version));
        }
        let Some(family) = Family::of_health(response.status) else {
            self.probes.unready += 1;
            self.last = Some(ProbeError::Status {
                status: response.status,
                text: GuestText::new(&response.body),
            });
            self.schedule.turned_down(at);
            return ControlFlow::Continue(());
        };
        let version = self.version.take();
        let version = version.or_else(|| reply::health_version(&response.body));
        ControlFlow::Break(Ready {
            agent: Agent { family, version },
            at,
            probes: self.probes,
            connection: stream,
        })
    }

    /// Sends one probe, if one is due and there is room.
    fn send(
        &mut self,
        registry: &Registry,
        now: Instant,
    ) -> ControlFlow<Result<Ready, ReadyError>> {
        if !self.schedule.is_due(now) {
            return ControlFlow::Continue(());
        }
        if let Some(index) = self.held() {
            return self.let_go(index, registry, now);
        }
        if self.full {
            return ControlFlow::Continue(());
        }
        let Some(index) = self.room() else {
            self.full = true;
            return ControlFlow::Continue(());
        };
        let number = self.schedule.sent(now);
        self.probes.sent = number;
        let socket = match self.connect() {
            Ok(socket) => socket,
            Err(error) => return self.no_socket(error),
        };
        self.socket_failures = 0;
        let request = self.request.clone();
        let (_, rest) = self.tokens.split(index);
        let (token, _) = rest.split(1);
        let exchange = Exchange::over_socket(socket, request, PEER, self.deadline, token);
        self.slots[index] = Some(Probe {
            number,
            exchange,
            connected: None,
        });
        // Registers the socket; over loopback it may be refused already.
        match self.tend_one(index, registry, now) {
            Some(finished) => self.winner(finished).map_break(Ok),
            None => ControlFlow::Continue(()),
        }
    }

    /// The oldest connection that stands and has not asked.
    fn held(&self) -> Option<usize> {
        let slots = self.slots.iter().enumerate();
        let held = slots.filter_map(|(index, slot)| {
            let probe = slot.as_ref().filter(|it| it.exchange.is_held())?;
            Some((probe.number, index))
        });
        held.min().map(|(_, index)| index)
    }

    /// Lets a connection ask that stands already.
    fn let_go(
        &mut self,
        index: usize,
        registry: &Registry,
        now: Instant,
    ) -> ControlFlow<Result<Ready, ReadyError>> {
        if let Some(probe) = &mut self.slots[index] {
            probe.exchange.hold(false);
        }
        match self.tend_one(index, registry, now) {
            Some(finished) => self.winner(finished).map_break(Ok),
            None => ControlFlow::Continue(()),
        }
    }

    /// A free slot, where need be one freed of a probe that nobody has answered yet.
    fn room(&mut self) -> Option<usize> {
        if let Some(index) = self.slots.iter().position(Option::is_none) {
            return Some(index);
        }
        let unanswered = self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let probe = slot.as_ref()?;
            let silent = probe.exchange.times().connected.is_none();
            silent.then_some((index, probe.number))
        });
        let index = give_up(unanswered)?;
        self.probes.given_up += 1;
        self.slots[index] = None;
        Some(index)
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        let socket = self.sockets.take()?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        // Acknowledgements travel with the question, and with `/init` behind the answer: two
        // packets fewer for a guest that has just woken up. Where they cannot, the kernel sends
        // them itself after some 40 ms.
        sockopt::set_tcp_quickack(&socket, false)?;
        match rustix::net::connect(&socket, &self.target) {
            // What the route says now it may not say later: a probe that failed. The
            // exchange asks the socket and reports it.
            Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Those that have not won end when this is dropped, which is a matter for the owner: the
    /// guest has better to do first than to take part in it.
    fn lose(&mut self) {
        for probe in self.slots.iter().flatten() {
            if let Some(stream) = probe.exchange.stream() {
                // Where that fails, it ends with a FIN.
                let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
            }
        }
    }

    fn no_socket(&mut self, error: io::Error) -> ControlFlow<Result<Ready, ReadyError>> {
        let unreachable = matches!(
            error.kind(),
            io::ErrorKind::NetworkUnreachable
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::ConnectionRefused
        );
        if unreachable {
            self.probes.broken += 1;
            self.last = Some(ProbeError::Socket(error));
            return ControlFlow::Continue(());
        }
        self.socket_failures += 1;
        let in_flight = self.slots.iter().any(Option::is_some);
        if self.socket_failures >= SOCKET_FAILURES && !in_flight {
            return ControlFlow::Break(Err(ReadyError::Sockets(error)));
        }
        self.last = Some(ProbeError::Socket(error));
        ControlFlow::Continue(())
    }
}

/// The earlier of two instants that may not have come.
fn note_first(first: &mut Option<Instant>, at: Option<Instant>) {
    *first = earliest([*first, at]);
}

impl Machine for Prober {
    type Output = Result<Ready, ReadyError>;

    fn on_event(&mut self, registry: &Registry, event: &Event) {
        let index = self.tokens.index(event.token());
        if let Some(Some(probe)) = index.and_then(|index| self.slots.get_mut(index)) {
            probe.exchange.on_event(registry, event);
        }
    }

    fn advance(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Self::Output> {
        let result = self.run(registry, now);
        match &result {
            ControlFlow::Break(Ok(_)) => self.lose(),
            ControlFlow::Break(Err(_)) => self.slots.clear(),
            ControlFlow::Continue(()) => {}
        }
        result
    }

    fn wake_at(&self) -> Option<Instant> {
        let may_go_on = !self.full || self.held().is_some();
        let next = may_go_on.then(|| self.schedule.next_at());
        let probes = self.slots.iter().flatten();
        let probes = probes.flat_map(|probe| {
            let until = probe.connected.map(|(_, until)| until);
            [until, probe.exchange.wake_at()]
        });
        earliest([self.deadline.instant(), next].into_iter().chain(probes))
    }
}

impl Interruptible for Prober {
    fn interrupt(&mut self, why: Interrupt) {
        self.interrupt.get_or_insert(why);
    }
}

impl fmt::Debug for Prober {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prober")
            .field("target", &self.target)
            .field("probes", &self.probes)
            .finish_non_exhaustive()
    }
}

/// Probes an agent until it answers. Blocks, until the deadline at the latest, and no longer
/// than the process behind the pidfd `vmm` lives.
///
/// # Errors
/// [`ReadyError`].
pub fn await_ready(
    target: SocketAddr,
    sockets: Sockets,
    hedge: Hedge,
    deadline: Deadline,
    vmm: Option<BorrowedFd<'_>>,
) -> Result<Ready, ReadyError> {
    let tokens = TokenRange::new(0, hedge.in_flight.max(1));
    let mut prober = Prober::new(target, sockets, hedge, false, deadline, tokens)?;
    drive_while_alive(&mut prober, vmm).map_err(ReadyError::Poll)?
}
