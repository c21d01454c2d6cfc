//! Reading: values, chunks, whole files. What is returned was verified against its record.
//!
//! Nothing is locked while the disk is asked. If chunks went meanwhile the answer is sought again, so that a file
//! that is freed under a reader is missing, never damaged.

use std::ops::Range;

use bytes::Bytes;
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::FileId;
use sluice_engine::limits::{CHUNK_LEN, SEGMENT_CHUNKS, SEGMENT_LEVEL};
use sluice_engine::share::Share;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{SpanTree, merge_chunks};

use super::change::{Change, Chunk, Published};
use super::disk::Open;
use super::entry::{Entry, Name};
use super::janitor::Chore;
use super::shared::{Counters, Shared};
use super::{lock, values};
use crate::StoreError;
use crate::scrub_mark;

/// Verifying drops cached pages this often, in chunks, so that the device is asked and not memory.
const FORGET_EVERY: u64 = 1 << 10;

/// How often an answer is sought while chunks of the file come and go.
const ATTEMPTS: usize = 4;

impl Shared {
    /// The records of the chunks in `range`. Blocks.
    pub(crate) fn chunks(&self, entry: &Entry, range: Range<u64>) -> Result<Vec<Option<Chunk>>, StoreError> {
        self.steadily(entry, || self.records(entry, range.clone()))
    }

    /// The bytes of a chunk. Blocks.
    pub(crate) fn read_chunk(&self, entry: &Entry, index: ChunkIndex) -> Result<Bytes, StoreError> {
        let again = self.warm.again(entry.file, index.number());
        self.steadily(entry, || self.read_once(entry, index, again))
    }

    /// Runs a read again if it failed while recorded chunks went.
    fn steadily<T>(
        &self,
        entry: &Entry,
        mut read: impl FnMut() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let losses = || lock(&entry.live).losses;
        for _ in 1..ATTEMPTS {
            let before = losses();
            match read() {
                Err(StoreError::Corrupt { .. } | StoreError::Io { .. }) if losses() != before => {}
                result => return self.counted(result),
            }
        }
        self.counted(read())
    }

    fn counted<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Corrupt { file, index }) = &result {
            Counters::add(&self.counters.integrity_failures, 1);
            tracing::error!(%file, %index, "a chunk does not hash to its value");
        }
        result
    }

    /// The records of chunks; those of a published file also where the disk does not give them back.
    fn records(&self, entry: &Entry, range: Range<u64>) -> Result<Vec<Option<Chunk>>, StoreError> {
        match self.chunks_once(entry, range.clone()) {
            Err(StoreError::Corrupt { .. }) if self.restore_values(entry) => self.chunks_once(entry, range),
            found => found,
        }
    }

    fn chunks_once(&self, entry: &Entry, range: Range<u64>) -> Result<Vec<Option<Chunk>>, StoreError> {
        let mut found = Vec::with_capacity((range.end - range.start) as usize);
        let mut wanted: Vec<ChunkIndex> = Vec::new();
        let epoch = {
            let live = lock(&entry.live);
            let state = &live.state;
            if state.dropped {
                return Err(StoreError::Dropped(entry.file));
            }
            if !state.is_known() {
                return Err(StoreError::NoFile(entry.file));
            }
            for chunk in range.clone() {
                let held = state.has(chunk);
                let fresh = state.fresh.get(&chunk).copied();
                found.push(fresh.filter(|_| held));
                if held && fresh.is_none() {
                    wanted.push(ChunkIndex::new(chunk)?);
                }
            }
            live.epoch
        };
        let segment_of = |index: &ChunkIndex| index.number() / SEGMENT_CHUNKS;
        for indices in wanted.chunk_by(|a, b| segment_of(a) == segment_of(b)) {
            let (first, last) = (indices[0], indices[indices.len() - 1]);
            let corrupt = |index| StoreError::Corrupt { file: entry.file, index };
            let name = Name::Values(segment_of(&first));
            let slots = match self.handle(entry.file, epoch, name, Open::Existing) {
                Ok(handle) => {
                    let len = (last.number() - first.number() + 1) as usize * values::SLOT_LEN;
                    handle
                        .read_at(values::offset(first), len)
                        .map_err(|error| self.error("reading values", &error))?
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(corrupt(first)),
                Err(error) => return Err(self.error("opening values", &error)),
            };
            for index in indices {
                let at = (index.number() - first.number()) as usize * values::SLOT_LEN;
                let slot = slots.get(at..at + values::SLOT_LEN).ok_or_else(|| corrupt(*index))?;
                let chunk = values::decode(entry.file, *index, slot).map_err(|_| corrupt(*index))?;
                found[(index.number() - range.start) as usize] = Some(chunk);
            }
        }
        Ok(found)
    }

    fn read_once(&self, entry: &Entry, index: ChunkIndex, cached: bool) -> Result<Bytes, StoreError> {
        if self.damage.has(entry.file, index.number()) {
            // Missing, if it went meanwhile.
            self.record_of(entry, index)?;
            return Err(StoreError::Corrupt { file: entry.file, index });
        }
        self.bytes_once(entry, index, cached)
    }

    /// The record of a chunk.
    fn record_of(&self, entry: &Entry, index: ChunkIndex) -> Result<Chunk, StoreError> {
        let number = index.number();
        let found = self.records(entry, number..number + 1)?;
        found.into_iter().next().flatten().ok_or(StoreError::Missing { index })
    }

    /// The bytes of a chunk, whatever was known of them before; through the page cache, or past it.
    fn bytes_once(&self, entry: &Entry, index: ChunkIndex, cached: bool) -> Result<Bytes, StoreError> {
        let corrupt = || StoreError::Corrupt { file: entry.file, index };
        let chunk = self.record_of(entry, index)?;
        let in_log = lock(&entry.live).state.is_in_log();
        if in_log {
            return match self.log.bytes(self, entry.file)? {
                Some(bytes) if ChainingValue::of_chunk(index, &bytes) == Some(chunk.value) => Ok(bytes),
                Some(_) | None => Err(corrupt()),
            };
        }
        let epoch = lock(&entry.live).epoch;
        let number = index.number();
        let segment = number / SEGMENT_CHUNKS;
        let offset = (number % SEGMENT_CHUNKS) * CHUNK_LEN;
        let bytes = match self.handle(entry.file, epoch, Name::Data(segment), Open::Existing) {
            Ok(handle) if cached => handle.read_at(offset, chunk.len as usize).map(Bytes::from),
            Ok(handle) => handle.read_uncached(offset, chunk.len as usize),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(corrupt()),
            Err(error) => Err(error),
        };
        let bytes = match bytes {
            Ok(bytes) => bytes,
            // The device does not give them back.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                return Err(corrupt());
            }
            Err(error) => return Err(self.error("reading a chunk", &error)),
        };
        if bytes.len() != chunk.len as usize || ChainingValue::of_chunk(index, &bytes) != Some(chunk.value) {
            return Err(corrupt());
        }
        Ok(bytes)
    }

    /// Hashes a chunk as the device gives it back now; its length. What is damaged is marked, durably unless the volume
    /// is read-only; what is sound again loses its mark. Blocks.
    pub(crate) fn verify_chunk(&self, entry: &Entry, index: ChunkIndex) -> Result<u64, StoreError> {
        let (file, number) = (entry.file, index.number());
        // The cache is asked first only where that is as good: what follows in the segment was dropped with it.
        if number.is_multiple_of(FORGET_EVERY) {
            self.forget_cache(entry, number);
        }
        let read = || self.steadily(entry, || self.bytes_once(entry, index, true));
        let result = match read() {
            Err(StoreError::Corrupt { .. }) => {
                // Perhaps only the cache has it wrong.
                self.forget_cache(entry, number);
                read()
            }
            result => result,
        };
        match result {
            Ok(bytes) => {
                if self.damage.clear(file, [number]) {
                    tracing::info!(%file, chunk = number, "a damaged chunk is sound again");
                    self.keep_damage();
                }
                Ok(bytes.len() as u64)
            }
            Err(error) => {
                let changed = match &error {
                    StoreError::Corrupt { .. } => self.damage.mark(file, number),
                    StoreError::Missing { .. } | StoreError::NoFile(_) | StoreError::Dropped(_) => {
                        self.damage.clear(file, [number])
                    }
                    _ => false,
                };
                if changed {
                    self.keep_damage();
                }
                Err(error)
            }
        }
    }

    fn forget_cache(&self, entry: &Entry, chunk: u64) {
        let epoch = lock(&entry.live).epoch;
        let name = Name::Data(chunk / SEGMENT_CHUNKS);
        let forgotten = self.handle(entry.file, epoch, name, Open::Existing).and_then(|it| it.forget_cache());
        if let Err(error) = forgotten
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(file = %entry.file, %error, "cannot drop cached pages");
        }
    }

    /// Makes marks of damage durable. Blocks.
    pub(crate) fn keep_damage(&self) {
        if self.failure.get().is_some() {
            // Nothing is written any more; what is marked stays so until the process ends, and is found again.
            return;
        }
        let kept = self.counters.sync(|| self.damage.keep(&self.disk, &self.layout.damage()));
        if let Err(error) = kept
            && !super::gate::is_shut(&error)
        {
            tracing::error!(%error, "marks of damage cannot be kept");
        }
    }

    /// Takes every mark of a file back: its bytes are gone.
    pub(crate) fn forget_damage(&self, file: FileId) {
        if self.damage.clear_all(file) {
            self.chore(Chore::KeepDamage);
        }
    }

    /// Takes marks back whose chunks are written again, or gone.
    pub(crate) fn settle_damage(&self, file: FileId, change: &Change) {
        let changed = match change {
            Change::Run { chunks, .. } => self.damage.clear(file, chunks.iter().map(|it| it.index.number())),
            Change::Lost { chunks, .. } => self.damage.clear(file, chunks.iter().map(|it| it.number())),
            change if change.removes_chunks() => self.damage.clear_all(file),
            _ => false,
        };
        if changed {
            self.chore(Chore::KeepDamage);
        }
    }

    /// Keeps how far the scrub of a share has come. Blocks.
    pub(crate) fn put_scrub_mark(&self, share: Share, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.layout.scrub(share);
        self.disk.replace_unsynced(&path, bytes).map_err(|error| self.error("writing a scrub's mark", &error))
    }

    /// How far the scrub of a share had come, if that is known. Blocks.
    pub(crate) fn scrub_mark(&self, share: Share) -> Result<Option<Vec<u8>>, StoreError> {
        match self.disk.read(&self.layout.scrub(share)) {
            Ok(bytes) => Ok(scrub_mark::decode(&bytes).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error("reading a scrub's mark", &error)),
        }
    }

    /// What the recorded chunks are as a whole: their shape and root. [`StoreError::WrongRoot`] names `expected` if
    /// they are no whole. Blocks; holds the values of one segment at a time.
    pub(crate) fn whole(&self, entry: &Entry, expected: Root) -> Result<Published, StoreError> {
        let missing = || StoreError::WrongRoot { expected, got: None };
        let geometry = {
            let live = lock(&entry.live);
            let known = live.state.geometry();
            live.state.shape_of_held().filter(|shape| known.is_none_or(|known| known == *shape))
        };
        let geometry = geometry.ok_or_else(missing)?;
        let root = self.root(entry, geometry)?.ok_or_else(missing)?;
        if root != expected {
            return Err(StoreError::WrongRoot { expected, got: Some(root) });
        }
        Ok(Published { geometry, root })
    }

    /// The root of the recorded chunks; `None` if one is missing.
    pub(crate) fn root(&self, entry: &Entry, geometry: Geometry) -> Result<Option<Root>, StoreError> {
        if geometry.chunks() == 1 {
            let index = ChunkIndex::new(0)?;
            return match self.read_chunk(entry, index) {
                Ok(bytes) => Ok(Some(Root::of_bytes(&bytes))),
                Err(StoreError::Missing { .. }) => Ok(None),
                Err(error) => Err(error),
            };
        }
        let mut tree = SpanTree::new(geometry);
        let mut start = 0;
        while start < geometry.chunks() {
            let end = (start + SEGMENT_CHUNKS).min(geometry.chunks());
            let found: Option<Vec<Chunk>> = self.chunks(entry, start..end)?.into_iter().collect();
            let Some(found) = found else { return Ok(None) };
            let values: Vec<ChainingValue> = found.iter().map(|chunk| chunk.value).collect();
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

    /// Checks that a published file is what it was when it was published. Blocks.
    pub(crate) fn recheck(&self, entry: &Entry) -> Result<Root, StoreError> {
        if let Some(reason) = self.failure.get() {
            return Err(StoreError::ReadOnly { reason: reason.clone() });
        }
        let (published, epoch, dropped, in_log) = {
            let live = lock(&entry.live);
            (live.state.published, live.epoch, live.state.dropped, live.state.is_in_log())
        };
        let Published { geometry, root } = match published {
            Some(published) => published,
            None if dropped => return Err(StoreError::Dropped(entry.file)),
            None => return Err(StoreError::NoFile(entry.file)),
        };
        if let Some(damaged) = self.damage.of(entry.file).first() {
            return Err(StoreError::Corrupt { file: entry.file, index: ChunkIndex::new(damaged.start)? });
        }
        if in_log {
            // One record holds it all, and reading it checks all of it.
            return match self.log.bytes(self, entry.file)? {
                Some(bytes) if Root::of_bytes(&bytes) == root => Ok(root),
                got => {
                    Err(StoreError::WrongRoot { expected: root, got: got.map(|got| Root::of_bytes(&got)) })
                }
            };
        }
        // The values are asked of the disk, not of memory.
        self.flush_values(entry)?;
        let mut start = 0;
        while start < geometry.chunks() {
            let segment = start / SEGMENT_CHUNKS;
            let end = (start + SEGMENT_CHUNKS).min(geometry.chunks());
            let len = match self.handle(entry.file, epoch, Name::Data(segment), Open::Existing) {
                Ok(handle) => handle.length().map_err(|error| self.error("asking a length", &error))?,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
                Err(error) => return Err(self.error("opening a segment", &error)),
            };
            if len < geometry.range_len(start, end) {
                let held = (start + len / CHUNK_LEN).min(end - 1);
                let index = ChunkIndex::new(held)?;
                return self.counted(Err(StoreError::Corrupt { file: entry.file, index }));
            }
            start = end;
        }
        match self.root(entry, geometry)? {
            Some(got) if got == root => Ok(root),
            got => Err(StoreError::WrongRoot { expected: root, got }),
        }
    }
}
