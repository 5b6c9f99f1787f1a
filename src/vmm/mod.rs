//! The Cloud Hypervisor process: its API, its launch, its events.

pub mod api;
pub mod events;
pub mod launch;
pub mod log;
pub mod orphan;
