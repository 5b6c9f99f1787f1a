//! Snapshot directories: those of real Cloud Hypervisors, and hostile ones.

#![allow(clippy::unwrap_used)] // Test support: a panic is the report.

mod captured;
mod choice;
mod hostile;
mod kvm;
mod layout;
mod rewrite;
mod run_dir;
mod scratch;
mod seal;
