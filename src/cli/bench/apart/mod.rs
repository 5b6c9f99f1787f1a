//! Resumes, pauses and ends, each measured by itself: a guest is brought to where the operation
//! begins, which is not counted; then the operation is; and its time counts once the guest
//! has proved that it was done.
//!
//! A resume counts when the guest remembers, a pause when the guest remembers after it was
//! resumed, an end when neither the process nor anything that was made for it is left.

mod conventional;
mod floor;
mod ours;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rewake::plan::MemoryMode;
use rewake::template::Template as HostTemplate;
use rewake::timeline::Timeline;

use super::arms::{Arm, Rival, Timed, millis};
use super::house::House;
use super::matrix::Entry;
use super::record::Sample;
use super::run::{LeftOver, Outcome, at_once, judge, words};
use super::stage::{Stage, Template};
use super::{Cache, Operation};
use crate::cli::Failure;

/// Where it takes place, and with what.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) stage: &'a Stage,
    pub(super) house: &'a House,
    /// For the rivals.
    pub(super) plain: &'a Template,
    /// The same for ours.
    pub(super) template: &'a HostTemplate,
}

/// What an operation took.
struct Done {
    took: Duration,
    phases: BTreeMap<String, f64>,
    timeline: Option<Timeline>,
}

impl From<Timed> for Done {
    fn from((took, phases): Timed) -> Self {
        Self {
            took,
            phases,
            timeline: None,
        }
    }
}

/// A guest that waits for the operation.
trait Subject: Send {
    /// Brings it to where the operation begins.
    fn ready(&mut self) -> Result<(), Failure>;
    /// What is counted.
    fn act(&mut self) -> Result<Done, Failure>;
    /// Fails where the operation did not do what it should.
    fn check(&mut self) -> Result<(), Failure>;
    /// How its memory really came back: before a pause or an end, or in the resume.
    fn memory_mode(&self) -> Option<MemoryMode>;
    /// Drops the files that it comes back from out of the page cache.
    fn chill(&self) -> Result<(), Failure>;
    /// Ends it, whatever state it is in, and removes all that was made for it; says what is
    /// left.
    fn end(self: Box<Self>) -> Vec<String>;
}

type Prepared<'a> = Result<Box<dyn Subject + 'a>, String>;

/// One turn of one variant.
pub(super) fn batch(place: Place<'_>, entry: &Entry) -> Result<Vec<Outcome>, Failure> {
    let count = entry.variant.concurrency;
    let prepared: Vec<Prepared<'_>> = (0..count)
        .map(|_| prepare(place, entry).map_err(|failure| before(&failure)))
        .collect();
    if let Some(age) = entry.age {
        let since = Instant::now();
        wait_until(since + Duration::from_secs(age));
    }
    if entry.cache == Cache::Cold {
        for subject in prepared.iter().flatten() {
            subject.chill()?;
        }
    }
    let (acted, took) = at_once(prepared, |prepared| {
        let mut subject = prepared?;
        let done = subject.act().map_err(|failure| words(&failure));
        Ok::<_, String>((subject, done))
    });
    let batch_ms = (count > 1).then(|| millis(took));
    let mut outcomes = Vec::new();
    let mut left = Vec::new();
    for acted in acted {
        let mut sample = Sample {
            batch_ms,
            ..Sample::default()
        };
        let mut timeline = None;
        match acted.unwrap_or_else(|| Err("a panic".to_owned())) {
            Err(text) => sample.error = Some(text),
            Ok((mut subject, done)) => {
                match done {
                    Err(text) => sample.error = Some(text),
                    Ok(done) => timeline = settle(entry, &mut *subject, done, &mut sample),
                }
                left.extend(subject.end());
            }
        }
        outcomes.push((sample, timeline));
    }
    if left.is_empty() {
        return Ok(outcomes);
    }
    Err(LeftOver(left.join(", ")).into())
}

fn prepare<'a>(place: Place<'a>, entry: &Entry) -> Result<Box<dyn Subject + 'a>, Failure> {
    let mut subject: Box<dyn Subject + 'a> = match entry.arm {
        Arm::Ours { .. } => Box::new(ours::begin(place, entry)?),
        Arm::Rival(Rival::Conventional) => Box::new(conventional::begin(place, entry)?),
        Arm::Rival(Rival::Floor) => Box::new(floor::begin(place, entry)),
    };
    match subject.ready() {
        Ok(()) => Ok(subject),
        Err(failure) => {
            let left = subject.end();
            log::debug!("Left over: {left:?}");
            Err(failure)
        }
    }
}

/// The time counts once the guest has proved what was done, in the mode that was asked for.
fn settle(
    entry: &Entry,
    subject: &mut dyn Subject,
    done: Done,
    sample: &mut Sample,
) -> Option<Timeline> {
    if let Err(failure) = subject.check() {
        sample.error = Some(words(&failure));
        return None;
    }
    sample.error = judge(entry, subject.memory_mode());
    if sample.error.is_none() {
        sample.ms = Some(millis(done.took));
        sample.phases = done.phases;
    }
    done.timeline
}

fn before(failure: &Failure) -> String {
    format!("before it was measured: {}", words(failure))
}

/// Nothing happens that could be waited for: a snapshot grows old.
pub(super) fn wait_until(moment: Instant) {
    std::thread::sleep(moment.saturating_duration_since(Instant::now()));
}

/// An operation that has no part here.
#[derive(Debug, thiserror::Error)]
#[error("It cannot be measured by itself: {0:?}")]
struct NotApart(Operation);

/// An operation did not do what it should.
#[derive(Debug, thiserror::Error)]
enum Undone {
    #[error("Its process goes on")]
    Alive,
    #[error("The host still knows it")]
    Known,
    #[error("Left over: {0}")]
    Left(String),
    #[error("Cannot copy {0}")]
    Copy(String),
    #[error("It is not there any more")]
    Gone,
    #[error("No process waited for it")]
    Cold,
}
