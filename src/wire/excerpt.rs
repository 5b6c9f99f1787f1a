//! Text from outside, made safe to print.

use std::borrow::Cow;

/// The longest excerpt, in bytes, before its closing ellipsis.
pub const EXCERPT_BYTES: usize = 256;

/// What somebody else wrote, for a log line or an error: control characters, invisible
/// characters and bad UTF-8 escaped, cut after [`EXCERPT_BYTES`].
///
/// Work and allocation are bounded however long the text is.
#[must_use]
pub fn excerpt(text: impl AsRef<[u8]>) -> String {
    let bytes = text.as_ref();
    // Four bytes at most belong to one character: more than this cannot be shown anyway.
    let window = &bytes[..bytes.len().min(EXCERPT_BYTES + 4)];
    let mut out = String::with_capacity(window.len());
    let mut cut = window.len() < bytes.len();
    'chunks: for chunk in window.utf8_chunks() {
        for c in chunk.valid().chars() {
            if !push(&mut out, &escaped(c)) {
                cut = true;
                break 'chunks;
            }
        }
        for byte in chunk.invalid() {
            if !push(&mut out, &format!("\\x{byte:02x}")) {
                cut = true;
                break 'chunks;
            }
        }
    }
    if cut {
        out.push('…');
    }
    out
}

fn escaped(c: char) -> Cow<'static, str> {
    match c {
        // Quotes are harmless here, and CH's messages are full of them.
        '"' => Cow::Borrowed("\""),
        '\'' => Cow::Borrowed("'"),
        _ => Cow::Owned(c.escape_debug().collect()),
    }
}

/// Appends what fits as a whole.
fn push(out: &mut String, piece: &str) -> bool {
    let fits = out.len() + piece.len() <= EXCERPT_BYTES;
    if fits {
        out.push_str(piece);
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpts_show_what_a_terminal_would_obey() {
        for (name, text, shown) in [
            ("plain", &b"VM is not running"[..], "VM is not running"),
            ("quotes", b"\"a\" and 'b'", "\"a\" and 'b'"),
            ("newline", b"one\ntwo\r", "one\\ntwo\\r"),
            ("escape", b"\x1b[31mred", "\\u{1b}[31mred"),
            ("bad utf-8", b"a\xffb", "a\\xffb"),
            (
                "right-to-left override",
                "a\u{202e}b".as_bytes(),
                "a\\u{202e}b",
            ),
        ] {
            assert_eq!(excerpt(text), shown, "{name}");
        }
    }

    #[test]
    fn excerpts_are_cut_whatever_comes() {
        for (name, text) in [
            ("letters", "a".repeat(10_000).into_bytes()),
            ("controls", vec![1; 10_000]),
            ("bad utf-8", vec![0xff; 10_000]),
            ("wide", "🦀".repeat(1_000).into_bytes()),
        ] {
            let shown = excerpt(&text);
            assert!(shown.len() <= EXCERPT_BYTES + '…'.len_utf8(), "{name}");
            assert!(shown.len() > EXCERPT_BYTES - 16, "{name}: {}", shown.len());
            assert!(shown.ends_with('…'), "{name}");
        }
        assert!(!excerpt("a".repeat(EXCERPT_BYTES)).ends_with('…'));
        assert!(excerpt("a".repeat(EXCERPT_BYTES + 1)).ends_with('…'));
    }
}
