//! What belongs to no file: the floor of generations, the aggregator's state, and which chunks are known to be damaged.
//!
//! Body in a [sealed](crate::sealed) envelope `SLB`:
//!
//! | bytes | field |
//! | --- | --- |
//! | 8 | version: the highest of the links counts |
//! | 8 | lowest generation of any file |
//! | 4 + n | state of the aggregator |
//! | 4 | number of files with damaged chunks, and for each: |
//! | 16 | file |
//! | 4, then 16 each | ranges of its chunks: start and end |

use std::collections::BTreeMap;

use sluice_engine::ids::{FileId, Generation};
use sluice_engine::limits::MAX_CHUNKS;
use sluice_engine::ranges::Ranges;

use crate::sealed::{self, FormatError, Reader, push_block};

const MAGIC: [u8; 4] = *b"SLB\x01";

/// The most ranges that are kept durably; what is beyond is known until the process ends, and found again later.
const MAX_RANGES: usize = 1 << 16;

/// What belongs to no file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Node {
    /// Lowest generation of any file.
    pub(crate) floor: Generation,
    /// State of the aggregator.
    pub(crate) state: Vec<u8>,
    /// Damaged chunks, by file.
    pub(crate) damage: BTreeMap<FileId, Ranges>,
}

/// The bytes of version `version`.
pub(crate) fn encode(version: u64, node: &Node) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    body.extend_from_slice(&node.floor.number().to_be_bytes());
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
    sealed::seal(MAGIC, &body)
}

/// Reads a link: its version, and what it says.
pub(crate) fn decode(bytes: &[u8]) -> Result<(u64, Node), FormatError> {
    let mut body = Reader(sealed::unseal(MAGIC, bytes)?);
    let version = body.u64()?;
    let mut node =
        Node { floor: Generation::new(body.u64()?), state: body.block()?.to_vec(), ..Node::default() };
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
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let mut node = Node { floor: Generation::new(2), state: b"state".to_vec(), ..Node::default() };
        node.damage.entry(FileId::from_bytes([1; 16])).or_default().insert(3..5);
        let bytes = encode(7, &node);
        let mut expected = b"SLB\x01\0\0\0\x41".to_vec();
        expected.extend_from_slice(b"\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\x02\0\0\0\x05state\0\0\0\x01");
        expected.extend_from_slice(&[1; 16]);
        expected.extend_from_slice(b"\0\0\0\x01\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x05");
        assert_eq!(bytes[..expected.len()], expected);
        assert_eq!(decode(&bytes), Ok((7, node)));
    }

    proptest! {
        #[test]
        fn round_trips(version: u64, floor: u64, state: Vec<u8>,
                       all in prop::collection::btree_map(any::<[u8; 16]>(),
                       prop::collection::vec((0..1u64 << 30, 1..9u64), 1..9), 0..9)) {
            let mut node = Node { floor: Generation::new(floor), state, ..Node::default() };
            for (file, ranges) in all {
                for (start, len) in ranges {
                    node.damage.entry(FileId::from_bytes(file)).or_default().insert(start..start + len);
                }
            }
            prop_assert_eq!(decode(&encode(version, &node)), Ok((version, node)));
        }
    }
}
