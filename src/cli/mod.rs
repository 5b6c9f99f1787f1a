//! The `rewake` command: what people type, what they see, and the exit codes.
//!
//! Exit codes: 0 done; 1 the operation failed; 2 the command line was wrong; 3 `doctor`
//! found something missing; 4 a time limit passed; 5 busy: the same may succeed later.

mod bench;
mod demo;
mod disk;
mod doctor;
mod failure;
mod host;
mod net;
mod progress;
mod report;
mod restore;
mod sandbox;
mod template;
mod words;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use failure::Kind;

/// Brings frozen Cloud Hypervisor virtual machines back to life.
#[derive(Debug, Parser)]
#[command(name = "rewake", version, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 done; 1 the operation failed; 2 the command line was \
                        wrong; 3 doctor found something missing; 4 a time limit passed; 5 busy: \
                        an operation is under way or the host is full, try again later."
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
    /// Show the whole story: boot, freeze, destroy, restore, remember
    Demo(demo::DemoArgs),
    /// Bring a fresh sandbox to life from a template
    Launch(Box<sandbox::LaunchArgs>),
    /// Bring a paused sandbox back, with its address and disk
    Resume(Box<sandbox::ResumeArgs>),
    /// Freeze running sandboxes on disk and end their VMs
    Pause(Box<sandbox::PauseArgs>),
    /// Make a template of a running sandbox, which goes on
    Snapshot(Box<sandbox::SnapshotArgs>),
    /// Remove sandboxes and all that they have
    Destroy(Box<sandbox::DestroyArgs>),
    /// List sandboxes: state, age, memory, disk, address
    Ls(Box<sandbox::ListArgs>),
    /// Show all that is known of a sandbox
    Inspect(Box<sandbox::InspectArgs>),
    /// Print what Cloud Hypervisor logged about a sandbox
    Logs(Box<sandbox::LogArgs>),
    /// Put right what dead programs or a restart of the machine left behind
    Recover(Box<sandbox::RecoverArgs>),
    /// Make, attach, show, flatten and remove copy-on-write disks by hand
    Disk(disk::DiskArgs),
    /// Build, show, check and remove network slots by hand
    Net(net::NetArgs),
    /// Bring one snapshot directory back to life and leave the VM running
    Restore(Box<restore::RestoreArgs>),
    /// Build, import, list, show and remove templates
    Template(template::TemplateArgs),
    /// Print a completion script for a shell
    Completion(words::CompletionArgs),
    /// Print a manual page, or write them all
    Man(words::ManArgs),
}

/// What a command ends with where it does not simply succeed.
enum Failure {
    /// Something went wrong: the error, outermost first, with its causes.
    Error(Box<dyn std::error::Error>),
    /// `doctor` has said what is missing.
    Missing,
    /// What went wrong was said already.
    Told(Kind),
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
        Command::Demo(args) => demo::run(args, cli.global),
        Command::Launch(args) => sandbox::launch(args, cli.global),
        Command::Resume(args) => sandbox::resume(args, cli.global),
        Command::Pause(args) => sandbox::pause(args, cli.global),
        Command::Snapshot(args) => sandbox::snapshot(args, cli.global),
        Command::Destroy(args) => sandbox::destroy(args, cli.global),
        Command::Ls(args) => sandbox::list(args, cli.global),
        Command::Inspect(args) => sandbox::inspect(args, cli.global),
        Command::Logs(args) => sandbox::log(args, cli.global),
        Command::Recover(args) => sandbox::recover(args, cli.global),
        Command::Disk(args) => disk::run(args, cli.global),
        Command::Net(args) => net::run(args, cli.global),
        Command::Restore(args) => restore::run(args, cli.global),
        Command::Template(args) => template::run(args, cli.global),
        Command::Completion(args) => words::completion(args),
        Command::Man(args) => words::man(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Missing) => ExitCode::from(3),
        Err(Failure::Told(kind)) => ExitCode::from(kind.code()),
        Err(Failure::Error(error)) => {
            report::error(error.as_ref(), cli.global);
            ExitCode::from(Kind::of(error.as_ref()).code())
        }
    }
}

/// `NAME=VALUE` of the command line.
fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("NAME=VALUE is needed".to_owned()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn every_command_says_what_its_document_has() {
        fn check(command: &clap::Command, wordless: &[&str]) {
            let name = command.get_name();
            if wordless.contains(&name) {
                return;
            }
            let mut parts = command.get_subcommands().peekable();
            // `bench` does something itself beside those.
            if parts.peek().is_none() || name == "bench" {
                let help = command.get_after_long_help().map(ToString::to_string);
                assert!(help.is_some_and(|it| it.contains("JSON")), "{name}");
            }
            parts.for_each(|part| check(part, wordless));
        }
        let command = <Cli as clap::CommandFactory>::command();
        check(&command, &["completion", "man", "report"]);
    }

    #[test]
    fn variables_are_told_from_other_words() {
        assert_eq!(pair("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        for bad in ["A", "=b", ""] {
            assert!(pair(bad).is_err(), "{bad:?}");
        }
    }
}
