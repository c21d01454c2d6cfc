//! The files in memory: one entry per file that is used.
//!
//! An entry is read from the bucket when somebody asks, and may be forgotten when nobody does. Only what is durable is in
//! it: what is known of the file, and which runs are there.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{FileId, Generation};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::ranges::Ranges;
use tokio::sync::{Notify, OnceCell, Semaphore};

use super::chain::Chain;
use super::file::{Assembled, FileState};
use super::keys;
use super::lock;
use super::pieces::{Piece, PieceName, Pieces, bit};
use crate::claims::Claims;
use crate::{FileSummary, StoreError};

/// How long a request that was not answered may still take effect. Servers and networks give up long before.
pub(crate) const LATE: Duration = Duration::from_secs(15 * 60);

/// Runs of one file of which it is not known whether they are there; with more, the file takes no new ones for a while.
pub(crate) const MAX_DOUBTFUL: usize = 1024;

/// A file in memory.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Which.
    pub(crate) file: FileId,
    /// What is known. Never held across an await.
    pub(crate) live: Mutex<Live>,
    /// Tells when a claim was released.
    pub(crate) released: Notify,
    /// One permit: whoever changes what is known of the file has it until that is durable.
    pub(crate) turn: Semaphore,
    /// One permit: whoever assembles the file has it.
    pub(crate) assembling: Semaphore,
}

/// What changes about a file in memory.
#[derive(Debug, Default)]
pub(crate) struct Live {
    /// What is durable.
    pub(crate) state: FileState,
    /// Where it is written next.
    pub(crate) chain: Chain,
    /// The runs that are there.
    pub(crate) pieces: Pieces,
    /// Who writes.
    pub(crate) claims: Claims,
    /// Runs of which it is not known whether they are there, and since when.
    pub(crate) doubtful: BTreeMap<PieceName, (Piece, Instant)>,
    /// How often recorded chunks went.
    pub(crate) losses: u64,
    /// How often runs went because their chunks were assembled.
    pub(crate) retired: u64,
}

/// Where the bytes of a chunk are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// The object.
    pub(crate) key: String,
    /// Which of its bytes.
    pub(crate) bytes: Range<u64>,
    /// The value, if it is known without asking: assembled chunks have theirs in an object.
    pub(crate) value: Option<ChainingValue>,
    /// The segment that it is in, if it was assembled.
    pub(crate) segment: Option<u64>,
}

impl Entry {
    fn new(file: FileId, live: Live) -> Self {
        Self {
            file,
            live: Mutex::new(live),
            released: Notify::new(),
            turn: Semaphore::new(1),
            assembling: Semaphore::new(1),
        }
    }
}

impl Live {
    /// What was read of a file.
    pub(crate) fn read(chain: Chain, state: FileState, pieces: Vec<Piece>) -> Self {
        let mut live = Self { chain, ..Self::default() };
        pieces.into_iter().for_each(|piece| live.pieces.add(piece));
        live.set(state);
        live
    }

    /// Takes over what is durable now.
    pub(crate) fn set(&mut self, state: FileState) {
        if state.life != self.state.life || !state.is_known() || state.dropped {
            if !self.pieces.is_empty() && self.state.is_known() {
                self.losses += 1;
            }
            if self.state.is_known() {
                self.pieces = Pieces::default();
                self.doubtful.clear();
            }
        }
        self.pieces.set(&state.void, state.geometry());
        self.state = state;
    }

    /// Whether the chunk has a record.
    pub(crate) fn has(&self, chunk: u64) -> bool {
        self.state.assembled_has(chunk) || self.pieces.held_chunks().covers(chunk..chunk + 1)
    }

    /// The chunks that have one.
    pub(crate) fn held(&self) -> Ranges {
        let mut held = self.pieces.held_chunks().clone();
        if let Some(whole) = &self.state.assembled {
            let mut rest = Ranges::new();
            rest.insert(0..whole.geometry.chunks());
            whole.lost.iter().for_each(|range| rest.remove(range));
            rest.iter().for_each(|range| held.insert(range));
        }
        held
    }

    /// Lengths of the recorded chunks that are not full.
    fn short(&self) -> BTreeMap<u64, u32> {
        let mut short = self.pieces.short().clone();
        if let Some(whole) = &self.state.assembled
            && let Some(last) = whole.geometry.chunks().checked_sub(1)
            && self.state.assembled_has(last)
        {
            let len = whole.geometry.range_len(last, last + 1);
            if len < CHUNK_LEN {
                short.insert(last, len as u32);
            }
        }
        short
    }

    /// Bytes of the chunks of `held`.
    fn bytes_of(held: &Ranges, short: &BTreeMap<u64, u32>) -> u64 {
        let full: u64 = held.iter().map(|range| (range.end - range.start) * CHUNK_LEN).sum();
        full - short.values().map(|len| CHUNK_LEN - u64::from(*len)).sum::<u64>()
    }

    /// The summary, if the file has one.
    pub(crate) fn summary(&self, floor: Generation) -> Option<FileSummary> {
        let held = self.held();
        Some(FileSummary {
            tenant: self.state.tenant?,
            record: self.state.record.clone(),
            size: self.state.geometry(),
            facts: self.state.facts.clone(),
            generation: self.state.generation(floor),
            held_bytes: Self::bytes_of(&held, &self.short()),
            held: held.iter().collect(),
            published: self.state.published().map(|whole| whole.root),
            in_log: self.state.in_lists,
        })
    }

    /// The shape that the recorded chunks have if they are a whole file.
    pub(crate) fn shape_of_held(&self) -> Option<Geometry> {
        let (held, short) = (self.held(), self.short());
        let mut ranges = held.iter();
        let chunks = match (ranges.next(), ranges.next()) {
            (None, _) => 0,
            (Some(range), None) if range.start == 0 => range.end,
            (Some(_), _) => return None,
        };
        let geometry = Geometry::new(Self::bytes_of(&held, &short)).ok()?;
        let regular = short.keys().all(|chunk| chunk + 1 == chunks);
        (regular && geometry.chunks() == chunks).then_some(geometry)
    }

    /// Where the bytes of a chunk are. A run comes before what was assembled: it may be there to mend that.
    pub(crate) fn source(&self, file: FileId, index: ChunkIndex) -> Result<Source, StoreError> {
        if self.state.dropped {
            return Err(StoreError::Dropped(file));
        }
        if !self.state.is_known() {
            return Err(StoreError::NoFile(file));
        }
        let chunk = index.number();
        if let Some((held, piece)) =
            self.pieces.held(chunk).and_then(|held| Some((held, self.pieces.piece(held.piece)?)))
        {
            return Ok(Source {
                key: piece.key(file, self.state.life),
                bytes: piece.bytes(chunk),
                value: Some(held.value),
                segment: None,
            });
        }
        match &self.state.assembled {
            Some(whole) if self.state.assembled_has(chunk) => {
                let segment = chunk / whole.segment_chunks;
                let start = segment * whole.segment_chunks;
                Ok(Source {
                    key: keys::assembled(file, self.state.life, whole.root, segment),
                    bytes: whole.geometry.range_len(start, chunk)..whole.geometry.range_len(start, chunk + 1),
                    value: whole.only,
                    segment: Some(segment),
                })
            }
            Some(_) | None => Err(StoreError::Missing { index }),
        }
    }

    /// Marks a chunk as void in every run that has it, or may have it, unless its value is `but`. Whether there were any.
    pub(crate) fn avoid(&self, state: &mut FileState, chunk: u64, but: Option<ChainingValue>) -> bool {
        let there = self.pieces.of(chunk).map(|(name, piece)| (name, piece.value(chunk)));
        let doubtful = self.doubtful.iter().filter(|(_, (piece, _))| piece.run.range().contains(&chunk));
        let doubtful = doubtful.map(|(name, (piece, _))| (*name, piece.value(chunk)));
        let mut changed = false;
        for (name, value) in there.chain(doubtful) {
            if but.is_none() || value != but {
                let void = state.void.entry(name).or_default();
                changed |= *void & bit(name.start, chunk) == 0;
                *void |= bit(name.start, chunk);
            }
        }
        changed
    }

    /// Forgets doubts that are too old to come true.
    pub(crate) fn settle_doubts(&mut self, now: Instant) {
        self.doubtful.retain(|_, (_, since)| now.saturating_duration_since(*since) < LATE);
    }
}

/// The objects of what was assembled in a life.
pub(crate) fn assembled_keys(file: FileId, life: keys::Life, whole: &Assembled) -> Vec<String> {
    (0..whole.segments().max(1))
        .flat_map(|segment| {
            [keys::assembled(file, life, whole.root, segment), keys::values(file, life, whole.root, segment)]
        })
        .collect()
}

/// A place in the table; read once by whoever comes first.
type Place = Arc<OnceCell<Arc<Entry>>>;

/// All entries.
#[derive(Debug)]
pub(crate) struct Table {
    inner: Mutex<Inner>,
    /// Entries to keep that nothing else keeps in memory.
    limit: usize,
}

#[derive(Debug, Default)]
struct Inner {
    places: HashMap<FileId, Place>,
    /// The order in which they are looked at for eviction.
    clock: VecDeque<FileId>,
}

impl Table {
    pub(crate) fn new(limit: usize) -> Self {
        Self { inner: Mutex::new(Inner::default()), limit }
    }

    /// The entry of a file, which `read` gives if it is not there yet.
    pub(crate) async fn entry(
        &self,
        file: FileId,
        read: impl AsyncFnOnce() -> Result<Live, StoreError>,
    ) -> Result<Arc<Entry>, StoreError> {
        let place = {
            let mut inner = lock(&self.inner);
            match inner.places.get(&file) {
                Some(place) => place.clone(),
                None => {
                    inner.evict(self.limit);
                    let place = Place::default();
                    inner.places.insert(file, place.clone());
                    inner.clock.push_back(file);
                    place
                }
            }
        };
        let read = async || Ok::<_, StoreError>(Arc::new(Entry::new(file, read().await?)));
        place.get_or_try_init(read).await.cloned()
    }
}

impl Inner {
    /// Forgets entries that nobody uses while there are too many; looks at a few only.
    fn evict(&mut self, limit: usize) {
        for _ in 0..8 {
            if self.clock.len() < limit {
                return;
            }
            let Some(file) = self.clock.pop_front() else { return };
            let Some(place) = self.places.get(&file) else { continue };
            let idle = Arc::strong_count(place) == 1
                && place.get().is_none_or(|entry| {
                    let mut live = lock(&entry.live);
                    live.settle_doubts(Instant::now());
                    Arc::strong_count(entry) == 1 && live.claims.is_empty() && live.doubtful.is_empty()
                });
            if idle {
                self.places.remove(&file);
            } else {
                self.clock.push_back(file);
            }
        }
    }
}
