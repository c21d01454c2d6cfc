//! The checkpointer: moves what only the journal holds into the files it is about, so that a journal can be written
//! again from its beginning. Changes go on meanwhile, into the other journal.
//!
//! Order: values, then indexes, then the directories that name them, then what is [set aside](super::aside), then the
//! checkpoint that frees the journal. A crash anywhere in between leaves the journal in force.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use sluice_engine::ids::FileId;
use sluice_engine::limits::SEGMENT_CHUNKS;

use super::aside::{self, Aside};
use super::change::Chunk;
use super::checkpoint::Checkpoint;
use super::disk::Open;
use super::entry::{Entry, Name};
use super::shared::{Counters, Shared};
use super::volume::VolumeId;
use super::{index, lock, values};
use crate::StoreError;

/// How long to wait before a checkpoint that failed is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// How soon a thread that waits notices that the store stopped.
const TICK: Duration = Duration::from_millis(20);

/// The committer's end.
#[derive(Debug)]
pub(crate) struct Checkpointer {
    shared: Arc<Shared>,
    /// Bound 1: a checkpoint begins only when the one before has ended.
    jobs: SyncSender<Job>,
    status: Arc<Status>,
}

#[derive(Debug)]
struct Job {
    checkpoint: Checkpoint,
    files: BTreeSet<FileId>,
}

#[derive(Debug, Default)]
struct Status {
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    running: bool,
    /// Why the last attempt failed.
    error: Option<StoreError>,
    /// Somebody waits: do not rest before the next attempt.
    wanted: bool,
}

impl Checkpointer {
    /// Starts the thread; it ends when the committer does, or when the disk is shut.
    pub(crate) fn start(shared: Arc<Shared>, volume: VolumeId) -> io::Result<Self> {
        let (jobs, inbox) = sync_channel(1);
        let status = Arc::new(Status::default());
        let (worker_shared, worker_status) = (shared.clone(), status.clone());
        thread::Builder::new()
            .name("sluice-checkpoint".into())
            .spawn(move || run(&worker_shared, volume, &inbox, &worker_status))?;
        Ok(Self { shared, jobs, status })
    }

    /// Whether no checkpoint is under way.
    pub(crate) fn is_idle(&self) -> bool {
        !lock(&self.status.progress).running
    }

    /// Begins a checkpoint that frees the journals up to `journal`; `next_seq` is the first batch after them.
    pub(crate) fn begin(&self, journal: u64, next_seq: u64) {
        self.begin_with(journal, next_seq, self.shared.table.begin_flush());
    }

    /// The same at the start, while the journal after it has changes already.
    pub(crate) fn begin_older(&self, journal: u64, next_seq: u64) {
        self.begin_with(journal, next_seq, self.shared.table.begin_flush_of_older());
    }

    fn begin_with(&self, journal: u64, next_seq: u64, files: BTreeSet<FileId>) {
        let volume = lock(&self.shared.volume).clone();
        lock(&self.status.progress).running = true;
        let job = Job { checkpoint: Checkpoint { journal, next_seq, volume }, files };
        // Fails only if the thread is gone because the disk is shut; then nothing is to be saved any more.
        let _ = self.jobs.send(job);
    }

    /// Waits until no checkpoint is under way; fails if an attempt fails meanwhile.
    pub(crate) fn wait(&self) -> Result<(), StoreError> {
        let mut progress = lock(&self.status.progress);
        // What failed before may succeed now.
        progress.error = None;
        progress.wanted = true;
        self.status.changed.notify_all();
        while progress.running {
            if self.shared.disk.is_shut() {
                return Err(StoreError::Closing);
            }
            if let Some(error) = &progress.error {
                return Err(error.clone());
            }
            let waited = self.status.changed.wait_timeout(progress, TICK);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

fn run(shared: &Arc<Shared>, volume: VolumeId, jobs: &Receiver<Job>, status: &Status) {
    // As the volume was opened, so it is on the disk.
    let mut has_aside = !shared.table.aside().is_empty();
    for job in jobs {
        while let Err(error) = write(shared, volume, &mut has_aside, &job) {
            if shared.disk.is_shut() {
                return;
            }
            tracing::warn!(%error, "checkpoint failed, the journal stays");
            let mut progress = lock(&status.progress);
            progress.error = Some(error);
            progress.wanted = false;
            status.changed.notify_all();
            let mut waited = Duration::ZERO;
            while waited < RETRY && !progress.wanted && !shared.disk.is_shut() {
                let tick = status.changed.wait_timeout(progress, TICK);
                progress = tick.unwrap_or_else(PoisonError::into_inner).0;
                waited += TICK;
            }
        }
        shared.table.end_flush();
        Counters::add(&shared.counters.checkpoints, 1);
        *lock(&status.progress) = Progress::default();
        status.changed.notify_all();
    }
}

fn write(shared: &Arc<Shared>, volume: VolumeId, has_aside: &mut bool, job: &Job) -> Result<(), StoreError> {
    let mut dirs = BTreeSet::new();
    for file in &job.files {
        if let Some(reason) = shared.failure.get() {
            return Err(StoreError::ReadOnly { reason: reason.clone() });
        }
        match shared.load_or_set_aside(*file)? {
            Some(entry) => {
                shared.flush(&entry, &mut dirs)?;
                shared.table.forget_aside(*file);
            }
            None => continue,
        }
    }
    for dir in &dirs {
        match shared.counters.sync(|| shared.disk.sync_dir(dir)) {
            Ok(()) => {}
            // A shard that never held chunks.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(shared.fail("syncing a directory", &error)),
        }
    }
    for dir in dirs {
        if dir.parent().is_some_and(|parent| parent == shared.layout.dir("index")) {
            shared.note_durable(dir);
        }
    }
    let aside = shared.table.aside();
    if *has_aside || !aside.is_empty() {
        shared.keep_aside(volume, &aside)?;
        *has_aside = !aside.is_empty();
    }
    let path = shared.layout.checkpoint();
    shared.replace_synced(&path, &job.checkpoint.encode(volume))?;
    shared
        .counters
        .sync(|| shared.disk.sync_dir(shared.layout.root()))
        .map_err(|error| shared.fail("syncing a directory", &error))
}

impl Shared {
    /// The entry of a file; `None` if its index cannot be read, and its changes are set aside.
    fn load_or_set_aside(&self, file: FileId) -> Result<Option<Arc<Entry>>, StoreError> {
        loop {
            match self.load(file) {
                Ok(entry) => return Ok(Some(entry)),
                Err(StoreError::Closing) => return Err(StoreError::Closing),
                Err(error) if self.table.set_aside(file) => {
                    tracing::error!(%file, %error, "a file is not served: its latest changes are set aside");
                    return Ok(None);
                }
                // Somebody has read it meanwhile.
                Err(_) => {}
            }
        }
    }

    /// Makes what is set aside durable, before a journal that has it too may go. What came back from there must not
    /// come again after the journal that says so is gone.
    fn keep_aside(&self, volume: VolumeId, aside: &Aside) -> Result<(), StoreError> {
        let path = self.layout.aside();
        if aside.is_empty() {
            match self.disk.remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(self.error("removing what was set aside", &error)),
            }
        } else {
            self.replace_synced(&path, &aside::encode(volume, aside))?;
        }
        self.counters
            .sync(|| self.disk.sync_dir(self.layout.root()))
            .map_err(|error| self.fail("syncing a directory", &error))
    }

    /// Writes a file's values and index. `dirs` gathers the directories to sync before the journal may go.
    fn flush(&self, entry: &Entry, dirs: &mut BTreeSet<PathBuf>) -> Result<(), StoreError> {
        let _names = lock(&entry.names);
        let (state, epoch) = {
            let live = lock(&entry.live);
            (live.state.clone(), live.epoch)
        };
        let fresh: Vec<Chunk> = state.fresh.values().copied().collect();
        self.write_values(entry, epoch, &fresh)?;
        let file = entry.file;
        let shard = self.layout.index_shard(file);
        let path = self.layout.index(file);
        // Made even where nothing goes in, so that it is there when its name is synced and noted as durable.
        self.disk.create_dir(&shard).map_err(|error| self.error("making a directory", &error))?;
        match index::encode(file, &state) {
            Some(bytes) => self.replace_synced(&path, &bytes)?,
            None => match self.disk.remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(self.error("removing an index", &error)),
            },
        }
        dirs.extend(self.parent_if_new(&shard));
        dirs.insert(shard);
        // What was taken away must stay away once the journal no longer says so.
        dirs.insert(self.layout.chunks_shard(file));
        lock(&entry.live).state.settle(&fresh);
        Ok(())
    }

    /// Writes those values of a file that only the journal holds.
    pub(crate) fn flush_values(&self, entry: &Entry) -> Result<(), StoreError> {
        let _names = lock(&entry.names);
        let (fresh, epoch): (Vec<Chunk>, u64) = {
            let live = lock(&entry.live);
            (live.state.fresh.values().copied().collect(), live.epoch)
        };
        self.write_values(entry, epoch, &fresh)?;
        lock(&entry.live).state.settle(&fresh);
        Ok(())
    }

    /// Writes values, in order of their chunks, and makes them durable. The caller holds `names`.
    fn write_values(&self, entry: &Entry, epoch: u64, chunks: &[Chunk]) -> Result<(), StoreError> {
        let segment_of = |chunk: &Chunk| chunk.index.number() / SEGMENT_CHUNKS;
        for chunks in chunks.chunk_by(|a, b| segment_of(a) == segment_of(b)) {
            let name = Name::Values(segment_of(&chunks[0]));
            let handle = self
                .handle(entry.file, epoch, name, Open::Create)
                .map_err(|error| self.error("opening values", &error))?;
            for run in chunks.chunk_by(|a, b| a.index.number() + 1 == b.index.number()) {
                let mut slots = Vec::with_capacity(run.len() * values::SLOT_LEN);
                for chunk in run {
                    values::encode(entry.file, chunk, &mut slots);
                }
                handle
                    .write_at(values::offset(run[0].index), &slots)
                    .map_err(|error| self.error("writing values", &error))?;
            }
            self.counters.sync(|| handle.sync_data()).map_err(|error| self.fail("syncing values", &error))?;
            if lock(&entry.live).synced.contains(&name) {
                continue;
            }
            for dir in self.dirs_of_chunks(entry.file) {
                self.counters
                    .sync(|| self.disk.sync_dir(&dir))
                    .map_err(|error| self.fail("syncing a directory", &error))?;
            }
            lock(&entry.live).synced.insert(name);
        }
        Ok(())
    }

    /// Replaces a file as a whole; its directory is the caller's to sync.
    pub(crate) fn replace_synced(&self, path: &std::path::Path, bytes: &[u8]) -> Result<(), StoreError> {
        self.counters.sync(|| self.disk.replace(path, bytes)).map_err(|error| match error {
            super::gate::ReplaceError::Write(error) => self.error("writing a file", &error),
            super::gate::ReplaceError::Sync(error) => self.fail("syncing a file", &error),
        })
    }
}
