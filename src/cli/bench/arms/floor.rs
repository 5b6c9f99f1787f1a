//! The limit that we chase: a process, one request that waits for it, and a guest that
//! answers once. Slot, disk and a snapshot directory that fits both were made before the
//! clock starts; nothing is checked, nothing is watched, nobody is told `/init`.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rewake::deadline::Deadline;
use rewake::envd::hedge::Hedge;
use rewake::envd::ready::{Prober, await_ready};
use rewake::envd::socket::{InNetns, Sockets};
use rewake::ids::SandboxId;
use rewake::plan::{
    Circumstances, MemoryMode, MemoryPolicy, RestoreInputs, RootDisk, StateEdit, plan,
};
use rewake::resource::disk::Disk;
use rewake::resource::ledger::{Ledger, Step};
use rewake::resource::net::Slot;
use rewake::snapshot::{RunDir, RunFiles, SnapshotDir, SnapshotLimits};
use rewake::vmm::launch::{ApiSocket, launch as start};
use rewake_sys::netns;
use rewake_sys::process::Process;

use super::{
    BUDGET, Ending, Job, Launched, Timed, make_disk, millis, mode_of, remove_disk, remove_slot,
};
use crate::cli::Failure;
use crate::cli::bench::stage::{Stage, StageError};

/// What exists before the clock starts.
pub(in crate::cli::bench) struct Set {
    slot: Slot,
    disk: Option<Disk>,
    sockets: Sockets,
    socket: PathBuf,
    request: String,
    ledger: Ledger,
}

pub(in crate::cli::bench) struct Running {
    slot: Slot,
    disk: Option<Disk>,
    ledger: Ledger,
    process: Option<Process>,
    socket: PathBuf,
}

impl Running {
    /// Where its guest is asked.
    pub(in crate::cli::bench) fn netns(&self) -> BorrowedFd<'_> {
        self.slot.netns()
    }

    /// The socket of its API.
    pub(in crate::cli::bench) fn socket(&self) -> &Path {
        &self.socket
    }

    /// How its guest's memory really came back.
    pub(in crate::cli::bench) fn memory_mode(&self, job: &Job<'_>) -> Result<MemoryMode, Failure> {
        let process = self.process.as_ref().ok_or(StageError::NoMode)?;
        mode_of(job, process.pid(), job.mode)
    }

    /// Kills its process and waits until that is dead.
    pub(in crate::cli::bench) fn kill(&self) -> Result<(), Failure> {
        let Some(process) = &self.process else {
            return Ok(());
        };
        process.kill()?;
        if process.wait_ended(Some(BUDGET))? {
            return Ok(());
        }
        Err(Refused("a process that does not die".to_owned()).into())
    }

    pub(in crate::cli::bench) fn end(mut self, stage: &Stage) -> Vec<String> {
        let leftovers = self.ledger.unwind(Deadline::after(BUDGET));
        let mut left: Vec<_> = leftovers.iter().map(ToString::to_string).collect();
        left.extend(remove_disk(stage, self.disk));
        left.extend(remove_slot(stage, self.slot));
        left
    }
}

impl Set {
    /// Removes what was made for a launch that does not come; says what is left.
    pub(in crate::cli::bench) fn discard(self, stage: &Stage) -> Vec<String> {
        let Self {
            slot,
            disk,
            ledger,
            socket,
            ..
        } = self;
        let running = Running {
            slot,
            disk,
            ledger,
            process: None,
            socket,
        };
        running.end(stage)
    }
}

/// CH did not do as it was told.
#[derive(Debug, thiserror::Error)]
#[error("Cloud Hypervisor answered with {0:?}")]
struct Refused(String);

pub(in crate::cli::bench) fn prepare(job: &Job<'_>) -> Result<Set, Failure> {
    let id = SandboxId::random();
    let slot = job.stage.net.create(id.as_str(), Deadline::after(BUDGET))?;
    match lay_out(job, &id) {
        Ok((disk, dir, request, ledger)) => {
            let shelf = netns::tcp_sockets(slot.netns(), Prober::TOKENS)?;
            let netns = slot.netns().try_clone_to_owned()?;
            Ok(Set {
                sockets: Arc::new(InNetns::with_shelf(netns, shelf)),
                slot,
                disk,
                socket: dir.join("api.sock"),
                request,
                ledger,
            })
        }
        Err(failure) => {
            remove_slot(job.stage, slot);
            Err(failure)
        }
    }
}

/// A directory that CH restores as it is, and the request for it.
#[allow(
    clippy::type_complexity,
    reason = "taken apart at once by the only caller"
)]
fn lay_out(
    job: &Job<'_>,
    id: &SandboxId,
) -> Result<(Option<Disk>, PathBuf, String, Ledger), Failure> {
    let mut ledger = Ledger::new();
    let dir = job.stage.run.join(format!("floor-{id}"));
    ledger.push(Step::Directory { path: dir.clone() });
    std::fs::create_dir(&dir)?;
    let disk = make_disk(job, id)?;
    let mut inputs = RestoreInputs::new(id.clone(), &job.template.snapshot);
    inputs.memory_mode = MemoryPolicy::Only(job.mode);
    if let Some(disk) = &disk {
        inputs.disk = RootDisk::At(disk.path().to_owned());
    }
    let snapshot = SnapshotDir::open(&job.template.snapshot, &SnapshotLimits::default())?;
    let memory = memory_file(&job.template.snapshot);
    let around = Circumstances {
        memory_path: memory.clone(),
        ..Circumstances::default()
    };
    let plan = plan(&inputs, &snapshot, &around)?;
    let state = match &plan.state {
        StateEdit::Mapped(layout) => Some(snapshot.state().mapped_from_file(layout)?),
        _ => None,
    };
    let source = dir.join("snapshot");
    RunDir::create(
        &source,
        &RunFiles {
            config: &plan.config,
            state: state.as_deref().unwrap_or(snapshot.state().as_bytes()),
            memory: state.is_none().then_some(memory.as_path()),
        },
    )?;
    let mode = match job.mode {
        MemoryMode::OnDemand => "OnDemand",
        _ => "Copy",
    };
    let body = format!(
        r#"{{"source_url":"file://{}","memory_restore_mode":"{mode}","resume":true}}"#,
        source.display()
    );
    let request = format!(
        "PUT /api/v1/vm.restore HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    Ok((disk, dir, request, ledger))
}

pub(super) fn launch(job: &Job<'_>, set: Set) -> Result<Launched, Failure> {
    let (running, (took, phases)) = begin(job, set)?;
    let known = (|| {
        Ok((
            running.memory_mode(job)?,
            running.netns().try_clone_to_owned()?,
        ))
    })();
    match known {
        Ok((memory_mode, netns)) => Ok(Launched {
            took,
            phases,
            memory_mode,
            timeline: None,
            netns,
            end: Ending::Floor(Box::new(running)),
        }),
        Err(failure) => {
            running.end(job.stage);
            Err(failure)
        }
    }
}

/// A guest that has answered, and what that took.
pub(in crate::cli::bench) fn begin(job: &Job<'_>, set: Set) -> Result<(Running, Timed), Failure> {
    let Set {
        slot,
        disk,
        sockets,
        socket,
        request,
        mut ledger,
    } = set;
    let outcome = race(job, &slot, sockets, &socket, &request, &mut ledger);
    let mut running = Running {
        slot,
        disk,
        ledger,
        process: None,
        socket,
    };
    match outcome {
        Ok((process, outcome)) => {
            running.process = Some(process);
            Ok((running, outcome))
        }
        Err(failure) => {
            running.end(job.stage);
            Err(failure)
        }
    }
}

/// Until the API and the guest have both answered.
fn race(
    job: &Job<'_>,
    slot: &Slot,
    sockets: Sockets,
    path: &Path,
    request: &str,
    ledger: &mut Ledger,
) -> Result<(Process, Timed), Failure> {
    let mut spec = job.vmm_spec();
    let begun = Instant::now();
    let (socket, mut stream) = ApiSocket::bind(path)?;
    stream.write_all(request.as_bytes())?;
    spec.without_events = true;
    let vmm = start(&spec, socket, Some(slot.netns()), &[], ledger)?;
    let spawned = begun.elapsed();
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(BUDGET))?;
    let guest = job.stage.guest();
    let (accepted, ready) = std::thread::scope(|scope| {
        let api = scope.spawn(move || answer(&mut stream).map(|()| begun.elapsed()));
        let pidfd = Some(vmm.process().as_fd());
        let deadline = Deadline::after(BUDGET);
        let ready = await_ready(guest, sockets, Hedge::default(), deadline, pidfd);
        (api.join(), ready)
    });
    let accepted = accepted.unwrap_or_else(|_| Err(Refused("a panic".to_owned()).into()))?;
    let ready = ready?.at.saturating_duration_since(begun);
    let phases = [
        ("spawned", spawned),
        ("api_accepted", accepted),
        ("ready", ready),
    ];
    let phases = phases.map(|(name, at)| (name.to_owned(), millis(at)));
    let process = Process::open(vmm.pid())?;
    let took = accepted.max(ready);
    Ok((process, (took, phases.into_iter().collect())))
}

fn answer(stream: &mut UnixStream) -> Result<(), FloorError> {
    let mut bytes = [0; 512];
    let count = stream.read(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes[..count]);
    if text.starts_with("HTTP/1.1 204") {
        return Ok(());
    }
    Err(Refused(text.lines().next().unwrap_or_default().to_owned()).into())
}

/// Why the API side failed.
#[derive(Debug, thiserror::Error)]
enum FloorError {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("Cannot read CH's answer")]
    Read(#[from] std::io::Error),
}

/// The file that guest memory is in.
pub(in crate::cli::bench) fn memory_file(snapshot: &Path) -> PathBuf {
    let zone = snapshot.join("memory");
    if zone.exists() {
        return zone;
    }
    snapshot.join("memory-ranges")
}
