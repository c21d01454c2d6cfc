//! Checking a volume that nobody uses: header, journals, checkpoint, indexes, values and bytes, the log, and what
//! belongs to nothing. Writes nothing, and goes on past damage as far as what is left makes sense.
//!
//! It runs in its caller's thread, reads one chunk at a time, and ends with its caller. It keeps the volume's lock
//! meanwhile, so that no process begins to write under it. What it takes for damage is what the store itself would not
//! believe: the formats are read by the same code.

mod finding;
mod lock;
mod log;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, FileId};
use sluice_engine::limits::{CHUNK_LEN, SEGMENT_CHUNKS, SEGMENT_LEVEL};
use sluice_engine::ranges::Ranges;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{SpanTree, merge_chunks};

pub use finding::{Finding, FindingKind, VolumeReport};
pub use lock::holder;

use super::aside::{self, Aside};
use super::change::{Change, Chunk, Record};
use super::checkpoint::Checkpoint;
use super::damage::{self, Marks};
use super::disk::{Disk, DiskFile, Open, RealDisk};
use super::entry::Name;
use super::layout::{Layout, has_values, shard};
use super::state::FileState;
use super::volume::{self, HeaderError, VolumeId};
use super::{index, journal, values};
use crate::{StoreError, page, scrub_mark};

/// What to check, and whom to tell how far it is.
pub struct CheckOptions<'a> {
    /// Whether the bytes of every chunk are hashed; otherwise only lengths and values are looked at.
    pub hash_bytes: bool,
    /// Told now and then what was done so far.
    pub progress: &'a mut dyn FnMut(CheckProgress),
}

/// How far a check is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckProgress {
    /// Files checked.
    pub files: u64,
    /// Files in all, as far as they were counted.
    pub of_files: u64,
    /// Bytes of chunks checked.
    pub bytes: u64,
}

/// Checks the volume at `path` on this machine, which stays locked meanwhile.
///
/// [`StoreError::InUse`] if a process has it open, [`StoreError::NewerVersion`] if a newer version wrote it,
/// [`StoreError::Unreadable`] if it is no volume or may not be read. Damage is no error: it is in the report.
pub fn check(path: impl AsRef<Path>, options: CheckOptions<'_>) -> Result<VolumeReport, StoreError> {
    let path = path.as_ref();
    let _lock = lock::keep(path)?;
    check_on(Arc::new(RealDisk), path, options)
}

/// The same on any disk, without a lock.
pub fn check_on(
    disk: Arc<dyn Disk>,
    path: impl AsRef<Path>,
    options: CheckOptions<'_>,
) -> Result<VolumeReport, StoreError> {
    let path = path.as_ref();
    let names = disk.list(path).map_err(|error| unreadable(path, &error))?;
    if !names.iter().any(|name| ["volume", "checkpoint", "index"].contains(&name.as_str())) {
        return Err(unreadable(path, &"it is no volume"));
    }
    let report = VolumeReport { path: path.to_path_buf(), hashed: options.hash_bytes, ..Default::default() };
    let mut check = Check {
        disk,
        layout: Layout::new(path),
        options,
        report,
        progress: Default::default(),
        client: None,
        marks: Marks::new(),
    };
    check.run()?;
    Ok(check.report)
}

fn unreadable(path: &Path, reason: &dyn std::fmt::Display) -> StoreError {
    StoreError::Unreadable { path: path.display().to_string(), reason: reason.to_string() }
}

/// What a journal says of each file.
type Pending = HashMap<FileId, Vec<(u64, Change)>>;

struct Check<'a> {
    disk: Arc<dyn Disk>,
    layout: Layout,
    options: CheckOptions<'a>,
    report: VolumeReport,
    progress: CheckProgress,
    /// What was found damaged before.
    marks: Marks,
    /// What the client of the file that is being checked calls it.
    client: Option<ClientFileId>,
}

impl Check<'_> {
    fn run(&mut self) -> Result<(), StoreError> {
        let id = self.header()?;
        let pending = match id.map(|id| (id, self.checkpoint(id))) {
            Some((id, Some(checkpoint))) => {
                let mut pending = self.journals(id, &checkpoint);
                for (file, mut changes) in self.aside(id) {
                    aside::join(&mut changes, pending.remove(&file).unwrap_or_default());
                    pending.insert(file, changes);
                }
                pending
            }
            // Without them nobody knows which batches count.
            Some((_, None)) | None => Pending::new(),
        };
        if let Some(id) = id {
            self.marks(id);
        }
        let files = self.files(&pending);
        self.progress.of_files = files.len() as u64;
        for file in &files {
            self.file(*file, pending.get(file).map_or(&[], Vec::as_slice));
            self.progress.files += 1;
            (self.options.progress)(self.progress);
        }
        let logged = id.map_or_else(BTreeSet::new, |id| self.log(id, &files));
        self.leftovers(&files, &logged);
        Ok(())
    }

    fn found(&mut self, kind: FindingKind, path: &Path, detail: impl ToString) {
        self.add(kind, path, None, Vec::new(), detail.to_string());
    }

    fn found_in(
        &mut self,
        kind: FindingKind,
        path: &Path,
        file: FileId,
        chunks: &Ranges,
        detail: impl ToString,
    ) {
        self.add(kind, path, Some(file), chunks.iter().collect(), detail.to_string());
    }

    fn add(
        &mut self,
        kind: FindingKind,
        path: &Path,
        file: Option<FileId>,
        chunks: Vec<Range<u64>>,
        detail: String,
    ) {
        let client = self.client.filter(|_| file.is_some());
        self.report.add(Finding { kind, path: path.to_path_buf(), file, client, chunks, detail });
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.disk.open(path, Open::ReadOnly)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.open(path)?;
        let len =
            usize::try_from(file.length()?).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        file.read_at(0, len)
    }

    /// The names in a directory; none if it is missing.
    fn list(&mut self, path: &Path) -> BTreeSet<String> {
        match self.disk.list(path) {
            Ok(names) => names.into_iter().collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
            Err(error) => {
                self.found(FindingKind::Unreadable, path, error);
                BTreeSet::new()
            }
        }
    }

    fn header(&mut self) -> Result<Option<VolumeId>, StoreError> {
        let path = self.layout.volume();
        let decoded = match self.read(&path) {
            Ok(bytes) => volume::decode(&bytes),
            Err(error) => {
                self.found(FindingKind::Header, &path, error);
                return Ok(None);
            }
        };
        match decoded {
            Ok(header) => Ok(Some(header.id)),
            Err(HeaderError::Newer(got)) => Err(StoreError::NewerVersion {
                path: self.layout.root().display().to_string(),
                got: got.into(),
                known: volume::VERSION.into(),
            }),
            Err(HeaderError::Format(error)) => {
                self.found(FindingKind::Header, &path, error);
                Ok(None)
            }
        }
    }

    fn checkpoint(&mut self, id: VolumeId) -> Option<Checkpoint> {
        let path = self.layout.checkpoint();
        let decoded = self.read(&path).map_err(|error| error.to_string());
        let decoded =
            decoded.and_then(|bytes| Checkpoint::decode(id, &bytes).map_err(|error| error.to_string()));
        decoded.map_err(|error| self.found(FindingKind::Checkpoint, &path, error)).ok()
    }

    fn journals(&mut self, id: VolumeId, checkpoint: &Checkpoint) -> Pending {
        let mut pending = Pending::new();
        let mut seq = checkpoint.next_seq;
        for number in [checkpoint.journal + 1, checkpoint.journal + 2] {
            let path = self.layout.journal(number);
            let replay = match self.read(&path).map_err(|error| error.to_string()) {
                Ok(bytes) => journal::replay(id, number, seq, &bytes).map_err(|error| error.to_string()),
                Err(error) => Err(error),
            };
            match replay {
                Ok(replay) => {
                    if replay.torn {
                        let detail = format!("batch {} is torn", seq + replay.batches.len() as u64);
                        self.found(FindingKind::TornTail, &path, detail);
                    }
                    for batch in replay.batches {
                        self.report.batches += 1;
                        seq = batch.seq + 1;
                        for record in batch.records {
                            if let Record::File(file, change) = record {
                                pending.entry(file).or_default().push((batch.seq, change));
                            }
                        }
                    }
                }
                Err(error) => {
                    self.found(FindingKind::Journal, &path, error);
                    return pending;
                }
            }
        }
        pending
    }

    /// What was set aside because it could not be put into an index.
    fn aside(&mut self, id: VolumeId) -> Aside {
        let path = self.layout.aside();
        let aside = match self.read(&path) {
            Ok(bytes) => aside::decode(id, &bytes).map_err(|error| error.to_string()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Aside::new()),
            Err(error) => Err(error.to_string()),
        };
        aside.unwrap_or_else(|error| {
            self.found(FindingKind::Journal, &path, error);
            Aside::new()
        })
    }

    /// What was found damaged while the volume was in use.
    fn marks(&mut self, id: VolumeId) {
        let path = self.layout.damage();
        let marks = match self.read(&path) {
            Ok(bytes) => damage::decode(id, &bytes).map_err(|error| error.to_string()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => Err(error.to_string()),
        };
        match marks {
            Ok(marks) => self.marks = marks,
            Err(error) => self.found(FindingKind::Cache, &path, error),
        }
    }

    /// Every file that an index or a journal knows.
    fn files(&mut self, pending: &Pending) -> BTreeSet<FileId> {
        let mut files: BTreeSet<FileId> = pending.keys().copied().collect();
        let dir = self.layout.dir("index");
        for shard_name in self.list(&dir) {
            let shard_path = dir.join(&shard_name);
            for name in self.list(&shard_path) {
                match name.parse::<FileId>() {
                    Ok(file) if shard(file) == shard_name => {
                        files.insert(file);
                    }
                    _ => self.unknown(&shard_path.join(&name)),
                }
            }
        }
        files
    }

    fn unknown(&mut self, path: &Path) {
        let is_ours = path.extension().is_some_and(|extension| extension == "tmp");
        let kind = if is_ours { FindingKind::Leftover } else { FindingKind::Unknown };
        self.found(
            kind,
            path,
            if is_ours { "a file that was not finished" } else { "not a name of Sluice's" },
        );
    }

    fn file(&mut self, file: FileId, changes: &[(u64, Change)]) {
        let path = self.layout.index(file);
        self.client = None;
        let mut state = match self.read(&path) {
            Ok(bytes) => match index::decode(file, &bytes) {
                Ok(state) => state,
                Err(error) => {
                    self.report.files += 1;
                    return self.found_in(FindingKind::Index, &path, file, &Ranges::new(), error);
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => FileState::default(),
            Err(error) => return self.found_in(FindingKind::Index, &path, file, &Ranges::new(), error),
        };
        for (seq, change) in changes {
            state.apply(*seq, change);
        }
        if !state.is_known() {
            return;
        }
        self.client = state.record.as_ref().map(|record| record.client_id());
        self.report.files += 1;
        self.report.published += u64::from(state.published.is_some());
        let held: u64 = state.held.iter().map(|range| range.end - range.start).sum();
        self.report.chunks += held;
        self.report.bytes += state.held_bytes;
        let shape = state.published.map(|published| published.geometry);
        if shape.is_some() && shape != state.shape_of_held() {
            let detail = "it is published, and its chunks are not a whole";
            self.found_in(FindingKind::Root, &path, file, &state.held, detail);
        }
        let mut tree = shape.filter(|shape| shape.chunks() > 1).map(SpanTree::new);
        let mut sound = true;
        for segment in segments(&state.held) {
            let values = self.values(file, &state, segment.clone());
            sound &= values.len() as u64 == count(&state.held, &segment);
            sound &= self.data(file, &state, &segment, &values);
            if let Some(tree) = &mut tree {
                merge(tree, shape.unwrap_or(Geometry::largest()), &segment, &values);
            }
        }
        // What is missing was found already.
        if let (Some(tree), Some(published), true) = (tree, state.published, sound)
            && tree.root() != Some(published.root)
        {
            let detail = format!("its values merge to {:?}, not to {}", tree.root(), published.root);
            self.found_in(FindingKind::Root, &path, file, &state.held, detail);
        }
    }

    /// The values of the chunks held of a segment, as far as they are sound.
    fn values(&mut self, file: FileId, state: &FileState, segment: Range<u64>) -> BTreeMap<u64, Chunk> {
        let name = Name::Values(segment.start / SEGMENT_CHUNKS);
        let path = self.layout.segment(file, name);
        let mut found = BTreeMap::new();
        let mut damaged = Ranges::new();
        let opened = self.open(&path);
        for range in held_in(&state.held, &segment) {
            // In pieces, so that a whole segment's values need no memory of their own.
            for start in range.clone().step_by(4096) {
                let end = (start + 4096).min(range.end);
                let Ok(first) = ChunkIndex::new(start) else { continue };
                let slots = match &opened {
                    Ok(handle) => {
                        handle.read_at(values::offset(first), (end - start) as usize * values::SLOT_LEN)
                    }
                    Err(_) => Ok(Vec::new()),
                };
                let slots = slots.unwrap_or_default();
                let mut slots = slots.chunks(values::SLOT_LEN);
                for chunk in start..end {
                    let slot = slots.next();
                    if let Some(fresh) = state.fresh.get(&chunk) {
                        found.insert(chunk, *fresh);
                        continue;
                    }
                    let decoded = ChunkIndex::new(chunk).ok().zip(slot);
                    match decoded.and_then(|(index, slot)| values::decode(file, index, slot).ok()) {
                        Some(value) if value.len == state.len_of(chunk) => {
                            found.insert(chunk, value);
                        }
                        Some(_) | None => damaged.insert(chunk..chunk + 1),
                    }
                }
            }
        }
        if !damaged.is_empty() {
            let detail = match opened {
                Ok(_) => "the check of a value does not match".to_owned(),
                Err(error) => error.to_string(),
            };
            self.found_in(FindingKind::Values, &path, file, &damaged, detail);
        }
        found
    }

    /// Whether the bytes of these chunks are what their values say, or at least as many.
    fn data(
        &mut self,
        file: FileId,
        state: &FileState,
        segment: &Range<u64>,
        values: &BTreeMap<u64, Chunk>,
    ) -> bool {
        let path = self.layout.segment(file, Name::Data(segment.start / SEGMENT_CHUNKS));
        let handle = match self.open(&path) {
            Ok(handle) => handle,
            Err(error) => {
                let mut all = Ranges::new();
                held_in(&state.held, segment).for_each(|range| all.insert(range));
                self.found_in(FindingKind::Bytes, &path, file, &all, error);
                return false;
            }
        };
        let length = handle.length().unwrap_or(0);
        let only = state.published.filter(|published| published.geometry.chunks() == 1);
        let mut damaged = Ranges::new();
        let mut why = None;
        for (number, chunk) in values {
            let offset = (number % SEGMENT_CHUNKS) * CHUNK_LEN;
            self.progress.bytes += u64::from(chunk.len);
            let wrong = if offset + u64::from(chunk.len) > length {
                Some(format!("the file ends at byte {length}"))
            } else if !self.options.hash_bytes {
                let is_marked = self.marks.get(&file).is_some_and(|marks| marks.covers(*number..*number + 1));
                is_marked.then(|| "they were found damaged while the volume was in use".to_owned())
            } else {
                match handle.read_at(offset, chunk.len as usize) {
                    Err(error) => Some(error.to_string()),
                    Ok(bytes) if ChainingValue::of_chunk(chunk.index, &bytes) != Some(chunk.value) => {
                        Some("the bytes do not hash to their value".to_owned())
                    }
                    Ok(bytes) if only.is_some_and(|only| Root::of_bytes(&bytes) != only.root) => {
                        Some("the bytes do not hash to the root".to_owned())
                    }
                    Ok(_) => None,
                }
            };
            if let Some(wrong) = wrong {
                damaged.insert(*number..number + 1);
                why.get_or_insert(wrong);
            }
            if self.options.hash_bytes {
                (self.options.progress)(self.progress);
            }
        }
        match why {
            None => true,
            Some(why) => {
                self.found_in(FindingKind::Bytes, &path, file, &damaged, why);
                false
            }
        }
    }

    /// What lies in the volume and belongs to no file that is known.
    fn leftovers(&mut self, known: &BTreeSet<FileId>, logged: &BTreeSet<FileId>) {
        let chunks = self.layout.dir("chunks");
        for shard_name in self.list(&chunks) {
            for name in self.list(&chunks.join(&shard_name)) {
                let path = chunks.join(&shard_name).join(&name);
                match name.parse::<FileId>() {
                    Ok(file) if shard(file) == shard_name && known.contains(&file) => self.pages(file, &path),
                    Ok(file) if logged.contains(&file) => {
                        self.found(FindingKind::Leftover, &path, "chunks from before the log had the file");
                    }
                    Ok(file) => self.unrecorded(file, &path),
                    Err(_) => self.unknown(&path),
                }
            }
        }
        let trash = self.layout.dir("trash");
        for name in self.list(&trash) {
            self.found(FindingKind::Leftover, &trash.join(name), "chunks on their way out");
        }
        let root = self.layout.root().to_path_buf();
        for name in self.list(&root) {
            let ours = [
                "lock",
                "lost+found",
                "volume",
                "checkpoint",
                "journal-0",
                "journal-1",
                "aside",
                "damage",
                "index",
                "chunks",
                "log",
                "trash",
            ];
            if !ours.contains(&name.as_str()) && scrub_mark::parse_name(&name).is_none() {
                self.unknown(&root.join(name));
            }
        }
    }

    /// Chunks of a file without any record. Values beside them say that there was one.
    fn unrecorded(&mut self, file: FileId, path: &Path) {
        if has_values(self.list(path)) {
            let (index, detail) = (self.layout.index(file), "it is missing, though chunks were acknowledged");
            self.found_in(FindingKind::Index, &index, file, &Ranges::new(), detail);
        } else {
            self.found(FindingKind::Leftover, path, "chunks that were never acknowledged");
        }
    }

    /// Pages are a cache: one that is damaged costs a question.
    fn pages(&mut self, file: FileId, dir: &Path) {
        for name in self.list(dir) {
            let path: PathBuf = dir.join(&name);
            let number = |prefix| name.strip_prefix(prefix).and_then(|rest: &str| rest.parse::<u64>().ok());
            match number("page-") {
                Some(segment) => {
                    let read = self.read(&path).map_err(|error| error.to_string());
                    let read = read.and_then(|bytes| {
                        page::decode(file, segment, &bytes).map_err(|error| error.to_string())
                    });
                    if let Err(error) = read {
                        self.found(FindingKind::Cache, &path, error);
                    }
                }
                None if number("data-").is_some() || number("values-").is_some() => {}
                None => self.unknown(&path),
            }
        }
    }
}

/// The segments that hold any of these chunks, as ranges of chunks.
fn segments(held: &Ranges) -> Vec<Range<u64>> {
    let mut segments: Vec<Range<u64>> = Vec::new();
    for range in held.iter() {
        for segment in range.start / SEGMENT_CHUNKS..range.end.div_ceil(SEGMENT_CHUNKS) {
            let segment = segment * SEGMENT_CHUNKS..(segment + 1) * SEGMENT_CHUNKS;
            if segments.last() != Some(&segment) {
                segments.push(segment);
            }
        }
    }
    segments
}

/// The parts of what is held that lie in a segment.
fn held_in(held: &Ranges, segment: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let clip = |range: Range<u64>| range.start.max(segment.start)..range.end.min(segment.end);
    held.iter().map(clip).filter(|range| !range.is_empty()).collect::<Vec<_>>().into_iter()
}

fn count(held: &Ranges, segment: &Range<u64>) -> u64 {
    held_in(held, segment).map(|range| range.end - range.start).sum()
}

/// Adds a segment's values to the tree of its file.
fn merge(tree: &mut SpanTree, shape: Geometry, segment: &Range<u64>, values: &BTreeMap<u64, Chunk>) {
    for place in Place::tile(segment.start..segment.end.min(shape.chunks()), SEGMENT_LEVEL, shape) {
        let part: Vec<ChainingValue> =
            values.range(place.range(shape)).map(|(_, chunk)| chunk.value).collect();
        if let Some(value) = merge_chunks(shape, place, &part) {
            // The tree is new and the places do not overlap, so nothing can contradict.
            let _ = tree.insert(Span::new(place, value));
        }
    }
}
