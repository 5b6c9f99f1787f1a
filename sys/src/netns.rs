//! Network namespaces: open them, and run code inside them without moving the caller.
//!
//! `setns` changes the calling *thread*. So that no thread of a host program ever finds
//! itself elsewhere, all work inside a namespace runs on a thread made for it, which opens
//! what is needed (sockets and taps keep the namespace they were made in) and hands the
//! descriptors back. See `setns(2)`, `network_namespaces(7)`.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::error::{CallError, Named};

/// Where `ip netns` keeps its named namespaces.
pub const RUN_DIR: &str = "/run/netns";

/// The path under which `ip netns` shows a namespace of this name.
#[must_use]
pub fn named_path(name: &str) -> PathBuf {
    Path::new(RUN_DIR).join(name)
}

/// Opens a namespace by path (`/run/netns/NAME`, `/proc/PID/ns/net`).
///
/// # Errors
/// What `open` says. That the file is a network namespace shows only in [`run_in`].
pub fn open(path: &Path) -> Result<OwnedFd, CallError> {
    File::open(path).map(OwnedFd::from).named("open")
}

/// The network namespace of the calling thread.
///
/// # Errors
/// What `open` of `/proc/thread-self/ns/net` says.
pub fn current() -> Result<OwnedFd, CallError> {
    open(Path::new("/proc/thread-self/ns/net"))
}

/// Device and inode of a namespace file: its identity for as long as it exists.
///
/// # Errors
/// What `fstat` says.
pub fn identity(netns: BorrowedFd<'_>) -> Result<(u64, u64), CallError> {
    let stat = rustix::fs::fstat(netns).named("fstat")?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Runs `work` on a fresh thread inside the namespace. Blocks until it has ended.
///
/// The thread ends with `work`, so nothing ever has to find the way back.
///
/// # Errors
/// What `setns` says (`EINVAL`: not a network namespace, `EPERM`: no `CAP_SYS_ADMIN`), or
/// `EAGAIN` where no thread could be started.
///
/// # Panics
/// Where `work` panics, with its payload.
pub fn run_in<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> Result<T, CallError> {
    on_thread("rw-netns", || {
        move_into_link_name_space(netns, Some(LinkNameSpaceType::Network)).named("setns")?;
        Ok(work())
    })
}

/// Makes a fresh network namespace and runs `work` on a thread inside it.
///
/// The namespace lives on as long as a descriptor, socket, process or mount holds it;
/// `work` gets a descriptor of it.
///
/// # Errors
/// What `unshare(CLONE_NEWNET)` says, or `EAGAIN` where no thread could be started.
///
/// # Panics
/// Where `work` panics, with its payload.
pub fn run_in_new<T: Send>(work: impl FnOnce(OwnedFd) -> T + Send) -> Result<T, CallError> {
    on_thread("rw-netns-new", || {
        // SAFETY: CLONE_NEWNET alone does not unshare the descriptor table, the one thing
        // that would invalidate descriptors held by other code of this thread.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.named("unshare")?;
        Ok(work(current()?))
    })
}

fn on_thread<T: Send>(
    name: &str,
    work: impl FnOnce() -> Result<T, CallError> + Send,
) -> Result<T, CallError> {
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(scope, work)
            .named("clone")?;
        worker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Opens `count` non-blocking TCP sockets (IPv4) inside the namespace.
///
/// They stay in it wherever they are used, so a caller outside can connect with them.
///
/// # Errors
/// What `setns` or `socket` say.
pub fn tcp_sockets(netns: BorrowedFd<'_>, count: usize) -> Result<Vec<OwnedFd>, CallError> {
    run_in(netns, || (0..count).map(|_| tcp_socket()).collect())?
}

/// Opens one non-blocking TCP socket (IPv4) in the namespace of the calling thread.
///
/// # Errors
/// What `socket` says.
pub fn tcp_socket() -> Result<OwnedFd, CallError> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .named("socket")
}

/// The cookie of the calling thread's namespace: unlike its inode number, no namespace ever
/// gets the same again until the machine restarts. `None` before Linux 5.14.
///
/// # Errors
/// What `socket` or `getsockopt` say.
#[doc(alias = "SO_NETNS_COOKIE")]
pub fn current_cookie() -> Result<Option<u64>, CallError> {
    let socket = tcp_socket()?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the socket is open for the whole call; the value and its length are live,
    // writable and of the sizes that the arguments say.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if outcome == 0 {
        return Ok(Some(cookie));
    }
    let error = CallError::from_io("getsockopt", &std::io::Error::last_os_error());
    match error.errno() {
        libc::ENOPROTOOPT => Ok(None),
        _ => Err(error),
    }
}

/// Whether two descriptors name the same namespace.
///
/// # Errors
/// What `fstat` says.
pub fn same(a: impl AsFd, b: impl AsFd) -> Result<bool, CallError> {
    Ok(identity(a.as_fd())? == identity(b.as_fd())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_in_a_namespace_leaves_the_caller_where_it_was() {
        let before = current().unwrap();
        let made = match run_in_new(|fd| fd) {
            Ok(fd) => fd,
            Err(error) if error.is_denied() => {
                eprintln!("SKIP work_in_a_namespace_leaves_the_caller_where_it_was: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        assert!(!same(&made, &before).unwrap());
        let inside = run_in(made.as_fd(), || current().unwrap()).unwrap();
        assert!(same(&made, &inside).unwrap());
        assert!(same(current().unwrap(), &before).unwrap());
        assert_eq!(tcp_sockets(made.as_fd(), 3).unwrap().len(), 3);
    }

    #[test]
    fn a_file_that_is_no_namespace_is_refused() {
        let file = open(Path::new("/proc/self/status")).unwrap();
        let error = run_in(file.as_fd(), || ()).unwrap_err();
        assert_eq!(error.call(), "setns");
    }
}
