//! What requests carry and answers bring, in Cloud Hypervisor's spelling.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::version::{Version, VersionError};
use crate::vm_config::VmConfig;

/// The answer of `vmm.ping`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// The version with the suffixes of its build: `v53.0-dirty`.
    pub build_version: String,
    /// The version: `53.0.0`.
    pub version: String,
    /// The process, in CH's own pid namespace.
    #[serde(default)]
    pub pid: i64,
    /// What it was built with: `kvm`, `io_uring`, ….
    #[serde(default)]
    pub features: Vec<String>,
}

impl Ping {
    /// The version as numbers.
    ///
    /// # Errors
    /// [`VersionError`] where it has another form.
    pub fn parsed_version(&self) -> Result<Version, VersionError> {
        self.version.parse()
    }
}

/// The answer of `vm.info`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its configuration, with what was added and resized since.
    pub config: VmConfig,
    /// What it is doing.
    pub state: VmState,
    /// Bytes of memory the guest has: all there is, less what its balloon holds.
    #[serde(default)]
    pub memory_actual_size: u64,
    /// Its devices by name, once it has been booted or restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<BTreeMap<String, DeviceNode>>,
}

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum VmState {
    /// Configured. Also a VM after `vm.shutdown`: only its configuration is left.
    Created,
    /// Its vCPUs run.
    Running,
    /// Shut down.
    Shutdown,
    /// Its vCPUs are parked.
    Paused,
    /// Stopped by the debugger.
    BreakPoint,
    /// A word that rewake does not know.
    #[serde(other)]
    Unknown,
}

/// A device in [`VmInfo::device_tree`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Its name.
    pub id: String,
    /// Address ranges, interrupts and the like, as CH spells them.
    #[serde(default)]
    pub resources: Vec<serde_json::Value>,
    /// The device it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The devices that belong to it.
    #[serde(default)]
    pub children: Vec<String>,
    /// Its PCI address: `0000:00:01.0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_bdf: Option<String>,
}

/// The answer of `vm.counters`: per device, per counter. A latency that was never measured is
/// `u64::MAX`, and averages of those mean nothing.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// A device that was added to a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDeviceInfo {
    /// Its name.
    pub id: String,
    /// Its PCI address: `0000:00:05.0`.
    pub bdf: String,
}

/// The body of `vm.resize`: what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resize {
    /// vCPUs, up to `max_vcpus`. Fewer take effect when the guest lets go of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_vcpus: Option<u32>,
    /// Bytes of memory. Refused where memory is given in zones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// Bytes the guest is to give up. CH does not check the range, and a snapshot of a VM with
    /// a balloon as large as its memory cannot be restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

/// The body of `vm.resize-zone`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResizeZone {
    /// A zone with virtio-mem.
    pub id: String,
    /// Bytes.
    pub desired_ram: u64,
}

/// The body of `vm.resize-disk`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResizeDisk {
    /// The disk.
    pub id: String,
    /// Bytes.
    pub desired_size: u64,
}

/// The body of `vm.remove-device`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveDevice {
    /// The device.
    pub id: String,
}

/// The body of `vm.snapshot` and `vm.coredump`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destination {
    /// `file://` and a path.
    pub destination_url: String,
}

/// The body of `vm.restore`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreConfig {
    /// `file://` and the snapshot's directory; see [`file_url`](super::file_url).
    pub source_url: String,
    /// Makes all memory present first. Excludes [`MemoryRestoreMode::OnDemand`].
    #[serde(default, skip_serializing_if = "is_default")]
    pub prefault: bool,
    /// How memory comes back.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory_restore_mode: MemoryRestoreMode,
    /// Network devices whose taps travel as descriptors, in the order of the descriptors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNet>>,
    /// Lets the vCPUs run at once.
    #[serde(default, skip_serializing_if = "is_default")]
    pub resume: bool,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// How memory comes back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MemoryRestoreMode {
    /// CH reads all of it before it answers.
    #[default]
    Copy,
    /// CH's userfaultfd handler brings it page by page. Fails without access to userfaultfd.
    OnDemand,
    /// A private mapping of the memory file. After v53; where it cannot, CH copies and only
    /// logs that it does.
    CopyOnWrite,
}

/// One network device in [`RestoreConfig::net_fds`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredNet {
    /// The device.
    pub id: String,
    /// How many of the descriptors are its own: one per queue pair.
    pub num_fds: usize,
}

/// The body of `vm.send-migration`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendMigration {
    /// `tcp:HOST:PORT` or `unix:PATH`.
    pub destination_url: String,
    /// Hands memory over as descriptors (on the same host).
    #[serde(default)]
    pub local: bool,
    /// How long the guest may stand still, in milliseconds. CH's default is 300; not 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// How long all of it may take, in seconds. CH's default is 3600; not 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
    /// What happens then. CH's default is to cancel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_strategy: Option<TimeoutStrategy>,
    /// TCP connections, 1 to 128. CH's default is 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
    /// Certificates for TLS. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// In which order memory and guest move. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mode: Option<MigrationMode>,
}

impl SendMigration {
    /// A migration to `destination_url` with CH's defaults.
    #[must_use]
    pub fn to(destination_url: impl Into<String>) -> Self {
        Self {
            destination_url: destination_url.into(),
            local: false,
            downtime_ms: None,
            timeout_s: None,
            timeout_strategy: None,
            connections: None,
            tls_dir: None,
            memory_mode: None,
        }
    }
}

/// The body of `vm.receive-migration`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveMigration {
    /// `tcp:HOST:PORT` or `unix:PATH` to listen on.
    pub receiver_url: String,
    /// Certificates for TLS. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// In which order memory and guest move. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mode: Option<MigrationMode>,
}

/// What happens to a migration whose time is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimeoutStrategy {
    /// It is given up.
    Cancel,
    /// It is completed, whatever the downtime.
    Ignore,
}

/// In which order memory and guest move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationMode {
    /// Memory first.
    Precopy,
    /// The guest first.
    Postcopy,
}
