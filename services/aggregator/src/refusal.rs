//! Errors on their way to a worker or a peer, and back: each mapped in one place.

use sluice_proto::problem::{Problem, Refusal};
use sluice_store::StoreError;
use tonic::{Code, Status};

/// The metadata key of a status that carries the code of its problem.
const PROBLEM: &str = "sluice-problem";

/// The metadata key of what to do about it.
const HINT: &str = "sluice-hint";

/// What the store refuses.
pub(crate) fn of_store(error: &StoreError) -> Refusal {
    let detail = error.to_string();
    match error {
        StoreError::RecordConflict { .. } => Refusal::new(Problem::MetadataConflict, detail)
            .hint("the first metadata stands; use another id for another file"),
        StoreError::SizeConflict { held, got } => size_conflict(*held, *got),
        StoreError::ChunkConflict { .. } => Refusal::new(Problem::ChunkConflict, detail),
        StoreError::ValueMismatch { .. } => Refusal::new(Problem::ChunkValue, detail),
        StoreError::Geometry(_) | StoreError::Length { .. } => Refusal::new(Problem::ChunkLength, detail),
        StoreError::NoFile(_) => Refusal::not_found(),
        StoreError::Dropped(_) => dropped(),
        StoreError::TooLarge { .. } => Refusal::new(Problem::TooLarge, detail),
        StoreError::Full { .. } => Refusal::new(Problem::VolumeFull, detail),
        StoreError::ReadOnly { .. } => Refusal::new(Problem::ReadOnly, detail),
        // Another aggregator has the store, or this one begins anew.
        StoreError::Closing | StoreError::Unreachable { .. } => stopping(),
        StoreError::Missing { .. }
        | StoreError::Corrupt { .. }
        | StoreError::WrongRoot { .. }
        | StoreError::ClaimLost
        | StoreError::InUse { .. }
        | StoreError::NewerVersion { .. }
        | StoreError::Unreadable { .. }
        | StoreError::NoRight { .. }
        | StoreError::Io { .. } => Refusal::new(Problem::Unavailable, "the store cannot answer now"),
    }
}

/// The answer to the owner of a file that is gone.
pub(crate) fn dropped() -> Refusal {
    Refusal::new(Problem::Dropped, "the file was deleted, aborted, or expired")
        .hint("its id is never used again")
}

/// Another size stands.
pub(crate) fn size_conflict(held: u64, got: u64) -> Refusal {
    Refusal::new(Problem::SizeConflict, format!("the file has {held} bytes, got a size of {got}"))
        .hint("the first size stands; use another id for another file")
}

/// The datacenter is going away.
pub(crate) fn stopping() -> Refusal {
    Refusal::new(Problem::Stopping, "the datacenter is stopping")
}

/// A refusal on its way to a peer.
pub(crate) fn to_status(refusal: &Refusal) -> Status {
    let code = match refusal.problem.status() {
        400 | 411 | 413 | 416 | 422 => Code::InvalidArgument,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 | 410 => Code::NotFound,
        409 | 412 => Code::FailedPrecondition,
        429 => Code::ResourceExhausted,
        503 => Code::Unavailable,
        _ => Code::Internal,
    };
    let mut status = Status::new(code, refusal.detail.clone());
    if let Ok(value) = refusal.problem.code().parse() {
        status.metadata_mut().insert(PROBLEM, value);
    }
    if let Some(value) = refusal.hint.as_ref().and_then(|hint| hint.parse().ok()) {
        status.metadata_mut().insert(HINT, value);
    }
    status
}

/// What a peer refused. A peer that cannot be reached, or answers what it should not, is unavailable.
pub(crate) fn of_status(status: &Status, peer: &str) -> Refusal {
    let code = status.metadata().get(PROBLEM).and_then(|value| value.to_str().ok());
    match code.and_then(Problem::from_code) {
        Some(problem) => Refusal::new(problem, status.message().to_owned()),
        None => {
            Refusal::new(Problem::Unavailable, format!("{peer} cannot be asked now: {}", status.message()))
        }
    }
}
