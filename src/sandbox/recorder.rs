//! What is written down while a sandbox is made, and the slot that has to know.

use std::io;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::journal::Journal;
use crate::ids::SlotIndex;
use crate::resource::ledger::{Step, StepLog};
use crate::resource::net::{PendingSlot, Slot};
use crate::resource::slot::ProcessIdentity;
use crate::restore::{Gate, Netns};

/// Writes the steps of a restore into the sandbox's journal, and the process into the record
/// of its slot, which is not freed while that process lives.
#[derive(Debug)]
pub(crate) struct Recorder {
    journal: Arc<Journal>,
    slot: Mutex<Place>,
}

/// The network slot of a sandbox that is being made.
#[derive(Debug)]
enum Place {
    None,
    /// It is being built; its record is with those who build, and learns of the process later.
    Pending(Arc<PendingSlot>, Option<ProcessIdentity>),
    Stands(Box<Slot>),
}

impl Recorder {
    pub(crate) fn new(journal: &Arc<Journal>) -> Self {
        Self {
            journal: Arc::clone(journal),
            slot: Mutex::new(Place::None),
        }
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn put_slot(&self, slot: Slot) {
        *self.place() = Place::Stands(Box::new(slot));
    }

    pub(crate) fn expect_slot(&self, slot: PendingSlot) {
        *self.place() = Place::Pending(Arc::new(slot), None);
    }

    pub(crate) fn slot_index(&self) -> Option<SlotIndex> {
        match &*self.place() {
            Place::None => None,
            Place::Pending(slot, _) => Some(slot.index()),
            Place::Stands(slot) => Some(slot.index()),
        }
    }

    /// The namespace for the restore.
    pub(crate) fn netns(&self) -> Option<Netns> {
        match &*self.place() {
            Place::None => None,
            Place::Pending(slot, _) => Some(Arc::clone(slot).into()),
            Place::Stands(slot) => Some(slot.netns_path().into()),
        }
    }

    /// The slot, if there is one, for whoever undoes it or leaves it as it is. Waits until
    /// nothing is done to it any more.
    pub(crate) fn take_slot(&self) -> Option<Slot> {
        match mem::replace(&mut *self.place(), Place::None) {
            Place::None => None,
            Place::Pending(slot, _) => slot.take(),
            Place::Stands(slot) => Some(*slot),
        }
    }

    /// A gate that opens once the slot's record names the process, too.
    pub(crate) fn gate(recorder: &Arc<Self>, Gate(gate): Gate) -> Gate {
        let recorder = Arc::clone(recorder);
        Gate(Arc::new(move || {
            recorder.settle_slot()?;
            gate()
        }))
    }

    /// The restore has waited until the slot stands.
    fn settle_slot(&self) -> io::Result<()> {
        let mut place = self.place();
        let Place::Pending(pending, vmm) = &*place else {
            return Ok(());
        };
        let (taken, vmm) = (pending.take(), *vmm);
        let mut slot =
            taken.ok_or_else(|| io::Error::other("somebody else has taken its network slot"))?;
        let noted = slot.set_vmm(vmm).map_err(io::Error::other);
        *place = Place::Stands(Box::new(slot));
        noted
    }

    fn set_vmm(&self, vmm: Option<ProcessIdentity>) -> io::Result<()> {
        match &mut *self.place() {
            Place::None => Ok(()),
            Place::Pending(_, later) => {
                *later = vmm;
                Ok(())
            }
            Place::Stands(slot) => slot.set_vmm(vmm).map_err(io::Error::other),
        }
    }
}

impl StepLog for Recorder {
    fn made(&self, step: &Step) -> io::Result<()> {
        self.journal.made(step)?;
        if let Step::Process { pid, start_time } = step {
            let (pid, start_time) = (*pid, *start_time);
            self.set_vmm(Some(ProcessIdentity { pid, start_time }))?;
        }
        Ok(())
    }

    fn undone(&self, step: &Step) {
        self.journal.undone(step);
        if matches!(step, Step::Process { .. })
            && let Err(error) = self.set_vmm(None)
        {
            // The process is dead, which anybody who asks will find.
            log::debug!("The slot still names its VMM: {error}");
        }
    }
}
