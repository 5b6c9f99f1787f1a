//! Processors, memory, payload and platform.

use std::path::{Path, PathBuf};

use super::{MemoryBacking, Recorded, RefusalReason, Rewriter};
use crate::snapshot::layout::{DEFAULT_ZONE, MemoryLayout};
use crate::vm_config::{CpusConfig, MemoryConfig, MemoryZoneConfig, PayloadConfig, PlatformConfig};
use crate::wire::excerpt::excerpt;

impl Rewriter<'_> {
    pub(super) fn cpus(&mut self, cpus: &CpusConfig) -> CpusConfig {
        CpusConfig {
            affinity: self.placement(cpus.affinity.as_ref()),
            core_scheduling: Some(self.overrides.core_scheduling),
            ..cpus.clone()
        }
    }

    pub(super) fn placement<T: Clone>(&self, recorded: Option<&T>) -> Option<T> {
        match self.overrides.policy.placement {
            Recorded::Refuse => None,
            Recorded::Keep => recorded.cloned(),
        }
    }

    pub(super) fn memory(&mut self, memory: &MemoryConfig) -> MemoryConfig {
        let zones = match &self.overrides.memory {
            MemoryBacking::File {
                path,
                shared,
                layout,
            } => return self.file_memory(memory, path, *shared, layout),
            MemoryBacking::Recorded => memory.zones.as_ref().map(|zones| {
                let zones = zones.iter().enumerate();
                zones
                    .map(|(index, zone)| {
                        let at = format!("memory.zones.{index}.file");
                        let policy = self.overrides.policy.memory_files;
                        let file = zone.file.as_deref();
                        let file = file.and_then(|file| self.recorded_path(at, file, policy));
                        self.zone(zone, file)
                    })
                    .collect()
            }),
            MemoryBacking::Anonymous => memory.zones.as_ref().map(|zones| {
                let zones = zones.iter();
                zones.map(|zone| self.anonymous_zone(zone)).collect()
            }),
        };
        MemoryConfig {
            prefault: false,
            zones,
            ..memory.clone()
        }
    }

    /// Without its file a zone need not be shared: that was so that writes reach the file.
    fn anonymous_zone(&self, zone: &MemoryZoneConfig) -> MemoryZoneConfig {
        MemoryZoneConfig {
            shared: zone.shared && zone.file.is_none(),
            ..self.zone(zone, None)
        }
    }

    fn zone(&self, zone: &MemoryZoneConfig, file: Option<PathBuf>) -> MemoryZoneConfig {
        MemoryZoneConfig {
            file,
            host_numa_node: self.placement(zone.host_numa_node.as_ref()),
            prefault: false,
            ..zone.clone()
        }
    }

    /// One zone in a file. Hotplug settings stay: addresses that the guest's ACPI tables name
    /// depend on them.
    fn file_memory(
        &mut self,
        memory: &MemoryConfig,
        path: &Path,
        shared: bool,
        layout: &MemoryLayout,
    ) -> MemoryConfig {
        self.check_path("overrides.memory.path", path);
        let recorded = match memory.zones.as_deref().unwrap_or_default() {
            [] => MemoryZoneConfig {
                id: DEFAULT_ZONE.to_owned(),
                size: memory.size,
                mergeable: memory.mergeable.then_some(true),
                ..MemoryZoneConfig::default()
            },
            [zone] => self.zone(zone, None),
            zones => {
                let count = zones.len();
                self.refuse("memory.zones", RefusalReason::Ambiguous { count });
                return memory.clone();
            }
        };
        if recorded.id != layout.zone() || recorded.size != layout.zone_size().0 {
            let layout = excerpt(layout.zone());
            self.refuse(
                "overrides.memory.layout",
                RefusalReason::OtherZone { layout },
            );
        }
        let zone = MemoryZoneConfig {
            file: Some(path.to_owned()),
            shared,
            // A NUMA policy on a shared file is an error to CH.
            host_numa_node: recorded.host_numa_node.filter(|_| !shared),
            ..recorded
        };
        MemoryConfig {
            size: 0,
            prefault: false,
            zones: Some(vec![zone]),
            ..memory.clone()
        }
    }

    pub(super) fn payload(&mut self, payload: Option<&PayloadConfig>) -> Option<PayloadConfig> {
        let recorded = payload.cloned().unwrap_or_default();
        if recorded.igvm.is_some() {
            self.unsupported("payload.igvm", "An IGVM image");
        }
        if recorded.host_data.is_some() {
            self.unsupported("payload.host_data", "A confidential VM");
        }
        if recorded.fw_cfg_config.is_some() {
            self.unsupported("payload.fw_cfg_config", "A fw_cfg device");
        }
        let (mut firmware, mut kernel) = (recorded.firmware, recorded.kernel);
        match (&self.overrides.boot_image, &mut firmware, &mut kernel) {
            (Some(path), Some(recorded), None) | (Some(path), None, Some(recorded)) => {
                self.check_path("overrides.boot_image", path);
                recorded.clone_from(path);
            }
            (_, None, None) => self.refuse("payload", RefusalReason::NoBootImage),
            (_, Some(_), Some(_)) => self.unsupported("payload", "A kernel beside a firmware"),
            (None, ..) => {}
        }
        // A restore opens the initramfs, though the guest has had its own copy for long.
        Some(PayloadConfig {
            firmware,
            kernel,
            cmdline: recorded.cmdline,
            initramfs: None,
            igvm: None,
            host_data: None,
            fw_cfg_config: None,
        })
    }

    pub(super) fn platform(&mut self, platform: &PlatformConfig) -> PlatformConfig {
        if platform.tdx {
            self.unsupported("platform.tdx", "A confidential VM");
        }
        if platform.sev_snp {
            self.unsupported("platform.sev_snp", "A confidential VM");
        }
        if platform.iommufd == Some(true) {
            self.unsupported("platform.iommufd", "A VFIO device");
        }
        if platform.iommufd_fd.is_some() {
            self.unsupported("platform.iommufd_fd", "A VFIO device");
        }
        PlatformConfig {
            tdx: false,
            sev_snp: false,
            iommufd_fd: None,
            ..platform.clone()
        }
    }
}
