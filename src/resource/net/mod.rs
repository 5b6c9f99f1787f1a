//! Network slots: a namespace with a tap for the VM, a veth pair to the host, fixed addresses.
//!
//! ```text
//!   guest ── tap0 │ namespace rw-<i> │ eth0 ── rwv<i> │ host ── uplink
//!   169.254.0.21    .22        10.12.0.0+2i+1   10.12.0.0+2i
//! ```
//!
//! A slot is built by a thread that makes the namespace, pins it and works through a few
//! netlink batches; no other thread ever changes its namespace and no other program is
//! started. What it leaves in the kernel is on record before it exists, in the slot's file
//! ([`crate::resource::slot`]), as [`NetStep`]s that say how each piece is recognised and
//! removed.

mod address;
mod check;
pub mod conntrack;
mod create;
mod doctor;
mod error;
mod host;
mod link;
mod namespace;
mod pending;
mod pool;
mod step;
mod sweep;
mod teardown;
mod walls;

pub use address::{AddressError, IfNameText, Ipv4Range, Mac, NetConfig, SlotPlan};
pub use create::{CreateError, Slot};
pub use error::{NetError, NetLeftover, SlotFailure};
pub use host::{HostNet, RouteOverlap, Uplink};
pub use pending::{PendingError, PendingSlot};
pub use pool::{PoolOptions, PoolStats, SlotPool};
pub use step::NetStep;
pub use sweep::SweepReport;
pub use walls::ForwardDrop;
