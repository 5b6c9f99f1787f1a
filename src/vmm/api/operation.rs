//! The operations of Cloud Hypervisor's API.

use std::fmt;

use crate::wire::http::Method;

macro_rules! operations {
    ($($(#[$doc:meta])* $variant:ident = $method:ident $name:literal,)*) => {
        /// An operation of CH's API (`vmm/src/api/http/mod.rs`).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Operation {
            $($(#[$doc])* $variant,)*
        }

        impl Operation {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its name: `vm.pause`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Its method.
            #[must_use]
            pub const fn method(self) -> Method {
                match self {
                    $(Self::$variant => Method::$method,)*
                }
            }

            /// Its request target: `/api/v1/vm.pause`.
            #[must_use]
            pub const fn target(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!("/api/v1/", $name),)*
                }
            }
        }
    };
}

operations! {
    /// Who is there?
    Ping = Get "vmm.ping",
    /// End the process.
    ShutdownVmm = Put "vmm.shutdown",
    /// Configuration and state of the VM.
    Info = Get "vm.info",
    /// Counters of its devices.
    Counters = Get "vm.counters",
    /// Give it a configuration.
    Create = Put "vm.create",
    /// Boot it.
    Boot = Put "vm.boot",
    /// Park its vCPUs.
    Pause = Put "vm.pause",
    /// Let them run.
    Resume = Put "vm.resume",
    /// Take it down, keep its configuration.
    Shutdown = Put "vm.shutdown",
    /// Take it down and boot it.
    Reboot = Put "vm.reboot",
    /// Take it down, forget it.
    Delete = Put "vm.delete",
    /// Press its power button.
    PowerButton = Put "vm.power-button",
    /// Interrupt it.
    Nmi = Put "vm.nmi",
    /// Write it to a directory.
    Snapshot = Put "vm.snapshot",
    /// Read it from a directory.
    Restore = Put "vm.restore",
    /// Change vCPUs, memory, balloon.
    Resize = Put "vm.resize",
    /// Change a memory zone.
    ResizeZone = Put "vm.resize-zone",
    /// Change a disk.
    ResizeDisk = Put "vm.resize-disk",
    /// Add a block device.
    AddDisk = Put "vm.add-disk",
    /// Add a network device.
    AddNet = Put "vm.add-net",
    /// Add a virtio-fs device.
    AddFs = Put "vm.add-fs",
    /// Add a persistent memory device.
    AddPmem = Put "vm.add-pmem",
    /// Add a vsock device.
    AddVsock = Put "vm.add-vsock",
    /// Add a vDPA device.
    AddVdpa = Put "vm.add-vdpa",
    /// Add a VFIO device.
    AddDevice = Put "vm.add-device",
    /// Add a vfio-user device.
    AddUserDevice = Put "vm.add-user-device",
    /// Add a vhost-user device of any type.
    AddGenericVhostUser = Put "vm.add-generic-vhost-user",
    /// Take a device away.
    RemoveDevice = Put "vm.remove-device",
    /// Move the VM to another process.
    SendMigration = Put "vm.send-migration",
    /// Take a VM from another process.
    ReceiveMigration = Put "vm.receive-migration",
    /// Dump its memory as a core file.
    Coredump = Put "vm.coredump",
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
