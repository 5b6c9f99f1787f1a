//! `rewake demo`: the whole story in one command. A guest boots, is frozen into a snapshot
//! and destroyed; the snapshot is brought back to life; the guest proves that it remembers.

mod disk;
mod place;

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use rewake::deadline::Deadline;
use rewake::doctor;
use rewake::envd::client::{Client as Agent, ClientOptions, Incarnation};
use rewake::envd::hedge::Hedge;
use rewake::envd::init::{Init, Lifecycle};
use rewake::envd::ready::await_ready;
use rewake::ids::SandboxId;
use rewake::plan::{RestoreInputs, RootDisk};
use rewake::probe_guest;
use rewake::resource::ledger::{Ledger, Step};
use rewake::restore::{Netns, RestoreSpec, Restored, restore};
use rewake::units::Bytes;
use rewake::vm_config::{
    BalloonConfig, ConsoleConfig, ConsoleOutputMode, CpusConfig, MemoryConfig, PayloadConfig,
    SerialConfig, VmConfig,
};
use rewake::vmm::api::{ApiError, Client};

use rewake::vmm::launch::{ApiSocket, LaunchSpec, StopLimits, Vmm, launch};
use rewake::wire::json::{self, JsonLimits};
use rewake_sys::{kvm, netns, userns};
use serde_json::Value;

use super::restore::Mode;
use super::{Failure, Global, report};
use disk::GuestDisk;
use place::Network;

const KEYS: &str = "\
JSON: vmm, stand_in, network, memory_mode, memory_bytes, nonce (the guest's, as it was before),
  counter_before and counter_after (it went on), timeline,
  disk: kind, path, recorded_path, image_type, locked, open_count, used_bytes, total_bytes, state";

#[derive(Debug, Args)]
#[command(after_long_help = KEYS)]
pub(super) struct DemoArgs {
    /// The cloud-hypervisor binary [default: looked up on PATH]
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Use the stand-in, though Cloud Hypervisor is there
    #[arg(long)]
    stand_in: bool,
    /// How memory comes back
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    memory_mode: Mode,
    /// A variable for Cloud Hypervisor's environment, which is empty otherwise; repeatable
    #[arg(long, value_name = "NAME=VALUE")]
    vmm_env: Vec<String>,
}

/// Everything takes place within this time.
const BUDGET: Duration = Duration::from_secs(60);
const MEMORY: Bytes = Bytes::mib(128);

/// What the demo runs on.
#[derive(Clone)]
struct Actor {
    spec: LaunchSpec,
    kernel: Kernel,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// Our own freestanding guest, on real KVM.
    ProbeGuest,
    /// The stand-in plays its guest itself.
    Played,
}

/// Where the story takes place, and what it is about.
struct Scene<'a> {
    dir: &'a Path,
    network: &'a Network,
    disk: &'a mut GuestDisk,
}

/// What stops the story.
enum Setback {
    /// `vm.snapshot` was refused: some kinds of KVM cannot give a vCPU's state away.
    NoSnapshot(ApiError),
    Failed(Failure),
}

impl<E: Into<Failure>> From<E> for Setback {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// The restored guest is not the one that was frozen.
#[derive(Debug, thiserror::Error)]
#[error("The guest does not remember: {0}")]
struct Forgotten(String);

/// Undoing has left something behind.
#[derive(Debug, thiserror::Error)]
#[error("Left over: {0}")]
struct LeftOver(String);

pub(super) fn run(args: &DemoArgs, global: Global) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() {
        // As root of a user namespace one may make the network that the story needs. Where
        // that is not allowed, it goes over the loopback.
        if let Err(error) = userns::enter() {
            log::info!("No user namespace: {error}");
        }
    }
    let tale = Tale::new(global);
    let actor = match choose(args) {
        Ok(actor) => actor,
        Err(reason) => {
            tale.say(&format!("Cloud Hypervisor is not used: {reason}"));
            stand_in()?
        }
    };
    let told = match tell(&actor, args, &tale) {
        Err(Setback::NoSnapshot(error)) if actor.kernel == Kernel::ProbeGuest => {
            tale.say(&format!("Cloud Hypervisor cannot snapshot here: {error}"));
            tell(&stand_in()?, args, &tale)
        }
        other => other,
    };
    match told {
        Ok(document) if global.json => report::json(&document),
        Ok(_) => Ok(()),
        Err(Setback::Failed(failure)) => Err(failure),
        Err(Setback::NoSnapshot(error)) => Err(error.into()),
    }
}

/// The real thing where it can be used, else the reason why not.
fn choose(args: &DemoArgs) -> Result<Actor, String> {
    if args.stand_in {
        return Err("the stand-in was asked for".to_owned());
    }
    let program = args
        .vmm
        .clone()
        .or_else(|| doctor::find_program("cloud-hypervisor"));
    let program = program.ok_or("it is not on PATH")?;
    kvm::api_version().map_err(|error| error.to_string())?;
    if probe_guest::ELF.is_none() {
        return Err("this rewake was built without the probe guest".to_owned());
    }
    let pairs = args.vmm_env.iter().map(|pair| pair.split_once('='));
    let env = pairs.map(|pair| pair.map(|(name, value)| (name.to_owned(), value.to_owned())));
    Ok(Actor {
        spec: LaunchSpec {
            program,
            env: env
                .collect::<Option<_>>()
                .ok_or("--vmm-env takes NAME=VALUE")?,
            ..LaunchSpec::default()
        },
        kernel: Kernel::ProbeGuest,
    })
}

/// This program under another name.
fn stand_in() -> Result<Actor, Failure> {
    Ok(Actor {
        spec: LaunchSpec {
            program: std::env::current_exe()?,
            name: Some(super::STAND_IN.to_owned()),
            ..LaunchSpec::default()
        },
        kernel: Kernel::Played,
    })
}

fn tell(actor: &Actor, args: &DemoArgs, tale: &Tale) -> Result<Value, Setback> {
    let mut ledger = Ledger::new();
    let deadline = Deadline::after(BUDGET);
    let dir = scratch(&mut ledger)?;
    let mut network = Network::make(actor, &dir, deadline)?;
    let (told, disk_left) = match GuestDisk::make(&dir, deadline) {
        Ok(mut disk) => {
            let mut scene = Scene {
                dir: &dir,
                network: &network,
                disk: &mut disk,
            };
            let told = tell_in(actor, args, tale, &mut scene, deadline);
            (told, disk.remove())
        }
        Err(failure) => (Err(Setback::Failed(failure)), None),
    };
    let mut left: Vec<String> = network.remove().into_iter().chain(disk_left).collect();
    let leftovers = ledger.unwind(Deadline::after(BUDGET));
    left.extend(leftovers.iter().map(ToString::to_string));
    let document = told?;
    if !left.is_empty() {
        return Err(LeftOver(left.join(", ")).into());
    }
    tale.say("5. Everything is gone again: processes, namespaces, files.");
    Ok(document)
}

fn tell_in(
    actor: &Actor,
    args: &DemoArgs,
    tale: &Tale,
    scene: &mut Scene<'_>,
    deadline: Deadline,
) -> Result<Value, Setback> {
    let (dir, network) = (scene.dir, scene.network);
    let mut actor = actor.clone();
    network.instruct(&mut actor);
    tale.say(&format!(
        "1. {} boots a guest of {MEMORY} {}.",
        actor.title(),
        network.place()
    ));
    tale.add(&scene.disk.words());
    let before = boot_and_freeze(&actor, scene, tale, deadline)?;

    scene.disk.attach_again(deadline)?;
    let mut inputs = RestoreInputs::new(SandboxId::random(), dir.join("snapshot"));
    inputs.disk = RootDisk::At(scene.disk.path());
    inputs.memory_mode = args.memory_mode.policy(false);
    let mut spec = RestoreSpec::new(inputs, &actor.spec.program, network.guest());
    spec.vmm = actor.spec.clone();
    spec.runtime_dir = dir.join("run");
    spec.netns = network.netns_path().map(Netns::from);
    spec.init = Some(Init::new());
    let restored = restore(&spec, deadline)?;
    let after = recall(&actor, network, deadline)?;
    tale.say("3. The snapshot is restored, and its guest agent has answered:");
    tale.show(&restored);
    let mut api = Client::connect(restored.vmm.api_path(), deadline)?;
    let disk = scene.disk.seen(&api.info(deadline)?.config)?;
    drop(api);
    tale.add(&disk.words());
    if after.nonce != before.nonce || after.counter <= before.counter {
        return Err(Forgotten(format!("{before:?} became {after:?}")).into());
    }
    tale.say(&format!(
        "4. It is the same guest: nonce {} again, and its counter went on from {} to {}.",
        after.nonce, before.counter, after.counter
    ));
    let document = serde_json::json!({
        "vmm": restored.build,
        "stand_in": restored.is_stand_in(),
        "network": network.name(),
        "disk": disk.document,
        "memory_mode": restored.memory_mode.name(),
        "memory_bytes": restored.memory.0,
        "nonce": after.nonce,
        "counter_before": before.counter,
        "counter_after": after.counter,
        "timeline": restored.timeline.to_json(),
    });
    let leftovers = restored.destroy(deadline);
    if let Some(left) = leftovers.first() {
        return Err(LeftOver(left.to_string()).into());
    }
    Ok(document)
}

/// Boots a guest, reads its memory, freezes it into `DIR/snapshot` and ends it.
fn boot_and_freeze(
    actor: &Actor,
    scene: &Scene<'_>,
    tale: &Tale,
    deadline: Deadline,
) -> Result<Memory, Setback> {
    let (dir, network) = (scene.dir, scene.network);
    let mut processes = Ledger::new();
    let (socket, stream) = ApiSocket::bind(&dir.join("first.sock"))?;
    drop(stream);
    let netns = network
        .netns_path()
        .map(|path| netns::open(&path))
        .transpose()?;
    let netns = netns.as_ref().map(AsFd::as_fd);
    let mut vmm = launch(&actor.spec, socket, netns, &[], &mut processes)?;
    let mut api = Client::connect(vmm.api_path(), deadline)?;
    api.create(&vm_config(actor, scene)?, deadline)?;
    api.boot(deadline)?;
    let pidfd = Some(vmm.process().as_fd());
    await_ready(
        network.guest(),
        network.sockets(),
        Hedge::default(),
        deadline,
        pidfd,
    )?;
    let memory = recall(actor, network, deadline)?;

    agent(network).prepare_snapshot(MEMORY, deadline)?;
    let snapshot = dir.join("snapshot");
    fs::create_dir(&snapshot)?;
    let begun = Instant::now();
    api.pause(deadline)?;
    api.snapshot(&snapshot, deadline)
        .map_err(Setback::NoSnapshot)?;
    let took = begun.elapsed();
    end(&mut vmm, api, deadline)?;
    tale.say(&format!(
        "2. It is frozen into a snapshot ({:.1} ms) and destroyed.",
        took.as_secs_f64() * 1e3
    ));
    Ok(memory)
}

fn end(vmm: &mut Vmm, mut api: Client, deadline: Deadline) -> Result<(), Setback> {
    vmm.stop(StopLimits::default(), deadline, |_, deadline| {
        // Where this fails, signals follow.
        let _ = api.shutdown_vmm(deadline);
    })?;
    Ok(())
}

fn vm_config(actor: &Actor, scene: &Scene<'_>) -> Result<VmConfig, Setback> {
    let kernel = scene.dir.join("kernel");
    match actor.kernel {
        Kernel::ProbeGuest => probe_guest::write_to(&kernel)?,
        Kernel::Played => fs::write(&kernel, "the stand-in does not read its kernel")?,
    }
    let settings = probe_guest::Settings::default();
    Ok(VmConfig {
        cpus: CpusConfig::default(),
        memory: MemoryConfig {
            size: MEMORY.0,
            ..MemoryConfig::default()
        },
        payload: Some(PayloadConfig {
            kernel: Some(kernel),
            cmdline: Some(settings.to_string()),
            ..PayloadConfig::default()
        }),
        disks: Some(vec![scene.disk.device()]),
        net: scene.network.device().map(|device| vec![device]),
        balloon: Some(BalloonConfig::default()),
        console: ConsoleConfig {
            mode: ConsoleOutputMode::Off,
            ..ConsoleConfig::default()
        },
        serial: SerialConfig::default(),
        ..VmConfig::default()
    })
}

/// A directory that the ledger removes.
fn scratch(ledger: &mut Ledger) -> Result<PathBuf, Setback> {
    let name = format!("rewake-demo-{}", SandboxId::random());
    let path = std::env::temp_dir().join(name);
    ledger.push(Step::Directory { path: path.clone() });
    fs::create_dir(&path)?;
    Ok(path)
}

/// What only lives in the guest's memory.
#[derive(Debug, PartialEq, Eq)]
struct Memory {
    nonce: String,
    counter: u64,
}

/// Asks the guest what it remembers, in the private words of each kind of guest.
fn recall(actor: &Actor, network: &Network, deadline: Deadline) -> Result<Memory, Setback> {
    let target = match actor.kernel {
        Kernel::ProbeGuest => "/probe",
        Kernel::Played => "/sim/state",
    };
    let answer = agent(network).get_other(target, deadline)?;
    let limits = JsonLimits {
        bytes: 4 << 10,
        depth: 4,
    };
    let value: Value = json::from_slice_bounded(&answer.body, limits)?;
    let nonce = value["nonce"].as_str().unwrap_or_default().to_owned();
    match value["counter"].as_u64() {
        Some(counter) if !nonce.is_empty() => Ok(Memory { nonce, counter }),
        _ => Err(Forgotten(format!("it answered {value}")).into()),
    }
}

fn agent(network: &Network) -> Agent {
    let incarnation = Incarnation {
        sandbox: SandboxId::random(),
        lifecycle: Lifecycle::random(),
    };
    let options = ClientOptions {
        sockets: network.sockets(),
        ..ClientOptions::default()
    };
    Agent::new(network.guest(), incarnation, options)
}

impl Actor {
    fn title(&self) -> &'static str {
        match self.kernel {
            Kernel::ProbeGuest => "Cloud Hypervisor",
            Kernel::Played => "The stand-in (not Cloud Hypervisor, and no VM)",
        }
    }
}

/// What the demo has to say, unless a program is listening.
struct Tale {
    quiet: bool,
}

impl Tale {
    fn new(global: Global) -> Self {
        Self { quiet: global.json }
    }

    /// Whoever stops listening does not stop the story: everything must be gone at its end.
    fn say(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(io::stdout(), "{text}");
        }
    }

    /// Something more about what was said last.
    fn add(&self, text: &str) {
        self.say(&format!("   {text}"));
    }

    fn show(&self, restored: &Restored) {
        for line in restored.timeline.to_string().lines() {
            self.say(&format!("     {line}"));
        }
    }
}
