//! One request and its response as a state machine.

use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::time::Instant;

use mio::event::Event;
use mio::{Registry, Token};
use rustix::io::Errno;

use super::stream::{Connecting, MAX_DESCRIPTORS, Stream};
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
}

#[derive(Debug)]
enum State {
    Connecting(Connecting),
    /// Given as connected, not registered yet.
    Idle(Stream),
    Open(Stream),
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
        } else if self.sent < self.request.as_bytes().len() {
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
        if let ControlFlow::Break(opened) = self.open(registry, now) {
            return ControlFlow::Break(Err(opened));
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
        match ended.or_else(|| self.out_of_time(now)) {
            Some(error) => ControlFlow::Break(Err(error)),
            None => ControlFlow::Continue(()),
        }
    }

    /// Gets the stream open and registered. `Break`: it failed for good.
    fn open(&mut self, registry: &Registry, now: Instant) -> ControlFlow<ConnError> {
        let stream = match &mut self.state {
            State::Connecting(connecting) => match connecting.step(registry, now) {
                ControlFlow::Continue(()) => return ControlFlow::Continue(()),
                ControlFlow::Break(Err(error)) => return ControlFlow::Break(error),
                ControlFlow::Break(Ok(stream)) => stream,
            },
            State::Idle(_) => match self.adopt(registry) {
                Ok(stream) => stream,
                Err(error) => return ControlFlow::Break(error),
            },
            State::Open(_) => return ControlFlow::Continue(()),
            State::Done => return ControlFlow::Break(ConnError::Spent),
        };
        self.times.connected = Some(Instant::now());
        self.state = State::Open(stream);
        ControlFlow::Continue(())
    }

    /// Begins on a stream that was kept, unless something has happened to it since.
    fn adopt(&mut self, registry: &Registry) -> Result<Stream, ConnError> {
        match std::mem::replace(&mut self.state, State::Done) {
            State::Idle(stream) if stream.is_idle() => {
                let result = stream.register(registry, self.token);
                result.map_err(|errno| ConnError::io("epoll_ctl", Phase::Connecting, errno))?;
                Ok(stream)
            }
            _ => Err(ConnError::Spent),
        }
    }

    /// Writes what the kernel takes.
    fn send(&mut self) -> Result<(), ConnError> {
        let State::Open(stream) = &self.state else {
            return Ok(());
        };
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
        let (State::Open(stream), Some(parser)) = (&self.state, &mut self.parser) else {
            return Ok(Read::WouldBlock);
        };
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
        let stream = self.close(registry);
        let parser = self.parser.take().ok_or(ConnError::Spent)?;
        let response = parser.finish().map_err(ConnError::Protocol)?;
        self.times.complete = Some(Instant::now());
        let all_sent = self.sent == self.request.as_bytes().len();
        let reusable = response.keep_alive && !leftover && all_sent;
        Ok(Finished {
            response,
            stream: stream.filter(|_| reusable),
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

    fn close(&mut self, registry: &Registry) -> Option<Stream> {
        match std::mem::replace(&mut self.state, State::Done) {
            State::Open(stream) => {
                stream.deregister(registry);
                Some(stream)
            }
            _ => None,
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
            // The stream is deregistered while it is open: a copy of it elsewhere would keep
            // it in the poll after its close.
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
