//! What the agent says: parsed within bounds, every key optional unless stated.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::text::GuestText;
use crate::units::Bytes;
use crate::wire::json::{JsonError, JsonLimits, from_slice_bounded};

/// Bounds on the agent's answers.
pub const LIMITS: JsonLimits = JsonLimits {
    bytes: 64 << 10,
    depth: 8,
};

/// Why an answer is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// Not JSON, not of the expected shape, or past [`LIMITS`].
    #[error("The answer is refused")]
    Json(#[from] JsonError),
    /// Not an object, or not in UTF-8.
    #[error("The answer is not a JSON object in UTF-8")]
    NoObject,
    /// `/memory/preload` named a state that is not known here.
    #[error("Unknown preload state \"{0}\"")]
    UnknownState(GuestText),
}

/// The derived readers would take an array for its fields in order, and would not look at the
/// encoding of what they skip.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ReplyError> {
    let is_object = body.trim_ascii_start().starts_with(b"{");
    if body.len() <= LIMITS.bytes && !(is_object && std::str::from_utf8(body).is_ok()) {
        return Err(ReplyError::NoObject);
    }
    Ok(from_slice_bounded(body, LIMITS)?)
}

/// The version in Wrenn's answer to `/health`, `None` where the body is anything else: a
/// readiness test does not fail on a body that nobody needs.
#[must_use]
pub fn health_version(body: &[u8]) -> Option<GuestText> {
    #[derive(Deserialize)]
    struct Health {
        version: Option<String>,
    }
    let health: Health = parse(body).ok()?;
    health.version.map(GuestText::new)
}

/// The states that `/memory/preload` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WalkState {
    /// No walk was started in this life of the guest.
    Idle,
    /// The walk goes on.
    Running,
    /// It ended without touching all memory.
    Failed,
    /// Somebody cancelled it, now or for the future.
    Cancelled,
    /// It ended well.
    Done,
}

impl WalkState {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "idle" => Self::Idle,
            "running" => Self::Running,
            "failed" => Self::Failed,
            "cancelled" => Self::Cancelled,
            "done" => Self::Done,
            _ => return None,
        })
    }
}

/// An answer of `/memory/preload`. A claim of the guest, not a proof.
#[derive(Debug, Clone, PartialEq)]
pub struct PreloadStatus {
    /// The one key that must be there, and the only one to judge by.
    pub state: WalkState,
    /// Regions of system RAM walked; zero until the end.
    pub regions: u64,
    /// Pages touched so far, in steps. May be non-zero in `idle`.
    pub pages: u64,
    /// Bytes touched so far, `None` where the agent does not say.
    pub bytes: Option<Bytes>,
    /// Time the walk took; zero until the end.
    pub elapsed: Duration,
    /// `/dev/mem`, `/proc/kcore`, or empty.
    pub source: GuestText,
    /// Why it failed.
    pub error: Option<GuestText>,
}

/// Parses an answer of `/memory/preload`.
///
/// # Errors
/// [`ReplyError`]; a missing or unknown `state` is one, since nothing can be concluded.
pub fn preload_status(body: &[u8]) -> Result<PreloadStatus, ReplyError> {
    #[derive(Deserialize)]
    struct Raw {
        state: String,
        regions: Option<u64>,
        pages: Option<u64>,
        bytes: Option<u64>,
        elapsed_sec: Option<f64>,
        source: Option<String>,
        error: Option<String>,
    }
    let raw: Raw = parse(body)?;
    let state = WalkState::parse(&raw.state)
        .ok_or_else(|| ReplyError::UnknownState(GuestText::new(&raw.state)))?;
    let elapsed = raw.elapsed_sec.unwrap_or_default();
    Ok(PreloadStatus {
        state,
        regions: raw.regions.unwrap_or_default(),
        pages: raw.pages.unwrap_or_default(),
        bytes: raw.bytes.map(Bytes),
        elapsed: Duration::try_from_secs_f64(elapsed).unwrap_or_default(),
        source: GuestText::new(raw.source.unwrap_or_default()),
        error: raw.error.map(GuestText::new),
    })
}

/// An answer of `/metrics`. Right after a restore the processor's share is that of the
/// captured life; it is zero for the first second of an agent's life.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// The guest's clock, in Unix seconds: a cheap way to see how wrong it is.
    pub ts: Option<i64>,
    /// Processors.
    pub cpu_count: Option<u32>,
    /// Their use, in percent.
    pub cpu_used_pct: Option<f64>,
    /// Memory in all, in bytes.
    pub mem_total: Option<u64>,
    /// Memory not available, in bytes.
    pub mem_used: Option<u64>,
    /// Page cache, in bytes; E2B from 0.5.9 on.
    pub mem_cache: Option<u64>,
    /// Use of the root filesystem, in bytes.
    pub disk_used: Option<u64>,
    /// Size of the root filesystem, in bytes.
    pub disk_total: Option<u64>,
}

/// Parses an answer of `/metrics`.
///
/// # Errors
/// [`ReplyError`].
pub fn metrics(body: &[u8]) -> Result<Metrics, ReplyError> {
    parse(body)
}

/// An answer of `/activity`: how busy the guest is.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Activity {
    /// Processors.
    pub cpu_count: Option<u32>,
    /// Their use, in percent.
    pub cpu_used_pct: Option<f64>,
    /// Network traffic, in bytes per second.
    pub net_bps: Option<f64>,
    /// Disk traffic, in bytes per second.
    pub disk_bps: Option<f64>,
}

/// Parses an answer of `/activity`.
///
/// # Errors
/// [`ReplyError`].
pub fn activity(body: &[u8]) -> Result<Activity, ReplyError> {
    parse(body)
}

/// Parses an answer of `/envs`. Names and values are as the guest sent them: escape them
/// ([`GuestText`]) before printing.
///
/// # Errors
/// [`ReplyError`].
pub fn envs(body: &[u8]) -> Result<BTreeMap<String, String>, ReplyError> {
    parse(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preload_needs_its_state_and_nothing_else() {
        let bare = preload_status(br#"{"state":"running"}"#).unwrap();
        assert_eq!(bare.state, WalkState::Running);
        assert_eq!((bare.pages, bare.bytes), (0, None));
        for (name, body) in [
            ("no state", r#"{"pages":1}"#),
            ("null state", r#"{"state":null}"#),
            ("unknown state", r#"{"state":"finished"}"#),
            ("upper case", r#"{"state":"Done"}"#),
            ("negative count", r#"{"state":"done","pages":-1}"#),
            ("not JSON", "done"),
            ("empty", ""),
            ("an array", r#"["done"]"#),
            ("the fields in order", r#"["done",1,1,1,1.0,"",null]"#),
        ] {
            assert!(preload_status(body.as_bytes()).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_skipped_must_be_text_too() {
        let broken = b"{\"state\":\"done\",\"x\":\"\xff\"}";
        assert!(matches!(preload_status(broken), Err(ReplyError::NoObject)));
    }

    #[test]
    fn absurd_durations_do_not_panic() {
        for seconds in ["-1", "1e300", "8e-6", "null"] {
            let body = format!(r#"{{"state":"done","elapsed_sec":{seconds}}}"#);
            let status = preload_status(body.as_bytes()).unwrap();
            assert!(status.elapsed < Duration::from_millis(1), "{seconds}");
        }
    }

    #[test]
    fn versions_are_optional_and_escaped() {
        assert_eq!(
            health_version(br#"{"version":"0.2.0"}"#),
            Some(GuestText::new("0.2.0"))
        );
        for odd in [
            "",
            "{}",
            r#"{"version":null}"#,
            r#"{"version":7}"#,
            "<html>",
        ] {
            assert_eq!(health_version(odd.as_bytes()), None, "{odd}");
        }
    }

    #[test]
    fn refuses_what_is_too_deep_or_too_long() {
        let nested = |n: usize| format!("{{\"x\":{}1{}}}", "[".repeat(n), "]".repeat(n));
        assert!(metrics(nested(LIMITS.depth - 1).as_bytes()).is_ok());
        assert!(matches!(
            metrics(nested(LIMITS.depth).as_bytes()),
            Err(ReplyError::Json(JsonError::TooDeep { .. }))
        ));
        let long = format!(r#"{{"x":"{}"}}"#, "y".repeat(LIMITS.bytes));
        assert!(matches!(
            metrics(long.as_bytes()),
            Err(ReplyError::Json(JsonError::TooLarge { .. }))
        ));
    }

    #[test]
    fn unknown_states_are_quoted_escaped() {
        let error = preload_status(br#"{"state":"\u001b[2J"}"#).unwrap_err();
        assert_eq!(error.to_string(), r#"Unknown preload state "\u{1b}[2J""#);
    }
}
