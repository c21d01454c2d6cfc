//! Chunks that come before their metadata.

use http::StatusCode;
use sluice_engine::hash::Root;
use sluice_proto::http::{ChunkReceipt, State};
use uuid::Uuid;

use crate::bed::{A, B, Bed, MIB, chunk, new_file, noise};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_that_come_first_become_part_of_the_file() {
    let bed = Bed::start(2).await;
    let bytes = noise(30, 4 * MIB + 9);
    let id = Uuid::now_v7();
    // Nobody knows the file yet: durable, provisional, and not there for readers.
    for index in [3, 1] {
        let answer = bed.put(B, id, index, chunk(&bytes, index as usize)).await.unwrap();
        assert_eq!(answer.status, StatusCode::ACCEPTED, "{:?}", answer.body);
        assert!(answer.json::<ChunkReceipt>().provisional);
    }
    assert_eq!(bed.get(B, &format!("/files/{id}"), &[]).await.problem(), "not-found");
    assert_eq!(bed.get(B, &format!("/files/{id}/content"), &[]).await.problem(), "not-found");

    assert_eq!(bed.post(A, &new_file(id, bytes.len())).await.status, StatusCode::CREATED);
    for index in [0, 2, 4] {
        bed.put_ok(A, id, index, chunk(&bytes, index as usize)).await;
    }
    let root = Root::of_bytes(&bytes);
    for dc in [A, B] {
        assert_eq!(bed.reach(dc, id, State::Assembled).await.root, Some(root.to_string()));
        assert!(bed.read(dc, id, root).await == bytes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn provisional_chunks_survive_a_kill() {
    let mut bed = Bed::start(2).await;
    let bytes = noise(31, 2 * MIB);
    let id = Uuid::now_v7();
    assert_eq!(bed.put(B, id, 1, chunk(&bytes, 1)).await.unwrap().status, StatusCode::ACCEPTED);
    bed.cluster.kill(B).await;
    assert_eq!(bed.post(A, &new_file(id, bytes.len())).await.status, StatusCode::CREATED);
    bed.put_ok(A, id, 0, chunk(&bytes, 0)).await;
    bed.cluster.start(B).await.unwrap();
    let root = Root::of_bytes(&bytes);
    assert_eq!(bed.reach(A, id, State::Assembled).await.root, Some(root.to_string()));
    assert!(bed.read(A, id, root).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_the_metadata_proves_impossible_is_no_part_of_the_file() {
    let bed = Bed::start(2).await;
    let bytes = noise(32, MIB + 5);
    let id = Uuid::now_v7();
    assert_eq!(bed.put(B, id, 7, noise(33, MIB)).await.unwrap().status, StatusCode::ACCEPTED);
    assert_eq!(bed.post(A, &new_file(id, bytes.len())).await.status, StatusCode::CREATED);
    bed.answers(B, id, 200).await;
    for index in [0, 1] {
        assert!(bed.put(B, id, index, chunk(&bytes, index as usize)).await.unwrap().status.is_success());
    }
    let beyond = bed.put(A, id, 7, noise(33, MIB)).await.unwrap();
    assert_eq!((beyond.status.as_u16(), beyond.problem().as_str()), (400, "chunk-index"));
    let short = bed.put(A, id, 0, noise(33, 7)).await.unwrap();
    assert_eq!((short.status.as_u16(), short.problem().as_str()), (400, "chunk-length"));
    let root = Root::of_bytes(&bytes);
    assert_eq!(bed.reach(A, id, State::Assembled).await.root, Some(root.to_string()));
    assert!(bed.read(B, id, root).await == bytes);
}
