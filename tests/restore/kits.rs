//! Warm kits with the stand-in: taken once, healthy or replaced, and nothing left of them.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::plan::{MemoryMode, MemoryPolicy, RootDisk};
use rewake::restore::kit::{Kit, KitMisuse, KitPool, KitPoolOptions, Places, is_kept, sweep};
use rewake::restore::{Cause, RestoreSpec, Stage, restore_with};
use rewake::timeline::Phase;
use rewake::units::Bytes;
use rewake_sys::process::Process;
use rustix::fs::FlockOperation;

use super::stage::{Frozen, Scene};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn kit(spec: &RestoreSpec) -> Kit {
    Kit::prepare(&spec.vmm, &spec.runtime_dir, None, soon()).unwrap()
}

fn pool(spec: &RestoreSpec, target: usize) -> KitPool {
    let options = KitPoolOptions {
        target,
        refill_interval_ms: 1,
        ..KitPoolOptions::default()
    };
    let pool = KitPool::start(
        spec.vmm.clone(),
        spec.runtime_dir.clone(),
        Places::Here,
        options,
    );
    let pool = pool.unwrap();
    assert!(pool.wait_settled(soon()), "{:?}", pool.stats());
    pool
}

fn memory_file(spec: &RestoreSpec) -> fs::File {
    fs::File::open(spec.inputs.snapshot_dir.join("memory-ranges")).unwrap()
}

#[test]
fn a_warm_kit_becomes_the_guest_that_was_frozen() {
    let frozen = Frozen::make("warm");
    for mode in [MemoryMode::Map, MemoryMode::OnDemand, MemoryMode::Copy] {
        let scene = Scene::of(&frozen, &[]);
        let mut spec = scene.spec();
        spec.inputs.memory_mode = MemoryPolicy::Only(mode);
        let kit = kit(&spec);
        let (pid, vm_dir) = (kit.process().pid, kit.vm_dir().to_owned());
        assert!(kit.is_healthy());
        assert!(kit.build().contains("stand-in"), "{}", kit.build());
        assert!(is_kept(&vm_dir).unwrap());
        let restored = restore_with(&spec, Some(kit), soon()).unwrap();
        assert_eq!(restored.vmm.pid(), pid, "{mode:?}: no other process");
        assert_eq!(scene.processes(), 1, "{mode:?}");
        assert_eq!(restored.vm_dir, vm_dir);
        assert_eq!(restored.memory_mode, mode);
        assert!(!is_kept(&vm_dir).unwrap(), "it is a sandbox's now");
        assert!(restored.timeline.notes()[0].contains("was warm"));
        for phase in [Phase::Planned, Phase::Spawned, Phase::Resumed, Phase::Ready] {
            assert!(restored.timeline.at(phase).is_some(), "{mode:?}: {phase:?}");
        }
        let link = vm_dir.join("memory");
        assert!(fs::symlink_metadata(&link).is_err(), "the link is gone");
        let state = scene.guest_state();
        assert_eq!(state["nonce"], frozen.state["nonce"], "{mode:?}");
        assert!(state["counter"].as_u64() > frozen.state["counter"].as_u64());
        assert!(restored.destroy(Deadline::NEVER).is_empty());
        scene.assert_nothing_left();
    }
}

/// The lock goes with the descriptor into the kit, outlives ours, and ends with the process.
#[test]
fn a_lock_that_was_entrusted_to_a_kit_lasts_as_long_as_its_process() {
    let frozen = Frozen::make("entrusted");
    let scene = Scene::of(&frozen, &[]);
    let spec = scene.spec();
    let kit = kit(&spec);
    let held = memory_file(&spec);
    rustix::fs::flock(&held, FlockOperation::NonBlockingLockShared).unwrap();
    kit.entrust(&[held.as_fd()]).unwrap();
    drop(held);
    let other = memory_file(&spec);
    let exclusive = || rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive);
    assert_eq!(exclusive(), Err(rustix::io::Errno::WOULDBLOCK));
    let restored = restore_with(&spec, Some(kit), soon()).unwrap();
    assert_eq!(exclusive(), Err(rustix::io::Errno::WOULDBLOCK));
    // Not even the program that restored it must go on: only the process counts.
    let (vmm, steps) = restored.into_parts();
    drop(vmm);
    assert_eq!(exclusive(), Err(rustix::io::Errno::WOULDBLOCK));
    assert!(
        rewake::resource::ledger::Ledger::from(steps)
            .unwind(soon())
            .is_empty()
    );
    // The kernel drops what was in flight when the process's descriptors are closed, which is
    // before its end can be seen.
    assert_eq!(exclusive(), Ok(()));
    scene.assert_nothing_left();
}

#[test]
fn a_kit_that_cannot_be_used_is_gone_with_its_typed_error() {
    let frozen = Frozen::make("unfit");
    let scene = Scene::of(&frozen, &[]);
    let mut wrong = scene.spec();
    wrong.inputs.snapshot_dir = frozen.dir.join("nowhere");
    let error = restore_with(&wrong, Some(kit(&wrong)), soon())
        .err()
        .unwrap();
    assert_eq!(error.stage, Stage::Check);
    scene.assert_nothing_left();

    let spec = scene.spec();
    let dead = kit(&spec);
    Process::open(dead.process().pid).unwrap().kill().unwrap();
    let error = restore_with(&spec, Some(dead), soon()).err().unwrap();
    assert!(error.is_vmm_death(), "{error:?}");
    assert!(error.leftovers.is_empty());
    scene.assert_nothing_left();

    let mut mounted = scene.spec();
    mounted.inputs.disk = RootDisk::AtRecordedPath {
        device: "/dev/null".into(),
        sandbox_dir: "/tmp".into(),
    };
    let error = restore_with(&mounted, Some(kit(&mounted)), soon())
        .err()
        .unwrap();
    // The stand-in's snapshot has no disk at all, so the plan refuses before the kit could.
    assert!(matches!(*error.cause, Cause::Plan(_)), "{error:?}");
    assert!(KitMisuse::PrivateMount.to_string().contains("mount"));
    scene.assert_nothing_left();
}

#[test]
fn a_pool_hands_out_healthy_kits_once_and_fills_up_again() {
    let frozen = Frozen::make("pool");
    let scene = Scene::of(&frozen, &[]);
    let mut spec = scene.spec();
    // No guest will run, and only one could have the scene's port.
    spec.vmm.args.clear();
    let processes = || rewake::vmm::orphan::list(&spec.runtime_dir);
    let pool = pool(&spec, 2);
    let stats = pool.stats();
    assert_eq!((stats.ready, processes().len()), (2, 2));
    // A page table, a stack, a heap: no process lives without private memory.
    assert!(stats.private_memory >= Bytes(2 * (64 << 10)), "{stats:?}");
    let (first, second) = (pool.take("a").unwrap(), pool.take("b").unwrap());
    let (first, second) = (first.unwrap().kit, second.unwrap().kit);
    assert_ne!(first.process(), second.process());
    assert!(pool.wait_settled(soon()));
    assert_eq!((pool.stats().ready, processes().len()), (2, 4));
    drop((first, second));
    assert_eq!(processes().len(), 2, "a dropped kit is gone");

    // A kit that died while it waited is never handed out.
    let victim = processes()[0].process.pid;
    Process::open(victim).unwrap().kill().unwrap();
    assert!(
        Process::open(victim)
            .unwrap()
            .wait_ended(Some(Duration::from_secs(10)))
            .unwrap()
    );
    let taken = [pool.take("c").unwrap(), pool.take("d").unwrap()];
    let alive: Vec<u32> = taken
        .iter()
        .flatten()
        .map(|warm| warm.kit.process().pid)
        .collect();
    assert!(!alive.contains(&victim), "{alive:?}");
    drop(taken);
    assert!(pool.wait_settled(soon()));
    assert_eq!(pool.stats().unhealthy, 1, "{:?}", pool.stats());
    assert!(pool.close(soon()).is_empty());
    scene.assert_nothing_left();
}

#[test]
fn an_exhausted_pool_says_so_at_once_and_a_broken_program_never_fills_it() {
    let frozen = Frozen::make("exhausted");
    let scene = Scene::of(&frozen, &[]);
    let mut spec = scene.spec();
    spec.vmm.program = "/nonexistent/cloud-hypervisor".into();
    let options = KitPoolOptions {
        target: 1,
        ..KitPoolOptions::default()
    };
    let pool = KitPool::start(spec.vmm, spec.runtime_dir, Places::Here, options).unwrap();
    assert!(!pool.wait_settled(Deadline::after(Duration::from_millis(200))));
    assert!(pool.take("a").unwrap().is_none());
    let stats = pool.stats();
    assert_eq!((stats.exhausted, stats.failed, stats.ready), (1, 1, 0));
    assert!(pool.close(soon()).is_empty());
    scene.assert_nothing_left();
}

/// The variable under which this test binary is the owner that is going to be killed.
const ROLE: &str = "REWAKE_TEST_OWNER_OF_KITS";

#[test]
fn kits_of_a_killed_owner_are_found_and_ended_and_those_of_a_living_one_are_not() {
    let name = "kits_of_a_killed_owner_are_found_and_ended_and_those_of_a_living_one_are_not";
    if let Some(snapshot) = std::env::var_os(ROLE) {
        own_until_killed(&PathBuf::from(snapshot));
    }
    let frozen = Frozen::make("killed-owner");
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("kits::{name}"), "--nocapture"])
        .env(ROLE, frozen.dir.join("run-killed"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = owner.stdout.take().unwrap();
    let mut text = Vec::new();
    while !text.ends_with(b"two kits\n") {
        let mut byte = [0];
        assert_eq!(output.read(&mut byte).unwrap(), 1, "the owner gave up");
        text.push(byte[0]);
    }
    let runtime = frozen.dir.join("run-killed");
    let found = sweep(&runtime, soon()).unwrap();
    assert_eq!((found.in_use.len(), found.reclaimed.len()), (2, 0));
    let pids: Vec<u32> = rewake::vmm::orphan::list(&runtime)
        .iter()
        .map(|it| it.process.pid)
        .collect();
    assert_eq!(pids.len(), 2);

    owner.kill().unwrap();
    owner.wait().unwrap();
    let found = sweep(&runtime, soon()).unwrap();
    assert!(found.stuck.is_empty(), "{:?}", found.stuck);
    assert_eq!((found.in_use.len(), found.reclaimed.len()), (0, 2));
    assert!(rewake::vmm::orphan::list(&runtime).is_empty());
    assert!(fs::read_dir(runtime.join("vm")).unwrap().next().is_none());
    let again = sweep(&runtime, soon()).unwrap();
    assert_eq!(again.reclaimed.len(), 0);
    assert!(sweep(&frozen.dir.join("nowhere"), soon()).is_ok());
}

fn own_until_killed(runtime: &Path) -> ! {
    let vmm = rewake::vmm::launch::LaunchSpec {
        program: env!("CARGO_BIN_EXE_rewake-sim").into(),
        ..Default::default()
    };
    let options = KitPoolOptions {
        target: 2,
        ..KitPoolOptions::default()
    };
    let pool = KitPool::start(vmm, runtime.to_owned(), Places::Here, options).unwrap();
    assert!(pool.wait_settled(soon()));
    println!("two kits");
    loop {
        std::thread::park();
    }
}
