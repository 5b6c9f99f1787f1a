//! A guest on a copy-on-write disk: restored onto another device with the same contents,
//! under a new path or under the recorded one.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::fs;
use std::path::{Path, PathBuf};

use machine::restored::{Restored, check, frozen, restore_command};
use machine::{Guest, Namespace, Scratch, Vm, plain_options, run};

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
