//! What metrics tell of a bucket: asked of the store each time they are read.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use sluice_node::metrics::Metrics;
use sluice_store::{S3Metrics, S3Request};

/// Has `metrics` tell what `counted` says of a bucket, for as long as it is open.
pub(crate) fn show(metrics: &Metrics, counted: impl Fn() -> Option<S3Metrics> + Send + Sync + 'static) {
    let bucket = Bucket(Box::new(counted));
    metrics.register(|registry| registry.register_collector(Box::new(bucket)));
}

struct Bucket(Box<dyn Fn() -> Option<S3Metrics> + Send + Sync>);

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bucket")
    }
}

impl Collector for Bucket {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(counted) = (self.0)() else { return Ok(()) };
        let help = "Requests to the bucket, each attempt counted";
        let mut requests =
            encoder.encode_descriptor("sluice_bucket_requests", help, None, MetricType::Counter)?;
        for kind in S3Request::ALL {
            let labels = [("request", kind.name())];
            ConstCounter::new(counted.requests(kind)).encode(requests.encode_family(&labels)?)?;
        }
        for (name, help, value) in [
            ("sluice_bucket_retries", "Attempts of requests after the first", counted.retries),
            ("sluice_bucket_slow_downs", "Times that the server asked to be spared", counted.slow_downs),
            (
                "sluice_bucket_unknown",
                "Requests of which it is not known whether they were done",
                counted.unknown,
            ),
            ("sluice_bucket_sent_bytes", "Bytes sent in bodies", counted.bytes_sent),
            ("sluice_bucket_received_bytes", "Bytes received in bodies", counted.bytes_received),
            ("sluice_bucket_swept", "Objects and uploads removed that nobody referred to", counted.swept),
            (
                "sluice_bucket_integrity_failures",
                "Times that bytes did not match their value, or objects contradicted each other",
                counted.integrity_failures,
            ),
        ] {
            let value = ConstCounter::new(value);
            value.encode(encoder.encode_descriptor(name, help, None, value.metric_type())?)?;
        }
        Ok(())
    }
}
