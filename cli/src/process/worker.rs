//! A worker as a process: the one that keeps a volume, or a prefix of a bucket. It takes and gives chunks, asks the aggregator
//! that has its store about files, and lets that one reach the store. Beside one that keeps a bucket there may be porters, which
//! take and give chunks of the same bucket, and ask it for all else.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sluice_aggregator::{Divided, SharePart};
use sluice_engine::placement::{Standings, WorkerId, WorkerLoad};
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::budget::MemoryBudget;
use sluice_node::clock::random_bytes;
use sluice_node::role::Role;
use sluice_node::shutdown::Shutdown;
use sluice_node::tls;
use sluice_proto::calls::Placing as _;
use sluice_remote::{
    Answers, Door, RemoteElsewhere, RemoteKeeper, RemotePlacing, RemoteSlots, RemoteTenants, Tenures,
    serve_keeper, serve_leaving, serve_passed, serve_placing, serve_slots, serve_store, serve_tenants,
    serve_workers,
};
use sluice_store::{Chunks, FsOptions, PorterStore, S3Options};
use sluice_worker::{Rates, Worker, WorkerParts, WorkerSettings};
use tokio::sync::watch;

use super::{Process, ProcessConfig, SLOTS_PATIENCE, Tasks, serve_until_drained};
use crate::bucket;
use crate::datacenter::StartError;
use crate::live::Live;
use crate::place::{OpenStore, StorePlace};
use crate::shared::Shared;
use crate::ways::{OtherDc, Ways};

/// How often the aggregator is told how loaded it is, and says how the datacenters stand.
const EXCHANGE: Duration = Duration::from_millis(200);

/// How long it has for that, before it is asked anew.
const ANSWER: Duration = Duration::from_secs(2);

/// What the keeper of a bucket may take for an answer: longer than it asks aggregators itself.
const KEEPER_PATIENCE: Duration = Duration::from_secs(40);

/// What calls to the store may take that are collected before they are acted on: apart from clients' bodies, so that these
/// never keep an aggregator from what they wait for.
const STORE_MEMORY: u64 = 64 << 20;

/// What a worker is told beside.
#[derive(Clone, Debug)]
pub struct WorkerProcess {
    /// Where edges and aggregators ask.
    pub listen: SocketAddr,
    /// Where its chunks go.
    pub store: WorkerStore,
    /// Bytes of memory for bodies in flight and chunks read ahead.
    pub memory: u64,
    /// What it spends otherwise.
    pub settings: WorkerSettings,
    /// Where other datacenters take what had better not be taken here.
    pub others: Vec<OtherDc>,
}

/// Where a worker's chunks go.
#[derive(Clone, Debug)]
pub enum WorkerStore {
    /// It keeps them, and all else that is durable of its datacenter.
    Kept {
        /// Where.
        place: StorePlace,
        /// Settings of a volume.
        options: FsOptions,
        /// `host:port` of the aggregators.
        aggregators: String,
    },
    /// It is a porter: it carries them to and from a bucket that another worker keeps.
    Carried {
        /// The bucket.
        bucket: Box<S3Options>,
        /// `host:port` of that worker.
        keeper: String,
    },
}

/// What stands behind a worker.
struct Behind {
    chunks: Arc<dyn Chunks>,
    part: SharePart,
    /// Who says how the datacenters stand; `None`: nobody who is asked by this process.
    placing: Option<RemotePlacing>,
    held: Held,
}

/// What a worker holds until it ends.
pub(super) enum Held {
    /// The store that it keeps, and whose shares are whose.
    Store(OpenStore, Tenures),
    /// The way to the bucket that another keeps.
    Bucket(PorterStore),
}

impl Behind {
    /// The store that this process keeps, and the aggregators that have it.
    async fn kept(
        config: &ProcessConfig,
        (place, options, aggregators): (&StorePlace, &FsOptions, &str),
        access: &Arc<ContextVerifier>,
        (live, tasks): (&Live, &Tasks),
    ) -> Result<Self, StartError> {
        let shares = config.material.shares();
        let (me, whom) = (Role::Worker, Role::Aggregator);
        let caller = config.caller(me, whom, aggregators, SLOTS_PATIENCE, tasks, &live.metrics)?;
        let store = place.open(options.clone(), &live.metrics).await?;
        let tenures = Tenures::new(shares);
        let part = |share| SharePart {
            slots: Arc::new(RemoteSlots::new(caller.clone(), tenures.clone(), share)),
            tenants: Arc::new(RemoteTenants::of_share(caller.clone(), tenures.clone(), share)),
        };
        let parts = shares.all().map(|share| (share, part(share))).collect();
        let first = shares.all().find(|share| share.is_first());
        Ok(Self {
            chunks: store.as_dyn().clone(),
            part: Divided::over(parts, access.clone()),
            placing: first.map(|share| RemotePlacing::new(caller.clone(), tenures.clone(), share)),
            held: Held::Store(store, tenures),
        })
    }

    /// A bucket that another worker keeps, which is asked for all else.
    async fn carried(
        config: &ProcessConfig,
        (bucket, keeper): (&S3Options, &str),
        (live, tasks): (&Live, &Tasks),
    ) -> Result<Self, StartError> {
        let caller =
            config.caller(Role::Worker, Role::Worker, keeper, KEEPER_PATIENCE, tasks, &live.metrics)?;
        let remote = Arc::new(RemoteKeeper::new(caller.clone()));
        let store = PorterStore::open(bucket.clone(), remote).await.map_err(StartError::Bucket)?;
        let shown = store.clone();
        bucket::show(&live.metrics, move || Some(shown.metrics()));
        let part = SharePart {
            slots: Arc::new(RemoteSlots::of_keeper(caller.clone())),
            tenants: Arc::new(RemoteTenants::new(caller.clone())),
        };
        let placing = Some(RemotePlacing::of_keeper(caller));
        Ok(Self { chunks: Arc::new(store.clone()), part, placing, held: Held::Bucket(store) })
    }
}

impl Process {
    /// Starts a worker. It serves when this returns, whether or not there is anyone yet whom it can ask.
    pub async fn worker(config: &ProcessConfig, worker: &WorkerProcess) -> Result<Self, StartError> {
        tls::install_provider();
        let ProcessConfig { dc, material, clock, .. } = config;
        let tasks = Tasks::default();
        let door = Door::bind(worker.listen, material, *dc, Role::Worker)?;
        let listens = door.address().map_err(|source| StartError::of_port(worker.listen, source))?;
        let (live, health, admin) = config.admin(worker.memory, &tasks).await?;
        let revocations = Revocations::new();
        let access = Arc::new(ContextVerifier::new(material, *dc, clock.clone(), revocations.clone()));
        // Before the store is opened: that ends whoever keeps its bucket.
        let shared = config.share(&live, &tasks).await?;
        if let Some(shared) = &shared {
            shared.learn(revocations);
        }
        let Behind { chunks, part: SharePart { slots, tenants }, placing, held } = match &worker.store {
            WorkerStore::Kept { place, options, aggregators } => {
                Behind::kept(config, (place, options, aggregators), &access, (&live, &tasks)).await?
            }
            WorkerStore::Carried { bucket, keeper } => {
                Behind::carried(config, (bucket, keeper), (&live, &tasks)).await?
            }
        };
        let (standings, heard) = watch::channel(Standings::default());
        let ways =
            Ways { dc: *dc, me: Role::Worker, material, tasks: &tasks.callers, metrics: &live.metrics };
        let elsewhere = RemoteElsewhere::new(ways.workers(&worker.others)?, heard, &live.metrics);
        let served = Worker::new(
            WorkerParts {
                dc: config.name(),
                store: chunks,
                slots: slots.clone(),
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
        served.show();
        if let Some(placing) = placing.clone() {
            // Porters are there to be asked; of one that keeps its store nobody says whether edges know it.
            let (worker, is_porter) = (served.clone(), matches!(held, Held::Bucket(_)));
            let says = move || {
                let said = worker.says();
                WorkerLoad { is_asked: is_porter || said.is_asked, ..said }
            };
            exchange(placing, says, standings, &tasks.requests);
        }
        let answer = |routes| {
            let (memory, tasks) = (live.memory.clone(), tasks.requests.clone());
            Answers { routes, memory, tasks }
        };
        let edges = answer(serve_workers(served.clone()).merge(serve_tenants(tenants.clone())));
        let (sessions, passed) = (answer(serve_leaving(served.clone())), answer(serve_passed(served)));
        let mut answers = vec![(Role::Edge, edges), (Role::Session, sessions)];
        // These end after the requests, which need them.
        let inside = |routes| {
            let (memory, tasks) = (MemoryBudget::new(STORE_MEMORY), tasks.inside.clone());
            Answers { routes, memory, tasks }
        };
        if let Held::Store(store, tenures) = &held {
            let routes = serve_store(store.as_dyn().clone(), tenures.clone(), tasks.inside.clone());
            answers.push((Role::Aggregator, inside(routes)));
            if let Some(keeper) = store.keeper() {
                let routes = serve_keeper(keeper).merge(serve_slots(slots)).merge(serve_tenants(tenants));
                let placing = placing.map(|placing| serve_placing(Arc::new(placing)));
                answers.push((Role::Worker, inside(routes.merge(placing.unwrap_or_default()))));
            }
        }
        door.taking([(Role::Worker, passed)]).serve(answers, &tasks.inside);
        serve_until_drained(&health, &tasks);
        Ok(Self { live, tasks, listens, admin, held: Some(held) })
    }
}

/// Tells the aggregator now and then how loaded the worker is, and hears how the datacenters stand, for as long as requests
/// are taken. What was heard last gets old by itself, and then nothing is passed on.
fn exchange(
    placing: RemotePlacing,
    says: impl Fn() -> WorkerLoad + Send + 'static,
    standings: watch::Sender<Standings>,
    tasks: &Shutdown,
) {
    let (owner, me) = (tasks.clone(), WorkerId::new(u64::from_be_bytes(random_bytes())));
    tasks.spawn(async move {
        loop {
            tokio::select! {
                () = owner.draining() => return,
                answer = tokio::time::timeout(ANSWER, placing.exchange(me, says())) => match answer {
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
