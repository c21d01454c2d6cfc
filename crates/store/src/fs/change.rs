//! What a journal says: changes, as absolute facts about one file or the volume. Applying a run of changes again to
//! a state that has seen them already gives that state again.
//!
//! | bytes | field |
//! | --- | --- |
//! | 1 | kind |
//! | 16 | file; nil for kinds 9, 10, 12 and 13 |
//! | n | by kind |
//!
//! | kind | fields |
//! | --- | --- |
//! | 1 metadata | generation 8, record 4 + n |
//! | 2 run | tenant 8, number of chunks 4, per chunk: index 8, length 4, value 32 |
//! | 3 facts | 4 + n |
//! | 4 lost | generation 8, number of chunks 4, per chunk: index 8 |
//! | 5 published | size 8, root 32 |
//! | 6 freed | generation 8 |
//! | 7 dropped | tenant 8, facts 4 + n |
//! | 8 discarded | – |
//! | 9 floor of all files | generation 8 |
//! | 10 state of [`Share::WHOLE`] | 4 + n |
//! | 11 sized | generation 8, size 8 |
//! | 12 floor of another share | [share](crate::share) 2, generation 8 |
//! | 13 state of another share | share 2, 4 + n |
//!
//! Kinds 12 and 13 are in volumes of version 3 only.

use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{FileId, Generation, TenantId};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;

use crate::sealed::{FormatError, Reader, push_block};
use crate::share;

/// A chunk that is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Which.
    pub(crate) index: ChunkIndex,
    /// Its length in bytes: 1 to 1 MiB.
    pub(crate) len: u32,
    /// Its value.
    pub(crate) value: ChainingValue,
}

/// A change to one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Its metadata record came; what the record proves impossible goes.
    Metadata { generation: Generation, record: Box<MetadataRecord> },
    /// Its size, which the record left open, is settled; what the size proves impossible goes.
    Sized { generation: Generation, geometry: Geometry },
    /// Chunks are durable.
    Run { tenant: TenantId, chunks: Vec<Chunk> },
    /// Its facts were replaced.
    Facts(Vec<u8>),
    /// Chunks were found damaged.
    Lost { generation: Generation, chunks: Vec<ChunkIndex> },
    /// It was published as a whole.
    Published(Published),
    /// Its chunks were freed.
    Freed { generation: Generation },
    /// It ended for good.
    Dropped { tenant: TenantId, facts: Vec<u8> },
    /// It never was.
    Discarded,
}

/// The whole under which a file was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Published {
    /// Its shape.
    pub(crate) geometry: Geometry,
    /// Its root.
    pub(crate) root: Root,
}

/// A change to the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VolumeChange {
    /// Files of a share have this generation at least.
    Floor(Share, Generation),
    /// The state of a share was replaced.
    State(Share, Vec<u8>),
}

impl VolumeChange {
    /// The share that it is about.
    pub(crate) fn share(&self) -> Share {
        match self {
            Self::Floor(share, _) | Self::State(share, _) => *share,
        }
    }
}

/// One record of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// About a file.
    File(FileId, Change),
    /// About the volume.
    Volume(VolumeChange),
}

impl Record {
    /// Appends the record's bytes.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let (kind, file) = match self {
            Self::File(file, change) => (change.kind(), *file),
            Self::Volume(VolumeChange::Floor(Share::WHOLE, _)) => (9, FileId::NIL),
            Self::Volume(VolumeChange::State(Share::WHOLE, _)) => (10, FileId::NIL),
            Self::Volume(VolumeChange::Floor(..)) => (12, FileId::NIL),
            Self::Volume(VolumeChange::State(..)) => (13, FileId::NIL),
        };
        out.push(kind);
        out.extend_from_slice(file.as_bytes());
        match self {
            Self::File(_, change) => change.encode(out),
            Self::Volume(VolumeChange::Floor(share, floor)) => {
                push_part(out, *share);
                push_generation(out, *floor);
            }
            Self::Volume(VolumeChange::State(share, state)) => {
                push_part(out, *share);
                push_block(out, state);
            }
        }
    }

    /// Reads one record.
    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let kind = reader.u8()?;
        let file = FileId::from_bytes(reader.array()?);
        let change = match kind {
            1 => {
                let generation = generation(reader)?;
                let record = MetadataRecord::from_bytes(reader.block()?)
                    .map_err(|_| FormatError::Impossible("metadata record"))?;
                if record.file_id() != file {
                    return Err(FormatError::Misplaced("file"));
                }
                Change::Metadata { generation, record: Box::new(record) }
            }
            2 => {
                let tenant = TenantId::new(reader.u64()?);
                let count = reader.u32()?;
                let mut chunks = Vec::new();
                for _ in 0..count {
                    let (index, len) = (index(reader)?, reader.u32()?);
                    if len == 0 || u64::from(len) > CHUNK_LEN {
                        return Err(FormatError::Impossible("chunk length"));
                    }
                    chunks.push(Chunk { index, len, value: ChainingValue::from_bytes(reader.array()?) });
                }
                Change::Run { tenant, chunks }
            }
            3 => Change::Facts(reader.block()?.to_vec()),
            4 => {
                let generation = generation(reader)?;
                let count = reader.u32()?;
                let chunks = (0..count).map(|_| index(reader)).collect::<Result<_, _>>()?;
                Change::Lost { generation, chunks }
            }
            5 => {
                let geometry = Geometry::new(reader.u64()?).map_err(|_| FormatError::Impossible("size"))?;
                Change::Published(Published { geometry, root: Root::from_bytes(reader.array()?) })
            }
            6 => Change::Freed { generation: generation(reader)? },
            7 => Change::Dropped { tenant: TenantId::new(reader.u64()?), facts: reader.block()?.to_vec() },
            8 => Change::Discarded,
            9 => return Ok(Self::Volume(VolumeChange::Floor(Share::WHOLE, generation(reader)?))),
            10 => {
                return Ok(Self::Volume(VolumeChange::State(Share::WHOLE, reader.block()?.to_vec())));
            }
            11 => {
                let generation = generation(reader)?;
                let geometry = Geometry::new(reader.u64()?).map_err(|_| FormatError::Impossible("size"))?;
                Change::Sized { generation, geometry }
            }
            12 => {
                let share = share::read_part(reader)?;
                return Ok(Self::Volume(VolumeChange::Floor(share, generation(reader)?)));
            }
            13 => {
                let share = share::read_part(reader)?;
                return Ok(Self::Volume(VolumeChange::State(share, share::read_state(reader)?)));
            }
            _ => return Err(FormatError::Impossible("kind of record")),
        };
        Ok(Self::File(file, change))
    }
}

impl Change {
    fn kind(&self) -> u8 {
        match self {
            Self::Metadata { .. } => 1,
            Self::Run { .. } => 2,
            Self::Facts(_) => 3,
            Self::Lost { .. } => 4,
            Self::Published(_) => 5,
            Self::Freed { .. } => 6,
            Self::Dropped { .. } => 7,
            Self::Discarded => 8,
            Self::Sized { .. } => 11,
        }
    }

    /// Whether the file's chunks go as a whole.
    pub(crate) fn removes_chunks(&self) -> bool {
        match self {
            Self::Freed { .. } | Self::Dropped { .. } | Self::Discarded => true,
            Self::Metadata { .. }
            | Self::Sized { .. }
            | Self::Run { .. }
            | Self::Facts(_)
            | Self::Lost { .. }
            | Self::Published(_) => false,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Metadata { generation, record } => {
                push_generation(out, *generation);
                push_block(out, &record.to_bytes());
            }
            Self::Sized { generation, geometry } => {
                push_generation(out, *generation);
                out.extend_from_slice(&geometry.size().to_be_bytes());
            }
            Self::Run { tenant, chunks } => {
                out.extend_from_slice(&tenant.number().to_be_bytes());
                out.extend_from_slice(&(chunks.len() as u32).to_be_bytes());
                for chunk in chunks {
                    out.extend_from_slice(&chunk.index.number().to_be_bytes());
                    out.extend_from_slice(&chunk.len.to_be_bytes());
                    out.extend_from_slice(chunk.value.as_bytes());
                }
            }
            Self::Facts(facts) => push_block(out, facts),
            Self::Lost { generation, chunks } => {
                push_generation(out, *generation);
                out.extend_from_slice(&(chunks.len() as u32).to_be_bytes());
                for index in chunks {
                    out.extend_from_slice(&index.number().to_be_bytes());
                }
            }
            Self::Published(Published { geometry, root }) => {
                out.extend_from_slice(&geometry.size().to_be_bytes());
                out.extend_from_slice(root.as_bytes());
            }
            Self::Freed { generation } => push_generation(out, *generation),
            Self::Dropped { tenant, facts } => {
                out.extend_from_slice(&tenant.number().to_be_bytes());
                push_block(out, facts);
            }
            Self::Discarded => {}
        }
    }
}

fn push_part(out: &mut Vec<u8>, share: Share) {
    if share != Share::WHOLE {
        share::push(out, share);
    }
}

fn push_generation(out: &mut Vec<u8>, generation: Generation) {
    out.extend_from_slice(&generation.number().to_be_bytes());
}

fn generation(reader: &mut Reader<'_>) -> Result<Generation, FormatError> {
    Ok(Generation::new(reader.u64()?))
}

fn index(reader: &mut Reader<'_>) -> Result<ChunkIndex, FormatError> {
    ChunkIndex::new(reader.u64()?).map_err(|_| FormatError::Impossible("chunk index"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use sluice_engine::ids::ClientFileId;
    use sluice_engine::metadata::MetadataFields;

    pub(crate) fn record(size: Option<u64>) -> MetadataRecord {
        let client: ClientFileId = "0193e4a0-7b1c-7def-8123-456789abcdef".parse().unwrap();
        MetadataRecord::new(TenantId::new(7), client, MetadataFields { size, ..Default::default() }).unwrap()
    }

    fn index_strategy() -> impl Strategy<Value = ChunkIndex> {
        (0..sluice_engine::limits::MAX_CHUNKS).prop_map(|i| ChunkIndex::new(i).unwrap())
    }

    fn change() -> impl Strategy<Value = Change> {
        let generation = any::<u64>().prop_map(Generation::new);
        let tenant = any::<u64>().prop_map(TenantId::new);
        let chunk = (index_strategy(), 1..=CHUNK_LEN as u32, any::<[u8; 32]>())
            .prop_map(|(index, len, value)| Chunk { index, len, value: ChainingValue::from_bytes(value) });
        prop_oneof![
            (tenant, prop::collection::vec(chunk, 0..9))
                .prop_map(|(tenant, chunks)| Change::Run { tenant, chunks }),
            any::<Vec<u8>>().prop_map(Change::Facts),
            (generation, prop::collection::vec(index_strategy(), 0..9))
                .prop_map(|(generation, chunks)| Change::Lost { generation, chunks }),
            (0..=sluice_engine::limits::MAX_FILE_LEN, any::<[u8; 32]>()).prop_map(|(size, root)| {
                Change::Published(Published {
                    geometry: Geometry::new(size).unwrap(),
                    root: Root::from_bytes(root),
                })
            }),
            (any::<u64>(), 0..=sluice_engine::limits::MAX_FILE_LEN).prop_map(|(g, size)| Change::Sized {
                generation: Generation::new(g),
                geometry: Geometry::new(size).unwrap(),
            }),
            any::<u64>().prop_map(|g| Change::Freed { generation: Generation::new(g) }),
            (any::<u64>(), any::<Vec<u8>>())
                .prop_map(|(t, facts)| Change::Dropped { tenant: TenantId::new(t), facts }),
            Just(Change::Discarded),
        ]
    }

    fn round_trip(record: &Record) {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        let mut reader = Reader(&bytes);
        assert_eq!(Record::decode(&mut reader).as_ref(), Ok(record));
        assert_eq!(reader.end(), Ok(()));
        for cut in 0..bytes.len() {
            assert!(Record::decode(&mut Reader(&bytes[..cut])).is_err());
        }
    }

    #[test]
    fn golden_bytes() {
        let file = FileId::from_bytes([0xAB; 16]);
        let value = ChainingValue::from_bytes([0xCD; 32]);
        let chunks = vec![Chunk { index: ChunkIndex::new(3).unwrap(), len: 5, value }];
        let record = Record::File(file, Change::Run { tenant: TenantId::new(9), chunks });
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        let mut expected = vec![2];
        expected.extend_from_slice(&[0xAB; 16]);
        expected.extend_from_slice(b"\0\0\0\0\0\0\0\x09\0\0\0\x01\0\0\0\0\0\0\0\x03\0\0\0\x05");
        expected.extend_from_slice(&[0xCD; 32]);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn metadata_and_volume_records_round_trip() {
        let metadata = record(Some(77));
        let generation = Generation::new(2);
        round_trip(&Record::File(
            metadata.file_id(),
            Change::Metadata { generation, record: Box::new(metadata) },
        ));
        for share in [Share::WHOLE, Share::new(1, 2).unwrap(), Share::new(255, 256).unwrap()] {
            round_trip(&Record::Volume(VolumeChange::Floor(share, generation)));
            round_trip(&Record::Volume(VolumeChange::State(share, b"state".to_vec())));
        }
    }

    #[test]
    fn golden_bytes_of_the_volume() {
        let bytes = |change| {
            let mut bytes = Vec::new();
            Record::Volume(change).encode(&mut bytes);
            assert_eq!(bytes[1..17], [0; 16]);
            (bytes[0], bytes[17..].to_vec())
        };
        let (generation, part) = (Generation::new(7), Share::new(3, 16).unwrap());
        let whole = bytes(VolumeChange::Floor(Share::WHOLE, generation));
        assert_eq!(whole, (9, b"\0\0\0\0\0\0\0\x07".to_vec()));
        assert_eq!(bytes(VolumeChange::State(Share::WHOLE, b"st".to_vec())), (10, b"\0\0\0\x02st".to_vec()));
        let floor = bytes(VolumeChange::Floor(part, generation));
        assert_eq!(floor, (12, b"\x04\x03\0\0\0\0\0\0\0\x07".to_vec()));
        let state = bytes(VolumeChange::State(part, b"st".to_vec()));
        assert_eq!(state, (13, b"\x04\x03\0\0\0\x02st".to_vec()));
        let mut whole = vec![12];
        whole.extend_from_slice(&[0; 16 + 2 + 8]);
        assert_eq!(Record::decode(&mut Reader(&whole)), Err(FormatError::Impossible("share")));
    }

    #[test]
    fn a_metadata_record_under_another_file_is_refused() {
        let generation = Generation::new(2);
        let change = Change::Metadata { generation, record: Box::new(record(None)) };
        let mut bytes = Vec::new();
        Record::File(FileId::from_bytes([1; 16]), change).encode(&mut bytes);
        assert_eq!(Record::decode(&mut Reader(&bytes)), Err(FormatError::Misplaced("file")));
    }

    proptest! {
        #[test]
        fn round_trips(file: [u8; 16], change in change()) {
            round_trip(&Record::File(FileId::from_bytes(file), change));
        }
    }
}
