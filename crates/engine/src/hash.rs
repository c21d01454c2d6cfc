//! Chaining values and roots: BLAKE3 taken apart at chunk boundaries.
//!
//! A chunk of 1 MiB is exactly a subtree of 2^10 BLAKE3 leaves, so its chaining value needs only its bytes and its
//! index, and siblings merge without their data (BLAKE3 paper, section 2.1; `blake3::hazmat`). The root of a file is
//! what `b3sum` prints. A file of one chunk has no root in its chaining value: the two are finalised differently.

use std::fmt;
use std::str::FromStr;

use blake3::hazmat::{self, HasherExt, Mode};

use crate::geometry::ChunkIndex;

/// Why a text is no hash.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected 64 hexadecimal digits, got {got:?}")]
pub struct BadHash {
    /// The text that came, cut to 80 characters.
    pub got: String,
}

macro_rules! hash_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl $name {
            /// Wraps 32 bytes.
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(&self.0[..4]))
            }
        }

        impl FromStr for $name {
            type Err = BadHash;
            fn from_str(text: &str) -> Result<Self, BadHash> {
                let mut bytes = [0; 32];
                match hex::decode_to_slice(text, &mut bytes) {
                    Ok(()) => Ok(Self(bytes)),
                    Err(_) => Err(BadHash { got: text.chars().take(80).collect() }),
                }
            }
        }
    };
}

hash_type! {
    /// The BLAKE3 chaining value of one subtree that is not the whole file: a chunk's, or a span's.
    ChainingValue
}
hash_type! {
    /// The BLAKE3 hash of a whole file, equal to what `b3sum FILE` prints.
    Root
}
hash_type! {
    /// The BLAKE3 digest of a metadata record's canonical bytes.
    RecordDigest
}

impl ChainingValue {
    /// The value of the node above two siblings.
    pub fn merge(left: &Self, right: &Self) -> Self {
        Self(hazmat::merge_subtrees_non_root(&left.0, &right.0, Mode::Hash))
    }

    /// The value of one whole chunk; `None` for no bytes, which are no chunk.
    pub fn of_chunk(index: ChunkIndex, bytes: &[u8]) -> Option<Self> {
        let mut hasher = ChunkHasher::new(index);
        hasher.update(bytes);
        hasher.finish()
    }
}

impl Root {
    /// The root of an empty file, `af1349b9…`.
    pub fn empty() -> Self {
        Self(*blake3::hash(&[]).as_bytes())
    }

    /// The root of a file from all of its bytes: how a file of one chunk gets its root.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The root of a file of at most one chunk, and the value of its chunk if it has one, in one pass: the two differ
    /// in how they are finalised.
    pub fn of_only_chunk(bytes: &[u8]) -> (Self, Option<ChainingValue>) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(bytes);
        let value = (!bytes.is_empty()).then(|| ChainingValue(hasher.finalize_non_root()));
        (hasher.finalize().into(), value)
    }

    /// The root above the two children of the top node.
    pub fn merge(left: &ChainingValue, right: &ChainingValue) -> Self {
        Self(*hazmat::merge_subtrees_root(&left.0, &right.0, Mode::Hash).as_bytes())
    }
}

impl From<blake3::Hash> for Root {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

/// Hashes one chunk while its bytes arrive.
#[derive(Clone)]
pub struct ChunkHasher {
    hasher: blake3::Hasher,
}

impl ChunkHasher {
    /// A hasher for the chunk at `index`.
    pub fn new(index: ChunkIndex) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(index.offset());
        Self { hasher }
    }

    /// Takes the next bytes. More than a chunk holds in all is a bug of the caller, and panics inside `blake3`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// Bytes taken so far.
    pub fn len(&self) -> u64 {
        self.hasher.count()
    }

    /// Whether no byte was taken yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The chunk's value; `None` if no byte was taken.
    pub fn finish(&self) -> Option<ChainingValue> {
        if self.is_empty() { None } else { Some(ChainingValue(self.hasher.finalize_non_root())) }
    }
}

impl fmt::Debug for ChunkHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkHasher({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CHUNK_LEN;

    #[test]
    fn two_chunks_merge_to_the_hash_of_both() {
        let bytes: Vec<u8> = (0..CHUNK_LEN + 77).map(|i| (i * 31 % 251) as u8).collect();
        let (a, b) = bytes.split_at(CHUNK_LEN as usize);
        let left = ChainingValue::of_chunk(ChunkIndex::new(0).unwrap(), a).unwrap();
        let right = ChainingValue::of_chunk(ChunkIndex::new(1).unwrap(), b).unwrap();
        assert_eq!(Root::merge(&left, &right), Root::of_bytes(&bytes));
        assert_ne!(Root::of_bytes(a).as_bytes(), left.as_bytes());
    }

    #[test]
    fn no_bytes_are_no_chunk_and_an_empty_file_has_the_known_root() {
        assert_eq!(ChainingValue::of_chunk(ChunkIndex::new(3).unwrap(), b""), None);
        assert!(Root::empty().to_string().starts_with("af1349b9"));
    }

    #[test]
    fn the_only_chunk_of_a_file_has_a_root_and_a_value() {
        let first = ChunkIndex::new(0).unwrap();
        for len in [0, 1, 1024, 1025, 70_000, CHUNK_LEN as usize] {
            let bytes = vec![7; len];
            let both = (Root::of_bytes(&bytes), ChainingValue::of_chunk(first, &bytes));
            assert_eq!(Root::of_only_chunk(&bytes), both, "{len}");
        }
    }

    #[test]
    fn hashes_parse_from_hex_only() {
        let root = Root::empty();
        assert_eq!(root.to_string().parse::<Root>(), Ok(root));
        assert!("af13".parse::<Root>().is_err());
        assert!("zz".repeat(32).parse::<Root>().is_err());
    }
}
