//! The volume's header: what says that a directory is a volume, and of which version. Written once, last of all
//! when a volume is made.
//!
//! Body in a [sealed] envelope `SLV`, whose version is the volume's: 16 random bytes that name the volume. Version 2
//! added the log; a volume of version 1 becomes one of version 2 when it is opened. Version 3 added what is kept of shares
//! other than [`Share::WHOLE`](sluice_engine::share::Share::WHOLE); a volume becomes one of version 3 before the first of that
//! is put into it, and stays readable by those who know version 2 until then.

use crate::sealed::{self, FormatError, Reader};

/// The newest format that this process reads and writes.
pub(crate) const VERSION: u8 = SHARES;

/// The format in which a volume is made: with a log.
pub(crate) const LOG: u8 = 2;

/// The format that may have something of shares.
pub(crate) const SHARES: u8 = 3;

const MAGIC: [u8; 3] = *b"SLV";

/// Names a volume, so that blocks of another volume are never taken for its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VolumeId(pub(crate) [u8; 16]);

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The volume.
    pub(crate) id: VolumeId,
    /// The version of its format.
    pub(crate) version: u8,
}

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
pub(crate) fn encode(header: Header) -> Vec<u8> {
    sealed::seal([MAGIC[0], MAGIC[1], MAGIC[2], header.version], &header.id.0)
}

/// Reads a header. The version is looked at before anything that a newer version may have changed.
pub(crate) fn decode(bytes: &[u8]) -> Result<Header, HeaderError> {
    let magic = Reader(bytes).array::<4>()?;
    if magic[..3] != MAGIC {
        return Err(FormatError::Magic.into());
    }
    let version = magic[3];
    if version > VERSION {
        return Err(HeaderError::Newer(version));
    }
    let mut body = Reader(sealed::unseal(magic, bytes)?);
    let id = VolumeId(body.array()?);
    body.end()?;
    Ok(Header { id, version })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: VolumeId = VolumeId([7; 16]);

    #[test]
    fn golden_bytes() {
        for (version, begins) in [(LOG, b"SLV\x02\0\0\0\x10"), (SHARES, b"SLV\x03\0\0\0\x10")] {
            let bytes = encode(Header { id: ID, version });
            assert_eq!(bytes[..8], *begins);
            assert_eq!(bytes.len(), 40);
            assert_eq!(decode(&bytes), Ok(Header { id: ID, version }));
        }
        let first = sealed::seal(*b"SLV\x01", &[7; 16]);
        assert_eq!(decode(&first), Ok(Header { id: ID, version: 1 }), "the first version is read");
    }

    #[test]
    fn newer_versions_and_other_files_are_told_apart() {
        let mut bytes = encode(Header { id: ID, version: VERSION });
        bytes[3] = 9;
        assert_eq!(decode(&bytes), Err(HeaderError::Newer(9)));
        assert_eq!(decode(b"hello"), Err(FormatError::Magic.into()));
        assert_eq!(decode(b""), Err(FormatError::CutShort.into()));
        bytes[3] = VERSION;
        bytes[9] ^= 1;
        assert_eq!(decode(&bytes), Err(FormatError::Check.into()));
    }
}
