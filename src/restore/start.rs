//! The synchronous beginning of a restore: check, plan, prepare, start CH.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rewake_sys::netns;

use super::api::ApiSide;
use super::error::{Cause, Stage};
use super::kit::{Kit, KitMisuse, PassingLink, Taken, entrust};
use super::memory::{self, Held};
use super::vm_dir::VmDir;
use super::{Gate, Netns, RestoreSpec};
use crate::deadline::Deadline;
use crate::envd::ready::Prober;
use crate::envd::socket::{CurrentNetns, InNetns, Sockets};
use crate::plan::{self, MemoryMode, Plan, StateEdit};
use crate::resource::ledger::Ledger;
use crate::snapshot::{MemoryClaim, RunDir, RunFiles, SnapshotDir};
use crate::timeline::{Phase, Timeline};
use crate::vmm;
use crate::vmm::api::{MemoryRestoreMode, RestoreConfig, file_url};
use crate::vmm::launch::{self, ApiSocket, Vmm};
use crate::wire::conn::Stream;
use crate::wire::reactor::TokenRange;

/// How far the beginning has come, for the error if it fails.
pub(super) struct Start {
    pub(super) stage: Stage,
    pub(super) timeline: Timeline,
    pub(super) ledger: Ledger,
}

/// What the beginning leaves for the rest.
pub(super) struct Started {
    pub(super) plan: Plan,
    pub(super) api: ApiSide,
    pub(super) sockets: Sockets,
    pub(super) vm_dir: PathBuf,
    /// How a process that was warm finds its memory until it has answered, and nobody later.
    pub(super) passing: Option<PassingLink>,
    /// Keeps the memory file from being removed while CH reads it. Dropped after the
    /// link to its descriptor.
    pub(super) reading: Option<MemoryClaim>,
}

impl Start {
    pub(super) fn new(spec: &RestoreSpec) -> Self {
        Self {
            stage: Stage::Check,
            timeline: spec.timeline.clone().unwrap_or_else(Timeline::start),
            ledger: spec.log.clone().map_or_else(Ledger::new, Ledger::logged),
        }
    }

    /// Everything up to a CH process with `vm.restore` on its way: a fresh one, or the kit's.
    /// What was made is in the ledger, also where this fails.
    pub(super) fn run(
        &mut self,
        spec: &RestoreSpec,
        kit: Option<Kit>,
        deadline: Deadline,
        api_tokens: TokenRange,
    ) -> Result<(Started, Vmm), Cause> {
        let snapshot = SnapshotDir::open(&spec.inputs.snapshot_dir, &spec.snapshot_limits)?;
        self.timeline.mark(Phase::SnapshotChecked);

        self.stage = Stage::Plan;
        let (vm_dir, memory_path) = match &kit {
            Some(kit) => (kit.place().clone(), kit.place().memory_link()),
            None => {
                let vm_dir = VmDir::choose(&spec.runtime_dir, &spec.inputs.sandbox_id);
                (vm_dir, memory::inherited_path())
            }
        };
        let held = Held::take(&spec.inputs, &snapshot)?;
        let vsock = vm_dir.vsock_socket();
        let around = memory::circumstances(spec, &snapshot, &held, vsock, &memory_path);
        let plan = plan::plan(&spec.inputs, &snapshot, &around)?;
        let claim = held.for_mode(plan.memory_mode)?;
        memory::note(spec.inputs.memory_mode, &plan, &mut self.timeline);

        self.stage = Stage::Prepare;
        if let Some(kit) = kit {
            return self.run_warm(spec, kit, (snapshot, claim), plan, deadline, api_tokens);
        }
        vm_dir
            .create(&mut self.ledger)
            .map_err(|source| Cause::File {
                path: vm_dir.path().to_owned(),
                source,
            })?;
        self.ledger.check().map_err(Cause::Log)?;
        write_snapshot(&vm_dir, &plan, &snapshot, &memory_path)?;
        let memory = memory::inherited(plan.memory_mode, claim.as_ref(), &snapshot);
        let (socket, stream) = ApiSocket::bind(&vm_dir.api_socket())?;
        let stream = Stream::from_connected(stream).map_err(Cause::Socket)?;
        let api = queue_restore(&vm_dir, stream, &plan, spec, deadline, api_tokens)?;
        self.timeline.mark(Phase::Planned);

        let netns = spec.netns.as_ref().map(Netns::open).transpose()?;
        if matches!(spec.netns, Some(Netns::Of(_))) {
            self.timeline.mark(Phase::NetnsPinned);
        }
        if let Some(file) = snapshot.memory() {
            file.check_unchanged()?;
        }

        self.stage = Stage::Launch;
        let mut launch_spec = spec.vmm.clone();
        launch_spec.private_mount.clone_from(&plan.private_mount);
        launch_spec.env.push(vmm::orphan::mark(vm_dir.path()));
        let vmm = launch::launch(
            &launch_spec,
            socket,
            netns.as_ref().map(AsFd::as_fd),
            memory.as_slice(),
            &mut self.ledger,
        )?;
        self.timeline.mark(Phase::Spawned);
        let (id, pid) = (&spec.inputs.sandbox_id, vmm.pid());
        log::info!("Sandbox {id}: Cloud Hypervisor is process {pid}");
        // CH takes milliseconds to come up: time to make the probes' sockets.
        memory::read_ahead(&plan, &snapshot, &mut self.timeline);
        let sockets = sockets_in(netns, spec)?;
        self.pass_gate(spec)?;

        let vm_dir = vm_dir.path().to_owned();
        let mapped = plan.memory_mode.maps_file();
        let started = Started {
            plan,
            api,
            sockets,
            vm_dir,
            reading: claim.filter(|_| !mapped),
            passing: None,
        };
        Ok((started, vmm))
    }

    /// The rest of it on a process that idles already: no directory, no socket, no `exec`.
    fn run_warm(
        &mut self,
        spec: &RestoreSpec,
        kit: Kit,
        (snapshot, claim): (SnapshotDir, Option<MemoryClaim>),
        plan: Plan,
        deadline: Deadline,
        api_tokens: TokenRange,
    ) -> Result<(Started, Vmm), Cause> {
        if plan.private_mount.is_some() {
            return Err(KitMisuse::PrivateMount.into());
        }
        let idle_ms = kit.idle().as_secs_f64() * 1e3;
        let Taken {
            vm_dir,
            mut vmm,
            api,
            sockets,
            letters,
        } = kit.hand_over(&mut self.ledger)?;
        let passing = claim
            .as_ref()
            .map(|file| PassingLink::make(&vm_dir, file.as_fd()));
        let passing = passing.transpose()?;
        write_snapshot(&vm_dir, &plan, &snapshot, &vm_dir.memory_link())?;
        let api = queue_restore(&vm_dir, api, &plan, spec, deadline, api_tokens)?;
        self.timeline.mark(Phase::Planned);
        if let Some(file) = snapshot.memory() {
            file.check_unchanged()?;
        }
        if let (true, Some(locked)) = (plan.memory_mode.maps_file(), &claim) {
            entrust(&letters, &[locked.as_fd()]).map_err(|error| ended_or(error, &mut vmm))?;
        }
        self.timeline.mark(Phase::Spawned);
        let (id, pid) = (&spec.inputs.sandbox_id, vmm.pid());
        self.timeline
            .note(format!("Process {pid} was warm, ready for {idle_ms:.1} ms"));
        log::info!("Sandbox {id}: Cloud Hypervisor is process {pid}, which was warm");
        memory::read_ahead(&plan, &snapshot, &mut self.timeline);
        self.pass_gate(spec)?;
        let started = Started {
            plan,
            api,
            sockets,
            vm_dir: vm_dir.path().to_owned(),
            reading: claim,
            passing,
        };
        Ok((started, vmm))
    }

    /// The vCPUs run only after this was written down: the request is sent by the machine.
    fn pass_gate(&mut self, spec: &RestoreSpec) -> Result<(), Cause> {
        self.ledger.check().map_err(Cause::Log)?;
        self.stage = Stage::Gate;
        if let Some(netns) = &spec.netns
            && let Some(since) = netns.stands()?
        {
            self.timeline.mark_at(Phase::SlotAcquired, since);
        }
        if let Some(Gate(gate)) = &spec.gate {
            gate().map_err(Cause::Gate)?;
            self.timeline.mark(Phase::GatePassed);
        }
        Ok(())
    }
}

/// The letterbox of a process that is dying closes a moment before its end shows.
fn ended_or(error: KitMisuse, vmm: &mut Vmm) -> Cause {
    match vmm.process().wait_ended(Some(Duration::from_millis(50))) {
        Ok(true) => Cause::Ended { exit: vmm.reap() },
        _ => error.into(),
    }
}

/// Writes what CH is given to restore; it opens the memory file at `memory`.
fn write_snapshot(
    vm_dir: &VmDir,
    plan: &Plan,
    snapshot: &SnapshotDir,
    memory: &Path,
) -> Result<(), Cause> {
    let recorded = snapshot.state();
    let (state, reads) = match &plan.state {
        StateEdit::AsRecorded => (None, snapshot.memory().is_some()),
        StateEdit::Mapped(layout) => (Some(recorded.mapped_from_file(layout)), false),
        StateEdit::ReadFromZone(layout) => (Some(recorded.read_from_file(layout)), true),
    };
    let state = state.transpose().map_err(Cause::State)?;
    let files = RunFiles {
        config: &plan.config,
        state: state.as_deref().unwrap_or(recorded.as_bytes()),
        memory: reads.then_some(memory),
    };
    RunDir::create(&vm_dir.snapshot(), &files)?;
    Ok(())
}

fn queue_restore(
    vm_dir: &VmDir,
    stream: Stream,
    plan: &Plan,
    spec: &RestoreSpec,
    deadline: Deadline,
    tokens: TokenRange,
) -> Result<ApiSide, Cause> {
    let config = RestoreConfig {
        source_url: file_url(&vm_dir.snapshot())?,
        memory_restore_mode: match plan.memory_mode {
            MemoryMode::OnDemand => MemoryRestoreMode::OnDemand,
            // With nothing saved there is nothing to copy.
            MemoryMode::Shared | MemoryMode::Map | MemoryMode::Copy => MemoryRestoreMode::Copy,
        },
        resume: true,
        ..RestoreConfig::default()
    };
    let budget = spec.budgets.for_api(plan.memory_mode, plan.memory);
    let mut api = ApiSide::restore(stream, &config, deadline.within(budget), tokens)?;
    if plan.memory_mode == MemoryMode::Map {
        api.must_leave_private_files_alone();
    }
    Ok(api)
}

fn sockets_in(netns: Option<OwnedFd>, spec: &RestoreSpec) -> Result<Sockets, Cause> {
    let Some(netns) = netns else {
        return Ok(Arc::new(CurrentNetns));
    };
    let shelf =
        netns::tcp_sockets(netns.as_fd(), Prober::TOKENS).map_err(|source| Cause::Netns {
            path: spec
                .netns
                .as_ref()
                .map_or(Path::new(""), Netns::path)
                .to_owned(),
            source,
        })?;
    Ok(Arc::new(InNetns::with_shelf(netns, shelf)))
}
