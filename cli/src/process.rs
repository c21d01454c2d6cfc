//! Roles of a datacenter as processes of their own: edges and session services, which keep nothing, the worker that owns
//! the volume, and aggregators, which have the shares of it.
//!
//! [`Process::edge`], [`session`](Process::session), [`worker`](Process::worker) and [`aggregator`](Process::aggregator)
//! start one. Like a [`Datacenter`](crate::datacenter::Datacenter) it stops in
//! order under a deadline: requests first, the admin port last, so that `/readyz` can be seen to fail meanwhile. A process
//! that is killed costs its callers a try.

mod aggregator;
mod division;
mod worker;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sluice_edge::{Edge, EdgeConfig, EdgeParts, EdgeSettings};
use sluice_engine::ids::DcId;
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::admin::{Admin, Health};
use sluice_node::clock::SharedClock;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;
use sluice_node::role::Role;
use sluice_node::shutdown::{Shutdown, Stopped};
use sluice_node::tls;
use sluice_proto::calls::{Leaving, Sessions, Workers as _};
use sluice_redis::RedisConfig;
use sluice_remote::{
    Answers, Caller, CallerConfig, Door, MovingSessions, RemoteSessions, RemoteTenants, RemoteWorkers,
    serve_sessions,
};
use sluice_session::MemorySessions;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::datacenter::StartError;
use crate::live::Live;
use crate::shared::Shared;
use crate::ways::{OtherDc, Ways};

pub use self::aggregator::AggregatorProcess;
use self::worker::Held;
pub use self::worker::{WorkerProcess, WorkerStore};

/// What a worker may take for an answer: longer than it waits itself for everyone whom it asks, one after the other.
const WORKER_PATIENCE: Duration = Duration::from_secs(120);

/// What an aggregator may take for an answer: no longer than a worker waits for it.
const SLOTS_PATIENCE: Duration = Duration::from_secs(30);

/// What a store may take for an answer: whether anybody is there at all is found out otherwise, and large files take their
/// time.
const STORE_PATIENCE: Duration = Duration::from_secs(600);

/// How often workers are asked whether their datacenter hands its clients over.
const ASK_LEAVING: Duration = Duration::from_secs(1);

/// How long they have for that, before they are asked anew.
const LEAVING_PATIENCE: Duration = Duration::from_secs(2);

/// What a session service may take for an answer.
const SESSION_PATIENCE: Duration = Duration::from_secs(5);

/// What a session service may use for calls that arrive.
const SESSION_MEMORY: u64 = 64 << 20;

/// What every process of a role is told.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// The datacenter that it is part of.
    pub dc: DcId,
    /// Certificates and keys: those of its role.
    pub material: Arc<ClusterMaterial>,
    /// Where probes and scrapers ask.
    pub admin: SocketAddr,
    /// What time it is.
    pub clock: SharedClock,
    /// Where the processes of its datacenter share what they have to.
    pub redis: Option<RedisConfig>,
}

/// What an edge is told beside.
#[derive(Clone, Debug)]
pub struct EdgeProcess {
    /// Where clients come in.
    pub listen: SocketAddr,
    /// `host:port` of the session services.
    pub sessions: String,
    /// `host:port` of the workers.
    pub workers: String,
    /// Bytes of memory for bodies in flight.
    pub memory: u64,
    /// What it spends otherwise.
    pub settings: EdgeSettings,
}

/// What a session service is told beside.
#[derive(Clone, Debug)]
pub struct SessionProcess {
    /// Where edges ask.
    pub listen: SocketAddr,
    /// `host:port` of the workers, who know when contexts are to be renewed elsewhere.
    pub workers: Option<String>,
    /// Where that is.
    pub others: Vec<OtherDc>,
}

/// A running process of one role.
pub struct Process {
    live: Live,
    tasks: Tasks,
    listens: SocketAddr,
    admin: SocketAddr,
    /// What a worker holds: closed last.
    held: Option<Held>,
}

/// What runs, by the order in which it ends.
#[derive(Debug, Default)]
struct Tasks {
    requests: Shutdown,
    /// What it does for others of its datacenter, whom its requests may need.
    inside: Shutdown,
    /// Connections to whom it asks: they end when nobody asks any more.
    callers: Shutdown,
    admin: Shutdown,
    /// The way to Redis: it ends last, too.
    shared: Shutdown,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Process({} tasks)", self.tasks.requests.tasks())
    }
}

impl Process {
    /// Starts an edge. It serves when this returns, whether or not there is anyone yet whom it can ask.
    pub async fn edge(config: &ProcessConfig, edge: &EdgeProcess) -> Result<Self, StartError> {
        tls::install_provider();
        let ProcessConfig { dc, material, clock, .. } = config;
        let tasks = Tasks::default();
        let (live, health, admin) = config.admin(edge.memory, &tasks).await?;
        let caller = |whom, address: &str, patience| {
            config.caller(Role::Edge, whom, address, patience, &tasks, &live.metrics)
        };
        let revocations = Revocations::new();
        if let Some(shared) = config.share(&live, &tasks).await? {
            shared.learn(revocations.clone());
        }
        let verifier = ContextVerifier::new(material, *dc, clock.clone(), revocations);
        let sessions = RemoteSessions::new(
            caller(Role::Session, &edge.sessions, SESSION_PATIENCE)?,
            Arc::new(verifier),
            clock.clone(),
        );
        let worker = caller(Role::Worker, &edge.workers, WORKER_PATIENCE)?;
        let leaving = watch_leaving(RemoteWorkers::new(worker.clone()), &tasks.requests);
        let door = Edge::bind(
            EdgeConfig {
                listen: edge.listen,
                dc: config.name(),
                tls: tls::edge_server(material, clock.clone())?,
                settings: edge.settings.clone(),
            },
            EdgeParts {
                sessions: Arc::new(sessions),
                workers: Arc::new(RemoteWorkers::new(worker.clone())),
                tenants: Arc::new(RemoteTenants::new(worker)),
                memory: live.memory.clone(),
                metrics: live.metrics.clone(),
                health: health.clone(),
                leaving,
            },
        )?;
        let listens = door.address();
        health.set_started();
        door.serve(&tasks.requests);
        Ok(Self { live, tasks, listens, admin, held: None })
    }

    /// Starts a session service.
    pub async fn session(config: &ProcessConfig, session: &SessionProcess) -> Result<Self, StartError> {
        tls::install_provider();
        let ProcessConfig { dc, material, clock, .. } = config;
        let (revocations, tasks) = (Revocations::new(), Tasks::default());
        let sessions = MemorySessions::new(*dc, material, clock.clone(), revocations.clone())?;
        let door = Door::bind(session.listen, material, *dc, Role::Session)?;
        let listens = door.address().map_err(|source| StartError::of_port(session.listen, source))?;
        let (live, health, admin) = config.admin(SESSION_MEMORY, &tasks).await?;
        let access = Arc::new(ContextVerifier::new(material, *dc, clock.clone(), revocations.clone()));
        let sessions = match config.share(&live, &tasks).await? {
            Some(shared) => sessions.noted_in(shared.records(shared.learn(revocations))),
            None => sessions,
        };
        let own: Arc<dyn Sessions> = Arc::new(sessions);
        let moving = match &session.workers {
            Some(address) => {
                let (me, whom) = (Role::Session, Role::Worker);
                let workers = config.caller(me, whom, address, SESSION_PATIENCE, &tasks, &live.metrics)?;
                let leaving = watch_leaving(RemoteWorkers::new(workers), &tasks.requests);
                let ways = Ways { dc: *dc, me, material, tasks: &tasks.callers, metrics: &live.metrics };
                let others = ways.sessions(&session.others, &access, clock)?;
                Arc::new(MovingSessions::new(own.clone(), others, leaving, access, &live.metrics))
            }
            None => own.clone(),
        };
        let answer = |sessions| {
            let (memory, tasks) = (live.memory.clone(), tasks.requests.clone());
            Answers { routes: serve_sessions(sessions), memory, tasks }
        };
        // Who asks for others is answered by this datacenter's own: what is passed goes no further.
        let passed = [Role::Session, Role::Worker].map(|caller| (caller, answer(own.clone())));
        door.taking(passed).serve([(Role::Edge, answer(moving))], &tasks.requests);
        serve_until_drained(&health, &tasks);
        Ok(Self { live, tasks, listens, admin, held: None })
    }

    /// What can be changed while it runs.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// Where it listens for whoever asks it.
    pub fn address(&self) -> SocketAddr {
        self.listens
    }

    /// Where its admin port is.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// Finishes the requests in flight, in `deadline`. What has not ended by then is killed.
    pub async fn stop(self, deadline: Duration) -> Stopped {
        let until = Instant::now() + deadline;
        let mut killed = 0;
        let left = || until.saturating_duration_since(Instant::now()).max(Duration::from_millis(200));
        for tasks in [&self.tasks.requests, &self.tasks.inside, &self.tasks.admin] {
            if let Stopped::Killed { tasks } = tasks.stop(left()).await {
                killed += tasks;
            }
        }
        self.tasks.callers.kill().await;
        self.tasks.shared.kill().await;
        match self.held {
            Some(Held::Store(store, _)) => match tokio::time::timeout(left(), store.as_dyn().close()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the store was not closed in order"),
                Err(_) => tracing::warn!("the store was not closed in time"),
            },
            Some(Held::Bucket(store)) => store.close(),
            None => {}
        }
        if killed == 0 { Stopped::Clean } else { Stopped::Killed { tasks: killed } }
    }
}

/// Asks the workers now and then where clients should go.
fn watch_leaving(workers: RemoteWorkers, tasks: &Shutdown) -> watch::Receiver<Leaving> {
    let (sender, receiver) = watch::channel(Leaving::default());
    let owner = tasks.clone();
    tasks.spawn(async move {
        loop {
            // While they cannot be asked, what they said last counts.
            if let Ok(Ok(leaving)) = tokio::time::timeout(LEAVING_PATIENCE, workers.leaving()).await {
                sender.send_if_modified(|known| {
                    let changed = *known != leaving;
                    *known = leaving;
                    changed
                });
            }
            tokio::select! {
                () = owner.draining() => return,
                () = tokio::time::sleep(ASK_LEAVING) => {}
            }
        }
    });
    receiver
}

impl ProcessConfig {
    /// Name of the datacenter.
    pub fn name(&self) -> String {
        self.material.dc_name(self.dc).unwrap_or("unnamed").to_owned()
    }

    /// What it shares with the others of its datacenter, if that is configured.
    async fn share(&self, live: &Live, tasks: &Tasks) -> Result<Option<Shared>, StartError> {
        let Some(redis) = &self.redis else { return Ok(None) };
        Ok(Some(Shared::open(redis, &self.material, self.dc, &live.metrics, &tasks.shared).await?))
    }

    /// What calls processes of `whom` at `address`.
    fn caller(
        &self,
        me: Role,
        whom: Role,
        address: &str,
        patience: Duration,
        tasks: &Tasks,
        metrics: &Metrics,
    ) -> Result<Caller, StartError> {
        let (dc, address) = (self.dc, address.to_owned());
        let config = CallerConfig { dc, of: dc, me, whom, address, patience };
        Ok(Caller::new(config, &self.material, &tasks.callers, &metrics.outgoing_calls)?)
    }

    /// What is seen of the process from outside, and can be changed; and where its admin port is.
    async fn admin(&self, memory: u64, tasks: &Tasks) -> Result<(Live, Health, SocketAddr), StartError> {
        let (live, health) = (Live::new(&self.name(), &self.material, memory), Health::new());
        let admin = Admin::open(self.admin, health.clone(), live.metrics.clone(), &tasks.admin).await?;
        Ok((live, health, admin.address()))
    }
}

/// Says that requests are taken, until they no longer are.
fn serve_until_drained(health: &Health, tasks: &Tasks) {
    health.set_started();
    health.set_serving(true);
    let (requests, health) = (tasks.requests.clone(), health.clone());
    tasks.requests.spawn(async move {
        requests.draining().await;
        health.set_serving(false);
    });
}
