//! What launch and resume share: a sandbox on its way to running.
//!
//! Both acquire a slot and a disk, each in its own way ([`super::launch`], [`super::resume`]),
//! and then go the same way: one restore, one note that it runs. Whoever drives the restore,
//! the blocking calls or a [`Driver`](crate::host::Driver), hands its outcome to
//! [`Making::conclude`]; a making that is dropped before is undone.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::Sandbox;
use super::admission::Place;
use super::error::{Cause, Error, Operation, Remains};
use super::hold::{Hold, UNDO_BUDGET};
use super::kept::put_back;
use super::recorder::Recorder;
use super::state::{RunningVm, State, Status};
use super::untouched::Ran;
use super::write_out::sync_behind;
use crate::deadline::Deadline;
use crate::envd::init::Init;
use crate::ids::SlotIndex;
use crate::memory::WorkingSet;
use crate::plan::{MemoryMode, RestoreInputs, RootDisk};
use crate::resource::disk::{Disk, DiskFailure};
use crate::resource::ledger::StepLog;
use crate::resource::net::{PendingSlot, Slot};
use crate::resource::slot::ProcessIdentity;
use crate::restore::kit::Kit;
use crate::restore::{self, Gate, RestoreError, RestoreSpec, Restored};
use crate::timeline::{Phase, Timeline};

/// A network slot as it is got.
#[derive(Debug)]
pub(crate) enum Got {
    /// As it was kept or prepared, with the process that waits in it, where one does.
    Standing(Box<(Slot, Option<Kit>)>),
    /// It is being built. The restore goes on meanwhile, as far as it can.
    Pending(PendingSlot),
}

/// A sandbox on its way to running.
#[derive(Debug)]
pub(crate) struct Making {
    pub(crate) hold: Hold,
    pub(crate) operation: Operation,
    pub(crate) timeline: Timeline,
    pub(crate) deadline: Deadline,
    recorder: Arc<Recorder>,
    disk: Option<Disk>,
    /// The process that waits in the slot, where one does.
    kit: Option<Kit>,
    spec: Option<RestoreSpec>,
    /// Where the memory that it needed until it was ready is noted, if anywhere.
    pub(crate) record_into: Option<PathBuf>,
    /// Its place among those that the host has let in.
    _place: Place,
    concluded: bool,
}

impl Making {
    pub(crate) fn new(
        hold: Hold,
        operation: Operation,
        place: Place,
        timeline: Timeline,
        deadline: Deadline,
    ) -> Self {
        Self {
            recorder: Arc::new(Recorder::new(&hold.journal)),
            hold,
            operation,
            timeline,
            deadline,
            disk: None,
            kit: None,
            spec: None,
            record_into: None,
            _place: place,
            concluded: false,
        }
    }

    /// A disk that was ready, if one was.
    pub(crate) fn put_disk(&mut self, disk: Option<Disk>) {
        self.disk = disk;
        if self.disk.is_some() {
            self.timeline.mark(Phase::DiskAcquired);
        }
    }

    /// Acquires slot and disk, neither waiting for the other, nor for a slot that has to be
    /// built. What one has got is taken over
    /// before the other's failure is looked at: all that was made is undone.
    pub(crate) fn acquire(
        &mut self,
        slot: impl FnOnce() -> Result<Option<Got>, Cause>,
        disk: Option<impl FnOnce() -> Result<Disk, DiskFailure> + Send>,
        what: &'static str,
    ) -> Result<(), Cause> {
        let (slot, slot_at, disk) = match disk {
            None => (slot(), Instant::now(), None),
            Some(disk) => std::thread::scope(|scope| {
                let disk = scope.spawn(|| (disk(), Instant::now()));
                let (slot, slot_at) = (slot(), Instant::now());
                // A panic of the disk's thread goes on in ours.
                let disk = disk
                    .join()
                    .unwrap_or_else(|it| std::panic::resume_unwind(it));
                (slot, slot_at, Some(disk))
            }),
        };
        let stands = slot.map(|got| match got {
            Some(Got::Standing(standing)) => {
                let (slot, kit) = *standing;
                self.recorder.put_slot(slot);
                self.kit = kit;
                true
            }
            Some(Got::Pending(slot)) => {
                self.recorder.expect_slot(slot);
                false
            }
            None => true,
        });
        let disk = disk.map(|(disk, at)| (disk.map(|disk| self.disk = Some(disk)), at));
        if stands? {
            self.timeline.mark_at(Phase::SlotAcquired, slot_at);
        }
        if let Some((disk, at)) = disk {
            disk.map_err(|failure| Cause::Disk {
                what,
                source: Box::new(failure),
            })?;
            self.timeline.mark_at(Phase::DiskAcquired, at);
        }
        Ok(())
    }

    /// The process to restore on; it is given away once.
    pub(crate) const fn take_kit(&mut self) -> Option<Kit> {
        self.kit.take()
    }

    pub(crate) fn slot_index(&self) -> Option<SlotIndex> {
        self.recorder.slot_index()
    }

    pub(crate) fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref()
    }

    /// Works out the restore: slot and disk are there.
    pub(crate) fn specify(
        &mut self,
        snapshot: &Path,
        adjust: impl FnOnce(&mut RestoreInputs),
        init: Init,
        gate: Gate,
    ) {
        let ctx = &self.hold.ctx;
        let mut inputs = RestoreInputs::new(self.hold.id.clone(), snapshot);
        inputs.slot = self.slot_index();
        inputs.tap = Some(ctx.net.config().tap_name.0.clone());
        if let Some(disk) = &self.disk {
            inputs.disk = RootDisk::At(disk.path().to_owned());
        }
        adjust(&mut inputs);
        let mut spec = RestoreSpec::new(inputs, &ctx.config.vmm.program, ctx.guest());
        spec.vmm = ctx.config.vmm.clone();
        spec.runtime_dir.clone_from(&ctx.config.runtime_dir);
        spec.netns = self.recorder.netns();
        spec.hedge = ctx.config.hedge.clone();
        spec.snapshot_limits = ctx.config.snapshot_limits;
        spec.init = Some(init);
        spec.budgets = ctx.config.budgets;
        spec.log = Some(Arc::clone(&self.recorder) as Arc<dyn StepLog>);
        spec.gate = Some(Recorder::gate(&self.recorder, gate));
        spec.timeline = Some(self.timeline.clone());
        self.spec = Some(spec);
    }

    /// The restore that is to be driven.
    pub(crate) fn spec(&self) -> &RestoreSpec {
        // Invariant: `specify` is the last step of what makes a making.
        self.spec
            .as_ref()
            .unwrap_or_else(|| unreachable!("specified"))
    }

    /// Restores, blocking, and concludes.
    pub(crate) fn run(mut self) -> Result<Sandbox, Error> {
        let kit = self.take_kit();
        let outcome = restore::restore_with(self.spec(), kit, self.deadline);
        self.conclude(outcome)
    }

    /// Notes that the sandbox runs, or undoes what was made for it.
    pub(crate) fn conclude(
        mut self,
        outcome: Result<Restored, RestoreError>,
    ) -> Result<Sandbox, Error> {
        let restored = match outcome {
            Ok(restored) => restored,
            Err(error) => return Err(self.failed(error)),
        };
        let status = self.running(&restored);
        if let Err(error) = self.hold.change(status.clone()) {
            return Err(self.unrecorded(restored, error));
        }
        self.concluded = true;
        let mut timeline = restored.timeline.clone();
        if let Some(template) = &self.record_into {
            timeline.note(record(restored.vmm.pid(), template));
        }
        // What was read of its log is in no pipe any more.
        let log = restored.vmm.log.tail();
        if !log.is_empty()
            && let Err(error) = super::vmm_log::save(&self.hold.dir.vmm_log(), &log)
        {
            log::warn!("Sandbox {}: {error}", self.hold.id);
        }
        // From here on the journal answers for the process.
        drop(restored.into_parts());
        // Both stay as they are, without anybody holding them.
        drop(self.recorder.take_slot());
        if self.disk.take().is_some() && self.operation == Operation::Launch {
            sync_behind(&self.hold.ctx, &self.hold.id, &self.hold.dir);
        }
        let mut sandbox = Sandbox::new(&self.hold.ctx, &self.hold.id, &status, timeline);
        if status.vm.as_ref().is_some_and(|vm| vm.lazy) {
            sandbox.begin_preload(&status, self.deadline);
        }
        Ok(sandbox)
    }

    /// It runs, and that cannot be written down. A fresh sandbox is removed; what a resumed
    /// one has in memory is worth more than an orderly end, so it is left to recovery, which
    /// adopts it.
    fn unrecorded(&mut self, restored: Restored, error: Cause) -> Error {
        if self.operation == Operation::Launch {
            let left = restored.destroy(Deadline::after(UNDO_BUDGET));
            let left = left.into_iter().map(Remains::Step).collect();
            return self.abandon(error, Ran::Perhaps).with_leftovers(left);
        }
        self.concluded = true;
        drop(restored.into_parts());
        drop(self.recorder.take_slot());
        drop(self.disk.take());
        let cause = Cause::Unrecorded(Box::new(error));
        Error::new(&self.hold.id, self.operation, cause)
    }

    fn running(&self, restored: &Restored) -> Status {
        let mut status = self.hold.status().now(State::Running);
        status.slot = self.slot_index();
        let lifecycle = restored.init.as_ref().map(|init| init.lifecycle);
        let asked = || self.spec().init.as_ref().map(|init| init.lifecycle);
        status.vm = Some(RunningVm {
            process: ProcessIdentity {
                pid: restored.vmm.pid(),
                start_time: restored.vmm.start_time(),
            },
            vm_dir: restored.vm_dir.clone(),
            memory_mode: restored.memory_mode.name().to_owned(),
            lifecycle: lifecycle
                .or_else(asked)
                .unwrap_or_else(|| Init::new().lifecycle),
            lazy: restored.memory_mode == MemoryMode::OnDemand,
            vmm: restored.build.clone(),
            notes: restored.timeline.notes().to_vec(),
        });
        status
    }

    fn failed(&mut self, error: RestoreError) -> Error {
        let ran = Ran::judge(&error);
        let doomed = self.hold.dir.is_doomed();
        let cause = if doomed {
            Cause::Doomed
        } else {
            Cause::Restore {
                stage: error.stage,
                source: error.cause,
                log: error.log,
            }
        };
        let left = error.leftovers.into_iter().map(Remains::Step).collect();
        self.abandon(cause, ran).with_leftovers(left)
    }

    /// Undoes what was made so far, and says why.
    pub(crate) fn abandon(&mut self, cause: impl Into<Cause>, ran: Ran) -> Error {
        let left = self.undo(ran);
        Error::new(&self.hold.id, self.operation, cause).with_leftovers(left)
    }

    fn undo(&mut self, ran: Ran) -> Vec<Remains> {
        self.concluded = true;
        // A process that waits in the slot ends before the slot does.
        drop(self.kit.take());
        // What undoing needs is found by its record; nobody must hold it then.
        let slot = self.recorder.take_slot();
        let disk = self.disk.take();
        if self.operation == Operation::Launch {
            drop((slot, disk));
            return self.hold.remove_all(Deadline::after(UNDO_BUDGET));
        }
        put_back(&self.hold, slot, disk, ran)
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if !self.concluded {
            for remains in self.undo(Ran::Perhaps) {
                log::warn!("Left over: {remains}");
            }
        }
    }
}

/// Notes which memory a VM needed so far with its template; the result says how that went.
fn record(pid: u32, template: &Path) -> String {
    let recorded = WorkingSet::record(pid).and_then(|set| {
        set.save(template)?;
        Ok(set.size())
    });
    match recorded {
        Ok(size) => format!("A working set of {size} was recorded"),
        Err(error) => format!("No working set was recorded: {error}"),
    }
}
