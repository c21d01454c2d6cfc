//! Chunks that one stream reads several of in one go, where it is requests that cost: out of a bucket.
//!
//! The chunks of a file are cut into blocks of as many as the store likes to read at once. Whoever wants a chunk first has its
//! block read, and the others wait for it; the stream asks a few chunks ahead, so that the next block is on its way before this
//! one has gone. A block is paid for as a whole, and only out of the half of the memory that is free: with less each chunk is
//! read by itself, as it is when a block cannot be had.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::FileId;
use sluice_engine::limits::CHUNK_LEN;
use sluice_node::budget::MemoryBudget;
use sluice_store::{Chunks, StoreError, Together};
use tokio::sync::OnceCell;

use crate::WorkerParts;

/// Blocks that a stream has at once: the one whose chunks go out, and the next.
const BLOCKS: usize = 2;

/// The store cannot be asked at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Away;

/// A block, once it was asked for; `None` if its chunks are to be read one by one.
type Block = Arc<OnceCell<Result<Option<Together>, Away>>>;

/// The blocks of one stream.
pub(crate) struct Ahead {
    store: Arc<dyn Chunks>,
    memory: MemoryBudget,
    file: FileId,
    /// The chunks that the stream reads.
    chunks: Range<u64>,
    /// How many make a block.
    at_once: u64,
    /// The latest ones, by number. Never held across an await.
    blocks: Mutex<Vec<(u64, Block)>>,
}

impl Ahead {
    /// For the stream of these chunks.
    pub(crate) fn new(parts: &WorkerParts, file: FileId, chunks: Range<u64>) -> Self {
        let (store, memory) = (parts.store.clone(), parts.memory.clone());
        let at_once = store.at_once().max(1);
        Self { store, memory, file, chunks, at_once, blocks: Mutex::default() }
    }

    /// The bytes of a chunk and what they were verified to hash to, if it was read with others.
    pub(crate) async fn chunk(&self, index: ChunkIndex) -> Result<Option<(Bytes, ChainingValue)>, Away> {
        let number = index.number() / self.at_once;
        let whole = number * self.at_once..(number + 1) * self.at_once;
        let chunks = whole.start.max(self.chunks.start)..whole.end.min(self.chunks.end);
        if chunks.end.saturating_sub(chunks.start) < 2 {
            return Ok(None);
        }
        let block = self.block(number);
        let Some(together) =
            block.get_or_init(|| self.read(chunks.clone())).await.as_ref().map_err(|away| *away)?
        else {
            return Ok(None);
        };
        let at = (index.number() - chunks.start) as usize;
        let from = at * CHUNK_LEN as usize;
        let to = (from + CHUNK_LEN as usize).min(together.bytes.len());
        let value = together.values.get(at).filter(|_| from <= to);
        Ok(value.map(|value| (together.bytes.slice(from..to), *value)))
    }

    fn block(&self, number: u64) -> Block {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, block)) = blocks.iter().find(|(of, _)| *of == number) {
            return block.clone();
        }
        if blocks.len() == BLOCKS {
            blocks.remove(0);
        }
        let block = Block::default();
        blocks.push((number, block.clone()));
        block
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
