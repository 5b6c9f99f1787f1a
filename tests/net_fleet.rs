//! Many slots: two hundred at once, a pool of prepared ones, and a sweep.

mod netlab;

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;

use netlab::census::Census;
use netlab::guest::{self, Guest};
use netlab::{HOST, Lab, PUBLIC, soon};
use rewake::fault::Faults;
use rewake::ids::SlotIndex;
use rewake::resource::net::{HostNet, PoolOptions, SlotPool};
use rewake::resource::slot::ProcessIdentity;

fn census(lab: &Lab, host: &HostNet) -> Census {
    Census::take(&lab.host, &host.config().prefix, &lab.dir)
}

#[test]
fn root_two_hundred_slots_work_both_ways_and_leave_nothing() {
    const SLOTS: usize = 200;
    let test = "root_two_hundred_slots_work_both_ways_and_leave_nothing";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open(Faults::NONE);
    let before = census(&lab, &host);
    let slots: Vec<_> = (0..SLOTS)
        .map(|_| host.create("test", soon()).unwrap())
        .collect();
    let server = lab.serve_on_internet(PUBLIC);
    let SocketAddr::V4(public) = server.address else {
        unreachable!("the lab has no IPv6")
    };
    for slots in slots.chunks(20) {
        let guests: Vec<_> = slots
            .iter()
            .map(|slot| Guest::start(slot, host.config()))
            .collect();
        for (slot, guest) in slots.iter().zip(&guests) {
            let index = slot.index();
            host.check(slot, soon()).unwrap();
            // Outwards first: a tap carries nothing inwards in the first milliseconds that
            // it has a reader, and a lost SYN costs a second.
            let seen = guest.fetch(public);
            assert_eq!(seen.unwrap(), HOST.to_string(), "slot {index}, outwards");
            let at = SocketAddr::from((slot.host_address(), guest::PORT));
            let seen = lab.fetch_from_host(at);
            let meant = slot.plan().veth_address.to_string();
            assert_eq!(seen.unwrap(), meant, "slot {index}, host to guest");
        }
    }
    assert_ne!(census(&lab, &host), before);
    let failures = host.destroy_all(slots, soon());
    assert!(failures.is_empty(), "{failures:?}");
    before.assert_again("after 200", || census(&lab, &host));
}

#[test]
fn root_a_pool_hands_out_checked_slots_and_removes_used_ones() {
    let test = "root_a_pool_hands_out_checked_slots_and_removes_used_ones";
    let Some(lab) = Lab::new(test) else { return };
    let host = Arc::new(lab.open(Faults::NONE));
    let before = census(&lab, &host);
    let options = PoolOptions {
        target: 3,
        refill_interval_ms: 1,
        ..PoolOptions::default()
    };
    let pool = SlotPool::start(Arc::clone(&host), options).unwrap();
    assert!(pool.wait_settled(soon()));
    let slot = pool.take("sb-a").unwrap().unwrap();
    host.check(&slot, soon()).unwrap();
    let record = host.slots().record(slot.index()).unwrap().unwrap();
    assert_eq!(record.owner, "sb-a");
    assert!(pool.wait_settled(soon()), "it is filled up again");
    // Somebody removes the link of the slot that is next.
    let next = slot.index().get() + 1;
    lab.on_host(&format!("link del {}v{next}", host.config().prefix));
    let other = pool.take("sb-b").unwrap().unwrap();
    assert_ne!(
        other.index().get(),
        next,
        "a damaged slot is not handed out"
    );
    pool.retire(slot);
    pool.retire(other);
    assert!(pool.wait_settled(soon()));
    let stats = pool.stats();
    assert_eq!((stats.taken, stats.unhealthy), (2, 1), "{stats:?}");
    assert_eq!(stats.failed_removals, 0, "{stats:?}");
    assert!(pool.close(soon()).is_empty());
    before.assert_again("after the pool", || census(&lab, &host));
}

#[test]
fn root_a_sweep_takes_the_dead_and_nothing_else() {
    let test = "root_a_sweep_takes_the_dead_and_nothing_else";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open(Faults::NONE);
    let before = census(&lab, &host);
    let held = host.create("held", soon()).unwrap();
    let dead = host.create("dead", soon()).unwrap();
    let dead_index = dead.index();
    let mut orphan = host.create("orphan", soon()).unwrap();
    let orphan_index = orphan.index();
    let mut vmm = Command::new("sleep").arg("60").spawn().unwrap();
    let start_time = rewake_sys::process::start_time(vmm.id()).unwrap();
    orphan
        .set_vmm(Some(ProcessIdentity {
            pid: vmm.id(),
            start_time,
        }))
        .unwrap();
    // Their holder is gone; of the second the VMM lives on.
    drop(dead);
    drop(orphan);
    let parked = host.slots().reserve(SlotIndex::new(900).unwrap(), "sb-p");
    parked.unwrap().park().unwrap();
    // Named like a slot, and not ours.
    let foreign = format!("{}v77", host.config().prefix);
    lab.on_host(&format!("link add {foreign} type veth peer name other0"));
    let report = host.sweep(soon()).unwrap();
    assert_eq!(report.reclaimed, [dead_index], "{report:?}");
    assert_eq!(report.in_use, [held.index(), orphan_index], "{report:?}");
    assert_eq!(report.parked, [SlotIndex::new(900).unwrap()], "{report:?}");
    assert_eq!(report.foreign, [format!("link {foreign}")], "{report:?}");
    assert!(report.stuck.is_empty(), "{report:?}");
    lab.on_host(&format!("link del {foreign}"));
    host.check(&held, soon()).unwrap();

    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let report = host.sweep(soon()).unwrap();
    assert_eq!(report.reclaimed, [orphan_index], "its VMM is dead now");
    host.destroy(held, soon()).unwrap();
    let back = host.slots().reserve(SlotIndex::new(900).unwrap(), "sb-p");
    back.unwrap().release().map_err(|held| held.error).unwrap();
    before.assert_again("after the sweeps", || census(&lab, &host));
}

#[test]
fn root_a_step_is_not_undone_on_somebody_elses_object() {
    let test = "root_a_step_is_not_undone_on_somebody_elses_object";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open(Faults::NONE);
    let slot = host.create("test", soon()).unwrap();
    let (steps, plan) = (slot.steps().to_vec(), slot.plan().clone());
    host.destroy(slot, soon()).unwrap();
    // The same names again, but other objects.
    let index = plan.veth_index;
    lab.on_host(&format!(
        "link add {} index {index} address 02:00:00:00:00:01 type veth peer name other0",
        plan.veth
    ));
    lab.on_host(&format!("netns add {}", plan.netns));
    for step in &steps {
        host.undo(step, soon()).unwrap();
    }
    lab.on_host(&format!("link show {}", plan.veth));
    lab.on_host(&format!("-n {} link show lo", plan.netns));
    // A slot cannot be built over them either, and says so.
    let error = host.create_at(plan.index, "test", soon()).unwrap_err();
    assert!(error.to_string().contains("slot 1"), "{error}");
    lab.on_host(&format!("-n {} link show lo", plan.netns));
    lab.on_host(&format!("netns del {}", plan.netns));
}

#[test]
fn root_doctor_names_what_is_in_the_way() {
    let test = "root_doctor_names_what_is_in_the_way";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open(Faults::NONE);
    let bad = |host: &HostNet| -> Vec<&str> {
        let findings = host.examine(soon());
        let bad = findings.iter().filter(|it| !it.remedy.is_empty());
        bad.map(|it| it.name).collect()
    };
    assert_eq!(bad(&host), [""; 0]);
    lab.on_host("route del default");
    lab.on_host(&format!(
        "route add 10.11.3.0/24 via {}",
        Ipv4Addr::new(203, 0, 113, 1)
    ));
    assert_eq!(bad(&host), ["uplink", "slot addresses"]);
}
