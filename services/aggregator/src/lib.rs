//! The aggregator of a datacenter: it owns the ledgers of its files, links to the other datacenters, sees when a file
//! is whole, and reassembles the files whose home is here.
//!
//! Contract:
//! 1. Decisions are the engine's. `ledgers.rs` is one task that feeds it events and applies its effects in order;
//!    what must be durable is, before anything later is said.
//! 2. `links.rs` carries signed commands to each peer over mutual TLS, and `door.rs` answers peers. A command counts
//!    only if its form, destination, sender, key and signature hold. One aggregator is about one share of the slots, and
//!    speaks with those of the same share elsewhere; `divided.rs` makes one of all of them for whoever asks.
//! 3. `carry.rs` carries out effects that take time: fetching records, pulling, publishing. Everything that comes
//!    from a peer is verified before it is stored or given on (`bulk.rs`, `locate.rs`).
//! 4. `slots.rs` is what workers ask: every request is verified against its session context here again (G4).
//!    `tenants.rs` is what who runs the cluster asks, verified the same way.
//! 5. All tasks belong to the datacenter's `Shutdown`; a kill drops them at once, and nothing acknowledged is lost.
//! 6. `scrub.rs` reads everything that is stored again, slowly, and mends what is damaged.
//! 7. Ledgers are caches: after a start they are made anew from the chunk store (`load.rs`, G5), while requests are
//!    served. Of files of which nothing is left to be done none is kept.

mod bulk;
mod carry;
mod catalogue;
mod divided;
mod door;
mod drain;
mod ledgers;
mod links;
mod load;
mod locate;
mod metrics;
mod refusal;
mod scrub;
mod slots;
mod standing;
mod status;
mod tenants;
mod traces;
mod usage;
mod whole;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sluice_engine::aggregator::{Aggregator, Config, NodeMemory};
use sluice_engine::ids::{DcId, Timestamp};
use sluice_engine::placement::{Loads, Standings};
use sluice_engine::revocations::Revoked;
use sluice_engine::share::Share;
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::clock::SharedClock;
use sluice_node::material::{ClusterMaterial, MaterialError};
use sluice_node::rate::ScrubRate;
use sluice_node::seldom::Seldom;
use sluice_node::shutdown::Shutdown;
use sluice_node::tls::TlsError;
use sluice_proto::calls::Leaving;
use sluice_store::{ChunkStore, StoreError};
use tokio::time::Instant;

pub use divided::{Divided, SharePart};
pub use door::{Listener, PeerPort};
pub use metrics::{AggregatorMetrics, Traffic};

use crate::catalogue::Catalogue;
use crate::ledgers::Ledgers;
use crate::metrics::Seen;

/// What an aggregator is made of.
#[derive(Clone)]
pub struct AggregatorParts {
    /// This datacenter.
    pub dc: DcId,
    /// Whose files it is about.
    pub share: Share,
    /// Certificates and keys.
    pub material: Arc<ClusterMaterial>,
    /// The datacenter's chunk store.
    pub store: Arc<dyn ChunkStore>,
    /// Verifies session contexts.
    pub access: Arc<ContextVerifier>,
    /// What is revoked, for all services of the datacenter; the aggregator feeds it.
    pub revocations: Revocations,
    /// What it counts: one for all aggregators of a process.
    pub metrics: Arc<AggregatorMetrics>,
    /// The clock of the datacenter.
    pub clock: SharedClock,
    /// Owns the aggregator's tasks.
    pub tasks: Shutdown,
    /// Bytes a second at which all shares together read again what is stored.
    pub scrub_rate: ScrubRate,
    /// Times and limits.
    pub settings: AggregatorSettings,
}

/// Times and limits of the aggregators of a datacenter. Each share has its part of the files
/// without metadata and of the scrub's rate; all else is for each.
#[derive(Clone, Copy, Debug)]
pub struct AggregatorSettings {
    /// How long every datacenter must say UNKNOWN before chunks without metadata go.
    pub orphan_grace: Duration,
    /// After how long the home of an unfinished file is taken over when it cannot be reached; `None`: never by itself.
    pub takeover_after: Option<Duration>,
    /// After how long what only an unreachable datacenter has counts as missing.
    pub absent_after: Duration,
    /// How often all that is known is compared with each peer.
    pub compare_every: Duration,
    /// How long a call to a peer may take before its first answer.
    pub call_timeout: Duration,
    /// How long a peer may take nothing of the chunks that it asked for.
    pub stall: Duration,
    /// Files without metadata that one tenant may have here.
    pub provisional_files: usize,
    /// Chunks of files without metadata that one tenant may have here.
    pub provisional_chunks: u64,
    /// Bytes a second at which what is stored is read again, to begin with; 0: never.
    pub scrub_rate: u64,
    /// How long after the beginning of one pass over all that is stored the next may begin.
    pub scrub_every: Duration,
    /// How often it is tried to mend what is known to be damaged, and kept how far the scrub has come.
    pub mend_every: Duration,
}

impl AggregatorSettings {
    /// Those of one share.
    fn of(self, share: Share) -> Self {
        let count = share.of().count();
        Self {
            // Chunks are not divided: those of one file are in one share.
            provisional_files: self.provisional_files.div_ceil(count as usize),
            ..self
        }
    }
}

impl Default for AggregatorSettings {
    fn default() -> Self {
        Self {
            orphan_grace: Duration::from_secs(3600),
            takeover_after: Some(Duration::from_secs(600)),
            absent_after: Duration::from_secs(60),
            compare_every: Duration::from_secs(30),
            call_timeout: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            provisional_files: 1_000,
            provisional_chunks: 65_536,
            scrub_rate: 8 << 20,
            scrub_every: Duration::from_secs(86_400),
            mend_every: Duration::from_secs(30),
        }
    }
}

/// Where another datacenter is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// Which.
    pub dc: DcId,
    /// `host:port` of its port for peers, or several with commas between them.
    pub address: String,
    /// Where its edges answer clients.
    pub edge_url: Option<String>,
}

/// Why an aggregator does not start.
#[derive(Debug, thiserror::Error)]
pub enum AggregatorError {
    /// The port for peers is taken.
    #[error("port {address} is in use")]
    Busy {
        /// The address.
        address: SocketAddr,
    },
    /// The port for peers cannot be opened.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// Keys or certificates are missing.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What the store remembers cannot be read.
    #[error("the store holds what this version does not understand: {0}")]
    Memory(#[from] sluice_engine::aggregator::MemoryError),
    /// A peer that the cluster does not know, or this datacenter itself.
    #[error("{0} is no other datacenter of this cluster")]
    Peer(DcId),
    /// The tasks were stopped before the aggregator had started.
    #[error("stopped while starting")]
    Stopped,
}

/// The aggregator of one datacenter, running. Cheap to share; its tasks end with [`AggregatorParts::tasks`].
pub struct AggregatorService {
    pub(crate) parts: AggregatorParts,
    pub(crate) ledgers: Ledgers,
    pub(crate) links: links::Links,
    pub(crate) speakers: door::Speakers,
    /// Whose commands were refused, and why: by the name of the error, or of the kind that its peer should not have said.
    pub(crate) refused: Seldom<(DcId, &'static str)>,
    pub(crate) catalogue: Arc<Catalogue>,
    pub(crate) usage: usage::Usage,
    pub(crate) metrics: Arc<AggregatorMetrics>,
    pub(crate) units: Arc<locate::Units>,
    /// Under which traces chunks came.
    pub(crate) traces: traces::Traces,
    pub(crate) pulls: Arc<tokio::sync::Semaphore>,
    /// Streams of chunks that peers are served.
    pub(crate) served: Arc<tokio::sync::Semaphore>,
    pub(crate) edge_url: Option<String>,
    /// Files of which chunks were known to be damaged when that was last looked at.
    pub(crate) damaged: std::sync::atomic::AtomicUsize,
    /// What time it is for the engine.
    pub(crate) now: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    /// What the workers of this datacenter said last.
    pub(crate) loads: Mutex<Loads>,
    pub(crate) standings: tokio::sync::watch::Sender<Standings>,
    pub(crate) leaving: tokio::sync::watch::Sender<Leaving>,
    /// Whether all files of the store are known.
    pub(crate) loaded: tokio::sync::watch::Sender<bool>,
    /// Itself, for the tasks that calls spawn.
    pub(crate) this: std::sync::Weak<AggregatorService>,
}

/// Starts the aggregator of a share: answers peers at `port`, dials them, and loads the files of the store meanwhile. It
/// serves at once: what a request needs is loaded before its turn.
pub async fn start(
    parts: AggregatorParts,
    port: &PeerPort,
    edge_url: Option<String>,
    peers: Vec<PeerAddress>,
) -> Result<Arc<AggregatorService>, AggregatorError> {
    let (me, share) = (parts.dc, parts.share);
    let parts = AggregatorParts { settings: parts.settings.of(share), ..parts };
    for peer in &peers {
        if peer.dc == me || parts.material.dc_name(peer.dc).is_none() {
            return Err(AggregatorError::Peer(peer.dc));
        }
    }
    let metrics = parts.metrics.clone();
    let links = links::Links::new(&parts, &peers, metrics.clone())?;

    let began = Instant::now();
    let offset = parts.clock.now();
    let now = move || Timestamp::new(offset.number() + began.elapsed().as_millis() as u64);
    let memory = remembered(&parts).await?;
    let millis = |duration: Duration| duration.as_millis() as u64;
    let config = Config {
        orphan_grace_ms: millis(parts.settings.orphan_grace),
        takeover_ms: parts.settings.takeover_after.map(millis),
        share,
        absent_ms: millis(parts.settings.absent_after),
        compare_ms: millis(parts.settings.compare_every),
        ..Config::new(me, parts.material.dcs().map(|(dc, _)| dc))
    };
    let (aggregator, effects) = Aggregator::start(config, memory, now());
    let catalogue = Arc::new(Catalogue::default());
    let (ledgers, inputs) = ledgers::channel();
    let service = Arc::new_cyclic(|this| AggregatorService {
        this: this.clone(),
        links,
        speakers: door::Speakers::default(),
        refused: Seldom::default(),
        ledgers,
        catalogue,
        usage: usage::Usage::default(),
        metrics,
        units: port.units(),
        traces: traces::Traces::default(),
        pulls: port.pulls(),
        served: Arc::new(tokio::sync::Semaphore::new(door::MAX_SERVED)),
        edge_url,
        damaged: std::sync::atomic::AtomicUsize::new(0),
        now: Arc::new(now),
        loads: Mutex::default(),
        standings: tokio::sync::watch::Sender::new(Standings::default()),
        leaving: tokio::sync::watch::Sender::new(Leaving::default()),
        loaded: tokio::sync::watch::Sender::new(false),
        parts: parts.clone(),
    });
    let observed = Arc::downgrade(&service);
    parts.metrics.before_reading(share, move || {
        let service = observed.upgrade();
        async move {
            // Nobody answers once it has stopped.
            let service = service?;
            let damaged = service.damaged.load(std::sync::atomic::Ordering::Relaxed);
            service.ledgers.ask(move |aggregator| Seen::of(aggregator, damaged, now())).await.ok()
        }
    });
    let task = ledgers::LedgerTask::new(aggregator, inputs, service.clone(), Box::new(now));
    let task = task.begin(effects).await?;
    parts.tasks.spawn(task.run());
    parts.tasks.spawn(load::load_all(service.clone()));
    port.add(&service);
    links::dial_all(&service);
    service.parts.tasks.spawn(scrub::run(service.clone()));
    Ok(service)
}

/// What a share begins with. Where slots were divided otherwise before, what was said of its files was said by others.
async fn remembered(parts: &AggregatorParts) -> Result<NodeMemory, AggregatorError> {
    let (mut own, mut others) = (NodeMemory::default(), Vec::new());
    for (share, state) in parts.store.states().await? {
        let mut memory = NodeMemory::from_bytes(&state)?;
        // The first share remembers what is revoked, for all of them.
        memory.revoked.iter().for_each(|revocation| {
            parts.revocations.apply(revocation);
        });
        if !parts.share.is_first() {
            memory.revoked = Revoked::default();
        }
        if share == parts.share {
            own = memory;
        } else if share.overlaps(parts.share) {
            others.push(memory);
        }
    }
    Ok(own.succeeding(others))
}

impl AggregatorService {
    /// What went between datacenters since the start.
    pub fn traffic(&self) -> Traffic {
        self.metrics.traffic()
    }

    /// The name of a datacenter.
    pub(crate) fn dc_name(&self, dc: DcId) -> String {
        self.parts.material.dc_name(dc).map_or_else(|| dc.to_string(), str::to_owned)
    }
}
