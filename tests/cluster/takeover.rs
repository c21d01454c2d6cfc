//! A home that is gone: another datacenter takes its files over, and agrees with it should it come back.

use std::collections::BTreeSet;
use std::time::Duration;

use sluice::datacenter::DatacenterSettings;
use sluice_aggregator::AggregatorSettings;
use sluice_client::{Source, UploadOptions, WaitFor, unobserved};
use sluice_engine::hash::Root;
use sluice_engine::ids::DcId;
use sluice_proto::http::{FilePage, FileStatus, State};
use sluice_store::FileSummary;
use uuid::Uuid;

use crate::bed::{
    A, Acknowledged, B, Bed, C, MIB, acknowledgements, chunk, chunks_in, eventually, noise, shuffled,
};
use crate::wire::Wire;

/// Datacenters that do not wait long for one another.
pub(crate) fn impatient() -> DatacenterSettings {
    let aggregator = AggregatorSettings {
        takeover_after: Some(Duration::from_secs(1)),
        absent_after: Duration::from_millis(500),
        compare_every: Duration::from_secs(1),
        ..AggregatorSettings::default()
    };
    DatacenterSettings { aggregator, ..DatacenterSettings::default() }
}

async fn start(dcs: &[DcId]) -> Bed {
    let mut bed = Bed::reserve(dcs.len() as u16, impatient());
    for dc in dcs {
        bed.cluster.start(*dc).await.unwrap();
    }
    bed
}

/// The chunks that one datacenter acknowledged.
pub(crate) fn taken_by(seen: &[Acknowledged], dc: &str) -> BTreeSet<u64> {
    let of_dc = seen.iter().filter(|(name, ..)| name == dc);
    of_dc.flat_map(|(_, start, count)| *start..start + count).collect()
}

async fn summary(bed: &Bed, dc: DcId, id: Uuid) -> FileSummary {
    let store = bed.cluster.running(dc).unwrap().store().clone();
    store.summary(Bed::file_id(id)).await.unwrap().unwrap()
}

/// Until all of them stand alike, with one home and one copy.
pub(crate) async fn agreed(bed: &Bed, dcs: &[DcId], id: Uuid, home: (&str, DcId), root: Root) {
    for dc in dcs {
        eventually("one home", async || {
            let status: FileStatus = bed.get(*dc, &format!("/files/{id}"), &[]).await.json();
            let stands = (status.state, status.home.as_str(), status.root.as_deref());
            (stands == (State::Assembled, home.0, Some(&root.to_string()))).then_some(())
        })
        .await;
    }
    for dc in dcs {
        eventually("one copy", async || {
            let held = summary(bed, *dc, id).await;
            (held.held.is_empty() != (*dc == home.1) && held.published.is_some() == (*dc == home.1))
                .then_some(())
        })
        .await;
    }
}

/// Waits until a datacenter has the metadata record: without one it can take nothing over.
async fn recorded(bed: &Bed, dc: DcId, id: Uuid) {
    eventually("the record", async || {
        let page: FilePage = bed.get(dc, "/files", &[]).await.json();
        page.files.iter().any(|file| file.id == id).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_goes_on_when_its_home_dies_for_good_and_only_what_died_with_it_is_sent_again() {
    let mut bed = start(&[A, B]).await;
    let bytes = noise(130, 48 * MIB);
    let (observer, mut seen) = acknowledgements();
    let source = Source::memory(bytes.clone());
    let id = Uuid::now_v7();
    let options = UploadOptions { id: Some(id), is_new: true, wait: WaitFor::Assembled, ..shuffled() };
    let client = bed.client(&[A, B]);
    let (sent, died_with) = tokio::join!(client.upload(&source, &options, observer), async {
        seen.wait_for(|seen| chunks_in(seen) >= 24 && !taken_by(seen, "dc-b").is_empty()).await.unwrap();
        recorded(&bed, B, id).await;
        bed.cluster.kill(A).await;
        seen.borrow().clone()
    });
    let sent = sent.unwrap();
    assert_eq!(
        (sent.root, sent.state, sent.home.as_str()),
        (Root::of_bytes(&bytes), State::Assembled, "dc-b")
    );
    let all = seen.borrow().clone();
    let (lost, kept) = (taken_by(&all, "dc-a"), taken_by(&all, "dc-b"));
    assert!(!lost.is_empty() && taken_by(&died_with, "dc-a").is_subset(&lost));
    assert_eq!(kept.len(), 48, "all is at dc-b now");
    assert_eq!(chunks_in(&all), sent.chunks_sent);
    assert_eq!(sent.chunks_sent, 48 + lost.len() as u64, "what dc-b had was not sent again");
    assert!(bed.read(B, id, sent.root).await == bytes);

    bed.cluster.start(A).await.unwrap();
    agreed(&bed, &[A, B], id, ("dc-b", B), sent.root).await;
    assert!(bed.read(A, id, sent.root).await == bytes, "read through the old home");
    let status: FileStatus = bed.get(A, &format!("/files/{id}"), &[]).await.json();
    assert!(status.home_epoch > 0, "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_three_the_next_takes_over_and_a_new_client_sends_what_nobody_reachable_holds() {
    let mut bed = start(&[A, B, C]).await;
    let bytes = noise(131, 12 * MIB + 9);
    let id = bed.create(A, bytes.len()).await;
    for index in 0..9 {
        let dc = [A, B, C][index % 3];
        let taken = bed.put(dc, id, index as u64, chunk(&bytes, index)).await.unwrap();
        assert!(taken.status.is_success(), "{:?}", taken.body);
    }
    for dc in [B, C] {
        recorded(&bed, dc, id).await;
    }
    bed.cluster.kill(A).await;
    // Until another takes over, it is said that the home was not asked.
    let status: FileStatus = bed.get(C, &format!("/files/{id}"), &[]).await.json();
    assert_eq!((status.state, &status.root), (State::Receiving, &None), "{status:?}");
    eventually("a takeover that everybody heard of", async || {
        let mut homes = Vec::new();
        for dc in [B, C] {
            let status: FileStatus = bed.get(dc, &format!("/files/{id}"), &[]).await.json();
            homes.push((status.home, status.home_answered));
        }
        (homes == [("dc-b".to_owned(), true), ("dc-b".to_owned(), true)]).then_some(())
    })
    .await;
    eventually("word of what dc-c holds", async || {
        let status: FileStatus = bed.get(B, &format!("/files/{id}"), &[]).await.json();
        (status.missing_chunks == 13 - 6).then_some(())
    })
    .await;
    let options =
        UploadOptions { id: Some(id), name: "test.bin".into(), wait: WaitFor::Assembled, ..shuffled() };
    let sent = bed.client(&[A, B, C]).upload(&Source::memory(bytes.clone()), &options, unobserved()).await;
    let sent = sent.unwrap();
    assert_eq!((sent.chunks_sent, sent.chunks_skipped), (7, 6), "three that died with dc-a, four new ones");
    assert_eq!(sent.home, "dc-b");
    bed.cluster.start(A).await.unwrap();
    agreed(&bed, &[A, B, C], id, ("dc-b", B), sent.root).await;
    for dc in [A, B, C] {
        assert!(bed.read(dc, id, sent.root).await == bytes, "at {dc}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_both_assembled_one_copy_stays_whatever_dies_meanwhile() {
    for victim in [None, Some(A), Some(B)] {
        let mut bed = Bed::reserve(2, impatient());
        let wires = [bed.wire(A, B).await, bed.wire(B, A).await];
        for dc in [A, B] {
            bed.cluster.start(dc).await.unwrap();
        }
        let bytes = noise(132, 3 * MIB + 1);
        let root = Root::of_bytes(&bytes);
        let id = bed.create(A, bytes.len()).await;
        for dc in [A, B] {
            assert!(bed.put(dc, id, 0, chunk(&bytes, 0)).await.unwrap().status.is_success());
        }
        recorded(&bed, B, id).await;
        wires.iter().for_each(Wire::cut);
        for (dc, index) in [(A, 1), (B, 1), (B, 2), (A, 3), (A, 2), (B, 3)] {
            bed.put_ok(dc, id, index as u64, chunk(&bytes, index)).await;
        }
        for dc in [A, B] {
            eventually("a copy of its own", async || summary(&bed, dc, id).await.published.map(|_| ())).await;
        }
        wires.iter().for_each(Wire::mend);
        if let Some(victim) = victim {
            bed.cluster.kill(victim).await;
            let other = if victim == A { B } else { A };
            assert!(
                summary(&bed, other, id).await.published.is_some(),
                "there is a copy while {victim} is dead"
            );
            assert!(bed.read(other, id, root).await == bytes);
            bed.cluster.start(victim).await.unwrap();
        }
        // Never is there none.
        eventually("one copy", async || {
            let copies = [summary(&bed, A, id).await, summary(&bed, B, id).await];
            let published = copies.iter().filter(|copy| copy.published.is_some()).count();
            assert!(published > 0, "no copy is left: {copies:?}");
            (published == 1).then_some(())
        })
        .await;
        // Whoever hears of the other one's claim before it reaches that one may take the file back: they are impatient. Which of
        // the two it is does not matter, as long as it is one.
        let home = eventually("the same home at both", async || {
            let mut homes = Vec::new();
            for dc in [A, B] {
                let status: FileStatus = bed.get(dc, &format!("/files/{id}"), &[]).await.json();
                homes.push(status.home);
            }
            (homes[0] == homes[1]).then(|| homes.remove(0))
        })
        .await;
        let at = if home == "dc-a" { A } else { B };
        agreed(&bed, &[A, B], id, (&home, at), root).await;
        for dc in [A, B] {
            assert!(bed.read(dc, id, root).await == bytes, "at {dc}, after the death of {victim:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_file_does_not_wait_for_a_datacenter_that_is_down() {
    let mut bed = start(&[A, B]).await;
    bed.cluster.kill(A).await;
    let bytes = noise(133, 9 * MIB);
    let begun = std::time::Instant::now();
    // Also one whose id was chosen before: whoever is alive cannot rule out that the other knows it.
    for id in [None, Some(Uuid::now_v7())] {
        let options = UploadOptions { id, wait: WaitFor::Assembled, ..UploadOptions::default() };
        let client = bed.client(&[A, B]);
        let sent = client.upload(&Source::memory(bytes.clone()), &options, unobserved()).await.unwrap();
        assert_eq!((sent.home.as_str(), sent.chunks_sent), ("dc-b", 9));
    }
    assert!(begun.elapsed() < crate::bed::PATIENCE / 2, "{:?}", begun.elapsed());
}
