//! [`ChunkStore`], from process to process: of the worker that owns the volume, for the aggregator that has a share of it.
//!
//! A [`RemoteStore`] is one [tenure](crate::tenure), and ends with it. What only looks is asked again when no answer came.
//! What changes the store is asked again only if it cannot have been done; when that is not known, the tenure is given
//! up: whoever had the store begins anew, and reads what is there. So a store in another process never does something
//! twice, late, or in another order, and nobody goes on with a wrong idea of it.

mod errors;
mod forms;
mod keeper;
mod run;
mod serve;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, Bytes};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, FileId, Generation, TenantId};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;
use sluice_node::clock::random_bytes;
use sluice_node::shutdown::Shutdown;
use sluice_proto::problem::Refusal;
use sluice_store::{
    ChunkStore, Chunks, FileSummary, Found, Listed, MAX_FACTS_LEN, MAX_MARK_LEN, MAX_PAGE_LEN, MAX_STATE_LEN,
    RecordOutcome, RunWriter, StoreError, Usage, Whole, WholeOutcome,
};
use tokio::sync::{Mutex as AsyncMutex, oneshot, watch};
use tokio::time::Instant;

use self::forms::{
    Answered, Begin, Begun, Chunk, ChunksOf, Facts, File, Floor, List, ListOf, Numbered, OfShare, Part,
    Record, Refused, Rooted, WireFound, WireListed, WireOutcome, WireSummary, WireUsage, bytes,
    decode_values, file, ranges, root, text,
};
pub use self::keeper::{RemoteKeeper, serve_keeper};
use self::run::RemoteRun;
pub use self::serve::serve_store;
use crate::caller::{Caller, Failed, Head};
use crate::forms::Nothing;
use crate::tenure::{LEASE, Tenure};

const THERE: &str = "/v1/store/there";
const BEGIN: &str = "/v1/store/begin";
const RENEW: &str = "/v1/store/renew";
const END: &str = "/v1/store/end";
const PUT_RECORD: &str = "/v1/store/put-record";
const PUT_SIZE: &str = "/v1/store/put-size";
const PUT_WHOLE: &str = "/v1/store/put-whole";
const PUT_KNOWN: &str = "/v1/store/put-known";
const SUMMARY: &str = "/v1/store/summary";
const LIST: &str = "/v1/store/list";
const LISTED: &str = "/v1/store/listed";
const RUN: &str = "/v1/store/run";
const VALUES: &str = "/v1/store/values";
const READ_CHUNK: &str = "/v1/store/read-chunk";
const VERIFY: &str = "/v1/store/verify";
const DAMAGE: &str = "/v1/store/damage";
const DAMAGED_FILES: &str = "/v1/store/damaged-files";
const PUT_MARK: &str = "/v1/store/put-scrub-mark";
const MARK: &str = "/v1/store/scrub-mark";
const LOSE: &str = "/v1/store/lose";
const PUT_FACTS: &str = "/v1/store/put-facts";
const PUBLISH: &str = "/v1/store/publish";
const RECHECK: &str = "/v1/store/recheck";
const FREE: &str = "/v1/store/free";
const DROP_FILE: &str = "/v1/store/drop-file";
const DISCARD_ORPHAN: &str = "/v1/store/discard-orphan";
const RAISE: &str = "/v1/store/raise-generations";
const PUT_PAGE: &str = "/v1/store/put-page";
const PAGE: &str = "/v1/store/page";
const STATES: &str = "/v1/store/states";
const PUT_STATE: &str = "/v1/store/put-state";

/// The shortest and the longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Chunks that are lost in one call.
const LOST_AT_ONCE: usize = 65_536;

/// A tenure that did not begin.
#[derive(Debug, thiserror::Error)]
pub enum NoTenure {
    /// Another aggregator has it.
    #[error("another aggregator has it")]
    Taken,
    /// Another began under this fence, which is higher.
    #[error("the fence is below {0}, under which another aggregator had it")]
    Fence(u64),
    /// There is no such share: the worker was told of another number of them.
    #[error("the worker divides slots otherwise than this process does: give both the same keys")]
    Divided,
    /// The worker cannot be asked.
    #[error("the worker cannot be asked: {0}")]
    Unreachable(String),
}

/// The store of another process, for as long as a tenure stands. A clone means the same.
#[derive(Clone)]
pub struct RemoteStore(Arc<Inner>);

struct Inner {
    caller: Caller,
    tenure: Tenure,
    usage: Mutex<Usage>,
    /// Whether the tenure has ended.
    over: watch::Sender<bool>,
    /// Whether it is being given back.
    closed: AtomicBool,
    /// Runs under way.
    runs: watch::Sender<usize>,
    /// What is known of files is replaced in the order in which it is said, also by whom nobody waits for any more.
    facts: Arc<AsyncMutex<()>>,
    tasks: Shutdown,
}

impl fmt::Debug for RemoteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteStore({:?})", self.0.tenure)
    }
}

/// What a call does to the store.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    /// It looks.
    Look,
    /// It changes something.
    Change,
}

impl RemoteStore {
    /// Begins a tenure of a share with the worker that `caller` calls; under the fence that came with the lease of the
    /// share, if there is one. It is kept by a task on `tasks`.
    pub async fn begin(
        caller: Caller,
        share: Share,
        fence: Option<u64>,
        tasks: &Shutdown,
    ) -> Result<Self, NoTenure> {
        let arguments = Begin { of: OfShare::of(share), fence };
        let begun = caller.ask::<Answered<Begun>>(Head::own(BEGIN), &arguments, Bytes::new(), Duration::ZERO);
        let garbled = |what: String| NoTenure::Unreachable(what);
        let Begun { tenure, usage } = match begun.await {
            Ok(Ok(begun)) => begun,
            Ok(Err(Refused::NotHeld)) => return Err(NoTenure::Taken),
            Ok(Err(Refused::NoShare)) => return Err(NoTenure::Divided),
            Ok(Err(Refused::Fence(highest))) => return Err(NoTenure::Fence(highest)),
            Ok(Err(refused)) => return Err(garbled(format!("{refused:?}"))),
            Err(failed) => return Err(garbled(Refusal::from(failed).detail)),
        };
        let tenure = tenure.parse().map_err(|_| garbled("an answer that makes no sense".into()))?;
        let this = Self(Arc::new(Inner {
            caller,
            tenure,
            usage: Mutex::new(usage.into()),
            over: watch::Sender::new(false),
            closed: AtomicBool::new(false),
            runs: watch::Sender::new(0),
            facts: Arc::default(),
            tasks: tasks.clone(),
        }));
        tasks.spawn(this.clone().keep());
        Ok(this)
    }

    /// Whether the worker that `caller` calls answers.
    pub async fn is_there(caller: &Caller) -> bool {
        let there = caller.ask::<Nothing>(Head::own(THERE), &Nothing {}, Bytes::new(), Duration::ZERO);
        // Whoever refuses answers.
        matches!(there.await, Ok(_) | Err(Failed::Refused(_)))
    }

    /// The tenure.
    pub fn tenure(&self) -> Tenure {
        self.0.tenure
    }

    /// Returns once the tenure has ended.
    pub async fn over(&self) {
        // The sender lives as long as this does.
        let _ = self.0.over.subscribe().wait_for(|over| *over).await;
    }

    /// Renews the tenure until it ends.
    async fn keep(self) {
        let mut kept = Instant::now();
        while !*self.0.over.borrow() {
            let call = Head::own(RENEW).under(self.0.tenure);
            let renewed =
                self.0.caller.ask::<Answered<WireUsage>>(call, &Nothing {}, Bytes::new(), Duration::ZERO);
            let renewed = tokio::select! {
                renewed = tokio::time::timeout(LEASE, renewed) => renewed,
                () = self.over() => return,
            };
            match renewed {
                Ok(Ok(Ok(usage))) => {
                    kept = Instant::now();
                    *self.0.usage.lock().unwrap_or_else(PoisonError::into_inner) = usage.into();
                }
                Ok(Ok(Err(_))) => return self.give_up("the worker no longer knows it"),
                Ok(Err(_)) | Err(_) if kept.elapsed() >= LEASE => {
                    return self.give_up("the worker does not answer");
                }
                Ok(Err(_)) | Err(_) => tokio::time::sleep(PAUSES.1 / 4).await,
            }
        }
    }

    fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Relaxed)
    }

    /// Replaces what is known of a file.
    async fn replace(&self, path: &'static str, facts: Facts) -> Result<(), StoreError> {
        let turn = self.0.facts.clone().lock_owned().await;
        let (sender, done) = oneshot::channel();
        let this = self.clone();
        self.0.tasks.spawn(async move {
            let replaced = this.change(path, &facts).await;
            drop(turn);
            // Whoever said it may have gone.
            let _ = sender.send(replaced);
        });
        done.await.unwrap_or_else(|_| Err(self.ended()))
    }

    /// What is answered when the tenure has ended.
    fn ended(&self) -> StoreError {
        if self.is_closed() { StoreError::Closing } else { unreachable("this aggregator no longer has it") }
    }

    fn give_up(&self, why: &str) {
        if !self.0.over.send_replace(true) {
            tracing::warn!(why, "the store is given up");
        }
    }

    /// Makes a call. Its answer is bytes.
    async fn call(
        &self,
        does: Does,
        path: &'static str,
        arguments: &impl Serialize,
        bytes: Bytes,
    ) -> Result<Bytes, StoreError> {
        let mut pause = PAUSES.0;
        loop {
            let call = Head::own(path).under(self.0.tenure);
            if *self.0.over.borrow() || (self.is_closed() && path != END) {
                return Err(self.ended());
            }
            let answer = tokio::select! {
                answer = self.0.caller.ask_bytes(call, arguments, bytes.clone(), Duration::ZERO) => answer,
                () = self.over() => return Err(self.ended()),
            };
            match answer {
                Ok(answer) => return Ok(answer),
                Err(Failed::Unknown(refusal)) if does == Does::Change => {
                    self.give_up("nobody knows what became of a change");
                    return Err(unreachable(refusal));
                }
                // Nothing was done, or only looked for; the tenure ends soon if nobody is there.
                Err(Failed::Refused(_) | Failed::Unreached(_) | Failed::Unknown(_)) => {}
            }
            let jitter = u32::from(random_bytes::<1>()[0]);
            tokio::select! {
                () = tokio::time::sleep(pause + pause * jitter / 512) => {}
                () = self.over() => return Err(self.ended()),
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn ask<A: DeserializeOwned>(
        &self,
        does: Does,
        path: &'static str,
        arguments: &impl Serialize,
        bytes: Bytes,
    ) -> Result<A, StoreError> {
        let answer = self.call(does, path, arguments, bytes).await?;
        self.answered(serde_json::from_slice(&answer))
    }

    async fn look<A: DeserializeOwned>(
        &self,
        path: &'static str,
        arguments: &impl Serialize,
    ) -> Result<A, StoreError> {
        self.ask(Does::Look, path, arguments, Bytes::new()).await
    }

    async fn change<A: DeserializeOwned>(
        &self,
        path: &'static str,
        arguments: &impl Serialize,
    ) -> Result<A, StoreError> {
        self.ask(Does::Change, path, arguments, Bytes::new()).await
    }

    /// Looks for bytes.
    async fn bytes(
        &self,
        path: &'static str,
        arguments: &impl Serialize,
    ) -> Result<Option<Bytes>, StoreError> {
        let mut answer = self.call(Does::Look, path, arguments, Bytes::new()).await?;
        match answer.try_get_u8() {
            Ok(0) => Ok(Some(answer)),
            Ok(2) => Ok(None),
            Ok(1) => Err(self.refused(serde_json::from_slice(&answer))),
            Ok(_) | Err(_) => Err(unreachable("an answer that makes no sense")),
        }
    }

    fn answered<A>(&self, answer: serde_json::Result<Answered<A>>) -> Result<A, StoreError> {
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(refused)) => Err(self.refused(Ok(refused))),
            Err(error) => Err(self.refused(Err(error))),
        }
    }

    fn refused(&self, refused: serde_json::Result<Refused>) -> StoreError {
        match refused {
            Ok(Refused::Store(error)) => error.parse().unwrap_or_else(unreachable),
            Ok(Refused::NotHeld | Refused::NoShare | Refused::Fence(_)) => {
                self.give_up("another has it");
                self.ended()
            }
            Ok(Refused::Garbled(what)) => unreachable(what),
            Err(error) => {
                // It may have been done, and nobody can tell.
                self.give_up("an answer makes no sense");
                unreachable(error)
            }
        }
    }
}

fn unreachable(why: impl fmt::Display) -> StoreError {
    StoreError::Unreachable { reason: why.to_string() }
}

/// Refuses what is too large before it is sent.
fn limit(what: &'static str, got: usize, limit: usize) -> Result<(), StoreError> {
    if got > limit { Err(StoreError::TooLarge { what: what.into(), got, limit }) } else { Ok(()) }
}

fn of(file: FileId) -> File {
    File { file: file.to_string() }
}

#[async_trait]
impl Chunks for RemoteStore {
    async fn begin_run(
        &self,
        file: FileId,
        tenant: TenantId,
        run: Run,
        len: u64,
    ) -> Result<Box<dyn RunWriter>, StoreError> {
        RemoteRun::begin(self.clone(), file, tenant, run, len).await
    }

    async fn values(
        &self,
        file: FileId,
        range: Range<u64>,
    ) -> Result<Vec<Option<ChainingValue>>, StoreError> {
        let arguments = Part { file: file.to_string(), start: range.start, end: range.end };
        let found = self.bytes(VALUES, &arguments).await?.unwrap_or_default();
        decode_values(&found).map_err(unreachable)
    }

    async fn read_chunk(&self, file: FileId, index: ChunkIndex) -> Result<Bytes, StoreError> {
        let arguments = Chunk { file: file.to_string(), index: index.number() };
        self.bytes(READ_CHUNK, &arguments).await?.ok_or(StoreError::Missing { index })
    }
}

#[async_trait]
impl ChunkStore for RemoteStore {
    async fn put_record(&self, record: &MetadataRecord) -> Result<RecordOutcome, StoreError> {
        let arguments = Record { record: text(&record.to_bytes()), facts: String::new() };
        let outcome: WireOutcome = self.change(PUT_RECORD, &arguments).await?;
        outcome.of_record().map_err(unreachable)
    }

    async fn put_size(&self, file: FileId, size: Geometry) -> Result<(), StoreError> {
        self.change(PUT_SIZE, &Numbered { file: file.to_string(), number: size.size() }).await
    }

    async fn put_whole(
        &self,
        record: &MetadataRecord,
        facts: &[u8],
        whole: Whole,
    ) -> Result<WholeOutcome, StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        let arguments = Record { record: text(&record.to_bytes()), facts: text(facts) };
        let put = self.ask::<WireOutcome>(Does::Change, PUT_WHOLE, &arguments, whole.bytes().clone());
        put.await.map(Into::into)
    }

    async fn put_known(&self, record: &MetadataRecord, facts: &[u8]) -> Result<WholeOutcome, StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        let arguments = Record { record: text(&record.to_bytes()), facts: text(facts) };
        self.change::<WireOutcome>(PUT_KNOWN, &arguments).await.map(Into::into)
    }

    async fn summary(&self, file: FileId) -> Result<Option<FileSummary>, StoreError> {
        let found: Option<WireSummary> = self.look(SUMMARY, &of(file)).await?;
        found.map(WireSummary::parse).transpose().map_err(unreachable)
    }

    async fn list(&self, after: Option<FileId>, limit: usize) -> Result<Vec<Found>, StoreError> {
        let arguments = List { after: after.map(|file| file.to_string()), limit };
        let found: Vec<WireFound> = self.look(LIST, &arguments).await?;
        found.into_iter().map(WireFound::parse).collect::<Result<_, _>>().map_err(unreachable)
    }

    async fn listed(
        &self,
        tenant: TenantId,
        after: Option<ClientFileId>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let arguments = ListOf { tenant: tenant.number(), after: after.map(ClientFileId::uuid), limit };
        let found: Vec<WireListed> = self.look(LISTED, &arguments).await?;
        found.into_iter().map(WireListed::parse).collect::<Result<_, _>>().map_err(unreachable)
    }

    async fn verify(&self, file: FileId, index: ChunkIndex) -> Result<u64, StoreError> {
        // Once more finds the same.
        self.look(VERIFY, &Chunk { file: file.to_string(), index: index.number() }).await
    }

    async fn damage(&self, file: FileId) -> Result<Vec<Range<u64>>, StoreError> {
        let found: Vec<(u64, u64)> = self.look(DAMAGE, &of(file)).await?;
        ranges(&found).map_err(unreachable)
    }

    async fn damaged_files(&self) -> Result<Vec<FileId>, StoreError> {
        let found: Vec<String> = self.look(DAMAGED_FILES, &Nothing {}).await?;
        found.iter().map(|id| file(id)).collect::<Result<_, _>>().map_err(unreachable)
    }

    async fn put_scrub_mark(&self, share: Share, mark: &[u8]) -> Result<(), StoreError> {
        limit("mark of a scrub", mark.len(), MAX_MARK_LEN)?;
        self.ask(Does::Change, PUT_MARK, &OfShare::of(share), Bytes::copy_from_slice(mark)).await
    }

    async fn scrub_mark(&self, share: Share) -> Result<Option<Vec<u8>>, StoreError> {
        let found: Option<String> = self.look(MARK, &OfShare::of(share)).await?;
        found.as_deref().map(bytes).transpose().map_err(unreachable)
    }

    async fn lose(&self, file: FileId, chunks: &[ChunkIndex]) -> Result<Generation, StoreError> {
        let file = file.to_string();
        let (mut rest, mut generation) = (chunks, None);
        while generation.is_none() || !rest.is_empty() {
            let (some, others) = rest.split_at(rest.len().min(LOST_AT_ONCE));
            let chunks = some.iter().map(|index| index.number()).collect();
            let arguments = ChunksOf { file: file.clone(), chunks };
            (rest, generation) = (others, Some(self.change(LOSE, &arguments).await?));
        }
        Ok(Generation::new(generation.unwrap_or_default()))
    }

    async fn put_facts(&self, file: FileId, facts: &[u8]) -> Result<(), StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        let arguments = Facts { file: file.to_string(), tenant: None, facts: text(facts) };
        self.replace(PUT_FACTS, arguments).await
    }

    async fn publish(&self, file: FileId, root: Root) -> Result<(), StoreError> {
        self.change(PUBLISH, &Rooted { file: file.to_string(), root: root.to_string() }).await
    }

    async fn recheck(&self, file: FileId) -> Result<Root, StoreError> {
        let found: String = self.look(RECHECK, &of(file)).await?;
        root(&found).map_err(unreachable)
    }

    async fn free(&self, file: FileId) -> Result<Generation, StoreError> {
        self.change(FREE, &of(file)).await.map(Generation::new)
    }

    async fn drop_file(&self, file: FileId, tenant: TenantId, facts: &[u8]) -> Result<(), StoreError> {
        limit("facts of a file", facts.len(), MAX_FACTS_LEN)?;
        let tenant = Some(tenant.number());
        self.replace(DROP_FILE, Facts { file: file.to_string(), tenant, facts: text(facts) }).await
    }

    async fn discard_orphan(&self, file: FileId) -> Result<bool, StoreError> {
        self.change(DISCARD_ORPHAN, &of(file)).await
    }

    async fn raise_generations(&self, share: Share, floor: Generation) -> Result<(), StoreError> {
        self.change(RAISE, &Floor { of: OfShare::of(share), number: floor.number() }).await
    }

    async fn put_page(&self, file: FileId, segment: u64, page: &[u8]) -> Result<(), StoreError> {
        limit("page", page.len(), MAX_PAGE_LEN)?;
        let arguments = Numbered { file: file.to_string(), number: segment };
        self.ask(Does::Change, PUT_PAGE, &arguments, Bytes::copy_from_slice(page)).await
    }

    async fn page(&self, file: FileId, segment: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let arguments = Numbered { file: file.to_string(), number: segment };
        Ok(self.bytes(PAGE, &arguments).await?.map(Vec::from))
    }

    async fn states(&self) -> Result<BTreeMap<Share, Vec<u8>>, StoreError> {
        let found: Vec<(String, String)> = self.look(STATES, &Nothing {}).await?;
        let parse = |(share, state): (String, String)| {
            let share = share.parse().map_err(|_| unreachable("an answer that makes no sense"))?;
            Ok((share, bytes(&state).map_err(unreachable)?))
        };
        found.into_iter().map(parse).collect()
    }

    async fn put_state(&self, share: Share, state: &[u8]) -> Result<(), StoreError> {
        limit("state", state.len(), MAX_STATE_LEN)?;
        self.ask(Does::Change, PUT_STATE, &OfShare::of(share), Bytes::copy_from_slice(state)).await
    }

    fn usage(&self) -> Usage {
        *self.0.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the tenure once the runs under way have, so that another may begin at once.
    async fn close(&self) -> Result<(), StoreError> {
        if self.0.closed.swap(true, Ordering::Relaxed) || *self.0.over.borrow() {
            return Ok(());
        }
        let ended = async {
            // The sender lives as long as this does.
            let _ = self.0.runs.subscribe().wait_for(|runs| *runs == 0).await;
        };
        tokio::select! {
            () = ended => {}
            () = self.over() => return Ok(()),
        }
        let ended = self.change::<()>(END, &Nothing {}).await;
        self.0.over.send_replace(true);
        ended
    }
}
