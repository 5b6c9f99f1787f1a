//! Memory modes against the stand-in: what is chosen, what is left alone, who may have a file.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::plan::{MemoryMode, MemoryPolicy, PlanError, Unfit};
use rewake::restore::{Cause, RestoreError, Restored, Stage, restore};
use rewake::snapshot::{ClaimError, reserve};
use rewake::vmm::api::{Client, Version};

use crate::stage::{Frozen, Scene};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn wake(scene: &Scene, policy: impl Into<MemoryPolicy>) -> Result<Restored, RestoreError> {
    let mut spec = scene.spec();
    spec.inputs.memory_mode = policy.into();
    restore(&spec, soon())
}

/// The guest is the one that was frozen, and lives.
fn assert_goes_on(scene: &Scene, frozen: &serde_json::Value, what: &str) {
    let state = scene.guest_state();
    assert_eq!(
        state["nonce"], frozen["nonce"],
        "{what}: restored, not rebooted"
    );
    assert!(
        state["counter"].as_u64() > frozen["counter"].as_u64(),
        "{what}"
    );
    assert_eq!(state["bad_pages"], 0, "{what}");
}

fn end(restored: Restored) {
    let leftovers = restored.destroy(Deadline::NEVER);
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

fn refusal(outcome: Result<Restored, RestoreError>) -> RestoreError {
    match outcome {
        Ok(_) => panic!("it must not succeed"),
        Err(error) => error,
    }
}

fn assert_busy(scene: &Scene, mode: MemoryMode) {
    let error = refusal(wake(scene, mode));
    assert_eq!(error.stage, Stage::Plan, "{mode}");
    assert!(
        matches!(*error.cause, Cause::Claim(ClaimError::Busy { .. })),
        "{mode}: {error:?}"
    );
}

/// Pauses and snapshots into a directory beside the others, with the VM's own memory file.
fn freeze_again(restored: &Restored, own_memory: &Path, into: &Path) {
    let mut api = Client::connect(restored.vmm.api_path(), soon()).unwrap();
    fs::create_dir(into).unwrap();
    api.pause(soon()).unwrap();
    api.snapshot(into, soon()).unwrap();
    assert!(!into.join("memory-ranges").exists(), "memory was written");
    fs::hard_link(own_memory, into.join("memory")).unwrap();
}

#[test]
fn a_template_is_mapped_by_many_and_stays_as_it_was() {
    for frozen in [Frozen::make("many"), Frozen::make_on_a_file("many-zone")] {
        let directory = frozen.dir.join("snapshot");
        let file = ["memory", "memory-ranges"].map(|name| directory.join(name));
        let file = file.iter().find(|file| file.exists()).unwrap();
        let before = fs::read(file).unwrap();
        let scenes: Vec<_> = (0..3).map(|_| Scene::of(&frozen, &[])).collect();
        let clones: Vec<_> = scenes
            .iter()
            .map(|scene| wake(scene, MemoryPolicy::default()).unwrap())
            .collect();
        for (scene, clone) in scenes.iter().zip(&clones) {
            assert_eq!(clone.memory_mode, MemoryMode::Map);
            assert_eq!(clone.timeline.notes(), ["Memory mode map was chosen"]);
            assert_goes_on(scene, &frozen.state, "map");
        }
        for clone in clones {
            assert!(reserve(&directory).unwrap_err().is_busy());
            end(clone);
        }
        drop(reserve(&directory).unwrap());
        assert!(
            before == fs::read(file).unwrap(),
            "the template was written to"
        );
    }
}

#[test]
fn the_owner_of_a_memory_file_writes_to_it_alone_round_after_round() {
    let frozen = Frozen::make("owner");
    let mut snapshot = frozen.dir.join("snapshot");
    let mut memory = snapshot.join("memory-ranges");
    let mut before = frozen.state.clone();
    for round in 0..4 {
        let scene = Scene::at(&frozen, &snapshot);
        let restored = wake(&scene, MemoryPolicy::Auto { owned: true }).unwrap();
        assert_eq!(restored.memory_mode, MemoryMode::Shared, "round {round}");
        assert_goes_on(&scene, &before, &format!("round {round}"));
        assert!(reserve(&snapshot).unwrap_err().is_busy());
        for mode in MemoryMode::ALL {
            if mode == MemoryMode::Shared {
                let error = refusal(wake(&Scene::at(&frozen, &snapshot), mode));
                assert_eq!(error.stage, Stage::Plan, "{error:?}");
            } else {
                assert_busy(&Scene::at(&frozen, &snapshot), mode);
            }
        }
        before = scene.guest_state();
        let next = frozen.dir.join(format!("next-{round}"));
        freeze_again(&restored, &memory, &next);
        end(restored);
        (memory, snapshot) = (next.join("memory"), next);
    }
}

#[test]
fn a_file_that_others_map_is_mapped_instead_of_written_to() {
    let frozen = Frozen::make("in-use");
    let clone = wake(&Scene::of(&frozen, &[]), MemoryMode::Map).unwrap();
    let scene = Scene::of(&frozen, &[]);
    let second = wake(&scene, MemoryPolicy::Auto { owned: true }).unwrap();
    assert_eq!(second.memory_mode, MemoryMode::Map);
    assert_eq!(
        second.timeline.notes(),
        [
            "Memory mode shared cannot be used: memory-ranges is in use",
            "Memory mode map was chosen",
        ]
    );
    let error = refusal(wake(&Scene::of(&frozen, &[]), MemoryMode::Shared));
    let in_use = PlanError::MemoryMode {
        mode: MemoryMode::Shared,
        reason: Unfit::InUse {
            file: "memory-ranges",
        },
    };
    assert_eq!(format!("{:?}", error.cause), format!("Plan({in_use:?})"));
    end(clone);
    end(second);
}

#[test]
fn memory_that_was_read_belongs_to_nobody_afterwards() {
    let frozen = Frozen::make("read");
    for mode in [MemoryMode::Copy, MemoryMode::OnDemand] {
        let clone = wake(&Scene::of(&frozen, &[]), mode).unwrap();
        drop(reserve(&frozen.dir.join("snapshot")).unwrap());
        end(clone);
    }
    let reserved = reserve(&frozen.dir.join("snapshot")).unwrap();
    for mode in [MemoryMode::Map, MemoryMode::OnDemand, MemoryMode::Copy] {
        assert_busy(&Scene::of(&frozen, &[]), mode);
    }
    drop(reserved);
}

#[test]
fn a_template_on_a_file_serves_every_mode() {
    let frozen = Frozen::make_on_a_file("every");
    // The one that writes to it comes last.
    for mode in MemoryMode::ALL.into_iter().rev() {
        let scene = Scene::of(&frozen, &[]);
        let restored = wake(&scene, mode).unwrap_or_else(|error| panic!("{mode}: {error:?}"));
        assert_eq!(restored.memory_mode, mode);
        assert_eq!(restored.timeline.notes(), [""; 0], "{mode}");
        assert_goes_on(&scene, &frozen.state, mode.name());
        end(restored);
    }
}

#[test]
fn a_version_that_writes_into_templates_never_maps_one() {
    let frozen = Frozen::make("v50");
    let version = ["--sim".to_owned(), "version=50".to_owned()];
    let file = frozen.dir.join("snapshot/memory-ranges");
    let before = fs::read(&file).unwrap();
    // It shows what it is only when it answers; the guest has not run by then.
    let scene = Scene::with_args(&frozen, &version);
    let error = refusal(wake(&scene, MemoryPolicy::default()));
    assert!(
        matches!(
            *error.cause,
            Cause::MemoryMode {
                mode: MemoryMode::Map,
                reason: Unfit::WritesPrivateFiles { .. }
            }
        ),
        "{error:?}"
    );
    assert!(error.leftovers.is_empty());
    scene.assert_nothing_left();

    let mut spec = scene.spec();
    spec.vmm.version = Some(Version::V50);
    let restored = restore(&spec, soon()).unwrap();
    assert_eq!(restored.memory_mode, MemoryMode::Copy);
    assert_eq!(
        restored.timeline.notes(),
        [
            "Memory mode map cannot be used: \
             Cloud Hypervisor 50.0.0 opens the file of a private mapping for writing",
            "Memory mode on-demand cannot be used: \
             Cloud Hypervisor 50.0.0 knows no on-demand restore",
            "Memory mode copy was chosen",
        ]
    );
    assert_goes_on(&scene, &frozen.state, "copy");
    end(restored);
    assert!(
        before == fs::read(&file).unwrap(),
        "the template was written to"
    );

    let scene = Scene::with_args(&frozen, &["--sim".to_owned(), "version=51".to_owned()]);
    let restored = wake(&scene, MemoryPolicy::default()).unwrap();
    assert_eq!(restored.memory_mode, MemoryMode::Map);
    assert_goes_on(&scene, &frozen.state, "v51");
    end(restored);
}
