//! Bytes that changed on a disk.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use bytes::Bytes;
use sluice::datacenter::DatacenterSettings;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::Root;
use sluice_engine::ids::DcId;
use sluice_proto::http::{FileStatus, State};
use uuid::Uuid;

use crate::bed::{A, B, Bed, MIB, chunk, eventually, noise};
use crate::wire::Wire;

/// Flips one bit in a chunk of a file, on the disk of a datacenter.
fn flip(bed: &Bed, dc: DcId, id: uuid::Uuid, index: u64) {
    let path = bed.data_file(dc, id);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let (mut byte, at) = ([0], index * MIB as u64 + 4321);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_is_never_served_and_another_holder_is_asked() {
    let mut bed = Bed::reserve(2, DatacenterSettings::default());
    let wire = bed.wire(A, B).await;
    for dc in [A, B] {
        bed.cluster.start(dc).await.unwrap();
    }
    let bytes = noise(60, 4 * MIB);
    let id = bed.create(B, bytes.len()).await;
    for index in 0..3 {
        assert!(bed.put(A, id, index, chunk(&bytes, index as usize)).await.unwrap().status.is_success());
    }
    eventually("word of dc-a's chunks", async || {
        let status: FileStatus = bed.get(B, &format!("/files/{id}"), &[]).await.json();
        (status.missing_chunks == 1).then_some(())
    })
    .await;
    // dc-a cannot ask dc-b to confirm its copy, so it keeps its own.
    wire.cut();
    for index in 0..3 {
        bed.put_ok(B, id, index, chunk(&bytes, index as usize)).await;
    }
    flip(&bed, B, id, 1);
    bed.put_ok(B, id, 3, chunk(&bytes, 3)).await;
    bed.reach(B, id, State::Assembled).await;
    let path = format!("/files/{id}/content");
    for _ in 0..2 {
        let whole = bed.get(B, &path, &[]).await;
        assert_eq!(whole.status, 200, "{:?}", whole.body);
        assert!(whole.body == bytes, "what dc-a has");
    }
    assert!(bed.metric(B, "sluice_integrity_failures_total", "").await >= 1.0);
    // The home makes its copy whole again, and only then dc-a may let go of its own.
    wire.mend();
    let (here, there) = (bed.cluster.running(A).unwrap().store(), bed.cluster.running(B).unwrap().store());
    eventually("room at dc-a", async || {
        let summary = here.summary(Bed::file_id(id)).await.unwrap().unwrap();
        summary.held.is_empty().then_some(())
    })
    .await;
    let index = ChunkIndex::new(1).unwrap();
    assert!(there.read_chunk(Bed::file_id(id), index).await.unwrap() == chunk(&bytes, 1));
    assert!(bed.read(A, id, Root::of_bytes(&bytes)).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_copy_is_refused_rather_than_served_damaged() {
    let bed = Bed::start(2).await;
    let bytes = noise(61, 3 * MIB);
    let sent = bed.upload(&[A, B], bytes.clone(), sluice_client::WaitFor::Assembled).await;
    bed.reach(B, sent.id, State::Assembled).await;
    let there = bed.cluster.running(B).unwrap().store().clone();
    eventually("room at dc-b", async || {
        let summary = there.summary(Bed::file_id(sent.id)).await.unwrap().unwrap();
        summary.held.is_empty().then_some(())
    })
    .await;
    flip(&bed, A, sent.id, 1);
    let path = format!("/files/{}/content", sent.id);
    for dc in [A, B, A] {
        // The head may have gone out before the damage was found: then the body ends early.
        let range = format!("bytes={}-{}", MIB, 2 * MIB - 1);
        let answer =
            bed.ask_as(crate::bed::TENANT, dc, http::Method::GET, &path, &[("range", &range)], "").await;
        assert!(answer.is_err() || !answer.as_ref().unwrap().status.is_success(), "{answer:?}");
    }
    let sound = bed.get(A, &path, &[("range", "bytes=0-1048575")]).await;
    assert!(sound.status == 206 && sound.body == chunk(&bytes, 0), "{:?}", sound.status);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_that_cannot_be_read_are_made_again_or_their_chunks_are_sent_again() {
    let mut bed = Bed::start(1).await;
    let bytes = noise(62, 4 * MIB);
    let whole = bed.upload(&[A], bytes.clone(), sluice_client::WaitFor::Assembled).await.id;
    let half = bed.create(A, bytes.len()).await;
    for index in 0..3 {
        bed.put_ok(A, half, index, chunk(&bytes, index as usize)).await;
    }
    bed.cluster.stop(A, Duration::from_secs(10)).await;
    for id in [whole, half] {
        let path = bed.data_file(A, id).with_file_name("values-0");
        let mut values = std::fs::read(&path).unwrap();
        values[44 + 3] ^= 1;
        std::fs::write(&path, values).unwrap();
    }
    bed.cluster.start(A).await.unwrap();
    assert!(bed.read(A, whole, Root::of_bytes(&bytes)).await == bytes);
    let status: FileStatus = bed.get(A, &format!("/files/{half}"), &[]).await.json();
    assert_eq!(status.missing, [[1, 2], [3, 4]], "{status:?}");
    for index in [1, 3] {
        bed.put_ok(A, half, index, chunk(&bytes, index as usize)).await;
    }
    bed.reach(A, half, State::Assembled).await;
    assert!(bed.read(A, half, Root::of_bytes(&bytes)).await == bytes);
}

/// Everything is read again at once, and again and again.
fn scrubbed() -> DatacenterSettings {
    let mut settings = DatacenterSettings::default();
    settings.aggregator.scrub_rate = 1 << 40;
    settings.aggregator.scrub_every = Duration::from_millis(50);
    settings.aggregator.mend_every = Duration::from_millis(50);
    settings
}

/// Two datacenters that scrub all the time, and a file that dc-b has assembled. dc-a has one chunk of it too, and cannot
/// ask whether it may free it before the wire is mended.
async fn assembled_beside(bytes: &Bytes, other: u64) -> (Bed, Wire, Uuid) {
    let mut bed = Bed::reserve(2, scrubbed());
    let wire = bed.wire(A, B).await;
    for dc in [A, B] {
        bed.cluster.start(dc).await.unwrap();
    }
    let id = bed.create(B, bytes.len()).await;
    bed.put_ok(A, id, other, chunk(bytes, other as usize)).await;
    eventually("word of dc-a's chunk", async || {
        let status: FileStatus = bed.get(B, &format!("/files/{id}"), &[]).await.json();
        (status.missing_chunks == 2).then_some(())
    })
    .await;
    wire.cut();
    for index in 0..3 {
        bed.put_ok(B, id, index, chunk(bytes, index as usize)).await;
    }
    bed.reach(B, id, State::Assembled).await;
    (bed, wire, id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrub_finds_what_nobody_reads_and_fetches_it_again() {
    let bytes = noise(62, 3 * MIB);
    let (bed, wire, id) = assembled_beside(&bytes, 1).await;
    flip(&bed, B, id, 1);
    let file = Bed::file_id(id);
    let there = bed.cluster.running(B).unwrap().store().clone();
    let path = bed.data_file(B, id);
    eventually("the chunk to be mended", async || {
        // Read beside the store, which nobody asks for it.
        let mut found = vec![0; MIB];
        std::fs::File::open(&path).unwrap().read_exact_at(&mut found, MIB as u64).unwrap();
        (found == chunk(&bytes, 1) && there.damage(file).await.unwrap().is_empty()).then_some(())
    })
    .await;
    assert!(bed.metric(B, "sluice_integrity_failures_total", "").await >= 1.0);
    eventually("all of it to be read", async || {
        (bed.metric(B, "sluice_scrub_bytes_total", "").await >= 3.0 * MIB as f64).then_some(())
    })
    .await;
    assert_eq!(there.summary(file).await.unwrap().unwrap().published, Some(Root::of_bytes(&bytes)));
    wire.mend();
    let here = bed.cluster.running(A).unwrap().store().clone();
    eventually("room at dc-a", async || {
        here.summary(file).await.unwrap().unwrap().held.is_empty().then_some(())
    })
    .await;
    assert!(bed.read(A, id, Root::of_bytes(&bytes)).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_that_knows_of_damage_confirms_nothing_and_is_mended_by_who_sends_again() {
    let bytes = noise(63, 3 * MIB);
    let (mut bed, wire, id) = assembled_beside(&bytes, 0).await;
    // Nobody else has this one.
    flip(&bed, B, id, 2);
    let damaged = async |status: &FileStatus| (status.damaged == [[2, 3]]).then_some(());
    let path = format!("/files/{id}");
    let status: FileStatus = eventually("the damage to be found", async || {
        let status: FileStatus = bed.get(B, &path, &[]).await.json();
        damaged(&status).await.map(|()| status)
    })
    .await;
    assert_eq!((status.missing_chunks, &status.missing[..]), (1, &[[2, 3]][..]));

    // It is remembered by the next process, which dc-a can ask.
    bed.cluster.kill(B).await;
    bed.cluster.start(B).await.unwrap();
    wire.mend();
    eventually("dc-a to ask", async || {
        (bed.metric(B, "sluice_commands_total", "kind=\"CONFIRM\",direction=\"received\"").await >= 2.0)
            .then_some(())
    })
    .await;
    let (here, file) = (bed.cluster.running(A).unwrap().store().clone(), Bed::file_id(id));
    assert_eq!(
        here.summary(file).await.unwrap().unwrap().held.first(),
        Some(&(0..1)),
        "it keeps what it has"
    );
    let sound = bed.get(B, &format!("{path}/content"), &[("range", "bytes=0-1048575")]).await;
    assert!(sound.status == 206 && sound.body == chunk(&bytes, 0), "{:?}", sound.status);

    // Whoever sends it again, to any datacenter, makes it whole.
    bed.put_ok(A, id, 2, chunk(&bytes, 2)).await;
    eventually("the chunk to be mended", async || {
        let status: FileStatus = bed.get(B, &path, &[]).await.json();
        (status.damaged.is_empty() && status.missing_chunks == 0).then_some(())
    })
    .await;
    eventually("room at dc-a", async || {
        here.summary(file).await.unwrap().unwrap().held.is_empty().then_some(())
    })
    .await;
    for dc in [A, B] {
        assert!(bed.read(dc, id, Root::of_bytes(&bytes)).await == bytes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_before_a_file_is_whole_is_retracted_and_sent_again() {
    let mut bed = Bed::reserve(2, scrubbed());
    for dc in [A, B] {
        bed.cluster.start(dc).await.unwrap();
    }
    let bytes = noise(64, 3 * MIB);
    let id = bed.create(A, bytes.len()).await;
    for index in 0..2 {
        let taken = bed.put(B, id, index, chunk(&bytes, index as usize)).await.unwrap();
        assert!(taken.status.is_success(), "{:?}", taken.body);
    }
    let missing = async |dc, wanted: &[[u64; 2]]| {
        eventually("what is missing", async || {
            let status: FileStatus = bed.get(dc, &format!("/files/{id}"), &[]).await.json();
            (status.missing == wanted).then_some(())
        })
        .await;
    };
    missing(A, &[[2, 3]]).await;
    flip(&bed, B, id, 0);
    // The home hears that it is gone.
    missing(A, &[[0, 1], [2, 3]]).await;
    assert!(bed.put(B, id, 0, chunk(&bytes, 0)).await.unwrap().status.is_success());
    bed.put_ok(A, id, 2, chunk(&bytes, 2)).await;
    bed.reach(A, id, State::Assembled).await;
    assert!(bed.read(B, id, Root::of_bytes(&bytes)).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_here_is_read_while_the_rest_is_out_of_reach() {
    let mut bed = Bed::reserve(2, DatacenterSettings::default());
    let wire = bed.wire(A, B).await;
    for dc in [A, B] {
        bed.cluster.start(dc).await.unwrap();
    }
    let bytes = noise(65, 6 * MIB);
    let id = bed.create(A, bytes.len()).await;
    bed.put_ok(A, id, 0, chunk(&bytes, 0)).await;
    bed.put_ok(A, id, 1, chunk(&bytes, 1)).await;
    bed.put_ok(A, id, 2, chunk(&bytes, 2)).await;
    // Before dc-b has heard of the file, nobody would tell it once the wire is cut.
    eventually("the metadata at dc-b", async || {
        let answer = bed.put(B, id, 3, chunk(&bytes, 3)).await.unwrap();
        (answer.status == 200).then_some(())
    })
    .await;
    // dc-a hears from dc-b, and cannot ask it anything.
    wire.cut();
    for index in [3, 4, 5] {
        assert!(bed.put(B, id, index, chunk(&bytes, index as usize)).await.unwrap().status.is_success());
    }
    bed.reach(A, id, State::Complete).await;
    let path = format!("/files/{id}/content");
    for index in 0..3 {
        let range = format!("bytes={}-{}", index * MIB, (index + 1) * MIB - 1);
        let answer = bed.get(A, &path, &[("range", &range)]).await;
        assert!(answer.status == 206 && answer.body == chunk(&bytes, index), "{index}: {:?}", answer.body);
    }
    let answer = bed.get(A, &path, &[("range", &format!("bytes={}-", 4 * MIB))]).await;
    assert_eq!(answer.status, 503, "it is with dc-b");
    wire.mend();
    assert!(bed.read(A, id, Root::of_bytes(&bytes)).await == bytes);
}
