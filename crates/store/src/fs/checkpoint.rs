//! The checkpoint: which journals are no longer needed, and what belongs to no file. Replaced as a whole.
//!
//! Body in a [sealed] envelope `SLC`. Of version 1, if there is nothing of any share but
//! [`Share::WHOLE`]:
//!
//! | bytes | field |
//! | --- | --- |
//! | 16 | volume |
//! | 8 | number of the last journal whose changes are all in their files |
//! | 8 | sequence number of the first batch after that journal |
//! | 8 | lowest generation of any file |
//! | 4 + n | state |
//!
//! Else of version 2, which is in volumes of version 3 only. The last two fields are:
//!
//! | bytes | field |
//! | --- | --- |
//! | 2, then 10 each | [shares](crate::share) with the lowest generation of any of their files |
//! | 2, then 6 + n each | shares with their states |

use sluice_engine::ids::Generation;
use sluice_engine::share::Share;

use super::shared::VolumeState;
use super::volume::VolumeId;
use crate::sealed::{self, FormatError, Reader};
use crate::share::{self, Floors, States};

const WHOLE: [u8; 4] = *b"SLC\x01";
const SHARES: [u8; 4] = *b"SLC\x02";

/// What a checkpoint says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    /// The last journal that is no longer needed.
    pub(crate) journal: u64,
    /// Sequence number of the first batch after it.
    pub(crate) next_seq: u64,
    /// What belongs to no file.
    pub(crate) volume: VolumeState,
}

impl Checkpoint {
    /// The bytes of the file.
    pub(crate) fn encode(&self, volume: VolumeId) -> Vec<u8> {
        let VolumeState { floors, states } = &self.volume;
        let mut body = volume.0.to_vec();
        body.extend_from_slice(&self.journal.to_be_bytes());
        body.extend_from_slice(&self.next_seq.to_be_bytes());
        match floors.only_whole().filter(|_| states.keys().all(|share| *share == Share::WHOLE)) {
            Some(floor) => {
                body.extend_from_slice(&floor.number().to_be_bytes());
                sealed::push_block(&mut body, states.get(&Share::WHOLE).map_or(&[][..], Vec::as_slice));
                sealed::seal(WHOLE, &body)
            }
            None => {
                floors.encode(&mut body);
                share::push_states(&mut body, states);
                sealed::seal(SHARES, &body)
            }
        }
    }

    /// Reads the file.
    pub(crate) fn decode(volume: VolumeId, bytes: &[u8]) -> Result<Self, FormatError> {
        let with_shares = bytes.starts_with(&SHARES);
        let mut body = Reader(sealed::unseal(if with_shares { SHARES } else { WHOLE }, bytes)?);
        if body.array()? != volume.0 {
            return Err(FormatError::Misplaced("volume"));
        }
        let (journal, next_seq) = (body.u64()?, body.u64()?);
        let volume = if with_shares {
            VolumeState { floors: Floors::decode(&mut body)?, states: share::read_states(&mut body)? }
        } else {
            let floors = Floors::of_whole(Generation::new(body.u64()?));
            let mut states = States::new();
            share::put_state(&mut states, Share::WHOLE, body.block()?.to_vec());
            VolumeState { floors, states }
        };
        body.end()?;
        Ok(Self { journal, next_seq, volume })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::share::tests::{floors, states};
    use proptest::prelude::*;

    const VOLUME: VolumeId = VolumeId([7; 16]);

    #[test]
    fn golden_bytes() {
        let volume = VolumeState {
            floors: Floors::of_whole(Generation::new(3)),
            states: [(Share::WHOLE, b"st".to_vec())].into(),
        };
        let mut checkpoint = Checkpoint { journal: 1, next_seq: 2, volume };
        let bytes = checkpoint.encode(VOLUME);
        assert_eq!(bytes[..8], *b"SLC\x01\0\0\0\x2e");
        assert_eq!(bytes[24..54], *b"\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\x02st");
        assert_eq!(Checkpoint::decode(VOLUME, &bytes).as_ref(), Ok(&checkpoint));
        assert_eq!(Checkpoint::decode(VolumeId([8; 16]), &bytes), Err(FormatError::Misplaced("volume")));

        checkpoint.volume.states.insert(Share::new(1, 2).unwrap(), b"other".to_vec());
        let bytes = checkpoint.encode(VOLUME);
        assert_eq!(bytes[..8], *b"SLC\x02\0\0\0\x41");
        assert_eq!(bytes[40..52], *b"\0\x01\0\0\0\0\0\0\0\0\0\x03");
        assert_eq!(bytes[52..73], *b"\0\x02\0\0\0\0\0\x02st\x01\x01\0\0\0\x05other");
        assert_eq!(Checkpoint::decode(VOLUME, &bytes).as_ref(), Ok(&checkpoint));
        assert_eq!(Checkpoint::decode(VolumeId([8; 16]), &bytes), Err(FormatError::Misplaced("volume")));
    }

    #[test]
    fn without_other_shares_it_is_as_it_always_was() {
        for (floor, state) in [(0, &b""[..]), (0, b"st"), (9, b""), (9, b"st")] {
            let mut states = States::new();
            share::put_state(&mut states, Share::WHOLE, state.to_vec());
            let volume = VolumeState { floors: Floors::of_whole(Generation::new(floor)), states };
            let bytes = Checkpoint { journal: 1, next_seq: 2, volume }.encode(VOLUME);
            assert!(bytes.starts_with(&WHOLE), "{floor} {state:?}");
        }
    }

    proptest! {
        #[test]
        fn round_trips(journal: u64, next_seq: u64, floors in floors(), states in states()) {
            let checkpoint = Checkpoint { journal, next_seq, volume: VolumeState { floors, states } };
            prop_assert_eq!(Checkpoint::decode(VOLUME, &checkpoint.encode(VOLUME)), Ok(checkpoint));
        }
    }
}
