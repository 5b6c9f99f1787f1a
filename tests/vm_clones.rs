//! Clones of one template with real Cloud Hypervisor and a real Linux guest: what each costs,
//! and that none of them changes the template or another.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use machine::restored::{Marks, Restored, frozen, listing, restore_command};
use machine::{Guest, Namespace, STEP_LIMIT, Scratch, Vm, api, plain_options, run};
use rewake::memory::{Saving, Usage, usage};

/// What is alive at once in the mode that shares memory, and in those that do not.
const CLONES: usize = 20;
const COSTLY_CLONES: usize = 3;

const MIB: u64 = 1 << 20;

fn pid(restored: &Restored) -> u32 {
    u32::try_from(restored.answer["pid"].as_u64().unwrap()).unwrap()
}

/// A clone of the template, alive, in a namespace and on a disk of its own.
struct Sibling {
    namespace: Namespace,
    restored: Restored,
    written: String,
}

impl Sibling {
    fn new(scratch: &Scratch, snapshot: &Path, disk: &Path, mode: &str, number: usize) -> Self {
        let namespace = Namespace::new(&format!("rwtest-clone{number}"));
        let own = scratch.join(&format!("disk-{number}.raw"));
        run("cp", [Path::new("--sparse=always"), disk, &own]);
        let mut command = restore_command(&namespace, snapshot);
        command.arg("--disk").arg(own);
        let restored = Restored::by(command, mode);
        Self {
            namespace,
            restored,
            written: String::new(),
        }
    }

    fn usage(&self) -> Usage {
        usage(pid(&self.restored)).unwrap()
    }

    /// Writes half a MiB that no other clone has.
    fn write(&mut self) {
        self.written = Guest(&self.namespace)
            .shell("head -c 524288 /dev/urandom >/run/own && sha256sum </run/own");
    }

    fn check(&self, marks: &Marks) {
        let guest = Guest(&self.namespace);
        assert_eq!(guest.nonce(), marks.nonce, "rebooted instead of restored");
        guest.check_pattern();
        let found = guest.shell("sha256sum </run/own");
        assert_eq!(found, self.written, "one clone's memory changed another's");
    }

    /// A clone that stands still costs no processor, which is emulated.
    fn stand_still(&self, still: bool) {
        let call = if still { "vm.pause" } else { "vm.resume" };
        api(&self.restored.socket(), "PUT", call, "");
    }
}

#[test]
fn vm_clones_share_a_template_and_leave_it_as_it_was() {
    let test = "vm_clones_share_a_template_and_leave_it_as_it_was";
    if !machine::inside_with_vmm(test) {
        return;
    }
    let scratch = Scratch::new("clones");
    let namespace = Namespace::new("rwtest-clones");
    let disk = scratch.disk("disk.raw", 32 << 20);
    let snapshot = scratch.join("snapshot");
    let vm = Vm::start(&namespace, &scratch, &plain_options(&disk, &scratch));
    let marks = frozen(vm, Guest(&namespace), &snapshot);
    drop(namespace);
    let before = listing(&snapshot);

    let mut private = Vec::new();
    for (mode, count) in [
        ("map", CLONES),
        ("on-demand", COSTLY_CLONES),
        ("copy", COSTLY_CLONES),
    ] {
        let mut clones: Vec<Sibling> = Vec::new();
        for number in 0..count {
            let clone = Sibling::new(&scratch, &snapshot, &disk, mode, number);
            if mode == "on-demand" {
                await_whole(pid(&clone.restored));
            }
            clone.stand_still(true);
            clones.push(clone);
        }
        let usages: Vec<_> = clones.iter().map(Sibling::usage).collect();
        let mut costs: Vec<_> = usages.iter().map(|usage| usage.guest.private.0).collect();
        costs.sort_unstable();
        let median = costs[costs.len() / 2];
        let saving = Saving::of(&usages);
        println!(
            "{mode}, {count} clones of 256 MiB alive: private memory {:.2} MiB each (median), \
             {:.1} MiB together, {:.1} MiB saved by sharing",
            median as f64 / MIB as f64,
            saving.together.0 as f64 / MIB as f64,
            saving.saved().0 as f64 / MIB as f64,
        );
        private.push((mode, median));
        if mode == "map" {
            for clone in &mut clones {
                clone.stand_still(false);
                clone.write();
                clone.stand_still(true);
            }
            for clone in &clones {
                clone.stand_still(false);
                clone.check(&marks);
                clone.stand_still(true);
            }
        }
        for clone in clones {
            clone.restored.shut_down();
        }
        assert_eq!(
            listing(&snapshot),
            before,
            "{mode}: the template was changed"
        );
    }
    let of = |wanted: &str| private.iter().find(|(mode, _)| *mode == wanted).unwrap().1;
    assert!(
        of("map") * 30 <= of("on-demand"),
        "map {}, on-demand {}",
        of("map"),
        of("on-demand")
    );
}

/// Until CH's thread that fills memory has ended.
fn await_whole(pid: u32) {
    let filling = || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        tasks.flatten().any(|task| {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            name.trim() == "uffd-handler"
        })
    };
    let begun = Instant::now();
    while filling() {
        assert!(begun.elapsed() < 4 * STEP_LIMIT, "memory never came");
        std::thread::sleep(Duration::from_millis(100));
    }
}
