//! How a file of a given size falls into chunks, runs, stripes, units and segments, up to 34 PiB.
//!
//! All arithmetic is checked by construction: a [`Geometry`] exists only for a valid size, a [`ChunkIndex`] only
//! below the largest file's end, a [`Run`] only inside its file.

use std::fmt;
use std::ops::Range;

use crate::limits::{CHUNK_LEN, MAX_CHUNKS, MAX_FILE_LEN, MAX_RUN};

/// A chunk's position in its file: it holds the bytes `[i·2^20, (i+1)·2^20)`. Below [`MAX_CHUNKS`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ChunkIndex(u64);

impl ChunkIndex {
    /// The index with this number.
    pub const fn new(number: u64) -> Result<Self, GeometryError> {
        if number < MAX_CHUNKS {
            Ok(Self(number))
        } else {
            Err(GeometryError::IndexTooLarge { index: number })
        }
    }

    /// The number.
    pub const fn number(self) -> u64 {
        self.0
    }

    /// Where the chunk begins in its file, in bytes.
    pub const fn offset(self) -> u64 {
        self.0 * CHUNK_LEN
    }
}

impl fmt::Display for ChunkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Why a size, an index or a run does not fit a file.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum GeometryError {
    /// The file would be larger than 34 PiB.
    #[error("file size {size} is over the limit of {MAX_FILE_LEN} bytes (34 PiB)")]
    SizeTooLarge {
        /// The size that was asked for, in bytes.
        size: u64,
    },
    /// No file has a chunk with this index.
    #[error("chunk index {index} is over the limit of {}", MAX_CHUNKS - 1)]
    IndexTooLarge {
        /// The index that came.
        index: u64,
    },
    /// The chunk would lie past the end of its file.
    #[error("chunk {index} is past the end: the file has {chunks} chunks")]
    PastEnd {
        /// The index that came.
        index: u64,
        /// Chunks in the file.
        chunks: u64,
    },
    /// A run holds 1, 2, 4 or 8 chunks.
    #[error("a request carries 1, 2, 4 or 8 chunks, got {count}")]
    RunCount {
        /// The number of chunks that came.
        count: u64,
    },
    /// A run starts at a multiple of its length.
    #[error("a run of {count} chunks starts at a multiple of {count}, got {start}")]
    RunUnaligned {
        /// The index of the first chunk.
        start: u64,
        /// The number of chunks.
        count: u64,
    },
    /// The bytes are not what the chunks of the run hold.
    #[error("length {got}, expected {expected}")]
    Length {
        /// Bytes that the run holds.
        expected: u64,
        /// Bytes that came.
        got: u64,
    },
    /// Nothing came.
    #[error("empty body: a chunk holds at least one byte")]
    Empty,
}

impl GeometryError {
    /// The error's name in the protocol.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::SizeTooLarge { .. } => "file-size",
            Self::IndexTooLarge { .. } => "chunk-index",
            Self::PastEnd { .. } => "chunk-past-end",
            Self::RunCount { .. } => "run-count",
            Self::RunUnaligned { .. } => "run-alignment",
            Self::Length { .. } => "run-length",
            Self::Empty => "run-empty",
        }
    }
}

/// 1, 2, 4 or 8 whole chunks, aligned to their number: what one request carries.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Run {
    start: ChunkIndex,
    count: u8,
}

impl Run {
    /// `count` chunks from `start`, in a file that may be of any size.
    pub fn new(start: ChunkIndex, count: u64) -> Result<Self, GeometryError> {
        if count == 0 || count > u64::from(MAX_RUN) || !count.is_power_of_two() {
            return Err(GeometryError::RunCount { count });
        }
        if !start.0.is_multiple_of(count) {
            return Err(GeometryError::RunUnaligned { start: start.0, count });
        }
        if start.0 + count > MAX_CHUNKS {
            return Err(GeometryError::IndexTooLarge { index: start.0 + count - 1 });
        }
        Ok(Self { start, count: count as u8 })
    }

    /// The run that a body of `len` bytes at `start` must be, in a file whose size this datacenter does not know.
    pub fn from_len(start: ChunkIndex, len: u64) -> Result<Self, GeometryError> {
        if len == 0 {
            return Err(GeometryError::Empty);
        }
        Self::new(start, len.div_ceil(CHUNK_LEN))
    }

    /// The first chunk.
    pub const fn start(self) -> ChunkIndex {
        self.start
    }

    /// Number of chunks: 1, 2, 4 or 8.
    pub const fn count(self) -> u64 {
        self.count as u64
    }

    /// The indices of the chunks.
    pub const fn range(self) -> Range<u64> {
        self.start.0..self.start.0 + self.count as u64
    }

    /// The index of the `i`-th chunk of the run, for `i < count`.
    pub const fn index(self, i: u64) -> ChunkIndex {
        ChunkIndex(self.start.0 + i)
    }
}

/// The shape of a file: how many chunks, and how long the last one is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Geometry {
    size: u64,
}

impl Geometry {
    /// The shape of a file of `size` bytes.
    pub const fn new(size: u64) -> Result<Self, GeometryError> {
        if size <= MAX_FILE_LEN { Ok(Self { size }) } else { Err(GeometryError::SizeTooLarge { size }) }
    }

    /// The shape to reckon with while the size is not settled: the largest, of which only full chunks are used.
    pub const fn largest() -> Self {
        Self { size: MAX_FILE_LEN }
    }

    /// Size of the file in bytes.
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Number of chunks; zero for an empty file.
    pub const fn chunks(self) -> u64 {
        self.size.div_ceil(CHUNK_LEN)
    }

    /// Whether the file has this chunk.
    pub const fn has(self, index: ChunkIndex) -> bool {
        index.0 < self.chunks()
    }

    /// Bytes in a chunk: 1 MiB but for the last.
    pub const fn chunk_len(self, index: ChunkIndex) -> Result<u64, GeometryError> {
        if !self.has(index) {
            return Err(GeometryError::PastEnd { index: index.0, chunks: self.chunks() });
        }
        let rest = self.size - index.offset();
        Ok(if rest < CHUNK_LEN { rest } else { CHUNK_LEN })
    }

    /// Bytes in the chunks `[start, end)`, clipped to the file.
    pub const fn range_len(self, start: u64, end: u64) -> u64 {
        let from = start.saturating_mul(CHUNK_LEN);
        let to = end.saturating_mul(CHUNK_LEN);
        let to = if to < self.size { to } else { self.size };
        to.saturating_sub(from)
    }

    /// The run of a body of `len` bytes that starts at chunk `start`: checks index, count, alignment and length.
    pub fn run(self, start: ChunkIndex, len: u64) -> Result<Run, GeometryError> {
        if !self.has(start) {
            return Err(GeometryError::PastEnd { index: start.0, chunks: self.chunks() });
        }
        let run = Run::from_len(start, len)?;
        let end = run.range().end;
        if end > self.chunks() {
            return Err(GeometryError::PastEnd { index: end - 1, chunks: self.chunks() });
        }
        let expected = self.range_len(start.0, end);
        if len == expected { Ok(run) } else { Err(GeometryError::Length { expected, got: len }) }
    }

    /// The level of the top node: log2 of the chunks, rounded up. Zero for files of up to one chunk.
    pub const fn top_level(self) -> u8 {
        level_covering(self.chunks())
    }
}

/// The lowest level whose span holds `chunks` chunks.
pub(crate) const fn level_covering(chunks: u64) -> u8 {
    if chunks <= 1 { 0 } else { (u64::BITS - (chunks - 1).leading_zeros()) as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MAX_LEVEL;

    fn index(i: u64) -> ChunkIndex {
        ChunkIndex::new(i).unwrap()
    }

    #[test]
    fn the_largest_file_has_the_designed_shape() {
        let largest = Geometry::new(MAX_FILE_LEN).unwrap();
        assert_eq!(largest.chunks(), 36_507_222_016);
        assert_eq!(largest.top_level(), MAX_LEVEL + 1);
        assert_eq!(
            Geometry::new(MAX_FILE_LEN + 1),
            Err(GeometryError::SizeTooLarge { size: MAX_FILE_LEN + 1 })
        );
        assert!(ChunkIndex::new(MAX_CHUNKS).is_err());
    }

    #[test]
    fn the_last_chunk_may_be_short() {
        let file = Geometry::new(2 * CHUNK_LEN + 5).unwrap();
        assert_eq!(file.chunks(), 3);
        assert_eq!(file.chunk_len(index(1)), Ok(CHUNK_LEN));
        assert_eq!(file.chunk_len(index(2)), Ok(5));
        assert_eq!(file.chunk_len(index(3)), Err(GeometryError::PastEnd { index: 3, chunks: 3 }));
        assert_eq!(file.top_level(), 2);
        assert_eq!(Geometry::new(0).unwrap().chunks(), 0);
    }

    #[test]
    fn runs_are_one_two_four_or_eight_aligned_chunks_of_the_right_length() {
        let file = Geometry::new(10 * CHUNK_LEN + 1).unwrap();
        assert_eq!(file.run(index(0), 8 * CHUNK_LEN).unwrap().count(), 8);
        assert_eq!(file.run(index(10), 1).unwrap().count(), 1);
        assert_eq!(file.run(index(0), 0), Err(GeometryError::Empty));
        assert_eq!(file.run(index(11), 1), Err(GeometryError::PastEnd { index: 11, chunks: 11 }));
        assert_eq!(file.run(index(0), 3 * CHUNK_LEN), Err(GeometryError::RunCount { count: 3 }));
        assert_eq!(file.run(index(0), 16 * CHUNK_LEN), Err(GeometryError::RunCount { count: 16 }));
        assert_eq!(
            file.run(index(2), 4 * CHUNK_LEN),
            Err(GeometryError::RunUnaligned { start: 2, count: 4 })
        );
        assert_eq!(
            file.run(index(3), CHUNK_LEN - 1),
            Err(GeometryError::Length { expected: CHUNK_LEN, got: CHUNK_LEN - 1 })
        );
        assert_eq!(file.run(index(8), 4 * CHUNK_LEN), Err(GeometryError::PastEnd { index: 11, chunks: 11 }));
        assert!(Run::new(index(MAX_CHUNKS - 1), 1).is_ok());
    }

    #[test]
    fn levels_round_up() {
        let levels: Vec<u8> = [0, 1, 2, 3, 4, 5, 8, 9].into_iter().map(level_covering).collect();
        assert_eq!(levels, [0, 0, 1, 2, 2, 3, 3, 4]);
    }
}
