//! Rates, revocations and sessions that several processes share.

use std::time::Duration;

use sluice_engine::ids::{DcId, FileId, RevocationEpoch, SessionId, TenantId};
use sluice_engine::revocations::{Revocation, Revoked};
use sluice_node::metrics::Metrics;
use sluice_node::shutdown::Shutdown;
use sluice_redis::buckets::SharedBuckets;
use sluice_redis::revocations::RevocationCache;
use sluice_redis::sessions::SessionRecords;
use sluice_redis::testing::{Server, available};
use sluice_redis::{Redis, RedisError};

const DC: DcId = DcId::new(1);
const MIB: u64 = 1 << 20;

async fn open(server: &Server, tasks: &Shutdown) -> Redis {
    Redis::open(server.config(), &Metrics::new("dc-a"), tasks).await.unwrap()
}

fn fact(subject: u8, tenant: u64, epoch: u64) -> Revocation {
    Revocation::of(FileId::from_bytes([subject; 16]), TenantId::new(tenant), RevocationEpoch::new(epoch))
}

#[tokio::test]
async fn two_processes_take_from_one_bucket() {
    if !available() {
        return;
    }
    let (server, tasks) = (Server::start(), Shutdown::new());
    let one = SharedBuckets::new(open(&server, &tasks).await, "test", DC);
    let two = SharedBuckets::new(open(&server, &tasks).await, "test", DC);
    let tenant = TenantId::new(7);
    // A MiB in a quarter of an hour: nothing that happens here is slow enough to matter.
    let rate = MIB / 1000;
    assert_eq!(one.take(tenant, rate, MIB).await.unwrap(), Ok(()));
    assert_eq!(two.take(tenant, rate, MIB).await.unwrap(), Err(60_000), "the longest that is told");
    assert_eq!(two.take(TenantId::new(8), rate, MIB).await.unwrap(), Ok(()), "another tenant");
    let elsewhere = SharedBuckets::new(open(&server, &tasks).await, "test", DcId::new(2));
    assert_eq!(elsewhere.take(tenant, rate, MIB).await.unwrap(), Ok(()), "another datacenter");
    // At any rate and size it counts exactly.
    assert_eq!(one.take(TenantId::new(9), 1, u64::MAX).await.unwrap(), Ok(()));
    assert_eq!(one.take(TenantId::new(10), u64::MAX, 1).await.unwrap(), Ok(()));
    assert_eq!(one.take(TenantId::new(10), u64::MAX, 1).await.unwrap(), Ok(()));
    // Whoever waits as long as told is let in.
    let quick = TenantId::new(11);
    assert_eq!(one.take(quick, MIB, 3 * MIB / 2).await.unwrap(), Ok(()));
    let begun = std::time::Instant::now();
    while let Err(wait) = two.take(quick, MIB, MIB).await.unwrap() {
        assert!(wait <= 500 && begun.elapsed() < Duration::from_secs(30), "{wait}");
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
    // Rubbish in its place costs at most the longest wait, and flushing gives a bucket that is full.
    server.cli(&["SET", "sluice:test:1:rate:7", "99999999999999999999"]);
    assert!(one.take(tenant, rate, MIB).await.unwrap().is_err());
    server.cli(&["FLUSHALL"]);
    assert_eq!(one.take(tenant, rate, MIB).await.unwrap(), Ok(()));
    tasks.kill().await;
}

#[tokio::test]
async fn revocations_are_written_again_when_redis_forgot_them() {
    if !available() {
        return;
    }
    let (server, tasks) = (Server::start(), Shutdown::new());
    let writer = RevocationCache::new(open(&server, &tasks).await, "test", DC);
    let reader = RevocationCache::new(open(&server, &tasks).await, "test", DC);
    let mut revoked = Revoked::default();
    for one in [fact(0, 7, 5), fact(3, 7, u64::MAX), fact(4, 8, 10)] {
        revoked.take(one);
    }
    writer.write(&revoked).await.unwrap();
    let all = async || {
        let mut set = Revoked::default();
        reader.read().await.unwrap().1.into_iter().for_each(|fact| {
            set.take(fact);
        });
        set
    };
    assert_eq!(all().await, revoked);
    let state = reader.state().await.unwrap();
    // Writing the same, or less, changes nothing.
    let mut old = Revoked::default();
    old.take(fact(0, 7, 4));
    old.take(fact(4, 8, 9));
    writer.write(&old).await.unwrap();
    writer.write(&revoked).await.unwrap();
    assert_eq!(reader.state().await.unwrap(), state);
    assert_eq!(all().await, revoked);
    revoked.take(fact(0, 9, 1));
    writer.write(&revoked).await.unwrap();
    assert_ne!(reader.state().await.unwrap(), state);
    // What others write there harms nobody.
    server.cli(&["HSET", "sluice:test:1:revoked", "rubbish", "1", "7/x", "2"]);
    assert_eq!(all().await, revoked);

    let written = reader.state().await.unwrap();
    assert!(written.has_all());
    server.cli(&["FLUSHALL"]);
    let flushed = reader.state().await.unwrap();
    assert!(flushed != written && !flushed.has_all(), "seen by whoever looks");
    writer.write(&revoked).await.unwrap();
    assert_eq!(all().await, revoked);
    // That nothing is revoked is known only once somebody has said so.
    server.cli(&["FLUSHALL"]);
    writer.write(&Revoked::default()).await.unwrap();
    assert!(reader.state().await.unwrap().has_all() && reader.read().await.unwrap().1.is_empty());
    tasks.kill().await;
}

/// However often tokens are revoked one by one and then their tenant: what is covered leaves the cache.
#[tokio::test]
async fn the_cache_of_revocations_stays_as_small_as_what_is_revoked() {
    if !available() {
        return;
    }
    let (server, tasks) = (Server::start(), Shutdown::new());
    let cache = RevocationCache::new(open(&server, &tasks).await, "test", DC);
    let mut revoked = Revoked::default();
    for round in 1..=4_u64 {
        for session in 0..4_000_u128 {
            let session = Some(SessionId::new(uuid::Uuid::from_u128(u128::from(round) << 64 | session)));
            let epoch = RevocationEpoch::new(2 * round);
            revoked.take(Revocation { tenant: TenantId::new(7), session, epoch });
        }
        cache.write(&revoked).await.unwrap();
        assert_eq!(server.cli(&["HLEN", "sluice:test:1:revoked"]).trim(), revoked.len().to_string());
        revoked.take(fact(0, 7, 2 * round + 1));
        revoked.take(fact(1, 9, round));
        cache.write(&revoked).await.unwrap();
        assert_eq!(server.cli(&["HLEN", "sluice:test:1:revoked"]).trim(), "2");
        let (state, read) = cache.read().await.unwrap();
        assert!(state == cache.state().await.unwrap() && state.has_all());
        assert_eq!(read, [fact(0, 7, 2 * round + 1), fact(1, 9, round)], "tenants first");
    }
    // Somebody else fills it: it cannot be read, and is begun anew.
    let mut rubbish = vec!["HSET".to_owned(), "sluice:test:1:revoked".into()];
    rubbish.extend((0..13_000).flat_map(|number| [format!("x{number}"), "1".into()]));
    server.cli(&rubbish.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(matches!(cache.read().await, Err(RedisError::Failed { .. })));
    cache.write(&revoked).await.unwrap();
    assert_eq!(cache.read().await.unwrap().1.len(), 2);
    tasks.kill().await;
}

/// Faults 32 and 33: what the replica that takes over lacks is known to be lacking, and made again.
#[tokio::test]
async fn a_failover_that_loses_a_session_and_a_revocation_costs_a_look() {
    if !available() {
        return;
    }
    let (mut primary, tasks) = (Server::start(), Shutdown::new());
    let replica = Server::following(&primary);
    let before = open(&primary, &tasks).await;
    let (cache, sessions) =
        (RevocationCache::new(before.clone(), "test", DC), SessionRecords::new(before, "test", DC));
    let mut revoked = Revoked::default();
    revoked.take(fact(0, 7, 5));
    cache.write(&revoked).await.unwrap();
    replica.catches_up_with(&primary);
    replica.cut_off();
    let (session, tenant) = (SessionId::new(uuid(9)), TenantId::new(7));
    revoked.take(fact(9, 7, 8));
    cache.write(&revoked).await.unwrap();
    let written = cache.state().await.unwrap();
    assert!(sessions.begin(session, tenant, Duration::from_secs(60)).await.unwrap());
    assert!(!sessions.begin(session, tenant, Duration::from_secs(60)).await.unwrap(), "goes on");
    primary.kill();
    replica.promote();

    let after = open(&replica, &tasks).await;
    let (cache, sessions) =
        (RevocationCache::new(after.clone(), "test", DC), SessionRecords::new(after, "test", DC));
    assert_eq!(cache.read().await.unwrap().1.len(), 1, "the last revocation is lost");
    assert_ne!(cache.state().await.unwrap(), written);
    cache.write(&revoked).await.unwrap();
    assert_eq!(cache.read().await.unwrap().1.len(), 2);
    assert!(sessions.begin(session, tenant, Duration::from_secs(60)).await.unwrap(), "begun again");
    tasks.kill().await;
}

fn uuid(byte: u8) -> uuid::Uuid {
    uuid::Uuid::from_bytes([byte; 16])
}
