//! Bytes that changed on a disk.

use std::os::unix::fs::FileExt;

use sluice::datacenter::DatacenterSettings;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::Root;
use sluice_engine::ids::DcId;
use sluice_proto::http::{FileStatus, State};
use sluice_store::ChunkStore;

use crate::bed::{A, B, Bed, MIB, chunk, eventually, noise};

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
