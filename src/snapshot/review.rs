//! What in a configuration belongs to the host that wrote it.

use std::fmt;
use std::path::Path;

use crate::vm_config::{
    ConsoleOutputMode, DiskConfig, MemoryConfig, NetConfig, PayloadConfig, PlatformConfig, VmConfig,
};
use crate::wire::excerpt::excerpt;

/// One thing in `config.json` that means something only on one host, or to one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostItem {
    /// Its key: `disks.0.path`.
    pub at: String,
    /// What it is.
    pub kind: HostItemKind,
    /// Its value, escaped and cut.
    pub value: String,
}

impl fmt::Display for HostItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, kind, value } = self;
        write!(f, "{at} = {value} ({kind})")
    }
}

/// The ways in which a configuration refers to its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum HostItemKind {
    /// A disk image or block device, opened for reading and, unless read-only, writing.
    Disk,
    /// A disk image may name more files on the host.
    BackingFiles,
    /// The socket of another process that serves a device.
    DeviceSocket,
    /// A tap interface.
    Tap,
    /// Tap descriptors of the old process.
    TapDescriptors,
    /// The tap's Ethernet address. CH forces it onto the next tap.
    HostMac,
    /// Address, netmask or MTU that CH gives to the tap.
    TapSetting,
    /// The guest's Ethernet address; the one in `state.json` counts.
    GuestMac,
    /// A Unix socket that CH makes.
    ListeningSocket,
    /// A file that CH truncates and writes.
    OutputFile,
    /// The terminal that CH was started on, or a new pseudo-terminal.
    Terminal,
    /// The file that feeds the guest's random numbers.
    RandomSource,
    /// Opened when the guest reboots, not on restore.
    BootImage,
    /// Opened on restore.
    Initramfs,
    /// A file that is copied into the guest at boot.
    GuestFile,
    /// A file that is mapped as guest memory.
    MemoryFile,
    /// A device of the host.
    HostDevice,
    /// A path that a confined CH may use.
    LandlockPath,
    /// Processors or memory nodes of the host.
    Placement,
    /// A serial number or UUID that the guest can read.
    Identity,
    /// A debugging port.
    Debugger,
}

impl fmt::Display for HostItemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Disk => "disk",
            Self::BackingFiles => "backing files",
            Self::DeviceSocket => "socket of another process",
            Self::Tap => "tap interface",
            Self::TapDescriptors => "tap descriptors",
            Self::HostMac => "Ethernet address of the tap",
            Self::TapSetting => "setting of the tap",
            Self::GuestMac => "Ethernet address of the guest",
            Self::ListeningSocket => "listening socket",
            Self::OutputFile => "output file",
            Self::Terminal => "terminal",
            Self::RandomSource => "source of random numbers",
            Self::BootImage => "boot image",
            Self::Initramfs => "initramfs",
            Self::GuestFile => "file for the guest",
            Self::MemoryFile => "memory file",
            Self::HostDevice => "host device",
            Self::LandlockPath => "allowed path",
            Self::Placement => "placement on the host",
            Self::Identity => "identity",
            Self::Debugger => "debugger",
        })
    }
}

/// Lists everything in a configuration that belongs to its host, in the order of the file.
///
/// It lists, it does not judge: see [`rewrite`](super::rewrite::rewrite) for that.
#[must_use]
pub fn review(config: &VmConfig) -> Vec<HostItem> {
    // Taken apart without `..`: whoever adds a field has to say here what it is.
    let VmConfig {
        cpus,
        memory,
        payload,
        rate_limit_groups: _,
        disks,
        net,
        rng,
        balloon: _,
        generic_vhost_user,
        fs,
        pmem,
        serial,
        console,
        debug_console,
        devices,
        user_devices,
        vdpa,
        vsock,
        pvmemcontrol: _,
        pvpanic: _,
        iommu: _,
        numa: _,
        watchdog: _,
        rtc: _,
        gdb,
        pci_segments: _,
        platform,
        tpm,
        landlock_enable: _,
        landlock_rules,
        ivshmem,
    } = config;
    let mut found = Findings(Vec::new());
    for (index, affinity) in cpus.affinity.iter().flatten().enumerate() {
        let at = format!("cpus.affinity.{index}.host_cpus");
        found.text(
            at,
            HostItemKind::Placement,
            &format!("{:?}", affinity.host_cpus),
        );
    }
    found.memory(memory);
    if let Some(payload) = payload {
        found.payload(payload);
    }
    found.each("disks", disks.as_deref(), Findings::disk);
    found.each("net", net.as_deref(), Findings::net);
    found.path(
        "rng.src".to_owned(),
        HostItemKind::RandomSource,
        Some(&rng.src),
    );
    found.each(
        "generic_vhost_user",
        generic_vhost_user.as_deref(),
        |f, at, d| {
            f.path(
                format!("{at}.socket"),
                HostItemKind::DeviceSocket,
                Some(&d.socket),
            );
        },
    );
    found.each("fs", fs.as_deref(), |f, at, d| {
        f.path(
            format!("{at}.socket"),
            HostItemKind::DeviceSocket,
            Some(&d.socket),
        );
    });
    found.each("pmem", pmem.as_deref(), |f, at, d| {
        f.path(
            format!("{at}.file"),
            HostItemKind::MemoryFile,
            Some(&d.file),
        );
    });
    found.console(
        "serial",
        serial.mode,
        serial.file.as_deref(),
        serial.socket.as_deref(),
    );
    found.console(
        "console",
        console.mode,
        console.file.as_deref(),
        console.socket.as_deref(),
    );
    found.console(
        "debug_console",
        debug_console.mode,
        debug_console.file.as_deref(),
        None,
    );
    found.each("devices", devices.as_deref(), |f, at, d| {
        f.path(
            format!("{at}.path"),
            HostItemKind::HostDevice,
            d.path.as_deref(),
        );
        if let Some(fd) = d.fd {
            f.text(
                format!("{at}.fd"),
                HostItemKind::HostDevice,
                &fd.to_string(),
            );
        }
    });
    found.each("user_devices", user_devices.as_deref(), |f, at, d| {
        f.path(
            format!("{at}.socket"),
            HostItemKind::DeviceSocket,
            Some(&d.socket),
        );
    });
    found.each("vdpa", vdpa.as_deref(), |f, at, d| {
        f.path(
            format!("{at}.path"),
            HostItemKind::HostDevice,
            Some(&d.path),
        );
    });
    if let Some(vsock) = vsock {
        let at = "vsock.socket".to_owned();
        found.path(at, HostItemKind::ListeningSocket, Some(&vsock.socket));
    }
    if *gdb == Some(true) {
        found.text("gdb".to_owned(), HostItemKind::Debugger, "true");
    }
    if let Some(platform) = platform {
        found.platform(platform);
    }
    if let Some(tpm) = tpm {
        let at = "tpm.socket".to_owned();
        found.path(at, HostItemKind::DeviceSocket, Some(&tpm.socket));
    }
    found.each(
        "landlock_rules",
        landlock_rules.as_deref(),
        |f, at, rule| {
            f.path(
                format!("{at}.path"),
                HostItemKind::LandlockPath,
                Some(&rule.path),
            );
        },
    );
    if let Some(ivshmem) = ivshmem {
        let at = "ivshmem.path".to_owned();
        found.path(at, HostItemKind::MemoryFile, Some(&ivshmem.path));
    }
    found.0
}

struct Findings(Vec<HostItem>);

impl Findings {
    fn text(&mut self, at: String, kind: HostItemKind, value: &str) {
        let value = excerpt(value);
        self.0.push(HostItem { at, kind, value });
    }

    fn path(&mut self, at: String, kind: HostItemKind, path: Option<&Path>) {
        if let Some(path) = path {
            let value = excerpt(path.as_os_str().as_encoded_bytes());
            self.0.push(HostItem { at, kind, value });
        }
    }

    fn each<T>(&mut self, key: &str, list: Option<&[T]>, look: impl Fn(&mut Self, &str, &T)) {
        for (index, item) in list.unwrap_or_default().iter().enumerate() {
            look(self, &format!("{key}.{index}"), item);
        }
    }

    fn memory(&mut self, memory: &MemoryConfig) {
        self.each("memory.zones", memory.zones.as_deref(), |f, at, zone| {
            f.path(
                format!("{at}.file"),
                HostItemKind::MemoryFile,
                zone.file.as_deref(),
            );
            if let Some(node) = zone.host_numa_node {
                let at = format!("{at}.host_numa_node");
                f.text(at, HostItemKind::Placement, &node.to_string());
            }
        });
    }

    fn payload(&mut self, payload: &PayloadConfig) {
        let PayloadConfig {
            firmware,
            kernel,
            cmdline: _,
            initramfs,
            igvm,
            host_data: _,
            fw_cfg_config,
        } = payload;
        let mut path = |key: &str, kind, path: &Option<std::path::PathBuf>| {
            self.path(format!("payload.{key}"), kind, path.as_deref());
        };
        path("firmware", HostItemKind::BootImage, firmware);
        path("kernel", HostItemKind::BootImage, kernel);
        path("initramfs", HostItemKind::Initramfs, initramfs);
        path("igvm", HostItemKind::BootImage, igvm);
        let items = fw_cfg_config
            .as_ref()
            .and_then(|fw_cfg| fw_cfg.items.as_ref());
        let items = items.map(|items| items.item_list.as_slice());
        self.each(
            "payload.fw_cfg_config.items.item_list",
            items,
            |f, at, item| {
                f.path(
                    format!("{at}.file"),
                    HostItemKind::GuestFile,
                    item.file.as_deref(),
                );
            },
        );
    }

    fn disk(&mut self, at: &str, disk: &DiskConfig) {
        self.path(
            format!("{at}.path"),
            HostItemKind::Disk,
            disk.path.as_deref(),
        );
        if let Some(socket) = &disk.vhost_socket {
            self.text(
                format!("{at}.vhost_socket"),
                HostItemKind::DeviceSocket,
                socket,
            );
        }
        if disk.backing_files == Some(true) {
            self.text(
                format!("{at}.backing_files"),
                HostItemKind::BackingFiles,
                "true",
            );
        }
        for (index, affinity) in disk.queue_affinity.iter().flatten().enumerate() {
            let at = format!("{at}.queue_affinity.{index}.host_cpus");
            self.text(
                at,
                HostItemKind::Placement,
                &format!("{:?}", affinity.host_cpus),
            );
        }
        if let Some(serial) = &disk.serial {
            self.text(format!("{at}.serial"), HostItemKind::Identity, serial);
        }
    }

    fn net(&mut self, at: &str, net: &NetConfig) {
        let settings = [
            ("tap", HostItemKind::Tap, net.tap.clone()),
            (
                "ip",
                HostItemKind::TapSetting,
                net.ip.map(|ip| ip.to_string()),
            ),
            (
                "mask",
                HostItemKind::TapSetting,
                net.mask.map(|mask| mask.to_string()),
            ),
            (
                "mac",
                HostItemKind::GuestMac,
                net.mac.map(|mac| mac.to_string()),
            ),
            (
                "host_mac",
                HostItemKind::HostMac,
                net.host_mac.map(|mac| mac.to_string()),
            ),
            (
                "mtu",
                HostItemKind::TapSetting,
                net.mtu.map(|mtu| mtu.to_string()),
            ),
            (
                "vhost_socket",
                HostItemKind::DeviceSocket,
                net.vhost_socket.clone(),
            ),
            (
                "fds",
                HostItemKind::TapDescriptors,
                net.fds.as_ref().map(|fds| format!("{} of them", fds.len())),
            ),
        ];
        for (key, kind, value) in settings {
            if let Some(value) = value {
                self.text(format!("{at}.{key}"), kind, &value);
            }
        }
    }

    fn console(
        &mut self,
        at: &str,
        mode: ConsoleOutputMode,
        file: Option<&Path>,
        socket: Option<&Path>,
    ) {
        if matches!(mode, ConsoleOutputMode::Tty | ConsoleOutputMode::Pty) {
            let mode = format!("{mode:?}");
            self.text(format!("{at}.mode"), HostItemKind::Terminal, &mode);
        }
        self.path(format!("{at}.file"), HostItemKind::OutputFile, file);
        self.path(
            format!("{at}.socket"),
            HostItemKind::ListeningSocket,
            socket,
        );
    }

    fn platform(&mut self, platform: &PlatformConfig) {
        let identities = [
            ("serial_number", &platform.serial_number),
            ("system_serial_number", &platform.system_serial_number),
            ("uuid", &platform.uuid),
            ("system_uuid", &platform.system_uuid),
            ("chassis_asset_tag", &platform.chassis_asset_tag),
        ];
        for (key, value) in identities {
            if let Some(value) = value {
                self.text(format!("platform.{key}"), HostItemKind::Identity, value);
            }
        }
        if platform.iommufd == Some(true) {
            let at = "platform.iommufd".to_owned();
            self.text(at, HostItemKind::HostDevice, "true");
        }
        if let Some(fd) = platform.iommufd_fd {
            let at = "platform.iommufd_fd".to_owned();
            self.text(at, HostItemKind::HostDevice, &fd.to_string());
        }
    }
}
