//! Readiness probing against a scripted agent on loopback.

mod fake_envd;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use fake_envd::{Act, FakeEnvd};
use rewake::deadline::Deadline;
use rewake::envd::dialect::Family;
use rewake::envd::hedge::Hedge;
use rewake::envd::ready::{Ready, ReadyError, await_ready};
use rewake::envd::socket::CurrentNetns;
use rewake::envd::text::GuestText;

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
        assert!(took < Duration::from_millis(400), "{name}: {took:?}");
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
    assert!(after < Duration::from_millis(60), "{after:?}");
    assert!(ready.probes.refused > 10, "{}", ready.probes);
}
