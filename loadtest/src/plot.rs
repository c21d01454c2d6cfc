//! The plot of a run, as SVG: how fast bytes went in, and how long acknowledgements took.

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
    title: &str,
    acknowledged: &[Acknowledged],
    latencies: &Histogram<u64>,
) -> anyhow::Result<()> {
    // The library's errors name types that cannot leave this function.
    attempt(path, title, acknowledged, latencies)
        .map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn attempt(
    path: &Path,
    title: &str,
    acknowledged: &[Acknowledged],
    latencies: &Histogram<u64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let area = area.titled(title, ("sans-serif", 20))?;
    let (upper, lower) = area.split_vertically((SIZE.1 - 24) / 2);

    let rates = throughput(acknowledged);
    let end = rates.last().map_or(1.0, |(at, _)| *at);
    let most = rates.iter().map(|(_, rate)| *rate).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&upper)
        .caption(
            "throughput: each run's bytes, spread over the time until its acknowledgement",
            ("sans-serif", 15),
        )
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..end, 0.0..most * 1.1)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("seconds")
        .y_desc("MiB/s")
        .y_label_formatter(&|rate| format!("{rate:.0}"))
        .draw()?;
    chart.draw_series(LineSeries::new(rates, &BLUE))?;

    let points = distribution(latencies);
    let most = points.iter().map(|(_, ms)| *ms).fold(0.001, f64::max);
    let mut chart = ChartBuilder::on(&lower)
        .caption("acknowledgement latency by percentile", ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..100.0, 0.0..most * 1.1)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("percentile")
        .x_label_formatter(&|percentile| format!("{percentile:.0}"))
        .y_desc("ms")
        .draw()?;
    chart.draw_series(LineSeries::new(points, &RED))?;
    area.present()?;
    Ok(())
}

/// MiB/s in each step, at the step's middle in seconds. Runs are acknowledged at once, and were under way a while: their
/// bytes are spread over it, or there would be peaks where runs end and nothing between them.
fn throughput(acknowledged: &[Acknowledged]) -> Vec<(f64, f64)> {
    let step = STEP.as_secs_f64();
    let steps =
        acknowledged.iter().map(|run| (run.at.as_secs_f64() / step).ceil() as usize).max().unwrap_or(0);
    let mut bytes = vec![0.0; steps];
    for run in acknowledged {
        let (from, until) = (run.at.saturating_sub(run.latency).as_secs_f64(), run.at.as_secs_f64());
        let time = (until - from).max(f64::EPSILON);
        for (nth, bytes) in bytes.iter_mut().enumerate().skip((from / step) as usize) {
            let (begin, end) = (nth as f64 * step, (nth + 1) as f64 * step);
            if begin >= until {
                break;
            }
            *bytes += run.bytes as f64 * (end.min(until) - begin.max(from)) / time;
        }
    }
    let rate = |bytes: f64| bytes / f64::from(1 << 20) / step;
    bytes.into_iter().enumerate().map(|(nth, bytes)| ((nth as f64 + 0.5) * step, rate(bytes))).collect()
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

    fn run(from_ms: u64, at_ms: u64, bytes: u64) -> Acknowledged {
        let (from, at) = (Duration::from_millis(from_ms), Duration::from_millis(at_ms));
        Acknowledged { at, latency: at - from, bytes }
    }

    #[test]
    fn a_plot_shows_what_was_under_way_when() {
        let runs = [run(0, 100, 1 << 20), run(50, 100, 1 << 20), run(150, 350, 4 << 20)];
        let rates: Vec<String> =
            throughput(&runs).iter().map(|(at, rate)| format!("{at:.2}: {rate:.1}")).collect();
        assert_eq!(rates, ["0.05: 20.0", "0.15: 10.0", "0.25: 20.0", "0.35: 10.0"]);
        let sum: f64 = throughput(&runs).iter().map(|(_, rate)| rate * 0.1).sum();
        assert!((sum - 6.0).abs() < 1e-6, "no byte is lost: {sum}");
        let latencies = histogram(runs.iter().map(|run| run.latency)).unwrap();
        let points = distribution(&latencies);
        assert_eq!(points.len(), 1001);
        assert!(points.is_sorted_by(|a, b| a.1 <= b.1), "latency does not fall");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.svg");
        draw(&path, "two runs", &runs, &latencies).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        assert!(text.contains("MiB/s") && text.contains("percentile") && text.contains("two runs"));
        draw(&path, "nothing", &[], &histogram([]).unwrap()).unwrap();
        assert!(draw(Path::new("/nowhere/run.svg"), "nowhere", &runs, &latencies).is_err());
    }
}
