//! Files that go up through several datacenters and come back from any.

use futures_util::future::join_all;
use http::{Method, StatusCode};
use sluice_client::WaitFor;
use sluice_engine::hash::Root;
use sluice_proto::http::{About, CreateFile, State};

use crate::bed::{A, B, Bed, C, MIB, TENANT, eventually, new_file, noise};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_goes_up_through_two_and_comes_back_from_either() {
    let bed = Bed::start(2).await;
    let bytes = noise(1, 20 * MIB + 5);
    let sent = bed.upload(&[A, B], bytes.clone(), WaitFor::Complete).await;
    assert_eq!(sent.root, Root::of_bytes(&bytes));
    assert_eq!((sent.home.as_str(), sent.chunks_sent), ("dc-a", 21));
    for dc in [B, A] {
        // As soon as it is complete, wherever the chunks are by now.
        bed.readable(dc, sent.id).await;
        assert!(bed.read(dc, sent.id, sent.root).await == bytes);
    }
    for dc in [A, B] {
        let status = bed.reach(dc, sent.id, State::Assembled).await;
        assert_eq!((status.missing_chunks, status.root), (0, Some(sent.root.to_string())));
        assert!(bed.read(dc, sent.id, sent.root).await == bytes);
    }
    let home = bed.cluster.running(A).unwrap().store();
    let summary = home.summary(Bed::file_id(sent.id)).await.unwrap().unwrap();
    assert_eq!(summary.published, Some(sent.root));
    // dc-b has heard of the copy, makes sure of it, and keeps nothing itself.
    let there = bed.cluster.running(B).unwrap().store();
    eventually("room at dc-b", async || {
        let summary = there.summary(Bed::file_id(sent.id)).await.unwrap().unwrap();
        summary.held.is_empty().then_some(())
    })
    .await;
    assert!(bed.read(B, sent.id, sent.root).await == bytes, "from dc-a, through dc-b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_every_awkward_size_are_whole() {
    let bed = Bed::start(2).await;
    let sizes =
        [0, 1, 1023, 1025, MIB - 1, MIB, MIB + 1, 2 * MIB, 3 * MIB + 7, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1];
    let bed = &bed;
    let all = sizes.map(|size| async move {
        let bytes = noise(size as u64, size);
        let sent = bed.upload(&[A, B], bytes.clone(), WaitFor::Assembled).await;
        assert_eq!((sent.root, sent.state), (Root::of_bytes(&bytes), State::Assembled), "{size} bytes");
        for dc in [A, B] {
            let status = bed.reach(dc, sent.id, State::Assembled).await;
            assert_eq!(status.size, Some(bytes.len() as u64));
            assert!(bed.read(dc, sent.id, sent.root).await == bytes, "{size} bytes at {dc}");
        }
    });
    join_all(all).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_uploads_at_once_do_not_mind_each_other() {
    let bed = Bed::start(2).await;
    let all = (0..16u64).map(|n| {
        let bed = &bed;
        async move {
            let bytes = noise(100 + n, 4 * MIB + n as usize);
            let dcs = if n.is_multiple_of(2) { [A, B] } else { [B, A] };
            let sent = bed.upload(&dcs, bytes.clone(), WaitFor::Assembled).await;
            let home = if n.is_multiple_of(2) { "dc-a" } else { "dc-b" };
            assert_eq!(sent.home, home);
            let (status, dc) = (bed.reach(dcs[1], sent.id, State::Assembled).await, dcs[1]);
            assert_eq!(status.root, Some(Root::of_bytes(&bytes).to_string()));
            assert!(bed.read(dc, sent.id, sent.root).await == bytes, "file {n} at {dc}");
        }
    });
    join_all(all).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_and_conditions_are_the_same_at_either() {
    let bed = Bed::start(2).await;
    let bytes = noise(3, 5 * MIB + 100);
    let sent = bed.upload(&[A, B], bytes.clone(), WaitFor::Complete).await;
    let path = format!("/files/{}/content", sent.id);
    let etag = format!("\"{}\"", sent.root);
    for dc in [A, B] {
        bed.readable(dc, sent.id).await;
        let whole = bed.get(dc, &path, &[]).await;
        assert_eq!(whole.status, StatusCode::OK, "at {dc}");
        assert_eq!(whole.headers["etag"], etag.as_str());
        assert!(whole.body == bytes);
        let (first, last) = (MIB - 3, 4 * MIB + 2);
        for (range, expected) in [
            (format!("bytes={first}-{last}"), first..last + 1),
            ("bytes=-100".to_owned(), bytes.len() - 100..bytes.len()),
            (format!("bytes={}-", 5 * MIB), 5 * MIB..bytes.len()),
        ] {
            let part = bed.get(dc, &path, &[("range", &range)]).await;
            assert_eq!(part.status, StatusCode::PARTIAL_CONTENT, "{range} at {dc}");
            let named = format!("bytes {}-{}/{}", expected.start, expected.end - 1, bytes.len());
            assert_eq!(part.headers["content-range"], named.as_str());
            assert!(part.body == bytes.slice(expected), "{range} at {dc}");
        }
        let beyond = bed.get(dc, &path, &[("range", "bytes=99999999-")]).await;
        assert_eq!((beyond.status.as_u16(), beyond.problem().as_str()), (416, "range"));
        assert_eq!(bed.get(dc, &path, &[("if-none-match", &etag)]).await.status, StatusCode::NOT_MODIFIED);
        assert_eq!(bed.get(dc, &path, &[("if-match", "\"other\"")]).await.problem(), "precondition");
        let head = bed.ask_as(TENANT, dc, Method::HEAD, &path, &[], "").await.unwrap();
        assert_eq!(head.headers["content-length"], bytes.len().to_string().as_str());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_do_not_notice_that_chunks_move_while_they_read() {
    let bed = Bed::start(2).await;
    for n in 0..8 {
        let bytes = noise(40 + n, 6 * MIB + 5);
        let sent = bed.upload(&[A, B], bytes.clone(), WaitFor::Complete).await;
        let path = format!("/files/{}/content", sent.id);
        let read = |dc| {
            let (bed, path, bytes) = (&bed, &path, &bytes);
            async move {
                bed.readable(dc, sent.id).await;
                let answer = bed.get(dc, path, &[]).await;
                assert!(answer.status == StatusCode::OK && answer.body == bytes, "file {n} at {dc}");
            }
        };
        join_all([A, B, A, B].map(read)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_datacenters_and_a_home_that_was_chosen() {
    let bed = Bed::start(3).await;
    let client = bed.client(&[A, B, C]);
    let bytes = noise(4, 24 * MIB + 1);
    let options = sluice_client::UploadOptions {
        home: Some("dc-c".into()),
        wait: WaitFor::Assembled,
        ..crate::bed::shuffled()
    };
    let source = sluice_client::Source::memory(bytes.clone());
    let sent = client.upload(&source, &options, sluice_client::unobserved()).await.unwrap();
    assert_eq!((sent.home.as_str(), sent.state), ("dc-c", State::Assembled));
    for dc in [A, B, C] {
        let status = bed.reach(dc, sent.id, State::Assembled).await;
        assert_eq!(status.home, "dc-c");
        assert!(bed.read(dc, sent.id, sent.root).await == bytes, "at {dc}");
    }
    let home = bed.cluster.running(C).unwrap().store();
    assert_eq!(home.summary(Bed::file_id(sent.id)).await.unwrap().unwrap().published, Some(sent.root));

    let nowhere = CreateFile { home: Some("dc-x".into()), ..new_file(uuid::Uuid::now_v7(), 1) };
    assert_eq!(bed.post(A, &nowhere).await.problem(), "invalid-parameter");
    let about: About = bed.get(B, "", &[]).await.json();
    let names: Vec<&str> = about.dcs.iter().map(|dc| dc.name.as_str()).collect();
    assert_eq!((about.dc.as_str(), names), ("dc-b", vec!["dc-a", "dc-b", "dc-c"]));
    assert!(about.dcs.iter().all(|dc| dc.reachable && dc.url.is_some()), "{about:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_for_a_state_hears_of_it_at_either() {
    let bed = Bed::start(2).await;
    let bytes = noise(5, 2 * MIB);
    let id = bed.create(A, bytes.len()).await;
    bed.put_ok(A, id, 0, crate::bed::chunk(&bytes, 0)).await;
    // Patience is as long as the test may take: who answers early was told, not timed out.
    let path = format!("/files/{id}?wait=complete&timeout=60");
    let (a, b, _) = tokio::join!(bed.get(A, &path, &[]), bed.get(B, &path, &[]), async {
        let receiving = bed.get(B, &format!("/files/{id}?wait=complete&timeout=0"), &[]).await;
        let status: sluice_proto::http::FileStatus = receiving.json();
        assert_eq!((status.state, status.missing_chunks), (State::Receiving, 1));
        bed.put(B, id, 1, crate::bed::chunk(&bytes, 1)).await.unwrap()
    });
    for answer in [a, b] {
        let status: sluice_proto::http::FileStatus = answer.json();
        assert!(status.state >= State::Complete, "{status:?}");
        assert_eq!(status.root, Some(Root::of_bytes(&bytes).to_string()));
    }
}
