//! Opening the log: the index from its runs, and from what was appended since; or all of it from the log, when a run
//! or the manifest is gone or damaged.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use quick_cache::sync::Cache;
use sluice_engine::limits::CHUNK_LEN;

use super::index::{Index, Place};
use super::manifest::Manifest;
use super::record::{Front, MAX_FRONT_LEN, START};
use super::run::{Run, RunError};
use super::{Log, MAGIC, MAX_FRAME, OPEN_SEGMENTS, Segments, Tail, keeper, placed};
use crate::fs::disk::{DiskFile, Open};
use crate::fs::frame::{self, BLOCK, HEADER_LEN};
use crate::fs::gate::GatedDisk;
use crate::fs::layout::Layout;
use crate::fs::lock;
use crate::fs::volume::VolumeId;
use crate::sealed::FormatError;

/// The longest that a frame can be: one record more than makes it full.
const LONGEST_FRAME: u64 = (MAX_FRAME + MAX_FRONT_LEN + BLOCK) as u64 + 2 * CHUNK_LEN;

/// Bytes that are looked at, and wiped, at once.
const WIPED_AT_ONCE: usize = 256 << 10;

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoverError {
    /// The disk refuses.
    #[error("log: {0}")]
    Io(#[from] io::Error),
    /// A run that was just written, or read already, cannot be read.
    #[error("the log's index: {0}")]
    Run(#[from] RunError),
    /// An intact frame holds what this version does not know.
    #[error("log segment {segment}: a record at byte {offset} cannot be read: {error}")]
    Record {
        /// Which segment.
        segment: u64,
        /// Where.
        offset: u64,
        /// Why.
        error: FormatError,
    },
}

/// Opens the log; `flush` is how many entries of the index are kept in memory. Returns how many records were damaged
/// beyond use, as far as that can be told.
pub(crate) fn recover(
    disk: &GatedDisk,
    layout: &Layout,
    volume: VolumeId,
    flush: usize,
) -> Result<(Log, Tail, u64), RecoverError> {
    let dir = layout.dir("log");
    disk.create_dir(&dir)?;
    disk.sync_dir(layout.root())?;
    disk.sync_dir(&dir)?;
    let names = disk.list(&dir)?;
    let numbers = |prefix: &str| -> BTreeSet<u64> {
        names.iter().filter_map(|name| name.strip_prefix(prefix)?.parse().ok()).collect()
    };
    let (segments, on_disk) = (numbers("log-"), numbers("run-"));
    let (manifest, runs) = match open_runs(disk, layout, volume) {
        Ok(found) => found,
        // A log that fits in memory has no index yet.
        Err(_) if on_disk.is_empty() && !names.iter().any(|name| name == "manifest") => {
            (Manifest::default(), Vec::new())
        }
        Err(reason) => {
            tracing::warn!(reason, "the log's index is made again from the log");
            (Manifest::default(), Vec::new())
        }
    };
    let in_force: BTreeSet<u64> = runs.iter().map(|run| run.number).collect();
    for run in on_disk.difference(&in_force) {
        // What is left of an index that is no longer believed.
        let _ = disk.remove_file(&layout.run(*run));
    }
    let log = Log {
        volume,
        disk: disk.clone(),
        layout: layout.clone(),
        index: Index::default(),
        handles: Cache::new(OPEN_SEGMENTS),
        segments: Mutex::new(Segments {
            fill: manifest.segments.into_iter().filter(|(number, _)| segments.contains(number)).collect(),
            damaged: BTreeSet::new(),
            next_run: manifest.next_run.max(on_disk.last().map_or(0, |last| last + 1)),
        }),
    };
    log.index.thaw(runs);
    let last = segments.last().copied().unwrap_or(manifest.covered.0);
    let mut tail = Tail { segment: last, end: 0, capacity: 0, file: None, next_seq: 1 };
    let mut damaged = 0;
    for &number in segments.range(manifest.covered.0..) {
        let file = disk.open(&layout.log(number), Open::Existing)?;
        // The last process may have died between writing and syncing.
        file.sync_data()?;
        file.forget_cache()?;
        let from = if number == manifest.covered.0 { manifest.covered.1 } else { 0 };
        let is_last = number == last;
        let scan = Scan { volume, number, file: &file, is_last };
        let found = scan.run(from, &mut |front, place| {
            let before = log.index.place(front.file)?;
            {
                let mut segments = lock(&log.segments);
                if let Some(fill) = before.and_then(|before| segments.fill.get_mut(&before.segment)) {
                    fill.live = fill.live.saturating_sub(before.map_or(0, |before| u64::from(before.len)));
                }
                segments.fill.entry(number).or_default().live += u64::from(place.len);
            }
            log.index.insert(front, place);
            Ok(())
        })?;
        log.note_end(number, found.end);
        if !found.damaged.is_empty() {
            damaged += found.damaged.len() as u64;
            lock(&log.segments).damaged.insert(number);
        }
        if let Some(seq) = found.last_seq {
            tail.next_seq = seq + 1;
        }
        if is_last {
            scan.wipe(found.end)?;
            (tail.end, tail.capacity, tail.file) = (found.end, file.length()?, Some(file));
        }
        if log.index.len() >= flush {
            // A frozen table covers what was scanned; the keeper writes down what is left.
            log.index.freeze((number, found.end), || lock(&log.segments).fill.clone());
            keeper::write_down(&log, &Syncs)?;
        }
    }
    Ok((log, tail, damaged))
}

/// Syncs that nobody counts, before the store is open.
struct Syncs;

impl keeper::Sync for Syncs {
    fn sync(&self, sync: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        sync()
    }
}

/// The manifest and its runs; or why they cannot be used.
fn open_runs(
    disk: &GatedDisk,
    layout: &Layout,
    volume: VolumeId,
) -> Result<(Manifest, Vec<Arc<Run>>), String> {
    let bytes = disk.read(&layout.manifest()).map_err(|error| format!("manifest: {error}"))?;
    let manifest = Manifest::decode(volume, &bytes).map_err(|error| format!("manifest: {error}"))?;
    let open = |number: &u64| {
        let file =
            disk.open(&layout.run(*number), Open::Existing).map_err(|error| format!("run: {error}"))?;
        Run::open(volume, *number, file).map(Arc::new).map_err(|error| error.to_string())
    };
    let runs = manifest.runs.iter().map(open).collect::<Result<_, _>>()?;
    Ok((manifest, runs))
}

/// What a scan of a segment found.
pub(crate) struct Found {
    /// Where the last frame ends.
    pub(crate) end: u64,
    /// The sequence number of the last frame.
    pub(crate) last_seq: Option<u64>,
    /// What is damaged though it was acknowledged, and how many records of it are intact.
    pub(crate) damaged: Vec<(Range<u64>, u64)>,
    /// Whether a frame that was never acknowledged is cut off.
    pub(crate) torn: bool,
}

/// Reads the records of a segment.
pub(crate) struct Scan<'a> {
    pub(crate) volume: VolumeId,
    pub(crate) number: u64,
    pub(crate) file: &'a Arc<dyn DiskFile>,
    /// Whether frames are still appended to it, so that the last one may be torn.
    pub(crate) is_last: bool,
}

type Each<'a> = dyn FnMut(&Front, &Place) -> Result<(), RecoverError> + 'a;

impl Scan<'_> {
    /// From `at` on.
    pub(crate) fn run(&self, mut at: u64, each: &mut Each<'_>) -> Result<Found, RecoverError> {
        let length = self.file.length()?;
        let mut found = Found { end: at, last_seq: None, damaged: Vec::new(), torn: false };
        loop {
            let bytes = self.frame(at, length)?;
            match frame::decode(MAGIC, self.volume, self.number, &bytes) {
                Ok(framed) => {
                    let mut offset = 0;
                    for _ in 0..framed.records {
                        let rest = framed.payload.get(offset..).unwrap_or_default();
                        let start = at + (HEADER_LEN + offset) as u64;
                        // The check matches: whoever wrote this knows more.
                        let front = Front::decode(self.volume, rest).map_err(|error| {
                            RecoverError::Record { segment: self.number, offset: start, error }
                        })?;
                        offset += front.len() as usize;
                        each(&front, &placed(&front, self.number, start as u32))?;
                    }
                    found.last_seq = Some(framed.seq);
                    at += frame::len(framed.payload.len()) as u64;
                    found.end = at;
                }
                Err(_) => {
                    let next = self.next_frame(at, length)?;
                    let until = match next {
                        Some(next) => next,
                        None if self.is_last || !self.is_written(at, length)? => {
                            found.torn = self.is_last && self.is_written(at, length)?;
                            return Ok(found);
                        }
                        None => length,
                    };
                    let saved = self.salvage(at, until, each)?;
                    found.damaged.push((at..until, saved));
                    tracing::error!(
                        segment = self.number,
                        from = at,
                        until,
                        saved,
                        "a frame of the log is damaged, though it was acknowledged; its intact records are kept"
                    );
                    at = until;
                    found.end = at;
                    if next.is_none() {
                        return Ok(found);
                    }
                }
            }
        }
    }

    /// The bytes of what may be a frame.
    fn frame(&self, at: u64, length: u64) -> io::Result<Vec<u8>> {
        let header = self.file.read_at(at, HEADER_LEN)?;
        match frame::payload_len(MAGIC, self.number, &header) {
            Ok(len) if at + (HEADER_LEN + len) as u64 <= length => self.file.read_at(at, HEADER_LEN + len),
            Ok(_) | Err(_) => Ok(header),
        }
    }

    /// Wipes what a torn frame left behind the end, so that it is not taken for damage when the segment is full.
    fn wipe(&self, end: u64) -> io::Result<()> {
        let length = self.file.length()?;
        let mut wiped = false;
        let mut at = end;
        while at < length.min(end + LONGEST_FRAME) {
            let bytes = self.file.read_at(at, WIPED_AT_ONCE)?;
            if bytes.iter().any(|byte| *byte != 0) {
                self.file.write_at(at, &vec![0; bytes.len()])?;
                wiped = true;
            }
            at += WIPED_AT_ONCE as u64;
        }
        if wiped {
            tracing::info!(segment = self.number, end, "a frame that was never acknowledged was cut off");
            self.file.sync_data()?;
        }
        Ok(())
    }

    /// Where the next intact frame is.
    fn next_frame(&self, at: u64, length: u64) -> io::Result<Option<u64>> {
        let mut next = at + BLOCK as u64;
        while next < length {
            let bytes = self.frame(next, length)?;
            if frame::decode(MAGIC, self.volume, self.number, &bytes).is_ok() {
                return Ok(Some(next));
            }
            next += BLOCK as u64;
        }
        Ok(None)
    }

    /// Whether anything was ever written at a place.
    fn is_written(&self, at: u64, length: u64) -> io::Result<bool> {
        if at >= length {
            return Ok(false);
        }
        Ok(self.file.read_at(at, BLOCK)?.iter().any(|byte| *byte != 0))
    }

    /// Takes the intact records of a damaged part; how many.
    fn salvage(&self, from: u64, until: u64, each: &mut Each<'_>) -> Result<u64, RecoverError> {
        let bytes = self.file.read_at(from, (until - from) as usize)?;
        let mut saved = 0;
        let mut at = 0;
        while at + START.len() <= bytes.len() {
            let rest = &bytes[at..];
            let front = Some(rest)
                .filter(|rest| rest.starts_with(&START))
                .and_then(|rest| Front::decode(self.volume, &rest[..rest.len().min(MAX_FRONT_LEN)]).ok())
                .filter(|front| front.bytes(rest).is_ok());
            match front {
                Some(front) => {
                    each(&front, &placed(&front, self.number, (from + at as u64) as u32))?;
                    at += front.len() as usize;
                    saved += 1;
                }
                None => at += 1,
            }
        }
        Ok(saved)
    }
}
