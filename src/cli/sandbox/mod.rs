//! Sandboxes from the command line: launch, resume, pause, snapshot, destroy; ls, inspect,
//! logs; recover.
//!
//! A command leaves sandboxes of others as they are: only `recover` looks at all of them.

mod launch;
mod many;
mod recover;
mod show;
mod view;

use clap::Args;
use rewake::ids::{SandboxId, TemplateId};
use serde_json::json;

pub(super) use launch::{LaunchArgs, ResumeArgs, launch, resume};
pub(super) use many::{DestroyArgs, PauseArgs, destroy, pause};
pub(super) use recover::{RecoverArgs, recover};
pub(super) use show::{InspectArgs, ListArgs, LogArgs, inspect, list, log};

use super::host::HostArgs;
use super::progress::Progress;
use super::{Failure, Global, report};

/// What `--json` prints of a sandbox, wherever one is printed.
const SANDBOX_KEYS: &str = "\
JSON, for each sandbox:
  sandbox_id, state (launching, running, pausing, paused, resuming, lost, destroying),
  stranded (an operation was begun and nobody is at work with it), since, created, template,
  generation (1 after its launch), slot, address, vcpus, memory_bytes, lost (why),
  disk: null, or kind, path, base, state (healthy, pressure, overflowed, invalid; null while
    detached), used_bytes, total_bytes, filesystem_free_bytes, sharers; or error
  vm: null, or pid, start_time, api_socket, vm_dir, build, stand_in, memory_mode, lifecycle_id,
    notes (why its memory came back as it did)
  memory: null, or guest and process, each with size_bytes, resident_bytes,
    proportional_bytes, private_bytes (what it costs), file_bytes (the page cache's) and
    shared_bytes (pages that others map, too)";

#[derive(Debug, Args)]
#[command(after_long_help = "JSON: sandbox_id, template, directory, timeline")]
pub(super) struct SnapshotArgs {
    /// The sandbox, which must run
    id: SandboxId,
    /// The new template's name, which must be free
    name: TemplateId,
    #[command(flatten)]
    host: HostArgs,
}

/// `rewake snapshot`.
pub(super) fn snapshot(args: &SnapshotArgs, global: Global) -> Result<(), Failure> {
    let host = args.host.open()?;
    let deadline = args.host.deadline()?;
    let mut sandbox = host.sandbox(&args.id)?;
    let progress = Progress::start(format!("snapshot {}", args.id), !global.json);
    let mut told = |it: rewake::resource::disk::Progress| progress.bytes(it.done, it.total);
    let made = host.snapshot(&mut sandbox, &args.name, deadline, &mut told);
    drop(progress);
    let template = made?;
    if global.json {
        return report::json(&json!({
            "sandbox_id": args.id.as_str(),
            "template": template.id().as_str(),
            "directory": template.dir(),
            "timeline": sandbox.timeline().to_json(),
        }));
    }
    println!("template {} from sandbox {}", template.id(), args.id);
    print!("{}", sandbox.timeline());
    Ok(())
}
