//! Removing slots: host side first, namespace last, connections forgotten at the end.

use super::create::Slot;
use super::error::{NetError, SlotFailure};
use super::host::HostNet;
use super::{NetStep, conntrack, link, namespace};
use crate::deadline::Deadline;
use crate::wire::netlink::Batch;

impl HostNet {
    /// Undoes one step of a slot. What is gone already, or is not ours any more, counts as
    /// undone. Blocks on the kernel's own locks.
    ///
    /// # Errors
    /// [`NetError`]; the object may still be there, and the call may be repeated.
    pub fn undo(&self, step: &NetStep, deadline: Deadline) -> Result<(), NetError> {
        match step {
            NetStep::Netns {
                path,
                device,
                inode,
            } => namespace::unpin(path, (*device, *inode), &self.faults),
            NetStep::Link { name, index, mac } => {
                let found = self.link(*index, deadline)?;
                if !found.is_some_and(|it| it.name == *name && it.mac == Some(*mac)) {
                    return Ok(());
                }
                let mut batch = Batch::new();
                link::remove(&mut batch, name, *index);
                match self.sockets().route.commit(&batch, deadline) {
                    Err(error) if error.is_missing() => Ok(()),
                    other => other.map_err(NetError::from),
                }
            }
            NetStep::Conntrack { addresses } => {
                let mut sockets = self.sockets();
                conntrack::forget(&mut sockets.netfilter, addresses, deadline)
                    .map_err(NetError::from)
            }
        }
    }

    /// Removes a slot and frees its index. Blocks for some milliseconds: callers that have
    /// somebody waiting do this afterwards, and with [`HostNet::destroy_all`] for several.
    ///
    /// # Errors
    /// [`SlotFailure`] with what is left; the index then stays out of use until a sweep.
    pub fn destroy(&self, slot: Slot, deadline: Deadline) -> Result<(), SlotFailure> {
        let Slot { lease, netns, .. } = slot;
        // Our own descriptor would keep the namespace alive.
        drop(netns);
        self.reclaim(lease, deadline)
    }
}
