//! Pages: who holds what of one finished segment, handed out of memory.
//!
//! A file whose stripes are spread over datacenters merges across holders, but no holder's own spans do. Once a
//! segment is whole and agreed, its spans go to a page in the store, and the ledger keeps one merged value: that is
//! what keeps the ledger of a 34 PiB file small. Layout, integers big-endian:
//!
//! | bytes | field |
//! | --- | --- |
//! | 4 | `SLP` and version 1 |
//! | 8 | segment |
//! | 4 | number of entries |
//! | 2 + 8 + 8 + 1 + 32 | per entry: holder, generation, start, level, value |

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use super::summaries::{Share, Summary};
use super::{Fact, Ledger, Taken};
use crate::geometry::Geometry;
use crate::hash::ChainingValue;
use crate::ids::{DcId, Generation};
use crate::ranges::Ranges;
use crate::span::{Place, PlaceError, Span};
use crate::span_tree::SpanTree;

const MAGIC: [u8; 4] = *b"SLP\x01";
const HEAD_LEN: usize = 16;
const ENTRY_LEN: usize = 51;

/// How many spans may wait for pages to be read. Whoever says more is asked to say it again later.
const MAX_LATE: usize = 1 << 14;

/// The most entries of a page, so that it stays under 8 MiB; a segment in more pieces stays in memory.
const MAX_ENTRIES: usize = ((8 << 20) - HEAD_LEN) / ENTRY_LEN;

/// The spans of one finished segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Which segment.
    pub segment: u64,
    /// Who holds what, and as of which generation.
    pub entries: Vec<(DcId, Generation, Span)>,
}

/// Why bytes are no page.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PageError {
    /// Magic, version or length are wrong.
    #[error("not a ledger page")]
    Malformed,
    /// A span can be in no file.
    #[error(transparent)]
    Place(#[from] PlaceError),
}

impl Page {
    /// The bytes to store.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD_LEN + ENTRY_LEN * self.entries.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.segment.to_be_bytes());
        out.extend_from_slice(&(self.entries.len() as u32).to_be_bytes());
        for (holder, generation, span) in &self.entries {
            out.extend_from_slice(&holder.number().to_be_bytes());
            out.extend_from_slice(&generation.number().to_be_bytes());
            out.extend_from_slice(&span.place.start().to_be_bytes());
            out.push(span.place.level());
            out.extend_from_slice(span.value.as_bytes());
        }
        out
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PageError> {
        let (head, rest) = bytes.split_first_chunk::<HEAD_LEN>().ok_or(PageError::Malformed)?;
        let segment = number(&head[4..12]);
        if head[..4] != MAGIC || rest.len() as u64 != number(&head[12..16]) * ENTRY_LEN as u64 {
            return Err(PageError::Malformed);
        }
        let entries = rest.chunks_exact(ENTRY_LEN).map(|entry| {
            let mut value = [0; 32];
            value.copy_from_slice(&entry[19..]);
            let place = Place::new(number(&entry[10..18]), entry[18])?;
            let span = Span::new(place, ChainingValue::from_bytes(value));
            Ok((DcId::new(number(&entry[..2]) as u16), Generation::new(number(&entry[2..10])), span))
        });
        Ok(Self { segment, entries: entries.collect::<Result<_, PageError>>()? })
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// Spans of paged segments, to be taken once their pages are read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Late {
    spans: BTreeMap<u64, BTreeSet<(DcId, Generation, Span)>>,
    count: usize,
}

impl Ledger {
    /// Takes the spans of a finished segment out of memory: one that is whole, agreed, held in pieces, and of a file
    /// that has more than one. The page must be stored; losing it costs asking the holders again.
    pub fn page_out(&mut self, segment: u64) -> Option<Page> {
        self.page_out_but(segment, None)
    }

    /// Takes what others hold of a segment out of memory, once `me` has all of it and the root is known.
    pub fn page_out_others(&mut self, segment: u64, me: DcId) -> Option<Page> {
        let place = self.place_of_segment(segment)?;
        let own = self.holders.get(&me)?.tree.covering(place).is_some();
        if own && self.roots.first().is_some() { self.page_out_but(segment, Some(me)) } else { None }
    }

    fn page_out_but(&mut self, segment: u64, kept: Option<DcId>) -> Option<Page> {
        let file = self.file()?;
        let place = self.place_of_segment(segment)?;
        let several = file.chunks() > self.segment_chunks();
        if !several || self.union.covering(place).is_none() || self.is_paged(segment) {
            return None;
        }
        // What an absent holder says was not compared, and stays.
        let leaves = |dc: &DcId| Some(*dc) != kept && !self.absent.contains(dc);
        let pieces: Vec<(DcId, Generation, Span)> = self
            .holders
            .iter()
            .filter(|(dc, _)| leaves(dc))
            .flat_map(|(dc, holding)| holding.tree.inside(place).map(|span| (*dc, holding.generation, span)))
            .collect();
        let fits = if kept.is_some() { 1..=MAX_ENTRIES } else { 2..=MAX_ENTRIES };
        if !fits.contains(&pieces.len()) || (self.roots.first().is_none() && !self.segment_agrees(place)) {
            return None;
        }
        let value = self.segment_value(place);
        let mut shares: Vec<Share> = Vec::new();
        for (dc, _, span) in &pieces {
            // No more than a segment has.
            let (hash, chunks) = (self.coverage_hash(span.place, file), span.place.chunks(file) as u32);
            match shares.last_mut().filter(|share| share.holder == *dc) {
                Some(share) => {
                    share.hash ^= hash;
                    share.chunks += chunks;
                }
                None => shares.push(Share { hash, chunks, holder: *dc }),
            }
        }
        for share in &shares {
            if let Some(holding) = self.holders.get_mut(&share.holder) {
                holding.paged_hash ^= share.hash;
                holding.paged_chunks += u64::from(share.chunks);
                holding.tree.cut(place);
            }
        }
        for agreed in self.agreed.values_mut() {
            agreed.remove(place.range(file));
        }
        self.paged.insert(segment, Summary { value, void: false, shares, without: BTreeSet::new() });
        Some(Page { segment, entries: pieces })
    }

    /// The value of a segment that the union covers: its own, or merged from the holders' where the union keeps only
    /// a larger one.
    fn segment_value(&self, place: Place) -> Option<ChainingValue> {
        if let Some(value) = self.union.value(place) {
            return Some(value);
        }
        let file = self.union.file();
        let mut merged = SpanTree::new(file);
        for (_, holding) in self.holders.iter().filter(|(dc, _)| !self.absent.contains(dc)) {
            for span in holding.tree.inside(place) {
                let _ = merged.insert(span);
            }
        }
        merged.value(place)
    }

    /// Puts the spans of a page back into memory. Entries of an older generation, and any that are not of this file
    /// and segment, are void; a page that is not out changes nothing.
    pub fn page_in(&mut self, page: &Page) {
        let Some(file) = self.file() else { return };
        let Some(place) = self.place_of_segment(page.segment) else { return };
        let Some(summary) = self.forget_page(page.segment) else { return };
        let mut counted: BTreeMap<DcId, Ranges> = BTreeMap::new();
        for (dc, generation, span) in &page.entries {
            let fits =
                place.contains(span.place) && span.place.check(file).is_ok() && !summary.without.contains(dc);
            let Some(holding) = self
                .holders
                .get_mut(dc)
                .filter(|holding| fits && *generation >= holding.since && *generation <= holding.generation)
            else {
                continue;
            };
            let _ = holding.tree.insert(*span);
            counted.entry(*dc).or_default().insert(span.place.range(file));
            if summary.void && !self.absent.contains(dc) {
                self.overlaps |= !self.union.overlapping(span.place).is_empty();
                let _ = self.union.insert(*span);
            }
        }
        // What stands in one page agreed when it was handed out: nothing of that is asked for again.
        for (a, left) in &counted {
            for (b, right) in counted.range((Bound::Excluded(a), Bound::Unbounded)) {
                let agreed = self.agreed.entry((*a, *b)).or_default();
                left.common(right).into_iter().for_each(|range| agreed.insert(range));
            }
        }
        self.take_late(page.segment);
    }

    /// Keeps a span until the page of its segment is read.
    pub(super) fn keep_for_page(&mut self, segment: u64, late: (DcId, Generation, Span)) -> Taken {
        self.recalled.insert(segment);
        if self.late.count >= MAX_LATE {
            return Taken::NotYet;
        }
        if self.late.spans.entry(segment).or_default().insert(late) {
            self.late.count += 1;
        }
        Taken::Known
    }

    /// Takes what was said of a segment while it was in a page.
    fn take_late(&mut self, segment: u64) {
        let late = self.late.spans.remove(&segment).unwrap_or_default();
        self.late.count -= late.len();
        for (holder, generation, span) in late {
            let Some(holding) = self.holders.get(&holder) else { continue };
            // What was said under a generation that was lifted since is said under the newer one.
            let lifted = generation >= holding.since;
            let generation = if lifted { holding.generation.max(generation) } else { generation };
            // It was checked when it came.
            let _ = self.take(Fact::Have { holder, generation, span });
        }
    }

    /// A page was lost: its segment is open again. Answers who held any of it, to be asked.
    pub fn lose_page(&mut self, segment: u64) -> Vec<DcId> {
        let Some(summary) = self.forget_page(segment) else { return Vec::new() };
        self.rebuild_union();
        self.take_late(segment);
        summary.shares.iter().map(|share| share.holder).collect()
    }

    /// Forgets every page: their segments are open again, and must be said again.
    pub fn lose_pages(&mut self) {
        let segments: Vec<u64> = self.paged.segments().collect();
        for segment in &segments {
            self.forget_page(*segment);
        }
        self.rebuild_union();
        segments.into_iter().for_each(|segment| self.take_late(segment));
    }

    /// The segments whose pages must be read before the spans can be judged.
    pub fn recalled(&self) -> impl Iterator<Item = u64> + '_ {
        self.recalled.iter().copied()
    }

    /// The next of them after a segment, and from the first again: whatever is recalled over and over keeps no other
    /// from its turn.
    pub(crate) fn recalled_after(&self, segment: Option<u64>) -> Option<u64> {
        let after = segment.map_or(Bound::Unbounded, Bound::Excluded);
        let next = self.recalled.range((after, Bound::Unbounded)).next();
        next.or(self.recalled.first()).copied()
    }

    /// Every page must be read: the spans are needed in memory.
    pub fn recall_all(&mut self) {
        self.recalled.extend(self.paged.segments());
    }

    /// More is said of a place: pages that it touches must be read to be compared with it.
    pub(super) fn recall(&mut self, place: Place) {
        let Some(file) = self.file().filter(|_| !self.paged.is_empty()) else { return };
        let (range, level) = (place.range(file), self.rules.segment_level());
        let segments = range.start >> level..=(range.end.max(range.start + 1) - 1) >> level;
        self.recalled.extend(self.paged.within(segments));
    }

    /// What a holder said does not count any more: the pages in which it stands must be read for what is left.
    /// The union is the caller's to rebuild.
    pub(super) fn void_pages_of(&mut self, holder: DcId) {
        for segment in self.paged.of_holder(holder) {
            self.paged.set_void(segment);
            self.recalled.insert(segment);
        }
        if self.holders.get(&holder).is_none_or(|holding| holding.paged_chunks == 0) {
            // Its shares went with its holding, and with the last share the page.
            for segment in self.paged.withdraw(holder) {
                self.forget_page(segment);
                self.take_late(segment);
            }
        }
    }

    fn forget_page(&mut self, segment: u64) -> Option<Summary> {
        let summary = self.paged.remove(segment)?;
        self.recalled.remove(&segment);
        for share in &summary.shares {
            if let Some(holding) = self.holders.get_mut(&share.holder) {
                holding.paged_hash ^= share.hash;
                holding.paged_chunks = holding.paged_chunks.saturating_sub(share.chunks.into());
            }
        }
        Some(summary)
    }

    /// Chunks in a segment.
    pub(crate) const fn segment_chunks(&self) -> u64 {
        1 << self.rules.segment_level()
    }

    /// Where a segment lies; `None` past the end of the file.
    pub(crate) fn place_of_segment(&self, segment: u64) -> Option<Place> {
        let file = self.file()?;
        let start = segment.checked_mul(self.segment_chunks())?;
        (start < file.chunks()).then(|| Place::clipped(start, self.rules.segment_level(), file))
    }

    /// The fingerprint of a place, as the exclusive or of the fingerprints of its segments, so that it does not
    /// matter whether larger spans were cut at segments.
    pub(super) fn coverage_hash(&self, place: Place, file: Geometry) -> u64 {
        let range = place.range(file);
        let level = self.rules.segment_level();
        if place.level() <= level {
            return mix(range.start, range.end);
        }
        let mut hash = 0;
        let mut at = range.start;
        while at < range.end {
            let end = (at + (1 << level)).min(range.end);
            hash ^= mix(at, end);
            at = end;
        }
        hash
    }
}

/// A well-spread hash of two numbers (the finaliser of SplitMix64, twice).
fn mix(a: u64, b: u64) -> u64 {
    let step = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    step(step(a.wrapping_add(0x9E37_79B9_7F4A_7C15)).wrapping_add(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_round_trip() {
        let span = Span::new(Place::new(64, 6).unwrap(), ChainingValue::from_bytes([7; 32]));
        let page = Page { segment: 3, entries: vec![(DcId::new(2), Generation::new(9), span)] };
        let bytes = page.to_bytes();
        assert_eq!(
            hex::encode(&bytes),
            format!(
                "534c500100000000000000030000000100020000000000000009000000000000004006{}",
                "07".repeat(32)
            )
        );
        assert_eq!(Page::from_bytes(&bytes), Ok(page));
        assert_eq!(Page::from_bytes(&bytes[..20]), Err(PageError::Malformed));
    }

    #[test]
    fn what_was_lifted_counts_since_it_was_first_said() {
        use crate::hash::Root;
        use crate::rules::Rules;

        let (holder, number) = (DcId::new(2), Generation::new);
        let mut ledger = Ledger::new(Rules::all());
        assert_eq!(ledger.counts_since(holder), None);
        let size = Geometry::new(1 << 20).unwrap();
        ledger.take(Fact::Root { size, root: Root::empty() }).unwrap();
        ledger.take(Fact::HaveNothing { holder, generation: number(3) }).unwrap();
        assert_eq!(ledger.counts_since(holder), Some(number(3)));
        ledger.lift(holder, number(7));
        assert_eq!(ledger.counts_since(holder), Some(number(3)));
        ledger.take(Fact::HaveNothing { holder, generation: number(9) }).unwrap();
        assert_eq!(ledger.counts_since(holder), Some(number(9)));
    }

    /// A ledger of two segments, of each of which one holder has the left half and another the right, and the page of
    /// the first.
    fn paged() -> (Ledger, Page) {
        use crate::hash::RecordDigest;
        use crate::ids::{HomeEpoch, TenantId};
        use crate::ledger::Claim;
        use crate::rules::Rules;

        let mut ledger = Ledger::new(Rules::all());
        let size = Some(Geometry::new(2 << 36).unwrap());
        let claim = Claim { epoch: HomeEpoch::new(0), home: DcId::new(1) };
        let (tenant, digest) = (TenantId::new(1), RecordDigest::from_bytes([1; 32]));
        ledger.take(Fact::Meta { claim, size, tenant, digest }).unwrap();
        for half in 0..4 {
            let fact = Fact::Have {
                holder: DcId::new(1 + half % 2),
                generation: Generation::new(3),
                span: of(half),
            };
            ledger.take(fact).unwrap();
        }
        let page = ledger.page_out(0).unwrap();
        assert_eq!(page.entries.len(), 2);
        (ledger, page)
    }

    fn of(half: u16) -> Span {
        Span::new(Place::new(u64::from(half) << 15, 15).unwrap(), ChainingValue::from_bytes([half as u8; 32]))
    }

    fn holds(ledger: &Ledger, holder: u16, half: u16) -> bool {
        ledger.held_by(DcId::new(holder)).is_some_and(|(_, tree)| tree.covering(of(half).place).is_some())
    }

    #[test]
    fn a_segment_in_a_page_keeps_its_value_when_another_holder_goes() {
        let (mut ledger, _) = paged();
        let root = ledger.union().root();
        assert!(root.is_some() && ledger.set_absent(DcId::new(3), true));
        assert_eq!((ledger.union().root(), ledger.recalled().count()), (root, 0));
    }

    #[test]
    fn of_a_page_counts_what_is_of_its_segment_and_of_a_generation_that_stands() {
        let (mut ledger, mut page) = paged();
        let [left, right] = page.entries[..] else { panic!("two entries") };
        let newer = (left.0, Generation::new(9), left.2);
        page.entries = vec![newer, right, (left.0, left.1, of(3))];
        ledger.page_in(&page);
        assert!(!holds(&ledger, 1, 0), "nobody said that generation yet");
        assert!(holds(&ledger, 2, 1));
        assert!(!holds(&ledger, 1, 3), "it is of another segment");

        let (mut ledger, page) = paged();
        ledger.doubt(DcId::new(2));
        ledger.page_in(&page);
        assert!(holds(&ledger, 1, 0) && !holds(&ledger, 2, 1), "what a holder said before it was doubted");
    }
}
