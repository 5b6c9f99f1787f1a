//! One request and its response as a state machine.

use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::time::Instant;

use mio::event::Event;
use mio::{Registry, Token};
use rustix::io::Errno;

use super::stream::{Connecting, MAX_DESCRIPTORS, Stream, Watched};
use super::{Address, ConnError, Peer, Phase, Times};
use crate::deadline::Deadline;
use crate::wire::http::{EncodedRequest, HttpError, Progress, Response, ResponseParser};
use crate::wire::reactor::{Machine, TokenRange, earliest};

/// Bytes read by one call. Most answers fit.
const READ_BYTES: usize = 16 * 1024;

/// What a successful exchange leaves.
#[derive(Debug)]
pub struct Finished {
    /// The answer.
    pub response: Response,
    /// The connection, where it may be used again: a keep-alive answer, nothing behind it,
    /// and the whole request was taken.
    pub stream: Option<Stream>,
    /// When what happened.
    pub times: Times,
}

/// One request and its response: a [`Machine`] with one token.
///
/// Dropping it closes the connection, which aborts the exchange.
#[derive(Debug)]
pub struct Exchange {
    token: Token,
    request: EncodedRequest,
    fds: Vec<OwnedFd>,
    pace: super::Pace,
    deadline: Deadline,
    state: State,
    /// `None` once it has been used up.
    parser: Option<ResponseParser>,
    sent: usize,
    received: u64,
    /// The kernel said that there is something to read, and it was not all read yet.
    readable: bool,
    /// The kernel may take more of the request.
    writable: bool,
    times: Times,
    /// Leaves a stream that may be used again with the poll that watches it.
    keeps: bool,
    /// The request waits.
    held: bool,
}

#[derive(Debug)]
enum State {
    Connecting(Connecting),
    /// Given as connected, not looked at yet.
    Idle(Stream),
    Open(Watched),
    /// Done, the stream to be taken out.
    Kept(Watched),
    Done,
}

/// What reading came to.
enum Read {
    WouldBlock,
    End,
    Complete { leftover: bool },
}

impl Exchange {
    /// An exchange on a connection of its own. Nothing happens before the first
    /// [`advance`](Machine::advance).
    #[must_use]
    pub fn connect(
        address: &Address,
        request: EncodedRequest,
        peer: Peer,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Self {
        let connecting = Connecting::to(address, deadline, tokens);
        Self::new(
            State::Connecting(connecting),
            request,
            peer,
            deadline,
            tokens,
        )
    }

    /// An exchange on a socket whose `connect` was begun elsewhere, in another network
    /// namespace for instance. It may be connected already.
    #[must_use]
    pub fn over_socket(
        socket: OwnedFd,
        request: EncodedRequest,
        peer: Peer,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Self {
        let connecting = Connecting::given(socket, deadline, tokens);
        Self::new(
            State::Connecting(connecting),
            request,
            peer,
            deadline,
            tokens,
        )
    }

    /// An exchange on the stream that an earlier one gave back. It ends with
    /// [`ConnError::Spent`] where the peer has closed it or written to it in the meantime.
    #[must_use]
    pub fn over_stream(
        stream: Stream,
        request: EncodedRequest,
        peer: Peer,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Self {
        Self::new(State::Idle(stream), request, peer, deadline, tokens)
    }

    /// An exchange on the stream that [`keeping`](Self::keeping) left with the same poll and
    /// token. The caller has seen that it is idle.
    pub(super) fn resume(
        stream: Watched,
        request: EncodedRequest,
        peer: Peer,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Self {
        let mut exchange = Self::new(State::Open(stream), request, peer, deadline, tokens);
        exchange.times.connected = Some(Instant::now());
        exchange
    }

    fn new(
        state: State,
        request: EncodedRequest,
        peer: Peer,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Self {
        Self {
            token: tokens.token(0),
            parser: Some(ResponseParser::new(request.method(), peer.limits)),
            request,
            fds: Vec::new(),
            pace: peer.pace,
            deadline,
            state,
            sent: 0,
            received: 0,
            readable: false,
            writable: true,
            times: Times::default(),
            keeps: false,
            held: false,
        }
    }

    /// Says whether the request waits, once the connection stands, until it is let go.
    pub(crate) const fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Whether the connection stands and the request waits.
    pub(crate) const fn is_held(&self) -> bool {
        self.held && self.times.connected.is_some()
    }

    /// The socket, where the connection stands.
    pub(crate) const fn stream(&self) -> Option<&Stream> {
        match &self.state {
            State::Open(watched) => Some(watched.stream()),
            _ => None,
        }
    }

    /// The same for one poll that serves all exchanges on a stream: where it may be used
    /// again, it stays registered, and is in [`kept`](Self::kept), not in [`Finished`].
    pub(super) const fn keeping(mut self) -> Self {
        self.keeps = true;
        self
    }

    /// The stream, if there is one to use again.
    pub(super) fn kept(self) -> Option<Watched> {
        match self.state {
            State::Kept(stream) => Some(stream),
            _ => None,
        }
    }

    /// The same with descriptors that travel with the first byte (Unix sockets only). They
    /// are closed here as soon as they were sent: the kernel holds them for the peer.
    ///
    /// # Errors
    /// [`ConnError::TooManyDescriptors`] for more than [`MAX_DESCRIPTORS`].
    pub fn with_descriptors(mut self, fds: Vec<OwnedFd>) -> Result<Self, ConnError> {
        if fds.len() > MAX_DESCRIPTORS {
            return Err(ConnError::TooManyDescriptors(fds.len()));
        }
        self.fds = fds;
        Ok(self)
    }

    /// What it is doing.
    #[must_use]
    pub fn phase(&self) -> Phase {
        if matches!(self.state, State::Connecting(_)) {
            Phase::Connecting
        } else if self.received > 0 {
            Phase::Reading
        } else if !self.is_sent() {
            Phase::Sending
        } else {
            Phase::Waiting
        }
    }

    /// When it passed what it has passed so far.
    #[must_use]
    pub const fn times(&self) -> Times {
        self.times
    }

    fn run(
        &mut self,
        registry: &Registry,
        now: Instant,
    ) -> ControlFlow<Result<Finished, ConnError>> {
        if let ControlFlow::Break(error) = self.open(registry, now) {
            return ControlFlow::Break(Err(error));
        }
        if !matches!(self.state, State::Open(_)) {
            return ControlFlow::Continue(());
        }
        if self.sent == 0 && self.deadline.instant().is_some_and(|at| now >= at) {
            let phase = self.phase();
            return ControlFlow::Break(Err(ConnError::Timeout { phase }));
        }
        // An early answer to a request that the peer will not read to its end is an answer.
        let broken = self.send().err();
        if broken.is_some() {
            self.readable = true;
        }
        let ended = match self.receive() {
            Ok(Read::Complete { leftover }) => {
                return ControlFlow::Break(self.complete(leftover, registry));
            }
            Ok(Read::End) => return ControlFlow::Break(self.end_of_stream(registry)),
            Ok(Read::WouldBlock) => broken,
            Err(error) => Some(broken.unwrap_or(error)),
        };
        let ended = ended.or_else(|| self.out_of_time(now));
        match ended.or_else(|| self.watch(registry).err()) {
            Some(error) => ControlFlow::Break(Err(error)),
            None => ControlFlow::Continue(()),
        }
    }

    /// Gets the stream open. `Break`: it failed for good.
    fn open(&mut self, registry: &Registry, now: Instant) -> ControlFlow<ConnError> {
        let stream = match &mut self.state {
            State::Connecting(connecting) => match connecting.step(registry, now) {
                ControlFlow::Continue(()) => return ControlFlow::Continue(()),
                ControlFlow::Break(Err(error)) => return ControlFlow::Break(error),
                ControlFlow::Break(Ok(stream)) => stream,
            },
            State::Idle(_) => match std::mem::replace(&mut self.state, State::Done) {
                // Something may have happened to it since it was kept.
                State::Idle(stream) if stream.is_idle() => Watched::new(stream),
                _ => return ControlFlow::Break(ConnError::Spent),
            },
            State::Open(_) => return ControlFlow::Continue(()),
            State::Kept(_) | State::Done => return ControlFlow::Break(ConnError::Spent),
        };
        self.times.connected = Some(Instant::now());
        self.state = State::Open(stream);
        ControlFlow::Continue(())
    }

    /// Has the poll tell what is now missing: bytes of the answer, or room for the request.
    /// Only now, as a request that fits is sent without any help of the poll.
    fn watch(&mut self, registry: &Registry) -> Result<(), ConnError> {
        let (phase, writable) = (self.phase(), !self.held && !self.is_sent());
        let State::Open(stream) = &mut self.state else {
            return Ok(());
        };
        stream
            .watch(registry, self.token, writable)
            .map_err(|errno| ConnError::io("epoll_ctl", phase, errno))
    }

    /// Writes what the kernel takes.
    fn send(&mut self) -> Result<(), ConnError> {
        let State::Open(watched) = &self.state else {
            return Ok(());
        };
        if self.held {
            return Ok(());
        }
        let stream = watched.stream();
        while self.writable {
            let left = &self.request.as_bytes()[self.sent..];
            if left.is_empty() {
                return Ok(());
            }
            let result = match self.fds.is_empty() {
                true => stream.write(left),
                false => stream.write_with(left, &self.fds),
            };
            match result {
                Ok(count) => {
                    self.sent += count;
                    self.fds.clear();
                    if self.sent == self.request.as_bytes().len() {
                        self.times.sent = Some(Instant::now());
                    }
                }
                Err(Errno::AGAIN) => self.writable = false,
                Err(errno) => return Err(ConnError::io("send", Phase::Sending, errno)),
            }
        }
        Ok(())
    }

    /// Reads until the response is complete or the socket is empty.
    fn receive(&mut self) -> Result<Read, ConnError> {
        let phase = self.phase();
        let (State::Open(watched), Some(parser)) = (&self.state, &mut self.parser) else {
            return Ok(Read::WouldBlock);
        };
        let stream = watched.stream();
        let mut buffer = [MaybeUninit::uninit(); READ_BYTES];
        while self.readable {
            let bytes = match stream.read(&mut buffer) {
                Ok([]) => return Ok(Read::End),
                Ok(bytes) => bytes,
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    break;
                }
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(ConnError::io("recv", phase, errno)),
            };
            self.times.first_byte.get_or_insert_with(Instant::now);
            self.received += bytes.len() as u64;
            let progress = parser.feed(bytes).map_err(ConnError::Protocol)?;
            if let Progress::Complete { consumed } = progress {
                let leftover = consumed < bytes.len();
                return Ok(Read::Complete { leftover });
            }
        }
        Ok(Read::WouldBlock)
    }

    fn complete(&mut self, leftover: bool, registry: &Registry) -> Result<Finished, ConnError> {
        let parser = self.parser.take().ok_or(ConnError::Spent)?;
        let response = parser.finish().map_err(ConnError::Protocol)?;
        self.times.complete = Some(Instant::now());
        let reusable = response.keep_alive && !leftover && self.is_sent();
        let mut stream = None;
        match std::mem::replace(&mut self.state, State::Done) {
            State::Open(watched) if reusable && self.keeps => {
                self.state = State::Kept(watched.at_rest(registry));
            }
            State::Open(watched) => {
                stream = Some(watched.release(registry)).filter(|_| reusable);
            }
            _ => {}
        }
        Ok(Finished {
            response,
            stream,
            times: self.times,
        })
    }

    /// The peer ended the stream: the end of a body that lasts until then, or too early.
    fn end_of_stream(&mut self, registry: &Registry) -> Result<Finished, ConnError> {
        let phase = self.phase();
        let received = self.received;
        self.complete(false, registry).map_err(|error| match error {
            ConnError::Protocol(HttpError::Truncated { .. }) => {
                ConnError::ClosedEarly { phase, received }
            }
            other => other,
        })
    }

    fn out_of_time(&self, now: Instant) -> Option<ConnError> {
        let phase = self.phase();
        if self.deadline.instant().is_some_and(|at| now >= at) {
            return Some(ConnError::Timeout { phase });
        }
        let first_byte = self.times.first_byte?;
        let limit = self.pace.falls_behind_at(first_byte, self.received)?;
        (now >= limit).then(|| ConnError::TooSlow {
            received: self.received,
            elapsed: now.saturating_duration_since(first_byte),
        })
    }

    fn is_sent(&self) -> bool {
        self.sent == self.request.as_bytes().len()
    }

    /// Closes the stream, unless it was kept or given back.
    fn close(&mut self, registry: &Registry) {
        if matches!(self.state, State::Open(_))
            && let State::Open(watched) = std::mem::replace(&mut self.state, State::Done)
        {
            // It must be taken from the poll while it is open: a copy of it elsewhere would
            // keep it there after its close.
            watched.release(registry);
        }
    }
}

impl Machine for Exchange {
    type Output = Result<Finished, ConnError>;

    fn on_event(&mut self, _registry: &Registry, event: &Event) {
        if event.token() != self.token {
            return;
        }
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
    }

    fn advance(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Self::Output> {
        let result = self.run(registry, now);
        if result.is_break() {
            self.close(registry);
        }
        result
    }

    fn wake_at(&self) -> Option<Instant> {
        let connecting = match &self.state {
            State::Connecting(connecting) => connecting.wake_at(),
            _ => None,
        };
        let pace = self
            .times
            .first_byte
            .and_then(|first| self.pace.falls_behind_at(first, self.received));
        earliest([self.deadline.instant(), connecting, pace])
    }
}
