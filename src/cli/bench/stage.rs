//! Where a run takes place: a host of its own inside a network namespace, so that nothing of
//! this machine's network is touched, and the templates that guests come from.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::doctor;
use rewake::envd;
use rewake::envd::client::{Client as Agent, ClientOptions, Incarnation};
use rewake::envd::hedge::Hedge;
use rewake::envd::init::Lifecycle;
use rewake::envd::ready::await_ready;
use rewake::envd::socket::{InNetns, Sockets};
use rewake::fault::Faults;
use rewake::ids::{IfName, SandboxId};
use rewake::probe_guest;
use rewake::resource::disk::{DiskConfig, DiskPool};
use rewake::resource::ledger::Ledger;
use rewake::resource::net::{HostNet, IfNameText, NetConfig};
use rewake::template::Template as HostTemplate;
use rewake::units::Bytes;
use rewake::vm_config::{
    BalloonConfig, ConsoleConfig, ConsoleOutputMode, CpusConfig, DiskConfig as VmDisk, MacAddr,
    MemoryConfig, NetConfig as VmNet, PayloadConfig, SerialConfig, VmConfig,
};
use rewake::vmm::api::Client;
use rewake::vmm::launch::{ApiSocket, LaunchSpec, StopLimits, launch};
use rewake::wire::json::{self, JsonLimits};
use rewake_sys::{kvm, netns};
use rustix::mount::UnmountFlags;
use serde_json::Value;

use super::BenchArgs;
use super::ground::{self, Ground, TMPFS};
use crate::cli::{Failure, STAND_IN};

/// The pretend uplink of the pretend host.
pub(super) const UPLINK: &str = "up0";
const BUDGET: Duration = Duration::from_secs(60);
/// Of the sparse root file system, that much is data.
const DISK_BYTES: u64 = 256 << 20;
const DISK_DATA: usize = 8 << 20;

/// Something that a run needs is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum StageError {
    #[error("Cannot use Cloud Hypervisor: {0}; --stand-in runs without it")]
    NoVmm(String),
    #[error("The guest does not remember: {0}")]
    Forgotten(String),
    #[error("It is not known how its memory came back")]
    NoMode,
    #[error("{what}")]
    Network {
        what: &'static str,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{program}: {says}")]
    Program { program: String, says: String },
}

/// What lies in memory is never out of the page cache.
#[derive(Debug, thiserror::Error)]
#[error("{0} lies in memory and cannot be cold: choose a directory on a disk with TMPDIR")]
struct InMemory(PathBuf);

fn network<E: std::error::Error + Send + Sync + 'static>(
    what: &'static str,
) -> impl FnOnce(E) -> StageError {
    move |source| StageError::Network {
        what,
        source: Box::new(source),
    }
}

/// Who plays Cloud Hypervisor.
#[derive(Debug, Clone)]
pub(super) struct Actor {
    pub(super) spec: LaunchSpec,
    /// For CH where it writes a snapshot; some kinds of KVM need help there.
    env: Vec<(String, String)>,
    pub(super) stand_in: bool,
    /// Whether guests are paused in this run.
    writes: bool,
}

impl Actor {
    pub(super) fn choose(args: &BenchArgs) -> Result<Self, Failure> {
        let pairs = args.vmm_env.iter().map(|pair| {
            let (name, value) = pair.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        });
        let env: Option<Vec<_>> = pairs.collect();
        let env = env.ok_or_else(|| StageError::NoVmm("--vmm-env takes NAME=VALUE".into()))?;
        let (program, name) = if let (true, Some(vmm)) = (args.stand_in, &args.vmm) {
            (vmm.clone(), None)
        } else if args.stand_in {
            (std::env::current_exe()?, Some(STAND_IN.to_owned()))
        } else {
            let usable = || {
                kvm::api_version().map_err(|error| error.to_string())?;
                if probe_guest::ELF.is_none() {
                    return Err("this rewake was built without the probe guest".to_owned());
                }
                let found = doctor::find_program("cloud-hypervisor");
                args.vmm.clone().or(found).ok_or("it is not on PATH".into())
            };
            (usable().map_err(StageError::NoVmm)?, None)
        };
        Ok(Self {
            spec: LaunchSpec {
                program,
                name,
                ..LaunchSpec::default()
            },
            env,
            stand_in: args.stand_in,
            writes: args.operation.iter().any(|it| it.writes()),
        })
    }

    /// How CH is started where it writes snapshots.
    pub(super) fn writing_spec(&self) -> LaunchSpec {
        let mut spec = self.spec.clone();
        spec.env.extend(self.env.iter().cloned());
        spec
    }

    /// What the conventional way has to put into its environment, if anything.
    pub(super) fn variable(&self) -> String {
        let first = self.env.first().filter(|_| self.writes);
        first.map_or_else(String::new, |(name, value)| format!("{name}={value}"))
    }
}

/// A snapshot that guests come from.
#[derive(Debug, Clone)]
pub(super) struct Template {
    pub(super) snapshot: PathBuf,
    /// The base image of disks, where guests have one.
    pub(super) base: Option<PathBuf>,
    /// The disk's path in [`Self::plain`].
    pub(super) recorded: Option<PathBuf>,
    /// The same guest with its memory written out by Cloud Hypervisor, as the conventional
    /// way has it.
    pub(super) plain: PathBuf,
    pub(super) ram_mib: u64,
    /// What the process that made it calls itself.
    pub(super) build: String,
    /// What only a guest that was restored knows.
    pub(super) nonce: String,
    /// Where it was chosen and not made here.
    pub(super) chosen: Option<HostTemplate>,
    /// Since when it lies.
    pub(super) since: Instant,
}

pub(super) struct Stage {
    /// Templates and disks.
    pub(super) dir: PathBuf,
    /// What rewake keeps in `/run`.
    pub(super) run: PathBuf,
    pub(super) actor: Actor,
    pub(super) net: Arc<HostNet>,
    pub(super) disks: Arc<DiskPool>,
    host: OwnedFd,
    /// A part of names that other runs must not have.
    pub(super) tag: String,
    /// Held as long as the run lives.
    _lock: File,
    /// Images that the conventional way has bound to loop devices, which it leaves bound.
    bound: Mutex<Vec<PathBuf>>,
}

impl Stage {
    pub(super) fn set(actor: Actor, ground: Ground) -> Result<Self, Failure> {
        let Ground {
            dir,
            run,
            tag,
            lock,
        } = ground;
        let host =
            netns::run_in_new(|netns| netns).map_err(network("Cannot make a network namespace"))?;
        let uplink = ["link", "add", UPLINK, "up", "type", "veth", "peer", "up1"];
        run_in(host.as_fd(), "ip", &uplink)?;
        let config = NetConfig {
            runtime_dir: run.join("slots"),
            netns_dir: run.join("netns"),
            uplink: IfName::new(UPLINK).ok().map(IfNameText),
            ..NetConfig::default()
        };
        let net = HostNet::open_in(host.as_fd(), config, Faults::default())
            .map_err(network("Cannot use the namespace as a host"))?;
        let disks = DiskConfig {
            runtime_dir: run.join("disks"),
            // As a host does.
            defer_sync: true,
            ..DiskConfig::default()
        };
        let stage = Self {
            disks: Arc::new(DiskPool::open(disks, Faults::default())),
            net: Arc::new(net),
            dir,
            run,
            actor,
            host,
            tag,
            _lock: lock,
            bound: Mutex::default(),
        };
        if let Err(error) = stage.net.prepare(Deadline::after(BUDGET)) {
            stage.strike();
            return Err(network("Cannot ready the host")(error).into());
        }
        Ok(stage)
    }

    /// Takes down what it made in the kernel; says what is left. Its files are removed by
    /// whoever waits for the run.
    pub(super) fn strike(self) -> Vec<String> {
        let mut left = self.unbind();
        if let Err(error) = self.net.retire(Deadline::after(BUDGET)) {
            left.push(format!("the host's rules: {error}"));
        }
        // The directory of namespaces is a mount of its own, as `ip netns` makes it; where it
        // was not mounted yet there is nothing to unmount.
        let _ = rustix::mount::unmount(&self.net.config().netns_dir, UnmountFlags::DETACH);
        left
    }

    /// Notes an image that the conventional way binds, unless somebody else had.
    pub(super) fn will_bind(&self, image: &Path) -> io::Result<()> {
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if !bound.iter().any(|it| it == image) && loops_of(image).is_empty() {
            ground::note_bound(&self.dir, image)?;
            bound.push(image.to_owned());
        }
        Ok(())
    }

    /// Detaches what the conventional way has bound and kept; says what is left.
    fn unbind(&self) -> Vec<String> {
        let bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        let devices = bound.iter().flat_map(|image| loops_of(image));
        let detached = devices.map(|device| run_in(self.host(), "losetup", &["-d", &device]));
        let failed = detached.filter_map(Result::err);
        failed.map(|error| error.to_string()).collect()
    }

    pub(super) fn host(&self) -> BorrowedFd<'_> {
        self.host.as_fd()
    }

    pub(super) fn guest(&self) -> SocketAddr {
        SocketAddr::from((self.net.config().guest_address, envd::PORT))
    }

    /// Boots a guest of that much memory, freezes it, and ends it.
    pub(super) fn template(&self, ram_mib: u64, disk: bool) -> Result<Template, Failure> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let deadline = Deadline::after(BUDGET);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = self.dir.join(format!("template-{ram_mib}-{count}"));
        fs::create_dir(&dir)?;
        let base = disk.then(|| dir.join("recorded/rootfs.raw"));
        if let Some(base) = &base {
            make_base(base)?;
        }
        let slot = self
            .net
            .create("template", deadline)
            .map_err(network("Cannot make a network slot"))?;
        let frozen = self.boot_and_freeze(&dir, base.as_deref(), ram_mib, slot.netns(), deadline);
        let removed = self.net.destroy(slot, deadline);
        let (nonce, build) = frozen?;
        removed.map_err(network("Cannot remove a network slot"))?;
        Ok(Template {
            snapshot: dir.join("snapshot"),
            recorded: base.clone(),
            base,
            plain: dir.join("snapshot"),
            ram_mib,
            build,
            nonce,
            chosen: None,
            since: Instant::now(),
        })
    }

    /// Removes one that was made for a few guests only.
    pub(super) fn discard(template: &Template) -> io::Result<()> {
        let dir = template.snapshot.parent();
        dir.map_or(Ok(()), fs::remove_dir_all)
    }

    fn boot_and_freeze(
        &self,
        dir: &Path,
        base: Option<&Path>,
        ram_mib: u64,
        netns: BorrowedFd<'_>,
        deadline: Deadline,
    ) -> Result<(String, String), Failure> {
        let mut processes = Ledger::new();
        let (socket, stream) = ApiSocket::bind(&dir.join("api.sock"))?;
        drop(stream);
        let spec = self.actor.writing_spec();
        let mut vmm = launch(&spec, socket, Some(netns), &[], &mut processes)?;
        let mut api = Client::connect(vmm.api_path(), deadline)?;
        let build = api.ping(deadline)?.build_version;
        api.create(&self.vm_config(dir, base, ram_mib)?, deadline)?;
        api.boot(deadline)?;
        let sockets: Sockets = Arc::new(InNetns::new(netns.try_clone_to_owned()?));
        let pidfd = Some(vmm.process().as_fd());
        await_ready(self.guest(), sockets, Hedge::default(), deadline, pidfd)?;
        let agent = self.agent(netns)?;
        let nonce = self.nonce(&agent, deadline)?;
        agent.prepare_snapshot(Bytes::mib(ram_mib), deadline)?;
        let snapshot = dir.join("snapshot");
        fs::create_dir(&snapshot)?;
        api.pause(deadline)?;
        api.snapshot(&snapshot, deadline)?;
        vmm.stop(StopLimits::default(), deadline, |_, deadline| {
            // Where this fails, signals follow.
            let _ = api.shutdown_vmm(deadline);
        })?;
        Ok((nonce, build))
    }

    fn vm_config(&self, dir: &Path, base: Option<&Path>, ram_mib: u64) -> io::Result<VmConfig> {
        let kernel = self.kernel(&dir.join("kernel"))?;
        let config = self.net.config();
        let settings = probe_guest::Settings::default();
        Ok(VmConfig {
            cpus: CpusConfig::default(),
            memory: MemoryConfig {
                size: ram_mib << 20,
                ..MemoryConfig::default()
            },
            payload: Some(PayloadConfig {
                kernel: Some(kernel),
                cmdline: Some(settings.to_string()),
                ..PayloadConfig::default()
            }),
            net: Some(vec![VmNet {
                tap: Some(config.tap_name.as_str().to_owned()),
                mac: Some(MacAddr(config.guest_mac.0)),
                ..VmNet::default()
            }]),
            disks: base.map(|base| vec![VmDisk::raw(base)]),
            balloon: Some(BalloonConfig::default()),
            console: ConsoleConfig {
                mode: ConsoleOutputMode::Off,
                ..ConsoleConfig::default()
            },
            serial: SerialConfig::default(),
            ..VmConfig::default()
        })
    }

    /// The guest's kernel, as a file.
    pub(super) fn kernel(&self, path: &Path) -> io::Result<PathBuf> {
        if self.actor.stand_in {
            fs::write(path, "the stand-in does not read its kernel")?;
        } else {
            probe_guest::write_to(path)?;
        }
        Ok(path.to_owned())
    }

    /// An image for disks that belongs to no template.
    pub(super) fn base(&self) -> io::Result<PathBuf> {
        let base = self.dir.join("image/rootfs.raw");
        if !base.exists() {
            make_base(&base)?;
        }
        Ok(base)
    }

    pub(super) fn agent(&self, netns: BorrowedFd<'_>) -> io::Result<Agent> {
        let incarnation = Incarnation {
            sandbox: SandboxId::random(),
            lifecycle: Lifecycle::random(),
        };
        let options = ClientOptions {
            sockets: Arc::new(InNetns::new(netns.try_clone_to_owned()?)),
            ..ClientOptions::default()
        };
        Ok(Agent::new(self.guest(), incarnation, options))
    }

    /// What a guest has in its memory and nowhere else: the nonce of a probe guest, the boot
    /// id of a Linux guest.
    pub(super) fn nonce(&self, agent: &Agent, deadline: Deadline) -> Result<String, Failure> {
        let target = if self.actor.stand_in {
            "/sim/state"
        } else {
            "/probe"
        };
        let answer = agent.get_other(target, deadline)?;
        if answer.status != 200 {
            return boot_id(agent, deadline);
        }
        let limits = JsonLimits {
            bytes: 4 << 10,
            depth: 4,
        };
        let value: Value = json::from_slice_bounded(&answer.body, limits)?;
        let nonce = value["nonce"].as_str().unwrap_or_default();
        if nonce.is_empty() {
            return Err(StageError::Forgotten(format!("it answered {value}")).into());
        }
        Ok(nonce.to_owned())
    }

    /// Whether the guest behind a namespace is the template's, restored and not rebooted: a
    /// time does not count before that is known.
    pub(super) fn check_guest(
        &self,
        template: &Template,
        netns: BorrowedFd<'_>,
    ) -> Result<(), Failure> {
        let found = self.nonce(&self.agent(netns)?, Deadline::after(BUDGET))?;
        remembers(&found, &template.nonce)
    }

    /// Drops the files of a snapshot, and a base image, from the page cache.
    pub(super) fn chill(snapshot: &Path, base: Option<&Path>) -> io::Result<()> {
        let files = fs::read_dir(snapshot)?.map(|entry| entry.map(|it| it.path()));
        for path in files.chain(base.map(|base| Ok(base.to_owned()))) {
            let path = path?;
            let file = File::open(&path)?;
            if rustix::fs::fstatfs(&file)?.f_type == TMPFS {
                return Err(io::Error::other(InMemory(path)));
            }
            // Dirty pages stay.
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
        Ok(())
    }
}

/// The loop devices over an image, as sysfs tells.
fn loops_of(image: &Path) -> Vec<String> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let over = |dir: &Path| {
        let file = fs::read_to_string(dir.join("loop/backing_file"));
        file.is_ok_and(|file| Path::new(file.trim_end()) == image)
    };
    entries
        .filter(|entry| over(&entry.path()))
        .map(|entry| format!("/dev/{}", entry.file_name().to_string_lossy()))
        .collect()
}

/// Whether two guests are one.
pub(super) fn remembers(found: &str, expected: &str) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    let text = format!("its nonce is {found}, not {expected}");
    Err(StageError::Forgotten(text).into())
}

/// The kernel makes it anew at every boot, and shows it in a file, which the agent reads.
fn boot_id(agent: &Agent, deadline: Deadline) -> Result<String, Failure> {
    let target = "/files?path=/proc/sys/kernel/random/boot_id&username=root";
    let answer = agent.get_other(target, deadline)?;
    let text = String::from_utf8_lossy(&answer.body);
    let text = text.trim();
    if answer.status != 200 || text.len() != 36 {
        let status = answer.status;
        let text = format!("its agent answered {status} where it was asked for the boot id");
        return Err(StageError::Forgotten(text).into());
    }
    Ok(text.to_owned())
}

fn make_base(base: &Path) -> io::Result<()> {
    if let Some(parent) = base.parent() {
        fs::create_dir(parent)?;
    }
    fs::write(base, vec![0xa5; DISK_DATA])?;
    File::options().write(true).open(base)?.set_len(DISK_BYTES)
}

/// Runs a program in a network namespace; its complaints are the error.
pub(super) fn run_in(
    netns: BorrowedFd<'_>,
    program: &str,
    arguments: &[&str],
) -> Result<(), StageError> {
    let output = netns::run_in(netns, || {
        std::process::Command::new(program).args(arguments).output()
    });
    let failed = |says: String| StageError::Program {
        program: format!("{program} {}", arguments.join(" ")),
        says,
    };
    let output = output
        .map_err(|error| failed(error.to_string()))?
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(
        String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    ))
}
