//! How far a scrub has come, kept as a cache: written without a sync, believed only if its check matches.
//!
//! Body in a [sealed] envelope `SLR`: the bytes that the aggregator gave.

use crate::sealed::{self, FormatError};

const MAGIC: [u8; 4] = *b"SLR\x01";

/// The bytes of the file.
pub(crate) fn encode(mark: &[u8]) -> Vec<u8> {
    sealed::seal(MAGIC, mark)
}

/// Reads the mark.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<u8>, FormatError> {
    sealed::unseal(MAGIC, bytes).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let bytes = encode(b"mark");
        assert_eq!(bytes[..12], *b"SLR\x01\0\0\0\x04mark");
        assert_eq!(decode(&bytes), Ok(b"mark".to_vec()));
        assert_eq!(decode(&bytes[1..]), Err(FormatError::Magic));
    }
}
