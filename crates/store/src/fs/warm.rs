//! Which chunks are worth a place in the page cache: those that are read a second time.
//!
//! What is uploaded is mostly read once, if at all: by the home that pulls it, or by whoever waited for it. Filling the
//! cache for that costs more than the read (fresh pages, and what they push out). A chunk that is asked for again is
//! read through the cache, where it then stays as long as the kernel thinks it worth while.
//!
//! A table of fixed size remembers what was read, by a tag for each chunk. A chunk that is forgotten, because another one
//! took its place, costs one more read of the device; one that is taken for another costs a place in the cache.

use std::sync::atomic::{AtomicU32, Ordering};

use sluice_engine::ids::FileId;

/// Chunks that are remembered: of 64 GiB, in 256 KiB.
const SLOTS: usize = 1 << 16;

/// Chunks that were read lately.
#[derive(Debug)]
pub(crate) struct Warm(Box<[AtomicU32]>);

impl Default for Warm {
    fn default() -> Self {
        Self((0..SLOTS).map(|_| AtomicU32::new(0)).collect())
    }
}

impl Warm {
    /// Whether the chunk was read before; from now on it was.
    pub(crate) fn again(&self, file: FileId, chunk: u64) -> bool {
        let (id, _) = file.as_bytes().split_at(8);
        let id = id.iter().fold(0, |id, byte| id << 8 | u64::from(*byte));
        // Ids are digests already; an odd factor (2^64 divided by the golden ratio) spreads the chunks of one.
        let mixed = (id ^ chunk).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let tag = (mixed >> 16) as u32 | 1;
        let slot = (mixed >> 48) as usize % SLOTS;
        self.0.get(slot).is_some_and(|slot| slot.swap(tag, Ordering::Relaxed) == tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_known_the_second_time() {
        let warm = Warm::default();
        let file = FileId::from_bytes([7; 16]);
        let chunks = 0..10_000;
        let first = chunks.clone().filter(|chunk| warm.again(file, *chunk)).count();
        let second = chunks.filter(|chunk| warm.again(file, *chunk)).count();
        assert_eq!(first, 0);
        assert!(second > 9_000, "{second}");
        assert!(!warm.again(FileId::from_bytes([8; 16]), 0));
    }
}
