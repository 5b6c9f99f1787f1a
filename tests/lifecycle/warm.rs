//! A host that keeps processes ready.

use rewake::host::{Host, LaunchOptions};
use rewake::restore::kit::KitPoolOptions;

use crate::lab::{Lab, memory_of, soon};

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
