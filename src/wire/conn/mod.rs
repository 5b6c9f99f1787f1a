//! HTTP exchanges over Unix and TCP sockets, with one absolute deadline each.
//!
//! [`Exchange`] is the non-blocking state machine: it connects, sends one request (with
//! descriptors, where asked to), reads one response, and gives the stream back where it may
//! be used again. [`Connection`] drives exchanges for callers that may block.
//!
//! No connection is ever half-closed: Cloud Hypervisor's server drops the request when it
//! sees one end (micro-http, src/server.rs). A stream is used again only after a complete
//! keep-alive answer with nothing behind it; after any error it is closed.

mod blocking;
mod error;
mod exchange;
mod stream;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use blocking::Connection;
pub use error::{ConnError, Phase};
pub use exchange::{Exchange, Finished};
pub use stream::{Connecting, MAX_DESCRIPTORS, Stream};

use crate::wire::http::Limits;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A Unix stream socket by path, at most 107 bytes.
    Unix(PathBuf),
    /// A TCP socket.
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

/// The slowest a peer may send, against answers that trickle in for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// How long after its first byte the peer may be slower.
    pub grace: Duration,
    /// The mean rate since the first byte that it must keep up after that. Zero: any.
    pub bytes_per_second: u32,
}

impl Pace {
    /// When a peer that has sent `received` bytes since `first_byte` falls behind.
    fn falls_behind_at(self, first_byte: Instant, received: u64) -> Option<Instant> {
        if self.bytes_per_second == 0 {
            return None;
        }
        let micros = received.saturating_mul(1_000_000) / u64::from(self.bytes_per_second);
        first_byte.checked_add(self.grace.max(Duration::from_micros(micros)))
    }
}

/// How far a peer is trusted: what it may send at most, and how slowly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Bounds on its answers.
    pub limits: Limits,
    /// Its minimum pace.
    pub pace: Pace,
}

impl Peer {
    /// The guest agent: [`Limits::GUEST`], 1 KiB/s after two seconds. A guest that was just
    /// restored may stop for page faults between two bytes, hence the grace.
    pub const GUEST: Self = Self {
        limits: Limits::GUEST,
        pace: Pace {
            grace: Duration::from_secs(2),
            bytes_per_second: 1024,
        },
    };

    /// Cloud Hypervisor: [`Limits::VMM`], 16 KiB/s after five seconds. It writes an answer
    /// in one go.
    pub const VMM: Self = Self {
        limits: Limits::VMM,
        pace: Pace {
            grace: Duration::from_secs(5),
            bytes_per_second: 16 * 1024,
        },
    };
}

/// When an exchange passed its moments of interest, for timelines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    /// The connection stood. For a stream that was given: when the exchange began.
    pub connected: Option<Instant>,
    /// The last byte of the request was handed to the kernel.
    pub sent: Option<Instant>,
    /// The first bytes of the answer were read.
    pub first_byte: Option<Instant>,
    /// The answer was complete.
    pub complete: Option<Instant>,
}
