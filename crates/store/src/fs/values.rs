//! The values file: one slot per chunk of a segment, beside the segment's data. Written in place; what the journal
//! still holds is written again after a crash, so a torn slot is never believed.
//!
//! | bytes | field |
//! | --- | --- |
//! | 32 | chaining value |
//! | 4 | length of the chunk |
//! | 8 | BLAKE3 of file, chunk index and the fields above, cut |
//!
//! Which slots count is the [index](super::index)'s to say.

use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::FileId;
use sluice_engine::limits::SEGMENT_CHUNKS;

use super::change::Chunk;
use crate::sealed::{FormatError, Reader, check};

/// Bytes of a slot.
pub(crate) const SLOT_LEN: usize = 44;

/// Where the slot of a chunk lies in its file.
pub(crate) const fn offset(index: ChunkIndex) -> u64 {
    (index.number() % SEGMENT_CHUNKS) * SLOT_LEN as u64
}

/// Appends a slot.
pub(crate) fn encode(file: FileId, chunk: &Chunk, out: &mut Vec<u8>) {
    out.extend_from_slice(chunk.value.as_bytes());
    out.extend_from_slice(&chunk.len.to_be_bytes());
    let check = slot_check(file, chunk);
    out.extend_from_slice(&check);
}

/// Reads a slot.
pub(crate) fn decode(file: FileId, index: ChunkIndex, slot: &[u8]) -> Result<Chunk, FormatError> {
    let mut reader = Reader(slot);
    let value = ChainingValue::from_bytes(reader.array()?);
    let chunk = Chunk { index, len: reader.u32()?, value };
    if reader.array()? != slot_check(file, &chunk) {
        return Err(FormatError::Check);
    }
    reader.end()?;
    Ok(chunk)
}

fn slot_check(file: FileId, chunk: &Chunk) -> [u8; 8] {
    let index = chunk.index.number().to_be_bytes();
    let long = check(&[file.as_bytes(), &index, chunk.value.as_bytes(), &chunk.len.to_be_bytes()]);
    let mut short = [0; 8];
    short.copy_from_slice(&long[..8]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunk(index: u64, len: u32, value: [u8; 32]) -> Chunk {
        Chunk { index: ChunkIndex::new(index).unwrap(), len, value: ChainingValue::from_bytes(value) }
    }

    #[test]
    fn golden_bytes() {
        let mut slot = Vec::new();
        encode(FileId::from_bytes([1; 16]), &chunk(SEGMENT_CHUNKS + 2, 5, [9; 32]), &mut slot);
        assert_eq!(slot.len(), SLOT_LEN);
        assert_eq!(slot[..32], [9; 32]);
        assert_eq!(slot[32..36], [0, 0, 0, 5]);
        assert_eq!(offset(ChunkIndex::new(SEGMENT_CHUNKS + 2).unwrap()), 88);
    }

    proptest! {
        #[test]
        fn round_trips_and_knows_its_place(index in 0..1u64 << 30, len in 1..=1u32 << 20, value: [u8; 32],
                                           at in 0..SLOT_LEN, bit in 0..8u8) {
            let file = FileId::from_bytes([1; 16]);
            let chunk = chunk(index, len, value);
            let mut slot = Vec::new();
            encode(file, &chunk, &mut slot);
            prop_assert_eq!(decode(file, chunk.index, &slot), Ok(chunk));
            prop_assert!(decode(FileId::from_bytes([2; 16]), chunk.index, &slot).is_err());
            prop_assert!(decode(file, ChunkIndex::new(index + 1).unwrap(), &slot).is_err());
            slot[at] ^= 1 << bit;
            prop_assert!(decode(file, chunk.index, &slot).is_err());
        }
    }
}
