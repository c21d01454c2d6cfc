//! What the threads and callers of one store share: its disk, its files in memory, its health and its counters.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use quick_cache::sync::Cache;
use sluice_engine::ids::{FileId, Generation};
use sluice_engine::share::Share;
use tokio::sync::{Notify, mpsc, oneshot};

use super::change::VolumeChange;
use super::committer::Task;
use super::damage::Damage;
use super::disk::{DiskFile, Open};
use super::entry::{Entry, Name, Table};
use super::gate::{self, GatedDisk};
use super::index;
use super::janitor::Chore;
use super::layout::Layout;
use super::log::Log;
use super::log::keeper::Job;
use super::request::{Answer, Request};
use super::state::{FileState, Origin};
use super::volume::{self, Header};
use super::warm::Warm;
use super::{FsOptions, lock};
use crate::StoreError;
use crate::fs::SYNC_BOUNDS;
use crate::share::{self, Floors, States};

/// How old the answer to "how much room is left" may be.
const SPACE_AGE: Duration = Duration::from_millis(100);

/// What everybody shares.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) disk: GatedDisk,
    pub(crate) layout: Layout,
    /// The header, as it is durable.
    pub(crate) header: Mutex<Header>,
    pub(crate) options: FsOptions,
    pub(crate) table: Table,
    pub(crate) log: Log,
    /// Open files of segments, by life and name; the bound keeps file descriptors few.
    pub(crate) handles: Cache<(u64, Name), Arc<dyn DiskFile>>,
    /// What was read lately.
    pub(crate) warm: Warm,
    pub(crate) volume: Mutex<VolumeState>,
    /// Why the volume is read-only, once it is.
    pub(crate) failure: OnceLock<String>,
    pub(crate) counters: Counters,
    pub(crate) closing: AtomicBool,
    pub(crate) writers: Writers,
    /// To the committer. `None` once the store stops.
    pub(crate) tasks: Mutex<Option<mpsc::Sender<Task>>>,
    /// To the janitor. `None` once the store stops.
    pub(crate) chores: Mutex<Option<SyncSender<Chore>>>,
    /// Files whose chunks are kept though nothing is known of them: their index is missing.
    pub(crate) kept: Mutex<BTreeSet<FileId>>,
    /// To the keeper of the log. `None` once the store stops.
    pub(crate) keeper: Mutex<Option<SyncSender<Job>>>,
    pub(crate) space: Mutex<Space>,
    /// Directories whose own name is known to be durable.
    pub(crate) durable_dirs: Mutex<BTreeSet<PathBuf>>,
    pub(crate) next_trash: AtomicU64,
    pub(crate) damage: Damage,
}

/// What belongs to no file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct VolumeState {
    pub(crate) floors: Floors,
    pub(crate) states: States,
}

impl VolumeState {
    /// Applies a change.
    pub(crate) fn apply(&mut self, change: VolumeChange) {
        match change {
            VolumeChange::Floor(share, floor) => drop(self.floors.raise(share, floor)),
            VolumeChange::State(share, state) => share::put_state(&mut self.states, share, state),
        }
    }
}

/// Room, as it was when last asked; any amount until then.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) asked: Option<Instant>,
    pub(crate) free: u64,
}

impl Default for Space {
    fn default() -> Self {
        Self { asked: None, free: u64::MAX }
    }
}

/// Counts runs that are being written, so that closing can wait for them.
#[derive(Debug, Default)]
pub(crate) struct Writers {
    pub(crate) open: AtomicU64,
    pub(crate) done: Notify,
}

/// Counters, as they rise.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) syncs: AtomicU64,
    pub(crate) sync_micros: AtomicU64,
    /// Syncs by how long they took: the first of [`SYNC_BOUNDS`] that was enough, or none.
    pub(crate) sync_times: [AtomicU64; SYNC_BOUNDS.len() + 1],
    pub(crate) bytes_written: AtomicU64,
    pub(crate) batches: AtomicU64,
    pub(crate) records: AtomicU64,
    pub(crate) journal_bytes: AtomicU64,
    pub(crate) checkpoints: AtomicU64,
    pub(crate) integrity_failures: AtomicU64,
    pub(crate) log_records: AtomicU64,
    pub(crate) log_bytes: AtomicU64,
    pub(crate) log_collected: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, more: u64) {
        counter.fetch_add(more, Ordering::Relaxed);
    }

    /// Times a sync.
    pub(crate) fn sync<T>(&self, sync: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = sync();
        Self::add(&self.syncs, 1);
        let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        Self::add(&self.sync_micros, micros);
        let bound = SYNC_BOUNDS.partition_point(|bound| *bound < micros);
        // One past the last bound has a place, too.
        self.sync_times.get(bound).inspect(|times| Self::add(times, 1));
        result
    }
}

impl Shared {
    /// What an error of the disk means to a caller.
    pub(crate) fn error(&self, operation: &'static str, error: &io::Error) -> StoreError {
        if gate::is_shut(error) {
            return StoreError::Closing;
        }
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            let mut space = lock(&self.space);
            space.free = 0;
            return StoreError::Full { free: 0, reserve: self.options.reserve };
        }
        StoreError::Io { operation: operation.into(), reason: error.to_string() }
    }

    /// Ends all writing: a sync failed, so what is on the device is not what was written.
    pub(crate) fn fail(&self, operation: &str, error: &io::Error) -> StoreError {
        if gate::is_shut(error) {
            return StoreError::Closing;
        }
        let reason = self.failure.get_or_init(|| {
            tracing::error!(volume = %self.layout.root().display(), operation, %error, "volume is read-only now");
            format!("{operation}: {error}")
        });
        StoreError::ReadOnly { reason: reason.clone() }
    }

    /// Refuses if the store takes no changes.
    pub(crate) fn writable(&self) -> Result<(), StoreError> {
        if self.closing.load(Ordering::Acquire) {
            return Err(StoreError::Closing);
        }
        match self.failure.get() {
            Some(reason) => Err(StoreError::ReadOnly { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// Bytes left on the disk, asked anew now and then.
    pub(crate) fn free(&self) -> u64 {
        let mut space = lock(&self.space);
        if space.asked.is_none_or(|asked| asked.elapsed() >= SPACE_AGE) {
            match self.disk.free(self.layout.root()) {
                Ok(free) => *space = Space { asked: Some(Instant::now()), free },
                // Then writing tells.
                Err(error) => tracing::warn!(%error, "cannot tell how full the volume is"),
            }
        }
        space.free
    }

    /// Refuses if `len` bytes would touch the reserve.
    pub(crate) fn room(&self, len: u64) -> Result<(), StoreError> {
        let (free, reserve) = (self.free(), self.options.reserve);
        if free < reserve.saturating_add(len) { Err(StoreError::Full { free, reserve }) } else { Ok(()) }
    }

    /// Notes that bytes were written.
    pub(crate) fn wrote(&self, len: u64) {
        Counters::add(&self.counters.bytes_written, len);
        let mut space = lock(&self.space);
        space.free = space.free.saturating_sub(len);
    }

    /// The lowest generation that a file can have.
    pub(crate) fn floor(&self, file: FileId) -> Generation {
        lock(&self.volume).floors.of(file)
    }

    /// Changes the volume, durably.
    pub(crate) async fn change_volume(self: &Arc<Self>, change: VolumeChange) -> Result<(), StoreError> {
        self.writable()?;
        if change.share() != Share::WHOLE {
            self.blocking(Self::admit_shares).await?;
        }
        self.submit(|answer| Task::Volume { change, answer }).await
    }

    /// Sees to it that no process opens the volume which does not know of shares, before there is anything of one. Blocks.
    fn admit_shares(self: &Arc<Self>) -> Result<(), StoreError> {
        let mut header = lock(&self.header);
        if header.version >= volume::SHARES {
            return Ok(());
        }
        let next = Header { version: volume::SHARES, ..*header };
        self.replace_synced(&self.layout.volume(), &volume::encode(next))?;
        self.counters
            .sync(|| self.disk.sync_dir(self.layout.root()))
            .map_err(|error| self.fail("syncing a directory", &error))?;
        *header = next;
        Ok(())
    }

    /// Runs something that blocks.
    pub(crate) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = self.clone();
        match tokio::task::spawn_blocking(move || work(&shared)).await {
            Ok(result) => result,
            Err(error) if error.is_cancelled() => Err(StoreError::Closing),
            Err(error) => {
                Err(StoreError::Io { operation: "a blocking operation".into(), reason: error.to_string() })
            }
        }
    }

    /// The entry of a file, known or not.
    pub(crate) async fn entry(self: &Arc<Self>, file: FileId) -> Result<Arc<Entry>, StoreError> {
        match self.table.find(file) {
            Some(entry) => Ok(entry),
            None => self.blocking(move |shared| shared.load(file)).await,
        }
    }

    /// The entry of a file, known or not. Blocks.
    pub(crate) fn load(&self, file: FileId) -> Result<Arc<Entry>, StoreError> {
        let (entry, emptied) = self.table.load(file, || self.read_state(file))?;
        if emptied {
            let _names = lock(&entry.names);
            let gone = {
                let mut live = lock(&entry.live);
                let gone = live.state.held.is_empty() && live.claims.is_empty();
                if gone {
                    live.begin_life();
                }
                gone
            };
            // The journal says that chunks went; a crash may have brought their directory back.
            if gone {
                self.to_trash(file);
            }
        }
        Ok(entry)
    }

    /// A file's state from its index, or from the log: a file that has an index is not the log's any more.
    fn read_state(&self, file: FileId) -> Result<FileState, StoreError> {
        match self.read_index(file)? {
            Some(state) => Ok(FileState { origin: Origin::Journal, ..state }),
            None => Ok(self.log.front(self, file)?.map(FileState::of_log).unwrap_or_default()),
        }
    }

    fn read_index(&self, file: FileId) -> Result<Option<FileState>, StoreError> {
        let path = self.layout.index(file);
        match self.disk.read(&path) {
            Ok(bytes) => index::decode(file, &bytes).map(Some).map_err(|error| {
                Counters::add(&self.counters.integrity_failures, 1);
                tracing::error!(%file, %error, "the index of a file is damaged");
                StoreError::Unreadable { path: path.display().to_string(), reason: error.to_string() }
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error("reading an index", &error)),
        }
    }

    /// An open file of a file's chunks. `epoch` is the life that the caller means.
    pub(crate) fn handle(
        &self,
        file: FileId,
        epoch: u64,
        name: Name,
        open: Open,
    ) -> io::Result<Arc<dyn DiskFile>> {
        self.handles.get_or_insert_with(&(epoch, name), || {
            let path = self.layout.segment(file, name);
            match self.disk.open(&path, open) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && open == Open::Create => {
                    self.disk.create_dir(&self.layout.chunks_shard(file))?;
                    self.disk.create_dir(&self.layout.chunks(file))?;
                    self.disk.open(&path, open)
                }
                result => result,
            }
        })
    }

    /// The directories to sync so that a new name in a file's directory of chunks is durable.
    pub(crate) fn dirs_of_chunks(&self, file: FileId) -> Vec<PathBuf> {
        let mut dirs = vec![self.layout.chunks(file), self.layout.chunks_shard(file)];
        dirs.extend(self.parent_if_new(&self.layout.chunks_shard(file)));
        dirs
    }

    /// The directory above `dir`, unless the name of `dir` is known to be durable.
    pub(crate) fn parent_if_new(&self, dir: &Path) -> Option<PathBuf> {
        if lock(&self.durable_dirs).contains(dir) { None } else { dir.parent().map(Path::to_path_buf) }
    }

    /// Notes that the name of a shard is durable.
    pub(crate) fn note_durable(&self, dir: PathBuf) {
        lock(&self.durable_dirs).insert(dir);
    }

    /// Takes a file's directory of chunks out of the way, to be removed later. The caller holds `names`, or knows
    /// that nobody else can be at the file.
    pub(crate) fn to_trash(&self, file: FileId) {
        let trash = self.layout.trash(self.next_trash.fetch_add(1, Ordering::Relaxed));
        match self.disk.rename(&self.layout.chunks(file), &trash) {
            Ok(()) => self.chore(Chore::Remove(trash)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // What stays is not believed. When the volume is opened again it is swept, or kept for its values.
            Err(error) => tracing::warn!(%file, %error, "cannot take chunks away"),
        }
    }

    /// Leaves work to the janitor. What does not fit its queue is found again when the volume is opened.
    pub(crate) fn chore(&self, chore: Chore) {
        if let Some(chores) = &*lock(&self.chores) {
            let _ = chores.try_send(chore);
        }
    }

    /// Leaves work to the keeper of the log. What does not fit its queue is asked for again.
    pub(crate) fn keep(&self, job: Job) {
        if let Some(keeper) = &*lock(&self.keeper) {
            let _ = keeper.try_send(job);
        }
    }

    /// Hands a change of a file to the committer and waits until it is durable.
    pub(crate) async fn change(&self, entry: Arc<Entry>, request: Request) -> Result<Answer, StoreError> {
        self.writable()?;
        self.submit(|answer| Task::Change { entry, request, answer }).await
    }

    /// Hands a task to the committer and waits for its answer.
    pub(crate) async fn submit<T>(
        &self,
        task: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Task,
    ) -> Result<T, StoreError> {
        let tasks = lock(&self.tasks).clone().ok_or(StoreError::Closing)?;
        let permit = tasks.reserve().await.map_err(|_| StoreError::Closing)?;
        let (answer, answered) = oneshot::channel();
        permit.send(task(answer));
        answered.await.map_err(|_| StoreError::Closing)?
    }

    /// Stops hard: no disk operation of this store happens after this returns, but one that hangs.
    pub(crate) fn kill(&self) {
        self.closing.store(true, Ordering::Release);
        lock(&self.tasks).take();
        lock(&self.chores).take();
        lock(&self.keeper).take();
        let was_open = !self.disk.is_shut();
        if !self.disk.shut(self.options.stall) && was_open {
            tracing::warn!(
                volume = %self.layout.root().display(),
                "the disk hangs: the volume stays locked until it answers"
            );
        }
    }
}
