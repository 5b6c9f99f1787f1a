//! `rewake pause` and `rewake destroy`: one sandbox or many, some at the same time.

use std::sync::{Mutex, PoisonError};

use clap::Args;
use rewake::host::{Error, Host, PauseOptions};
use rewake::ids::SandboxId;
use rewake::sandbox::state::State;
use rewake::timeline::Timeline;
use serde_json::{Value, json};

use crate::cli::failure::Kind;
use crate::cli::host::HostArgs;
use crate::cli::progress::Progress;
use crate::cli::{Failure, Global, report};

#[derive(Debug, Args)]
#[command(
    after_long_help = "JSON: paused: sandbox_id and timeline of each; failed: sandbox_id \
                             and error of each"
)]
pub(in crate::cli) struct PauseArgs {
    /// The sandboxes, which must run
    #[arg(value_name = "ID", required_unless_present = "all")]
    ids: Vec<SandboxId>,
    /// All that run: before the machine is shut down
    #[arg(long, conflicts_with = "ids")]
    all: bool,
    /// Do not wait for the disk: a loss of power in the next seconds loses the sandbox
    #[arg(long)]
    warm: bool,
    /// Do not ask the guest to write out what it holds back; that is frozen with its memory
    #[arg(long)]
    no_prepare: bool,
    #[command(flatten)]
    crowd: CrowdArgs,
    #[command(flatten)]
    host: HostArgs,
}

#[derive(Debug, Args)]
#[command(
    after_long_help = "JSON: destroyed: sandbox_id, existed and timeline of each; failed: \
                             sandbox_id and error of each"
)]
pub(in crate::cli) struct DestroyArgs {
    /// The sandboxes, whatever state they are in
    #[arg(value_name = "ID", required_unless_present = "all")]
    ids: Vec<SandboxId>,
    /// All there are, paused ones too
    #[arg(long, conflicts_with = "ids")]
    all: bool,
    #[command(flatten)]
    crowd: CrowdArgs,
    #[command(flatten)]
    host: HostArgs,
}

#[derive(Debug, Args)]
struct CrowdArgs {
    /// How many at the same time
    #[arg(long, value_name = "N", default_value_t = 4)]
    at_once: usize,
}

/// Some of several sandboxes have failed; why was said for each.
#[derive(Debug, thiserror::Error)]
#[error("{failed} of {all} failed")]
pub(in crate::cli) struct SomeFailed {
    failed: usize,
    all: usize,
}

/// `rewake pause`.
pub(in crate::cli) fn pause(args: &PauseArgs, global: Global) -> Result<(), Failure> {
    let host = args.host.open()?;
    let options = PauseOptions {
        // The process ends with this command, so there is no later that it could be left to.
        durability: args.warm.then_some(rewake::host::Durability::Warm),
        without_prepare: args.no_prepare,
        deadline: args.host.deadline()?,
    };
    let ids = if args.all {
        running(&host)?
    } else {
        args.ids.clone()
    };
    let work = |id: &SandboxId| {
        let mut sandbox = host.sandbox(id)?;
        sandbox.pause_with(options)?;
        Ok(Done {
            existed: true,
            timeline: sandbox.timeline().clone(),
        })
    };
    each("pause", "paused", &ids, &args.crowd, global, work)
}

/// `rewake destroy`.
pub(in crate::cli) fn destroy(args: &DestroyArgs, global: Global) -> Result<(), Failure> {
    if args.all && !args.host.is_there() {
        return each("destroy", "destroyed", &[], &args.crowd, global, |_| {
            unreachable!("there is none")
        });
    }
    let host = args.host.open()?;
    let deadline = args.host.deadline()?;
    let ids = if args.all {
        host.ids()?
    } else {
        args.ids.clone()
    };
    let work = |id: &SandboxId| {
        let existed = !host.sandbox(id).is_err_and(|error| error.is_unknown());
        let timeline = host.destroy(id, deadline)?;
        Ok(Done { existed, timeline })
    };
    each("destroy", "destroyed", &ids, &args.crowd, global, work)
}

/// The sandboxes that are on record as running.
fn running(host: &Host) -> Result<Vec<SandboxId>, Error> {
    let runs = |id: &SandboxId| {
        let story = host.sandbox(id).and_then(|sandbox| sandbox.story());
        story.is_ok_and(|story| story.status.state == State::Running)
    };
    Ok(host.ids()?.into_iter().filter(runs).collect())
}

struct Done {
    existed: bool,
    timeline: Timeline,
}

/// Does the same to each sandbox, some at a time, and says what became of each, in their
/// order.
fn each(
    verb: &str,
    done: &str,
    ids: &[SandboxId],
    crowd: &CrowdArgs,
    global: Global,
    work: impl Fn(&SandboxId) -> Result<Done, Error> + Sync,
) -> Result<(), Failure> {
    let progress = Progress::start(verb, !global.json);
    let outcomes = at_once(ids, crowd.at_once, &progress, &work);
    drop(progress);
    let failed = outcomes.iter().filter(|it| it.1.is_err()).count();
    if global.json {
        report::json(&document(done, &outcomes))?;
    } else {
        for (id, outcome) in &outcomes {
            match outcome {
                Ok(it) if !it.existed => println!("{id} was not there"),
                Ok(it) => println!("{id} {done}{}", taken(&it.timeline)),
                Err(_) => {}
            }
        }
    }
    if failed == 0 {
        return Ok(());
    }
    let all = outcomes.len();
    let mut errors = outcomes.into_iter().filter_map(|it| it.1.err());
    if all == 1
        && !global.json
        && let Some(error) = errors.next()
    {
        return Err(error.into());
    }
    // Each is told; the exit code is theirs where they agree.
    let errors: Vec<Error> = errors.collect();
    let kinds = errors.iter().map(|error| Kind::of(error));
    let kind = kinds.reduce(|a, b| if a == b { a } else { Kind::Failed });
    if !global.json {
        for error in &errors {
            report::error(error, global);
        }
        let some = SomeFailed { failed, all };
        eprintln!("rewake: {some}");
    }
    Err(Failure::Told(kind.unwrap_or(Kind::Failed)))
}

fn at_once(
    ids: &[SandboxId],
    workers: usize,
    progress: &Progress,
    work: &(impl Fn(&SandboxId) -> Result<Done, Error> + Sync),
) -> Vec<(SandboxId, Result<Done, Error>)> {
    let next = Mutex::new(ids.iter().enumerate());
    let outcomes = Mutex::new(Vec::with_capacity(ids.len()));
    std::thread::scope(|scope| {
        for _ in 0..workers.clamp(1, ids.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let one = next.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some((index, id)) = one else { break };
                    let outcome = work(id);
                    let mut all = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
                    all.push((index, id.clone(), outcome));
                    progress.count(all.len(), ids.len());
                }
            });
        }
    });
    let mut all = outcomes
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    all.sort_by_key(|(index, ..)| *index);
    all.into_iter()
        .map(|(_, id, outcome)| (id, outcome))
        .collect()
}

fn document(done: &str, outcomes: &[(SandboxId, Result<Done, Error>)]) -> Value {
    let mut good = Vec::new();
    let mut bad = Vec::new();
    for (id, outcome) in outcomes {
        match outcome {
            Ok(it) => {
                let mut one = json!({
                    "sandbox_id": id.as_str(),
                    "timeline": it.timeline.to_json(),
                });
                if done == "destroyed" {
                    one["existed"] = it.existed.into();
                }
                good.push(one);
            }
            Err(error) => bad.push(json!({
                "sandbox_id": id.as_str(),
                "error": report::error_document(error),
            })),
        }
    }
    json!({ done: good, "failed": bad })
}

/// ` in 12.3 ms`, up to the last phase.
fn taken(timeline: &Timeline) -> String {
    let marks = timeline.marks();
    marks.last().map_or_else(String::new, |(_, at)| {
        format!(" in {:.1} ms", at.as_secs_f64() * 1e3)
    })
}
