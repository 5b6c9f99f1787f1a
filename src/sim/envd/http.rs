//! The guest agent's side of HTTP/1.1, without sockets.
//!
//! Answers have the bytes of hyper (Wrenn) or Go's `net/http` (E2B), as far as they were
//! captured.

use std::collections::VecDeque;

/// Longest request head.
const MAX_HEAD: usize = 64 << 10;
/// Longest body (axum's default limit).
pub(crate) const MAX_BODY: u64 = 2 << 20;

/// One request to the guest agent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Path without query.
    pub(crate) path: String,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The body was longer than [`MAX_BODY`] and has been thrown away.
    pub(crate) oversized: bool,
    pub(crate) close: bool,
}

impl Request {
    /// The value of a header, by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(n, _)| n == name);
        found.next().map(|(_, value)| value.as_str())
    }
}

/// What was not HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotHttp;

#[derive(Debug)]
struct Awaited {
    request: Request,
    length: u64,
    skipped: u64,
}

/// Cuts the bytes of one connection into requests.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    input: VecDeque<u8>,
    awaited: Option<Awaited>,
}

impl Requests {
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.input.extend(bytes);
    }

    /// The next complete request.
    pub(crate) fn next(&mut self) -> Result<Option<Request>, NotHttp> {
        if self.awaited.is_none() {
            let head = self.input.make_contiguous();
            let Some(end) = head.windows(4).position(|four| four == b"\r\n\r\n") else {
                let hopeless = head.len() > MAX_HEAD;
                return if hopeless { Err(NotHttp) } else { Ok(None) };
            };
            let text = String::from_utf8_lossy(&head[..end]).into_owned();
            self.input.drain(..end + 4);
            self.awaited = Some(parse_head(&text).ok_or(NotHttp)?);
        }
        let Some(awaited) = &mut self.awaited else {
            return Ok(None);
        };
        let missing = awaited.length - awaited.skipped - awaited.request.body.len() as u64;
        let take = missing.min(self.input.len() as u64) as usize;
        let bytes = self.input.drain(..take);
        if awaited.request.oversized {
            drop(bytes);
            awaited.skipped += take as u64;
        } else {
            awaited.request.body.extend(bytes);
        }
        if (take as u64) < missing {
            return Ok(None);
        }
        Ok(self.awaited.take().map(|awaited| awaited.request))
    }
}

fn parse_head(text: &str) -> Option<Awaited> {
    let mut lines = text.split("\r\n");
    let mut words = lines.next()?.splitn(3, ' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    if method.is_empty() || !matches!(version, "HTTP/1.0" | "HTTP/1.1") || !target.starts_with('/')
    {
        return None;
    }
    let mut request = Request {
        method: method.to_owned(),
        path: target.split('?').next()?.to_owned(),
        close: version == "HTTP/1.0",
        ..Request::default()
    };
    for line in lines {
        let (name, value) = line.split_once(':')?;
        let name = name.to_ascii_lowercase();
        request.headers.push((name, value.trim().to_owned()));
    }
    match request
        .header("connection")
        .map(str::to_ascii_lowercase)
        .as_deref()
    {
        Some("close") => request.close = true,
        Some("keep-alive") => request.close = false,
        _ => {}
    }
    let length = match request.header("content-length") {
        Some(text) => text.parse().ok()?,
        None => 0,
    };
    request.oversized = length > MAX_BODY;
    Some(Awaited {
        request,
        length,
        skipped: 0,
    })
}

/// How a body is framed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    /// Neither length nor bytes (204).
    None,
    Sized(Vec<u8>),
    Chunked(Vec<u8>),
}

/// One answer before it is bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Body,
    /// Came from a route that exists, so the CORS layer added its headers.
    pub(crate) matched: bool,
}

impl Answer {
    pub(crate) fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Body::None,
            matched: true,
        }
    }

    pub(crate) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn sized(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = Body::Sized(body.into());
        self
    }

    pub(crate) fn chunked(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = Body::Chunked(body.into());
        self
    }

    pub(crate) fn unmatched(mut self) -> Self {
        self.matched = false;
        self
    }

    /// The bytes, with `date` as the guest's clock has it.
    pub(crate) fn encode(&self, close: bool, date: &str, style: Style) -> Vec<u8> {
        let mut text = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        let mut put = |name: &str, value: &str| {
            let name = style.spell(name);
            text.push_str(&format!("{name}: {value}\r\n"));
        };
        for (name, value) in &self.headers {
            put(name, value);
        }
        match &self.body {
            Body::None => {}
            Body::Sized(bytes) => put("content-length", &bytes.len().to_string()),
            Body::Chunked(_) => put("transfer-encoding", "chunked"),
        }
        if self.matched && style == Style::Hyper {
            for (name, value) in CORS {
                put(name, value);
            }
        }
        if close {
            put("connection", "close");
        }
        put("date", date);
        text.push_str("\r\n");
        let mut bytes = text.into_bytes();
        match &self.body {
            Body::None => {}
            Body::Sized(body) => bytes.extend_from_slice(body),
            Body::Chunked(body) => {
                if !body.is_empty() {
                    bytes.extend_from_slice(format!("{:x}\r\n", body.len()).as_bytes());
                    bytes.extend_from_slice(body);
                    bytes.extend_from_slice(b"\r\n");
                }
                bytes.extend_from_slice(b"0\r\n\r\n");
            }
        }
        bytes
    }
}

/// Whose spelling of header names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// Lower case.
    Hyper,
    /// `Canonical-Form`.
    Go,
}

impl Style {
    fn spell(self, name: &str) -> String {
        if self == Self::Hyper {
            return name.to_owned();
        }
        let words = name.split('-').map(|word| {
            let (first, rest) = word.split_at(word.len().min(1));
            first.to_ascii_uppercase() + rest
        });
        words.collect::<Vec<_>>().join("-")
    }
}

/// On every matched route of Wrenn's agent.
pub(crate) const CORS: [(&str, &str); 3] = [
    (
        "vary",
        "origin, access-control-request-method, access-control-request-headers",
    ),
    ("access-control-allow-origin", "*"),
    (
        "access-control-expose-headers",
        "location,cache-control,x-content-type-options,connect-content-encoding,connect-protocol-version,grpc-encoding,grpc-message,grpc-status,grpc-status-details-bin",
    ),
];

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Payload Too Large",
        415 => "Unsupported Media Type",
        422 => "Unprocessable Entity",
        500 => "Internal Server Error",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_same_requests_at_any_chunking() {
        let bytes = b"POST /init?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbodyGET /health HTTP/1.0\r\n\r\n";
        for chunk in 1..=bytes.len() {
            let mut requests = Requests::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(chunk) {
                requests.feed(piece);
                while let Some(request) = requests.next().unwrap() {
                    seen.push(request);
                }
            }
            assert_eq!(seen.len(), 2, "chunk {chunk}");
            assert_eq!(
                (seen[0].path.as_str(), &seen[0].body[..], seen[0].close),
                ("/init", &b"body"[..], false)
            );
            assert_eq!((seen[1].path.as_str(), seen[1].close), ("/health", true));
        }
    }

    #[test]
    fn throws_an_oversized_body_away_but_reads_it() {
        let mut requests = Requests::default();
        requests
            .feed(format!("POST /init HTTP/1.1\r\nContent-Length: {}\r\n\r\n", 3 << 20).as_bytes());
        for _ in 0..3 << 10 {
            assert!(requests.next().unwrap().is_none());
            requests.feed(&[b'x'; 1024]);
        }
        let request = requests.next().unwrap().unwrap();
        assert!(request.oversized && request.body.is_empty());
    }

    #[test]
    fn garbage_is_not_http() {
        let mut requests = Requests::default();
        requests.feed(b"GARBAGE\r\n\r\n");
        assert_eq!(requests.next().unwrap_err(), NotHttp);
    }
}
