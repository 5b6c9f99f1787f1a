//! VMs that die, hang or refuse in the middle of an operation.

use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::host::{LaunchOptions, PauseOptions, ResumeOptions};
use rewake::plan::MemoryMode;
use rewake::sandbox::state::State;

use super::lab::{Lab, chain, launch, memory_of, soon};

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn root_a_vm_that_dies_is_noticed_and_its_sandbox_is_lost() {
    let test = "root_a_vm_that_dies_is_noticed_and_its_sandbox_is_lost";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let template = lab.template(&host);
    let before = lab.census();
    let (mut first, second) = (launch(&host, &template), launch(&host, &template));
    let mut third = launch(&host, &template);
    let mut watch = host.watch().unwrap();
    assert_eq!(watch.len(), 3);
    // What ends on purpose is no event.
    third.pause().unwrap();
    let soon_over = Deadline::after(Duration::from_millis(200));
    assert_eq!(watch.next(soon_over).unwrap(), None);
    let pid = second.story().unwrap().status.vm.unwrap().process.pid;
    kill(pid);
    assert_eq!(watch.next(soon()).unwrap().as_ref(), Some(second.id()));
    assert_eq!(second.state().unwrap(), State::Lost);
    assert!(second.story().unwrap().status.slot.is_none());
    let error = host
        .resume(second.id(), ResumeOptions::default())
        .unwrap_err();
    assert!(
        chain(&error).ends_with("It is lost: its Cloud Hypervisor has ended"),
        "{}",
        chain(&error)
    );
    // Nobody watches this one: whoever comes next finds out.
    let pid = first.story().unwrap().status.vm.unwrap().process.pid;
    kill(pid);
    let error = first.pause().unwrap_err();
    assert!(error.is_ended(), "{}", chain(&error));
    assert_eq!(first.state().unwrap(), State::Lost);
    for sandbox in [first, second, third] {
        sandbox.destroy().unwrap();
    }
    assert_eq!(lab.census(), before);
}

/// In each case the sandbox is still there afterwards and is the same guest.
#[test]
fn root_a_pause_that_cloud_hypervisor_spoils_leaves_a_running_sandbox() {
    let test = "root_a_pause_that_cloud_hypervisor_spoils_leaves_a_running_sandbox";
    let Some(lab) = Lab::new(test) else { return };
    let sound = lab.open();
    let template = lab.template(&sound);
    let before = lab.census();
    for fault in [
        "fault=on-pause:error:1",
        "fault=on-pause:truncated:1",
        "fault=after-paused:drop:1",
        "fault=on-snapshot:error:1",
        "fault=on-snapshot:garbage:1",
        "fault=mid-snapshot:error:1",
        "fault=after-snapshot:drop:1",
    ] {
        let host = lab.open_with(&[fault], Faults::NONE);
        let mut sandbox = launch(&host, &template);
        let memory = memory_of(&sandbox);
        let outcome = sandbox.pause();
        let error = outcome.expect_err(fault);
        assert_eq!(
            sandbox.state().unwrap(),
            State::Running,
            "{fault}: {}",
            chain(&error)
        );
        memory.goes_on_in(&memory_of(&sandbox));
        // The fault has struck: the next attempt succeeds.
        sandbox
            .pause()
            .unwrap_or_else(|error| panic!("{fault}: {}", chain(&error)));
        sandbox.destroy().unwrap();
        assert_eq!(lab.census(), before, "{fault}");
    }
}

#[test]
fn root_a_vm_that_dies_during_a_pause_is_lost_and_said_to_be() {
    let test = "root_a_vm_that_dies_during_a_pause_is_lost_and_said_to_be";
    let Some(lab) = Lab::new(test) else { return };
    let sound = lab.open();
    let template = lab.template(&sound);
    let before = lab.census();
    for fault in [
        "fault=on-pause:die",
        "fault=after-paused:exit=0",
        "fault=on-snapshot:die",
        "fault=mid-snapshot:die",
        "fault=after-snapshot:die",
    ] {
        let host = lab.open_with(&[fault], Faults::NONE);
        let mut sandbox = launch(&host, &template);
        let begun = Instant::now();
        let error = sandbox.pause().expect_err(fault);
        assert!(begun.elapsed() < Duration::from_secs(10), "{fault}");
        assert_eq!(
            sandbox.state().unwrap(),
            State::Lost,
            "{fault}: {}",
            chain(&error)
        );
        sandbox.destroy().unwrap();
        assert_eq!(lab.census(), before, "{fault}");
    }
}

#[test]
fn root_a_pause_that_hangs_ends_at_its_deadline() {
    let test = "root_a_pause_that_hangs_ends_at_its_deadline";
    let Some(lab) = Lab::new(test) else { return };
    let sound = lab.open();
    let template = lab.template(&sound);
    let before = lab.census();
    let host = lab.open_with(&["fault=on-snapshot:late=3000:1"], Faults::NONE);
    let mut sandbox = launch(&host, &template);
    let memory = memory_of(&sandbox);
    let options = PauseOptions {
        deadline: Deadline::after(Duration::from_secs(1)),
        ..PauseOptions::default()
    };
    let error = sandbox.pause_with(options).unwrap_err();
    assert!(error.is_timeout(), "{}", chain(&error));
    memory.goes_on_in(&memory_of(&sandbox));
    sandbox.destroy().unwrap();
    assert_eq!(lab.census(), before);
}

#[test]
fn root_a_resume_that_cloud_hypervisor_refuses_leaves_a_paused_sandbox() {
    let test = "root_a_resume_that_cloud_hypervisor_refuses_leaves_a_paused_sandbox";
    let Some(lab) = Lab::new(test) else { return };
    let sound = lab.open();
    let template = lab.template(&sound);
    let mut sandbox = launch(&sound, &template);
    let mut memory = memory_of(&sandbox);
    for fault in [
        "fault=start:exit=1",
        "fault=before-api:die",
        "fault=on-restore:error",
        "fault=on-restore:die",
        "fault=guest:never",
    ] {
        sandbox.pause().unwrap();
        let host = lab.open_with(&[fault], Faults::NONE);
        let options = ResumeOptions {
            deadline: Deadline::after(Duration::from_secs(2)),
            // Its memory file is only read, so that nothing is changed by a guest that runs
            // and is not heard.
            memory_mode: Some(MemoryMode::Map),
            ..ResumeOptions::default()
        };
        let error = host.resume(sandbox.id(), options).expect_err(fault);
        assert_eq!(
            sandbox.state().unwrap(),
            State::Paused,
            "{fault}: {}",
            chain(&error)
        );
        assert!(error.leftovers.is_empty(), "{fault}");
        sandbox = sound
            .resume(sandbox.id(), ResumeOptions::default())
            .unwrap_or_else(|error| panic!("{fault}: {}", chain(&error)));
        let now = memory_of(&sandbox);
        memory.goes_on_in(&now);
        memory = now;
    }
    sandbox.destroy().unwrap();
}

#[test]
fn root_a_sandbox_whose_memory_never_arrives_is_not_frozen() {
    let test = "root_a_sandbox_whose_memory_never_arrives_is_not_frozen";
    let Some(lab) = Lab::new(test) else { return };
    let sound = lab.open();
    let template = lab.template(&sound);
    let host = lab.open_with(&["fault=guest:preload-fail"], Faults::NONE);
    let options = LaunchOptions {
        memory_mode: Some(MemoryMode::OnDemand),
        ..LaunchOptions::default()
    };
    let mut sandbox = host.launch(&template, options).unwrap();
    let memory = memory_of(&sandbox);
    let error = sandbox.pause().unwrap_err();
    assert!(
        chain(&error).contains("cannot be frozen yet"),
        "{}",
        chain(&error)
    );
    assert_eq!(sandbox.state().unwrap(), State::Running);
    memory.goes_on_in(&memory_of(&sandbox));
    sandbox.destroy().unwrap();
}
