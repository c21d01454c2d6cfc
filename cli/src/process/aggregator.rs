//! An aggregator as a process. It has no disk: it knows what the store of the datacenter's worker says, and what other
//! datacenters tell it.
//!
//! It has those shares of the slots that fall to it (`division.rs`). With each it lives as long as its
//! [tenure](sluice_remote::Tenures) of that share of the store. When that ends (the worker is gone or begins anew, the share
//! falls to another, or something was begun and nobody knows whether it was done), so does all that it knows of the share, at
//! once and without a word to anybody; then, if the share is still its own, it asks for it again, and begins anew with what
//! the store says, as another incarnation. While others have all shares it stands by.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use sluice_aggregator::{
    AggregatorMetrics, AggregatorParts, AggregatorSettings, Listener, PeerAddress, PeerPort,
};
use sluice_engine::share::{Share, Shares};
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::admin::Health;
use sluice_node::clock::random_bytes;
use sluice_node::rate::ScrubRate;
use sluice_node::role::Role;
use sluice_node::shutdown::Shutdown;
use sluice_node::tls;
use sluice_redis::lease::Fence;
use sluice_remote::{
    Answers, Caller, Door, NoTenure, Owned, RemoteStore, serve_placing, serve_slots, serve_tenants,
};
use sluice_store::ChunkStore;
use tokio::sync::watch;
use tokio::time::Instant;

use super::division::{self, Above, Division, Falls, LIFE};
use super::{Process, ProcessConfig, STORE_PATIENCE, Tasks};
use crate::datacenter::StartError;
use crate::shared::Shared;

/// How long it waits until it asks for the store again: a part of the 5 s in which a new owner is to answer.
const AGAIN: Duration = Duration::from_millis(250);

/// How much longer that is for each share, and at most.
const AGAIN_EACH: Duration = Duration::from_millis(60);
const LONGEST_AGAIN: Duration = Duration::from_secs(1);

/// How long a process that could not begin with a share leaves all of them to others.
const UNABLE: Duration = Duration::from_secs(30);

/// What each part of a life gets to finish when it ends in order. Meanwhile nobody has the share, and calls that are cut off
/// are made again.
const FINISH: Duration = Duration::from_secs(1);

/// What an aggregator is told beside.
#[derive(Clone, Debug)]
pub struct AggregatorProcess {
    /// Where workers ask.
    pub listen: SocketAddr,
    /// Where other datacenters come in.
    pub peer: SocketAddr,
    /// `host:port` of the worker.
    pub workers: String,
    /// Where clients find the datacenter.
    pub url: Option<String>,
    /// The other datacenters.
    pub peers: Vec<PeerAddress>,
    /// Bytes of memory for calls that arrive.
    pub memory: u64,
    /// Times and limits.
    pub settings: AggregatorSettings,
}

impl Process {
    /// Starts an aggregator. It serves once it has a share of the store of a worker; `/readyz` says whether it has what falls
    /// to it, or stands by.
    pub async fn aggregator(
        config: &ProcessConfig,
        aggregator: &AggregatorProcess,
    ) -> Result<Self, StartError> {
        tls::install_provider();
        let tasks = Tasks::default();
        let ProcessConfig { dc, material, .. } = config;
        let listener = Listener::bind(aggregator.peer)?;
        let door = Door::bind(aggregator.listen, material, *dc, Role::Aggregator)?;
        let listens = door.address().map_err(|source| StartError::of_port(aggregator.listen, source))?;
        let (live, health, admin) = config.admin(aggregator.memory, &tasks).await?;
        let worker = config.caller(
            Role::Aggregator,
            Role::Worker,
            &aggregator.workers,
            STORE_PATIENCE,
            &tasks,
            &live.metrics,
        )?;
        let shared = config.share(&live, &tasks).await?;
        let revocations = Revocations::new();
        if let Some(shared) = &shared {
            shared.learn(revocations.clone());
        }
        let owned = Owned::default();
        let answers =
            Answers { routes: owned.routes(), memory: live.memory.clone(), tasks: tasks.inside.clone() };
        door.serve([(Role::Worker, answers)], &tasks.inside);
        let (falls, fallen) = watch::channel(Falls::default());
        let (unable, above) = (watch::Sender::new(None), Arc::<Above>::default());
        let stands = Stands::new(material.shares(), health.clone());
        match &shared {
            Some(shared) => {
                let division = Division {
                    members: shared.aggregators(material.shares(), LIFE),
                    leases: shared.leases(LIFE),
                    shares: material.shares(),
                    is_able: watch_worker(worker.clone(), unable.subscribe(), &tasks.inside),
                    has: stands.has(),
                    above: above.clone(),
                };
                tasks.requests.spawn(division.run(falls, tasks.requests.clone()));
            }
            None => {
                let undivided =
                    division::undivided(material.shares(), stands.has(), falls, tasks.requests.clone());
                tasks.requests.spawn(undivided);
            }
        }
        live.set_scrub_rate(aggregator.settings.scrub_rate);
        health.set_started();
        let lives = Arc::new(Lives {
            port: PeerPort::open(listener, material, *dc, &tasks.inside)?,
            metrics: AggregatorMetrics::new(&live.metrics, *dc, material),
            shared,
            config: config.clone(),
            aggregator: aggregator.clone(),
            revocations,
            owned,
            worker,
            stands,
            scrub_rate: live.scrub_rate(),
            unable,
            above,
        });
        for share in material.shares().all() {
            tasks.requests.spawn(lives.clone().run(share, fallen.clone(), tasks.requests.clone()));
        }
        Ok(Self { live, tasks, listens, admin, held: None })
    }
}

/// Asks the worker now and then whether it is there. A process that was `unable` to begin with a share, though the worker
/// would have let it, leaves them to others for a while.
fn watch_worker(
    worker: Caller,
    unable: watch::Receiver<Option<Instant>>,
    tasks: &Shutdown,
) -> watch::Receiver<bool> {
    let (sender, receiver) = watch::channel(false);
    tasks.spawn(async move {
        let mut heard: Option<Instant> = None;
        while !sender.is_closed() {
            // One that is busy is there: shares do not go from hand to hand for that.
            if tokio::time::timeout(LIFE, RemoteStore::is_there(&worker)).await == Ok(true) {
                heard = Some(Instant::now());
            }
            let is_well = unable.borrow().is_none_or(|since| since.elapsed() >= UNABLE);
            sender.send_replace(is_well && heard.is_some_and(|heard| heard.elapsed() < LIFE));
            tokio::time::sleep(LIFE / 6).await;
        }
    });
    receiver
}

/// How it stands with each share.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// It is another's, or may be.
    By,
    /// It is to be had, and is not.
    Waits,
    /// It is here.
    Serves,
}

/// How it stands with all of them, and what that means for whoever asks whether the process is ready.
struct Stands {
    all: Mutex<BTreeMap<Share, Stand>>,
    has: watch::Sender<BTreeSet<Share>>,
    health: Health,
}

impl Stands {
    /// Of none it is known whose it is.
    fn new(shares: Shares, health: Health) -> Self {
        let all = shares.all().map(|share| (share, Stand::Waits)).collect();
        Self { all: Mutex::new(all), has: watch::Sender::default(), health }
    }

    /// The shares that are here, as they change.
    fn has(&self) -> watch::Receiver<BTreeSet<Share>> {
        self.has.subscribe()
    }

    fn set(&self, share: Share, stand: Stand) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(share, stand);
        // Whoever stands by can take over, which is what it is there for.
        self.health.set_serving(all.values().all(|stand| *stand != Stand::Waits));
        self.has.send_if_modified(|has| match stand {
            Stand::Serves => has.insert(share),
            Stand::By | Stand::Waits => has.remove(&share),
        });
    }

    /// The process ends.
    fn end(&self) {
        self.health.set_serving(false);
    }
}

/// What each life is made of.
struct Lives {
    shared: Option<Shared>,
    config: ProcessConfig,
    aggregator: AggregatorProcess,
    port: PeerPort,
    owned: Owned,
    worker: Caller,
    metrics: Arc<AggregatorMetrics>,
    /// What is revoked, which the first share knows from its store, and others from Redis. It only grows.
    revocations: Revocations,
    stands: Stands,
    scrub_rate: ScrubRate,
    /// When it was last unable to begin with a share that it could have had.
    unable: watch::Sender<Option<Instant>>,
    above: Arc<Above>,
}

/// What runs in one life, by the order in which it ends. Dropped, all of it ends where it stands.
#[derive(Default)]
struct Life {
    requests: Shutdown,
    aggregator: Shutdown,
    store: Shutdown,
}

impl Life {
    /// Ends it, as a power cut would.
    async fn kill(&self) {
        for tasks in [&self.requests, &self.aggregator, &self.store] {
            tasks.kill().await;
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        for tasks in [&self.requests, &self.aggregator, &self.store] {
            // Asked once, a kill has told every task; only the wait for their ends is left out.
            let _ = tasks.kill().now_or_never();
        }
    }
}

/// Why a life does not begin.
#[derive(Debug, thiserror::Error)]
enum NoLife {
    #[error(transparent)]
    Tenure(#[from] NoTenure),
    #[error(transparent)]
    Start(#[from] StartError),
}

impl Lives {
    /// One life with a share after the other, until the process drains.
    async fn run(self: Arc<Self>, share: Share, mut falls: watch::Receiver<Falls>, tasks: Shutdown) {
        let mut why = String::new();
        while !tasks.is_draining() {
            let fence = falls.borrow_and_update().fence(share);
            let Some(fence) = fence else {
                self.stands.set(share, Stand::By);
                tokio::select! {
                    // The sender lives as long as the process.
                    _ = falls.changed() => {}
                    () = tasks.draining() => {}
                }
                continue;
            };
            let life = Life::default();
            let began = tokio::select! {
                began = self.begin(share, fence, &life) => began,
                () = gone(&mut falls, share) => {
                    life.kill().await;
                    continue;
                }
                () = tasks.draining() => break,
            };
            match began {
                Ok(store) => {
                    tracing::info!(tenure = ?store.tenure(), "it is here: answering");
                    why.clear();
                    self.stands.set(share, Stand::Serves);
                    tokio::select! {
                        () = store.over() => {}
                        () = gone(&mut falls, share) => self.give_back(share, &life, &store).await,
                        () = tasks.draining() => {
                            self.stands.end();
                            self.give_back(share, &life, &store).await;
                        }
                    }
                    self.owned.remove(store.tenure());
                    life.kill().await;
                    self.stands.set(share, Stand::Waits);
                }
                Err(error) => {
                    life.kill().await;
                    match error {
                        NoLife::Tenure(NoTenure::Taken) => self.stands.set(share, Stand::By),
                        // The worker went meanwhile, perhaps: that is nothing of this process.
                        NoLife::Tenure(NoTenure::Unreachable(_)) | NoLife::Start(StartError::Store(_)) => {
                            self.stands.set(share, Stand::Waits);
                        }
                        NoLife::Tenure(NoTenure::Fence(highest)) => {
                            let mut above = self.above.lock().unwrap_or_else(PoisonError::into_inner);
                            above.insert(share, Fence::new(highest).unwrap_or_default());
                            drop(above);
                            self.stands.set(share, Stand::Waits);
                        }
                        NoLife::Tenure(NoTenure::Divided) | NoLife::Start(_) => {
                            self.unable.send_replace(Some(Instant::now()));
                            self.stands.set(share, Stand::Waits);
                        }
                    }
                    if why != error.to_string() {
                        why = error.to_string();
                        tracing::warn!(%share, why, "waiting for the store");
                    }
                    let jitter = u32::from(random_bytes::<1>()[0]);
                    // All processes ask for all shares where nobody divides them.
                    let again = AGAIN.max(AGAIN_EACH * share.of().count()).min(LONGEST_AGAIN);
                    tokio::select! {
                        () = tokio::time::sleep(again + again * jitter / 512) => {}
                        () = tasks.draining() => {}
                    }
                }
            }
        }
        self.stands.end();
    }

    /// Ends a life in order, so that whoever has the share next need not wait.
    async fn give_back(&self, share: Share, life: &Life, store: &RemoteStore) {
        tracing::info!(%share, "it goes to another");
        life.requests.stop(FINISH).await;
        life.aggregator.stop(FINISH).await;
        if let Err(error) = store.close().await {
            tracing::warn!(%share, %error, "the store was not given back");
        }
    }

    /// Begins a life: takes the share, and answers with what the store says.
    async fn begin(&self, share: Share, fence: Option<u64>, life: &Life) -> Result<RemoteStore, NoLife> {
        let ProcessConfig { dc, material, clock, .. } = &self.config;
        let store = RemoteStore::begin(self.worker.clone(), share, fence, &life.store).await?;
        let revocations = self.revocations.clone();
        let access = ContextVerifier::new(material, *dc, clock.clone(), revocations.clone());
        let service = sluice_aggregator::start(
            AggregatorParts {
                dc: *dc,
                share,
                material: material.clone(),
                store: Arc::new(store.clone()),
                access: Arc::new(access),
                revocations: revocations.clone(),
                metrics: self.metrics.clone(),
                clock: clock.clone(),
                tasks: life.aggregator.clone(),
                scrub_rate: self.scrub_rate.clone(),
                settings: self.aggregator.settings,
            },
            &self.port,
            self.aggregator.url.clone(),
            self.aggregator.peers.clone(),
        );
        let service = service.await.map_err(StartError::from)?;
        if let Some(shared) = self.shared.as_ref().filter(|_| share.is_first()) {
            shared.teach(revocations, &life.store);
        }
        let routes = serve_slots(service.clone()).merge(serve_tenants(service.clone()));
        let routes = routes.merge(serve_placing(service));
        self.owned.add(store.tenure(), routes, life.requests.clone());
        Ok(store)
    }
}

/// Returns once a share falls to somebody else.
async fn gone(falls: &mut watch::Receiver<Falls>, share: Share) {
    // The sender lives as long as the process.
    let _ = falls.wait_for(|falls| falls.fence(share).is_none()).await;
}
