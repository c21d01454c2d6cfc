//! Facts that contradict one another, and files that end.

use http::{Method, StatusCode};
use sluice_engine::hash::Root;
use sluice_proto::http::{CreateFile, FileStatus, State};
use uuid::Uuid;

use crate::bed::{A, B, Bed, MIB, STRANGER, TENANT, chunk, eventually, new_file, noise, value};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn different_bytes_for_one_chunk_in_two_datacenters_are_a_conflict_at_both() {
    let bed = Bed::start(2).await;
    let (one, other) = (noise(20, 2 * MIB), noise(21, 2 * MIB));
    let id = bed.create(A, 2 * MIB).await;
    bed.put_ok(A, id, 0, chunk(&one, 0)).await;
    eventually("the metadata at dc-b", async || {
        let answer = bed.put(B, id, 0, chunk(&other, 0)).await.unwrap();
        assert!([200, 202].contains(&answer.status.as_u16()), "{:?}", answer.body);
        (answer.status == 200).then_some(())
    })
    .await;
    // The home knows of both before the file is covered: what came first cannot decide between them.
    eventually("both holders at the home", async || {
        let status: FileStatus = bed.get(A, &format!("/files/{id}"), &[]).await.json();
        (status.holders.len() == 2).then_some(())
    })
    .await;
    bed.put_ok(A, id, 1, chunk(&one, 1)).await;
    for dc in [A, B] {
        let status = bed.reach(dc, id, State::Conflict).await;
        assert!(status.conflict.is_some(), "{status:?}");
        let content = bed.get(dc, &format!("/files/{id}/content"), &[]).await;
        assert_eq!((content.status, content.problem().as_str()), (StatusCode::CONFLICT, "conflict"));
        let more = bed.put(dc, id, 1, chunk(&one, 1)).await.unwrap();
        assert_eq!((more.status.as_u16(), more.problem().as_str()), (409, "conflict"));
    }
    assert_eq!(bed.delete(B, id).await, StatusCode::NO_CONTENT);
    for dc in [A, B] {
        assert_eq!(bed.answers(dc, id, 410).await.problem(), "dropped");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_bytes_for_a_chunk_in_the_same_datacenter_are_refused_and_the_first_stay() {
    let bed = Bed::start(2).await;
    let (one, other) = (noise(22, 2 * MIB), noise(23, MIB));
    let id = bed.create(A, 2 * MIB).await;
    let first = bed.put_ok(A, id, 0, chunk(&one, 0)).await;
    assert_eq!((first.new_chunks, first.values.first()), (1, Some(&value(0, &one[..MIB]))));
    let refused = bed.put(A, id, 0, other.clone()).await.unwrap();
    assert_eq!((refused.status.as_u16(), refused.problem().as_str()), (409, "chunk-conflict"));
    assert_eq!(bed.put_ok(A, id, 0, chunk(&one, 0)).await.new_chunks, 0, "the retry gets the same answer");
    let wrong = [("chunk-value", value(1, &other))];
    let wrong = [("chunk-value", wrong[0].1.as_str())];
    let path = format!("/files/{id}/chunks/1");
    let unlike = bed.ask_as(TENANT, B, Method::PUT, &path, &wrong, chunk(&one, 1)).await.unwrap();
    assert_eq!((unlike.status.as_u16(), unlike.problem().as_str()), (422, "chunk-value"));
    bed.put_ok(A, id, 1, chunk(&one, 1)).await;
    let root = Root::of_bytes(&one);
    assert_eq!(bed.reach(B, id, State::Assembled).await.root, Some(root.to_string()));
    assert!(bed.read(B, id, root).await == one);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_root_than_the_expected_one_is_a_conflict() {
    let bed = Bed::start(2).await;
    for len in [MIB / 2, 2 * MIB] {
        let bytes = noise(24, len);
        let id = Uuid::now_v7();
        let expected_root = Some(Root::of_bytes(b"something else").to_string());
        let created = bed.post(A, &CreateFile { expected_root, ..new_file(id, len) }).await;
        assert_eq!(created.status, StatusCode::CREATED);
        for index in 0..len.div_ceil(MIB) {
            let answer =
                bed.put(if index == 0 { A } else { B }, id, index as u64, chunk(&bytes, index)).await;
            assert!(answer.unwrap().status.is_success());
        }
        for dc in [A, B] {
            let status = bed.reach(dc, id, State::Conflict).await;
            assert!(status.conflict.is_some(), "{status:?}");
            assert_eq!(bed.get(dc, &format!("/files/{id}/content"), &[]).await.status, 409);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_metadata_records_for_one_id_do_not_both_stand() {
    let bed = Bed::start(2).await;
    let id = bed.create(A, 2 * MIB).await;
    let other = CreateFile { name: "other".into(), ..new_file(id, 2 * MIB) };
    let refused = bed.post(A, &other).await;
    assert_eq!((refused.status.as_u16(), refused.problem().as_str()), (409, "metadata-conflict"));
    assert_eq!(bed.post(A, &new_file(id, 2 * MIB)).await.status, StatusCode::OK, "a retry means the same");
    eventually("the metadata at dc-b", async || {
        let answer = bed.get(B, &format!("/files/{id}"), &[]).await;
        (answer.status == 200).then_some(())
    })
    .await;
    // The same record at both makes one file; of two claims to be its home the higher stands, at both.
    assert!(bed.post(B, &new_file(id, 2 * MIB)).await.status.is_success());
    let bytes = noise(26, 2 * MIB);
    bed.put_ok(A, id, 0, chunk(&bytes, 0)).await;
    bed.put_ok(B, id, 1, chunk(&bytes, 1)).await;
    let (a, b) = (bed.reach(A, id, State::Assembled).await, bed.reach(B, id, State::Assembled).await);
    assert_eq!((a.home, a.root), (b.home, b.root));
    assert!(bed.read(A, id, Root::of_bytes(&bytes)).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_at_either_is_the_end_at_both() {
    let bed = Bed::start(2).await;
    for (dc, is_whole) in [(A, true), (B, true), (A, false), (B, false)] {
        let bytes = noise(25, 2 * MIB);
        let id = bed.create(A, bytes.len()).await;
        bed.put_ok(A, id, 0, chunk(&bytes, 0)).await;
        if is_whole {
            bed.put_ok(A, id, 1, chunk(&bytes, 1)).await;
            bed.reach(dc, id, State::Assembled).await;
        } else {
            bed.answers(dc, id, 200).await;
        }
        assert_eq!(bed.delete(dc, id).await, StatusCode::NO_CONTENT);
        for dc in [A, B] {
            assert_eq!(bed.answers(dc, id, 410).await.problem(), "dropped");
            assert_eq!(bed.get(dc, &format!("/files/{id}/content"), &[]).await.status, 410);
            // A datacenter takes the chunk until it is told: as provisional, if it never heard of the file.
            eventually("word of the end", async || {
                let answer = bed.put(dc, id, 1, chunk(&bytes, 1)).await.unwrap();
                (!answer.status.is_success()).then(|| assert_eq!(answer.problem(), "dropped"))
            })
            .await;
            assert_eq!(bed.post(dc, &new_file(id, bytes.len())).await.problem(), "dropped");
            assert_eq!(bed.delete(dc, id).await, StatusCode::NO_CONTENT, "again");
            // Its owner is told; others never knew.
            let path = format!("/files/{id}");
            let other = bed.ask_as(STRANGER, dc, Method::GET, &path, &[], "").await.unwrap();
            assert_eq!(other.problem(), "not-found");
        }
    }
}
