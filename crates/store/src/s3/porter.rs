//! The store of a porter: bytes go to and from the bucket here, and what is where the worker says that keeps it.
//!
//! Nothing is kept but where chunks were a moment ago. That may be out of date: what is not there, or does not hash to its
//! value, is asked for anew.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use quick_cache::sync::Cache;
use sluice_engine::geometry::{ChunkIndex, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{FileId, TenantId};
use sluice_engine::limits::MAX_RUN;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::body::{self, Body};
use super::bucket::{Bucket, S3Request, SharedBucket, add};
use super::keeper::{Carried, ChunkPlace, Claimed, Keeper, Landed, MAX_PLACES, PorterId};
use super::read::Extent;
use super::{MAX_VALUES, S3Metrics, S3Options, keys, rights};
use crate::{Chunks, RunReceipt, RunWriter, StoreError, Together};

/// How often a run is claimed whose claim was lost meanwhile.
const CLAIMS: usize = 5;

/// Windows of chunks of which it is remembered where they are: some 25 KiB each.
const WINDOWS: usize = 512;

/// How long that is believed.
const BELIEVED: Duration = Duration::from_secs(5);

/// Where the chunks of a window are.
type Places = Arc<[Option<ChunkPlace>]>;

/// The store of a porter. Cheap to clone.
#[derive(Clone)]
pub struct PorterStore(Arc<Inner>);

struct Inner {
    bucket: SharedBucket,
    keeper: Arc<dyn Keeper>,
    /// Memory for bodies, in KiB.
    bodies: Arc<Semaphore>,
    places: Cache<(FileId, u64), (Places, Instant)>,
    me: PorterId,
    /// How long an object may take to be put: less than the keeper waits to be told.
    patience: Duration,
}

impl std::fmt::Debug for PorterStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PorterStore")
    }
}

impl PorterStore {
    /// Opens the bucket that `keeper` keeps, for chunks. Checks first that the credentials allow what a worker needs, whoever
    /// keeps it. Fails as [`S3Store::open`](super::S3Store::open) does.
    pub async fn open(options: S3Options, keeper: Arc<dyn Keeper>) -> Result<Self, StoreError> {
        if let Err((key, reason)) = options.check() {
            return Err(StoreError::Unreadable { path: format!("{key} of the bucket"), reason });
        }
        let bucket = Arc::new(Bucket::new(options.clone()));
        rights::check(&bucket, &options).await?;
        let bodies = Arc::new(Semaphore::new((options.bodies >> 10) as usize));
        let (places, patience) = (Cache::new(WINDOWS), options.porter_patience * 2 / 3);
        let me = PorterId(rand::random());
        Ok(Self(Arc::new(Inner { bucket, keeper, bodies, places, me, patience })))
    }

    /// The counters.
    pub fn metrics(&self) -> S3Metrics {
        self.0.bucket.counters.read()
    }

    /// Ends what waits for the bucket, and lets no request begin any more.
    pub fn close(&self) {
        self.0.bucket.kill();
    }

    /// Where the chunks of the window are that has this one.
    async fn window(&self, file: FileId, chunk: u64) -> Result<Places, StoreError> {
        let start = chunk / MAX_PLACES * MAX_PLACES;
        let places: Places = self.0.keeper.places(file, start..start + MAX_PLACES).await?.into();
        if places.len() as u64 != MAX_PLACES {
            return Err(StoreError::Unreachable { reason: "an answer that makes no sense".into() });
        }
        self.0.places.insert((file, start / MAX_PLACES), (places.clone(), Instant::now()));
        Ok(places)
    }

    /// Where it was a moment ago.
    fn remembered(&self, file: FileId, chunk: u64) -> Option<ChunkPlace> {
        let (places, since) = self.0.places.get(&(file, chunk / MAX_PLACES))?;
        if since.elapsed() > BELIEVED {
            return None;
        }
        places[(chunk % MAX_PLACES) as usize].clone()
    }

    /// Where each of these chunks is, as of a moment ago.
    async fn places(&self, file: FileId, range: Range<u64>) -> Result<Vec<Option<ChunkPlace>>, StoreError> {
        let mut found = Vec::new();
        let mut asked: Option<(u64, Places)> = None;
        for chunk in range {
            let (window, at) = (chunk / MAX_PLACES, (chunk % MAX_PLACES) as usize);
            let place = match &asked {
                Some((of, places)) if *of == window => places[at].clone(),
                Some(_) | None => match self.remembered(file, chunk) {
                    Some(place) => Some(place),
                    None => {
                        let places = self.window(file, chunk).await?;
                        let place = places[at].clone();
                        asked = Some((window, places));
                        place
                    }
                },
            };
            found.push(place);
        }
        Ok(found)
    }

    /// The bytes of a chunk, if they are there; `None` if not, or not sound.
    async fn bytes(&self, index: ChunkIndex, place: &ChunkPlace) -> Result<Option<Bytes>, StoreError> {
        self.0.bucket.chunks(index, &[place.value], Extent::new(&place.key, &place.bytes)).await
    }
}

#[async_trait]
impl Chunks for PorterStore {
    async fn begin_run(
        &self,
        file: FileId,
        tenant: TenantId,
        run: Run,
        len: u64,
    ) -> Result<Box<dyn RunWriter>, StoreError> {
        let memory = body::memory(&self.0.bodies, &self.0.bucket, len).await?;
        let body = Body::new(run, len);
        Ok(Box::new(PorterRun { store: self.clone(), file, tenant, run, body, memory }))
    }

    async fn values(
        &self,
        file: FileId,
        range: Range<u64>,
    ) -> Result<Vec<Option<ChainingValue>>, StoreError> {
        let count = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        crate::limit("chunks", count, MAX_VALUES as usize)?;
        let places = self.places(file, range).await?;
        Ok(places.into_iter().map(|place| place.map(|place| place.value)).collect())
    }

    async fn read_chunk(&self, file: FileId, index: ChunkIndex) -> Result<Bytes, StoreError> {
        let chunk = index.number();
        let old = self.remembered(file, chunk).filter(|place| !place.is_damaged);
        if let Some(place) = &old
            && let Some(bytes) = self.bytes(index, place).await?
        {
            return Ok(bytes);
        }
        let place = self.window(file, chunk).await?[(chunk % MAX_PLACES) as usize].clone();
        let place = place.ok_or(StoreError::Missing { index })?;
        if !place.is_damaged
            && old.as_ref() != Some(&place)
            && let Some(bytes) = self.bytes(index, &place).await?
        {
            return Ok(bytes);
        }
        add(&self.0.bucket.counters.integrity_failures, 1);
        tracing::error!(%file, %index, "a chunk does not hash to its value");
        Err(StoreError::Corrupt { file, index })
    }

    fn at_once(&self) -> u64 {
        MAX_RUN.into()
    }

    async fn read_together(&self, file: FileId, chunks: Range<u64>) -> Result<Option<Together>, StoreError> {
        let places = self.places(file, chunks.clone()).await?;
        let sound = places.into_iter().map(|place| place.filter(|place| !place.is_damaged));
        let Some(places) = sound.collect::<Option<Vec<ChunkPlace>>>() else { return Ok(None) };
        let values: Vec<ChainingValue> = places.iter().map(|place| place.value).collect();
        let extents = places.iter().map(|place| Extent::new(&place.key, &place.bytes));
        let Some(extent) = Extent::joined(extents) else { return Ok(None) };
        let bytes = self.0.bucket.chunks(ChunkIndex::new(chunks.start)?, &values, extent).await?;
        Ok(bytes.map(|bytes| Together { bytes, values }))
    }
}

/// A run on its way to the bucket.
struct PorterRun {
    store: PorterStore,
    file: FileId,
    tenant: TenantId,
    run: Run,
    body: Body,
    memory: OwnedSemaphorePermit,
}

#[async_trait]
impl RunWriter for PorterRun {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.body.take(&bytes)
    }

    /// Goes to its end in a task of its own: a claim that nobody settles would hold up others.
    async fn finish(self: Box<Self>, expected: Option<&[ChainingValue]>) -> Result<RunReceipt, StoreError> {
        let Self { store, file, tenant, run, body, memory } = *self;
        let (bytes, values) = body.whole(expected)?;
        let carried = Carried { file, tenant, run, len: bytes.len() as u64, values, porter: store.0.me };
        let work = async move {
            let receipt = carry(&store, carried, &bytes).await;
            drop(memory);
            receipt
        };
        tokio::spawn(work).await.unwrap_or(Err(StoreError::Closing))
    }
}

/// Claims a run, puts it, and has it registered.
async fn carry(store: &PorterStore, carried: Carried, bytes: &Bytes) -> Result<RunReceipt, StoreError> {
    let Inner { bucket, keeper, patience, me, .. } = &*store.0;
    let mut shown = false;
    for _ in 0..CLAIMS {
        let (claim, key, new_chunks) = match keeper.claim(carried.clone()).await {
            Ok(Claimed::Held) => return Ok(RunReceipt { values: carried.values, new_chunks: 0 }),
            Ok(Claimed::Put { claim, key, new_chunks }) => (claim, key, new_chunks),
            // It has to see first that this is the same bucket.
            Err(StoreError::Unreadable { .. }) if !shown => {
                shown = true;
                let put = bucket.put(&keys::porter(me.0), Bytes::new()).await;
                let _ = put.map_err(|error| error.in_store(S3Request::Put))?;
                continue;
            }
            Err(error) => return Err(error),
        };
        let late = (
            Landed::Unknown,
            Err(StoreError::Io {
                operation: S3Request::Put.name().into(),
                reason: format!("not done in {} s", patience.as_secs()),
            }),
        );
        let put = body::put(bucket, &key, bytes.clone());
        let (landed, put) = tokio::time::timeout(*patience, put).await.unwrap_or(late);
        let settled = keeper.settle(claim, landed).await;
        put?;
        match settled {
            Ok(()) => return Ok(RunReceipt { values: carried.values, new_chunks }),
            // Somebody else brought the same, or the keeper is another process by now: it is claimed again.
            Err(StoreError::ClaimLost) => {}
            Err(error) => return Err(error),
        }
    }
    Err(StoreError::ClaimLost)
}
