//! Values that the disk does not give back, made again.
//!
//! The values of a published file merge to its root, which its index has. So where some cannot be read, the bytes of their
//! chunks are hashed again, and believed if all of it leads to the root: then they are written in their places. Of a file that
//! is not published nothing proves the bytes, and what has no value is lost.

use std::ops::Range;

use bytes::Bytes;
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::limits::{CHUNK_LEN, SEGMENT_CHUNKS, SEGMENT_LEVEL};
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{SpanTree, merge_chunks};

use super::change::{Chunk, Published};
use super::disk::Open;
use super::entry::{Entry, Name};
use super::shared::Shared;
use super::{lock, values};

/// Values that are made again at most: more of them would take too much memory at once, and are no single accident.
const MAX_RESTORED: usize = 2 * SEGMENT_CHUNKS as usize;

impl Shared {
    /// Makes values of a published file again that the disk does not give back. Whether all of them are there now. Blocks,
    /// for as long as it takes to read the values and the bytes of the chunks that lack them; a second try that cannot
    /// succeed either is not made before the file changes.
    pub(super) fn restore_values(&self, entry: &Entry) -> bool {
        let (published, losses, tried) = {
            let live = lock(&entry.live);
            (live.state.published, live.losses, live.beyond_restoring == Some(live.losses))
        };
        let Some(published) = published.filter(|_| !tried) else { return false };
        let restored = self.proven_values(entry, published);
        let mut live = lock(&entry.live);
        if live.losses != losses || live.state.published != Some(published) {
            return false;
        }
        let Some(restored) = restored else {
            live.beyond_restoring = Some(losses);
            return false;
        };
        tracing::warn!(file = %entry.file, values = restored.len(), "values were damaged, and made again from the bytes");
        live.state.fresh.extend(restored.into_iter().map(|chunk| (chunk.index.number(), chunk)));
        drop(live);
        // A disk that does not take them now is asked again when the next checkpoint is written.
        if let Err(error) = self.flush_values(entry) {
            tracing::warn!(file = %entry.file, %error, "restored values could not be written yet");
        }
        true
    }

    /// Those values that had to be made again, if with them all values lead to the root.
    fn proven_values(&self, entry: &Entry, Published { geometry, root }: Published) -> Option<Vec<Chunk>> {
        let mut restored = Vec::new();
        let mut tree = SpanTree::new(geometry);
        let mut start = 0;
        while start < geometry.chunks() {
            let end = (start + SEGMENT_CHUNKS).min(geometry.chunks());
            let all = self.values_of_segment(entry, geometry, start..end, &mut restored)?;
            for place in Place::tile(start..end, SEGMENT_LEVEL, geometry) {
                let range = place.range(geometry);
                let part = all.get((range.start - start) as usize..(range.end - start) as usize)?;
                let _ = tree.insert(Span::new(place, merge_chunks(geometry, place, part)?));
            }
            start = end;
        }
        let proven = match geometry.chunks() {
            0 => true,
            // The only chunk has no root in its value.
            1 => Root::of_bytes(&self.unproven_bytes(entry, geometry, ChunkIndex::new(0).ok()?)?) == root,
            _ => tree.root() == Some(root),
        };
        proven.then_some(restored)
    }

    /// The values of the chunks of a segment: as they are written, or else as the bytes say.
    fn values_of_segment(
        &self,
        entry: &Entry,
        geometry: Geometry,
        chunks: Range<u64>,
        restored: &mut Vec<Chunk>,
    ) -> Option<Vec<ChainingValue>> {
        let (fresh, epoch) = {
            let live = lock(&entry.live);
            let fresh: Vec<Chunk> = live.state.fresh.range(chunks.clone()).map(|(_, chunk)| *chunk).collect();
            (fresh, live.epoch)
        };
        let first = ChunkIndex::new(chunks.start).ok()?;
        let name = Name::Values(chunks.start / SEGMENT_CHUNKS);
        let len = (chunks.end - chunks.start) as usize * values::SLOT_LEN;
        let written = self.handle(entry.file, epoch, name, Open::Existing);
        let slots = written.and_then(|handle| handle.read_at(values::offset(first), len)).unwrap_or_default();
        let mut fresh = fresh.into_iter().peekable();
        let mut all = Vec::with_capacity((chunks.end - chunks.start) as usize);
        for number in chunks.clone() {
            let index = ChunkIndex::new(number).ok()?;
            if let Some(chunk) = fresh.next_if(|chunk| chunk.index == index) {
                all.push(chunk.value);
                continue;
            }
            let at = (number - chunks.start) as usize * values::SLOT_LEN;
            let slot = slots.get(at..at + values::SLOT_LEN);
            if let Some(chunk) = slot.and_then(|slot| values::decode(entry.file, index, slot).ok()) {
                all.push(chunk.value);
                continue;
            }
            let bytes =
                self.unproven_bytes(entry, geometry, index).filter(|_| restored.len() < MAX_RESTORED)?;
            let value = ChainingValue::of_chunk(index, &bytes)?;
            restored.push(Chunk { index, len: bytes.len() as u32, value });
            all.push(value);
        }
        Some(all)
    }

    /// The bytes that lie in a chunk's place, whatever they are.
    fn unproven_bytes(&self, entry: &Entry, geometry: Geometry, index: ChunkIndex) -> Option<Bytes> {
        let (number, epoch) = (index.number(), lock(&entry.live).epoch);
        let len = geometry.chunk_len(index).ok()? as usize;
        let name = Name::Data(number / SEGMENT_CHUNKS);
        let handle = self.handle(entry.file, epoch, name, Open::Existing).ok()?;
        let bytes = handle.read_at((number % SEGMENT_CHUNKS) * CHUNK_LEN, len).ok()?;
        (bytes.len() == len).then(|| Bytes::from(bytes))
    }
}
