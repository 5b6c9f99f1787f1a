//! From a checked snapshot and what the caller wants to what is to be made, as data.
//!
//! Pure: nothing here opens, makes or starts anything. A plan prints, compares and is tested
//! without privileges; whatever can be refused is refused here, before the first side effect.

mod memory;

use std::path::{Path, PathBuf};

pub use memory::{Circumstances, MemoryMode, MemoryPolicy, PassedOver, StateEdit, Unfit};

use crate::ids::{IfName, SandboxId, SlotIndex, TemplateId};
use crate::snapshot::SnapshotDir;
use crate::snapshot::rewrite::{
    ConfigOverrides, ConfigRefusal, DiskOverride, HostPathPolicy, Recorded, TapOverride, TapSource,
    rewrite,
};
use crate::units::Bytes;
use crate::vm_config::VmConfig;

/// Which disk the VM gets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum RootDisk {
    /// The one that the snapshot names. Only one VM at a time may have it.
    #[default]
    AsRecorded,
    /// This raw image or block device, in place of the snapshot's only disk.
    At(PathBuf),
    /// This one, under the path that the snapshot names: CH finds it there in a mount
    /// namespace of its own, in which the given directory is covered.
    AtRecordedPath {
        /// The raw image or block device.
        device: PathBuf,
        /// The directory that the recorded path lies beneath. It must exist.
        sandbox_dir: PathBuf,
    },
}

/// What a restore starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreInputs {
    /// The sandbox that comes to life.
    pub sandbox_id: SandboxId,
    /// The template that its snapshot belongs to, where it is one.
    pub template_id: Option<TemplateId>,
    /// The snapshot directory.
    pub snapshot_dir: PathBuf,
    /// Its root file system.
    pub disk: RootDisk,
    /// How many vCPUs the caller expects. A snapshot cannot be given other ones.
    pub vcpus: Option<u32>,
    /// How much memory the caller expects. A snapshot cannot be given other memory.
    pub memory: Option<Bytes>,
    /// The network slot whose namespace CH starts in.
    pub slot: Option<SlotIndex>,
    /// The tap in that namespace; the recorded one where absent.
    pub tap: Option<IfName>,
    /// How memory comes back.
    pub memory_mode: MemoryPolicy,
    /// Which recorded host paths may be used where nothing replaces them. Disks follow
    /// [`RestoreInputs::disk`].
    pub policy: HostPathPolicy,
}

impl RestoreInputs {
    /// Inputs that change nothing that the snapshot recorded.
    #[must_use]
    pub fn new(sandbox_id: SandboxId, snapshot_dir: impl Into<PathBuf>) -> Self {
        Self {
            sandbox_id,
            template_id: None,
            snapshot_dir: snapshot_dir.into(),
            disk: RootDisk::default(),
            vcpus: None,
            memory: None,
            slot: None,
            tap: None,
            memory_mode: MemoryPolicy::default(),
            policy: HostPathPolicy {
                taps: Recorded::Keep,
                ..HostPathPolicy::default()
            },
        }
    }
}

/// Why these inputs and this snapshot do not go together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The caller expects other vCPUs than the snapshot has.
    #[error("The snapshot has {snapshot} vCPUs, {wanted} were asked for")]
    Vcpus {
        /// In the snapshot.
        snapshot: u64,
        /// Asked for.
        wanted: u32,
    },
    /// The caller expects other memory than the snapshot has.
    #[error("The snapshot has {snapshot} of memory, {wanted} were asked for")]
    Memory {
        /// In the snapshot.
        snapshot: Bytes,
        /// Asked for.
        wanted: Bytes,
    },
    /// One recorded path was to be kept, but there is not exactly one disk.
    #[error("The snapshot has {disks} disks; its path can be kept only where there is one")]
    Disks {
        /// How many it has.
        disks: usize,
    },
    /// The recorded path does not lie beneath the directory that is to be covered.
    #[error("The recorded disk {} does not lie beneath {}", .recorded.display(), .sandbox_dir.display())]
    OutsideSandboxDir {
        /// The snapshot's disk.
        recorded: PathBuf,
        /// The directory.
        sandbox_dir: PathBuf,
    },
    /// The configuration names something that must not be restored.
    #[error(transparent)]
    Config(ConfigRefusal),
    /// No memory mode that was allowed can serve this snapshot.
    #[error("Memory mode {mode} cannot be used")]
    MemoryMode {
        /// The mode, the last one where several were tried.
        mode: MemoryMode,
        /// Why not.
        #[source]
        reason: Unfit,
    },
}

/// A private view of one directory for CH alone: an empty tmpfs with symbolic links in it.
///
/// For snapshots that must keep the disk path they recorded (another tool's): CH finds the
/// sandbox's own device at that path, and no other process sees anything of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrivateMount {
    /// The existing directory that the tmpfs covers.
    pub directory: PathBuf,
    /// Links beneath it: path relative to the directory, and what the link says.
    pub links: Vec<(PathBuf, PathBuf)>,
}

/// What is to be made, in the order in which it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The configuration that CH restores.
    pub config: VmConfig,
    /// What CH alone sees in place of a directory.
    pub private_mount: Option<PrivateMount>,
    /// How memory comes back.
    pub memory_mode: MemoryMode,
    /// The modes that would have come first, and why they cannot serve.
    pub passed_over: Vec<PassedOver>,
    /// What becomes of `state.json`.
    pub state: StateEdit,
    /// The guest's memory.
    pub memory: Bytes,
    /// Number of vCPUs.
    pub vcpus: u64,
    /// Whether there is a balloon to deflate.
    pub has_balloon: bool,
}

/// Works out the plan.
///
/// # Errors
/// [`PlanError`].
pub fn plan(
    inputs: &RestoreInputs,
    snapshot: &SnapshotDir,
    around: &Circumstances,
) -> Result<Plan, PlanError> {
    let recorded = snapshot.config();
    let vcpus = snapshot.state().vcpus() as u64;
    if let Some(wanted) = inputs.vcpus.filter(|wanted| u64::from(*wanted) != vcpus) {
        return Err(PlanError::Vcpus {
            snapshot: vcpus,
            wanted,
        });
    }
    let memory = snapshot.state().memory().ram();
    if let Some(wanted) = inputs.memory.filter(|wanted| *wanted != memory) {
        return Err(PlanError::Memory {
            snapshot: memory,
            wanted,
        });
    }
    let files = inputs.policy.memory_files;
    let choice = memory::choose(inputs.memory_mode, snapshot, files, around)
        .map_err(|PassedOver { mode, reason }| PlanError::MemoryMode { mode, reason })?;
    let vsock = recorded.vsock.as_ref();
    let mut overrides = ConfigOverrides {
        policy: inputs.policy,
        vsock_socket: vsock.map(|_| around.vsock_socket.clone()),
        memory: choice.backing,
        ..ConfigOverrides::default()
    };
    if let Some(tap) = &inputs.tap {
        overrides.taps.push(TapOverride {
            device: None,
            tap: TapSource::Name(tap.clone()),
        });
    }
    let private_mount = place_disk(&inputs.disk, recorded, &mut overrides)?;
    let config = rewrite(recorded, &overrides).map_err(PlanError::Config)?;
    Ok(Plan {
        has_balloon: config.balloon.is_some(),
        config,
        private_mount,
        memory_mode: choice.mode,
        passed_over: choice.passed_over,
        state: choice.state,
        memory,
        vcpus,
    })
}

/// Puts the disk where CH will look for it, and says what only CH may see.
fn place_disk(
    disk: &RootDisk,
    recorded: &VmConfig,
    overrides: &mut ConfigOverrides,
) -> Result<Option<PrivateMount>, PlanError> {
    overrides.policy.disks = match disk {
        RootDisk::At(_) => Recorded::Refuse,
        RootDisk::AsRecorded | RootDisk::AtRecordedPath { .. } => Recorded::Keep,
    };
    match disk {
        RootDisk::AsRecorded => Ok(None),
        RootDisk::At(path) => {
            overrides.disks.push(DiskOverride {
                disk: None,
                path: path.clone(),
                image_type: None,
            });
            Ok(None)
        }
        RootDisk::AtRecordedPath {
            device,
            sandbox_dir,
        } => {
            let disks = recorded.disks.as_deref().unwrap_or_default();
            let [only] = disks else {
                return Err(PlanError::Disks { disks: disks.len() });
            };
            let path = only.path.clone().unwrap_or_default();
            match path.strip_prefix(sandbox_dir) {
                Ok(link) if is_plain(link) => Ok(Some(PrivateMount {
                    directory: sandbox_dir.clone(),
                    links: vec![(link.to_owned(), device.clone())],
                })),
                _ => Err(PlanError::OutsideSandboxDir {
                    recorded: path,
                    sandbox_dir: sandbox_dir.clone(),
                }),
            }
        }
    }
}

/// At least one component, and none that leads out again.
fn is_plain(path: &Path) -> bool {
    let mut components = path.components().peekable();
    components.peek().is_some()
        && components.all(|part| matches!(part, std::path::Component::Normal(_)))
}
