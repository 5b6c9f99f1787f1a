//! Starting Cloud Hypervisor, and ending it.
//!
//! The API socket is bound, listening and connected before the process exists
//! ([`ApiSocket`]), so requests can be queued before `exec` and nothing is ever polled. CH
//! gets: an empty environment, `/dev/null` as input, the bounded log pipe ([`super::log`])
//! as output and error, its listening socket, a pipe for its events, a session of its own,
//! and no other descriptor but those the caller names.
//!
//! Descriptor numbers in CH: 3 API socket, 4 event monitor, from [`FIRST_INHERITED`] the
//! caller's.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewake_sys::CallError;
use rewake_sys::error::Named;
use rewake_sys::process::{self, Exit, MountStep, Process, Spawn, SpawnError};
use rustix::process::Signal;

use super::api::Version;
use super::log::{Log, lasting_pipe};
use crate::deadline::Deadline;
use crate::plan::PrivateMount;
use crate::resource::ledger::{Ledger, Step};

/// The number of the first descriptor handed to CH by the caller; more follow in order.
pub const FIRST_INHERITED: RawFd = 5;
const API_FD: RawFd = 3;
const EVENT_FD: RawFd = 4;
/// `sockaddr_un.sun_path` holds 108 bytes, a closing zero included (`linux/un.h`).
const SOCKET_PATH_BYTES: usize = 107;

/// Why Cloud Hypervisor could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The path does not fit into a socket address.
    #[error(
        "API socket path {path} is longer than {SOCKET_PATH_BYTES} bytes; choose a shorter runtime directory"
    )]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
    /// The API socket could not be bound or connected.
    #[error("Cannot make the API socket {path}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The call's error.
        source: CallError,
    },
    /// A pipe or descriptor for CH could not be made.
    #[error("Cannot prepare Cloud Hypervisor's descriptors")]
    Descriptors(#[source] CallError),
    /// A program, argument, variable or path contains a zero byte.
    #[error("{what} contains a zero byte")]
    ZeroByte {
        /// Which.
        what: &'static str,
    },
    /// The process could not be started in its surroundings.
    #[error("Cannot run {program}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The step that failed.
        source: SpawnError,
    },
}

/// What to start.
#[derive(Debug, Clone, Default)]
pub struct LaunchSpec {
    /// Path of the `cloud-hypervisor` binary.
    pub program: PathBuf,
    /// Its version, where it is known: then no memory mode is chosen that it cannot serve.
    /// Absent, what it cannot serve shows when it answers, before the guest runs.
    pub version: Option<Version>,
    /// The name it is started under (`argv[0]`); its path where absent.
    pub name: Option<String>,
    /// Arguments after those that rewake gives itself.
    pub args: Vec<String>,
    /// The whole environment. Empty is right for CH.
    pub env: Vec<(String, String)>,
    /// Starts it without an event monitor. That spares it a thread, which was worth 1.7 to
    /// 2.7 ms of a start and restore of about 12 ms (medians of 100, one machine with two
    /// cores and software-backed KVM); the phases that only events tell are unknown then.
    pub without_events: bool,
    /// A directory that CH sees differently from everybody else.
    pub private_mount: Option<PrivateMount>,
}

/// A listening API socket with one connection to it, before CH exists.
#[derive(Debug)]
pub struct ApiSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ApiSocket {
    /// Binds and connects. The path must not exist; who may connect is decided by the
    /// directory's permissions. The returned stream is non-blocking and may be written to
    /// at once: what is queued is served when CH's API thread is up.
    ///
    /// # Errors
    /// [`LaunchError::SocketPath`], [`LaunchError::Socket`].
    pub fn bind(path: &Path) -> Result<(Self, UnixStream), LaunchError> {
        if path.as_os_str().len() > SOCKET_PATH_BYTES {
            return Err(LaunchError::SocketPath {
                path: path.to_owned(),
            });
        }
        let failed = |source| LaunchError::Socket {
            path: path.to_owned(),
            source,
        };
        let listener = UnixListener::bind(path).named("bind").map_err(failed)?;
        let stream = UnixStream::connect(path).named("connect").map_err(failed)?;
        stream
            .set_nonblocking(true)
            .named("ioctl FIONBIO")
            .map_err(failed)?;
        let path = path.to_owned();
        Ok((Self { path, listener }, stream))
    }
}

/// A running Cloud Hypervisor.
///
/// Dropping it ends nothing: the ledger answers for the process.
#[derive(Debug)]
pub struct Vmm {
    process: Process,
    start_time: u64,
    api_path: PathBuf,
    /// Its log, to be drained while it is watched.
    pub log: Log,
    /// The reading side of its event monitor's pipe, non-blocking.
    pub events: File,
}

/// Starts Cloud Hypervisor on the socket, in the namespace given (the caller's otherwise).
///
/// Blocks until `exec` has happened; what CH makes of its arguments shows later, through its
/// pidfd, log and API. The step that ends the process is in the ledger when this returns.
///
/// # Errors
/// [`LaunchError`]; no process is left then.
pub fn launch(
    spec: &LaunchSpec,
    socket: ApiSocket,
    netns: Option<BorrowedFd<'_>>,
    inherited: &[BorrowedFd<'_>],
    ledger: &mut Ledger,
) -> Result<Vmm, LaunchError> {
    let (log, log_end) = Log::new().map_err(LaunchError::Descriptors)?;
    let (events, events_end) = lasting_pipe().map_err(LaunchError::Descriptors)?;
    let null = File::open("/dev/null")
        .named("open /dev/null")
        .map_err(LaunchError::Descriptors)?;
    let mut fds = vec![
        (null.as_fd(), 0),
        (log_end.as_fd(), 1),
        (log_end.as_fd(), 2),
        (socket.listener.as_fd(), API_FD),
    ];
    if !spec.without_events {
        fds.push((events_end.as_fd(), EVENT_FD));
    }
    fds.extend(inherited.iter().copied().zip(FIRST_INHERITED..));
    let mounts = spec.private_mount.as_ref().map(mount_steps);
    let spawn = Spawn {
        program: c_string("The program", spec.program.as_os_str().as_bytes())?,
        args: arguments(spec)?,
        env: environment(spec)?,
        fds,
        netns,
        mounts: mounts.transpose()?,
        new_session: true,
    };
    let process = spawn.start().map_err(|source| LaunchError::Spawn {
        program: spec.program.clone(),
        source,
    })?;
    // The pid cannot be reused before we have reaped it, so its start time is its own.
    let start_time = process::start_time(process.pid()).unwrap_or_default();
    ledger.push(Step::Process {
        pid: process.pid(),
        start_time,
    });
    // Our copy of the listener is closed here, so that connects fail once CH has died.
    let api_path = socket.path;
    Ok(Vmm {
        process,
        start_time,
        api_path,
        log,
        events: File::from(events),
    })
}

fn mount_steps(mount: &PrivateMount) -> Result<Vec<MountStep>, LaunchError> {
    let zero = |_| LaunchError::ZeroByte {
        what: "A path of the private mount",
    };
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(zero);
    let mut steps = vec![MountStep::Tmpfs {
        at: text(&mount.directory)?,
    }];
    for (name, target) in &mount.links {
        let parents: Vec<_> = name.ancestors().skip(1).collect();
        for parent in parents.into_iter().rev() {
            if !parent.as_os_str().is_empty() {
                steps.push(MountStep::Directory {
                    at: text(&mount.directory.join(parent))?,
                });
            }
        }
        steps.push(MountStep::Symlink {
            target: text(target)?,
            at: text(&mount.directory.join(name))?,
        });
    }
    Ok(steps)
}

fn arguments(spec: &LaunchSpec) -> Result<Vec<CString>, LaunchError> {
    let name = spec.name.as_ref().map_or_else(
        || spec.program.as_os_str().as_bytes(),
        |name| name.as_bytes(),
    );
    let mut ours = vec!["--api-socket".to_owned(), format!("fd={API_FD}")];
    if !spec.without_events {
        ours.extend(["--event-monitor".to_owned(), format!("fd={EVENT_FD}")]);
    }
    let all = ours.iter().chain(&spec.args).map(String::as_bytes);
    std::iter::once(name)
        .chain(all)
        .map(|argument| c_string("An argument", argument))
        .collect()
}

fn environment(spec: &LaunchSpec) -> Result<Vec<CString>, LaunchError> {
    let pairs = spec.env.iter();
    pairs
        .map(|(name, value)| c_string("A variable", format!("{name}={value}").as_bytes()))
        .collect()
}

fn c_string(what: &'static str, bytes: &[u8]) -> Result<CString, LaunchError> {
    CString::new(bytes).map_err(|_| LaunchError::ZeroByte { what })
}

/// How long each way of ending CH may take before the next one is tried.
#[derive(Debug, Clone, Copy)]
pub struct StopLimits {
    /// For `vmm.shutdown` and the exit after it. A graceful exit can hang (facts: the HTTP
    /// thread's seccomp filter), so this is short.
    pub api: Duration,
    /// For `SIGTERM`.
    pub term: Duration,
    /// For `SIGKILL`: the time that unmapping the guest's memory takes.
    pub kill: Duration,
}

impl Default for StopLimits {
    fn default() -> Self {
        Self {
            api: Duration::from_millis(500),
            term: Duration::from_millis(500),
            kill: Duration::from_secs(10),
        }
    }
}

/// What it took to end CH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoppedBy {
    /// It had ended already.
    Itself,
    /// `vmm.shutdown` was enough.
    Api,
    /// `SIGTERM` was.
    Term,
    /// Only `SIGKILL` was.
    Kill,
}

/// Why CH could not be ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// A call on its pidfd failed.
    #[error("Cannot end process {pid}")]
    Call {
        /// Its pid.
        pid: u32,
        /// The call's error.
        source: CallError,
    },
    /// It was killed and was still there at the deadline.
    #[error("Process {pid} was killed and is not gone yet")]
    StillThere {
        /// Its pid.
        pid: u32,
    },
}

impl Vmm {
    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Start time in clock ticks since boot: with the pid, its identity.
    #[must_use]
    pub const fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Where its API socket lies.
    #[must_use]
    pub fn api_path(&self) -> &Path {
        &self.api_path
    }

    /// The process, by its pidfd.
    #[must_use]
    pub const fn process(&self) -> &Process {
        &self.process
    }

    /// Ends CH: `vmm.shutdown`, then `SIGTERM`, then `SIGKILL`, each with its limit; then
    /// reaps it. Blocks, until the deadline at the latest.
    ///
    /// `ask` makes the API call and returns when it was answered or failed.
    ///
    /// # Errors
    /// [`StopError`]; a later call may still succeed.
    pub fn stop(
        &mut self,
        limits: StopLimits,
        deadline: Deadline,
        ask: impl FnOnce(&Path, Deadline),
    ) -> Result<(StoppedBy, Option<Exit>), StopError> {
        let pid = self.pid();
        let failed = |source| StopError::Call { pid, source };
        if self.process.has_ended().map_err(failed)? {
            return Ok((StoppedBy::Itself, self.reap()));
        }
        let api_deadline = deadline.within(limits.api);
        ask(&self.api_path, api_deadline);
        if self.gone_by(api_deadline).map_err(failed)? {
            return Ok((StoppedBy::Api, self.reap()));
        }
        self.process.signal(Signal::TERM).map_err(failed)?;
        if self.gone_by(deadline.within(limits.term)).map_err(failed)? {
            return Ok((StoppedBy::Term, self.reap()));
        }
        self.process.kill().map_err(failed)?;
        // Killing is not cut short by a deadline that has passed: nothing may be left.
        let patience = Deadline::after(limits.kill);
        if self.gone_by(patience).map_err(failed)? {
            return Ok((StoppedBy::Kill, self.reap()));
        }
        Err(StopError::StillThere { pid })
    }

    fn gone_by(&mut self, deadline: Deadline) -> Result<bool, CallError> {
        let gone = self.process.wait_ended(deadline.remaining());
        self.drain_log();
        gone
    }

    /// How it ended, where it has and was our child.
    pub fn reap(&mut self) -> Option<Exit> {
        self.drain_log();
        self.process.try_wait().ok().flatten()
    }

    /// Reads what is in the log's pipe now, all of it that was written by an ended process.
    pub fn drain_log(&mut self) {
        // At most 16 MiB: a flood ends here, and only its newest part is kept anyway.
        for _ in 0..16 {
            match self.log.drain() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    log::warn!("Cannot read Cloud Hypervisor's log: {error}");
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::{self, Read};
    use std::os::unix::fs::PermissionsExt;

    /// A directory with a script in place of CH, removed at the end.
    struct Stage {
        dir: PathBuf,
    }

    impl Stage {
        fn new(name: &str, script: &str) -> (Self, LaunchSpec) {
            let dir =
                std::env::temp_dir().join(format!("rewake-launch-{}-{name}", std::process::id()));
            fs::create_dir(&dir).unwrap();
            let program = dir.join("vmm");
            fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
            let spec = LaunchSpec {
                program,
                ..LaunchSpec::default()
            };
            (Self { dir }, spec)
        }

        fn launch(&self, spec: &LaunchSpec, ledger: &mut Ledger) -> (Vmm, UnixStream) {
            // Another test's fork may hold the fresh script open for a moment (ETXTBSY).
            for attempt in 0.. {
                let path = self.dir.join(format!("api-{attempt}.sock"));
                let (socket, stream) = ApiSocket::bind(&path).unwrap();
                match launch(spec, socket, None, &[], ledger) {
                    Ok(vmm) => return (vmm, stream),
                    Err(LaunchError::Spawn { source, .. })
                        if source.0.is_busy() && attempt < 100 =>
                    {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    Err(error) => panic!("{error:?}"),
                }
            }
            unreachable!()
        }
    }

    impl Drop for Stage {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }

    fn finish(vmm: &mut Vmm) -> Vec<String> {
        assert!(
            vmm.process
                .wait_ended(Some(Duration::from_secs(10)))
                .unwrap()
        );
        vmm.reap();
        vmm.log.last_lines(20)
    }

    #[test]
    fn the_vmm_gets_its_sockets_and_nothing_else() {
        let script = "echo args \"$@\"; echo env $(env | grep -v -E '^(PWD|SHLVL|_|OLDPWD)=');\n\
                      echo event >&4; readlink /proc/$$/fd/0; ls /proc/$$/fd";
        let (stage, mut spec) = Stage::new("nothing-else", script);
        spec.args = vec!["-v".into()];
        let mut ledger = Ledger::new();
        let (mut vmm, _stream) = stage.launch(&spec, &mut ledger);
        let lines = finish(&mut vmm);
        assert_eq!(lines[0], "args --api-socket fd=3 --event-monitor fd=4 -v");
        assert_eq!(lines[1], "env");
        assert_eq!(lines[2], "/dev/null");
        // 10 is the script itself, which the shell holds open.
        assert_eq!(lines[3..], ["0", "1", "10", "2", "3", "4"]);
        let mut event = [0; 6];
        vmm.events.read_exact(&mut event).unwrap();
        assert_eq!(&event, b"event\n");
    }

    #[test]
    fn connects_fail_once_the_vmm_has_died() {
        let (stage, spec) = Stage::new("died", "exit 1");
        let mut ledger = Ledger::new();
        let (mut vmm, mut stream) = stage.launch(&spec, &mut ledger);
        finish(&mut vmm);
        // A child that another test is just starting may hold a copy of the listener until
        // its exec.
        let refused = (0..100).find_map(|_| {
            std::thread::sleep(Duration::from_millis(5));
            UnixStream::connect(vmm.api_path()).err()
        });
        let refused = refused.expect("connects must fail in the end");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        stream.set_nonblocking(false).unwrap();
        let end = stream.read(&mut [0; 1]);
        assert!(!matches!(end, Ok(1..)), "{end:?}");
    }

    #[test]
    fn a_program_that_is_missing_is_named() {
        let (stage, mut spec) = Stage::new("missing", "");
        spec.program = "/nonexistent/cloud-hypervisor".into();
        let mut ledger = Ledger::new();
        let (socket, _stream) = ApiSocket::bind(&stage.dir.join("api.sock")).unwrap();
        let error = launch(&spec, socket, None, &[], &mut ledger).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Cannot run /nonexistent/cloud-hypervisor"
        );
        assert!(ledger.steps().is_empty());
    }

    #[test]
    fn a_socket_path_that_is_too_long_is_refused() {
        let path = Path::new("/tmp").join("x".repeat(120));
        let error = ApiSocket::bind(&path).unwrap_err();
        assert!(matches!(error, LaunchError::SocketPath { .. }));
    }

    #[test]
    fn stopping_climbs_from_asking_to_killing() {
        let quick = StopLimits {
            api: Duration::from_millis(50),
            term: Duration::from_millis(50),
            kill: Duration::from_secs(5),
        };
        for (name, script, expected) in [
            ("obeys-term", "exec sleep 60", StoppedBy::Term),
            (
                "ignores-term",
                "trap '' TERM; echo up; while :; do sleep 1; done",
                StoppedBy::Kill,
            ),
        ] {
            let (stage, spec) = Stage::new(name, script);
            let mut ledger = Ledger::new();
            let (mut vmm, _stream) = stage.launch(&spec, &mut ledger);
            if expected == StoppedBy::Kill {
                while vmm.log.last_lines(1).is_empty() {
                    vmm.drain_log();
                }
            }
            let (by, exit) = vmm.stop(quick, Deadline::NEVER, |_, _| {}).unwrap();
            assert_eq!(by, expected, "{name}");
            assert!(matches!(exit, Some(Exit::Signal(_))), "{name}: {exit:?}");
            let (again, _) = vmm.stop(quick, Deadline::NEVER, |_, _| {}).unwrap();
            assert_eq!(again, StoppedBy::Itself, "{name}");
        }
    }
}
