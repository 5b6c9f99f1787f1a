//! Disks that are kept ready: what is handed out, what is not, and what is left.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rewake::fault::{Faults, Inject};
use rewake::resource::disk::{
    Disk, DiskError, DiskKind, DiskMode, DiskPool, DiskStock, DiskStockOptions,
};
use rustix::io::Errno;

use super::disklab::{Lab, assert_same, chain, pattern, read_all, soon, write_block};
use super::{SIZE, create};

/// So many stand ready.
const TARGET: usize = 2;

fn open(lab: &Lab, pool: &Arc<DiskPool>, options: DiskStockOptions) -> DiskStock {
    DiskStock::open(Arc::clone(pool), &lab.stock(), options).unwrap()
}

fn mode(lab: &Lab) -> DiskMode {
    DiskMode::Only(lab.place.kind())
}

fn take(lab: &Lab, stock: &DiskStock, name: &str, base: &Path) -> Option<Disk> {
    let disks = lab.disks();
    stock
        .take(&lab.id(name), base, &disks, mode(lab))
        .unwrap_or_else(|failure| panic!("{name}: {}", chain(&failure)))
}

fn settle(stock: &DiskStock) {
    assert!(stock.wait_settled(soon()), "{:?}", stock.stats());
}

fn close(stock: DiskStock) {
    let left = stock.close(soon());
    assert!(left.is_empty(), "{left:?}");
}

pub(super) fn stocks(lab: &Lab) {
    let base = lab.base("base.raw", SIZE);
    let image = read_all(&base);
    let pool = Arc::new(lab.open(Faults::NONE));
    let options = DiskStockOptions {
        target: TARGET,
        ..DiskStockOptions::default()
    };
    let stock = open(lab, &pool, options);
    assert!(take(lab, &stock, "first", &base).is_none(), "none is ready");
    settle(&stock);
    assert_eq!(stock.stats().ready, TARGET);

    let disk = take(lab, &stock, "a", &base).unwrap();
    let stats = stock.stats();
    assert_eq!((stats.taken, stats.exhausted, stats.images), (1, 1, 1));
    assert_eq!((disk.id(), disk.dir()), (&lab.id("a"), &*lab.disks()));
    assert_same(&read_all(disk.path()), &image, "as fresh as one just made");
    let info = pool.inspect(disk.id(), &lab.disks()).unwrap();
    assert_eq!(info.path.as_deref(), Some(disk.path()));
    assert_eq!(info.record, *disk.record());
    if lab.place.kind() == DiskKind::DmSnapshot {
        let ours = lab.id("a").to_string();
        assert!(info.sharers.contains(&ours), "{:?}", info.sharers);
    } else {
        assert!(disk.path().starts_with(lab.disks()));
    }
    // It is one like any other from now on.
    write_block(disk.path(), 7, &pattern("mine", 7)).unwrap();
    let written = read_all(disk.path());
    pool.sync(disk.id(), &lab.disks()).unwrap();
    let id = disk.id().clone();
    drop(disk);
    let disk = pool.attach(&id, &lab.disks(), soon()).unwrap();
    assert_same(&read_all(disk.path()), &written, "after a crash");
    pool.remove(disk, true, soon()).unwrap();
    let disk = pool.attach(&id, &lab.disks(), soon()).unwrap();
    assert_same(&read_all(disk.path()), &written, "attached again");
    pool.remove(disk, false, soon()).unwrap();

    // Another is there meanwhile, and one for each who asks.
    settle(&stock);
    let (b, c) = (
        take(lab, &stock, "b", &base).unwrap(),
        take(lab, &stock, "c", &base).unwrap(),
    );
    write_block(b.path(), 3, &pattern("b", 3)).unwrap();
    assert_same(&read_all(c.path()), &image, "its neighbour was written to");
    for disk in [b, c] {
        pool.retire(disk, soon()).unwrap();
    }

    // Whose place is taken gets none, and nothing is left of the one that was to be his.
    settle(&stock);
    let there = create(lab, &pool, "d", &base);
    write_block(there.path(), 9, &pattern("d", 9)).unwrap();
    let expected = read_all(there.path());
    let refused = stock
        .take(&lab.id("d"), &base, &lab.disks(), mode(lab))
        .unwrap_err();
    assert!(
        matches!(refused.source, DiskError::Occupied { .. }),
        "{}",
        chain(&refused)
    );
    assert!(refused.leftovers.is_empty(), "{refused}");
    pool.check(&there).unwrap();
    assert_same(&read_all(there.path()), &expected, "the one that was there");
    pool.remove(there, false, soon()).unwrap();

    // A living program's disks are not swept.
    settle(&stock);
    let swept = DiskStock::sweep(&pool, &lab.stock(), soon()).unwrap();
    assert_eq!((swept.in_use.len(), swept.reclaimed.len()), (1, 0));
    assert_eq!(DiskStock::ids(&lab.stock()).len(), TARGET);
    close(stock);
    lab.assert_clean("closed");
    assert_same(&read_all(&base), &image, "the base image");
}

/// Disks of an image that changed, or that somebody has touched.
pub(super) fn checks(lab: &Lab) {
    let pool = Arc::new(lab.open(Faults::NONE));
    let options = DiskStockOptions {
        target: TARGET,
        // The stock shall not be faster than the test.
        refill_interval_ms: 200,
        ..DiskStockOptions::default()
    };
    let base = lab.base("base.raw", SIZE);
    let stock = open(lab, &pool, options);
    stock.keep(&base, mode(lab)).unwrap();
    settle(&stock);
    // The image is replaced: what was made of the old one is not handed out.
    let other = lab.base("other.raw", SIZE);
    fs::rename(&other, &base).unwrap();
    let image = read_all(&base);
    assert!(take(lab, &stock, "a", &base).is_none());
    assert_eq!(stock.stats().unhealthy, TARGET as u64);
    settle(&stock);
    let disk = take(lab, &stock, "a", &base).unwrap();
    assert_same(&read_all(disk.path()), &image, "of the new image");
    pool.remove(disk, false, soon()).unwrap();
    settle(&stock);

    // A link leads to another image: what was made of the first one is not handed out.
    let link = lab.dir.join("current.raw");
    std::os::unix::fs::symlink(&base, &link).unwrap();
    stock.keep(&link, mode(lab)).unwrap();
    settle(&stock);
    let later = lab.base("later.raw", SIZE);
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&later, &link).unwrap();
    assert!(take(lab, &stock, "l", &link).is_none());
    settle(&stock);
    let disk = take(lab, &stock, "l", &link).unwrap();
    assert_same(&read_all(disk.path()), &read_all(&later), "of the other");
    pool.remove(disk, false, soon()).unwrap();
    close(stock);
    lab.assert_clean("closed");
    let stock = open(lab, &pool, options);
    stock.keep(&base, mode(lab)).unwrap();
    settle(&stock);

    // Somebody does something to them.
    let owner = fs::read_dir(lab.stock()).unwrap().flatten().next().unwrap();
    let before = stock.stats().unhealthy;
    let ids = DiskStock::ids(&lab.stock());
    if lab.place.kind() == DiskKind::DmSnapshot {
        for id in &ids {
            let path = pool.inspect(id, &owner.path()).unwrap().path.unwrap();
            write_block(&path, 1, &pattern("touched", 1)).unwrap();
        }
    } else {
        for id in &ids {
            fs::remove_file(owner.path().join(format!("{id}.raw"))).unwrap();
        }
    }
    assert!(take(lab, &stock, "b", &base).is_none());
    assert_eq!(stock.stats().unhealthy, before + TARGET as u64);
    settle(&stock);

    // The image goes, and all that was made of it follows by itself.
    fs::remove_file(&base).unwrap();
    let until = soon();
    while !DiskStock::ids(&lab.stock()).is_empty() {
        assert!(!until.has_passed(), "{:?}", lab.census());
        std::thread::sleep(Duration::from_millis(50));
    }
    let failed = stock.stats().failed;
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(stock.stats().failed, failed, "nothing is tried in vain");
    // It is back, and so are they.
    lab.base("base.raw", SIZE);
    let until = soon();
    while stock.stats().ready < TARGET {
        assert!(!until.has_passed(), "{:?}", stock.stats());
        std::thread::sleep(Duration::from_millis(50));
    }
    close(stock);
}

/// Fails to remove stores while it is to.
#[derive(Default)]
struct Sticky {
    sticks: AtomicBool,
    refused: AtomicUsize,
}

impl Inject for Sticky {
    fn before(&self, step: &str) -> Result<(), Errno> {
        let is_store = step.starts_with("remove ") && step.ends_with(".raw");
        if is_store && self.sticks.load(Ordering::SeqCst) {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Err(Errno::IO);
        }
        Ok(())
    }
    fn after(&self, _: &str) -> Result<(), Errno> {
        Ok(())
    }
}

/// Whatever becomes of an image's disks, what is left of them is told in the end.
pub(super) fn tells(lab: &Lab) {
    let sticky = Arc::new(Sticky::default());
    let pool = Arc::new(lab.open(Faults::inject(sticky.clone())));
    let options = DiskStockOptions {
        target: 1,
        images: 1,
        ..DiskStockOptions::default()
    };
    let stock = open(lab, &pool, options);
    for (number, name) in ["a.raw", "b.raw", "c.raw"].into_iter().enumerate() {
        stock.keep(&lab.base(name, SIZE), mode(lab)).unwrap();
        settle(&stock);
        let until = soon();
        while sticky.refused.load(Ordering::SeqCst) < number {
            assert!(!until.has_passed());
            std::thread::sleep(Duration::from_millis(1));
        }
        // The thread that failed to remove it ends meanwhile.
        std::thread::sleep(Duration::from_millis(100));
        sticky.sticks.store(true, Ordering::SeqCst);
    }
    sticky.sticks.store(false, Ordering::SeqCst);
    let left = stock.close(soon());
    assert_eq!(left.len(), 2, "{left:?}");
    // A sweep gets at them now.
    let swept = DiskStock::sweep(&pool, &lab.stock(), soon()).unwrap();
    assert_eq!(swept.reclaimed.len(), 2, "{swept:?}");
    lab.assert_clean("swept");
}

/// Counts the copies that begin, and holds them up until it is opened.
#[derive(Default)]
struct Gate {
    begun: AtomicUsize,
    is_open: AtomicBool,
}

impl Inject for Gate {
    fn before(&self, step: &str) -> Result<(), Errno> {
        if step == "set the size of the copy" {
            self.begun.fetch_add(1, Ordering::SeqCst);
            while !self.is_open.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }
    fn after(&self, _: &str) -> Result<(), Errno> {
        Ok(())
    }
}

/// A stock that is closed waits for the disks that are being made, and begins no other.
pub(super) fn ends(lab: &Lab) {
    let gate = Arc::new(Gate::default());
    let pool = Arc::new(lab.open(Faults::inject(gate.clone())));
    let options = DiskStockOptions {
        target: 3,
        images: 3,
        refill_interval_ms: 1,
        ..DiskStockOptions::default()
    };
    let stock = open(lab, &pool, options);
    for name in ["a.raw", "b.raw", "c.raw"] {
        stock.keep(&lab.base(name, SIZE), mode(lab)).unwrap();
    }
    let until = soon();
    while gate.begun.load(Ordering::SeqCst) < 3 {
        assert!(!until.has_passed());
        std::thread::sleep(Duration::from_millis(1));
    }
    let closing = std::thread::spawn(move || close(stock));
    // So that it waits for the first one.
    std::thread::sleep(Duration::from_millis(500));
    gate.is_open.store(true, Ordering::SeqCst);
    closing.join().unwrap();
    assert_eq!(gate.begun.load(Ordering::SeqCst), 3);
    lab.assert_clean("closed");
}

/// Of many images those that were asked for last have a shelf.
pub(super) fn forgets(lab: &Lab) {
    let pool = Arc::new(lab.open(Faults::NONE));
    let options = DiskStockOptions {
        target: 1,
        images: 2,
        ..DiskStockOptions::default()
    };
    let stock = open(lab, &pool, options);
    let bases = ["a.raw", "b.raw", "c.raw"].map(|name| lab.base(name, SIZE));
    for base in &bases[..2] {
        stock.keep(base, mode(lab)).unwrap();
    }
    settle(&stock);
    // The first is asked for again, so the second goes when the third comes.
    pool.remove(take(lab, &stock, "x", &bases[0]).unwrap(), false, soon())
        .unwrap();
    stock.keep(&bases[2], mode(lab)).unwrap();
    settle(&stock);
    assert_eq!((stock.stats().images, stock.stats().ready), (2, 2));
    let until = soon();
    while DiskStock::ids(&lab.stock()).len() > 2 {
        assert!(!until.has_passed(), "{:?}", lab.census());
        std::thread::sleep(Duration::from_millis(10));
    }
    // Asking for the second one puts it up again.
    for (image, is_there) in [(0, true), (2, true), (1, false)] {
        let base = &bases[image];
        let disk = take(lab, &stock, "y", base);
        assert_eq!(disk.is_some(), is_there, "{}", base.display());
        if let Some(disk) = disk {
            pool.remove(disk, false, soon()).unwrap();
        }
    }
    // Dropped while it is at work: nothing is left either.
    drop(stock);
    lab.assert_clean("dropped");
}
