//! The log's index: where the newest record of each file is, and what lists tell of it.
//!
//! The newest entries are in memory; once they are many they are frozen and written as a [run](super::run), and runs
//! of like size are merged, so that there are few however many files there are. What is asked for is sought in that
//! order: memory, frozen, runs from the newest on. All of it is a cache of the log (G5).

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock};

use sluice_engine::aggregator::Brief;
use sluice_engine::ids::{ClientFileId, FileId, TenantId};
use uuid::Uuid;

use super::manifest::Fill;
use super::record::Front;
use super::run::{Cursor, Key, Run, RunError, Value};
use crate::sealed::{FormatError, Reader};

/// Where the newest record of a file is, and its brief.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) segment: u64,
    pub(crate) offset: u32,
    /// Bytes before the file's.
    pub(crate) front_len: u32,
    /// Bytes of the whole record.
    pub(crate) len: u32,
    /// Whether the file's bytes are in it.
    pub(crate) whole: bool,
    pub(crate) brief: [u8; Brief::LEN],
}

impl Place {
    fn encode(&self) -> Box<[u8]> {
        let mut out = Vec::with_capacity(21 + Brief::LEN);
        out.extend_from_slice(&self.segment.to_be_bytes());
        for number in [self.offset, self.front_len, self.len] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        out.push(self.whole.into());
        out.extend_from_slice(&self.brief);
        out.into()
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader(bytes);
        let place = Self {
            segment: reader.u64()?,
            offset: reader.u32()?,
            front_len: reader.u32()?,
            len: reader.u32()?,
            whole: reader.u8()? != 0,
            brief: reader.array()?,
        };
        reader.end()?;
        Ok(place)
    }
}

/// What lists tell of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) client: ClientFileId,
    pub(crate) size: u64,
    pub(crate) brief: [u8; Brief::LEN],
    pub(crate) name: String,
}

fn key_of(file: FileId) -> Key {
    let mut key = [0; 25];
    key[1..17].copy_from_slice(file.as_bytes());
    key
}

fn listed_key(tenant: TenantId, client: ClientFileId) -> Key {
    let mut key = [1; 25];
    key[1..9].copy_from_slice(&tenant.number().to_be_bytes());
    key[9..].copy_from_slice(client.uuid().as_bytes());
    key
}

/// The key that comes next.
fn next(mut key: Key) -> Key {
    for byte in key.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            break;
        }
    }
    key
}

type Table = BTreeMap<Key, Value>;

/// A key, and what it says.
type Said = (Key, Box<[u8]>);

/// Entries on their way into a run.
#[derive(Clone, Debug)]
pub(crate) struct Frozen {
    pub(crate) table: Arc<Table>,
    /// Segment and offset in the log: all before is in here or in runs.
    pub(crate) covered: (u64, u64),
    pub(crate) segments: BTreeMap<u64, Fill>,
}

#[derive(Debug, Default)]
struct Levels {
    table: Table,
    frozen: Option<Frozen>,
    /// Newest first.
    runs: Vec<Arc<Run>>,
}

/// The index. Changed by the committer (and by recovery before it), except for runs, which are the keeper's.
#[derive(Debug, Default)]
pub(crate) struct Index(RwLock<Levels>);

impl Index {
    fn read<T>(&self, read: impl FnOnce(&Levels) -> T) -> T {
        read(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, write: impl FnOnce(&mut Levels) -> T) -> T {
        write(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn get(&self, key: &Key) -> Result<Option<Box<[u8]>>, RunError> {
        let (found, runs) = self.read(|levels| {
            let frozen = || levels.frozen.as_ref().and_then(|frozen| frozen.table.get(key));
            match levels.table.get(key).or_else(frozen) {
                Some(value) => (Some(value.clone()), Vec::new()),
                None => (None, levels.runs.clone()),
            }
        });
        if let Some(value) = found {
            return Ok(value);
        }
        for run in runs {
            if let Some(value) = run.get(key)? {
                return Ok(value);
            }
        }
        Ok(None)
    }

    /// Where the newest record of a file is.
    pub(crate) fn place(&self, file: FileId) -> Result<Option<Place>, RunError> {
        let Some(value) = self.get(&key_of(file))? else { return Ok(None) };
        Place::decode(&value).map(Some).map_err(|error| RunError::Format { number: 0, error })
    }

    /// Takes a record that is durable at a place.
    pub(crate) fn insert(&self, front: &Front, place: &Place) {
        let listed = front.client.map(|client| {
            let entry = front.record.as_ref().map(|record| {
                let size = record.geometry().map_or(0, |shape| shape.size());
                let mut value = size.to_be_bytes().to_vec();
                value.extend_from_slice(&place.brief);
                value.extend_from_slice(record.name().as_bytes());
                Box::from(value)
            });
            (listed_key(front.tenant, client), entry)
        });
        self.write(|levels| {
            levels.table.insert(key_of(front.file), Some(place.encode()));
            levels.table.extend(listed);
        });
    }

    /// A record was moved.
    pub(crate) fn moved(&self, file: FileId, place: &Place) {
        self.write(|levels| levels.table.insert(key_of(file), Some(place.encode())));
    }

    /// Up to `limit` files after `after`, in order.
    pub(crate) fn files(
        &self,
        after: Option<FileId>,
        limit: usize,
    ) -> Result<Vec<(FileId, Place)>, RunError> {
        let from = after.map_or([0; 25], |after| next(key_of(after)));
        let found = self.scan(from, listed_key(TenantId::new(0), ClientFileId::new(Uuid::nil())), limit)?;
        let file = |(key, value): Said| {
            let mut id = [0; 16];
            id.copy_from_slice(&key[1..17]);
            Ok((FileId::from_bytes(id), Place::decode(&value)?))
        };
        let found: Result<_, FormatError> = found.into_iter().map(file).collect();
        found.map_err(|error| RunError::Format { number: 0, error })
    }

    /// Up to `limit` files of a tenant with ids above `after`, in order of the client's id.
    pub(crate) fn listed(
        &self,
        tenant: TenantId,
        after: Option<ClientFileId>,
        limit: usize,
    ) -> Result<Vec<Entry>, RunError> {
        let nil = ClientFileId::new(Uuid::nil());
        let from = after.map_or(listed_key(tenant, nil), |after| next(listed_key(tenant, after)));
        let to = next(listed_key(tenant, ClientFileId::new(Uuid::max())));
        let entry = |(key, value): Said| {
            let mut id = [0; 16];
            id.copy_from_slice(&key[9..]);
            let mut reader = Reader(&value);
            let (size, brief) = (reader.u64()?, reader.array()?);
            let name = String::from_utf8(reader.0.to_vec()).map_err(|_| FormatError::Impossible("name"))?;
            Ok(Entry { client: ClientFileId::new(Uuid::from_bytes(id)), size, brief, name })
        };
        let found: Result<_, FormatError> = self.scan(from, to, limit)?.into_iter().map(entry).collect();
        found.map_err(|error| RunError::Format { number: 0, error })
    }

    /// Up to `limit` entries from `from` up to, and without, `to`.
    fn scan(&self, mut from: Key, to: Key, limit: usize) -> Result<Vec<Said>, RunError> {
        let mut found = Vec::new();
        while found.len() < limit && from < to {
            // Of what is in memory only so much is copied at a time; what comes after the last key that was copied
            // is left to the next turn.
            let turn = (limit - found.len()).max(64);
            let range = (Bound::Included(from), Bound::Excluded(to));
            let copy = |table: &Table| -> Vec<(Key, Value)> {
                table.range(range).take(turn).map(|(key, value)| (*key, value.clone())).collect()
            };
            let (table, frozen, runs) = self.read(|levels| {
                let frozen = levels.frozen.as_ref().map(|frozen| copy(&frozen.table)).unwrap_or_default();
                (copy(&levels.table), frozen, levels.runs.clone())
            });
            let last = |copied: &[(Key, Value)]| {
                copied.last().filter(|_| copied.len() == turn).map(|(key, _)| next(*key))
            };
            let end = [last(&table), last(&frozen)].into_iter().flatten().min().unwrap_or(to).min(to);
            let mut merged = Merge::new(vec![table, frozen], &runs, &from)?;
            while let Some((key, value)) = merged.next()? {
                if key >= end {
                    break;
                }
                if let Some(value) = value {
                    found.push((key, value));
                    if found.len() == limit {
                        return Ok(found);
                    }
                }
            }
            from = end;
        }
        Ok(found)
    }

    /// Number of entries in memory that are not frozen.
    pub(crate) fn len(&self) -> usize {
        self.read(|levels| levels.table.len())
    }

    /// Freezes the entries in memory, unless some are frozen already; whether it did.
    pub(crate) fn freeze(&self, covered: (u64, u64), segments: impl FnOnce() -> BTreeMap<u64, Fill>) -> bool {
        self.write(|levels| {
            if levels.frozen.is_some() || levels.table.is_empty() {
                return false;
            }
            let table = Arc::new(std::mem::take(&mut levels.table));
            levels.frozen = Some(Frozen { table, covered, segments: segments() });
            true
        })
    }

    /// What is frozen, and the runs.
    pub(crate) fn frozen(&self) -> (Option<Frozen>, Vec<Arc<Run>>) {
        self.read(|levels| (levels.frozen.clone(), levels.runs.clone()))
    }

    /// Puts runs in force, which hold all that was frozen.
    pub(crate) fn thaw(&self, runs: Vec<Arc<Run>>) {
        self.write(|levels| {
            levels.runs = runs;
            levels.frozen = None;
        });
    }
}

/// Entries of several sources in order; of equal keys the one of the first source.
pub(crate) struct Merge {
    tables: Vec<std::iter::Peekable<std::vec::IntoIter<(Key, Value)>>>,
    cursors: Vec<Cursor>,
}

impl Merge {
    /// Tables and runs, each newest first; any table is newer than any run.
    pub(crate) fn new(
        tables: Vec<Vec<(Key, Value)>>,
        runs: &[Arc<Run>],
        from: &Key,
    ) -> Result<Self, RunError> {
        let cursors = runs.iter().map(|run| run.from(from)).collect::<Result<_, _>>()?;
        Ok(Self { tables: tables.into_iter().map(|table| table.into_iter().peekable()).collect(), cursors })
    }

    pub(crate) fn next(&mut self) -> Result<Option<(Key, Value)>, RunError> {
        let heads = self.tables.iter_mut().filter_map(|table| table.peek().map(|(key, _)| *key));
        let others = self.cursors.iter().filter_map(|cursor| cursor.head.as_ref().map(|(key, _)| *key));
        let Some(key) = heads.chain(others).min() else { return Ok(None) };
        let mut newest = None;
        for table in &mut self.tables {
            if let Some((_, value)) = table.next_if(|(at, _)| *at == key) {
                newest.get_or_insert(value);
            }
        }
        for cursor in &mut self.cursors {
            if let Some((_, value)) = cursor.head.take_if(|(at, _)| *at == key) {
                newest.get_or_insert(value);
                cursor.advance()?;
            }
        }
        Ok(newest.map(|value| (key, value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::disk::{Disk, Open, RealDisk};
    use crate::fs::log::record::tests::{VOLUME, whole};
    use crate::fs::log::run::Writer;
    use proptest::prelude::*;

    fn place(offset: u32) -> Place {
        Place { segment: 1, offset, front_len: 3, len: 4, whole: true, brief: [5; Brief::LEN] }
    }

    fn front(n: u128, gone: bool) -> Front {
        let mut bytes = Vec::new();
        whole(n, b"x").encode(VOLUME, &mut bytes);
        let front = Front::decode(VOLUME, &bytes).unwrap();
        if gone { Front { record: None, seal: None, ..front } } else { front }
    }

    #[test]
    fn golden_values() {
        let bytes = place(2).encode();
        assert_eq!(bytes[..21], *b"\0\0\0\0\0\0\0\x01\0\0\0\x02\0\0\0\x03\0\0\0\x04\x01");
        assert_eq!(Place::decode(&bytes), Ok(place(2)));
        assert_eq!(next([255; 25]), [0; 25]);
        assert_eq!(next([0; 25])[24], 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn it_says_what_a_map_would(steps in prop::collection::vec((0..80u128, any::<bool>(), 0..20u8), 0..300)) {
            let dir = tempfile::tempdir().unwrap();
            let index = Index::default();
            let mut files: BTreeMap<FileId, u32> = BTreeMap::new();
            let mut listed: BTreeMap<ClientFileId, u32> = BTreeMap::new();
            let mut next_run = 0;
            for (at, (n, gone, turn)) in (0u32..).zip(steps) {
                let front = front(n, gone);
                index.insert(&front, &place(at));
                files.insert(front.file, at);
                match gone {
                    true => listed.remove(&front.client.unwrap()),
                    false => listed.insert(front.client.unwrap(), at),
                };
                if turn == 0 {
                    index.freeze((1, 1), BTreeMap::new);
                } else if turn == 1 && let (Some(frozen), mut runs) = index.frozen() {
                    next_run += 1;
                    let file = RealDisk.open(&dir.path().join(next_run.to_string()), Open::Create).unwrap();
                    let mut writer = Writer::new(VOLUME, next_run, file);
                    let table = frozen.table.iter().map(|(key, value)| (*key, value.clone())).collect();
                    let merged = if at % 2 == 0 { std::mem::take(&mut runs) } else { Vec::new() };
                    let mut merge = Merge::new(vec![table], &merged, &[0; 25]).unwrap();
                    while let Some((key, value)) = merge.next().unwrap() {
                        writer.push(&key, value.as_deref()).unwrap();
                    }
                    runs.insert(0, Arc::new(writer.finish().unwrap()));
                    index.thaw(runs);
                }
            }
            for n in 0..80 {
                let file = front(n, false).file;
                let found = index.place(file).unwrap().map(|place| place.offset);
                prop_assert_eq!(found, files.get(&file).copied());
            }
            for limit in [1, 7, 1000] {
                let mut after = None;
                let mut all = Vec::new();
                loop {
                    let page = index.files(after, limit).unwrap();
                    all.extend(page.iter().map(|(file, place)| (*file, place.offset)));
                    after = page.last().map(|(file, _)| *file);
                    if page.len() < limit { break; }
                }
                prop_assert_eq!(all, files.clone().into_iter().collect::<Vec<_>>());
                let (mut after, mut all) = (None, Vec::new());
                loop {
                    let page = index.listed(TenantId::new(9), after, limit).unwrap();
                    all.extend(page.iter().map(|entry| entry.client));
                    after = page.last().map(|entry| entry.client);
                    if page.len() < limit { break; }
                }
                prop_assert_eq!(all, listed.keys().copied().collect::<Vec<_>>());
            }
            prop_assert!(index.listed(TenantId::new(8), None, 9).unwrap().is_empty());
        }
    }
}
