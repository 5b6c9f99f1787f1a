//! How far long work has come: on standard error, where a person looks at it.

use std::io::{self, IsTerminal, Write as _};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rewake::units::Bytes;

/// Work that is done sooner needs no progress.
const PATIENCE: Duration = Duration::from_millis(400);
/// How often the line is drawn again.
const PACE: Duration = Duration::from_millis(200);

/// A line about work under way. It disappears when this is dropped.
pub(super) struct Progress {
    shared: Arc<Shared>,
    painter: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    ended: Condvar,
}

struct State {
    what: String,
    amount: String,
    ended: bool,
}

impl Progress {
    /// Begins; without a terminal, or where not wanted, nothing is ever drawn.
    pub(super) fn start(what: impl Into<String>, wanted: bool) -> Self {
        let state = State {
            what: what.into(),
            amount: String::new(),
            ended: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            ended: Condvar::new(),
        });
        let painter = (wanted && io::stderr().is_terminal()).then(|| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.paint())
        });
        Self { shared, painter }
    }

    /// So many bytes of so many.
    pub(super) fn bytes(&self, done: Bytes, total: Bytes) {
        self.shared.lock().amount = share(done, total);
    }

    /// So many things of so many.
    pub(super) fn count(&self, done: usize, total: usize) {
        self.shared.lock().amount = format!("{done} of {total}");
    }
}

/// `1.5 GiB of 4 GiB (37 %)`.
fn share(done: Bytes, total: Bytes) -> String {
    let percent = u128::from(done.0) * 100 / u128::from(total.0.max(1));
    format!("{done} of {total} ({percent} %)")
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.ended.notify_all();
        if let Some(painter) = self.painter.take() {
            // It does nothing that could panic.
            let _ = painter.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn paint(&self) {
        let begun = Instant::now();
        let mut wait = PATIENCE;
        let mut drawn = false;
        loop {
            let waited = self
                .ended
                .wait_timeout_while(self.lock(), wait, |state| !state.ended);
            let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            let mut out = io::stderr().lock();
            if state.ended {
                if drawn {
                    let _ = write!(out, "\r\x1b[K");
                }
                return;
            }
            let seconds = begun.elapsed().as_secs_f64();
            let (what, amount) = (&state.what, &state.amount);
            // Whoever does not see it can do without.
            let _ = write!(out, "\r\x1b[K{what} … {seconds:.1} s  {amount}");
            let _ = out.flush();
            drawn = true;
            wait = PACE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_told_in_percent_also_of_nothing() {
        assert_eq!(share(Bytes::mib(1), Bytes::mib(4)), "1 MiB of 4 MiB (25 %)");
        assert_eq!(share(Bytes(0), Bytes(0)), "0 B of 0 B (0 %)");
    }

    #[test]
    fn ending_waits_for_nobody() {
        let begun = Instant::now();
        drop(Progress::start("nothing", true));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
