//! The HTTP of the API socket, without sockets: requests in, responses out.
//!
//! Follows micro-http as v52 and v53 use it (`connection.rs`, `response.rs` there): only
//! GET, PUT and PATCH, lines of at most 1024 bytes with CRLF, no chunked bodies, bodies of at
//! most 51,200 bytes, an empty reason phrase. One thing is simpler: after a parse error every
//! later byte on the connection is garbage to it, where the original depends on what was
//! left in its buffer.

use std::os::fd::OwnedFd;

/// Bytes that one read takes, and the longest line.
pub(super) const BUFFER: usize = 1024;
/// The largest body.
const MAX_BODY: u64 = 51_200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Put,
    Patch,
}

/// One request as the API sees it.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: Method,
    /// The absolute path, query included; empty where the URI has none.
    pub(super) path: String,
    /// `None` without a `Content-Length` above zero.
    pub(super) body: Option<Vec<u8>>,
    /// Descriptors that came with it.
    pub(super) fds: Vec<OwnedFd>,
}

/// What came out of some bytes.
#[derive(Debug)]
pub(super) enum Item {
    Request(Request),
    /// `Expect: 100-continue` wants its answer.
    Continue,
}

#[derive(Debug)]
enum State {
    Line,
    Headers,
    Body,
    /// A parse error happened: nothing is understood any more.
    Lost,
}

/// The parser of one connection.
#[derive(Debug)]
pub(super) struct Parser {
    state: State,
    buffer: Vec<u8>,
    method: Method,
    uri: String,
    content_length: u64,
    expect: bool,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Parser {
    pub(super) fn new() -> Self {
        Self {
            state: State::Line,
            buffer: Vec::new(),
            method: Method::Get,
            uri: String::new(),
            content_length: 0,
            expect: false,
            body: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// How many bytes the next read may bring.
    pub(super) fn room(&self) -> usize {
        BUFFER - self.buffer.len()
    }

    /// Takes the bytes of one read, at most [`Parser::room`], and the descriptors with them.
    ///
    /// # Errors
    /// The reason, as the original words it; every request of this read is lost.
    pub(super) fn feed(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Vec<Item>, String> {
        self.fds.extend(fds);
        if matches!(self.state, State::Lost) {
            return Err("Invalid request.".to_owned());
        }
        self.buffer.extend_from_slice(bytes);
        let mut items = Vec::new();
        let parsed = self.parse(&mut items);
        if parsed.is_err() {
            self.state = State::Lost;
            self.buffer.clear();
        }
        parsed.map(|()| items)
    }

    fn parse(&mut self, items: &mut Vec<Item>) -> Result<(), String> {
        loop {
            match self.state {
                State::Body => {
                    let missing = self.content_length as usize - self.body.len();
                    let take = missing.min(self.buffer.len());
                    self.body.extend(self.buffer.drain(..take));
                    if take < missing {
                        return Ok(());
                    }
                    self.complete(items);
                }
                State::Line => {
                    let Some(line) = self.line("Invalid request.")? else {
                        return Ok(());
                    };
                    (self.method, self.uri) = request_line(&line)?;
                    self.content_length = 0;
                    self.expect = false;
                    self.state = State::Headers;
                }
                State::Headers => {
                    let Some(line) = self.line("")? else {
                        return Ok(());
                    };
                    if !line.is_empty() {
                        self.header(&line)?;
                    } else if self.content_length == 0 {
                        self.complete(items);
                    } else if self.content_length > MAX_BODY {
                        return Err(format!(
                            "Request payload with size {} is larger than the limit of {MAX_BODY} allowed by server.",
                            self.content_length
                        ));
                    } else {
                        if self.expect {
                            items.push(Item::Continue);
                        }
                        self.state = State::Body;
                    }
                }
                State::Lost => return Ok(()),
            }
        }
    }

    /// The next line without its end, `None` until it is all there.
    fn line(&mut self, too_long: &str) -> Result<Option<Vec<u8>>, String> {
        let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\r\n") else {
            if self.buffer.len() < BUFFER {
                return Ok(None);
            }
            return Err(if too_long.is_empty() {
                format!(
                    "Invalid header. Reason: Invalid content length. Header: {}",
                    String::from_utf8_lossy(&self.buffer)
                )
            } else {
                too_long.to_owned()
            });
        };
        let line = self.buffer[..end].to_vec();
        self.buffer.drain(..end + 2);
        Ok(Some(line))
    }

    fn header(&mut self, line: &[u8]) -> Result<(), String> {
        let text = std::str::from_utf8(line).map_err(|error| {
            format!("Invalid header. Reason: Header contains invalid characters. Key: {error}")
        })?;
        let Some((name, value)) = text.split_once(':') else {
            return Err(format!(
                "Invalid header. Reason: Header is incorrectly formatted. Key: {text}"
            ));
        };
        let value = value.trim();
        match name.trim().to_ascii_lowercase().as_str() {
            "content-length" => {
                self.content_length = value.parse::<u32>().map(u64::from).map_err(|_| {
                    format!(
                        "Invalid header. Reason: Invalid value. Key:Content-Length; Value: {value}"
                    )
                })?;
            }
            "expect" => self.expect = value == "100-continue",
            "accept-encoding" => {
                let refused = ["identity;q=0", "*;q=0"];
                if value.split(',').any(|v| refused.contains(&v.trim())) {
                    return Err(format!(
                        "Invalid header. Reason: Invalid value. Key:Accept-Encoding; Value:{value}"
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn complete(&mut self, items: &mut Vec<Item>) {
        self.state = State::Line;
        items.push(Item::Request(Request {
            method: self.method,
            path: absolute_path(&self.uri).to_owned(),
            body: (self.content_length > 0).then(|| std::mem::take(&mut self.body)),
            fds: std::mem::take(&mut self.fds),
        }));
    }
}

fn request_line(line: &[u8]) -> Result<(Method, String), String> {
    let mut words = line.splitn(3, |b| *b == b' ');
    let (Some(method), Some(uri), Some(version)) = (words.next(), words.next(), words.next())
    else {
        return Err("Invalid request.".to_owned());
    };
    let method = match method {
        b"GET" => Method::Get,
        b"PUT" => Method::Put,
        b"PATCH" => Method::Patch,
        _ => return Err("Invalid HTTP Method: Unsupported HTTP method.".to_owned()),
    };
    if uri.is_empty() {
        return Err("Invalid URI: Empty URI not allowed.".to_owned());
    }
    let uri = std::str::from_utf8(uri)
        .map_err(|_| "Invalid URI: Cannot parse URI as UTF-8.".to_owned())?;
    if !matches!(version, b"HTTP/1.0" | b"HTTP/1.1") {
        return Err("Invalid HTTP Version: Unsupported HTTP version.".to_owned());
    }
    Ok((method, uri.to_owned()))
}

fn absolute_path(uri: &str) -> &str {
    match uri.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("", |at| &rest[at..]),
        None if uri.starts_with('/') => uri,
        None => "",
    }
}

/// A response of the API proper. `None` leaves out the body's headers too.
pub(super) fn response(status: u16, body: Option<&[u8]>) -> Vec<u8> {
    encode(status, "Cloud Hypervisor API", body)
}

/// A response that the HTTP layer makes by itself.
fn layer_response(status: u16, body: Option<&[u8]>) -> Vec<u8> {
    encode(status, "Firecracker API", body)
}

/// `100 Continue`.
pub(super) fn go_on() -> Vec<u8> {
    layer_response(100, None)
}

/// What a request that does not parse gets. The newline inside the string is the original's.
pub(super) fn parse_error(reason: &str) -> Vec<u8> {
    let body =
        format!("{{ \"error\": \"{reason}\nAll previous unanswered requests will be dropped.\" }}");
    layer_response(400, Some(body.as_bytes()))
}

/// What the eleventh connection gets.
pub(super) const FULL: &[u8] = b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\n\
Content-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }";

fn encode(status: u16, server: &str, body: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = format!("HTTP/1.1 {status} \r\nServer: {server}\r\nConnection: keep-alive\r\n")
        .into_bytes();
    if let Some(body) = body {
        let length = body.len();
        bytes.extend_from_slice(
            format!("Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n")
                .as_bytes(),
        );
        bytes.extend_from_slice(body);
    } else {
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_all(bytes: &[u8], chunk: usize) -> Result<Vec<Item>, String> {
        let mut parser = Parser::new();
        let mut items = Vec::new();
        for piece in bytes.chunks(chunk) {
            let mut rest = piece;
            while !rest.is_empty() {
                let take = rest.len().min(parser.room());
                items.extend(parser.feed(&rest[..take], Vec::new())?);
                rest = &rest[take..];
            }
        }
        Ok(items)
    }

    #[test]
    fn gives_the_same_requests_at_any_chunking() {
        let bytes = b"PUT /api/v1/vm.resize HTTP/1.1\r\nHost: l\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}GET http://h/api/v1/vmm.ping HTTP/1.0\r\n\r\n";
        for chunk in 1..=bytes.len() {
            let items = parse_all(bytes, chunk).unwrap();
            assert_eq!(items.len(), 3, "chunk {chunk}");
            assert!(matches!(items[0], Item::Continue), "chunk {chunk}");
            let Item::Request(first) = &items[1] else {
                panic!("chunk {chunk}")
            };
            assert_eq!(first.method, Method::Put);
            assert_eq!(first.path, "/api/v1/vm.resize");
            assert_eq!(first.body.as_deref(), Some(&b"{}"[..]));
            let Item::Request(second) = &items[2] else {
                panic!("chunk {chunk}")
            };
            assert_eq!(second.path, "/api/v1/vmm.ping");
            assert_eq!(second.body, None);
        }
    }

    #[test]
    fn refuses_what_the_original_refuses_in_its_words() {
        let long = "a".repeat(1100);
        let cases = [
            ("no words", "GARBAGE\r\n\r\n".to_owned(), "Invalid request."),
            (
                "method",
                "POST / HTTP/1.1\r\n\r\n".to_owned(),
                "Invalid HTTP Method: Unsupported HTTP method.",
            ),
            (
                "version",
                "GET / HTTP/2.0\r\n\r\n".to_owned(),
                "Invalid HTTP Version: Unsupported HTTP version.",
            ),
            (
                "empty uri",
                "GET  HTTP/1.1\r\n\r\n".to_owned(),
                "Invalid URI: Empty URI not allowed.",
            ),
            (
                "long line",
                format!("GET /{long} HTTP/1.1\r\n\r\n"),
                "Invalid request.",
            ),
            (
                "no colon",
                "GET / HTTP/1.1\r\noops\r\n\r\n".to_owned(),
                "Invalid header. Reason: Header is incorrectly formatted. Key: oops",
            ),
            (
                "length",
                "GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n".to_owned(),
                "Invalid header. Reason: Invalid value. Key:Content-Length; Value: x",
            ),
            (
                "big",
                "PUT / HTTP/1.1\r\nContent-Length: 51201\r\n\r\n".to_owned(),
                "Request payload with size 51201 is larger than the limit of 51200 allowed by server.",
            ),
            (
                "encoding",
                "GET / HTTP/1.1\r\nAccept-Encoding: identity;q=0\r\n\r\n".to_owned(),
                "Invalid header. Reason: Invalid value. Key:Accept-Encoding; Value:identity;q=0",
            ),
        ];
        for (name, bytes, reason) in cases {
            assert_eq!(
                parse_all(bytes.as_bytes(), 4096).unwrap_err(),
                reason,
                "{name}"
            );
        }
    }

    #[test]
    fn takes_many_headers_as_long_as_each_line_fits() {
        let header = format!("X: {}\r\n", "a".repeat(900));
        let bytes = format!("GET / HTTP/1.1\r\n{}\r\n", header.repeat(20));
        assert_eq!(parse_all(bytes.as_bytes(), 1024).unwrap().len(), 1);
    }
}
