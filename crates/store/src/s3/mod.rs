//! The S3 backend: one process keeps a prefix of a bucket, and others may carry bytes to and from it.
//!
//! # What is where
//! `keys.rs` is the map of the bucket. A run is one object, whose key says what it is; what else is known of a file is one
//! small object (`file.rs`), replaced as a whole; what belongs to no file is another (`node.rs`), and one for each share that
//! has something to remember (`states.rs`). Memory has only caches of
//! these: an entry of a file is made by reading its record and listing its runs.
//!
//! # What is durable when
//! A change is durable when the PUT of its object was answered; only then does memory take it over, and only then is
//! anybody told. No step needs a conditional write, and none frees or drops anything for what a list does not show: lists
//! only add. A request whose answer did not come may take effect at any later time. So keys
//! that are written more than once are chains (`chain.rs`), chunks of a file that was freed have another *life* than those
//! that come later (`keys.rs`), and a run of which it is not known whether it is there is made void, durably, before another
//! value of one of its chunks is recorded (`entry.rs`).
//!
//! # Who does what
//! Callers do their own requests. What must go to its end once it has begun (a change, the recording of a run, a publication)
//! is a task of the store's, which the caller waits for or not. One task sweeps (`sweep.rs`). A change to a file takes the
//! file's turn, so that changes are decided one after the other, each against what is durable. Porters, in other processes, put
//! and get objects of runs and ask this one what is where (`keeper.rs`, `porter.rs`).
//!
//! Whoever opens the bucket keeps it. One that kept it before and is still there notices within seconds, and takes nothing any
//! more; of what contradicts each other meanwhile the later counts (`keys.rs`).
//!
//! # How it stops
//! [`close`](crate::ChunkStore::close) takes no new work, waits a while for runs that are being written, and for the store's
//! tasks. [`S3Store::kill`], and dropping the store, abort them: no request begins afterwards.
//!
//! # What it spends
//! Memory for bodies is a budget, had before a run begins. Requests at once, files in memory and values of assembled files
//! are bounded; a file that is being received has some 40 bytes a chunk in memory.

mod assemble;
mod body;
mod bucket;
mod chain;
mod damage;
mod entry;
mod fence;
mod file;
mod keeper;
mod keys;
mod list;
mod node;
mod options;
mod orphan;
mod pieces;
mod porter;
mod read;
mod recording;
mod rights;
mod shared;
mod states;
mod sweep;
mod values;
mod whole;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, FileId, Generation, TenantId};
use sluice_engine::limits::{MAX_RUN, SEGMENT_CHUNKS};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;
use tokio::task::AbortHandle;

pub use bucket::{S3Metrics, S3Request};
pub use keeper::{Carried, ChunkPlace, Claimed, Keeper, Landed, MAX_PLACES, PorterClaim, PorterId};
pub use options::{S3Credentials, S3Options};
pub use porter::PorterStore;
pub use sweep::Swept;

use self::bucket::{Bucket, BucketError};
use self::chain::Chain;
use self::fence::Fence;
use self::file::Assembled;
use self::keys::Life;
use self::shared::{Gone, Plan, Shared};
use crate::{
    ChunkStore, Chunks, FileSummary, Found, Listed, MAX_FACTS_LEN, MAX_MARK_LEN, MAX_PAGE_LEN, MAX_STATE_LEN,
    RecordOutcome, RunWriter, StoreError, Together, Usage, Whole, WholeOutcome, limit, page, scrub_mark,
};

/// The most chunks whose values are asked for at once.
const MAX_VALUES: u64 = SEGMENT_CHUNKS;

/// Records and states that are read at once.
const READERS: usize = 16;

/// A chunk store in a bucket. Dropping it without [`close`](ChunkStore::close) is [`kill`](Self::kill).
#[derive(Debug)]
pub struct S3Store {
    shared: Arc<Shared>,
    /// What sweeps, and what looks whether this is still who keeps the bucket.
    background: [AbortHandle; 2],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl S3Store {
    /// Opens the store in a bucket, which may be empty under the prefix. Checks first that the credentials allow all that
    /// is needed.
    ///
    /// [`StoreError::NoRight`] if one is missing, [`StoreError::Unreachable`] if the server does not answer or refuses,
    /// [`StoreError::Unreadable`] if there is no such bucket or what is there cannot be read.
    pub async fn open(options: S3Options) -> Result<Self, StoreError> {
        if let Err((key, reason)) = options.check() {
            return Err(StoreError::Unreadable { path: format!("{key} of the bucket"), reason });
        }
        let bucket = Arc::new(Bucket::new(options.clone()));
        rights::check(&bucket, &options).await?;
        let fence = Fence::raise(&bucket, &options.place()).await?;
        let is_marked = AtomicBool::new(false);
        let decode = |bytes: &[u8]| {
            is_marked.store(node::has_epochs(bytes), Ordering::Relaxed);
            node::decode(bytes)
        };
        let (mut chain, node) = Chain::read(&bucket, keys::node, decode).await?;
        let node = node.unwrap_or_default();
        if !is_marked.load(Ordering::Relaxed) {
            // Before the first run that older versions would not find.
            let record = node::encode(chain.next_version(), &node);
            chain.write(&bucket, keys::node, record).await?;
        }
        let states = states::read(&bucket, &node).await?;
        let shared = Arc::new(Shared::new(bucket, options, (node, chain), states, fence));
        let sweeper = tokio::spawn(shared.clone().sweep_for_ever());
        let watch = tokio::spawn(shared.clone().end_when_another_keeps_it());
        Ok(Self { shared, background: [sweeper.abort_handle(), watch.abort_handle()] })
    }

    /// Checks that a bucket can be used, and leaves nothing behind.
    pub async fn check(options: &S3Options) -> Result<(), StoreError> {
        rights::check(&Bucket::new(options.clone()), options).await
    }

    /// Stops at once, as a crash of the process would: what was acknowledged is durable, what waits fails with
    /// [`StoreError::Closing`]. When it returns no request of this store begins any more, and the prefix can be opened again.
    pub fn kill(&self) {
        self.background.iter().for_each(AbortHandle::abort);
        self.shared.kill();
    }

    /// The counters.
    pub fn metrics(&self) -> S3Metrics {
        self.shared.bucket.counters.read()
    }

    /// Removes what nobody refers to, now.
    pub async fn sweep(&self) -> Result<Swept, StoreError> {
        self.shared.sweep().await
    }

    /// Waits until what was begun in the background is done.
    pub async fn settled(&self) {
        self.shared.idle().await;
    }

    async fn change<T: Send + 'static>(
        &self,
        file: FileId,
        decide: impl FnOnce(&entry::Live, Generation) -> Result<Plan<T>, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.shared.open()?;
        let entry = self.shared.entry(file).await?;
        self.shared.change(entry, decide).await
    }
}

impl Drop for S3Store {
    fn drop(&mut self) {
        self.kill();
    }
}

/// That something is known of the file, and it did not end.
fn alive(file: FileId, live: &entry::Live) -> Result<(), StoreError> {
    if !live.state.is_known() {
        return Err(StoreError::NoFile(file));
    }
    if live.state.dropped { Err(StoreError::Dropped(file)) } else { Ok(()) }
}

/// How a request ends that finds a metadata record there already.
fn held_record(live: &entry::Live, record: &MetadataRecord) -> Result<bool, StoreError> {
    match &live.state.record {
        Some(held) if held == record => Ok(true),
        Some(held) => Err(crate::conflict(held, record)),
        None => Ok(false),
    }
}

#[async_trait]
impl Chunks for S3Store {
    async fn begin_run(
        &self,
        file: FileId,
        tenant: TenantId,
        run: Run,
        len: u64,
    ) -> Result<Box<dyn RunWriter>, StoreError> {
        Ok(Box::new(writer::begin(&self.shared, file, tenant, run, len).await?))
    }

    async fn values(
        &self,
        file: FileId,
        range: Range<u64>,
    ) -> Result<Vec<Option<ChainingValue>>, StoreError> {
        let len = range.end.saturating_sub(range.start);
        limit("range of chunks", usize::try_from(len).unwrap_or(usize::MAX), MAX_VALUES as usize)?;
        let entry = self.shared.entry(file).await?;
        let known = {
            let live = lock(&entry.live);
            alive(file, &live)
        };
        known?;
        self.shared.values(&entry, range.start..range.end.max(range.start)).await
    }

    async fn read_chunk(&self, file: FileId, index: ChunkIndex) -> Result<Bytes, StoreError> {
        let entry = self.shared.entry(file).await?;
        self.shared.read_chunk(&entry, index).await
    }

    fn at_once(&self) -> u64 {
        MAX_RUN.into()
    }

    async fn read_together(&self, file: FileId, chunks: Range<u64>) -> Result<Option<Together>, StoreError> {
        let entry = self.shared.entry(file).await?;
        self.shared.read_together(&entry, chunks).await
    }
}

#[async_trait]
impl ChunkStore for S3Store {
    async fn put_record(&self, record: &MetadataRecord) -> Result<RecordOutcome, StoreError> {
        let (file, record) = (record.file_id(), record.clone());
        self.change(file, move |live, floor| {
            if live.state.dropped {
                return Err(StoreError::Dropped(file));
            }
            if held_record(live, &record)? {
                return Ok(Plan::Known(RecordOutcome::Known));
            }
            let mut state = live.state.clone();
            if !state.is_known() {
                state.life = Life::begin();
            }
            state.tenant = Some(record.tenant());
            if record.geometry().is_some_and(|shape| live.pieces.has_misfits(shape)) {
                state.generation = live.state.generation(floor).next();
            }
            state.record = Some(record);
            Ok(Plan::Write(Box::new(state), Gone::Nothing, RecordOutcome::Stored))
        })
        .await
    }

    async fn put_size(&self, file: FileId, size: Geometry) -> Result<(), StoreError> {
        self.change(file, move |live, floor| {
            alive(file, live)?;
            match live.state.geometry() {
                Some(held) if held == size => Ok(Plan::Known(())),
                Some(held) => Err(StoreError::SizeConflict { held: held.size(), got: size.size() }),
                None => {
                    let mut state = live.state.clone();
                    if live.pieces.has_misfits(size) {
                        state.generation = live.state.generation(floor).next();
                    }
                    state.sized = Some(size);
                    Ok(Plan::Write(Box::new(state), Gone::Nothing, ()))
                }
            }
        })
        .await
    }

    async fn put_whole(
        &self,
        record: &MetadataRecord,
        facts: &[u8],
        whole: Whole,
    ) -> Result<WholeOutcome, StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        whole.check(record)?;
        self.shared.open()?;
        let file = record.file_id();
        let entry = self.shared.entry(file).await?;
        let (shared, record, facts) = (self.shared.clone(), record.clone(), facts.to_vec());
        let work = async move { shared.take_whole(&entry, record, facts, whole).await };
        self.shared.to_its_end(work).await
    }

    async fn put_known(&self, record: &MetadataRecord, facts: &[u8]) -> Result<WholeOutcome, StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        self.shared.open()?;
        let file = record.file_id();
        let entry = self.shared.entry(file).await?;
        let (shared, record, facts) = (self.shared.clone(), record.clone(), facts.to_vec());
        let work = async move { shared.take_known(&entry, record, facts).await };
        self.shared.to_its_end(work).await
    }

    async fn summary(&self, file: FileId) -> Result<Option<FileSummary>, StoreError> {
        let entry = self.shared.entry(file).await?;
        let floor = self.shared.floor(file);
        let summary = lock(&entry.live).summary(floor);
        Ok(summary)
    }

    async fn list(&self, after: Option<FileId>, limit: usize) -> Result<Vec<Found>, StoreError> {
        self.shared.all_files(after, limit).await
    }

    async fn listed(
        &self,
        tenant: TenantId,
        after: Option<ClientFileId>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        self.shared.files_of(tenant, after, limit).await
    }

    async fn verify(&self, file: FileId, index: ChunkIndex) -> Result<u64, StoreError> {
        let entry = self.shared.entry(file).await?;
        self.shared.verify(&entry, index).await
    }

    async fn damage(&self, file: FileId) -> Result<Vec<Range<u64>>, StoreError> {
        Ok(self.shared.damage(file).iter().collect())
    }

    async fn damaged_files(&self) -> Result<Vec<FileId>, StoreError> {
        Ok(self.shared.node(|node| node.damage.keys().copied().collect()))
    }

    async fn put_scrub_mark(&self, share: Share, mark: &[u8]) -> Result<(), StoreError> {
        limit("mark of a scrub", mark.len(), MAX_MARK_LEN)?;
        self.shared.open()?;
        let put = self.shared.bucket.put(&scrub_mark::name(share), scrub_mark::encode(mark).into()).await;
        put.map(|_| ()).map_err(|error| error.in_store(S3Request::Put))
    }

    async fn scrub_mark(&self, share: Share) -> Result<Option<Vec<u8>>, StoreError> {
        let most = (MAX_MARK_LEN + crate::sealed::ENVELOPE_LEN) as u64;
        match self.shared.bucket.get(&scrub_mark::name(share), most).await {
            Ok(bytes) => Ok(scrub_mark::decode(&bytes).ok()),
            Err(BucketError::NotFound) => Ok(None),
            Err(error) => Err(error.in_store(S3Request::Get)),
        }
    }

    async fn lose(&self, file: FileId, chunks: &[ChunkIndex]) -> Result<Generation, StoreError> {
        let chunks: BTreeSet<u64> = chunks.iter().map(|chunk| chunk.number()).collect();
        let lost = chunks.clone();
        let generation = self
            .change(file, move |live, floor| {
                alive(file, live)?;
                let next = live.state.generation(floor).next();
                let mut state = live.state.clone();
                state.generation = next;
                for chunk in &chunks {
                    live.avoid(&mut state, *chunk, None);
                    if live.state.assembled_has(*chunk)
                        && let Some(whole) = &mut state.assembled
                    {
                        whole.lost.insert(*chunk..*chunk + 1);
                    }
                }
                let nothing_left = |whole: &Assembled| {
                    !whole.lost.is_empty() && whole.lost.covers(0..whole.geometry.chunks())
                };
                state.assembled = state.assembled.filter(|whole| !nothing_left(whole));
                Ok(Plan::Write(Box::new(state), Gone::These(chunks), next))
            })
            .await?;
        self.shared.clear_damage(file, lost).await;
        Ok(generation)
    }

    async fn put_facts(&self, file: FileId, facts: &[u8]) -> Result<(), StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        let facts = facts.to_vec();
        self.change(file, move |live, _| {
            if !live.state.is_known() {
                return Err(StoreError::NoFile(file));
            }
            if live.state.facts == facts {
                return Ok(Plan::Known(()));
            }
            let mut state = live.state.clone();
            state.facts = facts;
            Ok(Plan::Write(Box::new(state), Gone::Nothing, ()))
        })
        .await
    }

    async fn publish(&self, file: FileId, root: Root) -> Result<(), StoreError> {
        let entry = self.shared.entry(file).await?;
        self.shared.publish(entry, root).await
    }

    async fn recheck(&self, file: FileId) -> Result<Root, StoreError> {
        let entry = self.shared.entry(file).await?;
        self.shared.recheck(&entry).await
    }

    async fn free(&self, file: FileId) -> Result<Generation, StoreError> {
        let generation = self
            .change(file, move |live, floor| {
                alive(file, live)?;
                let next = live.state.generation(floor).next();
                let mut state = live.state.clone();
                (state.generation, state.life, state.assembled) = (next, Life::begin(), None);
                state.void.clear();
                Ok(Plan::Write(Box::new(state), Gone::All, next))
            })
            .await?;
        self.shared.clear_all_damage(file).await;
        Ok(generation)
    }

    async fn drop_file(&self, file: FileId, tenant: TenantId, facts: &[u8]) -> Result<(), StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        let facts = facts.to_vec();
        self.change(file, move |live, _| {
            if live.state.dropped && live.state.facts == facts {
                return Ok(Plan::Known(()));
            }
            let mut state = live.state.clone();
            state.tenant.get_or_insert(tenant);
            (state.facts, state.dropped, state.assembled) = (facts, true, None);
            state.void.clear();
            Ok(Plan::Write(Box::new(state), Gone::All, ()))
        })
        .await?;
        self.shared.clear_all_damage(file).await;
        Ok(())
    }

    async fn discard_orphan(&self, file: FileId) -> Result<bool, StoreError> {
        self.shared.open()?;
        let entry = self.shared.entry(file).await?;
        let shared = self.shared.clone();
        self.shared.to_its_end(async move { shared.forget(&entry).await }).await
    }

    async fn raise_generations(&self, share: Share, floor: Generation) -> Result<(), StoreError> {
        self.shared.change_node(move |node| node.floors.raise(share, floor)).await
    }

    async fn put_page(&self, file: FileId, segment: u64, bytes: &[u8]) -> Result<(), StoreError> {
        limit("page", bytes.len(), MAX_PAGE_LEN)?;
        self.shared.open()?;
        let record = page::encode(file, segment, bytes);
        let put = self.shared.bucket.put(&keys::page(file, segment), record.into()).await;
        put.map(|_| ()).map_err(|error| error.in_store(S3Request::Put))
    }

    async fn page(&self, file: FileId, segment: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let most = (MAX_PAGE_LEN + 64) as u64;
        match self.shared.bucket.get(&keys::page(file, segment), most).await {
            Ok(bytes) => Ok(page::decode(file, segment, &bytes).ok()),
            Err(BucketError::NotFound) => Ok(None),
            Err(error) => Err(error.in_store(S3Request::Get)),
        }
    }

    async fn states(&self) -> Result<BTreeMap<Share, Vec<u8>>, StoreError> {
        Ok(self.shared.all_states())
    }

    async fn put_state(&self, share: Share, state: &[u8]) -> Result<(), StoreError> {
        limit("state of a share", state.len(), MAX_STATE_LEN)?;
        self.shared.replace_state(share, state.to_vec()).await
    }

    fn usage(&self) -> Usage {
        // A bucket says of no room how much it has; one that is full refuses.
        Usage { free: u64::MAX, read_only: false }
    }

    async fn close(&self) -> Result<(), StoreError> {
        self.shared.begin_closing();
        let drained = async {
            loop {
                let done = self.shared.writer_done.notified();
                tokio::pin!(done);
                done.as_mut().enable();
                if self.shared.writers.load(Ordering::Acquire) == 0 {
                    break;
                }
                done.await;
            }
            self.shared.idle().await;
        };
        if tokio::time::timeout(self.shared.options.stall, drained).await.is_err() {
            tracing::warn!("closing the store while requests are under way");
        }
        self.kill();
        Ok(())
    }
}
