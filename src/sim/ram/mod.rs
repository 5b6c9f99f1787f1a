//! Guest RAM: regions over files, in every way Cloud Hypervisor can back them.
//!
//! Nothing is read or written through a mapping; a zone's file is mapped all the same, as it is
//! by Cloud Hypervisor, for those who look for it there. Anonymous and memfd memory is a memfd; a `shared=on` zone is its
//! file; a `shared=off` zone is its file read-only with the written pages kept aside, which
//! is what a private mapping does.

mod load;
mod save;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rewake_sys::mapped::MappedFile;
use rustix::fs::{MemfdFlags, SeekFrom};
use serde_json::Value;

use crate::sim::config::{Memory, Zone};
use load::Lazy;
pub(super) use save::ranges_of;

/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;
/// RAM below the hole ends here (`arch/src/x86_64/layout.rs`).
const BELOW_HOLE: u64 = 3 << 30;
/// RAM goes on here.
const ABOVE_HOLE: u64 = 4 << 30;
/// Most bytes of guest RAM the stand-in takes on.
const MAX_RAM: u64 = 1 << 40;

/// An error chain, outermost first.
pub(super) type Chain = Vec<String>;

fn chain<const N: usize>(parts: [&str; N]) -> Chain {
    parts.map(str::to_owned).to_vec()
}

#[derive(Debug)]
enum Backing {
    /// Memory of its own; `shared` where Cloud Hypervisor would map it `MAP_SHARED`.
    Own { file: File, shared: bool },
    /// A zone's file, written through.
    Shared { file: File, base: u64 },
    /// A zone's file, never written: changed pages are kept aside.
    Private {
        file: File,
        base: u64,
        changed: HashMap<u64, Box<[u8]>>,
    },
}

#[derive(Debug)]
struct Region {
    slot: u64,
    gpa: u64,
    size: u64,
    zone: String,
    /// As the snapshot records it: zero for memory without a file.
    file_offset: u64,
    /// A zone's file, as others see that it is in use: in the process's mappings.
    _mapped: Option<MappedFile>,
    backing: Backing,
}

/// All RAM of a guest.
#[derive(Debug)]
pub(super) struct Ram {
    regions: Vec<Region>,
    lazy: Option<Lazy>,
    next_slot: u64,
    hotplug_size: u64,
}

impl Ram {
    /// Fresh RAM for a VM that boots.
    pub(super) fn fresh(memory: &Memory) -> Result<Self, Chain> {
        if memory.beside_zones > 0 {
            return Err(chain([
                "Memory manager error",
                "Memory configuration is not valid",
            ]));
        }
        if memory.zones.is_empty() {
            return Err(chain(["Memory manager error", "No memory zones found"]));
        }
        let mut layout = Vec::new();
        let mut gpa = 0;
        for zone in &memory.zones {
            let mut pieces = Vec::new();
            let mut done = 0;
            while done < zone.size {
                if gpa == BELOW_HOLE {
                    gpa = ABOVE_HOLE;
                }
                let room = if gpa < BELOW_HOLE {
                    BELOW_HOLE - gpa
                } else {
                    MAX_RAM
                };
                let size = room.min(zone.size - done);
                pieces.push((gpa, size, done));
                gpa += size;
                done += size;
            }
            layout.push((zone, pieces));
        }
        // The original walks a hash map here: with several zones the order is by chance.
        let by_chance = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0);
        let turns = (by_chance % layout.len() as u64) as usize;
        layout.rotate_left(turns);
        let mut regions = Vec::new();
        for (zone, pieces) in layout {
            for (gpa, size, offset) in pieces {
                let file_offset = if zone.file.is_some() { offset } else { 0 };
                let slot = regions.len() as u64;
                regions.push(region(zone, slot, gpa, size, file_offset)?);
            }
        }
        Ok(Self {
            next_slot: regions.len() as u64,
            regions,
            lazy: None,
            hotplug_size: memory.hotplug_size,
        })
    }

    /// RAM as the memory manager's state describes it, not filled yet.
    pub(super) fn restored(memory: &Memory, state: &Value) -> Result<Self, Chain> {
        if memory.beside_zones > 0 {
            return Err(chain([
                "Memory manager error",
                "Memory configuration is not valid",
            ]));
        }
        let mappings = state["guest_ram_mappings"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let mut slot = state["next_memory_slot"].as_u64().unwrap_or(0);
        let mut regions = Vec::new();
        for mapping in &mappings {
            let zone_id = mapping["zone_id"].as_str().unwrap_or_default();
            // A mapping of an unknown zone is skipped without a word.
            let Some(zone) = memory.zones.iter().find(|zone| zone.id == zone_id) else {
                continue;
            };
            let number = |key: &str| mapping[key].as_u64().unwrap_or(0);
            let size = number("size");
            regions.push(region(
                zone,
                slot,
                number("gpa"),
                size,
                number("file_offset"),
            )?);
            slot += 1;
        }
        if regions.is_empty() {
            return Err(chain([
                "Memory manager error",
                "Guest region collection error",
                "No memory region found",
            ]));
        }
        Ok(Self {
            regions,
            lazy: None,
            next_slot: slot,
            hotplug_size: memory.hotplug_size,
        })
    }

    /// Reads guest memory. Fetches what is still missing.
    pub(super) fn read(&mut self, gpa: u64, bytes: &mut [u8]) -> io::Result<()> {
        for (at, len) in pages_of(gpa, bytes.len()) {
            self.fetch(at)?;
            let from = (at - gpa) as usize;
            self.read_present(at, &mut bytes[from..from + len])?;
        }
        Ok(())
    }

    /// Writes guest memory.
    pub(super) fn write(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        if self.lazy.is_some() {
            for (at, _) in pages_of(gpa, bytes.len()) {
                self.fetch(at)?;
            }
        }
        self.write_present(gpa, bytes)
    }

    fn region_of(&mut self, gpa: u64) -> io::Result<&mut Region> {
        let holds = |r: &&mut Region| gpa >= r.gpa && gpa - r.gpa < r.size;
        self.regions
            .iter_mut()
            .find(holds)
            .ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "no RAM at this address"))
    }

    fn read_present(&mut self, gpa: u64, bytes: &mut [u8]) -> io::Result<()> {
        let region = self.region_of(gpa)?;
        let at = gpa - region.gpa;
        match &region.backing {
            Backing::Own { file, .. } => file.read_exact_at(bytes, at),
            Backing::Shared { file, base } => file.read_exact_at(bytes, base + at),
            Backing::Private {
                file,
                base,
                changed,
            } => {
                if let Some(page) = changed.get(&(at / PAGE)) {
                    let from = (at % PAGE) as usize;
                    bytes.copy_from_slice(&page[from..from + bytes.len()]);
                    return Ok(());
                }
                file.read_exact_at(bytes, base + at)
            }
        }
    }

    fn write_present(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let region = self.region_of(gpa + done as u64)?;
            let at = gpa + done as u64 - region.gpa;
            let room = usize::try_from(region.size - at).unwrap_or(usize::MAX);
            let len = room.min(bytes.len() - done);
            let piece = &bytes[done..done + len];
            match &mut region.backing {
                Backing::Own { file, .. } => file.write_all_at(piece, at)?,
                Backing::Shared { file, base } => file.write_all_at(piece, *base + at)?,
                Backing::Private {
                    file,
                    base,
                    changed,
                } => {
                    for (start, size) in pages_of(at, len) {
                        let page = start / PAGE;
                        if let std::collections::hash_map::Entry::Vacant(slot) = changed.entry(page)
                        {
                            let mut copy = vec![0; PAGE as usize];
                            file.read_exact_at(&mut copy, *base + page * PAGE)?;
                            slot.insert(copy.into_boxed_slice());
                        }
                        let copy = changed.get_mut(&page).ok_or(ErrorKind::NotFound)?;
                        let from = (start - at) as usize;
                        let into = (start % PAGE) as usize;
                        copy[into..into + size].copy_from_slice(&piece[from..from + size]);
                    }
                }
            }
            done += len;
        }
        Ok(())
    }

    /// Bytes of RAM.
    pub(super) fn total(&self) -> u64 {
        self.regions.iter().map(|region| region.size).sum()
    }

    /// Number of RAM regions the guest sees.
    pub(super) fn region_count(&self) -> u64 {
        self.regions.len() as u64
    }

    /// The guest address of page `index` of all RAM, in address order.
    pub(super) fn page_address(&self, index: u64) -> Option<u64> {
        let mut places: Vec<_> = self
            .regions
            .iter()
            .map(|r| (r.gpa, r.size / PAGE))
            .collect();
        places.sort_unstable();
        let mut left = index;
        for (gpa, pages) in places {
            if left < pages {
                return Some(gpa + left * PAGE);
            }
            left -= pages;
        }
        None
    }

    /// Reads one byte of each of these pages of all RAM.
    pub(super) fn touch(&mut self, first: u64, count: u64) -> io::Result<()> {
        for index in first..first + count {
            let Some(gpa) = self.page_address(index) else {
                return Ok(());
            };
            self.read(gpa, &mut [0])?;
        }
        Ok(())
    }
}

fn region(zone: &Zone, slot: u64, gpa: u64, size: u64, file_offset: u64) -> Result<Region, Chain> {
    let failed = |what: &str, error: &io::Error| {
        vec![
            "Memory manager error".to_owned(),
            what.to_owned(),
            error.to_string(),
        ]
    };
    if size == 0 || size > MAX_RAM {
        return Err(chain([
            "Memory manager error",
            "Memory configuration is not valid",
        ]));
    }
    let mut mapped = None;
    let backing = if let Some(path) = &zone.file {
        rustix::fs::statfs(path)
            .map_err(|error| failed("Failed to stat filesystem", &error.into()))?;
        if path.is_dir() {
            return Err(chain([
                "Memory manager error",
                "Memory zone file is a directory",
            ]));
        }
        let file = File::options().read(true).write(zone.shared).open(path);
        let file = file.map_err(|error| failed("Failed to create shared file", &error))?;
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        let made = MappedFile::new(file.as_fd(), length, zone.shared);
        let made = made.map_err(|error| failed("Failed to mmap guest memory", &error.into()))?;
        mapped = Some(made);
        if zone.shared {
            Backing::Shared {
                file,
                base: file_offset,
            }
        } else {
            let changed = HashMap::new();
            Backing::Private {
                file,
                base: file_offset,
                changed,
            }
        }
    } else {
        let memfd = rustix::fs::memfd_create("rewake-sim-ram", MemfdFlags::CLOEXEC)
            .map_err(|error| failed("Failed to create shared file", &error.into()))?;
        let file = File::from(memfd);
        file.set_len(size)
            .map_err(|error| failed("Failed to set shared file length", &error))?;
        Backing::Own {
            file,
            shared: zone.shared,
        }
    };
    Ok(Region {
        slot,
        gpa,
        size,
        zone: zone.id.clone(),
        file_offset,
        _mapped: mapped,
        backing,
    })
}

/// The pages that `len` bytes at `start` lie in: where each piece begins, and its length.
fn pages_of(start: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let end = start + len as u64;
    let mut at = start;
    std::iter::from_fn(move || {
        let piece = (PAGE - at % PAGE).min(end - at);
        let found = (at < end).then_some((at, piece as usize));
        at += piece;
        found
    })
}

/// Reads until the buffer is full or the file ends.
fn read_up_to(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Calls `visit` with each stretch of data within `len` bytes at `start`; holes are skipped.
fn each_extent(
    file: &File,
    start: u64,
    len: u64,
    mut visit: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let end = start + len;
    let mut at = start;
    while at < end {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole until the end of the file.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(rustix::io::Errno::INVAL) => return visit(at, end - at),
            Err(error) => return Err(error.into()),
        };
        if data >= end {
            return Ok(());
        }
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?.min(end);
        visit(data, hole - data)?;
        at = hole;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::sim::release::Release;

    fn zone(size: u64, file: Option<&Path>, shared: bool) -> Memory {
        Memory {
            zones: vec![Zone {
                id: "mem0".to_owned(),
                size,
                file: file.map(Path::to_path_buf),
                shared,
            }],
            hotplug_size: 0,
            beside_zones: 0,
        }
    }

    fn scratch(name: &str) -> std::path::PathBuf {
        let path =
            std::env::temp_dir().join(format!("rewake-sim-ram-{}-{name}", std::process::id()));
        std::fs::remove_file(&path).ok();
        path
    }

    #[test]
    fn a_guest_above_three_gib_gets_two_regions() {
        let ram = Ram::fresh(&zone(4 << 30, None, true)).unwrap();
        let ranges = ram.saved_ranges();
        assert_eq!(ranges, [(0, 3 << 30), (4 << 30, 1 << 30)]);
        let state = ram.state(&ranges);
        assert_eq!(
            state["guest_ram_mappings"][1]["file_offset"], 0,
            "as the original records it"
        );
        assert_eq!(state["start_of_device_area"], 5_u64 << 30);
        assert_eq!(ram.page_address(3 << 18), Some(4 << 30));
    }

    #[test]
    fn a_private_zone_never_changes_its_file() {
        let path = scratch("private");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let mut ram = Ram::fresh(&zone(1 << 20, Some(&path), false)).unwrap();
        ram.write(4090, &[1; 20]).unwrap();
        let mut seen = [0; 24];
        ram.read(4088, &mut seen).unwrap();
        assert_eq!(seen[..3], [7, 7, 1]);
        assert_eq!(seen[21..], [1, 7, 7]);
        assert!(std::fs::read(&path).unwrap().iter().all(|b| *b == 7));
        let out = scratch("private-out");
        let ranges = ram.saved_ranges();
        ram.save(&File::create_new(&out).unwrap(), &ranges).unwrap();
        let saved = std::fs::read(&out).unwrap();
        assert_eq!(saved.len(), 1 << 20);
        assert_eq!(saved[4088..4112], seen);
        std::fs::remove_file(path).unwrap();
        std::fs::remove_file(out).unwrap();
    }

    #[test]
    fn a_shared_zone_is_its_file_and_is_not_saved() {
        let path = scratch("shared");
        File::create_new(&path).unwrap().set_len(1 << 20).unwrap();
        let mut ram = Ram::fresh(&zone(1 << 20, Some(&path), true)).unwrap();
        ram.write(8192, b"here").unwrap();
        assert_eq!(ram.saved_ranges(), []);
        assert_eq!(&std::fs::read(&path).unwrap()[8192..8196], b"here");
        std::fs::remove_file(path).unwrap();
        assert_eq!(
            ram.saved_ranges().len(),
            1,
            "an unlinked file has to be saved"
        );
    }

    #[test]
    fn lazy_pages_arrive_when_touched_and_are_lost_only_as_in_v52() {
        let path = scratch("lazy");
        std::fs::write(&path, vec![5; 64 << 10]).unwrap();
        for (shared, first_after) in [(false, 5), (true, 0)] {
            let memory = zone(64 << 10, None, shared);
            let mut ram = Ram::fresh(&memory).unwrap();
            let ranges = ram.saved_ranges();
            ram.serve_lazily(&path, &ranges).unwrap();
            let mut byte = [0];
            ram.read(5 * PAGE, &mut byte).unwrap();
            assert_eq!(byte, [5]);
            assert!(ram.is_incomplete());
            let out = scratch(&format!("lazy-out-{shared}"));
            ram.save(&File::create_new(&out).unwrap(), &ranges).unwrap();
            let saved = std::fs::read(&out).unwrap();
            assert_eq!(saved[0], first_after, "shared={shared}");
            assert_eq!(saved[5 * PAGE as usize], 5, "shared={shared}");
            std::fs::remove_file(out).unwrap();
            ram.fetch_some(1000).unwrap();
            assert!(!ram.is_incomplete());
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_short_memory_file_leaves_zeros_without_a_word() {
        let path = scratch("short");
        std::fs::write(&path, vec![9; 8192]).unwrap();
        let mut ram = Ram::fresh(&zone(64 << 10, None, false)).unwrap();
        let ranges = ram.saved_ranges();
        assert!(ram.fill(&path, &ranges, Release::DEFAULT).unwrap());
        let mut bytes = [0; 2];
        ram.read(8191, &mut bytes[..1]).unwrap();
        ram.read(8192, &mut bytes[1..]).unwrap();
        assert_eq!(bytes, [9, 0]);
        assert!(
            !ram.fill(&path, &ranges, "51".parse().unwrap()).unwrap(),
            "v51 never comes back"
        );
        std::fs::remove_file(path).unwrap();
    }
}
