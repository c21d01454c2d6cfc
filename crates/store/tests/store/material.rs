//! Files, chunks and records to test with.

use bytes::Bytes;
use sluice_engine::geometry::{ChunkIndex, Run};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, FileId, TenantId};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::metadata::{MetadataFields, MetadataRecord};
use sluice_engine::share::Share;
use sluice_store::{ChunkStore, RunReceipt, StoreError};
use uuid::Uuid;

pub(crate) const TENANT: TenantId = TenantId::new(7);
pub(crate) const FULL: usize = CHUNK_LEN as usize;

/// The file that a client calls by this number.
pub(crate) fn client(n: u128) -> ClientFileId {
    ClientFileId::new(Uuid::from_u128(n))
}

pub(crate) fn file(n: u128) -> FileId {
    FileId::derive(TENANT, client(n))
}

pub(crate) fn record(n: u128, size: Option<u64>) -> MetadataRecord {
    MetadataRecord::new(TENANT, client(n), MetadataFields { size, ..Default::default() }).unwrap()
}

pub(crate) fn index(i: u64) -> ChunkIndex {
    ChunkIndex::new(i).unwrap()
}

/// Everything, as it is divided into so many: one of the shares.
pub(crate) fn share(index: u32, of: u32) -> Share {
    Share::new(index, of).unwrap()
}

/// Numbers of files, from `from` on, that are in the share, or are not.
pub(crate) fn numbers(share: Share, inside: bool, from: u128) -> impl Iterator<Item = u128> {
    (from..).filter(move |n| share.has(file(*n)) == inside)
}

/// Bytes that differ by seed and position.
pub(crate) fn content(seed: u64, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    Bytes::from(bytes)
}

/// The values of the chunks that start at `first`.
pub(crate) fn values(first: u64, bytes: &[u8]) -> Vec<ChainingValue> {
    let chunks = bytes.chunks(FULL).enumerate();
    chunks.map(|(i, chunk)| ChainingValue::of_chunk(index(first + i as u64), chunk).unwrap()).collect()
}

/// The ids in a page of files.
pub(crate) async fn listed(store: &dyn ChunkStore, after: Option<FileId>, limit: usize) -> Vec<FileId> {
    store.list(after, limit).await.unwrap().into_iter().map(|found| found.file).collect()
}

pub(crate) fn root(bytes: &[u8]) -> Root {
    Root::of_bytes(bytes)
}

/// Writes one run in pieces of `piece` bytes.
pub(crate) async fn put_in_pieces(
    store: &dyn ChunkStore,
    file: FileId,
    first: u64,
    bytes: &Bytes,
    piece: usize,
) -> Result<RunReceipt, StoreError> {
    let len = bytes.len() as u64;
    let run = Run::from_len(index(first), len)?;
    let mut writer = store.begin_run(file, TENANT, run, len).await?;
    for at in (0..bytes.len()).step_by(piece) {
        writer.write(bytes.slice(at..(at + piece).min(bytes.len()))).await?;
    }
    writer.finish(None).await
}

/// Writes one run.
pub(crate) async fn put(
    store: &dyn ChunkStore,
    file: FileId,
    first: u64,
    bytes: &Bytes,
) -> Result<RunReceipt, StoreError> {
    put_in_pieces(store, file, first, bytes, 100_000).await
}

/// Writes a whole file, chunk by chunk.
pub(crate) async fn put_all(store: &dyn ChunkStore, file: FileId, bytes: &Bytes) -> Result<(), StoreError> {
    for at in (0..bytes.len()).step_by(FULL) {
        let end = (at + FULL).min(bytes.len());
        put(store, file, (at / FULL) as u64, &bytes.slice(at..end)).await?;
    }
    Ok(())
}
