//! A snapshot made with the stand-in, and scenes in which it is restored.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::envd::client::{Client as Agent, ClientOptions, Incarnation};
use rewake::envd::hedge::Hedge;
use rewake::envd::init::Lifecycle;
use rewake::envd::ready::await_ready;
use rewake::envd::socket::CurrentNetns;
use rewake::ids::SandboxId;
use rewake::plan::RestoreInputs;
use rewake::resource::ledger::Ledger;
use rewake::restore::RestoreSpec;
use rewake::vm_config::{
    BalloonConfig, ConsoleConfig, ConsoleOutputMode, MemoryConfig, MemoryZoneConfig, PayloadConfig,
    VmConfig,
};
use rewake::vmm::api::Client;
use rewake::vmm::launch::{ApiSocket, LaunchSpec, launch};
use serde_json::Value;

const STAND_IN: &str = env!("CARGO_BIN_EXE_rewake-sim");
/// The guest's memory.
const SIZE: u64 = 64 << 20;
static COUNT: AtomicU32 = AtomicU32::new(0);

/// A snapshot directory, and what its guest knew when it was frozen.
pub(crate) struct Frozen {
    pub(crate) dir: PathBuf,
    pub(crate) state: Value,
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap()
}

fn launch_spec(guest: SocketAddr, more: &[String]) -> LaunchSpec {
    let mut args = vec!["--sim".to_owned(), format!("envd=tcp:{guest}")];
    args.extend_from_slice(more);
    LaunchSpec {
        program: STAND_IN.into(),
        args,
        ..LaunchSpec::default()
    }
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

impl Frozen {
    /// Boots a guest of the stand-in, freezes it and ends it.
    pub(crate) fn make(name: &str) -> Self {
        let memory = MemoryConfig {
            size: SIZE,
            ..MemoryConfig::default()
        };
        Self::make_with(name, |_| memory)
    }

    /// The same with its memory in a file, which lies in the snapshot as `memory`.
    pub(crate) fn make_on_a_file(name: &str) -> Self {
        let frozen = Self::make_with(name, |dir| {
            let file = dir.join("ram");
            fs::File::create_new(&file).unwrap().set_len(SIZE).unwrap();
            MemoryConfig {
                size: 0,
                zones: Some(vec![MemoryZoneConfig {
                    id: "mem0".to_owned(),
                    size: SIZE,
                    file: Some(file),
                    shared: true,
                    ..MemoryZoneConfig::default()
                }]),
                ..MemoryConfig::default()
            }
        });
        let snapshot = frozen.dir.join("snapshot");
        assert!(!snapshot.join("memory-ranges").exists());
        fs::rename(frozen.dir.join("ram"), snapshot.join("memory")).unwrap();
        frozen
    }

    fn make_with(name: &str, memory: impl FnOnce(&Path) -> MemoryConfig) -> Self {
        let dir =
            std::env::temp_dir().join(format!("rewake-restore-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        let kernel = dir.join("kernel");
        fs::write(&kernel, "not read").unwrap();
        let guest = free_address();
        let mut ledger = Ledger::new();
        let (socket, _) = ApiSocket::bind(&dir.join("api.sock")).unwrap();
        let vmm = launch(&launch_spec(guest, &[]), socket, None, &[], &mut ledger).unwrap();
        let mut api = Client::connect(vmm.api_path(), soon()).unwrap();
        let config = VmConfig {
            memory: memory(&dir),
            payload: Some(PayloadConfig {
                kernel: Some(kernel),
                ..PayloadConfig::default()
            }),
            balloon: Some(BalloonConfig::default()),
            console: ConsoleConfig {
                mode: ConsoleOutputMode::Off,
                ..ConsoleConfig::default()
            },
            ..VmConfig::default()
        };
        api.create(&config, soon()).unwrap();
        api.boot(soon()).unwrap();
        await_ready(
            guest,
            Arc::new(CurrentNetns),
            Hedge::default(),
            soon(),
            None,
        )
        .unwrap();
        let state = guest_state(guest);
        api.pause(soon()).unwrap();
        let snapshot = dir.join("snapshot");
        fs::create_dir(&snapshot).unwrap();
        api.snapshot(&snapshot, soon()).unwrap();
        assert!(ledger.unwind(soon()).is_empty());
        Self { dir, state }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// One place to restore in: a runtime directory and a port of its own.
#[derive(Clone)]
pub(crate) struct Scene {
    snapshot: PathBuf,
    runtime: PathBuf,
    guest: SocketAddr,
    args: Vec<String>,
}

impl Scene {
    pub(crate) fn of(frozen: &Frozen, faults: &[&str]) -> Self {
        let faults = faults.iter().map(|fault| format!("fault={fault}"));
        let args: Vec<_> = faults
            .flat_map(|fault| ["--sim".to_owned(), fault])
            .collect();
        Self::with_args(frozen, &args)
    }

    /// Of another snapshot of this guest.
    pub(crate) fn at(frozen: &Frozen, snapshot: &Path) -> Self {
        Self {
            snapshot: snapshot.to_owned(),
            ..Self::with_args(frozen, &[])
        }
    }

    pub(crate) fn with_args(frozen: &Frozen, args: &[String]) -> Self {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Self {
            snapshot: frozen.dir.join("snapshot"),
            runtime: frozen.dir.join(format!("run-{number}")),
            guest: free_address(),
            args: args.to_vec(),
        }
    }

    pub(crate) fn spec(&self) -> RestoreSpec {
        let inputs = RestoreInputs::new(SandboxId::random(), &self.snapshot);
        let mut spec = RestoreSpec::new(inputs, STAND_IN, self.guest);
        spec.vmm = launch_spec(self.guest, &self.args);
        spec.runtime_dir.clone_from(&self.runtime);
        spec
    }

    pub(crate) fn guest_state(&self) -> Value {
        guest_state(self.guest)
    }

    /// The processes that were started for this scene: its port is on their command line.
    fn pids(&self) -> Vec<u32> {
        let mark = format!("envd=tcp:{}", self.guest);
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&mark))
        })
        .collect()
    }

    pub(crate) fn processes(&self) -> usize {
        self.pids().len()
    }

    /// Waits until the process of this scene is there.
    pub(crate) fn await_process(&self) -> u32 {
        for _ in 0..2000 {
            if let Some(pid) = self.pids().first() {
                return *pid;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("no process was started")
    }

    /// No process, no directory of a VM.
    pub(crate) fn assert_nothing_left(&self) {
        assert_eq!(self.pids(), Vec::<u32>::new(), "processes");
        let vms = self.runtime.join("vm");
        let left: Vec<_> = match fs::read_dir(&vms) {
            Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
            Err(_) => Vec::new(),
        };
        assert_eq!(left, Vec::<PathBuf>::new(), "{}", Path::new(&vms).display());
    }
}
