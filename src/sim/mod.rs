//! `rewake-sim`: a stand-in for the `cloud-hypervisor` binary.
//!
//! It speaks the command line, API, event monitor and state machine of Cloud Hypervisor,
//! refuses what Cloud Hypervisor refuses, writes and reads the same three snapshot files,
//! attaches to the real tap, takes the same locks, and plays a guest: ARP, ICMP, TCP and the
//! guest agent. Everything but KVM can be exercised with it, on any Linux machine and, without
//! a network device, with no privilege at all.
//!
//! It is *not* Cloud Hypervisor, runs no code in a VM, and says so: in `--version`, in
//! `vmm.ping.build_version`, in the first line of its log, in `state.json` and in its guest's
//! `GET /sim/state`.
//!
//! # Roles
//!
//! * `rewake-sim --api-socket …`: the VMM.
//! * `rewake-sim guest-agent`: the guest agent alone, as a plain process inside a real Linux
//!   guest, with its nonce and counter only in that process's memory.
//!
//! # Proof of life
//!
//! The guest's state lives in guest RAM: nonce, counter, agent, pattern pages. `GET
//! /sim/state` on the agent's port answers with the nonce (made at boot), the counter (grows
//! with each tick of 50 ms and each request), the number of restores, and how many pattern
//! pages are bad. Memory that was lost between two lives shows there; RAM that holds no guest
//! gives a VM that runs and never answers.
//!
//! # Faults
//!
//! `--sim fault=PHASE:WHAT[:TIMES]`, repeatable, or the same words in the environment variable
//! `REWAKE_SIM`. `--help` lists phases and faults. A fault at a phase strikes when the phase
//! is reached, before the work of an `on-` phase and after the work of an `after-` phase.
//! Those of the guest are applied to its answers.
//!
//! # Differences
//!
//! Memory files are written sparse in all modes (v52 and v53 write anonymous memory densely).
//! A kernel file must exist but is not read. Guests ignore the power button. Migration, hotplug of
//! anything but disks and networks, and memory hotplug are not played.

mod agent;
mod api;
mod cli;
mod config;
mod devices;
mod envd;
mod fault;
mod guest;
mod http;
mod ram;
mod release;
mod report;
mod server;
mod snapshot;
mod vmm;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::fs::Mode;
use serde_json::Value;

use crate::wire::reactor::{TokenRange, earliest, wait};
use cli::{ApiSocket, Command, EventTarget, Loopback, Options};
use fault::What;
use report::{Level, Log, Monitor};
use server::Server;
use vmm::{RestoreConfig, RestoreMode, Vmm};

/// Runs the stand-in with a command line whose first word is the program's name. Blocks until
/// it is told to end.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut words = arguments.into_iter().skip(1).peekable();
    if words.peek().is_some_and(|word| word == "guest-agent") {
        return agent::main(words.skip(1));
    }
    let command = match cli::parse(words, std::env::var_os(cli::ENVIRONMENT)) {
        Ok(command) => command,
        Err(error @ cli::CliError::Usage(_)) => {
            complain(&format!(
                "error: {error}\n\nFor more information, try '--help'."
            ));
            return ExitCode::from(2);
        }
        Err(error) => {
            complain(&format!(
                "Error: rewake-sim exited with the following error: {error}"
            ));
            return ExitCode::FAILURE;
        }
    };
    let options = match command {
        Command::Help => {
            print!("{}", cli::help());
            return ExitCode::SUCCESS;
        }
        Command::Version(release) => {
            println!("{release}");
            return ExitCode::SUCCESS;
        }
        Command::Run(options) => options,
    };
    match run(&options) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            complain(&format!(
                "Error: rewake-sim exited with the following error: {error}"
            ));
            ExitCode::FAILURE
        }
    }
}

fn complain(message: &str) {
    // Nobody may be left to read it.
    let _unread = writeln!(io::stderr(), "{message}");
}

/// Ends this process as SIGKILL from outside would.
fn die() -> ! {
    let me = rustix::process::getpid();
    // The signal is the process's own; it cannot be refused and does not return.
    let _dead = rustix::process::kill_process(me, rustix::process::Signal::KILL);
    std::process::abort()
}

fn run(options: &Options) -> io::Result<u8> {
    let start = Instant::now();
    let log = Log::open(start, options.verbosity, options.log_file.as_deref())?;
    let log = Rc::new(log);
    strike(options, &log, "start");
    rustix::process::umask(Mode::from_raw_mode(0o077));
    log.say(Level::Warn, &format!("this is {}", options.tuning.release));
    let signals = signals()?;
    let monitor = Rc::new(Monitor::new(start, event_target(options)?)?);
    monitor.emit("vmm", "starting", Value::Null);

    let mut poll = Poll::new()?;
    let registry = poll.registry().try_clone()?;
    let all = TokenRange::new(0, server::TOKENS + 1 + guest::LINK_TOKENS);
    let (server_tokens, rest) = all.split(server::TOKENS);
    let (signal_tokens, guest_tokens) = rest.split(1);
    registry.register(
        &mut SourceFd(&signals.as_raw_fd()),
        signal_tokens.token(0),
        Interest::READABLE,
    )?;
    let loopback = loopback(options)?;
    strike(options, &log, "before-api");
    let mut socket = match &options.api_socket {
        Some(socket) => Some(ApiListener::open(socket)?),
        None => None,
    };
    let mut server = match socket.as_mut().and_then(|s| s.listener.take()) {
        Some(listener) => Some(Server::new(listener, server_tokens, &registry)?),
        None => None,
    };
    let mut vmm = Vmm::new(
        options.tuning.clone(),
        Rc::clone(&log),
        monitor,
        registry.try_clone()?,
        guest_tokens,
        loopback,
    )?;
    if let Some(words) = &options.restore
        && let Err(error) = restore_from_cli(&mut vmm, words)
    {
        // As in the original, the socket stays where it is.
        if let Some(socket) = &mut socket {
            socket.bound = None;
        }
        return Err(error);
    }

    let mut events = Events::with_capacity(128);
    loop {
        let now = Instant::now();
        if let Some(server) = &mut server {
            server.serve(&mut vmm, &registry, now);
        }
        let guest_wake = vmm.run(Instant::now());
        if let Some(status) = vmm.exit {
            if let Some(server) = &mut server {
                server.flush();
            }
            drop(socket);
            return Ok(status);
        }
        let server_wake = server.as_ref().and_then(Server::wake_at);
        wait(&mut poll, &mut events, earliest([guest_wake, server_wake]))?;
        for event in &events {
            if signal_tokens.index(event.token()).is_some() {
                log.say(Level::Info, "ended by a signal");
                vmm.shut_down();
            }
            if let Some(server) = &mut server {
                server.on_event(event);
            }
            vmm.on_event(event);
        }
    }
}

/// Lets the faults of a phase without an answer strike.
fn strike(options: &Options, log: &Log, phase: &str) {
    for what in options.tuning.faults.strike(phase) {
        match what {
            What::Die => die(),
            What::Exit(status) => std::process::exit(i32::from(status)),
            What::Flood(bytes) => log.flood(bytes),
            What::Late(by) => std::thread::sleep(by),
            What::Hang => loop {
                std::thread::park();
            },
            _ => std::process::exit(1),
        }
    }
}

fn signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    Ok(SignalFd::with_flags(
        &set,
        SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
    )?)
}

fn inherited(number: i32) -> io::Result<OwnedFd> {
    rewake_sys::inherited::duplicate(number).map_err(io::Error::other)
}

fn event_target(options: &Options) -> io::Result<Option<OwnedFd>> {
    Ok(match &options.event_monitor {
        None => None,
        Some(EventTarget::Fd(number)) => Some(inherited(*number)?),
        Some(EventTarget::Path(path)) => Some(File::create(path)?.into()),
    })
}

fn loopback(options: &Options) -> io::Result<Option<mio::net::TcpListener>> {
    let listener = match &options.tuning.loopback {
        None => return Ok(None),
        Some(Loopback::Bind(address)) => std::net::TcpListener::bind(address)?,
        Some(Loopback::Fd(number)) => inherited(*number)?.into(),
    };
    listener.set_nonblocking(true)?;
    if let Some(path) = &options.tuning.address_file {
        // Readers must never see half an address.
        let staged = path.with_extension("part");
        std::fs::write(&staged, format!("{}\n", listener.local_addr()?))?;
        std::fs::rename(staged, path)?;
    }
    Ok(Some(mio::net::TcpListener::from_std(listener)))
}

/// The API socket, with what has to be kept or removed besides it.
struct ApiListener {
    listener: Option<OwnedFd>,
    bound: Option<std::path::PathBuf>,
    _lock: Option<File>,
}

impl ApiListener {
    fn open(socket: &ApiSocket) -> io::Result<Self> {
        match socket {
            ApiSocket::Fd(number) => Ok(Self {
                listener: Some(inherited(*number)?),
                bound: None,
                _lock: None,
            }),
            ApiSocket::Path(path) => Self::bind(path),
        }
    }

    /// Takes `PATH.lock`, removes what lies at `PATH`, binds.
    fn bind(path: &Path) -> io::Result<Self> {
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(lock_path)?;
        devices::lock_file(&lock).map_err(|_| {
            io::Error::other(format!("API socket {} is already in use", path.display()))
        })?;
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        Ok(Self {
            listener: Some(listener.into()),
            bound: Some(path.to_owned()),
            _lock: Some(lock),
        })
    }
}

impl Drop for ApiListener {
    fn drop(&mut self) {
        if let Some(path) = &self.bound {
            // It may be gone; the lock file stays, as in the original.
            let _gone = std::fs::remove_file(path);
        }
    }
}

/// `--restore`: a failure ends the process with status 1.
fn restore_from_cli(vmm: &mut Vmm, words: &str) -> io::Result<()> {
    let mut config = RestoreConfig::default();
    for word in words.split(',') {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let toggle = matches!(value, "on" | "true");
        match key {
            "source_url" => value.clone_into(&mut config.source_url),
            "prefault" => config.prefault = toggle,
            "resume" => config.resume = toggle,
            "memory_restore_mode" if value.eq_ignore_ascii_case("copy") => {}
            "memory_restore_mode" if value.eq_ignore_ascii_case("ondemand") => {
                config.memory_restore_mode = RestoreMode::OnDemand;
            }
            _ => {
                return Err(io::Error::other(format!(
                    "Error parsing --restore: {word:?}"
                )));
            }
        }
    }
    match vmm.restore(&config, Vec::new(), Instant::now()) {
        Ok(_) => Ok(()),
        Err(refusal) => Err(io::Error::other(refusal.chain.join(": "))),
    }
}
