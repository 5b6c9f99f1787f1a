//! Carrying out the memory preload: [`Preload`] decides, a [`Client`] asks.

use std::io;
use std::ops::ControlFlow;
use std::time::Instant;

use mio::Registry;
use mio::event::Event;

use super::call::{Answered, Call};
use super::client::{Client, ClientError, InitCall, preload_reply};
use super::init::{Init, Lifecycle};
use super::preload::{Answer, Cause, Preload, State, Step};
use super::watch::{Interrupt, Interruptible};
use crate::deadline::Deadline;
use crate::wire::http::Method;
use crate::wire::reactor::{Machine, TokenRange, earliest};

/// Why the guest's memory is not known to be all there. A snapshot taken now would read back
/// as zeros in places, one generation later.
#[derive(Debug, thiserror::Error)]
pub enum MaterialiseError {
    /// Waiting longer would not help.
    #[error("The guest's memory is not all there ({state})")]
    NotSafe {
        /// Where the preload stands.
        state: State,
        /// Why, where something led there.
        #[source]
        cause: Option<Cause>,
    },
    /// `/init` failed, and without it the preload must not start.
    #[error("The guest could not be given a new life")]
    Init(#[source] ClientError),
    /// The caller's deadline passed. The walk goes on in the guest.
    #[error("The guest's memory was not all there in time ({state}, {pages} pages)")]
    Deadline {
        /// Where the preload stands.
        state: State,
        /// Pages touched so far.
        pages: u64,
    },
    /// The wait was ended from outside.
    #[error("The wait for the guest's memory was ended")]
    Interrupted(#[source] Interrupt),
    /// A request cannot be made.
    #[error("Cannot ask the guest about its memory")]
    Client(#[source] ClientError),
    /// The event loop failed.
    #[error("Cannot wait for the guest's memory")]
    Poll(#[source] io::Error),
}

/// The preload of one VM on its way to [`State::Materialised`]: a [`Machine`] with one token.
#[derive(Debug)]
pub struct Materialise {
    preload: Preload,
    client: Client,
    /// What a new life begins with. Without it none begins.
    init: Option<Init>,
    deadline: Deadline,
    tokens: TokenRange,
    doing: Doing,
    wait_until: Option<Instant>,
    interrupt: Option<Interrupt>,
}

#[derive(Debug)]
enum Doing {
    Nothing,
    Init(Box<InitCall>),
    Asking(Box<Call>, Lifecycle),
}

impl Materialise {
    /// Nothing is sent before the first [`advance`](Machine::advance).
    ///
    /// With `init` a guest that needs a new life is given one: the first with the lifecycle
    /// of `init` (which must be the client's), a spoiled one's successor with a fresh id.
    #[must_use]
    pub fn new(
        preload: Preload,
        client: Client,
        init: Option<Init>,
        deadline: Deadline,
        tokens: TokenRange,
    ) -> Self {
        Self {
            preload,
            client,
            init,
            deadline,
            tokens,
            doing: Doing::Nothing,
            wait_until: None,
            interrupt: None,
        }
    }

    /// What is known so far.
    #[must_use]
    pub const fn preload(&self) -> &Preload {
        &self.preload
    }

    /// What is known now, and the client of the life that the guest is in now: another one
    /// than at the start where a spoiled life was renewed.
    #[must_use]
    pub fn into_parts(self) -> (Preload, Client) {
        (self.preload, self.client)
    }

    /// Finishes what is under way, or lets time pass. `Break`: nothing more to wait for.
    fn proceed(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Pending> {
        match &mut self.doing {
            Doing::Nothing => {}
            Doing::Init(call) => match call.advance(registry, now) {
                ControlFlow::Continue(()) => return ControlFlow::Break(Pending::Wait),
                ControlFlow::Break(Ok(acknowledged)) => {
                    self.doing = Doing::Nothing;
                    self.preload.init_acknowledged(acknowledged.lifecycle);
                }
                ControlFlow::Break(Err(error)) => {
                    self.doing = Doing::Nothing;
                    return ControlFlow::Break(Pending::Failed(MaterialiseError::Init(error)));
                }
            },
            Doing::Asking(call, lifecycle) => match call.advance(registry, now) {
                ControlFlow::Continue(()) => return ControlFlow::Break(Pending::Wait),
                ControlFlow::Break(result) => {
                    let lifecycle = *lifecycle;
                    self.doing = Doing::Nothing;
                    let answer = judge(result);
                    log::debug!("Memory preload: {answer:?}");
                    self.preload.answered(now, lifecycle, answer);
                }
            },
        }
        ControlFlow::Continue(())
    }

    /// Begins the next thing to do.
    fn begin(&mut self, now: Instant) -> ControlFlow<Result<(), MaterialiseError>> {
        self.wait_until = None;
        let (method, at) = match self.preload.step(now) {
            Step::Rest => return ControlFlow::Break(Ok(())),
            Step::Refuse => return ControlFlow::Break(Err(self.not_safe())),
            _ if self.deadline.has_passed() => {
                let (state, pages) = (self.preload.state(), self.preload.pages());
                return ControlFlow::Break(Err(MaterialiseError::Deadline { state, pages }));
            }
            Step::Init => return self.begin_init(),
            Step::Ask(at) => (Method::Get, at),
            Step::Start(at) => (Method::Post, at),
        };
        if now < at {
            self.wait_until = Some(at);
            return ControlFlow::Continue(());
        }
        let lifecycle = self.client.incarnation().lifecycle;
        match self
            .client
            .begin_preload(method, self.deadline, self.tokens)
        {
            Ok(call) => self.doing = Doing::Asking(Box::new(call), lifecycle),
            Err(error) => return ControlFlow::Break(Err(MaterialiseError::Client(error))),
        }
        ControlFlow::Continue(())
    }

    fn begin_init(&mut self) -> ControlFlow<Result<(), MaterialiseError>> {
        let Some(init) = &mut self.init else {
            return ControlFlow::Break(Err(self.not_safe()));
        };
        if self.preload.state() == State::Spoiled {
            *init = init.renewed();
            self.client = self.client.reborn(init.lifecycle);
        }
        let call = self
            .client
            .begin_init(init, None, self.deadline, self.tokens);
        match call {
            Ok(call) => self.doing = Doing::Init(Box::new(call)),
            Err(error) => return ControlFlow::Break(Err(MaterialiseError::Init(error))),
        }
        ControlFlow::Continue(())
    }

    fn not_safe(&self) -> MaterialiseError {
        MaterialiseError::NotSafe {
            state: self.preload.state(),
            cause: self.preload.cause().cloned(),
        }
    }
}

enum Pending {
    Wait,
    Failed(MaterialiseError),
}

/// What one request to `/memory/preload` says to the state machine.
fn judge(result: Result<Box<Answered>, ClientError>) -> Answer {
    let answered = match result {
        Ok(answered) => answered,
        Err(ClientError::Garbled(_)) => return Answer::Garbled,
        Err(_) => return Answer::Silent,
    };
    match (answered.response.status, preload_reply(&answered.response)) {
        (_, Ok(status)) => Answer::Status(status),
        (200, Err(_)) => Answer::Garbled,
        (502..=504, Err(_)) => Answer::Silent,
        (status, Err(_)) => Answer::Refused(status),
    }
}

impl Machine for Materialise {
    type Output = Result<(), MaterialiseError>;

    fn on_event(&mut self, registry: &Registry, event: &Event) {
        match &mut self.doing {
            Doing::Nothing => {}
            Doing::Init(call) => call.on_event(registry, event),
            Doing::Asking(call, _) => call.on_event(registry, event),
        }
    }

    fn advance(&mut self, registry: &Registry, now: Instant) -> ControlFlow<Self::Output> {
        if let Some(why) = self.interrupt {
            self.doing = Doing::Nothing;
            return ControlFlow::Break(Err(MaterialiseError::Interrupted(why)));
        }
        loop {
            match self.proceed(registry, now) {
                ControlFlow::Continue(()) => {}
                ControlFlow::Break(Pending::Failed(error)) => {
                    return ControlFlow::Break(Err(error));
                }
                ControlFlow::Break(Pending::Wait) => return ControlFlow::Continue(()),
            }
            self.begin(now)?;
            if self.wait_until.is_some() {
                return ControlFlow::Continue(());
            }
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let doing = match &self.doing {
            Doing::Nothing => None,
            Doing::Init(call) => call.wake_at(),
            Doing::Asking(call, _) => call.wake_at(),
        };
        earliest([self.deadline.instant(), self.wait_until, doing])
    }
}

impl Interruptible for Materialise {
    fn interrupt(&mut self, why: Interrupt) {
        if why == Interrupt::VmmExited {
            self.preload.vmm_exited();
        }
        self.interrupt.get_or_insert(why);
    }
}

/// Drives the preload until all memory is there. Blocks, until the deadline or the preload's
/// own limits, and no longer than the client's VMM lives.
///
/// `preload` and `client` are brought up to date, also on an error.
///
/// # Errors
/// [`MaterialiseError`].
pub fn materialise(
    preload: &mut Preload,
    client: &mut Client,
    init: Option<&Init>,
    deadline: Deadline,
) -> Result<(), MaterialiseError> {
    let tokens = TokenRange::new(0, 1);
    let begun = preload.clone();
    let mut machine = Materialise::new(begun, client.clone(), init.cloned(), deadline, tokens);
    let driven = client.drive_long(&mut machine);
    (*preload, *client) = machine.into_parts();
    driven.map_err(MaterialiseError::Poll)?
}

/// Whether a snapshot is safe now, on the word of the guest itself.
///
/// A cold-booted VM is asked nothing. For others "the wait has ended" is not "done": somebody
/// else's `/init` may have reset the guest since. So it is asked again; a walk that runs is
/// waited for, one that was never started, or was forgotten, is started. A life that was
/// spoiled is not renewed here.
///
/// # Errors
/// [`MaterialiseError`]: do not take the snapshot; the sandbox stays running.
pub fn verdict_before_snapshot(
    preload: &mut Preload,
    client: &mut Client,
    deadline: Deadline,
) -> Result<(), MaterialiseError> {
    preload.doubt();
    match preload.state() {
        State::ColdBoot => Ok(()),
        State::Armed | State::Running | State::Materialised => {
            materialise(preload, client, None, deadline)
        }
        state @ (State::NeedInit | State::Spoiled | State::Unsupported | State::Lost) => {
            let cause = preload.cause().cloned();
            Err(MaterialiseError::NotSafe { state, cause })
        }
    }
}
