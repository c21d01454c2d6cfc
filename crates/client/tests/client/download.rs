//! Downloads: verification, failover, ranges, and parts that carry on.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use sluice_client::{
    ByteRange, Client, ClientError, DownloadOptions, Event, ExitClass, SharedObserver, Source, Target,
    UploadOptions, unobserved,
};
use sluice_engine::limits::CHUNK_LEN;
use uuid::Uuid;

use crate::fake::{FakeCluster, Fault, noise};

const MIB: usize = CHUNK_LEN as usize;

#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<u8>>>);

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

async fn uploaded(cluster: &FakeCluster, bytes: &[u8]) -> Uuid {
    let source = Source::memory(bytes.to_vec());
    let options = UploadOptions { name: "noise".into(), ..UploadOptions::default() };
    cluster.client().upload(&source, &options, unobserved()).await.unwrap().id
}

async fn read(client: &Client, id: Uuid, range: Option<ByteRange>) -> Result<Vec<u8>, ClientError> {
    let collected = Collected::default();
    let options = DownloadOptions { range, ..DownloadOptions::default() };
    client.download(id, Target::Writer(Box::new(collected.clone())), &options, unobserved()).await?;
    let bytes = collected.0.lock().unwrap().clone();
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_size_and_range_comes_back_in_order() {
    let cluster = FakeCluster::start(2).await;
    let client = cluster.client();
    for len in [0, 1, MIB, MIB + 1, 13 * MIB + 5] {
        let bytes = noise(len as u64, len);
        let id = uploaded(&cluster, &bytes).await;
        assert!(read(&client, id, None).await.unwrap() == bytes, "{len} bytes");
        for (first, last) in
            [(0, 0), (5, 2 * MIB + 9), (MIB - 1, MIB), (3 * MIB, 4 * MIB - 1), (12 * MIB, 1 << 40)]
        {
            let range = ByteRange { first: first as u64, last: Some(last as u64) };
            match bytes.get(first..bytes.len().min(last + 1)).filter(|part| !part.is_empty()) {
                Some(part) => assert!(read(&client, id, Some(range)).await.unwrap() == part),
                None => {
                    let error = read(&client, id, Some(range)).await.unwrap_err();
                    assert_eq!((error.code(), error.exit_class()), ("range", ExitClass::Usage));
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_do_not_hash_are_never_given_out() {
    let cluster = FakeCluster::start(2).await;
    for len in [MIB / 2, 9 * MIB] {
        let bytes = noise(1, len);
        let id = uploaded(&cluster, &bytes).await;
        let corrupt =
            |request: &crate::fake::Seen| request.path.ends_with("/content").then_some(Fault::Corrupt);
        cluster.dcs[0].fail(corrupt);
        cluster.dcs[1].fail(|_| None);
        let client = cluster.client();
        assert!(read(&client, id, None).await.unwrap() == bytes, "the other one has it whole");
        cluster.dcs[1].fail(corrupt);
        let error = read(&client, id, None).await.unwrap_err();
        assert!(matches!(error, ClientError::Content { .. }), "{error}");
        assert_eq!(error.exit_class(), ExitClass::Integrity);
        for dc in &cluster.dcs {
            dc.fail(|_| None);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_that_do_not_lead_to_the_root_are_refused() {
    let cluster = FakeCluster::start(1).await;
    let id = uploaded(&cluster, &noise(2, 300 * 1024 + 5 * MIB)).await;
    let options = DownloadOptions {
        expected_root: Some(sluice_engine::hash::Root::empty()),
        ..DownloadOptions::default()
    };
    let target = Target::Writer(Box::new(std::io::sink()));
    let error = cluster.client().download(id, target, &options, unobserved()).await.unwrap_err();
    assert!(matches!(error, ClientError::RootMismatch { .. }), "{error}");
    // A flipped bit in the middle of the answer is in a hexadecimal digit: another value, or no hash at all.
    cluster.dcs[0].fail(|request| request.path.ends_with("/tree").then_some(Fault::Corrupt));
    let error = read(&cluster.client(), id, None).await.unwrap_err();
    assert!(
        matches!(error, ClientError::Proof { .. } | ClientError::Hash(_) | ClientError::Malformed { .. }),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_moves_on_when_a_datacenter_dies() {
    let cluster = Arc::new(FakeCluster::start(2).await);
    let bytes = noise(3, 40 * MIB);
    let id = uploaded(&cluster, &bytes).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let killer = cluster.clone();
    let observer: SharedObserver = Arc::new(move |event: &Event<'_>| {
        if matches!(event, Event::Fetched { .. }) {
            killer.dcs[0].kill();
        }
    });
    let target = Target::File { path: path.clone(), replace: false };
    let got = cluster.client().download(id, target, &DownloadOptions::default(), observer).await.unwrap();
    assert_eq!((got.chunks_fetched, got.chunks_kept, got.bytes), (40, 0, 40 << 20));
    assert!(std::fs::read(&path).unwrap() == bytes);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no part is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_is_verified_and_only_what_it_lacks_is_fetched() {
    let cluster = FakeCluster::start(1).await;
    let bytes = noise(4, 40 * MIB + 3);
    let id = uploaded(&cluster, &bytes).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let file = || Target::File { path: path.clone(), replace: false };
    // The first attempt breaks off half way, for good.
    let mut config = cluster.config();
    config.retry.retry_for = std::time::Duration::from_millis(200);
    config.jobs = 2;
    let served = Arc::new(AtomicU64::new(0));
    let counter = served.clone();
    cluster.dcs[0].fail(move |request| {
        let content = request.path.ends_with("/content");
        (content && counter.fetch_add(1, Ordering::Relaxed) >= 3).then_some(Fault::Break)
    });
    let client = Client::new(config).unwrap();
    let error = client.download(id, file(), &DownloadOptions::default(), unobserved()).await.unwrap_err();
    assert_eq!(error.exit_class(), ExitClass::TryLater, "{error}");
    assert!(!path.exists());
    // One byte of what is there rots.
    let part = dir.path().join("out.part");
    let mut there = std::fs::read(&part).unwrap();
    assert_eq!(there.len(), bytes.len());
    there[5 * MIB] ^= 1;
    std::fs::write(&part, there).unwrap();

    cluster.dcs[0].fail(|_| None);
    let got = client.download(id, file(), &DownloadOptions::default(), unobserved()).await.unwrap();
    assert_eq!(got.chunks_fetched + got.chunks_kept, 41);
    assert!((8..=16).contains(&got.chunks_kept), "kept {}", got.chunks_kept);
    assert!(std::fs::read(&path).unwrap() == bytes);

    let error = client.download(id, file(), &DownloadOptions::default(), unobserved()).await.unwrap_err();
    assert!(matches!(error, ClientError::Exists { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_not_complete_is_not_read() {
    let cluster = FakeCluster::start(1).await;
    cluster.dcs[0].fail(|request| request.is_chunk().then_some(Fault::Break));
    let mut config = cluster.config();
    config.retry.retry_for = std::time::Duration::from_millis(100);
    let client = Client::new(config).unwrap();
    let id = Uuid::now_v7();
    // With a home it goes in chunks, though it is small.
    let options = UploadOptions { id: Some(id), home: Some("dc-a".into()), ..UploadOptions::default() };
    client.upload(&Source::memory(noise(5, MIB)), &options, unobserved()).await.unwrap_err();
    let error = read(&client, id, None).await.unwrap_err();
    assert!(matches!(error, ClientError::Incomplete { missing_chunks: 1, chunks: 1, .. }), "{error}");
    let error = read(&client, Uuid::nil(), None).await.unwrap_err();
    assert_eq!(error.exit_class(), ExitClass::NotFound);
}
