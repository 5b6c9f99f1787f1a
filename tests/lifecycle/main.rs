//! Sandboxes with the stand-in: the whole story, every step failing in turn, hosts that die.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../netlab/mod.rs"]
mod netlab;
#[path = "../support/real_vmm.rs"]
mod real_vmm;

mod crash;
mod deaths;
mod expected;
mod faults;
mod lab;
mod many;
mod own_memory;
mod real;
mod reboot;
mod stocked;
mod story;
mod warm;
