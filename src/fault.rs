//! A shim between the library and the kernel, with which tests make chosen calls fail.
//!
//! Every call that changes a kernel object goes through [`Faults::call`] (or, for netlink,
//! through a socket that holds a [`Faults`]) under a short name, its *step*. Without an
//! injector a step costs one branch. With one, each step can fail in two ways: before the
//! kernel has seen the call, and after the kernel has done it but the answer was lost. Code
//! that rolls back correctly survives both.

use std::fmt;
use std::sync::Arc;

use rewake_sys::CallError;
use rustix::io::Errno;

/// A system call that failed, and what it was for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Cannot {step}")]
pub struct FailedCall {
    /// What the call was for.
    pub step: String,
    /// The call and its error number.
    pub source: CallError,
}

/// Decides which calls fail.
pub trait Inject: Send + Sync {
    /// Called before the kernel sees the step. An error stands in for the call.
    ///
    /// # Errors
    /// The error number that the step shall fail with.
    fn before(&self, step: &str) -> Result<(), Errno>;

    /// Called after the kernel has done the step. An error replaces the answer; what the
    /// kernel did stays done.
    ///
    /// # Errors
    /// The error number that the step shall fail with.
    fn after(&self, step: &str) -> Result<(), Errno>;
}

/// The injector in force, normally none.
#[derive(Clone, Default)]
pub struct Faults(Option<Arc<dyn Inject>>);

impl Faults {
    /// Every call goes to the kernel and its answer comes back unchanged.
    pub const NONE: Self = Self(None);

    /// Asks `injector` around every call.
    #[must_use]
    pub fn inject(injector: Arc<dyn Inject>) -> Self {
        Self(Some(injector))
    }

    /// Whether an injector is in force.
    #[must_use]
    pub const fn active(&self) -> bool {
        self.0.is_some()
    }

    /// Asks the injector before a step.
    ///
    /// # Errors
    /// The injected error.
    pub fn before(&self, step: &str) -> Result<(), Errno> {
        self.0.as_ref().map_or(Ok(()), |it| it.before(step))
    }

    /// Asks the injector after a step that the kernel has done.
    ///
    /// # Errors
    /// The injected error.
    pub fn after(&self, step: &str) -> Result<(), Errno> {
        self.0.as_ref().map_or(Ok(()), |it| it.after(step))
    }

    /// Runs one call under its name.
    ///
    /// # Errors
    /// The call's own, or the injected one.
    pub fn call<T, E: From<Errno>>(
        &self,
        step: &str,
        call: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        self.before(step)?;
        let outcome = call()?;
        self.after(step)?;
        Ok(outcome)
    }

    /// The same for a system call, whose failure comes back with its step.
    ///
    /// # Errors
    /// [`FailedCall`]; an injected error is one of the call `injected`.
    pub fn syscall<T>(
        &self,
        step: impl Into<String>,
        call: impl FnOnce() -> Result<T, CallError>,
    ) -> Result<T, FailedCall> {
        let step = step.into();
        let injected = |errno: Errno| CallError::new("injected", errno);
        let run = || {
            self.before(&step).map_err(injected)?;
            let outcome = call()?;
            self.after(&step).map_err(injected)?;
            Ok(outcome)
        };
        run().map_err(|source| FailedCall { step, source })
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.active() {
            "Faults(injected)"
        } else {
            "Faults(none)"
        })
    }
}
