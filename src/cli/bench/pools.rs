//! What stands ready for warm launches: processes in their slots, and disks.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::ids::SandboxId;
use rewake::resource::disk::{Disk, DiskMode, DiskStock, DiskStockOptions};
use rewake::restore::kit::{KitPool, KitPoolOptions, Places, Warm};
use rewake::units::Bytes;

use super::arms::ours;
use super::run::LeftOver;
use super::stage::{Stage, Template};
use crate::cli::Failure;

/// For filling and emptying a pool.
const FILL_BUDGET: Duration = Duration::from_secs(120);

/// A warm launch that would silently have been a cold one.
#[derive(Debug, thiserror::Error)]
#[error("There was no {0} ready")]
pub(super) struct Exhausted(&'static str);

/// The pools of one run.
pub(super) struct Pools {
    kits: KitPool,
    disks: DiskStock,
}

impl Pools {
    /// For `most` launches at once, from so many templates. There is one more of each: of a
    /// pool that is empty, the next one is made at once, and nobody shall be measured beside
    /// that.
    pub(super) fn start(stage: &Stage, most: usize, templates: usize) -> Result<Self, Failure> {
        let places = Places::Slots {
            host: Arc::clone(&stage.net),
            pool: None,
        };
        let kits = KitPoolOptions {
            target: most + 1,
            ..KitPoolOptions::default()
        };
        let disks = DiskStockOptions {
            target: most + 1,
            // And one that is made for a single turn.
            images: templates + 1,
            ..DiskStockOptions::default()
        };
        let pool = Arc::clone(&stage.disks);
        let disks = DiskStock::open(pool, &stage.dir.join("stock"), disks)?;
        let (spec, run_dir) = (stage.actor.spec.clone(), ours::run_dir(stage));
        let kits = KitPool::start(spec, run_dir, places, kits)?;
        Ok(Self { kits, disks })
    }

    /// Waits until all is there again that is to be.
    pub(super) fn settle(&self) -> Result<(), Failure> {
        let deadline = Deadline::after(FILL_BUDGET);
        if self.kits.wait_settled(deadline) && self.disks.wait_settled(deadline) {
            return Ok(());
        }
        Err(LeftOver("a pool that does not fill".to_owned()).into())
    }

    /// Has disks of a template ready, where its guests have one.
    pub(super) fn prepare(&self, template: &Template, disk: DiskMode) -> Result<(), Failure> {
        let Some(base) = &template.base else {
            return Ok(());
        };
        self.disks.keep(base, disk)?;
        self.settle()
    }

    pub(super) fn kit(&self, id: &SandboxId) -> Result<Warm, Failure> {
        let taken = self.kits.take(id.as_str())?;
        taken.ok_or_else(|| Exhausted("process").into())
    }

    pub(super) fn disk(
        &self,
        id: &SandboxId,
        base: &Path,
        dir: &Path,
        mode: DiskMode,
    ) -> Result<Disk, Failure> {
        let taken = self.disks.take(id, base, dir, mode)?;
        taken.ok_or_else(|| Exhausted("disk").into())
    }

    /// How much memory of its own a process has that waits, on average.
    pub(super) fn memory_of_a_kit(&self) -> Option<Bytes> {
        let stats = self.kits.stats();
        let each = stats.private_memory.0.checked_div(stats.ready as u64)?;
        Some(Bytes(each))
    }

    pub(super) fn close(self) -> Result<(), Failure> {
        let deadline = Deadline::after(FILL_BUDGET);
        let mut left = self.kits.close(deadline);
        let disks = self.disks.close(deadline);
        left.extend(disks.iter().map(|it| format!("{it}: {}", it.source)));
        if left.is_empty() {
            return Ok(());
        }
        Err(LeftOver(left.join(", ")).into())
    }
}
