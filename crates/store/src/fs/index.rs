//! The index of one file: everything the store knows of it but its chunk values. Replaced as a whole.
//!
//! Body in a [sealed] envelope `SLI`:
//!
//! | bytes | field |
//! | --- | --- |
//! | 16 | file |
//! | 8 | the batch up to which all changes are in here |
//! | 8 | tenant |
//! | 8 | generation |
//! | 1 | bit 0: dropped, bit 1: published, bit 2: has a metadata record, bit 3: its size was settled later |
//! | 8 + 32 | if published: size and root |
//! | 8 | if it was settled later: size |
//! | 4 + n | if it has one: metadata record |
//! | 4 + n | facts |
//! | 8 | bytes held |
//! | 8, then 16 each | ranges of chunks held: start and end |
//! | 8, then 12 each | chunks held that are not full: index and length |

use sluice_engine::geometry::Geometry;
use sluice_engine::hash::Root;
use sluice_engine::ids::{FileId, Generation, TenantId};
use sluice_engine::limits::MAX_CHUNKS;
use sluice_engine::metadata::MetadataRecord;

use super::change::Published;
use super::state::FileState;
use crate::sealed::{self, FormatError, Reader, push_block};

const MAGIC: [u8; 4] = *b"SLI\x01";
const DROPPED: u8 = 1;
const PUBLISHED: u8 = 2;
const RECORD: u8 = 4;
const SIZED: u8 = 8;

/// The bytes of the index of a known file; `None` if nothing is known of it.
pub(crate) fn encode(file: FileId, state: &FileState) -> Option<Vec<u8>> {
    let mut body = Vec::with_capacity(256);
    body.extend_from_slice(file.as_bytes());
    body.extend_from_slice(&state.applied.to_be_bytes());
    body.extend_from_slice(&state.tenant?.number().to_be_bytes());
    body.extend_from_slice(&state.generation.number().to_be_bytes());
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    body.push(
        flag(state.dropped, DROPPED)
            | flag(state.published.is_some(), PUBLISHED)
            | flag(state.record.is_some(), RECORD)
            | flag(state.sized.is_some(), SIZED),
    );
    if let Some(Published { geometry, root }) = &state.published {
        body.extend_from_slice(&geometry.size().to_be_bytes());
        body.extend_from_slice(root.as_bytes());
    }
    if let Some(geometry) = state.sized {
        body.extend_from_slice(&geometry.size().to_be_bytes());
    }
    if let Some(record) = &state.record {
        push_block(&mut body, &record.to_bytes());
    }
    push_block(&mut body, &state.facts);
    body.extend_from_slice(&state.held_bytes.to_be_bytes());
    body.extend_from_slice(&(state.held.iter().count() as u64).to_be_bytes());
    for range in state.held.iter() {
        body.extend_from_slice(&range.start.to_be_bytes());
        body.extend_from_slice(&range.end.to_be_bytes());
    }
    body.extend_from_slice(&(state.short.len() as u64).to_be_bytes());
    for (chunk, len) in &state.short {
        body.extend_from_slice(&chunk.to_be_bytes());
        body.extend_from_slice(&len.to_be_bytes());
    }
    Some(sealed::seal(MAGIC, &body))
}

/// Reads an index.
pub(crate) fn decode(file: FileId, bytes: &[u8]) -> Result<FileState, FormatError> {
    let mut body = Reader(sealed::unseal(MAGIC, bytes)?);
    if body.array()? != *file.as_bytes() {
        return Err(FormatError::Misplaced("file"));
    }
    let mut state = FileState { applied: body.u64()?, ..FileState::default() };
    state.tenant = Some(TenantId::new(body.u64()?));
    state.generation = Generation::new(body.u64()?);
    let flags = body.u8()?;
    state.dropped = flags & DROPPED != 0;
    if flags & PUBLISHED != 0 {
        let geometry = Geometry::new(body.u64()?).map_err(|_| FormatError::Impossible("size"))?;
        state.published = Some(Published { geometry, root: Root::from_bytes(body.array()?) });
    }
    if flags & SIZED != 0 {
        let geometry = Geometry::new(body.u64()?).map_err(|_| FormatError::Impossible("size"))?;
        state.sized = Some(geometry);
    }
    if flags & RECORD != 0 {
        let record = MetadataRecord::from_bytes(body.block()?);
        state.record = Some(record.map_err(|_| FormatError::Impossible("metadata record"))?);
    }
    state.facts = body.block()?.to_vec();
    state.held_bytes = body.u64()?;
    for _ in 0..body.u64()? {
        let (start, end) = (body.u64()?, body.u64()?);
        if start >= end || end > MAX_CHUNKS {
            return Err(FormatError::Impossible("range of chunks"));
        }
        state.held.insert(start..end);
    }
    for _ in 0..body.u64()? {
        let (chunk, len) = (body.u64()?, body.u32()?);
        state.short.insert(chunk, len);
    }
    body.end()?;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::change::tests::record;
    use proptest::prelude::*;

    const FILE: FileId = FileId::from_bytes([1; 16]);

    #[test]
    fn golden_bytes() {
        let mut state = FileState { tenant: Some(TenantId::new(2)), applied: 3, ..Default::default() };
        state.held.insert(4..6);
        state.short.insert(5, 7);
        let bytes = encode(FILE, &state).unwrap();
        assert_eq!(bytes[..8], *b"SLI\x01\0\0\0\x61");
        assert_eq!(bytes[24..40], *b"\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x02");
        assert_eq!(
            bytes[69..101],
            *b"\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x05"
        );
        assert_eq!(encode(FILE, &FileState::default()), None);
    }

    proptest! {
        #[test]
        fn round_trips(applied: u64, tenant: u64, generation: u64, facts: Vec<u8>, dropped: bool, held_bytes: u64,
                       root in prop::option::of(any::<[u8; 32]>()), size in 0..1u64 << 40, with_record: bool,
                       settled: bool,
                       ranges in prop::collection::vec((0..1u64 << 30, 1..99u64), 0..9),
                       short in prop::collection::btree_map(0..1u64 << 30, 1..1u32 << 20, 0..9)) {
            let geometry = Geometry::new(size).unwrap();
            let mut state = FileState {
                tenant: Some(TenantId::new(tenant)),
                record: with_record.then(|| record((!settled).then_some(size))),
                sized: settled.then_some(geometry),
                facts, dropped, held_bytes, applied, short,
                generation: Generation::new(generation),
                published: root.map(|root| Published { geometry, root: Root::from_bytes(root) }),
                ..Default::default()
            };
            for (start, len) in ranges {
                state.held.insert(start..start + len);
            }
            let bytes = encode(FILE, &state).unwrap();
            prop_assert_eq!(decode(FILE, &bytes), Ok(state));
            prop_assert_eq!(decode(FileId::from_bytes([2; 16]), &bytes), Err(FormatError::Misplaced("file")));
        }
    }
}
