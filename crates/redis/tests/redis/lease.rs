use std::time::{Duration, Instant};

use sluice_engine::ids::DcId;
use sluice_node::metrics::Metrics;
use sluice_node::shutdown::Shutdown;
use sluice_redis::Redis;
use sluice_redis::lease::{Asked, Fence, Lease, Leases, Wanted};
use sluice_redis::testing::{Server, available};

const LIFE: Duration = Duration::from_secs(30);

async fn open(server: &Server, tasks: &Shutdown) -> Redis {
    Redis::open(server.config(), &Metrics::new("dc-a"), tasks).await.unwrap()
}

fn leases(redis: &Redis, holder: &str, life: Duration) -> Leases {
    Leases::new(redis.clone(), "test", DcId::new(1), holder.into(), life)
}

fn wanted(name: &str) -> [Wanted; 1] {
    [Wanted { name: name.into(), above: Fence::default() }]
}

fn held(mut asked: Vec<Asked>) -> Lease {
    assert_eq!(asked.len(), 1);
    match asked.remove(0) {
        Asked::Held(lease) => lease,
        Asked::Taken { by, .. } => panic!("{by} has it"),
    }
}

#[tokio::test]
async fn a_lease_has_one_holder_until_it_ends_or_is_given_up() {
    if !available() {
        return;
    }
    let (server, tasks) = (Server::start(), Shutdown::new());
    let redis = open(&server, &tasks).await;
    let (one, two) = (leases(&redis, "one", LIFE), leases(&redis, "two", LIFE));
    let first = held(one.take(&wanted("slot-7")).await.unwrap());
    let Asked::Taken { by, left } = &two.take(&wanted("slot-7")).await.unwrap()[0] else {
        panic!("two of them")
    };
    assert_eq!(by, "one");
    assert!(*left <= LIFE && !left.is_zero());
    assert_eq!(held(one.take(&wanted("slot-7")).await.unwrap()).fence, first.fence, "asking again");
    assert_eq!(
        one.holders(&["slot-7".into(), "slot-8".into()]).await.unwrap(),
        [Some("one".to_owned()), None]
    );

    let renewed = one.renew(std::slice::from_ref(&first)).await.unwrap()[0].clone().unwrap();
    assert!(renewed.fence == first.fence && renewed.until >= first.until);
    assert_eq!(two.renew(std::slice::from_ref(&first)).await.unwrap(), [None], "another's");
    two.release(std::slice::from_ref(&first)).await.unwrap();
    assert!(one.renew(std::slice::from_ref(&first)).await.unwrap()[0].is_some(), "another released it");

    one.release(std::slice::from_ref(&first)).await.unwrap();
    let second = held(two.take(&wanted("slot-7")).await.unwrap());
    assert!(second.fence > first.fence);
    assert_eq!(one.renew(&[first]).await.unwrap(), [None]);

    // One that nobody renews ends by itself.
    let short = leases(&redis, "three", Duration::from_millis(50));
    let third = held(short.take(&wanted("slot-9")).await.unwrap());
    let begun = Instant::now();
    let fourth = loop {
        match one.take(&wanted("slot-9")).await.unwrap().remove(0) {
            Asked::Held(lease) => break lease,
            Asked::Taken { .. } => assert!(begun.elapsed() < Duration::from_secs(30)),
        }
    };
    assert!(fourth.fence > third.fence);
    assert_eq!(short.renew(&[third]).await.unwrap(), [None]);
    tasks.kill().await;
}

#[tokio::test]
async fn every_slot_is_taken_in_bounded_calls() {
    if !available() {
        return;
    }
    let (server, tasks) = (Server::start(), Shutdown::new());
    let redis = open(&server, &tasks).await;
    let (one, two) = (leases(&redis, "one", LIFE), leases(&redis, "two", LIFE));
    let all: Vec<Wanted> = (0..4096).map(|slot| wanted(&format!("slot-{slot}"))[0].clone()).collect();
    let mine: Vec<Lease> = one.take(&all).await.unwrap().into_iter().map(|asked| held(vec![asked])).collect();
    assert!(mine.is_sorted_by(|a, b| a.fence < b.fence), "no two have the same fence");
    assert!(two.take(&all).await.unwrap().iter().all(|asked| matches!(asked, Asked::Taken { .. })));
    assert!(one.renew(&mine).await.unwrap().iter().all(Option::is_some));
    one.release(&mine).await.unwrap();
    assert!(two.take(&all).await.unwrap().iter().all(|asked| matches!(asked, Asked::Held(_))));
    tasks.kill().await;
}

#[tokio::test]
async fn fences_rise_whatever_redis_forgets() {
    if !available() {
        return;
    }
    let (server, tasks) = (Server::start(), Shutdown::new());
    let redis = open(&server, &tasks).await;
    let (one, two) = (leases(&redis, "one", LIFE), leases(&redis, "two", LIFE));
    let first = held(one.take(&wanted("slot-7")).await.unwrap());
    server.cli(&["FLUSHALL"]);
    let second = held(two.take(&wanted("slot-7")).await.unwrap());
    assert!(second.fence > first.fence);
    assert_eq!(one.renew(&[first]).await.unwrap(), [None], "the old holder is told");

    // Its clock was set back by decades, and it forgot: what is durable elsewhere counts.
    server.cli(&["FLUSHALL"]);
    let ahead = Fence::new(1 << 52).unwrap();
    let third = held(one.take(&[Wanted { name: "slot-7".into(), above: ahead }]).await.unwrap());
    assert!(third.fence > ahead);
    // The next of any name is above, too; and a holder whose fence was overtaken gets a new one.
    let fourth = held(two.take(&wanted("slot-8")).await.unwrap());
    assert!(fourth.fence > third.fence);
    let again = held(one.take(&[Wanted { name: "slot-7".into(), above: fourth.fence }]).await.unwrap());
    assert!(again.fence > fourth.fence);
    tasks.kill().await;
}

/// Fault 32: the replica that takes over lacks the last writes.
#[tokio::test]
async fn a_failover_that_loses_a_lease_makes_two_holders_whom_fences_tell_apart() {
    if !available() {
        return;
    }
    let (primary, tasks) = (Server::start(), Shutdown::new());
    let replica = Server::following(&primary);
    let before = open(&primary, &tasks).await;
    let one = leases(&before, "one", LIFE);
    held(one.take(&wanted("slot-1")).await.unwrap());
    replica.catches_up_with(&primary);
    // The replica is cut off while the primary takes another write, and then takes over.
    replica.cut_off();
    let lost = held(one.take(&wanted("slot-7")).await.unwrap());
    let mut primary = primary;
    primary.kill();
    replica.promote();

    let after = open(&replica, &tasks).await;
    let two = leases(&after, "two", LIFE);
    let Asked::Taken { by, .. } = &two.take(&wanted("slot-1")).await.unwrap()[0] else {
        panic!("it is one's")
    };
    assert_eq!(by, "one");
    let taken = held(two.take(&wanted("slot-7")).await.unwrap());
    assert!(taken.fence > lost.fence);
    let one = leases(&after, "one", LIFE);
    assert_eq!(one.renew(&[lost]).await.unwrap(), [None]);
    tasks.kill().await;
}
