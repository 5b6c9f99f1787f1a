//! Where templates and sandboxes live: the file system under the root directory.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use rewake_sys::reflink;
use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;

use super::{Finding, Status};
use crate::fault::Faults;
use crate::resource::disk::{DiskConfig, DiskPool};
use crate::units::Bytes;

/// A pause may write all of a guest's memory.
const FEW_BYTES: Bytes = Bytes::gib(2);

/// Kinds of file systems by their magic number (`linux/magic.h`, statfs(2)).
const KINDS: &[(u64, &str, Fit)] = &[
    (0x9584_58f6, "hugetlbfs", Fit::No),
    (0x0102_1994, "tmpfs", Fit::Memory),
    (0x8584_58f6, "ramfs", Fit::Memory),
    (0x6969, "NFS", Fit::Elsewhere),
    (0xff53_4d42, "CIFS", Fit::Elsewhere),
    (0xfe53_4d42, "SMB2", Fit::Elsewhere),
    (0x0102_1997, "9p", Fit::Elsewhere),
    (0x6573_5546, "FUSE", Fit::Elsewhere),
    (0xef53, "ext4", Fit::Yes),
    (0x5846_5342, "XFS", Fit::Yes),
    (0x9123_683e, "btrfs", Fit::Yes),
    (0xca45_1a4e, "bcachefs", Fit::Yes),
    (0x2fc1_2fc1, "ZFS", Fit::Yes),
    (0xf2f5_2010, "F2FS", Fit::Yes),
    (0x794c_7630, "overlayfs", Fit::Yes),
];

/// Whether sandboxes may lie there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fit {
    Yes,
    /// Pages of files are huge pages, which no snapshot can be written to.
    No,
    /// It is gone after a restart.
    Memory,
    /// It is on another machine, or in another program.
    Elsewhere,
}

/// Looks at the directory that templates and sandboxes live in, or would: its file system,
/// how disks are kept there, what room is left. What is tried is tried on a file without a
/// name.
#[must_use]
pub fn examine_root(root: &Path) -> Vec<Finding> {
    let Some(place) = root.ancestors().find(|path| path.is_dir()) else {
        return Vec::new();
    };
    let trial = Trial::make(place);
    vec![
        directory(root, place, &trial),
        disks(place, &trial),
        free_space(place),
    ]
}

/// A file without a name in the directory, if one can be made.
enum Trial {
    Made(File),
    /// The file system knows no such files.
    Unknown,
    Refused(Errno),
}

impl Trial {
    fn make(place: &Path) -> Self {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(place, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Self::Made(file.into()),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Self::Unknown,
            Err(errno) => Self::Refused(errno),
        }
    }
}

fn kind(place: &Path) -> (String, Fit) {
    let Ok(found) = rustix::fs::statfs(place) else {
        return (
            "a file system that cannot be looked at".to_owned(),
            Fit::Yes,
        );
    };
    // Some numbers have their highest bit set: `f_type` is signed on some machines.
    let magic = u64::from(found.f_type as u32);
    let known = KINDS.iter().find(|(number, ..)| *number == magic);
    known.map_or_else(
        || (format!("file system {magic:#x}"), Fit::Yes),
        |(_, name, fit)| ((*name).to_owned(), *fit),
    )
}

fn directory(root: &Path, place: &Path, trial: &Trial) -> Finding {
    const NAME: &str = "root directory";
    const REMEDY: &str = "name a directory on a local disk with --root";
    let (kind, fit) = kind(place);
    let there = if place == root { "" } else { ", to be made" };
    let found = format!("{} on {kind}{there}", root.display());
    let refused = match trial {
        Trial::Made(_) => None,
        Trial::Refused(errno) => Some(*errno),
        Trial::Unknown => rustix::fs::access(place, Access::WRITE_OK).err(),
    };
    let degraded = |why: &str, remedy: &str| {
        Finding::bad(NAME, Status::Degraded, format!("{found}: {why}"), remedy)
    };
    match (refused, fit) {
        (_, Fit::No) => Finding::bad(
            NAME,
            Status::Missing,
            format!("{found}: it takes whole huge pages only, so no snapshot can be written"),
            REMEDY,
        ),
        (Some(errno), _) => degraded(
            &format!("nothing can be made there: {errno}"),
            "run as root, or name a directory of yours with --root",
        ),
        (None, Fit::Memory) => degraded(
            "it takes memory, and paused sandboxes are gone after a restart",
            REMEDY,
        ),
        (None, Fit::Elsewhere) => degraded(
            "locks and times may not be what they are on a local disk",
            REMEDY,
        ),
        (None, Fit::Yes) => Finding::good(NAME, found),
    }
}

/// The kind that a launch chooses by itself.
fn disks(place: &Path, trial: &Trial) -> Finding {
    const NAME: &str = "disks";
    let snapshots = DiskPool::open(DiskConfig::default(), Faults::NONE).snapshots_work();
    let Err(error) = snapshots else {
        return Finding::good(NAME, "device-mapper snapshots over shared images");
    };
    let (kind, _) = kind(place);
    match shares_blocks(place, trial) {
        Some(true) => Finding::good(
            NAME,
            format!("reflinks on {kind}; no device-mapper snapshots: {error}"),
        ),
        shares => {
            let shares = match shares {
                None => "nothing could be tried",
                _ => "shares no blocks",
            };
            Finding::bad(
                NAME,
                Status::Degraded,
                format!("every launch copies its image: {kind} {shares}, and {error}"),
                "run as root with dm_snapshot and loop (modprobe them), or put the root \
                 directory on XFS or btrfs",
            )
        }
    }
}

/// Whether one file can take over another's blocks (`FICLONE`); `None` where nothing could be
/// tried.
fn shares_blocks(place: &Path, trial: &Trial) -> Option<bool> {
    let Trial::Made(from) = trial else {
        return None;
    };
    let Trial::Made(to) = Trial::make(place) else {
        return None;
    };
    let mut writer = from;
    writer.write_all(&[1; 4096]).ok()?;
    Some(reflink::clone_file(from, &to).is_ok())
}

fn free_space(place: &Path) -> Finding {
    const NAME: &str = "free space";
    let found = match rustix::fs::statvfs(place) {
        Ok(found) => found,
        Err(errno) => {
            return Finding::bad(
                NAME,
                Status::Degraded,
                format!("{}: {errno}", place.display()),
                "name another directory with --root",
            );
        }
    };
    let of = |blocks: u64| Bytes(blocks.saturating_mul(found.f_frsize));
    let (free, total) = (of(found.f_bavail), of(found.f_blocks));
    let detail = format!("{free} of {total} under {}", place.display());
    if free >= FEW_BYTES {
        return Finding::good(NAME, detail);
    }
    Finding::bad(
        NAME,
        Status::Degraded,
        format!("{detail}: a pause may write all of a guest's memory"),
        "make room there, or name another directory with --root",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of<'f>(findings: &'f [Finding], name: &str) -> &'f Finding {
        findings.iter().find(|it| it.name == name).unwrap()
    }

    #[test]
    fn a_root_that_is_not_there_is_judged_by_where_it_would_be_and_not_made() {
        let root = std::env::temp_dir().join(format!("rewake-doctor-{}", std::process::id()));
        let findings = examine_root(&root);
        assert!(!root.exists());
        let directory = of(&findings, "root directory");
        assert!(directory.detail.contains(", to be made"), "{directory:?}");
        assert!(of(&findings, "free space").detail.contains(" of "));
        assert!(!of(&findings, "disks").detail.is_empty());
    }

    #[test]
    fn file_systems_that_do_not_fit_are_named() {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
        let tmpfs = mounts
            .lines()
            .filter_map(|line| {
                let mut words = line.split(' ').skip(1);
                let (path, kind) = (words.next()?, words.next()?);
                (kind == "tmpfs").then(|| path.to_owned())
            })
            .next();
        let Some(tmpfs) = tmpfs else {
            eprintln!("SKIP file_systems_that_do_not_fit_are_named: no tmpfs is mounted");
            return;
        };
        let findings = examine_root(Path::new(&tmpfs));
        let directory = of(&findings, "root directory");
        assert_eq!(directory.status, Status::Degraded);
        assert!(directory.detail.contains("tmpfs"), "{directory:?}");
    }

    #[test]
    fn every_bad_finding_about_a_root_comes_with_a_remedy() {
        for root in ["/", "/proc", "/sys", "/dev/shm", "/nonexistent/root"] {
            for finding in examine_root(Path::new(root)) {
                assert_eq!(
                    finding.remedy.is_empty(),
                    finding.status == Status::Good,
                    "{root}: {finding:?}"
                );
            }
        }
    }
}
