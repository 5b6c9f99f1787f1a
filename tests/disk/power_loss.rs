//! Power losses: every state that the medium can have been in is looked at.
//!
//! A file system lies on `dm-log-writes` (`Documentation/admin-guide/device-mapper/log-writes.rst`,
//! `drivers/md/dm-log-writes.c`), which keeps all writes in the order in which they became
//! durable. The log is replayed up to each flush, and what is there then is mounted as after
//! a power loss.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rewake::fault::Faults;
use rewake::resource::disk::{DiskError, DiskPool};

use super::disklab::{
    BLOCK, Lab, Place, chain, in_test_machine, pattern, read_all, run, skip, soon, write_block,
};
use super::{SIZE, assert_same};

const MEDIUM: u64 = 48 << 20;
const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// One entry of the log: what was written where.
struct Entry {
    sector: u64,
    flags: u64,
    data: Vec<u8>,
}

fn read_log(path: &Path) -> Vec<Entry> {
    let log = File::open(path).unwrap();
    let word = |at| {
        let mut bytes = [0; 8];
        log.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    };
    assert_eq!(word(0), MAGIC);
    let sector_size = word(24) & 0xffff_ffff;
    assert_eq!(sector_size, 512);
    let mut at = sector_size;
    let mut entries = Vec::new();
    for _ in 0..word(16) {
        let (sector, sectors, flags, inline) =
            (word(at), word(at + 8), word(at + 16), word(at + 24));
        let follows = if flags & DISCARD == 0 {
            sectors * 512
        } else {
            0
        };
        let (from, len) = if flags & MARK == 0 {
            (at + sector_size, follows)
        } else {
            (at + 32, inline)
        };
        let mut data = vec![0; usize::try_from(len).unwrap()];
        log.read_exact_at(&mut data, from).unwrap();
        entries.push(Entry {
            sector,
            flags,
            data,
        });
        at += sector_size + follows;
    }
    entries
}

/// A file system whose writes are logged, unmounted and taken down when dropped.
struct Medium {
    name: String,
    mount: PathBuf,
    loops: Vec<String>,
    mounted: bool,
}

impl Medium {
    fn new(lab: &Lab, image: &Path, log: &Path) -> Self {
        let attach = |file: &Path| {
            let shown = run("losetup", &["-f", "--show", file.to_str().unwrap()]);
            shown.trim().to_owned()
        };
        let loops = vec![attach(image), attach(log)];
        let name = format!("log-{}", lab.prefix);
        let table = format!("0 {} log-writes {} {}", MEDIUM / 512, loops[0], loops[1]);
        run("dmsetup", &["create", &name, "--table", &table]);
        Self {
            name,
            mount: lab.dir.join("medium"),
            loops,
            mounted: false,
        }
    }

    fn mount(&mut self) {
        let info = ["info", "-c", "--noheadings", "-o", "minor", &self.name];
        let device = format!("/dev/dm-{}", run("dmsetup", &info).trim());
        let mount = self.mount.to_str().unwrap();
        run("mount", &["-t", "ext4", &device, mount]);
        self.mounted = true;
    }

    fn mark(&self, mark: &str) {
        run("dmsetup", &["message", &self.name, "0", "mark", mark]);
    }

    /// The power fails: what is not on the medium now does not get there.
    fn end(mut self) {
        run("umount", &[self.mount.to_str().unwrap()]);
        self.mounted = false;
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        if self.mounted {
            run("umount", &["-l", self.mount.to_str().unwrap()]);
        }
        run("dmsetup", &["remove", "--retry", &self.name]);
        for device in &self.loops {
            run("losetup", &["-d", device]);
        }
    }
}

/// What had been promised when the power failed.
#[derive(Debug, Default)]
struct Promised {
    created: bool,
    first: bool,
    second: bool,
    flattened: bool,
}

impl Promised {
    fn note(&mut self, mark: &[u8]) {
        match mark {
            b"created" => self.created = true,
            b"first" => self.first = true,
            b"second" => self.second = true,
            b"flattened" => self.flattened = true,
            _ => {}
        }
    }
}

#[test]
fn vm_a_power_loss_at_any_moment_leaves_whole_disks() {
    let test = "vm_a_power_loss_at_any_moment_leaves_whole_disks";
    if !in_test_machine(test) {
        return;
    }
    let Some(lab) = Lab::new(test, Place::DeviceMapper) else {
        return;
    };
    if !run("dmsetup", &["targets"]).contains("log-writes")
        && std::process::Command::new("modprobe")
            .arg("dm-log-writes")
            .status()
            .map_or(true, |it| !it.success())
    {
        skip(test, "the kernel has no dm-log-writes");
        return;
    }
    // A file system with a base image, and a copy of it from before the log begins.
    let (image, origin, log) = (
        lab.dir.join("medium.img"),
        lab.dir.join("origin.img"),
        lab.dir.join("medium.log"),
    );
    let mount = lab.dir.join("medium");
    fs::create_dir(&mount).unwrap();
    File::create(&image).unwrap().set_len(MEDIUM).unwrap();
    File::create(&log).unwrap().set_len(1 << 30).unwrap();
    let mkfs = ["-q", "-t", "ext4", "-E", "lazy_itable_init=0"];
    run("mke2fs", &[&mkfs[..], &[image.to_str().unwrap()]].concat());
    let at = mount.to_str().unwrap();
    run("mount", &["-o", "loop", image.to_str().unwrap(), at]);
    let base = lab.base("medium/base.raw", SIZE);
    fs::create_dir(mount.join("disks")).unwrap();
    run("umount", &[at]);
    fs::copy(&image, &origin).unwrap();

    let pool = lab.open(Faults::NONE);
    let mut medium = Medium::new(&lab, &image, &log);
    medium.mount();
    let before = read_all(&base);
    let disk = {
        let id = lab.id("a");
        let mode = rewake::resource::disk::DiskMode::Only(lab.place.kind());
        let disks = mount.join("disks");
        pool.create(&id, &base, &disks, mode, soon()).unwrap()
    };
    medium.mark("created");
    write_block(disk.path(), 3, &pattern("first", 3)).unwrap();
    medium.mark("first");
    write_block(disk.path(), 511, &pattern("second", 511)).unwrap();
    medium.mark("second");
    let expected = read_all(disk.path());
    let flat = mount.join("flat.raw");
    pool.flatten(&disk, &flat, &mut |_| {}, soon()).unwrap();
    medium.mark("flattened");
    pool.remove(disk, true, soon()).unwrap();
    medium.end();

    let entries = read_log(&log);
    let replayed = File::options().write(true).open(&origin).unwrap();
    let mut promised = Promised::default();
    let mut looked_at = 0;
    for (number, entry) in entries.iter().enumerate() {
        if entry.flags & MARK != 0 {
            promised.note(&entry.data);
        } else {
            let at = entry.sector * 512;
            replayed.write_all_at(&entry.data, at).unwrap();
        }
        if entry.flags & (FLUSH | FUA | MARK) != 0 {
            let case = format!("entry {number} of {}: {promised:?}", entries.len());
            look(&lab, &pool, &origin, &promised, (&before, &expected), &case);
            looked_at += 1;
        }
    }
    assert!(promised.flattened, "the marks are in the log");
    assert!(looked_at > 15, "{looked_at} states");
    println!("{looked_at} states of {} entries", entries.len());
    lab.assert_clean("at the end");
}

/// Mounts a copy of the medium as it was and looks at what is on it.
fn look(
    lab: &Lab,
    pool: &DiskPool,
    medium: &Path,
    promised: &Promised,
    (before, expected): (&[u8], &[u8]),
    case: &str,
) {
    let copy = lab.dir.join("copy.img");
    run(
        "cp",
        &[
            "--sparse=always",
            medium.to_str().unwrap(),
            copy.to_str().unwrap(),
        ],
    );
    let mount = lab.dir.join("medium");
    let at = mount.to_str().unwrap();
    run("mount", &["-o", "loop", copy.to_str().unwrap(), at]);
    let (id, disks) = (lab.id("a"), mount.join("disks"));
    match pool.attach(&id, &disks, soon()) {
        Ok(disk) => {
            let found = read_all(disk.path());
            let block = |bytes: &[u8], block: u64| {
                let at = usize::try_from(block * BLOCK).unwrap();
                bytes[at..at + 4096].to_vec()
            };
            for (number, must) in [(3, promised.first), (511, promised.second)] {
                let (found, new) = (block(&found, number), block(expected, number));
                let old = block(before, number);
                assert!(found == new || (!must && found == old), "{case}: {number}");
            }
            let mut rest = found;
            for number in [3, 511] {
                let at = usize::try_from(number * BLOCK).unwrap();
                rest[at..at + 4096].copy_from_slice(&block(before, number));
            }
            assert_same(&rest, before, case);
            pool.remove(disk, false, soon()).unwrap();
        }
        Err(failure) => {
            assert!(!promised.created, "{case}: {}", chain(&failure));
            match pool.remove_by_id(&id, &disks, false, soon()) {
                Ok(()) => {}
                Err(failure) if matches!(failure.source, DiskError::Missing { .. }) => {}
                Err(failure) => panic!("{case}: {}", chain(&failure)),
            }
        }
    }
    let left: Vec<_> = fs::read_dir(&disks).unwrap().flatten().collect();
    assert!(left.is_empty(), "{case}: {left:?}");
    let flat = mount.join("flat.raw");
    if flat.exists() {
        assert_same(&read_all(&flat), expected, case);
    } else {
        assert!(!promised.flattened, "{case}: the image is missing");
    }
    run("umount", &[at]);
}
