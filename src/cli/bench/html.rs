//! A report with plots, in one file that needs no network: tables, and SVG drawn here.

use std::fmt::Write as _;
use std::path::Path;

use super::plot::{Axis, Bar, Dash, Plot, Series, bars, escape, legend};
use super::record::{Circumstances, Line, STAND_IN, Sample, Variant, by_variant, times};
use super::run::SAYS;
use super::stats::sorted;
use super::table::{Row, rows};
use crate::cli::report::WriteError;

/// Colours by role, for paper and for the dark; series colours keep apart for all kinds of
/// sight in both.
const STYLE: &str = "
:root { color-scheme: light dark; --ground: #fcfcfb; --ink: #1c1c1a; --faint: #6b6a65;
  --rule: #dcdbd5; --alarm: #a3291b;
  --c0: #2a6fdb; --c1: #d9730d; --c2: #14866d; --c3: #b0398f; --c4: #8a6d00; --c5: #5b51c9;
  --c6: #48740f; --c7: #c23b4b; }
@media (prefers-color-scheme: dark) { :root { --ground: #171716; --ink: #ecebe6;
  --faint: #a09f98; --rule: #3a3935; --alarm: #ff8f7d;
  --c0: #6ea8ff; --c1: #f2a45c; --c2: #4fc7a9; --c3: #e68bca; --c4: #d6b84a; --c5: #a79fff;
  --c6: #9ccb5c; --c7: #ff8a96; } }
body { font: 15px/1.5 system-ui, 'DejaVu Sans', sans-serif; background: var(--ground);
  color: var(--ink); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.machine, figcaption, .note { color: var(--faint); font-size: .85rem; }
p.alarm { border: 2px solid var(--alarm); color: var(--alarm); padding: .5rem .8rem;
  font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.failed { color: var(--alarm);
  font-weight: 600; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, 'DejaVu Sans', sans-serif; fill: var(--ink); }
svg .faint { fill: var(--faint); } svg .rule { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--faint); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 7 4; } svg .dotted { stroke-dasharray: 2 3; } svg .mark { font-weight: 600; fill: var(--alarm); }
svg .segment { stroke: var(--ground); stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .85rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px;
  margin-right: .35rem; vertical-align: -.1rem; }
";

/// Writes the report of these samples.
pub(super) fn write(path: &Path, lines: &[Line]) -> Result<(), WriteError> {
    std::fs::write(path, document(lines)).map_err(|source| WriteError {
        path: path.to_owned(),
        source,
    })
}

/// The report as text.
fn document(lines: &[Line]) -> String {
    let Some(first) = lines.first() else {
        return String::new();
    };
    let machine = &first.machine;
    let title = "rewake bench";
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n\
         <p class=\"machine\">{}</p>\n",
        escape(&machine.line())
    );
    if machine.is_stand_in() {
        page.push_str(
            "<p class=\"alarm\">Measured on the stand-in, not on Cloud Hypervisor: \
             no VM ran, and the times say nothing about one.</p>\n",
        );
    }
    let context = Context {
        lines,
        groups: by_variant(lines),
        rows: rows(lines),
        watermark: machine.is_stand_in().then_some(STAND_IN),
    };
    context.table(&mut page);
    context.distributions(&mut page);
    context.phases(&mut page);
    context.scaling(
        &mut page,
        "memory of the guest, MiB",
        |it| it.ram_mib as f64,
        |it| {
            it.ram_mib = 0;
        },
    );
    context.scaling(
        &mut page,
        "guests at once",
        |it| it.concurrency as f64,
        |it| {
            it.concurrency = 0;
        },
    );
    context.failures(&mut page);
    page.push_str("</body></html>\n");
    page
}

struct Context<'a> {
    lines: &'a [Line],
    groups: Vec<(Variant, Vec<&'a Sample>)>,
    rows: Vec<Row>,
    /// A word that every plot carries.
    watermark: Option<&'static str>,
}

/// The colour of a series is the same in every plot.
fn colour(series: &str) -> usize {
    match series {
        "rewake-cold" => 0,
        "conventional" => 1,
        "rewake-warm" => 2,
        "floor" => 3,
        _ => 4,
    }
}

fn caption(place: &Circumstances) -> String {
    let (operation, template, ram, concurrency, cache, age) = place;
    let of = template
        .as_ref()
        .map_or_else(String::new, |it| format!(" of {it}"));
    let cached = if cache == "warm" { "is" } else { "is not" };
    let age = age.map_or_else(String::new, |age| format!(" and had lain for {age} s"));
    format!(
        "{operation}{of}, {ram} MiB, {concurrency} at once, the snapshot {cached} in the page \
         cache{age}: fraction that was done within a time (logarithmic)"
    )
}

fn section(page: &mut String, heading: &str) {
    // Writing into a String cannot fail.
    let _ = writeln!(page, "<h2>{}</h2>", escape(heading));
}

impl Context<'_> {
    fn table(&self, page: &mut String) {
        section(page, SAYS);
        page.push_str("<div class=\"scroll\"><table><tr>");
        for name in [
            "",
            "n",
            "failed",
            "min",
            "p50",
            "p90",
            "p99",
            "max",
            "ready p50",
            "ready p99",
            "per s and core",
        ] {
            let _ = write!(page, "<th>{name}</th>");
        }
        page.push_str("</tr>\n");
        for row in &self.rows {
            let failed = if row.failures > 0 {
                " class=\"failed\""
            } else {
                ""
            };
            let _ = write!(
                page,
                "<tr><td>{}</td><td>{}</td><td{failed}>{}</td>",
                escape(&row.name),
                row.total.map_or(0, |it| it.n),
                row.failures
            );
            match row.total {
                Some(it) => {
                    for value in [it.min, it.p50, it.p90, it.p99, it.max] {
                        let _ = write!(page, "<td>{value:.3}</td>");
                    }
                }
                None => page.push_str("<td>-</td><td>-</td><td>-</td><td>-</td><td>-</td>"),
            }
            match row.ready {
                Some(it) => {
                    let _ = write!(page, "<td>{:.3}</td><td>{:.3}</td>", it.p50, it.p99);
                }
                None => page.push_str("<td>-</td><td>-</td>"),
            }
            let throughput = row
                .throughput
                .map_or("-".to_owned(), |it| format!("{it:.1}"));
            let _ = writeln!(page, "<td>{throughput}</td></tr>");
        }
        page.push_str(
            "</table></div>\n<p class=\"note\">For the floor: until the API and the \
             guest have answered once; it calls no /init, so what can be set against it is \
             ready, when envd answered first. Percentiles are measured samples \
             (nearest rank).</p>\n",
        );
    }

    /// One plot for each set of circumstances, a line for each who went through them.
    fn distributions(&self, page: &mut String) {
        section(page, "How the times are distributed");
        let mut places: Vec<Circumstances> = Vec::new();
        for (variant, _) in &self.groups {
            let place = variant.circumstances();
            if !places.contains(&place) {
                places.push(place);
            }
        }
        for place in places {
            let here = self
                .groups
                .iter()
                .filter(|(it, _)| it.circumstances() == place);
            let series: Vec<Series> = here
                .filter_map(|(variant, samples)| {
                    let times = sorted(&times(samples));
                    // What failed was never done: its line does not come to the top.
                    let count = samples.len() as f64;
                    let steps = times.iter().enumerate();
                    Some(Series {
                        name: format!("{} {}", variant.series(), variant.memory_mode),
                        colour: colour(variant.series()),
                        dash: match variant.memory_mode.as_str() {
                            "on-demand" => Dash::Dashed,
                            "copy" => Dash::Dotted,
                            _ => Dash::Solid,
                        },
                        points: (!times.is_empty()).then(|| {
                            let steps = steps.map(|(i, ms)| (*ms, i as f64 / count));
                            // Up at each sample: one alone is a line, too.
                            steps
                                .flat_map(|(ms, below)| [(ms, below), (ms, below + 1.0 / count)])
                                .collect()
                        })?,
                    })
                })
                .collect();
            let caption = caption(&place);
            self.plot(
                page,
                &series,
                Axis::logarithmic("ms"),
                Axis::fraction(),
                &caption,
            );
        }
    }

    /// Whether several operations were measured.
    fn is_mixed(&self) -> bool {
        let first = self.rows.first().map(|row| &row.variant.operation);
        let others = self.rows.iter().map(|row| Some(&row.variant.operation));
        others.into_iter().any(|it| it != first)
    }

    fn phases(&self, page: &mut String) {
        section(page, "Where the time goes");
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in self.rows.iter().flat_map(|row| &row.phases) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        let rows: Vec<Bar<'_>> = self
            .rows
            .iter()
            .filter(|row| !row.phases.is_empty())
            .map(|row| {
                let phases = row.phases.iter().map(|(name, summary)| {
                    let index = names.iter().position(|it| it == name).unwrap_or_default();
                    (index, name.as_str(), summary.p50)
                });
                (row.name.clone(), phases.collect())
            })
            .collect();
        // Bars of which one is ten times as long as the others tell nothing of the others.
        let length = |row: &Bar<'_>| row.1.iter().map(|it| it.2).sum::<f64>();
        let shortest = rows.iter().map(length).fold(f64::INFINITY, f64::min);
        let (long, short): (Vec<_>, Vec<_>) = rows
            .into_iter()
            .partition(|row| length(row) > 6.0 * shortest);
        for group in [short, long] {
            if group.is_empty() {
                continue;
            }
            let _ = write!(page, "<figure>{}", bars(&group, "ms", self.watermark));
            page.push_str("<figcaption>medians of the time from each phase to the next</figcaption></figure>\n");
        }
        page.push_str(&legend(
            &names
                .iter()
                .enumerate()
                .map(|(i, it)| (*it, i, Dash::Solid))
                .collect::<Vec<_>>(),
        ));
    }

    /// Medians and 99th percentiles over one dimension, where it was varied.
    fn scaling(
        &self,
        page: &mut String,
        label: &str,
        dimension: impl Fn(&Variant) -> f64,
        forget: impl Fn(&mut Variant),
    ) {
        let mut families: Vec<(Variant, Vec<&Row>)> = Vec::new();
        for row in self.rows.iter().filter(|row| row.total.is_some()) {
            let mut family = row.variant.clone();
            forget(&mut family);
            match families.iter_mut().find(|it| it.0 == family) {
                Some((_, rows)) => rows.push(row),
                None => families.push((family, vec![row])),
            }
        }
        families.retain(|(_, rows)| rows.len() > 1);
        if families.is_empty() {
            return;
        }
        section(page, &format!("Over {label}"));
        let mut series = Vec::new();
        for (family, mut rows) in families {
            rows.sort_by(|a, b| dimension(&a.variant).total_cmp(&dimension(&b.variant)));
            for (name, dash) in [("p50", Dash::Solid), ("p99", Dash::Dashed)] {
                let points = rows.iter().filter_map(|row| {
                    let total = row.total?;
                    let value = if dash == Dash::Solid {
                        total.p50
                    } else {
                        total.p99
                    };
                    Some((dimension(&row.variant), value))
                });
                let operation = if self.is_mixed() {
                    format!("{} ", family.operation)
                } else {
                    String::new()
                };
                let mut who = format!("{operation}{} {}", family.series(), family.memory_mode);
                who.push_str(&family.rest());
                series.push(Series {
                    name: format!("{who} {name}"),
                    colour: colour(family.series()),
                    dash,
                    points: points.collect(),
                });
            }
        }
        let caption = "Medians, and dashed the 99th percentiles; both axes are logarithmic";
        self.plot(
            page,
            &series,
            Axis::logarithmic(label),
            Axis::logarithmic("ms"),
            caption,
        );
    }

    fn plot(&self, page: &mut String, series: &[Series], x: Axis<'_>, y: Axis<'_>, caption: &str) {
        let plot = Plot {
            series,
            x,
            y,
            watermark: self.watermark,
        };
        let _ = writeln!(
            page,
            "<figure>{}{}<figcaption>{}</figcaption></figure>",
            legend(
                &series
                    .iter()
                    .map(|it| (it.name.as_str(), it.colour, it.dash))
                    .collect::<Vec<_>>()
            ),
            plot.svg(),
            escape(caption)
        );
    }

    fn failures(&self, page: &mut String) {
        let failed: Vec<_> = self
            .lines
            .iter()
            .filter(|line| line.sample.ms.is_none())
            .collect();
        if failed.is_empty() {
            return;
        }
        section(page, "What failed");
        page.push_str("<ul>\n");
        for line in failed.iter().take(50) {
            let error = line
                .sample
                .error
                .as_deref()
                .unwrap_or("no reason was given");
            let _ = writeln!(
                page,
                "<li>{}, round {}: {}</li>",
                escape(&line.variant.name()),
                line.sample.iteration,
                escape(error)
            );
        }
        if failed.len() > 50 {
            let _ = writeln!(page, "<li>and {} more</li>", failed.len() - 50);
        }
        page.push_str("</ul>\n");
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::line;
    use super::*;

    fn lines(vmm: &str) -> Vec<Line> {
        let mut lines = Vec::new();
        for ram in [128, 1024] {
            for (arm, ms) in [("floor", 8.0), ("rewake", 10.0), ("conventional", 200.0)] {
                for n in 0..20 {
                    let mut line = line(arm, vmm, n, Some(ms + n as f64 / 10.0));
                    line.variant.ram_mib = ram;
                    lines.push(line);
                }
            }
        }
        lines.push(line("rewake", vmm, 20, None));
        lines
    }

    #[test]
    fn the_report_needs_nothing_from_elsewhere_and_runs_nothing() {
        let page = document(&lines("v53.0"));
        for foreign in ["http:", "https:", "<script", "url(", "@import", "src="] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert!(page.contains("a &lt;cpu&gt;"), "texts are escaped");
        assert!(page.contains("it broke"), "failures are told");
        assert!(page.contains("Over memory of the guest"));
        assert!(!page.contains("Over guests at once"), "it was not varied");
        assert!(
            !page.contains(STAND_IN),
            "a real run must not carry the word"
        );
        assert!(!page.contains("NaN") && !page.contains("inf"));
    }

    #[test]
    fn every_plot_of_a_run_on_the_stand_in_says_so() {
        let page = document(&lines("53.0-stand-in"));
        let plots: Vec<_> = page.split("<svg").skip(1).collect();
        assert!(plots.len() >= 5, "{}", plots.len());
        for plot in plots {
            let plot = plot.split("</svg>").next().unwrap();
            assert!(plot.contains("stand-in"), "{plot}");
        }
        assert!(page.contains("Measured on the stand-in"));
    }

    #[test]
    fn lines_over_one_dimension_are_told_apart_by_the_others() {
        let mut lines = lines("v53.0");
        for mut line in lines.clone() {
            line.variant.concurrency = 8;
            lines.push(line);
        }
        let page = document(&lines);
        let over = |label: &str| {
            let from = page.split(&format!("<h2>Over {label}")).nth(1).unwrap();
            from.split("</figure>").next().unwrap().to_owned()
        };
        let memory = over("memory");
        assert!(memory.contains("conventional map x8 p50"), "{memory}");
        assert!(memory.contains("conventional map p50"), "{memory}");
        let at_once = over("guests");
        assert!(at_once.contains("floor map 1024 MiB p99"), "{at_once}");
    }

    #[test]
    fn a_single_sample_is_seen() {
        let page = document(&[line("rewake", "v53.0", 0, Some(10.0))]);
        let points = page.split("points=\"").nth(1).unwrap().split('"').next();
        let points: Vec<_> = points.unwrap().split(' ').collect();
        assert_eq!(points.len(), 2);
        assert_ne!(points[0], points[1]);
    }

    #[test]
    fn what_failed_keeps_its_line_from_the_top() {
        let times = (0..10).map(|n| line("rewake", "v53.0", n, Some(10.0 + n as f64)));
        let mut lines: Vec<_> = times.collect();
        let ends_at = |lines: &[Line]| {
            let page = document(lines);
            let points = page.split("points=\"").nth(1).unwrap().split('"').next();
            let last = points.unwrap().split(' ').next_back().unwrap().to_owned();
            last.split(',').nth(1).unwrap().parse::<f64>().unwrap()
        };
        let top = ends_at(&lines);
        lines.extend((10..20).map(|n| line("rewake", "v53.0", n, None)));
        assert!(ends_at(&lines) > top + 100.0, "half of them never came");
    }

    #[test]
    fn a_run_of_failures_has_a_report_too() {
        let page = document(&[line("rewake", "v53.0", 0, None)]);
        assert!(page.contains("What failed") && page.ends_with("</html>\n"));
    }
}
