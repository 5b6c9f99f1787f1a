//! Directories for one test, filled from the fixtures and removed with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory below the system's one for temporary files.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rewake-snapshot-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// A copy of a captured snapshot, with a sparse memory file of the recorded length.
    pub(crate) fn snapshot(name: &str) -> Self {
        let scratch = Self::new();
        let from = fixture(name);
        for file in ["config.json", "state.json"] {
            fs::copy(from.join(file), scratch.path(file)).unwrap();
        }
        let size = fs::read_to_string(from.join("memory-ranges.size")).unwrap();
        if let Ok(size) = size.trim().parse() {
            scratch.memory(size);
        }
        scratch
    }

    /// Writes a sparse memory file.
    pub(crate) fn memory(&self, size: u64) {
        let file = fs::File::create(self.path("memory-ranges")).unwrap();
        file.set_len(size).unwrap();
    }

    pub(crate) fn root(&self) -> &Path {
        &self.0
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Replaces the one occurrence of `from` in a file.
    pub(crate) fn edit(&self, file: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.path(file)).unwrap();
        assert_eq!(text.matches(from).count(), 1, "{from:?} in {file}");
        fs::write(self.path(file), text.replace(from, to)).unwrap();
    }

    /// Every name below it with type, size and link target: what a side effect would change.
    pub(crate) fn census(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let meta = entry.metadata().unwrap();
                let times = (meta.modified().unwrap(), meta.len());
                format!("{:?} {:?} {times:?}", entry.file_name(), meta.file_type())
            })
            .collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = fs::remove_dir_all(&self.0);
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/snapshots")
        .join(name)
}

/// All captured snapshots.
pub(crate) const CAPTURED: [&str; 11] = [
    "ch-v52/hotplug-acpi-512m",
    "ch-v52/memfd-shared-4g",
    "ch-v52/private-128m",
    "ch-v52/two-zones-256m",
    "ch-v52/zone-file-shared-4g",
    "ch-v53/hotplug-acpi-512m",
    "ch-v53/linux-guest-256m",
    "ch-v53/memfd-shared-4g",
    "ch-v53/private-128m",
    "ch-v53/two-zones-256m",
    "ch-v53/zone-file-shared-4g",
];

/// The chain of an error in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
