//! Launch: a fresh sandbox from a snapshot template.

use std::path::PathBuf;
use std::sync::Arc;

use super::context::Context;
use super::dir::SandboxDir;
use super::error::{Cause, Error, Full, Operation, file};
use super::hold::Hold;
use super::journal::{Identity, Journal};
use super::making::{Got, Making};
use super::untouched::Ran;
use crate::deadline::Deadline;
use crate::envd::init::{Init, Lifecycle};
use crate::ids::{SandboxId, SlotIndex, TemplateId};
use crate::plan::{MemoryMode, PassedOver, PlanError, RootDisk, Unfit};
use crate::resource::disk::DiskMode;
use crate::resource::net::CreateError;
use crate::resource::slot::SlotError;
use crate::restore::{self, Gate, Stage};
use crate::snapshot::{ClaimError, OwnError, SealError, SnapshotDir, make_own};
use crate::timeline::{Phase, Timeline};
use crate::units::Bytes;

/// How a sandbox is launched.
#[derive(Debug, Clone)]
pub struct LaunchOptions {
    /// Its id; absent: a random one.
    pub id: Option<SandboxId>,
    /// What its agent is told. Lifecycle and ids are filled in.
    pub init: Init,
    /// Its network slot; absent: a prepared one, with a warm process in it where the host
    /// keeps such, or the next that is free.
    pub slot: Option<SlotIndex>,
    /// Which kind of disk; absent: the host's choice.
    pub disk_mode: Option<DiskMode>,
    /// How its memory comes back; absent: the best that works. [`MemoryMode::Shared`]: in a
    /// file of its own that shares the template's blocks, or the launch fails.
    pub memory_mode: Option<MemoryMode>,
    /// Where the mode is left open: `Shared` comes before `Map` where the file system can
    /// share blocks (XFS, btrfs). The first pause then writes no memory; but pages that are
    /// not in the sandbox's own file's page cache come from the disk, and clones have none in
    /// common.
    pub own_memory: bool,
    /// Keeps a list of the memory that it needed until it was ready with the template, for the
    /// next launches to read ahead. How that went is noted in the timeline.
    pub record_working_set: bool,
    /// When to give up. [`Deadline::NEVER`]: the host's patience.
    pub deadline: Deadline,
}

impl Default for LaunchOptions {
    fn default() -> Self {
        Self {
            id: None,
            init: Init::new(),
            slot: None,
            disk_mode: None,
            memory_mode: None,
            own_memory: false,
            record_working_set: false,
            deadline: Deadline::NEVER,
        }
    }
}

/// What a sandbox is launched from.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) template: Option<TemplateId>,
    pub(crate) snapshot: PathBuf,
    /// The base image of its disk; absent: it has no disk of its own.
    pub(crate) base: Option<PathBuf>,
    /// The directory that the recorded disk path lies in, where that must be kept.
    pub(crate) sandbox_dir: Option<PathBuf>,
    pub(crate) memory: Bytes,
    pub(crate) vcpus: u64,
}

/// Acquires everything that the restore needs.
pub(crate) fn prepare(
    ctx: &Arc<Context>,
    source: &Source,
    options: LaunchOptions,
) -> Result<Making, Error> {
    let timeline = Timeline::start();
    let deadline = ctx.deadline(options.deadline);
    let id = options.id.clone().unwrap_or_else(SandboxId::random);
    let failed = |cause| Error::new(&id, Operation::Launch, cause);
    let place = ctx
        .admission
        .enter(ctx.needs(options.memory_mode, source.memory), || {
            ctx.running()
        })
        .map_err(|full| failed(Cause::Full(full)))?;
    let hold = begin(ctx, &id, source).map_err(failed)?;
    let mut making = Making::new(hold, Operation::Launch, place, timeline, deadline);
    let acquired = acquire(ctx, source, &options, &mut making)
        .and_then(|()| own_memory(ctx, source, &options, &mut making));
    let own = match acquired {
        Ok(own) => own,
        Err(cause) => return Err(making.abandon(cause, Ran::No)),
    };
    if options.record_working_set {
        making.record_into = Some(source.snapshot.clone());
    }
    let gate = gate(&making.hold.dir);
    let mode = options.memory_mode;
    let init = told(options.init, &id, source.template.as_ref());
    let sandbox_dir = source.sandbox_dir.clone();
    making.specify(
        own.as_ref().unwrap_or(&source.snapshot),
        |inputs| {
            inputs.template_id.clone_from(&source.template);
            inputs.memory_mode = Context::memory_policy(mode, own.is_some());
            if let (Some(sandbox_dir), RootDisk::At(device)) = (sandbox_dir, &inputs.disk) {
                inputs.disk = RootDisk::AtRecordedPath {
                    device: device.clone(),
                    sandbox_dir,
                };
            }
        },
        init,
        gate,
    );
    Ok(making)
}

/// Makes the directory and the journal of the sandbox, and gives it its name.
fn begin(ctx: &Arc<Context>, id: &SandboxId, source: &Source) -> Result<Hold, Cause> {
    let (root, faults) = (&ctx.config.root, &ctx.config.faults);
    let (dir, lock) =
        SandboxDir::unnamed(root, id, faults).map_err(file("make a sandbox directory in", root))?;
    let mut identity = Identity::new(
        id.clone(),
        source.template.clone(),
        source.memory,
        source.vcpus,
    );
    identity.disk = source.base.is_some();
    let discard = |dir: SandboxDir| {
        if let Err(error) = dir.remove() {
            log::warn!(
                "{} is left to the next recovery: {error}",
                dir.path().display()
            );
        }
    };
    if let Err(error) = Journal::create(&dir.journal(), identity, faults.clone()) {
        discard(dir);
        return Err(error.into());
    }
    let named = match dir.name(root, id) {
        Ok(named) => named,
        Err((dir, error)) => {
            discard(dir);
            let taken = error.kind() == std::io::ErrorKind::AlreadyExists;
            return Err(if taken {
                Cause::Exists
            } else {
                file("name the directory of a sandbox in", root)(error)
            });
        }
    };
    Hold::locked(ctx, id, named, lock)
}

/// Slot and disk, neither waiting for the other.
fn acquire(
    ctx: &Context,
    source: &Source,
    options: &LaunchOptions,
    making: &mut Making,
) -> Result<(), Cause> {
    let (id, disks) = (making.hold.id.clone(), making.hold.dir.disk());
    let deadline = making.deadline;
    let mode = options.disk_mode.unwrap_or(ctx.config.disk_mode);
    if let (Some(base), Some(stock)) = (&source.base, ctx.disk_stock.get()) {
        let ready = stock.take(&id, base, &disks, mode);
        making.put_disk(ready.map_err(|failure| Cause::Disk {
            what: "take over",
            source: Box::new(failure),
        })?);
    }
    let base = source.base.as_deref();
    let base = base.filter(|_| making.disk().is_none());
    let make_disk = base.map(|base| || ctx.disks.create(&id, base, &disks, mode, deadline));
    // A process that runs already cannot be given a mount namespace.
    let may_be_warm = source.sandbox_dir.is_none();
    making.acquire(
        || slot(ctx, &id, options.slot, may_be_warm, deadline).map(Some),
        make_disk,
        "make",
    )?;
    let mut status = making.hold.status();
    status.slot = making.slot_index();
    making.hold.change(status)
}

/// The template's snapshot as the sandbox's own, where that is wanted and can be: its life
/// before the first. The template's own memory file is never written to.
fn own_memory(
    ctx: &Context,
    source: &Source,
    options: &LaunchOptions,
    making: &mut Making,
) -> Result<Option<PathBuf>, Cause> {
    let must = options.memory_mode == Some(MemoryMode::Shared);
    let wished = options.own_memory && options.memory_mode.is_none();
    if !must && !wished {
        return Ok(None);
    }
    let refused = |cause: restore::Cause| Cause::Restore {
        stage: Stage::Check,
        source: Box::new(cause),
        log: Vec::new(),
    };
    let template = SnapshotDir::open(&source.snapshot, &ctx.config.snapshot_limits)
        .map_err(|error| refused(error.into()))?;
    let own = making.hold.dir.snapshot(0);
    let reason = match make_own(&template, &own, &ctx.config.faults) {
        Ok(()) => {
            making.timeline.mark(Phase::MemoryOwned);
            return Ok(Some(own));
        }
        Err(OwnError::File { path, source }) => return Err(file("make", &path)(source.into())),
        Err(OwnError::NotMappable(reason)) => Unfit::NotMappable(reason),
        Err(OwnError::NoFile) => Unfit::NoFile,
        Err(OwnError::Claim(ClaimError::Busy { file })) => Unfit::InUse { file },
        Err(OwnError::Claim(error)) => return Err(refused(error.into())),
        Err(OwnError::Space(SealError::NoSpace { free, needed, .. })) => {
            Unfit::NoRoom { free, needed }
        }
        Err(OwnError::Space(error)) => return Err(Cause::Seal(error)),
        Err(OwnError::Clone { file, source }) => Unfit::NotShared {
            file,
            error: source,
        },
    };
    let mode = MemoryMode::Shared;
    if must {
        return Err(match reason {
            Unfit::NoRoom { free, needed } => Cause::Full(Full::Disk {
                path: own,
                available: free,
                needed,
            }),
            reason => refused(PlanError::MemoryMode { mode, reason }.into()),
        });
    }
    let passed = PassedOver { mode, reason };
    making.timeline.note(format!("Memory mode {passed}"));
    Ok(None)
}

fn slot(
    ctx: &Context,
    id: &SandboxId,
    index: Option<SlotIndex>,
    may_be_warm: bool,
    deadline: Deadline,
) -> Result<Got, Cause> {
    let owner = id.as_str();
    let kits = ctx.kits.get();
    if let (true, None, Some(kits)) = (may_be_warm, index, kits)
        && let Some(warm) = kits
            .take(owner)
            .map_err(|error| Cause::Slot(error.into()))?
        && let Some(slot) = warm.slot
    {
        return Ok(Got::Standing(Box::new((slot, Some(warm.kit)))));
    }
    let made = match index {
        Some(index) => ctx.net.begin_at(index, owner, deadline).map(Got::Pending),
        None => match ctx.pool.take(owner) {
            Ok(Some(slot)) => Ok(Got::Standing(Box::new((slot, None)))),
            Ok(None) => ctx.net.begin(owner, deadline).map(Got::Pending),
            Err(error) => Err(error.into()),
        },
    };
    made.map_err(|error| match error {
        CreateError::Slot(SlotError::Exhausted(slots)) => Cause::Full(Full::Slots { slots }),
        error => Cause::Slot(error),
    })
}

/// Nothing comes to life that was destroyed meanwhile.
pub(crate) fn gate(dir: &SandboxDir) -> Gate {
    let dir = dir.clone();
    Gate(Arc::new(move || {
        if dir.is_doomed() {
            return Err(std::io::Error::other("the sandbox is being destroyed"));
        }
        Ok(())
    }))
}

/// What the agent is told: with the ids, and a life of its own.
fn told(init: Init, id: &SandboxId, template: Option<&TemplateId>) -> Init {
    Init {
        lifecycle: Lifecycle::random(),
        sandbox_id: Some(id.to_string()),
        template_id: template.map(ToString::to_string).or(init.template_id),
        ..init
    }
}
