//! The incremental response parser.
//!
//! Every decision is taken at a byte position that does not depend on how the input was cut:
//! lines are judged when their LF is there, bounds when the first byte beyond them is. So the
//! same bytes give the same answer, error included, in one piece or byte by byte.

use memchr::memchr;

use super::error::{Bound, HttpError, Rule, Stage};
use super::field;
use super::headers::Headers;
use super::{Limits, Method, Response};

/// What [`ResponseParser::feed`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All input was taken, and the response needs more, or the end of the stream.
    Incomplete,
    /// The response is complete.
    Complete {
        /// How many bytes of this input belonged to it. Where more were given, the peer sent
        /// something nobody asked for: the connection must not be used again.
        consumed: usize,
    },
}

/// Parses one response from pieces of any size.
#[derive(Debug)]
pub struct ResponseParser {
    method: Method,
    pub(super) limits: Limits,
    pub(super) state: State,
    /// The head so far; behind it, later, the trailers.
    pub(super) headers: Headers,
    /// Where in that buffer the current line begins.
    pub(super) line: usize,
    body: Vec<u8>,
    pub(super) status: u16,
    pub(super) facts: Facts,
    interim: u8,
    chunk: ChunkLine,
    extension_bytes: usize,
    /// Length of the head, once trailers follow it in the buffer.
    head_end: usize,
    trailer_lines: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    StatusLine,
    HeaderLines,
    /// A body of which this many bytes are missing.
    Length(u64),
    UntilEnd,
    ChunkSize,
    /// Chunk data of which this many bytes are missing.
    ChunkData(u64),
    /// The CR LF behind chunk data.
    ChunkDataCr,
    ChunkDataLf,
    Trailers,
    Complete,
    Poisoned,
}

/// What the header lines say about framing.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Facts {
    is_http11: bool,
    length: Option<u64>,
    chunked: bool,
    close: bool,
    until_end: bool,
}

/// The chunk-size line so far.
#[derive(Debug, Clone, Copy, Default)]
struct ChunkLine {
    size: u64,
    digits: u8,
    bytes: u16,
    part: ChunkPart,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ChunkPart {
    #[default]
    Size,
    /// White space behind the size: only an extension may follow.
    Blank,
    Extension,
    /// CR was there.
    End,
}

/// Room for the head of every answer seen so far, so that it is allocated once even where it
/// comes in pieces.
const HEAD_CAPACITY: usize = 512;

impl ResponseParser {
    /// A parser for the answer to a request of the given method.
    #[must_use]
    #[inline]
    pub fn new(method: Method, limits: Limits) -> Self {
        Self {
            method,
            limits,
            state: State::StatusLine,
            headers: Headers::default(),
            line: 0,
            body: Vec::new(),
            status: 0,
            facts: Facts::default(),
            interim: 0,
            chunk: ChunkLine::default(),
            extension_bytes: 0,
            head_end: 0,
            trailer_lines: 0,
        }
    }

    /// Takes the next bytes of the stream.
    ///
    /// # Errors
    /// [`HttpError`] at the first byte that breaks a rule or a bound; the parser is poisoned
    /// from then on, and the connection must be given up.
    pub fn feed(&mut self, input: &[u8]) -> Result<Progress, HttpError> {
        let mut rest = input;
        let result = self.run(&mut rest);
        match result {
            Ok(true) => Ok(Progress::Complete {
                consumed: input.len() - rest.len(),
            }),
            Ok(false) => Ok(Progress::Incomplete),
            Err(error) => {
                self.state = State::Poisoned;
                Err(error)
            }
        }
    }

    /// Whether the head of the final answer (not of an interim one) is complete.
    #[must_use]
    pub const fn has_head(&self) -> bool {
        !matches!(
            self.state,
            State::StatusLine | State::HeaderLines | State::Poisoned
        )
    }

    /// The response, once [`feed`](Self::feed) has said [`Progress::Complete`] or the stream
    /// has ended.
    ///
    /// # Errors
    /// [`HttpError::Truncated`] where it is not complete, [`HttpError::Poisoned`] after an
    /// error of `feed`.
    #[inline]
    pub fn finish(self) -> Result<Response, HttpError> {
        let stage = match self.state {
            State::Complete | State::UntilEnd => {
                let facts = self.facts;
                return Ok(Response {
                    status: self.status,
                    headers: self.headers,
                    body: self.body,
                    keep_alive: facts.is_http11 && !facts.close && !facts.until_end,
                });
            }
            State::Poisoned => return Err(HttpError::Poisoned),
            State::StatusLine | State::HeaderLines => Stage::Head,
            State::Trailers => Stage::Trailers,
            State::Length(_)
            | State::ChunkSize
            | State::ChunkData(_)
            | State::ChunkDataCr
            | State::ChunkDataLf => Stage::Body,
        };
        Err(HttpError::Truncated { stage })
    }

    /// Works through the input. `true`: the response is complete.
    fn run(&mut self, rest: &mut &[u8]) -> Result<bool, HttpError> {
        loop {
            match self.state {
                State::Complete => return Ok(true),
                State::Poisoned => return Err(HttpError::Poisoned),
                _ if rest.is_empty() => return Ok(false),
                State::StatusLine => self.status_line(rest)?,
                State::HeaderLines => self.header_lines(rest)?,
                State::Length(missing) => {
                    let missing = missing - self.take_body(rest, missing);
                    self.state = match missing {
                        0 => State::Complete,
                        _ => State::Length(missing),
                    };
                }
                State::UntilEnd => {
                    let room = self.limits.body_bytes - self.body.len();
                    if rest.len() > room {
                        return Err(self.body_too_large());
                    }
                    self.take_body(rest, u64::MAX);
                }
                State::ChunkSize => self.chunk_size(rest)?,
                State::ChunkData(missing) => {
                    let missing = missing - self.take_body(rest, missing);
                    self.state = match missing {
                        0 => State::ChunkDataCr,
                        _ => State::ChunkData(missing),
                    };
                }
                State::ChunkDataCr => self.chunk_end(rest, b'\r', State::ChunkDataLf)?,
                State::ChunkDataLf => self.chunk_end(rest, b'\n', State::ChunkSize)?,
                State::Trailers => self.trailers(rest)?,
            }
        }
    }

    fn status_line(&mut self, rest: &mut &[u8]) -> Result<(), HttpError> {
        if self.headers.buffer().is_empty() {
            if self.quick_head(rest)? {
                return Ok(());
            }
            self.headers.buffer_mut().reserve(HEAD_CAPACITY);
        }
        let (bound, limit) = if self.limits.status_line_bytes <= self.limits.head_bytes {
            (Bound::StatusLineBytes, self.limits.status_line_bytes)
        } else {
            (Bound::HeadBytes, self.limits.head_bytes)
        };
        let Some(end) = self.take_line(rest, bound, limit, 0)? else {
            return Ok(());
        };
        let line = &self.headers.buffer()[self.line..end - 2];
        let (is_http11, status) =
            field::status_line(line).map_err(|rule| HttpError::refused(rule, line))?;
        if status == 101 {
            return Err(HttpError::refused(Rule::Upgrade, line));
        }
        self.status = status;
        self.facts = Facts::of(is_http11);
        self.headers.begin(end);
        self.line = end;
        self.state = State::HeaderLines;
        Ok(())
    }

    fn header_lines(&mut self, rest: &mut &[u8]) -> Result<(), HttpError> {
        let limit = self.limits.head_bytes;
        while let Some(end) = self.take_line(rest, Bound::HeadBytes, limit, 0)? {
            let start = std::mem::replace(&mut self.line, end);
            if end - start == 2 {
                return self.end_of_head();
            }
            if self.headers.len() >= usize::from(self.limits.header_lines) {
                let limit = self.limits.header_lines;
                return Err(HttpError::too_large(Bound::HeaderLines, limit));
            }
            let line = &self.headers.buffer()[start..end - 2];
            field::header_line(line)
                .and_then(|(name, value)| self.facts.note(name, value))
                .map_err(|rule| HttpError::refused(rule, line))?;
            self.headers.count();
        }
        Ok(())
    }

    /// Chooses the body's framing (RFC 9112, 6.3).
    pub(super) fn end_of_head(&mut self) -> Result<(), HttpError> {
        let facts = self.facts;
        let refused = |rule| Err(HttpError::refused(rule, self.status_text()));
        if facts.chunked && facts.length.is_some() {
            return refused(Rule::LengthAndCoding);
        }
        if facts.chunked && !facts.is_http11 {
            return refused(Rule::CodingBeforeHttp11);
        }
        let never_has_body = self.status < 200 || self.status == 204;
        if never_has_body && (facts.chunked || facts.length.is_some_and(|n| n > 0)) {
            return refused(Rule::BodyForbidden);
        }
        if self.status < 200 {
            return self.next_answer();
        }
        self.head_end = self.line;
        self.state = if never_has_body || self.status == 304 || self.method == Method::Head {
            State::Complete
        } else if facts.chunked {
            State::ChunkSize
        } else if let Some(length) = facts.length {
            if length > self.limits.body_bytes as u64 {
                return Err(self.body_too_large());
            }
            match length {
                0 => State::Complete,
                _ => State::Length(length),
            }
        } else {
            self.facts.until_end = true;
            State::UntilEnd
        };
        Ok(())
    }

    /// After an interim answer the next head begins.
    fn next_answer(&mut self) -> Result<(), HttpError> {
        if self.interim >= self.limits.interim_answers {
            let limit = self.limits.interim_answers;
            return Err(HttpError::too_large(Bound::InterimAnswers, limit));
        }
        self.interim += 1;
        self.headers.clear();
        self.line = 0;
        self.state = State::StatusLine;
        Ok(())
    }

    /// Moves bytes up to the next LF into the head buffer. `Some` is where the line ends in
    /// it, line end included; `None`: the input ended first. `base` is where the part of the
    /// buffer begins that the bound counts.
    fn take_line(
        &mut self,
        rest: &mut &[u8],
        bound: Bound,
        limit: u16,
        base: usize,
    ) -> Result<Option<usize>, HttpError> {
        let buffer = self.headers.buffer_mut();
        let room = usize::from(limit).saturating_sub(buffer.len() - base);
        let window = &rest[..rest.len().min(room)];
        let Some(lf) = memchr(b'\n', window) else {
            if rest.len() > room {
                return Err(HttpError::too_large(bound, limit));
            }
            buffer.extend_from_slice(window);
            *rest = &[];
            return Ok(None);
        };
        buffer.extend_from_slice(&window[..=lf]);
        *rest = &rest[lf + 1..];
        let end = buffer.len();
        match &buffer[self.line..] {
            [.., b'\r', b'\n'] => Ok(Some(end)),
            line => Err(HttpError::refused(Rule::BareLf, line)),
        }
    }

    /// Moves at most `most` bytes into the body; the bound was checked before.
    fn take_body(&mut self, rest: &mut &[u8], most: u64) -> u64 {
        let count = usize::try_from(most).map_or(rest.len(), |most| rest.len().min(most));
        let (taken, left) = rest.split_at(count);
        append(&mut self.body, taken);
        *rest = left;
        count as u64
    }

    fn chunk_size(&mut self, rest: &mut &[u8]) -> Result<(), HttpError> {
        while let Some((&byte, left)) = rest.split_first() {
            if self.chunk.bytes >= self.limits.chunk_line_bytes {
                let limit = self.limits.chunk_line_bytes;
                return Err(HttpError::too_large(Bound::ChunkLineBytes, limit));
            }
            *rest = left;
            self.chunk.bytes += 1;
            if self.chunk.part == ChunkPart::End {
                if byte != b'\n' {
                    return Err(HttpError::refused(Rule::BareCr, b"\r"));
                }
                return self.begin_chunk();
            }
            let before = self.chunk.part;
            self.chunk
                .take(byte)
                .map_err(|rule| HttpError::refused(rule, &[byte]))?;
            if before != ChunkPart::Size {
                self.extension_bytes += 1;
                if self.extension_bytes > usize::from(self.limits.chunk_extension_bytes) {
                    let limit = self.limits.chunk_extension_bytes;
                    return Err(HttpError::too_large(Bound::ChunkExtensionBytes, limit));
                }
            }
        }
        Ok(())
    }

    fn begin_chunk(&mut self) -> Result<(), HttpError> {
        let size = std::mem::take(&mut self.chunk).size;
        let room = self.limits.body_bytes - self.body.len();
        if size > room as u64 {
            return Err(self.body_too_large());
        }
        self.state = match size {
            0 => State::Trailers,
            _ => State::ChunkData(size),
        };
        Ok(())
    }

    fn chunk_end(&mut self, rest: &mut &[u8], want: u8, next: State) -> Result<(), HttpError> {
        match rest.split_first() {
            Some((&byte, left)) if byte == want => {
                *rest = left;
                self.state = next;
                Ok(())
            }
            Some((&byte, _)) => Err(HttpError::refused(Rule::ChunkEnd, &[byte])),
            None => Ok(()),
        }
    }

    /// Trailers are checked like headers and dropped (RFC 9112, 7.1.2).
    fn trailers(&mut self, rest: &mut &[u8]) -> Result<(), HttpError> {
        let limit = self.limits.head_bytes;
        while let Some(end) = self.take_line(rest, Bound::TrailerBytes, limit, self.head_end)? {
            let start = std::mem::replace(&mut self.line, end);
            if end - start == 2 {
                self.headers.buffer_mut().truncate(self.head_end);
                self.state = State::Complete;
                return Ok(());
            }
            if self.trailer_lines >= self.limits.header_lines {
                let limit = self.limits.header_lines;
                return Err(HttpError::too_large(Bound::TrailerLines, limit));
            }
            self.trailer_lines += 1;
            let line = &self.headers.buffer()[start..end - 2];
            field::header_line(line).map_err(|rule| HttpError::refused(rule, line))?;
        }
        Ok(())
    }

    fn body_too_large(&self) -> HttpError {
        HttpError::too_large(Bound::BodyBytes, self.limits.body_bytes)
    }

    /// The status line, for errors that concern the head as a whole.
    fn status_text(&self) -> &[u8] {
        let head = self.headers.buffer();
        &head[..memchr(b'\r', head).unwrap_or(head.len())]
    }
}

/// Appends to a buffer. A first piece that is no crumb gets just the room that it needs, by
/// a shorter way than a growing buffer takes; crumbs share the least that a buffer has.
pub(super) fn append(buffer: &mut Vec<u8>, bytes: &[u8]) {
    if buffer.capacity() == 0 && bytes.len() >= 8 {
        *buffer = bytes.to_vec();
    } else {
        buffer.extend_from_slice(bytes);
    }
}

impl Facts {
    pub(super) fn of(is_http11: bool) -> Self {
        Self {
            is_http11,
            ..Self::default()
        }
    }

    /// Takes note of a header line that concerns framing. The name was checked to be a token,
    /// the value to have no control bytes.
    pub(super) fn note(&mut self, name: &[u8], value: &[u8]) -> Result<(), Rule> {
        match name.len() {
            10 if field::is_word(name, b"connection") => {
                let value = field::trim(value);
                self.close |=
                    !field::is_word(value, b"keep-alive") && field::has_word(value, "close");
            }
            14 if field::is_word(name, b"content-length") => {
                let length = field::content_length(field::trim(value))?;
                if self.length.replace(length).is_some() {
                    return Err(Rule::DuplicateLength);
                }
            }
            17 if field::is_word(name, b"transfer-encoding") => {
                let value = field::trim(value);
                if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(Rule::TransferCoding);
                }
                self.chunked = true;
            }
            _ => {}
        }
        Ok(())
    }
}

impl ChunkLine {
    /// One byte of a chunk-size line before its CR.
    fn take(&mut self, byte: u8) -> Result<(), Rule> {
        match (self.part, byte) {
            (ChunkPart::Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                if self.digits == 16 {
                    return Err(Rule::ChunkSize);
                }
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                self.size = self.size << 4 | u64::from(digit);
                self.digits += 1;
            }
            (ChunkPart::Size, _) if self.digits == 0 => return Err(Rule::ChunkSize),
            (ChunkPart::Size | ChunkPart::Extension, b'\r') => self.part = ChunkPart::End,
            (ChunkPart::Size | ChunkPart::Blank, b';') => self.part = ChunkPart::Extension,
            (ChunkPart::Size | ChunkPart::Blank, b' ' | b'\t') => self.part = ChunkPart::Blank,
            (_, b'\n') => return Err(Rule::BareLf),
            (ChunkPart::Extension, _) if !field::is_control(byte) => {}
            (ChunkPart::Extension, _) => return Err(Rule::ControlByte),
            _ => return Err(Rule::ChunkSize),
        }
        Ok(())
    }
}
