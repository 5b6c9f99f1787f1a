//! `rewake restore`: one snapshot directory to one running VM, which is left running.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use rewake::deadline::Deadline;
use rewake::envd;
use rewake::envd::init::Init;
use rewake::ids::{IfName, SandboxId, TemplateId};
use rewake::memory::WorkingSet;
use rewake::plan::{MemoryMode, MemoryPolicy, RestoreInputs, RootDisk};
use rewake::restore::{Netns, RestoreSpec, Restored, restore};
use rewake::snapshot::Recorded;
use rewake::trace::Trace;
use rewake::vmm::launch::LaunchSpec;

use super::{Failure, Global, report};

const KEYS: &str = "\
JSON: sandbox_id, pid, start_time, api_socket, vm_dir, vmm_version, vmm_build, stand_in,
  memory_mode, memory_bytes, agent (family, version), lifecycle_id (null with --no-init),
  timeline (phases, each with phase and at_us, and notes)";

#[derive(Debug, Args)]
#[command(after_long_help = KEYS)]
pub(super) struct RestoreArgs {
    /// The snapshot directory: config.json, state.json, memory-ranges
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    #[command(flatten)]
    vmm: VmmArgs,
    /// Start it in this network namespace, as `ip netns` shows it [default: this one]
    #[arg(long, value_name = "NAME")]
    netns: Option<String>,
    /// Where envd listens, seen from that namespace
    #[arg(long, value_name = "IP", default_value_t = Ipv4Addr::new(169, 254, 0, 21).into())]
    guest_ip: IpAddr,
    /// envd's port
    #[arg(long, value_name = "PORT", default_value_t = envd::PORT)]
    guest_port: u16,
    /// How memory comes back
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    memory_mode: Mode,
    /// The snapshot's memory belongs to this sandbox alone: `auto` may write to its file,
    /// which then no longer matches the snapshot
    #[arg(long)]
    owned: bool,
    /// Keep a list of the memory that the guest needed until it was ready in the snapshot
    /// directory; the next restore reads it ahead
    #[arg(long)]
    record_working_set: bool,
    /// Raw image or block device in place of the recorded disk [default: the recorded one]
    #[arg(long, value_name = "PATH")]
    disk: Option<PathBuf>,
    /// Show the disk to Cloud Hypervisor under its recorded path, which lies beneath this
    /// directory; nobody else sees it
    #[arg(long, value_name = "DIR", requires = "disk")]
    sandbox_dir: Option<PathBuf>,
    /// Tap device in the namespace [default: the recorded one]
    #[arg(long, value_name = "NAME")]
    tap: Option<IfName>,
    /// Map memory files that the snapshot names, as it says: its guest may write to them
    #[arg(long)]
    recorded_memory_files: bool,
    /// Sandbox id [default: a random one]
    #[arg(long, value_name = "ID")]
    id: Option<SandboxId>,
    /// The template that the snapshot belongs to
    #[arg(long, value_name = "ID")]
    template: Option<TemplateId>,
    /// Do not call /init: envd keeps the identity and clock of the snapshot
    #[arg(long)]
    no_init: bool,
    /// Give up after this many seconds, whatever the limits of the parts [default: none]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<f64>,
    /// Write a timeline for trace viewers (Chrome's JSON; Perfetto opens it) to this file
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Where the files of running VMs go
    #[arg(long, value_name = "DIR", default_value = "/run/rewake")]
    runtime_dir: PathBuf,
}

/// How Cloud Hypervisor is started.
#[derive(Debug, Clone, Args)]
pub(super) struct VmmArgs {
    /// The cloud-hypervisor binary [default: looked up on PATH]
    #[arg(long, value_name = "PATH", help_heading = "Cloud Hypervisor")]
    pub(super) vmm: Option<PathBuf>,
    /// Use the built-in stand-in, which runs no VM
    #[cfg(feature = "sim")]
    #[arg(long, conflicts_with = "vmm", help_heading = "Cloud Hypervisor")]
    stand_in: bool,
    /// Start it without its event monitor: a little faster, with fewer phases in the timeline
    #[arg(long, help_heading = "Cloud Hypervisor")]
    no_events: bool,
    /// A further argument for it; may be repeated
    #[arg(
        long,
        value_name = "ARG",
        allow_hyphen_values = true,
        help_heading = "Cloud Hypervisor"
    )]
    vmm_arg: Vec<String>,
    /// A variable for its environment, which is empty otherwise; may be repeated
    #[arg(
        long,
        value_name = "NAME=VALUE",
        value_parser = super::pair,
        help_heading = "Cloud Hypervisor"
    )]
    vmm_env: Vec<(String, String)>,
}

/// How memory comes back, on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Mode {
    /// The best one that snapshot and host can serve
    Auto,
    /// The memory file is mapped and written to: only for a sandbox's own snapshot, which is
    /// used up by it
    Shared,
    /// The memory file is mapped copy-on-write
    Map,
    /// All of it is read first
    Copy,
    /// Page by page, as it is touched
    OnDemand,
}

impl Mode {
    /// One mode and no other, where one was asked for.
    pub(super) const fn only(self) -> Option<MemoryMode> {
        match self.policy(false) {
            MemoryPolicy::Only(mode) => Some(mode),
            MemoryPolicy::Auto { .. } => None,
        }
    }

    /// What it means for a snapshot that is, or is not, the sandbox's own.
    pub(super) const fn policy(self, owned: bool) -> MemoryPolicy {
        MemoryPolicy::Only(match self {
            Self::Auto => return MemoryPolicy::Auto { owned },
            Self::Shared => MemoryMode::Shared,
            Self::Map => MemoryMode::Map,
            Self::OnDemand => MemoryMode::OnDemand,
            Self::Copy => MemoryMode::Copy,
        })
    }
}

impl VmmArgs {
    pub(super) fn launch_spec(&self) -> Result<LaunchSpec, Failure> {
        let mut name = None;
        let program = match &self.vmm {
            #[cfg(feature = "sim")]
            None if self.stand_in => {
                name = Some(super::STAND_IN.to_owned());
                std::env::current_exe()?
            }
            Some(path) => absolute(path)?,
            None => rewake::doctor::find_program("cloud-hypervisor").ok_or(NoVmm)?,
        };
        Ok(LaunchSpec {
            program,
            name: name.take(),
            args: self.vmm_arg.clone(),
            env: self.vmm_env.clone(),
            without_events: self.no_events,
            ..LaunchSpec::default()
        })
    }
}

/// There is nothing to restore with.
#[derive(Debug, thiserror::Error)]
#[error("cloud-hypervisor is not on PATH; name the binary with --vmm, or see rewake doctor")]
struct NoVmm;

/// Seconds from the command line that are no time.
#[derive(Debug, thiserror::Error)]
#[error("{0} seconds are no time limit")]
pub(super) struct BadTimeout(pub(super) f64);

pub(super) fn run(args: &RestoreArgs, global: Global) -> Result<(), Failure> {
    let deadline = match args.timeout {
        None => Deadline::NEVER,
        Some(seconds) => {
            Deadline::after(Duration::try_from_secs_f64(seconds).map_err(|_| BadTimeout(seconds))?)
        }
    };
    let restored = restore(&spec(args)?, deadline)?;
    if args.record_working_set {
        WorkingSet::record(restored.vmm.pid())?.save(&args.directory)?;
    }
    show(&restored, global)?;
    if let Some(path) = &args.trace {
        let mut trace = Trace::new(restored.timeline.origin());
        let name = format!("sandbox {}, {}", restored.sandbox_id, restored.build);
        trace.add(&name, &restored.timeline);
        report::trace(path, trace)?;
    }
    // The VM stays: from here on whoever reads its pid answers for it.
    let (_vmm, _steps) = restored.into_parts();
    Ok(())
}

fn spec(args: &RestoreArgs) -> Result<RestoreSpec, Failure> {
    let id = args.id.clone().unwrap_or_else(SandboxId::random);
    let mut inputs = RestoreInputs::new(id, &args.directory);
    inputs.template_id.clone_from(&args.template);
    inputs.tap.clone_from(&args.tap);
    inputs.memory_mode = args.memory_mode.policy(args.owned);
    if args.recorded_memory_files {
        inputs.policy.memory_files = Recorded::Keep;
    }
    inputs.disk = match (&args.disk, &args.sandbox_dir) {
        (None, _) => RootDisk::AsRecorded,
        (Some(path), None) => RootDisk::At(absolute(path)?),
        (Some(path), Some(dir)) => RootDisk::AtRecordedPath {
            device: absolute(path)?,
            sandbox_dir: absolute(dir)?,
        },
    };
    let guest = SocketAddr::new(args.guest_ip, args.guest_port);
    let launch = args.vmm.launch_spec()?;
    let mut spec = RestoreSpec::new(inputs, launch.program.clone(), guest);
    spec.vmm = launch;
    spec.runtime_dir = absolute(&args.runtime_dir)?;
    let netns = args.netns.as_deref().map(rewake_sys::netns::named_path);
    spec.netns = netns.map(Netns::from);
    if !args.no_init {
        spec.init = Some(Init {
            sandbox_id: Some(spec.inputs.sandbox_id.to_string()),
            template_id: args.template.as_ref().map(ToString::to_string),
            ..Init::new()
        });
    }
    Ok(spec)
}

fn absolute(path: &std::path::Path) -> Result<PathBuf, Failure> {
    Ok(std::path::absolute(path)?)
}

/// What a caller needs to go on with the VM.
fn show(restored: &Restored, global: Global) -> Result<(), Failure> {
    if global.json {
        return report::json(&serde_json::json!({
            "sandbox_id": restored.sandbox_id.as_str(),
            "pid": restored.vmm.pid(),
            "start_time": restored.vmm.start_time(),
            "api_socket": restored.vmm.api_path(),
            "vm_dir": restored.vm_dir,
            "vmm_version": restored.version.to_string(),
            "vmm_build": restored.build,
            "stand_in": restored.is_stand_in(),
            "memory_mode": restored.memory_mode.name(),
            "memory_bytes": restored.memory.0,
            "agent": {
                "family": restored.agent.family.to_string(),
                "version": restored.agent.version.as_ref().map(ToString::to_string),
            },
            "lifecycle_id": restored.init.as_ref().map(|init| init.lifecycle.to_string()),
            "timeline": restored.timeline.to_json(),
        }));
    }
    if restored.is_stand_in() {
        println!(
            "This is the stand-in, not Cloud Hypervisor: {}",
            restored.build
        );
    }
    print!("{}", restored.timeline);
    println!("sandbox     {}", restored.sandbox_id);
    let version = restored.agent.version.as_ref();
    let version = version.map_or_else(String::new, |version| format!(" {version}"));
    println!("agent       {}{version}", restored.agent.family);
    println!(
        "memory      {} ({})",
        restored.memory,
        restored.memory_mode.name()
    );
    println!("vmm         {}", restored.build);
    println!("pid         {}", restored.vmm.pid());
    println!("api socket  {}", restored.vmm.api_path().display());
    Ok(())
}
