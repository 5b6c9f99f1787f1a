//! Templates: the store, what a crash leaves of it, and how templates are made.

#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test that cannot prepare itself may panic"
)]

#[path = "../netlab/faults.rs"]
mod faults;

mod build;
mod crash;
mod place;
mod store;
