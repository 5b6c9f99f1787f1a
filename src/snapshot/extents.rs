//! Files with holes: copied as they are, and given holes where they have zeros.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, CWD, FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::image::MEMORY_FILE;
use super::memory::PAGE_SIZE;
use crate::fault::Faults;
use crate::units::Bytes;

/// Bytes that are read and looked at in one go.
const STEP: usize = 4 << 20;
/// A shorter run of zeros is left: a hole costs an extent.
const SHORTEST_HOLE: u64 = 16 * PAGE_SIZE;

/// A file could not be copied.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("{call}")]
pub struct CopyError {
    call: &'static str,
    #[source]
    source: Errno,
}

impl CopyError {
    /// The call.
    #[must_use]
    pub const fn call(&self) -> &'static str {
        self.call
    }

    /// What the kernel said.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        self.source
    }
}

impl From<Errno> for CopyError {
    fn from(source: Errno) -> Self {
        Self {
            call: "copy",
            source,
        }
    }
}

/// Copies a file extent by extent. Holes stay holes.
///
/// # Errors
/// [`CopyError`]: the call and what the kernel said.
pub fn copy_sparse(from: impl AsFd, to: impl AsFd) -> Result<(), CopyError> {
    let error = |call| move |source| CopyError { call, source };
    let length = fs::fstat(&from).map_err(error("fstat"))?.st_size;
    let length = u64::try_from(length).unwrap_or(0);
    fs::ftruncate(&to, length).map_err(error("ftruncate"))?;
    let mut at = 0;
    while let Some((start, end)) = next_data(&from, at, length).map_err(error("lseek"))? {
        copy_range(&from, &to, start, end)?;
        at = end;
    }
    Ok(())
}

/// Copies what is data in the next `most` bytes from `at` on, into a file that has its length
/// already. Returns where to go on, `None` at the end.
///
/// # Errors
/// [`CopyError`]: the call and what the kernel said.
pub fn copy_piece(
    from: impl AsFd,
    to: impl AsFd,
    at: u64,
    most: u64,
) -> Result<Option<u64>, CopyError> {
    let error = |call| move |source| CopyError { call, source };
    let length = fs::fstat(&from).map_err(error("fstat"))?.st_size;
    let length = u64::try_from(length).unwrap_or(0);
    let Some((start, end)) = next_data(&from, at, length).map_err(error("lseek"))? else {
        return Ok(None);
    };
    let end = end.min(start.saturating_add(most));
    copy_range(&from, &to, start, end)?;
    Ok(Some(end))
}

fn copy_range(from: &impl AsFd, to: &impl AsFd, mut start: u64, end: u64) -> Result<(), CopyError> {
    let error = |call| move |source| CopyError { call, source };
    let mut buffer = Vec::new();
    while start < end {
        let most = usize::try_from(end - start).unwrap_or(STEP).min(1 << 30);
        let (mut source, mut target) = (start, start);
        match fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), most) {
            Ok(0) => return Ok(()),
            Ok(copied) => start += copied as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                buffer.resize(STEP, 0);
                let take = most.min(STEP);
                let read = read_full(from, &mut buffer[..take], start).map_err(error("pread"))?;
                if read == 0 {
                    return Ok(());
                }
                write_full(to, &buffer[..read], start).map_err(error("pwrite"))?;
                start += read as u64;
            }
            Err(source) => return Err(error("copy_file_range")(source)),
        }
    }
    Ok(())
}

/// The next stretch that is no hole, from `at` on.
pub(crate) fn next_data(
    file: &impl AsFd,
    at: u64,
    length: u64,
) -> Result<Option<(u64, u64)>, Errno> {
    if at >= length {
        return Ok(None);
    }
    let start = match fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A file system that knows no holes.
        Err(Errno::INVAL) => return Ok(Some((at, length))),
        Err(errno) => return Err(errno),
    };
    if start >= length {
        return Ok(None);
    }
    let end = fs::seek(file, SeekFrom::Hole(start))?.min(length);
    Ok(Some((start, end)))
}

fn read_full(file: &impl AsFd, buffer: &mut [u8], at: u64) -> Result<usize, Errno> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(file, &mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

fn write_full(file: &impl AsFd, bytes: &[u8], at: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(file, &bytes[done..], at + done as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(wrote) => done += wrote,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Holes could not be made.
#[derive(Debug, thiserror::Error)]
#[error("Cannot free the zero pages of {}: {call}", path.display())]
pub struct PunchError {
    path: PathBuf,
    call: &'static str,
    #[source]
    source: Errno,
}

impl PunchError {
    /// Whether the file system knows no holes.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        self.source == Errno::OPNOTSUPP
    }
}

/// How far making holes has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Punched {
    /// There is more to look at.
    More,
    /// All of it was looked at.
    Whole,
    /// The file was removed, or a VM writes to it: there is nothing more to do.
    Taken,
}

/// Makes holes where the saved RAM of a snapshot is zero, a step at a time.
///
/// CH writes private memory densely, zeros included; most of a young guest's RAM is zero. A
/// hole reads as the same zeros, takes no room, and is skipped by the next restore. Between
/// two steps the file belongs to whoever wants it: a step takes a shared lock for itself, and
/// is refused once a VM writes to the file. So this can run in the background, be left off at
/// any step, and be begun again.
#[derive(Debug)]
pub struct Puncher {
    path: PathBuf,
    file: OwnedFd,
    at: u64,
    freed: u64,
    buffer: Vec<u8>,
    faults: Faults,
}

impl Puncher {
    /// Opens the saved RAM of a snapshot directory; `None` where it has none.
    ///
    /// # Errors
    /// [`PunchError`]: the file cannot be opened for writing.
    pub fn open(directory: &Path, faults: &Faults) -> Result<Option<Self>, PunchError> {
        let path = directory.join(MEMORY_FILE);
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match fs::openat(CWD, &path, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            Ok(file) => file,
            Err(source) => {
                let call = "openat";
                return Err(PunchError { path, call, source });
            }
        };
        Ok(Some(Self {
            path,
            file,
            at: 0,
            freed: 0,
            buffer: Vec::new(),
            faults: faults.clone(),
        }))
    }

    /// What was freed so far.
    #[must_use]
    pub const fn freed(&self) -> Bytes {
        Bytes(self.freed)
    }

    /// Goes on to the end, as long as `go_on` says so between two steps. Blocks: some hundred
    /// milliseconds a GiB.
    ///
    /// # Errors
    /// [`PunchError`]. What is punched is punched; the content is the same in any case.
    pub fn run(&mut self, mut go_on: impl FnMut() -> bool) -> Result<Punched, PunchError> {
        while go_on() {
            let punched = self.step()?;
            if punched != Punched::More {
                return Ok(punched);
            }
        }
        Ok(Punched::More)
    }

    /// Looks at the next 4 MiB that are no hole.
    ///
    /// # Errors
    /// [`PunchError`].
    pub fn step(&mut self) -> Result<Punched, PunchError> {
        match fs::flock(&self.file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(Punched::Taken),
            Err(source) => return Err(self.error("flock", source)),
        }
        let outcome = self.step_locked();
        // Closing the file frees it, too, so an error here changes nothing.
        let _ = fs::flock(&self.file, FlockOperation::Unlock);
        outcome
    }

    fn step_locked(&mut self) -> Result<Punched, PunchError> {
        let stat = fs::fstat(&self.file).map_err(|errno| self.error("fstat", errno))?;
        if stat.st_nlink == 0 {
            return Ok(Punched::Taken);
        }
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        let data = next_data(&self.file, self.at, length);
        let Some((start, end)) = data.map_err(|errno| self.error("lseek", errno))? else {
            return Ok(Punched::Whole);
        };
        // Whole pages, so that one that is split by an extent is looked at as one.
        let start = start & !(PAGE_SIZE - 1);
        let most = usize::try_from(end - start).unwrap_or(STEP).min(STEP);
        self.buffer.resize(STEP, 0);
        let read = read_full(&self.file, &mut self.buffer[..most], start)
            .map_err(|errno| self.error("pread", errno))?;
        if read == 0 {
            return Ok(Punched::Whole);
        }
        for (from, to) in zero_runs(&self.buffer[..read]) {
            let (from, to) = (start + from, start + to);
            if to - from < SHORTEST_HOLE {
                continue;
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let file = &self.file;
            self.faults
                .call("snapshot.punch", || {
                    fs::fallocate(file, flags, from, to - from)
                })
                .map_err(|errno: Errno| self.error("fallocate", errno))?;
            self.freed += to - from;
        }
        self.at = start + read as u64;
        Ok(Punched::More)
    }

    fn error(&self, call: &'static str, source: Errno) -> PunchError {
        PunchError {
            path: self.path.clone(),
            call,
            source,
        }
    }
}

/// The runs of whole pages of zeros, as offsets of their beginnings and ends.
fn zero_runs(bytes: &[u8]) -> Vec<(u64, u64)> {
    const PAGE: usize = PAGE_SIZE as usize;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (index, page) in bytes.chunks_exact(PAGE).enumerate() {
        if !is_zero(page) {
            continue;
        }
        let (start, end) = ((index * PAGE) as u64, ((index + 1) * PAGE) as u64);
        match runs.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => runs.push((start, end)),
        }
    }
    runs
}

/// Compares by 128 bytes at a time, which the compiler turns into vector instructions.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(128)
        .all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zero_pages_are_found_whole() {
        let mut bytes = vec![0; 10 * PAGE_SIZE as usize];
        assert_eq!(zero_runs(&bytes), [(0, 40960)]);
        bytes[4095] = 1;
        bytes[3 * 4096] = 1;
        assert_eq!(zero_runs(&bytes), [(4096, 3 * 4096), (4 * 4096, 40960)]);
        assert_eq!(zero_runs(&bytes[..4097]), []);
        assert_eq!(zero_runs(&[]), []);
    }
}
