//! `rewake template`: frozen guests to launch sandboxes from.

mod list;
mod make;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::ids::TemplateId;
use rewake::template::{BuildError, ImportError, TemplateError, TemplateStore};
use serde_json::json;

use list::TEMPLATE_KEYS;

use super::host::HostArgs;
use super::{Failure, Global, report};

/// Who uses a template, after its own keys.
const USERS: &str = "\n  users: vms and disks";

#[derive(Debug, Args)]
pub(super) struct TemplateArgs {
    #[command(flatten)]
    host: HostArgs,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Boot a kernel and an image, wait for envd, freeze it
    Build(Box<make::BuildArgs>),
    /// Adopt a snapshot directory of Cloud Hypervisor or of a Wrenn host
    Import(make::ImportArgs),
    /// List templates
    #[command(after_long_help = ["JSON: templates, a list of\n", TEMPLATE_KEYS, USERS,
        "\n  or name, error and users, where it is damaged"].concat())]
    Ls,
    /// Show one template, and whether it is whole and can run here
    #[command(after_long_help = ["JSON:\n", TEMPLATE_KEYS, USERS,
        "\n  usable (whether it can run here), problem (null, or why not)"].concat())]
    Show {
        /// The template
        name: TemplateId,
        /// The cloud-hypervisor binary that it is to run under [default: looked up on PATH]
        #[arg(long, value_name = "PATH")]
        vmm: Option<PathBuf>,
    },
    /// Remove templates that nobody uses
    #[command(after_long_help = "JSON: removed: the names")]
    Rm {
        /// The templates
        #[arg(value_name = "NAME", required = true)]
        names: Vec<TemplateId>,
    },
}

pub(super) fn run(args: &TemplateArgs, global: Global) -> Result<(), Failure> {
    if matches!(args.action, Action::Ls) && !args.host.is_there() {
        // Looking does not make what is not there.
        return list::none(global);
    }
    let store = TemplateStore::open(&args.host.root, Faults::NONE)?;
    let usual = Deadline::after(Duration::from_secs(3600));
    let deadline = args.host.deadline_or(usual)?;
    match &args.action {
        Action::Build(build) => {
            sweep(&store)?;
            make::build(build, &store, &args.host, deadline, global)
        }
        Action::Import(import) => {
            sweep(&store)?;
            make::import(import, &store, deadline, global)
        }
        Action::Ls => list::list(&store, global),
        Action::Show { name, vmm } => list::show(&store, name, vmm.as_deref(), global),
        Action::Rm { names } => {
            sweep(&store)?;
            remove(&store, names, deadline, global)
        }
    }
}

/// Whether the failure is that a time limit passed.
pub(super) fn is_timeout(error: &(dyn std::error::Error + 'static)) -> bool {
    let of = |found: Option<bool>| found.unwrap_or(false);
    of(error.downcast_ref().map(TemplateError::is_timeout))
        || of(error.downcast_ref().map(BuildError::is_timeout))
        || of(error.downcast_ref().map(ImportError::is_timeout))
}

/// What others left behind goes first: it takes room, and may hold a slot.
fn sweep(store: &TemplateStore) -> Result<(), Failure> {
    for swept in store.sweep()? {
        match swept.leftovers.first() {
            None => log::info!("{}: cleared away", swept.path.display()),
            Some(left) => log::warn!("{}: {left}", swept.path.display()),
        }
    }
    Ok(())
}

/// Removes one after the other, up to the first that cannot be.
fn remove(
    store: &TemplateStore,
    names: &[TemplateId],
    deadline: Deadline,
    global: Global,
) -> Result<(), Failure> {
    for name in names {
        store.remove(name, deadline)?;
        if !global.json {
            println!("template {name} removed");
        }
    }
    if global.json {
        let removed: Vec<&str> = names.iter().map(TemplateId::as_str).collect();
        report::json(&json!({ "removed": removed }))?;
    }
    Ok(())
}
