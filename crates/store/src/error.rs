//! Why the store refuses, and what the caller should do about it.

use std::borrow::Cow;
use std::path::Path;

use sluice_engine::geometry::{ChunkIndex, GeometryError};
use sluice_engine::hash::{ChainingValue, RecordDigest, Root};
use sluice_engine::ids::FileId;

/// What a caller should do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// The same call may succeed later.
    Retry,
    /// The call is wrong, or contradicts what is stored; repeating it changes nothing.
    Fix,
    /// The store needs a person.
    Stop,
}

/// Why the store refuses.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Another metadata record stands.
    #[error("the file has another metadata record ({held:?}, got {got:?})")]
    RecordConflict {
        /// The record that stands.
        held: RecordDigest,
        /// The record that came.
        got: RecordDigest,
    },
    /// Another size stands.
    #[error("the file has {held} bytes, got a size of {got}")]
    SizeConflict {
        /// The size that stands.
        held: u64,
        /// The size that came.
        got: u64,
    },
    /// The chunk has a record with other bytes.
    #[error("chunk {index} is stored with other bytes ({held:?}, got {got:?})")]
    ChunkConflict {
        /// The chunk.
        index: ChunkIndex,
        /// Its recorded value.
        held: ChainingValue,
        /// The value of the bytes that came.
        got: ChainingValue,
    },
    /// The bytes that came do not have the value that was announced.
    #[error("chunk {index} has value {got}, expected {expected}")]
    ValueMismatch {
        /// The chunk.
        index: ChunkIndex,
        /// The value that was announced.
        expected: ChainingValue,
        /// The value of the bytes that came.
        got: ChainingValue,
    },
    /// The run does not fit the file.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// More or fewer bytes came than the run holds.
    #[error("length {got}, expected {expected}")]
    Length {
        /// Bytes that the run holds.
        expected: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The store never heard of the file.
    #[error("file {0} is not known here")]
    NoFile(FileId),
    /// The file was dropped for good.
    #[error("file {0} was dropped")]
    Dropped(FileId),
    /// The chunk has no record here.
    #[error("chunk {index} is not stored here")]
    Missing {
        /// The chunk.
        index: ChunkIndex,
    },
    /// The stored bytes do not hash to their recorded value.
    #[error("chunk {index} of file {file} is damaged")]
    Corrupt {
        /// The file.
        file: FileId,
        /// The chunk.
        index: ChunkIndex,
    },
    /// The values of the chunks do not merge to the root.
    #[error("the chunks merge to {got:?}, expected root {expected}")]
    WrongRoot {
        /// The root that was asked for.
        expected: Root,
        /// The root they merge to; `None` if chunks are missing.
        got: Option<Root>,
    },
    /// Another writer took over a claim that had stalled.
    #[error("the write stalled, and another request took its chunks over")]
    ClaimLost,
    /// Something is larger than the store takes.
    #[error("{what} has {got} bytes, the limit is {limit}")]
    TooLarge {
        /// What.
        what: Cow<'static, str>,
        /// Its length.
        got: usize,
        /// The most that is taken.
        limit: usize,
    },
    /// There is no room.
    #[error("the volume is full: {free} bytes are left, {reserve} are kept back for records")]
    Full {
        /// Bytes left.
        free: u64,
        /// Bytes kept back.
        reserve: u64,
    },
    /// The volume refuses writes since a sync failed.
    #[error("the volume is read-only since an I/O error: {reason}")]
    ReadOnly {
        /// What happened.
        reason: String,
    },
    /// The store is closing.
    #[error("the store is closing")]
    Closing,
    /// Another process has the volume open.
    #[error("{path} is in use by {by}")]
    InUse {
        /// The volume.
        path: String,
        /// Who has it, as far as the system tells.
        by: String,
    },
    /// The volume was written by a newer version.
    #[error("{path} has format version {got}, this process reads up to {known}")]
    NewerVersion {
        /// The volume.
        path: String,
        /// Its version.
        got: u32,
        /// The newest version that this process reads.
        known: u32,
    },
    /// The volume cannot be read or is not one.
    #[error("{path} cannot be opened as a volume: {reason}")]
    Unreadable {
        /// The volume.
        path: String,
        /// Why.
        reason: String,
    },
    /// The credentials do not allow what the store needs.
    #[error("the right {right} is missing for {place}: {reason}")]
    NoRight {
        /// The right, as policies call it.
        right: Cow<'static, str>,
        /// Bucket, prefix and server.
        place: String,
        /// What the server said.
        reason: String,
    },
    /// An operation of the disk, or a request to the bucket, failed.
    #[error("{operation} failed: {reason}")]
    Io {
        /// What was being done.
        operation: Cow<'static, str>,
        /// What the system said.
        reason: String,
    },
    /// The store is in another process, or in a bucket, which cannot be asked now.
    #[error("the store cannot be asked: {reason}")]
    Unreachable {
        /// Why.
        reason: String,
    },
}

impl StoreError {
    /// That somebody has locked `lock`, and with it the directory at `path`.
    pub fn in_use(path: &Path, lock: &Path) -> Self {
        Self::InUse { path: path.display().to_string(), by: crate::fs::holder(lock) }
    }

    /// What the caller should do.
    pub fn advice(&self) -> Advice {
        match self {
            Self::ClaimLost
            | Self::Full { .. }
            | Self::ReadOnly { .. }
            | Self::Closing
            | Self::Io { .. }
            | Self::Unreachable { .. } => Advice::Retry,
            Self::RecordConflict { .. }
            | Self::SizeConflict { .. }
            | Self::ChunkConflict { .. }
            | Self::ValueMismatch { .. }
            | Self::Geometry(_)
            | Self::Length { .. }
            | Self::NoFile(_)
            | Self::Dropped(_)
            | Self::Missing { .. }
            | Self::WrongRoot { .. }
            | Self::TooLarge { .. } => Advice::Fix,
            Self::Corrupt { .. }
            | Self::NoRight { .. }
            | Self::InUse { .. }
            | Self::NewerVersion { .. }
            | Self::Unreadable { .. } => Advice::Stop,
        }
    }
}
