//! The restore sequence against the stand-in, with nothing but a loopback port: the good path,
//! and every phase broken in turn.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod kits;
mod memory;
mod stage;

use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::envd::init::Init;
use rewake::plan::MemoryMode;
use rewake::restore::{Cause, RestoreError, Stage, restore};
use rewake::snapshot::SnapshotError;
use rewake::timeline::Phase;
use stage::{Frozen, Scene};

/// How late a typed error may come after the death or the deadline that caused it, undoing
/// included.
const PROMPT: Duration = Duration::from_millis(100);
/// Tests run beside others: an error that comes too late is given this many chances in all.
const CHANCES: usize = 6;

#[test]
fn a_snapshot_goes_in_and_a_guest_that_remembers_comes_out() {
    let frozen = Frozen::make("remembers");
    for mode in [MemoryMode::Map, MemoryMode::OnDemand, MemoryMode::Copy] {
        let scene = Scene::of(&frozen, &[]);
        let mut spec = scene.spec();
        spec.inputs.memory_mode = mode.into();
        spec.init = Some(Init::new());
        let restored = restore(&spec, Deadline::after(Duration::from_secs(20))).unwrap();
        assert!(restored.is_stand_in(), "the stand-in must say what it is");
        assert_eq!(restored.memory_mode, mode);
        for phase in [
            Phase::SnapshotChecked,
            Phase::Planned,
            Phase::Spawned,
            Phase::Restoring,
            Phase::Restored,
            Phase::Resumed,
            Phase::ApiAccepted,
            Phase::FirstSynAnswered,
            Phase::FirstByte,
            Phase::Ready,
            Phase::InitDone,
            Phase::BalloonDone,
        ] {
            assert!(restored.timeline.at(phase).is_some(), "{mode:?}: {phase:?}");
        }
        assert!(restored.timeline.at(Phase::Restored) < restored.timeline.at(Phase::Ready));
        let state = scene.guest_state();
        assert_eq!(
            state["nonce"], frozen.state["nonce"],
            "{mode:?}: restored, not rebooted"
        );
        assert!(
            state["counter"].as_u64() > frozen.state["counter"].as_u64(),
            "{mode:?}"
        );
        assert_eq!(scene.processes(), 1, "one process for one restore");
        assert!(restored.destroy(Deadline::NEVER).is_empty());
        scene.assert_nothing_left();
    }
}

#[test]
fn a_vm_without_an_event_monitor_is_found_ready_all_the_same() {
    let frozen = Frozen::make("no-events");
    let scene = Scene::of(&frozen, &[]);
    let mut spec = scene.spec();
    spec.vmm.without_events = true;
    let restored = restore(&spec, Deadline::after(Duration::from_secs(20))).unwrap();
    assert!(restored.timeline.at(Phase::Ready).is_some());
    for unknown in [Phase::Restoring, Phase::Restored, Phase::Resumed] {
        assert_eq!(restored.timeline.at(unknown), None, "{unknown:?}");
    }
    assert!(restored.destroy(Deadline::NEVER).is_empty());
    scene.assert_nothing_left();
}

#[test]
fn dropping_a_restored_vm_destroys_it_and_handing_it_over_does_not() {
    let frozen = Frozen::make("drop");
    let scene = Scene::of(&frozen, &[]);
    drop(restore(&scene.spec(), Deadline::NEVER).unwrap());
    scene.assert_nothing_left();

    let (vmm, steps) = restore(&scene.spec(), Deadline::NEVER)
        .unwrap()
        .into_parts();
    assert!(!vmm.process().has_ended().unwrap());
    assert_eq!(scene.processes(), 1);
    let mut ledger = rewake::resource::ledger::Ledger::from(steps);
    assert!(ledger.unwind(Deadline::NEVER).is_empty());
    scene.assert_nothing_left();
}

/// What a broken phase must come to.
struct Broken {
    fault: &'static str,
    stage: Stage,
    expected: Expected,
}

enum Expected {
    /// CH ended by itself: noticed at once, whatever the deadline.
    Death,
    /// Nothing comes: noticed at the deadline.
    Timeout,
    /// CH answers with something that is refused.
    Refused,
}

/// The caller's deadline in the cases that wait for it.
const DEADLINE: Duration = Duration::from_millis(1500);

fn break_at(frozen: &Frozen, broken: &Broken) -> (RestoreError, Duration) {
    let scene = Scene::of(frozen, &[broken.fault]);
    let mut spec = scene.spec();
    spec.init = Some(Init::new());
    let deadline = match broken.expected {
        Expected::Timeout => Deadline::after(DEADLINE),
        Expected::Death | Expected::Refused => Deadline::after(Duration::from_secs(30)),
    };
    let begun = Instant::now();
    let Err(error) = restore(&spec, deadline) else {
        panic!("{}: it must not succeed", broken.fault);
    };
    let took = begun.elapsed();
    assert!(
        error.leftovers.is_empty(),
        "{}: {:?}",
        broken.fault,
        error.leftovers
    );
    scene.assert_nothing_left();
    (error, took)
}

#[test]
fn every_broken_phase_is_a_typed_error_in_time_with_nothing_left_behind() {
    use Expected::{Death, Refused, Timeout};
    let frozen = Frozen::make("broken");
    let broken = |fault, stage, expected| Broken {
        fault,
        stage,
        expected,
    };
    for case in [
        broken("start:die", Stage::Restore, Death),
        broken("start:exit=1", Stage::Restore, Death),
        broken("before-api:die", Stage::Restore, Death),
        broken("before-api:exit", Stage::Restore, Death),
        broken("before-api:hang", Stage::Restore, Timeout),
        broken("on-restore:die", Stage::Restore, Death),
        broken("on-restore:exit", Stage::Restore, Death),
        broken("on-restore:hang", Stage::Restore, Timeout),
        broken("on-restore:garbage", Stage::Restore, Refused),
        broken("on-restore:truncated", Stage::Restore, Refused),
        broken("on-restore:drop", Stage::Restore, Refused),
        broken("on-restore:error", Stage::Restore, Refused),
        broken("on-restore:late=60000", Stage::Restore, Timeout),
        broken("after-restored:die", Stage::Restore, Death),
        broken("after-restored:hang", Stage::Restore, Timeout),
        broken("on-ping:die", Stage::Resume, Death),
        broken("on-ping:hang", Stage::Resume, Timeout),
        broken("on-ping:garbage", Stage::Resume, Refused),
        broken("guest:never", Stage::Ready, Timeout),
        broken("guest:silent", Stage::Ready, Timeout),
        broken("guest:endless-body", Stage::Ready, Timeout),
        broken("guest:reset-mid-body", Stage::Ready, Timeout),
        broken("guest:garbage", Stage::Ready, Timeout),
    ] {
        let limit = match case.expected {
            Timeout => DEADLINE + PROMPT,
            // From the start: a stand-in is up within milliseconds, and its death is prompt.
            Death | Refused => Duration::from_millis(500) + PROMPT,
        };
        let mut attempts = (0..CHANCES).map(|_| break_at(&frozen, &case));
        let (mut error, mut took) = attempts.next().expect("a first attempt");
        while took > limit {
            let Some(again) = attempts.next() else { break };
            (error, took) = again;
        }
        let told = format!("{}: {error}: {:?}", case.fault, error.cause);
        assert_eq!(error.stage, case.stage, "{told}");
        match case.expected {
            Death => {
                assert!(error.is_vmm_death(), "{told}");
                assert!(took <= limit, "{told}: {took:?} is too late");
            }
            Timeout => {
                assert!(error.is_timeout(), "{told}");
                assert!(took >= DEADLINE, "{told}: {took:?} is too early");
                assert!(took <= limit, "{told}: {took:?} is too late");
            }
            Refused => {
                assert!(!error.is_timeout() && !error.is_vmm_death(), "{told}");
                assert!(matches!(*error.cause, Cause::Api(_)), "{told}");
            }
        }
    }
}

/// Kills the VMM while its guest is awaited; the time from the kill to the error.
fn kill_while_awaited(frozen: &Frozen) -> Duration {
    let scene = Scene::of(frozen, &["guest:never"]);
    let spec = scene.spec();
    let killer = std::thread::spawn({
        let scene = scene.clone();
        move || {
            let pid = scene.await_process();
            std::thread::sleep(Duration::from_millis(300));
            let process = rewake_sys::process::Process::open(pid).unwrap();
            process.kill().unwrap();
            Instant::now()
        }
    });
    let Err(error) = restore(&spec, Deadline::after(Duration::from_secs(30))) else {
        panic!("its VMM was killed");
    };
    let ended = Instant::now();
    let killed = killer.join().unwrap();
    assert!(error.is_vmm_death(), "{error:?}");
    assert!(error.to_string().contains("wait for envd"), "{error}");
    scene.assert_nothing_left();
    ended.saturating_duration_since(killed)
}

#[test]
fn a_death_is_noticed_at_once_while_the_agent_is_awaited() {
    let frozen = Frozen::make("death");
    let late = (0..CHANCES).map(|_| kill_while_awaited(&frozen));
    let best = late.take_while(|late| *late > PROMPT).count();
    assert!(best < CHANCES, "never within {PROMPT:?}");
}

#[test]
fn a_flooded_log_neither_blocks_nor_fills_memory_and_errors_quote_its_end() {
    let frozen = Frozen::make("flood");
    let scene = Scene::of(&frozen, &["on-restore:flood=8000000"]);
    let restored = restore(&scene.spec(), Deadline::after(Duration::from_secs(20))).unwrap();
    assert!(restored.vmm.log.seen_bytes() > 100_000);
    assert!(restored.vmm.log.tail().len() <= rewake::vmm::log::KEPT_BYTES);
    assert!(restored.destroy(Deadline::NEVER).is_empty());

    let scene = Scene::of(&frozen, &["on-restore:flood=1000000", "after-restored:die"]);
    let Err(error) = restore(&scene.spec(), Deadline::after(Duration::from_secs(20))) else {
        panic!("it died");
    };
    assert!(
        !error.log.is_empty() && error.log.len() <= 5,
        "{:?}",
        error.log
    );
    scene.assert_nothing_left();
}

#[test]
fn a_balloon_that_cannot_be_deflated_is_a_warning() {
    let frozen = Frozen::make("balloon");
    for fault in ["on-resize:error", "on-resize:hang", "on-resize:garbage"] {
        let scene = Scene::of(&frozen, &[fault]);
        let restored = restore(&scene.spec(), Deadline::after(Duration::from_secs(20)));
        let restored = restored.unwrap_or_else(|error| panic!("{fault}: {error:?}"));
        assert_eq!(restored.timeline.at(Phase::BalloonDone), None, "{fault}");
        let notes = restored.timeline.notes();
        let about = notes.iter().filter(|note| note.contains("balloon"));
        assert_eq!(about.count(), 1, "{fault}: {notes:?}");
        assert!(restored.destroy(Deadline::NEVER).is_empty(), "{fault}");
    }
}

#[test]
fn versions_that_know_neither_resume_nor_on_demand_are_resumed_and_told_apart() {
    let frozen = Frozen::make("versions");
    for version in ["50", "51", "52", "53"] {
        let scene = Scene::with_args(&frozen, &["--sim".into(), format!("version={version}")]);
        let mut spec = scene.spec();
        spec.inputs.memory_mode = MemoryMode::OnDemand.into();
        let restored = restore(&spec, Deadline::after(Duration::from_secs(20)));
        let restored = restored.unwrap_or_else(|error| panic!("v{version}: {error:?}"));
        assert_eq!(restored.version.major.to_string(), version);
        let old = restored.version.major < 52;
        let expected = if old {
            MemoryMode::Copy
        } else {
            MemoryMode::OnDemand
        };
        assert_eq!(restored.memory_mode, expected, "v{version}");
        assert_eq!(
            restored.timeline.notes().len(),
            usize::from(old),
            "v{version}"
        );
        assert!(restored.destroy(Deadline::NEVER).is_empty());
    }
}

#[test]
fn a_snapshot_that_is_refused_starts_no_process() {
    let frozen = Frozen::make("refused");
    let memory = frozen.dir.join("snapshot/memory-ranges");
    let file = std::fs::File::options().write(true).open(&memory).unwrap();
    file.set_len(4096).unwrap();
    let scene = Scene::of(&frozen, &[]);
    let Err(error) = restore(&scene.spec(), Deadline::NEVER) else {
        panic!("the memory file is cut");
    };
    assert_eq!(error.stage, Stage::Check);
    assert!(
        matches!(
            *error.cause,
            Cause::Snapshot(SnapshotError::MemorySize { .. })
        ),
        "{error:?}"
    );
    scene.assert_nothing_left();
}
