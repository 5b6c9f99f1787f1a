//! What building, checking or removing a slot failed at.

use std::io;
use std::path::PathBuf;

use rewake_sys::CallError;

use super::{AddressError, Ipv4Range, NetStep};
use crate::fault::{FailedCall, Faults};
use crate::ids::SlotIndex;
use crate::resource::ledger::{Leftover, Remains};
use crate::resource::slot::SlotError;
use crate::wire::netlink::NetlinkError;

/// Why a network operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The address plan contradicts itself.
    #[error("Invalid address plan")]
    Address(#[from] AddressError),
    /// A slot could not be had or given back.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A netlink exchange failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A system call failed.
    #[error("Cannot {step}")]
    Call {
        /// What the call was for.
        step: String,
        /// The call and its error number.
        source: CallError,
    },
    /// A file operation failed.
    #[error("Cannot {step}: {path}")]
    File {
        /// What the operation was for.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A route of the host leads into a range that slots need.
    #[error("{range} overlaps the host's route {route}")]
    RouteConflict {
        /// The range of the address plan.
        range: Ipv4Range,
        /// The host's route.
        route: Ipv4Range,
    },
    /// A slot is not as it was built.
    #[error("Slot {index} is damaged: {what}")]
    Damaged {
        /// The slot.
        index: SlotIndex,
        /// What is missing or changed.
        what: String,
    },
    /// Something of this name exists and was not made by us.
    #[error("{path} exists already")]
    Occupied {
        /// The file.
        path: PathBuf,
    },
    /// The work did not end in time.
    #[error("Out of time: {step}")]
    Timeout {
        /// What was due.
        step: &'static str,
    },
}

impl From<FailedCall> for NetError {
    fn from(FailedCall { step, source }: FailedCall) -> Self {
        Self::Call { step, source }
    }
}

/// A kernel object that could not be removed.
pub type NetLeftover = Leftover<NetStep, NetError>;

/// A slot that could not be built or removed, and what is left of it.
///
/// With leftovers the slot stays out of use; a sweep tries them again.
#[derive(Debug, thiserror::Error)]
#[error("Network slot {index}{}", Remains(.leftovers))]
pub struct SlotFailure {
    /// The slot.
    pub index: SlotIndex,
    /// What failed first.
    pub source: NetError,
    /// What could not be undone.
    pub leftovers: Vec<NetLeftover>,
}

/// Runs one system call under its step name.
pub(super) fn call<T>(
    faults: &Faults,
    step: impl Into<String>,
    call: impl FnOnce() -> Result<T, CallError>,
) -> Result<T, NetError> {
    faults.syscall(step, call).map_err(NetError::from)
}
