//! Lists of files.

use std::collections::BTreeSet;

use sluice_client::WaitFor;
use sluice_proto::http::{FilePage, State};
use uuid::Uuid;

use crate::bed::{A, B, Bed, MIB, eventually, noise};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datacenter_lists_what_it_has_to_do_with_in_pages() {
    let bed = Bed::start(2).await;
    let (mut at_a, mut at_b) = (BTreeSet::new(), BTreeSet::new());
    for n in 0..5 {
        at_a.insert(bed.upload(&[A], noise(40 + n, MIB + 1000), WaitFor::Assembled).await.id);
    }
    at_b.insert(bed.upload(&[B], noise(45, MIB + 1000), WaitFor::Assembled).await.id);
    let both = bed.upload(&[A, B], noise(46, 8 * MIB), WaitFor::Assembled).await.id;
    at_a.insert(both);
    at_b.insert(both);
    let unfinished = bed.create(A, 1000).await;
    at_a.insert(unfinished);
    let gone = bed.create(A, 1000).await;
    assert_eq!(bed.delete(A, gone).await, 204);
    assert_eq!(pages(&bed, A, "").await, at_a);
    assert_eq!(pages(&bed, A, "&state=receiving").await, BTreeSet::from([unfinished]));
    eventually("the file of both", async || (pages(&bed, B, "&state=assembled").await == at_b).then_some(()))
        .await;
    let page: FilePage = bed.get(A, "/files?state=assembled&limit=1", &[]).await.json();
    let [first] = page.files.as_slice() else { panic!("{page:?}") };
    assert_eq!(
        (first.state, first.home.as_str(), first.size),
        (State::Assembled, "dc-a", Some(MIB as u64 + 1000))
    );
    assert_eq!(bed.get(A, "/files?limit=0", &[]).await.problem(), "invalid-parameter");
    assert_eq!(bed.get(A, "/files?state=odd", &[]).await.problem(), "invalid-parameter");
}

/// Every id, in pages of two; each page in order, and none twice.
async fn pages(bed: &Bed, dc: sluice_engine::ids::DcId, filter: &str) -> BTreeSet<Uuid> {
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let page: FilePage = bed.get(dc, &format!("/files?limit=2{filter}{after}"), &[]).await.json();
        assert!(page.files.len() <= 2);
        all.extend(page.files.iter().map(|file| file.id));
        match page.next {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    let set: BTreeSet<Uuid> = all.iter().copied().collect();
    assert!(all.is_sorted() && set.len() == all.len(), "{all:?}");
    set
}
