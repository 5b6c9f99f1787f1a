//! The memory file on its way to CH: taken, handed over, and what is said about it.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use super::RestoreSpec;
use super::error::Cause;
use crate::memory::WorkingSet;
use crate::plan::{Circumstances, MemoryMode, MemoryPolicy, Plan, RestoreInputs, Unfit};
use crate::snapshot::{ClaimError, MemoryAccess, MemoryClaim, SnapshotDir};
use crate::timeline::Timeline;
use crate::vmm::launch::FIRST_INHERITED;

/// The memory file, taken for as much as the policy may want and others allow.
pub(super) struct Held {
    claim: Option<MemoryClaim>,
    not_own: Option<Unfit>,
}

impl Held {
    /// Takes the memory file: to write to it where the policy comes to that, else to read.
    ///
    /// A file that cannot even be read beside its present user is one that a running VM
    /// writes to, or that is being removed: no mode can use it.
    pub(super) fn take(inputs: &RestoreInputs, snapshot: &SnapshotDir) -> Result<Self, Cause> {
        let wants_own = inputs
            .memory_mode
            .candidates()
            .contains(&MemoryMode::Shared);
        let mut not_own = None;
        if wants_own {
            match snapshot.claim(MemoryAccess::Own) {
                Ok(claim) => {
                    return Ok(Self {
                        claim,
                        not_own: None,
                    });
                }
                Err(ClaimError::Busy { file }) => not_own = Some(Unfit::InUse { file }),
                Err(ClaimError::NotWritable { file, source }) => {
                    not_own = Some(Unfit::NotWritable {
                        file,
                        errno: source,
                    });
                }
                Err(error) => return Err(error.into()),
            }
        }
        let claim = snapshot.claim(MemoryAccess::Read)?;
        Ok(Self { claim, not_own })
    }

    /// Keeps what the mode needs.
    pub(super) fn for_mode(self, mode: MemoryMode) -> Result<Option<MemoryClaim>, Cause> {
        let claim = match self.claim {
            Some(claim) if mode != MemoryMode::Shared && claim.access() == MemoryAccess::Own => {
                Some(claim.into_reader()?)
            }
            claim => claim,
        };
        Ok(claim)
    }
}

/// What the plan has to know of the host.
pub(super) fn circumstances(
    spec: &RestoreSpec,
    snapshot: &SnapshotDir,
    held: &Held,
    vsock_socket: PathBuf,
    memory_path: &Path,
) -> Circumstances {
    // Asked only where it may matter: whoever wants just this mode hears it from CH.
    let falls_back = matches!(spec.inputs.memory_mode, MemoryPolicy::Auto { .. });
    let asked = falls_back && snapshot.layout().is_err();
    Circumstances {
        vsock_socket,
        memory_path: memory_path.to_owned(),
        version: spec.vmm.version,
        not_own: held.not_own.clone(),
        no_userfaultfd: asked.then(|| rewake_sys::uffd::probe().err()).flatten(),
    }
}

/// The path by which CH opens the memory file. It leads to the descriptor that CH inherits,
/// so that what was checked and locked is what is used.
pub(super) fn inherited_path() -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{FIRST_INHERITED}"))
}

/// The descriptor that CH inherits as its first. Where memory is mapped it is the locked one:
/// the lock lasts as long as CH. Where it is read it is another, since nobody needs the file
/// afterwards.
pub(super) fn inherited<'a>(
    mode: MemoryMode,
    claim: Option<&'a MemoryClaim>,
    snapshot: &'a SnapshotDir,
) -> Option<BorrowedFd<'a>> {
    if mode.maps_file() {
        claim.map(AsFd::as_fd)
    } else {
        snapshot.memory().map(AsFd::as_fd)
    }
}

/// Says which mode was chosen, and why not a better one.
pub(super) fn note(policy: MemoryPolicy, plan: &Plan, timeline: &mut Timeline) {
    for passed in &plan.passed_over {
        timeline.note(format!("Memory mode {passed}"));
    }
    if matches!(policy, MemoryPolicy::Auto { .. }) {
        timeline.note(format!("Memory mode {} was chosen", plan.memory_mode));
    }
}

/// Asks for the pages that the guest needs first, where they were recorded, while CH is still
/// starting. Without them the restore is slower, not wrong.
pub(super) fn read_ahead(plan: &Plan, snapshot: &SnapshotDir, timeline: &mut Timeline) {
    let Some(file) = snapshot.memory() else {
        return;
    };
    if plan.memory_mode == MemoryMode::Copy {
        return;
    }
    match WorkingSet::load(snapshot) {
        Ok(None) => {}
        Ok(Some(set)) => {
            set.read_ahead(file);
            timeline.note(format!("A working set of {} is read ahead", set.size()));
        }
        Err(error) => timeline.note(format!("No working set is read ahead: {error}")),
    }
}
