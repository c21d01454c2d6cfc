//! The bytes of a run on their way to the bucket: gathered and hashed as they come, and put as one object.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use sluice_engine::geometry::Run;
use sluice_engine::hash::{ChainingValue, ChunkHasher};
use sluice_engine::limits::CHUNK_LEN;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::bucket::{Bucket, BucketError, S3Request};
use super::keeper::Landed;
use crate::StoreError;

/// The bytes of a run, as far as they have come. What is wrong with them stays wrong.
#[derive(Debug)]
pub(crate) struct Body {
    run: Run,
    len: u64,
    bytes: BytesMut,
    hasher: ChunkHasher,
    values: Vec<ChainingValue>,
    broken: Option<StoreError>,
}

impl Body {
    /// Of a run of `len` bytes, for which there is memory.
    pub(crate) fn new(run: Run, len: u64) -> Self {
        Self {
            run,
            len,
            bytes: BytesMut::with_capacity(len as usize),
            hasher: ChunkHasher::new(run.start()),
            values: Vec::with_capacity(run.count() as usize),
            broken: None,
        }
    }

    /// Takes the next bytes.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let got = self.bytes.len() as u64 + bytes.len() as u64;
        if got > self.len {
            return Err(self.breaks(StoreError::Length { expected: self.len, got }));
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let at = self.bytes.len() as u64;
            let room = (CHUNK_LEN - at % CHUNK_LEN) as usize;
            let (part, later) = rest.split_at(room.min(rest.len()));
            self.hasher.update(part);
            self.bytes.extend_from_slice(part);
            rest = later;
            let at = self.bytes.len() as u64;
            if at.is_multiple_of(CHUNK_LEN) || at == self.len {
                self.values.extend(self.hasher.finish());
                let next = at / CHUNK_LEN;
                if next < self.run.count() {
                    self.hasher = ChunkHasher::new(self.run.index(next));
                }
            }
        }
        Ok(())
    }

    /// Whatever comes now, this run failed.
    pub(crate) fn breaks(&mut self, error: StoreError) -> StoreError {
        self.broken.get_or_insert(error).clone()
    }

    /// All bytes and the value of each chunk, if all have come and are what was expected.
    pub(crate) fn whole(
        self,
        expected: Option<&[ChainingValue]>,
    ) -> Result<(Bytes, Vec<ChainingValue>), StoreError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        if self.bytes.len() as u64 != self.len {
            return Err(StoreError::Length { expected: self.len, got: self.bytes.len() as u64 });
        }
        if let Some(expected) = expected {
            crate::check_expected(self.run, &self.values, expected)?;
        }
        Ok((self.bytes.freeze(), self.values))
    }
}

/// Memory for a body of `len` bytes out of `bodies`, once it is there.
pub(crate) async fn memory(
    bodies: &Arc<Semaphore>,
    bucket: &Bucket,
    len: u64,
) -> Result<OwnedSemaphorePermit, StoreError> {
    tokio::select! {
        memory = bodies.clone().acquire_many_owned(len.div_ceil(1 << 10) as u32) => {
            memory.map_err(|_| StoreError::Closing)
        }
        () = bucket.killed() => Err(StoreError::Closing),
    }
}

/// Puts all bytes of a run under its key, and finds out whether they are there.
pub(crate) async fn put(bucket: &Bucket, key: &str, bytes: Bytes) -> (Landed, Result<(), StoreError>) {
    let len = bytes.len() as u64;
    match bucket.put(key, bytes).await {
        Ok(_) => (Landed::Yes, Ok(())),
        Err(BucketError::Unknown(reason)) => {
            // Perhaps only the answer was lost.
            if matches!(bucket.head(key).await, Ok(got) if got == len) {
                return (Landed::Yes, Ok(()));
            }
            let error = StoreError::Io { operation: S3Request::Put.name().into(), reason };
            (Landed::Unknown, Err(error))
        }
        Err(error) => (Landed::No, Err(error.in_store(S3Request::Put))),
    }
}
