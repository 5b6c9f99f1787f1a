//! Hosts that are killed in the middle of a busy mix of operations, and what recovery makes
//! of what they leave.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rewake::host::{Host, LaunchOptions, ResumeOptions};
use rewake::ids::{SandboxId, TemplateId};
use rewake::sandbox::state::State;
use rewake::vmm::orphan;

use super::lab::{Lab, chain, memory_of, soon};

/// How often a host is killed; more with this variable.
const KILLS: u32 = 40;
const KILLS_VARIABLE: &str = "REWAKE_KILLS";
/// Set for the process that is to be busy: where it works, and its seed.
const BUSY: &str = "REWAKE_BUSY_HOST";
/// Sandboxes that a busy host keeps at most.
const MOST: usize = 4;

/// A row of numbers that looks random (xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }
}

#[test]
fn root_whatever_moment_a_host_is_killed_at_everything_is_adopted_or_reclaimed() {
    let test = "root_whatever_moment_a_host_is_killed_at_everything_is_adopted_or_reclaimed";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let template = lab.template(&host);
    let before = lab.census();
    // What recovery must leave alone: it looks like ours, and is not.
    let stranger = lab.net.dir.join("run/vm/stranger.00000000");
    let (name, value) = orphan::mark(&stranger);
    let mut decoy = Command::new("sleep")
        .arg("3000")
        .env(name, value)
        .spawn()
        .unwrap();
    std::fs::create_dir(lab.root.join("sandboxes/NOT_OURS")).unwrap();

    let kills = std::env::var(KILLS_VARIABLE).ok();
    let kills = kills.map_or(KILLS, |it| it.parse().unwrap());
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut counters: BTreeMap<SandboxId, u64> = BTreeMap::new();
    let mut fates = BTreeMap::new();
    let mut slowest = Duration::ZERO;
    for round in 0.. {
        // On a busy machine hosts do not come far in their time.
        let seen = ["adopted", "paused"].map(|fate| fates.get(fate).is_some_and(|it| *it > 0));
        if round >= kills && (seen == [true; 2] || round >= 5 * kills) {
            break;
        }
        let seed = dice.roll(u64::MAX - 1) + 1;
        let moment = Duration::from_micros(50_000 + dice.roll(600_000));
        be_busy_until_killed(&lab, seed, moment);
        let begun = Instant::now();
        let mut census = host.recover(soon()).unwrap();
        let took = begun.elapsed();
        if took > Duration::from_secs(1) {
            println!("round {round}, seed {seed}: recovery took {took:?}: {census:?}");
        }
        slowest = slowest.max(took);
        // A process that the dead host had just made holds its locks until it comes to exec.
        while !census.under_way.is_empty() && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
            census = host.recover(soon()).unwrap();
        }
        assert!(census.is_clean(), "round {round}, seed {seed}: {census:?}");
        assert!(census.under_way.is_empty(), "round {round}: {census:?}");
        assert!(census.silent.is_empty(), "round {round}: {census:?}");
        assert!(census.lost.is_empty(), "round {round}: {census:?}");
        for (what, count) in [
            ("adopted", census.adopted.len()),
            ("paused", census.paused.len()),
            ("reclaimed", census.reclaimed.len()),
        ] {
            *fates.entry(what).or_insert(0) += count;
        }
        for id in &census.adopted {
            let memory = memory_of(&host.sandbox(id).unwrap());
            let last = counters.insert(id.clone(), memory.counter).unwrap_or(0);
            assert!(memory.counter >= last, "round {round}: {id} went back");
        }
        let known = census.adopted.len() + census.paused.len();
        assert_eq!(host.sandboxes().unwrap().len(), known, "round {round}");
        assert_eq!(
            lab.processes().len(),
            census.adopted.len() + 1,
            "round {round}: one process each, and the stranger's"
        );
    }
    println!("Killed: {fates:?}, slowest recovery {slowest:?}");
    assert!(fates["adopted"] > 0 && fates["paused"] > 0);

    // All are the same guest's descendants, and go on.
    let mut nonce = None;
    for sandbox in host.sandboxes().unwrap() {
        let sandbox = match sandbox.state().unwrap() {
            State::Paused => host
                .resume(sandbox.id(), ResumeOptions::default())
                .unwrap_or_else(|error| panic!("{}", chain(&error))),
            _ => sandbox,
        };
        let found = memory_of(&sandbox).nonce;
        assert_eq!(*nonce.get_or_insert(found.clone()), found);
        sandbox.destroy().unwrap();
    }
    assert!(decoy.try_wait().unwrap().is_none(), "the stranger lives");
    decoy.kill().unwrap();
    decoy.wait().unwrap();
    std::fs::remove_dir(lab.root.join("sandboxes/NOT_OURS")).unwrap();
    for name in host.templates().list().unwrap() {
        if name != *template.id() {
            host.templates().remove(&name, soon()).unwrap();
        }
    }
    assert_eq!(lab.census(), before);
}

/// Runs a busy host in a process of its own, and kills it at this moment of its life.
fn be_busy_until_killed(lab: &Lab, seed: u64, moment: Duration) {
    let host = lab.config(&[]).netns.unwrap();
    let words = format!(
        "{}\n{}\n{}\n{seed}",
        lab.net.dir.display(),
        host.display(),
        lab.net.config().prefix
    );
    let mut busy = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::a_busy_host", "--nocapture"])
        .env(BUSY, words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(moment);
    busy.kill().unwrap();
    let ended = busy.wait().unwrap();
    assert_eq!(
        ended.signal(),
        Some(9),
        "it was to be busy until killed: {ended}"
    );
}

/// Not a test of its own: what the killed process does. Returns at once in any other.
#[test]
fn a_busy_host() {
    let Ok(words) = std::env::var(BUSY) else {
        return;
    };
    let words: Vec<&str> = words.lines().collect();
    let [dir, netns, prefix, seed] = words[..] else {
        panic!("{words:?}")
    };
    let mut config = super::lab::config_of(dir.as_ref(), netns.as_ref(), &[]);
    config.net.prefix = prefix.to_owned();
    let seed: u64 = seed.parse().unwrap();
    if seed.is_multiple_of(2) {
        // Disks are made and handed out all the time.
        config.disk_stock.target = 2;
        config.disk_stock.refill_interval_ms = 1;
    }
    let host = Host::open(config).unwrap();
    let mine = Mutex::new(());
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (host, mine) = (&host, &mine);
            scope.spawn(move || {
                let mut dice = Dice(seed ^ (thread << 32) | 1);
                loop {
                    step(host, mine, &mut dice);
                }
            });
        }
    });
}

/// One operation at random. That another thread is at work with the same sandbox is no
/// reason to stop, nor is anything else.
fn step(host: &Host, launching: &Mutex<()>, dice: &mut Dice) {
    let sandboxes = host.sandboxes().unwrap_or_default();
    let count = sandboxes.len() as u64;
    let chosen = (count > 0).then(|| sandboxes[usize::try_from(dice.roll(count)).unwrap()].clone());
    match (dice.roll(10), chosen) {
        (0..3, _) if sandboxes.len() < MOST => {
            let _one = launching.lock().unwrap();
            if let Ok(template) = host.template("base") {
                let _ = host.launch(&template, LaunchOptions::default());
            }
        }
        (0..4, Some(mut sandbox)) => drop(sandbox.pause()),
        (4..6, Some(sandbox)) => {
            let _ = host.resume(sandbox.id(), ResumeOptions::default());
        }
        // Where it is not paused, that is refused.
        (6..8, Some(sandbox)) => {
            let _ = host.expect_resume(sandbox.id(), Duration::from_secs(600), soon());
        }
        (8, Some(mut sandbox)) => {
            let name = TemplateId::new(format!("warm-{}", dice.roll(1 << 40))).unwrap();
            let _ = host.snapshot(&mut sandbox, &name, soon(), &mut |_| {});
        }
        (_, Some(sandbox)) => drop(sandbox.destroy()),
        (_, None) => {}
    }
}
