//! Whether a slot is still as it was built.

use std::os::unix::fs::MetadataExt;

use rewake_sys::netns;

use super::create::Slot;
use super::error::NetError;
use super::host::HostNet;
use super::link;
use crate::deadline::Deadline;

impl HostNet {
    /// Looks at a slot from the host: its pin names its namespace, its link is there and up.
    /// One netlink exchange and two file look-ups, some microseconds.
    ///
    /// # Errors
    /// [`NetError::Damaged`] with what is wrong, or what the look-ups say.
    pub fn check(&self, slot: &Slot, deadline: Deadline) -> Result<(), NetError> {
        let damaged = |what: String| NetError::Damaged {
            index: slot.index(),
            what,
        };
        let call = |step: &str| {
            let step = step.to_owned();
            move |source| NetError::Call { step, source }
        };
        let pinned = netns::open(slot.netns_path()).map_err(call("open the pinned namespace"))?;
        if !netns::same(&pinned, slot.netns()).map_err(call("identify the namespace"))? {
            return Err(damaged("another namespace is pinned".to_owned()));
        }
        let plan = slot.plan();
        let found = link::lookup(&mut self.sockets().route, plan.veth_index, deadline)?;
        match found {
            None => Err(damaged(format!("{} is gone", plan.veth))),
            Some(link) if link.name != plan.veth || link.mac != Some(plan.veth_mac) => {
                Err(damaged(format!("{} is now {}", plan.veth, link.name)))
            }
            Some(link) if !link.up => Err(damaged(format!("{} is down", plan.veth))),
            Some(_) => Ok(()),
        }
    }

    /// Whether the pin names the slot's namespace and the link has its name and index. Takes
    /// none of the kernel's network locks, so it never waits for somebody else's changes.
    pub(crate) fn is_healthy(&self, slot: &Slot) -> bool {
        let pinned = std::fs::symlink_metadata(slot.netns_path()).is_ok_and(|it| {
            netns::identity(slot.netns()).is_ok_and(|ns| ns == (it.dev(), it.ino()))
        });
        let plan = slot.plan();
        pinned
            && rustix::net::netdevice::name_to_index(&self.socket, &plan.veth)
                .is_ok_and(|index| index == plan.veth_index)
    }
}
