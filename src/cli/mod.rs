//! The `rewake` command: what people type, what they see, and the exit codes.
//!
//! Exit codes: 0 done; 1 the operation failed; 2 the command line was wrong; 3 `doctor`
//! found something missing; 4 a time limit passed.

mod bench;
mod demo;
mod disk;
mod doctor;
mod net;
mod report;
mod restore;
mod template;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use rewake::restore::RestoreError;

/// Brings frozen Cloud Hypervisor virtual machines back to life.
#[derive(Debug, Parser)]
#[command(name = "rewake", version, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 done; 1 the operation failed; 2 the command line was \
                        wrong; 3 doctor found something missing; 4 a time limit passed."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command understands.
#[derive(Debug, Clone, Copy, Args)]
struct Global {
    /// Print one JSON document instead of tables
    #[arg(long, global = true)]
    json: bool,
    /// Log more: stage transitions, then everything (also through RUST_LOG)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure how long it takes until a guest answers, here and beside other ways
    Bench(Box<bench::BenchArgs>),
    /// Say what this machine lacks for restoring sandboxes, and how to mend it
    Doctor(doctor::DoctorArgs),
    /// Make, attach, show, flatten and remove copy-on-write disks by hand
    Disk(disk::DiskArgs),
    /// Show the whole story: boot, freeze, destroy, restore, remember
    Demo(demo::DemoArgs),
    /// Build, show, check and remove network slots by hand
    Net(net::NetArgs),
    /// Bring one snapshot directory back to life and leave the VM running
    Restore(Box<restore::RestoreArgs>),
    /// Build, import, list, show and remove templates
    Template(template::TemplateArgs),
}

/// What a command ends with where it does not simply succeed.
enum Failure {
    /// Something went wrong: the error, outermost first, with its causes.
    Error(Box<dyn std::error::Error>),
    /// `doctor` has said what is missing.
    Missing,
}

impl<E: std::error::Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Error(Box::new(error))
    }
}

/// The name under which this program is the stand-in: one binary has it all.
const STAND_IN: &str = "rewake-sim";

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.global.verbose);
    let outcome = match &cli.command {
        Command::Bench(args) => bench::run(args, cli.global),
        Command::Doctor(args) => doctor::run(args, cli.global),
        Command::Disk(args) => disk::run(args, cli.global),
        Command::Demo(args) => demo::run(args, cli.global),
        Command::Net(args) => net::run(args, cli.global),
        Command::Restore(args) => restore::run(args, cli.global),
        Command::Template(args) => template::run(args, cli.global),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Missing) => ExitCode::from(3),
        Err(Failure::Error(error)) => {
            report::error(error.as_ref(), cli.global);
            let timeout = error
                .downcast_ref::<RestoreError>()
                .is_some_and(RestoreError::is_timeout)
                || disk::is_timeout(error.as_ref())
                || template::is_timeout(error.as_ref());
            ExitCode::from(if timeout { 4 } else { 1 })
        }
    }
}

fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "trace",
    };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level))
        .format_timestamp_micros()
        .init();
}
