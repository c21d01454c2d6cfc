//! Which of a home's own chunks contradict a root that is already known.
//!
//! A home can end up with other bytes for a chunk than the root was made of: its disk was lost after ROOT, and a
//! client sent it something else; or it took the file over. The root stands (design, step 6), so somebody's bytes are
//! not part of the file. With the values of all its own chunks and what the other holders say, the home can find out
//! whose: it is believed whose spans, put over its own, give the root.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::geometry::Geometry;
use crate::hash::{ChainingValue, Root};
use crate::ids::DcId;
use crate::span::{Place, Span};
use crate::span_tree::merge_chunks;

/// Past so many other holders no combination is tried: the home waits for a person.
const MAX_HOLDERS: usize = 8;

/// What contradicts the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolution {
    /// Own chunks that are not part of the file.
    pub lost: Vec<Range<u64>>,
    /// Holders whose spans are.
    pub trusted: BTreeSet<DcId>,
}

/// Finds the holders whose spans, put over the own chunks, give the root. `own` are the values of all chunks of the
/// file, in order, which were found not to give it; `others` the spans of every other holder.
pub fn resolve(
    file: Geometry,
    root: Root,
    own: &[ChainingValue],
    others: &BTreeMap<DcId, Vec<Span>>,
) -> Option<Resolution> {
    let holders: Vec<DcId> = others.keys().copied().collect();
    if holders.len() > MAX_HOLDERS || own.len() as u64 != file.chunks() {
        return None;
    }
    if file.chunks() == 1 {
        // Its value does not show the root. The own bytes were found not to give it: whoever has others may be right,
        // and what is pulled is checked again.
        let differs = |span: &Span| own.first().is_some_and(|own| span.value != *own);
        let trusted: BTreeSet<DcId> =
            others.iter().filter(|(_, spans)| spans.iter().any(differs)).map(|(dc, _)| *dc).collect();
        let lost = std::iter::once(0..1).collect();
        return (!trusted.is_empty()).then_some(Resolution { lost, trusted });
    }
    // Only where somebody says something else than the own chunks do can a combination differ from them.
    let mut own = Own { file, values: own, nodes: BTreeMap::new() };
    let different: BTreeMap<DcId, Vec<Span>> = others
        .iter()
        .map(|(dc, spans)| {
            let differs = |span: &&Span| {
                span.place.check(file).is_ok()
                    && own.value(span.place).is_some_and(|value| value != span.value)
            };
            (*dc, spans.iter().filter(differs).copied().collect())
        })
        .collect();
    for subset in 1u32..1 << holders.len() {
        let trusted: BTreeSet<DcId> =
            holders.iter().enumerate().filter(|(i, _)| subset & 1 << i != 0).map(|(_, dc)| *dc).collect();
        let over: BTreeMap<Place, ChainingValue> = trusted
            .iter()
            .filter_map(|dc| different.get(dc))
            .flatten()
            .map(|span| (span.place, span.value))
            .collect();
        let (left, right) = Place::top_children(file)?;
        let (left, right) = (own.value_under(left, &over)?, own.value_under(right, &over)?);
        if Root::merge(&left, &right) == root {
            let lost = over.keys().map(|place| place.range(file)).collect();
            return Some(Resolution { lost, trusted });
        }
    }
    None
}

/// The own chunks, and the values of the nodes that were asked for.
struct Own<'a> {
    file: Geometry,
    values: &'a [ChainingValue],
    nodes: BTreeMap<Place, ChainingValue>,
}

impl Own<'_> {
    fn value(&mut self, place: Place) -> Option<ChainingValue> {
        if let Some(value) = self.nodes.get(&place) {
            return Some(*value);
        }
        let range = place.range(self.file);
        let values = self.values.get(range.start as usize..range.end as usize)?;
        let value = merge_chunks(self.file, place, values)?;
        self.nodes.insert(place, value);
        Some(value)
    }

    /// The value of a place with other values put over the own.
    fn value_under(&mut self, place: Place, over: &BTreeMap<Place, ChainingValue>) -> Option<ChainingValue> {
        if let Some(value) = over.get(&place) {
            return Some(*value);
        }
        let range = place.range(self.file);
        let first = Place::clipped(range.start, 0, self.file);
        let touched = over.range(first..).next().is_some_and(|(other, _)| other.start() < range.end);
        match place.children(self.file) {
            Some((left, right)) if touched => {
                Some(ChainingValue::merge(&self.value_under(left, over)?, &self.value_under(right, over)?))
            }
            Some(_) | None => self.value(place),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_the_right_bytes_is_found() {
        let file = Geometry::new(11 << 20).unwrap();
        let cv = |n: u64| ChainingValue::from_bytes(*blake3::hash(&n.to_be_bytes()).as_bytes());
        let right: Vec<_> = (0..11).map(cv).collect();
        let (a, b) = Place::top_children(file).unwrap();
        let part = |place: Place, all: &[ChainingValue]| {
            let range = place.range(file);
            merge_chunks(file, place, &all[range.start as usize..range.end as usize]).unwrap()
        };
        let root = Root::merge(&part(a, &right), &part(b, &right));
        let mut own = right.clone();
        own[5] = cv(99);
        let good = Place::new(4, 2).unwrap();
        let bad = Place::new(8, 0).unwrap();
        let others = BTreeMap::from([
            (DcId::new(2), vec![Span::new(bad, cv(77))]),
            (DcId::new(3), vec![Span::new(good, part(good, &right))]),
        ]);
        let found = resolve(file, root, &own, &others).unwrap();
        assert_eq!(found.lost, [4..8, 0..0].into_iter().filter(|r| !r.is_empty()).collect::<Vec<_>>());
        assert_eq!(found.trusted, [DcId::new(3)].into());
        assert_eq!(resolve(file, Root::empty(), &own, &others), None);
    }
}
