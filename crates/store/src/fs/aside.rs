//! Changes of files whose index cannot be read: damaged, or on a bad place of the device. A checkpoint cannot put them
//! where they belong, and sets them aside here, so that the journal begins anew and the other files go on. Nothing is
//! lost: whoever asks for the file gets an error for as long as its index cannot be read, and after that the file as it
//! is, with these changes. The first checkpoint after the volume was opened tries them again.
//!
//! One file, replaced as a whole by the checkpointer; missing if there is nothing in it. Body in a [sealed] envelope
//! `SLA`:
//!
//! | bytes | field |
//! | --- | --- |
//! | 16 | volume |
//! | 4 | number of changes, in the order of their batches for each file, and for each: |
//! | 8 + n | batch, and a [record](super::change) as a journal has it |

use std::collections::BTreeMap;

use sluice_engine::ids::FileId;

use super::change::{Change, Record};
use super::volume::VolumeId;
use crate::sealed::{self, FormatError, Reader};

const MAGIC: [u8; 4] = *b"SLA\x01";

/// What was set aside, with the batches that it came in.
pub(crate) type Aside = BTreeMap<FileId, Vec<(u64, Change)>>;

/// The bytes of the file.
pub(crate) fn encode(volume: VolumeId, aside: &Aside) -> Vec<u8> {
    let mut body = volume.0.to_vec();
    let count: usize = aside.values().map(Vec::len).sum();
    body.extend_from_slice(&(count as u32).to_be_bytes());
    for (file, changes) in aside {
        for (seq, change) in changes {
            body.extend_from_slice(&seq.to_be_bytes());
            Record::File(*file, change.clone()).encode(&mut body);
        }
    }
    sealed::seal(MAGIC, &body)
}

/// Reads the file.
pub(crate) fn decode(volume: VolumeId, bytes: &[u8]) -> Result<Aside, FormatError> {
    let mut body = Reader(sealed::unseal(MAGIC, bytes)?);
    if body.array()? != volume.0 {
        return Err(FormatError::Misplaced("volume"));
    }
    let mut aside = Aside::new();
    for _ in 0..body.u32()? {
        let seq = body.u64()?;
        match Record::decode(&mut body)? {
            Record::File(file, change) => aside.entry(file).or_default().push((seq, change)),
            Record::Volume(_) => return Err(FormatError::Impossible("kind of record")),
        }
    }
    body.end()?;
    Ok(aside)
}

/// Puts what the journal says of a file behind what was set aside of it. A crash may have left changes in both.
pub(crate) fn join(aside: &mut Vec<(u64, Change)>, journal: Vec<(u64, Change)>) {
    let last = aside.last().map(|(seq, _)| *seq);
    aside.extend(journal.into_iter().filter(|(seq, _)| Some(*seq) > last));
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_engine::ids::{Generation, TenantId};
    use sluice_engine::share::Share;

    const VOLUME: VolumeId = VolumeId([7; 16]);

    fn file(i: u8) -> FileId {
        FileId::from_bytes([i; 16])
    }

    fn dropped(facts: &[u8]) -> Change {
        Change::Dropped { tenant: TenantId::new(5), facts: facts.to_vec() }
    }

    #[test]
    fn golden_bytes_round_trip() {
        let freed = Change::Freed { generation: Generation::new(3) };
        let aside: Aside = [(file(1), vec![(9, freed)]), (file(2), vec![(8, Change::Discarded)])].into();
        let bytes = encode(VOLUME, &aside);
        assert_eq!(bytes[..8], *b"SLA\x01\0\0\0\x4e");
        assert_eq!(bytes[24..28], *b"\0\0\0\x02");
        assert_eq!(bytes[28..37], *b"\0\0\0\0\0\0\0\x09\x06");
        assert_eq!(decode(VOLUME, &bytes), Ok(aside));
        assert_eq!(decode(VolumeId([8; 16]), &bytes), Err(FormatError::Misplaced("volume")));
        let mut floor = VOLUME.0.to_vec();
        floor.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
        let state = super::super::change::VolumeChange::State(Share::WHOLE, Vec::new());
        Record::Volume(state).encode(&mut floor);
        assert_eq!(
            decode(VOLUME, &sealed::seal(MAGIC, &floor)),
            Err(FormatError::Impossible("kind of record"))
        );
    }

    #[test]
    fn what_is_in_both_counts_once() {
        let mut changes = vec![(3, dropped(b"a")), (4, dropped(b"b"))];
        join(&mut changes, vec![(4, dropped(b"b")), (5, dropped(b"c")), (5, Change::Discarded)]);
        let all = [(3, dropped(b"a")), (4, dropped(b"b")), (5, dropped(b"c")), (5, Change::Discarded)];
        assert_eq!(changes, all);
        let mut changes = Vec::new();
        join(&mut changes, all[2..].to_vec());
        assert_eq!(changes, all[2..]);
    }
}
