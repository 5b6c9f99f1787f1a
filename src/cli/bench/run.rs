//! The run itself: rounds, in which every variant has its turn once.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::fd::AsFd;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use rewake::plan::MemoryMode;
use rewake::template::Template as HostTemplate;
use rewake::timeline::Timeline;
use rewake::trace::Trace;
use rewake::units::Bytes;

use super::apart::{self, Place};
use super::arms::{self, Arm, Job, Launched, millis};
use super::ground::Ground;
use super::house::House;
use super::matrix::{self, Entry};
use super::pools::Pools;
use super::record::{self, Line, Machine, Sample};
use super::stage::{Actor, Stage, Template};
use super::stats::Random;
use super::{BenchArgs, Cache, Operation, Switch, chosen, html, life, table};
use crate::cli::report::{self, WriteError};
use crate::cli::{Failure, Global};

/// What the times are.
pub(super) const SAYS: &str =
    "Milliseconds; launch and resume until the agent has taken /init, all else until it is done";

/// Undoing has left something behind, or could not be done.
#[derive(Debug, thiserror::Error)]
#[error("Left over: {0}")]
pub(super) struct LeftOver(pub(super) String);

/// Nothing was measured.
#[derive(Debug, thiserror::Error)]
#[error("All {0} failed; the first one: {1}")]
struct AllFailed(usize, String);

pub(super) fn run(args: &BenchArgs, global: Global) -> Result<(), Failure> {
    matrix::check(args)?;
    matrix::check_places(args)?;
    let actor = Actor::choose(args)?;
    // Said before anything is measured: who looks on shall not take it for the real thing.
    if actor.stand_in && !global.json {
        println!("This is the stand-in, not Cloud Hypervisor: its times say nothing about it.");
    }
    if cfg!(debug_assertions) && !global.json {
        println!("This rewake is a debug build: its times say little.");
    }
    let stage = Stage::set(actor, Ground::take(global)?)?;
    let measured = if args.operation == [Operation::Life] {
        life::measure(args, global, &stage).map(|lines| (lines, None))
    } else {
        measure(args, global, &stage)
    };
    let left = stage.strike();
    let (lines, kit) = measured?;
    if !left.is_empty() {
        return Err(LeftOver(left.join(", ")).into());
    }
    tell(args, global, &lines, kit)
}

/// What the turns of one run share.
struct Scene<'a> {
    stage: &'a Stage,
    templates: Vec<Template>,
    /// For what begins with a sandbox: a host, and its template for each of those above.
    house: Option<(&'a House, Vec<HostTemplate>)>,
    pools: Option<Pools>,
}

/// What was measured, and how much memory a process has that waits for its launch.
type Measured = (Vec<Line>, Option<Bytes>);

fn measure(args: &BenchArgs, global: Global, stage: &Stage) -> Result<Measured, Failure> {
    let apart = args.operation.iter().any(|it| *it != Operation::Launch);
    let house = apart.then(|| House::open(stage, args.disk.mode()));
    let house = house.transpose()?;
    let measured = set(args, stage, house.as_ref()).and_then(|scene| {
        let lines = rounds(args, global, &scene);
        let kit = scene.pools.as_ref().and_then(Pools::memory_of_a_kit);
        scene.pools.map_or(Ok(()), Pools::close)?;
        Ok((lines?, kit))
    });
    if let Some(house) = house {
        house.close(stage);
    }
    measured
}

/// Makes templates and pools.
fn set<'a>(
    args: &BenchArgs,
    stage: &'a Stage,
    house: Option<&'a House>,
) -> Result<Scene<'a>, Failure> {
    let disk = args.disk.mode();
    let made = |ram: &u64| stage.template(*ram, disk.is_some());
    let templates: Vec<Template> = match &args.template {
        Some(name) => vec![chosen::template(args, stage, name)?],
        None => args.ram.iter().map(made).collect::<Result<_, _>>()?,
    };
    let ours = |house: &House| {
        let templates = templates.iter().map(|template| match &template.chosen {
            Some(chosen) => Ok(chosen.clone()),
            None => house.template(stage, template.ram_mib, disk),
        });
        templates.collect::<Result<Vec<_>, Failure>>()
    };
    let house = match house {
        Some(house) => Some((house, ours(house)?)),
        None => None,
    };
    let warm = args.operation.contains(&Operation::Launch) && args.pools.contains(&Switch::On);
    let most = args.concurrency.iter().max().copied().unwrap_or(1);
    Ok(Scene {
        stage,
        house,
        pools: warm
            .then(|| Pools::start(stage, most, templates.len()))
            .transpose()?,
        templates,
    })
}

fn rounds(args: &BenchArgs, global: Global, scene: &Scene<'_>) -> Result<Vec<Line>, Failure> {
    let disk = arms::disk_of(scene.stage, args.disk, &scene.templates)?;
    let mut entries = matrix::entries(args, disk, &scene.templates);
    let build = scene.templates.first().map(|it| it.build.as_str());
    let machine = Machine::here(build.unwrap_or_default());
    let mut out = args.out.as_ref().map(create).transpose()?;
    let mut random = Random::new(args.seed);
    let mut live = table::Live::new(global.json);
    let rounds = args.warm_up + args.iterations;
    let mut lines = Vec::new();
    let mut traces = Vec::new();
    for round in 0..rounds {
        random.shuffle(&mut entries);
        for (turn, entry) in entries.iter().enumerate() {
            let all = rounds * entries.len();
            live.show(
                round * entries.len() + turn,
                all,
                machine.is_stand_in(),
                &lines,
            );
            let batch = turn_of(scene, entry)?;
            let Some(iteration) = round.checked_sub(args.warm_up) else {
                continue;
            };
            for (mut sample, timeline) in batch {
                sample.iteration = iteration;
                if let (0, Some(timeline)) = (iteration, timeline) {
                    traces.push((entry.variant.name(), timeline));
                }
                let line = Line {
                    machine: machine.clone(),
                    variant: entry.variant.clone(),
                    sample,
                };
                if let Some(out) = &mut out {
                    record::write(out, &line)?;
                }
                lines.push(line);
            }
        }
        // What was measured is kept whatever comes.
        if let Some(out) = &mut out {
            out.flush()?;
        }
    }
    live.clear();
    if let Some(mut out) = out {
        out.flush()?;
    }
    if let Some(path) = &args.trace {
        report::trace(path, trace(&machine, traces))?;
    }
    Ok(lines)
}

/// One turn of one variant.
fn turn_of(scene: &Scene<'_>, entry: &Entry) -> Result<Vec<Outcome>, Failure> {
    let Scene {
        stage,
        templates,
        house,
        pools,
    } = scene;
    if let Some(pools) = pools {
        // Also before the turns of others: nobody shall be measured beside a filling pool.
        pools.settle()?;
    }
    let template = &templates[entry.template];
    match (entry.operation, house) {
        (Operation::Launch, _) => launches(stage, template, pools.as_ref(), entry),
        (_, Some((house, ours))) => {
            let place = Place {
                stage,
                house,
                plain: template,
                template: &ours[entry.template],
            };
            apart::batch(place, entry)
        }
        // Invariant: a host was opened for every other operation.
        (_, None) => unreachable!("no host"),
    }
}

fn trace(machine: &Machine, mut timelines: Vec<(String, Timeline)>) -> Trace {
    timelines.sort_by_key(|(_, timeline)| timeline.origin());
    let origin = timelines
        .first()
        .map_or_else(Instant::now, |it| it.1.origin());
    let mut trace = Trace::new(origin);
    for (name, timeline) in &timelines {
        trace.add(&format!("{name} [{}]", machine.vmm), timeline);
    }
    trace
}

fn create(path: &std::path::PathBuf) -> Result<BufWriter<File>, WriteError> {
    let file = File::create(path).map_err(|source| WriteError {
        path: path.clone(),
        source,
    })?;
    Ok(BufWriter::new(file))
}

/// What became of one guest.
pub(super) type Outcome = (Sample, Option<Timeline>);

/// Does something with each of these at the same time, on a thread each; `None` is for one
/// that panicked. Also, how long all of them took together.
pub(super) fn at_once<J: Send, T: Send>(
    jobs: Vec<J>,
    act: impl Fn(J) -> T + Sync,
) -> (Vec<Option<T>>, Duration) {
    let barrier = Barrier::new(jobs.len() + 1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = jobs
            .into_iter()
            .map(|job| {
                let (act, barrier) = (&act, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    act(job)
                })
            })
            .collect();
        barrier.wait();
        let begun = Instant::now();
        let done = threads.into_iter().map(|thread| thread.join().ok());
        (done.collect(), begun.elapsed())
    })
}

/// As many guests at once as the variant says. They are looked at and ended when the last one
/// has been timed.
fn launches(
    stage: &Stage,
    template: &Template,
    pools: Option<&Pools>,
    entry: &Entry,
) -> Result<Vec<Outcome>, Failure> {
    let fresh = match entry.age {
        Some(age) => {
            let fresh = stage.template(template.ram_mib, template.base.is_some())?;
            apart::wait_until(fresh.since + Duration::from_secs(age));
            Some(fresh)
        }
        None => None,
    };
    let template = fresh.as_ref().unwrap_or(template);
    let pools = pools.filter(|_| matches!(entry.arm, Arm::Ours { pools: true }));
    if let Some(pools) = pools {
        pools.prepare(template, entry.disk)?;
    }
    let job = Job {
        stage,
        template,
        mode: entry.mode,
        disk: entry.disk,
        pools,
        writes: false,
    };
    let count = entry.variant.concurrency;
    let ready = (0..count).map(|_| job.prepare(entry.arm));
    let ready = ready.collect::<Result<Vec<_>, _>>()?;
    if entry.cache == Cache::Cold {
        Stage::chill(&template.snapshot, template.base.as_deref())?;
    }
    let (launched, took) = at_once(ready, |ready| {
        job.launch(entry.arm, ready)
            .map_err(|failure| words(&failure))
    });
    let batch_ms = (count > 1).then(|| millis(took));
    let mut outcomes = Vec::new();
    for launched in launched {
        let launched = launched.unwrap_or_else(|| Err("a panic".to_owned()));
        outcomes.push(settle(stage, template, entry, launched, batch_ms)?);
    }
    if let Some(fresh) = &fresh {
        Stage::discard(fresh)?;
    }
    Ok(outcomes)
}

/// Turns a launch into a sample, once its guest has proved to be the template's.
fn settle(
    stage: &Stage,
    template: &Template,
    entry: &Entry,
    launched: Result<Launched, String>,
    batch_ms: Option<f64>,
) -> Result<Outcome, Failure> {
    let mut sample = Sample {
        batch_ms,
        ..Sample::default()
    };
    let launched = match launched {
        Ok(launched) => launched,
        Err(text) => {
            sample.error = Some(text);
            return Ok((sample, None));
        }
    };
    let remembers = stage.check_guest(template, launched.netns.as_fd());
    sample.error = match remembers {
        Ok(()) => judge(entry, Some(launched.memory_mode)),
        Err(failure) => Some(words(&failure)),
    };
    if sample.error.is_none() {
        let took = millis(launched.took);
        sample.ms = Some(took);
        sample.phases.clone_from(&launched.phases);
        // What happens beside or after it is not a part of it.
        sample.phases.retain(|_, at| *at <= took);
    }
    let timeline = launched.timeline.clone();
    let left = launched.end(stage);
    if left.is_empty() {
        return Ok((sample, timeline));
    }
    Err(LeftOver(left.join(", ")).into())
}

/// A time in another mode than the variant's says nothing of the variant.
pub(super) fn judge(entry: &Entry, used: Option<MemoryMode>) -> Option<String> {
    match used {
        Some(used) if used == entry.mode => None,
        Some(used) => Some(format!("memory mode {used} was used")),
        None => Some("it is not known which memory mode was used".to_owned()),
    }
}

/// A failure with all its causes, on one line.
pub(super) fn words(failure: &Failure) -> String {
    let Failure::Error(error) = failure else {
        return "something is missing".to_owned();
    };
    report::words(&**error)
}

fn tell(
    args: &BenchArgs,
    global: Global,
    lines: &[Line],
    kit: Option<Bytes>,
) -> Result<(), Failure> {
    let Some(first) = lines.first() else {
        return Ok(());
    };
    if let (true, Some(path)) = (args.operation == [Operation::Life], &args.out) {
        let mut out = create(path)?;
        for line in lines {
            record::write(&mut out, line)?;
        }
        out.flush()?;
    }
    if let Some(path) = &args.html {
        html::write(path, lines)?;
    }
    let rows = table::rows(lines);
    let remarks = matrix::remarks(args);
    if global.json {
        report::json(&serde_json::json!({
            "machine": first.machine,
            "stand_in": first.machine.is_stand_in(),
            "seed": args.seed,
            "remarks": remarks,
            "kit_private_bytes": kit.map(|it| it.0),
            "variants": rows,
        }))?;
    } else {
        let mut out = io::stdout().lock();
        writeln!(out, "{}", first.machine.line())?;
        writeln!(out, "{SAYS}; seed {}.", args.seed)?;
        for line in table::text(&rows) {
            writeln!(out, "{line}")?;
        }
        writeln!(out)?;
        for line in table::phase_text(&rows) {
            writeln!(out, "{line}")?;
        }
        if let Some(kit) = kit {
            let mib = kit.0 as f64 / f64::from(1 << 20);
            writeln!(
                out,
                "A process that waits in the pool has {mib:.1} MiB of its own."
            )?;
        }
        for remark in remarks {
            writeln!(out, "{remark}")?;
        }
    }
    let errors: Vec<_> = lines
        .iter()
        .filter_map(|line| line.sample.error.as_ref())
        .collect();
    if let (Some(error), true) = (errors.first(), errors.len() == lines.len()) {
        return Err(AllFailed(errors.len(), (*error).clone()).into());
    }
    if let (Some(error), false) = (errors.first(), global.json) {
        println!(
            "{} of {} failed; the first one: {error}",
            errors.len(),
            lines.len()
        );
    }
    Ok(())
}
