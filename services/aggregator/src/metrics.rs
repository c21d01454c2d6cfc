//! What an aggregator counts.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use sluice_engine::command::Kind;
use sluice_engine::ids::DcId;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;

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

/// The aggregator's metrics.
pub(crate) struct AggregatorMetrics {
    commands: Family<CommandLabels, Counter>,
    peer_up: Family<PeerLabels, Gauge>,
    commands_sent: AtomicU64,
    pub(crate) pulled_bytes: Counter,
    pub(crate) served_bytes: AtomicU64,
    pub(crate) integrity_failures: Counter,
    scrub_bytes: Counter,
    pub(crate) scrub_passes: Counter,
    pub(crate) damaged_files: Gauge,
}

impl AggregatorMetrics {
    pub(crate) fn new(metrics: &Metrics, material: &ClusterMaterial, me: DcId) -> Self {
        let this = Self {
            commands: Family::default(),
            peer_up: Family::default(),
            commands_sent: AtomicU64::new(0),
            pulled_bytes: Counter::default(),
            served_bytes: AtomicU64::new(0),
            integrity_failures: metrics.integrity_failures.clone(),
            scrub_bytes: Counter::default(),
            scrub_passes: Counter::default(),
            damaged_files: Gauge::default(),
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
            registry.register("sluice_peer_up", "Whether a peer can be reached", this.peer_up.clone());
        });
        for (dc, name) in material.dcs() {
            if dc != me {
                this.set_peer(name, false);
            }
        }
        this
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
            served_bytes: self.served_bytes.load(Relaxed),
        }
    }
}
