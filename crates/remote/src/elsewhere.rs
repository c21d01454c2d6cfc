//! [`Elsewhere`]: the other datacenters' workers, and the engine's decision which of them is given what.
//!
//! Owned by the composition of one datacenter, and shared with its workers. What is known of the others comes from the
//! aggregator, through a watch channel that keeps the newest; if it says nothing for a while, what was known is stale, and
//! nothing is passed for want of room. It has no tasks, and nothing to stop.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use sluice_engine::ids::{DcId, Timestamp};
use sluice_engine::placement::{Ask, Choice, Placement, Standing, Standings};
use sluice_node::metrics::Metrics;
use sluice_proto::calls::{Elsewhere, Leaving, Workers};
use tokio::sync::watch;
use tokio::time::Instant;

/// For how long nothing is passed to a datacenter that could not be asked.
const SHUNNED: Duration = Duration::from_secs(2);

/// Labels of what is counted per peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabels {
    peer: String,
}

/// Another datacenter.
#[derive(Clone)]
pub struct Other {
    /// Its name, for metrics.
    pub name: String,
    /// Where clients find it.
    pub url: Option<String>,
    /// The way to its workers.
    pub workers: Option<Arc<dyn Workers>>,
}

impl fmt::Debug for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Other({})", self.name)
    }
}

/// The other datacenters, as far as they are known here.
pub struct RemoteElsewhere {
    others: BTreeMap<DcId, Other>,
    standings: watch::Receiver<Standings>,
    state: Mutex<State>,
    spilled: Family<PeerLabels, Counter>,
    spilling: Family<PeerLabels, Gauge>,
}

struct State {
    placement: Placement,
    /// Since when the newest standings are known.
    known: (Standings, Instant),
    shunned: BTreeMap<DcId, Instant>,
}

impl fmt::Debug for RemoteElsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RemoteElsewhere").field(&self.others).finish()
    }
}

impl RemoteElsewhere {
    /// These datacenters, of which `standings` tells how they are.
    pub fn new(
        others: BTreeMap<DcId, Other>,
        mut standings: watch::Receiver<Standings>,
        metrics: &Metrics,
    ) -> Self {
        let spilled: Family<PeerLabels, Counter> = Family::default();
        let spilling: Family<PeerLabels, Gauge> = Family::default();
        for other in others.values() {
            // So that they are shown from the beginning.
            let labels = PeerLabels { peer: other.name.clone() };
            spilled.get_or_create(&labels).inc_by(0);
            spilling.get_or_create(&labels).set(0);
        }
        metrics.register(|registry| {
            registry.register(
                "sluice_spill_bytes",
                "Bytes of chunks that were passed to another datacenter, or their clients sent there",
                spilled.clone(),
            );
            registry.register(
                "sluice_spilling",
                "Whether chunks are passed to another datacenter now, or their clients sent there, because this one is at a limit",
                spilling.clone(),
            );
        });
        let known = (standings.borrow_and_update().clone(), Instant::now());
        let state = State { placement: Placement::default(), known, shunned: BTreeMap::new() };
        Self { others, standings, state: Mutex::new(state), spilled, spilling }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What a panicking holder left is at worst a stripe that goes elsewhere.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the others stand, and what time it is for whoever said so.
    fn stand(&self, state: &mut State) -> (BTreeMap<DcId, Standing>, Timestamp) {
        let State { known, shunned, .. } = state;
        {
            let newest = self.standings.borrow();
            if newest.at != known.0.at {
                *known = (newest.clone(), Instant::now());
            }
        }
        let (standings, since) = known;
        let now = standings.at.plus(since.elapsed().as_millis() as u64);
        shunned.retain(|_, until| *until > Instant::now());
        let mut others = standings.others.clone();
        for (dc, standing) in &mut others {
            // To whom there is no way nothing can be given.
            let is_open = self.others.get(dc).is_some_and(|o| o.workers.is_some() || o.url.is_some());
            standing.is_reachable &= is_open && !shunned.contains_key(dc);
        }
        (others, now)
    }
}

impl Elsewhere for RemoteElsewhere {
    fn choose(&self, ask: &Ask) -> Choice {
        let mut state = self.lock();
        let (others, now) = self.stand(&mut state);
        let drain = state.known.0.drain;
        state.placement.choose(ask, drain, &others, now)
    }

    fn url(&self, dc: DcId) -> Option<String> {
        self.others.get(&dc)?.url.clone()
    }

    fn workers(&self, dc: DcId) -> Option<Arc<dyn Workers>> {
        self.others.get(&dc)?.workers.clone()
    }

    fn passed(&self, dc: DcId, bytes: u64) {
        if let Some(other) = self.others.get(&dc) {
            self.spilled.get_or_create(&PeerLabels { peer: other.name.clone() }).inc_by(bytes);
        }
    }

    fn show(&self, pressure: u16) {
        let mut state = self.lock();
        let (others, _) = self.stand(&mut state);
        let given = state.placement.passes_to(pressure, &others);
        for (dc, other) in &self.others {
            let labels = PeerLabels { peer: other.name.clone() };
            self.spilling.get_or_create(&labels).set(i64::from(given.contains(dc)));
        }
    }

    fn leaving(&self) -> Option<Leaving> {
        let (phase, target, at) = {
            let standings = self.standings.borrow();
            (standings.drain.map(|drain| drain.phase), standings.hands_over_to(), standings.at)
        };
        // Nobody has said anything before the first time.
        (at != Standings::default().at).then(|| {
            let to = target.and_then(|dc| self.url(dc));
            Leaving { phase, target, to }
        })
    }

    fn has_way_to(&self, name: &str) -> bool {
        let other = self.others.values().find(|other| other.name == name);
        other.is_some_and(|other| other.workers.is_some() || other.url.is_some())
    }

    fn failed(&self, dc: DcId) {
        tracing::warn!(%dc, "a datacenter could not take what was passed to it");
        self.lock().shunned.insert(dc, Instant::now() + SHUNNED);
    }
}
