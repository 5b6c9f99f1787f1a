//! Building templates with the stand-in, over a loopback port.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::envd::client::{Client as Agent, ClientOptions, Incarnation};
use rewake::envd::init::{Init, Lifecycle};
use rewake::fault::Faults;
use rewake::ids::SandboxId;
use rewake::plan::{MemoryMode, MemoryPolicy, RestoreInputs};
use rewake::resource::disk::{DiskConfig, DiskMode, DiskPool};
use rewake::restore::{RestoreSpec, Restored, restore};
use rewake::template::{
    BuildCause, BuildError, BuildNetwork, BuildSpec, BuildStage, HostFacts, Kind, Template,
    TemplateDisk, TemplateStore, Workshop, build,
};
use rewake::units::Bytes;
use rewake::vmm::launch::LaunchSpec;
use serde_json::Value;

use super::faults::FailNth;
use super::place::{Root, chain, name, soon};

const STAND_IN: &str = env!("CARGO_BIN_EXE_rewake-sim");
const IMAGE_BYTES: u64 = 1 << 20;

/// An address of the loopback interface that was free a moment ago.
pub(crate) fn free_address() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap()
}

/// The stand-in, with its guest at this address.
pub(crate) fn stand_in(guest: SocketAddr, faults: &[&str]) -> LaunchSpec {
    let words = faults.iter().map(|fault| format!("fault={fault}"));
    let words = [format!("envd=tcp:{guest}")].into_iter().chain(words);
    LaunchSpec {
        program: STAND_IN.into(),
        args: words.flat_map(|word| ["--sim".to_owned(), word]).collect(),
        ..LaunchSpec::default()
    }
}

/// Everything that one build needs, and a look at what it left.
pub(crate) struct Yard {
    pub(crate) root: Root,
    pub(crate) guest: SocketAddr,
    image: PathBuf,
    pub(crate) store: TemplateStore,
    disks: DiskPool,
}

impl Yard {
    pub(crate) fn new(test: &str, faults: Faults) -> Self {
        let root = Root::new(test);
        fs::write(root.join("kernel"), "the stand-in does not read it").unwrap();
        let mut bytes = vec![0; IMAGE_BYTES as usize];
        bytes[4096..8192].fill(7);
        fs::write(root.join("image.raw"), &bytes).unwrap();
        Self::over(root, free_address(), faults)
    }

    /// In a root that has its files already.
    pub(crate) fn over(root: Root, guest: SocketAddr, faults: Faults) -> Self {
        let config = DiskConfig {
            runtime_dir: root.join("run"),
            ..DiskConfig::default()
        };
        let disks = DiskPool::open(config, faults.clone());
        let store = root.store(faults);
        let image = root.join("image.raw");
        Self {
            guest,
            image,
            store,
            disks,
            root,
        }
    }

    pub(crate) fn spec(&self, faults: &[&str]) -> BuildSpec {
        let vmm = stand_in(self.guest, faults);
        BuildSpec {
            rootfs: Some(self.image.clone()),
            disk_mode: DiskMode::Only(rewake::resource::disk::DiskKind::Copy),
            memory: Bytes::mib(64),
            runtime_dir: self.root.join("run"),
            ..BuildSpec::new(name("python"), self.root.join("kernel"), vmm)
        }
    }

    pub(crate) fn build(&self, spec: &BuildSpec) -> Result<Template, BuildError> {
        let workshop = Workshop {
            store: &self.store,
            disks: &self.disks,
            network: BuildNetwork::Direct(self.guest),
        };
        build(spec, workshop, &mut |_| {}, soon())
    }

    pub(crate) fn assert_nothing_left(&self, names: &[&str], case: &str) {
        assert_eq!(self.root.names(), names, "{case}");
        let vms = self.root.join("run/vm");
        let left: Vec<_> = fs::read_dir(vms).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{case}: {left:?}");
        assert_eq!(processes(self.guest), Vec::<u32>::new(), "{case}");
    }
}

/// The processes whose command line names the guest's address.
fn processes(guest: SocketAddr) -> Vec<u32> {
    let mark = format!("envd=tcp:{guest}");
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&mark))
    })
    .collect()
}

/// What the stand-in's guest says of itself.
fn guest_state(guest: SocketAddr) -> Value {
    let incarnation = Incarnation {
        sandbox: SandboxId::random(),
        lifecycle: Lifecycle::random(),
    };
    let agent = Agent::new(guest, incarnation, ClientOptions::default());
    let answer = agent.get_other("/sim/state", soon()).unwrap();
    serde_json::from_slice(&answer.body).unwrap()
}

/// Restores a template on a disk of its own, at a free address.
pub(crate) fn wake(
    template: &Template,
    device: Option<&Path>,
    runtime: &Path,
) -> (Restored, SocketAddr) {
    let guest = free_address();
    let mut inputs = RestoreInputs::new(SandboxId::random(), template.snapshot_dir());
    inputs.template_id = Some(template.id().clone());
    inputs.memory_mode = MemoryPolicy::Only(MemoryMode::Map);
    inputs.disk = template.root_disk(device.map(Path::to_owned));
    let mut spec = RestoreSpec::new(inputs, STAND_IN, guest);
    spec.vmm = stand_in(guest, &[]);
    spec.runtime_dir = runtime.to_owned();
    spec.init = Some(Init::new());
    let restored = restore(&spec, Deadline::after(Duration::from_secs(20)));
    (
        restored.unwrap_or_else(|error| panic!("{}", chain(&error))),
        guest,
    )
}

#[test]
fn a_built_template_is_whole_and_wakes_twice_with_the_same_guest() {
    let yard = Yard::new("build", Faults::NONE);
    let mut seen = Vec::new();
    let workshop = Workshop {
        store: &yard.store,
        disks: &yard.disks,
        network: BuildNetwork::Direct(yard.guest),
    };
    let spec = yard.spec(&[]);
    let template = build(&spec, workshop, &mut |it| seen.push(it.stage), soon())
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    seen.dedup();
    let first = seen.first().copied();
    assert_eq!(
        (first, seen.last().copied()),
        (Some(BuildStage::Check), Some(BuildStage::Publish))
    );
    yard.assert_nothing_left(&["python"], "built");

    let told = template.manifest();
    assert_eq!((told.kind, told.vcpus), (Kind::Built, 1));
    assert_eq!(told.memory.bytes, 64 << 20);
    assert_eq!(told.memory.length, 64 << 20);
    assert!(told.memory.materialised);
    assert_eq!(told.disk, Some(TemplateDisk::Own { bytes: IMAGE_BYTES }));
    assert_eq!(told.vmm.version.unwrap().major, 53);
    assert!(told.vmm.build.contains("stand-in"), "{}", told.vmm.build);
    assert_eq!(told.agent.as_ref().unwrap().family, "Wrenn");
    assert_eq!(told.guest_kernel.as_ref().unwrap().bytes, 29);
    assert_eq!(
        fs::read(template.disk().unwrap()).unwrap(),
        fs::read(&yard.image).unwrap()
    );
    let facts = HostFacts::gather(&spec.vmm);
    assert_eq!(facts.vmm.unwrap().major, 53);
    template.check(&facts).unwrap();

    let memory =
        rewake::template::Sha256Hex::of_reader(fs::File::open(template.memory_image()).unwrap())
            .unwrap();
    let runtime = yard.root.join("run");
    let disks = ["one", "two"].map(|disk| {
        let path = yard.root.join(disk);
        fs::copy(template.disk().unwrap(), &path).unwrap();
        path
    });
    let woken = disks
        .each_ref()
        .map(|disk| wake(&template, Some(disk), &runtime));
    let states = woken.each_ref().map(|(_, guest)| guest_state(*guest));
    assert_eq!(states[0]["nonce"], states[1]["nonce"], "one guest, twice");
    let busy = yard.store.remove(template.id(), soon()).unwrap_err();
    assert!(
        busy.to_string().ends_with("2 VMs have its memory mapped"),
        "{busy}"
    );
    for (restored, _) in woken {
        assert_eq!(restored.memory_mode, MemoryMode::Map);
        assert!(restored.destroy(soon()).is_empty());
    }
    let after = fs::File::open(template.memory_image()).unwrap();
    let after = rewake::template::Sha256Hex::of_reader(after).unwrap();
    assert_eq!(after, memory, "no clone has written to the template");
    yard.store.remove(template.id(), soon()).unwrap();
    yard.assert_nothing_left(&[], "removed");
}

#[test]
fn a_guest_without_a_disk_makes_a_template_without_one() {
    let yard = Yard::new("diskless", Faults::NONE);
    let spec = BuildSpec {
        rootfs: None,
        ..yard.spec(&[])
    };
    let template = yard
        .build(&spec)
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(template.manifest().disk, None);
    assert_eq!(template.disk(), None);
    let (restored, guest) = wake(&template, None, &yard.root.join("run"));
    assert!(guest_state(guest)["nonce"].is_string());
    assert!(restored.destroy(soon()).is_empty());
}

#[test]
fn a_name_that_is_taken_is_refused_before_anything_is_booted() {
    let yard = Yard::new("taken", Faults::NONE);
    fs::create_dir(yard.root.join("templates/python")).unwrap();
    let refused = yard.build(&yard.spec(&["start:die"])).unwrap_err();
    assert_eq!(refused.stage, BuildStage::Check);
    assert!(
        chain(&refused).ends_with("never overwritten"),
        "{}",
        chain(&refused)
    );
    yard.assert_nothing_left(&["python"], "taken");
}

#[test]
fn a_guest_that_the_disk_has_no_room_for_is_refused_before_it_boots() {
    let yard = Yard::new("room", Faults::NONE);
    let spec = BuildSpec {
        memory: Bytes::gib(1 << 20),
        ..yard.spec(&["start:die"])
    };
    let refused = yard.build(&spec).unwrap_err();
    assert_eq!(refused.stage, BuildStage::Check);
    assert!(
        matches!(*refused.cause, BuildCause::Space(_)),
        "{}",
        chain(&refused)
    );
    yard.assert_nothing_left(&[], "no room");
}

#[test]
fn whatever_breaks_in_the_vmm_or_the_guest_leaves_nothing_and_says_where() {
    for (fault, stage) in [
        ("start:die", BuildStage::Launch),
        ("on-ping:die", BuildStage::Launch),
        ("on-create:error", BuildStage::Boot),
        ("on-boot:die", BuildStage::Boot),
        ("guest:never", BuildStage::Ready),
        ("guest:garbage", BuildStage::Ready),
        ("on-pause:error", BuildStage::Freeze),
        ("on-pause:die", BuildStage::Freeze),
        ("on-snapshot:error", BuildStage::Freeze),
        ("mid-snapshot:die", BuildStage::Freeze),
        ("mid-snapshot:error", BuildStage::Freeze),
    ] {
        let yard = Yard::new("broken", Faults::NONE);
        let spec = BuildSpec {
            boot_budget: Duration::from_millis(1500),
            ..yard.spec(&[fault])
        };
        let error = yard.build(&spec).expect_err(fault);
        let told = format!("{fault}: {}", chain(&error));
        assert_eq!(error.stage, stage, "{told}");
        assert!(error.leftovers.is_empty(), "{told}: {:?}", error.leftovers);
        if stage == BuildStage::Ready {
            assert!(error.is_timeout() && told.contains("--console"), "{told}");
        }
        yard.assert_nothing_left(&[], &told);
    }
}

#[test]
fn every_step_of_a_build_may_fail_and_nothing_is_left() {
    let injector = Arc::new(FailNth::default());
    let yard = Yard::new("steps", Faults::inject(injector.clone()));
    let image = fs::read(&yard.image).unwrap();
    for late in [false, true] {
        for target in 0.. {
            injector.arm(target, late);
            let outcome = yard.build(&yard.spec(&[]));
            let Some(step) = injector.disarm() else {
                assert!(target > 40, "the shim sees every step, not {target}");
                let template = outcome.unwrap_or_else(|error| panic!("{}", chain(&error)));
                template.check(&HostFacts::default()).unwrap();
                yard.store.remove(template.id(), soon()).unwrap();
                break;
            };
            let case = format!("late: {late}, {target}: {step}");
            let error = outcome.expect_err(&case);
            let left = error.leftovers.iter().map(ToString::to_string);
            let left: Vec<String> = left.collect();
            let told = format!("{}; {left:?}", chain(&error));
            assert!(told.contains(&step), "{case}: {told}");
            if let Some(first) = left.first() {
                // Only where the removal itself was made to fail; a sweep does it again.
                assert!(first.starts_with("Disk "), "{case}: {told}");
                assert_eq!(yard.store.sweep().unwrap().len(), 1, "{case}: {told}");
            } else {
                assert!(
                    !matches!(*error.cause, BuildCause::LeftOver),
                    "{case}: {told}"
                );
            }
            yard.assert_nothing_left(&[], &case);
        }
    }
    assert_eq!(
        fs::read(&yard.image).unwrap(),
        image,
        "the image is only read"
    );
}
