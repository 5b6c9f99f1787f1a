//! Files that appear complete or not at all, and sparse copies of images.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rewake_sys::error::Named;
use rewake_sys::{CallError, reflink};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, SeekFrom,
};
use rustix::io::Errno;

use super::DiskStep;
use super::error::{DiskError, call};
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::units::Bytes;

/// What is looked at as one: the block size of file systems, and a store's chunk.
const BLOCK: usize = 4096;
/// What is read at once.
const BUFFER: usize = 1 << 20;
/// How often others may take a file that was just made for a dead process's.
const RACES: usize = 16;

/// How far a copy has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the image that are done, holes included.
    pub done: Bytes,
    /// Bytes of the image.
    pub total: Bytes,
}

/// When a file is on the host's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reaches {
    /// When it has its name.
    Now,
    /// When somebody sees to it.
    Later,
}

/// A file without a name yet. A crash or an error leaves nothing of it.
///
/// Where the file system knows no such files (NFS, 9p, FUSE, older overlayfs), it has another
/// name meanwhile, `.NAME.part`. An error leaves nothing of that either; what a crash leaves
/// is removed when the name is wanted again, see [`forget_unfinished`].
#[derive(Debug)]
pub(super) struct Unnamed {
    pub(super) file: File,
    pub(super) step: DiskStep,
    path: PathBuf,
    dir: PathBuf,
    part: Option<Part>,
}

/// The name of a file that is not finished; removed when dropped.
#[derive(Debug)]
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        // Nothing can be done about an error; the next one to want the name tries again.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Unnamed {
    /// Opens a file that will be called `path`.
    pub(super) fn new(path: &Path, faults: &Faults) -> Result<Self, DiskError> {
        let parent = path.parent().filter(|it| !it.as_os_str().is_empty());
        let dir = parent.unwrap_or(Path::new(".")).to_owned();
        let step = format!("make a file in {}", dir.display());
        let made = call(faults, step, || {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            rustix::fs::open(&dir, flags, Mode::RUSR | Mode::WUSR).named("open O_TMPFILE")
        });
        let without = [Errno::OPNOTSUPP, Errno::ISDIR].map(|it| Some(it.raw_os_error()));
        let (file, part) = match made {
            Err(error) if without.contains(&error.errno()) => {
                let (file, part) = unfinished(path, faults)?;
                (file, Some(part))
            }
            other => (File::from(other?), None),
        };
        let found = metadata(&file, path)?;
        let step = DiskStep::File {
            path: path.to_owned(),
            device: found.dev(),
            inode: found.ino(),
        };
        Ok(Self {
            file,
            step,
            path: path.to_owned(),
            dir,
            part,
        })
    }

    /// Writes the contents to the disk, then gives the file its name, then writes that to
    /// the disk: after a power loss there is the whole file or none. Or gives it its name
    /// only. The caller has noted the step.
    pub(super) fn publish(self, reaches: Reaches, faults: &Faults) -> Result<File, DiskError> {
        let Self {
            file,
            path,
            dir,
            mut part,
            ..
        } = self;
        if reaches == Reaches::Now {
            sync_file(&file, &path, faults)?;
        }
        let named = call(faults, format!("name {}", path.display()), || {
            let Some(Part(unfinished)) = &mut part else {
                let from = format!("/proc/self/fd/{}", file.as_raw_fd());
                let follow = AtFlags::SYMLINK_FOLLOW;
                return rustix::fs::linkat(CWD, from, CWD, &path, follow).named("linkat");
            };
            if rename_new(unfinished, &path)? {
                // From here on the old name is whoever's takes it.
                unfinished.clear();
            }
            Ok(())
        });
        match named {
            Err(error) if error.errno() == Some(Errno::EXIST.raw_os_error()) => {
                return Err(DiskError::Occupied { path });
            }
            other => other?,
        }
        drop(part);
        if reaches == Reaches::Now {
            sync_directory(&dir, faults)?;
        }
        Ok(file)
    }
}

/// Renames, and never replaces. Where that cannot be asked for, the file gets a second name:
/// returns whether it has lost the first.
fn rename_new(from: &Path, to: &Path) -> Result<bool, CallError> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty())
                .named("linkat")
                .map(|()| false)
        }
        other => other.named("renameat2").map(|()| true),
    }
}

/// Gives a file another name in the same file system, and never replaces another file.
pub(super) fn rename(from: &Path, to: &Path, faults: &Faults) -> Result<(), DiskError> {
    let step = format!("rename {} to {}", from.display(), to.display());
    let renamed = call(faults, step, || {
        if rename_new(from, to)? {
            return Ok(());
        }
        rustix::fs::unlinkat(CWD, from, AtFlags::empty()).named("unlinkat")
    });
    match renamed {
        Err(error) if error.errno() == Some(Errno::EXIST.raw_os_error()) => {
            Err(DiskError::Occupied {
                path: to.to_owned(),
            })
        }
        other => other,
    }
}

fn part_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default();
    path.with_file_name(format!(".{}.part", name.display()))
}

/// Makes a file under the name that it has until it is finished. Its lock says that somebody
/// is at work with it.
fn unfinished(path: &Path, faults: &Faults) -> Result<(File, Part), DiskError> {
    let part = part_of(path);
    let occupied = || DiskError::Occupied {
        path: path.to_owned(),
    };
    for _ in 0..RACES {
        let file = call(
            faults,
            format!("make {}", part.display()),
            || match OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&part)
            {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(None),
                other => other.named("open").map(Some),
            },
        );
        let file = match file {
            Ok(file) => file,
            Err(error) => {
                // It may have been made, and is locked by nobody.
                forget_unfinished(path)?;
                return Err(error);
            }
        };
        match file {
            Some(file) if lock_named(&file, &part)? => return Ok((file, Part(part))),
            // Somebody took it for a dead one's.
            Some(_) => {}
            None if forget_unfinished(path)? => {}
            None => return Err(occupied()),
        }
    }
    Err(occupied())
}

/// Removes what a process that died has left of a file that it did not finish. Returns whether
/// there is nothing now: no other process is making the file.
pub(super) fn forget_unfinished(path: &Path) -> Result<bool, DiskError> {
    let part = part_of(path);
    let file = match File::open(&part) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        other => other.named("open").map_err(|source| DiskError::Call {
            step: format!("open {}", part.display()),
            source,
        })?,
    };
    let dead = lock_named(&file, &part)?;
    if dead {
        drop(Part(part));
    }
    Ok(dead)
}

/// Locks a file, if nobody has done so, and if the name is still its.
fn lock_named(file: &File, name: &Path) -> Result<bool, DiskError> {
    let mine = metadata(file, name)?;
    let locked = rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_ok();
    let is_named =
        || std::fs::metadata(name).is_ok_and(|it| (it.dev(), it.ino()) == (mine.dev(), mine.ino()));
    Ok(locked && is_named())
}

/// Makes the contents of a file outlive a power loss.
pub(super) fn sync_file(file: &File, path: &Path, faults: &Faults) -> Result<(), DiskError> {
    let step = format!("write {} to the disk", path.display());
    call(faults, step, || rustix::fs::fsync(file).named("fsync"))
}

/// Makes the names in a directory outlive a power loss.
pub(super) fn sync_directory(dir: &Path, faults: &Faults) -> Result<(), DiskError> {
    call(
        faults,
        format!("write {} to the disk", dir.display()),
        || {
            let dir = File::open(dir).named("open")?;
            rustix::fs::fsync(&dir).named("fsync")
        },
    )
}

pub(super) fn open(path: &Path, write: bool, faults: &Faults) -> Result<File, DiskError> {
    call(faults, format!("open {}", path.display()), || {
        OpenOptions::new()
            .read(true)
            .write(write)
            .open(path)
            .named("open")
    })
}

pub(super) fn metadata(file: &File, path: &Path) -> Result<std::fs::Metadata, DiskError> {
    file.metadata()
        .named("fstat")
        .map_err(|source| DiskError::Call {
            step: format!("look at {}", path.display()),
            source,
        })
}

/// Room left for us in the file system of a file or directory.
pub(super) fn filesystem_free(path: &Path) -> Result<Bytes, DiskError> {
    let found = rustix::fs::statvfs(path).named("statvfs");
    let found = found.map_err(|source| DiskError::Call {
        step: format!("look at the file system of {}", path.display()),
        source,
    })?;
    Ok(Bytes(found.f_bavail.saturating_mul(found.f_frsize)))
}

/// Shares all blocks of one file with another, empty one. Returns whether the file system
/// could; it cannot across file systems, for instance.
pub(super) fn clone(source: &File, to: &File, faults: &Faults) -> Result<bool, DiskError> {
    call(faults, "share the image's blocks", || {
        reflink::try_clone_file(source, to)
    })
}

/// One copy of an image into a file.
pub(super) struct Copy<'a> {
    /// A raw image or a block device.
    pub(super) from: &'a File,
    /// Its size in bytes.
    pub(super) size: u64,
    /// The new file: empty, or a clone of `shared`.
    pub(super) to: &'a File,
    /// What `to` shares its blocks with; equal blocks are not written.
    pub(super) shared: Option<&'a File>,
    pub(super) faults: &'a Faults,
    pub(super) deadline: Deadline,
}

impl Copy<'_> {
    /// Copies what is data and not zero; all else becomes a hole. Blocks on the disk.
    pub(super) fn run(&self, progress: &mut dyn FnMut(Progress)) -> Result<(), DiskError> {
        call(self.faults, "set the size of the copy", || {
            self.to.set_len(self.size).named("ftruncate")
        })?;
        let mut buffers = (vec![0; BUFFER], vec![0; BUFFER]);
        let mut at = 0;
        let mut report = |at| {
            progress(Progress {
                done: Bytes(at),
                total: Bytes(self.size),
            });
        };
        while at < self.size {
            // What a clone has where the source has a hole must be looked at, too.
            let (data, end) = match self.shared {
                Some(_) => (at, self.size),
                None => self.next_data(at)?,
            };
            at = data;
            while at < end {
                if self.deadline.has_passed() {
                    return Err(DiskError::Timeout {
                        step: "copy the image".to_owned(),
                    });
                }
                at += self.piece(at, end, &mut buffers)?;
                report(at);
            }
            if end == data {
                // The image ends with a hole.
                report(at);
            }
        }
        Ok(())
    }

    /// Where the next data begins and ends. A source that knows no holes is all data.
    fn next_data(&self, at: u64) -> Result<(u64, u64), DiskError> {
        let data = match call(self.faults, "look for data", || {
            rustix::fs::seek(self.from, SeekFrom::Data(at)).named("lseek SEEK_DATA")
        }) {
            // Only holes from here on.
            Err(error) if error.errno() == Some(Errno::NXIO.raw_os_error()) => {
                return Ok((self.size, self.size));
            }
            Err(error) if error.errno() == Some(Errno::INVAL.raw_os_error()) => {
                return Ok((at, self.size));
            }
            other => other?.min(self.size),
        };
        let hole = call(self.faults, "look for a hole", || {
            rustix::fs::seek(self.from, SeekFrom::Hole(data)).named("lseek SEEK_HOLE")
        })?;
        Ok((data, hole.clamp(data, self.size)))
    }

    /// Copies up to one buffer. Returns how many bytes are done.
    fn piece(
        &self,
        at: u64,
        end: u64,
        (buffer, before): &mut (Vec<u8>, Vec<u8>),
    ) -> Result<u64, DiskError> {
        // Pieces end at block boundaries of the image, so that blocks stay whole.
        let room = BUFFER as u64 - at % BLOCK as u64;
        let len = usize::try_from((end - at).min(room)).unwrap_or(BUFFER);
        let data = &mut buffer[..len];
        call(self.faults, "read the image", || {
            self.from.read_exact_at(data, at).named("pread")
        })?;
        let before = match self.shared {
            Some(shared) => {
                let before = &mut before[..len];
                read_up_to(shared, before, at, self.faults)?;
                Some(&*before)
            }
            None => None,
        };
        for (range, fate) in runs(data, before) {
            let offset = at + range.start as u64;
            let bytes = &data[range];
            match fate {
                Fate::Keep => {}
                Fate::Write => call(self.faults, "write the copy", || {
                    self.to.write_all_at(bytes, offset).named("pwrite")
                })?,
                Fate::Punch => call(self.faults, "make a hole in the copy", || {
                    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(self.to, mode, offset, bytes.len() as u64)
                        .named("fallocate")
                })?,
            }
        }
        Ok(len as u64)
    }
}

/// Fills the buffer; what lies behind the end of the file reads as zero.
fn read_up_to(file: &File, buffer: &mut [u8], at: u64, faults: &Faults) -> Result<(), DiskError> {
    call(faults, "read the base image", || {
        let mut done = 0;
        while done < buffer.len() {
            match file.read_at(&mut buffer[done..], at + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).named("pread"),
            }
        }
        buffer[done..].fill(0);
        Ok(())
    })
}

/// What becomes of a run of blocks in the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is right as it is.
    Keep,
    Write,
    Punch,
}

/// Divides data into runs of blocks with one fate each.
fn runs(data: &[u8], before: Option<&[u8]>) -> Vec<(std::ops::Range<usize>, Fate)> {
    let mut runs: Vec<(std::ops::Range<usize>, Fate)> = Vec::new();
    for (i, block) in data.chunks(BLOCK).enumerate() {
        let start = i * BLOCK;
        let end = start + block.len();
        let fate = match before.map(|it| &it[start..end]) {
            Some(before) if before == block => Fate::Keep,
            Some(_) if is_zero(block) => Fate::Punch,
            None if is_zero(block) => Fate::Keep,
            _ => Fate::Write,
        };
        match runs.last_mut() {
            Some((range, last)) if *last == fate => range.end = end,
            _ => runs.push((start..end, fate)),
        }
    }
    runs
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_stay_holes_and_equal_blocks_stay_shared() {
        let block = |byte| vec![byte; BLOCK];
        let data = [block(1), block(1), block(0), block(2), vec![0; 512]].concat();
        let fates = |before: Option<&[u8]>| {
            runs(&data, before)
                .into_iter()
                .map(|(range, fate)| (range.len(), fate))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            fates(None),
            [
                (2 * BLOCK, Fate::Write),
                (BLOCK, Fate::Keep),
                (BLOCK, Fate::Write),
                (512, Fate::Keep)
            ]
        );
        let before = [block(1), block(3), block(3), block(2), vec![4; 512]].concat();
        assert_eq!(
            fates(Some(&before)),
            [
                (BLOCK, Fate::Keep),
                (BLOCK, Fate::Write),
                (BLOCK, Fate::Punch),
                (BLOCK, Fate::Keep),
                (512, Fate::Punch)
            ]
        );
    }
}
