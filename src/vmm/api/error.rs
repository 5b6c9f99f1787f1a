//! Why a call failed, with Cloud Hypervisor's own words.

use std::fmt;
use std::path::PathBuf;

use super::operation::Operation;
use super::version::Version;
use crate::wire::conn::ConnError;
use crate::wire::excerpt::excerpt;
use crate::wire::http::RequestError;
use crate::wire::json::{self, JsonError, JsonLimits};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// CH answered with an error.
    #[error("{operation} is refused with status {status}: {chain}")]
    Refused {
        /// What was asked for.
        operation: Operation,
        /// The HTTP status.
        status: u16,
        /// CH's words.
        chain: Chain,
    },
    /// There is no answer.
    #[error("{operation} got no answer")]
    NoAnswer {
        /// What was asked for.
        operation: Operation,
        /// Why.
        #[source]
        source: ConnError,
    },
    /// CH answered with success, but not with what this operation brings.
    #[error("Answer of {operation} with status {status} cannot be read")]
    UnreadableAnswer {
        /// What was asked for.
        operation: Operation,
        /// The HTTP status.
        status: u16,
        /// Why.
        #[source]
        source: JsonError,
    },
    /// `vmm.ping` told a version of unknown form.
    #[error("Version {text:?} of Cloud Hypervisor cannot be read")]
    UnreadableVersion {
        /// The version, escaped and cut.
        text: String,
    },
    /// This version of CH would ignore it or not know it. Nothing was sent.
    #[error("Cloud Hypervisor {version} does not know {what}")]
    Unsupported {
        /// What was asked for.
        operation: Operation,
        /// The part that is too new.
        what: &'static str,
        /// The version.
        version: Version,
    },
    /// More than CH's server takes. Nothing was sent.
    #[error("{operation} with a body of {bytes} bytes exceeds the limit of {limit}")]
    BodyTooLarge {
        /// What was asked for.
        operation: Operation,
        /// Length of the body.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The request and its descriptors do not fit together. Nothing was sent.
    #[error("{operation} needs {expected} descriptors and got {given}")]
    Descriptors {
        /// What was asked for.
        operation: Operation,
        /// How many the request speaks of.
        expected: usize,
        /// How many there are.
        given: usize,
    },
    /// A path that cannot be written as JSON or as a URL: not UTF-8, or not absolute. Nothing
    /// was sent.
    #[error("Path {} cannot be sent to Cloud Hypervisor", .path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// The body cannot be written as JSON, since a path in it is not UTF-8. Nothing was sent.
    #[error("{operation} cannot be written as JSON")]
    Body {
        /// What was asked for.
        operation: Operation,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The request cannot be encoded. Nothing was sent.
    #[error("{operation} cannot be encoded")]
    Request {
        /// What was asked for.
        operation: Operation,
        /// Why.
        #[source]
        source: RequestError,
    },
}

impl ApiError {
    /// CH's words, where it refused.
    #[must_use]
    pub const fn chain(&self) -> Option<&Chain> {
        match self {
            Self::Refused { chain, .. } => Some(chain),
            _ => None,
        }
    }

    /// The status, where CH answered.
    #[must_use]
    pub const fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } | Self::UnreadableAnswer { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether CH refused and said so.
    #[must_use]
    pub fn says(&self, text: &str) -> bool {
        self.chain().is_some_and(|chain| chain.contains(text))
    }

    /// What failed is the resume of a VM, also where that is the last part of a restore; its
    /// vCPUs may have run. v53: `Cannot resume VM`, `Failed to resume migratable component`.
    #[must_use]
    pub fn is_failed_resume(&self) -> bool {
        self.says("resume")
    }

    /// There is no VM, not even a configuration. v53 says so with 404, older ones with 500.
    ///
    /// Some operations (pause, resume, snapshot, counters, …) look for a running VM only:
    /// their word is [`is_not_running`](Self::is_not_running).
    #[must_use]
    pub fn is_vm_missing(&self) -> bool {
        self.says("VM is not created") || self.says("VM config is missing")
    }

    /// There is no booted or restored VM; perhaps there is no VM at all.
    #[must_use]
    pub fn is_not_running(&self) -> bool {
        self.says("VM is not running")
    }

    /// There is a VM already. It may be one that was shut down but not deleted.
    #[must_use]
    pub fn is_already_created(&self) -> bool {
        self.says("VM is already created")
    }

    /// An on-demand restore has not brought all memory yet (v53). It ends by itself, except
    /// where reading the memory file failed in the background.
    #[must_use]
    pub fn is_restoring(&self) -> bool {
        self.says("on-demand memory restore is still in progress")
    }

    /// A migration owns the VM.
    #[must_use]
    pub fn is_migrating(&self) -> bool {
        self.says("VM is currently migrating")
    }

    /// The VM is in a state from which this is impossible: pausing a paused VM, for instance.
    /// After a lost answer, read the state before calling again.
    #[must_use]
    pub fn is_invalid_transition(&self) -> bool {
        self.says("InvalidStateTransition")
    }

    /// A snapshot's destination holds a snapshot already, perhaps half of one: a directory
    /// serves one attempt.
    #[must_use]
    pub fn is_destination_taken(&self) -> bool {
        self.says("File exists (os error 17)")
    }

    /// The guest has not let go of vCPUs that were taken away.
    #[must_use]
    pub const fn is_vcpu_pending(&self) -> bool {
        matches!(self, Self::Refused { status: 429, .. })
    }

    /// CH has no such operation: it is too old, or built without it.
    #[must_use]
    pub fn is_unknown_operation(&self) -> bool {
        self.status() == Some(404) && self.says("Not Found")
    }

    /// CH has ten connections open, and takes no more.
    #[must_use]
    pub const fn is_too_many_connections(&self) -> bool {
        matches!(self, Self::Refused { status: 503, .. })
    }

    /// The deadline has passed. The call may have run, or may still run.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::NoAnswer { source, .. } if source.is_timeout())
    }

    /// Nobody listens, or the connection ended: CH is gone or going.
    #[must_use]
    pub fn is_disconnected(&self) -> bool {
        matches!(self, Self::NoAnswer { source, .. } if source.is_refused() || source.is_closed())
    }

    /// Whether CH may have done it all the same. `false` is certain.
    #[must_use]
    pub fn may_have_run(&self) -> bool {
        match self {
            Self::NoAnswer { source, .. } => source.may_have_been_seen(),
            Self::UnreadableAnswer { .. } => true,
            // A restore or migration may fail half-way, but CH has cleaned up behind it.
            _ => false,
        }
    }
}

/// CH's words: the outermost first, the root cause last. Escaped and cut, for a guest's or a
/// snapshot's text may be in them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    texts: Vec<String>,
}

impl Chain {
    /// Most texts that are kept: the first ones, and the last as root cause.
    pub const MAX_TEXTS: usize = 16;

    /// The longest body that is taken apart. CH's longest are some 500 bytes.
    const LIMITS: JsonLimits = JsonLimits {
        bytes: 64 * 1024,
        depth: 1,
    };

    /// The texts.
    #[must_use]
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// The last text.
    #[must_use]
    pub fn root_cause(&self) -> Option<&str> {
        self.texts.last().map(String::as_str)
    }

    /// Whether one of the texts contains `text`. CH's wording is no interface: match short.
    #[must_use]
    pub fn contains(&self, text: &str) -> bool {
        self.texts.iter().any(|own| own.contains(text))
    }

    /// Reads the body of an error. Never fails: what has no known form is one text.
    ///
    /// CH writes a JSON array of texts (`vmm/src/api/http/mod.rs`). Its HTTP library writes an
    /// object with one text that contains a raw line feed, so that it is no JSON (micro-http,
    /// `src/server.rs`).
    #[must_use]
    pub fn decode(body: &[u8]) -> Self {
        if body.is_empty() {
            return Self::default();
        }
        if let Ok(texts) = json::from_slice_bounded::<Vec<String>>(body, Self::LIMITS) {
            return Self::from_texts(texts.iter().map(String::as_bytes));
        }
        match server_message(body) {
            Some(message) => Self::from_texts(message.split(|byte| *byte == b'\n')),
            None => Self::from_texts([body]),
        }
    }

    fn from_texts<'a>(texts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut kept: Vec<String> = Vec::new();
        for text in texts {
            if kept.len() == Self::MAX_TEXTS {
                kept.pop();
            }
            kept.push(excerpt(text));
        }
        Self { texts: kept }
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.texts.is_empty() {
            return f.write_str("no reason given");
        }
        f.write_str(&self.texts.join(": "))
    }
}

/// The text of `{ "error": "…" }`, whatever it contains.
fn server_message(body: &[u8]) -> Option<&[u8]> {
    let body = body.trim_ascii().strip_prefix(b"{")?.trim_ascii_start();
    let body = body.strip_prefix(b"\"error\"")?.trim_ascii_start();
    let body = body.strip_prefix(b":")?.trim_ascii_start();
    let text = body.strip_prefix(b"\"")?;
    text.strip_suffix(b"}")?
        .trim_ascii_end()
        .strip_suffix(b"\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::excerpt::EXCERPT_BYTES;

    fn texts(body: impl AsRef<[u8]>) -> Vec<String> {
        Chain::decode(body.as_ref()).texts
    }

    #[test]
    fn every_form_of_error_body_becomes_a_chain() {
        let server = "{ \"error\": \"Invalid request.\nAll previous unanswered requests will be dropped.\" }";
        for (name, body, expected) in [
            ("nothing", "", &[][..]),
            ("empty array", "[]", &[]),
            (
                "chain",
                r#"["Error from API","The VM could not be paused","VM is not running"]"#,
                &[
                    "Error from API",
                    "The VM could not be paused",
                    "VM is not running",
                ],
            ),
            (
                "server's own, no JSON",
                server,
                &[
                    "Invalid request.",
                    "All previous unanswered requests will be dropped.",
                ],
            ),
            (
                "server's own, JSON",
                r#"{ "error": "Too many open connections" }"#,
                &["Too many open connections"],
            ),
            (
                "another object",
                r#"{"message":"x"}"#,
                &[r#"{"message":"x"}"#],
            ),
            ("array of others", "[1,2]", &["[1,2]"]),
            ("a text", r#""x""#, &[r#""x""#]),
            ("no JSON", "Not Found", &["Not Found"]),
            ("half an object", "{ \"error\": \"", &["{ \"error\": \""]),
            ("half an array", r#"["a","#, &[r#"["a","#]),
            ("control bytes", "[\"a\\u001b[2J\"]", &["a\\u{1b}[2J"]),
        ] {
            assert_eq!(texts(body), expected, "{name}");
        }
        assert_eq!(texts(b"\xff\xfe"), ["\\xff\\xfe"]);
        assert_eq!(texts(b"{ \"error\": \"\xff\" }"), ["\\xff"]);
    }

    #[test]
    fn huge_bodies_leave_small_chains() {
        let many = format!("[{}\"root\"]", "\"x\",".repeat(10_000));
        let kept = texts(&many);
        assert_eq!(kept.len(), Chain::MAX_TEXTS);
        assert_eq!(kept.last().unwrap(), "root");

        let long = format!("[\"{}\"]", "x".repeat(60_000));
        assert!(texts(&long)[0].len() <= EXCERPT_BYTES + 3);
        let larger = format!("[\"{}\"]", "x".repeat(1 << 20));
        assert_eq!(texts(&larger).len(), 1);
        assert!(texts("[".repeat(1 << 20))[0].starts_with("[[[["));
        let lines = format!("{{ \"error\": \"{}\" }}", "\n".repeat(1 << 20));
        assert_eq!(texts(&lines).len(), Chain::MAX_TEXTS);
    }

    fn refused(status: u16, body: &str) -> ApiError {
        ApiError::Refused {
            operation: Operation::Info,
            status,
            chain: Chain::decode(body.as_bytes()),
        }
    }

    #[test]
    fn predicates_tell_the_cases_that_callers_act_on() {
        let missing = r#"["Error from API","The VM info is not available","VM is not created"]"#;
        for status in [404, 500] {
            assert!(refused(status, missing).is_vm_missing());
            assert!(!refused(status, missing).is_unknown_operation());
        }
        let unknown = refused(404, r#"["Not Found"]"#);
        assert!(unknown.is_unknown_operation() && !unknown.is_vm_missing());
        assert!(refused(429, "[]").is_vcpu_pending());
        assert!(refused(503, "").is_too_many_connections());
        assert!(!refused(500, "").is_vm_missing());
        assert!(!refused(500, missing).may_have_run());
    }

    #[test]
    fn errors_read_as_one_sentence() {
        let error = refused(500, r#"["Error from API","VM is not running"]"#);
        assert_eq!(
            error.to_string(),
            "vm.info is refused with status 500: Error from API: VM is not running"
        );
        assert_eq!(
            refused(400, "").to_string(),
            "vm.info is refused with status 400: no reason given"
        );
    }
}
