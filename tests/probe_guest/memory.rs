//! Memory modes under a real Cloud Hypervisor: what the guest finds again, and what becomes of
//! the file.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::memory::{self, WORKING_SET_FILE, WorkingSet, WorkingSetError};
use rewake::plan::{MemoryMode, MemoryPolicy};
use rewake::probe_guest::{Settings, checksum_of_words, expected_checksum};
use rewake::restore::Restored;
use rewake::snapshot::{
    Durability, Punched, Puncher, Seal, SealedMemory, install, memory_of, reserve, seal,
};
use rewake::units::Bytes;
use rewake::vmm::api::Client;
use rewake::wire::http::Method;
use rustix::fs::SeekFrom;

use crate::lab::Lab;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// Pages of RAM below 3 GiB.
const BELOW_HOLE: u64 = (3 << 30) >> 12;

/// What the guest had in memory, and where.
struct Witness {
    nonce: String,
    counter: u64,
    /// Page, number of pages, first value.
    words: Vec<(u64, u64, u64)>,
}

impl Witness {
    /// Writes words to these pages, and takes down what the guest is.
    fn write(lab: &Lab, pages: &[u64], value: u64) -> Self {
        let words: Vec<_> = pages.iter().map(|page| (*page, 40, value + page)).collect();
        for (page, count, value) in &words {
            let target = format!("/probe/word?page={page}&pages={count}&value={value}");
            let answer = lab.json(Method::Post, &target);
            assert_eq!(answer["checksum"], sum(*value, *count));
        }
        let probe = lab.probe();
        Self {
            nonce: probe["nonce"].as_str().unwrap().to_owned(),
            counter: probe["counter"].as_u64().unwrap(),
            words,
        }
    }

    /// The guest is the same, went on, and has all of its memory.
    fn check(&self, lab: &Lab, what: &str) {
        let probe = lab.probe();
        assert_eq!(probe["nonce"], self.nonce, "{what}: rebooted");
        assert!(probe["counter"].as_u64().unwrap() > self.counter, "{what}");
        for (page, count, value) in &self.words {
            let answer = lab.json(
                Method::Get,
                &format!("/probe/word?page={page}&pages={count}"),
            );
            assert_eq!(
                answer["checksum"],
                sum(*value, *count),
                "{what}: page {page}"
            );
        }
        let answer = lab.json(Method::Get, "/probe/checksum?pages=64");
        let nonce = u64::from_str_radix(&self.nonce, 16).unwrap();
        let expected = format!("{:016x}", expected_checksum(nonce, 64));
        assert_eq!(answer["checksum"], expected, "{what}: pattern");
    }
}

fn sum(value: u64, pages: u64) -> String {
    format!("{:016x}", checksum_of_words(value, pages))
}

fn end(restored: Restored) {
    let leftovers = restored.destroy(soon());
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

/// Pauses the VM and makes a snapshot of it, as durable as can be.
fn freeze(restored: &Restored, into: &Path) {
    let mut api = Client::connect(restored.vmm.api_path(), soon()).unwrap();
    let staging = into.with_extension("new");
    fs::create_dir(&staging).unwrap();
    api.pause(soon()).unwrap();
    api.snapshot(&staging, soon()).unwrap();
    let own = memory_of(restored.vmm.pid());
    let memory = match &own {
        Ok(own) if restored.memory_mode == MemoryMode::Shared => {
            assert!(
                !staging.join("memory-ranges").exists(),
                "memory was written"
            );
            SealedMemory::Linked(own.as_fd())
        }
        _ => SealedMemory::Written,
    };
    let how = Seal {
        memory,
        ..Seal::default()
    };
    seal(&staging, &how).unwrap();
    install(&staging, into, Durability::Synced, &Faults::NONE).unwrap();
    if let Some(mut puncher) = Puncher::open(into, &Faults::NONE).unwrap() {
        assert_eq!(puncher.run(|| true).unwrap(), Punched::Whole);
    }
}

/// Length, and a sum over all that is not a hole or zeros.
fn digest(path: &Path) -> (u64, u64) {
    let file = File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let (mut at, mut sum) = (0, 0u64);
    let mut buffer = vec![0; 1 << 20];
    while at < length {
        let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) else {
            break;
        };
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(data)).unwrap();
        at = data;
        while at < hole {
            let take = (hole - at).min(buffer.len() as u64) as usize;
            file.read_exact_at(&mut buffer[..take], at).unwrap();
            for (index, word) in buffer[..take].chunks_exact(8).enumerate() {
                let word = u64::from_le_bytes(word.try_into().unwrap());
                let place = at + 8 * index as u64;
                sum = sum.wrapping_add(word.wrapping_mul(place | 1));
            }
            at += take as u64;
        }
    }
    (length, sum)
}

/// How a guest got its memory at first, and pages of it that lie far apart.
struct Origin {
    name: &'static str,
    memory: String,
    pages: Vec<u64>,
    /// The file of a zone, which becomes the snapshot's `memory`.
    file: Option<PathBuf>,
}

fn origins(lab: &Lab) -> io::Result<[Origin; 3]> {
    let file = lab.dir().join("ram");
    File::create_new(&file)?.set_len(4 << 30)?;
    // The guest counts without the pages between 640 KiB and 1 MiB, of which the memory map
    // leaves some out: the second begins below 3 GiB and ends above 4 GiB.
    let above = vec![9000, BELOW_HOLE - 110, BELOW_HOLE, (4 << 18) - 200];
    Ok([
        Origin {
            name: "private 128 MiB",
            memory: "--memory size=128M".to_owned(),
            pages: vec![9000, 32000],
            file: None,
        },
        Origin {
            name: "memfd 4 GiB",
            memory: "--memory size=4G,shared=on".to_owned(),
            pages: above.clone(),
            file: None,
        },
        Origin {
            name: "file 4 GiB",
            memory: format!(
                "--memory size=0 --memory-zone id=mem0,size=4G,shared=on,file={}",
                file.display()
            ),
            pages: above,
            file: Some(file),
        },
    ])
}

/// Boots a guest, lets it write, freezes it. The second is the snapshot's memory file.
fn template(lab: &mut Lab, origin: &Origin) -> (PathBuf, PathBuf, Witness) {
    let machine = lab.boot_with(&Settings::default(), &origin.memory);
    let witness = Witness::write(lab, &origin.pages, 1000);
    let snapshot = lab.dir().join(origin.name.replace(' ', "-"));
    machine.freeze(&snapshot);
    let file = match &origin.file {
        Some(file) => {
            fs::rename(file, snapshot.join("memory")).unwrap();
            snapshot.join("memory")
        }
        None => snapshot.join("memory-ranges"),
    };
    (snapshot, file, witness)
}

#[test]
fn root_kvm_map_leaves_the_template_alone() {
    const TEST: &str = "root_kvm_map_leaves_the_template_alone";
    let Some(mut lab) = Lab::new(TEST) else {
        return;
    };
    for origin in origins(&lab).unwrap() {
        let (snapshot, file, witness) = template(&mut lab, &origin);
        let before = digest(&file);
        for round in 0..2 {
            let what = format!("{}, round {round}", origin.name);
            let restored = lab.restore_with_rewake(&snapshot, MemoryPolicy::default());
            assert_eq!(restored.memory_mode, MemoryMode::Map, "{what}");
            witness.check(&lab, &what);
            Witness::write(&lab, &origin.pages, 5000 + round).check(&lab, &what);
            assert!(reserve(&snapshot).unwrap_err().is_busy(), "{what}");
            end(restored);
            drop(reserve(&snapshot).unwrap());
        }
        assert_eq!(
            digest(&file),
            before,
            "{}: the file was written",
            origin.name
        );
        fs::remove_dir_all(&snapshot).unwrap();
    }
}

#[test]
fn root_kvm_an_owner_pauses_without_writing_memory() {
    const TEST: &str = "root_kvm_an_owner_pauses_without_writing_memory";
    let Some(mut lab) = Lab::new(TEST) else {
        return;
    };
    for origin in origins(&lab).unwrap() {
        let (mut snapshot, _, mut witness) = template(&mut lab, &origin);
        let owned = MemoryPolicy::Auto { owned: true };
        for round in 0..4 {
            let what = format!("{}, round {round}", origin.name);
            let restored = lab.restore_with_rewake(&snapshot, owned);
            assert_eq!(restored.memory_mode, MemoryMode::Shared, "{what}");
            witness.check(&lab, &what);
            witness = Witness::write(&lab, &origin.pages, 7000 + 100 * round);
            let next = lab.dir().join(format!("next-{round}"));
            freeze(&restored, &next);
            end(restored);
            fs::remove_dir_all(&snapshot).unwrap();
            snapshot = next;
        }
        fs::remove_dir_all(&snapshot).unwrap();
    }
}

#[test]
fn root_kvm_memory_is_accounted_for_by_who_has_it() {
    const TEST: &str = "root_kvm_memory_is_accounted_for_by_who_has_it";
    let Some(mut lab) = Lab::new(TEST) else {
        return;
    };
    let [private, ..] = origins(&lab).unwrap();
    let (snapshot, file, _) = template(&mut lab, &private);
    let inode = file.metadata().unwrap().ino();
    let mut cost = Vec::new();
    // The one that writes to the file comes last.
    for mode in MemoryMode::ALL.into_iter().rev() {
        if mode == MemoryMode::OnDemand && rewake_sys::uffd::probe().is_err() {
            eprintln!("SKIP {TEST}: on-demand: no userfaultfd");
            continue;
        }
        let restored = lab.restore_with_rewake(&snapshot, mode);
        await_whole(&restored, mode);
        let usage = memory::usage(restored.vmm.pid()).unwrap();
        eprintln!("{mode}: {:?}", usage.guest);
        assert_eq!(usage.guest.size, Bytes::mib(128), "{mode}");
        for mapping in &usage.mappings {
            assert_eq!(mapping.inode == inode, mode.maps_file(), "{mapping:?}");
            assert_eq!(mapping.is_private, mode != MemoryMode::Shared);
        }
        assert!(usage.process.private >= usage.guest.private, "{mode}");
        cost.push((mode, usage.guest));
        end(restored);
    }
    let of = |wanted| {
        let found = cost.iter().find(|(mode, _)| *mode == wanted);
        found.map(|(_, share)| *share)
    };
    let map = of(MemoryMode::Map).unwrap();
    assert!(map.private <= Bytes::mib(2), "{map:?}");
    assert!(map.file > Bytes(0), "{map:?}");
    let shared = of(MemoryMode::Shared).unwrap();
    assert_eq!(shared.private, Bytes(0), "{shared:?}");
    // CH wrote private memory densely, and reads it so.
    let copy = of(MemoryMode::Copy).unwrap();
    assert_eq!(copy.private, Bytes::mib(128), "{copy:?}");
    if let Some(on_demand) = of(MemoryMode::OnDemand) {
        assert!(on_demand.private.0 >= 30 * map.private.0, "{on_demand:?}");
    }
}

#[test]
fn root_kvm_a_working_set_is_recorded_and_read_ahead() {
    const TEST: &str = "root_kvm_a_working_set_is_recorded_and_read_ahead";
    let Some(mut lab) = Lab::new(TEST) else {
        return;
    };
    let [private, ..] = origins(&lab).unwrap();
    let (snapshot, _, witness) = template(&mut lab, &private);
    let restored = lab.restore_with_rewake(&snapshot, MemoryMode::Copy);
    let error = WorkingSet::record(restored.vmm.pid()).unwrap_err();
    assert!(
        matches!(error, WorkingSetError::NotMapped { .. }),
        "{error:?}"
    );
    end(restored);

    let restored = lab.restore_with_rewake(&snapshot, MemoryMode::Map);
    assert_eq!(restored.timeline.notes(), [""; 0]);
    let untouched = 20_000;
    let has = |set: &WorkingSet, page: u64| {
        let mut extents = set.extents().iter();
        extents.any(|extent| (extent.first..extent.first + extent.pages).contains(&page))
    };
    assert!(!has(
        &WorkingSet::record(restored.vmm.pid()).unwrap(),
        untouched
    ));
    // Without the pages below 1 MiB that the guest does not count: 96 more in the file.
    lab.json(Method::Get, &format!("/probe/word?page={}", untouched - 96));
    let set = WorkingSet::record(restored.vmm.pid()).unwrap();
    assert!(
        has(&set, untouched),
        "a page that was read is not in the set"
    );
    assert!(has(&set, 256), "the guest's own code is not in the set");
    assert!(set.size() < Bytes::mib(64), "{}", set.size());
    set.save(&snapshot).unwrap();
    end(restored);

    let restored = lab.restore_with_rewake(&snapshot, MemoryMode::Map);
    let expected = format!("A working set of {} is read ahead", set.size());
    assert_eq!(restored.timeline.notes(), [expected]);
    witness.check(&lab, "read ahead");
    end(restored);

    fs::write(snapshot.join(WORKING_SET_FILE), "damaged").unwrap();
    let restored = lab.restore_with_rewake(&snapshot, MemoryMode::Map);
    let notes = restored.timeline.notes();
    assert!(
        notes[0].starts_with("No working set is read ahead"),
        "{notes:?}"
    );
    end(restored);
}

#[test]
fn root_kvm_every_mode_follows_every_other() {
    const TEST: &str = "root_kvm_every_mode_follows_every_other";
    let Some(mut lab) = Lab::new(TEST) else {
        return;
    };
    let on_demand = rewake_sys::uffd::probe().is_ok();
    let [private, ..] = origins(&lab).unwrap();
    let (mut snapshot, _, mut witness) = template(&mut lab, &private);
    let modes = MemoryMode::ALL;
    for (round, mode) in modes
        .into_iter()
        .flat_map(|first| modes.map(|second| [first, second]))
        .flatten()
        .filter(|mode| on_demand || *mode != MemoryMode::OnDemand)
        .enumerate()
    {
        let what = format!("round {round}, {mode}");
        let restored = lab.restore_with_rewake(&snapshot, mode);
        assert_eq!(restored.memory_mode, mode);
        witness.check(&lab, &what);
        witness = Witness::write(&lab, &private.pages, 100 * round as u64);
        let next = lab.dir().join(format!("next-{round}"));
        await_whole(&restored, mode);
        freeze(&restored, &next);
        end(restored);
        let wrote = next.join("memory-ranges").exists();
        assert_eq!(wrote, mode != MemoryMode::Shared, "{what}");
        fs::remove_dir_all(&snapshot).unwrap();
        snapshot = next;
    }
}

/// CH refuses a snapshot for as long as it fills memory in the background.
fn await_whole(restored: &Restored, mode: MemoryMode) {
    if mode != MemoryMode::OnDemand {
        return;
    }
    let pid = restored.vmm.pid();
    let handler = || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        tasks.flatten().any(|task| {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            name.trim() == "uffd-handler"
        })
    };
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while handler() {
        assert!(std::time::Instant::now() < end, "memory never came");
        std::thread::sleep(Duration::from_millis(10));
    }
}
