//! A datacenter of which every role is a process of its own, beside one that is a single process.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use sluice::ports::ReservedPort;
use sluice_client::{Client, ClientConfig, Event, Source, Token, UploadOptions, Uploaded, WaitFor};
use sluice_engine::hash::Root;
use sluice_fault_disk::Dice;
use sluice_redis::testing::Server;

use crate::Ended;
use crate::fake::noise;
use crate::processes::{Running, Site, any, done, eventually};

const MIB: usize = 1 << 20;

/// The promise: how long after the end of one aggregator another answers for its files.
pub(crate) const SUCCESSION: Duration = Duration::from_secs(5);

/// How often something is killed at a random moment.
const KILLS: u64 = 20;

/// A process of each role.
const ROLES: [&str; 4] = ["worker", "aggregator-0", "edge", "session"];

/// `dc-a` in processes, and `dc-b` in one.
pub(crate) struct Divided {
    pub(crate) site: Site,
    #[allow(dead_code, reason = "held for its drop")]
    sessions: ReservedPort,
    #[allow(dead_code, reason = "held for its drop")]
    aggregators: Vec<ReservedPort>,
    /// Where each process answers scrapers.
    admins: Mutex<BTreeMap<String, String>>,
}

impl Divided {
    /// With so many aggregators, which have no Redis.
    fn new(aggregators: usize) -> Self {
        Self::sharing(aggregators, 1, None)
    }

    /// With so many aggregators, which divide so many shares among themselves by what Redis says.
    pub(crate) fn sharing(aggregators: usize, shares: u32, redis: Option<&Server>) -> Self {
        let site = Site::divided(&["dc-a", "dc-b"], shares);
        let redis = redis.map_or_else(String::new, |server| format!("redis = \"{}\"\n", server.url()));
        let (sessions, inside) = (any(), site.inside[0].address());
        let aggregators: Vec<ReservedPort> = (0..aggregators).map(|_| any()).collect();
        let others: Vec<ReservedPort> = aggregators.iter().skip(1).map(|_| any()).collect();
        let write = |name: &str, role: &str, more: &str| {
            let text = format!(
                "role = \"{role}\"\ndc = \"dc-a\"\nkeys = \"keys/roles/dc-a/{role}\"\nadmin = \"127.0.0.1:0\"\n{redis}{more}"
            );
            site.home.write(&format!("{name}.toml"), text.as_bytes());
            done(site.home.command(&["config", "check", &format!("{name}.toml")]).output().unwrap().into());
        };
        // Where dc-b, which is one process, takes what moves there.
        let there = format!("[peers.dc-b]\nworkers = \"{}\"\n", site.inside[1].address());
        let listens = format!("listen = \"{}\"\n", sessions.address());
        write("session", "session", &format!("{listens}workers = \"{inside}\"\n{there}"));
        let edge = site.ports[0].edge.address();
        let asks =
            format!("sessions = \"{}\"\nworkers = \"localhost:{}\"\n", sessions.address(), inside.port());
        write("edge", "edge", &format!("listen = \"{edge}\"\n{asks}"));
        let names: Vec<String> = aggregators.iter().map(|port| port.address().to_string()).collect();
        let asks = format!("aggregators = \"{}\"\ndata = \"data/dc-a\"\n", names.join(","));
        let url = format!("url = \"{}\"\n", site.urls[1]);
        write("worker", "worker", &format!("listen = \"{inside}\"\n{asks}{there}{url}"));
        let peers: Vec<_> = std::iter::once(site.ports[0].peer.address())
            .chain(others.iter().map(ReservedPort::address))
            .collect();
        for (number, (listen, peer)) in aggregators.iter().zip(&peers).enumerate() {
            let text = format!(
                "listen = \"{}\"\npeer = \"{peer}\"\nworkers = \"{inside}\"\nurl = \"https://{edge}\"\n\
                 takeover_after = \"never\"\n[peers.dc-b]\naddress = \"{}\"\nurl = \"{}\"\n",
                listen.address(),
                site.ports[1].peer.address(),
                site.urls[1],
            );
            write(&format!("aggregator-{number}"), "aggregator", &text);
        }
        // Wherever an aggregator of dc-a answers.
        let text = std::fs::read_to_string(site.home.path("dc-b.toml")).unwrap();
        let all: Vec<String> = peers.iter().map(ToString::to_string).collect();
        let ways = format!(
            "url = \"{}\"\nworkers = \"{inside}\"\nsessions = \"{}\"\n",
            site.urls[0],
            sessions.address()
        );
        let address = |all: &str| format!("address = \"{all}\"\n");
        let text = text.replace(&address(&peers[0].to_string()), &(address(&all.join(",")) + &ways));
        site.home.write("dc-b.toml", text.as_bytes());
        Self { site, sessions, aggregators, admins: Mutex::default() }
    }

    pub(crate) fn begin(&self, name: &str) -> Running {
        let role = name.split('-').next().unwrap();
        let (running, said) = self.site.begin(role, name);
        assert_eq!(said["role"], role, "{said}");
        let admin = said["admin"].as_str().unwrap().to_owned();
        self.admins.lock().unwrap().insert(name.to_owned(), admin);
        running
    }

    /// Kills a process, and begins it anew.
    pub(crate) fn restart(&self, name: &str, running: &mut Running) {
        running.kill();
        *running = self.begin(name);
    }

    /// Uploads to dc-a, and as soon as so many acknowledgements came kills a process, which comes back while the
    /// upload goes on.
    pub(crate) async fn put_under_kill(
        &self,
        name: &str,
        running: &mut Running,
        bytes: &[u8],
        acknowledgements: u64,
    ) -> Uploaded {
        let (reached, waiting) = std::sync::mpsc::channel();
        let seen = AtomicU64::new(0);
        let observer = move |event: &Event| {
            if let Event::Acknowledged { .. } = event
                && seen.fetch_add(1, Ordering::SeqCst) + 1 == acknowledgements
            {
                reached.send(()).unwrap();
            }
        };
        let (client, source) = (self.client(&[0]), Source::memory(bytes.to_vec()));
        let upload =
            tokio::spawn(async move { client.upload(&source, &upload_here(), Arc::new(observer)).await });
        let killed = tokio::task::block_in_place(|| waiting.recv().map(|()| self.restart(name, running)));
        let sent = upload.await.unwrap().unwrap_or_else(|error| panic!("without {name}: {error}"));
        killed.unwrap();
        assert_eq!(sent.root, Root::of_bytes(bytes), "without {name}");
        sent
    }

    /// Sends files of about this length to dc-a, one after the other, until it is over; says which they were, and how
    /// long.
    fn send_until(&self, over: &AtomicBool, tag: &str, len: usize) -> Vec<(String, usize)> {
        let mut sent = Vec::new();
        while sent.is_empty() || !over.load(Ordering::SeqCst) {
            let (name, len) = (format!("{tag}-{}", sent.len()), len + sent.len());
            self.site.home.write(&name, &noise(len as u64, len));
            // Its session begins with it.
            let token = self.new_token(&name);
            let put = ["put", &name, "--wait", "assembled", "--token-file", &token];
            sent.push((done(self.run(0, &put)).trim().to_owned(), len));
        }
        sent
    }

    /// A token that nobody has used, in a file.
    pub(crate) fn new_token(&self, name: &str) -> String {
        let token = format!("token-{name}");
        let mint = ["admin", "token", "mint", "--keys", "keys/authority", "--tenant", "7", "--out", &token];
        done(self.site.home.command(&mint).output().unwrap().into());
        self.site.home.path(&token).to_str().unwrap().to_owned()
    }

    /// How many shares an aggregator has; 0 for one that is not there.
    pub(crate) fn shares(&self, number: usize) -> i64 {
        self.metric(&format!("aggregator-{number}"), "sluice_shares{dc=\"dc-a\"} ").unwrap_or(0)
    }

    /// A metric of one of the processes of dc-a, named with its labels.
    pub(crate) fn metric(&self, process: &str, name: &str) -> Option<i64> {
        let text = self.metrics(process)?;
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// All metrics of one of the processes of dc-a; `None` if it is not there.
    pub(crate) fn metrics(&self, process: &str) -> Option<String> {
        let admin = self.admins.lock().unwrap().get(process).cloned()?;
        scrape(admin.strip_prefix("http://")?)
    }

    /// Plain requests to dc-a.
    pub(crate) fn http(&self) -> Http {
        let ca = std::fs::read(self.site.home.path("ca.pem")).unwrap();
        let token = std::fs::read_to_string(self.site.home.path("token")).unwrap();
        Http::new(&ca, &self.site.urls[0], token.trim())
    }

    pub(crate) fn client(&self, dcs: &[usize]) -> Client {
        let urls = dcs.iter().map(|dc| self.site.urls[*dc].clone()).collect();
        let ca = std::fs::read(self.site.home.path("ca.pem")).unwrap();
        let token = Token::new(&std::fs::read_to_string(self.site.home.path("token")).unwrap());
        Client::new(ClientConfig::new(urls, token, ca)).unwrap()
    }

    pub(crate) fn run(&self, dc: usize, args: &[&str]) -> Ended {
        self.site.run(dc, args)
    }
}

/// What a process says to scrapers at this address; `None` if it does not.
pub(crate) fn scrape(address: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// Plain requests, with a token.
pub(crate) struct Http {
    http: reqwest::Client,
    base: String,
    token: String,
}

impl Http {
    /// To whoever answers at this URL, with a certificate of this CA.
    pub(crate) fn new(ca: &[u8], url: &str, token: &str) -> Self {
        sluice_node::tls::install_provider();
        let http = reqwest::Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(ca).unwrap()])
            .no_proxy()
            .build()
            .unwrap();
        Self { http, base: format!("{url}/v1"), token: token.to_owned() }
    }

    pub(crate) fn ask(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.token)
    }
}

/// Uploads to wherever the client goes; the home is `dc-a`.
pub(crate) async fn put(client: &Client, bytes: &[u8]) -> Uploaded {
    let sent = client.upload(&Source::memory(bytes.to_vec()), &upload_here(), Arc::new(|_: &Event| {})).await;
    let sent = sent.unwrap();
    assert_eq!(sent.root, Root::of_bytes(bytes));
    sent
}

pub(crate) fn upload_here() -> UploadOptions {
    UploadOptions {
        is_new: true,
        home: Some("dc-a".into()),
        wait: WaitFor::Assembled,
        ..UploadOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_in_processes_make_a_datacenter_like_any_other() {
    let divided = Divided::new(1);
    let processes = ["aggregator-0", "worker", "session", "edge"].map(|name| divided.begin(name));
    let b = divided.site.start("dc-b");
    let bytes = noise(21, 40 * MIB + 7);
    // Over both: what dc-b took is pulled into dc-a.
    let sent = put(&divided.client(&[0, 1]), &bytes).await;
    assert_eq!((sent.root, sent.home.as_str()), (Root::of_bytes(&bytes), "dc-a"));
    let id = sent.id.to_string();
    for dc in [0, 1] {
        let copy = format!("copy-{dc}");
        done(divided.run(dc, &["get", &id, "-o", &copy]));
        assert!(std::fs::read(divided.site.home.path(&copy)).unwrap() == bytes);
    }
    // A small one in one request, and a list.
    let small = noise(22, 5000);
    divided.site.home.write("small", &small);
    let small_id = done(divided.run(0, &["put", "small"])).trim().to_owned();
    done(divided.run(1, &["get", &small_id, "-o", "small-copy"]));
    assert!(std::fs::read(divided.site.home.path("small-copy")).unwrap() == small);
    let listed: Value = serde_json::from_str(&done(divided.run(0, &["ls", "--json"]))).unwrap();
    assert_eq!(listed["files"].as_array().unwrap().len(), 2, "{listed}");
    done(divided.run(0, &["rm", &id, "--yes"]));
    for dc in [0, 1] {
        eventually("the end of it everywhere", || {
            let ended = divided.run(dc, &["get", &id, "-o", "gone"]);
            (ended.code == Some(3)).then_some(())
        });
    }
    // In any order.
    b.stop();
    processes.into_iter().for_each(Running::stop);
    done(divided.site.home.command(&["fsck", "--data", "data/dc-a"]).output().unwrap().into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_role_is_killed_under_uploads_and_comes_back() {
    let divided = Divided::new(1);
    let mut running = ROLES.map(|name| divided.begin(name));
    let mut ids = Vec::new();
    for round in 0..8u64 {
        let which = round as usize % ROLES.len();
        let bytes = noise(30 + round, 40 * MIB + round as usize);
        let sent = divided.put_under_kill(ROLES[which], &mut running[which], &bytes, 2 + round / 4).await;
        ids.push((sent.id.to_string(), bytes));
    }
    for (id, bytes) in &ids {
        done(divided.run(0, &["get", id, "-o", "copy"]));
        assert!(std::fs::read(divided.site.home.path("copy")).unwrap() == *bytes);
        std::fs::remove_file(divided.site.home.path("copy")).unwrap();
    }
    done(divided.run(0, &["rm", &ids[0].0, "--yes"]));
    // What is ended stays so, whoever begins anew.
    for which in [1, 0] {
        divided.restart(ROLES[which], &mut running[which]);
        assert_eq!(divided.run(0, &["get", &ids[0].0, "-o", "gone"]).code, Some(3));
        done(divided.run(0, &["status", &ids[1].0]));
    }
    running.into_iter().for_each(Running::stop);
    done(divided.site.home.command(&["fsck", "--data", "data/dc-a"]).output().unwrap().into());
}

/// `SLUICE_SEED` makes other choices; how far uploads are by then is up to the machine.
#[test]
fn whatever_is_killed_at_random_moments_clients_see_retries_at_most() {
    let seed = std::env::var("SLUICE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    println!("SLUICE_SEED={seed}");
    let mut dice = Dice(seed);
    let divided = Divided::new(1);
    let b = divided.site.start("dc-b");
    let mut running = ROLES.map(|name| divided.begin(name));
    let over = AtomicBool::new(false);
    let (sending, ended) = (&divided, &over);
    let sent = std::thread::scope(|scope| {
        let senders = [("large", 32 * MIB), ("chunks", 3 * MIB), ("small", 4000)]
            .map(|(tag, len)| scope.spawn(move || sending.send_until(ended, tag, len)));
        let killer = scope.spawn(|| {
            for _ in 0..KILLS {
                let (which, pause) = (dice.below(ROLES.len() as u64) as usize, 20 + dice.below(581));
                std::thread::sleep(Duration::from_millis(pause));
                println!("{} is killed after {pause} ms", ROLES[which]);
                divided.restart(ROLES[which], &mut running[which]);
            }
        });
        let killed = killer.join();
        // However it ended.
        over.store(true, Ordering::SeqCst);
        let sent = senders.map(|sender| sender.join().unwrap());
        killed.unwrap();
        sent.into_iter().flatten().collect::<Vec<_>>()
    });
    println!("{} files were sent meanwhile", sent.len());
    for (number, (id, len)) in sent.iter().enumerate() {
        done(divided.run(number % 2, &["get", id, "-o", "copy", "--force"]));
        assert!(std::fs::read(divided.site.home.path("copy")).unwrap() == noise(*len as u64, *len), "{id}");
    }
    running.into_iter().chain([b]).for_each(Running::stop);
    for name in ["dc-a", "dc-b"] {
        let data = format!("data/{name}");
        done(divided.site.home.command(&["fsck", "--data", &data]).output().unwrap().into());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aggregator_that_stands_by_answers_for_the_files_of_one_that_is_killed() {
    let divided = Divided::new(2);
    let worker = divided.begin("worker");
    let mut aggregators = [Some(divided.begin("aggregator-0")), Some(divided.begin("aggregator-1"))];
    let (session, edge, b) = (divided.begin("session"), divided.begin("edge"), divided.site.start("dc-b"));
    let active = |what: &str| eventually(what, || (0..2).find(|aggregator| divided.shares(*aggregator) == 1));
    let bytes = noise(41, 24 * MIB + 1);
    let both = divided.client(&[0, 1]);
    let sent = put(&both, &bytes).await;
    let id = sent.id.to_string();
    for turn in 0..3 {
        let now = active("first");
        assert_eq!(divided.shares(1 - now), 0, "the other one stands by");
        drop(aggregators[now].take());
        let since = Instant::now();
        let status: Value = serde_json::from_str(&done(divided.run(0, &["status", &id, "--json"]))).unwrap();
        let took = since.elapsed();
        println!("turn {turn}: the next one answered after {} ms", took.as_millis());
        assert_eq!(status["state"], "assembled", "{status}");
        assert!(took < SUCCESSION, "it took {took:?}");
        assert_ne!(active("next"), now);
        // It talks to the other datacenter, too.
        let more = noise(50 + turn, 8 * MIB);
        put(&both, &more).await;
        aggregators[now] = Some(divided.begin(&format!("aggregator-{now}")));
    }
    // One that hangs is not waited for, and when it goes on it finds that its time is over.
    let now = active("the one that is to hang");
    let hung = Pid::from_child(&aggregators[now].as_ref().unwrap().0);
    kill_process(hung, Signal::STOP).unwrap();
    eventually("an answer of the other", || (divided.run(0, &["status", &id]).code == Some(0)).then_some(()));
    put(&both, &noise(60, 8 * MIB)).await;
    kill_process(hung, Signal::CONT).unwrap();
    eventually("the end of its time", || (divided.shares(now) == 0).then_some(()));
    put(&both, &noise(61, 8 * MIB)).await;
    done(divided.run(1, &["get", &id, "-o", "copy"]));
    assert!(std::fs::read(divided.site.home.path("copy")).unwrap() == bytes);
    for process in aggregators.into_iter().flatten().chain([edge, session, worker, b]) {
        process.stop();
    }
}
