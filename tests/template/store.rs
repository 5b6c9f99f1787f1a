//! The store of templates.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rewake::fault::Faults;
use rewake::ids::SandboxId;
use rewake::memory::{WORKING_SET_FILE, WorkingSet};
use rewake::resource::disk::{DiskConfig, DiskKind, DiskMode, DiskPool};
use rewake::resource::ledger::Step;
use rewake::template::{
    Cpu, Damage, HostFacts, Incompatible, Kind, MemoryImage, Origin, TemplateDisk, TemplateError,
};
use rewake::vmm::api::Version;
use rustix::fs::FlockOperation;

use super::faults::FailNth;
use super::place::{DISK_BYTES, Root, chain, fill, make, name, soon, staged};

#[test]
fn a_published_template_is_listed_described_and_removed() {
    let root = Root::new("life");
    let store = root.store(Faults::NONE);
    let id = name("python");
    let missing = store.get(&id).unwrap_err();
    assert!(missing.is_missing(), "{missing:?}");
    let (stage, manifest) = staged(&store, &id).unwrap();
    assert!(store.list().unwrap().is_empty(), "a stage is no template");
    let published = store.publish(stage, &manifest).unwrap();

    assert_eq!(store.list().unwrap(), std::slice::from_ref(&id));
    let template = store.get(&id).unwrap();
    assert_eq!(template, published);
    let told = template.manifest();
    assert_eq!((told.kind, told.vcpus), (Kind::Built, 1));
    assert_eq!(told.memory.image, MemoryImage::Zone);
    assert_eq!((told.memory.bytes, told.memory.length), (4 << 30, 4 << 30));
    assert_eq!(told.disk, Some(TemplateDisk::Own { bytes: DISK_BYTES }));
    let cpu = told
        .host
        .cpu
        .as_ref()
        .expect("the snapshot names its processor");
    assert_eq!((cpu.vendor.as_str(), cpu.family), ("AuthenticAMD", 0x19));
    assert!(cpu.features.len() >= 8, "{cpu:?}");
    assert_eq!(template.disk().unwrap(), template.dir().join("rootfs.raw"));
    assert!(store.users(&id).unwrap().is_empty());

    store.remove(&id, soon()).unwrap();
    assert!(root.names().is_empty());
    assert!(store.remove(&id, soon()).unwrap_err().is_missing());
    assert!(template.hold().unwrap_err().is_missing());
}

#[test]
fn saved_memory_is_described_as_what_it_is() {
    let root = Root::new("saved");
    let store = root.store(Faults::NONE);
    let stage = store.stage().unwrap();
    fill(stage.path(), "memfd-shared-4g", "memory-ranges");
    let origin = Origin::new(Kind::Imported, HostFacts::default());
    let manifest = stage.describe(&name("saved"), origin).unwrap();
    assert_eq!(manifest.memory.image, MemoryImage::Ranges);
    let template = store.publish(stage, &manifest).unwrap();
    assert!(template.memory_image().ends_with("memory-ranges"));
    let other = staged(&store, &name("other")).unwrap().1;
    assert_ne!(manifest.memory.layout_sha256, other.memory.layout_sha256);
}

#[test]
fn an_existing_template_is_never_overwritten() {
    let root = Root::new("occupied");
    let store = root.store(Faults::NONE);
    let id = name("python");
    // Both were staged before either had its name.
    let (first, manifest) = staged(&store, &id).unwrap();
    let (second, other) = staged(&store, &id).unwrap();
    File::create(second.rootfs())
        .unwrap()
        .set_len(DISK_BYTES)
        .unwrap();
    store.publish(first, &manifest).unwrap();
    let inode = rustix::fs::stat(store.get(&id).unwrap().disk().unwrap())
        .unwrap()
        .st_ino;
    let refused = store.publish(second, &other).unwrap_err();
    assert!(
        matches!(refused, TemplateError::Occupied { .. }),
        "{refused:?}"
    );
    let now = rustix::fs::stat(store.get(&id).unwrap().disk().unwrap())
        .unwrap()
        .st_ino;
    assert_eq!(inode, now);
    assert_eq!(root.names(), ["python"], "nothing is left of the second");
}

#[test]
fn what_does_not_belong_into_a_template_is_not_published() {
    let root = Root::new("stray");
    let store = root.store(Faults::NONE);
    for stray in ["notes.txt", "disk/x", "rewake.json"] {
        let (stage, manifest) = staged(&store, &name("a")).unwrap();
        let path = stage.path().join(stray);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "x").unwrap();
        let refused = store.publish(stage, &manifest).unwrap_err();
        assert!(
            matches!(refused, TemplateError::Stray { .. }),
            "{refused:?}"
        );
    }
    let (stage, manifest) = staged(&store, &name("a")).unwrap();
    File::options()
        .write(true)
        .open(stage.memory())
        .unwrap()
        .set_len(4096)
        .unwrap();
    let refused = store.publish(stage, &manifest).unwrap_err();
    assert!(
        matches!(refused, TemplateError::Damaged { .. }),
        "{refused:?}"
    );
    assert!(root.names().is_empty());
}

#[test]
fn a_working_set_belongs_to_a_template_and_harms_nothing_when_it_is_damaged() {
    let root = Root::new("set");
    let store = root.store(Faults::NONE);
    let id = name("python");
    let set = WorkingSet::of_pages(vec![1, 2, 3, 700]);
    let (stage, manifest) = staged(&store, &id).unwrap();
    set.save(stage.path()).unwrap();
    let template = store.publish(stage, &manifest).unwrap();
    assert_eq!(template.working_set().unwrap(), Some(set));
    // It may be replaced, be damaged, or be gone, and the template is whole.
    let other = WorkingSet::of_pages(vec![77]);
    other.save(template.dir()).unwrap();
    assert_eq!(template.working_set().unwrap(), Some(other));
    let path = template.dir().join(WORKING_SET_FILE);
    for damaged in [&b""[..], b"something"] {
        fs::write(&path, damaged).unwrap();
        template.working_set().unwrap_err();
        template.check(&HostFacts::default()).unwrap();
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(template.working_set().unwrap(), None);
    template.check(&HostFacts::default()).unwrap();
    store.remove(&id, soon()).unwrap();
    assert!(root.names().is_empty());
}

#[test]
fn a_template_that_cannot_run_here_is_refused_early_with_the_reason() {
    let root = Root::new("check");
    let store = root.store(Faults::NONE);
    let id = name("python");
    let stage = store.stage().unwrap();
    fill(stage.path(), "zone-file-shared-4g", "memory");
    let origin = Origin {
        vmm: Some(Version::V53),
        ..Origin::new(Kind::Built, HostFacts::default())
    };
    let manifest = stage.describe(&id, origin).unwrap();
    let template = store.publish(stage, &manifest).unwrap();
    let cpu = manifest.host.cpu.clone().unwrap();
    let here = HostFacts {
        kernel: "6.12".to_owned(),
        cpu: Some(cpu.clone()),
        vmm: Some(Version {
            minor: 1,
            ..Version::V53
        }),
    };
    template.check(&here).unwrap();
    template
        .check(&HostFacts::default())
        .expect("what is not known is no reason");

    let host = |facts: &HostFacts| match template.check(facts).unwrap_err() {
        TemplateError::Incompatible { source, .. } => source,
        other => panic!("{}", chain(&other)),
    };
    let older = HostFacts {
        vmm: Some(Version::V52),
        ..here.clone()
    };
    assert!(matches!(host(&older), Incompatible::Vmm { .. }));
    let other = HostFacts {
        cpu: Some(Cpu {
            vendor: "GenuineIntel".to_owned(),
            ..cpu.clone()
        }),
        ..here.clone()
    };
    assert!(matches!(host(&other), Incompatible::Cpu(_)));
    let mut lesser = cpu;
    lesser.features[0].bits = 0;
    let lesser = HostFacts {
        cpu: Some(lesser),
        ..here.clone()
    };
    let refused = template.check(&lesser).unwrap_err();
    assert!(
        chain(&refused).contains("leaf 0x1.0 ECX bits 13"),
        "{}",
        chain(&refused)
    );

    let damage = |what: &str| match template.check(&here).unwrap_err() {
        TemplateError::Damaged { source, .. } => source,
        other => panic!("{what}: {}", chain(&other)),
    };
    let memory = File::options()
        .write(true)
        .open(template.memory_image())
        .unwrap();
    memory.set_len(1 << 30).unwrap();
    assert!(matches!(damage("memory"), Damage::Length { .. }));
    memory.set_len(4 << 30).unwrap();
    let path = template.dir().join("state.json");
    let state = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    state.read_exact_at(&mut byte, 200).unwrap();
    state.write_all_at(&[byte[0] ^ 1], 200).unwrap();
    assert!(matches!(damage("state"), Damage::Checksum { .. }));
    state.write_all_at(&byte, 200).unwrap();
    template.check(&here).unwrap();
    fs::remove_file(template.disk().unwrap()).unwrap();
    assert!(matches!(damage("disk"), Damage::Missing { .. }));
}

#[test]
fn a_template_whose_memory_is_mapped_is_busy() {
    let root = Root::new("mapped");
    let store = root.store(Faults::NONE);
    let id = name("python");
    make(&store, &id).unwrap();
    let template = store.get(&id).unwrap();
    let clones: Vec<File> = (0..2)
        .map(|_| {
            let clone = File::open(template.memory_image()).unwrap();
            rustix::fs::flock(&clone, FlockOperation::NonBlockingLockShared).unwrap();
            clone
        })
        .collect();
    let busy = store.remove(&id, soon()).unwrap_err();
    let TemplateError::Busy { by, .. } = &busy else {
        panic!("{}", chain(&busy));
    };
    assert!(by.vms > 0 && by.disks.is_empty(), "{busy}");
    assert!(busy.to_string().contains("mapped"), "{busy}");
    template.check(&HostFacts::default()).unwrap();
    drop(clones);

    let hold = template.hold().unwrap();
    let busy = store.remove(&id, soon()).unwrap_err();
    assert!(busy.to_string().contains("launched"), "{busy}");
    drop(hold);
    store.remove(&id, soon()).unwrap();
}

#[test]
fn a_template_whose_image_carries_a_disk_is_busy_also_while_its_sandbox_is_paused() {
    let root = Root::new("base");
    let store = root.store(Faults::NONE);
    let id = name("python");
    make(&store, &id).unwrap();
    let disks = root.join("sandboxes/sb-1/disk");
    fs::create_dir_all(&disks).unwrap();
    let config = DiskConfig {
        runtime_dir: root.join("run"),
        ..DiskConfig::default()
    };
    let pool = DiskPool::open(config, Faults::NONE);
    let image = store.get(&id).unwrap().disk().unwrap();
    let sandbox = SandboxId::new("sb-1").unwrap();
    let mode = DiskMode::Only(DiskKind::Copy);
    let disk = pool.create(&sandbox, &image, &disks, mode, soon()).unwrap();
    // The sandbox is paused: only files are left of its disk.
    drop(disk);
    let busy = store.remove(&id, soon()).unwrap_err();
    assert!(
        busy.is_busy() && busy.to_string().ends_with("the base of sb-1"),
        "{busy}"
    );
    assert_eq!(store.users(&id).unwrap().disks, ["sb-1"]);
    pool.remove_by_id(&sandbox, &disks, false, soon()).unwrap();
    store.remove(&id, soon()).unwrap();
}

#[test]
fn a_sweep_clears_what_the_dead_left_and_nothing_else() {
    let root = Root::new("sweep");
    let store = root.store(Faults::NONE);
    make(&store, &name("python")).unwrap();
    let alive = store.stage().unwrap();
    let other = root.join("something");
    let step = Step::Directory {
        path: other.clone(),
    };
    alive.note(&step).unwrap();
    for name in [".stage-dead", ".gone-dead", "notes"] {
        let path = root.join("templates").join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("memory"), "x").unwrap();
        fs::write(path.join("journal"), serde_json::to_string(&step).unwrap()).unwrap();
    }
    fs::create_dir(&other).unwrap();
    let swept = store.sweep().unwrap();
    assert_eq!(swept.len(), 2, "{swept:?}");
    assert!(swept.iter().all(|it| it.leftovers.is_empty()), "{swept:?}");
    assert!(!other.exists(), "what the dead maker had noted is undone");
    let staged = alive.path().file_name().unwrap().to_str().unwrap();
    assert_eq!(root.names(), [staged, "notes", "python"]);
    assert_eq!(store.list().unwrap(), [name("notes"), name("python")]);
    let refused = store.get(&name("notes")).unwrap_err();
    assert!(
        chain(&refused).contains("rewake.json"),
        "{}",
        chain(&refused)
    );
    alive.discard().unwrap();
    // What has no manifest, or no image that could be one, can be removed, too.
    fs::write(root.join("templates/notes/rootfs.raw"), "no sectors").unwrap();
    store.remove(&name("notes"), soon()).unwrap();
    assert_eq!(root.names(), ["python"]);
}

#[test]
fn every_step_may_fail_and_there_is_the_whole_template_or_none() {
    let root = Root::new("faults");
    let injector = Arc::new(FailNth::default());
    let store = root.store(Faults::inject(injector.clone()));
    let id = name("python");
    for late in [false, true] {
        for target in 0.. {
            injector.arm(target, late);
            let outcome = make(&store, &id);
            let Some(step) = injector.disarm() else {
                assert!(target > 12, "the shim sees every step, not {target}");
                outcome.unwrap();
                store.remove(&id, soon()).unwrap();
                break;
            };
            let case = format!("make, late: {late}, {target}: {step}");
            let error = outcome.expect_err(&case);
            assert!(chain(&error).contains(&step), "{case}: {}", chain(&error));
            assert!(root.names().is_empty(), "{case}: {:?}", root.names());
        }
        for target in 0.. {
            make(&store, &id).unwrap();
            injector.arm(target, late);
            let outcome = store.remove(&id, soon());
            let Some(step) = injector.disarm() else {
                assert!(target > 4, "the shim sees every step, not {target}");
                outcome.unwrap();
                break;
            };
            let case = format!("remove, late: {late}, {target}: {step}");
            let error = outcome.expect_err(&case);
            assert!(chain(&error).contains(&step), "{case}: {}", chain(&error));
            match store.get(&id) {
                Ok(template) => {
                    template.check(&HostFacts::default()).expect(&case);
                    store.remove(&id, soon()).unwrap();
                }
                Err(gone) => assert!(gone.is_missing(), "{case}: {}", chain(&gone)),
            }
            store.sweep().unwrap();
            assert!(root.names().is_empty(), "{case}: {:?}", root.names());
        }
    }
}
