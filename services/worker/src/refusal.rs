//! What the store, the geometry and the metadata refuse, said on the wire: each exhaustively, in this one place.

use sluice_engine::geometry::GeometryError;
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::metadata::MetadataError;
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::StoreError;

/// A run or size that does not fit.
pub(crate) fn of_geometry(error: &GeometryError) -> Refusal {
    let detail = error.to_string();
    match error {
        GeometryError::SizeTooLarge { .. } => Refusal::new(Problem::TooLarge, detail),
        GeometryError::IndexTooLarge { .. } | GeometryError::PastEnd { .. } => {
            Refusal::new(Problem::ChunkIndex, detail)
        }
        GeometryError::RunCount { .. } | GeometryError::RunUnaligned { .. } => {
            Refusal::new(Problem::ChunkAlignment, detail)
        }
        GeometryError::Length { .. } | GeometryError::Empty => {
            Refusal::new(Problem::ChunkLength, detail).hint("every chunk but the last holds 1 MiB")
        }
    }
}

/// A short chunk of a file whose size is open: the size would say whether it is the last.
pub(crate) fn size_open(len: u64) -> Refusal {
    let detail =
        format!("length {len}, expected whole chunks of {CHUNK_LEN} bytes while the size is not settled");
    Refusal::new(Problem::SizeOpen, detail)
        .hint("settle the size here with PATCH /v1/files/{id}, then send it")
}

/// A body longer than it was declared.
pub(crate) fn too_long(len: u64) -> Refusal {
    Refusal::new(Problem::ChunkLength, format!("more than the declared {len} bytes came"))
}

/// Metadata that is no record.
pub(crate) fn of_metadata(error: &MetadataError) -> Refusal {
    match error {
        MetadataError::Size(error) => of_geometry(error),
        MetadataError::TooLong { .. }
        | MetadataError::TooManyEntries { .. }
        | MetadataError::Text { .. }
        | MetadataError::Expiry { .. }
        | MetadataError::RecordTooLong { .. }
        | MetadataError::Malformed(_) => Refusal::new(Problem::InvalidMetadata, error.to_string()),
    }
}

/// What the store refuses. What only its operator can mend is logged here, and told without particulars.
pub(crate) fn of_store(error: &StoreError) -> Refusal {
    let detail = error.to_string();
    match error {
        StoreError::RecordConflict { .. } => Refusal::new(Problem::MetadataConflict, detail),
        StoreError::SizeConflict { .. } => Refusal::new(Problem::SizeConflict, detail),
        StoreError::ChunkConflict { .. } => Refusal::new(Problem::ChunkConflict, detail)
            .hint("the first bytes stay; use another id for other contents"),
        StoreError::ValueMismatch { .. } => {
            Refusal::new(Problem::ChunkValue, detail).hint("send the chunk again; nothing was stored")
        }
        StoreError::Geometry(error) => of_geometry(error),
        StoreError::Length { .. } => Refusal::new(Problem::ChunkLength, detail),
        StoreError::NoFile(_) => Refusal::not_found(),
        StoreError::Dropped(_) => Refusal::new(Problem::Dropped, "the file was deleted, aborted, or expired"),
        StoreError::Missing { .. } => Refusal::new(Problem::Unavailable, detail),
        StoreError::ClaimLost => Refusal::new(Problem::Timeout, detail).hint("send the chunk again"),
        StoreError::TooLarge { .. } => Refusal::new(Problem::TooLarge, detail),
        StoreError::Full { .. } => {
            Refusal::new(Problem::VolumeFull, detail).hint("use another datacenter, or delete files")
        }
        StoreError::ReadOnly { .. } => Refusal::new(Problem::ReadOnly, "the volume refuses writes")
            .hint("use another datacenter; reads go on here"),
        StoreError::Unreachable { .. } => Refusal::new(Problem::Unavailable, detail),
        StoreError::Closing => Refusal::new(Problem::Stopping, detail),
        StoreError::Corrupt { .. } | StoreError::Io { .. } => {
            tracing::error!(%error, "the chunk store failed");
            Refusal::new(Problem::Unavailable, "the chunk store failed; its log says why")
        }
        StoreError::WrongRoot { .. }
        | StoreError::InUse { .. }
        | StoreError::NewerVersion { .. }
        | StoreError::Unreadable { .. }
        | StoreError::NoRight { .. } => {
            tracing::error!(%error, "the chunk store failed");
            Refusal::new(Problem::Internal, "the chunk store failed; its log says why")
        }
    }
}
