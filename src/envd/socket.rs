//! Where the sockets come from that talk to a guest.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// A source of fresh, unconnected, non-blocking TCP sockets over IPv4.
///
/// A socket keeps the network namespace it was made in, whoever uses it later. So a source
/// that makes its sockets inside a sandbox's namespace lets this process reach the guest over
/// the tap without a veth pair, a route or NAT.
///
/// Any `Fn() -> io::Result<OwnedFd>` is a source. It must hand out sockets with
/// `SOCK_NONBLOCK | SOCK_CLOEXEC` and must not wait.
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
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        Ok(socket_with(
            AddressFamily::INET,
            SocketType::STREAM,
            flags,
            None,
        )?)
    }
}

/// Sockets made in advance, for a namespace that is entered once; more come from `refill`.
pub struct Stock<R> {
    shelf: Mutex<Vec<OwnedFd>>,
    refill: R,
}

impl<R> Stock<R>
where
    R: Fn() -> io::Result<Vec<OwnedFd>> + Send + Sync,
{
    /// A stock that begins with `shelf` and asks `refill` whenever it is empty.
    pub fn new(shelf: Vec<OwnedFd>, refill: R) -> Self {
        let shelf = Mutex::new(shelf);
        Self { shelf, refill }
    }
}

impl<R> SocketSource for Stock<R>
where
    R: Fn() -> io::Result<Vec<OwnedFd>> + Send + Sync,
{
    fn take(&self) -> io::Result<OwnedFd> {
        // A panic elsewhere cannot leave a `Vec` of descriptors half changed.
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        if shelf.is_empty() {
            *shelf = (self.refill)()?;
        }
        shelf
            .pop()
            .ok_or_else(|| io::Error::other("The stock of sockets is empty"))
    }
}

impl<R> fmt::Debug for Stock<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stock").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stock_refills_when_it_runs_out_and_reports_an_empty_refill() {
        let stock = Stock::new(vec![CurrentNetns.take().unwrap()], || {
            Ok(vec![CurrentNetns.take()?, CurrentNetns.take()?])
        });
        let taken: Vec<_> = (0..4).map(|_| stock.take().unwrap()).collect();
        assert_eq!(taken.len(), 4);
        let bare = Stock::new(Vec::new(), || Ok(Vec::new()));
        assert!(bare.take().is_err());
    }

    #[test]
    fn sockets_do_not_block() {
        let socket = CurrentNetns.take().unwrap();
        let flags = rustix::fs::fcntl_getfl(&socket).unwrap();
        assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    }
}
