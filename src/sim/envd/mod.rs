//! The guest agent ("envd") in three dialects, without sockets: request bytes in, answer
//! bytes out.
//!
//! Everything it knows is in [`Agent`], which is kept in guest RAM: a restored guest
//! remembers its lifecycle id, newest timestamp, token, variables and preload flags.

pub(crate) mod http;
mod init;
mod preload;

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use http::{Answer, Request, Requests, Style};
pub(crate) use preload::Disturb;
use preload::Preload;

/// The port every dialect listens on.
pub(crate) const PORT: u16 = 49_983;
const WRENN_VERSION: &str = "0.2.0";
const E2B_VERSION: &str = "0.6.13";
/// Where the stand-in's guest tells what its RAM looks like.
pub(crate) const STATE_PATH: &str = "/sim/state";

/// Which agent is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) enum Dialect {
    /// Wrenn's, of its Cloud Hypervisor era: with `/memory/preload`.
    #[default]
    WCh,
    /// Wrenn's 0.2.0, of its Firecracker era.
    WFc,
    /// E2B's.
    E2b,
}

impl FromStr for Dialect {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "w-ch" => Ok(Self::WCh),
            "w-fc" => Ok(Self::WFc),
            "e2b" => Ok(Self::E2b),
            _ => Err(format!("a dialect is w-ch, w-fc or e2b, not {text:?}")),
        }
    }
}

/// What the agent can do to the machine it runs on.
pub(crate) trait World {
    /// The guest's wall clock, nanoseconds since 1970.
    fn unix_ns(&self) -> i64;
    /// Sets the guest's wall clock.
    fn set_unix_ns(&mut self, ns: i64);
    /// Pages of RAM.
    fn ram_pages(&self) -> u64;
    /// Regions of RAM.
    fn ram_regions(&self) -> u64;
    /// Reads one byte of each of these pages.
    fn touch(&mut self, first: u64, count: u64) -> Result<(), String>;
    /// What [`STATE_PATH`] answers.
    fn state(&mut self) -> Value;
}

/// The agent's memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Agent {
    pub(crate) dialect: Dialect,
    lifecycle_id: Option<String>,
    newest_timestamp: Option<i64>,
    token: Option<String>,
    env: BTreeMap<String, String>,
    default_user: String,
    default_workdir: Option<String>,
    preload: Preload,
    /// `/snapshot/prepare` has stopped port forwarding.
    ports_stopped: bool,
    /// W-FC: the next `/health` or `/init` undoes `/snapshot/prepare`.
    needs_restore: bool,
}

impl Agent {
    pub(crate) fn new(dialect: Dialect) -> Self {
        let mut env = BTreeMap::new();
        if dialect != Dialect::E2b {
            env.insert("WRENN_SANDBOX".to_owned(), "false".to_owned());
        }
        Self {
            dialect,
            lifecycle_id: None,
            newest_timestamp: None,
            token: None,
            env,
            default_user: "root".to_owned(),
            default_workdir: None,
            preload: Preload::default(),
            ports_stopped: false,
            needs_restore: false,
        }
    }

    /// What [`STATE_PATH`] adds about the agent.
    pub(crate) fn summary(&self) -> Value {
        json!({
            "lifecycle_id": self.lifecycle_id,
            "ports_stopped": self.ports_stopped,
            "preload": self.preload.status(),
        })
    }

    /// Goes on with what runs in the background; when to be called again.
    pub(crate) fn advance(
        &mut self,
        world: &mut dyn World,
        disturb: Disturb,
        now: Instant,
    ) -> Option<Instant> {
        if !self.preload.is_walking() {
            return None;
        }
        self.preload.step(world, disturb, now)
    }

    /// Answers one request.
    pub(crate) fn answer(&mut self, request: &Request, world: &mut dyn World) -> Answer {
        if request.path == STATE_PATH {
            let mut state = world.state();
            state["agent"] = self.summary();
            return Answer::new(200)
                .header("content-type", "application/json")
                .sized(state.to_string())
                .unmatched();
        }
        if self.dialect == Dialect::E2b {
            return self.answer_e2b(request, world);
        }
        let Some(methods) = self.wrenn_methods(&request.path) else {
            return fallback(request);
        };
        if !methods.split(',').any(|m| m == request.method) {
            return Answer::new(405).header("allow", methods).sized("");
        }
        match (request.path.as_str(), request.method.as_str()) {
            ("/health", _) => {
                if std::mem::take(&mut self.needs_restore) {
                    self.ports_stopped = false;
                }
                fresh_json(json!({"version": WRENN_VERSION}).to_string())
            }
            ("/init", _) => self.init(request, world),
            ("/snapshot/prepare", _) => {
                self.ports_stopped = true;
                self.needs_restore = self.dialect == Dialect::WFc;
                Answer::new(204).header("cache-control", "no-store")
            }
            ("/memory/preload", method) => {
                if method == "POST" {
                    self.preload.start();
                }
                fresh_json(to_json(&self.preload.status()))
            }
            ("/memory/preload/cancel", _) => {
                self.preload.cancel();
                Answer::new(204)
            }
            ("/metrics", _) => fresh_json(metrics(world, false)),
            ("/activity", _) => fresh_json(ACTIVITY.to_owned()),
            _ => fresh_json(self.envs()),
        }
    }

    /// The methods of a route of Wrenn's agents, `None` where it has no such route.
    fn wrenn_methods(&self, path: &str) -> Option<&'static str> {
        let newest = self.dialect == Dialect::WCh;
        match path {
            "/health" | "/metrics" | "/envs" => Some("GET,HEAD"),
            "/init" | "/snapshot/prepare" => Some("POST"),
            "/memory/preload" if newest => Some("GET,HEAD,POST"),
            "/memory/preload/cancel" if newest => Some("POST"),
            "/activity" if newest => Some("GET,HEAD"),
            _ => None,
        }
    }

    fn answer_e2b(&mut self, request: &Request, world: &mut dyn World) -> Answer {
        let path = request.path.as_str();
        let method = match path {
            "/health" | "/metrics" | "/envs" => "GET",
            "/init" => "POST",
            _ => "",
        };
        let open = matches!(path, "/health" | "/init");
        if !open
            && self.token.is_some()
            && request.header("x-access-token") != self.token.as_deref()
        {
            let body = json!({"code": 401, "message": "unauthorized access, please provide a valid access token or method signing if supported"});
            return Answer::new(401)
                .header("content-type", "application/json")
                .sized(body.to_string());
        }
        if method.is_empty() {
            let answer = Answer::new(404).header("content-type", "text/plain; charset=utf-8");
            return answer
                .header("x-content-type-options", "nosniff")
                .sized("404 page not found\n");
        }
        if request.method != method {
            return Answer::new(405).header("allow", method).sized("");
        }
        match path {
            "/health" => Answer::new(204)
                .header("cache-control", "no-store")
                .header("content-type", ""),
            "/init" => self.init(request, world),
            "/metrics" => fresh_json(metrics(world, true)),
            _ => fresh_json(self.envs()),
        }
    }

    fn envs(&self) -> String {
        json!(self.env).to_string()
    }
}

const ACTIVITY: &str = "{\"cpu_count\":1,\"cpu_used_pct\":0.0,\"net_bps\":0,\"disk_bps\":0}";

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn fresh_json(body: String) -> Answer {
    Answer::new(200)
        .header("content-type", "application/json")
        .header("cache-control", "no-store")
        .sized(body)
}

/// What the Connect services behind the router answer to paths that nobody has.
fn fallback(request: &Request) -> Answer {
    if request.method == "POST" {
        return Answer::new(415).chunked("").unmatched();
    }
    let path = request.path.trim_start_matches('/');
    let body = json!({"code": "unimplemented", "message": format!("method not found: {path}")});
    Answer::new(404)
        .header("content-type", "application/json")
        .chunked(body.to_string())
        .unmatched()
}

#[derive(Serialize)]
struct Metrics {
    ts: i64,
    cpu_count: u32,
    cpu_used_pct: f64,
    mem_total_mib: u64,
    mem_used_mib: u64,
    mem_total: u64,
    mem_used: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    mem_cache: Option<u64>,
    disk_used: u64,
    disk_total: u64,
}

fn metrics(world: &dyn World, with_cache: bool) -> String {
    let mem_total = world.ram_pages() * 4096;
    let mem_used = mem_total / 16;
    let metrics = Metrics {
        ts: world.unix_ns().div_euclid(1_000_000_000),
        cpu_count: 1,
        cpu_used_pct: 0.0,
        mem_total_mib: mem_total >> 20,
        mem_used_mib: mem_used >> 20,
        mem_total,
        mem_used,
        mem_cache: with_cache.then_some(0),
        disk_used: 0,
        disk_total: 0,
    };
    to_json(&metrics)
}

/// One connection to the agent: bytes in, bytes out.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    requests: Requests,
    /// Nothing more is read; the connection closes once everything is written.
    pub(crate) closing: bool,
    /// Requests answered.
    pub(crate) answered: u64,
}

impl Conversation {
    /// Takes bytes and gives the bytes of all answers they complete.
    pub(crate) fn feed(
        &mut self,
        bytes: &[u8],
        agent: &mut Agent,
        world: &mut dyn World,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        if self.closing {
            return out;
        }
        self.requests.feed(bytes);
        let style = if agent.dialect == Dialect::E2b {
            Style::Go
        } else {
            Style::Hyper
        };
        loop {
            let (answer, close) = match self.requests.next() {
                Ok(None) => return out,
                Ok(Some(request)) => {
                    let mut answer = agent.answer(&request, world);
                    if request.method == "HEAD"
                        && let http::Body::Sized(body) = &answer.body
                    {
                        let length = body.len().to_string();
                        answer.headers.push(("content-length", length));
                        answer.body = http::Body::None;
                    }
                    (answer, request.close)
                }
                Err(http::NotHttp) => (Answer::new(400).sized("").unmatched(), true),
            };
            self.answered += 1;
            out.extend(answer.encode(close, &date(world.unix_ns()), style));
            if close {
                self.closing = true;
                return out;
            }
        }
    }
}

/// The guest's time for the `date` header.
fn date(unix_ns: i64) -> String {
    let time = jiff::Timestamp::from_nanosecond(i128::from(unix_ns)).unwrap_or_default();
    jiff::fmt::rfc2822::DateTimePrinter::new()
        .timestamp_to_rfc9110_string(&time)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
