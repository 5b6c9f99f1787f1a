//! Why an exchange failed, and in which phase.

use std::fmt;
use std::io;
use std::time::Duration;

use rustix::io::Errno;

use super::Address;
use crate::wire::http::{HttpError, RequestError};

/// What an exchange is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Waiting for the connection.
    Connecting,
    /// Writing the request.
    Sending,
    /// The request is out; no byte of the answer is in.
    Waiting,
    /// Part of the answer is in.
    Reading,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connecting => "connecting",
            Self::Sending => "sending",
            Self::Waiting => "waiting for the first byte",
            Self::Reading => "reading",
        })
    }
}

/// Why an exchange failed. Its connection is closed in every case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnError {
    /// No connection could be made.
    #[error("Cannot connect to {address}")]
    Connect {
        /// To where.
        address: Address,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A socket that was given turned out not to be connected: refused, unreachable, reset.
    #[error("Socket is not connected")]
    NotConnected(#[source] io::Error),
    /// The deadline passed.
    #[error("Timed out while {phase}")]
    Timeout {
        /// While doing what.
        phase: Phase,
    },
    /// The peer kept sending, but more slowly than [`Pace`](super::Pace) allows.
    #[error("Peer is too slow: {received} bytes in {} ms", .elapsed.as_millis())]
    TooSlow {
        /// Bytes of the answer so far.
        received: u64,
        /// Time since the first of them.
        elapsed: Duration,
    },
    /// The peer closed the connection before its answer was complete.
    #[error("Peer closed the connection while {phase}")]
    ClosedEarly {
        /// While doing what.
        phase: Phase,
        /// Bytes of the answer that had come.
        received: u64,
    },
    /// The answer broke a rule or a bound.
    #[error("Answer is refused")]
    Protocol(#[source] HttpError),
    /// The request cannot be encoded; nothing was sent.
    #[error("Request is refused")]
    Request(#[source] RequestError),
    /// More descriptors than one message can carry.
    #[error("{0} descriptors are too many for one message")]
    TooManyDescriptors(usize),
    /// The stream cannot be used again: the peer has closed it, or has sent something that
    /// nobody asked for. Nothing was sent.
    #[error("Connection is spent")]
    Spent,
    /// A system call failed.
    #[error("{call} failed while {phase}")]
    Io {
        /// The call.
        call: &'static str,
        /// While doing what.
        phase: Phase,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ConnError {
    /// Whether time ran out: the deadline, the minimum pace, or the kernel's own patience.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::TooSlow { .. })
            || self.errno() == Some(Errno::TIMEDOUT)
    }

    /// Whether nobody listens: refused, or no such socket.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::NotConnected(_))
            && matches!(self.errno(), Some(Errno::CONNREFUSED | Errno::NOENT))
    }

    /// Whether the peer ended the connection, in good order or by a reset.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match self {
            Self::ClosedEarly { .. } => true,
            Self::Io { .. } | Self::NotConnected(_) => {
                matches!(self.errno(), Some(Errno::CONNRESET | Errno::PIPE))
            }
            _ => false,
        }
    }

    /// The phase in which it failed, where one is known.
    #[must_use]
    pub const fn phase(&self) -> Option<Phase> {
        match self {
            Self::Connect { .. } | Self::NotConnected(_) => Some(Phase::Connecting),
            Self::Timeout { phase } | Self::ClosedEarly { phase, .. } | Self::Io { phase, .. } => {
                Some(*phase)
            }
            Self::TooSlow { .. } | Self::Protocol(_) => Some(Phase::Reading),
            Self::Request(_) | Self::TooManyDescriptors(_) | Self::Spent => None,
        }
    }

    /// Whether the peer may have seen the request, or a part of it: a command may have run
    /// though its answer was lost. `false` is certain.
    #[must_use]
    pub fn may_have_been_seen(&self) -> bool {
        self.phase().is_some_and(|phase| phase >= Phase::Sending)
    }

    /// The error number of the system call behind it.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Connect { source, .. } | Self::NotConnected(source) | Self::Io { source, .. } => {
                Errno::from_io_error(source)
            }
            _ => None,
        }
    }

    pub(super) fn io(call: &'static str, phase: Phase, errno: Errno) -> Self {
        Self::Io {
            call,
            phase,
            source: errno.into(),
        }
    }
}
