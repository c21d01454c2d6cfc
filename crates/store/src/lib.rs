//! The chunk store: where the bytes of a datacenter are durable.
//!
//! Contract of every backend (`tests/store/contract.rs` puts each through it):
//! 1. A finished run is durable: bytes synced, then its record synced, then the answer (G1).
//! 2. Every durable record describes itself; any index is rebuilt from them (G5).
//! 3. A chunk with a record is immutable. The same bytes again get the same answer, other bytes are refused, and
//!    neither is written. A run is recorded as a whole or not at all.
//! 4. Whoever begins a run in which another writer holds a chunk waits for that writer's result.
//! 5. What is read is verified against its recorded value; what does not hash to it is an error, never data (G2).
//! 6. An error says whether to retry, fix or stop ([`StoreError::advice`]). Nothing acknowledged is lost by one.
//! 7. A file that came whole is one durable record, acknowledged once; it is listed and read without a file of its own.
//! 8. Memory is bounded: a writer holds tens of KiB, an index entry of an idle file is evicted.

mod aligned;
mod claims;
mod error;
pub mod fs;
mod page;
pub mod s3;
mod scrub_mark;
mod sealed;
mod share;
mod whole;

pub use aligned::{ALIGN, AlignedBuffer};
pub use error::{Advice, StoreError};
pub use fs::{FsMetrics, FsOptions, FsStore, SYNC_BOUNDS};
pub use s3::{PorterStore, S3Credentials, S3Metrics, S3Options, S3Request, S3Store};
pub use whole::Whole;

use std::collections::BTreeMap;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use sluice_engine::aggregator::Brief;
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::{ChainingValue, RecordDigest, Root};
use sluice_engine::ids::{ClientFileId, FileId, Generation, TenantId};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;

/// The most bytes of [`FileSummary::facts`].
pub const MAX_FACTS_LEN: usize = 4096;

/// The most bytes of the state of one share: what its aggregator remembers of its datacenter, revocations included.
pub const MAX_STATE_LEN: usize = 256 << 10;

/// The most bytes of a scrub's mark.
pub const MAX_MARK_LEN: usize = 4096;

/// The most bytes of one page.
pub const MAX_PAGE_LEN: usize = 8 << 20;

/// What the store knows of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSummary {
    /// Whose it is: from the metadata record, or from whoever sent the first provisional chunk.
    pub tenant: TenantId,
    /// The metadata record, once it has come.
    pub record: Option<MetadataRecord>,
    /// The file's shape, once its record says it or its size is settled.
    pub size: Option<Geometry>,
    /// What the aggregator must remember of the file (claims, root, drop): bytes that only the engine reads.
    pub facts: Vec<u8>,
    /// The newest generation of what is held.
    pub generation: Generation,
    /// The chunks that are durable here, as rising ranges that neither overlap nor touch.
    pub held: Vec<Range<u64>>,
    /// Bytes that are durable here.
    pub held_bytes: u64,
    /// The root under which the file was published, if it was.
    pub published: Option<Root>,
    /// Whether it is kept in one record, and found by [`ChunkStore::listed`].
    pub in_log: bool,
}

/// A file that a store has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which.
    pub file: FileId,
    /// Its brief, if it is kept in one record: what an aggregator needs of it as long as nothing happens to it.
    pub brief: Option<[u8; Brief::LEN]>,
    /// Whether that record has the file's bytes.
    pub whole: bool,
}

/// What lists tell of a file that is kept in one record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What its client calls it.
    pub client: ClientFileId,
    /// Its size in bytes.
    pub size: u64,
    /// Its name.
    pub name: String,
    /// Its brief.
    pub brief: [u8; Brief::LEN],
}

/// What became of a file that came whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WholeOutcome {
    /// It was new, and is durable and published now.
    Stored,
    /// The very same file was durable and published already.
    Known,
    /// Something of it is here already, or is being written: it must come as a record, facts and chunks, which are
    /// compared.
    Begun,
}

/// What became of a metadata record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordOutcome {
    /// It was new, and is durable now.
    Stored,
    /// The very same record was durable already.
    Known,
}

/// What became of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunReceipt {
    /// The value of each chunk of the run, in order.
    pub values: Vec<ChainingValue>,
    /// How many of the chunks had no record before.
    pub new_chunks: u64,
}

/// How full a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that can still be written before runs are refused.
    pub free: u64,
    /// Whether the store refuses every write.
    pub read_only: bool,
}

/// Consecutive chunks that were read in one go.
#[derive(Clone, Debug)]
pub struct Together {
    /// Their bytes, one after the other.
    pub bytes: Bytes,
    /// What each of them was verified to hash to.
    pub values: Vec<ChainingValue>,
}

/// Chunks in and out: all that a worker needs of a store. The methods may be called at any time, from any task; dropping a
/// future loses nothing that was acknowledged.
#[async_trait]
pub trait Chunks: Send + Sync + 'static {
    /// Begins to write a run of `len` bytes. Waits while another writer holds any chunk of it.
    ///
    /// With a metadata record that says the size, or once that is settled, the run is checked against the file's
    /// shape. Without a record the run is provisional, and the store remembers `tenant` as whose it is. A file that was dropped is [`StoreError::Dropped`].
    async fn begin_run(
        &self,
        file: FileId,
        tenant: TenantId,
        run: Run,
        len: u64,
    ) -> Result<Box<dyn RunWriter>, StoreError>;

    /// The recorded value of each chunk in `range`, `None` where there is none. At most 65,536 chunks.
    async fn values(&self, file: FileId, range: Range<u64>)
    -> Result<Vec<Option<ChainingValue>>, StoreError>;

    /// The bytes of one chunk, verified. [`StoreError::Missing`] if it has no record, [`StoreError::Corrupt`] if
    /// they do not hash to its value.
    async fn read_chunk(&self, file: FileId, index: ChunkIndex) -> Result<Bytes, StoreError>;

    /// How many consecutive chunks are best read in one go: one, unless it is requests that cost.
    fn at_once(&self) -> u64 {
        1
    }

    /// Consecutive chunks, at most [`at_once`](Self::at_once). `None` if they cannot be had in one go, or if one of them is
    /// not sound: then each is to be read by itself.
    async fn read_together(
        &self,
        _file: FileId,
        _chunks: Range<u64>,
    ) -> Result<Option<Together>, StoreError> {
        Ok(None)
    }
}

/// A chunk store. All methods may be called at any time, from any task; dropping a future loses nothing that was
/// acknowledged.
#[async_trait]
pub trait ChunkStore: Chunks {
    /// Makes a metadata record durable. A different record for the same file is
    /// [`StoreError::RecordConflict`], and the first stays. After [`drop_file`](Self::drop_file) it is
    /// [`StoreError::Dropped`].
    ///
    /// Provisional chunks that the record proves impossible (past the end, or of the wrong length) are discarded.
    async fn put_record(&self, record: &MetadataRecord) -> Result<RecordOutcome, StoreError>;

    /// Settles the size of a file whose record leaves it open, durably and for good. The same size again is a success,
    /// another is [`StoreError::SizeConflict`], and the first stays. Chunks that the size proves impossible are
    /// discarded, as [`put_record`](Self::put_record) does.
    async fn put_size(&self, file: FileId, size: Geometry) -> Result<(), StoreError>;

    /// Makes a whole file of at most one chunk durable and published, with its record and facts, in one.
    ///
    /// Another record or another content of the same file is [`StoreError::RecordConflict`] or
    /// [`StoreError::WrongRoot`], and the first stays. Bytes that are not what the record says are
    /// [`StoreError::Length`] or [`StoreError::WrongRoot`]. After [`drop_file`](Self::drop_file) it is
    /// [`StoreError::Dropped`].
    async fn put_whole(
        &self,
        record: &MetadataRecord,
        facts: &[u8],
        whole: Whole,
    ) -> Result<WholeOutcome, StoreError>;

    /// Remembers a file of at most one chunk that is whole elsewhere: its record and facts, in one. A record that is
    /// here already stays as it is.
    async fn put_known(&self, record: &MetadataRecord, facts: &[u8]) -> Result<WholeOutcome, StoreError>;

    /// What the store knows of a file; `None` if it never heard of it. Dropped files have a summary, with facts and
    /// without chunks; the record may be gone.
    async fn summary(&self, file: FileId) -> Result<Option<FileSummary>, StoreError>;

    /// Up to `limit` files with ids above `after`, in order of id: every file with a summary.
    async fn list(&self, after: Option<FileId>, limit: usize) -> Result<Vec<Found>, StoreError>;

    /// Up to `limit` files of a tenant that are kept in one record each, and were not dropped, with client's ids above
    /// `after`, in their order. None of them is read for it.
    async fn listed(
        &self,
        tenant: TenantId,
        after: Option<ClientFileId>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError>;

    /// Hashes one chunk as the device gives it back now, and returns its length. If it is damaged that is remembered,
    /// durably: the chunk is [`StoreError::Corrupt`] from then on, its file fails [`recheck`](Self::recheck), and whoever
    /// sends its bytes again mends it. If it is sound, what was remembered of damage is taken back.
    async fn verify(&self, file: FileId, index: ChunkIndex) -> Result<u64, StoreError>;

    /// The chunks of a file that are known to be damaged, as rising ranges.
    async fn damage(&self, file: FileId) -> Result<Vec<Range<u64>>, StoreError>;

    /// Files of which chunks are known to be damaged, and those that are kept apart because what the store knows of them
    /// cannot be read, though it changed: every call for one of these fails, and nothing of it is lost.
    async fn damaged_files(&self) -> Result<Vec<FileId>, StoreError>;

    /// Keeps how far the scrub of a share has come. At most [`MAX_MARK_LEN`] bytes. A cache: it may be lost.
    async fn put_scrub_mark(&self, share: Share, mark: &[u8]) -> Result<(), StoreError>;

    /// How far the scrub of a share had come, if that is known.
    async fn scrub_mark(&self, share: Share) -> Result<Option<Vec<u8>>, StoreError>;

    /// Forgets chunks that were found to be damaged, durably, and returns the next generation, under which what is
    /// left must be said again.
    async fn lose(&self, file: FileId, chunks: &[ChunkIndex]) -> Result<Generation, StoreError>;

    /// Replaces the file's facts, durably. At most [`MAX_FACTS_LEN`] bytes.
    async fn put_facts(&self, file: FileId, facts: &[u8]) -> Result<(), StoreError>;

    /// Publishes a file of which every chunk is here: checks that the values merge to `root`, makes the file
    /// visible as a whole, atomically and durably, with its chunk values beside it. Idempotent.
    ///
    /// For a file of one chunk the bytes are read to check the root. An empty file is published too.
    async fn publish(&self, file: FileId, root: Root) -> Result<(), StoreError>;

    /// Checks a published file again: length, sync state, and chunk values merging to a root, which it returns.
    async fn recheck(&self, file: FileId) -> Result<Root, StoreError>;

    /// Frees the chunks of a file that is assembled elsewhere; record and facts stay. The next generation, which it
    /// returns, is durable before the first byte goes. Idempotent apart from the generation.
    async fn free(&self, file: FileId) -> Result<Generation, StoreError>;

    /// Ends a file for good: `facts` are durable first, then the chunks go. The id is never used again.
    async fn drop_file(&self, file: FileId, tenant: TenantId, facts: &[u8]) -> Result<(), StoreError>;

    /// Removes a file without metadata record, as if no chunk of it had ever come. A file with one is left alone,
    /// and `false` is returned.
    async fn discard_orphan(&self, file: FileId) -> Result<bool, StoreError>;

    /// Raises the generation of every file in the share to at least `floor`, for good, those that come later included: what
    /// follows a restored disk. It stays raised when the slots are divided otherwise.
    async fn raise_generations(&self, share: Share, floor: Generation) -> Result<(), StoreError>;

    /// Keeps a page of the file's ledger for a segment. At most [`MAX_PAGE_LEN`] bytes. A cache: it may be lost.
    async fn put_page(&self, file: FileId, segment: u64, page: &[u8]) -> Result<(), StoreError>;

    /// A page that was kept, if it still is.
    async fn page(&self, file: FileId, segment: u64) -> Result<Option<Vec<u8>>, StoreError>;

    /// What the aggregator of each share must remember that belongs to no file. Empty at first; a share of which nothing is
    /// remembered is not in it.
    async fn states(&self) -> Result<BTreeMap<Share, Vec<u8>>, StoreError>;

    /// Replaces the state of one share, durably. At most [`MAX_STATE_LEN`] bytes. Those of other shares stay, also of shares
    /// that overlap it: a cluster may be divided otherwise than it was.
    async fn put_state(&self, share: Share, state: &[u8]) -> Result<(), StoreError>;

    /// How full the store is, as far as was heard last.
    fn usage(&self) -> Usage;

    /// Stops taking work, finishes what was begun, checkpoints, and releases the volume.
    async fn close(&self) -> Result<(), StoreError>;
}

/// A run that is being written. Dropping it gives up its claim and leaves no record.
#[async_trait]
pub trait RunWriter: Send {
    /// Takes the next bytes of the run, in order: hashes them, and writes those of chunks without a record in
    /// place. More than the run's length is [`StoreError::Length`]. What fails may be said by a later call.
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError>;

    /// Ends the run. Fails if bytes are missing ([`StoreError::Length`]), if a value differs from its counterpart in
    /// `expected` ([`StoreError::ValueMismatch`], `expected` is one value per chunk), or if a chunk that has a
    /// record has other bytes ([`StoreError::ChunkConflict`]): then nothing is recorded. Otherwise all of the run is
    /// durable and recorded when this returns.
    async fn finish(self: Box<Self>, expected: Option<&[ChainingValue]>) -> Result<RunReceipt, StoreError>;
}

/// Checks the values of a run against those that were announced for it.
pub(crate) fn check_expected(
    run: Run,
    got: &[ChainingValue],
    expected: &[ChainingValue],
) -> Result<(), StoreError> {
    if expected.len() != got.len() {
        return Err(StoreError::Length { expected: got.len() as u64, got: expected.len() as u64 });
    }
    for (i, (expected, got)) in expected.iter().zip(got).enumerate() {
        if expected != got {
            let index = run.index(i as u64);
            return Err(StoreError::ValueMismatch { index, expected: *expected, got: *got });
        }
    }
    Ok(())
}

/// Checks a length against its limit.
pub(crate) fn limit(what: &'static str, got: usize, limit: usize) -> Result<(), StoreError> {
    if got > limit { Err(StoreError::TooLarge { what: what.into(), got, limit }) } else { Ok(()) }
}

/// What a record, once known, says of the shape to check a run against.
pub(crate) fn shape(record: Option<&MetadataRecord>) -> Option<Geometry> {
    record.and_then(MetadataRecord::geometry)
}

/// Names the record that stands in the way of another.
pub(crate) fn conflict(held: &MetadataRecord, got: &MetadataRecord) -> StoreError {
    let (held, got): (RecordDigest, RecordDigest) = (held.digest(), got.digest());
    StoreError::RecordConflict { held, got }
}
