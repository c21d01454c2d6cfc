//! What is known of a file beside the runs that came: small, and written as a whole with each change.
//!
//! Body in a [sealed](crate::sealed) envelope `SLS`:
//!
//! | bytes | field |
//! | --- | --- |
//! | 16 | file |
//! | 8 | version: the highest of a file's links counts |
//! | 8 | generation |
//! | 1 | bit 0: known, 1: dropped, 2: metadata record, 3: size was settled later, 4: assembled, 5: in lists |
//! | 8 + 4 | if known: tenant, life |
//! | 4 + n | if it has one: metadata record |
//! | 8 | if it was settled later: size |
//! | 8 + 32 + 8 + 33 | if assembled: size, root, chunks of a segment, and 1 + value of the only chunk or 33 zeros |
//! | 4, then 16 each | if assembled: ranges of its chunks that do not count: start and end |
//! | 4 + n | facts |
//! | 4, then 26 each | runs of which chunks do not count: start 8, level 1, digest of the values 16, bit i: chunk i |

use std::collections::BTreeMap;

use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{FileId, Generation, TenantId};
use sluice_engine::limits::MAX_CHUNKS;
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::ranges::Ranges;

use super::keys::Life;
use super::pieces::PieceName;
use crate::sealed::{self, FormatError, Reader, push_block};

const MAGIC: [u8; 4] = *b"SLS\x01";
const KNOWN: u8 = 1;
const DROPPED: u8 = 2;
const RECORD: u8 = 4;
const SIZED: u8 = 8;
const ASSEMBLED: u8 = 16;
const IN_LISTS: u8 = 32;

/// A whole file that was assembled: one object a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Assembled {
    /// Its shape.
    pub(crate) geometry: Geometry,
    /// Its root, which is in the keys of its objects.
    pub(crate) root: Root,
    /// Chunks in each object but the last.
    pub(crate) segment_chunks: u64,
    /// The value of the only chunk; of more chunks they lie in objects of their own.
    pub(crate) only: Option<ChainingValue>,
    /// Chunks that were found damaged and given up since.
    pub(crate) lost: Ranges,
}

impl Assembled {
    /// The chunks of a segment.
    pub(crate) fn segment(&self, segment: u64) -> std::ops::Range<u64> {
        let start = segment * self.segment_chunks;
        start..(start + self.segment_chunks).min(self.geometry.chunks())
    }

    /// How many segments it has: none if it is empty.
    pub(crate) fn segments(&self) -> u64 {
        self.geometry.chunks().div_ceil(self.segment_chunks)
    }
}

/// What is known of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FileState {
    /// Whose it is; `None` if nothing is known of it.
    pub(crate) tenant: Option<TenantId>,
    /// Which life of its chunks this is.
    pub(crate) life: Life,
    /// The metadata record.
    pub(crate) record: Option<MetadataRecord>,
    /// The size that was settled, where the record leaves it open.
    pub(crate) sized: Option<Geometry>,
    /// The engine's facts.
    pub(crate) facts: Vec<u8>,
    /// The file's own generation, to which the store's floor applies.
    pub(crate) generation: Generation,
    /// Whether it ended for good.
    pub(crate) dropped: bool,
    /// What was assembled of it.
    pub(crate) assembled: Option<Assembled>,
    /// Whether lists find it by its name, because it came whole or is whole elsewhere.
    pub(crate) in_lists: bool,
    /// Runs of which chunks do not count any more, though their objects may be there.
    pub(crate) void: BTreeMap<PieceName, u8>,
}

impl FileState {
    /// Whether the file has a summary.
    pub(crate) fn is_known(&self) -> bool {
        self.tenant.is_some()
    }

    /// The root under which all of it is here and published.
    pub(crate) fn published(&self) -> Option<&Assembled> {
        self.assembled.as_ref().filter(|assembled| assembled.lost.is_empty())
    }

    /// The shape that runs are checked against, once it is known.
    pub(crate) fn geometry(&self) -> Option<Geometry> {
        let settled = crate::shape(self.record.as_ref()).or(self.sized);
        settled.or(self.published().map(|whole| whole.geometry))
    }

    /// The generation, given the store's floor.
    pub(crate) fn generation(&self, floor: Generation) -> Generation {
        self.generation.max(floor).max(Generation::new(1))
    }

    /// Whether the assembled bytes count for this chunk.
    pub(crate) fn assembled_has(&self, chunk: u64) -> bool {
        self.assembled
            .as_ref()
            .is_some_and(|whole| chunk < whole.geometry.chunks() && !whole.lost.covers(chunk..chunk + 1))
    }
}

/// The bytes of version `version`.
pub(crate) fn encode(file: FileId, version: u64, state: &FileState) -> Vec<u8> {
    let mut body = Vec::with_capacity(256 + state.facts.len());
    body.extend_from_slice(file.as_bytes());
    body.extend_from_slice(&version.to_be_bytes());
    body.extend_from_slice(&state.generation.number().to_be_bytes());
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    body.push(
        flag(state.tenant.is_some(), KNOWN)
            | flag(state.dropped, DROPPED)
            | flag(state.record.is_some(), RECORD)
            | flag(state.sized.is_some(), SIZED)
            | flag(state.assembled.is_some(), ASSEMBLED)
            | flag(state.in_lists, IN_LISTS),
    );
    if let Some(tenant) = state.tenant {
        body.extend_from_slice(&tenant.number().to_be_bytes());
        body.extend_from_slice(&state.life.0.to_be_bytes());
    }
    if let Some(record) = &state.record {
        push_block(&mut body, &record.to_bytes());
    }
    if let Some(size) = state.sized {
        body.extend_from_slice(&size.size().to_be_bytes());
    }
    if let Some(whole) = &state.assembled {
        body.extend_from_slice(&whole.geometry.size().to_be_bytes());
        body.extend_from_slice(whole.root.as_bytes());
        body.extend_from_slice(&whole.segment_chunks.to_be_bytes());
        body.push(u8::from(whole.only.is_some()));
        body.extend_from_slice(whole.only.map_or([0; 32], |value| *value.as_bytes()).as_slice());
        body.extend_from_slice(&(whole.lost.iter().count() as u32).to_be_bytes());
        for range in whole.lost.iter() {
            body.extend_from_slice(&range.start.to_be_bytes());
            body.extend_from_slice(&range.end.to_be_bytes());
        }
    }
    push_block(&mut body, &state.facts);
    body.extend_from_slice(&(state.void.len() as u32).to_be_bytes());
    for (name, chunks) in &state.void {
        body.extend_from_slice(&name.start.to_be_bytes());
        body.push(name.level);
        body.extend_from_slice(&name.digest);
        body.push(*chunks);
    }
    sealed::seal(MAGIC, &body)
}

/// Reads a link of the file's chain: its version, and what it says.
pub(crate) fn decode(file: FileId, bytes: &[u8]) -> Result<(u64, FileState), FormatError> {
    let mut body = Reader(sealed::unseal(MAGIC, bytes)?);
    if body.array()? != *file.as_bytes() {
        return Err(FormatError::Misplaced("file"));
    }
    let version = body.u64()?;
    let mut state = FileState { generation: Generation::new(body.u64()?), ..FileState::default() };
    let flags = body.u8()?;
    let geometry = |size: u64| Geometry::new(size).map_err(|_| FormatError::Impossible("size"));
    state.dropped = flags & DROPPED != 0;
    state.in_lists = flags & IN_LISTS != 0;
    if flags & KNOWN != 0 {
        state.tenant = Some(TenantId::new(body.u64()?));
        state.life = Life(body.u32()?);
    }
    if flags & RECORD != 0 {
        let record = MetadataRecord::from_bytes(body.block()?);
        let record = record.map_err(|_| FormatError::Impossible("metadata record"))?;
        if record.file_id() != file {
            return Err(FormatError::Misplaced("file"));
        }
        state.record = Some(record);
    }
    if flags & SIZED != 0 {
        state.sized = Some(geometry(body.u64()?)?);
    }
    if flags & ASSEMBLED != 0 {
        let (shape, root) = (geometry(body.u64()?)?, Root::from_bytes(body.array()?));
        let segment_chunks = body.u64()?;
        if segment_chunks == 0 || segment_chunks > MAX_CHUNKS {
            return Err(FormatError::Impossible("length of a segment"));
        }
        let (has_value, value) = (body.u8()? != 0, ChainingValue::from_bytes(body.array()?));
        let mut lost = Ranges::new();
        for _ in 0..body.u32()? {
            let (start, end) = (body.u64()?, body.u64()?);
            if start >= end || end > shape.chunks() {
                return Err(FormatError::Impossible("range of chunks"));
            }
            lost.insert(start..end);
        }
        let only = has_value.then_some(value);
        state.assembled = Some(Assembled { geometry: shape, root, segment_chunks, only, lost });
    }
    state.facts = body.block()?.to_vec();
    for _ in 0..body.u32()? {
        let (start, level, digest) = (body.u64()?, body.u8()?, body.array()?);
        state.void.insert(PieceName { start, level, digest }, body.u8()?);
    }
    body.end()?;
    Ok((version, state))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sluice_engine::ids::ClientFileId;
    use sluice_engine::metadata::MetadataFields;

    fn record(size: Option<u64>) -> MetadataRecord {
        let client: ClientFileId = "0193e4a0-7b1c-7def-8123-456789abcdef".parse().unwrap();
        MetadataRecord::new(TenantId::new(7), client, MetadataFields { size, ..Default::default() }).unwrap()
    }

    #[test]
    fn golden_bytes() {
        let file = FileId::from_bytes([0xAB; 16]);
        let mut state = FileState {
            tenant: Some(TenantId::new(9)),
            life: Life(4),
            facts: b"facts".to_vec(),
            generation: Generation::new(2),
            ..FileState::default()
        };
        state.void.insert(PieceName { start: 8, level: 3, digest: [0xCD; 16] }, 5);
        let bytes = encode(file, 3, &state);
        let mut expected = b"SLS\x01\0\0\0\x54".to_vec();
        expected.extend_from_slice(&[0xAB; 16]);
        expected.extend_from_slice(b"\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0\0\x09\0\0\0\x04");
        expected.extend_from_slice(b"\0\0\0\x05facts\0\0\0\x01\0\0\0\0\0\0\0\x08\x03");
        expected.extend_from_slice(&[0xCD; 16]);
        expected.push(5);
        assert_eq!(bytes[..expected.len()], expected);
        assert_eq!(decode(file, &bytes), Ok((3, state)));
        assert_eq!(decode(FileId::NIL, &bytes), Err(FormatError::Misplaced("file")));
    }

    proptest! {
        #[test]
        fn round_trips(version: u64, generation: u64, known: bool, dropped: bool, in_lists: bool, settled: bool,
                       with_record: bool, facts: Vec<u8>, size in 1..1u64 << 40,
                       root in prop::option::of(any::<[u8; 32]>()), only in prop::option::of(any::<[u8; 32]>()),
                       segment_chunks in 1..MAX_CHUNKS,
                       void in prop::collection::btree_map((0..1u64 << 30, 0..4u8, any::<[u8; 16]>()), any::<u8>(), 0..9)) {
            let geometry = Geometry::new(size).unwrap();
            let mut lost = Ranges::new();
            lost.insert(0..geometry.chunks().min(2));
            let state = FileState {
                tenant: known.then_some(TenantId::new(generation)),
                life: Life(if known { generation as u32 } else { 0 }),
                record: with_record.then(|| record((!settled).then_some(size))),
                sized: settled.then_some(geometry),
                facts,
                generation: Generation::new(generation),
                dropped,
                assembled: root.map(|root| Assembled {
                    geometry, root: Root::from_bytes(root), segment_chunks,
                    only: only.map(ChainingValue::from_bytes), lost,
                }),
                in_lists,
                void: void.into_iter().map(|((start, level, digest), chunks)| (PieceName { start, level, digest }, chunks)).collect(),
            };
            let file = record(None).file_id();
            let bytes = encode(file, version, &state);
            prop_assert_eq!(decode(file, &bytes), Ok((version, state)));
        }
    }
}
