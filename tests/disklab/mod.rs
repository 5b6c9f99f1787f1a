//! Places to make disks in, base images, and a census of what could be left behind.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared by test binaries that each use a part of it"
)]

#[path = "../netlab/faults.rs"]
pub mod faults;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::fault::{Faults, Inject};
use rewake::ids::SandboxId;
use rewake::resource::disk::{Disk, DiskConfig, DiskKind, DiskMode, DiskPool, Thresholds};
use rewake::units::Bytes;
use rustix::io::Errno;

pub const BLOCK: u64 = 4096;
/// 512 blocks: two areas of a store's bookkeeping, to the block.
pub const SIZE: u64 = 512 * BLOCK;

/// A deadline for calls that take milliseconds.
pub fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// Says why a test cannot run here, and that it was left out.
pub fn skip(test: &str, reason: impl std::fmt::Display) {
    eprintln!("SKIP {test}: {reason}");
}

/// Whether the test runs in the machine that was booted for it.
pub fn in_test_machine(test: &str) -> bool {
    let inside = std::env::var_os("REWAKE_TEST_MACHINE").is_some();
    if !inside {
        skip(test, "only inside the test machine (tests/vm/run-tests)");
    }
    inside
}

/// Runs a program and returns what it printed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .env(
            "PATH",
            format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap()),
        )
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}: {errors}",
        output.status
    );
    String::from_utf8(output.stdout).unwrap()
}

/// What the disks are kept on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The directory for temporary files, without device-mapper.
    Plain,
    /// The same, where no file can be made without a name (`O_TMPFILE`).
    Named,
    /// An XFS on a loop device.
    Xfs,
    /// A btrfs on a loop device.
    Btrfs,
    /// The directory for temporary files, with device-mapper.
    DeviceMapper,
}

impl Place {
    pub const fn kind(self) -> DiskKind {
        match self {
            Self::Plain | Self::Named => DiskKind::Copy,
            Self::Xfs | Self::Btrfs => DiskKind::Reflink,
            Self::DeviceMapper => DiskKind::DmSnapshot,
        }
    }
}

/// A file system that knows no files without a name, as NFS, 9p and FUSE.
pub struct OnlyNamed(pub Faults);

impl Inject for OnlyNamed {
    fn before(&self, step: &str) -> Result<(), Errno> {
        self.0.before(step)?;
        if step.starts_with("make a file in ") {
            self.0.after(step)?;
            return Err(Errno::OPNOTSUPP);
        }
        Ok(())
    }
    fn after(&self, step: &str) -> Result<(), Errno> {
        self.0.after(step)
    }
}

/// A directory of its own, mounted where the place needs it.
pub struct Lab {
    pub place: Place,
    /// Absolute, with images and stores beneath it.
    pub dir: PathBuf,
    /// Begins the name of every disk of this lab.
    pub prefix: String,
    mounted: bool,
}

impl Lab {
    /// Prepares the place; where that is impossible, says so and returns `None`.
    pub fn new(test: &str, place: Place) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("t{}x{number}", std::process::id());
        let dir = std::env::temp_dir().join(format!("rewake-disk-{prefix}"));
        let root = rustix::process::geteuid().is_root();
        if !matches!(place, Place::Plain | Place::Named) && !root {
            skip(test, "needs root");
            return None;
        }
        if place == Place::DeviceMapper
            && let Err(error) = DiskPool::open(DiskConfig::default(), Faults::NONE).snapshots_work()
        {
            skip(test, format!("no device-mapper snapshots: {error}"));
            return None;
        }
        fs::create_dir_all(&dir).unwrap();
        let mut lab = Self {
            place,
            dir: dir.canonicalize().unwrap(),
            prefix,
            mounted: false,
        };
        let format = match place {
            Place::Xfs => ("xfs", ["-q", "-m", "reflink=1"].as_slice(), 320 << 20),
            Place::Btrfs => ("btrfs", ["-q"].as_slice(), 256 << 20),
            Place::Plain | Place::Named | Place::DeviceMapper => ("", [].as_slice(), 0),
        };
        if format.2 > 0
            && let Err(reason) = lab.mount(format.0, format.1, format.2)
        {
            skip(test, reason);
            return None;
        }
        fs::create_dir(lab.dir.join("disks")).unwrap();
        Some(lab)
    }

    fn mount(&mut self, kind: &str, options: &[&str], bytes: u64) -> Result<(), String> {
        let image = self.dir.with_extension("fs");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
        let attempt = |program: &str, arguments: &[&str]| -> Result<(), String> {
            let output = Command::new(program)
                .args(arguments)
                .env("PATH", &path)
                .output()
                .map_err(|error| format!("{program}: {error}"))?;
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.success() {
                Ok(())
            } else {
                Err(format!("{program}: {errors}"))
            }
        };
        let image = image.to_str().unwrap();
        attempt(&format!("mkfs.{kind}"), &[options, &[image]].concat())?;
        let dir = self.dir.to_str().unwrap();
        attempt("mount", &["-t", kind, "-o", "loop", image, dir])?;
        self.mounted = true;
        Ok(())
    }

    pub fn config(&self) -> DiskConfig {
        DiskConfig {
            defer_sync: false,
            runtime_dir: self.dir.join("run"),
            store_size: None,
            thresholds: Thresholds {
                // Places are small.
                filesystem_free: Bytes::mib(1),
                ..Thresholds::default()
            },
        }
    }

    pub fn open(&self, faults: Faults) -> DiskPool {
        let faults = match self.place {
            Place::Named => Faults::inject(Arc::new(OnlyNamed(faults))),
            _ => faults,
        };
        DiskPool::open(self.config(), faults)
    }

    /// Where the stores go.
    pub fn disks(&self) -> PathBuf {
        self.dir.join("disks")
    }

    /// Where disks are kept ready.
    pub fn stock(&self) -> PathBuf {
        self.dir.join("stock")
    }

    pub fn id(&self, name: &str) -> SandboxId {
        SandboxId::new(format!("{}-{name}", self.prefix)).unwrap()
    }

    /// A base image: some data, zeros that are written, and holes.
    pub fn base(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.dir.join(name);
        let file = File::create(&path).unwrap();
        file.set_len(bytes).unwrap();
        for block in 0..bytes / BLOCK {
            match block % 8 {
                0 | 1 => file.write_all_at(&pattern(name, block), block * BLOCK),
                2 => file.write_all_at(&[0; BLOCK as usize], block * BLOCK),
                _ => Ok(()),
            }
            .unwrap();
        }
        path
    }

    /// What exists because of the disks of this lab: bound loop devices, mapped devices,
    /// files.
    pub fn census(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap();
            let read = |file: &str| fs::read_to_string(entry.path().join(file));
            if let Ok(file) = read("loop/backing_file")
                && Path::new(file.trim()).starts_with(&self.dir)
            {
                found.insert(format!("{name}: {}", file.trim()));
            }
            // Disks that are nobody's yet have names of their own.
            let stands_on_ours = || {
                let slaves = fs::read_dir(entry.path().join("slaves"));
                slaves.into_iter().flatten().flatten().any(|it| {
                    fs::read_to_string(it.path().join("loop/backing_file"))
                        .is_ok_and(|file| Path::new(file.trim()).starts_with(&self.dir))
                })
            };
            if let Ok(mapped) = read("dm/name")
                && (mapped.starts_with(&format!("rewake-{}", self.prefix)) || stands_on_ours())
            {
                found.insert(format!("{name}: {}", mapped.trim()));
            }
        }
        let mut dirs = vec![self.disks(), self.dir.join("run/nodes"), self.stock()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                found.insert(entry.path().display().to_string());
                dirs.push(entry.path());
            }
        }
        found
    }

    /// Waits until nothing is left of any disk; the kernel lets go of loop devices a moment
    /// after their last user.
    pub fn assert_clean(&self, case: &str) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let left = self.census();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < until, "{case}: left behind {left:#?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.place == Place::DeviceMapper && std::thread::panicking() {
            // A test that failed half-way shall not spoil the others.
            for name in self.census().iter().filter_map(|it| it.split(": ").nth(1)) {
                let _ = Command::new("dmsetup")
                    .args(["remove", "--retry", name])
                    .output();
            }
        }
        if self.mounted {
            // Lazily: a test that failed half-way may still have files open.
            let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
        }
        let _ = fs::remove_file(self.dir.with_extension("fs"));
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Makes a disk of the place's kind.
pub fn create(lab: &Lab, pool: &DiskPool, name: &str, base: &Path) -> Disk {
    let mode = DiskMode::Only(lab.place.kind());
    pool.create(&lab.id(name), base, &lab.disks(), mode, soon())
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// Expects bytes without printing megabytes when they differ.
pub fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: size");
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: first difference");
}

/// A block that no other place has.
pub fn pattern(name: &str, block: u64) -> Vec<u8> {
    let word = format!("{name} {block:016x} ");
    word.bytes().cycle().take(BLOCK as usize).collect()
}

/// All bytes of a file or device.
pub fn read_all(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// Writes a block as a guest would, and makes sure that it is on the disk.
pub fn write_block(path: &Path, block: u64, bytes: &[u8]) -> std::io::Result<()> {
    let file = File::options().write(true).open(path)?;
    file.write_all_at(bytes, block * BLOCK)?;
    file.sync_all()
}

/// An error with all its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
