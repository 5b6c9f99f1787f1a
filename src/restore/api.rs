//! The API side of a restore: `vm.restore`, the version, `vm.resume` where the version needs
//! it, and the balloon, one after the other on one connection.

use std::mem;
use std::ops::ControlFlow;
use std::time::Instant;

use mio::Registry;
use mio::event::Event;

use crate::deadline::Deadline;
use crate::timeline::{Phase, Timeline};
use crate::vmm::api::{Answer, ApiError, Call, Features, Ping, Resize, RestoreConfig, Version};
use crate::wire::conn::{ConnError, Exchange, Finished, Peer, Stream};
use crate::wire::excerpt::excerpt;
use crate::wire::reactor::{Machine, TokenRange};

/// What the API side has to say to the restore.
pub(super) enum ApiDone {
    /// CH has restored the VM, and runs it already where its version knows how.
    Restored,
    /// The vCPUs run.
    Running,
    /// The balloon was told to deflate, or could not be.
    Balloon(Result<(), ApiError>),
    /// A call failed that had to succeed.
    Failed(ApiError),
    /// This CH opens the file of a private mapping for writing. The guest has not run.
    WritesPrivateFiles(Version),
}

enum State {
    Restoring(Call<()>, Exchange),
    Pinging(Call<Ping>, Exchange),
    Resuming(Call<()>, Exchange),
    Deflating(Call<()>, Exchange),
    /// Nothing to wait for. The connection, where it may be used again.
    Quiet(Option<Stream>),
}

/// One keep-alive connection to CH's API, and what is asked on it.
pub(super) struct ApiSide {
    tokens: TokenRange,
    deadline: Deadline,
    state: State,
    version: Version,
    build: String,
    running: bool,
    balloon_tried: bool,
    private_files: bool,
}

impl ApiSide {
    /// Begins with `vm.restore` on a connection that was made before CH was.
    ///
    /// What version CH is shows only when it answers, so the request is made for the newest:
    /// older ones ignore what they do not know, and that is mended once the version is known.
    pub(super) fn restore(
        stream: Stream,
        config: &RestoreConfig,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Result<Self, ApiError> {
        let newest = Version::V53;
        let call = Call::restore(config, 0, newest)?.call;
        let exchange = over(stream, &call, deadline, tokens)?;
        Ok(Self {
            tokens,
            deadline,
            state: State::Restoring(call, exchange),
            version: newest,
            build: String::new(),
            running: false,
            balloon_tried: false,
            private_files: false,
        })
    }

    /// Asks that the guest does not run on a CH that opens private files for writing. All
    /// that do know no `resume` in `vm.restore`, so there is time to ask.
    pub(super) const fn must_leave_private_files_alone(&mut self) {
        self.private_files = true;
    }

    pub(super) const fn version(&self) -> Version {
        self.version
    }

    /// The version with the suffixes of its build, as CH told it.
    pub(super) fn build(&self) -> &str {
        &self.build
    }

    pub(super) fn features(&self) -> Features {
        Features::of(self.version)
    }

    /// Whether the vCPUs run.
    pub(super) const fn is_running(&self) -> bool {
        self.running
    }

    /// Whether no call is under way.
    pub(super) const fn is_quiet(&self) -> bool {
        matches!(self.state, State::Quiet(_))
    }

    pub(super) const fn balloon_was_tried(&self) -> bool {
        self.balloon_tried
    }

    /// Tells the balloon to give back all memory.
    pub(super) fn deflate_balloon(&mut self, deadline: Deadline) -> Result<(), ApiError> {
        self.balloon_tried = true;
        let call = Call::resize(&Resize {
            desired_balloon: Some(0),
            ..Resize::default()
        })?;
        let exchange = self.next(&call, deadline)?;
        self.state = State::Deflating(call, exchange);
        Ok(())
    }

    pub(super) fn on_event(&mut self, registry: &Registry, event: &Event) {
        if let State::Restoring(_, exchange)
        | State::Pinging(_, exchange)
        | State::Resuming(_, exchange)
        | State::Deflating(_, exchange) = &mut self.state
        {
            exchange.on_event(registry, event);
        }
    }

    pub(super) fn wake_at(&self) -> Option<Instant> {
        match &self.state {
            State::Restoring(_, exchange)
            | State::Pinging(_, exchange)
            | State::Resuming(_, exchange)
            | State::Deflating(_, exchange) => exchange.wake_at(),
            State::Quiet(_) => None,
        }
    }

    /// Goes on as far as it can without waiting. `Break` says what was reached; there may be
    /// more to do after it.
    pub(super) fn advance(
        &mut self,
        registry: &Registry,
        now: Instant,
        timeline: &mut Timeline,
    ) -> ControlFlow<ApiDone> {
        macro_rules! finished {
            ($call:expr, $exchange:expr) => {
                match $exchange.advance(registry, now) {
                    ControlFlow::Continue(()) => return ControlFlow::Continue(()),
                    ControlFlow::Break(finished) => read($call, finished),
                }
            };
        }
        ControlFlow::Break(match &mut self.state {
            State::Quiet(_) => return ControlFlow::Continue(()),
            State::Restoring(call, exchange) => {
                let outcome = finished!(call, exchange);
                self.restored(outcome, timeline)
            }
            State::Pinging(call, exchange) => {
                let outcome = finished!(call, exchange);
                self.pinged(outcome)
            }
            State::Resuming(call, exchange) => {
                let outcome = finished!(call, exchange);
                self.resumed(outcome)
            }
            State::Deflating(call, exchange) => {
                let outcome = finished!(call, exchange);
                ApiDone::Balloon(self.keep(outcome))
            }
        })
    }

    fn restored(&mut self, outcome: Read<()>, timeline: &mut Timeline) -> ApiDone {
        if let Err(error) = self.keep(outcome) {
            return ApiDone::Failed(error);
        }
        timeline.mark(Phase::ApiAccepted);
        let call = Call::ping();
        match self.next(&call, self.deadline) {
            Ok(exchange) => {
                self.state = State::Pinging(call, exchange);
                ApiDone::Restored
            }
            Err(error) => ApiDone::Failed(error),
        }
    }

    fn pinged(&mut self, outcome: Read<Ping>) -> ApiDone {
        let ping = match self.keep(outcome) {
            Ok(ping) => ping,
            Err(error) => return ApiDone::Failed(error),
        };
        match ping.parsed_version() {
            Ok(version) => self.version = version,
            Err(_) => {
                let text = excerpt(&ping.version);
                return ApiDone::Failed(ApiError::UnreadableVersion { text });
            }
        }
        self.build = ping.build_version;
        if self.private_files && !self.features().private_zone_is_read_only {
            return ApiDone::WritesPrivateFiles(self.version);
        }
        if self.features().restore_resume {
            self.running = true;
            return ApiDone::Running;
        }
        let call = Call::resume();
        match self.next(&call, self.deadline) {
            Ok(exchange) => {
                self.state = State::Resuming(call, exchange);
                ApiDone::Restored
            }
            Err(error) => ApiDone::Failed(error),
        }
    }

    fn resumed(&mut self, outcome: Read<()>) -> ApiDone {
        match self.keep(outcome) {
            Ok(()) => {
                self.running = true;
                ApiDone::Running
            }
            Err(error) => ApiDone::Failed(error),
        }
    }

    /// Notes that the call is over and keeps its connection.
    fn keep<T>(&mut self, (answer, stream): Read<T>) -> Result<T, ApiError> {
        self.state = State::Quiet(stream);
        answer
    }

    /// The next call on the connection of the last one.
    fn next<T: Answer>(
        &mut self,
        call: &Call<T>,
        deadline: Deadline,
    ) -> Result<Exchange, ApiError> {
        match mem::replace(&mut self.state, State::Quiet(None)) {
            State::Quiet(Some(stream)) => over(stream, call, deadline, self.tokens),
            // CH keeps connections alive after every answer, so this is a broken one.
            _ => Err(ApiError::NoAnswer {
                operation: call.operation(),
                source: ConnError::Spent,
            }),
        }
    }
}

/// An answer, and the connection where it may be used again.
type Read<T> = (Result<T, ApiError>, Option<Stream>);

fn over<T: Answer>(
    stream: Stream,
    call: &Call<T>,
    deadline: Deadline,
    tokens: TokenRange,
) -> Result<Exchange, ApiError> {
    let request = call.encode()?;
    Ok(Exchange::over_stream(
        stream,
        request,
        Peer::VMM,
        deadline,
        tokens,
    ))
}

fn read<T: Answer>(call: &Call<T>, finished: Result<Finished, ConnError>) -> Read<T> {
    match finished {
        Ok(Finished {
            response, stream, ..
        }) => (call.decode(&response), stream),
        Err(source) => {
            let operation = call.operation();
            (Err(ApiError::NoAnswer { operation, source }), None)
        }
    }
}
