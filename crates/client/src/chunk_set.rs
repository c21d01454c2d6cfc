//! A set of chunks, as disjoint ascending ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of chunk indices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ChunkSet {
    /// First to end; disjoint, and with a gap between any two.
    ranges: BTreeMap<u64, u64>,
}

impl ChunkSet {
    /// The empty set.
    pub(crate) const fn new() -> Self {
        Self { ranges: BTreeMap::new() }
    }

    /// The set of the `[first, end)` pairs of an answer; empty and reversed pairs add nothing.
    pub(crate) fn of_pairs(pairs: &[[u64; 2]]) -> Self {
        let mut set = Self::new();
        for [first, end] in pairs {
            set.insert(*first..*end);
        }
        set
    }

    /// Adds a range.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        if let Some((first, last)) = self.ranges.range(..=start).next_back().map(|(f, e)| (*f, *e))
            && last >= start
        {
            start = first;
            end = end.max(last);
        }
        let absorbed: Vec<u64> = self.ranges.range(start..=end).map(|(first, _)| *first).collect();
        for first in absorbed {
            if let Some(last) = self.ranges.remove(&first) {
                end = end.max(last);
            }
        }
        self.ranges.insert(start, end);
    }

    /// Adds every chunk of another set.
    pub(crate) fn insert_all(&mut self, other: &Self) {
        for range in other.ranges() {
            self.insert(range);
        }
    }

    /// Number of chunks.
    pub(crate) fn len(&self) -> u64 {
        self.ranges.iter().map(|(first, end)| end - first).sum()
    }

    /// Whether the set holds no chunk.
    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, ascending.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(first, end)| *first..*end)
    }

    /// Cuts `within` into the parts inside and outside the set, in order.
    pub(crate) fn cut(&self, within: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let mut parts = Vec::new();
        let mut at = within.start;
        let before = self.ranges.range(..=at).next_back();
        let later = self.ranges.range(at.saturating_add(1)..within.end.max(at.saturating_add(1)));
        for (first, end) in before.into_iter().chain(later) {
            let (first, end) = ((*first).max(at), (*end).min(within.end));
            if first >= end {
                continue;
            }
            if first > at {
                parts.push((at..first, false));
            }
            parts.push((first..end, true));
            at = end;
        }
        if at < within.end {
            parts.push((at..within.end, false));
        }
        parts
    }

    /// The chunks of this set that are not in the other.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut left = Self::new();
        for range in self.ranges() {
            for (part, inside) in other.cut(range) {
                if !inside {
                    left.insert(part);
                }
            }
        }
        left
    }

    /// The chunks that are in both.
    pub(crate) fn common(&self, other: &Self) -> Self {
        self.without(&self.without(other))
    }

    /// The chunks of `[0, chunks)` that are not in the set.
    pub(crate) fn complement(&self, chunks: u64) -> Self {
        let mut all = Self::new();
        all.insert(0..chunks);
        all.without(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    fn contains(set: &ChunkSet, chunk: u64) -> bool {
        set.ranges().any(|range| range.contains(&chunk))
    }

    #[test]
    fn sets_behave_like_sets_of_numbers() {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        for _ in 0..200 {
            let (mut a, mut b) = (ChunkSet::new(), ChunkSet::new());
            let (mut x, mut y) = ([false; 64], [false; 64]);
            for _ in 0..rng.random_range(0..12) {
                let (first, len) = (rng.random_range(0..60u64), rng.random_range(0..5u64));
                let end = (first + len).min(64);
                let (set, model) = if rng.random() { (&mut a, &mut x) } else { (&mut b, &mut y) };
                set.insert(first..end);
                model[first as usize..end as usize].fill(true);
            }
            let (left, both, gaps) = (a.without(&b), a.common(&b), a.complement(64));
            for i in 0..64u64 {
                let (in_a, in_b) = (x[i as usize], y[i as usize]);
                assert_eq!(contains(&a, i), in_a);
                assert_eq!(contains(&left, i), in_a && !in_b);
                assert_eq!(contains(&both, i), in_a && in_b);
                assert_eq!(contains(&gaps, i), !in_a);
            }
            assert_eq!(a.len() + gaps.len(), 64);
            let parts = a.cut(5..50);
            assert_eq!(parts.first().map(|(r, _)| r.start), Some(5));
            assert_eq!(parts.last().map(|(r, _)| r.end), Some(50));
            assert!(parts.windows(2).all(|w| w[0].0.end == w[1].0.start && w[0].1 != w[1].1));
        }
    }
}
