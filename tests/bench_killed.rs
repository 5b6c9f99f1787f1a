//! A run of `rewake bench` that is killed leaves nothing that runs, and the next one removes
//! what it has left; runs that live are not disturbed.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

#[path = "support/bench_scratch.rs"]
mod bench_scratch;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bench_scratch::{Scratch, lines, words};
use rewake_sys::loopdev::{self, LoopDevice, LoopOptions};
use rustix::process::{Pid, Signal, kill_process};

const BUDGET: Duration = Duration::from_secs(60);
/// What a run says that has found another one's remains.
const REMOVED: &str = "A run that was killed had left, now removed";
/// More rounds than anybody waits for.
const ENDLESS: &[&str] = &[
    "--stand-in",
    "--operation=launch,pause",
    "--against=conventional,floor",
    "--iterations=100000",
    "--memory-mode=map",
    "--ram=32",
    "--disk=copy",
];
const SHORT: &[&str] = &[
    "--stand-in",
    "--pools=off",
    "--iterations=1",
    "--warm-up=0",
    "--ram=32",
    "--disk=none",
];

fn start(scratch: &Scratch, arguments: &[&str]) -> Child {
    scratch
        .command(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + BUDGET;
    while !holds() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The directories of runs.
fn runs(scratch: &Scratch) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(&scratch.temporary).unwrap().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Waits until the one run there has something by this name, or beginning with it.
fn wait_for_file(scratch: &Scratch, place: &str, beginning: &str) {
    let is_there = |run: &PathBuf| {
        let entries = fs::read_dir(run.join(place)).into_iter().flatten();
        let names = entries.flatten().map(|entry| entry.file_name());
        let mut names = names.map(|name| name.to_string_lossy().into_owned());
        names.any(|name| name.starts_with(beginning) && !name.ends_with(".new"))
    };
    wait_for(beginning, || runs(scratch).iter().any(is_there));
}

/// The living processes that bear the directory in their command line or environment.
fn processes(of: &Path) -> Vec<String> {
    let of = of.to_str().unwrap().as_bytes();
    let bears = |pid: &u32| {
        let files = ["cmdline", "environ"].map(|file| fs::read(format!("/proc/{pid}/{file}")));
        let mut texts = files.iter().flatten();
        texts.any(|text| text.windows(of.len()).any(|part| part == of))
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(bears)
        .map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default())
        .collect()
}

/// The mounts and loop devices that bear the directory.
fn kernel_objects(of: &Path) -> Vec<String> {
    let of = of.to_str().unwrap();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let loops = loopdev::bound().unwrap_or_default().into_iter();
    let files = loops.map(|number| {
        let file = format!("/sys/block/loop{number}/loop/backing_file");
        fs::read_to_string(file).unwrap_or_default()
    });
    let all = mounts.lines().map(ToOwned::to_owned).chain(files);
    all.filter(|text| text.contains(of)).collect()
}

#[test]
fn root_whenever_a_run_is_killed_nothing_of_it_runs_on_and_the_next_one_removes_the_rest() {
    let test =
        "root_whenever_a_run_is_killed_nothing_of_it_runs_on_and_the_next_one_removes_the_rest";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    for (moment, place, beginning) in [
        ("as soon as its directory is locked", ".", "lock"),
        ("when it has noted who it is", ".", "inside"),
        ("while it makes a template", ".", "template-"),
        ("when its first slot stands", "run/netns", "rw-"),
        ("when a process waits in its pool", "run/v/vm", "kit"),
        ("while the floor is prepared", "run", "floor-"),
        (
            "while a slot is made the conventional way",
            ".",
            "conventional-",
        ),
        (
            "when a sandbox of its host is there",
            "root/sandboxes",
            "sb-",
        ),
    ] {
        let mut run = start(&scratch, ENDLESS);
        wait_for_file(&scratch, place, beginning);
        run.kill().unwrap();
        assert_eq!(run.wait().unwrap().signal(), Some(9), "{moment}");
        let left = runs(&scratch);
        assert_eq!(left.len(), 1, "{moment}: its directory");
        wait_for("the end of its processes", || {
            processes(&scratch.temporary).is_empty()
        });
        let kept = kernel_objects(&scratch.temporary);
        assert!(kept.is_empty(), "{moment}: {kept:?}");
        let output = scratch.bench(SHORT);
        let text = words(&output);
        assert!(output.status.success(), "{moment}: {text}");
        let name = left.first().unwrap().to_str().unwrap();
        assert!(text.contains(REMOVED), "{moment}: {text}");
        assert!(text.contains(name), "{moment}: {text}");
        scratch.assert_nothing_left();
    }
}

/// The next run begins while what the other one has started is still dying.
#[test]
fn root_a_run_that_is_dying_is_waited_for() {
    let Some(scratch) = Scratch::new("root_a_run_that_is_dying_is_waited_for") else {
        return;
    };
    for _ in 0..5 {
        let mut run = start(&scratch, ENDLESS);
        wait_for_file(&scratch, ".", "conventional-");
        run.kill().unwrap();
        run.wait().unwrap();
        let text = words(&scratch.bench(SHORT));
        assert!(text.contains(REMOVED), "{text}");
        scratch.assert_nothing_left();
    }
}

#[test]
fn root_a_run_that_is_asked_to_end_or_whose_child_is_killed_removes_everything_itself() {
    let test = "root_a_run_that_is_asked_to_end_or_whose_child_is_killed_removes_everything_itself";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    for asked in [Signal::INT, Signal::TERM, Signal::HUP] {
        let run = start(&scratch, ENDLESS);
        wait_for_file(&scratch, ".", "conventional-");
        signal(run.id(), asked);
        let output = run.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(128 + asked.as_raw()));
        scratch.assert_nothing_left();
    }
    let run = start(&scratch, ENDLESS);
    wait_for_file(&scratch, ".", "conventional-");
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", run.id()));
    signal(children.unwrap().trim().parse().unwrap(), Signal::KILL);
    let output = run.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = words(&output);
    assert!(text.contains("The run was ended by SIGKILL"), "{text}");
    scratch.assert_nothing_left();
    assert!(processes(&scratch.temporary).is_empty());
    assert!(kernel_objects(&scratch.temporary).is_empty());
}

#[test]
fn root_a_run_ends_whose_caller_ignores_what_becomes_of_children() {
    let test = "root_a_run_ends_whose_caller_ignores_what_becomes_of_children";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let run = scratch.command(SHORT);
    let mut command = Command::new("env");
    command
        .arg("--ignore-signal=CHLD")
        .arg(run.get_program())
        .args(run.get_args());
    for (name, value) in run.get_envs() {
        command.env(name, value.unwrap());
    }
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    wait_for("its end", || child.try_wait().unwrap().is_some());
    assert!(child.wait().unwrap().success());
    scratch.assert_nothing_left();
}

#[test]
fn root_a_run_beside_it_is_neither_swept_nor_disturbed() {
    let test = "root_a_run_beside_it_is_neither_swept_nor_disturbed";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let out = scratch.path("samples");
    let arguments = [
        "--stand-in",
        "--operation=launch,pause",
        "--against=conventional,floor",
        "--iterations=6",
        "--warm-up=0",
        "--memory-mode=map",
        "--ram=32",
        "--disk=copy",
        "--out",
        out.to_str().unwrap(),
    ];
    let living = start(&scratch, &arguments);
    wait_for_file(&scratch, ".", "conventional-");
    let living_dir = runs(&scratch);
    let mut killed = start(&scratch, ENDLESS);
    wait_for("another run", || runs(&scratch).len() == 2);
    let both = runs(&scratch);
    let killed_dir = both.difference(&living_dir).next().unwrap();
    wait_for("its slots", || killed_dir.join("run/netns").exists());
    killed.kill().unwrap();
    killed.wait().unwrap();
    let beside = [SHORT, &["--against=conventional"]].concat();
    let text = words(&scratch.bench(&beside));
    assert!(text.contains(killed_dir.to_str().unwrap()), "{text}");
    assert_eq!(text.matches(REMOVED).count(), 1, "{text}");
    assert_eq!(runs(&scratch), living_dir, "only the dead one is gone");
    let output = living.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", words(&output));
    let samples = lines(&out);
    // Warm and cold, conventional and floor; and three ways to pause.
    assert_eq!(samples.len(), 6 * (4 + 3));
    for sample in &samples {
        assert!(sample["ms"].is_f64(), "{sample}");
    }
    scratch.assert_nothing_left();
}

#[test]
fn root_loop_devices_go_with_the_run_that_bound_them_and_no_others() {
    let test = "root_loop_devices_go_with_the_run_that_bound_them_and_no_others";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    if let Err(error) = loopdev::available() {
        return eprintln!("SKIP {test}: {error}");
    }
    let bind = |path: &Path| {
        fs::write(path, vec![0; 1 << 20]).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        // While it is open here it cannot be unbound.
        let device = LoopDevice::bind(file.as_fd(), LoopOptions::default()).unwrap();
        device.number()
    };
    let kill_one = || {
        let others = runs(&scratch);
        let mut run = start(&scratch, ENDLESS);
        wait_for("its mark", || {
            let mut new = runs(&scratch).into_iter().filter(|it| !others.contains(it));
            new.any(|it| it.join("inside").exists())
        });
        run.kill().unwrap();
        run.wait().unwrap();
        let now = runs(&scratch);
        now.difference(&others).next().unwrap().clone()
    };
    let is_bound = |number: u32| loopdev::bound().unwrap().contains(&number);
    let foreign = bind(&scratch.path("foreign"));
    let mut living = start(&scratch, ENDLESS);
    wait_for_file(&scratch, ".", "template-");
    let dead = kill_one();
    let own = bind(&dead.join("disk"));
    let image = scratch.path("image");
    let noted = bind(&image);
    fs::write(dead.join("bound"), format!("{image:?}\n")).unwrap();
    // What a living run may be about to use stays, until there is none.
    let text = words(&scratch.bench(SHORT));
    assert!(!is_bound(own), "{text}");
    assert!(is_bound(noted), "{text}");
    assert!(dead.join("bound").exists(), "{text}");
    living.kill().unwrap();
    living.wait().unwrap();
    let text = words(&scratch.bench(SHORT));
    assert!(!is_bound(noted), "{text}");
    assert!(is_bound(foreign), "{text}");
    scratch.assert_nothing_left();
    LoopDevice::open(foreign, true).unwrap().unbind().unwrap();
}

#[test]
fn root_a_directory_that_only_looks_like_a_runs_is_left_alone() {
    let test = "root_a_directory_that_only_looks_like_a_runs_is_left_alone";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    let age = |path: &Path| File::open(path).unwrap().set_modified(long_ago).unwrap();
    let make = |name: &str, files: &[&str]| {
        let dir = scratch.temporary.join(name);
        fs::create_dir(&dir).unwrap();
        for file in files {
            fs::write(dir.join(file), "x").unwrap();
        }
        dir
    };
    let full = make("rewake-bench-full", &["precious"]);
    let foreign = make("rewake-bench-foreign", &["lock"]);
    std::os::unix::fs::chown(&foreign, Some(12345), None).unwrap();
    let linked = scratch.temporary.join("rewake-bench-linked");
    std::os::unix::fs::symlink(make("elsewhere", &["lock"]), &linked).unwrap();
    let begun = make("rewake-bench-begun", &["lock.new"]);
    let young = make("rewake-bench-young", &["lock.new"]);
    age(&full);
    age(&begun);
    let output = scratch.bench(SHORT);
    assert!(output.status.success(), "{}", words(&output));
    assert!(full.join("precious").exists());
    assert!(foreign.join("lock").exists());
    assert!(linked.join("lock").exists());
    assert!(young.join("lock.new").exists());
    assert!(!begun.exists(), "that one died before its lock had a name");
    fs::remove_file(linked).unwrap();
}

/// What the conventional way makes with losetup and dmsetup, where device-mapper works: in the
/// test machine.
#[test]
fn vm_mappings_and_loop_devices_of_a_killed_run_are_removed_by_the_next_one() {
    let test = "vm_mappings_and_loop_devices_of_a_killed_run_are_removed_by_the_next_one";
    if !Path::new("/dev/mapper/control").exists() {
        return eprintln!("SKIP {test}: no device-mapper");
    }
    for program in ["losetup", "dmsetup", "blockdev", "iptables"] {
        if rewake::doctor::find_program(program).is_none() {
            return eprintln!("SKIP {test}: no {program}");
        }
    }
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let told = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let all = || (told("losetup", "-a"), told("dmsetup", "ls"));
    let before = all();
    let arguments = [
        "--stand-in",
        "--operation=launch,pause",
        "--against=conventional",
        "--disk=dm-snapshot",
        "--memory-mode=map",
        "--pools=off",
        "--ram=32",
        "--iterations=100000",
    ];
    for prefix in ["rwb-", "rewake-"] {
        let has_mapping = || {
            let names = told("dmsetup", "ls");
            let is_new = |name: &str| !before.1.lines().any(|it| it == name);
            names
                .lines()
                .any(|name| name.starts_with(prefix) && is_new(name))
        };
        let kill_one = || {
            let mut run = start(&scratch, &arguments);
            wait_for("a mapping", has_mapping);
            run.kill().unwrap();
            run.wait().unwrap();
            wait_for("the end of its processes", || {
                processes(&scratch.temporary).is_empty()
            });
            let (had_mapping, loops) = (has_mapping(), all().0);
            (had_mapping, loops, words(&scratch.bench(SHORT)))
        };
        // One that was just being removed when it was seen may be gone before the kill.
        let mut kills = (0..10).map(|_| kill_one());
        let (_, loops, text) = kills.find(|it| it.0).expect("a mapping that was left");
        assert_ne!(loops, before.0, "loop devices outlive everybody");
        assert!(text.contains(REMOVED), "{text}");
        assert!(text.contains(&format!("device {prefix}")), "{text}");
        assert_eq!(before, all(), "{text}");
        scratch.assert_nothing_left();
    }
}
