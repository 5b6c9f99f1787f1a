//! Header lines: the head as it came, in one buffer. Lines are found when asked for, so a
//! header costs neither an allocation nor an entry in a table.

use std::fmt;

use memchr::memchr;

use super::field;
use super::parser::append;
use crate::wire::excerpt::excerpt;

/// The header lines of a response.
///
/// Names compare without regard to case; a name may occur more than once. Values are bytes
/// without surrounding white space: mostly ASCII, but the peer may send any byte from 0x80.
/// Looking one up walks over the lines before it.
#[derive(Clone, Default)]
pub struct Headers {
    /// Status line, header lines and the empty line, all of them checked.
    head: Vec<u8>,
    /// Where the header lines begin.
    first: usize,
    len: usize,
}

impl Headers {
    /// The value of the first header of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    }

    /// The value of the first header of this name, where it is UTF-8.
    #[must_use]
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name)
            .and_then(|value| std::str::from_utf8(value).ok())
    }

    /// All names and values, in the order in which they came.
    #[must_use]
    pub fn iter(&self) -> Iter<'_> {
        Iter {
            rest: self.head.get(self.first..).unwrap_or_default(),
            left: self.len,
        }
    }

    /// Number of header lines.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no header line.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn buffer(&self) -> &[u8] {
        &self.head
    }

    pub(super) const fn buffer_mut(&mut self) -> &mut Vec<u8> {
        &mut self.head
    }

    /// Notes that the status line ends here.
    pub(super) const fn begin(&mut self, first: usize) {
        self.first = first;
        self.len = 0;
    }

    /// Notes one more checked line.
    pub(super) const fn count(&mut self) {
        self.len += 1;
    }

    /// Takes over a whole checked head, with the memory of the last one where there is some.
    pub(super) fn set(&mut self, head: &[u8], first: usize, len: usize) {
        append(&mut self.head, head);
        self.first = first;
        self.len = len;
    }

    /// Forgets all lines and their bytes, keeps the memory.
    pub(super) fn clear(&mut self) {
        self.head.clear();
        self.begin(0);
    }
}

impl PartialEq for Headers {
    /// Same names (without regard to case) and values, in the same order.
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len
            && self
                .iter()
                .zip(other.iter())
                .all(|(a, b)| a.0.eq_ignore_ascii_case(b.0) && a.1 == b.1)
    }
}

impl Eq for Headers {}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.iter().map(|(name, value)| (name, excerpt(value)));
        f.debug_map().entries(lines).finish()
    }
}

impl<'a> IntoIterator for &'a Headers {
    type Item = (&'a str, &'a [u8]);
    type IntoIter = Iter<'a>;
    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

/// Names and values of [`Headers`].
#[derive(Debug, Clone)]
pub struct Iter<'a> {
    rest: &'a [u8],
    left: usize,
}

impl<'a> Iterator for Iter<'a> {
    type Item = (&'a str, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let (line, rest) = self.rest.split_at(memchr(b'\n', self.rest)? + 1);
        self.rest = rest;
        let (name, value) = line.split_at(memchr(b':', line)?);
        // The name was checked to be a token, which is ASCII.
        let name = std::str::from_utf8(name).ok()?;
        let value = value[1..].strip_suffix(b"\r\n")?;
        Some((name, field::trim(value)))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Iter<'_> {}
