//! Drain, as an operator asks for it: begun, shown and ended here; the engine decides whether it may be, remembers it, and
//! tells the others. Runs in the caller's request.

use sluice_engine::aggregator::NodeEvent;
use sluice_engine::drain::{Drain, DrainError};
use sluice_engine::ids::DcId;
use sluice_proto::calls::DrainOrder;
use sluice_proto::http::DrainStatus;
use sluice_proto::problem::{Problem, Refusal};

use crate::AggregatorService;

impl AggregatorService {
    /// Does what the operator wants, durably, and says where the drain stands.
    pub(crate) async fn ordered(&self, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        match order {
            DrainOrder::Show => {}
            DrainOrder::End => self.set_drain(None).await?,
            DrainOrder::Begin { to, phase, evacuate, is_trial } => {
                let target = self.parts.material.dc_named(&to).ok_or_else(|| {
                    let known: Vec<&str> = self.parts.material.dcs().map(|(_, name)| name).collect();
                    Refusal::new(Problem::InvalidParameter, format!("no datacenter is called {to:?}"))
                        .hint(format!("the cluster has {}", known.join(", ")))
                })?;
                let drain = Drain { phase, target, evacuate };
                let may = self.ledgers.ask(move |aggregator| aggregator.may_drain(drain)).await?;
                may.map_err(|error| self.refused(error))?;
                if !is_trial {
                    self.set_drain(Some(drain)).await?;
                }
            }
        }
        let asked = self.ledgers.ask(|aggregator| (aggregator.drain(), aggregator.files_left()));
        let (drain, files_left) = asked.await?;
        Ok(DrainStatus {
            dc: self.dc_name(self.parts.dc),
            phase: drain.map(|drain| drain.phase.name().to_owned()),
            to: drain.map(|drain| self.dc_name(drain.target)),
            evacuate: drain.is_some_and(|drain| drain.evacuate),
            files_left,
            bodies: self.bodies(),
            connections: 0,
        })
    }

    async fn set_drain(&self, drain: Option<Drain>) -> Result<(), Refusal> {
        self.ledgers.settle_node(None, NodeEvent::Drain(drain)).await?;
        // Whoever places chunks in this process knows before the operator does.
        self.refresh().await.map(|_| ()).ok_or_else(crate::refusal::stopping)
    }

    /// Why a drain cannot be, with names in place of numbers.
    fn refused(&self, error: DrainError) -> Refusal {
        let name = |dc: DcId| self.dc_name(dc);
        let (problem, detail, hint) = match error {
            DrainError::Itself => {
                (Problem::InvalidParameter, error.to_string(), "name another datacenter with --to")
            }
            DrainError::Unknown(_) => {
                (Problem::InvalidParameter, error.to_string(), "name another datacenter with --to")
            }
            DrainError::Down(dc) => (
                Problem::Precondition,
                format!("{} cannot be reached from here", name(dc)),
                "drain to a datacenter that is up",
            ),
            DrainError::TargetDrains(dc) => (
                Problem::Precondition,
                format!("{} is draining itself", name(dc)),
                "end that with `sluice admin undrain`, or drain to another datacenter",
            ),
            DrainError::IsTarget(dc) => (
                Problem::Precondition,
                format!("{} is draining to this datacenter", name(dc)),
                "end that with `sluice admin undrain` first",
            ),
        };
        Refusal::new(problem, detail).hint(hint)
    }
}
