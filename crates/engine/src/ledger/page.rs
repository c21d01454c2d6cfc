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

use super::{Holding, Ledger, coverage_hash};
use crate::hash::ChainingValue;
use crate::ids::{DcId, Generation};
use crate::limits::{SEGMENT_CHUNKS, SEGMENT_LEVEL};
use crate::ranges::Ranges;
use crate::span::{Place, PlaceError, Span};

const MAGIC: [u8; 4] = *b"SLP\x01";
const HEAD_LEN: usize = 16;
const ENTRY_LEN: usize = 51;

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

impl Ledger {
    /// Takes the spans of a finished segment out of memory: one that is whole, agreed, held in pieces, and of a file
    /// that has more than one. The page must be stored; losing it costs asking the holders again.
    pub fn page_out(&mut self, segment: u64) -> Option<Page> {
        let file = self.file()?;
        let place = Place::clipped(segment.checked_mul(SEGMENT_CHUNKS)?, SEGMENT_LEVEL, file);
        if file.chunks() <= SEGMENT_CHUNKS || self.is_paged(segment) || self.union.covering(place).is_none() {
            return None;
        }
        let pieces = |holding: &Holding| {
            let spans = holding.tree.overlapping(place);
            spans.into_iter().filter(|span| place.contains(span.place)).collect::<Vec<_>>()
        };
        let count: usize = self.holders.values().map(|holding| pieces(holding).len()).sum();
        if count < 2 || !self.segment_agrees(place) {
            return None;
        }
        let mut entries = Vec::with_capacity(count);
        for (dc, holding) in &mut self.holders {
            for span in pieces(holding) {
                holding.paged_hash ^= coverage_hash(span.place, file);
                holding.paged_chunks += span.place.chunks(file);
                holding.tree.cut(span.place);
                entries.push((*dc, holding.generation, span));
            }
        }
        self.paged.insert(segment..segment + 1);
        Some(Page { segment, entries })
    }

    /// Puts the spans of a page back into memory. Entries of an older generation are void; a page that is not out
    /// changes nothing.
    pub fn page_in(&mut self, page: &Page) {
        let Some(file) = self.file() else { return };
        if !self.is_paged(page.segment) {
            return;
        }
        self.paged.remove(page.segment..page.segment + 1);
        self.contested.remove(&page.segment);
        for (dc, generation, span) in &page.entries {
            let Some(holding) = self.holders.get_mut(dc).filter(|holding| holding.generation == *generation)
            else {
                continue;
            };
            holding.paged_hash ^= coverage_hash(span.place, file);
            holding.paged_chunks = holding.paged_chunks.saturating_sub(span.place.chunks(file));
            let _ = holding.tree.insert(*span);
        }
    }

    /// Forgets every page, because one was lost: their segments are open again, and must be said again.
    pub fn lose_pages(&mut self) {
        self.paged = Ranges::new();
        self.contested.clear();
        for holding in self.holders.values_mut() {
            (holding.paged_hash, holding.paged_chunks) = (0, 0);
        }
        self.rebuild_union();
    }
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
}
