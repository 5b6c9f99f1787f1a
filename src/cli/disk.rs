//! `rewake disk`: root disks by hand.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::ids::SandboxId;
use rewake::resource::disk::{
    Disk, DiskConfig, DiskError, DiskFailure, DiskInfo, DiskKind, DiskMode, DiskPool,
};
use rewake::units::Bytes;
use serde_json::json;

use super::{Failure, Global, report};

/// What `--json` prints of a disk that stands.
const ATTACHED_KEYS: &str = "JSON: id, path, kind, bytes, base, milliseconds";
const SHOW_KEYS: &str = "\
JSON: disks, a list of
  id, path (null while detached), open_count, sharers (disks on the same image),
  record: null, or version, kind, base, store_bytes
  used_bytes, total_bytes, filesystem_free_bytes, state (healthy, pressure, overflowed,
    invalid): null while detached";

#[derive(Debug, Args)]
pub(super) struct DiskArgs {
    /// Where the disks' stores and records are
    #[arg(long, value_name = "DIR", default_value = ".", global = true)]
    dir: PathBuf,
    /// Where processes meet: locks
    #[arg(long, value_name = "DIR", default_value_os_t = DiskConfig::default().runtime_dir, global = true)]
    runtime_dir: PathBuf,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300, global = true)]
    timeout: u64,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a disk of a base image, which is shared and never written to
    #[command(after_long_help = ATTACHED_KEYS)]
    Create {
        /// The base image: a raw image file
        #[arg(value_name = "IMAGE")]
        base: PathBuf,
        /// Whose disk it is [default: a random id]
        #[arg(long, value_name = "ID")]
        id: Option<SandboxId>,
        /// How it is kept
        #[arg(long, value_enum, default_value_t = Mode::Auto)]
        mode: Mode,
        /// Size of the store in MiB [default: room for a write to every block]
        #[arg(long, value_name = "MIB")]
        store_mib: Option<u64>,
    },
    /// Attach a disk that was made before
    #[command(after_long_help = ATTACHED_KEYS)]
    Attach {
        /// The disk
        id: SandboxId,
    },
    /// List disks: how full they are, what they stand on, who shares that
    #[command(after_long_help = SHOW_KEYS)]
    Show {
        /// One disk only
        id: Option<SandboxId>,
    },
    /// Write a disk as it is now to an image that stands alone; its VM must not run
    #[command(after_long_help = "JSON: image, bytes")]
    Flatten {
        /// The disk
        id: SandboxId,
        /// The new image, which must not exist
        #[arg(value_name = "FILE")]
        to: PathBuf,
    },
    /// Remove a disk and what was written to it; its VM must have ended
    #[command(after_long_help = "JSON: removed, or detached with --keep: the id")]
    Remove {
        /// The disk
        id: SandboxId,
        /// Only detach it: what was written to it stays
        #[arg(long)]
        keep: bool,
    },
}

/// How a disk is kept, on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Mode {
    /// The first of the others that works here
    Auto,
    /// A device-mapper snapshot
    DmSnapshot,
    /// A file that shares its blocks with the base image
    Reflink,
    /// A sparse copy
    Copy,
}

impl From<Mode> for DiskMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Auto => Self::Auto,
            Mode::DmSnapshot => Self::Only(DiskKind::DmSnapshot),
            Mode::Reflink => Self::Only(DiskKind::Reflink),
            Mode::Copy => Self::Only(DiskKind::Copy),
        }
    }
}

pub(super) fn run(args: &DiskArgs, global: Global) -> Result<(), Failure> {
    let mut config = DiskConfig {
        runtime_dir: args.runtime_dir.clone(),
        ..DiskConfig::default()
    };
    if let Action::Create {
        store_mib: Some(mib),
        ..
    } = args.action
    {
        config.store_size = Some(Bytes(mib.saturating_mul(1 << 20)));
    }
    let pool = DiskPool::open(config, Faults::NONE);
    let deadline = Deadline::after(Duration::from_secs(args.timeout));
    let dir = args.dir.as_path();
    match &args.action {
        Action::Create { base, id, mode, .. } => {
            let id = id.clone().unwrap_or_else(SandboxId::random);
            let started = std::time::Instant::now();
            let disk = pool.create(&id, base, dir, (*mode).into(), deadline)?;
            attached(&disk, started.elapsed(), global)
        }
        Action::Attach { id } => {
            let started = std::time::Instant::now();
            let disk = pool.attach(id, dir, deadline)?;
            attached(&disk, started.elapsed(), global)
        }
        Action::Show { id } => show(&pool, id.as_ref(), dir, global),
        Action::Flatten { id, to } => flatten(&pool, id, dir, to, deadline, global),
        Action::Remove { id, keep } => {
            pool.remove_by_id(id, dir, *keep, deadline)?;
            let done = if *keep { "detached" } else { "removed" };
            if global.json {
                report::json(&json!({ done: id.as_str() }))
            } else {
                println!("disk {id} {done}");
                Ok(())
            }
        }
    }
}

/// Whether the failure is that a time limit passed.
pub(super) fn is_timeout(error: &(dyn std::error::Error + 'static)) -> bool {
    let failure = error.downcast_ref::<DiskFailure>().map(|it| &it.source);
    failure
        .or_else(|| error.downcast_ref::<DiskError>())
        .is_some_and(DiskError::is_timeout)
}

fn attached(disk: &Disk, elapsed: Duration, global: Global) -> Result<(), Failure> {
    let milliseconds = elapsed.as_secs_f64() * 1e3;
    if global.json {
        return report::json(&json!({
            "id": disk.id().as_str(),
            "path": disk.path(),
            "kind": disk.kind(),
            "bytes": disk.size().0,
            "base": disk.record().base.path,
            "milliseconds": milliseconds,
        }));
    }
    println!(
        "disk {} ({}, {}) ready in {milliseconds:.1} ms: {}",
        disk.id(),
        disk.kind(),
        disk.size(),
        disk.path().display()
    );
    Ok(())
}

fn show(
    pool: &DiskPool,
    id: Option<&SandboxId>,
    dir: &Path,
    global: Global,
) -> Result<(), Failure> {
    let ids = match id {
        Some(id) => vec![id.clone()],
        None => pool.list(dir)?,
    };
    let mut disks = Vec::new();
    for id in &ids {
        match pool.inspect(id, dir) {
            // Removed since it was listed.
            Err(DiskError::Missing { .. }) if ids.len() > 1 => {}
            other => disks.push(other?),
        }
    }
    if global.json {
        let disks: Vec<_> = disks.iter().map(document).collect();
        return report::json(&json!({ "disks": disks }));
    }
    let rows: Vec<Vec<String>> = disks.iter().map(row).collect();
    report::table(
        &[
            "disk", "kind", "path", "used", "of", "state", "sharers", "base",
        ],
        &rows,
    )
}

fn document(info: &DiskInfo) -> serde_json::Value {
    json!({
        "id": info.id.as_str(),
        "record": info.record,
        "path": info.path,
        "open_count": info.open_count,
        "used_bytes": info.status.map(|it| it.used.0),
        "total_bytes": info.status.map(|it| it.total.0),
        "filesystem_free_bytes": info.status.map(|it| it.filesystem_free.0),
        "state": info.status.map(|it| it.state),
        "sharers": info.sharers,
    })
}

fn row(info: &DiskInfo) -> Vec<String> {
    let (used, total, state) = match info.status {
        Some(it) => (
            it.used.to_string(),
            it.total.to_string(),
            it.state.to_string(),
        ),
        None => (String::new(), String::new(), "detached".to_owned()),
    };
    let path = info.path.as_ref().map(|it| it.display().to_string());
    vec![
        info.id.to_string(),
        info.record.kind.to_string(),
        path.unwrap_or_default(),
        used,
        total,
        state,
        info.sharers.len().to_string(),
        info.record.base.path.display().to_string(),
    ]
}

fn flatten(
    pool: &DiskPool,
    id: &SandboxId,
    dir: &Path,
    to: &Path,
    deadline: Deadline,
    global: Global,
) -> Result<(), Failure> {
    let before = pool.inspect(id, dir)?;
    let disk = pool.attach(id, dir, deadline)?;
    let mut tenths = 0;
    let mut progress = |it: rewake::resource::disk::Progress| {
        let now = it.done.0.saturating_mul(10) / it.total.0.max(1);
        if now > tenths {
            tenths = now;
            log::info!("{}0 % of {}", now, it.total);
        }
    };
    let outcome = pool.flatten(&disk, to, &mut progress, deadline);
    let bytes = disk.size();
    if before.path.is_none() {
        // It is left as it was found.
        let detached = pool.remove(disk, true, deadline);
        outcome?;
        detached?;
    } else {
        outcome?;
    }
    if global.json {
        report::json(&json!({ "image": to, "bytes": bytes.0 }))
    } else {
        println!("disk {id} written to {} ({bytes})", to.display());
        Ok(())
    }
}
