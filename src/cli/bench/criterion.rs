//! Saved baselines of `cargo bench`, for setting two side by side: criterion's measurements
//! of the parts, in `target/criterion/BENCHMARK/BASELINE/`.

use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;

use super::record::{Line, Machine, ReadError, Sample, Variant};

/// Folders between the root and a baseline: group, function, parameter.
const DEPTH: usize = 4;
const MS_PER_NS: f64 = 1e-6;

/// `sample.json`: nanoseconds that so many iterations took together.
#[derive(Deserialize)]
struct Samples {
    iters: Vec<f64>,
    times: Vec<f64>,
}

/// `benchmark.json`.
#[derive(Deserialize)]
struct Benchmark {
    full_id: String,
}

/// The samples of a baseline, where `path` is DIR/BASELINE and no file. `None`: it is none.
pub(super) fn read(path: &Path) -> Option<Result<Vec<Line>, ReadError>> {
    let (root, baseline) = (path.parent()?, path.file_name()?);
    if path.is_file() || !root.is_dir() {
        return None;
    }
    let mut lines = Vec::new();
    let collected = collect(root, Path::new(baseline), DEPTH, &mut lines);
    match collected {
        Ok(()) if lines.is_empty() => None,
        Ok(()) => Some(Ok(lines)),
        Err(error) => Some(Err(error)),
    }
}

fn collect(
    dir: &Path,
    baseline: &Path,
    depth: usize,
    lines: &mut Vec<Line>,
) -> Result<(), ReadError> {
    let place = dir.join(baseline);
    if place.join("sample.json").is_file() {
        let benchmark: Benchmark = document(&place.join("benchmark.json"))?;
        let samples: Samples = document(&place.join("sample.json"))?;
        lines.extend(samples_of(&benchmark, &samples));
    }
    if depth == 0 {
        return Ok(());
    }
    let failed = |source| ReadError::File {
        path: dir.display().to_string(),
        source,
    };
    let mut folders = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            folders.push(path);
        }
    }
    folders.sort();
    let mut folders = folders.into_iter();
    folders.try_for_each(|folder| collect(&folder, baseline, depth - 1, lines))
}

fn samples_of(benchmark: &Benchmark, samples: &Samples) -> Vec<Line> {
    let variant = Variant {
        operation: benchmark.full_id.clone(),
        arm: String::new(),
        pools: false,
        memory_mode: String::new(),
        disk: String::new(),
        ram_mib: 0,
        concurrency: 1,
        page_cache: String::new(),
        age_s: None,
        template: None,
    };
    let pairs = samples.times.iter().zip(&samples.iters).enumerate();
    pairs
        .map(|(iteration, (time, count))| Line {
            machine: Machine::untold(),
            variant: variant.clone(),
            sample: Sample {
                iteration,
                ms: Some(time / count * MS_PER_NS),
                ..Sample::default()
            },
        })
        .collect()
}

fn document<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, ReadError> {
    let name = || path.display().to_string();
    let text = fs::read(path).map_err(|source: io::Error| ReadError::File {
        path: name(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| ReadError::Line {
        path: name(),
        number: 1,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::super::compare::{Verdict, compare};
    use super::*;

    fn save(root: &Path, baseline: &str, name: &str, ns: f64) {
        let dir = root.join(name).join(baseline);
        fs::create_dir_all(&dir).unwrap();
        let iters: Vec<f64> = (1..=60).map(f64::from).collect();
        // Not all alike, as nothing is.
        let times = iters.iter().map(|n| n * (ns + n % 7.0));
        let samples = serde_json::json!({
            "sampling_mode": "Linear", "iters": iters, "times": times.collect::<Vec<_>>(),
        });
        fs::write(dir.join("sample.json"), samples.to_string()).unwrap();
        let id = serde_json::json!({"group_id": name, "full_id": name});
        fs::write(dir.join("benchmark.json"), id.to_string()).unwrap();
    }

    #[test]
    fn two_baselines_are_set_side_by_side() {
        let root = std::env::temp_dir().join(format!("rewake-criterion-{}", std::process::id()));
        save(&root, "before", "a ping", 1000.0);
        save(&root, "before", "group/a change", 500.0);
        save(&root, "after", "a ping", 1500.0);
        save(&root, "after", "group/a change", 500.0);
        let lines = |name| read(&root.join(name)).unwrap().unwrap();
        let (before, after) = (lines("before"), lines("after"));
        assert_eq!((before.len(), after.len()), (120, 120));
        let found = compare(&before, &after).unwrap();
        let of = |name: &str| {
            let verdict = found.iter().find(|it| it.0.name() == name);
            verdict
                .unwrap_or_else(|| panic!("{name}: {found:?}"))
                .1
                .clone()
        };
        assert!(matches!(of("a ping"), Verdict::Slower(_)));
        assert!(matches!(of("group/a change"), Verdict::Unchanged(_)));
        assert!(read(&root.join("none")).is_none());
        fs::remove_dir_all(&root).unwrap();
    }
}
