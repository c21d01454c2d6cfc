//! The files that describe processes of one role. Everything in one is checked before anything starts.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use sluice::datacenter::StartError;
use sluice::process::{
    AggregatorProcess, EdgeProcess, Process, ProcessConfig, SessionProcess, WorkerProcess, WorkerStore,
};
use sluice_aggregator::AggregatorSettings;
use sluice_edge::EdgeSettings;
use sluice_node::clock::SystemClock;
use sluice_node::material::ClusterMaterial;
use sluice_node::role::Role;
use sluice_node::telemetry;
use sluice_store::FsOptions;
use sluice_worker::WorkerSettings;

use crate::certificates;
use crate::failure::Failure;
use crate::kept::{self, Store};
use crate::length::{Length, Takeover};
use crate::peers::{self, Linked, Way};
use crate::reload::ConfigFile;
use crate::settings;
use crate::size::Bytes;

const EDGE_KEYS: &str =
    "role, dc, keys, listen, admin, sessions, workers, memory, redis, redis_password, redis_ca, log";
const SESSION_KEYS: &str =
    "role, dc, keys, listen, admin, workers, redis, redis_password, redis_ca, log, peers";
const WORKER_KEYS: &str = "role, dc, keys, listen, admin, aggregators, data, store, keeper, memory, upload_rate, redis, redis_password, redis_ca, log, peers";
const AGGREGATOR_KEYS: &str = "role, dc, keys, listen, peer, admin, workers, url, memory, scrub_rate, \
                               takeover_after, absent_after, redis, redis_password, redis_ca, log, peers";

/// What an edge or a worker may use for bodies in flight, unless its file says otherwise.
const MEMORY: Bytes = Bytes(256 << 20);

/// What an aggregator may use for calls that arrive, unless its file says otherwise.
const CALLS_MEMORY: Bytes = Bytes(64 << 20);

/// What a file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RoleFile {
    Edge(EdgeFile),
    Session(SessionFile),
    Worker(WorkerFile),
    Aggregator(AggregatorFile),
}

/// What every file says first.
#[derive(Deserialize)]
struct Of {
    role: RoleName,
}

/// The name of a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RoleName {
    Edge,
    Session,
    Worker,
    Aggregator,
}

/// An edge.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EdgeFile {
    role: RoleName,
    dc: String,
    keys: PathBuf,
    listen: SocketAddr,
    admin: SocketAddr,
    sessions: String,
    workers: String,
    #[serde(default = "memory")]
    memory: Bytes,
    redis: Option<String>,
    redis_password: Option<PathBuf>,
    redis_ca: Option<PathBuf>,
    #[serde(default = "warn")]
    log: String,
}

/// A session service.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SessionFile {
    role: RoleName,
    dc: String,
    keys: PathBuf,
    listen: SocketAddr,
    admin: SocketAddr,
    /// Whom it asks where clients go, if contexts should be renewed there.
    workers: Option<String>,
    redis: Option<String>,
    redis_password: Option<PathBuf>,
    redis_ca: Option<PathBuf>,
    #[serde(default = "warn")]
    log: String,
    /// Where other datacenters take what moves there, by name.
    #[serde(default)]
    peers: BTreeMap<String, Way>,
}

/// The worker that keeps a volume, or the prefix of a bucket; or a porter beside that one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WorkerFile {
    role: RoleName,
    dc: String,
    keys: PathBuf,
    listen: SocketAddr,
    admin: SocketAddr,
    /// Whom it asks about files, if it keeps them.
    aggregators: Option<String>,
    /// The worker that keeps the bucket, if it does not.
    keeper: Option<String>,
    /// The directory of its volume, if it keeps its files in one.
    data: Option<PathBuf>,
    /// Where else it keeps them.
    store: Option<Store>,
    #[serde(default = "memory")]
    memory: Bytes,
    upload_rate: Option<Bytes>,
    redis: Option<String>,
    redis_password: Option<PathBuf>,
    redis_ca: Option<PathBuf>,
    #[serde(default = "warn")]
    log: String,
    /// Where other datacenters take what moves there, by name.
    #[serde(default)]
    peers: BTreeMap<String, Way>,
}

/// An aggregator.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AggregatorFile {
    role: RoleName,
    dc: String,
    keys: PathBuf,
    listen: SocketAddr,
    peer: SocketAddr,
    admin: SocketAddr,
    workers: String,
    url: Option<String>,
    #[serde(default = "calls_memory")]
    memory: Bytes,
    scrub_rate: Option<Bytes>,
    takeover_after: Option<Takeover>,
    absent_after: Option<Length>,
    redis: Option<String>,
    redis_password: Option<PathBuf>,
    redis_ca: Option<PathBuf>,
    #[serde(default = "warn")]
    log: String,
    /// Every other datacenter, by name.
    #[serde(default)]
    peers: BTreeMap<String, Linked>,
}

fn memory() -> Bytes {
    MEMORY
}

fn calls_memory() -> Bytes {
    CALLS_MEMORY
}

fn warn() -> String {
    "warn".to_owned()
}

/// A field that all files have.
macro_rules! of_all {
    ($file:expr, $field:ident) => {
        match $file {
            RoleFile::Edge(EdgeFile { $field, .. })
            | RoleFile::Session(SessionFile { $field, .. })
            | RoleFile::Worker(WorkerFile { $field, .. })
            | RoleFile::Aggregator(AggregatorFile { $field, .. }) => $field,
        }
    };
}

impl ConfigFile for RoleFile {
    /// Paths in it are relative to its directory.
    fn read(path: &Path) -> anyhow::Result<Self> {
        let missing = || {
            let message = format!("{} does not exist", path.display());
            Failure::usage("configuration", message, "give the path of a file")
        };
        let Of { role } = settings::parse(path, "role, and those of the role")?.ok_or_else(missing)?;
        let mut file = match role {
            RoleName::Edge => Self::Edge(settings::parse(path, EDGE_KEYS)?.ok_or_else(missing)?),
            RoleName::Session => Self::Session(settings::parse(path, SESSION_KEYS)?.ok_or_else(missing)?),
            RoleName::Worker => Self::Worker(settings::parse(path, WORKER_KEYS)?.ok_or_else(missing)?),
            RoleName::Aggregator => {
                Self::Aggregator(settings::parse(path, AGGREGATOR_KEYS)?.ok_or_else(missing)?)
            }
        };
        let directory = path.parent().unwrap_or(Path::new(""));
        let keys = of_all!(&mut file, keys);
        *keys = directory.join(&*keys);
        if let Some(path) = of_all!(&mut file, redis_password) {
            *path = directory.join(&*path);
        }
        if let Some(path) = of_all!(&mut file, redis_ca) {
            *path = directory.join(&*path);
        }
        if let Self::Worker(WorkerFile { data, store, .. }) = &mut file {
            *data = data.take().map(|data| directory.join(data));
            if let Some(store) = store {
                store.relative_to(directory);
            }
        }
        Ok(file)
    }

    /// Whether the datacenter is one of the keys', and the keys are those of the role. Takes nothing that a process which
    /// runs from this file has.
    fn check(&self) -> anyhow::Result<()> {
        telemetry::check(self.log()).map_err(|error| {
            Failure::usage("configuration", format!("log: {error}"), "such as warn or info")
        })?;
        settings::check_memory(self.memory())?;
        let (config, material) = self.config()?;
        match self {
            Self::Aggregator(file) => file.process(&config, &material).map(|_| ()),
            Self::Worker(file) => file.process(&config, &material).map(|_| ()),
            Self::Session(file) => file.process(&config, &material).map(|_| ()),
            Self::Edge(_) => Ok(()),
        }
    }

    fn keys(&self) -> &Path {
        of_all!(self, keys)
    }

    fn log(&self) -> &str {
        of_all!(self, log)
    }

    fn memory(&self) -> Option<u64> {
        match self {
            Self::Edge(EdgeFile { memory: Bytes(memory), .. })
            | Self::Worker(WorkerFile { memory: Bytes(memory), .. })
            | Self::Aggregator(AggregatorFile { memory: Bytes(memory), .. }) => Some(*memory),
            Self::Session(_) => None,
        }
    }

    fn upload_rate(&self) -> Option<u64> {
        match self {
            Self::Worker(file) => file.upload_rate.map(|Bytes(rate)| rate),
            Self::Edge(_) | Self::Session(_) | Self::Aggregator(_) => None,
        }
    }

    fn scrub_rate(&self) -> Option<u64> {
        let default = AggregatorSettings::default().scrub_rate;
        match self {
            Self::Aggregator(file) => Some(file.scrub_rate.map_or(default, |Bytes(rate)| rate)),
            Self::Edge(_) | Self::Session(_) | Self::Worker(_) => None,
        }
    }

    fn is_like(&self, other: &Self) -> bool {
        let mut same = self.clone();
        of_all!(&mut same, log).clone_from(of_all!(other, log));
        match (&mut same, other) {
            (Self::Edge(same), Self::Edge(other)) => same.memory = other.memory,
            (Self::Worker(same), Self::Worker(other)) => {
                (same.memory, same.upload_rate) = (other.memory, other.upload_rate);
            }
            (Self::Aggregator(same), Self::Aggregator(other)) => {
                (same.memory, same.scrub_rate) = (other.memory, other.scrub_rate);
            }
            (Self::Edge(_) | Self::Session(_) | Self::Worker(_) | Self::Aggregator(_), _) => {}
        }
        same == *other
    }
}

impl RoleFile {
    /// Name of the datacenter.
    pub(crate) fn dc(&self) -> &str {
        of_all!(self, dc)
    }

    /// What the process is for.
    pub(crate) fn role(&self) -> Role {
        match self {
            Self::Edge(_) => Role::Edge,
            Self::Session(_) => Role::Session,
            Self::Worker(_) => Role::Worker,
            Self::Aggregator(_) => Role::Aggregator,
        }
    }

    /// Whom of its datacenter it asks: the key, and where they are.
    fn whom(&self) -> Vec<(&'static str, &str)> {
        let all = match self {
            Self::Edge(file) => vec![("sessions", Some(&file.sessions)), ("workers", Some(&file.workers))],
            Self::Session(file) => vec![("workers", file.workers.as_ref())],
            Self::Worker(file) => {
                vec![("aggregators", file.aggregators.as_ref()), ("keeper", file.keeper.as_ref())]
            }
            Self::Aggregator(file) => vec![("workers", Some(&file.workers))],
        };
        all.into_iter().filter_map(|(key, address)| Some((key, address?.as_str()))).collect()
    }

    /// Starts the process.
    pub(crate) async fn start(&self) -> anyhow::Result<Process> {
        let (config, material) = self.config()?;
        Ok(match self {
            Self::Edge(EdgeFile { listen, sessions, workers, memory: Bytes(memory), .. }) => {
                let edge = EdgeProcess {
                    listen: *listen,
                    sessions: sessions.clone(),
                    workers: workers.clone(),
                    memory: *memory,
                    settings: EdgeSettings::default(),
                };
                Process::edge(&config, &edge).await?
            }
            Self::Session(file) => Process::session(&config, &file.process(&config, &material)?).await?,
            Self::Worker(file) => Process::worker(&config, &file.process(&config, &material)?).await?,
            Self::Aggregator(file) => {
                Process::aggregator(&config, &file.process(&config, &material)?).await?
            }
        })
    }

    /// What the process is told, and all of the keys that were read for it.
    fn config(&self) -> anyhow::Result<(ProcessConfig, ClusterMaterial)> {
        let (name, keys, admin) = (of_all!(self, dc), self.keys(), of_all!(self, admin));
        let all = ClusterMaterial::load(keys).map_err(StartError::from)?;
        let Some(dc) = all.dc_named(name) else {
            return Err(peers::unknown("dc", name, keys, &all).into());
        };
        // What it has no need of is not kept in memory either.
        let material = all.only_role(dc, self.role()).map_err(StartError::from)?;
        let lacks = match self {
            Self::Edge(_) => material.edge_identity().and(material.ticket_secrets().map(|_| ())).err(),
            Self::Session(_) => material.context_key(dc).err(),
            Self::Worker(_) => None,
            Self::Aggregator(_) => {
                material.peer_identity(dc).map(|_| ()).and(material.command_key(dc).map(|_| ())).err()
            }
        };
        if let Some(error) = material.role_identity(dc, self.role()).err().or(lacks) {
            let hint = format!("`sluice admin key make` makes roles/{name}/{} for it", self.role());
            return Err(Failure::usage("keys", format!("{}: {error}", keys.display()), hint).into());
        }
        certificates::check(&material, keys)?;
        for (key, address) in self.whom() {
            peers::check_address(key, address)?;
        }
        let (password, ca) = (of_all!(self, redis_password), of_all!(self, redis_ca));
        let redis = settings::redis(of_all!(self, redis).as_deref(), password.as_deref(), ca.as_deref())?;
        let clock = SystemClock::shared();
        let config = ProcessConfig { dc, material: Arc::new(material), admin: *admin, clock, redis };
        Ok((config, all))
    }
}

impl SessionFile {
    /// What the process is told beside.
    fn process(&self, config: &ProcessConfig, material: &ClusterMaterial) -> anyhow::Result<SessionProcess> {
        let others = peers::ways(&self.peers, &config.name(), &self.keys, material)?;
        if !others.is_empty() && self.workers.is_none() {
            let message = "peers are given, and not whom to ask when to go there";
            let hint = "add workers = \"host:port\", those of the datacenter itself";
            return Err(Failure::usage("configuration", message, hint).into());
        }
        Ok(SessionProcess { listen: self.listen, workers: self.workers.clone(), others })
    }
}

impl WorkerFile {
    /// What the process is told beside.
    fn process(&self, config: &ProcessConfig, material: &ClusterMaterial) -> anyhow::Result<WorkerProcess> {
        let upload_rate = self.upload_rate.map(|Bytes(rate)| rate);
        let (data, store) = (self.data.as_deref(), self.store.as_ref());
        let store = match (&self.aggregators, &self.keeper) {
            (Some(aggregators), None) => WorkerStore::Kept {
                place: kept::place(data, store, &self.dc, self.memory.0)?,
                options: FsOptions::default(),
                aggregators: aggregators.clone(),
            },
            (None, Some(keeper)) => WorkerStore::Carried {
                bucket: kept::carried(data, store, &self.dc, self.memory.0)?,
                keeper: keeper.clone(),
            },
            (Some(_), Some(_)) | (None, None) => {
                let message = "expected either aggregators or keeper: whom the worker asks";
                let hint = "aggregators = \"host:port\"; or, of a worker beside one that keeps the same bucket, keeper = \"host:port\" of that one";
                return Err(Failure::usage("configuration", message, hint).into());
            }
        };
        Ok(WorkerProcess {
            listen: self.listen,
            store,
            memory: self.memory.0,
            settings: WorkerSettings { upload_rate, ..WorkerSettings::default() },
            others: peers::ways(&self.peers, &config.name(), &self.keys, material)?,
        })
    }
}

impl AggregatorFile {
    /// What the process is told beside.
    fn process(
        &self,
        config: &ProcessConfig,
        material: &ClusterMaterial,
    ) -> anyhow::Result<AggregatorProcess> {
        peers::check_url("url", self.url.as_deref())?;
        let defaults = AggregatorSettings::default();
        let settings = AggregatorSettings {
            scrub_rate: self.scrub_rate.map_or(defaults.scrub_rate, |Bytes(rate)| rate),
            takeover_after: self.takeover_after.map_or(defaults.takeover_after, |Takeover(after)| after),
            absent_after: self.absent_after.map_or(defaults.absent_after, |Length(after)| after),
            ..defaults
        };
        Ok(AggregatorProcess {
            listen: self.listen,
            peer: self.peer,
            workers: self.workers.clone(),
            url: self.url.clone(),
            peers: peers::addresses(&self.peers, &config.name(), &self.keys, material)?,
            memory: self.memory.0,
            settings,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_engine::ids::DcId;

    const EDGE: &str = r#"
role = "edge"
dc = "dc-a"
keys = "keys"
listen = "127.0.0.1:0"
admin = "127.0.0.1:0"
sessions = "localhost:1"
workers = "localhost:2"
memory = "64MiB"
"#;

    const WORKER: &str = r#"
role = "worker"
dc = "dc-a"
keys = "keys"
listen = "127.0.0.1:0"
admin = "127.0.0.1:0"
aggregators = "agg-0:1,agg-1:1"
data = "data"
"#;

    const AGGREGATOR: &str = r#"
role = "aggregator"
dc = "dc-a"
keys = "keys"
listen = "127.0.0.1:0"
peer = "127.0.0.1:0"
admin = "127.0.0.1:0"
workers = "localhost:2"
scrub_rate = "0"
takeover_after = "never"
[peers.dc-b]
address = "dc-b.example:8444"
"#;

    fn read(text: &str, kept: Role) -> anyhow::Result<RoleFile> {
        let home = tempfile::tempdir()?;
        let material = ClusterMaterial::generate("test", &[(DcId::new(1), "dc-a"), (DcId::new(2), "dc-b")])?;
        material.only_role(DcId::new(1), kept)?.save(&home.path().join("keys"))?;
        let path = home.path().join("role.toml");
        std::fs::write(&path, text)?;
        let file = RoleFile::read(&path)?;
        file.check()?;
        Ok(file)
    }

    #[test]
    fn a_file_describes_a_process_of_one_role() {
        let file = read(EDGE, Role::Edge).unwrap();
        assert_eq!((file.role(), file.log(), file.memory()), (Role::Edge, "warn", Some(64 << 20)));
        let session = EDGE.replace("\"edge\"", "\"session\"");
        let session: String = session
            .lines()
            .filter(|line| !line.contains("local") && !line.contains("mem"))
            .map(|line| format!("{line}\n"))
            .collect();
        let file = read(&session, Role::Session).unwrap();
        assert_eq!((file.role(), file.memory()), (Role::Session, None));
        let peers = "[peers.dc-b]\nsessions = \"dc-b:8446\"\n";
        let error = read(&format!("{session}{peers}"), Role::Session).unwrap_err().to_string();
        assert!(error.contains("not whom to ask"), "{error}");
        assert!(read(&format!("{session}workers = \"w:1\"\n{peers}"), Role::Session).is_ok());
        let file = read(WORKER, Role::Worker).unwrap();
        let RoleFile::Worker(WorkerFile { data, .. }) = &file else { unreachable!() };
        assert!(data.as_ref().is_some_and(|data| data.is_absolute() && data.ends_with("data")), "{data:?}");
        let neither = read(&WORKER.replace("data = \"data\"\n", ""), Role::Worker).unwrap_err().to_string();
        assert!(neither.contains("either data or store"), "{neither}");
        let whom = WORKER.lines().find(|line| line.starts_with("aggregators")).unwrap();
        let wrong = |to: &str| read(&WORKER.replace(whom, to), Role::Worker).unwrap_err().to_string();
        assert!(wrong("").contains("either aggregators or keeper"));
        assert!(wrong(&format!("{whom}\nkeeper = \"w:1\"")).contains("either aggregators or keeper"));
        assert!(wrong("keeper = \"w:1\"").contains("not the bucket that it keeps"));
        let way = "upload_rate = \"1MiB\"\n[peers.dc-b]\nworkers = \"dc-b:8445\"\n";
        assert_eq!(read(&format!("{WORKER}{way}"), Role::Worker).unwrap().upload_rate(), Some(1 << 20));
        let itself = read(&format!("{WORKER}{}", way.replace("dc-b]", "dc-a]")), Role::Worker);
        assert!(itself.unwrap_err().to_string().contains("the datacenter itself"));
        let file = read(AGGREGATOR, Role::Aggregator).unwrap();
        assert_eq!((file.role(), file.memory()), (Role::Aggregator, Some(64 << 20)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |from: &str, to: &str| read(&EDGE.replace(from, to), Role::Edge).unwrap_err().to_string();
        assert!(wrong("workers", "wrokers").contains("role.toml:8: unknown field `wrokers`"));
        assert!(wrong("\"edge\"", "\"door\"").contains("role.toml:2: unknown variant `door`"));
        assert!(wrong("64MiB", "much").contains("role.toml:9: expected a size"));
        assert!(wrong("dc-a", "dc-z").contains("dc: dc-z is not in"));
        assert!(wrong("64MiB", "1MiB").contains("memory is 1048576, expected at least 16777216"));
        assert!(wrong("localhost:1", "localhost").contains("sessions is \"localhost\", expected host:port"));
        assert!(
            wrong("localhost:2", "https://w:2").contains("workers is \"https://w:2\", expected host:port")
        );
        let error = read(EDGE, Role::Session).unwrap_err().to_string();
        assert!(error.contains("edge.dc-1.test.sluice"), "{error}");
        let wrong = |from: &str, to: &str| {
            read(&AGGREGATOR.replace(from, to), Role::Aggregator).unwrap_err().to_string()
        };
        assert!(wrong("peer = ", "data = \"/d\"\npeer = ").contains("role.toml:6: unknown field `data`"));
        assert!(wrong("never", "soon").contains("role.toml:10: expected a length of time"));
        assert!(wrong("peers.dc-b", "peers.dc-a").contains("peers.dc-a is the datacenter itself"));
        assert!(wrong("scrub_rate", "url = \"http://x\"\nscrub_rate").contains("expected https://"));
        let error = read(WORKER, Role::Aggregator).unwrap_err().to_string();
        assert!(error.contains("worker.dc-1.test.sluice"), "{error}");
    }
}
