//! A life that goes on: nonce and counter through snapshots, in every memory mode.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::process::{Scratch, Vmm};

/// Asserts that `after` is the same life as `before`, later, with all its memory.
pub(crate) fn goes_on(before: &Value, after: &Value, what: &str) {
    assert_eq!(before["nonce"], after["nonce"], "{what}");
    assert!(
        before["counter"].as_u64() < after["counter"].as_u64(),
        "{what}: {before} {after}"
    );
    assert_eq!(after["bad_pages"], 0, "{what}: {after}");
    assert_eq!(after["pattern_pages"], 256, "{what}");
}

fn restore(vmm: &mut Vmm, dir: &Path, extra: &Value) {
    let mut body = json!({"source_url": format!("file://{}", dir.display()), "resume": true});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    vmm.must("vm.restore", Some(&body));
}

fn edit(dir: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join(name);
    let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

fn edit_memory_state(dir: &Path, change: impl FnOnce(&mut Value)) {
    edit(dir, "state.json", |state| {
        let node = &mut state["snapshots"]["memory-manager"]["snapshot_data"]["state"];
        let mut inner: Value = serde_json::from_str(node.as_str().unwrap()).unwrap();
        change(&mut inner);
        *node = inner.to_string().into();
    });
}

/// Rewrites a snapshot so that its memory file is mapped privately.
pub(crate) fn map_memory(dir: &Path, size: u64) {
    let file = dir.join("memory-ranges");
    edit(dir, "config.json", |config| {
        config["memory"]["size"] = json!(0);
        config["memory"]["zones"] = json!([{"id": "mem0", "size": size, "file": file}]);
    });
    edit_memory_state(dir, |state| state["memory_ranges"]["data"] = json!([]));
}

#[test]
fn a_life_goes_on_by_copy_and_on_demand() {
    for (mode, setting) in [
        ("Copy", "version=53"),
        ("OnDemand", "version=53"),
        ("OnDemand", "version=52"),
    ] {
        let what = format!("{mode} {setting}");
        let mut vmm = Vmm::start(&[setting]);
        vmm.create_and_boot(&json!({}));
        let before = vmm.guest_state();
        let dir = vmm.pause_and_snapshot("s");
        assert_eq!(
            dir.join("memory-ranges").metadata().unwrap().len(),
            32 << 20,
            "{what}"
        );
        vmm.must("vm.delete", None);
        restore(&mut vmm, &dir, &json!({"memory_restore_mode": mode}));
        goes_on(&before, &vmm.guest_state(), &what);
        assert_eq!(vmm.guest_state()["restores"], 1);
    }
}

#[test]
fn a_boot_is_another_life() {
    let mut vmm = Vmm::start(&[]);
    vmm.create_and_boot(&json!({}));
    let before = vmm.guest_state();
    vmm.must("vm.shutdown", None);
    vmm.must("vm.boot", None);
    assert_ne!(before["nonce"], vmm.guest_state()["nonce"]);
}

#[test]
fn a_private_map_of_a_snapshot_leaves_its_file_alone() {
    let mut vmm = Vmm::start(&[]);
    vmm.create_and_boot(&json!({}));
    let before = vmm.guest_state();
    let dir = vmm.pause_and_snapshot("s");
    vmm.must("vm.delete", None);
    let file = dir.join("memory-ranges");
    let content = std::fs::read(&file).unwrap();
    edit(&dir, "config.json", |config| {
        config["memory"]["size"] = json!(0);
        config["memory"]["zones"] = json!([{"id": "mem0", "size": 32 << 20, "file": file}]);
    });
    edit_memory_state(&dir, |state| state["memory_ranges"]["data"] = json!([]));
    restore(&mut vmm, &dir, &json!({}));
    goes_on(&before, &vmm.guest_state(), "first map");
    // A second clone of the same file, and the first one's own snapshot.
    let second = vmm.pause_and_snapshot("t");
    assert_eq!(
        std::fs::read(&file).unwrap(),
        content,
        "the file was written to"
    );
    vmm.must("vm.delete", None);
    let whole = second.join("memory-ranges").metadata().unwrap();
    assert_eq!(whole.len(), 32 << 20);
    let between = before;
    edit(&second, "config.json", |config| {
        config["memory"] = json!({"size": 32 << 20});
    });
    restore(&mut vmm, &second, &json!({}));
    goes_on(&between, &vmm.guest_state(), "copy of a map's snapshot");
    assert_eq!(vmm.guest_state()["restores"], 2);
}

#[test]
fn a_shared_zone_is_paused_without_saving_memory() {
    let mut vmm = Vmm::start(&[]);
    let ram = vmm.scratch.path("ram");
    std::fs::File::create(&ram)
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    let zone = json!({"id": "mem0", "size": 32 << 20, "file": ram, "shared": true});
    vmm.create_and_boot(&json!({"memory": {"size": 0, "zones": [zone]}}));
    let mut before = vmm.guest_state();
    for round in 0..3 {
        let dir = vmm.pause_and_snapshot(&format!("s{round}"));
        assert!(!dir.join("memory-ranges").exists());
        vmm.must("vm.delete", None);
        restore(&mut vmm, &dir, &json!({}));
        let after = vmm.guest_state();
        goes_on(&before, &after, &format!("round {round}"));
        before = after;
    }
}

#[test]
fn forgotten_file_offsets_show_as_bad_pages() {
    let mut vmm = Vmm::start(&[]);
    vmm.create_and_boot(&json!({"memory": {"size": 4_u64 << 30, "shared": true}}));
    let before = vmm.guest_state();
    assert_eq!(before["bad_pages"], 0);
    let dir = vmm.pause_and_snapshot("s");
    vmm.must("vm.delete", None);
    let file = dir.join("memory-ranges");
    edit(&dir, "config.json", |config| {
        config["memory"]["size"] = json!(0);
        config["memory"]["zones"] = json!([{"id": "mem0", "size": 4_u64 << 30, "file": file}]);
    });
    edit_memory_state(&dir, |state| state["memory_ranges"]["data"] = json!([]));
    restore(&mut vmm, &dir, &json!({}));
    let wrong = vmm.guest_state();
    assert_eq!(wrong["nonce"], before["nonce"]);
    assert!(wrong["bad_pages"].as_u64().unwrap() >= 60, "{wrong}");
    vmm.must("vm.delete", None);
    edit_memory_state(&dir, |state| {
        state["guest_ram_mappings"][1]["file_offset"] = json!(3_u64 << 30);
    });
    restore(&mut vmm, &dir, &json!({}));
    goes_on(&before, &vmm.guest_state(), "offsets given");
}

#[test]
fn a_snapshot_too_early_is_refused_by_v53_and_full_of_holes_by_v52() {
    for (setting, refused) in [("version=53", true), ("version=52", false)] {
        let mut vmm = Vmm::start(&[setting, "fill-pages-per-ms=1"]);
        vmm.create_and_boot(&json!({"memory": {"size": 32 << 20, "shared": true}}));
        let dir = vmm.pause_and_snapshot("s");
        vmm.must("vm.delete", None);
        restore(&mut vmm, &dir, &json!({"memory_restore_mode": "OnDemand"}));
        vmm.guest("GET", "/health", None);
        vmm.must("vm.pause", None);
        let url = vmm.scratch.url("t");
        let answer = vmm.put_json("vm.snapshot", &json!({"destination_url": url}));
        if refused {
            let wanted = "[\"Error from API\",\"The VM could not be snapshotted\",\"VM on-demand memory restore is still in progress\"]";
            assert_eq!((answer.status, answer.body.as_str()), (500, wanted));
            continue;
        }
        assert_eq!(answer.status, 204, "{answer:?}");
        vmm.must("vm.delete", None);
        let second = vmm.scratch.path("t");
        restore(&mut vmm, &second, &json!({}));
        assert_eq!(vmm.guest_state()["bad_pages"], 256, "{setting}");
    }
}

#[test]
fn a_walk_over_all_memory_makes_the_next_snapshot_whole() {
    let mut vmm = Vmm::start(&["version=52"]);
    vmm.create_and_boot(&json!({"memory": {"size": 32 << 20, "shared": true}}));
    vmm.guest("POST", "/init", Some(&json!({"lifecycle_id": "a"})));
    let dir = vmm.pause_and_snapshot("s");
    vmm.must("vm.delete", None);
    restore(&mut vmm, &dir, &json!({"memory_restore_mode": "OnDemand"}));
    vmm.guest("POST", "/init", Some(&json!({"lifecycle_id": "b"})));
    assert_eq!(
        vmm.guest("POST", "/memory/preload", None).json()["state"],
        "running"
    );
    let done = loop {
        let status = vmm.guest("GET", "/memory/preload", None).json();
        if status["state"] != "running" {
            break status;
        }
    };
    assert_eq!(done["state"], "done");
    assert_eq!(done["bytes"], 32 << 20);
    let second = vmm.pause_and_snapshot("t");
    vmm.must("vm.delete", None);
    restore(&mut vmm, &second, &json!({}));
    let state = vmm.guest_state();
    assert_eq!(state["bad_pages"], 0, "{state}");
    // It remembers: a stale `done` until somebody says that this is another life.
    assert_eq!(
        vmm.guest("GET", "/memory/preload", None).json()["state"],
        "done"
    );
    vmm.guest("POST", "/init", Some(&json!({"lifecycle_id": "c"})));
    assert_eq!(
        vmm.guest("GET", "/memory/preload", None).json()["state"],
        "idle"
    );
}

#[test]
fn a_short_memory_file_gives_a_vm_that_never_answers() {
    let mut vmm = Vmm::start(&[]);
    vmm.create_and_boot(&json!({}));
    let dir = vmm.pause_and_snapshot("s");
    vmm.must("vm.delete", None);
    let file = std::fs::File::options()
        .write(true)
        .open(dir.join("memory-ranges"))
        .unwrap();
    file.set_len(4096).unwrap();
    restore(&mut vmm, &dir, &json!({}));
    assert_eq!(vmm.call("GET", "vm.info", None).json()["state"], "Running");
    assert!(vmm.log_text().contains("it will never answer"));
}

#[test]
fn two_vms_do_not_share_a_disk_or_a_vsock() {
    let mut first = Vmm::start(&[]);
    let disk = first.scratch.path("disk");
    std::fs::write(&disk, vec![0; 4096]).unwrap();
    let vsock = first.scratch.path("vsock");
    let disks = json!({"disks": [{"path": disk, "image_type": "Raw"}]});
    first.create_and_boot(&json!({"disks": disks["disks"], "vsock": {"cid": 3, "socket": vsock}}));
    let mut second = Vmm::start(&[]);
    let config = json!({"payload": {"kernel": "/dev/null"}, "disks": disks["disks"]});
    second.must("vm.create", Some(&config));
    let refused = second.put("vm.boot");
    assert!(
        refused.body.contains("The file is already locked"),
        "{refused:?}"
    );
    second.must("vm.delete", None);
    let config = json!({"payload": {"kernel": "/dev/null"}, "vsock": {"cid": 3, "socket": vsock}});
    second.must("vm.create", Some(&config));
    let refused = second.put("vm.boot");
    assert!(
        refused.body.contains("Address already in use"),
        "{refused:?}"
    );
    first.put("vmm.shutdown");
    assert_eq!(first.wait().code(), Some(0));
    assert!(!vsock.exists());
    assert_eq!(second.put("vm.boot").status, 204);
}

#[test]
fn the_guest_agent_runs_alone() {
    let scratch = Scratch::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewake-sim"));
    command.args([
        "guest-agent",
        "--listen",
        "127.0.0.1:0",
        "--dialect",
        "w-fc",
    ]);
    command.stdout(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    let address = line.trim().rsplit(' ').next().unwrap().parse().unwrap();
    let first = super::process::guest(address, "GET", "/sim/state", None)
        .unwrap()
        .json();
    let health = super::process::guest(address, "GET", "/health", None).unwrap();
    assert_eq!(
        (health.status, health.body.as_str()),
        (200, "{\"version\":\"0.2.0\"}")
    );
    let second = super::process::guest(address, "GET", "/sim/state", None)
        .unwrap()
        .json();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(first["nonce"], second["nonce"]);
    assert!(first["counter"].as_u64() < second["counter"].as_u64());
    assert_eq!(second["bad_pages"], 0);
    drop(scratch);
}
