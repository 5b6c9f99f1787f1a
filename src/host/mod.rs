//! The front door: a host and its sandboxes.
//!
//! ```no_run
//! use rewake::host::{Host, HostConfig, LaunchOptions, ResumeOptions};
//!
//! let host = Host::open(HostConfig::new("/var/lib/rewake"))?;
//! let python = host.template("python")?;
//! let mut sandbox = host.launch(&python, LaunchOptions::default())?; // envd has answered
//! println!("{} {}", sandbox.host_ip(), sandbox.timeline());
//! sandbox.pause()?; // frozen on disk
//! let mut sandbox = host.resume(sandbox.id(), ResumeOptions::default())?;
//! sandbox.snapshot("python-warm")?; // a new template
//! sandbox.destroy()?;
//! # Ok::<(), rewake::host::Error>(())
//! ```
//!
//! Calls block, each on the thread that makes it, and start one process at most: Cloud
//! Hypervisor. Many threads and many processes may work on one root. [`Driver`] brings many
//! sandboxes to life on one thread and its caller's own event loop.

mod driver;
mod watch;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub use driver::{Driver, Key};
pub use watch::Watch;

use crate::deadline::Deadline;
use crate::ids::{SandboxId, TemplateId};
use crate::resource::disk::{DiskStock, Progress};
use crate::restore::kit::KitPool;
use crate::sandbox::{self, Context, Source};
use crate::template::{
    self, BuildCause, BuildError, BuildNetwork, BuildProgress, BuildSpec, BuildStage, DiskPath,
    HostFacts, Template, TemplateStore, Workshop,
};
use crate::timeline::Timeline;

pub use crate::sandbox::{
    Cause, Census, Error, Full, HostConfig, LaunchOptions, Limits, Operation, PauseOptions,
    Remains, ResumeOptions, Sandbox,
};
pub use crate::snapshot::Durability;

/// A host: one root directory with its templates and sandboxes.
#[derive(Debug, Clone)]
pub struct Host {
    ctx: Arc<Context>,
    templates: Arc<TemplateStore>,
    facts: Arc<OnceLock<HostFacts>>,
}

impl Host {
    /// Opens a root and recovers what is in it: running sandboxes are adopted, paused ones
    /// registered, half-made ones undone. Blocks for some milliseconds per sandbox.
    ///
    /// # Errors
    /// [`Error`] where the root, the network or the disks cannot be used. What could not be
    /// recovered is no error: ask [`Host::recover`] for the census.
    pub fn open(config: HostConfig) -> Result<Self, Error> {
        let host = Self::open_as_it_is(config)?;
        host.ready(Deadline::NEVER)?;
        let census = host.recover(Deadline::NEVER)?;
        for (id, error) in &census.stuck {
            log::warn!("Sandbox {id}: {}", error.cause);
        }
        for remains in &census.remains {
            log::warn!("Left over: {remains}");
        }
        Ok(host)
    }

    /// Opens a root and leaves its sandboxes as they are: for looking on, and for programs
    /// that come and go while another has recovered the root. The network is readied when the
    /// first sandbox is made.
    ///
    /// # Errors
    /// As [`Host::open`].
    pub fn open_as_it_is(config: HostConfig) -> Result<Self, Error> {
        let templates = TemplateStore::open(&config.root, config.faults.clone())
            .map_err(|error| Error::of_host(Operation::Open, error.into()))?;
        Ok(Self {
            ctx: Arc::new(Context::open(config)?),
            templates: Arc::new(templates),
            facts: Arc::default(),
        })
    }

    /// Makes what sandboxes need to be made: directories, the walls of the host's network.
    /// Done by itself before the first of them; repeating it is harmless.
    ///
    /// # Errors
    /// [`Cause::File`], [`Cause::Network`].
    pub fn ready(&self, deadline: Deadline) -> Result<(), Error> {
        let deadline = self.ctx.deadline(deadline);
        self.ctx
            .ready(deadline)
            .map_err(|cause| Error::of_host(Operation::Open, cause))
    }

    /// How it is set up.
    #[must_use]
    pub fn config(&self) -> &HostConfig {
        &self.ctx.config
    }

    /// The processes that it keeps ready for launches; `None` where it was set up to keep
    /// none, or has not made anything yet.
    #[must_use]
    pub fn kits(&self) -> Option<&KitPool> {
        self.ctx.kits.get()
    }

    /// The disks that it keeps ready for launches; `None` where it was set up to keep none, or
    /// has not made anything yet.
    #[must_use]
    pub fn disk_stock(&self) -> Option<&DiskStock> {
        self.ctx.disk_stock.get()
    }

    /// Begins to keep disks ready for launches from a template, as many as
    /// [`HostConfig::disk_stock`] says; otherwise its first launch begins with that. Does not
    /// wait for them.
    ///
    /// # Errors
    /// As [`Host::ready`], and where no thread can be started.
    pub fn keep_ready(&self, template: &Template) -> Result<(), Error> {
        self.ready(Deadline::NEVER)?;
        let (Some(stock), Some(image)) = (self.disk_stock(), template.disk()) else {
            return Ok(());
        };
        let mode = self.ctx.config.disk_mode;
        stock.keep(&image, mode).map_err(|source| {
            let what = "keep disks ready of";
            let path = image.clone();
            Error::of_host(Operation::Open, Cause::File { what, path, source })
        })
    }

    /// Its templates.
    #[must_use]
    pub fn templates(&self) -> &TemplateStore {
        &self.templates
    }

    /// What this machine offers to templates. Cloud Hypervisor is asked for its version when
    /// this is wanted for the first time.
    fn facts(&self) -> &HostFacts {
        self.facts
            .get_or_init(|| HostFacts::gather(&self.ctx.config.vmm))
    }

    /// A template, checked against this machine.
    ///
    /// # Errors
    /// [`Cause::Name`], [`Cause::Template`] where there is none of that name, it is damaged,
    /// or it cannot run here.
    pub fn template(&self, name: &str) -> Result<Template, Error> {
        let failed = |cause| Error::of_host(Operation::Launch, cause);
        let name = TemplateId::new(name).map_err(|error| failed(error.into()))?;
        let template = self
            .templates
            .get(&name)
            .map_err(|error| failed(error.into()))?;
        template
            .check(self.facts())
            .map_err(|error| failed(error.into()))?;
        Ok(template)
    }

    /// Builds a template from a kernel and an image, in a network slot of this host: see
    /// [`template::build`](crate::template::build).
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left then, or it is named.
    pub fn build(
        &self,
        spec: &BuildSpec,
        progress: &mut dyn FnMut(BuildProgress),
        deadline: Deadline,
    ) -> Result<Template, BuildError> {
        self.ready(deadline).map_err(|error| BuildError {
            name: spec.name.clone(),
            stage: BuildStage::Network,
            cause: Box::new(BuildCause::Host(error)),
            log: Vec::new(),
            leftovers: Vec::new(),
        })?;
        let workshop = Workshop {
            store: &self.templates,
            disks: &self.ctx.disks,
            network: BuildNetwork::Slot(&self.ctx.net),
        };
        template::build(spec, workshop, progress, deadline)
    }

    /// A fresh sandbox from a template. When this returns, its agent has answered and was
    /// told who it is.
    ///
    /// # Errors
    /// [`Error`]; everything made for it has been undone, or is named in it.
    pub fn launch(&self, template: &Template, options: LaunchOptions) -> Result<Sandbox, Error> {
        self.ready(options.deadline)?;
        // Until the sandbox's own disk and VM keep the template, this does.
        let held = template
            .hold()
            .map_err(|error| Error::of_host(Operation::Launch, error.into()))?;
        let making = sandbox::prepare_launch(&self.ctx, &source(template), options)?;
        let launched = making.run();
        drop(held);
        launched
    }

    /// A paused sandbox goes on, with its id, its slot and its disk.
    ///
    /// # Errors
    /// [`Error`]; it is paused as before then, or lost where it may have run and written
    /// something.
    pub fn resume(&self, id: &SandboxId, options: ResumeOptions) -> Result<Sandbox, Error> {
        self.ready(options.deadline)?;
        sandbox::prepare_resume(&self.ctx, id, options)?.run()
    }

    /// Starts a Cloud Hypervisor for a paused sandbox that will be resumed soon, in its network
    /// slot: [`Host::resume`] of this host then has no process to start. Where nobody resumes
    /// it, the process ends after `wait`, and with the host; that of a host that was killed, with
    /// the next [`Host::recover`]. It takes some MiB until then.
    ///
    /// Blocks for the milliseconds that starting it takes; a resume that comes meanwhile is told
    /// that another operation is under way. Asked for again, the time begins anew.
    ///
    /// # Errors
    /// [`Error`]; the sandbox is paused as before.
    pub fn expect_resume(
        &self,
        id: &SandboxId,
        wait: Duration,
        deadline: Deadline,
    ) -> Result<(), Error> {
        self.ready(deadline)?;
        sandbox::expect(&self.ctx, id, wait, deadline)
    }

    /// Whether a process waits for the resume of a sandbox.
    #[must_use]
    pub fn expects_resume(&self, id: &SandboxId) -> bool {
        self.ctx.expected.has(id)
    }

    /// A sandbox by its id, in whatever state.
    ///
    /// # Errors
    /// [`Cause::Unknown`], and what reading its journal says.
    pub fn sandbox(&self, id: &SandboxId) -> Result<Sandbox, Error> {
        Sandbox::open(&self.ctx, id)
    }

    /// The ids of all sandboxes, in order, whatever state they are in.
    ///
    /// # Errors
    /// [`Cause::File`] where they cannot be listed.
    pub fn ids(&self) -> Result<Vec<SandboxId>, Error> {
        let root = &self.ctx.config.root;
        let listing = sandbox::list(root).map_err(|source| {
            let path = root.clone();
            let what = "list the sandboxes of";
            Error::of_host(Operation::Inspect, Cause::File { what, path, source })
        })?;
        Ok(listing.ids)
    }

    /// All sandboxes, by id. One that is destroyed meanwhile is left out.
    ///
    /// # Errors
    /// [`Cause::File`] where they cannot be listed, and what reading a journal says.
    pub fn sandboxes(&self) -> Result<Vec<Sandbox>, Error> {
        let open = |id: &SandboxId| match self.sandbox(id) {
            Err(error) if error.is_unknown() => None,
            other => Some(other),
        };
        self.ids()?.iter().filter_map(open).collect()
    }

    /// Makes the template `name` of a running sandbox, reporting how far the copy of its disk
    /// has come. See [`Sandbox::snapshot`].
    ///
    /// # Errors
    /// As [`Sandbox::snapshot`].
    pub fn snapshot(
        &self,
        sandbox: &mut Sandbox,
        name: &TemplateId,
        deadline: Deadline,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Template, Error> {
        sandbox.snapshot_to(&self.templates, name, deadline, progress)
    }

    /// Removes a sandbox by its id, whatever state it is in. One that is not there counts as
    /// removed.
    ///
    /// # Errors
    /// As [`Sandbox::destroy`].
    pub fn destroy(&self, id: &SandboxId, deadline: Deadline) -> Result<Timeline, Error> {
        sandbox::destroy(&self.ctx, id, deadline)
    }

    /// Pauses every running sandbox, `at_once` of them at the same time, for a shutdown of
    /// the machine: each is on the disk when it counts as paused. The result is what became
    /// of each.
    ///
    /// # Errors
    /// [`Cause::File`] where they cannot be listed.
    pub fn pause_all(&self, at_once: usize, deadline: Deadline) -> Result<PausedAll, Error> {
        let options = PauseOptions {
            durability: Some(Durability::Synced),
            deadline,
            ..PauseOptions::default()
        };
        let running = |sandbox: &Sandbox| {
            let story = sandbox.story();
            story.is_ok_and(|story| story.status.state == sandbox::state::State::Running)
        };
        let sandboxes: Vec<_> = self.sandboxes()?.into_iter().filter(running).collect();
        let queue = std::sync::Mutex::new(sandboxes.into_iter());
        let lock = || {
            queue
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .next()
        };
        let work = || {
            let mut done = Vec::new();
            while let Some(mut sandbox) = lock() {
                let outcome = sandbox.pause_with(options);
                done.push((sandbox.id().clone(), outcome));
            }
            done
        };
        let mut all = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..at_once.max(1)).map(|_| scope.spawn(work)).collect();
            let joined = workers.into_iter().map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            joined.flatten().collect::<Vec<_>>()
        });
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(all)
    }

    /// Looks at everything in the root and puts it right: see [`Census`]. Harmless at any
    /// time, while others work on the root as well.
    ///
    /// # Errors
    /// [`Error`] where sandboxes or slots cannot be listed.
    pub fn recover(&self, deadline: Deadline) -> Result<Census, Error> {
        let census = sandbox::recover(&self.ctx, deadline)?;
        match self.templates.sweep() {
            Ok(swept) if !swept.is_empty() => log::info!("Half-made templates removed: {swept:?}"),
            Ok(_) => {}
            Err(error) => log::warn!("Half-made templates stay: {error}"),
        }
        Ok(census)
    }

    pub(crate) const fn context(&self) -> &Arc<Context> {
        &self.ctx
    }
}

/// What became of each sandbox that [`Host::pause_all`] paused.
pub type PausedAll = Vec<(SandboxId, Result<(), Error>)>;

fn source(template: &Template) -> Source {
    let manifest = template.manifest();
    Source {
        template: Some(template.id().clone()),
        snapshot: template.snapshot_dir().to_owned(),
        base: template.disk(),
        sandbox_dir: match &manifest.disk_path {
            DiskPath::Rewritten => None,
            DiskPath::Recorded { sandbox_dir } => Some(sandbox_dir.clone()),
        },
        memory: crate::units::Bytes(manifest.memory.bytes),
        vcpus: u64::from(manifest.vcpus),
    }
}
