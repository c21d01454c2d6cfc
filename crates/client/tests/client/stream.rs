//! Streams: no length before the end, read once, in a bounded window.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use sluice_client::{Client, ClientError, Event, ExitClass, Source, UploadOptions, unobserved};
use sluice_engine::hash::Root;
use sluice_engine::limits::CHUNK_LEN;
use sluice_proto::http::State;
use sluice_proto::problem::{Problem, Refusal};
use tokio::io::{AsyncRead, ReadBuf};
use uuid::Uuid;

use crate::fake::{FakeCluster, Fault, noise};

const MIB: usize = CHUNK_LEN as usize;

/// A stream that gives out little at a time, says how far it was read, and may fail in the end.
struct Trickle {
    bytes: Bytes,
    piece: usize,
    given: Arc<AtomicUsize>,
    fails: bool,
}

impl Trickle {
    fn of(bytes: impl Into<Bytes>) -> Self {
        Self { bytes: bytes.into(), piece: 64_007, given: Arc::default(), fails: false }
    }
}

impl AsyncRead for Trickle {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.bytes.is_empty() && self.fails {
            return Poll::Ready(Err(io::Error::other("the tape is torn")));
        }
        let len = self.piece.min(self.bytes.len()).min(into.remaining());
        into.put_slice(&self.bytes.split_to(len));
        self.given.fetch_add(len, Ordering::SeqCst);
        Poll::Ready(Ok(()))
    }
}

fn options(id: Option<Uuid>) -> UploadOptions {
    UploadOptions { name: "stream".into(), id, ..UploadOptions::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_every_length_arrive_with_their_root() {
    let cluster = FakeCluster::start(2).await;
    let client = cluster.client();
    for len in [0, 1, MIB, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 9 * MIB, 16 * MIB, 150 * MIB + 77] {
        let bytes = noise(len as u64, len);
        let put =
            client.upload_stream(Trickle::of(bytes.clone()), &options(None), unobserved()).await.unwrap();
        assert_eq!((put.root, put.size), (Root::of_bytes(&bytes), len as u64), "{len} bytes");
        assert_eq!((put.state, put.chunks_sent), (State::Complete, len.div_ceil(MIB) as u64));
        assert!(cluster.bytes(put.id) == bytes, "{len} bytes");
        if len > 100 * MIB {
            assert!(cluster.held(0, put.id) > 0 && cluster.held(1, put.id) > 0, "both get some");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_is_read_than_the_window_holds() {
    let cluster = FakeCluster::start(2).await;
    for dc in &cluster.dcs {
        dc.fail(|request| request.is_chunk().then_some(Fault::Stall));
    }
    let mut config = cluster.config();
    config.jobs = 3;
    let client = Client::new(config).unwrap();
    let stream = Trickle::of(noise(1, 100 * MIB));
    let given = stream.given.clone();
    let upload =
        tokio::spawn(async move { client.upload_stream(stream, &options(None), unobserved()).await });
    let full = tokio::time::timeout(Duration::from_secs(20), async {
        while given.load(Ordering::SeqCst) < 3 * 8 * MIB {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    full.await.expect("the window fills");
    // All are stalled, a while longer than a read takes.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(given.load(Ordering::SeqCst), 3 * 8 * MIB);
    upload.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_when_a_datacenter_dies_or_pushes_back() {
    let cluster = FakeCluster::start(2).await;
    cluster.dcs[0].fail(|request| {
        let refusal = Refusal::new(Problem::Overloaded, "too much").retry_after(Duration::ZERO);
        (request.is_chunk() && request.nth % 4 == 1).then_some(Fault::RefuseEarly(refusal))
    });
    let bytes = noise(2, 100 * MIB + 5);
    let client = cluster.client();
    let stream = Trickle::of(bytes.clone());
    let options = options(None);
    let (put, ()) = tokio::join!(client.upload_stream(stream, &options, unobserved()), async {
        cluster.until_taken(30).await;
        cluster.dcs[1].kill();
    });
    let put = put.unwrap();
    assert_eq!(put.root, Root::of_bytes(&bytes));
    assert!(cluster.bytes(put.id) == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_fails_is_carried_on_with_when_it_is_made_again() {
    let cluster = FakeCluster::start(2).await;
    let bytes = noise(3, 60 * MIB + 9);
    let client = cluster.client();
    let id = Uuid::now_v7();
    let half = Trickle { fails: true, ..Trickle::of(bytes[..30 * MIB].to_vec()) };
    let new = UploadOptions { is_new: true, ..options(Some(id)) };
    let error = client.upload_stream(half, &new, unobserved()).await.unwrap_err();
    assert!(matches!(error, ClientError::Input { at, .. } if at == 24 * CHUNK_LEN), "{error}");
    assert_eq!((error.code(), error.exit_class()), ("input", ExitClass::Unexpected));
    assert!(error.hint().unwrap().contains(&format!("--id {id}")), "{:?}", error.hint());
    let status = client.status(id).await.unwrap();
    assert_eq!((status.size, status.state), (None, State::Receiving));
    // What was on its way when it failed may have arrived, may still arrive, or never will.
    let there: u64 = status.holders.iter().map(|holder| holder.chunks).sum();

    let put =
        client.upload_stream(Trickle::of(bytes.clone()), &options(Some(id)), unobserved()).await.unwrap();
    assert_eq!((put.id, put.root), (id, Root::of_bytes(&bytes)));
    assert_eq!(put.chunks_skipped + put.chunks_sent, 61);
    assert!((there..=24).contains(&put.chunks_skipped), "{there} were there: {put:?}");
    assert!(cluster.bytes(id) == bytes);
    // Once more, with nothing left to do; and as a file, which it is by now.
    let again =
        client.upload_stream(Trickle::of(bytes.clone()), &options(Some(id)), unobserved()).await.unwrap();
    assert_eq!((again.chunks_sent, again.chunks_skipped), (0, 61));
    let shorter =
        client.upload_stream(Trickle::of(noise(3, 50 * MIB)), &options(Some(id)), unobserved()).await;
    assert_eq!(shorter.unwrap_err().code(), "size-conflict");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_to_the_size_that_is_lost_is_asked_for_again_anywhere() {
    let cluster = FakeCluster::start(2).await;
    cluster.dcs[0].fail(|request| (request.method == "PATCH").then_some(Fault::DropAnswer));
    let bytes = noise(4, 20 * MIB + 1);
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = seen.clone();
    let observer = Arc::new(move |event: &Event<'_>| {
        if let Event::Acknowledged { count, .. } = event {
            counted.fetch_add(*count as usize, Ordering::SeqCst);
        }
    });
    let put = cluster.client().upload_stream(Trickle::of(bytes.clone()), &options(None), observer).await;
    let put = put.unwrap();
    assert_eq!((put.size, put.root), (bytes.len() as u64, Root::of_bytes(&bytes)));
    assert_eq!(seen.load(Ordering::SeqCst), 21);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_expectation_and_a_refusal_end_it() {
    let cluster = FakeCluster::start(1).await;
    let client = cluster.client();
    let expected_root = Some(Root::of_bytes(b"something else"));
    let options = UploadOptions { expected_root, ..options(None) };
    let stream = Trickle::of(noise(5, 9 * MIB));
    let error = client.upload_stream(stream, &options, unobserved()).await.unwrap_err();
    assert_eq!((error.code(), error.exit_class()), ("expected-root", ExitClass::Integrity));

    let id = Uuid::now_v7();
    client.upload(&Source::memory(noise(6, MIB)), &self::options(Some(id)), unobserved()).await.unwrap();
    cluster.dcs[0].fail(|request| {
        let refusal = Refusal::new(Problem::ReadOnly, "no more").retry_after(Duration::from_millis(1));
        request.is_chunk().then_some(Fault::Refuse(refusal))
    });
    let mut config = cluster.config();
    config.retry.retry_for = Duration::from_millis(500);
    let stream = Trickle::of(noise(7, 100 * MIB));
    let error = Client::new(config)
        .unwrap()
        .upload_stream(stream, &self::options(None), unobserved())
        .await
        .unwrap_err();
    assert_eq!((error.code(), error.exit_class()), ("read-only", ExitClass::TryLater), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_lacks_the_metadata_is_told_before_the_size_is_settled() {
    for room in [8, 1_000] {
        let cluster = Arc::new(FakeCluster::start(2).await);
        cluster.dcs[1].bereave(room);
        let bytes = noise(8, 40 * MIB + 5);
        let killer = cluster.clone();
        let observer = Arc::new(move |event: &Event<'_>| {
            if let Event::Acknowledged { url: 0, .. } = event {
                // What it holds is on its disk, and the stand-in's other datacenters see it.
                killer.dcs[0].kill();
            }
        });
        let put = cluster.client().upload_stream(Trickle::of(bytes.clone()), &options(None), observer).await;
        let put = put.unwrap();
        assert_eq!((put.root, put.size), (Root::of_bytes(&bytes), bytes.len() as u64));
        assert!(cluster.dcs[1].is_told(), "with room for {room}");
        assert!(cluster.bytes(put.id) == bytes);
    }
}
