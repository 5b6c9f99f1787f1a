//! The common case: a clean head that lies in the input as a whole.
//!
//! Each byte is looked at once, and the head is copied once. This path only ever accepts:
//! whatever is not plainly in order goes through the line-by-line path from its first byte,
//! which alone decides on errors. So there is one set of rules, and the fuzz targets, which
//! feed the same bytes whole and byte by byte, hold both paths against each other.

use super::Limits;
use super::error::HttpError;
use super::field;
use super::parser::{Facts, ResponseParser};

/// A head that is in order.
struct Head {
    status: u16,
    facts: Facts,
    /// Where the header lines begin.
    first: usize,
    lines: usize,
    /// Its length.
    end: usize,
}

impl ResponseParser {
    /// Takes a whole head off the front of the input. `false`: nothing was taken.
    pub(super) fn quick_head(&mut self, rest: &mut &[u8]) -> Result<bool, HttpError> {
        let input = *rest;
        let window = &input[..input.len().min(usize::from(self.limits.head_bytes))];
        let Some(head) = scan(window, &self.limits) else {
            return Ok(false);
        };
        self.headers
            .set(&window[..head.end], head.first, head.lines);
        *rest = &input[head.end..];
        self.status = head.status;
        self.facts = head.facts;
        self.line = head.end;
        self.end_of_head().map(|()| true)
    }
}

fn scan(head: &[u8], limits: &Limits) -> Option<Head> {
    let line = field::text(head);
    if line.len() + 2 > usize::from(limits.status_line_bytes) {
        return None;
    }
    let (is_http11, digits, _) = field::split_status_line(line).ok()?;
    let status = field::status_code(digits).filter(|status| *status != 101)?;
    let mut facts = Facts::of(is_http11);
    let first = line_end(head, line.len())?;
    let (mut at, mut lines) = (first, 0);
    loop {
        let left = &head[at..];
        let colon = field::token(left);
        if colon == 0 {
            let end = line_end(head, at)?;
            return Some(Head {
                status,
                facts,
                first,
                lines,
                end,
            });
        }
        if left.get(colon) != Some(&b':') || lines >= usize::from(limits.header_lines) {
            return None;
        }
        let value = field::text(&left[colon + 1..]);
        facts.note(&left[..colon], value).ok()?;
        lines += 1;
        at = line_end(head, at + colon + 1 + value.len())?;
    }
}

/// Where the next line begins, if CR LF stands here.
fn line_end(head: &[u8], at: usize) -> Option<usize> {
    match head.get(at..at + 2) {
        Some(b"\r\n") => Some(at + 2),
        _ => None,
    }
}
