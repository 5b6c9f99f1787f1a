//! Slot indices, shared safely by many processes.
//!
//! A slot in use has a file of its own, `slots/<i>` under the runtime directory, made with
//! `O_EXCL` and locked by the process that works with it. What is in the file says what the
//! slot left in the kernel and which VMM may still run on it. When a process dies, the kernel
//! drops its lock but the file stays, so the index is not handed out again until somebody
//! has proven the VMM dead and removed what the file lists. The file is removed last.
//!
//! The lock is `flock(2)`: it belongs to the open file, so two handles of one process
//! exclude each other as well.

mod lease;
mod record;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewake_sys::CallError;

use self::record::read_record;
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::ids::SlotIndex;
use crate::resource::claim::{is_at, is_locked};

pub use self::lease::{SlotLease, StillHeld, release_by_token};
pub use self::record::{ProcessIdentity, SlotRecord};

/// Consecutive occupied indices after which the directory is listed instead.
const PROBES: u16 = 8;
const HINT: &str = "next";
/// No sweep looks at a slot that is kept for longer.
const LOOK_BUDGET: Duration = Duration::from_millis(100);
/// How often a slot is tried that somebody has in hand: a look of a sweep is over sooner.
const LOOK: Duration = Duration::from_micros(100);

/// Why there is no slot.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// All indices are taken.
    #[error("All {0} network slots are in use")]
    Exhausted(u16),
    /// The index belongs to somebody who is at work with it.
    #[error("Slot {0} is in use")]
    InUse(SlotIndex),
    /// Nobody works with the index, but what its last user made may still be there: sweep.
    #[error("Slot {0} has not been cleaned up")]
    Stale(SlotIndex),
    /// The index is kept for another sandbox.
    #[error("Slot {index} is kept for {owner}")]
    Parked {
        /// The slot.
        index: SlotIndex,
        /// Who comes back to it.
        owner: String,
    },
    /// There is no such slot.
    #[error("Slot {0} is not in use")]
    Free(SlotIndex),
    /// The VMM on the slot has not been proven dead.
    #[error("Slot {index}: process {pid} still runs")]
    StillRuns {
        /// The slot.
        index: SlotIndex,
        /// The VMM's process id.
        pid: u32,
    },
    /// A process could not be looked at.
    #[error("Cannot watch process {pid}")]
    Process {
        /// Its pid.
        pid: u32,
        /// The call's error.
        source: CallError,
    },
    /// A slot file could not be made, read, written or removed.
    #[error("Cannot {what} {path}")]
    File {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A slot file does not hold what we write.
    #[error("Unreadable slot record {path}")]
    Record {
        /// The file.
        path: PathBuf,
        /// Where reading failed.
        source: serde_json::Error,
    },
}

/// The slot files of one runtime directory.
#[derive(Debug, Clone)]
pub struct Slots {
    dir: PathBuf,
    max: u16,
    faults: Faults,
}

impl Slots {
    /// Opens the slot directory under `runtime_dir`, making it if it is missing. Indices go
    /// from 1 to `max`.
    ///
    /// # Errors
    /// [`SlotError::File`].
    pub fn open(runtime_dir: &Path, max: SlotIndex, faults: Faults) -> Result<Self, SlotError> {
        let dir = runtime_dir.join("slots");
        std::fs::create_dir_all(&dir).map_err(|source| SlotError::File {
            what: "make the slot directory",
            path: dir.clone(),
            source,
        })?;
        Ok(Self {
            dir,
            max: max.get(),
            faults,
        })
    }

    /// Takes a free slot. Indices are handed out in turn, so that one just freed is the last
    /// to come back. Does not block.
    ///
    /// # Errors
    /// [`SlotError::Exhausted`], [`SlotError::File`].
    pub fn acquire(&self, owner: &str) -> Result<SlotLease, SlotError> {
        let start = self.hint();
        for offset in 0..PROBES.min(self.max) {
            if let Some(lease) = self.claim(self.following(start, offset), owner)? {
                return Ok(lease);
            }
        }
        // A crowded stretch: one listing is cheaper than thousands of failing opens.
        let mut taken = vec![false; usize::from(SlotIndex::MAX) + 1];
        for index in self.list()? {
            taken[usize::from(index.get())] = true;
        }
        for offset in 0..self.max {
            let index = self.following(start, offset);
            if !taken[usize::from(index.get())]
                && let Some(lease) = self.claim(index, owner)?
            {
                return Ok(lease);
            }
        }
        Err(SlotError::Exhausted(self.max))
    }

    /// Takes the slot of this index: a free one, or one that was parked for `owner`. Does
    /// not block, but for the moment that a sweep looks at it.
    ///
    /// # Errors
    /// [`SlotError::InUse`], [`SlotError::Parked`], [`SlotError::Stale`], and those of files.
    pub fn reserve(&self, index: SlotIndex, owner: &str) -> Result<SlotLease, SlotError> {
        if let Some(lease) = self.claim(index, owner)? {
            return Ok(lease);
        }
        let mut lease = match self.adopt_kept(index, owner) {
            Err(SlotError::Free(_)) => {
                // Freed between the two looks.
                return self.claim(index, owner)?.ok_or(SlotError::InUse(index));
            }
            other => other?,
        };
        match lease.record.take() {
            Some(record) if record.parked && record.owner == owner => {
                lease.update(SlotRecord {
                    parked: false,
                    holder: ProcessIdentity::current(),
                    ..record
                })?;
                Ok(lease)
            }
            Some(record) if record.parked => Err(SlotError::Parked {
                index,
                owner: record.owner,
            }),
            _ => Err(SlotError::Stale(index)),
        }
    }

    /// [`Slots::adopt`] for its owner, whom a sweep that looks at it keeps from it for a moment
    /// only.
    fn adopt_kept(&self, index: SlotIndex, owner: &str) -> Result<SlotLease, SlotError> {
        let is_kept = || {
            let record = self.record(index).ok().flatten();
            record.is_some_and(|record| record.parked && record.owner == owner)
        };
        self.adopt_within(index, Deadline::after(LOOK_BUDGET), is_kept)
    }

    /// [`Slots::adopt`], waiting for whoever has the slot in hand while it is worth while:
    /// there is nothing that could be waited for with a limit.
    pub(crate) fn adopt_within(
        &self,
        index: SlotIndex,
        patience: Deadline,
        is_worth_while: impl Fn() -> bool,
    ) -> Result<SlotLease, SlotError> {
        loop {
            match self.adopt(index) {
                Err(SlotError::InUse(_)) if is_worth_while() && !patience.has_passed() => {
                    std::thread::sleep(LOOK);
                }
                other => return other,
            }
        }
    }

    /// Takes hold of a slot that is in nobody's hands, whatever its record says. Does not
    /// block.
    ///
    /// # Errors
    /// [`SlotError::InUse`], [`SlotError::Free`], and those of files.
    pub fn adopt(&self, index: SlotIndex) -> Result<SlotLease, SlotError> {
        let path = self.path(index);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(SlotError::Free(index));
            }
            Err(source) => return Err(file_error("open the slot file", &path, source)),
        };
        if !lock(&file, &path)? {
            return Err(SlotError::InUse(index));
        }
        if !is_at(&file, &path) {
            return Err(SlotError::Free(index));
        }
        let record = read_record(&file, &path)?;
        Ok(SlotLease {
            index,
            path,
            file,
            record,
            faults: self.faults.clone(),
        })
    }

    /// What the file of a slot says, held or not; `None` while it is being allocated.
    ///
    /// # Errors
    /// [`SlotError::Free`], and those of files.
    pub fn record(&self, index: SlotIndex) -> Result<Option<SlotRecord>, SlotError> {
        let path = self.path(index);
        match File::open(&path) {
            Ok(file) => read_record(&file, &path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(SlotError::Free(index)),
            Err(source) => Err(file_error("open the slot file", &path, source)),
        }
    }

    /// The indices that are not free, ascending.
    ///
    /// # Errors
    /// [`SlotError::File`].
    pub fn list(&self) -> Result<Vec<SlotIndex>, SlotError> {
        let failed = |source| file_error("list the slots of", &self.dir, source);
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let index = name.to_str().and_then(|name| name.parse().ok());
            if let Some(index) = index.and_then(|index| SlotIndex::new(index).ok()) {
                found.push(index);
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn path(&self, index: SlotIndex) -> PathBuf {
        self.dir.join(index.to_string())
    }

    /// The index `offset` places behind `start`, going round.
    fn following(&self, start: u16, offset: u16) -> SlotIndex {
        let index = (u32::from(start) + u32::from(offset)) % u32::from(self.max) + 1;
        // Invariant: 1 to max, which came from a SlotIndex.
        u16::try_from(index)
            .ok()
            .and_then(|index| SlotIndex::new(index).ok())
            .unwrap_or_else(|| unreachable!("1 to {}", self.max))
    }

    /// Where to begin looking: behind the index last handed out by any process. Only a hint,
    /// so it needs no lock and may be missing.
    fn hint(&self) -> u16 {
        let mut text = [0; 8];
        File::open(self.dir.join(HINT))
            .and_then(|file| file.read_at(&mut text, 0))
            .ok()
            .and_then(|length| std::str::from_utf8(&text[..length]).ok())
            .and_then(|text| text.trim().parse::<u16>().ok())
            .map_or(0, |last| last % self.max)
    }

    /// Makes the file of a free slot; `None` where it is not free.
    fn claim(&self, index: SlotIndex, owner: &str) -> Result<Option<SlotLease>, SlotError> {
        let path = self.path(index);
        let made = self.faults.call("make the slot file", || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
        });
        let file = match made {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
            Err(source) => {
                // It may have been made all the same: then it is empty and in nobody's hands.
                if let Ok(lease) = self.adopt(index)
                    && lease.record().is_none()
                    && let Err(held) = lease.release()
                {
                    log::warn!("Slot {index}: {}", held.error);
                }
                return Err(file_error("make the slot file", &path, source));
            }
        };
        // A sweep may have taken the empty file in between; then it removes it.
        if !lock(&file, &path)? || !is_at(&file, &path) {
            return Ok(None);
        }
        let mut lease = SlotLease {
            index,
            path,
            file,
            record: None,
            faults: self.faults.clone(),
        };
        let record = SlotRecord {
            token: uuid::Uuid::new_v4().simple().to_string(),
            owner: owner.to_owned(),
            holder: ProcessIdentity::current(),
            vmm: None,
            parked: false,
            steps: Vec::new(),
        };
        if let Err(error) = lease.update(record) {
            // Nothing exists yet but the file: it goes away with the attempt.
            let _ = std::fs::remove_file(&lease.path);
            return Err(error);
        }
        let hint = format!("{index:<6}\n");
        // Only a hint: where it cannot be kept, allocation searches a little longer.
        let _ = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.dir.join(HINT))
            .and_then(|file| file.write_all_at(hint.as_bytes(), 0));
        Ok(Some(lease))
    }
}

fn file_error(what: &'static str, path: &Path, source: io::Error) -> SlotError {
    SlotError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Whether the lock could be had at once.
fn lock(file: &File, path: &Path) -> Result<bool, SlotError> {
    match is_locked(file) {
        Ok(held) => Ok(!held),
        Err(error) => Err(file_error("lock the slot file", path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rewake_sys::process;
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    struct Scratch(PathBuf);
    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("rewake-slot-{}-{name}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
        fn slots(&self, max: u16) -> Slots {
            Slots::open(&self.0, SlotIndex::new(max).unwrap(), Faults::NONE).unwrap()
        }
    }
    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn index(i: u16) -> SlotIndex {
        SlotIndex::new(i).unwrap()
    }

    #[test]
    fn indices_go_round_and_end_in_exhaustion() {
        let scratch = Scratch::new("round");
        let slots = scratch.slots(40);
        let mut leases: Vec<_> = (0..40).map(|_| slots.acquire("a").unwrap()).collect();
        let taken: BTreeSet<_> = leases.iter().map(SlotLease::index).collect();
        assert_eq!(taken.len(), 40);
        assert!(matches!(slots.acquire("a"), Err(SlotError::Exhausted(40))));
        let freed = leases.remove(20);
        let number = freed.index();
        freed.release().map_err(|held| held.error).unwrap();
        let again = slots.acquire("b").unwrap();
        assert_eq!(again.index(), number, "the only one left");
        drop((leases, again));
    }

    #[test]
    fn a_freed_index_is_the_last_to_come_back() {
        let scratch = Scratch::new("last");
        let slots = scratch.slots(5);
        for expected in [1, 2, 3, 4, 5, 1] {
            let lease = slots.acquire("a").unwrap();
            assert_eq!(lease.index().get(), expected);
            lease.release().map_err(|held| held.error).unwrap();
        }
    }

    #[test]
    fn a_dropped_lease_is_stale_until_adopted_and_released() {
        let scratch = Scratch::new("stale");
        let slots = scratch.slots(1);
        drop(slots.acquire("a").unwrap());
        assert!(matches!(slots.acquire("b"), Err(SlotError::Exhausted(1))));
        assert!(matches!(
            slots.reserve(index(1), "a"),
            Err(SlotError::Stale(_))
        ));
        let lease = slots.adopt(index(1)).unwrap();
        assert_eq!(lease.record().unwrap().owner, "a");
        lease.release().map_err(|held| held.error).unwrap();
        assert!(slots.acquire("b").is_ok());
    }

    #[test]
    fn a_held_slot_cannot_be_taken_by_anybody() {
        let scratch = Scratch::new("held");
        let slots = scratch.slots(9);
        let lease = slots.reserve(index(7), "a").unwrap();
        assert!(matches!(
            slots.reserve(index(7), "a"),
            Err(SlotError::InUse(_))
        ));
        assert!(matches!(slots.adopt(index(7)), Err(SlotError::InUse(_))));
        assert_eq!(slots.list().unwrap(), [index(7)]);
        lease.release().map_err(|held| held.error).unwrap();
        assert!(matches!(slots.adopt(index(7)), Err(SlotError::Free(_))));
    }

    #[test]
    fn who_looks_at_a_parked_slot_keeps_its_owner_from_it_for_a_moment_only() {
        let scratch = Scratch::new("looked-at");
        let slots = scratch.slots(1);
        slots.acquire("a").unwrap().park().unwrap();
        let look = slots.adopt(index(1)).unwrap();
        // For longer than any sweep: it is given up in the end.
        assert!(matches!(
            slots.reserve(index(1), "a"),
            Err(SlotError::InUse(_))
        ));
        std::thread::scope(|scope| {
            let back = scope.spawn(|| slots.reserve(index(1), "a"));
            std::thread::sleep(LOOK_BUDGET / 5);
            drop(look);
            drop(back.join().unwrap().unwrap());
        });
    }

    #[test]
    fn a_parked_slot_waits_for_its_owner_alone() {
        let scratch = Scratch::new("parked");
        let slots = scratch.slots(9);
        let lease = slots.reserve(index(3), "sb-a").unwrap();
        let token = lease.record().unwrap().token.clone();
        lease.park().unwrap();
        let other = slots.reserve(index(3), "sb-b").unwrap_err();
        assert_eq!(other.to_string(), "Slot 3 is kept for sb-a");
        let back = slots.reserve(index(3), "sb-a").unwrap();
        assert!(!back.record().unwrap().parked);
        assert_eq!(back.record().unwrap().token, token);
    }

    #[test]
    fn a_slot_is_not_freed_while_its_vmm_runs() {
        let scratch = Scratch::new("vmm");
        let slots = scratch.slots(9);
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let vmm = ProcessIdentity {
            pid: child.id(),
            start_time: process::start_time(child.id()).unwrap(),
        };
        let mut lease = slots.acquire("a").unwrap();
        lease.set_vmm(Some(vmm)).unwrap();
        let (path, token) = (
            lease.path().to_owned(),
            lease.record().unwrap().token.clone(),
        );
        let by_token = release_by_token(&path, &token).unwrap_err();
        assert!(
            matches!(by_token, SlotError::StillRuns { .. }),
            "{by_token}"
        );
        let StillHeld { mut lease, error } = *lease.release().unwrap_err();
        assert!(matches!(error, SlotError::StillRuns { .. }), "{error}");
        child.kill().unwrap();
        child.wait().unwrap();
        // The same pid with another start time is another process.
        let other = ProcessIdentity {
            start_time: 1,
            ..ProcessIdentity::current()
        };
        lease.set_vmm(Some(other)).unwrap();
        lease.release().map_err(|held| held.error).unwrap();
    }

    #[test]
    fn only_the_use_that_the_token_names_is_released() {
        let scratch = Scratch::new("token");
        let slots = scratch.slots(9);
        let lease = slots.acquire("a").unwrap();
        let (path, token) = (
            lease.path().to_owned(),
            lease.record().unwrap().token.clone(),
        );
        release_by_token(&path, "another").unwrap();
        assert!(path.exists());
        release_by_token(&path, &token).unwrap();
        assert!(!path.exists());
        release_by_token(&path, &token).unwrap();
    }

    #[test]
    fn many_threads_never_share_an_index() {
        let scratch = Scratch::new("threads");
        let slots = scratch.slots(64);
        let seen = Mutex::new(BTreeSet::new());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..8 {
                        let lease = slots.acquire("a").unwrap();
                        assert!(seen.lock().unwrap().insert(lease.index()));
                        drop(lease);
                    }
                });
            }
        });
        assert_eq!(seen.into_inner().unwrap().len(), 64);
    }

    #[test]
    fn an_unfinished_allocation_can_be_swept_and_garbage_is_refused() {
        let scratch = Scratch::new("garbage");
        let slots = scratch.slots(9);
        std::fs::write(scratch.0.join("slots/4"), "").unwrap();
        let lease = slots.adopt(index(4)).unwrap();
        assert!(lease.record().is_none());
        lease.release().map_err(|held| held.error).unwrap();
        std::fs::write(scratch.0.join("slots/4"), "{").unwrap();
        assert!(matches!(
            slots.adopt(index(4)),
            Err(SlotError::Record { .. })
        ));
        std::fs::write(scratch.0.join("slots/4"), vec![b' '; 17 << 10]).unwrap();
        assert!(matches!(slots.adopt(index(4)), Err(SlotError::File { .. })));
    }

    #[test]
    fn a_shorter_record_covers_a_longer_one() {
        let scratch = Scratch::new("shorter");
        let slots = scratch.slots(9);
        let mut lease = slots.acquire("a").unwrap();
        lease.set_owner(&"x".repeat(500)).unwrap();
        lease.set_owner("y").unwrap();
        assert_eq!(slots.record(lease.index()).unwrap().unwrap().owner, "y");
    }
}
