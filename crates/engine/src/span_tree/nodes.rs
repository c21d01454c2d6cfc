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
use crate::limits::UNIT_LEVEL;
use crate::span::Place;

/// Chunks of a group, as a power of two: a unit, in which there are 64 stripes. A row of single chunks may be longer, up
/// to every other one; to move half of it is still little beside writing a chunk, or verifying a command that names one.
const GROUP: u32 = UNIT_LEVEL as u32;

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

/// Puts a node at its position in a row, merged with its siblings as far as they are there, and answers what it became.
fn merge_into(
    row: &mut Vec<Node>,
    at: usize,
    file: Geometry,
    mut place: Place,
    mut node: Node,
) -> (Place, ChainingValue) {
    // Siblings are neighbours, so that those which merge are one stretch of the row.
    let Range { mut start, mut end } = at..at;
    while let Some(family) = place.family(file) {
        let beside = if family.is_left { Some(end) } else { start.checked_sub(1) };
        let beside = beside.and_then(|beside| row.get(beside)).filter(|node| node.is(family.sibling));
        let Some(beside) = beside else { break };
        node.value = family.merge(&node.value, &beside.value);
        place = family.parent;
        if family.is_left {
            end += 1;
        } else {
            start -= 1;
        }
    }
    (node.start, node.level) = (place.start(), place.level());
    if start == end {
        row.insert(start, node);
    } else {
        row[start] = node;
        row.drain(start + 1..end);
        if row.len() < row.capacity() / 4 {
            // Much of it has merged, and may stay like that for long.
            row.shrink_to(2 * row.len());
        }
    }
    (place, node.value)
}

impl Nodes {
    pub(super) const fn new() -> Self {
        Self { groups: BTreeMap::new(), len: 0 }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// The node that has this chunk, if one does.
    pub(super) fn at(&self, file: Geometry, chunk: u64) -> Option<Node> {
        let end = chunk.saturating_add(1);
        let node = match self.groups.get(&(chunk >> GROUP)) {
            // No node of another row reaches into one that is there.
            Some(row) => row[..from(row, end)].last().copied(),
            None => self.last_before(end),
        };
        node.filter(|node| chunk < node.end(file))
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
    pub(super) fn add(&mut self, file: Geometry, place: Place, value: ChainingValue) -> Result<Place, Node> {
        let (number, end) = (place.start() >> GROUP, place.range(file).end);
        let touches = |last: &Node| last.end(file) > place.start();
        let added = Node { start: place.start(), level: place.level(), value };
        let (mut place, mut value) = match self.groups.get_mut(&number) {
            // No node of another row reaches into one that is there, so that mostly one search is enough.
            Some(row) if u32::from(place.level()) <= GROUP => {
                let at = from(row, end);
                if let Some(last) = row[..at].last().copied().filter(touches) {
                    return Err(last);
                }
                let before = row.len();
                let merged = merge_into(row, at, file, place, added);
                self.len = self.len + row.len() - before;
                merged
            }
            // Nodes do not overlap: if any is touched, the last one that begins before the end is.
            Some(_) | None => {
                if let Some(last) = self.last_before(end).filter(touches) {
                    return Err(last);
                }
                self.put(added);
                (place, value)
            }
        };
        // What stands beside in another row. Its parent is a row of its own, and so is whatever that becomes.
        while let Some(family) = place.family(file)
            && family.sibling.start() >> GROUP != place.start() >> GROUP
            && let Some(beside) = self.take(family.sibling)
        {
            self.take(place);
            value = family.merge(&value, &beside);
            place = family.parent;
            self.put(Node { start: place.start(), level: place.level(), value });
        }
        Ok(place)
    }

    /// Puts a node where there is no row.
    fn put(&mut self, node: Node) {
        self.groups.insert(node.start >> GROUP, vec![node]);
        self.len += 1;
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

    const CHUNKS: u64 = 20_000;

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

    #[test]
    fn a_row_that_has_merged_gives_its_room_back() {
        let file = Geometry::new(CHUNKS * CHUNK_LEN).unwrap();
        let mut nodes = Nodes::new();
        let mut add = |chunk| {
            let place = Place::clipped(chunk, 0, file);
            nodes.add(file, place, value(place)).unwrap();
            (nodes.groups[&0].len(), nodes.groups[&0].capacity())
        };
        let chunks = 0..1 << GROUP;
        let alone = chunks.clone().step_by(2).map(&mut add).last();
        assert!(alone.is_some_and(|(len, room)| len == chunks.clone().count() / 2 && room >= len));
        for chunk in chunks.skip(1).step_by(2) {
            let (len, room) = add(chunk);
            assert!(room <= 4 * (len + 1), "room for {room} nodes, there are {len}");
            assert!(len <= room);
        }
        assert_eq!(nodes.len(), 1);
    }

    proptest! {
        /// Whatever is done, it answers as a map does that has no groups.
        #[test]
        fn groups_are_not_seen(steps in prop::collection::vec((0u8..5, 0..CHUNKS, 0u8..15), 1..300)) {
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
                    let around = plain.0.range(..=at).next_back().map(|(_, node)| *node);
                    prop_assert_eq!(nodes.at(file, at), around.filter(|node| at < node.end(file)));
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
