//! A ledger against the plainest model of its facts: what it takes, what follows, and what is compared.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use sluice_engine::command::{DropReason, Statement};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{RecordDigest, Root};
use sluice_engine::ids::{DcId, Nonce, TenantId};
use sluice_engine::ledger::{Claim, Disagreement, Fact, FactError, FileState, Ledger, Taken};
use sluice_engine::rules::Rules;
use sluice_engine::span::Place;

use crate::world::{claim, dc, generation, place, shape, span, values};

/// Sets of everything, and the joins as `docs/protocol.md` has them.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    metas: BTreeSet<([u8; 32], u64)>,
    sizes: BTreeSet<u64>,
    claim: Option<Claim>,
    roots: BTreeSet<([u8; 32], u64)>,
    assembled: BTreeMap<DcId, Claim>,
    conflict: Option<Disagreement>,
    drop: Option<(DropReason, TenantId)>,
    held: BTreeMap<DcId, (u64, BTreeSet<u64>)>,
}

fn two_smallest<T: Ord + Copy>(set: &mut BTreeSet<T>, value: T) -> bool {
    let before = set.clone();
    set.insert(value);
    while set.len() > 2 {
        set.pop_last();
    }
    *set != before
}

impl Model {
    fn file(&self) -> Option<Geometry> {
        self.sizes.first().map(|size| Geometry::new(*size).unwrap())
    }

    fn size(&mut self, size: Geometry) {
        if two_smallest(&mut self.sizes, size.size()) {
            self.held.clear();
        }
    }

    fn take(&mut self, fact: Fact) -> Result<Taken, FactError> {
        let before = self.clone();
        match fact {
            Fact::Meta { claim, size, tenant, digest } => {
                two_smallest(&mut self.metas, (*digest.as_bytes(), tenant.number()));
                self.claim = self.claim.max(Some(claim));
                size.into_iter().for_each(|size| self.size(size));
            }
            Fact::Root { size, root } => {
                two_smallest(&mut self.roots, (*root.as_bytes(), size.size()));
                self.size(size);
            }
            Fact::Assembled { claim, size, root } => {
                let known = self.assembled.entry(claim.home).or_insert(claim);
                *known = claim.max(*known);
                two_smallest(&mut self.roots, (*root.as_bytes(), size.size()));
                self.size(size);
            }
            Fact::Conflict(found) => {
                self.conflict = Some(self.conflict.map_or(found, |known| known.min(found)));
            }
            Fact::Drop { reason, tenant } => {
                let lower = self.drop.map_or((reason, tenant), |known| known.min((reason, tenant)));
                self.drop = Some(lower);
                self.held.clear();
            }
            Fact::Have { holder, generation, span } => {
                let Some(file) = self.file() else { return Ok(Taken::NotYet) };
                span.place.check(file)?;
                self.hold(holder, generation.number(), span.place.range(file).collect());
            }
            Fact::HaveNothing { holder, generation } => {
                if self.file().is_none() {
                    return Ok(Taken::NotYet);
                }
                self.hold(holder, generation.number(), BTreeSet::new());
            }
        }
        Ok(if *self == before { Taken::Known } else { Taken::New })
    }

    fn hold(&mut self, holder: DcId, generation: u64, chunks: BTreeSet<u64>) {
        if self.drop.is_some() || self.sizes.len() > 1 {
            return;
        }
        let known = self.held.entry(holder).or_insert((generation, BTreeSet::new()));
        if generation > known.0 {
            *known = (generation, BTreeSet::new());
        }
        if generation == known.0 {
            known.1.extend(chunks);
        }
    }

    /// The claim under which the home said that it assembled the file, unless it has claimed it again since.
    fn at_home(&self) -> Option<Claim> {
        let claim = self.claim?;
        self.assembled.get(&claim.home).copied().filter(|said| *said >= claim)
    }

    fn state(&self) -> FileState {
        if self.drop.is_some() {
            return FileState::Dropped;
        }
        if self.metas.len() > 1 || self.sizes.len() > 1 || self.roots.len() > 1 {
            return FileState::Conflict;
        }
        match (self.roots.len(), self.at_home()) {
            (1, None) => FileState::Complete,
            (1, Some(_)) => FileState::Assembled,
            _ if self.conflict.is_some() => FileState::Conflict,
            _ if self.metas.is_empty() => FileState::Unheard,
            _ => FileState::Receiving,
        }
    }

    fn reason(&self) -> Option<String> {
        let text = match self.state() {
            FileState::Conflict if self.metas.len() > 1 => "two different metadata records were sent".into(),
            FileState::Conflict if self.sizes.len() > 1 => "two different sizes were sent".into(),
            FileState::Conflict if self.roots.len() > 1 => "two different roots were found".into(),
            FileState::Conflict => match self.conflict.unwrap() {
                Disagreement { found: Some(root), .. } => {
                    format!("the bytes hash to {root}, which is not the expected root")
                }
                Disagreement { place, .. } => {
                    format!("different bytes were sent for chunks {place} in different datacenters")
                }
            },
            _ => return None,
        };
        Some(text)
    }

    /// Everything that two datacenters compare, as a value instead of a digest.
    fn compared(&self, a: DcId, b: DcId) -> Option<String> {
        if self.state() == FileState::Unheard {
            return None;
        }
        if let Some(drop) = self.drop {
            return Some(format!("{drop:?}"));
        }
        let mut out = format!("{:?} {:?} {:?} {:?}", self.metas, self.sizes, self.claim, self.roots);
        for (dc, other) in [(a.min(b), a.max(b)), (a.max(b), a.min(b))] {
            // Only what there is, and of spans not whose they are: that follows from the home.
            if let Some(claim) = self.at_home().filter(|claim| claim.home == dc) {
                out += &format!(" {dc} {:?}", claim.epoch);
            }
            let told = self.claim.is_some_and(|claim| claim.home == other);
            if let Some(held) = self.held.get(&dc).filter(|held| told && !held.1.is_empty()) {
                out += &format!(" {held:?}");
            }
        }
        Some(out + &format!("{:?}", self.conflict))
    }

    fn statements(&self) -> Vec<Statement> {
        if let Some((reason, tenant)) = self.drop {
            return vec![Statement::Drop { reason, tenant }];
        }
        let Some(Claim { epoch, home }) = self.claim else { return Vec::new() };
        let mut all = Vec::new();
        let sizes: Vec<Option<u64>> = match self.sizes.is_empty() {
            true => vec![None],
            false => self.sizes.iter().copied().map(Some).collect(),
        };
        for &(digest, tenant) in &self.metas {
            for size in &sizes {
                let size = size.map(|size| Geometry::new(size).unwrap());
                let (tenant, digest) = (TenantId::new(tenant), RecordDigest::from_bytes(digest));
                all.push(Statement::Meta { epoch, home, size, tenant, digest });
            }
        }
        for &(root, size) in &self.roots {
            let (size, root) = (Geometry::new(size).unwrap(), Root::from_bytes(root));
            all.push(Statement::Root { epoch, home, size, root });
        }
        let found = self.conflict.map(|Disagreement { place, found, home }| Statement::Conflict {
            home,
            place,
            found,
        });
        all.extend(found);
        all
    }
}

const DCS: u16 = 3;

fn arb_fact() -> impl Strategy<Value = Fact> {
    let size = || (10u64..13).prop_map(shape);
    let arb_claim = || (0u8..3, 1..=DCS).prop_map(|(epoch, home)| claim(epoch, home));
    let root = || (1u8..4).prop_map(|n| Root::from_bytes([n; 32]));
    let holder = || (1..=DCS).prop_map(dc);
    let number = || (0u64..4).prop_map(generation);
    let spots = prop_oneof![
        (0u64..13).prop_map(|i| (i, 0)),
        Just((0, 3)),
        Just((8, 2)),
        Just((4, 2)),
        Just((2, 1)),
        Just((0, 4)),
        Just((8, 1))
    ];
    let meta = (arb_claim(), proptest::option::of(size()), 0u64..3, 0u8..3, 0u8..9).prop_map(
        |(claim, size, tenant, n, rare)| Fact::Meta {
            claim,
            size: size.filter(|size| rare == 0 || size.chunks() == 12),
            tenant: TenantId::new(if rare < 2 { tenant } else { 1 }),
            digest: RecordDigest::from_bytes([if rare < 2 { n } else { 1 }; 32]),
        },
    );
    let have = (holder(), number(), spots).prop_map(|(holder, generation, (start, level))| {
        let file = shape(12);
        let all = values(file, None);
        let place = place(start, level);
        // Past the end of the file, whatever value.
        let span = match place.check(file) {
            Ok(()) => span(file, place, &all),
            Err(_) => sluice_engine::span::Span::new(place, all[0]),
        };
        Fact::Have { holder, generation, span }
    });
    prop_oneof![
        6 => meta,
        20 => have,
        4 => (holder(), number()).prop_map(|(holder, generation)| Fact::HaveNothing { holder, generation }),
        1 => (size(), root(), 0u8..4).prop_map(|(size, root, rare)| Fact::Root { size: if rare == 0 { size } else { shape(12) }, root }),
        1 => (arb_claim(), root()).prop_map(|(claim, root)| Fact::Assembled { claim, size: shape(12), root }),
        1 => (0u64..3, 1..=DCS, proptest::option::of(root())).prop_map(|(at, home, found)| {
            Fact::Conflict(Disagreement { place: place(at, 0), found, home: dc(home) })
        }),
        1 => (1u8..=3, 0u64..3, 0u8..4).prop_filter_map("seldom", |(reason, tenant, rare)| {
            let reason = DropReason::from_byte(reason).unwrap();
            (rare == 0).then(|| Fact::Drop { reason, tenant: TenantId::new(tenant) })
        }),
    ]
}

fn check(ledger: &Ledger, model: &Model) -> Result<(), TestCaseError> {
    prop_assert_eq!(ledger.state(), model.state());
    prop_assert_eq!(ledger.conflict_reason(), model.reason());
    prop_assert_eq!(ledger.claim(), model.claim);
    prop_assert_eq!(ledger.file(), model.file());
    let meta = model.metas.first();
    prop_assert_eq!(ledger.record_digest(), meta.map(|(digest, _)| RecordDigest::from_bytes(*digest)));
    let tenant = meta.map(|(_, tenant)| TenantId::new(*tenant)).or(model.drop.map(|(_, tenant)| tenant));
    prop_assert_eq!(ledger.tenant(), tenant);
    let root =
        model.roots.first().filter(|_| model.roots.len() == 1).map(|(root, _)| Root::from_bytes(*root));
    prop_assert_eq!(ledger.root(), root);
    prop_assert_eq!(ledger.best_copy(), model.assembled.values().max().copied());
    prop_assert_eq!(
        ledger.copies().collect::<Vec<_>>(),
        model.assembled.values().copied().collect::<Vec<_>>()
    );
    prop_assert_eq!(ledger.disagreement(), model.conflict);
    prop_assert_eq!(ledger.dropped(), model.drop);
    prop_assert_eq!(ledger.statements(), model.statements());
    let chunks = model.file().map_or(0, Geometry::chunks);
    let mut any = BTreeSet::new();
    let mut spans = 0;
    for holder in (0..=DCS).map(dc) {
        let none = (0, BTreeSet::new());
        let held = model.held.get(&holder);
        let (newest, of_it) = held.unwrap_or(&none);
        any.extend(of_it);
        prop_assert_eq!(ledger.chunks_held_by(holder), of_it.len() as u64);
        prop_assert_eq!(ledger.held_by(holder).map(|(newest, _)| newest.number()), held.map(|_| *newest));
        prop_assert_eq!(
            ledger.holds_all(holder),
            model.file().is_some() && of_it.len() as u64 == chunks && held.is_some()
        );
        if let Some((_, tree)) = ledger.held_by(holder) {
            prop_assert_eq!((0..chunks).filter(|i| tree.has(*i)).collect::<BTreeSet<_>>(), of_it.clone());
            spans += tree.len();
        }
        prop_assert_eq!(ledger.assembled_by(holder), model.assembled.get(&holder).copied());
        prop_assert!(!ledger.is_absent(holder));
        let statement = ledger.assembled_statement(holder, Nonce::new(9));
        let expected = model.assembled.get(&holder).zip(root).zip(model.file());
        let expected = expected.map(|((claim, root), size)| Statement::Assembled {
            epoch: claim.epoch,
            home: claim.home,
            size,
            nonce: Nonce::new(9),
            root,
        });
        prop_assert_eq!(statement, expected);
    }
    let order: Vec<DcId> = ledger.holders().map(|(dc, ..)| dc).collect();
    prop_assert_eq!(order, model.held.keys().copied().collect::<Vec<_>>());
    prop_assert_eq!((0..chunks).filter(|i| ledger.union().has(*i)).collect::<BTreeSet<_>>(), any.clone());
    prop_assert_eq!(ledger.spans(), spans + ledger.union().len());
    let missing: Vec<u64> = ledger.missing(0..chunks, 99).into_iter().flatten().collect();
    prop_assert_eq!(missing, (0..chunks).filter(|i| !any.contains(i)).collect::<Vec<_>>());
    prop_assert!(ledger.missing(0..chunks, 1).len() <= 1);
    prop_assert_eq!((ledger.paged().count(), ledger.recalled().count(), ledger.is_paged(0)), (0, 0, false));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_ledger_is_its_facts(facts in proptest::collection::vec(arb_fact(), 1..40)) {
        let mut ledger = Ledger::new(Rules::all());
        let mut model = Model::default();
        let mut seen: BTreeMap<String, [u8; 32]> = BTreeMap::new();
        for fact in facts {
            let expected = model.take(fact);
            prop_assert_eq!(ledger.take(fact), expected, "{:?}", fact);
            check(&ledger, &model)?;
            // Equal knowledge, equal digests; and no other way.
            for (a, b) in [(1, 2), (2, 1), (2, 3), (1, 3)] {
                let (digest, compared) = (ledger.digest_between(dc(a), dc(b)), model.compared(dc(a), dc(b)));
                prop_assert_eq!(digest.is_some(), compared.is_some());
                let (Some(digest), Some(compared)) = (digest, compared) else { continue };
                let pair = (a.min(b), a.max(b));
                let compared = if model.drop.is_some() { compared } else { format!("{pair:?} {compared}") };
                let known = seen.insert(compared.clone(), digest);
                prop_assert!(known.is_none_or(|known| known == digest), "two digests of {}", compared);
            }
        }
        let different: BTreeSet<[u8; 32]> = seen.values().copied().collect();
        // Of files whose home is the third, two pairs may compare the very same.
        let contents: BTreeSet<String> = seen.keys().map(|key| key.split_once(") ").map_or(key.clone(), |(_, rest)| rest.to_owned())).collect();
        prop_assert!(different.len() >= contents.len(), "{} digests of {} contents", different.len(), contents.len());
    }
}

fn received(chunks: u64) -> Ledger {
    let mut ledger = Ledger::new(Rules::all());
    let digest = RecordDigest::from_bytes([1; 32]);
    let meta = Fact::Meta { claim: claim(0, 1), size: Some(shape(chunks)), tenant: TenantId::new(1), digest };
    ledger.take(meta).unwrap();
    ledger
}

fn have(ledger: &mut Ledger, holder: u16, number: u64, at: Place) -> Taken {
    let file = ledger.file().unwrap();
    let span = span(file, at, &values(file, None));
    ledger.take(Fact::Have { holder: dc(holder), generation: generation(number), span }).unwrap()
}

#[test]
fn a_lifted_holding_is_the_same_under_a_newer_generation() {
    let mut ledger = received(8);
    have(&mut ledger, 2, 3, place(0, 2));
    ledger.lift(dc(2), generation(7));
    assert_eq!(ledger.held_by(dc(2)).map(|(newest, tree)| (newest.number(), tree.covered())), Some((7, 4)));
    ledger.lift(dc(2), generation(5));
    assert_eq!(ledger.held_by(dc(2)).map(|(newest, _)| newest.number()), Some(7), "it never falls");
    assert_eq!(have(&mut ledger, 2, 3, place(4, 2)), Taken::Known, "what was said before counts no longer");
    assert_eq!(have(&mut ledger, 2, 7, place(4, 2)), Taken::New);
    ledger.lift(dc(3), generation(2));
    assert_eq!(ledger.held_by(dc(3)).map(|(newest, tree)| (newest.number(), tree.covered())), Some((2, 0)));
    let mut unheard = Ledger::new(Rules::all());
    unheard.lift(dc(2), generation(1));
    assert_eq!(unheard.holders().count(), 0, "without a shape nothing is held");
    let mut dropped = received(8);
    dropped.take(Fact::Drop { reason: DropReason::Deleted, tenant: TenantId::new(1) }).unwrap();
    dropped.lift(dc(2), generation(1));
    assert_eq!(dropped.holders().count(), 0);
}

#[test]
fn an_absent_holder_counts_for_nothing_until_it_is_back() {
    let mut ledger = received(8);
    have(&mut ledger, 2, 1, place(0, 2));
    have(&mut ledger, 3, 1, place(4, 2));
    assert!(ledger.union().is_whole());
    assert!(ledger.set_absent(dc(3), true));
    assert!(!ledger.set_absent(dc(3), true), "it was already");
    assert!(ledger.is_absent(dc(3)) && !ledger.is_absent(dc(2)));
    assert_eq!(ledger.missing(0..8, 9), std::slice::from_ref(&(4..8)));
    assert_eq!(have(&mut ledger, 3, 1, place(0, 0)), Taken::New, "it is kept, and not counted");
    assert_eq!(ledger.missing(0..8, 9), std::slice::from_ref(&(4..8)));
    assert_eq!(ledger.chunks_held_by(dc(3)), 5);
    assert!(ledger.set_absent(dc(3), false));
    assert!(!ledger.set_absent(dc(3), false));
    assert!(ledger.union().is_whole());
}

#[test]
fn a_rejected_or_doubted_holder_must_say_it_again() {
    let mut ledger = received(8);
    have(&mut ledger, 2, 1, place(0, 2));
    have(&mut ledger, 2, 1, place(4, 1));
    have(&mut ledger, 3, 1, place(4, 0));
    ledger.reject(dc(2), place(1, 0));
    assert_eq!(ledger.chunks_held_by(dc(2)), 2, "the span that has the place goes");
    assert_eq!(ledger.missing(0..8, 9), [0..4, 6..8]);
    ledger.reject(dc(2), place(4, 2));
    assert_eq!(ledger.chunks_held_by(dc(2)), 0, "and so does all inside it");
    assert_eq!(ledger.missing(0..8, 9), [0..4, 5..8]);
    ledger.reject(dc(9), place(4, 2));
    assert_eq!(have(&mut ledger, 2, 1, place(0, 2)), Taken::New, "under the same generation");
    ledger.doubt(dc(2));
    assert_eq!(ledger.chunks_held_by(dc(2)), 0);
    assert_eq!(ledger.missing(0..8, 9), [0..4, 5..8]);
    assert_eq!(ledger.held_by(dc(2)).map(|(newest, _)| newest.number()), Some(1));
    assert_eq!(have(&mut ledger, 2, 1, place(0, 2)), Taken::New);
    ledger.lift(dc(2), generation(4));
    ledger.doubt(dc(2));
    assert_eq!(ledger.held_by(dc(2)).map(|(newest, _)| newest.number()), Some(4), "it never falls");
    assert_eq!(have(&mut ledger, 2, 3, place(0, 2)), Taken::Known);
    assert_eq!(have(&mut ledger, 2, 4, place(0, 2)), Taken::New);
    ledger.doubt(dc(9));
    assert_eq!(ledger.held_by(dc(9)), None);
}

#[test]
fn only_the_holder_says_that_it_assembled_a_file() {
    let said = |home| Statement::Assembled {
        epoch: sluice_engine::ids::HomeEpoch::new(1),
        home: dc(home),
        size: shape(3),
        nonce: Nonce::new(0),
        root: Root::empty(),
    };
    let refused = FactError::NotTheHolder { from: dc(1), home: dc(2) };
    assert_eq!(Fact::of(dc(1), &said(2)), Err(refused));
    let fact = Fact::Assembled { claim: claim(1, 1), size: shape(3), root: Root::empty() };
    assert_eq!(Fact::of(dc(1), &said(1)), Ok(Some(fact)));
    for question in [Statement::MetaRequest, Statement::Unknown, Statement::Confirm { nonce: Nonce::new(1) }]
    {
        assert_eq!(Fact::of(dc(1), &question), Ok(None));
    }
}
