//! Requests, in the form that Cloud Hypervisor's HTTP server takes.

use std::fmt;
use std::sync::Arc;

use super::field::{is_control, is_token};
use crate::wire::excerpt::excerpt;

/// Most bytes of a request line or header line, its line end included. Cloud Hypervisor's
/// HTTP server reads lines through a buffer of 1024 bytes (micro-http, src/connection.rs).
pub const MAX_LINE_BYTES: usize = 1023;

/// A request method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// GET.
    Get,
    /// HEAD: the answer has no body, whatever its headers say.
    Head,
    /// PUT.
    Put,
    /// POST.
    Post,
    /// PATCH.
    Patch,
    /// DELETE.
    Delete,
}

impl Method {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Put => "PUT",
            Self::Post => "POST",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        }
    }

    /// Whether a request without a body says so with `Content-Length: 0` (RFC 9110, 8.6).
    const fn expects_body(self) -> bool {
        matches!(self, Self::Put | Self::Post | Self::Patch)
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a request cannot be encoded. Text from the request is escaped and cut at 256 bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The target does not begin with `/`, or has a byte outside visible ASCII.
    #[error("Request target `{0}` is refused")]
    Target(String),
    /// A header name is not a token.
    #[error("Header name `{0}` is refused")]
    HeaderName(String),
    /// A header value has CR, LF, NUL, another control byte but tab, or is not ASCII.
    #[error("Value of header {name} is refused: `{value}`")]
    HeaderValue {
        /// The header.
        name: String,
        /// Its value.
        value: String,
    },
    /// A header that the codec writes itself, or that the peers here cannot take:
    /// Content-Length, Transfer-Encoding, Connection, Expect, Upgrade, TE, Trailer.
    #[error("Header {0} is not for callers to set")]
    ReservedHeader(String),
    /// The request line or a header line is longer than [`MAX_LINE_BYTES`].
    #[error("Request line `{0}` has more than {MAX_LINE_BYTES} bytes")]
    LineTooLong(String),
}

/// A request before it is encoded. All fields are plain; [`encode`](Request::encode) checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// Path and query, beginning with `/`.
    pub target: String,
    /// The `Host` header. Neither envd nor Cloud Hypervisor looks at it, Go's server wants it.
    pub host: String,
    /// Further headers, name and value, in order.
    pub headers: Vec<(String, String)>,
    /// The body. Its length is announced by Content-Length, never chunked.
    pub body: Vec<u8>,
    /// Whether to say `Connection: close`.
    pub close: bool,
}

impl Request {
    /// A request without headers and body, for host `localhost`, keep-alive.
    #[must_use]
    pub fn new(method: Method, target: impl Into<String>) -> Self {
        Self {
            method,
            target: target.into(),
            host: String::from("localhost"),
            headers: Vec::new(),
            body: Vec::new(),
            close: false,
        }
    }

    /// The same with one more header.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The same with a JSON body and its `Content-Type`.
    #[must_use]
    pub fn json(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self.header("Content-Type", "application/json")
    }

    /// The same with `Connection: close`.
    #[must_use]
    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// The bytes to send.
    ///
    /// # Errors
    /// [`RequestError`] for whatever would change the message's framing or what Cloud
    /// Hypervisor's server cannot read.
    pub fn encode(&self) -> Result<EncodedRequest, RequestError> {
        let mut out = Vec::with_capacity(self.size_hint());
        self.write_request_line(&mut out)?;
        write_header(&mut out, "Host", &self.host)?;
        for (name, value) in &self.headers {
            if RESERVED.iter().any(|r| r.eq_ignore_ascii_case(name)) {
                return Err(RequestError::ReservedHeader(name.clone()));
            }
            write_header(&mut out, name, value)?;
        }
        if self.close {
            write_header(&mut out, "Connection", "close")?;
        }
        if !self.body.is_empty() || self.method.expects_body() {
            write_header(&mut out, "Content-Length", &self.body.len().to_string())?;
        }
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(&self.body);
        Ok(EncodedRequest {
            method: self.method,
            bytes: out.into(),
        })
    }

    fn size_hint(&self) -> usize {
        let headers: usize = self
            .headers
            .iter()
            .map(|(name, value)| name.len() + value.len() + 4)
            .sum();
        96 + self.target.len() + self.host.len() + headers + self.body.len()
    }

    fn write_request_line(&self, out: &mut Vec<u8>) -> Result<(), RequestError> {
        let target = self.target.as_bytes();
        if target.first() != Some(&b'/') || !target.iter().all(u8::is_ascii_graphic) {
            return Err(RequestError::Target(excerpt(target)));
        }
        out.extend_from_slice(self.method.as_str().as_bytes());
        out.push(b' ');
        out.extend_from_slice(target);
        out.extend_from_slice(b" HTTP/1.1\r\n");
        if out.len() > MAX_LINE_BYTES {
            return Err(RequestError::LineTooLong(excerpt(target)));
        }
        Ok(())
    }
}

/// What the codec writes itself, or what would change how the message is framed or read.
const RESERVED: [&str; 9] = [
    "Host",
    "Content-Length",
    "Transfer-Encoding",
    "Connection",
    "Keep-Alive",
    "Expect",
    "Upgrade",
    "TE",
    "Trailer",
];

fn write_header(out: &mut Vec<u8>, name: &str, value: &str) -> Result<(), RequestError> {
    if name.is_empty() || !name.bytes().all(is_token) {
        return Err(RequestError::HeaderName(excerpt(name.as_bytes())));
    }
    if !value.is_ascii() || value.bytes().any(is_control) {
        return Err(RequestError::HeaderValue {
            name: name.to_owned(),
            value: excerpt(value.as_bytes()),
        });
    }
    if name.len() + value.len() + 4 > MAX_LINE_BYTES {
        return Err(RequestError::LineTooLong(excerpt(name.as_bytes())));
    }
    for part in [name, ": ", value, "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    Ok(())
}

/// A request as bytes, checked. Cheap to clone: hedged probes share one.
#[derive(Clone, PartialEq, Eq)]
pub struct EncodedRequest {
    method: Method,
    bytes: Arc<[u8]>,
}

impl EncodedRequest {
    /// The method, which the answer's framing depends on.
    #[must_use]
    pub const fn method(&self) -> Method {
        self.method
    }

    /// What goes onto the wire.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for EncodedRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The body may carry an access token: only the request line is shown.
        let line = self.bytes.split(|b| *b == b'\r').next().unwrap_or_default();
        write!(f, "`{}` ({} bytes)", excerpt(line), self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_lines_in_a_fixed_order_with_the_length_last() {
        let put = Request::new(Method::Put, "/api/v1/vm.resume")
            .header("Accept", "application/json")
            .encode()
            .unwrap();
        assert_eq!(
            put.as_bytes(),
            b"PUT /api/v1/vm.resume HTTP/1.1\r\nHost: localhost\r\n\
              Accept: application/json\r\nContent-Length: 0\r\n\r\n"
        );
        let get = Request::new(Method::Get, "/health").closing().encode();
        assert_eq!(
            get.unwrap().as_bytes(),
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        );
        let post = Request::new(Method::Post, "/init").json("{}").encode();
        assert_eq!(
            post.unwrap().as_bytes(),
            b"POST /init HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
              Content-Length: 2\r\n\r\n{}"
        );
    }

    #[test]
    fn refuses_what_would_change_the_framing() {
        use RequestError as E;
        let get = |target: &str| Request::new(Method::Get, target);
        let long = format!("/{}", "a".repeat(MAX_LINE_BYTES));
        type Case<'a> = (&'a str, Request, fn(&E) -> bool);
        let cases: [Case<'_>; 14] = [
            ("LF in target", get("/a\nb"), |e| matches!(e, E::Target(_))),
            ("CR in target", get("/a\rb"), |e| matches!(e, E::Target(_))),
            ("space in target", get("/a b"), |e| {
                matches!(e, E::Target(_))
            }),
            ("NUL in target", get("/\0"), |e| matches!(e, E::Target(_))),
            ("no slash", get("http://x/"), |e| matches!(e, E::Target(_))),
            ("empty target", get(""), |e| matches!(e, E::Target(_))),
            ("long target", get(&long), |e| {
                matches!(e, E::LineTooLong(_))
            }),
            ("LF in value", get("/").header("X", "a\nb"), |e| {
                matches!(e, E::HeaderValue { .. })
            }),
            ("NUL in value", get("/").header("X", "\0"), |e| {
                matches!(e, E::HeaderValue { .. })
            }),
            ("colon in name", get("/").header("X:", "a"), |e| {
                matches!(e, E::HeaderName(_))
            }),
            ("empty name", get("/").header("", "a"), |e| {
                matches!(e, E::HeaderName(_))
            }),
            ("long value", get("/").header("X", &long), |e| {
                matches!(e, E::LineTooLong(_))
            }),
            (
                "second length",
                get("/").header("content-length", "1"),
                |e| matches!(e, E::ReservedHeader(_)),
            ),
            ("expect", get("/").header("EXPECT", "100-continue"), |e| {
                matches!(e, E::ReservedHeader(_))
            }),
        ];
        for (name, request, expected) in cases {
            let error = request.encode().expect_err(name);
            assert!(expected(&error), "{name}: {error:?}");
        }
        let mut bad_host = get("/");
        bad_host.host = String::from("a\r\nX: y");
        assert!(matches!(
            bad_host.encode(),
            Err(RequestError::HeaderValue { .. })
        ));
    }

    #[test]
    fn the_longest_line_has_1023_bytes() {
        let room = MAX_LINE_BYTES - "GET  HTTP/1.1\r\n".len();
        let target = format!("/{}", "a".repeat(room - 1));
        let encoded = Request::new(Method::Get, &target).encode().unwrap();
        let line = encoded.as_bytes().split_inclusive(|b| *b == b'\n').next();
        assert_eq!(line.unwrap().len(), MAX_LINE_BYTES);
        assert!(Request::new(Method::Get, target + "a").encode().is_err());
    }
}
