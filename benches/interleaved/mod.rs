//! What interleaved measurements share: samples, their quantiles, and on what machine.

use std::process::Command;
use std::time::Duration;

/// The times that one variant took.
#[derive(Default)]
pub(crate) struct Samples(Vec<Duration>);

impl Samples {
    pub(crate) fn push(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    /// The sample below which this fraction of all lies.
    pub(crate) fn at(&self, fraction: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        sorted[((sorted.len() - 1) as f64 * fraction).round() as usize]
    }

    #[allow(dead_code, reason = "not every measurement prints a table of its own")]
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn median(&self) -> Duration {
        self.at(0.5)
    }

    #[allow(dead_code, reason = "as above")]
    pub(crate) fn print(&self, what: &str) {
        println!(
            "{what:38} median {:9.3?}  p99 {:9.3?}  min {:9.3?}  n {}",
            self.median(),
            self.at(0.99),
            self.at(0.0),
            self.0.len()
        );
    }
}

/// The numbers on the command line, in order, in place of the defaults.
pub(crate) fn numbers<const N: usize>(defaults: [usize; N]) -> [usize; N] {
    let mut given = std::env::args().filter_map(|argument| argument.parse().ok());
    defaults.map(|default| given.next().unwrap_or(default))
}

/// Commit, kernel, processor, build.
pub(crate) fn print_machine() {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name"));
    let commit = Command::new("git")
        .args(["rev-parse", "--short", "HEAD"])
        .output();
    let commit = commit.map(|it| String::from_utf8_lossy(&it.stdout).trim().to_owned());
    println!(
        "commit {}, Linux {}, {} x {}, {}",
        commit.unwrap_or_default(),
        read("/proc/sys/kernel/osrelease").trim(),
        std::thread::available_parallelism().map_or(0, usize::from),
        cpu.unwrap_or_default().trim_start_matches([' ', '\t', ':']),
        if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        }
    );
}
