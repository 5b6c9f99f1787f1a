//! `rewake restore` with real Cloud Hypervisor and a real Linux guest, in both memory modes:
//! from a snapshot that was made through rewake's own client, and from one of a VM that
//! somebody started by hand.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use machine::{
    AGENT_PORT, BOOT_LIMIT, GUEST_MEMORY_BYTES, Guest, Namespace, SHELL_PORT, STEP_LIMIT, Scratch,
    Vm, api, plain_options,
};
use rewake::deadline::Deadline;
use rewake::vmm::api::Client;
use rewake_sys::process::Process;
use serde_json::Value;

fn restore_command(namespace: &Namespace, snapshot: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewake"));
    command.arg("restore").arg(snapshot).arg("--json");
    command.arg("--vmm").arg(machine::vmm_path());
    command.args([
        "--netns",
        namespace.name(),
        "--guest-ip",
        &machine::GUEST.to_string(),
    ]);
    command.stdin(Stdio::null());
    command
}

/// What `rewake restore` printed; ends the VM when dropped.
struct Restored {
    answer: Value,
    process: Process,
}

impl Restored {
    fn new(namespace: &Namespace, snapshot: &Path, mode: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rewake"));
        command.arg("restore").arg(snapshot);
        command.args(["--vmm", machine::vmm_path().to_str().unwrap()]);
        command.args([
            "--netns",
            namespace.name(),
            "--guest-ip",
            &machine::GUEST.to_string(),
        ]);
        command.args(["--memory-mode", mode, "--json"]);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{command:?}: {}\n{stdout}\n{stderr}",
            output.status
        );
        let answer: Value = serde_json::from_str(&stdout).unwrap();
        println!("rewake restore --memory-mode {mode}: {answer:#}\n{stderr}");
        let pid = u32::try_from(answer["pid"].as_u64().unwrap()).unwrap();
        let process = Process::open(pid).unwrap();
        Self { answer, process }
    }

    fn socket(&self) -> PathBuf {
        self.answer["api_socket"].as_str().unwrap().into()
    }

    fn info(&self) -> Value {
        api(&self.socket(), "GET", "vm.info", "")
    }

    /// The moments that the timeline names, with their times.
    fn moments(&self) -> String {
        self.answer["timeline"].to_string()
    }

    fn shut_down(self) {
        api(&self.socket(), "PUT", "vmm.shutdown", "");
        assert!(
            self.process.wait_ended(Some(STEP_LIMIT)).unwrap(),
            "still there after vmm.shutdown"
        );
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait_ended(Some(STEP_LIMIT));
        if let Some(directory) = self.answer["vm_dir"].as_str() {
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

/// What is known of the guest at the moment of its snapshot.
struct Marks {
    nonce: String,
    count: u64,
}

/// Everything that must be true of a restored guest.
fn check(restored: &Restored, guest: Guest<'_>, marks: &Marks, mode: &str) {
    assert_eq!(restored.answer["stand_in"], false, "{mode}");
    assert_eq!(restored.answer["memory_mode"], mode);
    assert_eq!(restored.answer["memory_bytes"], GUEST_MEMORY_BYTES);
    assert_eq!(restored.info()["state"], "Running", "{mode}");
    // Not a reboot, and not a standstill.
    assert_eq!(
        guest.nonce(),
        marks.nonce,
        "{mode}: rebooted instead of restored"
    );
    guest.await_counter_above(marks.count);
    guest.check_pattern();
    // The agent answers to others, too, not only to the probe.
    guest.await_answer(AGENT_PORT, "/health", STEP_LIMIT);
    for moment in ["ready", "balloon"] {
        assert!(
            restored.moments().contains(moment),
            "{mode}: no {moment} in {}",
            restored.moments()
        );
    }
    await_empty_balloon(restored, mode);
    assert_eq!(guest.shell("cat /disk/file"), "kept", "{mode}");
    guest.shell("echo more >>/disk/log && sync");
}

/// The balloon call was made, and the guest has followed it.
fn await_empty_balloon(restored: &Restored, mode: &str) {
    let start = Instant::now();
    loop {
        let info = restored.info();
        assert_eq!(
            info["config"]["balloon"]["size"], 0,
            "{mode}: no balloon call"
        );
        if info["memory_actual_size"] == GUEST_MEMORY_BYTES {
            return;
        }
        assert!(
            start.elapsed() < STEP_LIMIT,
            "{mode}: {}",
            info["memory_actual_size"]
        );
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Waits for a guest that is booting, leaves marks, snapshots it, ends it.
fn frozen(vm: Vm, guest: Guest<'_>, snapshot: &Path) -> Marks {
    guest.await_answer(SHELL_PORT, "/nonce", BOOT_LIMIT);
    guest.await_answer(AGENT_PORT, "/health", BOOT_LIMIT);
    guest.shell("echo kept >/disk/file && sync");
    let marks = Marks {
        nonce: guest.nonce(),
        count: guest.counter(),
    };
    vm.snapshot(snapshot);
    let recorded: Value =
        serde_json::from_slice(&std::fs::read(snapshot.join("config.json")).unwrap()).unwrap();
    assert_eq!(
        recorded["balloon"]["size"],
        32 << 20,
        "the positive control of the balloon call"
    );
    vm.shut_down();
    marks
}

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

/// What would show that something in a snapshot directory was written to.
fn listing(snapshot: &Path) -> String {
    machine::run(
        "sh",
        [
            "-c",
            &format!("cd {} && ls -l && sha256sum *", snapshot.display()),
        ],
    )
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
