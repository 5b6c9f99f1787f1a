//! The way out of one guest connection, with the faults that were ordered for it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::sim::fault::What;

/// Bytes on their way to the host.
#[derive(Debug, Default)]
pub(super) struct Outlet {
    bytes: VecDeque<u8>,
    not_before: Option<Instant>,
    trickle: Option<Duration>,
    endless: bool,
    reset_at_end: bool,
}

impl Outlet {
    /// Adds the bytes of an answer.
    pub(super) fn push(&mut self, answer: Vec<u8>, faults: &[What], now: Instant) {
        let mut answer = answer;
        for fault in faults {
            match fault {
                What::Silent => return,
                What::SlowFirstByte(by) => self.not_before = Some(now + *by),
                What::Trickle(pace) => self.trickle = Some(*pace),
                What::Garbage => answer = b"\x00\xffgarbage as ordered\n".to_vec(),
                What::EndlessBody => {
                    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n".to_vec();
                    self.endless = true;
                }
                What::ResetMidBody => {
                    answer.truncate(answer.len().saturating_sub(5));
                    self.reset_at_end = true;
                }
                _ => {}
            }
        }
        self.bytes.extend(answer);
    }

    /// Up to `max` bytes that may go now.
    pub(super) fn take(&mut self, max: usize, now: Instant) -> Vec<u8> {
        if self.not_before.is_some_and(|at| now < at) {
            return Vec::new();
        }
        self.not_before = None;
        if self.endless && self.bytes.len() < max {
            self.bytes.extend(std::iter::repeat_n(b'x', max));
        }
        let room = if self.trickle.is_some() {
            max.min(1)
        } else {
            max
        };
        let count = room.min(self.bytes.len());
        let taken: Vec<u8> = self.bytes.drain(..count).collect();
        if let Some(pace) = self.trickle
            && !taken.is_empty()
        {
            self.not_before = Some(now + pace);
        }
        taken
    }

    /// Puts back what could not be written.
    pub(super) fn give_back(&mut self, rest: &[u8]) {
        for byte in rest.iter().rev() {
            self.bytes.push_front(*byte);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && !self.endless
    }

    /// The connection has to be reset now.
    pub(super) fn must_reset(&self) -> bool {
        self.reset_at_end && self.bytes.is_empty()
    }

    /// When held bytes may go.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        if self.is_empty() {
            None
        } else {
            self.not_before
        }
    }
}
