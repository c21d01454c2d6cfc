//! A frame around records that are written with one call and believed together: what the journal and the log are made
//! of. A frame starts on a block boundary, and so never shares a sector with one that was acknowledged.
//!
//! | bytes | field |
//! | --- | --- |
//! | 3 + 1 | what the file is, and its version |
//! | 8 | number of the file |
//! | 8 | sequence number |
//! | 4 | number of records |
//! | 4 | length of the records |
//! | 16 | check of the volume's id, the fields above, and the records |
//! | n | the records |

use super::volume::VolumeId;
use crate::sealed::{CHECK_LEN, FormatError, Reader, check};

/// Where frames may start.
pub(crate) const BLOCK: usize = 4096;

/// What a sound frame of another file is: left from before a file was begun anew.
pub(crate) const ELSEWHERE: FormatError = FormatError::Misplaced("file of frames");

/// Bytes in front of the records of a frame.
pub(crate) const HEADER_LEN: usize = 28 + CHECK_LEN;

/// The bytes that a frame around `payload` takes, up to the next block boundary.
pub(crate) const fn len(payload: usize) -> usize {
    (HEADER_LEN + payload).next_multiple_of(BLOCK)
}

/// The bytes of a frame, up to the next block boundary.
pub(crate) fn encode(
    magic: [u8; 4],
    volume: VolumeId,
    number: u64,
    seq: u64,
    records: u32,
    payload: &[u8],
) -> Vec<u8> {
    let mut out = Vec::with_capacity(len(payload.len()));
    out.extend_from_slice(&magic);
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&seq.to_be_bytes());
    out.extend_from_slice(&records.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    let check = check(&[&volume.0, &out, payload]);
    out.extend_from_slice(&check);
    out.extend_from_slice(payload);
    out.resize(len(payload.len()), 0);
    out
}

/// What a frame says, and its records' bytes.
pub(crate) struct Framed<'a> {
    pub(crate) seq: u64,
    pub(crate) records: u32,
    pub(crate) payload: &'a [u8],
}

/// The front of a frame, as far as it can be read before the records: sequence number, number and length of them.
struct Front {
    seq: u64,
    records: u32,
    len: usize,
}

fn front(magic: [u8; 4], number: u64, reader: &mut Reader<'_>) -> Result<Front, FormatError> {
    if reader.array::<4>()? != magic {
        return Err(FormatError::Magic);
    }
    if reader.u64()? != number {
        return Err(ELSEWHERE);
    }
    Ok(Front { seq: reader.u64()?, records: reader.u32()?, len: reader.u32()? as usize })
}

/// The length of the records of what may be a frame, from its first [`HEADER_LEN`] bytes; nothing is checked but that
/// it is of this kind, and of this file.
pub(crate) fn payload_len(magic: [u8; 4], number: u64, header: &[u8]) -> Result<usize, FormatError> {
    front(magic, number, &mut Reader(header)).map(|front| front.len)
}

/// Reads a frame of file `number`.
pub(crate) fn decode(
    magic: [u8; 4],
    volume: VolumeId,
    number: u64,
    bytes: &[u8],
) -> Result<Framed<'_>, FormatError> {
    let mut reader = Reader(bytes);
    let Front { seq, records, len } = front(magic, number, &mut reader)?;
    let expected = reader.array::<CHECK_LEN>()?;
    let payload = reader.bytes(len)?;
    if check(&[&volume.0, &bytes[..HEADER_LEN - CHECK_LEN], payload]) != expected {
        return Err(FormatError::Check);
    }
    Ok(Framed { seq, records, payload })
}
