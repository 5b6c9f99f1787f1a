//! Starting, watching and ending processes.
//!
//! [`Spawn`] is a vfork-class start: the child shares the parent's memory until `exec`
//! (`CLONE_VM | CLONE_VFORK`), so its cost does not grow with the parent's size, as that of
//! a `fork` with a closure in between does. What happens between `clone` and `exec` is a
//! fixed list of system calls on data prepared beforehand: nothing in there allocates, locks
//! or runs code of the caller.
//!
//! Processes are held by pidfd ([`Process`]): a pid alone may be somebody else's a moment
//! later. See `clone(2)`, `pidfd_open(2)`, `waitid(2)`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use crate::error::{CallError, Named};

/// One change to the child's own mount namespace, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountStep {
    /// An empty tmpfs over an existing directory, mode 0700.
    Tmpfs {
        /// The directory.
        at: CString,
    },
    /// A directory, mode 0700; one that exists already will do.
    Directory {
        /// Its path.
        at: CString,
    },
    /// A symbolic link.
    Symlink {
        /// What the link says.
        target: CString,
        /// Where the link lies.
        at: CString,
    },
}

/// What to start, and in which surroundings.
///
/// The child gets exactly the environment and descriptors named here; standard input,
/// output and error too are only what [`Spawn::fds`] makes them.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// Path of the program; it is not looked up.
    pub program: CString,
    /// All arguments, the program's own name first.
    pub args: Vec<CString>,
    /// The whole environment, `NAME=value` each.
    pub env: Vec<CString>,
    /// Descriptors that the child gets, with their numbers there: at most 64, below 512.
    pub fds: Vec<(BorrowedFd<'a>, RawFd)>,
    /// The network namespace to start in.
    pub netns: Option<BorrowedFd<'a>>,
    /// A mount namespace of its own, made private, with these steps done in it.
    pub mounts: Option<Vec<MountStep>>,
    /// A session (and so a process group) of its own, away from the terminal.
    pub new_session: bool,
}

/// The step between `clone` and `exec` that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Cannot start the process")]
pub struct SpawnError(#[source] pub CallError);

/// A process that is held by its pidfd.
#[derive(Debug)]
pub struct Process {
    pidfd: OwnedFd,
    pid: Pid,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this status.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => match nix_signal_name(*signal) {
                Some(name) => write!(f, "{name}"),
                None => write!(f, "signal {signal}"),
            },
        }
    }
}

fn nix_signal_name(signal: i32) -> Option<&'static str> {
    const NAMES: [(i32, &str); 9] = [
        (libc::SIGKILL, "SIGKILL"),
        (libc::SIGTERM, "SIGTERM"),
        (libc::SIGINT, "SIGINT"),
        (libc::SIGHUP, "SIGHUP"),
        (libc::SIGSEGV, "SIGSEGV"),
        (libc::SIGABRT, "SIGABRT"),
        (libc::SIGBUS, "SIGBUS"),
        (libc::SIGSYS, "SIGSYS"),
        (libc::SIGPIPE, "SIGPIPE"),
    ];
    NAMES
        .iter()
        .find_map(|(number, name)| (*number == signal).then_some(*name))
}

/// The lowest number that a source descriptor is copied to before it takes its final one,
/// so that no target can overwrite a source that is still needed.
const PARKING: RawFd = 512;
const MAX_DESCRIPTORS: usize = 64;
const STACK_BYTES: usize = 64 << 10;
const GUARD_BYTES: usize = 4 << 10;
const KERNEL_SIGNALS: c_int = 64;

impl Spawn<'_> {
    /// Starts the process. Blocks until its `exec` has succeeded or failed.
    ///
    /// # Errors
    /// The first call that failed on the way, in the child or before it. Nothing is left of
    /// the child then; it has been reaped.
    pub fn start(&self) -> Result<Process, SpawnError> {
        self.clone_and_exec().map_err(SpawnError)
    }

    fn clone_and_exec(&self) -> Result<Process, CallError> {
        if self.fds.len() > MAX_DESCRIPTORS || self.fds.iter().any(|(_, to)| *to >= PARKING) {
            return Err(CallError::new("dup2", Errno::BADF));
        }
        let argv = null_terminated(&self.args);
        let envp = null_terminated(&self.env);
        let mut child = Child {
            program: &self.program,
            argv: &argv,
            envp: &envp,
            fds: &self.fds,
            netns: self.netns.map(|fd| fd.as_raw_fd()),
            mounts: self.mounts.as_deref(),
            new_session: self.new_session,
            failure: None,
        };
        let stack = Stack::new()?;
        let mut pidfd: c_int = -1;
        // With every signal blocked, no handler of this process can run in the child while
        // the two share memory.
        let _blocked = SignalsBlocked::new()?;
        // SAFETY: the stack belongs to this call and is unmapped only after the child has
        // left it: CLONE_VFORK suspends this thread until the child execs or exits. `child`
        // lives as long, is touched by the child alone meanwhile, and `child_main` makes
        // only async-signal-safe calls. Without CLONE_FILES, CLONE_FS and CLONE_SIGHAND
        // the child works on copies of descriptors, root and handlers. CLONE_PIDFD writes
        // one int through its pointer.
        let pid = unsafe {
            libc::clone(
                child_main,
                stack.top(),
                libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD,
                ptr::from_mut(&mut child).cast(),
                ptr::from_mut(&mut pidfd),
            )
        };
        if pid < 0 {
            return Err(io::Error::last_os_error()).named("clone");
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let pid = Pid::from_raw(pid).ok_or(CallError::new("clone", Errno::CHILD))?;
        let process = Process { pidfd, pid };
        match child.failure {
            None => Ok(process),
            Some((call, errno)) => {
                let _ = process.wait();
                Err(CallError::new(call, Errno::from_raw_os_error(errno)))
            }
        }
    }
}

fn null_terminated(strings: &[CString]) -> Vec<*const c_char> {
    let pointers = strings.iter().map(|s| s.as_ptr());
    pointers.chain([ptr::null()]).collect()
}

/// All that the child needs, prepared by the parent, and where it leaves its failure.
struct Child<'a> {
    program: &'a CStr,
    argv: &'a [*const c_char],
    envp: &'a [*const c_char],
    fds: &'a [(BorrowedFd<'a>, RawFd)],
    netns: Option<RawFd>,
    mounts: Option<&'a [MountStep]>,
    new_session: bool,
    failure: Option<(&'static str, c_int)>,
}

/// Runs in the child, on memory it shares with the suspended parent.
extern "C" fn child_main(argument: *mut c_void) -> c_int {
    // SAFETY: the parent passed a pointer to its `Child`, which outlives this function, and
    // is suspended until this process execs or exits.
    let child = unsafe { &mut *argument.cast::<Child<'_>>() };
    let (call, errno) = child.run();
    child.failure = Some((call, errno));
    // SAFETY: _exit runs no handlers and flushes nothing of the parent's.
    unsafe { libc::_exit(127) }
}

type Step = Result<(), (&'static str, c_int)>;

impl Child<'_> {
    /// Everything up to `exec`; returns only with the call that failed.
    fn run(&self) -> (&'static str, c_int) {
        match self.prepare() {
            Ok(()) => {
                // SAFETY: program, argv and envp are NUL-terminated and null-terminated,
                // and live in the suspended parent.
                unsafe {
                    libc::execve(
                        self.program.as_ptr(),
                        self.argv.as_ptr(),
                        self.envp.as_ptr(),
                    )
                };
                ("execve", last_errno())
            }
            Err(failure) => failure,
        }
    }

    fn prepare(&self) -> Step {
        reset_signal_dispositions();
        if self.new_session {
            // SAFETY: no arguments, no memory.
            check("setsid", unsafe { libc::setsid() })?;
        }
        if let Some(netns) = self.netns {
            // SAFETY: takes integers; moves this one process only.
            check("setns", unsafe { libc::setns(netns, libc::CLONE_NEWNET) })?;
        }
        if let Some(steps) = self.mounts {
            private_mounts(steps)?;
        }
        self.place_descriptors()?;
        unblock_signals()
    }

    fn place_descriptors(&self) -> Step {
        let highest = self.fds.iter().map(|(_, target)| *target).max();
        // Two passes: first out of the way, then to the final number.
        let mut parked = [-1; MAX_DESCRIPTORS];
        for (place, (source, _)) in parked.iter_mut().zip(self.fds) {
            // SAFETY: takes integers; changes this process's own descriptor table.
            *place = unsafe { libc::fcntl(source.as_raw_fd(), libc::F_DUPFD_CLOEXEC, PARKING) };
            check("F_DUPFD_CLOEXEC", *place)?;
        }
        for (place, (_, target)) in parked.iter().zip(self.fds) {
            // SAFETY: as above; the copy loses its close-on-exec flag.
            check("dup2", unsafe { libc::dup2(*place, *target) })?;
        }
        // Everything not asked for is closed, whatever its flags: gaps below the highest
        // target one by one, the rest in one call.
        for fd in 0..highest.map_or(0, |highest| highest + 1) {
            if !self.fds.iter().any(|(_, target)| *target == fd) {
                // SAFETY: closing a number that is not open is harmless.
                unsafe { libc::close(fd) };
            }
        }
        let first = highest.map_or(0, |highest| highest + 1);
        // SAFETY: takes integers; changes this process's own descriptor table.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
        check("close_range", closed as c_int)
    }
}

fn private_mounts(steps: &[MountStep]) -> Step {
    // SAFETY: takes an integer; moves this one process into a copy of its mount namespace.
    check("unshare", unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    // SAFETY: constant strings; propagation from here to the host's namespace is cut.
    check("mount", unsafe {
        libc::mount(
            c"none".as_ptr(),
            c"/".as_ptr(),
            ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            ptr::null(),
        )
    })?;
    for step in steps {
        match step {
            // SAFETY: NUL-terminated strings that the suspended parent owns.
            MountStep::Tmpfs { at } => check("mount tmpfs", unsafe {
                libc::mount(
                    c"rewake".as_ptr(),
                    at.as_ptr(),
                    c"tmpfs".as_ptr(),
                    libc::MS_NOSUID | libc::MS_NODEV,
                    c"mode=0700,size=1m".as_ptr().cast(),
                )
            })?,
            MountStep::Directory { at } => {
                // SAFETY: as above.
                let made = unsafe { libc::mkdir(at.as_ptr(), 0o700) };
                if made < 0 && last_errno() != libc::EEXIST {
                    return Err(("mkdir", last_errno()));
                }
            }
            // SAFETY: as above.
            MountStep::Symlink { target, at } => check("symlink", unsafe {
                libc::symlink(target.as_ptr(), at.as_ptr())
            })?,
        }
    }
    Ok(())
}

/// Makes every signal's disposition the default, so that none of the parent's handlers can
/// run here, and ignored signals (Rust programs ignore SIGPIPE) are not inherited.
fn reset_signal_dispositions() {
    // `struct kernel_sigaction`: handler, flags, (restorer,) mask; all zero is SIG_DFL.
    let default = [0_u64; 4];
    for signal in 1..=KERNEL_SIGNALS {
        // SAFETY: reads one kernel sigaction, at most 32 bytes, with a mask of 8 bytes.
        // SIGKILL and SIGSTOP are refused, which is fine.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null_mut::<c_void>(),
                8_usize,
            )
        };
    }
}

fn unblock_signals() -> Step {
    let none = 0_u64;
    // SAFETY: reads a signal set of 8 bytes.
    let done = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            ptr::from_ref(&none),
            ptr::null_mut::<c_void>(),
            8_usize,
        )
    };
    check("rt_sigprocmask", done as c_int)
}

fn check(call: &'static str, result: c_int) -> Step {
    if result < 0 {
        Err((call, last_errno()))
    } else {
        Ok(())
    }
}

fn last_errno() -> c_int {
    // SAFETY: the location is valid for this thread; in the child it is the suspended
    // parent's, which expects nothing of it.
    unsafe { *libc::__errno_location() }
}

/// Every signal blocked on this thread until it is dropped.
struct SignalsBlocked {
    before: u64,
}

impl SignalsBlocked {
    fn new() -> Result<Self, CallError> {
        let all = u64::MAX;
        let mut before = 0_u64;
        // SAFETY: reads one signal set of 8 bytes and writes another.
        let done = unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                ptr::from_ref(&all),
                ptr::from_mut(&mut before),
                8_usize,
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error()).named("rt_sigprocmask");
        }
        Ok(Self { before })
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: reads one signal set of 8 bytes, the one that was in force before.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                ptr::from_ref(&self.before),
                ptr::null_mut::<c_void>(),
                8_usize,
            )
        };
    }
}

/// The child's stack, with an unmapped page below it.
struct Stack {
    base: *mut c_void,
}

impl Stack {
    fn new() -> Result<Self, CallError> {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                STACK_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::STACK,
            )
        }
        .named("mmap")?;
        let stack = Self { base };
        // SAFETY: the lowest page of a mapping that nobody else knows of.
        unsafe { rustix::mm::mprotect(base, GUARD_BYTES, MprotectFlags::empty()) }
            .named("mprotect")?;
        Ok(stack)
    }

    /// Its upper end, where it begins to grow down; page-aligned.
    fn top(&self) -> *mut c_void {
        self.base.wrapping_byte_add(STACK_BYTES)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and the child has left it (CLONE_VFORK).
        let _ = unsafe { rustix::mm::munmap(self.base, STACK_BYTES) };
    }
}

impl Process {
    /// Takes hold of a running process that somebody else started.
    ///
    /// # Errors
    /// `ESRCH` where there is none. Compare [`start_time`] before trusting the pid.
    pub fn open(pid: u32) -> Result<Self, CallError> {
        let pid = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(CallError::new("pidfd_open", Errno::SRCH))?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).named("pidfd_open")?;
        Ok(Self { pidfd, pid })
    }

    /// The process id; meaningful while the process has not been reaped.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a signal. A process that has ended already counts as signalled.
    ///
    /// # Errors
    /// `EPERM` where it belongs to somebody else.
    #[doc(alias = "pidfd_send_signal")]
    pub fn signal(&self, signal: Signal) -> Result<(), CallError> {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Err(Errno::SRCH) => Ok(()),
            other => other.named("pidfd_send_signal"),
        }
    }

    /// Ends the process at once (`SIGKILL`).
    ///
    /// # Errors
    /// `EPERM` where it belongs to somebody else.
    pub fn kill(&self) -> Result<(), CallError> {
        self.signal(Signal::KILL)
    }

    /// Reaps the process if it has ended; `None` while it runs. Does not block.
    ///
    /// # Errors
    /// `ECHILD` where it is no child of this process or was reaped before.
    pub fn try_wait(&self) -> Result<Option<Exit>, CallError> {
        self.waitid(WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
    }

    /// Waits for the end of the process and reaps it. Blocks without a limit: for processes
    /// that were killed, or whose pidfd has polled readable.
    ///
    /// # Errors
    /// `ECHILD` where it is no child of this process or was reaped before.
    pub fn wait(&self) -> Result<Option<Exit>, CallError> {
        self.waitid(WaitIdOptions::EXITED)
    }

    fn waitid(&self, options: WaitIdOptions) -> Result<Option<Exit>, CallError> {
        let status = rustix::io::retry_on_intr(|| {
            rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options)
        })
        .named("waitid")?;
        Ok(status.map(
            |status| match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, signal) => Exit::Signal(signal.unwrap_or(0)),
            },
        ))
    }

    /// Whether the process has ended, reaped or not.
    ///
    /// # Errors
    /// What `poll` says.
    pub fn has_ended(&self) -> Result<bool, CallError> {
        self.wait_ended(Some(Duration::ZERO))
    }

    /// Waits until the process has ended, `timeout` at the longest (`None`: for ever), and
    /// says whether it has. It is not reaped. Works for processes of other parents too.
    ///
    /// # Errors
    /// What `poll` says.
    pub fn wait_ended(&self, timeout: Option<Duration>) -> Result<bool, CallError> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.map(|left| Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            });
            match poll(&mut fds, left.as_ref()) {
                Err(Errno::INTR) => {}
                other => return Ok(other.named("poll")? > 0),
            }
        }
    }
}

impl AsFd for Process {
    /// The pidfd: it polls readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// When a process started, in clock ticks since boot (field 22 of `/proc/PID/stat`): with
/// the pid, its identity. `None` where there is no such process.
#[must_use]
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; fields are counted after the last one.
    let after_name = &stat[stat.rfind(')')? + 1..];
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn shell<'a>(script: &str, fds: Vec<(BorrowedFd<'a>, RawFd)>) -> Spawn<'a> {
        Spawn {
            program: c"/bin/sh".into(),
            args: [c"sh".into(), c"-c".into(), CString::new(script).unwrap()].into(),
            env: vec![c"ONLY=this".into()],
            fds,
            netns: None,
            mounts: None,
            new_session: true,
        }
    }

    fn output(script: &str) -> (String, Exit) {
        let (mut read, write) = io::pipe().unwrap();
        let null = fs::File::open("/dev/null").unwrap();
        let child = shell(script, vec![(null.as_fd(), 0), (write.as_fd(), 1)])
            .start()
            .unwrap();
        drop(write);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        let exit = child.wait().unwrap().unwrap();
        (text, exit)
    }

    #[test]
    fn a_child_gets_only_the_environment_and_descriptors_it_was_given() {
        let leaked = fs::File::open("/dev/zero").unwrap();
        rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
        let (text, exit) = output("echo \"$ONLY-$HOME\"; cd /proc/self/fd; echo *; exit 7");
        assert_eq!(exit, Exit::Code(7));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "this-");
        // The shell itself may hold one more descriptor for the glob.
        let fds: Vec<&str> = lines[1].split(' ').collect();
        assert!(fds.starts_with(&["0", "1"]) && fds.len() <= 3, "{fds:?}");
    }

    #[test]
    fn descriptors_may_trade_places() {
        let (mut read_a, write_a) = io::pipe().unwrap();
        let (mut read_b, write_b) = io::pipe().unwrap();
        let (a, b) = (write_a.as_raw_fd(), write_b.as_raw_fd());
        // The shell takes only one digit after `>&`.
        let script = format!("echo a >/proc/self/fd/{b}; echo b >/proc/self/fd/{a}");
        let child = shell(&script, vec![(write_a.as_fd(), b), (write_b.as_fd(), a)])
            .start()
            .unwrap();
        drop((write_a, write_b));
        let (mut from_a, mut from_b) = (String::new(), String::new());
        read_a.read_to_string(&mut from_a).unwrap();
        read_b.read_to_string(&mut from_b).unwrap();
        child.wait().unwrap();
        assert_eq!((from_a.trim(), from_b.trim()), ("a", "b"));
    }

    #[test]
    fn a_failed_exec_names_the_call_and_leaves_no_child() {
        let mut spawn = shell("", vec![]);
        spawn.program = c"/nonexistent/vmm".into();
        let SpawnError(error) = spawn.start().unwrap_err();
        assert_eq!((error.call(), error.errno()), ("execve", libc::ENOENT));
    }

    #[test]
    fn signals_are_neither_ignored_nor_blocked_in_the_child() {
        let (text, _) = output("grep -E '^Sig(Blk|Ign)' /proc/self/status");
        for line in text.lines() {
            let mask = line.rsplit('\t').next().unwrap();
            assert_eq!(u64::from_str_radix(mask, 16).unwrap(), 0, "{line}");
        }
        assert_eq!(text.lines().count(), 2);
    }

    #[test]
    fn a_killed_process_reports_its_signal_through_the_pidfd() {
        let child = shell("exec sleep 60", vec![]).start().unwrap();
        assert!(!child.has_ended().unwrap());
        assert_eq!(child.try_wait().unwrap(), None);
        assert!(start_time(child.pid()).is_some());
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap(), Some(Exit::Signal(libc::SIGKILL)));
        assert!(child.kill().is_ok(), "a second kill has nothing to do");
        assert_eq!(Exit::Signal(libc::SIGKILL).to_string(), "SIGKILL");
    }

    #[test]
    fn root_a_private_mount_namespace_hides_its_mounts_from_the_host() {
        let dir = std::env::temp_dir().join(format!("rewake-mounts-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let at = |name: &str| CString::new(dir.join(name).to_str().unwrap()).unwrap();
        let (mut read, write) = io::pipe().unwrap();
        let script = format!("cat {0}/sub/link; ls {0}", dir.display());
        let mut spawn = shell(&script, vec![(write.as_fd(), 1)]);
        spawn.mounts = Some(vec![
            MountStep::Tmpfs { at: at("") },
            MountStep::Directory { at: at("sub") },
            MountStep::Symlink {
                target: c"/proc/sys/kernel/ostype".into(),
                at: at("sub/link"),
            },
        ]);
        let started = spawn.start();
        drop(spawn);
        drop(write);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        let empty = fs::read_dir(&dir).unwrap().next().is_none();
        fs::remove_dir_all(&dir).unwrap();
        match started {
            Ok(child) => {
                child.wait().unwrap();
                assert_eq!(text, "Linux\nsub\n");
                assert!(empty, "the host sees nothing of it");
            }
            Err(SpawnError(error)) if error.is_denied() => {
                eprintln!(
                    "SKIP root_a_private_mount_namespace_hides_its_mounts_from_the_host: {error}"
                );
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    #[test]
    fn root_a_child_starts_in_the_namespace_it_was_given() {
        let made = match crate::netns::run_in_new(|netns| netns) {
            Ok(netns) => netns,
            Err(error) => {
                eprintln!("SKIP root_a_child_starts_in_the_namespace_it_was_given: {error}");
                return;
            }
        };
        let (mut read, write) = io::pipe().unwrap();
        let mut spawn = shell("readlink /proc/self/ns/net", vec![(write.as_fd(), 1)]);
        spawn.netns = Some(made.as_fd());
        let child = spawn.start().unwrap();
        drop(spawn);
        drop(write);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        child.wait().unwrap();
        let (_, inode) = crate::netns::identity(made.as_fd()).unwrap();
        assert_eq!(text.trim(), format!("net:[{inode}]"));
    }
}
