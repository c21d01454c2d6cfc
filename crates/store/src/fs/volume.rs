//! The volume's header: what says that a directory is a volume, and of which version. Written once, last of all
//! when a volume is made.
//!
//! Body in a [sealed] envelope `SLV`, whose version is the volume's: 16 random bytes that name the volume. Version 2
//! added the log; a volume of version 1 becomes one of version 2 when it is opened.

use crate::sealed::{self, FormatError, Reader};

/// The newest format that this process reads and writes.
pub(crate) const VERSION: u8 = 2;

const MAGIC: [u8; 3] = *b"SLV";

/// Names a volume, so that blocks of another volume are never taken for its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VolumeId(pub(crate) [u8; 16]);

/// Why a header cannot be used.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// A newer process wrote it.
    #[error("version {0}")]
    Newer(u8),
    /// It is damaged, or no header.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// The header's bytes.
pub(crate) fn encode(id: VolumeId) -> Vec<u8> {
    sealed::seal([MAGIC[0], MAGIC[1], MAGIC[2], VERSION], &id.0)
}

/// Reads a header. The version is looked at before anything that a newer version may have changed.
pub(crate) fn decode(bytes: &[u8]) -> Result<VolumeId, HeaderError> {
    let magic = Reader(bytes).array::<4>()?;
    if magic[..3] != MAGIC {
        return Err(FormatError::Magic.into());
    }
    if magic[3] > VERSION {
        return Err(HeaderError::Newer(magic[3]));
    }
    let mut body = Reader(sealed::unseal(magic, bytes)?);
    let id = VolumeId(body.array()?);
    body.end()?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let bytes = encode(VolumeId([7; 16]));
        assert_eq!(bytes[..8], *b"SLV\x02\0\0\0\x10");
        assert_eq!(bytes.len(), 40);
        assert_eq!(decode(&bytes), Ok(VolumeId([7; 16])));
        let first = sealed::seal(*b"SLV\x01", &[7; 16]);
        assert_eq!(decode(&first), Ok(VolumeId([7; 16])), "the first version is read");
    }

    #[test]
    fn newer_versions_and_other_files_are_told_apart() {
        let mut bytes = encode(VolumeId([7; 16]));
        bytes[3] = 9;
        assert_eq!(decode(&bytes), Err(HeaderError::Newer(9)));
        assert_eq!(decode(b"hello"), Err(FormatError::Magic.into()));
        assert_eq!(decode(b""), Err(FormatError::CutShort.into()));
        bytes[3] = VERSION;
        bytes[9] ^= 1;
        assert_eq!(decode(&bytes), Err(FormatError::Check.into()));
    }
}
