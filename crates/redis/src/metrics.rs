//! What is counted of Redis.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use sluice_node::metrics::Metrics;

/// `ok`, or why not: [`RedisError::code`](crate::RedisError::code).
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

/// The metrics of one connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct RedisMetrics {
    up: Gauge,
    connects: Family<OutcomeLabels, Counter>,
    calls: Family<OutcomeLabels, Counter>,
}

impl RedisMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        let this = Self::default();
        metrics.register(|registry| {
            registry.register("sluice_redis_up", "Whether there is a connection to Redis", this.up.clone());
            registry.register("sluice_redis_connects", "Tries to connect to Redis", this.connects.clone());
            registry.register("sluice_redis_calls", "Calls to Redis", this.calls.clone());
        });
        this
    }

    pub(crate) fn connected(&self, outcome: &'static str) {
        self.connects.get_or_create(&OutcomeLabels { outcome }).inc();
        self.up.set(i64::from(outcome == "ok"));
    }

    pub(crate) fn down(&self) {
        self.up.set(0);
    }

    pub(crate) fn called(&self, outcome: &'static str) {
        self.calls.get_or_create(&OutcomeLabels { outcome }).inc();
    }
}
