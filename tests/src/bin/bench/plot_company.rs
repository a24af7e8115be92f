//! A plot of an agent's answers in different company.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::results::Results;
use crate::statistics::Summary;

const SIZE: (u32, u32) = (860, 420);
const FONT: &str = "sans-serif";
const MEDIAN: RGBColor = RGBColor(0, 114, 178);
const P99: RGBColor = RGBColor(213, 94, 0);

/// The name of its file.
pub const FILE: &str = "neighbours.svg";

/// Draws it; nothing when nobody was asked in company.
///
/// # Errors
/// When the library can't.
pub fn svg(results: &Results) -> Result<Option<String>> {
    let rows: Vec<(String, Summary)> = results
        .asked()
        .filter_map(|asked| Some((asked.company.to_string(), Summary::of(asked.answer_us.iter().copied())?)))
        .collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&area, &rows).map_err(|error| anyhow!("drawing {FILE}: {error}"))?;
    }
    text.push('\n');
    Ok(Some(text))
}

#[allow(clippy::cast_precision_loss)] // Times of less than 2^53 µs.
fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    rows: &[(String, Summary)],
) -> Result<(), Box<dyn std::error::Error>> {
    let slowest = rows.iter().map(|(_, times)| ms(times.p99)).fold(0.0, f64::max);
    let count = i32::try_from(rows.len())?;
    // The first row on top.
    let name = |place: i32| {
        usize::try_from(count - 1 - place).ok().and_then(|row| rows.get(row)).map_or("", |(name, _)| name)
    };
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption("The first byte of an agent's answer, in different company", (FONT, 20))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(210)
        .build_cartesian_2d(0.0..slowest * 1.05, (0..count - 1).into_segmented())?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc("milliseconds")
        .y_labels(rows.len())
        .y_label_formatter(&|place| match place {
            SegmentValue::CenterOf(place) | SegmentValue::Exact(place) => name(*place).to_owned(),
            SegmentValue::Last => String::new(),
        })
        .axis_desc_style((FONT, 14))
        .label_style((FONT, 13))
        .bold_line_style(RGBColor(205, 205, 205))
        .draw()?;
    for (colour, label, figure) in [
        (P99, "p99", (|times: &Summary| times.p99) as fn(&Summary) -> u64),
        (MEDIAN, "median", |times: &Summary| times.p50),
    ] {
        let bars = (0..count).rev().zip(rows).map(|(place, (_, times))| {
            let end = if place + 1 == count { SegmentValue::Last } else { SegmentValue::Exact(place + 1) };
            let ends = [(0.0, SegmentValue::Exact(place)), (ms(figure(times)), end)];
            let mut bar = Rectangle::new(ends, colour.filled());
            bar.set_margin(6, 6, 0, 0);
            bar
        });
        chart
            .draw_series(bars)?
            .label(label)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE)
        .border_style(RGBColor(160, 160, 160))
        .label_font((FONT, 14))
        .draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::plan::Company;
    use crate::record::{Asked, Record};
    use crate::results::tests::results;

    #[test]
    fn every_company_has_its_name_and_two_bars() {
        let mut results = results();
        assert_eq!(svg(&results).unwrap(), None);
        for company in [Company::Nobody, Company::Asleep(50)] {
            results.records.push(Record::Asked(Asked { company, answer_us: vec![1000, 2000], wakes: 0 }));
        }
        let svg = svg(&results).unwrap().unwrap();
        for part in ["alone", "beside 50 that sleep", "median", "p99", "milliseconds"] {
            assert!(svg.contains(part), "{part} is not in the plot");
        }
    }
}
