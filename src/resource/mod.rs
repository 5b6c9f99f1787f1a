//! Kernel objects that a sandbox needs, and how each is undone.

pub(crate) mod claim;
pub mod disk;
pub mod ledger;
pub mod net;
pub(crate) mod private;
pub(crate) mod refill;
pub mod slot;
