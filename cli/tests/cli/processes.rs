//! Datacenters in processes of their own, with the keys that `sluice admin` makes.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use sluice::ports::{ReservedPort, ReservedPorts};
use sluice_client::{Client, ClientConfig, Event, Order, Source, Token, UploadOptions, WaitFor};
use sluice_engine::hash::Root;
use sluice_node::tls;
use uuid::Uuid;

use crate::fake::noise;
use crate::lost_disk::send_some;
use crate::{Ended, Home};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A running process, killed when it is dropped.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    /// Stops it in order.
    pub(crate) fn stop(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        assert_eq!(self.0.wait().unwrap().code(), Some(0));
    }

    /// Kills it with -9, and waits until it is gone. One that has ended needs no end.
    pub(crate) fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// What it logs.
    pub(crate) fn log(&mut self) -> Log {
        Log::of(self.0.stderr.take().unwrap())
    }
}

/// The lines that a process logs, as they come.
pub(crate) struct Log {
    lines: Arc<Mutex<Vec<String>>>,
    reader: JoinHandle<()>,
}

impl Log {
    fn of(stderr: ChildStderr) -> Self {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let read = lines.clone();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                read.lock().unwrap().push(line);
            }
        });
        Self { lines, reader }
    }

    /// How many lines there are so far that have all of these words.
    pub(crate) fn count(&self, words: &[&str]) -> usize {
        let lines = self.lines.lock().unwrap();
        lines.iter().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }

    /// All lines of a process that has ended.
    pub(crate) fn ended(self) -> Vec<String> {
        self.reader.join().unwrap();
        std::mem::take(&mut self.lines.lock().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Keys, a token, and a file for each datacenter.
pub(crate) struct Site {
    pub(crate) home: Home,
    pub(crate) urls: Vec<String>,
    /// So that nobody else takes them, also while a datacenter is down.
    pub(crate) ports: Vec<ReservedPorts>,
    /// Where each datacenter answers its own processes.
    pub(crate) inside: Vec<ReservedPort>,
}

impl Site {
    pub(crate) fn new(names: &[&str]) -> Self {
        Self::divided(names, 1)
    }

    /// The same for a cluster whose slots are divided into so many shares.
    pub(crate) fn divided(names: &[&str], shares: u32) -> Self {
        let mut home = Home::new(None);
        let shares = shares.to_string();
        let mut args = vec!["admin", "key", "make", "keys", "--cluster", "test", "--shares", &shares];
        args.extend(names.iter().flat_map(|name| ["--dc", *name]));
        done(home.command(&args).output().unwrap().into());
        std::fs::remove_file(home.path("token")).unwrap();
        let mint = ["admin", "token", "mint", "--keys", "keys/authority", "--tenant", "7", "--out", "token"];
        done(home.command(&mint).output().unwrap().into());
        std::fs::copy(home.path("keys/ca.pem"), home.path("ca.pem")).unwrap();

        let ports: Vec<_> =
            names.iter().map(|_| ReservedPorts { edge: any(), peer: any(), admin: any() }).collect();
        let inside: Vec<_> = names.iter().map(|_| any()).collect();
        for (me, (name, at)) in names.iter().zip(&ports).enumerate() {
            let (edge, peer, admin) = (at.edge.address(), at.peer.address(), at.admin.address());
            let mut text = format!(
                "dc = {name:?}\nkeys = \"keys/{name}\"\ndata = \"data/{name}\"\ntakeover_after = \"1s\"\n\
                 absent_after = \"500ms\"\n\
                 listen = {{ edge = \"{edge}\", peer = \"{peer}\", admin = \"{admin}\", inside = \"{}\" }}\n",
                inside[me].address()
            );
            for (_, (name, at)) in names.iter().zip(&ports).enumerate().filter(|(other, _)| *other != me) {
                text.push_str(&format!("[peers.{name}]\naddress = \"{}\"\n", at.peer.address()));
            }
            home.write(&format!("{name}.toml"), text.as_bytes());
        }
        let urls: Vec<String> = ports.iter().map(|at| format!("https://{}", at.edge.address())).collect();
        home.urls = urls.join(",");
        Self { home, urls, ports, inside }
    }

    /// Starts a datacenter, and waits until it serves.
    pub(crate) fn start(&self, name: &str) -> Running {
        let (dc, said) = self.begin("dc", name);
        assert_eq!(said["dc"], name, "{said}");
        dc
    }

    /// The same of another build of the binary.
    fn start_of(&self, binary: &Path, name: &str) -> Running {
        let config = format!("{name}.toml");
        let (dc, said) = serving(self.home.command_of(binary, &["dc", "--config", &config, "--json"]));
        assert_eq!(said["dc"], name, "{said}");
        dc
    }

    /// Starts a process from its file, and waits for what it says when it serves.
    pub(crate) fn begin(&self, verb: &str, file: &str) -> (Running, Value) {
        serving(self.home.command(&[verb, "--config", &format!("{file}.toml"), "--json"]))
    }

    /// A client of all datacenters.
    fn client(&self) -> Client {
        let ca = std::fs::read(self.home.path("ca.pem")).unwrap();
        let token = Token::new(&std::fs::read_to_string(self.home.path("token")).unwrap());
        Client::new(ClientConfig::new(self.urls.clone(), token, ca)).unwrap()
    }

    /// The value of one of a datacenter's metrics, named with its labels.
    pub(crate) async fn metric(&self, dc: usize, name: &str) -> Option<i64> {
        let url = format!("http://{}/metrics", self.ports[dc].admin.address());
        let text = reqwest::get(url).await.unwrap().text().await.unwrap();
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    pub(crate) fn run(&self, url: usize, args: &[&str]) -> Ended {
        self.home.command(&[args, &["--url", &self.urls[url]]].concat()).output().unwrap().into()
    }
}

/// Begins a process, and waits for what it says when it serves.
fn serving(mut command: Command) -> (Running, Value) {
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (Running(child), serde_json::from_str(&line).unwrap_or_default())
}

/// The binary of another version, which a process of the cluster may be.
fn other_binary() -> PathBuf {
    let named = std::env::var_os("SLUICE_OTHER_BINARY").expect("SLUICE_OTHER_BINARY names a binary");
    std::fs::canonicalize(named).expect("a binary where SLUICE_OTHER_BINARY says")
}

/// A port of this machine.
pub(crate) fn any() -> ReservedPort {
    ReservedPort::reserve(([127, 0, 0, 1], 0).into()).unwrap()
}

pub(crate) fn done(ended: Ended) -> String {
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.stdout
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_process_of_the_home_dies_for_good_and_another_takes_over() {
    let site = Site::new(&["dc-a", "dc-b", "dc-c"]);
    let (a, b, c) = (site.start("dc-a"), site.start("dc-b"), site.start("dc-c"));
    let bytes = noise(9, 96 * MIB);
    let id = Uuid::now_v7();

    // Its process is killed as soon as it has something that nobody else has.
    let (victim, taken) = (Mutex::new(Some(a)), Arc::new(Mutex::new(Vec::new())));
    let seen = taken.clone();
    let observer = move |event: &Event| {
        if let Event::Acknowledged { dc, start, count, .. } = event {
            let mut seen = seen.lock().unwrap();
            seen.push(((*dc).to_owned(), *start..*start + *count));
            let dcs: BTreeSet<&String> = seen.iter().map(|(dc, _)| dc).collect();
            if dcs.len() == 3 && seen.len() >= 8 {
                drop(victim.lock().unwrap().take());
            }
        }
    };
    let options = UploadOptions {
        id: Some(id),
        is_new: true,
        home: Some("dc-a".into()),
        wait: WaitFor::Assembled,
        ..UploadOptions::default()
    };
    let sent =
        site.client().upload(&Source::memory(bytes.clone()), &options, Arc::new(observer)).await.unwrap();
    assert_eq!(sent.root, Root::of_bytes(&bytes));
    assert!(["dc-b", "dc-c"].contains(&sent.home.as_str()), "{}", sent.home);
    let of = |name: &str| -> BTreeSet<u64> {
        let taken = taken.lock().unwrap();
        taken.iter().filter(|(dc, _)| dc == name).flat_map(|(_, range)| range.clone()).collect()
    };
    let (lost, kept) = (of("dc-a"), &of("dc-b") | &of("dc-c"));
    assert!(!lost.is_empty());
    assert_eq!(kept, (0..96).collect::<BTreeSet<_>>());
    assert_eq!(sent.chunks_sent, 96 + lost.len() as u64, "what others had was not sent again");

    // It comes back, and agrees.
    let a = site.start("dc-a");
    let id = id.to_string();
    for url in 0..3 {
        eventually("one home", || {
            let status = site.run(url, &["status", &id, "--json"]);
            let status: Value = serde_json::from_str(&status.stdout).ok()?;
            (status["state"] == "assembled" && status["home"] == sent.home.as_str()).then_some(())
        });
        let copy = format!("copy-{url}");
        done(site.run(url, &["get", &id, "-o", &copy]));
        assert!(std::fs::read(site.home.path(&copy)).unwrap() == bytes);
    }
    for dc in [a, b, c] {
        dc.stop();
    }
    for name in ["dc-a", "dc-b", "dc-c"] {
        done(site.home.command(&["fsck", "--data", &format!("data/{name}")]).output().unwrap().into());
    }
}

/// An upgrade, of one datacenter after the other. The path is a whole one:
///
///     SLUICE_OTHER_BINARY=/…/sluice cargo nextest run -p sluice --test cli --run-ignored only earlier_version
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the binary of an earlier version, which SLUICE_OTHER_BINARY names"]
async fn a_datacenter_of_an_earlier_version_works_beside_one_of_this_and_is_upgraded() {
    tls::install_provider();
    let other = other_binary();
    let site = Site::new(&["dc-a", "dc-b"]);
    let (a, b) = (site.start("dc-a"), site.start_of(&other, "dc-b"));
    site.linked().await;
    // Through each, to a home at each.
    let send = |round: u64| -> Vec<(String, Vec<u8>)> {
        let ways = (0..2).flat_map(|url| ["dc-a", "dc-b"].map(|home| (url, home)));
        let sizes = ways.flat_map(|(url, home)| [999, 20 * MIB + 3].map(|len| (url, home, len)));
        let put = |(number, (url, home, len)): (u64, (usize, &str, usize))| {
            let (name, bytes) = (format!("file-{round}-{number}"), noise(round * 100 + number, len));
            site.home.write(&name, &bytes);
            let sent = site.put(url, &[&name, "--home", home]);
            assert_eq!((&sent["state"], &sent["home"]), (&"assembled".into(), &home.into()), "{sent}");
            (sent["id"].as_str().unwrap().to_owned(), bytes)
        };
        (0..).zip(sizes).map(put).collect()
    };
    let check = |files: &[(String, Vec<u8>)]| files.iter().for_each(|(id, bytes)| site.reads(id, bytes));
    let before = send(1);
    check(&before);
    // A client of the earlier version, too.
    for (url, (id, bytes)) in (0..2).zip(&before) {
        let get = ["get", id, "-o", "copy", "--force", "--url", &site.urls[url]];
        done(site.home.command_of(&other, &get).output().unwrap().into());
        assert!(std::fs::read(site.home.path("copy")).unwrap() == *bytes, "{id}");
    }
    let put = ["put", "copy", "--wait", "assembled", "--url", &site.urls[0]];
    let by_other = done(site.home.command_of(&other, &put).output().unwrap().into());
    site.reads(by_other.trim(), &before[1].1);
    // One that is not finished, and of which both have something.
    let (half, bytes) = (Uuid::now_v7(), noise(3, 130 * MIB));
    let (client, source) = (site.client(), Source::memory(bytes.clone()));
    let options = UploadOptions {
        id: Some(half),
        home: Some("dc-b".into()),
        order: Order::Shuffled { seed: 7, inside: true },
        wait: WaitFor::Assembled,
        ..UploadOptions::default()
    };
    send_some(&client, &source, &options).await;

    b.stop();
    let fsck = |name: &str, how: &[&str]| {
        let data = format!("data/{name}");
        done(site.home.command(&[&["fsck", "--data", &data], how].concat()).output().unwrap().into());
    };
    fsck("dc-b", &["--quick"]);
    let b = site.start("dc-b");
    site.linked().await;
    check(&before);
    let sent = client.upload(&source, &options, Arc::new(|_: &Event| {})).await.unwrap();
    assert_eq!(sent.root, Root::of_bytes(&bytes));
    site.reads(&half.to_string(), &bytes);
    let after = send(2);
    check(&after);
    done(site.run(1, &["rm", &before[0].0, "--yes"]));
    for url in 0..2 {
        eventually("the end of it", || {
            let ended = site.run(url, &["get", &before[0].0, "-o", "gone"]);
            (ended.code == Some(3)).then_some(())
        });
    }
    for (dc, name) in [(a, "dc-a"), (b, "dc-b")] {
        dc.stop();
        fsck(name, &[]);
    }
}

#[test]
fn keys_and_files_that_are_wrong_are_named_and_nothing_is_written_over() {
    let site = Site::new(&["dc-a", "dc-b"]);
    let home = &site.home;
    let run = |args: &[&str]| -> Ended { home.command(args).output().unwrap().into() };
    for (args, code, said) in [
        (&["admin", "key", "make", "keys", "--cluster", "x", "--dc", "dc-a"][..], 2, "keys-exist"),
        (&["admin", "key", "make", "more", "--cluster", "x", "--dc", "dc-a", "--dc", "dc-a"], 2, "(keys)"),
        (&["admin", "key", "make", "more", "--cluster", "a b", "--dc", "dc-a"], 2, "(keys)"),
        (
            &["admin", "key", "make", "more", "--cluster", "x", "--dc", "dc-a", "--shares", "12"],
            2,
            "(shares)",
        ),
        (&["admin", "token", "mint", "--keys", "keys/dc-a", "--tenant", "7", "--out", "t"], 2, "authority"),
        (
            &["admin", "token", "mint", "--keys", "keys/authority", "--tenant", "7", "--out", "token"],
            2,
            "token exists already (exists)",
        ),
        (&["admin", "key", "renew", "nowhere"], 2, "(keys)"),
        (&["admin", "key", "renew", "keys/dc-a"], 2, "(keys)"),
        (&["dc", "--config", "none.toml"], 2, "none.toml does not exist"),
    ] {
        let ended = run(args);
        assert_eq!(ended.code, Some(code), "{args:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(said), "{args:?}: {}", ended.stderr);
    }
    assert!(!home.path("more").exists());
    done(run(&["config", "check", "dc-a.toml"]));
    let text = std::fs::read_to_string(home.path("dc-a.toml")).unwrap();
    home.write("bad.toml", text.replace("takeover_after", "takeover").as_bytes());
    for args in [&["config", "check", "bad.toml"][..], &["dc", "--config", "bad.toml"]] {
        let ended = run(args);
        assert_eq!(ended.code, Some(2));
        assert!(ended.stderr.contains("bad.toml:4: unknown field `takeover`"), "{}", ended.stderr);
    }
}
