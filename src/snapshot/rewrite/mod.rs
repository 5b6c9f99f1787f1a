//! A configuration for a new life: rebuilt from what is known and allowed.
//!
//! CH acts on `config.json` before any guest code runs: it opens disks, truncates console
//! files, binds sockets, maps memory files. So nothing that names the host is copied unless
//! somebody vouches for it: the caller with a value of its own, or with a
//! [`HostPathPolicy`] that keeps the recorded one. What is left is refused by name.

mod device;
mod machine;
mod overrides;

use std::fmt;
use std::path::{Path, PathBuf};

use crate::vm_config::{LandlockConfig, VmConfig};
use crate::wire::excerpt::excerpt;

pub use overrides::{
    ConfigOverrides, ConsoleOverride, DiskOverride, HostPathPolicy, MemoryBacking, RANDOM_SOURCES,
    Recorded, TapOverride, TapSource,
};

/// A configuration was refused, for each of these reasons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigRefusal {
    /// At least one.
    pub items: Vec<RefusedItem>,
}

impl fmt::Display for ConfigRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("The configuration is refused")?;
        for (index, item) in self.items.iter().enumerate() {
            write!(f, "{}{item}", if index == 0 { ": " } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigRefusal {}

/// One thing in a configuration that cannot stay and that nothing replaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedItem {
    /// Its key in `config.json`: `disks.0.path`. Of an override: `overrides.disks.0`.
    pub at: String,
    /// What is wrong.
    pub reason: RefusalReason,
}

impl fmt::Display for RefusedItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.reason)
    }
}

/// Why something in a configuration is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusalReason {
    /// It names something of the host, nothing replaces it, and the policy does not keep it.
    #[error("{value} is of the host that wrote it, and nothing replaces it")]
    OfTheHost {
        /// The recorded value, escaped and cut.
        value: String,
    },
    /// A kind of device, or an ability, that cannot be restored from a directory.
    #[error("{what} cannot be restored")]
    Unsupported {
        /// What it is.
        what: &'static str,
    },
    /// A path depends on somebody's working directory.
    #[error("{value} is not an absolute path")]
    NotAbsolute {
        /// The path, escaped and cut.
        value: String,
    },
    /// A path is not UTF-8, or has a NUL byte.
    #[error("{value} cannot be written as JSON or opened")]
    NotWritable {
        /// The path, escaped and cut.
        value: String,
    },
    /// A socket path does not fit into `sockaddr_un`.
    #[error("The socket path has {bytes} bytes, the limit is 107")]
    SocketPathTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The name is not one of a network interface.
    #[error("{value} is not the name of a network interface")]
    NotAnInterface {
        /// The name, escaped and cut.
        value: String,
    },
    /// Random numbers from a file that is not a source of them.
    #[error("{value} is not one of /dev/urandom, /dev/random, /dev/hwrng")]
    RandomSource {
        /// The path, escaped and cut.
        value: String,
    },
    /// The override names a device that is not there.
    #[error("There is no such device")]
    NoSuchDevice,
    /// The override names no device, and there is not exactly one.
    #[error("There are {count} such devices, so one must be named")]
    Ambiguous {
        /// How many.
        count: usize,
    },
    /// Two overrides are for the same device.
    #[error("Another override is for the same device")]
    Twice,
    /// The device was off and would appear behind the guest's back.
    #[error("The device was off, it cannot be added on restore")]
    WouldAppear,
    /// CH demands a kernel or a firmware, also of a restore.
    #[error("There is neither kernel nor firmware")]
    NoBootImage,
    /// A file cannot take the place of this memory.
    #[error("The layout is of the zone {layout}, the configuration has another")]
    OtherZone {
        /// The zone of the layout.
        layout: String,
    },
}

/// Builds the configuration of a restored VM.
///
/// Pure: it opens nothing. Every refusal is collected, so that the error names all.
///
/// # Errors
/// [`ConfigRefusal`] with every key that cannot stay and that nothing replaces.
pub fn rewrite(config: &VmConfig, overrides: &ConfigOverrides) -> Result<VmConfig, ConfigRefusal> {
    let mut rewriter = Rewriter {
        overrides,
        refused: Vec::new(),
    };
    let rebuilt = rewriter.machine(config);
    if rewriter.refused.is_empty() {
        Ok(rebuilt)
    } else {
        Err(ConfigRefusal {
            items: rewriter.refused,
        })
    }
}

struct Rewriter<'o> {
    overrides: &'o ConfigOverrides,
    refused: Vec<RefusedItem>,
}

impl Rewriter<'_> {
    fn machine(&mut self, config: &VmConfig) -> VmConfig {
        self.refuse_unsupported(config);
        // Spelt out without `..`: whoever adds a field has to decide here.
        VmConfig {
            cpus: self.cpus(&config.cpus),
            memory: self.memory(&config.memory),
            payload: self.payload(config.payload.as_ref()),
            rate_limit_groups: config.rate_limit_groups.clone(),
            disks: self.disks(config.disks.as_deref()),
            net: self.nets(config.net.as_deref()),
            rng: self.rng(&config.rng),
            balloon: config.balloon.clone(),
            generic_vhost_user: None,
            fs: None,
            pmem: None,
            serial: self.serial(&config.serial),
            console: self.console(&config.console),
            debug_console: self.debug_console(&config.debug_console),
            devices: None,
            user_devices: None,
            vdpa: None,
            vsock: config.vsock.as_ref().map(|vsock| self.vsock(vsock)),
            pvmemcontrol: config.pvmemcontrol,
            pvpanic: config.pvpanic,
            iommu: config.iommu,
            numa: config.numa.clone(),
            watchdog: config.watchdog,
            rtc: config.rtc.clone(),
            gdb: None,
            pci_segments: config.pci_segments.clone(),
            platform: config.platform.as_ref().map(|p| self.platform(p)),
            tpm: None,
            landlock_enable: config.landlock_enable,
            landlock_rules: None,
            ivshmem: None,
        }
    }

    fn refuse(&mut self, at: impl Into<String>, reason: RefusalReason) {
        let at = at.into();
        self.refused.push(RefusedItem { at, reason });
    }

    fn unsupported(&mut self, at: impl Into<String>, what: &'static str) {
        self.refuse(at, RefusalReason::Unsupported { what });
    }

    /// Devices that live in other processes or on the host, and what only debug builds have.
    fn refuse_unsupported(&mut self, config: &VmConfig) {
        fn count<T>(list: Option<&Vec<T>>) -> usize {
            list.map_or(0, Vec::len)
        }
        let lists = [
            (
                "generic_vhost_user",
                "socket",
                count(config.generic_vhost_user.as_ref()),
                "A vhost-user device",
            ),
            (
                "fs",
                "socket",
                count(config.fs.as_ref()),
                "A virtio-fs device",
            ),
            (
                "pmem",
                "file",
                count(config.pmem.as_ref()),
                "A persistent memory device",
            ),
            (
                "devices",
                "path",
                count(config.devices.as_ref()),
                "A VFIO device",
            ),
            (
                "user_devices",
                "socket",
                count(config.user_devices.as_ref()),
                "A vfio-user device",
            ),
            ("vdpa", "path", count(config.vdpa.as_ref()), "A vDPA device"),
        ];
        for (key, field, count, what) in lists {
            for index in 0..count {
                self.unsupported(format!("{key}.{index}.{field}"), what);
            }
        }
        if config.tpm.is_some() {
            self.unsupported("tpm.socket", "A software TPM");
        }
        if config.ivshmem.is_some() {
            self.unsupported("ivshmem.path", "Memory shared between VMs");
        }
        if config.gdb == Some(true) {
            self.unsupported("gdb", "A debugging port");
        }
        let rules: &[LandlockConfig] = config.landlock_rules.as_deref().unwrap_or_default();
        for (index, rule) in rules.iter().enumerate() {
            let value = shown(&rule.path);
            let reason = RefusalReason::OfTheHost { value };
            self.refuse(format!("landlock_rules.{index}.path"), reason);
        }
    }

    /// A recorded path, if it may stay.
    fn recorded_path(&mut self, at: String, path: &Path, policy: Recorded) -> Option<PathBuf> {
        if policy == Recorded::Refuse {
            let value = shown(path);
            self.refuse(at, RefusalReason::OfTheHost { value });
            return None;
        }
        self.check_path(at, path);
        Some(path.to_owned())
    }

    /// CH's working directory is not that of whoever wrote the path.
    fn check_path(&mut self, at: impl Into<String>, path: &Path) {
        let value = shown(path);
        match path.to_str() {
            Some(text) if !text.contains('\0') => {
                if !path.is_absolute() {
                    self.refuse(at, RefusalReason::NotAbsolute { value });
                }
            }
            _ => self.refuse(at, RefusalReason::NotWritable { value }),
        }
    }

    /// `sun_path` has 108 bytes with its NUL (unix(7)).
    fn check_socket(&mut self, at: &str, path: &Path) {
        let bytes = path.as_os_str().len();
        if bytes > 107 {
            self.refuse(at, RefusalReason::SocketPathTooLong { bytes });
        }
    }
}

/// A path fit for an error message.
fn shown(path: &Path) -> String {
    excerpt(path.as_os_str().as_encoded_bytes())
}
