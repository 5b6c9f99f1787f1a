//! A guest on a copy-on-write disk: restored onto another device with the same contents,
//! under a new path or under the recorded one.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machine::restored::{Restored, check, frozen, restore_command};
use machine::{Guest, Namespace, Scratch, Vm, plain_options, run};
use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::resource::disk::{
    Disk, DiskConfig, DiskError, DiskKind, DiskMode, DiskPool, PressureWatch, StoreState,
};
use rewake::units::Bytes;

const DISK_BYTES: u64 = 32 << 20;

/// A dm-snapshot of a base image, made with the tools an operator would use.
struct Cow {
    name: String,
    loops: [String; 2],
    device: PathBuf,
}

impl Cow {
    fn new(name: &str, base: &Path, store: &Path) -> Self {
        let attach = |options: &[&str], file: &Path| {
            let file = file.to_str().unwrap();
            let words = [&["--show", "-f"], options, &[file]].concat();
            run("losetup", words).trim().to_owned()
        };
        let loops = [attach(&["-r"], base), attach(&[], store)];
        let table = format!(
            "0 {} snapshot {} {} PO 8",
            DISK_BYTES / 512,
            loops[0],
            loops[1]
        );
        run("dmsetup", ["create", name, "--table", &table]);
        let minor = run(
            "dmsetup",
            ["info", "-c", "--noheadings", "-o", "minor", name],
        );
        Self {
            name: name.to_owned(),
            loops,
            device: format!("/dev/dm-{}", minor.trim()).into(),
        }
    }
}

impl Drop for Cow {
    fn drop(&mut self) {
        run("dmsetup", ["remove", "--retry", &self.name]);
        for device in &self.loops {
            run("losetup", ["-d", device]);
        }
    }
}

fn checksum(path: &Path) -> String {
    run("sha256sum", [path])
}

#[test]
fn vm_restores_onto_another_device_with_the_same_contents() {
    let test = "vm_restores_onto_another_device_with_the_same_contents";
    if !machine::inside_with_vmm(test) {
        return;
    }
    let scratch = Scratch::new("disk");
    let namespace = Namespace::new("rwtest-disk");
    let guest = Guest(&namespace);
    let base = scratch.disk("base.raw", DISK_BYTES);
    let store = scratch.join("store");
    fs::File::create(&store)
        .unwrap()
        .set_len(2 * DISK_BYTES)
        .unwrap();
    let base_before = checksum(&base);
    let snapshot = scratch.join("snapshot");
    let sandbox = scratch.join("sandbox");
    fs::create_dir(&sandbox).unwrap();
    let recorded = sandbox.join("rootfs");

    let first = Cow::new("rwtest-first", &base, &store);
    std::os::unix::fs::symlink(&first.device, &recorded).unwrap();
    let vm = Vm::start(&namespace, &scratch, &plain_options(&recorded, &scratch));
    let marks = frozen(vm, guest, &snapshot);
    drop(first);
    fs::remove_file(&recorded).unwrap();
    let store_before = checksum(&store);

    let under_recorded_path = ["--sandbox-dir", sandbox.to_str().unwrap()];
    let cases: [(&str, &[&str]); 2] = [
        ("a new path", &[]),
        ("the recorded path", &under_recorded_path),
    ];
    for (name, options) in cases {
        let own = scratch.join("own-store");
        fs::copy(&store, &own).unwrap();
        let cow = Cow::new("rwtest-own", &base, &own);
        let mut command = restore_command(&namespace, &snapshot);
        command.arg("--disk").arg(&cow.device).args(options);
        let restored = Restored::by(command, "on-demand");
        check(&restored, guest, &marks, "on-demand");
        guest.shell(&format!(
            "echo '{name}' >/disk/own && sync && grep -q '{name}' /disk/own"
        ));
        restored.shut_down();
        assert_ne!(
            checksum(&own),
            store_before,
            "{name}: the positive control of the writes"
        );
        assert!(
            fs::read_dir(&sandbox).unwrap().next().is_none(),
            "{name}: links were left behind"
        );
    }
    assert_eq!(
        checksum(&store),
        store_before,
        "the first sandbox's store was written to"
    );
    assert_eq!(
        checksum(&base),
        base_before,
        "the base image was written to"
    );
}

/// Puts the guest on a disk and expects all that must be true of it. Nobody has left a mark
/// there yet.
fn live_on(disk: &Disk, at: (&Namespace, &Path), marks: &machine::restored::Marks) -> Restored {
    let (namespace, snapshot) = at;
    let guest = Guest(namespace);
    let mut command = restore_command(namespace, snapshot);
    command.arg("--disk").arg(disk.path());
    let restored = Restored::by(command, "on-demand");
    check(&restored, guest, marks, "on-demand");
    let others = guest.shell("cat /disk/mark 2>/dev/null || echo none");
    assert_eq!(
        others.trim(),
        "none",
        "{}: somebody else's write",
        disk.id()
    );
    restored
}

#[test]
fn vm_resumes_on_its_own_store_and_twice_from_a_template() {
    let test = "vm_resumes_on_its_own_store_and_twice_from_a_template";
    if !machine::inside_with_vmm(test) {
        return;
    }
    let scratch = Scratch::new("pool");
    let namespace = Namespace::new("rwtest-pool");
    let base = scratch.disk("base.raw", DISK_BYTES);
    let base_before = checksum(&base);
    let snapshot = scratch.join("snapshot");
    let disks = scratch.join("disks");
    fs::create_dir(&disks).unwrap();
    let config = DiskConfig {
        runtime_dir: scratch.join("run"),
        ..DiskConfig::default()
    };
    let pool = DiskPool::open(config, Faults::NONE);
    let soon = || Deadline::after(Duration::from_secs(60));
    let create = |name: &str, base: &Path| {
        let mode = DiskMode::Only(DiskKind::DmSnapshot);
        pool.create(&name.parse().unwrap(), base, &disks, mode, soon())
            .unwrap()
    };

    let disk = create("pool-own", &base);
    let vm = Vm::start(&namespace, &scratch, &plain_options(disk.path(), &scratch));
    let marks = frozen(vm, Guest(&namespace), &snapshot);
    let template = scratch.join("template.raw");
    pool.flatten(&disk, &template, &mut |_| {}, soon()).unwrap();
    let template_before = checksum(&template);
    pool.remove(disk, true, soon()).unwrap();

    let clones = ["pool-one", "pool-two"].map(|name| create(name, &template));
    // Both at the same time, each where its address is its own.
    let beside = Namespace::new("rwtest-pool-beside");
    let places = [&namespace, &beside];
    let lives = [0, 1].map(|i| live_on(&clones[i], (places[i], &snapshot), &marks));
    for (clone, place) in clones.iter().zip(places) {
        let mark = format!("echo {} >/disk/mark && sync", clone.id());
        Guest(place).shell(&mark);
    }
    for (clone, place) in clones.iter().zip(places) {
        Guest(place).shell("echo 3 >/proc/sys/vm/drop_caches");
        assert_eq!(Guest(place).shell("cat /disk/mark"), clone.id().as_str());
    }
    for (clone, restored) in clones.iter().zip(lives) {
        restored.shut_down();
        assert_eq!(pool.check(clone).unwrap().state, StoreState::Healthy);
    }
    assert_ne!(
        checksum(clones[0].path()),
        checksum(clones[1].path()),
        "the positive control of the writes"
    );
    let own = "pool-own".parse().unwrap();
    let disk = pool.attach(&own, &disks, soon()).unwrap();
    live_on(&disk, (&namespace, &snapshot), &marks).shut_down();

    for disk in clones.into_iter().chain([disk]) {
        pool.remove(disk, false, soon()).unwrap();
    }
    assert!(fs::read_dir(&disks).unwrap().next().is_none());
    assert_eq!(checksum(&template), template_before, "the template");
    assert_eq!(checksum(&base), base_before, "the base image");
    let left = run("losetup", ["-a"]);
    let dir = scratch.path().to_str().unwrap();
    assert!(!left.contains(dir), "{left}");
}

/// Fills the guest's disk piece by piece, each on the disk before the next begins. Returns how
/// many there were before one failed, and how that failed.
fn fill(guest: Guest<'_>, mut between: impl FnMut(u32)) -> (u32, String) {
    for piece in 0..64 {
        let answer = guest.shell(&format!(
            "dd if=/dev/urandom of=/run/piece bs=64k count=8 2>/dev/null
             sum=$(sha256sum </run/piece)
             if dd if=/run/piece of=/disk/piece{piece} bs=64k conv=fsync 2>/run/errors; then
                 echo \"$sum /disk/piece{piece}\" >>/run/sums
             else
                 cat /run/errors
             fi"
        ));
        if !answer.is_empty() {
            return (piece, answer);
        }
        between(piece);
    }
    panic!("the store took more than it can hold");
}

#[test]
fn vm_a_guest_on_a_full_store_sees_errors_and_nobody_else_is_harmed() {
    let test = "vm_a_guest_on_a_full_store_sees_errors_and_nobody_else_is_harmed";
    if !machine::inside_with_vmm(test) {
        return;
    }
    let scratches = ["full", "beside"].map(Scratch::new);
    let namespaces = ["rwtest-full", "rwtest-beside"].map(Namespace::new);
    let base = scratches[0].disk("base.raw", DISK_BYTES);
    let base_before = checksum(&base);
    let disks = scratches[0].join("disks");
    fs::create_dir(&disks).unwrap();
    // A quarter of what the guest may write, and all of it for the other.
    let [small, roomy] = [Some(Bytes(DISK_BYTES / 4)), None].map(|store_size| {
        let config = DiskConfig {
            runtime_dir: scratches[0].join("run"),
            store_size,
            ..DiskConfig::default()
        };
        DiskPool::open(config, Faults::NONE)
    });
    let soon = || Deadline::after(Duration::from_secs(60));
    let create = |pool: &DiskPool, name: &str| {
        let mode = DiskMode::Only(DiskKind::DmSnapshot);
        pool.create(&name.parse().unwrap(), &base, &disks, mode, soon())
            .unwrap()
    };
    let disk = create(&small, "full");
    let other = create(&roomy, "beside");
    let [vm, beside] = [(&disk, 0), (&other, 1)].map(|(disk, i)| {
        let options = plain_options(disk.path(), &scratches[i]);
        Vm::start(&namespaces[i], &scratches[i], &options)
    });
    let [guest, neighbour] = [Guest(&namespaces[0]), Guest(&namespaces[1])];
    for guest in [guest, neighbour] {
        guest.await_answer(machine::SHELL_PORT, "/nonce", machine::BOOT_LIMIT);
        // Freezing writes the journal back: from here on it can be read without a replay.
        guest.shell(
            "head -c 100000 /run/pattern >/disk/kept && fsfreeze --freeze /disk && fsfreeze --unfreeze /disk",
        );
    }
    let kept = guest.shell("sha256sum </disk/kept");

    let mut watch = PressureWatch::new();
    let mut events = Vec::new();
    let (pieces, error) = fill(guest, |piece| {
        events.extend(watch.observe(&small.status(&disk).unwrap()));
        neighbour.shell(&format!("echo {piece} >>/disk/log && sync"));
    });
    println!("{pieces} pieces, then: {error}");
    assert!(
        error.contains("I/O error") || error.contains("Input/output error"),
        "{error}"
    );
    assert_eq!(events, [StoreState::Pressure], "before anything failed");
    assert!(pieces > 4, "{pieces}");
    let status = small.status(&disk).unwrap();
    assert_eq!(watch.observe(&status), Some(StoreState::Overflowed));
    let full = small.check(&disk).unwrap_err();
    assert!(matches!(full, DiskError::Overflowed { .. }), "{full}");

    // Nothing that the guest was told is on the disk is lost or wrong.
    guest.shell("echo 3 >/proc/sys/vm/drop_caches");
    guest.shell("while read -r sum _ file; do [ \"$(sha256sum <$file)\" = \"$sum  -\" ] || exit 1; done </run/sums");
    assert_eq!(guest.shell("wc -l </run/sums").trim(), pieces.to_string());
    assert_eq!(guest.shell("sha256sum </disk/kept"), kept);
    guest.check_pattern();
    vm.shut_down();
    let device = disk.path().display();
    let read = format!("debugfs -R 'cat /kept' {device} 2>/dev/null | sha256sum");
    let outside = run("sh", ["-c", &read]);
    assert_eq!(outside.trim(), kept.trim(), "read from outside");

    // The neighbour has noticed nothing.
    assert_eq!(roomy.check(&other).unwrap().state, StoreState::Healthy);
    neighbour.shell("echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(
        neighbour.shell("wc -l </disk/log").trim(),
        pieces.to_string()
    );
    assert_eq!(
        neighbour.shell("ls /disk/piece* 2>/dev/null || echo none"),
        "none"
    );
    neighbour.shell("dd if=/dev/urandom of=/disk/large bs=64k count=128 conv=fsync 2>/dev/null");
    beside.shut_down();
    assert_eq!(roomy.check(&other).unwrap().state, StoreState::Healthy);

    // A full store is told apart from a lost one, also when it is attached again.
    small.remove(disk, true, soon()).unwrap();
    let disk = small
        .attach(&"full".parse().unwrap(), &disks, soon())
        .unwrap();
    assert_eq!(small.status(&disk).unwrap().state, StoreState::Pressure);
    for (pool, disk) in [(&small, disk), (&roomy, other)] {
        pool.remove(disk, false, soon()).unwrap();
    }
    assert_eq!(checksum(&base), base_before, "the base image");
}
