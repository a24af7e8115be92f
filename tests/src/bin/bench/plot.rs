//! Plots of the results, as SVG on a background of their own, so that they can be read on light and dark pages.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::plan::{Cache, Depth, Subject, Waker, Workload};
use crate::record::Cycle;
use crate::results::Results;
use crate::statistics::Summary;

const SIZE: (u32, u32) = (860, 480);
const FONT: &str = "sans-serif";

/// A plot of times over the memory of agents, one line for each way to wake them.
#[derive(Debug, Clone, PartialEq)]
pub struct Plot {
    /// The name of its file.
    pub file: &'static str,
    title: &'static str,
    lines: Vec<Line>,
}

/// The medians of one subject.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    whose: Whose,
    /// MiB, and milliseconds: the median, the smallest and the 95th percentile.
    points: Vec<(f64, [f64; 3])>,
}

/// Whose figures a line shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// Those of cycles, where all sleep as images.
    Subject(Subject),
    /// This project's at a depth of its own.
    Depth(Depth),
}

/// All plots of a run.
pub fn all(results: &Results) -> Vec<Plot> {
    let plot = |file, title, figure: fn(&Cycle) -> Option<u64>| {
        let subjects = [Subject::Agentcube, Subject::Runc, Subject::Crun, Subject::ColdStart];
        let lines = subjects.map(|subject| Line::of(results, subject, figure));
        Plot { file, title, lines: lines.into_iter().filter(|line| !line.points.is_empty()).collect() }
    };
    let mut wake = plot("wake.svg", "From asking for a wake to the first byte of the answer", |cycle| {
        Some(cycle.first_byte_us)
    });
    let depths = [Depth::Frozen, Depth::Reclaimed].map(|depth| Line::of_depth(results, depth));
    wake.lines.extend(depths.into_iter().filter(|line| !line.points.is_empty()));
    vec![
        wake,
        plot("resident.svg", "From asking for a wake until all memory is back", |cycle| {
            Some(cycle.resident_us())
        }),
        plot("sleep.svg", "Falling asleep", |cycle| Some(cycle.sleep.as_ref()?.total_us)),
    ]
    .into_iter()
    .filter(|plot| !plot.lines.is_empty())
    .collect()
}

impl Line {
    fn of(results: &Results, subject: Subject, figure: fn(&Cycle) -> Option<u64>) -> Self {
        let points = results
            .workloads(Cache::Warm)
            .into_iter()
            .filter_map(|workload| point(workload, results.summary(workload, Cache::Warm, subject, figure)?));
        Self { whose: Whose::Subject(subject), points: points.collect() }
    }

    /// Wakes by request, as those of the other lines.
    fn of_depth(results: &Results, depth: Depth) -> Self {
        let points = results.workloads_at_depths().into_iter().filter_map(|workload| {
            let by_request = Some(Waker::Request);
            point(workload, results.depth_summary(workload, depth, by_request, |cycle| cycle.first_byte_us)?)
        });
        Self { whose: Whose::Depth(depth), points: points.collect() }
    }

    fn colour(&self) -> RGBColor {
        // Told apart by people who see no red or no green, too.
        match self.whose {
            Whose::Subject(Subject::Agentcube) => RGBColor(0, 114, 178),
            Whose::Subject(Subject::Runc) => RGBColor(213, 94, 0),
            Whose::Subject(Subject::Crun) => RGBColor(0, 158, 115),
            Whose::Subject(Subject::ColdStart) => RGBColor(120, 120, 120),
            Whose::Depth(Depth::Frozen) => RGBColor(86, 180, 233),
            Whose::Depth(_) => RGBColor(204, 121, 167),
        }
    }

    fn name(&self) -> &'static str {
        match self.whose {
            Whose::Subject(Subject::Agentcube) | Whose::Depth(Depth::Checkpointed) => "agentcube",
            Whose::Subject(Subject::Runc) => "runc checkpoint, restore",
            Whose::Subject(Subject::Crun) => "crun checkpoint, restore",
            Whose::Subject(Subject::ColdStart) => "cold start (containerd, runc)",
            Whose::Depth(Depth::Frozen) => "agentcube, frozen",
            Whose::Depth(Depth::Reclaimed) => "agentcube, reclaimed",
        }
    }
}

/// Where a summary is in a plot; an agent without a size is nowhere.
fn point(workload: Workload, summary: Summary) -> Option<(f64, [f64; 3])> {
    #[allow(clippy::cast_precision_loss)] // Times of less than 2^53 µs.
    let ms = |us: u64| us as f64 / 1000.0;
    let Workload::Python(mib) = workload else { return None };
    Some((f64::from(mib), [summary.p50, summary.min, summary.p95].map(ms)))
}

impl Plot {
    /// Draws it.
    ///
    /// # Errors
    /// When the library can't.
    pub fn svg(&self) -> Result<String> {
        let mut text = String::new();
        {
            let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            self.draw(&area).map_err(|error| anyhow!("drawing {}: {error}", self.file))?;
        }
        text.push('\n');
        Ok(text)
    }

    fn draw(&self, area: &DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), Box<dyn std::error::Error>> {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let times = || points().flat_map(|(_, times)| times.iter().copied());
        let mut sizes: Vec<f64> = points().map(|(mib, _)| *mib).collect();
        sizes.sort_by(f64::total_cmp);
        sizes.dedup();
        let bounds = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)))
        };
        let (smallest, largest) = bounds(&mut sizes.iter().copied());
        let (fastest, slowest) = bounds(&mut times());
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, (FONT, 20))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(66)
            .build_cartesian_2d(
                (smallest / 1.4..largest * 1.4).log_scale().with_key_points(sizes),
                // Room for the legend above.
                (fastest / 1.6..slowest * 6.0)
                    .log_scale()
                    .with_key_points(ticks(fastest / 1.6, slowest * 6.0)),
            )?;
        chart
            .configure_mesh()
            .x_desc("memory of the agent, MiB (logarithmic)")
            .y_desc("milliseconds (logarithmic): median, smallest to p95")
            .axis_desc_style((FONT, 14))
            .label_style((FONT, 13))
            .bold_line_style(RGBColor(205, 205, 205))
            .x_label_formatter(&|mib| format!("{mib}"))
            .y_label_formatter(&|ms| format!("{ms}"))
            .draw()?;
        for (number, line) in (0..).map(f64::from).zip(&self.lines) {
            let colour = line.colour();
            let medians = line.points.iter().map(|(mib, [median, ..])| (*mib, *median));
            chart
                .draw_series(LineSeries::new(medians.clone(), colour.stroke_width(3)))?
                .label(line.name())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(3)));
            chart.draw_series(medians.map(|point| Circle::new(point, 5, colour.filled())))?;
            // A little aside, so that those of different subjects do not lie on one another.
            let aside = |mib: f64| mib * (1.0 + 0.012 * number);
            let spreads =
                line.points.iter().map(|(mib, [_, low, high])| [(aside(*mib), *low), (aside(*mib), *high)]);
            chart.draw_series(spreads.map(|ends| PathElement::new(ends, colour.stroke_width(1))))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .legend_area_size(30)
            .background_style(WHITE)
            .border_style(RGBColor(160, 160, 160))
            .label_font((FONT, 14))
            .draw()?;
        area.present()?;
        Ok(())
    }
}

/// 1, 2 and 5 times the powers of ten between two numbers.
fn ticks(from: f64, to: f64) -> Vec<f64> {
    let powers = (-3..7).map(|power| 10_f64.powi(power));
    let all = powers.flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * power));
    all.filter(|tick| (from..=to).contains(tick)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::results::tests::results;

    #[test]
    fn a_plot_has_its_background_its_units_and_a_name_for_each_line() {
        let plots = all(&results());
        assert_eq!(
            plots.iter().map(|plot| plot.file).collect::<Vec<_>>(),
            ["wake.svg", "resident.svg", "sleep.svg"]
        );
        let svg = plots[0].svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for part in
            ["MiB (logarithmic)", "milliseconds", "agentcube", "runc checkpoint", "cold start", "#FFFFFF"]
        {
            assert!(svg.contains(part), "{part} is not in the plot");
        }
        assert!(!svg.contains("crun") && svg.contains("agentcube, frozen") && !svg.contains("reclaimed"));
        assert!(!plots[1].svg().unwrap().contains("frozen"));
    }

    #[test]
    fn ticks_are_round_numbers_within_the_axis() {
        assert_eq!(ticks(4.0, 60.0), [5.0, 10.0, 20.0, 50.0]);
    }

    #[test]
    fn what_was_not_measured_has_no_plot() {
        let mut empty = results();
        empty.records.clear();
        assert!(all(&empty).is_empty());
    }
}
