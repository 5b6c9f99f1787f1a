//! The grammar of single lines: status line, header line, and the bytes inside them.

use std::ops::Range;

use super::error::Rule;

/// The version and status of a status line, given without its line end.
///
/// The reason phrase may be empty, and with it the space before it may be missing: Cloud
/// Hypervisor's HTTP server sends `HTTP/1.1 200 ` and `HTTP/1.1 503`.
pub(super) fn status_line(line: &[u8]) -> Result<(bool, u16), Rule> {
    let Some((version, rest)) = line.split_at_checked(8) else {
        return Err(Rule::StatusLine);
    };
    let is_http11 = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        [b'H', b'T', b'T', b'P', b'/', ..] => return Err(Rule::Version),
        _ => return Err(Rule::StatusLine),
    };
    let (digits, reason) = match rest {
        [b' ', a, b, c] => ([*a, *b, *c], &[][..]),
        [b' ', a, b, c, b' ', reason @ ..] => ([*a, *b, *c], reason),
        _ => return Err(Rule::StatusLine),
    };
    if !digits.iter().all(u8::is_ascii_digit) {
        return Err(Rule::StatusLine);
    }
    check_bytes(reason)?;
    let status = digits
        .iter()
        .fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0'));
    if (100..600).contains(&status) {
        Ok((is_http11, status))
    } else {
        Err(Rule::StatusCode)
    }
}

/// Where name and value lie in a header line, given without its line end.
pub(super) fn header_line(line: &[u8]) -> Result<(Range<usize>, Range<usize>), Rule> {
    let Some(colon) = line.iter().position(|b| !is_token(*b)) else {
        return Err(Rule::HeaderLine);
    };
    match line[colon] {
        b':' if colon > 0 => {}
        b' ' | b'\t' if colon == 0 => return Err(Rule::FoldedLine),
        b'\r' => return Err(Rule::BareCr),
        byte if is_control(byte) => return Err(Rule::ControlByte),
        _ => return Err(Rule::HeaderLine),
    }
    let raw = &line[colon + 1..];
    check_bytes(raw)?;
    let start = raw.iter().take_while(|b| is_blank(**b)).count();
    let blanks = raw[start..].iter().rev().take_while(|b| is_blank(**b));
    let end = raw.len() - blanks.count();
    Ok((0..colon, colon + 1 + start..colon + 1 + end))
}

/// A Content-Length: digits only, within 64 bits.
pub(super) fn content_length(value: &[u8]) -> Result<u64, Rule> {
    if value.is_empty() {
        return Err(Rule::ContentLength);
    }
    value.iter().try_fold(0_u64, |sum, byte| {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return Err(Rule::ContentLength);
        }
        sum.checked_mul(10)
            .and_then(|sum| sum.checked_add(u64::from(digit)))
            .ok_or(Rule::ContentLength)
    })
}

/// Whether a comma-separated list has this word.
pub(super) fn has_word(list: &[u8], word: &str) -> bool {
    list.split(|b| *b == b',')
        .any(|item| item.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
}

/// Inside a reason phrase or value: tab, space, visible ASCII, and any byte from 0x80.
pub(super) fn check_bytes(bytes: &[u8]) -> Result<(), Rule> {
    // Without an early exit the compiler makes vector code of this loop.
    let bad = bytes
        .iter()
        .fold(false, |bad, byte| bad | is_control(*byte));
    match bad {
        false => Ok(()),
        true if bytes.iter().find(|b| is_control(**b)) == Some(&b'\r') => Err(Rule::BareCr),
        true => Err(Rule::ControlByte),
    }
}

/// A control byte other than tab.
pub(super) const fn is_control(byte: u8) -> bool {
    (byte < 0x20 && byte != b'\t') || byte == 0x7f
}

const fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

/// A byte of a token (RFC 9110, 5.6.2).
pub(super) const fn is_token(byte: u8) -> bool {
    TOKEN[byte as usize]
}

static TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0_u8;
    while byte < 128 {
        table[byte as usize] = byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'!' | b'#'
                    | b'$'
                    | b'%'
                    | b'&'
                    | b'\''
                    | b'*'
                    | b'+'
                    | b'-'
                    | b'.'
                    | b'^'
                    | b'_'
                    | b'`'
                    | b'|'
                    | b'~'
            );
        byte += 1;
    }
    table
};
