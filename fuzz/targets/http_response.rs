//! Whole responses: the same answer for every cut, bounds kept, and a response that is
//! written out again reads the same.

use rewake::wire::http::{HttpError, Limits, Method, Progress, Response, ResponseParser};

use super::Choices;

/// Bounds so tight that small inputs reach them.
const TIGHT: Limits = Limits {
    status_line_bytes: 32,
    head_bytes: 160,
    header_lines: 4,
    body_bytes: 48,
    interim_answers: 1,
    chunk_line_bytes: 16,
    chunk_extension_bytes: 20,
};

type Outcome = Result<(Response, usize), HttpError>;

/// The input is the stream from the first byte of a response to its end.
pub fn run(data: &[u8]) {
    let mut choices = Choices::from_bytes(data);
    for (method, limits) in [
        (Method::Get, Limits::GUEST),
        (Method::Get, TIGHT),
        (Method::Head, Limits::VMM),
    ] {
        let whole = parse(method, limits, &[data]);
        let cut = choices.below(data.len() + 1);
        let (a, b) = data.split_at(cut);
        assert_eq!(parse(method, limits, &[a, b]), whole, "cut at {cut}");
        for longest in [1, 2 + choices.below(32)] {
            let pieces = choices.pieces(data, longest);
            let answer = parse(method, limits, &pieces);
            assert_eq!(answer, whole, "pieces of at most {longest}");
        }
        if let Ok((response, leftover)) = whole {
            check(method, limits, &response);
            let message = &data[..data.len() - leftover];
            assert_eq!(
                parse(method, limits, &[message]),
                Ok((response, 0)),
                "what comes behind a message does not change it"
            );
        }
    }
}

fn parse(method: Method, limits: Limits, pieces: &[&[u8]]) -> Outcome {
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

fn check(method: Method, limits: Limits, response: &Response) {
    assert!((200..600).contains(&response.status), "final status");
    assert!(response.body.len() <= limits.body_bytes, "body bound");
    assert!(response.headers.len() <= usize::from(limits.header_lines));
    for (name, value) in &response.headers {
        assert!(!name.is_empty() && name.is_ascii(), "name is a token");
        assert!(!value.iter().any(|b| b"\r\n\0".contains(b)), "clean value");
        assert_eq!(value.trim_ascii(), value, "trimmed value");
    }
    let bytes = render(method, response);
    let roomy = Limits {
        head_bytes: u16::MAX,
        ..Limits::VMM
    };
    let (again, leftover) = parse(method, roomy, &[&bytes]).expect("rendered bytes are fine");
    assert_eq!(leftover, 0, "rendered bytes are one message");
    assert_eq!(&again, response, "round trip");
}

fn render(method: Method, response: &Response) -> Vec<u8> {
    let says_close = response.headers.iter().any(|(name, value)| {
        name.eq_ignore_ascii_case("connection")
            && value
                .split(|b| *b == b',')
                .any(|w| w.trim_ascii().eq_ignore_ascii_case(b"close"))
    });
    let chunked = response.headers.get("transfer-encoding").is_some();
    let version = match response.keep_alive || says_close || chunked {
        true => "1.1",
        false => "1.0",
    };
    let mut out = format!("HTTP/{version} {}\r\n", response.status).into_bytes();
    for (name, value) in &response.headers {
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b":");
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
    if method == Method::Head || matches!(response.status, 204 | 304) {
        assert!(response.body.is_empty(), "no body where none can be");
    } else if chunked {
        for chunk in response.body.chunks(1 + response.body.len() / 2) {
            out.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            out.extend_from_slice(chunk);
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"0\r\n\r\n");
    } else {
        out.extend_from_slice(&response.body);
    }
    out
}
