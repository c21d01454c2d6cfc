//! A datacenter at its limit: chunks go to one that has room, and nowhere else once there is room again.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::StatusCode;
use sluice::datacenter::DatacenterSettings;
use sluice_client::{Source, UploadOptions, WaitFor};
use sluice_engine::hash::Root;
use sluice_proto::http::{ChunkReceipt, State};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::bed::{A, B, Bed, MIB, Web, acknowledgements, eventually, noise};

/// Bytes a second that dc-a and dc-b take: far less than what two busy cores can.
const RATES: [u64; 2] = [4 * MIB as u64, 6 * MIB as u64];

/// Chunks in a request of a plain client.
const RUN: usize = 4;

/// Bytes of each of the files that are sent at once: one stripe.
const FILE: usize = 24 * MIB;

async fn start(rates: [Option<u64>; 2]) -> Bed {
    let mut bed = Bed::reserve(2, DatacenterSettings::default());
    for (dc, rate) in [A, B].into_iter().zip(rates) {
        bed.cluster.config_mut(dc).unwrap().settings.worker.upload_rate = rate;
        bed.cluster.start(dc).await.unwrap();
    }
    // dc-b has said how loaded it is.
    eventually("a first LOAD", async || {
        (bed.metric(A, "sluice_commands_total", "kind=\"LOAD\",direction=\"received\"").await > 0.0)
            .then_some(())
    })
    .await;
    bed
}

async fn spilled(web: &Web) -> f64 {
    web.metric(A, "sluice_spill_bytes_total", "peer=\"dc-b\"").await
}

/// Sends a file to dc-a alone as a client that goes nowhere else, two runs at a time; what was acknowledged.
async fn send_plainly(web: Web, id: Uuid, bytes: Bytes) -> Vec<ChunkReceipt> {
    let mut receipts = Vec::new();
    let runs: Vec<usize> = (0..bytes.len() / MIB).step_by(RUN).collect();
    for pair in runs.chunks(2) {
        let sent = pair.iter().map(|start| {
            let (web, run) = (&web, bytes.slice(start * MIB..(start + RUN) * MIB));
            async move {
                loop {
                    let answer = web.put(A, id, *start as u64, run.clone()).await.unwrap();
                    assert!(!answer.status.is_redirection(), "it did not ask to be sent on");
                    if [StatusCode::OK, StatusCode::ACCEPTED].contains(&answer.status) {
                        return answer.json::<ChunkReceipt>();
                    }
                    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{:?}", answer.body);
                    let after = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
                    tokio::time::sleep(Duration::from_secs(after)).await;
                }
            }
        });
        receipts.extend(futures_util::future::join_all(sent).await);
    }
    receipts
}

/// Sends a file to dc-a alone with the client library, which goes where it is sent; who acknowledged how many chunks.
async fn send(web: Web, bytes: Bytes) -> (Uuid, Root, Vec<(String, u64)>) {
    let (observer, seen) = acknowledgements();
    let options = UploadOptions { wait: WaitFor::Complete, ..UploadOptions::default() };
    let client = web.client_with(&[A], |config| config.jobs = 4);
    let sent = client.upload(&Source::memory(bytes), &options, observer).await.unwrap();
    let seen = seen.borrow().iter().map(|(dc, _, count)| (dc.clone(), *count)).collect();
    (sent.id, sent.root, seen)
}

/// How fast `sent` bytes came, as a part of what both datacenters take together.
fn share(sent: usize, took: Duration) -> f64 {
    sent as f64 / took.as_secs_f64() / RATES.iter().sum::<u64>() as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_full_datacenter_get_what_two_can_take_and_no_more_spills_when_there_is_room() {
    let bed = start(RATES.map(Some)).await;
    let files: Vec<Bytes> = (0..4).map(|n| noise(900 + n, FILE)).collect();
    let mut ids = Vec::new();
    for _ in &files {
        ids.push(bed.create(A, FILE).await);
    }
    let began = Instant::now();
    let mut sending = JoinSet::new();
    for (id, bytes) in ids.iter().copied().zip(files.clone()) {
        sending.spawn(send_plainly(bed.web.clone(), id, bytes));
    }
    let receipts: Vec<ChunkReceipt> = sending.join_all().await.into_iter().flatten().collect();
    let got = share(4 * FILE, began.elapsed());
    println!("passed on: {:.0} % of the two caps together", got * 100.0);
    assert!(got >= 0.85, "{got}");
    // A receipt names the datacenter in which the chunks are.
    let at = |dc: &str| receipts.iter().filter(|receipt| receipt.dc == dc).count() * RUN * MIB;
    assert_eq!(at("dc-a") + at("dc-b"), 4 * FILE);
    assert!(at("dc-b") > 0 && spilled(&bed.web).await == at("dc-b") as f64);
    for (id, bytes) in ids.into_iter().zip(&files) {
        let root = Root::of_bytes(bytes);
        assert_eq!(bed.reach(A, id, State::Assembled).await.root, Some(root.to_string()));
        assert!(bed.read(A, id, root).await == *bytes, "nothing that was acknowledged is lost");
    }

    // There is room again, and nothing goes elsewhere.
    let before = spilled(&bed.web).await;
    let small = noise(910, MIB);
    let id = bed.create(A, MIB).await;
    assert_eq!(bed.put_ok(A, id, 0, small).await.dc, "dc-a");
    assert_eq!(spilled(&bed.web).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_follows_is_sent_to_the_datacenter_that_has_room() {
    let bed = start(RATES.map(Some)).await;
    let files: Vec<Bytes> = (0..3).map(|n| noise(920 + n, FILE)).collect();
    let began = Instant::now();
    let mut sending = JoinSet::new();
    for bytes in files.clone() {
        sending.spawn(send(bed.web.clone(), bytes));
    }
    let sent = sending.join_all().await;
    let got = share(3 * FILE, began.elapsed());
    println!("sent on: {:.0} % of the two caps together", got * 100.0);
    assert!(got >= 0.85, "{got}");
    let at = |dc: &str| {
        sent.iter().flat_map(|(.., seen)| seen).filter(|(at, _)| at == dc).map(|(_, n)| n).sum::<u64>()
    };
    assert_eq!(at("dc-a") + at("dc-b"), (3 * FILE / MIB) as u64);
    // They came to dc-b by its own door.
    assert!(at("dc-b") > 0);
    let put = "route=\"/v1/files/{id}/chunks/{index}\"";
    assert!(bed.metric(B, "http_server_request_duration_seconds_count", put).await > 0.0);
    assert!(bed.metric(A, "http_server_request_duration_seconds_count", "code=\"307\"").await > 0.0);
    for (id, root, _) in sent {
        let bytes = bed.read(A, id, root).await;
        assert!(files.contains(&Bytes::from(bytes)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_else_can_take_waits_and_what_was_passed_goes_no_further() {
    let mut bed = start([Some(RATES[0]), Some(RATES[1])]).await;
    // What was sent on is taken there, however long it has to wait.
    let id = bed.create(B, 40 * MIB).await;
    let bytes = noise(930, 40 * MIB);
    for start in (0..40).step_by(8) {
        let path = format!("/files/{id}/chunks/{start}?passed");
        let run = bytes.slice(start * MIB..(start + 8) * MIB);
        let prefer = [("prefer", "redirect")];
        let answer = bed.ask_as(crate::bed::TENANT, B, http::Method::PUT, &path, &prefer, run).await.unwrap();
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.json::<ChunkReceipt>().dc, "dc-b");
    }
    bed.cluster.kill(B).await;
    let id = bed.create(A, FILE).await;
    let bytes = noise(931, FILE);
    let receipts = send_plainly(bed.web.clone(), id, bytes).await;
    assert!(receipts.iter().all(|receipt| receipt.dc == "dc-a"), "nobody else is there");
    assert_eq!(spilled(&bed.web).await, 0.0);
}
