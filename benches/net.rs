//! One network slot: rewake against the conventional command sequence, interleaved.
//!
//!     cargo bench --bench net [-- ROUNDS]
//!
//! The host is a namespace with a pretend uplink, so nothing reaches the machine's own
//! links. Every slot that is built is checked before it counts. Needs root, `ip`,
//! `iptables` and `sysctl`.

#[path = "interleaved/mod.rs"]
mod interleaved;
#[path = "../tests/netlab/mod.rs"]
mod netlab;

use std::os::fd::AsFd;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use interleaved::{Samples, numbers, print_machine};
use netlab::{Lab, UPLINK, soon};
use rewake::fault::Faults;
use rewake::ids::SlotIndex;
use rewake::resource::net::{HostNet, PoolOptions, SlotPool};
use rewake_sys::netns;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/conventional-slot.sh");
const THREADS: usize = 8;
/// Indices that the conventional sequence uses, far from those handed out.
const CONVENTIONAL: u16 = 20_000;

fn main() {
    let [rounds] = numbers([60]);
    let Some(lab) = Lab::new("bench net") else {
        return;
    };
    let host = lab.open(Faults::NONE);
    print_machine();

    let mut ours = Samples::default();
    let mut ours_gone = Samples::default();
    let mut theirs = Samples::default();
    let mut theirs_gone = Samples::default();
    for round in 0..rounds {
        let started = Instant::now();
        let slot = host.create("bench", soon()).expect("a slot");
        ours.push(started.elapsed());
        host.check(&slot, soon()).expect("an undamaged slot");
        let started = Instant::now();
        host.destroy(slot, soon()).expect("removal");
        ours_gone.push(started.elapsed());

        let index = CONVENTIONAL + u16::try_from(round % 1000).expect("below 1000");
        theirs.push(conventional(&lab, &host, "create", index));
        check_conventional(&lab, &host, index);
        theirs_gone.push(conventional(&lab, &host, "destroy", index));
    }
    ours.print("rewake: create a slot");
    theirs.print("ip, sysctl, iptables: create a slot");
    ours_gone.print("rewake: destroy a slot");
    theirs_gone.print("ip, iptables: destroy a slot");
    println!(
        "ratio of medians: create {:.1}, destroy {:.1}",
        theirs.median().as_secs_f64() / ours.median().as_secs_f64(),
        theirs_gone.median().as_secs_f64() / ours_gone.median().as_secs_f64(),
    );
    parallel(&host, rounds);
    let host = Arc::new(host);
    retired(&host, rounds);
    pooled(&host);
    host.retire(soon()).expect("the walls come down");
}

/// Eight threads at once that leave removal to a pool's thread, as a host does.
fn retired(host: &Arc<HostNet>, rounds: usize) {
    let pool = SlotPool::start(Arc::clone(host), PoolOptions::default()).expect("a thread");
    let created = Mutex::new(Samples::default());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..rounds {
                    let started = Instant::now();
                    let slot = host.create("bench", soon()).expect("a slot");
                    created.lock().expect("no panic").push(started.elapsed());
                    host.check(&slot, soon()).expect("an undamaged slot");
                    pool.retire(slot);
                }
            });
        }
    });
    assert!(pool.wait_settled(soon()), "removals keep up");
    let elapsed = started.elapsed();
    assert_eq!(pool.stats().failed_removals, 0);
    let created = created.into_inner().expect("no panic");
    created.print(&format!("rewake: create, {THREADS} threads, reaped"));
    println!(
        "{THREADS} threads, removed in batches: {:.0} slots built and removed per second",
        (THREADS * rounds) as f64 / elapsed.as_secs_f64()
    );
    assert!(pool.close(soon()).is_empty());
}

/// What a caller waits for where slots stand ready.
fn pooled(host: &Arc<HostNet>) {
    const READY: usize = 50;
    let options = PoolOptions {
        target: READY,
        refill_interval_ms: 0,
        ..PoolOptions::default()
    };
    let pool = SlotPool::start(Arc::clone(host), options).expect("a thread");
    let mut taken = Samples::default();
    for _ in 0..4 {
        assert!(pool.wait_settled(soon()), "the pool fills");
        let mut slots = Vec::new();
        for _ in 0..READY / 2 {
            let started = Instant::now();
            let slot = pool.take("bench").expect("a record").expect("a slot");
            taken.push(started.elapsed());
            slots.push(slot);
        }
        for slot in slots {
            host.check(&slot, soon()).expect("an undamaged slot");
            pool.retire(slot);
        }
    }
    taken.print("rewake: a slot out of the pool");
    assert!(pool.close(soon()).is_empty());
}

/// Eight threads at once: no errors, and the tail.
fn parallel(host: &HostNet, rounds: usize) {
    let (created, destroyed) = (
        Mutex::new(Samples::default()),
        Mutex::new(Samples::default()),
    );
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..rounds {
                    let started = Instant::now();
                    let slot = host.create("bench", soon()).expect("a slot");
                    created.lock().expect("no panic").push(started.elapsed());
                    host.check(&slot, soon()).expect("an undamaged slot");
                    let started = Instant::now();
                    host.destroy(slot, soon()).expect("removal");
                    destroyed.lock().expect("no panic").push(started.elapsed());
                }
            });
        }
    });
    let elapsed = started.elapsed();
    let created = created.into_inner().expect("no panic");
    created.print(&format!("rewake: create, {THREADS} threads"));
    let destroyed = destroyed.into_inner().expect("no panic");
    destroyed.print(&format!("rewake: destroy, {THREADS} threads"));
    let total = THREADS * rounds;
    println!(
        "{THREADS} threads: {total} slots, 0 errors, {:.0} slots built and removed per second",
        total as f64 / elapsed.as_secs_f64()
    );
}

fn conventional(lab: &Lab, host: &HostNet, action: &str, index: u16) -> Duration {
    let arguments = [action, &host.config().prefix, &index.to_string(), UPLINK];
    netns::run_in(lab.host.as_fd(), || {
        let started = Instant::now();
        let output = Command::new(SCRIPT)
            .args(arguments)
            .output()
            .expect("the script");
        let elapsed = started.elapsed();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{action} {index}: {stderr}");
        elapsed
    })
    .expect("the host's namespace")
}

fn check_conventional(lab: &Lab, host: &HostNet, index: u16) {
    let plan = host.config().slot(SlotIndex::new(index).expect("in range"));
    let route = lab.on_host(&format!("route get {}", plan.host_address));
    assert!(route.contains(&plan.veth), "{route}");
}
