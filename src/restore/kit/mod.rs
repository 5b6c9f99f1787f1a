//! Warm kits: Cloud Hypervisor processes started ahead of the restores that need them.
//!
//! A kit is a directory, a CH process that idles in the network namespace it is for, the
//! API connection over which it has answered one ping, and sockets for the probes. It is
//! taken for exactly one restore ([`Restoring::begin_with`](super::Restoring::begin_with)
//! consumes it) and never used again. What is left to do then is to lay out the snapshot and
//! to make one API call: `exec`, linking, CH's seccomp filters and its threads are paid for.
//!
//! **Memory.** A process that is started cold inherits the descriptor of the memory file and
//! opens it at `/proc/self/fd/5`. A kit's process is older than the choice of the snapshot,
//! and CH takes no descriptors for memory over its API. So it opens the file through a
//! link to `/proc/OWNER/fd/N` of the program that restores: a magic link
//! that leads to exactly the file that was checked, whatever becomes of its path. Once CH has
//! answered, the link is removed, because number N may then become another file, and a guest
//! that resets itself makes CH open its memory again.
//!
//! **The lock on a memory file** must be seen by other programs and vanish with CH, not with
//! us. It belongs to an open file, and a running process cannot be handed one that it does
//! not ask for. But a descriptor in flight keeps its file open: it is sent into a socket whose only reader is CH, which does not know of it. The kernel drops the
//! letter, and the lock with it, when CH has ended.
//!
//! **Nothing outlives its owner for ever.** The directory holds a file `kit`, which the owner
//! keeps locked until a restore has taken over; the process has the directory's name in its
//! environment ([`crate::vmm::orphan`]). [`sweep`] ends what belongs to no living owner.

mod pool;
mod sweep;

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::Poll;
use rewake_sys::error::Named;
use rewake_sys::{CallError, netns};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

pub use pool::{KitPool, KitPoolOptions, KitPoolStats, Places, Warm};
pub use sweep::{KitSweep, is_kept, sweep};

use super::vm_dir::VmDir;
use crate::deadline::Deadline;
use crate::envd::ready::Prober;
use crate::envd::socket::{CurrentNetns, InNetns, Sockets};
use crate::ids::SandboxId;
use crate::resource::ledger::{Ledger, Leftover, Step};
use crate::resource::slot::ProcessIdentity;
use crate::units::Bytes;
use crate::vmm::api::{ApiError, Call, Operation, Ping};
use crate::vmm::launch::{self, ApiSocket, LaunchError, LaunchSpec, Vmm};
use crate::vmm::orphan;
use crate::wire::conn::{ConnError, Exchange, Finished, Peer, Stream};
use crate::wire::reactor::{TokenRange, drive};

/// The file that marks a directory as a kit's; its owner keeps it locked.
const CLAIM: &str = "kit";
/// The name that kits have in place of a sandbox's.
const NAME: &str = "kit";

/// Why there is no kit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KitError {
    /// A directory or file could not be made.
    #[error("Cannot make {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A socket pair, a duplicate or the probes' sockets could not be made.
    #[error("Cannot prepare a kit's descriptors")]
    Descriptors(#[source] CallError),
    /// CH could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The connection to its API cannot be used.
    #[error("Cannot use the API connection")]
    Socket(#[source] ConnError),
    /// CH did not answer its ping.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The event loop failed.
    #[error("Cannot wait for events")]
    Poll(#[source] io::Error),
}

/// A Cloud Hypervisor that idles, and what a restore needs beside it.
///
/// Dropping it ends the process and removes its directory.
#[must_use = "dropping it ends its process"]
pub struct Kit {
    vm_dir: VmDir,
    vmm: Vmm,
    api: Stream,
    build: String,
    sockets: Sockets,
    /// Our end of the socket in which descriptors are left for CH's lifetime.
    letters: UnixStream,
    /// Locked for as long as we live and the kit is nobody's.
    claim: File,
    ready_at: Instant,
    ledger: Ledger,
}

impl fmt::Debug for Kit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kit")
            .field("vm_dir", &self.vm_dir)
            .field("vmm", &self.vmm)
            .finish_non_exhaustive()
    }
}

/// Why a kit cannot be used for this restore, or not any more. It is gone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KitMisuse {
    /// The plan wants CH in a mount namespace of its own, which is chosen at its start.
    #[error("A warm process cannot be given a mount namespace")]
    PrivateMount,
    /// The steps that undo it could not be written down.
    #[error("Cannot write down what is to be undone")]
    Log(#[source] io::Error),
    /// The claim on its directory could not be given up.
    #[error("Cannot take over {vm_dir}")]
    Claim {
        /// The kit's directory.
        vm_dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The memory file could not be shown or entrusted to it.
    #[error("Cannot give a warm process its memory file")]
    Memory(#[source] CallError),
}

/// A kit whose process a ledger of a restore answers for.
pub(super) struct Taken {
    pub(super) vm_dir: VmDir,
    pub(super) vmm: Vmm,
    pub(super) api: Stream,
    pub(super) sockets: Sockets,
    pub(super) letters: UnixStream,
}

impl Kit {
    /// Starts Cloud Hypervisor in the namespace given (the caller's otherwise) and waits
    /// until its API has answered. Blocks, until the deadline at the latest.
    ///
    /// The environment gets one more variable than `spec` says, by which [`sweep`] finds the
    /// process; a private mount in it is left out, as it belongs to one sandbox.
    ///
    /// # Errors
    /// [`KitError`]; nothing is left then.
    pub fn prepare(
        spec: &LaunchSpec,
        runtime_dir: &Path,
        netns: Option<BorrowedFd<'_>>,
        deadline: Deadline,
    ) -> Result<Self, KitError> {
        let mut ledger = Ledger::new();
        let vm_dir = VmDir::choose(runtime_dir, &kit_name());
        let claim = vm_dir.create_claimed(CLAIM, &mut ledger);
        let claim = claim.map_err(|source| KitError::File {
            path: vm_dir.path().to_owned(),
            source,
        })?;
        let (letters, letterbox) = UnixStream::pair()
            .named("socketpair")
            .map_err(KitError::Descriptors)?;
        let (socket, stream) = ApiSocket::bind(&vm_dir.api_socket())?;
        let mut spec = spec.clone();
        spec.private_mount = None;
        spec.env.push(orphan::mark(vm_dir.path()));
        // The first descriptor is a memory file's in a process that was started cold: nobody
        // who looks at it later shall take the letterbox for one.
        let null = File::open("/dev/null")
            .named("open /dev/null")
            .map_err(KitError::Descriptors)?;
        let inherited = [null.as_fd(), letterbox.as_fd()];
        let vmm = launch::launch(&spec, socket, netns, &inherited, &mut ledger)?;
        // CH takes milliseconds to come up: time to make the probes' sockets.
        let sockets = sockets(netns)?;
        let stream = Stream::from_connected(stream).map_err(KitError::Socket)?;
        let (ping, api) = ping(stream, deadline)?;
        Ok(Self {
            vm_dir,
            vmm,
            api,
            build: ping.build_version,
            sockets,
            letters,
            claim,
            ready_at: Instant::now(),
            ledger,
        })
    }

    /// The process.
    #[must_use]
    pub fn process(&self) -> ProcessIdentity {
        ProcessIdentity {
            pid: self.vmm.pid(),
            start_time: self.vmm.start_time(),
        }
    }

    /// Its directory.
    #[must_use]
    pub fn vm_dir(&self) -> &Path {
        self.vm_dir.path()
    }

    /// Its version with the suffixes of its build, as it answered.
    #[must_use]
    pub fn build(&self) -> &str {
        &self.build
    }

    /// Whether the process still runs and its connection has neither ended nor been written
    /// to. Takes two system calls.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        matches!(self.vmm.process().has_ended(), Ok(false)) && self.api.is_idle()
    }

    /// What the idle process costs: its private memory, as `/proc/PID/smaps_rollup` says
    /// (clean and dirty pages that nobody shares).
    ///
    /// # Errors
    /// What reading the file says, and `InvalidData` where the lines are missing.
    pub fn private_memory(&self) -> io::Result<Bytes> {
        private_memory(self.vmm.pid())
    }

    /// What undoes the kit, for a journal that is written before a restore takes it.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        self.ledger.steps()
    }

    /// Ends the process and removes what was made for it. Blocks, until the deadline at the
    /// latest. The result is what could not be undone.
    #[must_use]
    pub fn destroy(mut self, deadline: Deadline) -> Vec<Leftover> {
        self.ledger.unwind(deadline)
    }

    /// Leaves descriptors with the process, which does not read them: their open files stay,
    /// with their locks, until it has ended.
    ///
    /// # Errors
    /// [`KitMisuse::Memory`].
    pub fn entrust(&self, fds: &[BorrowedFd<'_>]) -> Result<(), KitMisuse> {
        entrust(&self.letters, fds)
    }

    /// How long it has been ready.
    #[must_use]
    pub fn idle(&self) -> Duration {
        self.ready_at.elapsed()
    }

    pub(super) const fn place(&self) -> &VmDir {
        &self.vm_dir
    }

    /// Gives the kit to a restore. Its steps are in the restore's ledger before the claim
    /// ends, so that at every moment somebody answers for the process.
    pub(super) fn hand_over(self, ledger: &mut Ledger) -> Result<Taken, KitMisuse> {
        for step in self.ledger.release() {
            ledger.push(step);
        }
        ledger.check().map_err(KitMisuse::Log)?;
        std::fs::remove_file(self.vm_dir.path().join(CLAIM)).map_err(|source| {
            KitMisuse::Claim {
                vm_dir: self.vm_dir.path().to_owned(),
                source,
            }
        })?;
        drop(self.claim);
        Ok(Taken {
            vm_dir: self.vm_dir,
            vmm: self.vmm,
            api: self.api,
            sockets: self.sockets,
            letters: self.letters,
        })
    }
}

/// The link by which CH opens the memory file through a descriptor of ours.
///
/// It goes before that descriptor is closed, since its number may belong to another file
/// next.
pub(super) struct PassingLink {
    path: PathBuf,
}

impl PassingLink {
    pub(super) fn make(vm_dir: &VmDir, file: BorrowedFd<'_>) -> Result<Self, KitMisuse> {
        let made = || {
            // As this machine's `/proc` numbers us.
            let us = rustix::fs::readlink("/proc/self", Vec::new())?;
            let us = Path::new("/proc").join(OsStr::from_bytes(us.as_bytes()));
            let target = us.join("fd").join(file.as_raw_fd().to_string());
            rustix::fs::symlink(target, vm_dir.memory_link())
        };
        made().named("symlink").map_err(KitMisuse::Memory)?;
        Ok(Self {
            path: vm_dir.memory_link(),
        })
    }
}

impl Drop for PassingLink {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("Cannot remove {}: {error}", self.path.display());
        }
    }
}

fn kit_name() -> SandboxId {
    // Invariant: the word is a valid id.
    SandboxId::new(NAME).unwrap_or_else(|_| unreachable!("{NAME} is a valid id"))
}

fn sockets(netns: Option<BorrowedFd<'_>>) -> Result<Sockets, KitError> {
    let Some(netns) = netns else {
        return Ok(Arc::new(CurrentNetns));
    };
    let shelf = netns::tcp_sockets(netns, Prober::TOKENS).map_err(KitError::Descriptors)?;
    let netns = netns
        .try_clone_to_owned()
        .named("F_DUPFD_CLOEXEC")
        .map_err(KitError::Descriptors)?;
    Ok(Arc::new(InNetns::with_shelf(netns, shelf)))
}

/// One `vmm.ping`, and the connection for the next call.
fn ping(stream: Stream, deadline: Deadline) -> Result<(Ping, Stream), KitError> {
    let call = Call::ping();
    let tokens = TokenRange::new(0, 1);
    let mut exchange = Exchange::over_stream(stream, call.encode()?, Peer::VMM, deadline, tokens);
    let mut poll = Poll::new().map_err(KitError::Poll)?;
    let no_answer = |source| ApiError::NoAnswer {
        operation: Operation::Ping,
        source,
    };
    let Finished {
        response, stream, ..
    } = drive(&mut poll, &mut exchange)
        .map_err(KitError::Poll)?
        .map_err(no_answer)?;
    let ping = call.decode(&response)?;
    // CH keeps connections alive after every answer.
    let stream = stream.ok_or_else(|| no_answer(ConnError::Spent))?;
    Ok((ping, stream))
}

fn private_memory(pid: u32) -> io::Result<Bytes> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kilobytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    match (kilobytes("Private_Clean:"), kilobytes("Private_Dirty:")) {
        (Some(clean), Some(dirty)) => Ok(Bytes((clean + dirty) << 10)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Sends descriptors into a socket that nobody reads.
pub(super) fn entrust(letters: &UnixStream, fds: &[BorrowedFd<'_>]) -> Result<(), KitMisuse> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    // Invariant: the space was made for as many.
    let fits = control.push(SendAncillaryMessage::ScmRights(fds));
    debug_assert!(fits, "control buffer too small");
    let byte = [IoSlice::new(b".")];
    // The first letter into an empty socket: it takes one byte or fails.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(letters, &byte, &mut control, flags)
        .named("sendmsg")
        .map_err(KitMisuse::Memory)?;
    Ok(())
}
