use std::time::Duration;

use sluice_engine::ids::DcId;
use sluice_node::metrics::Metrics;
use sluice_node::shutdown::Shutdown;
use sluice_redis::Redis;
use sluice_redis::members::Members;
use sluice_redis::testing::{Server, available};

#[tokio::test]
async fn members_are_those_who_said_so_lately() {
    if !available() {
        return;
    }
    let (server, tasks) = (Server::start(), Shutdown::new());
    let redis = Redis::open(server.config(), &Metrics::new("dc-a"), &tasks).await.unwrap();
    let member = |name: &str, dc| {
        let life = Duration::from_secs(2);
        Members::new(redis.clone(), "test", DcId::new(dc), "aggregator", name.into(), life)
    };
    let (one, two) = (member("one", 1), member("two", 1));
    // As if the clock had been far ahead.
    server.cli(&["ZADD", "sluice:test:1:members:aggregator", "99999999999999", "gone"]);
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(one.announce().await.unwrap(), names(&["one"]));
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    assert_eq!(two.announce().await.unwrap(), names(&["one", "two"]));
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    assert_eq!(two.announce().await.unwrap(), names(&["two"]), "it said nothing for longer than its life");
    assert_eq!(one.announce().await.unwrap(), names(&["one", "two"]), "and is there again");
    assert_eq!(member("far", 2).announce().await.unwrap(), names(&["far"]));
    for _ in 0..2 {
        assert_eq!(one.leave().await.unwrap(), names(&["two"]));
    }
    tasks.kill().await;
}
