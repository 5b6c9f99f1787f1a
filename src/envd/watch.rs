//! Ending a wait when the VM behind it is gone.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use crate::wire::reactor::{Machine, wait};

/// Why a wait was ended from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Interrupt {
    /// The VMM has exited: nobody will ever answer, and the address may be somebody else's
    /// next.
    #[error("The VMM has exited")]
    VmmExited,
    /// The caller gave up.
    #[error("Cancelled")]
    Cancelled,
}

/// A machine that can be told to end. Its next [`advance`](Machine::advance) breaks.
pub trait Interruptible: Machine {
    /// Ends the machine with an error that says why. Ignored once it has ended.
    fn interrupt(&mut self, why: Interrupt);
}

const WATCHED: Token = Token(usize::MAX);

/// Drives a machine on a poll of its own, until it ends by itself or `vmm`, a pidfd, becomes
/// readable: then it is interrupted with [`Interrupt::VmmExited`]. Blocks.
///
/// # Errors
/// What `epoll` reports.
pub fn drive_while_alive<M: Interruptible>(
    machine: &mut M,
    vmm: Option<BorrowedFd<'_>>,
) -> io::Result<M::Output> {
    let mut poll = Poll::new()?;
    if let Some(pidfd) = vmm {
        let fd = pidfd.as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&fd), WATCHED, Interest::READABLE)?;
    }
    let mut events = Events::with_capacity(32);
    loop {
        if let ControlFlow::Break(output) = machine.advance(poll.registry(), Instant::now()) {
            return Ok(output);
        }
        wait(&mut poll, &mut events, machine.wake_at())?;
        for event in &events {
            if event.token() == WATCHED {
                machine.interrupt(Interrupt::VmmExited);
            } else {
                machine.on_event(poll.registry(), event);
            }
        }
    }
}
