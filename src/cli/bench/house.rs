//! A host as programs have it, in the run's own place: what resumes, pauses and ends
//! sandboxes is the library's front door, with its journals and locks.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::host::{Host, HostConfig, Limits, Sandbox};
use rewake::ids::TemplateId;
use rewake::plan::MemoryMode;
use rewake::resource::disk::DiskMode;
use rewake::template::{BuildSpec, Template as HostTemplate};
use rewake::units::Bytes;
use rewake_sys::netns;

use super::stage::{Stage, StageError};
use crate::cli::Failure;

/// How long any one thing may take here.
pub(super) const BUDGET: Duration = Duration::from_secs(120);

/// The front door, with a network of its own.
pub(super) struct House {
    pub(super) host: Host,
    /// Keeps the namespace.
    _netns: OwnedFd,
}

impl House {
    pub(super) fn open(stage: &Stage, disk: Option<DiskMode>) -> Result<Self, Failure> {
        let netns = netns::run_in_new(|netns| netns)?;
        let mut config = HostConfig::new(stage.dir.join("root"));
        config.net.netns_dir = stage.run.join("netns-of-host");
        let mut config = config.with_runtime_dir(stage.run.join("h"));
        let number = netns.as_raw_fd();
        config.netns = Some(format!("/proc/{}/fd/{number}", std::process::id()).into());
        config.vmm = stage.actor.writing_spec();
        config.disk_mode = disk.unwrap_or_default();
        config.limits = Limits {
            sandboxes: None,
            memory_reserve: Bytes(0),
        };
        Ok(Self {
            host: Host::open(config)?,
            _netns: netns,
        })
    }

    /// A template of the probe guest.
    pub(super) fn template(
        &self,
        stage: &Stage,
        ram_mib: u64,
        disk: Option<DiskMode>,
    ) -> Result<HostTemplate, Failure> {
        let kernel = stage.kernel(&stage.dir.join(format!("kernel-{ram_mib}")))?;
        let name = TemplateId::new(format!("bench-{ram_mib}"))?;
        let spec = BuildSpec {
            rootfs: disk.map(|_| stage.base()).transpose()?,
            disk_mode: disk.unwrap_or_default(),
            memory: Bytes::mib(ram_mib),
            runtime_dir: self.host.config().runtime_dir.clone(),
            ..BuildSpec::new(name, kernel, stage.actor.writing_spec())
        };
        Ok(self
            .host
            .build(&spec, &mut |_| {}, Deadline::after(BUDGET))?)
    }

    /// Takes its network down: the rest of it goes with the namespace.
    pub(super) fn close(self, stage: &Stage) {
        drop(self.host);
        // A mount of its own, as `ip netns` makes it.
        let mounts = stage.run.join("netns-of-host");
        let _ = rustix::mount::unmount(&mounts, rustix::mount::UnmountFlags::DETACH);
    }
}

/// How the memory of a sandbox that runs came back, as its journal tells.
pub(super) fn mode_of(sandbox: &Sandbox) -> Result<MemoryMode, Failure> {
    let story = sandbox.story()?;
    let name = story.status.vm.map(|vm| vm.memory_mode);
    let mode = MemoryMode::ALL
        .into_iter()
        .find(|mode| Some(mode.name()) == name.as_deref());
    mode.ok_or_else(|| StageError::NoMode.into())
}
