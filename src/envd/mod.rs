//! The guest agent ("envd"): readiness, `/init`, memory preload.
//!
//! Three dialects answer on port 49983 ([`dialect`]): Wrenn's agent of the Cloud Hypervisor
//! era, its predecessor, and E2B's. One client serves all.
//!
//! What makes this more than a handful of requests is that a restored guest *remembers*.
//! Lifecycle id, newest timestamp, access token, variables, preload state and open
//! connections are part of the memory image. Until an `/init` with a new lifecycle id was
//! acknowledged, whatever the agent says describes the life that was captured. Three rules
//! follow: `/init` comes first; nothing the guest said before it counts; no connection
//! outlives its exchange, since a peer that is rolled back falls silent without RST or FIN.

mod call;
pub mod client;
pub mod dialect;
pub mod hedge;
pub mod init;
pub mod materialise;
pub mod preload;
pub mod ready;
pub mod reply;
pub mod socket;
pub mod text;
pub mod watch;

/// The TCP port that every dialect listens on.
pub const PORT: u16 = 49983;
