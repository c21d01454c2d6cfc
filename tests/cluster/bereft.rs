//! A home that dies when nobody else has the metadata: the client has it, and brings it to the others.
//!
//! Wires that are cut see to it that the others cannot have fetched it, and have heard of the file or not, as a test wants.

use std::collections::BTreeSet;

use sluice_client::{Source, UploadOptions, Uploaded, WaitFor, unobserved};
use sluice_engine::hash::Root;
use sluice_engine::ids::DcId;
use sluice_proto::http::{CreateFile, FileStatus, ProblemDetails, State};
use uuid::Uuid;

use crate::bed::{
    A, B, Bed, C, MIB, acknowledgements, chunk, chunks_in, eventually, new_file, noise, shuffled,
};
use crate::takeover::{agreed, impatient, taken_by};
use crate::wire::Wire;

const ALL: [DcId; 3] = [A, B, C];

fn others(home: DcId) -> impl Iterator<Item = DcId> {
    ALL.into_iter().filter(move |dc| *dc != home)
}

/// Three datacenters, two of which can fetch nothing from `home`. They hear it all the same, if they `hear`.
async fn apart(home: DcId, hear: bool) -> (Bed, Vec<Wire>) {
    let mut bed = Bed::reserve(3, impatient());
    let mut wires = Vec::new();
    for other in others(home) {
        wires.push(bed.wire(other, home).await);
        if !hear {
            wires.push(bed.wire(home, other).await);
        }
    }
    wires.iter().for_each(Wire::cut);
    for dc in ALL {
        bed.cluster.start(dc).await.unwrap();
    }
    (bed, wires)
}

/// Waits until the others know that there is such a file, and shows that they know no more.
async fn heard(bed: &Bed, home: DcId, id: Uuid) {
    for dc in others(home) {
        eventually("word of the file", async || {
            let answer = bed.get(dc, &format!("/files/{id}"), &[]).await;
            let details: ProblemDetails = answer.json();
            assert_eq!((answer.status.as_u16(), details.code()), (503, "no-metadata"));
            details.detail.starts_with("the file is known").then_some(())
        })
        .await;
    }
}

/// Until all stand alike, with one copy in one home, from which each gives out these bytes.
async fn settled(bed: &Bed, id: Uuid, bytes: &[u8]) {
    let root = Root::of_bytes(bytes);
    let home = eventually("one home", async || {
        let mut homes = BTreeSet::new();
        for dc in ALL {
            let status: FileStatus = bed.get(dc, &format!("/files/{id}"), &[]).await.json();
            homes.insert((status.state == State::Assembled).then_some((status.home, status.home_epoch))?);
        }
        homes.pop_first().filter(|_| homes.is_empty())
    })
    .await;
    let dc = ALL.into_iter().zip(["dc-a", "dc-b", "dc-c"]).find(|(_, name)| *name == home.0).unwrap();
    agreed(bed, &ALL, id, (dc.1, dc.0), root).await;
    for dc in ALL {
        assert!(bed.read(dc, id, root).await == bytes, "at {dc}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_goes_on_when_its_home_dies_before_anybody_has_its_metadata() {
    for (hear, home) in [(false, None), (true, None), (true, Some("dc-a"))] {
        let (mut bed, wires) = apart(A, hear).await;
        let bytes = noise(140, 48 * MIB + 5);
        let (observer, mut seen) = acknowledgements();
        let source = Source::memory(bytes.clone());
        let id = Uuid::now_v7();
        let home = home.map(str::to_owned);
        let options =
            UploadOptions { id: Some(id), is_new: true, home, wait: WaitFor::Assembled, ..shuffled() };
        let client = bed.client(&ALL);
        let (sent, ()) = tokio::join!(client.upload(&source, &options, observer), async {
            let some_each =
                |seen: &Vec<_>| ["dc-a", "dc-b", "dc-c"].into_iter().all(|dc| !taken_by(seen, dc).is_empty());
            seen.wait_for(some_each).await.unwrap();
            if hear {
                heard(&bed, A, id).await;
            }
            bed.cluster.kill(A).await;
        });
        let sent = sent.unwrap();
        assert_eq!((sent.root, sent.state), (Root::of_bytes(&bytes), State::Assembled));
        assert!(["dc-b", "dc-c"].contains(&sent.home.as_str()), "{}", sent.home);
        let all = seen.borrow().clone();
        let (lost, kept) = (taken_by(&all, "dc-a"), &taken_by(&all, "dc-b") | &taken_by(&all, "dc-c"));
        assert_eq!((kept.len(), chunks_in(&all)), (49, sent.chunks_sent));
        assert_eq!(sent.chunks_sent, 49 + lost.len() as u64, "what others had was not sent again");

        wires.iter().for_each(Wire::mend);
        bed.cluster.start(A).await.unwrap();
        settled(&bed, id, &bytes).await;
    }
}

/// What a client that has gone, too, left behind: the file, created at dc-a, and four chunks in each datacenter.
async fn left_behind(bed: &mut Bed, file: &CreateFile, bytes: &bytes::Bytes, hear: bool) {
    let id = file.id.unwrap();
    assert!(bed.post(A, file).await.status.is_success());
    if hear {
        heard(bed, A, id).await;
    }
    for (dc, start) in [(B, 0), (C, 4), (A, 8)] {
        for index in start..start + 4 {
            let taken = bed.put(dc, id, index, chunk(bytes, index as usize)).await.unwrap();
            assert!(taken.status.is_success(), "{:?}", taken.body);
        }
    }
    bed.cluster.kill(A).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_client_carries_on_and_sends_what_died_with_the_only_metadata() {
    for hear in [false, true] {
        for streams in [false, true] {
            let (mut bed, wires) = apart(A, hear).await;
            let bytes = noise(141, 12 * MIB + 9);
            let id = Uuid::now_v7();
            let mut file = new_file(id, bytes.len());
            file.size = file.size.filter(|_| !streams);
            left_behind(&mut bed, &file, &bytes, hear).await;
            let options = UploadOptions {
                id: Some(id),
                name: file.name.clone(),
                wait: WaitFor::Assembled,
                ..UploadOptions::default()
            };
            let client = bed.client(&ALL);
            let sent: Uploaded = match streams {
                true => client.upload_stream(&bytes[..], &options, unobserved()).await.unwrap(),
                false => client.upload(&Source::memory(bytes.clone()), &options, unobserved()).await.unwrap(),
            };
            let case = format!("heard {hear}, stream {streams}");
            assert_eq!((sent.chunks_skipped, sent.chunks_sent), (8, 5), "{case}");
            assert_eq!(sent.state, State::Assembled, "{case}");
            wires.iter().for_each(Wire::mend);
            bed.cluster.start(A).await.unwrap();
            settled(&bed, id, &bytes).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_file_comes_again_whichever_its_home_was() {
    for (home, hear) in [(A, false), (A, true), (C, false), (C, true)] {
        let (mut bed, wires) = apart(home, hear).await;
        let bytes = noise(142, 5);
        let id = bed.create(home, bytes.len()).await;
        if hear {
            heard(&bed, home, id).await;
        }
        bed.cluster.kill(home).await;
        let options = UploadOptions {
            id: Some(id),
            name: "test.bin".into(),
            wait: WaitFor::Assembled,
            ..UploadOptions::default()
        };
        let client = bed.client(&ALL);
        let sent = client.upload(&Source::memory(bytes.clone()), &options, unobserved()).await.unwrap();
        assert_eq!((sent.state, sent.root), (State::Assembled, Root::of_bytes(&bytes)));
        wires.iter().for_each(Wire::mend);
        bed.cluster.start(home).await.unwrap();
        settled(&bed, id, &bytes).await;
    }
}
