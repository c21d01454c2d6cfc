//! A set of chunk numbers, kept as disjoint ranges that do not touch.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of numbers as disjoint half-open ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// End by start.
    ends: BTreeMap<u64, u64>,
}

impl Ranges {
    /// The empty set.
    pub const fn new() -> Self {
        Self { ends: BTreeMap::new() }
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Adds every number of `range`.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        while let Some((&s, &e)) = self.ends.range(..=end).next_back() {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.ends.remove(&s);
        }
        self.ends.insert(start, end);
    }

    /// Removes every number of `range`.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let touched: Vec<(u64, u64)> = self
            .ends
            .range(..range.end)
            .rev()
            .take_while(|(_, end)| **end > range.start)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in touched {
            self.ends.remove(&start);
            if start < range.start {
                self.ends.insert(start, range.start);
            }
            if range.end < end {
                self.ends.insert(range.end, end);
            }
        }
    }

    /// Whether every number of `range` is in the set.
    pub fn covers(&self, range: Range<u64>) -> bool {
        range.is_empty()
            || self.ends.range(..=range.start).next_back().is_some_and(|(_, end)| *end >= range.end)
    }

    /// The ranges of what both sets have, rising.
    pub fn common(&self, other: &Self) -> Vec<Range<u64>> {
        let (mut left, mut right) = (self.iter().peekable(), other.iter().peekable());
        let mut common = Vec::new();
        while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
            let both = a.start.max(b.start)..a.end.min(b.end);
            let left_ends = a.end < b.end;
            if !both.is_empty() {
                common.push(both);
            }
            if left_ends {
                left.next()
            } else {
                right.next()
            };
        }
        common
    }

    /// The ranges, rising.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ends.iter().map(|(start, end)| *start..*end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn common_is_the_intersection(a in proptest::collection::vec((0u64..60, 0u64..9), 0..9),
                                      b in proptest::collection::vec((0u64..60, 0u64..9), 0..9)) {
            let of = |list: Vec<(u64, u64)>| {
                let mut ranges = Ranges::new();
                list.into_iter().for_each(|(start, len)| ranges.insert(start..start + len));
                ranges
            };
            let (a, b) = (of(a), of(b));
            let common: Vec<u64> = a.common(&b).into_iter().flatten().collect();
            let expected: Vec<u64> = a.iter().flatten().filter(|n| b.covers(*n..n + 1)).collect();
            prop_assert_eq!(common, expected);
        }

        #[test]
        fn behaves_like_a_set(steps in proptest::collection::vec((any::<bool>(), 0u64..40, 0u64..10), 0..30)) {
            let (mut ranges, mut set) = (Ranges::new(), BTreeSet::new());
            for (add, start, len) in steps {
                if add {
                    ranges.insert(start..start + len);
                    set.extend(start..start + len);
                } else {
                    ranges.remove(start..start + len);
                    set.retain(|n| !(start..start + len).contains(n));
                }
                let flat: Vec<u64> = ranges.iter().flatten().collect();
                prop_assert_eq!(&flat, &set.iter().copied().collect::<Vec<_>>());
                let all: Vec<_> = ranges.iter().collect();
                prop_assert!(all.windows(2).all(|w| w[0].end < w[1].start));
                prop_assert_eq!(ranges.covers(5..9), (5..9).all(|n| set.contains(&n)));
            }
        }
    }
}
