//! One sandbox as people and programs see it.

use jiff::{Timestamp, Unit};
use rewake::host::{Error, Sandbox};
use rewake::ids::{SandboxId, SlotIndex};
use rewake::memory::{self, Usage};
use rewake::resource::disk::{DiskError, DiskInfo, StoreState};
use rewake::sandbox::journal::Story;
use rewake::sandbox::state::State;
use serde_json::{Value, json};

use crate::cli::report;

/// What is known of a sandbox at one moment.
pub(super) struct View {
    pub(super) sandbox: Sandbox,
    pub(super) story: Story,
    state: State,
    stranded: bool,
    /// What its process takes; `None` where it does not run.
    pub(super) usage: Option<Usage>,
    /// Its disk, or why nothing is known of it.
    pub(super) disk: Result<Option<DiskInfo>, Error>,
}

impl View {
    /// Looks at a sandbox. What cannot be found out about memory and disk does not keep the
    /// rest from being shown.
    pub(super) fn of(sandbox: Sandbox) -> Result<Self, Error> {
        let story = sandbox.story()?;
        let state = sandbox.state()?;
        let pid = story.status.vm_now().map(|vm| vm.process.pid);
        let pid = pid.filter(|_| state != State::Lost);
        Ok(Self {
            stranded: sandbox.is_stranded(),
            usage: pid.and_then(|pid| memory::usage(pid).ok()),
            disk: disk(&sandbox),
            sandbox,
            story,
            state,
        })
    }

    pub(super) const fn id(&self) -> &SandboxId {
        self.sandbox.id()
    }

    pub(super) const fn state(&self) -> State {
        self.state
    }

    /// The build of the stand-in, where its VM is none.
    pub(super) fn stand_in(&self) -> Option<&str> {
        let vm = self.story.status.vm.as_ref()?;
        is_stand_in(&vm.vmm).then_some(vm.vmm.as_str())
    }

    /// `running`, `launching, stranded`.
    pub(super) fn state_words(&self) -> String {
        if self.stranded {
            format!("{}, stranded", self.state)
        } else {
            self.state.to_string()
        }
    }

    pub(super) fn address(&self) -> String {
        self.sandbox
            .slot()
            .map_or_else(|| "-".to_owned(), |_| self.sandbox.host_ip().to_string())
    }

    /// `128 MiB (map)`.
    pub(super) fn ram(&self) -> String {
        let size = self.story.identity.memory;
        match &self.story.status.vm {
            Some(vm) => format!("{size} ({})", vm.memory_mode),
            None => size.to_string(),
        }
    }

    /// `1.5 MiB of 64 MiB`, with a word where the store is not healthy.
    pub(super) fn disk_words(&self) -> String {
        let info = match &self.disk {
            Err(_) => return "?".to_owned(),
            Ok(None) => return "-".to_owned(),
            Ok(Some(info)) => info,
        };
        match info.status {
            None => "detached".to_owned(),
            Some(it) if it.state == StoreState::Healthy => format!("{} of {}", it.used, it.total),
            Some(it) => format!("{} of {}, {}", it.used, it.total, it.state),
        }
    }

    /// The row of a table under [`HEADER`].
    pub(super) fn row(&self) -> Vec<String> {
        let of = |pick: &dyn Fn(&Usage) -> String| self.usage.as_ref().map_or("-".into(), pick);
        let template = self.story.identity.template.as_ref();
        vec![
            self.id().to_string(),
            self.state_words(),
            age(self.story.identity.created),
            self.story.identity.memory.to_string(),
            of(&|usage| usage.process.private.to_string()),
            of(&|usage| usage.process.file.to_string()),
            self.disk_words(),
            self.address(),
            template.map_or_else(|| "-".to_owned(), ToString::to_string),
        ]
    }

    /// For programs: the keys of [`super::SANDBOX_KEYS`].
    pub(super) fn document(&self) -> Value {
        let (identity, status) = (&self.story.identity, &self.story.status);
        json!({
            "sandbox_id": identity.id.as_str(),
            "state": self.state.name(),
            "stranded": self.stranded,
            "since": status.since,
            "created": identity.created,
            "template": identity.template,
            "generation": status.generation,
            "slot": self.sandbox.slot().map(SlotIndex::get),
            "address": self.sandbox.slot().map(|_| self.sandbox.host_ip()),
            "vcpus": identity.vcpus,
            "memory_bytes": identity.memory.0,
            "lost": self.lost(),
            "disk": self.disk_document(),
            "vm": self.vm_document(),
            "memory": self.usage.as_ref().map(Usage::to_json),
        })
    }

    /// Why it is lost, where it is.
    pub(super) fn lost(&self) -> Option<&str> {
        let noted = self.story.status.lost.as_deref();
        let found = || (self.state == State::Lost).then_some("its Cloud Hypervisor has ended");
        noted.or_else(found)
    }

    fn disk_document(&self) -> Value {
        let info = match &self.disk {
            Err(error) => return json!({ "error": report::words(error) }),
            Ok(None) => return Value::Null,
            Ok(Some(info)) => info,
        };
        json!({
            "kind": info.record.kind,
            "path": info.path,
            "base": info.record.base.path,
            "state": info.status.map(|it| it.state),
            "used_bytes": info.status.map(|it| it.used.0),
            "total_bytes": info.status.map(|it| it.total.0),
            "filesystem_free_bytes": info.status.map(|it| it.filesystem_free.0),
            "sharers": info.sharers,
        })
    }

    fn vm_document(&self) -> Value {
        let Some(vm) = &self.story.status.vm else {
            return Value::Null;
        };
        json!({
            "pid": vm.process.pid,
            "start_time": vm.process.start_time,
            "api_socket": vm.vm_dir.join("api.sock"),
            "vm_dir": vm.vm_dir,
            "build": vm.vmm,
            "stand_in": is_stand_in(&vm.vmm),
            "memory_mode": vm.memory_mode,
            "lifecycle_id": vm.lifecycle.to_string(),
            "notes": vm.notes,
        })
    }
}

/// The columns of [`View::row`].
pub(super) const HEADER: [&str; 9] = [
    "sandbox", "state", "age", "ram", "private", "shared", "disk", "address", "template",
];

/// A sandbox that is being made may not have its disk yet.
fn disk(sandbox: &Sandbox) -> Result<Option<DiskInfo>, Error> {
    use rewake::host::Cause;
    match sandbox.disk() {
        Err(error)
            if matches!(
                &*error.cause,
                Cause::DiskFile {
                    source: DiskError::Missing { .. },
                    ..
                }
            ) =>
        {
            Ok(None)
        }
        other => other,
    }
}

/// The stand-in says in its build what it is.
fn is_stand_in(build: &str) -> bool {
    build.contains("stand-in")
}

/// How long ago, in the largest unit that fits.
fn age(since: Timestamp) -> String {
    let seconds = Timestamp::now().duration_since(since).as_secs().max(0);
    spoken(seconds)
}

fn spoken(seconds: i64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A moment, and how long ago it was.
pub(super) fn moment(at: Timestamp) -> String {
    format!("{} ({} ago)", at.round(Unit::Second).unwrap_or(at), age(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_told_in_the_largest_unit_that_says_enough() {
        for (seconds, words) in [
            (0, "0 s"),
            (119, "119 s"),
            (120, "2 min"),
            (7199, "119 min"),
            (7200, "2 h"),
            (172_800, "2 d"),
        ] {
            assert_eq!(spoken(seconds), words);
        }
    }
}
