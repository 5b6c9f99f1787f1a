//! A sandbox in the hands of one operation.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::context::Context;
use super::dir::{DirLock, SandboxDir};
use super::error::{Cause, Error, Operation, Remains, file};
use super::journal::{Journal, JournalError};
use super::state::{State, Status};
use crate::deadline::Deadline;
use crate::ids::{SandboxId, SlotIndex};
use crate::resource::disk::DiskError;
use crate::resource::ledger::{Ledger, Step, StepLog};
use crate::resource::net::SlotFailure;
use crate::resource::slot::{ProcessIdentity, SlotError, SlotLease};
use crate::vmm::orphan;

/// Undoing has a budget of its own: the caller's may be used up, and nothing may be left.
pub(crate) const UNDO_BUDGET: Duration = Duration::from_secs(20);

/// How long a process may take from its making to its `exec`, and how often it is looked for:
/// a hundred times at most, which the queue of its socket holds.
const EXEC_BUDGET: Duration = Duration::from_secs(2);
const EXEC_LOOK: Duration = Duration::from_millis(20);

/// How long a sweep may take to remove a slot.
const SWEEP_BUDGET: Duration = Duration::from_secs(2);

/// A sandbox, locked.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) ctx: Arc<Context>,
    pub(crate) id: SandboxId,
    pub(crate) dir: SandboxDir,
    pub(crate) journal: Arc<Journal>,
    _lock: DirLock,
}

impl Hold {
    pub(crate) fn new(
        ctx: Arc<Context>,
        id: SandboxId,
        dir: SandboxDir,
        journal: Journal,
        lock: DirLock,
    ) -> Self {
        Self {
            ctx,
            id,
            dir,
            journal: Arc::new(journal),
            _lock: lock,
        }
    }

    /// Takes hold of a sandbox for an operation, which fails where another is under way.
    pub(crate) fn take(
        ctx: &Arc<Context>,
        id: &SandboxId,
        operation: Operation,
    ) -> Result<Self, Error> {
        let failed = |cause| Error::new(id, operation, cause);
        let dir = SandboxDir::of(&ctx.config.root, id);
        let lock = match dir.try_lock() {
            Ok(Some(lock)) => lock,
            Ok(None) => return Err(failed(Cause::UnderWay)),
            Err(error) => return Err(failed(missing(&dir, error))),
        };
        if dir.is_doomed() {
            return Err(failed(Cause::Doomed));
        }
        Self::locked(ctx, id, dir, lock).map_err(failed)
    }

    pub(crate) fn locked(
        ctx: &Arc<Context>,
        id: &SandboxId,
        dir: SandboxDir,
        lock: DirLock,
    ) -> Result<Self, Cause> {
        let journal = Journal::open(&dir.journal(), ctx.config.faults.clone())?;
        forget_processes(&journal);
        let (ctx, id) = (Arc::clone(ctx), id.clone());
        Ok(Self::new(ctx, id, dir, journal, lock))
    }

    pub(crate) fn status(&self) -> Status {
        self.journal.status()
    }

    /// The status, where the sandbox is in the state that an operation begins from.
    pub(crate) fn expect(&self, needs: State) -> Result<Status, Cause> {
        let status = self.status();
        match status.state {
            state if state == needs => Ok(status),
            State::Lost => {
                let why = status.lost.unwrap_or_default();
                Err(Cause::Lost { why })
            }
            state => Err(Cause::State { state, needs }),
        }
    }

    /// Writes a new state down.
    pub(crate) fn change(&self, status: Status) -> Result<(), Cause> {
        self.journal.change(status).map_err(Cause::from)
    }

    /// Ends the VM that the journal tells of, if there is one, and removes what was made for
    /// it: also a process whose maker died before it could write its pid down.
    pub(crate) fn end_vm(&self, deadline: Deadline) -> Vec<Remains> {
        let steps = self.journal.story().steps;
        let mut ledger = Ledger::logged(Arc::clone(&self.journal) as Arc<dyn StepLog>);
        let known = steps.iter().any(|it| matches!(it, Step::Process { .. }));
        let dirs: Vec<_> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Directory { path } => Some(path.clone()),
                _ => None,
            })
            .collect();
        ledger.adopt(steps);
        if !known {
            for found in dirs.iter().filter_map(|dir| self.unnoted(dir)) {
                ledger.push(Step::Process {
                    pid: found.pid,
                    start_time: found.start_time,
                });
            }
        }
        let left = ledger.unwind_with(|step| step.undo(deadline));
        // What is left stays on record, for the next attempt.
        drop(ledger.release());
        left.into_iter().map(Remains::Step).collect()
    }

    /// The process of a VM directory whose maker died before it could write the pid down.
    ///
    /// It bears a mark from its `exec` on; before that, it holds the API socket that its maker
    /// listened on. So while anybody still listens there, it is looked for again: there is
    /// nothing that could be waited for.
    fn unnoted(&self, vm_dir: &Path) -> Option<ProcessIdentity> {
        let patience = Deadline::after(EXEC_BUDGET);
        loop {
            let marked = orphan::list(&self.ctx.config.runtime_dir);
            if let Some(found) = marked.into_iter().find(|it| it.vm_dir == vm_dir) {
                return Some(found.process);
            }
            let listens = UnixStream::connect(vm_dir.join("api.sock")).is_ok();
            if !listens || patience.has_passed() {
                return None;
            }
            std::thread::sleep(EXEC_LOOK);
        }
    }

    /// Removes the network slot of the sandbox, where it has one. A process that waits in it
    /// for a resume ends before.
    pub(crate) fn remove_slot(
        &self,
        slot: Option<SlotIndex>,
        deadline: Deadline,
    ) -> Result<(), Remains> {
        self.ctx.expected.forget(&self.id);
        let net = &self.ctx.net;
        let found = match slot {
            Some(index) => Some(index),
            // Its maker may have died before it could write it down.
            None => slot_of(&self.ctx, &self.id),
        };
        let Some(index) = found else { return Ok(()) };
        let failure = |error: SlotError| {
            Remains::Slot(SlotFailure {
                index,
                source: error.into(),
                leftovers: Vec::new(),
            })
        };
        // Since its VM has ended, whoever sweeps may be about to remove it.
        let patience = deadline.within(SWEEP_BUDGET);
        let adopted = net.slots().adopt_within(index, patience, || true);
        let lease: SlotLease = match adopted {
            Ok(lease) => lease,
            Err(SlotError::Free(_)) => return Ok(()),
            Err(error) => return Err(failure(error)),
        };
        let ours = lease.record();
        if ours.is_some_and(|record| record.owner != self.id.as_str()) {
            // It has gone to somebody else since.
            return Ok(());
        }
        net.reclaim(lease, deadline).map_err(Remains::Slot)
    }

    /// Removes the disk and what the guest wrote to it.
    pub(crate) fn remove_disk(&self, deadline: Deadline) -> Result<(), Remains> {
        let removed = self
            .ctx
            .disks
            .remove_by_id(&self.id, &self.dir.disk(), false, deadline);
        match removed {
            Err(failure) if matches!(failure.source, DiskError::Missing { .. }) => Ok(()),
            other => other.map_err(|failure| Remains::Disk(Box::new(failure))),
        }
    }

    /// Removes everything that the sandbox has and at last the sandbox. What is left keeps
    /// its place on record.
    pub(crate) fn remove_all(&self, deadline: Deadline) -> Vec<Remains> {
        let status = self.status();
        if status.state != State::Destroying
            && let Err(error) = self.change(status.now(State::Destroying))
        {
            log::warn!("Sandbox {}: {error}", self.id);
        }
        let mut left = self.end_vm(deadline);
        if !left.is_empty() {
            // A VM that may still run needs its slot and its disk.
            return left;
        }
        left.extend(self.remove_slot_and_disk(status.slot, deadline));
        if left.is_empty()
            && let Err(error) = self.remove_dir()
        {
            left.push(Remains::File(self.dir.path().to_owned(), error));
        }
        left
    }

    /// Both at the same time: each mostly waits for locks of the kernel's own, which the other
    /// does not take. What is gone when this returns is gone: nothing is left to be removed
    /// later, as by [`DiskPool::retire`](crate::resource::disk::DiskPool::retire).
    fn remove_slot_and_disk(&self, slot: Option<SlotIndex>, deadline: Deadline) -> Vec<Remains> {
        let remove_disk = || self.remove_disk(deadline);
        let (slot, disk) = std::thread::scope(|scope| {
            let disk = std::thread::Builder::new().spawn_scoped(scope, remove_disk);
            let slot = self.remove_slot(slot, deadline);
            let disk = match disk {
                // A panic of the disk's thread goes on in ours.
                Ok(disk) => disk
                    .join()
                    .unwrap_or_else(|it| std::panic::resume_unwind(it)),
                // Where no thread can be had, one after the other.
                Err(_) => remove_disk(),
            };
            (slot, disk)
        });
        [slot.err(), disk.err()].into_iter().flatten().collect()
    }

    fn remove_dir(&self) -> std::io::Result<()> {
        let faults = &self.ctx.config.faults;
        faults.call("remove the sandbox directory", || self.dir.remove())
    }

    /// Notes that the sandbox is lost, and gives back what it has no use for any more: its VM
    /// and its slot. Disk and snapshots stay, for whoever wants to look into them.
    pub(crate) fn lose(&self, why: impl Into<String>) -> Vec<Remains> {
        let deadline = Deadline::after(UNDO_BUDGET);
        let why = why.into();
        let mut left = self.end_vm(deadline);
        let status = self.status();
        let mut lost = status.now(State::Lost);
        lost.vm = None;
        if left.is_empty() {
            match self.remove_slot(status.slot, deadline) {
                Ok(()) => lost.slot = None,
                Err(remains) => left.push(remains),
            }
        }
        log::warn!("Sandbox {}: lost: {why}", self.id);
        lost.lost = Some(why);
        if let Err(error) = self.journal.commit(lost) {
            log::warn!("Sandbox {}: {error}", self.id);
        }
        left
    }
}

/// After a restart of the machine, the processes on record are gone, and strangers may bear
/// their numbers. Done before anything is written: the next line is of this boot.
fn forget_processes(journal: &Journal) {
    if journal.status().is_of_this_boot() {
        return;
    }
    let steps = journal.story().steps;
    for step in steps.iter().filter(|it| matches!(it, Step::Process { .. })) {
        journal.undone(step);
    }
}

/// The slot that is on record for a sandbox.
pub(crate) fn slot_of(ctx: &Context, id: &SandboxId) -> Option<SlotIndex> {
    let slots = ctx.net.slots();
    let all = slots.list().ok()?;
    all.into_iter().find(|index| {
        let record = slots.record(*index).ok().flatten();
        record.is_some_and(|record| record.owner == id.as_str())
    })
}

/// Why a sandbox's lock or journal could not be opened.
pub(crate) fn missing(dir: &SandboxDir, error: std::io::Error) -> Cause {
    if error.kind() == std::io::ErrorKind::NotFound {
        return Cause::Unknown;
    }
    file("lock", dir.path())(error)
}

/// Whether the journal is gone, together with its sandbox.
pub(crate) fn is_gone(error: &JournalError) -> bool {
    matches!(error, JournalError::File { source, .. }
        if source.kind() == std::io::ErrorKind::NotFound)
}
