//! The API socket: at most ten connections, one request at a time.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::net::{UnixListener, UnixStream};
use mio::{Interest, Registry, Token};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::http::{self, Item, Parser, Request};
use crate::wire::reactor::TokenRange;

/// Connections that are served at once.
const MAX_CONNECTIONS: usize = 10;
/// Most descriptors that one read can bring.
const MAX_FDS: usize = 253;
/// Tokens that the server needs.
pub(super) const TOKENS: usize = 1 + MAX_CONNECTIONS;

/// How an answer travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivery {
    Now,
    Late(Duration),
    /// The connection stays open and silent, and so do all others.
    Never,
    Garbage,
    Truncated,
    Drop,
}

/// An answer and how it travels.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) body: Option<Vec<u8>>,
    pub(super) delivery: Delivery,
}

impl Reply {
    /// An answer that travels as answers should.
    pub(super) fn new(status: u16, body: Option<Vec<u8>>) -> Self {
        Self {
            status,
            body,
            delivery: Delivery::Now,
        }
    }
}

/// Answers requests.
pub(super) trait Handler {
    fn handle(&mut self, request: Request, now: Instant) -> Reply;
}

struct Connection {
    stream: UnixStream,
    parser: Parser,
    out: Vec<u8>,
    readable: bool,
    /// The peer has closed or half-closed it: what it still sent is lost.
    closed: bool,
    close_after_write: bool,
    number: u64,
}

struct Pending {
    number: u64,
    reply: Reply,
    at: Option<Instant>,
}

/// The listening socket and its connections.
pub(super) struct Server {
    listener: UnixListener,
    tokens: TokenRange,
    connections: [Option<Connection>; MAX_CONNECTIONS],
    queue: VecDeque<(u64, Request)>,
    pending: Option<Pending>,
    accepting: bool,
    /// Answers wait for the next round: the original writes them one round of epoll later
    /// than it reads requests, and loses them where the peer half-closes in between.
    unsent: bool,
    next_number: u64,
}

impl Server {
    /// Serves a socket that is bound and listening.
    pub(super) fn new(
        listener: OwnedFd,
        tokens: TokenRange,
        registry: &Registry,
    ) -> io::Result<Self> {
        let listener = std::os::unix::net::UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        let mut listener = UnixListener::from_std(listener);
        registry.register(&mut listener, tokens.token(0), Interest::READABLE)?;
        Ok(Self {
            listener,
            tokens,
            connections: std::array::from_fn(|_| None),
            queue: VecDeque::new(),
            pending: None,
            accepting: true,
            unsent: false,
            next_number: 0,
        })
    }

    /// Takes note of an event.
    pub(super) fn on_event(&mut self, event: &Event) {
        match self.tokens.index(event.token()) {
            Some(0) => self.accepting = true,
            Some(index) => {
                if let Some(connection) = &mut self.connections[index - 1] {
                    connection.closed |=
                        event.is_read_closed() || event.is_write_closed() || event.is_error();
                    connection.readable |= event.is_readable();
                }
            }
            None => {}
        }
    }

    /// When an answer is due.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        if self.unsent {
            return Some(Instant::now());
        }
        self.pending.as_ref().and_then(|pending| pending.at)
    }

    /// Writes what waits and forgets connections that ended.
    pub(super) fn flush(&mut self) {
        self.unsent = false;
        for slot in &mut self.connections {
            if let Some(connection) = slot {
                if !connection.closed {
                    connection.write();
                }
                let done = connection.close_after_write && connection.out.is_empty();
                if connection.closed || done {
                    *slot = None;
                }
            }
        }
    }

    /// Does everything that can be done now.
    pub(super) fn serve(&mut self, handler: &mut impl Handler, registry: &Registry, now: Instant) {
        self.flush();
        loop {
            if let Some(pending) = &self.pending {
                if pending.at.is_none_or(|at| now < at) {
                    return;
                }
                if let Some(pending) = self.pending.take() {
                    self.deliver(pending.number, &pending.reply);
                }
            }
            while let Some((number, request)) = self.queue.pop_front() {
                let reply = handler.handle(request, now);
                match reply.delivery {
                    Delivery::Late(by) => self.hold(number, reply, Some(now + by)),
                    Delivery::Never => self.hold(number, reply, None),
                    _ => self.deliver(number, &reply),
                }
                if self.pending.is_some() {
                    break;
                }
            }
            if self.pending.is_some() {
                continue;
            }
            self.accept(registry);
            if !self.read_one() {
                return;
            }
        }
    }

    fn hold(&mut self, number: u64, reply: Reply, at: Option<Instant>) {
        self.pending = Some(Pending { number, reply, at });
    }

    fn deliver(&mut self, number: u64, reply: &Reply) {
        let mut connections = self.connections.iter_mut().flatten();
        let Some(connection) = connections.find(|c| c.number == number) else {
            return;
        };
        let mut bytes = http::response(reply.status, reply.body.as_deref());
        match reply.delivery {
            Delivery::Garbage => bytes = b"\x16\x03\x01 rewake-sim: garbage as ordered\n".to_vec(),
            Delivery::Truncated => bytes.truncate(bytes.len() / 2),
            Delivery::Drop => bytes.clear(),
            Delivery::Now | Delivery::Late(_) | Delivery::Never => {}
        }
        connection.close_after_write |=
            matches!(reply.delivery, Delivery::Truncated | Delivery::Drop);
        connection.out.extend_from_slice(&bytes);
        self.unsent = true;
    }

    fn accept(&mut self, registry: &Registry) {
        while self.accepting {
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => {
                    self.accepting = false;
                    return;
                }
            };
            let Some(index) = self.connections.iter().position(Option::is_none) else {
                // Best effort, as the connection is closed either way.
                let _sent = stream.write(http::FULL);
                continue;
            };
            let token: Token = self.tokens.token(index + 1);
            let interest = Interest::READABLE | Interest::WRITABLE;
            if registry.register(&mut stream, token, interest).is_err() {
                continue;
            }
            self.next_number += 1;
            self.connections[index] = Some(Connection {
                stream,
                parser: Parser::new(),
                out: Vec::new(),
                // Not before its first event: a hang-up must be seen before the bytes.
                readable: false,
                closed: false,
                close_after_write: false,
                number: self.next_number,
            });
        }
    }

    /// Reads once from one connection. `false` when none has anything.
    fn read_one(&mut self) -> bool {
        for connection in self.connections.iter_mut().flatten() {
            if connection.readable && !connection.closed {
                let requests = connection.read();
                let number = connection.number;
                self.unsent |= !connection.out.is_empty() || connection.closed;
                self.queue.extend(requests.into_iter().map(|r| (number, r)));
                return true;
            }
        }
        false
    }
}

impl Connection {
    fn write(&mut self) {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(written) => drop(self.out.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.closed = true;
                    return;
                }
            }
        }
    }

    fn read(&mut self) -> Vec<Request> {
        let mut buffer = [0; http::BUFFER];
        let room = self.parser.room();
        let (read, fds) = match receive(&self.stream, &mut buffer[..room]) {
            Ok((0, _)) => {
                self.closed = true;
                self.readable = false;
                return Vec::new();
            }
            Ok(received) => received,
            Err(rustix::io::Errno::INTR) => return Vec::new(),
            Err(error) => {
                self.readable = false;
                self.closed |= error != rustix::io::Errno::AGAIN;
                return Vec::new();
            }
        };
        let items = match self.parser.feed(&buffer[..read], fds) {
            Ok(items) => items,
            Err(reason) => {
                self.out.extend_from_slice(&http::parse_error(&reason));
                return Vec::new();
            }
        };
        let mut requests = Vec::new();
        for item in items {
            match item {
                Item::Request(request) => requests.push(request),
                Item::Continue => self.out.extend_from_slice(&http::go_on()),
            }
        }
        requests
    }
}

/// Bytes and descriptors of one `recvmsg`.
fn receive(stream: &UnixStream, bytes: &mut [u8]) -> rustix::io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(bytes)];
    let received =
        rustix::net::recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((received.bytes, fds))
}
