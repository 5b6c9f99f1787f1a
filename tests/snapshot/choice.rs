//! Which memory mode a snapshot gets, and why not a better one.

use std::fs;

use rewake::ids::SandboxId;
use rewake::plan::{
    Circumstances, MemoryMode, MemoryPolicy, PassedOver, Plan, PlanError, RestoreInputs, RootDisk,
    StateEdit, Unfit, plan,
};
use rewake::snapshot::{
    HostPathPolicy, NotMappable, Recorded, SnapshotDir, SnapshotError, SnapshotLimits,
};
use rewake::units::Bytes;
use rewake::vmm::api::Version;

use crate::scratch::Scratch;

const OWNED: MemoryPolicy = MemoryPolicy::Auto { owned: true };
const ANYBODY: MemoryPolicy = MemoryPolicy::Auto { owned: false };

fn around() -> Circumstances {
    Circumstances {
        memory_path: "/proc/self/fd/5".into(),
        ..Circumstances::default()
    }
}

fn plan_for(
    scratch: &Scratch,
    policy: impl Into<MemoryPolicy>,
    around: &Circumstances,
) -> Result<Plan, PlanError> {
    let snapshot = SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).unwrap();
    let mut inputs = RestoreInputs::new(SandboxId::random(), scratch.root());
    inputs.memory_mode = policy.into();
    inputs.disk = RootDisk::AsRecorded;
    inputs.policy = HostPathPolicy {
        memory_files: Recorded::Refuse,
        ..HostPathPolicy::AS_RECORDED
    };
    plan(&inputs, &snapshot, around)
}

fn reasons(plan: &Plan) -> Vec<(MemoryMode, Unfit)> {
    let passed = plan.passed_over.iter();
    passed
        .map(|PassedOver { mode, reason }| (*mode, reason.clone()))
        .collect()
}

fn refused(outcome: Result<Plan, PlanError>) -> (MemoryMode, Unfit) {
    match outcome {
        Err(PlanError::MemoryMode { mode, reason }) => (mode, reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn whatever_has_its_ram_in_one_file_is_mapped() {
    for name in ["private-128m", "memfd-shared-4g", "hotplug-acpi-512m"] {
        for version in ["ch-v52", "ch-v53"] {
            let scratch = Scratch::snapshot(&format!("{version}/{name}"));
            for (policy, mode, shared) in [
                (ANYBODY, MemoryMode::Map, false),
                (OWNED, MemoryMode::Shared, true),
            ] {
                let plan = plan_for(&scratch, policy, &around()).unwrap();
                assert_eq!(plan.memory_mode, mode, "{name}");
                assert_eq!(plan.passed_over, [], "{name}");
                assert!(matches!(plan.state, StateEdit::Mapped(_)), "{name}");
                let zones = plan.config.memory.zones.unwrap();
                assert_eq!(zones[0].file.as_deref(), Some("/proc/self/fd/5".as_ref()));
                assert_eq!((zones.len(), zones[0].shared), (1, shared), "{name}");
                assert_eq!(plan.config.memory.size, 0, "{name}");
            }
        }
    }
}

#[test]
fn what_cannot_be_mapped_falls_back_with_its_reason_and_is_refused_where_nothing_else_will_do() {
    let scratch = Scratch::snapshot("ch-v53/two-zones-256m");
    let zones = Unfit::NotMappable(NotMappable::SeveralZones { count: 2 });
    let plan = plan_for(&scratch, OWNED, &around()).unwrap();
    assert_eq!(plan.memory_mode, MemoryMode::OnDemand);
    assert_eq!(
        reasons(&plan),
        [
            (MemoryMode::Shared, zones.clone()),
            (MemoryMode::Map, zones.clone())
        ]
    );
    let error = rewake_sys::CallError::new("userfaultfd", rustix::io::Errno::PERM);
    let without = Circumstances {
        no_userfaultfd: Some(error),
        ..around()
    };
    let plan = plan_for(&scratch, ANYBODY, &without).unwrap();
    assert_eq!(plan.memory_mode, MemoryMode::Copy);
    let no_userfaultfd = (MemoryMode::OnDemand, Unfit::NoUserfaultfd { error });
    assert_eq!(
        reasons(&plan),
        [(MemoryMode::Map, zones.clone()), no_userfaultfd.clone()]
    );
    assert_eq!(
        refused(plan_for(&scratch, MemoryMode::OnDemand, &without)),
        no_userfaultfd
    );
    for mode in [MemoryMode::Shared, MemoryMode::Map] {
        let outcome = plan_for(&scratch, mode, &around());
        assert_eq!(refused(outcome), (mode, zones.clone()));
    }
}

#[test]
fn an_old_version_is_spared_what_it_cannot_do() {
    let scratch = Scratch::snapshot("ch-v53/private-128m");
    for (version, expected, passed) in [
        (Version::V50, MemoryMode::Copy, 2),
        (Version::V51, MemoryMode::Map, 0),
        (Version::V52, MemoryMode::Map, 0),
    ] {
        let known = Circumstances {
            version: Some(version),
            ..around()
        };
        let plan = plan_for(&scratch, ANYBODY, &known).unwrap();
        assert_eq!(plan.memory_mode, expected, "{version}");
        assert_eq!(plan.passed_over.len(), passed, "{version}");
    }
}

#[test]
fn a_file_that_others_use_is_not_written_to() {
    let scratch = Scratch::snapshot("ch-v53/private-128m");
    let in_use = Unfit::InUse {
        file: "memory-ranges",
    };
    let used = Circumstances {
        not_own: Some(in_use.clone()),
        ..around()
    };
    let plan = plan_for(&scratch, OWNED, &used).unwrap();
    assert_eq!(plan.memory_mode, MemoryMode::Map);
    assert_eq!(reasons(&plan), [(MemoryMode::Shared, in_use.clone())]);
    let outcome = plan_for(&scratch, MemoryMode::Shared, &used);
    assert_eq!(refused(outcome), (MemoryMode::Shared, in_use));
}

#[test]
fn the_file_of_a_shared_zone_is_mapped_or_read_as_if_it_had_been_saved() {
    let scratch = Scratch::snapshot("ch-v53/zone-file-shared-4g");
    let memory = fs::File::create_new(scratch.path("memory")).unwrap();
    memory.set_len(4 << 30).unwrap();
    let plan = plan_for(&scratch, ANYBODY, &around()).unwrap();
    assert_eq!(plan.memory_mode, MemoryMode::Map);

    for mode in [MemoryMode::OnDemand, MemoryMode::Copy] {
        let plan = plan_for(&scratch, mode, &around()).unwrap();
        let zones = plan.config.memory.zones.unwrap();
        assert_eq!((&zones[0].file, zones[0].shared), (&None, false), "{mode}");
        let StateEdit::ReadFromZone(layout) = plan.state else {
            panic!("{:?}", plan.state)
        };
        let snapshot = SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).unwrap();
        let state = snapshot.state().read_from_file(&layout).unwrap();
        let limits = rewake::snapshot::StateLimits::default();
        let state = rewake::snapshot::State::parse(state, &limits).unwrap();
        assert_eq!(state.memory().saved(), Bytes::gib(4));
        let ranges = state.memory().ranges();
        let ranges: Vec<_> = ranges.iter().map(|r| (r.gpa, r.length)).collect();
        assert_eq!(ranges, [(0, 3 << 30), (4 << 30, 1 << 30)]);
        assert!(state.memory().mappings().iter().all(|m| m.file_offset == 0));
    }
}

#[test]
fn memory_in_a_file_elsewhere_is_used_only_by_somebody_who_vouches_for_it() {
    let scratch = Scratch::snapshot("ch-v53/zone-file-shared-4g");
    scratch.edit("config.json", r#""file":"ram""#, r#""file":"/some/ram""#);
    for mode in [MemoryMode::Shared, MemoryMode::Map] {
        let outcome = plan_for(&scratch, mode, &around());
        assert_eq!(refused(outcome), (mode, Unfit::NoFile));
    }
    assert!(matches!(
        plan_for(&scratch, ANYBODY, &around()),
        Err(PlanError::Config(_))
    ));
    let snapshot = SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).unwrap();
    let mut inputs = RestoreInputs::new(SandboxId::random(), scratch.root());
    inputs.policy = HostPathPolicy::AS_RECORDED;
    let recorded = plan(&inputs, &snapshot, &around()).unwrap();
    assert_eq!(recorded.memory_mode, MemoryMode::Shared);
    assert_eq!(recorded.state, StateEdit::AsRecorded);
    let zones = recorded.config.memory.zones.unwrap();
    assert_eq!(zones[0].file.as_deref(), Some("/some/ram".as_ref()));
    inputs.memory_mode = MemoryMode::Copy.into();
    let outcome = plan(&inputs, &snapshot, &around());
    assert_eq!(refused(outcome), (MemoryMode::Copy, Unfit::RecordedFile));
}

#[test]
fn a_snapshot_has_its_memory_in_one_file_that_is_long_enough() {
    let open = |scratch: &Scratch| {
        SnapshotDir::open(scratch.root(), &SnapshotLimits::default()).map(|_| ())
    };
    let scratch = Scratch::snapshot("ch-v53/zone-file-shared-4g");
    let memory = fs::File::create_new(scratch.path("memory")).unwrap();
    memory.set_len((4 << 30) - 4096).unwrap();
    assert!(matches!(
        open(&scratch),
        Err(SnapshotError::ZoneFileShort { .. })
    ));
    memory.set_len(4 << 30).unwrap();
    open(&scratch).unwrap();
    scratch.memory(0);
    assert!(matches!(open(&scratch), Err(SnapshotError::TwoMemoryFiles)));

    let scratch = Scratch::snapshot("ch-v53/private-128m");
    fs::rename(scratch.path("memory-ranges"), scratch.path("memory")).unwrap();
    assert!(matches!(
        open(&scratch),
        Err(SnapshotError::MemoryMissing { .. })
    ));
    let scratch = Scratch::snapshot("ch-v53/zone-file-shared-4g");
    std::os::unix::fs::symlink("/etc/passwd", scratch.path("memory")).unwrap();
    assert!(matches!(
        open(&scratch),
        Err(SnapshotError::SymbolicLink { file: "memory" })
    ));
}
