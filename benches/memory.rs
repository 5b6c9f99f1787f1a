//! Restore and pause in every memory mode, for guests of 256 MiB to 8 GiB, with real Cloud
//! Hypervisor and the probe guest, interleaved, in one table.
//!
//!     cargo bench --bench memory [-- ROUNDS [LARGEST_GIB]]
//!
//! The template is what Cloud Hypervisor writes of private memory: as large as the guest's
//! RAM. Each round restores in each mode, asks the guest for the nonce that it had, pauses it
//! and makes a snapshot of it. A guest in `shared` goes on from its own last snapshot. 4 and
//! 8 GiB get fewer rounds: a copy of 8 GiB needs them twice in memory and twice on the disk.
//!
//! "call" is from nothing but the template to CH's answer, "ready" to the agent's. A guest on
//! demand must have all its memory before it may be paused ("fill"). "pause" is `vm.pause`,
//! `vm.snapshot` and `seal` to a snapshot that is warm, "sync" what it takes more until it
//! survives a power loss. "register" is what this machine's KVM alone takes to be told of the
//! memory, in a VM without a VMM.

#[path = "interleaved/mod.rs"]
mod interleaved;
// Shared with the tests, which use more of it.
#[allow(dead_code, clippy::unwrap_used)]
#[path = "../tests/probe_guest/lab.rs"]
mod lab;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use interleaved::{Samples, numbers, print_machine};
use lab::Lab;
use rewake::deadline::Deadline;
use rewake::plan::MemoryMode;
use rewake::probe_guest::Settings;
use rewake::restore::{Restored, restore};
use rewake::snapshot::{Durability, Seal, SealedMemory, memory_of, seal};
use rewake::timeline::Phase;
use rewake::vmm::api::Client;
use rewake_sys::memslot::registration_time;

const MODES: [MemoryMode; 4] = MemoryMode::ALL;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(300))
}

/// The columns of one mode at one size.
#[derive(Default)]
struct Row {
    call: Samples,
    ready: Samples,
    fill: Samples,
    pause: Samples,
    sync: Samples,
}

fn main() {
    let [rounds, largest] = numbers([15, 8]);
    let Some(mut lab) = Lab::new("bench-memory") else {
        return;
    };
    print_machine();
    let sizes: Vec<u64> = [256, 1024, 4096, 8192]
        .into_iter()
        .filter(|mib| *mib <= largest as u64 * 1024)
        .collect();
    println!(
        "{:>6} {:10} {:>3} {:>19} {:>19} {:>9} {:>19} {:>9} {:>9}",
        "size",
        "mode",
        "n",
        "call med/p99",
        "ready med/p99",
        "fill",
        "pause med/p99",
        "sync",
        "register"
    );
    let mut all = Vec::new();
    for mib in sizes {
        let rounds = match mib {
            0..=1024 => rounds,
            1025..=4096 => rounds.div_ceil(4),
            _ => rounds.div_ceil(8),
        };
        let rows = measure(&mut lab, mib, rounds);
        let mut register = Samples::default();
        for _ in 0..20 {
            register.push(registration_time(mib << 20).expect("KVM"));
        }
        for (mode, row) in MODES.iter().zip(&rows) {
            print_row(mib, *mode, row, &register);
        }
        all.push((mib, rows, register));
    }
    claims(&all);
}

/// One size: a template, then rounds over all modes.
fn measure(lab: &mut Lab, mib: u64, rounds: usize) -> [Row; 4] {
    let template = lab.dir().join(format!("template-{mib}"));
    let machine = lab.boot_with(&Settings::default(), &format!("--memory size={mib}M"));
    let nonce = machine.probe()["nonce"].clone();
    machine.freeze(&template);
    let mut own = lab.dir().join(format!("own-{mib}"));
    copy_without_zeros(&template, &own);

    let mut rows: [Row; 4] = std::array::from_fn(|_| Row::default());
    // The first round warms the page cache, and does not count.
    for round in 0..=rounds {
        for turn in 0..MODES.len() {
            // Each mode comes first as often as any other.
            let at = (turn + round) % MODES.len();
            let mode = MODES[at];
            let source = match mode {
                MemoryMode::Shared => own.clone(),
                _ => template.clone(),
            };
            let mut spec = lab.restore_spec(&source, mode);
            spec.vmm.without_events = true;
            let restored = restore(&spec, soon()).expect("a running VM");
            assert_eq!(restored.memory_mode, mode);
            assert_eq!(lab.probe()["nonce"], nonce, "{mode}: another guest");
            let next = lab.dir().join(format!("next-{mib}-{round}-{turn}"));
            let mut discarded = Row::default();
            let row = if round == 0 {
                &mut discarded
            } else {
                &mut rows[at]
            };
            let reached = |phase| restored.timeline.at(phase).expect("a phase");
            row.call.push(reached(Phase::ApiAccepted));
            row.ready.push(reached(Phase::Ready));
            pause(&restored, &next, row);
            assert!(restored.destroy(soon()).is_empty());
            if mode == MemoryMode::Shared {
                fs::remove_dir_all(&own).expect("remove");
                own = next;
            } else {
                fs::remove_dir_all(&next).expect("remove");
            }
        }
    }
    fs::remove_dir_all(&template).expect("remove");
    fs::remove_dir_all(&own).expect("remove");
    rows
}

fn pause(restored: &Restored, into: &Path, row: &mut Row) {
    let begun = Instant::now();
    if restored.memory_mode == MemoryMode::OnDemand {
        await_whole(restored.vmm.pid());
    }
    row.fill.push(begun.elapsed());
    fs::create_dir(into).expect("mkdir");
    let mut api = Client::connect(restored.vmm.api_path(), soon()).expect("the API");
    let own = memory_of(restored.vmm.pid()).ok();
    let begun = Instant::now();
    api.pause(soon()).expect("vm.pause");
    api.snapshot(into, soon()).expect("vm.snapshot");
    let how = |memory, durability| Seal {
        memory,
        durability,
        ..Seal::default()
    };
    let memory = match &own {
        Some(own) if restored.memory_mode == MemoryMode::Shared => {
            SealedMemory::Linked(own.as_fd())
        }
        _ => SealedMemory::Written,
    };
    seal(into, &how(memory, Durability::Warm)).expect("a snapshot");
    row.pause.push(begun.elapsed());
    let begun = Instant::now();
    seal(into, &how(SealedMemory::Written, Durability::Synced)).expect("a snapshot");
    row.sync.push(begun.elapsed());
}

/// CH refuses a snapshot while its thread fills memory.
fn await_whole(pid: u32) {
    let filling = || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
        tasks.flatten().any(|task| {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            name.trim() == "uffd-handler"
        })
    };
    while filling() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The template as a sandbox's own snapshot: its memory file without the zeros.
fn copy_without_zeros(from: &Path, to: &Path) {
    fs::create_dir(to).expect("mkdir");
    for name in ["config.json", "state.json"] {
        fs::copy(from.join(name), to.join(name)).expect("copy");
    }
    let source = File::open(from.join("memory-ranges")).expect("open");
    let target = File::create_new(to.join("memory-ranges")).expect("create");
    let length = source.metadata().expect("stat").len();
    target.set_len(length).expect("truncate");
    let mut buffer = vec![0; 1 << 20];
    for at in (0..length).step_by(buffer.len()) {
        source.read_exact_at(&mut buffer, at).expect("read");
        for (index, page) in buffer.chunks(4096).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                target
                    .write_all_at(page, at + 4096 * index as u64)
                    .expect("write");
            }
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn print_row(mib: u64, mode: MemoryMode, row: &Row, register: &Samples) {
    let both =
        |samples: &Samples| format!("{:.1} / {:.1}", ms(samples.median()), ms(samples.at(0.99)));
    println!(
        "{mib:>6} {:10} {:>3} {:>19} {:>19} {:>9.1} {:>19} {:>9.1} {:>9.2}",
        mode.name(),
        row.call.len(),
        both(&row.call),
        both(&row.ready),
        ms(row.fill.median()),
        both(&row.pause),
        ms(row.sync.median()),
        ms(register.median()),
    );
}

/// What is claimed, beside what was found.
fn claims(all: &[(u64, [Row; 4], Samples)]) {
    const SHARED: usize = 0;
    const MAP: usize = 1;
    const ON_DEMAND: usize = 2;
    const COPY: usize = 3;
    let of = |mib: u64| all.iter().find(|(size, ..)| *size == mib);
    println!("\nmedians, times in ms:");
    if let (Some((_, small, _)), Some((mib, large, _))) = (of(256), all.last()) {
        let ratio = ms(large[SHARED].pause.median()) / ms(small[SHARED].pause.median());
        println!("pause in shared, {mib} MiB against 256 MiB: {ratio:.2} times (aim: at most 1.3)");
    }
    for (mib, rows, register) in all {
        let pause = ms(rows[COPY].pause.median()) / ms(rows[SHARED].pause.median());
        let call = ms(rows[MAP].call.median()) / ms(rows[ON_DEMAND].call.median());
        let ready = ms(rows[ON_DEMAND].ready.median()) / ms(rows[MAP].ready.median());
        let less = ms(rows[MAP].call.median()) - ms(register.median());
        println!(
            "{mib:>5} MiB: pause in shared {pause:.0} times faster than in copy; \
             map's call {call:.2} times on-demand's, ready {ready:.2} times sooner; \
             map's call less registration {less:.1}"
        );
    }
}
