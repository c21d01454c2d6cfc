//! What an aggregator counts.

use std::collections::BTreeMap;
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
use sluice_engine::ids::{DcId, Timestamp};
use sluice_engine::ledger::FileState;
use sluice_engine::share::Share;
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

/// What nobody counts as it changes, of one share; `None` once its aggregator has ended.
type Asked = Pin<Box<dyn Future<Output = Option<Seen>> + Send>>;

type Ask = Box<dyn Fn() -> Asked + Send + Sync>;

/// What the engine tells of all files and peers of a share.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    files: Vec<(FileState, u64)>,
    damaged: usize,
    /// For how many seconds.
    assembling: f64,
    /// The phase of the drain; 0: none.
    phase: u8,
    peers: BTreeMap<DcId, SeenPeer>,
}

#[derive(Clone, Copy, Debug)]
struct SeenPeer {
    is_up: bool,
    /// For how many seconds it has acknowledged nothing.
    lag: f64,
    backlog: usize,
}

impl Seen {
    pub(crate) fn of(aggregator: &Aggregator, damaged: usize, now: Timestamp) -> Self {
        let seconds = |since: Option<Timestamp>| since.map_or(0.0, |at| now.since(at) as f64 / 1e3);
        let peer = |dc: &DcId| {
            let backlog = aggregator.backlog(*dc);
            let (lag, is_up) = (seconds(backlog.since), aggregator.is_linked(*dc));
            (*dc, SeenPeer { is_up, lag, backlog: backlog.count })
        };
        Self {
            files: aggregator.counts().collect(),
            damaged,
            assembling: seconds(aggregator.assembling_since()),
            phase: aggregator.drain().map_or(0, |drain| drain.phase as u8),
            peers: aggregator.config().peers.iter().map(peer).collect(),
        }
    }
}

/// The metrics of the aggregators of a process: of each share that it has, and of whichever follows in that.
pub struct AggregatorMetrics {
    commands: Family<CommandLabels, Counter>,
    shares: Gauge,
    shares_configured: Gauge,
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
    damaged_files: Gauge,
    pub(crate) reincarnations: Counter,
    drain_phase: Gauge,
    pub(crate) calls: OutgoingCalls,
    /// Asks the aggregator of each share that runs now.
    asks: Mutex<BTreeMap<Share, Ask>>,
}

impl fmt::Debug for AggregatorMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AggregatorMetrics({:?})", self.traffic())
    }
}

impl AggregatorMetrics {
    /// Shown among `metrics`.
    pub fn new(metrics: &Metrics, me: DcId, material: &Arc<ClusterMaterial>) -> Arc<Self> {
        let this = Self {
            commands: Family::default(),
            shares: Gauge::default(),
            shares_configured: Gauge::default(),
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
            asks: Mutex::default(),
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
                "Times that the scrub read everything that is stored of a share",
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
            registry.register(
                "sluice_shares",
                "Shares of the datacenter's slots that this process has",
                this.shares.clone(),
            );
            registry.register(
                "sluice_shares_configured",
                "Shares that every datacenter of the cluster divides its slots into",
                this.shares_configured.clone(),
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
        this.show(me, material, &[]);
        let (shown, material) = (Arc::downgrade(&this), material.clone());
        metrics.before_reading(move || {
            let (shown, material) = (shown.clone(), material.clone());
            async move {
                let Some(shown) = shown.upgrade() else { return };
                let asked: Vec<Asked> = {
                    let asks = shown.asks.lock().unwrap_or_else(PoisonError::into_inner);
                    asks.values().map(|ask| ask()).collect()
                };
                let seen = futures_util::future::join_all(asked).await;
                let seen: Vec<Seen> = seen.into_iter().flatten().collect();
                shown.show(me, &material, &seen);
            }
        });
        this
    }

    /// Has `ask` asked for what nobody counts as it changes, whenever metrics are read; instead of what was asked before of
    /// this share.
    pub(crate) fn before_reading<F>(&self, share: Share, ask: impl Fn() -> F + Send + Sync + 'static)
    where
        F: Future<Output = Option<Seen>> + Send + 'static,
    {
        let ask: Ask = Box::new(move || Box::pin(ask()));
        self.asks.lock().unwrap_or_else(PoisonError::into_inner).insert(share, ask);
    }

    /// Shows what was seen of each share, together: a peer is up if none misses it, and as late as it is for the worst.
    fn show(&self, me: DcId, material: &ClusterMaterial, seen: &[Seen]) {
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let states = [
            FileState::Receiving,
            FileState::Complete,
            FileState::Assembled,
            FileState::Conflict,
            FileState::Dropped,
        ];
        self.drain_phase.set(seen.iter().map(|seen| i64::from(seen.phase)).max().unwrap_or(0));
        // Those of a share that has gone elsewhere are shown there.
        let mut files: BTreeMap<&'static str, u64> = states.map(|at| (state(at).name(), 0)).into();
        for (at, count) in seen.iter().flat_map(|seen| &seen.files) {
            *files.entry(state(*at).name()).or_default() += count;
        }
        for (state, count) in files {
            self.files.get_or_create(&StateLabels { state }).set(number(count));
        }
        self.shares.set(number(seen.len() as u64));
        self.shares_configured.set(i64::from(material.shares().count()));
        self.damaged_files.set(number(seen.iter().map(|seen| seen.damaged as u64).sum()));
        self.assembly_lag.set(seen.iter().map(|seen| seen.assembling).fold(0.0, f64::max));
        if seen.is_empty() {
            // Whoever stands by speaks with nobody, and that is as it should be.
            self.peer_up.clear();
            self.peer_lag.clear();
            self.peer_backlog.clear();
            return;
        }
        for (dc, name) in material.dcs().filter(|(dc, _)| *dc != me) {
            let labels = PeerLabels { peer: name.to_owned() };
            let peers = || seen.iter().filter_map(move |seen| seen.peers.get(&dc));
            let is_up = peers().all(|peer| peer.is_up);
            self.peer_up.get_or_create(&labels).set(i64::from(is_up));
            self.peer_lag.get_or_create(&labels).set(peers().map(|peer| peer.lag).fold(0.0, f64::max));
            let backlog = peers().map(|peer| peer.backlog as u64).sum();
            self.peer_backlog.get_or_create(&labels).set(number(backlog));
        }
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
