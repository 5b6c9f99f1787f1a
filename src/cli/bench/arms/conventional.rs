//! The way that hosts go today, step by step as they do it: a process for each change to
//! network and disk, a private mount namespace made by a shell, a poll every 10 ms for the
//! socket's path, restore and resume as two calls on connections of their own, and a health
//! ticker of 100 ms whose first probe comes after its first tick.

use std::collections::BTreeMap;
use std::net::SocketAddr;
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

use super::{BUDGET, Ending, Job, Launched, millis};
use crate::cli::Failure;
use crate::cli::bench::stage::{Stage, StageError, UPLINK, run_in};

const SLOT: &str = include_str!("../../../../benches/conventional-slot.sh");
const DISK: &str = include_str!("../../../../benches/conventional-disk.sh");
/// The disk appears at its recorded path for this one process.
const RUN: &str = r#"mount --make-rprivate / &&
if [ -n "$2" ]; then mount -t tmpfs none "$1" && ln -s "$2" "$1/rootfs.raw"; fi &&
exec ip netns exec "$3" "$4" --api-socket "path=$5""#;
const PREFIX: &str = "rwb";
/// Indices that the conventional way uses, far from those handed out.
const FIRST_INDEX: u16 = 20_000;
const SOCKET_POLL: Duration = Duration::from_millis(10);
const HEALTH_TICK: Duration = Duration::from_millis(100);

pub(super) struct Running {
    child: Option<Child>,
    index: u16,
    dir: PathBuf,
    /// The name of its device-mapper disk, where it has one.
    mapped: Option<String>,
}

/// The guest was not healthy in time, or its process ended.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NotHealthy(&'static str);

pub(super) fn launch(job: &Job<'_>) -> Result<Launched, Failure> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Beside another run on this machine the names must differ: `ip netns` has one place.
    let share = (std::process::id() % 12) as u16 * 1000;
    let index = FIRST_INDEX + share + NEXT.fetch_add(1, Ordering::Relaxed) % 1000;
    let mut running = Running {
        child: None,
        index,
        dir: job.stage.dir.join(format!("conventional-{index}")),
        mapped: None,
    };
    // Everything takes place in the host's namespace, on one thread that has entered it.
    let outcome = netns::run_in(job.stage.host(), || bring_back(job, &mut running));
    let netns = netns::open(&netns::named_path(&running.namespace()));
    match (outcome, netns) {
        (Ok(Ok((took, phases))), Ok(netns)) => Ok(Launched {
            took,
            phases,
            memory_mode: None,
            timeline: None,
            netns,
            end: Ending::Conventional(Box::new(running)),
        }),
        (outcome, netns) => {
            running.end(job.stage);
            outcome?.map_err(|text| StageError::Program {
                program: "the conventional way".to_owned(),
                says: text,
            })?;
            Err(netns
                .err()
                .map_or_else(|| NotHealthy("no namespace").into(), Into::into))
        }
    }
}

type Outcome = (Duration, BTreeMap<String, f64>);

/// The error is text: it crosses a thread.
fn bring_back(job: &Job<'_>, running: &mut Running) -> Result<Outcome, String> {
    steps(job, running).map_err(|failure| match failure {
        Failure::Error(error) => {
            let mut text = error.to_string();
            let mut next = error.source();
            while let Some(cause) = next {
                text = format!("{text}: {cause}");
                next = cause.source();
            }
            text
        }
        Failure::Missing | Failure::Told(_) => "something is missing".to_owned(),
    })
}

fn steps(job: &Job<'_>, running: &mut Running) -> Result<Outcome, Failure> {
    let begun = Instant::now();
    let deadline = Deadline::after(BUDGET);
    let mut phases = BTreeMap::new();
    let mut mark = |name: &str| phases.insert(name.to_owned(), millis(begun.elapsed()));
    std::fs::create_dir(&running.dir)?;
    let index = running.index.to_string();
    shell(SLOT, &["create", PREFIX, &index, UPLINK])?;
    mark("slot_acquired");
    let disk = make_disk(job, running)?;
    mark("disk_acquired");
    let socket = running.dir.join("ch.sock");
    let child = running
        .child
        .insert(run(job, running.index, disk.as_deref(), &socket)?);
    mark("spawned");
    while UnixStream::connect(&socket).is_err() {
        if child.try_wait()?.is_some() || deadline.has_passed() {
            return Err(NotHealthy("Cloud Hypervisor's socket did not appear").into());
        }
        std::thread::sleep(SOCKET_POLL);
    }
    mark("socket_found");
    let config = RestoreConfig {
        source_url: file_url(&job.template.snapshot)?,
        memory_restore_mode: match job.mode {
            MemoryMode::Copy => MemoryRestoreMode::Copy,
            _ => MemoryRestoreMode::OnDemand,
        },
        resume: false,
        ..RestoreConfig::default()
    };
    Client::assuming(&socket, Version::V53).restore(&config, &[], deadline)?;
    mark("api_accepted");
    Client::assuming(&socket, Version::V53).resume(deadline)?;
    mark("resumed");
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
    mark("ready");
    agent.init(&init, deadline)?;
    mark("init_done");
    Ok((begun.elapsed(), phases))
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

fn make_disk(job: &Job<'_>, running: &mut Running) -> Result<Option<PathBuf>, Failure> {
    let Some(base) = &job.template.base else {
        return Ok(None);
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
        let name = format!("{PREFIX}-disk-{}", running.index);
        let bytes = std::fs::metadata(&base)?.len().to_string();
        running.mapped = Some(name.clone());
        shell(DISK, &["create", &name, &base, &at, &bytes])?;
        return Ok(Some(Path::new("/dev/mapper").join(name)));
    }
    run_here("cp", &["--reflink=auto", "--sparse=always", &base, &at])?;
    Ok(Some(store))
}

fn run(job: &Job<'_>, index: u16, disk: Option<&Path>, socket: &Path) -> Result<Child, Failure> {
    let recorded = job.template.base.as_deref().and_then(Path::parent);
    let mut command = Command::new("unshare");
    command
        .args(["-m", "--", "bash", "-c", RUN, "bash"])
        .arg(recorded.unwrap_or(Path::new("")))
        .arg(disk.unwrap_or(Path::new("")))
        .arg(namespace(index))
        .arg(program(job.stage)?)
        .arg(socket)
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

fn namespace(index: u16) -> String {
    format!("{PREFIX}-{index}")
}

impl Running {
    fn namespace(&self) -> String {
        namespace(self.index)
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
