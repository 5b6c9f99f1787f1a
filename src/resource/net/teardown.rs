//! Removing slots: host side first, namespace last, connections forgotten at the end.

use super::create::Slot;
use super::error::{NetError, NetLeftover, SlotFailure};
use super::host::{HostNet, Sockets};
use super::{NetStep, conntrack, link, namespace, walls};
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::resource::slot::{SlotError, SlotLease};
use crate::wire::netlink::Batch;

impl NetStep {
    /// Undoes this step in the namespace of the calling thread. What is gone already, or is
    /// not ours any more, counts as undone. Blocks on the kernel's own locks.
    ///
    /// # Errors
    /// [`NetError`]; the object may still be there, and the call may be repeated.
    pub fn undo(&self, deadline: Deadline) -> Result<(), NetError> {
        let mut sockets = Sockets::open(&Faults::NONE)?;
        undo(self, &mut sockets, &Faults::NONE, deadline)
    }
}

impl HostNet {
    /// Undoes one step of a slot, see [`NetStep::undo`].
    ///
    /// # Errors
    /// [`NetError`]; the object may still be there, and the call may be repeated.
    pub fn undo(&self, step: &NetStep, deadline: Deadline) -> Result<(), NetError> {
        undo(step, &mut self.sockets(), &self.faults, deadline)
    }

    /// Removes a slot and frees its index. Blocks for tens of milliseconds, as the kernel
    /// waits until no processor uses the link any more: callers that have somebody waiting
    /// leave it to a background thread.
    ///
    /// # Errors
    /// [`SlotFailure`] with what is left; the index then stays out of use until a sweep.
    pub fn destroy(&self, slot: Slot, deadline: Deadline) -> Result<(), SlotFailure> {
        match self.destroy_all(vec![slot], deadline).pop() {
            None => Ok(()),
            Some(failure) => Err(failure),
        }
    }

    /// Removes several slots, in hardly more time than one. Returns those that failed; their
    /// indices stay out of use until a sweep.
    #[must_use]
    pub fn destroy_all(&self, slots: Vec<Slot>, deadline: Deadline) -> Vec<SlotFailure> {
        // Only the leases stay: our own descriptors would keep the namespaces alive.
        let leases = slots.into_iter().map(|slot| slot.lease).collect();
        self.reclaim_all(leases, deadline)
    }

    /// Removes all that the records of held slots list, and frees their indices. Slots whose
    /// VMM may still run keep everything.
    pub(super) fn reclaim_all(
        &self,
        leases: Vec<SlotLease>,
        deadline: Deadline,
    ) -> Vec<SlotFailure> {
        let mut failures = Vec::new();
        let mut dying: Vec<(SlotLease, Vec<NetStep>, Vec<NetLeftover>)> = Vec::new();
        for lease in leases {
            let index = lease.index();
            let error = match lease.running_vmm() {
                Ok(None) => {
                    let steps = lease.record().map(|record| record.steps.clone());
                    dying.push((lease, steps.unwrap_or_default(), Vec::new()));
                    continue;
                }
                Ok(Some(vmm)) => SlotError::StillRuns {
                    index,
                    pid: vmm.pid,
                },
                Err(error) => error,
            };
            failures.push(SlotFailure {
                index,
                source: error.into(),
                leftovers: Vec::new(),
            });
        }
        if dying.len() > 1 {
            // Whatever fails here is tried again below, one by one.
            let _ = self.remove_links(dying.iter().flat_map(|(_, steps, _)| steps), deadline);
        }
        let mut tracked = Vec::new();
        for (_, steps, leftovers) in &mut dying {
            let is_tracking = |step: &mut NetStep| matches!(step, NetStep::Conntrack { .. });
            tracked.push(steps.extract_if(.., is_tracking).collect::<Vec<_>>());
            leftovers.extend(self.unwind(steps, deadline));
        }
        // One listing of the table for all of them.
        let forgotten = dying.len() > 1 && self.forget(tracked.iter().flatten(), deadline).is_ok();
        for ((lease, _, mut leftovers), mut steps) in dying.into_iter().zip(tracked) {
            let index = lease.index();
            if !forgotten {
                leftovers.extend(self.unwind(&mut steps, deadline));
            }
            let source = if leftovers.is_empty() {
                match lease.release() {
                    Ok(()) => continue,
                    Err(held) => held.error.into(),
                }
            } else {
                leftovers.remove(0).error
            };
            failures.push(SlotFailure {
                index,
                source,
                leftovers,
            });
        }
        failures
    }

    fn forget<'a>(
        &self,
        steps: impl Iterator<Item = &'a NetStep>,
        deadline: Deadline,
    ) -> Result<(), NetError> {
        let addresses = steps
            .flat_map(|step| match step {
                NetStep::Conntrack { addresses } => addresses.as_slice(),
                _ => &[],
            })
            .copied()
            .collect();
        self.undo(&NetStep::Conntrack { addresses }, deadline)
    }

    /// Removes many links as one: gathered in a group of their own, they share the waits
    /// that each removal costs (`rtnl_group_dellink`, net/core/rtnetlink.c).
    fn remove_links<'a>(
        &self,
        steps: impl Iterator<Item = &'a NetStep>,
        deadline: Deadline,
    ) -> Result<(), NetError> {
        let [a, b, c, d, ..] = *uuid::Uuid::new_v4().as_bytes();
        // Group 0 is where all links begin.
        let group = u32::from_ne_bytes([a, b, c, d]) | 1 << 31;
        if self.links(deadline)?.iter().any(|link| link.group == group) {
            return Ok(());
        }
        let mut sockets = self.sockets();
        let mut batch = Batch::new();
        for step in steps {
            if let NetStep::Link { name, index, mac } = step {
                let found = link::lookup(&mut sockets.route, *index, deadline)?;
                if found.is_some_and(|it| it.name == *name && it.mac == Some(*mac)) {
                    link::regroup(&mut batch, name, *index, group);
                }
            }
        }
        if batch.is_empty() {
            return Ok(());
        }
        link::remove_group(&mut batch, group);
        sockets.route.commit(&batch, deadline)?;
        Ok(())
    }
}

pub(super) fn undo(
    step: &NetStep,
    sockets: &mut Sockets,
    faults: &Faults,
    deadline: Deadline,
) -> Result<(), NetError> {
    match step {
        NetStep::Netns {
            path,
            device,
            inode,
            cookie,
        } => {
            let identity = namespace::Identity {
                device: *device,
                inode: *inode,
                cookie: *cookie,
            };
            namespace::unpin(path, identity, faults)
        }
        NetStep::Link { name, index, mac } => {
            let found = link::lookup(&mut sockets.route, *index, deadline)?;
            if !found.is_some_and(|it| it.name == *name && it.mac == Some(*mac)) {
                return Ok(());
            }
            let mut batch = Batch::new();
            link::remove(&mut batch, name, *index);
            match sockets.route.commit(&batch, deadline) {
                Err(error) if error.is_missing() => Ok(()),
                other => other.map_err(NetError::from),
            }
        }
        NetStep::Walls { table, sources } => {
            walls::dismiss(&mut sockets.netfilter, table, sources, deadline).map_err(NetError::from)
        }
        NetStep::Conntrack { addresses } => {
            conntrack::forget(&mut sockets.netfilter, addresses, deadline).map_err(NetError::from)
        }
    }
}
