//! A template from a kernel and an image: a guest is booted, waited for, and frozen.
//!
//! The guest boots on one memory zone that is a file of the staging directory, mapped shared:
//! its RAM is in that file already when it is frozen, and the snapshot takes milliseconds.
//! Its network is set from the kernel's command line, the same for every template, and its
//! disk is a copy-on-write view of the image, which is not touched.

mod error;
mod site;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::error::{TemplateError, about, call};
use super::facts::HostFacts;
use super::manifest::{AgentRecord, FileRecord, Kind, Lineage};
use super::stage::{Origin, Stage};
use super::store::TemplateStore;
use super::{Template, check};
use crate::deadline::Deadline;
use crate::envd::init::Init;
use crate::ids::{SandboxId, TemplateId};
use crate::resource::disk::{DiskMode, DiskPool};
use crate::resource::net::HostNet;
use crate::snapshot;
use crate::units::Bytes;
use crate::vmm::launch::LaunchSpec;
use site::Site;

pub use error::{BuildCause, BuildError, BuildLeftover, BuildStage};

/// What is to be built.
#[derive(Debug, Clone)]
pub struct BuildSpec {
    /// The template's name.
    pub name: TemplateId,
    /// The kernel: PVH ELF or bzImage.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: Option<PathBuf>,
    /// Its command line. The network is added, unless it has an `ip=` of its own.
    pub command_line: String,
    /// The image of the root disk, `/dev/vda` in the guest. It is only read.
    pub rootfs: Option<PathBuf>,
    /// How the disk is kept that the guest boots on.
    pub disk_mode: DiskMode,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: Bytes,
    /// Where the serial port's output goes: a file that CH makes or truncates. Absent: the
    /// guest has no serial port.
    pub console: Option<PathBuf>,
    /// How Cloud Hypervisor is started.
    pub vmm: LaunchSpec,
    /// Where the directory of the VM lies while it is built.
    pub runtime_dir: PathBuf,
    /// What the agent is told: user, directory, environment. Its lifecycle id is a new one.
    pub init: Init,
    /// How long the guest may take to boot.
    pub boot_budget: Duration,
}

impl BuildSpec {
    /// One vCPU, 512 MiB, the usual command line for a Linux guest.
    #[must_use]
    pub fn new(name: TemplateId, kernel: impl Into<PathBuf>, vmm: LaunchSpec) -> Self {
        Self {
            name,
            kernel: kernel.into(),
            initramfs: None,
            command_line: String::new(),
            rootfs: None,
            disk_mode: DiskMode::default(),
            vcpus: 1,
            memory: Bytes::mib(512),
            console: None,
            vmm,
            runtime_dir: PathBuf::from("/run/rewake"),
            init: Init::new(),
            boot_budget: Duration::from_secs(120),
        }
    }

    /// The command line that suits most Linux guests.
    #[must_use]
    pub const fn usual_command_line(has_disk: bool) -> &'static str {
        if has_disk {
            "console=ttyS0 quiet panic=-1 reboot=k root=/dev/vda rw"
        } else {
            "console=ttyS0 quiet panic=-1 reboot=k"
        }
    }
}

/// The way to the guest while it is built.
#[derive(Debug, Clone, Copy)]
pub enum BuildNetwork<'a> {
    /// A network slot, made for it and removed. The host must have been readied
    /// ([`HostNet::prepare`]).
    Slot(&'a HostNet),
    /// No network device: the stand-in's agent at this address.
    Direct(SocketAddr),
}

/// What a build works with.
#[derive(Debug, Clone, Copy)]
pub struct Workshop<'a> {
    /// Where the template goes.
    pub store: &'a TemplateStore,
    /// Makes the disk that the guest boots on.
    pub disks: &'a DiskPool,
    /// The way to the guest.
    pub network: BuildNetwork<'a>,
}

/// How far a build has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildProgress {
    /// What is being done.
    pub stage: BuildStage,
    /// Bytes done and bytes in all, where there is something to count.
    pub bytes: Option<(Bytes, Bytes)>,
}

/// Builds a template. Blocks for as long as the guest takes to boot, and starts one process:
/// Cloud Hypervisor, which is gone when this returns.
///
/// # Errors
/// [`BuildError`]; nothing is left, or it is named, and a sweep of the store tries again to
/// remove it.
pub fn build(
    spec: &BuildSpec,
    workshop: Workshop<'_>,
    progress: &mut dyn FnMut(BuildProgress),
    deadline: Deadline,
) -> Result<Template, BuildError> {
    let mut at = BuildStage::Check;
    let failed = |stage, cause, log, leftovers| BuildError {
        name: spec.name.clone(),
        stage,
        cause: Box::new(cause),
        log,
        leftovers,
    };
    let mut site = match Site::open(workshop, SandboxId::random()) {
        Ok(site) => site,
        Err(cause) => return Err(failed(at, cause, Vec::new(), Vec::new())),
    };
    let outcome = make(spec, &mut site, &mut at, progress, deadline);
    let log = match &outcome {
        Ok(_) => Vec::new(),
        Err(_) => site.last_words(),
    };
    let (leftovers, stage) = site.clear();
    if !leftovers.is_empty() {
        stage.leave();
        let cause = outcome.err().unwrap_or(BuildCause::LeftOver);
        return Err(failed(at, cause, log, leftovers));
    }
    let origin = outcome.map_err(|cause| failed(at, cause, log, leftovers))?;
    at = BuildStage::Publish;
    progress(BuildProgress {
        stage: at,
        bytes: None,
    });
    publish(spec, workshop.store, stage, origin)
        .map_err(|cause| failed(at, cause, Vec::new(), Vec::new()))
}

/// Everything between an empty site and a guest that is frozen in the staging directory.
fn make(
    spec: &BuildSpec,
    site: &mut Site<'_>,
    at: &mut BuildStage,
    progress: &mut dyn FnMut(BuildProgress),
    deadline: Deadline,
) -> Result<Origin, BuildCause> {
    let mut enter = |stage| {
        *at = stage;
        log::info!("Template {}: {}", spec.name, stage.name());
        progress(BuildProgress { stage, bytes: None });
    };
    enter(BuildStage::Check);
    let guest_kernel = look_at(spec, site)?;
    let mut origin = Origin::new(Kind::Built, HostFacts::of_machine());
    origin.guest_kernel = Some(guest_kernel);
    if let Some(image) = &spec.rootfs {
        enter(BuildStage::Disk);
        site.make_disk(image, spec.disk_mode, deadline)?;
        origin.lineage = Lineage {
            origin: Some(super::manifest::words(&image.display().to_string())),
            ..Lineage::default()
        };
    }
    enter(BuildStage::Network);
    site.make_network(deadline)?;
    enter(BuildStage::Launch);
    site.launch(spec, deadline)?;
    origin.vmm = Some(site.vmm_version()?);
    origin.vmm_build = site.vmm_build(deadline)?;
    enter(BuildStage::Boot);
    site.boot(spec, deadline)?;
    enter(BuildStage::Ready);
    let agent = site.await_agent(deadline.within(spec.boot_budget))?;
    origin.agent = Some(AgentRecord::from(&agent));
    enter(BuildStage::Init);
    site.init(&spec.init, deadline)?;
    enter(BuildStage::Prepare);
    site.prepare(spec.memory, deadline);
    enter(BuildStage::Freeze);
    site.freeze(deadline)?;
    enter(BuildStage::Stop);
    site.stop(deadline)?;
    if spec.rootfs.is_some() {
        enter(BuildStage::Flatten);
        let stage = BuildStage::Flatten;
        site.flatten(
            &mut |it| {
                progress(BuildProgress {
                    stage,
                    bytes: Some((it.done, it.total)),
                });
            },
            deadline,
        )?;
    }
    *at = BuildStage::Clear;
    Ok(origin)
}

/// Refuses early what would fail late.
fn look_at(spec: &BuildSpec, site: &Site<'_>) -> Result<FileRecord, BuildCause> {
    let store = site.store();
    if store.directory_of(&spec.name).exists() {
        return Err(BuildCause::Template(TemplateError::Occupied {
            id: spec.name.clone(),
        }));
    }
    if spec.memory.0 == 0 || !spec.memory.0.is_multiple_of(2 << 20) {
        return Err(BuildCause::Memory(spec.memory));
    }
    // A guest that finds no room for a page that it writes takes Cloud Hypervisor with it.
    let disk = match &spec.rootfs {
        Some(image) => DiskPool::identify(image).map_err(BuildCause::Image)?.bytes,
        None => 0,
    };
    let needed = Bytes(spec.memory.0.saturating_add(disk));
    snapshot::require_space(site.directory(), needed)?;
    let path = call(store.faults(), about("find", &spec.kernel), || {
        use rewake_sys::error::Named;
        spec.kernel.canonicalize().named("realpath")
    })?;
    let (sha256, bytes) = check::digest(&path, store.faults())?;
    Ok(FileRecord {
        path,
        bytes,
        sha256,
    })
}

fn publish(
    spec: &BuildSpec,
    store: &TemplateStore,
    stage: Stage,
    origin: Origin,
) -> Result<Template, BuildCause> {
    let manifest = stage.describe(&spec.name, origin)?;
    Ok(store.publish(stage, &manifest)?)
}
