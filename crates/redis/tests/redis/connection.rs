use std::time::{Duration, Instant};

use sluice_engine::ids::DcId;
use sluice_node::metrics::Metrics;
use sluice_node::shutdown::Shutdown;
use sluice_redis::lease::{Fence, Leases, Wanted};
use sluice_redis::testing::{Server, available};
use sluice_redis::{Redis, RedisConfig, RedisError};

/// What a call needs to be seen: any will do.
fn leases(redis: &Redis) -> Leases {
    Leases::new(redis.clone(), "test", DcId::new(1), "me".into(), Duration::from_secs(10))
}

fn wanted() -> [Wanted; 1] {
    [Wanted { name: "x".into(), above: Fence::default() }]
}

/// Tries until it works: the time it takes is up to the machine.
async fn until_it_works(redis: &Redis) {
    let begun = Instant::now();
    while let Err(error) = leases(redis).take(&wanted()).await {
        assert!(begun.elapsed() < Duration::from_secs(30), "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_wrong_password_is_an_error_at_once() {
    if !available() {
        return;
    }
    let server = Server::with_password("right");
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("password");
    let (metrics, tasks) = (Metrics::new("dc-a"), Shutdown::new());
    for password in [Some("wrong"), None] {
        if let Some(password) = password {
            std::fs::write(&file, password).unwrap();
        }
        let config = RedisConfig::new(&server.url(), password.map(|_| file.as_path()), None).unwrap();
        let error = Redis::open(config, &metrics, &tasks).await.unwrap_err();
        assert!(matches!(error, RedisError::Refused { .. }), "{error}");
        let said = error.to_string();
        assert!(said.contains("refuses us") && !said.contains("wrong\""), "{said}");
    }
    let text = metrics.encode().unwrap();
    assert!(text.contains(r#"sluice_redis_connects_total{dc="dc-a",outcome="refused"} 1"#), "{text}");
    assert_eq!(tasks.tasks(), 0);

    let redis = Redis::open(server.config(), &Metrics::new("dc-a"), &tasks).await.unwrap();
    leases(&redis).take(&wanted()).await.unwrap();
    tasks.kill().await;
}

#[tokio::test]
async fn a_password_that_is_changed_later_is_seen_in_the_metrics() {
    if !available() {
        return;
    }
    let server = Server::start();
    let (metrics, tasks) = (Metrics::new("dc-a"), Shutdown::new());
    let redis = Redis::open(server.config(), &metrics, &tasks).await.unwrap();
    server.cli(&["CONFIG", "SET", "requirepass", "changed"]);
    server.cli(&["-a", "changed", "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    let begun = Instant::now();
    loop {
        match leases(&redis).take(&wanted()).await {
            Err(RedisError::Refused { .. }) => break,
            _ => assert!(begun.elapsed() < Duration::from_secs(30)),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let text = metrics.encode().unwrap();
    assert!(text.contains(r#"sluice_redis_up{dc="dc-a"} 0"#), "{text}");
    assert!(text.contains(r#"outcome="refused""#), "{text}");
    assert!(matches!(redis.state(), Err(RedisError::Refused { .. })));
    tasks.kill().await;
}

#[tokio::test]
async fn a_user_that_may_do_too_little_is_refused_at_the_start() {
    if !available() {
        return;
    }
    let server = Server::start();
    let (metrics, tasks) = (Metrics::new("dc-a"), Shutdown::new());
    let open = async |rights: &str| {
        let user: Vec<&str> =
            "ACL SETUSER default reset on nopass +role".split(' ').chain(rights.split(' ')).collect();
        assert_eq!(server.cli(&user), "OK");
        Redis::open(server.config(), &metrics, &tasks).await.map(|_| ())
    };
    // What docs/operations.md says (and what lets the next change be made), and each time something of it missing.
    let enough = "~sluice:* +@read +@write +@scripting +@connection +time +acl";
    for missing in ["+time", "+@scripting", "+@write", "~sluice:*"] {
        let rights = enough.replace(&format!("{missing} "), "");
        let error = open(&rights).await.unwrap_err();
        assert!(matches!(error, RedisError::Refused { .. }), "without {missing}: {error}");
    }
    open(enough).await.unwrap();
    tasks.kill().await;
}

#[tokio::test]
async fn one_that_comes_late_or_again_is_found() {
    if !available() {
        return;
    }
    let mut server = Server::start();
    server.kill();
    let (metrics, tasks) = (Metrics::new("dc-a"), Shutdown::new());
    let redis = Redis::open(server.config(), &metrics, &tasks).await.unwrap();
    let error = leases(&redis).take(&wanted()).await.unwrap_err();
    assert!(matches!(error, RedisError::Unreachable { .. }), "{error}");
    server.restart(&[]);
    until_it_works(&redis).await;
    assert_eq!(redis.state(), Ok(()));

    server.restart(&[]);
    until_it_works(&redis).await;
    // A connection that was closed meanwhile costs a call nothing.
    server.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    leases(&redis).take(&wanted()).await.unwrap();
    tasks.kill().await;
}

#[tokio::test]
async fn one_that_hangs_costs_calls_their_patience_and_later_ones_nothing() {
    if !available() {
        return;
    }
    let server = Server::start();
    let (metrics, tasks) = (Metrics::new("dc-a"), Shutdown::new());
    let mut config = server.config();
    (config.patience, config.connect) = (Duration::from_millis(100), Duration::from_millis(200));
    let redis = Redis::open(config, &metrics, &tasks).await.unwrap();
    server.hang();
    let error = leases(&redis).take(&wanted()).await.unwrap_err();
    assert!(matches!(error, RedisError::Slow { .. }), "{error}");
    // Until it is known to be down, calls wait for the connection that is being made; then they fail at once.
    let begun = Instant::now();
    while redis.state().is_ok() || matches!(redis.state(), Err(RedisError::Unreachable { .. })) {
        assert!(begun.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(matches!(redis.state(), Err(RedisError::Slow { .. })));
    assert!(leases(&redis).take(&wanted()).await.is_err());
    server.go_on();
    until_it_works(&redis).await;
    tasks.kill().await;
}

#[tokio::test]
async fn one_that_became_a_replica_is_left() {
    if !available() {
        return;
    }
    let (server, other) = (Server::start(), Server::start());
    let (metrics, tasks) = (Metrics::new("dc-a"), Shutdown::new());
    let redis = Redis::open(server.config(), &metrics, &tasks).await.unwrap();
    server.cli(&["REPLICAOF", "127.0.0.1", &other.port().to_string()]);
    let error = leases(&redis).take(&wanted()).await.unwrap_err();
    assert!(matches!(error, RedisError::Replica { .. }), "{error}");
    server.cli(&["REPLICAOF", "NO", "ONE"]);
    until_it_works(&redis).await;
    tasks.kill().await;
}
