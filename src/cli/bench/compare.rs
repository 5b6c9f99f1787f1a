//! `rewake bench compare`: what moved between two runs, beyond noise.

use std::path::{Path, PathBuf};

use clap::Args;

use super::criterion;
use super::record::{self, Line, Machine, Variant};
use super::stats::{Difference, Summary};
use crate::cli::{Failure, Global, report};

const KEYS: &str = "\
JSON: before and after (the machine of each), differing (what else is not the same, or null),
  variants, a list of
    name, variant (what was varied), result: verdict (slower, faster, unchanged, failing,
      unknown), before and after (n, min, p50, p90, p99 and max, in milliseconds; failures where
      it is failing), difference (ratio of the medians, low and high of 99 % of it, p)";

#[derive(Debug, Args)]
#[command(after_long_help = KEYS)]
pub(in crate::cli) struct CompareArgs {
    /// The samples of the run before: a file that --out wrote, or a baseline that `cargo
    /// bench -- --save-baseline NAME` saved, as target/criterion/NAME
    #[arg(value_name = "BEFORE")]
    before: PathBuf,
    /// The samples of the run after
    #[arg(value_name = "AFTER")]
    after: PathBuf,
}

const HEADER: [&str; 8] = [
    "variant",
    "n",
    "before ms",
    "after ms",
    "ratio",
    "99 % of it",
    "p",
    "verdict",
];

/// What became of one variant.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub(super) enum Verdict {
    /// Its median moved beyond noise.
    Slower(Numbers),
    Faster(Numbers),
    /// What differs may be chance.
    Unchanged(Numbers),
    /// It fails more often than before: times do not count then.
    Failing {
        before: usize,
        after: usize,
    },
    /// One of the runs has too few samples of it, or none.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(super) struct Numbers {
    before: Summary,
    after: Summary,
    difference: Difference,
}

/// Two runs cannot be set side by side.
#[derive(Debug, thiserror::Error)]
#[error("One was measured on {0} and the other on {1}: their times do not compare")]
pub(super) struct Unlike(String, String);

pub(super) fn run(args: &CompareArgs, global: Global) -> Result<(), Failure> {
    let (before, after) = (read(&args.before)?, read(&args.after)?);
    let verdicts = compare(&before, &after)?;
    if global.json {
        let verdicts = verdicts.iter().map(|(variant, verdict)| {
            serde_json::json!({"name": variant.name(), "variant": variant, "result": verdict})
        });
        return report::json(&serde_json::json!({
            "before": before[0].machine,
            "after": after[0].machine,
            "differing": differences(&before[0].machine, &after[0].machine),
            "variants": verdicts.collect::<Vec<_>>(),
        }));
    }
    println!("before: {}", before[0].machine.line());
    println!("after:  {}", after[0].machine.line());
    if let Some(what) = differences(&before[0].machine, &after[0].machine) {
        println!("Not on the same ground, so that what moved may not be rewake: {what} differ.");
    }
    let rows: Vec<_> = verdicts.iter().map(|it| row(&it.0, &it.1)).collect();
    report::table(&HEADER, &rows)
}

/// What else than rewake differs between two runs.
fn differences(before: &Machine, after: &Machine) -> Option<String> {
    let pairs = [
        ("kernel", before.kernel != after.kernel),
        ("processor", before.cpu != after.cpu),
        ("number of cores", before.cores != after.cores),
        ("Cloud Hypervisor", before.vmm != after.vmm),
        ("kind of build", before.build != after.build),
    ];
    let names: Vec<_> = pairs.iter().filter(|it| it.1).map(|it| it.0).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

fn read(path: &Path) -> Result<Vec<Line>, record::ReadError> {
    criterion::read(path).unwrap_or_else(|| record::read(path))
}

/// Every variant of either run, and what became of it.
pub(super) fn compare(before: &[Line], after: &[Line]) -> Result<Vec<(Variant, Verdict)>, Unlike> {
    let kind = |lines: &[Line]| {
        let first = lines.first().map(|line| line.machine.vmm_kind.clone());
        first.unwrap_or_default()
    };
    if kind(before) != kind(after) {
        return Err(Unlike(kind(before), kind(after)));
    }
    let (before, after) = (record::by_variant(before), record::by_variant(after));
    let mut variants: Vec<&Variant> = before.iter().chain(&after).map(|it| &it.0).collect();
    variants.sort();
    variants.dedup();
    let find = |groups: &[(Variant, Vec<&record::Sample>)], wanted: &Variant| {
        let group = groups.iter().find(|it| it.0 == *wanted);
        let samples = group.map_or(&[][..], |it| &it.1);
        (record::times(samples), record::failures(samples))
    };
    Ok(variants
        .into_iter()
        .map(|variant| {
            let verdict = judge(&find(&before, variant), &find(&after, variant));
            (variant.clone(), verdict)
        })
        .collect())
}

fn judge(before: &(Vec<f64>, usize), after: &(Vec<f64>, usize)) -> Verdict {
    let share = |(times, failures): &(Vec<f64>, usize)| {
        *failures as f64 / (times.len() + failures).max(1) as f64
    };
    if share(after) > share(before) {
        return Verdict::Failing {
            before: before.1,
            after: after.1,
        };
    }
    let summaries = (Summary::of(&before.0), Summary::of(&after.0));
    match (Difference::between(&before.0, &after.0), summaries) {
        (Some(difference), (Some(before), Some(after))) => {
            let numbers = Numbers {
                before,
                after,
                difference,
            };
            match difference.moved() {
                true if difference.ratio > 1.0 => Verdict::Slower(numbers),
                true => Verdict::Faster(numbers),
                false => Verdict::Unchanged(numbers),
            }
        }
        _ => Verdict::Unknown,
    }
}

fn row(variant: &Variant, verdict: &Verdict) -> Vec<String> {
    let without_numbers = |word: String| {
        let mut row = vec![variant.name()];
        row.resize(HEADER.len() - 1, "-".to_owned());
        row.push(word);
        row
    };
    let (numbers, word) = match verdict {
        Verdict::Slower(numbers) => (numbers, "SLOWER"),
        Verdict::Faster(numbers) => (numbers, "faster"),
        Verdict::Unchanged(numbers) => (numbers, "unchanged"),
        Verdict::Failing { before, after } => {
            return without_numbers(format!("FAILING: {after} times, before {before}"));
        }
        Verdict::Unknown => return without_numbers("too few samples".to_owned()),
    };
    let Numbers {
        before,
        after,
        difference,
    } = numbers;
    vec![
        variant.name(),
        format!("{}/{}", before.n, after.n),
        millis(before.p50),
        millis(after.p50),
        format!("{:.3}", difference.ratio),
        format!("{:.3} to {:.3}", difference.low, difference.high),
        format!("{:.1e}", difference.p),
        word.to_owned(),
    ]
}

/// Parts take microseconds, whole operations thousands of them.
fn millis(ms: f64) -> String {
    if ms < 0.1 {
        format!("{ms:.6}")
    } else {
        format!("{ms:.3}")
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::line;
    use super::super::stats::Random;
    use super::*;

    fn samples(arm: &str, seed: u64, base: f64, slow: f64) -> Vec<Line> {
        let mut random = Random::new(seed);
        (0..60)
            .map(|iteration| {
                let noise = random.below(1000) as f64 / 5000.0;
                line(arm, "v53.0", iteration, Some(base * (1.0 + noise) + slow))
            })
            .collect()
    }

    fn verdicts(before: &[Line], after: &[Line]) -> Vec<(String, Verdict)> {
        let verdicts = compare(before, after).unwrap().into_iter();
        verdicts
            .map(|(variant, verdict)| (variant.arm, verdict))
            .collect()
    }

    #[test]
    fn only_what_moved_is_said_to_have_moved() {
        let before = [
            samples("rewake", 1, 10.0, 0.0),
            samples("floor", 2, 8.0, 0.0),
        ]
        .concat();
        let after = [
            samples("rewake", 3, 10.0, 2.0),
            samples("floor", 4, 8.0, 0.0),
        ]
        .concat();
        let found = verdicts(&before, &after);
        assert!(matches!(found[0], (ref arm, Verdict::Unchanged(_)) if arm == "floor"));
        assert!(matches!(found[1], (ref arm, Verdict::Slower(_)) if arm == "rewake"));
        let found = verdicts(&after, &before);
        assert!(matches!(found[1].1, Verdict::Faster(_)), "{found:?}");
        for (_, verdict) in verdicts(&before, &before) {
            assert!(matches!(verdict, Verdict::Unchanged(_)), "{verdict:?}");
        }
    }

    #[test]
    fn another_ground_is_told_and_another_commit_is_none() {
        let machine = line("rewake", "v53.0", 0, None).machine;
        let mut other = machine.clone();
        other.commit = "def".into();
        assert_eq!(differences(&machine, &other), None);
        other.cpu = "another".into();
        other.vmm = "v54.0".into();
        let told = differences(&machine, &other);
        assert_eq!(told.as_deref(), Some("processor, Cloud Hypervisor"));
    }

    #[test]
    fn failing_faster_is_failing() {
        let before = samples("rewake", 1, 10.0, 0.0);
        let mut after = samples("rewake", 2, 1.0, 0.0);
        after.push(line("rewake", "v53.0", 99, None));
        let found = verdicts(&before, &after);
        assert_eq!(
            found[0].1,
            Verdict::Failing {
                before: 0,
                after: 1
            }
        );
    }

    #[test]
    fn what_is_not_in_both_runs_is_unknown_and_the_stand_in_is_compared_with_itself_only() {
        let before = samples("rewake", 1, 10.0, 0.0);
        let found = verdicts(&before, &samples("floor", 1, 10.0, 0.0));
        assert!(found.iter().all(|it| it.1 == Verdict::Unknown), "{found:?}");
        let stand_in = [line("rewake", "53.0-stand-in", 0, Some(1.0))];
        assert!(compare(&before, &stand_in).is_err());
    }
}
