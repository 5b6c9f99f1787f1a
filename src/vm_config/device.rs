//! Devices.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{MacAddr, is_false};

/// Declares a PCI device's configuration: what all of them have, then its own.
///
/// CH composes these with `#[serde(flatten)]`. Written out, unknown keys can be told, and
/// nothing is buffered on the way.
macro_rules! pci_device {
    (
        $(#[$meta:meta])*
        $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        pub struct $name {
            /// The device's name, unique in the VM. CH makes one up at first boot.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub id: Option<String>,
            /// Placed behind the virtual IOMMU.
            #[serde(default, skip_serializing_if = "is_false")]
            pub iommu: bool,
            /// PCI segment.
            #[serde(default)]
            pub pci_segment: u16,
            /// PCI device number. Since v52.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub pci_device_id: Option<u8>,
            $($(#[$field_meta])* pub $field: $type,)*
        }
    };
}

const fn default_true() -> bool {
    true
}

/// A serial port or the like: where it goes. CH's `mode` has no default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialConfig {
    /// The file, in mode `File`. CH truncates it, also on a restore.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Where it goes.
    pub mode: ConsoleOutputMode,
    /// The socket, in mode `Socket`. It must not exist.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

impl SerialConfig {
    /// A port that leads nowhere.
    pub const OFF: Self = Self {
        file: None,
        mode: ConsoleOutputMode::Off,
        socket: None,
    };
}

impl Default for SerialConfig {
    fn default() -> Self {
        Self {
            mode: ConsoleOutputMode::Null,
            ..Self::OFF
        }
    }
}

/// Where a console goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleOutputMode {
    /// There is no such device.
    Off,
    /// To a new pseudo-terminal.
    Pty,
    /// To CH's own standard input and output.
    Tty,
    /// To a file.
    File,
    /// To a listening Unix socket (serial port only).
    Socket,
    /// There is one, but its output is dropped.
    Null,
}

pci_device! {
    /// The virtio console.
    ConsoleConfig {
        /// The file, in mode `File`. CH truncates it, also on a restore.
        #[serde(skip_serializing_if = "Option::is_none")]
        file: Option<PathBuf>,
        /// Where it goes.
        mode: ConsoleOutputMode,
        /// Of no use here; the shape is that of the serial port.
        #[serde(skip_serializing_if = "Option::is_none")]
        socket: Option<PathBuf>,
    }
}

impl ConsoleConfig {
    /// No console.
    pub const OFF: Self = Self {
        id: None,
        iommu: false,
        pci_segment: 0,
        pci_device_id: None,
        file: None,
        mode: ConsoleOutputMode::Off,
        socket: None,
    };
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self {
            mode: ConsoleOutputMode::Tty,
            ..Self::OFF
        }
    }
}

/// The x86 debug port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugConsoleConfig {
    /// The file, in mode `File`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Where it goes.
    pub mode: ConsoleOutputMode,
    /// The port number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iobase: Option<u16>,
}

impl Default for DebugConsoleConfig {
    fn default() -> Self {
        Self {
            file: None,
            mode: ConsoleOutputMode::Off,
            iobase: Some(0xe9),
        }
    }
}

pci_device! {
    /// A block device.
    DiskConfig {
        /// The image or block device.
        #[serde(skip_serializing_if = "Option::is_none")]
        path: Option<PathBuf>,
        /// The guest cannot write.
        #[serde(default)]
        readonly: bool,
        /// `O_DIRECT`.
        #[serde(default)]
        direct: bool,
        /// Queues.
        #[serde(default = "default_disk_num_queues")]
        num_queues: usize,
        /// Entries of each queue.
        #[serde(default = "default_disk_queue_size")]
        queue_size: u16,
        /// Served by another process.
        #[serde(default)]
        vhost_user: bool,
        /// That process's socket.
        #[serde(skip_serializing_if = "Option::is_none")]
        vhost_socket: Option<String>,
        /// The rate limit it shares with others.
        #[serde(skip_serializing_if = "Option::is_none")]
        rate_limit_group: Option<String>,
        /// Its own rate limit.
        #[serde(skip_serializing_if = "Option::is_none")]
        rate_limiter_config: Option<RateLimiterConfig>,
        /// For CH's tests.
        #[serde(default)]
        disable_io_uring: bool,
        /// For CH's tests.
        #[serde(default)]
        disable_aio: bool,
        /// The serial number shown to the guest. Otherwise it follows from the file's inode.
        #[serde(skip_serializing_if = "Option::is_none")]
        serial: Option<String>,
        /// Host processors for the queues.
        #[serde(skip_serializing_if = "Option::is_none")]
        queue_affinity: Option<Vec<VirtQueueAffinity>>,
        /// A qcow2 image may name a backing file. Since v51.
        #[serde(skip_serializing_if = "Option::is_none")]
        backing_files: Option<bool>,
        /// Discarded blocks become holes. Since v51.
        #[serde(skip_serializing_if = "Option::is_none")]
        sparse: Option<bool>,
        /// The image's format. Where a raw one is guessed, CH refuses writes to sector 0.
        /// Since v51 (and 50.1).
        #[serde(skip_serializing_if = "Option::is_none")]
        image_type: Option<ImageType>,
        /// How much of the image is locked. Since v52.
        #[serde(skip_serializing_if = "Option::is_none")]
        lock_granularity: Option<LockGranularity>,
    }
}

impl DiskConfig {
    /// A raw image or block device at `path`, everything else as CH has it by default.
    #[must_use]
    pub fn raw(path: impl Into<PathBuf>) -> Self {
        Self {
            path: Some(path.into()),
            image_type: Some(ImageType::Raw),
            ..Self::default()
        }
    }
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
            path: None,
            readonly: false,
            direct: false,
            num_queues: default_disk_num_queues(),
            queue_size: default_disk_queue_size(),
            vhost_user: false,
            vhost_socket: None,
            rate_limit_group: None,
            rate_limiter_config: None,
            disable_io_uring: false,
            disable_aio: false,
            serial: None,
            queue_affinity: None,
            backing_files: None,
            sparse: None,
            image_type: None,
            lock_granularity: None,
        }
    }
}

const fn default_disk_num_queues() -> usize {
    1
}

const fn default_disk_queue_size() -> u16 {
    128
}

/// A disk image's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageType {
    /// VHD of fixed size.
    FixedVhd,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// Plain bytes.
    Raw,
    /// VHDX.
    Vhdx,
    /// To be guessed.
    Unknown,
}

/// How much of a disk image is locked. CH's default is `ByteRange`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockGranularity {
    /// The bytes it has.
    ByteRange,
    /// The whole file, whatever its length.
    Full,
}

/// Host processors for one queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtQueueAffinity {
    /// The queue.
    pub queue_index: u16,
    /// Indices of host processors.
    pub host_cpus: Vec<usize>,
}

/// A limit on bytes and operations per time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

/// A token bucket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucketConfig {
    /// Tokens it holds.
    pub size: u64,
    /// Extra tokens at the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which it fills.
    pub refill_time: u64,
}

/// A rate limit shared by several disks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterGroupConfig {
    /// Its name.
    #[serde(default)]
    pub id: String,
    /// The limit.
    #[serde(default)]
    pub rate_limiter_config: RateLimiterConfig,
}

pci_device! {
    /// A network device.
    NetConfig {
        /// The tap interface.
        #[serde(skip_serializing_if = "Option::is_none")]
        tap: Option<String>,
        /// An address for a tap that CH makes.
        #[serde(skip_serializing_if = "Option::is_none")]
        ip: Option<IpAddr>,
        /// Its netmask.
        #[serde(skip_serializing_if = "Option::is_none")]
        mask: Option<IpAddr>,
        /// The guest's Ethernet address; CH takes a random one where it is absent. A restored
        /// guest keeps the one in `state.json`.
        #[serde(skip_serializing_if = "Option::is_none")]
        mac: Option<MacAddr>,
        /// The tap's Ethernet address. CH notes what it finds and forces it onto the tap of
        /// the next restore.
        #[serde(skip_serializing_if = "Option::is_none")]
        host_mac: Option<MacAddr>,
        /// The tap's MTU.
        #[serde(skip_serializing_if = "Option::is_none")]
        mtu: Option<u16>,
        /// Queues: two to a pair.
        #[serde(default = "default_net_num_queues")]
        num_queues: usize,
        /// Entries of each queue.
        #[serde(default = "default_net_queue_size")]
        queue_size: u16,
        /// Served by another process.
        #[serde(default)]
        vhost_user: bool,
        /// That process's socket.
        #[serde(skip_serializing_if = "Option::is_none")]
        vhost_socket: Option<String>,
        /// Who listens on it.
        #[serde(default)]
        vhost_mode: VhostMode,
        /// Tap descriptors. The numbers mean nothing (CH reads each as -1), their count does:
        /// the descriptors themselves travel by `SCM_RIGHTS`.
        #[serde(skip_serializing_if = "Option::is_none")]
        fds: Option<Vec<i32>>,
        /// Its rate limit.
        #[serde(skip_serializing_if = "Option::is_none")]
        rate_limiter_config: Option<RateLimiterConfig>,
        /// TCP segmentation offload.
        #[serde(default = "default_true")]
        offload_tso: bool,
        /// UDP fragmentation offload.
        #[serde(default = "default_true")]
        offload_ufo: bool,
        /// Checksum offload.
        #[serde(default = "default_true")]
        offload_csum: bool,
    }
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
            tap: None,
            ip: None,
            mask: None,
            mac: None,
            host_mac: None,
            mtu: None,
            num_queues: default_net_num_queues(),
            queue_size: default_net_queue_size(),
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::Client,
            fds: None,
            rate_limiter_config: None,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
        }
    }
}

const fn default_net_num_queues() -> usize {
    2
}

const fn default_net_queue_size() -> u16 {
    256
}

/// Who listens on a vhost-user socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VhostMode {
    /// The other process.
    #[default]
    Client,
    /// CH.
    Server,
}

pci_device! {
    /// The source of random numbers. There always is one.
    RngConfig {
        /// The file it reads.
        src: PathBuf,
    }
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
            src: PathBuf::from("/dev/urandom"),
        }
    }
}

pci_device! {
    /// The virtio real-time clock. Since v53.
    #[derive(Default)]
    RtcConfig {}
}

pci_device! {
    /// The balloon: memory that the guest gives back.
    #[derive(Default)]
    BalloonConfig {
        /// Bytes the guest is asked to give up.
        size: u64,
        /// The guest may take them back when it runs out.
        #[serde(default)]
        deflate_on_oom: bool,
        /// The guest reports pages that it freed.
        #[serde(default)]
        free_page_reporting: bool,
    }
}

pci_device! {
    /// A vhost-user device of any type. Since v52.
    #[derive(Default)]
    GenericVhostUserConfig {
        /// The other process's socket.
        socket: PathBuf,
        /// Entries of each queue.
        queue_sizes: Vec<u16>,
        /// The virtio device type.
        device_type: u32,
    }
}

pci_device! {
    /// A virtio-fs device.
    FsConfig {
        /// The name under which the guest mounts it.
        tag: String,
        /// virtiofsd's socket.
        socket: PathBuf,
        /// Queues.
        #[serde(default = "default_fs_num_queues")]
        num_queues: usize,
        /// Entries of each queue.
        #[serde(default = "default_fs_queue_size")]
        queue_size: u16,
    }
}

impl Default for FsConfig {
    fn default() -> Self {
        Self {
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
            tag: String::new(),
            socket: PathBuf::new(),
            num_queues: default_fs_num_queues(),
            queue_size: default_fs_queue_size(),
        }
    }
}

const fn default_fs_num_queues() -> usize {
    1
}

const fn default_fs_queue_size() -> u16 {
    1024
}

pci_device! {
    /// A persistent memory device.
    #[derive(Default)]
    PmemConfig {
        /// The file behind it.
        file: PathBuf,
        /// Bytes, where the file does not say.
        #[serde(skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
        /// A private mapping: writes are lost.
        #[serde(default)]
        discard_writes: bool,
    }
}

pci_device! {
    /// A host device through VFIO.
    #[derive(Default)]
    DeviceConfig {
        /// The device in sysfs.
        #[serde(skip_serializing_if = "Option::is_none")]
        path: Option<PathBuf>,
        /// An opened device. The number means nothing; the descriptor travels by
        /// `SCM_RIGHTS`. Since v53.
        #[serde(skip_serializing_if = "Option::is_none")]
        fd: Option<i32>,
        /// NVIDIA's GPUDirect clique.
        #[serde(skip_serializing_if = "Option::is_none")]
        x_nv_gpudirect_clique: Option<u8>,
        /// BARs that are not mapped. Since v53.
        #[serde(skip_serializing_if = "Option::is_none")]
        x_exclude_mmap_bars: Option<Vec<u64>>,
    }
}

pci_device! {
    /// A device served by another process through vfio-user.
    #[derive(Default)]
    UserDeviceConfig {
        /// That process's socket.
        socket: PathBuf,
    }
}

pci_device! {
    /// A vDPA device.
    VdpaConfig {
        /// The device node.
        path: PathBuf,
        /// Queues.
        #[serde(default = "default_vdpa_num_queues")]
        num_queues: usize,
    }
}

impl Default for VdpaConfig {
    fn default() -> Self {
        Self {
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
            path: PathBuf::new(),
            num_queues: default_vdpa_num_queues(),
        }
    }
}

const fn default_vdpa_num_queues() -> usize {
    1
}

pci_device! {
    /// The vsock device.
    #[derive(Default)]
    VsockConfig {
        /// The guest's context id: not 0, 1, 2 or `u32::MAX`.
        cid: u32,
        /// The Unix socket on the host. It must not exist.
        socket: PathBuf,
    }
}

pci_device! {
    /// Memory shared between VMs. Builds with feature `ivshmem`.
    #[derive(Default)]
    IvshmemConfig {
        /// The file behind it.
        path: PathBuf,
        /// Bytes.
        size: usize,
    }
}

/// A software TPM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TpmConfig {
    /// swtpm's socket.
    pub socket: PathBuf,
}

/// The guest-controlled memory attribute device. Builds with feature `pvmemcontrol`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PvmemcontrolConfig {}
