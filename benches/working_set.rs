//! A guest that wakes up and needs pages all over its memory: from a template in the page
//! cache, from one that is only on the disk, and from one whose working set is read ahead.
//!
//!     cargo bench --bench working_set [-- ROUNDS]
//!
//! Real Cloud Hypervisor in `map`, the probe guest with 1 GiB, and 2000 pages of it, each
//! 100 pages from the last. The three variants take turns. Before the cold ones the memory
//! file is dropped from the page cache (`POSIX_FADV_DONTNEED`, after a sync). Each round ends
//! with the guest's checksum over these pages, which must be right.
//!
//! Once with transparent huge pages for guest memory, CH's default, and once without: with
//! them the kernel reads and maps 2 MiB around every page that is touched, so a set recorded
//! then names far more than the guest needed.

#[path = "interleaved/mod.rs"]
mod interleaved;
// Shared with the tests, which use more of it.
#[allow(dead_code, clippy::unwrap_used)]
#[path = "../tests/probe_guest/lab.rs"]
mod lab;

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use interleaved::{Samples, numbers, print_machine};
use lab::Lab;
use rewake::deadline::Deadline;
use rewake::memory::{WORKING_SET_FILE, WorkingSet};
use rewake::plan::MemoryMode;
use rewake::probe_guest::{Settings, checksum_of_words};
use rewake::restore::{Restored, restore};
use rewake::timeline::Phase;
use rewake::wire::http::Method;
use rustix::fs::Advice;

const PAGES: u64 = 2000;
const WORDS: &str = "page=20000&pages=2000&stride=100";

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(120))
}

/// What the page cache has of the template before a restore.
#[derive(Clone, Copy, PartialEq)]
enum Cache {
    Warm,
    Cold,
    ReadAhead,
}

fn main() {
    let [rounds] = numbers([20]);
    let Some(mut lab) = Lab::new("bench-set") else {
        return;
    };
    print_machine();
    for huge in ["on", "off"] {
        println!("\ntransparent huge pages {huge}:");
        measure(&mut lab, rounds, huge);
    }
}

fn measure(lab: &mut Lab, rounds: usize, huge: &str) {
    let template = lab.dir().join(format!("template-{huge}"));
    let memory = format!("--memory size=1G,thp={huge}");
    let machine = lab.boot_with(&Settings::default(), &memory);
    machine.json(Method::Post, &format!("/probe/word?{WORDS}&value=77"));
    machine.freeze(&template);

    // Recorded once, from a cold start.
    drop_from_cache(&template.join("memory-ranges"));
    let (restored, ..) = wake(lab, &template);
    let set = WorkingSet::record(restored.vmm.pid()).expect("a working set");
    let bytes = set.encode().len();
    println!(
        "working set: {} in {} extents, {bytes} bytes",
        set.size(),
        set.extents().len()
    );
    assert!(restored.destroy(soon()).is_empty());

    let variants = [
        ("warm", Cache::Warm),
        ("cold", Cache::Cold),
        ("cold, working set read ahead", Cache::ReadAhead),
    ];
    let mut results: [[Samples; 2]; 3] = Default::default();
    for round in 0..=rounds {
        for turn in 0..variants.len() {
            let at = (turn + round) % variants.len();
            prepare(&template, &set, variants[at].1);
            let (restored, ready, served) = wake(lab, &template);
            assert!(restored.destroy(soon()).is_empty());
            if round > 0 {
                results[at][0].push(ready);
                results[at][1].push(served);
            }
        }
    }
    for ((name, _), [ready, served]) in variants.iter().zip(&results) {
        println!("{name}:");
        ready.print("  template to envd ready");
        served.print("  template to 2000 pages read");
    }
    let served = |at: usize| results[at][1].median().as_secs_f64();
    println!(
        "medians to 2000 pages read: cold {:.2} times warm, read ahead {:.2} times warm",
        served(1) / served(0),
        served(2) / served(0)
    );
    fs::remove_dir_all(&template).expect("remove");
}

fn prepare(template: &Path, set: &WorkingSet, cache: Cache) {
    let file = template.join("memory-ranges");
    match cache {
        Cache::Warm => {
            let mut file = File::open(file).expect("open");
            std::io::copy(&mut file, &mut std::io::sink()).expect("read");
        }
        Cache::Cold | Cache::ReadAhead => drop_from_cache(&file),
    }
    if cache == Cache::ReadAhead {
        set.save(template).expect("save");
    } else {
        let _ = fs::remove_file(template.join(WORKING_SET_FILE));
    }
}

fn drop_from_cache(file: &Path) {
    let file = File::options().write(true).open(file).expect("open");
    file.sync_all().expect("fsync");
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).expect("fadvise");
}

/// Restores, and lets the guest read its pages; the times from the start to both.
fn wake(lab: &Lab, template: &Path) -> (Restored, Duration, Duration) {
    let mut spec = lab.restore_spec(template, MemoryMode::Map);
    spec.vmm.without_events = true;
    let begun = Instant::now();
    let restored = restore(&spec, soon()).expect("a running VM");
    let answer = lab.json(Method::Get, &format!("/probe/word?{WORDS}"));
    let served = begun.elapsed();
    let expected = format!("{:016x}", checksum_of_words(77, PAGES));
    assert_eq!(
        answer["checksum"], expected,
        "the guest's memory is another"
    );
    let ready = restored.timeline.at(Phase::Ready).expect("a phase");
    (restored, ready, served)
}
