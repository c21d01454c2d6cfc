//! The checkpoint: which journals are no longer needed, and what belongs to no file. Replaced as a whole.
//!
//! Body in a [sealed] envelope `SLC`:
//!
//! | bytes | field |
//! | --- | --- |
//! | 16 | volume |
//! | 8 | number of the last journal whose changes are all in their files |
//! | 8 | sequence number of the first batch after that journal |
//! | 8 | lowest generation of any file |
//! | 4 + n | state blob |

use sluice_engine::ids::Generation;

use super::volume::VolumeId;
use crate::sealed::{self, FormatError, Reader};

const MAGIC: [u8; 4] = *b"SLC\x01";

/// What a checkpoint says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    /// The last journal that is no longer needed.
    pub(crate) journal: u64,
    /// Sequence number of the first batch after it.
    pub(crate) next_seq: u64,
    /// Lowest generation of any file.
    pub(crate) floor: Generation,
    /// The volume's state blob.
    pub(crate) state: Vec<u8>,
}

impl Checkpoint {
    /// The bytes of the file.
    pub(crate) fn encode(&self, volume: VolumeId) -> Vec<u8> {
        let mut body = Vec::with_capacity(44 + self.state.len());
        body.extend_from_slice(&volume.0);
        body.extend_from_slice(&self.journal.to_be_bytes());
        body.extend_from_slice(&self.next_seq.to_be_bytes());
        body.extend_from_slice(&self.floor.number().to_be_bytes());
        sealed::push_block(&mut body, &self.state);
        sealed::seal(MAGIC, &body)
    }

    /// Reads the file.
    pub(crate) fn decode(volume: VolumeId, bytes: &[u8]) -> Result<Self, FormatError> {
        let mut body = Reader(sealed::unseal(MAGIC, bytes)?);
        if body.array()? != volume.0 {
            return Err(FormatError::Misplaced("volume"));
        }
        let journal = body.u64()?;
        let next_seq = body.u64()?;
        let floor = Generation::new(body.u64()?);
        let state = body.block()?.to_vec();
        body.end()?;
        Ok(Self { journal, next_seq, floor, state })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOLUME: VolumeId = VolumeId([7; 16]);

    #[test]
    fn golden_bytes() {
        let checkpoint =
            Checkpoint { journal: 1, next_seq: 2, floor: Generation::new(3), state: b"st".to_vec() };
        let bytes = checkpoint.encode(VOLUME);
        assert_eq!(bytes[..8], *b"SLC\x01\0\0\0\x2e");
        assert_eq!(bytes[24..54], *b"\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\x02st");
        assert_eq!(Checkpoint::decode(VolumeId([8; 16]), &bytes), Err(FormatError::Misplaced("volume")));
    }

    proptest! {
        #[test]
        fn round_trips(journal: u64, next_seq: u64, floor: u64, state: Vec<u8>) {
            let checkpoint = Checkpoint { journal, next_seq, floor: Generation::new(floor), state };
            prop_assert_eq!(Checkpoint::decode(VOLUME, &checkpoint.encode(VOLUME)), Ok(checkpoint));
        }
    }
}
