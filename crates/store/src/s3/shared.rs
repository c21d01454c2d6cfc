//! What all parts of the store share: the bucket, the files in memory, and how what is known of a file changes.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{FileId, Generation};
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::task::JoinSet;

use super::bucket::{S3Request, SharedBucket, add};
use super::chain::Chain;
use super::entry::{Entry, LATE, Live, Table, assembled_keys};
use super::fence::Fence;
use super::file::{self, FileState};
use super::keeper::Porters;
use super::keys::{self, Life};
use super::node::{self, Node};
use super::pieces::Piece;
use super::states::States;
use super::{S3Options, lock};
use crate::StoreError;

/// Objects that may be on their way out at once: some 400 bytes of memory each.
const MAX_LEAVING: usize = 100_000;

/// Names the values of a segment that was assembled.
pub(crate) type SegmentKey = (FileId, Life, u64);

/// Weighs values by their bytes.
#[derive(Clone, Debug)]
pub(crate) struct Bytes32;

impl Weighter<SegmentKey, Arc<[ChainingValue]>> for Bytes32 {
    fn weight(&self, _: &SegmentKey, values: &Arc<[ChainingValue]>) -> u64 {
        64 + 32 * values.len() as u64
    }
}

/// What all parts of the store share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) bucket: SharedBucket,
    pub(crate) options: S3Options,
    pub(crate) table: Table,
    /// That this process keeps the bucket.
    pub(crate) fence: Fence,
    /// What belongs to no file, as it is durable, and where it is written next.
    node: Mutex<(Node, Chain)>,
    /// One permit: whoever changes that has it until it is durable.
    node_turn: Semaphore,
    /// States of shares.
    pub(crate) states: Mutex<States>,
    /// Values of segments that were assembled.
    pub(crate) segments: Cache<SegmentKey, Arc<[ChainingValue]>, Bytes32>,
    /// Memory for bodies, in KiB.
    pub(crate) bodies: Arc<Semaphore>,
    /// Uploads that are under way here: not orphans.
    pub(crate) uploads: Mutex<BTreeSet<String>>,
    /// Objects that are being deleted, or, since when, of which it is not known whether they will be.
    leaving: Mutex<HashMap<String, Option<Instant>>>,
    closing: AtomicBool,
    /// Runs that porters put.
    pub(crate) porters: Porters,
    /// Runs that are being written.
    pub(crate) writers: AtomicUsize,
    pub(crate) writer_done: Notify,
    /// What goes on whether or not its caller waits. `None` once the store was killed.
    tasks: Mutex<Option<JoinSet<()>>>,
}

/// What becomes of a request to change what is known of a file.
pub(crate) enum Plan<T> {
    /// Nothing changes; the answer is durable already.
    Known(T),
    /// This becomes durable, then the answer is given.
    Write(Box<FileState>, Gone, T),
}

/// Which chunks go with a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    Nothing,
    These(BTreeSet<u64>),
    All,
}

impl Shared {
    pub(crate) fn new(
        bucket: SharedBucket,
        options: S3Options,
        (node, chain): (Node, Chain),
        states: States,
        fence: Fence,
    ) -> Self {
        Self {
            fence,
            table: Table::new(options.idle_files),
            node: Mutex::new((node, chain)),
            node_turn: Semaphore::new(1),
            states: Mutex::new(states),
            segments: Cache::with_weighter(
                options.values_memory as usize / 4096,
                options.values_memory,
                Bytes32,
            ),
            bodies: Arc::new(Semaphore::new((options.bodies >> 10) as usize)),
            uploads: Mutex::new(BTreeSet::new()),
            leaving: Mutex::new(HashMap::new()),
            closing: AtomicBool::new(false),
            porters: Porters::default(),
            writers: AtomicUsize::new(0),
            writer_done: Notify::new(),
            tasks: Mutex::new(Some(JoinSet::new())),
            bucket,
            options,
        }
    }

    /// Whether the store takes work.
    pub(crate) fn open(&self) -> Result<(), StoreError> {
        let open = self.bucket.is_alive() && !self.closing.load(Ordering::Acquire);
        if open { Ok(()) } else { Err(StoreError::Closing) }
    }

    pub(crate) fn begin_closing(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Ends everything where it stands.
    pub(crate) fn kill(&self) {
        self.begin_closing();
        self.bucket.kill();
        if let Some(mut tasks) = lock(&self.tasks).take() {
            tasks.abort_all();
        }
        self.porters.clear();
        self.writer_done.notify_waiters();
    }

    /// Waits until nothing is under way that nobody waits for.
    pub(crate) async fn idle(&self) {
        loop {
            let batch = lock(&self.tasks).as_mut().map(std::mem::take);
            match batch {
                Some(mut batch) if !batch.is_empty() => while batch.join_next().await.is_some() {},
                Some(_) | None => return,
            }
        }
    }

    /// Does something to its end, whether or not its caller still waits.
    pub(crate) async fn to_its_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        self.spawn(async move {
            // Whoever asked may be gone.
            let _ = answer.send(work.await);
        });
        answered.await.unwrap_or(Err(StoreError::Closing))
    }

    /// Does something that nobody waits for.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(tasks) = lock(&self.tasks).as_mut() {
            while tasks.try_join_next().is_some() {}
            tasks.spawn(work);
        }
    }

    /// The entry of a file.
    pub(crate) async fn entry(&self, file: FileId) -> Result<Arc<Entry>, StoreError> {
        if !self.bucket.is_alive() {
            return Err(StoreError::Closing);
        }
        self.table.entry(file, async || self.read(file).await).await
    }

    /// Reads what is known of a file, by its keys.
    pub(crate) async fn read_record(&self, file: FileId) -> Result<(Chain, FileState), StoreError> {
        let decode = |bytes: &[u8]| file::decode(file, bytes);
        let (chain, state) = Chain::read(&self.bucket, |link| keys::link(file, link), decode).await?;
        Ok((chain, state.unwrap_or_default()))
    }

    /// Reads what the bucket has of a file.
    async fn read(&self, file: FileId) -> Result<Live, StoreError> {
        let (chain, state) = self.read_record(file).await?;
        let mut pieces = Vec::new();
        if state.is_known() && !state.dropped {
            let prefix = keys::runs(file, state.life);
            let mut after: Option<String> = None;
            loop {
                let listed = self.bucket.list(&prefix, after.as_deref(), super::bucket::PAGE).await;
                let (page, more) = listed.map_err(|error| error.in_store(S3Request::List))?;
                pieces.extend(page.iter().filter_map(|object| {
                    let (run, values, epoch) = keys::parse_incoming(object.key.strip_prefix(&prefix)?)?;
                    Piece::new(run, object.len, &values, epoch)
                }));
                after = page.last().map(|last| last.key.clone());
                if !more || after.is_none() {
                    break;
                }
            }
        }
        let live = Live::read(chain, state, pieces);
        let chunks = live.pieces.all().flat_map(|(_, piece)| piece.run.range());
        let contradicted: BTreeSet<u64> =
            chunks.filter(|chunk| live.pieces.is_contradicted(*chunk)).collect();
        if !contradicted.is_empty() {
            let lost = contradicted.iter().filter(|chunk| live.pieces.is_disputed(**chunk)).count();
            add(&self.bucket.counters.integrity_failures, contradicted.len() as u64);
            tracing::error!(%file, chunks = contradicted.len(), lost, "objects contradict each other: the latest count, if they agree");
        }
        Ok(live)
    }

    /// Changes what is known of a file, durably: one change after the other, each decided against what is durable. Goes on
    /// when the caller does not wait any more.
    pub(crate) async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        entry: Arc<Entry>,
        decide: impl FnOnce(&Live, Generation) -> Result<Plan<T>, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.open()?;
        let shared = self.clone();
        self.to_its_end(async move { shared.change_here(&entry, decide).await }).await
    }

    /// The same, for a task that goes to its end anyway; also while the store is closing.
    pub(crate) async fn change_here<T>(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        decide: impl FnOnce(&Live, Generation) -> Result<Plan<T>, StoreError>,
    ) -> Result<T, StoreError> {
        let Ok(_turn) = entry.turn.acquire().await else { return Err(StoreError::Closing) };
        let file = entry.file;
        let floor = self.floor(file);
        let (state, gone, answer, mut chain) = {
            let live = lock(&entry.live);
            match decide(&live, floor)? {
                Plan::Known(answer) => return Ok(answer),
                Plan::Write(state, gone, answer) => (state, gone, answer, live.chain),
            }
        };
        let record = file::encode(file, chain.next_version(), &state);
        let written = chain.write(&self.bucket, |link| keys::link(file, link), record).await;
        let garbage = {
            let mut live = lock(&entry.live);
            live.chain = chain;
            written?;
            let garbage = garbage(file, &live, &state, &gone);
            live.set(*state);
            match gone {
                Gone::Nothing => {}
                Gone::These(chunks) => {
                    live.losses += 1;
                    live.claims.revoke(|run| chunks.range(run.clone()).next().is_some());
                }
                Gone::All => {
                    live.losses += 1;
                    live.claims.revoke(|_| true);
                }
            }
            garbage
        };
        entry.released.notify_waiters();
        self.discard(garbage);
        Ok(answer)
    }

    /// Deletes objects that nothing refers to. What is left is found by the sweep. Until it is known that an object is gone
    /// nothing may be put under its key, because that might be deleted.
    pub(crate) fn discard(self: &Arc<Self>, keys: Vec<String>) {
        if keys.is_empty() {
            return;
        }
        {
            let mut leaving = lock(&self.leaving);
            let now = Instant::now();
            leaving.retain(|_, since| since.is_none_or(|since| now.saturating_duration_since(since) < LATE));
            if leaving.len() + keys.len() > MAX_LEAVING {
                tracing::warn!(
                    objects = keys.len(),
                    "too many objects are being deleted; these are left to the sweep"
                );
                return;
            }
            leaving.extend(keys.iter().map(|key| (key.clone(), None)));
        }
        let shared = self.clone();
        self.spawn(async move {
            let left = shared.bucket.delete(keys.clone()).await;
            let mut leaving = lock(&shared.leaving);
            for key in &keys {
                leaving.remove(key);
            }
            leaving.extend(left.into_iter().map(|key| (key, Some(Instant::now()))));
        });
    }

    /// Whether an object of this name may be deleted at any moment.
    pub(crate) fn is_leaving(&self, key: &str) -> bool {
        lock(&self.leaving).contains_key(key)
    }

    /// The lowest generation that a file can have.
    pub(crate) fn floor(&self, file: FileId) -> Generation {
        self.node(|node| node.floors.of(file))
    }

    /// What belongs to no file, as it is durable; damage as it is known.
    pub(crate) fn node<T>(&self, look: impl FnOnce(&Node) -> T) -> T {
        look(&lock(&self.node).0)
    }

    /// Changes what belongs to no file, durably, unless `change` says that nothing changes.
    pub(crate) async fn change_node(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Node) -> bool + Send + 'static,
    ) -> Result<(), StoreError> {
        self.open()?;
        let shared = self.clone();
        self.to_its_end(async move {
            let Ok(_turn) = shared.node_turn.acquire().await else { return Err(StoreError::Closing) };
            let (mut node, mut chain) = lock(&shared.node).clone();
            if !change(&mut node) {
                return Ok(());
            }
            let record = node::encode(chain.next_version(), &node);
            let written = chain.write(&shared.bucket, keys::node, record).await;
            let mut current = lock(&shared.node);
            current.1 = chain;
            written?;
            current.0 = node;
            Ok(())
        })
        .await
    }

    /// Looks now and then whether another process has opened the bucket since, and stops everything then.
    pub(crate) async fn end_when_another_keeps_it(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.options.look_every).await;
            match self.fence.is_last(&self.bucket).await {
                Ok(false) => {
                    let place = self.options.place();
                    tracing::error!(%place, "another process keeps the bucket now: this one takes nothing any more");
                    return self.kill();
                }
                Err(StoreError::Closing) => return,
                // It is asked again.
                Ok(true) | Err(_) => {}
            }
        }
    }
}

/// What is garbage once this is known instead.
fn garbage(file: FileId, live: &Live, next: &FileState, gone: &Gone) -> Vec<String> {
    let now = &live.state;
    let mut garbage = Vec::new();
    if *gone == Gone::All {
        garbage.extend(live.pieces.keys(file, now.life));
        garbage.extend(live.doubtful.values().map(|(piece, _)| piece.key(file, now.life)));
    }
    if let Some(whole) = &now.assembled {
        let keep = next.assembled.as_ref().filter(|_| next.life == now.life && !next.dropped);
        let keep: Vec<String> = keep.map(|keep| assembled_keys(file, next.life, keep)).unwrap_or_default();
        garbage.extend(assembled_keys(file, now.life, whole).into_iter().filter(|key| !keep.contains(key)));
    }
    if now.in_lists
        && (!next.in_lists || next.dropped)
        && let Some(record) = &now.record
    {
        garbage.push(keys::name(record.tenant(), record.client_id()));
    }
    garbage
}
