//! A sans-IO HTTP/1.1 client codec (RFC 9110, RFC 9112) for peers that are not trusted.
//!
//! [`Request::encode`] turns a request into bytes that Cloud Hypervisor's HTTP server takes;
//! [`ResponseParser`] turns bytes back into a [`Response`], however they were cut into pieces.
//! Neither knows sockets or clocks.
//!
//! The parser is strict where leniency is what attacks are made of: it refuses two lengths,
//! a length beside a transfer coding, any coding but `chunked`, folded lines, bare CR or LF,
//! control bytes and upgrades. It is lenient only where Cloud Hypervisor needs it: the reason
//! phrase may be empty, and the space before it missing.
//!
//! Everything has a bound from [`Limits`], and memory grows with what has arrived, never with
//! what was announced.

mod error;
mod field;
mod headers;
mod parser;
mod quick;
mod request;

use crate::wire::excerpt::excerpt;

pub use error::{Bound, HttpError, Rule, Stage};
pub use headers::{Headers, Iter};
pub use parser::{Progress, ResponseParser};
pub use request::{EncodedRequest, MAX_LINE_BYTES, Method, Request, RequestError};

/// What a peer may send at most. Reaching a bound is a typed error, [`HttpError::TooLarge`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the status line, its line end included.
    pub status_line_bytes: u16,
    /// Bytes of the status line and all header lines, line ends and the closing empty line
    /// included. The trailers of a chunked body have the same bound of their own.
    pub head_bytes: u16,
    /// Number of header lines, and again of trailer lines.
    pub header_lines: u16,
    /// Bytes of the body, without its transfer coding.
    pub body_bytes: usize,
    /// Interim (1xx) answers before the final one.
    pub interim_answers: u8,
    /// Bytes of one chunk-size line, its extensions and line end included.
    pub chunk_line_bytes: u16,
    /// Bytes of the chunk extensions of one body together.
    pub chunk_extension_bytes: u16,
}

impl Limits {
    /// For the guest agent: the guest may be hostile, its control answers are small.
    pub const GUEST: Self = Self {
        status_line_bytes: 256,
        head_bytes: 8 * 1024,
        header_lines: 64,
        body_bytes: 64 * 1024,
        interim_answers: 2,
        chunk_line_bytes: 256,
        chunk_extension_bytes: 1024,
    };

    /// For Cloud Hypervisor: `vm.info` carries the whole configuration and device tree, so
    /// the body may have 8 MiB. Everything else is as tight as for the guest.
    pub const VMM: Self = Self {
        body_bytes: 8 * 1024 * 1024,
        ..Self::GUEST
    };
}

/// One complete answer.
///
/// The status is reported as it came: what a redirect or a 503 means is for the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code, 200 to 599.
    pub status: u16,
    /// The header lines, in order. Trailers are checked and dropped.
    pub headers: Headers,
    /// The body, with its transfer coding removed.
    pub body: Vec<u8>,
    /// Whether the peer will take another request on this connection: HTTP/1.1, a body that
    /// does not end with the connection, and no `Connection: close`. It says nothing of bytes
    /// that came after the message; see [`Progress::Complete`].
    pub keep_alive: bool,
}

impl Response {
    /// Whether the status is 2xx.
    #[must_use]
    pub const fn is_success(&self) -> bool {
        matches!(self.status, 200..=299)
    }

    /// The body for logs and errors: escaped, cut at 256 bytes.
    #[must_use]
    pub fn excerpt(&self) -> String {
        excerpt(&self.body)
    }
}
