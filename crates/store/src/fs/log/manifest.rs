//! The log's manifest: which runs are in force, and how far into the log they reach. Replaced as a whole; when it is
//! lost, or a run is, the index is made again from the log.
//!
//! Body in a [sealed] envelope `SLL`:
//!
//! | bytes | field |
//! | --- | --- |
//! | 16 | volume |
//! | 8 | number of the next run |
//! | 8 + 8 | segment and offset: what lies before is in the runs |
//! | 4, then 8 each | runs, newest first |
//! | 4, then 8 + 8 + 8 each | segments, where each ends, and bytes in each that still count |

use std::collections::BTreeMap;

use crate::fs::volume::VolumeId;
use crate::sealed::{self, FormatError, Reader};

const MAGIC: [u8; 4] = *b"SLL\x01";

/// What a manifest says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) next_run: u64,
    /// Segment and offset.
    pub(crate) covered: (u64, u64),
    /// Newest first.
    pub(crate) runs: Vec<u64>,
    pub(crate) segments: BTreeMap<u64, Fill>,
}

/// How a segment is filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fill {
    /// Where its last frame ends.
    pub(crate) end: u64,
    /// Bytes of records that are the newest of their file.
    pub(crate) live: u64,
}

impl Manifest {
    /// The bytes of the file.
    pub(crate) fn encode(&self, volume: VolumeId) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&volume.0);
        body.extend_from_slice(&self.next_run.to_be_bytes());
        body.extend_from_slice(&self.covered.0.to_be_bytes());
        body.extend_from_slice(&self.covered.1.to_be_bytes());
        body.extend_from_slice(&(self.runs.len() as u32).to_be_bytes());
        for run in &self.runs {
            body.extend_from_slice(&run.to_be_bytes());
        }
        body.extend_from_slice(&(self.segments.len() as u32).to_be_bytes());
        for (segment, Fill { end, live }) in &self.segments {
            body.extend_from_slice(&segment.to_be_bytes());
            body.extend_from_slice(&end.to_be_bytes());
            body.extend_from_slice(&live.to_be_bytes());
        }
        sealed::seal(MAGIC, &body)
    }

    /// Reads the file.
    pub(crate) fn decode(volume: VolumeId, bytes: &[u8]) -> Result<Self, FormatError> {
        let mut body = Reader(sealed::unseal(MAGIC, bytes)?);
        if body.array()? != volume.0 {
            return Err(FormatError::Misplaced("volume"));
        }
        let next_run = body.u64()?;
        let covered = (body.u64()?, body.u64()?);
        let runs = (0..body.u32()?).map(|_| body.u64()).collect::<Result<_, _>>()?;
        let segments =
            (0..body.u32()?).map(|_| Ok((body.u64()?, Fill { end: body.u64()?, live: body.u64()? })));
        let segments = segments.collect::<Result<_, FormatError>>()?;
        body.end()?;
        Ok(Self { next_run, covered, runs, segments })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOLUME: VolumeId = VolumeId([7; 16]);

    #[test]
    fn golden_bytes() {
        let manifest = Manifest {
            next_run: 3,
            covered: (4, 5),
            runs: vec![2],
            segments: [(4, Fill { end: 7, live: 6 })].into(),
        };
        let bytes = manifest.encode(VOLUME);
        assert_eq!(bytes[..8], *b"SLL\x01\0\0\0\x50");
        assert_eq!(bytes[24..48], *b"\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x05");
        assert_eq!(bytes[48..60], *b"\0\0\0\x01\0\0\0\0\0\0\0\x02");
    }

    proptest! {
        #[test]
        fn round_trips(next_run: u64, covered: (u64, u64), runs: Vec<u64>,
                       segments in prop::collection::btree_map(any::<u64>(), any::<(u64, u64)>(), 0..9)) {
            let fill = |(number, (end, live))| (number, Fill { end, live });
            let segments = segments.into_iter().map(fill).collect();
            let manifest = Manifest { next_run, covered, runs, segments };
            let bytes = manifest.encode(VOLUME);
            prop_assert_eq!(Manifest::decode(VOLUME, &bytes), Ok(manifest));
            prop_assert!(Manifest::decode(VolumeId([8; 16]), &bytes).is_err());
        }
    }
}
