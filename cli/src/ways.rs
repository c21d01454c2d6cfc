//! The ways to other datacenters: to workers that take what is passed on, and to session services that renew contexts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use sluice_engine::ids::DcId;
use sluice_node::access::ContextVerifier;
use sluice_node::clock::SharedClock;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;
use sluice_node::role::Role;
use sluice_node::shutdown::Shutdown;
use sluice_proto::calls::{Sessions, Workers};
use sluice_remote::{Caller, CallerConfig, Other, RemoteSessions, RemoteWorkers};

use crate::datacenter::StartError;

/// How long the workers of another datacenter may take for what was passed to them, from when all of it was sent.
const PASS_PATIENCE: Duration = Duration::from_secs(45);

/// How long the session service of another datacenter may take, before this one's own is asked.
const SESSION_PATIENCE: Duration = Duration::from_secs(3);

/// Where another datacenter takes what moves there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherDc {
    /// Which.
    pub dc: DcId,
    /// Where clients find it.
    pub url: Option<String>,
    /// `host:port` at which its workers take what is passed to them; of a datacenter that is one process also where it
    /// renews contexts.
    pub workers: Option<String>,
    /// `host:port` of its session services, if they are processes of their own.
    pub sessions: Option<String>,
}

/// Whose ways they are.
pub(crate) struct Ways<'a> {
    pub(crate) dc: DcId,
    pub(crate) me: Role,
    pub(crate) material: &'a ClusterMaterial,
    /// Connections end with them.
    pub(crate) tasks: &'a Shutdown,
    pub(crate) metrics: &'a Metrics,
}

impl Ways<'_> {
    /// The other datacenters, and the ways to their workers.
    pub(crate) fn workers(&self, others: &[OtherDc]) -> Result<BTreeMap<DcId, Other>, StartError> {
        let way = |other: &OtherDc| {
            let caller =
                other.workers.as_ref().map(|at| self.caller(other.dc, Role::Worker, at, PASS_PATIENCE));
            let workers =
                caller.transpose()?.map(|caller| Arc::new(RemoteWorkers::new(caller)) as Arc<dyn Workers>);
            let name = self.material.dc_name(other.dc).unwrap_or_default().to_owned();
            Ok((other.dc, Other { name, url: other.url.clone(), workers }))
        };
        others.iter().map(way).collect()
    }

    /// The ways to the session services of other datacenters.
    pub(crate) fn sessions(
        &self,
        others: &[OtherDc],
        access: &Arc<ContextVerifier>,
        clock: &SharedClock,
    ) -> Result<BTreeMap<DcId, Arc<dyn Sessions>>, StartError> {
        let mut ways = BTreeMap::new();
        for other in others {
            let at = match (&other.sessions, &other.workers) {
                (Some(at), _) => (Role::Session, at),
                (None, Some(at)) => (Role::Worker, at),
                (None, None) => continue,
            };
            let caller = self.caller(other.dc, at.0, at.1, SESSION_PATIENCE)?;
            let sessions = RemoteSessions::new(caller, access.clone(), clock.clone());
            ways.insert(other.dc, Arc::new(sessions) as Arc<dyn Sessions>);
        }
        Ok(ways)
    }

    fn caller(&self, of: DcId, whom: Role, address: &str, patience: Duration) -> Result<Caller, StartError> {
        let (dc, me, address) = (self.dc, self.me, address.to_owned());
        let config = CallerConfig { dc, of, me, whom, address, patience };
        Ok(Caller::new(config, self.material, self.tasks, &self.metrics.outgoing_calls)?)
    }
}
