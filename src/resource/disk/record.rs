//! What is known of a disk beside its store: `ID.json`, and the base image it stands on.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rewake_sys::error::Named;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::error::{DiskError, call};
use super::{DiskKind, file};
use crate::fault::Faults;
use crate::ids::SandboxId;
use crate::units::Bytes;

/// Records are small; what is larger is none.
const RECORD_MAX: u64 = 64 << 10;
/// The unit of the block layer: an image that is no multiple of it has no last sector.
const SECTOR: u64 = 512;

/// Which base image a disk stands on, and how it is recognised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseIdentity {
    /// Absolute path.
    pub path: PathBuf,
    /// `st_ino`.
    pub inode: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Time of the last change of its contents, in nanoseconds since 1970.
    pub modified_ns: i64,
}

/// A base image, opened and checked.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) file: File,
    pub(super) identity: BaseIdentity,
    pub(super) device: u64,
}

impl Base {
    pub(super) fn open(path: &Path, faults: &Faults) -> Result<Self, DiskError> {
        let path = call(faults, format!("find {}", path.display()), || {
            path.canonicalize().named("realpath")
        })?;
        let file = file::open(&path, false, faults)?;
        let found = file::metadata(&file, &path)?;
        if !found.is_file() {
            return Err(DiskError::unusable(&path, "it is no regular file"));
        }
        if found.len() == 0 || found.len() % SECTOR != 0 {
            let why = "its size is no multiple of 512 bytes";
            return Err(DiskError::unusable(&path, why));
        }
        let seconds = found.mtime().saturating_mul(1_000_000_000);
        Ok(Self {
            identity: BaseIdentity {
                inode: found.ino(),
                bytes: found.len(),
                modified_ns: seconds.saturating_add(found.mtime_nsec()),
                path,
            },
            device: found.dev(),
            file,
        })
    }

    /// Refuses another image than the one that was recorded.
    pub(super) fn expect(&self, recorded: &BaseIdentity) -> Result<(), DiskError> {
        let changed = |what| {
            Err(DiskError::BaseChanged {
                path: self.identity.path.clone(),
                what,
            })
        };
        if self.identity.bytes != recorded.bytes {
            return changed("its size");
        }
        if self.identity.inode != recorded.inode {
            return changed("it is another file");
        }
        if self.identity.modified_ns != recorded.modified_ns {
            return changed("it was written to");
        }
        Ok(())
    }
}

/// What is recorded of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Layout of this record; 1.
    pub version: u32,
    /// How the disk is kept.
    pub kind: DiskKind,
    /// The base image.
    pub base: BaseIdentity,
    /// Size of the store in bytes.
    pub store_bytes: u64,
}

impl DiskRecord {
    pub(super) const VERSION: u32 = 1;

    pub(super) fn path(id: &SandboxId, dir: &Path) -> PathBuf {
        dir.join(format!("{id}.json"))
    }

    /// All files that a disk of any kind may have.
    pub(super) fn files(id: &SandboxId, dir: &Path) -> [PathBuf; 4] {
        ["json", "cow", "raw", "trial"].map(|it| dir.join(format!("{id}.{it}")))
    }

    /// Where the store is.
    pub(super) fn store(&self, id: &SandboxId, dir: &Path) -> PathBuf {
        let extension = match self.kind {
            DiskKind::DmSnapshot => "cow",
            DiskKind::Reflink | DiskKind::Copy => "raw",
        };
        dir.join(format!("{id}.{extension}"))
    }

    pub(super) fn write(&self, mut file: &File, faults: &Faults) -> Result<(), DiskError> {
        // Plain data of our own always has a JSON form.
        let text = serde_json::to_vec(self).unwrap_or_default();
        call(faults, "write the disk's record", || {
            file.write_all(&text).named("write")
        })
    }

    pub(super) fn read(id: &SandboxId, dir: &Path, faults: &Faults) -> Result<Held, DiskError> {
        let path = Self::path(id, dir);
        let file = match file::open(&path, false, faults) {
            Err(error) if error.errno() == Some(Errno::NOENT.raw_os_error()) => {
                return Err(DiskError::Missing {
                    id: id.clone(),
                    dir: dir.to_owned(),
                });
            }
            other => other?,
        };
        let mut text = Vec::new();
        call(faults, "read the disk's record", || {
            (&file)
                .take(RECORD_MAX)
                .read_to_end(&mut text)
                .named("read")
        })?;
        let record: Self = serde_json::from_slice(&text).map_err(|source| DiskError::Record {
            path: path.clone(),
            source,
        })?;
        if record.version != Self::VERSION {
            return Err(DiskError::unusable(&path, "another version wrote it"));
        }
        Ok(Held { record, file, path })
    }
}

/// A record and the file it is in, whose lock says who works with the disk.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) record: DiskRecord,
    pub(super) file: File,
    path: PathBuf,
}

impl Held {
    /// Takes the disk, until the lock is dropped. Does not wait.
    pub(super) fn lock(
        self,
        id: &SandboxId,
        faults: &Faults,
    ) -> Result<(DiskRecord, Lock), DiskError> {
        lock(&self.file, id, faults)?;
        let lock = Lock(self.file);
        // The record may have been removed between opening and locking it.
        let named = std::fs::metadata(&self.path).ok();
        let ours = file::metadata(&lock.0, &self.path)?;
        if named.is_none_or(|it| it.ino() != ours.ino()) {
            return Err(DiskError::Held { id: id.clone() });
        }
        Ok((self.record, lock))
    }
}

/// A record's file, locked. Unlocked by hand in the end: closing it is not enough while a
/// process that was just forked has a copy of the descriptor.
#[derive(Debug)]
pub(super) struct Lock(pub(super) File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Nothing can be done about an error, and closing unlocks as well.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

pub(super) fn lock(file: &File, id: &SandboxId, faults: &Faults) -> Result<(), DiskError> {
    match call(faults, "lock the disk's record", || {
        rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).named("flock")
    }) {
        Err(DiskError::Call { source, .. }) if source.is_busy() => {
            Err(DiskError::Held { id: id.clone() })
        }
        other => other,
    }
}

impl Base {
    /// Size as a type.
    pub(super) const fn size(&self) -> Bytes {
        Bytes(self.identity.bytes)
    }
}
