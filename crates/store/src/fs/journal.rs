//! The journal: batches of records, each written with one call and synced before any of its records is believed.
//!
//! Two files take turns. Each has its room reserved, and is written again from its beginning when its turn comes, so
//! appending needs no room even on a full disk. A batch starts on a block boundary and so never shares a sector with
//! one that was acknowledged.
//!
//! Each batch is a [frame](super::frame) `SLJ`, version 1, whose number is the journal's and whose sequence number is
//! one more than that of the batch before, across journals; it holds [records](super::change).
//!
//! A batch is written only after the one before was synced. So damage with an intact batch behind it is no torn
//! tail but a damaged journal, which is an error; damage at the very end is a write that was never acknowledged.

use std::io;
use std::sync::Arc;

use super::change::Record;
use super::disk::DiskFile;
use super::frame::{self, BLOCK, Framed, HEADER_LEN};
use super::volume::VolumeId;
use crate::sealed::{FormatError, Reader};

const MAGIC: [u8; 4] = *b"SLJ\x01";

/// A batch as it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Its sequence number.
    pub(crate) seq: u64,
    /// Its records.
    pub(crate) records: Vec<Record>,
}

/// A journal as it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Replay {
    /// The batches, in order.
    pub(crate) batches: Vec<Batch>,
    /// Where the next batch goes.
    pub(crate) end: u64,
    /// Whether a torn batch was cut off.
    pub(crate) torn: bool,
}

/// A batch is damaged although a later one is intact, so it was acknowledged.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("journal {number}: batch {seq} at byte {offset} is damaged ({reason}), but batch {later} is intact")]
pub(crate) struct DamagedJournal {
    pub(crate) number: u64,
    pub(crate) seq: u64,
    pub(crate) offset: usize,
    pub(crate) reason: FormatError,
    pub(crate) later: u64,
}

fn encode(volume: VolumeId, number: u64, seq: u64, records: u32, payload: &[u8]) -> Vec<u8> {
    frame::encode(MAGIC, volume, number, seq, records, payload)
}

fn frame(volume: VolumeId, number: u64, bytes: &[u8]) -> Result<Framed<'_>, FormatError> {
    frame::decode(MAGIC, volume, number, bytes)
}

/// Reads the batches of journal `number`, of which the first must be `seq`, from the bytes of its file.
pub(crate) fn replay(
    volume: VolumeId,
    number: u64,
    mut seq: u64,
    bytes: &[u8],
) -> Result<Replay, DamagedJournal> {
    let mut batches = Vec::new();
    let mut at = 0;
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        let reason = match frame(volume, number, rest) {
            Ok(framed) if framed.seq == seq => match records(&framed) {
                Ok(records) => {
                    batches.push(Batch { seq, records });
                    seq += 1;
                    at += (HEADER_LEN + framed.payload.len()).next_multiple_of(BLOCK);
                    continue;
                }
                // The check matches, so these bytes were written on purpose: by a version that knows more.
                Err(reason) => {
                    return Err(DamagedJournal { number, seq, offset: at, reason, later: framed.seq });
                }
            },
            Ok(framed) => {
                let reason = FormatError::Impossible("sequence number");
                return Err(DamagedJournal { number, seq, offset: at, reason, later: framed.seq });
            }
            Err(reason) => reason,
        };
        let mut later = at + BLOCK;
        while let Some(rest) = bytes.get(later..).filter(|rest| !rest.is_empty()) {
            if let Ok(framed) = frame(volume, number, rest) {
                return Err(DamagedJournal { number, seq, offset: at, reason, later: framed.seq });
            }
            later += BLOCK;
        }
        let torn = rest.starts_with(&MAGIC) && reason != frame::ELSEWHERE;
        return Ok(Replay { batches, end: at as u64, torn });
    }
}

fn records(framed: &Framed<'_>) -> Result<Vec<Record>, FormatError> {
    let mut reader = Reader(framed.payload);
    let records = (0..framed.records).map(|_| Record::decode(&mut reader)).collect::<Result<_, _>>()?;
    reader.end()?;
    Ok(records)
}

/// The end of the journal, where batches are appended.
#[derive(Debug)]
pub(crate) struct Journal {
    pub(crate) volume: VolumeId,
    /// By number modulo two.
    pub(crate) files: [Arc<dyn DiskFile>; 2],
    /// The one that is written.
    pub(crate) number: u64,
    /// Where its next batch goes.
    pub(crate) end: u64,
    /// Sequence number of the next batch.
    pub(crate) next_seq: u64,
    /// Bytes reserved in each file.
    pub(crate) capacity: u64,
}

impl Journal {
    /// Whether a batch of `payload` bytes still fits the file.
    pub(crate) fn fits(&self, payload: usize) -> bool {
        self.end + ((HEADER_LEN + payload).next_multiple_of(BLOCK) as u64) <= self.capacity
    }

    /// Appends a batch and syncs it; returns its sequence number.
    pub(crate) fn append(&mut self, records: u32, payload: &[u8]) -> io::Result<u64> {
        let seq = self.next_seq;
        let bytes = encode(self.volume, self.number, seq, records, payload);
        let file = &self.files[(self.number % 2) as usize];
        file.write_at(self.end, &bytes)?;
        file.sync_data()?;
        self.end += bytes.len() as u64;
        self.next_seq += 1;
        Ok(seq)
    }

    /// Goes on in the other file, whose content must no longer be needed.
    pub(crate) fn turn(&mut self) {
        self.number += 1;
        self.end = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::change::{Change, VolumeChange};
    use proptest::prelude::*;
    use sluice_engine::ids::{FileId, Generation};
    use sluice_engine::share::Share;

    const VOLUME: VolumeId = VolumeId([7; 16]);

    fn batch(number: u64, seq: u64, size: usize) -> (Batch, Vec<u8>) {
        let records = vec![
            Record::Volume(VolumeChange::Floor(Share::WHOLE, Generation::new(seq))),
            Record::File(FileId::from_bytes([seq as u8; 16]), Change::Facts(vec![1; size])),
        ];
        let mut payload = Vec::new();
        for record in &records {
            record.encode(&mut payload);
        }
        let bytes = encode(VOLUME, number, seq, records.len() as u32, &payload);
        (Batch { seq, records }, bytes)
    }

    fn file(number: u64, sizes: &[usize]) -> (Vec<Batch>, Vec<u8>) {
        let mut bytes = Vec::new();
        let mut batches = Vec::new();
        for (i, size) in sizes.iter().enumerate() {
            let (batch, more) = batch(number, 5 + i as u64, *size);
            batches.push(batch);
            bytes.extend_from_slice(&more);
        }
        (batches, bytes)
    }

    #[test]
    fn golden_bytes() {
        let bytes = encode(VOLUME, 1, 2, 3, b"abc");
        assert_eq!(bytes.len(), BLOCK);
        assert_eq!(bytes[..28], *b"SLJ\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\x03\0\0\0\x03");
        assert_eq!(bytes[HEADER_LEN..HEADER_LEN + 4], *b"abc\0");
    }

    #[test]
    fn older_turns_of_the_file_are_behind_the_end() {
        let (_, mut bytes) = file(1, &[10, 5000, 10]);
        let (batches, new) = file(3, &[20]);
        bytes[..new.len()].copy_from_slice(&new);
        let replay = replay(VOLUME, 3, 5, &bytes).unwrap();
        assert_eq!(replay, Replay { batches, end: BLOCK as u64, torn: false });
    }

    #[test]
    fn a_torn_tail_is_cut_and_damage_before_it_is_an_error() {
        let (batches, bytes) = file(1, &[10, 5000, 9000]);
        for cut in [bytes.len() - BLOCK, bytes.len() - 2 * BLOCK] {
            let replay = replay(VOLUME, 1, 5, &bytes[..cut]).unwrap();
            assert_eq!(replay.batches, batches[..2]);
            assert!(replay.torn);
        }
        let mut damaged = bytes.clone();
        damaged[BLOCK + 100] ^= 1;
        let error = replay(VOLUME, 1, 5, &damaged).unwrap_err();
        assert_eq!((error.seq, error.offset, error.later), (6, BLOCK, 7));
        assert_eq!(error.reason, FormatError::Check);
        assert!(replay(VOLUME, 1, 4, &bytes).is_err(), "a batch is missing in front");
        assert!(replay(VolumeId([8; 16]), 1, 5, &bytes).unwrap().batches.is_empty());
    }

    proptest! {
        #[test]
        fn any_flip_in_the_last_batch_cuts_it_and_in_another_is_an_error(
            sizes in prop::collection::vec(0..6000usize, 1..5), at in any::<prop::sample::Index>(), bit in 0..8u8,
        ) {
            let (batches, mut bytes) = file(1, &sizes);
            prop_assert_eq!(&replay(VOLUME, 1, 5, &bytes).unwrap().batches, &batches);
            let (_, before) = file(1, &sizes[..sizes.len() - 1]);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            match replay(VOLUME, 1, 5, &bytes) {
                // The flip hit padding, or the last batch.
                Ok(replay) if replay.batches.len() == batches.len() => prop_assert_eq!(replay.batches, batches),
                Ok(replay) => {
                    prop_assert!(at >= before.len());
                    prop_assert_eq!(&replay.batches, &batches[..batches.len() - 1]);
                }
                Err(_) => prop_assert!(at < before.len()),
            }
        }
    }
}
