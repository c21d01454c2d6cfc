//! What an aggregator counts.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use sluice_engine::aggregator::Aggregator;
use sluice_engine::command::Kind;
use sluice_engine::ids::Timestamp;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::{Metrics, OutgoingCalls};

use crate::status::state;

/// What went between datacenters, as one of them counted it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Commands sent.
    pub commands_sent: u64,
    /// Their bytes.
    pub command_bytes_sent: u64,
    /// Bytes of chunks that were pulled from other datacenters.
    pub pulled_bytes: u64,
    /// Bytes of chunks that were given to other datacenters.
    pub served_bytes: u64,
}

/// Labels of `sluice_commands_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CommandLabels {
    kind: &'static str,
    direction: &'static str,
    outcome: &'static str,
}

/// Labels of what is counted per peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabels {
    peer: String,
}

/// Labels of `sluice_files`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

type Seconds = Gauge<f64, AtomicU64>;

/// Brings up to date what nobody counts as it changes.
type Ask = Box<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// The metrics of an aggregator, and of whichever follows it in its process.
pub struct AggregatorMetrics {
    commands: Family<CommandLabels, Counter>,
    peer_up: Family<PeerLabels, Gauge>,
    peer_lag: Family<PeerLabels, Seconds>,
    peer_backlog: Family<PeerLabels, Gauge>,
    files: Family<StateLabels, Gauge>,
    assembly_lag: Seconds,
    commands_sent: AtomicU64,
    pub(crate) pulled_bytes: Counter,
    pub(crate) served_bytes: Counter,
    pub(crate) integrity_failures: Counter,
    scrub_bytes: Counter,
    pub(crate) scrub_passes: Counter,
    pub(crate) damaged_files: Gauge,
    pub(crate) reincarnations: Counter,
    pub(crate) drain_phase: Gauge,
    pub(crate) calls: OutgoingCalls,
    /// Asks the aggregator that runs now.
    ask: Mutex<Option<Ask>>,
}

impl fmt::Debug for AggregatorMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AggregatorMetrics({:?})", self.traffic())
    }
}

impl AggregatorMetrics {
    /// Shown among `metrics`.
    pub fn new(metrics: &Metrics) -> Arc<Self> {
        let this = Self {
            commands: Family::default(),
            peer_up: Family::default(),
            peer_lag: Family::default(),
            peer_backlog: Family::default(),
            files: Family::default(),
            assembly_lag: Seconds::default(),
            commands_sent: AtomicU64::new(0),
            pulled_bytes: Counter::default(),
            served_bytes: Counter::default(),
            integrity_failures: metrics.integrity_failures.clone(),
            scrub_bytes: Counter::default(),
            scrub_passes: Counter::default(),
            damaged_files: Gauge::default(),
            reincarnations: Counter::default(),
            ask: Mutex::default(),
            drain_phase: Gauge::default(),
            calls: metrics.outgoing_calls.clone(),
        };
        metrics.register(|registry| {
            registry.register("sluice_commands", "Commands between datacenters", this.commands.clone());
            registry.register(
                "sluice_scrub_bytes",
                "Bytes that the scrub read again",
                this.scrub_bytes.clone(),
            );
            registry.register(
                "sluice_scrub_passes",
                "Times that the scrub read everything that is stored",
                this.scrub_passes.clone(),
            );
            registry.register(
                "sluice_damaged_files",
                "Files of which chunks are known to be damaged",
                this.damaged_files.clone(),
            );
            registry.register(
                "sluice_pulled_bytes",
                "Bytes of chunks that came from other datacenters",
                this.pulled_bytes.clone(),
            );
            registry.register(
                "sluice_served_bytes",
                "Bytes of chunks that went to other datacenters",
                this.served_bytes.clone(),
            );
            registry.register(
                "sluice_reincarnations",
                "Times that this process began again as a new incarnation: its disk is older than what a peer has heard of it",
                this.reincarnations.clone(),
            );
            registry.register(
                "sluice_drain_phase",
                "How far this datacenter hands its work over: 0 not, 1 data, 2 sessions, 3 channels",
                this.drain_phase.clone(),
            );
            registry.register("sluice_peer_up", "Whether a peer can be reached", this.peer_up.clone());
            registry.register(
                "sluice_peer_lag_seconds",
                "How long a peer has acknowledged nothing, though something waits for that; 0 if nothing does",
                this.peer_lag.clone(),
            );
            registry.register(
                "sluice_peer_backlog",
                "Commands that a peer has not acknowledged, and files of which it must still be told",
                this.peer_backlog.clone(),
            );
            registry.register("sluice_files", "Files that are known here, by where they stand", this.files.clone());
            registry.register(
                "sluice_assembly_lag_seconds",
                "How long the file that waits longest has been complete without being assembled here, its home",
                this.assembly_lag.clone(),
            );
        });
        let this = Arc::new(this);
        let shown = Arc::downgrade(&this);
        metrics.before_reading(move || {
            let asked = shown.upgrade().and_then(|shown| {
                let ask = shown.ask.lock().unwrap_or_else(PoisonError::into_inner);
                ask.as_ref().map(|ask| ask())
            });
            async move {
                if let Some(asked) = asked {
                    asked.await;
                }
            }
        });
        this
    }

    /// Has `ask` brought up to date, before the metrics are read, what nobody counts as it changes; instead of what was
    /// asked before.
    pub(crate) fn before_reading<F>(&self, ask: impl Fn() -> F + Send + Sync + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let ask: Ask = Box::new(move || Box::pin(ask()));
        *self.ask.lock().unwrap_or_else(PoisonError::into_inner) = Some(ask);
    }

    /// Shows what the engine tells of all files and peers.
    pub(crate) fn show(&self, aggregator: &Aggregator, material: &ClusterMaterial, now: Timestamp) {
        let seconds = |since: Option<Timestamp>| since.map_or(0.0, |at| now.since(at) as f64 / 1e3);
        for (at, count) in aggregator.counts() {
            let state = state(at).name();
            self.files.get_or_create(&StateLabels { state }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.assembly_lag.set(seconds(aggregator.assembling_since()));
        for (dc, name) in material.dcs().filter(|(dc, _)| *dc != aggregator.config().me) {
            let labels = PeerLabels { peer: name.to_owned() };
            let backlog = aggregator.backlog(dc);
            self.peer_lag.get_or_create(&labels).set(seconds(backlog.since));
            self.peer_backlog.get_or_create(&labels).set(i64::try_from(backlog.count).unwrap_or(i64::MAX));
        }
    }

    pub(crate) fn set_peer(&self, name: &str, up: bool) {
        self.peer_up.get_or_create(&PeerLabels { peer: name.to_owned() }).set(i64::from(up));
    }

    pub(crate) fn scrubbed(&self, bytes: u64) {
        self.scrub_bytes.inc_by(bytes);
    }

    pub(crate) fn sent(&self, kind: Kind, outcome: &'static str) {
        if outcome == "sent" {
            self.commands_sent.fetch_add(1, Relaxed);
        }
        let labels = CommandLabels { kind: kind.name(), direction: "sent", outcome };
        self.commands.get_or_create(&labels).inc();
    }

    pub(crate) fn received(&self, kind: &'static str, outcome: &'static str) {
        self.commands.get_or_create(&CommandLabels { kind, direction: "received", outcome }).inc();
    }

    pub(crate) fn traffic(&self) -> Traffic {
        let commands_sent = self.commands_sent.load(Relaxed);
        Traffic {
            commands_sent,
            command_bytes_sent: commands_sent * sluice_engine::command::COMMAND_LEN as u64,
            pulled_bytes: self.pulled_bytes.get(),
            served_bytes: self.served_bytes.get(),
        }
    }
}
