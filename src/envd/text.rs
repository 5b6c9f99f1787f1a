//! Text that a guest sent, made fit for logs and errors.

use std::fmt;

use crate::wire::excerpt::excerpt;

/// Guest text, only ever kept as an [`excerpt`]: escaped, cut at 256 bytes.
///
/// Whoever controls the guest controls these words. They are for people to read, never for
/// the program to act upon.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct GuestText(String);

impl GuestText {
    /// Escapes and cuts what a guest sent.
    #[must_use]
    pub fn new(raw: impl AsRef<[u8]>) -> Self {
        Self(excerpt(raw))
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

impl From<&str> for GuestText {
    fn from(raw: &str) -> Self {
        Self::new(raw)
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
    fn is_never_kept_raw() {
        let text = GuestText::new(b"a\x1b[31m \"q\"");
        assert_eq!(text.as_str(), "a\\u{1b}[31m \"q\"");
        assert!(GuestText::new(vec![1; 1 << 20]).as_str().len() < 300);
        assert!(GuestText::new("").is_empty());
    }
}
