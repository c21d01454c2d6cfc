//! From the chunk store to ledgers: after a start for every file, later for one that was at rest, or whose store changed
//! under it (G5).

use std::ops::Range;
use std::sync::Arc;

use futures_util::StreamExt;
use sluice_engine::aggregator::{Aggregator, Brief, Event, FileMemory, NodeEvent, RecordSummary, StoredFile};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::FileId;
use sluice_engine::limits::{MAX_LEVEL, SEGMENT_CHUNKS};
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{SpanTree, merge_chunks};
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::{ChunkStore, FileSummary, Found, StoreError};
use tracing::{error, info};

use crate::slots::ATTEMPTS;
use crate::{AggregatorError, AggregatorService};

/// Files found in one go at start.
const PAGE: usize = 10_000;

/// Files read at once at start: enough to keep a disk busy, few enough that requests get their turn.
const READERS: usize = 16;

/// Chunks of a file that are given up in one go.
const LOST_AT_ONCE: usize = 4096;

/// How long a request that needs all files waits for them after a start.
const LOAD_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// Gives every file of the store to the engine, in the background: files at rest by their briefs, the others one by one.
/// Whoever asks for a file before its turn has it loaded then ([`wake`]).
pub(crate) async fn load_all(service: Arc<AggregatorService>) {
    let began = std::time::Instant::now();
    let share = service.parts.share;
    let mut after = share.before();
    let (mut resting, mut read) = (0, 0);
    loop {
        let found = match service.parts.store.list(after, PAGE).await {
            Ok(found) => found,
            // What is not known yet is read when somebody asks for it; the rest of the work can wait.
            Err(failed) => {
                error!(%failed, "the files of the store cannot be listed; it is tried again");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                continue;
            }
        };
        after = found.last().map(|last| last.file).filter(|last| found.len() == PAGE && share.has(*last));
        let found: Vec<Found> = found.into_iter().filter(|found| share.has(found.file)).collect();
        let me = service.parts.dc;
        let brief = |found: &Found| {
            Brief::from_bytes(&found.brief?).filter(|brief| brief.is_at_rest(me, found.whole))
        };
        let (at_rest, others): (Vec<_>, Vec<_>) =
            found.iter().map(|found| (found.file, brief(found))).partition(|(_, brief)| brief.is_some());
        resting += at_rest.len();
        read += others.len();
        let at_rest = at_rest.into_iter().filter_map(|(file, brief)| Some((file, brief?))).collect();
        service.ledgers.tell(NodeEvent::AtRest(at_rest)).await;
        futures_util::stream::iter(others)
            .for_each_concurrent(READERS, async |(file, _)| {
                let is_asleep = service.ledgers.ask(move |aggregator| aggregator.is_asleep(file)).await;
                if matches!(is_asleep, Ok(true))
                    && let Err(failed) = wake(&service, file).await
                {
                    // One damaged file must not keep the others from being served.
                    error!(%file, %failed, "a file of the store cannot be loaded");
                }
            })
            .await;
        if after.is_none() {
            break;
        }
    }
    service.ledgers.tell(NodeEvent::AllLoaded).await;
    // The engine has taken it once it answers.
    let _ = service.ledgers.ask(|aggregator| aggregator.is_loading()).await;
    service.loaded.send_replace(true);
    info!(%share, resting, read, seconds = began.elapsed().as_secs_f64(), "all files are known");
}

/// Tells the engine what the store has of a file that is asleep.
pub(crate) async fn wake(service: &AggregatorService, file: FileId) -> Result<(), AggregatorError> {
    let event = match stored(service, file, None).await? {
        // A crash came between a record and the home that goes with it. This need not be the home: others
        // are asked, or whoever creates the file asks again, since nobody was told that it exists.
        Some(stored) if stored.record.is_some() && stored.memory.claim().is_none() => {
            Event::Loaded(StoredFile { record: None, spans: Vec::new(), ..stored })
        }
        Some(stored) => Event::Loaded(stored),
        None => Event::Absent,
    };
    service.ledgers.settle(file, event).await.map_err(|_| AggregatorError::Stopped)
}

impl AggregatorService {
    /// Asks the engine of a file, which is loaded first if it is asleep.
    pub(crate) async fn look<T: Send + 'static>(
        &self,
        file: FileId,
        question: impl FnOnce(&Aggregator) -> T + Clone + Send + 'static,
    ) -> Result<T, Refusal> {
        for _ in 0..ATTEMPTS {
            let question = question.clone();
            let asked =
                self.ledgers.ask(
                    move |aggregator| {
                        if aggregator.is_asleep(file) { None } else { Some(question(aggregator)) }
                    },
                );
            match asked.await? {
                Some(answer) => return Ok(answer),
                None => wake(self, file).await?,
            }
        }
        Err(Refusal::new(Problem::Unavailable, "the file could not be looked at in time"))
    }

    /// Waits until every file of the store is known.
    pub(crate) async fn loaded(&self) -> Result<(), Refusal> {
        let mut loaded = self.loaded.subscribe();
        match tokio::time::timeout(LOAD_PATIENCE, loaded.wait_for(|loaded| *loaded)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Refusal::new(
                Problem::Unavailable,
                "the files of this datacenter are being read after a start",
            )
            .retry_after(LOAD_PATIENCE)),
        }
    }
}

/// Tells the engine again what the store has of a file.
pub(crate) async fn reload(service: &Arc<AggregatorService>, file: FileId) -> Result<bool, AggregatorError> {
    let known =
        service.ledgers.ask(move |aggregator| aggregator.file(file).and_then(|file| file.ledger().file()));
    let shape = known.await.map_err(|_| AggregatorError::Stopped)?;
    let Some(stored) = stored(service, file, shape).await? else { return Ok(false) };
    service.ledgers.settle(file, Event::Loaded(stored)).await.map_err(|_| AggregatorError::Stopped)?;
    Ok(true)
}

/// What the store has of a file, as the engine wants it. Chunks of a file that is not published whose values cannot be read
/// are lost: nothing says what they should be.
async fn stored(
    service: &AggregatorService,
    file: FileId,
    shape: Option<Geometry>,
) -> Result<Option<StoredFile>, AggregatorError> {
    loop {
        match stored_once(service, file, shape).await {
            Err(AggregatorError::Store(StoreError::Corrupt { index, .. }))
                if lose_unreadable(service, file, index).await? => {}
            stored => return stored,
        }
    }
}

/// Forgets chunks of a file that is not published whose values cannot be read, from `first` on, many at a time. Whether
/// there were any.
async fn lose_unreadable(
    service: &AggregatorService,
    file: FileId,
    first: ChunkIndex,
) -> Result<bool, StoreError> {
    let store = &service.parts.store;
    let Some(summary) = store.summary(file).await?.filter(|summary| summary.published.is_none()) else {
        return Ok(false);
    };
    let mut lost = Vec::new();
    let held = summary.held.iter().flat_map(|range| range.start.max(first.number())..range.end);
    for chunk in held {
        if lost.len() == LOST_AT_ONCE {
            break;
        }
        if let Err(StoreError::Corrupt { index, .. }) = store.values(file, chunk..chunk + 1).await {
            lost.push(index);
        }
    }
    if lost.is_empty() {
        return Ok(false);
    }
    error!(%file, chunks = lost.len(), "values cannot be read: their chunks are lost, and have to be sent again");
    store.lose(file, &lost).await?;
    Ok(true)
}

async fn stored_once(
    service: &AggregatorService,
    file: FileId,
    shape: Option<Geometry>,
) -> Result<Option<StoredFile>, AggregatorError> {
    let store = &service.parts.store;
    let Some(summary) = store.summary(file).await? else { return Ok(None) };
    let memory = FileMemory::from_bytes(&summary.facts)?;
    if let Some(record) = &summary.record
        && !summary.in_log
        && memory.facts().iter().all(|fact| !matches!(fact, sluice_engine::ledger::Fact::Drop { .. }))
    {
        service.catalogue.add(record.tenant(), record.client_id(), file);
    }
    let shape = settled(service, file, &summary, memory.size().or(shape)).await?;
    let summary = match shape {
        // What the size proves impossible has gone.
        Some(_) if summary.size.is_none() => store.summary(file).await?.unwrap_or(summary),
        Some(_) | None => summary,
    };
    let mut tree = SpanTree::new(shape.unwrap_or(Geometry::largest()));
    if let Some(shape) = shape {
        for range in &summary.held {
            for span in spans(store.as_ref(), file, shape, range.clone()).await? {
                // The store holds one value a chunk, so nothing can contradict.
                let _ = tree.insert(span);
            }
        }
    }
    Ok(Some(StoredFile {
        tenant: summary.tenant,
        record: summary.record.as_ref().map(RecordSummary::of),
        size: summary.size,
        memory,
        generation: summary.generation,
        spans: tree.iter().collect(),
        chunks: summary.held.iter().map(|range| range.end - range.start).sum(),
        published: summary.published,
    }))
}

/// The shape of a file. Where only the ledger knows it, having heard of it from elsewhere, the store is told.
pub(crate) async fn settled(
    service: &AggregatorService,
    file: FileId,
    summary: &FileSummary,
    known: Option<Geometry>,
) -> Result<Option<Geometry>, StoreError> {
    if summary.size.is_some() || summary.record.is_none() {
        return Ok(summary.size.or(known));
    }
    let Some(shape) = known else { return Ok(None) };
    match service.parts.store.put_size(file, shape).await {
        // Two sizes: the ledger knows it for a conflict, in which nothing counts.
        Ok(()) | Err(StoreError::SizeConflict { .. } | StoreError::Dropped(_)) => Ok(Some(shape)),
        Err(error) => Err(error),
    }
}

/// The spans that the store's chunk values of a range merge to.
pub(crate) async fn spans(
    store: &dyn ChunkStore,
    file: FileId,
    shape: Geometry,
    range: Range<u64>,
) -> Result<Vec<Span>, StoreError> {
    let mut tree = SpanTree::new(shape);
    let mut at = range.start;
    while at < range.end.min(shape.chunks()) {
        // Blocks end at segment boundaries, so that each is made of few places.
        let end = (at / SEGMENT_CHUNKS + 1).saturating_mul(SEGMENT_CHUNKS).min(range.end).min(shape.chunks());
        let values = store.values(file, at..end).await?;
        for run in held_runs(at, &values) {
            for place in Place::tile(run, MAX_LEVEL, shape) {
                let chunks = place.range(shape);
                let part =
                    values.get((chunks.start - at) as usize..(chunks.end - at) as usize).unwrap_or(&[]);
                let part: Option<Vec<ChainingValue>> = part.iter().copied().collect();
                if let Some(value) = part.and_then(|part| merge_chunks(shape, place, &part)) {
                    let _ = tree.insert(Span::new(place, value));
                }
            }
        }
        at = end;
    }
    Ok(tree.iter().collect())
}

/// The runs of chunks that have a value, among those from `start`.
fn held_runs(start: u64, values: &[Option<ChainingValue>]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (index, value) in (start..).zip(values) {
        if value.is_some() {
            match runs.last_mut() {
                Some(last) if last.end == index => last.end += 1,
                Some(_) | None => runs.push(index..index + 1),
            }
        }
    }
    runs
}

impl From<AggregatorError> for sluice_proto::problem::Refusal {
    fn from(error: AggregatorError) -> Self {
        match error {
            AggregatorError::Store(error) => crate::refusal::of_store(&error),
            AggregatorError::Stopped => crate::refusal::stopping(),
            AggregatorError::Busy { .. }
            | AggregatorError::Listen { .. }
            | AggregatorError::Material(_)
            | AggregatorError::Tls(_)
            | AggregatorError::Memory(_)
            | AggregatorError::Peer(_) => {
                error!(%error, "the aggregator cannot answer");
                Self::new(sluice_proto::problem::Problem::Internal, "the file cannot be read here")
            }
        }
    }
}
