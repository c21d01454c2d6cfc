//! Uploads: failover, retry, resume, integrity, giving up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sluice_client::{
    Advice, Client, ClientError, Event, ExitClass, Order, SharedObserver, Source, UploadOptions, WaitFor,
    unobserved,
};
use sluice_engine::hash::Root;
use sluice_engine::limits::CHUNK_LEN;
use sluice_proto::http::State;
use sluice_proto::problem::{Problem, Refusal};
use uuid::Uuid;

use crate::fake::{FakeCluster, Fault, noise};

const MIB: usize = CHUNK_LEN as usize;

fn options() -> UploadOptions {
    UploadOptions { name: "noise".into(), ..UploadOptions::default() }
}

/// Panics when chunks are sent again: nothing that was acknowledged was lost, and failing over must not lose any.
fn nothing_lost() -> SharedObserver {
    Arc::new(|event: &Event<'_>| assert!(!matches!(event, Event::Resending { .. }), "{event:?}"))
}

fn seed() -> u64 {
    let seed = Uuid::new_v7(uuid::Timestamp::now(uuid::NoContext)).as_u64_pair().1;
    println!("seed {seed}");
    seed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_size_arrives_over_two_datacenters_with_its_root() {
    let cluster = FakeCluster::start(2).await;
    let client = cluster.client();
    let seed = seed();
    for len in [0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB, 11 * MIB + 5, 40 * MIB] {
        let bytes = noise(seed, len);
        let options = UploadOptions { order: Order::Shuffled { seed, inside: true }, ..options() };
        let uploaded = client.upload(&Source::memory(bytes.clone()), &options, nothing_lost()).await.unwrap();
        assert_eq!(uploaded.root, Root::of_bytes(&bytes), "{len} bytes");
        assert_eq!(uploaded.state, State::Complete);
        assert_eq!(uploaded.home, "dc-a");
        assert_eq!((uploaded.chunks_sent, uploaded.chunks_skipped), (len.div_ceil(MIB) as u64, 0));
        assert!(cluster.bytes(uploaded.id) == bytes);
        if len >= 2 * MIB {
            assert!(cluster.held(0, uploaded.id) > 0 && cluster.held(1, uploaded.id) > 0, "both get some");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_read_in_place_and_changes_are_noticed() {
    let cluster = FakeCluster::start(1).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("source");
    let bytes = noise(seed(), 5 * MIB + 7);
    std::fs::write(&path, &bytes).unwrap();
    let source = Source::open(&path).unwrap();
    let uploaded = cluster.client().upload(&source, &options(), unobserved()).await.unwrap();
    assert!(cluster.bytes(uploaded.id) == bytes);

    let source = Source::open(&path).unwrap();
    std::fs::write(&path, b"short").unwrap();
    let error = cluster.client().upload(&source, &options(), unobserved()).await.unwrap_err();
    assert!(matches!(error, ClientError::SourceChanged { .. }), "{error}");
    assert_eq!(error.exit_class(), ExitClass::Integrity);
}

/// Kills a datacenter when 60 % are acknowledged; it never comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_that_dies_costs_nothing_but_time() {
    let cluster = FakeCluster::start(2).await;
    let bytes = noise(seed(), 60 * MIB + 1);
    let acknowledged = AtomicU64::new(0);
    let victim = cluster.dcs[1].clone();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let events = seen.clone();
    let observer: SharedObserver = Arc::new(move |event: &Event<'_>| match event {
        Event::Acknowledged { count, .. }
            if acknowledged.fetch_add(*count, Ordering::Relaxed) + count >= 36 =>
        {
            victim.kill();
        }
        Event::UrlDown { url, .. } => events.lock().unwrap().push(*url),
        Event::Resending { .. } => panic!("{event:?}: nothing was lost"),
        _ => {}
    });
    let uploaded =
        cluster.client().upload(&Source::memory(bytes.clone()), &options(), observer).await.unwrap();
    assert_eq!(uploaded.root, Root::of_bytes(&bytes));
    assert!(cluster.bytes(uploaded.id) == bytes);
    assert!(cluster.held(1, uploaded.id) > 0, "it had taken some");
    assert!(seen.lock().unwrap().iter().all(|url| *url == 1));
}

/// What a dead datacenter had acknowledged is lost with it: it is sent again to the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_lost_after_their_acknowledgement_are_sent_again() {
    let cluster = Arc::new(FakeCluster::start(2).await);
    let bytes = noise(seed(), 20 * MIB);
    let killer = cluster.clone();
    let acknowledged = AtomicU64::new(0);
    let resent = Arc::new(AtomicU64::new(0));
    let counter = resent.clone();
    let observer: SharedObserver = Arc::new(move |event: &Event<'_>| match event {
        Event::Acknowledged { count, .. }
            if acknowledged.fetch_add(*count, Ordering::Relaxed) + count == 20 =>
        {
            killer.dcs[1].kill();
            killer.forget(1);
        }
        Event::Resending { chunks } => counter.store(*chunks, Ordering::Relaxed),
        _ => {}
    });
    let source = Source::memory(bytes.clone());
    let uploaded = cluster.client().upload(&source, &options(), observer).await.unwrap();
    let resent = resent.load(Ordering::Relaxed);
    assert!(resent > 0);
    assert_eq!(uploaded.chunks_sent, 20 + resent);
    assert!(cluster.bytes(uploaded.id) == bytes);
    assert_eq!(cluster.held(0, uploaded.id), 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_that_pass_dropped_answers_and_broken_connections_are_survived() {
    let cluster = FakeCluster::start(2).await;
    let seed = seed();
    for (dc, salt) in cluster.dcs.iter().zip(0u64..) {
        dc.fail(move |request| {
            let dice = blake3::hash(&[seed + salt, request.nth].map(u64::to_be_bytes).concat()).as_bytes()[0];
            let refusal = |problem| Refusal::new(problem, "not now").retry_after(Duration::ZERO);
            match dice % 12 {
                0 => Some(Fault::Refuse(refusal(Problem::Overloaded))),
                1 => Some(Fault::Refuse(refusal(Problem::RateLimited))),
                2 => Some(Fault::Break),
                3 => Some(Fault::DropAnswer),
                _ => None,
            }
        });
    }
    let bytes = noise(seed, 50 * MIB + 3);
    let uploaded =
        cluster.client().upload(&Source::memory(bytes.clone()), &options(), nothing_lost()).await.unwrap();
    assert_eq!(uploaded.root, Root::of_bytes(&bytes));
    assert!(cluster.bytes(uploaded.id) == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_that_stands_still_is_given_up_for_another() {
    let cluster = FakeCluster::start(2).await;
    cluster.dcs[1].fail(|request| request.is_chunk().then_some(Fault::Stall));
    let mut config = cluster.config();
    config.timeouts.answer = Duration::from_millis(500);
    let bytes = noise(seed(), 12 * MIB);
    let client = Client::new(config).unwrap();
    let uploaded = client.upload(&Source::memory(bytes.clone()), &options(), nothing_lost()).await.unwrap();
    assert!(cluster.bytes(uploaded.id) == bytes);
    assert_eq!(cluster.held(0, uploaded.id), 12);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_after_is_kept_to() {
    let cluster = FakeCluster::start(1).await;
    cluster.dcs[0].fail(|request| {
        (request.nth == 1).then(|| Fault::Refuse(Refusal::new(Problem::RateLimited, "slower")))
    });
    let begun = std::time::Instant::now();
    let source = Source::memory(noise(seed(), 3 * MIB));
    cluster.client().upload(&source, &options(), unobserved()).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(900), "Retry-After was 1 s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_upload_carries_on_elsewhere_with_what_is_missing() {
    let cluster = FakeCluster::start(2).await;
    let bytes = noise(seed(), 48 * MIB);
    let source = Source::memory(bytes.clone());
    let options = UploadOptions { id: Some(Uuid::now_v7()), ..options() };
    let first = cluster.client();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let stop = Mutex::new(Some(stop));
    let acknowledged = AtomicU64::new(0);
    let observer: SharedObserver = Arc::new(move |event: &Event<'_>| {
        if let Event::Acknowledged { count, .. } = event
            && acknowledged.fetch_add(*count, Ordering::Relaxed) + count >= 16
            && let Some(stop) = stop.lock().unwrap().take()
        {
            stop.send(()).unwrap();
        }
    });
    tokio::select! {
        _ = first.upload(&source, &options, observer) => panic!("it was to be interrupted"),
        _ = stopped => {}
    }
    drop(first);
    let second = cluster.client();
    let uploaded = second.upload(&source, &options, unobserved()).await.unwrap();
    assert_eq!(uploaded.chunks_sent + uploaded.chunks_skipped, 48);
    assert!(uploaded.chunks_skipped >= 16, "skipped {}", uploaded.chunks_skipped);
    assert!(cluster.bytes(uploaded.id) == bytes);

    let again = second.upload(&source, &options, unobserved()).await.unwrap();
    assert_eq!((again.chunks_sent, again.chunks_skipped), (0, 48));
    assert_eq!(again.root, uploaded.root);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_file_under_the_same_id_is_an_integrity_error() {
    let cluster = FakeCluster::start(1).await;
    let client = cluster.client();
    let seed = seed();
    let options = UploadOptions { id: Some(Uuid::now_v7()), ..options() };
    client.upload(&Source::memory(noise(seed, 4 * MIB)), &options, unobserved()).await.unwrap();
    // Everything is there, so nothing is sent: only the root tells.
    let other = Source::memory(noise(seed + 1, 4 * MIB));
    let error = client.upload(&other, &options, unobserved()).await.unwrap_err();
    assert!(matches!(error, ClientError::RootMismatch { .. }), "{error}");
    assert_eq!((error.exit_class(), error.advice()), (ExitClass::Integrity, Advice::Stop));

    let longer = Source::memory(noise(seed, 4 * MIB + 1));
    let error = client.upload(&longer, &options, unobserved()).await.unwrap_err();
    assert!(matches!(error, ClientError::SizeDiffers { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_conflict_names_the_chunk_and_stops_at_once() {
    let cluster = FakeCluster::start(1).await;
    cluster.dcs[0].fail(|request| {
        let refusal =
            Refusal::new(Problem::ChunkConflict, "chunk 9 is stored with other bytes").hint("use a new id");
        request.path.ends_with("/chunks/8").then_some(Fault::Refuse(refusal))
    });
    let source = Source::memory(noise(seed(), 20 * MIB));
    let error = cluster.client().upload(&source, &options(), unobserved()).await.unwrap_err();
    assert_eq!(error.to_string(), "dc-a refused chunks 8 to 15: chunk 9 is stored with other bytes");
    assert_eq!((error.code(), error.exit_class()), ("chunk-conflict", ExitClass::Integrity));
    assert_eq!(error.hint().as_deref(), Some("use a new id"));
    assert_eq!(error.trace(), Some("0123456789abcdef0123456789abcdef"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_before_the_body_is_read_is_heard() {
    let cluster = FakeCluster::start(1).await;
    cluster.dcs[0].fail(|request| {
        let refusal = Refusal::new(Problem::Quota, "the quota of 1 GiB is used up");
        request.is_chunk().then_some(Fault::RefuseEarly(refusal))
    });
    let source = Source::memory(noise(seed(), 64 * MIB));
    let error = cluster.client().upload(&source, &options(), unobserved()).await.unwrap_err();
    assert_eq!((error.code(), error.exit_class()), ("quota", ExitClass::NotAllowed), "{error}");
}

/// More ranges than a status tells: the chunk values say the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_that_were_cut_short_are_completed_from_the_tree() {
    let cluster = FakeCluster::start(1).await;
    let bytes = noise(seed(), 48 * MIB);
    let source = Source::memory(bytes.clone());
    let options = UploadOptions { id: Some(Uuid::now_v7()), ..options() };
    let client = cluster.client();
    client.upload(&source, &options, unobserved()).await.unwrap();
    cluster.forget_chunks(0, |chunk| chunk / 8 % 2 == 1);
    cluster.files.max_ranges.store(1, Ordering::Relaxed);
    let again = client.upload(&source, &options, unobserved()).await.unwrap();
    assert_eq!((again.chunks_sent, again.chunks_skipped), (24, 24));
    assert!(cluster.bytes(again.id) == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_no_datacenter_is_left_it_gives_up_in_time_and_says_who_failed() {
    let cluster = FakeCluster::start(2).await;
    for dc in &cluster.dcs {
        dc.fail(|request| request.is_chunk().then_some(Fault::Break));
    }
    let mut config = cluster.config();
    config.retry.retry_for = Duration::from_millis(600);
    let client = Client::new(config).unwrap();
    let source = Source::memory(noise(seed(), 20 * MIB));
    let error = client.upload(&source, &options(), unobserved()).await.unwrap_err();
    assert!(matches!(error, ClientError::GaveUp { .. }), "{error}");
    assert_eq!((error.code(), error.exit_class()), ("unreachable", ExitClass::TryLater));

    for dc in &cluster.dcs {
        dc.kill();
    }
    let error = client.about().await.unwrap_err();
    assert_eq!(error.exit_class(), ExitClass::TryLater, "{error}");
}

/// All datacenters are away for a while; the upload waits for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datacenters_that_come_back_are_used_again() {
    let cluster = Arc::new(FakeCluster::start(2).await);
    let bytes = noise(seed(), 40 * MIB);
    let (down, mut went_down) = tokio::sync::mpsc::unbounded_channel();
    let killer = cluster.clone();
    let lives = AtomicU64::new(3);
    let observer: SharedObserver = Arc::new(move |event: &Event<'_>| {
        let dies = || lives.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if matches!(event, Event::Acknowledged { .. }) && dies().is_ok() {
            killer.dcs.iter().for_each(|dc| dc.kill());
            down.send(()).unwrap();
        }
    });
    let healer = cluster.clone();
    let heal = tokio::spawn(async move {
        while went_down.recv().await.is_some() {
            for dc in &healer.dcs {
                dc.kill();
                dc.restart().await;
            }
        }
    });
    let source = Source::memory(bytes.clone());
    let uploaded = cluster.client().upload(&source, &options(), observer).await;
    heal.abort();
    assert!(cluster.bytes(uploaded.unwrap().id) == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_token_is_not_tried_twice() {
    let cluster = FakeCluster::start(2).await;
    let mut config = cluster.config();
    config.token = sluice_client::Token::new("another");
    let client = Client::new(config).unwrap();
    let source = Source::memory(noise(seed(), 2 * MIB));
    let error = client.upload(&source, &options(), unobserved()).await.unwrap_err();
    assert_eq!((error.code(), error.exit_class()), ("invalid-token", ExitClass::NotAllowed));
    assert_eq!(cluster.dcs[1].requests.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_the_ca_does_not_vouch_for_is_told_nothing() {
    let cluster = FakeCluster::start(1).await;
    let mut config = cluster.config();
    config.ca_pem = FakeCluster::start(1).await.ca_pem.into_bytes();
    let client = Client::new(config).unwrap();
    let source = Source::memory(noise(seed(), MIB));
    let error = client.upload(&source, &options(), unobserved()).await.unwrap_err();
    assert_eq!((error.code(), error.advice()), ("untrusted", Advice::Fix), "{error}");
    assert_eq!(cluster.dcs[0].requests.load(Ordering::Relaxed), 0);
}

/// A datacenter that takes two requests at a time, and refuses the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_that_pushes_back_gets_less_at_once() {
    let cluster = FakeCluster::start(1).await;
    cluster.dcs[0].limit_chunk_requests(2);
    let bytes = noise(seed(), 64 * MIB);
    let source = Source::memory(bytes.clone());
    let uploaded = cluster.client().upload(&source, &options(), nothing_lost()).await.unwrap();
    assert!(cluster.bytes(uploaded.id) == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_for_assembly_and_expecting_a_root() {
    let cluster = FakeCluster::start(2).await;
    *cluster.files.assembles.lock().unwrap() = true;
    let bytes = noise(seed(), 3 * MIB);
    let root = Root::of_bytes(&bytes);
    let options = UploadOptions { wait: WaitFor::Assembled, expected_root: Some(root), ..options() };
    let client = cluster.client();
    let uploaded = client.upload(&Source::memory(bytes), &options, unobserved()).await.unwrap();
    assert_eq!(uploaded.state, State::Assembled);
    let other = Source::memory(vec![1; 3 * MIB]);
    let error = client.upload(&other, &options, unobserved()).await.unwrap_err();
    assert!(matches!(error, ClientError::ExpectedRoot { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_go_to_whoever_answers() {
    let cluster = FakeCluster::start(2).await;
    let client = cluster.client();
    let mut ids = Vec::new();
    for i in 0..3 {
        let source = Source::memory(noise(i, MIB));
        ids.push(client.upload(&source, &options(), unobserved()).await.unwrap().id);
    }
    cluster.dcs[0].kill();
    assert_eq!(client.about().await.unwrap().dc, "dc-b");
    let filter = sluice_client::ListFilter { limit: Some(2), ..Default::default() };
    let page = client.list(filter).await.unwrap();
    assert_eq!(page.files.iter().map(|file| file.id).collect::<Vec<_>>(), ids[..2]);
    let rest = client.list(sluice_client::ListFilter { after: page.next, ..filter }).await.unwrap();
    assert_eq!((rest.files[0].id, rest.next), (ids[2], None));
    client.remove(ids[0]).await.unwrap();
    client.remove(ids[0]).await.unwrap();
    let error = client.status(ids[0]).await.unwrap_err();
    assert_eq!((error.code(), error.exit_class()), ("dropped", ExitClass::NotFound));
    let error = client.status(Uuid::nil()).await.unwrap_err();
    assert_eq!((error.code(), error.exit_class()), ("not-found", ExitClass::NotFound));
}

/// Where the metadata went is gone, and nobody else has fetched it: the file goes on all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_lacks_the_metadata_is_told_when_the_one_that_took_it_has_gone() {
    // No chunk without it, or few, and it must be told while they are sent; many, and it is once they are.
    for room in [0, 8, 1_000] {
        let cluster = Arc::new(FakeCluster::start(3).await);
        [1, 2].into_iter().for_each(|dc| cluster.dcs[dc].bereave(room));
        let bytes = noise(seed(), 40 * MIB + 3);
        let killer = cluster.clone();
        let observer: SharedObserver = Arc::new(move |event: &Event<'_>| {
            if let Event::Acknowledged { url: 0, .. } = event {
                killer.dcs[0].kill();
                killer.forget(0);
            }
        });
        let source = Source::memory(bytes.clone());
        let uploaded = cluster.client().upload(&source, &options(), observer).await.unwrap();
        assert_eq!((uploaded.root, uploaded.state), (Root::of_bytes(&bytes), State::Complete));
        assert!(cluster.dcs[1].is_told() && cluster.dcs[2].is_told(), "with room for {room}");
        assert!(cluster.bytes(uploaded.id) == bytes);
    }
}

/// Nobody is told twice what the datacenter that took the metadata is about to tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_one_that_took_the_metadata_is_well_chunks_that_come_before_it_are_nothing_to_worry_about()
{
    let cluster = FakeCluster::start(2).await;
    cluster.dcs[1].bereave(1_000);
    let bytes = noise(seed(), 40 * MIB);
    let acknowledged = UploadOptions { wait: WaitFor::Acknowledged, ..options() };
    let source = Source::memory(bytes);
    let uploaded = cluster.client().upload(&source, &acknowledged, nothing_lost()).await.unwrap();
    assert!(cluster.held(1, uploaded.id) > 0 && !cluster.dcs[1].is_told());
}

/// What is held where the metadata never came is not sent again by whoever brings it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resumed_upload_brings_the_metadata_to_those_that_lack_it_and_skips_what_they_hold() {
    let cluster = FakeCluster::start(3).await;
    let bytes = noise(seed(), 24 * MIB);
    let id = Uuid::now_v7();
    let whole = UploadOptions { id: Some(id), ..options() };
    cluster.client().upload(&Source::memory(bytes.clone()), &whole, unobserved()).await.unwrap();
    cluster.dcs[0].kill();
    cluster.forget(0);
    let held = cluster.held(1, id) + cluster.held(2, id);
    [1, 2].into_iter().for_each(|dc| cluster.dcs[dc].bereave(0));
    let again = cluster.client().upload(&Source::memory(bytes.clone()), &whole, unobserved()).await.unwrap();
    assert!(held > 0 && held < 24, "{held}");
    assert_eq!((again.chunks_skipped, again.chunks_sent), (held as u64, 24 - held as u64));
    assert!(cluster.dcs[1].is_told() && cluster.dcs[2].is_told());
    assert!(cluster.bytes(id) == bytes);
}

/// What stands there is another file: that ends it, and is not tried for long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_that_contradict_what_is_known_end_an_upload_that_brings_them_again() {
    let cluster = Arc::new(FakeCluster::start(2).await);
    cluster.dcs[1].bereave(1_000);
    cluster.dcs[1].fail(|request| {
        let refusal = Refusal::new(Problem::MetadataConflict, "the file has other metadata");
        (request.method == "POST").then_some(Fault::Refuse(refusal))
    });
    let killer = cluster.clone();
    let observer: SharedObserver = Arc::new(move |event: &Event<'_>| {
        if let Event::Acknowledged { url: 0, .. } = event {
            killer.dcs[0].kill();
        }
    });
    let source = Source::memory(noise(seed(), 40 * MIB));
    let error = cluster.client().upload(&source, &options(), observer).await.unwrap_err();
    assert_eq!((error.code(), error.exit_class()), ("metadata-conflict", ExitClass::Integrity), "{error}");
}
