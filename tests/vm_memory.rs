//! Memory modes with real Cloud Hypervisor and a real Linux guest: a sandbox that comes back in
//! one after the other, and who gets memory back.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use machine::restored::{Marks, Restored, check, frozen, listing};
use machine::{GUEST_MEMORY_BYTES, Guest, Namespace, STEP_LIMIT, Scratch, Vm, api, plain_options};
use rewake::fault::Faults;
use rewake::memory::usage;
use rewake::snapshot::{
    Durability, Punched, Puncher, Seal, SealedMemory, install, memory_of, seal,
};
use serde_json::json;

const MIB: u64 = 1 << 20;

fn pid(restored: &Restored) -> u32 {
    u32::try_from(restored.answer["pid"].as_u64().unwrap()).unwrap()
}

/// The options of a VM whose memory is in a file from the start.
fn file_options(disk: &Path, scratch: &Scratch, file: &Path) -> Vec<String> {
    fs::File::create_new(file)
        .unwrap()
        .set_len(GUEST_MEMORY_BYTES)
        .unwrap();
    let mut options = plain_options(disk, scratch);
    let zone = format!("id=mem0,size=256M,shared=on,file={}", file.display());
    for option in &mut options {
        match option.as_str() {
            "size=256M" => "size=0".clone_into(option),
            "size=32M" => "size=32M,free_page_reporting=on".clone_into(option),
            _ => {}
        }
    }
    options.extend(["--memory-zone".to_owned(), zone]);
    options
}

/// Pauses the VM and makes a snapshot of it as a sandbox does; then the VM ends.
fn freeze(restored: Restored, guest: Guest<'_>, into: &Path) -> Marks {
    let marks = Marks {
        nonce: guest.nonce(),
        count: guest.counter(),
    };
    let staging = into.with_extension("new");
    fs::create_dir(&staging).unwrap();
    let socket = restored.socket();
    let begun = Instant::now();
    api(&socket, "PUT", "vm.pause", "");
    let target = json!({ "destination_url": format!("file://{}", staging.display()) });
    await_snapshot(&socket, &target.to_string());
    let own = memory_of(pid(&restored));
    let memory = match &own {
        Ok(own) if restored.answer["memory_mode"] == "shared" => SealedMemory::Linked(own.as_fd()),
        _ => SealedMemory::Written,
    };
    let how = Seal {
        memory,
        durability: Durability::Synced,
        ..Seal::default()
    };
    seal(&staging, &how).unwrap();
    install(&staging, into, Durability::Synced, &Faults::NONE).unwrap();
    println!(
        "{}: pause and snapshot took {:?}",
        restored.answer["memory_mode"],
        begun.elapsed()
    );
    restored.shut_down();
    if let Some(mut puncher) = Puncher::open(into, &Faults::NONE).unwrap() {
        assert_eq!(puncher.run(|| true).unwrap(), Punched::Whole);
        println!("punched {}", puncher.freed());
    }
    marks
}

/// After an on-demand restore CH refuses a snapshot until it has filled all memory.
fn await_snapshot(socket: &Path, body: &str) {
    let begun = Instant::now();
    loop {
        let output = std::process::Command::new("curl")
            .args(["-s", "--unix-socket"])
            .arg(socket)
            .args([
                "-X",
                "PUT",
                "-H",
                "Content-Type: application/json",
                "-d",
                body,
            ])
            .args(["-o", "/dev/null", "-w", "%{http_code}"])
            .arg("http://localhost/api/v1/vm.snapshot")
            .output()
            .unwrap();
        let status = String::from_utf8_lossy(&output.stdout).into_owned();
        if status == "204" {
            return;
        }
        assert!(begun.elapsed() < 4 * STEP_LIMIT, "vm.snapshot: {status}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Rounds of restore and snapshot; more with this variable.
const ROUNDS_VARIABLE: &str = "REWAKE_ROUNDS";
/// The modes of a short run.
const FIRST: [&str; 7] = [
    "map",
    "shared",
    "shared",
    "map",
    "copy",
    "shared",
    "on-demand",
];
/// Then these, over and over: each after each, itself included (a de Bruijn sequence).
const EVERY_PAIR: [&str; 16] = [
    "shared",
    "shared",
    "map",
    "shared",
    "copy",
    "shared",
    "on-demand",
    "map",
    "map",
    "copy",
    "map",
    "on-demand",
    "copy",
    "copy",
    "on-demand",
    "on-demand",
];

#[test]
fn vm_a_guest_remembers_everything_in_whatever_order_of_modes() {
    let test = "vm_a_guest_remembers_everything_in_whatever_order_of_modes";
    if !machine::inside_with_vmm(test) {
        return;
    }
    let scratch = Scratch::new("orders");
    let namespace = Namespace::new("rwtest-orders");
    let guest = Guest(&namespace);
    let disk = scratch.disk("disk.raw", 32 << 20);
    let mut snapshot = scratch.join("snapshot");
    let vm = Vm::start(&namespace, &scratch, &plain_options(&disk, &scratch));
    let mut marks = frozen(vm, guest, &snapshot);
    let rounds = std::env::var(ROUNDS_VARIABLE).ok();
    let rounds = rounds.map_or(FIRST.len(), |it| it.parse().unwrap());
    let modes = FIRST.iter().chain(EVERY_PAIR.iter().cycle());
    for (round, mode) in modes.copied().take(rounds).enumerate() {
        let restored = Restored::new(&namespace, &snapshot, mode);
        check(&restored, guest, &marks, mode);
        // All that was written in earlier rounds is there, and a little more comes.
        guest.shell(&format!(
            "mkdir -p /run/rounds && cd /run/rounds && if [ -s sums ]; then sha256sum -c -s sums; fi && \
             head -c 200000 /dev/urandom >{round} && sha256sum {round} >>sums"
        ));
        let next = scratch.join(&format!("snapshot.{round}"));
        marks = freeze(restored, guest, &next);
        let wrote = next.join("memory-ranges").exists();
        assert_eq!(wrote, mode != "shared", "round {round}, {mode}");
        assert_eq!(
            next.join("memory").exists(),
            !wrote,
            "round {round}, {mode}"
        );
        fs::remove_dir_all(&snapshot).unwrap();
        snapshot = next;
    }
    println!("{rounds} rounds");
}

/// Bytes of the file that take up room.
fn allocated(file: &Path) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

/// Waits until `value` is at most `limit`; the last value otherwise.
fn falls_to(limit: u64, patience: Duration, mut value: impl FnMut() -> u64) -> Result<u64, u64> {
    let begun = Instant::now();
    loop {
        let now = value();
        if now <= limit {
            return Ok(now);
        }
        if begun.elapsed() > patience {
            return Err(now);
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// A guest with 64 MiB more in memory than before.
fn fill(guest: Guest<'_>) {
    guest.shell("head -c 67108864 /dev/urandom >/run/much");
}

#[test]
fn vm_memory_is_given_back_to_an_own_file_and_cannot_be_to_a_template() {
    let test = "vm_memory_is_given_back_to_an_own_file_and_cannot_be_to_a_template";
    if !machine::inside_with_vmm(test) {
        return;
    }
    let scratch = Scratch::new("reclaim");
    let namespace = Namespace::new("rwtest-reclaim");
    let guest = Guest(&namespace);
    let disk = scratch.disk("disk.raw", 32 << 20);
    let snapshot = scratch.join("snapshot");
    let ram = scratch.join("ram");
    let vm = Vm::start(&namespace, &scratch, &file_options(&disk, &scratch, &ram));
    let marks = frozen(vm, guest, &snapshot);
    assert!(
        !snapshot.join("memory-ranges").exists(),
        "memory was written"
    );
    let file: PathBuf = snapshot.join("memory");
    fs::rename(&ram, &file).unwrap();

    // A clone: what it wrote and freed stays its own.
    let before = listing(&snapshot);
    let clone = Restored::new(&namespace, &snapshot, "map");
    check(&clone, guest, &marks, "map");
    fill(guest);
    let private = || usage(pid(&clone)).unwrap().guest.private.0;
    let full = private();
    assert!(full > 60 * MIB, "{full}");
    guest.shell("rm /run/much");
    let kept = falls_to(full - 16 * MIB, Duration::from_secs(10), private);
    println!("map: {full} bytes private, after they were freed {kept:?}");
    assert!(kept.is_err(), "a private mapping gave memory back");
    clone.shut_down();
    assert_eq!(listing(&snapshot), before, "the template was changed");

    // The owner: pages that its guest frees become holes in its file.
    let owner = Restored::new(&namespace, &snapshot, "shared");
    check(&owner, guest, &marks, "shared");
    fill(guest);
    let full = allocated(&file);
    guest.shell("rm /run/much");
    let after = falls_to(full - 32 * MIB, 4 * STEP_LIMIT, || allocated(&file));
    println!("shared: {full} bytes in the file, after they were freed {after:?}");
    let after = after.expect("free page reporting gives memory back");
    // The balloon takes more.
    let body = json!({ "desired_balloon": 96 * MIB }).to_string();
    api(&owner.socket(), "PUT", "vm.resize", &body);
    let inflated = falls_to(after - 8 * MIB, 4 * STEP_LIMIT, || allocated(&file));
    println!("shared: {inflated:?} bytes with a balloon of 96 MiB");
    inflated.expect("the balloon gives memory back");
    api(
        &owner.socket(),
        "PUT",
        "vm.resize",
        r#"{"desired_balloon":0}"#,
    );
    guest.check_pattern();
    let next = scratch.join("next");
    let marks = freeze(owner, guest, &next);
    let again = Restored::new(&namespace, &next, "shared");
    check(&again, guest, &marks, "shared");
    again.shut_down();
}
