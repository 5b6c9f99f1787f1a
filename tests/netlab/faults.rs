//! Makes the n-th call fail, before or after the kernel has done it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rewake::fault::Inject;
use rustix::io::Errno;

/// Fails one chosen call of those made while it is armed.
#[derive(Default)]
pub struct FailNth {
    armed: AtomicBool,
    target: AtomicUsize,
    late: AtomicBool,
    seen: AtomicUsize,
    failed: Mutex<Option<String>>,
}

impl FailNth {
    /// Counts from here on and fails call `target`, counted from 0; `late` lets the kernel
    /// do it first.
    pub fn arm(&self, target: usize, late: bool) {
        self.target.store(target, Ordering::SeqCst);
        self.late.store(late, Ordering::SeqCst);
        self.seen.store(0, Ordering::SeqCst);
        *self.failed.lock().unwrap() = None;
        self.armed.store(true, Ordering::SeqCst);
    }

    /// Lets everything through again. Returns the step that failed, if it came to that.
    pub fn disarm(&self) -> Option<String> {
        self.armed.store(false, Ordering::SeqCst);
        self.failed.lock().unwrap().take()
    }

    fn hit(&self, step: &str, late: bool) -> Result<(), Errno> {
        if !self.armed.load(Ordering::SeqCst) || self.late.load(Ordering::SeqCst) != late {
            return Ok(());
        }
        if self.seen.fetch_add(1, Ordering::SeqCst) != self.target.load(Ordering::SeqCst) {
            return Ok(());
        }
        *self.failed.lock().unwrap() = Some(step.to_owned());
        Err(Errno::IO)
    }
}

impl Inject for FailNth {
    fn before(&self, step: &str) -> Result<(), Errno> {
        self.hit(step, false)
    }
    fn after(&self, step: &str) -> Result<(), Errno> {
        self.hit(step, true)
    }
}
