//! Readiness over a slot's tap, from sockets made inside its namespace.

#![allow(clippy::unwrap_used, reason = "a test fails where it fails")]

mod netlab;

use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use netlab::guest::{self, Guest};
use netlab::{Lab, soon};
use rewake::deadline::Deadline;
use rewake::envd::hedge::Hedge;
use rewake::envd::ready::await_ready;
use rewake::envd::socket::InNetns;
use rewake::fault::Faults;
use rewake_sys::netns;

const HEALTH: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 19\r\n\
    connection: close\r\n\r\n{\"version\":\"0.2.0\"}";

/// One connection, as the kernel makes it: the time until it stood.
fn single_connect(netns: &OwnedFd, to: SocketAddr) -> Duration {
    let begun = Instant::now();
    let connected = netns::run_in(netns.as_fd(), || {
        TcpStream::connect_timeout(&to, Duration::from_secs(5)).map(drop)
    });
    connected.unwrap().unwrap();
    begun.elapsed()
}

#[test]
fn root_a_tap_that_gets_its_reader_late_costs_milliseconds() {
    let Some(lab) = Lab::new("root_a_tap_that_gets_its_reader_late_costs_milliseconds") else {
        return;
    };
    let host = lab.open(Faults::NONE);
    let slot = host.create("test", soon()).unwrap();
    let to = SocketAddrV4::new(host.config().guest_address, guest::PORT);
    let netns = slot.netns().try_clone_to_owned().unwrap();
    let sockets = Arc::new(InNetns::new(netns.try_clone().unwrap()));
    let deadline = Deadline::after(Duration::from_secs(10));
    let prober =
        thread::spawn(move || await_ready(to.into(), sockets, Hedge::default(), deadline, None));
    // Begun at the same time, and left to the kernel.
    let single = thread::spawn(move || single_connect(&netns, to.into()));
    thread::sleep(Duration::from_millis(40));
    let attached = Instant::now();
    let guest = Guest::start_answering(&slot, host.config(), HEALTH);
    let ready = prober.join().unwrap().unwrap();
    let after = ready.at.saturating_duration_since(attached);
    assert_eq!(ready.agent.version.unwrap().as_str(), "0.2.0");
    assert!(after < Duration::from_millis(500), "{after:?}");
    let single = single.join().unwrap();
    println!(
        "hedged: {after:?} after the reader; one connection: {single:?} in all; {}",
        ready.probes
    );
    drop(guest);
    host.destroy(slot, soon()).unwrap();
}
