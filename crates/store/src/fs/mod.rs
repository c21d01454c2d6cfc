//! The filesystem backend: one process owns a volume, a directory of one filesystem.
//!
//! # Who does what
//! - *Callers* (tasks) decide nothing. They claim chunks, hand changes to the committer, and hop to the blocking
//!   pool for everything that touches the disk: hashing and writing bytes, reading, loading a file's index.
//! - The *committer* (one thread) decides every change against what is durable, group-commits, applies what became
//!   durable to the files in memory, and answers. Its queue is bounded, so callers wait before memory grows.
//! - The *checkpointer* (one thread) moves what only the journal holds into the files it is about, so that the
//!   journal can begin anew. Two journals take turns; changes go on meanwhile.
//! - The *keeper* (one thread) writes down the index of the log, where files are that came whole in one request,
//!   and collects its garbage. What goes into the log is decided and committed like every change.
//! - The *janitor* (one thread) removes what nobody refers to, reads again what a failed sync put in doubt, and takes
//!   back marks of damage that was mended.
//!
//! # What is durable when
//! Data is written in place as it arrives. Then: data synced, new names synced, record appended to the journal,
//! journal synced, answer. A file in memory shows only what is durable. Claims keep writers of the same chunk apart,
//! and outlive whoever holds them until the last write has returned.
//!
//! # How it stops
//! [`close`](crate::ChunkStore::close) takes no new work, waits a while for runs that are being written, checkpoints
//! and gives the volume up. [`FsStore::kill`], and dropping the store, stop it hard: the gate in front of the disk
//! shuts, so no operation happens afterwards, and the volume can be opened again at once, as after a crash; if the disk
//! hangs, once it has answered. The threads end by themselves when their channels close or the gate is shut.
//!
//! # When the disk fails
//! A sync that failed is never repeated and believed: what was not acknowledged fails, the volume is read-only until
//! it is opened again, and what was recorded in the same segments is read again from the device. A full disk refuses
//! runs while the reserve is left, and keeps taking what needs no room but the journal's. A file whose index cannot be
//! read is refused, and its latest changes are set aside, so that the journal can begin anew for the others.

mod aside;
mod change;
mod check;
mod checkpoint;
mod checkpointer;
mod committer;
mod damage;
mod disk;
mod entry;
mod files;
mod frame;
mod gate;
mod index;
mod janitor;
mod journal;
mod layout;
mod log;
mod plan;
mod read;
mod recovery;
mod request;
mod restore;
mod shared;
mod state;
mod values;
mod volume;
mod warm;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use quick_cache::sync::Cache;
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, FileId, Generation, TenantId};
use sluice_engine::limits::SEGMENT_CHUNKS;
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;
use tokio::sync::mpsc;

pub use check::{CheckOptions, CheckProgress, Finding, FindingKind, VolumeReport, check, check_on, holder};
pub use disk::{Disk, DiskFile, Open, RealDisk, VolumeLock};

use self::change::VolumeChange;
use self::checkpointer::Checkpointer;
use self::committer::{Committer, Task};
use self::damage::Damage;
use self::entry::Table;
use self::log::keeper;
use self::recovery::Recovered;
use self::request::{Answer, Request};
use self::shared::{Counters, Shared, Space, Writers};
use self::warm::Warm;
use crate::{
    ChunkStore, Chunks, FileSummary, Found, Listed, MAX_FACTS_LEN, MAX_MARK_LEN, MAX_PAGE_LEN, MAX_STATE_LEN,
    RecordOutcome, RunWriter, StoreError, Usage, Whole, WholeOutcome, limit, page, scrub_mark,
};

/// Changes that may wait for the committer; more of them wait in their callers.
const TASKS: usize = 4096;

/// Chores that may wait for the janitor; more of them are found again when the volume is opened.
const CHORES: usize = 1024;

/// Jobs that may wait for the keeper: each of them stands for all of its kind.
const JOBS: usize = 4;

/// Files of segments that are kept open.
const OPEN_SEGMENTS: usize = 256;

/// The most lost chunks in one record, so that a record fits a batch.
const LOST_PER_RECORD: usize = 16 << 10;

/// The most chunks whose values are asked for at once.
const MAX_VALUES: u64 = SEGMENT_CHUNKS;

/// Settings of a volume.
#[derive(Clone, Debug)]
pub struct FsOptions {
    /// Bytes of the journal at which it is checkpointed. Twice this and 4 MiB are reserved on the disk.
    pub journal_len: u64,
    /// Bytes of the filesystem to keep free: runs are refused before they touch them.
    pub reserve: u64,
    /// How long a writer may make no progress before another that wants its chunks takes them over, and for how long
    /// the disk is waited for when the store stops.
    pub stall: Duration,
    /// Files without pending changes that are kept in memory.
    pub idle_files: usize,
    /// Bytes of a segment of the log.
    pub log_segment_len: u64,
    /// Entries of the log's index that are kept in memory before they are written down: two a file, some 250 bytes each.
    pub log_index: usize,
}

impl Default for FsOptions {
    fn default() -> Self {
        Self {
            journal_len: 8 << 20,
            reserve: 64 << 20,
            stall: Duration::from_secs(10),
            idle_files: 10_000,
            log_segment_len: 64 << 20,
            log_index: 64 << 10,
        }
    }
}

/// Up to how many microseconds the syncs of each of [`FsMetrics::sync_times`] but the last took.
pub const SYNC_BOUNDS: [u64; 13] = [
    250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 5_000_000, 30_000_000,
];

/// Counters of a volume since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FsMetrics {
    /// Syncs of files and directories.
    pub syncs: u64,
    /// Time spent in them.
    pub sync_time: Duration,
    /// Syncs by how long they took (see [`SYNC_BOUNDS`]); together they are all.
    pub sync_times: [u64; SYNC_BOUNDS.len() + 1],
    /// Bytes of chunks written.
    pub bytes_written: u64,
    /// Batches appended to the journal.
    pub batches: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes in the journal since the last checkpoint began.
    pub journal_bytes: u64,
    /// Checkpoints written.
    pub checkpoints: u64,
    /// Times that something on the disk did not match its check or its value.
    pub integrity_failures: u64,
    /// Records appended to the log.
    pub log_records: u64,
    /// Bytes appended to the log.
    pub log_bytes: u64,
    /// Segments of the log that are there.
    pub log_segments: u64,
    /// Bytes of records in them that count.
    pub log_live_bytes: u64,
    /// Segments that went because most of them was garbage.
    pub log_collected: u64,
}

/// A chunk store in a directory. Dropping it without [`close`](ChunkStore::close) is [`kill`](Self::kill).
#[derive(Debug)]
pub struct FsStore {
    shared: Arc<Shared>,
}

impl FsStore {
    /// Opens the volume at `path` on the disk of this machine. A missing or empty directory becomes a volume. Blocks.
    ///
    /// [`StoreError::InUse`] if another store has it open, [`StoreError::NewerVersion`] if a newer version wrote
    /// it, [`StoreError::Unreadable`] if it cannot be read, is damaged, or is something else.
    pub fn open(path: impl AsRef<Path>, options: FsOptions) -> Result<Self, StoreError> {
        Self::open_on(Arc::new(RealDisk), path, options)
    }

    /// The same on any disk.
    pub fn open_on(
        disk: Arc<dyn Disk>,
        path: impl AsRef<Path>,
        options: FsOptions,
    ) -> Result<Self, StoreError> {
        let path = path.as_ref();
        let Recovered {
            disk,
            layout,
            header,
            volume,
            journal,
            pending,
            aside,
            older,
            next_trash,
            log,
            tail,
            damaged,
            damage,
        } = recovery::open(disk, path, &options)?;
        let (tasks, inbox) = mpsc::channel(TASKS);
        let (chores, chore_inbox) = sync_channel(CHORES);
        let (keeper, jobs) = sync_channel(JOBS);
        let id = header.id;
        let shared = Arc::new(Shared {
            disk,
            layout,
            header: Mutex::new(header),
            table: Table::new(options.idle_files, aside, pending),
            options,
            log,
            handles: Cache::new(OPEN_SEGMENTS),
            warm: Warm::default(),
            volume: Mutex::new(volume),
            failure: OnceLock::new(),
            counters: Counters::default(),
            closing: AtomicBool::new(false),
            writers: Writers::default(),
            tasks: Mutex::new(Some(tasks)),
            chores: Mutex::new(Some(chores)),
            keeper: Mutex::new(Some(keeper)),
            space: Mutex::new(Space::default()),
            durable_dirs: Mutex::new(BTreeSet::new()),
            damage: Damage::new(id, damage),
            kept: Mutex::new(BTreeSet::new()),
            next_trash: AtomicU64::new(next_trash),
        });
        shared.counters.journal_bytes.store(journal.end, Ordering::Relaxed);
        Counters::add(&shared.counters.integrity_failures, damaged);
        let store = Self { shared };
        store.start(id, (journal, tail), older, inbox, chore_inbox, jobs).map_err(|error| {
            StoreError::Unreadable {
                path: path.display().to_string(),
                reason: format!("cannot start a thread: {error}"),
            }
        })?;
        Ok(store)
    }

    fn start(
        &self,
        id: volume::VolumeId,
        (journal, tail): (journal::Journal, log::Tail),
        older: Option<(u64, u64)>,
        inbox: mpsc::Receiver<Task>,
        chores: std::sync::mpsc::Receiver<janitor::Chore>,
        jobs: std::sync::mpsc::Receiver<keeper::Job>,
    ) -> io::Result<()> {
        let shared = self.shared.clone();
        let checkpointer = Checkpointer::start(shared.clone(), id)?;
        if let Some((journal, next_seq)) = older {
            checkpointer.begin_older(journal, next_seq);
        }
        let committer = Committer { shared: shared.clone(), journal, tail, checkpointer };
        let keeping = shared.clone();
        thread::Builder::new().name("sluice-keeper".into()).spawn(move || keeper::run(&keeping, &jobs))?;
        thread::Builder::new().name("sluice-commit".into()).spawn(move || committer.run(inbox))?;
        thread::Builder::new().name("sluice-janitor".into()).spawn(move || janitor::run(&shared, &chores))?;
        Ok(())
    }

    /// Stops at once, without sync or checkpoint, as a crash of the process would: what was acknowledged is durable,
    /// what waits fails with [`StoreError::Closing`]. When it returns no operation of this store can reach the disk
    /// any more, and the volume can be opened again. Blocks for the disk operations under way, at most for
    /// [`FsOptions::stall`]: if the disk hangs, the volume stays locked until the last of them has returned.
    pub fn kill(&self) {
        self.shared.kill();
    }

    /// The counters.
    pub fn metrics(&self) -> FsMetrics {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (log_segments, log_live_bytes) = self.shared.log.usage();
        FsMetrics {
            syncs: read(&counters.syncs),
            sync_time: Duration::from_micros(read(&counters.sync_micros)),
            sync_times: counters.sync_times.each_ref().map(read),
            bytes_written: read(&counters.bytes_written),
            batches: read(&counters.batches),
            records: read(&counters.records),
            journal_bytes: read(&counters.journal_bytes),
            checkpoints: read(&counters.checkpoints),
            integrity_failures: read(&counters.integrity_failures),
            log_records: read(&counters.log_records),
            log_bytes: read(&counters.log_bytes),
            log_segments,
            log_live_bytes,
            log_collected: read(&counters.log_collected),
        }
    }

    /// Writes a checkpoint now, so that opening the volume has little to read.
    pub async fn checkpoint(&self) -> Result<(), StoreError> {
        self.shared.submit(|answer| Task::Checkpoint { answer }).await
    }

    async fn change(&self, file: FileId, request: Request) -> Result<Answer, StoreError> {
        let entry = self.shared.entry(file).await?;
        self.shared.change(entry, request).await
    }

    async fn next_generation(&self, file: FileId, request: Request) -> Result<Generation, StoreError> {
        match self.change(file, request).await? {
            Answer::Generation(generation) => Ok(generation),
            Answer::Done | Answer::Record(_) | Answer::Whole(_) | Answer::Discarded(_) => {
                Err(unexpected_answer())
            }
        }
    }
}

impl Drop for FsStore {
    fn drop(&mut self) {
        self.shared.kill();
    }
}

/// The committer answers each request in its own kind; this names the bug if it does not.
fn unexpected_answer() -> StoreError {
    StoreError::Io { operation: "committing".into(), reason: "an answer of another kind came".into() }
}

/// Locks; a thread that panicked left a state that is as good as any other, since every change is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Chunks for FsStore {
    async fn begin_run(
        &self,
        file: FileId,
        tenant: TenantId,
        run: Run,
        len: u64,
    ) -> Result<Box<dyn RunWriter>, StoreError> {
        Ok(Box::new(writer::begin(&self.shared, file, tenant, run, len).await?))
    }

    async fn values(
        &self,
        file: FileId,
        range: Range<u64>,
    ) -> Result<Vec<Option<ChainingValue>>, StoreError> {
        let len = range.end.saturating_sub(range.start);
        limit("range of chunks", usize::try_from(len).unwrap_or(usize::MAX), MAX_VALUES as usize)?;
        let range = range.start..range.end.max(range.start);
        let entry = self.shared.entry(file).await?;
        let chunks = self.shared.blocking(move |shared| shared.chunks(&entry, range)).await?;
        Ok(chunks.into_iter().map(|chunk| chunk.map(|chunk| chunk.value)).collect())
    }

    async fn read_chunk(&self, file: FileId, index: ChunkIndex) -> Result<Bytes, StoreError> {
        let entry = self.shared.entry(file).await?;
        self.shared.blocking(move |shared| shared.read_chunk(&entry, index)).await
    }
}

#[async_trait]
impl ChunkStore for FsStore {
    async fn put_record(&self, record: &MetadataRecord) -> Result<RecordOutcome, StoreError> {
        let request = Request::Metadata(Box::new(record.clone()));
        match self.change(record.file_id(), request).await? {
            Answer::Record(outcome) => Ok(outcome),
            Answer::Done | Answer::Whole(_) | Answer::Generation(_) | Answer::Discarded(_) => {
                Err(unexpected_answer())
            }
        }
    }

    async fn put_whole(
        &self,
        record: &MetadataRecord,
        facts: &[u8],
        whole: Whole,
    ) -> Result<WholeOutcome, StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        whole.check(record)?;
        let entry = self.shared.entry(record.file_id()).await?;
        self.shared.writable()?;
        self.shared.room(whole.bytes().len() as u64)?;
        let request = Request::Whole { record: Box::new(record.clone()), facts: facts.to_vec(), whole };
        match self.shared.change(entry, request).await? {
            Answer::Whole(outcome) => Ok(outcome),
            Answer::Done | Answer::Record(_) | Answer::Generation(_) | Answer::Discarded(_) => {
                Err(unexpected_answer())
            }
        }
    }

    async fn put_known(&self, record: &MetadataRecord, facts: &[u8]) -> Result<WholeOutcome, StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        let request = Request::Known { record: Box::new(record.clone()), facts: facts.to_vec() };
        match self.change(record.file_id(), request).await? {
            Answer::Whole(outcome) => Ok(outcome),
            Answer::Done | Answer::Record(_) | Answer::Generation(_) | Answer::Discarded(_) => {
                Err(unexpected_answer())
            }
        }
    }

    async fn put_size(&self, file: FileId, size: Geometry) -> Result<(), StoreError> {
        self.change(file, Request::Size(size)).await.map(|_| ())
    }

    async fn summary(&self, file: FileId) -> Result<Option<FileSummary>, StoreError> {
        let entry = self.shared.entry(file).await?;
        let floor = self.shared.floor(file);
        let summary = lock(&entry.live).state.summary(floor);
        Ok(summary)
    }

    async fn list(&self, after: Option<FileId>, limit: usize) -> Result<Vec<Found>, StoreError> {
        self.shared.blocking(move |shared| shared.list(after, limit)).await
    }

    async fn listed(
        &self,
        tenant: TenantId,
        after: Option<ClientFileId>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        self.shared.blocking(move |shared| shared.listed(tenant, after, limit)).await
    }

    async fn verify(&self, file: FileId, index: ChunkIndex) -> Result<u64, StoreError> {
        let entry = self.shared.entry(file).await?;
        self.shared.blocking(move |shared| shared.verify_chunk(&entry, index)).await
    }

    async fn damage(&self, file: FileId) -> Result<Vec<Range<u64>>, StoreError> {
        Ok(self.shared.damage.of(file))
    }

    async fn damaged_files(&self) -> Result<Vec<FileId>, StoreError> {
        let mut files = self.shared.damage.files();
        files.extend(self.shared.table.aside().into_keys());
        files.sort_unstable();
        files.dedup();
        Ok(files)
    }

    async fn put_scrub_mark(&self, share: Share, mark: &[u8]) -> Result<(), StoreError> {
        limit("mark of a scrub", mark.len(), MAX_MARK_LEN)?;
        self.shared.writable()?;
        let bytes = scrub_mark::encode(mark);
        self.shared.blocking(move |shared| shared.put_scrub_mark(share, &bytes)).await
    }

    async fn scrub_mark(&self, share: Share) -> Result<Option<Vec<u8>>, StoreError> {
        self.shared.blocking(move |shared| shared.scrub_mark(share)).await
    }

    async fn lose(&self, file: FileId, chunks: &[ChunkIndex]) -> Result<Generation, StoreError> {
        let mut parts: Vec<Vec<ChunkIndex>> = chunks.chunks(LOST_PER_RECORD).map(<[_]>::to_vec).collect();
        let last = parts.pop().unwrap_or_default();
        for part in parts {
            self.next_generation(file, Request::Lose(part)).await?;
        }
        self.next_generation(file, Request::Lose(last)).await
    }

    async fn put_facts(&self, file: FileId, facts: &[u8]) -> Result<(), StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        self.change(file, Request::Facts(facts.to_vec())).await.map(|_| ())
    }

    async fn publish(&self, file: FileId, root: Root) -> Result<(), StoreError> {
        let entry = self.shared.entry(file).await?;
        self.shared.writable()?;
        let checked = entry.clone();
        let request = self.shared.blocking(move |shared| shared.prepare_publication(&checked, root)).await?;
        match request {
            Some(request) => self.shared.change(entry, request).await.map(|_| ()),
            None => Ok(()),
        }
    }

    async fn recheck(&self, file: FileId) -> Result<Root, StoreError> {
        let entry = self.shared.entry(file).await?;
        self.shared.blocking(move |shared| shared.recheck(&entry)).await
    }

    async fn free(&self, file: FileId) -> Result<Generation, StoreError> {
        self.next_generation(file, Request::Free).await
    }

    async fn drop_file(&self, file: FileId, tenant: TenantId, facts: &[u8]) -> Result<(), StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        self.change(file, Request::Drop { tenant, facts: facts.to_vec() }).await.map(|_| ())
    }

    async fn discard_orphan(&self, file: FileId) -> Result<bool, StoreError> {
        match self.change(file, Request::Discard).await? {
            Answer::Discarded(discarded) => Ok(discarded),
            Answer::Done | Answer::Record(_) | Answer::Whole(_) | Answer::Generation(_) => {
                Err(unexpected_answer())
            }
        }
    }

    async fn raise_generations(&self, share: Share, floor: Generation) -> Result<(), StoreError> {
        self.shared.change_volume(VolumeChange::Floor(share, floor)).await
    }

    async fn put_page(&self, file: FileId, segment: u64, page: &[u8]) -> Result<(), StoreError> {
        limit("page", page.len(), MAX_PAGE_LEN)?;
        let entry = self.shared.entry(file).await?;
        self.shared.writable()?;
        self.shared.room(page.len() as u64)?;
        let bytes = page::encode(file, segment, page);
        self.shared.blocking(move |shared| shared.put_page(&entry, segment, &bytes)).await
    }

    async fn page(&self, file: FileId, segment: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.shared.blocking(move |shared| shared.page(file, segment)).await
    }

    async fn states(&self) -> Result<BTreeMap<Share, Vec<u8>>, StoreError> {
        Ok(lock(&self.shared.volume).states.clone())
    }

    async fn put_state(&self, share: Share, state: &[u8]) -> Result<(), StoreError> {
        limit("state of a share", state.len(), MAX_STATE_LEN)?;
        self.shared.change_volume(VolumeChange::State(share, state.to_vec())).await
    }

    fn usage(&self) -> Usage {
        let free = self.shared.free().saturating_sub(self.shared.options.reserve);
        Usage { free, read_only: self.shared.failure.get().is_some() }
    }

    async fn close(&self) -> Result<(), StoreError> {
        self.shared.closing.store(true, Ordering::Release);
        let drained = async {
            loop {
                let done = self.shared.writers.done.notified();
                tokio::pin!(done);
                done.as_mut().enable();
                if self.shared.writers.open.load(Ordering::Acquire) == 0 {
                    return;
                }
                done.await;
            }
        };
        if tokio::time::timeout(self.shared.options.stall, drained).await.is_err() {
            tracing::warn!("closing the store while runs are being written");
        }
        let result = match self.checkpoint().await {
            // What is durable stays in the journal.
            Err(StoreError::ReadOnly { .. } | StoreError::Closing) => Ok(()),
            result => result,
        };
        self.shared
            .blocking(|shared| {
                shared.kill();
                Ok(())
            })
            .await?;
        result
    }
}
