//! The file that describes a process of one role. Everything in it is checked before anything starts.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use sluice::datacenter::StartError;
use sluice::process::{EdgeProcess, Process, ProcessConfig};
use sluice_edge::EdgeSettings;
use sluice_node::clock::SystemClock;
use sluice_node::material::ClusterMaterial;
use sluice_node::role::Role;
use sluice_node::telemetry;

use crate::failure::Failure;
use crate::reload::ConfigFile;
use crate::settings;
use crate::size::Bytes;

const KEYS: &str = "role, dc, keys, listen, admin, log; for an edge also sessions, workers, memory";

/// What an edge may use for bodies in flight, unless its file says otherwise.
const MEMORY: Bytes = Bytes(256 << 20);

/// What a file says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "role", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum RoleFile {
    /// An edge.
    Edge {
        dc: String,
        keys: PathBuf,
        listen: SocketAddr,
        admin: SocketAddr,
        sessions: String,
        workers: String,
        #[serde(default = "memory")]
        memory: Bytes,
        #[serde(default = "warn")]
        log: String,
    },
    /// A session service.
    Session {
        dc: String,
        keys: PathBuf,
        listen: SocketAddr,
        admin: SocketAddr,
        #[serde(default = "warn")]
        log: String,
    },
}

fn memory() -> Bytes {
    MEMORY
}

fn warn() -> String {
    "warn".to_owned()
}

impl ConfigFile for RoleFile {
    /// Paths in it are relative to its directory.
    fn read(path: &Path) -> anyhow::Result<Self> {
        let Some(mut file) = settings::parse::<Self>(path, KEYS)? else {
            let message = format!("{} does not exist", path.display());
            return Err(Failure::usage("configuration", message, "give the path of a file").into());
        };
        let (Self::Edge { keys, .. } | Self::Session { keys, .. }) = &mut file;
        *keys = path.parent().unwrap_or(Path::new("")).join(&*keys);
        Ok(file)
    }

    /// Whether the datacenter is one of the keys', and the keys are those of the role. Takes nothing that a process which
    /// runs from this file has.
    fn check(&self) -> anyhow::Result<()> {
        telemetry::check(self.log()).map_err(|error| {
            Failure::usage("configuration", format!("log: {error}"), "such as warn or info")
        })?;
        self.config().map(|_| ())
    }

    fn keys(&self) -> &Path {
        let (Self::Edge { keys, .. } | Self::Session { keys, .. }) = self;
        keys
    }

    fn log(&self) -> &str {
        let (Self::Edge { log, .. } | Self::Session { log, .. }) = self;
        log
    }

    fn memory(&self) -> Option<u64> {
        match self {
            Self::Edge { memory: Bytes(memory), .. } => Some(*memory),
            Self::Session { .. } => None,
        }
    }

    fn is_like(&self, other: &Self) -> bool {
        let mut same = self.clone();
        match (&mut same, other) {
            (Self::Edge { log, memory, .. }, Self::Edge { log: new, memory: much, .. }) => {
                (*log, *memory) = (new.clone(), *much);
            }
            (Self::Session { log, .. }, Self::Session { log: new, .. }) => log.clone_from(new),
            _ => {}
        }
        same == *other
    }
}

impl RoleFile {
    /// What the process is for.
    pub(crate) fn role(&self) -> Role {
        match self {
            Self::Edge { .. } => Role::Edge,
            Self::Session { .. } => Role::Session,
        }
    }

    /// Starts the process.
    pub(crate) async fn start(&self) -> anyhow::Result<Process> {
        let config = self.config()?;
        Ok(match self {
            Self::Edge { listen, sessions, workers, memory: Bytes(memory), .. } => {
                let edge = EdgeProcess {
                    listen: *listen,
                    sessions: sessions.clone(),
                    workers: workers.clone(),
                    memory: *memory,
                    settings: EdgeSettings::default(),
                };
                Process::edge(&config, &edge).await?
            }
            Self::Session { listen, .. } => Process::session(&config, *listen).await?,
        })
    }

    fn config(&self) -> anyhow::Result<ProcessConfig> {
        let (Self::Edge { dc: name, keys, admin, .. } | Self::Session { dc: name, keys, admin, .. }) = self;
        let material = ClusterMaterial::load(keys).map_err(StartError::from)?;
        let Some(dc) = material.dc_named(name) else {
            let known: Vec<&str> = material.dcs().map(|(_, name)| name).collect();
            let message = format!("dc: {name} is not in {}", keys.display());
            let hint = format!("the keys are those of {}", known.join(", "));
            return Err(Failure::usage("configuration", message, hint).into());
        };
        // What it has no need of is not kept in memory either.
        let material = material.only_role(dc, self.role()).map_err(StartError::from)?;
        let lacks = match self {
            Self::Edge { .. } => material.edge_identity().and(material.ticket_secret().map(|_| ())).err(),
            Self::Session { .. } => material.context_key(dc).err(),
        };
        if let Some(error) = material.role_identity(dc, self.role()).err().or(lacks) {
            let hint = format!("`sluice admin key make` makes roles/{name}/{} for it", self.role());
            return Err(Failure::usage("keys", format!("{}: {error}", keys.display()), hint).into());
        }
        Ok(ProcessConfig { dc, material: Arc::new(material), admin: *admin, clock: SystemClock::shared() })
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
        assert_eq!((file.role(), file.log()), (Role::Edge, "warn"));
        let RoleFile::Edge { memory, .. } = file else { unreachable!() };
        assert_eq!(memory, Bytes(64 << 20));
        let session = EDGE.replace("\"edge\"", "\"session\"");
        let session: String = session
            .lines()
            .filter(|line| !line.contains("local") && !line.contains("mem"))
            .map(|line| format!("{line}\n"))
            .collect();
        assert_eq!(read(&session, Role::Session).unwrap().role(), Role::Session);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |from: &str, to: &str| read(&EDGE.replace(from, to), Role::Edge).unwrap_err().to_string();
        assert!(wrong("workers", "wrokers").contains("unknown field `wrokers`"));
        assert!(wrong("\"edge\"", "\"door\"").contains("unknown variant `door`"));
        assert!(wrong("64MiB", "much").contains("expected a size"));
        assert!(wrong("dc-a", "dc-z").contains("dc: dc-z is not in"));
        let error = read(EDGE, Role::Session).unwrap_err().to_string();
        assert!(error.contains("edge.dc-1.test.sluice"), "{error}");
    }
}
