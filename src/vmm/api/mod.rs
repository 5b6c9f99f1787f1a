//! Cloud Hypervisor's REST API, synchronous and typed.
//!
//! [`Client`] holds one connection and blocks, until a [`Deadline`] at the latest. [`Call`]
//! is one operation as data, for those who send it without blocking.
//!
//! ```no_run
//! use std::time::Duration;
//! use rewake::deadline::Deadline;
//! use rewake::vmm::api::{ApiError, Client, Resize, VmState};
//!
//! # fn main() -> Result<(), ApiError> {
//! let soon = || Deadline::after(Duration::from_secs(5));
//! let mut vmm = Client::connect("/run/vm.sock", soon())?;
//! println!("Cloud Hypervisor {}", vmm.version());
//! match vmm.info(soon()) {
//!     Ok(info) if info.state == VmState::Paused => vmm.resume(soon())?,
//!     Ok(info) => println!("{:?}, {} bytes", info.state, info.memory_actual_size),
//!     Err(error) if error.is_vm_missing() => println!("no VM"),
//!     Err(error) => return Err(error),
//! }
//! vmm.resize(&Resize { desired_balloon: Some(0), ..Resize::default() }, soon())?;
//! # Ok(())
//! # }
//! ```
//!
//! # What the server is like
//!
//! One thread serves all connections, one request after the other, and hands each to one
//! other thread. A call therefore waits for whatever runs already: a ping for a restore.
//! There is room for ten connections; the eleventh is refused
//! ([`ApiError::is_too_many_connections`]), so drop clients that are not needed.
//!
//! # What an answer means
//!
//! Some calls answer before the thing has happened: [`Client::remove_device`] and
//! [`Client::resize`] wait for the guest, [`Client::send_migration`] (v53) runs on. Their
//! outcome is told by [events](super::events) or [`Client::info`]. After a lost answer
//! ([`ApiError::may_have_run`]) read the state before repeating a call: pausing a paused VM
//! is an error.

mod body;
mod call;
mod client;
mod error;
mod operation;
mod version;

pub use body::{
    Counters, Destination, DeviceNode, MemoryRestoreMode, MigrationMode, PciDeviceInfo, Ping,
    ReceiveMigration, RemoveDevice, Resize, ResizeDisk, ResizeZone, RestoreConfig, RestoredNet,
    SendMigration, TimeoutStrategy, VmInfo, VmState,
};
pub use call::{Answer, Call, MAX_BODY_BYTES, PREFERRED_BODY_BYTES, Restore, file_url};
pub use client::Client;
pub use error::{ApiError, Chain};
pub use operation::Operation;
pub use version::{Features, Support, Version, VersionError};

#[cfg(doc)]
use crate::deadline::Deadline;

#[cfg(test)]
mod tests;
