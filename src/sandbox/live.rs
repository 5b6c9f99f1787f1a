//! A running VM in reach: its process, its API, its agent.

use std::os::fd::AsFd;
use std::sync::Arc;

use rewake_sys::netns;
use rewake_sys::process::{self, Process};

use super::context::Context;
use super::error::{Cause, api};
use super::state::{RunningVm, Status};
use crate::deadline::Deadline;
use crate::envd::client::{Client as Agent, ClientOptions, Incarnation};
use crate::envd::init::Lifecycle;
use crate::envd::socket::InNetns;
use crate::ids::{SandboxId, SlotIndex};
use crate::resource::net::NetError;
use crate::resource::slot::ProcessIdentity;
use crate::vmm::api::{Client as Api, Version, VmState};

/// A VM whose process is proven to be the one on record, and alive.
pub(crate) struct Live {
    pub(crate) vm: RunningVm,
    pub(crate) process: Process,
    pub(crate) api: Api,
    pub(crate) agent: Agent,
}

impl Live {
    /// Takes up the VM of a status. Sends nothing.
    pub(crate) fn of(ctx: &Context, id: &SandboxId, status: &Status) -> Result<Self, Cause> {
        let vm = status.vm_now().cloned().ok_or(Cause::Ended)?;
        let process = open(vm.process)?;
        let api = Api::assuming(vm.vm_dir.join("api.sock"), version(&vm));
        let agent = agent(ctx, id, status.slot, vm.lifecycle, Some(&process))?;
        Ok(Self {
            vm,
            process,
            api,
            agent,
        })
    }

    /// What Cloud Hypervisor says the VM is doing.
    pub(crate) fn state(&mut self, deadline: Deadline) -> Result<VmState, Cause> {
        let info = self.api.info(deadline);
        info.map(|info| info.state)
            .map_err(api("ask for its state"))
    }

    /// Whether the process has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.process.has_ended().unwrap_or(false)
    }
}

/// A process that is the one on record, and alive.
pub(crate) fn open(identity: ProcessIdentity) -> Result<Process, Cause> {
    let opened = Process::open(identity.pid).map_err(|_| Cause::Ended)?;
    // Compared after the pidfd was opened: now the pid cannot change its owner any more.
    let same = process::start_time(identity.pid) == Some(identity.start_time);
    if !same || opened.has_ended().unwrap_or(true) {
        return Err(Cause::Ended);
    }
    Ok(opened)
}

/// The agent of a sandbox in one life, reached from inside its slot. With the process given,
/// its death ends every call.
pub(crate) fn agent(
    ctx: &Context,
    id: &SandboxId,
    slot: Option<SlotIndex>,
    lifecycle: Lifecycle,
    vmm: Option<&Process>,
) -> Result<Agent, Cause> {
    let network = |step: &str, source| {
        let step = step.to_owned();
        Cause::Network(NetError::Call { step, source })
    };
    let mut options = ClientOptions::default();
    if let Some(slot) = slot {
        let config = ctx.net.config();
        let path = config.netns_dir.join(&config.slot(slot).netns);
        let netns = netns::open(&path).map_err(|source| network("open the namespace", source))?;
        options.sockets = Arc::new(InNetns::new(netns));
    }
    if let Some(process) = vmm {
        let pidfd = process.as_fd().try_clone_to_owned();
        options.vmm = pidfd.ok().map(Arc::new);
    }
    let incarnation = Incarnation {
        sandbox: id.clone(),
        lifecycle,
    };
    Ok(Agent::new(ctx.guest(), incarnation, options))
}

fn version(vm: &RunningVm) -> Version {
    version_of(&vm.vmm).unwrap_or(Version::V53)
}

/// The version at the head of what a build calls itself: 53.0.0 of `v53.0-12-gabc-dirty`.
pub(crate) fn version_of(build: &str) -> Option<Version> {
    let text = build.trim_start_matches('v');
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.'));
    text[..end.unwrap_or(text.len())].parse().ok()
}
