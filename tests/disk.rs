//! Disks of every kind against the kernel: the same tests wherever they are kept.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

#[cfg(feature = "cli")]
#[path = "disk/command.rs"]
mod command;
mod disklab;
#[path = "disk/faults.rs"]
mod faults;
#[path = "disk/power_loss.rs"]
mod power_loss;
mod powerlab;
#[path = "disk/snapshot.rs"]
mod snapshot;
#[path = "disk/stock.rs"]
mod stock;
#[path = "disk/watch.rs"]
mod watch;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use disklab::{
    BLOCK, Lab, Place, SIZE, assert_same, chain, create, pattern, read_all, soon, write_block,
};
use faults::survives_every_fault;
use rewake::deadline::Deadline;
use rewake::fault::{Faults, Inject};
use rewake::resource::disk::{
    DiskConfig, DiskError, DiskKind, DiskMode, DiskPool, DiskStep, Progress,
};
use rewake::resource::ledger::{Ledger, Step};
use rewake::units::Bytes;
use rustix::io::Errno;
use stock::{checks, ends, forgets, stocks, tells};

/// Runs a body at a place, under the name of its test.
macro_rules! at {
    ($($name:ident: $body:ident at $place:ident;)*) => {$(
        #[test]
        fn $name() {
            let vm = stringify!($name).starts_with("vm_");
            if vm && !disklab::in_test_machine(stringify!($name)) {
                return;
            }
            if let Some(lab) = Lab::new(stringify!($name), Place::$place) {
                $body(&lab);
                lab.assert_clean("at the end");
            }
        }
    )*};
}

at! {
    a_copy_lives_and_leaves_nothing: lives at Plain;
    root_a_clone_on_xfs_lives_and_leaves_nothing: lives at Xfs;
    root_a_clone_on_btrfs_lives_and_leaves_nothing: lives at Btrfs;
    vm_a_snapshot_lives_and_leaves_nothing: lives at DeviceMapper;

    a_copy_lives_where_every_file_has_a_name: lives at Named;

    a_copy_flattens_to_the_same_bytes: flattens at Plain;
    a_copy_flattens_where_every_file_has_a_name: flattens at Named;
    root_a_clone_on_xfs_flattens_to_the_same_bytes: flattens at Xfs;
    root_a_clone_on_btrfs_flattens_to_the_same_bytes: flattens at Btrfs;
    vm_a_snapshot_flattens_to_the_same_bytes: flattens at DeviceMapper;

    every_fault_of_a_copy_leaves_nothing: survives_every_fault at Plain;
    every_fault_where_every_file_has_a_name_leaves_nothing: survives_every_fault at Named;
    root_every_fault_of_a_clone_on_xfs_leaves_nothing: survives_every_fault at Xfs;
    root_every_fault_of_a_clone_on_btrfs_leaves_nothing: survives_every_fault at Btrfs;
    vm_every_fault_of_a_snapshot_leaves_nothing: survives_every_fault at DeviceMapper;

    a_copy_waits_for_the_hosts_disk_only_when_told: defers at Plain;
    root_a_clone_on_xfs_waits_for_the_hosts_disk_only_when_told: defers at Xfs;
    root_a_clone_on_btrfs_waits_for_the_hosts_disk_only_when_told: defers at Btrfs;
    vm_a_snapshot_waits_for_the_hosts_disk_only_when_told: defers at DeviceMapper;

    a_copy_that_is_ready_becomes_a_sandboxs: stocks at Plain;
    a_copy_that_is_ready_becomes_a_sandboxs_where_every_file_has_a_name: stocks at Named;
    root_a_clone_on_xfs_that_is_ready_becomes_a_sandboxs: stocks at Xfs;
    root_a_clone_on_btrfs_that_is_ready_becomes_a_sandboxs: stocks at Btrfs;
    vm_a_snapshot_that_is_ready_becomes_a_sandboxs: stocks at DeviceMapper;

    what_is_not_as_it_was_made_is_not_handed_out: checks at Plain;
    vm_a_snapshot_that_is_not_as_it_was_made_is_not_handed_out: checks at DeviceMapper;

    a_stock_that_is_closed_begins_nothing: ends at Plain;

    disks_that_stay_though_they_should_go_are_named_in_the_end: tells at Plain;

    images_that_are_not_asked_for_give_their_place_up: forgets at Plain;
    vm_images_of_snapshots_that_are_not_asked_for_give_their_place_up: forgets at DeviceMapper;

    a_copy_refuses_what_does_not_fit: refuses at Plain;
    root_a_clone_on_xfs_refuses_what_does_not_fit: refuses at Xfs;
    root_a_clone_on_btrfs_refuses_what_does_not_fit: refuses at Btrfs;
    vm_a_snapshot_refuses_what_does_not_fit: refuses at DeviceMapper;
}

fn lives(lab: &Lab) {
    let base = lab.base("base.raw", SIZE);
    let image = read_all(&base);
    let pool = lab.open(Faults::NONE);
    let auto = pool.create(&lab.id("a"), &base, &lab.disks(), DiskMode::Auto, soon());
    let disk = auto.unwrap();
    if pool.snapshots_work().is_ok() {
        assert_eq!(disk.kind(), DiskKind::DmSnapshot, "chosen automatically");
    } else if matches!(lab.place, Place::Plain | Place::Named) {
        // What the file system under the temporary files can do is not ours to say.
        assert_ne!(disk.kind(), DiskKind::DmSnapshot);
    } else {
        assert_eq!(disk.kind(), lab.place.kind(), "chosen automatically");
    }
    pool.remove(disk, false, soon()).unwrap();
    lab.assert_clean("after removal of the automatic one");
    let disk = create(lab, &pool, "a", &base);
    write_block(disk.path(), 3, &pattern("retired", 3)).unwrap();
    pool.retire(disk, soon()).unwrap();
    assert_eq!(pool.list(&lab.disks()).unwrap(), [], "gone for its users");
    lab.assert_clean("after retiring");

    let first = create(lab, &pool, "a", &base);
    let second = create(lab, &pool, "b", &base);
    assert_eq!(first.size(), Bytes(SIZE));
    assert_same(&read_all(first.path()), &image, "fresh");
    write_block(first.path(), 3, &pattern("first", 3)).unwrap();
    write_block(first.path(), 511, &pattern("first", 511)).unwrap();
    write_block(second.path(), 3, &pattern("second", 3)).unwrap();
    let mut expected = image.clone();
    for block in [3, 511] {
        let at = usize::try_from(block * BLOCK).unwrap();
        expected[at..at + 4096].copy_from_slice(&pattern("first", block));
    }
    assert_same(&read_all(first.path()), &expected, "after writing");
    assert_same(&read_all(&base), &image, "the base image");
    let status = pool.check(&first).unwrap();
    assert!(
        status.used.0 > 0 && status.used <= status.total,
        "{status:?}"
    );
    let info = pool.inspect(first.id(), &lab.disks()).unwrap();
    assert_eq!(info.path.as_deref(), Some(first.path()));
    assert_eq!(info.record, *first.record());
    assert_eq!(pool.list(&lab.disks()).unwrap().len(), 2);

    // The process is gone, the machine goes on.
    let id = first.id().clone();
    drop(first);
    let first = pool.attach(&id, &lab.disks(), soon()).unwrap();
    assert_same(&read_all(first.path()), &expected, "after a crash");
    // The VM is stopped and resumed.
    pool.remove(first, true, soon()).unwrap();
    let first = pool.attach(&id, &lab.disks(), soon()).unwrap();
    assert_same(&read_all(first.path()), &expected, "after detaching");

    // By the ledger, as a sandbox is destroyed.
    let mut ledger = Ledger::from(first.ledger_steps());
    assert!(ledger.steps().len() >= 2);
    drop(first);
    let text = serde_json::to_string(ledger.steps()).unwrap();
    assert_eq!(
        serde_json::from_str::<Vec<Step>>(&text).unwrap(),
        ledger.steps()
    );
    let leftovers = ledger.unwind(soon());
    assert!(leftovers.is_empty(), "{leftovers:?}");
    // From another process, which knows the name only.
    let id = second.id().clone();
    drop(second);
    pool.remove_by_id(&id, &lab.disks(), false, soon()).unwrap();
    assert_same(&read_all(&base), &image, "the base image at the end");
}

fn flattens(lab: &Lab) {
    let base = lab.base("base.raw", SIZE);
    let pool = lab.open(Faults::NONE);
    let disk = create(lab, &pool, "a", &base);
    // New data in a hole, data over data, zeros over data.
    write_block(disk.path(), 5, &pattern("new", 5)).unwrap();
    write_block(disk.path(), 8, &pattern("new", 8)).unwrap();
    write_block(disk.path(), 9, &[0; 4096]).unwrap();
    let expected = read_all(disk.path());
    let to = lab.dir.join("flat.raw");
    let mut last = 0;
    let mut progress = |it: Progress| {
        assert!(it.done.0 > last && it.total.0 == SIZE);
        last = it.done.0;
    };
    pool.flatten(&disk, &to, &mut progress, soon()).unwrap();
    assert_eq!(last, SIZE, "all of it was reported");
    assert_same(&read_all(&to), &expected, "flattened");
    let flat = fs::metadata(&to).unwrap();
    assert!(
        flat.blocks() * 512 < SIZE / 2,
        "holes are kept: {} of {SIZE}",
        flat.blocks() * 512
    );
    let again = pool.flatten(&disk, &to, &mut |_| {}, soon());
    assert!(
        matches!(again, Err(DiskError::Occupied { .. })),
        "{again:?}"
    );
    let late = Deadline::after(Duration::ZERO);
    let other = lab.dir.join("late.raw");
    // A clone is made at once, which is in time.
    if let Err(error) = pool.flatten(&disk, &other, &mut |_| {}, late) {
        assert!(error.is_timeout(), "{}", chain(&error));
        assert!(!other.exists());
    } else {
        assert_eq!(lab.place.kind(), DiskKind::Reflink);
    }
    pool.remove(disk, false, soon()).unwrap();
    // It stands alone: a disk of its own can be made of it.
    fs::remove_file(&base).unwrap();
    let disk = create(lab, &pool, "b", &to);
    assert_same(&read_all(disk.path()), &expected, "of the flattened image");
    pool.remove(disk, false, soon()).unwrap();
}

/// Takes down what is done.
#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Inject for Recorder {
    fn before(&self, _: &str) -> Result<(), Errno> {
        Ok(())
    }

    fn after(&self, step: &str) -> Result<(), Errno> {
        self.0.lock().unwrap().push(step.to_owned());
        Ok(())
    }
}

fn defers(lab: &Lab) {
    let base = lab.base("base.raw", SIZE);
    let recorder = Arc::new(Recorder::default());
    let config = DiskConfig {
        defer_sync: true,
        ..lab.config()
    };
    let pool = DiskPool::open(config, Faults::inject(recorder.clone()));
    let waits = || {
        let steps = std::mem::take(&mut *recorder.0.lock().unwrap());
        let mut waits: Vec<_> = steps
            .into_iter()
            .filter(|step| step.ends_with(" to the disk"))
            .collect();
        waits.sort_unstable();
        waits
    };
    let disk = create(lab, &pool, "a", &base);
    assert_eq!(waits(), Vec::<String>::new());
    pool.sync(disk.id(), &lab.disks()).unwrap();
    let store = disk.record().kind == DiskKind::DmSnapshot;
    let file = |extension| lab.disks().join(format!("{}.{extension}", disk.id()));
    let (record, store) = (file("json"), file(if store { "cow" } else { "raw" }));
    let mut all =
        [&lab.disks(), &record, &store].map(|path| format!("write {} to the disk", path.display()));
    all.sort_unstable();
    assert_eq!(waits(), all);

    // What a power loss can leave of one that was not: a record without its contents.
    let id = disk.id().clone();
    fs::write(&record, "").unwrap();
    let held = pool.remove_by_id(&id, &lab.disks(), false, soon());
    assert!(
        matches!(&held, Err(failure) if matches!(failure.source, DiskError::Held { .. })),
        "{held:?}"
    );
    drop(disk);
    let kept = pool.remove_by_id(&id, &lab.disks(), true, soon());
    for refused in [kept, pool.attach(&id, &lab.disks(), soon()).map(drop)] {
        assert!(
            matches!(&refused, Err(failure) if matches!(failure.source, DiskError::Record { .. })),
            "{refused:?}"
        );
    }
    pool.remove_by_id(&id, &lab.disks(), false, soon()).unwrap();
    assert_eq!(fs::read_dir(lab.disks()).unwrap().count(), 0);
    lab.assert_clean("after removal of what was torn");
    let gone = pool.sync(&id, &lab.disks());
    assert!(
        matches!(&gone, Err(failure) if matches!(failure.source, DiskError::Missing { .. })),
        "{gone:?}"
    );
}

fn refuses(lab: &Lab) {
    let base = lab.base("base.raw", SIZE);
    let pool = lab.open(Faults::NONE);
    let mode = DiskMode::Only(lab.place.kind());
    let make = |name: &str, base: &Path| {
        let made = pool.create(&lab.id(name), base, &lab.disks(), mode, soon());
        made.map_err(|failure| failure.source)
    };
    let odd = lab.dir.join("odd.raw");
    fs::write(&odd, [1; 700]).unwrap();
    let empty = lab.dir.join("empty.raw");
    fs::write(&empty, []).unwrap();
    for bad in [&odd, &empty, &lab.dir] {
        let refused = make("bad", bad).map(drop).unwrap_err();
        assert!(matches!(refused, DiskError::Unusable { .. }), "{bad:?}");
    }
    assert!(make("bad", &lab.dir.join("missing")).is_err());
    lab.assert_clean("after refusals");

    let disk = make("a", &base).unwrap();
    let id = disk.id().clone();
    let twice = make("a", &base).map(drop).unwrap_err();
    assert!(matches!(twice, DiskError::Occupied { .. }), "{twice:?}");
    let attach = |id: &rewake::ids::SandboxId| {
        let attached = lab.open(Faults::NONE).attach(id, &lab.disks(), soon());
        attached.map(drop).map_err(|failure| failure.source)
    };
    let held = attach(&id).unwrap_err();
    assert!(matches!(held, DiskError::Held { .. }), "{held:?}");
    let held = pool.remove_by_id(&id, &lab.disks(), false, soon());
    assert!(matches!(held.unwrap_err().source, DiskError::Held { .. }));
    let missing = attach(&lab.id("missing")).unwrap_err();
    assert!(matches!(missing, DiskError::Missing { .. }), "{missing:?}");
    assert!(!read_all(disk.path()).is_empty(), "it survived all of that");
    let store = disk
        .steps()
        .iter()
        .find_map(|step| match step {
            DiskStep::File { path, .. } if path.extension()? != "json" => Some(path.clone()),
            _ => None,
        })
        .unwrap();
    pool.remove(disk, true, soon()).unwrap();

    write_block(&base, 0, &pattern("changed", 0)).unwrap();
    let changed = attach(&id).unwrap_err();
    assert!(
        matches!(changed, DiskError::BaseChanged { .. }),
        "{changed:?}"
    );
    pool.remove_by_id(&id, &lab.disks(), false, soon()).unwrap();

    let disk = make("c", &base).unwrap();
    let id = disk.id().clone();
    pool.remove(disk, true, soon()).unwrap();
    let store = store.with_file_name(format!("{id}.{}", store.extension().unwrap().display()));
    let record = lab.disks().join(format!("{id}.json"));
    let text = fs::read(&record).unwrap();
    for garbage in [&b"{}"[..], b"", b"\xff", &[b'['; 100_000]] {
        fs::write(&record, garbage).unwrap();
        assert!(attach(&id).is_err());
    }
    fs::write(&record, text).unwrap();
    if lab.place.kind() == DiskKind::DmSnapshot {
        File::options()
            .write(true)
            .open(&store)
            .unwrap()
            .set_len(BLOCK)
            .unwrap();
        let cut = attach(&id).unwrap_err();
        assert!(matches!(cut, DiskError::Unusable { .. }), "{cut:?}");
    }
    fs::remove_file(&store).unwrap();
    assert!(attach(&id).is_err(), "no store");
    pool.remove_by_id(&id, &lab.disks(), false, soon()).unwrap();
    assert_eq!(pool.list(&lab.disks()).unwrap(), []);
}
