//! Disks made ahead of the sandboxes that will have them.
//!
//! ```text
//!   HOME/OWNER/             one program that keeps disks ready
//!     claim                 locked by it for as long as it lives
//!     stock-RANDOM.json     the record and
//!     stock-RANDOM.cow      the store of a disk that is nobody's yet
//! ```
//!
//! Each base image has a shelf of its own, with a thread that fills it. The shelf is put up
//! when the first disk of the image is asked for; of many images those that were asked for
//! last have one. To hand a disk out is to rename it ([`DiskPool::rename`]), so `HOME` is in
//! the file system in which the sandboxes have theirs.
//!
//! Of a program that died, the kernel frees the claim. [`DiskStock::sweep`] removes what lies
//! with it, a store whose record has just gone to its sandbox included.

mod home;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::record::Base;
use super::{Disk, DiskFailure, DiskMode, DiskPool};
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::ids::SandboxId;
use crate::resource::refill::{Limits, Maker, Stock};
use home::Home;

pub use home::StockSweep;

/// What disks are called that are nobody's yet.
const PREFIX: &str = "stock-";

/// Sizes and limits of a stock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskStockOptions {
    /// How many disks of each base image stand ready; 0: none are. A prepared snapshot or
    /// reflink takes hardly any room, a prepared copy as much as its image.
    pub target: usize,
    /// For how many base images at the same time; those asked for last.
    pub images: usize,
    /// The least time between making two of an image, in milliseconds, and between taking one
    /// and making the next while some are left: a restore has the processors to itself for so
    /// long.
    pub refill_interval_ms: u64,
    /// How long making one, or removing some, may take, in milliseconds. An image whose copy
    /// takes longer is never ready.
    pub step_budget_ms: u64,
}

impl Default for DiskStockOptions {
    fn default() -> Self {
        Self {
            target: 0,
            images: 8,
            refill_interval_ms: 20,
            step_budget_ms: 10_000,
        }
    }
}

/// What a stock holds and has done, over all its base images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskStockStats {
    /// Base images that disks are kept ready for.
    pub images: usize,
    /// Disks ready to be handed out.
    pub ready: usize,
    /// Disks handed out so far, of images that have a shelf now.
    pub taken: u64,
    /// Times that none was ready.
    pub exhausted: u64,
    /// Disks that failed the check: their image had changed, or they were touched.
    pub unhealthy: u64,
    /// Disks that could not be made.
    pub failed: u64,
}

/// Disks of some base images, kept ready. Shared by threads.
#[derive(Debug)]
pub struct DiskStock {
    pool: Arc<DiskPool>,
    options: DiskStockOptions,
    shelves: Mutex<Shelves>,
    home: Home,
}

#[derive(Debug, Default)]
struct Shelves {
    /// The one that was asked for last is the last.
    up: Vec<Arc<Shelf>>,
    /// Those that take one down.
    ending: Vec<JoinHandle<Vec<DiskFailure>>>,
    /// What those could not remove that have ended.
    left: Vec<DiskFailure>,
}

/// The disks of one base image.
#[derive(Debug)]
struct Shelf {
    image: PathBuf,
    mode: DiskMode,
    stock: Stock<Workshop>,
}

/// Makes the disks of one base image.
#[derive(Debug)]
struct Workshop {
    pool: Arc<DiskPool>,
    image: PathBuf,
    mode: DiskMode,
    dir: PathBuf,
}

impl DiskStock {
    /// Begins with nothing: a shelf is put up by [`DiskStock::keep`] and by the first
    /// [`DiskStock::take`] of an image. `home` is made if it is not there.
    ///
    /// # Errors
    /// Where the directory cannot be made or claimed.
    pub fn open(pool: Arc<DiskPool>, home: &Path, options: DiskStockOptions) -> io::Result<Self> {
        Ok(Self {
            pool,
            options,
            shelves: Mutex::default(),
            home: Home::claim(home)?,
        })
    }

    /// Begins to keep disks of an image ready. Does not wait for them.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn keep(&self, image: &Path, mode: DiskMode) -> io::Result<()> {
        self.shelf(&mut self.lock(), image, mode).map(drop)
    }

    /// Hands out a disk that was looked at just now, as the one of `id` in `dir`; `None` where
    /// none is ready, which is when the caller makes one. Costs some renames and waits for
    /// nothing.
    ///
    /// # Errors
    /// Those of [`DiskPool::rename`].
    pub fn take(
        &self,
        id: &SandboxId,
        image: &Path,
        dir: &Path,
        mode: DiskMode,
    ) -> Result<Option<Disk>, DiskFailure> {
        let mut shelves = self.lock();
        let ready = match self.shelf(&mut shelves, image, mode) {
            Ok(shelf) => shelf.stock.take(),
            Err(error) => {
                log::warn!("No disks of {} are kept ready: {error}", image.display());
                None
            }
        };
        drop(shelves);
        ready
            .map(|disk| self.pool.rename(disk, id, dir))
            .transpose()
    }

    /// What it holds and has done.
    #[must_use]
    pub fn stats(&self) -> DiskStockStats {
        let mut stats = DiskStockStats::default();
        for shelf in &self.lock().up {
            let counts = shelf.stock.counts();
            stats.images += 1;
            stats.ready += counts.ready;
            stats.taken += counts.taken;
            stats.exhausted += counts.exhausted;
            stats.unhealthy += counts.unhealthy;
            stats.failed += counts.failed;
        }
        stats
    }

    /// Waits until every image that is there has as many disks ready as are wanted, and says whether that
    /// was so before the deadline.
    #[must_use]
    pub fn wait_settled(&self, deadline: Deadline) -> bool {
        let up = self.lock().up.clone();
        up.iter().all(|it| it.stock.wait_settled(deadline))
    }

    /// Ends all threads and removes every disk that was not handed out. Blocks until those are
    /// made that are being made, for which [`DiskStockOptions::step_budget_ms`] is the limit,
    /// and then while disks are removed, until the deadline at the latest.
    #[must_use]
    pub fn close(self, deadline: Deadline) -> Vec<DiskFailure> {
        self.clear(deadline)
    }

    /// Where the prepared disks of a host lie that has its data under `root`.
    #[must_use]
    pub fn home_under(root: &Path) -> PathBuf {
        root.join("disks")
    }

    /// The ids of all disks under `home` that are nobody's yet, whoever keeps them.
    #[must_use]
    pub fn ids(home: &Path) -> Vec<SandboxId> {
        home::ids(home)
    }

    /// Removes the disks under `home` that programs kept ready which have died. Blocks, until
    /// the deadline at the latest.
    ///
    /// # Errors
    /// Where the directory cannot be listed.
    pub fn sweep(pool: &DiskPool, home: &Path, deadline: Deadline) -> io::Result<StockSweep> {
        home::sweep(pool, home, deadline)
    }

    fn lock(&self) -> MutexGuard<'_, Shelves> {
        // No call that can panic is made while it is held.
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shelf of an image, put up where there is none. One too many is taken down.
    fn shelf<'s>(
        &self,
        shelves: &'s mut Shelves,
        image: &Path,
        mode: DiskMode,
    ) -> io::Result<&'s Shelf> {
        let is_it = |it: &Arc<Shelf>| it.image == image && it.mode == mode;
        match shelves.up.iter().position(is_it) {
            Some(at) => shelves.up[at..].rotate_left(1),
            None => {
                shelves.up.push(Arc::new(self.put_up(image, mode)?));
                if shelves.up.len() > self.options.images.max(1) {
                    let oldest = shelves.up.remove(0);
                    self.take_down(oldest, shelves);
                }
            }
        }
        // Invariant: it is the one that was asked for last.
        Ok(&shelves.up[shelves.up.len() - 1])
    }

    fn put_up(&self, image: &Path, mode: DiskMode) -> io::Result<Shelf> {
        let interval = Duration::from_millis(self.options.refill_interval_ms);
        let limits = Limits {
            target: self.options.target,
            interval,
            quiet: interval,
            budget: self.budget(),
        };
        let workshop = Workshop {
            pool: Arc::clone(&self.pool),
            image: image.to_owned(),
            mode,
            dir: self.home.path().to_owned(),
        };
        Ok(Shelf {
            image: image.to_owned(),
            mode,
            stock: Stock::start(workshop, limits)?,
        })
    }

    /// Removes the disks of a shelf, on a thread of its own.
    fn take_down(&self, shelf: Arc<Shelf>, shelves: &mut Shelves) {
        let budget = self.budget();
        let end = move || {
            // Whoever waits for it to be filled ends it otherwise.
            Arc::into_inner(shelf)
                .map_or_else(Vec::new, |shelf| shelf.stock.close(Deadline::after(budget)))
        };
        for ended in shelves.ending.extract_if(.., |it| it.is_finished()) {
            // A panic there has said what it had to say.
            shelves.left.extend(ended.join().unwrap_or_default());
        }
        let thread = std::thread::Builder::new().name("rw-disk-end".to_owned());
        match thread.spawn(end) {
            Ok(thread) => shelves.ending.push(thread),
            // The shelf went with the thread that could not be had.
            Err(error) => log::debug!("A shelf was taken down at once: {error}"),
        }
    }

    const fn budget(&self) -> Duration {
        Duration::from_millis(self.options.step_budget_ms)
    }

    fn clear(&self, deadline: Deadline) -> Vec<DiskFailure> {
        let Shelves {
            up,
            ending,
            mut left,
        } = std::mem::take(&mut *self.lock());
        // All at once: none begins another disk while one is waited for.
        for shelf in &up {
            shelf.stock.stop();
        }
        for shelf in up {
            // Nobody else has one: whoever waits for it borrows the stock.
            if let Some(shelf) = Arc::into_inner(shelf) {
                left.extend(shelf.stock.close(deadline));
            }
        }
        for ending in ending {
            left.extend(ending.join().unwrap_or_default());
        }
        left
    }
}

impl Drop for DiskStock {
    fn drop(&mut self) {
        for left in self.clear(Deadline::after(self.budget())) {
            log::warn!("Left over of the stock: {left}: {}", left.source);
        }
    }
}

impl Maker for Workshop {
    type Item = Disk;
    type Error = DiskFailure;
    type Leftover = DiskFailure;
    const THREAD: &'static str = "rw-disk-stock";
    const NAME: &'static str = "disk";

    fn make(&self, deadline: Deadline) -> Result<Disk, DiskFailure> {
        self.pool.create(
            &SandboxId::random_with(PREFIX),
            &self.image,
            &self.dir,
            self.mode,
            deadline,
        )
    }

    /// The image may have been removed, or it is being replaced.
    fn is_wanted(&self) -> bool {
        Base::open(&self.image, &Faults::NONE).is_ok()
    }

    fn is_healthy(&self, disk: &Disk) -> bool {
        self.pool.is_as_made(disk, &self.image)
    }

    fn remove(&self, disks: Vec<Disk>, deadline: Deadline) -> Vec<DiskFailure> {
        self.pool.remove_all(disks, false, deadline)
    }
}
