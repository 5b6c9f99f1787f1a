//! The same under real Cloud Hypervisor with the probe guest: not one byte lost.

use rewake::host::{Host, HostConfig, LaunchOptions, ResumeOptions, Sandbox};
use rewake::ids::TemplateId;
use rewake::plan::MemoryMode;
use rewake::probe_guest;
use rewake::resource::disk::DiskMode;
use rewake::template::{BuildSpec, Template};
use rewake::units::Bytes;
use rewake::vmm::launch::LaunchSpec;
use rewake::wire::http::Method;
use serde_json::Value;

use super::lab::{Lab, chain, soon};
use crate::netlab::skip;
use crate::real_vmm::RealVmm;

/// Pages that the guest fills with a pattern at boot.
const PAGES: u64 = 256;
/// Rounds of pause and resume; more with this variable.
const ROUNDS: u64 = 17;
const ROUNDS_VARIABLE: &str = "REWAKE_ROUNDS";
/// The first page of RAM that rounds write to, in the middle of nowhere.
const FREE_PAGE: u64 = 8192;

/// Real Cloud Hypervisor, or said aloud why not.
pub(super) fn real(lab: &Lab, test: &str) -> Option<LaunchSpec> {
    match RealVmm::find(&lab.net.dir) {
        Ok(vmm) => Some(LaunchSpec {
            env: vec![vmm.variable()],
            program: vmm.program,
            ..LaunchSpec::default()
        }),
        Err(reason) => {
            skip(test, reason);
            None
        }
    }
}

pub(super) fn config(lab: &Lab, vmm: &LaunchSpec) -> HostConfig {
    let mut config = lab.config(&[]);
    config.vmm = vmm.clone();
    config.disk_mode = DiskMode::Auto;
    config
}

pub(super) fn template(lab: &Lab, host: &Host) -> Template {
    let (kernel, image) = (lab.net.dir.join("guest"), lab.net.dir.join("image.raw"));
    probe_guest::write_to(&kernel).unwrap();
    std::fs::write(&image, vec![5; 1 << 20]).unwrap();
    let name = TemplateId::new("probe").unwrap();
    let spec = BuildSpec {
        command_line: format!("fill={PAGES} touch=0"),
        rootfs: Some(image),
        memory: Bytes::mib(64),
        runtime_dir: host.config().runtime_dir.clone(),
        ..BuildSpec::new(name, kernel, host.config().vmm.clone())
    };
    host.build(&spec, &mut |_| {}, soon())
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn get(sandbox: &Sandbox, target: &str) -> Value {
    let answer = sandbox.agent().unwrap().get_other(target, soon()).unwrap();
    assert_eq!(answer.status, 200, "{target}");
    serde_json::from_slice(&answer.body).unwrap()
}

/// What the guest remembers, with all that it has ever been given checked.
pub(super) struct Ledger {
    nonce: String,
    counter: u64,
    /// What each round wrote, by its first page.
    written: Vec<(u64, u64)>,
}

impl Ledger {
    pub(super) fn open(sandbox: &Sandbox) -> Self {
        let probe = get(sandbox, "/probe");
        Self {
            nonce: probe["nonce"].as_str().unwrap().to_owned(),
            counter: probe["counter"].as_u64().unwrap(),
            written: Vec::new(),
        }
    }

    pub(super) fn check(&mut self, sandbox: &Sandbox, case: &str) {
        let probe = get(sandbox, "/probe");
        assert_eq!(probe["nonce"], self.nonce, "{case}");
        let counter = probe["counter"].as_u64().unwrap();
        assert!(counter > self.counter, "{case}");
        self.counter = counter;
        let nonce = u64::from_str_radix(&self.nonce, 16).unwrap();
        let expected = probe_guest::expected_checksum(nonce, PAGES);
        let sum = get(sandbox, &format!("/probe/checksum?pages={PAGES}"));
        assert_eq!(sum["checksum"], format!("{expected:016x}"), "{case}");
        for (page, value) in &self.written {
            let found = get(sandbox, &format!("/probe/word?page={page}&pages=16"));
            let expected = probe_guest::checksum_of_words(*value, 16);
            assert_eq!(
                found["checksum"],
                format!("{expected:016x}"),
                "{case} {page}"
            );
        }
    }

    pub(super) fn write(&mut self, sandbox: &Sandbox, round: u64) {
        let (page, value) = (FREE_PAGE + 40 * round, 1_000_000 * (round + 1));
        let target = format!("/probe/word?page={page}&pages=16&value={value}");
        let agent = sandbox.agent().unwrap();
        let answer = agent.other(Method::Post, &target, soon()).unwrap();
        assert_eq!(answer.status, 200);
        self.written.push((page, value));
    }
}

#[test]
fn root_kvm_rounds_in_every_sequence_of_memory_modes_lose_nothing() {
    let test = "root_kvm_rounds_in_every_sequence_of_memory_modes_lose_nothing";
    let Some(lab) = Lab::new(test) else { return };
    let Some(vmm) = real(&lab, test) else { return };
    let host = Host::open(config(&lab, &vmm)).unwrap();
    let before = lab.census();
    let template = template(&lab, &host);
    let ram = std::fs::read(template.memory_image()).unwrap();
    // Each of the four after each of the four, itself included (a de Bruijn sequence).
    const ORDER: [usize; 16] = [0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3];
    let rounds = std::env::var(ROUNDS_VARIABLE).ok();
    let rounds = rounds.map_or(ROUNDS, |it| it.parse().unwrap());
    let mut sandbox = host
        .launch(&template, LaunchOptions::default())
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    let mut ledger = Ledger::open(&sandbox);
    let mut seen = std::collections::BTreeSet::new();
    let mut last = "map".to_owned();
    for round in 0..rounds {
        ledger.write(&sandbox, round);
        sandbox
            .pause()
            .unwrap_or_else(|error| panic!("{round}: {}", chain(&error)));
        let place = usize::try_from(round).unwrap() % ORDER.len();
        let mode = MemoryMode::ALL[ORDER[place]];
        let options = ResumeOptions {
            memory_mode: Some(mode),
            ..ResumeOptions::default()
        };
        sandbox = host
            .resume(sandbox.id(), options)
            .unwrap_or_else(|error| panic!("{round} {mode}: {}", chain(&error)));
        let vm = sandbox.story().unwrap().status.vm.unwrap();
        assert_eq!(vm.memory_mode, mode.name(), "{round}");
        ledger.check(&sandbox, &format!("{round} {mode}"));
        seen.insert((
            std::mem::replace(&mut last, mode.name().to_owned()),
            mode.name(),
        ));
    }
    seen.remove(&("map".to_owned(), "shared"));
    assert!(seen.len() >= 15, "{seen:?}");
    println!("{rounds} rounds");
    sandbox.destroy().unwrap();
    assert!(std::fs::read(template.memory_image()).unwrap() == ram);
    host.templates().remove(template.id(), soon()).unwrap();
    assert_eq!(lab.census(), before);
}

#[test]
fn root_kvm_a_launch_records_what_the_next_ones_read_ahead() {
    let test = "root_kvm_a_launch_records_what_the_next_ones_read_ahead";
    let Some(lab) = Lab::new(test) else { return };
    let Some(vmm) = real(&lab, test) else { return };
    let host = Host::open(config(&lab, &vmm)).unwrap();
    let template = template(&lab, &host);
    let launch = |record_working_set, memory_mode| {
        let options = LaunchOptions {
            record_working_set,
            memory_mode,
            ..LaunchOptions::default()
        };
        let sandbox = host
            .launch(&template, options)
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        let notes = sandbox.timeline().notes().to_vec();
        Ledger::open(&sandbox);
        sandbox.destroy().unwrap();
        notes
    };
    let has = |notes: &[String], start: &str| notes.iter().any(|note| note.starts_with(start));
    // Memory that was read is in no file's mapping; the sandbox runs all the same.
    let notes = launch(true, Some(MemoryMode::Copy));
    assert!(has(&notes, "No working set was recorded: "), "{notes:?}");
    assert_eq!(template.working_set().unwrap(), None);

    let notes = launch(true, None);
    let set = template.working_set().unwrap().unwrap();
    let recorded = format!("A working set of {} was recorded", set.size());
    assert!(has(&notes, &recorded), "{notes:?}");
    assert!(
        set.size() > Bytes(0) && set.end() <= Bytes::mib(64),
        "{set:?}"
    );
    host.template("probe").unwrap();

    let notes = launch(false, None);
    let read = format!("A working set of {} is read ahead", set.size());
    assert!(has(&notes, &read), "{notes:?}");
    host.templates().remove(template.id(), soon()).unwrap();
}

#[test]
fn root_kvm_twenty_clones_write_at_once_and_the_template_stays_as_it_is() {
    let test = "root_kvm_twenty_clones_write_at_once_and_the_template_stays_as_it_is";
    let Some(lab) = Lab::new(test) else { return };
    let Some(vmm) = real(&lab, test) else { return };
    let host = Host::open(config(&lab, &vmm)).unwrap();
    let template = template(&lab, &host);
    let ram = std::fs::read(template.memory_image()).unwrap();
    let clones: Vec<_> = (0..20)
        .map(|_| {
            host.launch(&template, LaunchOptions::default())
                .unwrap_or_else(|error| panic!("{}", chain(&error)))
        })
        .collect();
    std::thread::scope(|scope| {
        for (number, sandbox) in clones.iter().enumerate() {
            scope.spawn(move || {
                let number = u64::try_from(number).unwrap();
                let mut ledger = Ledger::open(sandbox);
                // The same pages in all of them, with different words.
                for round in 0..5 {
                    ledger.write(sandbox, round);
                    ledger.written.pop();
                    let value = 7_000_000 * (number + 1) + round;
                    let page = FREE_PAGE + 40 * round;
                    let target = format!("/probe/word?page={page}&pages=16&value={value}");
                    let agent = sandbox.agent().unwrap();
                    agent.other(Method::Post, &target, soon()).unwrap();
                    ledger.written.push((page, value));
                }
                ledger.check(sandbox, &format!("clone {number}"));
            });
        }
    });
    let busy = host.templates().remove(template.id(), soon()).unwrap_err();
    assert!(busy.is_busy(), "{busy}");
    for sandbox in clones {
        sandbox.destroy().unwrap();
    }
    assert!(std::fs::read(template.memory_image()).unwrap() == ram);
    host.templates().remove(template.id(), soon()).unwrap();
}
