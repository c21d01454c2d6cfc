//! What belongs to no file: the floors of generations, the state of [`Share::WHOLE`], and which chunks are known to be
//! damaged. States of other shares are [objects of their own](super::states), so that shares do not wait for each other.
//!
//! Body in a [sealed](crate::sealed) envelope `SLB`. Of version 1, which had nothing of any other share:
//!
//! | bytes | field |
//! | --- | --- |
//! | 8 | version: the highest of the links counts |
//! | 8 | lowest generation of any file |
//! | 4 + n | state |
//! | 4 | number of files with damaged chunks, and for each: |
//! | 16 | file |
//! | 4, then 16 each | ranges of its chunks: start and end |
//!
//! Since version 2 there is in place of the second field:
//!
//! | bytes | field |
//! | --- | --- |
//! | 2, then 10 each | [shares](crate::share) with the lowest generation of any of their files |
//! | 2, then 2 each | shares whose states are objects of their own |
//!
//! Version 3 looks the same, and says that keys of runs have an epoch: what knows only the versions before would not find
//! them. It is written when a bucket without is opened.

use std::collections::{BTreeMap, BTreeSet};

use sluice_engine::ids::{FileId, Generation};
use sluice_engine::limits::MAX_CHUNKS;
use sluice_engine::ranges::Ranges;
use sluice_engine::share::Share;

use crate::sealed::{self, FormatError, Reader, push_block};
use crate::share::{self, Floors};

const WHOLE: [u8; 4] = *b"SLB\x01";
const SHARES: [u8; 4] = *b"SLB\x02";
const EPOCHS: [u8; 4] = *b"SLB\x03";

/// The most ranges that are kept durably; what is beyond is known until the process ends, and found again later.
const MAX_RANGES: usize = 1 << 16;

/// What belongs to no file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Node {
    /// Lowest generations of files.
    pub(crate) floors: Floors,
    /// State of [`Share::WHOLE`].
    pub(crate) state: Vec<u8>,
    /// Shares whose states are objects of their own. Each is noted here before its first object is put, so that opening
    /// needs no list.
    pub(crate) shares: BTreeSet<Share>,
    /// Damaged chunks, by file.
    pub(crate) damage: BTreeMap<FileId, Ranges>,
}

/// The bytes of version `version`.
pub(crate) fn encode(version: u64, node: &Node) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    node.floors.encode(&mut body);
    share::push_all(&mut body, node.shares.iter().map(|share| (share, ())), |_, ()| {});
    push_block(&mut body, &node.state);
    let mut left = MAX_RANGES;
    let mut files: Vec<(FileId, Vec<_>)> = Vec::new();
    for (file, ranges) in &node.damage {
        let kept: Vec<_> = ranges.iter().take(left).collect();
        left -= kept.len();
        if !kept.is_empty() {
            files.push((*file, kept));
        }
    }
    body.extend_from_slice(&(files.len() as u32).to_be_bytes());
    for (file, ranges) in files {
        body.extend_from_slice(file.as_bytes());
        body.extend_from_slice(&(ranges.len() as u32).to_be_bytes());
        for range in ranges {
            body.extend_from_slice(&range.start.to_be_bytes());
            body.extend_from_slice(&range.end.to_be_bytes());
        }
    }
    sealed::seal(EPOCHS, &body)
}

/// Whether those who wrote it knew that keys of runs have an epoch.
pub(crate) fn has_epochs(bytes: &[u8]) -> bool {
    bytes.starts_with(&EPOCHS)
}

/// Reads a link: its version, and what it says.
pub(crate) fn decode(bytes: &[u8]) -> Result<(u64, Node), FormatError> {
    let magic = [WHOLE, SHARES].into_iter().find(|magic| bytes.starts_with(magic)).unwrap_or(EPOCHS);
    let mut body = Reader(sealed::unseal(magic, bytes)?);
    let version = body.u64()?;
    let (floors, shares) = if magic == WHOLE {
        (Floors::of_whole(Generation::new(body.u64()?)), BTreeSet::new())
    } else {
        (Floors::decode(&mut body)?, share::read_all(&mut body, |_| Ok(()))?.into_keys().collect())
    };
    if shares.contains(&Share::WHOLE) {
        return Err(FormatError::Impossible("share"));
    }
    let mut node = Node { floors, state: body.block()?.to_vec(), shares, ..Node::default() };
    for _ in 0..body.u32()? {
        let file = FileId::from_bytes(body.array()?);
        let ranges: &mut Ranges = node.damage.entry(file).or_default();
        for _ in 0..body.u32()? {
            let (start, end) = (body.u64()?, body.u64()?);
            if start >= end || end > MAX_CHUNKS {
                return Err(FormatError::Impossible("range of chunks"));
            }
            ranges.insert(start..end);
        }
    }
    body.end()?;
    Ok((version, node))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::share::tests::{floors, share};
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let floors = Floors::of_whole(Generation::new(2));
        let mut node = Node { floors, state: b"state".to_vec(), ..Node::default() };
        node.damage.entry(FileId::from_bytes([1; 16])).or_default().insert(3..5);
        let mut expected = b"SLB\x01\0\0\0\x41".to_vec();
        expected.extend_from_slice(b"\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\x02\0\0\0\x05state\0\0\0\x01");
        expected.extend_from_slice(&[1; 16]);
        expected.extend_from_slice(b"\0\0\0\x01\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x05");
        assert_eq!(decode(&sealed::seal(WHOLE, &expected[8..])), Ok((7, node.clone())));

        node.shares.insert(Share::new(3, 16).unwrap());
        let mut body = b"\0\0\0\0\0\0\0\x07\0\x01\0\0\0\0\0\0\0\0\0\x02\0\x01\x04\x03".to_vec();
        body.extend_from_slice(&expected[24..]);
        assert_eq!(encode(7, &node), sealed::seal(*b"SLB\x03", &body));
        for magic in [SHARES, EPOCHS] {
            assert_eq!(decode(&sealed::seal(magic, &body)).as_ref(), Ok(&(7, node.clone())));
        }
        let mut whole = 7u64.to_be_bytes().to_vec();
        whole.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(decode(&sealed::seal(SHARES, &whole)), Err(FormatError::Impossible("share")));
    }

    proptest! {
        #[test]
        fn round_trips(version: u64, floors in floors(), state: Vec<u8>,
                       shares in prop::collection::btree_set(share(), 0..9),
                       all in prop::collection::btree_map(any::<[u8; 16]>(),
                       prop::collection::vec((0..1u64 << 30, 1..9u64), 1..9), 0..9)) {
            let shares = shares.into_iter().filter(|share| *share != Share::WHOLE).collect();
            let mut node = Node { floors, state, shares, ..Node::default() };
            for (file, ranges) in all {
                for (start, len) in ranges {
                    node.damage.entry(FileId::from_bytes(file)).or_default().insert(start..start + len);
                }
            }
            prop_assert_eq!(decode(&encode(version, &node)), Ok((version, node)));
        }
    }
}
