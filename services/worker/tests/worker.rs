//! A worker over a store and slots in memory: what it takes, what it refuses, and what it gives out.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod memory;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use memory::{MemorySlots, MemoryStore};
use sluice_engine::context::{Scope, SessionContext, SignedContext};
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{ClientFileId, DcId, FileId, RevocationEpoch, SessionId, TenantId, Timestamp};
use sluice_engine::limits::{CHUNK_LEN, MAX_CONTEXT_LIFE_MS};
use sluice_engine::metadata::MetadataFields;
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::budget::MemoryBudget;
use sluice_node::clock::ManualClock;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;
use sluice_node::shutdown::{Shutdown, Stopped};
use sluice_proto::calls::{ByteStream, NewFile, PutChunks, Way, Workers};
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::StoreError;
use sluice_worker::{Pace, Rates, Worker, WorkerParts, WorkerSettings};
use uuid::Uuid;

const HERE: DcId = DcId::new(1);
const NOW: Timestamp = Timestamp::new(1_763_640_000_000);
const TENANT: TenantId = TenantId::new(7);
const ID: ClientFileId = ClientFileId::new(Uuid::from_u128(1));

struct Setup {
    worker: Worker,
    slots: Arc<MemorySlots>,
    store: Arc<MemoryStore>,
    memory: MemoryBudget,
    tasks: Shutdown,
    material: ClusterMaterial,
    clock: Arc<ManualClock>,
    context: SignedContext,
}

fn sign(material: &ClusterMaterial, tenant: TenantId, scopes: &[Scope]) -> SignedContext {
    sign_with_rate(material, tenant, scopes, 0)
}

fn sign_with_rate(
    material: &ClusterMaterial,
    tenant: TenantId,
    scopes: &[Scope],
    rate: u64,
) -> SignedContext {
    SessionContext {
        session: SessionId::new(Uuid::from_u128(42)),
        tenant,
        scopes: scopes.iter().copied().collect(),
        rate,
        quota: 0,
        quota_files: 0,
        revocation: RevocationEpoch::new(0),
        issuer: HERE,
        issued_at: NOW,
        ends_at: NOW.plus(MAX_CONTEXT_LIFE_MS),
        allowed: [].into(),
    }
    .sign(&material.context_key(HERE).unwrap())
}

fn setup_with(memory: MemoryBudget, patience: Duration) -> Setup {
    let material = ClusterMaterial::generate("test", &[(HERE, "dc-a")]).unwrap();
    let clock = ManualClock::at(NOW);
    let access = Arc::new(ContextVerifier::new(&material, HERE, clock.clone(), Revocations::new()));
    let store = Arc::new(MemoryStore::default());
    let slots = MemorySlots::new(store.clone(), access.clone());
    let tasks = Shutdown::new();
    let parts = WorkerParts {
        dc: "dc-a".into(),
        store: store.clone(),
        slots: slots.clone(),
        access,
        memory: memory.clone(),
        elsewhere: None,
        metrics: Arc::new(Metrics::new("dc-a")),
        tasks: tasks.clone(),
        rates: Arc::new(Rates::new(clock.clone(), None)),
    };
    let pace = Pace { idle: Duration::from_secs(2), grace: Duration::from_secs(5), rate: 1 << 20 };
    let worker =
        Worker::new(parts, WorkerSettings { pace, patience, prefetch: 3, ..WorkerSettings::default() });
    let context = sign(&material, TENANT, &Scope::ALL);
    Setup { worker, slots, store, memory, tasks, material, clock, context }
}

fn setup() -> Setup {
    setup_with(MemoryBudget::new(8 << 20), Duration::from_secs(5))
}

fn content(len: u64) -> Bytes {
    (0..len).map(|i| (i * 31 % 251) as u8).collect::<Vec<_>>().into()
}

fn body(bytes: Bytes) -> ByteStream {
    let pieces: Vec<_> = bytes.chunks(100_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    stream::iter(pieces).boxed()
}

fn put(start: u64, bytes: Bytes) -> PutChunks {
    let start = ChunkIndex::new(start).unwrap();
    PutChunks { id: ID, start, len: bytes.len() as u64, expected: None, body: body(bytes), way: Way::Direct }
}

impl Setup {
    async fn create(&self, size: u64) {
        let fields = MetadataFields { size: Some(size), ..MetadataFields::default() };
        let new = NewFile { id: ID, fields, home: None, way: Way::Direct };
        self.worker.create(&self.context, new).await.unwrap();
    }

    /// A complete file.
    async fn upload(&self, size: u64) -> (FileId, Bytes) {
        self.create(size).await;
        let bytes = content(size);
        for start in 0..size.div_ceil(CHUNK_LEN) {
            let end = ((start + 1) * CHUNK_LEN).min(size);
            let chunk = bytes.slice((start * CHUNK_LEN) as usize..end as usize);
            self.worker.put_chunks(&self.context, put(start, chunk)).await.unwrap();
        }
        (FileId::derive(TENANT, ID), bytes)
    }

    async fn refused(&self, put: PutChunks) -> Problem {
        self.worker.put_chunks(&self.context, put).await.unwrap_err().problem
    }

    /// Returns when no stream is being sent, and checks that all memory was given back.
    async fn idle(&self) {
        assert_eq!(self.tasks.stop(Duration::from_secs(5)).await, Stopped::Clean);
        assert_eq!(self.memory.used(), 0);
    }

    async fn read(&self, from: u64, to: u64) -> Result<Vec<u8>, Refusal> {
        let mut stream = self.worker.read(&self.context, ID, from..to).await?;
        let mut read = Vec::new();
        while let Some(piece) = stream.try_next().await? {
            read.extend_from_slice(&piece);
        }
        Ok(read)
    }
}

#[tokio::test]
async fn chunks_are_taken_and_any_range_is_read_back() {
    let setup = setup();
    let size = 5 * CHUNK_LEN + 77;
    let (_, bytes) = setup.upload(size).await;
    let edge = CHUNK_LEN;
    for (from, to) in [(0, size), (0, 1), (size - 1, size), (edge - 1, edge + 1), (3, 4 * edge + 5), (9, 9)] {
        let read = setup.read(from, to).await.unwrap();
        assert!(read == bytes[from as usize..to as usize], "{from}..{to}");
    }
    setup.idle().await;
}

#[tokio::test]
async fn the_first_chunk_may_come_before_the_metadata() {
    let setup = setup();
    let receipt = setup.worker.put_chunks(&setup.context, put(3, content(CHUNK_LEN))).await.unwrap();
    assert!(receipt.provisional);
    assert_eq!((receipt.start, receipt.new_chunks, receipt.dc.as_str()), (3, 1, "dc-a"));
    assert_eq!(setup.refused(put(2, content(3 * CHUNK_LEN))).await, Problem::ChunkAlignment);
}

#[tokio::test]
async fn bodies_that_are_not_the_run_are_refused_and_nothing_is_stored() {
    let setup = setup();
    setup.create(4 * CHUNK_LEN + 5).await;
    let file = FileId::derive(TENANT, ID);
    assert_eq!(setup.refused(put(5, content(1))).await, Problem::ChunkIndex);
    assert_eq!(setup.refused(put(1, content(CHUNK_LEN - 1))).await, Problem::ChunkLength);
    assert_eq!(setup.refused(put(4, content(6))).await, Problem::ChunkLength);
    assert_eq!(setup.refused(put(0, content(0))).await, Problem::ChunkLength);
    assert_eq!(setup.refused(put(1, content(2 * CHUNK_LEN))).await, Problem::ChunkAlignment);
    let short = PutChunks { body: body(content(CHUNK_LEN - 1)), ..put(0, content(CHUNK_LEN)) };
    assert_eq!(setup.refused(short).await, Problem::Truncated);
    let long = PutChunks { body: body(content(CHUNK_LEN + 1)), ..put(0, content(CHUNK_LEN)) };
    assert_eq!(setup.refused(long).await, Problem::ChunkLength);
    let reset = stream::iter([Ok(content(9)), Err(Refusal::new(Problem::Truncated, "reset"))]).boxed();
    let reset = PutChunks { body: reset, ..put(0, content(CHUNK_LEN)) };
    assert_eq!(setup.refused(reset).await, Problem::Truncated);
    assert_eq!(setup.store.chunks(file), 0);
}

#[tokio::test]
async fn announced_values_must_be_as_many_as_chunks_and_hold() {
    let setup = setup();
    setup.create(2 * CHUNK_LEN).await;
    let bytes = content(CHUNK_LEN);
    let right = ChainingValue::of_chunk(ChunkIndex::new(0).unwrap(), &bytes).unwrap();
    let wrong = ChainingValue::from_bytes([1; 32]);
    let with =
        |values: &[ChainingValue]| PutChunks { expected: Some(values.to_vec()), ..put(0, bytes.clone()) };
    assert_eq!(setup.refused(with(&[])).await, Problem::InvalidParameter);
    assert_eq!(setup.refused(with(&[right, right])).await, Problem::InvalidParameter);
    assert_eq!(setup.refused(with(&[wrong])).await, Problem::ChunkValue);
    let receipt = setup.worker.put_chunks(&setup.context, with(&[right])).await.unwrap();
    assert_eq!(receipt.values, [right.to_string()]);
    assert_eq!(
        setup.refused(put(0, content(CHUNK_LEN - 1).into_iter().chain([9]).collect())).await,
        Problem::ChunkConflict
    );
}

#[tokio::test(start_paused = true)]
async fn slow_and_silent_bodies_are_cut() {
    let setup = setup();
    setup.create(CHUNK_LEN).await;
    let silent = PutChunks { body: stream::pending().boxed(), ..put(0, content(CHUNK_LEN)) };
    assert_eq!(setup.refused(silent).await, Problem::Timeout);
    let began = tokio::time::Instant::now();
    let drip = stream::unfold((), |()| async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        Some((Ok(Bytes::from_static(b"x")), ()))
    });
    let drip = PutChunks { body: drip.boxed(), ..put(0, content(CHUNK_LEN)) };
    assert_eq!(setup.refused(drip).await, Problem::Timeout);
    assert!(began.elapsed() < Duration::from_secs(7), "one byte a second earns no time");
}

#[tokio::test]
async fn damaged_and_missing_chunks_come_from_elsewhere() {
    let setup = setup();
    let (file, bytes) = setup.upload(3 * CHUNK_LEN).await;
    let taken = setup.store.take(file, 1);
    setup.slots.elsewhere.lock().unwrap().insert((file, 1), taken);
    assert!(setup.read(0, 3 * CHUNK_LEN).await.unwrap() == bytes);

    setup.store.damaged.lock().unwrap().insert((file, 2));
    let broken = setup.read(2 * CHUNK_LEN, 3 * CHUNK_LEN).await.unwrap_err();
    assert_eq!(broken.problem, Problem::Unavailable, "refused before there is a stream");
    assert_eq!(*setup.slots.reported.lock().unwrap(), [(file, 2)]);
    assert!(setup.read(0, 3 * CHUNK_LEN).await.is_err(), "and in the middle of one");
    let value = ChainingValue::of_chunk(ChunkIndex::new(2).unwrap(), &bytes[2 << 20..]).unwrap();
    setup.slots.elsewhere.lock().unwrap().insert((file, 2), (value, bytes.slice(2 << 20..)));
    assert!(setup.read(0, 3 * CHUNK_LEN).await.unwrap() == bytes);
    setup.idle().await;
}

#[tokio::test]
async fn chunks_are_read_several_at_once_and_one_by_one_where_that_fails() {
    let setup = setup_with(MemoryBudget::new(32 << 20), Duration::from_secs(5));
    let size = 10 * CHUNK_LEN + 9;
    let (file, bytes) = setup.upload(size).await;
    setup.store.at_once.store(4, Ordering::Relaxed);
    let asked = || -> Vec<(u64, u64)> {
        let asked = std::mem::take(&mut *setup.store.together.lock().unwrap());
        asked.into_iter().map(|chunks| (chunks.start, chunks.end)).collect()
    };
    let edge = CHUNK_LEN;
    for (from, to, blocks) in [
        (0, size, &[(0, 4), (4, 8), (8, 11)][..]),
        (3 * edge + 7, 5 * edge + 1, &[(4, 6)][..]),
        (2 * edge + 7, 3 * edge + 1, &[(2, 4)][..]),
        (edge, edge + 1, &[]),
        (9 * edge - 1, size, &[(8, 11)][..]),
    ] {
        let read = setup.read(from, to).await.unwrap();
        assert!(read == bytes[from as usize..to as usize], "{from}..{to}");
        assert_eq!(asked(), blocks, "{from}..{to}");
    }

    // The next block comes before anybody wants it, and goes with the stream.
    let mut slow = setup.worker.read(&setup.context, ID, 0..size).await.unwrap();
    for _ in 0..2 {
        slow.next().await.unwrap().unwrap();
    }
    let mut seen = asked();
    for _ in 0..2_000 {
        if seen.len() > 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        seen.extend(asked());
    }
    assert_eq!(seen, [(0, 4), (4, 8)]);
    drop(slow);
    setup.idle().await;

    // One of a block is damaged, and one of another is elsewhere; each is told of itself.
    setup.store.damaged.lock().unwrap().insert((file, 6));
    let value = ChainingValue::of_chunk(ChunkIndex::new(6).unwrap(), &bytes[6 << 20..7 << 20]).unwrap();
    setup.slots.elsewhere.lock().unwrap().insert((file, 6), (value, bytes.slice(6 << 20..7 << 20)));
    let taken = setup.store.take(file, 1);
    setup.slots.elsewhere.lock().unwrap().insert((file, 1), taken);
    assert!(setup.read(0, size).await.unwrap() == bytes);
    assert_eq!(*setup.slots.reported.lock().unwrap(), [(file, 6)]);
    assert_eq!(asked(), [(0, 4), (4, 8), (8, 11)]);

    // A store that cannot be asked is not asked again for each chunk of the block.
    for chunk in 8..11 {
        let held = setup.store.take(file, chunk);
        setup.store.give(file, chunk, held.clone());
        setup.slots.elsewhere.lock().unwrap().insert((file, chunk), held);
        setup.store.damaged.lock().unwrap().insert((file, chunk));
    }
    *setup.store.fail.lock().unwrap() = Some(StoreError::Unreachable { reason: "away".into() });
    assert!(setup.read(8 * edge, size).await.unwrap() == bytes[8 << 20..]);
    assert_eq!(*setup.slots.reported.lock().unwrap(), [(file, 6)], "nobody looked at them");
    setup.idle().await;

    // With little memory each is read by itself.
    asked();
    let most = setup.memory.try_take(20 << 20).unwrap();
    assert!(setup.read(0, size).await.unwrap() == bytes);
    assert!(asked().is_empty());
    drop(most);
    setup.idle().await;
}

#[tokio::test]
async fn a_stream_stays_inside_the_memory_budget() {
    let setup = setup_with(MemoryBudget::new(2 << 20), Duration::from_millis(20));
    let (_, bytes) = setup.upload(8 * CHUNK_LEN).await;
    assert!(setup.read(0, 8 * CHUNK_LEN).await.unwrap() == bytes, "two chunks at a time are enough");
    let mut slow = setup.worker.read(&setup.context, ID, 0..8 * CHUNK_LEN).await.unwrap();
    let first = slow.next().await.unwrap().unwrap();
    assert!(setup.memory.used() <= 2 << 20);
    drop((slow, first));
    setup.idle().await;
    let all = setup.memory.try_take(2 << 20).unwrap();
    assert_eq!(setup.read(0, 1).await.unwrap_err().problem, Problem::Overloaded);
    drop(all);
}

#[tokio::test]
async fn a_stream_whose_datacenter_dies_breaks_off_and_does_not_end() {
    let setup = setup();
    setup.upload(8 * CHUNK_LEN).await;
    let mut stream = setup.worker.read(&setup.context, ID, 0..8 * CHUNK_LEN).await.unwrap();
    stream.next().await.unwrap().unwrap();
    setup.tasks.kill().await;
    let rest: Vec<_> = stream.collect().await;
    assert_eq!(rest.last().unwrap().as_ref().unwrap_err().problem, Problem::Stopping);
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_stalls_gives_its_memory_back() {
    let setup = setup();
    setup.upload(8 * CHUNK_LEN).await;
    let mut stream = setup.worker.read(&setup.context, ID, 0..8 * CHUNK_LEN).await.unwrap();
    stream.next().await.unwrap().unwrap();
    assert_eq!(setup.tasks.stop(Duration::from_secs(90)).await, Stopped::Clean);
    let rest: Vec<_> = stream.collect().await;
    assert_eq!(rest.last().unwrap().as_ref().unwrap_err().problem, Problem::Stopping);
    drop(rest);
    assert_eq!(setup.memory.used(), 0);
}

#[tokio::test]
async fn contexts_and_scopes_are_checked_before_anything_else() {
    let setup = setup();
    setup.upload(CHUNK_LEN).await;
    let only = |scope| sign(&setup.material, TENANT, &[scope]);
    let problem = |result: Result<_, Refusal>| result.map(|_: ()| ()).unwrap_err().problem;
    let read_only = setup.worker.put_chunks(&only(Scope::Read), put(0, content(CHUNK_LEN))).await;
    assert_eq!(problem(read_only.map(|_| ())), Problem::Forbidden);
    let write_only = setup.worker.read(&only(Scope::Write), ID, 0..1).await;
    assert_eq!(problem(write_only.map(|_| ())), Problem::Forbidden);
    assert_eq!(problem(setup.worker.remove(&only(Scope::Write), ID).await), Problem::Forbidden);
    assert!(setup.worker.about(&only(Scope::Delete)).await.is_ok());
    let forged = SignedContext::from_bytes(vec![0; 200]).unwrap();
    assert_eq!(problem(setup.worker.remove(&forged, ID).await), Problem::InvalidToken);
    let stranger = sign(&setup.material, TenantId::new(8), &Scope::ALL);
    let other = setup.worker.open(&stranger, ID).await;
    assert_eq!(problem(other.map(|_| ())), Problem::NotFound, "another tenant's file");
}

#[tokio::test]
async fn what_the_store_refuses_is_named() {
    let setup = setup();
    setup.create(CHUNK_LEN).await;
    let full = StoreError::Full { free: 1, reserve: 2 };
    for (error, problem) in [
        (full, Problem::VolumeFull),
        (StoreError::ReadOnly { reason: "EIO".into() }, Problem::ReadOnly),
        (StoreError::Closing, Problem::Stopping),
        (StoreError::ClaimLost, Problem::Timeout),
        (StoreError::Io { operation: "write".into(), reason: "EIO".into() }, Problem::Unavailable),
    ] {
        *setup.store.fail.lock().unwrap() = Some(error);
        let refusal = setup.worker.put_chunks(&setup.context, put(0, content(CHUNK_LEN))).await.unwrap_err();
        assert_eq!(refusal.problem, problem);
        assert!(refusal.retry_after.is_some());
    }
}

/// Fault 51: what a tenant sends over its rate is refused before the body, so that others keep their share.
#[tokio::test(start_paused = true)]
async fn a_worker_counts_as_asked_from_its_first_body_until_a_while_after_its_last() {
    let setup = setup();
    setup.create(CHUNK_LEN).await;
    assert!(!setup.worker.says().is_asked, "metadata is no body");
    setup.worker.put_chunks(&setup.context, put(0, content(CHUNK_LEN))).await.unwrap();
    assert!(setup.worker.says().is_asked);
    tokio::time::advance(Duration::from_secs(240)).await;
    assert!(setup.worker.says().is_asked);
    tokio::time::advance(Duration::from_secs(61)).await;
    assert!(!setup.worker.says().is_asked);
}

#[tokio::test]
async fn a_tenant_that_goes_too_fast_waits_and_no_other_does() {
    let setup = setup();
    let fast = sign_with_rate(&setup.material, TENANT, &Scope::ALL, 2 * CHUNK_LEN);
    let other = sign_with_rate(&setup.material, TenantId::new(8), &Scope::ALL, 2 * CHUNK_LEN);
    let create = |context: SignedContext| {
        let fields = MetadataFields { size: Some(64 * CHUNK_LEN), ..MetadataFields::default() };
        let new = NewFile { id: ID, fields, home: None, way: Way::Direct };
        let worker = &setup.worker;
        async move { worker.create(&context, new).await }
    };
    create(fast.clone()).await.unwrap();
    create(other.clone()).await.unwrap();
    let mut taken = 0;
    let refused = loop {
        match setup.worker.put_chunks(&fast, put(taken, content(CHUNK_LEN))).await {
            Ok(_) => taken += 1,
            Err(refusal) => break refusal,
        }
    };
    // A second of its rate.
    assert_eq!(taken, 2);
    assert_eq!(refused.problem, Problem::RateLimited);
    let wait = refused.retry_after.unwrap();
    assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{wait:?}");
    // Refused before the body: of this one not a byte can come.
    type Piece = Option<Result<Bytes, Refusal>>;
    let unasked = stream::poll_fn(|_| -> std::task::Poll<Piece> { panic!("the body was asked for") }).boxed();
    let start = ChunkIndex::new(taken).unwrap();
    let more = PutChunks { id: ID, start, len: CHUNK_LEN, expected: None, body: unasked, way: Way::Direct };
    let again = setup.worker.put_chunks(&fast, more).await.unwrap_err();
    assert_eq!(again.problem, Problem::RateLimited);
    // Whatever else it asks is no way around, at any door that leads here; the bytes of a small file are not asked for.
    assert_eq!(create(fast.clone()).await.unwrap_err().problem, Problem::RateLimited);
    assert_eq!(setup.worker.status(&fast, ID, None).await.unwrap_err().problem, Problem::RateLimited);
    assert_eq!(setup.worker.admit_whole(&fast, ID, 9).await.unwrap_err().problem, Problem::RateLimited);
    assert_eq!(setup.worker.remove(&fast, ID).await.unwrap_err().problem, Problem::RateLimited);
    let read = setup.worker.read(&fast, ID, 0..CHUNK_LEN).await.err().unwrap();
    assert_eq!(read.problem, Problem::RateLimited);

    // While it is held back, the other goes at its own rate all along.
    for round in 0..8 {
        for chunk in 0..2 {
            setup.worker.put_chunks(&other, put(2 * round + chunk, content(CHUNK_LEN))).await.unwrap();
        }
        assert!(setup.worker.put_chunks(&fast, put(taken, content(8 * CHUNK_LEN))).await.is_err());
        setup.clock.advance(1_000);
        // And it gets exactly its own.
        setup.worker.put_chunks(&fast, put(taken, content(CHUNK_LEN))).await.unwrap();
        setup.worker.put_chunks(&fast, put(taken + 1, content(CHUNK_LEN))).await.unwrap();
        taken += 2;
    }
    setup.idle().await;
}
