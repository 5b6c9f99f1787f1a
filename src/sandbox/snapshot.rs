//! Snapshot: a template is made of a running sandbox, which goes on.
//!
//! The vCPUs stand still from before Cloud Hypervisor writes until disk and memory are
//! copied: a template is one moment of all three. Then the sandbox goes on with a new life,
//! and the template gets its name, never in place of another.

use std::sync::Arc;

use super::context::Context;
use super::error::{Cause, Error, Operation};
use super::hold::Hold;
use super::pause::Freeze;
use super::state::State;
use crate::deadline::Deadline;
use crate::ids::{SandboxId, TemplateId};
use crate::resource::disk::Progress;
use crate::snapshot::Durability;
use crate::template::{HostFacts, Kind, Lineage, Origin, Stage, Template, TemplateStore};
use crate::timeline::{Phase, Timeline};

/// Makes the template `name` of a running sandbox.
pub(crate) fn snapshot(
    ctx: &Arc<Context>,
    store: &TemplateStore,
    id: &SandboxId,
    name: &TemplateId,
    asked: Deadline,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Template, Timeline), Error> {
    let deadline = ctx.deadline(asked);
    let failed = |cause| Error::new(id, Operation::Snapshot, cause);
    let hold = Hold::take(ctx, id, Operation::Snapshot)?;
    let running = hold.expect(State::Running).map_err(failed)?;
    if store.get(name).is_ok() {
        let id = name.clone();
        let source = crate::template::TemplateError::Occupied { id };
        return Err(failed(Cause::Template(source)));
    }
    let stage = store
        .stage()
        .map_err(|error| failed(Cause::Template(error)))?;
    let mut freeze = Freeze::begin(&hold, running, Operation::Snapshot, deadline)?;
    // Cloud Hypervisor wants the directory to itself; the stage is one.
    freeze.prepare(None, false)?;
    let written = hold
        .change(freeze.status.now(State::Pausing))
        .and_then(|()| freeze.stop())
        .and_then(|()| freeze.write(stage.path(), Durability::Warm))
        .and_then(|()| copy(&hold, &mut freeze, &stage, progress, deadline));
    if let Err(cause) = written {
        return Err(freeze.give_up(cause, None));
    }
    if let Err(cause) = freeze.go_on() {
        return Err(freeze.give_up(cause, None));
    }
    hold.change(freeze.running()).map_err(failed)?;
    // The sandbox runs on by now.
    super::write_out::punch(stage.path(), &ctx.config.faults, deadline);
    let vm = freeze.status.vm.clone();
    let timeline = std::mem::replace(&mut freeze.timeline, Timeline::start());
    let story = hold.journal.story();
    let mut origin = Origin::new(Kind::Snapshot, HostFacts::of_machine());
    origin.vmm_build = vm.map(|vm| vm.vmm).unwrap_or_default();
    origin.vmm = super::live::version_of(&origin.vmm_build);
    origin.lineage = Lineage {
        template: story.identity.template,
        sandbox: Some(id.clone()),
        origin: None,
    };
    let template = stage
        .describe(name, origin)
        .and_then(|manifest| store.publish(stage, &manifest));
    let template = template.map_err(|error| failed(Cause::Template(error)))?;
    let mut timeline = timeline;
    timeline.mark(Phase::Committed);
    Ok((template, timeline))
}

/// Copies the disk, which the guest goes on writing to.
fn copy(
    hold: &Hold,
    freeze: &mut Freeze<'_>,
    stage: &Stage,
    progress: &mut dyn FnMut(Progress),
    deadline: Deadline,
) -> Result<(), Cause> {
    let disks = &hold.ctx.disks;
    if !hold.journal.story().identity.disk {
        return Ok(());
    }
    let disk = disks
        .in_use(&hold.id, &hold.dir.disk())
        .map_err(|source| Cause::Disk {
            what: "take up",
            source: Box::new(source),
        })?;
    disks
        .flatten(&disk, &stage.rootfs(), progress, deadline)
        .map_err(|source| Cause::DiskFile {
            what: "flatten",
            source,
        })?;
    freeze.timeline.mark(Phase::DiskFlattened);
    Ok(())
}
