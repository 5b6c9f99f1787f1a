//! Real Cloud Hypervisor restores what was rewritten, from exactly the file that was checked.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rewake::snapshot::{
    ConfigOverrides, MemoryBacking, MemoryLayout, RunDir, RunFiles, SnapshotDir, SnapshotLimits,
    rewrite,
};

use crate::scratch::Scratch;

/// The checked memory file, as Cloud Hypervisor sees it: its standard input.
const MEMORY: &str = "/proc/self/fd/0";

/// Killed and reaped however the test ends.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where the `cloud-hypervisor` binary is, if it can run a VM here.
fn vmm(test: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths)
        .map(|dir| dir.join("cloud-hypervisor"))
        .find(|path| path.is_file());
    let usable = fs::File::options().read(true).write(true).open("/dev/kvm");
    match (found, usable) {
        (Some(path), Ok(_)) => Some(path),
        (None, _) => {
            eprintln!("SKIP {test}: no cloud-hypervisor on PATH");
            None
        }
        (_, Err(error)) => {
            eprintln!("SKIP {test}: /dev/kvm: {error}");
            None
        }
    }
}

/// Starts the restore of a run directory, and waits for the event that says it is done. The
/// memory is on standard input, the events come on standard output.
fn restore(vmm: &Path, run: &RunDir, memory: &impl AsFd, log: &Path) -> Result<Vmm, String> {
    let memory = memory.as_fd().try_clone_to_owned().unwrap();
    let url = format!("source_url=file://{}", run.path().display());
    let mut child = Command::new(vmm)
        .args(["--event-monitor", "fd=1", "--restore", &url])
        .env_clear()
        .stdin(memory)
        .stdout(Stdio::piped())
        .stderr(fs::File::create(log).unwrap())
        .spawn()
        .map(Vmm)
        .unwrap();
    let mut events = child.0.stdout.take().unwrap();
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = events.read(&mut buffer) {
            text.extend_from_slice(&buffer[..count]);
            if String::from_utf8_lossy(&text).contains("\"restored\"") {
                let _ = tell.send(());
            }
        }
    });
    match told.recv_timeout(Duration::from_secs(60)) {
        Ok(()) => Ok(child),
        Err(_) => Err(fs::read_to_string(log).unwrap()),
    }
}

/// A snapshot remembers its host's CPU, and Cloud Hypervisor refuses it on another.
fn is_of_another_cpu(log: &str) -> bool {
    log.to_lowercase().contains("cpuid")
}

fn prepare(
    scratch: &Scratch,
    snapshot: &SnapshotDir,
    memory: MemoryBacking,
    state: &[u8],
) -> RunDir {
    let overrides = ConfigOverrides {
        memory,
        ..ConfigOverrides::default()
    };
    let config = rewrite(snapshot.config(), &overrides).unwrap();
    let files = RunFiles {
        config: &config,
        state,
        memory: Some(Path::new(MEMORY)),
    };
    RunDir::create(&scratch.path("run"), &files).unwrap()
}

#[test]
fn kvm_cloud_hypervisor_copies_from_the_checked_memory_file() {
    const TEST: &str = "kvm_cloud_hypervisor_copies_from_the_checked_memory_file";
    let Some(vmm) = vmm(TEST) else { return };
    let scratch = Scratch::snapshot("ch-v53/private-128m");
    let snapshot = SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).unwrap();
    // Whatever takes the file's place after the check is not looked at.
    fs::remove_file(scratch.path("memory-ranges")).unwrap();
    fs::write(scratch.path("memory-ranges"), "another").unwrap();
    let state = snapshot.state().as_bytes();
    let run = prepare(&scratch, &snapshot, MemoryBacking::Recorded, state);
    let memory = snapshot.memory().unwrap();
    match restore(&vmm, &run, memory, &scratch.path("log")) {
        Err(log) if is_of_another_cpu(&log) => {
            eprintln!("SKIP {TEST}: the captured snapshot is of another CPU");
        }
        result => drop(result.unwrap()),
    }
    run.remove().unwrap();
}

#[test]
fn kvm_cloud_hypervisor_maps_each_region_at_its_place_in_the_file() {
    const TEST: &str = "kvm_cloud_hypervisor_maps_each_region_at_its_place_in_the_file";
    let Some(vmm) = vmm(TEST) else { return };
    let scratch = Scratch::snapshot("ch-v53/memfd-shared-4g");
    let snapshot = SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).unwrap();
    let layout = MemoryLayout::analyse(snapshot.config(), snapshot.state().memory()).unwrap();
    let state = snapshot.state().mapped_from_file(&layout).unwrap();
    let backing = MemoryBacking::File {
        path: PathBuf::from(MEMORY),
        shared: false,
        layout,
    };
    let run = prepare(&scratch, &snapshot, backing, &state);
    let memory = snapshot.memory().unwrap();
    let before = fs::metadata(scratch.path("memory-ranges")).unwrap();
    let running = match restore(&vmm, &run, memory, &scratch.path("log")) {
        Err(log) if is_of_another_cpu(&log) => {
            eprintln!("SKIP {TEST}: the captured snapshot is of another CPU");
            run.remove().unwrap();
            return;
        }
        result => result.unwrap(),
    };
    // address perms offset dev inode path: proc_pid_maps(5).
    let maps = fs::read_to_string(format!("/proc/{}/maps", running.0.id())).unwrap();
    let mut found: Vec<(String, String, u64)> = maps
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields[4] == before.ino().to_string())
        .map(|fields| {
            let (start, end) = fields[0].split_once('-').unwrap();
            let parse = |text| u64::from_str_radix(text, 16).unwrap();
            let size = parse(end) - parse(start);
            (fields[1].to_owned(), fields[2].to_owned(), size)
        })
        .collect();
    found.sort();
    let private = "rw-p".to_owned();
    let expected = [
        (private.clone(), "00000000".to_owned(), 3 << 30),
        (private, "c0000000".to_owned(), 1 << 30),
    ];
    assert_eq!(found, expected, "{maps}");
    drop(running);
    let after = fs::metadata(scratch.path("memory-ranges")).unwrap();
    assert_eq!(
        (before.len(), before.blocks()),
        (after.len(), after.blocks())
    );
    assert_eq!(
        before.mtime_nsec(),
        after.mtime_nsec(),
        "the file was written"
    );
    run.remove().unwrap();
}
