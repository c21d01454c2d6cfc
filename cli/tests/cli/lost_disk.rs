//! A datacenter that loses its disk, or all of its machine, and comes back with an empty directory, or with an older copy of it.

use std::io::Read;
use std::sync::Arc;

use serde_json::Value;
use sluice::ports::ReservedPorts;
use sluice_client::{Client, ClientConfig, Event, Order, Source, Token, UploadOptions, WaitFor};
use sluice_node::tls;
use tokio::sync::watch;
use uuid::Uuid;

use crate::fake::noise;
use crate::processes::{Site, any, done, eventually};

const MIB: usize = 1 << 20;
const NAMES: [&str; 2] = ["dc-a", "dc-b"];

impl Site {
    /// Where a file stands, as a datacenter answers; nothing if it cannot tell.
    fn status(&self, url: usize, id: &str) -> Option<Value> {
        let ended = self.run(url, &["status", id, "--json"]);
        serde_json::from_str(&ended.stdout).ok().filter(|_| ended.code == Some(0))
    }

    /// Waits until both datacenters say the same of a file, and this of it.
    pub(crate) fn agree(&self, id: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        eventually(what, || {
            let said: Vec<Value> = (0..2)
                .filter_map(|url| {
                    let mut status = self.status(url, id)?;
                    assert_eq!(status["dc"].take(), NAMES[url]);
                    Some(status)
                })
                .collect();
            let [a, b] = &said[..] else { return None };
            (a == b && is_so(a)).then(|| a.clone())
        })
    }

    /// Sends a file, new or again.
    pub(crate) fn put(&self, url: usize, args: &[&str]) -> Value {
        let said = done(self.run(url, &[&["put", "--json", "--wait", "assembled"], args].concat()));
        serde_json::from_str(&said).unwrap()
    }

    /// Writes a file and sends it to one, which is assembled in the datacenter that is named. Its id.
    fn put_new(&self, name: &str, bytes: &[u8], url: usize, home: &str) -> String {
        self.home.write(name, bytes);
        let sent = self.put(url, &[name, "--home", home]);
        assert_eq!((&sent["state"], &sent["home"]), (&"assembled".into(), &home.into()), "{sent}");
        sent["id"].as_str().unwrap().to_owned()
    }

    /// Sends to one the part of a file that the cluster lacks, so many chunks; whole again, it is read at both.
    fn put_again(&self, name: &str, bytes: &[u8], id: &str, url: usize, chunks: u64, home: &str) {
        let sent = self.put(url, &[name, "--id", id]);
        let root = blake3::hash(bytes).to_string();
        assert_eq!((&sent["root"], &sent["chunks_sent"]), (&root.into(), &chunks.into()), "{sent}");
        self.agree(id, "the file again", |status| {
            status["state"] == "assembled" && status["home"] == home && status["missing_chunks"] == 0
        });
        self.reads(id, bytes);
    }

    /// Waits until both say that a file is in one datacenter only.
    fn only_copy(&self, id: &str, name: &str) -> Value {
        self.agree(id, "the only copy", |status| {
            status["holders"].as_array().is_some_and(|all| all.len() == 1 && all[0]["dc"] == name)
        })
    }

    /// Reads a file at both, and compares it.
    pub(crate) fn reads(&self, id: &str, bytes: &[u8]) {
        for (url, name) in NAMES.iter().enumerate() {
            let copy = format!("{id}-at-{name}");
            done(self.run(url, &["get", id, "-o", &copy, "--force"]));
            assert!(std::fs::read(self.home.path(&copy)).unwrap() == bytes, "at {name}");
        }
    }

    /// Gives a datacenter other addresses, as another machine has them, in its own file and in its peer's.
    fn moves(&mut self, dc: usize) {
        let new = ReservedPorts { edge: any(), peer: any(), admin: any() };
        let old = std::mem::replace(&mut self.ports[dc], new);
        let old_inside = std::mem::replace(&mut self.inside[dc], any());
        let new = &self.ports[dc];
        let changes = [
            (&old.edge, &new.edge),
            (&old.peer, &new.peer),
            (&old.admin, &new.admin),
            (&old_inside, &self.inside[dc]),
        ];
        for name in NAMES {
            let file = self.home.path(&format!("{name}.toml"));
            let mut text = std::fs::read_to_string(&file).unwrap();
            for (old, new) in changes {
                text = text.replace(&format!("\"{}\"", old.address()), &format!("\"{}\"", new.address()));
            }
            std::fs::write(&file, text).unwrap();
        }
        self.urls[dc] = format!("https://{}", new.edge.address());
        self.home.urls = self.urls.join(",");
    }

    /// Waits until both reach each other.
    pub(crate) async fn linked(&self) {
        for (dc, peer) in [(0, "dc-b"), (1, "dc-a")] {
            let name = format!("sluice_peer_up{{dc=\"{}\",peer=\"{peer}\"}}", NAMES[dc]);
            let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
            while self.metric(dc, &name).await != Some(1) {
                assert!(std::time::Instant::now() < until, "{} does not reach {peer}", NAMES[dc]);
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}

/// Sends chunks to both until each has acknowledged some, and gives up.
pub(crate) async fn send_some(client: &Client, source: &Source, options: &UploadOptions) {
    let (sender, mut seen) = watch::channel([0u64; 2]);
    let observer = move |event: &Event| {
        if let Event::Acknowledged { dc, count, .. } = event {
            let at = usize::from(*dc != "dc-a");
            sender.send_modify(|seen| seen[at] += *count);
        }
    };
    tokio::select! {
        sent = client.upload(source, options, Arc::new(observer)) => panic!("all was sent: {sent:?}"),
        enough = seen.wait_for(|seen| seen.iter().all(|count| *count >= 8)) => drop(enough.unwrap()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_that_lost_its_disk_is_taken_up_again_and_only_what_it_had_is_sent_again() {
    tls::install_provider();
    let site = Site::new(&NAMES);
    let b = site.start("dc-b");
    let mut a = site.start("dc-a");
    for _ in 1..3 {
        a.stop();
        a = site.start("dc-a");
    }
    site.linked().await;

    // At dc-a: one of which dc-b had chunks, and so its record, one of which it only heard, and one that came whole. At
    // dc-b one that is safe, and one that both have parts of.
    let bytes = [noise(1, 4 * MIB + 5), noise(2, 2 * MIB), noise(3, 999), noise(4, 3 * MIB)];
    let names = ["shared", "alone", "whole", "safe"];
    let to = [(1, "dc-a"), (0, "dc-a"), (0, "dc-a"), (1, "dc-b")];
    let ids: [String; 4] = std::array::from_fn(|i| site.put_new(names[i], &bytes[i], to[i].0, to[i].1));
    let [shared, alone, whole, safe] = &ids;
    site.only_copy(shared, "dc-a");
    let both = noise(5, 130 * MIB);
    let source = Source::memory(both.clone());
    let ca = std::fs::read(site.home.path("ca.pem")).unwrap();
    let token = Token::new(&std::fs::read_to_string(site.home.path("token")).unwrap());
    let client = Client::new(ClientConfig::new(site.urls.clone(), token, ca)).unwrap();
    let options = UploadOptions {
        id: Some(Uuid::now_v7()),
        home: Some("dc-b".into()),
        order: Order::Shuffled { seed: 7, inside: true },
        wait: WaitFor::Assembled,
        ..UploadOptions::default()
    };
    send_some(&client, &source, &options).await;
    let half = options.id.unwrap().to_string();

    drop(a);
    std::fs::remove_dir_all(site.home.path("data/dc-a")).unwrap();
    let a = site.start("dc-a");
    site.linked().await;
    assert_eq!(site.metric(0, "sluice_reincarnations_total{dc=\"dc-a\"}").await, Some(1));
    assert_eq!(site.metric(1, "sluice_reincarnations_total{dc=\"dc-b\"}").await, Some(0));

    // What was assembled is not called so any more, by either.
    let roots: Vec<String> = bytes.iter().map(|b| blake3::hash(b).to_string()).collect();
    for (id, chunks, root) in [(shared, 5, &roots[0]), (whole, 1, &roots[2])] {
        let lost = site.agree(id, "word of the loss", |status| status["state"] == "receiving");
        assert_eq!(lost["missing"], serde_json::json!([[0, chunks]]), "{lost}");
        assert_eq!((&lost["missing_chunks"], &lost["holders"]), (&chunks.into(), &Value::Array(vec![])));
        assert_eq!(
            (&lost["root"], &lost["home"], &lost["home_epoch"]),
            (&root[..].into(), &"dc-a".into(), &1.into())
        );
        assert_eq!(lost["home_answered"], true);
        let ended = site.run(1, &["get", id, "-o", "none"]);
        assert_ne!(ended.code, Some(0));
    }
    // Nobody has its record any more: that is not the same as never having heard of it, nor as having it.
    for url in 0..2 {
        let ended = site.run(url, &["status", alone, "--json"]);
        assert_eq!((ended.code, ended.json()["error"]["code"].as_str()), (Some(6), Some("no-metadata")));
    }
    assert_eq!(site.agree(safe, "the other home", |_| true)["state"], "assembled");
    site.reads(safe, &bytes[3]);

    // Sent again, through either; the file is whole again, and what is there is not sent.
    for (i, chunks, url) in [(0, 5, 1), (1, 2, 0), (2, 1, 1)] {
        site.put_again(names[i], &bytes[i], &ids[i], url, chunks, "dc-a");
        let again = site.put(1 - url, &[names[i], "--id", &ids[i]]);
        assert_eq!((&again["chunks_sent"], &again["chunks_skipped"]), (&0.into(), &chunks.into()));
    }
    let left = site.only_copy(&half, "dc-b");
    let held = left["holders"][0]["chunks"].as_u64().unwrap();
    assert_eq!(left["missing_chunks"], 130 - held, "{left}");
    let sent = client.upload(&source, &options, Arc::new(|_: &Event| {})).await.unwrap();
    assert!(held >= 8 && sent.chunks_sent == 130 - held && sent.chunks_skipped == held, "{held}: {sent:?}");
    site.reads(&half, &both);
    for dc in [a, b] {
        dc.stop();
    }
    for name in NAMES {
        done(site.home.command(&["fsck", "--data", &format!("data/{name}")]).output().unwrap().into());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_copy_that_is_put_back_has_what_it_had_and_lacks_only_what_came_after_it() {
    tls::install_provider();
    let site = Site::new(&NAMES);
    let (b, a) = (site.start("dc-b"), site.start("dc-a"));
    site.linked().await;
    let put = |name: &str, bytes: &[u8], url: usize| {
        let id = site.put_new(name, bytes, url, "dc-a");
        site.only_copy(&id, "dc-a");
        id
    };
    let old = [noise(11, 3 * MIB + 7), noise(12, 999)];
    let kept = [put("old", &old[0], 1), put("small", &old[1], 0)];
    let gone = put("gone", &noise(13, 2 * MIB), 1);

    a.stop();
    let data = site.home.path("data/dc-a");
    let copy = ["-a", "--sparse=always", "data/dc-a", "data/backup"];
    let copied = std::process::Command::new("cp").args(copy).current_dir(site.home.path("")).output();
    done(copied.unwrap().into());
    done(site.home.command(&["fsck", "--data", "data/backup"]).output().unwrap().into());

    // After it: one of which dc-b had chunks, and so its record, one that came whole, and one of which it only heard.
    let a = site.start("dc-a");
    site.linked().await;
    let names = ["shared", "whole", "alone"];
    let bytes = [noise(14, 4 * MIB + 5), noise(15, 888), noise(16, 2 * MIB)];
    let ids: Vec<String> =
        names.iter().zip(&bytes).zip([1, 0, 0]).map(|((name, bytes), url)| put(name, bytes, url)).collect();
    done(site.run(0, &["rm", &gone, "--yes"]));
    let is_gone = |url: usize| (site.run(url, &["status", &gone]).code == Some(3)).then_some(());
    eventually("the end of a file", || is_gone(1));

    a.stop();
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(site.home.path("data/backup"), &data).unwrap();
    let mut a = site.start("dc-a");
    site.linked().await;

    // What was there before is said anew, and read as it was; what was deleted since stays so.
    for (id, bytes) in kept.iter().zip(&old) {
        site.agree(id, "a file of the copy", |status| {
            status["state"] == "assembled" && status["home"] == "dc-a" && status["missing_chunks"] == 0
        });
        site.reads(id, bytes);
    }
    eventually("the end of a file", || is_gone(0));
    // What came after is as after the loss of a disk.
    let roots: Vec<String> = bytes.iter().map(|b| blake3::hash(b).to_string()).collect();
    for (i, chunks) in [(0, 5), (1, 1)] {
        let lost = site.agree(&ids[i], "word of the loss", |status| status["state"] == "receiving");
        assert_eq!(lost["missing"], serde_json::json!([[0, chunks]]), "{lost}");
        assert_eq!((&lost["root"], &lost["holders"]), (&roots[i][..].into(), &Value::Array(vec![])));
        assert_ne!(site.run(1, &["get", &ids[i], "-o", "none"]).code, Some(0));
    }
    // Of one that dc-b only heard of it may have fetched the metadata, or not.
    for url in 0..2 {
        let ended = site.run(url, &["status", &ids[2], "--json"]);
        let said = ended.json();
        match ended.code {
            Some(0) => {
                assert_eq!((&said["state"], &said["missing_chunks"]), (&"receiving".into(), &2.into()))
            }
            code => assert_eq!((code, said["error"]["code"].as_str()), (Some(6), Some("no-metadata"))),
        }
    }
    for (i, chunks, url) in [(0, 5, 1), (1, 1, 1), (2, 2, 0)] {
        site.put_again(names[i], &bytes[i], &ids[i], url, chunks, "dc-a");
    }
    assert_eq!(site.metric(0, "sluice_reincarnations_total{dc=\"dc-a\"}").await, Some(1));
    assert_eq!(site.metric(1, "sluice_reincarnations_total{dc=\"dc-b\"}").await, Some(0));
    let mut log = a.0.stderr.take().unwrap();
    a.stop();
    b.stop();
    let mut said = String::new();
    log.read_to_string(&mut said).unwrap();
    assert!(said.contains("begins again"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_that_is_lost_for_good_begins_anew_on_another_machine_at_other_addresses() {
    tls::install_provider();
    let mut site = Site::new(&NAMES);
    let (a, b) = (site.start("dc-a"), site.start("dc-b"));
    site.linked().await;
    // At dc-b: one of which dc-a only hears, one that came whole, and one of which dc-a had chunks. At dc-a one that is
    // safe.
    let bytes = [noise(11, 2 * MIB), noise(12, 999), noise(13, 4 * MIB + 5), noise(14, 3 * MIB)];
    let names = ["alone", "whole", "shared", "safe"];
    let to = [(1, "dc-b"), (1, "dc-b"), (0, "dc-b"), (0, "dc-a")];
    let ids: [String; 4] = std::array::from_fn(|i| site.put_new(names[i], &bytes[i], to[i].0, to[i].1));
    let [alone, whole, shared, safe] = &ids;
    // By then dc-a has heard of those before it, too.
    site.only_copy(shared, "dc-b");

    // All that was there is gone, its keys among it, which the authority can make again.
    drop(b);
    for lost in ["data/dc-b", "keys/dc-b"] {
        std::fs::remove_dir_all(site.home.path(lost)).unwrap();
    }
    done(site.home.command(&["admin", "key", "renew", "keys"]).output().unwrap().into());
    site.moves(1);
    let b = site.start("dc-b");
    a.stop();
    let a = site.start("dc-a");
    site.linked().await;
    assert_eq!(site.metric(1, "sluice_reincarnations_total{dc=\"dc-b\"}").await, Some(1));
    assert_eq!(site.metric(0, "sluice_reincarnations_total{dc=\"dc-a\"}").await, Some(0));

    // What is at dc-a is read through either.
    site.agree(safe, "the file that is safe", |status| status["state"] == "assembled");
    site.reads(safe, &bytes[3]);
    // What was assembled at dc-b is not called so any more.
    let roots: Vec<String> = bytes.iter().map(|b| blake3::hash(b).to_string()).collect();
    for (id, chunks, root) in [(whole, 1, &roots[1]), (shared, 5, &roots[2])] {
        let lost = site.agree(id, "word of the loss", |status| status["state"] == "receiving");
        assert_eq!(lost["missing"], serde_json::json!([[0, chunks]]), "{lost}");
        assert_eq!((&lost["root"], &lost["home"]), (&root[..].into(), &"dc-b".into()), "{lost}");
    }
    // What dc-a had only heard of, it had in memory only.
    for url in 0..2 {
        let ended = site.run(url, &["status", alone, "--json", "--retry-for", "0s"]);
        assert_eq!((ended.code, ended.json()["error"]["code"].as_str()), (Some(3), Some("not-found")));
    }
    // Sent again it is whole again.
    for (i, chunks, url) in [(0, 2, 1), (1, 1, 0), (2, 5, 0)] {
        site.put_again(names[i], &bytes[i], &ids[i], url, chunks, "dc-b");
    }
    for dc in [a, b] {
        dc.stop();
    }
    for name in NAMES {
        done(site.home.command(&["fsck", "--data", &format!("data/{name}")]).output().unwrap().into());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_with_one_name_turn_each_other_out_until_one_stops() {
    tls::install_provider();
    let site = Site::new(&NAMES);
    let (b, a) = (site.start("dc-b"), site.start("dc-a"));
    site.linked().await;
    a.stop();
    // The same keys and volume, at other ports.
    let (from, to) = (site.home.path("data/dc-a"), site.home.path("data/clone"));
    done(std::process::Command::new("cp").arg("-a").args([from, to]).output().unwrap().into());
    let text = std::fs::read_to_string(site.home.path("dc-a.toml")).unwrap();
    let others = [any(), any(), any()];
    let [edge, peer, admin] = others.each_ref().map(|port| port.address());
    let listen = format!("listen = {{ edge = \"{edge}\", peer = \"{peer}\", admin = \"{admin}\" }}");
    let text = text.replace("data/dc-a", "data/clone");
    let lines = text.lines().map(|line| if line.starts_with("listen") { &listen } else { line });
    site.home.write("clone.toml", lines.collect::<Vec<_>>().join("\n").as_bytes());

    let a = site.start("dc-a");
    site.linked().await;
    let (clone, _) = site.begin("dc", "clone");
    // Each begins again above the other, and again.
    let again = "sluice_reincarnations_total{dc=\"dc-a\"}";
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while site.metric(0, again).await < Some(2) {
        assert!(std::time::Instant::now() < until, "dc-a hears nothing of its clone");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(site.metric(1, "sluice_reincarnations_total{dc=\"dc-b\"}").await, Some(0));
    drop(clone);
    // Once one is alone it is heard, as somebody who has never spoken before.
    let bytes = noise(6, 3 * MIB);
    site.home.write("file", &bytes);
    let sent = site.put(1, &["file", "--home", "dc-a"]);
    site.reads(sent["id"].as_str().unwrap(), &bytes);
    a.stop();
    b.stop();
}
