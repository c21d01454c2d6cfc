//! From the chunk store to ledgers: at start for every file, later for one whose store changed under it (G5).

use std::ops::Range;
use std::sync::Arc;

use sluice_engine::aggregator::{Event, FileMemory, NodeEvent, RecordSummary, StoredFile};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::FileId;
use sluice_engine::limits::{MAX_LEVEL, SEGMENT_CHUNKS};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{SpanTree, merge_chunks};
use sluice_store::{ChunkStore, FileSummary, StoreError};
use tracing::error;

use crate::{AggregatorError, AggregatorService};

/// Files read in one go at start.
const PAGE: usize = 1_000;

/// Gives every file of the store to the engine.
pub(crate) async fn load_all(service: &Arc<AggregatorService>) -> Result<(), AggregatorError> {
    let mut after = None;
    loop {
        let files = service.parts.store.list(after, PAGE).await?;
        for &file in &files {
            match stored(service, file, None).await {
                // A crash came between a record and the home that goes with it. This need not be the home: others
                // are asked, or whoever creates the file asks again, since nobody was told that it exists.
                Ok(Some(stored)) if stored.record.is_some() && stored.memory.claim().is_none() => {
                    let stored = StoredFile { record: None, spans: Vec::new(), ..stored };
                    service.ledgers.tell(NodeEvent::File(file, Event::Loaded(stored))).await;
                }
                Ok(Some(stored)) => service.ledgers.tell(NodeEvent::File(file, Event::Loaded(stored))).await,
                Ok(None) => {}
                // One damaged file must not keep the others from being served.
                Err(failed) => error!(%file, %failed, "a file of the store cannot be loaded"),
            }
        }
        after = match files.last() {
            Some(last) if files.len() == PAGE => Some(*last),
            Some(_) | None => return Ok(()),
        };
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

/// What the store has of a file, as the engine wants it.
async fn stored(
    service: &AggregatorService,
    file: FileId,
    shape: Option<Geometry>,
) -> Result<Option<StoredFile>, AggregatorError> {
    let store = &service.parts.store;
    let Some(summary) = store.summary(file).await? else { return Ok(None) };
    let memory = FileMemory::from_bytes(&summary.facts)?;
    if let Some(record) = &summary.record
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
        record: summary.record.as_ref().map(summarise),
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

/// What the engine keeps of a record.
pub(crate) fn summarise(record: &MetadataRecord) -> RecordSummary {
    RecordSummary {
        digest: record.digest(),
        tenant: record.tenant(),
        size: record.geometry(),
        expected_root: record.expected_root(),
        expiry_ms: record.expiry_secs().map(|secs| secs.saturating_mul(1000)),
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
