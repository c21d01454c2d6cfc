//! A worker as a process: the one that owns a volume. It takes and gives chunks, asks the aggregator that has its store
//! about files, and lets that one reach the store.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use sluice_aggregator::{Divided, SharePart};
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::budget::MemoryBudget;
use sluice_node::role::Role;
use sluice_node::tls;
use sluice_remote::{
    Answers, Door, RemoteSlots, RemoteTenants, Tenures, serve_store, serve_tenants, serve_workers,
};
use sluice_store::FsOptions;
use sluice_worker::{Rates, Worker, WorkerParts, WorkerSettings};

use super::{Process, ProcessConfig, SLOTS_PATIENCE, Tasks, serve_until_drained};
use crate::datacenter::{StartError, open_store};
use crate::shared::Shared;
use crate::volume;

/// What calls to the store may take that are collected before they are acted on: apart from clients' bodies, so that these
/// never keep an aggregator from what they wait for.
const STORE_MEMORY: u64 = 64 << 20;

/// What a worker is told beside.
#[derive(Clone, Debug)]
pub struct WorkerProcess {
    /// Where edges and aggregators ask.
    pub listen: SocketAddr,
    /// `host:port` of the aggregators.
    pub aggregators: String,
    /// The directory of its volume; made if it is missing.
    pub data: PathBuf,
    /// Bytes of memory for bodies in flight and chunks read ahead.
    pub memory: u64,
    /// Settings of the volume.
    pub store: FsOptions,
    /// What it spends otherwise.
    pub settings: WorkerSettings,
}

impl Process {
    /// Starts a worker. It serves when this returns, whether or not there is an aggregator yet.
    pub async fn worker(config: &ProcessConfig, worker: &WorkerProcess) -> Result<Self, StartError> {
        tls::install_provider();
        let ProcessConfig { dc, material, clock, .. } = config;
        let tasks = Tasks::default();
        let door = Door::bind(worker.listen, material, *dc, Role::Worker)?;
        let listens = door.address().map_err(|source| StartError::of_port(worker.listen, source))?;
        let (live, health, admin) = config.admin(worker.memory, &tasks).await?;
        let caller = config.caller(
            Role::Worker,
            Role::Aggregator,
            &worker.aggregators,
            SLOTS_PATIENCE,
            &tasks,
            &live.metrics,
        )?;
        let store = Arc::new(open_store(worker.data.clone(), worker.store.clone()).await?);
        volume::show(&store, &live.metrics);
        let (tenures, revocations) = (Tenures::new(material.shares()), Revocations::new());
        let shared = config.share(&live, &tasks).await?;
        if let Some(shared) = &shared {
            shared.learn(revocations.clone());
        }
        let access = Arc::new(ContextVerifier::new(material, *dc, clock.clone(), revocations));
        let part = |share| SharePart {
            slots: Arc::new(RemoteSlots::new(caller.clone(), tenures.clone(), share)),
            tenants: Arc::new(RemoteTenants::of_share(caller.clone(), tenures.clone(), share)),
        };
        let parts = material.shares().all().map(|share| (share, part(share))).collect();
        let SharePart { slots, tenants } = Divided::over(parts, access.clone());
        let served = Worker::new(
            WorkerParts {
                dc: config.name(),
                store: store.clone(),
                slots,
                access,
                memory: live.memory.clone(),
                metrics: live.metrics.clone(),
                elsewhere: None,
                tasks: tasks.requests.clone(),
                rates: Arc::new(Rates::new(clock.clone(), shared.as_ref().map(Shared::buckets))),
            },
            worker.settings.clone(),
        );
        let edges = Answers {
            routes: serve_workers(Arc::new(served)).merge(serve_tenants(tenants)),
            memory: live.memory.clone(),
            tasks: tasks.requests.clone(),
        };
        // These end after the requests, which need them.
        let aggregators = Answers {
            routes: serve_store(store.clone(), tenures, tasks.inside.clone()),
            memory: MemoryBudget::new(STORE_MEMORY),
            tasks: tasks.inside.clone(),
        };
        door.serve([(Role::Edge, edges), (Role::Aggregator, aggregators)], &tasks.inside);
        serve_until_drained(&health, &tasks);
        Ok(Self { live, tasks, listens, admin, store: Some(store) })
    }
}
