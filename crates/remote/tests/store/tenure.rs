//! One aggregator at a time, and nothing of one whose time is over.

use std::time::Duration;

use sluice_engine::geometry::Run;
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::share::Share;
use sluice_node::role::Role;
use sluice_node::shutdown::Shutdown;
use sluice_remote::{NoTenure, RemoteStore};
use sluice_store::{ChunkStore, Chunks as _, StoreError};
use tokio::time::timeout;

use crate::material::{FULL, TENANT, content, file, index, put, record};
use crate::place::Place;

const SOON: Duration = Duration::from_secs(10);

/// Asks until the store can be had.
async fn taken(place: &Place) -> RemoteStore {
    let taking = async {
        loop {
            match place.take().await {
                Ok(store) => return store,
                Err(NoTenure::Taken | NoTenure::Unreachable(_)) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(NoTenure::Divided | NoTenure::Fence(_)) => panic!("there is one share, and no fence"),
            }
        }
    };
    timeout(SOON, taking).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_an_aggregator_has_a_store_and_only_one_at_a_time() {
    let place = Place::new();
    place.start();
    for stranger in [Role::Edge, Role::Worker, Role::Session] {
        let refused = RemoteStore::begin(place.caller(stranger), Share::WHOLE, None, &place.tasks).await;
        assert!(matches!(refused, Err(NoTenure::Unreachable(_))), "{stranger}");
    }
    let first = place.take().await.unwrap();
    assert!(matches!(place.take().await, Err(NoTenure::Taken)));
    let other = Share::new(1, 4).unwrap();
    let divided = RemoteStore::begin(place.caller(Role::Aggregator), other, None, &place.tasks).await;
    assert!(matches!(divided, Err(NoTenure::Divided)));
    first.put_record(&record(1, Some(5))).await.unwrap();
    // Given back, it can be had at once; and the first has it no more.
    first.close().await.unwrap();
    let second = place.take().await.unwrap();
    assert!(matches!(first.summary(file(1)).await, Err(StoreError::Closing)));
    assert!(second.summary(file(1)).await.unwrap().is_some());
    assert!(second.usage().free > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aggregator_that_is_gone_is_followed_at_once_and_heard_no_more() {
    let place = Place::new();
    let (own, _) = place.start();
    let tasks = Shutdown::new();
    let first = RemoteStore::begin(place.caller(Role::Aggregator), Share::WHOLE, None, &tasks).await.unwrap();
    // Long enough for a renewal to be under way: it is what tells the worker.
    first.put_record(&record(1, Some(5))).await.unwrap();
    assert!(matches!(place.take().await, Err(NoTenure::Taken)));
    let mut writer = first.begin_run(file(1), TENANT, Run::new(index(0), 1).unwrap(), 5).await.unwrap();
    writer.write(content(1, 3)).await.unwrap();
    tasks.kill().await;
    let second = timeout(Duration::from_secs(5), taken(&place)).await.unwrap();
    // What it had begun is over, and what it says now is not listened to.
    assert!(matches!(first.put_facts(file(1), b"late").await, Err(StoreError::Unreachable { .. })));
    put(&second, file(1), 0, &content(1, 5)).await.unwrap();
    assert_eq!(own.summary(file(1)).await.unwrap().unwrap().facts, b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_begins_anew_knows_no_tenure_and_has_all_that_was_acknowledged() {
    let place = Place::new();
    place.start();
    let first = place.take().await.unwrap();
    first.put_record(&record(1, Some(2 * CHUNK_LEN))).await.unwrap();
    put(&first, file(1), 0, &content(1, FULL)).await.unwrap();
    first.put_facts(file(1), b"facts").await.unwrap();
    place.kill().await;
    place.start();
    // It finds out, whether or not anybody asks it for something.
    timeout(SOON, first.over()).await.unwrap();
    assert!(matches!(first.states().await, Err(StoreError::Unreachable { .. })));
    let second = taken(&place).await;
    let summary = second.summary(file(1)).await.unwrap().unwrap();
    assert_eq!((&summary.facts[..], &summary.held[..]), (&b"facts"[..], &[0..1][..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_does_not_come_back_is_given_up() {
    let place = Place::new();
    place.start();
    let first = place.take().await.unwrap();
    place.kill().await;
    // Asked meanwhile, it waits, and is not left waiting.
    let (asked, over) = tokio::join!(timeout(SOON, first.states()), timeout(SOON, first.over()));
    assert!(matches!(asked.unwrap(), Err(StoreError::Unreachable { .. })));
    over.unwrap();
}
