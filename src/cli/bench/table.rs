//! What a run comes to, as a table: while it goes on, on a terminal, and at its end.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use rewake::timeline::Phase;

use super::record::{Line, Variant, by_variant, failures, reached, times};
use super::stats::Summary;

const HEADER: [&str; 12] = [
    "variant",
    "n",
    "failed",
    "min",
    "p50",
    "p90",
    "p99",
    "max",
    "p50 rel.",
    "ready p50",
    "ready rel.",
    "per s and core",
];

/// One variant of a run.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) variant: Variant,
    pub(super) failures: usize,
    pub(super) total: Option<Summary>,
    /// Until envd answered for the first time, which is where the floor ends and the others
    /// go on to `/init`.
    pub(super) ready: Option<Summary>,
    /// How long each phase took, from the one before it, in the order of time.
    pub(super) phases: Vec<(String, Summary)>,
    /// Guests a second and core, of batches of several.
    pub(super) throughput: Option<f64>,
}

pub(super) fn rows(lines: &[Line]) -> Vec<Row> {
    let mut groups = by_variant(lines);
    groups.sort_by(|a, b| order(&a.0).cmp(&order(&b.0)));
    groups
        .into_iter()
        .map(|(variant, samples)| {
            let cores = lines[0].machine.cores.max(1) as f64;
            // Every guest of a batch carries its time; only those that came count.
            let batches: f64 = samples.iter().filter_map(|it| it.batch_ms).sum();
            let seconds = batches / variant.concurrency.max(1) as f64 / 1e3;
            let came = (samples.len() - failures(&samples)) as f64;
            Row {
                name: variant.name(),
                failures: failures(&samples),
                total: Summary::of(&times(&samples)),
                ready: Summary::of(&reached(&samples, Phase::Ready)),
                phases: phases(&samples),
                throughput: (seconds > 0.0).then(|| came / seconds / cores),
                variant,
            }
        })
        .collect()
}

/// By what is done and under which circumstances; there the floor, ours, the others.
fn order(variant: &Variant) -> impl Ord {
    let operations = [
        "launch",
        "pause-first",
        "resume-first",
        "pause",
        "resume",
        "destroy",
    ];
    let places = ["floor", "rewake-warm", "rewake-cold", "conventional"];
    let rank = |names: &[&str], wanted: &str| {
        let found = names.iter().position(|name| *name == wanted);
        found.unwrap_or(names.len())
    };
    (
        rank(&operations, &variant.operation),
        variant.circumstances(),
        rank(&places, variant.series()),
        variant.memory_mode.clone(),
    )
}

/// Each phase's share of the time: what lies between it and the phase reached before it, per
/// sample.
fn phases(samples: &[&super::record::Sample]) -> Vec<(String, Summary)> {
    let mut shares: Vec<(String, Vec<f64>, f64)> = Vec::new();
    for sample in samples.iter().filter(|sample| sample.ms.is_some()) {
        let mut marks: Vec<(&String, f64)> = sample.phases.iter().map(|it| (it.0, *it.1)).collect();
        marks.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut before = 0.0;
        for (name, at) in marks {
            let share = at - before;
            before = at;
            match shares.iter_mut().find(|it| it.0 == *name) {
                Some((_, list, sum)) => {
                    list.push(share);
                    *sum += at;
                }
                None => shares.push((name.clone(), vec![share], at)),
            }
        }
    }
    shares.sort_by(|a, b| (a.2 / a.1.len() as f64).total_cmp(&(b.2 / b.1.len() as f64)));
    let shares = shares.into_iter();
    shares
        .filter_map(|(name, list, _)| Some((name, Summary::of(&list)?)))
        .collect()
}

/// The table as lines of text. Medians are set against the first row's under the same
/// circumstances.
pub(super) fn text(rows: &[Row]) -> Vec<String> {
    // Of what a row is measured by: its own and the first one's under the same circumstances.
    let relative = |of: &Row, what: fn(&Row) -> Option<Summary>| {
        let mut alike = rows
            .iter()
            .filter(|row| row.variant.circumstances() == of.variant.circumstances());
        let (own, first) = what(of).zip(alike.find_map(what))?;
        Some(format!("{:.2}", own.p50 / first.p50))
    };
    let none = || "-".to_owned();
    let mut cells = vec![HEADER.map(str::to_owned).to_vec()];
    cells.extend(rows.iter().map(|row| {
        let number = |summary: Option<Summary>, value: fn(&Summary) -> f64| {
            summary.map_or_else(none, |it| format!("{:.3}", value(&it)))
        };
        let total = |value| number(row.total, value);
        vec![
            row.name.clone(),
            row.total.map_or(0, |it| it.n).to_string(),
            row.failures.to_string(),
            total(|it| it.min),
            total(|it| it.p50),
            total(|it| it.p90),
            total(|it| it.p99),
            total(|it| it.max),
            relative(row, |row| row.total).unwrap_or_else(none),
            number(row.ready, |it| it.p50),
            relative(row, |row| row.ready).unwrap_or_else(none),
            row.throughput.map_or_else(none, |it| format!("{it:.1}")),
        ]
    }));
    align(&cells)
}

/// The phases of every variant, each with the median and the 99th percentile of its share.
pub(super) fn phase_text(rows: &[Row]) -> Vec<String> {
    let mut cells = vec![
        ["variant", "phase", "p50 ms", "p99 ms"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for row in rows {
        for (index, (phase, summary)) in row.phases.iter().enumerate() {
            cells.push(vec![
                if index == 0 {
                    row.name.clone()
                } else {
                    String::new()
                },
                phase.clone(),
                format!("{:.3}", summary.p50),
                format!("{:.3}", summary.p99),
            ]);
        }
    }
    align(&cells)
}

fn align(cells: &[Vec<String>]) -> Vec<String> {
    let columns = cells.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = cells.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, width))| {
            if column == 0 || cell.parse::<f64>().is_err() && cell != "-" && column == 1 {
                format!("{cell:<width$}")
            } else {
                format!("{cell:>width$}")
            }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    cells.iter().map(line).collect()
}

/// The table while the run goes on, redrawn in place; nothing where nobody looks on.
pub(super) struct Live {
    drawn: usize,
    last: Option<Instant>,
    watched: bool,
    begun: Instant,
}

/// Redrawing costs the machine that is being measured something.
const INTERVAL: Duration = Duration::from_millis(500);

impl Live {
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            drawn: 0,
            last: None,
            watched: !quiet && io::stderr().is_terminal(),
            begun: Instant::now(),
        }
    }

    /// Shows how far it has come, now and then. Called between measurements only.
    pub(super) fn show(&mut self, done: usize, all: usize, stand_in: bool, lines: &[Line]) {
        let now = Instant::now();
        if !self.watched || self.last.is_some_and(|last| now - last < INTERVAL) {
            return;
        }
        self.last = Some(now);
        let word = if stand_in { " (stand-in)" } else { "" };
        let left = match done {
            0 => String::new(),
            done => {
                let left = self.begun.elapsed().as_secs_f64() / done as f64 * (all - done) as f64;
                format!(", {left:.0} s to go")
            }
        };
        let mut text = vec![format!("{done} of {all}{word}{left}")];
        if !lines.is_empty() {
            text.extend(self::text(&rows(lines)));
        }
        self.clear();
        let mut out = io::stderr().lock();
        for line in &text {
            let _ = writeln!(out, "{line}");
        }
        self.drawn = text.len();
    }

    /// Takes the table away, to make room for what lasts.
    pub(super) fn clear(&mut self) {
        if self.drawn > 0 {
            let _ = write!(io::stderr(), "\x1b[{}A\x1b[J", self.drawn);
            self.drawn = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::line;
    use super::*;

    #[test]
    fn failures_are_in_the_table_and_not_in_the_times() {
        let mut lines: Vec<_> = (0..10)
            .map(|n| line("floor", "v53.0", n, Some(2.0 + n as f64)))
            .collect();
        lines.extend((0..10).map(|n| line("rewake", "v53.0", n, Some(4.0 + n as f64))));
        lines.push(line("rewake", "v53.0", 10, None));
        lines.push(line("conventional", "v53.0", 0, None));
        let rows = rows(&lines);
        let text = text(&rows);
        assert_eq!(text.len(), 4);
        let words = |line: usize| text[line].split_whitespace().collect::<Vec<_>>();
        assert_eq!(words(1)[5..8], ["10", "0", "2.000"], "{text:?}");
        assert_eq!(words(2)[5..8], ["10", "1", "4.000"], "{text:?}");
        assert_eq!(words(3)[5..8], ["0", "1", "-"], "{text:?}");
        assert_eq!(words(2)[12], "1.33", "medians 8 and 6");
        assert_eq!(words(2)[13..15], ["8.000", "1.33"], "{text:?}");
        assert_eq!(words(3)[13..15], ["-", "-"], "{text:?}");
        assert!(rows[2].phases.is_empty());
    }

    #[test]
    fn guests_that_did_not_come_are_no_throughput() {
        let mut lines: Vec<_> = (0..4)
            .map(|n| line("rewake", "v53.0", n / 2, Some(400.0)))
            .collect();
        for line in &mut lines {
            line.variant.concurrency = 2;
            line.sample.batch_ms = Some(500.0);
        }
        let throughput = |lines: &[Line]| rows(lines)[0].throughput.unwrap();
        // Four guests in two batches of half a second, on two cores.
        assert!((throughput(&lines) - 2.0).abs() < 1e-9);
        lines[3].sample.ms = None;
        assert!((throughput(&lines) - 1.5).abs() < 1e-9);
    }

    #[test]
    fn until_ready_is_where_envd_answered_and_not_the_end() {
        let mut lines = vec![line("rewake", "v53.0", 0, Some(6.0))];
        let phases = &mut lines[0].sample.phases;
        phases.insert("ready".to_owned(), 4.0);
        phases.insert("init_done".to_owned(), 6.0);
        lines.push(line("rewake", "v53.0", 1, None));
        let rows = rows(&lines);
        let ready = rows[0].ready.unwrap();
        assert_eq!((ready.n, ready.p50), (1, 4.0));
        assert_eq!(rows[0].total.unwrap().p50, 6.0);
    }

    #[test]
    fn a_phase_is_what_lies_between_it_and_the_one_before() {
        let lines = [line("floor", "v53.0", 0, Some(6.0))];
        let rows = rows(&lines);
        let shares: Vec<_> = rows[0]
            .phases
            .iter()
            .map(|it| (it.0.as_str(), it.1.p50))
            .collect();
        assert_eq!(shares, [("spawned", 3.0), ("ready", 3.0)]);
        assert_eq!(phase_text(&rows).len(), 3);
    }
}
