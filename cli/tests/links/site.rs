//! A cluster whose datacenters are apart.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sluice_client::{
    Client, ClientConfig, DownloadOptions, ListFilter, Observer, Source, Target, Token, UploadOptions,
    Uploaded,
};
use sluice_engine::hash::Root;
use sluice_fault_s3::Garage;
use sluice_node::tls;
use sluice_proto::http::{FileStatus, State};
use sluice_redis::testing::{Server, available};
use uuid::Uuid;

use crate::network::{CLIENTS, Network, address, door};

pub(crate) const MIB: usize = 1 << 20;

/// How long something may take to become so, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Datacenters dc-1, dc-2 and so on, each at the place of its number.
pub(crate) struct Site {
    pub(crate) network: Network,
    directory: tempfile::TempDir,
    datacenters: usize,
    /// By the names of their files.
    running: Mutex<BTreeMap<String, Child>>,
    /// Of each datacenter, if that is how files are kept.
    parts: Vec<Parts>,
}

/// Where datacenters keep their files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Each in a volume of its own.
    Volumes,
    /// Each in a bucket, of an S3 server that stands beside it as a Redis does.
    Buckets,
}

/// What stands beside a datacenter, at its place.
struct Parts {
    redis: Server,
    garage: Garage,
}

impl Parts {
    /// `None` where Garage is not installed, which it says; in CI it panics then.
    fn start() -> Option<Self> {
        let garage = Garage::start()?;
        Some(Self { redis: Server::start(), garage })
    }

    /// What a datacenter's file says of them.
    fn settings(&self) -> String {
        format!("{}redis = \"{}\"\n", bucket(&self.garage), self.redis.url())
    }
}

/// What is said in a file of whoever keeps its files in this bucket. The key is beside it, in `s3.toml`.
pub(crate) fn bucket(garage: &Garage) -> String {
    let (endpoint, bucket, region) = (garage.endpoint(), garage.bucket(), garage.region());
    let place = format!("endpoint = \"{endpoint}\", bucket = \"{bucket}\", region = \"{region}\"");
    format!("store = {{ s3 = {{ {place}, credentials = \"s3.toml\" }} }}\n")
}

/// What went between datacenters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traffic {
    pub(crate) commands: u64,
    pub(crate) bytes: u64,
}

impl Site {
    /// Keys, a token and a file for each datacenter, to which `settings` are added; none runs yet.
    pub(crate) fn new(datacenters: usize, settings: &str) -> Self {
        Self::on(Network::new(datacenters), datacenters, |dc| format!("data = \"data-{dc}\"\n{settings}"))
    }

    /// The same, with files kept as `kept` says; `None` where what that needs is not installed.
    pub(crate) fn keeping(kept: Kept, datacenters: usize, settings: &str) -> Option<Self> {
        match kept {
            Kept::Volumes => Some(Self::new(datacenters, settings)),
            Kept::Buckets if !available() => None,
            Kept::Buckets => {
                let network = Network::new(datacenters);
                // Processes that a thread starts are where it is.
                let parts = (1..=datacenters).map(|dc| network.at_once(dc, Parts::start));
                let parts = parts.collect::<Option<Vec<_>>>()?;
                let mut site = Self::on(network, datacenters, |dc| parts[dc - 1].settings() + settings);
                // The same for all.
                site.write_key(&parts[0].garage);
                site.parts = parts;
                Some(site)
            }
        }
    }

    /// The same on a network that is there already, where each datacenter has what `settings` say, its store among it.
    pub(crate) fn on(network: Network, datacenters: usize, settings: impl Fn(usize) -> String) -> Self {
        tls::install_provider();
        let directory = tempfile::tempdir().unwrap();
        let names: Vec<String> = (1..=datacenters).map(|dc| format!("dc-{dc}")).collect();
        let run = |args: &[&str]| {
            let output = sluice(Command::new(BINARY), &directory).args(args).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        let dcs = names.iter().flat_map(|name| ["--dc", name]);
        let make: Vec<&str> =
            ["admin", "key", "make", "keys", "--cluster", "apart"].into_iter().chain(dcs).collect();
        run(&make);
        run(&["admin", "token", "mint", "--keys", "keys/authority", "--tenant", "7", "--out", "token"]);
        for dc in 1..=datacenters {
            let at = address(dc);
            let mut text = format!(
                "dc = \"dc-{dc}\"\nkeys = \"keys/dc-{dc}\"\n{}\n\
                 listen = {{ edge = \"{at}:8443\", peer = \"{at}:8444\", admin = \"{at}:9090\" }}\n",
                settings(dc)
            );
            for peer in (1..=datacenters).filter(|peer| *peer != dc) {
                text.push_str(&format!("[peers.dc-{peer}]\naddress = \"{}:8444\"\n", address(peer)));
            }
            std::fs::write(directory.path().join(format!("dc-{dc}.toml")), text).unwrap();
        }
        Self { network, directory, datacenters, running: Mutex::default(), parts: Vec::new() }
    }

    /// Puts a file beside those of the datacenters.
    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.directory.path().join(name), text).unwrap();
    }

    /// Puts there the key with which an S3 server is asked.
    pub(crate) fn write_key(&self, garage: &Garage) {
        let key = garage.key();
        self.write("s3.toml", &format!("key_id = \"{}\"\nsecret = \"{}\"\n", key.id, key.secret));
    }

    /// Starts a datacenter, and waits until it serves.
    pub(crate) fn start(&self, dc: usize) {
        self.begin(self.network.command(dc, BINARY), "dc", &format!("dc-{dc}"));
    }

    /// Starts the process of a file by `command`, which runs the binary, and waits until it serves.
    pub(crate) fn begin(&self, command: Command, verb: &str, name: &str) {
        let (config, log) = (format!("{name}.toml"), self.directory.path().join(format!("{name}.log")));
        let log = File::options().create(true).append(true).open(log).unwrap();
        let mut command = sluice(command, &self.directory);
        command.args([verb, "--config", &config, "--json"]).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("\"admin\""), "{name} says {line:?}");
        self.running.lock().unwrap().insert(name.to_owned(), child);
    }

    /// Starts all, and waits until each reaches each other.
    pub(crate) fn start_all(&self) {
        (1..=self.datacenters).for_each(|dc| self.start(dc));
        self.linked(&[]);
    }

    /// Kills a datacenter.
    pub(crate) fn kill(&self, dc: usize) {
        self.end(&format!("dc-{dc}"));
    }

    /// Kills the process of a file.
    pub(crate) fn end(&self, name: &str) {
        if let Some(mut child) = self.running.lock().unwrap().remove(name) {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Stops a datacenter (SIGSTOP): its connections stay, and nothing is answered.
    pub(crate) fn hang(&self, dc: usize) {
        self.signal(dc, Signal::STOP);
    }

    /// Lets it go on.
    pub(crate) fn go_on(&self, dc: usize) {
        self.signal(dc, Signal::CONT);
    }

    fn signal(&self, dc: usize, signal: Signal) {
        kill_process(Pid::from_child(&self.running.lock().unwrap()[&format!("dc-{dc}")]), signal).unwrap();
    }

    /// Which process each datacenter is, of those that have not ended.
    pub(crate) fn processes(&self) -> BTreeMap<String, u32> {
        let mut running = self.running.lock().unwrap();
        let running = running.iter_mut().filter_map(|(name, child)| {
            let ended = child.try_wait().unwrap();
            ended.is_none().then(|| (name.clone(), child.id()))
        });
        running.collect()
    }

    /// Lets the Redis beside a datacenter forget everything.
    pub(crate) fn forget(&self, dc: usize) {
        let redis = &self.parts[dc - 1].redis;
        assert_eq!(self.network.at_once(dc, || redis.cli(&["FLUSHALL"])), "OK");
    }

    /// A client that knows these datacenters.
    pub(crate) fn client(&self, dcs: &[usize]) -> Client {
        let ca = std::fs::read(self.directory.path().join("keys/ca.pem")).unwrap();
        let token = Token::new(&std::fs::read_to_string(self.directory.path().join("token")).unwrap());
        let urls = dcs.iter().map(|dc| format!("https://127.0.0.1:{}", door(*dc))).collect();
        Client::new(ClientConfig::new(urls, token, ca)).unwrap()
    }

    /// Does something as a client.
    pub(crate) fn ask<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        self.network.inside(CLIENTS, work)
    }

    /// Sends a file by way of these datacenters.
    pub(crate) fn upload(
        &self,
        dcs: &[usize],
        bytes: &[u8],
        options: &UploadOptions,
        observer: Arc<dyn Observer>,
    ) -> Uploaded {
        self.ask(async {
            let source = Source::memory(bytes.to_vec());
            self.client(dcs).upload(&source, options, observer).await.unwrap()
        })
    }

    /// Where a file stands, as a datacenter says.
    pub(crate) fn status(&self, dc: usize, id: Uuid) -> Option<FileStatus> {
        self.ask(async { self.client(&[dc]).status(id).await.ok() })
    }

    /// Waits until every one of these has the file assembled, and gives out these bytes.
    pub(crate) fn equal(&self, dcs: &[usize], id: Uuid, bytes: &[u8]) {
        for dc in dcs {
            let client_of = async {
                let client = self.client(&[*dc]);
                let status = client.wait(id, State::Assembled, PATIENCE).await.unwrap();
                assert_eq!(status.root, Some(Root::of_bytes(bytes).to_string()), "at dc-{dc}");
                let read = Collected::default();
                let target = Target::Writer(Box::new(read.clone()));
                client.download(id, target, &DownloadOptions::default(), nobody()).await.unwrap();
                assert!(*read.0.lock().unwrap() == bytes, "at dc-{dc}");
            };
            self.ask(client_of);
        }
    }

    /// How many files a datacenter knows by itself.
    pub(crate) fn listed(&self, dc: usize) -> usize {
        self.ask(async {
            let client = self.client(&[dc]);
            let (mut count, mut after) = (0, None);
            loop {
                let filter = ListFilter { state: None, limit: None, after };
                let page = client.list(filter).await.unwrap();
                count += page.files.len();
                match page.next {
                    Some(next) => after = Some(next),
                    None => return count,
                }
            }
        })
    }

    fn metrics(&self, dc: usize) -> String {
        let url = format!("http://{}:9090/metrics", address(dc));
        self.ask(async { reqwest::get(url).await.unwrap().text().await.unwrap() })
    }

    /// Whether a datacenter reaches another.
    pub(crate) fn reaches(&self, from: usize, to: usize) -> bool {
        let line = format!("sluice_peer_up{{dc=\"dc-{from}\",peer=\"dc-{to}\"}} 1");
        self.metrics(from).lines().any(|said| said == line)
    }

    /// Waits until all reach each other but these pairs, which do not, in neither direction.
    pub(crate) fn linked(&self, apart: &[(usize, usize)]) {
        for from in 1..=self.datacenters {
            for to in (1..=self.datacenters).filter(|to| *to != from) {
                let cut = apart.contains(&(from, to)) || apart.contains(&(to, from));
                eventually(&format!("dc-{from} reaches dc-{to}: {}", !cut), || {
                    (self.reaches(from, to) != cut).then_some(())
                });
            }
        }
    }

    /// What went between all datacenters so far.
    pub(crate) fn traffic(&self) -> Traffic {
        let commands = (1..=self.datacenters).map(|dc| {
            let metrics = self.metrics(dc);
            let sent = metrics.lines().filter(|line| {
                line.starts_with("sluice_commands_total{")
                    && line.contains("direction=\"sent\"")
                    && line.contains("outcome=\"sent\"")
                    // Said as long as there is somebody to hear it, whatever happens to files.
                    && !line.contains("kind=\"LOAD\"")
            });
            sent.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>()
        });
        Traffic { commands: commands.sum(), bytes: self.network.bytes() }
    }

    /// Waits until nothing is said any more for a moment; what was said until then.
    pub(crate) fn quiet(&self) -> Traffic {
        let mut before = self.traffic();
        let mut since = Instant::now();
        eventually("silence", || {
            std::thread::sleep(Duration::from_millis(200));
            let now = self.traffic();
            if now.commands != before.commands {
                (before, since) = (now, Instant::now());
            }
            (since.elapsed() > Duration::from_secs(2)).then_some(now)
        })
    }

    /// What is wrong with the volumes of datacenters that have stopped: nothing. Those of buckets have none.
    pub(crate) fn check_volumes(&self) {
        if !self.parts.is_empty() {
            return;
        }
        for dc in 1..=self.datacenters {
            self.kill(dc);
            let data = format!("data-{dc}");
            let output =
                sluice(Command::new(BINARY), &self.directory).args(["fsck", "--data", &data]).output();
            let output = output.unwrap();
            assert!(output.status.success(), "dc-{dc}: {}", String::from_utf8_lossy(&output.stdout));
        }
    }

    /// Sends a stream by way of these datacenters; its id.
    pub(crate) fn stream(&self, dcs: &[usize], bytes: &[u8], options: &UploadOptions) -> Uuid {
        let sent = async { self.client(dcs).upload_stream(bytes, options, nobody()).await.unwrap().id };
        self.ask(sent)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let running: Vec<String> = self.running.lock().unwrap().keys().cloned().collect();
        running.iter().for_each(|name| self.end(name));
    }
}

/// What runs as a datacenter, and as each of its roles.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_sluice");

fn sluice(mut command: Command, directory: &tempfile::TempDir) -> Command {
    let home = directory.path();
    command
        .current_dir(home)
        .env("HOME", home)
        .env("XDG_STATE_HOME", home.join("state"))
        .env("XDG_CONFIG_HOME", home.join("config"))
        .env("SLUICE_TOKEN_FILE", PathBuf::from("token"))
        .env("SLUICE_CA", PathBuf::from("keys/ca.pem"))
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<u8>>>);

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An observer that looks away.
pub(crate) fn nobody() -> Arc<dyn Observer> {
    Arc::new(|_: &sluice_client::Event<'_>| {})
}

/// Asks again until something is so.
pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < until, "{what} did not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Pseudo-random bytes, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}
