//! Power losses: every state that a medium can have been in is looked at.
//!
//! A file system lies on `dm-log-writes` (`Documentation/admin-guide/device-mapper/log-writes.rst`,
//! `drivers/md/dm-log-writes.c`), which keeps all writes in the order in which they became
//! durable. The log is replayed up to each flush, and what is there then is mounted as after
//! a power loss.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared by test binaries that each use a part of it"
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::disklab::{run, skip};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// A file system that media can be made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    fn make(self, image: &Path) {
        let image = image.to_str().unwrap();
        match self {
            Self::Ext4 => run(
                "mke2fs",
                &[
                    "-q",
                    "-t",
                    "ext4",
                    "-E",
                    "lazy_itable_init=0",
                    "-N",
                    "1024",
                    image,
                ],
            ),
            Self::Xfs => run("mkfs.xfs", &["-q", image]),
        };
    }
}

/// Whether the kernel can log writes; says so where it cannot.
pub fn can_log(test: &str) -> bool {
    let loaded = run("dmsetup", &["targets"]).contains("log-writes");
    let can = loaded
        || std::process::Command::new("modprobe")
            .arg("dm-log-writes")
            .status()
            .is_ok_and(|it| it.success());
    if !can {
        skip(test, "the kernel has no dm-log-writes");
    }
    can
}

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

/// A state that a medium was in.
pub struct Moment<'m> {
    /// The marks that had been set.
    pub marks: &'m [String],
    /// Whether this is where the last of them was set.
    pub is_mark: bool,
    /// Words for it.
    pub case: &'m str,
}

impl Moment<'_> {
    pub fn has(&self, mark: &str) -> bool {
        self.marks.iter().any(|it| it == mark)
    }
}

/// The files of a medium, its log and its states, in a directory of the test's own, removed
/// when dropped. It is in memory: every state is written to by being mounted.
pub struct Bench {
    dir: PathBuf,
    kind: Kind,
    bytes: u64,
    name: String,
    mount: PathBuf,
}

impl Bench {
    /// Makes a file system of `bytes`, which will be mounted at `mount`. `name` is one that
    /// no other test has.
    pub fn new(name: &str, kind: Kind, bytes: u64, mount: &Path) -> Self {
        let bench = Self {
            dir: Path::new("/dev/shm").join(format!("rewake-{name}")),
            kind,
            bytes,
            name: format!("log-{name}"),
            mount: mount.to_owned(),
        };
        fs::create_dir_all(mount).unwrap();
        fs::create_dir(&bench.dir).unwrap();
        File::create(bench.image()).unwrap().set_len(bytes).unwrap();
        File::create(bench.log()).unwrap().set_len(1 << 30).unwrap();
        kind.make(&bench.image());
        bench
    }

    fn image(&self) -> PathBuf {
        self.dir.join("medium.img")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("medium.log")
    }

    fn origin(&self) -> PathBuf {
        self.dir.join("origin.img")
    }

    /// Mounts the medium without a log while `work` is done.
    pub fn without_log<T>(&self, work: impl FnOnce() -> T) -> T {
        let mounted = Mounted::new(self.kind, &self.image(), &self.mount);
        let done = work();
        drop(mounted);
        done
    }

    /// Keeps what is on the medium now as where the log begins, and logs from here on.
    pub fn begin(&self) -> Medium {
        // What was formatted with zeros need not be copied for every state.
        run(
            "fallocate",
            &["--dig-holes", self.image().to_str().unwrap()],
        );
        copy(&self.image(), &self.origin());
        Medium::new(self)
    }

    /// Replays the log; `look` is called with the medium mounted as it was after each flush
    /// and at each mark. Returns how many states there were.
    pub fn replay(&self, mut look: impl FnMut(&Moment<'_>)) -> usize {
        let entries = read_log(&self.log());
        let replayed = File::options().write(true).open(self.origin()).unwrap();
        let mut marks = Vec::new();
        let mut states = 0;
        for (number, entry) in entries.iter().enumerate() {
            if entry.flags & MARK != 0 {
                // The kernel's own last word.
                if entry.data.starts_with(b"dm-log-writes-end") {
                    break;
                }
                let mark = String::from_utf8_lossy(&entry.data).into_owned();
                marks.push(mark.trim_end_matches('\0').to_owned());
            } else {
                let at = entry.sector * 512;
                replayed.write_all_at(&entry.data, at).unwrap();
            }
            if entry.flags & (FLUSH | FUA | MARK) != 0 {
                let state = self.dir.join("state.img");
                copy(&self.origin(), &state);
                let mounted = Mounted::new(self.kind, &state, &self.mount);
                look(&Moment {
                    marks: &marks,
                    is_mark: entry.flags & MARK != 0,
                    case: &format!("entry {number} of {}, after {marks:?}", entries.len()),
                });
                drop(mounted);
                states += 1;
            }
        }
        println!("{states} states of {} entries", entries.len());
        states
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn copy(from: &Path, to: &Path) {
    let paths = [from, to].map(|path| path.to_str().unwrap());
    run("cp", &["--sparse=auto", paths[0], paths[1]]);
}

/// A file system in a file, mounted.
struct Mounted(PathBuf);

impl Mounted {
    fn new(kind: Kind, image: &Path, mount: &Path) -> Self {
        let (image, at) = (image.to_str().unwrap(), mount.to_str().unwrap());
        run("mount", &["-t", kind.name(), "-o", "loop", image, at]);
        Self(mount.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let at = self.0.to_str().unwrap();
        if std::thread::panicking() {
            run("umount", &["-l", at]);
        } else {
            run("umount", &[at]);
        }
    }
}

/// A file system whose writes are logged, unmounted and taken down when dropped.
pub struct Medium {
    name: String,
    mount: PathBuf,
    loops: Vec<String>,
    mounted: bool,
}

impl Medium {
    fn new(bench: &Bench) -> Self {
        let attach = |file: &Path| {
            let shown = run("losetup", &["-f", "--show", file.to_str().unwrap()]);
            shown.trim().to_owned()
        };
        let loops = vec![attach(&bench.image()), attach(&bench.log())];
        let sectors = bench.bytes / 512;
        let table = format!("0 {sectors} log-writes {} {}", loops[0], loops[1]);
        run("dmsetup", &["create", &bench.name, "--table", &table]);
        let mut medium = Self {
            name: bench.name.clone(),
            mount: bench.mount.clone(),
            loops,
            mounted: false,
        };
        let info = ["info", "-c", "--noheadings", "-o", "minor", &medium.name];
        let device = format!("/dev/dm-{}", run("dmsetup", &info).trim());
        let mount = medium.mount.to_str().unwrap();
        run("mount", &["-t", bench.kind.name(), &device, mount]);
        medium.mounted = true;
        medium
    }

    /// The name under which others can [`mark`] it.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn mark(&self, text: &str) {
        mark(&self.name, text);
    }

    /// The power fails: what is not on the medium now does not get there.
    pub fn end(mut self) {
        run("umount", &[self.mount.to_str().unwrap()]);
        self.mounted = false;
    }
}

/// Writes a mark into the log of the medium of this name.
pub fn mark(medium: &str, text: &str) {
    run("dmsetup", &["message", medium, "0", "mark", text]);
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
