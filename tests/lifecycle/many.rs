//! Many at once: threads, one event loop, destroying what is just being made.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mio::{Events, Poll};
use rewake::host::{Driver, LaunchOptions, Limits, ResumeOptions, Sandbox};
use rewake::ids::SandboxId;
use rewake::resource::disk::{DiskKind, DiskMode};
use rewake::wire::reactor::{TokenRange, wait};

use super::lab::{Lab, chain, launch, memory_of, soon};

/// Restores on their way at once, on one thread.
const IN_FLIGHT: usize = 200;

#[test]
fn root_two_hundred_restores_in_flight_on_one_thread() {
    let test = "root_two_hundred_restores_in_flight_on_one_thread";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let template = lab.template(&host);
    let before = lab.census();
    let tokens = TokenRange::new(0, IN_FLIGHT * Driver::TOKENS_EACH);
    let mut driver = Driver::new(host.clone(), tokens);
    for number in 0..IN_FLIGHT {
        let options = LaunchOptions {
            deadline: rewake::deadline::Deadline::after(Duration::from_secs(300)),
            disk_mode: Some(DiskMode::Only(DiskKind::Copy)),
            ..LaunchOptions::default()
        };
        driver
            .launch(&template, options)
            .unwrap_or_else(|error| panic!("{number}: {}", chain(&error)));
    }
    assert_eq!(driver.len(), IN_FLIGHT);
    let full = driver
        .launch(&template, LaunchOptions::default())
        .unwrap_err();
    assert!(full.is_busy(), "{}", chain(&full));

    let mut poll = Poll::new().unwrap();
    let mut events = Events::with_capacity(1024);
    let mut launched = Vec::new();
    loop {
        for (_, outcome) in driver.advance(poll.registry(), Instant::now()) {
            launched.push(outcome.unwrap_or_else(|error| panic!("{}", chain(&error))));
        }
        if driver.is_empty() {
            break;
        }
        wait(&mut poll, &mut events, driver.wake_at()).unwrap();
        for event in &events {
            driver.on_event(poll.registry(), event);
        }
    }
    let addresses: BTreeSet<_> = launched.iter().map(Sandbox::host_ip).collect();
    assert_eq!(addresses.len(), IN_FLIGHT);
    assert_eq!(lab.processes().len(), IN_FLIGHT);
    // Whoever comes next finds them all, and asks each of their guests.
    let begun = Instant::now();
    let census = host.recover(soon()).unwrap();
    println!("{IN_FLIGHT} sandboxes adopted in {:?}", begun.elapsed());
    assert_eq!(census.adopted.len(), IN_FLIGHT, "{census:?}");
    assert!(begun.elapsed() < Duration::from_secs(20));
    std::thread::scope(|scope| {
        for part in launched.chunks(IN_FLIGHT / 8) {
            scope.spawn(move || {
                for sandbox in part {
                    sandbox.clone().destroy().unwrap();
                }
            });
        }
    });
    assert_eq!(lab.census(), before);
}

#[test]
fn root_a_driver_that_is_dropped_leaves_nothing() {
    let test = "root_a_driver_that_is_dropped_leaves_nothing";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let template = lab.template(&host);
    let before = lab.census();
    let tokens = TokenRange::new(0, 4 * Driver::TOKENS_EACH);
    let mut driver = Driver::new(host, tokens);
    for _ in 0..3 {
        driver.launch(&template, LaunchOptions::default()).unwrap();
    }
    assert_eq!(lab.processes().len(), 3);
    drop(driver);
    assert_eq!(lab.census(), before);
}

#[test]
fn root_threads_share_a_host_and_operations_on_one_sandbox_exclude_each_other() {
    let test = "root_threads_share_a_host_and_operations_on_one_sandbox_exclude_each_other";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let template = lab.template(&host);
    let before = lab.census();
    let sandbox = launch(&host, &template);
    let memory = memory_of(&sandbox);
    let (mut paused, mut busy) = (0, 0);
    for _ in 0..5 {
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let mut sandbox = sandbox.clone();
                    scope.spawn(move || sandbox.pause())
                })
                .collect();
            threads.into_iter().map(|it| it.join().unwrap()).collect()
        });
        let done = outcomes.iter().filter(|it| it.is_ok()).count();
        assert_eq!(done, 1, "{outcomes:?}");
        paused += done;
        busy += outcomes
            .iter()
            .flat_map(|it| it.as_ref().err())
            .filter(|it| it.is_busy())
            .count();
        host.resume(sandbox.id(), ResumeOptions::default()).unwrap();
    }
    assert_eq!(paused, 5);
    println!("{busy} of 15 others met one under way, the rest a paused sandbox");
    memory.goes_on_in(&memory_of(&sandbox));
    sandbox.destroy().unwrap();
    assert_eq!(lab.census(), before);
}

#[test]
fn root_destroying_ends_what_is_under_way() {
    let test = "root_destroying_ends_what_is_under_way";
    let Some(lab) = Lab::new(test) else { return };
    let sound = lab.open();
    let template = lab.template(&sound);
    let before = lab.census();
    // The guest never answers, so the launch would wait for two minutes.
    let host = lab.open_with(&["fault=guest:never"], rewake::fault::Faults::NONE);
    for wait_for_process in [false, true] {
        let id = SandboxId::random();
        let options = LaunchOptions {
            id: Some(id.clone()),
            ..LaunchOptions::default()
        };
        let begun = Instant::now();
        let error = std::thread::scope(|scope| {
            let launching = scope.spawn(|| host.launch(&template, options));
            let seen = || {
                if wait_for_process {
                    !lab.processes().is_empty()
                } else {
                    lab.root.join("sandboxes").join(id.as_str()).exists()
                }
            };
            while !seen() {
                assert!(begun.elapsed() < Duration::from_secs(20));
                std::thread::sleep(Duration::from_millis(1));
            }
            // By another handle on the same root, as another process would.
            sound.destroy(&id, soon()).unwrap();
            launching.join().unwrap().unwrap_err()
        });
        assert!(chain(&error).contains("destroyed"), "{}", chain(&error));
        assert!(begun.elapsed() < Duration::from_secs(20));
        assert_eq!(lab.census(), before);
    }
}

#[test]
fn root_a_full_host_says_so_and_makes_nothing() {
    let test = "root_a_full_host_says_so_and_makes_nothing";
    let Some(lab) = Lab::new(test) else { return };
    let mut config = lab.config(&[]);
    config.limits = Limits {
        sandboxes: Some(1),
        ..Limits::default()
    };
    config.net.slot_max = 2;
    let host = rewake::host::Host::open(config.clone()).unwrap();
    let template = lab.template(&host);
    let first = launch(&host, &template);
    let before = lab.census();
    let full = host
        .launch(&template, LaunchOptions::default())
        .unwrap_err();
    assert!(full.is_busy(), "{}", chain(&full));
    assert!(chain(&full).ends_with("The host is full: 1 sandboxes run already"));
    config.limits.sandboxes = None;
    let wider = rewake::host::Host::open(config).unwrap();
    let second = launch(&wider, &template);
    let full = wider
        .launch(&template, LaunchOptions::default())
        .unwrap_err();
    assert!(full.is_busy(), "{}", chain(&full));
    assert!(chain(&full).contains("All 2 network slots are in use"));
    second.destroy().unwrap();
    assert_eq!(lab.census(), before);
    first.destroy().unwrap();
}

#[test]
fn root_all_running_sandboxes_are_paused_for_a_shutdown() {
    let test = "root_all_running_sandboxes_are_paused_for_a_shutdown";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open();
    let template = lab.template(&host);
    let sandboxes: Vec<_> = (0..5).map(|_| launch(&host, &template)).collect();
    let paused = host.pause_all(3, soon()).unwrap();
    assert_eq!(paused.len(), 5);
    for (id, outcome) in paused {
        outcome.unwrap_or_else(|error| panic!("{id}: {}", chain(&error)));
    }
    assert!(lab.processes().is_empty());
    let census = host.recover(soon()).unwrap();
    assert_eq!(census.paused.len(), 5);
    for sandbox in sandboxes {
        sandbox.destroy().unwrap();
    }
}
