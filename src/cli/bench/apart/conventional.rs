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

pub(super) fn begin<'a>(place: Place<'a>, entry: &Entry) -> Result<Theirs<'a>, Failure> {
    // What is frozen later must be there as a whole.
    let job = Job {
        stage: place.stage,
        template: place.plain,
        mode: MemoryMode::Copy,
        disk: entry.disk,
        pools: None,
        writes: true,
    };
    Ok(Theirs {
        life: Some(Life::begin(&job)?),
        job,
        operation: entry.operation,
        mode: entry.mode,
        memory: None,
        left: Vec::new(),
    })
}

impl Theirs<'_> {
    fn life(&mut self) -> Result<&mut Life, Undone> {
        self.life.as_mut().ok_or(Undone::Gone)
    }

    fn resume(&mut self, mode: MemoryMode) -> Result<Done, Failure> {
        let job = Job { mode, ..self.job };
        Ok(self.life()?.resume(&job)?.into())
    }
}

impl Subject for Theirs<'_> {
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

    fn act(&mut self) -> Result<Done, Failure> {
        let job = self.job;
        match self.operation {
            Operation::Resume => self.resume(self.mode),
            Operation::Pause => Ok(self.life()?.pause(&job)?.into()),
            Operation::Destroy => {
                let life = self.life.take().ok_or(Undone::Gone)?;
                let begun = Instant::now();
                self.left = life.end(job.stage);
                Ok(Done::from((begun.elapsed(), Default::default())))
            }
            other => Err(NotApart(other).into()),
        }
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
