//! The commands about sandboxes, as their user runs them: with the stand-in, in a network
//! namespace of their own.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../netlab/mod.rs"]
mod netlab;
#[path = "../support/real_vmm.rs"]
mod real_vmm;

mod failures;
mod place;
mod real;
mod story;
mod words;
