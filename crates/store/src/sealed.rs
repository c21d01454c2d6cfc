//! The envelope of every small file of a volume, and the reader of what is inside.
//!
//! | bytes | field |
//! | --- | --- |
//! | 3 + 1 | `SL`, a letter for the kind of file, and its version |
//! | 4 | length of the body |
//! | n | body |
//! | 16 | BLAKE3 of all the above, cut |
//!
//! Integers are big-endian everywhere on disk.

/// Bytes of a check.
pub(crate) const CHECK_LEN: usize = 16;

/// Bytes around a body.
pub(crate) const ENVELOPE_LEN: usize = 8 + CHECK_LEN;

/// Why bytes from a disk are not what they should be.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum FormatError {
    /// Fewer bytes than the format has.
    #[error("cut short")]
    CutShort,
    /// Another kind of file, or another version.
    #[error("wrong magic or version")]
    Magic,
    /// The check does not match.
    #[error("checksum mismatch")]
    Check,
    /// The bytes say something impossible.
    #[error("impossible {0}")]
    Impossible(&'static str),
    /// The bytes belong to something else.
    #[error("it belongs to another {0}")]
    Misplaced(&'static str),
}

/// The check of some bytes.
pub(crate) fn check(parts: &[&[u8]]) -> [u8; CHECK_LEN] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut check = [0; CHECK_LEN];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..CHECK_LEN]);
    check
}

/// Puts a body into its envelope.
pub(crate) fn seal(magic: [u8; 4], body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + ENVELOPE_LEN);
    out.extend_from_slice(&magic);
    out.extend_from_slice(&(body.len() as u32).to_be_bytes());
    out.extend_from_slice(body);
    let check = check(&[&out]);
    out.extend_from_slice(&check);
    out
}

/// Takes a body out of its envelope.
pub(crate) fn unseal(magic: [u8; 4], bytes: &[u8]) -> Result<&[u8], FormatError> {
    let mut reader = Reader(bytes);
    if reader.array::<4>()? != magic {
        return Err(FormatError::Magic);
    }
    let len = reader.u32()? as usize;
    let body = reader.bytes(len)?;
    if reader.array::<CHECK_LEN>()? != check(&[&bytes[..8 + len]]) {
        return Err(FormatError::Check);
    }
    reader.end()?;
    Ok(body)
}

/// Reads fields one after the other.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(FormatError::CutShort)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(FormatError::CutShort)?;
        self.0 = rest;
        Ok(head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// Bytes with their length in front.
    pub(crate) fn block(&mut self) -> Result<&'a [u8], FormatError> {
        let len = self.u32()? as usize;
        self.bytes(len)
    }

    pub(crate) fn end(&self) -> Result<(), FormatError> {
        if self.0.is_empty() { Ok(()) } else { Err(FormatError::Impossible("trailing bytes")) }
    }
}

/// Writes bytes with their length in front.
pub(crate) fn push_block(out: &mut Vec<u8>, block: &[u8]) {
    out.extend_from_slice(&(block.len() as u32).to_be_bytes());
    out.extend_from_slice(block);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn envelopes_round_trip_and_any_flip_is_seen(body in proptest::collection::vec(any::<u8>(), 0..99),
                                                     at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut bytes = seal(*b"SLX\x01", &body);
            prop_assert_eq!(unseal(*b"SLX\x01", &bytes), Ok(&body[..]));
            prop_assert_eq!(unseal(*b"SLY\x01", &bytes), Err(FormatError::Magic));
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(unseal(*b"SLX\x01", &bytes).is_err());
            prop_assert!(unseal(*b"SLX\x01", &bytes[..at]).is_err());
        }
    }
}
