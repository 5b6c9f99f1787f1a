//! What a sandbox that is paused keeps: the snapshot that counts, its slot, its disk.

use std::io;

use super::error::{Cause, Remains, file};
use super::hold::{Hold, UNDO_BUDGET};
use super::state::Status;
use super::untouched::{Print, Ran};
use crate::deadline::Deadline;
use crate::resource::disk::Disk;
use crate::resource::net::Slot;
use crate::resource::slot::{SlotLease, SlotRecord};

/// After a resume that failed: the sandbox is paused as before, where its snapshot still goes
/// with its disk; else it is lost.
pub(crate) fn put_back(
    hold: &Hold,
    slot: Option<Slot>,
    disk: Option<Disk>,
    ran: Ran,
) -> Vec<Remains> {
    let status = hold.status();
    let mut left = hold.end_vm(Deadline::after(UNDO_BUDGET));
    drop(disk);
    if !left.is_empty() {
        // A VM that may still run has slot and disk; recovery goes on from here.
        return left;
    }
    let untouched = !status.consumed
        || ran == Ran::No
        || status
            .proof
            .as_ref()
            .is_some_and(|prints| prints.iter().all(Print::is_unchanged));
    if !untouched {
        drop(slot);
        left.extend(hold.lose("its resume failed after it may have run"));
        return left;
    }
    if let Some(mut slot) = slot
        && let Err(error) = slot.lease().set_parked(true)
    {
        log::warn!(
            "Sandbox {}: its slot is not marked as kept: {error}",
            hold.id
        );
    }
    let mut paused = status.paused(status.durable);
    paused.generation -= 1;
    if let Err(error) = hold.journal.commit(paused) {
        let error = io::Error::other(error);
        left.push(Remains::File(hold.dir.journal(), error));
    }
    left
}

/// Takes hold of the slot of a sandbox whose VM is about to end: a slot that nobody holds, that
/// is not kept and whose VM has ended is anybody's to sweep. `None` where it is kept already,
/// or not as it was.
pub(crate) fn hold_slot(hold: &Hold, status: &Status) -> Option<SlotLease> {
    let slots = hold.ctx.net.slots();
    let index = status.slot?;
    let is_ours = |record: &SlotRecord| !record.parked && record.owner == hold.id.as_str();
    slots.record(index).ok()?.filter(is_ours)?;
    let lease = slots.adopt(index).ok()?;
    lease.record().is_some_and(is_ours).then_some(lease)
}

/// Marks the slot of a sandbox that is paused as kept for it. After a restart of the machine
/// there is no record of it any more, and it is made anew.
pub(crate) fn keep_slot(hold: &Hold, status: &Status) -> Result<(), Cause> {
    let Some(index) = status.slot else {
        return Ok(());
    };
    let slots = hold.ctx.net.slots();
    match slots.record(index) {
        Ok(Some(record)) if record.parked && record.owner == hold.id.as_str() => Ok(()),
        Ok(Some(record)) if record.owner == hold.id.as_str() => keep(slots.adopt(index)?),
        _ => {
            let lease = slots.reserve(index, hold.id.as_str())?;
            lease.park().map_err(Cause::from)
        }
    }
}

/// The same with a slot that is held, whose VM has ended.
pub(crate) fn keep(mut lease: SlotLease) -> Result<(), Cause> {
    lease.set_vmm(None)?;
    lease.park().map_err(Cause::from)
}

/// Removes what is left of earlier lives.
pub(crate) fn forget_snapshots(hold: &Hold, keep: Option<u64>) -> Result<(), Cause> {
    let keep = keep.map(|generation| hold.dir.snapshot(generation));
    for path in hold.dir.snapshots() {
        if Some(&path) != keep.as_ref() {
            std::fs::remove_dir_all(&path).map_err(file("remove", &path))?;
        }
    }
    Ok(())
}
