//! The guest on a real tap, in a network namespace of the test's own.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::{Duration, Instant};

use rewake_sys::tun::{Tap, TapOptions};
use serde_json::{Value, json};

use super::process::{Scratch, Vmm, guest, read_response};

const GUEST: SocketAddr = SocketAddr::new(
    std::net::IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 0, 21)),
    49_983,
);
const TAP_MAC: [u8; 6] = [2, 0xfc, 0, 0, 0, 6];

/// Runs `work` in a fresh namespace with `tap0` at 169.254.0.22/30, or skips aloud.
pub(crate) fn in_netns(test: &str, work: impl FnOnce() + Send) {
    let outcome = rewake_sys::netns::run_in_new(|_netns: OwnedFd| -> Result<(), String> {
        let options = TapOptions {
            vnet_header: true,
            multi_queue: false,
        };
        let tap = Tap::open("tap0", options).map_err(|error| error.to_string())?;
        tap.set_persistent(true).unwrap();
        tap.set_hardware_address(TAP_MAC).unwrap();
        drop(tap);
        for words in [
            "addr add 169.254.0.22/30 dev tap0",
            "link set tap0 up",
            "link set lo up",
        ] {
            let done = Command::new("ip").args(words.split(' ')).status();
            if !done.as_ref().is_ok_and(std::process::ExitStatus::success) {
                return Err(format!("ip {words}: {done:?}"));
            }
        }
        work();
        Ok(())
    });
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => eprintln!("SKIP {test}: {reason}"),
        Err(error) => eprintln!("SKIP {test}: {error}"),
    }
}

pub(crate) fn start(settings: &[&str]) -> Vmm {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewake-sim"));
    command.env_remove("REWAKE_SIM");
    for setting in settings {
        command.args(["--sim", setting]);
    }
    Vmm::spawn(Scratch::new(), command)
}

pub(crate) fn net() -> Value {
    json!([{"tap": "tap0", "mac": "02:fc:00:00:00:05"}])
}

/// Asks until the guest answers: an attempt may hit the tap before it has its reader.
pub(crate) fn state() -> Value {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match ask("/sim/state", Duration::from_millis(300)) {
            Ok(answer) => return answer,
            Err(error) => assert!(Instant::now() < until, "the guest does not answer: {error}"),
        }
    }
}

fn ask(path: &str, patience: Duration) -> std::io::Result<Value> {
    let mut stream = TcpStream::connect_timeout(&GUEST, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(super::process::parse(&bytes).json())
}

#[test]
fn root_a_guest_on_a_tap_lives_on_in_every_memory_mode() {
    in_netns(
        "root_a_guest_on_a_tap_lives_on_in_every_memory_mode",
        || {
            for (mode, setting) in [
                ("Copy", "version=53"),
                ("OnDemand", "version=53"),
                ("OnDemand", "version=52"),
                ("Map", "version=53"),
                ("Shared", "version=53"),
            ] {
                let mut vmm = start(&[setting]);
                let mut memory = json!({"size": 16 << 20});
                if mode == "Shared" {
                    let ram = vmm.scratch.path("ram");
                    std::fs::File::create(&ram)
                        .unwrap()
                        .set_len(16 << 20)
                        .unwrap();
                    let zone = json!({"id": "mem0", "size": 16 << 20, "file": ram, "shared": true});
                    memory = json!({"size": 0, "zones": [zone]});
                }
                vmm.create_and_boot(&json!({"net": net(), "memory": memory}));
                let before = state();
                assert_eq!(guest(GUEST, "GET", "/health", None).unwrap().status, 200);
                let dir = vmm.pause_and_snapshot("s");
                vmm.must("vm.delete", None);
                if mode == "Map" {
                    super::lives::map_memory(&dir, 16 << 20);
                }
                let restore_mode = if mode == "OnDemand" { mode } else { "Copy" };
                let url = format!("file://{}", dir.display());
                let body =
                    json!({"source_url": url, "resume": true, "memory_restore_mode": restore_mode});
                vmm.must("vm.restore", Some(&body));
                super::lives::goes_on(&before, &state(), &format!("{mode} {setting}"));
                assert_eq!(vmm.put("vmm.shutdown").status, 200);
                assert_eq!(vmm.wait().code(), Some(0));
                let names = vmm.event_names();
                let find = |name: &str| names.iter().rposition(|n| n == name);
                assert!(
                    find("virtio-device/activated") < find("vm/restoring"),
                    "{names:?}"
                );
            }
        },
    );
}

#[test]
fn root_frames_wait_while_the_guest_is_paused() {
    in_netns("root_frames_wait_while_the_guest_is_paused", || {
        let mut vmm = start(&[]);
        vmm.create_and_boot(&json!({"net": net()}));
        let before = state();
        vmm.must("vm.pause", None);
        let error = ask("/sim/state", Duration::from_millis(200)).unwrap_err();
        let silent = matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock);
        assert!(silent, "{error}");
        let asked = Instant::now();
        let waiting = std::thread::scope(|scope| {
            let answer = scope.spawn(|| ask("/sim/state", Duration::from_secs(5)));
            std::thread::sleep(Duration::from_millis(50));
            vmm.must("vm.resume", None);
            answer.join().unwrap()
        });
        super::lives::goes_on(&before, &waiting.unwrap(), "resumed");
        // Not by the kernel's second attempt, which comes after a second.
        assert!(
            asked.elapsed() < Duration::from_millis(900),
            "{:?}",
            asked.elapsed()
        );
    });
}

#[test]
fn root_a_tap_that_is_taken_is_busy_and_host_mac_is_pushed() {
    in_netns(
        "root_a_tap_that_is_taken_is_busy_and_host_mac_is_pushed",
        || {
            let mut first = start(&[]);
            first.create_and_boot(&json!({"net": net()}));
            let info = first.call("GET", "vm.info", None).json();
            assert_eq!(info["config"]["net"][0]["host_mac"], "02:fc:00:00:00:06");
            let mut second = start(&[]);
            let config = json!({"payload": {"kernel": "/dev/null"}, "net": net()});
            second.must("vm.create", Some(&config));
            let wanted = "[\"Error from API\",\"The VM could not boot\",\"Error from device manager\",\"Cannot create virtio-net device\",\"Failed to open taps\",\"Open tap device failed\",\"Unable to configure tap interface\",\"Device or resource busy (os error 16)\"]";
            let refused = second.put("vm.boot");
            assert_eq!((refused.status, refused.body.as_str()), (500, wanted));
            let dir = first.pause_and_snapshot("s");
            first.must("vm.delete", None);
            let options = TapOptions {
                vnet_header: true,
                multi_queue: false,
            };
            let tap = Tap::open("tap0", options).unwrap();
            tap.set_hardware_address([2, 0, 0, 0, 0, 1]).unwrap();
            drop(tap);
            let url = format!("file://{}", dir.display());
            first.must("vm.restore", Some(&json!({"source_url": url})));
            first.must("vm.delete", None);
            let tap = Tap::open("tap0", options).unwrap();
            assert_eq!(tap.hardware_address().unwrap(), TAP_MAC);
        },
    );
}

#[test]
fn root_a_connection_into_a_rolled_back_guest_is_a_black_hole() {
    in_netns(
        "root_a_connection_into_a_rolled_back_guest_is_a_black_hole",
        || {
            let mut vmm = start(&[]);
            vmm.create_and_boot(&json!({"net": net()}));
            state();
            let mut pooled = TcpStream::connect(GUEST).unwrap();
            pooled
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            let request = b"GET /health HTTP/1.1\r\nHost: g\r\n\r\n";
            pooled.write_all(request).unwrap();
            read_response(&mut pooled).unwrap();
            let dir = vmm.pause_and_snapshot("s");
            vmm.must("vm.delete", None);
            let url = format!("file://{}", dir.display());
            vmm.must(
                "vm.restore",
                Some(&json!({"source_url": url, "resume": true})),
            );
            state();
            pooled.write_all(request).unwrap();
            pooled
                .set_read_timeout(Some(Duration::from_millis(300)))
                .unwrap();
            let error = pooled.read(&mut [0; 16]).unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::WouldBlock,
                "neither answer nor reset: {error}"
            );
        },
    );
}

#[test]
fn root_lost_connection_attempts_come_back_after_a_second() {
    in_netns(
        "root_lost_connection_attempts_come_back_after_a_second",
        || {
            let mut vmm = start(&["fault=guest:drop-syn=1"]);
            vmm.create_and_boot(&json!({"net": net()}));
            let asked = Instant::now();
            ask("/sim/state", Duration::from_secs(10)).unwrap();
            assert!(
                asked.elapsed() > Duration::from_millis(900),
                "{:?}",
                asked.elapsed()
            );
        },
    );
}

#[test]
fn root_many_short_connections_find_a_socket() {
    in_netns("root_many_short_connections_find_a_socket", || {
        let mut vmm = start(&[]);
        vmm.create_and_boot(&json!({"net": net()}));
        state();
        for round in 0..200 {
            let answer = ask("/health", Duration::from_millis(900));
            assert!(answer.is_ok(), "round {round}: {answer:?}");
        }
    });
}
