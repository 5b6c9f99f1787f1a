//! What the maker of a template has in the kernel, written down beside its files, and what
//! becomes of it where the maker dies.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewake_sys::error::Named;

use super::error::{TemplateError, about, call};
use super::lock::{identity_of, lock, open_directory};
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::resource::disk::{DiskConfig, DiskPool};
use crate::resource::ledger::{Ledger, Leftover, Step, StepLog};
use crate::vmm::orphan;

/// What else a maker has in the kernel, a step a line. It never gets into a template.
pub(super) const JOURNAL_FILE: &str = "journal";
/// Where a maker keeps the disk that it boots from, if it has one.
pub(super) const DISK_DIR: &str = "disk";
/// Journals are short; what is longer is none.
const JOURNAL_MAX: u64 = 1 << 20;
/// How long undoing may take that nobody waits for.
const UNDO_BUDGET: Duration = Duration::from_secs(10);

/// The journal of a staging directory.
#[derive(Debug)]
pub(super) struct StageLog {
    pub(super) path: PathBuf,
}

impl StepLog for StageLog {
    fn made(&self, step: &Step) -> io::Result<()> {
        append(&self.path, step)
    }

    /// It goes with its directory.
    fn undone(&self, _: &Step) {}
}

/// Writes a step to a journal. Nothing is synced: what it tells of is gone after a crash of
/// the machine.
pub(super) fn append(journal: &Path, step: &Step) -> io::Result<()> {
    let mut line = serde_json::to_vec(step)?;
    line.push(b'\n');
    let mut options = File::options();
    let mut journal = options.append(true).create(true).open(journal)?;
    journal.write_all(&line)
}

/// Undoes what a dead maker had in the kernel, and removes its directory. `None` where its
/// maker lives.
pub(super) fn sweep_one(
    path: &Path,
    faults: &Faults,
) -> Result<Option<Vec<Leftover>>, TemplateError> {
    let (directory, identity) = open_directory(path, faults)?;
    if !lock(&directory, path, faults)? || identity_of(path) != Some(identity) {
        return Ok(None);
    }
    let steps = journalled(&path.join(JOURNAL_FILE));
    // A maker may die before it can write down which process it has started.
    let orphans = steps.iter().flat_map(|step| match step {
        Step::Directory { path } => orphan::list(path),
        _ => Vec::new(),
    });
    let orphans: Vec<Step> = orphans
        .map(|orphan| Step::Process {
            pid: orphan.process.pid,
            start_time: orphan.process.start_time,
        })
        .collect();
    let mut ledger = Ledger::from([steps, orphans].concat());
    let deadline = Deadline::after(UNDO_BUDGET);
    let leftovers = ledger.unwind(deadline);
    if !leftovers.is_empty() {
        // The journal is the only trace of them: it stays until they are gone.
        drop(ledger.release());
        return Ok(Some(leftovers));
    }
    remove_disks(&path.join(DISK_DIR), deadline)?;
    call(faults, about("remove", path), || {
        std::fs::remove_dir_all(path).named("unlink")
    })?;
    Ok(Some(leftovers))
}

/// Removes the disks that a dead maker had. They are found by their records, which are there
/// before anything else of them is.
fn remove_disks(dir: &Path, deadline: Deadline) -> Result<(), TemplateError> {
    if !dir.exists() {
        return Ok(());
    }
    let failed = |source| TemplateError::Disks {
        image: dir.to_owned(),
        source,
    };
    let pool = DiskPool::open(DiskConfig::default(), Faults::NONE);
    for id in pool.list(dir).map_err(failed)? {
        let removed = pool.remove_by_id(&id, dir, false, deadline);
        removed.map_err(|failure| failed(failure.source))?;
    }
    Ok(())
}

/// The steps of a journal, oldest first. The last line may have been cut short.
fn journalled(path: &Path) -> Vec<Step> {
    let Ok(file) = File::open(path) else {
        return Vec::new();
    };
    let lines = BufReader::new(file.take(JOURNAL_MAX)).lines();
    let lines = lines.map_while(Result::ok);
    let steps = lines.map_while(|line| serde_json::from_str(&line).ok());
    steps.collect()
}
