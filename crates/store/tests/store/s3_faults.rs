//! What the S3 backend survives: a server that refuses, hangs, lies and lands things late, and a bucket that others have
//! written to.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use sluice_engine::geometry::Run;
use sluice_engine::hash::Root;
use sluice_engine::ids::FileId;
use sluice_engine::share::Share;
use sluice_fault_s3::{Fault, Garage, Key, Proxy, Seen};
use sluice_store::{Advice, ChunkStore, Chunks, S3Options, S3Request, S3Store, StoreError, Whole};
use tokio::time::timeout;

use crate::material::{FULL, TENANT, content, file, index, put, record, root, share, values};
use crate::s3::options;

/// A server, and a proxy before it.
struct Bench {
    garage: Garage,
    proxy: Proxy,
}

impl Bench {
    async fn start() -> Option<Self> {
        let garage = Garage::start()?;
        let proxy = Proxy::start(garage.address()).await;
        Some(Self { garage, proxy })
    }

    /// What a store through the proxy is opened with.
    fn options(&self) -> S3Options {
        S3Options {
            attempts: 3,
            patience: Duration::from_secs(10),
            ..options(self.proxy.endpoint(), &self.garage, self.garage.key())
        }
    }

    async fn open(&self) -> S3Store {
        S3Store::open(self.options()).await.unwrap()
    }

    /// What a process would find that starts now.
    async fn reopen(&self, store: S3Store) -> S3Store {
        store.close().await.unwrap();
        drop(store);
        self.open().await
    }

    /// A client that nothing of ours stands before.
    fn raw(&self) -> Raw {
        raw(&self.garage)
    }
}

/// The same, of any server.
pub(crate) fn raw(garage: &Garage) -> Raw {
    let key = garage.key();
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new(garage.region()))
        .endpoint_url(garage.endpoint())
        .credentials_provider(Credentials::new(&key.id, &key.secret, None, None, "test"))
        .force_path_style(true)
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .retry_config(RetryConfig::disabled())
        .build();
    Raw { client: Client::from_conf(config), bucket: garage.bucket() }
}

/// The bucket as it is.
pub(crate) struct Raw {
    client: Client,
    bucket: &'static str,
}

impl Raw {
    async fn keys(&self, prefix: &str) -> Vec<String> {
        let mut keys = Vec::new();
        let mut after = None;
        loop {
            let page = self.client.list_objects_v2().bucket(self.bucket).prefix(format!("dc-a/{prefix}"));
            let page = page.set_start_after(after).send().await.unwrap();
            keys.extend(page.contents().iter().map(|object| object.key().unwrap().to_owned()));
            if page.is_truncated() != Some(true) {
                return keys;
            }
            after = keys.last().cloned();
        }
    }

    async fn get(&self, key: &str) -> Bytes {
        let object = self.client.get_object().bucket(self.bucket).key(key).send().await.unwrap();
        object.body.collect().await.unwrap().into_bytes()
    }

    pub(crate) async fn put(&self, key: &str, bytes: Bytes) {
        let put = self.client.put_object().bucket(self.bucket).key(key).body(ByteStream::from(bytes));
        put.send().await.unwrap();
    }

    async fn begin_upload(&self, key: &str) {
        self.client.create_multipart_upload().bucket(self.bucket).key(key).send().await.unwrap();
    }

    async fn uploads(&self) -> usize {
        self.client.list_multipart_uploads().bucket(self.bucket).send().await.unwrap().uploads().len()
    }
}

/// Starts a server, or ends the test where there is none.
macro_rules! bench {
    () => {
        match Bench::start().await {
            Some(bench) => bench,
            None => return,
        }
    };
}

fn is_run(seen: &Seen) -> bool {
    seen.operation == "PutObject" && seen.key.contains("incoming/")
}

fn is_copy(seen: &Seen) -> bool {
    seen.operation == "UploadPartCopy"
}

fn is_record(seen: &Seen) -> bool {
    seen.operation == "PutObject" && seen.key.contains("files/")
}

async fn facts(store: &S3Store, of: FileId) -> Vec<u8> {
    store.summary(of).await.unwrap().unwrap().facts
}

async fn held(store: &S3Store, of: FileId) -> Vec<std::ops::Range<u64>> {
    store.summary(of).await.unwrap().map(|summary| summary.held).unwrap_or_default()
}

/// Writes `bytes` in runs of up to `chunks` chunks.
async fn put_runs(store: &S3Store, of: FileId, bytes: &Bytes, chunks: usize) {
    for at in (0..bytes.len()).step_by(chunks * FULL) {
        let (mut from, end) = (at, (at + chunks * FULL).min(bytes.len()));
        // What is left at the end goes in runs that there are.
        while from < end {
            let left = (end - from).div_ceil(FULL);
            let first = from / FULL;
            let fit =
                1 << left.ilog2().min(first.checked_ilog2().map_or(3, |_| first.trailing_zeros())).min(3);
            let to = (from + fit * FULL).min(end);
            put(store, of, first as u64, &bytes.slice(from..to)).await.unwrap();
            from = to;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_downs_are_waited_out_and_bodies_stay_bounded() {
    let bench = bench!();
    let options = S3Options { bodies: 8 << 20, ..bench.options() };
    let store = Arc::new(S3Store::open(options).await.unwrap());
    let counter = std::sync::atomic::AtomicUsize::new(0);
    bench.proxy.rule(move |seen| {
        let turn = counter.fetch_add(usize::from(is_run(seen)), std::sync::atomic::Ordering::Relaxed);
        (is_run(seen) && turn.is_multiple_of(2)).then_some(Fault::SlowDown)
    });
    let bytes = content(1, 8 * FULL);
    put(&*store, file(1), 0, &bytes).await.unwrap();
    let metrics = store.metrics();
    assert_eq!((metrics.slow_downs, metrics.retries), (1, 1));

    bench.proxy.rule(|seen| is_run(seen).then_some(Fault::SlowDown));
    let error = put(&*store, file(2), 0, &bytes).await.unwrap_err();
    assert_eq!(error.advice(), Advice::Retry, "{error}");
    assert!(error.to_string().contains("SlowDown"), "{error}");
    assert!(held(&store, file(2)).await.is_empty());
    assert_eq!(store.metrics().unknown, 0, "the server said that it did nothing");

    // All memory for bodies is with one run: the next waits, and has none.
    bench.proxy.rule(|seen| is_run(seen).then_some(Fault::Hangs));
    bench.proxy.seen();
    let busy = tokio::spawn({
        let (store, bytes) = (store.clone(), bytes.clone());
        async move { put(&*store, file(3), 0, &bytes).await }
    });
    while bench.proxy.seen().iter().all(|seen| !is_run(seen)) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let run = Run::new(index(0), 1).unwrap();
    let begun = timeout(Duration::from_millis(200), store.begin_run(file(4), TENANT, run, 100)).await;
    assert!(begun.is_err(), "no memory is left");
    store.kill();
    assert!(busy.await.unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_landed_while_its_answer_was_lost_is_acknowledged() {
    let bench = bench!();
    let store = bench.open().await;
    bench.proxy.rule(|seen| is_run(seen).then_some(Fault::AnswerLost));
    let bytes = content(1, 2 * FULL);
    let receipt = put(&store, file(1), 0, &bytes).await.unwrap();
    assert_eq!((receipt.values, receipt.new_chunks), (values(0, &bytes), 2));
    bench.proxy.behave();
    let store = bench.reopen(store).await;
    assert_eq!(held(&store, file(1)).await, [0..2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_lands_late_is_the_retry_or_nothing() {
    let bench = bench!();
    let store = bench.open().await;
    let (bytes, other) = (content(1, FULL), content(2, FULL));
    bench.proxy.rule(|seen| is_run(seen).then_some(Fault::Late));
    for n in [1, 2, 3] {
        let error = put(&store, file(n), 0, &bytes).await.unwrap_err();
        assert_eq!(error.advice(), Advice::Retry);
        assert!(held(&store, file(n)).await.is_empty(), "nothing is acknowledged");
    }
    bench.proxy.behave();
    // The same bytes again; other bytes; and nothing, but the file is freed.
    assert_eq!(put(&store, file(1), 0, &bytes).await.unwrap().new_chunks, 1);
    assert_eq!(put(&store, file(2), 0, &other).await.unwrap().new_chunks, 1);
    store.free(file(3)).await.unwrap();
    let landed = bench.proxy.land(9).await;
    assert!(landed.iter().all(|status| status.is_success()), "{landed:?}");
    assert_eq!(bench.raw().keys("incoming/").await.len(), 4, "all of them are there now");
    let store = bench.reopen(store).await;
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), bytes);
    assert_eq!(store.read_chunk(file(2), index(0)).await.unwrap(), other, "what was acknowledged stands");
    assert!(held(&store, file(3)).await.is_empty(), "a life that is over stays over");
    let again = put(&store, file(2), 0, &bytes).await.unwrap_err();
    assert!(matches!(again, StoreError::ChunkConflict { .. }), "{again}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_lands_late_never_hides_a_newer_one() {
    let bench = bench!();
    let store = bench.open().await;
    store.put_record(&record(1, Some(5))).await.unwrap();
    store.put_facts(file(1), b"first").await.unwrap();
    bench.proxy.rule(|seen| is_record(seen).then_some(Fault::Late));
    let error = store.put_facts(file(1), b"late").await.unwrap_err();
    assert_eq!(error.advice(), Advice::Retry);
    assert_eq!(facts(&store, file(1)).await, b"first");
    bench.proxy.behave();
    store.put_facts(file(1), b"newer").await.unwrap();
    store.drop_file(file(1), TENANT, b"dropped").await.unwrap();
    bench.proxy.land(3).await;
    let store = bench.reopen(store).await;
    assert_eq!(facts(&store, file(1)).await, b"dropped");
    assert!(matches!(store.put_record(&record(1, Some(5))).await, Err(StoreError::Dropped(_))));

    // The same for what belongs to no file, and for the very first record.
    bench.proxy.rule(|seen| (seen.operation == "PutObject").then_some(Fault::Late));
    let part = share(3, 4);
    assert!(store.put_state(Share::WHOLE, b"late").await.is_err());
    assert!(store.put_state(part, b"of a share that is not noted").await.is_err());
    assert!(store.put_record(&record(2, Some(7))).await.is_err());
    bench.proxy.behave();
    store.put_state(Share::WHOLE, b"newer").await.unwrap();
    store.put_record(&record(2, Some(8))).await.unwrap();
    bench.proxy.land(9).await;
    let store = bench.reopen(store).await;
    assert_eq!(store.states().await.unwrap(), [(Share::WHOLE, b"newer".to_vec())].into());
    assert_eq!(store.summary(file(2)).await.unwrap().unwrap().record, Some(record(2, Some(8))));

    // The same for the state of a share, once it has one.
    store.put_state(part, b"first").await.unwrap();
    bench.proxy.rule(|seen| (seen.operation == "PutObject").then_some(Fault::Late));
    assert!(store.put_state(part, b"late").await.is_err());
    bench.proxy.behave();
    assert_eq!(store.states().await.unwrap()[&part], b"first");
    store.put_state(part, b"newest").await.unwrap();
    bench.proxy.land(9).await;
    let store = bench.reopen(store).await;
    let expected = [(Share::WHOLE, b"newer".to_vec()), (part, b"newest".to_vec())];
    assert_eq!(store.states().await.unwrap(), expected.into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_whose_answer_is_lost_is_put_again() {
    let bench = bench!();
    let store = bench.open().await;
    store.put_record(&record(1, Some(5))).await.unwrap();
    let counter = std::sync::atomic::AtomicUsize::new(0);
    bench.proxy.rule(move |seen| {
        let turn = counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        (is_record(seen) && turn == 0).then_some(Fault::AnswerLost)
    });
    store.put_facts(file(1), b"facts").await.unwrap();
    store.put_facts(file(1), b"more").await.unwrap();
    let store = bench.reopen(store).await;
    assert_eq!(facts(&store, file(1)).await, b"more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_that_fails_inside_a_success_publishes_nothing() {
    let bench = bench!();
    let store = bench.open().await;
    let bytes = content(1, 16 * FULL);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_runs(&store, file(1), &bytes, 8).await;
    bench.proxy.rule(|seen| (seen.operation == "CompleteMultipartUpload").then_some(Fault::ErrorInside));
    let error = store.publish(file(1), root(&bytes)).await.unwrap_err();
    assert_eq!(error.advice(), Advice::Retry, "{error}");
    assert_eq!(store.summary(file(1)).await.unwrap().unwrap().published, None);
    store.settled().await;
    assert!(bench.raw().keys("assembled/").await.is_empty(), "no partial file is visible");
    assert_eq!(bench.raw().uploads().await, 0, "what was begun was given up");
    // Nothing was lost by it.
    bench.proxy.behave();
    store.publish(file(1), root(&bytes)).await.unwrap();
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
    let [key] = &bench.raw().keys("assembled/").await[..] else { panic!("one object") };
    assert_eq!(Root::of_bytes(&bench.raw().get(key).await), root(&bytes), "an ordinary object");
    store.settled().await;
    assert!(bench.raw().keys("incoming/").await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_fails_inside_a_success_is_made_again_or_publishes_nothing() {
    let bench = bench!();
    let store = bench.open().await;
    let bytes = content(1, 16 * FULL);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_runs(&store, file(1), &bytes, 8).await;
    bench.proxy.rule(|seen| is_copy(seen).then_some(Fault::ErrorInside));
    bench.proxy.seen();
    let error = store.publish(file(1), root(&bytes)).await.unwrap_err();
    assert_eq!(error.advice(), Advice::Retry, "{error}");
    assert!(matches!(&error, StoreError::Io { operation, .. } if operation == "UploadPartCopy"), "{error}");
    store.settled().await;
    let seen = bench.proxy.seen();
    assert!(seen.iter().any(is_copy), "{seen:?}");
    assert!(seen.iter().all(|seen| seen.operation != "CompleteMultipartUpload"), "{seen:?}");
    assert_eq!(store.summary(file(1)).await.unwrap().unwrap().published, None);
    assert!(bench.raw().keys("assembled/").await.is_empty(), "no partial file is visible");
    assert_eq!(bench.raw().uploads().await, 0, "what was begun was given up");
    // One that fails once is made again, and nothing was lost by it.
    let turns = AtomicUsize::new(0);
    bench.proxy.rule(move |seen| {
        (is_copy(seen) && turns.fetch_add(1, Ordering::SeqCst) == 0).then_some(Fault::ErrorInside)
    });
    store.publish(file(1), root(&bytes)).await.unwrap();
    assert_eq!(
        bench.proxy.seen().iter().filter(|seen| is_copy(seen)).count(),
        3,
        "two parts, one of them twice"
    );
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
    let [key] = &bench.raw().keys("assembled/").await[..] else { panic!("one object") };
    assert_eq!(Root::of_bytes(&bench.raw().get(key).await), root(&bytes));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_whose_answer_is_lost_is_found_out() {
    let bench = bench!();
    let store = bench.open().await;
    let bytes = content(1, 16 * FULL);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_runs(&store, file(1), &bytes, 8).await;
    bench.proxy.rule(|seen| (seen.operation == "CompleteMultipartUpload").then_some(Fault::AnswerLost));
    store.publish(file(1), root(&bytes)).await.unwrap();
    bench.proxy.behave();
    let store = bench.reopen(store).await;
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
    assert_eq!(store.read_chunk(file(1), index(9)).await.unwrap(), bytes[9 * FULL..10 * FULL]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_owners_that_assemble_at_once_make_one_file_and_lose_nothing() {
    let bench = bench!();
    let one = bench.open().await;
    let bytes = content(1, 20 * FULL + 9);
    one.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_runs(&one, file(1), &bytes, 8).await;
    let other = bench.open().await;
    let both = tokio::join!(one.publish(file(1), root(&bytes)), other.publish(file(1), root(&bytes)));
    // One may find that the other has tidied up behind it: then it says so, and the file is there.
    assert!(both.0.is_ok() || both.1.is_ok(), "{both:?}");
    one.close().await.unwrap();
    let store = bench.reopen(other).await;
    assert_eq!(store.summary(file(1)).await.unwrap().unwrap().published, Some(root(&bytes)));
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
    for chunk in [0, 7, 16, 20] {
        let end = ((chunk + 1) * FULL).min(bytes.len());
        assert_eq!(store.read_chunk(file(1), index(chunk as u64)).await.unwrap(), bytes[chunk * FULL..end]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_list_frees_nothing_and_completes_nothing() {
    let bench = bench!();
    let store = bench.open().await;
    let bytes = content(1, 4 * FULL);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_runs(&store, file(1), &bytes, 1).await;
    store.close().await.unwrap();
    drop(store);
    // Lists are from before the third chunk came, and from before the record did.
    let stale = |seen: &Seen| {
        let list = seen.operation == "ListObjectsV2";
        let hidden = if seen.key.contains("files/") { "files/" } else { "/000000002-0-" };
        list.then(|| Fault::Without(hidden.into()))
    };
    bench.proxy.rule(stale);
    let store = S3Store::open(S3Options { grace: Duration::ZERO, ..bench.options() }).await.unwrap();
    assert_eq!(held(&store, file(1)).await, [0..2, 3..4]);
    let error = store.publish(file(1), root(&bytes)).await.unwrap_err();
    assert!(matches!(error, StoreError::WrongRoot { got: None, .. }), "{error}");
    let swept = store.sweep().await.unwrap();
    assert_eq!((swept.objects, swept.uploads, swept.seen), (0, 0, 3), "the record is asked for by its key");
    // Once a list shows it, it is known.
    bench.proxy.behave();
    assert_eq!(store.sweep().await.unwrap().found, 1);
    assert_eq!(held(&store, file(1)).await, [0..4]);
    store.publish(file(1), root(&bytes)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_owners_that_record_different_bytes_the_later_counts_and_the_other_stops() {
    let bench = bench!();
    let often = S3Options { look_every: Duration::from_secs(1), ..bench.options() };
    let one = S3Store::open(often.clone()).await.unwrap();
    let (bytes, other) = (content(1, FULL), content(2, FULL));
    one.put_record(&record(1, Some(FULL as u64))).await.unwrap();
    let two = S3Store::open(often).await.unwrap();
    assert!(held(&two, file(1)).await.is_empty());
    put(&one, file(1), 0, &bytes).await.unwrap();
    put(&two, file(1), 0, &other).await.unwrap();
    // Before long the first notices that it is not the last, and takes nothing any more.
    let mut chunk = 0;
    let ended = timeout(Duration::from_secs(5), async {
        loop {
            chunk += 1;
            if let Err(error) = put(&one, file(2), chunk, &bytes).await {
                return error;
            }
        }
    });
    let ended = ended.await.unwrap();
    assert!(matches!(ended, StoreError::Closing), "{ended}");
    // The second goes on.
    two.put_facts(file(1), b"facts").await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    put(&two, file(3), 0, &bytes).await.unwrap();
    let store = bench.reopen(two).await;
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), other);
    assert_eq!(store.metrics().integrity_failures, 1, "it is noticed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_past_the_limits_of_an_object_are_cut_into_segments() {
    let bench = bench!();
    let store = bench.open().await;
    // What an object may have: here two parts.
    bench.proxy.rule(|seen| seen.part.is_some_and(|part| part > 2).then_some(Fault::Invalid));
    let bytes = content(1, 40 * FULL + 77);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_runs(&store, file(1), &bytes, 8).await;
    store.publish(file(1), root(&bytes)).await.unwrap();
    assert!(bench.proxy.seen().iter().any(|seen| seen.operation == "UploadPartCopy"));
    let (raw, mut whole) = (bench.raw(), Vec::new());
    let keys = raw.keys("assembled/").await;
    assert_eq!(keys.len(), 3);
    for key in &keys {
        whole.extend_from_slice(&raw.get(key).await);
    }
    assert_eq!(Root::of_bytes(&whole), root(&bytes), "in order of their keys they are the file");
    let store = bench.reopen(store).await;
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
    for chunk in [0, 15, 16, 31, 32, 40] {
        let end = ((chunk + 1) * FULL).min(bytes.len());
        assert_eq!(store.read_chunk(file(1), index(chunk as u64)).await.unwrap(), bytes[chunk * FULL..end]);
    }
    assert_eq!(store.values(file(1), 14..18).await.unwrap().len(), 4);
    // One that is longer than it says an object may be is refused by the server, and nothing is published.
    let store = {
        store.close().await.unwrap();
        S3Store::open(S3Options { segment_chunks: 32, ..bench.options() }).await.unwrap()
    };
    store.put_record(&record(2, Some(bytes.len() as u64))).await.unwrap();
    put_runs(&store, file(2), &bytes, 8).await;
    assert!(store.publish(file(2), root(&bytes)).await.is_err());
    assert_eq!(store.summary(file(2)).await.unwrap().unwrap().published, None);
    // A file stays as it was cut.
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_runs_are_regrouped_into_parts_that_a_server_takes() {
    let bench = bench!();
    let store = bench.open().await;
    let bytes = content(1, 19 * FULL + 5);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_runs(&store, file(1), &bytes.slice(..8 * FULL), 2).await;
    for chunk in (8..20).rev() {
        let end = ((chunk + 1) * FULL).min(bytes.len());
        put(&store, file(1), chunk as u64, &bytes.slice(chunk * FULL..end)).await.unwrap();
    }
    bench.proxy.seen();
    store.publish(file(1), root(&bytes)).await.unwrap();
    let seen = bench.proxy.seen();
    assert!(seen.iter().all(|seen| seen.operation != "UploadPartCopy"), "S3 copies no parts below 5 MiB");
    assert_eq!(seen.iter().filter(|seen| seen.operation == "UploadPart").count(), 2);
    let (raw, mut whole) = (bench.raw(), Vec::new());
    for key in raw.keys("assembled/").await {
        whole.extend_from_slice(&raw.get(&key).await);
    }
    assert_eq!(whole, bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segment_that_is_not_as_long_as_it_should_be_is_not_published() {
    let bench = bench!();
    let store = bench.open().await;
    let bytes = content(1, 3 * FULL);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_runs(&store, file(1), &bytes, 1).await;
    store.publish(file(1), root(&bytes)).await.unwrap();
    let raw = bench.raw();
    let [key] = &raw.keys("assembled/").await[..] else { panic!("one object") };
    raw.put(key, bytes.slice(..2 * FULL)).await;
    let error = store.recheck(file(1)).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    assert!(matches!(store.read_chunk(file(1), index(2)).await, Err(StoreError::Corrupt { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_never_served_is_remembered_and_mended_by_who_sends_again() {
    let bench = bench!();
    let store = bench.open().await;
    let bytes = content(1, 20 * FULL);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_runs(&store, file(1), &bytes, 8).await;
    store.publish(file(1), root(&bytes)).await.unwrap();
    let raw = bench.raw();
    let [first, _] = &raw.keys("assembled/").await[..] else { panic!("two objects") };
    let mut damaged = raw.get(first).await.to_vec();
    damaged[3 * FULL + 17] ^= 1;
    raw.put(first, Bytes::from(damaged)).await;
    assert!(matches!(store.read_chunk(file(1), index(3)).await, Err(StoreError::Corrupt { .. })));
    assert!(matches!(store.verify(file(1), index(3)).await, Err(StoreError::Corrupt { .. })));
    assert_eq!(store.verify(file(1), index(4)).await.unwrap(), FULL as u64);
    let store = bench.reopen(store).await;
    assert_eq!(
        (store.damage(file(1)).await.unwrap(), store.damaged_files().await.unwrap()),
        (vec![3..4], vec![file(1)])
    );
    assert!(matches!(store.recheck(file(1)).await, Err(StoreError::Corrupt { .. })));
    let other = put(&store, file(1), 3, &content(9, FULL)).await.unwrap_err();
    assert!(matches!(other, StoreError::ChunkConflict { .. }), "{other}");
    assert_eq!(put(&store, file(1), 3, &bytes.slice(3 * FULL..4 * FULL)).await.unwrap().new_chunks, 1);
    assert!(store.damaged_files().await.unwrap().is_empty());
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
    assert_eq!(raw.get(first).await, bytes[..16 * FULL], "the object was made again");

    // Of a file that is not published, in a run with others.
    put(&store, file(2), 0, &bytes.slice(..4 * FULL)).await.unwrap();
    let [run] = &raw
        .keys("incoming/")
        .await
        .into_iter()
        .filter(|key| key.contains(&file(2).to_string()))
        .collect::<Vec<_>>()[..]
    else {
        panic!("one run")
    };
    let mut damaged = bytes[..4 * FULL].to_vec();
    damaged[2 * FULL] ^= 1;
    raw.put(run, Bytes::from(damaged)).await;
    assert!(matches!(store.verify(file(2), index(2)).await, Err(StoreError::Corrupt { .. })));
    put(&store, file(2), 2, &bytes.slice(2 * FULL..3 * FULL)).await.unwrap();
    let store = bench.reopen(store).await;
    assert!(store.damage(file(2)).await.unwrap().is_empty());
    for chunk in 0..4 {
        let expected = bytes.slice(chunk * FULL..(chunk + 1) * FULL);
        assert_eq!(store.read_chunk(file(2), index(chunk as u64)).await.unwrap(), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_refers_to_is_swept_and_nothing_else() {
    let bench = bench!();
    let store = bench.open().await;
    let bytes = content(1, 8 * FULL);
    put(&store, file(1), 0, &bytes).await.unwrap();
    store.put_whole(&record(2, Some(9)), b"facts", Whole::of(content(2, 9))).await.unwrap();
    store.put_record(&record(3, Some(9))).await.unwrap();
    put(&store, file(3), 0, &content(3, 9)).await.unwrap();
    let raw = bench.raw();
    let run = raw.keys("incoming/").await.into_iter().find(|key| key.contains(&file(3).to_string())).unwrap();
    store.drop_file(file(3), TENANT, b"gone").await.unwrap();
    store.settled().await;
    let before = raw.keys("").await;
    // A run of a file that ended, of one that nobody knows, of another life; an object; a name; an upload.
    raw.put(&run, content(3, 9)).await;
    let of = |n: u128| format!("{:03x}/{}", file(n).slot().number(), file(n));
    let name = run.rsplit('/').next().unwrap();
    raw.put(&format!("dc-a/incoming/{}/00000001/{name}", of(7)), content(3, 9)).await;
    raw.put(&format!("dc-a/incoming/{}/00000001/{name}", of(1)), content(3, 9)).await;
    raw.put(&format!("dc-a/assembled/{}/00000001/{}-00000", of(2), root(b"x")), content(3, 9)).await;
    raw.put("dc-a/names/0000000000000007/00000000-0000-0000-0000-000000000009", Bytes::new()).await;
    raw.begin_upload(&format!("dc-a/assembled/{}/00000001/{}-00001", of(2), root(b"x"))).await;
    let swept = store.sweep().await.unwrap();
    assert_eq!((swept.objects, swept.uploads), (0, 0), "they are too young");
    store.close().await.unwrap();

    let store = S3Store::open(S3Options { grace: Duration::ZERO, ..bench.options() }).await.unwrap();
    let swept = store.sweep().await.unwrap();
    assert_eq!((swept.objects, swept.uploads, swept.found), (5, 1, 0));
    assert_eq!(store.metrics().swept, 6);
    // Who keeps the bucket is another now.
    let kept = |keys: Vec<String>| -> BTreeSet<String> {
        keys.into_iter().filter(|key| !key.contains("/keepers/")).collect()
    };
    assert_eq!(kept(raw.keys("").await), kept(before));
    assert_eq!(raw.uploads().await, 0);
    assert_eq!(held(&store, file(1)).await, [0..8]);
    assert_eq!(store.read_chunk(file(2), index(0)).await.unwrap(), content(2, 9));
    let swept = store.sweep().await.unwrap();
    assert_eq!((swept.objects, swept.uploads), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_acknowledges_nothing_and_is_waited_for_no_longer_than_allowed() {
    let bench = bench!();
    let options = S3Options { patience: Duration::from_millis(300), attempts: 2, ..bench.options() };
    let store = S3Store::open(options).await.unwrap();
    let bytes = content(1, FULL);
    bench.proxy.rule(|_| Some(Fault::Hangs));
    let error = timeout(Duration::from_secs(20), put(&store, file(1), 0, &bytes)).await.unwrap().unwrap_err();
    assert_eq!(error.advice(), Advice::Retry, "{error}");
    let error = timeout(Duration::from_secs(20), store.list(None, 9)).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("no answer within"), "{error}");
    bench.proxy.behave();
    put(&store, file(1), 0, &bytes).await.unwrap();
    // Killed, it waits for nothing.
    bench.proxy.rule(|_| Some(Fault::Hangs));
    let began = Instant::now();
    let reading = store.read_chunk(file(1), index(0));
    let (read, ()) = tokio::join!(reading, async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        store.kill();
    });
    assert!(read.is_err() && began.elapsed() < Duration::from_secs(5), "{read:?}");
    assert!(matches!(store.put_state(Share::WHOLE, b"").await, Err(StoreError::Closing)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_right_that_is_missing_is_named() {
    let bench = bench!();
    let missing = async |options: S3Options| match S3Store::check(&options).await {
        Err(StoreError::NoRight { right, place, reason }) => {
            assert!(place.contains("s3://sluice/dc-a/") && !reason.is_empty());
            right
        }
        other => panic!("{other:?}"),
    };
    for (operation, right) in [
        ("PutObject", "s3:PutObject"),
        ("GetObject", "s3:GetObject"),
        ("ListObjectsV2", "s3:ListBucket"),
        ("CreateMultipartUpload", "s3:PutObject"),
        ("UploadPartCopy", "s3:PutObject"),
        ("ListMultipartUploads", "s3:ListBucketMultipartUploads"),
        ("AbortMultipartUpload", "s3:AbortMultipartUpload"),
        ("DeleteObjects", "s3:DeleteObject"),
    ] {
        bench.proxy.rule(move |seen| (seen.operation == operation).then_some(Fault::Forbidden));
        assert_eq!(missing(bench.options()).await, right, "without {operation}");
    }
    // Keys of the server that really lack them, and one that it does not know.
    bench.proxy.behave();
    let as_key = |key: &Key| options(bench.proxy.endpoint(), &bench.garage, key);
    assert_eq!(missing(as_key(&bench.garage.limited_key(&["read"]))).await, "s3:PutObject");
    assert_eq!(missing(as_key(&bench.garage.limited_key(&["write"]))).await, "s3:GetObject");
    let wrong = Key { secret: "c3".repeat(32), ..bench.garage.key().clone() };
    assert_eq!(missing(as_key(&wrong)).await, "s3:PutObject");

    let elsewhere = S3Options { bucket: "nowhere".into(), ..bench.options() };
    let error = S3Store::check(&elsewhere).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Unreadable { reason, .. } if reason.contains("no such bucket")),
        "{error}"
    );
    let nobody = S3Options { endpoint: "http://127.0.0.1:1".into(), ..bench.options() };
    let error = S3Store::check(&nobody).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unreachable { .. }), "{error}");
    assert!(!error.to_string().contains(&bench.garage.key().secret));
    S3Store::check(&bench.options()).await.unwrap();
    let left: Vec<String> = bench.raw().keys("check/").await;
    assert!(left.len() <= 1, "only where nothing may be deleted: {left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_mebibytes_cost_two_requests_and_a_file_some_more() {
    let bench = bench!();
    let store = S3Store::open(S3Options { segment_chunks: 65_536, ..bench.options() }).await.unwrap();
    let mut costs = Vec::new();
    for (n, parts) in [(1, 4), (2, 12)] {
        let bytes = content(n as u64, parts * 8 * FULL);
        let before = store.metrics();
        store.put_record(&record(n, Some(bytes.len() as u64))).await.unwrap();
        put_runs(&store, file(n), &bytes, 8).await;
        store.put_facts(file(n), b"facts").await.unwrap();
        store.publish(file(n), root(&bytes)).await.unwrap();
        store.settled().await;
        let after = store.metrics();
        costs.push(after.all_requests() - before.all_requests());
        let of = |kind| after.requests(kind) - before.requests(kind);
        assert_eq!((of(S3Request::CopyPart), of(S3Request::UploadPart)), (parts as u64, 0));
    }
    println!("a file of 32 MiB cost {} requests, one of 96 MiB {}", costs[0], costs[1]);
    assert!(costs[1] - costs[0] <= 2 * 8, "{costs:?}: two for 8 MiB");
    assert!(costs[0] - 2 * 4 <= 16, "{costs:?}: beside these a constant");
}
