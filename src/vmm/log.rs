//! What Cloud Hypervisor writes to its standard output and error, bounded.
//!
//! CH logs under one lock with blocking writes, so a pipe that nobody drains freezes the
//! whole VMM and its guest, and a file grows without limit where a guest provokes warnings.
//! Here CH gets a pipe that it holds open for reading *and* writing, in non-blocking mode
//! (the logger ignores write errors): the kernel bounds it, a full pipe costs lines instead
//! of a frozen guest, and it survives the end of the program that started CH. Any later
//! program of the same user can take up reading at `/proc/PID/fd/1`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rewake_sys::CallError;
use rewake_sys::error::Named;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;

use crate::wire::excerpt::excerpt;

/// Bytes of log that are kept: the newest ones.
pub const KEPT_BYTES: usize = 64 << 10;

/// The reading side of CH's log pipe, and the newest part of what came through it.
#[derive(Debug)]
pub struct Log {
    pipe: File,
    tail: VecDeque<u8>,
    seen_bytes: u64,
}

/// Makes a pipe of which the writing side is open in both directions, so that a write never
/// fails for want of a reader. Returns the reading side and that one, both non-blocking.
///
/// # Errors
/// What `pipe2` and `open` of `/proc/self/fd/N` say.
pub(super) fn lasting_pipe() -> Result<(OwnedFd, OwnedFd), CallError> {
    let (read, write) =
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).named("pipe2")?;
    let both = rustix::fs::open(
        format!("/proc/self/fd/{}", write.as_raw_fd()),
        OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .named("open /proc/self/fd")?;
    Ok((read, both))
}

impl Log {
    /// Makes the pipe; the second value is for CH's descriptors 1 and 2.
    ///
    /// # Errors
    /// What `pipe2` and `open` say.
    pub fn new() -> Result<(Self, OwnedFd), CallError> {
        let (read, write) = lasting_pipe()?;
        let log = Self {
            pipe: File::from(read),
            tail: VecDeque::new(),
            seen_bytes: 0,
        };
        Ok((log, write))
    }

    /// Reads what has come, without waiting. At most 1 MiB a call, so that a process that
    /// floods its log cannot keep the caller here; `true` means that there may be more.
    ///
    /// # Errors
    /// What `read` says; `EINTR` and `EAGAIN` are handled.
    pub fn drain(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 8 << 10];
        for _ in 0..128 {
            match self.pipe.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(count) => self.keep(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.seen_bytes += bytes.len() as u64;
        self.tail.extend(bytes);
        let excess = self.tail.len().saturating_sub(KEPT_BYTES);
        self.tail.drain(..excess);
    }

    /// Bytes that came through in all.
    #[must_use]
    pub const fn seen_bytes(&self) -> u64 {
        self.seen_bytes
    }

    /// The newest bytes, at most [`KEPT_BYTES`].
    #[must_use]
    pub fn tail(&self) -> Vec<u8> {
        self.tail.iter().copied().collect()
    }

    /// The last `lines` lines that are not empty, escaped and cut for an error message.
    #[must_use]
    pub fn last_lines(&self, lines: usize) -> Vec<String> {
        let tail = self.tail();
        let mut last: Vec<String> = tail
            .split(|byte| *byte == b'\n')
            .rev()
            .filter(|line| !line.trim_ascii().is_empty())
            .take(lines)
            .map(|line| excerpt(line.trim_ascii()))
            .collect();
        last.reverse();
        last
    }
}

impl AsFd for Log {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_log_that_nobody_drains_loses_lines_instead_of_blocking_its_writer() {
        let (mut log, write) = Log::new().unwrap();
        let mut writer = File::from(write);
        let mut refused = false;
        for _ in 0..100 {
            match writer.write_all(&[b'x'; 4096]) {
                Ok(()) => {}
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    refused = true;
                    break;
                }
            }
        }
        assert!(refused, "the pipe must be bounded");
        log.drain().unwrap();
        writer.write_all(b"\nlast words\n\n").unwrap();
        log.drain().unwrap();
        assert_eq!(log.last_lines(1), ["last words"]);
        assert_eq!(log.tail().len(), KEPT_BYTES);
        assert!(log.seen_bytes() > KEPT_BYTES as u64);
    }

    #[test]
    fn a_writer_survives_its_reader() {
        let (log, write) = Log::new().unwrap();
        drop(log);
        let mut writer = File::from(write);
        writer.write_all(b"nobody listens\n").unwrap();
    }

    #[test]
    fn quoted_lines_are_escaped() {
        let (mut log, write) = Log::new().unwrap();
        File::from(write).write_all(b"a\x1b[31mb\r\nc\n").unwrap();
        log.drain().unwrap();
        let lines = log.last_lines(5);
        assert_eq!(lines.len(), 2);
        assert!(!lines[0].contains('\x1b'), "{lines:?}");
    }
}
