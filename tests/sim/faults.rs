//! Orders to fail: each does what it says, and nothing else.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use serde_json::json;

use super::process::{Vmm, read_response};

const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n";

/// The bytes a ping gets within `patience`, and whether the connection was closed.
fn ping(vmm: &mut Vmm, patience: Duration) -> (Vec<u8>, bool) {
    let mut stream = vmm.connect();
    stream.write_all(PING).unwrap();
    stream.set_read_timeout(Some(patience)).unwrap();
    let mut bytes = Vec::new();
    let closed = loop {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer) {
            Ok(0) => break true,
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
            Err(_) => break false,
        }
    };
    (bytes, closed)
}

#[test]
fn dies_on_order_at_any_phase() {
    for (fault, endpoint, signal, code) in [
        ("on-create:die", "vm.create", Some(9), None),
        ("on-boot:exit=0", "vm.boot", None, Some(0)),
        ("after-paused:exit=1", "vm.pause", None, Some(1)),
        ("mid-snapshot:die", "vm.snapshot", Some(9), None),
        ("on-restore:die", "vm.restore", Some(9), None),
        ("after-restored:die", "vm.restore", Some(9), None),
    ] {
        let mut vmm = Vmm::start(&[&format!("fault={fault}"), "pattern-pages=4"]);
        let kernel = json!({"payload": {"kernel": "/dev/null"}, "memory": {"size": 1 << 20}});
        let url = json!({"destination_url": vmm.scratch.url("s")});
        let source = json!({"source_url": vmm.scratch.url("s")});
        for (step, body) in [
            ("vm.create", Some(&kernel)),
            ("vm.boot", None),
            ("vm.pause", None),
            ("vm.snapshot", Some(&url)),
            ("vm.delete", None),
            ("vm.restore", Some(&source)),
        ] {
            if step == endpoint {
                let mut stream = vmm.connect();
                let body = body.map(ToString::to_string).unwrap_or_default();
                let length = if body.is_empty() {
                    String::new()
                } else {
                    format!("Content-Length: {}\r\n", body.len())
                };
                write!(stream, "PUT /api/v1/{step} HTTP/1.1\r\n{length}\r\n{body}").unwrap();
                // The connection breaks with the process.
                let answer = read_response(&mut stream).unwrap_or_default();
                assert!(answer.is_empty(), "{fault}: {answer:?}");
                break;
            }
            vmm.must(step, body);
        }
        let status = vmm.wait();
        assert_eq!((status.signal(), status.code()), (signal, code), "{fault}");
        if fault.starts_with("mid-snapshot") {
            assert!(vmm.scratch.path("s/config.json").exists());
            assert!(
                !vmm.scratch.path("s/state.json").exists(),
                "a torn snapshot"
            );
        }
    }
}

#[test]
fn dies_before_there_is_an_api() {
    for fault in ["start:exit=1", "before-api:exit=1"] {
        let mut vmm = Vmm::start(&[&format!("fault={fault}")]);
        assert_eq!(vmm.wait().code(), Some(1), "{fault}");
        assert!(!vmm.scratch.path("api").exists());
    }
}

#[test]
fn answers_are_spoilt_on_order_and_only_as_often_as_ordered() {
    let short = Duration::from_millis(300);
    for (fault, check) in [
        (
            "garbage",
            (|bytes, _| !bytes.starts_with(b"HTTP")) as fn(&[u8], bool) -> bool,
        ),
        ("truncated", |bytes, closed| {
            closed && bytes.starts_with(b"HTTP/1.1 200") && !bytes.ends_with(b"}")
        }),
        ("drop", |bytes, closed| closed && bytes.is_empty()),
        ("error", |bytes, _| bytes.starts_with(b"HTTP/1.1 500")),
    ] {
        let mut vmm = Vmm::start(&[&format!("fault=on-ping:{fault}:1")]);
        let (bytes, closed) = ping(&mut vmm, short);
        assert!(
            check(&bytes, closed),
            "{fault}: {:?} {closed}",
            String::from_utf8_lossy(&bytes)
        );
        let (bytes, _) = ping(&mut vmm, short);
        assert!(bytes.starts_with(b"HTTP/1.1 200"), "{fault} struck twice");
    }
}

#[test]
fn a_late_answer_holds_up_every_other_connection() {
    let mut vmm = Vmm::start(&["fault=on-info:late=300"]);
    let mut slow = vmm.connect();
    let asked = Instant::now();
    slow.write_all(b"GET /api/v1/vm.info HTTP/1.1\r\n\r\n")
        .unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(vmm.call("GET", "vmm.ping", None).status, 200);
    assert!(
        asked.elapsed() >= Duration::from_millis(300),
        "{:?}",
        asked.elapsed()
    );
    read_response(&mut slow).unwrap();
}

#[test]
fn a_hang_lasts() {
    let mut vmm = Vmm::start(&["fault=on-info:hang"]);
    let mut stuck = vmm.connect();
    stuck
        .write_all(b"GET /api/v1/vm.info HTTP/1.1\r\n\r\n")
        .unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let (bytes, closed) = ping(&mut vmm, Duration::from_millis(300));
    assert_eq!((bytes.len(), closed), (0, false));
    assert!(vmm.child.try_wait().unwrap().is_none());
}

#[test]
fn a_flood_goes_to_the_log() {
    let mut vmm = Vmm::start(&["fault=on-ping:flood=200000:1"]);
    assert_eq!(vmm.call("GET", "vmm.ping", None).status, 200);
    let log = vmm.log_text();
    assert!(log.len() >= 200_000, "{}", log.len());
    assert!(log.contains("stand-in, not Cloud Hypervisor"));
}

#[test]
fn a_crashed_guest_ends_the_process_with_status_zero() {
    let mut vmm = Vmm::start(&["fault=guest:crash"]);
    vmm.create_and_boot(&json!({}));
    assert_eq!(vmm.wait().code(), Some(0));
    assert!(vmm.log_text().contains("VCPU generated error"));
}

#[test]
fn the_guest_misbehaves_on_order() {
    for (fault, check) in [
        (
            "silent",
            (|bytes, ended, _| bytes.is_empty() && !ended) as fn(&[u8], bool, Duration) -> bool,
        ),
        ("slow-first-byte=250", |bytes, _, took| {
            bytes.starts_with(b"HTTP/1.1 200") && took >= Duration::from_millis(250)
        }),
        ("trickle=20", |bytes, ended, _| {
            bytes.len() > 5 && bytes.len() < 60 && !ended
        }),
        ("endless-body", |bytes, _, _| bytes.len() > 1 << 20),
        ("reset-mid-body", |bytes, ended, _| {
            ended && bytes.starts_with(b"HTTP/1.1 200") && !bytes.ends_with(b"}")
        }),
        ("garbage", |bytes, _, _| !bytes.starts_with(b"HTTP")),
        ("never", |bytes, _, _| bytes.is_empty()),
    ] {
        let mut vmm = Vmm::start(&[&format!("fault=guest:{fault}")]);
        vmm.create_and_boot(&json!({}));
        let mut stream = TcpStream::connect(vmm.guest_address()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_millis(400)))
            .unwrap();
        let asked = Instant::now();
        // The guest may be gone before the request is.
        stream.write_all(b"GET /health HTTP/1.1\r\n\r\n").ok();
        let mut bytes = Vec::new();
        let mut buffer = [0; 64 << 10];
        let mut first = None;
        let until = asked + Duration::from_millis(600);
        let ended = loop {
            match stream.read(&mut buffer) {
                Ok(0) => break true,
                Ok(read) => bytes.extend_from_slice(&buffer[..read]),
                Err(error) => break error.kind() == std::io::ErrorKind::ConnectionReset,
            }
            first.get_or_insert(asked.elapsed());
            if bytes.len() > 2 << 20 || Instant::now() > until {
                break false;
            }
        };
        let took = first.unwrap_or_default();
        assert!(
            check(&bytes, ended, took),
            "{fault}: {} bytes, ended {ended}, {took:?}",
            bytes.len()
        );
    }
}

#[test]
fn it_says_what_it_is() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_rewake-sim"))
        .arg("--version")
        .output();
    let output = output.unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "rewake-sim v53.0 (stand-in, not Cloud Hypervisor)\n"
    );
    let mut vmm = Vmm::start(&["version=52"]);
    let ping = vmm.call("GET", "vmm.ping", None).json();
    assert_eq!(ping["version"], "52.0.0");
    assert!(
        ping["build_version"].as_str().unwrap().contains("stand-in"),
        "{ping}"
    );
    vmm.create_and_boot(&json!({}));
    assert!(vmm.guest_state()["stand_in"].is_string());
    let dir = vmm.pause_and_snapshot("s");
    assert!(
        std::fs::read_to_string(dir.join("state.json"))
            .unwrap()
            .contains("a stand-in, not by Cloud Hypervisor")
    );
}

#[test]
fn ends_in_good_order_on_sigterm() {
    let mut vmm = Vmm::start(&[]);
    vmm.create_and_boot(&json!({}));
    let pid = rustix::process::Pid::from_child(&vmm.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(vmm.wait().code(), Some(0));
    let names = vmm.event_names();
    assert_eq!(
        names[names.len() - 3..],
        ["vm/shutdown", "vm/deleted", "vmm/shutdown"]
    );
    assert!(!vmm.scratch.path("api").exists());
    assert!(vmm.scratch.path("api.lock").exists());
}
