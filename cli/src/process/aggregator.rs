//! An aggregator as a process. It has no disk: it knows what the store of the datacenter's worker says, and what other
//! datacenters tell it.
//!
//! It lives as long as its [tenure](sluice_remote::Tenures) with that store. When that ends (the worker is gone or begins
//! anew, or something was begun and nobody knows whether it was done), so does all that it knows, at once and without a
//! word to anybody; then it asks for another, and begins anew with what the store says, as another incarnation. While
//! another aggregator has the store it stands by, and its ports are closed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use sluice_aggregator::{AggregatorMetrics, AggregatorParts, AggregatorSettings, Listener, PeerAddress};
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::admin::Health;
use sluice_node::clock::random_bytes;
use sluice_node::role::Role;
use sluice_node::shutdown::Shutdown;
use sluice_node::tls;
use sluice_remote::{Answers, Caller, Door, NoTenure, RemoteStore, serve_slots, serve_tenants};
use sluice_store::ChunkStore;

use super::{Process, ProcessConfig, STORE_PATIENCE, Tasks};
use crate::datacenter::StartError;
use crate::live::Live;
use crate::ports::ReservedPort;
use crate::shared::Shared;

/// How long it waits until it asks for the store again: a part of the 5 s in which a new owner is to answer.
const AGAIN: Duration = Duration::from_millis(250);

/// What each part of a life gets to finish when the process is to stop.
const FINISH: Duration = Duration::from_secs(4);

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
    /// Starts an aggregator. It serves once it has the store of a worker; `/readyz` says whether it does, or stands by.
    pub async fn aggregator(
        config: &ProcessConfig,
        aggregator: &AggregatorProcess,
    ) -> Result<Self, StartError> {
        tls::install_provider();
        let tasks = Tasks::default();
        let reserve =
            |address| ReservedPort::reserve(address).map_err(|source| StartError::of_port(address, source));
        let (listen, peer) = (reserve(aggregator.listen)?, reserve(aggregator.peer)?);
        let listens = listen.address();
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
        health.set_started();
        let lives = Lives {
            shared,
            metrics: AggregatorMetrics::new(&live.metrics),
            config: config.clone(),
            aggregator: aggregator.clone(),
            listen,
            peer,
            worker,
            live: live.clone(),
            health,
        };
        let draining = tasks.requests.clone();
        tasks.requests.spawn(async move { lives.run(draining).await });
        Ok(Self { live, tasks, listens, admin, store: None })
    }
}

/// What each life is made of.
struct Lives {
    shared: Option<Shared>,
    config: ProcessConfig,
    aggregator: AggregatorProcess,
    listen: ReservedPort,
    peer: ReservedPort,
    worker: Caller,
    live: Live,
    metrics: Arc<AggregatorMetrics>,
    health: Health,
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
    /// One life after the other, until the process drains.
    async fn run(self, tasks: Shutdown) {
        let mut why = String::new();
        while !tasks.is_draining() {
            let life = Life::default();
            let began = tokio::select! {
                began = self.begin(&life) => began,
                () = tasks.draining() => break,
            };
            match began {
                Ok(store) => {
                    tracing::info!(tenure = ?store.tenure(), "the store is here: answering");
                    why.clear();
                    self.health.set_serving(true);
                    tokio::select! {
                        () = store.over() => self.health.set_serving(false),
                        () = tasks.draining() => {
                            self.health.set_serving(false);
                            life.requests.stop(FINISH).await;
                            life.aggregator.stop(FINISH).await;
                            if let Err(error) = store.close().await {
                                tracing::warn!(%error, "the store was not given back");
                            }
                        }
                    }
                    life.kill().await;
                }
                Err(error) => {
                    life.kill().await;
                    // Whoever stands by can take over, which is what it is there for.
                    self.health.set_serving(matches!(error, NoLife::Tenure(NoTenure::Taken)));
                    if why != error.to_string() {
                        why = error.to_string();
                        tracing::warn!(why, "waiting for the store");
                    }
                    let jitter = u32::from(random_bytes::<1>()[0]);
                    tokio::select! {
                        () = tokio::time::sleep(AGAIN + AGAIN * jitter / 512) => {}
                        () = tasks.draining() => {}
                    }
                }
            }
        }
        self.health.set_serving(false);
    }

    /// Begins a life: takes the store, and answers with what it says.
    async fn begin(&self, life: &Life) -> Result<RemoteStore, NoLife> {
        let ProcessConfig { dc, material, clock, .. } = &self.config;
        let store = RemoteStore::begin(self.worker.clone(), &life.store).await?;
        let listener = Listener::bind(self.peer.address()).map_err(StartError::from)?;
        // Each life knows what the store does.
        let revocations = Revocations::new();
        let access = ContextVerifier::new(material.context_ring(), *dc, clock.clone(), revocations.clone());
        let service = sluice_aggregator::start(
            AggregatorParts {
                dc: *dc,
                material: material.clone(),
                store: Arc::new(store.clone()),
                access: Arc::new(access),
                revocations: revocations.clone(),
                metrics: self.metrics.clone(),
                clock: clock.clone(),
                tasks: life.aggregator.clone(),
                settings: self.aggregator.settings,
            },
            listener,
            self.aggregator.url.clone(),
            self.aggregator.peers.clone(),
        );
        let service = service.await.map_err(StartError::from)?;
        if let Some(shared) = &self.shared {
            shared.teach(revocations, &life.store);
        }
        let door =
            Door::bind(self.listen.address(), material, *dc, Role::Aggregator).map_err(StartError::from)?;
        let answers = Answers {
            routes: serve_slots(service.clone(), store.tenure()).merge(serve_tenants(service)),
            memory: self.live.memory.clone(),
            tasks: life.requests.clone(),
        };
        door.serve([(Role::Worker, answers)], &life.requests);
        Ok(store)
    }
}
