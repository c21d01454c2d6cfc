//! What the properties share: files, chunk values without chunks, and their trees.

use proptest::prelude::*;
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{DcId, FileId, Generation, HomeEpoch, TenantId};
use sluice_engine::ledger::Claim;
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::merge_chunks;

pub(crate) const TENANT: TenantId = TenantId::new(7);

pub(crate) fn dc(number: u16) -> DcId {
    DcId::new(number)
}

pub(crate) fn claim(epoch: u8, home: u16) -> Claim {
    Claim { epoch: HomeEpoch::new(epoch), home: dc(home) }
}

pub(crate) fn generation(number: u64) -> Generation {
    Generation::new(number)
}

pub(crate) fn file_id(number: u64) -> FileId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    FileId::from_bytes(bytes)
}

pub(crate) fn shape(chunks: u64) -> Geometry {
    Geometry::new(chunks * CHUNK_LEN).unwrap()
}

/// The value that stands for one version of a chunk.
pub(crate) fn value(chunk: u64, version: u64) -> ChainingValue {
    let mut input = [0; 16];
    input[..8].copy_from_slice(&chunk.to_be_bytes());
    input[8..].copy_from_slice(&version.to_be_bytes());
    ChainingValue::from_bytes(*blake3::hash(&input).as_bytes())
}

pub(crate) fn place(start: u64, level: u8) -> Place {
    Place::new(start, level).unwrap()
}

pub(crate) fn chunk(index: u64) -> Place {
    Place::of_chunk(ChunkIndex::new(index).unwrap())
}

/// The values of all chunks of a file, one of them perhaps of another version.
pub(crate) fn values(file: Geometry, other: Option<u64>) -> Vec<ChainingValue> {
    (0..file.chunks()).map(|i| value(i, u64::from(other == Some(i)))).collect()
}

/// The span of a place in a file of these chunk values.
pub(crate) fn span(file: Geometry, place: Place, values: &[ChainingValue]) -> Span {
    let range = place.range(file);
    let merged = merge_chunks(file, place, &values[range.start as usize..range.end as usize]).unwrap();
    Span::new(place, merged)
}

/// Every place of a file that can be a span.
pub(crate) fn places(file: Geometry) -> Vec<Place> {
    let mut places = Vec::new();
    let mut open: Vec<Place> = match Place::top_children(file) {
        Some((left, right)) => vec![left, right],
        None => (0..file.chunks()).map(chunk).collect(),
    };
    while let Some(place) = open.pop() {
        places.push(place);
        open.extend(place.children(file).into_iter().flat_map(|(left, right)| [left, right]));
    }
    places.sort_unstable();
    places
}

/// A way through a list: its items in any order, some of them more than once.
pub(crate) fn shuffled<T: Clone + std::fmt::Debug + 'static>(items: Vec<T>) -> impl Strategy<Value = Vec<T>> {
    let len = items.len();
    let doubled = proptest::collection::vec(0..len.max(1), 0..=len.min(20)).prop_map(move |again| {
        let mut all = items.clone();
        all.extend(again.into_iter().filter_map(|i| items.get(i).cloned()));
        all
    });
    doubled.prop_shuffle()
}
