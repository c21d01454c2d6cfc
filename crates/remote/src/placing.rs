//! [`Placing`], from process to process: a worker says how loaded it is, and is told how the datacenters stand.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::extract::State as AppState;
use axum::routing::post;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sluice_engine::drain::{Drain, Phase};
use sluice_engine::ids::{DcId, Timestamp};
use sluice_engine::placement::{Load, Standing, Standings, WorkerId, WorkerLoad};
use sluice_engine::share::Share;
use sluice_proto::calls::Placing;
use sluice_proto::problem::Refusal;

use crate::call::{Answer, Call};
use crate::caller::{Caller, Head};
use crate::owner::Owner;
use crate::tenure::Tenures;

const EXCHANGE: &str = "/v1/placing/exchange";

#[derive(Serialize, Deserialize)]
struct WireLoad {
    room: u64,
    pressure: u16,
}

#[derive(Serialize, Deserialize)]
struct WireOwn {
    /// Missing: an older version, of which there is one.
    #[serde(default)]
    worker: u64,
    #[serde(flatten)]
    load: WireLoad,
    /// Missing: an older version, which does not say.
    #[serde(default)]
    bodies: u64,
    /// Missing: an older version, which does not know of any that is not.
    #[serde(default = "yes")]
    is_asked: bool,
}

fn yes() -> bool {
    true
}

#[derive(Serialize, Deserialize)]
struct WireDrain {
    phase: u8,
    target: u16,
    evacuate: bool,
}

#[derive(Serialize, Deserialize)]
struct WireStanding {
    is_reachable: bool,
    load: Option<WireLoad>,
    /// When it was heard; 0 without one.
    heard: u64,
    drain: Option<WireDrain>,
}

#[derive(Serialize, Deserialize)]
struct WireStandings {
    drain: Option<WireDrain>,
    others: BTreeMap<u16, WireStanding>,
    at: u64,
}

impl WireLoad {
    fn of(Load { room, pressure }: Load) -> Self {
        Self { room, pressure }
    }

    fn parse(self) -> Load {
        Load { room: self.room, pressure: self.pressure }
    }
}

impl WireOwn {
    fn of(worker: WorkerId, WorkerLoad { load, bodies, is_asked }: WorkerLoad) -> Self {
        Self { worker: worker.number(), load: WireLoad::of(load), bodies, is_asked }
    }

    fn parse(self) -> (WorkerId, WorkerLoad) {
        let Self { worker, load, bodies, is_asked } = self;
        (WorkerId::new(worker), WorkerLoad { load: load.parse(), bodies, is_asked })
    }
}

impl WireDrain {
    fn of(Drain { phase, target, evacuate }: Drain) -> Self {
        Self { phase: phase as u8, target: target.number(), evacuate }
    }

    /// A phase that this version does not know is none that it could act on.
    fn parse(self) -> Option<Drain> {
        let (target, evacuate) = (DcId::new(self.target), self.evacuate);
        Phase::from_byte(self.phase).map(|phase| Drain { phase, target, evacuate })
    }
}

impl WireStandings {
    fn of(Standings { drain, others, at }: Standings) -> Self {
        let other = |(dc, Standing { is_reachable, load, drain }): (DcId, Standing)| {
            let heard = load.map_or(0, |(_, heard)| heard.number());
            let load = load.map(|(load, _)| WireLoad::of(load));
            (dc.number(), WireStanding { is_reachable, load, heard, drain: drain.map(WireDrain::of) })
        };
        let others = others.into_iter().map(other).collect();
        Self { drain: drain.map(WireDrain::of), others, at: at.number() }
    }

    fn parse(self) -> Standings {
        let other = |(dc, standing): (u16, WireStanding)| {
            let WireStanding { is_reachable, load, heard, drain } = standing;
            let load = load.map(|load| (load.parse(), Timestamp::new(heard)));
            (DcId::new(dc), Standing { is_reachable, load, drain: drain.and_then(WireDrain::parse) })
        };
        let others = self.others.into_iter().map(other).collect();
        Standings { drain: self.drain.and_then(WireDrain::parse), others, at: Timestamp::new(self.at) }
    }
}

type Served = AppState<Arc<dyn Placing>>;

/// What serves `placing` to workers: to be [owned](crate::Owned) under a tenure; or to porters.
pub fn serve_placing(placing: Arc<dyn Placing>) -> Router {
    Router::new().route(EXCHANGE, post(exchange)).with_state(placing)
}

async fn exchange(AppState(placing): Served, call: Call<WireOwn>) -> Answer<WireStandings> {
    let (worker, said) = call.arguments.parse();
    Answer(placing.exchange(worker, said).await.map(WireStandings::of))
}

/// What the aggregator answers that has a share of this process's store.
#[derive(Clone, Debug)]
pub struct RemotePlacing(Owner);

impl RemotePlacing {
    /// Asked by way of `caller`, under the tenure that stands in `tenures`.
    pub fn new(caller: Caller, tenures: Tenures, share: Share) -> Self {
        Self(Owner::new(caller, tenures, share))
    }

    /// What the worker passes on that keeps the bucket, asked by way of `caller`.
    pub fn of_keeper(caller: Caller) -> Self {
        Self(Owner::keeper(caller))
    }
}

#[async_trait]
impl Placing for RemotePlacing {
    async fn exchange(&self, worker: WorkerId, said: WorkerLoad) -> Result<Standings, Refusal> {
        let said = WireOwn::of(worker, said);
        let asked = self.0.ask_with(Head::own(EXCHANGE), &said, Bytes::new(), Duration::ZERO);
        Ok(WireStandings::parse(asked.await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_worker_says_arrives_as_it_left_and_that_of_an_older_version_counts() {
        let load = Load { room: u64::MAX, pressure: 1001 };
        let (worker, said) = (WorkerId::new(u64::MAX), WorkerLoad { load, bodies: 9, is_asked: false });
        let parsed = |text: &str| serde_json::from_str::<WireOwn>(text).unwrap().parse();
        let text = serde_json::to_string(&WireOwn::of(worker, said)).unwrap();
        assert_eq!(parsed(&text), (worker, said));
        let older = WorkerLoad { load: Load { room: 5, pressure: 6 }, bodies: 0, is_asked: true };
        assert_eq!(parsed(r#"{"worker":7,"room":5,"pressure":6}"#), (WorkerId::new(7), older));
    }

    #[test]
    fn standings_arrive_as_they_left() {
        let drain = Drain { phase: Phase::Sessions, target: DcId::new(2), evacuate: true };
        let load = Load { room: u64::MAX, pressure: 1001 };
        let heard = Standing { is_reachable: true, load: Some((load, Timestamp::new(7))), drain: None };
        let standings = Standings {
            drain: Some(drain),
            others: [
                (DcId::new(2), heard),
                (DcId::new(3), Standing { drain: Some(drain), ..Standing::default() }),
            ]
            .into(),
            at: Timestamp::new(9),
        };
        let text = serde_json::to_string(&WireStandings::of(standings.clone())).unwrap();
        assert_eq!(serde_json::from_str::<WireStandings>(&text).unwrap().parse(), standings);
        assert_eq!(WireDrain { phase: 9, ..WireDrain::of(drain) }.parse(), None);
    }
}
