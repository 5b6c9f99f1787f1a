//! A device-mapper `snapshot` of a shared base image
//! (`Documentation/admin-guide/device-mapper/snapshot.rst`, `drivers/md/dm-snap*.c`).

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rewake_sys::dm::{Control, DeviceInfo, DeviceRef, Target};
use rewake_sys::error::Named;
use rewake_sys::loopdev::{LOOP_MAJOR, LoopDevice, LoopOptions};
use rustix::fs::{CWD, FileType, Mode};

use super::error::{DiskError, call};
use super::pressure::{self, SnapshotWords};
use super::record::Base;
use super::{DiskPool, DiskStep, base_loop, file};
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::ids::SandboxId;
use crate::units::Bytes;

pub(super) const UUID_PREFIX: &str = "REWAKE-DISK-";
pub(super) const NAME_PREFIX: &str = "rewake-";
/// Sectors of a chunk, the unit that is copied on the first write: 4 KiB.
const CHUNK_SECTORS: u64 = 8;
const CHUNK_BYTES: u64 = CHUNK_SECTORS * 512;
/// Entries of 16 bytes in a chunk of the store's bookkeeping.
const EXCEPTIONS_PER_CHUNK: u64 = CHUNK_BYTES / 16;
/// `SNAP_MAGIC`, drivers/md/dm-snap-persistent.c.
const MAGIC: u32 = 0x7041_6e53;

/// The size at which a store can take a write to every chunk of its origin: a header, then
/// areas of one chunk of bookkeeping and 256 of data. One chunk of bookkeeping more than
/// that, since the kernel clears the next one as soon as an area is full.
pub(super) fn full_store(origin: Bytes) -> Bytes {
    let chunks = origin.0.div_ceil(CHUNK_BYTES);
    let bookkeeping = chunks / EXCEPTIONS_PER_CHUNK + 1;
    Bytes((1 + chunks + bookkeeping).saturating_mul(CHUNK_BYTES))
}

/// A snapshot that the kernel serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) name: String,
    pub(super) uuid: String,
    pub(super) path: PathBuf,
}

/// The uuid of the mapping of a store: as the kernel takes each uuid once, no store can be
/// in use twice. While it is in use its inode number cannot become another file's.
pub(super) fn uuid(store: &File, path: &Path) -> Result<String, DiskError> {
    let found = file::metadata(store, path)?;
    Ok(format!("{UUID_PREFIX}{:x}-{:x}", found.dev(), found.ino()))
}

/// A name for a disk's device, made for this one time.
pub(super) fn name_of(id: &SandboxId) -> String {
    let random = uuid::Uuid::new_v4().simple().to_string();
    format!("{NAME_PREFIX}{id}-{}", &random[..8])
}

/// Refuses a store that the kernel would take for something else: it silently starts anew
/// on a store whose header it does not know.
pub(super) fn check_store(
    store: &File,
    path: &Path,
    bytes: u64,
    faults: &Faults,
) -> Result<(), DiskError> {
    if file::metadata(store, path)?.len() < bytes {
        return Err(DiskError::unusable(path, "it is shorter than it was made"));
    }
    let mut header = [0; 16];
    call(faults, format!("read {}", path.display()), || {
        store.read_exact_at(&mut header, 0).named("pread")
    })?;
    let word = |i: usize| {
        u32::from_le_bytes([
            header[4 * i],
            header[4 * i + 1],
            header[4 * i + 2],
            header[4 * i + 3],
        ])
    };
    // magic, valid, version, chunk size (`struct disk_header`).
    match [word(0), word(1), word(2), word(3)] {
        // Never attached.
        [0, 0, 0, 0] => Ok(()),
        [MAGIC, 0, ..] => Err(DiskError::unusable(path, "the kernel marked it invalid")),
        [MAGIC, _, 1, chunk] if u64::from(chunk) == CHUNK_SECTORS => Ok(()),
        [MAGIC, ..] => Err(DiskError::unusable(path, "its layout is another one")),
        _ => Err(DiskError::unusable(path, "it is no copy-on-write store")),
    }
}

impl DiskPool {
    pub(super) fn control(&self) -> Result<&Control, DiskError> {
        self.control.as_ref().map_err(|source| DiskError::Call {
            step: "open the device-mapper".to_owned(),
            source: *source,
        })
    }

    /// The mapping of a store, if there is one.
    pub(super) fn mapping(&self, uuid: &str) -> Result<Option<DeviceInfo>, DiskError> {
        call(&self.faults, "look for the store's device", || {
            match &self.control {
                Ok(control) => control.info(DeviceRef::Uuid(uuid)),
                // No driver, no device.
                Err(error) if error.is_gone() => Ok(None),
                Err(error) => Err(*error),
            }
        })
    }

    /// Puts a store over its base image. A mapping left by a process that died is taken
    /// over if it is whole, and removed if it is not.
    pub(super) fn map(
        &self,
        id: &SandboxId,
        (store, store_path): (&File, &Path),
        base: &Base,
        steps: &mut Vec<DiskStep>,
        deadline: Deadline,
    ) -> Result<Mapping, DiskError> {
        let uuid = uuid(store, store_path)?;
        if let Some(found) = self.mapping(&uuid)? {
            let name = found.name.clone();
            if found.open_count > 0 {
                return Err(DiskError::InUse {
                    name,
                    deferred: found.deferred_remove,
                });
            }
            let step = DiskStep::Mapping {
                name: name.clone(),
                uuid: uuid.clone(),
            };
            if self.is_whole(&found, base, store)? {
                log::info!("Disk {id}: {name} is still there");
                steps.push(step);
                let path = self.node(found.device, steps)?;
                return Ok(Mapping { name, uuid, path });
            }
            step.undo_with(Some(&self.control), &self.faults, deadline)?;
        }
        self.make_mapping(id, uuid, store, base, steps, deadline)
    }

    fn make_mapping(
        &self,
        id: &SandboxId,
        uuid: String,
        store: &File,
        base: &Base,
        steps: &mut Vec<DiskStep>,
        deadline: Deadline,
    ) -> Result<Mapping, DiskError> {
        let control = self.control()?;
        let name = name_of(id);
        // Both stay open until the mapping holds them.
        let origin = base_loop::share(base, &self.config.runtime_dir, &self.faults, deadline)?;
        let cow = call(&self.faults, "bind the store to a loop device", || {
            LoopDevice::bind_in(
                store.as_fd(),
                LoopOptions {
                    read_only: false,
                    autoclear: true,
                    direct_io: true,
                    block_size: base_loop::SECTOR,
                },
                &self.nodes(),
            )
        })?;
        let table = Target {
            start: 0,
            length: base.size().sectors().0,
            kind: "snapshot".to_owned(),
            text: format!(
                "{LOOP_MAJOR}:{} {LOOP_MAJOR}:{} PO {CHUNK_SECTORS}",
                origin.number(),
                cow.number()
            ),
        };
        if deadline.has_passed() {
            return Err(DiskError::Timeout {
                step: format!("make {name}"),
            });
        }
        steps.push(DiskStep::Mapping {
            name: name.clone(),
            uuid: uuid.clone(),
        });
        let device = DeviceRef::Name(&name);
        call(&self.faults, format!("make {name}"), || {
            control.create(&name, &uuid)
        })?;
        call(&self.faults, format!("load the table of {name}"), || {
            control.load(device, std::slice::from_ref(&table), false)
        })?;
        let info = call(&self.faults, format!("start {name}"), || {
            control.resume(device)
        })?;
        let status = call(&self.faults, format!("read the status of {name}"), || {
            control.status(device)
        })?;
        if status.first().map(pressure::parse) == Some(SnapshotWords::Invalid) {
            return Err(DiskError::Invalid { id: id.clone() });
        }
        let path = self.node(info.device, steps)?;
        Ok(Mapping { name, uuid, path })
    }

    /// Whether a mapping is the one that we would make: a running snapshot of this base
    /// image over this store.
    fn is_whole(&self, found: &DeviceInfo, base: &Base, store: &File) -> Result<bool, DiskError> {
        if !found.active || found.suspended || found.deferred_remove {
            return Ok(false);
        }
        let control = self.control()?;
        let device = DeviceRef::Name(&found.name);
        let table = call(&self.faults, "read the device's table", || {
            control.table(device)
        })?;
        let [target] = table.as_slice() else {
            return Ok(false);
        };
        let store = file::metadata(store, Path::new("the store"))?;
        let wanted = [
            (base.device, base.identity.inode),
            (store.dev(), store.ino()),
        ];
        let mut words = target.text.split(' ');
        let mut behind = || {
            let (major, minor) = words.next()?.split_once(':')?;
            (major.parse() == Ok(LOOP_MAJOR)).then_some(())?;
            let device = LoopDevice::open_in(minor.parse().ok()?, true, &self.nodes());
            let status = device.ok()?.status().ok()??;
            Some((status.device, status.inode))
        };
        let files = [behind(), behind()];
        Ok(target.kind == "snapshot"
            && target.length == base.size().sectors().0
            && files == wanted.map(Some)
            && words.eq(["PO", &CHUNK_SECTORS.to_string()]))
    }

    /// Where the device can be opened, as far as it is known.
    pub(super) fn shown(&self, device: u64) -> PathBuf {
        let usual = usual_node(device);
        if is_node_of(&usual, device) {
            return usual;
        }
        self.made_node(device).unwrap_or(usual)
    }

    /// Where the device can be opened: `/dev/dm-N` where devtmpfs is, else a node of ours.
    pub(super) fn node(
        &self,
        device: u64,
        steps: &mut Vec<DiskStep>,
    ) -> Result<PathBuf, DiskError> {
        let usual = usual_node(device);
        if is_node_of(&usual, device) {
            return Ok(usual);
        }
        let path = self.own_node(device);
        steps.push(DiskStep::Node {
            path: path.clone(),
            device,
        });
        if is_node_of(&path, device) {
            return Ok(path);
        }
        call(&self.faults, format!("make {}", path.display()), || {
            std::fs::create_dir_all(self.nodes()).named("mkdir")?;
            let mode = Mode::RUSR | Mode::WUSR;
            rustix::fs::mknodat(CWD, &path, FileType::BlockDevice, mode, device).named("mknod")
        })?;
        // A file system that is mounted `nodev` takes nodes and opens none.
        file::open(&path, false, &self.faults)?;
        Ok(path)
    }

    /// The node of ours, if the device has one.
    pub(super) fn made_node(&self, device: u64) -> Option<PathBuf> {
        Some(self.own_node(device)).filter(|it| is_node_of(it, device))
    }

    fn own_node(&self, device: u64) -> PathBuf {
        let name = format!("dm-{}", rustix::fs::minor(device));
        self.nodes().join(name)
    }

    fn nodes(&self) -> PathBuf {
        base_loop::nodes(&self.config.runtime_dir)
    }

    /// The disks of this machine that share the image.
    pub(super) fn sharers(&self, base: &Base) -> Result<Vec<String>, DiskError> {
        let (Ok(control), Some(origin)) = (
            &self.control,
            base_loop::find(base, &self.config.runtime_dir, &self.faults)?,
        ) else {
            return Ok(Vec::new());
        };
        let devices = call(&self.faults, "list the devices", || control.list())?;
        let mut sharers = Vec::new();
        for listed in devices {
            let Some(rest) = listed.name.strip_prefix(NAME_PREFIX) else {
                continue;
            };
            let deps = match control.deps(DeviceRef::Name(&listed.name)) {
                Ok(deps) => deps,
                // Removed meanwhile.
                Err(error) if error.is_gone() => continue,
                Err(source) => {
                    return Err(DiskError::Call {
                        step: format!("read what {} stands on", listed.name),
                        source,
                    });
                }
            };
            if deps.contains(&origin.device()) {
                let id = rest.rsplit_once('-').map_or(rest, |(id, _)| id);
                sharers.push(id.to_owned());
            }
        }
        sharers.sort_unstable();
        Ok(sharers)
    }
}

/// Where devtmpfs shows the device.
fn usual_node(device: u64) -> PathBuf {
    format!("/dev/dm-{}", rustix::fs::minor(device)).into()
}

fn is_node_of(path: &Path, device: u64) -> bool {
    std::fs::metadata(path).is_ok_and(|it| it.file_type().is_block_device() && it.rdev() == device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_store_has_room_for_every_chunk() {
        for (origin, chunks) in [
            (512, 1 + 1 + 1),
            (4096, 1 + 1 + 1),
            (255 * 4096, 1 + 255 + 1),
            // The area is full: the kernel clears the bookkeeping of the next one.
            (256 * 4096, 1 + 256 + 2),
            (257 * 4096, 1 + 257 + 2),
        ] {
            assert_eq!(full_store(Bytes(origin)), Bytes(chunks * 4096), "{origin}");
        }
    }

    #[test]
    fn strange_stores_are_refused() {
        let path = std::env::temp_dir().join(format!("rewake-store-{}", std::process::id()));
        let words = |words: [u32; 4]| {
            let bytes: Vec<u8> = words.iter().flat_map(|it| it.to_le_bytes()).collect();
            [bytes, vec![0; 4080]].concat()
        };
        for (name, bytes, accepted) in [
            ("fresh", words([0; 4]), true),
            ("in use before", words([MAGIC, 1, 1, 8]), true),
            ("marked invalid", words([MAGIC, 0, 1, 8]), false),
            ("other chunks", words([MAGIC, 1, 1, 16]), false),
            ("other version", words([MAGIC, 1, 2, 8]), false),
            ("something else", words([1, 2, 3, 4]), false),
            ("cut", vec![0; 100], false),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let store = File::open(&path).unwrap();
            let checked = check_store(&store, &path, 4096, &Faults::NONE);
            assert_eq!(checked.is_ok(), accepted, "{name}");
        }
        std::fs::remove_file(&path).unwrap();
    }
}
