//! `rewake bench`: how long it takes until a guest has answered, on this machine, beside the
//! ways to do the same without rewake.
//!
//! Every time is of a guest that proved afterwards to be the one that was frozen; what failed
//! has no time and is counted. Variants take turns in an order that is shuffled anew for
//! every round, from a seed that is told.

mod apart;
mod arms;
mod chosen;
mod compare;
mod criterion;
mod ground;
mod house;
mod html;
mod life;
mod matrix;
mod plot;
mod pools;
mod record;
mod run;
mod stage;
mod stats;
mod sweep;
mod table;

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use rewake::plan::MemoryMode;
use rewake::resource::disk::{DiskKind, DiskMode};

use super::{Failure, Global};
use arms::Rival;

const KEYS: &str = "\
JSON: machine (commit, kernel, cpu, cores, vmm, vmm_kind, build), stand_in, seed, remarks,
  kit_private_bytes (what a process that waits has of its own; null without pools),
  variants, a list of
    name, variant (what was varied), failures, throughput (guests a second and core, or null),
    total and ready (until the end, and until envd answered first; null where none came):
      n, min, p50, p90, p99 and max, in milliseconds
    phases: pairs of a name and the same of what lies between it and the one before
Each line of --out has the keys of machine and variant, and those of one guest:
  iteration, ms and phases (milliseconds from the call), batch_ms (of all that were made at once),
  error (why there is no time)";

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, after_long_help = KEYS)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    command: Option<BenchCommand>,
    /// What is done; one variant each, in one run
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["launch"])]
    operation: Vec<Operation>,
    /// How memory comes back, or came back before a pause or an end; one variant each
    /// [default: map for launch, else shared]
    #[arg(long, value_enum, value_delimiter = ',')]
    memory_mode: Vec<Memory>,
    /// What disk each guest gets
    #[arg(long, value_enum, default_value_t = DiskChoice::Auto)]
    disk: DiskChoice,
    /// Slots and disks made and Cloud Hypervisors started in advance, or not; one variant each
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["off", "on"])]
    pools: Vec<Switch>,
    /// Memory of the guest in MiB, one variant each
    #[arg(
        long,
        value_name = "MIB",
        value_delimiter = ',',
        default_values = ["128"],
        conflicts_with = "template"
    )]
    ram: Vec<u64>,
    /// Where guests come from: a template of the host under --root, or a directory with a
    /// snapshot [default: the probe guest, frozen for the run]
    #[arg(long, value_name = "DIR|NAME")]
    template: Option<String>,
    /// Where the templates of a host live
    #[arg(long, value_name = "DIR", default_value = "/var/lib/rewake")]
    root: PathBuf,
    /// How long a snapshot lies before a guest is brought back from it: at 0 what was written
    /// may not be on the disk yet; one variant each
    #[arg(long, value_name = "SECONDS", value_delimiter = ',')]
    age: Vec<u64>,
    /// How many guests at once, one variant each
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_values = ["1"],
        value_parser = at_least_one
    )]
    concurrency: Vec<usize>,
    /// Whether the snapshot's files are in the page cache, one variant each
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["warm"])]
    page_cache: Vec<Cache>,
    /// Rounds: every variant once in each
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = at_least_one)]
    iterations: usize,
    /// Rounds before them that do not count
    #[arg(long, value_name = "N", default_value_t = 3)]
    warm_up: usize,
    /// Whom to compare with, in the same run
    #[arg(long, value_enum, value_delimiter = ',')]
    against: Vec<Rival>,
    /// Decides the order within rounds
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Write every sample to this file, one JSON object a line
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write a report with plots to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the timelines of rewake's first round that counts, for trace viewers
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// The cloud-hypervisor binary [default: looked up on PATH]
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Use the stand-in in place of Cloud Hypervisor; every line and plot says so
    #[arg(long)]
    stand_in: bool,
    /// A variable for Cloud Hypervisor where it writes the template's snapshot; repeatable
    #[arg(long, value_name = "NAME=VALUE")]
    vmm_env: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Say what moved beyond noise between two runs, or two baselines of criterion
    Compare(compare::CompareArgs),
    /// Make the report of a file of samples
    Report(ReportArgs),
}

#[derive(Debug, Args)]
struct ReportArgs {
    /// The samples
    #[arg(value_name = "FILE")]
    samples: PathBuf,
    /// The report
    #[arg(value_name = "HTML")]
    html: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Operation {
    /// Guests are launched from a template
    Launch,
    /// Each guest is brought back from a snapshot of its own
    Resume,
    /// Each guest is frozen into a snapshot, and its VM ends
    Pause,
    /// Each guest ends, and all that was made for it is removed
    Destroy,
    /// Each guest is launched, paused, resumed, paused and resumed again, and destroyed, one
    /// after the other; memory modes and pools are chosen as a host chooses them
    Life,
}

impl Operation {
    const fn name(self) -> &'static str {
        match self {
            Self::Launch => "launch",
            Self::Resume => "resume",
            Self::Pause => "pause",
            Self::Destroy => "destroy",
            Self::Life => "life",
        }
    }

    /// Whether Cloud Hypervisor writes snapshots on the way.
    const fn writes(self) -> bool {
        matches!(self, Self::Resume | Self::Pause | Self::Life)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Cache {
    Warm,
    Cold,
}

impl Cache {
    const fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Memory {
    /// The sandbox's own memory file is mapped, and written to: not for launches
    Shared,
    /// The memory file is mapped copy-on-write
    Map,
    /// All of it is read first
    Copy,
    /// Page by page, as it is touched
    OnDemand,
}

impl From<Memory> for MemoryMode {
    fn from(memory: Memory) -> Self {
        match memory {
            Memory::Shared => Self::Shared,
            Memory::Map => Self::Map,
            Memory::Copy => Self::Copy,
            Memory::OnDemand => Self::OnDemand,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DiskChoice {
    /// The best kind that works here
    Auto,
    /// A device-mapper snapshot
    DmSnapshot,
    /// A file that shares blocks
    Reflink,
    /// A sparse copy
    Copy,
    /// No disk at all
    None,
}

impl From<DiskKind> for DiskChoice {
    fn from(kind: DiskKind) -> Self {
        match kind {
            DiskKind::DmSnapshot => Self::DmSnapshot,
            DiskKind::Reflink => Self::Reflink,
            DiskKind::Copy => Self::Copy,
        }
    }
}

impl DiskChoice {
    const fn mode(self) -> Option<DiskMode> {
        Some(match self {
            Self::Auto => DiskMode::Auto,
            Self::DmSnapshot => DiskMode::Only(DiskKind::DmSnapshot),
            Self::Reflink => DiskMode::Only(DiskKind::Reflink),
            Self::Copy => DiskMode::Only(DiskKind::Copy),
            Self::None => return None,
        })
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::DmSnapshot => "dm-snapshot",
            Self::Reflink => "reflink",
            Self::Copy => "copy",
            Self::None => "none",
        }
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is needed".to_owned()),
        other => other.map_err(|error: std::num::ParseIntError| error.to_string()),
    }
}

pub(super) fn run(args: &BenchArgs, global: Global) -> Result<(), Failure> {
    match &args.command {
        Some(BenchCommand::Compare(compare)) => compare::run(compare, global),
        Some(BenchCommand::Report(report)) => {
            let lines = record::read(&report.samples)?;
            Ok(html::write(&report.html, &lines)?)
        }
        None => run::run(args, global),
    }
}
