//! Datacenters that die, stop, and come back.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use sluice::datacenter::DatacenterSettings;
use sluice_client::{Event, Source, UploadOptions, WaitFor};
use sluice_engine::hash::Root;
use sluice_node::shutdown::Stopped;
use sluice_proto::http::{FilePage, FileStatus, State};
use sluice_store::{ChunkStore, FsOptions, FsStore};
use uuid::Uuid;

use crate::bed::{A, B, Bed, MIB, PATIENCE, acknowledgements, chunks_in, eventually, noise, shuffled};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_survives_the_death_of_a_datacenter() {
    let mut bed = Bed::start(2).await;
    let bytes = noise(10, 48 * MIB);
    let client = bed.client(&[A, B]);
    let (observer, mut seen) = acknowledgements();
    let source = Source::memory(bytes.clone());
    let options = UploadOptions { wait: WaitFor::Assembled, ..shuffled() };
    let (sent, ()) = tokio::join!(client.upload(&source, &options, observer), async {
        seen.wait_for(|seen| chunks_in(seen) >= 16).await.unwrap();
        bed.cluster.kill(B).await;
        bed.cluster.start(B).await.unwrap();
    });
    let sent = sent.unwrap();
    assert_eq!((sent.root, sent.state), (Root::of_bytes(&bytes), State::Assembled));
    assert_eq!(sent.chunks_sent, 48, "nothing that was acknowledged had to be sent again");
    for dc in [A, B] {
        bed.reach(dc, sent.id, State::Assembled).await;
        assert!(bed.read(dc, sent.id, sent.root).await == bytes, "at {dc}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_there_after_every_kill() {
    let mut bed = Bed::start(2).await;
    let bytes = noise(11, 40 * MIB);
    let id = bed.create(A, bytes.len()).await;
    let (mut acknowledged, mut before) = (Vec::new(), 0);
    // Five lives of dc-b, each killed in the middle of eight writes: by turns once the disk has some of them, and once
    // the first is acknowledged.
    for life in 0..5 {
        let mut runs: FuturesUnordered<_> = (0..8u64)
            .map(|n| {
                let (web, start) = (bed.web.clone(), life * 8 + n);
                let bytes = crate::bed::chunk(&bytes, start as usize);
                tokio::spawn(async move { (start, web.put(B, id, start, bytes).await) })
            })
            .collect();
        let mut answers = Vec::new();
        if life % 2 == 0 {
            answers.extend(runs.next().await);
        } else {
            let store = bed.cluster.running(B).unwrap().store().clone();
            eventually("chunks of this life", async || {
                let held = store.summary(Bed::file_id(id)).await.unwrap().map_or(0, |file| file.held_bytes);
                (held > before + 2 * MIB as u64).then_some(())
            })
            .await;
        }
        bed.cluster.kill(B).await;
        answers.extend(runs.collect::<Vec<_>>().await);
        let answers = answers.into_iter().map(Result::unwrap);
        // What is provisional is as durable.
        let taken = answers.filter(|(_, answer)| answer.as_ref().is_ok_and(|a| a.status.is_success()));
        acknowledged.extend(taken.map(|(start, _)| start));
        bed.cluster.start(B).await.unwrap();
        let store = bed.cluster.running(B).unwrap().store();
        let summary = store.summary(Bed::file_id(id)).await.unwrap().unwrap();
        let held = summary.held;
        before = summary.held_bytes;
        for chunk in &acknowledged {
            assert!(held.iter().any(|range| range.contains(chunk)), "chunk {chunk} of {held:?}, life {life}");
        }
    }
    // A client that carries on sends only what never was acknowledged, once the home has heard of the rest.
    let held = before / MIB as u64;
    eventually("word of what dc-b holds", async || {
        let status: FileStatus = bed.get(A, &format!("/files/{id}"), &[]).await.json();
        (status.missing_chunks == 40 - held).then_some(())
    })
    .await;
    let options = UploadOptions { id: Some(id), name: "test.bin".into(), ..shuffled() };
    let (observer, _seen) = acknowledgements();
    let sent = bed.client(&[A, B]).upload(&Source::memory(bytes.clone()), &options, observer).await.unwrap();
    assert_eq!(sent.chunks_skipped, held, "{sent:?}, {} acknowledged", acknowledged.len());
    assert!(held >= acknowledged.len() as u64 && !acknowledged.is_empty());
    bed.reach(B, id, State::Assembled).await;
    assert!(bed.read(B, id, sent.root).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_in_order_loses_nothing_of_an_upload() {
    let mut bed = Bed::start(2).await;
    let bytes = noise(12, 48 * MIB);
    let client = bed.client(&[A, B]);
    let (observer, mut seen) = acknowledgements();
    let resent = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let noted = resent.clone();
    let watch = std::sync::Arc::new(move |event: &Event<'_>| {
        if let Event::Resending { chunks } = event {
            noted.fetch_add(*chunks, std::sync::atomic::Ordering::Relaxed);
        }
        observer.observe(event);
    });
    let source = Source::memory(bytes.clone());
    let options = UploadOptions { wait: WaitFor::Assembled, ..shuffled() };
    let (sent, (stopped, took)) = tokio::join!(client.upload(&source, &options, watch), async {
        seen.wait_for(|seen| chunks_in(seen) >= 16).await.unwrap();
        let begun = Instant::now();
        let stopped = bed.cluster.stop(B, Duration::from_secs(20)).await;
        let took = begun.elapsed();
        bed.cluster.start(B).await.unwrap();
        (stopped, took)
    });
    let sent = sent.unwrap();
    assert_eq!(stopped, Stopped::Clean);
    assert!(took < Duration::from_secs(5), "a stop took {took:?}");
    assert_eq!(resent.load(std::sync::atomic::Ordering::Relaxed), 0);
    assert_eq!((sent.root, sent.chunks_sent), (Root::of_bytes(&bytes), 48));
    bed.reach(B, sent.id, State::Assembled).await;
    assert!(bed.read(B, sent.id, sent.root).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_lost_power_as_a_whole_goes_on() {
    let mut bed = Bed::start(2).await;
    let (whole, half) = (noise(13, 9 * MIB), noise(14, 4 * MIB));
    let sent = bed.upload(&[A, B], whole.clone(), WaitFor::Complete).await;
    let id = bed.create(B, half.len()).await;
    bed.put_ok(A, id, 0, crate::bed::chunk(&half, 0)).await;
    bed.put_ok(B, id, 1, crate::bed::chunk(&half, 1)).await;
    bed.cluster.kill_all().await;
    for dc in [B, A] {
        bed.cluster.start(dc).await.unwrap();
    }
    let status = bed.reach(A, sent.id, State::Assembled).await;
    assert_eq!(status.root, Some(sent.root.to_string()));
    assert!(bed.read(B, sent.id, sent.root).await == whole);
    bed.put_ok(B, id, 2, half.slice(2 * MIB..)).await;
    let root = Root::of_bytes(&half);
    assert_eq!(bed.reach(A, id, State::Assembled).await.root, Some(root.to_string()));
    assert!(bed.read(A, id, root).await == half);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_its_home_is_away_a_file_is_neither_absent_nor_wrong() {
    let mut bed = Bed::start(2).await;
    let bytes = noise(15, 2 * MIB);
    let id = bed.create(A, bytes.len()).await;
    assert!(bed.put(B, id, 0, crate::bed::chunk(&bytes, 0)).await.unwrap().status.is_success());
    eventually("the metadata at dc-b", async || {
        let page: FilePage = bed.get(B, "/files", &[]).await.json();
        (!page.files.is_empty()).then_some(())
    })
    .await;
    bed.cluster.kill(A).await;
    bed.put_ok(B, id, 1, crate::bed::chunk(&bytes, 1)).await;
    let status: FileStatus = bed.get(B, &format!("/files/{id}"), &[]).await.json();
    assert_eq!((status.state, status.home_answered), (State::Receiving, false), "{status:?}");
    // What dc-b never heard of may be known to dc-a.
    let other = bed.get(B, &format!("/files/{}", Uuid::now_v7()), &[]).await;
    assert_eq!((other.status.as_u16(), other.problem().as_str()), (503, "no-metadata"));
    bed.cluster.start(A).await.unwrap();
    let root = Root::of_bytes(&bytes);
    let status = bed.client(&[B]).wait(id, State::Assembled, PATIENCE).await.unwrap();
    assert_eq!((status.state, status.root), (State::Assembled, Some(root.to_string())));
    assert!(bed.read(B, id, root).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_that_died_before_it_noted_the_home_does_not_claim_to_be_it() {
    let mut bed = Bed::reserve(2, DatacenterSettings::default());
    bed.cluster.start(A).await.unwrap();
    let bytes = noise(16, 2 * MIB);
    let id = bed.create(A, bytes.len()).await;
    // dc-b was killed after it stored the record, and before the home that came with it.
    let there = bed.cluster.running(A).unwrap().store();
    let record = there.summary(Bed::file_id(id)).await.unwrap().unwrap().record.unwrap();
    let directory = bed.cluster.config(B).unwrap().place.directory().unwrap().to_owned();
    let store = FsStore::open(directory, FsOptions::default()).unwrap();
    store.put_record(&record).await.unwrap();
    store.close().await.unwrap();
    bed.cluster.start(B).await.unwrap();
    bed.put_ok(A, id, 0, crate::bed::chunk(&bytes, 0)).await;
    assert!(bed.put(B, id, 1, crate::bed::chunk(&bytes, 1)).await.unwrap().status.is_success());
    let root = Root::of_bytes(&bytes);
    for dc in [A, B] {
        let status = bed.reach(dc, id, State::Assembled).await;
        assert_eq!((status.home.as_str(), status.root), ("dc-a", Some(root.to_string())));
        assert!(bed.read(dc, id, root).await == bytes);
    }
}
