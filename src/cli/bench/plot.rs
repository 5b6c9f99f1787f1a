//! Plots as SVG: lines over two axes, and stacked bars.

use std::fmt::Write as _;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 42.0;
const COLOURS: usize = 8;

/// What tells lines of one colour apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dash {
    Solid,
    Dashed,
    Dotted,
}

impl Dash {
    const fn class(self) -> &'static str {
        match self {
            Self::Solid => "",
            Self::Dashed => " dashed",
            Self::Dotted => " dotted",
        }
    }
}

/// A line, and what it is called.
pub(super) struct Series {
    pub(super) name: String,
    /// Index of its colour.
    pub(super) colour: usize,
    pub(super) dash: Dash,
    pub(super) points: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Scale {
    Logarithmic,
    Fraction,
}

pub(super) struct Axis<'a> {
    label: &'a str,
    scale: Scale,
}

impl<'a> Axis<'a> {
    pub(super) const fn logarithmic(label: &'a str) -> Self {
        Self {
            label,
            scale: Scale::Logarithmic,
        }
    }

    pub(super) const fn fraction() -> Axis<'static> {
        Axis {
            label: "fraction",
            scale: Scale::Fraction,
        }
    }
}

pub(super) struct Plot<'a> {
    pub(super) series: &'a [Series],
    pub(super) x: Axis<'a>,
    pub(super) y: Axis<'a>,
    pub(super) watermark: Option<&'a str>,
}

/// Where values of an axis lie: between these two, at this fraction.
struct Span {
    low: f64,
    high: f64,
    scale: Scale,
}

impl Span {
    fn of(axis: &Axis<'_>, values: impl Iterator<Item = f64>) -> Self {
        let scale = axis.scale;
        if scale == Scale::Fraction {
            let (low, high) = (0.0, 1.0);
            return Self { low, high, scale };
        }
        let positive = values.filter(|value| *value > 0.0);
        let (low, high) = positive.fold((f64::INFINITY, 0.0_f64), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        let (low, high) = if high > 0.0 { (low, high) } else { (1.0, 10.0) };
        // A little room, and never an axis without length.
        Self {
            low: low / 1.15,
            high: high * 1.15,
            scale,
        }
    }

    fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Fraction => value.clamp(0.0, 1.0),
            Scale::Logarithmic => {
                let value = value.max(self.low);
                (value / self.low).ln() / (self.high / self.low).ln()
            }
        }
    }

    /// Round values to put a rule at.
    fn ticks(&self) -> Vec<f64> {
        if self.scale == Scale::Fraction {
            return vec![0.0, 0.25, 0.5, 0.75, 0.9, 1.0];
        }
        let decades = (self.high / self.low).log10();
        let steps: &[f64] = match decades {
            it if it < 0.35 => &[
                1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.3, 2.6, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5,
                6.0, 7.0, 8.0, 9.0,
            ],
            it if it < 1.5 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0],
            it if it < 3.0 => &[1.0, 2.0, 5.0],
            _ => &[1.0],
        };
        let mut ticks = Vec::new();
        let (from, to) = (
            self.low.log10().floor() as i32,
            self.high.log10().ceil() as i32,
        );
        for decade in from..=to {
            for step in steps {
                let value = step * 10_f64.powi(decade);
                if value >= self.low && value <= self.high {
                    ticks.push(value);
                }
            }
        }
        ticks
    }
}

impl Plot<'_> {
    pub(super) fn svg(&self) -> String {
        let points = || self.series.iter().flat_map(|it| &it.points);
        let x = Span::of(&self.x, points().map(|it| it.0));
        let y = Span::of(&self.y, points().map(|it| it.1));
        let at_x = |value: f64| LEFT + x.place(value) * (WIDTH - LEFT - RIGHT);
        let at_y = |value: f64| HEIGHT - BOTTOM - y.place(value) * (HEIGHT - TOP - BOTTOM);
        let mut svg = open(HEIGHT, &format!("{} over {}", self.y.label, self.x.label));
        for tick in y.ticks() {
            let at = at_y(tick);
            let _ = write!(
                svg,
                "<line class=\"rule\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"faint\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 8.0,
                at + 4.0,
                number(tick)
            );
        }
        let bottom = HEIGHT - BOTTOM;
        let mut free_from = 0.0;
        for tick in x.ticks() {
            let at = at_x(tick);
            let _ = write!(
                svg,
                "<line class=\"rule\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>"
            );
            let text = number(tick);
            let half = 4.0 * text.len() as f64;
            if at - half >= free_from {
                free_from = at + half + 6.0;
                let _ = write!(
                    svg,
                    "<text class=\"faint\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
                    bottom + 16.0
                );
            }
        }
        let _ = write!(
            svg,
            "<text class=\"faint\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            HEIGHT - 6.0,
            escape(self.x.label)
        );
        for series in self.series {
            let line: Vec<_> = series
                .points
                .iter()
                .map(|(x, y)| format!("{:.1},{:.1}", at_x(*x), at_y(*y)))
                .collect();
            let dash = series.dash.class();
            let _ = write!(
                svg,
                "<polyline class=\"line{dash}\" style=\"stroke:var(--c{})\" points=\"{}\">\
                 <title>{}</title></polyline>",
                series.colour % COLOURS,
                line.join(" "),
                escape(&series.name)
            );
        }
        svg.push_str(&mark(self.watermark));
        svg.push_str("</svg>");
        svg
    }
}

/// A bar's name, and its segments: the index of a colour, a name and a length.
pub(super) type Bar<'a> = (String, Vec<(usize, &'a str, f64)>);

/// Stacked bars, one a row.
pub(super) fn bars(rows: &[Bar<'_>], unit: &str, watermark: Option<&str>) -> String {
    const ROW: f64 = 44.0;
    let length = |row: &[(usize, &str, f64)]| row.iter().map(|it| it.2).sum::<f64>();
    let longest = rows.iter().map(|it| length(&it.1)).fold(0.0, f64::max);
    let scale = (WIDTH - RIGHT - 90.0) / longest.max(f64::MIN_POSITIVE);
    let height = TOP + ROW * rows.len() as f64 + 4.0;
    let mut svg = open(height, "the phases of each variant");
    for (index, (name, segments)) in rows.iter().enumerate() {
        let top = TOP + ROW * index as f64;
        let _ = write!(
            svg,
            "<text x=\"0\" y=\"{:.1}\">{}</text>",
            top + 10.0,
            escape(name)
        );
        let mut left = 0.0;
        for (colour, phase, value) in segments {
            let width = value * scale;
            let _ = write!(
                svg,
                "<rect class=\"segment\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{width:.1}\" \
                 height=\"20\" style=\"fill:var(--c{});fill-opacity:{}\"><title>{}: {value:.3} \
                 {unit}</title></rect>",
                top + 15.0,
                colour % COLOURS,
                opacity(*colour),
                escape(phase)
            );
            left += width;
        }
        let _ = write!(
            svg,
            "<text class=\"faint\" x=\"{:.1}\" y=\"{:.1}\">{:.2} {unit}</text>",
            left + 6.0,
            top + 29.0,
            length(segments)
        );
    }
    svg.push_str(&mark(watermark));
    svg.push_str("</svg>");
    svg
}

/// Phases are more than colours: the second round of them is lighter.
const fn opacity(colour: usize) -> &'static str {
    match colour / COLOURS {
        0 => "1",
        1 => "0.55",
        _ => "0.3",
    }
}

/// Names with their colours.
pub(super) fn legend(entries: &[(&str, usize, Dash)]) -> String {
    let mut html = String::from("<div class=\"legend\">");
    for (name, colour, dash) in entries {
        let index = colour % COLOURS;
        let background = match dash {
            Dash::Solid => format!("var(--c{index})"),
            Dash::Dashed => stripes(index, 5, 8),
            Dash::Dotted => stripes(index, 2, 5),
        };
        let _ = write!(
            html,
            "<span><i style=\"background:{background};opacity:{}\"></i>{}</span>",
            opacity(*colour),
            escape(name)
        );
    }
    html.push_str("</div>");
    html
}

fn stripes(colour: usize, on: u32, all: u32) -> String {
    format!("repeating-linear-gradient(90deg,var(--c{colour}) 0 {on}px,transparent {on}px {all}px)")
}

fn open(height: f64, label: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">",
        escape(label)
    )
}

fn mark(word: Option<&str>) -> String {
    word.map_or_else(String::new, |word| {
        format!(
            "<text class=\"mark\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT - 4.0,
            TOP + 10.0,
            escape(word)
        )
    })
}

fn number(value: f64) -> String {
    let text = if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    };
    if text.contains('.') {
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    text
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_where_their_values_are() {
        let axis = Axis::logarithmic("ms");
        let span = Span::of(&axis, [1.0, 100.0].into_iter());
        assert!((span.place(10.0) - 0.5).abs() < 1e-9);
        assert!(span.place(1.0) > 0.0 && span.place(100.0) < 1.0);
        assert!(
            span.ticks()
                .iter()
                .all(|tick| (0.0..=1.0).contains(&span.place(*tick)))
        );
        let single = Span::of(&axis, [5.0].into_iter());
        assert!(single.place(5.0).is_finite() && !single.ticks().is_empty());
        let none = Span::of(&axis, [].into_iter());
        assert!(none.place(5.0).is_finite());
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.25, "0.25"),
            (1.0, "1"),
            (10.0, "10"),
            (1500.0, "1500"),
            (2.5, "2.5"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
