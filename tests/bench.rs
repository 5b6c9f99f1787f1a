//! `rewake bench` tells the truth: what was slowed is slower, what broke is a failure and no
//! fast time, a run on the stand-in says so everywhere, and nothing is left behind.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

const REWAKE: &str = env!("CARGO_BIN_EXE_rewake");
const STAND_IN: &str = env!("CARGO_BIN_EXE_rewake-sim");

/// A directory in which everything of a run lies, and which must be empty after it.
struct Scratch {
    dir: PathBuf,
    temporary: PathBuf,
}

impl Scratch {
    /// `None`, said aloud, where a run cannot make its network.
    fn new(test: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIP {test}: not root");
            return None;
        }
        if let Err(error) = rewake_sys::netns::run_in_new(drop) {
            eprintln!("SKIP {test}: no network namespaces: {error}");
            return None;
        }
        for program in ["ip", "iptables", "unshare", "bash"] {
            if rewake::doctor::find_program(program).is_none() {
                eprintln!("SKIP {test}: no {program}");
                return None;
            }
        }
        // Sockets have short paths only.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("rwb-{}-{count}", std::process::id()));
        let temporary = dir.join("t");
        fs::create_dir_all(&temporary).unwrap();
        Some(Self { dir, temporary })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn bench(&self, arguments: &[&str]) -> Output {
        Command::new(REWAKE)
            .arg("bench")
            .args(arguments)
            .env("TMPDIR", &self.temporary)
            .output()
            .unwrap()
    }

    /// A run that must come to its end; its samples.
    fn samples(&self, name: &str, arguments: &[&str]) -> Vec<Value> {
        let out = self.path(name);
        let file = out.to_str().unwrap();
        let output = self.bench(&[&["--stand-in", "--out", file], arguments].concat());
        assert!(output.status.success(), "{}", words(&output));
        self.assert_nothing_left();
        lines(&out)
    }

    /// A program that plays the stand-in after doing something first.
    fn wrapper(&self, name: &str, first: &str) -> String {
        let path = self.path(name);
        fs::write(
            &path,
            format!("#!/bin/sh\n{first}\nexec {STAND_IN} $more \"$@\"\n"),
        )
        .unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn assert_nothing_left(&self) {
        let left: Vec<_> = fs::read_dir(&self.temporary).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
        assert!(rewake::vmm::orphan::list(&self.temporary).is_empty());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let ours = self.temporary.to_str().unwrap();
        assert!(!mounts.contains(ours), "a mount is left");
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn words(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&output.stdout), text(&output.stderr))
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn root_a_run_beside_its_rivals_says_everywhere_that_it_was_on_the_stand_in() {
    let test = "root_a_run_beside_its_rivals_says_everywhere_that_it_was_on_the_stand_in";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let (html, trace) = (scratch.path("report.html"), scratch.path("trace.json"));
    let samples = scratch.samples(
        "samples",
        &[
            "--iterations=2",
            "--warm-up=1",
            "--against=conventional,floor",
            "--memory-mode=map,copy",
            "--concurrency=1,3",
            "--html",
            html.to_str().unwrap(),
            "--trace",
            trace.to_str().unwrap(),
        ],
    );
    // Two of ours and the floor in two modes; conventionally there is no mapping, so its
    // variants are copy and on-demand.
    let variants = 2 * (2 * 3 + 2);
    assert_eq!(
        samples.len(),
        variants / 2 * 2 * (1 + 3),
        "one line for each guest"
    );
    for sample in &samples {
        assert_eq!(sample["vmm_kind"], "stand-in", "{sample}");
        assert!(sample["vmm"].as_str().unwrap().contains("stand-in"));
        for key in ["commit", "kernel", "cpu", "vmm", "build"] {
            assert!(!sample[key].as_str().unwrap().is_empty(), "{key}");
        }
        let ms = sample["ms"].as_f64().unwrap_or_else(|| panic!("{sample}"));
        assert!(ms > 0.0);
        for (phase, at) in sample["phases"].as_object().unwrap() {
            assert!(at.as_f64().unwrap() <= ms, "{phase}: {sample}");
        }
        let several = sample["concurrency"].as_u64().unwrap() > 1;
        assert_eq!(sample["batch_ms"].is_f64(), several, "{sample}");
    }
    let page = fs::read_to_string(&html).unwrap();
    let plots: Vec<_> = page.split("<svg").skip(1).collect();
    assert!(plots.len() >= 4);
    for plot in plots {
        assert!(plot.split("</svg>").next().unwrap().contains("stand-in"));
    }
    assert!(page.contains("Measured on the stand-in"));
    let trace: Value = serde_json::from_str(&fs::read_to_string(&trace).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |category: &str| events.iter().filter(|it| it["cat"] == category).count();
    assert!(of("phase") > 0 && of("vmm") > 0);
    let processes = events.iter().filter(|it| it["name"] == "process_name");
    for process in processes {
        assert!(
            process["args"]["name"]
                .as_str()
                .unwrap()
                .contains("stand-in")
        );
    }
}

#[test]
fn root_a_life_is_measured_from_its_launch_to_its_end() {
    let test = "root_a_life_is_measured_from_its_launch_to_its_end";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let arguments = [
        "--operation=life",
        "--iterations=2",
        "--warm-up=0",
        "--ram=32",
    ];
    let more = ["--against=conventional", "--disk=copy"];
    let samples = scratch.samples("samples", &[&arguments[..], &more].concat());
    let stations = [
        "launch",
        "pause-first",
        "resume-first",
        "pause",
        "resume",
        "destroy",
    ];
    for arm in ["rewake", "conventional"] {
        for station in stations {
            let here = samples
                .iter()
                .filter(|it| it["arm"] == arm && it["operation"] == station);
            let times: Vec<_> = here.map(|it| it["ms"].as_f64()).collect();
            assert_eq!(times.len(), 2, "{arm} {station}: {samples:?}");
            assert!(
                times.iter().all(Option::is_some),
                "{arm} {station}: {samples:?}"
            );
        }
    }
    assert_eq!(samples.len(), 2 * 2 * stations.len());
}

#[test]
fn root_a_program_that_was_slowed_is_reported_as_slower() {
    let test = "root_a_program_that_was_slowed_is_reported_as_slower";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let run = |name, first| {
        let vmm = scratch.wrapper(&format!("vmm-{name}"), first);
        let arguments = [
            "--iterations=20",
            "--warm-up=1",
            "--pools=off",
            "--disk=none",
            "--vmm",
        ];
        scratch.samples(name, &[&arguments[..], &[&vmm]].concat());
        scratch.path(name).to_str().unwrap().to_owned()
    };
    let (before, after) = (run("before", ""), run("after", "sleep 0.1"));
    let output = scratch.bench(&["compare", &before, &after, "--json"]);
    assert!(output.status.success(), "{}", words(&output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let result = &document["variants"][0]["result"];
    assert_eq!(result["verdict"], "slower", "{document}");
    assert!(
        result["difference"]["ratio"].as_f64().unwrap() > 1.2,
        "{document}"
    );
    let text = words(&scratch.bench(&["compare", &before, &after]));
    assert!(
        text.contains("SLOWER") && text.contains("stand-in"),
        "{text}"
    );
    let back = words(&scratch.bench(&["compare", &after, &before]));
    assert!(back.contains("faster"), "{back}");
    let same = words(&scratch.bench(&["compare", &before, &before]));
    assert!(same.contains("unchanged"), "{same}");
}

#[test]
fn root_a_restore_that_breaks_is_a_failure_and_not_a_fast_time() {
    let test = "root_a_restore_that_breaks_is_a_failure_and_not_a_fast_time";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    // Every third process refuses to restore; the first one makes the template.
    let counter = scratch.path("counter");
    let first = format!(
        "n=$(cat {0} 2>/dev/null || echo 0); echo $((n+1)) > {0}\n\
         if [ $((n % 3)) = 2 ]; then more=\"--sim fault=on-restore:error\"; fi",
        counter.display()
    );
    let vmm = scratch.wrapper("vmm", &first);
    let arguments = [
        "--iterations=6",
        "--warm-up=0",
        "--pools=off",
        "--disk=none",
        "--vmm",
        &vmm,
    ];
    let samples = scratch.samples("samples", &arguments);
    let failed: Vec<_> = samples.iter().filter(|it| !it["error"].is_null()).collect();
    assert_eq!((samples.len(), failed.len()), (6, 2), "{samples:?}");
    for sample in failed {
        assert!(sample["ms"].is_null(), "{sample}");
        assert!(
            sample["error"].as_str().unwrap().contains("restore"),
            "{sample}"
        );
    }
    // Where nothing works at all, the run fails and says why.
    let vmm = scratch.wrapper(
        "broken",
        "if [ -e \"$0.made\" ]; then more=\"--sim fault=on-restore:die\"; fi; touch \"$0.made\"",
    );
    let output = scratch.bench(&[&arguments[..5], &[&vmm, "--stand-in"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", words(&output));
    assert!(
        words(&output).contains("All 6 launches failed"),
        "{}",
        words(&output)
    );
    scratch.assert_nothing_left();
}
