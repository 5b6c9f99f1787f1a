//! Where the sockets come from that talk to a guest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rewake_sys::netns;

/// A source of fresh, unconnected, non-blocking TCP sockets over IPv4.
///
/// A socket keeps the network namespace it was made in, whoever uses it later. So a source
/// that makes its sockets inside a sandbox's namespace lets this process reach the guest over
/// the tap without a veth pair, a route or NAT.
///
/// Any `Fn() -> io::Result<OwnedFd>` is a source. It must hand out sockets with
/// `SOCK_NONBLOCK | SOCK_CLOEXEC`, and must not wait for anything outside the kernel.
pub trait SocketSource: Send + Sync {
    /// One socket nobody else holds.
    ///
    /// # Errors
    /// What `socket(2)` reported, or the source's own reason for having none.
    fn take(&self) -> io::Result<OwnedFd>;
}

impl<F: Fn() -> io::Result<OwnedFd> + Send + Sync> SocketSource for F {
    fn take(&self) -> io::Result<OwnedFd> {
        self()
    }
}

/// A source shared by a prober and the clients that follow it.
pub type Sockets = Arc<dyn SocketSource>;

/// Sockets made in the network namespace of the thread that asks.
#[derive(Debug, Clone, Copy, Default)]
pub struct CurrentNetns;

impl SocketSource for CurrentNetns {
    fn take(&self) -> io::Result<OwnedFd> {
        Ok(netns::tcp_socket()?)
    }
}

/// Sockets made inside a network namespace, in batches, since entering one costs a thread.
#[derive(Debug)]
pub struct InNetns {
    netns: OwnedFd,
    shelf: Mutex<Vec<OwnedFd>>,
}

impl InNetns {
    /// Sockets made at a time.
    pub const BATCH: usize = 16;

    /// A source for the namespace. Nothing is made before the first socket is asked for.
    #[must_use]
    pub fn new(netns: OwnedFd) -> Self {
        Self::with_shelf(netns, Vec::new())
    }

    /// A source that gives out `shelf` first: sockets made while the namespace was entered
    /// for another reason, ahead of the moment that counts.
    #[must_use]
    pub fn with_shelf(netns: OwnedFd, shelf: Vec<OwnedFd>) -> Self {
        let shelf = Mutex::new(shelf);
        Self { netns, shelf }
    }
}

impl SocketSource for InNetns {
    fn take(&self) -> io::Result<OwnedFd> {
        // A panic elsewhere cannot leave a `Vec` of descriptors half changed.
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        if shelf.is_empty() {
            *shelf = netns::tcp_sockets(self.netns.as_fd(), Self::BATCH)?;
        }
        shelf
            .pop()
            .ok_or_else(|| io::Error::other("A batch of sockets is empty"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_do_not_block() {
        let socket = CurrentNetns.take().unwrap();
        let flags = rustix::fs::fcntl_getfl(&socket).unwrap();
        assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    }

    #[test]
    fn a_shelf_is_emptied_before_the_namespace_is_entered() {
        // A descriptor that is no namespace: entering it fails.
        let nowhere = rustix::pipe::pipe().unwrap().0;
        let shelf = vec![CurrentNetns.take().unwrap(), CurrentNetns.take().unwrap()];
        let source = InNetns::with_shelf(nowhere, shelf);
        assert!(source.take().is_ok() && source.take().is_ok());
        assert!(source.take().is_err());
    }

    #[test]
    fn closures_are_sources() {
        let source: Sockets = Arc::new(|| CurrentNetns.take());
        assert!(source.take().is_ok());
    }
}
