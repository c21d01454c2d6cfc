//! Contents, chaining values, trees, proofs, and how files fall into places and runs.

use serde_json::{Value, json};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::limits::{CHUNK_LEN, MAX_CHUNKS, MAX_FILE_LEN, MAX_LEVEL};
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{ProofStep, SpanTree, merge_chunks, path_places, proof_places, root_of_proof};

/// The first `len` bytes of what a seed stands for: BLAKE3 in extended output mode over `sluice vectors ` and the
/// seed in decimal digits.
pub(crate) fn content(seed: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    blake3::Hasher::new().update(format!("sluice vectors {seed}").as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn file(chunks: u64) -> Geometry {
    Geometry::new(chunks * CHUNK_LEN).unwrap()
}

fn index(number: u64) -> ChunkIndex {
    ChunkIndex::new(number).unwrap()
}

fn at(place: Place) -> Value {
    json!({ "start": place.start(), "level": place.level() })
}

fn with_value(place: Place, value: ChainingValue) -> Value {
    json!({ "start": place.start(), "level": place.level(), "value": value.to_string() })
}

pub(crate) fn contents() -> Value {
    let cases = [(0, 48), (1, 48), (12_345, 16)];
    json!(
        cases
            .map(|(seed, len)| json!({ "seed": seed, "len": len, "bytes": hex::encode(content(seed, len)) }))
    )
}

pub(crate) fn chunks() -> Value {
    let cases = [
        (0, CHUNK_LEN),
        (1, CHUNK_LEN),
        (0, 1),
        (1, 1),
        (3, 1023),
        (3, 1024),
        (3, 1025),
        (3, 65_537),
        (3, CHUNK_LEN - 1),
        (1 << 32, 3000),
        (MAX_CHUNKS - 1, 5000),
    ];
    let cases = cases.map(|(number, len)| {
        let value = ChainingValue::of_chunk(index(number), &content(number, len)).unwrap();
        json!({ "index": number, "seed": number, "len": len, "value": value.to_string() })
    });
    json!(cases)
}

/// Every node of a file's tree below the top, by level and start.
fn nodes(file: Geometry, values: &[ChainingValue]) -> Vec<(Place, ChainingValue)> {
    let mut nodes = Vec::new();
    let mut left: Vec<Place> = match Place::top_children(file) {
        Some((left, right)) => vec![left, right],
        None => Place::tile(0..file.chunks(), 0, file),
    };
    while let Some(place) = left.pop() {
        let range = place.range(file);
        let value = merge_chunks(file, place, &values[range.start as usize..range.end as usize]).unwrap();
        nodes.push((place, value));
        left.extend(place.children(file).into_iter().flat_map(|(a, b)| [a, b]));
    }
    nodes.sort_by_key(|(place, _)| (place.level(), place.start()));
    nodes
}

/// Whole files from their bytes.
pub(crate) fn files() -> Value {
    let sizes = [
        0,
        1,
        1000,
        CHUNK_LEN - 1,
        CHUNK_LEN,
        CHUNK_LEN + 1,
        2 * CHUNK_LEN,
        3 * CHUNK_LEN,
        6 * CHUNK_LEN + 77,
    ];
    let cases = sizes.map(|size| {
        let bytes = content(size, size);
        let file = Geometry::new(size).unwrap();
        let values: Vec<ChainingValue> = (0..)
            .zip(bytes.chunks(CHUNK_LEN as usize))
            .map(|(i, chunk)| ChainingValue::of_chunk(index(i), chunk).unwrap())
            .collect();
        let root = Root::of_bytes(&bytes);
        let mut tree = SpanTree::new(file);
        for (i, value) in (0..).zip(&values) {
            tree.insert(Span::new(Place::of_chunk(index(i)), *value)).unwrap();
        }
        // The root of one chunk is in its bytes alone.
        assert_eq!(tree.root(), (file.chunks() != 1).then_some(root));
        let nodes = nodes(file, &values);
        json!({
            "seed": size, "size": size, "chunks": file.chunks(), "top_level": file.top_level(),
            "root": root.to_string(),
            "nodes": nodes.into_iter().map(|(place, value)| with_value(place, value)).collect::<Vec<_>>(),
        })
    });
    json!(cases)
}

/// Trees over values that stand for chunks: BLAKE3 of the index in eight bytes, big-endian.
pub(crate) fn trees() -> Value {
    let cases = [2u64, 3, 5, 7, 11, 13, 64, 100, 4097].map(|chunks| {
        let file = file(chunks);
        let values: Vec<ChainingValue> = (0..chunks)
            .map(|i| ChainingValue::from_bytes(*blake3::hash(&i.to_be_bytes()).as_bytes()))
            .collect();
        let of = |place: Place| {
            let range = place.range(file);
            merge_chunks(file, place, &values[range.start as usize..range.end as usize]).unwrap()
        };
        let (left, right) = Place::top_children(file).unwrap();
        let root = Root::merge(&of(left), &of(right));
        let proofs = [0, chunks / 2, chunks - 1].map(|i| {
            let place = Place::of_chunk(index(i));
            let proof: Vec<ProofStep> = proof_places(file, place)
                .into_iter()
                .map(|sibling| ProofStep { sibling, value: of(sibling) })
                .collect();
            assert_eq!(root_of_proof(file, Span::new(place, of(place)), &proof), Some(root));
            json!({
                "index": i,
                "proof": proof.iter().map(|step| with_value(step.sibling, step.value)).collect::<Vec<_>>(),
            })
        });
        let last = Place::of_chunk(index(chunks - 1));
        let beside = path_places(file, last, right).unwrap();
        json!({
            "chunks": chunks,
            "top": [with_value(left, of(left)), with_value(right, of(right))],
            "root": root.to_string(),
            "proofs": proofs,
            "path": { "from": at(last), "to": at(right),
                      "beside": beside.into_iter().map(|place| with_value(place, of(place))).collect::<Vec<_>>() },
            "nodes": if chunks <= 13 { nodes(file, &values).into_iter().map(|(p, v)| with_value(p, v)).collect() }
                     else { Vec::new() },
        })
    });
    json!(cases)
}

pub(crate) fn tiles() -> Value {
    let cases = [
        (13, 0..13, MAX_LEVEL),
        (13, 3..12, MAX_LEVEL),
        (8, 0..8, MAX_LEVEL),
        (7, 0..7, MAX_LEVEL),
        (7, 5..7, MAX_LEVEL),
        (1, 0..1, MAX_LEVEL),
        (100, 1..99, 4),
        (MAX_CHUNKS, 0..MAX_CHUNKS, MAX_LEVEL),
        (MAX_CHUNKS, 1..MAX_CHUNKS - 1, MAX_LEVEL),
    ];
    let cases = cases.map(|(chunks, range, level)| {
        let places = Place::tile(range.clone(), level, file(chunks));
        json!({ "chunks": chunks, "first": range.start, "end": range.end, "level": level,
                "places": places.into_iter().map(at).collect::<Vec<_>>() })
    });
    json!(cases)
}

pub(crate) fn places() -> Value {
    let valid = [(5, 4, 0), (7, 4, 2), (1, 0, 0), (8, 0, 2), (MAX_CHUNKS, 1 << 35, 31), (MAX_CHUNKS, 0, 35)];
    let valid = valid.map(|(chunks, start, level)| {
        let place = Place::new(start, level).unwrap();
        place.check(file(chunks)).unwrap();
        let range = place.range(file(chunks));
        let family = place.family(file(chunks));
        json!({ "chunks": chunks, "start": start, "level": level, "end": range.end,
                "parent": family.map(|family| at(family.parent)), "sibling": family.map(|family| at(family.sibling)) })
    });
    let invalid = [
        (8, 0, 36),
        (8, 2, 2),
        (8, MAX_CHUNKS, 0),
        (8, u64::MAX, 0),
        (5, 4, 1),
        (8, 0, 3),
        (8, 8, 0),
        (1, 0, 1),
    ];
    let invalid = invalid.map(|(chunks, start, level)| {
        let error = Place::new(start, level).and_then(|place| place.check(file(chunks))).unwrap_err();
        json!({ "chunks": chunks, "start": start, "level": level, "error": error.code() })
    });
    json!({ "valid": valid, "invalid": invalid })
}

pub(crate) fn runs() -> Value {
    let size = 10 * CHUNK_LEN + 1;
    let shape = Geometry::new(size).unwrap();
    let valid = [(0, 8 * CHUNK_LEN), (8, CHUNK_LEN), (8, 2 * CHUNK_LEN), (10, 1), (4, 4 * CHUNK_LEN)];
    let valid = valid.map(|(start, len)| {
        let run = shape.run(index(start), len).unwrap();
        json!({ "size": size, "index": start, "len": len, "count": run.count() })
    });
    let invalid = [
        (0, 0),
        (11, 1),
        (0, 3 * CHUNK_LEN),
        (0, 16 * CHUNK_LEN),
        (2, 4 * CHUNK_LEN),
        (3, CHUNK_LEN - 1),
        (8, 3 * CHUNK_LEN + 1),
        (8, 4 * CHUNK_LEN),
        (10, 2),
    ];
    let invalid = invalid.map(|(start, len)| {
        let error = shape.run(index(start), len).unwrap_err();
        json!({ "size": size, "index": start, "len": len, "error": error.code() })
    });
    assert!(Geometry::new(MAX_FILE_LEN + 1).is_err());
    json!({ "valid": valid, "invalid": invalid })
}
