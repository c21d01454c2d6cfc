//! What is known to be damaged: chunks whose bytes did not hash to their value when the device was asked, or that it
//! does not give back at all. Never served, never confirmed to anyone, until they are written again or verified.
//!
//! Marks are few and change rarely, so they are one file, replaced as a whole. A mark that outlives its damage (a crash
//! came before the file was replaced) costs a verification, which takes it back. The table is the store's; nothing of
//! it runs by itself.
//!
//! Body in a [sealed] envelope `SLD`:
//!
//! | bytes | field |
//! | --- | --- |
//! | 16 | volume |
//! | 4 | number of files, and for each: |
//! | 16 | file |
//! | 4, then 16 each | ranges of its chunks: start and end |

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use sluice_engine::ids::FileId;
use sluice_engine::limits::MAX_CHUNKS;
use sluice_engine::ranges::Ranges;

use super::gate::{GatedDisk, ReplaceError};
use super::lock;
use super::volume::VolumeId;
use crate::sealed::{self, FormatError, Reader};

const MAGIC: [u8; 4] = *b"SLD\x01";

/// The most ranges that are kept on disk; what is beyond is known until the process ends, and found again later.
const MAX_RANGES: usize = 1 << 16;

/// Damaged chunks, by file.
pub(crate) type Marks = BTreeMap<FileId, Ranges>;

/// The table of a volume.
#[derive(Debug)]
pub(crate) struct Damage {
    volume: VolumeId,
    /// Never held across a disk operation.
    marks: Mutex<Marks>,
    /// Orders whoever replaces the file.
    writing: Mutex<()>,
}

impl Damage {
    pub(crate) fn new(volume: VolumeId, marks: Marks) -> Self {
        Self { volume, marks: Mutex::new(marks), writing: Mutex::new(()) }
    }

    /// Whether a chunk is damaged.
    pub(crate) fn has(&self, file: FileId, chunk: u64) -> bool {
        lock(&self.marks).get(&file).is_some_and(|marks| marks.covers(chunk..chunk + 1))
    }

    /// The damaged chunks of a file.
    pub(crate) fn of(&self, file: FileId) -> Vec<Range<u64>> {
        lock(&self.marks).get(&file).map(|marks| marks.iter().collect()).unwrap_or_default()
    }

    /// Files with damaged chunks.
    pub(crate) fn files(&self) -> Vec<FileId> {
        lock(&self.marks).keys().copied().collect()
    }

    /// Marks a chunk; whether it was not marked before.
    pub(crate) fn mark(&self, file: FileId, chunk: u64) -> bool {
        let mut marks = lock(&self.marks);
        let of_file = marks.entry(file).or_default();
        let is_new = !of_file.covers(chunk..chunk + 1);
        of_file.insert(chunk..chunk + 1);
        is_new
    }

    /// Takes marks back; whether there were any.
    pub(crate) fn clear(&self, file: FileId, chunks: impl IntoIterator<Item = u64>) -> bool {
        let mut marks = lock(&self.marks);
        let Some(of_file) = marks.get_mut(&file) else { return false };
        let mut changed = false;
        for chunk in chunks {
            changed |= of_file.covers(chunk..chunk + 1);
            of_file.remove(chunk..chunk + 1);
        }
        if of_file.is_empty() {
            marks.remove(&file);
        }
        changed
    }

    /// Takes all marks of a file back; whether there were any.
    pub(crate) fn clear_all(&self, file: FileId) -> bool {
        lock(&self.marks).remove(&file).is_some()
    }

    /// Makes the marks durable at `path`, as they are now. Blocks.
    pub(crate) fn keep(&self, disk: &GatedDisk, path: &Path) -> io::Result<()> {
        let _writing = lock(&self.writing);
        let marks = lock(&self.marks).clone();
        if marks.is_empty() {
            match disk.remove_file(path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            }
        } else {
            disk.replace(path, &encode(self.volume, &marks)).map_err(|error| match error {
                ReplaceError::Write(error) | ReplaceError::Sync(error) => error,
            })?;
        }
        path.parent().map_or(Ok(()), |dir| disk.sync_dir(dir))
    }
}

/// The bytes of the file.
fn encode(volume: VolumeId, marks: &Marks) -> Vec<u8> {
    let mut left = MAX_RANGES;
    let mut body = volume.0.to_vec();
    let at = body.len();
    let mut files = 0u32;
    body.extend_from_slice(&[0; 4]);
    for (file, ranges) in marks {
        let kept: Vec<Range<u64>> = ranges.iter().take(left).collect();
        if kept.is_empty() {
            break;
        }
        left -= kept.len();
        files += 1;
        body.extend_from_slice(file.as_bytes());
        body.extend_from_slice(&(kept.len() as u32).to_be_bytes());
        for range in kept {
            body.extend_from_slice(&range.start.to_be_bytes());
            body.extend_from_slice(&range.end.to_be_bytes());
        }
    }
    body[at..at + 4].copy_from_slice(&files.to_be_bytes());
    sealed::seal(MAGIC, &body)
}

/// Reads the file.
pub(crate) fn decode(volume: VolumeId, bytes: &[u8]) -> Result<Marks, FormatError> {
    let mut body = Reader(sealed::unseal(MAGIC, bytes)?);
    if body.array()? != volume.0 {
        return Err(FormatError::Misplaced("volume"));
    }
    let mut marks = Marks::new();
    for _ in 0..body.u32()? {
        let file = FileId::from_bytes(body.array()?);
        let ranges: &mut Ranges = marks.entry(file).or_default();
        for _ in 0..body.u32()? {
            let (start, end) = (body.u64()?, body.u64()?);
            if start >= end || end > MAX_CHUNKS {
                return Err(FormatError::Impossible("range of chunks"));
            }
            ranges.insert(start..end);
        }
    }
    body.end()?;
    Ok(marks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOLUME: VolumeId = VolumeId([7; 16]);
    const FILE: FileId = FileId::from_bytes([1; 16]);

    #[test]
    fn golden_bytes() {
        let damage = Damage::new(VOLUME, Marks::new());
        assert!(damage.mark(FILE, 3) && damage.mark(FILE, 4) && !damage.mark(FILE, 3));
        let bytes = encode(VOLUME, &lock(&damage.marks));
        assert_eq!(bytes[..8], *b"SLD\x01\0\0\0\x38");
        assert_eq!(bytes[24..28], *b"\0\0\0\x01");
        assert_eq!(bytes[44..64], *b"\0\0\0\x01\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x05");
        assert_eq!(decode(VolumeId([8; 16]), &bytes), Err(FormatError::Misplaced("volume")));
    }

    #[test]
    fn marks_come_and_go() {
        let damage = Damage::new(VOLUME, Marks::new());
        assert!(damage.mark(FILE, 3) && damage.mark(FILE, 9));
        assert!(damage.has(FILE, 3) && !damage.has(FILE, 4));
        assert!(damage.clear(FILE, [3, 4]) && !damage.clear(FILE, [3]));
        assert_eq!((damage.of(FILE).first(), damage.files()), (Some(&(9..10)), vec![FILE]));
        assert!(damage.clear_all(FILE) && !damage.clear_all(FILE));
        assert!(damage.files().is_empty());
    }

    proptest! {
        #[test]
        fn round_trips(all in prop::collection::btree_map(any::<[u8; 16]>(),
                       prop::collection::vec((0..1u64 << 30, 1..9u64), 1..9), 0..9)) {
            let mut marks = Marks::new();
            for (file, ranges) in all {
                for (start, len) in ranges {
                    marks.entry(FileId::from_bytes(file)).or_default().insert(start..start + len);
                }
            }
            prop_assert_eq!(decode(VOLUME, &encode(VOLUME, &marks)), Ok(marks));
        }
    }
}
