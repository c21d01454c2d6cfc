//! Shares: aligned parts of the slots of a datacenter, each of which one aggregator has at a time.
//!
//! All datacenters of a cluster divide their slots alike, into 1, 2, 4, … or 256 shares. For each share a datacenter has an
//! [`Aggregator`](crate::aggregator::Aggregator) of its own, with its own incarnation, which speaks with those of the same
//! share elsewhere and with nobody else. So shares can be in different processes, and move between them one by one.

use std::fmt;
use std::str::FromStr;

use crate::ids::FileId;

/// The most bits of a file's id that say which share it is in: a share has 16 slots or more.
const MAX_BITS: u8 = 8;

/// Why something is no share, or no number of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadShare {
    /// Not 1, 2, 4, … or 256 shares.
    #[error("slots are divided into 1, 2, 4, … or 256 shares, not into {0}")]
    Count(u32),
    /// There are not so many shares.
    #[error("there is no share {index} of {count}")]
    Index {
        /// Which.
        index: u32,
        /// Of how many.
        count: u32,
    },
    /// Not of the form `3/16`.
    #[error("{0} is no share: expected one like 3/16")]
    Form(&'static str),
}

/// How many shares the slots are divided into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shares {
    bits: u8,
}

impl Shares {
    /// One share: everything.
    pub const ONE: Self = Self { bits: 0 };

    /// So many.
    pub const fn new(count: u32) -> Result<Self, BadShare> {
        if count.is_power_of_two() && count <= 1 << MAX_BITS {
            Ok(Self { bits: count.trailing_zeros() as u8 })
        } else {
            Err(BadShare::Count(count))
        }
    }

    /// How many.
    pub const fn count(self) -> u32 {
        1 << self.bits
    }

    /// The share that a file is in.
    pub const fn of(self, file: FileId) -> Share {
        let index = (file.slot().number() as u32) << self.bits >> SLOT_BITS;
        Share { bits: self.bits, index: index as u8 }
    }

    /// All of them, in order.
    pub fn all(self) -> impl Iterator<Item = Share> + Clone {
        let bits = self.bits;
        (0..self.count()).map(move |index| Share { bits, index: index as u8 })
    }
}

/// Bits of a file's id that make its slot.
const SLOT_BITS: u8 = 12;

/// One share of the slots.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Share {
    bits: u8,
    index: u8,
}

impl Share {
    /// All slots.
    pub const WHOLE: Self = Self { bits: 0, index: 0 };

    /// The share with this index of so many.
    pub const fn new(index: u32, count: u32) -> Result<Self, BadShare> {
        match Shares::new(count) {
            Ok(Shares { bits }) if index < count => Ok(Self { bits, index: index as u8 }),
            Ok(_) => Err(BadShare::Index { index, count }),
            Err(error) => Err(error),
        }
    }

    /// Which one it is, from 0 on.
    pub const fn index(self) -> u32 {
        self.index as u32
    }

    /// Of how many.
    pub const fn of(self) -> Shares {
        Shares { bits: self.bits }
    }

    /// How many bits of its files' ids are the same.
    pub const fn bits(self) -> u8 {
        self.bits
    }

    /// The lowest id that may be of one of its files.
    pub const fn first(self) -> FileId {
        let high = (self.index as u128) << (u128::BITS - MAX_BITS as u32) << (MAX_BITS - self.bits);
        FileId::from_bytes(high.to_be_bytes())
    }

    /// The id before that, if there is one: what a list of its files begins after.
    pub const fn before(self) -> Option<FileId> {
        match self.first().as_u128().checked_sub(1) {
            Some(id) => Some(FileId::from_bytes(id.to_be_bytes())),
            None => None,
        }
    }

    /// Whether a file is in it.
    pub const fn has(self, file: FileId) -> bool {
        self.of().of(file).index == self.index
    }

    /// Whether files may be in both, should the slots be divided otherwise than they were.
    pub const fn overlaps(self, other: Self) -> bool {
        if self.bits <= other.bits { self.has(other.first()) } else { other.has(self.first()) }
    }

    /// Which of several processes should have it, by their names: whoever comes or goes changes only what it gets or had
    /// (rendezvous hashing, Thaler and Ravishankar 1998). `None` if there are none.
    pub fn rendezvous<'a>(self, processes: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
        let weighed = processes.into_iter().map(|name| {
            let mut hash = blake3::Hasher::new();
            hash.update(&[self.bits, self.index]).update(name.as_bytes());
            (*hash.finalize().as_bytes(), name)
        });
        weighed.max().map(|(_, name)| name)
    }

    /// Whether it falls to process `me`, which `has` it or not, of those that are there. While nobody is, whoever has it keeps
    /// it: nobody else could take it.
    pub fn falls_to<'a>(self, me: &str, has: bool, there: impl IntoIterator<Item = &'a str>) -> bool {
        self.rendezvous(there).map_or(has, |owner| owner == me)
    }

    /// Whether what belongs to no file is kept here: LOAD and REVOKE.
    pub const fn is_first(self) -> bool {
        self.index == 0
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of().count())
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Share {
    type Err = BadShare;

    fn from_str(text: &str) -> Result<Self, BadShare> {
        let (index, count) = text.split_once('/').ok_or(BadShare::Form("text without /"))?;
        let number = |text: &str| text.parse().map_err(|_| BadShare::Form("text without two numbers"));
        Self::new(number(index)?, number(count)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(high: u16) -> FileId {
        FileId::from_bytes((u128::from(high) << 112 | 7).to_be_bytes())
    }

    #[test]
    fn each_file_is_in_one_share_of_every_number_of_them() {
        for bits in 0..=MAX_BITS {
            let shares = Shares::new(1 << bits).unwrap();
            let all: Vec<Share> = shares.all().collect();
            assert_eq!(all.len() as u32, shares.count());
            for high in (0..=u16::MAX).step_by(97) {
                let mine = shares.of(id(high));
                assert_eq!(u32::from(high) >> (16 - u32::from(bits)), mine.index());
                assert!(all.iter().all(|share| share.has(id(high)) == (*share == mine)));
                assert!(mine.first() <= id(high) && mine.before().is_none_or(|before| before < id(high)));
            }
            for (share, next) in all.iter().zip(&all[1..]) {
                assert!(share.has(next.before().unwrap()) && !share.has(next.first()));
            }
        }
    }

    #[test]
    fn shares_of_different_numbers_overlap_where_they_have_files_in_common() {
        for (one, other) in [(1, 16), (2, 4), (4, 4), (16, 256)] {
            for a in Shares::new(one).unwrap().all() {
                for b in Shares::new(other).unwrap().all() {
                    let common = (0..=u16::MAX).step_by(16).any(|high| a.has(id(high)) && b.has(id(high)));
                    assert_eq!((a.overlaps(b), b.overlaps(a)), (common, common), "{a} {b}");
                }
            }
        }
    }

    #[test]
    fn a_process_that_goes_leaves_the_others_what_they_had() {
        let names: Vec<String> = (0..5).map(|n| format!("aggregator-{n}")).collect();
        let owner = |share: Share, without: Option<&str>| {
            let there = names.iter().map(String::as_str).filter(|name| Some(*name) != without);
            share.rendezvous(there).unwrap().to_owned()
        };
        let shares: Vec<Share> = Shares::new(256).unwrap().all().collect();
        for gone in &names {
            let had = shares.iter().filter(|share| owner(**share, None) == *gone).count();
            assert!((25..80).contains(&had), "{gone} has {had} of 256");
            for share in shares.iter().filter(|share| owner(**share, None) != *gone) {
                assert_eq!(owner(*share, None), owner(*share, Some(gone)));
            }
        }
        assert_eq!(Share::WHOLE.rendezvous([]), None);
        assert!(Share::WHOLE.falls_to("a", true, []) && !Share::WHOLE.falls_to("a", false, []));
        assert!(Share::WHOLE.falls_to("a", false, ["a"]) && !Share::WHOLE.falls_to("a", true, ["b"]));
    }

    #[test]
    fn what_is_no_share_is_refused() {
        for count in [0, 3, 512, u32::MAX] {
            assert_eq!(Shares::new(count), Err(BadShare::Count(count)));
        }
        assert_eq!("3/16".parse(), Share::new(3, 16));
        assert_eq!("16/16".parse::<Share>(), Err(BadShare::Index { index: 16, count: 16 }));
        for text in ["", "3", "a/16", "3/x", "-1/2"] {
            assert!(matches!(text.parse::<Share>(), Err(BadShare::Form(_))), "{text}");
        }
        assert_eq!(Share::WHOLE.to_string(), "0/1");
    }
}
