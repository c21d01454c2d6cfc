//! Writing a run: memory, claim, bytes hashed as they arrive, one object, registration.
//!
//! Memory for the whole run is had before the claim, and the claim before the first byte: whoever waits holds up nobody who
//! has both. From [`finish`](RunWriter::finish) on the run goes to its end by itself, whether or not anybody waits for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use sluice_engine::geometry::{GeometryError, Run};
use sluice_engine::hash::{ChainingValue, ChunkHasher};
use sluice_engine::ids::{FileId, TenantId};
use sluice_engine::limits::CHUNK_LEN;
use tokio::sync::OwnedSemaphorePermit;

use super::bucket::{BucketError, S3Request};
use super::entry::{Entry, Live, MAX_DOUBTFUL};
use super::keys::{self, Life};
use super::lock;
use super::pieces::Piece;
use super::shared::{Gone, Plan, Shared};
use crate::claims::{ClaimId, Turn};
use crate::{RunReceipt, RunWriter, StoreError};

/// How long a run that waits goes without asking whether the store still takes work.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// A run that is being written.
#[derive(Debug)]
pub(crate) struct S3RunWriter {
    seat: Seat,
    run: Run,
    tenant: TenantId,
    len: u64,
    body: BytesMut,
    hasher: ChunkHasher,
    values: Vec<ChainingValue>,
    broken: Option<StoreError>,
}

/// A writer's hold on its file. Dropping it gives claim and memory up.
#[derive(Debug)]
struct Seat {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    claim: ClaimId,
    _memory: OwnedSemaphorePermit,
}

/// Checks a run against what is known of its file.
fn check(live: &Live, file: FileId, run: Run, len: u64) -> Result<(), StoreError> {
    if live.state.dropped {
        return Err(StoreError::Dropped(file));
    }
    let expected = match live.state.geometry() {
        Some(geometry) => geometry.run(run.start(), len)?,
        None => Run::from_len(run.start(), len)?,
    };
    if expected != run {
        return Err(GeometryError::Length { expected: run.count() * CHUNK_LEN, got: len }.into());
    }
    Ok(())
}

/// Checks the run against the file, waits for memory and for its turn, and claims it.
pub(crate) async fn begin(
    shared: &Arc<Shared>,
    file: FileId,
    tenant: TenantId,
    run: Run,
    len: u64,
) -> Result<S3RunWriter, StoreError> {
    shared.open()?;
    let entry = shared.entry(file).await?;
    check(&lock(&entry.live), file, run, len)?;
    let memory = shared.bodies.clone().acquire_many_owned(len.div_ceil(1 << 10) as u32);
    let memory = tokio::select! {
        memory = memory => memory.map_err(|_| StoreError::Closing)?,
        () = shared.bucket.killed() => return Err(StoreError::Closing),
    };
    loop {
        shared.open()?;
        let released = entry.released.notified();
        tokio::pin!(released);
        released.as_mut().enable();
        let turn = {
            let mut live = lock(&entry.live);
            check(&live, file, run, len)?;
            let now = Instant::now();
            live.settle_doubts(now);
            if live.doubtful.len() >= MAX_DOUBTFUL {
                let reason = "too many earlier requests for this file were not answered".into();
                return Err(StoreError::Io { operation: S3Request::Put.name().into(), reason });
            }
            // Damaged bytes may be replaced, by those that have the recorded value.
            let damage = shared.damage(file);
            let write = |chunk: &u64| !live.has(*chunk) || damage.covers(*chunk..*chunk + 1);
            let chunks: Vec<u64> = run.range().filter(write).collect();
            live.claims.take(run.range(), chunks, now, shared.options.stall)
        };
        match turn {
            Turn::Taken(claim) => {
                shared.writers.fetch_add(1, Ordering::AcqRel);
                let seat = Seat { shared: shared.clone(), entry: entry.clone(), claim, _memory: memory };
                return Ok(S3RunWriter {
                    seat,
                    run,
                    tenant,
                    len,
                    body: BytesMut::with_capacity(len as usize),
                    hasher: ChunkHasher::new(run.start()),
                    values: Vec::with_capacity(run.count() as usize),
                    broken: None,
                });
            }
            Turn::Wait(until) => {
                let patience =
                    until.map_or(ASK_AGAIN, |until| until.saturating_duration_since(Instant::now()));
                let _ = tokio::time::timeout(patience.min(ASK_AGAIN), released).await;
            }
        }
    }
}

impl Seat {
    /// Why the claim does not stand any more.
    fn lost(&self) -> StoreError {
        if lock(&self.entry.live).state.dropped {
            StoreError::Dropped(self.entry.file)
        } else {
            StoreError::ClaimLost
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut live = lock(&self.entry.live);
        live.claims.release(self.claim);
        drop(live);
        self.entry.released.notify_waiters();
        self.shared.writers.fetch_sub(1, Ordering::AcqRel);
        self.shared.writer_done.notify_waiters();
    }
}

impl S3RunWriter {
    fn take(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let got = self.body.len() as u64 + bytes.len() as u64;
        if got > self.len {
            return Err(StoreError::Length { expected: self.len, got });
        }
        if !lock(&self.seat.entry.live).claims.progress(self.seat.claim, Instant::now()) {
            return Err(self.seat.lost());
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let at = self.body.len() as u64;
            let room = (CHUNK_LEN - at % CHUNK_LEN) as usize;
            let (part, later) = rest.split_at(room.min(rest.len()));
            self.hasher.update(part);
            self.body.extend_from_slice(part);
            rest = later;
            let at = self.body.len() as u64;
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
}

#[async_trait]
impl RunWriter for S3RunWriter {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let taken = self.take(&bytes);
        if let Err(error) = &taken {
            self.broken = Some(error.clone());
        }
        taken
    }

    async fn finish(self: Box<Self>, expected: Option<&[ChainingValue]>) -> Result<RunReceipt, StoreError> {
        let Self { seat, run, tenant, len, body, values, broken, .. } = *self;
        if let Some(error) = broken {
            return Err(error);
        }
        if body.len() as u64 != len {
            return Err(StoreError::Length { expected: len, got: body.len() as u64 });
        }
        if let Some(expected) = expected {
            crate::check_expected(run, &values, expected)?;
        }
        if !lock(&seat.entry.live).claims.commit(seat.claim) {
            return Err(seat.lost());
        }
        let finishing = Finishing { run, tenant, len, values };
        let shared = seat.shared.clone();
        shared.to_its_end(finishing.record(seat, body.freeze())).await
    }
}

/// A run of which all bytes have come.
struct Finishing {
    run: Run,
    tenant: TenantId,
    len: u64,
    values: Vec<ChainingValue>,
}

impl Finishing {
    /// Compares what has a record, and makes the run durable and registers it if anything has none.
    async fn record(self, seat: Seat, body: Bytes) -> Result<RunReceipt, StoreError> {
        let (shared, entry) = (seat.shared.clone(), seat.entry.clone());
        let damage = shared.damage(entry.file);
        let is_damaged = |chunk: u64| damage.covers(chunk..chunk + 1);
        let held = match shared.values(&entry, self.run.range()).await {
            Ok(held) => held,
            Err(StoreError::NoFile(_)) => vec![None; self.values.len()],
            Err(error) => return Err(error),
        };
        let mut new_chunks = 0;
        for ((chunk, held), got) in self.run.range().zip(&held).zip(&self.values) {
            match held {
                Some(held) if held != got => {
                    let index = self.run.index(chunk - self.run.start().number());
                    return Err(StoreError::ChunkConflict { index, held: *held, got: *got });
                }
                Some(_) if !is_damaged(chunk) => {}
                Some(_) | None => new_chunks += 1,
            }
        }
        let mends: Vec<u64> = self.run.range().filter(|chunk| is_damaged(*chunk)).collect();
        if new_chunks > 0 {
            let piece = Piece::new(self.run, self.len, &self.values)
                .ok_or(StoreError::Length { expected: self.run.count() * CHUNK_LEN, got: self.len })?;
            let life = self.prepare(&shared, &entry).await?;
            self.put(&shared, &entry, life, &piece, body).await?;
            self.register(&seat, life, &piece)?;
            self.unvoid(&shared, &entry, &piece).await?;
            if !mends.is_empty() {
                shared.mend(&entry, mends, piece.name()).await?;
            }
        } else if !lock(&entry.live).claims.stands(seat.claim) {
            return Err(seat.lost());
        }
        Ok(RunReceipt { values: self.values, new_chunks })
    }

    /// Makes sure that the file is known, and that nothing which may be there contradicts the run. The life that it is
    /// part of.
    async fn prepare(&self, shared: &Arc<Shared>, entry: &Arc<Entry>) -> Result<Life, StoreError> {
        let (file, tenant) = (entry.file, self.tenant);
        let (range, values) = (self.run.range(), self.values.clone());
        shared
            .change_here(entry, move |live, _| {
                if live.state.dropped {
                    return Err(StoreError::Dropped(file));
                }
                let mut state = live.state.clone();
                if !state.is_known() {
                    (state.tenant, state.life) = (Some(tenant), Life::begin());
                }
                // It is not in one record any more.
                state.in_lists = false;
                for (chunk, value) in range.zip(&values) {
                    // What has a record agrees already; what has none may be disputed, or land yet.
                    live.avoid(&mut state, chunk, Some(*value));
                }
                let life = state.life;
                Ok(if state == live.state {
                    Plan::Known(life)
                } else {
                    Plan::Write(Box::new(state), Gone::Nothing, life)
                })
            })
            .await
    }

    async fn put(
        &self,
        shared: &Arc<Shared>,
        entry: &Arc<Entry>,
        life: Life,
        piece: &Piece,
        body: Bytes,
    ) -> Result<(), StoreError> {
        let key = keys::incoming(entry.file, life, self.run, &self.values);
        if shared.is_leaving(&key) {
            let reason = "an earlier object of the same name is being deleted".into();
            return Err(StoreError::Io { operation: S3Request::Put.name().into(), reason });
        }
        match shared.bucket.put(&key, body).await {
            Ok(_) => Ok(()),
            Err(BucketError::Unknown(reason)) => {
                // Perhaps only the answer was lost.
                if matches!(shared.bucket.head(&key).await, Ok(len) if len == self.len) {
                    return Ok(());
                }
                let mut live = lock(&entry.live);
                if live.state.life == life {
                    live.doubtful.insert(piece.name(), (piece.clone(), Instant::now()));
                }
                drop(live);
                Err(StoreError::Io { operation: S3Request::Put.name().into(), reason })
            }
            Err(error) => Err(error.in_store(S3Request::Put)),
        }
    }

    /// The object is there: from now on its chunks have a record, unless they may not have one any more.
    fn register(&self, seat: &Seat, life: Life, piece: &Piece) -> Result<(), StoreError> {
        let mut live = lock(&seat.entry.live);
        let stands = live.claims.stands(seat.claim) && live.state.life == life && !live.state.dropped;
        let fits = live.state.geometry().map(|geometry| geometry.run(self.run.start(), self.len));
        let refused = match fits {
            Some(Err(error)) => Some(error.into()),
            Some(Ok(_)) | None => None,
        };
        if stands && refused.is_none() {
            live.doubtful.remove(&piece.name());
            live.pieces.add(piece.clone());
            return Ok(());
        }
        // It is there and nobody was told: what comes instead must contradict nothing.
        if live.state.life == life && !live.state.dropped {
            live.doubtful.insert(piece.name(), (piece.clone(), Instant::now()));
        }
        drop(live);
        Err(refused.unwrap_or_else(|| seat.lost()))
    }

    /// Lets chunks of this run count again that were lost before: their bytes have just been written.
    async fn unvoid(
        &self,
        shared: &Arc<Shared>,
        entry: &Arc<Entry>,
        piece: &Piece,
    ) -> Result<(), StoreError> {
        let name = piece.name();
        if !lock(&entry.live).state.void.contains_key(&name) {
            return Ok(());
        }
        shared
            .change_here(entry, move |live, _| {
                let mut state = live.state.clone();
                state.void.remove(&name);
                Ok(Plan::Write(Box::new(state), Gone::Nothing, ()))
            })
            .await
    }
}
