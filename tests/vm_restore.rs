//! `rewake restore` with real Cloud Hypervisor and a real Linux guest, in both memory modes:
//! from a snapshot that was made through rewake's own client, and from one of a VM that
//! somebody started by hand.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::path::Path;

use machine::restored::{Marks, Restored, check, frozen, listing, restore_command};
use machine::{Guest, Namespace, STEP_LIMIT, Scratch, Vm, plain_options};
use rewake::deadline::Deadline;
use rewake::vmm::api::Client;
use serde_json::Value;

fn restores_in_both_modes(namespace: &Namespace, snapshot: &Path, marks: &Marks) {
    let guest = Guest(namespace);
    for mode in ["copy", "on-demand"] {
        let before = listing(snapshot);
        let restored = Restored::new(namespace, snapshot, mode);
        check(&restored, guest, marks, mode);
        restored.shut_down();
        assert_eq!(
            listing(snapshot),
            before,
            "{mode}: the snapshot was changed"
        );
    }
}

#[test]
fn vm_rewake_restores_a_guest_started_by_hand() {
    if !machine::inside_with_vmm("vm_rewake_restores_a_guest_started_by_hand") {
        return;
    }
    let scratch = Scratch::new("by-hand");
    let namespace = Namespace::new("rwtest-by-hand");
    let disk = scratch.disk("disk.raw", 32 << 20);
    let snapshot = scratch.join("snapshot");
    let vm = Vm::start(&namespace, &scratch, &plain_options(&disk, &scratch));
    let marks = frozen(vm, Guest(&namespace), &snapshot);
    restores_in_both_modes(&namespace, &snapshot, &marks);
}

#[test]
fn vm_rewake_restores_a_guest_made_through_its_client() {
    if !machine::inside_with_vmm("vm_rewake_restores_a_guest_made_through_its_client") {
        return;
    }
    let soon = || Deadline::after(STEP_LIMIT);
    let scratch = Scratch::new("through-client");
    let namespace = Namespace::new("rwtest-client2");
    let disk = scratch.disk("disk.raw", 32 << 20);
    let snapshot = scratch.join("snapshot");
    let vm = Vm::start(&namespace, &scratch, &[]);
    let mut config = machine::guest_config(&disk, &scratch);
    config.balloon.as_mut().unwrap().size = 32 << 20;
    let mut client = Client::connect(vm.socket(), soon()).unwrap();
    client.create(&config, soon()).unwrap();
    client.boot(soon()).unwrap();
    drop(client);
    let marks = frozen(vm, Guest(&namespace), &snapshot);
    restores_in_both_modes(&namespace, &snapshot, &marks);
    a_failed_restore_leaves_nothing(&namespace, &snapshot);
}

/// A guest whose agent never answers: the restore fails in its stage and takes everything
/// with it.
fn a_failed_restore_leaves_nothing(namespace: &Namespace, snapshot: &Path) {
    let before = listing(snapshot);
    let mut command = restore_command(namespace, snapshot);
    let output = command
        .args(["--guest-port", "1", "--timeout", "15"])
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    println!(
        "without an agent: {}\n{stdout}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!output.status.success());
    let answer: Value = serde_json::from_str(&stdout).unwrap();
    assert!(
        answer.to_string().contains("ready"),
        "the error names its stage"
    );
    assert_eq!(processes_of_vmm(), 0, "Cloud Hypervisor is still there");
    let left: Vec<_> = std::fs::read_dir("/run/rewake/vm")
        .map(|dir| dir.flatten().collect())
        .unwrap_or_default();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(listing(snapshot), before);
}

/// How many processes run Cloud Hypervisor's binary.
fn processes_of_vmm() -> usize {
    let vmm = std::fs::canonicalize(machine::vmm_path()).unwrap();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter(|entry| std::fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == vmm))
        .count()
}
