//! The stand-in, `rewake-sim`, from outside: the answers that Cloud Hypervisor gave to the
//! same requests, lives that go on through snapshots, and orders to fail.

#![cfg(feature = "sim")]
// Helpers outside of test functions may fail the test they serve.
#![allow(clippy::unwrap_used)]

#[path = "sim/process.rs"]
mod process;

#[path = "sim/faults.rs"]
mod faults;
#[path = "sim/launched.rs"]
mod launched;
#[path = "sim/lives.rs"]
mod lives;
#[path = "sim/netns.rs"]
mod netns;
#[path = "sim/real.rs"]
mod real;
#[path = "sim/replay.rs"]
mod replay;
