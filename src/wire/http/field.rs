//! The grammar of single lines: status line, header line, and the bytes inside them.

use super::error::Rule;

/// The version and status of a status line, given without its line end.
///
/// The reason phrase may be empty, and with it the space before it may be missing: Cloud
/// Hypervisor's HTTP server sends `HTTP/1.1 200 ` and `HTTP/1.1 503`.
pub(super) fn status_line(line: &[u8]) -> Result<(bool, u16), Rule> {
    let (is_http11, digits, reason) = split_status_line(line)?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return Err(Rule::StatusLine);
    }
    check_bytes(reason)?;
    let status = status_code(digits).ok_or(Rule::StatusCode)?;
    Ok((is_http11, status))
}

/// Whether the version is 1.1, the three bytes where the status code should be, the reason.
pub(super) fn split_status_line(line: &[u8]) -> Result<(bool, [u8; 3], &[u8]), Rule> {
    let Some((version, rest)) = line.split_first_chunk::<8>() else {
        return Err(Rule::StatusLine);
    };
    let is_http11 = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        [b'H', b'T', b'T', b'P', b'/', ..] => return Err(Rule::Version),
        _ => return Err(Rule::StatusLine),
    };
    match *rest {
        [b' ', a, b, c] => Ok((is_http11, [a, b, c], &[])),
        [b' ', a, b, c, b' ', ref reason @ ..] => Ok((is_http11, [a, b, c], reason)),
        _ => Err(Rule::StatusLine),
    }
}

/// A status code: three digits, 100 to 599.
pub(super) fn status_code(digits: [u8; 3]) -> Option<u16> {
    let [a, b, c] = digits.map(|digit| u16::from(digit.wrapping_sub(b'0')));
    let status = a * 100 + b * 10 + c;
    (matches!(a, 1..=5) && b < 10 && c < 10).then_some(status)
}

/// Name and value of a header line, given without its line end. The value still has the
/// white space around it.
pub(super) fn header_line(line: &[u8]) -> Result<(&[u8], &[u8]), Rule> {
    let colon = token(line);
    match line.get(colon) {
        Some(b':') if colon > 0 => {}
        Some(b' ' | b'\t') if colon == 0 => return Err(Rule::FoldedLine),
        Some(b'\r') => return Err(Rule::BareCr),
        Some(byte) if is_control(*byte) => return Err(Rule::ControlByte),
        _ => return Err(Rule::HeaderLine),
    }
    let value = &line[colon + 1..];
    check_bytes(value)?;
    Ok((&line[..colon], value))
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

/// Whether a text without control bytes is this word, which has 8 to 24 bytes, all of them
/// small letters and hyphens. The case of the text does not matter.
pub(super) fn is_word<const N: usize>(text: &[u8], word: &[u8; N]) -> bool {
    const { assert!(N >= 8 && N <= 24) };
    // This bit alone tells letters of either case apart. It would also make a hyphen of CR.
    const CASE: u64 = u64::from_le_bytes([0x20; 8]);
    let Ok(text) = <&[u8; N]>::try_from(text) else {
        return false;
    };
    let differs = |at: usize| {
        let eight = |bytes: &[u8; N]| {
            let eight = bytes[at..].first_chunk();
            eight.map_or(0, |eight| u64::from_le_bytes(*eight))
        };
        (eight(text) | CASE) ^ eight(word)
    };
    differs(0) | differs(N / 2 - 4) | differs(N - 8) == 0
}

/// Inside a reason phrase or value: tab, space, visible ASCII, and any byte from 0x80.
pub(super) fn check_bytes(bytes: &[u8]) -> Result<(), Rule> {
    match bytes.get(text(bytes).len()) {
        None => Ok(()),
        Some(b'\r') => Err(Rule::BareCr),
        Some(_) => Err(Rule::ControlByte),
    }
}

/// The longest piece from the front without a control byte other than tab.
pub(super) fn text(bytes: &[u8]) -> &[u8] {
    const ONES: u64 = u64::from_le_bytes([1; 8]);
    const HIGHS: u64 = ONES << 7;
    let mut rest = bytes;
    // Eight bytes at a time. Without its high bit no byte overflows into the next one, and
    // the sums set the high bit of what is at least a space, and of what is DEL.
    while let Some((eight, behind)) = rest.split_first_chunk::<8>() {
        let word = u64::from_le_bytes(*eight);
        let low = word & !HIGHS;
        let from_space = low + ONES * (0x80 - 0x20);
        let del = low + ONES;
        let marked = (!from_space | del) & !word & HIGHS;
        if marked == 0 {
            rest = behind;
            continue;
        }
        let at = marked.trailing_zeros() as usize / 8;
        if eight[at] != b'\t' {
            return &bytes[..bytes.len() - rest.len() + at];
        }
        rest = &rest[at + 1..];
    }
    let tail = rest.iter().take_while(|b| !is_control(**b)).count();
    &bytes[..bytes.len() - rest.len() + tail]
}

/// Length of the longest token at the front.
pub(super) fn token(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    // A loop of known length is unrolled, and names are short.
    while let Some((eight, behind)) = rest.split_first_chunk::<8>() {
        for (at, byte) in eight.iter().enumerate() {
            if !is_token(*byte) {
                return bytes.len() - rest.len() + at;
            }
        }
        rest = behind;
    }
    let tail = rest.iter().take_while(|b| is_token(**b)).count();
    bytes.len() - rest.len() + tail
}

/// A value without the white space around it.
pub(super) fn trim(mut raw: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = raw {
        raw = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = raw {
        raw = rest;
    }
    raw
}

/// A control byte other than tab.
pub(super) const fn is_control(byte: u8) -> bool {
    (byte < 0x20 && byte != b'\t') || byte == 0x7f
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_ends_at_the_first_control_byte_wherever_it_stands() {
        for length in 0..40 {
            for at in 0..=length {
                for byte in 0..=u8::MAX {
                    for fill in [b'a', b'\t', b' ', 0x80, 0xff] {
                        let mut bytes = vec![fill; length];
                        bytes.insert(at, byte);
                        let plain = bytes.iter().take_while(|b| !is_control(**b)).count();
                        assert_eq!(text(&bytes).len(), plain, "{bytes:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_token_ends_at_the_first_other_byte_wherever_it_stands() {
        for length in 0..24 {
            for at in 0..=length {
                for byte in 0..=u8::MAX {
                    let mut bytes = vec![b'a'; length];
                    bytes.insert(at, byte);
                    let plain = bytes.iter().take_while(|b| is_token(**b)).count();
                    assert_eq!(token(&bytes), plain, "{bytes:?}");
                }
            }
        }
    }

    #[test]
    fn words_are_the_same_but_for_case_and_nothing_else() {
        fn check<const N: usize>(word: &[u8; N]) {
            assert!(is_word(&word.to_ascii_uppercase(), word));
            assert!(!is_word(&word[1..], word));
            assert!(!is_word(&[&word[..], b"x"].concat(), word));
            for at in 0..N {
                for byte in (0..=u8::MAX).filter(|byte| !is_control(*byte)) {
                    let mut text = *word;
                    text[at] = byte;
                    let same = text.eq_ignore_ascii_case(word);
                    assert_eq!(is_word(&text, word), same, "{text:?}");
                }
            }
        }
        check(b"connection");
        check(b"keep-alive");
        check(b"content-length");
        check(b"transfer-encoding");
    }
}
