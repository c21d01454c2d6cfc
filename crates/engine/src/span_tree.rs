//! The span tree: a set of spans of one file, always merged as far as it goes.
//!
//! Siblings that are both present become their parent, up to but not including the top. A run of n chunks therefore
//! costs at most 2·log2(n) entries. The tree knows coverage and values, not who holds them.

use std::collections::BTreeMap;
use std::ops::Range;

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
    /// By first chunk. Values: level and chaining value.
    nodes: BTreeMap<u64, (u8, ChainingValue)>,
    covered: u64,
}

impl SpanTree {
    /// A tree without spans.
    pub const fn new(file: Geometry) -> Self {
        Self { file, nodes: BTreeMap::new(), covered: 0 }
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
        self.nodes.is_empty()
    }

    /// Number of spans kept.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Adds a span whose place is a node of this file ([`Place::check`]), and merges it upwards.
    ///
    /// Smaller spans inside it are absorbed unexamined: they cannot be compared without their siblings.
    pub fn insert(&mut self, span: Span) -> Result<Insertion, Contradiction> {
        let Span { mut place, mut value } = span;
        if let Some(holder) = self.covering(place) {
            if holder.place != place {
                return Ok(Insertion::Covered(holder.place));
            }
            if holder.value == value {
                return Ok(Insertion::Known);
            }
            return Err(Contradiction { place, held: holder.value, got: value });
        }
        self.cut(place);
        self.covered += place.chunks(self.file);
        while let Some(family) = place.family(self.file) {
            match self.nodes.get(&family.sibling.start()) {
                Some((level, sibling)) if *level == family.sibling.level() => {
                    value = family.merge(&value, sibling);
                    self.nodes.remove(&family.sibling.start());
                    place = family.parent;
                }
                Some(_) | None => break,
            }
        }
        self.nodes.insert(place.start(), (place.level(), value));
        Ok(Insertion::Grown(place))
    }

    /// Removes every span that begins inside `place`.
    pub fn cut(&mut self, place: Place) {
        let range = place.range(self.file);
        let inside: Vec<(u64, u8)> =
            self.nodes.range(range).map(|(start, (level, _))| (*start, *level)).collect();
        for (start, level) in inside {
            self.nodes.remove(&start);
            self.covered -= Place::clipped(start, level, self.file).chunks(self.file);
        }
    }

    /// The span that contains `place`, if one does.
    pub fn covering(&self, place: Place) -> Option<Span> {
        let (start, (level, value)) = self.nodes.range(..=place.start()).next_back()?;
        let found = Place::clipped(*start, *level, self.file);
        found.contains(place).then_some(Span::new(found, *value))
    }

    /// Whether the chunk is covered.
    pub fn has(&self, chunk: u64) -> bool {
        match self.nodes.range(..=chunk).next_back() {
            Some((start, (level, _))) => {
                chunk < Place::clipped(*start, *level, self.file).range(self.file).end
            }
            None => false,
        }
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
        self.nodes
            .iter()
            .map(|(start, (level, value))| Span::new(Place::clipped(*start, *level, self.file), *value))
    }

    /// The spans that overlap `place`: the one that contains it, or those inside it.
    pub fn overlapping(&self, place: Place) -> Vec<Span> {
        if let Some(span) = self.covering(place) {
            return vec![span];
        }
        self.nodes
            .range(place.range(self.file))
            .map(|(start, (level, value))| Span::new(Place::clipped(*start, *level, self.file), *value))
            .collect()
    }

    /// The spans that hold any chunk of `range`, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Span> + '_ {
        let Range { start, end } = range;
        let first = self.nodes.range(..=start).next_back();
        let rest = self.nodes.range(start.saturating_add(1)..end.max(start.saturating_add(1)));
        first
            .into_iter()
            .chain(rest)
            .map(|(start, (level, value))| Span::new(Place::clipped(*start, *level, self.file), *value))
            .filter(move |span| span.place.range(self.file).end > start && span.place.start() < end)
    }

    /// The chunks of `range` that are not covered, as at most `limit` ranges.
    pub fn gaps(&self, range: Range<u64>, limit: usize) -> Vec<Range<u64>> {
        let end = range.end.min(self.file.chunks());
        let mut gaps = Vec::new();
        let mut at = range.start;
        if at >= end {
            return gaps;
        }
        let before = self.nodes.range(..=at).next_back();
        for (start, (level, _)) in
            before.into_iter().chain(self.nodes.range(at.saturating_add(1)..end.max(at + 1)))
        {
            if gaps.len() == limit {
                return gaps;
            }
            if *start > at {
                gaps.push(at..*start);
            }
            at = at.max(Place::clipped(*start, *level, self.file).range(self.file).end);
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
