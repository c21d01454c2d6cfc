//! What a scrub reads next, and when: every chunk of every file, in order, at a rate that leaves the disk to others.
//!
//! Whoever drives it does what [`Scrub::step`] says and tells the result; it keeps [`Scrub::mark`], from which the next
//! process goes on. It holds the names of at most one list of files, and the ranges of one file.
//!
//! # The mark
//!
//! | bytes | field |
//! | --- | --- |
//! | 3 + 1 | `SLU`, version 1 |
//! | 8 | when this pass began, Unix ms |
//! | 8 | bytes verified in it |
//! | 8 | chunks found damaged in it |
//! | 16 | the file that is being read; all that come before it are done |
//! | 8 | its first chunk that is not |

use std::collections::VecDeque;
use std::ops::Range;

use crate::geometry::ChunkIndex;
use crate::ids::{FileId, Timestamp};

const MAGIC: [u8; 4] = *b"SLU\x01";

/// Bytes of a mark.
pub const MARK_LEN: usize = 52;

/// How fast, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Bytes a second.
    pub rate: u64,
    /// A pass begins no sooner than this after the one before began, in milliseconds.
    pub every_ms: u64,
}

/// How far a scrub has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// When this pass began.
    pub began: Timestamp,
    /// Bytes verified in it.
    pub bytes: u64,
    /// Chunks found damaged in it.
    pub damaged: u64,
    /// The file that is being read.
    pub file: FileId,
    /// Its first chunk that was not read yet.
    pub chunk: u64,
}

impl Mark {
    /// That of a pass that begins.
    const fn of_new_pass(began: Timestamp) -> Self {
        Self { began, bytes: 0, damaged: 0, file: FileId::NIL, chunk: 0 }
    }

    /// The bytes to keep.
    pub fn to_bytes(&self) -> [u8; MARK_LEN] {
        let mut out = [0; MARK_LEN];
        let (head, rest) = out.split_at_mut(28);
        head[..4].copy_from_slice(&MAGIC);
        head[4..12].copy_from_slice(&self.began.number().to_be_bytes());
        head[12..20].copy_from_slice(&self.bytes.to_be_bytes());
        head[20..28].copy_from_slice(&self.damaged.to_be_bytes());
        rest[..16].copy_from_slice(self.file.as_bytes());
        rest[16..].copy_from_slice(&self.chunk.to_be_bytes());
        out
    }

    /// A mark that was kept; `None` if it is none.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let (words, rest) = rest.split_first_chunk::<24>()?;
        let (file, chunk) = rest.split_first_chunk::<16>()?;
        let word = |bytes: &[u8]| bytes.try_into().ok().map(u64::from_be_bytes);
        Some(Self {
            began: Timestamp::new(word(&words[..8])?),
            bytes: word(&words[8..16])?,
            damaged: word(&words[16..])?,
            file: FileId::from_bytes(*file),
            chunk: word(chunk)?,
        })
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// List files after this one, or from the first: [`Scrub::listed`].
    List {
        /// The last that is done.
        after: Option<FileId>,
    },
    /// Ask what is held of a file: [`Scrub::holds`].
    Look(FileId),
    /// Verify a chunk: [`Scrub::verified`].
    Verify(FileId, ChunkIndex),
    /// Nothing before this time.
    Rest(Timestamp),
}

/// A scrub.
#[derive(Clone, Debug)]
pub struct Scrub {
    pace: Pace,
    mark: Mark,
    files: VecDeque<FileId>,
    /// What is left of the first of `files`, once that is known.
    chunks: Option<VecDeque<Range<u64>>>,
    /// Until when the bytes that were read are paid for.
    due: Timestamp,
    /// Since when nothing is to do, because a pass has ended.
    ended: bool,
}

impl Scrub {
    /// Goes on from a mark, or begins.
    pub fn new(pace: Pace, mark: Option<Mark>, now: Timestamp) -> Self {
        // A clock that was set back must not stop it for years.
        let mark = mark.filter(|mark| mark.began <= now).unwrap_or(Mark::of_new_pass(now));
        Self { pace, mark, files: VecDeque::new(), chunks: None, due: now, ended: false }
    }

    /// Reads so many bytes a second from now on.
    pub fn set_rate(&mut self, rate: u64) {
        self.pace.rate = rate;
    }

    /// How far it is.
    pub fn mark(&self) -> Mark {
        self.mark
    }

    /// Whether a pass has just ended, and the next one is waited for.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// What to do next.
    pub fn step(&mut self, now: Timestamp) -> Step {
        if self.ended {
            let next = self.mark.began.plus(self.pace.every_ms);
            if now < next {
                return Step::Rest(next);
            }
            self.ended = false;
            self.mark = Mark::of_new_pass(now);
        }
        if now < self.due {
            return Step::Rest(self.due);
        }
        let Some(file) = self.files.front() else {
            return Step::List { after: neighbour(self.mark.file, u128::checked_sub) };
        };
        let Some(chunks) = &mut self.chunks else { return Step::Look(*file) };
        while let Some(range) = chunks.front_mut() {
            if let Ok(index) = ChunkIndex::new(range.start)
                && !range.is_empty()
            {
                return Step::Verify(*file, index);
            }
            chunks.pop_front();
        }
        self.next_file();
        self.step(now)
    }

    fn next_file(&mut self) {
        if let Some(done) = self.files.pop_front() {
            let next = neighbour(done, u128::checked_add);
            (self.mark.file, self.mark.chunk) = (next.unwrap_or(done), 0);
            self.ended = next.is_none();
        }
        self.chunks = None;
    }

    /// The files after the one asked for, in order; none if there are no more.
    pub fn listed(&mut self, files: Vec<FileId>) {
        self.ended = files.is_empty();
        self.files = files.into();
        if self.files.front() != Some(&self.mark.file) {
            self.mark.chunk = 0;
        }
    }

    /// The chunks that are held of the file that was asked for, as rising ranges.
    pub fn holds(&mut self, held: Vec<Range<u64>>) {
        let from = self.mark.chunk;
        let left =
            held.into_iter().map(|range| range.start.max(from)..range.end).filter(|range| !range.is_empty());
        self.chunks = Some(left.collect());
        if let Some(file) = self.files.front() {
            self.mark.file = *file;
        }
    }

    /// A chunk was read: so many bytes, and whether they were sound.
    pub fn verified(&mut self, bytes: u64, sound: bool, now: Timestamp) {
        if let Some(range) = self.chunks.as_mut().and_then(VecDeque::front_mut) {
            range.start += 1;
            self.mark.chunk = range.start;
        }
        self.mark.bytes = self.mark.bytes.saturating_add(bytes);
        self.mark.damaged += u64::from(!sound);
        let cost = bytes.saturating_mul(1000).div_ceil(self.pace.rate.max(1));
        // What was not used is not saved up: after a pause it must not read at full speed.
        self.due = self.due.max(now).plus(cost);
    }
}

/// The id before or after another.
fn neighbour(file: FileId, step: fn(u128, u128) -> Option<u128>) -> Option<FileId> {
    step(u128::from_be_bytes(*file.as_bytes()), 1).map(|number| FileId::from_bytes(number.to_be_bytes()))
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a file often holds exactly one range")]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(n: u8) -> FileId {
        FileId::from_bytes([n; 16])
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp::new(ms)
    }

    /// Drives a scrub over these files until it rests for longer than a chunk costs; what it verified, and when.
    fn drive(
        scrub: &mut Scrub,
        files: &[(FileId, Vec<Range<u64>>)],
        mut now: u64,
        most: usize,
    ) -> Vec<(u64, u8, u64)> {
        let mut seen = Vec::new();
        for _ in 0..10_000 {
            match scrub.step(at(now)) {
                Step::List { after } => {
                    let all = files.iter().map(|(file, _)| *file);
                    scrub
                        .listed(all.filter(|file| after.is_none_or(|after| *file > after)).take(2).collect());
                }
                Step::Look(wanted) => {
                    let held = files.iter().find(|(file, _)| *file == wanted).map(|(_, held)| held.clone());
                    scrub.holds(held.unwrap_or_default());
                }
                Step::Verify(file, index) => {
                    seen.push((now, file.as_bytes()[0], index.number()));
                    scrub.verified(MIB, index.number() != 5, at(now));
                    if seen.len() == most {
                        return seen;
                    }
                }
                Step::Rest(until) if scrub.has_ended() => {
                    assert!(until > at(now));
                    return seen;
                }
                Step::Rest(until) => now = until.number(),
            }
        }
        panic!("it does not end");
    }

    fn files() -> Vec<(FileId, Vec<Range<u64>>)> {
        vec![(file(1), vec![0..2, 5..6]), (file(2), vec![]), (file(3), vec![7..8]), (file(0xFF), vec![0..1])]
    }

    #[test]
    fn golden_bytes() {
        let mark = Mark { began: at(1), bytes: 2, damaged: 3, file: file(4), chunk: 5 };
        let bytes = mark.to_bytes();
        assert_eq!(bytes[..28], *b"SLU\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03");
        assert_eq!((bytes[28..44] == [4; 16], &bytes[44..]), (true, &b"\0\0\0\0\0\0\0\x05"[..]));
        assert_eq!(Mark::from_bytes(&bytes), Some(mark));
        assert_eq!(Mark::from_bytes(&bytes[..51]), None);
        assert_eq!(Mark::from_bytes(b"nonsense"), None);
    }

    #[test]
    fn everything_is_read_once_a_pass_at_its_rate() {
        let pace = Pace { rate: MIB, every_ms: 60_000 };
        let mut scrub = Scrub::new(pace, None, at(5_000));
        let seen = drive(&mut scrub, &files(), 5_000, usize::MAX);
        let expected = [(5_000, 1, 0), (6_000, 1, 1), (7_000, 1, 5), (8_000, 3, 7), (9_000, 0xFF, 0)];
        assert_eq!(seen, expected);
        assert_eq!((scrub.mark().bytes, scrub.mark().damaged), (5 * MIB, 1));
        assert_eq!(scrub.step(at(20_000)), Step::Rest(at(65_000)));
        assert_eq!(scrub.step(at(65_000)), Step::List { after: None });
        assert_eq!(drive(&mut scrub, &files(), 65_000, usize::MAX).len(), 5, "again from the beginning");
    }

    #[test]
    fn it_goes_on_where_it_was() {
        let pace = Pace { rate: 100 * MIB, every_ms: 60_000 };
        let whole: Vec<_> = drive(&mut Scrub::new(pace, None, at(0)), &files(), 0, usize::MAX);
        let names =
            |seen: &[(u64, u8, u64)]| seen.iter().map(|(_, file, chunk)| (*file, *chunk)).collect::<Vec<_>>();
        for most in 1..whole.len() {
            let mut first = Scrub::new(pace, None, at(0));
            let mut seen = names(&drive(&mut first, &files(), 0, most));
            let mark = Mark::from_bytes(&first.mark().to_bytes());
            let mut second = Scrub::new(pace, mark, at(1_000));
            seen.extend(names(&drive(&mut second, &files(), 1_000, usize::MAX)));
            assert_eq!(seen, names(&whole), "after {most}");
            assert_eq!(second.mark().bytes, 5 * MIB);
        }
    }

    #[test]
    fn a_file_that_went_meanwhile_and_a_clock_that_was_set_back_do_no_harm() {
        let pace = Pace { rate: MIB, every_ms: 60_000 };
        let mark = Mark { began: at(9_000), bytes: 1, damaged: 0, file: file(2), chunk: 70 };
        let mut scrub = Scrub::new(pace, Some(mark), at(10_000));
        // The file of the mark is gone; the next one is read from its beginning.
        let left = vec![(file(3), vec![7..8])];
        assert_eq!(drive(&mut scrub, &left, 10_000, usize::MAX).len(), 1);
        let early = Scrub::new(pace, Some(mark), at(500));
        assert_eq!((early.mark().began, early.mark().file), (at(500), FileId::NIL));
        assert_eq!(Scrub::new(pace, None, at(0)).step(at(0)), Step::List { after: None });
    }
}
