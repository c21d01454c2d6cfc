//! Files whose size is settled after their chunks came.

use http::{Method, StatusCode};
use sluice::datacenter::DatacenterSettings;
use sluice_client::{UploadOptions, WaitFor};
use sluice_engine::hash::Root;
use sluice_proto::http::{CreateFile, FilePage, FileStatus, State, TreeNode};
use uuid::Uuid;

use crate::bed::{
    A, Answer, B, Bed, C, MIB, TENANT, Web, acknowledgements, chunk, chunks_in, eventually, new_file, noise,
    value,
};

async fn create_open(web: &Web) -> Uuid {
    let id = Uuid::now_v7();
    let file = CreateFile { size: None, ..new_file(id, 0) };
    let answer = web.post(A, &file).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{:?}", answer.body);
    let status: FileStatus = answer.json();
    assert_eq!((status.size, status.chunks, status.state), (None, 0, State::Receiving));
    assert_eq!(web.post(A, &file).await.status, StatusCode::OK, "a retry");
    id
}

async fn settle(web: &Web, dc: sluice_engine::ids::DcId, id: Uuid, size: usize) -> Answer {
    let body = format!(r#"{{"size":{size}}}"#);
    web.ask_as(TENANT, dc, Method::PATCH, &format!("/files/{id}"), &[], body).await.unwrap()
}

/// Until a datacenter has the metadata: before it has heard of the file, it takes its chunks for provisional.
async fn known(web: &Web, dc: sluice_engine::ids::DcId, id: Uuid) {
    eventually("the metadata", async || {
        // Whoever is asked for a file fetches its record.
        web.get(dc, &format!("/files/{id}"), &[]).await;
        let page: FilePage = web.get(dc, "/files", &[]).await.json();
        page.files.iter().any(|file| file.id == id).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_size_settled_at_another_datacenter_again_and_again_makes_the_file() {
    let bed = Bed::start(2).await;
    let bytes = noise(120, 9 * MIB + 77);
    let id = create_open(&bed).await;
    // At dc-b some come before it has heard of the file.
    for (dc, start, count) in [(B, 2, 2), (A, 0, 2), (B, 4, 1), (A, 8, 1)] {
        let part = bytes.slice(start * MIB..(start + count) * MIB);
        let answer = bed.put(dc, id, start as u64, part).await.unwrap();
        assert!(answer.status.is_success(), "{:?}", answer.body);
    }
    known(&bed, B, id).await;
    bed.put_ok(B, id, 5, bytes.slice(5 * MIB..6 * MIB)).await;
    for dc in [A, B] {
        let short = bed.put(dc, id, 9, bytes.slice(9 * MIB..)).await.unwrap();
        assert_eq!((short.status.as_u16(), short.problem().as_str()), (409, "size-open"), "at {dc}");
        let status: FileStatus = bed.get(dc, &format!("/files/{id}"), &[]).await.json();
        assert_eq!((status.size, status.missing_chunks, status.root), (None, 0, None));
        let content = bed.get(dc, &format!("/files/{id}/content"), &[]).await;
        assert_eq!(content.problem(), "incomplete");
    }
    let page: FilePage = bed.get(B, "/files", &[]).await.json();
    assert_eq!(page.files[0].size, None);
    // Whoever carries on is told what each datacenter has, and its values.
    let status: FileStatus = bed.get(B, &format!("/files/{id}"), &[]).await.json();
    let here = status.holders.iter().find(|holder| holder.dc == "dc-b").unwrap();
    assert_eq!((here.chunks, &here.ranges[..]), (4, &[[2, 6]][..]));
    let tree: TreeNode = bed.get(B, &format!("/files/{id}/tree?start=4&level=2"), &[]).await.json();
    assert_eq!(tree.chunk_values[0], Some(value(4, &chunk(&bytes, 4))));
    assert_eq!(tree.chunk_values[2..], [None, None]);

    let early = settle(&bed, A, id, 3 * MIB).await;
    assert_eq!((early.status.as_u16(), early.problem().as_str()), (409, "size-conflict"));
    assert_eq!(settle(&bed, B, Uuid::now_v7(), 5).await.problem(), "not-found");
    for dc in [B, B, A] {
        let settled = settle(&bed, dc, id, bytes.len()).await;
        assert_eq!(settled.status, StatusCode::OK, "{:?}", settled.body);
        assert_eq!(settled.json::<FileStatus>().size, Some(bytes.len() as u64));
        let other = settle(&bed, dc, id, bytes.len() + 1).await;
        assert_eq!((other.status.as_u16(), other.problem().as_str()), (409, "size-conflict"));
    }
    bed.put_ok(A, id, 9, bytes.slice(9 * MIB..)).await;
    bed.put_ok(B, id, 6, bytes.slice(6 * MIB..8 * MIB)).await;
    let root = Root::of_bytes(&bytes);
    for dc in [A, B] {
        let status = bed.reach(dc, id, State::Assembled).await;
        assert_eq!((status.root, status.home.as_str()), (Some(root.to_string()), "dc-a"), "the home stays");
        assert!(bed.read(dc, id, root).await == bytes);
    }
    assert_eq!(settle(&bed, B, id, bytes.len()).await.status, StatusCode::OK, "also when all is done");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_size_outlives_every_kill_and_shows_what_cannot_belong_to_the_file() {
    let mut bed = Bed::start(2).await;
    let bytes = noise(121, 2 * MIB + 9);
    let id = Uuid::now_v7();
    // dc-b has a chunk from before it heard of the file, which the size will prove impossible.
    assert_eq!(bed.put(B, id, 1, noise(122, 5)).await.unwrap().status, StatusCode::ACCEPTED);
    let file = CreateFile { size: None, ..new_file(id, 0) };
    assert_eq!(bed.post(A, &file).await.status, StatusCode::CREATED);
    known(&bed, B, id).await;
    bed.put_ok(A, id, 0, chunk(&bytes, 0)).await;
    bed.cluster.kill(B).await;
    assert_eq!(settle(&bed, A, id, bytes.len()).await.status, StatusCode::OK);
    bed.cluster.kill(A).await;
    for dc in [A, B] {
        bed.cluster.start(dc).await.unwrap();
    }
    eventually("word of the size", async || {
        let status: FileStatus = bed.get(B, &format!("/files/{id}"), &[]).await.json();
        (status.size == Some(bytes.len() as u64)).then_some(())
    })
    .await;
    // The impossible chunk gives way to the one that belongs there.
    eventually("room for the right chunk", async || {
        let answer = bed.put(B, id, 1, chunk(&bytes, 1)).await.unwrap();
        answer.status.is_success().then_some(())
    })
    .await;
    bed.put_ok(B, id, 2, chunk(&bytes, 2)).await;
    let root = Root::of_bytes(&bytes);
    for dc in [A, B] {
        assert_eq!(bed.reach(dc, id, State::Assembled).await.root, Some(root.to_string()));
        assert!(bed.read(dc, id, root).await == bytes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sizes_are_a_conflict_everywhere_and_for_good() {
    let mut bed = Bed::reserve(3, DatacenterSettings::default());
    let wires = [bed.wire(A, B).await, bed.wire(B, A).await];
    for dc in [A, B, C] {
        bed.cluster.start(dc).await.unwrap();
    }
    let bytes = noise(123, 2 * MIB);
    let id = create_open(&bed).await;
    bed.put_ok(A, id, 0, chunk(&bytes, 0)).await;
    known(&bed, B, id).await;
    bed.cluster.kill(C).await;
    wires.iter().for_each(crate::wire::Wire::cut);
    assert_eq!(settle(&bed, A, id, 2 * MIB).await.status, StatusCode::OK);
    assert_eq!(settle(&bed, B, id, 2 * MIB - 1).await.status, StatusCode::OK);
    wires.iter().for_each(crate::wire::Wire::mend);
    bed.cluster.start(C).await.unwrap();
    for dc in [A, B, C] {
        let status = bed.reach(dc, id, State::Conflict).await;
        assert_eq!(status.conflict.as_deref(), Some("two different sizes were sent"), "at {dc}");
        // Its home may say so before the datacenter has heard of both itself.
        eventually("both sizes", async || {
            let answer = settle(&bed, dc, id, 2 * MIB).await;
            (!answer.status.is_success() && answer.problem() == "conflict").then_some(())
        })
        .await;
        assert_eq!(bed.put(dc, id, 1, chunk(&bytes, 1)).await.unwrap().problem(), "conflict");
    }
    bed.cluster.kill_all().await;
    for dc in [C, B, A] {
        bed.cluster.start(dc).await.unwrap();
    }
    for dc in [A, B, C] {
        bed.reach(dc, id, State::Conflict).await;
    }
    assert_eq!(bed.delete(B, id).await, StatusCode::NO_CONTENT);
    for dc in [A, B, C] {
        assert_eq!(bed.answers(dc, id, 410).await.problem(), "dropped");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_and_empty_files_may_be_settled_late_too() {
    let bed = Bed::start(2).await;
    for len in [0, 5, MIB, MIB + 1] {
        let bytes = noise(124, len);
        let id = create_open(&bed).await;
        if len >= MIB {
            assert!(bed.put(B, id, 0, chunk(&bytes, 0)).await.unwrap().status.is_success());
        }
        assert_eq!(settle(&bed, B, id, len).await.status, StatusCode::OK);
        if !len.is_multiple_of(MIB) {
            let last = len / MIB;
            bed.put_ok(B, id, last as u64, chunk(&bytes, last)).await;
        }
        let root = Root::of_bytes(&bytes);
        for dc in [A, B] {
            assert_eq!(bed.reach(dc, id, State::Assembled).await.root, Some(root.to_string()));
            assert!(bed.read(dc, id, root).await == bytes, "{len} bytes at {dc}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_survives_the_death_of_a_datacenter_and_is_assembled() {
    let mut bed = Bed::start(2).await;
    let bytes = noise(125, 150 * MIB + 7);
    let (observer, mut seen) = acknowledgements();
    let options = UploadOptions { wait: WaitFor::Assembled, name: "s".into(), ..UploadOptions::default() };
    let client = bed.client(&[A, B]);
    let (sent, ()) = tokio::join!(client.upload_stream(&bytes[..], &options, observer), async {
        seen.wait_for(|seen| chunks_in(seen) >= 64).await.unwrap();
        bed.cluster.kill(B).await;
        bed.cluster.start(B).await.unwrap();
    });
    let sent = sent.unwrap();
    assert_eq!((sent.root, sent.state, sent.chunks_sent), (Root::of_bytes(&bytes), State::Assembled, 151));
    for dc in [A, B] {
        assert_eq!(bed.reach(dc, sent.id, State::Assembled).await.size, Some(bytes.len() as u64));
        assert!(bed.read(dc, sent.id, sent.root).await == bytes, "at {dc}");
    }
}
