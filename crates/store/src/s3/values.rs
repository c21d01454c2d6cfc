//! The values of the chunks of a segment that was assembled: 32 bytes a chunk.
//!
//! Body in a [sealed](crate::sealed) envelope `SLO`: file 16, root 32, segment 8, then 32 for each chunk.

use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::FileId;

use crate::sealed::{self, FormatError, Reader};

const MAGIC: [u8; 4] = *b"SLO\x01";

/// The bytes of the object.
pub(crate) fn encode(file: FileId, root: Root, segment: u64, values: &[ChainingValue]) -> Vec<u8> {
    let mut body = Vec::with_capacity(56 + 32 * values.len());
    body.extend_from_slice(file.as_bytes());
    body.extend_from_slice(root.as_bytes());
    body.extend_from_slice(&segment.to_be_bytes());
    values.iter().for_each(|value| body.extend_from_slice(value.as_bytes()));
    sealed::seal(MAGIC, &body)
}

/// The length of the object for this many chunks.
pub(crate) fn len(chunks: u64) -> u64 {
    (sealed::ENVELOPE_LEN + 56) as u64 + 32 * chunks
}

/// Reads the values of a segment of `chunks` chunks.
pub(crate) fn decode(
    file: FileId,
    root: Root,
    segment: u64,
    chunks: u64,
    bytes: &[u8],
) -> Result<Vec<ChainingValue>, FormatError> {
    let mut body = Reader(sealed::unseal(MAGIC, bytes)?);
    if body.array()? != *file.as_bytes() || body.array()? != *root.as_bytes() || body.u64()? != segment {
        return Err(FormatError::Misplaced("file or segment"));
    }
    let values =
        (0..chunks).map(|_| body.array().map(ChainingValue::from_bytes)).collect::<Result<_, _>>()?;
    body.end()?;
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let (file, root) = (FileId::from_bytes([1; 16]), Root::from_bytes([2; 32]));
        let values = [ChainingValue::from_bytes([3; 32]), ChainingValue::from_bytes([4; 32])];
        let bytes = encode(file, root, 5, &values);
        assert_eq!(bytes[..8], *b"SLO\x01\0\0\0\x78");
        assert_eq!((&bytes[8..24], &bytes[24..56]), (&[1; 16][..], &[2; 32][..]));
        assert_eq!(bytes[56..64], *b"\0\0\0\0\0\0\0\x05");
        assert_eq!(bytes.len() as u64, len(2));
        assert_eq!(decode(file, root, 5, 2, &bytes), Ok(values.to_vec()));
        assert_eq!(decode(file, root, 6, 2, &bytes), Err(FormatError::Misplaced("file or segment")));
        assert!(decode(file, root, 5, 1, &bytes).is_err() && decode(file, root, 5, 3, &bytes).is_err());
    }
}
