//! The response parser: what it takes, what it refuses, and that neither depends on how the
//! bytes were cut.

use std::path::{Path, PathBuf};

use rewake::wire::http::{
    Bound, HttpError, Limits, Method, Progress, Response, ResponseParser, Rule, Stage,
};

/// The answer, and how many bytes were left over after it.
type Outcome = Result<(Response, usize), HttpError>;

/// Feeds the pieces one after the other, then the end of the stream.
fn parse<'a>(
    method: Method,
    limits: Limits,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Outcome {
    let mut parser = ResponseParser::new(method, limits);
    let mut leftover = 0;
    let mut complete = false;
    for piece in pieces {
        match parser.feed(piece)? {
            _ if complete => leftover += piece.len(),
            Progress::Incomplete => {}
            Progress::Complete { consumed } => {
                complete = true;
                leftover += piece.len() - consumed;
            }
        }
    }
    parser.finish().map(|response| (response, leftover))
}

/// In one piece, in every two pieces, and byte by byte: always the same answer.
fn parse_every_way(name: &str, method: Method, limits: Limits, bytes: &[u8]) -> Outcome {
    let whole = parse(method, limits, [bytes]);
    for cut in 0..=bytes.len() {
        let (a, b) = bytes.split_at(cut);
        let split = parse(method, limits, [a, b]);
        assert_eq!(split, whole, "{name}: cut at {cut}");
    }
    let single = parse(method, limits, bytes.chunks(1));
    assert_eq!(single, whole, "{name}: byte by byte");
    whole
}

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(path)
}

#[test]
fn takes_every_captured_answer_of_cloud_hypervisor() {
    // Status by file name; everything not named here is 204 without a body.
    let expected = [
        ("01-ping", [200, 200]),
        ("02-info-no-vm", [500, 404]),
        ("03-pause-no-vm", [500, 500]),
        ("04-unknown-path", [404, 404]),
        ("05-bad-json", [400, 400]),
        ("06-restore-missing-dir", [500, 500]),
        ("07-restore-bad-mode", [400, 400]),
        ("08-parser-error", [400, 400]),
        ("09-post-method", [400, 400]),
        ("10-pipelined-two-pings", [200, 200]),
        ("11-expect-continue", [500, 404]),
        ("13-info-created", [200, 200]),
        ("15-info-running", [200, 200]),
        ("16-counters", [200, 200]),
        ("18-snapshot-while-running", [500, 500]),
        ("20-pause-twice", [500, 500]),
        ("22-snapshot-same-dir", [500, 500]),
        ("26-info-paused", [200, 200]),
        ("27-restore-while-present", [500, 500]),
        ("31-shutdown-vmm", [200, 200]),
    ];
    let mut count = 0;
    for (version, dir) in ["ch-v52", "ch-v53"].into_iter().enumerate() {
        for entry in std::fs::read_dir(fixture(dir).join("http")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|e| e != "response") {
                continue;
            }
            count += 1;
            let stem = path.file_stem().unwrap().to_str().unwrap();
            let name = format!("{dir}/{stem}");
            let bytes = std::fs::read(&path).unwrap();
            let (response, leftover) =
                parse_every_way(&name, Method::Put, Limits::VMM, &bytes).expect(&name);
            let status = expected
                .iter()
                .find(|(n, _)| *n == stem)
                .map_or(204, |(_, status)| status[version]);
            assert_eq!(response.status, status, "{name}");
            assert!(response.keep_alive, "{name}");
            assert_eq!(response.headers.get("connection"), Some(&b"keep-alive"[..]));
            // The second answer of the pipelined pair is what nobody asked for.
            let pipelined = stem == "10-pipelined-two-pings";
            assert_eq!(leftover > 0, pipelined, "{name}: {leftover} left over");
            if status == 204 {
                assert_eq!(response.headers.get("content-length"), None, "{name}");
                assert!(response.body.is_empty(), "{name}");
            } else {
                let length = response.headers.get_str("Content-Length").expect(&name);
                assert_eq!(length.parse(), Ok(response.body.len()), "{name}");
                assert!(bytes.windows(4).any(|w| w == b"\r\n\r\n"));
            }
        }
    }
    assert!(count >= 62, "only {count} captured answers");
}

#[test]
fn takes_every_noted_answer_of_envd() {
    let cases: [(&str, u16, &str, bool); 7] = [
        ("envd-health", 200, r#"{"version":"0.2.0"}"#, true),
        ("envd-health-close", 200, r#"{"version":"0.2.0"}"#, false),
        ("envd-init", 204, "", true),
        (
            "envd-no-preload-get",
            404,
            r#"{"code":"unimplemented","message":"method not found: memory/preload"}"#,
            true,
        ),
        ("envd-no-preload-post", 415, "", true),
        (
            "envd-wrong-token",
            401,
            "access token validation failed",
            true,
        ),
        ("envd-wrong-method", 405, "", true),
    ];
    for (name, status, body, keep_alive) in cases {
        let bytes = std::fs::read(fixture(&format!("http/{name}.response"))).unwrap();
        let (response, leftover) =
            parse_every_way(name, Method::Get, Limits::GUEST, &bytes).expect(name);
        assert_eq!(response.status, status, "{name}");
        assert_eq!(response.body, body.as_bytes(), "{name}");
        assert_eq!(response.keep_alive, keep_alive, "{name}");
        assert_eq!(leftover, 0, "{name}");
    }
}

/// Accepted bytes: name, method, bytes, status, body, keep-alive, bytes left over.
type Taken = (
    &'static str,
    Method,
    &'static str,
    u16,
    &'static str,
    bool,
    usize,
);

#[test]
fn takes_every_framing_of_a_body() {
    use Method::{Get, Head};
    let cases: &[Taken] = &[
        (
            "empty reason, no space",
            Get,
            "HTTP/1.1 503\r\ncontent-length: 2\r\n\r\nhi",
            503,
            "hi",
            true,
            0,
        ),
        (
            "empty reason",
            Get,
            "HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n",
            200,
            "",
            true,
            0,
        ),
        (
            "bytes from 0x80 in the reason",
            Get,
            "HTTP/1.1 200 \u{e9}t\u{e9}\r\nContent-Length: 0\r\n\r\n",
            200,
            "",
            true,
            0,
        ),
        (
            "leading zeros in a length",
            Get,
            "HTTP/1.1 200 OK\r\nContent-Length: 0002\r\n\r\nhi",
            200,
            "hi",
            true,
            0,
        ),
        (
            "until the end",
            Get,
            "HTTP/1.1 200 OK\r\n\r\nall of it",
            200,
            "all of it",
            false,
            0,
        ),
        (
            "HTTP/1.0",
            Get,
            "HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nhi",
            200,
            "hi",
            false,
            0,
        ),
        (
            "close in a list",
            Get,
            "HTTP/1.1 200 OK\r\nConnection: x , CLOSE\r\nContent-Length: 0\r\n\r\n",
            200,
            "",
            false,
            0,
        ),
        (
            "204 with length 0",
            Get,
            "HTTP/1.1 204 \r\nContent-Length: 0\r\n\r\n",
            204,
            "",
            true,
            0,
        ),
        (
            "204 with a body behind it",
            Get,
            "HTTP/1.1 204 \r\n\r\nhello",
            204,
            "",
            true,
            5,
        ),
        (
            "304 with a length",
            Get,
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
            304,
            "",
            true,
            0,
        ),
        (
            "answer to HEAD with a length",
            Head,
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
            200,
            "",
            true,
            0,
        ),
        (
            "answer to HEAD with chunked",
            Head,
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            200,
            "",
            true,
            0,
        ),
        (
            "a redirect is a status",
            Get,
            "HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
            302,
            "",
            true,
            0,
        ),
        (
            "two interim answers",
            Get,
            "HTTP/1.1 100 \r\nServer: x\r\n\r\nHTTP/1.1 103 Early\r\nLink: y\r\n\r\nHTTP/1.1 200 \r\nContent-Length: 1\r\n\r\nz",
            200,
            "z",
            true,
            0,
        ),
        (
            "chunks",
            Get,
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n00003\r\nllo\r\n0\r\n\r\n",
            200,
            "hello",
            true,
            0,
        ),
        (
            "chunk sizes in hex of both cases",
            Get,
            "HTTP/1.1 200 OK\r\ntransfer-encoding: CHUNKED\r\n\r\na\r\n0123456789\r\nB\r\n0123456789a\r\n0\r\n\r\n",
            200,
            "01234567890123456789a",
            true,
            0,
        ),
        (
            "chunk extensions",
            Get,
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nhe\r\n3 ; c=\"d;e\"\r\nllo\r\n0;last\r\n\r\n",
            200,
            "hello",
            true,
            0,
        ),
        (
            "trailers",
            Get,
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nDigest: y\r\nContent-Length: 7\r\n\r\nrest",
            200,
            "x",
            true,
            4,
        ),
        (
            "white space around a value",
            Get,
            "HTTP/1.1 200 OK\r\nContent-Length: \t 2 \t\r\n\r\nhi",
            200,
            "hi",
            true,
            0,
        ),
    ];
    for &(name, method, bytes, status, body, keep_alive, left) in cases {
        let outcome = parse_every_way(name, method, Limits::GUEST, bytes.as_bytes());
        let (response, leftover) = outcome.expect(name);
        assert_eq!(response.status, status, "{name}");
        assert_eq!(response.body, body.as_bytes(), "{name}");
        assert_eq!(response.keep_alive, keep_alive, "{name}");
        assert_eq!(leftover, left, "{name}");
    }
}

#[test]
fn keeps_header_lines_in_order_and_drops_trailers_and_interim_ones() {
    let bytes = b"HTTP/1.1 100 Continue\r\nGone: 1\r\n\r\n\
        HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nA: 1\r\na:2\r\nEmpty:\r\n\r\n\
        0\r\nTrailer: gone\r\n\r\n";
    let (response, _) = parse_every_way("order", Method::Get, Limits::GUEST, bytes).unwrap();
    let lines: Vec<_> = response.headers.iter().collect();
    assert_eq!(
        lines,
        [
            ("Transfer-Encoding", &b"chunked"[..]),
            ("A", b"1"),
            ("a", b"2"),
            ("Empty", b""),
        ]
    );
    assert_eq!(response.headers.get("A"), Some(&b"1"[..]));
}

#[test]
fn refuses_what_breaks_a_rule_and_says_which() {
    use Rule as R;
    let ok = "HTTP/1.1 200 OK\r\n";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let cases: Vec<(&str, String, Rule)> = vec![
        ("LF alone", "HTTP/1.1 200 OK\n".into(), R::BareLf),
        (
            "LF alone behind a header",
            format!("{ok}A: b\n\r\n"),
            R::BareLf,
        ),
        (
            "LF alone as empty line",
            format!("{ok}A: b\r\n\n"),
            R::BareLf,
        ),
        (
            "CR inside a value",
            format!("{ok}A: b\rc\r\n\r\n"),
            R::BareCr,
        ),
        (
            "CR inside a name",
            format!("{ok}A\rB: c\r\n\r\n"),
            R::BareCr,
        ),
        (
            "CR before the line end",
            format!("{ok}A: b\r\r\n\r\n"),
            R::BareCr,
        ),
        (
            "NUL in a value",
            format!("{ok}A: b\0c\r\n\r\n"),
            R::ControlByte,
        ),
        (
            "escape in a value",
            format!("{ok}A: \x1b[2J\r\n\r\n"),
            R::ControlByte,
        ),
        (
            "DEL in a value",
            format!("{ok}A: \x7f\r\n\r\n"),
            R::ControlByte,
        ),
        (
            "NUL in a name",
            format!("{ok}A\0: b\r\n\r\n"),
            R::ControlByte,
        ),
        (
            "NUL in the reason",
            "HTTP/1.1 200 O\0K\r\n\r\n".into(),
            R::ControlByte,
        ),
        (
            "folded line",
            format!("{ok}A: b\r\n c\r\n\r\n"),
            R::FoldedLine,
        ),
        (
            "folded line by tab",
            format!("{ok}A: b\r\n\tc\r\n\r\n"),
            R::FoldedLine,
        ),
        (
            "white space before the first header",
            format!("{ok} A: b\r\n\r\n"),
            R::FoldedLine,
        ),
        (
            "white space before the colon",
            format!("{ok}A : b\r\n\r\n"),
            R::HeaderLine,
        ),
        ("no colon", format!("{ok}A\r\n\r\n"), R::HeaderLine),
        ("no name", format!("{ok}: b\r\n\r\n"), R::HeaderLine),
        (
            "name outside ASCII",
            format!("{ok}\u{e9}: b\r\n\r\n"),
            R::HeaderLine,
        ),
        (
            "another protocol",
            "ICY 200 OK\r\n\r\n".into(),
            R::StatusLine,
        ),
        ("HTTP/2.0", "HTTP/2.0 200 OK\r\n\r\n".into(), R::Version),
        ("HTTP/1.2", "HTTP/1.2 200 OK\r\n\r\n".into(), R::Version),
        (
            "lower-case protocol",
            "http/1.1 200 OK\r\n\r\n".into(),
            R::StatusLine,
        ),
        (
            "two spaces",
            "HTTP/1.1  200 OK\r\n\r\n".into(),
            R::StatusLine,
        ),
        ("two digits", "HTTP/1.1 20 OK\r\n\r\n".into(), R::StatusLine),
        (
            "four digits",
            "HTTP/1.1 2000 OK\r\n\r\n".into(),
            R::StatusLine,
        ),
        (
            "status with a sign",
            "HTTP/1.1 +20 OK\r\n\r\n".into(),
            R::StatusLine,
        ),
        (
            "status 099",
            "HTTP/1.1 099 OK\r\n\r\n".into(),
            R::StatusCode,
        ),
        (
            "status 600",
            "HTTP/1.1 600 OK\r\n\r\n".into(),
            R::StatusCode,
        ),
        (
            "empty line first",
            "\r\nHTTP/1.1 200 OK\r\n\r\n".into(),
            R::StatusLine,
        ),
        (
            "switch of protocols",
            "HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n".into(),
            R::Upgrade,
        ),
        (
            "equal lengths twice",
            format!("{ok}Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi"),
            R::DuplicateLength,
        ),
        (
            "two lengths",
            format!("{ok}Content-Length: 2\r\ncontent-length: 3\r\n\r\nhi"),
            R::DuplicateLength,
        ),
        (
            "list of lengths",
            format!("{ok}Content-Length: 2, 2\r\n\r\nhi"),
            R::ContentLength,
        ),
        (
            "empty length",
            format!("{ok}Content-Length:\r\n\r\n"),
            R::ContentLength,
        ),
        (
            "negative length",
            format!("{ok}Content-Length: -1\r\n\r\n"),
            R::ContentLength,
        ),
        (
            "length with a sign",
            format!("{ok}Content-Length: +1\r\n\r\nx"),
            R::ContentLength,
        ),
        (
            "hexadecimal length",
            format!("{ok}Content-Length: 0x1\r\n\r\nx"),
            R::ContentLength,
        ),
        (
            "length over 64 bits",
            format!("{ok}Content-Length: 18446744073709551616\r\n\r\n"),
            R::ContentLength,
        ),
        (
            "length, then coding",
            format!("{ok}Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            R::LengthAndCoding,
        ),
        (
            "coding, then length",
            format!("{ok}Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n"),
            R::LengthAndCoding,
        ),
        (
            "coding and length 0",
            format!("{ok}Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n"),
            R::LengthAndCoding,
        ),
        (
            "gzip, chunked",
            format!("{ok}Transfer-Encoding: gzip, chunked\r\n\r\n"),
            R::TransferCoding,
        ),
        (
            "identity",
            format!("{ok}Transfer-Encoding: identity\r\n\r\n"),
            R::TransferCoding,
        ),
        (
            "chunked twice in one line",
            format!("{ok}Transfer-Encoding: chunked, chunked\r\n\r\n"),
            R::TransferCoding,
        ),
        (
            "chunked twice",
            format!("{ok}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
            R::TransferCoding,
        ),
        (
            "xchunked",
            format!("{ok}Transfer-Encoding: xchunked\r\n\r\n"),
            R::TransferCoding,
        ),
        (
            "no coding named",
            format!("{ok}Transfer-Encoding:\r\n\r\n"),
            R::TransferCoding,
        ),
        (
            "coding in HTTP/1.0",
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
            R::CodingBeforeHttp11,
        ),
        (
            "204 with a length",
            "HTTP/1.1 204 \r\nContent-Length: 5\r\n\r\nhello".into(),
            R::BodyForbidden,
        ),
        (
            "204 with chunks",
            "HTTP/1.1 204 \r\nTransfer-Encoding: chunked\r\n\r\n".into(),
            R::BodyForbidden,
        ),
        (
            "100 with a length",
            "HTTP/1.1 100 \r\nContent-Length: 5\r\n\r\n".into(),
            R::BodyForbidden,
        ),
        ("no chunk size", format!("{chunked}\r\n"), R::ChunkSize),
        (
            "extension without a size",
            format!("{chunked};a\r\n"),
            R::ChunkSize,
        ),
        (
            "chunk size with a sign",
            format!("{chunked}-1\r\n"),
            R::ChunkSize,
        ),
        (
            "chunk size 0x5",
            format!("{chunked}0x5\r\nhello\r\n"),
            R::ChunkSize,
        ),
        (
            "chunk size over 64 bits",
            format!("{chunked}10000000000000000\r\n"),
            R::ChunkSize,
        ),
        (
            "17 digits of zero",
            format!("{chunked}00000000000000000\r\n"),
            R::ChunkSize,
        ),
        (
            "blank behind a chunk size",
            format!("{chunked}1 \r\nx\r\n"),
            R::ChunkSize,
        ),
        (
            "LF alone behind a chunk size",
            format!("{chunked}1\nx\r\n"),
            R::BareLf,
        ),
        (
            "LF alone in an extension",
            format!("{chunked}1;a\nx\r\n"),
            R::BareLf,
        ),
        (
            "CR alone behind a chunk size",
            format!("{chunked}1\rx\r\n"),
            R::BareCr,
        ),
        (
            "NUL in an extension",
            format!("{chunked}1;\0\r\n"),
            R::ControlByte,
        ),
        (
            "chunk longer than its size",
            format!("{chunked}1\r\nxy\r\n"),
            R::ChunkEnd,
        ),
        (
            "LF alone behind chunk data",
            format!("{chunked}1\r\nx\n0\r\n\r\n"),
            R::ChunkEnd,
        ),
        (
            "CR alone behind chunk data",
            format!("{chunked}1\r\nx\r0\r\n\r\n"),
            R::ChunkEnd,
        ),
        (
            "malformed trailer",
            format!("{chunked}0\r\nno colon\r\n\r\n"),
            R::HeaderLine,
        ),
        (
            "folded trailer",
            format!("{chunked}0\r\nA: b\r\n c\r\n\r\n"),
            R::FoldedLine,
        ),
    ];
    for (name, bytes, rule) in &cases {
        let outcome = parse_every_way(name, Method::Get, Limits::GUEST, bytes.as_bytes());
        let error = outcome.expect_err(name);
        assert_eq!(error.rule(), Some(*rule), "{name}: {error}");
    }
}

#[test]
fn stops_at_every_bound_and_takes_what_just_fits() {
    let limits = Limits {
        status_line_bytes: 40,
        head_bytes: 120,
        header_lines: 3,
        body_bytes: 10,
        interim_answers: 1,
        chunk_line_bytes: 12,
        chunk_extension_bytes: 15,
    };
    let ok = "HTTP/1.1 200 OK\r\n";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let status = |n: usize| {
        format!(
            "HTTP/1.1 200 {}\r\nContent-Length: 0\r\n\r\n",
            "x".repeat(n - 15)
        )
    };
    let head = |n: usize| format!("{ok}Content-Length: 0\r\nA: {}\r\n\r\n", "x".repeat(n - 43));
    let headers = |n: usize| format!("{ok}Content-Length: 0\r\n{}\r\n", "A:\r\n".repeat(n - 1));
    let length = |n: usize| format!("{ok}Content-Length: {n}\r\n\r\n{}", "x".repeat(n));
    let until_end = |n: usize| format!("{ok}\r\n{}", "x".repeat(n));
    let interim = |n: usize| format!("{}{}", "HTTP/1.1 100 \r\n\r\n".repeat(n), length(1));
    let chunks = |n: usize| format!("{chunked}{}0\r\n\r\n", "1\r\nx\r\n".repeat(n));
    let line = |n: usize| format!("{chunked}1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(n - 4));
    let extensions = |n: usize| {
        let (a, b) = (n / 2, n - n / 2);
        let (a, b) = ("e".repeat(a - 1), "e".repeat(b - 1));
        format!("{chunked}1;{a}\r\nx\r\n1;{b}\r\nx\r\n0\r\n\r\n")
    };
    let trailers = |n: usize| format!("{chunked}0\r\nA: {}\r\n\r\n", "x".repeat(n - 7));
    let trailer_lines = |n: usize| format!("{chunked}0\r\n{}\r\n", "A:\r\n".repeat(n));
    type Make<'a> = &'a dyn Fn(usize) -> String;
    let cases: [(Bound, usize, Make<'_>); 11] = [
        (Bound::StatusLineBytes, 40, &status),
        (Bound::HeadBytes, 120, &head),
        (Bound::HeaderLines, 3, &headers),
        (Bound::BodyBytes, 10, &length),
        (Bound::BodyBytes, 10, &until_end),
        (Bound::BodyBytes, 10, &chunks),
        (Bound::InterimAnswers, 1, &interim),
        (Bound::ChunkLineBytes, 12, &line),
        (Bound::ChunkExtensionBytes, 15, &extensions),
        (Bound::TrailerBytes, 120, &trailers),
        (Bound::TrailerLines, 3, &trailer_lines),
    ];
    for (bound, limit, make) in cases {
        let fits = make(limit);
        let name = format!("{bound:?} at {limit}: {fits:?}");
        let (_, leftover) =
            parse_every_way(&name, Method::Get, limits, fits.as_bytes()).expect(&name);
        assert_eq!(leftover, 0, "{name}");
        let over = make(limit + 1);
        let error = parse_every_way(&name, Method::Get, limits, over.as_bytes()).expect_err(&name);
        assert_eq!(error, HttpError::TooLarge { bound, limit }, "{name}");
    }
}

#[test]
fn an_announced_length_allocates_nothing() {
    let mut parser = ResponseParser::new(Method::Get, Limits::VMM);
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\nx",
        Limits::VMM.body_bytes
    );
    assert_eq!(parser.feed(head.as_bytes()), Ok(Progress::Incomplete));
    let debug = format!("{parser:?}");
    assert!(debug.contains("body: [120]"), "{debug}");
    assert_eq!(
        parser.finish(),
        Err(HttpError::Truncated { stage: Stage::Body })
    );
}

#[test]
fn says_where_a_truncated_response_ended() {
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let cases: [(&str, String, Stage); 8] = [
        ("nothing", String::new(), Stage::Head),
        ("status line", "HTTP/1.1 200".into(), Stage::Head),
        ("headers", "HTTP/1.1 200 OK\r\nA: b\r\n".into(), Stage::Head),
        (
            "after an interim answer",
            "HTTP/1.1 100 \r\n\r\n".into(),
            Stage::Head,
        ),
        (
            "body",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nx".into(),
            Stage::Body,
        ),
        ("chunk size", format!("{chunked}1"), Stage::Body),
        ("chunk data", format!("{chunked}2\r\nx"), Stage::Body),
        ("trailers", format!("{chunked}0\r\n"), Stage::Trailers),
    ];
    for (name, bytes, stage) in cases {
        let outcome = parse_every_way(name, Method::Get, Limits::GUEST, bytes.as_bytes());
        assert_eq!(outcome, Err(HttpError::Truncated { stage }), "{name}");
    }
}

#[test]
fn is_poisoned_by_an_error() {
    let mut parser = ResponseParser::new(Method::Get, Limits::GUEST);
    assert!(parser.feed(b"nonsense\r\n").is_err());
    let good = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(parser.feed(good), Err(HttpError::Poisoned));
    assert_eq!(parser.finish(), Err(HttpError::Poisoned));
}

#[test]
fn guest_text_in_errors_is_escaped_and_short() {
    let hostile = format!("\x1b[31m{}\r\n", "\u{202e}".repeat(80));
    let mut parser = ResponseParser::new(Method::Get, Limits::GUEST);
    let error = parser.feed(hostile.as_bytes()).unwrap_err().to_string();
    assert!(error.is_ascii() || error.ends_with("…`"), "{error}");
    assert!(
        !error.contains('\x1b') && !error.contains('\u{202e}'),
        "{error}"
    );
    assert!(error.len() < 320, "{} bytes", error.len());
}
