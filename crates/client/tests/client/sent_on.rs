//! Requests that are refused or sent on before their body: what that costs, and where the token goes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sluice_client::{Advice, Client, Source, UploadOptions, WaitFor, unobserved};
use sluice_engine::hash::Root;
use sluice_engine::limits::CHUNK_LEN;
use sluice_proto::problem::{Problem, Refusal};

use crate::fake::{FakeCluster, Fault, noise};

const MIB: usize = CHUNK_LEN as usize;

/// What heads, handshakes and answers may cost.
const SMALL: u64 = 256 << 10;

fn received(cluster: &FakeCluster, dc: usize) -> u64 {
    cluster.dcs[dc].received.load(Ordering::Relaxed)
}

fn client_of_the_first(cluster: &FakeCluster) -> Client {
    let mut config = cluster.config();
    config.urls.truncate(1);
    config.retry.retry_for = Duration::from_secs(2);
    Client::new(config).unwrap()
}

fn options() -> UploadOptions {
    UploadOptions { name: "noise".into(), ..UploadOptions::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_body_is_not_sent() {
    let cluster = FakeCluster::start(1).await;
    let refused = AtomicU64::new(0);
    cluster.dcs[0].fail(move |request| {
        let refusal = Refusal::new(Problem::Overloaded, "later").retry_after(Duration::ZERO);
        let refuse = request.is_chunk() && refused.fetch_add(1, Ordering::Relaxed) % 3 < 2;
        refuse.then_some(Fault::RefuseUnread(refusal))
    });
    let bytes = noise(30, 32 * MIB);
    let sent =
        cluster.client().upload(&Source::memory(bytes.clone()), &options(), unobserved()).await.unwrap();
    assert!(cluster.bytes(sent.id) == bytes);
    let received = received(&cluster, 0);
    assert!(received < 33 * CHUNK_LEN, "{received} bytes for {}", bytes.len());
    assert!(received >= 32 * CHUNK_LEN);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_that_are_sent_on_arrive_once_and_cost_the_first_nothing() {
    let cluster = FakeCluster::start(2).await;
    let there = cluster.urls()[1].clone();
    cluster.dcs[0].fail(move |request| {
        request.is_chunk().then(|| Fault::SendOn(307, format!("{there}{}", request.path)))
    });
    let bytes = noise(31, 40 * MIB + 5);
    // Only dc-a is configured; that dc-b belongs to the cluster dc-a says.
    let client = client_of_the_first(&cluster);
    let sent = client.upload(&Source::memory(bytes.clone()), &options(), unobserved()).await.unwrap();
    assert_eq!((sent.root, sent.chunks_sent), (Root::of_bytes(&bytes), 41));
    assert!(cluster.bytes(sent.id) == bytes);
    assert_eq!((cluster.held(0, sent.id), cluster.held(1, sent.id)), (0, 41));
    let (a, b) = (received(&cluster, 0), received(&cluster, 1));
    assert!(a < SMALL && b < 41 * CHUNK_LEN + SMALL, "{a} bytes at dc-a, {b} at dc-b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_else_is_sent_on_with_its_method_and_body() {
    let cluster = FakeCluster::start(2).await;
    let there = cluster.urls()[1].clone();
    // Where it is must be asked somewhere.
    cluster.dcs[0].fail(move |request| {
        (request.path != "/v1").then(|| Fault::SendOn(308, format!("{there}{}", request.path)))
    });
    let client = client_of_the_first(&cluster);
    let bytes = noise(32, 9 * MIB);
    let options = UploadOptions { wait: WaitFor::Acknowledged, ..options() };
    let sent = client.upload_stream(&bytes[..], &options, unobserved()).await.unwrap();
    assert!(cluster.bytes(sent.id) == bytes);
    assert_eq!(client.status(sent.id).await.unwrap().home, "dc-b");
    client.remove(sent.id).await.unwrap();
    assert_eq!(client.status(sent.id).await.unwrap_err().code(), "dropped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_token_goes_to_no_host_that_is_not_of_the_cluster() {
    let cluster = FakeCluster::start(3).await;
    // The third has a certificate of the same CA, and is none of the cluster's.
    let stranger = cluster.urls()[2].clone();
    cluster.files.urls.lock().unwrap().truncate(2);
    let plain = cluster.urls()[1].replace("https", "http");
    let id = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    for to in [stranger, plain, "https://evil.example/".into(), "ftp://x".into()] {
        let location = to.clone();
        cluster.dcs[0].fail(move |request| {
            (request.path != "/v1").then(|| Fault::SendOn(307, format!("{location}/v1/files")))
        });
        let error = client_of_the_first(&cluster).status(id).await.unwrap_err();
        assert_eq!((error.code(), error.advice()), ("sent-away", Advice::Fix), "{to}: {error}");
        assert!(error.to_string().contains(&to), "{error}");
    }
    assert_eq!(received(&cluster, 2), 0, "not even a handshake");
    cluster.dcs[0].fail(|_| Some(Fault::SendOn(307, "https://[".into())));
    let error = client_of_the_first(&cluster).status(id).await.unwrap_err();
    assert_eq!(error.code(), "malformed-answer", "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_it_is_refused_for_reasons_of_that_datacenter_the_first_does_it_itself() {
    let refusals = [Problem::Quota, Problem::InvalidToken, Problem::RateLimited, Problem::Overloaded];
    let faults = refusals.map(|problem| Some(Refusal::new(problem, "not here"))).into_iter().chain([None]);
    for (seed, refusal) in (34..).zip(faults) {
        let cluster = FakeCluster::start(2).await;
        let there = cluster.urls()[1].clone();
        cluster.dcs[0].fail(move |request| {
            (request.is_chunk() && request.follows)
                .then(|| Fault::SendOn(307, format!("{there}{}", request.path)))
        });
        let of_there = refusal.clone();
        cluster.dcs[1].fail(move |request| {
            // Without a refusal it hangs.
            let fault = of_there.clone().map_or(Fault::Stall, Fault::RefuseUnread);
            request.is_chunk().then_some(fault)
        });
        let bytes = noise(seed, 40 * MIB + 5);
        let client = client_of_the_first(&cluster);
        let source = Source::memory(bytes.clone());
        let sent = client.upload(&source, &options(), unobserved()).await;
        let sent = sent.unwrap_or_else(|error| panic!("{refusal:?}: {error}"));
        assert!(cluster.bytes(sent.id) == bytes);
        assert_eq!((cluster.held(0, sent.id), cluster.held(1, sent.id)), (41, 0), "{refusal:?}");
        // It asks not to be sent there again.
        let b = received(&cluster, 1);
        assert!(b < SMALL || refusal.is_none(), "{b} bytes at dc-b");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_both_refuse_is_refused() {
    let cluster = FakeCluster::start(2).await;
    let there = cluster.urls()[1].clone();
    cluster.dcs[0].fail(move |request| {
        let refusal = Refusal::new(Problem::Quota, "nor here");
        request.is_chunk().then(|| match request.follows {
            true => Fault::SendOn(307, format!("{there}{}", request.path)),
            false => Fault::RefuseUnread(refusal),
        })
    });
    cluster.dcs[1].fail(|request| {
        request.is_chunk().then(|| Fault::RefuseUnread(Refusal::new(Problem::Quota, "not here")))
    });
    let source = Source::memory(noise(39, 2 * MIB));
    let error = client_of_the_first(&cluster).upload(&source, &options(), unobserved()).await.unwrap_err();
    assert_eq!(error.code(), "quota", "{error}");
    assert!(error.to_string().contains("nor here"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datacenters_that_point_at_one_another_are_given_up_on_for_the_moment() {
    let cluster = FakeCluster::start(2).await;
    let urls = cluster.urls();
    for (dc, other) in [(0, 1), (1, 0)] {
        let there = urls[other].clone();
        cluster.dcs[dc].fail(move |request| {
            request.is_chunk().then(|| Fault::SendOn(307, format!("{there}{}", request.path)))
        });
    }
    // One that fits a request has no chunks to send on.
    let bytes = noise(33, 2 * MIB);
    let source = Source::memory(bytes.clone());
    let error = client_of_the_first(&cluster).upload(&source, &options(), unobserved()).await.unwrap_err();
    assert_eq!((error.code(), error.advice()), ("unreachable", Advice::Retry), "{error}");
    assert!(error.to_string().contains("more than 3 times"), "{error}");
    for dc in &cluster.dcs {
        dc.fail(|_| None);
    }
    let sent = client_of_the_first(&cluster).upload(&source, &options(), unobserved()).await.unwrap();
    assert!(cluster.bytes(sent.id) == bytes);
}
