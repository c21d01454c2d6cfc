//! Writing a run: claim, bytes to disk as they arrive, record.
//!
//! Bytes are gathered up to 32 KiB, unless they come in larger pieces, then hashed and written in one hop to the blocking pool. The hop holds the claim
//! busy; when the writer is dropped meanwhile, the claim goes when the hop returns, not before.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use sluice_engine::geometry::{ChunkIndex, GeometryError, Run};
use sluice_engine::hash::{ChainingValue, ChunkHasher};
use sluice_engine::ids::{FileId, TenantId};
use sluice_engine::limits::{CHUNK_LEN, SEGMENT_CHUNKS};

use super::change::Chunk;
use super::committer::Task;
use super::disk::{DiskFile, Open};
use super::entry::{Entry, Name};
use super::janitor::Chore;
use super::lock;
use super::request::Request;
use super::shared::Shared;
use crate::claims::{ClaimId, Turn};
use crate::{RunReceipt, RunWriter, StoreError};

/// The most bytes that a writer gathers before they are written.
const GATHER: usize = 32 << 10;

/// Pieces below this are copied together; larger ones are kept as they came.
const SMALL: usize = 4 << 10;

/// How long a run that waits goes without asking whether the store still takes work.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// A run that is being written.
#[derive(Debug)]
pub(crate) struct FsRunWriter {
    seat: Seat,
    run: Run,
    tenant: TenantId,
    len: u64,
    taken: u64,
    pieces: Vec<Bytes>,
    tail: BytesMut,
    gathered: usize,
    /// `None` while a hop is on its way, and for good if it was not waited for.
    hashing: Option<Hashing>,
    broken: Option<StoreError>,
}

/// A writer's hold on its file. Dropping it gives the claim up.
#[derive(Debug)]
struct Seat {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    claim: ClaimId,
    epoch: u64,
}

/// How far a run has come.
#[derive(Debug)]
struct Hashing {
    run: Run,
    len: u64,
    at: u64,
    hasher: ChunkHasher,
    values: Vec<ChainingValue>,
    /// Per chunk of the run.
    fates: Vec<Fate>,
    /// What came of a damaged chunk.
    held: Vec<u8>,
    data: Option<Arc<dyn DiskFile>>,
}

/// What becomes of the bytes of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// They are written as they come: nothing is recorded of the chunk.
    Written,
    /// They are compared with the record.
    Compared,
    /// They are kept until they have proven to be those that were recorded, and replace what is damaged. What the device
    /// did not give back it may give back yet, so that nothing else replaces it.
    Mending,
}

/// A hop on the blocking pool; while it lives the claim is busy.
struct Hop {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    claim: ClaimId,
    epoch: u64,
}

/// Checks the run against the file, waits for its turn, and claims it.
pub(crate) async fn begin(
    shared: &Arc<Shared>,
    file: FileId,
    tenant: TenantId,
    run: Run,
    len: u64,
) -> Result<FsRunWriter, StoreError> {
    let entry = shared.entry(file).await?;
    loop {
        shared.writable()?;
        let room = shared.room(len);
        let released = entry.released.notified();
        tokio::pin!(released);
        released.as_mut().enable();
        let turn = {
            let mut live = lock(&entry.live);
            if live.state.dropped {
                return Err(StoreError::Dropped(file));
            }
            let expected = match live.state.geometry() {
                Some(geometry) => geometry.run(run.start(), len)?,
                None => Run::from_len(run.start(), len)?,
            };
            if expected != run {
                let expected = run.count() * CHUNK_LEN;
                return Err(GeometryError::Length { expected, got: len }.into());
            }
            let fate = |chunk| match live.state.has(chunk) {
                false => Fate::Written,
                true if shared.damage.has(file, chunk) => Fate::Mending,
                true => Fate::Compared,
            };
            let fates: Vec<Fate> = run.range().map(fate).collect();
            let chunks: Vec<u64> = run
                .range()
                .zip(&fates)
                .filter(|(_, fate)| **fate != Fate::Compared)
                .map(|(chunk, _)| chunk)
                .collect();
            if !chunks.is_empty() {
                room?;
            }
            let turn = live.claims.take(run.range(), chunks, Instant::now(), shared.options.stall);
            match turn {
                Turn::Taken(claim) => Ok((claim, live.epoch, fates)),
                Turn::Wait(until) => Err(until),
            }
        };
        match turn {
            Ok((claim, epoch, fates)) => {
                shared.writers.open.fetch_add(1, Ordering::AcqRel);
                let seat = Seat { shared: shared.clone(), entry: entry.clone(), claim, epoch };
                return Ok(FsRunWriter::new(seat, run, tenant, len, fates));
            }
            Err(until) => {
                let patience =
                    until.map_or(ASK_AGAIN, |until| until.saturating_duration_since(Instant::now()));
                let _ = tokio::time::timeout(patience.min(ASK_AGAIN), released).await;
            }
        }
    }
}

impl FsRunWriter {
    fn new(seat: Seat, run: Run, tenant: TenantId, len: u64, fates: Vec<Fate>) -> Self {
        let hashing = Hashing {
            run,
            len,
            at: 0,
            hasher: ChunkHasher::new(run.start()),
            values: Vec::with_capacity(run.count() as usize),
            fates,
            held: Vec::new(),
            data: None,
        };
        Self {
            seat,
            run,
            tenant,
            len,
            taken: 0,
            pieces: Vec::new(),
            tail: BytesMut::new(),
            gathered: 0,
            hashing: Some(hashing),
            broken: None,
        }
    }

    fn gather(&mut self, bytes: Bytes) {
        self.taken += bytes.len() as u64;
        self.gathered += bytes.len();
        if bytes.len() < SMALL {
            self.tail.extend_from_slice(&bytes);
        } else {
            if !self.tail.is_empty() {
                self.pieces.push(self.tail.split().freeze());
            }
            self.pieces.push(bytes);
        }
    }

    /// Hashes and writes what was gathered.
    async fn hop(&mut self) -> Result<(), StoreError> {
        if !self.tail.is_empty() {
            self.pieces.push(self.tail.split().freeze());
        }
        let pieces = std::mem::take(&mut self.pieces);
        self.gathered = 0;
        let mut hashing = self.hashing.take().ok_or(StoreError::Io {
            operation: "writing a run".into(),
            reason: "an earlier write of this run was given up half-way".into(),
        })?;
        let hop = self.seat.hop()?;
        let done = self.seat.shared.blocking(move |shared| {
            let result = hashing.take_pieces(shared, &hop, &pieces);
            drop(hop);
            result.map(|()| hashing)
        });
        self.hashing = Some(done.await?);
        Ok(())
    }

    async fn finish_run(&mut self, expected: Option<&[ChainingValue]>) -> Result<RunReceipt, StoreError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if self.taken != self.len {
            return Err(StoreError::Length { expected: self.len, got: self.taken });
        }
        if self.gathered > 0 {
            self.hop().await?;
        }
        let hashing = self.hashing.take().ok_or(StoreError::ClaimLost)?;
        if let Some(expected) = expected {
            crate::check_expected(self.run, &hashing.values, expected)?;
        }
        if hashing.fates.contains(&Fate::Compared) {
            self.compare(&hashing).await?;
        }
        let mut chunks = Vec::new();
        for (i, value) in hashing.values.iter().enumerate() {
            if hashing.fates[i] != Fate::Compared {
                let len = (self.len - i as u64 * CHUNK_LEN).min(CHUNK_LEN) as u32;
                chunks.push(Chunk { index: self.run.index(i as u64), len, value: *value });
            }
        }
        let receipt = RunReceipt { values: hashing.values, new_chunks: chunks.len() as u64 };
        match hashing.data {
            Some(data) if !chunks.is_empty() => self.record(chunks, data).await?,
            Some(_) | None => self.seat.stands()?,
        }
        Ok(receipt)
    }

    /// Compares the chunks that have a record.
    async fn compare(&self, hashing: &Hashing) -> Result<(), StoreError> {
        let (entry, range) = (self.seat.entry.clone(), self.run.range());
        let held = self.seat.shared.blocking(move |shared| shared.chunks(&entry, range)).await?;
        for (i, held) in held.into_iter().enumerate() {
            if hashing.fates[i] == Fate::Compared {
                same(self.run.index(i as u64), held, hashing.values[i])?;
            }
        }
        Ok(())
    }

    /// Hands the run to the committer, which releases the claim.
    async fn record(&self, chunks: Vec<Chunk>, data: Arc<dyn DiskFile>) -> Result<(), StoreError> {
        let Seat { shared, entry, claim, .. } = &self.seat;
        let request = Request::Run {
            claim: *claim,
            tenant: self.tenant,
            segment: self.run.start().number() / SEGMENT_CHUNKS,
            chunks,
            data,
        };
        // From the moment it is sent, the claim is the committer's.
        let committing = |answer| {
            lock(&entry.live).claims.commit(*claim);
            Task::Change { entry: entry.clone(), request, answer }
        };
        shared.submit(committing).await.map(|_| ())
    }
}

#[async_trait]
impl RunWriter for FsRunWriter {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let total = self.taken + bytes.len() as u64;
        let result = if total > self.len {
            Err(StoreError::Length { expected: self.len, got: total })
        } else {
            self.seat.progress().map(|()| self.gather(bytes))
        };
        let result = match result {
            Ok(()) if self.gathered >= GATHER => self.hop().await,
            result => result,
        };
        if let Err(error) = &result {
            self.broken = Some(error.clone());
        }
        result
    }

    async fn finish(
        mut self: Box<Self>,
        expected: Option<&[ChainingValue]>,
    ) -> Result<RunReceipt, StoreError> {
        self.finish_run(expected).await
    }
}

impl Seat {
    fn lost(&self) -> StoreError {
        lost(&self.entry)
    }

    fn stands(&self) -> Result<(), StoreError> {
        let stands = lock(&self.entry.live).claims.stands(self.claim);
        if stands { Ok(()) } else { Err(self.lost()) }
    }

    fn progress(&self) -> Result<(), StoreError> {
        let stands = lock(&self.entry.live).claims.progress(self.claim, Instant::now());
        if stands { Ok(()) } else { Err(self.lost()) }
    }

    fn hop(&self) -> Result<Hop, StoreError> {
        let entered = lock(&self.entry.live).claims.enter(self.claim, Instant::now());
        if !entered {
            return Err(self.lost());
        }
        let Self { shared, entry, claim, epoch } = self;
        Ok(Hop { shared: shared.clone(), entry: entry.clone(), claim: *claim, epoch: *epoch })
    }
}

/// Why a claim on chunks of a file does not stand any more.
fn lost(entry: &Entry) -> StoreError {
    if lock(&entry.live).state.dropped { StoreError::Dropped(entry.file) } else { StoreError::ClaimLost }
}

/// Whether a chunk has the value that is recorded of it.
fn same(index: ChunkIndex, held: Option<Chunk>, got: ChainingValue) -> Result<(), StoreError> {
    match held {
        Some(held) if held.value == got => Ok(()),
        Some(held) => Err(StoreError::ChunkConflict { index, held: held.value, got }),
        // It went since the run began; the next attempt writes it.
        None => Err(StoreError::ClaimLost),
    }
}

/// Has the chunks of a file swept away if nothing of it is known and nobody writes it.
fn sweep_if_unknown(shared: &Shared, entry: &Entry) {
    let unknown = {
        let live = lock(&entry.live);
        !live.state.is_known() && live.claims.is_empty()
    };
    if unknown {
        shared.chore(Chore::Sweep(entry.file));
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.entry.live).claims.abandon(self.claim);
        self.entry.released.notify_waiters();
        sweep_if_unknown(&self.shared, &self.entry);
        self.shared.writers.open.fetch_sub(1, Ordering::AcqRel);
        self.shared.writers.done.notify_waiters();
    }
}

impl Drop for Hop {
    fn drop(&mut self) {
        lock(&self.entry.live).claims.leave(self.claim, Instant::now());
        self.entry.released.notify_waiters();
        sweep_if_unknown(&self.shared, &self.entry);
    }
}

impl Hashing {
    /// Hashes pieces, and writes those that are to be written. Blocks.
    fn take_pieces(&mut self, shared: &Shared, hop: &Hop, pieces: &[Bytes]) -> Result<(), StoreError> {
        for piece in pieces {
            let mut rest = &piece[..];
            while !rest.is_empty() {
                let left = CHUNK_LEN - self.at % CHUNK_LEN;
                let len = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
                let (part, after) = rest.split_at(len);
                self.take_part(shared, hop, part)?;
                rest = after;
            }
        }
        Ok(())
    }

    /// Takes bytes of one chunk.
    fn take_part(&mut self, shared: &Shared, hop: &Hop, part: &[u8]) -> Result<(), StoreError> {
        self.hasher.update(part);
        let fate = self.fates[(self.at / CHUNK_LEN) as usize];
        match fate {
            Fate::Written => self.write(shared, hop, self.at, part)?,
            Fate::Compared => {}
            Fate::Mending => self.held.extend_from_slice(part),
        }
        self.at += part.len() as u64;
        if self.at.is_multiple_of(CHUNK_LEN) || self.at == self.len {
            self.values.extend(self.hasher.finish());
            if fate == Fate::Mending {
                self.mend(shared, hop)?;
            }
            let next = self.at / CHUNK_LEN;
            if next < self.run.count() {
                self.hasher = ChunkHasher::new(self.run.index(next));
            }
        }
        Ok(())
    }

    /// Replaces the damaged chunk that has come to its end.
    fn mend(&mut self, shared: &Shared, hop: &Hop) -> Result<(), StoreError> {
        let Some((nth, got)) = self.values.len().checked_sub(1).map(|nth| (nth as u64, self.values[nth]))
        else {
            return Ok(());
        };
        let index = self.run.index(nth);
        let recorded = shared.chunks(&hop.entry, index.number()..index.number() + 1)?;
        same(index, recorded.into_iter().next().flatten(), got)?;
        let held = std::mem::take(&mut self.held);
        self.write(shared, hop, nth * CHUNK_LEN, &held)
    }

    /// Writes bytes that begin `at` bytes into the run.
    fn write(&mut self, shared: &Shared, hop: &Hop, at: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let first = self.run.start().number();
        let offset = (first % SEGMENT_CHUNKS) * CHUNK_LEN + at;
        let data = match &self.data {
            Some(data) => data,
            None => self.data.insert(hop.open(Name::Data(first / SEGMENT_CHUNKS))?),
        };
        data.write_at(offset, bytes).map_err(|error| shared.error("writing a chunk", &error))?;
        shared.wrote(bytes.len() as u64);
        Ok(())
    }
}

impl Hop {
    /// Opens a segment, unless the file's chunks went since the run began.
    fn open(&self, name: Name) -> Result<Arc<dyn DiskFile>, StoreError> {
        let _names = lock(&self.entry.names);
        if lock(&self.entry.live).epoch != self.epoch {
            return Err(lost(&self.entry));
        }
        self.shared
            .handle(self.entry.file, self.epoch, name, Open::Create)
            .map_err(|error| self.shared.error("opening a segment", &error))
    }
}
