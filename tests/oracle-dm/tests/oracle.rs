//! What rewake makes and says of device-mapper devices, against the `devicemapper` crate.
//!
//! Runs in the test machine: `tests/vm/run-tests --suite oracle-dm`.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

#[path = "../../disklab/mod.rs"]
mod disklab;

use std::fs::File;

use devicemapper::{DM, DevId, Device, DeviceInfo, DmFlags, DmName, DmOptions, DmUuid};
use disklab::{BLOCK, Lab, Place, in_test_machine, pattern, soon, write_block};
use rewake::fault::Faults;
use rewake::resource::disk::{Disk, DiskKind, DiskMode, DiskStep};
use rewake_sys::dm::{Control, DeviceInfo as OurInfo, DeviceRef, Target};
use rewake_sys::loopdev::LoopDevice;

const SIZE: u64 = 64 * BLOCK;

fn lab(test: &str) -> Option<Lab> {
    in_test_machine(test)
        .then(|| Lab::new(test, Place::DeviceMapper))
        .flatten()
}

/// Name and uuid of the device of a disk.
fn mapping(disk: &Disk) -> (String, String) {
    let found = disk.steps().iter().find_map(|step| match step {
        DiskStep::Mapping { name, uuid } => Some((name.clone(), uuid.clone())),
        _ => None,
    });
    found.unwrap()
}

fn device_number(device: Device) -> u64 {
    rustix::fs::makedev(device.major, device.minor)
}

/// The oracle's answer in our words.
fn in_our_words(theirs: &DeviceInfo) -> OurInfo {
    let has = |flag| theirs.flags().contains(flag);
    OurInfo {
        device: device_number(theirs.device()),
        name: theirs.name().map_or(String::new(), ToString::to_string),
        uuid: theirs.uuid().map_or(String::new(), ToString::to_string),
        open_count: theirs.open_count(),
        event: theirs.event_nr(),
        suspended: has(DmFlags::DM_SUSPEND),
        read_only: has(DmFlags::DM_READONLY),
        active: has(DmFlags::DM_ACTIVE_PRESENT),
        deferred_remove: has(DmFlags::DM_DEFERRED_REMOVE),
    }
}

fn rows(targets: Vec<Target>) -> Vec<(u64, u64, String, String)> {
    let row = |it: Target| (it.start, it.length, it.kind, it.text);
    targets.into_iter().map(row).collect()
}

/// Asks both for all that can be known of a device, by name and by uuid.
fn compare(ours: &Control, theirs: &DM, (name, uuid): (&str, &str), case: &str) -> OurInfo {
    let ids = [
        (
            DeviceRef::Name(name),
            DevId::Name(DmName::new(name).unwrap()),
        ),
        (
            DeviceRef::Uuid(uuid),
            DevId::Uuid(DmUuid::new(uuid).unwrap()),
        ),
    ];
    for (our_id, their_id) in &ids {
        let info = ours.info(*our_id).unwrap().unwrap();
        let their_info = theirs.device_info(their_id).unwrap();
        assert_eq!(info, in_our_words(&their_info), "{case}: {their_id}");
        assert_eq!((info.name.as_str(), info.uuid.as_str()), (name, uuid));

        let as_table = DmOptions::default().set_flags(DmFlags::DM_STATUS_TABLE);
        let (_, table) = theirs.table_status(their_id, as_table).unwrap();
        assert_eq!(rows(ours.table(*our_id).unwrap()), table, "{case}: table");
        // A table that is loaded and not in use has no status.
        let noflush = DmOptions::default().set_flags(DmFlags::DM_NOFLUSH);
        let (_, status) = theirs.table_status(their_id, noflush).unwrap();
        assert_eq!(
            rows(ours.status(*our_id).unwrap()),
            status,
            "{case}: status"
        );
        let deps = theirs.table_deps(their_id, DmOptions::default()).unwrap();
        let deps: Vec<u64> = deps.into_iter().map(device_number).collect();
        assert_eq!(ours.deps(*our_id).unwrap(), deps, "{case}: dependencies");
    }
    let listed = ours.list().unwrap();
    let their_list = theirs.list_devices().unwrap();
    let ours_listed: Vec<_> = listed
        .iter()
        .map(|it| (it.name.clone(), it.device, it.event))
        .collect();
    let theirs_listed: Vec<_> = their_list
        .iter()
        .map(|(name, device, event)| (name.to_string(), device_number(*device), *event))
        .collect();
    assert_eq!(ours_listed, theirs_listed, "{case}: list");
    let uuids = listed.iter().find(|it| it.name == name);
    assert_eq!(uuids.unwrap().uuid.as_deref(), Some(uuid), "{case}: list");
    ours.info(DeviceRef::Name(name)).unwrap().unwrap()
}

fn create(lab: &Lab, name: &str, base: &std::path::Path) -> Disk {
    let mode = DiskMode::Only(DiskKind::DmSnapshot);
    let pool = lab.open(Faults::NONE);
    pool.create(&lab.id(name), base, &lab.disks(), mode, soon())
        .unwrap()
}

#[test]
fn vm_both_speak_to_the_same_kernel() {
    if lab("vm_both_speak_to_the_same_kernel").is_none() {
        return;
    }
    let (ours, theirs) = (Control::open().unwrap(), DM::new().unwrap());
    let [major, minor, patch] = ours.version().unwrap();
    assert_eq!((major, minor, patch), theirs.version().unwrap());
    let targets = theirs.list_versions().unwrap();
    for kind in ["snapshot", "snapshot-origin", "linear", "error"] {
        let ours = ours.target_version(kind).unwrap();
        let found = targets.iter().find(|(name, ..)| name == kind).unwrap();
        assert_eq!((ours[0], ours[1], ours[2]), (found.1, found.2, found.3));
    }
    assert!(ours.target_version("no-such-target").is_err());
}

#[test]
fn vm_a_disk_reads_back_field_by_field() {
    let Some(lab) = lab("vm_a_disk_reads_back_field_by_field") else {
        return;
    };
    let (ours, theirs) = (Control::open().unwrap(), DM::new().unwrap());
    let bases = ["one.raw", "two.raw"].map(|name| lab.base(name, SIZE));
    let disks = [("a", 0), ("b", 0), ("c", 1)].map(|(name, base)| create(&lab, name, &bases[base]));
    let pool = lab.open(Faults::NONE);
    let mut origins = Vec::new();
    for disk in &disks {
        let (name, uuid) = mapping(disk);
        let id = (name.as_str(), uuid.as_str());
        let fresh = compare(&ours, &theirs, id, "fresh");
        assert!(fresh.active && !fresh.suspended && !fresh.read_only && !fresh.deferred_remove);

        // The table is the one that was meant, and stands on the files that were meant.
        let their_id = DevId::Name(DmName::new(&name).unwrap());
        let as_table = DmOptions::default().set_flags(DmFlags::DM_STATUS_TABLE);
        let (_, table) = theirs.table_status(&their_id, as_table).unwrap();
        let [(0, length, kind, text)] = table.as_slice() else {
            panic!("{table:?}");
        };
        assert_eq!((*length, kind.as_str()), (SIZE / 512, "snapshot"));
        let words: Vec<&str> = text.split(' ').collect();
        assert_eq!(words[2..], ["PO", "8"], "{text}");
        let deps = theirs.table_deps(&their_id, DmOptions::default()).unwrap();
        let numbers = [0, 1].map(|i| words[i].split_once(':').unwrap().1.parse().unwrap());
        for number in numbers {
            assert!(deps.iter().any(|it| (it.major, it.minor) == (7, number)));
        }
        let inodes = numbers.map(|number| {
            let status = LoopDevice::open(number, true).unwrap().status();
            status.unwrap().unwrap().inode
        });
        assert_eq!(inodes[0], disk.record().base.inode);
        assert!(uuid.ends_with(&format!("-{:x}", inodes[1])), "{uuid}");
        origins.push(numbers[0]);

        let opened = File::open(disk.path()).unwrap();
        assert_eq!(compare(&ours, &theirs, id, "open").open_count, 1);
        drop(opened);
        write_block(disk.path(), 9, &pattern("oracle", 9)).unwrap();
        compare(&ours, &theirs, id, "written to");
        let noflush = DmOptions::default().set_flags(DmFlags::DM_NOFLUSH);
        let (_, status) = theirs.table_status(&their_id, noflush).unwrap();
        let used = pool.status(disk).unwrap();
        let said = format!("{}/{} ", used.used.0 / 512, used.total.0 / 512);
        assert!(status[0].3.starts_with(&said), "{status:?}: {used:?}");
    }
    assert_eq!(origins[0], origins[1], "one device for one image");
    assert_ne!(origins[0], origins[2]);

    let ids = disks.each_ref().map(mapping);
    let again = disks[0].id().clone();
    for (i, disk) in disks.into_iter().enumerate() {
        pool.remove(disk, i == 0, soon()).unwrap();
        let uuid = DevId::Uuid(DmUuid::new(&ids[i].1).unwrap());
        assert!(theirs.device_info(&uuid).is_err(), "removed");
    }
    let disk = pool.attach(&again, &lab.disks(), soon()).unwrap();
    let (name, uuid) = mapping(&disk);
    assert_eq!(uuid, ids[0].1, "the same store");
    assert_ne!(name, ids[0].0, "another attachment");
    compare(&ours, &theirs, (&name, &uuid), "attached again");
    pool.remove(disk, false, soon()).unwrap();
    lab.assert_clean("at the end");
}

#[test]
fn vm_every_state_of_a_device_reads_the_same() {
    let Some(lab) = lab("vm_every_state_of_a_device_reads_the_same") else {
        return;
    };
    let (ours, theirs) = (Control::open().unwrap(), DM::new().unwrap());
    let name = format!("rewake-{}-states", lab.prefix);
    let uuid = format!("REWAKE-TEST-{}", lab.prefix);
    let id = (name.as_str(), uuid.as_str());
    let device = DeviceRef::Name(&name);
    let their_id = DevId::Name(DmName::new(&name).unwrap());
    let target = |start, length, kind: &str| Target {
        start,
        length,
        kind: kind.to_owned(),
        text: String::new(),
    };
    ours.create(&name, &uuid).unwrap();
    assert!(!compare(&ours, &theirs, id, "without a table").active);
    let table = [target(0, 8, "zero"), target(8, 24, "error")];
    ours.load(device, &table, true).unwrap();
    assert!(!compare(&ours, &theirs, id, "loaded").active);
    ours.clear(device).unwrap();
    ours.load(device, &table, true).unwrap();
    ours.resume(device).unwrap();
    let running = compare(&ours, &theirs, id, "running");
    assert!(running.active && running.read_only);
    // Made by them, read by us: several targets, and another table.
    let made = [
        (0, 16, "zero".to_owned(), String::new()),
        (16, 8, "error".to_owned(), String::new()),
        (24, 8, "zero".to_owned(), String::new()),
    ];
    let private = DmOptions::private();
    theirs.table_load(&their_id, &made, private).unwrap();
    let suspend = private.set_flags(DmFlags::DM_SUSPEND);
    theirs.device_suspend(&their_id, suspend).unwrap();
    assert!(compare(&ours, &theirs, id, "suspended").suspended);
    theirs.device_suspend(&their_id, private).unwrap();
    let running = compare(&ours, &theirs, id, "resumed");
    assert!(!running.suspended && !running.read_only);
    assert_eq!(rows(ours.table(device).unwrap()), made);
    ours.suspend(device).unwrap();
    assert!(compare(&ours, &theirs, id, "suspended by us").suspended);
    ours.resume(device).unwrap();

    let opened = File::open(format!("/dev/dm-{}", running.minor())).unwrap();
    assert!(ours.remove(device, false).unwrap_err().is_busy());
    ours.remove(device, true).unwrap();
    assert!(compare(&ours, &theirs, id, "to be removed").deferred_remove);
    drop(opened);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while theirs.device_info(&their_id).is_ok() {
        assert!(std::time::Instant::now() < until, "never removed");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(ours.info(device).unwrap(), None);
}
