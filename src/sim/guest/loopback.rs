//! The guest agent on a loopback socket: for VMs without a network device.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::rc::Rc;
use std::time::Instant;

use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry};

use super::outlet::Outlet;
use super::{Answering, LINK_TOKENS};
use crate::sim::envd::Conversation;
use crate::wire::reactor::{TokenRange, earliest};

/// Connections served at once.
const MAX_CONNECTIONS: usize = LINK_TOKENS - 1;

struct Connection {
    stream: TcpStream,
    conversation: Conversation,
    outlet: Outlet,
    readable: bool,
    ended: bool,
}

/// All connections of one guest. The listener outlives guests.
pub(super) struct Loopback {
    listener: Rc<TcpListener>,
    connections: Vec<Option<Connection>>,
    accepting: bool,
}

impl Loopback {
    pub(super) fn new(listener: Rc<TcpListener>) -> Self {
        Self {
            listener,
            connections: (0..MAX_CONNECTIONS).map(|_| None).collect(),
            accepting: true,
        }
    }

    pub(super) fn on_event(&mut self, tokens: TokenRange, event: &Event) {
        match tokens.index(event.token()) {
            Some(0) => self.accepting = true,
            Some(index) => {
                if let Some(Some(connection)) = self.connections.get_mut(index - 1) {
                    connection.readable |= event.is_readable() || event.is_error();
                }
            }
            None => {}
        }
    }

    /// Does what can be done now; when to be called again.
    pub(super) fn advance(
        &mut self,
        registry: &Registry,
        tokens: TokenRange,
        guest: &mut dyn Answering,
        now: Instant,
    ) -> Option<Instant> {
        self.accept(registry, tokens, guest);
        let mut wake = None;
        for slot in &mut self.connections {
            let Some(connection) = slot else { continue };
            connection.advance(guest, now);
            wake = earliest([wake, connection.outlet.wake_at()]);
            if connection.ended {
                *slot = None;
            }
        }
        wake
    }

    fn accept(&mut self, registry: &Registry, tokens: TokenRange, guest: &mut dyn Answering) {
        while self.accepting {
            let Some(index) = self.connections.iter().position(Option::is_none) else {
                return;
            };
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => {
                    self.accepting = false;
                    return;
                }
            };
            if guest.is_deaf() {
                continue;
            }
            let interest = Interest::READABLE | Interest::WRITABLE;
            if registry
                .register(&mut stream, tokens.token(index + 1), interest)
                .is_err()
            {
                continue;
            }
            self.connections[index] = Some(Connection {
                stream,
                conversation: Conversation::default(),
                outlet: Outlet::default(),
                readable: true,
                ended: false,
            });
        }
    }
}

impl Connection {
    fn advance(&mut self, guest: &mut dyn Answering, now: Instant) {
        let mut buffer = [0; 4096];
        while self.readable {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.readable = false;
                    self.conversation.closing = true;
                }
                Ok(read) => {
                    let answer = guest.answer(&mut self.conversation, &buffer[..read]);
                    if !answer.is_empty() {
                        let faults = guest.answer_faults();
                        self.outlet.push(answer, &faults, now);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.readable = false;
                    self.ended |= error.kind() != io::ErrorKind::WouldBlock;
                }
            }
        }
        loop {
            let bytes = self.outlet.take(16 << 10, now);
            if bytes.is_empty() {
                break;
            }
            match self.stream.write(&bytes) {
                Ok(written) if written == bytes.len() => {}
                Ok(written) => self.outlet.give_back(&bytes[written..]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.outlet.give_back(&bytes);
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    self.outlet.give_back(&bytes);
                }
                Err(_) => {
                    self.ended = true;
                    return;
                }
            }
        }
        if self.outlet.must_reset() {
            // Closing with a linger time of zero sends RST.
            let _best_effort = rustix::net::sockopt::set_socket_linger(
                &self.stream,
                Some(std::time::Duration::ZERO),
            );
            self.ended = true;
        } else if self.conversation.closing && self.outlet.is_empty() {
            let _gone_already = self.stream.shutdown(Shutdown::Write);
            self.ended = true;
        }
    }
}
