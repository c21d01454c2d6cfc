//! The scrub: reads everything that is stored again, slowly, and mends what is found damaged.
//!
//! What is next, and when, is the engine's to decide ([`Scrub`]); whether a chunk is sound is the store's. This is the
//! one task between them. It belongs to the datacenter's `Shutdown`, and is dropped where it stands; the mark that it
//! keeps now and then says where the next process goes on.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use sluice_engine::geometry::{ChunkIndex, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{FileId, Timestamp};
use sluice_engine::scrub::{Mark, Pace, Scrub, Step};
use sluice_store::StoreError;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::{AggregatorService, bulk, load};

/// Files listed at once.
const PAGE: usize = 1_000;

/// How long to wait when the store cannot be asked.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs until the datacenter stops.
pub(crate) async fn run(service: Arc<AggregatorService>) {
    let (settings, share) = (service.parts.settings, service.parts.share);
    let pace = Pace { rate: rate(&service), every_ms: settings.scrub_every.as_millis() as u64 };
    let kept = service.parts.store.scrub_mark(service.parts.share).await.ok().flatten();
    let mut scrub = Scrub::new(pace, kept.and_then(|bytes| Mark::from_bytes(&bytes)), now(&service));
    let mut kept_at = Instant::now();
    mend_all(&service).await;
    while !service.parts.tasks.is_draining() {
        if kept_at.elapsed() >= settings.mend_every {
            kept_at = Instant::now();
            keep(&service, &scrub).await;
            mend_all(&service).await;
        }
        let was_over = scrub.has_ended();
        let rate = rate(&service);
        scrub.set_rate(rate);
        // Nothing is read while it is off, but what is known to be damaged is mended.
        let step = if rate == 0 {
            Step::Rest(now(&service).plus(settings.mend_every.as_millis() as u64))
        } else {
            scrub.step(now(&service))
        };
        match step {
            Step::List { after } => match service.parts.store.list(after.or(share.before()), PAGE).await {
                Ok(found) => {
                    let found = found.into_iter().map(|found| found.file);
                    scrub.listed(found.filter(|file| share.has(*file)).collect());
                }
                Err(error) => rest(&service, PATIENCE, &error).await,
            },
            Step::Look(file) => scrub.holds(held(&service, file).await),
            Step::Verify(file, index) => {
                let (bytes, sound) = verify(&service, file, index).await;
                scrub.verified(bytes, sound, now(&service));
                service.metrics.scrubbed(bytes);
            }
            Step::Rest(until) => {
                let wait = Duration::from_millis(until.since(now(&service)));
                pause(&service, wait.min(settings.mend_every)).await;
            }
        }
        if scrub.has_ended() && !was_over {
            let Mark { bytes, damaged, .. } = scrub.mark();
            service.metrics.scrub_passes.inc();
            if damaged > 0 {
                warn!(bytes, damaged, "everything stored was read again, and some of it was damaged");
            } else {
                info!(bytes, "everything stored was read again, and is sound");
            }
            keep(&service, &scrub).await;
        }
    }
}

/// Bytes a second now, of this share; 0: none.
fn rate(service: &AggregatorService) -> u64 {
    let all = service.parts.scrub_rate.get();
    if all == 0 { 0 } else { (all / u64::from(service.parts.share.of().count())).max(1) }
}

fn now(service: &AggregatorService) -> Timestamp {
    service.parts.clock.now()
}

/// Waits, or until the datacenter stops.
async fn pause(service: &AggregatorService, wait: Duration) {
    tokio::select! {
        () = service.parts.tasks.draining() => {}
        () = tokio::time::sleep(wait) => {}
    }
}

async fn rest(service: &AggregatorService, wait: Duration, error: &StoreError) {
    warn!(%error, "the scrub cannot go on now");
    pause(service, wait).await;
}

async fn keep(service: &AggregatorService, scrub: &Scrub) {
    // Without it the next process reads some of this again.
    if let Err(error) =
        service.parts.store.put_scrub_mark(service.parts.share, &scrub.mark().to_bytes()).await
    {
        warn!(%error, "how far the scrub has come cannot be kept");
    }
}

async fn held(service: &AggregatorService, file: FileId) -> Vec<Range<u64>> {
    match service.parts.store.summary(file).await {
        Ok(summary) => summary.map(|summary| summary.held).unwrap_or_default(),
        Err(error) => {
            // Its index, most likely.
            service.metrics.integrity_failures.inc();
            error!(%file, %error, "a file cannot be read");
            Vec::new()
        }
    }
}

/// Verifies one chunk, and does about its damage what can be done; its length as far as it counts, and whether it was
/// sound.
async fn verify(service: &Arc<AggregatorService>, file: FileId, index: ChunkIndex) -> (u64, bool) {
    let was_known = is_known(service, file, index).await;
    match service.parts.store.verify(file, index).await {
        Ok(bytes) => (bytes, true),
        // Freed or ended meanwhile.
        Err(StoreError::Missing { .. } | StoreError::NoFile(_) | StoreError::Dropped(_)) => (0, true),
        Err(StoreError::Corrupt { .. }) => {
            found(service, file, index, was_known).await;
            (sluice_engine::limits::CHUNK_LEN, false)
        }
        Err(error) => {
            rest(service, PATIENCE, &error).await;
            (0, true)
        }
    }
}

/// A chunk of the own store did not hash to its value when somebody read it: if the store finds the same, it is
/// reported, and retracted or mended.
pub(crate) async fn reported(service: &Arc<AggregatorService>, file: FileId, index: ChunkIndex) {
    let was_known = is_known(service, file, index).await;
    match service.parts.store.verify(file, index).await {
        Err(StoreError::Corrupt { .. }) => found(service, file, index, was_known).await,
        Ok(_) => warn!(%file, %index, "a chunk was read wrong, and is sound when it is read again"),
        Err(error) => warn!(%file, %index, %error, "a chunk was read wrong, and cannot be read again"),
    }
}

/// A chunk is damaged, and the store remembers it: it is served and confirmed to nobody, and whoever sends it again mends
/// it. What is left to do is done at once, or after a second look ([`mend_all`]).
async fn found(service: &Arc<AggregatorService>, file: FileId, index: ChunkIndex, was_known: bool) {
    if !was_known {
        service.metrics.integrity_failures.inc();
        error!(%file, %index, "a stored chunk does not hash to its value");
    }
    if is_published(service, file).await {
        mend(service, file, index).await;
    }
}

async fn is_published(service: &AggregatorService, file: FileId) -> bool {
    let asked =
        service.look(file, move |aggregator| aggregator.file(file).is_some_and(|file| file.is_published()));
    matches!(asked.await, Ok(true))
}

/// Whether a chunk was known to be damaged before.
async fn is_known(service: &AggregatorService, file: FileId, index: ChunkIndex) -> bool {
    let damage = service.parts.store.damage(file).await.unwrap_or_default();
    damage.iter().any(|range| range.contains(&index.number()))
}

/// The recorded value of a chunk, if it can be read.
async fn value(service: &AggregatorService, file: FileId, index: ChunkIndex) -> Option<ChainingValue> {
    let number = index.number();
    let values = service.parts.store.values(file, number..number + 1).await.ok()?;
    values.first().copied().flatten()
}

async fn retract(service: &Arc<AggregatorService>, file: FileId, index: ChunkIndex) {
    match service.parts.store.lose(file, &[index]).await {
        Ok(_) => {
            warn!(%file, %index, "a damaged chunk is retracted");
            if let Err(error) = load::reload(service, file).await {
                error!(%file, %error, "a file cannot be loaded after a loss");
            }
        }
        Err(error) => error!(%file, %index, %error, "a damaged chunk cannot be retracted"),
    }
}

/// Looks again at whatever is known to be damaged: the device may have thought better of it, holders may be back, a
/// client may have sent a chunk again. What is damaged still is retracted as long as its file is not published, so that
/// it comes again from its client or another holder. Of a published file this may be the last copy: it stays, without
/// the chunk, and is mended when somebody has it.
async fn mend_all(service: &Arc<AggregatorService>) {
    let store = &service.parts.store;
    let mut left = 0;
    let damaged = match store.damaged_files().await {
        Ok(damaged) => damaged,
        Err(error) => return warn!(%error, "the store cannot say what is damaged"),
    };
    for file in damaged.into_iter().filter(|file| service.parts.share.has(*file)) {
        let damage = store.damage(file).await.unwrap_or_default();
        for index in damage.into_iter().flatten().filter_map(|chunk| ChunkIndex::new(chunk).ok()) {
            if service.parts.tasks.is_draining() {
                return;
            }
            if let Err(StoreError::Corrupt { .. }) = store.verify(file, index).await {
                if is_published(service, file).await && value(service, file, index).await.is_some() {
                    mend(service, file, index).await;
                } else {
                    retract(service, file, index).await;
                }
                left += u64::from(is_known(service, file, index).await);
            }
        }
    }
    if let Ok(damaged) = store.damaged_files().await {
        let damaged = damaged.into_iter().filter(|file| service.parts.share.has(*file)).count();
        service.damaged.store(damaged, Ordering::Relaxed);
    }
    if left > 0 {
        warn!(chunks = left, "damaged chunks wait for somebody who has them");
    }
}

/// Fetches a damaged chunk of a published file from another holder, and writes it in its place.
async fn mend(service: &Arc<AggregatorService>, file: FileId, index: ChunkIndex) {
    let Some(expected) = value(service, file, index).await else { return };
    let fetched = bulk::fetch_from_holders(service, file, index, None).await;
    let bytes = match fetched {
        Ok(bytes) if ChainingValue::of_chunk(index, &bytes) == Some(expected) => bytes,
        Ok(_) => {
            service.metrics.integrity_failures.inc();
            return warn!(%file, %index, "what another holder sent does not hash to the chunk's value");
        }
        Err(refusal) => return warn!(%file, %index, %refusal, "nobody else has a damaged chunk now"),
    };
    match rewrite(service, file, index, bytes, expected).await {
        Ok(()) => info!(%file, %index, "a damaged chunk was mended"),
        Err(error) => error!(%file, %index, %error, "a damaged chunk cannot be mended"),
    }
}

async fn rewrite(
    service: &AggregatorService,
    file: FileId,
    index: ChunkIndex,
    bytes: Bytes,
    expected: ChainingValue,
) -> Result<(), StoreError> {
    let store = &service.parts.store;
    let summary = store.summary(file).await?.ok_or(StoreError::NoFile(file))?;
    let mut writer = store.begin_run(file, summary.tenant, Run::new(index, 1)?, bytes.len() as u64).await?;
    writer.write(bytes).await?;
    writer.finish(Some(&[expected])).await.map(|_| ())
}
