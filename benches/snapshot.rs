//! What it costs to open, check and rewrite the snapshot of a real Linux guest before
//! Cloud Hypervisor is started with it. Files are on a tmpfs where there is one.

#![allow(missing_docs, reason = "criterion makes public functions")]
#![allow(clippy::unwrap_used, reason = "a panic is the report")]

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};

use criterion::{Criterion, criterion_group, criterion_main};
use rewake::ids::IfName;
use rewake::snapshot::{
    ConfigOverrides, DiskOverride, MemoryBacking, MemoryLayout, RunDir, RunFiles, SnapshotDir,
    SnapshotLimits, State, StateLimits, TapOverride, TapSource, rewrite,
};
use rewake::units::Bytes;

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let shm = Path::new("/dev/shm");
        let parent = if shm.is_dir() {
            shm.to_owned()
        } else {
            std::env::temp_dir()
        };
        let path = parent.join(format!("rewake-bench-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures/snapshots/ch-v53/linux-guest-256m");
        let snapshot = path.join("snapshot");
        fs::create_dir(&snapshot).unwrap();
        for file in ["config.json", "state.json"] {
            fs::copy(from.join(file), snapshot.join(file)).unwrap();
        }
        let memory = fs::File::create(snapshot.join("memory-ranges")).unwrap();
        memory.set_len(256 << 20).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn overrides(memory: MemoryBacking) -> ConfigOverrides {
    ConfigOverrides {
        disks: vec![DiskOverride {
            disk: None,
            path: PathBuf::from("/dev/dm-7"),
            image_type: None,
        }],
        taps: vec![TapOverride {
            device: None,
            tap: TapSource::Name(IfName::new("tap0").unwrap()),
        }],
        vsock_socket: Some(PathBuf::from("/run/rewake/vsock")),
        memory,
        ..ConfigOverrides::default()
    }
}

fn open(path: &Path) -> SnapshotDir {
    SnapshotDir::open(path, &SnapshotLimits::default()).unwrap()
}

fn snapshot(criterion: &mut Criterion) {
    let scratch = Scratch::new();
    let (path, run) = (scratch.0.join("snapshot"), scratch.0.join("run"));
    let bytes = fs::read(path.join("state.json")).unwrap();
    let mut group = criterion.benchmark_group("linux-guest-256m");

    group.bench_function("state.json as a general JSON value", |bench| {
        bench.iter(|| serde_json::from_slice::<serde_json::Value>(black_box(&bytes)).unwrap());
    });
    group.bench_function("state.json checked", |bench| {
        bench.iter(|| State::parse(black_box(bytes.clone()), &StateLimits::default()).unwrap());
    });
    group.bench_function("directory opened and checked", |bench| {
        bench.iter(|| {
            let snapshot = open(&path);
            assert_eq!(snapshot.memory().unwrap().size(), Bytes::mib(256));
        });
    });
    let opened = open(&path);
    group.bench_function("configuration rewritten", |bench| {
        let overrides = overrides(MemoryBacking::Recorded);
        bench.iter(|| rewrite(black_box(opened.config()), &overrides).unwrap());
    });
    group.bench_function("state rewritten to map a file", |bench| {
        bench.iter(|| {
            let state = black_box(opened.state());
            let layout = MemoryLayout::analyse(opened.config(), state.memory()).unwrap();
            state.mapped_from_file(&layout).unwrap()
        });
    });
    group.bench_function("all of it, into a run directory", |bench| {
        bench.iter(|| {
            let snapshot = open(&path);
            let state = snapshot.state();
            let layout = MemoryLayout::analyse(snapshot.config(), state.memory()).unwrap();
            let state = state.mapped_from_file(&layout).unwrap();
            let memory = MemoryBacking::File {
                path: path.join("memory-ranges"),
                shared: false,
                layout,
            };
            let config = rewrite(snapshot.config(), &overrides(memory)).unwrap();
            let files = RunFiles {
                config: &config,
                state: &state,
                memory: Some(Path::new("/proc/self/fd/77")),
            };
            RunDir::create(&run, &files).unwrap().remove().unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, snapshot);
criterion_main!(benches);
