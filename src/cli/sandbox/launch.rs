//! `rewake launch` and `rewake resume`: sandboxes come to life.

use std::path::PathBuf;

use clap::Args;
use rewake::envd::init::{AccessToken, Init};
use rewake::host::{Host, LaunchOptions, ResumeOptions, Sandbox};
use rewake::ids::{SandboxId, SlotIndex};
use rewake::trace::Trace;

use super::SANDBOX_KEYS;
use super::view::View;
use crate::cli::host::{HostArgs, LimitArgs};
use crate::cli::progress::Progress;
use crate::cli::restore::{Mode, VmmArgs};
use crate::cli::{Failure, Global, disk, report};

#[derive(Debug, Args)]
#[command(after_long_help = [SANDBOX_KEYS, "\n  timeline (launch and resume)"].concat())]
pub(in crate::cli) struct LaunchArgs {
    /// The template
    #[arg(value_name = "TEMPLATE")]
    template: String,
    /// The sandbox's id [default: a random one]
    #[arg(long, value_name = "ID")]
    id: Option<SandboxId>,
    /// Which kind of disk it gets
    #[arg(long, value_enum, default_value_t = disk::Mode::Auto)]
    disk_mode: disk::Mode,
    /// Its network slot [default: the next that is free]
    #[arg(long, value_name = "INDEX")]
    slot: Option<u16>,
    /// Give it a memory file of its own, where the file system shares blocks between files
    /// (XFS, btrfs): its first pause then writes no memory, but it has no pages in common
    /// with other clones. Elsewhere it maps the template's, and the timeline says why
    #[arg(long)]
    own_memory: bool,
    /// Keep a list of the memory that it needed until it was ready with the template; the
    /// next launches read it ahead
    #[arg(long)]
    record_working_set: bool,
    #[command(flatten)]
    life: LifeArgs,
}

#[derive(Debug, Args)]
#[command(after_long_help = [SANDBOX_KEYS, "\n  timeline (launch and resume)"].concat())]
pub(in crate::cli) struct ResumeArgs {
    /// The sandbox, which must be paused
    id: SandboxId,
    #[command(flatten)]
    life: LifeArgs,
}

/// What every new life of a sandbox is given.
#[derive(Debug, Args)]
struct LifeArgs {
    /// A variable for everything that its agent starts; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = crate::cli::pair)]
    env: Vec<(String, String)>,
    /// The user of commands that name none
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// The directory of commands that name none
    #[arg(long, value_name = "DIR")]
    workdir: Option<String>,
    /// A file with the token that its agent shall ask for
    #[arg(long, value_name = "FILE")]
    access_token_file: Option<PathBuf>,
    /// How its memory comes back
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    memory_mode: Mode,
    /// Print the id only
    #[arg(short, long)]
    quiet: bool,
    /// Write a timeline for trace viewers (Chrome's JSON; Perfetto opens it) to this file
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    vmm: VmmArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    host: HostArgs,
}

impl LifeArgs {
    /// The host, ready for another sandbox that runs.
    fn host(&self) -> Result<Host, Failure> {
        let host = self.host.open_with(&self.vmm, self.limits)?;
        host.ready(self.host.deadline()?)?;
        Ok(host)
    }

    fn init(&self) -> Result<Init, Failure> {
        let token = self.access_token_file.as_ref().map(|path| {
            let text = std::fs::read_to_string(path).map_err(|source| Unreadable {
                path: path.clone(),
                source,
            })?;
            Ok::<_, Failure>(AccessToken::new(text.trim_end())?)
        });
        Ok(Init {
            access_token: token.transpose()?,
            default_user: self.user.clone(),
            default_workdir: self.workdir.clone(),
            env: self.env.iter().cloned().collect(),
            ..Init::new()
        })
    }
}

/// A file that was named cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("Cannot read {}", .path.display())]
struct Unreadable {
    path: PathBuf,
    source: std::io::Error,
}

/// `rewake launch`.
pub(in crate::cli) fn launch(args: &LaunchArgs, global: Global) -> Result<(), Failure> {
    let host = args.life.host()?;
    let template = host.template(&args.template)?;
    let options = LaunchOptions {
        id: args.id.clone(),
        init: args.life.init()?,
        slot: args.slot.map(SlotIndex::new).transpose()?,
        disk_mode: Some(args.disk_mode.into()),
        memory_mode: args.life.memory_mode.only(),
        own_memory: args.own_memory,
        record_working_set: args.record_working_set,
        deadline: args.life.host.deadline()?,
    };
    let progress = Progress::start(format!("launch from {}", args.template), !global.json);
    let launched = host.launch(&template, options);
    drop(progress);
    alive(launched?, &args.life, global)
}

/// `rewake resume`.
pub(in crate::cli) fn resume(args: &ResumeArgs, global: Global) -> Result<(), Failure> {
    let host = args.life.host()?;
    let options = ResumeOptions {
        init: args.life.init()?,
        memory_mode: args.life.memory_mode.only(),
        deadline: args.life.host.deadline()?,
    };
    let progress = Progress::start(format!("resume {}", args.id), !global.json);
    let resumed = host.resume(&args.id, options);
    drop(progress);
    alive(resumed?, &args.life, global)
}

/// Says what is needed to go on with it.
fn alive(sandbox: Sandbox, life: &LifeArgs, global: Global) -> Result<(), Failure> {
    if let Some(path) = &life.trace {
        let mut trace = Trace::new(sandbox.timeline().origin());
        trace.add(&format!("sandbox {}", sandbox.id()), sandbox.timeline());
        report::trace(path, trace)?;
    }
    let timeline = sandbox.timeline().clone();
    let view = View::of(sandbox)?;
    if global.json {
        let mut document = view.document();
        document["timeline"] = timeline.to_json();
        return report::json(&document);
    }
    let build = view.stand_in();
    if life.quiet {
        if let Some(build) = build {
            eprintln!("This is the stand-in, not Cloud Hypervisor: {build}");
        }
        println!("{}", view.id());
        return Ok(());
    }
    if let Some(build) = build {
        println!("This is the stand-in, not Cloud Hypervisor: {build}");
    }
    print!("{timeline}");
    println!("sandbox   {}", view.id());
    println!("address   {}", view.address());
    println!("memory    {}", view.ram());
    Ok(())
}
