//! One request to the agent as a state machine: attempts, their limits, and which failures
//! are worth another one.

use std::fmt;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry};
use rustix::io::Errno;
use rustix::net::{RecvFlags, sockopt};

use super::client::{AttemptError, ClientError};
use super::init::{Init, RisingClock};
use super::socket::Sockets;
use super::text::GuestText;
use super::watch::{Interrupt, Interruptible};
use crate::deadline::Deadline;
use crate::wire::conn::{ConnError, Exchange, Finished, Peer, Phase, Stream};
use crate::wire::http::{EncodedRequest, Request, Response};
use crate::wire::reactor::{Machine, TokenRange, earliest};

/// How patient a kind of request is. All limits end at the caller's deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For the first connection to stand; doubled by each attempt. A lost SYN is repeated by
    /// the kernel only after a second.
    pub connect: Duration,
    /// For one attempt.
    pub attempt: Duration,
    /// For all attempts.
    pub total: Duration,
    /// Whether there is more than one attempt.
    pub retry: bool,
}

impl Patience {
    /// `attempt` and `total` in seconds, with retries.
    pub(super) const fn retrying(attempt_s: u64, total_s: u64) -> Self {
        Self {
            connect: Duration::from_millis(250),
            attempt: Duration::from_secs(attempt_s),
            total: Duration::from_secs(total_s),
            retry: true,
        }
    }

    /// A single attempt of `seconds`.
    pub(super) const fn once(seconds: u64) -> Self {
        let limit = Duration::from_secs(seconds);
        Self {
            connect: limit,
            attempt: limit,
            total: limit,
            retry: false,
        }
    }
}

/// The first pause between two attempts; doubled after each.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// The longest pause between two attempts.
const LAST_PAUSE: Duration = Duration::from_millis(500);
/// How long to wait for the guest's FIN behind its answer.
const DRAIN: Duration = Duration::from_millis(250);

/// What is sent.
pub(super) enum Message {
    /// The same bytes on every attempt.
    Fixed(EncodedRequest),
    /// `/init`: the same lifecycle, a fresh timestamp on every attempt. The rest of the
    /// request (headers, no body) is in the template.
    Init {
        init: Box<Init>,
        template: Request,
        clock: Arc<Mutex<RisingClock>>,
    },
}

impl Message {
    fn encode(&self) -> Result<EncodedRequest, ClientError> {
        match self {
            Self::Fixed(request) => Ok(request.clone()),
            Self::Init {
                init,
                template,
                clock,
            } => {
                let mut clock = clock.lock().unwrap_or_else(PoisonError::into_inner);
                let body = init.body(clock.now()).map_err(ClientError::Init)?;
                let request = template.clone().json(body);
                request.encode().map_err(ClientError::Request)
            }
        }
    }
}

/// A final answer of the agent, of whatever status.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) response: Response,
    pub(super) at: Instant,
    pub(super) attempts: u32,
}

/// One request, repeated until it is answered: a [`Machine`] with one token.
pub(super) struct Call {
    target: SocketAddr,
    sockets: Sockets,
    message: Message,
    patience: Patience,
    deadline: Deadline,
    tokens: TokenRange,
    /// A connection from before, for the first attempt.
    kept: Option<Stream>,
    /// Whether to wait for the guest's FIN. Once that has come, nothing of this connection
    /// can be captured by a snapshot but a TIME_WAIT.
    drain: bool,
    state: State,
    attempts: u32,
    pause: Duration,
    last: Option<AttemptError>,
    interrupt: Option<Interrupt>,
}

enum State {
    Pause {
        until: Instant,
    },
    Trying(Box<Attempt>),
    Draining {
        answered: Box<Answered>,
        twin: OwnedFd,
        until: Instant,
    },
    Done,
}

struct Attempt {
    exchange: Exchange,
    /// The same socket. It outlives the exchange to see the guest's FIN.
    twin: Option<OwnedFd>,
    connect_by: Option<Instant>,
}

enum Flow {
    Again(State),
    Wait(State),
    End(Result<Box<Answered>, ClientError>),
}

impl Call {
    pub(super) fn new(
        target: SocketAddr,
        sockets: Sockets,
        message: Message,
        patience: Patience,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Self {
        Self {
            target,
            sockets,
            message,
            patience,
            deadline: deadline.within(patience.total),
            tokens,
            kept: None,
            drain: true,
            state: State::Pause {
                until: Instant::now(),
            },
            attempts: 0,
            pause: FIRST_PAUSE,
            last: None,
            interrupt: None,
        }
    }

    /// The same, with the first attempt on a connection from before, and without waiting for
    /// the guest's FIN behind the answer.
    pub(super) fn hurried(mut self, kept: Option<Stream>) -> Self {
        self.kept = kept;
        self.drain = false;
        self
    }

    fn step(&mut self, state: State, registry: &Registry, now: Instant) -> Flow {
        match state {
            State::Pause { .. } if self.deadline.has_passed() => self.exhausted(),
            State::Pause { until } if now < until => Flow::Wait(State::Pause { until }),
            State::Pause { .. } => self.begin(now),
            State::Trying(attempt) => self.attempt(attempt, registry, now),
            State::Draining {
                answered,
                twin,
                until,
            } => {
                if now >= until || has_ended(&twin) {
                    return Flow::End(Ok(answered));
                }
                Flow::Wait(State::Draining {
                    answered,
                    twin,
                    until,
                })
            }
            State::Done => self.exhausted(),
        }
    }

    fn begin(&mut self, now: Instant) -> Flow {
        let request = match self.message.encode() {
            Ok(request) => request,
            Err(error) => return Flow::End(Err(error)),
        };
        let deadline = self.deadline.within(self.patience.attempt);
        let token = self.tokens.split(1).0;
        let doublings = 1_u32.checked_shl(self.attempts).unwrap_or(u32::MAX);
        let connect_by = now.checked_add(self.patience.connect.saturating_mul(doublings));
        self.attempts = self.attempts.saturating_add(1);
        if let Some(stream) = self.kept.take() {
            return Flow::Again(State::Trying(Box::new(Attempt {
                exchange: Exchange::over_stream(stream, request, Peer::GUEST, deadline, token),
                twin: None,
                connect_by: None,
            })));
        }
        let socket = match self.sockets.take() {
            Ok(socket) => socket,
            Err(error) => return Flow::End(Err(ClientError::Socket(error))),
        };
        if let Err(errno) = connect(&socket, &self.target) {
            let error = ConnError::NotConnected(errno.into());
            return self.failed(AttemptError::Conn(error), now);
        }
        // Without a copy the FIN is not waited for, and that is all.
        let twin = self.drain.then(|| socket.try_clone().ok()).flatten();
        Flow::Again(State::Trying(Box::new(Attempt {
            exchange: Exchange::over_socket(socket, request, Peer::GUEST, deadline, token),
            twin,
            connect_by,
        })))
    }

    fn attempt(&mut self, mut attempt: Box<Attempt>, registry: &Registry, now: Instant) -> Flow {
        match attempt.exchange.advance(registry, now) {
            ControlFlow::Break(Ok(finished)) => self.answered(finished, attempt.twin, registry),
            ControlFlow::Break(Err(error)) => self.failed(AttemptError::Conn(error), now),
            ControlFlow::Continue(()) => {
                let phase = attempt.exchange.phase();
                let late = attempt.connect_by.is_some_and(|by| now >= by);
                if phase == Phase::Connecting && late {
                    let error = ConnError::Timeout { phase };
                    return self.failed(AttemptError::Conn(error), now);
                }
                Flow::Wait(State::Trying(attempt))
            }
        }
    }

    fn answered(&mut self, finished: Finished, twin: Option<OwnedFd>, registry: &Registry) -> Flow {
        let Finished {
            response,
            stream,
            times,
        } = finished;
        let at = times.complete.unwrap_or_else(Instant::now);
        if self.patience.retry && matches!(response.status, 502..=504) {
            let error = AttemptError::Unavailable {
                status: response.status,
                text: GuestText::new(&response.body),
            };
            return self.failed(error, at);
        }
        let answered = Box::new(Answered {
            response,
            at,
            attempts: self.attempts,
        });
        // A guest that keeps the connection though it was told not to sends no FIN.
        let Some(twin) = twin.filter(|_| stream.is_none()) else {
            return Flow::End(Ok(answered));
        };
        let token = self.tokens.token(0);
        let registered =
            registry.register(&mut SourceFd(&twin.as_raw_fd()), token, Interest::READABLE);
        if registered.is_err() {
            return Flow::End(Ok(answered));
        }
        let limit = Deadline::at(at + DRAIN).earlier(self.deadline);
        Flow::Again(State::Draining {
            answered,
            twin,
            until: limit.instant().unwrap_or(at),
        })
    }

    fn failed(&mut self, error: AttemptError, now: Instant) -> Flow {
        if let AttemptError::Conn(error @ ConnError::Protocol(_)) = error {
            return Flow::End(Err(ClientError::Garbled(error)));
        }
        // A kept connection that has ended in the meantime says nothing about the next one.
        let spent = matches!(error, AttemptError::Conn(ConnError::Spent));
        self.last = Some(error);
        if !self.patience.retry && !spent {
            return self.exhausted();
        }
        let pause = if spent { Duration::ZERO } else { self.pause };
        let until = now + pause;
        if self.deadline.instant().is_some_and(|at| until >= at) {
            return self.exhausted();
        }
        self.pause = (self.pause * 2).min(LAST_PAUSE);
        Flow::Again(State::Pause { until })
    }

    fn exhausted(&mut self) -> Flow {
        Flow::End(Err(ClientError::NoAnswer {
            attempts: self.attempts,
            last: self.last.take(),
        }))
    }
}

fn connect(socket: &OwnedFd, target: &SocketAddr) -> Result<(), Errno> {
    sockopt::set_tcp_nodelay(socket, true)?;
    match rustix::net::connect(socket, target) {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Whether the guest has closed its end, or sends so much behind its answer that it does not
/// matter any more.
fn has_ended(socket: &OwnedFd) -> bool {
    let mut sink = [0_u8; 1024];
    for _ in 0..16 {
        match rustix::net::recv(socket.as_fd(), &mut sink, RecvFlags::DONTWAIT) {
            Ok((1.., _)) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return false,
            Ok(_) | Err(_) => return true,
        }
    }
    true
}

impl Machine for Call {
    type Output = Result<Box<Answered>, ClientError>;

    fn on_event(&mut self, registry: &Registry, event: &Event) {
        if let State::Trying(attempt) = &mut self.state {
            attempt.exchange.on_event(registry, event);
        }
    }

    fn advance(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Self::Output> {
        if let Some(why) = self.interrupt {
            self.state = State::Done;
            return ControlFlow::Break(Err(ClientError::Interrupted(why)));
        }
        loop {
            let state = std::mem::replace(&mut self.state, State::Done);
            match self.step(state, registry, now) {
                Flow::Again(state) => self.state = state,
                Flow::Wait(state) => {
                    self.state = state;
                    return ControlFlow::Continue(());
                }
                Flow::End(result) => return ControlFlow::Break(result),
            }
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let state = match &self.state {
            State::Pause { until } | State::Draining { until, .. } => Some(*until),
            State::Trying(attempt) => earliest([
                attempt.exchange.wake_at(),
                attempt
                    .connect_by
                    .filter(|_| attempt.exchange.phase() == Phase::Connecting),
            ]),
            State::Done => None,
        };
        earliest([self.deadline.instant(), state])
    }
}

impl Interruptible for Call {
    fn interrupt(&mut self, why: Interrupt) {
        self.interrupt.get_or_insert(why);
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call")
            .field("target", &self.target)
            .field("attempts", &self.attempts)
            .finish_non_exhaustive()
    }
}
