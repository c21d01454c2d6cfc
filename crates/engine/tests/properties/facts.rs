//! G3: equal sets of facts give equal ledgers.

use proptest::prelude::*;
use sluice_engine::command::{DropReason, Statement};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{RecordDigest, Root};
use sluice_engine::ids::{DcId, TenantId};
use sluice_engine::ledger::{Claim, Disagreement, Fact, FileState, Ledger, Taken};
use sluice_engine::rules::Rules;
use sluice_engine::span::{Place, Span};

use crate::world::{claim, dc, generation, place, places, shape, shuffled, span, values};

const DCS: u16 = 3;

/// Everything that two ledgers of the same facts must agree on.
#[derive(Debug, PartialEq)]
struct View {
    state: FileState,
    claim: Option<Claim>,
    root: Option<Root>,
    union: Vec<Span>,
    union_root: Option<Root>,
    holders: Vec<(DcId, u64, Vec<Span>)>,
    statements: Vec<Statement>,
    digests: Vec<Option<[u8; 32]>>,
    spans: usize,
}

fn view(ledger: &Ledger) -> View {
    let holders = ledger
        .holders()
        .map(|(dc, generation, tree)| (dc, generation.number(), tree.iter().collect()))
        .collect();
    let pairs = (1..=DCS).flat_map(|a| (1..=DCS).map(move |b| (dc(a), dc(b))));
    View {
        state: ledger.state(),
        claim: ledger.claim(),
        root: ledger.root(),
        union: ledger.union().iter().collect(),
        union_root: ledger.union().root(),
        holders,
        statements: ledger.statements(),
        digests: pairs.map(|(a, b)| ledger.digest_between(a, b)).collect(),
        spans: ledger.spans(),
    }
}

/// Takes facts in this order; those that came too early again until they are taken.
fn taken(facts: &[Fact]) -> Ledger {
    let mut ledger = Ledger::new(Rules::all());
    let mut open: Vec<Fact> = facts.to_vec();
    loop {
        let before = open.len();
        open.retain(|fact| ledger.take(*fact) == Ok(Taken::NotYet));
        if open.is_empty() || open.len() == before {
            return ledger;
        }
    }
}

fn arb_place(file: Geometry) -> impl Strategy<Value = Place> {
    let places = places(file);
    let some = (0..places.len().max(1)).prop_map(move |i| places.get(i).copied());
    some.prop_filter_map("an empty file has no place", |place| place)
}

fn digest(n: u8) -> RecordDigest {
    RecordDigest::from_bytes([n; 32])
}

/// Any fact about a file of this shape (now and then of another), said by honest holders of one content.
fn arb_fact(file: Geometry) -> impl Strategy<Value = Fact> {
    let size = prop_oneof![
        20 => Just(Some(file)),
        2 => Just(None),
        1 => Just(Some(shape(file.chunks() + 1))),
        1 => Just(Some(shape(file.chunks().saturating_sub(1))))
    ];
    let of_file = prop_oneof![20 => Just(file), 1 => Just(shape(file.chunks() + 1))];
    let arb_claim = (0u8..3, 1..=DCS).prop_map(|(epoch, home)| claim(epoch, home));
    let all = values(file, None);
    let root = (0u8..20).prop_map(|n| Root::from_bytes([n / 19; 32]));
    let have = (1..=DCS, 1u64..4, arb_place(file)).prop_map(move |(holder, number, place)| Fact::Have {
        holder: dc(holder),
        generation: generation(number),
        span: span(file, place, &all),
    });
    let meta = (arb_claim.clone(), size, 0u8..20, 0u64..20).prop_map(|(claim, size, n, tenant)| Fact::Meta {
        claim,
        size,
        tenant: TenantId::new(tenant / 19),
        digest: digest(n / 19),
    });
    prop_oneof![
        30 => have,
        6 => meta,
        4 => (1..=DCS, 1u64..5).prop_map(|(holder, number)| Fact::HaveNothing {
            holder: dc(holder),
            generation: generation(number),
        }),
        1 => (of_file.clone(), root.clone()).prop_map(|(size, root)| Fact::Root { size, root }),
        1 => (arb_claim, of_file, root).prop_map(|(claim, size, root)| Fact::Assembled { claim, size, root }),
        1 => (arb_place(file), 1..=DCS, any::<bool>()).prop_map(|(place, home, found)| {
            let found = found.then_some(Root::from_bytes([9; 32]));
            Fact::Conflict(Disagreement { place, found, home: dc(home) })
        }),
        1 => (1u8..=3, 0u64..3).prop_map(|(reason, tenant)| Fact::Drop {
            reason: DropReason::from_byte(reason).unwrap(),
            tenant: TenantId::new(tenant),
        }),
    ]
}

fn arb_facts() -> impl Strategy<Value = Vec<Fact>> {
    (1u64..40).prop_flat_map(|chunks| proptest::collection::vec(arb_fact(shape(chunks)), 0..60))
}

/// The same facts in two orders, the second with duplicates.
fn two_orders() -> impl Strategy<Value = (Vec<Fact>, Vec<Fact>)> {
    arb_facts().prop_flat_map(|facts| (Just(facts.clone()), shuffled(facts)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn any_order_with_duplicates_gives_the_same((first, second) in two_orders()) {
        prop_assert_eq!(view(&taken(&first)), view(&taken(&second)));
    }

    #[test]
    fn a_loss_and_then_everything_again_is_no_loss(
        ((first, second), kept) in (two_orders(), proptest::collection::vec(any::<bool>(), 100)),
    ) {
        let mut facts: Vec<Fact> =
            second.iter().zip(kept).filter(|(_, kept)| *kept).map(|(fact, _)| *fact).collect();
        facts.extend(&first);
        prop_assert_eq!(view(&taken(&first)), view(&taken(&facts)));
    }

    #[test]
    fn statements_carry_what_is_known_apart_from_spans(facts in arb_facts()) {
        // What a ledger says gives another one the same facts, if it can be said to be a file at all.
        let ledger = taken(&facts);
        if ledger.statements().is_empty() || ledger.copies().next().is_some() {
            return Ok(());
        }
        let mut other = Ledger::new(Rules::all());
        for statement in ledger.statements() {
            let fact = Fact::of(dc(1), &statement).unwrap().unwrap();
            prop_assert_ne!(other.take(fact), Ok(Taken::NotYet));
        }
        prop_assert_eq!(other.state(), ledger.state());
        prop_assert_eq!(other.statements(), ledger.statements());
        if ledger.state() != FileState::Dropped {
            prop_assert_eq!(other.claim(), ledger.claim());
        }
    }
}

#[test]
fn a_file_of_unknown_size_is_announced_and_settled_once() {
    let meta = |size| Fact::Meta { claim: claim(0, 1), size, tenant: TenantId::new(1), digest: digest(1) };
    let mut ledger = Ledger::new(Rules::all());
    ledger.take(meta(None)).unwrap();
    assert!(matches!(ledger.statements()[..], [Statement::Meta { size: None, .. }]));
    let file = shape(4);
    let have = Fact::Have {
        holder: dc(2),
        generation: generation(1),
        span: span(file, place(0, 0), &values(file, None)),
    };
    assert_eq!(ledger.take(have), Ok(Taken::NotYet));
    ledger.take(meta(Some(file))).unwrap();
    assert_eq!(ledger.take(have), Ok(Taken::New));
    assert!(matches!(ledger.statements()[..], [Statement::Meta { size: Some(_), .. }]));
    ledger.take(meta(Some(shape(5)))).unwrap();
    assert_eq!(ledger.state(), FileState::Conflict);
    assert_eq!(ledger.chunks_held_by(dc(2)), 0, "no shape, no spans");
}
