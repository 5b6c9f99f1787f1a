//! Disks and processes that die, or whose system calls fail, at any moment.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

#[path = "disk/crash.rs"]
mod crash;
mod disklab;
#[cfg(feature = "cli")]
#[path = "disk/syscalls.rs"]
mod syscalls;
