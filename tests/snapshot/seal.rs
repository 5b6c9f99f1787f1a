//! From what Cloud Hypervisor wrote to a snapshot with a name.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rewake::fault::{Faults, Inject};
use rewake::snapshot::{
    Durability, MemoryAccess, Punched, Puncher, Seal, SealError, SealedMemory, SnapshotDir,
    SnapshotLimits, install, require_space, seal,
};
use rewake::units::Bytes;
use rustix::io::Errno;

use crate::scratch::{Scratch, chain, fixture};

const GIB: u64 = 1 << 30;

/// What CH leaves of a VM whose memory is in a file, and that file.
fn staged(scratch: &Scratch) -> (PathBuf, File) {
    let staging = scratch.path("snapshot.2.new");
    fs::create_dir(&staging).unwrap();
    for file in ["config.json", "state.json"] {
        let from = fixture("ch-v53/zone-file-shared-4g").join(file);
        fs::copy(from, staging.join(file)).unwrap();
    }
    let own = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(scratch.path("own"))
        .unwrap();
    own.set_len(4 * GIB).unwrap();
    own.write_all_at(b"below", 4096).unwrap();
    own.write_all_at(b"above", 3 * GIB + 8192).unwrap();
    (staging, own)
}

fn open(path: &Path) -> SnapshotDir {
    SnapshotDir::open(path, &SnapshotLimits::default())
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn assert_has_memory(path: &Path) {
    let memory = File::open(path.join("memory")).unwrap();
    assert_eq!(memory.metadata().unwrap().len(), 4 * GIB);
    for (at, expected) in [(4096, b"below"), (3 * GIB + 8192, b"above")] {
        let mut found = [0; 5];
        memory.read_exact_at(&mut found, at).unwrap();
        assert_eq!(&found, expected);
    }
}

#[test]
fn a_file_of_its_own_gets_a_second_name_or_a_sparse_copy() {
    let scratch = Scratch::new();
    let (staging, own) = staged(&scratch);
    for linked in [true, false] {
        let memory = match linked {
            true => SealedMemory::Linked(own.as_fd()),
            false => SealedMemory::Copied(own.as_fd()),
        };
        let how = Seal {
            memory,
            ..Seal::default()
        };
        let snapshot = seal(&staging, &how).unwrap();
        assert_eq!(snapshot.memory().unwrap().size(), Bytes(4 * GIB));
        assert_has_memory(&staging);
        let (same, sealed) = (
            own.metadata().unwrap(),
            staging.join("memory").metadata().unwrap(),
        );
        assert_eq!(same.ino() == sealed.ino(), linked);
        assert!(sealed.blocks() * 512 < 1 << 20, "holes became zeros");
        fs::remove_file(staging.join("memory")).unwrap();
    }
}

#[test]
fn what_is_no_snapshot_is_not_sealed() {
    let scratch = Scratch::new();
    let (staging, own) = staged(&scratch);
    own.set_len(GIB).unwrap();
    let linked = Seal {
        memory: SealedMemory::Linked(own.as_fd()),
        ..Seal::default()
    };
    let error = seal(&staging, &linked).unwrap_err();
    assert!(matches!(error, SealError::NoSnapshot { .. }), "{error:?}");
    fs::remove_file(staging.join("memory")).unwrap();

    own.set_len(4 * GIB).unwrap();
    let state = fs::read(staging.join("state.json")).unwrap();
    fs::write(staging.join("state.json"), &state[..state.len() / 2]).unwrap();
    let error = seal(&staging, &linked).unwrap_err();
    assert!(matches!(error, SealError::NoSnapshot { .. }), "{error:?}");
    fs::write(staging.join("state.json"), state).unwrap();

    // A name that is taken is never replaced.
    let error = seal(&staging, &linked).unwrap_err();
    let taken = matches!(
        error,
        SealError::Call {
            source: Errno::EXIST,
            ..
        }
    );
    assert!(taken, "{error:?}");
    let target = scratch.path("snapshot.2");
    fs::create_dir(&target).unwrap();
    let error = install(&staging, &target, Durability::Synced, &Faults::NONE).unwrap_err();
    assert!(chain(&error).contains("renameat2"), "{error:?}");
    assert!(staging.exists() && fs::read_dir(&target).unwrap().next().is_none());
}

/// Fails one step, before or after the kernel has done it: whoever called is as good as dead.
struct Break {
    at: usize,
    after: bool,
    seen: AtomicUsize,
}

impl Inject for Break {
    fn before(&self, _: &str) -> Result<(), Errno> {
        let step = self.seen.fetch_add(1, Ordering::Relaxed);
        match step == self.at && !self.after {
            true => Err(Errno::IO),
            false => Ok(()),
        }
    }

    fn after(&self, _: &str) -> Result<(), Errno> {
        let step = self.seen.load(Ordering::Relaxed) - 1;
        match step == self.at && self.after {
            true => Err(Errno::IO),
            false => Ok(()),
        }
    }
}

#[test]
fn whatever_step_fails_the_name_is_of_nothing_or_of_the_whole_snapshot() {
    for linked in [true, false] {
        let mut steps = 0;
        loop {
            let mut broke = false;
            for after in [false, true] {
                let scratch = Scratch::new();
                // The life before, whose memory file is the same one.
                let (staging, own) = staged(&scratch);
                let old = scratch.path("snapshot.1");
                fs::create_dir(&old).unwrap();
                for file in ["config.json", "state.json"] {
                    fs::copy(staging.join(file), old.join(file)).unwrap();
                }
                fs::rename(scratch.path("own"), old.join("memory")).unwrap();
                let injector = Arc::new(Break {
                    at: steps,
                    after,
                    seen: AtomicUsize::new(0),
                });
                let faults = Faults::inject(injector.clone());
                let how = Seal {
                    memory: match linked {
                        true => SealedMemory::Linked(own.as_fd()),
                        false => SealedMemory::Copied(own.as_fd()),
                    },
                    faults: faults.clone(),
                    ..Seal::default()
                };
                let target = scratch.path("snapshot.2");
                let outcome = seal(&staging, &how)
                    .and_then(|_| install(&staging, &target, Durability::Synced, &faults));
                // Reflinks fall back to copies, so their failure is none.
                let reached = injector.seen.load(Ordering::Relaxed) > steps;
                broke |= reached;
                assert!(outcome.is_err() || !reached || !linked, "step {steps}");
                if target.exists() {
                    open(&target);
                    assert_has_memory(&target);
                }
                open(&old);
                assert_has_memory(&old);
            }
            if !broke {
                break;
            }
            steps += 1;
        }
        assert!(steps >= 7, "{steps} steps only");
    }
}

#[test]
fn zeros_that_were_saved_become_holes_and_nothing_else_changes() {
    let scratch = Scratch::snapshot("ch-v53/private-128m");
    let path = scratch.path("memory-ranges");
    let file = File::options().write(true).open(&path).unwrap();
    let mut dense = vec![0; 128 << 20];
    for at in [0, 5 << 20, (64 << 20) + 17, (128 << 20) - 1] {
        dense[at] = 7;
    }
    // A single zero page between data is not worth an extent.
    dense[(32 << 20)..(33 << 20)].fill(9);
    dense[(32 << 20) + 4096..(32 << 20) + 8192].fill(0);
    file.write_all_at(&dense, 0).unwrap();
    file.sync_all().unwrap();
    let before = path.metadata().unwrap().blocks();
    let mut puncher = Puncher::open(scratch.root(), &Faults::NONE)
        .unwrap()
        .unwrap();
    // It can be left off and begun again.
    let mut steps = 0;
    let left_off = puncher.run(|| {
        steps += 1;
        steps < 5
    });
    assert_eq!(left_off.unwrap(), Punched::More);
    let mut puncher = Puncher::open(scratch.root(), &Faults::NONE)
        .unwrap()
        .unwrap();
    assert_eq!(puncher.run(|| true).unwrap(), Punched::Whole);
    let after = path.metadata().unwrap();
    assert!(after.blocks() * 512 < 2 << 20, "{} blocks", after.blocks());
    assert!(before * 512 >= 128 << 20, "the test wrote no zeros");
    assert!(puncher.freed() > Bytes::mib(100));
    assert!(fs::read(&path).unwrap() == dense, "the content changed");
    open(scratch.root());
}

#[test]
fn a_file_that_a_vm_writes_to_gets_no_holes() {
    let scratch = Scratch::snapshot("ch-v53/private-128m");
    let file = File::options()
        .write(true)
        .open(scratch.path("memory-ranges"))
        .unwrap();
    file.write_all_at(&vec![0; 8 << 20], 0).unwrap();
    let mut puncher = Puncher::open(scratch.root(), &Faults::NONE)
        .unwrap()
        .unwrap();
    assert_eq!(puncher.step().unwrap(), Punched::More);
    let owner = open(scratch.root()).claim(MemoryAccess::Own).unwrap();
    assert_eq!(puncher.step().unwrap(), Punched::Taken);
    drop(owner);
    let reader = open(scratch.root()).claim(MemoryAccess::Read).unwrap();
    assert_eq!(puncher.step().unwrap(), Punched::More);
    drop(reader);
    fs::remove_file(scratch.path("memory-ranges")).unwrap();
    assert_eq!(puncher.step().unwrap(), Punched::Taken);
}

#[test]
fn a_full_disk_is_noticed_before_anything_is_written() {
    let scratch = Scratch::new();
    require_space(scratch.root(), Bytes::mib(1)).unwrap();
    let error = require_space(scratch.root(), Bytes(u64::MAX / 2)).unwrap_err();
    assert!(error.is_no_space(), "{error:?}");
    assert!(chain(&error).contains("has room for"), "{error}");
}
