//! What earlier versions remembered, as it was committed then, read by today's code. `fixtures/NAME-N` has format
//! version N. Old ones stay; a new version of a format adds one, and its lines here. What goes over the wire is in
//! `docs/vectors.json`.

use std::path::Path;

use sluice_engine::aggregator::{FileMemory, NodeMemory};
use sluice_engine::command::DropReason;
use sluice_engine::drain::{Drain, Phase};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, RecordDigest, Root};
use sluice_engine::ids::{
    DcId, FileId, Generation, HomeEpoch, Incarnation, RevocationEpoch, TenantId, Timestamp,
};
use sluice_engine::ledger::{Claim, Disagreement, Fact, Page};
use sluice_engine::revocations::Revocation;
use sluice_engine::scrub::Mark;
use sluice_engine::span::{Place, Span};

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
}

const HOME: DcId = DcId::new(3);

fn claim() -> Claim {
    Claim { epoch: HomeEpoch::new(2), home: HOME }
}

#[test]
fn the_memory_of_files_is_read() {
    let size = |bytes| Geometry::new(bytes).unwrap();
    let assembled = FileMemory::from_bytes(&fixture("file-memory-1-assembled")).unwrap();
    assert_eq!((assembled.claim(), assembled.own_claim()), (Some(claim()), Some(HomeEpoch::new(1))));
    let root = Root::empty();
    let facts = [Fact::Root { size: size(0), root }, Fact::Assembled { claim: claim(), size: size(0), root }];
    assert_eq!(assembled.facts(), facts);

    let ended = FileMemory::from_bytes(&fixture("file-memory-1-ended")).unwrap();
    let conflict = Disagreement { place: Place::new(8, 3).unwrap(), found: Some(root), home: HOME };
    let facts =
        [Fact::Drop { reason: DropReason::Expired, tenant: TenantId::new(9) }, Fact::Conflict(conflict)];
    assert_eq!((ended.claim(), ended.facts()), (Some(claim()), facts.to_vec()));

    let sizes = FileMemory::from_bytes(&fixture("file-memory-1-two-sizes")).unwrap();
    assert_eq!((sizes.claim(), sizes.size()), (None, Some(size(5))));
    assert_eq!(sizes.to_bytes(), fixture("file-memory-1-two-sizes"));

    let contradicted = FileMemory::from_bytes(&fixture("file-memory-2-contradicted")).unwrap();
    let claim = contradicted.claim().unwrap();
    let root = |n| Fact::Root { size: size(5), root: Root::from_bytes([n; 32]) };
    let meta = |n| {
        let digest = RecordDigest::from_bytes([n; 32]);
        Fact::Meta { claim, size: None, tenant: TenantId::new(9), digest }
    };
    assert_eq!(contradicted.facts(), [root(1), root(2), meta(3), meta(4)]);
}

#[test]
fn the_memory_of_a_datacenter_is_read() {
    let seen = [(2, 5), (HOME.number(), 6)].map(|(dc, it)| (DcId::new(dc), Incarnation::new(it)));
    let mut expected =
        NodeMemory { incarnation: Incarnation::new(7), seen: seen.into(), ..NodeMemory::default() };
    assert_eq!(NodeMemory::from_bytes(&fixture("node-memory-1")), Ok(expected.clone()));
    let drain = Drain { phase: Phase::Sessions, target: HOME, evacuate: true };
    let draining = NodeMemory { drain: Some(drain), ..expected.clone() };
    assert_eq!(NodeMemory::from_bytes(&fixture("node-memory-3-draining")), Ok(draining));
    for (subject, epoch) in [(FileId::NIL, 5), (FileId::from_bytes([8; 16]), 6)] {
        let revocation = Revocation::of(subject, TenantId::new(9), RevocationEpoch::new(epoch));
        expected.revoked.take(revocation);
    }
    assert_eq!(NodeMemory::from_bytes(&fixture("node-memory-2-revoking")), Ok(expected));
}

#[test]
fn pages_and_the_scrubs_mark_are_read() {
    let span = Span::new(Place::new(64, 6).unwrap(), ChainingValue::from_bytes([7; 32]));
    let page = Page { segment: 3, entries: vec![(DcId::new(2), Generation::new(9), span)] };
    assert_eq!(Page::from_bytes(&fixture("ledger-page-1")), Ok(page));
    let mark =
        Mark { began: Timestamp::new(1), bytes: 2, damaged: 3, file: FileId::from_bytes([4; 16]), chunk: 5 };
    assert_eq!(Mark::from_bytes(&fixture("scrub-mark-1")), Some(mark));
}
