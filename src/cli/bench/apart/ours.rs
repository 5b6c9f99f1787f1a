//! Our way: the library's front door, with all that it writes down.

use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::host::{LaunchOptions, ResumeOptions, Sandbox};
use rewake::ids::SandboxId;
use rewake::plan::MemoryMode;
use rewake::resource::disk::DiskMode;
use rewake::timeline::Timeline;
use rewake_sys::process::Process;

use super::super::arms::{Arm, phases};
use super::super::house::{BUDGET, mode_of};
use super::super::matrix::Entry;
use super::super::stage::{Stage, remembers};
use super::{Done, NotApart, Operation, Place, Subject, Undone};
use crate::cli::Failure;

/// A process that waits for a resume does so for as long as a round may take.
const LONG: Duration = Duration::from_secs(600);

pub(super) struct Ours<'a> {
    place: Place<'a>,
    operation: Operation,
    mode: MemoryMode,
    /// Its resume is expected.
    warm: bool,
    id: SandboxId,
    sandbox: Sandbox,
    nonce: String,
    memory: Option<MemoryMode>,
    process: Option<Process>,
}

pub(super) fn begin<'a>(place: Place<'a>, entry: &Entry) -> Result<Ours<'a>, Failure> {
    let disk: DiskMode = entry.disk;
    // What will be its own file is somebody else's before the first pause.
    let own = entry.mode == MemoryMode::Shared || entry.operation == Operation::Resume;
    let options = LaunchOptions {
        disk_mode: Some(disk),
        memory_mode: (!own).then_some(entry.mode),
        ..LaunchOptions::default()
    };
    let sandbox = place.house.host.launch(place.template, options)?;
    Ok(Ours {
        place,
        operation: entry.operation,
        mode: entry.mode,
        warm: matches!(entry.arm, Arm::Ours { pools: true }),
        id: sandbox.id().clone(),
        sandbox,
        nonce: String::new(),
        memory: None,
        process: None,
    })
}

impl Ours<'_> {
    fn recall(&self) -> Result<String, Failure> {
        let agent = self.sandbox.agent()?;
        self.place.stage.nonce(&agent, Deadline::after(BUDGET))
    }

    fn resume(&mut self, memory_mode: Option<MemoryMode>) -> Result<(), Failure> {
        let options = ResumeOptions {
            memory_mode,
            ..ResumeOptions::default()
        };
        self.sandbox = self.place.house.host.resume(&self.id, options)?;
        Ok(())
    }

    fn destroy(&self) -> Result<Timeline, Failure> {
        let host = &self.place.house.host;
        Ok(host.destroy(&self.id, Deadline::after(BUDGET))?)
    }
}

impl Subject for Ours<'_> {
    fn ready(&mut self) -> Result<(), Failure> {
        self.nonce = self.recall()?;
        if self.operation == Operation::Resume {
            self.sandbox.pause()?;
            if self.warm {
                let host = &self.place.house.host;
                host.expect_resume(&self.id, LONG, Deadline::after(BUDGET))?;
            }
            return Ok(());
        }
        if self.mode == MemoryMode::Shared {
            self.sandbox.pause()?;
            self.resume(Some(self.mode))?;
        }
        self.memory = Some(mode_of(&self.sandbox)?);
        self.process = Some(self.sandbox.process()?);
        Ok(())
    }

    fn act(&mut self) -> Result<Done, Failure> {
        let begun = Instant::now();
        let ended = match self.operation {
            Operation::Resume => self.resume(Some(self.mode)).map(|()| None)?,
            Operation::Pause => self.sandbox.pause().map(|()| None)?,
            Operation::Destroy => Some(self.destroy()?),
            other => return Err(NotApart(other).into()),
        };
        let took = begun.elapsed();
        let was_warm = || {
            let notes = self.sandbox.timeline().notes();
            notes.iter().any(|note| note.contains("was warm"))
        };
        if self.operation == Operation::Resume && self.warm && !was_warm() {
            return Err(Undone::Cold.into());
        }
        let timeline = ended.unwrap_or_else(|| self.sandbox.timeline().clone());
        Ok(Done {
            took,
            phases: phases(&timeline),
            timeline: Some(timeline),
        })
    }

    fn check(&mut self) -> Result<(), Failure> {
        match self.operation {
            Operation::Destroy => {
                let ended = self
                    .process
                    .as_ref()
                    .map(|it| it.wait_ended(Some(Duration::ZERO)));
                if !matches!(ended, Some(Ok(true))) {
                    return Err(Undone::Alive.into());
                }
                return match self.place.house.host.sandbox(&self.id) {
                    Err(error) if error.is_unknown() => Ok(()),
                    Err(error) => Err(error.into()),
                    Ok(_) => Err(Undone::Known.into()),
                };
            }
            Operation::Pause => self.resume(None)?,
            _ => self.memory = Some(mode_of(&self.sandbox)?),
        }
        remembers(&self.recall()?, &self.nonce)
    }

    fn memory_mode(&self) -> Option<MemoryMode> {
        self.memory
    }

    fn chill(&self) -> Result<(), Failure> {
        let snapshots = self.sandbox.snapshots();
        let snapshot = snapshots.last().ok_or(Undone::Gone)?;
        Ok(Stage::chill(
            snapshot,
            self.place.template.disk().as_deref(),
        )?)
    }

    fn end(self: Box<Self>) -> Vec<String> {
        let ended = self.destroy();
        ended
            .err()
            .iter()
            .map(|failure| format!("sandbox {}: {}", self.id, super::words(failure)))
            .collect()
    }
}
