//! Processes that die in the middle of making a disk.

use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rewake::fault::{Faults, Inject};
use rewake::resource::disk::{DiskConfig, DiskError, DiskMode, DiskPool};
use rustix::io::Errno;

use super::disklab::{Lab, Place, chain, in_test_machine, read_all, soon};
use super::{SIZE, assert_same};

const STEP: &str = "REWAKE_TEST_CRASH_STEP";
const DIR: &str = "REWAKE_TEST_CRASH_DIR";
const PREFIX: &str = "REWAKE_TEST_CRASH_ID";
const KIND: &str = "REWAKE_TEST_CRASH_KIND";
/// What the child ends with when it came to the end.
const DONE: i32 = 42;

/// Ends the process without any clean-up once so many steps are done.
struct Crash(AtomicUsize);

impl Inject for Crash {
    fn before(&self, _: &str) -> Result<(), Errno> {
        Ok(())
    }
    fn after(&self, _: &str) -> Result<(), Errno> {
        if self.0.fetch_sub(1, Ordering::SeqCst) == 0 {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .unwrap();
        }
        Ok(())
    }
}

/// Not a test of its own: what the processes run that are made to die.
#[test]
fn child_that_makes_a_disk() {
    let Ok(step) = std::env::var(STEP) else {
        return;
    };
    let read = |name| std::env::var(name).unwrap();
    let dir = std::path::PathBuf::from(read(DIR));
    let config = DiskConfig {
        runtime_dir: dir.join("run"),
        ..DiskConfig::default()
    };
    let crash = Crash(AtomicUsize::new(step.parse().unwrap()));
    let pool = DiskPool::open(config, Faults::inject(Arc::new(crash)));
    let kind = serde_json::from_str(&read(KIND)).unwrap();
    let id = read(PREFIX).parse().unwrap();
    let disk = pool.create(
        &id,
        &dir.join("base.raw"),
        &dir.join("disks"),
        DiskMode::Only(kind),
        soon(),
    );
    std::mem::forget(disk.unwrap());
    std::process::exit(DONE);
}

fn run_child(lab: &Lab, step: usize) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::child_that_makes_a_disk"])
        .env(STEP, step.to_string())
        .env(DIR, &lab.dir)
        .env(PREFIX, lab.id("a").as_str())
        .env(KIND, serde_json::to_string(&lab.place.kind()).unwrap())
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap()
}

fn survives_every_crash(lab: &Lab) {
    use std::os::unix::process::ExitStatusExt;
    let base = lab.base("base.raw", SIZE);
    let image = read_all(&base);
    let pool = lab.open(Faults::NONE);
    let id = lab.id("a");
    for step in 0.. {
        let status = run_child(lab, step);
        let crashed = status.signal().is_some();
        assert!(crashed || status.code() == Some(DONE), "{step}: {status}");
        let attached = pool.attach(&id, &lab.disks(), soon());
        let case = format!("died after step {step}");
        match &attached {
            Ok(disk) => assert_same(&read_all(disk.path()), &image, &case),
            // Not far enough: there was no record, or no store yet.
            Err(failure) => {
                assert!(
                    crashed && failure.leftovers.is_empty(),
                    "{}",
                    chain(failure)
                );
            }
        }
        drop(attached);
        match pool.remove_by_id(&id, &lab.disks(), false, soon()) {
            Ok(()) => {}
            Err(failure) if matches!(failure.source, DiskError::Missing { .. }) => {}
            Err(failure) => panic!("{case}: {}", chain(&failure)),
        }
        lab.assert_clean(&case);
        if !crashed {
            assert!(step > 8, "the shim sees every step");
            break;
        }
    }
    assert_same(&read_all(&base), &image, "the base image");
}

#[test]
fn a_copy_whose_maker_dies_is_found_or_removed() {
    if let Some(lab) = Lab::new("a_copy_whose_maker_dies_is_found_or_removed", Place::Plain) {
        survives_every_crash(&lab);
    }
}

#[test]
fn vm_a_snapshot_whose_maker_dies_is_found_or_removed() {
    let test = "vm_a_snapshot_whose_maker_dies_is_found_or_removed";
    if !in_test_machine(test) {
        return;
    }
    if let Some(lab) = Lab::new(test, Place::DeviceMapper) {
        survives_every_crash(&lab);
    }
}
