//! The ways to bring a guest back: ours, the one that hosts use today, and the least that is
//! possible at all.

pub(super) mod conventional;
pub(super) mod floor;
pub(super) mod ours;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use clap::ValueEnum;
use rewake::deadline::Deadline;
use rewake::ids::SandboxId;
use rewake::memory;
use rewake::plan::MemoryMode;
use rewake::resource::disk::{Disk, DiskMode};
use rewake::resource::net::Slot;
use rewake::timeline::Timeline;
use rewake::vmm::api::{Features, Version};
use rewake::vmm::launch::LaunchSpec;

use super::DiskChoice;
use super::pools::Pools;
use super::run::LeftOver;
use super::stage::{Stage, StageError, Template};
use crate::cli::Failure;

/// What something took, and when its phases were reached.
pub(super) type Timed = (Duration, BTreeMap<String, f64>);

/// How long one launch may take, and one removal.
const BUDGET: Duration = Duration::from_secs(60);

/// Whom rewake is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Rival {
    /// Forks of ip, iptables, unshare, mount, losetup; polls; one API call after the other
    Conventional,
    /// Nothing but Cloud Hypervisor, one queued request, and a guest that answers
    Floor,
}

/// Who brings guests back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arm {
    Ours { pools: bool },
    Rival(Rival),
}

impl Arm {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ours { .. } => "rewake",
            Self::Rival(Rival::Conventional) => "conventional",
            Self::Rival(Rival::Floor) => "floor",
        }
    }
}

/// What every launch of one variant has in common.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) stage: &'a Stage,
    pub(super) template: &'a Template,
    pub(super) mode: MemoryMode,
    pub(super) disk: DiskMode,
    /// Where ours take what is ready.
    pub(super) pools: Option<&'a Pools>,
    /// Whether the guest will be frozen.
    pub(super) writes: bool,
}

impl Job<'_> {
    /// How its Cloud Hypervisor is started.
    fn vmm_spec(&self) -> LaunchSpec {
        let actor = &self.stage.actor;
        if self.writes {
            actor.writing_spec()
        } else {
            actor.spec.clone()
        }
    }
}

/// What one launch has ready before the clock starts.
pub(super) enum Ready {
    Nothing,
    Floor(Box<floor::Set>),
}

/// A guest that has answered and taken `/init`, or for the floor, answered.
pub(super) struct Launched {
    pub(super) took: Duration,
    pub(super) phases: BTreeMap<String, f64>,
    /// How its memory really came back.
    pub(super) memory_mode: MemoryMode,
    pub(super) timeline: Option<Timeline>,
    /// Where its guest is asked.
    pub(super) netns: OwnedFd,
    end: Ending,
}

enum Ending {
    Ours(Box<ours::Running>),
    Floor(Box<floor::Running>),
    Conventional(Box<conventional::Running>),
}

impl Job<'_> {
    /// What is not counted: for the floor everything but the process and its guest.
    pub(super) fn prepare(&self, arm: Arm) -> Result<Ready, Failure> {
        match arm {
            Arm::Rival(Rival::Floor) => Ok(Ready::Floor(Box::new(floor::prepare(self)?))),
            _ => Ok(Ready::Nothing),
        }
    }

    /// What is counted. Where it fails, everything that it made is gone.
    pub(super) fn launch(&self, arm: Arm, ready: Ready) -> Result<Launched, Failure> {
        match (arm, ready) {
            (_, Ready::Floor(set)) => floor::launch(self, *set),
            (Arm::Rival(_), Ready::Nothing) => conventional::launch(self),
            (Arm::Ours { .. }, Ready::Nothing) => ours::launch(self),
        }
    }
}

impl Launched {
    /// Ends the guest and removes all that was made for it; says what is left.
    pub(super) fn end(self, stage: &Stage) -> Vec<String> {
        match self.end {
            Ending::Ours(running) => running.end(stage),
            Ending::Floor(running) => running.end(stage),
            Ending::Conventional(running) => running.end(stage),
        }
    }
}

/// How a rival's process has the memory of its guest, as its mappings tell. Whether memory
/// that no file is behind was copied or comes on demand shows no more once all of it has come:
/// it was as asked, where this Cloud Hypervisor knows both.
pub(super) fn mode_of(job: &Job<'_>, pid: u32, asked: MemoryMode) -> Result<MemoryMode, Failure> {
    if job.stage.actor.stand_in {
        // It has no guest memory to show.
        return Ok(asked);
    }
    let usage = memory::usage(pid)?;
    let file = usage.mappings.iter().find(|mapping| mapping.has_file());
    let lazily = || {
        let version: Option<Version> = job.template.build.parse().ok();
        version.is_some_and(|version| Features::of(version).restore_on_demand)
    };
    match file {
        Some(mapping) if mapping.is_private => Ok(MemoryMode::Map),
        Some(_) => Ok(MemoryMode::Shared),
        None if usage.mappings.is_empty() => Err(StageError::NoMode.into()),
        None if asked != MemoryMode::Copy && lazily() => Ok(MemoryMode::OnDemand),
        None => Ok(MemoryMode::Copy),
    }
}

/// A disk for one guest, in a directory of its own; `None` where the template has none.
fn make_disk(job: &Job<'_>, id: &SandboxId) -> Result<Option<Disk>, Failure> {
    let Some(base) = &job.template.base else {
        return Ok(None);
    };
    let dir = job.stage.dir.join(format!("disk-{id}"));
    std::fs::create_dir(&dir)?;
    let made = match job.pools {
        Some(pools) => pools.disk(id, base, &dir, job.disk),
        None => {
            let deadline = Deadline::after(BUDGET);
            let disk = job.stage.disks.create(id, base, &dir, job.disk, deadline);
            disk.map_err(Failure::from)
        }
    };
    made.map(Some)
}

/// What disk guests really get, for everybody the same: which kind is the best that works here
/// shows when one is made, and guests of a chosen template have a disk where that has one.
pub(super) fn disk_of(
    stage: &Stage,
    asked: DiskChoice,
    templates: &[Template],
) -> Result<DiskChoice, Failure> {
    let base = templates.iter().find_map(|template| template.base.as_ref());
    match (asked, base) {
        (_, None) => Ok(DiskChoice::None),
        (DiskChoice::Auto | DiskChoice::None, Some(base)) => {
            let dir = stage.dir.join("trial");
            std::fs::create_dir(&dir)?;
            let (id, deadline) = (SandboxId::random(), Deadline::after(BUDGET));
            let disk = stage
                .disks
                .create(&id, base, &dir, DiskMode::Auto, deadline)?;
            let kind = disk.kind();
            match remove_disk(stage, Some(disk)) {
                None => Ok(kind.into()),
                Some(left) => Err(LeftOver(left).into()),
            }
        }
        (asked, Some(_)) => Ok(asked),
    }
}

fn remove_disk(stage: &Stage, disk: Option<Disk>) -> Option<String> {
    let disk = disk?;
    let dir = disk.dir().to_owned();
    let removed = stage.disks.remove(disk, false, Deadline::after(BUDGET));
    let removed = removed.err().map(|it| format!("{it}: {}", it.source));
    let _ = std::fs::remove_dir(dir);
    removed
}

fn remove_slot(stage: &Stage, slot: Slot) -> Option<String> {
    let removed = stage.net.destroy(slot, Deadline::after(BUDGET));
    removed.err().map(|it| format!("{it}: {}", it.source))
}

/// Times of a timeline's phases, in milliseconds from its beginning.
pub(super) fn phases(timeline: &Timeline) -> BTreeMap<String, f64> {
    let marks = timeline.marks().into_iter();
    marks
        .map(|(phase, at)| (phase.name().to_owned(), millis(at)))
        .collect()
}

pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
