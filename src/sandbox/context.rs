//! What all sandboxes of one root share: network, disks, settings.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rewake_sys::netns;

use super::admission::{Admission, Limits};
use super::error::{Cause, Error, Operation, file};
use super::expected::Expected;
use crate::deadline::Deadline;
use crate::envd::{self, hedge::Hedge};
use crate::fault::Faults;
use crate::plan::{MemoryMode, MemoryPolicy};
use crate::resource::disk::{DiskConfig, DiskMode, DiskPool, DiskStock, DiskStockOptions};
use crate::resource::net::{HostNet, NetConfig, NetError, PoolOptions, SlotPool};
use crate::restore::Budgets;
use crate::restore::kit::{KitPool, KitPoolOptions, Places};
use crate::snapshot::{Durability, SnapshotLimits};
use crate::units::Bytes;
use crate::vmm::launch::LaunchSpec;

/// What Cloud Hypervisor takes beside guest memory, with some of a guest's first pages.
const VMM_MEMORY: Bytes = Bytes::mib(64);

/// How a host is set up.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Where templates and sandboxes live.
    pub root: PathBuf,
    /// Where running VMs have their sockets and slots their records. Not on a disk: nothing in
    /// it outlives a restart of the machine.
    pub runtime_dir: PathBuf,
    /// The namespace that slots are connected to, as a path; absent: the caller's.
    pub netns: Option<PathBuf>,
    /// How Cloud Hypervisor is started.
    pub vmm: LaunchSpec,
    /// Addresses and names of network slots.
    pub net: NetConfig,
    /// Slots prepared in advance.
    pub slots: PoolOptions,
    /// Cloud Hypervisors started in advance, each in a slot of its own, for launches.
    pub kits: KitPoolOptions,
    /// How disks are made.
    pub disk: DiskConfig,
    /// Which kind of disk.
    pub disk_mode: DiskMode,
    /// Disks prepared in advance, for launches: from the second on of each template, or from
    /// the first with [`Host::keep_ready`](crate::host::Host::keep_ready).
    pub disk_stock: DiskStockOptions,
    /// When a paused sandbox counts as safe.
    pub durability: Durability,
    /// What is admitted.
    pub limits: Limits,
    /// The port that the agent listens on in the guest.
    pub guest_port: u16,
    /// How readiness is probed.
    pub hedge: Hedge,
    /// How long the parts of a restore may take.
    pub budgets: Budgets,
    /// Bounds on what is read from a snapshot directory.
    pub snapshot_limits: SnapshotLimits,
    /// How long an operation may take that was given no deadline.
    pub patience: Duration,
    /// For tests: which calls fail.
    pub faults: Faults,
}

impl HostConfig {
    /// A host with its data under `root`, and defaults in everything else: Cloud Hypervisor
    /// as `cloud-hypervisor` in one of the usual directories, `/run/rewake`, the address plan
    /// of [`NetConfig`].
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        let program = crate::doctor::find_program("cloud-hypervisor");
        let program = program.unwrap_or_else(|| PathBuf::from("/usr/bin/cloud-hypervisor"));
        Self {
            root: root.into(),
            runtime_dir: PathBuf::from("/run/rewake"),
            netns: None,
            vmm: LaunchSpec {
                program,
                ..LaunchSpec::default()
            },
            net: NetConfig::default(),
            slots: PoolOptions::default(),
            kits: KitPoolOptions::default(),
            disk: DiskConfig::default(),
            disk_mode: DiskMode::Auto,
            disk_stock: DiskStockOptions::default(),
            durability: Durability::default(),
            limits: Limits::default(),
            guest_port: envd::PORT,
            hedge: Hedge::default(),
            budgets: Budgets::default(),
            snapshot_limits: SnapshotLimits::default(),
            patience: Duration::from_secs(180),
            faults: Faults::NONE,
        }
    }

    /// The same with another runtime directory, for everything that has one.
    #[must_use]
    pub fn with_runtime_dir(mut self, runtime_dir: impl Into<PathBuf>) -> Self {
        self.runtime_dir = runtime_dir.into();
        self.net.runtime_dir.clone_from(&self.runtime_dir);
        self.disk.runtime_dir.clone_from(&self.runtime_dir);
        self
    }
}

/// What all sandboxes of one root share. Used by many threads.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) config: HostConfig,
    pub(crate) net: Arc<HostNet>,
    pub(crate) disks: Arc<DiskPool>,
    pub(crate) pool: SlotPool,
    /// Absent where none are wanted, and before anything may be made.
    pub(crate) kits: OnceLock<KitPool>,
    /// The same.
    pub(crate) disk_stock: OnceLock<DiskStock>,
    pub(crate) expected: Expected,
    pub(crate) admission: Admission,
    ready: OnceLock<()>,
}

impl Context {
    /// Opens network and disks; they stay as they are.
    pub(crate) fn open(config: HostConfig) -> Result<Self, Error> {
        let failed = |cause| Error::of_host(Operation::Open, cause);
        let net = open_net(&config).map_err(|error| failed(Cause::Network(error)))?;
        let net = Arc::new(net);
        let pool = SlotPool::start(Arc::clone(&net), config.slots);
        let pool =
            pool.map_err(|error| failed(file("start the slot pool of", &config.root)(error)))?;
        let disks = DiskConfig {
            // Nobody who launches waits for the host's disk; it is seen to right behind.
            defer_sync: true,
            ..config.disk.clone()
        };
        Ok(Self {
            disks: Arc::new(DiskPool::open(disks, config.faults.clone())),
            admission: Admission::new(config.limits.clone()),
            net,
            pool,
            kits: OnceLock::new(),
            disk_stock: OnceLock::new(),
            expected: Expected::default(),
            config,
            ready: OnceLock::new(),
        })
    }

    /// Makes what sandboxes need to be made, once: directories, and the host's side of the
    /// network.
    pub(crate) fn ready(&self, deadline: Deadline) -> Result<(), Cause> {
        if self.ready.get().is_some() {
            return Ok(());
        }
        let dirs = [
            super::dir::all(&self.config.root),
            self.config.runtime_dir.clone(),
        ];
        for dir in dirs {
            std::fs::create_dir_all(&dir).map_err(file("make", &dir))?;
        }
        self.net.prepare(deadline).map_err(Cause::Network)?;
        if self.config.kits.target > 0 && self.kits.get().is_none() {
            let kits = start_kits(&self.config, &self.net);
            let kits = kits.map_err(file("start the kits of", &self.config.root))?;
            // Of two pools that were started at once, the second one ends here.
            let _ = self.kits.set(kits);
        }
        if self.config.disk_stock.target > 0 && self.disk_stock.get().is_none() {
            let home = DiskStock::home_under(&self.config.root);
            let stock = open_stock(&self.config, &self.disks, &home);
            let stock = stock.map_err(file("keep disks ready in", &home))?;
            let _ = self.disk_stock.set(stock);
        }
        // Whoever came second did the same.
        let _ = self.ready.set(());
        Ok(())
    }

    /// Where the agent of every guest listens, seen from inside its slot.
    pub(crate) fn guest(&self) -> SocketAddr {
        SocketAddr::from((self.net.config().guest_address, self.config.guest_port))
    }

    /// How memory comes back: as asked for, else as is best. `owned`: the snapshot belongs to
    /// the sandbox alone.
    pub(crate) fn memory_policy(asked: Option<MemoryMode>, owned: bool) -> MemoryPolicy {
        asked.map_or(MemoryPolicy::Auto { owned }, MemoryPolicy::Only)
    }

    /// How much memory a sandbox may take at once: all of it where it is copied or filled in
    /// the background, what Cloud Hypervisor itself needs where it is mapped.
    pub(crate) fn needs(&self, mode: Option<MemoryMode>, memory: Bytes) -> Bytes {
        match mode {
            Some(MemoryMode::Copy | MemoryMode::OnDemand) => memory,
            _ => memory.min(VMM_MEMORY),
        }
    }

    /// How many sandboxes may have a VM, going by their journals.
    pub(crate) fn running(&self) -> usize {
        let all = super::dir::list(&self.config.root).unwrap_or_default();
        let runs = |id| {
            let dir = super::dir::SandboxDir::of(&self.config.root, id);
            let story = super::journal::Journal::story_of(&dir.journal());
            story.is_ok_and(|story| story.status.vm.is_some())
        };
        all.ids.iter().filter(|id| runs(id)).count()
    }

    /// The caller's deadline, or the host's patience where it has none.
    pub(crate) fn deadline(&self, asked: Deadline) -> Deadline {
        match asked.instant() {
            Some(_) => asked,
            None => Deadline::after(self.config.patience),
        }
    }
}

fn start_kits(config: &HostConfig, net: &Arc<HostNet>) -> std::io::Result<KitPool> {
    let places = Places::Slots {
        host: Arc::clone(net),
        pool: None,
    };
    let runtime_dir = config.runtime_dir.clone();
    KitPool::start(config.vmm.clone(), runtime_dir, places, config.kits)
}

/// A disk is handed out by giving it another name, which cannot be in another file system.
fn open_stock(
    config: &HostConfig,
    disks: &Arc<DiskPool>,
    home: &Path,
) -> std::io::Result<DiskStock> {
    let stock = DiskStock::open(Arc::clone(disks), home, config.disk_stock)?;
    let device = |path: &Path| std::fs::metadata(path).map(|it| it.dev());
    if device(home)? != device(&super::dir::all(&config.root))? {
        return Err(std::io::ErrorKind::CrossesDevices.into());
    }
    Ok(stock)
}

fn open_net(config: &HostConfig) -> Result<HostNet, NetError> {
    let Some(path) = &config.netns else {
        return HostNet::open(config.net.clone(), config.faults.clone());
    };
    let host = netns::open(path).map_err(|source| NetError::Call {
        step: format!("open the host's namespace {}", path.display()),
        source,
    })?;
    use std::os::fd::AsFd;
    HostNet::open_in(host.as_fd(), config.net.clone(), config.faults.clone())
}
