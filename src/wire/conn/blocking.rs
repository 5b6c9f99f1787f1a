//! Exchanges for callers that may block.

use std::io;
use std::os::fd::BorrowedFd;

use mio::Poll;

use super::stream::{Connecting, Stream, Watched};
use super::{Address, ConnError, Exchange, Finished, MAX_DESCRIPTORS, Peer, Phase};
use crate::deadline::Deadline;
use crate::wire::http::{EncodedRequest, Request, Response};
use crate::wire::reactor::{TokenRange, drive};

const TOKENS: TokenRange = TokenRange::new(0, 1);

/// A connection for one exchange after the other. Every call blocks, until its deadline at
/// the latest.
///
/// The stream is kept after a complete keep-alive answer with nothing behind it. In all other
/// cases, and where the peer has closed or written to a kept stream, the next exchange makes
/// a new one. A request is never sent twice.
#[derive(Debug)]
pub struct Connection {
    address: Option<Address>,
    peer: Peer,
    poll: Poll,
    /// Stays registered from one exchange to the next.
    stream: Option<Watched>,
}

impl Connection {
    /// Connects. Blocks until the connection stands, has failed or `deadline` has passed.
    ///
    /// # Errors
    /// [`ConnError::Connect`], [`ConnError::Timeout`], or [`ConnError::Io`] of `epoll`.
    pub fn connect(address: &Address, peer: Peer, deadline: Deadline) -> Result<Self, ConnError> {
        let mut connection = Self::idle(Some(address.clone()), peer)?;
        let mut connecting = Connecting::to(address, deadline, TOKENS);
        let stream = drive(&mut connection.poll, &mut connecting)
            .map_err(epoll_failed(Phase::Connecting))??;
        connection.stream = Some(Watched::new(stream));
        Ok(connection)
    }

    /// A connection over a stream made elsewhere. Without an address it ends with its stream:
    /// [`ConnError::Spent`].
    ///
    /// # Errors
    /// [`ConnError::Io`] of `epoll`.
    pub fn over(stream: Stream, peer: Peer) -> Result<Self, ConnError> {
        let mut connection = Self::idle(None, peer)?;
        connection.stream = Some(Watched::new(stream));
        Ok(connection)
    }

    /// The same with an address to connect to once the stream has ended.
    #[must_use]
    pub fn returning_to(mut self, address: Address) -> Self {
        self.address = Some(address);
        self
    }

    /// Sends a request, the descriptors with its first byte, and reads the answer. Blocks
    /// until the answer is complete, the exchange has failed or `deadline` has passed.
    ///
    /// # Errors
    /// [`ConnError`]; the stream is closed after every one but [`ConnError::Request`] and
    /// [`ConnError::TooManyDescriptors`].
    pub fn exchange(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<Response, ConnError> {
        let request = request.encode().map_err(ConnError::Request)?;
        self.exchange_encoded(request, fds, deadline)
            .map(|finished| finished.response)
    }

    /// [`exchange`](Self::exchange) for a request that was encoded before; gives the times,
    /// too. The stream stays with the connection.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    pub fn exchange_encoded(
        &mut self,
        request: EncodedRequest,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<Finished, ConnError> {
        if fds.len() > MAX_DESCRIPTORS {
            return Err(ConnError::TooManyDescriptors(fds.len()));
        }
        let fds: Result<Vec<_>, _> = fds.iter().map(BorrowedFd::try_clone_to_owned).collect();
        let fds = fds.map_err(|source| ConnError::Io {
            call: "fcntl(F_DUPFD_CLOEXEC)",
            phase: Phase::Connecting,
            source,
        })?;
        let exchange = match (self.take_idle(), &self.address) {
            (Some(stream), _) => Exchange::resume(stream, request, self.peer, deadline, TOKENS),
            (None, Some(address)) => {
                Exchange::connect(address, request, self.peer, deadline, TOKENS)
            }
            (None, None) => return Err(ConnError::Spent),
        };
        let mut exchange = exchange.with_descriptors(fds)?.keeping();
        let driven = drive(&mut self.poll, &mut exchange);
        let finished = driven.map_err(epoll_failed(exchange.phase()))??;
        self.stream = exchange.kept();
        Ok(finished)
    }

    /// Whether the next exchange will use the stream of the last one, as far as is known.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let stream = self.stream.as_ref().map(Watched::stream);
        stream.is_some_and(Stream::is_idle)
    }

    /// The kept stream, unless something has happened to it since.
    fn take_idle(&mut self) -> Option<Watched> {
        let watched = self.stream.take()?;
        if watched.stream().is_idle() {
            return Some(watched);
        }
        watched.release(self.poll.registry());
        None
    }

    fn idle(address: Option<Address>, peer: Peer) -> Result<Self, ConnError> {
        let poll = Poll::new().map_err(|source| ConnError::Io {
            call: "epoll_create1",
            phase: Phase::Connecting,
            source,
        })?;
        Ok(Self {
            address,
            peer,
            poll,
            stream: None,
        })
    }
}

fn epoll_failed(phase: Phase) -> impl Fn(io::Error) -> ConnError {
    move |source| ConnError::Io {
        call: "epoll_wait",
        phase,
        source,
    }
}
