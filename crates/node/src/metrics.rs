//! The metrics of one datacenter, by OpenTelemetry's names where there are any. A file id is never a label.
//!
//! Owned by the composition and passed to every service of the datacenter; two datacenters in one process have two.
//! A service with metrics of its own adds them with [`Metrics::register`], and what it would have to be asked for with
//! [`Metrics::before_reading`]. Read by the admin port.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::material::ClusterMaterial;

/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// How long those who are asked before metrics are read may take together: what they told last counts otherwise.
const ASKING: Duration = Duration::from_secs(2);

/// Bounds of what takes milliseconds to a minute, in seconds.
const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// Labels of [`Metrics::chunks`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ChunkLabels {
    /// The front door: `http`, `grpc`, `tus`.
    pub door: &'static str,
    /// `stored`, `known`, `provisional`, or the code of the problem.
    pub outcome: &'static str,
}

/// Labels of [`Metrics::http_requests`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HttpLabels {
    /// The pattern that matched, `none` if none did.
    pub http_route: &'static str,
    /// The method; `_OTHER` for one that is not known.
    pub http_request_method: &'static str,
    /// The status.
    pub http_response_status_code: u16,
}

/// Labels of [`Metrics::rpc_calls`], and of calls to other processes and datacenters ([`OutgoingCalls`]).
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RpcLabels {
    /// `grpc`; or `sluice`, between the processes of a datacenter and their like in others.
    pub rpc_system_name: &'static str,
    /// Service and method, `_OTHER` for one that is not known.
    pub rpc_method: &'static str,
    /// The name of the gRPC status code. Of `sluice`: `OK`, the code of the problem, `unreached` or `unknown` (nobody knows
    /// what it did), `CANCELLED` if whoever asked gave up.
    pub rpc_response_status_code: &'static str,
}

/// Labels of [`Metrics::shed`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ShedLabels {
    /// One of [`SHED_REASONS`].
    pub reason: &'static str,
}

/// What ran out when work was refused: `connections`, `requests`, `memory`, or the patience with a `handshake`, a
/// `slow-body`, or a connection or a stream that `stalled`. Each is counted from 0 on, so that its first rise is seen.
pub const SHED_REASONS: [&str; 6] =
    ["connections", "requests", "memory", "handshake", "slow-body", "stalled"];

/// Asks somebody for what metrics should say now.
type Ask = Box<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// Labels of [`Metrics::handshakes`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HandshakeLabels {
    /// `full`, or `resumed` by a ticket.
    pub kind: &'static str,
}

/// Durations of calls to other processes and datacenters. Cheap to share.
#[derive(Clone)]
pub struct OutgoingCalls(Family<RpcLabels, Histogram, MakeHistogram>);

impl fmt::Debug for OutgoingCalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OutgoingCalls")
    }
}

impl OutgoingCalls {
    /// A call of `system` that begins now. The method is one of a fixed few.
    pub fn begin(&self, system: &'static str, method: &'static str) -> OutgoingCall {
        OutgoingCall { calls: self.clone(), system, method, began: Instant::now(), outcome: "CANCELLED" }
    }
}

/// A call that is under way: counted once it is dropped, whether it ended or whoever made it gave up.
#[derive(Debug)]
pub struct OutgoingCall {
    calls: OutgoingCalls,
    system: &'static str,
    method: &'static str,
    began: Instant,
    outcome: &'static str,
}

impl OutgoingCall {
    /// Says how it ended; said again, the last counts.
    pub fn ended(&mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

impl Drop for OutgoingCall {
    fn drop(&mut self) {
        let labels = RpcLabels {
            rpc_system_name: self.system,
            rpc_method: self.method,
            rpc_response_status_code: self.outcome,
        };
        self.calls.0.get_or_create(&labels).observe(self.began.elapsed().as_secs_f64());
    }
}

/// Makes the histograms of a family.
type MakeHistogram = fn() -> Histogram;

/// The metrics of one datacenter.
pub struct Metrics {
    registry: Mutex<Registry>,
    asked: Mutex<Vec<Ask>>,
    /// Chunks that were taken or refused.
    pub chunks: Family<ChunkLabels, Counter>,
    /// Files that came whole in one request, taken or refused.
    pub whole_files: Family<ChunkLabels, Counter>,
    /// From the first byte of a run's request to its acknowledgement, in seconds.
    pub chunk_ack: Histogram,
    /// HTTP requests at the edge: seconds until the answer's head was ready.
    pub http_requests: Family<HttpLabels, Histogram, MakeHistogram>,
    /// gRPC calls at the edge: seconds until the last byte of the answer was taken, or the call was given up.
    pub rpc_calls: Family<RpcLabels, Histogram, MakeHistogram>,
    /// Calls to other processes and datacenters: seconds until their answer, or the last byte of it, was here.
    pub outgoing_calls: OutgoingCalls,
    /// Client connections that are open.
    pub connections: Gauge,
    /// Memory that budgets have granted, in bytes.
    pub memory_used: Gauge,
    /// Memory that budgets may grant, in bytes.
    pub memory_budget: Gauge,
    /// Whether the configuration was taken over when it was last read: 1, or 0.
    pub config_reloaded: Gauge,
    /// TLS handshakes with clients.
    pub handshakes: Family<HandshakeLabels, Counter>,
    /// Work that was refused to stay inside a budget.
    pub shed: Family<ShedLabels, Counter>,
    /// Chunks that did not hash to their value.
    pub integrity_failures: Counter,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// The metrics of the datacenter with this name, which labels each of them.
    pub fn new(dc: &str) -> Self {
        let mut registry = Registry::with_labels([("dc".into(), dc.to_owned().into())].into_iter());
        let seconds: MakeHistogram = || Histogram::new(SECONDS);
        let metrics = Self {
            chunks: Family::default(),
            whole_files: Family::default(),
            chunk_ack: seconds(),
            http_requests: Family::new_with_constructor(seconds),
            rpc_calls: Family::new_with_constructor(seconds),
            outgoing_calls: OutgoingCalls(Family::new_with_constructor(seconds)),
            connections: Gauge::default(),
            memory_used: Gauge::default(),
            memory_budget: Gauge::default(),
            config_reloaded: Gauge::default(),
            handshakes: Family::default(),
            shed: Family::default(),
            integrity_failures: Counter::default(),
            registry: Mutex::new(Registry::default()),
            asked: Mutex::default(),
        };
        for reason in SHED_REASONS {
            drop(metrics.shed.get_or_create(&ShedLabels { reason }));
        }
        // The encoder appends `_total` to counters and `_info` to infos.
        registry.register("sluice_chunks", "Chunks taken or refused", metrics.chunks.clone());
        registry.register(
            "sluice_whole_files",
            "Files that came whole in one request, taken or refused",
            metrics.whole_files.clone(),
        );
        registry.register(
            "sluice_chunk_ack_seconds",
            "From the request of a run, or of a whole file, to its acknowledgement",
            metrics.chunk_ack.clone(),
        );
        registry.register(
            "http_server_request_duration_seconds",
            "Duration of HTTP requests",
            metrics.http_requests.clone(),
        );
        registry.register(
            "rpc_server_call_duration_seconds",
            "Duration of gRPC calls",
            metrics.rpc_calls.clone(),
        );
        registry.register(
            "rpc_client_call_duration_seconds",
            "Duration of calls to other processes and datacenters",
            metrics.outgoing_calls.0.clone(),
        );
        registry.register("sluice_connections", "Open client connections", metrics.connections.clone());
        registry.register(
            "sluice_memory_used_bytes",
            "Memory granted by budgets",
            metrics.memory_used.clone(),
        );
        registry.register(
            "sluice_memory_budget_bytes",
            "Memory that budgets may grant",
            metrics.memory_budget.clone(),
        );
        registry.register(
            "sluice_config_last_reload_successful",
            "Whether the configuration was taken over when it was last read",
            metrics.config_reloaded.clone(),
        );
        registry.register("sluice_tls_handshakes", "TLS handshakes with clients", metrics.handshakes.clone());
        registry.register("sluice_shed", "Work refused to stay inside a budget", metrics.shed.clone());
        registry.register(
            "sluice_integrity_failures",
            "Chunks that did not hash to their value",
            metrics.integrity_failures.clone(),
        );
        registry.register(
            "sluice_build",
            "Version of the process",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        Self { registry: Mutex::new(registry), ..metrics }
    }

    /// Adds metrics of a service.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Shows the revision of the keys of `material` and when its certificates expire, as of when the metrics are read.
    pub fn show_keys(&self, material: Arc<ClusterMaterial>) {
        self.register(|registry| registry.register_collector(Box::new(Shown(material))));
    }

    /// Has `ask` brought up to date, each time before the metrics are read, what nobody counts as it changes.
    pub fn before_reading<F>(&self, ask: impl Fn() -> F + Send + Sync + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let ask: Ask = Box::new(move || Box::pin(ask()));
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(ask);
    }

    /// [`encode`](Self::encode), after those who wanted to be asked have been, for a bounded while.
    pub async fn read(&self) -> Result<String, fmt::Error> {
        let asked: Vec<_> =
            self.asked.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|ask| ask()).collect();
        if tokio::time::timeout(ASKING, join_all(asked)).await.is_err() {
            tracing::warn!("metrics are not up to date: whoever counts is busy");
        }
        self.encode()
    }

    /// Counts work that was refused.
    pub fn count_shed(&self, reason: &'static str) {
        self.shed.get_or_create(&ShedLabels { reason }).inc();
    }

    /// Counts a handshake with a client, full or resumed.
    pub fn count_handshake(&self, kind: &'static str) {
        self.handshakes.get_or_create(&HandshakeLabels { kind }).inc();
    }

    /// Counts the chunks of a request.
    pub fn count_chunks(&self, door: &'static str, outcome: &'static str, chunks: u64) {
        self.chunks.get_or_create(&ChunkLabels { door, outcome }).inc_by(chunks);
    }

    /// Counts a file that came whole.
    pub fn count_whole(&self, door: &'static str, outcome: &'static str) {
        self.whole_files.get_or_create(&ChunkLabels { door, outcome }).inc();
    }

    /// All of them, in the OpenMetrics text format ([`CONTENT_TYPE`]).
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(text)
    }
}

/// When certificates expire.
#[derive(Debug)]
struct Shown(Arc<ClusterMaterial>);

impl Collector for Shown {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let name = "sluice_key_expiry_timestamp_seconds";
        let help = "When the first certificate of a purpose expires, in seconds since 1970";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (purpose, at) in self.0.expiries() {
            let at = i64::try_from(at).unwrap_or(i64::MAX);
            ConstGauge::new(at).encode(family.encode_family(&[("purpose", purpose)])?)?;
        }
        let help = "How many steps of rotations the keys that are used have gone through";
        let revision = i64::try_from(self.0.revision()).unwrap_or(i64::MAX);
        let encoder = encoder.encode_descriptor("sluice_keys_revision", help, None, MetricType::Gauge)?;
        ConstGauge::new(revision).encode(encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn whoever_wants_to_be_asked_is_and_nobody_keeps_the_others_waiting() {
        let metrics = std::sync::Arc::new(Metrics::new("dc-a"));
        metrics.before_reading(std::future::pending);
        let told = metrics.connections.clone();
        metrics.before_reading(move || {
            let told = told.clone();
            async move {
                told.inc();
            }
        });
        for times in 1..3 {
            let text = metrics.read().await.unwrap();
            assert!(text.contains(&format!("sluice_connections{{dc=\"dc-a\"}} {times}")), "{text}");
        }
    }

    #[test]
    fn metrics_have_the_names_that_people_rely_on() {
        let metrics = Metrics::new("dc-a");
        metrics.count_chunks("http", "stored", 8);
        metrics.count_shed("memory");
        metrics.count_whole("http", "stored");
        let labels =
            HttpLabels { http_route: "/v1", http_request_method: "GET", http_response_status_code: 200 };
        metrics.http_requests.get_or_create(&labels).observe(0.1);
        let labels = RpcLabels { rpc_system_name: "grpc", rpc_method: "a/B", rpc_response_status_code: "OK" };
        metrics.rpc_calls.get_or_create(&labels).observe(0.1);
        metrics.outgoing_calls.begin("sluice", "slots/admit").ended("quota");
        drop(metrics.outgoing_calls.begin("grpc", "a/C"));
        let text = metrics.encode().unwrap();
        for line in [
            r#"sluice_chunks_total{dc="dc-a",door="http",outcome="stored"} 8"#,
            r#"sluice_whole_files_total{dc="dc-a",door="http",outcome="stored"} 1"#,
            r#"sluice_shed_total{dc="dc-a",reason="memory"} 1"#,
            r#"sluice_chunk_ack_seconds_count{dc="dc-a"} 0"#,
            r#"sluice_memory_used_bytes{dc="dc-a"} 0"#,
            r#"sluice_memory_budget_bytes{dc="dc-a"} 0"#,
            "sluice_integrity_failures_total",
            "sluice_build_info",
            r#"http_server_request_duration_seconds_count{dc="dc-a",http_route="/v1""#,
            r#"rpc_server_call_duration_seconds_count{dc="dc-a",rpc_system_name="grpc",rpc_method="a/B""#,
            r#"rpc_client_call_duration_seconds_count{dc="dc-a",rpc_system_name="sluice",rpc_method="slots/admit",rpc_response_status_code="quota"} 1"#,
            r#"rpc_client_call_duration_seconds_count{dc="dc-a",rpc_system_name="grpc",rpc_method="a/C",rpc_response_status_code="CANCELLED"} 1"#,
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }
}
