//! Reading: values, chunks, whole files. What is returned was verified against its record.
//!
//! While a request is under way the file may be assembled, freed or lost. If what is read is not there or not sound, and
//! meanwhile the chunk has another place, the answer is sought again there.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::limits::{CHUNK_LEN, SEGMENT_CHUNKS, SEGMENT_LEVEL};
use sluice_engine::ranges::Ranges;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{SpanTree, merge_chunks};

use super::bucket::{Bucket, BucketError, S3Request, add};
use super::entry::{Entry, Source};
use super::file::Assembled;
use super::keys::{self, Life};
use super::shared::Shared;
use super::{lock, values};
use crate::{StoreError, Together};

/// How often an answer is sought while chunks of the file come and go.
const ATTEMPTS: usize = 4;

/// Some bytes of an object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent<'a> {
    /// Its key.
    pub(crate) key: &'a str,
    /// Where they begin.
    pub(crate) start: u64,
    /// Where they end.
    pub(crate) end: u64,
}

impl<'a> Extent<'a> {
    /// These of its bytes.
    pub(crate) fn new(key: &'a str, bytes: &Range<u64>) -> Self {
        Self { key, start: bytes.start, end: bytes.end }
    }

    /// All of them, if each begins where the one before ends.
    pub(crate) fn joined(extents: impl IntoIterator<Item = Self>) -> Option<Self> {
        let mut extents = extents.into_iter();
        let first = extents.next()?;
        extents.try_fold(first, |all, next| {
            (next.key == all.key && next.start == all.end).then_some(Self { end: next.end, ..all })
        })
    }
}

impl Bucket {
    /// The bytes of the chunks that have these values, from `first` on, out of an object; `None` if they are not there, or do
    /// not hash to them.
    pub(crate) async fn chunks(
        &self,
        first: ChunkIndex,
        values: &[ChainingValue],
        extent: Extent<'_>,
    ) -> Result<Option<Bytes>, StoreError> {
        let bytes = match self.get_range(extent.key, extent.start..extent.end).await {
            Ok(bytes) => bytes,
            Err(BucketError::NotFound) => return Ok(None),
            Err(error) => return Err(error.in_store(S3Request::Get)),
        };
        let mut rest = &bytes[..];
        for (number, value) in (first.number()..).zip(values) {
            let index = ChunkIndex::new(number)?;
            let (chunk, after) = rest.split_at(rest.len().min(CHUNK_LEN as usize));
            if ChainingValue::of_chunk(index, chunk) != Some(*value) {
                return Ok(None);
            }
            rest = after;
            if !rest.is_empty() {
                // Others want the processor, too.
                tokio::task::yield_now().await;
            }
        }
        if !rest.is_empty() || bytes.len() as u64 != extent.end - extent.start {
            return Ok(None);
        }
        Ok(Some(bytes))
    }
}

impl Shared {
    /// The recorded value of each chunk in `range`.
    pub(crate) async fn values(
        &self,
        entry: &Entry,
        range: Range<u64>,
    ) -> Result<Vec<Option<ChainingValue>>, StoreError> {
        for _ in 1..ATTEMPTS {
            let losses = lock(&entry.live).losses;
            match self.values_once(entry, range.clone()).await {
                Err(StoreError::Corrupt { .. }) if lock(&entry.live).losses != losses => {}
                result => return result,
            }
        }
        self.values_once(entry, range).await
    }

    async fn values_once(
        &self,
        entry: &Entry,
        range: Range<u64>,
    ) -> Result<Vec<Option<ChainingValue>>, StoreError> {
        let mut found = vec![None; (range.end - range.start) as usize];
        let mut wanted: Vec<(u64, u64)> = Vec::new();
        let (life, whole) = {
            let live = lock(&entry.live);
            for (place, chunk) in found.iter_mut().zip(range.clone()) {
                let index = ChunkIndex::new(chunk)?;
                match live.source(entry.file, index) {
                    Ok(Source { value: Some(value), .. }) => *place = Some(value),
                    Ok(Source { value: None, segment, .. }) => {
                        wanted.extend(segment.map(|segment| (chunk, segment)))
                    }
                    Err(StoreError::Missing { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            (live.state.life, live.state.assembled.clone())
        };
        let Some(whole) = whole else { return Ok(found) };
        for chunks in wanted.chunk_by(|(_, one), (_, other)| one == other) {
            let segment = chunks[0].1;
            let values = self.segment(entry, life, &whole, segment).await?;
            let first = whole.segment(segment).start;
            for (chunk, _) in chunks {
                found[(chunk - range.start) as usize] = values.get((chunk - first) as usize).copied();
            }
        }
        Ok(found)
    }

    /// The values of a segment that was assembled.
    pub(crate) async fn segment(
        &self,
        entry: &Entry,
        life: Life,
        whole: &Assembled,
        segment: u64,
    ) -> Result<Arc<[ChainingValue]>, StoreError> {
        let key = (entry.file, life, segment);
        if let Some(values) = self.segments.get(&key) {
            return Ok(values);
        }
        let values = self.read_segment(entry, life, whole, segment).await?;
        self.segments.insert(key, values.clone());
        Ok(values)
    }

    async fn read_segment(
        &self,
        entry: &Entry,
        life: Life,
        whole: &Assembled,
        segment: u64,
    ) -> Result<Arc<[ChainingValue]>, StoreError> {
        let chunks = whole.segment(segment);
        let count = chunks.end - chunks.start;
        let corrupt = || {
            let index = ChunkIndex::new(chunks.start);
            index.map_or_else(StoreError::from, |index| StoreError::Corrupt { file: entry.file, index })
        };
        if let Some(only) = whole.only {
            return Ok([only].into());
        }
        let key = keys::values(entry.file, life, whole.root, segment);
        let bytes = match self.bucket.get(&key, values::len(count)).await {
            Ok(bytes) => bytes,
            Err(BucketError::NotFound) => return Err(corrupt()),
            Err(error) => return Err(error.in_store(S3Request::Get)),
        };
        match values::decode(entry.file, whole.root, segment, count, &bytes) {
            Ok(values) => Ok(values.into()),
            Err(error) => {
                add(&self.bucket.counters.integrity_failures, 1);
                tracing::error!(file = %entry.file, segment, %error, "the values of a segment cannot be read");
                Err(corrupt())
            }
        }
    }

    /// The bytes of a chunk, verified, unless it is known to be damaged.
    pub(crate) async fn read_chunk(&self, entry: &Entry, index: ChunkIndex) -> Result<Bytes, StoreError> {
        let chunk = index.number();
        if self.damage(entry.file).covers(chunk..chunk + 1) {
            // Missing, if it went meanwhile.
            lock(&entry.live).source(entry.file, index)?;
            return Err(StoreError::Corrupt { file: entry.file, index });
        }
        self.bytes(entry, index).await
    }

    /// The bytes of consecutive chunks that lie beside each other in one object, verified; `None` if they do not, or if one of
    /// them is not there, or not sound.
    pub(crate) async fn read_together(
        &self,
        entry: &Entry,
        chunks: Range<u64>,
    ) -> Result<Option<Together>, StoreError> {
        let mut wanted = Ranges::new();
        wanted.insert(chunks.clone());
        if !self.damage(entry.file).common(&wanted).is_empty() {
            return Ok(None);
        }
        let values: Option<Vec<ChainingValue>> =
            self.values(entry, chunks.clone()).await?.into_iter().collect();
        let sources = {
            let live = lock(&entry.live);
            let source = |chunk| live.source(entry.file, ChunkIndex::new(chunk)?);
            chunks.clone().map(source).collect::<Result<Vec<_>, _>>()
        };
        let (Some(values), Ok(sources)) = (values, sources) else { return Ok(None) };
        let extents = sources.iter().map(|source| Extent::new(&source.key, &source.bytes));
        let Some(extent) = Extent::joined(extents) else { return Ok(None) };
        let bytes = self.bucket.chunks(ChunkIndex::new(chunks.start)?, &values, extent).await?;
        Ok(bytes.map(|bytes| Together { bytes, values }))
    }

    /// The bytes of a chunk, verified, whatever was known of them before.
    pub(crate) async fn bytes(&self, entry: &Entry, index: ChunkIndex) -> Result<Bytes, StoreError> {
        let mut last: Option<Source> = None;
        for _ in 0..ATTEMPTS {
            let source = lock(&entry.live).source(entry.file, index)?;
            if last.as_ref() == Some(&source) {
                break;
            }
            match self.bytes_of(entry, index, &source).await {
                Err(StoreError::Corrupt { .. }) => last = Some(source),
                result => return result,
            }
        }
        add(&self.bucket.counters.integrity_failures, 1);
        tracing::error!(file = %entry.file, %index, "a chunk does not hash to its value");
        Err(StoreError::Corrupt { file: entry.file, index })
    }

    async fn bytes_of(&self, entry: &Entry, index: ChunkIndex, source: &Source) -> Result<Bytes, StoreError> {
        let corrupt = StoreError::Corrupt { file: entry.file, index };
        let value = match source.value {
            Some(value) => value,
            None => {
                let chunk = index.number();
                let found = self.values(entry, chunk..chunk + 1).await?;
                found.first().copied().flatten().ok_or(StoreError::Missing { index })?
            }
        };
        let extent = Extent::new(&source.key, &source.bytes);
        self.bucket.chunks(index, &[value], extent).await?.ok_or(corrupt)
    }

    /// Hashes a chunk as the bucket gives it back now; its length. What is damaged is marked, what is sound again loses its
    /// mark.
    pub(crate) async fn verify(
        self: &Arc<Self>,
        entry: &Entry,
        index: ChunkIndex,
    ) -> Result<u64, StoreError> {
        let (file, chunk) = (entry.file, index.number());
        let read = self.bytes(entry, index).await;
        let damaged = match &read {
            Ok(_) | Err(StoreError::Missing { .. } | StoreError::NoFile(_) | StoreError::Dropped(_)) => false,
            Err(StoreError::Corrupt { .. }) => true,
            Err(_) => return read.map(|bytes| bytes.len() as u64),
        };
        if self.damage(file).covers(chunk..chunk + 1) != damaged {
            self.mark(file, chunk..chunk + 1, damaged).await;
        }
        read.map(|bytes| bytes.len() as u64)
    }

    /// The root of the recorded chunks, and their values by segment of `segment_chunks`, handed to `each`; `None` if one
    /// is missing.
    pub(crate) async fn root(&self, entry: &Entry, geometry: Geometry) -> Result<Option<Root>, StoreError> {
        if geometry.chunks() == 1 {
            let index = ChunkIndex::new(0)?;
            return match self.read_chunk(entry, index).await {
                Ok(bytes) => Ok(Some(Root::of_bytes(&bytes))),
                Err(StoreError::Missing { .. }) => Ok(None),
                Err(error) => Err(error),
            };
        }
        let mut tree = SpanTree::new(geometry);
        let mut start = 0;
        while start < geometry.chunks() {
            let end = (start + SEGMENT_CHUNKS).min(geometry.chunks());
            let values: Option<Vec<ChainingValue>> =
                self.values(entry, start..end).await?.into_iter().collect();
            let Some(values) = values else { return Ok(None) };
            for place in Place::tile(start..end, SEGMENT_LEVEL, geometry) {
                let range = place.range(geometry);
                let part = &values[(range.start - start) as usize..(range.end - start) as usize];
                let Some(value) = merge_chunks(geometry, place, part) else { return Ok(None) };
                // The tree is new and the places do not overlap, so nothing can contradict.
                let _ = tree.insert(Span::new(place, value));
            }
            start = end;
        }
        Ok(tree.root())
    }

    /// Checks that a published file is what it was when it was published: its objects have their lengths, and the values
    /// that the bucket gives back now merge to the root.
    pub(crate) async fn recheck(&self, entry: &Entry) -> Result<Root, StoreError> {
        let (life, whole) = {
            let live = lock(&entry.live);
            match live.state.published() {
                Some(whole) => (live.state.life, whole.clone()),
                None if live.state.dropped => return Err(StoreError::Dropped(entry.file)),
                None => return Err(StoreError::NoFile(entry.file)),
            }
        };
        if let Some(damaged) = self.damage(entry.file).iter().next() {
            return Err(StoreError::Corrupt { file: entry.file, index: ChunkIndex::new(damaged.start)? });
        }
        for segment in 0..whole.segments().max(1) {
            self.check_length(entry, life, &whole, segment).await?;
            self.segments.remove(&(entry.file, life, segment));
        }
        match self.root(entry, whole.geometry).await? {
            Some(got) if got == whole.root => Ok(got),
            got => Err(StoreError::WrongRoot { expected: whole.root, got }),
        }
    }

    /// Checks that the object of a segment is as long as the segment.
    pub(crate) async fn check_length(
        &self,
        entry: &Entry,
        life: Life,
        whole: &Assembled,
        segment: u64,
    ) -> Result<(), StoreError> {
        let chunks = whole.segment(segment);
        let expected = whole.geometry.range_len(chunks.start, chunks.end);
        let got = match self.bucket.head(&keys::assembled(entry.file, life, whole.root, segment)).await {
            Ok(len) => Some(len),
            Err(BucketError::NotFound) => None,
            Err(error) => return Err(error.in_store(S3Request::Head)),
        };
        if got == Some(expected) {
            return Ok(());
        }
        add(&self.bucket.counters.integrity_failures, 1);
        tracing::error!(file = %entry.file, segment, expected, ?got, "a segment has another length");
        Err(StoreError::Corrupt { file: entry.file, index: ChunkIndex::new(chunks.start)? })
    }
}
