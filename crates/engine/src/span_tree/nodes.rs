//! The nodes of a span tree, in order of their first chunk.
//!
//! Neighbours stand together in groups: a sorted row for each [`GROUP`] chunks that has any. A window of a large file is
//! then a small map of short rows, and each of the few searches that an insertion takes ends in memory that the one
//! before has touched. A node that is larger than a group stands in the group that it begins in, alone. Belongs to its
//! tree.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::geometry::Geometry;
use crate::hash::ChainingValue;
use crate::span::Place;

/// Chunks of a group, as a power of two: so few that moving a whole row of nodes costs about as much as a merge.
const GROUP: u32 = 10;

/// One node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) start: u64,
    pub(super) level: u8,
    pub(super) value: ChainingValue,
}

impl Node {
    /// The first chunk behind it.
    fn end(&self, file: Geometry) -> u64 {
        Place::clipped(self.start, self.level, file).range(file).end
    }

    fn is(&self, place: Place) -> bool {
        self.start == place.start() && self.level == place.level()
    }
}

/// The nodes of a tree, at most one for each first chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Nodes {
    /// By the number of the group; none of them is empty, so that equal sets are equal.
    groups: BTreeMap<u64, Vec<Node>>,
    len: usize,
}

/// Where in a row the nodes from `start` on begin.
fn from(row: &[Node], start: u64) -> usize {
    row.partition_point(|node| node.start < start)
}

impl Nodes {
    pub(super) const fn new() -> Self {
        Self { groups: BTreeMap::new(), len: 0 }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// The last node that begins before `end`.
    pub(super) fn last_before(&self, end: u64) -> Option<Node> {
        let group = end >> GROUP;
        // Mostly there is one in the same group, and one search finds it.
        if let Some(row) = self.groups.get(&group)
            && let Some(at) = from(row, end).checked_sub(1)
        {
            return Some(row[at]);
        }
        let (_, row) = self.groups.range(..group).next_back()?;
        row.last().copied()
    }

    /// The nodes that begin in `range`, in order.
    pub(super) fn range(&self, range: Range<u64>) -> impl Iterator<Item = Node> + '_ {
        // An empty range has no last group; one that is turned around is as good as empty.
        let end = range.end.max(range.start);
        let groups = range.start >> GROUP..=end >> GROUP;
        groups_of(&self.groups, groups)
            .flat_map(move |row| &row[from(row, range.start)..from(row, end)])
            .copied()
    }

    /// All nodes, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = Node> + '_ {
        self.groups.values().flatten().copied()
    }

    /// Adds a node, merged with its siblings as far as they are there, and answers what it became; or the last node
    /// that it would touch, and then adds nothing.
    pub(super) fn add(
        &mut self,
        file: Geometry,
        mut place: Place,
        mut value: ChainingValue,
    ) -> Result<Place, Node> {
        loop {
            let number = place.start() >> GROUP;
            let (at, last) = self.before(file, place);
            // Nodes do not overlap: if any is touched, the last one that begins before the end is.
            if let Some(last) = last.filter(|last| last.end(file) > place.start()) {
                return Err(last);
            }
            // So a sibling, if it is there, is a neighbour.
            let mut at = at;
            let row = self.groups.entry(number).or_default();
            let elsewhere = loop {
                let Some(family) = place.family(file) else { break None };
                let sibling = family.sibling;
                if sibling.start() >> GROUP != number {
                    break Some(family);
                }
                let beside = if sibling.start() < place.start() { at.wrapping_sub(1) } else { at };
                if !row.get(beside).is_some_and(|node| node.is(sibling)) {
                    break None;
                }
                value = family.merge(&value, &row.remove(beside).value);
                self.len -= 1;
                at = at.min(beside);
                place = family.parent;
            };
            row.insert(at, Node { start: place.start(), level: place.level(), value });
            self.len += 1;
            let Some(family) = elsewhere else { return Ok(place) };
            let Some(sibling) = self.take(family.sibling) else { return Ok(place) };
            self.take(place);
            value = family.merge(&value, &sibling);
            place = family.parent;
        }
    }

    /// Where in its row a place would stand, and the last node that begins before the place's end.
    fn before(&self, file: Geometry, place: Place) -> (usize, Option<Node>) {
        if u32::from(place.level()) > GROUP {
            return (0, self.last_before(place.range(file).end));
        }
        let number = place.start() >> GROUP;
        let row = self.groups.get(&number).map_or(&[][..], Vec::as_slice);
        let at = from(row, place.range(file).end);
        let earlier = || self.groups.range(..number).next_back().and_then(|(_, row)| row.last());
        (at, row[..at].last().or_else(earlier).copied())
    }

    /// Removes a node, and answers its value.
    fn take(&mut self, place: Place) -> Option<ChainingValue> {
        let number = place.start() >> GROUP;
        let row = self.groups.get_mut(&number)?;
        let at = from(row, place.start());
        row.get(at).filter(|node| node.is(place))?;
        let taken = row.remove(at);
        self.len -= 1;
        if row.is_empty() {
            self.groups.remove(&number);
        }
        Some(taken.value)
    }

    /// Removes the nodes that begin in `range`, and tells each.
    pub(super) fn cut(&mut self, range: Range<u64>, mut gone: impl FnMut(Node)) {
        let groups = range.start >> GROUP..=range.end.max(range.start) >> GROUP;
        let mut empty = Vec::new();
        for (number, row) in self.groups.range_mut(groups) {
            let inside = from(row, range.start)..from(row, range.end.max(range.start));
            self.len -= inside.len();
            row.drain(inside).for_each(&mut gone);
            if row.is_empty() {
                empty.push(*number);
            }
        }
        for number in empty {
            self.groups.remove(&number);
        }
    }
}

fn groups_of(
    groups: &BTreeMap<u64, Vec<Node>>,
    range: std::ops::RangeInclusive<u64>,
) -> impl Iterator<Item = &Vec<Node>> {
    groups.range(range).map(|(_, row)| row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CHUNK_LEN;
    use proptest::prelude::*;

    const CHUNKS: u64 = 5000;

    fn value(of: Place) -> ChainingValue {
        ChainingValue::from_bytes(
            *blake3::hash(&[of.start(), of.level().into()].map(u64::to_be_bytes).concat()).as_bytes(),
        )
    }

    /// The same without groups.
    #[derive(Default)]
    struct Plain(BTreeMap<u64, Node>);

    impl Plain {
        fn merge(&mut self, file: Geometry, mut place: Place, mut value: ChainingValue) -> Place {
            while let Some(family) = place.family(file) {
                let sibling = family.sibling.start();
                if !self.0.get(&sibling).is_some_and(|node| node.is(family.sibling)) {
                    break;
                }
                value = family.merge(&value, &self.0[&sibling].value);
                self.0.remove(&sibling);
                place = family.parent;
            }
            self.0.insert(place.start(), Node { start: place.start(), level: place.level(), value });
            place
        }

        fn range(&self, range: Range<u64>) -> Vec<Node> {
            self.0.range(range).map(|(_, node)| *node).collect()
        }
    }

    proptest! {
        /// Whatever is done, it answers as a map does that has no groups.
        #[test]
        fn groups_are_not_seen(steps in prop::collection::vec((0u8..5, 0..CHUNKS, 0u8..13), 1..300)) {
            let file = Geometry::new(CHUNKS * CHUNK_LEN).unwrap();
            let (mut nodes, mut plain) = (Nodes::new(), Plain::default());
            for (what, at, level) in steps {
                let place = Place::clipped(at >> level << level, level, file);
                let range = place.range(file);
                if what == 0 {
                    let mut gone = Vec::new();
                    nodes.cut(range.clone(), |node| gone.push(node));
                    prop_assert_eq!(gone, plain.range(range.clone()));
                    plain.0.retain(|at, _| !range.contains(at));
                } else {
                    let before = plain.0.range(..range.end).next_back().map(|(_, node)| *node);
                    prop_assert_eq!(nodes.last_before(range.end), before);
                    let expected = match before.filter(|node| node.end(file) > range.start) {
                        Some(touched) => Err(touched),
                        None => Ok(plain.merge(file, place, value(place))),
                    };
                    prop_assert_eq!(nodes.add(file, place, value(place)), expected);
                }
                prop_assert_eq!(nodes.len(), plain.0.len());
                prop_assert!(nodes.groups.values().all(|row| !row.is_empty()));
                prop_assert_eq!(nodes.range(range.clone()).collect::<Vec<_>>(), plain.range(range));
                prop_assert!(nodes.iter().eq(plain.0.values().copied()));
            }
        }
    }
}
