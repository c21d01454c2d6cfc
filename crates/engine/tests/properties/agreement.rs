//! Holders of the same bytes never disagree, and holders of other bytes always do.

use std::collections::BTreeSet;

use proptest::prelude::*;
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, RecordDigest, Root};
use sluice_engine::ids::DcId;
use sluice_engine::ledger::{Fact, Ledger, Verdict};
use sluice_engine::rules::Rules;
use sluice_engine::span::Place;
use sluice_engine::span_tree::SpanTree;

use crate::world::{TENANT, chunk, claim, dc, generation, places, shape, span, values};

fn ledger_of(file: Geometry) -> Ledger {
    let mut ledger = Ledger::new(Rules::all());
    let digest = RecordDigest::from_bytes([1; 32]);
    ledger.take(Fact::Meta { claim: claim(0, 1), size: Some(file), tenant: TENANT, digest }).unwrap();
    ledger
}

/// Says one span, as a holder does that holds these values.
fn say(ledger: &mut Ledger, holder: DcId, place: Place, values: &[ChainingValue]) {
    let file = ledger.file().unwrap();
    let newest = ledger.held_by(holder).map_or(generation(1), |(newest, _)| newest);
    let fact = Fact::Have { holder, generation: newest, span: span(file, place, values) };
    ledger.take(fact).unwrap();
}

/// Answers every comparison that the verdict asks for, until it asks for none; panics if it asks for ever.
pub(crate) fn answered(ledger: &mut Ledger, values_of: impl Fn(DcId) -> Vec<ChainingValue>) -> Verdict {
    let file = ledger.file().unwrap();
    for _ in 0..10_000 {
        let verdict = ledger.verdict();
        let Verdict::Compare(wanted) = verdict else { return verdict };
        assert!(!wanted.is_empty() && wanted.len() <= 64 + 8, "{} wanted", wanted.len());
        for (holder, place) in wanted {
            // As the wire asks: for what is under the node above.
            let parent = place.family(file).expect("only what lies in a larger span is asked for").parent;
            let (left, right) = parent.children(file).expect("a node above");
            say(ledger, holder, left, &values_of(holder));
            say(ledger, holder, right, &values_of(holder));
        }
    }
    panic!("it never ends");
}

fn root_of(file: Geometry, values: &[ChainingValue]) -> Option<Root> {
    let mut tree = SpanTree::new(file);
    for i in 0..file.chunks() {
        tree.insert(span(file, chunk(i), values)).unwrap();
    }
    tree.root()
}

#[derive(Clone, Debug)]
struct Case {
    file: Geometry,
    /// Which places each holder says, as it goes.
    said: Vec<(DcId, Place)>,
    /// Finer values that came unasked.
    details: Vec<(DcId, Place)>,
}

/// Holders that say random places, which overlap at random, and together cover the file.
fn arb_case() -> impl Strategy<Value = Case> {
    let picks = proptest::collection::vec((1u16..4, 0usize..1_000), 0..30);
    let details = proptest::collection::vec((1u16..4, 0usize..1_000), 0..10);
    (1u64..34, picks, details, 1u16..4).prop_map(|(chunks, picks, details, last)| {
        let file = shape(chunks);
        let places = places(file);
        let at = |(holder, i): (u16, usize)| (dc(holder), places[i % places.len()]);
        let mut said: Vec<(DcId, Place)> = picks.into_iter().map(at).collect();
        let covered: BTreeSet<u64> = said.iter().flat_map(|(_, place)| place.range(file)).collect();
        said.extend((0..chunks).filter(|i| !covered.contains(i)).map(|i| (dc(last), chunk(i))));
        Case { file, said, details: details.into_iter().map(at).collect() }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_same_bytes_agree_whatever_is_known(case in arb_case()) {
        let all = values(case.file, None);
        let mut ledger = ledger_of(case.file);
        for (holder, place) in &case.said {
            let before = ledger.verdict();
            prop_assert!(!matches!(before, Verdict::Disagree(_)), "{before:?}");
            say(&mut ledger, *holder, *place, &all);
        }
        for (holder, place) in &case.details {
            if ledger.held_by(*holder).is_some_and(|(_, tree)| tree.covering(*place).is_some()) {
                say(&mut ledger, *holder, *place, &all);
                let verdict = ledger.verdict();
                prop_assert!(!matches!(verdict, Verdict::Disagree(_)), "{verdict:?}");
            }
        }
        let verdict = answered(&mut ledger, |_| all.clone());
        match root_of(case.file, &all) {
            Some(root) => prop_assert_eq!(verdict, Verdict::Whole(root)),
            None => prop_assert_eq!(verdict, Verdict::OneChunk(all[0])),
        }
    }

    #[test]
    fn one_other_chunk_is_found(case in arb_case(), at in 0u64..34, liar in 1u16..4) {
        let bad = at % case.file.chunks();
        let honest = values(case.file, None);
        let other = values(case.file, Some(bad));
        let values_of = |holder: DcId| if holder == dc(liar) { other.clone() } else { honest.clone() };
        let mut ledger = ledger_of(case.file);
        for (holder, place) in &case.said {
            say(&mut ledger, *holder, *place, &values_of(*holder));
        }
        let holds = |holder: DcId| ledger.held_by(holder).is_some_and(|(_, tree)| tree.has(bad));
        let contradicted = holds(dc(liar)) && (1u16..4).any(|other| other != liar && holds(dc(other)));
        let alone = holds(dc(liar));
        match answered(&mut ledger, values_of) {
            Verdict::Disagree(place) => {
                prop_assert!(contradicted, "nobody contradicts {place:?}");
                prop_assert!(place.range(case.file).contains(&bad), "{place:?} does not contain {bad}");
            }
            Verdict::Whole(root) => {
                prop_assert!(!contradicted);
                let expected = if alone { &other } else { &honest };
                prop_assert_eq!(Some(root), root_of(case.file, expected));
            }
            Verdict::OneChunk(value) => {
                prop_assert!(!contradicted);
                prop_assert_eq!(value, if alone { other[0] } else { honest[0] });
            }
            verdict => prop_assert!(false, "{verdict:?}"),
        }
    }
}

#[test]
fn an_empty_file_is_whole_on_its_metadata() {
    assert_eq!(ledger_of(shape(0)).verdict(), Verdict::Whole(Root::empty()));
}

#[test]
fn two_versions_of_the_only_chunk_disagree() {
    let file = shape(1);
    let mut ledger = ledger_of(file);
    say(&mut ledger, dc(2), chunk(0), &values(file, None));
    assert!(matches!(ledger.verdict(), Verdict::OneChunk(_)));
    say(&mut ledger, dc(3), chunk(0), &values(file, Some(0)));
    assert_eq!(ledger.verdict(), Verdict::Disagree(chunk(0)));
}

/// Finer values that nobody asked for are not kept: a peer cannot fill the memory with them.
#[test]
fn unasked_values_cost_no_memory() {
    let file = shape(1 << 12);
    let all = values(file, None);
    let mut ledger = ledger_of(file);
    for place in [Place::top_children(file).unwrap().0, Place::top_children(file).unwrap().1] {
        say(&mut ledger, dc(2), place, &all);
    }
    let before = ledger.clone();
    for i in 0..file.chunks() {
        say(&mut ledger, dc(2), chunk(i), &all);
    }
    assert_eq!(ledger, before);
}

/// What was compared with a holder before it was rejected says nothing of what it says then.
#[test]
fn what_comes_after_a_rejection_is_compared_anew() {
    let file = shape(4);
    let (honest, other) = (values(file, None), values(file, Some(1)));
    let mut ledger = ledger_of(file);
    let (left, right) = Place::top_children(file).unwrap();
    for holder in [dc(2), dc(3)] {
        say(&mut ledger, holder, left, &honest);
        say(&mut ledger, holder, right, &honest);
    }
    assert!(matches!(ledger.verdict(), Verdict::Whole(_)));
    ledger.reject(dc(3), left);
    assert!(matches!(ledger.verdict(), Verdict::Whole(_)), "the other holder has it");
    assert_eq!(ledger.chunks_held_by(dc(3)), 2);
    say(&mut ledger, dc(3), left, &other);
    assert_eq!(ledger.verdict(), Verdict::Disagree(left));
}

/// Nor what was compared with a generation that is over, whichever of the two holders begins again.
#[test]
fn what_comes_under_a_new_generation_is_compared_anew() {
    for (again, beside) in [(3, 2), (2, 3)] {
        let file = shape(4);
        let (honest, other) = (values(file, None), values(file, Some(1)));
        let mut ledger = ledger_of(file);
        let (left, right) = Place::top_children(file).unwrap();
        for holder in [dc(again), dc(beside)] {
            say(&mut ledger, holder, left, &honest);
            say(&mut ledger, holder, right, &honest);
        }
        assert!(matches!(ledger.verdict(), Verdict::Whole(_)));
        ledger.take(Fact::HaveNothing { holder: dc(again), generation: generation(2) }).unwrap();
        say(&mut ledger, dc(again), right, &honest);
        assert!(matches!(ledger.verdict(), Verdict::Whole(_)));
        say(&mut ledger, dc(again), left, &other);
        assert_eq!(ledger.verdict(), Verdict::Disagree(left), "{again} began again");
    }
}
