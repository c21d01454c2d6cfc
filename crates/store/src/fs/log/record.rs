//! A record of the log: all that is known of one file. The newest of a file counts, and each describes itself.
//!
//! | bytes | field |
//! | --- | --- |
//! | 3 + 1 | `SLW`, version 1 |
//! | 1 | kind: 1 whole, 2 known, 3 dropped |
//! | 16 | file |
//! | 8 | tenant |
//! | 8 | generation |
//! | 32 | root of the bytes; zero unless whole |
//! | 32 | value of the only chunk; zero unless whole and not empty |
//! | 4 | length of the name: a metadata record, or the client's UUID of a dropped file where it is known |
//! | 4 | length of the facts |
//! | 4 | length of the bytes; 0 unless whole |
//! | 16 | check of the volume's id, all the above, name and facts |
//! | n | name |
//! | n | facts |
//! | n | bytes, which the root checks |

use bytes::Bytes;
use sluice_engine::aggregator::Brief;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, FileId, Generation, TenantId};
use sluice_engine::limits::{CHUNK_LEN, MAX_RECORD_LEN};
use sluice_engine::metadata::MetadataRecord;
use uuid::Uuid;

use crate::MAX_FACTS_LEN;
use crate::fs::volume::VolumeId;
use crate::sealed::{CHECK_LEN, FormatError, Reader, check};
use crate::whole::{Seal, Whole};

const MAGIC: [u8; 4] = *b"SLW\x01";

/// Where every record begins, for whoever looks for them in damaged bytes.
pub(crate) const START: [u8; 4] = MAGIC;

/// Bytes in front of the name.
pub(crate) const HEAD_LEN: usize = 113 + CHECK_LEN;

/// The longest that a record can be without its bytes.
pub(crate) const MAX_FRONT_LEN: usize = HEAD_LEN + MAX_RECORD_LEN + MAX_FACTS_LEN;

/// All that is known of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogRecord {
    pub(crate) file: FileId,
    pub(crate) tenant: TenantId,
    pub(crate) generation: Generation,
    pub(crate) facts: Vec<u8>,
    pub(crate) body: Body,
}

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// All of it is here.
    Whole { record: MetadataRecord, whole: Whole },
    /// Its bytes are elsewhere.
    Known { record: MetadataRecord },
    /// It ended for good; what its client called it, where that is known.
    Dropped { client: Option<ClientFileId> },
}

/// A record without its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Front {
    pub(crate) file: FileId,
    pub(crate) tenant: TenantId,
    pub(crate) generation: Generation,
    pub(crate) facts: Vec<u8>,
    /// `None` if the file was dropped.
    pub(crate) record: Option<MetadataRecord>,
    /// What the client called the file, where that is known.
    pub(crate) client: Option<ClientFileId>,
    /// What the bytes hash to, if they are here.
    pub(crate) seal: Option<Seal>,
    /// Bytes of the record before the file's.
    pub(crate) front_len: u32,
}

impl Front {
    /// Whether the file ended for good.
    pub(crate) fn is_dropped(&self) -> bool {
        self.record.is_none()
    }

    /// Bytes of the whole record.
    pub(crate) fn len(&self) -> u32 {
        self.front_len + self.seal.map_or(0, |seal| seal.len)
    }

    /// What lists tell of the file.
    pub(crate) fn brief(&self) -> [u8; Brief::LEN] {
        Brief::of_stored(self.record.as_ref(), &self.facts)
    }
}

impl LogRecord {
    /// Appends the record's bytes.
    pub(crate) fn encode(&self, volume: VolumeId, out: &mut Vec<u8>) {
        let (kind, name, seal, bytes): (u8, Vec<u8>, Option<Seal>, &[u8]) = match &self.body {
            Body::Whole { record, whole } => (1, record.to_bytes(), Some(whole.seal()), whole.bytes()),
            Body::Known { record } => (2, record.to_bytes(), None, &[]),
            Body::Dropped { client } => {
                (3, client.map_or_else(Vec::new, |client| client.uuid().as_bytes().to_vec()), None, &[])
            }
        };
        let start = out.len();
        out.extend_from_slice(&MAGIC);
        out.push(kind);
        out.extend_from_slice(self.file.as_bytes());
        out.extend_from_slice(&self.tenant.number().to_be_bytes());
        out.extend_from_slice(&self.generation.number().to_be_bytes());
        out.extend_from_slice(&seal.map_or([0; 32], |seal| *seal.root.as_bytes()));
        out.extend_from_slice(&seal.and_then(|seal| seal.value).map_or([0; 32], |value| *value.as_bytes()));
        for len in [name.len(), self.facts.len(), bytes.len()] {
            out.extend_from_slice(&(len as u32).to_be_bytes());
        }
        let check = check(&[&volume.0, &out[start..], &name, &self.facts]);
        out.extend_from_slice(&check);
        out.extend_from_slice(&name);
        out.extend_from_slice(&self.facts);
        out.extend_from_slice(bytes);
    }
}

impl Front {
    /// Reads what stands before the file's bytes; what follows is left alone.
    pub(crate) fn decode(volume: VolumeId, all: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader(all);
        if reader.array::<4>()? != MAGIC {
            return Err(FormatError::Magic);
        }
        let kind = reader.u8()?;
        let file = FileId::from_bytes(reader.array()?);
        let (tenant, generation) = (TenantId::new(reader.u64()?), Generation::new(reader.u64()?));
        let (root, value) = (reader.array::<32>()?, reader.array::<32>()?);
        let (name, facts, len) = (reader.u32()? as usize, reader.u32()? as usize, reader.u32()?);
        let expected = reader.array::<CHECK_LEN>()?;
        if name > MAX_RECORD_LEN || facts > MAX_FACTS_LEN || u64::from(len) > CHUNK_LEN {
            return Err(FormatError::Impossible("length"));
        }
        let (name, facts) = (reader.bytes(name)?, reader.bytes(facts)?);
        if check(&[&volume.0, &all[..HEAD_LEN - CHECK_LEN], name, facts]) != expected {
            return Err(FormatError::Check);
        }
        let metadata = || {
            let record = MetadataRecord::from_bytes(name);
            let record = record.map_err(|_| FormatError::Impossible("metadata record"))?;
            if record.file_id() == file { Ok(record) } else { Err(FormatError::Misplaced("file")) }
        };
        let (record, client) = match (kind, name) {
            (1 | 2, _) => (Some(metadata()?), None),
            (3, []) => (None, None),
            (3, _) => {
                let uuid = Uuid::from_slice(name).map_err(|_| FormatError::Impossible("client's id"))?;
                (None, Some(ClientFileId::new(uuid)))
            }
            _ => return Err(FormatError::Impossible("kind of record")),
        };
        if kind != 1 && len != 0 {
            return Err(FormatError::Impossible("length"));
        }
        let value = (len > 0).then(|| ChainingValue::from_bytes(value));
        let seal = (kind == 1).then(|| Seal { root: Root::from_bytes(root), value, len });
        Ok(Self {
            file,
            tenant,
            generation,
            facts: facts.to_vec(),
            client: record.as_ref().map(MetadataRecord::client_id).or(client),
            record,
            seal,
            front_len: (HEAD_LEN + name.len() + facts.len()) as u32,
        })
    }

    /// The file's bytes out of the bytes of its record, checked against the root; `None` if it has none.
    pub(crate) fn bytes(&self, all: &[u8]) -> Result<Option<Bytes>, FormatError> {
        let Some(seal) = self.seal else { return Ok(None) };
        let mut reader = Reader(all);
        reader.bytes(self.front_len as usize)?;
        let bytes = reader.bytes(seal.len as usize)?;
        if Seal::of(bytes) == seal {
            Ok(Some(Bytes::copy_from_slice(bytes)))
        } else {
            Err(FormatError::Check)
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use sluice_engine::metadata::MetadataFields;

    pub(crate) const VOLUME: VolumeId = VolumeId([7; 16]);

    pub(crate) fn whole(n: u128, bytes: &[u8]) -> LogRecord {
        let client = ClientFileId::new(Uuid::from_u128(n));
        let fields = MetadataFields { size: Some(bytes.len() as u64), ..Default::default() };
        let record = MetadataRecord::new(TenantId::new(9), client, fields).unwrap();
        LogRecord {
            file: record.file_id(),
            tenant: record.tenant(),
            generation: Generation::new(2),
            facts: b"facts".to_vec(),
            body: Body::Whole { record, whole: Whole::of(Bytes::copy_from_slice(bytes)) },
        }
    }

    #[test]
    fn golden_bytes() {
        let mut out = Vec::new();
        whole(1, b"abc").encode(VOLUME, &mut out);
        assert_eq!(out[..5], *b"SLW\x01\x01");
        assert_eq!(out[21..37], *b"\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\x02");
        assert_eq!(out[105..113], *b"\0\0\0\x05\0\0\0\x03");
        assert!(out.ends_with(b"factsabc"));
        assert_eq!(
            blake3::hash(&out).to_hex().as_str(),
            "2ee49054e78d87b115166d2b69085feb17c7bc934aad4916322c7a5280ee7fa2"
        );
    }

    proptest! {
        #[test]
        fn round_trips_and_any_flip_is_seen(
            n: u128, facts in prop::collection::vec(any::<u8>(), 0..99), bytes in prop::collection::vec(any::<u8>(), 0..2000),
            kind in 0..4u8, generation: u64, at in any::<prop::sample::Index>(), bit in 0..8u8,
        ) {
            let mut record = whole(n, &bytes);
            record.facts = facts;
            record.generation = Generation::new(generation);
            let Body::Whole { record: metadata, whole } = record.body.clone() else { unreachable!() };
            record.body = match kind {
                0 => record.body,
                1 => Body::Known { record: metadata.clone() },
                2 => Body::Dropped { client: None },
                _ => Body::Dropped { client: Some(metadata.client_id()) },
            };
            let mut out = b"before".to_vec();
            record.encode(VOLUME, &mut out);
            let mut all = out.split_off(6);
            let front = Front::decode(VOLUME, &all).unwrap();
            prop_assert_eq!((front.file, front.tenant, front.generation), (record.file, record.tenant, record.generation));
            prop_assert_eq!(&front.facts, &record.facts);
            prop_assert_eq!(front.len() as usize, all.len());
            prop_assert_eq!(&front.record, &(kind < 2).then_some(metadata));
            prop_assert_eq!(front.seal, (kind == 0).then_some(whole.seal()));
            prop_assert_eq!(front.client.is_some(), kind != 2);
            let read = front.bytes(&all).unwrap();
            prop_assert_eq!(read.as_deref(), (kind == 0).then_some(&bytes[..]));
            prop_assert!(Front::decode(VolumeId([8; 16]), &all).is_err());
            let at = at.index(all.len());
            all[at] ^= 1 << bit;
            let seen = Front::decode(VOLUME, &all).and_then(|front| front.bytes(&all));
            prop_assert!(seen.is_err());
        }
    }
}
