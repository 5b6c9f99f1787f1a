//! A template of a Linux guest: built by `rewake template build`, and two sandboxes at once
//! restored from it, each on a disk of its own.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use machine::{GUEST_COMMAND_LINE, GUEST_INITRD, GUEST_KERNEL, Guest, Namespace, Scratch, run};
use rewake::deadline::Deadline;
use rewake::envd::init::Init;
use rewake::fault::Faults;
use rewake::ids::{SandboxId, TemplateId};
use rewake::plan::{MemoryMode, MemoryPolicy, RestoreInputs};
use rewake::resource::disk::{Disk, DiskConfig, DiskKind, DiskMode, DiskPool};
use rewake::resource::net::{HostNet, NetConfig, Slot};
use rewake::restore::{RestoreSpec, Restored, restore};
use rewake::template::{HostFacts, Template, TemplateStore};
use rewake::vmm::launch::LaunchSpec;
use serde_json::Value;

const DISK_BYTES: u64 = 32 << 20;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(180))
}

/// Builds the template as its user does.
fn build(scratch: &Scratch, image: &Path) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewake"));
    command.args(["--json", "template", "--root"]);
    command.arg(scratch.join("root")).args(["build", "linux"]);
    command.args(["--kernel", GUEST_KERNEL, "--initramfs", GUEST_INITRD]);
    command.args(["--cmdline", GUEST_COMMAND_LINE, "--memory-mib", "256"]);
    command.arg("--rootfs").arg(image);
    command.arg("--vmm").arg(machine::vmm_path());
    command.args(["--user", "root", "--env", "BUILT=yes"]);
    command.arg("--console").arg(scratch.join("console"));
    let output = command.output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}\n{stdout}\n{stderr}",
        output.status
    );
    println!("rewake template build: {stdout}{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

/// A sandbox from the template, and what it stands on.
struct Clone {
    slot: Slot,
    disk: Disk,
    restored: Restored,
}

struct Lab {
    net: HostNet,
    disks: DiskPool,
    scratch: Scratch,
}

impl Lab {
    fn wake(&self, template: &Template, name: &str) -> Clone {
        let id = SandboxId::new(name).unwrap();
        let slot = self.net.create(name, soon()).unwrap();
        let base = template.disk().unwrap();
        let dir = self.scratch.join("root/sandboxes").join(name).join("disk");
        std::fs::create_dir_all(&dir).unwrap();
        let mode = DiskMode::Only(DiskKind::DmSnapshot);
        let disk = self.disks.create(&id, &base, &dir, mode, soon()).unwrap();
        let mut inputs = RestoreInputs::new(id, template.snapshot_dir());
        inputs.memory_mode = MemoryPolicy::Auto { owned: false };
        inputs.disk = template.root_disk(Some(disk.path().to_owned()));
        let guest = "169.254.0.21:49983".parse().unwrap();
        let mut spec = RestoreSpec::new(inputs, machine::vmm_path(), guest);
        spec.netns = Some(slot.netns_path().into());
        spec.init = Some(Init::new());
        let restored = restore(&spec, soon());
        let restored = restored.unwrap_or_else(|error| panic!("{name}: {error:#?}"));
        assert_eq!(restored.memory_mode, MemoryMode::Map, "{name}");
        Clone {
            slot,
            disk,
            restored,
        }
    }

    fn end(&self, clone: Clone) {
        let Clone {
            slot,
            disk,
            restored,
        } = clone;
        let left = restored.destroy(soon());
        assert!(left.is_empty(), "{left:?}");
        self.net.destroy(slot, soon()).unwrap();
        self.disks.remove(disk, false, soon()).unwrap();
    }
}

fn checksum(path: &Path) -> String {
    run("sha256sum", [path])
}

#[test]
fn vm_a_linux_template_is_built_and_wakes_twice_at_once_on_different_disks() {
    let test = "vm_a_linux_template_is_built_and_wakes_twice_at_once_on_different_disks";
    if !machine::inside_with_vmm(test) {
        return;
    }
    let scratch = Scratch::new("template");
    let image = scratch.disk("image.raw", DISK_BYTES);
    let untouched = checksum(&image);
    let lists = [("slots", "ip netns list"), ("loop devices", "losetup -a")];
    let there = lists.map(|(_, list)| run("sh", ["-c", list]));
    let built = build(&scratch, &image);
    assert_eq!(checksum(&image), untouched, "the image is only read");
    let manifest = &built["manifest"];
    assert_eq!(manifest["guest_kernel"]["path"], GUEST_KERNEL);
    assert_eq!(manifest["agent"]["family"], "Wrenn");
    assert_eq!(manifest["memory"]["image"], "memory");
    let taken = built["memory_allocated_bytes"].as_u64().unwrap();
    assert!(taken < 256 << 20, "free pages were given back: {taken}");
    for ((what, list), before) in lists.into_iter().zip(there) {
        let left = run("sh", ["-c", list]);
        assert_eq!(left, before, "{what} are left of the build");
    }

    let root = scratch.join("root");
    let store = TemplateStore::open(&root, Faults::NONE).unwrap();
    let id = TemplateId::new("linux").unwrap();
    let template = store.get(&id).unwrap();
    let facts = HostFacts::gather(&LaunchSpec {
        program: machine::vmm_path(),
        ..LaunchSpec::default()
    });
    assert!(facts.vmm.is_some() && facts.cpu.is_some(), "{facts:?}");
    template.check(&facts).unwrap();
    let before = [template.memory_image(), template.disk().unwrap()];
    let sums = before.each_ref().map(|path| checksum(path));

    let net = HostNet::open(NetConfig::default(), Faults::NONE).unwrap();
    net.prepare(soon()).unwrap();
    let disks = DiskPool::open(DiskConfig::default(), Faults::NONE);
    let lab = Lab {
        net,
        disks,
        scratch,
    };
    let clones = ["one", "two"].map(|name| lab.wake(&template, name));
    let mut nonces = Vec::new();
    for (name, clone) in ["one", "two"].iter().zip(&clones) {
        let namespace = Namespace::existing(&clone.slot.plan().netns);
        let guest = Guest(&namespace);
        nonces.push(guest.nonce());
        guest.check_pattern();
        let count = guest.counter();
        guest.await_counter_above(count);
        let found = guest.shell("cat /disk/mark 2>/dev/null || echo none");
        assert_eq!(found.trim(), "none", "{name}: somebody else's write");
        guest.shell(&format!("echo {name} >/disk/mark && sync"));
        assert_eq!(guest.shell("cat /disk/mark").trim(), *name);
    }
    assert_eq!(nonces[0], nonces[1], "one guest, twice");
    let busy = store.remove(&id, soon()).unwrap_err().to_string();
    assert!(
        busy.contains("2 VMs have its memory mapped, its disk is the base of one, two"),
        "{busy}"
    );
    for clone in clones {
        lab.end(clone);
    }
    assert_eq!(
        before.each_ref().map(|path| checksum(path)),
        sums,
        "the template"
    );
    store.remove(&id, soon()).unwrap();
    let left: Vec<_> = std::fs::read_dir(root.join("templates")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
