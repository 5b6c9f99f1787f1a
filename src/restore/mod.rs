//! The one sequence that brings a VM back: plan → create from snapshot → resume → wait for
//! envd → deflate the balloon; and `/init`, where the caller asks for it.
//!
//! [`restore`] blocks until the guest agent has answered. [`Restoring`] is the same as a
//! [`Machine`](crate::wire::reactor::Machine), for callers with an event loop of their own.
//!
//! Whatever fails, the partial VM is destroyed and everything that was made is unmade,
//! before the error is returned; what could not be unmade is named in it.

mod api;
mod error;
pub mod kit;
mod machine;
mod memory;
mod netns;
mod start;
mod vm_dir;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mio::Poll;

pub use error::{Cause, RestoreError, Stage};
pub use machine::Restoring;
pub use netns::Netns;
pub use vm_dir::VmDir;

use self::kit::Kit;
use crate::deadline::Deadline;
use crate::envd::client::Acknowledged;
use crate::envd::dialect::Agent;
use crate::envd::hedge::Hedge;
use crate::envd::init::Init;
use crate::envd::socket::Sockets;
use crate::ids::SandboxId;
use crate::plan::{MemoryMode, RestoreInputs};
use crate::resource::ledger::{Ledger, Leftover, Step, StepLog};
use crate::snapshot::SnapshotLimits;
use crate::timeline::Timeline;
use crate::units::Bytes;
use crate::vmm::api::Version;
use crate::vmm::launch::{LaunchSpec, Vmm};
use crate::wire::reactor::{TokenRange, drive};

/// Everything that one restore needs to know.
#[derive(Debug, Clone)]
pub struct RestoreSpec {
    /// What comes to life, from what.
    pub inputs: RestoreInputs,
    /// How Cloud Hypervisor is started.
    pub vmm: LaunchSpec,
    /// Where the directories of running VMs lie; `/run/rewake` by default.
    pub runtime_dir: PathBuf,
    /// The network namespace that CH starts in and the guest is reached from. Absent: the
    /// caller's.
    pub netns: Option<Netns>,
    /// Where envd listens, seen from that namespace.
    pub guest: SocketAddr,
    /// How readiness is probed.
    pub hedge: Hedge,
    /// Bounds on what is read from the snapshot directory.
    pub snapshot_limits: SnapshotLimits,
    /// What to tell the agent once it is ready; absent: nothing. A failure then fails the
    /// restore: nothing the guest says counts before this was acknowledged.
    pub init: Option<Init>,
    /// How long each part may take.
    pub budgets: Budgets,
    /// Where the steps that undo it are written down, before each thing exists.
    pub log: Option<Arc<dyn StepLog>>,
    /// What must have happened before the vCPUs may run. It is called while CH starts.
    pub gate: Option<Gate>,
    /// The operation that this restore is a part of; absent: it begins now.
    pub timeline: Option<Timeline>,
}

/// A last word before the vCPUs may run: called once, after CH was started and before it is
/// told to restore, so that it costs nothing while CH comes up. An error ends the restore.
#[derive(Clone)]
pub struct Gate(pub Arc<dyn Fn() -> io::Result<()> + Send + Sync>);

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}

impl RestoreSpec {
    /// A restore with default limits, under `/run/rewake`, in the caller's namespace.
    #[must_use]
    pub fn new(inputs: RestoreInputs, program: impl Into<PathBuf>, guest: SocketAddr) -> Self {
        Self {
            inputs,
            vmm: LaunchSpec {
                program: program.into(),
                ..LaunchSpec::default()
            },
            runtime_dir: PathBuf::from("/run/rewake"),
            netns: None,
            guest,
            hedge: Hedge::default(),
            snapshot_limits: SnapshotLimits::default(),
            init: None,
            budgets: Budgets::default(),
            log: None,
            gate: None,
            timeline: None,
        }
    }
}

/// How long the parts of a restore may take, within the caller's deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budgets {
    /// From the start of CH until its answer to `vm.restore`, for a guest without memory.
    pub api: Duration,
    /// More of that for each GiB that `Copy` reads.
    pub copy_per_gib: Duration,
    /// From CH's answer until envd's; absent: 120 s, or 8 s per GiB where that is more.
    pub ready: Option<Duration>,
    /// For the balloon, which is best effort.
    pub balloon: Duration,
}

impl Default for Budgets {
    fn default() -> Self {
        Self {
            api: Duration::from_secs(30),
            copy_per_gib: Duration::from_secs(10),
            ready: None,
            balloon: Duration::from_secs(1),
        }
    }
}

impl Budgets {
    fn for_api(&self, mode: MemoryMode, memory: Bytes) -> Duration {
        let gib = u32::try_from(memory.gib_rounded_up()).unwrap_or(u32::MAX);
        match mode {
            MemoryMode::Shared | MemoryMode::Map | MemoryMode::OnDemand => self.api,
            MemoryMode::Copy => self.api + self.copy_per_gib.saturating_mul(gib),
        }
    }
}

/// A VM that runs and whose agent has answered.
///
/// It holds the ledger: dropping it destroys the VM. [`Restored::into_parts`] hands both
/// over.
#[must_use = "dropping it destroys the VM"]
pub struct Restored {
    /// Whose VM it is.
    pub sandbox_id: SandboxId,
    /// The process.
    pub vmm: Vmm,
    /// Its version, from `vmm.ping`.
    pub version: Version,
    /// Its version with the suffixes of its build. The stand-in says here what it is.
    pub build: String,
    /// How memory came back, in truth. Why not in a better way is in the timeline's notes.
    pub memory_mode: MemoryMode,
    /// The guest's memory.
    pub memory: Bytes,
    /// Who answered.
    pub agent: Agent,
    /// Where sockets come from that reach it.
    pub sockets: Sockets,
    /// What it said to `/init`, where that was asked for.
    pub init: Option<Acknowledged>,
    /// The directory with its API socket.
    pub vm_dir: PathBuf,
    /// When what was reached.
    pub timeline: Timeline,
    ledger: Ledger,
}

impl Restored {
    /// Whether the stand-in plays Cloud Hypervisor here, and not the real thing.
    #[must_use]
    pub fn is_stand_in(&self) -> bool {
        self.build.contains("stand-in")
    }

    /// The process, and the steps that destroy it and what was made for it. From here on
    /// the caller answers for them.
    #[must_use]
    pub fn into_parts(self) -> (Vmm, Vec<Step>) {
        (self.vmm, self.ledger.release())
    }

    /// Destroys the VM and removes what was made for it. Blocks, until the deadline at the
    /// latest. The result is what could not be undone.
    #[must_use]
    pub fn destroy(mut self, deadline: Deadline) -> Vec<Leftover> {
        self.ledger.unwind(deadline)
    }
}

/// Restores a VM and waits until its agent has answered. Blocks the calling thread, until
/// the deadline at the latest, and starts one process: Cloud Hypervisor.
///
/// # Errors
/// [`RestoreError`]: stage, cause, CH's last words, and what could not be undone.
pub fn restore(spec: &RestoreSpec, deadline: Deadline) -> Result<Restored, RestoreError> {
    restore_with(spec, None, deadline)
}

/// The same on the process of a warm kit, where there is one. Starts no process then.
///
/// # Errors
/// As [`restore`].
pub fn restore_with(
    spec: &RestoreSpec,
    kit: Option<Kit>,
    deadline: Deadline,
) -> Result<Restored, RestoreError> {
    let tokens = TokenRange::new(0, Restoring::TOKENS);
    let mut restoring = Restoring::begin_with(spec, kit, deadline, tokens)?;
    let mut poll = match Poll::new() {
        Ok(poll) => poll,
        Err(error) => return Err(restoring.abandon(Cause::Poll(error))),
    };
    match drive(&mut poll, &mut restoring) {
        Ok(outcome) => outcome,
        Err(error) => Err(restoring.abandon(Cause::Poll(error))),
    }
}

/// How long undoing may take, whatever became of the caller's deadline: nothing may be left.
const UNDO_BUDGET: Duration = Duration::from_secs(10);
/// Lines of CH's log that an error quotes.
const QUOTED_LINES: usize = 5;

/// Destroys a partial VM and makes the error that says so.
fn undo(
    sandbox_id: SandboxId,
    stage: Stage,
    cause: Cause,
    vmm: Option<Vmm>,
    mut ledger: Ledger,
    timeline: Timeline,
) -> RestoreError {
    let leftovers = ledger.unwind(Deadline::after(UNDO_BUDGET));
    let log = vmm.map(|mut vmm| {
        // What it wrote until it was ended.
        vmm.drain_log();
        vmm.log.last_lines(QUOTED_LINES)
    });
    RestoreError {
        sandbox_id,
        stage,
        cause: Box::new(cause),
        log: log.unwrap_or_default(),
        leftovers,
        timeline: Box::new(timeline),
    }
}
