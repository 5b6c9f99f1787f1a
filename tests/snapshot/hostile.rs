//! Hostile directories are refused by name, before there is any side effect.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::mpsc;
use std::time::Duration;

use rewake::snapshot::{SnapshotDir, SnapshotError, SnapshotLimits};
use rustix::fs::{CWD, FileType, Mode, mkfifoat, mknodat};
use rustix::io::Errno;

use crate::scratch::{Scratch, chain};

/// Opens in a thread of its own, so that a hang is a failure with a name.
fn refusal(name: &str, scratch: &Scratch, limits: SnapshotLimits) -> String {
    let before = scratch.census();
    let (path, (tell, told)) = (scratch.root().to_owned(), mpsc::channel());
    std::thread::spawn(move || {
        let text = match SnapshotDir::open(&path, &limits) {
            Ok(_) => "accepted".to_owned(),
            Err(error) => chain(&error),
        };
        let _ = tell.send(text);
    });
    let text = told
        .recv_timeout(Duration::from_secs(20))
        .unwrap_or_else(|_| panic!("{name}: open hangs"));
    assert_eq!(before, scratch.census(), "{name}: a side effect");
    text
}

type Spoil = Box<dyn Fn(&Scratch)>;

fn check(cases: Vec<(&str, &str, Spoil)>) {
    for (name, expected, spoil) in cases {
        let scratch = Scratch::snapshot("ch-v53/memfd-shared-4g");
        spoil(&scratch);
        let text = refusal(name, &scratch, SnapshotLimits::default());
        assert!(text.contains(expected), "{name}: {text}");
    }
}

fn spoil(change: impl Fn(&Scratch) + 'static) -> Spoil {
    Box::new(change)
}

fn edit(file: &'static str, from: &'static str, to: &'static str) -> Spoil {
    spoil(move |dir| dir.edit(file, from, to))
}

#[test]
fn refuses_files_that_are_not_regular() {
    let mut cases = Vec::new();
    for file in ["config.json", "state.json", "memory-ranges"] {
        cases.push((
            "symbolic link",
            "is a symbolic link",
            spoil(move |dir| {
                fs::rename(dir.path(file), dir.path("elsewhere")).unwrap();
                symlink("elsewhere", dir.path(file)).unwrap();
            }),
        ));
        cases.push((
            "link out of the directory",
            "is a symbolic link",
            spoil(move |dir| {
                fs::remove_file(dir.path(file)).unwrap();
                symlink("/etc/passwd", dir.path(file)).unwrap();
            }),
        ));
        cases.push((
            "directory",
            "is not a regular file but a directory",
            spoil(move |dir| {
                fs::remove_file(dir.path(file)).unwrap();
                fs::create_dir(dir.path(file)).unwrap();
            }),
        ));
        cases.push((
            "FIFO",
            "is not a regular file but a FIFO",
            spoil(move |dir| {
                fs::remove_file(dir.path(file)).unwrap();
                mkfifoat(CWD, dir.path(file), Mode::RUSR).unwrap();
            }),
        ));
        cases.push((
            "socket",
            "is not a regular file but a socket",
            spoil(move |dir| {
                fs::remove_file(dir.path(file)).unwrap();
                drop(std::os::unix::net::UnixListener::bind(dir.path(file)).unwrap());
            }),
        ));
    }
    check(cases);
}

#[test]
fn root_refuses_device_nodes() {
    for file in ["config.json", "state.json", "memory-ranges"] {
        let scratch = Scratch::snapshot("ch-v53/private-128m");
        fs::remove_file(scratch.path(file)).unwrap();
        let zero = rustix::fs::makedev(1, 5);
        let kind = FileType::CharacterDevice;
        if let Err(errno) = mknodat(CWD, scratch.path(file), kind, Mode::RUSR, zero) {
            eprintln!("SKIP root_refuses_device_nodes: mknod: {errno}");
            return;
        }
        let text = refusal(file, &scratch, SnapshotLimits::default());
        assert_eq!(
            text,
            format!("{file} is not a regular file but a character device")
        );
    }
}

#[test]
fn refuses_files_of_the_wrong_size() {
    check(vec![
        (
            "no configuration",
            "There is no config.json",
            spoil(|dir| fs::remove_file(dir.path("config.json")).unwrap()),
        ),
        (
            "no state",
            "There is no state.json",
            spoil(|dir| fs::remove_file(dir.path("state.json")).unwrap()),
        ),
        (
            "no memory",
            "memory-ranges is missing, it must have 4294967296 bytes",
            spoil(|dir| fs::remove_file(dir.path("memory-ranges")).unwrap()),
        ),
        (
            "truncated memory",
            "memory-ranges has 4294963200 bytes, but the saved ranges have 4294967296",
            spoil(|dir| dir.memory((4 << 30) - 4096)),
        ),
        (
            "memory one byte too long",
            "memory-ranges has 4294967297 bytes",
            spoil(|dir| dir.memory((4 << 30) + 1)),
        ),
        (
            "huge configuration",
            "config.json has 1 TiB, the limit is 1 MiB",
            spoil(|dir| {
                let file = fs::File::create(dir.path("config.json")).unwrap();
                file.set_len(1 << 40).unwrap();
            }),
        ),
        (
            "state one byte too long",
            "state.json has 16 MiB, the limit is 16 MiB",
            spoil(|dir| {
                let file = fs::File::create(dir.path("state.json")).unwrap();
                file.set_len((16 << 20) + 1).unwrap();
            }),
        ),
        (
            "empty state",
            "state.json is refused: It is not a snapshot tree",
            spoil(|dir| fs::write(dir.path("state.json"), "").unwrap()),
        ),
        (
            "cut state",
            "state.json is refused: It is not a snapshot tree",
            spoil(|dir| {
                let file = fs::File::options().write(true).open(dir.path("state.json"));
                file.unwrap().set_len(20_000).unwrap();
            }),
        ),
    ]);
}

#[test]
fn refuses_a_directory_that_is_none() {
    let scratch = Scratch::snapshot("ch-v53/private-128m");
    for (name, errno) in [("config.json", Errno::NOTDIR), ("nowhere", Errno::NOENT)] {
        match SnapshotDir::open(&scratch.path(name), &SnapshotLimits::default()) {
            Err(SnapshotError::OpenDirectory { path, source }) => {
                assert_eq!((path, source), (scratch.path(name), errno));
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn refuses_configurations_that_make_no_sense() {
    const CONFIG: &str = "config.json";
    let deep = format!("{}1{}", "[".repeat(9), "]".repeat(9));
    let (write, at) = (
        |text: &str| {
            let text = text.to_owned();
            spoil(move |dir: &Scratch| fs::write(dir.path(CONFIG), &text).unwrap())
        },
        r#""pvpanic":false"#,
    );
    check(vec![
        (
            "empty",
            "config.json is refused: Cannot read JSON",
            write(""),
        ),
        (
            "no object",
            "config.json is refused: Cannot read JSON",
            write("[]"),
        ),
        (
            "too deep",
            "config.json is refused: JSON nests deeper than 8",
            write(&deep),
        ),
        (
            "key twice",
            "duplicate field `pvpanic`",
            edit(CONFIG, at, r#""pvpanic":false,"pvpanic":true"#),
        ),
        (
            "unknown keys",
            "config.json has unknown keys: cpus.turbo, host_hook",
            spoil(|dir| {
                dir.edit(CONFIG, r#""boot_vcpus":1"#, r#""turbo":{},"boot_vcpus":1"#);
                dir.edit(
                    CONFIG,
                    r#""pvpanic":false"#,
                    r#""host_hook":"/bin/sh","pvpanic":false"#,
                );
            }),
        ),
        (
            "negative size",
            "invalid value: integer `-1`, expected u64",
            edit(CONFIG, r#""size":4294967296"#, r#""size":-1"#),
        ),
        (
            "size past 2^64",
            "config.json is refused",
            edit(
                CONFIG,
                r#""size":4294967296"#,
                r#""size":18446744073709551616"#,
            ),
        ),
    ]);
}

#[test]
fn refuses_memory_that_makes_no_sense() {
    const STATE: &str = "state.json";
    const RANGE: &str = r#"{\"gpa\":4294967296,\"length\":1073741824}"#;
    const MAPPING: &str = r#"\"gpa\":4294967296,\"size\":1073741824"#;
    check(vec![
        (
            "range past 2^64",
            "memory_ranges[1] runs past the address space",
            edit(
                STATE,
                RANGE,
                r#"{\"gpa\":18446744073709547520,\"length\":8192}"#,
            ),
        ),
        (
            "number past 2^64",
            "The state of memory-manager cannot be read",
            edit(
                STATE,
                RANGE,
                r#"{\"gpa\":18446744073709551616,\"length\":4096}"#,
            ),
        ),
        (
            "overlapping ranges",
            "memory_ranges[0] and memory_ranges[1] overlap",
            edit(STATE, RANGE, r#"{\"gpa\":4096,\"length\":4096}"#),
        ),
        (
            "overlapping mappings",
            "guest_ram_mappings[0] and guest_ram_mappings[1] overlap",
            edit(STATE, MAPPING, r#"\"gpa\":4096,\"size\":4096"#),
        ),
        (
            "range outside RAM",
            "memory_ranges[1] is not inside one guest RAM mapping",
            edit(STATE, RANGE, r#"{\"gpa\":3221225472,\"length\":4096}"#),
        ),
        (
            "range across the end of RAM",
            "memory_ranges[1] is not inside one guest RAM mapping",
            edit(
                STATE,
                RANGE,
                r#"{\"gpa\":4294967296,\"length\":1073745920}"#,
            ),
        ),
        (
            "unaligned range",
            "memory_ranges[1] is not aligned",
            edit(STATE, RANGE, r#"{\"gpa\":4294967297,\"length\":4096}"#),
        ),
        (
            "empty range",
            "memory_ranges[1] is empty",
            edit(STATE, RANGE, r#"{\"gpa\":4294967296,\"length\":0}"#),
        ),
        (
            "negative number",
            "invalid value: integer `-4096`, expected u64",
            edit(STATE, RANGE, r#"{\"gpa\":-4096,\"length\":4096}"#),
        ),
        (
            "fraction",
            "floating point `4096.5`, expected u64",
            edit(STATE, RANGE, r#"{\"gpa\":4096.5,\"length\":4096}"#),
        ),
        (
            "NaN",
            "The state of memory-manager cannot be read",
            edit(STATE, RANGE, r#"{\"gpa\":NaN,\"length\":4096}"#),
        ),
        (
            "more RAM than the limit",
            "The guest has 1 EiB of RAM, the limit is 64 TiB",
            edit(
                STATE,
                MAPPING,
                r#"\"gpa\":4294967296,\"size\":1152921501385621504"#,
            ),
        ),
        (
            "unknown field of a range",
            "unknown field `compressed`",
            edit(
                STATE,
                RANGE,
                r#"{\"gpa\":4294967296,\"length\":1073741824,\"compressed\":true}"#,
            ),
        ),
        (
            "duplicate field of a range",
            "duplicate field `gpa`",
            edit(
                STATE,
                RANGE,
                r#"{\"gpa\":0,\"gpa\":4294967296,\"length\":1073741824}"#,
            ),
        ),
        (
            "file offset past what the kernel takes",
            "guest_ram_mappings.file_offset[1] runs past the address space",
            spoil(|dir| {
                let text = fs::read_to_string(dir.path(STATE)).unwrap();
                let at = text.rfind(r#"\"file_offset\":0"#).unwrap();
                let (head, tail) = text.split_at(at);
                let tail = tail.replacen(":0", ":9223372036854771712", 1);
                fs::write(dir.path(STATE), format!("{head}{tail}")).unwrap();
            }),
        ),
    ]);
}

#[test]
fn refuses_trees_that_make_no_sense() {
    const STATE: &str = "state.json";
    let deep = |levels: usize| {
        let (head, tail) = (r#"{"snapshots":{"x":"#, r#"},"snapshot_data":null}"#);
        let leaf = r#"{"snapshots":{},"snapshot_data":null}"#;
        format!("{}{leaf}{}", head.repeat(levels), tail.repeat(levels))
    };
    let wide = format!(
        r#"{{"snapshots":{{{}}},"snapshot_data":null}}"#,
        (0..20_000)
            .map(|n| format!(r#""{n}":{{"snapshots":{{}},"snapshot_data":null}}"#))
            .collect::<Vec<_>>()
            .join(",")
    );
    let brackets = format!("{}{}", "[".repeat(1 << 20), "]".repeat(1 << 20));
    let unknown = format!(r#"{{"snapshots":{{}},"snapshot_data":null,"x":{brackets}}}"#);
    let mut cases = vec![
        ("node twice", "The node memory-manager is there twice", {
            edit(
                STATE,
                r#""memory-manager":{"#,
                r#""memory-manager":{"snapshots":{},"snapshot_data":null},"memory-manager":{"#,
            )
        }),
        (
            "field twice",
            "duplicate field `snapshots`",
            edit(
                STATE,
                r#""memory-manager":{"#,
                r#""memory-manager":{"snapshots":{},"#,
            ),
        ),
        (
            "no memory manager",
            "The state of memory-manager is missing",
            edit(STATE, r#""memory-manager":{"#, r#""memory-menager":{"#),
        ),
        (
            "state that is no string",
            "state is not a string",
            edit(
                STATE,
                r#""memory-manager":{"#,
                r#""other":{"snapshots":{},"snapshot_data":{"state":{}}},"memory-manager":{"#,
            ),
        ),
    ];
    for (name, expected, text) in [
        ("most levels", "memory-manager is missing", deep(15)),
        ("too many levels", "deeper than 16 levels", deep(16)),
        ("very many levels", "deeper than 16 levels", deep(100_000)),
        ("too many nodes", "more than 16384 nodes", wide),
        ("brackets", "It is not a snapshot tree", "[".repeat(1 << 20)),
        (
            "brackets in an unknown field",
            "memory-manager is missing",
            unknown,
        ),
        ("NUL bytes", "not a snapshot tree", "\0".repeat(64)),
    ] {
        let write = move |dir: &Scratch| fs::write(dir.path(STATE), &text).unwrap();
        cases.push((name, expected, spoil(write)));
    }
    cases.push((
        "not UTF-8",
        "state.json is refused: It is not UTF-8",
        spoil(|dir| fs::write(dir.path(STATE), b"{\"\xff\":1}").unwrap()),
    ));
    check(cases);
}

#[test]
fn refuses_configuration_and_state_that_contradict_each_other() {
    const CONFIG: &str = "config.json";
    const STATE: &str = "state.json";
    const DISK: &str = r#""id":"_disk0""#;
    let cases = vec![
        (
            "vCPU without state",
            "cpus.boot_vcpus is 3, but 2 vCPUs were saved",
            edit(CONFIG, r#""boot_vcpus":2"#, r#""boot_vcpus":3"#),
        ),
        (
            "other id of a disk",
            "disks.0.id: there is no saved state of the device _disk9",
            edit(CONFIG, DISK, r#""id":"_disk9""#),
        ),
        (
            "disk without id",
            "disks.0.id: the device has no id",
            edit(CONFIG, DISK, r#""id":null"#),
        ),
        (
            "one state for two devices",
            "net.0.id: another device has the id _disk0, too",
            edit(CONFIG, r#""id":"_net1""#, DISK),
        ),
        (
            "dropped balloon",
            "The saved device __balloon is not configured",
            edit(
                CONFIG,
                r#""balloon":{"pci_segment":0,"size":0,"deflate_on_oom":true,"free_page_reporting":true},"#,
                "",
            ),
        ),
        (
            "dropped disk",
            "The saved device _disk0 is not configured",
            spoil(|dir| {
                let text = fs::read_to_string(dir.path(CONFIG)).unwrap();
                let (head, tail) = text.split_once(r#""disks":["#).unwrap();
                let (_, tail) = tail.split_once("],").unwrap();
                fs::write(dir.path(CONFIG), format!("{head}{tail}")).unwrap();
            }),
        ),
        (
            "watchdog without state",
            "watchdog: there is no saved state of the device __watchdog",
            edit(CONFIG, r#""watchdog":false"#, r#""watchdog":true"#),
        ),
        (
            "console without state",
            "console: there is no saved state of the device __console",
            edit(
                CONFIG,
                r#""console":{"mode":"Off""#,
                r#""console":{"mode":"Null""#,
            ),
        ),
        (
            "mapping of an unknown zone",
            "guest_ram_mappings[0] is of the unknown zone mem1",
            edit(STATE, r#"\"zone_id\":\"mem0\""#, r#"\"zone_id\":\"mem1\""#),
        ),
        (
            "memory that is nowhere",
            "guest_ram_mappings[0] was neither saved nor is it in a shared file",
            edit(
                STATE,
                r#"{\"gpa\":0,\"length\":268435456}"#,
                r#"{\"gpa\":0,\"length\":268431360}"#,
            ),
        ),
        (
            "no memory saved at all",
            "guest_ram_mappings[0] was neither saved nor is it in a shared file",
            edit(STATE, r#"{\"gpa\":0,\"length\":268435456}"#, ""),
        ),
    ];
    for (name, expected, spoil) in cases {
        let scratch = Scratch::snapshot("ch-v53/linux-guest-256m");
        spoil(&scratch);
        let text = refusal(name, &scratch, SnapshotLimits::default());
        let stage = "config.json and state.json contradict each other: ";
        assert!(text.starts_with(stage), "{name}: {text}");
        assert!(text.contains(expected), "{name}: {text}");
    }
}

#[test]
fn notices_a_memory_file_that_is_cut_after_the_check() {
    let scratch = Scratch::snapshot("ch-v53/private-128m");
    let snapshot = SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).unwrap();
    let memory = snapshot.memory().unwrap();
    memory.check_unchanged().unwrap();

    // Another file under the same name is not the one that was checked.
    fs::rename(scratch.path("memory-ranges"), scratch.path("old")).unwrap();
    scratch.memory(4096);
    memory.check_unchanged().unwrap();

    let old = fs::File::options().write(true).open(scratch.path("old"));
    old.unwrap().set_len(4096).unwrap();
    let text = chain(&memory.check_unchanged().unwrap_err());
    assert_eq!(text, "memory-ranges changed while it was read");
}

#[test]
fn notices_a_file_that_is_rewritten_while_it_is_read() {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    let scratch = Scratch::snapshot("ch-v53/private-128m");
    let mut config = fs::read(scratch.path("config.json")).unwrap();
    config.resize(1 << 20, b' ');
    fs::write(scratch.path("config.json"), &config).unwrap();
    let file = fs::File::options()
        .write(true)
        .open(scratch.path("config.json"))
        .unwrap();
    let stop = AtomicBool::new(false);
    let refused = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                file.write_all_at(&config, 0).unwrap();
            }
        });
        let limits = SnapshotLimits::default();
        let refused = (0..1000).find_map(|_| SnapshotDir::open(scratch.root(), &limits).err());
        stop.store(true, Ordering::Relaxed);
        refused
    });
    let error = refused.expect("a thousand reads during writes, none noticed");
    assert_eq!(chain(&error), "config.json changed while it was read");
}
