//! `rewake.json`: what a template is, for whoever must decide whether it can be used here.
//!
//! Everything in it that could be read from the snapshot itself is there so that an answer
//! costs one small file. Cloud Hypervisor's own files stay as it wrote them.

use std::fmt;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::cpu::Cpu;
use super::digest::Sha256Hex;
use crate::ids::{SandboxId, TemplateId};
use crate::resource::disk::BaseIdentity;
use crate::snapshot::{MEMORY_FILE, ZONE_FILE};
use crate::vmm::api::Version;
use crate::wire::excerpt::excerpt;
use crate::wire::json::{self, JsonError, JsonLimits};

/// The name of the manifest in a template's directory.
pub const MANIFEST_FILE: &str = "rewake.json";
/// The name of the root disk's image there.
pub const ROOTFS_FILE: &str = "rootfs.raw";

/// Most characters of a free text.
const MAX_TEXT: usize = 256;
/// Most bytes of a path (`PATH_MAX`).
const MAX_PATH: usize = 4096;

/// What is known of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Layout of this document, [`Manifest::FORMAT`].
    pub format: u32,
    /// The template's name, which is that of its directory, too.
    #[serde(with = "text")]
    pub name: TemplateId,
    /// When it was made.
    #[serde(with = "text")]
    pub created: Timestamp,
    /// How it came to be.
    pub kind: Kind,
    /// The Cloud Hypervisor that froze it.
    pub vmm: VmmRecord,
    /// The machine that it was frozen on.
    pub host: HostRecord,
    /// The kernel that the guest booted, where that is known.
    pub guest_kernel: Option<FileRecord>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: MemoryRecord,
    /// Checksum of `config.json`.
    pub config_sha256: Sha256Hex,
    /// Checksum of `state.json`.
    pub state_sha256: Sha256Hex,
    /// The root disk; absent where the guest has none.
    pub disk: Option<TemplateDisk>,
    /// How CH must find its disk.
    pub disk_path: DiskPath,
    /// The guest agent, where it told who it is.
    pub agent: Option<AgentRecord>,
    /// What it was made from.
    pub lineage: Lineage,
}

/// How a template came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Booted from a kernel and an image, then frozen.
    Built,
    /// Adopted from a snapshot directory of another tool.
    Imported,
    /// The snapshot of a running sandbox.
    Snapshot,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Built => "built",
            Self::Imported => "imported",
            Self::Snapshot => "snapshot",
        })
    }
}

/// A Cloud Hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmmRecord {
    /// Its version; absent where an importer was not told.
    #[serde(with = "optional_text")]
    pub version: Option<Version>,
    /// The same with the suffixes of its build, as it told them. The stand-in says here what
    /// it is.
    pub build: String,
}

/// The machine that a template was frozen on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostRecord {
    /// The kernel's release (`uname -r`); empty where it is not known.
    pub kernel: String,
    /// The processor that the guest was shown, or that of the machine where the snapshot
    /// does not tell. Absent where neither is known.
    pub cpu: Option<Cpu>,
}

/// A file that was used and is not part of the template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Where it was.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Its checksum.
    pub sha256: Sha256Hex,
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRecord {
    /// The guest's RAM in bytes.
    pub bytes: u64,
    /// The file that holds it.
    pub image: MemoryImage,
    /// That file's length in bytes.
    pub length: u64,
    /// A digest of what is where in it: the zones, the saved ranges and the RAM mappings.
    pub layout_sha256: Sha256Hex,
    /// Whether all of guest memory was really there when it was frozen. Otherwise pages that
    /// had never been fetched are zeros in it.
    pub materialised: bool,
}

/// Which file holds guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryImage {
    /// `memory-ranges`, as CH wrote it.
    #[serde(rename = "memory-ranges")]
    Ranges,
    /// `memory`, the file that a zone was mapped from.
    #[serde(rename = "memory")]
    Zone,
}

impl MemoryImage {
    /// Its name in the template's directory.
    #[must_use]
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Ranges => MEMORY_FILE,
            Self::Zone => ZONE_FILE,
        }
    }
}

/// A template's root disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum TemplateDisk {
    /// [`ROOTFS_FILE`] in the template's directory.
    Own {
        /// Its length in bytes.
        bytes: u64,
    },
    /// An image elsewhere, which nobody may change.
    Base(BaseIdentity),
}

/// How CH must find the disk of a VM restored from the template.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DiskPath {
    /// Under any path: the configuration is rewritten.
    #[default]
    Rewritten,
    /// Under the recorded one, which lies beneath this directory; CH sees it in a mount
    /// namespace of its own.
    Recorded {
        /// The directory.
        sandbox_dir: PathBuf,
    },
}

/// Who answered in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentRecord {
    /// The project behind it, `Wrenn` or `E2B`.
    pub family: String,
    /// Its version, escaped and cut.
    pub version: Option<String>,
}

impl From<&crate::envd::dialect::Agent> for AgentRecord {
    fn from(agent: &crate::envd::dialect::Agent) -> Self {
        Self {
            family: agent.family.to_string(),
            version: agent.version.as_ref().map(ToString::to_string),
        }
    }
}

/// What a template was made from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lineage {
    /// The template that its sandbox was launched from.
    #[serde(with = "optional_text")]
    pub template: Option<TemplateId>,
    /// The sandbox that was frozen.
    #[serde(with = "optional_text")]
    pub sandbox: Option<SandboxId>,
    /// In free words, where it came from: the importer's notes.
    pub origin: Option<String>,
}

/// Why a manifest was refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A later version of rewake wrote it.
    #[error("It has format {found}, the newest known here is {known}; use a newer rewake")]
    Newer {
        /// Its format.
        found: u32,
        /// [`Manifest::FORMAT`].
        known: u32,
    },
    /// It is not JSON within bounds, or has other keys than a manifest.
    #[error("It is no manifest")]
    Json(#[source] JsonError),
    /// A value cannot be.
    #[error("{key} is refused: {why}")]
    Value {
        /// Its key.
        key: &'static str,
        /// The rule that it breaks.
        why: &'static str,
    },
}

impl Manifest {
    /// The format that is written.
    pub const FORMAT: u32 = 1;

    /// Bounds of the document.
    pub const LIMITS: JsonLimits = JsonLimits {
        bytes: 64 << 10,
        depth: 6,
    };

    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// [`ManifestError`]; the format is looked at before anything else.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let head: Head =
            json::from_slice_bounded(bytes, Self::LIMITS).map_err(ManifestError::Json)?;
        if head.format > Self::FORMAT {
            return Err(ManifestError::Newer {
                found: head.format,
                known: Self::FORMAT,
            });
        }
        let manifest: Self =
            json::from_slice_bounded(bytes, Self::LIMITS).map_err(ManifestError::Json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The document, for people to read, too.
    ///
    /// # Errors
    /// [`ManifestError`] where it could not be read again.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        if &Self::parse(&bytes)? != self {
            return refused("the whole", "it does not survive being written");
        }
        Ok(bytes)
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.format == 0 {
            return refused("format", "it is none that ever was");
        }
        if self.vcpus == 0 {
            return refused("vcpus", "a guest has at least one");
        }
        if self.memory.bytes == 0 || !self.memory.bytes.is_multiple_of(4096) {
            return refused("memory.bytes", "it is no number of pages");
        }
        if !self.memory.length.is_multiple_of(4096) || i64::try_from(self.memory.length).is_err() {
            return refused("memory.length", "it is no length of a memory file");
        }
        if self.host.cpu.as_ref().is_some_and(|cpu| !cpu.is_bounded()) {
            return refused("host.cpu", "it is too long");
        }
        let texts = [
            ("vmm.build", Some(&self.vmm.build)),
            ("host.kernel", Some(&self.host.kernel)),
            ("agent.family", self.agent.as_ref().map(|it| &it.family)),
            (
                "agent.version",
                self.agent.as_ref().and_then(|it| it.version.as_ref()),
            ),
            ("lineage.origin", self.lineage.origin.as_ref()),
        ];
        for (key, text) in texts {
            // An excerpt of at most 256 bytes is longer where it says that it was cut.
            if text.is_some_and(|text| text.chars().count() > MAX_TEXT + 64) {
                return refused(key, "it is too long");
            }
            if text.is_some_and(|text| text.chars().any(char::is_control)) {
                return refused(key, "it has control characters");
            }
        }
        self.check_disk()?;
        let kernel = self.guest_kernel.as_ref().map(|it| &it.path);
        check_path("guest_kernel.path", kernel)
    }

    fn check_disk(&self) -> Result<(), ManifestError> {
        match &self.disk {
            Some(TemplateDisk::Own { bytes }) => check_sectors("disk.own.bytes", *bytes)?,
            Some(TemplateDisk::Base(base)) => {
                check_sectors("disk.base.bytes", base.bytes)?;
                check_path("disk.base.path", Some(&base.path))?;
            }
            None => {}
        }
        if let DiskPath::Recorded { sandbox_dir } = &self.disk_path {
            if self.disk.is_none() {
                return refused("disk_path", "there is no disk");
            }
            check_path("disk_path.recorded.sandbox_dir", Some(sandbox_dir))?;
        }
        Ok(())
    }
}

/// Words of others, fit for a manifest.
pub(super) fn words(text: &str) -> String {
    excerpt(text)
}

fn refused<T>(key: &'static str, why: &'static str) -> Result<T, ManifestError> {
    Err(ManifestError::Value { key, why })
}

fn check_sectors(key: &'static str, bytes: u64) -> Result<(), ManifestError> {
    if bytes == 0 || !bytes.is_multiple_of(512) || i64::try_from(bytes).is_err() {
        return refused(key, "it is no number of sectors");
    }
    Ok(())
}

fn check_path(key: &'static str, path: Option<&PathBuf>) -> Result<(), ManifestError> {
    let Some(path) = path else { return Ok(()) };
    if !path.is_absolute() || path.as_os_str().len() > MAX_PATH {
        return refused(key, "it is no absolute path");
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return refused(key, "it has a zero byte");
    }
    Ok(())
}

/// Types that print and parse, as JSON strings.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(super) fn serialize<T: Display, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// The same where they may be absent.
mod optional_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(super) fn serialize<T: Display, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.collect_str(value),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        let parsed = text.map(|text| text.parse().map_err(de::Error::custom));
        parsed.transpose()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::{Value, json};

    pub(in crate::template) fn sample() -> Manifest {
        let sha256 = Sha256Hex::of_bytes(b"");
        Manifest {
            format: Manifest::FORMAT,
            name: TemplateId::new("python").unwrap(),
            created: "2026-11-26T12:00:00Z".parse().unwrap(),
            kind: Kind::Built,
            vmm: VmmRecord {
                version: Some(Version::V53),
                build: "v53.0".to_owned(),
            },
            host: HostRecord {
                kernel: "6.12.0".to_owned(),
                cpu: None,
            },
            guest_kernel: None,
            vcpus: 1,
            memory: MemoryRecord {
                bytes: 128 << 20,
                image: MemoryImage::Zone,
                length: 128 << 20,
                layout_sha256: sha256,
                materialised: true,
            },
            config_sha256: sha256,
            state_sha256: sha256,
            disk: Some(TemplateDisk::Own { bytes: 32 << 20 }),
            disk_path: DiskPath::Rewritten,
            agent: Some(AgentRecord {
                family: "Wrenn".to_owned(),
                version: None,
            }),
            lineage: Lineage::default(),
        }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let manifest = sample();
        let bytes = manifest.to_bytes().unwrap();
        assert_eq!(Manifest::parse(&bytes).unwrap(), manifest);
    }

    /// The sample with one key replaced, as text.
    fn with(pointer: &str, value: Value) -> Vec<u8> {
        let mut document = serde_json::to_value(sample()).unwrap();
        *document.pointer_mut(pointer).unwrap() = value;
        serde_json::to_vec(&document).unwrap()
    }

    #[test]
    fn a_newer_format_is_refused_as_such_whatever_else_is_in_it() {
        let newer = br#"{"format": 2, "name": 7, "colour": "green"}"#;
        let refused = Manifest::parse(newer).unwrap_err();
        assert!(
            matches!(refused, ManifestError::Newer { found: 2, known: 1 }),
            "{refused:?}"
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_key() {
        for (pointer, value, said) in [
            ("/format", json!(0), "format"),
            ("/vcpus", json!(0), "vcpus"),
            ("/memory/bytes", json!(4097), "memory.bytes"),
            ("/memory/length", json!(u64::MAX - 4095), "memory.length"),
            ("/disk/own/bytes", json!(511), "disk.own.bytes"),
            ("/vmm/build", json!("x\u{1b}[2J"), "vmm.build"),
            ("/host/kernel", json!("x".repeat(400)), "host.kernel"),
        ] {
            let refused = Manifest::parse(&with(pointer, value)).unwrap_err();
            assert!(
                matches!(refused, ManifestError::Value { key, .. } if key == said),
                "{pointer}: {refused:?}"
            );
        }
        for (pointer, value) in [
            ("/name", json!("../x")),
            ("/created", json!("yesterday")),
            ("/config_sha256", json!("00")),
            ("/kind", json!("stolen")),
            ("/memory/image", json!("swap")),
            ("/vmm/version", json!("fifty")),
            ("/disk", json!({"own": {"bytes": 512, "colour": 1}})),
            ("/lineage", json!({"colour": 1})),
        ] {
            let refused = Manifest::parse(&with(pointer, value)).unwrap_err();
            assert!(
                matches!(refused, ManifestError::Json(_)),
                "{pointer}: {refused:?}"
            );
        }
        let long = vec![b' '; Manifest::LIMITS.bytes + 1];
        assert!(matches!(
            Manifest::parse(&long),
            Err(ManifestError::Json(_))
        ));
    }
}
