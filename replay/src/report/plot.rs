//! A plot of the waits, as SVG: how many have waited at most how long, and mean and p95 beside it. It follows the
//! reader's light or dark mode; the colours are Okabe and Ito's, which differ for every kind of colour vision, and the
//! lines differ in their dashes too.

use std::fmt::Write as _;

use crate::comparison::{Comparison, Figures};
use crate::policy::PolicyName;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 440.0;
/// Waits below this are drawn here, seconds: the axis is logarithmic.
const SHORTEST_S: f64 = 1.0;
/// Points of a curve.
const STEPS: usize = 160;

/// A field of the plot, pixels.
#[derive(Clone, Copy)]
struct Field {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    scale: Scale,
}

/// The axis of waits.
#[derive(Clone, Copy)]
enum Scale {
    /// From [`SHORTEST_S`] to a power of ten, seconds.
    Logarithmic { longest_s: f64 },
    /// From nothing to a multiple of a round step, seconds.
    Linear { longest_s: f64, step_s: f64 },
}

const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#1f2328}.title{font-size:16px;font-weight:600}\
    .axis{stroke:#59636e;stroke-width:1}.grid{stroke:#d1d9e0;stroke-width:1}.curve{fill:none;stroke-width:2.2}\
    .paper{fill:#ffffff}@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.axis{stroke:#9198a1}\
    .grid{stroke:#3d444d}.paper{fill:#0d1117}}";

/// The plot of a comparison.
pub fn plot(comparison: &Comparison, title: &str) -> String {
    let largest = |of: fn(&Figures) -> f64| comparison.policies.values().map(of).fold(10.0, f64::max);
    let longest = Scale::reaching(largest(|figures| figures.waits.max_wait_s));
    let curves = Field { left: 70.0, right: 540.0, top: 84.0, bottom: 370.0, scale: longest };
    let bars = Scale::linear_reaching(largest(|figures| figures.waits.mean_wait_s.max(figures.waits.p95_wait_s)));
    let bars = Field { left: 680.0, right: 920.0, scale: bars, ..curves };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"{0}\">\n<style>{STYLE}</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n",
        escape(title)
    );
    let _ = writeln!(svg, "<text class=\"title\" x=\"24\" y=\"30\">{}</text>", escape(title));
    draw_curves(&mut svg, curves, comparison);
    draw_bars(&mut svg, bars, comparison);
    svg.push_str("</svg>\n");
    svg
}

fn draw_curves(svg: &mut String, field: Field, comparison: &Comparison) {
    text(svg, field.left, 62.0, "start", "Share of requests that waited at most so long");
    for percent in [0, 25, 50, 75, 100] {
        let y = field.height_of(f64::from(percent) / 100.0);
        line(svg, "grid", (field.left, y), (field.right, y), "");
        text(svg, field.left - 8.0, y + 4.0, "end", &format!("{percent} %"));
    }
    let longest_s = field.draw_axis(svg, "wait, seconds (logarithmic)");
    for (policy, waits) in &comparison.waits_s {
        if waits.is_empty() {
            continue;
        }
        let points = (0..=STEPS).map(|step| {
            let wait_s = SHORTEST_S * (longest_s / SHORTEST_S).powf(step as f64 / STEPS as f64);
            let within = waits.partition_point(|wait| *wait <= wait_s) as f64 / waits.len() as f64;
            format!("{:.1},{:.1}", field.across(wait_s), field.height_of(within))
        });
        let points = points.collect::<Vec<_>>().join(" ");
        let (colour, dashes) = look(*policy);
        let _ = writeln!(
            svg,
            "<polyline class=\"curve\" stroke=\"{colour}\" stroke-dasharray=\"{dashes}\" points=\"{points}\"/>"
        );
    }
    // The legend stands where the curves are not: short waits are the share of few at the upper left.
    for (row, policy) in comparison.policies.keys().enumerate() {
        let y = field.top + 14.0 + 19.0 * row as f64;
        let (colour, dashes) = look(*policy);
        let stroke = format!(" stroke=\"{colour}\" stroke-dasharray=\"{dashes}\"");
        line(svg, "curve", (field.left + 10.0, y - 4.0), (field.left + 44.0, y - 4.0), &stroke);
        text(svg, field.left + 52.0, y, "start", policy.as_str());
    }
}

fn draw_bars(svg: &mut String, field: Field, comparison: &Comparison) {
    text(svg, field.left, 62.0, "start", "Mean (filled) and p95 (outlined) wait");
    field.draw_axis(svg, "wait, seconds");
    let room = (field.bottom - field.top) / comparison.policies.len().max(1) as f64;
    for (row, (policy, figures)) in comparison.policies.iter().enumerate() {
        let top = field.top + room * row as f64 + room * 0.14;
        text(svg, field.left - 8.0, top + room * 0.42, "end", policy.as_str());
        let (colour, _) = look(*policy);
        let bars = [(figures.waits.mean_wait_s, colour, 0.0), (figures.waits.p95_wait_s, "none", room * 0.38)];
        for (wait_s, fill, offset) in bars {
            let end = field.across(wait_s);
            let _ = writeln!(
                svg,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{fill}\" stroke=\"{colour}\" \
                 stroke-width=\"1.6\"/>",
                field.left,
                top + offset,
                (end - field.left).max(1.0),
                room * 0.3
            );
            // Beside the bar where there is room for the number, else inside an outlined one.
            let (x, anchor) = if end < field.right - 44.0 { (end + 5.0, "start") } else { (end - 5.0, "end") };
            text(svg, x, top + offset + room * 0.24, anchor, &format!("{wait_s:.0}"));
        }
    }
}

// === impl Field ===

impl Field {
    fn across(&self, wait_s: f64) -> f64 {
        let share = match self.scale {
            Scale::Logarithmic { longest_s } => {
                (wait_s.max(SHORTEST_S) / SHORTEST_S).log10() / (longest_s / SHORTEST_S).log10()
            }
            Scale::Linear { longest_s, .. } => wait_s / longest_s,
        };
        self.left + (self.right - self.left) * share.min(1.0)
    }

    fn height_of(&self, share: f64) -> f64 {
        self.bottom - (self.bottom - self.top) * share
    }

    /// The axis of waits, with a line at each tick. Returns its longest wait, seconds.
    fn draw_axis(&self, svg: &mut String, name: &str) -> f64 {
        let ticks = self.scale.ticks();
        for wait_s in &ticks {
            let x = self.across(*wait_s);
            line(svg, "grid", (x, self.top), (x, self.bottom), "");
            text(svg, x, self.bottom + 18.0, "middle", &tick(*wait_s));
        }
        line(svg, "axis", (self.left, self.bottom), (self.right, self.bottom), "");
        line(svg, "axis", (self.left, self.top), (self.left, self.bottom), "");
        text(svg, f64::midpoint(self.left, self.right), self.bottom + 42.0, "middle", name);
        ticks.last().copied().unwrap_or(SHORTEST_S)
    }
}

// === impl Scale ===

impl Scale {
    fn reaching(wait_s: f64) -> Self {
        Self::Logarithmic { longest_s: 10_f64.powf(wait_s.log10().ceil()) }
    }

    /// Three to eight steps of 1, 2 or 5 times a power of ten.
    fn linear_reaching(wait_s: f64) -> Self {
        let decade = 10_f64.powf(wait_s.log10().floor());
        let step_s = match wait_s / decade {
            ..1.5 => decade / 5.0,
            ..3.5 => decade / 2.0,
            ..8.0 => decade,
            _ => decade * 2.0,
        };
        Self::Linear { longest_s: (wait_s / step_s).ceil() * step_s, step_s }
    }

    fn ticks(self) -> Vec<f64> {
        match self {
            Self::Logarithmic { longest_s } => {
                let decades = (longest_s / SHORTEST_S).log10().round() as i32;
                (0..=decades).map(|decade| SHORTEST_S * 10_f64.powi(decade)).collect()
            }
            Self::Linear { longest_s, step_s } => {
                let steps = (longest_s / step_s).round() as u32;
                (0..=steps).map(|step| f64::from(step) * step_s).collect()
            }
        }
    }
}

fn tick(seconds: f64) -> String {
    if seconds < 1000.0 { format!("{seconds:.0}") } else { format!("{} k", seconds / 1000.0) }
}

/// Colour and dashes of a policy.
const fn look(policy: PolicyName) -> (&'static str, &'static str) {
    match policy {
        PolicyName::Fcfs => ("#999999", "2 4"),
        PolicyName::FcfsEasy => ("#e69f00", "8 4"),
        PolicyName::SjfEasy => ("#56b4e9", "10 3 2 3"),
        PolicyName::TwoLane => ("#d55e00", "none"),
        PolicyName::Clairvoyant => ("#009e73", "4 3"),
    }
}

fn line(svg: &mut String, class: &str, from: (f64, f64), to: (f64, f64), more: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    // Writing to a string cannot fail; the same below.
    let _ =
        writeln!(svg, "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"{more}/>");
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(words));
}

fn escape(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Quota;
    use crate::promise::HoldLimits;
    use crate::replay::Rules;
    use spaceport_core::queue::LaneSettings;

    #[test]
    fn every_policy_has_a_curve_two_bars_and_a_name() {
        let trace = crate::trace::parse("0,100,1,ann\n0,50,0.5,bob\n1,20,0.5,eve\n").unwrap();
        let rules = Rules {
            nodes: 1,
            cards: 1,
            limits: HoldLimits::PRODUCT,
            quota: Quota::Off,
            bounds: None,
            lanes: LaneSettings::default(),
        };
        let svg = plot(&Comparison::of(&[trace], &rules), "Waits <of> three & more");
        let count = |part: &str| svg.matches(part).count();
        assert_eq!(count("<polyline"), PolicyName::ALL.len());
        assert_eq!(count("<rect x="), 2 * PolicyName::ALL.len());
        for policy in PolicyName::ALL {
            assert_eq!(count(&format!(">{}</text>", policy.as_str())), 2, "{policy:?}");
        }
        assert_eq!(count("Waits &lt;of&gt; three &amp; more"), 2);
        assert!(svg.contains("prefers-color-scheme:dark"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
