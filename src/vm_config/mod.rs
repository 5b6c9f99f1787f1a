//! Cloud Hypervisor's configuration objects, in its own spelling.
//!
//! The types are those of `VmConfig` and its parts in CH v50 to v53
//! (`vmm/src/vm_config.rs`). They are what `vm.create` takes, what `vm.info` answers, and
//! what `config.json` in a snapshot holds.
//!
//! * A field that all these versions have carries CH's default, so that an absent key reads
//!   as CH would read it.
//! * A field that came later, or that depends on CH's build, is an `Option`: `None` is
//!   "CH's default" and leaves the key out, so that a file is written back as it was read
//!   whatever version wrote it.
//! * `null` and an absent key are the same for an `Option` (v50 to v52 write `null`, v53
//!   leaves the key out). Written back it is absent, which every version reads.
//! * Unknown keys are skipped by `serde`; [`VmConfig::parse`] names them.

mod device;
mod mac;
mod machine;

use serde::{Deserialize, Serialize};

pub use device::{
    BalloonConfig, ConsoleConfig, ConsoleOutputMode, DebugConsoleConfig, DeviceConfig, DiskConfig,
    FsConfig, GenericVhostUserConfig, ImageType, IvshmemConfig, LockGranularity, NetConfig,
    PmemConfig, PvmemcontrolConfig, RateLimiterConfig, RateLimiterGroupConfig, RngConfig,
    RtcConfig, SerialConfig, TokenBucketConfig, TpmConfig, UserDeviceConfig, VdpaConfig, VhostMode,
    VirtQueueAffinity, VsockConfig,
};
pub use mac::{MacAddr, MacAddrError};
pub use machine::{
    CoreScheduling, CpuAffinity, CpuFeatures, CpuProfile, CpuTopology, CpusConfig, FwCfgConfig,
    FwCfgItem, FwCfgItemList, HotplugMethod, LandlockConfig, MemoryConfig, MemoryZoneConfig,
    NumaConfig, NumaDistance, PayloadConfig, PciSegmentConfig, PlatformConfig,
};

use crate::wire::json::{self, JsonError, JsonLimits, UnknownKeys};

/// A whole virtual machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Processors.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Memory.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What it starts from. CH refuses a configuration without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// Rate limits that disks share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit_groups: Option<Vec<RateLimiterGroupConfig>>,
    /// Block devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// Network devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// Source of random numbers.
    #[serde(default)]
    pub rng: RngConfig,
    /// Balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// vhost-user devices of any type. Since v52.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Vec<GenericVhostUserConfig>>,
    /// virtio-fs devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<Vec<FsConfig>>,
    /// Persistent memory devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pmem: Option<Vec<PmemConfig>>,
    /// Serial port.
    #[serde(default)]
    pub serial: SerialConfig,
    /// virtio console. CH's default is its own standard output.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// Debug port (x86-64).
    #[serde(default)]
    pub debug_console: DebugConsoleConfig,
    /// VFIO devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<DeviceConfig>>,
    /// vfio-user devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_devices: Option<Vec<UserDeviceConfig>>,
    /// vDPA devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vdpa: Option<Vec<VdpaConfig>>,
    /// vsock device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Memory attribute device. Builds with feature `pvmemcontrol`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pvmemcontrol: Option<PvmemcontrolConfig>,
    /// A device by which the guest reports a panic.
    #[serde(default)]
    pub pvpanic: bool,
    /// The virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// NUMA nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa: Option<Vec<NumaConfig>>,
    /// The watchdog.
    #[serde(default)]
    pub watchdog: bool,
    /// virtio real-time clock. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rtc: Option<RtcConfig>,
    /// The GDB stub. Builds with feature `guest_debug`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gdb: Option<bool>,
    /// Shares of the address space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<PciSegmentConfig>>,
    /// Buses and identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// Software TPM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<TpmConfig>,
    /// Confine the VMM to the paths of this configuration.
    #[serde(default)]
    pub landlock_enable: bool,
    /// More paths it may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub landlock_rules: Option<Vec<LandlockConfig>>,
    /// Memory shared between VMs. Builds with feature `ivshmem`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ivshmem: Option<IvshmemConfig>,
}

impl VmConfig {
    /// Bounds of a `config.json`. The deepest that CH writes has depth 6.
    pub const LIMITS: JsonLimits = JsonLimits {
        bytes: 1 << 20,
        depth: 8,
    };

    /// Reads a `config.json` and names the keys in it that no known version of CH has.
    ///
    /// # Errors
    /// [`JsonError`] where it is too large, too deep, no JSON, or of another shape.
    pub fn parse(bytes: &[u8]) -> Result<(Self, UnknownKeys), JsonError> {
        json::from_slice_noting_unknown(bytes, Self::LIMITS)
    }
}

/// For `skip_serializing_if`.
#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
const fn is_false(value: &bool) -> bool {
    !*value
}

#[cfg(test)]
mod tests;
