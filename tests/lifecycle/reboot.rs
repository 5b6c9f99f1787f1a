//! The machine goes down, and a host is opened on what is left on the disk.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use rewake::fault::Faults;
use rewake::host::{Host, PauseOptions, ResumeOptions, Sandbox};
use rewake::ids::SandboxId;
use rewake::resource::ledger::{Step, StepLog};
use rewake::sandbox::journal::Journal;
use rewake::sandbox::state::{State, Status};
use rewake::snapshot::Durability;
use rewake::template::Template;

use super::lab::{Lab, Memory, chain, disk_of, launch, memory_of, read_disk, write_disk};

/// Writes one more line into the journal of a sandbox, as its maker would have done before the
/// power went.
fn note(lab: &Lab, sandbox: &Sandbox, edit: impl FnOnce(Status) -> Status) {
    let path = lab.sandbox(sandbox.id()).join("journal");
    let journal = Journal::open(&path, Faults::NONE).unwrap();
    journal.change(edit(journal.status())).unwrap();
}

fn paused(host: &Host, template: &Template, durability: Durability) -> (Sandbox, Memory) {
    let mut sandbox = launch(host, template);
    let memory = memory_of(&sandbox);
    write_disk(&disk_of(&sandbox), 4096, 5);
    let options = PauseOptions {
        durability: Some(durability),
        ..PauseOptions::default()
    };
    sandbox
        .pause_with(options)
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    (sandbox, memory)
}

fn resuming(status: &Status) -> Status {
    let mut next = status.now(State::Resuming);
    next.generation += 1;
    next
}

/// A process that a journal names by chance: pid and start time are those of a process of ours
/// before the restart.
struct Stranger(Child);

impl Stranger {
    fn new() -> Self {
        let child = Command::new("sleep")
            .arg("3000")
            .stdin(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }

    fn step(&self) -> Step {
        let pid = self.0.id();
        let start_time = rewake_sys::process::start_time(pid).unwrap();
        Step::Process { pid, start_time }
    }

    fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// All sandboxes of the test, by what they were when the machine went down.
struct Fleet {
    safe: (Sandbox, Memory),
    warm: Sandbox,
    waking: (Sandbox, Memory),
    warm_waking: Sandbox,
    used: Sandbox,
    running: Sandbox,
    freezing: Sandbox,
    going: Sandbox,
}

impl Fleet {
    fn new(lab: &Lab, host: &Host, template: &Template, strangers: &[Stranger]) -> Self {
        let synced = || paused(host, template, Durability::Synced);
        let fleet = Self {
            safe: synced(),
            warm: synced().0,
            waking: synced(),
            warm_waking: synced().0,
            used: synced().0,
            running: launch(host, template),
            freezing: launch(host, template),
            going: launch(host, template),
        };
        // In the page cache only.
        note(lab, &fleet.warm, |status| status.paused(false));
        // A resume was on its way: before and after the snapshot was marked as consumed.
        note(lab, &fleet.waking.0, |status| resuming(&status));
        note(lab, &fleet.warm_waking, |status| {
            resuming(&status.paused(false))
        });
        note(lab, &fleet.used, |status| Status {
            consumed: true,
            proof: Some(Vec::new()),
            ..resuming(&status)
        });
        // The snapshot has its name and does not count yet: after a loss of power nobody knows
        // how much of it is there.
        let generation = fleet.safe.0.story().unwrap().status.generation;
        let name = format!("snapshot.{generation}");
        copy_dir(
            &lab.sandbox(fleet.safe.0.id()).join(&name),
            &lab.sandbox(fleet.freezing.id()).join(&name),
        );
        note(lab, &fleet.freezing, |status| status.now(State::Pausing));
        note(lab, &fleet.going, |status| status.now(State::Destroying));
        // Disks of which not all had reached the host's disk.
        for id in [fleet.running.id(), fleet.going.id()] {
            let record = lab.sandbox(id).join(format!("disk/{id}.json"));
            assert!(record.exists());
            std::fs::write(record, "").unwrap();
        }
        let named = [fleet.running.id(), fleet.going.id(), fleet.safe.0.id()];
        for (id, stranger) in named.into_iter().zip(strangers) {
            let path = lab.sandbox(id).join("journal");
            let journal = Journal::open(&path, Faults::NONE).unwrap();
            journal.made(&stranger.step()).unwrap();
        }
        fleet
    }
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn root_after_a_restart_of_the_machine_nothing_is_taken_for_what_it_is_not() {
    let test = "root_after_a_restart_of_the_machine_nothing_is_taken_for_what_it_is_not";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let template = lab.template(&host);
    let before = lab.census();
    let mut strangers = [Stranger::new(), Stranger::new(), Stranger::new()];
    let fleet = Fleet::new(&lab, &host, &template, &strangers);
    drop(host);
    lab.restart();

    let host = lab.open();
    for stranger in &mut strangers {
        assert!(stranger.is_alive(), "a stranger was killed");
    }
    let lost = |sandbox: &Sandbox, why: &str| {
        let id: &SandboxId = sandbox.id();
        let found = host.sandbox(id).unwrap();
        assert_eq!(found.state().unwrap(), State::Lost, "{why}");
        let error = host.resume(id, ResumeOptions::default()).unwrap_err();
        assert!(chain(&error).contains(why), "{}", chain(&error));
    };
    let too_early = "before its memory was on the disk";
    lost(&fleet.warm, too_early);
    lost(&fleet.warm_waking, too_early);
    lost(&fleet.used, "after its memory had been used");
    lost(&fleet.running, "has ended");
    lost(&fleet.freezing, "has ended");
    assert!(host.sandbox(fleet.going.id()).unwrap_err().is_unknown());
    for (sandbox, memory) in [&fleet.safe, &fleet.waking] {
        let resumed = host
            .resume(sandbox.id(), ResumeOptions::default())
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(resumed.host_ip(), sandbox.host_ip());
        memory.goes_on_in(&memory_of(&resumed));
        assert_eq!(read_disk(&disk_of(&resumed), 4096), 5);
    }
    for sandbox in host.sandboxes().unwrap() {
        sandbox.destroy().unwrap();
    }
    for stranger in &mut strangers {
        assert!(stranger.is_alive(), "a stranger was killed");
    }
    assert_eq!(lab.census(), before);
}
