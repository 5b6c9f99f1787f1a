//! Warm kits with real Cloud Hypervisors.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rewake::deadline::Deadline;
use rewake::plan::{MemoryMode, MemoryPolicy};
use rewake::probe_guest::{Settings, expected_checksum};
use rewake::restore::kit::Kit;
use rewake::restore::restore_with;
use rewake::snapshot::SnapshotDir;
use rewake::wire::http::Method;
use rewake_sys::netns;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::lab::Lab;

#[test]
fn root_kvm_a_warm_kit_becomes_the_guest_and_keeps_its_file() {
    // Sockets have short paths only.
    let Some(mut lab) = Lab::new("root_kvm_a_warm_kit_becomes_the_guest_and_keeps_its_file") else {
        return;
    };
    let snapshot = lab.dir().join("snapshot");
    let machine = lab.boot(&Settings::default());
    let nonce = machine.probe()["nonce"].as_str().unwrap().to_owned();
    let requests = |probe: &serde_json::Value| probe["requests"].as_u64().unwrap();
    let before = requests(&machine.probe());
    machine.freeze(&snapshot);
    SnapshotDir::open(&snapshot, &rewake::snapshot::SnapshotLimits::default()).unwrap();
    let namespace = netns::open(&lab.netns_path()).unwrap();
    let page = fs::metadata(snapshot.join("memory-ranges")).unwrap().len() / 4096 - 1000;
    // The one that writes to the file comes last.
    let modes = [
        MemoryMode::Map,
        MemoryMode::OnDemand,
        MemoryMode::Copy,
        MemoryMode::Shared,
    ];
    for mode in modes {
        let spec = lab.restore_spec(&snapshot, MemoryPolicy::Only(mode));
        let netns = Some(namespace.as_fd());
        let deadline = Deadline::after(std::time::Duration::from_secs(60));
        let kit = Kit::prepare(&spec.vmm, &spec.runtime_dir, netns, deadline).unwrap();
        let process = kit.process();
        assert!(kit.private_memory().unwrap().0 > 0);
        let restored = restore_with(&spec, Some(kit), deadline).unwrap();
        assert_eq!(restored.vmm.pid(), process.pid, "{mode}");
        assert_eq!(restored.memory_mode, mode);
        let probe = lab.probe();
        assert_eq!(probe["nonce"], *nonce, "{mode}: restored, not rebooted");
        // However many connections there were, one has asked, and then we; where the machine
        // is busy, another one after some 25 ms.
        let asked = requests(&probe) - before;
        assert!((2..=4).contains(&asked), "{mode}: {asked} requests");
        let sum = lab.json(Method::Get, "/probe/checksum?pages=64");
        let expected = expected_checksum(u64::from_str_radix(&nonce, 16).unwrap(), 64);
        assert_eq!(
            sum["checksum"],
            format!("{expected:016x}"),
            "{mode}: memory is whole"
        );
        // Mapped memory is spoken for while the process lives, though it inherited nothing.
        let file = fs::File::open(snapshot.join("memory-ranges")).unwrap();
        let lock = || rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        let expected = if mode.maps_file() {
            Err(Errno::WOULDBLOCK)
        } else {
            Ok(())
        };
        assert_eq!(lock(), expected, "{mode}");
        rustix::fs::flock(&file, FlockOperation::Unlock).unwrap();
        // What the guest writes is in the file where that is its own, and nowhere else.
        let target = format!("/probe/word?page={page}&pages=1&value=4711");
        assert_eq!(lab.json(Method::Post, &target)["pages"], 1, "{mode}");
        // The guest counts its RAM without the hole below 1 MiB: it is up to 256 pages further on.
        let holds = |page: u64| {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, page * 4096).unwrap();
            u64::from_le_bytes(word) == 4711
        };
        let found = (page..page + 256).any(holds);
        assert_eq!(found, mode == MemoryMode::Shared, "{mode}");
        assert!(restored.destroy(deadline).is_empty());
        assert_eq!(lock(), Ok(()), "{mode}: the lock ends with the process");
    }
}
