//! The memory preload carried out against a scripted agent: who is asked what, and when a
//! snapshot is refused.

#![allow(clippy::unwrap_used, reason = "a test fails where it fails")]

mod fake_envd;

use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fake_envd::{ALL_PAGES, Act, Asked, FakeEnvd};
use rewake::deadline::Deadline;
use rewake::envd::client::{Client, ClientOptions, Incarnation};
use rewake::envd::init::Init;
use rewake::envd::materialise::{MaterialiseError, materialise, verdict_before_snapshot};
use rewake::envd::preload::{Cause, Limits, Preload, State};
use rewake::envd::watch::Interrupt;
use rewake::ids::SandboxId;
use rewake::units::Bytes;

const INIT: &str = "POST /init";
const ASK: &str = "GET /memory/preload";
const START: &str = "POST /memory/preload";
const RAM: Bytes = Bytes::gib(1);

/// Fast enough for tests; the proportions are those of a real walk.
fn limits() -> Limits {
    Limits {
        stall: Duration::from_millis(150),
        total: Duration::from_secs(3),
        first_poll: Duration::from_millis(2),
        slowest_poll: Duration::from_millis(10),
        ..Limits::of(RAM)
    }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

struct Vm {
    guest: FakeEnvd,
    client: Client,
    init: Init,
    preload: Preload,
}

impl Vm {
    /// Restored a moment ago; nothing was sent yet.
    fn restored(scripts: &[(&str, &[Act])]) -> Self {
        Self::with(scripts, ClientOptions::default())
    }

    fn with(scripts: &[(&str, &[Act])], options: ClientOptions) -> Self {
        let guest = FakeEnvd::start(scripts);
        let init = Init::new();
        let incarnation = Incarnation {
            sandbox: SandboxId::random(),
            lifecycle: init.lifecycle,
        };
        Self {
            client: Client::new(guest.address, incarnation, options),
            guest,
            init,
            preload: Preload::restored(RAM, limits()),
        }
    }

    /// Restored, and `/init` acknowledged.
    fn armed(scripts: &[(&str, &[Act])]) -> Self {
        let mut vm = Self::restored(scripts);
        vm.preload.init_acknowledged(vm.init.lifecycle);
        vm
    }

    /// Everything a host does after a restore.
    fn materialise(&mut self) -> Result<(), MaterialiseError> {
        materialise(
            &mut self.preload,
            &mut self.client,
            Some(&self.init),
            soon(),
        )
    }

    fn verdict(&mut self) -> Result<(), MaterialiseError> {
        verdict_before_snapshot(&mut self.preload, &mut self.client, soon())
    }
}

fn cause(error: &MaterialiseError) -> &Cause {
    match error {
        MaterialiseError::NotSafe { cause, .. } => cause.as_ref().unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn init_comes_first_then_the_question_then_the_start() {
    let mut vm = Vm::restored(&[
        (INIT, &[Act::no_content()]),
        (
            ASK,
            &[
                Act::walk("idle", 0),
                Act::walk("running", 9),
                Act::walk("done", ALL_PAGES),
            ],
        ),
        (START, &[Act::walk("running", 0)]),
    ]);
    vm.materialise().unwrap();
    assert_eq!(vm.preload.state(), State::Materialised);
    assert_eq!(vm.guest.lines(), [INIT, ASK, START, ASK, ASK]);
}

#[test]
fn a_failed_init_keeps_the_stale_done_out_of_sight() {
    let mut vm = Vm::restored(&[
        (INIT, &[Act::status("401 Unauthorized")]),
        (ASK, &[Act::walk("done", ALL_PAGES)]),
    ]);
    let error = vm.materialise().unwrap_err();
    assert!(matches!(error, MaterialiseError::Init(_)), "{error:?}");
    assert_eq!(vm.preload.state(), State::NeedInit);
    let error = vm.verdict().unwrap_err();
    let state = State::NeedInit;
    assert!(matches!(error, MaterialiseError::NotSafe { state: s, .. } if s == state));
    assert_eq!(vm.guest.lines(), [INIT], "the guest was not asked");
}

#[test]
fn a_cold_boot_is_asked_nothing() {
    let mut vm = Vm::restored(&[]);
    vm.preload = Preload::cold_boot();
    vm.verdict().unwrap();
    assert!(vm.guest.asked().is_empty());
}

#[test]
fn the_verdict_asks_the_guest_and_starts_only_what_is_idle() {
    let done = || Act::walk("done", ALL_PAGES);
    let running = || Act::walk("running", 1);
    for (name, answers, posts) in [
        ("done", vec![done()], 0),
        ("running", vec![running(), done()], 0),
        ("idle", vec![Act::walk("idle", 0), running(), done()], 1),
    ] {
        let mut vm = Vm::armed(&[(ASK, &answers), (START, &[running()])]);
        vm.verdict().unwrap();
        assert_eq!(vm.guest.asked_of(START).len(), posts, "{name}");
    }
    for state in ["failed", "cancelled"] {
        let mut vm = Vm::armed(&[(ASK, &[Act::walk(state, 5)])]);
        let error = vm.verdict().unwrap_err();
        assert!(matches!(
            error,
            MaterialiseError::NotSafe {
                state: State::Spoiled,
                ..
            }
        ));
        assert_eq!(vm.guest.lines(), [ASK], "{state}");
    }
}

#[test]
fn done_is_asked_for_again_before_every_snapshot() {
    let mut vm = Vm::armed(&[
        (
            ASK,
            &[
                Act::walk("running", 1),
                Act::walk("done", ALL_PAGES),
                // Somebody else gave the guest a new life in between.
                Act::walk("idle", 0),
                Act::walk("done", ALL_PAGES),
            ],
        ),
        (START, &[Act::walk("running", 1)]),
    ]);
    vm.materialise().unwrap();
    vm.verdict().unwrap();
    assert_eq!(vm.guest.lines(), [ASK, ASK, ASK, START, ASK]);
}

#[test]
fn a_verdict_ends_with_the_callers_deadline() {
    let mut vm = Vm::armed(&[(
        ASK,
        &[Act::walk("running", 1).after(Duration::from_millis(1))],
    )]);
    let long = Limits {
        stall: Duration::from_secs(60),
        ..limits()
    };
    vm.preload = Preload::adopted(RAM, long, vm.init.lifecycle);
    let begun = Instant::now();
    let deadline = Deadline::after(Duration::from_millis(200));
    let error = verdict_before_snapshot(&mut vm.preload, &mut vm.client, deadline).unwrap_err();
    assert!(
        matches!(error, MaterialiseError::Deadline { .. }),
        "{error:?}"
    );
    assert!(begun.elapsed() < Duration::from_millis(300));
    assert_eq!(vm.preload.state(), State::Running, "the walk goes on");
}

#[test]
fn a_walk_that_flaps_to_idle_is_started_again_within_reason() {
    let mut flapping = vec![Act::walk("idle", 0); 4];
    flapping.push(Act::walk("done", ALL_PAGES));
    let mut vm = Vm::armed(&[(ASK, &flapping), (START, &[Act::walk("running", 1)])]);
    vm.materialise().unwrap();
    assert_eq!(vm.guest.asked_of(START).len(), 4);

    let scripts: &[(&str, &[Act])] = &[
        (ASK, &[Act::walk("idle", 0)]),
        (START, &[Act::walk("running", 1)]),
    ];
    let mut vm = Vm::armed(scripts);
    let error = vm.materialise().unwrap_err();
    assert!(matches!(cause(&error), Cause::Forgetful(_)), "{error:?}");
    assert_eq!(vm.preload.state(), State::Lost);
}

#[test]
fn a_counter_that_stands_still_is_a_loss() {
    let mut vm = Vm::armed(&[(ASK, &[Act::walk("running", 7)])]);
    let begun = Instant::now();
    let error = vm.materialise().unwrap_err();
    assert!(
        matches!(cause(&error), Cause::Stalled { pages: 7, .. }),
        "{error:?}"
    );
    assert!(begun.elapsed() >= limits().stall);
    assert!(begun.elapsed() < limits().stall + Duration::from_millis(150));
}

#[test]
fn a_spoiled_life_is_replaced_once_by_a_new_one() {
    for bad in ["failed", "cancelled"] {
        let mut vm = Vm::restored(&[
            (INIT, &[Act::no_content()]),
            (
                ASK,
                &[
                    Act::walk("idle", 0),
                    Act::walk(bad, 3),
                    Act::walk("done", ALL_PAGES),
                ],
            ),
            (START, &[Act::walk("running", 1)]),
        ]);
        vm.materialise().unwrap();
        let lives: Vec<_> = vm.guest.asked_of(INIT).iter().map(Asked::json).collect();
        assert_eq!(lives.len(), 2, "{bad}");
        assert_ne!(lives[0]["lifecycle_id"], lives[1]["lifecycle_id"], "{bad}");
        let now = vm.client.incarnation().lifecycle;
        assert_eq!(
            lives[1]["lifecycle_id"],
            now.to_string(),
            "the client follows"
        );
    }
    let mut vm = Vm::restored(&[
        (INIT, &[Act::no_content()]),
        (ASK, &[Act::walk("failed", 3)]),
        (START, &[Act::walk("failed", 3)]),
    ]);
    let error = vm.materialise().unwrap_err();
    assert!(matches!(cause(&error), Cause::Failed(_)), "{error:?}");
    assert_eq!(vm.guest.lines(), [INIT, ASK, INIT, START]);
}

#[test]
fn an_instant_done_must_bring_its_bytes() {
    for (name, answer) in [
        ("too few", Act::walk("done", ALL_PAGES / 3)),
        ("none named", Act::json(r#"{"state":"done"}"#)),
    ] {
        let mut vm = Vm::armed(&[
            (INIT, &[Act::no_content()]),
            (ASK, std::slice::from_ref(&answer)),
            (START, std::slice::from_ref(&answer)),
        ]);
        let error = vm.materialise().unwrap_err();
        assert!(
            matches!(cause(&error), Cause::Implausible { .. }),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn a_busy_guest_is_asked_again() {
    let mut vm = Vm::armed(&[(
        ASK,
        &[
            Act::walk("running", 1),
            Act::Close,
            Act::SendAndReset(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{".to_vec()),
            Act::status("503 Service Unavailable"),
            Act::status("504 Gateway Timeout"),
            Act::walk("done", ALL_PAGES),
        ],
    )]);
    vm.materialise().unwrap();
    assert_eq!(vm.guest.asked().len(), 6);
}

#[test]
fn an_agent_without_preload_is_known_at_once_and_never_started() {
    for status in ["404 Not Found", "415 Unsupported Media Type"] {
        let mut vm = Vm::armed(&[(ASK, &[Act::status(status)])]);
        let error = vm.materialise().unwrap_err();
        assert!(matches!(cause(&error), Cause::NoPreload(_)), "{error:?}");
        assert_eq!(vm.preload.state(), State::Unsupported);
        assert_eq!(vm.guest.lines(), [ASK]);
    }
}

#[test]
fn what_cannot_be_understood_is_not_guessed() {
    for (name, act) in [
        ("unknown state", Act::json(r#"{"state":"finished"}"#)),
        ("no JSON", Act::json("done")),
        ("no state", Act::json("{}")),
        (
            "too deep",
            Act::json(&format!(
                r#"{{"state":"done","x":{}1{}}}"#,
                "[".repeat(9),
                "]".repeat(9)
            )),
        ),
        ("no HTTP", Act::Send(b"done\r\n\r\n".to_vec())),
        ("endless", Act::Endless(b"HTTP/1.1 200 OK\r\n\r\n".to_vec())),
    ] {
        let mut vm = Vm::armed(&[(ASK, &[act])]);
        let error = vm.materialise().unwrap_err();
        assert_eq!(cause(&error), &Cause::Garbled, "{name}");
        assert_eq!(vm.preload.state(), State::Lost, "{name}");
    }
    let mut vm = Vm::armed(&[(ASK, &[Act::status("401 Unauthorized")])]);
    assert_eq!(cause(&vm.materialise().unwrap_err()), &Cause::Refused(401));
}

struct Process(Child);

impl Process {
    fn start() -> Self {
        Self(Command::new("sleep").arg("60").spawn().unwrap())
    }
    fn pidfd(&self) -> std::os::fd::OwnedFd {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_death_of_the_vmm_ends_the_wait_at_once() {
    for (name, act) in [
        ("between polls", Act::walk("running", 1)),
        ("in mid-exchange", Act::Silence),
    ] {
        let vmm = Process::start();
        let options = ClientOptions {
            vmm: Some(Arc::new(vmm.pidfd())),
            ..ClientOptions::default()
        };
        let mut vm = Vm::with(&[(ASK, &[act])], options);
        let slow = Limits {
            first_poll: Duration::from_secs(10),
            ..limits()
        };
        vm.preload = Preload::adopted(RAM, slow, vm.init.lifecycle);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(60));
            drop(vmm);
            Instant::now()
        });
        let error = vm.materialise().unwrap_err();
        let ended = Instant::now();
        let died = killer.join().unwrap();
        let interrupted = matches!(error, MaterialiseError::Interrupted(Interrupt::VmmExited));
        assert!(interrupted, "{name}: {error:?}");
        assert_eq!(vm.preload.state(), State::Lost, "{name}");
        let late = ended.saturating_duration_since(died);
        assert!(late < Duration::from_millis(100), "{name}: {late:?}");
    }
}
