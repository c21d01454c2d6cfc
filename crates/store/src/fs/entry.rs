//! The files in memory: one entry per file that is used, has changes which only the journal holds, or is written.
//!
//! An entry without any of these may be evicted; it is loaded again from its index when somebody asks.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use sluice_engine::ids::FileId;
use tokio::sync::Notify;

use super::aside::{self, Aside};
use super::change::Change;
use super::lock;
use super::log::record::Front;
use super::state::FileState;
use crate::claims::{ClaimId, Claims};

/// A file in a file's directory of chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Name {
    /// The bytes of a segment.
    Data(u64),
    /// The chunk values of a segment.
    Values(u64),
}

/// A file in memory.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Which.
    pub(crate) file: FileId,
    /// Orders whoever replaces or removes the file's names. Held across disk operations, taken before `live`.
    pub(crate) names: Mutex<()>,
    /// What is known. Never held across a disk operation or an await.
    pub(crate) live: Mutex<Live>,
    /// Tells when a claim was released.
    pub(crate) released: Notify,
}

/// What changes about a file in memory.
#[derive(Debug)]
pub(crate) struct Live {
    /// What is durable.
    pub(crate) state: FileState,
    /// Who writes.
    pub(crate) claims: Claims,
    /// Names this life of the file's directory of chunks: no two lives share open files.
    pub(crate) epoch: u64,
    /// How often recorded chunks went.
    pub(crate) losses: u64,
    /// Names that are known to be durable.
    pub(crate) synced: BTreeSet<Name>,
    /// After how many losses it was found that damaged values cannot be made again.
    pub(crate) beyond_restoring: Option<u64>,
}

static NEXT_EPOCH: AtomicU64 = AtomicU64::new(0);

impl Entry {
    fn new(file: FileId, state: FileState) -> Self {
        let live = Live {
            state,
            claims: Claims::default(),
            epoch: next_epoch(),
            losses: 0,
            synced: BTreeSet::new(),
            beyond_restoring: None,
        };
        Self { file, names: Mutex::new(()), live: Mutex::new(live), released: Notify::new() }
    }

    /// Applies a change that is durable now. `claim` is that of the run it records.
    pub(crate) fn apply(&self, seq: u64, change: &Change, claim: Option<ClaimId>) {
        let mut live = lock(&self.live);
        let held = live.state.held_bytes;
        live.state.apply(seq, change);
        match change {
            Change::Run { .. } => {}
            Change::Metadata { .. } | Change::Sized { .. } => {
                live.losses += u64::from(live.state.held_bytes != held)
            }
            Change::Facts(_) | Change::Published(_) => {}
            Change::Lost { chunks, .. } => {
                live.losses += 1;
                let lost: BTreeSet<u64> = chunks.iter().map(|chunk| chunk.number()).collect();
                live.claims.revoke(|run| lost.range(run.clone()).next().is_some());
            }
            Change::Freed { .. } | Change::Dropped { .. } | Change::Discarded => live.begin_life(),
        }
        if let Some(claim) = claim {
            live.claims.release(claim);
        }
        drop(live);
        self.released.notify_waiters();
    }

    /// Applies a record of the log that is durable now: it says all there is to be said.
    pub(crate) fn apply_log(&self, front: Front) {
        let mut live = lock(&self.live);
        let had = !live.state.held.is_empty();
        live.state = FileState::of_log(front);
        if live.state.dropped || (had && live.state.held.is_empty()) {
            live.begin_life();
        }
        drop(live);
        self.released.notify_waiters();
    }

    /// Gives up a claim whose run is not recorded.
    pub(crate) fn release(&self, claim: ClaimId) {
        lock(&self.live).claims.release(claim);
        self.released.notify_waiters();
    }
}

impl Live {
    /// The directory of chunks is gone: nobody who used the old one goes on.
    pub(crate) fn begin_life(&mut self) {
        self.epoch = next_epoch();
        self.losses += 1;
        self.synced.clear();
        self.claims.revoke(|_| true);
    }
}

fn next_epoch() -> u64 {
    NEXT_EPOCH.fetch_add(1, Ordering::Relaxed)
}

/// All entries.
#[derive(Debug)]
pub(crate) struct Table {
    inner: Mutex<Inner>,
    /// By file: whoever loads one.
    loading: [Mutex<()>; 16],
    /// Entries to keep that nothing else keeps in memory.
    limit: usize,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<FileId, Slot>,
    /// The order in which entries are looked at for eviction.
    clock: VecDeque<FileId>,
    /// What the journal says of files that nobody asked for yet.
    pending: HashMap<FileId, Vec<(u64, Change)>>,
    /// Changes that no journal has any more, of files whose index could not be read. They stay here until a checkpoint
    /// has put them into the index.
    aside: Aside,
    /// Files with changes in the current journal, or set aside.
    dirty: BTreeSet<FileId>,
    /// Files whose changes are being checkpointed.
    flushing: BTreeSet<FileId>,
}

#[derive(Debug)]
struct Slot {
    entry: Arc<Entry>,
    used: bool,
}

impl Table {
    /// A table with what was set aside and what the journal says.
    pub(crate) fn new(limit: usize, aside: Aside, pending: HashMap<FileId, Vec<(u64, Change)>>) -> Self {
        let dirty = pending.keys().chain(aside.keys()).copied().collect();
        let inner = Inner { pending, aside, dirty, ..Inner::default() };
        Self { inner: Mutex::new(inner), loading: Default::default(), limit }
    }

    /// The entry, if it is in memory.
    pub(crate) fn find(&self, file: FileId) -> Option<Arc<Entry>> {
        let mut inner = lock(&self.inner);
        let slot = inner.entries.get_mut(&file)?;
        slot.used = true;
        Some(slot.entry.clone())
    }

    /// The entry, from `read` if it is not in memory. Returns also the changes of the journal that were applied to
    /// what was read.
    pub(crate) fn load<E>(
        &self,
        file: FileId,
        read: impl FnOnce() -> Result<FileState, E>,
    ) -> Result<(Arc<Entry>, bool), E> {
        if let Some(entry) = self.find(file) {
            return Ok((entry, false));
        }
        let _loading = lock(&self.loading[usize::from(file.as_bytes()[15] % 16)]);
        if let Some(entry) = self.find(file) {
            return Ok((entry, false));
        }
        let mut state = read()?;
        let mut inner = lock(&self.inner);
        let mut pending = inner.aside.get(&file).cloned().unwrap_or_default();
        if !pending.is_empty() {
            inner.dirty.insert(file);
        }
        aside::join(&mut pending, inner.pending.remove(&file).unwrap_or_default());
        for (seq, change) in &pending {
            state.apply(*seq, change);
        }
        let emptied = pending.iter().any(|(_, change)| change.removes_chunks());
        let entry = Arc::new(Entry::new(file, state));
        inner.entries.insert(file, Slot { entry: entry.clone(), used: false });
        inner.clock.push_back(file);
        inner.evict(self.limit);
        Ok((entry, emptied))
    }

    /// Notes that the current journal holds changes of the file.
    pub(crate) fn mark_dirty(&self, file: FileId) {
        lock(&self.inner).dirty.insert(file);
    }

    /// Begins a checkpoint: the files whose changes are only in the journal so far.
    pub(crate) fn begin_flush(&self) -> BTreeSet<FileId> {
        let mut inner = lock(&self.inner);
        let mut dirty = std::mem::take(&mut inner.dirty);
        inner.flushing.append(&mut dirty);
        inner.flushing.clone()
    }

    /// The same for the older of two journals that were found: the other has changes of these files as well, and they
    /// are not done with before it is.
    pub(crate) fn begin_flush_of_older(&self) -> BTreeSet<FileId> {
        let mut inner = lock(&self.inner);
        let dirty = inner.dirty.clone();
        inner.flushing.extend(dirty);
        inner.flushing.clone()
    }

    /// Sets the changes of a file aside, whose index cannot be read. Whether that was needed: not if somebody has read
    /// it after all.
    pub(crate) fn set_aside(&self, file: FileId) -> bool {
        let mut inner = lock(&self.inner);
        if inner.entries.contains_key(&file) {
            return false;
        }
        if let Some(changes) = inner.pending.remove(&file) {
            aside::join(inner.aside.entry(file).or_default(), changes);
        }
        true
    }

    /// The index of a file has all its changes.
    pub(crate) fn forget_aside(&self, file: FileId) {
        lock(&self.inner).aside.remove(&file);
    }

    /// What is set aside.
    pub(crate) fn aside(&self) -> Aside {
        lock(&self.inner).aside.clone()
    }

    /// Ends a checkpoint.
    pub(crate) fn end_flush(&self) {
        lock(&self.inner).flushing.clear();
    }

    /// Files in `range` whose index on disk may be missing or outdated, in order.
    pub(crate) fn unflushed(&self, range: impl std::ops::RangeBounds<FileId> + Clone) -> BTreeSet<FileId> {
        let inner = lock(&self.inner);
        let dirty = inner.dirty.range(range.clone());
        dirty.chain(inner.flushing.range(range)).copied().collect()
    }

    /// How many entries are in memory.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.inner).entries.len()
    }
}

impl Inner {
    /// Looks at a few entries and drops those that nothing needs. A few at each insertion keep up with insertions.
    fn evict(&mut self, limit: usize) {
        for _ in 0..4 {
            if self.entries.len() <= limit {
                return;
            }
            let Some(file) = self.clock.pop_front() else { return };
            let Some(slot) = self.entries.get_mut(&file) else { continue };
            let needed = self.dirty.contains(&file) || self.flushing.contains(&file);
            // Whoever holds the entry, or waits for or holds a claim on it, holds a reference.
            if needed || slot.used || Arc::strong_count(&slot.entry) > 1 {
                slot.used = false;
                self.clock.push_back(file);
            } else {
                self.entries.remove(&file);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(i: u8) -> FileId {
        FileId::from_bytes([i; 16])
    }

    fn load(table: &Table, i: u8) -> Arc<Entry> {
        table.load(file(i), || Ok::<_, ()>(FileState::default())).unwrap().0
    }

    #[test]
    fn idle_entries_are_evicted_and_needed_ones_stay() {
        let table = Table::new(3, Aside::new(), HashMap::new());
        let held = load(&table, 0);
        load(&table, 1);
        table.mark_dirty(file(1));
        for i in 2..100 {
            load(&table, i);
        }
        assert!(table.len() <= 4, "{}", table.len());
        assert!(Arc::ptr_eq(&held, &table.find(file(0)).unwrap()));
        assert!(table.find(file(1)).is_some());
        assert_eq!(table.begin_flush(), [file(1)].into());
        table.end_flush();
        drop(held);
        for i in 2..100 {
            load(&table, i);
        }
        assert!(table.find(file(1)).is_none());
    }

    #[test]
    fn what_the_journal_says_is_applied_on_load() {
        let changes =
            vec![(4, Change::Dropped { tenant: sluice_engine::ids::TenantId::new(1), facts: vec![9] })];
        let table = Table::new(3, Aside::new(), [(file(1), changes)].into());
        assert_eq!(table.unflushed(..), [file(1)].into());
        let entry = load(&table, 1);
        assert!(lock(&entry.live).state.dropped);
    }
}
