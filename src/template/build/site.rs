//! What exists while a template is built, and how all of it goes again.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rewake_sys::CallError;
use rewake_sys::error::Named;

use super::error::{BuildCause, BuildLeftover};
use super::{BuildNetwork, BuildSpec, Stage, TemplateStore, Workshop};
use crate::deadline::Deadline;
use crate::envd;
use crate::envd::client::{Client as Agent, ClientOptions, Incarnation};
use crate::envd::dialect;
use crate::envd::hedge::Hedge;
use crate::envd::init::{Init, Lifecycle};
use crate::envd::ready::await_ready;
use crate::envd::socket::{CurrentNetns, InNetns, Sockets};
use crate::ids::SandboxId;
use crate::resource::disk::{Disk, DiskMode, Progress};
use crate::resource::ledger::Ledger;
use crate::resource::net::Slot;
use crate::resource::slot::ProcessIdentity;
use crate::restore::VmDir;
use crate::snapshot::layout::DEFAULT_ZONE;
use crate::template::error::{about, call};
use crate::units::Bytes;
use crate::vm_config::{
    BalloonConfig, ConsoleConfig, ConsoleOutputMode, CoreScheduling, CpusConfig, DiskConfig,
    MacAddr, MemoryConfig, MemoryZoneConfig, NetConfig, PayloadConfig, SerialConfig, VmConfig,
};
use crate::vmm::api::{ApiError, Client, Version};
use crate::vmm::launch::{ApiSocket, StopLimits, Vmm, launch};
use crate::vmm::orphan;

/// How long undoing may take, whatever became of the caller's deadline.
const UNDO_BUDGET: Duration = Duration::from_secs(20);
/// Lines of CH's log that an error quotes.
const QUOTED_LINES: usize = 5;
/// The disk's serial number in the guest. Without one it follows from the file's inode and
/// is another one for each clone.
const DISK_SERIAL: &str = "rewake-root";

/// All that a build has made so far.
pub(super) struct Site<'a> {
    workshop: Workshop<'a>,
    id: SandboxId,
    stage: Stage,
    ledger: Ledger,
    disk: Option<Disk>,
    slot: Option<Slot>,
    vmm: Option<Vmm>,
    api: Option<Client>,
}

impl<'a> Site<'a> {
    pub(super) fn open(workshop: Workshop<'a>, id: SandboxId) -> Result<Self, BuildCause> {
        let stage = workshop.store.stage()?;
        let ledger = Ledger::logged(stage.log());
        Ok(Self {
            workshop,
            id,
            stage,
            ledger,
            disk: None,
            slot: None,
            vmm: None,
            api: None,
        })
    }

    pub(super) const fn store(&self) -> &'a TemplateStore {
        self.workshop.store
    }

    /// The staging directory.
    pub(super) fn directory(&self) -> &Path {
        self.stage.path()
    }

    /// The disk that the guest boots on. A sweep finds it by its record.
    pub(super) fn make_disk(
        &mut self,
        image: &Path,
        mode: DiskMode,
        deadline: Deadline,
    ) -> Result<(), BuildCause> {
        let dir = self.stage.disk_dir();
        call(self.store().faults(), about("make", &dir), || {
            let mut builder = std::fs::DirBuilder::new();
            builder.mode(0o700).create(&dir).named("mkdir")
        })?;
        let disks = self.workshop.disks;
        let disk = disks.create(&self.id, image, &dir, mode, deadline)?;
        self.disk = Some(disk);
        Ok(())
    }

    pub(super) fn make_network(&mut self, deadline: Deadline) -> Result<(), BuildCause> {
        if let BuildNetwork::Slot(net) = self.workshop.network {
            let slot = net.create(self.id.as_str(), deadline)?;
            let steps = slot.ledger_steps();
            self.slot = Some(slot);
            for step in steps {
                self.stage.note(&step)?;
            }
        }
        Ok(())
    }

    /// Starts CH and connects to it.
    pub(super) fn launch(
        &mut self,
        spec: &BuildSpec,
        deadline: Deadline,
    ) -> Result<(), BuildCause> {
        let faults = self.store().faults();
        let memory = self.stage.memory();
        call(faults, about("make", &memory), || {
            let file = File::create_new(&memory).named("open")?;
            file.set_len(spec.memory.0).named("ftruncate")
        })?;
        let vm_dir = VmDir::choose(&absolute(&spec.runtime_dir)?, &self.id);
        let unmade = |source| BuildCause::File {
            path: vm_dir.path().to_owned(),
            source,
        };
        vm_dir.create(&mut self.ledger).map_err(unmade)?;
        self.ledger.check().map_err(unmade)?;
        let (socket, stream) = ApiSocket::bind(&vm_dir.api_socket())?;
        drop(stream);
        let mut launch_spec = spec.vmm.clone();
        launch_spec.env.push(orphan::mark(vm_dir.path()));
        let netns = self.slot.as_ref().map(|slot| slot.netns());
        let vmm = self
            .vmm
            .insert(launch(&launch_spec, socket, netns, &[], &mut self.ledger)?);
        let process = ProcessIdentity {
            pid: vmm.pid(),
            start_time: vmm.start_time(),
        };
        self.ledger.check().map_err(unmade)?;
        if let Some(slot) = &mut self.slot {
            let noted = slot.set_vmm(Some(process));
            noted.map_err(|error| BuildCause::Network(error.into()))?;
        }
        self.api = Some(Client::connect(vmm.api_path(), deadline)?);
        Ok(())
    }

    pub(super) fn vmm_version(&mut self) -> Result<Version, BuildCause> {
        Ok(self.api()?.version())
    }

    pub(super) fn vmm_build(&mut self, deadline: Deadline) -> Result<String, BuildCause> {
        Ok(self.api()?.ping(deadline)?.build_version)
    }

    pub(super) fn boot(&mut self, spec: &BuildSpec, deadline: Deadline) -> Result<(), BuildCause> {
        let config = self.vm_config(spec)?;
        self.ask("create the VM", |api| api.create(&config, deadline))?;
        self.ask("boot the guest", |api| api.boot(deadline))
    }

    /// Waits until the agent answers.
    pub(super) fn await_agent(&mut self, deadline: Deadline) -> Result<dialect::Agent, BuildCause> {
        let (target, sockets) = self.guest()?;
        let pidfd = self.vmm.as_ref().map(|vmm| vmm.process().as_fd());
        let faults = self.store().faults();
        let injected = |errno| BuildCause::Call {
            step: "wait for envd",
            source: CallError::new("injected", errno),
        };
        faults.before("wait for envd").map_err(injected)?;
        let ready = await_ready(target, sockets, Hedge::default(), deadline, pidfd);
        let ready = ready.map_err(BuildCause::Ready)?;
        faults.after("wait for envd").map_err(injected)?;
        Ok(ready.agent)
    }

    /// The agent's first id ever. Each launch brings another one, by which the agent sees
    /// that it was restored.
    pub(super) fn init(&mut self, init: &Init, deadline: Deadline) -> Result<(), BuildCause> {
        let init = init.renewed();
        let agent = self.agent(init.lifecycle)?;
        let faults = self.store().faults();
        let injected = |errno| BuildCause::Call {
            step: "tell envd who it is",
            source: CallError::new("injected", errno),
        };
        faults.before("tell envd who it is").map_err(injected)?;
        agent.init(&init, deadline).map_err(BuildCause::Init)?;
        faults.after("tell envd who it is").map_err(injected)
    }

    /// Best effort: without it the template is larger.
    pub(super) fn prepare(&mut self, memory: Bytes, deadline: Deadline) {
        let prepared = self.agent(Lifecycle::random()).map(|agent| {
            let prepared = agent.prepare_snapshot(memory, deadline);
            if let Err(error) = prepared {
                log::warn!("The guest did not prepare for its snapshot: {error}");
            }
        });
        if let Err(error) = prepared {
            log::warn!("The guest did not prepare for its snapshot: {error}");
        }
    }

    pub(super) fn freeze(&mut self, deadline: Deadline) -> Result<(), BuildCause> {
        self.ask("pause the guest", |api| api.pause(deadline))?;
        let target = self.stage.path().to_owned();
        self.ask("snapshot the guest", |api| api.snapshot(&target, deadline))
    }

    /// Ends CH. What it cannot be told it is made to do.
    pub(super) fn stop(&mut self, deadline: Deadline) -> Result<(), BuildCause> {
        let api = self.api.take();
        if let Some(vmm) = &mut self.vmm {
            vmm.stop(StopLimits::default(), deadline, |_, deadline| {
                if let Some(mut api) = api {
                    // Where this fails, signals follow.
                    let _ = api.shutdown_vmm(deadline);
                }
            })?;
        }
        Ok(())
    }

    pub(super) fn flatten(
        &mut self,
        progress: &mut dyn FnMut(Progress),
        deadline: Deadline,
    ) -> Result<(), BuildCause> {
        let Some(disk) = &self.disk else {
            return Ok(());
        };
        let to = self.stage.rootfs();
        let flattened = self.workshop.disks.flatten(disk, &to, progress, deadline);
        flattened.map_err(BuildCause::Flatten)
    }

    /// What CH said last.
    pub(super) fn last_words(&mut self) -> Vec<String> {
        self.vmm.as_mut().map_or_else(Vec::new, |vmm| {
            vmm.drain_log();
            vmm.log.last_lines(QUOTED_LINES)
        })
    }

    /// Removes all but the staging directory: CH first, then what it stood on. The result is
    /// what could not be removed.
    pub(super) fn clear(mut self) -> (Vec<BuildLeftover>, Stage) {
        let deadline = Deadline::after(UNDO_BUDGET);
        let left = self.ledger.unwind(deadline);
        let mut leftovers: Vec<_> = left.into_iter().map(BuildLeftover::Step).collect();
        // What is left is the caller's to know, not this ledger's to try again.
        drop(self.ledger.release());
        if let Some(mut vmm) = self.vmm.take() {
            vmm.reap();
        }
        if let (Some(mut slot), BuildNetwork::Slot(net)) = (self.slot.take(), self.workshop.network)
        {
            if leftovers.is_empty()
                && let Err(error) = slot.set_vmm(None)
            {
                log::warn!("Slot {}: {error}", slot.index());
            }
            if let Err(failure) = net.destroy(slot, deadline) {
                leftovers.push(BuildLeftover::Slot(failure));
            }
        }
        if let Some(disk) = self.disk.take()
            && let Err(failure) = self.workshop.disks.remove(disk, false, deadline)
        {
            leftovers.push(BuildLeftover::Disk(failure));
        }
        if leftovers.is_empty() {
            // Empty now. Where it is not, publishing refuses it.
            let _ = std::fs::remove_dir(self.stage.disk_dir());
        }
        (leftovers, self.stage)
    }

    fn vm_config(&self, spec: &BuildSpec) -> Result<VmConfig, BuildCause> {
        let (net, address) = match self.workshop.network {
            BuildNetwork::Slot(net) => {
                let config = net.config();
                let device = NetConfig {
                    tap: Some(config.tap_name.as_str().to_owned()),
                    mac: Some(MacAddr(config.guest_mac.0)),
                    ..NetConfig::default()
                };
                let (guest, gateway) = (config.guest_address, config.tap_address);
                let mask = u32::MAX.checked_shl(32 - u32::from(config.tap_prefix.min(32)));
                let mask = Ipv4Addr::from(mask.unwrap_or(0));
                let address = format!("ip={guest}::{gateway}:{mask}::eth0:off");
                (Some(vec![device]), Some(address))
            }
            BuildNetwork::Direct(_) => (None, None),
        };
        let disks = self.disk.as_ref().map(|disk| {
            vec![DiskConfig {
                serial: Some(DISK_SERIAL.to_owned()),
                ..DiskConfig::raw(disk.path())
            }]
        });
        let console = spec.console.as_deref().map(absolute).transpose()?;
        Ok(VmConfig {
            cpus: CpusConfig {
                boot_vcpus: spec.vcpus,
                max_vcpus: spec.vcpus,
                core_scheduling: Some(CoreScheduling::Off),
                ..CpusConfig::default()
            },
            memory: MemoryConfig {
                size: 0,
                thp: false,
                zones: Some(vec![MemoryZoneConfig {
                    id: DEFAULT_ZONE.to_owned(),
                    size: spec.memory.0,
                    file: Some(self.stage.memory()),
                    shared: true,
                    ..MemoryZoneConfig::default()
                }]),
                ..MemoryConfig::default()
            },
            payload: Some(PayloadConfig {
                kernel: Some(absolute(&spec.kernel)?),
                initramfs: spec.initramfs.as_deref().map(absolute).transpose()?,
                cmdline: Some(command_line(&spec.command_line, address)),
                ..PayloadConfig::default()
            }),
            disks,
            net,
            balloon: Some(BalloonConfig {
                deflate_on_oom: true,
                free_page_reporting: true,
                ..BalloonConfig::default()
            }),
            serial: match console {
                Some(file) => SerialConfig {
                    file: Some(file),
                    mode: ConsoleOutputMode::File,
                    socket: None,
                },
                None => SerialConfig::OFF,
            },
            console: ConsoleConfig::OFF,
            ..VmConfig::default()
        })
    }

    fn api(&mut self) -> Result<&mut Client, BuildCause> {
        // There is one from the launch to the stop.
        self.api.as_mut().ok_or(BuildCause::Call {
            step: "reach Cloud Hypervisor",
            source: CallError::new("connect", rustix::io::Errno::NOTCONN),
        })
    }

    /// One call of the API, under a step's name.
    fn ask<T>(
        &mut self,
        step: &'static str,
        call: impl FnOnce(&mut Client) -> Result<T, ApiError>,
    ) -> Result<T, BuildCause> {
        let faults = self.store().faults();
        let injected = |errno| BuildCause::Call {
            step,
            source: CallError::new("injected", errno),
        };
        faults.before(step).map_err(injected)?;
        let answer = call(self.api()?)?;
        faults.after(step).map_err(injected)?;
        if let Some(vmm) = &mut self.vmm {
            vmm.drain_log();
        }
        Ok(answer)
    }

    /// Where the agent listens, and where sockets come from that reach it.
    fn guest(&self) -> Result<(SocketAddr, Sockets), BuildCause> {
        match (self.workshop.network, &self.slot) {
            (BuildNetwork::Slot(net), Some(slot)) => {
                let netns = copy_of(slot.netns(), "keep the network namespace")?;
                let target = SocketAddr::from((net.config().guest_address, envd::PORT));
                Ok((target, Arc::new(InNetns::new(netns))))
            }
            (BuildNetwork::Slot(_), None) => Err(BuildCause::Call {
                step: "reach the guest",
                source: CallError::new("connect", rustix::io::Errno::NOTCONN),
            }),
            (BuildNetwork::Direct(target), _) => Ok((target, Arc::new(CurrentNetns))),
        }
    }

    fn agent(&self, lifecycle: Lifecycle) -> Result<Agent, BuildCause> {
        let (target, sockets) = self.guest()?;
        let pidfd = self.vmm.as_ref().map(|vmm| vmm.process().as_fd());
        let pidfd = pidfd.map(|pidfd| copy_of(pidfd, "watch Cloud Hypervisor"));
        let options = ClientOptions {
            sockets,
            token: None,
            vmm: pidfd.transpose()?.map(Arc::new),
        };
        let incarnation = Incarnation {
            sandbox: self.id.clone(),
            lifecycle,
        };
        Ok(Agent::new(target, incarnation, options))
    }
}

fn copy_of(fd: std::os::fd::BorrowedFd<'_>, step: &'static str) -> Result<OwnedFd, BuildCause> {
    let copy = fd.try_clone_to_owned().named("fcntl F_DUPFD_CLOEXEC");
    copy.map_err(|source| BuildCause::Call { step, source })
}

/// The caller's words, and the network where they do not say anything about it.
fn command_line(words: &str, address: Option<String>) -> String {
    let says = words.split_whitespace().any(|word| word.starts_with("ip="));
    let address = address.filter(|_| !says);
    let words = Some(words.trim().to_owned()).filter(|words| !words.is_empty());
    let words: Vec<String> = words.into_iter().chain(address).collect();
    words.join(" ")
}

/// CH's working directory is not ours.
fn absolute(path: &Path) -> Result<PathBuf, BuildCause> {
    std::path::absolute(path).map_err(|source| BuildCause::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_is_added_where_the_caller_says_nothing_of_it() {
        let address = || Some("ip=1".to_owned());
        for (words, expected) in [
            ("", "ip=1"),
            (" quiet ", "quiet ip=1"),
            ("quiet ip=2 x", "quiet ip=2 x"),
            ("zip=2", "zip=2 ip=1"),
        ] {
            assert_eq!(command_line(words, address()), expected);
        }
        assert_eq!(command_line("quiet", None), "quiet");
    }
}
