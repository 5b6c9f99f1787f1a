//! `rewake bench` tells the truth: what was slowed is slower, what broke is a failure and no
//! fast time, a run on the stand-in says so everywhere, and nothing is left behind.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

#[path = "support/bench_scratch.rs"]
mod bench_scratch;
#[path = "support/real_vmm.rs"]
mod real_vmm;

use std::fs;
use std::path::Path;
use std::process::Command;

use bench_scratch::{REWAKE, Scratch, lines, words};
use real_vmm::RealVmm;
use serde_json::Value;

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
        // Which kind was the best that works here, and not that it was.
        let disk = sample["disk"].as_str().unwrap();
        assert!(["dm-snapshot", "reflink", "copy"].contains(&disk), "{disk}");
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

/// Each operation by itself, in every memory mode that it can have, several at once, and from
/// snapshots that are young or were dropped from the page cache.
#[test]
fn root_every_operation_is_measured_by_itself_beside_its_rivals() {
    let test = "root_every_operation_is_measured_by_itself_beside_its_rivals";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let arguments = [
        "--operation=resume,pause,destroy",
        "--memory-mode=shared,map",
        "--against=conventional,floor",
        "--concurrency=1,2",
        "--iterations=2",
        "--warm-up=0",
        "--ram=32",
        "--disk=copy",
    ];
    let samples = scratch.samples("samples", &arguments);
    let of = |operation: &str, arm: &str, mode: &str| {
        let wanted = [operation, arm, mode];
        let fits = |it: &&Value| {
            let found = ["operation", "arm", "memory_mode"].map(|key| it[key].as_str());
            found == wanted.map(Some)
        };
        samples.iter().filter(fits).collect::<Vec<_>>()
    };
    let per_variant = 2 * (1 + 2);
    for operation in ["resume", "pause", "destroy"] {
        for arm in ["rewake", "floor"] {
            for mode in ["shared", "map"] {
                let found = of(operation, arm, mode);
                let (warm, cold): (Vec<_>, Vec<_>) =
                    found.into_iter().partition(|it| it["pools"] == true);
                assert_eq!(cold.len(), per_variant, "{operation} {arm} {mode}");
                // Ours is also resumed where it was expected.
                let has_warm = (operation, arm) == ("resume", "rewake");
                let expected = if has_warm { per_variant } else { 0 };
                assert_eq!(warm.len(), expected, "{operation} {arm} {mode}");
            }
        }
        let mode = if operation == "resume" {
            "on-demand"
        } else {
            "copy"
        };
        let found = of(operation, "conventional", mode);
        assert_eq!(found.len(), per_variant, "{operation} conventional");
    }
    assert_eq!(samples.len(), (3 * 5 + 2) * per_variant, "and no others");
    for sample in &samples {
        let ms = sample["ms"].as_f64().unwrap_or_else(|| panic!("{sample}"));
        assert!(ms > 0.0, "{sample}");
    }
    // The floor does less than we do, and what we do has our phases.
    for (operation, phase) in [
        ("resume", "init_done"),
        ("pause", "snapshot_written"),
        ("destroy", "undone"),
    ] {
        for sample in of(operation, "rewake", "shared") {
            assert!(sample["phases"][phase].is_f64(), "{phase}: {sample}");
        }
    }
}

#[test]
fn root_an_operation_that_breaks_is_a_failure_in_every_arm() {
    let test = "root_an_operation_that_breaks_is_a_failure_in_every_arm";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    // From the third process on, none writes a snapshot: the templates are made by then.
    let counter = scratch.path("counter");
    let first = format!(
        "n=$(cat {0} 2>/dev/null || echo 0); echo $((n+1)) > {0}\n\
         if [ $n -gt 1 ]; then more=\"--sim fault=on-snapshot:error\"; fi",
        counter.display()
    );
    let vmm = scratch.wrapper("vmm", &first);
    let out = scratch.path("samples");
    let output = scratch.bench(&[
        "--stand-in",
        "--operation=pause",
        "--iterations=2",
        "--warm-up=0",
        "--disk=none",
        "--against=conventional,floor",
        "--vmm",
        &vmm,
        "--out",
        out.to_str().unwrap(),
    ]);
    assert_eq!(output.status.code(), Some(1), "{}", words(&output));
    for sample in lines(&out) {
        assert!(sample["ms"].is_null(), "{sample}");
        let error = sample["error"].as_str().unwrap();
        assert!(error.contains("snapshot"), "{sample}");
    }
    scratch.assert_nothing_left();
}

#[test]
fn root_a_snapshot_grows_old_before_it_is_restored() {
    let test = "root_a_snapshot_grows_old_before_it_is_restored";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let arguments = [
        "--operation=launch,resume",
        "--age=0,1",
        "--page-cache=warm,cold",
        "--pools=off",
        "--iterations=1",
        "--warm-up=0",
        "--ram=32",
        "--disk=none",
        "--memory-mode=map",
    ];
    let begun = std::time::Instant::now();
    let samples = scratch.samples("samples", &arguments);
    // Two operations, two page caches: four times somebody waited for a second.
    assert!(begun.elapsed() >= std::time::Duration::from_secs(4));
    assert_eq!(samples.len(), 2 * 2 * 2);
    for age in [0, 1] {
        let found = samples.iter().filter(|it| it["age_s"] == age);
        assert_eq!(found.count(), 4, "{samples:?}");
    }
    assert!(samples.iter().all(|it| it["ms"].is_f64()), "{samples:?}");
}

#[test]
fn root_programs_learn_when_a_guest_was_ready_and_what_waiting_for_it_costs() {
    let test = "root_programs_learn_when_a_guest_was_ready_and_what_waiting_for_it_costs";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let arguments = [
        "--stand-in",
        "--json",
        "--against=floor",
        "--pools=on",
        "--iterations=2",
        "--warm-up=0",
        "--ram=32",
        "--disk=none",
    ];
    let output = scratch.bench(&arguments);
    assert!(output.status.success(), "{}", words(&output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    // A process takes some pages at least, and not the guest's memory.
    let cost = document["kit_private_bytes"].as_u64().unwrap();
    assert!((4096..32 << 20).contains(&cost), "{cost}");
    let variants = document["variants"].as_array().unwrap();
    assert_eq!(variants.len(), 2);
    for variant in variants {
        let p50 = |what: &str| variant[what]["p50"].as_f64().unwrap();
        assert!(p50("ready") <= p50("total"), "{variant}");
        // Ours goes on to `/init`.
        let goes_on = variant["variant"]["arm"] == "rewake";
        assert!(!goes_on || p50("ready") < p50("total"), "{variant}");
        assert_eq!(variant["ready"]["n"], 2, "{variant}");
    }
    scratch.assert_nothing_left();
}

/// What lies in memory cannot be dropped from the page cache: a time would not be a cold one.
#[test]
fn root_nothing_in_memory_is_measured_as_cold() {
    let test = "root_nothing_in_memory_is_measured_as_cold";
    let Some(scratch) = Scratch::in_memory(test) else {
        return;
    };
    let arguments = [
        "--stand-in",
        "--page-cache=cold",
        "--iterations=1",
        "--ram=32",
    ];
    let output = scratch.bench(&arguments);
    assert_eq!(output.status.code(), Some(1), "{}", words(&output));
    let text = words(&output);
    assert!(text.contains("lies in memory and cannot be cold"), "{text}");
    scratch.assert_nothing_left();
}

#[test]
fn root_a_template_of_a_host_and_a_bare_snapshot_can_be_measured() {
    let test = "root_a_template_of_a_host_and_a_bare_snapshot_can_be_measured";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let (root, kernel, image) = (
        scratch.path("root"),
        scratch.path("kernel"),
        scratch.path("image"),
    );
    fs::write(&kernel, "the stand-in does not read it").unwrap();
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let run = scratch.path("run");
    // In a network of its own.
    let built = Command::new("unshare")
        .args([
            "-n",
            REWAKE,
            "template",
            "build",
            "mine",
            "--memory-mib",
            "32",
            "--stand-in",
        ])
        .args(["--kernel", &text(&kernel), "--rootfs", &text(&image)])
        .args(["--root", &text(&root), "--runtime-dir", &text(&run)])
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", words(&built));
    let arguments = [
        "--operation=launch,resume,pause",
        "--against=conventional,floor",
        "--memory-mode=map",
        "--iterations=1",
        "--warm-up=0",
        "--disk=copy",
    ];
    let named = ["--template=mine", "--root", &text(&root)];
    let samples = scratch.samples("named", &[&arguments[..], &named].concat());
    // Ours also warm where it is launched or resumed.
    assert_eq!(samples.len(), 4 + 4 + 3);
    for sample in &samples {
        assert_eq!(
            (&sample["template"], &sample["ram_mib"]),
            (&"mine".into(), &32.into())
        );
        assert!(sample["ms"].is_f64(), "{sample}");
    }
    let unchanged = |name: &str| fs::read(root.join("templates/mine").join(name)).unwrap();
    let memory = unchanged("memory");
    let dir = format!("--template={}", text(&root.join("templates/mine")));
    let samples = scratch.samples("placed", &[&arguments[..], &[&dir]].concat());
    assert!(samples.iter().all(|it| it["template"] == "mine"));
    assert!(
        memory == unchanged("memory"),
        "nobody wrote to the template"
    );
    // A template with a disk gives one to every guest, whatever was asked for.
    let short = [
        "--iterations=1",
        "--warm-up=0",
        "--pools=off",
        "--disk=none",
    ];
    let samples = scratch.samples("disk", &[&short[..], &named].concat());
    assert!(samples[0]["disk"] != "none" && samples[0]["disk"] != "auto");
    // The same files without a manifest are a snapshot of anybody's.
    let bare = scratch.path("bare");
    fs::create_dir(&bare).unwrap();
    for name in ["config.json", "state.json"] {
        fs::copy(root.join("templates/mine").join(name), bare.join(name)).unwrap();
    }
    let output = scratch.bench(&["--stand-in", "--template", &text(&bare), "--iterations=1"]);
    assert_eq!(
        output.status.code(),
        Some(1),
        "without memory: {}",
        words(&output)
    );
    let missing = scratch.bench(&["--stand-in", "--template=none", "--root", &text(&root)]);
    assert!(words(&missing).contains("none"), "{}", words(&missing));
}

#[test]
fn root_kvm_a_template_is_measured_on_real_cloud_hypervisor() {
    let test = "root_kvm_a_template_is_measured_on_real_cloud_hypervisor";
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let shim = match RealVmm::find(&scratch.dir) {
        Ok(vmm) => vmm.assignment(),
        Err(reason) => return eprintln!("SKIP {test}: {reason}"),
    };
    let text = |name: &str| scratch.path(name).to_str().unwrap().to_owned();
    let (root, image, out) = (text("root"), text("image"), text("out"));
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let built = Command::new("unshare")
        .args(["-n", REWAKE, "template", "build", "mine", "--probe-guest"])
        .args(["--memory-mib", "64", "--rootfs", &image, "--vmm-env", &shim])
        .args(["--root", &root, "--runtime-dir", &text("run")])
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", words(&built));
    let memory = Path::new(&root).join("templates/mine/memory");
    let before = fs::read(&memory).unwrap();
    let output = scratch.bench(&[
        "--template=mine",
        "--root",
        &root,
        "--operation=launch,resume,pause,destroy",
        "--against=conventional,floor",
        "--iterations=2",
        "--warm-up=0",
        "--vmm-env",
        &shim,
        "--out",
        &out,
    ]);
    assert!(output.status.success(), "{}", words(&output));
    scratch.assert_nothing_left();
    let samples = lines(Path::new(&out));
    // Three ways to do each, and a warm one of ours to launch and to resume; twice.
    assert_eq!(samples.len(), (4 * 3 + 2) * 2);
    for sample in &samples {
        assert_eq!(sample["vmm_kind"], "cloud-hypervisor", "{sample}");
        assert_eq!(sample["template"], "mine", "{sample}");
        assert!(sample["ms"].is_f64(), "{sample}");
    }
    assert!(
        before == fs::read(&memory).unwrap(),
        "nobody wrote to the template"
    );
}

/// The rival makes the same disk with losetup and dmsetup where device-mapper works: in the test
/// machine.
#[test]
fn vm_the_conventional_disk_is_a_device_mapper_snapshot_and_nothing_of_it_is_left() {
    let test = "vm_the_conventional_disk_is_a_device_mapper_snapshot_and_nothing_of_it_is_left";
    if !Path::new("/dev/mapper/control").exists() {
        eprintln!("SKIP {test}: no device-mapper");
        return;
    }
    for program in ["losetup", "dmsetup", "blockdev", "iptables"] {
        if rewake::doctor::find_program(program).is_none() {
            eprintln!("SKIP {test}: no {program}");
            return;
        }
    }
    let Some(scratch) = Scratch::new(test) else {
        return;
    };
    let told = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let before = (told("losetup", "-a"), told("dmsetup", "ls"));
    let samples = scratch.samples(
        "samples",
        &[
            "--operation=launch,resume,destroy",
            "--against=conventional",
            "--disk=dm-snapshot",
            "--memory-mode=map",
            "--pools=off",
            "--ram=32",
            "--iterations=2",
            "--warm-up=0",
        ],
    );
    assert_eq!(samples.len(), 3 * 2 * 2);
    for sample in &samples {
        assert!(sample["ms"].is_f64(), "{sample}");
        assert_eq!(sample["disk"], "dm-snapshot");
        // Making it is a part of the launch, and takes processes.
        if sample["operation"] == "launch" && sample["arm"] == "conventional" {
            let phase = |name: &str| sample["phases"][name].as_f64().unwrap();
            assert!(
                phase("disk_acquired") - phase("slot_acquired") > 1.0,
                "{sample}"
            );
        }
    }
    assert_eq!(before, (told("losetup", "-a"), told("dmsetup", "ls")));
}

#[test]
fn what_cannot_be_measured_is_refused_before_anything_is_made() {
    let bench = |arguments: &[&str]| {
        let output = Command::new(REWAKE).arg("bench").args(arguments).output();
        output.unwrap()
    };
    for (arguments, says) in [
        (
            &["--memory-mode=shared"][..],
            "launch cannot have shared memory",
        ),
        (&["--operation=life,pause"], "run them alone"),
        (&["--operation=life", "--age=3"], "leave these out"),
        (&["--operation=life", "--concurrency=2"], "leave these out"),
        (&["--operation=life", "--against=floor"], "leave these out"),
        (&["--operation=life", "--trace=trace"], "leave these out"),
        (
            &["--out=/nowhere/samples"],
            "no directory for /nowhere/samples",
        ),
        (
            &["--html=/nowhere/report"],
            "no directory for /nowhere/report",
        ),
        (&["--trace=/"], "no directory for /"),
        (&["--template=x", "--age=3"], "is as old as it is"),
    ] {
        let output = bench(&[&["--stand-in"], arguments].concat());
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let text = words(&output);
        assert!(text.contains(says), "{arguments:?}: {text}");
    }
    for arguments in [
        &["--template=x", "--ram=32"][..],
        &["--iterations=0"],
        &["--concurrency=1,0"],
    ] {
        let output = bench(arguments);
        assert_eq!(output.status.code(), Some(2), "{}", words(&output));
    }
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
        words(&output).contains("All 6 failed"),
        "{}",
        words(&output)
    );
    scratch.assert_nothing_left();
}
