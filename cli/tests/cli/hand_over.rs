//! Work goes from a datacenter of processes to one that is a single process, and back.
//!
//! `SLUICE_LARGE_MIB` and `SLUICE_SMALL` are how large the large file is that is sent while a datacenter is drained, and how
//! many small ones there are at least.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sluice_engine::limits::MAX_RUN;
use sluice_proto::http::ChunkReceipt;
use sluice_redis::testing::{Server, available};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::Ended;
use crate::divided::{Divided, Http, scrape};
use crate::fake::noise;
use crate::processes::{Running, done, eventually};

const MIB: usize = 1 << 20;
const SHARES: u32 = 16;

/// Requests that an upload has in flight.
const JOBS: u64 = 2;

/// How long the large file takes at least, in seconds: a datacenter is capped so that the drain finds it under way.
const LASTS: usize = 6;

/// Bytes a second that each datacenter takes that is at its limit: far less than what two busy cores can.
const RATE: u64 = 4 * MIB as u64;

/// Chunks in a request of a plain client.
const RUN: usize = 4;

/// Bytes of each of the files that plain clients send at once: one stripe.
const FILE: usize = 24 * MIB;

/// How HTTP requests are counted at a door.
const REQUESTS: &str = "http_server_request_duration_seconds_count{";

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// A file that was sent.
struct Sent {
    id: String,
    hash: blake3::Hash,
}

struct Bed {
    divided: Divided,
    over: AtomicBool,
    /// Bytes of the large file: not all chunks are whole.
    large: usize,
    small: usize,
}

/// However it ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Bed {
    fn new(divided: Divided) -> Self {
        let (large, small) = (number("SLUICE_LARGE_MIB", 200) * MIB + 5, number("SLUICE_SMALL", 10));
        Self { divided, over: AtomicBool::new(true), large, small }
    }

    /// Caps what a datacenter takes whose worker has this file, in bytes a second; returns the file as it was.
    fn cap(&self, name: &str, rate: u64) -> String {
        let file = self.divided.site.home.path(&format!("{name}.toml"));
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, format!("upload_rate = \"{rate}\"\n{text}")).unwrap();
        text
    }

    fn command(&self, dc: usize, args: &[&str]) -> Ended {
        self.divided.run(dc, args)
    }

    fn operate(&self, dc: usize, args: &[&str]) -> Ended {
        let operator = self.divided.site.home.path("operator");
        self.command(dc, &[args, &["--token-file", operator.to_str().unwrap()]].concat())
    }

    /// Sends a file through a datacenter, after which it is only there. No chunk goes twice, but for what is in flight when it
    /// has to go elsewhere.
    fn put(&self, dc: usize, name: &str, hash: blake3::Hash) -> Sent {
        let jobs = JOBS.to_string();
        let put = ["put", name, "--wait", "assembled", "--jobs", &jobs, "--json"];
        let said: Value = serde_json::from_str(&done(self.command(dc, &put))).unwrap();
        std::fs::remove_file(self.divided.site.home.path(name)).unwrap();
        assert_eq!(said["root"], hash.to_hex().as_str(), "{said}");
        let chunks = said["size"].as_u64().unwrap().div_ceil(MIB as u64);
        let sent = said["chunks_sent"].as_u64().unwrap();
        assert!(sent <= chunks + JOBS * u64::from(MAX_RUN), "{said}");
        Sent { id: said["id"].as_str().unwrap().to_owned(), hash }
    }

    fn put_large(&self, dc: usize, tag: &str) -> Sent {
        let name = format!("{tag}-large");
        let hash = write_large(&self.divided.site.home.path(&name), self.large);
        self.put(dc, &name, hash)
    }

    /// Sends small files one after the other until it is over, and as many as there should be.
    fn put_small(&self, dc: usize, tag: &str) -> Vec<Sent> {
        let mut sent = Vec::new();
        while !self.over.load(Ordering::SeqCst) || sent.len() < self.small {
            let number = sent.len();
            // Some of several chunks.
            let len = if number.is_multiple_of(4) { 2 * MIB + number } else { 4000 + number };
            let (name, bytes) = (format!("{tag}-{number}"), noise(number as u64, len));
            self.divided.site.home.write(&name, &bytes);
            sent.push(self.put(dc, &name, blake3::hash(&bytes)));
        }
        sent
    }

    /// Requests whose context came from the other datacenter.
    fn moved(&self, dc: usize) -> Option<i64> {
        let runtime = tokio::runtime::Handle::current();
        match dc {
            0 => self.divided.metric("session", "sluice_moved_contexts_total{dc=\"dc-a\"} "),
            _ => tokio::task::block_in_place(|| {
                runtime.block_on(self.divided.site.metric(1, "sluice_moved_contexts_total{dc=\"dc-b\"} "))
            }),
        }
    }

    /// The metrics of a datacenter's door, and of dc-b as a whole.
    fn door(&self, dc: usize) -> String {
        eventually("metrics of a door", || match dc {
            0 => self.divided.metrics("edge"),
            _ => scrape(&self.divided.site.ports[1].admin.address().to_string()),
        })
    }

    /// Chunks that a datacenter has taken at its door.
    fn taken(&self, dc: usize) -> u64 {
        sum(&self.door(dc), "sluice_chunks_total{", "outcome=\"stored\"")
    }

    /// Handshakes of clients with a datacenter, full or resumed.
    fn handshakes(&self, dc: usize, kind: &str) -> u64 {
        sum(&self.door(dc), "sluice_tls_handshakes_total{", &format!("kind=\"{kind}\""))
    }

    /// How often a datacenter has answered with statuses that begin like this, by request.
    fn answers(&self, dc: usize, status: &str) -> BTreeMap<String, u64> {
        series(&self.door(dc), REQUESTS, &format!("http_response_status_code=\"{status}"))
    }

    /// Waits until each datacenter reaches the other in every share.
    fn wait_for_links(&self) {
        eventually("links of all shares", || {
            let aggregators = ["aggregator-0", "aggregator-1"].map(|name| self.divided.metrics(name));
            let [Some(one), Some(other)] = aggregators else { return None };
            let up = [one, other, self.door(1)].map(|text| series(&text, "sluice_peer_up{", ""));
            // An aggregator that has no share speaks with nobody.
            let up: Vec<u64> = up.into_iter().flat_map(BTreeMap::into_values).collect();
            (up.len() >= 2 && up.iter().all(|up| *up == 1)).then_some(())
        });
    }

    /// All of it is at `dc`, which alone is asked.
    fn check(&self, dc: usize, sent: &[Sent]) {
        let copy = self.divided.site.home.path("copy");
        for Sent { id, hash } in sent {
            done(self.command(dc, &["get", id, "-o", "copy", "--force"]));
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(File::open(&copy).unwrap()).unwrap();
            assert_eq!(hasher.finalize(), *hash, "{id}");
        }
    }
}

/// Writes a file as fast as the disk takes it, and returns its hash: random bytes, the same in every chunk but for their
/// places, which stand in each 4 KiB. So no page of it is like another.
fn write_large(path: &Path, len: usize) -> blake3::Hash {
    let (mut block, mut hasher, mut file) =
        (noise(77, MIB), blake3::Hasher::new(), File::create(path).unwrap());
    for start in (0..len).step_by(MIB) {
        for page in block.chunks_mut(4096) {
            page[..8].copy_from_slice(&start.to_be_bytes());
        }
        let chunk = &block[..MIB.min(len - start)];
        hasher.update(chunk);
        file.write_all(chunk).unwrap();
    }
    hasher.finalize()
}

/// The values of a metric's series with such a label.
fn series(text: &str, name: &str, label: &str) -> BTreeMap<String, u64> {
    let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
    let parsed = lines.filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        Some((series.to_owned(), value.parse().ok()?))
    });
    parsed.collect()
}

fn sum(text: &str, name: &str, label: &str) -> u64 {
    series(text, name, label).into_values().sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_of_processes_is_drained_and_takes_over_itself() {
    if !available() {
        return;
    }
    sluice_node::tls::install_provider();
    let redis = Server::start();
    let bed = Bed::new(Divided::sharing(2, SHARES, Some(&redis)));
    let divided = &bed.divided;
    for name in ["worker", "dc-b"] {
        bed.cap(name, (bed.large / LASTS) as u64);
    }
    let mint = ["admin", "token", "mint", "--keys", "keys/authority", "--operator", "--out", "operator"];
    done(divided.site.home.command(&mint).output().unwrap().into());
    let names = ["worker", "aggregator-0", "aggregator-1", "session", "edge"];
    let mut processes: Vec<Running> = names.iter().map(|name| divided.begin(name)).collect();
    let mut b = divided.site.start("dc-b");
    eventually("a part for each", || {
        let had = [0, 1].map(|aggregator| divided.shares(aggregator));
        (had.iter().sum::<i64>() == i64::from(SHARES)).then_some(())
    });

    for (from, to) in [(0, 1), (1, 0)] {
        let (name, target) = (["dc-a", "dc-b"][from], ["dc-a", "dc-b"][to]);
        let begin = ["admin", "drain", name, "--to", target];
        let drain = |more: &[&str]| bed.operate(from, &[&begin[..], more].concat());
        bed.wait_for_links();
        let (failed, sent_on) = ([0, 1].map(|dc| bed.answers(dc, "5")), bed.answers(from, "307"));
        bed.over.store(false, Ordering::SeqCst);
        let sent = std::thread::scope(|scope| {
            let _over = Over(&bed.over);
            let taken = bed.taken(from);
            let large = scope.spawn(|| bed.put_large(from, name));
            eventually("a chunk of the large one", || (bed.taken(from) > taken).then_some(()));
            // It is the only one that comes to the target, with tickets that it has from the other.
            let [full, resumed] = ["full", "resumed"].map(|kind| bed.handshakes(to, kind));
            // Links of some share may only just come up.
            eventually("a target that can be reached", || {
                (drain(&["--phase", "data"]).code == Some(0)).then_some(())
            });
            eventually("the large one at the target", || {
                (bed.handshakes(to, "resumed") > resumed).then_some(())
            });
            assert_eq!(bed.handshakes(to, "full"), full, "it resumes what it began at {name}");

            let small = scope.spawn(|| bed.put_small(from, name));
            done(drain(&["--phase", "sessions"]));
            // A session that begins now begins at the target.
            let mut number = 0;
            eventually("a context that comes from there", || {
                number += 1;
                let token = divided.new_token(&format!("{name}-{number}"));
                done(bed.command(from, &["ls", "--token-file", &token]));
                bed.moved(from).filter(|moved| *moved > 0)
            });
            let drained = drain(&["--evacuate"]);
            bed.over.store(true, Ordering::SeqCst);
            let mut sent = small.join().unwrap();
            sent.push(large.join().unwrap());
            assert_eq!(drained.code, Some(0), "{}", drained.stderr);
            for phase in ["data      done", "sessions  done", "channels  done"] {
                assert!(drained.stderr.contains(phase), "{}", drained.stderr);
            }
            let empty = format!("none: {name} holds the sole copy of nothing, and can be switched off");
            assert!(drained.stdout.contains(&empty), "{}", drained.stdout);
            println!(
                "{name}: {} files were sent while it was drained; {}",
                sent.len(),
                drained.stdout.trim()
            );
            sent
        });
        // The large one may have been unfinished when the drain was done.
        eventually("nothing that is left", || {
            let status: Value = serde_json::from_str(&drain(&["--evacuate", "--json"]).stdout).ok()?;
            (status["files_left"] == 0 && status["phase"] == "channels").then_some(())
        });
        // Whoever hands over sends clients on with 307, and has no reason to answer that it cannot.
        assert_ne!(bed.answers(from, "307"), sent_on);
        assert_eq!([0, 1].map(|dc| bed.answers(dc, "5")), failed);
        if from == 0 {
            let passed = divided.metric("worker", "sluice_spill_bytes_total{dc=\"dc-a\",peer=\"dc-b\"} ");
            assert!(passed.is_some_and(|bytes| bytes > 0), "{passed:?}");
            // It can be switched off.
            processes.clear();
            bed.check(to, &sent);
            processes = names.iter().map(|name| divided.begin(name)).collect();
        } else {
            drop(b);
            bed.check(to, &sent);
            b = divided.site.start("dc-b");
        }
        eventually("taken back", || {
            let undrained = bed.operate(from, &["admin", "undrain", name]);
            (undrained.code == Some(0)).then_some(())
        });
        let tag = format!("{name}-again");
        let mut sent = bed.put_small(from, &tag);
        sent.push(bed.put_large(from, &tag));
        bed.check(from, &sent);
    }
    processes.into_iter().chain([b]).for_each(Running::stop);
    done(divided.site.home.command(&["fsck", "--data", "data/dc-a"]).output().unwrap().into());
}

/// Sends a file to dc-a as a client that goes nowhere else, two runs at a time; what was acknowledged.
async fn send_plainly(http: Arc<Http>, id: Uuid, bytes: Bytes) -> Vec<ChunkReceipt> {
    let mut receipts = Vec::new();
    let runs: Vec<usize> = (0..bytes.len() / MIB).step_by(RUN).collect();
    for pair in runs.chunks(2) {
        let sent = pair.iter().map(|start| {
            let (http, run) = (&http, bytes.slice(start * MIB..(start + RUN) * MIB));
            async move {
                loop {
                    let put = http.ask(Method::PUT, &format!("/files/{id}/chunks/{start}"));
                    let answer = put.timeout(Duration::from_secs(60)).body(run.clone()).send().await.unwrap();
                    if [StatusCode::OK, StatusCode::ACCEPTED].contains(&answer.status()) {
                        return answer.json::<ChunkReceipt>().await.unwrap();
                    }
                    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
                    let after = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
                    tokio::time::sleep(Duration::from_secs(after)).await;
                }
            }
        });
        receipts.extend(futures_util::future::join_all(sent).await);
    }
    receipts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_much_for_a_worker_goes_to_another_datacenter_until_there_is_room() {
    let bed = Bed::new(Divided::sharing(1, 1, None));
    let divided = &bed.divided;
    let text = bed.cap("worker", RATE);
    bed.cap("dc-b", RATE);
    let processes = ["aggregator-0", "worker", "session", "edge"].map(|name| divided.begin(name));
    let b = divided.site.start("dc-b");
    // dc-b has said how loaded it is.
    eventually("a first LOAD", || {
        let received = "kind=\"LOAD\",direction=\"received\"";
        let said = sum(&divided.metrics("aggregator-0")?, "sluice_commands_total{", received);
        (said > 0).then_some(())
    });
    let of_worker = |name: &str| {
        let series = format!("{name}{{dc=\"dc-a\",peer=\"dc-b\"}} ");
        eventually(name, || divided.metric("worker", &series))
    };
    let spilled = || of_worker("sluice_spill_bytes_total");
    let spilling = || of_worker("sluice_spilling");
    assert_eq!((spilled(), spilling()), (0, 0));

    let http = Arc::new(divided.http());
    let files: Vec<(Uuid, Bytes)> =
        (0..4).map(|n| (Uuid::now_v7(), Bytes::from(noise(900 + n, FILE)))).collect();
    for (id, bytes) in &files {
        let body = json!({ "id": id, "size": bytes.len(), "name": "too-much" });
        let answer = http.ask(Method::POST, "/files").json(&body).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::CREATED);
    }
    let began = Instant::now();
    let mut sending = JoinSet::new();
    for (id, bytes) in files.clone() {
        sending.spawn(send_plainly(http.clone(), id, bytes));
    }
    eventually("a datacenter that passes on", || (spilling() == 1).then_some(()));
    let receipts: Vec<ChunkReceipt> = sending.join_all().await.into_iter().flatten().collect();
    let sent = files.len() * FILE;
    let got = sent as f64 / began.elapsed().as_secs_f64() / (2 * RATE) as f64;
    println!("passed on: {:.0} % of the two caps together", got * 100.0);
    assert!(got >= 0.85, "{got}");
    // A receipt names the datacenter in which the chunks are.
    let at = |dc: &str| receipts.iter().filter(|receipt| receipt.dc == dc).count() * RUN * MIB;
    assert_eq!(at("dc-a") + at("dc-b"), sent);
    assert!(at("dc-b") > 0);
    assert_eq!(spilled(), at("dc-b") as i64);
    // None of it came by dc-b's own door.
    let chunks = "http_route=\"/v1/files/{id}/chunks/{index}\"";
    assert_eq!(sum(&bed.door(1), REQUESTS, chunks), 0);
    assert!(sum(&bed.door(0), REQUESTS, chunks) > 0);
    eventually("a datacenter that passes on nothing", || (spilling() == 0).then_some(()));
    for (id, bytes) in files {
        let id = id.to_string();
        eventually("an assembled file", || {
            let status = bed.command(0, &["status", &id, "--json"]);
            let status: Value = serde_json::from_str(&status.stdout).ok()?;
            (status["state"] == "assembled").then_some(())
        });
        bed.check(0, &[Sent { id, hash: blake3::hash(&bytes) }]);
    }

    // The cap is lifted while it runs: nothing goes any more.
    std::fs::write(divided.site.home.path("worker.toml"), text).unwrap();
    eventually("no cap", || {
        let rate =
            divided.metric("worker", "sluice_limit_bytes_per_second{dc=\"dc-a\",limit=\"upload_rate\"} ");
        (rate == Some(0)).then_some(())
    });
    // What was used up of the cap is forgotten with it.
    let before = spilled();
    let bytes = noise(64, 64 * MIB);
    divided.site.home.write("not-too-much", &bytes);
    let sent = bed.put(0, "not-too-much", blake3::hash(&bytes));
    bed.check(0, &[sent]);
    assert_eq!((spilled(), spilling()), (before, 0));
    b.stop();
    processes.into_iter().for_each(Running::stop);
}
