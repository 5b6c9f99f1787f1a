//! Building and importing.

use std::io::{self, IsTerminal, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use rewake::deadline::Deadline;
use rewake::envd::init::Init;
use rewake::fault::Faults;
use rewake::host::Host;
use rewake::ids::{SandboxId, TemplateId};
use rewake::probe_guest;
use rewake::resource::disk::{DiskConfig, DiskPool};
use rewake::template::{
    self, BuildNetwork, BuildProgress, BuildSpec, ImportDisk, ImportProgress, ImportSpec,
    PathStrategy, Template, TemplateStore, Transfer, Workshop,
};
use rewake::units::Bytes;
use rewake::vmm::api::Version;
use rewake::vmm::launch::LaunchSpec;

use super::super::host::HostArgs;
use super::super::restore::VmmArgs;
use super::super::{Failure, Global, disk, report};
use super::list::{TEMPLATE_KEYS, template_document};

#[derive(Debug, Args)]
#[command(after_long_help = ["JSON:\n", TEMPLATE_KEYS, "\n  milliseconds"].concat())]
pub(super) struct BuildArgs {
    /// The template's name
    name: TemplateId,
    /// The kernel: a PVH ELF file or a bzImage
    #[arg(long, value_name = "FILE", required_unless_present = "probe_guest")]
    kernel: Option<PathBuf>,
    /// Boot the built-in probe guest instead: a few KiB that answer as envd does
    #[arg(long, conflicts_with_all = ["kernel", "initramfs"])]
    probe_guest: bool,
    /// Its initramfs
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Its command line; the network is added [default: what suits most Linux guests]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// The image of the root disk, /dev/vda in the guest; it is only read
    #[arg(long, value_name = "IMAGE")]
    rootfs: Option<PathBuf>,
    /// How the disk is kept that the guest boots on
    #[arg(long, value_enum, default_value_t = disk::Mode::Auto)]
    disk_mode: disk::Mode,
    /// vCPUs
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    vcpus: u32,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory_mib: u64,
    /// Give the guest a serial port, and write what it says to this file
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// How many seconds the guest may take to boot
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    boot_timeout: u64,
    /// User for commands in the guest that name none
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Directory for commands in the guest that name none
    #[arg(long, value_name = "DIR")]
    workdir: Option<String>,
    /// A variable for everything that the agent starts; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = crate::cli::pair)]
    env: Vec<(String, String)>,
    #[command(flatten)]
    vmm: VmmArgs,
    /// Talk to the stand-in over a loopback port instead of a network slot: needs no
    /// privileges, and the template cannot be launched
    #[cfg(feature = "sim")]
    #[arg(long, requires = "stand_in")]
    loopback: bool,
}

#[derive(Debug, Args)]
#[command(after_long_help = ["JSON:\n", TEMPLATE_KEYS, "\n  milliseconds"].concat())]
pub(super) struct ImportArgs {
    /// The template's name
    name: TemplateId,
    /// The snapshot directory: config.json, state.json, memory-ranges
    #[arg(value_name = "DIR")]
    source: PathBuf,
    /// The image of the root disk, brought into the template
    #[arg(long, value_name = "IMAGE", conflicts_with = "rootfs_in_place")]
    rootfs: Option<PathBuf>,
    /// The image of the root disk, which stays where it is; nobody may change it
    #[arg(long, value_name = "IMAGE")]
    rootfs_in_place: Option<PathBuf>,
    /// The file that guest memory was mapped from, where memory-ranges has none of it
    #[arg(long, value_name = "FILE")]
    memory: Option<PathBuf>,
    /// Copy, also where blocks could be shared
    #[arg(long, conflicts_with = "link")]
    copy: bool,
    /// Give memory and disk a second name instead of copying them; they must never be
    /// written to again
    #[arg(long)]
    link: bool,
    /// Show Cloud Hypervisor its disk under the recorded path instead of rewriting that
    #[arg(long)]
    keep_path: bool,
    /// The directory that the recorded path lies beneath [default: the recorded one]
    #[arg(long, value_name = "DIR", requires = "keep_path")]
    sandbox_dir: Option<PathBuf>,
    /// Leave zeros in memory as they are, instead of making holes of them
    #[arg(long)]
    no_punch: bool,
    /// The version that wrote the snapshot [default: guessed from its configuration]
    #[arg(long, value_name = "VERSION")]
    vmm_version: Option<Version>,
}

impl BuildArgs {
    #[cfg(feature = "sim")]
    const fn is_on_loopback(&self) -> bool {
        self.loopback
    }

    #[cfg(not(feature = "sim"))]
    const fn is_on_loopback(&self) -> bool {
        false
    }
}

pub(super) fn build(
    args: &BuildArgs,
    store: &TemplateStore,
    host: &HostArgs,
    deadline: Deadline,
    global: Global,
) -> Result<(), Failure> {
    let kernel = Kernel::of(args)?;
    let spec = BuildSpec {
        runtime_dir: host.runtime_dir.clone(),
        ..spec(args, &kernel.path, args.vmm.launch_spec()?)
    };
    let mut teller = Teller::new();
    let begun = Instant::now();
    let built = if args.is_on_loopback() {
        on_loopback(spec, store, &mut teller, deadline)
    } else {
        let host = Host::open_as_it_is(host.config()?)?;
        let built = host.build(&spec, &mut |it| teller.building(it), deadline);
        built.map_err(Failure::from)
    };
    teller.end();
    made(&built?, begun.elapsed(), global)
}

fn on_loopback(
    mut spec: BuildSpec,
    store: &TemplateStore,
    teller: &mut Teller,
    deadline: Deadline,
) -> Result<Template, Failure> {
    // The port is free again at once; the stand-in takes it.
    let guest = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let words = ["--sim".to_owned(), format!("envd=tcp:{guest}")];
    spec.vmm.args.extend(words);
    let config = DiskConfig {
        runtime_dir: spec.runtime_dir.clone(),
        ..DiskConfig::default()
    };
    let workshop = Workshop {
        store,
        disks: &DiskPool::open(config, Faults::NONE),
        network: BuildNetwork::Direct(guest),
    };
    let built = template::build(&spec, workshop, &mut |it| teller.building(it), deadline);
    Ok(built?)
}

/// The guest's kernel as a file; the built-in one lies in a temporary one.
struct Kernel {
    path: PathBuf,
    temporary: bool,
}

impl Kernel {
    fn of(args: &BuildArgs) -> Result<Self, Failure> {
        if let Some(path) = &args.kernel {
            return Ok(Self {
                path: path.clone(),
                temporary: false,
            });
        }
        let name = format!("rewake-probe-guest-{}", SandboxId::random());
        let path = std::env::temp_dir().join(name);
        probe_guest::write_to(&path)?;
        Ok(Self {
            path,
            temporary: true,
        })
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if self.temporary
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            log::warn!("{}: {error}", self.path.display());
        }
    }
}

fn spec(args: &BuildArgs, kernel: &Path, vmm: LaunchSpec) -> BuildSpec {
    let usual = if args.probe_guest {
        "fill=64 touch=0"
    } else {
        BuildSpec::usual_command_line(args.rootfs.is_some())
    };
    BuildSpec {
        initramfs: args.initramfs.clone(),
        command_line: args.cmdline.clone().unwrap_or_else(|| usual.to_owned()),
        rootfs: args.rootfs.clone(),
        disk_mode: args.disk_mode.into(),
        vcpus: args.vcpus,
        memory: Bytes(args.memory_mib.saturating_mul(1 << 20)),
        console: args.console.clone(),
        init: Init {
            default_user: args.user.clone(),
            default_workdir: args.workdir.clone(),
            env: args.env.iter().cloned().collect(),
            ..Init::new()
        },
        boot_budget: Duration::from_secs(args.boot_timeout),
        ..BuildSpec::new(args.name.clone(), kernel, vmm)
    }
}

pub(super) fn import(
    args: &ImportArgs,
    store: &TemplateStore,
    deadline: Deadline,
    global: Global,
) -> Result<(), Failure> {
    let sandbox_dir = args.sandbox_dir.as_deref().map(std::path::absolute);
    let spec = ImportSpec {
        disk: match (&args.rootfs, &args.rootfs_in_place) {
            (Some(image), _) => ImportDisk::Adopted(image.clone()),
            (None, Some(image)) => ImportDisk::InPlace(image.clone()),
            (None, None) => ImportDisk::Beside,
        },
        memory: args.memory.clone(),
        transfer: match (args.link, args.copy) {
            (true, _) => Transfer::Link,
            (false, true) => Transfer::Copy,
            (false, false) => Transfer::Auto,
        },
        path: if args.keep_path {
            PathStrategy::Recorded(sandbox_dir.transpose()?)
        } else {
            PathStrategy::Auto
        },
        punch_zeros: !args.no_punch,
        vmm: args.vmm_version,
        ..ImportSpec::new(args.name.clone(), &args.source)
    };
    let mut teller = Teller::new();
    let begun = Instant::now();
    let imported = template::import(&spec, store, &mut |it| teller.importing(it), deadline);
    teller.end();
    made(&imported?, begun.elapsed(), global)
}

fn made(template: &Template, took: Duration, global: Global) -> Result<(), Failure> {
    if global.json {
        let mut document = template_document(template);
        document["milliseconds"] = serde_json::json!(took.as_secs_f64() * 1e3);
        return report::json(&document);
    }
    let manifest = template.manifest();
    if manifest.vmm.build.contains("stand-in") {
        println!(
            "This is of the stand-in, not of Cloud Hypervisor: {}",
            manifest.vmm.build
        );
    }
    println!(
        "template {} {} in {:.1} s: {}",
        template.id(),
        manifest.kind,
        took.as_secs_f64(),
        template.dir().display()
    );
    Ok(())
}

/// Tells people who watch how far it has come, on one line that is gone in the end.
struct Teller {
    watched: bool,
    begun: Instant,
    last: Option<(String, u64)>,
}

impl Teller {
    fn new() -> Self {
        Self {
            watched: io::stderr().is_terminal(),
            begun: Instant::now(),
            last: None,
        }
    }

    fn building(&mut self, progress: BuildProgress) {
        self.tell(progress.stage.name(), progress.bytes);
    }

    fn importing(&mut self, progress: ImportProgress) {
        self.tell(progress.file, Some((progress.done, progress.total)));
    }

    /// A line for each stage, and for each percent of what is counted.
    fn tell(&mut self, what: &str, bytes: Option<(Bytes, Bytes)>) {
        let percent = bytes.map_or(0, |(done, total)| {
            done.0.saturating_mul(100) / total.0.max(1)
        });
        let now = (what.to_owned(), percent);
        if !self.watched || self.last.as_ref() == Some(&now) {
            return;
        }
        self.last = Some(now);
        let seconds = self.begun.elapsed().as_secs_f64();
        let share = bytes.map_or(String::new(), |(_, total)| {
            format!(" {percent} % of {total}")
        });
        // Whoever cannot be told is not kept waiting.
        let _ = write!(io::stderr(), "\r\x1b[K{seconds:6.1} s  {what}{share}");
    }

    fn end(&self) {
        if self.watched {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
