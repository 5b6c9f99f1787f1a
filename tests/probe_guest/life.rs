//! The guest's life under a real Cloud Hypervisor: boot, snapshot, restore.

use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::envd::init::Init;
use rewake::plan::MemoryMode;
use rewake::probe_guest::{Settings, expected_checksum};
use rewake::wire::http::{Method, Request};
use serde_json::Value;

use crate::lab::{Lab, Machine};

fn number(value: &Value, key: &str) -> u64 {
    value[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {key} in {value}"))
}

/// The checksum of all pattern pages is the one that the guest's nonce demands.
fn assert_memory_is_whole(machine: &Machine, pages: u64) -> String {
    let nonce = machine.probe()["nonce"].as_str().unwrap().to_owned();
    let sum = machine.json(Method::Get, &format!("/probe/checksum?pages={pages}"));
    let expected = expected_checksum(u64::from_str_radix(&nonce, 16).unwrap(), pages);
    assert_eq!(sum["checksum"], format!("{expected:016x}"), "{sum}");
    assert_eq!(number(&sum, "pages"), pages);
    nonce
}

#[test]
fn root_kvm_boots_and_answers() {
    let Some(mut lab) = Lab::new("root_kvm_boots_and_answers") else {
        return;
    };
    let mut nonces = Vec::new();
    for _ in 0..3 {
        let machine = lab.boot(&Settings::default());
        eprintln!(
            "boot to first answer: {:?} ({})",
            machine.first_answer, machine.ready.probes
        );
        nonces.push(assert_memory_is_whole(&machine, 64));
        let metrics = machine.json(Method::Get, "/metrics");
        let total = number(&metrics, "mem_total_mib");
        assert!((126..=128).contains(&total), "{metrics}");
    }
    nonces.sort();
    nonces.dedup();
    assert_eq!(nonces.len(), 3, "each boot has a nonce of its own");
    let given = Settings {
        nonce: Some(0x1234),
        fill_pages: 8,
        poll: true,
        ..Settings::default()
    };
    assert_eq!(
        assert_memory_is_whole(&lab.boot(&given), 8),
        "0000000000001234"
    );
}

#[test]
fn root_kvm_survives_hundreds_of_abandoned_connects() {
    let Some(mut lab) = Lab::new("root_kvm_survives_hundreds_of_abandoned_connects") else {
        return;
    };
    let machine = lab.boot(&Settings::default());
    let before = number(&machine.probe(), "connections");
    for _ in 0..5 {
        machine.abandon_connects(100);
        assert_eq!(machine.ask(Method::Get, "/health").status, 200);
    }
    let after = number(&machine.probe(), "connections");
    assert!(
        after > before + 100,
        "{before} to {after}: the storm did not reach the guest"
    );
}

#[test]
fn root_kvm_sleeps_while_nothing_is_asked() {
    let Some(mut lab) = Lab::new("root_kvm_sleeps_while_nothing_is_asked") else {
        return;
    };
    for poll in [true, false] {
        let settings = Settings {
            poll,
            ..Settings::default()
        };
        let machine = lab.boot(&settings);
        let before = machine.probe();
        std::thread::sleep(Duration::from_millis(300));
        let after = machine.probe();
        let rounds = number(&after, "counter") - number(&before, "counter");
        // A round is a frame or a sleep: two exchanges and stragglers of the probing.
        assert_eq!(rounds > 200, poll, "{rounds} rounds");
    }
}

/// Freezes a guest that has lived a little and brings it back.
fn comes_back(test: &str, mode: &str) {
    let Some(mut lab) = Lab::new(test) else {
        return;
    };
    if mode == "OnDemand"
        && let Err(error) = rewake_sys::uffd::probe()
    {
        eprintln!("SKIP {test}: userfaultfd: {error}");
        return;
    }
    let machine = lab.boot(&Settings {
        touch_pages: 16,
        ..Settings::default()
    });
    let nonce = assert_memory_is_whole(&machine, 64);
    let init = Init::new();
    let body = init.body(jiff::Timestamp::now()).unwrap();
    let request = Request::new(Method::Post, "/init").json(body).closing();
    assert_eq!(machine.send(&request).status, 204);
    assert_eq!(machine.ask(Method::Post, "/snapshot/prepare").status, 204);
    let before = machine.probe();
    assert_eq!(number(&before, "touched_pages"), 0);
    let snapshot = lab.dir().join("snapshot");
    machine.freeze(&snapshot);

    for round in 0..2 {
        let machine = lab.restore(&snapshot, mode);
        let after = machine.probe();
        eprintln!(
            "{mode} to first answer: {:?} ({})",
            machine.first_answer, machine.ready.probes
        );
        assert_eq!(
            after["nonce"], before["nonce"],
            "{mode}, round {round}: rebooted"
        );
        assert_eq!(after["lifecycle_id"], before["lifecycle_id"]);
        for key in ["counter", "uptime_ticks", "requests", "connections"] {
            assert!(
                number(&after, key) > number(&before, key),
                "{key} of {before} and {after}"
            );
        }
        // A counter that went on for longer than the guest has run again is another guest's.
        let gained = number(&after, "requests") - number(&before, "requests");
        assert!(gained < 100, "{gained} requests gained");
        assert_eq!(
            number(&after, "touched_pages"),
            16,
            "prepare armed 16, one /health touched them"
        );
        assert_eq!(assert_memory_is_whole(&machine, 64), nonce);
        let later = machine.probe();
        assert!(number(&later, "counter") > number(&after, "counter"));
        walks_its_memory(&machine);
    }
}

/// A new lifecycle, then the preload, to its end.
fn walks_its_memory(machine: &Machine) {
    let body = Init::new().body(jiff::Timestamp::now()).unwrap();
    let init = Request::new(Method::Post, "/init").json(body).closing();
    assert_eq!(machine.send(&init).status, 204);
    assert_eq!(
        machine.json(Method::Get, "/memory/preload")["state"],
        "idle"
    );
    let mut status = machine.json(Method::Post, "/memory/preload");
    for _ in 0..200 {
        if status["state"] != "running" {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
        status = machine.json(Method::Get, "/memory/preload");
    }
    assert_eq!(status["state"], "done", "{status}");
    assert!(number(&status, "bytes") > 126 << 20, "{status}");
}

#[test]
fn root_kvm_comes_back_from_a_copied_snapshot() {
    comes_back("root_kvm_comes_back_from_a_copied_snapshot", "Copy");
}

#[test]
fn root_kvm_comes_back_on_demand() {
    comes_back("root_kvm_comes_back_on_demand", "OnDemand");
}

/// The whole of rewake's restore, with everything real but the guest's size.
#[test]
fn root_kvm_is_restored_by_the_library() {
    let Some(mut lab) = Lab::new("root_kvm_is_restored_by_the_library") else {
        return;
    };
    let machine = lab.boot(&Settings::default());
    let before = machine.probe();
    let snapshot = lab.dir().join("snapshot");
    machine.freeze(&snapshot);
    for mode in [MemoryMode::Copy, MemoryMode::OnDemand] {
        if mode == MemoryMode::OnDemand && rewake_sys::uffd::probe().is_err() {
            continue;
        }
        let restored = lab.restore_with_rewake(&snapshot, mode);
        eprintln!("{}: {}", mode.name(), restored.timeline);
        assert_eq!(
            restored.agent.version.as_ref().map(ToString::to_string),
            Some("0.1.0-probe".into())
        );
        assert_eq!(lab.probe()["nonce"], before["nonce"], "{}", mode.name());
        let leftovers = restored.destroy(Deadline::after(Duration::from_secs(20)));
        assert!(leftovers.is_empty(), "{leftovers:?}");
    }
}
