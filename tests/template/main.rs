//! Templates: the store, what a crash leaves of it, and how templates are made.

#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test that cannot prepare itself may panic"
)]

#[path = "../netlab/faults.rs"]
mod faults;

#[allow(
    dead_code,
    reason = "shared by test binaries that each use a part of it"
)]
#[path = "../probe_guest/lab.rs"]
mod lab;

mod build;
mod command;
mod crash;
mod import;
mod place;
mod real;
mod store;
