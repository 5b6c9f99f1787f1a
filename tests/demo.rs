//! `rewake demo` as its user runs it: the story it tells must be true.
#![cfg(all(feature = "cli", feature = "sim"))]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Runs the demo in a directory of its own, in which nothing may stay. Prints what it said.
fn demo(name: &str, options: &[&str]) -> Value {
    let dir = std::env::temp_dir().join(format!("rewake-{name}-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewake"));
    command.args(["--json", "demo"]).args(options);
    let output = command.env("TMPDIR", &dir).output().unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{}: {out}{err}", output.status);
    let left: Vec<_> = std::fs::read_dir(&dir).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    std::fs::remove_dir(&dir).unwrap();
    println!("{out}");
    serde_json::from_str(&out).unwrap()
}

/// What holds for any disk that the demo finds possible.
fn assert_moved_and_locked(told: &Value) {
    let disk = &told["disk"];
    let path: PathBuf = disk["path"].as_str().unwrap().into();
    assert_ne!(disk["recorded_path"], disk["path"], "it was rewritten");
    assert!(path.is_absolute(), "{path:?}");
    assert_eq!(disk["image_type"], "Raw", "stated, not guessed");
    assert_eq!(disk["locked"], true, "by the VM that was restored");
    assert!(disk["used_bytes"].as_u64().unwrap() > 0);
    assert_eq!(disk["total_bytes"].as_u64().unwrap() >> 20, 64);
    assert!(told["counter_after"].as_u64() > told["counter_before"].as_u64());
}

fn skip(test: &str, reason: &str) {
    eprintln!("SKIP {test}: {reason}");
}

/// Cloud Hypervisor's place and the options it needs here, or why it cannot be used.
fn vmm(test: &str) -> Option<Vec<String>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join("cloud-hypervisor"))
        .find(|it| it.exists());
    let Some(found) = found else {
        skip(test, "cloud-hypervisor is not on PATH");
        return None;
    };
    if !Path::new("/dev/kvm").exists() {
        skip(test, "no /dev/kvm");
        return None;
    }
    if rewake::probe_guest::ELF.is_none() {
        skip(test, "built without the probe guest");
        return None;
    }
    let mut options = vec!["--vmm".to_owned(), found.to_str().unwrap().to_owned()];
    if let Ok(shim) = std::env::var("REWAKE_NESTED_STATE_SHIM")
        && !shim.is_empty()
    {
        options.extend(["--vmm-env".to_owned(), format!("LD_PRELOAD={shim}")]);
    }
    Some(options)
}

#[test]
fn the_stand_ins_guest_is_restored_onto_its_disk() {
    let told = demo("played", &["--stand-in"]);
    assert_eq!(told["stand_in"], true);
    assert_moved_and_locked(&told);
}

#[test]
fn kvm_the_real_guest_is_restored_onto_its_disk() {
    let test = "kvm_the_real_guest_is_restored_onto_its_disk";
    let Some(options) = vmm(test) else { return };
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let told = demo("real", &options);
    if told["stand_in"] == true {
        return skip(test, "Cloud Hypervisor cannot snapshot here");
    }
    assert_moved_and_locked(&told);
}

#[test]
fn vm_the_real_guest_is_restored_onto_a_dm_snapshot() {
    let test = "vm_the_real_guest_is_restored_onto_a_dm_snapshot";
    if std::env::var_os("REWAKE_TEST_MACHINE").is_none() {
        return skip(test, "not inside the test machine (tests/vm/run-tests)");
    }
    let Some(options) = vmm(test) else { return };
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let told = demo("snapshot", &options);
    assert_eq!(told["stand_in"], false);
    assert_moved_and_locked(&told);
    let disk = &told["disk"];
    assert_eq!(disk["kind"], "dm_snapshot");
    assert_eq!(disk["open_count"], 1, "by the VM and nobody else");
    assert!(disk["path"].as_str().unwrap().starts_with("/dev/dm-"));
}
