//! The stand-in as rewake itself starts and asks it: descriptors in place of paths.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::resource::ledger::Ledger;
use rewake::vmm::api::{Client, RestoreConfig, RestoredNet};
use rewake::vmm::events::EventParser;
use rewake::vmm::launch::{ApiSocket, LaunchSpec, Vmm, launch};
use serde_json::json;

use super::process::{Scratch, guest, parse, read_response};

fn spec(settings: &[&str]) -> LaunchSpec {
    let words = settings.iter().flat_map(|setting| ["--sim", setting]);
    LaunchSpec {
        program: env!("CARGO_BIN_EXE_rewake-sim").into(),
        args: words.map(str::to_owned).collect(),
        ..LaunchSpec::default()
    }
}

/// The ledger ends the process when the test is over, however it ends.
struct Started {
    _ledger: Ledger,
    vmm: Vmm,
    scratch: Scratch,
}

#[test]
fn serves_what_was_queued_before_it_was_started() {
    let scratch = Scratch::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (socket, mut stream) = ApiSocket::bind(&scratch.path("api")).unwrap();
    let config =
        json!({"payload": {"kernel": "/dev/null"}, "memory": {"size": 2 << 20}}).to_string();
    let queued = format!(
        "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\nPUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{config}PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n",
        config.len()
    );
    stream.write_all(queued.as_bytes()).unwrap();
    let spec = spec(&["envd-listener=fd:5", "pattern-pages=8"]);
    let inherited = [listener.as_fd()];
    let mut ledger = Ledger::new();
    let vmm = launch(&spec, socket, None, &inherited, &mut ledger).unwrap();
    let mut started = Started {
        _ledger: ledger,
        vmm,
        scratch,
    };
    drop(listener);
    stream.set_nonblocking(false).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    for status in [200, 204, 204] {
        let answer = parse(&read_response(&mut stream).unwrap());
        assert_eq!(answer.status, status, "{answer:?}");
    }
    assert_eq!(guest(address, "GET", "/health", None).unwrap().status, 200);
    let deadline = Deadline::after(Duration::from_secs(20));
    let mut client = Client::connect(started.scratch.path("api"), deadline).unwrap();
    assert_eq!(client.version().to_string(), "53.0.0");
    client.shutdown_vmm(deadline).unwrap();
    started.vmm.process().wait().unwrap();
    let mut bytes = Vec::new();
    started.vmm.events.read_to_end(&mut bytes).ok();
    let mut names = Vec::new();
    EventParser::new().feed(&bytes, |event| names.push(event.unwrap().event.clone()));
    assert_eq!(
        names,
        [
            "starting", "booting", "booted", "shutdown", "deleted", "shutdown"
        ]
    );
    assert!(
        started.scratch.path("api").exists(),
        "not its own to remove"
    );
}

#[test]
fn root_a_tap_can_travel_as_a_descriptor() {
    use rewake_sys::tun::{Tap, TapOptions};
    let name = "root_a_tap_can_travel_as_a_descriptor";
    super::netns::in_netns(name, || {
        let mut first = super::netns::start(&[]);
        first.create_and_boot(&json!({"net": super::netns::net()}));
        let before = super::netns::state();
        let dir = first.pause_and_snapshot("s");
        first.put("vmm.shutdown");
        first.wait();
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        let net = config["net"][0].as_object_mut().unwrap();
        net.remove("tap");
        net.insert("fds".to_owned(), json!([-1]));
        std::fs::write(&path, config.to_string()).unwrap();

        let scratch = Scratch::new();
        let (socket, stream) = ApiSocket::bind(&scratch.path("api")).unwrap();
        drop(stream);
        let mut ledger = Ledger::new();
        let vmm = launch(&spec(&[]), socket, None, &[], &mut ledger).unwrap();
        let started = Started {
            _ledger: ledger,
            vmm,
            scratch,
        };
        let deadline = Deadline::after(Duration::from_secs(20));
        let mut client = Client::connect(started.scratch.path("api"), deadline).unwrap();
        let options = TapOptions {
            vnet_header: true,
            multi_queue: false,
        };
        let tap = Tap::open("tap0", options).unwrap();
        let body = RestoreConfig {
            source_url: format!("file://{}", dir.display()),
            net_fds: Some(vec![RestoredNet {
                id: "_net0".to_owned(),
                num_fds: 1,
            }]),
            resume: true,
            ..RestoreConfig::default()
        };
        let without = RestoreConfig {
            net_fds: None,
            ..body.clone()
        };
        let refused = client.restore(&without, &[], deadline).unwrap_err();
        assert!(
            refused.says("Net id _net0 is associated with FDs and is required"),
            "{refused}"
        );
        client.restore(&body, &[tap.as_fd()], deadline).unwrap();
        drop(tap);
        super::lives::goes_on(&before, &super::netns::state(), "by descriptor");
    });
}

#[test]
fn restores_from_its_command_line_or_ends_with_status_one() {
    let mut first = super::process::Vmm::start(&[]);
    first.create_and_boot(&json!({}));
    let before = first.guest_state();
    let dir = first.pause_and_snapshot("s");
    first.put("vmm.shutdown");
    first.wait();
    let command = |url: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rewake-sim"));
        command.env("REWAKE_SIM", "envd=tcp:127.0.0.1:0");
        command.args([
            "--restore",
            &format!("source_url={url},resume=on,memory_restore_mode=ondemand"),
        ]);
        command
    };
    let scratch = Scratch::new();
    let mut good = command(&format!("file://{}", dir.display()));
    good.arg("--sim-envd-addr-file").arg(scratch.path("envd"));
    let second = super::process::Vmm::spawn(scratch, good);
    super::lives::goes_on(&before, &second.guest_state(), "--restore");
    let mut bad = super::process::Vmm::spawn(Scratch::new(), command("file:///nonexistent"));
    assert_eq!(bad.wait().code(), Some(1));
    assert!(
        bad.log_text().contains("Destination is not a directory"),
        "{}",
        bad.log_text()
    );
    assert!(
        bad.scratch.path("api").exists(),
        "left behind, as the original does"
    );
}
