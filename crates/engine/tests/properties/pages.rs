//! Pages: a ledger that hands out and reads back at random equals one that never does, and clusters whose files have
//! several segments finish whatever happens to the pages.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use proptest::prelude::*;
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, RecordDigest, Root};
use sluice_engine::ledger::{Fact, FileState, Ledger, Page, Taken, Verdict};
use sluice_engine::limits::{CHUNK_LEN, SEGMENT_CHUNKS, STRIPE_CHUNKS};
use sluice_engine::rules::Rules;
use sluice_engine::span::Place;
use sluice_engine::span_tree::SpanTree;

use crate::agreement::answered;
use crate::cluster::Cluster;
use crate::world::{TENANT, claim, dc, generation, places, shape, span, value, values};

const LEVEL: u8 = 2;

#[derive(Clone, Debug)]
enum Step {
    Have(u16, usize),
    /// A holder begins again under its next generation.
    Raise(u16),
    Out(u64),
    In,
    Lose(u64),
    Absent(u16, bool),
}

fn arb_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (1u16..4, any::<usize>()).prop_map(|(holder, at)| Step::Have(holder, at)),
        1 => (1u16..4).prop_map(Step::Raise),
        6 => (0u64..8).prop_map(Step::Out),
        2 => Just(Step::In),
        1 => (0u64..8).prop_map(Step::Lose),
        1 => (1u16..4, any::<bool>()).prop_map(|(holder, absent)| Step::Absent(holder, absent)),
    ]
}

/// A ledger and the pages that it handed out.
struct Paged {
    ledger: Ledger,
    store: BTreeMap<u64, Page>,
}

impl Paged {
    fn out(&mut self, segment: u64) {
        if let Some(page) = self.ledger.page_out(segment) {
            assert!(self.ledger.is_paged(segment));
            assert_eq!(Page::from_bytes(&page.to_bytes()), Ok(page.clone()));
            self.store.insert(segment, page);
        }
    }

    fn read_recalled(&mut self) {
        loop {
            let next = self.ledger.recalled().next();
            let Some(segment) = next else { return };
            self.ledger.page_in(&self.store[&segment]);
            assert!(!self.ledger.is_paged(segment));
        }
    }

    fn read_all(&mut self) {
        self.ledger.recall_all();
        self.read_recalled();
    }
}

fn start(file: Geometry) -> Ledger {
    let mut ledger = Ledger::new(Rules::all().with_segments_of(LEVEL));
    let digest = RecordDigest::from_bytes([1; 32]);
    ledger.take(Fact::Meta { claim: claim(0, 1), size: Some(file), tenant: TENANT, digest }).unwrap();
    ledger
}

/// What must not depend on what is paged.
type Outside = (Vec<u64>, Vec<Option<[u8; 32]>>, Vec<std::ops::Range<u64>>);

fn outside(ledger: &Ledger) -> Outside {
    let held = (1..4).map(|holder| ledger.chunks_held_by(dc(holder))).collect();
    let digests = (2..4).map(|peer| ledger.digest_between(dc(1), dc(peer))).collect();
    (held, digests, ledger.missing(0..u64::MAX, 1_000))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3_000))]

    #[test]
    fn paging_changes_nothing(chunks in 5u64..33, steps in proptest::collection::vec(arb_step(), 0..120)) {
        let file = shape(chunks);
        let all = values(file, None);
        let places = places(file);
        let (mut plain, mut paged) = (start(file), Paged { ledger: start(file), store: BTreeMap::new() });
        let mut generations = [1u64; 4];
        for step in steps {
            match step {
                Step::Have(holder, at) => {
                    let place = places[at % places.len()];
                    let fact = Fact::Have {
                        holder: dc(holder),
                        generation: generation(generations[usize::from(holder)]),
                        span: span(file, place, &all),
                    };
                    plain.take(fact).unwrap();
                    paged.ledger.take(fact).unwrap();
                }
                Step::Raise(holder) => {
                    generations[usize::from(holder)] += 1;
                    let generation = generation(generations[usize::from(holder)]);
                    let fact = Fact::HaveNothing { holder: dc(holder), generation };
                    plain.take(fact).unwrap();
                    paged.ledger.take(fact).unwrap();
                }
                Step::Out(segment) => paged.out(segment),
                Step::In => paged.read_all(),
                Step::Lose(segment) => {
                    // Whoever stood in the page says again what it has there.
                    let Some(place) = segment_place(file, segment) else { continue };
                    for holder in paged.ledger.lose_page(segment) {
                        for span in plain.held_by(holder).into_iter().flat_map(|(_, tree)| tree.overlapping(place)) {
                            let (number, _) = plain.held_by(holder).unwrap();
                            let fact = Fact::Have { holder, generation: number, span };
                            paged.ledger.take(fact).unwrap();
                        }
                    }
                }
                Step::Absent(holder, absent) => {
                    plain.set_absent(dc(holder), absent);
                    paged.ledger.set_absent(dc(holder), absent);
                }
            }
            // Until it is read again, what is recalled may count twice; never what is not.
            if paged.ledger.recalled().next().is_none() {
                prop_assert_eq!(outside(&plain), outside(&paged.ledger));
            }
        }
        paged.read_recalled();
        prop_assert_eq!(outside(&plain), outside(&paged.ledger));
        let verdict = answered(&mut plain, |_| all.clone());
        let same = loop {
            match answered(&mut paged.ledger, |_| all.clone()) {
                Verdict::Unpage(_) => paged.read_recalled(),
                verdict => break verdict,
            }
        };
        prop_assert_eq!(same, verdict);
        paged.read_all();
        let holders = |ledger: &Ledger| {
            let spans = |(dc, number, tree): (_, _, &SpanTree)| (dc, number, tree.iter().collect::<Vec<_>>());
            ledger.holders().map(spans).collect::<Vec<_>>()
        };
        prop_assert_eq!(holders(&plain), holders(&paged.ledger));
        prop_assert_eq!(
            plain.union().iter().collect::<Vec<_>>(),
            paged.ledger.union().iter().collect::<Vec<_>>()
        );
    }

    #[test]
    fn what_contradicts_a_page_is_found(chunks in 5u64..33, bad in 0u64..33, out in proptest::bool::ANY) {
        // Everything is said by 2 and 3 in turn and paged out; then 1 has one chunk otherwise.
        let file = shape(chunks);
        let (all, other) = (values(file, None), values(file, Some(bad % chunks)));
        let mut paged = Paged { ledger: start(file), store: BTreeMap::new() };
        let have = |holder: u16, index: u64, values: &[ChainingValue]| Fact::Have {
            holder: dc(holder),
            generation: generation(1),
            span: span(file, crate::world::chunk(index), values),
        };
        for index in 0..chunks {
            paged.ledger.take(have(2 + (index % 2) as u16, index, &all)).unwrap();
        }
        if out {
            (0..chunks.div_ceil(1 << LEVEL)).for_each(|segment| paged.out(segment));
        }
        paged.ledger.take(have(1, bad % chunks, &other)).unwrap();
        if let Verdict::Unpage(segments) = paged.ledger.verdict() {
            prop_assert_eq!(segments, vec![(bad % chunks) >> LEVEL]);
            paged.read_recalled();
        }
        match paged.ledger.verdict() {
            Verdict::Disagree(place) => prop_assert!(place.range(file).contains(&(bad % chunks))),
            verdict => prop_assert!(false, "{verdict:?}"),
        }
    }
}

fn segment_place(file: Geometry, segment: u64) -> Option<Place> {
    let start = segment << LEVEL;
    (start < file.chunks()).then(|| Place::clipped(start, LEVEL, file))
}

/// Three real segments and a bit, and its root.
static LARGE: LazyLock<(Geometry, Vec<ChainingValue>, Root)> = LazyLock::new(|| {
    let file = Geometry::new((3 * SEGMENT_CHUNKS + 5) * CHUNK_LEN - 17).unwrap();
    let values: Vec<ChainingValue> = (0..file.chunks()).map(|i| value(i, 0)).collect();
    let mut tree = SpanTree::new(file);
    for place in Place::tile(0..file.chunks(), 10, file) {
        tree.insert(span(file, place, &values)).unwrap();
    }
    (file, values, tree.root().unwrap())
});

fn stripes(file: Geometry) -> Vec<Place> {
    Place::tile(0..file.chunks(), STRIPE_CHUNKS.trailing_zeros() as u8, file)
}

/// Three datacenters with a file whose stripes go round, up to but without the last.
fn nearly_uploaded() -> Cluster {
    let (file, values, _) = &*LARGE;
    let mut cluster = Cluster::new(3, *file, values, Rules::all());
    let stripes = stripes(*file);
    for (i, stripe) in stripes.iter().enumerate().take(stripes.len() - 1) {
        cluster.put(dc(1 + (i % 3) as u16), *stripe);
        if i % 64 == 0 {
            cluster.run(1_000);
        }
    }
    cluster.run(2_000);
    cluster
}

fn finish(mut cluster: Cluster) -> Cluster {
    let last = *stripes(cluster.file).last().unwrap();
    cluster.put(dc(2), last);
    cluster.run(120_000);
    cluster
}

fn assert_assembled(cluster: &Cluster) {
    let root = LARGE.2;
    for id in [dc(1), dc(2), dc(3)] {
        assert_eq!(cluster.state(id), FileState::Assembled, "{id}: {:?}", cluster.counts);
        assert_eq!(cluster.ledger(id).root(), Some(root));
    }
    assert_eq!(cluster.published(dc(1)), Some(root));
    assert_eq!((cluster.holds(dc(2)), cluster.holds(dc(3))), (0, 0), "others freed theirs");
}

#[test]
fn a_file_of_several_segments_is_paged_out_and_assembled() {
    let cluster = nearly_uploaded();
    assert_eq!(cluster.ledger(dc(1)).paged().collect::<Vec<_>>(), [0, 1, 2], "{:?}", cluster.counts);
    assert!(cluster.ledger(dc(1)).spans() < 16, "{}", cluster.ledger(dc(1)).spans());
    let cluster = finish(cluster);
    assert_assembled(&cluster);
    assert!(cluster.ledger(dc(1)).spans() < 16, "{}", cluster.ledger(dc(1)).spans());
}

#[test]
fn lost_pages_are_said_again() {
    let mut cluster = nearly_uploaded();
    cluster.lose_pages = 3;
    let cluster = finish(cluster);
    assert_eq!(cluster.counts.pages_lost, 3);
    assert_assembled(&cluster);
}

#[test]
fn a_holder_that_begins_again_is_taken_out_of_the_pages_and_put_back() {
    let mut cluster = nearly_uploaded();
    cluster.restart(dc(3));
    cluster.run(60_000);
    assert_eq!(cluster.ledger(dc(1)).paged().count(), 3, "{:?}", cluster.counts);
    let cluster = finish(cluster);
    assert_assembled(&cluster);
}

#[test]
fn a_home_that_begins_again_asks_for_everything() {
    let mut cluster = nearly_uploaded();
    cluster.restart(dc(1));
    cluster.run(60_000);
    assert_eq!(cluster.ledger(dc(1)).paged().count(), 3, "{:?}", cluster.counts);
    let cluster = finish(cluster);
    assert_assembled(&cluster);
}

#[test]
fn an_absent_holder_leaves_the_pages_and_comes_back() {
    let mut cluster = nearly_uploaded();
    cluster.cut(dc(1), dc(2), true);
    cluster.run(90_000);
    let missing: u64 =
        cluster.ledger(dc(1)).missing(0..u64::MAX, 100_000).iter().map(|gap| gap.end - gap.start).sum();
    assert!(
        missing > SEGMENT_CHUNKS && missing < SEGMENT_CHUNKS + SEGMENT_CHUNKS / 8,
        "a third is missing: {missing}"
    );
    cluster.cut(dc(1), dc(2), false);
    cluster.run(60_000);
    assert_eq!(cluster.ledger(dc(1)).paged().count(), 3, "{:?}", cluster.counts);
    let cluster = finish(cluster);
    assert_assembled(&cluster);
}

#[test]
fn another_version_of_a_paged_chunk_is_a_conflict() {
    let mut cluster = nearly_uploaded();
    let (_, values, _) = &*LARGE;
    let mut other = values.clone();
    other[70_000] = value(70_000, 1);
    // Stripe 1093 is at datacenter 2; a client sends a chunk of it to 3, too.
    let stripe = Place::new(70_000 / STRIPE_CHUNKS * STRIPE_CHUNKS, 6).unwrap();
    cluster.set_values(dc(3), other);
    cluster.put(dc(3), stripe);
    cluster.run(5_000);
    assert_eq!(cluster.state(dc(1)), FileState::Receiving);
    cluster.set_values(dc(2), values.clone());
    let cluster = finish(cluster);
    for id in [dc(1), dc(2), dc(3)] {
        assert_eq!(cluster.state(id), FileState::Conflict);
    }
    let place = cluster.ledger(dc(1)).disagreement().unwrap().place;
    assert!(place.range(cluster.file).contains(&70_000), "{place}");
}

/// A paged segment that only a larger span kept whole is open, and its page is asked for, once that span is gone.
#[test]
fn a_segment_that_a_larger_span_had_is_open_without_it() {
    let file = shape(16);
    let all = values(file, None);
    let mut ledger = start(file);
    let have = |ledger: &mut Ledger, holder, at| {
        ledger.take(Fact::Have { holder: dc(holder), generation: generation(1), span: span(file, at, &all) })
    };
    have(&mut ledger, 1, crate::world::place(0, 3)).unwrap();
    have(&mut ledger, 1, crate::world::place(8, 3)).unwrap();
    have(&mut ledger, 2, crate::world::chunk(4)).unwrap();
    have(&mut ledger, 3, crate::world::chunk(5)).unwrap();
    have(&mut ledger, 4, crate::world::place(0, 2)).unwrap();
    let (left, right) = Place::top_children(file).unwrap();
    let root = Root::merge(&span(file, left, &all).value, &span(file, right, &all).value);
    ledger.take(Fact::Root { size: file, root }).unwrap();
    let page = ledger.page_out(1).expect("two pieces inside a larger span, and the root is known");
    assert_eq!(page.entries.len(), 2);
    assert_eq!((ledger.recalled().count(), ledger.union().is_whole()), (0, true));
    assert_eq!((ledger.chunks_held_by(dc(2)), ledger.chunks_held_by(dc(3))), (1, 1));
    ledger.take(Fact::HaveNothing { holder: dc(1), generation: generation(2) }).unwrap();
    assert_eq!(ledger.recalled().collect::<Vec<_>>(), [1]);
    ledger.page_in(&page);
    assert_eq!(ledger.missing(0..16, 9), std::slice::from_ref(&(6..16)));
    assert_eq!((ledger.chunks_held_by(dc(2)), ledger.chunks_held_by(dc(3))), (1, 1));
}

/// Numbers of a page that nobody wrote, at the edges of what is read.
#[test]
fn pages_of_the_wrong_length_are_refused() {
    let entry =
        |i: u64| (dc(1), generation(i), span(shape(16), crate::world::chunk(i), &values(shape(16), None)));
    let page = Page { segment: 1 << 40, entries: (0..3).map(entry).collect() };
    let bytes = page.to_bytes();
    assert_eq!(Page::from_bytes(&bytes), Ok(page));
    for len in 0..bytes.len() {
        assert!(Page::from_bytes(&bytes[..len]).is_err(), "{len}");
    }
    assert!(Page::from_bytes(&[&bytes[..], &[0]].concat()).is_err());
    for at in [0, 3, 12, 15] {
        let mut other = bytes.clone();
        other[at] ^= 1;
        assert!(Page::from_bytes(&other).is_err(), "byte {at}");
    }
    let mut misplaced = bytes;
    misplaced[16 + 18] = 1;
    misplaced[16 + 17] = 1;
    assert!(matches!(Page::from_bytes(&misplaced), Err(sluice_engine::ledger::PageError::Place(_))));
}

/// What is said of a paged segment waits for its page, whoever says it.
#[test]
fn what_comes_late_waits_for_its_page() {
    let file = shape(16);
    let all = values(file, None);
    let mut ledger = start(file);
    let have = |ledger: &mut Ledger, holder, at| {
        let span = span(file, at, &all);
        ledger.take(Fact::Have { holder: dc(holder), generation: generation(1), span }).unwrap()
    };
    have(&mut ledger, 2, crate::world::place(0, 1));
    have(&mut ledger, 3, crate::world::place(2, 1));
    have(&mut ledger, 4, crate::world::chunk(9));
    let page = ledger.page_out(0).expect("whole, agreed, and in two pieces");
    for at in [crate::world::chunk(0), crate::world::place(0, 1), crate::world::place(0, 2)] {
        assert_eq!(have(&mut ledger, 4, at), Taken::Known, "{at}");
        assert_eq!(ledger.held_by(dc(4)).map(|(_, tree)| tree.covered()), Some(1), "{at} is not in memory");
    }
    assert_eq!(ledger.recalled().collect::<Vec<_>>(), [0]);
    // A larger span is no matter of one page.
    assert_eq!(have(&mut ledger, 5, crate::world::place(0, 3)), Taken::New);
    assert_eq!(ledger.chunks_held_by(dc(5)), 8);
    ledger.page_in(&page);
    assert_eq!(ledger.held_by(dc(4)).map(|(_, tree)| tree.covered()), Some(5));
    assert_eq!((ledger.chunks_held_by(dc(2)), ledger.chunks_held_by(dc(3))), (2, 2));
}
