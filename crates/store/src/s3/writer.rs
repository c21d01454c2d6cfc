//! Writing a run here: memory, claim, bytes hashed as they arrive, one object, registration (`recording.rs`).
//!
//! Memory for the whole run is had before the claim, and the claim before the first byte: whoever waits holds up nobody who
//! has both. From [`finish`](RunWriter::finish) on the run goes to its end by itself, whether or not anybody waits for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use sluice_engine::geometry::{GeometryError, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{FileId, TenantId};
use sluice_engine::limits::CHUNK_LEN;
use tokio::sync::OwnedSemaphorePermit;

use super::body::{self, Body};
use super::bucket::S3Request;
use super::entry::{Entry, Live, MAX_DOUBTFUL};
use super::lock;
use super::recording::Recording;
use super::shared::Shared;
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
    body: Body,
    spends: Spends,
}

/// The memory of a run that is written here. A store that closes waits for these.
#[derive(Debug)]
struct Spends {
    shared: Arc<Shared>,
    _memory: OwnedSemaphorePermit,
}

impl Drop for Spends {
    fn drop(&mut self) {
        self.shared.writers.fetch_sub(1, Ordering::AcqRel);
        self.shared.writer_done.notify_waiters();
    }
}

/// A writer's hold on its file. Dropping it gives the claim up.
#[derive(Debug)]
pub(crate) struct Seat {
    entry: Arc<Entry>,
    claim: ClaimId,
}

/// Checks a run against what is known of its file.
pub(crate) fn check(live: &Live, file: FileId, run: Run, len: u64) -> Result<(), StoreError> {
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
    let memory = body::memory(&shared.bodies, &shared.bucket, len).await?;
    let seat = Seat::take(shared, entry, run, len).await?;
    shared.writers.fetch_add(1, Ordering::AcqRel);
    let spends = Spends { shared: shared.clone(), _memory: memory };
    Ok(S3RunWriter { seat, run, tenant, body: Body::new(run, len), spends })
}

impl Seat {
    /// Waits until nobody else writes a chunk of the run, and claims it.
    pub(crate) async fn take(
        shared: &Arc<Shared>,
        entry: Arc<Entry>,
        run: Run,
        len: u64,
    ) -> Result<Self, StoreError> {
        let file = entry.file;
        loop {
            shared.open()?;
            shared.give_up_late_porters(Instant::now());
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
                    return Ok(Self { entry: entry.clone(), claim });
                }
                Turn::Wait(until) => {
                    let patience =
                        until.map_or(ASK_AGAIN, |until| until.saturating_duration_since(Instant::now()));
                    let _ = tokio::time::timeout(patience.min(ASK_AGAIN), released).await;
                }
            }
        }
    }

    /// The file.
    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// Notes that bytes came.
    fn progress(&self) -> Result<(), StoreError> {
        let stands = lock(&self.entry.live).claims.progress(self.claim, Instant::now());
        if stands { Ok(()) } else { Err(self.lost()) }
    }

    /// From now on nobody takes the claim over.
    pub(crate) fn commit(&self) -> Result<(), StoreError> {
        let stands = lock(&self.entry.live).claims.commit(self.claim);
        if stands { Ok(()) } else { Err(self.lost()) }
    }

    /// Whether the claim still stands.
    pub(crate) fn stands(&self, live: &Live) -> bool {
        live.claims.stands(self.claim)
    }

    /// Why it does not stand any more.
    pub(crate) fn lost(&self) -> StoreError {
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
    }
}

#[async_trait]
impl RunWriter for S3RunWriter {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        match self.seat.progress() {
            Ok(()) => self.body.take(&bytes),
            Err(lost) => Err(self.body.breaks(lost)),
        }
    }

    async fn finish(self: Box<Self>, expected: Option<&[ChainingValue]>) -> Result<RunReceipt, StoreError> {
        let Self { seat, run, tenant, body, spends } = *self;
        let (bytes, values) = body.whole(expected)?;
        seat.commit()?;
        let recording = Recording { run, tenant, len: bytes.len() as u64, values };
        let shared = spends.shared.clone();
        let work = async move {
            let receipt = record(&spends.shared, &seat, recording, bytes).await;
            // In this order: whoever waits for the store to close finds the claim given up.
            drop(seat);
            drop(spends);
            receipt
        };
        shared.to_its_end(work).await
    }
}

/// Compares what has a record, and makes the run durable and registers it if anything has none.
async fn record(
    shared: &Arc<Shared>,
    seat: &Seat,
    recording: Recording,
    bytes: Bytes,
) -> Result<RunReceipt, StoreError> {
    let agreed = recording.agree(shared, seat).await?;
    let new_chunks = agreed.as_ref().map_or(0, |agreed| agreed.new_chunks);
    if let Some(agreed) = agreed {
        let (landed, put) = body::put(&shared.bucket, &agreed.key, bytes).await;
        let settled = agreed.settle(shared, seat, landed).await;
        put?;
        settled?;
    }
    Ok(RunReceipt { values: recording.values, new_chunks })
}
