//! The log: files that came whole in one request, and what is left of them, in segments that are appended to.
//!
//! A file of at most a chunk is one [record](record): metadata, facts, bytes and digest, durable with one write and one
//! sync for all that wait. So is what a datacenter knows of such a file whose bytes are elsewhere, and that a file was
//! dropped. The newest record of a file counts; the [index](index) finds it, and is a cache.
//!
//! # Who does what
//! The committer appends ([`Tail`]) and changes the index; callers read. The [keeper](keeper), one thread, writes the
//! index down, and moves what still counts out of segments that are mostly garbage, through the committer like any
//! change. All of it stops with the store.
//!
//! # What a crash and a damage leave
//! Frames are written one at a time, each after the one before was synced. So a damaged frame at the very end was never
//! acknowledged, and is cut off. A damaged frame with intact ones behind it, or in a segment that was left for the next,
//! was acknowledged: that is reported, each of its records that is intact still counts, and the segment is kept as it
//! is. What a record holds is verified whenever it is read.

pub(crate) mod index;
pub(crate) mod keeper;
mod manifest;
pub(crate) mod record;
mod recover;
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use quick_cache::sync::Cache;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::ids::FileId;

use self::index::{Index, Place};
use self::manifest::Fill;
use self::record::{Front, LogRecord};
use self::run::RunError;
use super::disk::{DiskFile, Open};
use super::frame;
use super::gate::GatedDisk;
use super::layout::Layout;
use super::lock;
use super::shared::{Counters, Shared};
use super::volume::VolumeId;
use crate::StoreError;

pub(crate) use self::recover::{Scan, recover};

/// What the frames of a segment begin with.
const MAGIC: [u8; 4] = *b"SLG\x01";

/// The most bytes of records in one frame, but for one record that is longer.
pub(crate) const MAX_FRAME: usize = 4 << 20;

/// Segments that are kept open.
const OPEN_SEGMENTS: usize = 256;

/// The end of each segment that is kept for what makes room, should there be none for another segment.
const LAST_ROOM: u64 = 256 << 10;

/// Bytes of a segment that is begun where there is hardly any room.
const LEAST_SEGMENT: u64 = 1 << 20;

/// How often a record is sought while segments are moved.
const ATTEMPTS: usize = 4;

/// The log of a volume, as everybody shares it.
#[derive(Debug)]
pub(crate) struct Log {
    volume: VolumeId,
    disk: GatedDisk,
    layout: Layout,
    pub(crate) index: Index,
    handles: Cache<u64, Arc<dyn DiskFile>>,
    segments: Mutex<Segments>,
}

#[derive(Debug, Default)]
struct Segments {
    fill: BTreeMap<u64, Fill>,
    /// Segments that hold something damaged: never removed.
    damaged: BTreeSet<u64>,
    next_run: u64,
}

/// The end of the log. The committer's.
#[derive(Debug)]
pub(crate) struct Tail {
    /// The last segment; 0 before there is any.
    pub(crate) segment: u64,
    pub(crate) end: u64,
    capacity: u64,
    file: Option<Arc<dyn DiskFile>>,
    next_seq: u64,
}

/// Why nothing was appended.
#[derive(Debug)]
pub(crate) enum AppendError {
    /// There is no room, and nothing was written.
    Full,
    /// The disk failed.
    Io(&'static str, io::Error),
}

impl Segments {
    fn is_garbage(&self, number: u64, fill: &Fill) -> bool {
        fill.live * 2 < fill.end && !self.damaged.contains(&number)
    }
}

impl Log {
    /// The volume that the log is of.
    pub(crate) fn volume(&self) -> VolumeId {
        self.volume
    }

    fn segment(&self, number: u64) -> io::Result<Arc<dyn DiskFile>> {
        self.handles.get_or_insert_with(&number, || self.disk.open(&self.layout.log(number), Open::Existing))
    }

    /// The newest record of a file without its bytes, if there is one. Blocks.
    pub(crate) fn front(&self, shared: &Shared, file: FileId) -> Result<Option<Front>, StoreError> {
        let found = self.steadily(shared, file, |place| Ok((place.front_len, place.front_len)))?;
        Ok(found.map(|(front, _)| front))
    }

    /// The bytes of a file, if they are here: verified. Blocks.
    pub(crate) fn bytes(&self, shared: &Shared, file: FileId) -> Result<Option<Bytes>, StoreError> {
        let Some((front, all)) = self.steadily(shared, file, |place| Ok((place.len, place.len)))? else {
            return Ok(None);
        };
        front.bytes(&all).map_err(|_| {
            Counters::add(&shared.counters.integrity_failures, 1);
            tracing::error!(%file, "a file's bytes do not hash to its root");
            match ChunkIndex::new(0) {
                Ok(index) => StoreError::Corrupt { file, index },
                Err(error) => error.into(),
            }
        })
    }

    /// Reads so many bytes of the newest record of a file. If it was moved meanwhile it is sought again.
    fn steadily(
        &self,
        shared: &Shared,
        file: FileId,
        len: impl Fn(&Place) -> io::Result<(u32, u32)>,
    ) -> Result<Option<(Front, Vec<u8>)>, StoreError> {
        let mut tried = None;
        for _ in 0..ATTEMPTS {
            let place = self.index.place(file).map_err(|error| self.broken(shared, &error))?;
            let Some(place) = place else { return Ok(None) };
            let damaged = tried == Some(place);
            tried = Some(place);
            let read = self.segment(place.segment).and_then(|segment| {
                let (_, len) = len(&place)?;
                segment.read_at(u64::from(place.offset), len as usize)
            });
            let bytes = match read {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound && !damaged => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                Err(error) => return Err(shared.error("reading the log", &error)),
            };
            match Front::decode(self.volume, &bytes) {
                Ok(front) if front.file == file => return Ok(Some((front, bytes))),
                Ok(_) | Err(_) if damaged => break,
                Ok(_) | Err(_) => {}
            }
        }
        Counters::add(&shared.counters.integrity_failures, 1);
        let (segment, offset) = tried.map_or((0, 0), |place| (place.segment, place.offset));
        tracing::error!(%file, segment, offset, "a record of the log is damaged");
        Err(StoreError::Unreadable {
            path: self.layout.log(segment).display().to_string(),
            reason: format!("the record of file {file} at byte {offset} is damaged"),
        })
    }

    /// A run cannot be read: the index is made again from the log when the volume is opened next.
    pub(crate) fn broken(&self, shared: &Shared, error: &RunError) -> StoreError {
        match error {
            RunError::Io(error) => shared.error("reading the log's index", error),
            RunError::Format { .. } => {
                Counters::add(&shared.counters.integrity_failures, 1);
                tracing::error!(%error, "the log's index is damaged; it is made again at the next start");
                // What is not there is made again; if it cannot be removed now, the damage is found again.
                let _ = self.disk.remove_file(&self.layout.manifest());
                StoreError::Unreadable {
                    path: self.layout.dir("log").display().to_string(),
                    reason: format!("{error}; open the volume again, and the index is made from the log"),
                }
            }
        }
    }

    /// Notes that a record became durable, and is now the newest of its file.
    pub(crate) fn note(&self, shared: &Shared, front: &Front, place: &Place, replaces: bool) {
        self.account(shared, front.file, place, replaces);
        self.index.insert(front, place);
    }

    /// Notes that a record was moved.
    pub(crate) fn note_moved(&self, shared: &Shared, file: FileId, place: &Place) {
        self.account(shared, file, place, true);
        self.index.moved(file, place);
    }

    fn account(&self, shared: &Shared, file: FileId, place: &Place, replaces: bool) {
        let before = if replaces { self.index.place(file) } else { Ok(None) };
        let mut segments = lock(&self.segments);
        match before {
            Ok(Some(before)) => {
                if let Some(fill) = segments.fill.get_mut(&before.segment) {
                    fill.live = fill.live.saturating_sub(u64::from(before.len));
                }
            }
            Ok(None) => {}
            // Its segment counts as fuller than it is, until the index is made again.
            Err(error) => {
                self.broken(shared, &error);
            }
        }
        segments.fill.entry(place.segment).or_default().live += u64::from(place.len);
    }

    /// Where the last frame of a segment ends now.
    fn note_end(&self, segment: u64, end: u64) {
        lock(&self.segments).fill.entry(segment).or_default().end = end;
    }

    /// Segments before `last`, most of which is garbage.
    pub(crate) fn garbage(&self, last: u64) -> Vec<u64> {
        let segments = lock(&self.segments);
        let garbage =
            segments.fill.range(..last).filter(|(number, fill)| segments.is_garbage(**number, fill));
        garbage.map(|(number, _)| *number).collect()
    }

    /// Whether there is garbage to collect before `last`.
    pub(crate) fn has_garbage(&self, last: u64) -> bool {
        let segments = lock(&self.segments);
        segments.fill.range(..last).any(|(number, fill)| segments.is_garbage(*number, fill))
    }

    /// Segments, and bytes in them that count.
    pub(crate) fn usage(&self) -> (u64, u64) {
        let segments = lock(&self.segments);
        (segments.fill.len() as u64, segments.fill.values().map(|fill| fill.live).sum())
    }

    /// Freezes the index if it has grown beyond `limit`; whether there is something to write down.
    pub(crate) fn freeze(&self, limit: usize, tail: &Tail) -> bool {
        self.index.len() >= limit
            && self.index.freeze((tail.segment, tail.end), || lock(&self.segments).fill.clone())
    }
}

impl Tail {
    /// Makes sure that a frame of `payload` bytes fits the last segment, or begins another. Only what makes room
    /// (`frees`) may use what is kept back. Blocks.
    pub(crate) fn make_room(
        &mut self,
        shared: &Shared,
        payload: usize,
        frees: bool,
    ) -> Result<(), AppendError> {
        let len = frame::len(payload) as u64;
        let kept = if frees { 0 } else { LAST_ROOM.min(self.capacity / 4) };
        if self.end + len + kept <= self.capacity {
            return Ok(());
        }
        let wanted = shared.options.log_segment_len.max(2 * len);
        match self.begin_segment(shared, wanted, frees) {
            Err(AppendError::Full) if frees => {
                self.begin_segment(shared, LEAST_SEGMENT.min(wanted).max(2 * len), true)
            }
            result => result,
        }
    }

    fn begin_segment(&mut self, shared: &Shared, capacity: u64, frees: bool) -> Result<(), AppendError> {
        if !frees && shared.room(capacity).is_err() {
            return Err(AppendError::Full);
        }
        let log = &shared.log;
        let number = self.segment + 1;
        let path = log.layout.log(number);
        let begin = || -> io::Result<Arc<dyn DiskFile>> {
            // What a failed attempt left has no frames.
            let file = log.disk.open(&path, Open::Create)?;
            file.allocate(capacity)?;
            Ok(file)
        };
        let file = match begin() {
            Ok(file) => file,
            Err(error) => {
                let is_full =
                    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
                let _ = log.disk.remove_file(&path);
                return Err(if is_full {
                    AppendError::Full
                } else {
                    AppendError::Io("beginning a segment", error)
                });
            }
        };
        let durable = shared.counters.sync(|| {
            file.sync_data()?;
            log.disk.sync_dir(&log.layout.dir("log"))
        });
        durable.map_err(|error| AppendError::Io("syncing a segment", error))?;
        lock(&shared.space).asked = None;
        log.handles.insert(number, file.clone());
        (self.segment, self.end, self.capacity, self.file) = (number, 0, capacity, Some(file));
        log.note_end(number, 0);
        Ok(())
    }

    /// Appends a frame, for which there is room, and syncs it; returns where its records begin. Blocks.
    pub(crate) fn append(&mut self, shared: &Shared, records: u32, payload: &[u8]) -> io::Result<(u64, u32)> {
        let file = self.file.clone().ok_or(io::ErrorKind::NotFound)?;
        let bytes = frame::encode(MAGIC, shared.log.volume, self.segment, self.next_seq, records, payload);
        file.write_at(self.end, &bytes)?;
        shared.counters.sync(|| file.sync_data())?;
        let at = (self.segment, (self.end + frame::HEADER_LEN as u64) as u32);
        self.end += bytes.len() as u64;
        self.next_seq += 1;
        shared.log.note_end(self.segment, self.end);
        shared.counters.log_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(at)
    }
}

/// A record at its place in a frame.
pub(crate) fn placed(front: &Front, segment: u64, offset: u32) -> Place {
    Place {
        segment,
        offset,
        front_len: front.front_len,
        len: front.len(),
        whole: front.seal.is_some(),
        brief: front.brief(),
    }
}

/// The record's front, as reading it would give it.
pub(crate) fn front_of(record: &LogRecord, front_len: u32) -> Front {
    let (metadata, client, seal) = match &record.body {
        record::Body::Whole { record, whole } => {
            (Some(record.clone()), Some(record.client_id()), Some(whole.seal()))
        }
        record::Body::Known { record } => (Some(record.clone()), Some(record.client_id()), None),
        record::Body::Dropped { client } => (None, *client, None),
    };
    Front {
        file: record.file,
        tenant: record.tenant,
        generation: record.generation,
        facts: record.facts.clone(),
        record: metadata,
        client,
        seal,
        front_len,
    }
}
