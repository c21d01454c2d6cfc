//! Processes of a datacenter that share a real Redis: slow, down, flushed, failed over, with another password.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;
use sluice::cluster::{Cluster, ClusterConfig};
use sluice::process::{EdgeProcess, Process, ProcessConfig, SessionProcess};
use sluice_edge::EdgeSettings;
use sluice_engine::ids::{DcId, TenantId};
use sluice_engine::limits::MAX_CONTEXT_LIFE_MS;
use sluice_engine::rate::BURST_MS;
use sluice_fault_s3::Garage;
use sluice_node::clock::{Clock, ManualClock, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::role::Role;
use sluice_node::token::TokenGrant;
use sluice_proto::http::ProblemDetails;
use sluice_redis::testing::{Server, available};
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::Ended;
use crate::bucket::with_porters;
use crate::divided::{Divided, Http};
use crate::fake::noise;
use crate::kubernetes::asked_by_the_dashboard;
use crate::processes::{Running, any, done, eventually};
use crate::roles::Fleet;

const MIB: usize = 1 << 20;

/// A fleet whose processes share `redis`.
struct Sharing {
    fleet: Fleet,
    dc: Running,
    session: Option<Running>,
    edge: Option<Running>,
}

const PASSWORD: &str = "hunter2";

fn server() -> Server {
    Server::with_password(PASSWORD)
}

/// One that follows `primary`, and takes its place with the same password.
fn replica(primary: &Server) -> Server {
    let port = primary.port().to_string();
    let follows = ["--masterauth", PASSWORD, "--replicaof", "127.0.0.1", &port];
    Server::with(Some(PASSWORD), &[&["--requirepass", PASSWORD][..], &follows].concat())
}

/// How many revocations it has.
fn revocations(server: &Server) -> String {
    server.cli(&["HLEN", "sluice:test:1:revoked"])
}

/// How many sessions it knows.
fn sessions(server: &Server) -> usize {
    server.cli(&["KEYS", "sluice:test:1:session:*"]).lines().count()
}

/// An address that stays when whoever answers there is another.
struct Forwarder {
    address: SocketAddr,
    /// The port that it leads to, and both ends of what leads there now.
    way: Arc<Mutex<(u16, Vec<TcpStream>)>>,
}

impl Forwarder {
    /// Leads to a port of this machine. Its threads end with the process.
    fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let way = Arc::new(Mutex::new((port, Vec::new())));
        let this = Self { address, way: way.clone() };
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let mut way = way.lock().unwrap();
                // Whoever comes while nobody is there is sent away.
                let Ok(far) = TcpStream::connect(("127.0.0.1", way.0)) else { continue };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    from.set_nodelay(true).unwrap();
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
                way.1.extend([near, far]);
            }
        });
        this
    }

    fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Ends what goes through it, and leads elsewhere from now on.
    fn lead_to(&self, port: u16) {
        let mut way = self.way.lock().unwrap();
        way.0 = port;
        for stream in way.1.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn share(path: &Path, redis: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    // Before the tables.
    let keys = format!("redis = \"{redis}\"\nredis_password = \"redis-password\"\n");
    std::fs::write(path, keys + &text).unwrap();
}

impl Sharing {
    fn start(redis: &str) -> Self {
        let fleet = Fleet::new();
        fleet.site.home.write("redis-password", format!("{PASSWORD}\n").as_bytes());
        for name in ["dc-a", "session", "edge-0"] {
            share(&fleet.site.home.path(&format!("{name}.toml")), redis);
        }
        let mint = "admin token mint --keys keys/authority --operator --life 1h --out operator";
        done(fleet.site.home.command(&mint.split(' ').collect::<Vec<_>>()).output().unwrap().into());
        let (dc, said) = fleet.site.begin("dc", "dc-a");
        assert_eq!(said["dc"], "dc-a", "{said}");
        let (session, said) = fleet.site.begin("session", "session");
        assert_eq!(said["role"], "session", "{said}");
        let (edge, _) = fleet.site.begin("edge", "edge-0");
        Self { fleet, dc, session: Some(session), edge: Some(edge) }
    }

    /// Kills the edge and the session service, and starts them with nothing in their memory.
    fn begin_anew(&mut self) {
        drop((self.edge.take(), self.session.take()));
        self.session = Some(self.fleet.site.begin("session", "session").0);
        self.edge = Some(self.fleet.site.begin("edge", "edge-0").0);
    }

    fn stop(self) {
        self.edge.into_iter().chain(self.session).for_each(Running::stop);
        self.dc.stop();
    }

    /// Where the edge is that is a process of its own.
    fn url(&self) -> String {
        format!("https://{}", self.fleet.edges[0].address())
    }

    /// A token of the tenant 7 in a file of this name.
    fn mint(&self, name: &str) {
        let mint = ["admin", "token", "mint", "--keys", "keys/authority", "--tenant", "7", "--out", name];
        done(self.fleet.site.home.command(&mint).output().unwrap().into());
    }

    /// Asks the edge that is a process of its own for a list.
    fn list(&self, token: &str) -> Ended {
        let home = &self.fleet.site.home;
        let mut list = home.command(&["ls", "--url", &self.url(), "--retry-for", "0s"]);
        list.env("SLUICE_TOKEN_FILE", home.path(token)).output().unwrap().into()
    }

    fn revoke(&self, token: &str) {
        let home = &self.fleet.site.home;
        let mut revoke =
            home.command(&["admin", "token", "revoke", token, "--url", &self.fleet.site.urls[0]]);
        done(revoke.env("SLUICE_TOKEN_FILE", home.path("operator")).output().unwrap().into());
    }

    /// Asks it with a revoked token.
    fn is_revoked(&self, token: &str) {
        let ended = self.list(token);
        assert_eq!(ended.code, Some(4), "{}", ended.stderr);
        assert!(ended.stderr.contains("(revoked-token)"), "{}", ended.stderr);
    }

    fn logs_in(&self, token: &str) {
        eventually("a login", || (self.list(token).code == Some(0)).then_some(()));
    }
}

#[test]
fn the_wrong_password_ends_a_process_with_a_word() {
    if !available() {
        return;
    }
    let (server, fleet) = (server(), Fleet::new());
    fleet.site.home.write("redis-password", b"wrong");
    for (verb, name) in [("dc", "dc-a"), ("session", "session"), ("edge", "edge-0")] {
        let file = format!("{name}.toml");
        share(&fleet.site.home.path(&file), &server.url());
        done(fleet.site.home.command(&["config", "check", &file]).output().unwrap().into());
        let ended: Ended = fleet.site.home.command(&[verb, "--config", &file]).output().unwrap().into();
        assert_eq!(ended.code, Some(4), "{}", ended.stderr);
        assert!(ended.stderr.contains("refuses us") && ended.stderr.contains("(redis)"), "{}", ended.stderr);
        assert!(!ended.stderr.contains("wrong\n"), "{}", ended.stderr);
    }
}

/// Faults 33 and 34.
#[test]
fn without_redis_living_contexts_work_and_logins_fail_and_nothing_revoked_comes_back() {
    if !available() {
        return;
    }
    let mut server = server();
    let mut sharing = Sharing::start(&server.url());
    for token in ["one", "two", "three", "four"] {
        sharing.mint(token);
    }
    sharing.logs_in("one");
    sharing.logs_in("two");
    // Revoked at the datacenter's own edge: the process of the other edge, and its session service, hear of it.
    sharing.revoke("two");
    assert_eq!(sharing.list("two").code, Some(4));
    eventually("the revocation in Redis", || (revocations(&server) == "1").then_some(()));
    let admin = sharing.fleet.site.ports[0].admin.address();
    sluice_node::tls::install_provider();
    let metrics = async { reqwest::get(format!("http://{admin}/metrics")).await?.text().await };
    let metrics = tokio::runtime::Runtime::new().unwrap().block_on(metrics).unwrap();
    let asked = asked_by_the_dashboard("sluice_redis_");
    assert!(asked.len() >= 3, "{asked:?}");
    for name in asked {
        assert!(metrics.contains(&format!("\n{name}{{")), "no {name} in\n{metrics}");
    }

    server.kill();
    let refused = eventually("a login that fails", || {
        let ended = sharing.list("three");
        (ended.code == Some(6)).then_some(ended)
    });
    assert!(refused.stderr.contains("(unavailable)"), "{}", refused.stderr);
    assert_eq!(sharing.list("one").code, Some(0), "a living context");
    assert_eq!(sharing.list("two").code, Some(4), "a revoked one");
    // It comes back empty, and so does the session service: what is revoked is taught again.
    server.restart(&["--requirepass", PASSWORD]);
    drop(sharing.session.take());
    sharing.session = Some(sharing.fleet.site.begin("session", "session").0);
    sharing.logs_in("three");
    assert_eq!(sharing.list("two").code, Some(4));
    eventually("the revocation in Redis, again", || (revocations(&server) == "1").then_some(()));

    // One that hangs costs logins a moment, and nothing else.
    server.hang();
    let refused = eventually("a login that fails", || {
        let ended = sharing.list("four");
        (ended.code == Some(6)).then_some(ended)
    });
    assert!(refused.stderr.contains("(unavailable)"), "{}", refused.stderr);
    assert_eq!(sharing.list("three").code, Some(0));
    server.go_on();
    sharing.logs_in("four");
    sharing.stop();
}

/// Faults 32 and 33, under an upload: the replica that takes over knows of no revocation, and not of the last session.
#[test]
fn a_failover_that_loses_a_revocation_and_a_session_revives_no_token_and_stops_no_upload() {
    if !available() {
        return;
    }
    let mut primary = server();
    let (replica, forwarder) = (replica(&primary), Forwarder::to(primary.port()));
    let mut sharing = Sharing::start(&forwarder.url());
    for token in ["one", "two", "three", "four"] {
        sharing.mint(token);
    }
    sharing.logs_in("one");
    sharing.logs_in("two");

    // Half of a file goes into a process that waits for more of it.
    let url = sharing.url();
    let ask = |args: &[&str]| -> Ended {
        sharing.fleet.site.home.command(&[args, &["--url", &url]].concat()).output().unwrap().into()
    };
    let bytes = noise(32, 40 * MIB + 1);
    let put = ["put", "-", "--name", "half", "--wait", "assembled", "--url", &url];
    let mut put = sharing.fleet.site.home.command(&put).stdin(Stdio::piped()).spawn().unwrap();
    let mut pipe = put.stdin.take().unwrap();
    pipe.write_all(&bytes[..24 * MIB]).unwrap();
    let half = eventually("half of a file", || {
        let files: Value = serde_json::from_str(&ask(&["ls", "--json"]).stdout).ok()?;
        let id = files["files"][0]["id"].as_str()?.to_owned();
        let status: Value = serde_json::from_str(&ask(&["status", &id, "--json"]).stdout).ok()?;
        (status["holders"][0]["chunks"].as_u64()? >= 8).then_some(id)
    });

    replica.catches_up_with(&primary);
    replica.cut_off();
    sharing.revoke("two");
    eventually("the revocation in Redis", || (revocations(&primary) == "1").then_some(()));
    sharing.is_revoked("two");
    sharing.logs_in("three");
    assert_eq!(revocations(&replica), "0");
    assert!(sessions(&replica) < sessions(&primary));
    primary.kill();
    sharing.is_revoked("two");
    replica.promote();
    forwarder.lead_to(replica.port());

    sharing.is_revoked("two");
    assert_eq!(sharing.list("three").code, Some(0), "a living context");
    sharing.logs_in("four");
    eventually("the revocation in Redis, again", || (revocations(&replica) == "1").then_some(()));
    pipe.write_all(&bytes[24 * MIB..]).unwrap();
    drop(pipe);
    let sent = done(put.wait_with_output().unwrap().into());
    assert_eq!(sent.trim_end(), half);
    done(ask(&["get", &half, "-o", "copy"]));
    assert!(std::fs::read(sharing.fleet.site.home.path("copy")).unwrap() == bytes);

    // Whoever knows only what Redis knows now.
    let known = sessions(&replica);
    sharing.begin_anew();
    sharing.logs_in("three");
    assert!(sessions(&replica) > known, "begun again");
    sharing.is_revoked("two");
    sharing.stop();
}

/// Fault 34, to the end of contexts, on a clock of the test's: at an edge that is a process of its own, with its session
/// service, and at that of the datacenter's.
#[test]
fn without_redis_a_context_lives_to_its_end_and_no_longer_and_no_session_begins() {
    if !available() {
        return;
    }
    let (mut server, runtime) = (server(), Runtime::new().unwrap());
    let (dir, dc) = (tempfile::tempdir().unwrap(), DcId::new(1));
    let (clock, listen) = (ManualClock::at(SystemClock.now()), SocketAddr::from(([127, 0, 0, 1], 0)));
    let material = ClusterMaterial::generate("test", &[(dc, "dc-a")]).unwrap();
    let config = ClusterConfig { clock: clock.clone(), ..ClusterConfig::new(material.clone(), dir.path()) };
    let mut cluster = Cluster::new(config).unwrap();
    cluster.config_mut(dc).unwrap().redis = Some(server.config());
    let workers = cluster.config(dc).unwrap().inside.unwrap().to_string();
    let process = |role| ProcessConfig {
        dc,
        material: Arc::new(material.only_role(dc, role).unwrap()),
        admin: listen,
        clock: clock.clone(),
        redis: Some(server.config()),
    };
    let (session, edge) = runtime.block_on(async {
        cluster.start(dc).await.unwrap();
        let session = SessionProcess { listen, workers: None, others: Vec::new() };
        let session = Process::session(&process(Role::Session), &session).await.unwrap();
        let sessions = session.address().to_string();
        let edge =
            EdgeProcess { listen, sessions, workers, memory: 64 << 20, settings: EdgeSettings::default() };
        (session, Process::edge(&process(Role::Edge), &edge).await.unwrap())
    });

    let token = || {
        let grant = TokenGrant::everything(TenantId::new(7), "test", Duration::from_secs(3600));
        material.token_mint().unwrap().mint(&grant, clock.now()).unwrap()
    };
    // At each edge a token whose session begins while Redis is there, and one whose does not.
    let ca = material.ca_pem();
    let urls = [format!("https://{}", edge.address()), cluster.urls().remove(0)];
    let edges = urls.map(|url| [token(), token()].map(|token| Http::new(ca.as_bytes(), &url, &token)));
    let refused = |http: &Http| -> Option<ProblemDetails> {
        runtime.block_on(async {
            let answer = http.ask(Method::GET, "/files").send().await.unwrap();
            if answer.status().is_success() { None } else { Some(answer.json().await.unwrap()) }
        })
    };
    let is_refused = |http: &Http| {
        let problem = refused(http).expect("a refusal");
        assert_eq!(problem.code(), "unavailable", "{problem:?}");
        assert!(problem.detail.contains("the sessions of this datacenter"), "{problem:?}");
    };
    let lives = |http: &Http| refused(http).is_none().then_some(());
    for [old, _] in &edges {
        eventually("a login", || lives(old));
    }

    server.kill();
    for pause in [0, MAX_CONTEXT_LIFE_MS - 1] {
        clock.advance(pause);
        for [old, new] in &edges {
            is_refused(new);
            let problem = refused(old);
            assert!(problem.is_none(), "after {pause} ms: {problem:?}");
        }
    }
    clock.advance(1);
    edges.iter().flatten().for_each(is_refused);
    server.restart(&["--requirepass", PASSWORD]);
    for http in edges.iter().flatten() {
        eventually("a login", || lives(http));
    }
    runtime.block_on(async {
        edge.stop(Duration::from_secs(10)).await;
        session.stop(Duration::from_secs(10)).await;
        cluster.kill_all().await;
    });
}

/// Fault 51, of a tenant that comes in by two ways.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rate_is_one_for_all_edges_and_porters_of_a_datacenter() {
    if !available() {
        return;
    }
    let Some(garage) = Garage::start() else { return };
    let redis = Server::start();
    let divided = Divided::sharing(1, 4, Some(&redis));
    let (home, porters) = (&divided.site.home, with_porters(&divided, &garage));
    // Two edges, of which each knows one porter.
    let second = any();
    let listens = [divided.site.ports[0].edge.address(), second.address()];
    let edge = std::fs::read_to_string(home.path("edge.toml")).unwrap();
    let both = format!("workers = \"{},{}\"", porters[0].address(), porters[1].address());
    for ((name, listen), porter) in ["edge", "edge-1"].into_iter().zip(listens).zip(&porters) {
        let text = edge.replace(&both, &format!("workers = \"{}\"", porter.address()));
        let text = text.replace(&format!("listen = \"{}\"", listens[0]), &format!("listen = \"{listen}\""));
        home.write(&format!("{name}.toml"), text.as_bytes());
    }
    let names = ["aggregator-0", "worker", "worker-1", "worker-2", "session", "edge", "edge-1"];
    let running = names.map(|name| divided.begin(name));
    let b = divided.site.start("dc-b");

    let ca = std::fs::read(home.path("ca.pem")).unwrap();
    let urls = listens.map(|listen| format!("https://{listen}"));
    // A tenant at either edge, with a token of this rate.
    let tenant = |tenant: &str, rate: &str| {
        let out = format!("tenant-{tenant}");
        let mint = ["admin", "token", "mint", "--keys", "keys/authority", "--tenant", tenant];
        let mint = [&mint[..], &["--rate", rate, "--out", &out]].concat();
        done(home.command(&mint).output().unwrap().into());
        let token = std::fs::read_to_string(home.path(&out)).unwrap();
        urls.each_ref().map(|url| Http::new(&ca, url, token.trim()))
    };
    eventually("every share", || (divided.shares(0) == 4).then_some(()));
    for url in &urls {
        eventually("an answer", || {
            let ended: Ended = home.command(&["ls", "--url", url]).output().unwrap().into();
            (ended.code == Some(0)).then_some(())
        });
    }

    // A byte a second: what is asked at one edge is paid for in hours, at the other too.
    let list = async |http: &Http| http.ask(Method::GET, "/files").send().await.unwrap();
    for (number, one, other) in [("8", 0, 1), ("9", 1, 0)] {
        let edges = tenant(number, "1");
        assert_eq!(list(&edges[one]).await.status(), 200);
        assert_eq!(redis.cli(&["EXISTS", &format!("sluice:test:1:rate:{number}")]), "1");
        let refused = list(&edges[other]).await;
        assert_eq!(
            (refused.status().as_u16(), refused.headers()["retry-after"].as_bytes()),
            (429, &b"60"[..])
        );
        assert_eq!(refused.json::<ProblemDetails>().await.unwrap().code(), "rate-limited");
    }

    // Small files at both at once, as fast as may be: what is taken is what one rate lets in.
    const RATE: u64 = 256 << 10;
    const LEN: u64 = 64 << 10;
    let edges = tenant("10", &RATE.to_string());
    let began = Instant::now();
    let send = async |http: &Http| {
        let mut taken = 0;
        // Until one rate is told from two, and neither was left out.
        while began.elapsed() < Duration::from_secs(3) || taken < 2 {
            assert!(began.elapsed() < Duration::from_secs(60), "{taken} files were taken");
            let said = format!(r#"{{"id":"{}"}}"#, Uuid::now_v7());
            let post = http.ask(Method::POST, "/files").header("file-metadata", said);
            let answer = post.body(noise(taken, LEN as usize)).send().await.unwrap();
            let (status, said) = (answer.status().as_u16(), answer.text().await.unwrap());
            match status {
                201 => taken += 1,
                429 => tokio::time::sleep(Duration::from_millis(20)).await,
                _ => panic!("{status}: {said}"),
            }
        }
        taken
    };
    let (one, other) = tokio::join!(send(&edges[0]), send(&edges[1]));
    let took = began.elapsed().as_millis() as u64 + 1;
    println!("{one} and {other} files were taken in {took} ms");
    // A second of it at once, and one file that is paid for afterwards.
    let most = RATE * (took + BURST_MS) / 1000 + LEN;
    assert!((one + other) * LEN <= most, "{one} and {other} files of {LEN} bytes, of {most} bytes");
    running.into_iter().rev().chain([b]).for_each(Running::stop);
}
