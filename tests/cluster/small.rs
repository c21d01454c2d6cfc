//! Files that come whole, in one request.

use std::collections::BTreeSet;

use http::StatusCode;
use serde_json::json;
use sluice_client::{Source, UploadOptions, WaitFor, unobserved};
use sluice_engine::hash::Root;
use sluice_proto::http::{FileEntry, FilePage, FileStatus, State};
use uuid::Uuid;

use crate::bed::{A, B, Bed, MIB, eventually, new_file, noise, value};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_makes_a_file_assembled_and_every_datacenter_learns_of_it() {
    let mut bed = Bed::start(2).await;
    let mut ids = BTreeSet::new();
    for (n, len) in [0, 1, 1000, 65_537, MIB].into_iter().enumerate() {
        let (id, bytes) = (Uuid::now_v7(), noise(n as u64, len));
        let said = json!({ "id": id, "name": "wörld.txt", "metadata": { "k": "v" } });
        let answer = bed.post_whole(A, &said, bytes.clone()).await.unwrap();
        assert_eq!(answer.status, StatusCode::CREATED, "{:?}", answer.body);
        assert_eq!(answer.headers["location"], format!("/v1/files/{id}"));
        let status: FileStatus = answer.json();
        let root = Root::of_bytes(&bytes);
        assert_eq!((status.state, status.root), (State::Assembled, Some(root.to_string())));
        assert_eq!((status.size, status.name.as_str()), (Some(len as u64), "wörld.txt"));
        assert_eq!((status.home.as_str(), status.missing_chunks), ("dc-a", 0));
        for dc in [A, B] {
            let status = bed.reach(dc, id, State::Assembled).await;
            assert_eq!((status.name.as_str(), status.metadata["k"].as_str()), ("wörld.txt", "v"));
            assert!(bed.read(dc, id, root).await == bytes, "{len} bytes at {dc}");
        }
        // The same again, at either datacenter, is the same.
        for dc in [A, B] {
            let again = bed.post_whole(dc, &said, bytes.clone()).await.unwrap();
            // One that has not heard of it yet takes it, too, and finds out.
            let codes = if dc == A { &[StatusCode::OK][..] } else { &[StatusCode::OK, StatusCode::CREATED] };
            assert!(codes.contains(&again.status), "{:?}", again.body);
            assert_eq!(again.json::<FileStatus>().state, State::Assembled);
        }
        ids.insert(id);
    }
    for round in 0..2 {
        eventually("the same list at both", async || {
            let mut pages = Vec::new();
            for dc in [A, B] {
                let answer = bed.get(dc, "/files", &[]).await;
                let page: FilePage = (answer.status == 200).then(|| answer.json())?;
                pages.push(page.files);
            }
            let assembled = |file: &FileEntry| file.state == State::Assembled && file.name == "wörld.txt";
            let listed: BTreeSet<Uuid> = pages[0].iter().map(|file| file.id).collect();
            (listed == ids && pages[0].iter().all(assembled) && pages[0] == pages[1]).then_some(())
        })
        .await;
        if round == 0 {
            for dc in [A, B] {
                bed.cluster.kill(dc).await;
                bed.cluster.start(dc).await.unwrap();
            }
        }
    }
    // Any datacenter ends a file, for good, also one that came back from the dead.
    for (n, id) in ids.iter().enumerate() {
        assert_eq!(bed.delete([A, B][n % 2], *id).await, StatusCode::NO_CONTENT);
    }
    for id in &ids {
        for dc in [A, B] {
            assert_eq!(bed.answers(dc, *id, 410).await.problem(), "dropped");
            // A datacenter that has not heard of it yet compares it with the file that it knows.
            eventually("nothing else comes in its place", async || {
                let again = bed.post_whole(dc, &json!({ "id": id }), noise(9, 10)).await.unwrap();
                assert!([409, 410].contains(&again.status.as_u16()), "{:?}", again.body);
                (again.problem() == "dropped").then_some(())
            })
            .await;
        }
    }
    let page: FilePage = bed.get(B, "/files", &[]).await.json();
    assert!(page.files.is_empty(), "{page:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_two_datacenters_were_sent_at_once_is_one_or_a_conflict() {
    let bed = Bed::start(2).await;
    for (n, other) in [(1, 1), (2, 3)] {
        let id = Uuid::now_v7();
        let said = json!({ "id": id });
        let (one, two) = tokio::join!(
            bed.post_whole(A, &said, noise(n, 3000)),
            bed.post_whole(B, &said, noise(other, 3000))
        );
        let (one, two) = (one.unwrap(), two.unwrap());
        assert!([200, 201, 409].contains(&one.status.as_u16()), "{:?}", one.body);
        assert!([200, 201, 409].contains(&two.status.as_u16()), "{:?}", two.body);
        if n == other {
            let root = Root::of_bytes(&noise(n, 3000));
            for dc in [A, B] {
                assert!(bed.read(dc, id, root).await == noise(n, 3000));
            }
            eventually("one copy is enough", async || {
                let status: FileStatus = bed.get(A, &format!("/files/{id}"), &[]).await.json();
                (status.holders.len() == 1).then_some(())
            })
            .await;
        } else if one.status.is_success() && two.status.is_success() {
            for dc in [A, B] {
                bed.reach(dc, id, State::Conflict).await;
                let again = bed.post_whole(dc, &said, noise(n, 3000)).await.unwrap();
                assert_eq!((again.status.as_u16(), again.problem().as_str()), (409, "conflict"));
            }
            assert_eq!(bed.delete(B, id).await, StatusCode::NO_CONTENT);
        }
        for dc in [A, B] {
            if n != other && one.status.is_success() && two.status.is_success() {
                bed.answers(dc, id, 410).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conflict_outlives_every_datacenter_that_could_say_so_again() {
    let mut bed = Bed::start(2).await;
    let (id, named) = (Uuid::now_v7(), Uuid::now_v7());
    // Each alone is sent something else: other bytes, or another metadata record.
    for (dc, other, seed) in [(A, B, 1), (B, A, 2)] {
        bed.cluster.kill(other).await;
        if dc == B {
            bed.cluster.start(B).await.unwrap();
        }
        let (said, bytes) = (json!({ "id": id }), noise(seed, 3000));
        assert_eq!(bed.post_whole(dc, &said, bytes).await.unwrap().status, StatusCode::CREATED);
        let said = json!({ "id": named, "name": format!("{seed}") });
        assert_eq!(bed.post_whole(dc, &said, noise(9, 3000)).await.unwrap().status, StatusCode::CREATED);
    }
    bed.cluster.start(A).await.unwrap();
    for (dc, id) in [(A, id), (A, named), (B, id), (B, named)] {
        eventually("conflict", async || {
            let status: FileStatus = bed.get(dc, &format!("/files/{id}"), &[]).await.json();
            (status.state == State::Conflict).then_some(())
        })
        .await;
    }
    for dc in [A, B] {
        for dc in [A, B] {
            bed.cluster.kill(dc).await;
        }
        bed.cluster.start(dc).await.unwrap();
        for id in [id, named] {
            let content = bed.get(dc, &format!("/files/{id}/content"), &[]).await;
            assert_eq!((content.status.as_u16(), content.problem().as_str()), (409, "conflict"), "{dc}");
            let status: FileStatus = bed.get(dc, &format!("/files/{id}"), &[]).await.json();
            assert_eq!(status.state, State::Conflict, "{dc}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_contradicts_or_is_wrong_is_refused_by_name_and_the_first_stays() {
    let bed = Bed::start(2).await;
    let (id, bytes) = (Uuid::now_v7(), noise(1, 500));
    let said = json!({ "id": id, "name": "a" });
    assert_eq!(bed.post_whole(A, &said, bytes.clone()).await.unwrap().status, 201);
    eventually("dc-b has heard of it", async || {
        let page: FilePage = bed.get(B, "/files", &[]).await.json();
        page.files.iter().any(|file| file.id == id).then_some(())
    })
    .await;
    for dc in [A, B] {
        let other = bed.post_whole(dc, &said, noise(2, 500)).await.unwrap();
        assert_eq!((other.status.as_u16(), other.problem().as_str()), (409, "chunk-conflict"), "{dc}");
        let renamed = json!({ "id": id, "name": "b" });
        let other = bed.post_whole(dc, &renamed, bytes.clone()).await.unwrap();
        assert_eq!((other.status.as_u16(), other.problem().as_str()), (409, "metadata-conflict"), "{dc}");
    }
    let put = bed.put(A, id, 0, noise(2, 500)).await.unwrap();
    assert_eq!((put.status.as_u16(), put.problem().as_str()), (409, "chunk-conflict"));
    assert_eq!(bed.put_ok(A, id, 0, bytes.clone()).await.values, [value(0, &bytes)]);
    assert!(bed.read(B, id, Root::of_bytes(&bytes)).await == bytes);

    let refused = async |said: serde_json::Value, len: usize| {
        let answer = bed.post_whole(A, &said, noise(1, len)).await.unwrap();
        (answer.status.as_u16(), answer.problem())
    };
    assert_eq!(refused(json!({}), MIB + 1).await, (413, "too-large".into()));
    assert_eq!(refused(json!({ "size": 5 }), 6).await, (400, "invalid-metadata".into()));
    assert_eq!(refused(json!({ "colour": 5 }), 6).await, (400, "invalid-metadata".into()));
    assert_eq!(refused(json!([]), 6).await, (400, "invalid-metadata".into()));
    let expected = json!({ "expected_root": Root::of_bytes(b"else").to_string() });
    assert_eq!(refused(expected, 6).await, (422, "chunk-value".into()));
    assert_eq!(refused(json!({ "home": "dc-z" }), 6).await, (400, "invalid-parameter".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_begun_or_belongs_elsewhere_goes_the_long_way() {
    let bed = Bed::start(2).await;
    // A chunk came first; the metadata came first; it is to be reassembled elsewhere.
    let bytes = noise(5, 2000);
    for n in 0..3 {
        let id = Uuid::now_v7();
        let mut said = json!({ "id": id });
        match n {
            0 => {
                bed.put(A, id, 0, bytes.clone()).await.unwrap();
            }
            1 => {
                bed.post(A, &new_file(id, 2000)).await;
                said["name"] = new_file(id, 2000).name.into();
            }
            _ => said = json!({ "id": id, "home": "dc-b" }),
        }
        let answer = bed.post_whole(A, &said, bytes.clone()).await.unwrap();
        assert!(answer.status.is_success(), "{n}: {:?}", answer.body);
        let status = bed.reach(B, id, State::Assembled).await;
        assert_eq!(status.home, if n == 2 { "dc-b" } else { "dc-a" });
        assert!(bed.read(A, id, Root::of_bytes(&bytes)).await == bytes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_sends_a_small_file_in_one_request_and_resumes_like_any_other() {
    let bed = Bed::start(2).await;
    for len in [0, 1, 5000, MIB] {
        let uploaded = bed.upload(&[A, B], noise(7, len), WaitFor::Assembled).await;
        assert_eq!(uploaded.state, State::Assembled);
        assert_eq!(uploaded.chunks_sent, u64::from(len > 0));
        let options = UploadOptions { id: Some(uploaded.id), wait: WaitFor::Assembled, ..Default::default() };
        let source = Source::memory(noise(7, len));
        let again = bed.client(&[B, A]).upload(&source, &options, unobserved()).await.unwrap();
        assert_eq!((again.id, again.chunks_sent, again.root), (uploaded.id, 0, uploaded.root));
    }
    let whole = async |outcome| {
        let labels = format!("door=\"http\",outcome=\"{outcome}\"");
        bed.metric(A, "sluice_whole_files_total", &labels).await
            + bed.metric(B, "sluice_whole_files_total", &labels).await
    };
    assert_eq!(whole("stored").await, 4.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_file_expires_everywhere() {
    let mut bed = Bed::start(2).await;
    let id = Uuid::now_v7();
    let answer = bed.post_whole(A, &json!({ "id": id, "expires_in": 3 }), noise(1, 100)).await.unwrap();
    assert_eq!(answer.status, 201);
    bed.cluster.kill(A).await;
    bed.cluster.start(A).await.unwrap();
    for dc in [A, B] {
        assert_eq!(bed.answers(dc, id, 410).await.problem(), "dropped");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_datacenter_missed_while_it_was_down_it_learns_by_comparing() {
    let mut bed = Bed::start(2).await;
    bed.cluster.kill(B).await;
    let mut ids = BTreeSet::new();
    for n in 0..120u64 {
        let answer = bed.post_whole(A, &json!({ "name": n.to_string() }), noise(n, 100)).await.unwrap();
        ids.insert(answer.json::<FileStatus>().id);
    }
    let gone: Vec<Uuid> = ids.iter().copied().take(20).collect();
    for id in &gone {
        assert_eq!(bed.delete(A, *id).await, StatusCode::NO_CONTENT);
        ids.remove(id);
    }
    bed.cluster.start(B).await.unwrap();
    eventually("all of them at dc-b", async || {
        let answer = bed.get(B, "/files?limit=1000", &[]).await;
        let page: FilePage = (answer.status == 200).then(|| answer.json())?;
        let listed: BTreeSet<Uuid> = page.files.iter().map(|file| file.id).collect();
        (listed == ids).then_some(())
    })
    .await;
    for id in &gone {
        assert_eq!(bed.answers(B, *id, 410).await.problem(), "dropped");
    }
}
