//! The keeper: the thread that writes the log's index down and takes garbage out of the log.
//!
//! Order: a run is synced before the manifest that names it, and runs that went into another go after that. Records are
//! moved by the committer, and a segment goes once nothing in it counts. A crash anywhere in between leaves a log that
//! says the same.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use bytes::Bytes;
use sluice_engine::ids::FileId;
use tokio::sync::oneshot;

use super::index::{Merge, Place};
use super::manifest::Manifest;
use super::recover::{RecoverError, Scan};
use super::run::{Run, Writer};
use super::{Log, MAX_FRAME};
use crate::StoreError;
use crate::fs::committer::Task;
use crate::fs::disk::Open;
use crate::fs::gate::{self, ReplaceError};
use crate::fs::lock;
use crate::fs::shared::{Counters, Shared};

/// Something for the keeper.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Job {
    /// Entries of the index are frozen.
    WriteDown,
    /// Much of the segments before this one may be garbage.
    Collect(u64),
}

/// A record to be moved.
#[derive(Debug)]
pub(crate) struct Move {
    pub(crate) file: FileId,
    /// Where it is: if the file has a newer record, it stays.
    pub(crate) from: Place,
    pub(crate) bytes: Bytes,
}

/// Counts syncs.
pub(crate) trait Sync {
    /// Runs one.
    fn sync(&self, sync: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()>;
}

impl Sync for Shared {
    fn sync(&self, sync: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        self.counters.sync(sync)
    }
}

/// Runs until the sender is gone or the disk is shut.
pub(crate) fn run(shared: &Arc<Shared>, jobs: &Receiver<Job>) {
    for job in jobs {
        if shared.disk.is_shut() || shared.failure.get().is_some() {
            continue;
        }
        let result = match job {
            Job::WriteDown => write_down(&shared.log, &**shared).map_err(|error| failed(shared, error)),
            Job::Collect(last) => collect(shared, last),
        };
        match result {
            Ok(()) | Err(StoreError::Closing) => {}
            Err(error) => tracing::warn!(%error, ?job, "the log is kept as it is, for now"),
        }
    }
}

fn failed(shared: &Shared, error: RecoverError) -> StoreError {
    match error {
        RecoverError::Io(error) => shared.error("keeping the log", &error),
        RecoverError::Run(error) => shared.log.broken(shared, &error),
        RecoverError::Record { .. } => {
            Counters::add(&shared.counters.integrity_failures, 1);
            StoreError::Unreadable {
                path: shared.log.layout.dir("log").display().to_string(),
                reason: error.to_string(),
            }
        }
    }
}

/// Writes what is frozen as a run, together with the runs that are not much larger.
pub(crate) fn write_down(log: &Log, syncs: &dyn Sync) -> Result<(), RecoverError> {
    let (Some(frozen), runs) = log.index.frozen() else { return Ok(()) };
    let mut size = frozen.table.len() as u64;
    let mut count = 0;
    for run in &runs {
        if run.entries > 2 * size {
            break;
        }
        size += run.entries;
        count += 1;
    }
    let (merged, kept) = runs.split_at(count);
    let number = {
        let mut segments = lock(&log.segments);
        segments.next_run += 1;
        segments.next_run - 1
    };
    let path = log.layout.run(number);
    match log.disk.remove_file(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let file = log.disk.open(&path, Open::Create)?;
    let mut writer = Writer::new(log.volume, number, file.clone());
    let table = frozen.table.iter().map(|(key, value)| (*key, value.clone())).collect();
    let mut entries = Merge::new(vec![table], merged, &[0; 25])?;
    let is_oldest = kept.is_empty();
    while let Some((key, value)) = entries.next()? {
        // What is gone must be said only while an older run says otherwise.
        if value.is_some() || !is_oldest {
            writer.push(&key, value.as_deref())?;
        }
    }
    let run: Arc<Run> = Arc::new(writer.finish()?);
    let dir = log.layout.dir("log");
    syncs.sync(&mut || file.sync_data())?;
    syncs.sync(&mut || log.disk.sync_dir(&dir))?;
    let in_force: Vec<Arc<Run>> = std::iter::once(run).chain(kept.iter().cloned()).collect();
    let manifest = Manifest {
        next_run: number + 1,
        covered: frozen.covered,
        runs: in_force.iter().map(|run| run.number).collect(),
        segments: frozen.segments.clone(),
    };
    syncs.sync(&mut || {
        log.disk.replace(&log.layout.manifest(), &manifest.encode(log.volume)).map_err(|error| match error {
            ReplaceError::Write(error) | ReplaceError::Sync(error) => error,
        })
    })?;
    syncs.sync(&mut || log.disk.sync_dir(&dir))?;
    log.index.thaw(in_force);
    for run in merged {
        // Whoever still reads it has it open. What cannot be removed now is removed when the volume is opened.
        let _ = log.disk.remove_file(&log.layout.run(run.number));
    }
    Ok(())
}

/// Moves what counts out of segments that are mostly garbage, and removes them.
fn collect(shared: &Arc<Shared>, last: u64) -> Result<(), StoreError> {
    for number in shared.log.garbage(last) {
        collect_segment(shared, number)?;
    }
    Ok(())
}

fn collect_segment(shared: &Arc<Shared>, number: u64) -> Result<(), StoreError> {
    let log = &shared.log;
    let file = log.segment(number).map_err(|error| shared.error("opening a segment", &error))?;
    let mut current: Vec<(FileId, Place)> = Vec::new();
    let mut files = Vec::new();
    let scan = Scan { volume: log.volume, number, file: &file, is_last: false };
    let found = scan.run(0, &mut |front, place| {
        files.push(front.file);
        if log.index.place(front.file)?.as_ref() == Some(place) {
            current.push((front.file, *place));
        }
        Ok(())
    });
    if !found.map_err(|error| failed(shared, error))?.damaged.is_empty() {
        lock(&log.segments).damaged.insert(number);
        return Ok(());
    }
    let mut moves = Vec::new();
    let mut bytes = 0;
    for (file_id, from) in current {
        let read = file.read_at(u64::from(from.offset), from.len as usize);
        let record = read.map_err(|error| shared.error("reading the log", &error))?;
        bytes += record.len();
        moves.push(Move { file: file_id, from, bytes: record.into() });
        if bytes >= MAX_FRAME / 4 {
            hand_over(shared, std::mem::take(&mut moves))?;
            bytes = 0;
        }
    }
    hand_over(shared, moves)?;
    // Something may have been left behind because it changed just then; the next time takes it.
    for file in files {
        let place = log.index.place(file).map_err(|error| log.broken(shared, &error))?;
        if place.is_none_or(|place| place.segment == number) {
            return Ok(());
        }
    }
    log.handles.remove(&number);
    match log.disk.remove_file(&log.layout.log(number)) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if gate::is_shut(&error) => return Err(StoreError::Closing),
        Err(error) => return Err(shared.error("removing a segment", &error)),
    }
    lock(&log.segments).fill.remove(&number);
    lock(&shared.space).asked = None;
    Counters::add(&shared.counters.log_collected, 1);
    Ok(())
}

/// Has records moved; returns when they are durable at their new places.
fn hand_over(shared: &Shared, moves: Vec<Move>) -> Result<(), StoreError> {
    if moves.is_empty() {
        return Ok(());
    }
    let tasks = lock(&shared.tasks).clone().ok_or(StoreError::Closing)?;
    let (answer, moved) = oneshot::channel();
    tasks.blocking_send(Task::Move { moves, answer }).map_err(|_| StoreError::Closing)?;
    drop(tasks);
    moved.blocking_recv().map_err(|_| StoreError::Closing)?
}
