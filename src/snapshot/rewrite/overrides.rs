//! What a caller may ask of a rewritten configuration.

use std::path::PathBuf;

use crate::ids::IfName;
use crate::snapshot::layout::MemoryLayout;
use crate::vm_config::{CoreScheduling, ImageType};

/// What to do with a recorded reference to the host that nothing replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recorded {
    /// Refuse the snapshot.
    #[default]
    Refuse,
    /// Keep it as recorded. Only for a snapshot that one trusts like one's own command line.
    Keep,
}

/// Which recorded references to the host may be used. The default: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostPathPolicy {
    /// `disks[].path`, opened for reading and writing.
    pub disks: Recorded,
    /// `net[].tap`, with its address, netmask and MTU.
    pub taps: Recorded,
    /// `vsock.socket`.
    pub vsock_socket: Recorded,
    /// `memory.zones[].file`, mapped as guest memory, writable where shared.
    pub memory_files: Recorded,
    /// Host processors and memory nodes: `cpus.affinity`, `disks[].queue_affinity`,
    /// `memory.zones[].host_numa_node`. They are hints: refused ones are left out.
    pub placement: Recorded,
}

impl HostPathPolicy {
    /// Keeps everything that can be kept: for a snapshot of one's own, restored as recorded.
    pub const AS_RECORDED: Self = Self {
        disks: Recorded::Keep,
        taps: Recorded::Keep,
        vsock_socket: Recorded::Keep,
        memory_files: Recorded::Keep,
        placement: Recorded::Keep,
    };
}

/// What a restored VM uses instead of what was recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigOverrides {
    /// What may stay as recorded.
    pub policy: HostPathPolicy,
    /// Disks.
    pub disks: Vec<DiskOverride>,
    /// Network devices.
    pub taps: Vec<TapOverride>,
    /// The host's end of the vsock device. It must not exist when CH starts.
    pub vsock_socket: Option<PathBuf>,
    /// The serial port.
    pub serial: ConsoleOverride,
    /// The virtio console.
    pub console: ConsoleOverride,
    /// The debug port.
    pub debug_console: ConsoleOverride,
    /// Which vCPUs may share a host core. `Off` is fastest: the first cookie on a machine
    /// flips a kernel-wide switch.
    pub core_scheduling: CoreScheduling,
    /// One of [`RANDOM_SOURCES`]. `None` keeps the recorded one, if it is one of them.
    pub rng_source: Option<PathBuf>,
    /// The kernel or firmware that a reboot of the guest starts. `None` keeps the recorded
    /// path, which a restore does not open.
    pub boot_image: Option<PathBuf>,
    /// Where guest memory comes from.
    pub memory: MemoryBacking,
}

impl Default for ConfigOverrides {
    fn default() -> Self {
        Self {
            policy: HostPathPolicy::default(),
            disks: Vec::new(),
            taps: Vec::new(),
            vsock_socket: None,
            serial: ConsoleOverride::default(),
            console: ConsoleOverride::default(),
            debug_console: ConsoleOverride::default(),
            core_scheduling: CoreScheduling::Off,
            rng_source: None,
            boot_image: None,
            memory: MemoryBacking::default(),
        }
    }
}

/// A disk for a restored VM. Capacity and features come from `state.json`; CH does not notice
/// a disk of another size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOverride {
    /// The recorded disk's id. `None`: the one disk that there is.
    pub disk: Option<String>,
    /// Image or block device, absolute.
    pub path: PathBuf,
    /// Its format. `None` keeps the recorded one, and says `Raw` where that is unknown: CH
    /// refuses writes to sector 0 of a raw image that it had to guess. That the image is raw
    /// is for the caller to know.
    pub image_type: Option<ImageType>,
}

/// A tap for a restored VM. It replaces name, descriptors, address, netmask and MTU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapOverride {
    /// The recorded network device's id. `None`: the one network device that there is.
    pub device: Option<String>,
    /// The tap.
    pub tap: TapSource,
}

/// How CH gets at a tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapSource {
    /// By name, in its own network namespace.
    Name(IfName),
    /// By descriptors passed with `vm.restore`, one per queue pair.
    Descriptors,
}

/// Where a console goes. A restore can neither add nor remove the device itself: what was
/// `Off` stays so.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ConsoleOverride {
    /// Its output is dropped.
    #[default]
    Quiet,
    /// As recorded, with the recorded file or socket.
    Recorded,
    /// To this file, which CH truncates. Absolute.
    File(PathBuf),
}

/// Where guest memory comes from on restore.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum MemoryBacking {
    /// Zones and their files as recorded, files only as far as the policy allows.
    #[default]
    Recorded,
    /// No file: what was saved in `memory-ranges` is copied, or fetched on demand. Fit for a
    /// snapshot that saved all its memory.
    Anonymous,
    /// One zone in a file. `state.json` must be rewritten for the same layout.
    File {
        /// The file, absolute.
        path: PathBuf,
        /// Writes go to the file. Never for a file that another VM or snapshot uses.
        shared: bool,
        /// Where memory is in the file.
        layout: MemoryLayout,
    },
}

/// The files that may feed a guest's random numbers. All are character devices of the kernel.
pub const RANDOM_SOURCES: [&str; 3] = ["/dev/urandom", "/dev/random", "/dev/hwrng"];
