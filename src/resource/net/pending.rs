//! A slot while it is built: its namespace can be used before the rest of it stands.

use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use rewake_sys::CallError;
use rewake_sys::error::Named;

use super::create::{CreateError, Slot};
use super::error::{NetError, SlotFailure};
use super::host::HostNet;
use crate::deadline::Deadline;
use crate::ids::SlotIndex;
use crate::resource::slot::SlotLease;

/// A slot that a thread of its own is building.
///
/// A VMM needs the namespace to start in and nothing else of the slot until it opens the tap,
/// which is milliseconds later: whoever starts one takes [`PendingSlot::netns`], and goes on
/// from there once the slot [stands](PendingSlot::stands). The slot itself is handed out once,
/// by [`PendingSlot::take`].
///
/// Dropping it waits until the thread is done, and drops the slot, which stays in the kernel
/// as any dropped [`Slot`] does.
#[derive(Debug)]
#[must_use = "a dropped slot stays in the kernel"]
pub struct PendingSlot {
    index: SlotIndex,
    path: PathBuf,
    build: Arc<Build>,
}

/// What the thread that builds and those who wait have in common.
#[derive(Debug)]
struct Build {
    progress: Mutex<Progress>,
    moved: Condvar,
}

#[derive(Debug)]
enum Progress {
    /// There is nothing to be used yet.
    Begun,
    /// The namespace is there and has its name.
    Pinned(OwnedFd),
    Stands(Box<Slot>, Instant),
    /// It stood at that time, and was handed out.
    Taken(Instant),
    /// What was made is undone, or named in the failure.
    Failed(Arc<SlotFailure>),
    Panicked,
}

/// Why the namespace of a slot that is being built cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PendingError {
    /// The slot could not be built.
    #[error(transparent)]
    Failed(Arc<SlotFailure>),
    /// No descriptor of it could be made.
    #[error("Cannot use the namespace of network slot {index}")]
    Namespace {
        /// The slot.
        index: SlotIndex,
        /// The call's error.
        source: CallError,
    },
    /// The slot was handed out before anybody asked for its namespace.
    #[error("Network slot {index} was handed out already")]
    Taken {
        /// The slot.
        index: SlotIndex,
    },
}

impl HostNet {
    /// Takes a free slot and begins to build it, on a thread of its own. As
    /// [`HostNet::create`] otherwise. Blocks for the slot's file and the start of a thread.
    ///
    /// # Errors
    /// [`CreateError::Slot`] where no index is to be had, [`CreateError::Build`] where no
    /// thread can be started. What building fails at is said by the pending slot.
    pub fn begin(
        self: &Arc<Self>,
        owner: &str,
        deadline: Deadline,
    ) -> Result<PendingSlot, CreateError> {
        let lease = self.slots.acquire(owner)?;
        self.begin_on(lease, deadline).map_err(CreateError::Build)
    }

    /// The same with the slot of this index, which must be free or parked for `owner`.
    ///
    /// # Errors
    /// As [`HostNet::begin`].
    pub fn begin_at(
        self: &Arc<Self>,
        index: SlotIndex,
        owner: &str,
        deadline: Deadline,
    ) -> Result<PendingSlot, CreateError> {
        let lease = self.slots.reserve(index, owner)?;
        self.begin_on(lease, deadline).map_err(CreateError::Build)
    }

    fn begin_on(
        self: &Arc<Self>,
        lease: SlotLease,
        deadline: Deadline,
    ) -> Result<PendingSlot, SlotFailure> {
        let index = lease.index();
        let path = self.config.netns_dir.join(&self.config.slot(index).netns);
        let build = Arc::new(Build {
            progress: Mutex::new(Progress::Begun),
            moved: Condvar::new(),
        });
        let (net, ours) = (Arc::clone(self), Arc::clone(&build));
        let (hand, given) = mpsc::sync_channel(1);
        let started = thread::Builder::new()
            .name("rw-slot".to_owned())
            .spawn(move || {
                // Nothing comes where the other end is dropped, which happens only to threads
                // that never started.
                if let Ok(lease) = given.recv() {
                    ours.run(|build| net.build_showing(lease, deadline, build));
                }
            })
            .named("clone");
        if let Err(source) = started {
            let step = "start a thread".to_owned();
            let source = NetError::Call { step, source };
            return Err(Self::unbuilt(lease, source, Vec::new()));
        }
        // The thread waits for it, so there is room.
        let _ = hand.send(lease);
        Ok(PendingSlot { index, path, build })
    }

    fn build_showing(
        &self,
        lease: SlotLease,
        deadline: Deadline,
        build: &Build,
    ) -> Result<Slot, SlotFailure> {
        self.build_with(lease, deadline, |namespace| {
            // Where it cannot be shown now, it is when the slot stands.
            if let Ok(namespace) = namespace.try_clone_to_owned() {
                build.set(Progress::Pinned(namespace));
            }
        })
    }
}

impl Build {
    fn run(&self, work: impl FnOnce(&Self) -> Result<Slot, SlotFailure>) {
        let outcome = catch_unwind(AssertUnwindSafe(|| work(self)));
        self.set(match outcome {
            Ok(Ok(slot)) => Progress::Stands(Box::new(slot), Instant::now()),
            Ok(Err(failure)) => Progress::Failed(Arc::new(failure)),
            Err(_) => Progress::Panicked,
        });
    }

    fn set(&self, progress: Progress) {
        *self.lock() = progress;
        self.moved.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, waits: impl Fn(&Progress) -> bool) -> MutexGuard<'_, Progress> {
        self.moved
            .wait_while(self.lock(), |progress| waits(progress))
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing is done any more.
    fn wait_over(&self) -> MutexGuard<'_, Progress> {
        self.wait_while(|it| matches!(it, Progress::Begun | Progress::Pinned(_)))
    }
}

impl PendingSlot {
    /// The slot's index.
    #[must_use]
    pub const fn index(&self) -> SlotIndex {
        self.index
    }

    /// The file that pins the namespace, or will.
    #[must_use]
    pub fn netns_path(&self) -> &Path {
        &self.path
    }

    /// Waits until the namespace is there, and opens it. It has no links yet, perhaps.
    ///
    /// # Errors
    /// [`PendingError`].
    ///
    /// # Panics
    /// Where the thread that builds the slot has.
    pub fn netns(&self) -> Result<OwnedFd, PendingError> {
        let index = self.index;
        let progress = self.build.wait_while(|it| matches!(it, Progress::Begun));
        let found = match &*progress {
            Progress::Pinned(namespace) => namespace.as_fd(),
            Progress::Stands(slot, _) => slot.netns(),
            Progress::Failed(failure) => return Err(PendingError::Failed(Arc::clone(failure))),
            Progress::Taken(_) => return Err(PendingError::Taken { index }),
            Progress::Begun | Progress::Panicked => self.panicked(),
        };
        found
            .try_clone_to_owned()
            .named("fcntl F_DUPFD_CLOEXEC")
            .map_err(|source| PendingError::Namespace { index, source })
    }

    /// Waits until the slot stands, and says since when.
    ///
    /// # Errors
    /// [`PendingError::Failed`]; everything made for it has been undone then, or is named.
    ///
    /// # Panics
    /// Where the thread that builds the slot has.
    pub fn stands(&self) -> Result<Instant, PendingError> {
        match &*self.build.wait_over() {
            Progress::Stands(_, at) | Progress::Taken(at) => Ok(*at),
            Progress::Failed(failure) => Err(PendingError::Failed(Arc::clone(failure))),
            Progress::Begun | Progress::Pinned(_) | Progress::Panicked => self.panicked(),
        }
    }

    /// Waits until the slot stands and hands it out; `None` where it does not, or was handed
    /// out before.
    #[must_use]
    pub fn take(&self) -> Option<Slot> {
        let mut progress = self.build.wait_over();
        let Progress::Stands(_, at) = *progress else {
            return None;
        };
        match mem::replace(&mut *progress, Progress::Taken(at)) {
            Progress::Stands(slot, _) => Some(*slot),
            _ => None,
        }
    }

    fn panicked(&self) -> ! {
        panic!(
            "the thread that builds network slot {} panicked",
            self.index
        )
    }
}

impl Drop for PendingSlot {
    fn drop(&mut self) {
        // Whoever undoes it afterwards goes by its record, which must not change any more.
        drop(self.take());
    }
}
