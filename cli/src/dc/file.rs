//! The file that describes a datacenter. Everything in it is checked before anything starts.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use sluice::cluster::Listen;
use sluice::datacenter::{DatacenterConfig, DatacenterSettings, StartError};
use sluice::place::StorePlace;
use sluice::ways::OtherDc;
use sluice_aggregator::PeerAddress;
use sluice_engine::ids::DcId;
use sluice_node::clock::SystemClock;
use sluice_node::material::ClusterMaterial;
use sluice_node::telemetry;
use sluice_redis::RedisConfig;

use crate::certificates;
use crate::failure::Failure;
use crate::kept::{self, Store};
use crate::length::{Length, Takeover};
use crate::peers::{self, Peer};
use crate::reload::ConfigFile;
use crate::settings;
use crate::size::Bytes;

const KEYS: &str = "dc, keys, data, store, url, listen, memory, upload_rate, scrub_rate, takeover_after, absent_after, redis, redis_password, \
    redis_ca, log, peers";

/// What a file says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DcFile {
    /// Name of the datacenter, as the keys have it.
    dc: String,
    /// The directory of its keys.
    keys: PathBuf,
    /// The directory of its volume, if it keeps its files in one.
    data: Option<PathBuf>,
    /// Where else it keeps them.
    store: Option<Store>,
    /// Where clients find it, if that is not where it listens.
    url: Option<String>,
    listen: ListenAt,
    memory: Option<Bytes>,
    upload_rate: Option<Bytes>,
    scrub_rate: Option<Bytes>,
    takeover_after: Option<Takeover>,
    absent_after: Option<Length>,
    /// Where its processes share what they have to.
    redis: Option<String>,
    /// The file of its password, and that of the CA with which it is checked.
    redis_password: Option<PathBuf>,
    redis_ca: Option<PathBuf>,
    /// What is logged.
    #[serde(default = "warn")]
    log: String,
    /// Every other datacenter, by name.
    #[serde(default)]
    peers: BTreeMap<String, Peer>,
}

fn warn() -> String {
    "warn".to_owned()
}

/// Where it listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListenAt {
    edge: SocketAddr,
    peer: SocketAddr,
    admin: SocketAddr,
    /// For edges that are processes of their own, and for what other datacenters pass on.
    inside: Option<SocketAddr>,
}

impl ConfigFile for DcFile {
    /// Paths in it are relative to its directory.
    fn read(path: &Path) -> anyhow::Result<Self> {
        let Some(mut file) = settings::parse::<Self>(path, KEYS)? else {
            let message = format!("{} does not exist", path.display());
            return Err(Failure::usage("configuration", message, "give the path of a file").into());
        };
        let directory = path.parent().unwrap_or(Path::new(""));
        file.keys = directory.join(&file.keys);
        file.data = file.data.map(|data| directory.join(data));
        if let Some(store) = &mut file.store {
            store.relative_to(directory);
        }
        for path in [&mut file.redis_password, &mut file.redis_ca].into_iter().flatten() {
            *path = directory.join(&*path);
        }
        Ok(file)
    }

    /// Whether there is such a datacenter, and its keys and peers are all there. Takes nothing that a datacenter which
    /// runs from this file has.
    fn check(&self) -> anyhow::Result<()> {
        telemetry::check(&self.log).map_err(|error| {
            Failure::usage("configuration", format!("log: {error}"), "such as warn or info")
        })?;
        peers::check_url("url", self.url.as_deref())?;
        settings::check_memory(self.memory())?;
        let ListenAt { edge, peer, admin, inside } = self.listen;
        let mut listen: Vec<_> =
            [Some(edge), Some(peer), Some(admin), inside].into_iter().flatten().collect();
        listen.retain(|address| address.port() != 0);
        listen.sort_unstable();
        if let Some([twice, _]) = listen.array_windows().find(|[one, other]| one == other) {
            let message = format!("listen: {twice} is given twice");
            return Err(Failure::usage("configuration", message, "give each its own port").into());
        }
        self.redis()?;
        self.place()?;
        self.load().map(|_| ())
    }

    fn keys(&self) -> &Path {
        &self.keys
    }

    fn log(&self) -> &str {
        &self.log
    }

    fn memory(&self) -> Option<u64> {
        Some(self.memory.map_or(DatacenterSettings::default().memory, |Bytes(memory)| memory))
    }

    fn upload_rate(&self) -> Option<u64> {
        self.upload_rate.map(|Bytes(rate)| rate)
    }

    fn scrub_rate(&self) -> Option<u64> {
        let default = DatacenterSettings::default().aggregator.scrub_rate;
        Some(self.scrub_rate.map_or(default, |Bytes(rate)| rate))
    }

    fn is_like(&self, other: &Self) -> bool {
        let Self { log, memory, upload_rate, scrub_rate, .. } = other.clone();
        Self { log, memory, upload_rate, scrub_rate, ..self.clone() } == *other
    }
}

impl DcFile {
    /// Name of the datacenter.
    pub(crate) fn dc(&self) -> &str {
        &self.dc
    }

    /// The keys, which datacenter this is, and where the others are.
    fn load(&self) -> anyhow::Result<(ClusterMaterial, DcId, Vec<PeerAddress>, Vec<OtherDc>)> {
        let material = ClusterMaterial::load(&self.keys).map_err(StartError::from)?;
        let Some(dc) = material.dc_named(&self.dc) else {
            return Err(peers::unknown("dc", &self.dc, &self.keys, &material).into());
        };
        let linked = self.peers.iter().map(|(name, peer)| (name.clone(), peer.linked())).collect();
        let peers = peers::addresses(&linked, &self.dc, &self.keys, &material)?;
        let ways = self.peers.iter().map(|(name, peer)| (name.clone(), peer.way())).collect();
        let others = peers::ways(&ways, &self.dc, &self.keys, &material)?;
        // What it has no need of is not kept in memory either.
        let material = material.only(dc).map_err(StartError::from)?;
        let lacks = [
            material.edge_identity().err(),
            material.ticket_secrets().err(),
            material.peer_identity(dc).err(),
            material.command_key(dc).err(),
            material.context_key(dc).err(),
        ];
        if let Some(error) = lacks.into_iter().flatten().next() {
            let message = format!("keys: {}: {error}", self.keys.display());
            let hint = format!("`sluice admin key make` makes {} for this datacenter", self.dc);
            return Err(Failure::usage("configuration", message, hint).into());
        }
        certificates::check(&material, &self.keys)?;
        Ok((material, dc, peers, others))
    }

    fn redis(&self) -> anyhow::Result<Option<RedisConfig>> {
        settings::redis(self.redis.as_deref(), self.redis_password.as_deref(), self.redis_ca.as_deref())
    }

    /// Where it keeps its files.
    fn place(&self) -> anyhow::Result<StorePlace> {
        let memory = self.memory.map_or(DatacenterSettings::default().memory, |Bytes(memory)| memory);
        kept::place(self.data.as_deref(), self.store.as_ref(), &self.dc, memory)
    }

    /// The datacenter that the file describes, with its keys read and its ports reserved.
    pub(crate) fn reserve(&self) -> anyhow::Result<DatacenterConfig> {
        let (material, dc, peers, others) = self.load()?;
        let mut settings = DatacenterSettings::default();
        if let Some(Bytes(memory)) = self.memory {
            settings.memory = memory;
        }
        if let Some(Bytes(rate)) = self.upload_rate {
            settings.worker.upload_rate = Some(rate);
        }
        if let Some(Bytes(rate)) = self.scrub_rate {
            settings.aggregator.scrub_rate = rate;
        }
        if let Some(Takeover(after)) = self.takeover_after {
            settings.aggregator.takeover_after = after;
        }
        if let Some(Length(after)) = self.absent_after {
            settings.aggregator.absent_after = after;
        }
        let ListenAt { edge, peer, admin, inside } = self.listen;
        let ports = Listen { edge, peer, admin }.reserve()?;
        Ok(DatacenterConfig {
            dc,
            material: Arc::new(material),
            place: self.place()?,
            ports: Arc::new(ports),
            inside,
            url: self.url.clone(),
            peers,
            others,
            clock: SystemClock::shared(),
            redis: self.redis()?,
            settings,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
dc = "dc-a"
keys = "keys"
data = "/data"
listen = { edge = "127.0.0.1:0", peer = "127.0.0.1:0", admin = "127.0.0.1:0" }
memory = "64MiB"
takeover_after = "never"
[peers.dc-b]
address = "dc-b.example:8444"
workers = "dc-b.example:8445"
url = "https://dc-b.example:8443"
"#;

    fn read(text: &str) -> anyhow::Result<DatacenterConfig> {
        let home = tempfile::tempdir()?;
        let dcs = [(DcId::new(1), "dc-a"), (DcId::new(2), "dc-b")];
        ClusterMaterial::generate("test", &dcs)?.save(&home.path().join("keys"))?;
        let path = home.path().join("dc.toml");
        std::fs::write(&path, text)?;
        std::fs::write(home.path().join("credentials"), "key_id = \"GK1\"\nsecret = \"hidden\"\n")?;
        std::fs::write(home.path().join("garbled"), "key_id = \"GK1\"\nsecret = 424242\n")?;
        let file = DcFile::read(&path)?;
        file.check()?;
        file.reserve()
    }

    #[test]
    fn a_file_describes_a_datacenter() {
        let config = read(FILE).unwrap();
        assert_eq!((config.name(), config.dc), ("dc-a", DcId::new(1)));
        assert_eq!(config.place.directory(), Some(Path::new("/data")));
        assert_eq!(config.settings.memory, 64 << 20);
        assert_eq!(config.settings.aggregator.takeover_after, None);
        assert_eq!((config.peers.len(), config.peers[0].dc), (1, DcId::new(2)));
        assert_eq!(config.others[0].workers.as_deref(), Some("dc-b.example:8445"));
        let capped = read(&FILE.replace("memory", "upload_rate = \"4MiB\"\nmemory")).unwrap();
        assert_eq!(capped.settings.worker.upload_rate, Some(4 << 20));
        assert!(config.material.token_mint().is_err(), "only what a datacenter needs");
    }

    const BUCKET: &str = r#"store = { s3 = { endpoint = "http://127.0.0.1:3900", bucket = "sluice", region = "garage", credentials = "credentials" } }"#;

    #[test]
    fn files_are_kept_in_a_directory_or_a_bucket() {
        let in_bucket = FILE.replace("data = \"/data\"", BUCKET);
        let config = read(&in_bucket).unwrap();
        let StorePlace::Bucket(options) = &config.place else { panic!("{:?}", config.place) };
        assert_eq!((options.prefix.as_str(), options.bodies), ("dc-a/", 32 << 20));
        assert_eq!(
            (options.credentials.key_id.as_str(), options.credentials.secret.as_str()),
            ("GK1", "hidden")
        );
        assert!(!format!("{:?}", config.place).contains("hidden"));
        let wrong = |from: &str, to: &str| read(&in_bucket.replace(from, to)).unwrap_err().to_string();
        assert!(wrong("http://", "ftp://").contains("store.s3.endpoint: "));
        assert!(wrong("\"sluice\"", "\"a b\"").contains("store.s3.bucket: "));
        assert!(wrong("region = \"garage\"", "region = \"\"").contains("store.s3.region: "));
        assert!(
            wrong("\"credentials\" }", "\"credentials\", prefix = \"dc-a\" }").contains("store.s3.prefix: ")
        );
        assert!(wrong("\"credentials\" }", "\"nowhere\" }").contains("store.s3.credentials: cannot read"));
        let garbled = wrong("\"credentials\" }", "\"garbled\" }");
        assert!(garbled.contains("is no file of credentials") && !garbled.contains("424242"), "{garbled}");
        assert!(wrong("region = ", "regoin = ").contains("unknown field `regoin`"));
        assert!(wrong("store = ", "data = \"/data\"\nstore = ").contains("expected either data or store"));
        assert!(
            read(&FILE.replace("data = \"/data\"\n", ""))
                .unwrap_err()
                .to_string()
                .contains("either data or store")
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |from: &str, to: &str| read(&FILE.replace(from, to)).unwrap_err().to_string();
        assert!(wrong("memory", "memroy").contains("dc.toml:6: unknown field `memroy`"));
        assert!(wrong("64MiB", "much").contains("dc.toml:6: expected a size"));
        assert!(wrong("never", "soon").contains("dc.toml:7: expected a length of time"));
        assert!(wrong("127.0.0.1:0", "here").contains("dc.toml:5: "));
        assert!(wrong("dc = \"dc-a\"", "dc = \"dc-z\"").contains("dc: dc-z is not in"));
        assert!(wrong("peers.dc-b", "peers.dc-a").contains("peers.dc-a is the datacenter itself"));
        assert!(wrong("memory = ", "log = \"x=loud\"\nmemory = ").contains("log: "));
        assert!(wrong("memory = ", "url = \"http://x\"\nmemory = ").contains("expected https://"));
        let twice = FILE.replace("127.0.0.1:0", "127.0.0.1:1");
        assert!(read(&twice).unwrap_err().to_string().contains("127.0.0.1:1 is given twice"));
        assert!(wrong("peers.dc-b", "peers.dc-c").contains("peers: dc-c is not in"));
        assert!(wrong("64MiB", "0").contains("memory is 0, expected at least 16777216"));
        for (from, to, said) in [
            (
                "https://dc-b",
                "http://dc-b",
                "peers.dc-b.url is \"http://dc-b.example:8443\", expected https://",
            ),
            ("https://dc-b.example:8443", "https://", "peers.dc-b.url is \"https://\", expected https://"),
            ("dc-b.example:8444", "dc-b", "peers.dc-b.address is \"dc-b\", expected host:port"),
            ("dc-b.example:8445", "https://w:1", "peers.dc-b.workers is \"https://w:1\", expected host:port"),
            ("dc-b.example:8445", "w:1,:2", "peers.dc-b.workers is"),
            ("dc-b.example:8445", "w:70000", "peers.dc-b.workers is"),
            ("dc-b.example:8445", "[::x]:1", "peers.dc-b.workers is"),
        ] {
            let error = wrong(from, to);
            assert!(error.contains(said), "{to}: {error}");
        }
        read(&FILE.replace("dc-b.example:8445", "[::1]:1, w.example:2,10.0.0.1:3")).unwrap();
        let twice = format!("{FILE}[peers.dc-b]\naddress = \"x:1\"\n");
        let error = read(&twice).unwrap_err().to_string();
        assert!(error.contains("dc.toml:12: invalid table header: duplicate key"), "{error}");
        let alone = FILE.split("[peers").next().unwrap();
        assert!(read(alone).unwrap_err().to_string().contains("the cluster has dc-b"));
    }
}
