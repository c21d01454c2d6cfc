//! Places and span trees against the plainest thing that could be right: a tree walked from its top, and a set of
//! chunks.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proptest::prelude::*;
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::limits::{MAX_CHUNKS, MAX_FILE_LEN, MAX_LEVEL};
use sluice_engine::span::{Place, PlaceError, Span};
use sluice_engine::span_tree::{
    Contradiction, Insertion, ProofStep, SpanTree, climb, merge_chunks, path_places, proof_places,
    root_of_proof,
};

use crate::world::{chunk, place, places, shape, span, values};

/// The chunks of every node below the top, walked down from it.
fn walked(chunks: u64) -> BTreeMap<(u64, u64), Vec<(u64, u64)>> {
    let mut nodes = BTreeMap::new();
    let mut open = vec![(0, chunks, Vec::new())];
    while let Some((start, end, above)) = open.pop() {
        let len = end - start;
        if len > 1 {
            let half = (len.next_power_of_two()) / 2;
            let mut below = above.clone();
            below.push((start, end));
            open.push((start, start + half, below.clone()));
            open.push((start + half, end, below));
        }
        nodes.insert((start, end), above);
    }
    if chunks > 1 {
        nodes.remove(&(0, chunks));
    }
    nodes
}

fn named(start: u64, end: u64) -> Place {
    place(start, (end - start).next_power_of_two().trailing_zeros() as u8)
}

#[test]
fn every_node_has_one_name_and_its_family() {
    for chunks in 1..=70 {
        let file = shape(chunks);
        let nodes = walked(chunks);
        let names: BTreeSet<Place> = nodes.keys().map(|&(start, end)| named(start, end)).collect();
        assert_eq!(places(file).into_iter().collect::<BTreeSet<_>>(), names, "{chunks} chunks");
        for start in 0..=chunks + 2 {
            for level in 0..=8 {
                let Ok(place) = Place::new(start, level) else {
                    assert_ne!(start % (1 << level), 0);
                    continue;
                };
                let fits = place.check(file);
                let past = PlaceError::PastEnd { start, level, chunks };
                assert_eq!(
                    fits,
                    if names.contains(&place) { Ok(()) } else { Err(past) },
                    "{place} of {chunks}"
                );
            }
        }
        for (&(start, end), above) in &nodes {
            let place = named(start, end);
            assert_eq!(place.range(file), start..end);
            assert_eq!(place.chunks(file), end - start);
            assert_eq!(Place::clipped(start, place.level(), file), place);
            let parent = above.last().filter(|_| above.len() > 1);
            let family = place.family(file);
            assert_eq!(
                family.map(|family| family.parent),
                parent.map(|&(a, b)| named(a, b)),
                "{place} of {chunks}"
            );
            if let (Some(family), Some(&(from, to))) = (family, parent) {
                assert_eq!(family.is_left, start == from);
                let beside = if family.is_left { (end, to) } else { (from, start) };
                assert_eq!(family.sibling, named(beside.0, beside.1));
                let pair = if family.is_left { (place, family.sibling) } else { (family.sibling, place) };
                assert_eq!(family.parent.children(file), Some(pair));
            }
            if end - start == 1 {
                assert_eq!(place.children(file), None);
            }
            for &(other_start, other_end) in nodes.keys() {
                let inside = start <= other_start && other_end <= end;
                let other = named(other_start, other_end);
                // By name alone, without the file, a clipped place contains what it would contain unclipped.
                assert!(!inside || place.contains(other), "{place} contains {other}");
                if !inside && place.contains(other) {
                    assert!(end == chunks && place.level() >= other.level());
                }
            }
        }
        let whole = nodes.keys().filter(|_| chunks > 1).filter(|(start, end)| end - start < chunks);
        let top: Vec<Place> =
            whole.filter(|key| nodes[key].len() == 1).map(|&(start, end)| named(start, end)).collect();
        assert_eq!(Place::top_children(file).map(|(a, b)| vec![a, b]).unwrap_or_default(), top);
    }
}

#[test]
fn places_past_every_file_are_refused() {
    assert_eq!(Place::new(0, MAX_LEVEL).map(Place::level), Ok(MAX_LEVEL));
    assert_eq!(Place::new(0, MAX_LEVEL + 1), Err(PlaceError::Level { level: MAX_LEVEL + 1 }));
    assert_eq!(Place::new(MAX_CHUNKS - 1, 0).map(Place::start), Ok(MAX_CHUNKS - 1));
    let largest = Geometry::new(MAX_FILE_LEN).unwrap();
    let (left, right) = Place::top_children(largest).unwrap();
    assert_eq!((left, right.start()), (place(0, 35), 1 << 35));
    assert_eq!((left.check(largest), right.check(largest)), (Ok(()), Ok(())));
    assert_eq!(left.family(largest), None);
    let codes = [
        (PlaceError::Level { level: 1 }, "span-level"),
        (PlaceError::Misaligned { start: 1, level: 1 }, "span-alignment"),
        (PlaceError::OutOfRange { start: 1 }, "span-range"),
        (PlaceError::PastEnd { start: 1, level: 1, chunks: 1 }, "span-past-end"),
    ];
    for (error, code) in codes {
        assert_eq!(error.code(), code);
    }
    assert_eq!((place(4, 0).to_string(), place(8, 3).to_string()), ("4".into(), "8+2^3".into()));
    assert_eq!(format!("{:?}", place(8, 3)), "8+2^3");
    let value = ChainingValue::from_bytes([0xAB; 32]);
    assert_eq!(format!("{:?}", Span::new(place(8, 3), value)), "8+2^3=abababab");
}

/// The fewest nodes of at most a level that fill a range, walked down from the top.
fn tiled(nodes: &BTreeMap<(u64, u64), Vec<(u64, u64)>>, range: &Range<u64>, level: u8) -> Vec<Place> {
    let mut tiles = Vec::new();
    let fits =
        |start: u64, end: u64| range.start <= start && end <= range.end && named(start, end).level() <= level;
    for (&(start, end), above) in nodes {
        let larger = above.iter().any(|&(a, b)| nodes.contains_key(&(a, b)) && fits(a, b));
        if fits(start, end) && !larger {
            tiles.push(named(start, end));
        }
    }
    tiles.sort_by_key(|tile| tile.start());
    tiles
}

#[test]
fn a_range_is_cut_into_the_fewest_places() {
    for chunks in 1..=24 {
        let file = shape(chunks);
        let nodes = walked(chunks);
        for start in 0..chunks {
            for end in start..=chunks + 1 {
                for level in [0, 1, 2, 4, MAX_LEVEL] {
                    let range = start..end;
                    let expected = tiled(&nodes, &range, level);
                    assert_eq!(
                        Place::tile(range, level, file),
                        expected,
                        "{start}..{end} of {chunks}, {level}"
                    );
                }
            }
        }
    }
}

/// What a tree of these chunks must say.
struct Chunks {
    file: Geometry,
    values: Vec<ChainingValue>,
    held: BTreeSet<u64>,
}

impl Chunks {
    /// The largest nodes that are wholly held, in order.
    fn spans(&self) -> Vec<Span> {
        let nodes = walked(self.file.chunks());
        let whole = |start: u64, end: u64| (start..end).all(|i| self.held.contains(&i));
        let mut spans = Vec::new();
        for (&(start, end), above) in &nodes {
            let larger = above.iter().any(|&(a, b)| nodes.contains_key(&(a, b)) && whole(a, b));
            if whole(start, end) && !larger {
                spans.push(span(self.file, named(start, end), &self.values));
            }
        }
        spans.sort_by_key(|span| span.place.start());
        spans
    }

    /// Maximal ranges of chunks inside a range that are held, or are not.
    fn ranges(&self, range: Range<u64>, held: bool) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for i in range.start..range.end.min(self.file.chunks()) {
            if self.held.contains(&i) == held {
                match ranges.last_mut() {
                    Some(last) if last.end == i => last.end += 1,
                    _ => ranges.push(i..i + 1),
                }
            }
        }
        ranges
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_tree_is_a_set_of_chunks(
        chunks in 1u64..20,
        steps in proptest::collection::vec((0usize..1_000, 0u8..8), 1..30),
        asked in (0u64..22, 1u64..22, 0usize..5),
    ) {
        let file = shape(chunks);
        let all = places(file);
        let mut model = Chunks { file, values: values(file, None), held: BTreeSet::new() };
        let mut tree = SpanTree::new(file);
        prop_assert!(tree.is_empty());
        for (pick, what) in steps {
            let place = all[pick % all.len()];
            let range = place.range(file);
            if what == 0 {
                let begun = model.spans().into_iter().filter(|span| range.contains(&span.place.start()));
                for span in begun {
                    span.place.range(file).for_each(|i| {
                        model.held.remove(&i);
                    });
                }
                tree.cut(place);
            } else {
                let new = span(file, place, &model.values);
                let holder = model.spans().into_iter().find(|span| span.place.range(file).start <= range.start && range.end <= span.place.range(file).end);
                model.held.extend(range.clone());
                let inserted = tree.insert(new).unwrap();
                match holder {
                    Some(holder) if holder.place == place => prop_assert_eq!(inserted, Insertion::Known),
                    Some(holder) => prop_assert_eq!(inserted, Insertion::Covered(holder.place)),
                    None => {
                        let into = model.spans().into_iter().find(|span| span.place.range(file).contains(&range.start));
                        prop_assert_eq!(inserted, Insertion::Grown(into.unwrap().place));
                    }
                }
                if let Some(holder) = model.spans().into_iter().find(|span| span.place == place) {
                    let got = ChainingValue::from_bytes([0; 32]);
                    let lie = tree.clone().insert(Span::new(place, got));
                    prop_assert_eq!(lie, Err(Contradiction { place, held: holder.value, got }));
                }
            }
            let spans = model.spans();
            prop_assert_eq!(tree.iter().collect::<Vec<_>>(), spans.clone());
            prop_assert_eq!(tree.len(), spans.len());
            prop_assert_eq!(tree.is_empty(), spans.is_empty());
            prop_assert_eq!(tree.covered(), model.held.len() as u64);
            prop_assert_eq!(tree.is_whole(), model.held.len() as u64 == chunks);
            for i in 0..chunks + 2 {
                prop_assert_eq!(tree.has(i), model.held.contains(&i), "chunk {}", i);
            }
            for place in &all {
                let range = place.range(file);
                let covering = spans.iter().find(|span| {
                    let held = span.place.range(file);
                    held.start <= range.start && range.end <= held.end
                });
                prop_assert_eq!(tree.covering(*place), covering.copied());
                let whole = range.clone().all(|i| model.held.contains(&i));
                let larger = covering.is_some_and(|span| span.place != *place);
                let value = (whole && !larger).then(|| span(file, *place, &model.values).value);
                prop_assert_eq!(tree.value(*place), value);
                let touching: Vec<Span> = spans.iter().copied().filter(|span| {
                    let held = span.place.range(file);
                    held.start < range.end && range.start < held.end
                }).collect();
                prop_assert_eq!(tree.overlapping(*place), touching.clone());
                prop_assert_eq!(tree.within(range).collect::<Vec<_>>(), touching);
            }
            let (start, len, limit) = asked;
            let (range, end) = (start..start + len, start + len);
            prop_assert_eq!(tree.gaps(range.clone(), 99), model.ranges(range.clone(), false));
            let gaps = model.ranges(range.clone(), false);
            prop_assert_eq!(tree.gaps(range.clone(), limit), gaps[..gaps.len().min(limit)].to_vec());
            let within: Vec<Span> = spans.iter().copied().filter(|span| {
                let held = span.place.range(file);
                held.start < end && start < held.end
            }).collect();
            prop_assert_eq!(tree.within(range).collect::<Vec<_>>(), within);
            let held = model.ranges(0..chunks, true);
            prop_assert_eq!(tree.ranges(99), (held.clone(), true));
            let cut = held.len().min(limit);
            prop_assert_eq!(tree.ranges(limit), (held[..cut].to_vec(), held.len() <= limit));
        }
    }
}

#[test]
fn a_proof_holds_where_it_leads_and_nowhere_else() {
    for chunks in 1..=35 {
        let file = shape(chunks);
        let all = values(file, None);
        let value = |place: Place| span(file, place, &all).value;
        let root = Place::top_children(file).map(|(left, right)| Root::merge(&value(left), &value(right)));
        for place in places(file) {
            let own = Span::new(place, value(place));
            let beside = proof_places(file, place);
            let proof: Vec<ProofStep> =
                beside.iter().map(|&sibling| ProofStep { sibling, value: value(sibling) }).collect();
            assert_eq!(root_of_proof(file, own, &proof), root, "{place} of {chunks}");
            if chunks == 1 {
                assert!(proof.is_empty());
                continue;
            }
            let longer = [&proof[..], &proof[..1]].concat();
            assert_eq!(root_of_proof(file, own, &longer), None);
            assert_eq!(root_of_proof(file, own, &proof[..proof.len() - 1]), None);
            for i in 0..proof.len() {
                let mut elsewhere = proof.clone();
                elsewhere[i].sibling = place;
                assert_eq!(root_of_proof(file, own, &elsewhere), None, "step {i} of {place}");
                let mut other = proof.clone();
                other[i].value = ChainingValue::from_bytes([7; 32]);
                assert_ne!(root_of_proof(file, own, &other), root);
            }
            // Every place on the way up: the values beside the way give its own.
            for top in places(file) {
                let inside = top.range(file).start <= place.range(file).start
                    && place.range(file).end <= top.range(file).end;
                let path = path_places(file, place, top);
                assert_eq!(path.is_some(), inside, "{place} in {top} of {chunks}");
                let Some(path) = path else {
                    assert_eq!(climb(file, own, top, &[]), None);
                    continue;
                };
                let beside: Vec<ChainingValue> = path.iter().map(|&place| value(place)).collect();
                assert_eq!(climb(file, own, top, &beside), Some(value(top)));
                let longer = [&beside[..], &all[..1]].concat();
                assert_eq!(climb(file, own, top, &longer), None);
                if !beside.is_empty() {
                    assert_eq!(climb(file, own, top, &beside[1..]), None);
                }
            }
        }
        let too_many = values(shape(chunks + 1), None);
        let first = Place::top_children(file).map_or(chunk(0), |(left, _)| left);
        let len = first.chunks(file) as usize;
        assert!(merge_chunks(file, first, &all[..len]).is_some());
        assert_eq!(merge_chunks(file, first, &too_many[..len + 1]), None);
        assert_eq!(merge_chunks(file, first, &all[..len - 1]), None);
    }
}
