//! Which memory mode a restore uses, and why not a better one.

use std::fmt;

use rewake_sys::CallError;
use rustix::io::Errno;

use crate::snapshot::{
    MemoryBacking, MemoryFile, MemoryLayout, MemorySource, NotMappable, Recorded, SnapshotDir,
    ZONE_FILE,
};
use crate::units::Bytes;
use crate::vmm::api::{Features, Version};

/// How guest memory comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MemoryMode {
    /// The memory file is mapped, and written to: restore and the next pause take the same
    /// time whatever the size. For a sandbox's own file only.
    Shared,
    /// The memory file is mapped privately, copy-on-write: constant restore time, and clones
    /// share what none of them has written. The next pause writes all memory.
    Map,
    /// CH serves pages as they are touched, through userfaultfd. Constant restore time.
    OnDemand,
    /// CH reads all of it first. Restore time grows with it.
    Copy,
}

impl MemoryMode {
    /// All of them, the one that costs least first.
    pub const ALL: [Self; 4] = [Self::Shared, Self::Map, Self::OnDemand, Self::Copy];

    /// The word that people type and programs read.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Map => "map",
            Self::OnDemand => "on-demand",
            Self::Copy => "copy",
        }
    }

    /// Whether CH maps the memory file, and so needs it for as long as it runs.
    #[must_use]
    pub const fn maps_file(self) -> bool {
        matches!(self, Self::Shared | Self::Map)
    }
}

impl fmt::Display for MemoryMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the caller wants of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryPolicy {
    /// The best mode that snapshot, CH and host can serve.
    Auto {
        /// The snapshot's memory belongs to this sandbox alone, which may write to it.
        owned: bool,
    },
    /// This one, or an error that says why not.
    Only(MemoryMode),
}

impl Default for MemoryPolicy {
    /// The best mode, for memory that belongs to others too.
    fn default() -> Self {
        Self::Auto { owned: false }
    }
}

impl From<MemoryMode> for MemoryPolicy {
    fn from(mode: MemoryMode) -> Self {
        Self::Only(mode)
    }
}

impl MemoryPolicy {
    /// The modes that come into question, best first.
    #[must_use]
    pub fn candidates(self) -> &'static [MemoryMode] {
        const ALL: &[MemoryMode] = &MemoryMode::ALL;
        match self {
            Self::Auto { owned: true } => ALL,
            Self::Auto { owned: false } => &ALL[1..],
            Self::Only(MemoryMode::Shared) => &ALL[..1],
            Self::Only(MemoryMode::Map) => &ALL[1..2],
            Self::Only(MemoryMode::OnDemand) => &ALL[2..3],
            Self::Only(MemoryMode::Copy) => &ALL[3..],
        }
    }
}

/// Why a mode cannot serve a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unfit {
    /// Its RAM cannot be mapped from one file: huge pages, several zones, virtio-mem,
    /// vhost-user, host devices, RAM that was not saved as a whole.
    #[error("RAM cannot be mapped from one file: {0}")]
    NotMappable(NotMappable),
    /// There is no memory file in the snapshot directory.
    #[error("The snapshot has no memory file of its own")]
    NoFile,
    /// The memory is in a file that the configuration names, and that the caller vouches for:
    /// it is used as recorded.
    #[error("The memory is in a file that the snapshot names, and is used as recorded")]
    RecordedFile,
    /// The file consists of huge pages, the zone does not.
    #[error("{file} lies on hugetlbfs")]
    Hugetlbfs {
        /// Its name.
        file: &'static str,
    },
    /// Others use the file.
    #[error("{file} is in use")]
    InUse {
        /// Its name.
        file: &'static str,
    },
    /// The file cannot be written to.
    #[error("{file} cannot be opened for writing ({errno})")]
    NotWritable {
        /// Its name.
        file: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// A template's memory cannot be had as a file of one's own.
    #[error("The blocks of {file} cannot be shared ({error})")]
    NotShared {
        /// Its name.
        file: &'static str,
        /// What the kernel said.
        error: CallError,
    },
    /// A file of one's own might not find room for all that the guest may write.
    #[error("There is room for {free}, its own file may take {needed}")]
    NoRoom {
        /// What is free.
        free: Bytes,
        /// What it may take.
        needed: Bytes,
    },
    /// This CH opens the file of a private mapping for writing, and its balloon punches holes
    /// into it.
    #[error("Cloud Hypervisor {version} opens the file of a private mapping for writing")]
    WritesPrivateFiles {
        /// Its version.
        version: Version,
    },
    /// This CH would copy instead.
    #[error("Cloud Hypervisor {version} knows no on-demand restore")]
    NoOnDemand {
        /// Its version.
        version: Version,
    },
    /// CH may not handle page faults here.
    #[error("No access to userfaultfd ({error})")]
    NoUserfaultfd {
        /// What the kernel said.
        error: CallError,
    },
    /// CH can read memory from a file only where the regions follow one another in it.
    #[error("RAM does not lie in {ZONE_FILE} without gaps")]
    Gaps,
}

/// A mode that would have come first, and why it cannot serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOver {
    /// The mode.
    pub mode: MemoryMode,
    /// Why not.
    pub reason: Unfit,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be used: {}", self.mode, self.reason)
    }
}

/// What becomes of `state.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateEdit {
    /// Nothing.
    AsRecorded,
    /// RAM is mapped from a file with this layout.
    Mapped(MemoryLayout),
    /// RAM is read from a zone's file with this layout, as if it had been saved.
    ReadFromZone(MemoryLayout),
}

/// What is known of the host beyond inputs and snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Circumstances {
    /// Where the host's end of a vsock device goes.
    pub vsock_socket: std::path::PathBuf,
    /// The path under which CH finds the memory file: of a descriptor that it inherits.
    pub memory_path: std::path::PathBuf,
    /// CH's version, where it is known before it runs.
    pub version: Option<Version>,
    /// Why the memory file cannot be written to by this VM alone.
    pub not_own: Option<Unfit>,
    /// Why CH cannot handle page faults.
    pub no_userfaultfd: Option<CallError>,
}

/// The mode chosen, and what has to be written for it.
pub(super) struct Choice {
    pub(super) mode: MemoryMode,
    pub(super) passed_over: Vec<PassedOver>,
    pub(super) backing: MemoryBacking,
    pub(super) state: StateEdit,
}

/// Takes the first mode that can serve. The error is the reason of the last one.
pub(super) fn choose(
    policy: MemoryPolicy,
    snapshot: &SnapshotDir,
    files: Recorded,
    around: &Circumstances,
) -> Result<Choice, PassedOver> {
    let layout = snapshot.layout();
    if let Some(choice) = recorded_file(policy, snapshot, files, &layout)? {
        return Ok(choice);
    }
    let mut passed_over = Vec::new();
    for &mode in policy.candidates() {
        match fit(mode, snapshot, files, &layout, around) {
            Ok((backing, state)) => {
                return Ok(Choice {
                    mode,
                    passed_over,
                    backing,
                    state,
                });
            }
            Err(reason) => passed_over.push(PassedOver { mode, reason }),
        }
    }
    // There is at least one candidate.
    Err(passed_over.pop().unwrap_or(PassedOver {
        mode: MemoryMode::Copy,
        reason: Unfit::NoFile,
    }))
}

/// Memory in a file that is not in the directory and that the caller vouches for: mapped
/// shared, as recorded, whatever else might be possible.
fn recorded_file(
    policy: MemoryPolicy,
    snapshot: &SnapshotDir,
    files: Recorded,
    layout: &Result<MemoryLayout, NotMappable>,
) -> Result<Option<Choice>, PassedOver> {
    let in_a_file = matches!(layout, Ok(layout) if *layout.source() != MemorySource::Saved);
    if snapshot.memory().is_some() || !in_a_file || files == Recorded::Refuse {
        return Ok(None);
    }
    match policy {
        MemoryPolicy::Auto { .. } | MemoryPolicy::Only(MemoryMode::Shared) => Ok(Some(Choice {
            mode: MemoryMode::Shared,
            passed_over: Vec::new(),
            backing: MemoryBacking::Recorded,
            state: StateEdit::AsRecorded,
        })),
        MemoryPolicy::Only(mode) => Err(PassedOver {
            mode,
            reason: Unfit::RecordedFile,
        }),
    }
}

type Means = (MemoryBacking, StateEdit);

fn fit(
    mode: MemoryMode,
    snapshot: &SnapshotDir,
    files: Recorded,
    layout: &Result<MemoryLayout, NotMappable>,
    around: &Circumstances,
) -> Result<Means, Unfit> {
    match mode {
        MemoryMode::Shared | MemoryMode::Map => {
            let shared = mode == MemoryMode::Shared;
            let layout = layout.clone().map_err(Unfit::NotMappable)?;
            let file = snapshot.memory().ok_or(Unfit::NoFile)?;
            may_map(file, shared, around)?;
            let backing = MemoryBacking::File {
                path: around.memory_path.clone(),
                shared,
                layout: layout.clone(),
            };
            Ok((backing, StateEdit::Mapped(layout)))
        }
        MemoryMode::OnDemand => {
            if let Some(version) = around.version
                && !Features::of(version).restore_on_demand
            {
                return Err(Unfit::NoOnDemand { version });
            }
            if let Some(error) = around.no_userfaultfd {
                return Err(Unfit::NoUserfaultfd { error });
            }
            fill(snapshot, files, layout)
        }
        MemoryMode::Copy => fill(snapshot, files, layout),
    }
}

fn may_map(file: &MemoryFile, shared: bool, around: &Circumstances) -> Result<(), Unfit> {
    let name = file.name();
    if file.is_on_hugetlbfs() {
        return Err(Unfit::Hugetlbfs { file: name });
    }
    if shared {
        return around.not_own.clone().map_or(Ok(()), Err);
    }
    match around.version {
        Some(version) if !Features::of(version).private_zone_is_read_only => {
            Err(Unfit::WritesPrivateFiles { version })
        }
        _ => Ok(()),
    }
}

/// RAM without a file, filled from the memory file.
fn fill(
    snapshot: &SnapshotDir,
    files: Recorded,
    layout: &Result<MemoryLayout, NotMappable>,
) -> Result<Means, Unfit> {
    let memory = snapshot.state().memory();
    let zone_file = snapshot
        .memory()
        .is_some_and(|file| file.name() == ZONE_FILE);
    match layout {
        Ok(layout) if zone_file => match layout.as_ranges(memory) {
            Some(_) => Ok((
                MemoryBacking::Anonymous,
                StateEdit::ReadFromZone(layout.clone()),
            )),
            None => Err(Unfit::Gaps),
        },
        // What a zone's file has is overwritten by what was saved: it is not needed.
        _ if files == Recorded::Refuse && memory.saved() == memory.ram() => {
            Ok((MemoryBacking::Anonymous, StateEdit::AsRecorded))
        }
        _ => Ok((MemoryBacking::Recorded, StateEdit::AsRecorded)),
    }
}
