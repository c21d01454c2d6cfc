//! The contract of a chunk store, as tests that any backend can be put through: [`contract_tests!`] takes a
//! [`Backend`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sluice_engine::geometry::{Geometry, GeometryError, Run};
use sluice_engine::hash::Root;
use sluice_engine::ids::{FileId, Generation, TenantId};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::metadata::{MetadataFields, MetadataRecord};
use sluice_engine::share::{Share, Shares};
use sluice_store::{
    Advice, ChunkStore, MAX_FACTS_LEN, MAX_MARK_LEN, MAX_PAGE_LEN, MAX_STATE_LEN, RecordOutcome, StoreError,
    Whole, WholeOutcome,
};
use tokio::time::timeout;

use crate::material::{
    FULL, TENANT, client, content, file, index, listed as ids, numbers, put, put_all, put_in_pieces, record,
    root, share, values,
};

/// A place where stores of one kind can be opened.
pub(crate) trait Backend {
    /// Opens the store; after it was closed, the same one again.
    async fn open(&self) -> Arc<dyn ChunkStore>;
}

/// Long enough to be sure that something waits.
const A_WHILE: Duration = Duration::from_millis(50);

/// Makes one test of each rule.
macro_rules! contract_tests {
    ($backend:expr; $($rule:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                let backend = $backend;
                $crate::contract::$rule(&backend).await;
            }
        )*
    };
    ($backend:expr) => {
        $crate::contract::contract_tests! { $backend;
            a_record_is_stored_once_and_never_replaced,
            a_finished_run_is_there_with_values_and_bytes,
            chunks_that_are_read_together_are_what_each_of_them_is,
            pieces_of_any_size_make_the_same_chunk,
            runs_are_checked_against_the_shape,
            provisional_chunks_are_kept_until_the_record_refutes_them,
            a_size_that_the_record_leaves_open_is_settled_once_and_for_good,
            a_chunk_with_a_record_is_immutable,
            a_partly_recorded_run_is_compared_where_it_is_and_written_where_not,
            a_run_is_recorded_as_a_whole_or_not_at_all,
            too_many_or_too_few_bytes_are_refused,
            announced_values_are_checked_before_anything_is_recorded,
            a_run_waits_for_the_writer_of_its_chunks,
            a_waiting_run_gets_the_same_answer_or_a_conflict,
            a_dropped_writer_gives_its_claim_up,
            unknown_files_are_told_apart_from_missing_chunks,
            lost_chunks_go_and_the_generation_rises,
            facts_are_replaced_and_bounded,
            a_whole_file_is_published_under_its_root_only,
            small_and_empty_files_are_published,
            a_freed_file_keeps_record_and_facts,
            a_dropped_file_never_comes_back,
            drops_and_frees_end_runs_under_way,
            orphans_are_discarded_and_files_with_a_record_are_not,
            generations_have_a_floor,
            the_floor_of_a_share_is_that_of_its_files,
            overlapping_shares_take_the_highest_floor,
            files_are_listed_in_order,
            pages_are_a_cache,
            the_state_is_replaced_and_bounded,
            states_of_shares_are_kept_apart,
            marks_of_scrubs_are_kept_apart,
            everything_is_there_after_closing_and_opening,
            a_closed_store_takes_nothing,
            dropped_futures_lose_nothing,
            a_whole_file_is_durable_and_published_at_once,
            a_whole_file_is_refused_when_it_is_not_what_it_says,
            whole_files_of_all_lengths_are_there_after_opening,
            two_whole_files_of_one_id_are_one_or_a_conflict,
            what_has_begun_is_not_taken_whole,
            a_whole_file_can_be_freed_lost_and_filled_again,
            a_dropped_id_never_comes_back_whole,
            what_is_elsewhere_is_known_and_listed,
            many_whole_files_are_listed_read_and_dropped,
        }
    };
}
pub(crate) use contract_tests;

pub(crate) async fn a_record_is_stored_once_and_never_replaced(backend: &impl Backend) {
    let store = backend.open().await;
    let first = record(1, Some(10));
    assert_eq!(store.put_record(&first).await.unwrap(), RecordOutcome::Stored);
    assert_eq!(store.put_record(&first).await.unwrap(), RecordOutcome::Known);
    let other = record(1, Some(11));
    let error = store.put_record(&other).await.unwrap_err();
    assert!(
        matches!(error, StoreError::RecordConflict { held, got } if held == first.digest() && got == other.digest())
    );
    assert_eq!(error.advice(), Advice::Fix);
    let summary = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!(summary.record, Some(first));
    assert_eq!((summary.tenant, summary.generation), (TENANT, Generation::new(1)));
    assert!(summary.held.is_empty() && summary.facts.is_empty() && summary.published.is_none());

    let (one, two) = (record(2, Some(1)), record(2, Some(2)));
    let (one, two) = tokio::join!(store.put_record(&one), store.put_record(&two));
    assert!(one.is_ok() != two.is_ok(), "one of two wins: {one:?}, {two:?}");
}

pub(crate) async fn a_finished_run_is_there_with_values_and_bytes(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, 2 * FULL + 5);
    store.put_record(&record(1, Some(8 * CHUNK_LEN + 2 * CHUNK_LEN + 5))).await.unwrap();
    let receipt = put(&*store, file(1), 8, &bytes.slice(..2 * FULL)).await.unwrap();
    assert_eq!(receipt.values, values(8, &bytes[..2 * FULL]));
    assert_eq!(receipt.new_chunks, 2);
    put(&*store, file(1), 10, &bytes.slice(2 * FULL..)).await.unwrap();
    for (i, chunk) in bytes.chunks(FULL).enumerate() {
        assert_eq!(store.read_chunk(file(1), index(8 + i as u64)).await.unwrap(), chunk);
    }
    let found = store.values(file(1), 7..12).await.unwrap();
    let expected = values(8, &bytes);
    assert_eq!(found, [None, Some(expected[0]), Some(expected[1]), Some(expected[2]), None]);
    let summary = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!((summary.held, summary.held_bytes), (vec![8..11], 2 * CHUNK_LEN + 5));
    assert!(matches!(store.values(file(1), 0..65_537).await, Err(StoreError::TooLarge { .. })));
    assert_eq!(store.values(file(1), 0..65_536).await.unwrap().len(), 65_536);
}

pub(crate) async fn chunks_that_are_read_together_are_what_each_of_them_is(backend: &impl Backend) {
    let store = backend.open().await;
    let at_once = store.at_once();
    assert!(at_once == 1 || at_once >= 8);
    let bytes = content(3, 10 * FULL + 5);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    let whole = |chunks: std::ops::Range<u64>| {
        let end = bytes.len().min(chunks.end as usize * FULL);
        bytes.slice(chunks.start as usize * FULL..end)
    };
    // Whether each range comes in one go; what comes is right.
    let read = async |ranges: &[(std::ops::Range<u64>, bool)]| {
        for (chunks, comes) in ranges {
            let together = store.read_together(file(1), chunks.clone()).await.unwrap();
            assert_eq!(together.is_some(), *comes && at_once > 1, "{chunks:?}");
            if let Some(together) = together {
                assert!(together.bytes == whole(chunks.clone()), "{chunks:?}");
                assert_eq!(together.values, values(chunks.start, &together.bytes), "{chunks:?}");
            }
        }
    };
    read(&[(0..8, false), (0..1, false)]).await;
    for run in [0..2, 2..4, 8..10, 10..11] {
        put(&*store, file(1), run.start, &whole(run.clone())).await.unwrap();
    }
    // In one object each, and not across two of them, nor where some are missing.
    read(&[
        (0..2, true),
        (2..4, true),
        (10..11, true),
        (0..4, false),
        (1..3, false),
        (0..8, false),
        (9..11, false),
    ])
    .await;
    put(&*store, file(1), 4, &whole(4..8)).await.unwrap();
    store.publish(file(1), root(&bytes)).await.unwrap();
    // Who asked before may believe for a moment that they are where they were.
    for _ in 0..200 {
        if at_once == 1 || store.read_together(file(1), 0..8).await.unwrap().is_some() {
            break;
        }
        tokio::time::sleep(A_WHILE).await;
    }
    read(&[(0..8, true), (8..11, true), (3..6, true), (10..11, true)]).await;
    assert!(matches!(store.read_together(file(9), 0..2).await, Ok(None) | Err(StoreError::NoFile(_))));
}

pub(crate) async fn pieces_of_any_size_make_the_same_chunk(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(2, FULL + 77);
    for (i, piece) in [313, 4096, 65_536, 70_000, FULL, 2 * FULL].into_iter().enumerate() {
        let file = file(i as u128);
        let receipt = put_in_pieces(&*store, file, 4, &bytes, piece).await.unwrap();
        assert_eq!(receipt.values, values(4, &bytes), "pieces of {piece}");
        assert_eq!(store.read_chunk(file, index(5)).await.unwrap(), bytes[FULL..]);
    }
}

pub(crate) async fn runs_are_checked_against_the_shape(backend: &impl Backend) {
    let store = backend.open().await;
    store.put_record(&record(1, Some(2 * CHUNK_LEN + 5))).await.unwrap();
    let begin = async |first: u64, count: u64, len: u64| {
        let run = Run::new(index(first), count).unwrap();
        store.begin_run(file(1), TENANT, run, len).await.err()
    };
    assert!(matches!(begin(3, 1, 5).await, Some(StoreError::Geometry(GeometryError::PastEnd { .. }))));
    assert!(matches!(begin(2, 1, 6).await, Some(StoreError::Geometry(GeometryError::Length { .. }))));
    assert!(matches!(begin(0, 1, 5).await, Some(StoreError::Geometry(GeometryError::Length { .. }))));
    assert!(matches!(begin(0, 2, CHUNK_LEN).await, Some(StoreError::Geometry(_))));
    assert!(matches!(begin(0, 1, 0).await, Some(StoreError::Geometry(GeometryError::Empty))));
    assert!(begin(2, 1, 5).await.is_none());
    let run = Run::new(index(0), 2).unwrap();
    let error = store.begin_run(file(2), TENANT, run, 3 * CHUNK_LEN).await.err().unwrap();
    assert!(matches!(error, StoreError::Geometry(_)), "a provisional run has the length of its chunks");
    assert_eq!(store.summary(file(2)).await.unwrap(), None, "nothing is known of a file by asking");
}

pub(crate) async fn provisional_chunks_are_kept_until_the_record_refutes_them(backend: &impl Backend) {
    let store = backend.open().await;
    put(&*store, file(1), 0, &content(1, FULL)).await.unwrap();
    put(&*store, file(1), 1, &content(2, FULL)).await.unwrap();
    put(&*store, file(1), 2, &content(3, 9)).await.unwrap();
    put(&*store, file(1), 5, &content(4, FULL)).await.unwrap();
    let before = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!((before.tenant, before.record), (TENANT, None));
    assert_eq!((before.held, before.held_bytes), (vec![0..3, 5..6], 3 * CHUNK_LEN + 9));
    store.put_record(&record(1, Some(CHUNK_LEN + 9))).await.unwrap();
    let after = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!((after.held, after.held_bytes), (vec![0..1], CHUNK_LEN));
    assert!(after.generation > before.generation, "what was said of them is void");
    assert!(matches!(store.read_chunk(file(1), index(1)).await, Err(StoreError::Missing { .. })));
    put(&*store, file(1), 1, &content(5, 9)).await.unwrap();
    assert_eq!(store.read_chunk(file(1), index(1)).await.unwrap(), content(5, 9));
}

pub(crate) async fn a_size_that_the_record_leaves_open_is_settled_once_and_for_good(backend: &impl Backend) {
    let bytes = content(1, 2 * FULL + 5);
    let size = Geometry::new(bytes.len() as u64).unwrap();
    let store = backend.open().await;
    assert!(matches!(store.put_size(file(1), size).await, Err(StoreError::NoFile(_))));
    store.put_record(&record(1, None)).await.unwrap();
    assert_eq!(store.summary(file(1)).await.unwrap().unwrap().size, None);
    put(&*store, file(1), 0, &bytes.slice(..2 * FULL)).await.unwrap();
    // Neither can belong to a file of the size that comes.
    put(&*store, file(1), 2, &content(2, 9)).await.unwrap();
    put(&*store, file(1), 3, &content(3, FULL)).await.unwrap();
    let before = store.summary(file(1)).await.unwrap().unwrap();
    store.put_size(file(1), size).await.unwrap();
    store.put_size(file(1), size).await.unwrap();
    let after = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!((after.size, after.held), (Some(size), vec![0..2]));
    assert!(after.generation > before.generation, "what was said of them is void");
    let other = Geometry::new(7).unwrap();
    let error = store.put_size(file(1), other).await.unwrap_err();
    assert!(matches!(error, StoreError::SizeConflict { held, got: 7 } if held == size.size()), "{error}");
    assert_eq!(error.advice(), Advice::Fix);

    store.close().await.unwrap();
    drop(store);
    let store = backend.open().await;
    assert_eq!(store.summary(file(1)).await.unwrap().unwrap().size, Some(size));
    let run = Run::new(index(2), 1).unwrap();
    let short = store.begin_run(file(1), TENANT, run, 6).await.err();
    assert!(matches!(short, Some(StoreError::Geometry(GeometryError::Length { expected: 5, got: 6 }))));
    put(&*store, file(1), 2, &bytes.slice(2 * FULL..)).await.unwrap();
    store.publish(file(1), root(&bytes)).await.unwrap();
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));

    // Where the record says the size there is nothing to settle.
    store.put_record(&record(2, Some(7))).await.unwrap();
    store.put_size(file(2), other).await.unwrap();
    assert!(matches!(store.put_size(file(2), size).await, Err(StoreError::SizeConflict { .. })));
}

pub(crate) async fn a_chunk_with_a_record_is_immutable(backend: &impl Backend) {
    let store = backend.open().await;
    let (bytes, other) = (content(1, 2 * FULL), content(2, 2 * FULL));
    let first = put(&*store, file(1), 0, &bytes).await.unwrap();
    let again = put(&*store, file(1), 0, &bytes).await.unwrap();
    assert_eq!(again.values, first.values);
    assert_eq!(again.new_chunks, 0);
    let error = put(&*store, file(1), 0, &other).await.unwrap_err();
    let (held, got) = (first.values[0], values(0, &other)[0]);
    assert!(
        matches!(error, StoreError::ChunkConflict { index: at, held: h, got: g } if at == index(0) && h == held && g == got)
    );
    assert_eq!(error.advice(), Advice::Fix);
    for i in 0..2 {
        let chunk = bytes.slice(i * FULL..(i + 1) * FULL);
        assert_eq!(store.read_chunk(file(1), index(i as u64)).await.unwrap(), chunk);
    }
}

pub(crate) async fn a_partly_recorded_run_is_compared_where_it_is_and_written_where_not(
    backend: &impl Backend,
) {
    let store = backend.open().await;
    let bytes = content(1, 4 * FULL);
    put(&*store, file(1), 1, &bytes.slice(FULL..2 * FULL)).await.unwrap();
    let receipt = put(&*store, file(1), 0, &bytes).await.unwrap();
    assert_eq!((receipt.values, receipt.new_chunks), (values(0, &bytes), 3));
    for i in 0..4 {
        let chunk = bytes.slice(i * FULL..(i + 1) * FULL);
        assert_eq!(store.read_chunk(file(1), index(i as u64)).await.unwrap(), chunk);
    }
}

pub(crate) async fn a_run_is_recorded_as_a_whole_or_not_at_all(backend: &impl Backend) {
    let store = backend.open().await;
    put(&*store, file(1), 3, &content(9, FULL)).await.unwrap();
    let error = put(&*store, file(1), 0, &content(1, 4 * FULL)).await.unwrap_err();
    assert!(matches!(error, StoreError::ChunkConflict { index: at, .. } if at == index(3)));
    let summary = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!(summary.held, [3..4]);
    assert_eq!(store.read_chunk(file(1), index(3)).await.unwrap(), content(9, FULL));
}

pub(crate) async fn too_many_or_too_few_bytes_are_refused(backend: &impl Backend) {
    let store = backend.open().await;
    let run = Run::new(index(0), 1).unwrap();
    let mut writer = store.begin_run(file(1), TENANT, run, 100).await.unwrap();
    writer.write(content(1, 60)).await.unwrap();
    let error = writer.write(content(1, 41)).await.unwrap_err();
    assert!(matches!(error, StoreError::Length { expected: 100, got: 101 }));
    assert!(writer.finish(None).await.is_err(), "a run that went wrong stays wrong");
    let mut writer = store.begin_run(file(1), TENANT, run, 100).await.unwrap();
    writer.write(content(1, 99)).await.unwrap();
    let error = writer.finish(None).await.unwrap_err();
    assert!(matches!(error, StoreError::Length { expected: 100, got: 99 }));
    assert_eq!(store.summary(file(1)).await.unwrap(), None);
}

pub(crate) async fn announced_values_are_checked_before_anything_is_recorded(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, 2 * FULL);
    let run = Run::new(index(0), 2).unwrap();
    let good = values(0, &bytes);
    let mut wrong = good.clone();
    wrong[1] = wrong[0];
    for expected in [&wrong[..], &good[..1]] {
        let mut writer = store.begin_run(file(1), TENANT, run, bytes.len() as u64).await.unwrap();
        writer.write(bytes.clone()).await.unwrap();
        let error = writer.finish(Some(expected)).await.unwrap_err();
        match expected.len() {
            2 => {
                assert!(
                    matches!(error, StoreError::ValueMismatch { index: at, got, .. } if at == index(1) && got == good[1])
                )
            }
            _ => assert!(matches!(error, StoreError::Length { expected: 2, got: 1 })),
        }
        assert_eq!(store.summary(file(1)).await.unwrap(), None);
    }
    let mut writer = store.begin_run(file(1), TENANT, run, bytes.len() as u64).await.unwrap();
    writer.write(bytes.clone()).await.unwrap();
    assert_eq!(writer.finish(Some(&good)).await.unwrap().values, good);
}

pub(crate) async fn a_run_waits_for_the_writer_of_its_chunks(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, 4 * FULL);
    let run = Run::new(index(0), 2).unwrap();
    let mut first = store.begin_run(file(1), TENANT, run, 2 * CHUNK_LEN).await.unwrap();
    let over = put(&*store, file(1), 0, &bytes);
    tokio::pin!(over);
    assert!(timeout(A_WHILE, &mut over).await.is_err(), "it overlaps");
    timeout(Duration::from_secs(5), put(&*store, file(1), 2, &bytes.slice(2 * FULL..)))
        .await
        .unwrap()
        .unwrap();
    timeout(Duration::from_secs(5), put(&*store, file(2), 0, &bytes)).await.unwrap().unwrap();
    first.write(bytes.slice(..2 * FULL)).await.unwrap();
    assert!(timeout(A_WHILE, &mut over).await.is_err());
    assert_eq!(first.finish(None).await.unwrap().new_chunks, 2);
    let receipt = timeout(Duration::from_secs(5), over).await.unwrap().unwrap();
    assert_eq!((receipt.values, receipt.new_chunks), (values(0, &bytes), 0));
}

pub(crate) async fn a_waiting_run_gets_the_same_answer_or_a_conflict(backend: &impl Backend) {
    let store = backend.open().await;
    let (bytes, other) = (content(1, FULL), content(2, FULL));
    let mut runs = Vec::new();
    for i in 0..12 {
        let (store, bytes) = (store.clone(), if i % 3 == 0 { other.clone() } else { bytes.clone() });
        runs.push(tokio::spawn(async move { (put(&*store, file(1), 5, &bytes).await, bytes) }));
    }
    let mut new_chunks = 0;
    let mut results = Vec::new();
    for run in runs {
        let (result, bytes) = run.await.unwrap();
        new_chunks += result.as_ref().map_or(0, |receipt| receipt.new_chunks);
        results.push((result, bytes));
    }
    assert_eq!(new_chunks, 1, "one writer wins");
    let stored = store.read_chunk(file(1), index(5)).await.unwrap();
    for (result, bytes) in results {
        match result {
            Ok(receipt) => assert_eq!((bytes, receipt.values), (stored.clone(), values(5, &stored))),
            Err(error) => {
                assert!(matches!(error, StoreError::ChunkConflict { .. }), "{error}");
                assert_ne!(bytes, stored);
            }
        }
    }
}

pub(crate) async fn a_dropped_writer_gives_its_claim_up(backend: &impl Backend) {
    let store = backend.open().await;
    let run = Run::new(index(0), 1).unwrap();
    for len in [0, 10, 200_000] {
        let mut writer = store.begin_run(file(1), TENANT, run, CHUNK_LEN).await.unwrap();
        writer.write(content(2, len)).await.unwrap();
        drop(writer);
        assert_eq!(store.summary(file(1)).await.unwrap(), None);
    }
    // Given up in the middle of a write.
    for _ in 0..20 {
        let mut writer = store.begin_run(file(1), TENANT, run, CHUNK_LEN).await.unwrap();
        let _ = timeout(Duration::from_micros(50), writer.write(content(2, FULL))).await;
    }
    let bytes = content(1, FULL);
    let put = timeout(Duration::from_secs(5), put(&*store, file(1), 0, &bytes));
    assert_eq!(put.await.unwrap().unwrap().new_chunks, 1);
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), content(1, FULL));
}

pub(crate) async fn unknown_files_are_told_apart_from_missing_chunks(backend: &impl Backend) {
    let store = backend.open().await;
    assert_eq!(store.summary(file(9)).await.unwrap(), None);
    assert!(matches!(store.read_chunk(file(9), index(0)).await, Err(StoreError::NoFile(_))));
    assert!(matches!(store.values(file(9), 0..1).await, Err(StoreError::NoFile(_))));
    assert!(matches!(store.lose(file(9), &[]).await, Err(StoreError::NoFile(_))));
    assert!(matches!(store.put_facts(file(9), b"f").await, Err(StoreError::NoFile(_))));
    assert!(matches!(store.publish(file(9), Root::empty()).await, Err(StoreError::NoFile(_))));
    assert!(matches!(store.recheck(file(9)).await, Err(StoreError::NoFile(_))));
    assert!(matches!(store.free(file(9)).await, Err(StoreError::NoFile(_))));
    store.put_record(&record(1, Some(CHUNK_LEN))).await.unwrap();
    let error = store.read_chunk(file(1), index(0)).await.unwrap_err();
    assert!(matches!(error, StoreError::Missing { index: at } if at == index(0)));
    assert_eq!(error.advice(), Advice::Fix);
}

pub(crate) async fn lost_chunks_go_and_the_generation_rises(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, 4 * FULL);
    put(&*store, file(1), 0, &bytes).await.unwrap();
    store.publish(file(1), root(&bytes)).await.unwrap();
    let next = store.lose(file(1), &[index(1), index(3), index(77)]).await.unwrap();
    let summary = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!((summary.generation, next), (next, Generation::new(2)));
    assert_eq!((summary.held, summary.held_bytes), (vec![0..1, 2..3], 2 * CHUNK_LEN));
    assert_eq!(summary.published, None);
    assert!(matches!(store.read_chunk(file(1), index(1)).await, Err(StoreError::Missing { .. })));
    // What is lost may come back, also with other bytes: nothing stands any more.
    let other = content(9, FULL);
    assert_eq!(put(&*store, file(1), 1, &other).await.unwrap().new_chunks, 1);
    assert_eq!(store.read_chunk(file(1), index(1)).await.unwrap(), other);
    assert_eq!(store.lose(file(1), &[]).await.unwrap(), Generation::new(3));
}

pub(crate) async fn facts_are_replaced_and_bounded(backend: &impl Backend) {
    let store = backend.open().await;
    store.put_record(&record(1, None)).await.unwrap();
    store.put_facts(file(1), b"one").await.unwrap();
    store.put_facts(file(1), b"two").await.unwrap();
    assert_eq!(store.summary(file(1)).await.unwrap().unwrap().facts, b"two");
    store.put_facts(file(1), &[1; MAX_FACTS_LEN]).await.unwrap();
    let error = store.put_facts(file(1), &[1; MAX_FACTS_LEN + 1]).await.unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { got, limit, .. } if got == limit + 1));
}

pub(crate) async fn a_whole_file_is_published_under_its_root_only(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, 5 * FULL + 123);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    let good = root(&bytes);
    for at in [5, 0, 3, 1, 4] {
        let end = ((at + 1) * FULL).min(bytes.len());
        put(&*store, file(1), at as u64, &bytes.slice(at * FULL..end)).await.unwrap();
    }
    let error = store.publish(file(1), good).await.unwrap_err();
    assert!(matches!(error, StoreError::WrongRoot { expected, got: None } if expected == good));
    assert!(matches!(store.recheck(file(1)).await, Err(StoreError::NoFile(_))), "it is not published");
    put(&*store, file(1), 2, &bytes.slice(2 * FULL..3 * FULL)).await.unwrap();
    let error = store.publish(file(1), Root::empty()).await.unwrap_err();
    assert!(matches!(error, StoreError::WrongRoot { got: Some(got), .. } if got == good));
    assert_eq!(store.summary(file(1)).await.unwrap().unwrap().published, None);
    store.publish(file(1), good).await.unwrap();
    store.publish(file(1), good).await.unwrap();
    assert!(matches!(store.publish(file(1), Root::empty()).await, Err(StoreError::WrongRoot { .. })));
    assert_eq!(store.summary(file(1)).await.unwrap().unwrap().published, Some(good));
    assert_eq!(store.recheck(file(1)).await.unwrap(), good);
    let (one, two) = tokio::join!(store.publish(file(1), good), store.publish(file(1), good));
    assert!(one.is_ok() && two.is_ok());
    assert_eq!(put(&*store, file(1), 0, &bytes.slice(..FULL)).await.unwrap().new_chunks, 0);
}

pub(crate) async fn small_and_empty_files_are_published(backend: &impl Backend) {
    let store = backend.open().await;
    for (n, len) in [(1, 1), (2, FULL), (3, 0), (4, 2 * FULL)] {
        let bytes = content(n as u64, len);
        let size = if n == 2 { None } else { Some(len as u64) };
        store.put_record(&record(n, size)).await.unwrap();
        put_all(&*store, file(n), &bytes).await.unwrap();
        assert!(matches!(
            store.publish(file(n), root(b"other")).await,
            Err(StoreError::WrongRoot { got: Some(_), .. })
        ));
        store.publish(file(n), root(&bytes)).await.unwrap();
        assert_eq!(store.recheck(file(n)).await.unwrap(), root(&bytes));
    }
}

pub(crate) async fn a_freed_file_keeps_record_and_facts(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, 2 * FULL);
    let record = record(1, Some(bytes.len() as u64));
    store.put_record(&record).await.unwrap();
    store.put_facts(file(1), b"facts").await.unwrap();
    put_all(&*store, file(1), &bytes).await.unwrap();
    store.publish(file(1), root(&bytes)).await.unwrap();
    let generation = store.free(file(1)).await.unwrap();
    assert_eq!(generation, Generation::new(2));
    let summary = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!((summary.record, summary.facts), (Some(record), b"facts".to_vec()));
    assert_eq!((summary.generation, summary.held_bytes, summary.published), (generation, 0, None));
    assert!(summary.held.is_empty());
    assert!(matches!(store.read_chunk(file(1), index(0)).await, Err(StoreError::Missing { .. })));
    assert!(store.free(file(1)).await.unwrap() > generation);
    // The file may come again.
    put_all(&*store, file(1), &bytes).await.unwrap();
    store.publish(file(1), root(&bytes)).await.unwrap();
    assert_eq!(store.read_chunk(file(1), index(1)).await.unwrap(), bytes[FULL..]);
}

pub(crate) async fn a_dropped_file_never_comes_back(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, FULL);
    store.put_record(&record(1, Some(CHUNK_LEN))).await.unwrap();
    put(&*store, file(1), 0, &bytes).await.unwrap();
    store.drop_file(file(1), TENANT, b"why").await.unwrap();
    store.drop_file(file(1), TENANT, b"why").await.unwrap();
    store.drop_file(file(2), TenantId::new(8), b"before it came").await.unwrap();
    let summary = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!((summary.facts, summary.held_bytes, summary.published), (b"why".to_vec(), 0, None));
    assert!(summary.held.is_empty());
    assert_eq!(store.summary(file(2)).await.unwrap().unwrap().tenant, TenantId::new(8));
    for n in [1, 2] {
        assert!(matches!(store.put_record(&record(n, Some(CHUNK_LEN))).await, Err(StoreError::Dropped(_))));
        assert!(matches!(put(&*store, file(n), 0, &bytes).await, Err(StoreError::Dropped(_))));
        assert!(matches!(store.read_chunk(file(n), index(0)).await, Err(StoreError::Dropped(_))));
        assert!(matches!(store.publish(file(n), Root::empty()).await, Err(StoreError::Dropped(_))));
        assert!(matches!(store.free(file(n)).await, Err(StoreError::Dropped(_))));
        assert!(!store.discard_orphan(file(n)).await.unwrap());
    }
    assert!(matches!(store.drop_file(file(3), TENANT, &[0; 4097]).await, Err(StoreError::TooLarge { .. })));
}

pub(crate) async fn drops_and_frees_end_runs_under_way(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, FULL);
    let run = Run::new(index(0), 1).unwrap();
    store.put_record(&record(1, Some(CHUNK_LEN))).await.unwrap();
    let mut writer = store.begin_run(file(1), TENANT, run, CHUNK_LEN).await.unwrap();
    writer.write(bytes.slice(..200_000)).await.unwrap();
    store.free(file(1)).await.unwrap();
    // Retry: nothing says that the bytes may not come. Where bytes are on their way for a while, the end says it.
    let lost = match writer.write(bytes.slice(200_000..)).await {
        Ok(()) => writer.finish(None).await.map(|_| ()),
        Err(error) => Err(error),
    };
    assert!(matches!(lost, Err(StoreError::ClaimLost)), "{lost:?}");
    assert_eq!(put(&*store, file(1), 0, &bytes).await.unwrap().new_chunks, 1);
    store.free(file(1)).await.unwrap();
    let mut writer = store.begin_run(file(1), TENANT, run, CHUNK_LEN).await.unwrap();
    writer.write(bytes.clone()).await.unwrap();
    store.drop_file(file(1), TENANT, b"").await.unwrap();
    let lost = writer.finish(None).await;
    assert!(matches!(lost, Err(StoreError::Dropped(_))), "{lost:?}");
    assert!(store.summary(file(1)).await.unwrap().unwrap().held.is_empty());
}

pub(crate) async fn orphans_are_discarded_and_files_with_a_record_are_not(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, FULL);
    put(&*store, file(1), 0, &bytes).await.unwrap();
    assert!(store.discard_orphan(file(1)).await.unwrap());
    assert_eq!(store.summary(file(1)).await.unwrap(), None);
    assert!(store.list(None, 10).await.unwrap().is_empty());
    let other = content(2, FULL);
    assert_eq!(put(&*store, file(1), 0, &other).await.unwrap().new_chunks, 1);
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), other);
    store.put_record(&record(1, Some(CHUNK_LEN))).await.unwrap();
    assert!(!store.discard_orphan(file(1)).await.unwrap());
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), other);
}

pub(crate) async fn generations_have_a_floor(backend: &impl Backend) {
    let store = backend.open().await;
    store.put_record(&record(1, None)).await.unwrap();
    store.raise_generations(Share::WHOLE, Generation::new(1 << 32)).await.unwrap();
    store.raise_generations(Share::WHOLE, Generation::new(5)).await.unwrap();
    store.put_record(&record(2, None)).await.unwrap();
    for n in [1, 2] {
        let summary = store.summary(file(n)).await.unwrap().unwrap();
        assert_eq!(summary.generation, Generation::new(1 << 32));
    }
    assert_eq!(store.lose(file(1), &[]).await.unwrap(), Generation::new((1 << 32) + 1));
    store.close().await.unwrap();
    drop(store);
    let store = backend.open().await;
    assert_eq!(store.summary(file(2)).await.unwrap().unwrap().generation, Generation::new(1 << 32));
    assert_eq!(store.summary(file(1)).await.unwrap().unwrap().generation, Generation::new((1 << 32) + 1));
}

async fn generation(store: &dyn ChunkStore, n: u128) -> u64 {
    store.summary(file(n)).await.unwrap().unwrap().generation.number()
}

pub(crate) async fn the_floor_of_a_share_is_that_of_its_files(backend: &impl Backend) {
    let mut store = backend.open().await;
    let part = share(3, 4);
    let inside: Vec<u128> = numbers(part, true, 0).take(6).collect();
    let outside: Vec<u128> = numbers(part, false, 0).take(4).collect();
    // Before and after; as ordinary files, and kept in one record.
    let put_both = async |store: &dyn ChunkStore, ns: &[u128]| {
        store.put_record(&record(ns[0], None)).await.unwrap();
        let small = Whole::of(content(1, 9));
        store.put_whole(&record(ns[1], Some(9)), b"", small).await.unwrap();
    };
    put_both(&*store, &inside[..2]).await;
    put_both(&*store, &outside[..2]).await;
    store.raise_generations(part, Generation::new(40)).await.unwrap();
    store.raise_generations(part, Generation::new(7)).await.unwrap();
    put_both(&*store, &inside[2..4]).await;
    put_both(&*store, &outside[2..4]).await;
    for life in 0..2 {
        for n in &inside[..4] {
            assert_eq!(generation(&*store, *n).await, 40, "life {life}");
        }
        for n in &outside[..4] {
            assert_eq!(generation(&*store, *n).await, 1, "life {life}");
        }
        if life == 0 {
            store.close().await.unwrap();
            drop(store);
            store = backend.open().await;
        }
    }
    put_both(&*store, &inside[4..6]).await;
    for n in &inside[4..6] {
        assert_eq!(generation(&*store, *n).await, 40);
    }
    assert_eq!(store.free(file(inside[0])).await.unwrap(), Generation::new(41));
    assert_eq!(store.free(file(inside[1])).await.unwrap(), Generation::new(41));
    assert_eq!(store.lose(file(inside[2]), &[]).await.unwrap(), Generation::new(41));
    assert_eq!(store.lose(file(inside[3]), &[index(0)]).await.unwrap(), Generation::new(41));
    assert_eq!(store.free(file(outside[0])).await.unwrap(), Generation::new(2));
    assert_eq!(store.lose(file(outside[1]), &[index(0)]).await.unwrap(), Generation::new(2));
}

pub(crate) async fn overlapping_shares_take_the_highest_floor(backend: &impl Backend) {
    let mut store = backend.open().await;
    let parts = [share(1, 2), share(12, 16), share(200, 256)];
    // In all of them; in the first two; in the first; in none.
    let find = |inside: [bool; 3]| {
        let fits = |n: &u128| parts.iter().zip(inside).all(|(part, inside)| part.has(file(*n)) == inside);
        (0u128..).find(fits).unwrap()
    };
    let all = [find([true; 3]), find([true, true, false]), find([true, false, false]), find([false; 3])];
    for n in all {
        store.put_record(&record(n, None)).await.unwrap();
    }
    let expect = async |store: &dyn ChunkStore, expected: [u64; 4]| {
        for (n, expected) in all.into_iter().zip(expected) {
            assert_eq!(generation(store, n).await, expected);
        }
    };
    store.raise_generations(parts[1], Generation::new(20)).await.unwrap();
    expect(&*store, [20, 20, 1, 1]).await;
    store.raise_generations(parts[0], Generation::new(10)).await.unwrap();
    expect(&*store, [20, 20, 10, 1]).await;
    store.raise_generations(parts[2], Generation::new(15)).await.unwrap();
    store.raise_generations(Share::WHOLE, Generation::new(5)).await.unwrap();
    expect(&*store, [20, 20, 10, 5]).await;
    store.raise_generations(parts[2], Generation::new(30)).await.unwrap();
    for _ in 0..2 {
        expect(&*store, [30, 20, 10, 5]).await;
        store.close().await.unwrap();
        drop(store);
        store = backend.open().await;
    }
    store.raise_generations(Share::WHOLE, Generation::new(25)).await.unwrap();
    expect(&*store, [30, 25, 25, 25]).await;
}

pub(crate) async fn files_are_listed_in_order(backend: &impl Backend) {
    let store = backend.open().await;
    let mut expected: Vec<FileId> = (0..40).map(file).collect();
    expected.sort_unstable();
    for n in 0..20 {
        store.put_record(&record(n, Some(1))).await.unwrap();
    }
    store.close().await.unwrap();
    drop(store);
    let store = backend.open().await;
    for n in 20..38 {
        put(&*store, file(n), 0, &content(1, 10)).await.unwrap();
    }
    store.drop_file(file(38), TENANT, b"").await.unwrap();
    store.drop_file(file(39), TENANT, b"").await.unwrap();
    assert_eq!(ids(&*store, None, 1000).await, expected);
    let mut listed = Vec::new();
    loop {
        let page = ids(&*store, listed.last().copied(), 7).await;
        if page.is_empty() {
            break;
        }
        listed.extend(page);
    }
    assert_eq!(listed, expected);
    assert!(store.list(None, 0).await.unwrap().is_empty());
}

pub(crate) async fn pages_are_a_cache(backend: &impl Backend) {
    let store = backend.open().await;
    store.put_record(&record(1, None)).await.unwrap();
    assert_eq!(store.page(file(1), 0).await.unwrap(), None);
    store.put_page(file(1), 0, b"page").await.unwrap();
    store.put_page(file(1), 3, b"other").await.unwrap();
    store.put_page(file(1), 0, b"newer").await.unwrap();
    for (segment, page) in [(0, &b"newer"[..]), (3, b"other")] {
        let found = store.page(file(1), segment).await.unwrap();
        assert!(found.is_none_or(|found| found == page));
    }
    assert_eq!(store.page(file(1), 1).await.unwrap(), None);
    let large = vec![0; MAX_PAGE_LEN + 1];
    assert!(matches!(store.put_page(file(1), 0, &large).await, Err(StoreError::TooLarge { .. })));
    assert!(store.put_page(file(1), 0, &large[1..]).await.is_ok());
}

pub(crate) async fn the_state_is_replaced_and_bounded(backend: &impl Backend) {
    let store = backend.open().await;
    assert!(store.states().await.unwrap().is_empty());
    let large = vec![3; MAX_STATE_LEN + 1];
    for part in [Share::WHOLE, share(1, 2)] {
        store.put_state(part, b"one").await.unwrap();
        store.put_state(part, b"two").await.unwrap();
        assert_eq!(store.states().await.unwrap()[&part], b"two");
        assert!(matches!(store.put_state(part, &large).await, Err(StoreError::TooLarge { .. })));
        store.put_state(part, &large[1..]).await.unwrap();
    }
    store.close().await.unwrap();
    drop(store);
    let store = backend.open().await;
    let expected = [Share::WHOLE, share(1, 2)].map(|part| (part, large[1..].to_vec()));
    assert_eq!(store.states().await.unwrap(), expected.into());
}

pub(crate) async fn states_of_shares_are_kept_apart(backend: &impl Backend) {
    let mut store = backend.open().await;
    // Shares of all divisions, so that they overlap.
    let of_each = |count: u32| Shares::new(count).unwrap().all();
    let parts: Vec<Share> = of_each(16).chain(of_each(4)).chain([share(0, 2), Share::WHOLE]).collect();
    let state = |part: Share, turn: u32| format!("what {part} remembers in turn {turn}").into_bytes();
    for life in 0..2 {
        let puts = parts.iter().map(|part| {
            let (store, part) = (store.clone(), *part);
            tokio::spawn(async move { store.put_state(part, &state(part, life)).await.unwrap() })
        });
        for put in puts.collect::<Vec<_>>() {
            put.await.unwrap();
        }
        store.put_state(share(3, 16), b"again").await.unwrap();
        let mut expected: BTreeMap<Share, Vec<u8>> =
            parts.iter().map(|part| (*part, state(*part, life))).collect();
        expected.insert(share(3, 16), b"again".to_vec());
        assert_eq!(store.states().await.unwrap(), expected);
        store.close().await.unwrap();
        drop(store);
        store = backend.open().await;
        assert_eq!(store.states().await.unwrap(), expected);
    }
    // What remembers nothing any more is as if it had never been.
    for part in parts.iter().filter(|part| **part != share(1, 4)) {
        store.put_state(*part, b"").await.unwrap();
    }
    for _ in 0..2 {
        assert_eq!(store.states().await.unwrap(), [(share(1, 4), state(share(1, 4), 1))].into());
        store.close().await.unwrap();
        drop(store);
        store = backend.open().await;
    }
}

pub(crate) async fn marks_of_scrubs_are_kept_apart(backend: &impl Backend) {
    let store = backend.open().await;
    let parts = [Share::WHOLE, share(0, 2), share(1, 2), share(0, 4), share(10, 16)];
    for part in &parts[..4] {
        assert_eq!(store.scrub_mark(*part).await.unwrap(), None);
        store.put_scrub_mark(*part, b"somewhere").await.unwrap();
        store.put_scrub_mark(*part, part.to_string().as_bytes()).await.unwrap();
    }
    let long = vec![0; MAX_MARK_LEN + 1];
    assert!(matches!(store.put_scrub_mark(parts[1], &long).await, Err(StoreError::TooLarge { .. })));
    store.close().await.unwrap();
    drop(store);
    let store = backend.open().await;
    for part in &parts[..4] {
        let mark = store.scrub_mark(*part).await.unwrap();
        assert!(mark.is_none_or(|mark| mark == part.to_string().into_bytes()), "{part}");
    }
    assert_eq!(store.scrub_mark(parts[4]).await.unwrap(), None);
}

pub(crate) async fn everything_is_there_after_closing_and_opening(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, 3 * FULL + 9);
    let record = record(1, Some(bytes.len() as u64));
    store.put_record(&record).await.unwrap();
    put_all(&*store, file(1), &bytes).await.unwrap();
    store.put_facts(file(1), b"facts").await.unwrap();
    store.publish(file(1), root(&bytes)).await.unwrap();
    put(&*store, file(2), 4, &content(2, FULL)).await.unwrap();
    put(&*store, file(2), 5, &content(2, 5)).await.unwrap();
    store.lose(file(2), &[index(4)]).await.unwrap();
    store.drop_file(file(3), TENANT, b"gone").await.unwrap();
    let before = [
        store.summary(file(1)).await.unwrap().unwrap(),
        store.summary(file(2)).await.unwrap().unwrap(),
        store.summary(file(3)).await.unwrap().unwrap(),
    ];
    store.close().await.unwrap();
    drop(store);
    let store = backend.open().await;
    for (n, before) in before.into_iter().enumerate() {
        assert_eq!(store.summary(file(n as u128 + 1)).await.unwrap(), Some(before));
    }
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
    assert_eq!(store.read_chunk(file(1), index(3)).await.unwrap(), bytes[3 * FULL..]);
    assert_eq!(store.read_chunk(file(2), index(5)).await.unwrap(), content(2, 5));
    assert_eq!(put(&*store, file(1), 0, &bytes.slice(..FULL)).await.unwrap().new_chunks, 0);
    assert!(matches!(put(&*store, file(3), 0, &bytes.slice(..9)).await, Err(StoreError::Dropped(_))));
}

pub(crate) async fn a_closed_store_takes_nothing(backend: &impl Backend) {
    let store = backend.open().await;
    store.put_record(&record(1, None)).await.unwrap();
    let run = Run::new(index(0), 1).unwrap();
    let mut writer = store.begin_run(file(1), TENANT, run, 10).await.unwrap();
    let closing = {
        let store = store.clone();
        tokio::spawn(async move { store.close().await })
    };
    tokio::time::sleep(A_WHILE).await;
    assert!(matches!(store.begin_run(file(1), TENANT, run, 10).await, Err(StoreError::Closing)));
    // What was begun is finished.
    writer.write(Bytes::from_static(b"0123456789")).await.unwrap();
    writer.finish(None).await.unwrap();
    timeout(Duration::from_secs(5), closing).await.unwrap().unwrap().unwrap();
    assert!(matches!(store.put_record(&record(2, None)).await, Err(StoreError::Closing)));
    assert!(matches!(store.put_state(Share::WHOLE, b"").await, Err(StoreError::Closing)));
    assert_eq!(StoreError::Closing.advice(), Advice::Retry);
    drop(store);
    let store = backend.open().await;
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), Bytes::from_static(b"0123456789"));
}

pub(crate) async fn dropped_futures_lose_nothing(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, FULL);
    for i in 0..60u64 {
        // Given up at some moment: then it is recorded or it is not.
        let patience = Duration::from_micros(i * 97);
        let result = timeout(patience, put(&*store, file(1), i, &bytes)).await;
        let facts = timeout(patience / 4, store.put_facts(file(1), &i.to_be_bytes())).await;
        if let Ok(result) = result {
            assert_eq!(result.unwrap().new_chunks, 1);
            assert_eq!(store.read_chunk(file(1), index(i)).await.unwrap(), bytes);
        }
        if let Ok(Ok(())) = facts {
            assert_eq!(store.summary(file(1)).await.unwrap().unwrap().facts, i.to_be_bytes());
        }
    }
    for i in 0..60 {
        let again = timeout(Duration::from_secs(5), put(&*store, file(1), i, &bytes)).await.unwrap();
        assert!(again.unwrap().new_chunks <= 1);
        assert_eq!(store.read_chunk(file(1), index(i)).await.unwrap(), bytes);
    }
}

pub(crate) async fn a_whole_file_is_durable_and_published_at_once(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, 1000);
    let record = record(1, Some(1000));
    let outcome = store.put_whole(&record, b"facts", Whole::of(bytes.clone())).await.unwrap();
    assert_eq!(outcome, WholeOutcome::Stored);
    for _ in 0..2 {
        let summary = store.summary(file(1)).await.unwrap().unwrap();
        assert_eq!((summary.tenant, summary.record.as_ref()), (TENANT, Some(&record)));
        assert_eq!((&summary.facts[..], summary.published), (&b"facts"[..], Some(root(&bytes))));
        assert_eq!((&summary.held[..], summary.held_bytes, summary.in_log), (&[0..1][..], 1000, true));
        assert_eq!(summary.generation, Generation::new(1));
        assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), bytes);
        assert_eq!(store.values(file(1), 0..2).await.unwrap(), [Some(values(0, &bytes)[0]), None]);
        assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
        assert!(matches!(store.read_chunk(file(1), index(1)).await, Err(StoreError::Missing { .. })));
        // Whatever is said of it again changes nothing.
        let again = store.put_whole(&record, b"other facts", Whole::of(bytes.clone())).await.unwrap();
        assert_eq!(again, WholeOutcome::Known);
        assert_eq!(store.put_record(&record).await.unwrap(), RecordOutcome::Known);
        assert_eq!(store.put_known(&record, b"").await.unwrap(), WholeOutcome::Known);
        assert_eq!(put(&*store, file(1), 0, &bytes).await.unwrap().new_chunks, 0);
        store.publish(file(1), root(&bytes)).await.unwrap();
        assert!(!store.discard_orphan(file(1)).await.unwrap());
        let other = put(&*store, file(1), 0, &content(2, 1000)).await.unwrap_err();
        assert!(matches!(other, StoreError::ChunkConflict { .. }), "{other}");
        store.put_facts(file(1), b"facts").await.unwrap();
    }
    store.put_facts(file(1), b"more facts").await.unwrap();
    let summary = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!((&summary.facts[..], summary.held_bytes), (&b"more facts"[..], 1000));
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), bytes);
}

pub(crate) async fn a_whole_file_is_refused_when_it_is_not_what_it_says(backend: &impl Backend) {
    let store = backend.open().await;
    let refused = async |record: &MetadataRecord, bytes: Bytes| {
        store.put_whole(record, b"", Whole::of(bytes)).await.unwrap_err()
    };
    let error = refused(&record(1, Some(9)), content(1, 10)).await;
    assert!(matches!(error, StoreError::Length { expected: 9, got: 10 }), "{error}");
    assert!(matches!(refused(&record(1, None), content(1, 10)).await, StoreError::Length { .. }));
    let long = content(1, FULL + 1);
    let error = refused(&record(1, Some(CHUNK_LEN + 1)), long).await;
    assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
    let fields =
        MetadataFields { size: Some(10), expected_root: Some(root(b"something else")), ..Default::default() };
    let expecting = MetadataRecord::new(TENANT, client(1), fields).unwrap();
    assert!(matches!(refused(&expecting, content(1, 10)).await, StoreError::WrongRoot { .. }));
    let facts = vec![0; MAX_FACTS_LEN + 1];
    let error = store.put_whole(&record(1, Some(1)), &facts, Whole::of(content(1, 1))).await.unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { .. }));
    assert_eq!(store.summary(file(1)).await.unwrap(), None, "nothing of all that is remembered");
}

pub(crate) async fn whole_files_of_all_lengths_are_there_after_opening(backend: &impl Backend) {
    let store = backend.open().await;
    let lens = [0, 1, 1023, 1024, 1025, 4096, 65_536, FULL - 1, FULL];
    for (n, len) in lens.into_iter().enumerate() {
        let record = record(n as u128, Some(len as u64));
        store.put_whole(&record, b"f", Whole::of(content(n as u64, len))).await.unwrap();
    }
    store.close().await.unwrap();
    drop(store);
    let store = backend.open().await;
    for (n, len) in lens.into_iter().enumerate() {
        let bytes = content(n as u64, len);
        let id = file(n as u128);
        let summary = store.summary(id).await.unwrap().unwrap();
        assert_eq!((summary.published, summary.held_bytes), (Some(root(&bytes)), len as u64));
        assert_eq!(summary.held.is_empty(), len == 0);
        assert_eq!(store.recheck(id).await.unwrap(), root(&bytes));
        if len > 0 {
            assert_eq!(store.read_chunk(id, index(0)).await.unwrap(), bytes);
            assert_eq!(store.values(id, 0..1).await.unwrap()[0], Some(values(0, &bytes)[0]));
        }
    }
}

pub(crate) async fn two_whole_files_of_one_id_are_one_or_a_conflict(backend: &impl Backend) {
    let store = backend.open().await;
    let (one, two) = (content(1, 50), content(2, 50));
    let first = record(1, Some(50));
    let both = tokio::join!(
        store.put_whole(&first, b"", Whole::of(one.clone())),
        store.put_whole(&first, b"", Whole::of(one.clone()))
    );
    let mut both = [both.0.unwrap(), both.1.unwrap()];
    both.sort_by_key(|outcome| *outcome as u8);
    assert_eq!(both, [WholeOutcome::Stored, WholeOutcome::Known]);
    let error = store.put_whole(&first, b"", Whole::of(two.clone())).await.unwrap_err();
    assert!(
        matches!(error, StoreError::WrongRoot { expected, got } if expected == root(&one) && got == Some(root(&two)))
    );
    assert_eq!(error.advice(), Advice::Fix);
    let error = store.put_whole(&record(1, Some(51)), b"", Whole::of(content(1, 51))).await.unwrap_err();
    assert!(matches!(error, StoreError::RecordConflict { .. }), "{error}");
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), one);
    let second = record(2, Some(50));
    let both = tokio::join!(
        store.put_whole(&second, b"", Whole::of(one)),
        store.put_whole(&second, b"", Whole::of(two))
    );
    assert!(both.0.is_ok() != both.1.is_ok(), "one of two wins: {both:?}");
}

pub(crate) async fn what_has_begun_is_not_taken_whole(backend: &impl Backend) {
    let store = backend.open().await;
    let bytes = content(1, 700);
    put(&*store, file(1), 0, &bytes).await.unwrap();
    store.put_record(&record(2, Some(700))).await.unwrap();
    let run = Run::from_len(index(0), 700).unwrap();
    let writer = store.begin_run(file(3), TENANT, run, 700).await.unwrap();
    for n in 1..4 {
        let outcome = store.put_whole(&record(n, Some(700)), b"", Whole::of(bytes.clone())).await.unwrap();
        assert_eq!(outcome, WholeOutcome::Begun, "file {n}");
    }
    drop(writer);
    let error = store.put_whole(&record(2, Some(701)), b"", Whole::of(content(1, 701))).await.unwrap_err();
    assert!(matches!(error, StoreError::RecordConflict { .. }), "{error}");
    put(&*store, file(2), 0, &bytes).await.unwrap();
    store.publish(file(2), root(&bytes)).await.unwrap();
    let known = store.put_whole(&record(2, Some(700)), b"", Whole::of(bytes.clone())).await.unwrap();
    assert_eq!(known, WholeOutcome::Known);
    assert!(store.put_whole(&record(2, Some(700)), b"", Whole::of(content(9, 700))).await.is_err());
}

pub(crate) async fn a_whole_file_can_be_freed_lost_and_filled_again(backend: &impl Backend) {
    let mut store = backend.open().await;
    let bytes = content(1, 3000);
    for n in 0..2 {
        store.put_whole(&record(n, Some(3000)), b"facts", Whole::of(bytes.clone())).await.unwrap();
    }
    let generation = store.free(file(0)).await.unwrap();
    assert_eq!(generation, Generation::new(2));
    assert_eq!(store.lose(file(1), &[index(0)]).await.unwrap(), generation);
    for life in 0..2 {
        for n in 0..2 {
            let summary = store.summary(file(n)).await.unwrap().unwrap();
            assert_eq!((summary.published, &summary.held[..], summary.held_bytes), (None, &[][..], 0));
            assert_eq!((summary.generation, &summary.facts[..]), (generation, &b"facts"[..]));
            assert_eq!(summary.record, Some(record(n, Some(3000))));
            assert!(matches!(store.read_chunk(file(n), index(0)).await, Err(StoreError::Missing { .. })));
            let again = store.put_whole(&record(n, Some(3000)), b"", Whole::of(bytes.clone())).await.unwrap();
            assert_eq!(again, WholeOutcome::Begun, "it comes back as a chunk");
        }
        if life == 0 {
            store.close().await.unwrap();
            drop(store);
            store = backend.open().await;
        }
    }
    for n in 0..2 {
        assert!(matches!(put(&*store, file(n), 0, &content(1, 9)).await, Err(StoreError::Geometry(_))));
        assert_eq!(put(&*store, file(n), 0, &bytes).await.unwrap().new_chunks, 1);
        store.publish(file(n), root(&bytes)).await.unwrap();
    }
    store.close().await.unwrap();
    drop(store);
    let store = backend.open().await;
    let mut both = [file(0), file(1)];
    both.sort_unstable();
    assert_eq!(ids(&*store, None, 9).await, both);
    for n in 0..2 {
        let summary = store.summary(file(n)).await.unwrap().unwrap();
        assert_eq!((summary.published, summary.generation), (Some(root(&bytes)), generation));
        assert_eq!(&summary.facts[..], b"facts");
        assert_eq!(store.read_chunk(file(n), index(0)).await.unwrap(), bytes);
    }
}

pub(crate) async fn a_dropped_id_never_comes_back_whole(backend: &impl Backend) {
    let mut store = backend.open().await;
    let bytes = content(1, 100);
    store.put_whole(&record(1, Some(100)), b"", Whole::of(bytes.clone())).await.unwrap();
    for n in 1..3 {
        store.drop_file(file(n), TENANT, b"gone").await.unwrap();
    }
    for life in 0..2 {
        for n in 1..3 {
            let summary = store.summary(file(n)).await.unwrap().unwrap();
            assert_eq!((&summary.facts[..], summary.published), (&b"gone"[..], None));
            assert!(matches!(store.read_chunk(file(n), index(0)).await, Err(StoreError::Dropped(_))));
            let whole = store.put_whole(&record(n, Some(100)), b"", Whole::of(bytes.clone())).await;
            assert!(matches!(whole, Err(StoreError::Dropped(_))), "{whole:?}");
            let known = store.put_known(&record(n, Some(100)), b"").await;
            assert!(matches!(known, Err(StoreError::Dropped(_))), "{known:?}");
            assert!(matches!(store.put_record(&record(n, None)).await, Err(StoreError::Dropped(_))));
            assert!(matches!(put(&*store, file(n), 0, &bytes).await, Err(StoreError::Dropped(_))));
            store.drop_file(file(n), TENANT, b"gone").await.unwrap();
        }
        assert!(store.listed(TENANT, None, 9).await.unwrap().is_empty());
        assert_eq!(ids(&*store, None, 9).await.len(), 2);
        if life == 0 {
            store.close().await.unwrap();
            drop(store);
            store = backend.open().await;
        }
    }
}

pub(crate) async fn what_is_elsewhere_is_known_and_listed(backend: &impl Backend) {
    let store = backend.open().await;
    let known = record(1, Some(100));
    assert_eq!(store.put_known(&known, b"facts").await.unwrap(), WholeOutcome::Stored);
    let error = store.put_known(&record(1, Some(101)), b"facts").await.unwrap_err();
    assert!(matches!(error, StoreError::RecordConflict { .. }), "{error}");
    store.close().await.unwrap();
    drop(store);
    let store = backend.open().await;
    let summary = store.summary(file(1)).await.unwrap().unwrap();
    assert_eq!((summary.record, &summary.facts[..], summary.in_log), (Some(known), &b"facts"[..], true));
    assert!(summary.held.is_empty() && summary.published.is_none());
    let listed = store.listed(TENANT, None, 9).await.unwrap();
    assert_eq!(listed.iter().map(|file| (file.client, file.size)).collect::<Vec<_>>(), [(client(1), 100)]);
    // What is here already stays an ordinary file.
    put(&*store, file(2), 0, &content(1, 50)).await.unwrap();
    assert_eq!(store.put_known(&record(2, Some(50)), b"f").await.unwrap(), WholeOutcome::Begun);
    store.put_record(&record(2, Some(50))).await.unwrap();
    assert_eq!(store.put_known(&record(2, Some(50)), b"f").await.unwrap(), WholeOutcome::Known);
    let summary = store.summary(file(2)).await.unwrap().unwrap();
    assert_eq!((summary.held_bytes, summary.in_log, summary.record), (50, false, Some(record(2, Some(50)))));
}

pub(crate) async fn many_whole_files_are_listed_read_and_dropped(backend: &impl Backend) {
    let mut store = backend.open().await;
    let count = 400u128;
    for first in (0..count).step_by(50) {
        let puts = (first..first + 50).map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                let bytes = content(n as u64, 200 + n as usize);
                store
                    .put_whole(&record(n, Some(bytes.len() as u64)), b"facts", Whole::of(bytes))
                    .await
                    .unwrap()
            })
        });
        for put in puts.collect::<Vec<_>>() {
            assert_eq!(put.await.unwrap(), WholeOutcome::Stored);
        }
    }
    let dropped = |n: u128| !n.is_multiple_of(3);
    for life in 0..3 {
        let mut all: Vec<FileId> = (0..count).map(file).collect();
        all.sort_unstable();
        for limit in [1000, 37] {
            let mut found = Vec::new();
            loop {
                let page = ids(&*store, found.last().copied(), limit).await;
                found.extend_from_slice(&page);
                if page.len() < limit {
                    break;
                }
            }
            assert_eq!(found, all, "life {life}");
            let mut names = Vec::new();
            loop {
                let page = store.listed(TENANT, names.last().copied(), limit).await.unwrap();
                names.extend(page.iter().map(|file| file.client));
                if page.len() < limit {
                    break;
                }
            }
            let expected = (0..count).filter(|n| life == 0 || !dropped(*n)).map(client);
            assert_eq!(names, expected.collect::<Vec<_>>(), "life {life}");
        }
        for n in 0..count {
            let read = store.read_chunk(file(n), index(0)).await;
            match life > 0 && dropped(n) {
                true => assert!(matches!(read, Err(StoreError::Dropped(_))), "life {life}, file {n}"),
                false => {
                    assert_eq!(read.unwrap(), content(n as u64, 200 + n as usize), "life {life}, file {n}")
                }
            }
        }
        for n in (0..count).filter(|n| dropped(*n)) {
            store.drop_file(file(n), TENANT, b"gone").await.unwrap();
        }
        if life == 1 {
            store.close().await.unwrap();
            drop(store);
            store = backend.open().await;
        }
    }
}
