//! The body of `POST /init`: who the sandbox is now, and what time it is.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

/// The id of one life of a sandbox: made once per restore, kept over all retries of `/init`.
///
/// A new id is never idempotent: it stops a running memory preload and resets its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Lifecycle(Uuid);

impl From<Lifecycle> for String {
    fn from(lifecycle: Lifecycle) -> Self {
        lifecycle.to_string()
    }
}

impl TryFrom<String> for Lifecycle {
    type Error = uuid::Error;
    fn try_from(text: String) -> Result<Self, uuid::Error> {
        Uuid::try_parse(&text).map(Self)
    }
}

impl Lifecycle {
    /// A fresh id.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// An id that was made earlier and kept on disk, `None` where the text is no UUID.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Uuid::try_parse(text).ok().map(Self)
    }
}

impl fmt::Display for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.hyphenated(), f)
    }
}

/// The secret that E2B's agent asks for on most paths and Wrenn's on `/files`.
#[derive(Clone, PartialEq, Eq)]
pub struct AccessToken(String);

impl AccessToken {
    /// Longest token, in bytes.
    pub const MAX: usize = 1024;

    /// Checks a token: 1 to 1024 printable ASCII characters without white space, quotes and
    /// backslashes.
    ///
    /// The narrowest of the dialects sets the rule: E2B answers 400 to an empty token and to
    /// a backslash, Wrenn takes an empty one for an attempt to clear it.
    ///
    /// # Errors
    /// [`InitError::Token`] where the rule is broken. The token is not quoted.
    pub fn new(token: impl Into<String>) -> Result<Self, InitError> {
        let token = token.into();
        let fits = (1..=Self::MAX).contains(&token.len())
            && token
                .bytes()
                .all(|b| b.is_ascii_graphic() && b != b'\\' && b != b'"');
        if fits {
            Ok(Self(token))
        } else {
            Err(InitError::Token)
        }
    }

    /// The token itself, for a header or a body. Keep it out of logs.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken(…)")
    }
}

/// One NFS export to mount in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeMount {
    /// `server:/export`.
    pub nfs_target: String,
    /// Where it appears in the guest.
    pub path: String,
}

/// All that `/init` can carry. Every field but the lifecycle is optional, and what is left
/// out is left alone by Wrenn's agent; E2B's clears a token that is left out, and replaces
/// the variables as a whole where Wrenn's merges them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Init {
    /// The life that begins. Never changed between retries.
    pub lifecycle: Lifecycle,
    /// Set once per guest: Wrenn's agent refuses (401) to change it ever after, also in the
    /// descendants of a snapshot.
    pub access_token: Option<AccessToken>,
    /// User for commands that name none. Empty counts as left out.
    pub default_user: Option<String>,
    /// Directory for commands that name none. Empty counts as left out.
    pub default_workdir: Option<String>,
    /// Environment of everything the agent starts.
    pub env: BTreeMap<String, String>,
    /// Wrenn: the sandbox's own id, seen in the guest as `WRENN_SANDBOX_ID`.
    pub sandbox_id: Option<String>,
    /// Wrenn: the id of the template, seen in the guest as `WRENN_TEMPLATE_ID`.
    pub template_id: Option<String>,
    /// Wrenn: the public domain of the proxy, seen in the guest as `WRENN_PROXY_DOMAIN`.
    pub proxy_domain: Option<String>,
    /// Address of the event service; rewrites a line of the guest's `/etc/hosts`.
    pub hyperloop_ip: Option<Ipv4Addr>,
    /// NFS mounts. Wrenn's agent mounts them again on every `/init` it accepts and answers
    /// 204 even where a mount failed.
    pub volume_mounts: Vec<VolumeMount>,
    /// E2B: certificates for the guest's trust store, PEM.
    pub ca_bundle: Option<String>,
    /// Also send the three ids as variables. Agents outside Wrenn's Cloud Hypervisor era
    /// take their identity from Firecracker's metadata service, which is not there; this is
    /// how processes in the guest, and [`verify_applied`], still see it. Off by default,
    /// because with the newest agent the variable would be set before the id is applied.
    ///
    /// [`verify_applied`]: super::client::Client::verify_applied
    pub identity_as_env: bool,
}

/// The variable that proves in `/envs` which sandbox an `/init` was for.
pub const SANDBOX_ID_ENV: &str = "WRENN_SANDBOX_ID";

/// The agents' servers refuse longer bodies (413), measured with Wrenn's 0.2.0.
pub const MAX_BODY: usize = 2 << 20;

/// Why an `/init` cannot be sent at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    /// See [`AccessToken::new`].
    #[error("The access token is empty, too long, or has characters that an agent refuses")]
    Token,
    /// See [`MAX_BODY`].
    #[error("The body of /init has {len} bytes, the agent takes {MAX_BODY}")]
    TooLong {
        /// Its length, in bytes.
        len: usize,
    },
}

impl Init {
    /// The least that a restore sends: a fresh lifecycle id, and the time.
    #[must_use]
    pub fn new() -> Self {
        Self {
            lifecycle: Lifecycle::random(),
            access_token: None,
            default_user: None,
            default_workdir: None,
            env: BTreeMap::new(),
            sandbox_id: None,
            template_id: None,
            proxy_domain: None,
            hyperloop_ip: None,
            volume_mounts: Vec::new(),
            ca_bundle: None,
            identity_as_env: false,
        }
    }

    /// The same with another fresh lifecycle id, for a guest whose preload was spoiled.
    #[must_use]
    pub fn renewed(&self) -> Self {
        Self {
            lifecycle: Lifecycle::random(),
            ..self.clone()
        }
    }

    /// The id alone: what a guest is sent first that may never have seen any id (see
    /// [`Client::init_twice`](super::client::Client::init_twice)).
    #[must_use]
    pub fn first_contact() -> Self {
        Self::new()
    }

    /// The JSON for an attempt made at `at`.
    ///
    /// One body serves all three dialects, since each ignores the keys it does not know: the
    /// spellings of one meaning stand side by side with the same value. `timestamp` is RFC
    /// 3339 with nine digits after the second.
    ///
    /// # Errors
    /// [`InitError::TooLong`].
    pub fn body(&self, at: Timestamp) -> Result<Vec<u8>, InitError> {
        let body = Value::Object(self.keys(at)).to_string().into_bytes();
        if body.len() > MAX_BODY {
            return Err(InitError::TooLong { len: body.len() });
        }
        Ok(body)
    }

    fn keys(&self, at: Timestamp) -> Map<String, Value> {
        let mut keys = Map::new();
        let mut put = |names: &[&str], value: Value| {
            for name in names {
                keys.insert((*name).to_owned(), value.clone());
            }
        };
        put(&["timestamp"], format!("{at:.9}").into());
        let lifecycle = self.lifecycle.to_string();
        put(&["lifecycle_id", "lifecycleID"], lifecycle.into());
        if let Some(token) = &self.access_token {
            put(&["access_token", "accessToken"], token.secret().into());
        }
        for (names, text) in [
            (&["defaultUser"][..], &self.default_user),
            (&["defaultWorkdir"], &self.default_workdir),
            (&["sandbox_id"], &self.sandbox_id),
            (&["template_id"], &self.template_id),
            (&["proxy_domain"], &self.proxy_domain),
            (&["caBundle"], &self.ca_bundle),
        ] {
            // Wrenn stores an empty id as given, which no caller can mean.
            if let Some(text) = text.as_ref().filter(|text| !text.is_empty()) {
                put(names, text.as_str().into());
            }
        }
        if let Some(ip) = self.hyperloop_ip {
            let names = ["hyperloop_ip", "hyperloopIp", "hyperloopIP"];
            put(&names, ip.to_string().into());
        }
        if !self.volume_mounts.is_empty() {
            let mounts = self
                .volume_mounts
                .iter()
                .map(|mount| json!({"nfs_target": mount.nfs_target, "path": mount.path}))
                .collect();
            put(&["volume_mounts", "volumeMounts"], Value::Array(mounts));
        }
        let env = self.variables();
        if !env.is_empty() {
            put(&["envVars"], json!(env));
        }
        keys
    }

    fn variables(&self) -> BTreeMap<&str, &str> {
        let mut env: BTreeMap<&str, &str> = BTreeMap::new();
        if self.identity_as_env {
            for (name, id) in [
                (SANDBOX_ID_ENV, &self.sandbox_id),
                ("WRENN_TEMPLATE_ID", &self.template_id),
                ("WRENN_PROXY_DOMAIN", &self.proxy_domain),
            ] {
                if let Some(id) = id {
                    env.insert(name, id);
                }
            }
        }
        let given = self.env.iter();
        env.extend(given.map(|(name, value)| (name.as_str(), value.as_str())));
        env
    }
}

impl Default for Init {
    /// [`Init::new`]: every default has its own lifecycle id.
    fn default() -> Self {
        Self::new()
    }
}

/// Host times for `/init`, each later than the one before.
///
/// The agents skip a request whose time is not later than the newest they have seen, and
/// still answer 204. A step of the host's clock between two attempts must not cause that.
#[derive(Debug, Clone, Copy, Default)]
pub struct RisingClock {
    last: Option<Timestamp>,
}

impl RisingClock {
    /// The time now, or one nanosecond after the time given out last.
    pub fn now(&mut self) -> Timestamp {
        self.at_least(Timestamp::now())
    }

    fn at_least(&mut self, now: Timestamp) -> Timestamp {
        let after_last = self
            .last
            .and_then(|last| last.checked_add(jiff::SignedDuration::from_nanos(1)).ok());
        let next = after_last.map_or(now, |after| after.max(now));
        self.last = Some(next);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(init: &Init) -> Value {
        let at: Timestamp = "2026-11-23T15:20:00.000000001Z".parse().unwrap();
        serde_json::from_slice(&init.body(at).unwrap()).unwrap()
    }

    #[test]
    fn the_least_body_has_the_time_and_the_id_alone() {
        let init = Init::new();
        let id = init.lifecycle.to_string();
        assert_eq!(
            parsed(&init),
            json!({"timestamp": "2026-11-23T15:20:00.000000001Z", "lifecycle_id": id, "lifecycleID": id})
        );
    }

    #[test]
    fn one_body_carries_the_spellings_of_all_dialects() {
        let init = Init {
            access_token: Some(AccessToken::new("tok-aaaa").unwrap()),
            default_user: Some("root".into()),
            default_workdir: Some("/srv".into()),
            env: BTreeMap::from([("K".into(), "V".into())]),
            sandbox_id: Some("sb-1".into()),
            template_id: Some("python".into()),
            proxy_domain: Some("example.org".into()),
            hyperloop_ip: Some(Ipv4Addr::new(10, 0, 0, 1)),
            volume_mounts: vec![VolumeMount {
                nfs_target: "10.0.0.2:/e".into(),
                path: "/mnt".into(),
            }],
            ca_bundle: Some("PEM".into()),
            ..Init::new()
        };
        let body = parsed(&init);
        for (keys, value) in [
            (&["access_token", "accessToken"][..], json!("tok-aaaa")),
            (&["defaultUser"], json!("root")),
            (&["defaultWorkdir"], json!("/srv")),
            (&["envVars"], json!({"K": "V"})),
            (&["sandbox_id"], json!("sb-1")),
            (&["template_id"], json!("python")),
            (&["proxy_domain"], json!("example.org")),
            (
                &["hyperloop_ip", "hyperloopIp", "hyperloopIP"],
                json!("10.0.0.1"),
            ),
            (
                &["volume_mounts", "volumeMounts"],
                json!([{"nfs_target": "10.0.0.2:/e", "path": "/mnt"}]),
            ),
            (&["caBundle"], json!("PEM")),
        ] {
            for key in keys {
                assert_eq!(body[key], value, "{key}");
            }
        }
        assert_eq!(body.as_object().unwrap().len(), 17);
    }

    #[test]
    fn identity_goes_into_the_environment_only_when_asked_for() {
        let mut init = Init {
            sandbox_id: Some("sb-1".into()),
            ..Init::new()
        };
        assert_eq!(parsed(&init).get("envVars"), None);
        init.identity_as_env = true;
        assert_eq!(
            parsed(&init)["envVars"],
            json!({"WRENN_SANDBOX_ID": "sb-1"})
        );
    }

    #[test]
    fn empty_texts_count_as_left_out() {
        let init = Init {
            sandbox_id: Some(String::new()),
            default_user: Some(String::new()),
            ..Init::new()
        };
        assert_eq!(parsed(&init).as_object().unwrap().len(), 3);
    }

    #[test]
    fn refuses_tokens_that_some_dialect_would_refuse() {
        for bad in ["", "a b", "a\\b", "a\nb", "ä", "a\"b", &"a".repeat(1025)] {
            assert_eq!(AccessToken::new(bad), Err(InitError::Token), "{bad:?}");
        }
        let token = AccessToken::new("tok-aaaa").unwrap();
        assert!(!format!("{token:?}").contains("tok"));
    }

    #[test]
    fn refuses_bodies_that_the_agent_would_refuse() {
        let init = Init {
            env: BTreeMap::from([("K".into(), "v".repeat(MAX_BODY))]),
            ..Init::new()
        };
        let at = Timestamp::UNIX_EPOCH;
        assert!(matches!(init.body(at), Err(InitError::TooLong { .. })));
    }

    #[test]
    fn a_renewed_init_differs_in_its_id_alone() {
        let init = Init::new();
        let renewed = init.renewed();
        assert_ne!(renewed.lifecycle, init.lifecycle);
        let same = Init {
            lifecycle: init.lifecycle,
            ..renewed
        };
        assert_eq!(same, init);
        let text = init.lifecycle.to_string();
        assert_eq!(Lifecycle::parse(&text), Some(init.lifecycle));
        assert_eq!(Lifecycle::parse("not an id"), None);
    }

    #[test]
    fn times_rise_even_where_the_clock_steps_back() {
        let mut clock = RisingClock::default();
        let second = jiff::SignedDuration::from_secs(1);
        let start = Timestamp::UNIX_EPOCH + second;
        let first = clock.at_least(start);
        let stepped_back = clock.at_least(start - second);
        assert!(stepped_back > first);
        assert!(clock.at_least(start + second) > stepped_back);
        assert_eq!(
            format!("{stepped_back:.9}"),
            "1970-01-01T00:00:01.000000001Z"
        );
    }
}
