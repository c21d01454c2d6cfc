//! One measurement: what a stretch of work took, and cost the server and the machine.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::accounting::{CpuTime, Spent};

/// What a stretch of work took.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Cost {
    pub(crate) wall_s: f64,
    /// Processor time of the server and its children.
    pub(crate) server: CpuTime,
    /// Processor time of everything on the machine, the client and strangers included.
    pub(crate) machine: CpuTime,
}

/// A measurement that has begun.
pub(crate) struct Begun {
    pid: u32,
    at: Instant,
    before: Spent,
}

impl Begun {
    /// Begins to measure what the process `pid` and its children spend.
    pub(crate) fn now(pid: u32) -> anyhow::Result<Self> {
        Ok(Self { pid, before: Spent::until_now(pid)?, at: Instant::now() })
    }

    /// How long ago that was.
    pub(crate) fn elapsed(&self) -> Duration {
        self.at.elapsed()
    }

    pub(crate) fn end(self) -> anyhow::Result<Cost> {
        let wall_s = self.at.elapsed().as_secs_f64();
        let Spent { server, machine } = Spent::until_now(self.pid)?.since(self.before);
        Ok(Cost { wall_s, server, machine })
    }
}

/// Latencies, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

/// Latencies as a histogram in microseconds, good to three digits.
pub(crate) fn histogram(latencies: impl IntoIterator<Item = Duration>) -> anyhow::Result<Histogram<u64>> {
    let mut histogram = Histogram::new(3)?;
    for latency in latencies {
        histogram.record(u64::try_from(latency.as_micros())?)?;
    }
    Ok(histogram)
}

impl Percentiles {
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        Self {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: histogram.max() as f64 / 1000.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_milliseconds() {
        let histogram = histogram((1..=1000).map(Duration::from_millis)).unwrap();
        let percentiles = Percentiles::of(&histogram);
        for (got, expected) in [
            (percentiles.p50, 500.0),
            (percentiles.p90, 900.0),
            (percentiles.p99, 990.0),
            (percentiles.max, 1000.0),
        ] {
            assert!((got - expected).abs() <= expected / 500.0, "{got} for {expected}");
        }
    }
}
