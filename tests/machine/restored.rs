//! `rewake restore` as its user runs it, and what must be true afterwards.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rewake_sys::process::Process;
use serde_json::Value;

use super::{
    AGENT_PORT, BOOT_LIMIT, GUEST_MEMORY_BYTES, Guest, Namespace, SHELL_PORT, STEP_LIMIT, Vm, api,
};

/// `rewake restore --json` of this snapshot, in this namespace.
pub(crate) fn restore_command(namespace: &Namespace, snapshot: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewake"));
    command.arg("restore").arg(snapshot).arg("--json");
    command.arg("--vmm").arg(super::vmm_path());
    command.args([
        "--netns",
        namespace.name(),
        "--guest-ip",
        &super::GUEST.to_string(),
    ]);
    command.stdin(Stdio::null());
    command
}

/// What `rewake restore` printed; ends the VM when dropped.
pub(crate) struct Restored {
    pub(crate) answer: Value,
    process: Process,
}

impl Restored {
    pub(crate) fn new(namespace: &Namespace, snapshot: &Path, mode: &str) -> Self {
        Self::by(restore_command(namespace, snapshot), mode)
    }

    /// The same by a command that may have further arguments.
    pub(crate) fn by(mut command: Command, mode: &str) -> Self {
        command.args(["--memory-mode", mode]);
        let output = command.output().unwrap();
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

    pub(crate) fn socket(&self) -> PathBuf {
        self.answer["api_socket"].as_str().unwrap().into()
    }

    pub(crate) fn info(&self) -> Value {
        api(&self.socket(), "GET", "vm.info", "")
    }

    /// The moments that the timeline names, with their times.
    fn moments(&self) -> String {
        self.answer["timeline"].to_string()
    }

    pub(crate) fn shut_down(self) {
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
pub(crate) struct Marks {
    pub(crate) nonce: String,
    pub(crate) count: u64,
}

/// Everything that must be true of a restored guest.
pub(crate) fn check(restored: &Restored, guest: Guest<'_>, marks: &Marks, mode: &str) {
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
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Waits for a guest that is booting, leaves marks, snapshots it, ends it.
pub(crate) fn frozen(vm: Vm, guest: Guest<'_>, snapshot: &Path) -> Marks {
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

/// What would show that something in a snapshot directory was written to: names, rights,
/// sizes, times and checksums. Not how many blocks it all takes (the `total` of a listed
/// directory): a file system gives those out late, and moves them without anybody's writing.
pub(crate) fn listing(snapshot: &Path) -> String {
    super::run(
        "sh",
        [
            "-c",
            &format!("cd {} && ls -ld -- * && sha256sum -- *", snapshot.display()),
        ],
    )
}
