//! A span: `(start, level, cv)`, the 2^level chunks from `start`, and the chaining value of exactly that subtree.
//!
//! At the right edge of a file whose number of chunks is no power of two, a place is clipped to the file and takes
//! the lowest level that covers what is left, so that every node of the file's tree has exactly one name.

use std::fmt;
use std::ops::Range;

use crate::geometry::{ChunkIndex, Geometry, level_covering};
use crate::hash::ChainingValue;
use crate::limits::{MAX_CHUNKS, MAX_LEVEL};

/// Where a node of a file's tree lies: the 2^level chunks from `start`, a multiple of 2^level.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    start: u64,
    level: u8,
}

/// Why numbers name no place, or none of a file.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlaceError {
    /// No span has this level.
    #[error("span level {level} is over the limit of {MAX_LEVEL}")]
    Level {
        /// The level that came.
        level: u8,
    },
    /// A span starts at a multiple of its length.
    #[error("a span of level {level} starts at a multiple of {}, got {start}", 1u64 << level)]
    Misaligned {
        /// The first chunk that came.
        start: u64,
        /// The level that came.
        level: u8,
    },
    /// No file is that long.
    #[error("span start {start} is past the end of the largest file ({MAX_CHUNKS} chunks)")]
    OutOfRange {
        /// The first chunk that came.
        start: u64,
    },
    /// The span begins past the end of its file, or could be said with a lower level.
    #[error("span {start}+2^{level} does not fit a file of {chunks} chunks")]
    PastEnd {
        /// The first chunk that came.
        start: u64,
        /// The level that came.
        level: u8,
        /// Chunks in the file.
        chunks: u64,
    },
}

impl PlaceError {
    /// The error's name in the protocol.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Level { .. } => "span-level",
            Self::Misaligned { .. } => "span-alignment",
            Self::OutOfRange { .. } => "span-range",
            Self::PastEnd { .. } => "span-past-end",
        }
    }
}

impl Place {
    /// The place of `2^level` chunks from `start`, in a file of any size: checks level, alignment and range.
    pub const fn new(start: u64, level: u8) -> Result<Self, PlaceError> {
        if level > MAX_LEVEL {
            return Err(PlaceError::Level { level });
        }
        if start >= MAX_CHUNKS {
            return Err(PlaceError::OutOfRange { start });
        }
        if !start.is_multiple_of(1 << level) {
            return Err(PlaceError::Misaligned { start, level });
        }
        Ok(Self { start, level })
    }

    /// The place of one chunk.
    pub const fn of_chunk(index: ChunkIndex) -> Self {
        Self { start: index.number(), level: 0 }
    }

    /// Checks that the place is a node of this file's tree, below the top.
    pub const fn check(self, file: Geometry) -> Result<(), PlaceError> {
        let chunks = file.chunks();
        let fits = self.start < chunks
            && (self.level == 0 || self.start + (1 << (self.level - 1)) < chunks)
            && (chunks == 1 || self.level < file.top_level());
        if fits { Ok(()) } else { Err(PlaceError::PastEnd { start: self.start, level: self.level, chunks }) }
    }

    /// The first chunk.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// log2 of the number of chunks (of which the file's end may clip some).
    pub const fn level(self) -> u8 {
        self.level
    }

    /// The chunks, clipped to the file; none if the place lies past its end.
    pub fn range(self, file: Geometry) -> Range<u64> {
        self.start..(self.start + (1u64 << self.level)).min(file.chunks()).max(self.start)
    }

    /// Number of chunks, clipped to the file.
    pub fn chunks(self, file: Geometry) -> u64 {
        let range = self.range(file);
        range.end.saturating_sub(range.start)
    }

    /// Whether `other` lies inside this place, or is it.
    pub const fn contains(self, other: Self) -> bool {
        self.level >= other.level && (other.start >> self.level) == (self.start >> self.level)
    }

    /// The node above and the node beside, or `None` if the node above is the top (whose value is the root) or this
    /// place is not below the top at all.
    pub fn family(self, file: Geometry) -> Option<Family> {
        let chunks = file.chunks();
        let top = file.top_level();
        // At the right edge some levels have no node of their own: climb to the first that has.
        let mut level = self.level + 1;
        while level < top {
            let half = 1u64 << (level - 1);
            let start = self.start & !((1u64 << level) - 1);
            if start + half < chunks {
                let parent = Self { start, level };
                let (left, right) = parent.children(file)?;
                let is_left = self.start < start + half;
                return Some(Family { parent, sibling: if is_left { right } else { left }, is_left });
            }
            level += 1;
        }
        None
    }

    /// The two nodes below; `None` for a single chunk.
    pub fn children(self, file: Geometry) -> Option<(Self, Self)> {
        let below = self.level.checked_sub(1)?;
        let middle = self.start + (1u64 << below);
        let left = Self { start: self.start, level: below };
        Some((left, Self::clipped(middle, below, file)))
    }

    /// The two children of the top node; `None` for files of fewer than two chunks.
    pub fn top_children(file: Geometry) -> Option<(Self, Self)> {
        let below = file.top_level().checked_sub(1)?;
        Some((Self { start: 0, level: below }, Self::clipped(1u64 << below, below, file)))
    }

    /// The aligned place of up to 2^level chunks from `start`, under its one name.
    pub fn clipped(start: u64, level: u8, file: Geometry) -> Self {
        let left = file.chunks().saturating_sub(start);
        Self { start, level: level.min(level_covering(left)) }
    }

    /// Cuts `[start, end)` into the fewest places of at most `level`.
    pub fn tile(range: Range<u64>, level: u8, file: Geometry) -> Vec<Self> {
        let mut places = Vec::new();
        let end = range.end.min(file.chunks());
        let mut at = range.start;
        // The top node is no span, so a tile never grows to it.
        let level = level.min(file.top_level().saturating_sub(1));
        while at < end {
            let mut fit = (at.trailing_zeros().min(u32::from(MAX_LEVEL)) as u8).min(level);
            // At the file's end a place may reach past it.
            while fit > 0 && end < file.chunks() && at + (1u64 << fit) > end {
                fit -= 1;
            }
            let place = Self::clipped(at, fit, file);
            at = place.range(file).end;
            places.push(place);
        }
        places
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.level == 0 {
            write!(f, "{}", self.start)
        } else {
            write!(f, "{}+2^{}", self.start, self.level)
        }
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A node's surroundings: what it merges with, and into what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Family {
    /// The node above.
    pub parent: Place,
    /// The node beside.
    pub sibling: Place,
    /// Whether this node is the left of the two.
    pub is_left: bool,
}

impl Family {
    /// The parent's value from this node's and its sibling's.
    pub fn merge(&self, own: &ChainingValue, sibling: &ChainingValue) -> ChainingValue {
        if self.is_left { ChainingValue::merge(own, sibling) } else { ChainingValue::merge(sibling, own) }
    }
}

/// A place and the chaining value of the bytes in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// Where.
    pub place: Place,
    /// What.
    pub value: ChainingValue,
}

impl Span {
    /// Joins place and value.
    pub const fn new(place: Place, value: ChainingValue) -> Self {
        Self { place, value }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={:?}", self.place, self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CHUNK_LEN;

    fn file(chunks: u64) -> Geometry {
        Geometry::new(chunks * CHUNK_LEN).unwrap()
    }

    fn place(start: u64, level: u8) -> Place {
        Place::new(start, level).unwrap()
    }

    #[test]
    fn places_are_checked() {
        assert_eq!(Place::new(0, 36), Err(PlaceError::Level { level: 36 }));
        assert_eq!(Place::new(2, 2), Err(PlaceError::Misaligned { start: 2, level: 2 }));
        assert_eq!(Place::new(MAX_CHUNKS, 0), Err(PlaceError::OutOfRange { start: MAX_CHUNKS }));
        assert!(place(4, 0).check(file(5)).is_ok());
        assert!(place(4, 1).check(file(5)).is_err(), "4+2^1 of 5 chunks is named 4");
        assert!(place(4, 2).check(file(7)).is_ok());
        assert!(place(0, 3).check(file(8)).is_err(), "the top is no span");
        assert!(place(8, 0).check(file(8)).is_err());
        assert!(place(0, 0).check(file(1)).is_ok());
    }

    #[test]
    fn the_right_edge_climbs_to_its_real_parent() {
        let file = file(13); // 8 | 4 | 1
        let family = place(12, 0).family(file).unwrap();
        assert_eq!(family.parent, place(8, 3));
        assert_eq!(family.sibling, place(8, 2));
        assert!(!family.is_left);
        assert_eq!(place(8, 2).family(file).unwrap().sibling, place(12, 0));
        assert_eq!(place(8, 3).family(file), None, "above is the top");
        assert_eq!(Place::top_children(file), Some((place(0, 3), place(8, 3))));
    }

    #[test]
    fn tiles_cover_a_range_once() {
        for chunks in 1..40 {
            let file = file(chunks);
            for start in 0..chunks {
                for end in start..=chunks {
                    let tiles = Place::tile(start..end, MAX_LEVEL, file);
                    let mut at = start;
                    for tile in tiles {
                        assert_eq!(tile.check(file), Ok(()), "{tile} of {chunks}");
                        let range = tile.range(file);
                        assert_eq!(range.start, at);
                        at = range.end;
                    }
                    assert_eq!(at, end, "{start}..{end} of {chunks}");
                }
            }
        }
    }
}
