//! What a sandbox can be, and what may follow on what.

use std::fmt;
use std::path::PathBuf;
use std::sync::OnceLock;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::untouched::Print;
use crate::envd::init::Lifecycle;
use crate::ids::SlotIndex;
use crate::resource::slot::ProcessIdentity;

/// The state of a sandbox, as its journal tells it.
///
/// ```text
///             launch                       pause
///   (nothing) ─────► Launching ──► Running ─────► Pausing ──► Paused
///                                   ▲  │  ▲          │ failed    │ resume
///                                   │  │  └──────────┘           ▼
///                                   │  │           proven unrun  Resuming
///                                   └──│─────────────────────────┘  │
///                        the VMM died  ▼                            │ may have run
///                                     Lost ◄────────────────────────┘
///   from every state: destroy ─► Destroying ─► (nothing)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is being made; whoever makes it holds its lock.
    Launching,
    /// Its VM runs and its agent has taken `/init`.
    Running,
    /// It is being frozen. Until its snapshot is in place it is still the running one.
    Pausing,
    /// It is frozen on disk; no process belongs to it.
    Paused,
    /// It is being brought back.
    Resuming,
    /// Its VM ended without a snapshot: what was in memory since the last one is lost, and
    /// the last one does not go with the disk any more. It can only be destroyed.
    Lost,
    /// It is being removed.
    Destroying,
}

impl State {
    /// The word for it in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Launching => "launching",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Lost => "lost",
            Self::Destroying => "destroying",
        }
    }

    /// Whether a sandbox is in it only while somebody is at work with it.
    #[must_use]
    pub const fn is_passing(self) -> bool {
        matches!(
            self,
            Self::Launching | Self::Pausing | Self::Resuming | Self::Destroying
        )
    }

    /// Whether `next` may follow.
    #[must_use]
    pub const fn may_become(self, next: Self) -> bool {
        use State::{Destroying, Launching, Lost, Paused, Pausing, Resuming, Running};
        matches!(
            (self, next),
            (_, Destroying)
                | (Launching | Pausing | Resuming, Running)
                | (Running, Pausing)
                | (Pausing | Resuming, Paused)
                | (Paused, Resuming)
                | (Running | Pausing | Paused | Resuming, Lost)
        )
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A VM of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningVm {
    /// Cloud Hypervisor.
    pub process: ProcessIdentity,
    /// The directory with its API socket.
    pub vm_dir: PathBuf,
    /// How its memory came back, by the name of the memory mode.
    pub memory_mode: String,
    /// The life that its agent was given; no other counts.
    pub lifecycle: Lifecycle,
    /// Whether all its memory must be known to be there before it may be frozen again.
    pub lazy: bool,
    /// Cloud Hypervisor's version, with the suffixes of its build.
    pub vmm: String,
    /// What was worth knowing when it came back: why its memory came back as it did.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// What a sandbox is right now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its state.
    pub state: State,
    /// Since when.
    pub since: Timestamp,
    /// How many times it has come to life; 1 after its launch.
    pub generation: u64,
    /// Its network slot, once it has one: kept over a pause.
    pub slot: Option<SlotIndex>,
    /// Its VM, where it runs.
    pub vm: Option<RunningVm>,
    /// Whether the snapshot on disk has been given to a VM that may have run.
    #[serde(default)]
    pub consumed: bool,
    /// What disk and memory looked like before: unchanged, they prove that it did not.
    #[serde(default)]
    pub proof: Option<Vec<Print>>,
    /// Whether the paused sandbox is on the disk, and not only in the page cache.
    #[serde(default)]
    pub durable: bool,
    /// The boot of the machine that this was written in (`boot_id`).
    #[serde(default)]
    pub boot: String,
    /// Why it is lost.
    #[serde(default)]
    pub lost: Option<String>,
}

impl Status {
    /// The status of a sandbox that begins to be made.
    #[must_use]
    pub fn launching() -> Self {
        Self {
            state: State::Launching,
            since: Timestamp::now(),
            generation: 1,
            slot: None,
            vm: None,
            consumed: false,
            proof: None,
            durable: false,
            boot: boot_id(),
            lost: None,
        }
    }

    /// Whether it was written in this boot of the machine. Of an earlier one there is no process
    /// left, whoever bears its number now; and what was not synced may be gone.
    #[must_use]
    pub fn is_of_this_boot(&self) -> bool {
        self.boot == boot_id()
    }

    /// Its VM, unless the machine has been started again since.
    #[must_use]
    pub fn vm_now(&self) -> Option<&RunningVm> {
        self.vm.as_ref().filter(|_| self.is_of_this_boot())
    }

    /// The same sandbox paused, with nothing left of the life that it had.
    #[must_use]
    pub fn paused(&self, durable: bool) -> Self {
        Self {
            vm: None,
            consumed: false,
            proof: None,
            durable,
            ..self.now(State::Paused)
        }
    }

    /// The same sandbox in another state, from now on.
    #[must_use]
    pub fn now(&self, state: State) -> Self {
        Self {
            state,
            since: Timestamp::now(),
            boot: boot_id(),
            ..self.clone()
        }
    }
}

/// What tells this boot of the machine from every other
/// (`Documentation/admin-guide/sysctl/kernel.rst`, `random/boot_id`).
pub(crate) fn boot_id() -> String {
    static BOOT: OnceLock<String> = OnceLock::new();
    let read = || std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    BOOT.get_or_init(|| read().trim().to_owned()).clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use State::{Destroying, Launching, Lost, Paused, Pausing, Resuming, Running};

    const ALL: [State; 7] = [
        Launching, Running, Pausing, Paused, Resuming, Lost, Destroying,
    ];

    #[test]
    fn only_the_transitions_of_the_picture_are_allowed() {
        let allowed = [
            (Launching, Running),
            (Running, Pausing),
            (Running, Lost),
            (Pausing, Paused),
            (Pausing, Running),
            (Pausing, Lost),
            (Paused, Resuming),
            (Paused, Lost),
            (Resuming, Running),
            (Resuming, Paused),
            (Resuming, Lost),
        ];
        for from in ALL {
            for to in ALL {
                let expected = to == Destroying || allowed.contains(&(from, to));
                assert_eq!(from.may_become(to), expected, "{from} to {to}");
            }
        }
    }

    #[test]
    fn a_status_survives_json_and_older_lines_are_read() {
        let status = Status {
            slot: Some(SlotIndex::new(7).unwrap()),
            ..Status::launching().now(Running)
        };
        let text = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), status);
        let older = r#"{"state":"paused","since":"2026-01-01T00:00:00Z","generation":3,"slot":null,"vm":null}"#;
        let read: Status = serde_json::from_str(older).unwrap();
        assert_eq!(
            (read.state, read.generation, read.consumed),
            (Paused, 3, false)
        );
    }
}
