//! How this datacenter and the others stand: its load is told to the engine a few times a second, and what the engine
//! knows of the others to whoever places chunks. In one process a task of the aggregator does it, which ends with it; a worker of its
//! own asks.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sluice_engine::aggregator::NodeEvent;
use sluice_engine::placement::{Standings, WorkerId, WorkerLoad};
use sluice_proto::calls::{Leaving, Placing};
use sluice_proto::problem::Refusal;
use tokio::sync::watch;

use crate::AggregatorService;

/// How often.
const EVERY: Duration = Duration::from_millis(200);

/// The worker of this process.
const OWN: WorkerId = WorkerId::new(0);

impl AggregatorService {
    /// What is known of the datacenters, as it changes. Kept up by whoever [exchanges](Placing::exchange).
    pub fn standings(&self) -> watch::Receiver<Standings> {
        self.standings.subscribe()
    }

    /// Where clients should go, as it changes.
    pub fn leaving(&self) -> watch::Receiver<Leaving> {
        self.leaving.subscribe()
    }

    /// From now on tells how loaded the datacenter is, as its worker `says`, and keeps [`standings`](Self::standings) up.
    pub fn report(self: &Arc<Self>, says: impl Fn() -> WorkerLoad + Send + 'static) {
        let service = self.clone();
        self.parts.tasks.spawn(async move {
            loop {
                if service.exchange(OWN, says()).await.is_err() {
                    return;
                }
                tokio::select! {
                    () = service.parts.tasks.draining() => return,
                    () = tokio::time::sleep(EVERY) => {}
                }
            }
        });
    }

    /// Bodies of uploads that flow into the store, as the workers that exchange with this share said a moment ago.
    pub(crate) fn bodies(&self) -> u64 {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner).bodies((self.now)())
    }

    /// Asks the engine how the datacenters stand, and tells whoever wants to know; `None` if it has stopped.
    pub(crate) async fn refresh(&self) -> Option<Standings> {
        let now = self.now.clone();
        let standings = self.ledgers.ask(move |aggregator| aggregator.standings(now())).await.ok()?;
        self.standings.send_replace(standings.clone());
        let target = standings.hands_over_to();
        let to = target.and_then(|dc| self.links.peer(dc)?.edge_url.clone());
        let leaving = Leaving { phase: standings.drain.map(|drain| drain.phase), target, to };
        self.leaving.send_if_modified(|known| {
            let changed = *known != leaving;
            *known = leaving;
            changed
        });
        Some(standings)
    }
}

#[async_trait]
impl Placing for AggregatorService {
    async fn exchange(&self, worker: WorkerId, said: WorkerLoad) -> Result<Standings, Refusal> {
        let load = self.loads.lock().unwrap_or_else(PoisonError::into_inner).note(worker, said, (self.now)());
        self.ledgers.tell(NodeEvent::Load(load)).await;
        self.refresh().await.ok_or_else(crate::refusal::stopping)
    }
}
