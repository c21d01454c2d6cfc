//! What the demo sends: a file of the user's, or pseudo-random bytes. Its hash is taken here, from the bytes in order
//! and apart from everything that Sluice does.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use sluice_client::{ClientError, Source};
use sluice_engine::hash::Root;
use tokio::task::spawn_blocking;

/// Bytes that are made, written or hashed at once; between them the demo may be interrupted.
const PIECE: usize = 4 << 20;

/// Tells the pseudo-random bytes of demos from all others.
const CONTEXT: &str = "sluice 2026-11 demo input v1";

/// The file to send.
#[derive(Debug)]
pub(super) struct Input {
    path: PathBuf,
    name: String,
    source: Source,
}

impl Input {
    /// A file that is there.
    pub(super) fn of_file(path: &Path) -> anyhow::Result<Self> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { path: path.to_owned(), name, source: Source::open(path)? })
    }

    /// A new file of pseudo-random bytes, the same for the same seed.
    pub(super) async fn generate(path: &Path, size: u64, seed: u64) -> anyhow::Result<Self> {
        let cannot = || format!("cannot write {}", path.display());
        let mut file = File::create_new(path).with_context(cannot)?;
        let mut bytes = blake3::Hasher::new_derive_key(CONTEXT).update(&seed.to_be_bytes()).finalize_xof();
        let mut buffer = vec![0; PIECE];
        let mut left = size;
        while left > 0 {
            let len = left.min(PIECE as u64) as usize;
            let written;
            (file, bytes, buffer, written) = spawn_blocking(move || {
                bytes.fill(&mut buffer[..len]);
                let written = file.write_all(&buffer[..len]);
                (file, bytes, buffer, written)
            })
            .await?;
            written.with_context(cannot)?;
            left -= len as u64;
        }
        Self::of_file(path)
    }

    /// The file's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The file, to be sent.
    pub(super) fn source(&self) -> &Source {
        &self.source
    }

    /// What `b3sum` says of it.
    pub(super) async fn hash(&self) -> anyhow::Result<Root> {
        let failed = |cause| ClientError::Source { path: self.path.clone(), cause };
        let mut file = File::open(&self.path).map_err(failed)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; PIECE];
        loop {
            let read;
            (file, hasher, buffer, read) = spawn_blocking(move || {
                let read = file.read(&mut buffer);
                if let Ok(len) = read {
                    hasher.update(&buffer[..len]);
                }
                (file, hasher, buffer, read)
            })
            .await?;
            if read.map_err(failed)? == 0 {
                return Ok(Root::from_bytes(*hasher.finalize().as_bytes()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_seed_gives_the_same_bytes_and_their_hash_is_that_of_b3sum() {
        let dir = tempfile::tempdir().unwrap();
        let size = PIECE as u64 + 17;
        let mut hashes = Vec::new();
        for (name, seed) in [("a", 1), ("b", 1), ("c", 2)] {
            let path = dir.path().join(name);
            let input = Input::generate(&path, size, seed).await.unwrap();
            assert_eq!((input.source().size(), input.name()), (size, name));
            let hash = input.hash().await.unwrap();
            assert_eq!(hash, Root::of_bytes(&std::fs::read(&path).unwrap()));
            hashes.push(hash);
        }
        assert_eq!(hashes[0], hashes[1]);
        assert_ne!(hashes[0], hashes[2]);
    }
}
