//! How this datacenter and the others stand: its load is told to the engine a few times a second, and what the engine
//! knows of the others to whoever places chunks. One task, which ends with the aggregator.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sluice_engine::aggregator::NodeEvent;
use sluice_engine::placement::{Load, Standings};
use sluice_proto::calls::Leaving;
use tokio::sync::watch;

use crate::AggregatorService;

/// How often.
const EVERY: Duration = Duration::from_millis(200);

impl AggregatorService {
    /// What is known of the datacenters, as it changes. Never kept up before [`report`](Self::report).
    pub fn standings(&self) -> watch::Receiver<Standings> {
        self.standings.subscribe()
    }

    /// Where clients should go, as it changes.
    pub fn leaving(&self) -> watch::Receiver<Leaving> {
        self.leaving.subscribe()
    }

    /// Says that somebody places chunks, so that the datacenter can be drained.
    pub fn set_placed(&self) {
        self.is_placed.store(true, Ordering::Relaxed);
    }

    /// From now on tells how loaded the datacenter is, as `load` says, and keeps [`standings`](Self::standings) up.
    pub fn report(self: &Arc<Self>, load: impl Fn() -> Load + Send + 'static) {
        self.set_placed();
        let service = self.clone();
        self.parts.tasks.spawn(async move {
            loop {
                service.ledgers.tell(NodeEvent::Load(load())).await;
                if service.refresh().await.is_none() {
                    return;
                }
                tokio::select! {
                    () = service.parts.tasks.draining() => return,
                    () = tokio::time::sleep(EVERY) => {}
                }
            }
        });
    }

    /// Asks the engine how the datacenters stand, and tells whoever wants to know; `None` if it has stopped.
    pub(crate) async fn refresh(&self) -> Option<Standings> {
        let now = self.now.clone();
        let standings = self.ledgers.ask(move |aggregator| aggregator.standings(now())).await.ok()?;
        self.metrics.drain_phase.set(standings.drain.map_or(0, |drain| i64::from(drain.phase as u8)));
        self.standings.send_replace(standings.clone());
        let to = standings.drain.and_then(|drain| self.links.peer(drain.target)?.edge_url.clone());
        let leaving = Leaving { phase: standings.drain.map(|drain| drain.phase), to };
        self.leaving.send_if_modified(|known| {
            let changed = *known != leaving;
            *known = leaving;
            changed
        });
        Some(standings)
    }
}
