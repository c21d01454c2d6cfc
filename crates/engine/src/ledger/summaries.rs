//! What stays in memory of the segments whose spans are in pages.
//!
//! A file of 34 PiB has 557,056 of them, so they are packed: 64 segments to a shelf, in rows without gaps, about 85
//! bytes for a segment of three holders. Belongs to its ledger.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use crate::hash::ChainingValue;
use crate::ids::DcId;

/// Segments of a shelf, as a power of two: as many as a word has bits.
const SHELF: u32 = 6;

/// What stays of one segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Summary {
    /// The merged value of the segment; `None` if a larger span in memory has it.
    pub(super) value: Option<ChainingValue>,
    /// Whether some of what is in the page does not count any more, so that the segment may be open again.
    pub(super) void: bool,
    pub(super) shares: Vec<Share>,
    /// Holders whose entries do not count any more.
    pub(super) without: BTreeSet<DcId>,
}

/// What one holder has in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) hash: u64,
    /// At most those of a segment.
    pub(super) chunks: u32,
    pub(super) holder: DcId,
}

/// The summaries of a ledger, by segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Summaries {
    /// None is empty, so that equal sets are equal.
    shelves: BTreeMap<u64, Shelf>,
    /// Rare, and so apart.
    without: BTreeMap<u64, BTreeSet<DcId>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shelf {
    /// A bit for each segment that is there.
    present: u64,
    /// A bit for each that is void.
    void: u64,
    /// In order of the bits that are set.
    values: Vec<Option<ChainingValue>>,
    /// In order of segment, then of holder.
    shares: Vec<Shelved>,
}

/// A share and the bit of its segment, in 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shelved {
    hash: u64,
    chunks: u32,
    holder: DcId,
    bit: u8,
}

impl Shelved {
    const fn new(Share { hash, chunks, holder }: Share, bit: u32) -> Self {
        Self { hash, chunks, holder, bit: bit as u8 }
    }

    const fn share(self) -> Share {
        Share { hash: self.hash, chunks: self.chunks, holder: self.holder }
    }
}

const fn split(segment: u64) -> (u64, u32) {
    (segment >> SHELF, (segment & ((1 << SHELF) - 1)) as u32)
}

/// The bits that are set, from the lowest.
fn bits(word: u64) -> impl Iterator<Item = u32> {
    (0..1 << SHELF).filter(move |bit| word & (1 << bit) != 0)
}

impl Shelf {
    const fn has(&self, bit: u32) -> bool {
        self.present & (1 << bit) != 0
    }

    /// Where a segment's value is, or would be.
    const fn row(&self, bit: u32) -> usize {
        (self.present & ((1 << bit) - 1)).count_ones() as usize
    }

    /// Where a segment's shares are, or would be.
    fn shares_of(&self, bit: u32) -> std::ops::Range<usize> {
        let at = |bit: u32| self.shares.partition_point(|share| u32::from(share.bit) < bit);
        at(bit)..at(bit + 1)
    }
}

impl Summaries {
    pub(super) fn is_empty(&self) -> bool {
        self.shelves.is_empty()
    }

    pub(super) fn contains(&self, segment: u64) -> bool {
        let (shelf, bit) = split(segment);
        self.shelves.get(&shelf).is_some_and(|shelf| shelf.has(bit))
    }

    /// Every segment, in order.
    pub(super) fn segments(&self) -> impl Iterator<Item = u64> + '_ {
        self.within(0..=u64::MAX)
    }

    /// The segments in a range, in order.
    pub(super) fn within(&self, range: RangeInclusive<u64>) -> impl Iterator<Item = u64> + '_ {
        let shelves = self.shelves.range(range.start() >> SHELF..=range.end() >> SHELF);
        let all = shelves
            .flat_map(|(number, shelf)| bits(shelf.present).map(move |bit| number << SHELF | u64::from(bit)));
        all.filter(move |segment| range.contains(segment))
    }

    /// The segments that are not void, with their values.
    pub(super) fn valid(&self) -> impl Iterator<Item = (u64, Option<ChainingValue>)> + '_ {
        self.shelves.iter().flat_map(|(number, shelf)| {
            let rows = bits(shelf.present).zip(&shelf.values);
            let valid = rows.filter(|(bit, _)| shelf.void & (1 << bit) == 0);
            valid.map(move |(bit, value)| (number << SHELF | u64::from(bit), *value))
        })
    }

    /// Adds one, in place of what there was of the segment.
    pub(super) fn insert(&mut self, segment: u64, summary: Summary) {
        self.remove(segment);
        let Summary { value, void, shares, without } = summary;
        let (number, bit) = split(segment);
        let shelf = self.shelves.entry(number).or_default();
        let (row, at) = (shelf.row(bit), shelf.shares_of(bit).start);
        shelf.values.insert(row, value);
        shelf.shares.splice(at..at, shares.into_iter().map(|share| Shelved::new(share, bit)));
        shelf.present |= 1 << bit;
        shelf.void |= u64::from(void) << bit;
        if shelf.present == u64::MAX {
            // Nothing more will come.
            shelf.values.shrink_to_fit();
            shelf.shares.shrink_to_fit();
        }
        if !without.is_empty() {
            self.without.insert(segment, without);
        }
    }

    pub(super) fn remove(&mut self, segment: u64) -> Option<Summary> {
        let (number, bit) = split(segment);
        let shelf = self.shelves.get_mut(&number).filter(|shelf| shelf.has(bit))?;
        let (row, shares) = (shelf.row(bit), shelf.shares_of(bit));
        let summary = Summary {
            value: shelf.values.remove(row),
            void: shelf.void & (1 << bit) != 0,
            shares: shelf.shares.drain(shares).map(Shelved::share).collect(),
            without: self.without.remove(&segment).unwrap_or_default(),
        };
        shelf.present &= !(1 << bit);
        shelf.void &= !(1 << bit);
        if shelf.present == 0 {
            self.shelves.remove(&number);
        }
        Some(summary)
    }

    /// Some of what is in this page does not count any more.
    pub(super) fn set_void(&mut self, segment: u64) {
        let (number, bit) = split(segment);
        if let Some(shelf) = self.shelves.get_mut(&number).filter(|shelf| shelf.has(bit)) {
            shelf.void |= 1 << bit;
        }
    }

    /// The segments in whose pages a holder has something.
    pub(super) fn of_holder(&self, holder: DcId) -> Vec<u64> {
        let mut segments = Vec::new();
        for (number, shelf) in &self.shelves {
            for share in shelf.shares.iter().filter(|share| share.holder == holder) {
                segments.push(number << SHELF | u64::from(share.bit));
            }
        }
        segments
    }

    /// Takes a holder's shares away: what its entries say does not count. Answers which segments have no others.
    pub(super) fn withdraw(&mut self, holder: DcId) -> Vec<u64> {
        let segments = self.of_holder(holder);
        let mut bare = Vec::new();
        for segment in segments {
            self.without.entry(segment).or_default().insert(holder);
            let (number, bit) = split(segment);
            let Some(shelf) = self.shelves.get_mut(&number) else { continue };
            shelf.shares.retain(|share| u32::from(share.bit) != bit || share.holder != holder);
            if shelf.shares_of(bit).is_empty() {
                bare.push(segment);
            }
        }
        bare
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn summary(of: u64, holders: &[u16]) -> Summary {
        let share =
            |holder: &u16| Share { hash: of ^ u64::from(*holder), chunks: 7, holder: DcId::new(*holder) };
        let value = (!of.is_multiple_of(5)).then(|| ChainingValue::from_bytes([of as u8; 32]));
        Summary {
            value,
            void: of.is_multiple_of(3),
            shares: holders.iter().map(share).collect(),
            without: BTreeSet::new(),
        }
    }

    proptest! {
        /// Whatever is done, it answers as a plain map does.
        #[test]
        fn shelves_are_not_seen(
            steps in prop::collection::vec((0u8..6, 0u64..200, prop::collection::btree_set(1u16..4, 1..4)), 1..120)
        ) {
            let mut packed = Summaries::default();
            let mut plain: BTreeMap<u64, Summary> = BTreeMap::new();
            for (what, segment, holders) in steps {
                let holders: Vec<u16> = holders.into_iter().collect();
                match what {
                    0..3 => {
                        packed.insert(segment, summary(segment, &holders));
                        plain.insert(segment, summary(segment, &holders));
                    }
                    3 => prop_assert_eq!(packed.remove(segment), plain.remove(&segment)),
                    4 => {
                        packed.set_void(segment);
                        if let Some(summary) = plain.get_mut(&segment) {
                            summary.void = true;
                        }
                    }
                    _ => {
                        let holder = DcId::new(holders[0]);
                        let mut bare = Vec::new();
                        for (segment, summary) in &mut plain {
                            if summary.shares.iter().any(|share| share.holder == holder) {
                                summary.without.insert(holder);
                                summary.shares.retain(|share| share.holder != holder);
                                bare.extend(summary.shares.is_empty().then_some(*segment));
                            }
                        }
                        prop_assert_eq!(packed.withdraw(holder), bare);
                        prop_assert!(packed.of_holder(holder).is_empty());
                    }
                }
                prop_assert_eq!(packed.contains(segment), plain.contains_key(&segment));
                prop_assert!(packed.segments().eq(plain.keys().copied()));
                prop_assert!(packed.within(50..=150).eq(plain.range(50..=150).map(|(segment, _)| *segment)));
                let valid = plain.iter().filter(|(_, summary)| !summary.void);
                prop_assert!(packed.valid().eq(valid.map(|(segment, summary)| (*segment, summary.value))));
                prop_assert_eq!(packed.is_empty(), plain.is_empty());
            }
            let mut again = Summaries::default();
            plain.iter().rev().for_each(|(segment, summary)| again.insert(*segment, summary.clone()));
            prop_assert_eq!(&packed, &again, "equal sets are equal");
            for (segment, summary) in plain {
                prop_assert_eq!(packed.remove(segment), Some(summary));
            }
            prop_assert_eq!(packed, Summaries::default());
        }
    }
}
