//! `rewake completion` and `rewake man`: what the command line is, for shells and readers.

use std::io::{self, Write as _};
use std::path::PathBuf;

use clap::{Args, CommandFactory as _, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;

use super::{Cli, Failure, report};

#[derive(Debug, Args)]
pub(super) struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    shell: ShellArg,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ShellArg {
    Bash,
    Zsh,
    Fish,
}

#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The command whose page it is [default: that of rewake itself]
    #[arg(value_name = "COMMAND", conflicts_with = "dir")]
    command: Vec<String>,
    /// Write the pages of all commands into this directory, as `rewake-launch.1`
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// There is no such command.
#[derive(Debug, thiserror::Error)]
#[error("There is no command {0:?}")]
struct NoCommand(String);

/// `rewake completion`.
pub(super) fn completion(args: &CompletionArgs) -> Result<(), Failure> {
    let shell = match args.shell {
        ShellArg::Bash => Shell::Bash,
        ShellArg::Zsh => Shell::Zsh,
        ShellArg::Fish => Shell::Fish,
    };
    // Into memory first: the generator panics where its reader has gone.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "rewake", &mut script);
    io::stdout().lock().write_all(&script)?;
    Ok(())
}

/// `rewake man`.
pub(super) fn man(args: &ManArgs) -> Result<(), Failure> {
    let mut root = Cli::command();
    // Fills in what commands inherit, and their full names.
    root.build();
    if let Some(dir) = &args.dir {
        return write_all(&root, dir);
    }
    let mut command = &root;
    for word in &args.command {
        let found = command.find_subcommand(word);
        command = found.ok_or_else(|| NoCommand(word.clone()))?;
    }
    io::stdout().lock().write_all(&page(command)?)?;
    Ok(())
}

fn write_all(command: &clap::Command, dir: &std::path::Path) -> Result<(), Failure> {
    let path = dir.join(format!("{}.1", name_of(command)));
    let text = page(command)?;
    std::fs::write(&path, text).map_err(|source| report::WriteError { path, source })?;
    for sub in visible(command) {
        write_all(sub, dir)?;
    }
    Ok(())
}

fn visible(command: &clap::Command) -> impl Iterator<Item = &clap::Command> {
    let subs = command.get_subcommands();
    subs.filter(|sub| sub.get_name() != "help" && !sub.is_hide_set())
}

/// `rewake-template-build`.
fn name_of(command: &clap::Command) -> String {
    let name = command.get_display_name();
    name.unwrap_or_else(|| command.get_name()).to_owned()
}

fn page(command: &clap::Command) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    Man::new(command.clone()).render(&mut text)?;
    // The generator's word for what stands below the help.
    let text = String::from_utf8_lossy(&text).replace(".SH EXTRA\n", ".SH NOTES\n");
    Ok(text.into_bytes())
}
