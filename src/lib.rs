//! rewake brings frozen Cloud Hypervisor (CH) virtual machines back to life.
//!
//! A snapshot goes in; a running sandbox whose guest agent has answered comes out. The
//! modules stand in the order in which a restore passes through them:
//!
//! ```text
//! snapshot ──► plan ──► resource ──► vmm ──► restore ──► envd ──► timeline
//! ```
//!
//! Everything is synchronous. One event loop ([`wire::reactor`]) watches sockets, pipes,
//! pidfds and timers; one process is started per restore: Cloud Hypervisor itself.

#![forbid(unsafe_code)]

// Vocabulary: validated names, units, the one absolute time budget.
pub mod deadline;
pub mod ids;
pub mod units;
// A shim between the library and the kernel, for tests.
pub mod fault;
// Talking over sockets: HTTP/1.1 codec, transport, event loop.
pub mod wire;
// Cloud Hypervisor's configuration, in its own spelling.
pub mod vm_config;
// 1: open, check and rewrite a snapshot directory.
pub mod snapshot;
// 2: pure: snapshot and options to what is to be made, as data.
pub mod plan;
// 3: kernel objects and how each is undone.
pub mod resource;
// 4: the Cloud Hypervisor process, its API and its events.
pub mod vmm;
// 5: the one sequence that both callers share.
pub mod restore;
// What guest memory costs the host.
pub mod memory;
// 6: the guest agent.
pub mod envd;
// Frozen guests to launch sandboxes from.
pub mod template;
// 7, 8: sandboxes: what they are, what became of them.
pub mod sandbox;
// The front door.
pub mod host;
// A virtual machine of our own to try all of it on.
pub mod probe_guest;
// What the machine has and lacks.
pub mod doctor;
// The phases of every operation, with times.
pub mod timeline;
// The same for a viewer.
pub mod trace;
// A stand-in for the `cloud-hypervisor` binary, for machines without KVM and for tests.
#[cfg(feature = "sim")]
pub mod sim;

/// The example of the README, so that it keeps compiling.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
