//! The plot of a run, as SVG: what was acknowledged in each tenth of a second, and how long acknowledgements took.

use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;
use hdrhistogram::Histogram;
use plotters::prelude::*;

use crate::upload::Acknowledged;

const SIZE: (u32, u32) = (960, 640);

/// How long one point of the throughput stands for.
const STEP: Duration = Duration::from_millis(100);

/// Draws the plot of a run.
pub(crate) fn draw(
    path: &Path,
    acknowledged: &[Acknowledged],
    latencies: &Histogram<u64>,
) -> anyhow::Result<()> {
    // The library's errors name types that cannot leave this function.
    attempt(path, acknowledged, latencies).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn attempt(
    path: &Path,
    acknowledged: &[Acknowledged],
    latencies: &Histogram<u64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (upper, lower) = area.split_vertically(SIZE.1 / 2);

    let rates = throughput(acknowledged);
    let end = rates.last().map_or(1.0, |(at, _)| *at);
    let most = rates.iter().map(|(_, rate)| *rate).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&upper)
        .caption("acknowledged", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..end, 0.0..most * 1.1)?;
    chart.configure_mesh().x_desc("seconds").y_desc("MiB/s").draw()?;
    chart.draw_series(LineSeries::new(rates, &BLUE))?;

    let points = distribution(latencies);
    let most = points.iter().map(|(_, ms)| *ms).fold(0.001, f64::max);
    let mut chart = ChartBuilder::on(&lower)
        .caption("acknowledgement latency by percentile", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..100.0, 0.0..most * 1.1)?;
    chart.configure_mesh().x_desc("percentile").y_desc("ms").draw()?;
    chart.draw_series(LineSeries::new(points, &RED))?;
    area.present()?;
    Ok(())
}

/// MiB/s in each step, at the step's end in seconds.
fn throughput(acknowledged: &[Acknowledged]) -> Vec<(f64, f64)> {
    let step_of = |run: &Acknowledged| (run.at.as_nanos() / STEP.as_nanos()) as usize;
    let steps = acknowledged.iter().map(step_of).max().map_or(0, |last| last + 1);
    let mut bytes = vec![0; steps];
    for run in acknowledged {
        bytes[step_of(run)] += run.bytes;
    }
    let rate = |bytes: u64| bytes as f64 / f64::from(1 << 20) / STEP.as_secs_f64();
    (1..).map(|step| f64::from(step) * STEP.as_secs_f64()).zip(bytes.into_iter().map(rate)).collect()
}

/// Latency in ms at each percentile.
fn distribution(latencies: &Histogram<u64>) -> Vec<(f64, f64)> {
    let at = |percentile: u32| {
        let percentile = f64::from(percentile) / 10.0;
        (percentile, latencies.value_at_percentile(percentile) as f64 / 1000.0)
    };
    (0..=1000).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::histogram;

    fn run(at_ms: u64, bytes: u64) -> Acknowledged {
        Acknowledged { at: Duration::from_millis(at_ms), latency: Duration::from_millis(at_ms + 1), bytes }
    }

    #[test]
    fn a_plot_shows_what_was_acknowledged_when() {
        let runs = [run(10, 1 << 20), run(99, 1 << 20), run(250, 4 << 20)];
        assert_eq!(throughput(&runs), [(0.1, 20.0), (0.2, 0.0), (0.30000000000000004, 40.0)]);
        let latencies = histogram(runs.iter().map(|run| run.latency)).unwrap();
        let points = distribution(&latencies);
        assert_eq!(points.len(), 1001);
        assert!(points.is_sorted_by(|a, b| a.1 <= b.1), "latency does not fall");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.svg");
        draw(&path, &runs, &latencies).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        assert!(text.contains("MiB/s") && text.contains("percentile"));
        draw(&path, &[], &histogram([]).unwrap()).unwrap();
        assert!(draw(Path::new("/nowhere/run.svg"), &runs, &latencies).is_err());
    }
}
