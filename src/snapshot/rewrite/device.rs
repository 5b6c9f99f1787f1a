//! Disks, network, consoles, vsock and random numbers.

use std::path::{Path, PathBuf};

use super::{
    ConsoleOverride, DiskOverride, RANDOM_SOURCES, Recorded, RefusalReason, Rewriter, TapSource,
    shown,
};
use crate::ids::IfName;
use crate::vm_config::{
    ConsoleConfig, ConsoleOutputMode, DebugConsoleConfig, DiskConfig, ImageType, NetConfig,
    RngConfig, SerialConfig, VsockConfig,
};
use crate::wire::excerpt::excerpt;

impl Rewriter<'_> {
    pub(super) fn disks(&mut self, disks: Option<&[DiskConfig]>) -> Option<Vec<DiskConfig>> {
        let list = disks.unwrap_or_default();
        let wanted = self.overrides.disks.iter().map(|o| o.disk.as_deref());
        let ids = list.iter().map(|disk| disk.id.as_deref());
        let matched = self.match_overrides(
            "disks",
            &wanted.collect::<Vec<_>>(),
            &ids.collect::<Vec<_>>(),
        );
        let rebuilt = list
            .iter()
            .zip(matched)
            .enumerate()
            .map(|(index, (disk, chosen))| {
                let chosen = chosen.map(|chosen| (chosen, &self.overrides.disks[chosen]));
                self.disk(&format!("disks.{index}"), disk, chosen)
            })
            .collect();
        disks.map(|_| rebuilt)
    }

    fn disk(
        &mut self,
        at: &str,
        disk: &DiskConfig,
        chosen: Option<(usize, &DiskOverride)>,
    ) -> DiskConfig {
        if disk.vhost_user || disk.vhost_socket.is_some() {
            self.unsupported(format!("{at}.vhost_socket"), "A vhost-user disk");
            return disk.clone();
        }
        let recorded = disk.image_type.filter(|kind| *kind != ImageType::Unknown);
        let (path, image_type) = match (chosen, &disk.path) {
            (Some((index, chosen)), _) => {
                self.check_path(format!("overrides.disks.{index}.path"), &chosen.path);
                (Some(chosen.path.clone()), chosen.image_type.or(recorded))
            }
            (None, Some(path)) => {
                let policy = self.overrides.policy.disks;
                let path = self.recorded_path(format!("{at}.path"), path, policy);
                (path, recorded)
            }
            (None, None) => {
                self.unsupported(format!("{at}.path"), "A disk without image");
                (None, recorded)
            }
        };
        let image_type = image_type.unwrap_or(ImageType::Raw);
        if disk.backing_files == Some(true) && image_type != ImageType::Raw {
            let what = "A disk image that names further files";
            self.unsupported(format!("{at}.backing_files"), what);
        }
        DiskConfig {
            path,
            image_type: Some(image_type),
            backing_files: disk.backing_files.map(|_| false),
            queue_affinity: self.placement(disk.queue_affinity.as_ref()),
            ..disk.clone()
        }
    }

    pub(super) fn nets(&mut self, nets: Option<&[NetConfig]>) -> Option<Vec<NetConfig>> {
        let list = nets.unwrap_or_default();
        let wanted = self.overrides.taps.iter().map(|o| o.device.as_deref());
        let ids = list.iter().map(|net| net.id.as_deref());
        let matched = self.match_overrides(
            "taps",
            &wanted.collect::<Vec<_>>(),
            &ids.collect::<Vec<_>>(),
        );
        let rebuilt = list
            .iter()
            .zip(matched)
            .enumerate()
            .map(|(index, (net, chosen))| {
                let chosen = chosen.map(|chosen| &self.overrides.taps[chosen].tap);
                self.net(&format!("net.{index}"), net, chosen)
            })
            .collect();
        nets.map(|_| rebuilt)
    }

    fn net(&mut self, at: &str, net: &NetConfig, chosen: Option<&TapSource>) -> NetConfig {
        if net.vhost_user || net.vhost_socket.is_some() {
            self.unsupported(format!("{at}.vhost_socket"), "A vhost-user network device");
            return net.clone();
        }
        // The old tap's address is never wanted: CH would force it onto the new tap.
        let bare = NetConfig {
            host_mac: None,
            ..net.clone()
        };
        match chosen {
            Some(TapSource::Name(name)) => NetConfig {
                tap: Some(name.to_string()),
                fds: None,
                ip: None,
                mask: None,
                mtu: None,
                ..bare
            },
            Some(TapSource::Descriptors) => NetConfig {
                tap: None,
                fds: Some(vec![-1; (net.num_queues / 2).max(1)]),
                ip: None,
                mask: None,
                mtu: None,
                ..bare
            },
            None => {
                self.recorded_tap(at, net);
                bare
            }
        }
    }

    fn recorded_tap(&mut self, at: &str, net: &NetConfig) {
        if let Some(fds) = &net.fds {
            let value = format!("{} descriptors", fds.len());
            let reason = RefusalReason::OfTheHost { value };
            self.refuse(format!("{at}.fds"), reason);
        } else if self.overrides.policy.taps == Recorded::Refuse {
            let value = net.tap.as_deref().map_or("A new tap".to_owned(), excerpt);
            let reason = RefusalReason::OfTheHost { value };
            self.refuse(format!("{at}.tap"), reason);
        } else if let Some(tap) = &net.tap
            && IfName::new(tap.as_str()).is_err()
        {
            let value = excerpt(tap);
            let reason = RefusalReason::NotAnInterface { value };
            self.refuse(format!("{at}.tap"), reason);
        }
    }

    pub(super) fn rng(&mut self, rng: &RngConfig) -> RngConfig {
        let (at, source) = match &self.overrides.rng_source {
            Some(source) => ("overrides.rng_source", source),
            None => ("rng.src", &rng.src),
        };
        if !RANDOM_SOURCES
            .iter()
            .any(|known| source.as_os_str() == *known)
        {
            let value = shown(source);
            self.refuse(at, RefusalReason::RandomSource { value });
        }
        RngConfig {
            src: source.clone(),
            ..rng.clone()
        }
    }

    pub(super) fn vsock(&mut self, vsock: &VsockConfig) -> VsockConfig {
        let socket = match &self.overrides.vsock_socket {
            Some(socket) => {
                self.check_path("overrides.vsock_socket", socket);
                Some(socket.clone())
            }
            None => {
                let policy = self.overrides.policy.vsock_socket;
                self.recorded_path("vsock.socket".to_owned(), &vsock.socket, policy)
            }
        };
        let socket = socket.unwrap_or_default();
        self.check_socket("vsock.socket", &socket);
        VsockConfig {
            socket,
            ..vsock.clone()
        }
    }

    pub(super) fn serial(&mut self, serial: &SerialConfig) -> SerialConfig {
        let wanted = &self.overrides.serial;
        let (mode, file, socket) = self.output(
            "serial",
            wanted,
            (
                serial.mode,
                serial.file.as_deref(),
                serial.socket.as_deref(),
            ),
        );
        SerialConfig { file, mode, socket }
    }

    pub(super) fn console(&mut self, console: &ConsoleConfig) -> ConsoleConfig {
        let wanted = &self.overrides.console;
        let (mode, file, socket) = self.output(
            "console",
            wanted,
            (
                console.mode,
                console.file.as_deref(),
                console.socket.as_deref(),
            ),
        );
        ConsoleConfig {
            file,
            mode,
            socket,
            ..console.clone()
        }
    }

    pub(super) fn debug_console(&mut self, console: &DebugConsoleConfig) -> DebugConsoleConfig {
        let wanted = &self.overrides.debug_console;
        let recorded = (console.mode, console.file.as_deref(), None);
        let (mode, file, _) = self.output("debug_console", wanted, recorded);
        DebugConsoleConfig {
            file,
            mode,
            iobase: console.iobase,
        }
    }

    fn output(
        &mut self,
        at: &str,
        wanted: &ConsoleOverride,
        (mode, file, socket): (ConsoleOutputMode, Option<&Path>, Option<&Path>),
    ) -> (ConsoleOutputMode, Option<PathBuf>, Option<PathBuf>) {
        match (mode, wanted) {
            (ConsoleOutputMode::Off, ConsoleOverride::File(_)) => {
                self.refuse(format!("overrides.{at}"), RefusalReason::WouldAppear);
                (mode, None, None)
            }
            (ConsoleOutputMode::Off, _) => (mode, None, None),
            (_, ConsoleOverride::Quiet) => (ConsoleOutputMode::Null, None, None),
            (_, ConsoleOverride::File(file)) => {
                self.check_path(format!("overrides.{at}"), file);
                (ConsoleOutputMode::File, Some(file.clone()), None)
            }
            (ConsoleOutputMode::File, ConsoleOverride::Recorded) => {
                let file = file.unwrap_or(Path::new(""));
                self.check_path(format!("{at}.file"), file);
                (mode, Some(file.to_owned()), None)
            }
            (ConsoleOutputMode::Socket, ConsoleOverride::Recorded) => {
                let socket = socket.unwrap_or(Path::new(""));
                self.check_path(format!("{at}.socket"), socket);
                self.check_socket(&format!("{at}.socket"), socket);
                (mode, None, Some(socket.to_owned()))
            }
            (_, ConsoleOverride::Recorded) => (mode, None, None),
        }
    }

    /// For each device the override that is for it. `wanted` and `ids` are in the order of the
    /// overrides and of the devices.
    fn match_overrides(
        &mut self,
        key: &str,
        wanted: &[Option<&str>],
        ids: &[Option<&str>],
    ) -> Vec<Option<usize>> {
        let mut matched = vec![None; ids.len()];
        for (index, wanted) in wanted.iter().enumerate() {
            let found = match wanted {
                Some(wanted) => ids.iter().position(|id| *id == Some(*wanted)),
                None if ids.len() == 1 => Some(0),
                None => {
                    let count = ids.len();
                    let at = format!("overrides.{key}.{index}");
                    self.refuse(at, RefusalReason::Ambiguous { count });
                    continue;
                }
            };
            let reason = match found {
                Some(device) if matched[device].is_none() => {
                    matched[device] = Some(index);
                    continue;
                }
                Some(_) => RefusalReason::Twice,
                None => RefusalReason::NoSuchDevice,
            };
            self.refuse(format!("overrides.{key}.{index}"), reason);
        }
        matched
    }
}
