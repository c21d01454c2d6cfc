//! A datacenter's store and slots in memory, just true enough to test workers and edges against: no durability, no
//! peers but a map of chunks that "another datacenter" holds.
#![allow(dead_code, reason = "every test binary uses a part")]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, FileId, Generation, TenantId};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;
use sluice_engine::span::Place;
use sluice_node::access::ContextVerifier;
use sluice_proto::calls::{Admission, ChunkSource, DrainOrder, ListQuery, Opened, Slots, Used, Wait};
use sluice_proto::http::{About, DrainStatus, FileEntry, FilePage, FileStatus, Holder, State, TreeNode};
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::{
    ChunkStore, Chunks, FileSummary, Found, Listed, RecordOutcome, RunReceipt, RunWriter, StoreError,
    Together, Usage, Whole, WholeOutcome,
};
use tokio::sync::{Semaphore, watch};

#[derive(Default)]
struct Entry {
    record: Option<MetadataRecord>,
    size: Option<Geometry>,
    dropped: bool,
    chunks: BTreeMap<u64, (ChainingValue, Bytes)>,
}

type Files = Arc<Mutex<BTreeMap<FileId, Entry>>>;

/// A chunk store in memory.
#[derive(Default)]
pub(crate) struct MemoryStore {
    files: Files,
    pub(crate) damaged: Mutex<BTreeSet<(FileId, u64)>>,
    /// What the next `begin_run` answers.
    pub(crate) fail: Mutex<Option<StoreError>>,
    /// Files that are written slowly: each write waits for a permit, and uses it up.
    pub(crate) slow: Mutex<BTreeMap<FileId, Arc<Semaphore>>>,
    /// How many chunks are read in one go, if it is more than one.
    pub(crate) at_once: AtomicU64,
    /// What was read in one go.
    pub(crate) together: Mutex<Vec<Range<u64>>>,
}

impl MemoryStore {
    pub(crate) fn chunks(&self, file: FileId) -> usize {
        self.files.lock().unwrap().get(&file).map_or(0, |entry| entry.chunks.len())
    }

    /// Takes a chunk away, as if another datacenter held it.
    pub(crate) fn take(&self, file: FileId, index: u64) -> (ChainingValue, Bytes) {
        self.files.lock().unwrap().get_mut(&file).unwrap().chunks.remove(&index).unwrap()
    }

    /// Puts it back.
    pub(crate) fn give(&self, file: FileId, index: u64, chunk: (ChainingValue, Bytes)) {
        self.files.lock().unwrap().get_mut(&file).unwrap().chunks.insert(index, chunk);
    }
}

struct MemoryRun {
    files: Files,
    file: FileId,
    run: Run,
    len: u64,
    bytes: BytesMut,
    slow: Option<Arc<Semaphore>>,
}

#[async_trait]
impl RunWriter for MemoryRun {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        if let Some(slow) = &self.slow {
            slow.acquire().await.unwrap().forget();
        }
        self.bytes.extend_from_slice(&bytes);
        let got = self.bytes.len() as u64;
        if got > self.len { Err(StoreError::Length { expected: self.len, got }) } else { Ok(()) }
    }

    async fn finish(self: Box<Self>, expected: Option<&[ChainingValue]>) -> Result<RunReceipt, StoreError> {
        let got = self.bytes.len() as u64;
        if got != self.len {
            return Err(StoreError::Length { expected: self.len, got });
        }
        let bytes = self.bytes.freeze();
        let mut files = self.files.lock().unwrap();
        let entry = files.entry(self.file).or_default();
        let mut receipt = RunReceipt { values: Vec::new(), new_chunks: 0 };
        for i in 0..self.run.count() {
            let index = self.run.index(i);
            let end = ((i + 1) * CHUNK_LEN).min(self.len);
            let chunk = bytes.slice((i * CHUNK_LEN) as usize..end as usize);
            let got = ChainingValue::of_chunk(index, &chunk).unwrap();
            if let Some(values) = expected
                && values[i as usize] != got
            {
                return Err(StoreError::ValueMismatch { index, expected: values[i as usize], got });
            }
            if let Some((held, _)) = entry.chunks.get(&index.number())
                && *held != got
            {
                return Err(StoreError::ChunkConflict { index, held: *held, got });
            }
            receipt.values.push(got);
        }
        for (i, value) in receipt.values.iter().enumerate() {
            let at = i as u64 * CHUNK_LEN;
            let chunk = bytes.slice(at as usize..(at + CHUNK_LEN).min(self.len) as usize);
            let number = self.run.start().number() + i as u64;
            receipt.new_chunks += u64::from(entry.chunks.insert(number, (*value, chunk)).is_none());
        }
        Ok(receipt)
    }
}

#[async_trait]
impl Chunks for MemoryStore {
    async fn begin_run(
        &self,
        file: FileId,
        _tenant: TenantId,
        run: Run,
        len: u64,
    ) -> Result<Box<dyn RunWriter>, StoreError> {
        if let Some(error) = self.fail.lock().unwrap().take() {
            return Err(error);
        }
        let slow = self.slow.lock().unwrap().get(&file).cloned();
        Ok(Box::new(MemoryRun { files: self.files.clone(), file, run, len, bytes: BytesMut::new(), slow }))
    }

    async fn values(
        &self,
        file: FileId,
        range: Range<u64>,
    ) -> Result<Vec<Option<ChainingValue>>, StoreError> {
        let files = self.files.lock().unwrap();
        let entry = files.get(&file).ok_or(StoreError::NoFile(file))?;
        Ok(range.map(|i| entry.chunks.get(&i).map(|(value, _)| *value)).collect())
    }

    async fn read_chunk(&self, file: FileId, index: ChunkIndex) -> Result<Bytes, StoreError> {
        if self.damaged.lock().unwrap().contains(&(file, index.number())) {
            return Err(StoreError::Corrupt { file, index });
        }
        let files = self.files.lock().unwrap();
        let chunk = files.get(&file).and_then(|entry| entry.chunks.get(&index.number()));
        chunk.map(|(_, bytes)| bytes.clone()).ok_or(StoreError::Missing { index })
    }

    fn at_once(&self) -> u64 {
        self.at_once.load(Ordering::Relaxed).max(1)
    }

    async fn read_together(&self, file: FileId, chunks: Range<u64>) -> Result<Option<Together>, StoreError> {
        assert!(chunks.end - chunks.start <= self.at_once() && chunks.start / 4 == (chunks.end - 1) / 4);
        self.together.lock().unwrap().push(chunks.clone());
        if let Some(error) = self.fail.lock().unwrap().take() {
            return Err(error);
        }
        if chunks.clone().any(|chunk| self.damaged.lock().unwrap().contains(&(file, chunk))) {
            return Ok(None);
        }
        let files = self.files.lock().unwrap();
        let entry = files.get(&file).ok_or(StoreError::NoFile(file))?;
        let found: Option<Vec<_>> = chunks.map(|chunk| entry.chunks.get(&chunk)).collect();
        Ok(found.map(|found| Together {
            bytes: found.iter().flat_map(|(_, bytes)| bytes.clone()).collect(),
            values: found.iter().map(|(value, _)| *value).collect(),
        }))
    }
}

#[async_trait]
impl ChunkStore for MemoryStore {
    async fn put_record(&self, record: &MetadataRecord) -> Result<RecordOutcome, StoreError> {
        let mut files = self.files.lock().unwrap();
        let entry = files.entry(record.file_id()).or_default();
        if entry.dropped {
            return Err(StoreError::Dropped(record.file_id()));
        }
        match &entry.record {
            None => {
                entry.record = Some(record.clone());
                Ok(RecordOutcome::Stored)
            }
            Some(held) if held == record => Ok(RecordOutcome::Known),
            Some(held) => Err(StoreError::RecordConflict { held: held.digest(), got: record.digest() }),
        }
    }

    async fn drop_file(&self, file: FileId, _tenant: TenantId, _facts: &[u8]) -> Result<(), StoreError> {
        let mut files = self.files.lock().unwrap();
        let entry = files.entry(file).or_default();
        entry.dropped = true;
        entry.chunks.clear();
        Ok(())
    }

    fn usage(&self) -> Usage {
        Usage { free: u64::MAX, read_only: false }
    }

    async fn put_size(&self, file: FileId, size: Geometry) -> Result<(), StoreError> {
        let mut files = self.files.lock().unwrap();
        let entry = files.get_mut(&file).ok_or(StoreError::NoFile(file))?;
        let said = entry.record.as_ref().and_then(MetadataRecord::geometry).or(entry.size);
        match said {
            Some(held) if held != size => {
                Err(StoreError::SizeConflict { held: held.size(), got: size.size() })
            }
            Some(_) | None => {
                entry.size = Some(size);
                Ok(())
            }
        }
    }

    async fn summary(&self, _: FileId) -> Result<Option<FileSummary>, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn list(&self, _: Option<FileId>, _: usize) -> Result<Vec<Found>, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn listed(
        &self,
        _: TenantId,
        _: Option<ClientFileId>,
        _: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn put_whole(&self, _: &MetadataRecord, _: &[u8], _: Whole) -> Result<WholeOutcome, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn put_known(&self, _: &MetadataRecord, _: &[u8]) -> Result<WholeOutcome, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn verify(&self, _: FileId, _: ChunkIndex) -> Result<u64, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn damage(&self, _: FileId) -> Result<Vec<Range<u64>>, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn damaged_files(&self) -> Result<Vec<FileId>, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn put_scrub_mark(&self, _: Share, _: &[u8]) -> Result<(), StoreError> {
        unreachable!("workers do not ask")
    }
    async fn scrub_mark(&self, _: Share) -> Result<Option<Vec<u8>>, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn lose(&self, _: FileId, _: &[ChunkIndex]) -> Result<Generation, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn put_facts(&self, _: FileId, _: &[u8]) -> Result<(), StoreError> {
        unreachable!("workers do not ask")
    }
    async fn publish(&self, _: FileId, _: Root) -> Result<(), StoreError> {
        unreachable!("workers do not ask")
    }
    async fn recheck(&self, _: FileId) -> Result<Root, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn free(&self, _: FileId) -> Result<Generation, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn discard_orphan(&self, _: FileId) -> Result<bool, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn raise_generations(&self, _: Share, _: Generation) -> Result<(), StoreError> {
        unreachable!("workers do not ask")
    }
    async fn put_page(&self, _: FileId, _: u64, _: &[u8]) -> Result<(), StoreError> {
        unreachable!("workers do not ask")
    }
    async fn page(&self, _: FileId, _: u64) -> Result<Option<Vec<u8>>, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn states(&self) -> Result<BTreeMap<Share, Vec<u8>>, StoreError> {
        unreachable!("workers do not ask")
    }
    async fn put_state(&self, _: Share, _: &[u8]) -> Result<(), StoreError> {
        unreachable!("workers do not ask")
    }
    async fn close(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// The slots of a datacenter that knows no other.
pub(crate) struct MemorySlots {
    pub(crate) store: Arc<MemoryStore>,
    access: Arc<ContextVerifier>,
    changed: watch::Sender<u64>,
    /// Chunks that "another datacenter" holds.
    pub(crate) elsewhere: Mutex<BTreeMap<(FileId, u64), (ChainingValue, Bytes)>>,
    pub(crate) reported: Mutex<Vec<(FileId, u64)>>,
}

impl MemorySlots {
    pub(crate) fn new(store: Arc<MemoryStore>, access: Arc<ContextVerifier>) -> Arc<Self> {
        Arc::new(Self {
            store,
            access,
            changed: watch::Sender::new(0),
            elsewhere: Mutex::default(),
            reported: Mutex::default(),
        })
    }

    fn file(&self, context: &SignedContext, id: ClientFileId) -> Result<FileId, Refusal> {
        Ok(FileId::derive(self.access.verify(context)?.tenant, id))
    }

    fn value(&self, file: FileId, index: u64) -> Option<(ChainingValue, Bytes, bool)> {
        let files = self.store.files.lock().unwrap();
        let here = files.get(&file).and_then(|entry| entry.chunks.get(&index));
        let elsewhere = self.elsewhere.lock().unwrap();
        let found = here.map(|chunk| (chunk, true));
        let ((value, bytes), local) =
            found.or_else(|| elsewhere.get(&(file, index)).map(|chunk| (chunk, false)))?;
        Some((*value, bytes.clone(), local))
    }

    fn now(&self, file: FileId) -> Result<FileStatus, Refusal> {
        let (record, shape) = {
            let files = self.store.files.lock().unwrap();
            let entry = files.get(&file).ok_or_else(Refusal::not_found)?;
            if entry.dropped {
                return Err(Refusal::new(Problem::Dropped, "the file was deleted"));
            }
            let record = entry.record.clone().ok_or_else(Refusal::not_found)?;
            (record.clone(), record.geometry().or(entry.size))
        };
        let count = shape.map_or(0, Geometry::chunks);
        let chunks: Vec<_> = (0..count).map(|i| self.value(file, i)).collect();
        let missing: Vec<_> =
            (0..count).filter(|i| chunks[*i as usize].is_none()).map(|i| [i, i + 1]).collect();
        let root = (shape.is_some() && missing.is_empty()).then(|| {
            let bytes = chunks.iter().flatten().map(|(_, bytes, _)| &bytes[..]).collect::<Vec<_>>().concat();
            Root::of_bytes(&bytes).to_string()
        });
        let here = chunks.iter().flatten().filter(|(_, _, local)| *local).count() as u64;
        Ok(FileStatus {
            id: record.client_id().uuid(),
            size: shape.map(Geometry::size),
            chunks: count,
            name: record.name().into(),
            content_type: record.content_type().into(),
            metadata: record.user().clone(),
            expires_in: record.expiry_secs(),
            expected_root: record.expected_root().map(|root| root.to_string()),
            state: if root.is_some() { State::Assembled } else { State::Receiving },
            conflict: None,
            home: "dc-a".into(),
            home_epoch: 0,
            root,
            dc: "dc-a".into(),
            home_answered: true,
            missing_chunks: missing.len() as u64,
            missing,
            damaged: Vec::new(),
            holders: vec![Holder { dc: "dc-a".into(), chunks: here, ranges: Vec::new() }],
        })
    }
}

#[async_trait]
impl Slots for MemorySlots {
    async fn admit_more(
        &self,
        context: &SignedContext,
        _: ClientFileId,
        bytes: u64,
        _: Used,
    ) -> Result<(), Refusal> {
        let session = self.access.verify(context)?;
        if session.quota > 0 && bytes > session.quota {
            return Err(Refusal::new(Problem::Quota, "the quota is used up"));
        }
        Ok(())
    }
    async fn drain(&self, _: &SignedContext, _: DrainOrder) -> Result<DrainStatus, Refusal> {
        Err(Refusal::new(Problem::Precondition, "nobody else is there"))
    }

    async fn create_whole(
        &self,
        _: &SignedContext,
        _: MetadataRecord,
        _: Bytes,
        _: Used,
    ) -> Result<Option<(bool, FileStatus)>, Refusal> {
        // Always as a record and chunks.
        Ok(None)
    }

    async fn create(
        &self,
        _: &SignedContext,
        record: MetadataRecord,
        _: Option<String>,
        _: Used,
    ) -> Result<(bool, FileStatus), Refusal> {
        let outcome = self.store.put_record(&record).await.map_err(|error| match error {
            StoreError::RecordConflict { .. } => Refusal::new(Problem::MetadataConflict, error.to_string()),
            StoreError::Dropped(_) => Refusal::new(Problem::Dropped, error.to_string()),
            other => Refusal::new(Problem::Internal, other.to_string()),
        })?;
        self.changed.send_modify(|n| *n += 1);
        Ok((outcome == RecordOutcome::Stored, self.now(record.file_id())?))
    }

    async fn settle(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal> {
        let file = self.file(context, id)?;
        self.now(file)?;
        self.store
            .put_size(file, size)
            .await
            .map_err(|error| Refusal::new(Problem::SizeConflict, error.to_string()))?;
        self.changed.send_modify(|n| *n += 1);
        self.now(file)
    }

    async fn used(&self, _: &SignedContext, _: Option<FileId>) -> Result<Used, Refusal> {
        Ok(Used::default())
    }

    async fn admit(&self, _: &SignedContext, file: FileId, _: Used) -> Result<Admission, Refusal> {
        match self.now(file) {
            Ok(FileStatus { size: Some(size), .. }) => Ok(Admission::Known(Geometry::new(size).unwrap())),
            Ok(_) => Ok(Admission::Open),
            Err(refusal) if refusal.problem == Problem::NotFound => Ok(Admission::Provisional),
            Err(refusal) => Err(refusal),
        }
    }

    async fn register(
        &self,
        _: &SignedContext,
        file: FileId,
        _: Run,
        _: &[ChainingValue],
    ) -> Result<bool, Refusal> {
        self.changed.send_modify(|n| *n += 1);
        Ok(self.now(file).is_err())
    }

    async fn status(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal> {
        let file = self.file(context, id)?;
        let mut changed = self.changed.subscribe();
        let deadline = tokio::time::sleep(wait.map(|wait| wait.timeout).unwrap_or_default());
        tokio::pin!(deadline);
        loop {
            let status = self.now(file)?;
            if wait.is_none_or(|wait| status.state >= wait.state) {
                return Ok(status);
            }
            tokio::select! {
                () = &mut deadline => return Ok(status),
                _ = changed.changed() => {}
            }
        }
    }

    async fn list(&self, context: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal> {
        let tenant = self.access.verify(context)?.tenant;
        let records: BTreeMap<ClientFileId, FileId> = {
            let files = self.store.files.lock().unwrap();
            let records =
                files.values().filter(|entry| !entry.dropped).filter_map(|entry| entry.record.as_ref());
            records.filter(|r| r.tenant() == tenant).map(|r| (r.client_id(), r.file_id())).collect()
        };
        let mut files: Vec<FileEntry> = Vec::new();
        let mut next = None;
        for (id, file) in records {
            let status = self.now(file)?;
            if query.after.is_some_and(|after| id <= after) || query.state.is_some_and(|s| s != status.state)
            {
                continue;
            }
            if files.len() == query.limit {
                next = files.last().map(|entry| entry.id);
                break;
            }
            let FileStatus { size, name, state, home, root, .. } = status;
            files.push(FileEntry { id: id.uuid(), size, name, state, home, root });
        }
        Ok(FilePage { files, next })
    }

    async fn open(&self, context: &SignedContext, id: ClientFileId) -> Result<Opened, Refusal> {
        let file = self.file(context, id)?;
        let status = self.now(file)?;
        let record = self.store.files.lock().unwrap()[&file].record.clone().unwrap();
        match status.root {
            Some(root) => {
                let file = Geometry::new(status.size.unwrap()).unwrap();
                Ok(Opened { file, record, root: root.parse().unwrap() })
            }
            None => Err(Refusal::new(Problem::Incomplete, "chunks are missing")),
        }
    }

    async fn locate(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        range: Range<u64>,
    ) -> Result<Vec<ChunkSource>, Refusal> {
        let file = self.file(context, id)?;
        let found = range.map(|i| self.value(file, i).map(|(value, _, local)| ChunkSource { value, local }));
        found.collect::<Option<_>>().ok_or_else(|| Refusal::new(Problem::Unavailable, "no holder"))
    }

    async fn fetch(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        index: ChunkIndex,
        value: ChainingValue,
    ) -> Result<Bytes, Refusal> {
        let file = self.file(context, id)?;
        let elsewhere = self.elsewhere.lock().unwrap();
        match elsewhere.get(&(file, index.number())) {
            Some((held, bytes)) if *held == value => Ok(bytes.clone()),
            Some(_) | None => Err(Refusal::new(Problem::Unavailable, "no holder")),
        }
    }

    async fn report_damage(&self, file: FileId, index: ChunkIndex) {
        self.reported.lock().unwrap().push((file, index.number()));
    }

    async fn tree(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        place: Place,
    ) -> Result<TreeNode, Refusal> {
        let file = self.file(context, id)?;
        let status = self.now(file)?;
        let range = place.range(Geometry::new(status.size.unwrap()).unwrap());
        let chunk_values = range.map(|i| self.value(file, i).map(|(value, ..)| value.to_string())).collect();
        let (start, level) = (place.start(), place.level());
        Ok(TreeNode { start, level, value: None, chunk_values, proof: Vec::new(), root: status.root })
    }

    async fn remove(&self, context: &SignedContext, id: ClientFileId) -> Result<(), Refusal> {
        let session = self.access.verify(context)?;
        let file = FileId::derive(session.tenant, id);
        if let Err(refusal) = self.now(file)
            && refusal.problem != Problem::Dropped
        {
            return Err(refusal);
        }
        self.store.drop_file(file, session.tenant, &[]).await.unwrap();
        self.changed.send_modify(|n| *n += 1);
        Ok(())
    }

    async fn about(&self, _: &SignedContext) -> Result<About, Refusal> {
        Ok(About { cluster: "test".into(), dc: "dc-a".into(), dcs: Vec::new(), version: "0".into() })
    }
}
