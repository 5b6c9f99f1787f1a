//! The conventional way, from where the operation begins.

use std::os::fd::AsFd;
use std::time::Instant;

use rewake::plan::MemoryMode;

use super::super::arms::Job;
use super::super::arms::conventional::Life;
use super::super::matrix::Entry;
use super::super::stage::Stage;
use super::{Done, NotApart, Operation, Place, Subject, Undone};
use crate::cli::Failure;

pub(super) struct Theirs<'a> {
    job: Job<'a>,
    operation: Operation,
    /// The mode of the resume.
    mode: MemoryMode,
    life: Option<Life>,
    memory: Option<MemoryMode>,
    left: Vec<String>,
}

pub(super) fn prepare<'a>(place: Place<'a>, entry: &Entry) -> Result<Theirs<'a>, Failure> {
    // What is frozen later must be there as a whole.
    let job = Job {
        stage: place.stage,
        template: place.plain,
        mode: MemoryMode::Copy,
        disk: entry.disk,
        kits: None,
        writes: true,
    };
    let mut theirs = Theirs {
        life: Some(Life::begin(&job)?),
        job,
        operation: entry.operation,
        mode: entry.mode,
        memory: None,
        left: Vec::new(),
    };
    match theirs.ready() {
        Ok(()) => Ok(theirs),
        Err(failure) => {
            let left = Box::new(theirs).end();
            log::debug!("Left over: {left:?}");
            Err(failure)
        }
    }
}

impl Theirs<'_> {
    fn ready(&mut self) -> Result<(), Failure> {
        let (job, operation) = (self.job, self.operation);
        let life = self.life()?;
        if operation == Operation::Resume {
            life.pause(&job)?;
            return Ok(());
        }
        let memory = life.memory_mode(&job)?;
        self.memory = Some(memory);
        Ok(())
    }

    fn life(&mut self) -> Result<&mut Life, Undone> {
        self.life.as_mut().ok_or(Undone::Gone)
    }

    fn resume(&mut self, mode: MemoryMode) -> Result<Done, Failure> {
        let job = Job { mode, ..self.job };
        let (took, phases) = self.life()?.resume(&job)?;
        Ok(Done {
            took,
            phases,
            timeline: None,
        })
    }
}

impl Subject for Theirs<'_> {
    fn act(&mut self) -> Result<Done, Failure> {
        let job = self.job;
        let (took, phases) = match self.operation {
            Operation::Resume => return self.resume(self.mode),
            Operation::Pause => self.life()?.pause(&job)?,
            Operation::Destroy => {
                let life = self.life.take().ok_or(Undone::Gone)?;
                let begun = Instant::now();
                self.left = life.end(job.stage);
                (begun.elapsed(), Default::default())
            }
            other => return Err(NotApart(other).into()),
        };
        Ok(Done {
            took,
            phases,
            timeline: None,
        })
    }

    fn check(&mut self) -> Result<(), Failure> {
        let job = Job {
            mode: self.mode,
            ..self.job
        };
        match self.operation {
            Operation::Destroy if self.left.is_empty() => return Ok(()),
            Operation::Destroy => return Err(Undone::Left(self.left.join(", ")).into()),
            Operation::Pause => drop(self.resume(MemoryMode::Copy)?),
            _ => {
                let memory = self.life()?.memory_mode(&job)?;
                self.memory = Some(memory);
            }
        }
        let life = self.life()?;
        job.stage.check_guest(job.template, life.netns.as_fd())
    }

    fn memory_mode(&self) -> Option<MemoryMode> {
        self.memory
    }

    fn chill(&self) -> Result<(), Failure> {
        let life = self.life.as_ref().ok_or(Undone::Gone)?;
        let base = self.job.template.base.as_deref();
        Ok(Stage::chill(&life.snapshot(&self.job), base)?)
    }

    fn end(mut self: Box<Self>) -> Vec<String> {
        let mut left = std::mem::take(&mut self.left);
        if let Some(life) = self.life.take() {
            left.extend(life.end(self.job.stage));
        }
        left
    }
}
