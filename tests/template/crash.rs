//! Processes that die in the middle of making, building or removing a template.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rewake::fault::{Faults, Inject};
use rewake::template::{HostFacts, TemplateStore};
use rustix::io::Errno;

use super::build::Yard;
use super::place::{Root, chain, make, name, soon};

const STEP: &str = "REWAKE_TEST_CRASH_STEP";
const ROOT: &str = "REWAKE_TEST_CRASH_ROOT";
const WORK: &str = "REWAKE_TEST_CRASH_WORK";
/// What the child ends with when it came to the end.
const DONE: i32 = 42;

/// Ends the process without any clean-up once so many steps are done.
struct Crash(AtomicUsize);

impl Inject for Crash {
    fn before(&self, _: &str) -> Result<(), Errno> {
        Ok(())
    }
    fn after(&self, _: &str) -> Result<(), Errno> {
        if self.0.fetch_sub(1, Ordering::SeqCst) == 0 {
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
        }
        Ok(())
    }
}

/// Not a test of its own: what the processes run that are made to die.
#[test]
fn child_that_works_on_templates() {
    let Ok(step) = std::env::var(STEP) else {
        return;
    };
    let read = |name| std::env::var(name).unwrap();
    let crash = Crash(AtomicUsize::new(step.parse().unwrap()));
    let faults = Faults::inject(Arc::new(crash));
    let store = || TemplateStore::open(Path::new(&read(ROOT)), faults.clone()).unwrap();
    match read(WORK).as_str() {
        "make" => make(&store(), &name("python")).unwrap(),
        "remove" => store().remove(&name("python"), soon()).unwrap(),
        guest => {
            let root = Root::existing(read(ROOT).into());
            let yard = Yard::over(root, guest.parse().unwrap(), faults);
            yard.build(&yard.spec(&[])).unwrap();
            // The root belongs to the parent.
            std::mem::forget(yard);
        }
    }
    std::process::exit(DONE);
}

fn run_child(root: &Root, work: &str, step: usize) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::child_that_works_on_templates"])
        .env(STEP, step.to_string())
        .env(ROOT, root.path())
        .env(WORK, work)
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap()
}

#[test]
fn a_crash_at_any_step_leaves_the_whole_template_or_none() {
    let root = Root::new("crash");
    let store = root.store(Faults::NONE);
    let id = name("python");
    for work in ["make", "remove"] {
        let mut outcomes = [0, 0];
        for step in 0.. {
            if work == "remove" {
                make(&store, &id).unwrap();
            }
            let status = run_child(&root, work, step);
            let crashed = status.signal().is_some();
            assert!(crashed || status.code() == Some(DONE), "{step}: {status}");
            let case = format!("{work}, died after step {step}");
            store.sweep().unwrap();
            match store.get(&id) {
                Ok(template) => {
                    template.check(&HostFacts::default()).expect(&case);
                    assert_eq!(root.names(), ["python"], "{case}");
                    store.remove(&id, soon()).expect(&case);
                    outcomes[1] += 1;
                }
                Err(error) => {
                    assert!(error.is_missing(), "{case}: {}", chain(&error));
                    assert!(root.names().is_empty(), "{case}: {:?}", root.names());
                    outcomes[0] += 1;
                }
            }
            if !crashed {
                assert!(step > 5, "the shim sees every step");
                break;
            }
        }
        assert!(
            outcomes.iter().all(|count| *count > 0),
            "{work}: {outcomes:?}"
        );
    }
}

#[test]
fn a_build_whose_maker_dies_at_any_step_is_cleared_by_a_sweep() {
    let yard = Yard::new("crash-build", Faults::NONE);
    let mut built = 0;
    for step in 0.. {
        let status = run_child(&yard.root, &yard.guest.to_string(), step);
        let crashed = status.signal().is_some();
        assert!(crashed || status.code() == Some(DONE), "{step}: {status}");
        let case = format!("died after step {step}");
        let swept = yard.store.sweep().unwrap();
        assert!(
            swept.iter().all(|it| it.leftovers.is_empty()),
            "{case}: {swept:?}"
        );
        match yard.store.get(&name("python")) {
            Ok(template) => {
                template.check(&HostFacts::default()).expect(&case);
                yard.assert_nothing_left(&["python"], &case);
                yard.store.remove(template.id(), soon()).expect(&case);
                built += 1;
            }
            Err(error) => {
                assert!(error.is_missing(), "{case}: {}", chain(&error));
                yard.assert_nothing_left(&[], &case);
            }
        }
        if !crashed {
            assert!(step > 40, "the shim sees every step, not {step}");
            break;
        }
    }
    assert!(built > 0);
}
