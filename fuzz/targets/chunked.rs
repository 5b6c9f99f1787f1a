//! Chunked bodies: the parser against a decoder that sees the whole input at once, and
//! against an encoder.

use rewake::wire::http::{HttpError, Limits, Method, Progress, Response, ResponseParser};

use super::Choices;

const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

/// The input is a chunked body with its trailers, without the head.
pub fn run(data: &[u8]) {
    let mut choices = Choices::from_bytes(data);
    let longest = 1 + choices.below(16);
    let pieces = choices.pieces(data, longest);
    let parsed = parse(&pieces);
    // The decoder knows no bounds; inputs that are this small cannot reach those either,
    // except for the line bounds, which the decoder's answer does not depend on.
    match (decode(data), parsed) {
        (Some((body, rest)), Ok((response, leftover))) => {
            assert_eq!(response.body, body, "same body");
            assert_eq!(leftover, rest, "same end");
        }
        (None, Err(_)) | (Some(_), Err(HttpError::TooLarge { .. })) => {}
        (decoded, parsed) => panic!("decoder: {decoded:?}, parser: {parsed:?}"),
    }
    let encoded = encode(data, &mut choices);
    let pieces = choices.pieces(&encoded, longest);
    match parse(&pieces) {
        Ok((response, 0)) => assert_eq!(response.body, data, "round trip"),
        other => panic!("an encoded body is refused: {other:?}"),
    }
}

fn parse(pieces: &[&[u8]]) -> Result<(Response, usize), HttpError> {
    let mut parser = ResponseParser::new(Method::Get, Limits::VMM);
    parser.feed(HEAD)?;
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

fn encode(data: &[u8], choices: &mut Choices) -> Vec<u8> {
    let mut out = Vec::new();
    for chunk in choices.pieces(data, 40) {
        let extension = ["", ";a", " ;a=\"b\""][choices.below(3).min(chunk.len() / 20)];
        out.extend_from_slice(format!("{:x}{extension}\r\n", chunk.len()).as_bytes());
        out.extend_from_slice(chunk);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"0\r\nDigest: x\r\n\r\n");
    out
}

/// The body and the number of bytes behind the message, by RFC 9112, 7.1.
fn decode(data: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut body = Vec::new();
    let mut rest = data;
    loop {
        let line = take_line(&mut rest)?;
        let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let (size, extension) = line.split_at(digits);
        let trimmed = extension.trim_ascii_start();
        let blanks_only = !extension.is_empty() && trimmed.is_empty();
        if !(1..=16).contains(&digits)
            || blanks_only
            || !matches!(trimmed.first(), None | Some(b';'))
        {
            return None;
        }
        let blanks = &extension[..extension.len() - trimmed.len()];
        if !blanks.iter().all(|b| matches!(b, b' ' | b'\t')) || !is_text(trimmed) {
            return None;
        }
        let size = u64::from_str_radix(std::str::from_utf8(size).ok()?, 16).ok()?;
        if size == 0 {
            break;
        }
        let size = usize::try_from(size).ok()?;
        let chunk = rest.get(..size)?;
        body.extend_from_slice(chunk);
        rest = rest[size..].strip_prefix(b"\r\n")?;
    }
    loop {
        let line = take_line(&mut rest)?;
        if line.is_empty() {
            return Some((body, rest.len()));
        }
        let colon = line.iter().position(|b| *b == b':')?;
        let name = &line[..colon];
        if name.is_empty() || !name.iter().all(|b| is_token(*b)) || !is_text(&line[colon + 1..]) {
            return None;
        }
    }
}

fn take_line<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let lf = rest.iter().position(|b| *b == b'\n')?;
    let line = rest[..lf].strip_suffix(b"\r")?;
    *rest = &rest[lf + 1..];
    Some(line)
}

fn is_text(bytes: &[u8]) -> bool {
    bytes
        .iter()
        .all(|b| matches!(b, b'\t' | 0x20..=0x7e | 0x80..))
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
