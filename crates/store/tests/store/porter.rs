//! Porters: stores whose bytes go past the one that keeps the bucket.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, FileId, Generation, TenantId};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;
use sluice_fault_s3::{Fault, Garage, Proxy, Seen};
use sluice_store::s3::{Carried, ChunkPlace, Claimed, Keeper, Landed, PorterClaim, PorterId};
use sluice_store::{
    Advice, ChunkStore, Chunks, FileSummary, Found, Listed, PorterStore, RecordOutcome, RunReceipt,
    RunWriter, S3Options, S3Store, StoreError, Together, Usage, Whole, WholeOutcome,
};

use crate::contract::{Backend, contract_tests};
use crate::material::{FULL, TENANT, content, file, index, put, record, root, values};
use crate::s3::options;
use crate::s3_faults::raw;

/// A store whose chunks a porter carries.
struct WithPorter {
    keeper: Arc<S3Store>,
    porter: PorterStore,
}

/// Has the keeper do what is no porter's.
macro_rules! kept {
    ($($name:ident($($arg:ident: $of:ty),*) -> $answer:ty;)*) => {
        #[async_trait]
        impl ChunkStore for WithPorter {
            $(async fn $name(&self, $($arg: $of),*) -> Result<$answer, StoreError> {
                self.keeper.$name($($arg),*).await
            })*

            fn usage(&self) -> Usage {
                ChunkStore::usage(&*self.keeper)
            }
        }
    };
}

kept! {
    put_record(record: &MetadataRecord) -> RecordOutcome;
    put_size(file: FileId, size: Geometry) -> ();
    put_whole(record: &MetadataRecord, facts: &[u8], whole: Whole) -> WholeOutcome;
    put_known(record: &MetadataRecord, facts: &[u8]) -> WholeOutcome;
    summary(file: FileId) -> Option<FileSummary>;
    list(after: Option<FileId>, limit: usize) -> Vec<Found>;
    listed(tenant: TenantId, after: Option<ClientFileId>, limit: usize) -> Vec<Listed>;
    verify(file: FileId, index: ChunkIndex) -> u64;
    damage(file: FileId) -> Vec<Range<u64>>;
    damaged_files() -> Vec<FileId>;
    put_scrub_mark(share: Share, mark: &[u8]) -> ();
    scrub_mark(share: Share) -> Option<Vec<u8>>;
    lose(file: FileId, chunks: &[ChunkIndex]) -> Generation;
    put_facts(file: FileId, facts: &[u8]) -> ();
    publish(file: FileId, root: Root) -> ();
    recheck(file: FileId) -> Root;
    free(file: FileId) -> Generation;
    drop_file(file: FileId, tenant: TenantId, facts: &[u8]) -> ();
    discard_orphan(file: FileId) -> bool;
    raise_generations(share: Share, floor: Generation) -> ();
    put_page(file: FileId, segment: u64, page: &[u8]) -> ();
    page(file: FileId, segment: u64) -> Option<Vec<u8>>;
    states() -> BTreeMap<Share, Vec<u8>>;
    put_state(share: Share, state: &[u8]) -> ();
    close() -> ();
}

#[async_trait]
impl Chunks for WithPorter {
    async fn begin_run(
        &self,
        file: FileId,
        tenant: TenantId,
        run: Run,
        len: u64,
    ) -> Result<Box<dyn RunWriter>, StoreError> {
        self.porter.begin_run(file, tenant, run, len).await
    }

    async fn values(
        &self,
        file: FileId,
        range: Range<u64>,
    ) -> Result<Vec<Option<ChainingValue>>, StoreError> {
        self.porter.values(file, range).await
    }

    async fn read_chunk(&self, file: FileId, index: ChunkIndex) -> Result<Bytes, StoreError> {
        self.porter.read_chunk(file, index).await
    }

    fn at_once(&self) -> u64 {
        self.porter.at_once()
    }

    async fn read_together(&self, file: FileId, chunks: Range<u64>) -> Result<Option<Together>, StoreError> {
        self.porter.read_together(file, chunks).await
    }
}

struct Bucket(Garage);

impl Backend for Bucket {
    async fn open(&self) -> Arc<dyn ChunkStore> {
        let Self(garage) = self;
        let options = options(garage.endpoint(), garage, garage.key());
        let keeper = Arc::new(S3Store::open(options.clone()).await.unwrap());
        let porter = PorterStore::open(options, keeper.clone()).await.unwrap();
        Arc::new(WithPorter { keeper, porter })
    }
}

// Of the contract all that is not about who waits for whom while bytes come: a porter claims when it has them all.
contract_tests! {
    match Garage::start() {
        Some(garage) => Bucket(garage),
        None => return,
    };
    a_finished_run_is_there_with_values_and_bytes,
    chunks_that_are_read_together_are_what_each_of_them_is,
    pieces_of_any_size_make_the_same_chunk,
    provisional_chunks_are_kept_until_the_record_refutes_them,
    a_chunk_with_a_record_is_immutable,
    a_partly_recorded_run_is_compared_where_it_is_and_written_where_not,
    a_run_is_recorded_as_a_whole_or_not_at_all,
    too_many_or_too_few_bytes_are_refused,
    announced_values_are_checked_before_anything_is_recorded,
    unknown_files_are_told_apart_from_missing_chunks,
    lost_chunks_go_and_the_generation_rises,
    a_whole_file_is_published_under_its_root_only,
    small_and_empty_files_are_published,
    a_freed_file_keeps_record_and_facts,
    a_dropped_file_never_comes_back,
    orphans_are_discarded_and_files_with_a_record_are_not,
    everything_is_there_after_closing_and_opening,
    dropped_futures_lose_nothing,
    a_whole_file_can_be_freed_lost_and_filled_again,
}

/// A keeper that may be away, or another process.
#[derive(Default)]
struct Seat(Mutex<Option<Arc<S3Store>>>);

impl Seat {
    fn keeper(&self) -> Result<Arc<S3Store>, StoreError> {
        let keeper = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        keeper.ok_or(StoreError::Unreachable { reason: "nobody".into() })
    }

    fn set(&self, keeper: Option<Arc<S3Store>>) -> Option<Arc<S3Store>> {
        std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), keeper)
    }

    /// Whoever sits there, once somebody does.
    async fn wait(&self) -> Result<Arc<S3Store>, StoreError> {
        for _ in 0..400 {
            if let Ok(keeper) = self.keeper() {
                return Ok(keeper);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.keeper()
    }
}

/// Asks whoever sits there, until somebody answers.
macro_rules! ask {
    ($seat:expr, $keeper:ident => $ask:expr) => {
        loop {
            let $keeper = $seat.wait().await?;
            match $ask.await {
                Err(StoreError::Closing) => tokio::time::sleep(Duration::from_millis(10)).await,
                answer => break answer,
            }
        }
    };
}

#[async_trait]
impl Keeper for Seat {
    async fn claim(&self, carried: Carried) -> Result<Claimed, StoreError> {
        ask!(self, keeper => keeper.claim(carried.clone()))
    }

    async fn settle(&self, claim: PorterClaim, landed: Landed) -> Result<(), StoreError> {
        ask!(self, keeper => keeper.settle(claim, landed))
    }

    async fn places(&self, file: FileId, range: Range<u64>) -> Result<Vec<Option<ChunkPlace>>, StoreError> {
        ask!(self, keeper => keeper.places(file, range.clone()))
    }
}

/// A server, a proxy before it for porters, and a keeper that can be replaced.
struct Bench {
    garage: Garage,
    proxy: Proxy,
    seat: Arc<Seat>,
}

impl Bench {
    async fn start() -> Option<Self> {
        let garage = Garage::start()?;
        let proxy = Proxy::start(garage.address()).await;
        let bench = Self { garage, proxy, seat: Arc::default() };
        bench.keep().await;
        Some(bench)
    }

    fn options(&self, endpoint: String) -> S3Options {
        S3Options {
            attempts: 2,
            patience: Duration::from_secs(10),
            porter_patience: Duration::from_secs(3),
            ..options(endpoint, &self.garage, self.garage.key())
        }
    }

    async fn keep(&self) -> Arc<S3Store> {
        let keeper = Arc::new(S3Store::open(self.options(self.garage.endpoint())).await.unwrap());
        self.seat.set(Some(keeper.clone()));
        keeper
    }

    /// Kills the keeper, and has another come.
    async fn replace(&self) -> Arc<S3Store> {
        if let Some(keeper) = self.seat.set(None) {
            keeper.kill();
        }
        self.keep().await
    }

    async fn porter(&self) -> PorterStore {
        PorterStore::open(self.options(self.proxy.endpoint()), self.seat.clone()).await.unwrap()
    }
}

macro_rules! bench {
    () => {
        match Bench::start().await {
            Some(bench) => bench,
            None => return,
        }
    };
}

fn is_run(seen: &Seen) -> bool {
    seen.operation == "PutObject" && seen.key.contains("incoming/")
}

async fn carry(
    porter: &PorterStore,
    of: FileId,
    first: u64,
    bytes: &Bytes,
) -> Result<RunReceipt, StoreError> {
    let len = bytes.len() as u64;
    let run = Run::from_len(index(first), len)?;
    let mut writer = porter.begin_run(of, TENANT, run, len).await?;
    writer.write(bytes.clone()).await?;
    writer.finish(None).await
}

fn carried(n: u128, bytes: &Bytes) -> Carried {
    let (run, len) = (Run::from_len(index(0), bytes.len() as u64).unwrap(), bytes.len() as u64);
    Carried { porter: PorterId(7), file: file(n), tenant: TENANT, run, len, values: values(0, bytes) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bytes_go_past_the_keeper() {
    let bench = bench!();
    let (keeper, porter) = (bench.seat.keeper().unwrap(), bench.porter().await);
    let bytes = content(1, 16 * FULL);
    keeper.put_record(&record(1, Some(16 << 20))).await.unwrap();
    for first in [8, 0] {
        carry(&porter, file(1), first, &bytes.slice(first as usize * FULL..(first as usize + 8) * FULL))
            .await
            .unwrap();
    }
    assert_eq!(keeper.summary(file(1)).await.unwrap().unwrap().held, [0..16]);
    keeper.publish(file(1), root(&bytes)).await.unwrap();
    for chunk in 0..16 {
        let at = chunk as usize * FULL;
        assert_eq!(porter.read_chunk(file(1), index(chunk)).await.unwrap(), bytes.slice(at..at + FULL));
    }
    let (kept, carried) = (keeper.metrics(), porter.metrics());
    assert!(carried.bytes_sent >= 16 << 20 && carried.bytes_received >= 16 << 20, "{carried:?}");
    assert!(kept.bytes_sent < 1 << 20 && kept.bytes_received < 1 << 20, "{kept:?}");
    // What was where it is no more is asked for again.
    keeper.free(file(1)).await.unwrap();
    keeper.settled().await;
    let gone = porter.read_chunk(file(1), index(3)).await.unwrap_err();
    assert!(matches!(gone, StoreError::Missing { .. }), "{gone}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_porter_that_vanishes_holds_up_nobody_who_brings_the_same_bytes() {
    let bench = bench!();
    let (keeper, porter) = (bench.seat.keeper().unwrap(), bench.porter().await);
    let (bytes, other) = (content(1, 2 * FULL), content(2, 2 * FULL));
    let refused = keeper.claim(carried(1, &bytes)).await.unwrap_err();
    assert!(refused.to_string().contains("give both the same store"), "{refused}");
    put_raw(&bench, "check/porter-0000000000000007", Bytes::new()).await;
    let Claimed::Put { claim, .. } = keeper.claim(carried(1, &bytes)).await.unwrap() else { panic!() };
    // It never says what became of it.
    let receipt = tokio::time::timeout(Duration::from_secs(1), carry(&porter, file(1), 0, &bytes)).await;
    assert_eq!(receipt.unwrap().unwrap().values, values(0, &bytes));
    // It was settled for both.
    let lost = keeper.settle(claim, Landed::Yes).await.unwrap_err();
    assert!(matches!(lost, StoreError::ClaimLost), "{lost}");
    assert_eq!(keeper.claim(carried(1, &bytes)).await.unwrap(), Claimed::Held);
    let conflict = carry(&porter, file(1), 0, &other).await.unwrap_err();
    assert!(matches!(conflict, StoreError::ChunkConflict { .. }), "{conflict}");

    // Whoever brings other bytes waits until it is too late, and then they count, whatever lands.
    let Claimed::Put { key, .. } = keeper.claim(carried(2, &bytes)).await.unwrap() else { panic!() };
    let begun = std::time::Instant::now();
    carry(&porter, file(2), 0, &other).await.unwrap();
    assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(key.starts_with("incoming/"), "{key}");
    let conflict = carry(&porter, file(2), 0, &bytes).await.unwrap_err();
    assert!(matches!(conflict, StoreError::ChunkConflict { .. }), "{conflict}");

    // One that failed gives it up at once, if nobody else puts the same.
    let Claimed::Put { claim, .. } = keeper.claim(carried(3, &bytes)).await.unwrap() else { panic!() };
    let Claimed::Put { claim: also, .. } = keeper.claim(carried(3, &bytes)).await.unwrap() else { panic!() };
    keeper.settle(claim, Landed::No).await.unwrap();
    let waits = tokio::time::timeout(Duration::from_millis(200), carry(&porter, file(3), 0, &other)).await;
    assert!(waits.is_err(), "the other may put it yet");
    keeper.settle(also, Landed::No).await.unwrap();
    let receipt = tokio::time::timeout(Duration::from_secs(1), carry(&porter, file(3), 0, &other)).await;
    assert_eq!(receipt.unwrap().unwrap().values, values(0, &other));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_porter_that_was_given_another_bucket_acknowledges_nothing() {
    let bench = bench!();
    let elsewhere = S3Options { prefix: "dc-z/".into(), ..bench.options(bench.garage.endpoint()) };
    let porter = PorterStore::open(elsewhere, bench.seat.clone()).await.unwrap();
    let bytes = content(1, FULL);
    let refused = carry(&porter, file(1), 0, &bytes).await.unwrap_err();
    assert!(refused.to_string().contains("give both the same store"), "{refused}");
    let keeper = bench.replace().await;
    assert!(keeper.summary(file(1)).await.unwrap().is_none_or(|summary| summary.held.is_empty()));
    carry(&bench.porter().await, file(1), 0, &content(2, FULL)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_is_replaced_while_bytes_are_put_loses_nothing() {
    let bench = bench!();
    let porter = Arc::new(bench.porter().await);
    let (bytes, other) = (content(1, 2 * FULL), content(2, 2 * FULL));
    bench.seat.keeper().unwrap().put_record(&record(1, Some(2 << 20))).await.unwrap();
    // The object is there, and whoever would be told is gone.
    bench.proxy.rule(|seen| is_run(seen).then_some(Fault::Hangs));
    bench.proxy.seen();
    let late = tokio::spawn({
        let (porter, bytes) = (porter.clone(), bytes.clone());
        async move { carry(&porter, file(1), 0, &bytes).await }
    });
    while bench.proxy.seen().iter().all(|seen| !is_run(seen)) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let keeper = bench.replace().await;
    bench.proxy.behave();
    // It gave up, and the client brings it again.
    let given_up = late.await.unwrap().unwrap_err();
    assert_eq!(given_up.advice(), Advice::Retry, "{given_up}");
    carry(&porter, file(1), 0, &bytes).await.unwrap();
    assert_eq!(keeper.summary(file(1)).await.unwrap().unwrap().held, [0..2]);

    // A claim of the keeper before.
    put_raw(&bench, "check/porter-0000000000000007", Bytes::new()).await;
    let Claimed::Put { claim, key, .. } = keeper.claim(carried(2, &bytes)).await.unwrap() else { panic!() };
    let keeper = bench.replace().await;
    // Meanwhile another porter has brought other bytes, and they were acknowledged.
    carry(&porter, file(2), 0, &other).await.unwrap();
    // The object of the first lands now.
    put_raw(&bench, &key, bytes.clone()).await;
    let lost = keeper.settle(claim, Landed::Yes).await.unwrap_err();
    assert!(matches!(lost, StoreError::ClaimLost), "{lost}");
    let conflict = keeper.claim(carried(2, &bytes)).await.unwrap_err();
    assert!(matches!(conflict, StoreError::ChunkConflict { .. }), "{conflict}");
    // Whoever reads the bucket next sees both, and knows which counts: even if nobody had claimed it again.
    let keeper = bench.replace().await;
    assert_eq!(keeper.read_chunk(file(2), index(1)).await.unwrap(), other.slice(FULL..));
    assert_eq!(porter.read_chunk(file(2), index(0)).await.unwrap(), other.slice(..FULL));
}

/// Puts an object as a porter would that nobody hears of any more.
async fn put_raw(bench: &Bench, key: &str, bytes: Bytes) {
    raw(&bench.garage).put(&format!("dc-a/{key}"), bytes).await;
}

/// Three porters bring chunks of a few files, some of them with contradicting bytes; requests get lost, land late and hang, and
/// the keeper is killed now and then. What was acknowledged is there in the end, and nothing else is there instead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_porters_were_told_is_durable_stays() {
    let bench = bench!();
    let seed: u64 =
        std::env::var("SLUICE_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("SLUICE_SEED={seed}");
    let turn = std::sync::atomic::AtomicU64::new(0);
    bench.proxy.rule(move |seen| {
        let turn = turn.fetch_add(u64::from(is_run(seen)), std::sync::atomic::Ordering::Relaxed);
        match is_run(seen).then(|| StdRng::seed_from_u64(seed ^ turn).random_range(0..12)) {
            Some(0) => Some(Fault::Lost),
            Some(1) => Some(Fault::AnswerLost),
            Some(2) => Some(Fault::SlowDown),
            Some(_) | None => None,
        }
    });
    // A chunk of a file, by its number, has one of two contents.
    let bytes = |of: u128, chunk: u64, kind: u64| content((of as u64) << 16 | chunk << 1 | kind, FULL);
    let acknowledged: Arc<Mutex<BTreeMap<(u128, u64), u64>>> = Arc::default();
    let mut porters = Vec::new();
    for n in 0..3 {
        let (porter, acknowledged) = (bench.porter().await, acknowledged.clone());
        let mut random = StdRng::seed_from_u64(seed.wrapping_add(n));
        porters.push(tokio::spawn(async move {
            for _ in 0..40 {
                let (of, chunk) = (random.random_range(1..=3u128), random.random_range(0..6u64));
                let kind = u64::from(random.random_range(0..4) == 0);
                match carry(&porter, file(of), chunk, &bytes(of, chunk, kind)).await {
                    Ok(_) => {
                        let before = acknowledged.lock().unwrap().insert((of, chunk), kind);
                        assert!(before.is_none_or(|before| before == kind), "{of} {chunk}: both were taken");
                    }
                    Err(StoreError::ChunkConflict { .. }) => {}
                    Err(error) => assert_eq!(error.advice(), Advice::Retry, "{error}"),
                }
            }
        }));
    }
    let mut random = StdRng::seed_from_u64(!seed);
    while porters.iter().any(|porter| !porter.is_finished()) {
        tokio::time::sleep(Duration::from_millis(random.random_range(50..600))).await;
        bench.replace().await;
    }
    for porter in porters {
        porter.await.unwrap();
    }
    bench.proxy.behave();
    let keeper = bench.replace().await;
    let acknowledged = acknowledged.lock().unwrap().clone();
    assert!(!acknowledged.is_empty());
    println!("{} chunks were acknowledged", acknowledged.len());
    for ((of, chunk), kind) in acknowledged {
        let got = keeper.read_chunk(file(of), index(chunk)).await.unwrap();
        assert!(got == bytes(of, chunk, kind), "chunk {chunk} of {of}");
        // The same again is no news.
        assert_eq!(put(&*keeper, file(of), chunk, &got).await.unwrap().new_chunks, 0);
    }
}
