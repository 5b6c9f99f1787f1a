//! A root directory of one test, and templates in it that are made of captured snapshots.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::ids::TemplateId;
use rewake::template::{HostFacts, Kind, Manifest, Origin, Stage, TemplateError, TemplateStore};

/// The length of the root disks here.
pub(crate) const DISK_BYTES: u64 = 1 << 20;

/// A deadline for calls that take milliseconds.
pub(crate) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// An error with its causes, as the command prints it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

pub(crate) fn name(text: &str) -> TemplateId {
    TemplateId::new(text).unwrap()
}

/// A root directory, removed with the test.
pub(crate) struct Root(PathBuf);

impl Root {
    pub(crate) fn new(test: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let unique = format!("rewake-template-{}-{number}-{test}", std::process::id());
        let path = std::env::temp_dir().join(unique);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// One that another process made: for a process that ends without dropping it.
    pub(crate) fn existing(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    pub(crate) fn store(&self, faults: Faults) -> TemplateStore {
        TemplateStore::open(&self.0, faults).unwrap()
    }

    /// Every name in the directory of templates, hidden ones too.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.join("templates")).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Fills a staging directory as `vm.snapshot` and a flatten would.
pub(crate) fn fill(stage: &Path, fixture: &str, memory: &str) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/snapshots/ch-v53");
    let from = fixtures.join(fixture);
    for file in ["config.json", "state.json"] {
        fs::copy(from.join(file), stage.join(file)).unwrap();
    }
    let length = match memory {
        "memory" => 4 << 30,
        _ => {
            let text = fs::read_to_string(from.join("memory-ranges.size")).unwrap();
            text.trim().parse().unwrap()
        }
    };
    let sparse = |name: &str, length| {
        let file = fs::File::create_new(stage.join(name)).unwrap();
        file.set_len(length).unwrap();
    };
    sparse(memory, length);
    sparse("rootfs.raw", DISK_BYTES);
}

/// Stages a template of a snapshot of file-backed memory.
pub(crate) fn staged(
    store: &TemplateStore,
    id: &TemplateId,
) -> Result<(Stage, Manifest), TemplateError> {
    let stage = store.stage()?;
    fill(stage.path(), "zone-file-shared-4g", "memory");
    let manifest = stage.describe(id, Origin::new(Kind::Built, HostFacts::default()))?;
    Ok((stage, manifest))
}

/// Makes one from beginning to end.
pub(crate) fn make(store: &TemplateStore, id: &TemplateId) -> Result<(), TemplateError> {
    let (stage, manifest) = staged(store, id)?;
    store.publish(stage, &manifest).map(drop)
}
