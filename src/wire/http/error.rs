//! Why a response was refused: which bound, which rule.

use std::fmt;

use crate::wire::excerpt::excerpt;

/// A bound of [`Limits`](super::Limits) that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Bound {
    /// `status_line_bytes`.
    StatusLineBytes,
    /// `head_bytes`, in the head.
    HeadBytes,
    /// `header_lines`, in the head.
    HeaderLines,
    /// `body_bytes`: announced by a length or a chunk size, or reached.
    BodyBytes,
    /// `interim_answers`.
    InterimAnswers,
    /// `chunk_line_bytes`.
    ChunkLineBytes,
    /// `chunk_extension_bytes`.
    ChunkExtensionBytes,
    /// `head_bytes`, in the trailers.
    TrailerBytes,
    /// `header_lines`, in the trailers.
    TrailerLines,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StatusLineBytes => "bytes of status line",
            Self::HeadBytes => "bytes of head",
            Self::HeaderLines => "header lines",
            Self::BodyBytes => "bytes of body",
            Self::InterimAnswers => "interim answers",
            Self::ChunkLineBytes => "bytes of chunk-size line",
            Self::ChunkExtensionBytes => "bytes of chunk extensions",
            Self::TrailerBytes => "bytes of trailers",
            Self::TrailerLines => "trailer lines",
        })
    }
}

/// A rule of the protocol, or one of ours on top of it, that was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// A line ends in CR LF; a bare LF ends nothing (RFC 9112, 2.2).
    BareLf,
    /// CR stands before LF only (RFC 9112, 2.2).
    BareCr,
    /// No NUL or other control byte but tab inside a line (RFC 9110, 5.5).
    ControlByte,
    /// `HTTP-version SP status-code SP [reason]` (RFC 9112, 4); the last space may be missing.
    StatusLine,
    /// HTTP/1.0 or HTTP/1.1.
    Version,
    /// Three digits, 100 to 599 (RFC 9110, 15).
    StatusCode,
    /// No header line begins with white space (RFC 9112, 5.2).
    FoldedLine,
    /// `name ":" value`, the name a token with no white space behind it (RFC 9112, 5.1).
    HeaderLine,
    /// Content-Length has digits only (RFC 9110, 8.6), and fits 64 bits.
    ContentLength,
    /// At most one Content-Length, even where all agree.
    DuplicateLength,
    /// Never both Content-Length and Transfer-Encoding (RFC 9112, 6.3).
    LengthAndCoding,
    /// The only transfer coding is one `chunked` (RFC 9112, 7).
    TransferCoding,
    /// HTTP/1.0 has no transfer coding (RFC 9112, 6.1).
    CodingBeforeHttp11,
    /// 1xx and 204 announce no body (RFC 9110, 8.6; RFC 9112, 6.1).
    BodyForbidden,
    /// No protocol switch was asked for, so 101 is refused (RFC 9110, 15.2.2).
    Upgrade,
    /// A chunk size has 1 to 16 hexadecimal digits, then an extension or the line end
    /// (RFC 9112, 7.1).
    ChunkSize,
    /// A chunk's data ends in CR LF (RFC 9112, 7.1).
    ChunkEnd,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BareLf => "bare LF",
            Self::BareCr => "bare CR",
            Self::ControlByte => "control byte",
            Self::StatusLine => "malformed status line",
            Self::Version => "HTTP version is neither 1.0 nor 1.1",
            Self::StatusCode => "status is not in 100 to 599",
            Self::FoldedLine => "folded header line",
            Self::HeaderLine => "malformed header line",
            Self::ContentLength => "malformed Content-Length",
            Self::DuplicateLength => "more than one Content-Length",
            Self::LengthAndCoding => "both Content-Length and Transfer-Encoding",
            Self::TransferCoding => "transfer coding is not one `chunked`",
            Self::CodingBeforeHttp11 => "transfer coding in HTTP/1.0",
            Self::BodyForbidden => "body announced where none is allowed",
            Self::Upgrade => "protocol switch nobody asked for",
            Self::ChunkSize => "malformed chunk size",
            Self::ChunkEnd => "chunk data not followed by CR LF",
        })
    }
}

/// How far a response had come when its bytes ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// In the status line or the headers.
    Head,
    /// In the body or its chunk framing.
    Body,
    /// In the trailers of a chunked body.
    Trailers,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Head => "head",
            Self::Body => "body",
            Self::Trailers => "trailers",
        })
    }
}

/// Why bytes are not an acceptable response. The same bytes give the same error, however
/// they were cut into pieces.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// A bound of [`Limits`](super::Limits) was reached.
    #[error("Response has more than {limit} {bound}")]
    TooLarge {
        /// Which one.
        bound: Bound,
        /// Its value.
        limit: usize,
    },
    /// A rule was broken.
    #[error("Response is refused: {rule} in `{text}`")]
    Refused {
        /// Which one.
        rule: Rule,
        /// The line that broke it (in chunk framing: the byte), escaped and cut.
        text: String,
    },
    /// The bytes ended before the response did.
    #[error("Response ends inside its {stage}")]
    Truncated {
        /// Where.
        stage: Stage,
    },
    /// The parser was used again after an error.
    #[error("Response was refused before")]
    Poisoned,
}

impl HttpError {
    /// The rule that was broken, if it was one.
    #[must_use]
    pub const fn rule(&self) -> Option<Rule> {
        match self {
            Self::Refused { rule, .. } => Some(*rule),
            _ => None,
        }
    }

    /// The bound that was reached, if it was one.
    #[must_use]
    pub const fn bound(&self) -> Option<Bound> {
        match self {
            Self::TooLarge { bound, .. } => Some(*bound),
            _ => None,
        }
    }

    pub(super) fn refused(rule: Rule, line: &[u8]) -> Self {
        Self::Refused {
            rule,
            text: excerpt(line),
        }
    }

    pub(super) fn too_large(bound: Bound, limit: impl Into<usize>) -> Self {
        Self::TooLarge {
            bound,
            limit: limit.into(),
        }
    }
}
