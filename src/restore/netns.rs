//! The network namespace of a restore.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rewake_sys::netns;

use super::error::Cause;
use crate::resource::net::PendingSlot;

/// The network namespace that CH starts in and the guest is reached from.
#[derive(Debug, Clone)]
pub enum Netns {
    /// At this path (`/run/netns/NAME`).
    At(PathBuf),
    /// Of a slot that is still being built. CH is started as soon as the namespace is there,
    /// and is told to restore once the slot stands. Whoever made it still
    /// [takes](PendingSlot::take) the slot.
    Of(Arc<PendingSlot>),
}

impl Netns {
    /// Where it is, or will be.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::At(path) => path,
            Self::Of(slot) => slot.netns_path(),
        }
    }

    /// Opens it, as soon as it is there.
    pub(super) fn open(&self) -> Result<OwnedFd, Cause> {
        match self {
            Self::At(path) => netns::open(path).map_err(|source| Cause::Netns {
                path: path.clone(),
                source,
            }),
            Self::Of(slot) => Ok(slot.netns()?),
        }
    }

    /// Waits until packets pass through it, and says since when, where that was not so before.
    pub(super) fn stands(&self) -> Result<Option<Instant>, Cause> {
        match self {
            Self::At(_) => Ok(None),
            Self::Of(slot) => Ok(Some(slot.stands()?)),
        }
    }
}

impl From<PathBuf> for Netns {
    fn from(path: PathBuf) -> Self {
        Self::At(path)
    }
}

impl From<&Path> for Netns {
    fn from(path: &Path) -> Self {
        Self::At(path.to_owned())
    }
}

impl From<Arc<PendingSlot>> for Netns {
    fn from(slot: Arc<PendingSlot>) -> Self {
        Self::Of(slot)
    }
}

impl From<&str> for Netns {
    fn from(path: &str) -> Self {
        Self::At(path.into())
    }
}
