//! Templates of real Cloud Hypervisor with the probe guest: built in a network slot, and
//! imported from snapshots that Cloud Hypervisor was made to write by hand.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rewake::envd::init::Init;
use rewake::fault::Faults;
use rewake::host::{Host, HostConfig, LaunchOptions, ResumeOptions, Sandbox};
use rewake::ids::SandboxId;
use rewake::plan::{MemoryMode, MemoryPolicy};
use rewake::probe_guest::{Settings, expected_checksum};
use rewake::resource::disk::{DiskConfig, DiskMode, DiskPool};
use rewake::resource::net::{HostNet, NetConfig, Slot};
use rewake::restore::{RestoreSpec, Restored, restore};
use rewake::template::{
    BuildNetwork, BuildSpec, DiskPath, HostFacts, ImportDisk, ImportSpec, PathStrategy, Sha256Hex,
    Template, TemplateStore, Workshop, build, import,
};
use rewake::units::Bytes;
use rewake::wire::http::Method;
use rewake_sys::netns;
use rustix::mount::UnmountFlags;
use serde_json::{Value, json};

use super::lab::Lab;
use super::place::{chain, name, soon};

const PAGES: u64 = 64;

/// A host of its own for network slots, so that nothing of this machine's is touched.
struct Street {
    net: HostNet,
    netns: OwnedFd,
}

impl Street {
    fn new(dir: &Path) -> Self {
        let host = netns::run_in_new(|netns| netns).unwrap();
        let config = NetConfig {
            runtime_dir: dir.join("slots"),
            netns_dir: dir.join("netns"),
            ..NetConfig::default()
        };
        let net = HostNet::open_in(host.as_fd(), config, Faults::NONE).unwrap();
        net.prepare(soon()).unwrap();
        Self { net, netns: host }
    }
}

impl Drop for Street {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.net.config().netns_dir, UnmountFlags::DETACH);
    }
}

fn digest(path: &Path) -> Sha256Hex {
    Sha256Hex::of_reader(File::open(path).unwrap()).unwrap().0
}

fn image(path: &Path) -> PathBuf {
    fs::write(path, vec![5; 1 << 20]).unwrap();
    path.to_owned()
}

/// What the guest says of itself, with its memory checked against its nonce.
fn whole_guest(probe: &Value, sum: &Value) -> String {
    let nonce = probe["nonce"].as_str().unwrap().to_owned();
    let expected = expected_checksum(u64::from_str_radix(&nonce, 16).unwrap(), PAGES);
    assert_eq!(sum["checksum"], format!("{expected:016x}"), "{sum}");
    nonce
}

fn ask(slot: &Slot, target: &str) -> Value {
    use rewake::envd::client::{Client, ClientOptions, Incarnation};
    use rewake::envd::init::Lifecycle;
    use rewake::envd::socket::InNetns;
    let incarnation = Incarnation {
        sandbox: SandboxId::random(),
        lifecycle: Lifecycle::random(),
    };
    let netns = slot.netns().try_clone_to_owned().unwrap();
    let options = ClientOptions {
        sockets: std::sync::Arc::new(InNetns::new(netns)),
        ..ClientOptions::default()
    };
    let guest = "169.254.0.21:49983".parse().unwrap();
    let answer = Client::new(guest, incarnation, options).get_other(target, soon());
    serde_json::from_slice(&answer.unwrap().body).unwrap()
}

fn woken(spec: &RestoreSpec) -> Restored {
    restore(spec, soon()).unwrap_or_else(|error| panic!("{}: {:#?}", chain(&error), error.log))
}

#[test]
fn root_kvm_builds_and_wakes_twice() {
    let test = "root_kvm_builds_and_wakes_twice";
    let Some(lab) = Lab::new(test) else { return };
    let street = Street::new(lab.dir());
    let store = TemplateStore::open(lab.dir(), Faults::NONE).unwrap();
    let config = DiskConfig {
        runtime_dir: lab.dir().join("run"),
        ..DiskConfig::default()
    };
    let disks = DiskPool::open(config, Faults::NONE);
    let blank = lab.restore_spec(Path::new("/"), MemoryPolicy::Only(MemoryMode::Map));
    let image = image(&lab.dir().join("image.raw"));
    let spec = BuildSpec {
        command_line: format!("fill={PAGES} touch=0"),
        rootfs: Some(image.clone()),
        disk_mode: DiskMode::Auto,
        memory: Bytes::mib(128),
        runtime_dir: blank.runtime_dir.clone(),
        ..BuildSpec::new(name("probe"), lab.dir().join("guest"), blank.vmm.clone())
    };
    let workshop = Workshop {
        store: &store,
        disks: &disks,
        network: BuildNetwork::Slot(&street.net),
    };
    let begun = std::time::Instant::now();
    let mut before = None;
    let template = build(
        &spec,
        workshop,
        &mut |it| {
            if before != Some(it.stage) {
                eprintln!("{:>9.1?} {}", begun.elapsed(), it.stage.name());
                before = Some(it.stage);
            }
        },
        soon(),
    );
    let template = template.unwrap_or_else(|e| panic!("{}: {:#?}", chain(&e), e.log));
    eprintln!("{:>9.1?} built", begun.elapsed());
    assert!(
        street.net.slots().list().unwrap().is_empty(),
        "no slot is left"
    );
    assert_eq!(digest(&template.disk().unwrap()), digest(&image));
    let facts = HostFacts::gather(&blank.vmm);
    assert!(facts.vmm.is_some() && facts.cpu.is_some(), "{facts:?}");
    template
        .check(&facts)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    let cpu = template.manifest().host.cpu.as_ref().unwrap();
    assert!(!cpu.features.is_empty(), "{cpu}");
    eprintln!("frozen on {cpu}, with {} feature words", cpu.features.len());

    let memory = digest(&template.memory_image());
    let mut clones = Vec::new();
    for number in 0..2 {
        let slot = street.net.create("clone", soon()).unwrap();
        let disk = lab.dir().join(format!("clone-{number}.raw"));
        fs::copy(template.disk().unwrap(), &disk).unwrap();
        let mut spec = lab.restore_spec(template.dir(), MemoryPolicy::Auto { owned: false });
        spec.inputs.sandbox_id = SandboxId::random();
        spec.inputs.disk = template.root_disk(Some(disk));
        spec.netns = Some(slot.netns_path().into());
        spec.init = Some(Init::new());
        let restored = woken(&spec);
        assert_eq!(restored.memory_mode, MemoryMode::Map);
        clones.push((slot, restored));
    }
    let nonces: Vec<String> = clones
        .iter()
        .map(|(slot, _)| {
            let sum = ask(slot, &format!("/probe/checksum?pages={PAGES}"));
            whole_guest(&ask(slot, "/probe"), &sum)
        })
        .collect();
    assert_eq!(nonces[0], nonces[1], "one guest, twice");
    let busy = store.remove(template.id(), soon()).unwrap_err();
    assert!(
        busy.to_string().ends_with("2 VMs have its memory mapped"),
        "{busy}"
    );
    for (slot, restored) in clones {
        assert!(restored.destroy(soon()).is_empty());
        street.net.destroy(slot, soon()).unwrap();
    }
    assert_eq!(
        digest(&template.memory_image()),
        memory,
        "no clone wrote to it"
    );
    store.remove(template.id(), soon()).unwrap();
    street.net.retire(soon()).unwrap();
}

/// The descriptors of a process that lead to this file.
fn has_open(pid: u32, file: &Path) -> bool {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    links.into_iter().any(|link| link == file)
}

/// Wakes an imported template on a disk of its own, in the lab's namespace.
fn wake_imported(lab: &Lab, template: &Template, disk: Option<&Path>, nonce: &str) {
    template
        .check(&HostFacts::of_machine())
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    for mode in [MemoryMode::Map, MemoryMode::OnDemand] {
        let mut spec = lab.restore_spec(template.dir(), MemoryPolicy::Only(mode));
        spec.inputs.disk = template.root_disk(disk.map(Path::to_owned));
        spec.init = Some(Init::new());
        let restored = woken(&spec);
        assert_eq!(restored.memory_mode, mode);
        let sum = lab.json(Method::Get, &format!("/probe/checksum?pages={PAGES}"));
        assert_eq!(
            whole_guest(&lab.probe(), &sum),
            nonce,
            "{mode:?}: not rebooted"
        );
        if let Some(disk) = disk {
            let (pid, file) = (restored.vmm.pid(), disk.canonicalize().unwrap());
            assert!(
                has_open(pid, &file),
                "{mode:?}: {} is not open",
                file.display()
            );
        }
        assert!(restored.destroy(soon()).is_empty());
    }
}

/// Launches it as a sandbox, pauses, resumes and destroys that.
fn live_on(lab: &Lab, template: &Template, nonce: &str) {
    let street = Street::new(lab.dir());
    let mut config = HostConfig::new(lab.dir());
    config.net = street.net.config().clone();
    config = config.with_runtime_dir(lab.dir().join("run"));
    let number = street.netns.as_raw_fd();
    config.netns = Some(format!("/proc/{}/fd/{number}", std::process::id()).into());
    config.vmm = lab.restore_spec(Path::new("/"), MemoryMode::Map).vmm;
    let host = Host::open(config).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let template = host.template(template.id().as_str());
    let template = template.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let sandbox = host.launch(&template, LaunchOptions::default());
    let mut sandbox = sandbox.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let memory = |sandbox: &Sandbox| {
        let agent = sandbox.agent().unwrap();
        let read = |target: &str| {
            let answer = agent.get_other(target, soon()).unwrap();
            serde_json::from_slice::<Value>(&answer.body).unwrap()
        };
        let sum = read(&format!("/probe/checksum?pages={PAGES}"));
        whole_guest(&read("/probe"), &sum)
    };
    assert_eq!(memory(&sandbox), nonce, "launched");
    let id = sandbox.id().clone();
    sandbox
        .pause()
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    let resumed = host.resume(&id, ResumeOptions::default());
    let resumed = resumed.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(memory(&resumed), nonce, "resumed");
    resumed
        .destroy()
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
}

#[test]
fn root_kvm_imports_a_plain_snapshot() {
    let test = "root_kvm_imports_a_plain_snapshot";
    let Some(mut lab) = Lab::new(test) else {
        return;
    };
    let machine = lab.boot(&Settings::default());
    let nonce = machine.probe()["nonce"].as_str().unwrap().to_owned();
    let source = lab.dir().join("plain");
    machine.freeze(&source);
    let store = TemplateStore::open(lab.dir(), Faults::NONE).unwrap();
    let spec = ImportSpec::new(name("plain"), &source);
    let template = import(&spec, &store, &mut |_| {}, soon());
    let template = template.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fs::remove_dir_all(&source).unwrap();
    let room = |path: &Path| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap());
    let taken = room(&template.memory_image()) * 512;
    eprintln!("128 MiB of saved memory take {} KiB", taken >> 10);
    assert!(taken < 64 << 20, "{taken}: zeros were not punched");
    wake_imported(&lab, &template, None, &nonce);
    live_on(&lab, &template, &nonce);
}

#[test]
fn root_kvm_imports_a_wrenn_snapshot() {
    let test = "root_kvm_imports_a_wrenn_snapshot";
    let Some(mut lab) = Lab::new(test) else {
        return;
    };
    // As such a host starts it: shared memory, the disk in a directory of the sandbox's own.
    let sandbox_dir = lab.dir().join("sandbox");
    fs::create_dir(&sandbox_dir).unwrap();
    let recorded = image(&sandbox_dir.join("rootfs.ext4"));
    let words = format!(
        "--memory size=128M,shared=on --disk path={},image_type=raw \
         --balloon size=0,deflate_on_oom=on,free_page_reporting=on",
        recorded.display()
    );
    let machine = lab.boot_with(&Settings::default(), &words);
    let nonce = machine.probe()["nonce"].as_str().unwrap().to_owned();
    let source = lab.dir().join("wrenn");
    machine.freeze(&source);
    fs::rename(&recorded, source.join("rootfs.ext4")).unwrap();
    let meta = json!({
        "template_name": "py", "team_id": "0", "template_id": "1", "vcpus": 1,
        "memory_mb": 128, "timeout_sec": 0, "base_template": "/var/lib/wrenn/rootfs.ext4",
        "sandbox_dir": sandbox_dir, "created_at": "2026-11-01T00:00:00Z",
    });
    fs::write(source.join("wrenn-snapshot.json"), meta.to_string()).unwrap();

    let store = TemplateStore::open(lab.dir(), Faults::NONE).unwrap();
    for (id, path, expected) in [
        ("rewritten", PathStrategy::Auto, DiskPath::Rewritten),
        (
            "recorded",
            PathStrategy::Recorded(None),
            DiskPath::Recorded {
                sandbox_dir: sandbox_dir.clone(),
            },
        ),
    ] {
        let spec = ImportSpec {
            path,
            ..ImportSpec::new(name(id), &source)
        };
        assert_eq!(spec.disk, ImportDisk::Beside);
        let template = import(&spec, &store, &mut |_| {}, soon());
        let template = template.unwrap_or_else(|error| panic!("{id}: {}", chain(&error)));
        assert_eq!(template.manifest().disk_path, expected);
        let disk = lab.dir().join(format!("{id}.raw"));
        fs::copy(template.disk().unwrap(), &disk).unwrap();
        wake_imported(&lab, &template, Some(&disk), &nonce);
        live_on(&lab, &template, &nonce);
        assert!(
            fs::read_dir(&sandbox_dir).unwrap().next().is_none(),
            "{id}: links are left"
        );
    }
}
