//! Holds a step back until somebody lets it go on.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rewake::fault::Inject;
use rustix::io::Errno;

/// How long a step is held at most; then it fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits before the first step whose name begins in a certain way.
pub struct Hold {
    step: &'static str,
    may_go: Box<dyn Fn() -> bool + Send + Sync>,
    reached: (Mutex<bool>, Condvar),
}

impl Hold {
    /// Waits before `step` until `may_go` says so, which is asked every millisecond.
    pub fn new(step: &'static str, may_go: impl Fn() -> bool + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            step,
            may_go: Box::new(may_go),
            reached: (Mutex::new(false), Condvar::new()),
        })
    }

    /// Waits until the step was about to be done.
    pub fn wait_reached(&self) {
        let reached = self.reached.0.lock().unwrap();
        let waited = self
            .reached
            .1
            .wait_timeout_while(reached, PATIENCE, |it| !*it);
        assert!(*waited.unwrap().0, "{} was never reached", self.step);
    }
}

impl Inject for Hold {
    fn before(&self, step: &str) -> Result<(), Errno> {
        if !step.starts_with(self.step) {
            return Ok(());
        }
        *self.reached.0.lock().unwrap() = true;
        self.reached.1.notify_all();
        let begun = std::time::Instant::now();
        while !(self.may_go)() {
            if begun.elapsed() > PATIENCE {
                return Err(Errno::TIMEDOUT);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn after(&self, _: &str) -> Result<(), Errno> {
        Ok(())
    }
}
