//! A worker as a process: the one that owns a volume, or a prefix of a bucket. It takes and gives chunks, asks the aggregator that has its store
//! about files, and lets that one reach the store.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sluice_aggregator::{Divided, SharePart};
use sluice_engine::placement::Standings;
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::budget::MemoryBudget;
use sluice_node::role::Role;
use sluice_node::shutdown::Shutdown;
use sluice_node::tls;
use sluice_proto::calls::Placing as _;
use sluice_remote::{
    Answers, Door, RemoteElsewhere, RemotePlacing, RemoteSlots, RemoteTenants, Tenures, serve_leaving,
    serve_passed, serve_store, serve_tenants, serve_workers,
};
use sluice_store::FsOptions;
use sluice_worker::{Rates, Worker, WorkerParts, WorkerSettings};
use tokio::sync::watch;

use super::{Process, ProcessConfig, SLOTS_PATIENCE, Tasks, serve_until_drained};
use crate::datacenter::StartError;
use crate::place::StorePlace;
use crate::shared::Shared;
use crate::ways::{OtherDc, Ways};

/// How often the aggregator is told how loaded it is, and says how the datacenters stand.
const EXCHANGE: Duration = Duration::from_millis(200);

/// How long it has for that, before it is asked anew.
const ANSWER: Duration = Duration::from_secs(2);

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
    /// Where it keeps its files.
    pub place: StorePlace,
    /// Bytes of memory for bodies in flight and chunks read ahead.
    pub memory: u64,
    /// Settings of the volume.
    pub store: FsOptions,
    /// What it spends otherwise.
    pub settings: WorkerSettings,
    /// Where other datacenters take what had better not be taken here.
    pub others: Vec<OtherDc>,
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
        let opened = worker.place.open(worker.store.clone(), &live.metrics).await?;
        let store = opened.as_dyn().clone();
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
        let (standings, heard) = watch::channel(Standings::default());
        let ways =
            Ways { dc: *dc, me: Role::Worker, material, tasks: &tasks.callers, metrics: &live.metrics };
        let elsewhere = RemoteElsewhere::new(ways.workers(&worker.others)?, heard, &live.metrics);
        let served = Worker::new(
            WorkerParts {
                dc: config.name(),
                store: store.clone(),
                slots,
                access,
                memory: live.memory.clone(),
                metrics: live.metrics.clone(),
                elsewhere: Some(Arc::new(elsewhere)),
                tasks: tasks.requests.clone(),
                rates: Arc::new(Rates::new(clock.clone(), shared.as_ref().map(Shared::buckets))),
            },
            worker.settings.clone(),
        );
        let live = live.taking(served.upload_rate(), worker.settings.upload_rate);
        let served = Arc::new(served);
        if let Some(share) = material.shares().all().find(|share| share.is_first()) {
            let placing = RemotePlacing::new(caller, tenures.clone(), share);
            exchange(placing, served.clone(), standings, &tasks.requests);
        }
        let answer = |routes| {
            let (memory, tasks) = (live.memory.clone(), tasks.requests.clone());
            Answers { routes, memory, tasks }
        };
        let edges = answer(serve_workers(served.clone()).merge(serve_tenants(tenants)));
        let (sessions, passed) = (answer(serve_leaving(served.clone())), answer(serve_passed(served)));
        // These end after the requests, which need them.
        let aggregators = Answers {
            routes: serve_store(store.clone(), tenures, tasks.inside.clone()),
            memory: MemoryBudget::new(STORE_MEMORY),
            tasks: tasks.inside.clone(),
        };
        let answers = [(Role::Edge, edges), (Role::Session, sessions), (Role::Aggregator, aggregators)];
        door.taking([(Role::Worker, passed)]).serve(answers, &tasks.inside);
        serve_until_drained(&health, &tasks);
        Ok(Self { live, tasks, listens, admin, store: Some(opened) })
    }
}

/// Tells the aggregator now and then how loaded the worker is, and hears how the datacenters stand, for as long as requests
/// are taken. What was heard last gets old by itself, and then nothing is passed on.
fn exchange(
    placing: RemotePlacing,
    worker: Arc<Worker>,
    standings: watch::Sender<Standings>,
    tasks: &Shutdown,
) {
    let owner = tasks.clone();
    tasks.spawn(async move {
        loop {
            tokio::select! {
                () = owner.draining() => return,
                answer = tokio::time::timeout(ANSWER, placing.exchange(worker.load())) => match answer {
                    Ok(Ok(heard)) => drop(standings.send_replace(heard)),
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "the aggregator does not say how the datacenters stand");
                    }
                    Err(_) => tracing::debug!("the aggregator does not say in time how the datacenters stand"),
                },
            }
            tokio::select! {
                () = owner.draining() => return,
                () = tokio::time::sleep(EXCHANGE) => {}
            }
        }
    });
}
