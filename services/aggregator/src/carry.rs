//! Effects that take time, carried out one task each. Results go back to the engine as events; a task that is lost
//! with its process is planned anew from what is known.

use std::ops::Range;
use std::sync::Arc;

use sluice_engine::aggregator::{Effect, Event, NodeEvent, PullOutcome};
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::{ChainingValue, RecordDigest, Root};
use sluice_engine::ids::{DcId, FileId, TenantId};
use sluice_engine::ledger::{FileState, Page};
use sluice_engine::limits::{CHUNK_LEN, MAX_LEVEL, MAX_RUN};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::resolve::resolve;
use sluice_engine::span::{Place, Span};
use sluice_proto::problem::Refusal;
use sluice_store::{AlignedBuffer, RecordOutcome, StoreError, WholeOutcome};
use tracing::{Instrument as _, debug, error, info, warn};

use crate::bulk::{self, Incoming, Values};
use crate::traces::chunks_of;
use crate::{AggregatorService, load};

/// Spans said in answer to one WANT_SPANS: what is in more pieces is asked for again, finer.
const MAX_RESTATED: usize = 64;

/// Pulls under way at once, over all files.
pub(crate) const PULLS: usize = 4;

/// Carries out one effect.
pub(crate) async fn carry(service: Arc<AggregatorService>, effect: Effect) {
    let store = service.parts.store.clone();
    match effect {
        Effect::Wake(file) => {
            // The engine asks again if it is still wanted.
            if let Err(error) = load::wake(&service, file).await {
                error!(%file, %error, "a file at rest cannot be read");
            }
        }
        Effect::FetchRecord { file, from, digest } => fetch_record(&service, file, from, digest).await,
        Effect::Restate { file, to, place } => restate(&service, file, to, place).await,
        Effect::StorePage(file, page) => {
            // A cache: if it is lost, the holders are asked again.
            if let Err(error) = store.put_page(file, page.segment, &page.to_bytes()).await {
                warn!(%file, %error, "a ledger page could not be stored");
            }
        }
        Effect::LoadPage(file, segment) => {
            let page = store.page(file, segment).await.ok().flatten();
            let page = page.and_then(|bytes| Page::from_bytes(&bytes).ok());
            tell(&service, file, Event::PageLoaded { page }).await;
        }
        Effect::Pull { file, from, place, under } => {
            // Never closed.
            let _turn = service.pulls.acquire().await;
            let (dc, whom) = (service.dc_name(service.parts.dc), service.dc_name(from));
            let span = tracing::info_span!("pull", dc, from = whom, %file, %place);
            service.traces.follow(&span, file, &chunks_of(place));
            let outcome = pull(&service, file, from, place, under).instrument(span).await;
            debug!(%file, %place, %from, ?outcome, "pull");
            tell(&service, file, Event::Pulled { place, outcome }).await;
        }
        Effect::ReadRoot(file) => {
            let bytes = match ChunkIndex::new(0) {
                Ok(first) => store.read_chunk(file, first).await.ok(),
                Err(_) => None,
            };
            tell(&service, file, Event::RootRead { root: bytes.map(|bytes| Root::of_bytes(&bytes)) }).await;
        }
        Effect::Publish(file, root) => {
            let span = tracing::info_span!("assemble", dc = service.dc_name(service.parts.dc), %file, %root);
            service.traces.follow(&span, file, &(0..u64::MAX));
            let published = store.publish(file, root).instrument(span).await;
            match &published {
                Ok(()) => info!(%file, %root, "assembled"),
                Err(error) => warn!(%file, %error, "a file cannot be published yet"),
            }
            tell(&service, file, Event::Published { ok: published.is_ok() }).await;
        }
        Effect::Recheck { file, to, nonce } => {
            let root = store.recheck(file).await;
            if let Err(error) = &root {
                error!(%file, %error, "the assembled copy is not good");
            }
            tell(&service, file, Event::Rechecked { to, nonce, root: root.ok() }).await;
        }
        Effect::Free(file) => match store.free(file).await {
            Ok(generation) => {
                info!(%file, "freed: it is assembled and confirmed elsewhere");
                tell(&service, file, Event::Freed { generation }).await;
                // A chunk that came meanwhile is here under the new generation.
                reload(&service, file).await;
            }
            Err(error) => {
                error!(%file, %error, "a copy cannot be freed");
                reload(&service, file).await;
            }
        },
        Effect::Resolve { file, root, others } => {
            let found = own_chunks(&service, file).await;
            let found = found.and_then(|(shape, own)| resolve(shape, root, &own, &others));
            let lost: Vec<Range<u64>> = found.iter().flat_map(|found| found.lost.clone()).collect();
            warn!(%file, %root, ?lost, "own chunks contradict the root");
            tell(&service, file, Event::Resolved { resolution: found }).await;
            let chunks: Vec<ChunkIndex> =
                lost.into_iter().flatten().filter_map(|index| ChunkIndex::new(index).ok()).collect();
            if !chunks.is_empty() {
                if let Err(error) = store.lose(file, &chunks).await {
                    error!(%file, %error, "chunks that contradict the root cannot be removed");
                }
                reload(&service, file).await;
            }
        }
        Effect::DiscardOrphan(file) => match store.discard_orphan(file).await {
            Ok(_) => info!(%file, "chunks that nobody described are discarded"),
            Err(error) => error!(%file, %error, "an orphan cannot be discarded"),
        },
        Effect::Persist(..)
        | Effect::PersistNode(..)
        | Effect::RaiseGenerations(..)
        | Effect::Send(..)
        | Effect::Hello { .. }
        | Effect::Answer { .. }
        | Effect::CloseLink(..)
        | Effect::Drop(..)
        | Effect::Changed(..)
        | Effect::Revoked(..)
        | Effect::Refused { .. } => debug!("applied in order by the ledger task"),
    }
}

async fn tell(service: &AggregatorService, file: FileId, event: Event) {
    service.ledgers.tell(NodeEvent::File(file, event)).await;
}

async fn reload(service: &Arc<AggregatorService>, file: FileId) {
    if let Err(error) = load::reload(service, file).await {
        error!(%file, %error, "a file cannot be loaded");
    }
}

async fn shape_of(service: &AggregatorService, file: FileId) -> Option<(Geometry, Option<TenantId>)> {
    let asked = service.look(file, move |aggregator| {
        let ledger = aggregator.file(file)?.ledger();
        Some((ledger.file()?, ledger.tenant()))
    });
    asked.await.ok().flatten()
}

async fn fetch_record(service: &Arc<AggregatorService>, file: FileId, from: DcId, digest: RecordDigest) {
    let Some(peer) = service.links.peer(from) else {
        return tell(service, file, Event::FetchFailed).await;
    };
    let (stored, tenant) = match bulk::record_from(service, peer, file).await {
        Ok(record) if record.digest() == digest => {
            (store_record(service, file, &record).await, record.tenant())
        }
        Ok(_) => {
            debug!(%file, peer = %peer.name, "a peer has another record");
            return tell(service, file, Event::FetchFailed).await;
        }
        Err(refusal) => {
            debug!(%file, peer = %peer.name, %refusal, "no record");
            return tell(service, file, Event::FetchFailed).await;
        }
    };
    match stored {
        Ok(RecordOutcome::Stored | RecordOutcome::Known) | Err(StoreError::RecordConflict { .. }) => {
            reload(service, file).await;
            // It may have gone to rest before anybody could look.
            let counts = service.clone();
            let listed = service.ledgers.ask(move |aggregator| counts.usage.list(aggregator, tenant, file));
            // Nobody counts once the datacenter stops.
            let _ = listed.await;
        }
        Err(error) => {
            warn!(%file, %error, "a metadata record could not be stored");
            tell(service, file, Event::FetchFailed).await;
        }
    }
}

/// Makes the record of a file durable; that of a small file that is whole elsewhere together with what is known of it.
async fn store_record(
    service: &AggregatorService,
    file: FileId,
    record: &MetadataRecord,
) -> Result<RecordOutcome, StoreError> {
    let store = &service.parts.store;
    if record.geometry().is_some_and(|shape| shape.chunks() <= 1) {
        let me = service.parts.dc;
        let memory = service.ledgers.ask(move |aggregator| {
            let file = aggregator.file(file)?;
            let elsewhere = file.ledger().claim().is_some_and(|claim| claim.home != me);
            (elsewhere && file.state() == FileState::Assembled).then(|| file.memory())
        });
        if let Ok(Some(memory)) = memory.await {
            match store.put_known(record, &memory.to_bytes()).await? {
                WholeOutcome::Stored => return Ok(RecordOutcome::Stored),
                WholeOutcome::Known => return Ok(RecordOutcome::Known),
                WholeOutcome::Begun => {}
            }
        }
    }
    store.put_record(record).await
}

/// Reads what is held under a place, one level or more finer.
async fn restate(service: &Arc<AggregatorService>, file: FileId, to: DcId, place: Place) {
    let Some((shape, _)) = shape_of(service, file).await else { return };
    if place.check(shape).is_err() {
        return;
    }
    let Ok(Some(mut summary)) = service.parts.store.summary(file).await else { return };
    if summary.size.is_none() {
        match load::settled(service, file, &summary, Some(shape)).await {
            Ok(_) => {}
            Err(error) => warn!(%file, %error, "the size of a file could not be stored"),
        }
        let Ok(Some(again)) = service.parts.store.summary(file).await else { return };
        summary = again;
    }
    // Whoever asks for more can ask finer; this datacenter itself takes all there is at once.
    let most = if to == service.parts.dc { usize::MAX } else { MAX_RESTATED };
    let children = place.children(shape).map_or_else(|| vec![place], |(left, right)| vec![left, right]);
    let mut said = Vec::new();
    for child in children {
        match bulk::own_value(service, file, shape, child).await {
            Ok(Some(value)) => said.push(Span::new(child, value)),
            Ok(None) => {
                match load::spans(service.parts.store.as_ref(), file, shape, child.range(shape)).await {
                    Ok(spans) => said.extend(spans.into_iter().take(most)),
                    Err(error) => warn!(%file, %error, "what is held cannot be read"),
                }
            }
            Err(error) => warn!(%file, %error, "what is held cannot be read"),
        }
    }
    tell(service, file, Event::Restated { to, generation: summary.generation, spans: said }).await;
}

/// Pulls what is missing here under a place.
async fn pull(
    service: &Arc<AggregatorService>,
    file: FileId,
    from: DcId,
    place: Place,
    under: Span,
) -> PullOutcome {
    let (Some(peer), Some((shape, Some(tenant)))) = (service.links.peer(from), shape_of(service, file).await)
    else {
        return PullOutcome::Unreachable;
    };
    let peer = peer.clone();
    let values = match bulk::values_from(service, &peer, file, shape, place, under).await {
        Ok(Values::Good(values)) => values,
        Ok(Values::Missing) => return PullOutcome::Missing,
        Ok(Values::Wrong) => {
            service.metrics.integrity_failures.inc();
            warn!(%file, %place, peer = %peer.name, "values do not merge to what the peer says it has");
            return PullOutcome::Mismatch(place);
        }
        Err(refusal) => {
            debug!(%file, %place, %refusal, "pull");
            return PullOutcome::Unreachable;
        }
    };
    let chunks = place.range(shape);
    let held = match service.parts.store.values(file, chunks.clone()).await {
        Ok(held) => held,
        Err(StoreError::NoFile(_)) => vec![None; values.len()],
        Err(_) => return PullOutcome::StoreFailed,
    };
    for missing in missing_ranges(chunks.start, &held) {
        let count = missing.end - missing.start;
        let mut incoming = match Incoming::ask(service, &peer, file, missing.start, count, false).await {
            Ok(incoming) => incoming,
            Err(_) => return PullOutcome::Unreachable,
        };
        for run in runs(missing, shape) {
            if service.parts.tasks.is_draining() {
                return PullOutcome::Unreachable;
            }
            let first = (run.range().start - chunks.start) as usize;
            let expected = values.get(first..first + run.count() as usize).unwrap_or(&[]);
            match pull_run(service, &mut incoming, file, tenant, shape, run, expected).await {
                Ok(()) => {}
                Err(outcome) => return outcome,
            }
        }
    }
    PullOutcome::Done
}

async fn pull_run(
    service: &Arc<AggregatorService>,
    incoming: &mut Incoming,
    file: FileId,
    tenant: TenantId,
    shape: Geometry,
    run: Run,
    expected: &[ChainingValue],
) -> Result<(), PullOutcome> {
    let range = run.range();
    let len = shape.range_len(range.start, range.end);
    let failed = |error: StoreError| {
        warn!(%file, %error, "a pulled chunk could not be stored");
        PullOutcome::StoreFailed
    };
    let mut writer = service.parts.store.begin_run(file, tenant, run, len).await.map_err(failed)?;
    let (mut left, mut chunk) = (len, AlignedBuffer::new());
    while left > 0 {
        let room = left.min(CHUNK_LEN);
        chunk.reserve(room as usize);
        while (chunk.len() as u64) < room {
            let piece = incoming.piece(service, room - chunk.len() as u64).await;
            chunk.extend(&piece.map_err(|refusal: Refusal| {
                debug!(%file, %refusal, "pull");
                PullOutcome::Unreachable
            })?);
        }
        left -= room;
        writer.write(chunk.take()).await.map_err(failed)?;
    }
    match writer.finish(Some(expected)).await {
        Ok(receipt) => {
            let spans = chunk_spans(run, &receipt.values);
            let generation = generation(service, file).await;
            tell(service, file, Event::Stored { generation, spans }).await;
            Ok(())
        }
        Err(StoreError::ValueMismatch { index, .. }) => {
            service.metrics.integrity_failures.inc();
            warn!(%file, %index, "a pulled chunk does not hash to its value");
            Err(PullOutcome::Mismatch(Place::of_chunk(index)))
        }
        Err(error) => Err(failed(error)),
    }
}

/// The spans of single chunks.
pub(crate) fn chunk_spans(run: Run, values: &[ChainingValue]) -> Vec<Span> {
    (0..).zip(values).map(|(i, value)| Span::new(Place::of_chunk(run.index(i)), *value)).collect()
}

/// The generation under which what is stored now is held.
pub(crate) async fn generation(service: &AggregatorService, file: FileId) -> sluice_engine::ids::Generation {
    service.look(file, move |aggregator| aggregator.generation(file)).await.unwrap_or_default()
}

/// The values of every chunk of a file, if all are here.
async fn own_chunks(service: &AggregatorService, file: FileId) -> Option<(Geometry, Vec<ChainingValue>)> {
    let (shape, _) = shape_of(service, file).await?;
    let mut own = Vec::new();
    for place in Place::tile(0..shape.chunks(), sluice_engine::limits::SEGMENT_LEVEL.min(MAX_LEVEL), shape) {
        let values = service.parts.store.values(file, place.range(shape)).await.ok()?;
        own.extend(values.into_iter().collect::<Option<Vec<_>>>()?);
    }
    Some((shape, own))
}

/// The ranges of chunks without a value.
fn missing_ranges(start: u64, held: &[Option<ChainingValue>]) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (index, value) in (start..).zip(held) {
        if value.is_none() {
            match ranges.last_mut() {
                Some(last) if last.end == index => last.end += 1,
                Some(_) | None => ranges.push(index..index + 1),
            }
        }
    }
    ranges
}

/// A range cut into runs, each as long as alignment allows.
fn runs(range: Range<u64>, shape: Geometry) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut at = range.start;
    let end = range.end.min(shape.chunks());
    while at < end {
        let mut count = u64::from(MAX_RUN);
        while count > 1 && (!at.is_multiple_of(count) || at + count > end) {
            count /= 2;
        }
        let Some(run) = ChunkIndex::new(at).ok().and_then(|start| Run::new(start, count).ok()) else { break };
        runs.push(run);
        at += count;
    }
    runs
}
