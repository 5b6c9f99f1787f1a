//! Watching stores: one event for each change, on one thread for all disks.

use std::fs::{self, File};
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use mio::Poll;
use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::resource::disk::{
    Disk, DiskConfig, DiskError, DiskEvent, DiskKind, DiskMode, DiskPool, DiskWatch, StoreState,
    WatchOptions,
};
use rewake::units::Bytes;
use rewake::wire::reactor::TokenRange;
use rewake_sys::dm::{Control, DeviceRef};

use super::disklab::{
    BLOCK, Lab, Place, in_test_machine, pattern, read_all, run, skip, soon, write_block,
};
use super::{SIZE, assert_same, create};

/// Longer than any test: what is seen nevertheless was reported by the kernel.
const NEVER: Duration = Duration::from_secs(3600);

fn watch(config: DiskConfig, every: Duration, disks: &[&Disk]) -> (DiskWatch, Poll) {
    let options = WatchOptions {
        every,
        under_pressure: every / 4,
    };
    let mut watch = DiskWatch::new(config, options, TokenRange::new(7, DiskWatch::TOKENS));
    for disk in disks {
        watch.add(disk.id(), disk.dir()).unwrap();
    }
    (watch, Poll::new().unwrap())
}

/// Waits for the next event and puts it in words.
fn next(watch: &mut DiskWatch, poll: &mut Poll, limit: Duration) -> Option<String> {
    let event = watch.wait(poll, Deadline::after(limit)).unwrap()?;
    let name = event.id().as_str().rsplit('-').next().unwrap().to_owned();
    Some(match event {
        DiskEvent::State { from, status, .. } => format!("{name}: {from} to {}", status.state),
        DiskEvent::Ended { error, .. } => {
            let detached = matches!(error, DiskError::Detached { .. });
            let why = if detached { "detached" } else { "unreadable" };
            format!("{name}: {why}")
        }
        other => panic!("{other:?}"),
    })
}

const BRIEFLY: Duration = Duration::from_millis(300);

#[test]
fn a_watch_on_files_reports_each_change_once() {
    let Some(lab) = Lab::new("a_watch_on_files_reports_each_change_once", Place::Plain) else {
        return;
    };
    let base = lab.base("base.raw", SIZE);
    let pool = lab.open(Faults::NONE);
    let disks = ["a", "b"].map(|name| create(&lab, &pool, name, &base));
    let mut config = lab.config();
    let (mut healthy, mut poll) = watch(config.clone(), BRIEFLY / 20, &[&disks[0]]);
    assert_eq!(next(&mut healthy, &mut poll, BRIEFLY), None);

    // No store has as much room as that.
    config.thresholds.used_percent = 0;
    let (mut watch, mut poll) = watch(config, BRIEFLY / 20, &[&disks[0], &disks[1]]);
    let mut next = |watch: &mut DiskWatch| next(watch, &mut poll, BRIEFLY);
    assert_eq!(
        [next(&mut watch), next(&mut watch)],
        ["a", "b"].map(|name| Some(format!("{name}: healthy to pressure")))
    );
    assert_eq!(next(&mut watch), None, "nothing has changed");
    let [a, b] = disks;
    assert!(watch.remove(a.id()) && !watch.remove(a.id()));
    pool.remove(a, false, soon()).unwrap();
    pool.remove(b, false, soon()).unwrap();
    assert_eq!(next(&mut watch).as_deref(), Some("b: detached"));
    assert_eq!(next(&mut watch), None, "it is over");
    assert!(matches!(
        watch.add(&lab.id("a"), &lab.disks()),
        Err(DiskError::Missing { .. })
    ));
    lab.assert_clean("at the end");
}

#[test]
fn vm_a_watch_reports_pressure_and_overflow_once_each() {
    let test = "vm_a_watch_reports_pressure_and_overflow_once_each";
    if !in_test_machine(test) {
        return;
    }
    let Some(lab) = Lab::new(test, Place::DeviceMapper) else {
        return;
    };
    let base = lab.base("base.raw", SIZE);
    let mut config = lab.config();
    config.store_size = Some(Bytes(100 * BLOCK));
    let small = DiskPool::open(config.clone(), Faults::NONE);
    let pool = lab.open(Faults::NONE);
    let disk = create(&lab, &small, "small", &base);
    let others: Vec<Disk> = (0..12)
        .map(|i| create(&lab, &pool, &format!("other{i}"), &base))
        .collect();
    let all: Vec<&Disk> = others.iter().chain([&disk]).collect();
    let (mut watch, mut poll) = watch(config, Duration::from_millis(20), &all);
    let mut wait = |limit| next(&mut watch, &mut poll, limit);
    assert_eq!(wait(BRIEFLY), None, "all are healthy");
    let path = disk.path().to_owned();
    let mut block = 0;
    let mut write = || {
        block += 1;
        write_block(&path, block, &pattern("full", block))
    };
    for _ in 0..85 {
        write().unwrap();
    }
    let limit = Duration::from_secs(10);
    assert_eq!(wait(limit).as_deref(), Some("small: healthy to pressure"));
    assert_eq!(wait(BRIEFLY), None, "said once");
    while write().is_ok() {}
    assert_eq!(
        wait(limit).as_deref(),
        Some("small: pressure to overflowed")
    );
    write_block(others[0].path(), 3, &pattern("other", 3)).unwrap();
    assert_eq!(wait(BRIEFLY), None, "said once, and of nobody else");
    pool.remove(disk, false, soon()).unwrap();
    assert_eq!(wait(limit).as_deref(), Some("small: detached"));
    assert_eq!(wait(BRIEFLY), None, "it is over");
    for disk in others {
        pool.remove(disk, false, soon()).unwrap();
    }
    lab.assert_clean("at the end");
}

/// A file system too small for the stores that are made in it; unmounted when dropped.
struct Tiny<'a>(&'a Path);

impl<'a> Tiny<'a> {
    fn new(image: &Path, mount: &'a Path) -> Self {
        File::create(image).unwrap().set_len(1536 << 10).unwrap();
        let image = image.to_str().unwrap();
        run("mke2fs", &["-q", "-t", "ext4", "-O", "^has_journal", image]);
        fs::create_dir(mount).unwrap();
        let at = mount.to_str().unwrap();
        run("mount", &["-o", "loop", image, at]);
        Self(mount)
    }
}

impl Drop for Tiny<'_> {
    fn drop(&mut self) {
        run("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

/// Waits for the next event of a disk's device (`DM_DEV_WAIT`), and sends its number and the
/// one before.
fn await_event(disk: &Disk) -> Receiver<(u32, u32)> {
    let uuid = super::snapshot::mapping(disk.steps()).1;
    let control = Control::open().unwrap();
    let before = control.info(DeviceRef::Uuid(&uuid)).unwrap().unwrap().event;
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let info = control.wait(DeviceRef::Uuid(&uuid), before).unwrap();
        send.send((before, info.event)).unwrap();
    });
    receive
}

#[test]
fn vm_a_lost_store_is_reported_by_the_kernel_at_once() {
    let test = "vm_a_lost_store_is_reported_by_the_kernel_at_once";
    if !in_test_machine(test) {
        return;
    }
    let Some(lab) = Lab::new(test, Place::DeviceMapper) else {
        return;
    };
    if !Path::new("/sbin/mke2fs").exists() && !Path::new("/usr/sbin/mke2fs").exists() {
        skip(test, "the machine has no mke2fs");
        return;
    }
    let base = lab.base("base.raw", SIZE);
    let image = read_all(&base);
    let mount = lab.dir.join("tiny");
    let tiny = Tiny::new(&lab.dir.join("tiny.img"), &mount);
    let pool = lab.open(Faults::NONE);
    let mode = DiskMode::Only(DiskKind::DmSnapshot);
    let disk = pool.create(&lab.id("lost"), &base, &mount, mode, soon());
    let disk = disk.unwrap();
    let other = create(&lab, &pool, "other", &base);
    let (mut watch, mut poll) = watch(lab.config(), NEVER, &[&disk, &other]);
    let mut wait = |limit| next(&mut watch, &mut poll, limit);
    assert_eq!(wait(BRIEFLY), None, "both are healthy");
    // Other devices' comings and goings wake it, and are no news of these.
    let third = create(&lab, &pool, "third", &base);
    pool.remove(third, false, soon()).unwrap();
    assert_eq!(wait(BRIEFLY), None, "nothing has changed");

    // One who waits for this device only, and blocks in the kernel.
    let blocked = await_event(&disk);
    let failed = (0..SIZE / BLOCK)
        .find_map(|block| write_block(disk.path(), block, &pattern("lost", block)).err());
    assert_eq!(failed.unwrap().raw_os_error(), Some(5), "an I/O error");
    let started = Instant::now();
    let event = wait(Duration::from_secs(20));
    assert_eq!(event.as_deref(), Some("lost: healthy to invalid"));
    println!("reported after {:?}", started.elapsed());
    let (before, after) = blocked.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(after > before, "event {after} after {before}");
    assert_eq!(wait(BRIEFLY), None, "said once");

    let error = pool.check(&disk).unwrap_err();
    assert!(matches!(error, DiskError::Invalid { .. }), "{error}");
    let flat = lab.dir.join("flat.raw");
    let error = pool.flatten(&disk, &flat, &mut |_| {}, soon()).unwrap_err();
    assert!(matches!(error, DiskError::Invalid { .. }), "{error}");
    assert!(!flat.exists());
    write_block(other.path(), 3, &pattern("other", 3)).unwrap();
    assert_eq!(pool.check(&other).unwrap().state, StoreState::Healthy);

    // It cannot be attached again as if nothing had happened.
    let id = disk.id().clone();
    pool.remove(disk, true, soon()).unwrap();
    let again = pool.attach(&id, &mount, soon()).map(drop).unwrap_err();
    assert!(
        matches!(
            again.source,
            DiskError::Unusable { .. } | DiskError::Invalid { .. }
        ),
        "{again:?}"
    );
    pool.remove_by_id(&id, &mount, false, soon()).unwrap();
    pool.remove(other, false, soon()).unwrap();
    drop(tiny);
    assert_same(&read_all(&base), &image, "the base image");
    lab.assert_clean("at the end");
}
