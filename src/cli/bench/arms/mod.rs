//! The ways to bring a guest back: ours, the one that hosts use today, and the least that is
//! possible at all.

pub(super) mod conventional;
mod floor;
pub(super) mod ours;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use clap::ValueEnum;
use rewake::deadline::Deadline;
use rewake::ids::SandboxId;
use rewake::plan::MemoryMode;
use rewake::resource::disk::{Disk, DiskMode};
use rewake::resource::net::Slot;
use rewake::restore::kit::KitPool;
use rewake::timeline::Timeline;

use super::stage::{Stage, Template};
use crate::cli::Failure;

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

    /// The mode that it really uses where this one is asked for: nobody but us rewrites
    /// snapshots, so conventionally memory is copied or fetched on demand.
    pub(super) const fn mode(self, asked: MemoryMode) -> MemoryMode {
        match (self, asked) {
            (Self::Rival(Rival::Conventional), MemoryMode::Copy) => MemoryMode::Copy,
            (Self::Rival(Rival::Conventional), _) => MemoryMode::OnDemand,
            (_, asked) => asked,
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
    /// Where ours take their processes from.
    pub(super) kits: Option<&'a KitPool>,
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
    pub(super) memory_mode: Option<MemoryMode>,
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

/// A disk for one guest, in a directory of its own; `None` where the template has none.
fn make_disk(job: &Job<'_>, id: &SandboxId) -> Result<Option<Disk>, Failure> {
    let Some(base) = &job.template.base else {
        return Ok(None);
    };
    let dir = job.stage.dir.join(format!("disk-{id}"));
    std::fs::create_dir(&dir)?;
    let deadline = Deadline::after(BUDGET);
    Ok(Some(
        job.stage.disks.create(id, base, &dir, job.disk, deadline)?,
    ))
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
