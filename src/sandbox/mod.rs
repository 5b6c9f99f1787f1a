//! Sandboxes: what they are, what is done with them, what became of them.
//!
//! ```text
//!   launch ─┐                         ┌─► pause ────► resume ─► …
//!           ├─► making ─► (restore) ──┼─► snapshot: a new template, it goes on
//!   resume ─┘   slot, disk, journal   └─► destroy
//! ```
//!
//! A sandbox is a directory with a journal and a lock ([`journal`], [`state`]). Every
//! operation takes the lock, reads the journal, and writes down what it makes before it makes
//! it; nothing that matters is only in the memory of a process. So operations on one sandbox
//! may come from many processes, one at a time, and whoever dies in the middle of one leaves
//! behind what [`recover`] needs to put things right.

mod admission;
mod context;
mod destroy;
mod dir;
mod error;
mod expected;
mod hold;
pub mod journal;
mod kept;
mod launch;
mod live;
mod making;
mod pause;
mod recorder;
mod recover;
mod resume;
mod snapshot;
pub mod state;
mod untouched;
mod vmm_log;
mod write_out;

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use rewake_sys::process::Process;

pub use admission::Limits;
pub(crate) use context::Context;
pub use context::HostConfig;
pub(crate) use dir::{SandboxDir, list};
pub use error::{Cause, Error, Full, Operation, Remains};
use journal::{Journal, Story};
pub use launch::LaunchOptions;
pub(crate) use launch::{Source, prepare as prepare_launch};
pub(crate) use making::Making;
pub use pause::PauseOptions;
pub use recover::Census;
pub(crate) use recover::recover;
pub use resume::ResumeOptions;
pub(crate) use resume::{expect, prepare as prepare_resume};
use state::{State, Status};
pub use untouched::Print;

use crate::deadline::Deadline;
use crate::envd::client::Client as Agent;
use crate::ids::{SandboxId, SlotIndex, TemplateId};
use crate::resource::disk::{DiskInfo, DiskWatch, Progress};
use crate::template::{Template, TemplateStore};
use crate::timeline::Timeline;
use crate::vmm::api::Client as Api;

/// For the first word about the memory preload, which nobody waits for.
const PRELOAD_BUDGET: Duration = Duration::from_secs(1);

/// A sandbox: a handle on what its journal tells. Cheap to clone; used from any thread.
///
/// Dropping it changes nothing: a sandbox lives until it is destroyed, whatever becomes of
/// the program that launched it.
#[derive(Clone)]
pub struct Sandbox {
    ctx: Arc<Context>,
    id: SandboxId,
    slot: Option<SlotIndex>,
    timeline: Timeline,
}

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sandbox")
            .field("id", &self.id)
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}

impl Sandbox {
    pub(crate) fn new(
        ctx: &Arc<Context>,
        id: &SandboxId,
        status: &Status,
        timeline: Timeline,
    ) -> Self {
        Self {
            ctx: Arc::clone(ctx),
            id: id.clone(),
            slot: status.slot,
            timeline,
        }
    }

    /// Takes up a sandbox by its id.
    pub(crate) fn open(ctx: &Arc<Context>, id: &SandboxId) -> Result<Self, Error> {
        let story = story_of(ctx, id)?;
        Ok(Self::new(ctx, id, &story.status, Timeline::start()))
    }

    /// Its id.
    #[must_use]
    pub const fn id(&self) -> &SandboxId {
        &self.id
    }

    /// The phases of the operation that this handle came from, or of the last one that was
    /// done with it.
    #[must_use]
    pub const fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// The address under which the host reaches its guest; 0.0.0.0 where it has no network
    /// slot, as one that is lost.
    #[must_use]
    pub fn host_ip(&self) -> Ipv4Addr {
        let config = self.ctx.net.config();
        self.slot.map_or(Ipv4Addr::UNSPECIFIED, |index| {
            config.slot(index).host_address
        })
    }

    /// Its network slot.
    #[must_use]
    pub const fn slot(&self) -> Option<SlotIndex> {
        self.slot
    }

    /// What its journal tells. Reads one small file.
    ///
    /// # Errors
    /// [`Cause::Unknown`] once it is destroyed, and what reading says.
    pub fn story(&self) -> Result<Story, Error> {
        story_of(&self.ctx, &self.id)
    }

    /// Its state, with a VM that has ended counted as what it is: lost.
    ///
    /// # Errors
    /// As [`Sandbox::story`].
    pub fn state(&self) -> Result<State, Error> {
        let status = self.story()?.status;
        let ended = |status: &Status| {
            let vm = status.vm_now();
            vm.is_none_or(|vm| live::open(vm.process).is_err())
        };
        if status.state == State::Running && ended(&status) {
            return Ok(State::Lost);
        }
        Ok(status.state)
    }

    /// Whether an operation on it was begun and nobody is at work with it any more: its maker
    /// died. [`Host::recover`](crate::host::Host::recover) puts that right.
    #[must_use]
    pub fn is_stranded(&self) -> bool {
        let dir = self.dir();
        let begun = || {
            let passing = |story: Story| story.status.state.is_passing();
            dir.is_doomed() || self.story().is_ok_and(passing)
        };
        if !begun() {
            return false;
        }
        // Asked again with the lock in hand: it may just have come to its end.
        let lock = dir.try_lock().ok().flatten();
        lock.is_some_and(|_lock| begun())
    }

    /// Its snapshot directories. The one that counts, where it is paused, bears the number of
    /// its generation.
    #[must_use]
    pub fn snapshots(&self) -> Vec<std::path::PathBuf> {
        let mut snapshots = self.dir().snapshots();
        snapshots.sort_unstable();
        snapshots
    }

    /// The agent of the life that it lives now. A client of an earlier life answers with
    /// errors once the sandbox has been paused: take a new one.
    ///
    /// # Errors
    /// [`Cause::State`] where it does not run, [`Cause::Ended`] where its VM has ended.
    pub fn agent(&self) -> Result<Agent, Error> {
        self.live().map(|live| live.agent)
    }

    /// Cloud Hypervisor's API for it. What is done over it behind rewake's back is the
    /// caller's own affair.
    ///
    /// # Errors
    /// As [`Sandbox::agent`].
    pub fn api(&self) -> Result<Api, Error> {
        self.live().map(|live| live.api)
    }

    /// The process of its VM: readable (as a pidfd in a poll) once the VM has ended.
    ///
    /// # Errors
    /// As [`Sandbox::agent`].
    pub fn process(&self) -> Result<Process, Error> {
        self.live().map(|live| live.process)
    }

    /// How its disk fares; `None` where it has none of its own.
    ///
    /// # Errors
    /// [`Cause::DiskFile`].
    pub fn disk(&self) -> Result<Option<DiskInfo>, Error> {
        if !self.story()?.identity.disk {
            return Ok(None);
        }
        let dir = self.dir().disk();
        let info = self.ctx.disks.inspect(&self.id, &dir);
        info.map(Some).map_err(|source| {
            let what = "look at";
            Error::new(
                &self.id,
                Operation::Inspect,
                Cause::DiskFile { what, source },
            )
        })
    }

    /// Has a watch report how its disk fares from now on: a store under pressure before it is
    /// full, one that is full, one that is lost. Returns whether it has a disk of its own. A
    /// disk is watched until it is detached: again after each resume.
    ///
    /// # Errors
    /// [`Cause::DiskFile`].
    pub fn watch_disk(&self, watch: &mut DiskWatch) -> Result<bool, Error> {
        if !self.story()?.identity.disk {
            return Ok(false);
        }
        let added = watch.add(&self.id, &self.dir().disk());
        added.map(|()| true).map_err(|source| {
            let what = "watch";
            Error::new(
                &self.id,
                Operation::Inspect,
                Cause::DiskFile { what, source },
            )
        })
    }

    /// Freezes it on disk and destroys its VM. Blocks until it counts as safe.
    ///
    /// # Errors
    /// [`Error`]. It runs on then, unless the cause says otherwise ([`Cause::Ended`],
    /// [`Cause::Stuck`], [`Cause::LeftOver`]).
    pub fn pause(&mut self) -> Result<(), Error> {
        self.pause_with(PauseOptions::default())
    }

    /// The same with options.
    ///
    /// # Errors
    /// As [`Sandbox::pause`].
    pub fn pause_with(&mut self, options: PauseOptions) -> Result<(), Error> {
        self.timeline = pause::pause(&self.ctx, &self.id, options)?;
        Ok(())
    }

    /// Makes a template of it, which never replaces another. It goes on.
    ///
    /// # Errors
    /// [`Error`]. It runs on then, as after [`Sandbox::pause`].
    pub(crate) fn snapshot_to(
        &mut self,
        store: &TemplateStore,
        name: &TemplateId,
        deadline: Deadline,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Template, Error> {
        let (template, timeline) =
            snapshot::snapshot(&self.ctx, store, &self.id, name, deadline, progress)?;
        self.timeline = timeline;
        Ok(template)
    }

    /// Makes the template `name` of it, which never replaces another. It goes on.
    ///
    /// Its vCPUs stand still while memory and disk are copied, which takes as long as the
    /// file system needs.
    ///
    /// # Errors
    /// [`Error`]. It runs on then, unless the cause says otherwise ([`Cause::Ended`],
    /// [`Cause::Stuck`]).
    pub fn snapshot(&mut self, name: &str) -> Result<Template, Error> {
        let failed = |cause| Error::new(&self.id, Operation::Snapshot, cause);
        let name = TemplateId::new(name).map_err(|error| failed(Cause::Name(error)))?;
        let config = &self.ctx.config;
        let store = TemplateStore::open(&config.root, config.faults.clone());
        let store = store.map_err(|error| failed(Cause::Template(error)))?;
        self.snapshot_to(&store, &name, Deadline::NEVER, &mut |_| {})
    }

    /// Removes it and all that it has, whatever state it is in. Repeating it is harmless. An
    /// operation under way is ended.
    ///
    /// # Errors
    /// [`Error`] with what could not be removed; the call may be repeated.
    pub fn destroy(self) -> Result<(), Error> {
        destroy::destroy(&self.ctx, &self.id, Deadline::NEVER).map(drop)
    }

    /// What Cloud Hypervisor has logged and nobody has read yet, added to what was saved
    /// before. Its pipe holds the last part of it only.
    ///
    /// # Errors
    /// [`Cause::File`].
    pub fn log(&self) -> Result<Vec<u8>, Error> {
        let status = self.story()?.status;
        let pid = status.vm_now().map(|vm| vm.process.pid);
        vmm_log::read(&self.dir().vmm_log(), pid)
            .map_err(|cause| Error::new(&self.id, Operation::Inspect, cause))
    }

    fn live(&self) -> Result<live::Live, Error> {
        let failed = |cause| Error::new(&self.id, Operation::Inspect, cause);
        let status = self.story()?.status;
        if status.vm.is_none() {
            return Err(failed(Cause::State {
                state: status.state,
                needs: State::Running,
            }));
        }
        live::Live::of(&self.ctx, &self.id, &status).map_err(failed)
    }

    fn dir(&self) -> SandboxDir {
        SandboxDir::of(&self.ctx.config.root, &self.id)
    }

    /// Tells the guest to fetch all its memory, without waiting for it. Where that is not
    /// heard, the next pause says it again.
    fn begin_preload(&mut self, status: &Status, deadline: Deadline) {
        let started = live::Live::of(&self.ctx, &self.id, status).map(|live| {
            let deadline = deadline.within(PRELOAD_BUDGET);
            live.agent.start_preload(deadline)
        });
        match started {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => self
                .timeline
                .note(format!("The memory preload is not under way: {error}")),
            Err(error) => self
                .timeline
                .note(format!("The memory preload is not under way: {error}")),
        }
    }
}

/// The VM of a sandbox has ended: notes that it is lost, where nobody asked for that. Whoever
/// is at work with it finds out by himself.
pub(crate) fn note_end(ctx: &Arc<Context>, id: &SandboxId) -> bool {
    let Ok(hold) = hold::Hold::take(ctx, id, Operation::Inspect) else {
        return false;
    };
    let status = hold.status();
    let ended = || matches!(live::Live::of(ctx, id, &status), Err(Cause::Ended));
    if status.state != State::Running || !ended() {
        return false;
    }
    for remains in hold.lose("its Cloud Hypervisor has ended") {
        log::warn!("Left over: {remains}");
    }
    true
}

/// Why a watch cannot be kept.
pub(crate) fn cannot_watch(id: Option<&SandboxId>, source: std::io::Error) -> Error {
    let (what, path) = ("watch the processes in", "/proc".into());
    let cause = Cause::File { what, path, source };
    match id {
        Some(id) => Error::new(id, Operation::Inspect, cause),
        None => Error::of_host(Operation::Inspect, cause),
    }
}

fn story_of(ctx: &Context, id: &SandboxId) -> Result<Story, Error> {
    let dir = SandboxDir::of(&ctx.config.root, id);
    Journal::story_of(&dir.journal()).map_err(|error| {
        let cause = if hold::is_gone(&error) {
            Cause::Unknown
        } else {
            error.into()
        };
        Error::new(id, Operation::Inspect, cause)
    })
}

/// Removes a sandbox by its id.
pub(crate) fn destroy(
    ctx: &Arc<Context>,
    id: &SandboxId,
    deadline: Deadline,
) -> Result<Timeline, Error> {
    destroy::destroy(ctx, id, deadline)
}
