//! Text that a guest sent, made fit for logs and errors.

use std::fmt;

/// Guest text: control and invisible characters escaped, cut at [`GuestText::MAX`] bytes.
///
/// Whoever controls the guest controls these words. They are for people to read, never for
/// the program to act upon.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct GuestText(String);

impl GuestText {
    /// Longest text kept, in bytes after escaping, the mark of the cut not counted.
    pub const MAX: usize = 256;

    /// Escapes and cuts what a guest sent.
    #[must_use]
    pub fn new(raw: impl AsRef<[u8]>) -> Self {
        let raw = raw.as_ref();
        // An escaped character is at least as long as the bytes it came from, except for a
        // broken byte sequence: one replacement character for up to three bytes.
        let head = &raw[..raw.len().min(3 * Self::MAX)];
        let mut text = String::new();
        let mut cut = head.len() < raw.len();
        for c in String::from_utf8_lossy(head).chars() {
            let before = text.len();
            match c {
                '"' | '\'' => text.push(c),
                _ => text.extend(c.escape_debug()),
            }
            if text.len() > Self::MAX {
                text.truncate(before);
                cut = true;
                break;
            }
        }
        if cut {
            text.push('…');
        }
        Self(text)
    }

    /// The escaped text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the guest sent nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for GuestText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for GuestText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestText({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_what_would_move_a_terminal() {
        let text = GuestText::new(b"a\x1b[31m\nb\xff\xe2\x80\xaec \"q\" \\");
        assert_eq!(
            text.as_str(),
            "a\\u{1b}[31m\\nb\u{fffd}\\u{202e}c \"q\" \\\\"
        );
    }

    #[test]
    fn cuts_long_text_between_characters_and_says_so() {
        for (name, raw) in [
            ("letters", "a".repeat(300)),
            ("escapes", "\u{1}".repeat(300)),
            ("four bytes each", "🦀".repeat(300)),
            ("far too long", "x".repeat(1 << 20)),
        ] {
            let text = GuestText::new(&raw);
            assert!(text.as_str().ends_with('…'), "{name}");
            assert!(
                text.as_str().len() <= GuestText::MAX + '…'.len_utf8(),
                "{name}"
            );
        }
        assert_eq!(GuestText::new("a".repeat(256)).as_str().len(), 256);
        assert!(GuestText::new("").is_empty());
    }
}
