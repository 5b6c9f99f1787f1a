//! The story of a sandbox from its template to its end.

use std::collections::BTreeSet;
use std::time::Duration;

use mio::Poll;
use rewake::fault::Faults;
use rewake::host::{LaunchOptions, ResumeOptions};
use rewake::ids::SandboxId;
use rewake::plan::MemoryMode;
use rewake::resource::disk::{DiskConfig, DiskEvent, DiskWatch, StoreState, WatchOptions};
use rewake::sandbox::state::State;
use rewake::timeline::Phase;
use rewake::wire::reactor::TokenRange;

use super::lab::{Lab, chain, disk_of, launch, memory_of, read_disk, recall, soon, write_disk};
use crate::netlab::hold::Hold;

#[test]
fn root_a_launch_starts_cloud_hypervisor_before_its_slot_stands() {
    let Some(lab) = Lab::new("root_a_launch_starts_cloud_hypervisor_before_its_slot_stands") else {
        return;
    };
    let sound = lab.open();
    let template = lab.template(&sound);
    // The tap is not made before there is a process: with one after the other, it never is.
    let runs = lab.net.dir.join("run");
    let hold = Hold::new("create tap", move || {
        !rewake::vmm::orphan::list(&runs).is_empty()
    });
    let host = lab.open_with(&[], Faults::inject(hold.clone()));
    let sandbox = launch(&host, &template);
    hold.wait_reached();
    let timeline = sandbox.timeline();
    let at = |phase| timeline.at(phase).unwrap_or_else(|| panic!("{phase:?}"));
    assert!(at(Phase::NetnsPinned) < at(Phase::Spawned), "{timeline}");
    assert!(
        at(Phase::SlotAcquired) < at(Phase::GatePassed),
        "{timeline}"
    );
    assert!(at(Phase::GatePassed) < at(Phase::ApiAccepted), "{timeline}");
    sandbox.destroy().unwrap();
}

#[test]
fn root_build_launch_pause_resume_snapshot_launch_destroy() {
    let test = "root_build_launch_pause_resume_snapshot_launch_destroy";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let before = lab.census();
    let template = lab.template(&host);
    let base = std::fs::read(template.disk().unwrap()).unwrap();
    let ram = std::fs::read(template.memory_image()).unwrap();

    let mut first = launch(&host, &template);
    let second = launch(&host, &template);
    assert_ne!(first.host_ip(), second.host_ip());
    assert_eq!(first.state().unwrap(), State::Running);
    // Clones share their past and part ways.
    let (one, two) = (memory_of(&first), memory_of(&second));
    assert_eq!(one.nonce, two.nonce);
    write_disk(&disk_of(&first), 4096, 1);
    write_disk(&disk_of(&second), 4096, 2);

    let agent = first.agent().unwrap();
    let address = first.host_ip();
    first
        .pause()
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(first.state().unwrap(), State::Paused);
    // Cloud Hypervisor wrote all of memory, zeros as well: those are holes now.
    let saved = lab.sandbox(first.id()).join("snapshot.1/memory-ranges");
    assert!(is_sparse(&saved), "{}", saved.display());
    // A client of the life before is an error, and never a crash or another sandbox.
    agent.health(soon()).unwrap_err();
    assert!(first.agent().is_err());

    let mut first = host
        .resume(first.id(), ResumeOptions::default())
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(first.host_ip(), address);
    let again = memory_of(&first);
    one.goes_on_in(&again);
    assert_eq!(read_disk(&disk_of(&first), 4096), 1);
    assert_eq!(read_disk(&disk_of(&second), 4096), 2);
    assert_eq!(read_disk(&disk_of(&first), 8192), 7, "from the base image");

    let warm = first
        .snapshot("warm")
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    again.goes_on_in(&memory_of(&first));
    assert!(is_sparse(&warm.memory_image()));
    let error = first.snapshot("warm").unwrap_err();
    assert!(chain(&error).contains("warm"), "{}", chain(&error));
    let third = launch(&host, &warm);
    again.goes_on_in(&memory_of(&third));
    assert_eq!(read_disk(&disk_of(&third), 4096), 1);

    for sandbox in [first, second, third] {
        sandbox.clone().destroy().unwrap();
        assert!(sandbox.state().unwrap_err().is_unknown());
        // Once more is harmless.
        sandbox.destroy().unwrap();
    }
    assert_eq!(std::fs::read(template.disk().unwrap()).unwrap(), base);
    assert_eq!(std::fs::read(template.memory_image()).unwrap(), ram);
    for template in [template, warm] {
        host.templates().remove(template.id(), soon()).unwrap();
    }
    drop(host);
    assert_eq!(lab.census(), before);
}

/// Whether less than half of a memory file takes up room.
fn is_sparse(path: &std::path::Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let found = path.metadata().unwrap();
    assert_eq!(found.len(), super::lab::MEMORY.0);
    found.blocks() * 512 < found.len() / 2
}

#[test]
fn root_ten_rounds_of_pause_and_resume_in_every_memory_mode() {
    let test = "root_ten_rounds_of_pause_and_resume_in_every_memory_mode";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let template = lab.template(&host);
    // Of its own accord a sandbox begins in Map and goes on in Shared.
    for mode in [
        None,
        Some(MemoryMode::Map),
        Some(MemoryMode::Copy),
        Some(MemoryMode::OnDemand),
    ] {
        let options = LaunchOptions {
            memory_mode: mode,
            ..LaunchOptions::default()
        };
        let mut sandbox = host
            .launch(&template, options)
            .unwrap_or_else(|error| panic!("{mode:?}: {}", chain(&error)));
        let mut memory = memory_of(&sandbox);
        for round in 1..=10 {
            sandbox
                .pause()
                .unwrap_or_else(|error| panic!("{mode:?} {round}: {}", chain(&error)));
            let options = ResumeOptions {
                memory_mode: mode,
                ..ResumeOptions::default()
            };
            sandbox = host
                .resume(sandbox.id(), options)
                .unwrap_or_else(|error| panic!("{mode:?} {round}: {}", chain(&error)));
            let status = sandbox.story().unwrap().status;
            assert_eq!(status.generation, round + 1);
            let used = status.vm.unwrap().memory_mode;
            let expected = mode.map_or("shared", MemoryMode::name);
            assert_eq!(used, expected, "round {round}");
            let now = memory_of(&sandbox);
            memory.goes_on_in(&now);
            memory = now;
        }
        sandbox.destroy().unwrap();
    }
}

#[test]
fn root_what_cannot_be_done_is_said_and_changes_nothing() {
    let test = "root_what_cannot_be_done_is_said_and_changes_nothing";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let template = lab.template(&host);
    let mut sandbox = launch(&host, &template);
    let id = sandbox.id().clone();

    let twice = LaunchOptions {
        id: Some(id.clone()),
        ..LaunchOptions::default()
    };
    let error = host.launch(&template, twice).unwrap_err();
    assert_eq!(
        chain(&error),
        format!("Sandbox {id}: launch: There is a sandbox of that id already")
    );
    let error = host.resume(&id, ResumeOptions::default()).unwrap_err();
    assert_eq!(
        chain(&error),
        format!("Sandbox {id}: resume: It is running; this needs one that is paused")
    );
    sandbox.pause().unwrap();
    let error = sandbox.pause().unwrap_err();
    assert!(chain(&error).contains("It is paused"), "{}", chain(&error));
    let error = sandbox.snapshot("x").unwrap_err();
    assert!(chain(&error).contains("It is paused"), "{}", chain(&error));
    let nobody = SandboxId::new("nobody").unwrap();
    let error = host.resume(&nobody, ResumeOptions::default()).unwrap_err();
    assert!(error.is_unknown());
    assert!(host.template("nothing").is_err());
    assert!(sandbox.snapshot("No Name").is_err());
    let sandbox = host.resume(&id, ResumeOptions::default()).unwrap();
    recall(&sandbox.agent().unwrap());
    sandbox.destroy().unwrap();
}

#[test]
fn root_a_watch_reports_pressure_on_the_disks_of_sandboxes() {
    let test = "root_a_watch_reports_pressure_on_the_disks_of_sandboxes";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let before = lab.census();
    let template = lab.template(&host);
    let sandboxes = [launch(&host, &template), launch(&host, &template)];
    let mut config = DiskConfig::default();
    // No disk has as much room as that.
    config.thresholds.used_percent = 0;
    let options = WatchOptions {
        every: Duration::from_millis(20),
        under_pressure: Duration::from_millis(20),
    };
    let mut watch = DiskWatch::new(config, options, TokenRange::new(0, DiskWatch::TOKENS));
    let mut poll = Poll::new().unwrap();
    for sandbox in &sandboxes {
        assert!(sandbox.watch_disk(&mut watch).unwrap());
    }
    let mut told = BTreeSet::new();
    for _ in &sandboxes {
        let event = watch.wait(&mut poll, soon()).unwrap().unwrap();
        let DiskEvent::State { id, from, status } = event else {
            panic!("{event:?}")
        };
        assert_eq!(
            (from, status.state),
            (StoreState::Healthy, StoreState::Pressure)
        );
        told.insert(id);
    }
    assert_eq!(told, sandboxes.iter().map(|it| it.id().clone()).collect());
    // What is destroyed has no disk any more, and that is told, too.
    for sandbox in sandboxes {
        let id = sandbox.id().clone();
        sandbox.destroy().unwrap();
        let event = watch.wait(&mut poll, soon()).unwrap().unwrap();
        assert_eq!(event.id(), &id);
        assert!(matches!(event, DiskEvent::Ended { .. }), "{event:?}");
    }
    host.templates().remove(template.id(), soon()).unwrap();
    drop(host);
    assert_eq!(lab.census(), before);
}
