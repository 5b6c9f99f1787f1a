//! What a machine is before it has devices: processors, memory, platform, payload.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::is_false;

/// Processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpusConfig {
    /// vCPUs at boot.
    pub boot_vcpus: u32,
    /// vCPUs that can ever be plugged in.
    pub max_vcpus: u32,
    /// How the guest sees them arranged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// Hyper-V enlightenments.
    #[serde(default)]
    pub kvm_hyperv: bool,
    /// Width of guest physical addresses.
    #[serde(default = "default_max_phys_bits")]
    pub max_phys_bits: u8,
    /// Host processors that each vCPU may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// Processor features that are off unless asked for.
    #[serde(default)]
    pub features: CpuFeatures,
    /// Whether the guest may run guests of its own.
    #[serde(default = "default_true")]
    pub nested: bool,
    /// Which vCPUs may share a host core. Since v52.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub core_scheduling: Option<CoreScheduling>,
    /// The processor model shown to the guest. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<CpuProfile>,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            topology: None,
            kvm_hyperv: false,
            max_phys_bits: default_max_phys_bits(),
            affinity: None,
            features: CpuFeatures::default(),
            nested: true,
            core_scheduling: None,
            profile: None,
        }
    }
}

const fn default_max_phys_bits() -> u8 {
    46
}

const fn default_true() -> bool {
    true
}

/// How the guest sees its processors arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTopology {
    /// Threads of one core.
    pub threads_per_core: u16,
    /// Cores of one die.
    pub cores_per_die: u16,
    /// Dies of one package.
    pub dies_per_package: u16,
    /// Packages.
    pub packages: u16,
}

/// Host processors that one vCPU may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuAffinity {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// Indices of host processors.
    pub host_cpus: Vec<usize>,
}

/// Processor features that are off unless asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// Intel's matrix extensions.
    #[serde(default)]
    pub amx: bool,
}

/// Which vCPUs may share a host core (`PR_SCHED_CORE`). CH's default is `Vm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoreScheduling {
    /// All vCPUs of the VM share one cookie.
    Vm,
    /// Every vCPU has a cookie of its own.
    Vcpu,
    /// Nothing is set.
    Off,
}

/// The processor model shown to the guest. CH's default is `Host`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuProfile {
    /// The host's own.
    Host,
}

/// Guest memory. CH demands zones or a size, not both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryConfig {
    /// Bytes; 0 where zones are given.
    pub size: u64,
    /// KSM may merge its pages.
    #[serde(default)]
    pub mergeable: bool,
    /// How more is plugged in.
    #[serde(default)]
    pub hotplug_method: HotplugMethod,
    /// Bytes that may be plugged in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes that are plugged in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// A shared mapping instead of a private one.
    #[serde(default)]
    pub shared: bool,
    /// Pages from hugetlbfs.
    #[serde(default)]
    pub hugepages: bool,
    /// Their size in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// All pages made present at start.
    #[serde(default)]
    pub prefault: bool,
    /// Swap reserved for private memory. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserve: Option<bool>,
    /// Memory in parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zones: Option<Vec<MemoryZoneConfig>>,
    /// Transparent huge pages.
    #[serde(default = "default_true")]
    pub thp: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            mergeable: false,
            hotplug_method: HotplugMethod::Acpi,
            hotplug_size: None,
            hotplugged_size: None,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            reserve: None,
            zones: None,
            thp: true,
        }
    }
}

/// How memory is plugged in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HotplugMethod {
    /// ACPI memory devices.
    #[default]
    Acpi,
    /// A virtio-mem device per zone.
    VirtioMem,
}

/// One part of guest memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryZoneConfig {
    /// Its name; `state.json` refers to it.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// The file or hugetlbfs directory behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A shared mapping instead of a private one.
    #[serde(default)]
    pub shared: bool,
    /// Pages from hugetlbfs.
    #[serde(default)]
    pub hugepages: bool,
    /// Their size in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Host NUMA node it comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_numa_node: Option<u32>,
    /// Bytes that may be plugged in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes that are plugged in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// All pages made present at start.
    #[serde(default)]
    pub prefault: bool,
    /// Swap reserved for private memory. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserve: Option<bool>,
    /// KSM may merge its pages. Since v52.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mergeable: Option<bool>,
}

/// What the guest starts from. CH demands a kernel or a firmware, not both, also of a
/// snapshot's configuration, though a restore opens only the initramfs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PayloadConfig {
    /// A firmware image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// A kernel image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// The kernel's initramfs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// An IGVM image. Builds with feature `igvm`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub igvm: Option<PathBuf>,
    /// Data measured into the launch digest. Builds with feature `sev_snp`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_data: Option<String>,
    /// What the guest finds in the fw_cfg device. Builds with feature `fw_cfg`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fw_cfg_config: Option<FwCfgConfig>,
}

/// What the guest finds in the fw_cfg device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FwCfgConfig {
    /// The memory map.
    pub e820: bool,
    /// The kernel.
    pub kernel: bool,
    /// Its command line.
    pub cmdline: bool,
    /// Its initramfs.
    pub initramfs: bool,
    /// The ACPI tables.
    pub acpi_tables: bool,
    /// Named files and texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub items: Option<FwCfgItemList>,
}

impl Default for FwCfgConfig {
    fn default() -> Self {
        Self {
            e820: true,
            kernel: true,
            cmdline: true,
            initramfs: true,
            acpi_tables: true,
            items: None,
        }
    }
}

/// Named files and texts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgItemList {
    /// The items.
    #[serde(default)]
    pub item_list: Vec<FwCfgItem>,
}

/// A file or a text under a name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgItem {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// The file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub string: Option<String>,
}

/// Buses and identity of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformConfig {
    /// PCI segments.
    #[serde(default = "default_num_pci_segments")]
    pub num_pci_segments: u16,
    /// Segments behind the virtual IOMMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu_segments: Option<Vec<u16>>,
    /// Width of the virtual IOMMU's addresses.
    #[serde(default = "default_iommu_address_width_bits")]
    pub iommu_address_width_bits: u8,
    /// The SMBIOS serial number, in the spelling of v50 to v52. v53 takes it for
    /// `system_serial_number`; give one of the two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    /// The SMBIOS serial number, in the spelling of v53. Older ones ignore it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_serial_number: Option<String>,
    /// The SMBIOS UUID, in the spelling of v50 to v52. v53 takes it for `system_uuid`; give
    /// one of the two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// The SMBIOS UUID, in the spelling of v53. Older ones ignore it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_uuid: Option<String>,
    /// SMBIOS OEM strings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oem_strings: Option<Vec<String>>,
    /// SMBIOS manufacturer. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_manufacturer: Option<String>,
    /// SMBIOS product name. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_product_name: Option<String>,
    /// SMBIOS version. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_version: Option<String>,
    /// SMBIOS family. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_family: Option<String>,
    /// SMBIOS SKU number. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_sku_number: Option<String>,
    /// SMBIOS asset tag. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chassis_asset_tag: Option<String>,
    /// Intel TDX. Builds with feature `tdx`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tdx: bool,
    /// AMD SEV-SNP. Builds with feature `sev_snp`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub sev_snp: bool,
    /// VFIO through iommufd. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommufd: Option<bool>,
    /// The iommufd descriptor; in a file it is of no use. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommufd_fd: Option<i32>,
    /// DMA between VFIO devices. Since v53.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vfio_p2p_dma: Option<bool>,
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self {
            num_pci_segments: default_num_pci_segments(),
            iommu_segments: None,
            iommu_address_width_bits: default_iommu_address_width_bits(),
            serial_number: None,
            system_serial_number: None,
            uuid: None,
            system_uuid: None,
            oem_strings: None,
            system_manufacturer: None,
            system_product_name: None,
            system_version: None,
            system_family: None,
            system_sku_number: None,
            chassis_asset_tag: None,
            tdx: false,
            sev_snp: false,
            iommufd: None,
            iommufd_fd: None,
            vfio_p2p_dma: None,
        }
    }
}

const fn default_num_pci_segments() -> u16 {
    1
}

const fn default_iommu_address_width_bits() -> u8 {
    64
}

/// A guest NUMA node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaConfig {
    /// Its number.
    pub guest_numa_id: u32,
    /// Its vCPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Vec<u32>>,
    /// How far the other nodes are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distances: Option<Vec<NumaDistance>>,
    /// Its memory zones by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_zones: Option<Vec<String>>,
    /// Its PCI segments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<u16>>,
    /// The device whose memory it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
}

/// How far another NUMA node is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaDistance {
    /// The other node.
    #[serde(default)]
    pub destination: u32,
    /// The distance, 10 to itself.
    #[serde(default)]
    pub distance: u8,
}

/// A PCI segment's share of the address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciSegmentConfig {
    /// The segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// Its share below 4 GiB.
    #[serde(default = "default_aperture_weight")]
    pub mmio32_aperture_weight: u32,
    /// Its share above.
    #[serde(default = "default_aperture_weight")]
    pub mmio64_aperture_weight: u32,
}

const fn default_aperture_weight() -> u32 {
    1
}

/// A path that a VMM confined by Landlock may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LandlockConfig {
    /// The path; it must exist.
    pub path: PathBuf,
    /// `r`, `w` or `rw`.
    pub access: String,
}
