//! Errors of a store on the wire: each arrives as it left.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use sluice_engine::geometry::GeometryError;
use sluice_engine::hash::RecordDigest;
use sluice_proto::problem::Refusal;
use sluice_store::StoreError;

use super::forms::{file, index, root, value};
use crate::call::garbled;

/// [`StoreError`] on the wire.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum WireStoreError {
    RecordConflict { held: String, got: String },
    SizeConflict { held: u64, got: u64 },
    ChunkConflict { index: u64, held: String, got: String },
    ValueMismatch { index: u64, expected: String, got: String },
    Geometry(WireGeometryError),
    Length { expected: u64, got: u64 },
    NoFile(String),
    Dropped(String),
    Missing { index: u64 },
    Corrupt { file: String, index: u64 },
    WrongRoot { expected: String, got: Option<String> },
    ClaimLost,
    TooLarge { what: String, got: usize, limit: usize },
    Full { free: u64, reserve: u64 },
    ReadOnly { reason: String },
    Closing,
    InUse { path: String, by: String },
    NewerVersion { path: String, got: u32, known: u32 },
    Unreadable { path: String, reason: String },
    NoRight { right: String, place: String, reason: String },
    Io { operation: String, reason: String },
    Unreachable { reason: String },
}

/// [`GeometryError`] on the wire.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum WireGeometryError {
    SizeTooLarge { size: u64 },
    IndexTooLarge { index: u64 },
    PastEnd { index: u64, chunks: u64 },
    RunCount { count: u64 },
    RunUnaligned { start: u64, count: u64 },
    Length { expected: u64, got: u64 },
    Empty,
}

impl From<GeometryError> for WireGeometryError {
    fn from(error: GeometryError) -> Self {
        match error {
            GeometryError::SizeTooLarge { size } => Self::SizeTooLarge { size },
            GeometryError::IndexTooLarge { index } => Self::IndexTooLarge { index },
            GeometryError::PastEnd { index, chunks } => Self::PastEnd { index, chunks },
            GeometryError::RunCount { count } => Self::RunCount { count },
            GeometryError::RunUnaligned { start, count } => Self::RunUnaligned { start, count },
            GeometryError::Length { expected, got } => Self::Length { expected, got },
            GeometryError::Empty => Self::Empty,
        }
    }
}

impl From<WireGeometryError> for GeometryError {
    fn from(error: WireGeometryError) -> Self {
        match error {
            WireGeometryError::SizeTooLarge { size } => Self::SizeTooLarge { size },
            WireGeometryError::IndexTooLarge { index } => Self::IndexTooLarge { index },
            WireGeometryError::PastEnd { index, chunks } => Self::PastEnd { index, chunks },
            WireGeometryError::RunCount { count } => Self::RunCount { count },
            WireGeometryError::RunUnaligned { start, count } => Self::RunUnaligned { start, count },
            WireGeometryError::Length { expected, got } => Self::Length { expected, got },
            WireGeometryError::Empty => Self::Empty,
        }
    }
}

impl From<StoreError> for WireStoreError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::RecordConflict { held, got } => {
                Self::RecordConflict { held: held.to_string(), got: got.to_string() }
            }
            StoreError::SizeConflict { held, got } => Self::SizeConflict { held, got },
            StoreError::ChunkConflict { index, held, got } => {
                Self::ChunkConflict { index: index.number(), held: held.to_string(), got: got.to_string() }
            }
            StoreError::ValueMismatch { index, expected, got } => Self::ValueMismatch {
                index: index.number(),
                expected: expected.to_string(),
                got: got.to_string(),
            },
            StoreError::Geometry(error) => Self::Geometry(error.into()),
            StoreError::Length { expected, got } => Self::Length { expected, got },
            StoreError::NoFile(file) => Self::NoFile(file.to_string()),
            StoreError::Dropped(file) => Self::Dropped(file.to_string()),
            StoreError::Missing { index } => Self::Missing { index: index.number() },
            StoreError::Corrupt { file, index } => {
                Self::Corrupt { file: file.to_string(), index: index.number() }
            }
            StoreError::WrongRoot { expected, got } => {
                Self::WrongRoot { expected: expected.to_string(), got: got.map(|root| root.to_string()) }
            }
            StoreError::ClaimLost => Self::ClaimLost,
            StoreError::TooLarge { what, got, limit } => {
                Self::TooLarge { what: what.into_owned(), got, limit }
            }
            StoreError::Full { free, reserve } => Self::Full { free, reserve },
            StoreError::ReadOnly { reason } => Self::ReadOnly { reason },
            StoreError::Closing => Self::Closing,
            StoreError::InUse { path, by } => Self::InUse { path, by },
            StoreError::NewerVersion { path, got, known } => Self::NewerVersion { path, got, known },
            StoreError::Unreadable { path, reason } => Self::Unreadable { path, reason },
            StoreError::NoRight { right, place, reason } => {
                Self::NoRight { right: right.into_owned(), place, reason }
            }
            StoreError::Io { operation, reason } => Self::Io { operation: operation.into_owned(), reason },
            StoreError::Unreachable { reason } => Self::Unreachable { reason },
        }
    }
}

impl WireStoreError {
    pub(super) fn parse(self) -> Result<StoreError, Refusal> {
        Ok(match self {
            Self::RecordConflict { held, got } => {
                StoreError::RecordConflict { held: digest(&held)?, got: digest(&got)? }
            }
            Self::SizeConflict { held, got } => StoreError::SizeConflict { held, got },
            Self::ChunkConflict { index: at, held, got } => {
                StoreError::ChunkConflict { index: index(at)?, held: value(&held)?, got: value(&got)? }
            }
            Self::ValueMismatch { index: at, expected, got } => StoreError::ValueMismatch {
                index: index(at)?,
                expected: value(&expected)?,
                got: value(&got)?,
            },
            Self::Geometry(error) => StoreError::Geometry(error.into()),
            Self::Length { expected, got } => StoreError::Length { expected, got },
            Self::NoFile(id) => StoreError::NoFile(file(&id)?),
            Self::Dropped(id) => StoreError::Dropped(file(&id)?),
            Self::Missing { index: at } => StoreError::Missing { index: index(at)? },
            Self::Corrupt { file: id, index: at } => {
                StoreError::Corrupt { file: file(&id)?, index: index(at)? }
            }
            Self::WrongRoot { expected, got } => StoreError::WrongRoot {
                expected: root(&expected)?,
                got: got.as_deref().map(root).transpose()?,
            },
            Self::ClaimLost => StoreError::ClaimLost,
            Self::TooLarge { what, got, limit } => {
                StoreError::TooLarge { what: Cow::Owned(what), got, limit }
            }
            Self::Full { free, reserve } => StoreError::Full { free, reserve },
            Self::ReadOnly { reason } => StoreError::ReadOnly { reason },
            Self::Closing => StoreError::Closing,
            Self::InUse { path, by } => StoreError::InUse { path, by },
            Self::NewerVersion { path, got, known } => StoreError::NewerVersion { path, got, known },
            Self::Unreadable { path, reason } => StoreError::Unreadable { path, reason },
            Self::NoRight { right, place, reason } => {
                StoreError::NoRight { right: Cow::Owned(right), place, reason }
            }
            Self::Io { operation, reason } => StoreError::Io { operation: Cow::Owned(operation), reason },
            Self::Unreachable { reason } => StoreError::Unreachable { reason },
        })
    }
}

fn digest(text: &str) -> Result<RecordDigest, Refusal> {
    text.parse().map_err(garbled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_engine::geometry::ChunkIndex;
    use sluice_engine::hash::{ChainingValue, Root};
    use sluice_engine::ids::FileId;

    fn same(error: StoreError) {
        let said = format!("{error:?}");
        let wire = serde_json::to_vec(&WireStoreError::from(error)).unwrap();
        let back = serde_json::from_slice::<WireStoreError>(&wire).unwrap().parse().unwrap();
        assert_eq!(format!("{back:?}"), said);
    }

    #[test]
    fn every_error_arrives_as_it_left() {
        let (file, index) = (FileId::from_bytes([7; 16]), ChunkIndex::new(9).unwrap());
        let value = |byte| ChainingValue::from_bytes([byte; 32]);
        let (path, by, reason) = (String::from("/v"), String::from("pid 1"), String::from("EIO"));
        let root = Root::from_bytes([5; 32]);
        for error in [
            StoreError::RecordConflict {
                held: RecordDigest::from_bytes([1; 32]),
                got: RecordDigest::from_bytes([2; 32]),
            },
            StoreError::SizeConflict { held: 1, got: 2 },
            StoreError::ChunkConflict { index, held: value(1), got: value(2) },
            StoreError::ValueMismatch { index, expected: value(1), got: value(2) },
            StoreError::Length { expected: 3, got: 4 },
            StoreError::NoFile(file),
            StoreError::Dropped(file),
            StoreError::Missing { index },
            StoreError::Corrupt { file, index },
            StoreError::WrongRoot { expected: root, got: None },
            StoreError::WrongRoot { expected: root, got: Some(Root::from_bytes([6; 32])) },
            StoreError::ClaimLost,
            StoreError::TooLarge { what: "page".into(), got: 5, limit: 4 },
            StoreError::Full { free: 1, reserve: 2 },
            StoreError::ReadOnly { reason: reason.clone() },
            StoreError::Closing,
            StoreError::InUse { path: path.clone(), by },
            StoreError::NewerVersion { path: path.clone(), got: 3, known: 2 },
            StoreError::Unreadable { path: path.clone(), reason: reason.clone() },
            StoreError::NoRight { right: "s3:GetObject".into(), place: path, reason: reason.clone() },
            StoreError::Io { operation: "sync".into(), reason: reason.clone() },
            StoreError::Unreachable { reason },
        ] {
            same(error);
        }
        for error in [
            GeometryError::SizeTooLarge { size: 1 },
            GeometryError::IndexTooLarge { index: 2 },
            GeometryError::PastEnd { index: 3, chunks: 2 },
            GeometryError::RunCount { count: 3 },
            GeometryError::RunUnaligned { start: 1, count: 2 },
            GeometryError::Length { expected: 1, got: 2 },
            GeometryError::Empty,
        ] {
            same(StoreError::Geometry(error));
        }
    }
}
