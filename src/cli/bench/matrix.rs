//! What takes turns in a run: every combination that was asked for and has a meaning.

use std::path::PathBuf;

use rewake::plan::MemoryMode;
use rewake::resource::disk::DiskMode;

use super::arms::{Arm, Rival};
use super::record::Variant;
use super::stage::Template;
use super::{BenchArgs, Cache, DiskChoice, Memory, Operation, Switch};

/// A combination that cannot be.
#[derive(Debug, thiserror::Error)]
pub(super) enum Impossible {
    #[error("A launch cannot have shared memory: the memory file is the template's")]
    SharedLaunch,
    #[error("Whole lives cannot be measured beside single operations: run them alone")]
    Lives,
    #[error(
        "Whole lives have ages, modes, templates and page caches of their own, are lived one at a \
         time, and have no floor and no trace: leave these out"
    )]
    LifeOptions,
    #[error(
        "The snapshot of a chosen template is as old as it is: --age goes with --operation resume"
    )]
    AgeOfTemplate,
}

/// A result could not be written: found out before anything is measured for it.
#[derive(Debug, thiserror::Error)]
#[error("There is no directory for {0}")]
pub(super) struct NoDirectory(PathBuf);

/// Refuses places for results that do not exist.
pub(super) fn check_places(args: &BenchArgs) -> Result<(), NoDirectory> {
    for path in [&args.out, &args.html, &args.trace].into_iter().flatten() {
        let parent = path.parent().filter(|it| !it.as_os_str().is_empty());
        if parent.is_some_and(|it| !it.is_dir()) || path.is_dir() {
            return Err(NoDirectory(path.clone()));
        }
    }
    Ok(())
}

/// What takes turns.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) operation: Operation,
    pub(super) arm: Arm,
    pub(super) variant: Variant,
    /// Index among the templates.
    pub(super) template: usize,
    /// The memory mode that is asked for.
    pub(super) mode: MemoryMode,
    pub(super) disk: DiskMode,
    pub(super) cache: Cache,
    /// In seconds.
    pub(super) age: Option<u64>,
}

/// Refuses what has no meaning, before anything is made.
pub(super) fn check(args: &BenchArgs) -> Result<(), Impossible> {
    let launches = args.operation.contains(&Operation::Launch);
    if args.operation.contains(&Operation::Life) {
        let more = args.template.is_some()
            || !args.age.is_empty()
            || !args.memory_mode.is_empty()
            || args.page_cache != [Cache::Warm]
            || args.concurrency != [1]
            || args.against.contains(&Rival::Floor)
            || args.trace.is_some();
        return match args.operation.len() {
            1 if more => Err(Impossible::LifeOptions),
            1 => Ok(()),
            _ => Err(Impossible::Lives),
        };
    }
    if launches && args.memory_mode.contains(&Memory::Shared) {
        return Err(Impossible::SharedLaunch);
    }
    if launches && args.template.is_some() && !args.age.is_empty() {
        return Err(Impossible::AgeOfTemplate);
    }
    Ok(())
}

/// What was asked for and makes no difference, for whoever reads the results.
pub(super) fn remarks(args: &BenchArgs) -> Vec<&'static str> {
    let has = |operation| args.operation.contains(&operation);
    let mut remarks = Vec::new();
    if has(Operation::Resume) {
        remarks.push(
            "A warm resume is one that was expected: a process waits in its slot. Slot and disk \
             are its own either way.",
        );
    }
    if has(Operation::Pause) || has(Operation::Destroy) {
        remarks.push(
            "Pools, page cache and age make no difference to pause and destroy, so they have \
             one variant each.",
        );
    }
    if has(Operation::Pause) && !args.against.is_empty() {
        remarks.push(
            "Rivals pause a guest whose memory was copied where it would come on demand: that \
             cannot be frozen before all of it has come, and nobody waits for it there.",
        );
    }
    if args.against.contains(&Rival::Floor) && args.operation.iter().any(|it| it.writes()) {
        remarks.push(
            "The floor's pause is two calls and a kill, its resume a process and one call: \
             nothing is checked, named or written to the disk.",
        );
    }
    remarks
}

/// Every combination. Variants come in the order in which they make a readable table.
pub(super) fn entries(args: &BenchArgs, disk: DiskChoice, templates: &[Template]) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for (index, template) in templates.iter().enumerate() {
        for operation in &args.operation {
            let choices = Choices::of(args, *operation);
            for concurrency in &args.concurrency {
                for (cache, age, memory, arm) in choices.all() {
                    let mode = choices.mode(arm, memory);
                    let variant = Variant {
                        operation: operation.name().to_owned(),
                        arm: arm.name().to_owned(),
                        pools: matches!(arm, Arm::Ours { pools: true }),
                        memory_mode: mode.name().to_owned(),
                        disk: disk.name().to_owned(),
                        ram_mib: template.ram_mib,
                        concurrency: *concurrency,
                        page_cache: cache.name().to_owned(),
                        age_s: age,
                        template: template.chosen.as_ref().map(|it| it.id().to_string()),
                    };
                    if entries.iter().any(|entry| entry.variant == variant) {
                        continue;
                    }
                    entries.push(Entry {
                        operation: *operation,
                        arm,
                        variant,
                        template: index,
                        mode,
                        disk: disk.mode().unwrap_or(DiskMode::Auto),
                        cache,
                        age,
                    });
                }
            }
        }
    }
    entries
}

/// What makes a difference to one operation.
struct Choices {
    operation: Operation,
    arms: Vec<Arm>,
    memory: Vec<MemoryMode>,
    caches: Vec<Cache>,
    ages: Vec<Option<u64>>,
}

impl Choices {
    fn of(args: &BenchArgs, operation: Operation) -> Self {
        let (launches, restores) = match operation {
            Operation::Launch => (true, true),
            Operation::Resume => (false, true),
            Operation::Pause | Operation::Destroy | Operation::Life => (false, false),
        };
        let rival = |rival| args.against.contains(&rival).then_some(Arm::Rival(rival));
        let pools = if restores {
            &args.pools[..]
        } else {
            &[Switch::Off][..]
        };
        let ours = pools.iter().map(|switch| Arm::Ours {
            pools: *switch == Switch::On,
        });
        let memory = args.memory_mode.iter().copied().map(MemoryMode::from);
        let mut memory: Vec<_> = memory.collect();
        if memory.is_empty() {
            memory.push(if launches {
                MemoryMode::Map
            } else {
                MemoryMode::Shared
            });
        }
        let ages = args.age.iter().copied().map(Some).filter(|_| restores);
        let mut ages: Vec<_> = ages.collect();
        if ages.is_empty() {
            ages.push(None);
        }
        Self {
            operation,
            arms: rival(Rival::Floor)
                .into_iter()
                .chain(ours)
                .chain(rival(Rival::Conventional))
                .collect(),
            memory,
            caches: if restores {
                args.page_cache.clone()
            } else {
                vec![Cache::Warm]
            },
            ages,
        }
    }

    fn all(&self) -> impl Iterator<Item = (Cache, Option<u64>, MemoryMode, Arm)> {
        self.caches.iter().flat_map(move |cache| {
            self.ages.iter().flat_map(move |age| {
                self.memory.iter().flat_map(move |memory| {
                    let arms = self.arms.iter();
                    arms.map(move |arm| (*cache, *age, *memory, *arm))
                })
            })
        })
    }

    /// The mode that an arm is asked for. Nobody but us rewrites snapshots, so conventionally
    /// memory is copied or fetched on demand; and what is to be frozen was copied.
    fn mode(&self, arm: Arm, asked: MemoryMode) -> MemoryMode {
        let restores = matches!(self.operation, Operation::Launch | Operation::Resume);
        match (arm, asked) {
            (Arm::Rival(Rival::Conventional), MemoryMode::Copy) => MemoryMode::Copy,
            (Arm::Rival(Rival::Conventional), _) if !restores => MemoryMode::Copy,
            (Arm::Rival(Rival::Floor), MemoryMode::OnDemand)
                if self.operation == Operation::Pause =>
            {
                MemoryMode::Copy
            }
            (Arm::Rival(Rival::Conventional), _) => MemoryMode::OnDemand,
            (_, asked) => asked,
        }
    }
}
