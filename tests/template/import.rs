//! Importing snapshot directories: captured ones, and those of the stand-in.

use std::fs::{self, File};
use std::io::BufRead;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rewake::fault::Faults;
use rewake::memory::{WORKING_SET_FILE, WorkingSet};
use rewake::plan::RootDisk;
use rewake::template::{
    DiskPath, ImportDisk, ImportError, ImportSpec, Kind, Manifest, MemoryImage, PathStrategy,
    Template, TemplateDisk, TemplateError, Transfer, import,
};
use rewake::vmm::api::Version;
use rustix::fs::FlockOperation;
use serde_json::{Value, json};

use super::faults::FailNth;
use super::place::{Root, chain, name, soon};

const IMAGE_BYTES: u64 = 1 << 20;

/// A snapshot directory of a Linux guest with a disk, as Cloud Hypervisor wrote it.
struct Source {
    root: Root,
    dir: PathBuf,
    image: PathBuf,
}

impl Source {
    /// Of a captured snapshot, with memory of ones and zeros.
    fn captured(test: &str, fixture: &str) -> Self {
        let root = Root::new(test);
        let dir = root.join("source");
        fs::create_dir(&dir).unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/snapshots");
        for file in ["config.json", "state.json"] {
            fs::copy(fixtures.join(fixture).join(file), dir.join(file)).unwrap();
        }
        let length = fs::read_to_string(fixtures.join(fixture).join("memory-ranges.size")).unwrap();
        if let Ok(length) = length.trim().parse() {
            let memory = File::create(dir.join("memory-ranges")).unwrap();
            memory.set_len(length).unwrap();
            let mut block = vec![0; 1 << 20];
            block[..4096].fill(1);
            std::os::unix::fs::FileExt::write_all_at(&memory, &block, 8 << 20).unwrap();
        }
        let image = root.join("image.raw");
        fs::write(&image, vec![3; IMAGE_BYTES as usize]).unwrap();
        Self { root, dir, image }
    }

    fn linux(test: &str) -> Self {
        Self::captured(test, "ch-v53/linux-guest-256m")
    }

    fn spec(&self) -> ImportSpec {
        ImportSpec {
            disk: ImportDisk::Adopted(self.image.clone()),
            ..ImportSpec::new(name("adopted"), &self.dir)
        }
    }

    fn import(&self, spec: &ImportSpec) -> Result<Template, ImportError> {
        let store = self.root.store(Faults::NONE);
        import(spec, &store, &mut |_| {}, soon())
    }

    /// The directory that the disk's recorded path lies in.
    fn recorded_dir(&self) -> PathBuf {
        let config: Value =
            serde_json::from_slice(&fs::read(self.dir.join("config.json")).unwrap()).unwrap();
        let path = Path::new(config["disks"][0]["path"].as_str().unwrap());
        path.parent().unwrap().to_owned()
    }

    fn wrenn(&self, more: &Value) {
        let mut meta = json!({
            "template_name": "py", "team_id": "t", "template_id": "i", "vcpus": 2,
            "memory_mb": 256, "timeout_sec": 0, "base_template": "/w/rootfs.ext4",
            "sandbox_dir": self.recorded_dir(), "created_at": "2026-11-01T00:00:00Z",
        });
        for (key, value) in more.as_object().unwrap() {
            meta[key] = value.clone();
        }
        fs::write(self.dir.join("wrenn-snapshot.json"), meta.to_string()).unwrap();
    }

    /// What would show that the source was written to.
    fn census(&self) -> Vec<(PathBuf, u64, i64, i64)> {
        let entries = fs::read_dir(&self.dir).unwrap().flatten();
        let mut names: Vec<_> = entries
            .map(|entry| {
                let found = entry.metadata().unwrap();
                (entry.path(), found.ino(), found.mtime(), found.mtime_nsec())
            })
            .collect();
        names.sort();
        names
    }
}

#[test]
fn a_working_set_comes_along_where_it_is_of_this_memory() {
    let pages = |pages| WorkingSet::of_pages(pages);
    let cases = [
        ("whole", Some(pages(vec![5, 600])), true),
        ("of more memory", Some(pages(vec![5, 1 << 20])), false),
        ("damaged", None, false),
    ];
    for (case, set, kept) in cases {
        let source = Source::linux("set");
        match &set {
            Some(set) => set.save(&source.dir).unwrap(),
            None => fs::write(source.dir.join(WORKING_SET_FILE), "something").unwrap(),
        }
        let before = source.census();
        let template = source.import(&source.spec()).unwrap();
        let found = template.working_set().unwrap();
        assert_eq!(found, set.filter(|_| kept), "{case}");
        assert_eq!(source.census(), before, "{case}");
    }
}

fn told(outcome: Result<Template, ImportError>) -> ImportError {
    outcome.expect_err("it must be refused")
}

#[test]
fn a_plain_snapshot_becomes_a_template_and_stays_as_it_was() {
    let source = Source::linux("plain");
    let before = source.census();
    let template = source.import(&source.spec()).unwrap();
    let manifest: &Manifest = template.manifest();
    assert_eq!(manifest.kind, Kind::Imported);
    assert_eq!(manifest.vcpus, 2);
    assert_eq!(manifest.memory.image, MemoryImage::Ranges);
    assert_eq!(manifest.memory.bytes, 256 << 20);
    assert_eq!(manifest.vmm.version, Some(Version::V53));
    assert!(
        manifest.vmm.build.contains("guessed"),
        "{}",
        manifest.vmm.build
    );
    assert_eq!(
        manifest.disk,
        Some(TemplateDisk::Own { bytes: IMAGE_BYTES })
    );
    assert_eq!(manifest.disk_path, DiskPath::Rewritten);
    let cpu = manifest.host.cpu.as_ref().unwrap();
    assert_eq!((cpu.vendor.as_str(), cpu.family), ("AuthenticAMD", 0x17));
    assert_eq!(
        fs::read(template.disk().unwrap()).unwrap(),
        vec![3; IMAGE_BYTES as usize]
    );

    // The same bytes, and what was zero in them takes no room any more.
    let ours = fs::metadata(template.memory_image()).unwrap();
    let theirs = fs::metadata(source.dir.join("memory-ranges")).unwrap();
    assert_eq!(ours.len(), theirs.len());
    assert!(
        ours.blocks() < theirs.blocks(),
        "{} of {}",
        ours.blocks(),
        theirs.blocks()
    );
    let mut page = vec![0; 8192];
    let memory = File::open(template.memory_image()).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut page, 8 << 20).unwrap();
    assert!(page[..4096].iter().all(|byte| *byte == 1) && page[4096..].iter().all(|b| *b == 0));
    assert_eq!(source.census(), before, "the source is only read");
}

#[test]
fn a_wrenn_snapshot_is_rewritten_or_keeps_its_recorded_directory() {
    let source = Source::linux("wrenn");
    source.wrenn(&json!({"colour": "green"}));
    // A template of a Wrenn host has its disk beside it.
    fs::rename(&source.image, source.dir.join("rootfs.ext4")).unwrap();
    let template = source
        .import(&ImportSpec::new(name("a"), &source.dir))
        .unwrap();
    assert_eq!(
        template.manifest().disk_path,
        DiskPath::Rewritten,
        "that is as good"
    );
    let origin = template.manifest().lineage.origin.clone().unwrap();
    assert!(origin.starts_with("Wrenn, template py"), "{origin}");
    let device = PathBuf::from("/dev/dm-7");
    assert_eq!(
        template.root_disk(Some(device.clone())),
        RootDisk::At(device.clone())
    );

    let spec = ImportSpec {
        path: PathStrategy::Recorded(None),
        ..ImportSpec::new(name("b"), &source.dir)
    };
    let template = source.import(&spec).unwrap();
    let sandbox_dir = source.recorded_dir();
    assert_eq!(
        template.root_disk(Some(device.clone())),
        RootDisk::AtRecordedPath {
            device,
            sandbox_dir
        }
    );
}

#[test]
fn memory_and_disk_may_be_linked_or_stay_where_they_are() {
    let source = Source::linux("linked");
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let spec = ImportSpec {
        transfer: Transfer::Link,
        ..source.spec()
    };
    let template = source.import(&spec).unwrap();
    assert_eq!(
        inode(&template.memory_image()),
        inode(&source.dir.join("memory-ranges"))
    );
    assert_eq!(inode(&template.disk().unwrap()), inode(&source.image));

    let spec = ImportSpec {
        name: name("b"),
        disk: ImportDisk::InPlace(source.image.clone()),
        ..source.spec()
    };
    let template = source.import(&spec).unwrap();
    assert_eq!(
        template.disk().unwrap(),
        source.image.canonicalize().unwrap()
    );
    template.check(&Default::default()).unwrap();
    fs::write(&source.image, vec![4; IMAGE_BYTES as usize]).unwrap();
    let damaged = template.check(&Default::default()).unwrap_err();
    assert!(chain(&damaged).ends_with("has changed since the template was made"));
}

#[test]
fn memory_that_a_zone_was_mapped_from_is_asked_for_and_taken() {
    let source = Source::captured("zone", "ch-v53/zone-file-shared-4g");
    let spec = ImportSpec::new(name("a"), &source.dir);
    let refused = told(source.import(&spec));
    assert!(
        matches!(refused, ImportError::MemoryElsewhere { .. }),
        "{}",
        chain(&refused)
    );
    let memory = source.root.join("ram");
    File::create(&memory).unwrap().set_len(4 << 30).unwrap();
    let spec = ImportSpec {
        memory: Some(memory),
        ..spec
    };
    let template = source.import(&spec).unwrap();
    assert_eq!(template.manifest().memory.image, MemoryImage::Zone);
    assert_eq!(template.manifest().disk, None);
}

const LOCKED: &str = "REWAKE_TEST_LOCKED_IMAGE";

/// Not a test of its own: a process that has an image open, as a VM does.
#[test]
fn child_that_locks_an_image() {
    let Some(path) = std::env::var_os(LOCKED) else {
        return;
    };
    let file = File::options().read(true).write(true).open(path).unwrap();
    rustix::fs::fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
    println!("locked");
    let _ = std::io::stdin().lines().next();
}

#[test]
fn what_cannot_become_a_template_is_refused_with_what_to_do() {
    let source = Source::linux("refused");
    let bare = ImportSpec::new(name("a"), &source.dir);
    let refused = told(source.import(&bare));
    assert!(refused.to_string().contains("--rootfs"), "{refused}");

    source.wrenn(&json!({"cow_path": "/w/sb-1.cow"}));
    let refused = told(source.import(&bare));
    assert!(
        refused.to_string().contains("/w/sb-1.cow: flatten"),
        "{refused}"
    );
    source.wrenn(&json!({"vcpus": 4}));
    let refused = told(source.import(&source.spec()));
    assert!(
        matches!(refused, ImportError::Contradiction { recorded: 4, .. }),
        "{refused}"
    );
    source.wrenn(&json!({"sandbox_dir": "/somewhere/else"}));
    let spec = ImportSpec {
        path: PathStrategy::Recorded(None),
        ..source.spec()
    };
    let refused = told(source.import(&spec));
    assert!(
        matches!(refused, ImportError::NotRestorable(_)),
        "{}",
        chain(&refused)
    );
    fs::remove_file(source.dir.join("wrenn-snapshot.json")).unwrap();

    // Cloud Hypervisor locks its images; so does this child in its place.
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "import::child_that_locks_an_image",
            "--nocapture",
        ])
        .env(LOCKED, &source.image)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufReader::new(holder.stdout.take().unwrap()).lines();
    assert!(
        lines
            .map_while(Result::ok)
            .any(|line| line.ends_with("locked"))
    );
    let refused = told(source.import(&source.spec()));
    assert!(
        matches!(refused, ImportError::InUse { .. }),
        "{}",
        chain(&refused)
    );
    drop(holder.stdin.take());
    // How it ends does not matter: nobody reads what it prints.
    holder.wait().unwrap();

    let config = source.dir.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let mut broken: Value = serde_json::from_str(&text).unwrap();
    broken["tpm"] = json!({"socket": "/tmp/tpm"});
    fs::write(&config, broken.to_string()).unwrap();
    let refused = told(source.import(&source.spec()));
    assert!(
        chain(&refused).contains("tpm.socket"),
        "{}",
        chain(&refused)
    );
    fs::write(&config, text).unwrap();

    let memory = File::options()
        .write(true)
        .open(source.dir.join("memory-ranges"))
        .unwrap();
    memory.set_len(1 << 20).unwrap();
    let refused = told(source.import(&source.spec()));
    assert!(
        matches!(
            refused,
            ImportError::Template(TemplateError::Snapshot { .. })
        ),
        "{}",
        chain(&refused)
    );
    assert!(source.root.names().is_empty(), "{:?}", source.root.names());

    let plain = Source::captured("diskless", "ch-v53/private-128m");
    let refused = told(plain.import(&plain.spec()));
    assert!(
        matches!(refused, ImportError::NeedlessDisk { .. }),
        "{refused}"
    );
}

#[test]
fn every_step_of_an_import_may_fail_and_nothing_is_left() {
    let source = Source::linux("steps");
    let injector = Arc::new(FailNth::default());
    let store = source.root.store(Faults::inject(injector.clone()));
    let before = source.census();
    for late in [false, true] {
        for target in 0.. {
            injector.arm(target, late);
            let outcome = import(&source.spec(), &store, &mut |_| {}, soon());
            let Some(step) = injector.disarm() else {
                assert!(target > 25, "the shim sees every step, not {target}");
                store.remove(outcome.unwrap().id(), soon()).unwrap();
                break;
            };
            let case = format!("late: {late}, {target}: {step}");
            let error = outcome.expect_err(&case);
            assert!(source.root.names().is_empty(), "{case}: {}", chain(&error));
        }
    }
    assert_eq!(source.census(), before);
}
