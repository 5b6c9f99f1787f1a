//! A non-blocking stream socket, Unix or TCP, and how it comes to be connected.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sockopt,
};

use super::{Address, ConnError, Phase};
use crate::deadline::Deadline;
use crate::wire::reactor::{Machine, TokenRange, earliest};

/// Most descriptors in one message (`SCM_MAX_FD` in the kernel's include/net/scm.h).
pub const MAX_DESCRIPTORS: usize = 253;

/// A connected stream socket in non-blocking mode. Closed when dropped, never half-closed.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
}

impl Stream {
    /// Takes over a connected stream socket, and puts it into non-blocking mode.
    ///
    /// # Errors
    /// [`ConnError::Io`] of `fcntl`.
    pub fn from_connected(fd: impl Into<OwnedFd>) -> Result<Self, ConnError> {
        let fd = fd.into();
        set_nonblocking(&fd)?;
        Ok(Self { fd })
    }

    /// Whether the connection is silent and open: nothing to read, no end of stream, no
    /// error. A kept connection that is not must not be used for another request.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let mut byte = [0_u8; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        matches!(
            rustix::net::recv(&self.fd, &mut byte, flags),
            Err(Errno::AGAIN)
        )
    }

    /// Reads what is there. Nothing: end of stream.
    pub(super) fn read<'a>(&self, buffer: &'a mut [MaybeUninit<u8>]) -> Result<&'a [u8], Errno> {
        let ((bytes, _), _) = rustix::net::recv(&self.fd, buffer, RecvFlags::DONTWAIT)?;
        Ok(bytes)
    }

    /// Writes what fits, without raising `SIGPIPE`.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::io::retry_on_intr(|| rustix::net::send(&self.fd, bytes, flags))
    }

    /// Writes what fits; the descriptors travel with the first byte.
    pub(super) fn write_with(&self, bytes: &[u8], fds: &[OwnedFd]) -> Result<usize, Errno> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Errno::MSGSIZE);
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let parts = [IoSlice::new(bytes)];
        rustix::io::retry_on_intr(|| rustix::net::sendmsg(&self.fd, &parts, &mut control, flags))
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Stream> for OwnedFd {
    fn from(stream: Stream) -> Self {
        stream.fd
    }
}

/// A stream that a poll may be watching.
#[derive(Debug)]
pub(super) struct Watched {
    stream: Stream,
    /// What for. `None`: it is not registered.
    interest: Option<Interest>,
}

impl Watched {
    pub(super) const fn new(stream: Stream) -> Self {
        Self {
            stream,
            interest: None,
        }
    }

    pub(super) const fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Has the poll watch for bytes to read and, where `writable` says so, for room to write.
    /// What is there already makes an event, too, so nothing is missed by beginning late.
    pub(super) fn watch(
        &mut self,
        registry: &Registry,
        token: Token,
        writable: bool,
    ) -> Result<(), Errno> {
        let interest = match writable {
            true => Interest::READABLE | Interest::WRITABLE,
            false => Interest::READABLE,
        };
        let fd = self.stream.fd.as_raw_fd();
        let mut source = SourceFd(&fd);
        let result = match self.interest {
            Some(known) if known.is_writable() || !writable => return Ok(()),
            Some(_) => registry.reregister(&mut source, token, interest),
            None => registry.register(&mut source, token, interest),
        };
        result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        self.interest = Some(interest);
        Ok(())
    }

    /// The stream, no longer watched.
    pub(super) fn release(self, registry: &Registry) -> Stream {
        if self.interest.is_some() {
            let fd = self.stream.fd.as_raw_fd();
            // It can only fail where the poll has forgotten the stream already.
            let _ = registry.deregister(&mut SourceFd(&fd));
        }
        self.stream
    }

    /// For a pause between two exchanges: goes on being watched only if that is for reading.
    /// Every request that the peer takes makes room to write, which nobody waits for.
    pub(super) fn at_rest(self, registry: &Registry) -> Self {
        match self.interest {
            Some(interest) if interest.is_writable() => Self::new(self.release(registry)),
            _ => self,
        }
    }
}

fn set_nonblocking(fd: &OwnedFd) -> Result<(), ConnError> {
    rustix::io::ioctl_fionbio(fd, true)
        .map_err(|errno| ConnError::io("ioctl(FIONBIO)", Phase::Connecting, errno))
}

/// A connection in the making: a [`Machine`] with one token.
#[derive(Debug)]
pub struct Connecting {
    token: Token,
    deadline: Deadline,
    address: Option<Address>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// To be tried, not before `at`. `delay` is how long to wait should it be in vain.
    Begin {
        at: Option<Instant>,
        delay: Duration,
    },
    /// Begun elsewhere, not looked at yet.
    Given(Stream),
    /// Begun: the socket knows what came of it.
    Pending(Watched),
    Done,
}

/// The first pause after a full backlog; each further one is twice as long.
const FIRST_RETRY: Duration = Duration::from_micros(500);
/// The longest pause after a full backlog.
const LAST_RETRY: Duration = Duration::from_millis(20);

impl Connecting {
    /// Connects to an address. Nothing happens before the first
    /// [`advance`](Machine::advance).
    #[must_use]
    pub fn to(address: &Address, deadline: Deadline, tokens: TokenRange) -> Self {
        Self {
            token: tokens.token(0),
            deadline,
            address: Some(address.clone()),
            state: State::Begin {
                at: None,
                delay: FIRST_RETRY,
            },
        }
    }

    /// Waits for a socket whose `connect` was begun elsewhere, in another network namespace
    /// for instance. It may be connected already.
    #[must_use]
    pub fn given(socket: OwnedFd, deadline: Deadline, tokens: TokenRange) -> Self {
        Self {
            token: tokens.token(0),
            deadline,
            address: None,
            state: State::Given(Stream { fd: socket }),
        }
    }

    /// The stream may be watched, under the machine's token, for an exchange to go on with.
    pub(super) fn step(
        &mut self,
        registry: &Registry,
        now: Instant,
    ) -> ControlFlow<Result<Watched, ConnError>> {
        let result = loop {
            match std::mem::replace(&mut self.state, State::Done) {
                State::Begin { at, delay } if at.is_some_and(|at| now < at) => {
                    self.state = State::Begin { at, delay };
                    break self.pending(now);
                }
                State::Begin { .. } if self.has_passed(now) => break self.pending(now),
                State::Begin { delay, .. } => match self.begin() {
                    Ok((stream, Begun::Stands)) => break Some(Ok(Watched::new(stream))),
                    Ok((stream, Begun::Pending)) => {
                        self.state = State::Pending(Watched::new(stream));
                    }
                    // A Unix socket's backlog is full, and nothing can be polled for.
                    Err(Errno::AGAIN) => {
                        self.state = State::Begin {
                            at: now.checked_add(delay),
                            delay: (delay * 2).min(LAST_RETRY),
                        };
                        break self.pending(now);
                    }
                    Err(errno) => break Some(Err(self.refused(errno))),
                },
                State::Given(stream) => match set_nonblocking(&stream.fd) {
                    Ok(()) => self.state = State::Pending(Watched::new(stream)),
                    Err(error) => break Some(Err(error)),
                },
                State::Pending(mut watched) => match outcome(watched.stream()) {
                    Ok(true) => break Some(Ok(watched)),
                    Ok(false) => match watched.watch(registry, self.token, true) {
                        Ok(()) => {
                            self.state = State::Pending(watched);
                            break self.pending(now);
                        }
                        Err(errno) => {
                            let phase = Phase::Connecting;
                            break Some(Err(ConnError::io("epoll_ctl", phase, errno)));
                        }
                    },
                    Err(errno) => break Some(Err(self.refused(errno))),
                },
                State::Done => break Some(Err(ConnError::Spent)),
            }
        };
        match result {
            Some(result) => ControlFlow::Break(result),
            None => ControlFlow::Continue(()),
        }
    }

    fn pending<T>(&self, now: Instant) -> Option<Result<T, ConnError>> {
        self.has_passed(now).then_some(Err(ConnError::Timeout {
            phase: Phase::Connecting,
        }))
    }

    fn has_passed(&self, now: Instant) -> bool {
        self.deadline.instant().is_some_and(|at| now >= at)
    }

    fn begin(&self) -> Result<(Stream, Begun), Errno> {
        match &self.address {
            Some(Address::Unix(path)) => {
                let address = SocketAddrUnix::new(path)?;
                begin(AddressFamily::UNIX, &address)
            }
            Some(Address::Tcp(address)) => {
                let family = match address.is_ipv4() {
                    true => AddressFamily::INET,
                    false => AddressFamily::INET6,
                };
                let (stream, begun) = begin(family, address)?;
                sockopt::set_tcp_nodelay(&stream.fd, true)?;
                Ok((stream, begun))
            }
            None => Err(Errno::DESTADDRREQ),
        }
    }

    fn refused(&self, errno: Errno) -> ConnError {
        match &self.address {
            Some(address) => ConnError::Connect {
                address: address.clone(),
                source: errno.into(),
            },
            None => ConnError::NotConnected(errno.into()),
        }
    }
}

/// What a `connect` came to.
enum Begun {
    Stands,
    Pending,
}

fn begin(
    family: AddressFamily,
    address: &impl rustix::net::addr::SocketAddrArg,
) -> Result<(Stream, Begun), Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&fd, address) {
        Ok(()) => Ok((Stream { fd }, Begun::Stands)),
        // An interrupted connect goes on in the background, like one that takes time.
        Err(Errno::INPROGRESS | Errno::INTR) => Ok((Stream { fd }, Begun::Pending)),
        Err(errno) => Err(errno),
    }
}

/// Whether the connection stands by now. Asks the socket instead of trusting an event, so
/// that spurious wake-ups do no harm.
fn outcome(stream: &Stream) -> Result<bool, Errno> {
    sockopt::socket_error(&stream.fd)??;
    match rustix::net::getpeername(&stream.fd) {
        Ok(_) => Ok(true),
        Err(Errno::NOTCONN) => Ok(false),
        Err(errno) => Err(errno),
    }
}

impl Machine for Connecting {
    type Output = Result<Stream, ConnError>;

    fn on_event(&mut self, _registry: &Registry, _event: &Event) {}

    fn advance(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Self::Output> {
        self.step(registry, now)
            .map_break(|result| result.map(|watched| watched.release(registry)))
    }

    fn wake_at(&self) -> Option<Instant> {
        let retry = match &self.state {
            State::Begin { at, .. } => *at,
            _ => None,
        };
        earliest([self.deadline.instant(), retry])
    }
}
