//! The workers: chunks in, verified bytes out.
//!
//! A [`Worker`] is owned by the composition of one datacenter. It keeps no state of files: what it needs to know it asks the
//! chunk store and the owner of the file's slot, so any worker can take any chunk of any file. Its work runs in the
//! caller's task and ends with it; only a stream on its way out has a task of its own, on the datacenter's
//! [`Shutdown`], which ends with the stream. Dropping a call loses nothing that was acknowledged.
//!
//! Contract:
//! 1. Every call verifies its session context and scope first (G4), before a byte of a body is read.
//! 2. `put_chunks` answers after the run is durable and registered (G1). A body that ends early, late or never is
//!    refused, and never taken for a chunk.
//! 3. `read` gives out only bytes that hash to the values under the file's root (G2).
//! 4. What had better go elsewhere is passed to the workers of another datacenter with its context, or its client is sent
//!    there; what was passed here goes no further. The receipt names the datacenter in which it is durable.
//! 5. Memory is bounded: a body on its way in costs what the caller buffers, a stream on its way out a few chunks, or
//!    two blocks of chunks where requests cost, out of a [`MemoryBudget`].

mod ahead;
mod body;
mod lent;
mod rates;
mod read;
mod refusal;
mod turn;

use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use sluice_engine::context::{Scope, SessionContext, SignedContext};
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::ids::{ClientFileId, DcId, FileId};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::metadata::{MetadataFields, MetadataRecord};
use sluice_engine::placement::{Ask, Choice, FULL, Load, WorkerLoad};
use sluice_engine::span::Place;
use sluice_node::access::ContextVerifier;
use sluice_node::budget::{Concurrency, MemoryBudget};
use sluice_node::metrics::Metrics;
use sluice_node::rate::UploadRate;
use sluice_node::shutdown::Shutdown;
use sluice_proto::calls::{
    Admission, ByteStream, DrainOrder, Elsewhere, Leaving, ListQuery, NewFile, Opened, PutChunks, Slots,
    Used, Wait, Way, Workers,
};
use sluice_proto::http::{About, ChunkReceipt, DrainStatus, FilePage, FileStatus, State, TreeNode};
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::Chunks;
use tokio::time::Instant;
use tracing::Instrument as _;

pub use body::Pace;
pub use rates::{Buckets, Rates};

/// How long a file that came in one request, and could not be taken as one record, may take to be assembled before its
/// client is told where it stands.
const ASSEMBLY_PATIENCE: Duration = Duration::from_secs(2);

/// How long a run waits for room under the capped rate, here or elsewhere, and how often it looks for it.
const ROOM_PATIENCE: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long after a body a worker counts as one that is asked. Where bodies are rare that is still soon after the last one.
const ASKED: Duration = Duration::from_secs(300);

/// What a worker spends.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// How fast a body must arrive.
    pub pace: Pace,
    /// How long the owner of a slot, another writer of the same chunk, or another datacenter may take.
    pub patience: Duration,
    /// Chunks that are read ahead of a stream on its way out: 2 to 4 keep a link busy.
    pub prefetch: usize,
    /// How long a reader may take for one chunk before its stream is broken off.
    pub stall: Duration,
    /// Bodies that flow into the store at full speed at once; the next ones wait a moment for their turn.
    pub turns: usize,
    /// Bodies at once at which this counts as full, so that more are passed on if there is anywhere to pass them.
    pub bodies: usize,
    /// Bytes of uploads a second that are taken; `None`: as many as come.
    pub upload_rate: Option<u64>,
}

impl Default for WorkerSettings {
    fn default() -> Self {
        Self {
            pace: Pace::default(),
            patience: Duration::from_secs(30),
            prefetch: 3,
            stall: Duration::from_secs(60),
            turns: 8,
            bodies: 1024,
            upload_rate: None,
        }
    }
}

/// What a worker works with.
#[derive(Clone)]
pub struct WorkerParts {
    /// Name of the datacenter, for receipts.
    pub dc: String,
    /// The chunk store.
    pub store: Arc<dyn Chunks>,
    /// The owners of the slots.
    pub slots: Arc<dyn Slots>,
    /// Verifies session contexts.
    pub access: Arc<ContextVerifier>,
    /// Pays for chunks that are read ahead.
    pub memory: MemoryBudget,
    /// Counts damage.
    pub metrics: Arc<Metrics>,
    /// Where else chunks can go; `None`: nowhere.
    pub elsewhere: Option<Arc<dyn Elsewhere>>,
    /// Owns the tasks behind streams on their way out.
    pub tasks: Shutdown,
    /// How fast each tenant may go.
    pub rates: Arc<Rates>,
}

/// A worker of one datacenter. Cheap to share: it keeps nothing of files.
pub struct Worker {
    parts: WorkerParts,
    settings: WorkerSettings,
    turns: turn::Turns,
    bodies: Concurrency,
    rate: UploadRate,
    /// When a body came last.
    asked: Mutex<Option<Instant>>,
}

impl Worker {
    /// A worker with these parts.
    pub fn new(parts: WorkerParts, settings: WorkerSettings) -> Self {
        let bodies = Concurrency::new("bodies", settings.bodies);
        let rate = UploadRate::new(settings.upload_rate);
        let turns = turn::Turns::new(settings.turns);
        Self { turns, bodies, rate, asked: Mutex::default(), parts, settings }
    }

    /// The cap on what is taken, which may be changed.
    pub fn upload_rate(&self) -> UploadRate {
        self.rate.clone()
    }

    /// How loaded it is: by the tightest of memory, bodies at once, and the capped rate.
    pub fn load(&self) -> Load {
        let Load { room, pressure } = self.rate.load();
        let (used, total) = (self.parts.memory.used(), self.parts.memory.total());
        // A tenth is kept for what is on its way.
        let memory = u128::from(used) * u128::from(FULL) * 10 / (u128::from(total) * 9).max(1);
        let bodies = self.bodies.used() * usize::from(FULL) / self.settings.bodies.max(1);
        let tightest = [memory as u64, bodies as u64].map(|part| u16::try_from(part).unwrap_or(u16::MAX));
        let pressure = tightest.into_iter().fold(pressure, u16::max);
        Load { room: if pressure >= FULL { 0 } else { room }, pressure }
    }

    /// What it says of its load. It is asked if a body came lately, from a client or from another datacenter.
    pub fn says(&self) -> WorkerLoad {
        let asked = *self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_asked = asked.is_some_and(|at| at.elapsed() < ASKED);
        WorkerLoad { load: self.load(), bodies: self.bodies.used() as u64, is_asked }
    }

    /// From now on shows in metrics, whenever they are read, to whom is passed on.
    pub fn show(self: &Arc<Self>) {
        let worker = Arc::downgrade(self);
        self.parts.metrics.before_reading(move || {
            if let Some(worker) = worker.upgrade()
                && let Some(elsewhere) = &worker.parts.elsewhere
            {
                elsewhere.show(worker.load().pressure);
            }
            std::future::ready(())
        });
    }

    /// Where something goes that had better not be taken here; `None`: it is taken here. A client that goes where it is
    /// sent is sent there.
    async fn place(
        &self,
        session: &SessionContext,
        way: Way,
        file: FileId,
        run: Option<Run>,
        len: u64,
    ) -> Result<Option<Passage>, Refusal> {
        if len > 0 {
            *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        let Some(elsewhere) = &self.parts.elsewhere else { return Ok(None) };
        let (is_passed, pressure) = (way == Way::Passed, self.load().pressure);
        let start = run.map_or(0, |run| run.range().start);
        let dc = match elsewhere.choose(&Ask { file, start, len, is_passed, pressure }) {
            Choice::Here => return Ok(None),
            Choice::There(dc) => dc,
        };
        // A token that does not count there is no reason to be refused here.
        if !session.allowed.is_empty() && !session.allowed.contains(&dc) {
            return Ok(None);
        }
        if let Some(run) = run {
            // What is here is compared here, and goes nowhere.
            let held = self.parts.store.values(file, run.range()).await;
            if held.is_ok_and(|values| values.iter().any(Option::is_some)) {
                return Ok(None);
            }
        }
        if let (Way::Follows, Some(url)) = (way, elsewhere.url(dc)) {
            elsewhere.passed(dc, len);
            return Err(Refusal::elsewhere("another datacenter takes this now", url));
        }
        Ok(elsewhere.workers(dc).map(|workers| Passage { dc, workers, elsewhere: elsewhere.clone() }))
    }

    /// The same, once there is room here or elsewhere: whoever waits is bound to neither, so that the first that has room
    /// takes it. After a while it is tried here in any case.
    async fn wait_for_room(
        &self,
        session: &SessionContext,
        way: Way,
        file: FileId,
        run: Run,
        len: u64,
    ) -> Result<Option<Passage>, Refusal> {
        let until = Instant::now() + ROOM_PATIENCE;
        loop {
            let passage = self.place(session, way, file, Some(run), len).await?;
            if passage.is_some() || self.rate.load().pressure < FULL || Instant::now() >= until {
                return Ok(passage);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Takes chunks that are paid for: here, or elsewhere.
    async fn take_chunks(&self, context: &SignedContext, put: PutChunks) -> Result<ChunkReceipt, Refusal> {
        let session = self.parts.access.require(context, Scope::Write)?;
        let file = FileId::derive(session.tenant, put.id);
        let (start, len) = (put.start, put.len);
        let run = match self.ask(self.parts.slots.admit(context, file, Used::default())).await? {
            Admission::Known(shape) => shape.run(start, len),
            Admission::Open if !len.is_multiple_of(CHUNK_LEN) => return Err(refusal::size_open(len)),
            Admission::Open | Admission::Provisional => Run::from_len(start, len),
        }
        .map_err(|error| refusal::of_geometry(&error))?;
        if let Some(values) = &put.expected
            && values.len() as u64 != run.count()
        {
            return Err(Refusal::new(
                Problem::InvalidParameter,
                format!("{} chunk values came for {} chunks", values.len(), run.count()),
            )
            .hint("send one value per chunk, or none"));
        }

        let Some(passage) = self.wait_for_room(&session, put.way, file, run, put.len).await? else {
            return self.put_here(context, file, run, put).await;
        };
        let (lender, body) = lent::lend(put.body);
        let (id, start, len, expected) = (put.id, put.start, put.len, put.expected.clone());
        let passed = PutChunks { id, start, len, expected, body, way: Way::Passed };
        match passage.workers.put_chunks(context, passed).await {
            Ok(receipt) => {
                passage.elsewhere.passed(passage.dc, len);
                Ok(receipt)
            }
            Err(refusal) => match lender.take_back().filter(|_| is_no_verdict(&refusal)) {
                Some(body) => {
                    passage.failed(&refusal);
                    self.put_here(context, file, run, PutChunks { body, ..put }).await
                }
                None => Err(refusal),
            },
        }
    }

    /// Takes a run here.
    async fn put_here(
        &self,
        context: &SignedContext,
        file: FileId,
        run: Run,
        put: PutChunks,
    ) -> Result<ChunkReceipt, Refusal> {
        let session = self.parts.access.require(context, Scope::Write)?;
        let PutChunks { start, len, expected, body, .. } = put;
        let _body = self.bodies.try_take().ok();
        self.rate.take(len).await?;
        let (turn, busy) = self.turns.take().await;
        let begin = async {
            let writer = self.parts.store.begin_run(file, session.tenant, run, len).await;
            writer.map_err(|error| refusal::of_store(&error))
        };
        let mut writer = within(self.settings.patience, "another writer of the same chunk", begin).await?;
        let gather = turn::Gather::new(&self.turns, turn, len);
        let stored = async {
            body::copy(body, len, &self.settings.pace, gather, &mut *writer).await?;
            writer.finish(expected.as_deref()).await.map_err(|error| refusal::of_store(&error))
        };
        let first = start.number();
        let receipt =
            stored.instrument(tracing::info_span!("store", first, chunks = run.count(), bytes = len)).await?;
        let registered = self.ask(self.parts.slots.register(context, file, run, &receipt.values));
        let provisional =
            registered.instrument(tracing::info_span!("register", first, chunks = run.count())).await?;
        Ok(ChunkReceipt {
            dc: self.parts.dc.clone(),
            start: start.number(),
            values: receipt.values.iter().map(ToString::to_string).collect(),
            new_chunks: receipt.new_chunks,
            provisional,
            busy,
        })
    }

    /// Where a file stands, or comes to stand; paid for.
    async fn wait_for(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal> {
        let patience = self.settings.patience + wait.map_or(Duration::ZERO, |wait| wait.timeout);
        let status = self.parts.slots.status(context, id, wait);
        within(patience, "the owner of the file's slot", status).await
    }

    /// Awaits an answer from the owner of a slot, or refuses when it takes too long.
    async fn ask<T>(&self, answer: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
        within(self.settings.patience, "the owner of the file's slot", answer).await
    }
}

/// Another datacenter that takes something in this one's place.
struct Passage {
    dc: DcId,
    workers: Arc<dyn Workers>,
    elsewhere: Arc<dyn Elsewhere>,
}

impl Passage {
    /// It was not taken there.
    fn failed(&self, refusal: &Refusal) {
        // What concerns one session only keeps nothing else from going there.
        if refusal.problem.status() == 503 {
            self.elsewhere.failed(self.dc);
        }
    }
}

/// Whether a refusal says nothing of what was sent, only that it could not be taken there now, or not of this session: there
/// clocks, quotas and rates are its own.
fn is_no_verdict(refusal: &Refusal) -> bool {
    [401, 403, 429, 503].contains(&refusal.problem.status())
}

/// Awaits `answer` for at most `patience`.
async fn within<T>(
    patience: Duration,
    whom: &str,
    answer: impl Future<Output = Result<T, Refusal>>,
) -> Result<T, Refusal> {
    tokio::time::timeout(patience, answer).await.unwrap_or_else(|_| {
        Err(Refusal::new(Problem::Unavailable, format!("{whom} did not answer in {} s", patience.as_secs())))
    })
}

#[async_trait]
impl Workers for Worker {
    async fn create(&self, context: &SignedContext, new: NewFile) -> Result<(bool, FileStatus), Refusal> {
        let session = self.parts.access.require(context, Scope::Write)?;
        self.parts.rates.take(&session, 0).await?;
        let record = MetadataRecord::new(session.tenant, new.id, new.fields.clone())
            .map_err(|error| refusal::of_metadata(&error))?;
        if let Some(passage) = self.place(&session, new.way, record.file_id(), None, 0).await? {
            match passage.workers.create(context, NewFile { way: Way::Passed, ..new.clone() }).await {
                Err(refusal) if is_no_verdict(&refusal) => passage.failed(&refusal),
                created => return created,
            }
        }
        self.ask(self.parts.slots.create(context, record, new.home, Used::default())).await
    }

    async fn admit_whole(&self, context: &SignedContext, id: ClientFileId, len: u64) -> Result<(), Refusal> {
        let session = self.parts.access.require(context, Scope::Write)?;
        self.parts.rates.take(&session, len).await?;
        self.ask(self.parts.slots.admit_more(context, id, len, Used::default())).await
    }

    async fn create_whole(
        &self,
        context: &SignedContext,
        new: NewFile,
        bytes: Bytes,
    ) -> Result<(bool, FileStatus), Refusal> {
        let session = self.parts.access.require(context, Scope::Write)?;
        let (id, len) = (new.id, bytes.len() as u64);
        let fields = MetadataFields { size: Some(len), ..new.fields.clone() };
        let record =
            MetadataRecord::new(session.tenant, id, fields).map_err(|error| refusal::of_metadata(&error))?;
        if let Some(passage) = self.place(&session, new.way, record.file_id(), None, len).await? {
            let passed = NewFile { way: Way::Passed, ..new.clone() };
            match passage.workers.create_whole(context, passed, bytes.clone()).await {
                Err(refusal) if is_no_verdict(&refusal) => passage.failed(&refusal),
                created => {
                    if created.is_ok() {
                        passage.elsewhere.passed(passage.dc, len);
                    }
                    return created;
                }
            }
        }
        if new.home.as_ref().is_none_or(|home| *home == self.parts.dc) {
            self.rate.take(len).await?;
            let whole =
                self.parts.slots.create_whole(context, record.clone(), bytes.clone(), Used::default());
            if let Some(done) = self.ask(whole).await? {
                return Ok(done);
            }
        }
        // Something of it is here, or it is to be assembled elsewhere: it comes like any other file.
        let (is_new, status) =
            self.ask(self.parts.slots.create(context, record, new.home, Used::default())).await?;
        if let (Ok(start), true) = (ChunkIndex::new(0), len > 0 && status.state < State::Assembled) {
            let body: ByteStream = Box::pin(futures_util::stream::once(async move { Ok(bytes) }));
            let put = PutChunks { id, start, len, expected: None, body, way: Way::Passed };
            self.take_chunks(context, put).await?;
        }
        let wait = Wait { state: State::Assembled, timeout: ASSEMBLY_PATIENCE };
        Ok((is_new, self.wait_for(context, id, Some(wait)).await?))
    }

    async fn settle(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal> {
        let session = self.parts.access.require(context, Scope::Write)?;
        self.parts.rates.take(&session, 0).await?;
        self.ask(self.parts.slots.settle(context, id, size)).await
    }

    async fn put_chunks(&self, context: &SignedContext, put: PutChunks) -> Result<ChunkReceipt, Refusal> {
        let session = self.parts.access.require(context, Scope::Write)?;
        self.parts.rates.take(&session, put.len).await?;
        self.take_chunks(context, put).await
    }

    async fn status(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal> {
        let session = self.parts.access.require(context, Scope::Read)?;
        self.parts.rates.take(&session, 0).await?;
        self.wait_for(context, id, wait).await
    }

    async fn list(&self, context: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal> {
        let session = self.parts.access.require(context, Scope::Read)?;
        self.parts.rates.take(&session, 0).await?;
        self.ask(self.parts.slots.list(context, query)).await
    }

    async fn open(&self, context: &SignedContext, id: ClientFileId) -> Result<Opened, Refusal> {
        self.parts.access.require(context, Scope::Read)?;
        self.ask(self.parts.slots.open(context, id)).await
    }

    async fn read(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        range: Range<u64>,
    ) -> Result<ByteStream, Refusal> {
        let session = self.parts.access.require(context, Scope::Read)?;
        let file = FileId::derive(session.tenant, id);
        self.parts.rates.take(&session, range.end.saturating_sub(range.start)).await?;
        read::stream(self.parts.clone(), self.settings.clone(), context.clone(), id, file, range).await
    }

    async fn tree(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        place: Place,
    ) -> Result<TreeNode, Refusal> {
        let session = self.parts.access.require(context, Scope::Read)?;
        self.parts.rates.take(&session, 0).await?;
        self.ask(self.parts.slots.tree(context, id, place)).await
    }

    async fn remove(&self, context: &SignedContext, id: ClientFileId) -> Result<(), Refusal> {
        let session = self.parts.access.require(context, Scope::Delete)?;
        self.parts.rates.take(&session, 0).await?;
        self.ask(self.parts.slots.remove(context, id)).await
    }

    async fn about(&self, context: &SignedContext) -> Result<About, Refusal> {
        self.parts.access.verify(context)?;
        self.ask(self.parts.slots.about(context)).await
    }

    async fn drain(&self, context: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        self.parts.access.require(context, Scope::Operate)?;
        if let (DrainOrder::Begin { to, phase, evacuate, .. }, Some(elsewhere)) =
            (&order, &self.parts.elsewhere)
        {
            // Whether there is such a datacenter is for others to say, and what is none of theirs first.
            let trial =
                DrainOrder::Begin { to: to.clone(), phase: *phase, evacuate: *evacuate, is_trial: true };
            self.ask(self.parts.slots.drain(context, trial)).await?;
            if !elsewhere.has_way_to(to) {
                let detail = format!("the workers of this datacenter know no way to {to}");
                let hint = format!("say in their files where it is: [peers.{to}], with url or workers");
                return Err(Refusal::new(Problem::Precondition, detail).hint(hint));
            }
        }
        let status = self.ask(self.parts.slots.drain(context, order)).await?;
        // What the aggregator heard last from all workers may be older than what flows by way of this one.
        Ok(DrainStatus { bodies: status.bodies.max(self.bodies.used() as u64), ..status })
    }

    async fn leaving(&self) -> Result<Leaving, Refusal> {
        let Some(elsewhere) = &self.parts.elsewhere else { return Ok(Leaving::default()) };
        elsewhere.leaving().ok_or_else(|| {
            Refusal::new(Problem::Unavailable, "whether this datacenter drains is not known yet")
        })
    }
}
