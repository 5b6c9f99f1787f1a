//! What a failure means to whoever typed the command: an exit code, a word, and what to do.

use std::error::Error;

use rewake::host::{self, Cause, Full};
use rewake::restore::{self, RestoreError, Stage};
use rewake::sandbox::state::State;
use rewake::template::{BuildCause, BuildError, TemplateError};

use super::{disk, template};

/// What kind of failure it is: the exit code, and `error.kind` in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The operation failed.
    Failed,
    /// A time limit passed.
    Timeout,
    /// The same may succeed later without anything being mended.
    Busy,
}

impl Kind {
    /// Judges an error.
    pub(super) fn of(error: &(dyn Error + 'static)) -> Self {
        let is = |timeout: bool, busy: bool| match (timeout, busy) {
            (true, _) => Self::Timeout,
            (_, true) => Self::Busy,
            _ => Self::Failed,
        };
        if let Some(error) = error.downcast_ref::<host::Error>() {
            let template = template_of(error);
            let busy = error.is_busy() || template.is_some_and(TemplateError::is_busy);
            return is(error.is_timeout(), busy);
        }
        if let Some(error) = error.downcast_ref::<TemplateError>() {
            return is(error.is_timeout(), error.is_busy());
        }
        if let Some(error) = error.downcast_ref::<BuildError>() {
            return is(error.is_timeout(), false);
        }
        let restore = error.downcast_ref::<RestoreError>();
        let timeout = restore.is_some_and(RestoreError::is_timeout)
            || disk::is_timeout(error)
            || template::is_timeout(error);
        is(timeout, false)
    }

    /// The exit code.
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Timeout => 4,
            Self::Busy => 5,
        }
    }

    /// The word in JSON.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Timeout => "timeout",
            Self::Busy => "busy",
        }
    }
}

fn template_of(error: &host::Error) -> Option<&TemplateError> {
    match &*error.cause {
        Cause::Template(error) => Some(error),
        _ => None,
    }
}

/// What to do about it, where that can be told.
pub(super) fn hint(error: &(dyn Error + 'static)) -> Option<String> {
    if let Some(error) = error.downcast_ref::<host::Error>() {
        let id = error.sandbox.as_ref().map_or("ID", |id| id.as_str());
        return of_cause(&error.cause, id);
    }
    if let Some(error) = error.downcast_ref::<TemplateError>() {
        return of_template(error);
    }
    if let Some(error) = error.downcast_ref::<BuildError>() {
        return match &*error.cause {
            BuildCause::Host(error) => hint(error),
            BuildCause::Template(error) => of_template(error),
            BuildCause::Launch(_) | BuildCause::Network(_) => Some(DOCTOR.to_owned()),
            _ => None,
        };
    }
    None
}

const DOCTOR: &str = "`rewake doctor` says what this machine lacks";

fn of_cause(cause: &Cause, id: &str) -> Option<String> {
    Some(match cause {
        Cause::Unknown => {
            "`rewake ls` shows those there are; another root is named by --root".into()
        }
        Cause::Exists => format!("choose another --id, or see `rewake inspect {id}`"),
        Cause::UnderWay => format!(
            "try again when it is done; `rewake destroy {id}` ends it, \
             `rewake recover` finishes what nobody is at work with any more"
        ),
        Cause::State { state, needs } => of_state(*state, *needs, id)?,
        Cause::Lost { .. } | Cause::Ended => format!(
            "what was in its memory is gone; `rewake logs {id}` shows what is kept of \
             Cloud Hypervisor's log, `rewake destroy {id}` removes it"
        ),
        Cause::Doomed => format!("`rewake destroy {id}` finishes that"),
        Cause::Full(full) => of_full(full).into(),
        Cause::Stuck(_) => {
            format!("`rewake recover` tries again, `rewake destroy {id}` removes it")
        }
        Cause::LeftOver => "repeat the command, or `rewake recover`".into(),
        Cause::Memory(_) => "its memory is still on its way: try again later".into(),
        Cause::Network(_) | Cause::Slot(_) => DOCTOR.into(),
        Cause::Disk { .. } => format!("{DOCTOR}; `--disk-mode copy` works everywhere"),
        Cause::Restore { stage, source, .. } => of_restore(*stage, source)?.into(),
        Cause::Template(error) => of_template(error)?,
        _ => return None,
    })
}

fn of_state(state: State, needs: State, id: &str) -> Option<String> {
    Some(match (state, needs) {
        (State::Paused, _) => format!("`rewake resume {id}` brings it back"),
        (State::Running, _) => format!("`rewake pause {id}` freezes it"),
        (state, _) if state.is_passing() => {
            "`rewake recover` finishes what nobody is at work with any more".into()
        }
        _ => return None,
    })
}

const fn of_full(full: &Full) -> &'static str {
    match full {
        Full::Sandboxes { .. } => "pause or destroy one, or raise --max-running",
        Full::Memory { .. } => "pause or destroy some, or lower --memory-reserve",
        Full::Slots { .. } => "paused sandboxes keep their slots: destroy some",
        _ => "make room there, or destroy what nobody needs",
    }
}

fn of_restore(stage: Stage, cause: &restore::Cause) -> Option<&'static str> {
    match (stage, cause) {
        (Stage::Launch, _) | (_, restore::Cause::Slot(_)) => Some(DOCTOR),
        (_, cause) if cause.is_timeout() => {
            Some("give it more time with --timeout; `rewake doctor` looks at this machine")
        }
        _ => None,
    }
}

fn of_template(error: &TemplateError) -> Option<String> {
    Some(match error {
        TemplateError::Missing { .. } => {
            "`rewake template ls` shows those there are; another root is named by --root".into()
        }
        TemplateError::Occupied { .. } => "choose another name, or remove it first".into(),
        TemplateError::Busy { .. } => "destroy the sandboxes that were launched from it".into(),
        TemplateError::Incompatible { .. } => {
            "build it again on this machine; `rewake template show` tells what it was made on"
                .into()
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rewake::host::Operation;
    use rewake::ids::{SandboxId, TemplateId};

    fn error(cause: Cause) -> host::Error {
        host::Error {
            sandbox: Some(SandboxId::new("a1").unwrap()),
            operation: Operation::Resume,
            cause: Box::new(cause),
            leftovers: Vec::new(),
        }
    }

    #[test]
    fn what_may_succeed_later_has_a_code_of_its_own() {
        let full = Cause::Full(Full::Sandboxes { limit: 3 });
        for (name, cause, code) in [
            ("under way", Cause::UnderWay, 5),
            ("full", full, 5),
            ("lost", Cause::Lost { why: "x".into() }, 1),
            ("unknown", Cause::Unknown, 1),
        ] {
            assert_eq!(Kind::of(&error(cause)).code(), code, "{name}");
        }
        let step = "remove the template";
        assert_eq!(Kind::of(&TemplateError::Timeout { step }).code(), 4);
        assert_eq!(Kind::of(&std::fmt::Error).code(), 1);
    }

    #[test]
    fn hints_name_the_command_and_the_sandbox() {
        let told = |cause| hint(&error(cause)).unwrap();
        let (state, needs) = (State::Running, State::Paused);
        assert!(told(Cause::State { state, needs }).contains("rewake pause a1"));
        assert!(told(Cause::Lost { why: "x".into() }).contains("rewake destroy a1"));
        assert!(told(Cause::UnderWay).contains("rewake recover"));
        let id = TemplateId::new("python").unwrap();
        let missing = TemplateError::Missing { id };
        assert!(told(Cause::Template(missing)).contains("rewake template ls"));
    }
}
