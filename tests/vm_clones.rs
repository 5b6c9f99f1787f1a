//! Clones of one template with real Cloud Hypervisor and a real Linux guest: what each costs,
//! and that none of them changes the template or another.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use machine::restored::{Marks, Restored, frozen, listing, restore_command};
use machine::{Guest, Namespace, STEP_LIMIT, Scratch, Vm, api, plain_options, run};
use rewake::memory::{Saving, Usage, usage};

/// What is alive at once in the mode that shares memory, and in those that do not. With this
/// variable as many of the latter: 20 take 5 GiB of memory, and some minutes.
const CLONES: usize = 20;
const COSTLY_CLONES: usize = 3;
const COSTLY_CLONES_VARIABLE: &str = "REWAKE_CLONES";

fn pid(restored: &Restored) -> u32 {
    u32::try_from(restored.answer["pid"].as_u64().unwrap()).unwrap()
}

/// A clone of the template, alive, in a namespace and on a disk of its own.
struct Sibling {
    namespace: Namespace,
    restored: Restored,
    written: String,
    own_snapshot: Option<PathBuf>,
}

impl Sibling {
    fn new(scratch: &Scratch, snapshot: &Path, disk: &Path, mode: &str, number: usize) -> Self {
        let namespace = Namespace::new(&format!("rwtest-clone{number}"));
        let own = scratch.join(&format!("disk-{number}.raw"));
        run("cp", [Path::new("--sparse=always"), disk, &own]);
        let mut snapshot = snapshot.to_owned();
        if mode == "shared" {
            // Its memory file is its own, as after its first pause.
            let copy = scratch.join(&format!("snapshot-{number}"));
            let words = [Path::new("--sparse=always"), Path::new("-r")];
            run("cp", words.into_iter().chain([&*snapshot, &*copy]));
            snapshot = copy;
        }
        let mut command = restore_command(&namespace, &snapshot);
        command.arg("--disk").arg(own);
        let restored = Restored::by(command, mode);
        Self {
            namespace,
            restored,
            written: String::new(),
            own_snapshot: (mode == "shared").then_some(snapshot),
        }
    }

    /// Ends it; what was its own goes with it.
    fn end(self) {
        self.restored.shut_down();
        if let Some(own) = self.own_snapshot {
            fs::remove_dir_all(own).unwrap();
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

    let costly = std::env::var(COSTLY_CLONES_VARIABLE).ok();
    let costly = costly.map_or(COSTLY_CLONES, |it| it.parse().unwrap());
    let mut rows = Vec::new();
    for (mode, count) in [
        ("map", CLONES),
        ("shared", costly),
        ("on-demand", costly),
        ("copy", costly),
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
        rows.push(Row::of(mode, &usages));
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
        clones.into_iter().for_each(Sibling::end);
        assert_eq!(
            listing(&snapshot),
            before,
            "{mode}: the template was changed"
        );
    }
    println!("clones of 256 MiB alive at once, guest memory in MiB:");
    println!("mode       clones  private each  at most  together  saved");
    for row in &rows {
        println!("{row}");
    }
    let of = |wanted: &str| rows.iter().find(|row| row.mode == wanted).unwrap().private;
    let (map, on_demand) = (of("map"), of("on-demand"));
    assert!(map * 30 <= on_demand, "map {map}, on-demand {on_demand}");
}

/// What the clones of one mode cost.
struct Row {
    mode: &'static str,
    clones: usize,
    /// Of each, at the median and at most.
    private: u64,
    most: u64,
    saving: Saving,
}

impl Row {
    fn of(mode: &'static str, usages: &[Usage]) -> Self {
        let mut costs: Vec<_> = usages.iter().map(|usage| usage.guest.private.0).collect();
        costs.sort_unstable();
        Self {
            mode,
            clones: costs.len(),
            private: costs[costs.len() / 2],
            most: costs[costs.len() - 1],
            saving: Saving::of(usages),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "{:10} {:>6} {:>13.2} {:>8.2} {:>9.1} {:>6.1}",
            self.mode,
            self.clones,
            mib(self.private),
            mib(self.most),
            mib(self.saving.together.0),
            mib(self.saving.saved().0),
        )
    }
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
