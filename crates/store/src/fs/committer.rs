//! The committer: the one thread that decides changes and makes them durable.
//!
//! It takes everything that waits, syncs each data file once, appends all records in one batch, syncs the journal
//! once, applies the changes in memory and answers all. Changes of one file that do not commute wait for the next
//! batch, so every decision is made against what is durable.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sluice_engine::ids::{FileId, Generation};
use tokio::sync::{mpsc, oneshot};

use super::change::{Change, Record, VolumeChange};
use super::checkpointer::Checkpointer;
use super::disk::DiskFile;
use super::entry::{Entry, Name};
use super::janitor::Chore;
use super::journal::Journal;
use super::lock;
use super::log::keeper::{Job, Move};
use super::log::record::{Body, Front, LogRecord};
use super::log::{self, AppendError, MAX_FRAME, Tail};
use super::plan::{Plan, plan};
use super::request::{Answer, Request};
use super::shared::{Counters, Shared};
use crate::claims::ClaimId;
use crate::share::Floors;
use crate::{StoreError, Whole};

/// The most bytes of records in one batch, so that a batch fits what is reserved behind the checkpoint's mark.
pub(crate) const MAX_BATCH: usize = 1 << 20;

/// How many times the entries after which the log's index is written down may be in memory, before files are refused
/// because the disk does not keep up.
const STUFFED: usize = 4;

/// Entries of the log's index that are never too many.
const FEW: usize = 4 << 10;

/// The most data files that are synced at a time.
const SYNC_THREADS: usize = 4;

/// What waits for the committer.
#[derive(Debug)]
pub(crate) enum Task {
    /// A change of a file.
    Change { entry: Arc<Entry>, request: Request, answer: oneshot::Sender<Result<Answer, StoreError>> },
    /// A change of the volume.
    Volume { change: VolumeChange, answer: oneshot::Sender<Result<(), StoreError>> },
    /// Records of the log to be moved out of segments that are mostly garbage.
    Move { moves: Vec<Move>, answer: oneshot::Sender<Result<(), StoreError>> },
    /// Write a checkpoint.
    Checkpoint { answer: oneshot::Sender<Result<(), StoreError>> },
}

/// The state of the committer.
#[derive(Debug)]
pub(crate) struct Committer {
    pub(crate) shared: Arc<Shared>,
    pub(crate) journal: Journal,
    pub(crate) tail: Tail,
    pub(crate) checkpointer: Checkpointer,
}

/// A change that is on its way into the journal.
struct Staged {
    entry: Arc<Entry>,
    change: Change,
    claim: Option<ClaimId>,
    /// The name that the change relies on.
    name: Option<Name>,
    epoch: u64,
    reply: Answer,
    answer: oneshot::Sender<Result<Answer, StoreError>>,
}

/// A record that is on its way into the log.
struct Logged {
    entry: Arc<Entry>,
    front: Front,
    /// The record's bytes.
    bytes: Vec<u8>,
    /// Whether the log has an older record of the file.
    replaces: bool,
    reply: Answer,
    answer: oneshot::Sender<Result<Answer, StoreError>>,
}

/// Everything that goes into one batch.
#[derive(Default)]
struct Group {
    files: Vec<Staged>,
    volume: Vec<(VolumeChange, oneshot::Sender<Result<(), StoreError>>)>,
    checkpoints: Vec<oneshot::Sender<Result<(), StoreError>>>,
    payload: Vec<u8>,
    records: u32,
    logged: Vec<Logged>,
    moves: Vec<Move>,
    moved: Vec<oneshot::Sender<Result<(), StoreError>>>,
    /// Bytes for the log.
    log_len: usize,
    data: Vec<Arc<dyn DiskFile>>,
    dirs: BTreeSet<PathBuf>,
    /// Files in this batch, and whether their changes commute with others like them.
    touched: HashMap<FileId, bool>,
    /// Files with a change that waits for the next batch: their later ones wait behind it.
    waiting: BTreeSet<FileId>,
}

impl Committer {
    /// Runs until every sender is gone or the disk is shut.
    pub(crate) fn run(mut self, mut tasks: mpsc::Receiver<Task>) {
        let mut queue = VecDeque::new();
        loop {
            if queue.is_empty() {
                match tasks.blocking_recv() {
                    Some(task) => queue.push_back(task),
                    None => return,
                }
            }
            // The channel's bound is this queue's bound too.
            while queue.len() < tasks.max_capacity() {
                match tasks.try_recv() {
                    Ok(task) => queue.push_back(task),
                    Err(_) => break,
                }
            }
            let mut group = self.stage(&mut queue);
            let checkpoints = std::mem::take(&mut group.checkpoints);
            self.commit_log(&mut group);
            self.commit(group);
            self.checkpoint_if_due();
            if !checkpoints.is_empty() {
                let result = self.checkpoint_now();
                for answer in checkpoints {
                    let _ = answer.send(result.clone());
                }
            }
        }
    }

    /// Decides what waits, as far as it fits one batch; the rest stays in the queue, in order.
    fn stage(&self, queue: &mut VecDeque<Task>) -> Group {
        let mut group = Group::default();
        // What is raised in this batch counts for what comes after it there.
        let mut raised = Floors::default();
        let mut rest = VecDeque::new();
        while let Some(task) = queue.pop_front() {
            if group.payload.len() >= MAX_BATCH || group.log_len >= MAX_FRAME {
                rest.push_back(task);
                continue;
            }
            match task {
                Task::Change { entry, request, answer } => {
                    let file = entry.file;
                    let commutes = request.commutes() && !lock(&entry.live).state.is_in_log();
                    let blocked = group.waiting.contains(&file)
                        || group.touched.get(&file).is_some_and(|others| !(commutes && *others));
                    if blocked {
                        group.waiting.insert(file);
                        rest.push_back(Task::Change { entry, request, answer });
                    } else {
                        let floor = self.shared.floor(file).max(raised.of(file));
                        self.stage_change(&mut group, floor, entry, request, commutes, answer);
                    }
                }
                Task::Volume { change, answer } => {
                    if let VolumeChange::Floor(share, floor) = &change {
                        raised.raise(*share, *floor);
                    }
                    Record::Volume(change.clone()).encode(&mut group.payload);
                    group.records += 1;
                    group.volume.push((change, answer));
                }
                Task::Move { moves, answer } => self.stage_moves(&mut group, moves, answer),
                Task::Checkpoint { answer } => group.checkpoints.push(answer),
            }
        }
        *queue = rest;
        group
    }

    fn stage_change(
        &self,
        group: &mut Group,
        floor: Generation,
        entry: Arc<Entry>,
        request: Request,
        commutes: bool,
        answer: oneshot::Sender<Result<Answer, StoreError>>,
    ) {
        let (planned, epoch, name) = {
            let live = lock(&entry.live);
            let planned = match self.shared.failure.get() {
                Some(reason) => Err(StoreError::ReadOnly { reason: reason.clone() }),
                None => plan(entry.file, &live, floor, &request),
            };
            let name = request.name().filter(|name| !live.synced.contains(name));
            (planned, live.epoch, name)
        };
        let claim = request.claim();
        match planned {
            Ok(Plan::Write(change, reply)) => {
                let file = entry.file;
                group.touched.insert(file, commutes);
                if let Some(data) = request.into_data()
                    && !group.data.iter().any(|other| Arc::ptr_eq(other, &data))
                {
                    group.data.push(data);
                }
                if name.is_some() {
                    group.dirs.extend(self.shared.dirs_of_chunks(file));
                }
                let record = Record::File(file, change);
                record.encode(&mut group.payload);
                group.records += 1;
                if let Record::File(_, change) = record {
                    group.files.push(Staged { entry, change, claim, name, epoch, reply, answer });
                }
            }
            Ok(Plan::Log(record, reply)) => {
                group.touched.insert(entry.file, false);
                self.stage_record(group, entry, &record, reply, answer);
            }
            Ok(Plan::LogAgain(record, reply)) => match self.whole_again(record) {
                Ok(record) => {
                    group.touched.insert(entry.file, false);
                    self.stage_record(group, entry, &record, reply, answer);
                }
                Err(error) => {
                    let _ = answer.send(Err(error));
                }
            },
            Ok(Plan::Known(reply)) => {
                let _ = answer.send(Ok(reply));
            }
            Err(error) => {
                if let Some(claim) = claim {
                    entry.release(claim);
                }
                let _ = answer.send(Err(error));
            }
        }
    }

    /// A record of a file with the bytes that the log has of it.
    fn whole_again(&self, record: LogRecord) -> Result<LogRecord, StoreError> {
        let missing = StoreError::NoFile(record.file);
        let bytes = self.shared.log.bytes(&self.shared, record.file)?;
        let body = match (record.body, bytes) {
            (Body::Known { record }, Some(bytes)) => Body::Whole { record, whole: Whole::of(bytes) },
            (Body::Known { .. } | Body::Whole { .. } | Body::Dropped { .. }, _) => return Err(missing),
        };
        Ok(LogRecord { body, ..record })
    }

    fn stage_record(
        &self,
        group: &mut Group,
        entry: Arc<Entry>,
        record: &LogRecord,
        reply: Answer,
        answer: oneshot::Sender<Result<Answer, StoreError>>,
    ) {
        let mut bytes = Vec::new();
        record.encode(self.shared.log.volume(), &mut bytes);
        let held = match &record.body {
            Body::Whole { whole, .. } => whole.bytes().len(),
            Body::Known { .. } | Body::Dropped { .. } => 0,
        };
        let front = log::front_of(record, (bytes.len() - held) as u32);
        let replaces = lock(&entry.live).state.is_in_log();
        group.log_len += bytes.len();
        group.logged.push(Logged { entry, front, bytes, replaces, reply, answer });
    }

    /// Takes those records that are still the newest of their files, and of which nothing else is on its way.
    fn stage_moves(
        &self,
        group: &mut Group,
        moves: Vec<Move>,
        answer: oneshot::Sender<Result<(), StoreError>>,
    ) {
        for record in moves {
            let is_newest =
                matches!(self.shared.log.index.place(record.file), Ok(Some(place)) if place == record.from);
            if is_newest && !group.touched.contains_key(&record.file) {
                group.touched.insert(record.file, false);
                group.log_len += record.bytes.len();
                group.moves.push(record);
            }
        }
        group.moved.push(answer);
    }

    /// Makes the log's part of a batch durable, applies it, and answers.
    fn commit_log(&mut self, group: &mut Group) {
        let mut logged = std::mem::take(&mut group.logged);
        let mut moves = std::mem::take(&mut group.moves);
        let mut moved = std::mem::take(&mut group.moved);
        let refuse = |logged: Vec<Logged>, error: &StoreError| {
            for logged in logged {
                let _ = logged.answer.send(Err(error.clone()));
            }
        };
        let mut result = match self.shared.failure.get() {
            Some(reason) => Err(StoreError::ReadOnly { reason: reason.clone() }),
            None => Ok(()),
        };
        if result.is_ok() && (!logged.is_empty() || !moves.is_empty()) {
            let len = |logged: &[Logged], moves: &[Move]| {
                logged.iter().map(|logged| logged.bytes.len()).sum::<usize>()
                    + moves.iter().map(|record| record.bytes.len()).sum::<usize>()
            };
            let stuffed = self.shared.log.index.len() >= STUFFED * self.shared.options.log_index.max(FEW);
            let mut room = match stuffed {
                true => Err(AppendError::Full),
                false => self.tail.make_room(&self.shared, len(&logged, &moves), false),
            };
            if matches!(room, Err(AppendError::Full)) {
                // What makes room is still taken.
                let (adds, frees): (Vec<_>, Vec<_>) =
                    logged.into_iter().partition(|logged| logged.front.seal.is_some() || !logged.replaces);
                let (adds, drops): (Vec<_>, Vec<_>) =
                    adds.into_iter().partition(|logged| !logged.front.is_dropped());
                logged = frees.into_iter().chain(drops).collect();
                let (free, reserve) = (self.shared.free(), self.shared.options.reserve);
                let full = StoreError::Full { free, reserve };
                refuse(adds, &full);
                // What is moved is there already, and must not take the last room of what makes some.
                moves.clear();
                for answer in moved.drain(..) {
                    let _ = answer.send(Err(full.clone()));
                }
                room = self.tail.make_room(&self.shared, len(&logged, &moves), true);
            }
            result = match room {
                Ok(()) if logged.is_empty() && moves.is_empty() => Ok(()),
                Ok(()) => self.append(&logged, &moves),
                Err(AppendError::Full) => {
                    let (free, reserve) = (self.shared.free(), self.shared.options.reserve);
                    Err(StoreError::Full { free, reserve })
                }
                Err(AppendError::Io(operation, error)) => Err(self.shared.fail(operation, &error)),
            };
        }
        match &result {
            Ok(()) => {
                for logged in logged {
                    if logged.front.seal.is_some() {
                        logged.entry.apply_log(logged.front);
                    } else {
                        self.shared.forget_damage(logged.entry.file);
                        // Nobody opens names of the old life between its end on disk and in memory.
                        let _names = lock(&logged.entry.names);
                        let being_written = !lock(&logged.entry.live).claims.is_empty();
                        if being_written {
                            self.shared.to_trash(logged.entry.file);
                        }
                        logged.entry.apply_log(logged.front);
                    }
                    // The log says now what became of the file: chunks from before have no use.
                    if lock(&self.shared.kept).remove(&logged.entry.file) {
                        self.shared.chore(Chore::Sweep(logged.entry.file));
                    }
                    let _ = logged.answer.send(Ok(logged.reply));
                }
            }
            Err(error) => refuse(logged, error),
        }
        for answer in moved {
            let _ = answer.send(result.clone());
        }
        self.keep_log();
    }

    /// Appends a frame of these records to the log, for which there is room, and notes where they are.
    fn append(&mut self, logged: &[Logged], moves: &[Move]) -> Result<(), StoreError> {
        let shared = self.shared.clone();
        let mut payload = Vec::new();
        for bytes in
            logged.iter().map(|logged| &logged.bytes[..]).chain(moves.iter().map(|record| &record.bytes[..]))
        {
            payload.extend_from_slice(bytes);
        }
        let records = (logged.len() + moves.len()) as u32;
        let (segment, mut offset) = self
            .tail
            .append(&shared, records, &payload)
            .map_err(|error| shared.fail("writing the log", &error))?;
        for Logged { front, bytes, replaces, .. } in logged {
            let place = log::placed(front, segment, offset);
            shared.log.note(&shared, front, &place, *replaces);
            offset += bytes.len() as u32;
            shared.wrote(front.seal.map_or(0, |seal| u64::from(seal.len)));
        }
        for record in moves {
            let place = log::index::Place { segment, offset, ..record.from };
            shared.log.note_moved(&shared, record.file, &place);
            offset += record.bytes.len() as u32;
        }
        Counters::add(&shared.counters.log_records, u64::from(records));
        Ok(())
    }

    /// Has the log's index written down once it is long, and garbage collected.
    fn keep_log(&self) {
        let log = &self.shared.log;
        let limit = self.shared.options.log_index;
        if log.freeze(limit, &self.tail) || log.index.len() >= limit {
            self.shared.keep(Job::WriteDown);
        }
        if log.has_garbage(self.tail.segment) {
            self.shared.keep(Job::Collect(self.tail.segment));
        }
    }

    /// Makes a batch durable, applies it, and answers.
    fn commit(&mut self, group: Group) {
        if group.records == 0 {
            return;
        }
        match self.make_durable(&group) {
            Ok(seq) => self.apply(seq, group),
            Err(error) => {
                for staged in group.files {
                    if let Some(claim) = staged.claim {
                        staged.entry.release(claim);
                    }
                    let _ = staged.answer.send(Err(error.clone()));
                }
                for (_, answer) in group.volume {
                    let _ = answer.send(Err(error.clone()));
                }
            }
        }
    }

    /// Bytes first, then the names they are found by, then the records.
    fn make_durable(&mut self, group: &Group) -> Result<u64, StoreError> {
        let shared = self.shared.clone();
        // A file whose sync failed is never synced again and believed.
        if let Some(reason) = shared.failure.get() {
            return Err(StoreError::ReadOnly { reason: reason.clone() });
        }
        if let Err(error) = shared.counters.sync(|| sync_all(&group.data)) {
            let failed = shared.fail("syncing data", &error);
            self.doubt(group);
            return Err(failed);
        }
        for dir in &group.dirs {
            shared
                .counters
                .sync(|| shared.disk.sync_dir(dir))
                .map_err(|error| shared.fail("syncing a directory", &error))?;
        }
        self.make_room(group.payload.len())?;
        let seq = shared
            .counters
            .sync(|| self.journal.append(group.records, &group.payload))
            .map_err(|error| shared.fail("writing the journal", &error))?;
        Counters::add(&shared.counters.batches, 1);
        Counters::add(&shared.counters.records, u64::from(group.records));
        shared.counters.journal_bytes.store(self.journal.end, Ordering::Relaxed);
        Ok(seq)
    }

    /// Has what was recorded in segments whose sync failed read again from the device.
    fn doubt(&self, group: &Group) {
        let mut doubted: BTreeMap<(FileId, u64), Arc<Entry>> = BTreeMap::new();
        for staged in &group.files {
            if let Change::Run { chunks, .. } = &staged.change {
                for chunk in chunks {
                    let segment = chunk.index.number() / sluice_engine::limits::SEGMENT_CHUNKS;
                    doubted.insert((staged.entry.file, segment), staged.entry.clone());
                }
            }
        }
        for ((_, segment), entry) in doubted {
            self.shared.chore(Chore::Verify { entry, segment });
        }
    }

    fn apply(&mut self, seq: u64, group: Group) {
        for staged in &group.files {
            if let Some(name) = staged.name {
                let mut live = lock(&staged.entry.live);
                if live.epoch == staged.epoch {
                    live.synced.insert(name);
                }
            }
            self.shared.table.mark_dirty(staged.entry.file);
            self.shared.settle_damage(staged.entry.file, &staged.change);
            if staged.change.removes_chunks() {
                // Nobody flushes or opens names of the old life between its end on disk and in memory.
                let _names = lock(&staged.entry.names);
                self.shared.to_trash(staged.entry.file);
                staged.entry.apply(seq, &staged.change, staged.claim);
            } else {
                staged.entry.apply(seq, &staged.change, staged.claim);
            }
        }
        for dir in &group.dirs {
            if dir.parent().is_some_and(|parent| parent == self.shared.layout.dir("chunks")) {
                self.shared.note_durable(dir.clone());
            }
        }
        for (change, answer) in group.volume {
            lock(&self.shared.volume).apply(change);
            let _ = answer.send(Ok(()));
        }
        for staged in group.files {
            let _ = staged.answer.send(Ok(staged.reply));
        }
    }

    /// Turns to the other journal if this one is long and the other is done with.
    fn checkpoint_if_due(&mut self) {
        if self.journal.end >= self.shared.options.journal_len
            && self.shared.failure.get().is_none()
            && self.checkpointer.is_idle()
        {
            self.turn();
        }
    }

    /// Makes sure that a batch fits the room that is reserved.
    fn make_room(&mut self, payload: usize) -> Result<(), StoreError> {
        if !self.journal.fits(payload) {
            // The checkpoint of the other journal is behind: writers wait for it.
            self.checkpointer.wait()?;
            self.turn();
        }
        Ok(())
    }

    fn turn(&mut self) {
        let done = self.journal.number;
        self.journal.turn();
        self.shared.counters.journal_bytes.store(0, Ordering::Relaxed);
        self.checkpointer.begin(done, self.journal.next_seq);
    }

    fn checkpoint_now(&mut self) -> Result<(), StoreError> {
        if let Some(reason) = self.shared.failure.get() {
            return Err(StoreError::ReadOnly { reason: reason.clone() });
        }
        self.checkpointer.wait()?;
        if self.journal.end > 0 {
            self.turn();
            self.checkpointer.wait()?;
        }
        Ok(())
    }
}

/// Syncs files, a few at a time: a filesystem commits concurrent syncs together.
fn sync_all(files: &[Arc<dyn DiskFile>]) -> io::Result<()> {
    match files {
        [] => Ok(()),
        [file] => file.sync_data(),
        files => std::thread::scope(|scope| {
            let share = files.len().div_ceil(SYNC_THREADS);
            let threads: Vec<_> = files
                .chunks(share)
                .map(|share| scope.spawn(move || share.iter().try_for_each(|file| file.sync_data())))
                .collect();
            threads.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|_| Err(io::Error::other("a sync thread panicked")))
            })
        }),
    }
}
