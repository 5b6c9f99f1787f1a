//! The way of rewake: slot, disk and restore, cold or on a warm kit.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rewake::deadline::Deadline;
use rewake::envd::init::Init;
use rewake::ids::SandboxId;
use rewake::plan::{MemoryPolicy, RestoreInputs, RootDisk};
use rewake::resource::disk::Disk;
use rewake::resource::net::{PendingSlot, Slot};
use rewake::restore::kit::{Kit, Warm};
use rewake::restore::{Netns, RestoreSpec, Restored, restore_with};
use rewake::timeline::{Phase, Timeline};
use rewake::vmm::api::Client;

use super::{BUDGET, Ending, Job, Launched, make_disk, phases, remove_disk, remove_slot};
use crate::cli::Failure;
use crate::cli::bench::stage::{Stage, StageError};

pub(super) struct Running {
    restored: Restored,
    slot: Slot,
    disk: Option<Disk>,
}

impl Running {
    pub(super) fn end(self, stage: &Stage) -> Vec<String> {
        let Self {
            restored,
            slot,
            disk,
        } = self;
        let leftovers = restored.destroy(Deadline::after(BUDGET));
        let mut left: Vec<_> = leftovers.iter().map(ToString::to_string).collect();
        left.extend(remove_disk(stage, disk));
        left.extend(remove_slot(stage, slot));
        left
    }
}

pub(super) fn launch(job: &Job<'_>) -> Result<Launched, Failure> {
    let mut timeline = Timeline::start();
    let id = SandboxId::random();
    let (kit, slot) = acquire(job, &id)?;
    if kit.is_some() {
        timeline.mark(Phase::SlotAcquired);
    }
    let disk = match make_disk(job, &id) {
        Ok(disk) => disk,
        Err(failure) => {
            drop(kit);
            slot.remove(job.stage);
            return Err(failure);
        }
    };
    timeline.mark(Phase::DiskAcquired);
    let spec = spec(job, id, slot.netns(), disk.as_ref(), timeline);
    match restore_with(&spec, kit, Deadline::after(BUDGET)) {
        Ok(restored) => {
            // Invariant: no restore succeeds on a slot that does not stand.
            let slot = slot.take().unwrap_or_else(|| unreachable!("it stands"));
            let netns = slot.netns().try_clone_to_owned()?;
            // The balloon, which comes after it, is nobody's concern.
            let done = restored.timeline.at(Phase::InitDone).unwrap_or_default();
            Ok(Launched {
                took: done,
                phases: phases(&restored.timeline),
                memory_mode: restored.memory_mode,
                timeline: Some(restored.timeline.clone()),
                netns,
                end: Ending::Ours(Box::new(Running {
                    restored,
                    slot,
                    disk,
                })),
            })
        }
        Err(error) => {
            remove_disk(job.stage, disk);
            slot.remove(job.stage);
            log::debug!("failed after {} phases", error.timeline.marks().len());
            Err(error.into())
        }
    }
}

/// What is learnt of a guest by bringing it back once.
pub(in crate::cli::bench) struct Acquaintance {
    pub(in crate::cli::bench) nonce: String,
    /// What the Cloud Hypervisor that ran it calls itself.
    pub(in crate::cli::bench) build: String,
}

/// Brings a guest back and asks what it remembers; then freezes it once more into `plain`,
/// where that is wanted, from memory that no file is behind.
pub(in crate::cli::bench) fn acquaint(
    job: &Job<'_>,
    plain: Option<&Path>,
) -> Result<Acquaintance, Failure> {
    let stage = job.stage;
    let launched = launch(job)?;
    let known = (|| {
        let deadline = Deadline::after(BUDGET);
        let nonce = stage.nonce(&stage.agent(launched.netns.as_fd())?, deadline)?;
        let Ending::Ours(running) = &launched.end else {
            unreachable!("it was launched our way")
        };
        let restored = &running.restored;
        if let Some(plain) = plain {
            std::fs::create_dir(plain)?;
            let mut api = Client::assuming(restored.vmm.api_path(), restored.version);
            api.pause(deadline)?;
            api.snapshot(plain, deadline)?;
        }
        Ok(Acquaintance {
            nonce,
            build: restored.build.clone(),
        })
    })();
    let left = launched.end(stage);
    if left.is_empty() {
        return known;
    }
    known.and(Err(StageError::Program {
        program: "rewake".to_owned(),
        says: format!("left over: {}", left.join(", ")),
    }
    .into()))
}

/// The slot of a guest that is being launched.
enum Place {
    Standing(Box<Slot>),
    /// Made for it, while the restore begins.
    Pending(Arc<PendingSlot>),
}

impl Place {
    fn netns(&self) -> Netns {
        match self {
            Self::Standing(slot) => slot.netns_path().into(),
            Self::Pending(slot) => Arc::clone(slot).into(),
        }
    }

    fn take(self) -> Option<Slot> {
        match self {
            Self::Standing(slot) => Some(*slot),
            Self::Pending(slot) => slot.take(),
        }
    }

    fn remove(self, stage: &Stage) {
        if let Some(slot) = self.take() {
            remove_slot(stage, slot);
        }
    }
}

fn acquire(job: &Job<'_>, id: &SandboxId) -> Result<(Option<Kit>, Place), Failure> {
    if let Some(pools) = job.pools
        && let Warm {
            kit,
            slot: Some(slot),
        } = pools.kit(id)?
    {
        return Ok((Some(kit), Place::Standing(Box::new(slot))));
    }
    let deadline = Deadline::after(BUDGET);
    let slot = job.stage.net.begin(id.as_str(), deadline)?;
    Ok((None, Place::Pending(Arc::new(slot))))
}

fn spec(
    job: &Job<'_>,
    id: SandboxId,
    netns: Netns,
    disk: Option<&Disk>,
    timeline: Timeline,
) -> RestoreSpec {
    let mut inputs = RestoreInputs::new(id, &job.template.snapshot);
    inputs.memory_mode = MemoryPolicy::Only(job.mode);
    let device = disk.map(|disk| disk.path().to_owned());
    inputs.disk = match (&job.template.chosen, device) {
        (Some(chosen), device) => chosen.root_disk(device),
        (None, Some(device)) => RootDisk::At(device),
        (None, None) => RootDisk::AsRecorded,
    };
    let actor = &job.stage.actor;
    let mut spec = RestoreSpec::new(inputs, &actor.spec.program, job.stage.guest());
    spec.vmm = job.vmm_spec();
    spec.runtime_dir = run_dir(job.stage);
    spec.netns = Some(netns);
    spec.init = Some(Init::new());
    spec.timeline = Some(timeline);
    spec
}

/// Where our processes have their directories.
pub(in crate::cli::bench) fn run_dir(stage: &Stage) -> PathBuf {
    stage.run.join("v")
}
