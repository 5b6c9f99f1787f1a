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
//! attaching alone costs is measured besides. Removal is measured one by one, sixteen at
//! once (the commands' at the same time, too), and as what a caller pays who leaves the
//! rest to the kernel; besides, what the kernel's own part is.

#[path = "../tests/disklab/mod.rs"]
mod disklab;
mod interleaved;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use disklab::{BLOCK, Lab, Place, pattern, read_all, run, soon, write_block};
use interleaved::{Samples, numbers, print_machine};
use rewake::fault::{Faults, Inject};
use rewake::resource::disk::{DiskKind, DiskMode, DiskStock, DiskStockOptions};
use rustix::io::Errno;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/conventional-disk.sh");
const SIZE: u64 = 64 << 20;
/// Disks that are removed at once.
const BATCH: usize = 16;

fn main() {
    let [rounds] = numbers([30]);
    let script = std::env::args()
        .find(|argument| argument.ends_with(".sh"))
        .unwrap_or_else(|| SCRIPT.to_owned());
    let Some(lab) = Lab::new("bench disk", Place::DeviceMapper) else {
        return;
    };
    print_machine();
    let base = lab.base("base.raw", SIZE);
    let image = read_all(&base);
    let removal = Arc::new(Removal::default());
    let pool = lab.open(Faults::inject(removal.clone()));
    let mode = DiskMode::Only(DiskKind::DmSnapshot);
    // Keeps the base image attached for both, as on a host that is in use.
    let keeper = pool
        .create(&lab.id("keeper"), &base, &lab.disks(), mode, soon())
        .expect("a disk");
    let mut figures = Figures::default();
    let conventional = Conventional {
        script: &script,
        prefix: &lab.prefix,
        base: &base,
        disks: lab.disks(),
        bytes: keeper.record().store_bytes,
    };
    for round in 0..rounds {
        let id = lab.id(&format!("r{round}"));
        let make = || pool.create(&id, &base, &lab.disks(), mode, soon());
        let disk = time(&mut figures.created, make).expect("a disk");
        check(disk.path(), &image);
        time(&mut figures.detached, || pool.remove(disk, true, soon())).expect("detached");
        let disk = time(&mut figures.attached, || {
            pool.attach(&id, &lab.disks(), soon())
        });
        removal.take();
        time(&mut figures.removed, || {
            pool.remove(disk.expect("a disk"), false, soon())
        })
        .expect("removed");
        figures.removed_by_kernel.push(removal.take());

        time(&mut figures.theirs, || conventional.create(0));
        check(&node(&conventional.name(0)), &image);
        time(&mut figures.theirs_gone, || conventional.remove(&[0]));

        let disk = make().expect("a disk");
        check(disk.path(), &image);
        time(&mut figures.retired, || pool.retire(disk, soon())).expect("retired");
        // What the kernel still does is not to slow the next ones.
        while lab.census().len() > 5 {
            std::thread::sleep(Duration::from_millis(1));
        }

        // The kernel's part of the commands' removal, for comparison: `dmsetup remove`.
        conventional.create(0);
        check(&node(&conventional.name(0)), &image);
        let dmsetup = ["remove", "--retry", &conventional.name(0)];
        time(&mut figures.theirs_by_kernel, || run("dmsetup", &dmsetup));
        conventional.tidy(0);

        if round % 5 == 0 {
            let disks = (0..BATCH).map(|i| {
                let id = lab.id(&format!("b{i}"));
                let disk = pool.create(&id, &base, &lab.disks(), mode, soon());
                disk.expect("a disk")
            });
            let disks = disks.collect();
            let failures = share(&mut figures.together, BATCH, || {
                pool.remove_all(disks, false, soon())
            });
            assert!(failures.is_empty(), "{failures:?}");
            let all: Vec<usize> = (0..BATCH).collect();
            all.iter().for_each(|i| conventional.create(*i));
            share(&mut figures.theirs_together, BATCH, || {
                conventional.remove(&all);
            });
        }
    }
    take(&lab, &base, &image, rounds, &mut figures);
    pool.remove(keeper, false, soon()).expect("removed");
    lab.assert_clean("after the benchmark");
    figures.print();
}

/// Disks that stand ready: what whoever wants one waits for.
fn take(lab: &Lab, base: &Path, image: &[u8], rounds: usize, figures: &mut Figures) {
    let pool = Arc::new(lab.open(Faults::NONE));
    let mode = DiskMode::Only(DiskKind::DmSnapshot);
    let options = DiskStockOptions {
        target: 2,
        ..DiskStockOptions::default()
    };
    let stock = DiskStock::open(Arc::clone(&pool), &lab.stock(), options).expect("a stock");
    stock.keep(base, mode).expect("a shelf");
    for round in 0..rounds {
        assert!(stock.wait_settled(soon()), "{:?}", stock.stats());
        let (id, disks) = (lab.id(&format!("t{round}")), lab.disks());
        let disk = time(&mut figures.taken, || stock.take(&id, base, &disks, mode));
        let disk = disk.expect("taken").expect("one is ready");
        check(disk.path(), image);
        pool.retire(disk, soon()).expect("retired");
    }
    let left = stock.close(soon());
    assert!(left.is_empty(), "{left:?}");
}

/// What was measured.
#[derive(Default)]
struct Figures {
    created: Samples,
    taken: Samples,
    detached: Samples,
    attached: Samples,
    removed: Samples,
    removed_by_kernel: Samples,
    retired: Samples,
    together: Samples,
    theirs: Samples,
    theirs_gone: Samples,
    theirs_together: Samples,
    theirs_by_kernel: Samples,
}

impl Figures {
    fn print(&self) {
        self.created.print("rewake: create a disk, durable");
        self.taken.print("rewake: take a disk that stands ready");
        self.attached.print("rewake: attach a disk");
        self.detached.print("rewake: detach a disk, durable");
        self.removed.print("rewake: remove a disk");
        self.removed_by_kernel.print("  of that in DM_DEV_REMOVE");
        self.retired
            .print("rewake: retire a disk, the kernel removes it");
        self.together.print("rewake: remove one of 16 at once");
        self.theirs.print("commands: create a disk");
        self.theirs_gone.print("commands: remove a disk");
        self.theirs_by_kernel.print("  dmsetup remove alone");
        self.theirs_together
            .print("commands: remove one of 16 at once");
        let ratio = |a: &Samples, b: &Samples| a.median().as_secs_f64() / b.median().as_secs_f64();
        let whole = |a: &Samples, b: &Samples| (a.median() + b.median()).as_secs_f64();
        println!(
            "ratio of medians: a disk made and removed {:.1}; create {:.1}, take {:.1}, \
             attach against create {:.1}, remove {:.1}, retire {:.1}, remove 16 at once {:.1}",
            whole(&self.theirs, &self.theirs_gone) / whole(&self.created, &self.removed),
            ratio(&self.theirs, &self.created),
            ratio(&self.theirs, &self.taken),
            ratio(&self.theirs, &self.attached),
            ratio(&self.theirs_gone, &self.removed),
            ratio(&self.theirs_gone, &self.retired),
            ratio(&self.theirs_together, &self.together),
        );
    }
}

/// Disks made and removed with the commands.
struct Conventional<'a> {
    script: &'a str,
    prefix: &'a str,
    base: &'a Path,
    disks: PathBuf,
    bytes: u64,
}

impl Conventional<'_> {
    fn name(&self, i: usize) -> String {
        format!("rewake-{}-conventional{i}", self.prefix)
    }

    fn store(&self, i: usize) -> String {
        let path = self.disks.join(format!("conventional{i}.cow"));
        path.to_str().expect("text").to_owned()
    }

    fn create(&self, i: usize) {
        let (name, store, bytes) = (self.name(i), self.store(i), self.bytes.to_string());
        let base = self.base.to_str().expect("text");
        run(self.script, &["create", &name, base, &store, &bytes]);
    }

    /// All of them at the same time.
    fn remove(&self, all: &[usize]) {
        std::thread::scope(|scope| {
            for i in all {
                scope.spawn(|| run(self.script, &["remove", &self.name(*i), &self.store(*i)]));
            }
        });
    }

    /// What is left once the mapping is gone.
    fn tidy(&self, i: usize) {
        let store = self.store(i);
        let device = run("losetup", &["-n", "-O", "NAME", "-j", &store]);
        run("losetup", &["-d", device.trim()]);
        std::fs::remove_file(store).expect("removed");
    }
}

/// Adds up how long the removal of devices takes in the kernel.
#[derive(Default)]
struct Removal(Mutex<(Option<Instant>, Duration)>);

impl Removal {
    fn take(&self) -> Duration {
        std::mem::take(&mut self.0.lock().expect("no panic").1)
    }
}

impl Inject for Removal {
    fn before(&self, step: &str) -> Result<(), Errno> {
        if step.starts_with("remove rewake-") {
            self.0.lock().expect("no panic").0 = Some(Instant::now());
        }
        Ok(())
    }
    fn after(&self, _: &str) -> Result<(), Errno> {
        let mut state = self.0.lock().expect("no panic");
        if let Some(started) = state.0.take() {
            state.1 += started.elapsed();
        }
        Ok(())
    }
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

/// Times the work, as so many parts of equal length.
fn share<T>(samples: &mut Samples, parts: usize, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let outcome = work();
    let parts = u32::try_from(parts).expect("few");
    samples.push(started.elapsed() / parts);
    outcome
}

fn time<T>(samples: &mut Samples, work: impl FnOnce() -> T) -> T {
    share(samples, 1, work)
}
