//! Proof that a VM wrote nothing: neither to its disk nor to its memory file.
//!
//! A resume that fails after the vCPUs may have run leaves a snapshot that may not go with
//! the disk any more. Where the kernel says that nothing was written since, it does.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::resource::disk::Disk;
use crate::restore::{self, RestoreError, Stage};
use crate::vmm::api::ApiError;

/// Whether the vCPUs of a restore that failed have run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ran {
    /// Certainly not.
    No,
    /// They may have.
    Perhaps,
}

impl Ran {
    /// They have not where `vm.restore` was never sent, or was refused as such. A resume that is
    /// part of it may fail halfway, after they began to run; CH says then that it was that.
    pub(crate) fn judge(error: &RestoreError) -> Self {
        let not_restored = |refusal: &ApiError| {
            matches!(refusal, ApiError::Refused { .. }) && !refusal.is_failed_resume()
        };
        match (error.stage, &*error.cause) {
            (Stage::Check | Stage::Plan | Stage::Prepare | Stage::Launch | Stage::Gate, _) => {
                Self::No
            }
            (Stage::Restore, restore::Cause::Api(refusal)) if not_restored(refusal) => Self::No,
            _ => Self::Perhaps,
        }
    }
}

/// What a resume proves later by: the disk and the memory file as they are before.
pub(crate) fn prints(disk: Option<&Disk>, memory: Option<&Path>) -> Option<Vec<Print>> {
    let paths = disk.map(Disk::path).into_iter().chain(memory);
    paths.map(Print::take).collect()
}

/// What a file or block device looked like before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Print {
    path: PathBuf,
    mark: Mark,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Mark {
    /// Size and time of the last write of a file, and its inode.
    File {
        inode: u64,
        size: u64,
        written: (i64, i64),
    },
    /// Write requests that a block device has seen (`Documentation/block/stat.rst`), and
    /// which device it is.
    Device { device: u64, writes: u64 },
}

impl Print {
    /// How it looks now; `None` where that cannot be told, which proves nothing later.
    #[must_use]
    pub fn take(path: &Path) -> Option<Self> {
        let found = std::fs::metadata(path).ok()?;
        let mark = if found.file_type().is_block_device() {
            Mark::Device {
                device: found.rdev(),
                writes: writes(&found)?,
            }
        } else if times_tell(path) {
            Mark::File {
                inode: found.ino(),
                size: found.size(),
                written: (found.mtime(), found.mtime_nsec()),
            }
        } else {
            return None;
        };
        Some(Self {
            path: path.to_owned(),
            mark,
        })
    }

    /// Whether it looks the same.
    #[must_use]
    pub fn is_unchanged(&self) -> bool {
        Self::take(&self.path).as_ref() == Some(self)
    }
}

/// Field 5 of the device's `stat`: writes completed; and field 9: requests in flight, which
/// must be none.
fn writes(device: &Metadata) -> Option<u64> {
    let (major, minor) = (
        rustix::fs::major(device.rdev()),
        rustix::fs::minor(device.rdev()),
    );
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    count(&text)
}

fn count(stat: &str) -> Option<u64> {
    let fields: Vec<u64> = stat
        .split_ascii_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    let (writes, in_flight) = (fields.get(4)?, fields.get(8)?);
    (*in_flight == 0).then_some(*writes)
}

/// Writes through a mapping change a file's times on file systems with a disk under them; on
/// tmpfs they do not.
fn times_tell(path: &Path) -> bool {
    // TMPFS_MAGIC, include/uapi/linux/magic.h.
    const TMPFS: rustix::fs::FsWord = 0x0102_1994;
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type != TMPFS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SandboxId;
    use crate::timeline::Timeline;
    use crate::vmm::api::{Chain, Operation};

    #[test]
    fn a_file_that_was_written_to_is_told_from_one_that_was_only_read() {
        // Not /tmp, which may be in memory.
        let dir = std::env::current_dir().unwrap().join("target");
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join(format!("untouched-{}", std::process::id()));
        std::fs::write(&path, "before").unwrap();
        let print = Print::take(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"before");
        assert!(print.is_unchanged());
        // The clock of the file system ticks every few milliseconds.
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, "behind").unwrap();
        assert!(!print.is_unchanged());
        std::fs::remove_file(&path).unwrap();
        assert!(!print.is_unchanged());
    }

    fn refused(stage: Stage, words: &str) -> RestoreError {
        let refusal = ApiError::Refused {
            operation: Operation::Restore,
            status: 500,
            chain: Chain::decode(words.as_bytes()),
        };
        RestoreError {
            sandbox_id: SandboxId::random(),
            stage,
            cause: Box::new(refusal.into()),
            log: Vec::new(),
            leftovers: Vec::new(),
            timeline: Box::new(Timeline::start()),
        }
    }

    #[test]
    fn a_refused_restore_has_run_nothing_unless_it_failed_while_it_resumed() {
        let restore = r#"["Error from API","The VM could not be restored","Cannot restore VM"]"#;
        let resume = r#"["Error from API","The VM could not be restored","Cannot resume VM","Failed to resume migratable component"]"#;
        for (stage, words, ran) in [
            (Stage::Launch, restore, Ran::No),
            (Stage::Restore, restore, Ran::No),
            (Stage::Restore, resume, Ran::Perhaps),
            (Stage::Resume, restore, Ran::Perhaps),
            (Stage::Ready, restore, Ran::Perhaps),
        ] {
            assert_eq!(Ran::judge(&refused(stage, words)), ran, "{stage:?} {words}");
        }
    }

    #[test]
    fn writes_are_counted_and_requests_in_flight_prove_nothing() {
        let idle = "  10 0 80 1 7 0 56 2 0 3 3 0 0 0 0 0 0\n";
        assert_eq!(count(idle), Some(7));
        let busy = "  10 0 80 1 7 0 56 2 1 3 3 0 0 0 0 0 0\n";
        assert_eq!(count(busy), None);
        for bad in ["", "1 2 3", "a b c d e f g h i"] {
            assert_eq!(count(bad), None, "{bad:?}");
        }
    }
}
