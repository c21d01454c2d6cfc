//! The bytes of a file that comes whole, and what they hash to.

use bytes::Bytes;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::metadata::MetadataRecord;

use crate::StoreError;

/// The bytes of a file of at most one chunk, hashed: the one way to make it hashes them, so that whoever is given one
/// needs not hash them again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    seal: Seal,
    bytes: Bytes,
}

impl Whole {
    /// Hashes `bytes`: some 0.2 ms for a chunk, on the calling thread.
    pub fn of(bytes: Bytes) -> Self {
        Self { seal: Seal::of(&bytes), bytes }
    }

    /// The root of the file.
    pub fn root(&self) -> Root {
        self.seal.root
    }

    /// The value of its only chunk; `None` if the file is empty.
    pub fn value(&self) -> Option<ChainingValue> {
        self.seal.value
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Whether these are the bytes that a record says, and one chunk at the most.
    pub(crate) fn check(&self, record: &MetadataRecord) -> Result<(), StoreError> {
        crate::limit("file in one request", self.bytes.len(), CHUNK_LEN as usize)?;
        let (expected, got) = (record.geometry().map(|shape| shape.size()), self.bytes.len() as u64);
        if expected != Some(got) {
            return Err(StoreError::Length { expected: expected.unwrap_or(0), got });
        }
        if let Some(expected) = record.expected_root().filter(|expected| *expected != self.root()) {
            return Err(StoreError::WrongRoot { expected, got: Some(self.root()) });
        }
        Ok(())
    }

    /// What the bytes hash to.
    pub(crate) fn seal(&self) -> Seal {
        self.seal
    }
}

/// What bytes of at most one chunk hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seal {
    pub(crate) root: Root,
    /// The value of the only chunk; `None` for no bytes.
    pub(crate) value: Option<ChainingValue>,
    pub(crate) len: u32,
}

impl Seal {
    /// Of these bytes; at most a chunk.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let (root, value) = Root::of_only_chunk(bytes);
        Self { root, value, len: bytes.len() as u32 }
    }
}
