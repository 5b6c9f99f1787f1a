//! Processes that die in the middle of making, attaching, flattening or removing a disk.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rewake::fault::{Faults, Inject};
use rewake::resource::disk::{
    DiskConfig, DiskError, DiskMode, DiskPool, DiskStock, DiskStockOptions,
};
use rustix::io::Errno;

use super::disklab::{
    Lab, OnlyNamed, Place, SIZE, assert_same, chain, create, in_test_machine, pattern, read_all,
    soon, write_block,
};

const STEP: &str = "REWAKE_TEST_CRASH_STEP";
const DIR: &str = "REWAKE_TEST_CRASH_DIR";
const PREFIX: &str = "REWAKE_TEST_CRASH_ID";
const KIND: &str = "REWAKE_TEST_CRASH_KIND";
const WORK: &str = "REWAKE_TEST_CRASH_WORK";
const NAMED: &str = "REWAKE_TEST_CRASH_NAMED";
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
fn child_that_works_with_a_disk() {
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
    let mut faults = Faults::inject(Arc::new(crash));
    if std::env::var_os(NAMED).is_some() {
        faults = Faults::inject(Arc::new(OnlyNamed(faults)));
    }
    let pool = DiskPool::open(config.clone(), faults);
    let careful = DiskPool::open(config, Faults::NONE);
    let kind = serde_json::from_str(&read(KIND)).unwrap();
    let id = read(PREFIX).parse().unwrap();
    let disks = dir.join("disks");
    match read(WORK).as_str() {
        "create" => {
            let mode = DiskMode::Only(kind);
            let disk = pool.create(&id, &dir.join("base.raw"), &disks, mode, soon());
            std::mem::forget(disk.unwrap());
        }
        "attach" => std::mem::forget(pool.attach(&id, &disks, soon()).unwrap()),
        "flatten" => {
            let disk = careful.attach(&id, &disks, soon()).unwrap();
            let to = dir.join("flat.raw");
            pool.flatten(&disk, &to, &mut |_| {}, soon()).unwrap();
        }
        "take" => {
            let options = DiskStockOptions {
                target: 1,
                // What comes after the one is not to be seen.
                refill_interval_ms: 100,
                ..DiskStockOptions::default()
            };
            let stock = DiskStock::open(Arc::new(pool), &dir.join("stock"), options).unwrap();
            let (base, mode) = (dir.join("base.raw"), DiskMode::Only(kind));
            stock.keep(&base, mode).unwrap();
            assert!(stock.wait_settled(soon()));
            let disk = stock.take(&id, &base, &disks, mode).unwrap();
            std::mem::forget((disk.unwrap(), stock));
        }
        "retire" => {
            let disk = careful.attach(&id, &disks, soon()).unwrap();
            pool.retire(disk, soon()).unwrap();
        }
        work => {
            let keep = work == "detach";
            pool.remove_by_id(&id, &disks, keep, soon()).unwrap();
        }
    }
    std::process::exit(DONE);
}

/// Has a process work until it dies after so many steps; whether it died.
fn dies(lab: &Lab, work: &str, step: usize) -> bool {
    use std::os::unix::process::ExitStatusExt;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "crash::child_that_works_with_a_disk"])
        .env(STEP, step.to_string())
        .env(DIR, &lab.dir)
        .env(PREFIX, lab.id("a").as_str())
        .env(KIND, serde_json::to_string(&lab.place.kind()).unwrap())
        .env(WORK, work);
    if lab.place == Place::Named {
        command.env(NAMED, "1");
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let crashed = output.status.signal().is_some();
    assert!(
        crashed || output.status.code() == Some(DONE),
        "{work}, {step}: {}: {said}",
        output.status
    );
    crashed
}

/// Removes what is there, as a recovery does which knows the name only.
fn recover(lab: &Lab, pool: &DiskPool, case: &str) {
    forget(lab, pool, case);
    lab.assert_clean(case);
}

fn forget(lab: &Lab, pool: &DiskPool, case: &str) {
    match pool.remove_by_id(&lab.id("a"), &lab.disks(), false, soon()) {
        Ok(()) => {}
        Err(failure) if matches!(failure.source, DiskError::Missing { .. }) => {}
        Err(failure) => panic!("{case}: {}", chain(&failure)),
    }
}

fn survives_every_crash(lab: &Lab) {
    let base = lab.base("base.raw", SIZE);
    let image = read_all(&base);
    let pool = lab.open(Faults::NONE);
    let id = lab.id("a");
    for step in 0.. {
        let crashed = dies(lab, "create", step);
        let attached = pool.attach(&id, &lab.disks(), soon());
        let case = format!("create: died after step {step}");
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
        recover(lab, &pool, &case);
        if !crashed {
            assert!(step > 8, "the shim sees every step");
            break;
        }
    }
    for work in ["attach", "flatten", "detach", "retire", "remove"] {
        for step in 0.. {
            let disk = create(lab, &pool, "a", &base);
            write_block(disk.path(), 5, &pattern("kept", 5)).unwrap();
            let written = read_all(disk.path());
            match work {
                "attach" => pool.remove(disk, true, soon()).unwrap(),
                _ => drop(disk),
            }
            let crashed = dies(lab, work, step);
            let case = format!("{work}: died after step {step}");
            let flat = lab.dir.join("flat.raw");
            if flat.exists() {
                assert_same(&read_all(&flat), &written, &case);
                std::fs::remove_file(&flat).unwrap();
            } else {
                assert!(work != "flatten" || crashed, "{case}");
            }
            match pool.attach(&id, &lab.disks(), soon()) {
                Ok(disk) => assert_same(&read_all(disk.path()), &written, &case),
                Err(failure) => {
                    let goes = ["retire", "remove"].contains(&work);
                    assert!(goes, "{case}: {}", chain(&failure));
                }
            }
            recover(lab, &pool, &case);
            if !crashed {
                assert!(step > 0, "the shim sees every step");
                break;
            }
        }
    }
    for step in 0.. {
        let crashed = dies(lab, "take", step);
        let case = format!("take: died after step {step}");
        match pool.attach(&id, &lab.disks(), soon()) {
            Ok(disk) => assert_same(&read_all(disk.path()), &image, &case),
            Err(failure) => assert!(
                crashed && failure.leftovers.is_empty(),
                "{case}: {}",
                chain(&failure)
            ),
        }
        // In whatever order its places are looked at.
        let sweep = || {
            let swept = DiskStock::sweep(&pool, &lab.stock(), soon()).unwrap();
            assert!(swept.in_use.is_empty(), "{case}: {swept:?}");
            assert!(swept.stuck.is_empty(), "{case}: {swept:?}");
        };
        if step % 2 == 0 {
            sweep();
        }
        forget(lab, &pool, &case);
        sweep();
        let empty = std::fs::read_dir(lab.stock()).is_ok_and(|it| it.count() == 0);
        assert!(empty, "{case}: {:?}", lab.census());
        lab.assert_clean(&case);
        if !crashed {
            assert!(step > 10, "the shim sees every step");
            break;
        }
    }
    // What was not finished is in nobody's way.
    let disk = create(lab, &pool, "a", &base);
    pool.flatten(&disk, &lab.dir.join("flat.raw"), &mut |_| {}, soon())
        .unwrap();
    pool.remove(disk, false, soon()).unwrap();
    let left = std::fs::read_dir(&lab.dir).unwrap().flatten();
    let left: Vec<_> = left.map(|it| it.file_name()).collect();
    let unfinished = left.iter().any(|it| it.to_string_lossy().contains(".part"));
    assert!(!unfinished, "{left:?}");
    assert_same(&read_all(&base), &image, "the base image");
}

#[test]
fn a_copy_whose_maker_dies_is_found_or_removed() {
    if let Some(lab) = Lab::new("a_copy_whose_maker_dies_is_found_or_removed", Place::Plain) {
        survives_every_crash(&lab);
    }
}

#[test]
fn a_copy_whose_files_all_have_names_is_found_or_removed() {
    let test = "a_copy_whose_files_all_have_names_is_found_or_removed";
    if let Some(lab) = Lab::new(test, Place::Named) {
        survives_every_crash(&lab);
    }
}

#[test]
fn root_a_clone_whose_maker_dies_is_found_or_removed() {
    let test = "root_a_clone_whose_maker_dies_is_found_or_removed";
    if let Some(lab) = Lab::new(test, Place::Xfs) {
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
