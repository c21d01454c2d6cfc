//! A run: a part of the log's index, sorted by key, never changed. Made again from the log when it is lost.
//!
//! Blocks of some 4 KiB, one after the other; then the footer; then 8 bytes that say where the footer is. Blocks and
//! footer are bodies in [sealed] envelopes `SLT` and `SLE`:
//!
//! | bytes | field of a block |
//! | --- | --- |
//! | 16 + 8 | volume, number of the run |
//! | 25, then 2 + n, each | key; 0 if it is gone, or one more than the length of its value, and the value |
//!
//! | bytes | field of the footer |
//! | --- | --- |
//! | 16 + 8 | volume, number of the run |
//! | 8 | number of entries |
//! | 4, then 25 + 8 + 4 each | blocks: first key, offset, length |
//!
//! A key is a kind and 24 bytes: 0 and a file, padded with zeros, for [where its newest record is](super::index), or 1,
//! a tenant and a client's UUID, for what lists tell.

use std::io;
use std::sync::Arc;

use crate::fs::disk::DiskFile;
use crate::fs::volume::VolumeId;
use crate::sealed::{self, FormatError, Reader};

const BLOCK_MAGIC: [u8; 4] = *b"SLT\x01";
const FOOTER_MAGIC: [u8; 4] = *b"SLE\x01";

/// Bytes of entries after which a block ends.
const BLOCK_LEN: usize = 4096;

/// Bytes that are written at once.
const WRITE_LEN: usize = 1 << 20;

/// What entries are sorted by.
pub(crate) type Key = [u8; 25];

/// What a key says; `None` if it says nothing any more.
pub(crate) type Value = Option<Box<[u8]>>;

/// The first key of a block, where it is, and its length.
type BlockAt = (Key, u64, u32);

/// Why a run cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// The disk refuses.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is damaged.
    #[error("run {number}: {error}")]
    Format {
        /// Which run.
        number: u64,
        /// What is wrong.
        error: FormatError,
    },
}

/// A run that is open.
#[derive(Debug)]
pub(crate) struct Run {
    volume: VolumeId,
    pub(crate) number: u64,
    pub(crate) entries: u64,
    file: Arc<dyn DiskFile>,
    /// The first key, place and length of each block: some 0.6 bytes an entry.
    blocks: Vec<BlockAt>,
}

/// Writes a run, entry by entry in order of their keys.
pub(crate) struct Writer {
    volume: VolumeId,
    number: u64,
    entries: u64,
    file: Arc<dyn DiskFile>,
    blocks: Vec<BlockAt>,
    block: Vec<u8>,
    first: Option<Key>,
    out: Vec<u8>,
    written: u64,
}

impl Writer {
    pub(crate) fn new(volume: VolumeId, number: u64, file: Arc<dyn DiskFile>) -> Self {
        Self {
            volume,
            number,
            entries: 0,
            file,
            blocks: Vec::new(),
            block: Vec::new(),
            first: None,
            out: Vec::new(),
            written: 0,
        }
    }

    pub(crate) fn push(&mut self, key: &Key, value: Option<&[u8]>) -> io::Result<()> {
        if self.block.is_empty() {
            self.block.extend_from_slice(&self.volume.0);
            self.block.extend_from_slice(&self.number.to_be_bytes());
            self.first = Some(*key);
        }
        self.block.extend_from_slice(key);
        let len = value.map_or(0, |value| value.len() as u16 + 1);
        self.block.extend_from_slice(&len.to_be_bytes());
        self.block.extend_from_slice(value.unwrap_or_default());
        self.entries += 1;
        if self.block.len() >= BLOCK_LEN { self.end_block() } else { Ok(()) }
    }

    fn end_block(&mut self) -> io::Result<()> {
        let Some(first) = self.first.take() else { return Ok(()) };
        let sealed = sealed::seal(BLOCK_MAGIC, &self.block);
        self.block.clear();
        self.blocks.push((first, self.written + self.out.len() as u64, sealed.len() as u32));
        self.out.extend_from_slice(&sealed);
        if self.out.len() >= WRITE_LEN { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.write_at(self.written, &self.out)?;
        self.written += self.out.len() as u64;
        self.out.clear();
        Ok(())
    }

    /// Ends the run. What was written is not synced yet.
    pub(crate) fn finish(mut self) -> io::Result<Run> {
        self.end_block()?;
        let mut footer = Vec::with_capacity(36 + 37 * self.blocks.len());
        footer.extend_from_slice(&self.volume.0);
        footer.extend_from_slice(&self.number.to_be_bytes());
        footer.extend_from_slice(&self.entries.to_be_bytes());
        footer.extend_from_slice(&(self.blocks.len() as u32).to_be_bytes());
        for (first, offset, len) in &self.blocks {
            footer.extend_from_slice(first);
            footer.extend_from_slice(&offset.to_be_bytes());
            footer.extend_from_slice(&len.to_be_bytes());
        }
        let at = self.written + self.out.len() as u64;
        self.out.extend_from_slice(&sealed::seal(FOOTER_MAGIC, &footer));
        self.out.extend_from_slice(&at.to_be_bytes());
        self.write()?;
        let Self { volume, number, entries, file, blocks, .. } = self;
        Ok(Run { volume, number, entries, file, blocks })
    }
}

impl Run {
    /// Opens a run by its footer.
    pub(crate) fn open(volume: VolumeId, number: u64, file: Arc<dyn DiskFile>) -> Result<Self, RunError> {
        let format = |error| RunError::Format { number, error };
        let len = file.length()?;
        let at = len.checked_sub(8).ok_or(format(FormatError::CutShort))?;
        let mut trailer = [0; 8];
        let read = file.read_at(at, 8)?;
        trailer.get_mut(..read.len()).ok_or(format(FormatError::CutShort))?.copy_from_slice(&read);
        let from = u64::from_be_bytes(trailer);
        let footer_len = at.checked_sub(from).ok_or(format(FormatError::CutShort))?;
        let bytes = file.read_at(from, footer_len as usize)?;
        let (entries, blocks) = Self::footer(volume, number, &bytes).map_err(format)?;
        Ok(Self { volume, number, entries, file, blocks })
    }

    fn footer(volume: VolumeId, number: u64, bytes: &[u8]) -> Result<(u64, Vec<BlockAt>), FormatError> {
        let mut body = Reader(sealed::unseal(FOOTER_MAGIC, bytes)?);
        if body.array()? != volume.0 || body.u64()? != number {
            return Err(FormatError::Misplaced("run"));
        }
        let (entries, count) = (body.u64()?, body.u32()?);
        let blocks = (0..count).map(|_| Ok((body.array()?, body.u64()?, body.u32()?)));
        let blocks = blocks.collect::<Result<_, FormatError>>()?;
        body.end()?;
        Ok((entries, blocks))
    }

    /// The entries of a block.
    fn block(&self, index: usize) -> Result<Vec<(Key, Value)>, RunError> {
        let Some((_, offset, len)) = self.blocks.get(index) else { return Ok(Vec::new()) };
        let bytes = self.file.read_at(*offset, *len as usize)?;
        let format = |error| RunError::Format { number: self.number, error };
        self.entries_of(&bytes).map_err(format)
    }

    fn entries_of(&self, bytes: &[u8]) -> Result<Vec<(Key, Value)>, FormatError> {
        let mut body = Reader(sealed::unseal(BLOCK_MAGIC, bytes)?);
        if body.array()? != self.volume.0 || body.u64()? != self.number {
            return Err(FormatError::Misplaced("run"));
        }
        let mut entries = Vec::new();
        while !body.0.is_empty() {
            let key = body.array()?;
            let len = usize::from(u16::from_be_bytes(body.array()?));
            let value = match len.checked_sub(1) {
                Some(len) => Some(Box::from(body.bytes(len)?)),
                None => None,
            };
            entries.push((key, value));
        }
        Ok(entries)
    }

    /// What this run says of a key: `None` if nothing, `Some(None)` that it is gone.
    pub(crate) fn get(&self, key: &Key) -> Result<Option<Value>, RunError> {
        let after = self.blocks.partition_point(|(first, ..)| first <= key);
        let Some(index) = after.checked_sub(1) else { return Ok(None) };
        let mut entries = self.block(index)?;
        Ok(entries.binary_search_by(|(at, _)| at.cmp(key)).ok().map(|at| entries.swap_remove(at).1))
    }

    /// The entries from `from` on, in order.
    pub(crate) fn from(self: &Arc<Self>, from: &Key) -> Result<Cursor, RunError> {
        let after = self.blocks.partition_point(|(first, ..)| first <= from);
        let block = after.saturating_sub(1);
        let mut cursor = Cursor { run: self.clone(), block, entries: Vec::new().into_iter(), head: None };
        cursor.advance()?;
        while cursor.head.as_ref().is_some_and(|(key, _)| key < from) {
            cursor.advance()?;
        }
        Ok(cursor)
    }
}

/// A place in a run.
pub(crate) struct Cursor {
    run: Arc<Run>,
    /// The next block.
    block: usize,
    entries: std::vec::IntoIter<(Key, Value)>,
    /// The entry at this place.
    pub(crate) head: Option<(Key, Value)>,
}

impl Cursor {
    /// Goes to the next entry.
    pub(crate) fn advance(&mut self) -> Result<(), RunError> {
        self.head = self.entries.next();
        while self.head.is_none() && self.block < self.run.blocks.len() {
            self.entries = self.run.block(self.block)?.into_iter();
            self.block += 1;
            self.head = self.entries.next();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::disk::{Disk, Open, RealDisk};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const VOLUME: VolumeId = VolumeId([7; 16]);

    fn key(n: u32) -> Key {
        let mut key = [0; 25];
        key[1..5].copy_from_slice(&n.to_be_bytes());
        key
    }

    fn made(entries: &BTreeMap<u32, Option<Vec<u8>>>) -> (tempfile::TempDir, Arc<dyn DiskFile>, Arc<Run>) {
        let dir = tempfile::tempdir().unwrap();
        let file = RealDisk.open(&dir.path().join("run-3"), Open::Create).unwrap();
        let mut writer = Writer::new(VOLUME, 3, file.clone());
        for (n, value) in entries {
            writer.push(&key(*n), value.as_deref()).unwrap();
        }
        let run = Arc::new(writer.finish().unwrap());
        (dir, file, run)
    }

    #[test]
    fn golden_bytes() {
        let (_dir, file, _) = made(&[(1, Some(b"one".to_vec())), (2, None)].into());
        let bytes = file.read_at(0, 1 << 20).unwrap();
        assert_eq!(bytes[..8], *b"SLT\x01\0\0\0\x51");
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "2d6469eb2b5097adf0307e0b05489b6fe065a064b7b61a2cfde1bed9e5f65421"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_goes_in_comes_out(
            entries in prop::collection::btree_map(0..3000u32, prop::option::of(prop::collection::vec(any::<u8>(), 0..60)), 0..600),
            asked in prop::collection::vec(0..3100u32, 20), at in any::<prop::sample::Index>(),
        ) {
            let (_dir, file, run) = made(&entries);
            let opened = Arc::new(Run::open(VOLUME, 3, file.clone()).unwrap());
            prop_assert_eq!(&opened.blocks, &run.blocks);
            prop_assert_eq!(opened.entries, entries.len() as u64);
            for n in asked {
                let found = opened.get(&key(n)).unwrap().map(|value| value.map(Vec::from));
                prop_assert_eq!(found, entries.get(&n).cloned());
                let mut cursor = opened.from(&key(n)).unwrap();
                for (m, value) in entries.range(n..) {
                    let (at, found) = cursor.head.clone().unwrap();
                    prop_assert_eq!((at, found.map(Vec::from)), (key(*m), value.clone()));
                    cursor.advance().unwrap();
                }
                prop_assert!(cursor.head.is_none());
            }
            prop_assert!(Run::open(VOLUME, 4, file.clone()).is_err());
            // No flipped byte is read as something else.
            let len = file.length().unwrap();
            let at = at.index(len as usize) as u64;
            let byte = file.read_at(at, 1).unwrap()[0];
            file.write_at(at, &[byte ^ 4]).unwrap();
            if let Ok(run) = Run::open(VOLUME, 3, file) {
                for (n, value) in &entries {
                    if let Ok(found) = run.get(&key(*n)) {
                        prop_assert_eq!(found.map(|value| value.map(Vec::from)), Some(value.clone()));
                    }
                }
            }
        }
    }
}
