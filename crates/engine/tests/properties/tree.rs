//! However a file is cut into spans and in whatever order they come, their root is the hash of its bytes.

use std::sync::LazyLock;

use proptest::prelude::*;
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, ChunkHasher, Root};
use sluice_engine::ledger::{Fact, Ledger, Verdict};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::rules::Rules;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{Insertion, SpanTree};

use crate::world::{claim, dc, generation, shuffled, span};

/// Around every edge of the tree's shape.
const CHUNKS: [u64; 14] = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33];

/// Around every edge of BLAKE3's own chunks, and of ours.
const LAST: [u64; 6] = [1, 1023, 1024, 1025, CHUNK_LEN - 1, CHUNK_LEN];

/// A real file: its shape, the value of each chunk as hashed while it arrived, and its hash by BLAKE3 alone.
#[derive(Clone, Debug)]
struct Hashed {
    shape: Geometry,
    values: Vec<ChainingValue>,
    root: Root,
}

fn hash_chunk(index: u64, bytes: &[u8]) -> ChainingValue {
    let mut hasher = ChunkHasher::new(ChunkIndex::new(index).unwrap());
    // In pieces of an odd size, as they come from a socket.
    bytes.chunks(65_521).for_each(|piece| hasher.update(piece));
    hasher.finish().unwrap()
}

/// Every shape, hashed once for all tests.
static FILES: LazyLock<Vec<Hashed>> = LazyLock::new(|| {
    let longest = (33 * CHUNK_LEN) as usize;
    let mut bytes = vec![0; longest];
    blake3::Hasher::new().update(b"sluice").finalize_xof().fill(&mut bytes);
    let full: Vec<ChainingValue> =
        bytes.chunks(CHUNK_LEN as usize).zip(0..).map(|(chunk, i)| hash_chunk(i, chunk)).collect();
    let mut files = Vec::new();
    for chunks in CHUNKS {
        for last in LAST {
            let start = ((chunks - 1) * CHUNK_LEN) as usize;
            let end = start + last as usize;
            let mut values = full[..chunks as usize - 1].to_vec();
            values.push(hash_chunk(chunks - 1, &bytes[start..end]));
            files.push(Hashed {
                shape: Geometry::new(end as u64).unwrap(),
                values,
                root: blake3::hash(&bytes[..end]).into(),
            });
        }
    }
    files
});

/// Cuts a place at random: `choices` says whether to go on.
fn cut(file: Geometry, place: Place, choices: &mut impl Iterator<Item = bool>, into: &mut Vec<Place>) {
    match place.children(file) {
        Some((left, right)) if choices.next().unwrap_or(false) => {
            cut(file, left, choices, into);
            cut(file, right, choices, into);
        }
        Some(_) | None => into.push(place),
    }
}

fn cut_file(file: Geometry, choices: Vec<bool>) -> Vec<Place> {
    let mut places = Vec::new();
    let mut choices = choices.into_iter();
    match Place::top_children(file) {
        Some((left, right)) => {
            cut(file, left, &mut choices, &mut places);
            cut(file, right, &mut choices, &mut places);
        }
        None => places.extend(Place::tile(0..file.chunks(), 0, file)),
    }
    places
}

/// A file and several ways to cut it, all spans together in any order, each said by some holder.
fn arb_cover() -> impl Strategy<Value = (Hashed, Vec<(u16, Span)>)> {
    let cuts = proptest::collection::vec(proptest::collection::vec(any::<bool>(), 0..64), 1..4);
    (0..FILES.len(), cuts).prop_flat_map(|(which, cuts)| {
        let hashed = FILES[which].clone();
        let spans: Vec<(u16, Span)> = cuts
            .into_iter()
            .zip(1u16..)
            .flat_map(|(choices, holder)| {
                let places = cut_file(hashed.shape, choices);
                let span = |place| (holder, span(hashed.shape, place, &hashed.values));
                places.into_iter().map(span).collect::<Vec<_>>()
            })
            .collect();
        (Just(hashed), shuffled(spans))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn any_cut_in_any_order_gives_the_hash_of_the_bytes((hashed, spans) in arb_cover()) {
        let mut tree = SpanTree::new(hashed.shape);
        for (_, span) in &spans {
            prop_assert_eq!(span.place.check(hashed.shape), Ok(()));
            let inserted = tree.insert(*span);
            prop_assert!(inserted.is_ok(), "{:?}", inserted);
            if let Ok(Insertion::Grown(place)) = inserted {
                prop_assert!(place.contains(span.place));
            }
        }
        prop_assert!(tree.is_whole());
        prop_assert!(tree.len() <= 2);
        if hashed.shape.chunks() > 1 {
            prop_assert_eq!(tree.root(), Some(hashed.root));
        } else {
            prop_assert_eq!(tree.root(), None);
        }
        for (_, span) in &spans {
            prop_assert_eq!(tree.covering(span.place).is_some(), true);
        }
    }

    #[test]
    fn a_ledger_of_several_holders_reaches_the_same_root((hashed, spans) in arb_cover()) {
        let mut ledger = Ledger::new(Rules::all());
        let digest = sluice_engine::hash::RecordDigest::from_bytes([1; 32]);
        let size = Some(hashed.shape);
        ledger.take(Fact::Meta { claim: claim(0, 1), size, tenant: crate::world::TENANT, digest }).unwrap();
        for (holder, span) in spans {
            ledger.take(Fact::Have { holder: dc(holder), generation: generation(1), span }).unwrap();
        }
        let verdict = crate::agreement::answered(&mut ledger, |_| hashed.values.clone());
        if hashed.shape.chunks() > 1 {
            prop_assert_eq!(verdict, Verdict::Whole(hashed.root));
        } else {
            prop_assert_eq!(verdict, Verdict::OneChunk(hashed.values[0]));
        }
    }
}

#[test]
fn one_place_after_the_other_in_every_shape() {
    for hashed in FILES.iter().filter(|hashed| hashed.shape.chunks() > 1) {
        let mut tree = SpanTree::new(hashed.shape);
        for place in Place::tile(0..hashed.shape.chunks(), 0, hashed.shape).into_iter().rev() {
            tree.insert(span(hashed.shape, place, &hashed.values)).unwrap();
        }
        assert_eq!(tree.root(), Some(hashed.root), "{} bytes", hashed.shape.size());
    }
}
