//! What the store knows of one file, and how a change changes it. The same code runs when a batch has become durable
//! and when a journal is read again.

use std::collections::BTreeMap;

use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::ids::{Generation, TenantId};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::ranges::Ranges;

use super::change::{Change, Chunk, Published};
use super::log::record::Front;
use crate::FileSummary;

/// Who keeps the durable record of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Nobody: nothing was ever known of it.
    #[default]
    None,
    /// The journal, and then its index.
    Journal,
    /// The log.
    Log,
}

/// A file as its index and the journal, or the log, tell it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FileState {
    /// Whose it is; `None` if nothing is known of the file at all.
    pub(crate) tenant: Option<TenantId>,
    /// The metadata record.
    pub(crate) record: Option<MetadataRecord>,
    /// The size that was settled, where the record leaves it open.
    pub(crate) sized: Option<Geometry>,
    /// The engine's facts.
    pub(crate) facts: Vec<u8>,
    /// The file's own generation, to which the volume's floor applies.
    pub(crate) generation: Generation,
    /// Whether it ended for good.
    pub(crate) dropped: bool,
    /// The whole that was published.
    pub(crate) published: Option<Published>,
    /// Chunks with a record.
    pub(crate) held: Ranges,
    /// Lengths of the recorded chunks that are not full.
    pub(crate) short: BTreeMap<u64, u32>,
    /// Bytes of the recorded chunks.
    pub(crate) held_bytes: u64,
    /// The batch up to which all changes are in here.
    pub(crate) applied: u64,
    /// Values that are not in their values file yet.
    pub(crate) fresh: BTreeMap<u64, Chunk>,
    /// Who keeps its durable record.
    pub(crate) origin: Origin,
}

impl FileState {
    /// What the log says of a file. Its value is never written to a file of values.
    pub(crate) fn of_log(front: Front) -> Self {
        let mut state = Self {
            tenant: Some(front.tenant),
            dropped: front.is_dropped(),
            facts: front.facts,
            generation: front.generation,
            record: front.record,
            origin: Origin::Log,
            ..Self::default()
        };
        if let Some(seal) = front.seal {
            let first = seal.value.zip(ChunkIndex::new(0).ok());
            if let Some((value, index)) = first {
                state.record_chunk(Chunk { index, len: seal.len, value });
            }
            let geometry = Geometry::new(u64::from(seal.len)).ok();
            state.published = geometry.map(|geometry| Published { geometry, root: seal.root });
        }
        state
    }

    /// Whether the log has the file's bytes.
    pub(crate) fn is_in_log(&self) -> bool {
        self.origin == Origin::Log
    }

    /// Whether the file has a summary.
    pub(crate) fn is_known(&self) -> bool {
        self.tenant.is_some()
    }

    /// Whether the chunk has a record.
    pub(crate) fn has(&self, chunk: u64) -> bool {
        self.held.covers(chunk..chunk + 1)
    }

    /// The recorded length of a chunk that has a record.
    pub(crate) fn len_of(&self, chunk: u64) -> u32 {
        self.short.get(&chunk).copied().unwrap_or(CHUNK_LEN as u32)
    }

    /// The shape that runs are checked against, once it is known.
    pub(crate) fn geometry(&self) -> Option<Geometry> {
        let settled = crate::shape(self.record.as_ref()).or(self.sized);
        settled.or(self.published.map(|published| published.geometry))
    }

    /// The shape that the recorded chunks have if they are a whole file: from the first, without gaps, all full but
    /// the last. `None` if they are not.
    pub(crate) fn shape_of_held(&self) -> Option<Geometry> {
        let mut ranges = self.held.iter();
        let chunks = match (ranges.next(), ranges.next()) {
            (None, _) => 0,
            (Some(range), None) if range.start == 0 => range.end,
            (Some(_), _) => return None,
        };
        let geometry = Geometry::new(self.held_bytes).ok()?;
        let regular = self.short.keys().all(|chunk| chunk + 1 == chunks);
        (regular && geometry.chunks() == chunks).then_some(geometry)
    }

    /// The generation, given the volume's floor.
    pub(crate) fn generation(&self, floor: Generation) -> Generation {
        self.generation.max(floor).max(Generation::new(1))
    }

    /// The summary, if the file has one.
    pub(crate) fn summary(&self, floor: Generation) -> Option<FileSummary> {
        Some(FileSummary {
            tenant: self.tenant?,
            record: self.record.clone(),
            size: self.geometry(),
            facts: self.facts.clone(),
            generation: self.generation(floor),
            held: self.held.iter().collect(),
            held_bytes: self.held_bytes,
            published: self.published.map(|published| published.root),
            in_log: self.is_in_log(),
        })
    }

    /// The recorded chunks that cannot belong to a file of this shape.
    pub(crate) fn misfits(&self, geometry: Geometry) -> Vec<u64> {
        let fits = |chunk: u64| {
            ChunkIndex::new(chunk)
                .and_then(|index| geometry.chunk_len(index))
                .is_ok_and(|len| len == u64::from(self.len_of(chunk)))
        };
        let end = geometry.chunks();
        let last = end.checked_sub(1).filter(|last| self.has(*last));
        let mut misfits: Vec<u64> =
            self.short.keys().copied().chain(last).filter(|chunk| !fits(*chunk)).collect();
        misfits.extend(self.held.iter().flat_map(|range| range.start.max(end)..range.end.max(end)));
        misfits.sort_unstable();
        misfits.dedup();
        misfits
    }

    /// Applies a change of batch `seq`, unless it is in here already.
    pub(crate) fn apply(&mut self, seq: u64, change: &Change) {
        if seq < self.applied {
            return;
        }
        self.applied = seq;
        self.origin = Origin::Journal;
        match change {
            Change::Metadata { generation, record } => {
                self.tenant = Some(record.tenant());
                self.generation = self.generation.max(*generation);
                self.record = Some(MetadataRecord::clone(record));
                if let Some(geometry) = record.geometry() {
                    self.discard_misfits(geometry);
                }
            }
            Change::Sized { generation, geometry } => {
                self.generation = self.generation.max(*generation);
                self.sized = Some(*geometry);
                self.discard_misfits(*geometry);
            }
            Change::Run { tenant, chunks } => {
                self.tenant.get_or_insert(*tenant);
                for chunk in chunks {
                    self.record_chunk(*chunk);
                }
            }
            Change::Facts(facts) => self.facts.clone_from(facts),
            Change::Lost { generation, chunks } => {
                self.generation = self.generation.max(*generation);
                self.published = None;
                for chunk in chunks {
                    self.forget(chunk.number());
                }
            }
            Change::Published(published) => self.published = Some(*published),
            Change::Freed { generation } => {
                self.generation = self.generation.max(*generation);
                self.forget_all();
            }
            Change::Dropped { tenant, facts } => {
                self.tenant.get_or_insert(*tenant);
                self.facts.clone_from(facts);
                self.dropped = true;
                self.forget_all();
            }
            Change::Discarded => *self = Self { applied: seq, origin: Origin::Journal, ..Self::default() },
        }
    }

    fn discard_misfits(&mut self, geometry: Geometry) {
        self.published = self.published.filter(|published| published.geometry == geometry);
        for chunk in self.misfits(geometry) {
            self.forget(chunk);
        }
    }

    fn record_chunk(&mut self, chunk: Chunk) {
        let index = chunk.index.number();
        self.forget(index);
        self.held.insert(index..index + 1);
        self.held_bytes += u64::from(chunk.len);
        if u64::from(chunk.len) < CHUNK_LEN {
            self.short.insert(index, chunk.len);
        }
        self.fresh.insert(index, chunk);
    }

    fn forget(&mut self, chunk: u64) {
        if self.has(chunk) {
            self.held_bytes -= u64::from(self.len_of(chunk));
            self.held.remove(chunk..chunk + 1);
            self.short.remove(&chunk);
            self.fresh.remove(&chunk);
        }
    }

    fn forget_all(&mut self) {
        self.held = Ranges::new();
        self.short.clear();
        self.fresh.clear();
        self.held_bytes = 0;
        self.published = None;
    }

    /// Marks values as written to their file, unless they changed since.
    pub(crate) fn settle(&mut self, written: &[Chunk]) {
        for chunk in written {
            let index = chunk.index.number();
            if self.fresh.get(&index) == Some(chunk) {
                self.fresh.remove(&index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::change::tests::record;
    use sluice_engine::hash::ChainingValue;

    fn chunk(index: u64, len: u32) -> Chunk {
        let value = ChainingValue::from_bytes([index as u8; 32]);
        Chunk { index: ChunkIndex::new(index).unwrap(), len, value }
    }

    fn run(chunks: &[Chunk]) -> Change {
        Change::Run { tenant: TenantId::new(7), chunks: chunks.to_vec() }
    }

    const FULL: u32 = CHUNK_LEN as u32;

    #[test]
    fn a_record_discards_what_cannot_belong_to_its_file() {
        let mut state = FileState::default();
        state.apply(1, &run(&[chunk(0, FULL), chunk(1, 9), chunk(2, FULL), chunk(3, FULL), chunk(9, 1)]));
        assert_eq!(state.held_bytes, 3 * CHUNK_LEN + 10);
        assert_eq!(state.shape_of_held(), None);
        let metadata = record(Some(2 * CHUNK_LEN + 7));
        let geometry = metadata.geometry().unwrap();
        assert_eq!(state.misfits(geometry), [1, 2, 3, 9]);
        let change = Change::Metadata { generation: Generation::new(2), record: Box::new(metadata) };
        state.apply(2, &change);
        assert_eq!(state.summary(Generation::new(0)).unwrap().held.len(), 1);
        assert_eq!(state.held_bytes, CHUNK_LEN);
        assert_eq!(state.fresh.len(), 1);
    }

    #[test]
    fn a_whole_file_has_a_shape_without_a_record() {
        let mut state = FileState::default();
        assert_eq!(state.shape_of_held(), Geometry::new(0).ok());
        state.apply(1, &run(&[chunk(0, FULL), chunk(1, 9)]));
        assert_eq!(state.shape_of_held(), Geometry::new(CHUNK_LEN + 9).ok());
        state.apply(2, &run(&[chunk(2, FULL)]));
        assert_eq!(state.shape_of_held(), None);
    }

    #[test]
    fn applying_again_changes_nothing() {
        let generation = Generation::new(5);
        let changes = [
            run(&[chunk(0, FULL), chunk(1, 9)]),
            Change::Lost { generation, chunks: vec![ChunkIndex::new(1).unwrap()] },
            run(&[chunk(1, 10)]),
            Change::Facts(b"facts".to_vec()),
        ];
        let mut state = FileState::default();
        for (seq, change) in changes.iter().enumerate() {
            state.apply(seq as u64 + 1, change);
        }
        let once = state.clone();
        for (seq, change) in changes.iter().enumerate() {
            state.apply(seq as u64 + 1, change);
        }
        assert_eq!(state, once);
        assert_eq!(state.held_bytes, CHUNK_LEN + 10);
        assert_eq!(state.generation(Generation::new(9)), Generation::new(9));
        state.apply(9, &Change::Discarded);
        assert!(!state.is_known());
    }
}
