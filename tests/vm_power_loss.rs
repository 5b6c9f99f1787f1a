//! Sandboxes and power losses: a host with the stand-in lives on a file system whose writes
//! are logged, and every state that its disk can have been in is recovered from, as after a
//! restart of the machine.
//!
//! The host lives in a process of its own, which believes in another boot of the machine
//! (`boot_id`): after a power loss it is another one.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]
#![allow(clippy::duplicate_mod, reason = "both labs bring their faults along")]

mod disklab;
#[allow(dead_code)]
#[path = "lifecycle/lab.rs"]
mod lab;
mod netlab;
mod powerlab;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::{Lab, Memory, TEMPLATE, chain, memory_of, soon, write_disk};
use powerlab::{Bench, Kind, Moment, can_log, mark};
use rewake::host::{Durability, Host, LaunchOptions, PauseOptions, ResumeOptions, Sandbox};
use rewake::ids::{SandboxId, TemplateId};
use rewake::sandbox::state::State;
use rustix::fs::SeekFrom;

/// XFS refuses to be smaller.
const MEDIUM: u64 = 320 << 20;
const WARM: &str = "warm";
/// With this variable more than one file system is looked at.
const EVERY_VARIABLE: &str = "REWAKE_EVERY_FILE_SYSTEM";
/// Set for the process that is to be the host: where it works, and with what.
const LIVE: &str = "REWAKE_HOST_THAT_LIVES";
/// Where the guest's writes to its disk go.
const PLACE: u64 = 4096;

fn id() -> SandboxId {
    SandboxId::new("power").unwrap()
}

/// Sums of files, by their paths in the root.
type Print = BTreeMap<PathBuf, String>;

/// The sums of all files beneath a directory that `counts`.
fn print_of(root: &Path, dir: &Path, counts: impl Fn(&Path) -> bool + Copy) -> Print {
    let mut print = Print::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            print.extend(print_of(root, &path, counts));
        } else if counts(&path) {
            let place = path.strip_prefix(root).unwrap().to_owned();
            print.insert(place, digest(&path));
        }
    }
    print
}

/// Length and a sum over all that is not zero, each word weighted with its place. Holes are
/// skipped: everything here is slow.
fn digest(path: &Path) -> String {
    let file = File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let (mut at, mut sum) = (0, 0u64);
    while let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(data)).unwrap();
        let mut bytes = vec![0; usize::try_from(hole - data).unwrap()];
        file.read_exact_at(&mut bytes, data).unwrap();
        for (index, word) in bytes.chunks(8).enumerate() {
            let mut whole = [0; 8];
            whole[..word.len()].copy_from_slice(word);
            let place = (data + 8 * index as u64) | 1;
            sum = sum.wrapping_add(u64::from_le_bytes(whole).wrapping_mul(place));
        }
        at = hole;
    }
    format!("{length} bytes, {sum:016x}")
}

/// What a paused sandbox consists of: its snapshot and its disk.
fn print_of_sandbox(root: &Path, generation: u64) -> Print {
    let dir = root.join("sandboxes").join(id().as_str());
    let mut print = print_of(root, &dir.join(format!("snapshot.{generation}")), |_| true);
    print.extend(print_of(root, &dir.join("disk"), |_| true));
    print
}

fn print_of_template(root: &Path) -> Print {
    print_of(root, &root.join("templates").join(WARM), |_| true)
}

/// What the host had promised, and what was there then.
struct Promises {
    dir: PathBuf,
}

impl Promises {
    fn write(&self, name: &str, print: &Print) {
        let text = serde_json::to_vec(print).unwrap();
        fs::write(self.dir.join(name), text).unwrap();
    }

    /// What the guest had in memory shortly before it was paused.
    fn remember(&self, life: u64, guest: &Memory) {
        let words = [
            ("nonce", guest.nonce.clone()),
            ("counter", guest.counter.to_string()),
        ];
        let print = words.map(|(key, value)| (key.into(), value)).into();
        self.write(&format!("guest-{life}"), &print);
    }

    fn read(&self, name: &str) -> Print {
        let text = fs::read(self.dir.join(name)).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

#[test]
fn vm_a_power_loss_at_any_moment_leaves_a_sandbox_whole_or_lost_on_ext4() {
    let test = "vm_a_power_loss_at_any_moment_leaves_a_sandbox_whole_or_lost_on_ext4";
    survives_power_losses(test, Kind::Ext4);
}

#[test]
fn vm_a_power_loss_at_any_moment_leaves_a_sandbox_whole_or_lost_on_xfs() {
    let test = "vm_a_power_loss_at_any_moment_leaves_a_sandbox_whole_or_lost_on_xfs";
    if std::env::var_os(EVERY_VARIABLE).is_none() {
        disklab::skip(
            test,
            format_args!("some minutes long; {EVERY_VARIABLE} asks for it"),
        );
        return;
    }
    survives_power_losses(test, Kind::Xfs);
}

fn survives_power_losses(test: &str, kind: Kind) {
    if !disklab::in_test_machine(test) {
        return;
    }
    let Some(lab) = Lab::new(test) else { return };
    if !can_log(test) {
        return;
    }
    let name = lab.net.config().prefix;
    let bench = Bench::new(&name, kind, MEDIUM, &lab.root);
    let before = bench.without_log(|| {
        let host = lab.open();
        lab.template(&host);
        lab.census()
    });
    let medium = bench.begin();
    let_a_host_live(&lab, medium.name());
    medium.end();
    // The machine is switched off: its processes and namespaces are gone.
    bench.without_log(|| {
        lab.open().destroy(&id(), soon()).unwrap();
        let warm = TemplateId::new(WARM).unwrap();
        lab.open().templates().remove(&warm, soon()).unwrap();
        assert_eq!(lab.census(), before);
    });

    let mut judge = Judge::new(&lab);
    let begun = Instant::now();
    let states = bench.replay(|moment| judge.look(moment));
    println!("{:?}, in {:?}", judge.seen, begun.elapsed());
    assert!(states > 40, "{states} states");
    for verdict in ["paused-1", "paused-2", "paused-3", "lost"] {
        assert!(judge.seen.contains_key(verdict), "never seen: {verdict}");
    }
}

/// Runs the host that lives in a process of its own, which sees another `boot_id`.
fn let_a_host_live(lab: &Lab, medium: &str) {
    let host = lab.config(&[]).netns.unwrap();
    let words = format!(
        "{}\n{}\n{}\n{medium}",
        lab.net.dir.display(),
        host.display(),
        lab.net.config().prefix
    );
    let boot = lab.net.dir.join("boot_id");
    fs::write(&boot, "00000000-0000-4000-8000-000000000001\n").unwrap();
    let script = "mount --bind \"$1\" /proc/sys/kernel/random/boot_id && shift && exec \"$@\"";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script, "sh"])
        .arg(&boot)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_host_that_lives", "--nocapture"])
        .env(LIVE, words)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}: {said}\n{errors}",
        output.status
    );
}

/// Not a test of its own: what the process does whose machine loses its power. Returns at once
/// in any other.
#[test]
fn a_host_that_lives() {
    let Ok(words) = std::env::var(LIVE) else {
        return;
    };
    let words: Vec<&str> = words.lines().collect();
    let [dir, netns, prefix, medium] = words[..] else {
        panic!("{words:?}")
    };
    let mut config = lab::config_of(dir.as_ref(), netns.as_ref(), &[]);
    config.net.prefix = prefix.to_owned();
    let root = config.root.clone();
    let promises = Promises { dir: dir.into() };
    let host = Host::open(config).unwrap();
    let template = host.template(TEMPLATE).unwrap();
    let options = LaunchOptions {
        id: Some(id()),
        ..LaunchOptions::default()
    };
    let mut sandbox = host.launch(&template, options).unwrap();
    mark(medium, "launched");

    // Its memory is written by Cloud Hypervisor: it runs on a template's.
    promises.remember(1, &live(&sandbox, &root, 1));
    freeze(&mut sandbox, Durability::Synced);
    promises.write("paused-1", &print_of_sandbox(&root, 1));
    mark(medium, "paused-1");
    let mut sandbox = resume(&host, "shared");
    mark(medium, "resumed");

    // Its memory is a file of its own, which the snapshot gets a second name of.
    promises.remember(2, &live(&sandbox, &root, 2));
    freeze(&mut sandbox, Durability::Synced);
    promises.write("paused-2", &print_of_sandbox(&root, 2));
    mark(medium, "paused-2");
    let mut sandbox = resume(&host, "shared");
    mark(medium, "resumed");

    // A template gets a copy of it.
    live(&sandbox, &root, 3);
    sandbox.snapshot(WARM).unwrap();
    promises.write(WARM, &print_of_template(&root));
    mark(medium, WARM);

    // In the page cache first, and on the disk some time later.
    promises.remember(3, &live(&sandbox, &root, 4));
    freeze(&mut sandbox, Durability::Warm);
    promises.write("paused-3", &print_of_sandbox(&root, 3));
    mark(medium, "frozen-3");
    let begun = Instant::now();
    while !sandbox.story().unwrap().status.durable {
        assert!(begun.elapsed() < Duration::from_secs(60), "never durable");
        std::thread::sleep(Duration::from_millis(5));
    }
    mark(medium, "paused-3");
}

fn freeze(sandbox: &mut Sandbox, durability: Durability) {
    let options = PauseOptions {
        durability: Some(durability),
        ..PauseOptions::default()
    };
    sandbox
        .pause_with(options)
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
}

fn resume(host: &Host, mode: &str) -> Sandbox {
    let sandbox = host
        .resume(&id(), ResumeOptions::default())
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    let vm = sandbox.story().unwrap().status.vm.unwrap();
    assert_eq!(vm.memory_mode, mode);
    sandbox
}

/// The guest writes to its memory and to its disk, and the kernel writes both back, which it
/// may do at any time. Data only: times and sizes come later.
fn live(sandbox: &Sandbox, root: &Path, value: u8) -> Memory {
    let disk = lab::disk_of(sandbox);
    write_disk(&disk, PLACE, value);
    let before = memory_of(sandbox);
    let now = memory_of(sandbox);
    before.goes_on_in(&now);
    let dir = root.join("sandboxes").join(id().as_str());
    let all = |path: &Path| {
        let name = path.file_name().unwrap_or_default();
        ["memory", "memory-ranges"]
            .map(Some)
            .contains(&name.to_str())
    };
    for file in print_of(root, &dir, all).into_keys() {
        File::open(root.join(file)).unwrap().sync_data().unwrap();
    }
    File::open(disk).unwrap().sync_data().unwrap();
    now
}

/// Looks at the states, each as if the machine had just been started.
struct Judge<'l> {
    lab: &'l Lab,
    promises: Promises,
    /// How often each verdict was found.
    seen: BTreeMap<String, usize>,
}

impl<'l> Judge<'l> {
    fn new(lab: &'l Lab) -> Self {
        let dir = lab.net.dir.clone();
        Self {
            lab,
            promises: Promises { dir },
            seen: BTreeMap::new(),
        }
    }

    fn look(&mut self, moment: &Moment<'_>) {
        let case = moment.case;
        let _ = fs::remove_dir_all(self.lab.net.dir.join("run"));
        let host = Host::open_as_it_is(self.lab.config(&[])).unwrap();
        host.ready(soon()).unwrap();
        let census = host.recover(soon()).unwrap();
        assert!(census.is_clean(), "{case}: {census:?}");
        self.look_at_template(&host, moment);
        let verdict = match host.sandbox(&id()) {
            Err(error) if error.is_unknown() => "none".to_owned(),
            Err(error) => panic!("{case}: {}", chain(&error)),
            Ok(sandbox) => self.verdict(&host, &sandbox, case),
        };
        let promise = moment.marks.last().map_or("", String::as_str);
        let allowed: &[&str] = match (promise, moment.is_mark) {
            ("" | "launched", _) => &["none", "lost", "paused-1"],
            // What was promised is there, whatever comes.
            ("paused-1", true) => &["paused-1"],
            ("paused-2", true) => &["paused-2"],
            ("paused-3", _) => &["paused-3"],
            // It is used up before the guest runs on.
            ("paused-1", false) => &["paused-1", "lost"],
            ("paused-2", false) => &["paused-2", "lost"],
            ("resumed", true) => &["lost"],
            ("resumed", false) if !moment.has("paused-2") => &["lost", "paused-2"],
            (_, true) if promise != "frozen-3" => &["lost"],
            _ => &["lost", "paused-3"],
        };
        assert!(
            allowed.contains(&verdict.as_str()),
            "{case}: it is {verdict}, which may be {allowed:?}"
        );
        *self.seen.entry(verdict).or_default() += 1;
        host.destroy(&id(), soon()).unwrap();
    }

    /// In which state the sandbox is; where it is paused, all of it is as it was then.
    fn verdict(&self, host: &Host, sandbox: &Sandbox, case: &str) -> String {
        let status = sandbox.story().unwrap().status;
        let resumed = |verdict: &str| {
            let first = !self.seen.contains_key(verdict);
            first.then(|| host.resume(&id(), ResumeOptions::default()))
        };
        match status.state {
            State::Paused => {
                let verdict = format!("paused-{}", status.generation);
                let found = print_of_sandbox(&self.lab.root, status.generation);
                assert_eq!(found, self.promises.read(&verdict), "{case}: {verdict}");
                if let Some(resumed) = resumed(&verdict) {
                    let sandbox = resumed.unwrap_or_else(|error| panic!("{}", chain(&error)));
                    let before = self.promises.read(&format!("guest-{}", status.generation));
                    let guest = memory_of(&sandbox);
                    assert_eq!(guest.nonce, before[Path::new("nonce")], "{case}");
                    let counter: u64 = before[Path::new("counter")].parse().unwrap();
                    assert!(guest.counter > counter, "{case}: {guest:?} {before:?}");
                }
                verdict
            }
            State::Lost => {
                let verdict = "lost".to_owned();
                if let Some(resumed) = resumed(&verdict) {
                    let error = chain(&resumed.unwrap_err());
                    assert!(error.contains("It is lost: "), "{case}: {error}");
                }
                verdict
            }
            other => panic!("{case}: it is {other}"),
        }
    }

    /// The template is whole or not there, and is there once that was promised.
    fn look_at_template(&self, host: &Host, moment: &Moment<'_>) {
        let names = host.templates().list().unwrap();
        assert!(names.iter().any(|name| name.as_str() == TEMPLATE));
        if names.iter().any(|name| name.as_str() == WARM) {
            let found = print_of_template(&self.lab.root);
            assert_eq!(found, self.promises.read(WARM), "{}", moment.case);
        } else {
            assert!(!moment.has(WARM), "{}: the template is gone", moment.case);
        }
    }
}
