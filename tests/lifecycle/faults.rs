//! Every step of every operation fails: once, for good, and done but reported as failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rewake::fault::{Faults, Inject};
use rewake::host::{Error, Host, LaunchOptions, ResumeOptions};
use rewake::ids::{SandboxId, TemplateId};
use rewake::sandbox::state::State;
use rustix::io::Errno;

use super::lab::{Lab, Memory, chain, launch, memory_of, soon};

/// How a step fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Before anything was done, once.
    Once,
    /// The same, and every later step of that name.
    ForGood,
    /// It is done, but reported as failed.
    AnswerLost,
}

/// Fails the `target`-th step after it was armed.
struct Nth {
    how: Mutex<Option<(How, usize)>>,
    before: AtomicUsize,
    after: AtomicUsize,
    struck: Mutex<Option<String>>,
}

impl Nth {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            how: Mutex::new(None),
            before: AtomicUsize::new(0),
            after: AtomicUsize::new(0),
            struck: Mutex::new(None),
        })
    }

    fn arm(&self, how: How, target: usize) {
        self.before.store(0, Ordering::SeqCst);
        self.after.store(0, Ordering::SeqCst);
        *lock(&self.struck) = None;
        *lock(&self.how) = Some((how, target));
    }

    /// Ends it; the result is the step that failed, `None` where there were not so many.
    fn disarm(&self) -> Option<String> {
        *lock(&self.how) = None;
        lock(&self.struck).take()
    }

    fn judge(&self, step: &str, counter: &AtomicUsize, is_before: bool) -> Result<(), Errno> {
        let Some((how, target)) = *lock(&self.how) else {
            return Ok(());
        };
        if is_before != (how != How::AnswerLost) {
            return Ok(());
        }
        let number = counter.fetch_add(1, Ordering::SeqCst);
        let mut struck = lock(&self.struck);
        let again = how == How::ForGood && struck.as_deref() == Some(step);
        if number == target || again {
            struck.get_or_insert_with(|| step.to_owned());
            return Err(Errno::IO);
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inject for Nth {
    fn before(&self, step: &str) -> Result<(), Errno> {
        self.judge(step, &self.before, true)
    }

    fn after(&self, step: &str) -> Result<(), Errno> {
        self.judge(step, &self.after, false)
    }
}

/// One operation, tried with each of its steps failing.
struct Trial {
    lab: Lab,
    /// Nothing fails here.
    sound: Host,
    faulty: Host,
    nth: Arc<Nth>,
}

impl Trial {
    fn new(test: &str) -> Option<Self> {
        let lab = Lab::new(test)?;
        let nth = Nth::new();
        let injector: Arc<dyn Inject> = nth.clone();
        let faulty = lab.open_with(&[], Faults::inject(injector));
        let sound = lab.open();
        lab.template(&sound);
        Some(Self {
            lab,
            sound,
            faulty,
            nth,
        })
    }

    /// Runs `attempt` with every step failing in every way, and at last with none; it is told
    /// what fails and returns what is to be said of a success.
    fn each(&self, mut attempt: impl FnMut(&str)) -> usize {
        let mut tried = 0;
        for how in [How::Once, How::AnswerLost, How::ForGood] {
            for target in 0.. {
                self.nth.arm(how, target);
                attempt(&format!("{how:?} {target}"));
                let Some(step) = self.nth.disarm() else { break };
                tried += 1;
                assert!(target < 500, "{how:?} {step}: there is no end");
            }
        }
        tried
    }

    /// What failed so far.
    fn step(&self) -> String {
        let how = *lock(&self.nth.how);
        format!("{how:?} {:?}", lock(&self.nth.struck))
    }

    /// Lets everything succeed again, and says what failed and what came of it.
    fn case<T: std::fmt::Debug>(&self, name: &str, outcome: &Result<T, Error>) -> String {
        let step = self.step();
        lock(&self.nth.how).take();
        format!("{name} {step}: {:?}", outcome.as_ref().map_err(said))
    }

    fn recover(&self) {
        let census = self.sound.recover(soon()).unwrap();
        assert!(census.is_clean(), "{census:?}");
    }
}

/// An error says what is left, or that nothing is.
fn said(error: &Error) -> String {
    let left: Vec<_> = error.leftovers.iter().map(ToString::to_string).collect();
    format!("{}; left over: {left:?}", chain(error))
}

#[test]
fn root_a_launch_that_fails_anywhere_leaves_nothing() {
    let test = "root_a_launch_that_fails_anywhere_leaves_nothing";
    let Some(trial) = Trial::new(test) else {
        return;
    };
    let template = trial.sound.template("base").unwrap();
    let before = trial.lab.census();
    let tried = trial.each(|name| {
        let options = LaunchOptions::default();
        match trial.faulty.launch(&template, options) {
            // Some steps are not needed, a hint for one.
            Ok(sandbox) => {
                let id = sandbox.id().clone();
                let step = trial.step();
                lock(&trial.nth.how).take();
                memory_of(&trial.sound.sandbox(&id).unwrap());
                trial.sound.destroy(&id, soon()).unwrap();
                assert_eq!(trial.lab.census(), before, "{name} {step}");
            }
            Err(error) => {
                let step = trial.step();
                lock(&trial.nth.how).take();
                if !error.leftovers.is_empty() || trial.lab.census() != before {
                    assert!(
                        !error.leftovers.is_empty(),
                        "{name} {step}: {}",
                        said(&error)
                    );
                    trial.recover();
                }
                assert_eq!(
                    trial.lab.census(),
                    before,
                    "{name} {step}: {}",
                    said(&error)
                );
            }
        }
    });
    assert!(tried > 60, "only {tried} steps");
}

#[test]
fn root_a_pause_that_fails_anywhere_leaves_a_running_or_a_paused_sandbox() {
    let test = "root_a_pause_that_fails_anywhere_leaves_a_running_or_a_paused_sandbox";
    let Some(trial) = Trial::new(test) else {
        return;
    };
    let template = trial.sound.template("base").unwrap();
    // In its second life: its memory is a file of its own.
    let sandbox = launch(&trial.sound, &template);
    let mut memory = memory_of(&sandbox);
    let id = sandbox.id().clone();
    let tried = trial.each(|name| {
        let mut sandbox = trial.faulty.sandbox(&id).unwrap();
        let outcome = sandbox.pause();
        let case = trial.case(name, &outcome);
        trial.recover();
        memory = settle(&trial.sound, &id, &memory, &case);
    });
    assert!(tried > 20, "only {tried} steps");
    trial.sound.destroy(&id, soon()).unwrap();
}

#[test]
fn root_a_resume_that_fails_anywhere_leaves_a_paused_sandbox_or_says_it_is_lost() {
    let test = "root_a_resume_that_fails_anywhere_leaves_a_paused_sandbox_or_says_it_is_lost";
    let Some(trial) = Trial::new(test) else {
        return;
    };
    let template = trial.sound.template("base").unwrap();
    let mut sandbox = launch(&trial.sound, &template);
    let mut memory = memory_of(&sandbox);
    sandbox.pause().unwrap();
    let id = sandbox.id().clone();
    let tried = trial.each(|name| {
        let outcome = trial.faulty.resume(&id, ResumeOptions::default());
        let case = trial.case(name, &outcome);
        trial.recover();
        memory = settle(&trial.sound, &id, &memory, &case);
        trial.sound.sandbox(&id).unwrap().pause().unwrap();
    });
    assert!(tried > 10, "only {tried} steps");
    trial.sound.destroy(&id, soon()).unwrap();
}

#[test]
fn root_a_snapshot_that_fails_anywhere_leaves_a_running_sandbox_and_no_half_template() {
    let test = "root_a_snapshot_that_fails_anywhere_leaves_a_running_sandbox_and_no_half_template";
    let Some(trial) = Trial::new(test) else {
        return;
    };
    let template = trial.sound.template("base").unwrap();
    let sandbox = launch(&trial.sound, &template);
    let mut memory = memory_of(&sandbox);
    let id = sandbox.id().clone();
    let warm = TemplateId::new("warm").unwrap();
    let tried = trial.each(|name| {
        let mut sandbox = trial.faulty.sandbox(&id).unwrap();
        let outcome = trial
            .faulty
            .snapshot(&mut sandbox, &warm, soon(), &mut |_| {});
        let case = trial.case(name, &outcome);
        trial.recover();
        memory = settle(&trial.sound, &id, &memory, &case);
        // Whole or not there at all.
        if let Ok(made) = trial.sound.template("warm") {
            let third = launch(&trial.sound, &made);
            assert_eq!(memory_of(&third).nonce, memory.nonce, "{case}");
            third.destroy().unwrap();
            trial.sound.templates().remove(&warm, soon()).unwrap();
        }
    });
    assert!(tried > 20, "only {tried} steps");
    trial.sound.destroy(&id, soon()).unwrap();
}

#[test]
fn root_a_destroy_that_fails_anywhere_can_be_repeated() {
    let test = "root_a_destroy_that_fails_anywhere_can_be_repeated";
    let Some(trial) = Trial::new(test) else {
        return;
    };
    let template = trial.sound.template("base").unwrap();
    let before = trial.lab.census();
    let tried = trial.each(|name| {
        let id = SandboxId::random();
        let options = LaunchOptions {
            id: Some(id.clone()),
            ..LaunchOptions::default()
        };
        let how = lock(&trial.nth.how).take();
        trial.sound.launch(&template, options).unwrap();
        *lock(&trial.nth.how) = how;
        let outcome = trial.faulty.destroy(&id, soon());
        let case = trial.case(name, &outcome);
        if trial.lab.census() != before {
            let error = outcome.expect_err(&case);
            assert!(!error.leftovers.is_empty(), "{case}");
            trial.sound.destroy(&id, soon()).unwrap();
            trial.recover();
        }
        assert_eq!(trial.lab.census(), before, "{case}");
    });
    assert!(tried > 10, "only {tried} steps");
}

/// Whatever failed, the sandbox runs or is paused, and is the same guest.
fn settle(host: &Host, id: &SandboxId, memory: &Memory, case: &str) -> Memory {
    let mut sandbox = host.sandbox(id).unwrap();
    match sandbox.state().unwrap() {
        State::Running => {}
        State::Paused => {
            let resumed = host.resume(id, ResumeOptions::default());
            sandbox = resumed.unwrap_or_else(|error| panic!("{case}: then {}", said(&error)));
        }
        other => panic!("{case}: it is {other}"),
    }
    let now = memory_of(&sandbox);
    assert_eq!(now.nonce, memory.nonce, "{case}");
    now
}
