//! A process whose descendants, mounts and namespaces end with it.
//!
//! [`contain`] is a `fork` into a pid namespace and a mount namespace of its own. The new
//! process is the namespace's first: when it dies, the kernel kills every other process in it,
//! and mounts made there are gone with the last of them. It dies with its maker, too. So
//! whatever way a program ends, `SIGKILL` included, nothing of what it started goes on. See
//! `pid_namespaces(7)`, `mount_namespaces(7)`, `PR_SET_PDEATHSIG` in `prctl(2)`.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::ptr;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::error::{CallError, Named};
use crate::netns;
use crate::process::{Exit, Process};

/// What asks a program to end, and is passed on by ending what it contains.
const REQUESTS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// A process that ends with its maker, and everything in it with it.
#[derive(Debug)]
pub struct Contained {
    process: Process,
    /// Open as long as the caller lives.
    gate: PipeWriter,
    signals: Signals,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, or killed by somebody else.
    By(Exit),
    /// The caller was asked to end by this signal, and has killed it.
    Asked(i32),
}

/// Forks the calling process, which must have one thread. The result is a hold on the new
/// process, and `None` in that one.
///
/// The new process has `/proc` of its own pid namespace, and mounts of its own that nobody
/// else sees. It waits until [`Contained::let_go`] is called, and is dead as soon as the caller is.
///
/// # Errors
/// `EINVAL` where the process has several threads, `EPERM` without `CAP_SYS_ADMIN`, else what
/// the calls say. Both processes return, each with its own failure.
#[doc(alias = "CLONE_NEWPID")]
pub fn contain() -> Result<Option<Contained>, CallError> {
    let threads = std::fs::read_dir("/proc/self/task").named("read /proc/self/task")?;
    if threads.count() != 1 {
        return Err(CallError::new("fork", Errno::INVAL));
    }
    let home = netns::open("/proc/self/ns/pid".as_ref())?;
    let (entry, gate) = io::pipe().named("pipe")?;
    // Of children that are ignored nobody is told how they ended, nor that they have.
    // SAFETY: the default action takes no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    let signals = Signals::hold()?;
    // SAFETY: CLONE_NEWPID concerns children only, and no descriptors.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }.named("unshare")?;
    // SAFETY: the process has one thread, so the child is in no state that another thread
    // left half changed; it goes on as this very program.
    let pid = unsafe { libc::fork() };
    let forked = if pid < 0 {
        Err(io::Error::last_os_error()).named("fork")
    } else {
        Ok(pid)
    };
    if matches!(forked, Ok(0)) {
        drop((gate, signals));
        return enter(entry).map(|()| None);
    }
    // Children of this process, and threads, are made where it is itself again.
    let back = move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::ProcessID));
    let pid = forked?;
    let process = Process::open(pid.unsigned_abs())?;
    back.named("setns")?;
    Ok(Some(Contained {
        process,
        gate,
        signals,
    }))
}

/// What the new process does first.
fn enter(mut entry: PipeReader) -> Result<(), CallError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).named("prctl")?;
    // Where the maker died before that, nobody kills this one. The maker's end of the pipe is
    // open as long as it lives, and what it wrote may be there though it does not.
    let mut word = [0];
    if entry.read_exact(&mut word).is_err() || is_closed(&entry)? {
        // SAFETY: takes an integer and does not return; runs no handlers.
        unsafe { libc::_exit(1) }
    }
    // SAFETY: CLONE_NEWNS does not unshare the descriptor table; there is one thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.named("unshare")?;
    // What is unmounted outside goes here, too, and so is not kept; nothing goes the other way.
    let one_way = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", one_way).named("mount")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", flags, None).named("mount /proc")
}

fn is_closed(entry: &PipeReader) -> Result<bool, CallError> {
    let mut fds = [PollFd::new(entry, PollFlags::IN)];
    retry_on_intr(|| poll(&mut fds, Some(&Timespec::default()))).named("poll")?;
    Ok(fds[0].revents().contains(PollFlags::HUP))
}

impl Contained {
    /// The process, by the pid that it has for the caller.
    #[must_use]
    pub const fn process(&self) -> &Process {
        &self.process
    }

    /// Lets it begin.
    ///
    /// # Errors
    /// `EPIPE` where it is dead already.
    pub fn let_go(&mut self) -> Result<(), CallError> {
        self.gate.write_all(&[1]).named("write")
    }

    /// Waits until it has ended, and everything in it; blocks without a limit. A request to
    /// end, by signal, ends it at once.
    ///
    /// # Errors
    /// What waiting says.
    pub fn wait(&self) -> Result<Ended, CallError> {
        let mut asked = None;
        loop {
            if let Some(exit) = self.process.try_wait()? {
                return Ok(asked.map_or(Ended::By(exit), Ended::Asked));
            }
            let signal = self.signals.next()?;
            if signal != libc::SIGCHLD {
                asked.get_or_insert(signal);
                self.process.kill()?;
            }
        }
    }
}

impl Drop for Contained {
    fn drop(&mut self) {
        if let Ok(None) = self.process.try_wait() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// Signals that wait to be asked for, until this is dropped.
#[derive(Debug)]
struct Signals {
    held: libc::sigset_t,
    before: libc::sigset_t,
}

impl Signals {
    fn hold() -> Result<Self, CallError> {
        let mut held = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set that the others change; all are live and
        // writable for the calls.
        let held = unsafe {
            libc::sigemptyset(held.as_mut_ptr());
            libc::sigaddset(held.as_mut_ptr(), libc::SIGCHLD);
            // What was ignored before, as under nohup, stays so.
            for signal in REQUESTS.into_iter().filter(|signal| !is_ignored(*signal)) {
                libc::sigaddset(held.as_mut_ptr(), signal);
            }
            held.assume_init()
        };
        let mut before = MaybeUninit::uninit();
        // SAFETY: both sets are live; the call fills the second where it succeeds.
        let before = unsafe {
            match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const held, before.as_mut_ptr()) {
                0 => before.assume_init(),
                errno => {
                    let errno = Errno::from_raw_os_error(errno);
                    return Err(CallError::new("pthread_sigmask", errno));
                }
            }
        };
        Ok(Self { held, before })
    }

    /// Waits for the next one.
    fn next(&self) -> Result<libc::c_int, CallError> {
        loop {
            // SAFETY: the set is live; nothing is wanted beside the number.
            let signal = unsafe { libc::sigwaitinfo(&raw const self.held, ptr::null_mut()) };
            if signal > 0 {
                return Ok(signal);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error).named("sigwaitinfo");
            }
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the set is live and was filled by the kernel.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut())
        };
    }
}

fn is_ignored(signal: libc::c_int) -> bool {
    let mut found = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the action is live and writable; all zero is a valid value of it.
    let found = unsafe {
        libc::sigaction(signal, ptr::null(), found.as_mut_ptr());
        found.assume_init()
    };
    found.sa_sigaction == libc::SIG_IGN
}

#[cfg(test)]
mod tests {
    // A test program has several threads; what `contain` does shows where commands use it.
    use super::*;

    #[test]
    fn a_process_with_several_threads_is_refused() {
        let error = contain().unwrap_err();
        assert_eq!((error.call(), error.errno()), ("fork", libc::EINVAL));
    }
}
