//! Assembly: from runs as they came to an ordinary object for each segment of the file, on the server.
//!
//! A segment is at most 8,192 parts of 8 MiB, so that it is below the limits of one object (10,000 parts, and its length);
//! a longer file has several, and what is known of the file says how they follow each other. A part that lies in one object
//! is copied on the server. Where smaller runs make up a part, or something was lost, it is put together here, with every
//! chunk verified, since S3 copies no parts below 5 MiB. Published is what is known of the file, in one write, once all
//! objects are there and have their lengths. Until then, and if that never comes, they are garbage.
//!
//! The objects' key has the root, so whoever assembles the same file makes the same objects; two at once harm nobody.

use std::ops::Range;
use std::sync::Arc;

use aws_sdk_s3::types::CompletedPart;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::ranges::Ranges;
use tokio::sync::SemaphorePermit;

use super::bucket::{BucketError, S3Request};
use super::entry::Entry;
use super::file::Assembled;
use super::keys::{self, Life};
use super::pieces::{Piece, PieceName, bit};
use super::shared::{Gone, Plan, Shared};
use super::{lock, values};
use crate::StoreError;

/// Chunks in a part.
pub(crate) const PART_CHUNKS: u64 = 8;

/// The shortest part that S3 copies, unless it is the last: not every server copies a shorter one even then.
const SHORTEST_COPY: u64 = 5 << 20;

/// Parts of a file that are under way at once.
const PARTS_AT_ONCE: usize = 8;

/// How a part comes about.
enum Part {
    /// It lies in one object.
    Copy(String, Range<u64>),
    /// It is put together from these chunks.
    Gather(Range<u64>),
}

impl Shared {
    /// Publishes a file of which every chunk is here.
    pub(crate) async fn publish(self: &Arc<Self>, entry: Arc<Entry>, root: Root) -> Result<(), StoreError> {
        self.open()?;
        let shared = self.clone();
        self.to_its_end(async move { shared.publish_here(&entry, root).await }).await
    }

    async fn publish_here(self: &Arc<Self>, entry: &Arc<Entry>, root: Root) -> Result<(), StoreError> {
        let Ok(_assembling) = entry.assembling.acquire().await else { return Err(StoreError::Closing) };
        let missing = || StoreError::WrongRoot { expected: root, got: None };
        let (geometry, life, before, losses) = {
            let live = lock(&entry.live);
            if live.state.dropped {
                return Err(StoreError::Dropped(entry.file));
            }
            if !live.state.is_known() {
                return Err(StoreError::NoFile(entry.file));
            }
            match live.state.published() {
                Some(whole) if whole.root == root => return Ok(()),
                Some(whole) => return Err(StoreError::WrongRoot { expected: root, got: Some(whole.root) }),
                None => {}
            }
            let known = live.state.geometry();
            let shape = live.shape_of_held().filter(|shape| known.is_none_or(|known| known == *shape));
            (shape.ok_or_else(missing)?, live.state.life, live.state.assembled.clone(), live.losses)
        };
        let got = self.root(entry, geometry).await?.ok_or_else(missing)?;
        if got != root {
            return Err(StoreError::WrongRoot { expected: root, got: Some(got) });
        }
        let only = match geometry.chunks() {
            1 => self.values(entry, 0..1).await?.into_iter().next().flatten(),
            _ => None,
        };
        let segment_chunks = self.options.segment_chunks;
        let whole = Assembled { geometry, root, segment_chunks, only, lost: Ranges::new() };
        for segment in 0..whole.segments().max(1) {
            let is_there = before.as_ref().is_some_and(|before| {
                let chunks = whole.segment(segment);
                before.root == root
                    && before.segment_chunks == segment_chunks
                    && !before.lost.iter().any(|lost| lost.start < chunks.end && chunks.start < lost.end)
            });
            if !is_there {
                self.assemble(entry, life, &whole, segment).await?;
            }
        }
        self.change_here(entry, |live, _| {
            if live.state.dropped {
                return Err(StoreError::Dropped(entry.file));
            }
            // What was checked must still be there.
            if live.losses != losses || live.state.life != life {
                return Err(StoreError::ClaimLost);
            }
            let mut state = live.state.clone();
            state.assembled = Some(whole);
            Ok(Plan::Write(Box::new(state), Gone::Nothing, ()))
        })
        .await?;
        self.retire(entry, life, 0..geometry.chunks());
        Ok(())
    }

    /// Deletes runs all of whose chunks are assembled.
    fn retire(self: &Arc<Self>, entry: &Entry, life: Life, chunks: Range<u64>) {
        let mut live = lock(&entry.live);
        if live.state.life != life || live.state.published().is_none() {
            return;
        }
        let is_assembled = |piece: &Piece| {
            let run = piece.run.range();
            chunks.start <= run.start && run.end <= chunks.end
        };
        let names: Vec<PieceName> =
            live.pieces.all().filter(|(_, piece)| is_assembled(piece)).map(|(name, _)| name).collect();
        let keys = names.iter().flat_map(|name| live.pieces.keys_of(*name, entry.file, life)).collect();
        for name in names {
            live.pieces.remove(name);
        }
        live.retired += 1;
        drop(live);
        self.discard(keys);
    }

    /// Lets damaged chunks count again that have just been written with a run: makes their segments again, if the file is
    /// published, or keeps other runs from being read for them.
    pub(crate) async fn mend(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        chunks: Vec<u64>,
        run: PieceName,
    ) -> Result<(), StoreError> {
        let Ok(_assembling) = entry.assembling.acquire().await else { return Err(StoreError::Closing) };
        let (life, whole) = {
            let live = lock(&entry.live);
            (live.state.life, live.state.published().cloned())
        };
        match whole {
            Some(whole) => {
                let mut segments: Vec<u64> =
                    chunks.iter().map(|chunk| chunk / whole.segment_chunks).collect();
                segments.dedup();
                for segment in segments {
                    self.assemble(entry, life, &whole, segment).await?;
                }
                for chunk in chunks {
                    self.mark(entry.file, chunk..chunk + 1, false).await;
                    let run = chunk / PART_CHUNKS * PART_CHUNKS;
                    self.retire(entry, life, run..run + PART_CHUNKS);
                }
            }
            None => {
                let void = chunks.clone();
                self.change_here(entry, move |live, _| {
                    let mut state = live.state.clone();
                    for chunk in void {
                        for (name, _) in live.pieces.of(chunk).filter(|(name, _)| *name != run) {
                            *state.void.entry(name).or_default() |= bit(name.start, chunk);
                        }
                    }
                    Ok(if state == live.state {
                        Plan::Known(())
                    } else {
                        Plan::Write(Box::new(state), Gone::Nothing, ())
                    })
                })
                .await?;
                for chunk in chunks {
                    self.mark(entry.file, chunk..chunk + 1, false).await;
                }
            }
        }
        Ok(())
    }

    /// Makes the object of a segment, and that of its values.
    async fn assemble(
        self: &Arc<Self>,
        entry: &Entry,
        life: Life,
        whole: &Assembled,
        segment: u64,
    ) -> Result<(), StoreError> {
        let key = keys::assembled(entry.file, life, whole.root, segment);
        let chunks = whole.segment(segment);
        let parts: Vec<Range<u64>> = (chunks.start..chunks.end)
            .step_by(PART_CHUNKS as usize)
            .map(|start| start..(start + PART_CHUNKS).min(chunks.end))
            .collect();
        let put = |bytes: Bytes| async {
            let put = self.bucket.put(&key, bytes).await;
            put.map(|_| ()).map_err(|error| error.in_store(S3Request::Put))
        };
        match parts.as_slice() {
            [] => put(Bytes::new()).await?,
            [only] => match self.part(entry, only.clone())? {
                Part::Gather(range) => {
                    let _memory = self.memory(whole.geometry.range_len(range.start, range.end)).await?;
                    put(self.gather(entry, whole.geometry, range).await?).await?;
                }
                Part::Copy(..) => self.upload(entry, &key, whole.geometry, parts).await?,
            },
            [..] => self.upload(entry, &key, whole.geometry, parts).await?,
        }
        // A success that was none, or a part that was lost, must not be published.
        self.check_length(entry, life, whole, segment).await?;
        if whole.only.is_none() && !chunks.is_empty() {
            let found: Option<Vec<ChainingValue>> = self.values(entry, chunks).await?.into_iter().collect();
            let found = found.ok_or(StoreError::ClaimLost)?;
            let bytes = values::encode(entry.file, whole.root, segment, &found);
            let key = keys::values(entry.file, life, whole.root, segment);
            let put = self.bucket.put(&key, Bytes::from(bytes)).await;
            put.map(|_| ()).map_err(|error| error.in_store(S3Request::Put))?;
        }
        Ok(())
    }

    /// How the part of these chunks comes about.
    fn part(&self, entry: &Entry, chunks: Range<u64>) -> Result<Part, StoreError> {
        let damage = self.damage(entry.file);
        let live = lock(&entry.live);
        let mut whole: Option<(String, Range<u64>)> = None;
        for chunk in chunks.clone() {
            let source = live.source(entry.file, ChunkIndex::new(chunk)?)?;
            // An object that is damaged in one place is read, and so verified, in all of the part.
            let follows = !damage.covers(chunk..chunk + 1)
                && match &mut whole {
                    None => {
                        whole = Some((source.key, source.bytes));
                        true
                    }
                    Some((key, bytes)) if *key == source.key && bytes.end == source.bytes.start => {
                        bytes.end = source.bytes.end;
                        true
                    }
                    Some(_) => false,
                };
            if !follows {
                return Ok(Part::Gather(chunks));
            }
        }
        Ok(match whole {
            Some((key, bytes)) if bytes.end - bytes.start >= SHORTEST_COPY => Part::Copy(key, bytes),
            Some(_) | None => Part::Gather(chunks),
        })
    }

    /// Memory for a body.
    async fn memory(&self, len: u64) -> Result<SemaphorePermit<'_>, StoreError> {
        tokio::select! {
            memory = self.bodies.acquire_many(len.div_ceil(1 << 10) as u32) => memory.map_err(|_| StoreError::Closing),
            () = self.bucket.killed() => Err(StoreError::Closing),
        }
    }

    /// The bytes of these chunks, each verified; those that lie in one object are asked for at once.
    async fn gather(&self, entry: &Entry, shape: Geometry, chunks: Range<u64>) -> Result<Bytes, StoreError> {
        let mut bytes = BytesMut::with_capacity(shape.range_len(chunks.start, chunks.end) as usize);
        let values = self.values(entry, chunks.clone()).await?;
        let mut at = chunks.start;
        while at < chunks.end {
            let mut source = lock(&entry.live).source(entry.file, ChunkIndex::new(at)?)?;
            let mut end = at + 1;
            while end < chunks.end {
                let next = lock(&entry.live).source(entry.file, ChunkIndex::new(end)?)?;
                if next.key != source.key || next.bytes.start != source.bytes.end {
                    break;
                }
                source.bytes.end = next.bytes.end;
                end += 1;
            }
            let expected = &values[(at - chunks.start) as usize..(end - chunks.start) as usize];
            match self.bucket.get_range(&source.key, source.bytes).await {
                Ok(part) if are(at, &part, expected) => bytes.extend_from_slice(&part),
                Ok(_) | Err(BucketError::NotFound) => {
                    for chunk in at..end {
                        bytes.extend_from_slice(&self.bytes(entry, ChunkIndex::new(chunk)?).await?);
                    }
                }
                Err(error) => return Err(error.in_store(S3Request::Get)),
            }
            at = end;
        }
        Ok(bytes.freeze())
    }

    /// Makes an object of parts.
    async fn upload(
        self: &Arc<Self>,
        entry: &Entry,
        key: &str,
        shape: Geometry,
        parts: Vec<Range<u64>>,
    ) -> Result<(), StoreError> {
        let upload = self.bucket.create_upload(key).await;
        let upload = Upload {
            id: upload.map_err(|error| error.in_store(S3Request::CreateUpload))?,
            key: key.to_owned(),
            shared: self.clone(),
            ended: false,
        };
        lock(&self.uploads).insert(upload.id.clone());
        let name = (key, upload.id.as_str());
        let parts: Vec<CompletedPart> = stream::iter(parts.into_iter().zip(1..))
            .map(|(chunks, number)| async move {
                match self.part(entry, chunks)? {
                    Part::Copy(source, bytes) => {
                        let copied = self.bucket.copy_part(name, number, &source, bytes).await;
                        copied.map_err(|error| error.in_store(S3Request::CopyPart))
                    }
                    Part::Gather(chunks) => {
                        let _memory = self.memory(shape.range_len(chunks.start, chunks.end)).await?;
                        let bytes = self.gather(entry, shape, chunks).await?;
                        let uploaded = self.bucket.upload_part(name, number, bytes).await;
                        uploaded.map_err(|error| error.in_store(S3Request::UploadPart))
                    }
                }
            })
            .buffered(PARTS_AT_ONCE)
            .try_collect()
            .await?;
        match self.bucket.complete_upload(name, parts).await {
            Ok(()) => {}
            // Perhaps only the answer was lost. What can still be given up was not completed, and will not be.
            Err(BucketError::Unknown(reason)) => match self.bucket.abort_upload(name).await {
                Ok(false) => tracing::debug!(%reason, "an upload was completed, and the answer was lost"),
                Ok(true) | Err(_) => {
                    return Err(StoreError::Io {
                        operation: S3Request::CompleteUpload.name().into(),
                        reason,
                    });
                }
            },
            Err(error) => return Err(error.in_store(S3Request::CompleteUpload)),
        }
        upload.completed();
        Ok(())
    }
}

/// Whether bytes are those of the chunks from `first` on that have these values.
fn are(first: u64, bytes: &[u8], values: &[Option<ChainingValue>]) -> bool {
    bytes.len().div_ceil(CHUNK_LEN as usize) == values.len()
        && bytes.chunks(CHUNK_LEN as usize).zip(values).zip(first..).all(|((bytes, value), chunk)| {
            let index = ChunkIndex::new(chunk).ok();
            index.and_then(|index| ChainingValue::of_chunk(index, bytes)) == *value && value.is_some()
        })
}

/// An upload in parts that is under way. Dropping it gives it up; one that cannot be given up now is swept later.
struct Upload {
    id: String,
    key: String,
    shared: Arc<Shared>,
    ended: bool,
}

impl Upload {
    fn completed(mut self) {
        self.ended = true;
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        lock(&self.shared.uploads).remove(&self.id);
        if !self.ended {
            let (bucket, key, id) = (self.shared.bucket.clone(), self.key.clone(), self.id.clone());
            self.shared.spawn(async move {
                if let Err(error) = bucket.abort_upload((&key, &id)).await {
                    tracing::warn!(%error, "an upload cannot be given up now");
                }
            });
        }
    }
}
