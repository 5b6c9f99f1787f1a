//! `rewake ls`, `rewake inspect`, `rewake logs`: what there is, and how it fares.

use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use clap::{Args, ValueEnum};
use rewake::host::{Error, Host, Sandbox};
use rewake::ids::SandboxId;
use rewake::memory::Share;
use rewake::sandbox::state::State;
use rewake::units::Bytes;
use serde_json::{Value, json};

use super::SANDBOX_KEYS;
use super::view::{HEADER, View, moment};
use crate::cli::host::HostArgs;
use crate::cli::{Failure, Global, report};

#[derive(Debug, Args)]
#[command(after_long_help = [
    SANDBOX_KEYS,
    "\nUnder sandboxes; under damaged: sandbox_id and error of those whose journal cannot be read",
].concat())]
pub(in crate::cli) struct ListArgs {
    /// Only those in this state
    #[arg(long, value_enum)]
    state: Option<StateArg>,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// A state, on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum StateArg {
    Launching,
    Running,
    Pausing,
    Paused,
    Resuming,
    Lost,
    Destroying,
}

impl From<StateArg> for State {
    fn from(state: StateArg) -> Self {
        match state {
            StateArg::Launching => Self::Launching,
            StateArg::Running => Self::Running,
            StateArg::Pausing => Self::Pausing,
            StateArg::Paused => Self::Paused,
            StateArg::Resuming => Self::Resuming,
            StateArg::Lost => Self::Lost,
            StateArg::Destroying => Self::Destroying,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_long_help = [
    SANDBOX_KEYS,
    "\nAnd: directory, consumed (its snapshot was given to a VM that may have run), durable (its \
     snapshot is on the disk), snapshots: path, bytes and counts (resume would use it) of each; \
     steps: what destroying it undoes, oldest first",
].concat())]
pub(in crate::cli) struct InspectArgs {
    /// The sandbox
    id: SandboxId,
    #[command(flatten)]
    host: HostArgs,
}

#[derive(Debug, Args)]
#[command(after_long_help = "JSON: sandbox_id, lines")]
pub(in crate::cli) struct LogArgs {
    /// The sandbox
    id: SandboxId,
    /// Print the bytes as they are: a guest has a say in them
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// `rewake ls`.
pub(in crate::cli) fn list(args: &ListArgs, global: Global) -> Result<(), Failure> {
    let (mut views, mut damaged) = (Vec::new(), Vec::new());
    if args.host.is_there() {
        let host = args.host.open()?;
        for id in host.ids()? {
            match host.sandbox(&id).and_then(View::of) {
                Ok(view) => views.push(view),
                // Destroyed since it was listed.
                Err(error) if error.is_unknown() => {}
                Err(error) => damaged.push((id, error)),
            }
        }
    }
    if let Some(state) = args.state.map(State::from) {
        views.retain(|view| view.state() == state);
        damaged.clear();
    }
    if global.json {
        return report::json(&list_document(&views, &damaged));
    }
    if args.quiet {
        for view in &views {
            println!("{}", view.id());
        }
        return Ok(());
    }
    let mut rows: Vec<_> = views.iter().map(View::row).collect();
    rows.extend(damaged.iter().map(|(id, _)| {
        let mut row = vec![id.to_string(), "damaged".to_owned()];
        row.resize(HEADER.len(), "-".to_owned());
        row
    }));
    report::table(&HEADER, &rows)?;
    for (_, error) in &damaged {
        eprintln!("rewake: {}", report::words(error));
    }
    if views.iter().any(|view| view.stand_in().is_some()) {
        eprintln!("Some of these are the stand-in's, and no VMs: see rewake inspect");
    }
    Ok(())
}

fn list_document(views: &[View], damaged: &[(SandboxId, Error)]) -> Value {
    let sandboxes: Vec<_> = views.iter().map(View::document).collect();
    let damaged: Vec<_> = damaged
        .iter()
        .map(|(id, error)| {
            json!({ "sandbox_id": id.as_str(), "error": report::error_document(error) })
        })
        .collect();
    json!({ "sandboxes": sandboxes, "damaged": damaged })
}

/// `rewake inspect`.
pub(in crate::cli) fn inspect(args: &InspectArgs, global: Global) -> Result<(), Failure> {
    let host = args.host.open()?;
    let sandbox = host.sandbox(&args.id)?;
    let snapshots = snapshots(&sandbox)?;
    let view = View::of(sandbox)?;
    if global.json {
        let status = &view.story.status;
        let mut document = view.document();
        document["directory"] = json!(directory(&host, &args.id));
        document["consumed"] = status.consumed.into();
        document["durable"] = status.durable.into();
        document["snapshots"] = json!(snapshots);
        document["steps"] = json!(view.story.steps);
        return report::json(&document);
    }
    show(&view, &directory(&host, &args.id), &snapshots);
    Ok(())
}

fn directory(host: &Host, id: &SandboxId) -> std::path::PathBuf {
    host.config().root.join("sandboxes").join(id.as_str())
}

/// A snapshot directory of a sandbox.
#[derive(serde::Serialize)]
struct Snapshot {
    path: std::path::PathBuf,
    /// What it takes on the disk.
    bytes: u64,
    /// Whether a resume would use it.
    counts: bool,
}

fn snapshots(sandbox: &Sandbox) -> Result<Vec<Snapshot>, Error> {
    let status = sandbox.story()?.status;
    let counts = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        status.state == State::Paused && name == format!("snapshot.{}", status.generation)
    };
    let bytes = |path: &Path| {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        let sizes = entries.filter_map(|entry| entry.metadata().ok());
        sizes.map(|it| it.blocks().saturating_mul(512)).sum()
    };
    let all = sandbox.snapshots().into_iter();
    Ok(all
        .map(|path| Snapshot {
            bytes: bytes(&path),
            counts: counts(&path),
            path,
        })
        .collect())
}

fn show(view: &View, directory: &Path, snapshots: &[Snapshot]) {
    let (identity, status) = (&view.story.identity, &view.story.status);
    let line = |name: &str, text: &dyn std::fmt::Display| println!("{name:<12}{text}");
    if let Some(build) = view.stand_in() {
        println!("This is the stand-in, not Cloud Hypervisor: {build}");
    }
    line("sandbox", view.id());
    line("state", &view.state_words());
    if let Some(why) = view.lost() {
        line("", &why);
    }
    line("since", &moment(status.since));
    line("created", &moment(identity.created));
    if let Some(template) = &identity.template {
        line("template", template);
    }
    line("generation", &status.generation);
    if let Some(slot) = status.slot {
        line("slot", &slot);
    }
    line("address", &view.address());
    line("vcpus", &identity.vcpus);
    line("ram", &view.ram());
    if let Some(vm) = &status.vm {
        for note in &vm.notes {
            line("", note);
        }
        line("vmm", &vm.vmm);
        line("pid", &vm.process.pid);
        line("api socket", &vm.vm_dir.join("api.sock").display());
        line("lifecycle", &vm.lifecycle);
    }
    if let Some(usage) = &view.usage {
        line("memory", &share("guest", &usage.guest));
        line("", &share("process", &usage.process));
    }
    show_disk(view);
    line("directory", &directory.display());
    if status.consumed {
        line("", &"its snapshot was given to a VM that may have run");
    }
    for snapshot in snapshots {
        let size = Bytes(snapshot.bytes);
        let counts = if snapshot.counts { ", counts" } else { "" };
        let durable = if snapshot.counts && status.durable {
            ", on the disk"
        } else {
            ""
        };
        let path = snapshot.path.display();
        line("snapshot", &format!("{path} ({size}{counts}{durable})"));
    }
    for step in &view.story.steps {
        line("on record", step);
    }
}

fn show_disk(view: &View) {
    let line = |name: &str, text: &str| println!("{name:<12}{text}");
    match &view.disk {
        Err(error) => line("disk", &report::words(error)),
        Ok(None) => line("disk", "none"),
        Ok(Some(info)) => {
            let (kind, words) = (info.record.kind, view.disk_words());
            line("disk", &format!("{kind}, {words}"));
            if let Some(status) = info.status {
                let free = status.filesystem_free;
                line(
                    "",
                    &format!("{}; its file system has {free} left", status.state),
                );
            }
            if let Some(path) = &info.path {
                line("", &path.display().to_string());
            }
            let (base, sharers) = (info.record.base.path.display(), info.sharers.len());
            line("", &format!("over {base}, shared by {sharers}"));
        }
    }
}

fn share(whose: &str, share: &Share) -> String {
    format!(
        "{whose} {}: {} resident, {} private, {} of files, {} mapped by others too",
        share.size, share.resident, share.private, share.file, share.shared
    )
}

/// `rewake logs`.
pub(in crate::cli) fn log(args: &LogArgs, global: Global) -> Result<(), Failure> {
    let host = args.host.open()?;
    let text = host.sandbox(&args.id)?.log()?;
    if global.json {
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        return report::json(&json!({ "sandbox_id": args.id.as_str(), "lines": lines }));
    }
    let mut out = std::io::stdout().lock();
    if args.raw {
        out.write_all(&text)?;
        return Ok(());
    }
    let text = String::from_utf8_lossy(&text);
    for line in text.lines() {
        writeln!(out, "{}", harmless(line))?;
    }
    Ok(())
}

/// Without characters that a terminal would obey.
fn harmless(line: &str) -> String {
    let escaped = |c: char| -> String {
        if c.is_control() && c != '\t' {
            c.escape_default().collect()
        } else {
            c.into()
        }
    };
    line.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_does_not_write_to_the_terminal() {
        assert_eq!(harmless("a\tb \u{1b}[2J"), "a\tb \\u{1b}[2J");
        assert_eq!(harmless("über"), "über");
    }
}
