//! The common case: a clean head that lies in the input as a whole.
//!
//! Each byte is looked at once, and the head is copied once. This path only ever accepts:
//! whatever is not plainly in order goes through the line-by-line path from its first byte,
//! which alone decides on errors. So there is one set of rules, and the fuzz targets, which
//! feed the same bytes whole and byte by byte, hold both paths against each other.

use super::error::HttpError;
use super::field;
use super::parser::{Facts, ResponseParser, State};

impl ResponseParser {
    /// Takes a whole head off the front of the input. `false`: nothing was taken.
    pub(super) fn quick_head(&mut self, rest: &mut &[u8]) -> Result<bool, HttpError> {
        let input = *rest;
        let window = &input[..input.len().min(usize::from(self.limits.head_bytes))];
        let Some(end) = self.scan(window) else {
            self.headers.clear();
            return Ok(false);
        };
        self.headers.buffer_mut().extend_from_slice(&window[..end]);
        *rest = &input[end..];
        self.line = end;
        self.end_of_head().map(|()| true)
    }

    /// Notes status, header lines and framing of a head. Gives its length.
    fn scan(&mut self, head: &[u8]) -> Option<usize> {
        let line = field::text(head);
        if line.len() + 2 > usize::from(self.limits.status_line_bytes) {
            return None;
        }
        let (is_http11, status) = field::status_line(line).ok()?;
        if status == 101 {
            return None;
        }
        let mut facts = Facts::of(is_http11);
        let mut at = line_end(head, line.len())?;
        self.headers.begin(at);
        loop {
            let left = &head[at..];
            if let [b'\r', b'\n', ..] = left {
                self.status = status;
                self.facts = facts;
                self.state = State::HeaderLines;
                return Some(at + 2);
            }
            let colon = field::token(left);
            if colon == 0 || left.get(colon) != Some(&b':') {
                return None;
            }
            let raw = field::text(&left[colon + 1..]);
            let (start, end) = field::trim(raw);
            facts.note(&left[..colon], &raw[start..end]).ok()?;
            if self.headers.len() >= usize::from(self.limits.header_lines) {
                return None;
            }
            self.headers.count();
            at = line_end(head, at + colon + 1 + raw.len())?;
        }
    }
}

/// Where the next line begins, if CR LF stands here.
fn line_end(head: &[u8], at: usize) -> Option<usize> {
    match head.get(at..at + 2) {
        Some(b"\r\n") => Some(at + 2),
        _ => None,
    }
}
