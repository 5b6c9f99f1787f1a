//! Ending kits whose owner has died.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::CLAIM;
use crate::deadline::Deadline;
use crate::resource::claim::{self, is_locked};
use crate::resource::ledger::{Leftover, Step};
use crate::restore::VmDir;
use crate::vmm::orphan;

/// What a sweep has found.
#[derive(Debug, Default)]
pub struct KitSweep {
    /// Directories of kits that a living program keeps ready.
    pub in_use: Vec<PathBuf>,
    /// Directories of kits that are gone now, with their processes.
    pub reclaimed: Vec<PathBuf>,
    /// What could not be ended or removed.
    pub stuck: Vec<Leftover>,
}

/// Ends the kits under `runtime_dir` whose owner has died, and removes their directories.
/// Their slots are then free for [`HostNet::sweep`](crate::resource::net::HostNet::sweep).
/// Blocks, until the deadline at the latest.
///
/// A kit is a directory with a file `kit` in it, which its owner keeps locked: the kernel
/// drops the lock when the owner dies. Nothing else is touched.
///
/// # Errors
/// Where the directories cannot be listed.
pub fn sweep(runtime_dir: &Path, deadline: Deadline) -> io::Result<KitSweep> {
    let mut found = KitSweep::default();
    let all = VmDir::parent_of_all(runtime_dir);
    let entries = match all.read_dir() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        other => other?,
    };
    claim::sweep(&all, CLAIM);
    for entry in entries {
        let vm_dir = entry?.path();
        let Some(claim) = open_claim(&vm_dir)? else {
            continue;
        };
        if is_locked(&claim)? {
            found.in_use.push(vm_dir);
            continue;
        }
        // While we hold the lock, no other sweep is at work here.
        let stuck = found.stuck.len();
        let ours = orphan::list(runtime_dir);
        let processes = ours.into_iter().filter(|it| it.vm_dir == vm_dir);
        let steps = processes
            .map(|it| Step::Process {
                pid: it.process.pid,
                start_time: it.process.start_time,
            })
            .chain([Step::Directory {
                path: vm_dir.clone(),
            }]);
        for step in steps {
            if let Err(error) = step.undo(deadline) {
                found.stuck.push(Leftover { step, error });
                // The directory is what the process is found by: it goes last.
                break;
            }
        }
        if found.stuck.len() == stuck {
            found.reclaimed.push(vm_dir);
        }
    }
    Ok(found)
}

/// Whether the directory belongs to a kit that a living program keeps ready.
///
/// # Errors
/// What opening or locking its claim says.
pub fn is_kept(vm_dir: &Path) -> io::Result<bool> {
    match open_claim(vm_dir)? {
        Some(claim) => is_locked(&claim),
        None => Ok(false),
    }
}

fn open_claim(vm_dir: &Path) -> io::Result<Option<File>> {
    match File::open(vm_dir.join(CLAIM)) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_became_a_kit_goes_and_what_was_handed_over_stays() {
        let runtime = std::env::temp_dir().join(format!("rewake-kitsweep-{}", std::process::id()));
        let all = VmDir::parent_of_all(&runtime);
        let dirs = [
            ".new-bare",
            ".new-claimed",
            "kit.dead",
            "kit.taken",
            "sb-1.vm",
        ];
        for name in dirs {
            std::fs::create_dir_all(all.join(name)).unwrap();
        }
        std::fs::write(all.join(".new-claimed").join(CLAIM), "").unwrap();
        std::fs::write(all.join("kit.dead").join(CLAIM), "").unwrap();
        std::fs::write(all.join("kit.taken/api.sock"), "").unwrap();
        let swept = sweep(&runtime, Deadline::NEVER).unwrap();
        let left = dirs.map(|name| all.join(name).exists());
        let _ = std::fs::remove_dir_all(&runtime);
        assert_eq!(left, [false, false, false, true, true]);
        assert_eq!(swept.reclaimed, [all.join("kit.dead")]);
        assert!(swept.in_use.is_empty() && swept.stuck.is_empty());
    }
}
