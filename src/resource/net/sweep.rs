//! Reclaiming slots whose sandbox is dead, and nothing else.

use super::error::{NetError, SlotFailure};
use super::host::HostNet;
use crate::deadline::Deadline;
use crate::ids::SlotIndex;
use crate::resource::slot::{SlotError, SlotLease};

/// What a sweep found. Every slot that is not free is in exactly one of the first four.
#[derive(Debug, Default)]
pub struct SweepReport {
    /// Nobody's any more: removed and freed.
    pub reclaimed: Vec<SlotIndex>,
    /// In the hands of a living process, or its VMM still runs. Left alone.
    pub in_use: Vec<SlotIndex>,
    /// Kept for a paused sandbox. Left alone.
    pub parked: Vec<SlotIndex>,
    /// Nobody's any more, but not all of it could be removed.
    pub stuck: Vec<SlotFailure>,
    /// Namespaces and links that bear a slot's name without any record of ours: not proven
    /// ours, so left alone.
    pub foreign: Vec<String>,
}

impl HostNet {
    /// Removes what belongs to dead sandboxes: slots that no process holds, that are not
    /// parked and whose VMM has ended, by what their records list. Blocks for some
    /// milliseconds per slot removed.
    ///
    /// # Errors
    /// Where slots or links cannot be listed. A slot that cannot be removed is part of the
    /// report.
    pub fn sweep(&self, deadline: Deadline) -> Result<SweepReport, NetError> {
        let mut report = SweepReport::default();
        for index in self.slots.list()? {
            if deadline.has_passed() {
                return Err(NetError::Timeout { step: "sweep" });
            }
            // Their owners may come for them at any moment, and shall find them free.
            match self.slots.record(index) {
                Ok(Some(record)) if record.parked => {
                    report.parked.push(index);
                    continue;
                }
                Ok(Some(record)) if record.vmm.is_some_and(|it| it.is_alive().unwrap_or(false)) => {
                    report.in_use.push(index);
                    continue;
                }
                _ => {}
            }
            match self.slots.adopt(index) {
                Ok(lease) => self.judge(lease, &mut report, deadline),
                Err(SlotError::InUse(_)) => report.in_use.push(index),
                Err(SlotError::Free(_)) => {}
                Err(error) => report.stuck.push(SlotFailure {
                    index,
                    source: error.into(),
                    leftovers: Vec::new(),
                }),
            }
        }
        report.foreign = self.foreign(deadline)?;
        Ok(report)
    }

    /// Namespaces and links with names of slots that have no slot file.
    ///
    /// # Errors
    /// Where they cannot be listed.
    pub fn foreign(&self, deadline: Deadline) -> Result<Vec<String>, NetError> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.config.netns_dir)
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            let slot = self.config.slot_of_netns(&name);
            // The record outlives the object: without it, and with the object still there
            // on a second look, nobody of ours is at work here.
            if slot.is_some_and(|slot| !self.is_recorded(slot)) && entry.path().exists() {
                found.push(format!("namespace {name}"));
            }
        }
        for link in self.links(deadline)? {
            let slot = self.config.slot_of_veth(&link.name);
            if slot.is_some_and(|slot| !self.is_recorded(slot))
                && self.link(link.index, deadline)?.is_some()
            {
                found.push(format!("link {}", link.name));
            }
        }
        Ok(found)
    }

    fn is_recorded(&self, index: SlotIndex) -> bool {
        !matches!(self.slots.record(index), Err(SlotError::Free(_)))
    }

    fn judge(&self, lease: SlotLease, report: &mut SweepReport, deadline: Deadline) {
        let index = lease.index();
        if lease.record().is_some_and(|record| record.parked) {
            report.parked.push(index);
            return;
        }
        match lease.running_vmm() {
            Ok(Some(_)) => report.in_use.push(index),
            Ok(None) => match self.reclaim(lease, deadline) {
                Ok(()) => report.reclaimed.push(index),
                Err(failure) => report.stuck.push(failure),
            },
            Err(error) => report.stuck.push(SlotFailure {
                index,
                source: error.into(),
                leftovers: Vec::new(),
            }),
        }
    }

    /// Removes all that the record of a held slot lists, and frees the index.
    ///
    /// # Errors
    /// [`SlotFailure`] with what is left.
    pub fn reclaim(&self, lease: SlotLease, deadline: Deadline) -> Result<(), SlotFailure> {
        match self.reclaim_all(vec![lease], deadline).pop() {
            None => Ok(()),
            Some(failure) => Err(failure),
        }
    }
}
