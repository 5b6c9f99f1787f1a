//! Slots against the kernel, with the host itself in a namespace.

mod netlab;

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use netlab::census::Census;
use netlab::faults::FailNth;
use netlab::guest::{self, Guest};
use netlab::hold::Hold;
use netlab::{Lab, soon};
use rewake::fault::Faults;
use rewake::resource::net::{HostNet, NetError, RouteOverlap};

fn census(lab: &Lab, host: &HostNet) -> Census {
    Census::take(&lab.host, &host.config().prefix, &lab.dir)
}

#[test]
fn root_a_slot_stands_and_leaves_nothing() {
    let Some(lab) = Lab::new("root_a_slot_stands_and_leaves_nothing") else {
        return;
    };
    let host = lab.open(Faults::NONE);
    let before = census(&lab, &host);
    let slot = host.create("test", soon()).unwrap();
    let plan = slot.plan().clone();
    let name = &plan.netns;
    assert!(
        netlab::ip(&lab.host, "netns list")
            .lines()
            .any(|line| line.split(' ').next() == Some(name)),
        "visible to ip netns"
    );
    let inside = netlab::ip(&lab.host, &format!("-n {name} -o addr"));
    assert!(
        inside.contains(&format!("{}/31", plan.inside_address)),
        "{inside}"
    );
    assert!(inside.contains("169.254.0.22/30"), "{inside}");
    assert!(!inside.contains("inet6 fe80"), "closed to IPv6: {inside}");
    let tap = netlab::ip(&lab.host, &format!("-n {name} -d -o link show tap0"));
    assert!(
        tap.contains("persist on") && tap.contains("vnet_hdr on"),
        "{tap}"
    );
    assert!(tap.contains("02:fc:00:00:00:06"), "{tap}");
    let neighbours = netlab::ip(&lab.host, &format!("-n {name} neigh"));
    assert!(
        neighbours.contains("169.254.0.21 dev tap0 lladdr 02:fc:00:00:00:05 PERMANENT"),
        "{neighbours}"
    );
    let forwarding = netlab::run(
        &lab.host,
        "ip",
        &[
            "netns",
            "exec",
            name,
            "cat",
            "/proc/sys/net/ipv4/ip_forward",
        ],
    );
    assert_eq!(forwarding.trim(), "1");
    let route = lab.on_host(&format!("route get {}", plan.host_address));
    assert!(
        route.contains(&format!("via {} dev {}", plan.inside_address, plan.veth)),
        "{route}"
    );
    let host_link = lab.on_host(&format!("-o addr show {}", plan.veth));
    assert!(!host_link.contains("inet6"), "{host_link}");
    host.destroy(slot, soon()).unwrap();
    before.assert_again("after destroy", || census(&lab, &host));
}

#[test]
fn root_probe_sockets_reach_the_guest_without_any_route() {
    let Some(lab) = Lab::new("root_probe_sockets_reach_the_guest_without_any_route") else {
        return;
    };
    let host = lab.open(Faults::NONE);
    let slot = host.create("test", soon()).unwrap();
    let guest = Guest::start(&slot, host.config());
    let to = SocketAddrV4::new(host.config().guest_address, guest::PORT);
    let netns = slot.netns().try_clone_to_owned().unwrap();
    assert_eq!(
        netlab::fetch(&netns, to.into()).unwrap(),
        host.config().tap_address.to_string()
    );
    assert_eq!(slot.probe_sockets(3).unwrap().len(), 3);
    drop(guest);
    host.destroy(slot, soon()).unwrap();
}

#[test]
fn root_every_fault_of_create_and_destroy_leaves_nothing() {
    let Some(lab) = Lab::new("root_every_fault_of_create_and_destroy_leaves_nothing") else {
        return;
    };
    let injector = Arc::new(FailNth::default());
    let host = lab.open(Faults::inject(injector.clone()));
    let before = census(&lab, &host);
    for late in [false, true] {
        for target in 0.. {
            injector.arm(target, late);
            let outcome = host.create("test", soon());
            let failed = injector.disarm();
            let Some(step) = failed else {
                assert!(target > 20, "the shim sees every step");
                host.destroy(outcome.unwrap(), soon()).unwrap();
                break;
            };
            let case = format!("create, late: {late}, {target}: {step}");
            let error = chain(&outcome.expect_err(&case));
            assert!(error.contains(&step), "{case}: {error}");
            // Of a slot file that was made without the maker knowing, an empty one remains.
            host.sweep(soon()).unwrap();
            before.assert_again(&case, || census(&lab, &host));
        }
        for target in 0.. {
            let slot = host.create("test", soon()).unwrap();
            let index = slot.index();
            injector.arm(target, late);
            let outcome = host.destroy(slot, soon());
            let failed = injector.disarm();
            let Some(step) = failed else {
                assert!(target > 3, "the shim sees every step");
                outcome.unwrap();
                break;
            };
            let case = format!("destroy, late: {late}, {target}: {step}");
            let error = chain(&outcome.expect_err(&case));
            assert!(error.contains(&step), "{case}: {error}");
            // The slot is not handed out again before what is left of it is gone.
            if host.slots().list().unwrap().contains(&index) {
                host.sweep(soon()).unwrap();
            }
            before.assert_again(&case, || census(&lab, &host));
        }
    }
}

#[test]
fn root_a_slot_that_is_being_built_has_a_namespace_before_it_stands() {
    let test = "root_a_slot_that_is_being_built_has_a_namespace_before_it_stands";
    let Some(lab) = Lab::new(test) else {
        return;
    };
    let before = census(&lab, &lab.open(Faults::NONE));
    let gone_on = Arc::new(AtomicBool::new(false));
    let may_go = Arc::clone(&gone_on);
    let hold = Hold::new("create tap", move || may_go.load(Ordering::SeqCst));
    let host = Arc::new(lab.open(Faults::inject(hold.clone())));
    let pending = host.begin("test", soon()).unwrap();
    hold.wait_reached();
    // All that a process needs to start in it: a name, and what the name leads to.
    let netns = pending.netns().unwrap();
    let pinned = rewake_sys::netns::open(pending.netns_path()).unwrap();
    assert!(rewake_sys::netns::same(&netns, &pinned).unwrap());
    let links = netlab::ip(&netns, "-o link show");
    assert!(!links.contains("tap0"), "it does not stand: {links}");
    gone_on.store(true, Ordering::SeqCst);
    let stood = pending.stands().unwrap();
    assert_eq!(pending.stands().unwrap(), stood);
    let slot = pending.take().unwrap();
    assert_eq!(slot.index(), pending.index());
    assert!(rewake_sys::netns::same(slot.netns(), &netns).unwrap());
    assert!(pending.take().is_none(), "it is handed out once");
    assert!(pending.stands().is_ok(), "and stands all the same");
    assert!(pending.netns().is_err());
    drop((pending, netns, pinned));
    host.destroy(slot, soon()).unwrap();
    before.assert_again("after destroy", || census(&lab, &host));
}

#[test]
fn root_a_slot_that_is_dropped_while_it_is_built_is_found_by_its_record() {
    let test = "root_a_slot_that_is_dropped_while_it_is_built_is_found_by_its_record";
    let Some(lab) = Lab::new(test) else {
        return;
    };
    let host = Arc::new(lab.open(Faults::NONE));
    let before = census(&lab, &host);
    for _ in 0..10 {
        let pending = host.begin("test", soon()).unwrap();
        let index = pending.index();
        drop(pending);
        let record = host.slots().record(index).unwrap().unwrap();
        assert_eq!(record.steps.len(), 4, "it was built to its end");
        host.sweep(soon()).unwrap();
        assert_eq!(host.slots().list().unwrap(), []);
    }
    before.assert_again("after sweeps", || census(&lab, &host));
}

#[test]
fn root_every_fault_of_a_slot_that_is_being_built_is_told_to_all_who_wait() {
    let test = "root_every_fault_of_a_slot_that_is_being_built_is_told_to_all_who_wait";
    let Some(lab) = Lab::new(test) else {
        return;
    };
    let injector = Arc::new(FailNth::default());
    let host = Arc::new(lab.open(Faults::inject(injector.clone())));
    let before = census(&lab, &host);
    for late in [false, true] {
        for target in 0.. {
            injector.arm(target, late);
            let begun = host.begin("test", soon());
            let told = begun.map(|pending| {
                let netns = pending.netns().map(drop).map_err(|error| chain(&error));
                let stands = pending.stands().map(drop).map_err(|error| chain(&error));
                (netns, stands, pending.take())
            });
            let failed = injector.disarm();
            let Some(step) = failed else {
                assert!(target > 20, "the shim sees every step");
                let (netns, stands, slot) = told.unwrap();
                assert_eq!((netns, stands), (Ok(()), Ok(())));
                host.destroy(slot.unwrap(), soon()).unwrap();
                break;
            };
            let case = format!("late: {late}, {target}: {step}");
            match told {
                Ok((netns, stands, slot)) => {
                    let error = stands.expect_err(&case);
                    assert!(error.contains(&step), "{case}: {error}");
                    // The namespace may have been there by then.
                    assert!(netns.is_ok() || netns == Err(error), "{case}");
                    assert!(slot.is_none(), "{case}");
                }
                Err(error) => assert!(chain(&error).contains(&step), "{case}"),
            }
            host.sweep(soon()).unwrap();
            before.assert_again(&case, || census(&lab, &host));
        }
    }
}

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[test]
fn root_a_route_of_the_host_into_our_range_is_refused() {
    let Some(lab) = Lab::new("root_a_route_of_the_host_into_our_range_is_refused") else {
        return;
    };
    let host = HostNet::open_in(
        std::os::fd::AsFd::as_fd(&lab.host),
        lab.config(),
        Faults::NONE,
    )
    .unwrap();
    lab.on_host("route add 10.0.0.0/8 via 203.0.113.1");
    host.prepare(soon()).unwrap();
    assert!(
        host.overlaps(soon())
            .unwrap()
            .iter()
            .all(RouteOverlap::is_shadowed)
    );
    lab.on_host("route add 10.12.7.0/24 via 203.0.113.1");
    let error = host.prepare(soon()).unwrap_err();
    assert!(matches!(error, NetError::RouteConflict { .. }), "{error}");
    lab.on_host("route del 10.12.7.0/24");
    // Routes of slots are no conflict.
    let slot = host.create("test", soon()).unwrap();
    host.prepare(soon()).unwrap();
    assert_eq!(host.uplink(soon()).unwrap().unwrap().name, netlab::UPLINK);
    host.destroy(slot, soon()).unwrap();
}
