//! The way that hosts go today, step by step as they do it: a process for each change to
//! network and disk, a private mount namespace made by a shell, a poll every 10 ms for the
//! socket's path, restore and resume as two calls on connections of their own, and a health
//! ticker of 100 ms whose first probe comes after its first tick.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::envd;
use rewake::envd::client::{Client as Agent, ClientOptions, Incarnation};
use rewake::envd::init::{Init, Lifecycle};
use rewake::ids::{SandboxId, SlotIndex};
use rewake::plan::MemoryMode;
use rewake::resource::disk::{DiskKind, DiskMode};
use rewake::vmm::api::{Client, MemoryRestoreMode, RestoreConfig, Version, file_url};
use rewake_sys::netns;

use super::{BUDGET, Ending, Job, Launched, Timed, millis, mode_of};
use crate::cli::Failure;
use crate::cli::bench::run::words;
use crate::cli::bench::stage::{Stage, StageError, UPLINK, run_in};

const SLOT: &str = include_str!("../../../../benches/conventional-slot.sh");
const DISK: &str = include_str!("../../../../benches/conventional-disk.sh");
/// The disk appears at its recorded path for this one process.
const RUN: &str = r#"mount --make-rprivate / &&
if [ -n "$2" ]; then mount -t tmpfs none "${1%/*}" && ln -s "$2" "$1"; fi &&
exec ip netns exec "$3" ${6:+env "$6"} "$4" --api-socket "path=$5""#;
const PREFIX: &str = "rwb";
/// Indices that the conventional way uses, far from those handed out.
const FIRST_INDEX: u16 = 20_000;
/// As many are there, one after the other.
const INDICES: u16 = 10_000;
const SOCKET_POLL: Duration = Duration::from_millis(10);
const HEALTH_TICK: Duration = Duration::from_millis(100);

pub(super) struct Running {
    child: Option<Child>,
    index: u16,
    dir: PathBuf,
    disk: Option<PathBuf>,
    /// The name of its device-mapper disk, where it has one.
    mapped: Option<String>,
    /// How often it has been paused.
    pauses: u32,
}

/// A guest that is paused and resumed.
pub(in crate::cli::bench) struct Life {
    running: Running,
    /// Where its guest is asked.
    pub(in crate::cli::bench) netns: OwnedFd,
    /// What its launch took, and the phases.
    pub(in crate::cli::bench) launched: Timed,
}

impl Life {
    pub(in crate::cli::bench) fn begin(job: &Job<'_>) -> Result<Self, Failure> {
        let mut running = Running::new(job.stage);
        // Everything takes place in the host's namespace, on one thread that has entered it.
        let outcome = netns::run_in(job.stage.host(), || bring_up(job, &mut running));
        let netns = netns::open(&netns::named_path(&running.namespace()));
        match (outcome, netns) {
            (Ok(Ok(launched)), Ok(netns)) => Ok(Self {
                running,
                netns,
                launched,
            }),
            (outcome, netns) => {
                running.end(job.stage);
                outcome?.map_err(told)?;
                Err(netns
                    .err()
                    .map_or_else(|| NotHealthy("no namespace").into(), Into::into))
            }
        }
    }

    /// How its guest's memory really came back.
    pub(in crate::cli::bench) fn memory_mode(&self, job: &Job<'_>) -> Result<MemoryMode, Failure> {
        let child = self.running.child.as_ref().ok_or(StageError::NoMode)?;
        mode_of(job, child.id(), job.mode)
    }

    /// The snapshot that the next resume comes from.
    pub(in crate::cli::bench) fn snapshot(&self, job: &Job<'_>) -> PathBuf {
        self.running.snapshot(job)
    }

    /// Stands the guest still, writes all of it, and ends the process.
    pub(in crate::cli::bench) fn pause(&mut self, job: &Job<'_>) -> Result<Timed, Failure> {
        let deadline = Deadline::after(BUDGET);
        let mut clock = Clock::start();
        let socket = self.running.socket();
        Client::assuming(&socket, Version::V53).pause(deadline)?;
        clock.mark("vcpus_paused");
        self.running.pauses += 1;
        let snapshot = self.running.snapshot(job);
        std::fs::create_dir(&snapshot)?;
        Client::assuming(&socket, Version::V53).snapshot(&snapshot, deadline)?;
        clock.mark("snapshot_written");
        if let Some(mut child) = self.running.child.take() {
            child.kill()?;
            child.wait()?;
        }
        clock.mark("vmm_gone");
        Ok(clock.stop())
    }

    /// Brings it back from what the pause wrote.
    pub(in crate::cli::bench) fn resume(&mut self, job: &Job<'_>) -> Result<Timed, Failure> {
        let running = &mut self.running;
        let outcome = netns::run_in(job.stage.host(), || {
            let mut clock = Clock::start();
            revive(job, running, &mut clock)
                .map(|()| clock.stop())
                .map_err(|failure| words(&failure))
        });
        let outcome = outcome?.map_err(told)?;
        // The one before is of no use any more.
        if running.pauses > 1 {
            let before = running.dir.join(format!("snapshot-{}", running.pauses - 1));
            std::fs::remove_dir_all(before)?;
        }
        Ok(outcome)
    }

    pub(in crate::cli::bench) fn end(self, stage: &Stage) -> Vec<String> {
        self.running.end(stage)
    }
}

/// The name of a slot's namespace.
fn namespace(index: u16) -> String {
    format!("{PREFIX}-{index}")
}

/// The guest was not healthy in time, or its process ended.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NotHealthy(&'static str);

pub(super) fn launch(job: &Job<'_>) -> Result<Launched, Failure> {
    let life = Life::begin(job)?;
    let memory_mode = match life.memory_mode(job) {
        Ok(mode) => mode,
        Err(failure) => {
            life.end(job.stage);
            return Err(failure);
        }
    };
    let Life {
        running,
        netns,
        launched: (took, phases),
    } = life;
    Ok(Launched {
        took,
        phases,
        memory_mode,
        timeline: None,
        netns,
        end: Ending::Conventional(Box::new(running)),
    })
}

struct Clock {
    begun: Instant,
    phases: BTreeMap<String, f64>,
}

impl Clock {
    fn start() -> Self {
        Self {
            begun: Instant::now(),
            phases: BTreeMap::new(),
        }
    }

    fn mark(&mut self, phase: &str) {
        let at = millis(self.begun.elapsed());
        self.phases.insert(phase.to_owned(), at);
    }

    fn stop(self) -> Timed {
        (self.begun.elapsed(), self.phases)
    }
}

fn told(says: String) -> StageError {
    StageError::Program {
        program: "the conventional way".to_owned(),
        says,
    }
}

/// The error is text: it crosses a thread.
fn bring_up(job: &Job<'_>, running: &mut Running) -> Result<Timed, String> {
    let mut clock = Clock::start();
    let mut steps = || {
        std::fs::create_dir(&running.dir)?;
        let index = running.index.to_string();
        shell(SLOT, &["create", PREFIX, &index, UPLINK])?;
        clock.mark("slot_acquired");
        make_disk(job, running)?;
        clock.mark("disk_acquired");
        revive(job, running, &mut clock)
    };
    steps().map_err(|failure| words(&failure))?;
    Ok(clock.stop())
}

/// From a network and a disk to a guest that has taken `/init`.
fn revive(job: &Job<'_>, running: &mut Running, clock: &mut Clock) -> Result<(), Failure> {
    let deadline = Deadline::after(BUDGET);
    let (socket, snapshot) = (running.socket(), running.snapshot(job));
    let child = run(job, running, &socket)?;
    let child = running.child.insert(child);
    clock.mark("spawned");
    while UnixStream::connect(&socket).is_err() {
        if child.try_wait()?.is_some() || deadline.has_passed() {
            return Err(NotHealthy("Cloud Hypervisor's socket did not appear").into());
        }
        std::thread::sleep(SOCKET_POLL);
    }
    clock.mark("socket_found");
    let config = RestoreConfig {
        source_url: file_url(&snapshot)?,
        memory_restore_mode: match job.mode {
            MemoryMode::Copy => MemoryRestoreMode::Copy,
            _ => MemoryRestoreMode::OnDemand,
        },
        resume: false,
        ..RestoreConfig::default()
    };
    Client::assuming(&socket, Version::V53).restore(&config, &[], deadline)?;
    clock.mark("api_accepted");
    Client::assuming(&socket, Version::V53).resume(deadline)?;
    clock.mark("resumed");
    let init = Init::new();
    let agent = agent(job.stage, running.index, init.lifecycle)?;
    loop {
        std::thread::sleep(HEALTH_TICK);
        if agent.health(deadline.within(HEALTH_TICK)).is_ok() {
            break;
        }
        if child.try_wait()?.is_some() || deadline.has_passed() {
            return Err(NotHealthy("The guest did not become healthy").into());
        }
    }
    clock.mark("ready");
    agent.init(&init, deadline)?;
    clock.mark("init_done");
    Ok(())
}

/// The guest under the address by which the host reaches it, through NAT.
fn agent(stage: &Stage, index: u16, lifecycle: Lifecycle) -> Result<Agent, Failure> {
    let plan = stage.net.config().slot(SlotIndex::new(index)?);
    let incarnation = Incarnation {
        sandbox: SandboxId::random(),
        lifecycle,
    };
    let target = SocketAddr::from((plan.host_address, envd::PORT));
    Ok(Agent::new(target, incarnation, ClientOptions::default()))
}

fn make_disk(job: &Job<'_>, running: &mut Running) -> Result<(), Failure> {
    let Some(base) = &job.template.base else {
        return Ok(());
    };
    let store = running.dir.join("rootfs.cow");
    let (base, at) = (base.display().to_string(), store.display().to_string());
    let mapper = Path::new("/dev/mapper/control").exists();
    if mapper
        && matches!(
            job.disk,
            DiskMode::Auto | DiskMode::Only(DiskKind::DmSnapshot)
        )
    {
        let name = format!("{PREFIX}-{}-{}", job.stage.tag, running.index);
        let bytes = std::fs::metadata(&base)?.len().to_string();
        running.mapped = Some(name.clone());
        job.stage.will_bind(Path::new(&base))?;
        shell(DISK, &["create", &name, &base, &at, &bytes])?;
        let node = Path::new("/dev/mapper").join(&name);
        // Where no udev runs, nobody makes it.
        if !node.exists() {
            run_here("dmsetup", &["mknodes", &name])?;
        }
        running.disk = Some(node);
        return Ok(());
    }
    run_here("cp", &["--reflink=auto", "--sparse=always", &base, &at])?;
    running.disk = Some(store);
    Ok(())
}

fn run(job: &Job<'_>, running: &Running, socket: &Path) -> Result<Child, Failure> {
    let recorded = job.template.recorded.as_deref();
    let mut command = Command::new("unshare");
    command
        .args(["-m", "--", "bash", "-c", RUN, "bash"])
        .arg(recorded.unwrap_or(Path::new("")))
        .arg(running.disk.as_deref().unwrap_or(Path::new("")))
        .arg(running.namespace())
        .arg(program(job.stage)?)
        .arg(socket)
        .arg(job.stage.actor.variable())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Ok(command.spawn()?)
}

/// The stand-in goes by its name: `ip netns exec` cannot give it another one.
fn program(stage: &Stage) -> Result<PathBuf, Failure> {
    let spec = &stage.actor.spec;
    let Some(name) = &spec.name else {
        return Ok(spec.program.clone());
    };
    let link = stage.dir.join(name);
    if !link.exists() {
        std::os::unix::fs::symlink(&spec.program, &link)?;
    }
    Ok(link)
}

fn shell(script: &str, arguments: &[&str]) -> Result<(), StageError> {
    let all = [&["-c", script, "conventional"], arguments].concat();
    run_here("sh", &all)
}

fn run_here(program: &str, arguments: &[&str]) -> Result<(), StageError> {
    let output = Command::new(program).args(arguments).output();
    let failed = |says: String| StageError::Program {
        program: format!(
            "{program} {}",
            arguments.last().copied().unwrap_or_default()
        ),
        says,
    };
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(failed(stderr.trim().to_owned()))
}

impl Running {
    fn new(stage: &Stage) -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        // Network and names are the run's own, so nobody else has any.
        let index = FIRST_INDEX + NEXT.fetch_add(1, Ordering::Relaxed) % INDICES;
        Self {
            child: None,
            index,
            dir: stage.dir.join(format!("conventional-{index}")),
            disk: None,
            mapped: None,
            pauses: 0,
        }
    }

    fn namespace(&self) -> String {
        namespace(self.index)
    }

    fn socket(&self) -> PathBuf {
        self.dir.join(format!("ch-{}.sock", self.pauses))
    }

    /// What it comes from: the template's snapshot, or its own.
    fn snapshot(&self, job: &Job<'_>) -> PathBuf {
        match self.pauses {
            0 => job.template.plain.clone(),
            pauses => self.dir.join(format!("snapshot-{pauses}")),
        }
    }

    pub(super) fn end(mut self, stage: &Stage) -> Vec<String> {
        let mut left = Vec::new();
        if let Some(child) = &mut self.child {
            let ended = child.kill().and_then(|()| child.wait());
            left.extend(ended.err().map(|error| format!("a process: {error}")));
        }
        let index = self.index.to_string();
        let destroy = [
            "-c",
            SLOT,
            "conventional",
            "destroy",
            PREFIX,
            &index,
            UPLINK,
        ];
        left.extend(
            run_in(stage.host(), "sh", &destroy)
                .err()
                .map(|it| it.to_string()),
        );
        if let Some(name) = &self.mapped {
            let store = self.dir.join("rootfs.cow").display().to_string();
            left.extend(
                shell(DISK, &["remove", name, &store])
                    .err()
                    .map(|it| it.to_string()),
            );
        }
        left.extend(
            std::fs::remove_dir_all(&self.dir)
                .err()
                .map(|it| it.to_string()),
        );
        left
    }
}
