//! Disks and power losses (see `tests/powerlab`).

use std::fs;

use rewake::fault::Faults;
use rewake::resource::disk::{DiskError, DiskPool};

use super::disklab::{
    BLOCK, Lab, Place, chain, in_test_machine, pattern, read_all, soon, write_block,
};
use super::powerlab::{Bench, Kind, Moment, can_log};
use super::{SIZE, assert_same};

const MEDIUM: u64 = 48 << 20;

/// What had been promised when the power failed.
#[derive(Debug, Default)]
struct Promised {
    created: bool,
    first: bool,
    second: bool,
    flattened: bool,
}

impl Promised {
    fn at(moment: &Moment<'_>) -> Self {
        Self {
            created: moment.has("created"),
            first: moment.has("first"),
            second: moment.has("second"),
            flattened: moment.has("flattened"),
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
    if !can_log(test) {
        return;
    }
    // A file system with a base image, and a copy of it from before the log begins.
    let mount = lab.dir.join("medium");
    let bench = Bench::new(&lab.prefix, Kind::Ext4, MEDIUM, &mount);
    let base = bench.without_log(|| {
        fs::create_dir(mount.join("disks")).unwrap();
        lab.base("medium/base.raw", SIZE)
    });

    let pool = lab.open(Faults::NONE);
    let medium = bench.begin();
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

    let mut flattened = false;
    let states = bench.replay(|moment| {
        let promised = Promised::at(moment);
        flattened = promised.flattened;
        let case = format!("{}: {promised:?}", moment.case);
        look(&lab, &pool, &promised, (&before, &expected), &case);
    });
    assert!(flattened, "the marks are in the log");
    assert!(states > 15, "{states} states");
    lab.assert_clean("at the end");
}

/// Looks at what is on the medium as it was.
fn look(
    lab: &Lab,
    pool: &DiskPool,
    promised: &Promised,
    (before, expected): (&[u8], &[u8]),
    case: &str,
) {
    let mount = lab.dir.join("medium");
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
}
