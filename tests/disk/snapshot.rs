//! What only device-mapper snapshots have: sharing, overflow, devices that outlive processes.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::resource::disk::{
    DiskConfig, DiskError, DiskKind, DiskMode, DiskPool, DiskStep, PressureWatch, StoreState,
};
use rewake::units::Bytes;

use super::disklab::{
    BLOCK, Lab, Place, chain, in_test_machine, pattern, read_all, run, soon, write_block,
};
use super::{SIZE, assert_same, create};

fn lab(test: &str) -> Option<Lab> {
    in_test_machine(test)
        .then(|| Lab::new(test, Place::DeviceMapper))
        .flatten()
}

/// What `losetup` and `dmsetup` know of a lab, one line each.
fn judged(lab: &Lab) -> (BTreeSet<String>, BTreeSet<String>) {
    let dir = lab.dir.to_str().unwrap();
    let loops = run(
        "losetup",
        &["-l", "-n", "--raw", "-O", "NAME,RO,AUTOCLEAR,BACK-FILE"],
    );
    let mapped = run("dmsetup", &["ls", "--target", "snapshot"]);
    let of = |text: &str, word: &str| {
        text.lines()
            .filter(|line| line.contains(word))
            .map(str::to_owned)
            .collect()
    };
    (
        of(&loops, dir),
        of(&mapped, &format!("rewake-{}", lab.prefix)),
    )
}

/// Device-mapper name and uuid of a disk.
pub(super) fn mapping(steps: &[DiskStep]) -> (String, String) {
    steps
        .iter()
        .find_map(|step| match step {
            DiskStep::Mapping { name, uuid } => Some((name.clone(), uuid.clone())),
            _ => None,
        })
        .unwrap()
}

#[test]
fn vm_two_hundred_disks_share_three_images() {
    const DISKS: usize = 200;
    const WORKERS: usize = 8;
    let Some(lab) = lab("vm_two_hundred_disks_share_three_images") else {
        return;
    };
    let census = || (run("losetup", &["-a"]), run("dmsetup", &["ls"]));
    let empty = census();
    let small = 64 * BLOCK;
    let bases: Vec<PathBuf> = (0..3)
        .map(|i| lab.base(&format!("base{i}.raw"), small))
        .collect();
    let before: Vec<Vec<u8>> = bases.iter().map(|base| read_all(base)).collect();
    let disks = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (lab, bases, disks) = (&lab, &bases, &disks);
            // A pool each, as processes would have: they meet in the runtime directory.
            let pool = lab.open(Faults::NONE);
            scope.spawn(move || {
                for i in (worker..DISKS).step_by(WORKERS) {
                    let disk = create(lab, &pool, &format!("d{i}"), &bases[i % 3]);
                    let block = pattern(&format!("disk {i}"), 9);
                    write_block(disk.path(), 9, &block).unwrap();
                    disks.lock().unwrap().push((i, disk));
                }
            });
        }
    });
    let mut disks = disks.into_inner().unwrap();
    disks.sort_by_key(|(i, _)| *i);
    let (loops, mapped) = judged(&lab);
    assert_eq!(mapped.len(), DISKS);
    for base in &bases {
        let base = base.to_str().unwrap();
        let found: Vec<_> = loops.iter().filter(|line| line.ends_with(base)).collect();
        assert_eq!(found.len(), 1, "one device for all: {found:?}");
        // Read-only, and gone with its last user.
        assert!(found[0].contains(" 1 1 "), "{found:?}");
    }
    assert_eq!(loops.len(), DISKS + 3);
    let named = loops.iter().filter(|line| line.ends_with(".cow")).count();
    assert_eq!(named, DISKS, "stores show their names: {loops:?}");
    let pool = lab.open(Faults::NONE);
    for (i, disk) in &disks {
        let at = usize::try_from(9 * BLOCK).unwrap();
        let block = &read_all(disk.path())[at..at + 4096];
        assert_same(block, &pattern(&format!("disk {i}"), 9), "its own write");
    }
    let info = pool.inspect(disks[0].1.id(), &lab.disks()).unwrap();
    assert_eq!(info.sharers.len(), DISKS.div_ceil(3));
    assert!(info.sharers.contains(&disks[0].1.id().to_string()));
    let (name, uuid) = mapping(disks[0].1.steps());
    let table = run("dmsetup", &["table", &name]);
    let words: Vec<&str> = table.split_whitespace().collect();
    assert_eq!(words[..3], ["0", &(small / 512).to_string(), "snapshot"]);
    assert_eq!(words[5..], ["PO", "8"], "{table}");
    let seen = run(
        "dmsetup",
        &["info", "-c", "--noheadings", "-o", "uuid", &name],
    );
    assert_eq!(seen.trim(), uuid);

    // All but one of each image: the images must stay.
    let last: Vec<_> = disks.drain(..3).collect();
    let others = disks.into_iter().map(|(_, disk)| disk).collect();
    let failures = pool.remove_all(others, false, soon());
    assert!(failures.is_empty(), "{}", chain(&failures[0]));
    let (loops, mapped) = judged(&lab);
    assert_eq!((loops.len(), mapped.len()), (6, 3), "{loops:?}");
    for (_, disk) in last {
        pool.remove(disk, false, soon()).unwrap();
    }
    lab.assert_clean("after the last");
    assert_eq!(judged(&lab), (BTreeSet::new(), BTreeSet::new()));
    assert_eq!(census(), empty, "all devices of the machine");
    for (base, before) in bases.iter().zip(&before) {
        assert_same(&read_all(base), before, "a base image");
    }
}

#[test]
fn vm_a_store_too_small_is_reported_before_and_at_its_end() {
    let Some(lab) = lab("vm_a_store_too_small_is_reported_before_and_at_its_end") else {
        return;
    };
    let base = lab.base("base.raw", SIZE);
    let image = read_all(&base);
    let mut config = lab.config();
    config.store_size = Some(Bytes(100 * BLOCK));
    let pool = DiskPool::open(config, Faults::NONE);
    let disk = create(&lab, &pool, "small", &base);
    let other = create(&lab, &pool, "other", &base);
    write_block(other.path(), 2, &pattern("other", 2)).unwrap();
    let mut watch = PressureWatch::new();
    let mut events = Vec::new();
    let mut written = 0;
    for block in 0..SIZE / BLOCK {
        if let Err(error) = write_block(disk.path(), block, &pattern("full", block)) {
            assert_eq!(error.raw_os_error(), Some(5), "{error}");
            break;
        }
        written = block + 1;
        events.extend(watch.observe(&pool.status(&disk).unwrap()));
    }
    assert_eq!(events, [StoreState::Pressure], "before anything failed");
    assert!((90..100).contains(&written), "{written}");
    let status = pool.status(&disk).unwrap();
    assert_eq!(watch.observe(&status), Some(StoreState::Overflowed));
    let error = pool.check(&disk).unwrap_err();
    assert!(matches!(error, DiskError::Overflowed { .. }), "{error}");
    assert_eq!(
        run("dmsetup", &["status", &mapping(disk.steps()).0]).trim(),
        { format!("0 {} snapshot Overflow", SIZE / 512) }
    );
    // All that was acknowledged is there, the rest is the base image's.
    let path = disk.path().to_owned();
    drop_cache(&path);
    let found = read_all(&path);
    for block in 0..SIZE / BLOCK {
        let at = usize::try_from(block * BLOCK).unwrap();
        let expected = if block < written {
            pattern("full", block)
        } else {
            image[at..at + 4096].to_vec()
        };
        assert_same(&found[at..at + 4096], &expected, &format!("block {block}"));
    }
    write_block(&path, 0, &pattern("again", 0)).unwrap_err();
    write_block(other.path(), 3, &pattern("other", 3)).unwrap();
    let state = pool.check(&other).unwrap().state;
    assert_eq!(state, StoreState::Healthy, "another disk of the image");
    pool.remove(disk, false, soon()).unwrap();
    pool.remove(other, false, soon()).unwrap();
    assert_same(&read_all(&base), &image, "the base image");
    lab.assert_clean("after the overflow");
}

fn drop_cache(path: &Path) {
    run("blockdev", &["--flushbufs", path.to_str().unwrap()]);
}

#[test]
fn vm_every_block_can_be_written() {
    let Some(lab) = lab("vm_every_block_can_be_written") else {
        return;
    };
    // Around the places where the store's bookkeeping needs another chunk.
    for blocks in [1, 255, 256, 257, 512] {
        let base = lab.base(&format!("base{blocks}.raw"), blocks * BLOCK);
        let pool = lab.open(Faults::NONE);
        let disk = create(&lab, &pool, &format!("d{blocks}"), &base);
        let all: Vec<u8> = (0..blocks).flat_map(|i| pattern("all", i)).collect();
        fs::OpenOptions::new()
            .write(true)
            .open(disk.path())
            .and_then(|mut file| {
                std::io::Write::write_all(&mut file, &all)?;
                file.sync_all()
            })
            .unwrap();
        pool.check(&disk).unwrap();
        let id = disk.id().clone();
        pool.remove(disk, true, soon()).unwrap();
        let disk = pool.attach(&id, &lab.disks(), soon()).unwrap();
        assert_same(&read_all(disk.path()), &all, &format!("{blocks} blocks"));
        pool.check(&disk).unwrap();
        pool.remove(disk, false, soon()).unwrap();
    }
    lab.assert_clean("at the end");
}

#[test]
fn vm_a_device_in_use_is_neither_attached_nor_removed() {
    let Some(lab) = lab("vm_a_device_in_use_is_neither_attached_nor_removed") else {
        return;
    };
    let base = lab.base("base.raw", SIZE);
    let pool = lab.open(Faults::NONE);
    let disk = create(&lab, &pool, "a", &base);
    let id = disk.id().clone();
    let vm = File::open(disk.path()).unwrap();
    assert_eq!(pool.inspect(&id, &lab.disks()).unwrap().open_count, Some(1));
    drop(disk);
    let attached = pool.attach(&id, &lab.disks(), soon());
    let error = attached.map(drop).unwrap_err().source;
    assert!(matches!(error, DiskError::InUse { .. }), "{error}");
    let hurry = Deadline::after(std::time::Duration::from_millis(100));
    let failure = pool
        .remove_by_id(&id, &lab.disks(), false, hurry)
        .unwrap_err();
    let expected = matches!(failure.source, DiskError::InUse { deferred: true, .. });
    assert!(expected, "{failure:?}");
    assert_eq!(judged(&lab).1.len(), 1, "it is still there");
    assert_eq!(pool.list(&lab.disks()).unwrap(), std::slice::from_ref(&id));
    drop(vm);
    // The kernel has removed it by itself; the files are found by the record.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !judged(&lab).1.is_empty() {
        assert!(std::time::Instant::now() < until, "never removed");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    pool.remove_by_id(&id, &lab.disks(), false, soon()).unwrap();
    lab.assert_clean("at the end");
}

#[test]
fn vm_a_retired_disk_goes_when_its_last_user_does() {
    let Some(lab) = lab("vm_a_retired_disk_goes_when_its_last_user_does") else {
        return;
    };
    let base = lab.base("base.raw", SIZE);
    let pool = lab.open(Faults::NONE);
    let other = create(&lab, &pool, "other", &base);
    for round in 0..20 {
        let disk = create(&lab, &pool, "a", &base);
        write_block(disk.path(), 9, &pattern("retired", round)).unwrap();
        // The same name again at once: nothing of the last one is in the way.
        pool.retire(disk, soon()).unwrap();
    }
    let disk = create(&lab, &pool, "a", &base);
    let id = disk.id().clone();
    let vm = File::open(disk.path()).unwrap();
    let hurry = Deadline::after(std::time::Duration::from_millis(100));
    let failure = pool.retire(disk, hurry).unwrap_err();
    let expected = matches!(failure.source, DiskError::InUse { deferred: true, .. });
    assert!(expected, "{failure:?}");
    assert_eq!(pool.list(&lab.disks()).unwrap().len(), 2, "still on record");
    drop(vm);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while judged(&lab).1.len() > 1 {
        assert!(std::time::Instant::now() < until, "never removed");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    pool.remove_by_id(&id, &lab.disks(), false, soon()).unwrap();
    let (loops, mapped) = judged(&lab);
    assert_eq!(
        (loops.len(), mapped.len()),
        (2, 1),
        "the other's: {loops:?}"
    );
    pool.check(&other).unwrap();
    pool.retire(other, soon()).unwrap();
    lab.assert_clean("at the end");
    assert_eq!(judged(&lab), (BTreeSet::new(), BTreeSet::new()));
}

#[test]
fn vm_half_made_and_strange_devices_are_told_apart() {
    let Some(lab) = lab("vm_half_made_and_strange_devices_are_told_apart") else {
        return;
    };
    let base = lab.base("base.raw", SIZE);
    let pool = lab.open(Faults::NONE);
    let disk = create(&lab, &pool, "a", &base);
    let id = disk.id().clone();
    let (_, uuid) = mapping(disk.steps());
    write_block(disk.path(), 7, &pattern("kept", 7)).unwrap();
    let expected = read_all(disk.path());
    pool.remove(disk, true, soon()).unwrap();

    // As a process leaves it that died between two calls.
    let name = format!("rewake-{id}-halfmade");
    run("dmsetup", &["create", &name, "--uuid", &uuid, "--notable"]);
    let disk = pool.attach(&id, &lab.disks(), soon()).unwrap();
    assert_same(&read_all(disk.path()), &expected, "over a half-made device");
    assert!(!run("dmsetup", &["info", "-c", "--noheadings", "-o", "name"]).contains(&name));

    // Same name, other uuid: another attachment, which an old step must not touch.
    let (name, uuid) = mapping(disk.steps());
    let stale = DiskStep::Mapping {
        name: name.clone(),
        uuid: format!("{uuid}0"),
    };
    stale.undo(soon()).unwrap();
    let stale = DiskStep::Mapping {
        name: format!("{name}0"),
        uuid,
    };
    stale.undo(soon()).unwrap();
    assert_same(&read_all(disk.path()), &expected, "after stale steps");

    // Another table under our uuid: not ours to use.
    let (name, uuid) = mapping(disk.steps());
    pool.remove(disk, true, soon()).unwrap();
    let sectors = SIZE / 512;
    let table = format!("0 {sectors} zero");
    run(
        "dmsetup",
        &["create", &name, "--uuid", &uuid, "--table", &table],
    );
    let disk = pool.attach(&id, &lab.disks(), soon()).unwrap();
    assert_same(&read_all(disk.path()), &expected, "over another table");
    pool.remove(disk, false, soon()).unwrap();
    lab.assert_clean("at the end");
}

#[test]
fn vm_a_device_without_a_node_gets_one() {
    let Some(lab) = lab("vm_a_device_without_a_node_gets_one") else {
        return;
    };
    let base = lab.base("base.raw", SIZE);
    let image = read_all(&base);
    let pool = lab.open(Faults::NONE);
    let disk = create(&lab, &pool, "a", &base);
    let id = disk.id().clone();
    let node = disk.path().to_owned();
    assert!(node.starts_with("/dev"));
    let device = fs::metadata(&node).unwrap().rdev();
    drop(disk);
    fs::remove_file(&node).unwrap();
    let disk = pool.attach(&id, &lab.disks(), soon()).unwrap();
    assert!(disk.path().starts_with(&lab.dir), "{:?}", disk.path());
    assert_eq!(fs::metadata(disk.path()).unwrap().rdev(), device);
    assert_same(&read_all(disk.path()), &image, "by its own node");
    let shown = pool.inspect(&id, &lab.disks()).unwrap().path;
    assert_eq!(shown.as_deref(), Some(disk.path()));
    // By somebody who knows the name only, as a recovery does.
    drop(disk);
    pool.remove_by_id(&id, &lab.disks(), false, soon()).unwrap();
    lab.assert_clean("at the end");
}

/// Where `/dev` was filled before the devices came, as in a container: neither the loop
/// devices nor the mapped ones have nodes.
#[cfg(feature = "cli")]
#[test]
fn vm_a_disk_is_made_where_dev_shows_no_device() {
    let Some(lab) = lab("vm_a_disk_is_made_where_dev_shows_no_device") else {
        return;
    };
    lab.base("base.raw", SIZE);
    let empty = (run("losetup", &["-a"]), run("dmsetup", &["ls"]));
    let script = r#"
        set -e
        cp -a /dev/mapper/control /dev/loop-control /dev/null /dev/urandom "$1/kept"
        mount -t tmpfs none /dev
        mkdir /dev/mapper
        cp -a "$1/kept/control" /dev/mapper/
        cp -a "$1/kept/loop-control" "$1/kept/null" "$1/kept/urandom" /dev/
        shift
        disk() { "$rewake" --json disk --dir "$dir/disks" --runtime-dir "$dir/run" "$@"; }
        disk create "$dir/base.raw" --id "$id-a" --mode dm-snapshot >"$dir/made"
        disk create "$dir/base.raw" --id "$id-b" --mode dm-snapshot >/dev/null
        node=$(sed -n 's/.*"path": *"\([^"]*\)".*/\1/p' "$dir/made" | head -n 1)
        case $node in "$dir"/run/nodes/dm-*) ;; *) echo "not a node of ours: $node"; exit 1 ;; esac
        test -b "$node"
        head -c 4096 /dev/urandom >"$dir/block"
        dd if="$dir/block" of="$node" bs=4096 seek=7 conv=fsync 2>/dev/null
        dd if="$node" bs=4096 skip=7 count=1 2>/dev/null | cmp - "$dir/block"
        disk show "$id-a" >"$dir/shown"
        grep -q "$node" "$dir/shown"
        grep -q "$id-b" "$dir/shown"
        disk remove "$id-a" --keep >/dev/null
        test ! -e "$node"
        disk attach "$id-a" >/dev/null
        disk flatten "$id-a" "$dir/flat.raw" >/dev/null
        dd if="$dir/flat.raw" bs=4096 skip=7 count=1 2>/dev/null | cmp - "$dir/block"
        disk remove "$id-a" >/dev/null
        disk remove "$id-b" >/dev/null
        ls /dev >"$dir/dev"
        ! grep -q -e loop[0-9] -e dm- "$dir/dev"
    "#;
    let kept = lab.dir.join("kept");
    fs::create_dir(&kept).unwrap();
    let output = std::process::Command::new("unshare")
        .args(["-m", "sh", "-c", script, "sh"])
        .arg(&lab.dir)
        .env("rewake", env!("CARGO_BIN_EXE_rewake"))
        .env("dir", &lab.dir)
        .env("id", &lab.prefix)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{}: {said}", output.status);
    lab.assert_clean("at the end");
    let after = (run("losetup", &["-a"]), run("dmsetup", &["ls"]));
    assert_eq!(after, empty, "all devices of the machine");
}

#[test]
fn vm_flattening_shares_blocks_where_the_file_system_can() {
    let test = "vm_flattening_shares_blocks_where_the_file_system_can";
    if !in_test_machine(test) {
        return;
    }
    let Some(lab) = Lab::new(test, Place::Xfs) else {
        return;
    };
    let base = lab.base("base.raw", SIZE);
    let config = DiskConfig {
        runtime_dir: lab.dir.join("run"),
        ..lab.config()
    };
    let pool = DiskPool::open(config, Faults::NONE);
    let mode = DiskMode::Only(DiskKind::DmSnapshot);
    let disk = pool
        .create(&lab.id("a"), &base, &lab.disks(), mode, soon())
        .unwrap();
    for (block, bytes) in [(4, pattern("new", 4)), (8, vec![0; 4096])] {
        write_block(disk.path(), block, &bytes).unwrap();
    }
    let expected = read_all(disk.path());
    let to = lab.dir.join("flat.raw");
    pool.flatten(&disk, &to, &mut |_| {}, soon()).unwrap();
    assert_same(&read_all(&to), &expected, "flattened");
    // `shared` is bit 0x2000 of an extent's flags (`FIEMAP_EXTENT_SHARED`).
    let extents = run("filefrag", &["-v", to.to_str().unwrap()]);
    let count = |word: &str| extents.lines().filter(|it| it.contains(word)).count();
    assert!(count("shared") > 10, "{extents}");
    pool.remove(disk, false, soon()).unwrap();
    lab.assert_clean("at the end");
}
