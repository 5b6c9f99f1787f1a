//! A planted bug, to prove that the drivers find bugs: a reader of netstrings (`5:hello,`)
//! that forgets that the comma may be missing at the very end.

/// Reads netstrings until something is wrong.
pub fn run(data: &[u8]) {
    let mut rest = data;
    while let Some(colon) = rest.iter().position(|b| *b == b':') {
        let digits = &rest[..colon];
        if digits.is_empty() || digits.len() > 4 || !digits.iter().all(u8::is_ascii_digit) {
            return;
        }
        let len = digits.iter().fold(0, |n, d| n * 10 + usize::from(d - b'0'));
        let text = &rest[colon + 1..];
        // The bug: `>=` would be right.
        if len > text.len() || text[len] != b',' {
            return;
        }
        rest = &text[len + 1..];
    }
}
