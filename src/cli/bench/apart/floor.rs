//! The least that each operation can be: a process and one queued request, two calls and a
//! kill, or a kill.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::plan::MemoryMode;
use rewake::resource::disk::DiskMode;
use rewake::vmm::api::{Client, Version};

use super::super::arms::floor::{self, Running, Set};
use super::super::arms::{Job, millis};
use super::super::house::BUDGET;
use super::super::matrix::Entry;
use super::super::stage::{Stage, Template};
use super::{Done, NotApart, Operation, Place, Subject, Undone};
use crate::cli::Failure;

/// What of a snapshot directory makes the snapshot.
const FILES: [&str; 4] = ["config.json", "state.json", "memory", "memory-ranges"];

pub(super) struct Least<'a> {
    stage: &'a Stage,
    operation: Operation,
    mode: MemoryMode,
    disk: DiskMode,
    /// A directory of its own.
    dir: PathBuf,
    /// What it comes from: a copy of its own, where it is written to or stands for a
    /// sandbox's.
    template: Template,
    set: Option<Box<Set>>,
    running: Option<Box<Running>>,
    memory: Option<MemoryMode>,
}

pub(super) fn begin<'a>(place: Place<'a>, entry: &Entry) -> Least<'a> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    Least {
        stage: place.stage,
        operation: entry.operation,
        mode: entry.mode,
        disk: entry.disk,
        dir: place.stage.dir.join(format!("least-{count}")),
        template: place.plain.clone(),
        set: None,
        running: None,
        memory: None,
    }
}

impl Least<'_> {
    fn job<'j>(&'j self, template: &'j Template, mode: MemoryMode) -> Job<'j> {
        Job {
            stage: self.stage,
            template,
            mode,
            disk: self.disk,
            pools: None,
            writes: self.operation == Operation::Pause,
        }
    }

    fn begin(&mut self, set: Set) -> Result<Done, Failure> {
        let job = self.job(&self.template, self.mode);
        let (running, timed) = floor::begin(&job, set)?;
        let memory = running.memory_mode(&job);
        self.running = Some(Box::new(running));
        self.memory = Some(memory?);
        Ok(timed.into())
    }

    fn running(&self) -> Result<&Running, Undone> {
        self.running.as_deref().ok_or(Undone::Gone)
    }

    fn frozen(&self) -> PathBuf {
        self.dir.join("frozen")
    }

    fn pause(&self) -> Result<Done, Failure> {
        let (running, frozen) = (self.running()?, self.frozen());
        let deadline = Deadline::after(BUDGET);
        let begun = Instant::now();
        let mut api = Client::assuming(running.socket(), Version::V53);
        api.pause(deadline)?;
        let paused = begun.elapsed();
        fs::create_dir(&frozen)?;
        api.snapshot(&frozen, deadline)?;
        let written = begun.elapsed();
        running.kill()?;
        let gone = begun.elapsed();
        let marks = [
            ("vcpus_paused", paused),
            ("snapshot_written", written),
            ("vmm_gone", gone),
        ];
        Ok(done(gone, &marks))
    }

    /// What was frozen comes back and remembers.
    fn thaw(&self) -> Result<(), Failure> {
        let frozen = self.frozen();
        if self.mode == MemoryMode::Shared {
            let own = floor::memory_file(&self.template.snapshot);
            fs::hard_link(own, frozen.join("memory"))?;
        }
        let template = Template {
            snapshot: frozen,
            ..self.template.clone()
        };
        let job = self.job(&template, MemoryMode::Map);
        let (running, _) = floor::begin(&job, floor::prepare(&job)?)?;
        let remembers = self.stage.check_guest(&template, running.netns());
        let left = running.end(self.stage);
        remembers?;
        if left.is_empty() {
            return Ok(());
        }
        Err(Undone::Left(left.join(", ")).into())
    }
}

impl Subject for Least<'_> {
    fn ready(&mut self) -> Result<(), Failure> {
        fs::create_dir(&self.dir)?;
        if self.operation == Operation::Resume || self.mode == MemoryMode::Shared {
            let own = self.dir.join("own");
            copy(&self.template.snapshot, &own)?;
            self.template.snapshot = own;
        }
        let set = floor::prepare(&self.job(&self.template, self.mode))?;
        if self.operation == Operation::Resume {
            self.set = Some(Box::new(set));
            return Ok(());
        }
        self.begin(set).map(drop)
    }

    fn act(&mut self) -> Result<Done, Failure> {
        match self.operation {
            Operation::Resume => {
                let set = self.set.take().ok_or(Undone::Gone)?;
                self.begin(*set)
            }
            Operation::Pause => self.pause(),
            Operation::Destroy => {
                let begun = Instant::now();
                self.running()?.kill()?;
                let took = begun.elapsed();
                Ok(done(took, &[("vmm_gone", took)]))
            }
            other => Err(NotApart(other).into()),
        }
    }

    fn check(&mut self) -> Result<(), Failure> {
        match self.operation {
            // Killing it waits for its end.
            Operation::Destroy => Ok(()),
            Operation::Pause => self.thaw(),
            _ => self
                .stage
                .check_guest(&self.template, self.running()?.netns()),
        }
    }

    fn memory_mode(&self) -> Option<MemoryMode> {
        self.memory
    }

    fn chill(&self) -> Result<(), Failure> {
        let base = self.template.base.as_deref();
        Ok(Stage::chill(&self.template.snapshot, base)?)
    }

    fn end(mut self: Box<Self>) -> Vec<String> {
        let mut left = Vec::new();
        if let Some(set) = self.set.take() {
            left.extend(set.discard(self.stage));
        }
        if let Some(running) = self.running.take() {
            left.extend(running.end(self.stage));
        }
        left.extend(fs::remove_dir_all(&self.dir).err().map(|it| it.to_string()));
        left
    }
}

fn done(took: Duration, marks: &[(&str, Duration)]) -> Done {
    let phases = marks
        .iter()
        .map(|(name, at)| ((*name).to_owned(), millis(*at)));
    Done::from((took, phases.collect()))
}

/// Copies a snapshot, with its holes.
fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::create_dir(to)?;
    for name in FILES.iter().filter(|name| from.join(name).exists()) {
        let copied = Command::new("cp")
            .args(["--reflink=auto", "--sparse=auto"])
            .args([from.join(name), to.join(name)])
            .status()?;
        if !copied.success() {
            return Err(Undone::Copy(from.join(name).display().to_string()).into());
        }
    }
    Ok(())
}
