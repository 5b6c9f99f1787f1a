//! Pause: a running sandbox is frozen on disk, and its VM destroyed.
//!
//! What can be done beforehand is done while the guest runs. Then its vCPUs stop, Cloud
//! Hypervisor writes into a fresh staging directory, that is checked, completed and given its
//! name; the journal's next line makes it count. Only then the VM is destroyed. Whatever
//! fails before that line leaves a running sandbox, with a new life for its agent where it
//! had prepared itself for the snapshot.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::context::Context;
use super::error::{Cause, Error, Full, Operation, Remains, api, file, guest};
use super::hold::{Hold, UNDO_BUDGET};
use super::kept::{forget_snapshots, hold_slot, keep, keep_slot};
use super::live::Live;
use super::state::{State, Status};
use super::write_out::{punch, sync_disk, write_out};
use crate::deadline::Deadline;
use crate::envd::init::Init;
use crate::envd::materialise::verdict_before_snapshot;
use crate::envd::preload::{Limits, Preload};
use crate::fault::Faults;
use crate::ids::SandboxId;
use crate::plan::MemoryMode;
use crate::snapshot::{
    Durability, Seal, SealError, SealedMemory, install, memory_of, require_space, seal,
};
use crate::timeline::{Phase, Timeline};
use crate::vmm::api::{ApiError, VmState};

/// How long a process may take to be dead whose connection broke.
const DYING: Duration = Duration::from_millis(50);
/// For the question whether the VM is there and runs.
const LOOK_BUDGET: Duration = Duration::from_secs(3);

/// How a sandbox is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PauseOptions {
    /// When it counts as safe; absent: as the host is set up.
    pub durability: Option<Durability>,
    /// Leaves the agent's preparation out: what it had not yet written to its disk is then in
    /// its memory only, which is frozen as well.
    pub without_prepare: bool,
    /// When to give up. [`Deadline::NEVER`]: the host's patience.
    pub deadline: Deadline,
}

impl Default for PauseOptions {
    fn default() -> Self {
        Self {
            durability: None,
            without_prepare: false,
            deadline: Deadline::NEVER,
        }
    }
}

/// Pauses a running sandbox.
pub(crate) fn pause(
    ctx: &Arc<Context>,
    id: &SandboxId,
    options: PauseOptions,
) -> Result<Timeline, Error> {
    let deadline = ctx.deadline(options.deadline);
    let durability = options.durability.unwrap_or(ctx.config.durability);
    let failed = |cause| Error::new(id, Operation::Pause, cause);
    let hold = Hold::take(ctx, id, Operation::Pause)?;
    let running = hold.expect(State::Running).map_err(failed)?;
    let mut freeze = Freeze::begin(&hold, running, Operation::Pause, deadline)?;
    let staging = hold.dir.staging(freeze.status.generation);
    freeze.prepare(Some(&staging), options.without_prepare)?;
    let frozen = hold
        .change(freeze.status.now(State::Pausing))
        .and_then(|()| freeze.stop())
        .and_then(|()| freeze.write(&staging, durability))
        .and_then(|()| commit(&hold, &freeze, &staging, durability));
    match frozen {
        Ok(()) => freeze.timeline.mark(Phase::Committed),
        Err(cause) => return Err(freeze.give_up(cause, Some(&staging))),
    }
    // From here on it is paused, whatever happens.
    let left = release(&hold, &freeze.status);
    freeze.timeline.mark(Phase::Undone);
    if !left.is_empty() {
        return Err(failed(Cause::LeftOver).with_leftovers(left));
    }
    if durability == Durability::Warm {
        write_out(ctx, id, freeze.status.generation);
    }
    Ok(freeze.timeline)
}

/// Gives the snapshot its name and lets it count.
fn commit(
    hold: &Hold,
    freeze: &Freeze<'_>,
    staging: &Path,
    durability: Durability,
) -> Result<(), Cause> {
    let faults = &hold.ctx.config.faults;
    let generation = freeze.status.generation;
    let place = hold.dir.snapshot(generation);
    if durability == Durability::Synced {
        sync_disk(&hold.ctx, &hold.id, &hold.dir)?;
    }
    let installed = install(staging, &place, durability, faults);
    if let Err(error) = installed {
        // It may have its name already; it does not count.
        take_back(&place, staging);
        return Err(Cause::Seal(error));
    }
    let paused = freeze.status.paused(durability == Durability::Synced);
    let written = match durability {
        Durability::Synced => hold.journal.commit(paused),
        Durability::Warm => hold.journal.change(paused),
    };
    written.map_err(|error| {
        // It does not count, so it must not look as if it did.
        take_back(&place, staging);
        error.into()
    })
}

fn take_back(place: &Path, staging: &Path) {
    match std::fs::rename(place, staging) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            log::warn!("{}: {error}", place.display());
        }
        _ => {}
    }
}

/// Destroys the VM of a sandbox that is paused, and removes what only its earlier lives had.
pub(crate) fn release(hold: &Hold, paused: &Status) -> Vec<Remains> {
    super::vmm_log::rescue(hold);
    let slot = hold_slot(hold, paused);
    let mut left = hold.end_vm(Deadline::after(UNDO_BUDGET));
    if !left.is_empty() {
        return left;
    }
    if let Err(cause) = slot.map_or_else(|| keep_slot(hold, paused), keep) {
        log::warn!(
            "Sandbox {}: its slot is not marked as kept: {cause}",
            hold.id
        );
    }
    if let Err(Cause::File { path, source, .. }) = forget_snapshots(hold, Some(paused.generation)) {
        left.push(Remains::File(path, source));
    }
    left
}

/// A running sandbox that is about to be frozen, for a pause or for a template.
pub(crate) struct Freeze<'h> {
    hold: &'h Hold,
    operation: Operation,
    deadline: Deadline,
    pub(crate) status: Status,
    pub(crate) timeline: Timeline,
    live: Live,
    /// The agent has prepared itself, which only a new life undoes.
    prepared: bool,
    /// `vm.pause` was sent.
    stopped: bool,
}

impl<'h> Freeze<'h> {
    /// Takes up the VM, and makes sure that all its memory is there.
    pub(crate) fn begin(
        hold: &'h Hold,
        running: Status,
        operation: Operation,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let mut timeline = Timeline::start();
        let failed = |cause| Error::new(&hold.id, operation, cause);
        let mut live = match Live::of(&hold.ctx, &hold.id, &running) {
            Err(Cause::Ended) => {
                let left = hold.lose("its Cloud Hypervisor has ended");
                return Err(failed(Cause::Ended).with_leftovers(left));
            }
            other => other.map_err(failed)?,
        };
        if live.vm.lazy {
            let ram = hold.journal.story().identity.memory;
            let mut preload = Preload::adopted(ram, Limits::of(ram), live.vm.lifecycle);
            verdict_before_snapshot(&mut preload, &mut live.agent, deadline)
                .map_err(|error| failed(Cause::Memory(error)))?;
            timeline.mark(Phase::Materialised);
        }
        Ok(Self {
            hold,
            operation,
            deadline,
            status: running,
            timeline,
            live,
            prepared: false,
            stopped: false,
        })
    }

    fn failed(&self, cause: Cause) -> Error {
        Error::new(&self.hold.id, self.operation, cause)
    }

    /// Makes the staging directory, and lets the agent prepare its guest.
    pub(crate) fn prepare(
        &mut self,
        staging: Option<&Path>,
        without_agent: bool,
    ) -> Result<(), Error> {
        if let Some(staging) = staging {
            self.make_staging(staging)
                .map_err(|cause| self.failed(cause))?;
        }
        let look = self.deadline.within(LOOK_BUDGET);
        match self.live.state(look) {
            Ok(VmState::Running) => {}
            Ok(_) => {
                let needs = State::Running;
                let state = self.status.state;
                return Err(self.give_up(Cause::State { state, needs }, staging));
            }
            Err(cause) => return Err(self.give_up(cause, staging)),
        }
        if without_agent {
            return Ok(());
        }
        self.prepared = true;
        let ram = self.hold.journal.story().identity.memory;
        // Best effort: what the guest has not written out is frozen with its memory.
        if let Err(error) = self.live.agent.prepare_snapshot(ram, self.deadline) {
            self.timeline
                .note(format!("The guest did not prepare itself: {error}"));
        }
        self.timeline.mark(Phase::GuestPrepared);
        Ok(())
    }

    fn make_staging(&self, staging: &Path) -> Result<(), Cause> {
        let faults = &self.hold.ctx.config.faults;
        self.room_for_memory(staging)?;
        if staging.exists() {
            std::fs::remove_dir_all(staging).map_err(file("remove", staging))?;
        }
        faults
            .call("make the staging directory", || {
                use std::os::unix::fs::DirBuilderExt;
                std::fs::DirBuilder::new().mode(0o700).create(staging)
            })
            .map_err(file("make", staging))
    }

    /// Cloud Hypervisor writes all memory that is not in a file of the sandbox's own, and
    /// answers with success where the file system was full for the last of it.
    fn room_for_memory(&self, staging: &Path) -> Result<(), Cause> {
        if self.has_own_memory() {
            return Ok(());
        }
        let parent = staging.parent().unwrap_or(staging);
        let memory = self.hold.journal.story().identity.memory;
        require_space(parent, memory).map_err(|error| match error {
            SealError::NoSpace { path, free, needed } => Cause::Full(Full::Disk {
                path,
                available: free,
                needed,
            }),
            other => Cause::Seal(other),
        })
    }

    /// Whether the guest's memory is a file that belongs to this sandbox.
    fn has_own_memory(&self) -> bool {
        self.live.vm.memory_mode == MemoryMode::Shared.name()
    }

    /// Stops the vCPUs.
    pub(crate) fn stop(&mut self) -> Result<(), Cause> {
        self.stopped = true;
        let faults = &self.hold.ctx.config.faults;
        let stopped = injected(faults, "stop the vCPUs", || {
            self.live.api.pause(self.deadline)
        });
        stopped.map_err(Failed::into_cause("stop the vCPUs"))?;
        self.timeline.mark(Phase::VcpusPaused);
        Ok(())
    }

    /// Has Cloud Hypervisor write its snapshot, completes it with memory that is a file
    /// already, and checks it.
    ///
    /// A pause keeps that file, which nobody writes to any more. A template gets a copy.
    pub(crate) fn write(&mut self, staging: &Path, durability: Durability) -> Result<(), Cause> {
        let faults = &self.hold.ctx.config.faults;
        let written = injected(faults, "write the snapshot", || {
            self.live.api.snapshot(staging, self.deadline)
        });
        written.map_err(Failed::into_cause("write the snapshot"))?;
        self.timeline.mark(Phase::SnapshotWritten);
        if durability == Durability::Synced && punch(staging, faults, self.deadline).is_some() {
            self.timeline.mark(Phase::ZerosPunched);
        }
        let own = self.has_own_memory();
        let own = own.then(|| memory_of(self.live.vm.process.pid));
        let own = own.transpose().map_err(Cause::Seal)?;
        let memory = match (&own, self.operation) {
            (None, _) => SealedMemory::Written,
            (Some(file), Operation::Pause) => SealedMemory::Linked(file.as_fd()),
            (Some(file), _) => SealedMemory::Copied(file.as_fd()),
        };
        let how = Seal {
            memory,
            durability,
            limits: self.hold.ctx.config.snapshot_limits,
            faults: faults.clone(),
        };
        let sealed = seal(staging, &how).map_err(Cause::Seal)?;
        // A sandbox's memory never stays where only its configuration knows.
        if sealed.memory().is_none() {
            let path = staging.to_owned();
            return Err(Cause::Seal(SealError::NoMemory { path }));
        }
        self.timeline.mark(Phase::SnapshotSealed);
        Ok(())
    }

    /// Lets the vCPUs run on, with a new life where the agent had prepared itself.
    pub(crate) fn go_on(&mut self) -> Result<(), Cause> {
        let deadline = Deadline::after(UNDO_BUDGET);
        if self.stopped {
            // After a lost answer nobody knows whether it stands still.
            let state = self.live.state(deadline)?;
            if state == VmState::Paused {
                let resumed = self.live.api.resume(deadline);
                if let Err(error) = resumed
                    && !error.is_invalid_transition()
                {
                    return Err(api("let the vCPUs run on")(error));
                }
            }
            self.stopped = false;
            self.timeline.mark(Phase::VcpusResumed);
        }
        if self.prepared {
            self.renew(deadline)?;
        }
        Ok(())
    }

    /// A new life for the agent: nothing else undoes its preparation.
    fn renew(&mut self, deadline: Deadline) -> Result<(), Cause> {
        let mut init = Init::new();
        init.sandbox_id = Some(self.hold.id.to_string());
        let agent = self.live.agent.reborn(init.lifecycle);
        agent
            .init(&init, deadline)
            .map_err(guest("give the guest a new life"))?;
        self.live.agent = agent;
        self.live.vm.lifecycle = init.lifecycle;
        self.prepared = false;
        self.timeline.mark(Phase::InitDone);
        Ok(())
    }

    /// The status of the sandbox as it runs on.
    pub(crate) fn running(&self) -> Status {
        let mut status = self.status.now(State::Running);
        status.vm = Some(self.live.vm.clone());
        status
    }

    /// Undoes what was done, says why, and how the sandbox stands now.
    pub(crate) fn give_up(&mut self, cause: Cause, staging: Option<&Path>) -> Error {
        let mut left = Vec::new();
        if let Some(staging) = staging
            && let Err(error) = std::fs::remove_dir_all(staging)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            left.push(Remains::File(staging.to_owned(), error));
        }
        if matches!(&cause, Cause::Api { source, .. } if source.is_disconnected()) {
            // A connection that breaks is how a death shows first.
            let _ = self.live.process.wait_ended(Some(DYING));
        }
        if self.live.has_ended() {
            log::warn!(
                "Sandbox {}: {}: {cause}",
                self.hold.id,
                self.operation.name()
            );
            left.extend(self.hold.lose("its Cloud Hypervisor has ended"));
            return self.failed(Cause::Ended).with_leftovers(left);
        }
        let cause = match self.go_on() {
            Ok(()) => cause,
            // It runs, but its agent does not know that it may go on.
            Err(error @ Cause::Guest { .. }) => {
                log::warn!("Sandbox {}: {error}", self.hold.id);
                self.timeline.note(error.to_string());
                cause
            }
            Err(error) => {
                log::warn!("Sandbox {}: {error}", self.hold.id);
                return self
                    .failed(Cause::Stuck(Box::new(cause)))
                    .with_leftovers(left);
            }
        };
        if let Err(error) = self.hold.change(self.running()) {
            log::warn!("Sandbox {}: {error}", self.hold.id);
        }
        self.failed(cause).with_leftovers(left)
    }
}

/// How a call to Cloud Hypervisor failed: by itself, or because a test wanted it to.
pub(crate) enum Failed {
    Api(ApiError),
    Injected(Errno),
}

impl From<Errno> for Failed {
    fn from(errno: Errno) -> Self {
        Self::Injected(errno)
    }
}

impl Failed {
    pub(crate) fn into_cause(what: &'static str) -> impl FnOnce(Self) -> Cause {
        move |failed| match failed {
            Self::Api(source) => Cause::Api { what, source },
            Self::Injected(errno) => Cause::File {
                what,
                path: PathBuf::new(),
                source: errno.into(),
            },
        }
    }
}

/// A call to Cloud Hypervisor as a step that tests can make fail.
pub(crate) fn injected<T>(
    faults: &Faults,
    step: &str,
    call: impl FnOnce() -> Result<T, ApiError>,
) -> Result<T, Failed> {
    faults.call(step, || call().map_err(Failed::Api))
}
