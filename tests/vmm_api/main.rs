//! `vmm::api` against a scripted server, and against the real Cloud Hypervisor.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod client;
mod kvm;
mod pvh;
mod scratch;
mod server;

use std::time::Duration;

use rewake::deadline::Deadline;

/// Long enough for a loaded machine; no test waits for it to pass.
fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}
