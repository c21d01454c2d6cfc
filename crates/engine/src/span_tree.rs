//! The span tree: a set of spans of one file, always merged as far as it goes.
//!
//! Siblings that are both present become their parent, up to but not including the top. A run of n chunks therefore
//! costs at most 2·log2(n) entries. The tree knows coverage and values, not who holds them.

mod nodes;

use std::ops::Range;

use self::nodes::{Node, Nodes};
use crate::geometry::Geometry;
use crate::hash::{ChainingValue, Root};
use crate::span::{Place, Span};

/// Two values for one place.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("span {place} has value {held:?} here, {got:?} was offered")]
pub struct Contradiction {
    /// The place.
    pub place: Place,
    /// The value already in the tree.
    pub held: ChainingValue,
    /// The value that was offered.
    pub got: ChainingValue,
}

/// What an insertion changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insertion {
    /// The tree now covers more; the span ended up inside this place.
    Grown(Place),
    /// The very same span was there.
    Known,
    /// A larger span was there; whether the two agree cannot be told from here.
    Covered(Place),
}

/// A set of spans of one file that do not overlap, siblings merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpanTree {
    file: Geometry,
    nodes: Nodes,
    covered: u64,
}

impl SpanTree {
    /// A tree without spans.
    pub const fn new(file: Geometry) -> Self {
        Self { file, nodes: Nodes::new(), covered: 0 }
    }

    /// The shape of the file.
    pub const fn file(&self) -> Geometry {
        self.file
    }

    /// Chunks covered.
    pub const fn covered(&self) -> u64 {
        self.covered
    }

    /// Whether every chunk is covered. An empty file always is.
    pub const fn is_whole(&self) -> bool {
        self.covered == self.file.chunks()
    }

    /// Whether no chunk is covered.
    pub fn is_empty(&self) -> bool {
        self.nodes.len() == 0
    }

    /// Number of spans kept.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Adds a span whose place is a node of this file ([`Place::check`]), and merges it upwards.
    ///
    /// Smaller spans inside it are absorbed unexamined: they cannot be compared without their siblings.
    pub fn insert(&mut self, span: Span) -> Result<Insertion, Contradiction> {
        let Span { place, value } = span;
        let touched = match self.nodes.add(self.file, place, value) {
            Ok(grown) => {
                self.covered += place.chunks(self.file);
                return Ok(Insertion::Grown(grown));
            }
            Err(touched) => self.span(touched),
        };
        if touched.place == place && touched.value == value {
            Ok(Insertion::Known)
        } else if touched.place == place {
            Err(Contradiction { place, held: touched.value, got: value })
        } else if touched.place.contains(place) {
            Ok(Insertion::Covered(touched.place))
        } else {
            self.cut(place);
            self.insert(span)
        }
    }

    /// Removes every span that begins inside `place`.
    pub fn cut(&mut self, place: Place) {
        let Self { file, nodes, covered } = self;
        nodes.cut(place.range(*file), |node| {
            *covered -= Place::clipped(node.start, node.level, *file).chunks(*file);
        });
    }

    /// The span that contains `place`, if one does.
    pub fn covering(&self, place: Place) -> Option<Span> {
        let found = self.span(self.nodes.at(self.file, place.start())?);
        found.place.contains(place).then_some(found)
    }

    /// Whether the chunk is covered.
    pub fn has(&self, chunk: u64) -> bool {
        self.nodes.at(self.file, chunk).is_some()
    }

    fn span(&self, node: Node) -> Span {
        Span::new(Place::clipped(node.start, node.level, self.file), node.value)
    }

    /// The value of `place`: kept as such, or merged from what is below. `None` if it is not wholly covered, or is
    /// inside a larger span.
    pub fn value(&self, place: Place) -> Option<ChainingValue> {
        if let Some(span) = self.covering(place) {
            return (span.place == place).then_some(span.value);
        }
        let (left, right) = place.children(self.file)?;
        // Nothing merges into the top, so only its children can be asked for piecewise; depth is at most 36.
        Some(ChainingValue::merge(&self.value(left)?, &self.value(right)?))
    }

    /// The spans, in order.
    pub fn iter(&self) -> impl Iterator<Item = Span> + '_ {
        self.nodes.iter().map(|node| self.span(node))
    }

    /// The spans that overlap `place`: the one that contains it, or those inside it.
    pub fn overlapping(&self, place: Place) -> Vec<Span> {
        if let Some(span) = self.covering(place) {
            return vec![span];
        }
        self.nodes.range(place.range(self.file)).map(|node| self.span(node)).collect()
    }

    /// The spans inside `place`, in order; it may be one of them.
    pub fn inside(&self, place: Place) -> impl Iterator<Item = Span> + '_ {
        let spans = self.nodes.range(place.range(self.file)).map(|node| self.span(node));
        // One that begins here may be larger.
        spans.filter(move |span| place.contains(span.place))
    }

    /// The spans that hold any chunk of `range`, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Span> + '_ {
        let Range { start, end } = range;
        let first = self.nodes.last_before(start.saturating_add(1));
        let rest = self.nodes.range(start.saturating_add(1)..end);
        let spans = first.into_iter().chain(rest).map(|node| self.span(node));
        spans.filter(move |span| span.place.range(self.file).end > start && span.place.start() < end)
    }

    /// The chunks of `range` that are not covered, as at most `limit` ranges.
    pub fn gaps(&self, range: Range<u64>, limit: usize) -> Vec<Range<u64>> {
        let end = range.end.min(self.file.chunks());
        let mut gaps = Vec::new();
        let mut at = range.start;
        if at >= end {
            return gaps;
        }
        let before = self.nodes.last_before(at + 1);
        for node in before.into_iter().chain(self.nodes.range(at + 1..end)) {
            if gaps.len() == limit {
                return gaps;
            }
            if node.start > at {
                gaps.push(at..node.start);
            }
            at = at.max(self.span(node).place.range(self.file).end);
        }
        if at < end && gaps.len() < limit {
            gaps.push(at..end);
        }
        gaps
    }

    /// The chunks that are covered, as at most `limit` ranges, and whether that was all.
    pub fn ranges(&self, limit: usize) -> (Vec<Range<u64>>, bool) {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for span in self.iter() {
            let range = span.place.range(self.file);
            let full = ranges.len() == limit;
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ if full => return (ranges, false),
                _ => ranges.push(range),
            }
        }
        (ranges, true)
    }

    /// The root, once the file is whole. `None` also for a file of one chunk, whose root only its bytes give.
    pub fn root(&self) -> Option<Root> {
        if self.file.chunks() == 0 {
            return Some(Root::empty());
        }
        let (left, right) = Place::top_children(self.file)?;
        Some(Root::merge(&self.value(left)?, &self.value(right)?))
    }
}

/// Merges the values of consecutive chunks that fill `place` exactly; `None` if their number is wrong.
pub fn merge_chunks(file: Geometry, place: Place, values: &[ChainingValue]) -> Option<ChainingValue> {
    if values.len() as u64 != place.chunks(file) {
        return None;
    }
    match place.children(file) {
        None => values.first().copied(),
        Some((left, right)) => {
            let (low, high) = values.split_at_checked(left.chunks(file) as usize)?;
            Some(ChainingValue::merge(&merge_chunks(file, left, low)?, &merge_chunks(file, right, high)?))
        }
    }
}

/// One step from a node towards the root: the value beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProofStep {
    /// Where the value beside lies.
    pub sibling: Place,
    /// The value beside.
    pub value: ChainingValue,
}

/// The root that a node's value and the values beside its way up give; `None` if the steps are not that way.
///
/// For a file of one chunk there is no such way, and the answer is `None`.
pub fn root_of_proof(file: Geometry, span: Span, proof: &[ProofStep]) -> Option<Root> {
    let Span { mut place, mut value } = span;
    let mut steps = proof.iter();
    while let Some(family) = place.family(file) {
        let step = steps.next()?;
        if step.sibling != family.sibling {
            return None;
        }
        value = family.merge(&value, &step.value);
        place = family.parent;
    }
    let (left, right) = Place::top_children(file)?;
    let last = steps.next()?;
    if steps.next().is_some() {
        return None;
    }
    if place == left && last.sibling == right {
        Some(Root::merge(&value, &last.value))
    } else if place == right && last.sibling == left {
        Some(Root::merge(&last.value, &value))
    } else {
        None
    }
}

/// The places beside the way from `place` up to the root, lowest first.
pub fn proof_places(file: Geometry, place: Place) -> Vec<Place> {
    let mut places = Vec::new();
    let mut at = place;
    while let Some(family) = at.family(file) {
        places.push(family.sibling);
        at = family.parent;
    }
    if let Some((left, right)) = Place::top_children(file) {
        places.push(if at == left { right } else { left });
    }
    places
}

/// The places beside the way from `place` up to `top`, lowest first; `None` if `place` is not inside `top`.
pub fn path_places(file: Geometry, place: Place, top: Place) -> Option<Vec<Place>> {
    let mut places = Vec::new();
    let mut at = place;
    while at != top {
        let family = at.family(file).filter(|family| top.contains(family.parent))?;
        places.push(family.sibling);
        at = family.parent;
    }
    Some(places)
}

/// The value of `top` from that of a span inside it and the values beside the way up; `None` if their number is not
/// that of the steps.
pub fn climb(file: Geometry, span: Span, top: Place, beside: &[ChainingValue]) -> Option<ChainingValue> {
    let Span { mut place, mut value } = span;
    let mut steps = beside.iter();
    while place != top {
        let family = place.family(file).filter(|family| top.contains(family.parent))?;
        value = family.merge(&value, steps.next()?);
        place = family.parent;
    }
    steps.next().is_none().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::ChunkIndex;
    use crate::limits::{CHUNK_LEN, MAX_CHUNKS, MAX_FILE_LEN};

    fn value(i: u64) -> ChainingValue {
        ChainingValue::from_bytes(*blake3::hash(&i.to_be_bytes()).as_bytes())
    }

    fn chunk(i: u64) -> Span {
        Span::new(Place::of_chunk(ChunkIndex::new(i).unwrap()), value(i))
    }

    fn tree(chunks: u64) -> SpanTree {
        SpanTree::new(Geometry::new(chunks * CHUNK_LEN).unwrap())
    }

    #[test]
    fn a_whole_file_is_two_nodes_and_a_root() {
        let mut tree = tree(11);
        for i in [3, 1, 0, 10, 2, 9, 8, 7, 4, 6, 5] {
            assert!(matches!(tree.insert(chunk(i)), Ok(Insertion::Grown(_))));
        }
        assert!(tree.is_whole());
        assert_eq!(tree.len(), 2);
        assert!(tree.root().is_some());
        assert_eq!(tree.insert(chunk(5)), Ok(Insertion::Covered(Place::new(0, 3).unwrap())));
    }

    #[test]
    fn contradictions_are_named() {
        let mut tree = tree(5);
        tree.insert(chunk(1)).unwrap();
        assert_eq!(tree.insert(chunk(1)), Ok(Insertion::Known));
        let other = Span::new(chunk(1).place, value(99));
        assert_eq!(
            tree.insert(other),
            Err(Contradiction { place: other.place, held: value(1), got: value(99) })
        );
    }

    #[test]
    fn gaps_and_ranges_mirror_each_other() {
        let mut tree = tree(20);
        for i in [0, 1, 2, 3, 5, 9, 10, 19] {
            tree.insert(chunk(i)).unwrap();
        }
        assert_eq!(tree.gaps(0..20, 99), [4..5, 6..9, 11..19]);
        assert_eq!(tree.gaps(2..10, 99), [4..5, 6..9]);
        assert_eq!(tree.gaps(5..6, 99), []);
        assert_eq!(tree.gaps(12..14, 1), tree.gaps(12..14, 99));
        assert_eq!(tree.gaps(0..20, 1), std::slice::from_ref(&(4..5)));
        assert_eq!(tree.ranges(99), (vec![0..4, 5..6, 9..11, 19..20], true));
        assert!(!tree.ranges(2).1);
        assert!(tree.has(10) && !tree.has(11));
    }

    #[test]
    fn the_largest_file_needs_no_more_than_its_top_two() {
        let file = Geometry::new(MAX_FILE_LEN).unwrap();
        let mut tree = SpanTree::new(file);
        for (i, place) in Place::tile(0..MAX_CHUNKS, 30, file).into_iter().enumerate() {
            tree.insert(Span::new(place, value(i as u64))).unwrap();
        }
        assert!(tree.is_whole());
        assert_eq!(tree.len(), 2);
        assert!(tree.root().is_some());
    }

    #[test]
    fn proofs_lead_to_the_root_and_only_there() {
        for chunks in 2..40u64 {
            let mut tree = tree(chunks);
            let values: Vec<_> = (0..chunks).map(value).collect();
            for i in 0..chunks {
                tree.insert(chunk(i)).unwrap();
            }
            let file = tree.file();
            let of = |place: Place| {
                let range = place.range(file);
                merge_chunks(file, place, &values[range.start as usize..range.end as usize]).unwrap()
            };
            for i in 0..chunks {
                let span = chunk(i);
                let mut proof: Vec<_> = proof_places(file, span.place)
                    .into_iter()
                    .map(|sibling| ProofStep { sibling, value: of(sibling) })
                    .collect();
                assert_eq!(root_of_proof(file, span, &proof), tree.root(), "chunk {i} of {chunks}");
                assert_eq!(root_of_proof(file, span, &proof[1..]), None);
                proof[0].value = value(77);
                assert_ne!(root_of_proof(file, span, &proof), tree.root());
            }
        }
    }
}
