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
    let member = |name: &str, dc, life| {
        let life = Duration::from_millis(life);
        Members::new(redis.clone(), "test", DcId::new(dc), "aggregator", name.into(), life)
    };
    let (one, two, brief) = (member("one", 1, 60_000), member("two", 1, 60_000), member("brief", 1, 50));
    // As if its clock had been an hour ahead.
    server.cli(&["ZADD", "sluice:test:1:members:aggregator", "99999999999999", "gone"]);
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(one.announce().await.unwrap(), names(&["one"]));
    assert_eq!(brief.announce().await.unwrap(), names(&["brief", "one"]));
    tokio::time::sleep(Duration::from_millis(80)).await;
    assert_eq!(
        two.announce().await.unwrap(),
        names(&["one", "two"]),
        "it said nothing for longer than its life"
    );
    assert_eq!(brief.announce().await.unwrap(), names(&["brief", "one", "two"]), "and is there again");
    assert_eq!(member("far", 2, 60_000).announce().await.unwrap(), names(&["far"]));
    assert_eq!(one.leave().await.unwrap(), names(&["brief", "two"]));
    assert_eq!(one.leave().await.unwrap(), names(&["brief", "two"]));
    tasks.kill().await;
}
