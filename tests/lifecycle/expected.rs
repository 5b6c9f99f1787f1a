//! Resumes that are expected: a process waits for them.

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rewake::host::{Cause, Error, Host, LaunchOptions, ResumeOptions, Sandbox};
use rewake::sandbox::state::State;

use super::lab::{Lab, STAND_IN, chain, memory_of, soon};

const LONG: Duration = Duration::from_secs(600);

fn paused(host: &Host, lab: &Lab) -> Sandbox {
    let template = lab.template(host);
    let mut sandbox = host.launch(&template, LaunchOptions::default()).unwrap();
    memory_of(&sandbox);
    sandbox.pause().unwrap();
    assert!(lab.processes().is_empty());
    sandbox
}

fn expect(host: &Host, sandbox: &Sandbox, wait: Duration) {
    host.expect_resume(sandbox.id(), wait, soon())
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
}

fn resume(host: &Host, sandbox: &Sandbox) -> Sandbox {
    host.resume(sandbox.id(), ResumeOptions::default())
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn pid(sandbox: &Sandbox) -> u32 {
    sandbox.story().unwrap().status.vm.unwrap().process.pid
}

fn await_none(lab: &Lab) {
    let until = soon();
    while !lab.processes().is_empty() {
        assert!(!until.has_passed(), "{:?}", lab.processes());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn root_an_expected_resume_takes_the_process_that_waits_in_its_slot() {
    let test = "root_an_expected_resume_takes_the_process_that_waits_in_its_slot";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let mut sandbox = paused(&host, &lab);
    let before = lab.census();
    for round in 0..3 {
        expect(&host, &sandbox, LONG);
        assert!(host.expects_resume(sandbox.id()));
        let waiting = lab.processes();
        assert_eq!(waiting.len(), 1);
        assert_eq!(sandbox.state().unwrap(), State::Paused);
        // Whoever looks after the host meanwhile leaves it alone.
        let census = lab.open().recover(soon()).unwrap();
        assert!(census.is_clean(), "{census:?}");
        assert_eq!(census.paused.len(), 1, "{census:?}");
        assert!(census.swept.is_empty() && census.foreign.is_empty());
        sandbox = resume(&host, &sandbox);
        assert_eq!([pid(&sandbox)], *waiting, "round {round}");
        assert!(!host.expects_resume(sandbox.id()));
        memory_of(&sandbox);
        sandbox.pause().unwrap();
        assert_eq!(lab.census(), before, "round {round}");
    }
    // One that runs expects nothing, and is told so.
    sandbox = resume(&host, &sandbox);
    let refused = host.expect_resume(sandbox.id(), LONG, soon()).unwrap_err();
    assert!(matches!(*refused.cause, Cause::State { .. }));
    memory_of(&sandbox);
    sandbox.destroy().unwrap();
}

#[test]
fn root_a_process_that_waits_in_vain_goes_and_harms_nobody() {
    let test = "root_a_process_that_waits_in_vain_goes_and_harms_nobody";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let mut sandbox = paused(&host, &lab);
    let before = lab.census();

    // Its time is over.
    expect(&host, &sandbox, Duration::from_millis(50));
    await_none(&lab);
    assert!(!host.expects_resume(sandbox.id()));
    assert_eq!(lab.census(), before);

    // Asked for twice, one waits, for the second time that was asked for.
    expect(&host, &sandbox, Duration::from_millis(200));
    let first = lab.processes();
    expect(&host, &sandbox, LONG);
    assert_ne!(lab.processes(), first);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(lab.processes().len(), 1);

    // It dies: the resume starts another.
    for waiting in lab.processes() {
        let waiting = rustix::process::Pid::from_raw(waiting.cast_signed()).unwrap();
        rustix::process::kill_process(waiting, rustix::process::Signal::KILL).unwrap();
    }
    sandbox = resume(&host, &sandbox);
    let memory = memory_of(&sandbox);
    sandbox.pause().unwrap();

    // Another program resumes it: the process waits on, which is in nobody's way, and serves
    // the next time.
    expect(&host, &sandbox, LONG);
    let waiting = lab.processes();
    let other = lab.open();
    let mut elsewhere = resume(&other, &sandbox);
    assert_ne!([pid(&elsewhere)], *waiting);
    memory.goes_on_in(&memory_of(&elsewhere));
    elsewhere.pause().unwrap();
    sandbox = resume(&host, &sandbox);
    assert_eq!([pid(&sandbox)], *waiting);
    memory.goes_on_in(&memory_of(&sandbox));
    sandbox.pause().unwrap();

    // The slot is made anew, so that it stands in another.
    expect(&host, &sandbox, LONG);
    let waiting = lab.processes();
    let path = format!("{}-{}", lab.net.config().prefix, sandbox.slot().unwrap());
    super::netlab::ip(&lab.net.host, &format!("netns del {path}"));
    sandbox = resume(&host, &sandbox);
    assert_ne!([pid(&sandbox)], *waiting);
    memory.goes_on_in(&memory_of(&sandbox));
    assert_eq!(lab.processes(), [pid(&sandbox)]);
    sandbox.pause().unwrap();

    // The host ends, and it with it.
    expect(&host, &sandbox, LONG);
    let id = sandbox.id().clone();
    drop((sandbox, host));
    assert!(lab.processes().is_empty());
    assert_eq!(lab.census(), before);

    // The sandbox is destroyed, by this host or by another.
    let host = lab.open();
    let sandbox = host.sandbox(&id).unwrap();
    expect(&host, &sandbox, Duration::from_millis(500));
    other.destroy(&id, soon()).unwrap();
    await_none(&lab);
    host.destroy(&id, soon()).unwrap();
    let launched = host.launch(&host.template("base").unwrap(), LaunchOptions::default());
    let mut sandbox = launched.unwrap();
    sandbox.pause().unwrap();
    expect(&host, &sandbox, LONG);
    sandbox.destroy().unwrap();
    assert!(lab.processes().is_empty());
    let gone = host.expect_resume(&id, LONG, soon()).unwrap_err();
    assert!(gone.is_unknown(), "{}", chain(&gone));
}

#[test]
fn root_a_resume_that_fails_on_the_process_that_waited_is_put_back() {
    let test = "root_a_resume_that_fails_on_the_process_that_waited_is_put_back";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let sandbox = paused(&host, &lab);
    let before = lab.census();
    let broken = lab.open_with(&["fault=on-restore:error"], rewake::fault::Faults::NONE);
    expect(&broken, &sandbox, LONG);
    broken
        .resume(sandbox.id(), ResumeOptions::default())
        .unwrap_err();
    assert_eq!(sandbox.state().unwrap(), State::Paused);
    assert_eq!(lab.census(), before);
    let sandbox = resume(&host, &sandbox);
    memory_of(&sandbox);
    sandbox.destroy().unwrap();
}

#[test]
fn root_a_process_that_is_just_starting_goes_with_its_sandbox() {
    let test = "root_a_process_that_is_just_starting_goes_with_its_sandbox";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let sandbox = paused(&host, &lab);
    // One that takes its time.
    let slow = lab.net.dir.join("slow");
    let script = format!("#!/bin/sh\nsleep 0.5\nexec {STAND_IN} \"$@\"\n");
    std::fs::write(&slow, script).unwrap();
    std::fs::set_permissions(&slow, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut config = lab.config(&[]);
    config.vmm.program = slow;
    let host = Host::open(config).unwrap();
    std::thread::scope(|scope| {
        let expecting = scope.spawn(|| host.expect_resume(sandbox.id(), LONG, soon()));
        let until = soon();
        while lab.processes().is_empty() {
            assert!(!until.has_passed());
            std::thread::sleep(Duration::from_millis(1));
        }
        host.destroy(sandbox.id(), soon()).unwrap();
        expecting.join().unwrap().unwrap();
    });
    assert!(!host.expects_resume(sandbox.id()));
    assert!(lab.processes().is_empty());
}

#[test]
fn root_whoever_looks_after_a_host_is_in_nobodys_way() {
    let test = "root_whoever_looks_after_a_host_is_in_nobodys_way";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let mut sandbox = paused(&host, &lab);
    let template = host.template("base").unwrap();
    let kept = format!("network slot {}", sandbox.slot().unwrap());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let other = lab.open();
                while !done.load(Ordering::Relaxed) {
                    let census = other.recover(soon()).unwrap();
                    assert!(census.is_clean(), "{census:?}");
                    assert!(!census.swept.contains(&kept), "{census:?}");
                }
            });
        }
        let ended = scope.spawn(|| {
            for _ in 0..20 {
                undisturbed(|| host.expect_resume(sandbox.id(), LONG, soon()));
                sandbox = undisturbed(|| host.resume(sandbox.id(), ResumeOptions::default()));
                undisturbed(|| sandbox.pause());
                let launched = host.launch(&template, LaunchOptions::default()).unwrap();
                undisturbed(|| launched.clone().destroy());
            }
        });
        let ended = ended.join();
        done.store(true, Ordering::Relaxed);
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    sandbox.destroy().unwrap();
    assert!(lab.processes().is_empty());
}

/// Whoever looks at a sandbox has it locked for a moment.
fn undisturbed<T>(mut act: impl FnMut() -> Result<T, Error>) -> T {
    let until = soon();
    loop {
        match act() {
            Err(error) if error.is_busy() && !until.has_passed() => {}
            other => return other.unwrap_or_else(|error| panic!("{}", chain(&error))),
        }
    }
}
