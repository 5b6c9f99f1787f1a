//! Parts of a launch that no other benchmark has alone: a round trip over Cloud Hypervisor's
//! API, and the journal. Their baselines are criterion's:
//!
//!     cargo bench --bench parts -- --save-baseline before
//!     cargo bench --bench parts -- --baseline before

#![allow(missing_docs, reason = "criterion makes public functions")]
#![allow(clippy::unwrap_used, reason = "a panic is the report")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::ids::SandboxId;
use rewake::sandbox::journal::{Identity, Journal};
use rewake::units::Bytes;
use rewake::vmm::api::Client;

/// What a real v53.0 answered.
const ANSWER: &[u8] = include_bytes!("../fixtures/ch-v53/http/01-ping.response");

/// Of the journal that is read: a sandbox that was paused and resumed some twenty times.
const CHANGES: usize = 200;

/// A directory in memory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(format!("/dev/shm/rewake-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A thread answers every request with what Cloud Hypervisor did, so the time is that of our
/// client and of two wake-ups.
fn api(criterion: &mut Criterion) {
    let scratch = Scratch::new("api");
    let path = scratch.0.join("api.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 4096];
        while stream.read(&mut buffer).unwrap() > 0 {
            stream.write_all(ANSWER).unwrap();
        }
    });
    let soon = || Deadline::after(Duration::from_secs(10));
    let mut client = Client::connect(&path, soon()).unwrap();
    criterion.bench_function("vmm.ping on a kept connection", |bench| {
        bench.iter(|| assert_ne!(client.ping(soon()).unwrap().pid, 0));
    });
    drop(client);
    server.join().unwrap();
}

/// On a tmpfs, so that it is the journal's own work and not a disk's.
fn journal(criterion: &mut Criterion) {
    let scratch = Scratch::new("journal");
    let path = scratch.0.join("journal");
    let identity = || Identity::new(SandboxId::random(), None, Bytes::mib(128), 1);
    let create = || Journal::create(&path, identity(), Faults::NONE).unwrap();
    criterion.bench_function("a journal is begun", |bench| {
        bench.iter_batched(
            || drop(fs::remove_file(&path)),
            |()| create(),
            BatchSize::PerIteration,
        );
    });
    criterion.bench_function("a change is written down", |bench| {
        bench.iter_batched(
            || {
                let _ = fs::remove_file(&path);
                create()
            },
            |journal| {
                journal.change(journal.status()).unwrap();
                journal
            },
            BatchSize::PerIteration,
        );
    });
    // Its length is a given, not what there was time for: a journal has a bound.
    let _ = fs::remove_file(&path);
    let journal = create();
    for _ in 0..CHANGES {
        journal.change(journal.status()).unwrap();
    }
    drop(journal);
    criterion.bench_function("a journal of 200 changes is read", |bench| {
        bench.iter(|| Journal::story_of(&path).unwrap());
    });
}

criterion_group!(benches, api, journal);
criterion_main!(benches);
