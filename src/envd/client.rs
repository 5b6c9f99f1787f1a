//! A synchronous client of the agent, useful alone.
//!
//! One connection per request, with `Connection: close`, read to its end: a snapshot must not
//! capture a connection, and a connection from before a restore falls silent without RST or
//! FIN. Every call takes an absolute deadline and blocks until then at most; inside it each
//! kind of request has limits of its own ([`Patience`]).
//!
//! What is repeated: a connection that was refused, timed out, was reset or ended before the
//! answer did, and the statuses 502, 503 and 504. What is not: every other status (400, 401,
//! 405, 413, 415 and 422 are errors of programming or configuration; redirects are refused),
//! and an answer that is not HTTP.
//!
//! `POST /memory/preload/cancel` is left out on purpose. Its flag outlives the walk it
//! cancels and turns a good result bad; only a new lifecycle clears it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use mio::Registry;
use mio::event::Event;

pub use super::call::Patience;
use super::call::{Answered, Call, Message};
use super::dialect::{Agent, Dialect, Family};
use super::init::{AccessToken, Init, InitError, Lifecycle, RisingClock, SANDBOX_ID_ENV};
use super::reply::{self, Activity, Metrics, PreloadStatus, ReplyError};
use super::socket::{CurrentNetns, Sockets};
use super::text::GuestText;
use super::watch::{Interrupt, Interruptible, drive_while_alive};
use crate::deadline::Deadline;
use crate::ids::SandboxId;
use crate::units::Bytes;
use crate::wire::conn::{ConnError, Stream};
use crate::wire::http::{Method, Request, RequestError, Response};
use crate::wire::reactor::{Machine, TokenRange};

/// How one attempt ended that may be followed by another.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// The connection failed.
    #[error("Attempt failed")]
    Conn(#[source] ConnError),
    /// 502, 503 or 504.
    #[error("The agent is not available (HTTP status {status}): {text}")]
    Unavailable {
        /// The status.
        status: u16,
        /// What it said.
        text: GuestText,
    },
}

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No answer within the limits.
    #[error("envd did not answer in {attempts} attempts")]
    NoAnswer {
        /// Number of attempts made.
        attempts: u32,
        /// How the last one ended, `None` where there was no time for any.
        #[source]
        last: Option<AttemptError>,
    },
    /// The answer breaks HTTP, or the bounds that a guest is held to.
    #[error("envd's answer is not acceptable")]
    Garbled(#[source] ConnError),
    /// A status that this request does not count as success.
    #[error("envd answered {path} with HTTP status {status}: {text}")]
    Status {
        /// What was asked.
        path: &'static str,
        /// The status.
        status: u16,
        /// What it said.
        text: GuestText,
    },
    /// The body is not what it should be.
    #[error("envd's answer to {path} makes no sense")]
    Reply {
        /// What was asked.
        path: &'static str,
        /// What is wrong with it.
        #[source]
        source: ReplyError,
    },
    /// The agent has no memory preload (404 or 415): fill memory from the host's side.
    #[error("envd has no memory preload (HTTP status {status})")]
    NoPreload {
        /// The status.
        status: u16,
    },
    /// The request is for another life than this client's.
    #[error("The request is for lifecycle {asked}, the client for {own}")]
    OtherLife {
        /// The life in the request.
        asked: Lifecycle,
        /// The client's.
        own: Lifecycle,
    },
    /// The body of `/init` cannot be made.
    #[error("/init cannot be sent")]
    Init(#[source] InitError),
    /// The request cannot be encoded.
    #[error("The request is refused")]
    Request(#[source] RequestError),
    /// No socket could be made.
    #[error("Cannot make a socket to reach envd")]
    Socket(#[source] io::Error),
    /// The call was ended from outside.
    #[error("The call to envd was ended")]
    Interrupted(#[source] Interrupt),
    /// The event loop failed.
    #[error("Cannot wait for envd")]
    Poll(#[source] io::Error),
}

impl ClientError {
    /// Whether time ran out.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::NoAnswer { .. })
    }

    /// The final HTTP status, where there was one.
    #[must_use]
    pub const fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } | Self::NoPreload { status } => Some(*status),
            _ => None,
        }
    }
}

/// One life of one sandbox. A client belongs to exactly one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incarnation {
    /// The sandbox.
    pub sandbox: SandboxId,
    /// Its life.
    pub lifecycle: Lifecycle,
}

/// How a client reaches its agent. The default: from the current network namespace, without
/// token, whatever happens to the VMM.
#[derive(Clone)]
pub struct ClientOptions {
    /// Where sockets come from.
    pub sockets: Sockets,
    /// Sent as `X-Access-Token` with everything but `/health`.
    pub token: Option<AccessToken>,
    /// The VMM's pidfd: its exit ends a call at once. An address may belong to another
    /// sandbox soon after, and the body of `/init` holds secrets.
    pub vmm: Option<Arc<OwnedFd>>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            sockets: Arc::new(CurrentNetns),
            token: None,
            vmm: None,
        }
    }
}

impl fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientOptions")
            .field("token", &self.token)
            .field("vmm", &self.vmm)
            .finish_non_exhaustive()
    }
}

/// `/init` was answered with 204.
///
/// That is not proof that it was applied: the agent answers the same where the timestamp is
/// not newer than the newest it has seen, and where an NFS mount failed. See
/// [`Client::verify_applied`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acknowledged {
    /// The life that began.
    pub lifecycle: Lifecycle,
    /// When the answer was complete.
    pub at: Instant,
    /// Attempts made.
    pub attempts: u32,
    /// E2B's version, from `X-Envd-Version`.
    pub version: Option<GuestText>,
}

/// What `/envs` says about an `/init`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// Every variable that it should have set is there.
    Yes,
    /// This variable is missing, or differs.
    No {
        /// Its name.
        name: String,
        /// What the guest has instead.
        found: Option<GuestText>,
    },
    /// The request had neither a sandbox id nor variables: nothing to tell it by.
    NothingToTell,
}

/// A client of one agent in one life of its sandbox. Cheap to clone; calls block.
#[derive(Debug, Clone)]
pub struct Client {
    target: SocketAddr,
    incarnation: Incarnation,
    options: ClientOptions,
    clock: Arc<Mutex<RisingClock>>,
}

const TOKENS: TokenRange = TokenRange::new(0, 1);

const HEALTH: &str = "/health";
const INIT: &str = "/init";
const PRELOAD: &str = "/memory/preload";
const PREPARE: &str = "/snapshot/prepare";
const METRICS: &str = "/metrics";
const ACTIVITY: &str = "/activity";
const ENVS: &str = "/envs";

impl Client {
    /// Limits of `/health`.
    pub const HEALTH: Patience = Patience::retrying(1, 10);
    /// Limits of `/init`.
    pub const INIT: Patience = Patience::retrying(5, 30);
    /// Limits of starting the memory preload.
    pub const PRELOAD_START: Patience = Patience::retrying(5, 30);
    /// Limits of asking for the preload's state. The guest may be busy with faults.
    pub const PRELOAD_STATUS: Patience = Patience::once(5);
    /// Limits of `/metrics` and `/activity`.
    pub const METRICS: Patience = Patience::once(2);
    /// Limits of `/envs`.
    pub const ENVS: Patience = Patience::retrying(1, 5);

    /// A client of the agent at `target`, usually port [`PORT`](super::PORT). Sends nothing.
    #[must_use]
    pub fn new(target: SocketAddr, incarnation: Incarnation, options: ClientOptions) -> Self {
        Self {
            target,
            incarnation,
            options,
            clock: Arc::default(),
        }
    }

    /// The life that this client belongs to.
    #[must_use]
    pub const fn incarnation(&self) -> &Incarnation {
        &self.incarnation
    }

    /// The client of the next life of the same sandbox at the same address.
    #[must_use]
    pub fn reborn(&self, lifecycle: Lifecycle) -> Self {
        let mut client = self.clone();
        client.incarnation.lifecycle = lifecycle;
        client
    }

    /// Asks for the agent's health. Wrenn's agent of the Firecracker era takes this for the
    /// end of a snapshot: never between [`prepare_snapshot`](Self::prepare_snapshot) and the
    /// stop of the vCPUs.
    ///
    /// # Errors
    /// [`ClientError::Status`] for all but 200 and 204.
    pub fn health(&self, deadline: Deadline) -> Result<Agent, ClientError> {
        let response = self.get(HEALTH, Self::HEALTH, deadline)?;
        let family =
            Family::of_health(response.status).ok_or_else(|| unexpected(HEALTH, &response))?;
        let version = named_version(&response);
        let version = version.or_else(|| reply::health_version(&response.body));
        Ok(Agent { family, version })
    }

    /// The agent's version, as far as `/health` tells it: Wrenn's does. E2B's comes with
    /// [`Acknowledged`].
    ///
    /// # Errors
    /// As [`health`](Self::health).
    pub fn version(&self, deadline: Deadline) -> Result<Option<GuestText>, ClientError> {
        Ok(self.health(deadline)?.version)
    }

    /// Finds out which dialect the agent speaks, with two requests at most.
    ///
    /// # Errors
    /// As [`health`](Self::health) and [`preload_status`](Self::preload_status).
    pub fn dialect(&self, deadline: Deadline) -> Result<Dialect, ClientError> {
        let family = self.health(deadline)?.family;
        let has_preload = match family {
            Family::E2b => false,
            Family::Wrenn => match self.preload_status(deadline) {
                Ok(_) => true,
                Err(ClientError::NoPreload { .. }) => false,
                Err(error) => return Err(error),
            },
        };
        Ok(Dialect::new(family, has_preload))
    }

    /// Tells the agent who it is now, and what time it is. Everything that trusts the state
    /// of a restored guest comes after this.
    ///
    /// Repeated with the same lifecycle id and a fresh timestamp: an attempt whose answer was
    /// lost may have used up its timestamp without having been applied to the end.
    ///
    /// # Errors
    /// [`ClientError::Status`] for all but 204; [`ClientError::OtherLife`] where the request
    /// is not for this client's life.
    pub fn init(&self, init: &Init, deadline: Deadline) -> Result<Acknowledged, ClientError> {
        let mut call = self.begin_init(init, None, deadline, TOKENS)?;
        self.drive(&mut call)?
    }

    /// [`init`](Self::init) for a guest that may never have been given an id: one captured
    /// right after its cold boot, or by another tool.
    ///
    /// The agent only records the first id it ever sees: no reset of the preload, no new
    /// port forwarding, no step of the clock. So it is sent two, the first with the access
    /// token and nothing else.
    ///
    /// # Errors
    /// As [`init`](Self::init).
    pub fn init_twice(&self, init: &Init, deadline: Deadline) -> Result<Acknowledged, ClientError> {
        let first = Init {
            access_token: init.access_token.clone(),
            ..Init::new()
        };
        self.reborn(first.lifecycle).init(&first, deadline)?;
        self.init(init, deadline)
    }

    /// [`init`](Self::init) as a state machine with one token. The first attempt goes over
    /// `kept`, the connection that won the readiness probes, if there is one.
    ///
    /// # Errors
    /// [`ClientError::OtherLife`], [`ClientError::Init`].
    pub fn begin_init(
        &self,
        init: &Init,
        kept: Option<Stream>,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Result<InitCall, ClientError> {
        let (asked, own) = (init.lifecycle, self.incarnation.lifecycle);
        if asked != own {
            return Err(ClientError::OtherLife { asked, own });
        }
        let message = Message::Init {
            init: Box::new(init.clone()),
            template: self.request(Method::Post, INIT),
            clock: Arc::clone(&self.clock),
        };
        let call = self.call(message, Self::INIT, deadline, tokens);
        Ok(InitCall {
            call: call.hurried(kept),
            lifecycle: asked,
        })
    }

    /// Whether the agent really applied an `/init`, judged by `/envs`.
    ///
    /// Open in Wrenn's agents, behind the token in E2B's. Where the sandbox id counts and the
    /// agent is not of Wrenn's Cloud Hypervisor era, see [`Init::identity_as_env`].
    ///
    /// # Errors
    /// [`ClientError::Status`] for all but 200.
    pub fn verify_applied(&self, init: &Init, deadline: Deadline) -> Result<Applied, ClientError> {
        let id = init.sandbox_id.as_deref().filter(|id| !id.is_empty());
        let own = init.env.iter();
        let mut expected: BTreeMap<_, _> = own.map(|(k, v)| (k.as_str(), v.as_str())).collect();
        if let Some(id) = id {
            expected.insert(SANDBOX_ID_ENV, id);
        }
        if expected.is_empty() {
            return Ok(Applied::NothingToTell);
        }
        let found = self.envs(deadline)?;
        for (name, value) in expected {
            let there = found.get(name);
            if there.is_none_or(|there| there != value) {
                return Ok(Applied::No {
                    name: name.to_owned(),
                    found: there.map(GuestText::new),
                });
            }
        }
        Ok(Applied::Yes)
    }

    /// Asks where the memory preload stands. Before this life's `/init` was acknowledged the
    /// answer is about the captured life and means nothing.
    ///
    /// # Errors
    /// [`ClientError::NoPreload`] for 404 and 415.
    pub fn preload_status(&self, deadline: Deadline) -> Result<PreloadStatus, ClientError> {
        let response = self.get(PRELOAD, Self::PRELOAD_STATUS, deadline)?;
        preload_reply(&response)
    }

    /// Starts the memory preload, after this life's `/init` and never beside it. Asks first,
    /// since agents without a preload answer a GET more clearly; a walk that runs or has
    /// ended is only reported.
    ///
    /// # Errors
    /// [`ClientError::NoPreload`] for 404 and 415.
    pub fn start_preload(&self, deadline: Deadline) -> Result<PreloadStatus, ClientError> {
        self.preload_status(deadline)?;
        let request = self.request(Method::Post, PRELOAD);
        let response = self.exchange(&request, Self::PRELOAD_START, deadline)?;
        preload_reply(&response)
    }

    /// Makes the guest write back, drop its caches and trim, as far as 5 s and 1 s per GiB of
    /// `ram` allow. Best effort: on an error the snapshot may go on, and what was begun goes
    /// on in the guest.
    ///
    /// Must be followed by the end of the VM or by an `/init` with a new lifecycle id:
    /// nothing else starts the guest's port forwarding again.
    ///
    /// # Errors
    /// [`ClientError::Status`] for all but 204 and 200; E2B's agent answers 404.
    pub fn prepare_snapshot(&self, ram: Bytes, deadline: Deadline) -> Result<(), ClientError> {
        let seconds = ram.gib_rounded_up().saturating_add(5);
        let patience = Patience::once(seconds);
        let request = self.request(Method::Post, PREPARE);
        let response = self.exchange(&request, patience, deadline)?;
        expect(&[204, 200], PREPARE, response).map(drop)
    }

    /// The guest's load. In the first second after a restore the processor's share is that of
    /// the captured life.
    ///
    /// # Errors
    /// [`ClientError::Status`] for all but 200.
    pub fn metrics(&self, deadline: Deadline) -> Result<Metrics, ClientError> {
        self.read(METRICS, Self::METRICS, deadline, reply::metrics)
    }

    /// How busy the guest is; Wrenn's agent of the Cloud Hypervisor era only.
    ///
    /// # Errors
    /// [`ClientError::Status`] for all but 200.
    pub fn activity(&self, deadline: Deadline) -> Result<Activity, ClientError> {
        self.read(ACTIVITY, Self::METRICS, deadline, reply::activity)
    }

    /// The variables that the agent gives to what it starts, as the guest tells them.
    ///
    /// # Errors
    /// [`ClientError::Status`] for all but 200.
    pub fn envs(&self, deadline: Deadline) -> Result<BTreeMap<String, String>, ClientError> {
        self.read(ENVS, Self::ENVS, deadline, reply::envs)
    }

    fn read<T>(
        &self,
        path: &'static str,
        patience: Patience,
        deadline: Deadline,
        parse: impl Fn(&[u8]) -> Result<T, ReplyError>,
    ) -> Result<T, ClientError> {
        let response = self.get(path, patience, deadline)?;
        let response = expect(&[200], path, response)?;
        parse(&response.body).map_err(|source| ClientError::Reply { path, source })
    }

    /// Asks for anything else: agents may have words of their own. The answer is whatever
    /// it is, with any status, within the bounds that a guest is held to.
    ///
    /// # Errors
    /// [`ClientError::NoAnswer`], [`ClientError::Garbled`], [`ClientError::Request`].
    pub fn get_other(&self, path: &str, deadline: Deadline) -> Result<Response, ClientError> {
        self.other(Method::Get, path, deadline)
    }

    /// Asks for anything else by any method, without a body, and returns the answer whatever
    /// its status. It may be sent more than once.
    ///
    /// # Errors
    /// As [`get_other`](Self::get_other).
    pub fn other(
        &self,
        method: Method,
        path: &str,
        deadline: Deadline,
    ) -> Result<Response, ClientError> {
        let request = self.request(method, path);
        self.exchange(&request, Self::ENVS, deadline)
    }

    fn get(
        &self,
        path: &'static str,
        patience: Patience,
        deadline: Deadline,
    ) -> Result<Response, ClientError> {
        let request = self.request(Method::Get, path);
        self.exchange(&request, patience, deadline)
    }

    fn exchange(
        &self,
        request: &Request,
        patience: Patience,
        deadline: Deadline,
    ) -> Result<Response, ClientError> {
        let request = request.encode().map_err(ClientError::Request)?;
        let mut call = self.call(Message::Fixed(request), patience, deadline, TOKENS);
        let answered = self.drive(&mut call)?;
        Ok(answered?.response)
    }

    fn drive<M: Interruptible>(&self, machine: &mut M) -> Result<M::Output, ClientError> {
        let vmm = self.options.vmm.as_ref().map(|pidfd| pidfd.as_fd());
        drive_while_alive(machine, vmm).map_err(ClientError::Poll)
    }

    fn request(&self, method: Method, path: &str) -> Request {
        let mut request = Request::new(method, path).closing();
        request.host = self.target.to_string();
        match &self.options.token {
            Some(token) if path != HEALTH => request.header("X-Access-Token", token.secret()),
            _ => request,
        }
    }

    fn call(
        &self,
        message: Message,
        patience: Patience,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Call {
        let sockets = Arc::clone(&self.options.sockets);
        Call::new(self.target, sockets, message, patience, deadline, tokens)
    }

    /// One request to `/memory/preload`, a single attempt.
    pub(super) fn begin_preload(
        &self,
        method: Method,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Result<Call, ClientError> {
        let request = self.request(method, PRELOAD).encode();
        let message = Message::Fixed(request.map_err(ClientError::Request)?);
        Ok(self.call(message, Self::PRELOAD_STATUS, deadline, tokens))
    }

    /// Drives a machine that is longer than one request, as long as the VMM lives.
    pub(super) fn drive_long<M: Interruptible>(&self, machine: &mut M) -> io::Result<M::Output> {
        drive_while_alive(
            machine,
            self.options.vmm.as_ref().map(|pidfd| pidfd.as_fd()),
        )
    }
}

/// `/init` under way: a [`Machine`] with one token.
#[derive(Debug)]
pub struct InitCall {
    call: Call,
    lifecycle: Lifecycle,
}

impl InitCall {
    /// The life that is to begin.
    #[must_use]
    pub const fn lifecycle(&self) -> Lifecycle {
        self.lifecycle
    }

    fn acknowledged(&self, answered: Answered) -> Result<Acknowledged, ClientError> {
        let response = expect(&[204], INIT, answered.response)?;
        Ok(Acknowledged {
            lifecycle: self.lifecycle,
            at: answered.at,
            attempts: answered.attempts,
            version: named_version(&response),
        })
    }
}

impl Machine for InitCall {
    type Output = Result<Acknowledged, ClientError>;

    fn on_event(&mut self, registry: &Registry, event: &Event) {
        self.call.on_event(registry, event);
    }

    fn advance(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Self::Output> {
        let answered = self.call.advance(registry, now);
        answered.map_break(|answered| self.acknowledged(*answered?))
    }

    fn wake_at(&self) -> Option<Instant> {
        self.call.wake_at()
    }
}

impl Interruptible for InitCall {
    fn interrupt(&mut self, why: Interrupt) {
        self.call.interrupt(why);
    }
}

pub(super) fn preload_reply(response: &Response) -> Result<PreloadStatus, ClientError> {
    match response.status {
        200 => reply::preload_status(&response.body).map_err(|source| ClientError::Reply {
            path: PRELOAD,
            source,
        }),
        status @ (404 | 415) => Err(ClientError::NoPreload { status }),
        _ => Err(unexpected(PRELOAD, response)),
    }
}

fn named_version(response: &Response) -> Option<GuestText> {
    response.headers.get("X-Envd-Version").map(GuestText::new)
}

fn expect(
    statuses: &[u16],
    path: &'static str,
    response: Response,
) -> Result<Response, ClientError> {
    if statuses.contains(&response.status) {
        Ok(response)
    } else {
        Err(unexpected(path, &response))
    }
}

fn unexpected(path: &'static str, response: &Response) -> ClientError {
    ClientError::Status {
        path,
        status: response.status,
        text: GuestText::new(&response.body),
    }
}
