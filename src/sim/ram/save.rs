//! RAM on its way into a snapshot.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use serde_json::{Value, json};

use super::{ABOVE_HOLE, BELOW_HOLE, Backing, PAGE, Ram, Region, each_extent, read_up_to};

impl Ram {
    /// The ranges a snapshot has to save: all but shared mappings of files that have a name.
    pub(in crate::sim) fn saved_ranges(&self) -> Vec<(u64, u64)> {
        let needs_saving = |region: &&Region| match &region.backing {
            Backing::Shared { file, .. } => file.metadata().is_ok_and(|meta| meta.nlink() == 0),
            Backing::Own { .. } | Backing::Private { .. } => true,
        };
        let saved = self.regions.iter().filter(needs_saving);
        saved.map(|region| (region.gpa, region.size)).collect()
    }

    /// Writes the ranges one after the other: shared memory with its holes, private memory
    /// densely, zeros included.
    ///
    /// v52 saves pages of shared memory that have not arrived yet as holes, and with them
    /// loses their content. That is reproduced; private memory is fetched first.
    pub(in crate::sim) fn save(&mut self, out: &File, ranges: &[(u64, u64)]) -> io::Result<()> {
        out.set_len(ranges.iter().map(|(_, len)| len).sum())?;
        let mut offset = 0;
        for (gpa, len) in ranges {
            let shared = match &self.region_of(*gpa)?.backing {
                Backing::Own { shared, .. } => *shared,
                Backing::Shared { .. } => true,
                Backing::Private { .. } => false,
            };
            if !shared {
                let pages = len / PAGE;
                for page in 0..pages {
                    if self.lazy.is_none() {
                        break;
                    }
                    self.fetch(gpa + page * PAGE)?;
                }
            }
            self.save_region(out, offset, *gpa)?;
            offset += len;
        }
        Ok(())
    }

    fn save_region(&mut self, out: &File, offset: u64, gpa: u64) -> io::Result<()> {
        let region = self.region_of(gpa)?;
        let (file, base, changed, dense) = match &region.backing {
            Backing::Own { file, shared } => (file, 0, None, !shared),
            Backing::Shared { file, base } => (file, *base, None, false),
            Backing::Private {
                file,
                base,
                changed,
            } => {
                if file.metadata()?.len() < base + region.size {
                    // What write(2) says about a mapping beyond the end of its file.
                    return Err(rustix::io::Errno::FAULT.into());
                }
                (file, *base, Some(changed), true)
            }
        };
        let mut buffer = vec![0; 64 << 10];
        if dense {
            write_zeros(out, offset, region.size)?;
        }
        each_extent(file, base, region.size, |at, size| {
            let mut done = 0;
            while done < size {
                let take = (size - done).min(buffer.len() as u64) as usize;
                let read = read_up_to(file, &mut buffer[..take], at + done)?;
                if read == 0 {
                    break;
                }
                if buffer[..read].iter().any(|b| *b != 0) {
                    out.write_all_at(&buffer[..read], offset + at + done - base)?;
                }
                done += read as u64;
            }
            Ok(())
        })?;
        for (page, bytes) in changed.into_iter().flatten() {
            out.write_all_at(bytes, offset + page * PAGE)?;
        }
        Ok(())
    }

    /// The memory manager's part of `state.json`.
    pub(in crate::sim) fn state(&self, ranges: &[(u64, u64)]) -> Value {
        let total = self.total();
        let mappings: Vec<Value> = self
            .regions
            .iter()
            .map(|r| {
                json!({"slot": r.slot, "gpa": r.gpa, "size": r.size, "zone_id": r.zone,
                    "virtio_mem": false, "file_offset": r.file_offset})
            })
            .collect();
        let end = self
            .regions
            .iter()
            .map(|r| r.gpa + r.size)
            .max()
            .unwrap_or(0);
        let device_area = end.max(ABOVE_HOLE) + self.hotplug_size;
        let no_slot =
            json!({"base": 0, "length": 0, "active": false, "inserting": false, "removing": false});
        json!({
            "memory_ranges": {"data": ranges.iter().map(|(gpa, length)| json!({"gpa": gpa, "length": length})).collect::<Vec<_>>()},
            "guest_ram_mappings": mappings,
            "start_of_device_area": device_area,
            "boot_ram": total,
            "current_ram": total,
            "arch_mem_regions": [
                {"base": 0, "size": BELOW_HOLE, "r_type": "Ram"},
                {"base": ABOVE_HOLE, "size": u64::MAX, "r_type": "Ram"},
                {"base": BELOW_HOLE, "size": 671_088_640, "r_type": "SubRegion"},
                {"base": 3_892_314_112_u64, "size": 268_435_456, "r_type": "Reserved"},
            ],
            "hotplug_slots": vec![no_slot; 8],
            "next_memory_slot": self.next_slot,
            "selected_slot": 0,
            "next_hotplug_slot": 0,
        })
    }
}

/// Zeros that take up room, as `write(2)` of memory that nobody has touched leaves them.
fn write_zeros(out: &File, offset: u64, len: u64) -> io::Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut done = 0;
    while done < len {
        let take = (len - done).min(zeros.len() as u64);
        out.write_all_at(&zeros[..take as usize], offset + done)?;
        done += take;
    }
    Ok(())
}

/// The ranges a snapshot saved, from the memory manager's state.
pub(in crate::sim) fn ranges_of(state: &Value) -> Vec<(u64, u64)> {
    let list = state["memory_ranges"]["data"].as_array();
    list.into_iter()
        .flatten()
        .map(|r| {
            (
                r["gpa"].as_u64().unwrap_or(0),
                r["length"].as_u64().unwrap_or(0),
            )
        })
        .collect()
}
