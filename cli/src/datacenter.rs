//! One whole datacenter in this process.
//!
//! [`Datacenter::start`] opens the chunk store, starts the aggregator, and opens the edge and the admin port last,
//! when all is loaded. Whoever holds the [`Datacenter`] owns all of it: tasks run on three
//! [`Shutdown`]s, which [`stop`](Datacenter::stop) ends in this order: edge and workers, so that no request is
//! cut; the aggregator, which they ask; the admin port, so that `/readyz` can be seen to fail meanwhile. The chunk
//! store is closed last. [`kill`](Datacenter::kill) ends them where they stand. Dropping it is a kill that waits for
//! nothing but the disk operations under way.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use sluice_aggregator::{
    AggregatorError, AggregatorMetrics, AggregatorParts, AggregatorService, AggregatorSettings, Divided,
    Listener, PeerAddress, PeerPort, SharePart, Traffic,
};
use sluice_client::ExitClass;
use sluice_edge::{Edge, EdgeConfig, EdgeError, EdgeParts, EdgeSettings};
use sluice_engine::ids::DcId;
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::admin::{Admin, AdminError, Health};
use sluice_node::clock::SharedClock;
use sluice_node::material::{ClusterMaterial, MaterialError};
use sluice_node::role::Role;
use sluice_node::shutdown::{Shutdown, Stopped};
use sluice_node::tls::{self, TlsError};
use sluice_proto::calls::{Sessions, Workers};
use sluice_redis::{RedisConfig, RedisError};
use sluice_remote::{
    Answers, Door, DoorError, MovingSessions, RemoteElsewhere, serve_leaving, serve_passed, serve_sessions,
    serve_tenants, serve_workers,
};
use sluice_session::MemorySessions;
use sluice_store::{ChunkStore, FsOptions, FsStore, StoreError};
use sluice_worker::{Rates, Worker, WorkerParts, WorkerSettings};
use tokio::time::Instant;

use crate::live::Live;
use crate::place::{OpenStore, StorePlace};
use crate::ports::ReservedPorts;
use crate::shared::Shared;
use crate::ways::{OtherDc, Ways};

/// What the tasks of an aggregator get to finish, however little of a deadline is left.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What a datacenter spends.
#[derive(Clone, Debug)]
pub struct DatacenterSettings {
    /// Bytes of memory for bodies in flight and chunks read ahead. Default: 256 MiB.
    pub memory: u64,
    /// Settings of the volume, if it keeps its files in one.
    pub store: FsOptions,
    /// Settings of the worker.
    pub worker: WorkerSettings,
    /// Settings of the edge.
    pub edge: EdgeSettings,
    /// Settings of the aggregator.
    pub aggregator: AggregatorSettings,
}

impl Default for DatacenterSettings {
    fn default() -> Self {
        Self {
            memory: 256 << 20,
            store: FsOptions::default(),
            worker: WorkerSettings::default(),
            edge: EdgeSettings::default(),
            aggregator: AggregatorSettings::default(),
        }
    }
}

/// What makes a datacenter the one it is; kept, it starts again and again.
#[derive(Clone, Debug)]
pub struct DatacenterConfig {
    /// Which one.
    pub dc: DcId,
    /// Certificates and keys: its own, and the public halves of the others'.
    pub material: Arc<ClusterMaterial>,
    /// Where it keeps its files.
    pub place: StorePlace,
    /// Where it listens.
    pub ports: Arc<ReservedPorts>,
    /// Where edges of other processes find its workers; `None`: it has no others.
    pub inside: Option<SocketAddr>,
    /// Where clients find it, unless that is where it listens.
    pub url: Option<String>,
    /// The other datacenters.
    pub peers: Vec<PeerAddress>,
    /// Where they take what moves there.
    pub others: Vec<OtherDc>,
    /// What time it is.
    pub clock: SharedClock,
    /// Where its processes share what they have to; `None`: each counts for itself.
    pub redis: Option<RedisConfig>,
    /// What it spends.
    pub settings: DatacenterSettings,
}

impl DatacenterConfig {
    /// Name of the datacenter.
    pub fn name(&self) -> &str {
        self.material.dc_name(self.dc).unwrap_or("unnamed")
    }

    /// Where clients find it.
    pub fn url(&self) -> String {
        self.url.clone().unwrap_or_else(|| format!("https://{}", reachable(self.ports.edge.address())))
    }

    /// Where its admin port is.
    pub fn admin_url(&self) -> String {
        format!("http://{}", reachable(self.ports.admin.address()))
    }
}

/// An address that one can connect to from here: loopback for one that means every interface.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        SocketAddr::V4(_) | SocketAddr::V6(_) => address.ip(),
    };
    SocketAddr::new(ip, address.port())
}

/// Why a datacenter does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Somebody else listens on a port.
    #[error("{address} is in use")]
    Busy {
        /// Where.
        address: SocketAddr,
    },
    /// A port cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The data directory may not be written.
    #[error("{} cannot be written: {source}", path.display())]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The data directory may not be read.
    #[error("{} cannot be read: {source}", path.display())]
    NotReadable {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The data directory is no directory, or cannot be made.
    #[error("{} cannot be used as a data directory: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The chunk store does not open.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The bucket cannot be used.
    #[error(transparent)]
    Bucket(StoreError),
    /// Keys or certificates are missing or garbled.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// TLS does not take them.
    #[error("TLS cannot be set up: {reason}")]
    Tls {
        /// What it says.
        reason: String,
    },
    /// Redis refuses us.
    #[error(transparent)]
    Redis(#[from] RedisError),
    /// The aggregator does not start.
    #[error("the aggregator does not start: {reason}")]
    Aggregator {
        /// What it says.
        reason: String,
    },
    /// A bug.
    #[error("a task of the datacenter failed: {cause}")]
    Task {
        /// What is known of it.
        cause: String,
    },
}

impl StartError {
    /// That `address` is not to be had.
    pub(crate) fn of_port(address: SocketAddr, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::Busy { address },
            _ => Self::Listen { address, source },
        }
    }

    /// That a directory cannot be used.
    pub fn of_directory(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::NotWritable { path, source }
            }
            _ => Self::Directory { path, source },
        }
    }

    /// That a directory cannot be read.
    pub fn of_reading(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::NotReadable { path, source },
            _ => Self::Directory { path, source },
        }
    }

    /// The word that names the kind of error.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Busy { .. } => "port-in-use",
            Self::Listen { .. } => "listen",
            Self::NotWritable { .. } => "data-not-writable",
            Self::NotReadable { .. } => "data-not-readable",
            Self::Directory { .. } => "data-directory",
            Self::Store(StoreError::InUse { .. }) => "data-in-use",
            Self::Store(StoreError::NewerVersion { .. }) => "data-newer",
            Self::Store(StoreError::Unreadable { .. }) => "data-unreadable",
            Self::Store(_) => "data",
            Self::Bucket(StoreError::NoRight { .. }) => "bucket-right",
            Self::Bucket(StoreError::Unreachable { .. }) => "bucket-unreachable",
            Self::Bucket(_) => "bucket",
            Self::Material(_) | Self::Tls { .. } => "material",
            Self::Redis(_) => "redis",
            Self::Aggregator { .. } => "aggregator",
            Self::Task { .. } => "internal",
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Busy { .. } => Some("stop what listens there, or listen on another port"),
            Self::Listen { .. } => Some("listen on an address of this machine"),
            Self::NotWritable { .. } | Self::NotReadable { .. } => {
                Some("change its owner or mode, or use another directory")
            }
            Self::Directory { .. } => Some("use another directory"),
            Self::Store(StoreError::InUse { .. }) => Some("stop that process, or use another directory"),
            Self::Store(StoreError::NewerVersion { .. }) => {
                Some("use the newer version of sluice that wrote it")
            }
            Self::Store(StoreError::Unreadable { .. }) => {
                Some("restore the directory, or use another one and upload again")
            }
            Self::Redis(_) => Some("check redis and redis_password in the configuration"),
            Self::Bucket(StoreError::NoRight { .. }) => {
                Some("allow it in the policy of these credentials, or use others")
            }
            Self::Bucket(StoreError::Unreachable { .. }) => {
                Some("see whether the server runs, and whether endpoint and region are its own")
            }
            Self::Bucket(_) => Some("name a bucket that exists, and a prefix that nobody else uses"),
            Self::Material(_) => Some("restore the keys from a copy, or begin with another directory"),
            Self::Store(_) | Self::Tls { .. } | Self::Aggregator { .. } | Self::Task { .. } => None,
        }
    }

    /// How a process that fails with it should end.
    pub fn exit_class(&self) -> ExitClass {
        match self {
            Self::Busy { .. } => ExitClass::TryLater,
            Self::Listen { .. } | Self::Directory { .. } => ExitClass::Usage,
            Self::NotWritable { .. } | Self::NotReadable { .. } | Self::Redis(_) => ExitClass::NotAllowed,
            Self::Store(StoreError::InUse { .. } | StoreError::Full { .. }) => ExitClass::TryLater,
            Self::Store(StoreError::NewerVersion { .. }) => ExitClass::Usage,
            Self::Store(StoreError::Unreadable { .. } | StoreError::Corrupt { .. }) => ExitClass::Integrity,
            Self::Material(MaterialError::Garbled { .. } | MaterialError::Missing { .. }) => {
                ExitClass::Integrity
            }
            Self::Bucket(StoreError::NoRight { .. }) => ExitClass::NotAllowed,
            Self::Bucket(StoreError::Unreachable { .. }) => ExitClass::TryLater,
            Self::Bucket(StoreError::Unreadable { .. }) => ExitClass::Usage,
            Self::Store(_)
            | Self::Bucket(_)
            | Self::Material(_)
            | Self::Tls { .. }
            | Self::Aggregator { .. }
            | Self::Task { .. } => ExitClass::Unexpected,
        }
    }
}

impl From<TlsError> for StartError {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::Material(error) => error.into(),
            TlsError::Refused { .. } => Self::Tls { reason: error.to_string() },
        }
    }
}

impl From<EdgeError> for StartError {
    fn from(error: EdgeError) -> Self {
        match error {
            EdgeError::Busy { address } => Self::Busy { address },
            EdgeError::Listen { address, source } => Self::Listen { address, source },
        }
    }
}

impl From<DoorError> for StartError {
    fn from(error: DoorError) -> Self {
        match error {
            DoorError::Listen { address, source } => Self::of_port(address, source),
            DoorError::Tls(error) => error.into(),
        }
    }
}

impl From<AdminError> for StartError {
    fn from(AdminError { address, source }: AdminError) -> Self {
        Self::of_port(address, source)
    }
}

impl From<AggregatorError> for StartError {
    fn from(error: AggregatorError) -> Self {
        match error {
            AggregatorError::Busy { address } => Self::Busy { address },
            AggregatorError::Material(error) => error.into(),
            AggregatorError::Tls(error) => error.into(),
            AggregatorError::Store(error) => error.into(),
            AggregatorError::Listen { .. }
            | AggregatorError::Memory(_)
            | AggregatorError::Peer(_)
            | AggregatorError::Stopped => Self::Aggregator { reason: error.to_string() },
        }
    }
}

/// A running datacenter.
pub struct Datacenter {
    store: OpenStore,
    /// One for each share, the first first.
    aggregators: Vec<Arc<AggregatorService>>,
    live: Live,
    health: Health,
    tasks: Tasks,
}

/// What runs, by the order in which it ends.
#[derive(Clone, Debug, Default)]
struct Tasks {
    requests: Shutdown,
    /// Connections to other datacenters' workers: they end when nobody passes anything on any more.
    callers: Shutdown,
    aggregator: Shutdown,
    admin: Shutdown,
    /// The way to Redis: killed when nobody is served any more.
    shared: Shutdown,
}

impl fmt::Debug for Datacenter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Datacenter({} tasks)", self.tasks.requests.tasks() + self.tasks.aggregator.tasks())
    }
}

impl Datacenter {
    /// Starts a datacenter. When this returns it serves; when it fails nothing of it is left.
    pub async fn start(config: &DatacenterConfig) -> Result<Self, StartError> {
        let live = Live::new(config.name(), &config.material, config.settings.memory);
        let store = config.place.open(config.settings.store.clone(), &live.metrics).await?;
        let mut datacenter =
            Self { store, aggregators: Vec::new(), live, health: Health::new(), tasks: Tasks::default() };
        match datacenter.open(config).await {
            Ok(()) => Ok(datacenter),
            Err(error) => {
                datacenter.kill().await;
                Err(error)
            }
        }
    }

    async fn open(&mut self, config: &DatacenterConfig) -> Result<(), StartError> {
        tls::install_provider();
        let DatacenterConfig { dc, material, ports, peers, clock, settings, .. } = config;
        let dc = *dc;
        let name = config.name().to_owned();
        let Live { metrics, memory, .. } = self.live.clone();
        Admin::open(ports.admin.address(), self.health.clone(), metrics.clone(), &self.tasks.admin).await?;
        let revocations = Revocations::new();
        let shared = match &config.redis {
            Some(redis) => Some(Shared::open(redis, material, dc, &metrics, &self.tasks.shared).await?),
            None => None,
        };
        let access = Arc::new(ContextVerifier::new(material, dc, clock.clone(), revocations.clone()));
        let sessions = MemorySessions::new(dc, material, clock.clone(), revocations.clone())?;
        // Here everything that is revoked is known from the start, from the own disk.
        let sessions = match &shared {
            Some(shared) => sessions.noted_in(shared.records(tokio::sync::watch::channel(true).1)),
            None => sessions,
        };
        let listener = Listener::bind(ports.peer.address())?;
        let port = PeerPort::open(listener, material, dc, &self.tasks.aggregator)?;
        let counts = AggregatorMetrics::new(&metrics, dc, material);
        let mut parts = BTreeMap::new();
        for share in material.shares().all() {
            let parts_of = AggregatorParts {
                dc,
                share,
                material: material.clone(),
                store: self.store().clone(),
                access: access.clone(),
                revocations: revocations.clone(),
                metrics: counts.clone(),
                clock: clock.clone(),
                tasks: self.tasks.aggregator.clone(),
                scrub_rate: self.live.scrub_rate(),
                settings: settings.aggregator,
            };
            let service =
                sluice_aggregator::start(parts_of, &port, Some(config.url()), peers.clone()).await?;
            parts.insert(share, SharePart { slots: service.clone(), tenants: service.clone() });
            self.aggregators.push(service);
        }
        let first = self.aggregators.first().cloned();
        let aggregator = first.ok_or(StartError::Task { cause: "no share of the slots".into() })?;
        let SharePart { slots, tenants } = Divided::over(parts, access.clone());
        if let Some(shared) = &shared {
            shared.teach(revocations, &self.tasks.shared);
        }
        let ways = Ways { dc, me: Role::Worker, material, tasks: &self.tasks.callers, metrics: &metrics };
        let elsewhere = RemoteElsewhere::new(ways.workers(&config.others)?, aggregator.standings(), &metrics);
        let own: Arc<dyn Sessions> = Arc::new(sessions);
        let others = ways.sessions(&config.others, &access, clock)?;
        let moving = MovingSessions::new(own.clone(), others, aggregator.leaving(), access.clone(), &metrics);
        let worker = Worker::new(
            WorkerParts {
                dc: name.clone(),
                store: self.store().clone(),
                slots,
                access,
                memory: memory.clone(),
                metrics: metrics.clone(),
                elsewhere: Some(Arc::new(elsewhere)),
                tasks: self.tasks.requests.clone(),
                rates: Arc::new(Rates::new(clock.clone(), shared.as_ref().map(Shared::buckets))),
            },
            settings.worker.clone(),
        );
        self.live = self.live.clone().taking(worker.upload_rate(), settings.worker.upload_rate);
        self.live.set_scrub_rate(settings.aggregator.scrub_rate);
        let worker = Arc::new(worker);
        worker.show();
        let loaded = worker.clone();
        aggregator.report(move || loaded.says());
        let worker: Arc<dyn Workers> = worker;
        let inside =
            config.inside.map(|address| Door::bind(address, material, dc, Role::Worker)).transpose()?;
        let edge = Edge::bind(
            EdgeConfig {
                listen: ports.edge.address(),
                dc: name,
                tls: tls::edge_server(material, clock.clone())?,
                settings: settings.edge.clone(),
            },
            EdgeParts {
                sessions: Arc::new(moving),
                workers: worker.clone(),
                tenants: tenants.clone(),
                memory: memory.clone(),
                metrics,
                health: self.health.clone(),
                leaving: aggregator.leaving(),
            },
        )?;
        self.health.set_started();
        if let Some(door) = inside {
            let tasks = self.tasks.requests.clone();
            let answer = |routes| Answers { routes, memory: memory.clone(), tasks: tasks.clone() };
            let passed = [
                (Role::Worker, answer(serve_passed(worker.clone()).merge(serve_sessions(own.clone())))),
                (Role::Session, answer(serve_sessions(own))),
            ];
            let edges = answer(serve_workers(worker.clone()).merge(serve_tenants(tenants)));
            let answers = [(Role::Edge, edges), (Role::Session, answer(serve_leaving(worker)))];
            door.taking(passed).serve(answers, &self.tasks.requests);
        }
        edge.serve(&self.tasks.requests);
        Ok(())
    }

    /// What can be changed while it runs.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// What it has sent to and pulled from other datacenters since it started.
    pub fn traffic(&self) -> Traffic {
        // They count together.
        self.aggregators.first().map(|aggregator| aggregator.traffic()).unwrap_or_default()
    }

    /// Its chunk store.
    pub fn store(&self) -> &Arc<dyn ChunkStore> {
        self.store.as_dyn()
    }

    /// Finishes the requests in flight and what the aggregator has begun, and closes the volume, all in `deadline`
    /// and a moment. What has not ended by then is killed; nothing acknowledged is lost by that.
    pub async fn stop(self, deadline: Duration) -> Stopped {
        let until = Instant::now() + deadline;
        let left = || until.saturating_duration_since(Instant::now()).max(LAST_WORDS);
        let mut killed = 0;
        for tasks in [&self.tasks.requests, &self.tasks.aggregator, &self.tasks.admin] {
            if let Stopped::Killed { tasks } = tasks.stop(left()).await {
                killed += tasks;
            }
        }
        match tokio::time::timeout(left(), self.store().close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the store was not closed in order"),
            Err(_) => tracing::warn!("the store was not closed in time"),
        }
        self.kill().await;
        if killed == 0 { Stopped::Clean } else { Stopped::Killed { tasks: killed } }
    }

    /// Ends it at once, as a power cut would: nothing more is answered, told to peers, or written.
    pub async fn kill(self) {
        self.tasks.requests.kill().await;
        self.tasks.callers.kill().await;
        self.tasks.aggregator.kill().await;
        self.tasks.admin.kill().await;
        self.tasks.shared.kill().await;
        let store = self.store.clone();
        // A panic in there has been reported by the panic hook, and ends nothing less.
        let _ = tokio::task::spawn_blocking(move || store.kill()).await;
    }
}

impl Drop for Datacenter {
    fn drop(&mut self) {
        let Tasks { requests, callers, aggregator, admin, shared } = &self.tasks;
        for tasks in [requests, callers, aggregator, admin, shared] {
            // Asked once, a kill has told every task; only the wait for their ends is left out.
            let _ = tasks.kill().now_or_never();
        }
        self.store.kill();
    }
}

/// Opens the volume in `directory`, which is made if need be.
pub(crate) async fn open_store(directory: PathBuf, options: FsOptions) -> Result<FsStore, StartError> {
    let open = move || {
        let failed = |source| StartError::of_directory(&directory, source);
        std::fs::create_dir_all(&directory).map_err(failed)?;
        let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
        rustix::fs::access(&directory, access).map_err(|error| failed(error.into()))?;
        Ok(FsStore::open(&directory, options)?)
    };
    let opened = tokio::task::spawn_blocking(open).await;
    opened.unwrap_or_else(|error| Err(StartError::Task { cause: error.to_string() }))
}
