//! A host that keeps processes ready.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rewake::host::{Host, LaunchOptions};
use rewake::restore::kit::KitPoolOptions;

use crate::lab::{Lab, config_of, memory_of, soon};

#[test]
fn root_a_launch_takes_a_process_that_was_ready_and_recovery_leaves_the_others_alone() {
    let test = "root_a_launch_takes_a_process_that_was_ready_and_recovery_leaves_the_others_alone";
    let Some(lab) = Lab::new(test) else {
        return;
    };
    let template = lab.template(&lab.open());
    let before = lab.census();
    let mut config = lab.config(&[]);
    config.kits = KitPoolOptions {
        target: 2,
        refill_interval_ms: 1,
        ..KitPoolOptions::default()
    };
    let host = Host::open(config).unwrap();
    assert!(host.kits().unwrap().wait_settled(soon()));
    let ready = lab.processes();
    assert_eq!(ready.len(), 2);
    let sandbox = host.launch(&template, LaunchOptions::default()).unwrap();
    let notes = sandbox.timeline().notes();
    assert!(
        notes.iter().any(|note| note.contains("was warm")),
        "{notes:?}"
    );
    let pid = sandbox.story().unwrap().status.vm.unwrap().process.pid;
    assert!(ready.contains(&pid), "{pid} of {ready:?}");
    memory_of(&sandbox);

    // Whoever looks after the host meanwhile takes idle processes for what they are.
    let census = lab.open().recover(soon()).unwrap();
    assert!(census.is_clean(), "{census:?}");
    assert!(census.foreign.is_empty(), "{:?}", census.foreign);
    assert!(census.swept.is_empty(), "{:?}", census.swept);
    assert_eq!(census.adopted.len(), 1);

    sandbox.destroy().unwrap();
    drop(host);
    assert_eq!(lab.census(), before);
}

#[test]
fn root_a_launch_that_fails_beside_its_kit_leaves_neither_kit_nor_slot() {
    let test = "root_a_launch_that_fails_beside_its_kit_leaves_neither_kit_nor_slot";
    let Some(lab) = Lab::new(test) else { return };
    let sound = lab.open();
    let template = lab.template(&sound);
    let before = lab.census();
    let mut config = lab.config(&[]);
    config.kits = KitPoolOptions {
        target: 1,
        ..KitPoolOptions::default()
    };
    let host = Host::open(config).unwrap();
    assert!(host.kits().unwrap().wait_settled(soon()));
    let taken = host.kits().unwrap().stats().taken;
    // Without its base image no disk can be made.
    std::fs::remove_file(template.disk().unwrap()).unwrap();
    host.launch(&template, LaunchOptions::default())
        .unwrap_err();
    assert_eq!(host.kits().unwrap().stats().taken, taken + 1);
    drop(host);
    assert_eq!(lab.census(), before);
}

/// The variables under which this test binary is the owner that is going to be killed: where
/// its host lies, and what it is connected to.
const ROLE: &str = "REWAKE_TEST_HOST_WITH_KITS";
const NETNS: &str = "REWAKE_TEST_HOST_NETNS";

#[test]
fn root_whoever_opens_the_root_of_a_killed_host_ends_its_idle_processes_and_frees_their_slots() {
    let test = "root_whoever_opens_the_root_of_a_killed_host_ends_its_idle_processes_and_frees_their_slots";
    if let (Some(dir), Some(netns)) = (std::env::var_os(ROLE), std::env::var_os(NETNS)) {
        be_killed(&PathBuf::from(dir), &PathBuf::from(netns));
    }
    let Some(lab) = Lab::new(test) else { return };
    let template = lab.template(&lab.open());
    let before = lab.census();
    let host = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        lab.net.host.as_raw_fd()
    );
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("warm::{test}"), "--nocapture"])
        .env(ROLE, &lab.net.dir)
        .env(NETNS, host)
        .env("REWAKE_TEST_HOST_PREFIX", lab.net.config().prefix.as_str())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = owner.stdout.take().unwrap();
    let mut text = Vec::new();
    while !text.ends_with(b"one runs, two wait\n") {
        let mut byte = [0];
        let count = std::io::Read::read(&mut output, &mut byte).unwrap();
        assert_eq!(
            count,
            1,
            "the owner gave up: {}",
            String::from_utf8_lossy(&text)
        );
        text.push(byte[0]);
    }
    assert_eq!(lab.processes().len(), 3);
    // Beside a living owner nothing is touched.
    let census = Host::open_as_it_is(lab.config(&[]))
        .unwrap()
        .recover(soon())
        .unwrap();
    assert!(census.swept.is_empty(), "{:?}", census.swept);
    assert_eq!(lab.processes().len(), 3);

    owner.kill().unwrap();
    owner.wait().unwrap();
    assert_eq!(lab.processes().len(), 3, "processes outlive their owner");
    let host = Host::open(lab.config(&[])).unwrap();
    // The sandbox goes on; what nobody can ask for any more has ended.
    let sandboxes = host.sandboxes().unwrap();
    assert_eq!(sandboxes.len(), 1);
    let pid = sandboxes[0].story().unwrap().status.vm.unwrap().process.pid;
    assert_eq!(lab.processes(), [pid]);
    memory_of(&sandboxes[0]);
    for sandbox in sandboxes {
        sandbox.destroy().unwrap();
    }
    // The slots of the idle ones are free again, too, and can be had.
    let again = host.launch(&template, LaunchOptions::default()).unwrap();
    again.destroy().unwrap();
    drop(host);
    assert_eq!(lab.census(), before);
}

/// A host of the lab with one sandbox on a process that was ready, and two that still are.
fn be_killed(dir: &std::path::Path, netns: &std::path::Path) -> ! {
    let mut config = config_of(dir, netns, &[]);
    let prefix = std::env::var("REWAKE_TEST_HOST_PREFIX").unwrap();
    config.net.prefix = serde_json::from_value(prefix.into()).unwrap();
    config.kits = KitPoolOptions {
        target: 2,
        refill_interval_ms: 1,
        ..KitPoolOptions::default()
    };
    let host = Host::open(config).unwrap();
    assert!(host.kits().unwrap().wait_settled(soon()));
    let template = host.template(crate::lab::TEMPLATE).unwrap();
    let sandbox = host.launch(&template, LaunchOptions::default()).unwrap();
    assert!(host.kits().unwrap().wait_settled(soon()));
    let warm = sandbox
        .timeline()
        .notes()
        .iter()
        .any(|it| it.contains("was warm"));
    assert!(warm, "{:?}", sandbox.timeline().notes());
    println!("one runs, two wait");
    loop {
        std::thread::park();
    }
}
