//! Every system call of `rewake disk` fails once, by the kernel's own hand: `strace` injects the
//! errors, so nothing depends on where the code expects one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Output};

use rewake::fault::Faults;
use rewake::resource::disk::{DiskError, DiskPool};

use super::disklab::{
    Lab, Place, SIZE, assert_same, chain, create, in_test_machine, pattern, read_all, skip, soon,
    write_block,
};

/// What changes something, or asks the kernel what there is.
const CALLS: &str =
    "ioctl,openat,flock,ftruncate,fsync,fdatasync,linkat,unlink,mkdir,pread64,pwrite64,lseek";
/// Of these a few will do: a copy is made of hundreds of them.
const ALIKE: [&str; 3] = ["pread64", "pwrite64", "lseek"];
/// Of these, one for each thing that is asked for or about.
const ASKED: [&str; 4] = ["ioctl", "openat", "flock", "mkdir"];
/// What the dynamic loader, the runtime and the allocator open for themselves.
const NOT_OURS: [&str; 6] = ["/etc/", "/lib", "/usr/", "/proc/", "/sys/fs/", "TCGETS"];

/// One command, and the disk that it works with.
struct Bench<'l> {
    lab: &'l Lab,
    pool: DiskPool,
    base: String,
    image: Vec<u8>,
}

impl Bench<'_> {
    /// Runs the command, with error `EIO` for one call, which is told by its name and its number
    /// among those of the name. Returns what came of it, and what `strace` saw.
    fn run(&self, words: &[&str], fails: Option<(&str, usize)>) -> (Output, String) {
        let trace = self.lab.dir.join("trace");
        let mut command = Command::new("strace");
        command
            .args(["-f", "--seccomp-bpf", "-qq", "-s", "256", "-o"])
            .arg(&trace);
        command.args(["-e", "signal=none", "-e"]);
        match fails {
            None => command.arg(format!("trace={CALLS}")),
            Some((call, when)) => {
                let inject = format!("inject={call}:error=EIO:when={when}");
                command.args([&format!("trace={call}"), "-e", &inject])
            }
        };
        command.arg(env!("CARGO_BIN_EXE_rewake"));
        command.args(["disk", "--dir"]).arg(self.lab.disks());
        command.arg("--runtime-dir").arg(self.lab.dir.join("run"));
        let output = command.args(words).output().unwrap();
        let seen = std::fs::read_to_string(&trace).unwrap_or_default();
        (output, seen)
    }

    /// Lets each call fail once, and looks at what that leads to.
    fn each(
        &self,
        words: &[&str],
        before: impl Fn(&Self) -> Vec<u8>,
        after: impl Fn(&Self, bool, &[u8], &str),
    ) {
        let written = before(self);
        let (output, seen) = self.run(words, None);
        assert!(output.status.success(), "{words:?}: {output:?}");
        after(self, true, &written, "without an error");
        let (mut counts, mut injected) = (BTreeMap::new(), 0);
        let mut questions = BTreeSet::new();
        for line in seen.lines() {
            // The number of the process, then the call.
            let call = line.split_whitespace().nth(1).unwrap_or_default();
            let (call, _) = call.split_once('(').unwrap_or_default();
            let count = counts.entry(call).or_insert(0);
            *count += 1;
            // The same question about the same thing is asked more than once.
            let question = line.split(", ").take(2).collect::<Vec<_>>().join(", ");
            let asked = ASKED.contains(&call) && !questions.insert(question);
            let enough = ALIKE.contains(&call) && *count > 2;
            if call.is_empty() || enough || asked || NOT_OURS.iter().any(|it| line.contains(it)) {
                continue;
            }
            let written = before(self);
            let (output, seen) = self.run(words, Some((call, *count)));
            let Some(failed) = seen.lines().find(|it| it.contains("(INJECTED)")) else {
                // Fewer calls than the first time: what is shared was there already.
                after(self, output.status.success(), &written, line);
                continue;
            };
            injected += 1;
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() || errors.contains("rewake: "),
                "{failed}: {errors}"
            );
            assert!(!errors.contains("panicked"), "{failed}: {errors}");
            let case = format!("{words:?}, {failed}: {errors}");
            after(self, output.status.success(), &written, &case);
        }
        println!("{}: {injected} calls failed", words[0]);
        assert!(injected > 6, "{words:?}: {injected}");
    }

    fn made(&self, keep: bool) -> Vec<u8> {
        let disk = create(self.lab, &self.pool, "a", Path::new(&self.base));
        write_block(disk.path(), 5, &pattern("kept", 5)).unwrap();
        let written = read_all(disk.path());
        if keep {
            self.pool.remove(disk, true, soon()).unwrap();
        }
        written
    }

    /// The disk is there, with what was written to it.
    fn is_whole(&self, written: &[u8], case: &str) {
        let id = self.lab.id("a");
        let disk = self.pool.attach(&id, &self.lab.disks(), soon());
        let disk = disk.unwrap_or_else(|error| panic!("{case}: {}", chain(&error)));
        assert_same(&read_all(disk.path()), written, case);
        drop(disk);
    }

    /// Nothing is left, or nothing that a second attempt would not remove.
    fn is_removed(&self, case: &str) {
        let id = self.lab.id("a");
        match self
            .pool
            .remove_by_id(&id, &self.lab.disks(), false, soon())
        {
            Ok(()) => {}
            Err(failure) if matches!(failure.source, DiskError::Missing { .. }) => {}
            Err(failure) => panic!("{case}: {}", chain(&failure)),
        }
        self.lab.assert_clean(case);
        assert_same(&read_all(Path::new(&self.base)), &self.image, case);
    }
}

fn survives_every_system_call(lab: &Lab, test: &str) {
    if let Err(error) = Command::new("strace").arg("-V").output() {
        skip(test, format_args!("strace: {error}"));
        return;
    }
    let base = lab.base("base.raw", SIZE);
    let bench = Bench {
        lab,
        pool: lab.open(Faults::NONE),
        image: read_all(&base),
        base: base.to_str().unwrap().to_owned(),
    };
    let traced = bench.run(&["show"], None).0;
    if !traced.status.success() {
        skip(test, String::from_utf8_lossy(&traced.stderr));
        return;
    }
    let id = lab.id("a");
    let mode = match lab.place {
        Place::DeviceMapper => "dm-snapshot",
        _ => "copy",
    };
    let make = ["create", &bench.base, "--id", id.as_str(), "--mode", mode];
    bench.each(
        &make,
        |_| Vec::new(),
        |bench, done, _, case| {
            if done {
                bench.is_whole(&bench.image, case);
                bench.is_removed(case);
            } else {
                lab.assert_clean(case);
            }
        },
    );
    bench.each(
        &["attach", id.as_str()],
        |bench| bench.made(true),
        |bench, done, written, case| {
            if !done {
                let left = lab.census();
                let files = left.iter().all(|it| it.starts_with('/'));
                assert!(files, "{case}: {left:?}");
            }
            bench.is_whole(written, case);
            bench.is_removed(case);
        },
    );
    let to = lab.dir.join("flat.raw");
    bench.each(
        &["flatten", id.as_str(), to.to_str().unwrap()],
        |bench| bench.made(false),
        |bench, done, written, case| {
            assert_eq!(to.exists(), done, "{case}");
            if done {
                assert_same(&read_all(&to), written, case);
                std::fs::remove_file(&to).unwrap();
            }
            bench.is_whole(written, case);
            bench.is_removed(case);
        },
    );
    bench.each(
        &["remove", id.as_str()],
        |bench| bench.made(false),
        |bench, done, _, case| {
            if done {
                lab.assert_clean(case);
            }
            bench.is_removed(case);
        },
    );
}

#[test]
fn every_failed_system_call_of_a_copy_leaves_nothing() {
    let test = "every_failed_system_call_of_a_copy_leaves_nothing";
    if let Some(lab) = Lab::new(test, Place::Plain) {
        survives_every_system_call(&lab, test);
    }
}

#[test]
fn vm_every_failed_system_call_of_a_snapshot_leaves_nothing() {
    let test = "vm_every_failed_system_call_of_a_snapshot_leaves_nothing";
    if !in_test_machine(test) {
        return;
    }
    if let Some(lab) = Lab::new(test, Place::DeviceMapper) {
        survives_every_system_call(&lab, test);
    }
}
