//! The metadata record: canonical bytes of what the client sent and its tenant, nothing assigned by a server.
//!
//! The same request at two datacenters therefore makes the same record, and its BLAKE3 digest names it. Layout, all
//! integers big-endian:
//!
//! | bytes | field |
//! | --- | --- |
//! | 4 | `SLM` and version 1 |
//! | 8 | tenant |
//! | 16 | the client's UUID |
//! | 8 | size in bytes; `u64::MAX`: unknown |
//! | 8 | expiry in seconds after the last progress; 0: never |
//! | 1 + 32 | 1 and the expected root, or 33 zero bytes |
//! | 2 + n | name (UTF-8) |
//! | 2 + n | content type (visible ASCII) |
//! | 2 | number of user entries, sorted by key, keys unique |
//! | 2 + n, 2 + n | per entry: key and value (UTF-8) |

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::geometry::{Geometry, GeometryError};
use crate::hash::{RecordDigest, Root};
use crate::ids::{ClientFileId, FileId, TenantId};
use crate::limits::{
    MAX_CONTENT_TYPE_LEN, MAX_EXPIRY_SECS, MAX_NAME_LEN, MAX_RECORD_LEN, MAX_USER_ENTRIES, MAX_USER_KEY_LEN,
    MAX_USER_VALUE_LEN,
};

const MAGIC: [u8; 4] = *b"SLM\x01";

/// What a client says of a file before its first chunk. Immutable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataRecord {
    tenant: TenantId,
    client_id: ClientFileId,
    size: Option<Geometry>,
    expiry_secs: u64,
    expected_root: Option<Root>,
    name: String,
    content_type: String,
    user: BTreeMap<String, String>,
}

/// What goes into a record, before it is checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetadataFields {
    /// Size in bytes; `None` if it is not known yet.
    pub size: Option<u64>,
    /// Expiry in seconds after the last progress; 0: never.
    pub expiry_secs: u64,
    /// The root the client expects.
    pub expected_root: Option<Root>,
    /// File name; may be empty.
    pub name: String,
    /// Content type; may be empty.
    pub content_type: String,
    /// User metadata.
    pub user: BTreeMap<String, String>,
}

/// Why fields or bytes are no metadata record.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum MetadataError {
    /// The size is over the limit.
    #[error(transparent)]
    Size(#[from] GeometryError),
    /// A text is too long.
    #[error("{field} has {got} bytes, the limit is {limit}")]
    TooLong {
        /// Which field.
        field: &'static str,
        /// Its length in bytes.
        got: usize,
        /// The longest it may be.
        limit: usize,
    },
    /// Too many entries of user metadata.
    #[error("{got} entries of user metadata, the limit is {MAX_USER_ENTRIES}")]
    TooManyEntries {
        /// How many came.
        got: usize,
    },
    /// A text holds what it must not.
    #[error("{field} must be {expected}")]
    Text {
        /// Which field.
        field: &'static str,
        /// What it may hold.
        expected: &'static str,
    },
    /// The expiry is over the limit.
    #[error("expiry of {got} s is over the limit of {MAX_EXPIRY_SECS} s")]
    Expiry {
        /// Seconds that were asked for.
        got: u64,
    },
    /// The record as a whole is too long.
    #[error("the metadata takes {got} bytes, the limit is {MAX_RECORD_LEN}")]
    RecordTooLong {
        /// Its length in bytes.
        got: usize,
    },
    /// The bytes are not those of a record.
    #[error("not a metadata record: {0}")]
    Malformed(&'static str),
}

impl MetadataError {
    /// The error's name in the protocol.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Size(error) => error.code(),
            Self::TooLong { .. } => "text-length",
            Self::TooManyEntries { .. } => "entries",
            Self::Text { .. } => "text",
            Self::Expiry { .. } => "expiry",
            Self::RecordTooLong { .. } => "record-length",
            Self::Malformed(_) => "malformed",
        }
    }
}

impl MetadataRecord {
    /// Checks the fields and makes the record.
    pub fn new(
        tenant: TenantId,
        client_id: ClientFileId,
        fields: MetadataFields,
    ) -> Result<Self, MetadataError> {
        let MetadataFields { size, expiry_secs, expected_root, name, content_type, user } = fields;
        let size = size.map(Geometry::new).transpose()?;
        if expiry_secs > MAX_EXPIRY_SECS {
            return Err(MetadataError::Expiry { got: expiry_secs });
        }
        check_text("name", &name, MAX_NAME_LEN)?;
        check_len("content type", &content_type, MAX_CONTENT_TYPE_LEN)?;
        if !content_type.bytes().all(|b| (0x20..0x7F).contains(&b)) {
            return Err(MetadataError::Text { field: "content type", expected: "visible ASCII" });
        }
        if user.len() > MAX_USER_ENTRIES {
            return Err(MetadataError::TooManyEntries { got: user.len() });
        }
        for (key, value) in &user {
            check_text("metadata key", key, MAX_USER_KEY_LEN)?;
            if key.is_empty() {
                return Err(MetadataError::Text { field: "metadata key", expected: "not empty" });
            }
            check_text("metadata value", value, MAX_USER_VALUE_LEN)?;
        }
        let record = Self { tenant, client_id, size, expiry_secs, expected_root, name, content_type, user };
        let got = record.to_bytes().len();
        if got > MAX_RECORD_LEN {
            return Err(MetadataError::RecordTooLong { got });
        }
        Ok(record)
    }

    /// The id of the file inside the cluster.
    pub fn file_id(&self) -> FileId {
        FileId::derive(self.tenant, self.client_id)
    }

    /// Who owns the file.
    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// The UUID by which its client knows the file.
    pub fn client_id(&self) -> ClientFileId {
        self.client_id
    }

    /// The shape of the file; `None` while the size is not settled.
    pub fn geometry(&self) -> Option<Geometry> {
        self.size
    }

    /// Expiry in seconds after the last progress; `None`: never.
    pub fn expiry_secs(&self) -> Option<u64> {
        (self.expiry_secs > 0).then_some(self.expiry_secs)
    }

    /// The root that the client expects.
    pub fn expected_root(&self) -> Option<Root> {
        self.expected_root
    }

    /// The file's name; may be empty.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The content type; may be empty.
    pub fn content_type(&self) -> &str {
        &self.content_type
    }

    /// The user metadata.
    pub fn user(&self) -> &BTreeMap<String, String> {
        &self.user
    }

    /// The digest that names the record.
    pub fn digest(&self) -> RecordDigest {
        RecordDigest::from_bytes(*blake3::hash(&self.to_bytes()).as_bytes())
    }

    /// The canonical bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128 + self.name.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.tenant.number().to_be_bytes());
        out.extend_from_slice(self.client_id.uuid().as_bytes());
        out.extend_from_slice(&self.size.map_or(u64::MAX, Geometry::size).to_be_bytes());
        out.extend_from_slice(&self.expiry_secs.to_be_bytes());
        out.push(u8::from(self.expected_root.is_some()));
        out.extend_from_slice(&self.expected_root.map_or([0; 32], |root| *root.as_bytes()));
        push_text(&mut out, &self.name);
        push_text(&mut out, &self.content_type);
        out.extend_from_slice(&(self.user.len() as u16).to_be_bytes());
        for (key, value) in &self.user {
            push_text(&mut out, key);
            push_text(&mut out, value);
        }
        out
    }

    /// Reads canonical bytes; anything that [`to_bytes`](Self::to_bytes) would not have written is refused.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MetadataError> {
        if bytes.len() > MAX_RECORD_LEN {
            return Err(MetadataError::RecordTooLong { got: bytes.len() });
        }
        let mut rest = Reader(bytes);
        if rest.array::<4>()? != MAGIC {
            return Err(MetadataError::Malformed("magic or version"));
        }
        let tenant = TenantId::new(u64::from_be_bytes(rest.array()?));
        let client_id = ClientFileId::new(Uuid::from_bytes(rest.array()?));
        let size = u64::from_be_bytes(rest.array()?);
        let expiry_secs = u64::from_be_bytes(rest.array()?);
        let has_root = rest.array::<1>()?;
        let root = rest.array::<32>()?;
        let expected_root = match has_root {
            [1] => Some(Root::from_bytes(root)),
            [0] if root == [0; 32] => None,
            _ => return Err(MetadataError::Malformed("expected root")),
        };
        let name = rest.text()?;
        let content_type = rest.text()?;
        let entries = u16::from_be_bytes(rest.array()?);
        let mut user = BTreeMap::new();
        for _ in 0..entries {
            let (key, value) = (rest.text()?, rest.text()?);
            user.insert(key, value);
        }
        let fields = MetadataFields {
            size: (size != u64::MAX).then_some(size),
            expiry_secs,
            expected_root,
            name,
            content_type,
            user,
        };
        let record = Self::new(tenant, client_id, fields)?;
        // One comparison refuses trailing bytes, unsorted and doubled keys alike.
        if record.to_bytes() == bytes { Ok(record) } else { Err(MetadataError::Malformed("not canonical")) }
    }
}

fn check_len(field: &'static str, text: &str, limit: usize) -> Result<(), MetadataError> {
    if text.len() > limit { Err(MetadataError::TooLong { field, got: text.len(), limit }) } else { Ok(()) }
}

fn check_text(field: &'static str, text: &str, limit: usize) -> Result<(), MetadataError> {
    check_len(field, text, limit)?;
    if text.chars().any(char::is_control) {
        return Err(MetadataError::Text { field, expected: "free of control characters" });
    }
    Ok(())
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], MetadataError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(MetadataError::Malformed("cut short"))?;
        self.0 = rest;
        Ok(*head)
    }

    fn text(&mut self) -> Result<String, MetadataError> {
        let len = usize::from(u16::from_be_bytes(self.array()?));
        let (head, rest) = self.0.split_at_checked(len).ok_or(MetadataError::Malformed("cut short"))?;
        self.0 = rest;
        String::from_utf8(head.to_vec()).map_err(|_| MetadataError::Malformed("text is not UTF-8"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(fields: MetadataFields) -> Result<MetadataRecord, MetadataError> {
        let client = "0193e4a0-7b1c-7def-8123-456789abcdef".parse().unwrap();
        MetadataRecord::new(TenantId::new(7), client, fields)
    }

    #[test]
    fn golden_bytes() {
        let fields = MetadataFields {
            size: Some(1_048_577),
            expiry_secs: 60,
            expected_root: Some(Root::empty()),
            name: "a.iso".into(),
            content_type: "application/octet-stream".into(),
            user: [("k".into(), "v".into())].into(),
        };
        let record = record(fields).unwrap();
        let bytes = record.to_bytes();
        assert_eq!(
            hex::encode(&bytes),
            "534c4d0100000000000000070193e4a07b1c7def8123456789abcdef0000000000100001000000000000003c01af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f32620005612e69736f00186170706c69636174696f6e2f6f637465742d73747265616d000100016b000176"
        );
        assert_eq!(MetadataRecord::from_bytes(&bytes), Ok(record));
    }

    #[test]
    fn limits_are_named() {
        let too_long = MetadataFields { name: "x".repeat(1025), ..Default::default() };
        assert_eq!(
            record(too_long),
            Err(MetadataError::TooLong { field: "name", got: 1025, limit: MAX_NAME_LEN })
        );
        let control = MetadataFields { name: "a\nb".into(), ..Default::default() };
        assert!(matches!(record(control), Err(MetadataError::Text { field: "name", .. })));
        let size = MetadataFields { size: Some((34 << 50) + 1), ..Default::default() };
        assert!(matches!(record(size), Err(MetadataError::Size(_))));
        let value = "v".repeat(2000);
        let user = (0..9).map(|i| (format!("k{i}"), value.clone())).collect();
        let record = record(MetadataFields { user, ..Default::default() });
        assert!(matches!(record, Err(MetadataError::RecordTooLong { .. })));
    }

    proptest! {
        #[test]
        fn round_trips(size in proptest::option::of(0..=(34u64 << 50)), expiry_secs in 0..=MAX_EXPIRY_SECS,
                       root in proptest::option::of(any::<[u8; 32]>()), name in "[^\\p{Cc}]{0,40}",
                       user in proptest::collection::btree_map("[a-z]{1,9}", "[^\\p{Cc}]{0,20}", 0..5)) {
            let fields = MetadataFields {
                size, expiry_secs, expected_root: root.map(Root::from_bytes), name,
                content_type: "text/plain".into(), user,
            };
            let record = record(fields).unwrap();
            prop_assert_eq!(MetadataRecord::from_bytes(&record.to_bytes()), Ok(record));
        }

        #[test]
        fn any_bytes_are_refused_or_canonical(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(record) = MetadataRecord::from_bytes(&bytes) {
                prop_assert_eq!(record.to_bytes(), bytes);
            }
        }
    }
}
