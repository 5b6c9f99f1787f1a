//! `POST /init` in three dialects.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::http::{Answer, Request};
use super::{Agent, Dialect, World};

/// The body of Wrenn's agents. Keys that a dialect does not have are ignored there.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Wrenn {
    access_token: Option<String>,
    #[serde(rename = "accessToken")]
    access_token_fc: Option<String>,
    #[serde(rename = "defaultUser")]
    default_user: Option<String>,
    #[serde(rename = "defaultWorkdir")]
    default_workdir: Option<String>,
    #[serde(rename = "envVars")]
    env_vars: Option<BTreeMap<String, String>>,
    timestamp: Option<String>,
    lifecycle_id: Option<String>,
    sandbox_id: Option<String>,
    template_id: Option<String>,
    proxy_domain: Option<String>,
    hyperloop_ip: Option<String>,
    #[serde(rename = "hyperloopIp")]
    hyperloop_ip_fc: Option<String>,
    volume_mounts: Option<Vec<Mount>>,
}

#[derive(Debug, Deserialize)]
struct Mount {
    #[serde(rename = "nfs_target")]
    _target: String,
    #[serde(rename = "path")]
    _path: String,
}

impl Agent {
    pub(super) fn init(&mut self, request: &Request, world: &mut dyn World) -> Answer {
        match self.dialect {
            Dialect::E2b => self.init_e2b(request, world),
            Dialect::WCh | Dialect::WFc => match wrenn_body(request) {
                Ok(body) => self.init_wrenn(body, world),
                Err(answer) => *answer,
            },
        }
    }

    /// Order: token check, lifecycle, timestamp gate, then the rest.
    fn init_wrenn(&mut self, body: Wrenn, world: &mut dyn World) -> Answer {
        let newest = self.dialect == Dialect::WCh;
        let token = if newest {
            body.access_token
        } else {
            body.access_token_fc
        };
        if let (Some(given), Some(known)) = (&token, &self.token)
            && given != known
        {
            let reason = if given.is_empty() {
                "access token reset not authorized"
            } else {
                "access token validation failed"
            };
            return text(401, reason);
        }
        self.needs_restore = false;
        let timestamp = body
            .timestamp
            .as_deref()
            .and_then(|t| parse_time(t, newest));
        if newest && let Some(id) = body.lifecycle_id {
            match &self.lifecycle_id {
                Some(known) if *known == id => {}
                Some(_) => {
                    self.preload.reset();
                    self.ports_stopped = false;
                    if let Some(ns) = timestamp {
                        world.set_unix_ns(ns);
                    }
                    self.lifecycle_id = Some(id);
                }
                // The first id ever is only recorded.
                None => self.lifecycle_id = Some(id),
            }
        }
        let accepted = Answer::new(204).header("cache-control", "no-store");
        if let Some(ns) = timestamp {
            if self.newest_timestamp.is_some_and(|seen| ns <= seen) {
                return accepted;
            }
            self.newest_timestamp = Some(ns);
        }
        self.env.extend(body.env_vars.unwrap_or_default());
        if let Some(token) = token.filter(|t| !t.is_empty()) {
            self.token = Some(token);
        }
        if let Some(user) = body.default_user.filter(|u| newest && !u.is_empty()) {
            self.default_user = user;
        }
        if let Some(workdir) = body.default_workdir.filter(|w| newest && !w.is_empty()) {
            self.default_workdir = Some(workdir);
        }
        let hyperloop = if newest {
            body.hyperloop_ip
        } else {
            body.hyperloop_ip_fc
        };
        if let Some(ip) = hyperloop {
            self.env
                .insert("WRENN_EVENTS_ADDRESS".to_owned(), format!("http://{ip}"));
        }
        // NFS mounts always "succeed": the real agent answers 204 either way.
        drop(body.volume_mounts);
        if newest {
            let proxy = body.proxy_domain.filter(|domain| !domain.is_empty());
            let identity = [
                ("WRENN_SANDBOX_ID", body.sandbox_id),
                ("WRENN_TEMPLATE_ID", body.template_id),
                ("WRENN_PROXY_DOMAIN", proxy),
            ];
            for (key, value) in identity {
                if let Some(value) = value {
                    self.env.insert(key.to_owned(), value);
                }
            }
        }
        accepted
    }

    /// Order: body, token, gate, clock and the rest.
    fn init_e2b(&mut self, request: &Request, world: &mut dyn World) -> Answer {
        let answer = |status| Answer::new(status).header("x-envd-version", super::E2B_VERSION);
        let Some(body) = e2b_body(&request.body) else {
            return answer(400).sized("");
        };
        let get = |key: &str| body.get(key);
        let string = |key: &str| get(key).and_then(Value::as_str).map(str::to_owned);
        let token = string("accesstoken");
        if token
            .as_deref()
            .is_some_and(|t| t.is_empty() || t.contains('\\'))
        {
            return answer(400).sized("");
        }
        // Without MMDS nothing can authorise a change or a removal.
        if self.token.is_some() && self.token != token {
            let body = "access token validation failed\n";
            let refused = answer(401).header("content-type", "text/plain; charset=utf-8");
            return refused.sized(body);
        }
        let accepted = answer(204).header("cache-control", "no-store");
        let timestamp = match string("timestamp") {
            Some(text) => match parse_rfc3339(&text) {
                Some(ns) => Some(ns),
                None => return answer(400).sized(""),
            },
            None => None,
        };
        if let Some(ns) = timestamp {
            if self.newest_timestamp.is_some_and(|seen| ns <= seen) {
                return accepted;
            }
            self.newest_timestamp = Some(ns);
            let ahead = world.unix_ns() - ns;
            if !(-50_000_000..=5_000_000_000).contains(&ahead) {
                world.set_unix_ns(ns);
            }
        }
        if let Some(Value::Object(vars)) = get("envvars") {
            self.env.clear();
            for (key, value) in vars {
                if let Some(value) = value.as_str() {
                    self.env.insert(key.clone(), value.to_owned());
                }
            }
        }
        if let Some(id) = string("lifecycleid") {
            self.lifecycle_id = Some(id);
        }
        if token.is_some() {
            self.token = token;
        }
        if let Some(user) = string("defaultuser").filter(|u| !u.is_empty()) {
            self.default_user = user;
        }
        accepted
    }
}

/// The body of a Wrenn request, or the answer of the extractor that refuses it.
fn wrenn_body(request: &Request) -> Result<Wrenn, Box<Answer>> {
    let Some(content_type) = request.header("content-type") else {
        // Whatever the body says, it is not looked at.
        return Ok(Wrenn::default());
    };
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    let json = essence.eq_ignore_ascii_case("application/json")
        || (essence.starts_with("application/") && essence.ends_with("+json"));
    if !json {
        let body = "Expected request with `Content-Type: application/json`";
        return Err(Box::new(text(415, body)));
    }
    if request.oversized {
        let body = "Failed to buffer the request body: length limit exceeded";
        return Err(Box::new(text(413, body)));
    }
    let mut parser = serde_json::Deserializer::from_slice(&request.body);
    let parsed: Result<Wrenn, _> = serde_path_to_error::deserialize(&mut parser);
    parsed.map_err(|error| {
        Box::new(if error.inner().is_data() {
            let reason = "Failed to deserialize the JSON body into the target type";
            text(422, &format!("{reason}: {error}"))
        } else {
            text(
                400,
                &format!("Failed to parse the request body as JSON: {error}"),
            )
        })
    })
}

/// Keys in lower case, as Go matches them; `None` where Go could not decode the body.
fn e2b_body(bytes: &[u8]) -> Option<BTreeMap<String, Value>> {
    if bytes.is_empty() {
        return Some(BTreeMap::new());
    }
    let Ok(Value::Object(map)) = serde_json::from_slice(bytes) else {
        return None;
    };
    let map: BTreeMap<_, _> = map
        .into_iter()
        .map(|(k, v)| (k.to_ascii_lowercase(), v))
        .collect();
    let texts = [
        "accesstoken",
        "defaultuser",
        "defaultworkdir",
        "timestamp",
        "lifecycleid",
    ];
    let fits = |key: &str| map.get(key).is_none_or(|v| v.is_string() || v.is_null());
    texts.iter().all(|key| fits(key)).then_some(map)
}

fn text(status: u16, body: &str) -> Answer {
    Answer::new(status)
        .header("content-type", "text/plain; charset=utf-8")
        .sized(body)
}

/// Nanoseconds since 1970. Wrenn's newest takes RFC 3339 or decimal seconds, its older one
/// seconds only; what neither can read counts as absent.
fn parse_time(text: &str, newest: bool) -> Option<i64> {
    let seconds = text
        .parse::<i64>()
        .ok()
        .and_then(|s| s.checked_mul(1_000_000_000));
    seconds.or_else(|| newest.then(|| parse_rfc3339(text)).flatten())
}

fn parse_rfc3339(text: &str) -> Option<i64> {
    let time: jiff::Timestamp = text.parse().ok()?;
    i64::try_from(time.as_nanosecond()).ok()
}
