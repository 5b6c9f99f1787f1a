//! Keys, types and defaults of VmConfig (`vmm/src/vm_config.rs` of Cloud Hypervisor).

pub(super) enum Kind {
    Bool,
    Unsigned(u64),
    Text,
    Mac,
    OneOf(&'static [&'static str]),
    Struct(&'static [Field]),
    List(&'static [Field]),
    /// Passed through.
    Any,
}

pub(super) enum Absent {
    Required,
    /// JSON of the default.
    Default(&'static str),
    /// `null` up to v52, left out from v53 on.
    Nothing,
    /// Left out while it has the type's default.
    Omitted,
}

pub(super) struct Field {
    pub(super) key: &'static str,
    pub(super) kind: Kind,
    pub(super) absent: Absent,
    pub(super) since: u8,
}

const fn field(key: &'static str, kind: Kind, absent: Absent) -> Field {
    Field {
        key,
        kind,
        absent,
        since: 0,
    }
}

const fn required(key: &'static str, kind: Kind) -> Field {
    field(key, kind, Absent::Required)
}

const fn optional(key: &'static str, kind: Kind) -> Field {
    field(key, kind, Absent::Nothing)
}

const fn flag(key: &'static str, default: &'static str) -> Field {
    field(key, Kind::Bool, Absent::Default(default))
}

const fn number(key: &'static str, kind: Kind, default: &'static str) -> Field {
    field(key, kind, Absent::Default(default))
}

const fn since(release: u8, mut field: Field) -> Field {
    field.since = release;
    field
}

const U64: Kind = Kind::Unsigned(u64::MAX);
const U32: Kind = Kind::Unsigned(u32::MAX as u64);
const U16: Kind = Kind::Unsigned(u16::MAX as u64);
const U8: Kind = Kind::Unsigned(u8::MAX as u64);

const ID: Field = optional("id", Kind::Text);
const IOMMU: Field = field("iommu", Kind::Bool, Absent::Omitted);
const SEGMENT: Field = number("pci_segment", U16, "0");
const SLOT: Field = since(52, optional("pci_device_id", U8));

const CPUS: &[Field] = &[
    required("boot_vcpus", U32),
    required("max_vcpus", U32),
    optional("topology", Kind::Any),
    flag("kvm_hyperv", "false"),
    number("max_phys_bits", U8, "46"),
    optional("affinity", Kind::Any),
    field("features", Kind::Any, Absent::Default("{\"amx\":false}")),
    flag("nested", "true"),
    since(
        52,
        field(
            "core_scheduling",
            Kind::OneOf(&["Vm", "Vcpu", "Off"]),
            Absent::Default("\"Vm\""),
        ),
    ),
    since(
        53,
        field("profile", Kind::Text, Absent::Default("\"Host\"")),
    ),
];

const ZONE: &[Field] = &[
    required("id", Kind::Text),
    required("size", U64),
    optional("file", Kind::Text),
    flag("shared", "false"),
    flag("hugepages", "false"),
    optional("hugepage_size", U64),
    optional("host_numa_node", U32),
    optional("hotplug_size", U64),
    optional("hotplugged_size", U64),
    flag("prefault", "false"),
    since(53, flag("reserve", "false")),
    since(52, flag("mergeable", "false")),
];

const MEMORY: &[Field] = &[
    required("size", U64),
    flag("mergeable", "false"),
    field(
        "hotplug_method",
        Kind::OneOf(&["Acpi", "VirtioMem"]),
        Absent::Default("\"Acpi\""),
    ),
    optional("hotplug_size", U64),
    optional("hotplugged_size", U64),
    flag("shared", "false"),
    flag("hugepages", "false"),
    optional("hugepage_size", U64),
    flag("prefault", "false"),
    since(53, flag("reserve", "false")),
    optional("zones", Kind::List(ZONE)),
    flag("thp", "true"),
];

const PAYLOAD: &[Field] = &[
    optional("firmware", Kind::Text),
    optional("kernel", Kind::Text),
    optional("cmdline", Kind::Text),
    optional("initramfs", Kind::Text),
];

pub(super) const DISK: &[Field] = &[
    ID,
    IOMMU,
    SEGMENT,
    SLOT,
    optional("path", Kind::Text),
    flag("readonly", "false"),
    flag("direct", "false"),
    number("num_queues", U64, "1"),
    number("queue_size", U16, "128"),
    flag("vhost_user", "false"),
    optional("vhost_socket", Kind::Text),
    optional("rate_limit_group", Kind::Text),
    optional("rate_limiter_config", Kind::Any),
    flag("disable_io_uring", "false"),
    flag("disable_aio", "false"),
    optional("serial", Kind::Text),
    optional("queue_affinity", Kind::Any),
    since(51, flag("backing_files", "false")),
    since(51, flag("sparse", "true")),
    since(
        51,
        field(
            "image_type",
            Kind::OneOf(&["FixedVhd", "Qcow2", "Raw", "Vhdx", "Unknown"]),
            Absent::Default("\"Unknown\""),
        ),
    ),
    since(
        52,
        field(
            "lock_granularity",
            Kind::OneOf(&["ByteRange", "Full"]),
            Absent::Default("\"ByteRange\""),
        ),
    ),
];

pub(super) const NET: &[Field] = &[
    ID,
    IOMMU,
    SEGMENT,
    SLOT,
    optional("tap", Kind::Text),
    optional("ip", Kind::Text),
    optional("mask", Kind::Text),
    field("mac", Kind::Mac, Absent::Omitted),
    optional("host_mac", Kind::Mac),
    optional("mtu", U16),
    number("num_queues", U64, "2"),
    number("queue_size", U16, "256"),
    flag("vhost_user", "false"),
    optional("vhost_socket", Kind::Text),
    field(
        "vhost_mode",
        Kind::OneOf(&["Client", "Server"]),
        Absent::Default("\"Client\""),
    ),
    optional("fds", Kind::Any),
    optional("rate_limiter_config", Kind::Any),
    flag("offload_tso", "true"),
    flag("offload_ufo", "true"),
    flag("offload_csum", "true"),
];

const RNG: &[Field] = &[ID, IOMMU, SEGMENT, SLOT, required("src", Kind::Text)];

const BALLOON: &[Field] = &[
    since(53, optional("id", Kind::Text)),
    since(53, field("iommu", Kind::Bool, Absent::Omitted)),
    since(53, number("pci_segment", U16, "0")),
    since(53, optional("pci_device_id", U8)),
    required("size", U64),
    flag("deflate_on_oom", "false"),
    flag("free_page_reporting", "false"),
];

const MODE: Field = required(
    "mode",
    Kind::OneOf(&["Off", "Pty", "Tty", "File", "Socket", "Null"]),
);

const SERIAL: &[Field] = &[
    optional("file", Kind::Text),
    MODE,
    optional("socket", Kind::Text),
];

const CONSOLE: &[Field] = &[
    ID,
    IOMMU,
    SEGMENT,
    SLOT,
    optional("file", Kind::Text),
    MODE,
    optional("socket", Kind::Text),
];

const DEBUG_CONSOLE: &[Field] = &[
    optional("file", Kind::Text),
    MODE,
    field("iobase", U16, Absent::Default("233")),
];

const VSOCK: &[Field] = &[
    ID,
    IOMMU,
    SEGMENT,
    SLOT,
    required("cid", U32),
    required("socket", Kind::Text),
];

pub(super) const VM: &[Field] = &[
    field(
        "cpus",
        Kind::Struct(CPUS),
        Absent::Default("{\"boot_vcpus\":1,\"max_vcpus\":1}"),
    ),
    field(
        "memory",
        Kind::Struct(MEMORY),
        Absent::Default("{\"size\":536870912}"),
    ),
    optional("payload", Kind::Struct(PAYLOAD)),
    optional("rate_limit_groups", Kind::Any),
    optional("disks", Kind::List(DISK)),
    optional("net", Kind::List(NET)),
    field(
        "rng",
        Kind::Struct(RNG),
        Absent::Default("{\"src\":\"/dev/urandom\"}"),
    ),
    optional("balloon", Kind::Struct(BALLOON)),
    since(52, optional("generic_vhost_user", Kind::Any)),
    optional("fs", Kind::Any),
    optional("pmem", Kind::Any),
    field(
        "serial",
        Kind::Struct(SERIAL),
        Absent::Default("{\"mode\":\"Null\"}"),
    ),
    field(
        "console",
        Kind::Struct(CONSOLE),
        Absent::Default("{\"mode\":\"Tty\"}"),
    ),
    field(
        "debug_console",
        Kind::Struct(DEBUG_CONSOLE),
        Absent::Default("{\"mode\":\"Off\"}"),
    ),
    optional("devices", Kind::Any),
    optional("user_devices", Kind::Any),
    optional("vdpa", Kind::Any),
    optional("vsock", Kind::Struct(VSOCK)),
    since(53, field("rtc", Kind::Any, Absent::Omitted)),
    flag("pvpanic", "false"),
    flag("iommu", "false"),
    optional("numa", Kind::Any),
    flag("watchdog", "false"),
    optional("pci_segments", Kind::Any),
    optional("platform", Kind::Any),
    optional("tpm", Kind::Any),
    flag("landlock_enable", "false"),
    optional("landlock_rules", Kind::Any),
];
