//! Noticing VMs that end by themselves.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rewake_sys::process::Process;

use super::Host;
use crate::deadline::Deadline;
use crate::ids::SandboxId;
use crate::sandbox::{self, Error, Sandbox};
use crate::wire::reactor::wait;

/// A watch over the VMs of a host.
///
/// It waits for their pidfds, so it costs nothing while they live. What ends because somebody
/// paused or destroyed it is no event; whatever else ends is noted as lost, its slot is given
/// back, and the caller is told.
pub struct Watch {
    host: Host,
    poll: Poll,
    watched: BTreeMap<Token, (SandboxId, Process)>,
    /// Those whose VMs have ended.
    ended: Vec<SandboxId>,
    next: usize,
}

impl Host {
    /// A watch over all sandboxes that run now. Those that come later are
    /// [added](Watch::add).
    ///
    /// # Errors
    /// Where sandboxes cannot be listed, or `epoll` cannot be set up.
    pub fn watch(&self) -> Result<Watch, Error> {
        let poll = Poll::new().map_err(|error| sandbox::cannot_watch(None, error))?;
        let mut watch = Watch {
            host: self.clone(),
            poll,
            watched: BTreeMap::new(),
            ended: Vec::new(),
            next: 0,
        };
        for sandbox in self.sandboxes()? {
            watch.add(&sandbox)?;
        }
        Ok(watch)
    }
}

impl Watch {
    /// Watches a sandbox from now on, for the life that it lives. One that does not run is
    /// not watched; one whose VM has ended already is reported next.
    ///
    /// # Errors
    /// Where its journal cannot be read, or `epoll` refuses.
    pub fn add(&mut self, sandbox: &Sandbox) -> Result<(), Error> {
        let process = match sandbox.process() {
            Ok(process) => process,
            Err(error) if error.is_ended() => {
                self.ended.push(sandbox.id().clone());
                return Ok(());
            }
            Err(error) if error.is_unknown() || error.is_wrong_state() => return Ok(()),
            Err(error) => return Err(error),
        };
        self.next += 1;
        let token = Token(self.next);
        let fd = process.as_fd().as_raw_fd();
        self.poll
            .registry()
            .register(&mut SourceFd(&fd), token, Interest::READABLE)
            .map_err(|error| sandbox::cannot_watch(Some(sandbox.id()), error))?;
        self.watched.insert(token, (sandbox.id().clone(), process));
        Ok(())
    }

    /// How many are watched.
    #[must_use]
    pub fn len(&self) -> usize {
        self.watched.len()
    }

    /// Whether none is watched.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.watched.is_empty()
    }

    /// Waits until a VM has ended that nobody asked to, and returns its sandbox, which is
    /// lost from now on. `None` once the deadline has passed. Blocks.
    ///
    /// # Errors
    /// What `epoll` reports.
    pub fn next(&mut self, deadline: Deadline) -> io::Result<Option<SandboxId>> {
        let mut events = Events::with_capacity(64);
        loop {
            while let Some(id) = self.ended.pop() {
                if sandbox::note_end(self.host.context(), &id) {
                    return Ok(Some(id));
                }
            }
            if deadline.has_passed() {
                return Ok(None);
            }
            wait(&mut self.poll, &mut events, deadline.instant())?;
            for event in &events {
                self.took_note_of(event.token());
            }
        }
    }

    fn took_note_of(&mut self, token: Token) {
        let Some((id, process)) = self.watched.remove(&token) else {
            return;
        };
        let fd = process.as_fd().as_raw_fd();
        // It was registered by us and is still open, so this cannot fail.
        let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
        self.ended.push(id);
    }
}
