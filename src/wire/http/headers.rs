//! Header lines: one buffer with the head as it came, and where each name and value lies.

use std::fmt;
use std::ops::Range;

/// Lines whose places are kept without an allocation. Cloud Hypervisor sends four, envd
/// about six.
const INLINE: usize = 16;

/// Where a header's name and value lie in the head. Heads have at most 65,535 bytes.
#[derive(Clone, Copy, Default)]
struct Place {
    name: u16,
    name_len: u16,
    value: u16,
    value_len: u16,
}

/// The header lines of a response.
///
/// Names compare without regard to case; a name may occur more than once. Values are bytes
/// without surrounding white space: mostly ASCII, but the peer may send any byte from 0x80.
#[derive(Clone)]
pub struct Headers {
    head: Vec<u8>,
    inline: [Place; INLINE],
    more: Vec<Place>,
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
            headers: self,
            next: 0,
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

    /// No lines yet, over a buffer that the parser fills.
    pub(super) const fn over(head: Vec<u8>) -> Self {
        Self {
            head,
            inline: [Place {
                name: 0,
                name_len: 0,
                value: 0,
                value_len: 0,
            }; INLINE],
            more: Vec::new(),
            len: 0,
        }
    }

    pub(super) fn buffer(&self) -> &[u8] {
        &self.head
    }

    pub(super) fn buffer_mut(&mut self) -> &mut Vec<u8> {
        &mut self.head
    }

    /// Notes a line. The name must be ASCII, and both ranges lie in the buffer's first
    /// 65,535 bytes: the parser's bound on the head sees to it.
    pub(super) fn push(&mut self, name: &Range<usize>, value: &Range<usize>) {
        debug_assert!(name.end <= value.end.max(name.end) && value.end <= usize::from(u16::MAX));
        let place = Place {
            name: name.start as u16,
            name_len: name.len() as u16,
            value: value.start as u16,
            value_len: value.len() as u16,
        };
        match self.inline.get_mut(self.len) {
            Some(slot) => *slot = place,
            None => self.more.push(place),
        }
        self.len += 1;
    }

    /// Forgets all lines and their bytes, keeps the memory.
    pub(super) fn clear(&mut self) {
        self.head.clear();
        self.more.clear();
        self.len = 0;
    }

    fn at(&self, index: usize) -> Option<(&str, &[u8])> {
        if index >= self.len {
            return None;
        }
        let place = match self.inline.get(index) {
            Some(place) => place,
            None => self.more.get(index - INLINE)?,
        };
        let name = slice(&self.head, place.name, place.name_len)?;
        let value = slice(&self.head, place.value, place.value_len)?;
        Some((std::str::from_utf8(name).ok()?, value))
    }
}

fn slice(head: &[u8], start: u16, len: u16) -> Option<&[u8]> {
    head.get(usize::from(start)..)?.get(..usize::from(len))
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
        f.debug_map()
            .entries(
                self.iter()
                    .map(|(name, value)| (name, crate::wire::excerpt::excerpt(value))),
            )
            .finish()
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
    headers: &'a Headers,
    next: usize,
}

impl<'a> Iterator for Iter<'a> {
    type Item = (&'a str, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.headers.at(self.next)?;
        self.next += 1;
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_compare_without_case_and_lines_beyond_the_inline_ones_are_kept() {
        let mut headers = Headers::over(b"Name-Avalue".to_vec());
        for _ in 0..INLINE + 5 {
            headers.push(&(0..6), &(6..11));
        }
        assert_eq!(headers.len(), INLINE + 5);
        assert_eq!(headers.iter().count(), INLINE + 5);
        assert_eq!(headers.get("nAmE-a"), Some(&b"value"[..]));
        assert_eq!(headers.get("name"), None);
        assert!(headers.iter().all(|line| line == ("Name-A", b"value")));
    }
}
