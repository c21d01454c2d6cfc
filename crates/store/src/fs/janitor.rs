//! The janitor: removes what nobody refers to, and reads again what a failed sync put in doubt. Nothing waits for
//! it, and what it leaves undone at a stop is found again when the volume is opened.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use sluice_engine::geometry::ChunkIndex;
use sluice_engine::ids::FileId;
use sluice_engine::limits::SEGMENT_CHUNKS;

use super::entry::Entry;
use super::layout::has_values;
use super::lock;
use super::shared::{Counters, Shared};
use crate::StoreError;

/// Something to do when there is time.
#[derive(Debug)]
pub(crate) enum Chore {
    /// Remove a directory of the trash.
    Remove(PathBuf),
    /// A run of a file without any record was given up.
    Sweep(FileId),
    /// Marks of damage were taken back.
    KeepDamage,
    /// Read the recorded chunks of a segment again from the device.
    Verify { entry: Arc<Entry>, segment: u64 },
}

/// Runs until the sender is gone or the disk is shut.
pub(crate) fn run(shared: &Arc<Shared>, chores: &Receiver<Chore>) {
    if let Err(error) = shared.sweep_all()
        && !super::gate::is_shut(&error)
    {
        tracing::warn!(%error, "cannot sweep the volume");
    }
    for chore in chores {
        if shared.disk.is_shut() {
            return;
        }
        match chore {
            Chore::Remove(path) => {
                if let Err(error) = shared.remove(&path)
                    && !super::gate::is_shut(&error)
                {
                    tracing::warn!(path = %path.display(), %error, "cannot remove");
                }
            }
            Chore::Sweep(file) => {
                shared.sweep(file);
            }
            Chore::KeepDamage => shared.keep_damage(),
            Chore::Verify { entry, segment } => shared.verify_segment(&entry, segment),
        }
    }
}

impl Shared {
    /// Empties the trash and finds chunks of files that never got a record (a crash came first).
    fn sweep_all(&self) -> io::Result<()> {
        let trash = self.layout.dir("trash");
        for name in self.disk.list(&trash)? {
            self.remove(&trash.join(name))?;
        }
        for shard in self.disk.list(&self.layout.dir("chunks"))? {
            let indexed: BTreeSet<String> = match self.disk.list(&self.layout.dir("index").join(&shard)) {
                Ok(names) => names.into_iter().collect(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
                Err(error) => return Err(error),
            };
            for name in self.disk.list(&self.layout.dir("chunks").join(&shard))? {
                if let Ok(file) = name.parse()
                    && !indexed.contains(&name)
                {
                    self.sweep(file);
                    if lock(&self.kept).contains(&file) {
                        Counters::add(&self.counters.integrity_failures, 1);
                        tracing::error!(%file, "the index of a file is missing; its chunks are kept, and not served");
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes the chunks of a file of which nothing is known, or which is in the log, and that nobody writes.
    fn sweep(&self, file: FileId) {
        let Ok(entry) = self.load(file) else { return };
        let _names = lock(&entry.names);
        let was_recorded = self.was_recorded(file);
        {
            let mut live = lock(&entry.live);
            // What the log keeps has no directory of chunks.
            let has_chunks = live.state.is_known() && !live.state.is_in_log();
            if has_chunks || !live.claims.is_empty() {
                return;
            }
            if !live.state.is_known() && was_recorded {
                lock(&self.kept).insert(file);
                return;
            }
            live.begin_life();
        }
        self.to_trash(file);
    }

    /// Whether chunks of a file were acknowledged once, whatever is known of it now: values are written beside them only
    /// when a journal says so, and an index says it from then on. What is dropped goes with its values, for good,
    /// before anything forgets it. Where that cannot be seen it may be so.
    fn was_recorded(&self, file: FileId) -> bool {
        match self.disk.list(&self.layout.chunks(file)) {
            Ok(names) => has_values(names),
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let names = match self.disk.list(path) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for name in names {
            self.disk.remove_file(&path.join(name))?;
        }
        self.disk.remove_dir(path)?;
        lock(&self.space).asked = None;
        Ok(())
    }

    /// Reads the recorded chunks of a segment again, and marks those that the device does not give back.
    fn verify_segment(&self, entry: &Entry, segment: u64) {
        let first = segment * SEGMENT_CHUNKS;
        let held: Vec<_> = lock(&entry.live).state.held.iter().collect();
        for range in held {
            for chunk in range.start.max(first)..range.end.min(first + SEGMENT_CHUNKS) {
                let Ok(index) = ChunkIndex::new(chunk) else { continue };
                match self.verify_chunk(entry, index) {
                    Ok(_) | Err(StoreError::Missing { .. } | StoreError::Closing) => {}
                    Err(error) => tracing::error!(file = %entry.file, chunk, %error, "a chunk is lost"),
                }
            }
        }
    }
}
