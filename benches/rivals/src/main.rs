//! The comparison: one call of each client, in turn.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use rewake_rivals::{Ours, Server, Theirs, runtime};

const WARM_UP: usize = 500;
const SAMPLES: usize = 10_000;

fn main() {
    print_machine();
    compare(&Server::responder());
    match Server::cloud_hypervisor() {
        Ok(server) => compare(&server),
        Err(reason) => println!("SKIP cloud-hypervisor: {reason}"),
    }
}

fn print_machine() {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown", |text| text.trim_start_matches(['\t', ' ', ':']));
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let commit = Command::new("git")
        .args(["rev-parse", "--short", "HEAD"])
        .output();
    let commit = commit.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    println!(
        "commit {}, kernel {}, {cpus} × {model}",
        commit.unwrap_or_default(),
        kernel.trim()
    );
}

fn compare(server: &Server) {
    let mut ours = Ours::connect(&server.socket());
    let theirs = Theirs::new(&server.socket());
    let (mut ours_took, mut theirs_took) = (Vec::new(), Vec::new());
    runtime().block_on(async {
        for round in 0..WARM_UP + SAMPLES {
            // Who goes first alternates, for the second finds warmer caches.
            for turn in 0..2 {
                let begin = Instant::now();
                if (round + turn) % 2 == 0 {
                    ours.ping();
                    ours_took.push(begin.elapsed());
                } else {
                    theirs.ping().await;
                    theirs_took.push(begin.elapsed());
                }
            }
        }
    });
    let ours = Quantiles::of(&mut ours_took[WARM_UP..]);
    let theirs = Quantiles::of(&mut theirs_took[WARM_UP..]);
    println!("{}, {SAMPLES} calls each, interleaved:", server.name);
    println!(
        "  rewake                   median {:>8.1?}  p99 {:>8.1?}",
        ours.median, ours.p99
    );
    println!(
        "  cloud-hypervisor-client  median {:>8.1?}  p99 {:>8.1?}",
        theirs.median, theirs.p99
    );
    let ratio = theirs.median.as_secs_f64() / ours.median.as_secs_f64();
    println!("  median of the rival / median of rewake: {ratio:.2}");
}

struct Quantiles {
    median: Duration,
    p99: Duration,
}

impl Quantiles {
    fn of(samples: &mut [Duration]) -> Self {
        samples.sort_unstable();
        Self {
            median: samples[samples.len() / 2],
            p99: samples[samples.len() * 99 / 100],
        }
    }
}
