//! Whole lives: a guest is launched, paused, resumed, paused and resumed once more, and
//! destroyed, by the library's front door and the conventional way. The second pause is the
//! one that counts: by then the sandbox owns its memory file.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::host::{LaunchOptions, ResumeOptions, Sandbox};
use rewake::plan::MemoryMode;
use rewake::resource::disk::DiskMode;
use rewake::template::Template as HostTemplate;
use rewake::timeline::Timeline;

use super::BenchArgs;
use super::arms::{Arm, Job, Rival, conventional, disk_of, millis, phases};
use super::house::{BUDGET, House, mode_of};
use super::record::{Line, Machine, Sample, Variant};
use super::run::words;
use super::stage::{Stage, StageError, Template, remembers};
use super::stats::Random;
use super::table::Live;
use crate::cli::{Failure, Global};

/// What happened in one life.
type Story = Vec<Chapter>;

/// One operation.
struct Chapter {
    operation: &'static str,
    took: Duration,
    phases: std::collections::BTreeMap<String, f64>,
    /// How memory really came back, and for pauses and ends, how it came back before.
    memory: MemoryMode,
}

/// Runs `args.iterations` lives of each arm for each size of memory.
pub(super) fn measure(
    args: &BenchArgs,
    global: Global,
    stage: &Stage,
) -> Result<Vec<Line>, Failure> {
    let house = House::open(stage, args.disk.mode())?;
    let lines = lives(args, global, stage, &house);
    house.close(stage);
    lines
}

fn lives(
    args: &BenchArgs,
    global: Global,
    stage: &Stage,
    house: &House,
) -> Result<Vec<Line>, Failure> {
    let disk = args.disk.mode();
    let mut lines = Vec::new();
    let mut random = Random::new(args.seed);
    let mut live = Live::new(global.json);
    let conventionally = args.against.contains(&Rival::Conventional);
    let rounds = args.warm_up + args.iterations;
    let all = rounds * args.ram.len();
    for (place, ram_mib) in args.ram.iter().enumerate() {
        let plain = stage.template(*ram_mib, disk.is_some())?;
        let template = house.template(stage, *ram_mib, disk)?;
        let used = disk_of(stage, args.disk, std::slice::from_ref(&plain))?;
        let machine = Machine::here(&plain.build);
        for round in 0..rounds {
            live.show(place * rounds + round, all, machine.is_stand_in(), &lines);
            let mut arms = vec![Arm::Ours { pools: false }];
            arms.extend(conventionally.then_some(Arm::Rival(Rival::Conventional)));
            random.shuffle(&mut arms);
            for arm in arms {
                let (story, error) = match arm {
                    Arm::Ours { .. } => ours(house, stage, &template),
                    Arm::Rival(_) => theirs(stage, &plain, used.mode()),
                };
                let Some(iteration) = round.checked_sub(args.warm_up) else {
                    continue;
                };
                let line = |operation: &str, memory: MemoryMode, sample| Line {
                    machine: machine.clone(),
                    variant: Variant {
                        operation: operation.to_owned(),
                        arm: arm.name().to_owned(),
                        pools: false,
                        memory_mode: memory.name().to_owned(),
                        disk: used.name().to_owned(),
                        ram_mib: *ram_mib,
                        concurrency: 1,
                        page_cache: "warm".to_owned(),
                        age_s: None,
                        template: None,
                    },
                    sample,
                };
                for chapter in story {
                    let sample = Sample {
                        iteration,
                        ms: Some(millis(chapter.took)),
                        phases: chapter.phases,
                        error: None,
                        batch_ms: None,
                    };
                    lines.push(line(chapter.operation, chapter.memory, sample));
                }
                if let Some((operation, text)) = error {
                    let sample = Sample {
                        iteration,
                        ms: None,
                        phases: Default::default(),
                        error: Some(text),
                        batch_ms: None,
                    };
                    lines.push(line(operation, hoped_for(arm, operation), sample));
                }
            }
        }
    }
    live.clear();
    Ok(lines)
}

/// How memory should come back: what failed did not tell.
fn hoped_for(arm: Arm, operation: &str) -> MemoryMode {
    match (arm, operation) {
        (Arm::Rival(_), _) => MemoryMode::Copy,
        (_, "launch" | "pause-first") => MemoryMode::Map,
        _ => MemoryMode::Shared,
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
    let took = begun.elapsed();
    let id = sandbox.id().clone();
    let lived = mode_of(&sandbox).and_then(|memory| {
        note(story, "launch", took, sandbox.timeline(), memory);
        pauses(house, stage, sandbox, memory, story, step)
    });
    if lived.is_ok() {
        *step = "destroy";
    }
    // Whatever became of it, it is not left behind.
    let begun = Instant::now();
    let timeline = house.host.destroy(&id, Deadline::after(BUDGET));
    let took = begun.elapsed();
    let memory = lived?;
    note(story, "destroy", took, &timeline?, memory);
    Ok(())
}

/// The result is how memory came back the last time.
fn pauses(
    house: &House,
    stage: &Stage,
    mut sandbox: Sandbox,
    mut memory: MemoryMode,
    story: &mut Story,
    step: &mut &'static str,
) -> Result<MemoryMode, Failure> {
    let nonce = stage.nonce(&sandbox.agent()?, Deadline::after(BUDGET))?;
    for (pause, resume) in [("pause-first", "resume-first"), ("pause", "resume")] {
        *step = pause;
        let begun = Instant::now();
        sandbox.pause()?;
        note(story, pause, begun.elapsed(), sandbox.timeline(), memory);
        *step = resume;
        let begun = Instant::now();
        sandbox = house.host.resume(sandbox.id(), ResumeOptions::default())?;
        let took = begun.elapsed();
        memory = mode_of(&sandbox)?;
        note(story, resume, took, sandbox.timeline(), memory);
        let found = stage.nonce(&sandbox.agent()?, Deadline::after(BUDGET))?;
        remembers(&found, &nonce)?;
    }
    Ok(memory)
}

fn note(
    story: &mut Story,
    operation: &'static str,
    took: Duration,
    timeline: &Timeline,
    memory: MemoryMode,
) {
    story.push(Chapter {
        operation,
        took,
        phases: phases(timeline),
        memory,
    });
}

fn theirs(stage: &Stage, template: &Template, disk: Option<DiskMode>) -> Outcome {
    let job = Job {
        stage,
        template,
        mode: MemoryMode::Copy,
        disk: disk.unwrap_or_default(),
        pools: None,
        writes: true,
    };
    let mut story = Vec::new();
    let mut step = "launch";
    match their_life(&job, &mut story, &mut step) {
        Ok(()) => (story, None),
        Err(failure) => (story, Some((step, words(&failure)))),
    }
}

fn their_life(job: &Job<'_>, story: &mut Story, step: &mut &'static str) -> Result<(), Failure> {
    let mut tell = |operation, (took, phases), memory| {
        story.push(Chapter {
            operation,
            took,
            phases,
            memory,
        });
    };
    let mut life = conventional::Life::begin(job)?;
    let lived = (|| {
        let mut memory = life.memory_mode(job)?;
        tell("launch", life.launched.clone(), memory);
        job.stage.check_guest(job.template, life.netns.as_fd())?;
        for (pause, resume) in [("pause-first", "resume-first"), ("pause", "resume")] {
            *step = pause;
            tell(pause, life.pause(job)?, memory);
            *step = resume;
            let resumed = life.resume(job)?;
            memory = life.memory_mode(job)?;
            tell(resume, resumed, memory);
            job.stage.check_guest(job.template, life.netns.as_fd())?;
        }
        *step = "destroy";
        Ok::<_, Failure>(memory)
    })();
    let begun = Instant::now();
    let left = life.end(job.stage);
    let took = begun.elapsed();
    let memory = lived?;
    tell("destroy", (took, Default::default()), memory);
    if left.is_empty() {
        return Ok(());
    }
    Err(StageError::Program {
        program: "the conventional way".to_owned(),
        says: format!("left over: {}", left.join(", ")),
    }
    .into())
}
