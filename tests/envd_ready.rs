//! Readiness probing against a scripted agent on loopback.

#![allow(clippy::unwrap_used, reason = "a test fails where it fails")]

mod fake_envd;

use std::error::Error;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use fake_envd::{Act, FakeEnvd};
use rewake::deadline::Deadline;
use rewake::envd::dialect::Family;
use rewake::envd::hedge::Hedge;
use rewake::envd::ready::{Ready, ReadyError, await_ready, budget};
use rewake::envd::socket::CurrentNetns;
use rewake::envd::text::GuestText;
use rewake::envd::watch::Interrupt;
use rewake::units::Bytes;

fn probe(address: SocketAddr, limit: Duration) -> Result<Ready, ReadyError> {
    let sockets = Arc::new(CurrentNetns);
    await_ready(
        address,
        sockets,
        Hedge::default(),
        Deadline::after(limit),
        None,
    )
}

const HEALTH: &str = "GET /health";

fn healthy() -> Act {
    Act::json(r#"{"version":"0.2.0"}"#)
}

#[test]
fn either_healthy_answer_is_ready_and_tells_the_family() {
    let with_version = b"HTTP/1.1 204 No Content\r\nX-Envd-Version: 0.6.13\r\n\r\n";
    for (name, act, family, version) in [
        ("Wrenn", healthy(), Family::Wrenn, Some("0.2.0")),
        ("E2B", Act::no_content(), Family::E2b, None),
        (
            "E2B, named",
            Act::Send(with_version.to_vec()),
            Family::E2b,
            Some("0.6.13"),
        ),
        ("no body", Act::status("200 OK"), Family::Wrenn, None),
    ] {
        let guest = FakeEnvd::start(&[(HEALTH, &[act])]);
        let ready = probe(guest.address, Duration::from_secs(5)).unwrap();
        assert_eq!(ready.agent.family, family, "{name}");
        let seen = ready.agent.version.as_ref().map(GuestText::as_str);
        assert_eq!(seen, version, "{name}");
        let probes = ready.probes;
        let answered = probes.first_syn_answered.unwrap();
        assert!(probes.begun <= answered, "{name}");
        assert!(answered <= probes.first_byte.unwrap(), "{name}");
        assert!(probes.first_byte.unwrap() <= ready.at, "{name}");
    }
}

#[test]
fn a_bad_answer_costs_one_probe_and_no_more() {
    let endless = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc".to_vec();
    for (name, act) in [
        ("close at once", Act::Close),
        ("silence", Act::Silence),
        ("endless body", Act::Endless(endless)),
        (
            "endless head",
            Act::Endless(b"HTTP/1.1 200 OK\r\nx: ".to_vec()),
        ),
        ("garbage", Act::Send(b"hello\r\n\r\n".to_vec())),
        ("reset in mid-body", Act::SendAndReset(head.clone())),
        ("end in mid-body", Act::Send(head)),
        (
            "trickle",
            Act::Trickle(
                b"HTTP/1.1 200 OK\r\n\r\n".repeat(50),
                Duration::from_millis(20),
            ),
        ),
        ("not ready", Act::status("503 Service Unavailable")),
        ("not found", Act::status("404 Not Found")),
        (
            "redirect",
            Act::Send(b"HTTP/1.1 302 Found\r\nlocation: /\r\n\r\n".to_vec()),
        ),
    ] {
        let guest = FakeEnvd::start(&[(HEALTH, &[act, healthy()])]);
        let begun = Instant::now();
        let ready = probe(guest.address, Duration::from_secs(5));
        let ready = ready.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(ready.agent.version.unwrap().as_str(), "0.2.0", "{name}");
        let took = begun.elapsed();
        assert!(took < Duration::from_millis(800), "{name}: {took:?}");
    }
}

#[test]
fn a_service_that_appears_late_is_found_within_milliseconds() {
    // Reserve a port, then listen on it only later: until then it is refused.
    let reserved = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = reserved.local_addr().unwrap();
    drop(reserved);
    let late = thread::spawn(move || {
        thread::sleep(Duration::from_millis(150));
        let listener = TcpListener::bind(address).unwrap();
        let up = Instant::now();
        let guest = FakeEnvd::serve(listener, &[(HEALTH, &[healthy()])]);
        (guest, up)
    });
    let ready = probe(address, Duration::from_secs(5)).unwrap();
    let (_guest, up) = late.join().unwrap();
    let after = ready.at.saturating_duration_since(up);
    assert!(after < Duration::from_millis(200), "{after:?}");
    assert!(ready.probes.refused > 10, "{}", ready.probes);
}

/// A listener whose queue of connections is full: the kernel drops every further SYN without
/// a word, as a tap without carrier does.
fn deaf_listener() -> (TcpListener, Vec<TcpStream>) {
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    listen(&socket, 0).unwrap();
    let listener = TcpListener::from(socket);
    // A backlog of 0 still holds one.
    let filler = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (listener, vec![filler])
}

#[test]
fn lost_syns_are_made_up_for_long_before_the_kernel_repeats_one() {
    let (listener, fillers) = deaf_listener();
    let address = listener.local_addr().unwrap();
    let single = thread::spawn(move || {
        let begun = Instant::now();
        let stream = TcpStream::connect(address);
        (stream.is_ok(), begun.elapsed())
    });
    let late = thread::spawn(move || {
        thread::sleep(Duration::from_millis(150));
        drop(fillers);
        let up = Instant::now();
        let guest = FakeEnvd::serve(listener, &[(HEALTH, &[healthy()])]);
        (guest, up)
    });
    let ready = probe(address, Duration::from_secs(5)).unwrap();
    let (_guest, up) = late.join().unwrap();
    let after = ready.at.saturating_duration_since(up);
    assert!(after < Duration::from_millis(300), "{after:?}");
    assert!(ready.probes.first_syn_answered.unwrap() >= up);
    let (connected, took) = single.join().unwrap();
    assert!(connected && took > Duration::from_millis(900), "{took:?}");
}

#[test]
fn a_guest_slower_than_every_limit_is_not_starved() {
    // Longer than the floor of the answer limit: a fixed limit would give up for ever.
    let slow = Duration::from_millis(700);
    assert!(slow > Hedge::default().answer_floor);
    let guest = FakeEnvd::start(&[(HEALTH, &[healthy().after(slow)])]);
    let ready = probe(guest.address, Duration::from_secs(10)).unwrap();
    let took = ready.at - ready.probes.begun;
    assert!(took < slow * 3, "{took:?}");
    assert!(ready.probes.sent < 20, "{}", ready.probes);
}

#[test]
fn probes_in_flight_are_bounded() {
    let guest = FakeEnvd::start(&[(HEALTH, &[Act::Silence])]);
    let error = probe(guest.address, Duration::from_millis(1200)).unwrap_err();
    let ReadyError::Timeout { probes, last } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(u64::try_from(guest.connections()).unwrap(), probes.sent);
    assert!(probes.sent < 20, "{probes}");
    assert!(last.is_some(), "{probes}");
}

#[test]
fn a_deadline_is_kept_and_the_error_tells_what_was_tried() {
    let reserved = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = reserved.local_addr().unwrap();
    drop(reserved);
    let garbage = FakeEnvd::start(&[(HEALTH, &[Act::Send(b"hello\r\n\r\n".to_vec())])]);
    let busy = FakeEnvd::start(&[(HEALTH, &[Act::status("503 Service Unavailable")])]);
    for (name, address, says) in [
        ("refused", refused, "none connected"),
        ("garbage", garbage.address, "some connected"),
        ("busy", busy.address, "not ready"),
    ] {
        let begun = Instant::now();
        let error = probe(address, Duration::from_millis(200)).unwrap_err();
        let took = begun.elapsed();
        assert!(took < Duration::from_millis(300), "{name}: {took:?}");
        assert!(error.to_string().contains(says), "{name}: {error}");
        assert!(error.source().is_some(), "{name}");
    }
}

#[test]
fn the_death_of_the_vmm_ends_the_wait_at_once() {
    let guest = FakeEnvd::start(&[(HEALTH, &[Act::Silence])]);
    let mut vmm = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&vmm);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    let killer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(60));
        vmm.kill().unwrap();
        let died = Instant::now();
        vmm.wait().unwrap();
        died
    });
    let sockets = Arc::new(CurrentNetns);
    let deadline = Deadline::after(Duration::from_secs(10));
    let hedge = Hedge::default();
    let error = await_ready(guest.address, sockets, hedge, deadline, Some(pidfd.as_fd()));
    let ended = Instant::now();
    let error = error.unwrap_err();
    let why = Interrupt::VmmExited;
    assert!(
        matches!(&error, ReadyError::Interrupted { why: w, .. } if *w == why),
        "{error:?}"
    );
    let late = ended.saturating_duration_since(killer.join().unwrap());
    assert!(late < Duration::from_millis(100), "{late:?}");
}

#[test]
fn a_source_without_sockets_is_an_error_and_not_a_wait() {
    let sockets = Arc::new(|| Err(std::io::Error::other("none left")));
    let address = SocketAddr::from(([127, 0, 0, 1], 9));
    let deadline = Deadline::after(Duration::from_secs(10));
    let begun = Instant::now();
    let error = await_ready(address, sockets, Hedge::default(), deadline, None).unwrap_err();
    assert!(matches!(error, ReadyError::Sockets(_)), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[test]
fn the_budget_grows_with_memory() {
    for (gib, seconds) in [(1, 120), (15, 120), (16, 128), (20, 160)] {
        assert_eq!(budget(Bytes::gib(gib)).as_secs(), seconds, "{gib} GiB");
    }
}
