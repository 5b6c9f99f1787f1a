//! Whole lives: a guest is launched, paused, resumed, paused and resumed once more, and
//! destroyed, by the library's front door and the conventional way. The second pause is the
//! one that counts: by then the sandbox owns its memory file.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::host::{
    Error as HostError, Host, HostConfig, LaunchOptions, Limits, ResumeOptions, Sandbox,
};
use rewake::ids::TemplateId;
use rewake::plan::MemoryMode;
use rewake::resource::disk::DiskMode;
use rewake::template::{BuildSpec, Template as HostTemplate};
use rewake::timeline::Timeline;
use rewake::units::Bytes;
use rewake_sys::netns;

use super::BenchArgs;
use super::arms::{Arm, Job, Rival, conventional, millis, phases};
use super::record::{Line, Machine, Sample, Variant};
use super::run::words;
use super::stage::{Stage, StageError, Template};
use super::stats::Random;
use super::table::Live;
use crate::cli::{Failure, Global};

const BUDGET: Duration = Duration::from_secs(120);

/// What happened in one life: each operation, what it took, and its phases.
type Story = Vec<(
    &'static str,
    Duration,
    std::collections::BTreeMap<String, f64>,
)>;

/// The front door, with a network of its own.
struct House {
    host: Host,
    /// Keeps the namespace.
    _netns: OwnedFd,
}

impl House {
    fn open(stage: &Stage) -> Result<Self, Failure> {
        let netns = netns::run_in_new(|netns| netns)?;
        let mut config = HostConfig::new(stage.dir.join("root"));
        config.net.netns_dir = stage.run.join("netns-of-host");
        let mut config = config.with_runtime_dir(stage.run.join("h"));
        let number = netns.as_raw_fd();
        config.netns = Some(format!("/proc/{}/fd/{number}", std::process::id()).into());
        config.vmm = stage.actor.writing_spec();
        config.limits = Limits {
            sandboxes: None,
            memory_reserve: Bytes(0),
        };
        Ok(Self {
            host: Host::open(config)?,
            _netns: netns,
        })
    }

    fn template(
        &self,
        stage: &Stage,
        ram_mib: u64,
        disk: Option<DiskMode>,
    ) -> Result<HostTemplate, Failure> {
        let kernel = stage.kernel(&stage.dir.join(format!("kernel-{ram_mib}")))?;
        let name = TemplateId::new(format!("bench-{ram_mib}"))?;
        let spec = BuildSpec {
            rootfs: disk.map(|_| stage.base()).transpose()?,
            disk_mode: disk.unwrap_or_default(),
            memory: Bytes::mib(ram_mib),
            runtime_dir: self.host.config().runtime_dir.clone(),
            ..BuildSpec::new(name, kernel, stage.actor.writing_spec())
        };
        Ok(self
            .host
            .build(&spec, &mut |_| {}, Deadline::after(BUDGET))?)
    }

    /// Takes its network down: the rest of it goes with the namespace.
    fn close(self, stage: &Stage) {
        drop(self.host);
        // A mount of its own, as `ip netns` makes it.
        let mounts = stage.run.join("netns-of-host");
        let _ = rustix::mount::unmount(&mounts, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Runs `args.iterations` lives of each arm for each size of memory.
pub(super) fn measure(
    args: &BenchArgs,
    global: Global,
    stage: &Stage,
) -> Result<Vec<Line>, Failure> {
    let disk = args.disk.mode();
    let house = House::open(stage)?;
    let mut lines = Vec::new();
    let mut random = Random::new(args.seed);
    let mut live = Live::new(global.json);
    let conventionally = args.against.contains(&Rival::Conventional);
    let rounds = args.warm_up + args.iterations;
    let all = rounds * args.ram.len();
    for (place, ram_mib) in args.ram.iter().enumerate() {
        let plain = stage.template(*ram_mib, disk.is_some())?;
        let template = house.template(stage, *ram_mib, disk)?;
        let machine = Machine::here(&plain.build);
        for round in 0..rounds {
            live.show(place * rounds + round, all, machine.is_stand_in(), &lines);
            let mut arms = vec![Arm::Ours { pools: false }];
            arms.extend(conventionally.then_some(Arm::Rival(Rival::Conventional)));
            random.shuffle(&mut arms);
            for arm in arms {
                let (story, error) = match arm {
                    Arm::Ours { .. } => ours(&house, stage, &template),
                    Arm::Rival(_) => theirs(stage, &plain, disk),
                };
                let Some(iteration) = round.checked_sub(args.warm_up) else {
                    continue;
                };
                let line = |operation: &str, sample| Line {
                    machine: machine.clone(),
                    variant: Variant {
                        operation: operation.to_owned(),
                        arm: arm.name().to_owned(),
                        pools: false,
                        memory_mode: memory(arm, operation).to_owned(),
                        disk: args.disk.name().to_owned(),
                        ram_mib: *ram_mib,
                        concurrency: 1,
                        page_cache: "warm".to_owned(),
                    },
                    sample,
                };
                for (operation, took, phases) in story {
                    let sample = Sample {
                        iteration,
                        ms: Some(millis(took)),
                        phases,
                        error: None,
                        batch_ms: None,
                    };
                    lines.push(line(operation, sample));
                }
                if let Some((operation, text)) = error {
                    let sample = Sample {
                        iteration,
                        ms: None,
                        phases: Default::default(),
                        error: Some(text),
                        batch_ms: None,
                    };
                    lines.push(line(operation, sample));
                }
            }
        }
    }
    live.clear();
    house.close(stage);
    Ok(lines)
}

/// How memory comes back, and for pauses, how it came back before.
fn memory(arm: Arm, operation: &str) -> &'static str {
    match (arm, operation) {
        (Arm::Rival(_), _) => MemoryMode::Copy.name(),
        (_, "launch" | "pause-first") => MemoryMode::Map.name(),
        _ => MemoryMode::Shared.name(),
    }
}

/// A life that came to its end, or as much of it as there was.
type Outcome = (Story, Option<(&'static str, String)>);

fn ours(house: &House, stage: &Stage, template: &HostTemplate) -> Outcome {
    let mut story = Vec::new();
    let mut step = "launch";
    match our_life(house, stage, template, &mut story, &mut step) {
        Ok(()) => (story, None),
        Err(failure) => (story, Some((step, words(&failure)))),
    }
}

fn our_life(
    house: &House,
    stage: &Stage,
    template: &HostTemplate,
    story: &mut Story,
    step: &mut &'static str,
) -> Result<(), Failure> {
    let begun = Instant::now();
    let sandbox = house.host.launch(template, LaunchOptions::default())?;
    note(story, "launch", begun, sandbox.timeline());
    let id = sandbox.id().clone();
    let lived = pauses(house, stage, sandbox, story, step);
    if lived.is_ok() {
        *step = "destroy";
    }
    // Whatever became of it, it is not left behind.
    let begun = Instant::now();
    let timeline = house.host.destroy(&id, Deadline::after(BUDGET));
    lived?;
    note(story, "destroy", begun, &timeline?);
    Ok(())
}

fn pauses(
    house: &House,
    stage: &Stage,
    mut sandbox: Sandbox,
    story: &mut Story,
    step: &mut &'static str,
) -> Result<(), Failure> {
    let nonce = stage.nonce(&sandbox.agent()?, Deadline::after(BUDGET))?;
    for (pause, resume) in [("pause-first", "resume-first"), ("pause", "resume")] {
        *step = pause;
        let begun = Instant::now();
        sandbox.pause()?;
        note(story, pause, begun, sandbox.timeline());
        *step = resume;
        let begun = Instant::now();
        sandbox = house.host.resume(sandbox.id(), ResumeOptions::default())?;
        note(story, resume, begun, sandbox.timeline());
        remembers(stage, &sandbox, &nonce)?;
    }
    Ok(())
}

fn note(story: &mut Story, operation: &'static str, begun: Instant, timeline: &Timeline) {
    story.push((operation, begun.elapsed(), phases(timeline)));
}

fn remembers(stage: &Stage, sandbox: &Sandbox, nonce: &str) -> Result<(), Failure> {
    let agent = sandbox.agent().map_err(|error: HostError| error)?;
    let found = stage.nonce(&agent, Deadline::after(BUDGET))?;
    if found == nonce {
        return Ok(());
    }
    Err(StageError::Forgotten(format!("its nonce is {found}, not {nonce}")).into())
}

fn theirs(stage: &Stage, template: &Template, disk: Option<DiskMode>) -> Outcome {
    let job = Job {
        stage,
        template,
        mode: MemoryMode::Copy,
        disk: disk.unwrap_or_default(),
        kits: None,
    };
    let mut story = Vec::new();
    let mut step = "launch";
    let told = (|| {
        let mut life = conventional::Life::begin(&job)?;
        story.push(("launch", life.launched.0, life.launched.1.clone()));
        let outcome = (|| {
            stage.check_guest(template, life.netns.as_fd())?;
            for (pause, resume) in [("pause-first", "resume-first"), ("pause", "resume")] {
                step = pause;
                story.push((pause, life.pause(&job)?, Default::default()));
                step = resume;
                let (took, phases) = life.resume(&job)?;
                story.push((resume, took, phases));
                stage.check_guest(template, life.netns.as_fd())?;
            }
            step = "destroy";
            Ok::<(), Failure>(())
        })();
        let begun = Instant::now();
        let left = life.end(stage);
        outcome?;
        story.push(("destroy", begun.elapsed(), Default::default()));
        if left.is_empty() {
            return Ok(());
        }
        Err(StageError::Program {
            program: "the conventional way".to_owned(),
            says: format!("left over: {}", left.join(", ")),
        }
        .into())
    })();
    match told {
        Ok(()) => (story, None),
        Err(failure) => (story, Some((step, words(&failure)))),
    }
}
