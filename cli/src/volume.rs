//! What metrics tell of a volume: asked of the store each time they are read.

use std::fmt;
use std::sync::{Arc, Weak};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use sluice_node::metrics::Metrics;
use sluice_store::{ChunkStore as _, FsStore, SYNC_BOUNDS};

/// Has `metrics` tell of this volume, for as long as it is open.
pub(crate) fn show(store: &Arc<FsStore>, metrics: &Metrics) {
    let volume = Volume(Arc::downgrade(store));
    metrics.register(|registry| registry.register_collector(Box::new(volume)));
}

#[derive(Debug)]
struct Volume(Weak<FsStore>);

impl Collector for Volume {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(store) = self.0.upgrade() else { return Ok(()) };
        let (counted, usage) = (store.metrics(), store.usage());
        let mut tell = |name, help, value: &dyn EncodeMetric| {
            value.encode(encoder.encode_descriptor(name, help, None, value.metric_type())?)
        };
        let gauge = |value: u64| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        tell(
            "sluice_volume_readonly",
            "Whether the volume refuses every write",
            &gauge(usage.read_only.into()),
        )?;
        tell(
            "sluice_volume_free_bytes",
            "Bytes that can be written before uploads are refused",
            &gauge(usage.free),
        )?;
        tell(
            "sluice_store_written_bytes",
            "Bytes of chunks written",
            &ConstCounter::new(counted.bytes_written),
        )?;
        tell(
            "sluice_store_sync_seconds",
            "How long syncs of files and directories took",
            &Syncs { seconds: counted.sync_time.as_secs_f64(), times: counted.sync_times },
        )
    }
}

/// Syncs by how long they took.
struct Syncs {
    seconds: f64,
    times: [u64; SYNC_BOUNDS.len() + 1],
}

impl EncodeMetric for Syncs {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let bounds = SYNC_BOUNDS.iter().map(|micros| *micros as f64 / 1e6).chain([f64::INFINITY]);
        let times: Vec<(f64, u64)> = bounds.zip(self.times).collect();
        encoder.encode_histogram::<NoLabelSet>(self.seconds, self.times.iter().sum(), &times, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}
