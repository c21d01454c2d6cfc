//! A datacenter of its own for a measurement, from files such as operators write: in one process, or with each role in a
//! process of its own.
//!
//! Dropping a [`Fleet`] stops its processes, waits for them, and removes their directory: on every way out, Ctrl-C included.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use sluice_fault_s3::Garage;
use tempfile::TempDir;
use tokio::net::TcpSocket;

use crate::client::{Door, Target};
use crate::server;

/// Any free port.
const ANY: &str = "127.0.0.1:0";

/// So that nothing in a bucket is asked for but what is measured.
const UNSCRUBBED: &str = "scrub_rate = \"0\"\n";

/// Where a datacenter keeps its files.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kept<'a> {
    /// In a volume, of which one worker takes and gives all chunks.
    Volume,
    /// In the bucket of this server: one worker keeps it, and a porter takes and gives all chunks.
    Bucket(&'a Garage),
}

/// A datacenter that runs.
pub(crate) struct Fleet {
    site: Site,
    target: Target,
    /// Held until the processes are gone.
    _ports: Vec<TcpSocket>,
}

/// A directory with keys, a token and files of configuration, and the processes that were started from it.
struct Site {
    sluice: PathBuf,
    directory: TempDir,
    processes: Vec<Process>,
}

struct Process {
    name: &'static str,
    child: Child,
    admin: SocketAddr,
}

impl Fleet {
    /// One process, which keeps its files in a bucket.
    pub(crate) fn one(sluice: &Path, parent: &Path, garage: &Garage) -> anyhow::Result<Self> {
        let mut site = Site::new(sluice, parent)?;
        let store = site.store(garage)?;
        let listen = format!("listen = {{ edge = \"{ANY}\", peer = \"{ANY}\", admin = \"{ANY}\" }}\n");
        let text = format!("dc = \"dc-a\"\nkeys = \"keys/dc-a\"\n{UNSCRUBBED}{listen}{store}");
        let said = site.begin("dc", "dc", &text)?;
        let edge = server::address(said["url"].as_str().context("the datacenter does not say where it is")?)?;
        site.serving(edge, Vec::new())
    }

    /// A process for each role: `edge`, `aggregator`, `session`, and `worker`, or of a bucket `keeper` and `porter`.
    pub(crate) fn apart(sluice: &Path, parent: &Path, kept: Kept<'_>) -> anyhow::Result<Self> {
        let mut site = Site::new(sluice, parent)?;
        // These two ask each other, so both must be known before either begins.
        let ports = vec![reserve()?, reserve()?];
        let (keeper, aggregators) = (ports[0].local_addr()?, ports[1].local_addr()?);
        let any = format!("listen = \"{ANY}\"\n");
        let keeps = format!("listen = \"{keeper}\"\naggregators = \"{aggregators}\"\n");
        let (workers, scrub) = match kept {
            Kept::Volume => {
                let worker = site.begin_role("worker", "worker", &format!("{keeps}data = \"data\"\n"))?;
                (worker, "")
            }
            Kept::Bucket(garage) => {
                let store = site.store(garage)?;
                site.begin_role("keeper", "worker", &format!("{keeps}{store}"))?;
                let carries = format!("{any}keeper = \"{keeper}\"\n{store}");
                (site.begin_role("porter", "worker", &carries)?, UNSCRUBBED)
            }
        };
        let listens = format!("listen = \"{aggregators}\"\npeer = \"{ANY}\"\n");
        site.begin_role("aggregator", "aggregator", &format!("{listens}workers = \"{keeper}\"\n{scrub}"))?;
        let sessions = site.begin_role("session", "session", &any)?;
        let asks = format!("sessions = \"{sessions}\"\nworkers = \"{workers}\"\n");
        let edge = site.begin_role("edge", "edge", &format!("{any}{asks}"))?;
        site.serving(edge, ports)
    }

    /// Its edge, by the name of the datacenter.
    pub(crate) fn targets(&self) -> [(String, Target); 1] {
        [("dc-a".to_owned(), self.target.clone())]
    }

    /// Its processes, by name.
    pub(crate) fn pids(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.site.processes.iter().map(|process| (process.name, process.child.id()))
    }

    /// What its processes tell scrapers, one after the other.
    pub(crate) async fn metrics(&self) -> anyhow::Result<String> {
        let mut all = String::new();
        for process in &self.site.processes {
            all += &server::metrics(process.admin).await?;
        }
        Ok(all)
    }
}

impl Site {
    fn new(sluice: &Path, parent: &Path) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("sluice-load-").tempdir_in(parent)?;
        let run = |arguments: &[&str]| {
            let output = Command::new(sluice).args(arguments).current_dir(directory.path()).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        run(&["admin", "key", "make", "keys", "--cluster", "load", "--dc", "dc-a"])?;
        run(&["admin", "token", "mint", "--keys", "keys/authority", "--tenant", "1", "--out", "token"])?;
        Ok(Self { sluice: sluice.to_owned(), directory, processes: Vec::new() })
    }

    /// What tells a process that the files are in this bucket.
    fn store(&self, garage: &Garage) -> anyhow::Result<String> {
        let key = garage.key();
        let credentials = format!("key_id = \"{}\"\nsecret = \"{}\"\n", key.id, key.secret);
        std::fs::write(self.directory.path().join("s3.toml"), credentials)?;
        Ok(format!(
            "store = {{ s3 = {{ endpoint = \"{}\", bucket = \"{}\", region = \"{}\", credentials = \"s3.toml\" }} }}\n",
            garage.endpoint(),
            garage.bucket(),
            garage.region()
        ))
    }

    /// Starts a process of a role, and says where it listens.
    fn begin_role(&mut self, name: &'static str, role: &str, more: &str) -> anyhow::Result<SocketAddr> {
        let keys = format!("keys = \"keys/roles/dc-a/{role}\"\n");
        let text = format!("role = \"{role}\"\ndc = \"dc-a\"\n{keys}admin = \"{ANY}\"\n{more}");
        let said = self.begin(name, role, &text)?;
        let listens: Option<SocketAddr> = said["listen"].as_str().and_then(|address| address.parse().ok());
        listens.with_context(|| format!("the {name} does not say where it listens"))
    }

    /// Starts a process from a file that says this, and answers with what it says of itself.
    fn begin(&mut self, name: &'static str, verb: &str, text: &str) -> anyhow::Result<Value> {
        let path = |kind: &str| self.directory.path().join(format!("{name}.{kind}"));
        let (file, remarks) = (path("toml"), path("remarks"));
        std::fs::write(&file, text)?;
        let mut child = Command::new(&self.sluice)
            .args(["--json", verb, "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&remarks)?)
            .spawn()
            .with_context(|| format!("cannot start {}", self.sluice.display()))?;
        let mut line = String::new();
        let read = child.stdout.take().map(|stdout| BufReader::new(stdout).read_line(&mut line));
        let said: Value = serde_json::from_str(&line).unwrap_or_default();
        let (Some(Ok(_)), Some(Ok(admin))) = (read, said["admin"].as_str().map(server::address)) else {
            server::stop(&mut child);
            let remarks = std::fs::read_to_string(&remarks).unwrap_or_default();
            bail!("the {name} did not start: {}", remarks.trim());
        };
        self.processes.push(Process { name, child, admin });
        Ok(said)
    }

    /// All have begun, and clients come in here.
    fn serving(self, edge: SocketAddr, ports: Vec<TcpSocket>) -> anyhow::Result<Fleet> {
        let home = self.directory.path();
        let (ca, token) =
            (std::fs::read(home.join("keys/ca.pem"))?, std::fs::read_to_string(home.join("token"))?);
        let target = Target::new(edge, "localhost", &ca, Door::Http1, Some(token.trim()))?;
        Ok(Fleet { site: self, target, _ports: ports })
    }
}

impl Drop for Site {
    /// Whoever asks ends before whom it asks.
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            server::stop(&mut process.child);
        }
    }
}

/// A port that nobody else is given.
fn reserve() -> anyhow::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    // So that the process may listen beside it.
    socket.set_reuseaddr(true)?;
    Ok(socket)
}
