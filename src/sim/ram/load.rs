//! RAM out of a snapshot: copied at once, or page by page when it is touched.

use std::fs::File;
use std::io;
use std::path::Path;

use super::{Chain, PAGE, Ram, each_extent, read_up_to};
use crate::sim::release::Release;

/// Pages that still lie in the snapshot (userfaultfd).
#[derive(Debug)]
pub(super) struct Lazy {
    file: File,
    ranges: Vec<LazyRange>,
    /// Where the background fill goes on: range and page.
    cursor: (usize, u64),
    missing: u64,
}

#[derive(Debug)]
struct LazyRange {
    gpa: u64,
    pages: u64,
    offset: u64,
    arrived: Vec<u64>,
}

impl LazyRange {
    fn has(&self, page: u64) -> bool {
        self.arrived[(page / 64) as usize] & (1 << (page % 64)) != 0
    }
}

impl Ram {
    /// Fills RAM from a snapshot's memory file: `Copy`. `Ok(false)` means that the release
    /// would read for ever.
    pub(in crate::sim) fn fill(
        &mut self,
        path: &Path,
        ranges: &[(u64, u64)],
        release: Release,
    ) -> Result<bool, Chain> {
        let Some(file) = open_memory(path, ranges)? else {
            return Ok(true);
        };
        let length = file.metadata().map_or(0, |meta| meta.len());
        if release.loops_on_short_memory() && length < ranges.iter().map(|(_, len)| len).sum() {
            return Ok(false);
        }
        let mut offset = 0;
        for (gpa, len) in ranges {
            self.copy_in(&file, offset, *gpa, *len).map_err(|error| {
                vec![
                    "Memory manager error".to_owned(),
                    "Cannot fill guest memory".to_owned(),
                    error.to_string(),
                ]
            })?;
            offset += len;
        }
        Ok(true)
    }

    fn copy_in(&mut self, file: &File, offset: u64, gpa: u64, len: u64) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        each_extent(file, offset, len, |at, size| {
            let mut done = 0;
            while done < size {
                let take = (size - done).min(buffer.len() as u64) as usize;
                let read = read_up_to(file, &mut buffer[..take], at + done)?;
                if read == 0 {
                    break;
                }
                let zero = buffer[..read].iter().all(|b| *b == 0);
                if !zero {
                    self.write(gpa + (at + done - offset), &buffer[..read])?;
                }
                done += read as u64;
            }
            Ok(())
        })
    }

    /// Leaves RAM in the snapshot's memory file until it is touched: `OnDemand`.
    pub(in crate::sim) fn serve_lazily(
        &mut self,
        path: &Path,
        ranges: &[(u64, u64)],
    ) -> Result<(), Chain> {
        let Some(file) = open_memory(path, ranges)? else {
            return Ok(());
        };
        let mut offset = 0;
        let mut lazy_ranges = Vec::new();
        for (gpa, len) in ranges {
            let pages = len.div_ceil(PAGE);
            lazy_ranges.push(LazyRange {
                gpa: *gpa,
                pages,
                offset,
                arrived: vec![0; pages.div_ceil(64) as usize],
            });
            offset += len;
        }
        self.lazy = Some(Lazy {
            file,
            missing: lazy_ranges.iter().map(|r| r.pages).sum(),
            ranges: lazy_ranges,
            cursor: (0, 0),
        });
        Ok(())
    }

    /// Whether pages are still missing.
    pub(in crate::sim) fn is_incomplete(&self) -> bool {
        self.lazy.is_some()
    }

    /// Fetches up to `pages` pages in the background, from the start upwards.
    pub(in crate::sim) fn fetch_some(&mut self, pages: u64) -> io::Result<()> {
        for _ in 0..pages {
            let Some(lazy) = &mut self.lazy else {
                return Ok(());
            };
            let (range, page) = lazy.cursor;
            let Some(current) = lazy.ranges.get(range) else {
                self.lazy = None;
                return Ok(());
            };
            if page >= current.pages {
                lazy.cursor = (range + 1, 0);
                continue;
            }
            lazy.cursor.1 += 1;
            let gpa = current.gpa + page * PAGE;
            self.fetch(gpa)?;
        }
        Ok(())
    }

    /// Makes sure that the page at `gpa` is here.
    pub(super) fn fetch(&mut self, gpa: u64) -> io::Result<()> {
        let Some(lazy) = &mut self.lazy else {
            return Ok(());
        };
        let holds = |r: &&mut LazyRange| gpa >= r.gpa && gpa - r.gpa < r.pages * PAGE;
        let Some(range) = lazy.ranges.iter_mut().find(holds) else {
            return Ok(());
        };
        let page = (gpa - range.gpa) / PAGE;
        if range.has(page) {
            return Ok(());
        }
        let mut bytes = [0; PAGE as usize];
        read_up_to(&lazy.file, &mut bytes, range.offset + page * PAGE)?;
        range.arrived[(page / 64) as usize] |= 1 << (page % 64);
        lazy.missing -= 1;
        let start = range.gpa + page * PAGE;
        if lazy.missing == 0 {
            self.lazy = None;
        }
        if bytes.iter().any(|b| *b != 0) {
            self.write_present(start, &bytes)?;
        }
        Ok(())
    }
}

/// Opens a memory file, unless there is nothing in it to read.
fn open_memory(path: &Path, ranges: &[(u64, u64)]) -> Result<Option<File>, Chain> {
    if ranges.is_empty() {
        return Ok(None);
    }
    File::open(path).map(Some).map_err(|error| {
        vec![
            "Memory manager error".to_owned(),
            "Error opening snapshot file".to_owned(),
            error.to_string(),
        ]
    })
}
