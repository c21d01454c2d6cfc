//! The runs of a file that are in the bucket as they came, each an object whose key says all of it.
//!
//! A run counts for a chunk unless the chunk is void in it, or cannot belong to a file of the known shape. Two runs may
//! hold the same chunk; while they agree either serves. Where they do not, those of the latest epoch count, which were let in
//! when the others were not there ([`keys`](super::keys)). Where these do not agree either, none counts: that takes two keepers at once,
//! and nothing says which was acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::FileId;
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::ranges::Ranges;

use super::keys::{self, Epoch, Life};

/// Names a run of a file: what its key says, shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PieceName {
    /// First chunk.
    pub(crate) start: u64,
    /// log2 of its chunks.
    pub(crate) level: u8,
    /// BLAKE3 of its values one after the other, cut.
    pub(crate) digest: [u8; 16],
}

/// A run that is in the bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Its chunks.
    pub(crate) run: Run,
    /// Its length in bytes.
    pub(crate) len: u64,
    /// The value of each chunk.
    pub(crate) values: Box<[ChainingValue]>,
    /// When it was let in.
    pub(crate) epoch: Epoch,
}

impl Piece {
    /// A run of `len` bytes; `None` if such a run is not `len` bytes long.
    pub(crate) fn new(run: Run, len: u64, values: &[ChainingValue], epoch: Epoch) -> Option<Self> {
        let fits = Run::from_len(run.start(), len).is_ok_and(|of_len| of_len == run);
        (fits && values.len() as u64 == run.count()).then(|| Self { run, len, values: values.into(), epoch })
    }

    /// The key of its object.
    pub(crate) fn key(&self, file: FileId, life: Life) -> String {
        keys::incoming(file, life, self.run, &self.values, self.epoch)
    }

    /// Its name.
    pub(crate) fn name(&self) -> PieceName {
        let mut hasher = blake3::Hasher::new();
        for value in &self.values {
            hasher.update(value.as_bytes());
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        PieceName { start: self.run.start().number(), level: self.run.count().trailing_zeros() as u8, digest }
    }

    /// The value of a chunk of it.
    pub(crate) fn value(&self, chunk: u64) -> Option<ChainingValue> {
        self.values.get(chunk.checked_sub(self.run.start().number())? as usize).copied()
    }

    /// Where in the object the bytes of a chunk of it are.
    pub(crate) fn bytes(&self, chunk: u64) -> Range<u64> {
        let start = (chunk - self.run.start().number()) * CHUNK_LEN;
        start..(start + CHUNK_LEN).min(self.len)
    }
}

/// The bit of a chunk in a mask of a run.
pub(crate) fn bit(start: u64, chunk: u64) -> u8 {
    1 << (chunk - start)
}

/// A chunk that is here in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// In which.
    pub(crate) piece: PieceName,
    /// Its value.
    pub(crate) value: ChainingValue,
    /// Its length.
    pub(crate) len: u32,
}

/// The runs of a file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pieces {
    pieces: BTreeMap<PieceName, Piece>,
    /// Earlier epochs in which the same run is there, too.
    earlier: BTreeMap<PieceName, BTreeSet<Epoch>>,
    void: BTreeMap<PieceName, u8>,
    shape: Option<Geometry>,
    held: Ranges,
    /// Lengths of the held chunks that are not full.
    short: BTreeMap<u64, u32>,
}

impl Pieces {
    /// Adds a run, which is there. Of two that differ by their epoch only, the later stays.
    pub(crate) fn add(&mut self, piece: Piece) {
        let (name, range) = (piece.name(), piece.run.range());
        let earlier = match self.pieces.get(&name).map(|held| held.epoch) {
            Some(held) if held > piece.epoch => Some(piece.epoch),
            held => {
                let epoch = piece.epoch;
                self.pieces.insert(name, piece);
                held.filter(|held| *held < epoch)
            }
        };
        if let Some(earlier) = earlier {
            self.earlier.entry(name).or_default().insert(earlier);
        }
        self.count(range);
    }

    /// Forgets a run, which is gone.
    pub(crate) fn remove(&mut self, name: PieceName) {
        self.earlier.remove(&name);
        if let Some(piece) = self.pieces.remove(&name) {
            self.count(piece.run.range());
        }
    }

    /// Sets which chunks are void, and what shape the file has.
    pub(crate) fn set(&mut self, void: &BTreeMap<PieceName, u8>, shape: Option<Geometry>) {
        if self.shape != shape || self.void != *void {
            (self.void, self.shape) = (void.clone(), shape);
            self.held = Ranges::new();
            self.short.clear();
            let runs: Vec<Range<u64>> = self.pieces.values().map(|piece| piece.run.range()).collect();
            runs.into_iter().for_each(|range| self.count(range));
        }
    }

    /// Looks again at what is held of some chunks.
    fn count(&mut self, range: Range<u64>) {
        for chunk in range {
            self.held.remove(chunk..chunk + 1);
            self.short.remove(&chunk);
            if let Some(held) = self.held(chunk) {
                self.held.insert(chunk..chunk + 1);
                if u64::from(held.len) < CHUNK_LEN {
                    self.short.insert(chunk, held.len);
                }
            }
        }
    }

    /// The runs that have a chunk, whether it counts or not, the longest first.
    pub(crate) fn of(&self, chunk: u64) -> impl Iterator<Item = (PieceName, &Piece)> {
        (0..4u8).rev().flat_map(move |level| {
            let start = chunk >> level << level;
            let name = |digest| PieceName { start, level, digest };
            self.pieces.range(name([0; 16])..=name([0xFF; 16])).map(|(name, piece)| (*name, piece))
        })
    }

    /// The runs in which a chunk could count, and when they were let in.
    fn counting(&self, chunk: u64) -> impl Iterator<Item = (Epoch, Held)> {
        self.of(chunk).filter_map(move |(name, piece)| {
            let void = self.void.get(&name).copied().unwrap_or(0);
            if void & bit(name.start, chunk) != 0 {
                return None;
            }
            let bytes = piece.bytes(chunk);
            let len = bytes.end - bytes.start;
            let fits = self.shape.is_none_or(|shape| {
                ChunkIndex::new(chunk)
                    .and_then(|index| shape.chunk_len(index))
                    .is_ok_and(|expected| expected == len)
            });
            let value = piece.value(chunk).filter(|_| fits)?;
            Some((piece.epoch, Held { piece: name, value, len: len as u32 }))
        })
    }

    /// A chunk, if it is here and nothing contradicts it.
    pub(crate) fn held(&self, chunk: u64) -> Option<Held> {
        let latest = self.counting(chunk).map(|(epoch, _)| epoch).max()?;
        let mut counting = self.counting(chunk).filter(|(epoch, _)| *epoch == latest).map(|(_, held)| held);
        let first = counting.next()?;
        counting.all(|other| other.value == first.value && other.len == first.len).then_some(first)
    }

    /// Whether runs contradict each other about a chunk, whichever counts.
    pub(crate) fn is_contradicted(&self, chunk: u64) -> bool {
        let mut all = self.counting(chunk).map(|(_, held)| (held.value, held.len));
        all.next().is_some_and(|first| all.any(|other| other != first))
    }

    /// Whether runs contradict each other about a chunk, and none counts.
    pub(crate) fn is_disputed(&self, chunk: u64) -> bool {
        self.held(chunk).is_none() && self.counting(chunk).next().is_some()
    }

    /// The chunks that are here.
    pub(crate) fn held_chunks(&self) -> &Ranges {
        &self.held
    }

    /// The lengths of those that are not full.
    pub(crate) fn short(&self) -> &BTreeMap<u64, u32> {
        &self.short
    }

    /// The run of this name, if it is there.
    pub(crate) fn piece(&self, name: PieceName) -> Option<&Piece> {
        self.pieces.get(&name)
    }

    /// All runs that are there.
    pub(crate) fn all(&self) -> impl Iterator<Item = (PieceName, &Piece)> {
        self.pieces.iter().map(|(name, piece)| (*name, piece))
    }

    /// The keys of a run in all epochs in which it is there.
    pub(crate) fn keys_of(&self, name: PieceName, file: FileId, life: Life) -> Vec<String> {
        let Some(piece) = self.pieces.get(&name) else { return Vec::new() };
        let earlier = self.earlier.get(&name).into_iter().flatten();
        let all = std::iter::once(&piece.epoch).chain(earlier);
        all.map(|epoch| keys::incoming(file, life, piece.run, &piece.values, *epoch)).collect()
    }

    /// The same, of all runs.
    pub(crate) fn keys(&self, file: FileId, life: Life) -> Vec<String> {
        self.pieces.keys().flat_map(|name| self.keys_of(*name, file, life)).collect()
    }

    /// Whether none is.
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether chunks would stop counting if the file had this shape.
    pub(crate) fn has_misfits(&self, shape: Geometry) -> bool {
        let past = self.held.iter().any(|range| range.end > shape.chunks());
        let fits = |chunk: u64, len: u64| {
            ChunkIndex::new(chunk)
                .and_then(|index| shape.chunk_len(index))
                .is_ok_and(|expected| expected == len)
        };
        let last = shape.chunks().checked_sub(1).filter(|last| self.held.covers(*last..*last + 1));
        let last_fits = last
            .is_none_or(|last| fits(last, self.short.get(&last).map_or(CHUNK_LEN, |len| u64::from(*len))));
        past || !last_fits || self.short.iter().any(|(chunk, len)| !fits(*chunk, u64::from(*len)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init, reason = "a file often holds exactly one range")]

    use super::*;

    fn value(byte: u8) -> ChainingValue {
        ChainingValue::from_bytes([byte; 32])
    }

    fn piece(start: u64, len: u64, values: &[u8]) -> Piece {
        piece_of(start, len, values, 1)
    }

    fn piece_of(start: u64, len: u64, values: &[u8], epoch: u32) -> Piece {
        let values: Vec<ChainingValue> = values.iter().map(|byte| value(*byte)).collect();
        let run = Run::new(ChunkIndex::new(start).unwrap(), values.len() as u64).unwrap();
        Piece::new(run, len, &values, Epoch(epoch)).unwrap()
    }

    #[test]
    fn of_runs_that_contradict_each_other_the_later_ones_count() {
        let mut pieces = Pieces::default();
        pieces.add(piece_of(0, 2 * CHUNK_LEN, &[1, 2], 3));
        pieces.add(piece_of(1, CHUNK_LEN, &[9], 2));
        assert_eq!(pieces.held(1).map(|held| held.value), Some(value(2)), "it landed too late");
        pieces.add(piece_of(1, CHUNK_LEN, &[9], 4));
        assert_eq!(pieces.held(1).map(|held| held.value), Some(value(9)));
        // The earlier of the same does not take the place of the later.
        pieces.add(piece_of(1, CHUNK_LEN, &[9], 2));
        assert_eq!(pieces.held(1).map(|held| held.value), Some(value(9)));
        let (file, name) = (FileId::from_bytes([1; 16]), piece_of(1, CHUNK_LEN, &[9], 4).name());
        let keys = pieces.keys_of(name, file, Life(5));
        assert_eq!(keys, [4, 2].map(|epoch| piece_of(1, CHUNK_LEN, &[9], epoch).key(file, Life(5))));
        assert_eq!(pieces.keys(file, Life(5)).len(), 3, "all of them go in the end");
        pieces.add(piece_of(1, CHUNK_LEN, &[7], 4));
        assert!(pieces.is_disputed(1) && !pieces.is_disputed(0));
    }

    #[test]
    fn runs_that_agree_serve_either_way_and_others_do_not_count() {
        let mut pieces = Pieces::default();
        pieces.add(piece(0, 4 * CHUNK_LEN, &[1, 2, 3, 4]));
        let single = piece(2, CHUNK_LEN, &[3]);
        pieces.add(single.clone());
        assert_eq!(pieces.held_chunks().iter().collect::<Vec<_>>(), [0..4]);
        pieces.add(piece(1, CHUNK_LEN, &[9]));
        assert!(pieces.is_disputed(1) && !pieces.is_disputed(2) && !pieces.is_disputed(7));
        assert_eq!(pieces.held_chunks().iter().collect::<Vec<_>>(), [0..1, 2..4]);
        // Once the chunk is void in one of them the other counts.
        let first = piece(0, 4 * CHUNK_LEN, &[1, 2, 3, 4]).name();
        let void = BTreeMap::from([(first, bit(0, 1) | bit(0, 2))]);
        pieces.set(&void, None);
        assert_eq!(pieces.held(1).map(|held| held.value), Some(value(9)));
        assert_eq!(pieces.held(2).map(|held| held.piece), Some(single.name()));
        pieces.remove(single.name());
        assert_eq!(pieces.held_chunks().iter().collect::<Vec<_>>(), [0..2, 3..4]);
    }

    #[test]
    fn what_cannot_belong_to_the_file_does_not_count() {
        let mut pieces = Pieces::default();
        pieces.add(piece(0, CHUNK_LEN + 9, &[1, 2]));
        pieces.add(piece(4, CHUNK_LEN, &[5]));
        assert_eq!(pieces.short().iter().collect::<Vec<_>>(), [(&1, &9)]);
        let shape = Geometry::new(CHUNK_LEN + 9).unwrap();
        assert!(pieces.has_misfits(shape));
        pieces.set(&BTreeMap::new(), Some(shape));
        assert_eq!(pieces.held_chunks().iter().collect::<Vec<_>>(), [0..2]);
        assert!(!pieces.has_misfits(shape));
        pieces.set(&BTreeMap::new(), Geometry::new(2 * CHUNK_LEN).ok());
        assert_eq!(pieces.held_chunks().iter().collect::<Vec<_>>(), [0..1]);
    }

    #[test]
    fn a_run_is_as_long_as_its_chunks() {
        let run = Run::new(ChunkIndex::new(0).unwrap(), 2).unwrap();
        assert!(Piece::new(run, CHUNK_LEN, &[value(1), value(2)], Epoch(1)).is_none());
        assert!(Piece::new(run, CHUNK_LEN + 1, &[value(1)], Epoch(1)).is_none());
        assert!(Piece::new(run, 2 * CHUNK_LEN + 1, &[value(1), value(2)], Epoch(1)).is_none());
    }
}
