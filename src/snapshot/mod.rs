//! A snapshot directory: opened, bounded, checked, and rewritten for a new life.
//!
//! A directory written by Cloud Hypervisor's `vm.snapshot` has `config.json` (the `VmConfig`),
//! `state.json` (a tree of opaque device states) and, where memory was saved,
//! `memory-ranges` (the saved ranges one after the other, without header). Where memory is a
//! zone's shared file, Cloud Hypervisor saves none, and rewake keeps that file as `memory`
//! beside the others. Nothing in it is
//! trusted: it may come from another machine, and a guest wrote what is in its memory.
//!
//! [`SnapshotDir::open`] reads and checks everything before there is any side effect, and
//! keeps what it checked: the bytes of both JSON files and a descriptor of the memory file.

pub mod check;
pub mod dir;
pub mod extents;
pub mod image;
pub mod layout;
pub mod memory;
pub mod own;
pub mod review;
pub mod rewrite;
pub mod run_dir;
pub mod seal;
pub mod state;

pub use check::Mismatch;
pub use dir::{SnapshotDir, SnapshotError, SnapshotLimits};
pub use extents::{CopyError, PunchError, Punched, Puncher};
pub use image::{
    ClaimError, MEMORY_FILE, MemoryAccess, MemoryClaim, MemoryFile, ReserveError, Reserved,
    ZONE_FILE, reserve,
};
pub use layout::{MemoryLayout, MemorySource, NotMappable};
pub use memory::{MemoryError, MemoryState, RamMapping, SavedRange};
pub use own::{OwnError, make_own};
pub use review::{HostItem, HostItemKind, review};
pub use rewrite::{
    ConfigOverrides, ConfigRefusal, ConsoleOverride, DiskOverride, HostPathPolicy, MemoryBacking,
    Recorded, RefusalReason, RefusedItem, TapOverride, TapSource, rewrite,
};
pub use run_dir::{RemoveError, RunDir, RunDirCause, RunDirError, RunFiles};
pub use seal::{
    Durability, Seal, SealError, SealedMemory, install, memory_of, require_space, seal,
};
pub use state::{CpuIdentity, CpuidEntry, State, StateError, StateLimits};
