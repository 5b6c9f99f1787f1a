//! A template that somebody else made: of a host's store, or a directory with a snapshot.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::ids::TemplateId;
use rewake::plan::MemoryMode;
use rewake::snapshot::{SnapshotDir, SnapshotLimits};
use rewake::template::{
    ImportDisk, ImportSpec, MANIFEST_FILE, Template as HostTemplate, TemplateStore, import,
};

use super::BenchArgs;
use super::arms::{Job, Rival, ours};
use super::house::BUDGET;
use super::stage::{Stage, Template};
use crate::cli::Failure;

/// A directory that is no template's and has no snapshot either.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChoiceError {
    #[error("{0} is not where templates lie: DIR/templates/NAME")]
    Astray(PathBuf),
    #[error("There is no host's data in {0}")]
    NoRoot(PathBuf),
}

/// Finds it, and gets to know its guest: what that remembers, and who runs it here.
pub(super) fn template(args: &BenchArgs, stage: &Stage, name: &str) -> Result<Template, Failure> {
    let chosen = find(args, stage, name)?;
    let mut template = Template {
        snapshot: chosen.snapshot_dir().to_owned(),
        base: chosen.disk(),
        recorded: None,
        plain: chosen.snapshot_dir().to_owned(),
        ram_mib: chosen.manifest().memory.bytes >> 20,
        build: String::new(),
        nonce: String::new(),
        chosen: Some(chosen),
        since: Instant::now(),
    };
    let job = Job {
        stage,
        template: &template,
        mode: MemoryMode::Copy,
        disk: args.disk.mode().unwrap_or_default(),
        pools: None,
        writes: true,
    };
    // The conventional way needs memory that Cloud Hypervisor wrote itself: it would write to
    // a file that the configuration names.
    let plain = stage.dir.join("plain");
    let conventionally = args.against.contains(&Rival::Conventional);
    let known = ours::acquaint(&job, conventionally.then_some(&*plain))?;
    template.nonce = known.nonce;
    template.build = known.build;
    if conventionally {
        template.recorded = recorded_disk(&plain)?;
        if let Some(dir) = template.recorded.as_deref().and_then(Path::parent) {
            fs::create_dir_all(dir)?;
        }
        template.plain = plain;
    }
    Ok(template)
}

fn find(args: &BenchArgs, stage: &Stage, name: &str) -> Result<HostTemplate, Failure> {
    if !name.contains('/') && !Path::new(name).is_dir() {
        if !args.root.is_dir() {
            return Err(ChoiceError::NoRoot(args.root.clone()).into());
        }
        let store = TemplateStore::open(&args.root, Faults::NONE)?;
        return Ok(store.get(&TemplateId::new(name)?)?);
    }
    let dir = fs::canonicalize(name)?;
    if !dir.join(MANIFEST_FILE).exists() {
        return adopt(stage, &dir);
    }
    let astray = || ChoiceError::Astray(dir.clone());
    let templates = dir.parent().filter(|it| it.ends_with("templates"));
    let root = templates.and_then(Path::parent).ok_or_else(astray)?;
    let id = dir.file_name().unwrap_or_default().to_string_lossy();
    let store = TemplateStore::open(root, Faults::NONE)?;
    Ok(store.get(&TemplateId::new(id)?)?)
}

/// A bare snapshot becomes a template of this run, with its disk where that is.
fn adopt(stage: &Stage, dir: &Path) -> Result<HostTemplate, Failure> {
    let mut spec = ImportSpec::new(TemplateId::new("chosen")?, dir);
    if let Some(disk) = recorded_disk(dir)? {
        spec.disk = ImportDisk::InPlace(disk);
    }
    let store = TemplateStore::open(&stage.dir.join("root"), Faults::NONE)?;
    Ok(import(&spec, &store, &mut |_| {}, Deadline::after(BUDGET))?)
}

/// The path under which a snapshot has its disk.
fn recorded_disk(snapshot: &Path) -> Result<Option<PathBuf>, Failure> {
    let snapshot = SnapshotDir::open(snapshot, &SnapshotLimits::default())?;
    let disks = snapshot.config().disks.as_ref();
    Ok(disks
        .and_then(|disks| disks.first())
        .and_then(|disk| disk.path.clone()))
}
