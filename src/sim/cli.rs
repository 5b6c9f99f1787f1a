//! The command line: Cloud Hypervisor's flags that API-driven processes use, and `--sim`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::envd::Dialect;
use super::fault::{Faults, PHASES};
use super::release::Release;

/// Where the API listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ApiSocket {
    /// Bound by the stand-in.
    Path(PathBuf),
    /// Inherited, bound and listening.
    Fd(i32),
}

/// Where events go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum EventTarget {
    Path(PathBuf),
    Fd(i32),
}

/// How the guest is reached where its configuration has no network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Loopback {
    /// Binds this address; the port goes into the address file.
    Bind(SocketAddr),
    /// Inherited, bound and listening.
    Fd(i32),
}

/// What `--sim` and the environment set.
#[derive(Debug, Clone)]
pub(super) struct Tuning {
    pub(super) release: Release,
    pub(super) faults: Faults,
    pub(super) loopback: Option<Loopback>,
    pub(super) address_file: Option<PathBuf>,
    /// Overrides the kernel command line's `sim.envd=`.
    pub(super) dialect: Option<Dialect>,
    /// Pages of guest RAM that carry the pattern.
    pub(super) pattern_pages: u64,
    /// Speed of the background fill of v53, in pages per millisecond.
    pub(super) fill_pages_per_ms: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            release: Release::DEFAULT,
            faults: Faults::default(),
            loopback: None,
            address_file: None,
            dialect: None,
            pattern_pages: 256,
            // About 12 µs a page, measured with v53.0 on one machine.
            fill_pages_per_ms: 80,
        }
    }
}

/// A parsed command line.
#[derive(Debug, Default, Clone)]
pub(super) struct Options {
    pub(super) api_socket: Option<ApiSocket>,
    pub(super) event_monitor: Option<EventTarget>,
    /// The words of `--restore`, not yet understood.
    pub(super) restore: Option<String>,
    pub(super) verbosity: u8,
    pub(super) log_file: Option<PathBuf>,
    pub(super) tuning: Tuning,
}

/// What the command line asks for.
#[derive(Debug)]
pub(super) enum Command {
    Run(Box<Options>),
    Version(Release),
    Help,
}

/// Why a command line is no good, and the exit status that says so.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    /// Status 2.
    #[error("{0}")]
    Usage(String),
    /// Status 1: understood, but its value cannot be.
    #[error("Error parsing {0}: {1}")]
    Value(&'static str, String),
}

/// Environment variable with further `--sim` settings, separated by spaces.
pub(super) const ENVIRONMENT: &str = "REWAKE_SIM";

/// Reads the words after the program's name.
pub(super) fn parse(
    words: impl IntoIterator<Item = OsString>,
    environment: Option<OsString>,
) -> Result<Command, CliError> {
    let mut options = Options::default();
    let mut wants_version = false;
    let environment = environment.unwrap_or_default();
    for setting in text(environment)?.split_whitespace() {
        set(&mut options.tuning, setting)?;
    }
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let word = text(word)?;
        let (flag, inline) = match word.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (flag, Some(value.to_owned())),
            _ => (word.as_str(), None),
        };
        let mut value = || match inline.clone() {
            Some(value) => Ok(value),
            None => words.next().map_or_else(
                || Err(CliError::Usage(format!("a value is required for '{flag}'"))),
                text,
            ),
        };
        match flag {
            "--help" | "-h" => return Ok(Command::Help),
            "--version" | "-V" => wants_version = true,
            "--api-socket" => options.api_socket = Some(api_socket(&value()?)?),
            "--event-monitor" => options.event_monitor = Some(event_target(&value()?)?),
            "--restore" => options.restore = Some(value()?),
            "--log-file" => options.log_file = Some(value()?.into()),
            "--log-format" => drop(value()?),
            "--seccomp" => seccomp(&value()?)?,
            "--no-shutdown" => {}
            "--sim" => set(&mut options.tuning, &value()?)?,
            "--sim-envd-addr-file" => options.tuning.address_file = Some(value()?.into()),
            verbose if is_verbose(verbose) => options.verbosity += (verbose.len() - 1) as u8,
            _ => {
                return Err(CliError::Usage(format!(
                    "unexpected argument '{flag}' found (the stand-in takes the flags of an API-driven process only)"
                )));
            }
        }
    }
    if wants_version {
        return Ok(Command::Version(options.tuning.release));
    }
    if options.api_socket.is_none() && options.restore.is_none() {
        return Err(CliError::Usage("an --api-socket is required".to_owned()));
    }
    Ok(Command::Run(Box::new(options)))
}

fn is_verbose(flag: &str) -> bool {
    flag.len() > 1
        && flag.len() < 16
        && flag.starts_with('-')
        && flag[1..].bytes().all(|b| b == b'v')
}

fn text(word: OsString) -> Result<String, CliError> {
    word.into_string()
        .map_err(|word| CliError::Usage(format!("not UTF-8: {}", word.to_string_lossy())))
}

/// `fd=N` wins over `path=P`; what is neither is a path as it stands.
fn api_socket(value: &str) -> Result<ApiSocket, CliError> {
    let mut path = None;
    for part in value.split(',') {
        match part.split_once('=') {
            Some(("fd", fd)) => return descriptor("--api-socket", fd).map(ApiSocket::Fd),
            Some(("path", p)) => path = Some(PathBuf::from(p)),
            _ => return Ok(ApiSocket::Path(value.into())),
        }
    }
    Ok(ApiSocket::Path(path.unwrap_or_else(|| value.into())))
}

fn event_target(value: &str) -> Result<EventTarget, CliError> {
    match value.split_once('=') {
        Some(("fd", fd)) => descriptor("--event-monitor", fd).map(EventTarget::Fd),
        Some(("path", path)) => Ok(EventTarget::Path(path.into())),
        _ => Err(CliError::Value("--event-monitor", format!("{value:?}"))),
    }
}

fn descriptor(flag: &'static str, text: &str) -> Result<i32, CliError> {
    text.parse()
        .map_err(|_| CliError::Value(flag, "invalid digit found in string".to_owned()))
}

fn seccomp(value: &str) -> Result<(), CliError> {
    match value {
        "true" | "false" | "log" | "errno" => Ok(()),
        _ => Err(CliError::Usage(format!(
            "invalid value '{value}' for '--seccomp <seccomp>'"
        ))),
    }
}

/// Applies one `KEY=VALUE` of `--sim`.
fn set(tuning: &mut Tuning, setting: &str) -> Result<(), CliError> {
    let usage = |reason: String| CliError::Usage(format!("--sim {setting}: {reason}"));
    let (key, value) = setting
        .split_once('=')
        .ok_or_else(|| usage("KEY=VALUE is needed".to_owned()))?;
    let number = || {
        value
            .parse::<u64>()
            .map_err(|error| usage(error.to_string()))
    };
    match key {
        "version" => tuning.release = value.parse().map_err(usage)?,
        "fault" => tuning.faults.order(value).map_err(usage)?,
        "dialect" => tuning.dialect = Some(value.parse().map_err(usage)?),
        "envd" => {
            let address = value.strip_prefix("tcp:").unwrap_or(value);
            let address = address
                .parse()
                .map_err(|_| usage("an address is needed".to_owned()))?;
            tuning.loopback = Some(Loopback::Bind(address));
        }
        "envd-listener" => {
            let fd = value
                .strip_prefix("fd=")
                .or(value.strip_prefix("fd:"))
                .unwrap_or(value);
            tuning.loopback = Some(Loopback::Fd(descriptor("--sim envd-listener", fd)?));
        }
        "envd-addr-file" => tuning.address_file = Some(value.into()),
        "pattern-pages" => tuning.pattern_pages = number()?,
        "fill-pages-per-ms" => tuning.fill_pages_per_ms = number()?,
        _ => return Err(usage("unknown setting".to_owned())),
    }
    Ok(())
}

/// What `--help` prints.
pub(super) fn help() -> String {
    format!(
        "rewake-sim: a stand-in for cloud-hypervisor. It is NOT Cloud Hypervisor and runs no VM.\n\
\n\
Usage: rewake-sim --api-socket <path=PATH|fd=N> [OPTIONS]\n       \
rewake-sim guest-agent [--listen ADDRESS] [--dialect w-ch|w-fc|e2b] [--pattern-mib N]\n\
\n\
As in Cloud Hypervisor:\n  \
--api-socket path=PATH|PATH|fd=N    --event-monitor path=PATH|fd=N\n  \
--restore source_url=file://DIR[,prefault=on|off][,memory_restore_mode=copy|ondemand]\n            \
[,net_fds=[ID@[FD,..]]][,resume=on|off]\n  \
-v (repeat for more)  --log-file PATH  --log-format F  --seccomp MODE  --no-shutdown  --version\n\
\n\
Its own (repeatable; also in the variable {ENVIRONMENT}, separated by spaces):\n  \
--sim version=50|51|52|53         the release to play (default 53)\n  \
--sim dialect=w-ch|w-fc|e2b       what the guest agent speaks (default w-ch, or sim.envd= in the\n                                    \
kernel command line)\n  \
--sim envd=tcp:ADDRESS:PORT       where the guest agent listens if the VM has no network device\n  \
--sim envd-listener=fd:N          the same on an inherited listening socket\n  \
--sim envd-addr-file=PATH         writes the address it listens on to this file\n  \
--sim pattern-pages=N             pages of guest RAM that carry the pattern (default 256)\n  \
--sim fill-pages-per-ms=N         speed of the background fill of v53 (default 80)\n  \
--sim fault=PHASE:WHAT[:TIMES]    something goes wrong\n\
\n\
PHASE: {}\n\
WHAT at a phase: die, exit[=STATUS], hang, garbage, truncated, drop, late[=MS], error, flood[=BYTES]\n\
WHAT of the guest: never, silent, slow-first-byte[=MS], trickle[=MS], drop-syn[=N], reset-mid-body,\n  \
endless-body, garbage, preload-fail, preload-stall, crash\n",
        PHASES.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Options, String> {
        let words = line.split_whitespace().map(OsString::from);
        match parse(words, None) {
            Ok(Command::Run(options)) => Ok(*options),
            Ok(other) => Err(format!("{other:?}")),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn understands_the_socket_option_as_the_original_does() {
        let cases = [
            ("--api-socket path=/p", ApiSocket::Path("/p".into())),
            ("--api-socket /p", ApiSocket::Path("/p".into())),
            ("--api-socket=fd=5", ApiSocket::Fd(5)),
            ("--api-socket path=/p,fd=7", ApiSocket::Fd(7)),
            ("--api-socket bogus=1", ApiSocket::Path("bogus=1".into())),
        ];
        for (line, wanted) in cases {
            assert_eq!(run(line).unwrap().api_socket, Some(wanted), "{line}");
        }
        assert!(
            run("--api-socket fd=abc")
                .unwrap_err()
                .contains("invalid digit")
        );
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        for line in [
            "",
            "--bogus",
            "--api-socket",
            "--api-socket /p --sim bogus=1",
            "--api-socket /p --sim version=49",
            "--api-socket /p --seccomp maybe",
            "--api-socket /p --cpus boot=1",
        ] {
            assert!(run(line).is_err(), "{line}");
        }
    }

    #[test]
    fn settings_come_from_the_environment_too() {
        let words = ["--api-socket", "/p", "-vv"].map(OsString::from);
        let Ok(Command::Run(options)) = parse(words, Some("version=52 dialect=e2b".into())) else {
            panic!("refused");
        };
        assert_eq!(options.tuning.release.number(), 52);
        assert_eq!(options.tuning.dialect, Some(Dialect::E2b));
        assert_eq!(options.verbosity, 2);
    }
}
