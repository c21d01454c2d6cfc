//! A datacenter hands its work over to another, in three phases, and nobody's request fails.

use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::{Value, json};
use sluice::datacenter::DatacenterSettings;
use sluice_aggregator::AggregatorSettings;
use sluice_client::{Client, Source, UploadOptions, WaitFor, unobserved};
use sluice_engine::context::Scope;
use sluice_engine::hash::Root;
use sluice_engine::ids::{DcId, TenantId};
use sluice_node::clock::{Clock, SystemClock};
use sluice_node::token::TokenGrant;
use sluice_proto::http::{DrainStatus, State};
use tokio::sync::watch;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::bed::{
    A, Answer, B, Bed, C, MIB, Web, acknowledgements, chunks_in, eventually, new_file, noise, shuffled,
};

/// Datacenters that compare what they know often.
async fn start(dcs: u16) -> Bed {
    let aggregator =
        AggregatorSettings { compare_every: Duration::from_secs(1), ..AggregatorSettings::default() };
    let settings = DatacenterSettings { aggregator, ..DatacenterSettings::default() };
    let mut bed = Bed::reserve(dcs, settings);
    for dc in 1..=dcs {
        bed.cluster.start(DcId::new(dc)).await.unwrap();
    }
    linked(&bed, dcs).await;
    bed
}

/// Waits until every datacenter reaches every other.
async fn linked(bed: &Bed, dcs: u16) {
    for dc in 1..=dcs {
        eventually("the links", async || {
            let up = bed.metric(DcId::new(dc), "sluice_peer_up", "").await;
            (up as u16 == dcs - 1).then_some(())
        })
        .await;
    }
}

/// The token of an operator.
fn operator(bed: &Bed) -> String {
    let grant = TokenGrant {
        scopes: vec![Scope::Operate],
        ..TokenGrant::everything(TenantId::new(1), "operator", Duration::from_secs(3600))
    };
    bed.cluster.material().token_mint().unwrap().mint(&grant, SystemClock.now()).unwrap()
}

/// An operator's request to a datacenter.
async fn order(bed: &Bed, dc: DcId, method: Method, body: Value) -> Answer {
    bed.ask_as_operator(&operator(bed), dc, method, "/drain", body.to_string()).await
}

async fn drain(bed: &Bed, dc: DcId, to: &str, phase: &str, evacuate: bool) -> DrainStatus {
    let body = json!({ "to": to, "phase": phase, "evacuate": evacuate });
    let answer = order(bed, dc, Method::PUT, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    answer.json()
}

async fn shown(bed: &Bed, dc: DcId) -> DrainStatus {
    order(bed, dc, Method::GET, Value::Null).await.json()
}

/// A client that is told of dc-a alone, and whose connections are its own.
fn client(web: &Web) -> Client {
    web.client_with(&[A], |config| config.jobs = 4)
}

/// Small files one after the other, until told to stop; each must be taken.
async fn send_small(web: Web, seed: u64, stop: watch::Receiver<bool>) -> Vec<(Uuid, u64)> {
    let client = client(&web);
    let mut sent = Vec::new();
    while !*stop.borrow() {
        let seed = seed + sent.len() as u64;
        let options = UploadOptions { wait: WaitFor::Acknowledged, ..UploadOptions::default() };
        let source = Source::memory(noise(seed, 1000));
        let done = client.upload(&source, &options, unobserved()).await.unwrap();
        sent.push((done.id, seed));
    }
    sent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_hands_over_in_three_phases_and_no_request_fails() {
    let mut bed = start(2).await;
    // Slow enough that the phases pass while it is under way.
    bed.cluster.stop(A, Duration::from_secs(5)).await;
    bed.cluster.config_mut(A).unwrap().settings.worker.upload_rate = Some(16 * MIB as u64);
    bed.cluster.start(A).await.unwrap();
    linked(&bed, 2).await;

    let bytes = noise(950, 96 * MIB);
    let (observer, mut seen) = acknowledgements();
    let large = {
        let (client, source) = (client(&bed.web), Source::memory(bytes.clone()));
        tokio::spawn(async move {
            let options = UploadOptions { wait: WaitFor::Complete, ..shuffled() };
            client.upload(&source, &options, observer).await
        })
    };
    let (stop, stopped) = watch::channel(false);
    let mut small = JoinSet::new();
    for n in 0..3 {
        small.spawn(send_small(bed.web.clone(), 10_000 * (n + 1), stopped.clone()));
    }
    // A session that began at dc-a, and goes on.
    let session = client(&bed.web);
    session.about().await.unwrap();

    seen.wait_for(|seen| chunks_in(seen) >= 16).await.unwrap();
    let begun = drain(&bed, A, "dc-b", "data", false).await;
    assert_eq!((begun.phase.as_deref(), begun.to.as_deref()), (Some("data"), Some("dc-b")));
    assert_eq!(bed.metric(A, "sluice_drain_phase", "").await, 1.0);
    // From some moment on nothing new is taken at dc-a.
    eventually("the last body", async || (shown(&bed, A).await.bodies == 0).then_some(())).await;
    let acknowledged = |seen: &[crate::bed::Acknowledged], dc: &str| {
        seen.iter().filter(|(at, ..)| at == dc).map(|(.., count)| *count).sum::<u64>()
    };
    // What was answered last is noted by its client a moment later.
    let mut before = acknowledged(&seen.borrow(), "dc-a");
    eventually("the last answer", async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = acknowledged(&seen.borrow(), "dc-a");
        (std::mem::replace(&mut before, now) == now).then_some(())
    })
    .await;
    let sent = chunks_in(&seen.borrow());
    seen.wait_for(|seen| chunks_in(seen) >= (sent + 8).min(96)).await.unwrap();
    assert_eq!(acknowledged(&seen.borrow(), "dc-a"), before, "new chunks go elsewhere");

    drain(&bed, A, "dc-b", "sessions", false).await;
    session.list(sluice_client::ListFilter::default()).await.unwrap();
    assert!(bed.metric(A, "sluice_moved_contexts_total", "").await > 0.0, "contexts are renewed at dc-b");

    drain(&bed, A, "dc-b", "channels", false).await;
    let done = large.await.unwrap().unwrap();
    assert_eq!((done.root, done.chunks_sent), (Root::of_bytes(&bytes), 96), "nothing was sent twice");
    stop.send(true).unwrap();
    let sent: Vec<(Uuid, u64)> = small.join_all().await.into_iter().flatten().collect();
    assert!(sent.len() > 3);

    // A client that resumes at dc-b what it began at dc-a: no full handshake.
    let full = bed.metric(B, "sluice_tls_handshakes_total", "kind=\"full\"").await;
    let resumed = bed.metric(B, "sluice_tls_handshakes_total", "kind=\"resumed\"").await;
    session.status(done.id).await.unwrap();
    assert_eq!(bed.metric(B, "sluice_tls_handshakes_total", "kind=\"full\"").await, full);
    assert!(bed.metric(B, "sluice_tls_handshakes_total", "kind=\"resumed\"").await > resumed);
    // Who does not follow is served all the same, and its connection ends with the answer.
    let answer = bed.get(A, &format!("/files/{}", done.id), &[]).await;
    assert_eq!(answer.status, StatusCode::OK);
    // In the end nobody is left but who asks.
    drop(session);
    eventually("the last connection", async || (shown(&bed, A).await.connections == 0).then_some(())).await;

    for (id, seed) in sent {
        let bytes = noise(seed, 1000);
        assert!(bed.read(B, id, Root::of_bytes(&bytes)).await == bytes);
    }
    assert!(bed.read(B, done.id, done.root).await == bytes);

    // It is taken back, and dc-a takes files again.
    let ended = order(&bed, A, Method::DELETE, Value::Null).await;
    assert_eq!(ended.json::<DrainStatus>().phase, None);
    assert_eq!(bed.metric(A, "sluice_drain_phase", "").await, 0.0);
    let id = bed.create(A, MIB).await;
    assert_eq!(bed.put_ok(A, id, 0, noise(951, MIB)).await.dc, "dc-a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_that_was_evacuated_can_be_switched_off() {
    let mut bed = start(2).await;
    let large = noise(960, 20 * MIB + 5);
    let sent = bed.upload(&[A], large.clone(), WaitFor::Assembled).await;
    let mut small = Vec::new();
    for n in 0..20 {
        let (id, bytes) = (Uuid::now_v7(), noise(970 + n, 3000));
        let said = serde_json::to_value(new_file(id, bytes.len())).unwrap();
        let answer = bed.post_whole(A, &said, bytes.clone()).await.unwrap();
        assert_eq!(answer.status, StatusCode::CREATED);
        small.push((id, bytes));
    }
    drain(&bed, A, "dc-b", "data", true).await;
    let status = eventually("the last file", async || {
        let status = shown(&bed, A).await;
        (status.files_left == 0).then_some(status)
    })
    .await;
    assert!(status.evacuate);
    for id in small.iter().map(|(id, _)| *id).chain([sent.id]) {
        let status = bed.reach(B, id, State::Assembled).await;
        assert_eq!(status.home, "dc-b");
    }
    // A restart does not end it, and dc-b knows.
    bed.cluster.kill(A).await;
    bed.cluster.start(A).await.unwrap();
    linked(&bed, 2).await;
    assert_eq!(shown(&bed, A).await.phase.as_deref(), Some("data"));
    let back = order(&bed, B, Method::PUT, json!({ "to": "dc-a", "phase": "data" })).await;
    assert_eq!((back.status, back.problem().as_str()), (StatusCode::PRECONDITION_FAILED, "precondition"));

    bed.cluster.kill(A).await;
    for (id, bytes) in &small {
        assert!(bed.read(B, *id, Root::of_bytes(bytes)).await == *bytes);
    }
    assert!(bed.read(B, sent.id, sent.root).await == large);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_cannot_be_is_refused_by_name() {
    let mut bed = start(3).await;
    let begin = |to: &str| json!({ "to": to, "phase": "data" });
    let refused = async |bed: &Bed, dc: DcId, body: Value| {
        let answer = order(bed, dc, Method::PUT, body).await;
        (answer.status.as_u16(), answer.problem())
    };
    let is = |status: u16, problem: &str| (status, problem.to_owned());
    assert_eq!(refused(&bed, A, begin("dc-z")).await, is(400, "invalid-parameter"));
    assert_eq!(refused(&bed, A, begin("dc-a")).await, is(400, "invalid-parameter"));
    assert_eq!(refused(&bed, A, json!({ "to": "dc-b", "phase": "all" })).await, is(400, "invalid-parameter"));
    assert_eq!(refused(&bed, A, json!({ "to": "dc-b" })).await, is(400, "invalid-metadata"));
    // Nobody who may only use files may do this, or see it.
    for method in [Method::GET, Method::PUT, Method::DELETE] {
        let body = begin("dc-b").to_string();
        let answer = bed.ask_as_operator(&bed.token(crate::bed::TENANT), A, method, "/drain", body).await;
        assert_eq!((answer.status.as_u16(), answer.problem()), is(403, "forbidden"));
    }
    drain(&bed, B, "dc-c", "data", false).await;
    eventually("dc-a hears of it", async || {
        (refused(&bed, A, begin("dc-b")).await == is(412, "precondition")).then_some(())
    })
    .await;
    eventually("dc-c hears of it", async || {
        (refused(&bed, C, begin("dc-a")).await == is(412, "precondition")).then_some(())
    })
    .await;
    bed.cluster.kill(C).await;
    eventually("dc-a misses dc-c", async || {
        (refused(&bed, A, begin("dc-c")).await == is(412, "precondition")).then_some(())
    })
    .await;
    // What dc-b hands over it takes itself while nobody else can.
    let id = bed.create(B, MIB).await;
    assert!(["dc-a", "dc-b"].contains(&bed.put_ok(B, id, 0, noise(980, MIB)).await.dc.as_str()));
}
