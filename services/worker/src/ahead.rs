//! Chunks that one stream reads several of in one go, where it is requests that cost: out of a bucket.
//!
//! The chunks of a file are cut into blocks of as many as the store likes to read at once. Whoever wants a chunk first has its
//! block read, and the others wait for it; once the second half of a block is wanted the next one is read, too, by a task that
//! ends with the stream. A block is paid for as a whole, until its last byte has left the process, and only out of the half of the
//! memory that is free: with less each chunk is read by itself, as it is when a block cannot be had.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::FileId;
use sluice_engine::limits::CHUNK_LEN;
use sluice_node::budget::MemoryBudget;
use sluice_node::telemetry::carried;
use sluice_store::{Chunks, StoreError, Together};
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

use crate::WorkerParts;

/// The store cannot be asked at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Away;

/// A block, once it was asked for; `None` if its chunks are to be read one by one.
type Block = Arc<OnceCell<Result<Option<Together>, Away>>>;

/// Where the blocks of one stream come from.
struct Source {
    store: Arc<dyn Chunks>,
    memory: MemoryBudget,
    file: FileId,
    /// The chunks that the stream reads.
    chunks: Range<u64>,
    /// How many make a block.
    at_once: u64,
}

/// The blocks of one stream: that whose chunks go out, and the next.
#[derive(Default)]
struct Blocks {
    /// By number.
    wanted: BTreeMap<u64, Block>,
    /// What reads those that nobody waits for yet.
    tasks: JoinSet<()>,
}

/// What one stream reads ahead.
pub(crate) struct Ahead {
    source: Arc<Source>,
    /// Never held across an await.
    blocks: Mutex<Blocks>,
}

impl Ahead {
    /// For the stream of these chunks.
    pub(crate) fn new(parts: &WorkerParts, file: FileId, chunks: Range<u64>) -> Self {
        let (store, memory) = (parts.store.clone(), parts.memory.clone());
        let at_once = store.at_once().max(1);
        let source = Arc::new(Source { store, memory, file, chunks, at_once });
        Self { source, blocks: Mutex::default() }
    }

    /// The bytes of a chunk and what they were verified to hash to, if it was read with others. Chunks are asked for in order.
    pub(crate) async fn chunk(&self, index: ChunkIndex) -> Result<Option<(Bytes, ChainingValue)>, Away> {
        let number = index.number() / self.source.at_once;
        let Some(chunks) = self.source.chunks_of(number) else { return Ok(None) };
        let block = {
            let Blocks { wanted, .. } = &mut *self.blocks();
            // Those before it are spent.
            wanted.retain(|of, _| *of >= number);
            wanted.entry(number).or_default().clone()
        };
        let read = block.get_or_init(|| self.source.read(chunks.clone())).await;
        let Some(together) = read.as_ref().map_err(|away| *away)? else { return Ok(None) };
        if index.number() >= chunks.start.midpoint(chunks.end) {
            self.begin(number + 1);
        }
        if index.number() + 1 == chunks.end {
            self.blocks().wanted.remove(&number);
        }
        let at = (index.number() - chunks.start) as usize;
        let from = at * CHUNK_LEN as usize;
        let to = (from + CHUNK_LEN as usize).min(together.bytes.len());
        let value = together.values.get(at).filter(|_| from <= to);
        Ok(value.map(|value| (together.bytes.slice(from..to), *value)))
    }

    /// Has a block read before anybody waits for it.
    fn begin(&self, number: u64) {
        let Some(chunks) = self.source.chunks_of(number) else { return };
        let Blocks { wanted, tasks } = &mut *self.blocks();
        let Entry::Vacant(place) = wanted.entry(number) else { return };
        let (block, source) = (place.insert(Block::default()).clone(), self.source.clone());
        while tasks.try_join_next().is_some() {}
        tasks.spawn(carried(async move {
            let _ = block.get_or_init(|| source.read(chunks)).await;
        }));
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source {
    /// The chunks of a block that the stream reads, if it is worth while.
    fn chunks_of(&self, number: u64) -> Option<Range<u64>> {
        let whole = number * self.at_once..(number + 1) * self.at_once;
        let chunks = whole.start.max(self.chunks.start)..whole.end.min(self.chunks.end);
        (chunks.end.saturating_sub(chunks.start) > 1).then_some(chunks)
    }

    async fn read(&self, chunks: Range<u64>) -> Result<Option<Together>, Away> {
        let room = (chunks.end - chunks.start) * CHUNK_LEN;
        if self.memory.used() + room > self.memory.total() / 2 {
            return Ok(None);
        }
        let Ok(permit) = self.memory.try_take(room) else { return Ok(None) };
        match self.store.read_together(self.file, chunks).await {
            Ok(Some(Together { bytes, values })) => {
                Ok(Some(Together { bytes: permit.pay_for(bytes), values }))
            }
            Err(StoreError::Io { .. } | StoreError::Unreachable { .. }) => Err(Away),
            // What is wrong with which chunk is found out when each is read by itself.
            Ok(None) | Err(_) => Ok(None),
        }
    }
}
