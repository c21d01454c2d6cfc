//! A page of a file's ledger, kept as a cache: written without a sync, believed only if its check matches.
//!
//! Body in a [sealed] envelope `SLP`: file (16), segment (8), page (4 + n).

use sluice_engine::ids::FileId;

use crate::sealed::{self, FormatError, Reader};

const MAGIC: [u8; 4] = *b"SLP\x01";

/// The bytes of the file.
pub(crate) fn encode(file: FileId, segment: u64, page: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(28 + page.len());
    body.extend_from_slice(file.as_bytes());
    body.extend_from_slice(&segment.to_be_bytes());
    sealed::push_block(&mut body, page);
    sealed::seal(MAGIC, &body)
}

/// Reads the page.
pub(crate) fn decode(file: FileId, segment: u64, bytes: &[u8]) -> Result<Vec<u8>, FormatError> {
    let mut body = Reader(sealed::unseal(MAGIC, bytes)?);
    if body.array()? != *file.as_bytes() || body.u64()? != segment {
        return Err(FormatError::Misplaced("file or segment"));
    }
    let page = body.block()?.to_vec();
    body.end()?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let bytes = encode(FileId::from_bytes([1; 16]), 2, b"page");
        assert_eq!(bytes[..8], *b"SLP\x01\0\0\0\x20");
        assert_eq!(bytes[24..40], *b"\0\0\0\0\0\0\0\x02\0\0\0\x04page");
    }

    proptest! {
        #[test]
        fn round_trips(file: [u8; 16], segment: u64, page: Vec<u8>) {
            let file = FileId::from_bytes(file);
            let bytes = encode(file, segment, &page);
            prop_assert_eq!(decode(file, segment, &bytes), Ok(page));
            prop_assert!(decode(file, segment ^ 1, &bytes).is_err());
        }
    }
}
