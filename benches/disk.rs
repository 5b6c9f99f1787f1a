//! One copy-on-write disk: rewake against `losetup`, `blockdev` and `dmsetup`, interleaved.
//!
//!     cargo bench --bench disk [-- ROUNDS]
//!
//! Needs root and device-mapper; in the test machine:
//!
//!     tests/vm/run --with BINARY --with benches/conventional-disk.sh -- BINARY ROUNDS SCRIPT
//!
//! Every disk must read as its base image and take a write before it counts. rewake makes
//! its files durable (`fsync` of both and of the directory), the commands do not; what
//! attaching alone costs is measured besides.

#[path = "../tests/disklab/mod.rs"]
mod disklab;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use disklab::{BLOCK, Lab, Place, pattern, read_all, run, soon, write_block};
use rewake::fault::Faults;
use rewake::resource::disk::{DiskKind, DiskMode};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/conventional-disk.sh");
const SIZE: u64 = 64 << 20;

fn main() {
    let rounds = std::env::args().find_map(|argument| argument.parse().ok());
    let rounds: usize = rounds.unwrap_or(30);
    let script = std::env::args()
        .find(|argument| argument.ends_with(".sh"))
        .unwrap_or_else(|| SCRIPT.to_owned());
    let Some(lab) = Lab::new("bench disk", Place::DeviceMapper) else {
        return;
    };
    print_machine();
    let base = lab.base("base.raw", SIZE);
    let image = read_all(&base);
    let pool = lab.open(Faults::NONE);
    let mode = DiskMode::Only(DiskKind::DmSnapshot);
    // Keeps the base image attached for both, as on a host that is in use.
    let keeper = pool
        .create(&lab.id("keeper"), &base, &lab.disks(), mode, soon())
        .expect("a disk");
    let store_bytes = keeper.record().store_bytes;
    let mut samples: [Samples; 6] = Default::default();
    let [created, detached, attached, removed, theirs, theirs_gone] = &mut samples;
    for round in 0..rounds {
        let id = lab.id(&format!("r{round}"));
        let disk = created.time(|| pool.create(&id, &base, &lab.disks(), mode, soon()));
        let disk = disk.expect("a disk");
        check(disk.path(), &image);
        detached
            .time(|| pool.remove(disk, true, soon()))
            .expect("detached");
        let disk = attached.time(|| pool.attach(&id, &lab.disks(), soon()));
        removed
            .time(|| pool.remove(disk.expect("a disk"), false, soon()))
            .expect("removed");

        let name = format!("rewake-{}-conventional", lab.prefix);
        let store = lab.disks().join("conventional.cow");
        let (path, bytes) = (store.to_str().expect("text"), store_bytes.to_string());
        let from = base.to_str().expect("text");
        theirs.time(|| run(&script, &["create", &name, from, path, &bytes]));
        check(&node(&name), &image);
        theirs_gone.time(|| run(&script, &["remove", &name, path]));
    }
    pool.remove(keeper, false, soon()).expect("removed");
    lab.assert_clean("after the benchmark");
    created.print("rewake: create a disk, durable");
    attached.print("rewake: attach a disk");
    detached.print("rewake: detach a disk, durable");
    removed.print("rewake: remove a disk");
    theirs.print("commands: create a disk");
    theirs_gone.print("commands: remove a disk");
    let ratio =
        |a: &mut Samples, b: &mut Samples| a.median().as_secs_f64() / b.median().as_secs_f64();
    println!(
        "ratio of medians: create {:.1}, attach against create {:.1}, remove {:.1}",
        ratio(theirs, created),
        ratio(theirs, attached),
        ratio(theirs_gone, removed),
    );
}

/// The disk is what it shall be: the base image, and writable.
fn check(path: &Path, image: &[u8]) {
    assert!(read_all(path) == image, "reads as its base image");
    write_block(path, 5, &pattern("bench", 5)).expect("takes a write");
    let at = usize::try_from(5 * BLOCK).expect("small");
    assert!(read_all(path)[at..at + 4096] == pattern("bench", 5)[..]);
}

fn node(name: &str) -> PathBuf {
    let minor = run(
        "dmsetup",
        &["info", "-c", "--noheadings", "-o", "minor", name],
    );
    format!("/dev/dm-{}", minor.trim()).into()
}

/// Times of one kind.
#[derive(Default)]
struct Samples(Vec<Duration>);

impl Samples {
    fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let outcome = work();
        self.0.push(started.elapsed());
        outcome
    }

    fn median(&mut self) -> Duration {
        self.0.sort_unstable();
        self.0[self.0.len() / 2]
    }

    fn print(&mut self, what: &str) {
        let median = self.median();
        let p99 = self.0[(self.0.len() * 99 / 100).min(self.0.len() - 1)];
        println!(
            "{what}: median {:.2} ms, p99 {:.2} ms, {} samples",
            median.as_secs_f64() * 1e3,
            p99.as_secs_f64() * 1e3,
            self.0.len()
        );
    }
}

/// What a figure needs to mean anything.
fn print_machine() {
    let first = |path: &str, word: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(word));
        line.unwrap_or_default().trim().to_owned()
    };
    println!("kernel {}", first("/proc/sys/kernel/osrelease", ""));
    println!("{}", first("/proc/cpuinfo", "model name"));
    let commit = Command::new("git")
        .args(["rev-parse", "--short", "HEAD"])
        .output();
    if let Ok(commit) = commit {
        println!("commit {}", String::from_utf8_lossy(&commit.stdout).trim());
    }
    let build = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    println!("built as {build}");
}
