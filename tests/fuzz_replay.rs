//! Drives the fuzz targets without a fuzzer: every seed and every regression, then a fixed
//! number of mutations of them from a seeded generator. The same on every run.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]
#![allow(
    unreachable_pub,
    reason = "targets are written for binaries of their own, too"
)]

#[path = "../fuzz/targets/mod.rs"]
mod targets;

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use targets::{Choices, TARGETS, Target};

/// Longest mutated input, in bytes.
const LONGEST: usize = 8 * 1024;

fn fuzz_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// The files of `fuzz/<kind>/<target>`, by name.
fn inputs(kind: &str, target: &str) -> Vec<(String, Vec<u8>)> {
    let Ok(dir) = std::fs::read_dir(fuzz_dir().join(kind).join(target)) else {
        return Vec::new();
    };
    let mut inputs: Vec<_> = dir
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.display().to_string(), std::fs::read(path).unwrap())
        })
        .collect();
    inputs.sort();
    inputs
}

fn mutations() -> usize {
    match std::env::var("REWAKE_FUZZ_MUTATIONS") {
        Ok(count) => count.parse().expect("REWAKE_FUZZ_MUTATIONS is a number"),
        Err(_) => 20_000,
    }
}

/// Mutates seeds until the target panics. `Some` is the input that made it do so.
fn hunt(target: &Target, seeds: &[Vec<u8>], count: usize) -> Option<Vec<u8>> {
    let mut choices = Choices::from_bytes(target.name.as_bytes());
    (0..count).find_map(|_| {
        let mut input = seeds.get(choices.below(seeds.len()))?.clone();
        for _ in 0..=choices.below(4) {
            mutate(&mut input, seeds, &mut choices);
        }
        input.truncate(LONGEST);
        catch_unwind(|| (target.run)(&input)).err().map(|_| input)
    })
}

/// Changes one thing about the input.
fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], choices: &mut Choices) {
    /// Bytes that parsers care about.
    const BYTES: &[u8] = b"\r\n\0\t \":;,=-+0129afxF{}[]\\/\x7f\x80\xff";
    let at = choices.below(input.len() + 1);
    let end = (at + 1 + choices.below(12)).min(input.len());
    match choices.below(9) {
        0 if at < input.len() => input[at] ^= 1 << choices.below(8),
        1 if at < input.len() => input[at] = BYTES[choices.below(BYTES.len())],
        2 => input.insert(at, BYTES[choices.below(BYTES.len())]),
        3 if at < end => drop(input.drain(at..end)),
        4 => input.truncate(at),
        5 if at < end => {
            let part = input[at..end].to_vec();
            let to = choices.below(input.len() + 1);
            input.splice(to..to, part);
        }
        6 => {
            let other = &seeds[choices.below(seeds.len())];
            let from = choices.below(other.len() + 1);
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
        7 => {
            // A whole line, or what stands for one, twice.
            let mut lines: Vec<_> = input.split_inclusive(|b| *b == b'\n').collect();
            if let Some(line) = lines.get(choices.below(lines.len())).copied() {
                lines.insert(choices.below(lines.len() + 1), line);
                *input = lines.concat();
            }
        }
        _ => input.push(choices.next() as u8),
    }
}

#[test]
fn seeds_regressions_and_mutations_break_no_property() {
    let mut broken = Vec::new();
    for target in TARGETS.iter().filter(|target| target.name != "canary") {
        let mut known = inputs("seeds", target.name);
        assert!(!known.is_empty(), "{} has no seeds", target.name);
        known.extend(inputs("regressions", target.name));
        for (path, input) in &known {
            if catch_unwind(|| (target.run)(input)).is_err() {
                broken.push(format!("{}: {path}", target.name));
            }
        }
        let seeds: Vec<_> = known.into_iter().map(|(_, input)| input).collect();
        if let Some(input) = hunt(target, &seeds, mutations()) {
            broken.push(format!("{}: b\"{}\"", target.name, input.escape_ascii()));
        }
    }
    assert!(broken.is_empty(), "broken by:\n{}", broken.join("\n"));
}

#[test]
fn mutations_find_the_planted_bug() {
    let canary = TARGETS.iter().find(|t| t.name == "canary").unwrap();
    let seeds: Vec<_> = inputs("seeds", "canary")
        .into_iter()
        .map(|(_, input)| input)
        .collect();
    assert!(!seeds.is_empty());
    for seed in &seeds {
        (canary.run)(seed);
    }
    let found = hunt(canary, &seeds, mutations());
    assert!(found.is_some(), "{} mutations missed it", mutations());
}

/// Builds and runs libFuzzer (about a minute, a C++ compiler needed), hence not by default.
#[test]
#[ignore = "builds libFuzzer"]
fn libfuzzer_finds_the_planted_bug() {
    let has_compiler = ["c++", "clang++"].iter().any(|name| {
        let version = std::process::Command::new(name).arg("--version").output();
        version.is_ok_and(|output| output.status.success())
    });
    if !has_compiler {
        eprintln!("SKIP libfuzzer_finds_the_planted_bug: no C++ compiler");
        return;
    }
    let artifacts = fresh_dir();
    let output = std::process::Command::new(fuzz_dir().join("run"))
        .args(["canary", "-max_total_time=60", "-seed=1"])
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let finds: Vec<_> = std::fs::read_dir(&artifacts).unwrap().collect();
    std::fs::remove_dir_all(&artifacts).unwrap();
    assert!(!output.status.success(), "libFuzzer found nothing:\n{log}");
    assert_eq!(finds.len(), 1, "no find was kept:\n{log}");
    assert!(log.contains("index out of bounds"), "another bug:\n{log}");
}

fn fresh_dir() -> PathBuf {
    let name = format!("rewake-fuzz-{}", std::process::id());
    let dir = std::env::temp_dir().join(name);
    std::fs::create_dir(&dir).unwrap();
    dir
}
