//! Every call of every operation fails once, before the kernel has done it and after.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rewake::fault::Faults;
use rewake::ids::SandboxId;
use rewake::resource::disk::{Disk, DiskError, DiskFailure, DiskMode, DiskPool};

use super::disklab::faults::FailNth;
use super::disklab::{Lab, chain, pattern, read_all, soon, write_block};
use super::{SIZE, assert_same, create};

pub(super) fn survives_every_fault(lab: &Lab) {
    let base = lab.base("base.raw", SIZE);
    let image = read_all(&base);
    let bench = Bench::new(lab, base.clone());
    let expected = read_all(bench.witness.path());
    for late in [false, true] {
        bench.create(late);
        bench.attach(late);
        bench.rename(late);
        bench.flatten(late);
        bench.look(late);
        for way in [Way::Remove, Way::Retire, Way::RemoveById, Way::RemoveAll] {
            bench.remove(way, late);
        }
        for way in [Way::Remove, Way::RemoveById, Way::RemoveAll] {
            bench.detach(way, late);
        }
    }
    let witness = bench.witness;
    assert_same(&read_all(witness.path()), &expected, "the other disk");
    bench.pool.remove(witness, false, soon()).unwrap();
    assert_same(&read_all(&base), &image, "the base image");
}

/// How a disk goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Remove,
    Retire,
    RemoveById,
    RemoveAll,
}

struct Bench<'l> {
    lab: &'l Lab,
    injector: Arc<FailNth>,
    pool: DiskPool,
    base: PathBuf,
    id: SandboxId,
    /// Shares the base image all the time, and must never notice.
    witness: Disk,
    /// What there is because of the witness.
    alone: BTreeSet<String>,
}

impl<'l> Bench<'l> {
    fn new(lab: &'l Lab, base: PathBuf) -> Self {
        let injector = Arc::new(FailNth::default());
        let pool = lab.open(Faults::inject(injector.clone()));
        let witness = create(lab, &pool, "witness", &base);
        write_block(witness.path(), 1, &pattern("witness", 1)).unwrap();
        Self {
            lab,
            injector,
            pool,
            base,
            id: lab.id("a"),
            witness,
            alone: lab.census(),
        }
    }

    /// Nothing is left but the witness, which is well.
    fn assert_alone(&self, case: &str) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let left = self.lab.census();
            if left == self.alone {
                break;
            }
            let left: Vec<_> = left.symmetric_difference(&self.alone).collect();
            assert!(Instant::now() < until, "{case}: {left:#?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.pool.check(&self.witness).unwrap();
    }

    fn made(&self) -> Result<Disk, DiskFailure> {
        let mode = DiskMode::Only(self.lab.place.kind());
        let disks = self.lab.disks();
        self.pool.create(&self.id, &self.base, &disks, mode, soon())
    }

    fn create(&self, late: bool) {
        for target in 0.. {
            self.injector.arm(target, late);
            let outcome = self.made();
            let Some(step) = self.injector.disarm() else {
                assert!(target > 8, "the shim sees every step");
                self.pool.remove(outcome.unwrap(), false, soon()).unwrap();
                break;
            };
            let case = format!("create, late: {late}, {target}: {step}");
            let failure = outcome.expect_err(&case);
            let text = chain(&failure);
            assert!(text.contains(&step), "{case}: {text}");
            assert!(failure.leftovers.is_empty(), "{case}: {failure}");
            self.assert_alone(&case);
        }
    }

    /// A disk that was written to, and what is on it.
    fn written(&self) -> (Disk, Vec<u8>) {
        let disk = self.made().unwrap();
        write_block(disk.path(), 5, &pattern("kept", 5)).unwrap();
        let written = read_all(disk.path());
        (disk, written)
    }

    fn attach(&self, late: bool) {
        for target in 0.. {
            let (disk, written) = self.written();
            self.pool.remove(disk, true, soon()).unwrap();
            self.injector.arm(target, late);
            let outcome = self.pool.attach(&self.id, &self.lab.disks(), soon());
            let failed = self.injector.disarm();
            let case = format!("attach, late: {late}, {target}: {failed:?}");
            let disk = if failed.is_some() {
                let failure = outcome.expect_err(&case);
                assert!(failure.leftovers.is_empty(), "{case}: {failure}");
                let again = self.pool.attach(&self.id, &self.lab.disks(), soon());
                again.unwrap()
            } else {
                outcome.unwrap()
            };
            assert_same(&read_all(disk.path()), &written, &case);
            self.pool.remove(disk, false, soon()).unwrap();
            self.assert_alone(&case);
            if failed.is_none() {
                assert!(target > 4, "the shim sees every step");
                break;
            }
        }
    }

    /// A disk that cannot be made another's is gone, all of it.
    fn rename(&self, late: bool) {
        let (to, dir) = (self.lab.id("other"), self.lab.disks());
        for target in 0.. {
            let (disk, written) = self.written();
            self.injector.arm(target, late);
            let outcome = self.pool.rename(disk, &to, &dir);
            let Some(step) = self.injector.disarm() else {
                assert!(target > 1, "the shim sees every step");
                let disk = outcome.unwrap();
                assert_same(&read_all(disk.path()), &written, "renamed");
                self.pool.remove(disk, false, soon()).unwrap();
                self.assert_alone("renamed");
                break;
            };
            let case = format!("rename, late: {late}, {target}: {step}");
            let failure = outcome.expect_err(&case);
            assert!(chain(&failure).contains(&step), "{case}: {failure}");
            assert!(failure.leftovers.is_empty(), "{case}: {failure}");
            self.assert_alone(&case);
        }
    }

    fn flatten(&self, late: bool) {
        let to = self.lab.dir.join("flat.raw");
        let (disk, written) = self.written();
        for target in 0.. {
            self.injector.arm(target, late);
            let outcome = self.pool.flatten(&disk, &to, &mut |_| {}, soon());
            let Some(step) = self.injector.disarm() else {
                assert!(target > 4, "the shim sees every step");
                outcome.unwrap();
                assert_same(&read_all(&to), &written, "flattened");
                fs::remove_file(&to).unwrap();
                break;
            };
            let case = format!("flatten, late: {late}, {target}: {step}");
            outcome.expect_err(&case);
            let left = fs::read_dir(&self.lab.dir).unwrap().flatten();
            let left: Vec<_> = left.map(|it| it.file_name()).collect();
            assert!(
                !left.iter().any(|it| it.to_string_lossy().contains("flat")),
                "{case}: an image that is not known to be whole: {left:?}"
            );
        }
        assert_same(&read_all(disk.path()), &written, "after flattening");
        self.pool.remove(disk, false, soon()).unwrap();
        self.assert_alone("flattened");
    }

    /// Looking changes nothing, whether it fails or not.
    fn look(&self, late: bool) {
        let (disk, written) = self.written();
        drop(disk);
        let disks = self.lab.disks();
        let before = self.lab.census();
        for target in 0.. {
            self.injector.arm(target, late);
            let looked = self.pool.in_use(&self.id, &disks).map(drop).map_err(|_| ());
            let shown = self
                .pool
                .inspect(&self.id, &disks)
                .map(drop)
                .map_err(|_| ());
            let Some(step) = self.injector.disarm() else {
                assert!(target > 4, "the shim sees every step");
                assert_eq!((looked, shown), (Ok(()), Ok(())));
                break;
            };
            let case = format!("look, late: {late}, {target}: {step}");
            // Whoever shares the image is not known where the image cannot be looked at.
            let told = looked.is_err() || shown.is_err() || step.contains("base");
            assert!(told, "{case}");
            assert_eq!(self.lab.census(), before, "{case}");
        }
        let disk = self.pool.attach(&self.id, &disks, soon()).unwrap();
        assert_same(&read_all(disk.path()), &written, "after looks");
        self.pool.remove(disk, false, soon()).unwrap();
        self.assert_alone("looked at");
    }

    fn go(&self, way: Way, disk: Disk, keep: bool) -> Result<(), DiskFailure> {
        match way {
            Way::Remove => self.pool.remove(disk, keep, soon()),
            Way::Retire => self.pool.retire(disk, soon()),
            Way::RemoveById => {
                drop(disk);
                let disks = self.lab.disks();
                self.pool.remove_by_id(&self.id, &disks, keep, soon())
            }
            Way::RemoveAll => match self.pool.remove_all(vec![disk], keep, soon()).pop() {
                Some(failure) => Err(failure),
                None => Ok(()),
            },
        }
    }

    fn remove(&self, way: Way, late: bool) {
        for target in 0.. {
            let disk = self.made().unwrap();
            self.injector.arm(target, late);
            let outcome = self.go(way, disk, false);
            let Some(step) = self.injector.disarm() else {
                assert!(target > 1, "the shim sees every step");
                outcome.unwrap();
                self.assert_alone("at the end");
                break;
            };
            let case = format!("{way:?}, late: {late}, {target}: {step}");
            match outcome {
                // It was removed in another way.
                Ok(()) => assert!(way == Way::Retire && step.starts_with("open "), "{case}"),
                Err(failure) => {
                    let text = chain(&failure);
                    assert!(text.contains(&step), "{case}: {text}");
                }
            }
            match self
                .pool
                .remove_by_id(&self.id, &self.lab.disks(), false, soon())
            {
                Ok(()) => {}
                Err(failure) if matches!(failure.source, DiskError::Missing { .. }) => {}
                Err(failure) => panic!("{case}: {}", chain(&failure)),
            }
            self.assert_alone(&case);
        }
    }

    /// What the guest wrote is there after any failure.
    fn detach(&self, way: Way, late: bool) {
        for target in 0.. {
            let (disk, written) = self.written();
            self.injector.arm(target, late);
            let outcome = self.go(way, disk, true);
            let failed = self.injector.disarm();
            let case = format!("detach, {way:?}, late: {late}, {target}: {failed:?}");
            match &failed {
                None => outcome.unwrap(),
                Some(step) => {
                    let text = chain(&outcome.expect_err(&case));
                    assert!(text.contains(step), "{case}: {text}");
                }
            }
            let disks = self.lab.disks();
            let disk = self.pool.attach(&self.id, &disks, soon()).unwrap();
            assert_same(&read_all(disk.path()), &written, &case);
            self.pool.remove(disk, false, soon()).unwrap();
            self.assert_alone(&case);
            if failed.is_none() {
                assert!(target > 0, "the shim sees every step");
                break;
            }
        }
    }
}
