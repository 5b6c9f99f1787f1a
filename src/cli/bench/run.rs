//! The run itself: rounds, in which every variant has its turn once.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::fd::AsFd;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::resource::disk::DiskMode;
use rewake::restore::kit::{KitPool, KitPoolOptions, Places};
use rewake::timeline::Timeline;
use rewake::trace::Trace;

use super::arms::{Arm, Job, Launched, millis, ours};
use super::record::{self, Line, Machine, Sample, Variant};
use super::stage::{Actor, Stage, Template};
use super::stats::Random;
use super::{BenchArgs, Cache, Operation, Switch, html, life, table};
use crate::cli::report::{self, WriteError};
use crate::cli::{Failure, Global};

/// How long a pool may take to fill.
const FILL_BUDGET: Duration = Duration::from_secs(120);

/// Undoing has left something behind, or could not be done.
#[derive(Debug, thiserror::Error)]
#[error("Left over: {0}")]
struct LeftOver(String);

/// Nothing was measured.
#[derive(Debug, thiserror::Error)]
#[error("All {0} launches failed; the first one: {1}")]
struct AllFailed(usize, String);

/// What takes turns.
struct Entry {
    arm: Arm,
    variant: Variant,
    /// Index among the templates.
    template: usize,
    job: (rewake::plan::MemoryMode, DiskMode),
    cache: Cache,
}

pub(super) fn run(args: &BenchArgs, global: Global) -> Result<(), Failure> {
    let actor = Actor::choose(args)?;
    // Said before anything is measured: who looks on shall not take it for the real thing.
    if actor.stand_in && !global.json {
        println!("This is the stand-in, not Cloud Hypervisor: its times say nothing about it.");
    }
    if cfg!(debug_assertions) && !global.json {
        println!("This rewake is a debug build: its times say little.");
    }
    let stage = Stage::set(actor)?;
    let measured = match args.operation {
        Operation::Launch => measure(args, global, &stage),
        Operation::Life => life::measure(args, global, &stage),
    };
    let left = stage.strike();
    let lines = measured?;
    if !left.is_empty() {
        return Err(LeftOver(left.join(", ")).into());
    }
    tell(args, global, &lines)
}

fn measure(args: &BenchArgs, global: Global, stage: &Stage) -> Result<Vec<Line>, Failure> {
    let disk = args.disk.mode();
    let templates = args
        .ram
        .iter()
        .map(|ram| stage.template(*ram, disk.is_some()));
    let templates: Vec<Template> = templates.collect::<Result<_, _>>()?;
    let mut entries = entries(args, &templates);
    let target = entries
        .iter()
        .filter(|entry| matches!(entry.arm, Arm::Ours { pools: true }))
        .map(|entry| entry.variant.concurrency)
        .max();
    let kits = target.map(|target| kits(stage, target)).transpose()?;
    let machine = Machine::here(
        &templates
            .first()
            .map_or_else(String::new, |it| it.build.clone()),
    );
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
            let batch = batch(stage, &templates[entry.template], kits.as_ref(), entry)?;
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
    }
    live.clear();
    if let Some(mut out) = out {
        out.flush()?;
    }
    if let Some(path) = &args.trace {
        report::trace(path, trace(&machine, traces))?;
    }
    if let Some(kits) = kits {
        say_cost(&kits, global);
        let left = kits.close(Deadline::after(FILL_BUDGET));
        if !left.is_empty() {
            return Err(LeftOver(left.join(", ")).into());
        }
    }
    Ok(lines)
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

/// Every combination that was asked for. Variants come in the order in which they make a
/// readable table.
fn entries(args: &BenchArgs, templates: &[Template]) -> Vec<Entry> {
    let mut arms: Vec<Arm> = args
        .against
        .iter()
        .map(|rival| Arm::Rival(*rival))
        .collect();
    arms.sort_by_key(|arm| arm.name() != "floor");
    let pools = |switch: &Switch| Arm::Ours {
        pools: *switch == Switch::On,
    };
    let place = arms.iter().take_while(|arm| arm.name() == "floor").count();
    arms.splice(place..place, args.pools.iter().map(pools));
    let mut entries: Vec<Entry> = Vec::new();
    for (index, template) in templates.iter().enumerate() {
        for concurrency in &args.concurrency {
            for cache in &args.page_cache {
                for memory in &args.memory_mode {
                    for arm in &arms {
                        let asked = (*memory).into();
                        let variant = Variant {
                            operation: "launch".to_owned(),
                            arm: arm.name().to_owned(),
                            pools: matches!(arm, Arm::Ours { pools: true }),
                            memory_mode: arm.mode(asked).name().to_owned(),
                            disk: args.disk.name().to_owned(),
                            ram_mib: template.ram_mib,
                            concurrency: *concurrency,
                            page_cache: cache.name().to_owned(),
                        };
                        if entries.iter().any(|entry| entry.variant == variant) {
                            continue;
                        }
                        entries.push(Entry {
                            arm: *arm,
                            variant,
                            template: index,
                            job: (asked, args.disk.mode().unwrap_or(DiskMode::Auto)),
                            cache: *cache,
                        });
                    }
                }
            }
        }
    }
    entries
}

fn kits(stage: &Stage, target: usize) -> Result<KitPool, Failure> {
    let places = Places::Slots {
        host: Arc::clone(&stage.net),
        pool: None,
    };
    let options = KitPoolOptions {
        target,
        ..KitPoolOptions::default()
    };
    Ok(KitPool::start(
        stage.actor.spec.clone(),
        ours::run_dir(stage),
        places,
        options,
    )?)
}

type Outcome = (Sample, Option<Timeline>);

/// One turn of one variant: as many guests at once as it says. They are looked at and ended
/// when the last one has been timed.
fn batch(
    stage: &Stage,
    template: &Template,
    kits: Option<&KitPool>,
    entry: &Entry,
) -> Result<Vec<Outcome>, Failure> {
    let ours_warm = matches!(entry.arm, Arm::Ours { pools: true });
    if let Some(kits) = kits {
        // Also before the turns of others: nobody shall be measured beside a filling pool.
        if !kits.wait_settled(Deadline::after(FILL_BUDGET)) {
            return Err(LeftOver("a pool that does not fill".to_owned()).into());
        }
    }
    let job = Job {
        stage,
        template,
        mode: entry.job.0,
        disk: entry.job.1,
        kits: kits.filter(|_| ours_warm),
    };
    let count = entry.variant.concurrency;
    let ready = (0..count).map(|_| job.prepare(entry.arm));
    let ready = ready.collect::<Result<Vec<_>, _>>()?;
    match entry.cache {
        Cache::Cold => Stage::chill(template)?,
        Cache::Warm => {}
    }
    let barrier = Barrier::new(count + 1);
    let (launched, took) = std::thread::scope(|scope| {
        let threads: Vec<_> = ready
            .into_iter()
            .map(|ready| {
                let (job, barrier) = (&job, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    job.launch(entry.arm, ready)
                        .map_err(|failure| words(&failure))
                })
            })
            .collect();
        barrier.wait();
        let begun = Instant::now();
        let launched: Vec<Result<Launched, String>> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err("a panic".to_owned())))
            .collect();
        (launched, begun.elapsed())
    });
    let batch_ms = (count > 1).then(|| millis(took));
    let mut outcomes = Vec::new();
    for launched in launched {
        outcomes.push(settle(stage, template, entry, launched, batch_ms)?);
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
        iteration: 0,
        ms: None,
        phases: Default::default(),
        error: None,
        batch_ms,
    };
    let launched = match launched {
        Ok(launched) => launched,
        Err(text) => {
            sample.error = Some(text);
            return Ok((sample, None));
        }
    };
    let remembers = stage.check_guest(template, launched.netns.as_fd());
    let used = launched.memory_mode.map(rewake::plan::MemoryMode::name);
    let other = used.filter(|used| *used != entry.variant.memory_mode);
    match (remembers, other) {
        (Ok(()), None) => {
            sample.ms = Some(millis(launched.took));
            sample.phases.clone_from(&launched.phases);
            // What happens beside or after it is not a part of it.
            let took = millis(launched.took);
            sample.phases.retain(|_, at| *at <= took);
        }
        (Ok(()), Some(used)) => sample.error = Some(format!("memory mode {used} was used")),
        (Err(failure), _) => sample.error = Some(words(&failure)),
    }
    let timeline = launched.timeline.clone();
    let left = launched.end(stage);
    if left.is_empty() {
        return Ok((sample, timeline));
    }
    Err(LeftOver(left.join(", ")).into())
}

/// A failure with all its causes, on one line.
pub(super) fn words(failure: &Failure) -> String {
    let Failure::Error(error) = failure else {
        return "something is missing".to_owned();
    };
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

fn say_cost(kits: &KitPool, global: Global) {
    let stats = kits.stats();
    if global.json || stats.ready == 0 {
        return;
    }
    let mib = stats.private_memory.0 as f64 / f64::from(1 << 20) / stats.ready as f64;
    println!("A process that waits in the pool has {mib:.1} MiB of its own.");
}

fn tell(args: &BenchArgs, global: Global, lines: &[Line]) -> Result<(), Failure> {
    let Some(first) = lines.first() else {
        return Ok(());
    };
    if let (Operation::Life, Some(path)) = (args.operation, &args.out) {
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
    if global.json {
        report::json(&serde_json::json!({
            "machine": first.machine,
            "stand_in": first.machine.is_stand_in(),
            "seed": args.seed,
            "variants": rows,
        }))?;
    } else {
        let mut out = io::stdout().lock();
        writeln!(out, "{}", first.machine.line())?;
        writeln!(out, "{}; seed {}.", args.operation.says(), args.seed)?;
        for line in table::text(&rows) {
            writeln!(out, "{line}")?;
        }
        writeln!(out)?;
        for line in table::phase_text(&rows) {
            writeln!(out, "{line}")?;
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
