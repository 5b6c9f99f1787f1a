//! `wrenn-snapshot.json`: what a Wrenn host writes beside a snapshot.
//!
//! Its keys, as Wrenn's sandbox manager writes them (`internal/sandbox`, `snapshotMeta`):
//! `sandbox_dir` is the directory on a tmpfs that the disk's recorded path lies in, the same
//! for all descendants of one boot; `vcpus` and `memory_mb` are those of the VM;
//! `template_name`, `template_id`, `team_id` and, in older ones, `sandbox_id` say whose it is;
//! `created_at` is when it was taken; `base_template` and `cow_path` are the two files that a
//! paused sandbox's disk consists of. `slot_index` and `timeout_sec` mean nothing elsewhere.
//!
//! The document belongs to another tool, which changes it as it likes: every key may be
//! missing, and unknown ones are skipped. Nothing in it is believed that the snapshot itself
//! can be asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::wire::json::{self, JsonError, JsonLimits};

/// The file's name.
pub(super) const META_FILE: &str = "wrenn-snapshot.json";
/// The name of the disk's image beside it, where the snapshot is a template of Wrenn's.
pub(super) const META_ROOTFS: &str = "rootfs.ext4";

const LIMITS: JsonLimits = JsonLimits {
    bytes: 64 << 10,
    depth: 8,
};

/// What is read of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub(super) struct Meta {
    pub(super) sandbox_dir: Option<PathBuf>,
    pub(super) vcpus: Option<u64>,
    pub(super) memory_mb: Option<u64>,
    pub(super) template_name: Option<String>,
    pub(super) template_id: Option<String>,
    pub(super) team_id: Option<String>,
    pub(super) sandbox_id: Option<String>,
    pub(super) created_at: Option<String>,
    pub(super) base_template: Option<PathBuf>,
    pub(super) cow_path: Option<PathBuf>,
}

/// Why it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// It cannot be read.
    #[error("Cannot read {META_FILE}")]
    Read(#[source] std::io::Error),
    /// It is not JSON of its shape.
    #[error("{META_FILE} is refused")]
    Json(#[source] JsonError),
    /// Its sandbox directory is none.
    #[error("{META_FILE}: sandbox_dir is not a plain absolute path")]
    SandboxDir,
}

impl Meta {
    /// Reads it; `None` where the directory has none.
    pub(super) fn read(dir: &Path) -> Result<Option<Self>, MetaError> {
        let file = match File::open(dir.join(META_FILE)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(MetaError::Read)?,
        };
        let mut bytes = Vec::new();
        let most = LIMITS.bytes as u64 + 1;
        file.take(most)
            .read_to_end(&mut bytes)
            .map_err(MetaError::Read)?;
        Self::parse(&bytes).map(Some)
    }

    fn parse(bytes: &[u8]) -> Result<Self, MetaError> {
        // Fields that may all be missing would be read from an empty list as well.
        let _object: BTreeMap<String, IgnoredAny> =
            json::from_slice_bounded(bytes, LIMITS).map_err(MetaError::Json)?;
        let mut meta: Self = json::from_slice_bounded(bytes, LIMITS).map_err(MetaError::Json)?;
        // Go writes what it does not know as an empty string.
        meta.sandbox_dir = meta.sandbox_dir.filter(|dir| !dir.as_os_str().is_empty());
        if let Some(dir) = &meta.sandbox_dir {
            let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
            if !dir.is_absolute() || dir.parent().is_none() || !dir.components().all(plain) {
                return Err(MetaError::SandboxDir);
            }
        }
        Ok(meta)
    }

    /// Whose it is, in one line.
    pub(super) fn origin(&self) -> String {
        let parts = [
            ("template", &self.template_name),
            ("template id", &self.template_id),
            ("team", &self.team_id),
            ("sandbox", &self.sandbox_id),
            ("taken", &self.created_at),
        ];
        let told = parts.into_iter().filter_map(|(what, value)| {
            let value = value.as_ref().filter(|value| !value.is_empty())?;
            Some(format!("{what} {value}"))
        });
        let told: Vec<String> = std::iter::once("Wrenn".to_owned()).chain(told).collect();
        told.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_generations_are_read_and_strangers_are_skipped() {
        let newer = br#"{"template_name":"py","team_id":"t","template_id":"i","vcpus":2,
            "memory_mb":512,"timeout_sec":0,"base_template":"/w/rootfs.ext4",
            "sandbox_dir":"/tmp/ch-vm-1","created_at":"2026-11-01T00:00:00Z","colour":{"a":[1]}}"#;
        let meta = Meta::parse(newer).unwrap();
        assert_eq!(meta.sandbox_dir.as_deref(), Some(Path::new("/tmp/ch-vm-1")));
        assert_eq!((meta.vcpus, meta.memory_mb), (Some(2), Some(512)));
        assert!(
            meta.origin().starts_with("Wrenn, template py, "),
            "{}",
            meta.origin()
        );
        let older = br#"{"sandbox_id":"sb-1","slot_index":3,"cow_path":"/w/sb-1.cow"}"#;
        let meta = Meta::parse(older).unwrap();
        assert_eq!(meta.sandbox_dir, None);
        assert_eq!(meta.origin(), "Wrenn, sandbox sb-1");
        assert_eq!(
            Meta::parse(br#"{"sandbox_dir":""}"#).unwrap().sandbox_dir,
            None
        );
    }

    #[test]
    fn a_directory_that_leads_elsewhere_is_refused() {
        for dir in ["/", "tmp/x", "/tmp/../etc", "../x"] {
            let text = format!(r#"{{"sandbox_dir":"{dir}"}}"#);
            let refused = Meta::parse(text.as_bytes()).unwrap_err();
            assert!(
                matches!(refused, MetaError::SandboxDir),
                "{dir}: {refused:?}"
            );
        }
        for bad in [&b"[]"[..], b"{", br#"{"vcpus":"two"}"#] {
            assert!(
                matches!(Meta::parse(bad), Err(MetaError::Json(_))),
                "{bad:?}"
            );
        }
    }
}
