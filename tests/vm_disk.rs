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
use rewake::resource::disk::{Disk, DiskConfig, DiskKind, DiskMode, DiskPool, StoreState};

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

/// Puts the guest on a disk, expects all that must be true of it, lets it leave a mark.
fn live_on(disk: &Disk, at: (&Namespace, &Path), marks: &machine::restored::Marks, mark: &str) {
    let (namespace, snapshot) = at;
    let guest = Guest(namespace);
    let mut command = restore_command(namespace, snapshot);
    command.arg("--disk").arg(disk.path());
    let restored = Restored::by(command, "on-demand");
    check(&restored, guest, marks, "on-demand");
    let others = guest.shell("cat /disk/mark 2>/dev/null || echo none");
    assert_eq!(others.trim(), "none", "{mark}: somebody else's write");
    guest.shell(&format!("echo {mark} >/disk/mark && sync"));
    restored.shut_down();
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

    let at = (&namespace, snapshot.as_path());
    let clones = ["pool-one", "pool-two"].map(|name| create(name, &template));
    for clone in &clones {
        live_on(clone, at, &marks, clone.id().as_str());
        assert_eq!(pool.check(clone).unwrap().state, StoreState::Healthy);
    }
    assert_ne!(
        checksum(clones[0].path()),
        checksum(clones[1].path()),
        "the positive control of the writes"
    );
    let own = "pool-own".parse().unwrap();
    let disk = pool.attach(&own, &disks, soon()).unwrap();
    live_on(&disk, at, &marks, "own");

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
