//! What netlink exchanges fail at.

use std::fmt;
use std::io;

use rustix::io::Errno;

use super::Protocol;

/// What a netlink exchange failed at.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket could not be opened or set up.
    #[error("Cannot open a netlink socket ({protocol:?}): {call}")]
    Open {
        /// The protocol asked for.
        protocol: Protocol,
        /// The system call that failed.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The request did not leave.
    #[error("Cannot send: {step}")]
    Send {
        /// The first step of the datagram.
        step: String,
        /// Why. `EMSGSIZE` where a transaction is larger than the send buffer.
        source: io::Error,
    },
    /// The answer could not be read. `ENOBUFS` where answers were lost.
    #[error("Cannot read the answer: {step}")]
    Receive {
        /// The step whose answer was due.
        step: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel said no.
    #[error(transparent)]
    Refused(Refusal),
    /// No answer before the deadline.
    #[error("No answer in time: {step}")]
    NoAnswer {
        /// The first step without an answer.
        step: String,
    },
    /// The answer broke the protocol.
    #[error("Malformed answer: {step}: {what}")]
    Malformed {
        /// The step whose answer it was.
        step: String,
        /// What was wrong.
        what: &'static str,
    },
    /// The kernel's objects changed while they were being listed; ask again.
    #[error("Listing was interrupted by a change: {step}")]
    Interrupted {
        /// The step that listed.
        step: String,
    },
}

impl NetlinkError {
    /// The error number of the kernel or system call, where there is one.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Open { source, .. }
            | Self::Send { source, .. }
            | Self::Receive { source, .. } => Errno::from_io_error(source),
            Self::Refused(refusal) => Some(refusal.errno),
            _ => None,
        }
    }

    /// Whether the object was not there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.is_missing())
    }
}

/// The kernel's "no" to one request, with its words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Refusal {
    /// What the request was for.
    pub step: String,
    /// The error number.
    #[source]
    pub errno: Errno,
    /// The extended-ack text, cut at 256 bytes, where the kernel gave one.
    pub text: Option<String>,
    /// Offset of the offending attribute from the start of the request.
    pub offset: Option<u32>,
}

impl Refusal {
    /// Whether the object was not there: `ENOENT`, `ENODEV`, `ESRCH`, `EADDRNOTAVAIL`.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        [Errno::NOENT, Errno::NODEV, Errno::SRCH, Errno::ADDRNOTAVAIL].contains(&self.errno)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kernel refused: {}", self.step)?;
        match &self.text {
            Some(text) => write!(f, ": {text}"),
            None => Ok(()),
        }
    }
}
