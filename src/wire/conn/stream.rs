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

    pub(super) fn register(&self, registry: &Registry, token: Token) -> Result<(), Errno> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        registry
            .register(&mut SourceFd(&self.fd.as_raw_fd()), token, interest)
            .map_err(|error| errno_of(&error))
    }

    pub(super) fn deregister(&self, registry: &Registry) {
        // It can only fail where the stream was never registered, and then all is well.
        let _ = registry.deregister(&mut SourceFd(&self.fd.as_raw_fd()));
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

fn set_nonblocking(fd: &OwnedFd) -> Result<(), ConnError> {
    rustix::io::ioctl_fionbio(fd, true)
        .map_err(|errno| ConnError::io("ioctl(FIONBIO)", Phase::Connecting, errno))
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
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
    /// Begun elsewhere, not registered yet.
    Given(Stream),
    /// Registered, waiting to become writable.
    Pending(Stream),
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

    /// The stream stays registered under the machine's token, for an exchange to go on with.
    pub(super) fn step(
        &mut self,
        registry: &Registry,
        now: Instant,
    ) -> ControlFlow<Result<Stream, ConnError>> {
        let result = loop {
            match std::mem::replace(&mut self.state, State::Done) {
                State::Begin { at, delay } if at.is_some_and(|at| now < at) => {
                    self.state = State::Begin { at, delay };
                    break self.pending(now);
                }
                State::Begin { .. } if self.has_passed(now) => break self.pending(now),
                State::Begin { delay, .. } => match self.begin() {
                    Ok(stream) => self.state = State::Given(stream),
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
                State::Given(stream) => match self.adopt(&stream, registry) {
                    Ok(()) => self.state = State::Pending(stream),
                    Err(error) => break Some(Err(error)),
                },
                State::Pending(stream) => match outcome(&stream) {
                    Ok(true) => break Some(Ok(stream)),
                    Ok(false) => {
                        self.state = State::Pending(stream);
                        break self.pending(now);
                    }
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

    fn pending(&self, now: Instant) -> Option<Result<Stream, ConnError>> {
        self.has_passed(now).then_some(Err(ConnError::Timeout {
            phase: Phase::Connecting,
        }))
    }

    fn has_passed(&self, now: Instant) -> bool {
        self.deadline.instant().is_some_and(|at| now >= at)
    }

    fn begin(&self) -> Result<Stream, Errno> {
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
                let stream = begin(family, address)?;
                sockopt::set_tcp_nodelay(&stream.fd, true)?;
                Ok(stream)
            }
            None => Err(Errno::DESTADDRREQ),
        }
    }

    fn adopt(&self, stream: &Stream, registry: &Registry) -> Result<(), ConnError> {
        set_nonblocking(&stream.fd)?;
        stream
            .register(registry, self.token)
            .map_err(|errno| ConnError::io("epoll_ctl", Phase::Connecting, errno))
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

fn begin(
    family: AddressFamily,
    address: &impl rustix::net::addr::SocketAddrArg,
) -> Result<Stream, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&fd, address) {
        // An interrupted connect goes on in the background, like one that takes time.
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(Stream { fd }),
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
        let result = self.step(registry, now);
        if let ControlFlow::Break(Ok(stream)) = &result {
            stream.deregister(registry);
        }
        result
    }

    fn wake_at(&self) -> Option<Instant> {
        let retry = match &self.state {
            State::Begin { at, .. } => *at,
            _ => None,
        };
        earliest([self.deadline.instant(), retry])
    }
}
