//! A datacenter with very many files: how soon after its start it serves. Not run by default: it makes a volume of a
//! million files.
//!
//! ```sh
//! SLUICE_UNFINISHED=100000 SLUICE_SMALL=1000000 \
//!     cargo nextest run --release -p sluice-tests --run-ignored only --no-capture very_many_files
//! ```

use std::time::Instant;

use futures_util::StreamExt;
use sluice_engine::aggregator::FileMemory;
use sluice_engine::hash::Root;
use sluice_engine::ids::ClientFileId;
use sluice_engine::metadata::{MetadataFields, MetadataRecord};
use sluice_proto::http::{FilePage, FileStatus, State};
use sluice_store::{Whole, WholeOutcome};
use uuid::Uuid;

use crate::bed::{A, Bed, MIB, TENANT, eventually, new_file, noise};

fn count(name: &str, default: u128) -> u128 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Small files and unfinished ones have ids of their own.
fn id(kind: u128, n: u128) -> Uuid {
    Uuid::from_u128(kind << 96 | n)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it makes a million files"]
async fn a_datacenter_of_very_many_files_serves_soon_after_its_start() {
    let (unfinished, small) = (count("SLUICE_UNFINISHED", 100_000), count("SLUICE_SMALL", 1_000_000));
    let mut bed = Bed::start(1).await;
    let began = Instant::now();
    futures_util::stream::iter(0..unfinished)
        .for_each_concurrent(64, async |n| {
            let created = bed.post(A, &new_file(id(1, n), MIB + 10)).await;
            assert!(created.status.is_success(), "{:?}", created.body);
            bed.put_ok(A, id(1, n), 1, noise(1, 10)).await;
        })
        .await;
    println!("{unfinished} unfinished files made in {:.1} s", began.elapsed().as_secs_f64());
    let began = Instant::now();
    let store = bed.cluster.running(A).unwrap().store().clone();
    let content = |n: u128| noise(n as u64, 100);
    futures_util::stream::iter(0..small)
        .for_each_concurrent(512, async |n| {
            let bytes = content(n);
            let fields =
                MetadataFields { size: Some(100), name: format!("small file {n}"), ..Default::default() };
            let record = MetadataRecord::new(TENANT, ClientFileId::new(id(2, n)), fields).unwrap();
            let shape = record.geometry().unwrap();
            let memory = FileMemory::of_whole(A, Root::of_bytes(&bytes), shape, None);
            let outcome = store.put_whole(&record, &memory.to_bytes(), Whole::of(bytes)).await.unwrap();
            assert_eq!(outcome, WholeOutcome::Stored);
        })
        .await;
    let seconds = began.elapsed().as_secs_f64();
    println!("{small} small files made in {seconds:.1} s: {:.0} a second", small as f64 / seconds);
    drop(store);

    bed.cluster.kill(A).await;
    for life in ["killed", "stopped"] {
        let began = Instant::now();
        bed.cluster.start(A).await.unwrap();
        let started = began.elapsed();
        let status: FileStatus = bed.get(A, &format!("/files/{}", id(2, small / 2)), &[]).await.json();
        assert_eq!(status.state, State::Assembled);
        let read = bed.get(A, &format!("/files/{}/content", id(2, small / 3)), &[]).await;
        assert!(read.body == content(small / 3));
        let status: FileStatus = bed.get(A, &format!("/files/{}", id(1, unfinished / 2)), &[]).await.json();
        assert_eq!((status.state, status.missing_chunks), (State::Receiving, 1));
        let posted = bed.post_whole(A, &serde_json::json!({}), noise(3, 1000)).await.unwrap();
        assert_eq!(posted.status, 201);
        let serving = began.elapsed();
        let page: FilePage = eventually("a list", async || {
            let answer = bed.get(A, "/files?limit=1000", &[]).await;
            (answer.status == 200).then(|| answer.json())
        })
        .await;
        assert_eq!(page.files.len(), 1000);
        let listed = began.elapsed();
        let again = Instant::now();
        let after = id(2, small / 2);
        let page: FilePage = bed.get(A, &format!("/files?limit=1000&after={after}"), &[]).await.json();
        assert_eq!((page.files.len(), page.files[0].id), (1000, id(2, small / 2 + 1)));
        println!(
            "after it was {life}: started in {:.2} s, serving reads and writes in {:.2} s, all known in {:.2} s; \
             1,000 of the list in {:.1} ms",
            started.as_secs_f64(),
            serving.as_secs_f64(),
            listed.as_secs_f64(),
            again.elapsed().as_secs_f64() * 1000.0,
        );
        println!("resident memory: {} kB", resident());
        bed.cluster.stop(A, std::time::Duration::from_secs(60)).await;
    }
}

/// KiB of this process that are resident.
pub(crate) fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
