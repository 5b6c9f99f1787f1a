//! The probe guest: its network and its words run on the host, its image under Cloud
//! Hypervisor.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

// The guest's own sources. What they hold for the machine they run on is not used here.
#[path = "../../fixtures/guest/src/agent.rs"]
#[allow(unreachable_pub, dead_code)]
mod agent;
#[path = "../../fixtures/guest/src/http.rs"]
#[allow(unreachable_pub, dead_code)]
mod http;
#[path = "../../fixtures/guest/src/json.rs"]
#[allow(unreachable_pub, dead_code)]
mod json;
#[path = "../../fixtures/guest/src/link.rs"]
#[allow(unreachable_pub, dead_code)]
mod link;
#[path = "../../fixtures/guest/src/tcp.rs"]
#[allow(unreachable_pub, dead_code)]
mod tcp;

mod frames;
mod image;
mod kit;
mod lab;
mod life;
mod memory;
mod words;
