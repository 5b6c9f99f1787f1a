//! Which pages a restored guest needs first, kept beside its template and read ahead.
//!
//! A guest in a private mapping reads its pages when it touches them. From a template that is
//! in the page cache that costs nothing; from one that is not, each touch waits for the disk,
//! one after the other, and guests touch pages all over their memory. What they touch until
//! they are ready is much the same every time, so it is recorded once and asked for in one go
//! at the next restore, while CH is still starting.
//!
//! What is recorded are the pages that CH's mapping of the file has page table entries for
//! (`/proc/PID/pagemap`, Documentation/admin-guide/mm/pagemap.rst): those that the guest or CH
//! touched, the copies of those that it wrote, and, where the page cache had them already, up
//! to 15 neighbours of each, which the kernel maps along (`fault_around_bytes`). Where guest
//! memory has transparent huge pages, which is CH's default, the kernel reads and maps 2 MiB
//! around each: a guest that touches pages all over its memory then has a set of most of it,
//! and reading that ahead saves little. With `thp=off` the set is what was touched
//! (`cargo bench --bench working_set` shows both). What is in the page cache (`mincore`) says
//! nothing: other clones and readahead brought it there.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self, Advice, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{UsageError, usage};
use crate::snapshot::memory::PAGE_SIZE;
use crate::units::Bytes;

/// Its name in a snapshot directory.
pub const WORKING_SET_FILE: &str = "working-set";
/// Begins the file; the digit is its version.
const MAGIC: &[u8] = b"rewake working set 1\n";
/// Most bytes of the file.
const MAX_FILE: usize = 1 << 20;
/// Most extents. The smallest are dropped by being joined with their neighbours.
const MAX_EXTENTS: usize = 65_536;
/// To read so many pages more is cheaper than another read.
const JOIN_PAGES: u64 = 8;

/// Pages of a memory file that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first page.
    pub first: u64,
    /// How many.
    pub pages: u64,
}

/// The pages of a memory file that a guest needs first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkingSet {
    extents: Vec<Extent>,
}

/// Bytes that are no working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Not a working set: {what} at byte {at}")]
pub struct Malformed {
    what: &'static str,
    at: usize,
}

/// Why a working set could not be recorded, kept, or found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkingSetError {
    /// The process's memory is not known.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// The process maps no memory file: it copied its memory, or is the stand-in.
    #[error("Process {pid} maps no memory file")]
    NotMapped {
        /// Its pid.
        pid: u32,
    },
    /// A file cannot be read or written.
    #[error("Cannot {call} {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        call: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is there is no working set.
    #[error("Cannot use {}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Malformed,
    },
}

impl WorkingSet {
    /// Of pages in any order, pages that are near one another joined.
    #[must_use]
    pub fn of_pages(mut pages: Vec<u64>) -> Self {
        pages.sort_unstable();
        let mut set = Self::default();
        let mut gap = JOIN_PAGES;
        set.extend(pages.iter().copied(), gap);
        while set.extents.len() > MAX_EXTENTS {
            gap *= 4;
            set.extents.clear();
            set.extend(pages.iter().copied(), gap);
        }
        set
    }

    fn extend(&mut self, sorted: impl Iterator<Item = u64>, gap: u64) {
        for page in sorted.filter(|page| *page < u64::MAX / PAGE_SIZE) {
            match self.extents.last_mut() {
                Some(last) if page <= last.first + last.pages + gap => {
                    last.pages = last.pages.max(page + 1 - last.first);
                }
                _ => self.extents.push(Extent {
                    first: page,
                    pages: 1,
                }),
            }
        }
    }

    /// The pages, in order and apart.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// How much it is.
    #[must_use]
    pub fn size(&self) -> Bytes {
        Bytes(self.extents.iter().map(|it| it.pages * PAGE_SIZE).sum())
    }

    /// Where the last of them ends in the memory file.
    #[must_use]
    pub fn end(&self) -> Bytes {
        let last = self.extents.last();
        Bytes(last.map_or(0, |it| (it.first + it.pages) * PAGE_SIZE))
    }

    /// As bytes: for each extent the distance from the end of the last one and its length,
    /// seven bits a byte.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let mut end = 0;
        for extent in &self.extents {
            put(&mut bytes, extent.first - end);
            put(&mut bytes, extent.pages);
            end = extent.first + extent.pages;
        }
        bytes
    }

    /// Reads what [`WorkingSet::encode`] wrote, with bounds.
    ///
    /// # Errors
    /// [`Malformed`]: what is wrong, and where.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let malformed = |what, at| Malformed { what, at };
        if bytes.len() > MAX_FILE {
            return Err(malformed("too many bytes", MAX_FILE));
        }
        let Some(mut rest) = bytes.strip_prefix(MAGIC) else {
            return Err(malformed("another beginning", 0));
        };
        let (mut extents, mut end) = (Vec::new(), 0_u64);
        while !rest.is_empty() {
            let at = bytes.len() - rest.len();
            let distance = take(&mut rest).ok_or(malformed("no number", at))?;
            let pages = take(&mut rest).ok_or(malformed("no number", at))?;
            let first = end.checked_add(distance);
            let last = first.and_then(|first| first.checked_add(pages));
            let (Some(first), Some(last)) = (first, last) else {
                return Err(malformed("a page beyond any file", at));
            };
            if pages == 0 || last > u64::MAX / PAGE_SIZE || extents.len() == MAX_EXTENTS {
                return Err(malformed("an extent that cannot be", at));
            }
            extents.push(Extent { first, pages });
            end = last;
        }
        Ok(Self { extents })
    }

    /// The pages of its memory file that a Cloud Hypervisor has in its page tables now. Right
    /// after the agent's first answer that is what the guest needed for it.
    ///
    /// # Errors
    /// [`WorkingSetError::NotMapped`] in the modes without a file; others if `/proc` does not
    /// say.
    pub fn record(pid: u32) -> Result<Self, WorkingSetError> {
        let mappings = usage(pid)?.mappings;
        let path = PathBuf::from(format!("/proc/{pid}/pagemap"));
        let failed = |call| {
            let path = path.clone();
            move |source| WorkingSetError::File { path, call, source }
        };
        let pagemap = File::open(&path).map_err(failed("open"))?;
        let mut pages = Vec::new();
        let mut mapped = false;
        for mapping in mappings.iter().filter(|mapping| mapping.has_file()) {
            mapped = true;
            let offset = mapping.offset / PAGE_SIZE;
            let first = mapping.start / PAGE_SIZE;
            present(&pagemap, first, mapping.size() / PAGE_SIZE, |page| {
                pages.push(offset + page);
            })
            .map_err(failed("read"))?;
        }
        if !mapped {
            return Err(WorkingSetError::NotMapped { pid });
        }
        Ok(Self::of_pages(pages))
    }

    /// Writes it into a snapshot directory, where it replaces an older one in one step.
    ///
    /// # Errors
    /// [`WorkingSetError::File`].
    pub fn save(&self, directory: &Path) -> Result<(), WorkingSetError> {
        let path = directory.join(WORKING_SET_FILE);
        let new = directory.join(format!(".{WORKING_SET_FILE}.{}", std::process::id()));
        let written = std::fs::write(&new, self.encode()).and_then(|()| {
            // Else a power loss could leave an empty file under the name.
            File::open(&new)?.sync_data()?;
            fs::renameat_with(CWD, &new, CWD, &path, RenameFlags::empty())?;
            Ok(())
        });
        written.map_err(|source| {
            let _ = std::fs::remove_file(&new);
            let call = "write";
            WorkingSetError::File { path, call, source }
        })
    }

    /// Reads the one of an opened snapshot directory; `None` where there is none.
    ///
    /// # Errors
    /// [`WorkingSetError`]. To restore without it is slower, not wrong.
    pub fn load(directory: impl AsFd) -> Result<Option<Self>, WorkingSetError> {
        let path = PathBuf::from(WORKING_SET_FILE);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: OwnedFd = match fs::openat(directory, WORKING_SET_FILE, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            Ok(file) => file,
            Err(errno) => {
                let (call, source) = ("open", errno.into());
                return Err(WorkingSetError::File { path, call, source });
            }
        };
        let mut bytes = Vec::new();
        let limit = MAX_FILE as u64 + 1;
        match io::Read::read_to_end(&mut io::Read::take(File::from(file), limit), &mut bytes) {
            Ok(_) => match Self::decode(&bytes) {
                Ok(set) => Ok(Some(set)),
                Err(source) => Err(WorkingSetError::Malformed { path, source }),
            },
            Err(source) => {
                let call = "read";
                Err(WorkingSetError::File { path, call, source })
            }
        }
    }

    /// Asks the kernel to read these pages of the memory file ahead
    /// (`posix_fadvise(POSIX_FADV_WILLNEED)`), and does not wait for them. Pages that are
    /// there already cost a look. Advice that fails is no error.
    pub fn read_ahead(&self, file: impl AsFd) {
        for extent in &self.extents {
            let length = NonZeroU64::new(extent.pages * PAGE_SIZE);
            let _ = fs::fadvise(&file, extent.first * PAGE_SIZE, length, Advice::WillNeed);
        }
    }
}

/// Calls `visit` with every page of `first..first + count` that has an entry, counted from
/// `first`.
fn present(pagemap: &File, first: u64, count: u64, mut visit: impl FnMut(u64)) -> io::Result<()> {
    // Present, or swapped out.
    const THERE: u64 = 0b11 << 62;
    let mut buffer = vec![0; 1 << 18];
    let mut done = 0;
    while done < count {
        let wanted = usize::try_from((count - done) * 8).unwrap_or(usize::MAX);
        let take = wanted.min(buffer.len());
        let read = pagemap.read_at(&mut buffer[..take], (first + done) * 8)?;
        if read < 8 {
            return Ok(());
        }
        for entry in buffer[..read].chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            if entry & THERE != 0 {
                visit(done);
            }
            done += 1;
        }
    }
    Ok(())
}

/// LEB128.
fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// LEB128 of at most 64 bits, in its shortest form.
fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for index in 0..10 {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        let shifted = bits.checked_shl(7 * index)?;
        if shifted >> (7 * index) != bits || (index > 0 && *byte == 0) {
            return None;
        }
        number |= shifted;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_become_extents_and_bytes_and_extents_again() {
        let set = WorkingSet::of_pages(vec![900, 5, 6, 7, 10, 5, 19, 29, 1 << 40]);
        let extents: Vec<_> = set.extents().iter().map(|e| (e.first, e.pages)).collect();
        assert_eq!(extents, [(5, 15), (29, 1), (900, 1), (1 << 40, 1)]);
        assert_eq!(set.size(), Bytes(18 * 4096));
        assert_eq!(WorkingSet::decode(&set.encode()), Ok(set));
        assert_eq!(WorkingSet::decode(MAGIC), Ok(WorkingSet::default()));
    }

    #[test]
    fn what_is_no_working_set_is_refused_with_its_place() {
        let with = |tail: &[u8]| WorkingSet::decode(&[MAGIC, tail].concat());
        for (name, tail) in [
            ("half", &[5][..]),
            ("cut", &[0x80]),
            ("empty extent", &[5, 0]),
            ("not shortest", &[0x80, 0, 1]),
            ("too long", &[0xff; 12]),
            (
                "beyond",
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 1],
            ),
        ] {
            assert!(with(tail).is_err(), "{name}");
        }
        assert!(WorkingSet::decode(b"rewake working set 2\n").is_err());
        assert!(WorkingSet::decode(&vec![b'x'; MAX_FILE + 1]).is_err());
    }

    #[test]
    fn too_many_places_are_joined() {
        let pages = (0..200_000).map(|page| page * 20).collect();
        let set = WorkingSet::of_pages(pages);
        assert!(set.extents().len() <= MAX_EXTENTS);
        let last = set.extents().last().unwrap();
        assert_eq!(last.first + last.pages, 199_999 * 20 + 1);
    }

    #[test]
    fn it_is_kept_in_a_directory_and_found_there() {
        let path = std::env::temp_dir().join(format!("rewake-set-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        let directory = File::open(&path).unwrap();
        assert_eq!(WorkingSet::load(&directory).unwrap(), None);
        for pages in [vec![1, 2, 3], vec![77]] {
            let set = WorkingSet::of_pages(pages);
            set.save(&path).unwrap();
            assert_eq!(WorkingSet::load(&directory).unwrap(), Some(set));
        }
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 1);
        std::fs::write(path.join(WORKING_SET_FILE), "something").unwrap();
        assert!(WorkingSet::load(&directory).is_err());
        std::fs::remove_dir_all(&path).unwrap();
    }
}
