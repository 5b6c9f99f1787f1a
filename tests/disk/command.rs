//! `rewake disk` from the command line.

use std::process::Command;

use rewake::fault::Faults;
use serde_json::Value;

use super::disklab::{Lab, Place, in_test_machine, pattern, read_all, write_block};
use super::{SIZE, assert_same};

/// Runs `rewake disk` and returns its exit code and its JSON document.
fn rewake(lab: &Lab, arguments: &[&str]) -> (i32, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_rewake"))
        .args(["--json", "disk", "--dir"])
        .arg(lab.disks())
        .arg("--runtime-dir")
        .arg(lab.dir.join("run"))
        .args(arguments)
        .output()
        .unwrap();
    let document = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!(
            "{arguments:?}: {error}: {}",
            String::from_utf8_lossy(&output.stderr)
        )
    });
    (output.status.code().unwrap(), document)
}

/// Expects a choice to be logged with its reason.
fn assert_logged(lab: &Lab, arguments: &[&str], reason: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewake"));
    command.args(["-v", "disk", "--dir"]).arg(lab.disks());
    command.arg("--runtime-dir").arg(lab.dir.join("run"));
    let output = command.args(arguments).output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && log.contains(reason), "{log}");
}

fn lives_by_hand(lab: &Lab) {
    let base = lab.base("base.raw", SIZE);
    let image = base.to_str().unwrap();
    let id = lab.id("hand");
    let id = id.as_str();
    let mode = match lab.place {
        Place::DeviceMapper => "dm-snapshot",
        Place::Xfs | Place::Btrfs => "reflink",
        Place::Plain | Place::Named => "copy",
    };
    let create = ["create", image, "--id", id, "--mode", mode];
    let (code, made) = rewake(lab, &create);
    assert_eq!((code, made["id"].as_str()), (0, Some(id)), "{made}");
    let path = std::path::PathBuf::from(made["path"].as_str().unwrap());
    write_block(&path, 3, &pattern("by hand", 3)).unwrap();
    let expected = read_all(&path);
    let (code, error) = rewake(lab, &create);
    assert_eq!(code, 1);
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.ends_with("exists already"), "{message}");

    let (_, shown) = rewake(lab, &["show"]);
    let disk = &shown["disks"][0];
    assert_eq!(disk["path"], made["path"]);
    assert_eq!(disk["state"], "healthy", "{disk}");
    assert!(disk["used_bytes"].as_u64().unwrap() > 0);
    if lab.place == Place::DeviceMapper {
        assert_eq!(disk["sharers"][0], id);
    }
    let to = lab.dir.join("flat.raw");
    assert_eq!(rewake(lab, &["flatten", id, to.to_str().unwrap()]).0, 0);
    assert_same(&read_all(&to), &expected, "flattened by hand");

    assert_eq!(rewake(lab, &["remove", id, "--keep"]).0, 0);
    let (code, again) = rewake(lab, &["attach", id]);
    assert_eq!(code, 0, "{again}");
    let path = std::path::PathBuf::from(again["path"].as_str().unwrap());
    assert_same(&read_all(&path), &expected, "attached by hand");
    assert_eq!(rewake(lab, &["remove", id]).0, 0);
    assert_eq!(rewake(lab, &["remove", id]).0, 1, "it is gone");
    assert_eq!(rewake(lab, &["show"]).1["disks"], Value::Array(Vec::new()));
    let reason = if lab.open(Faults::NONE).snapshots_work().is_ok() {
        "dm-snapshot, the kernel has it"
    } else {
        ", no device-mapper: "
    };
    assert_logged(lab, &["create", image, "--id", id], reason);
    assert_eq!(rewake(lab, &["remove", id]).0, 0);
    // A clone is made at once, which is in time.
    if mode != "reflink" {
        let late = ["create", image, "--timeout", "0", "--mode", mode];
        assert_eq!(rewake(lab, &late).0, 4, "out of time");
    }
    lab.assert_clean("at the end");
}

#[test]
fn a_copy_is_kept_by_hand() {
    if let Some(lab) = Lab::new("a_copy_is_kept_by_hand", Place::Plain) {
        lives_by_hand(&lab);
    }
}

#[test]
fn root_a_clone_is_kept_by_hand() {
    if let Some(lab) = Lab::new("root_a_clone_is_kept_by_hand", Place::Btrfs) {
        lives_by_hand(&lab);
    }
}

#[test]
fn vm_a_snapshot_is_kept_by_hand() {
    let test = "vm_a_snapshot_is_kept_by_hand";
    if in_test_machine(test)
        && let Some(lab) = Lab::new(test, Place::DeviceMapper)
    {
        lives_by_hand(&lab);
    }
}
