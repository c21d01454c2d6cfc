//! The end of an edge: orderly, or at once.

use std::sync::Arc;
use std::time::Duration;

use sluice_edge::{Edge, EdgeConfig, EdgeError, EdgeParts};
use sluice_engine::limits::CHUNK_LEN;
use sluice_node::shutdown::Stopped;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::{Datacenter, head, read_answer};
use crate::use_cases::{ID, content};

#[tokio::test]
async fn requests_in_flight_finish_and_no_new_ones_begin() {
    let dc = Datacenter::start();
    dc.create(ID, CHUNK_LEN).await;
    assert!(dc.health.is_ready());
    let mut stream = dc.connect("http/1.1").await;
    let request = head(
        &format!("PUT /v1/files/{ID}/chunks/0"),
        &format!("Authorization: Bearer {}\r\nExpect: 100-continue\r\n", dc.token),
        CHUNK_LEN as usize,
    )
    .replace("Connection: close\r\n", "");
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(read_answer(&mut stream).await.status, 100, "the request is in flight");

    let tasks = dc.tasks.clone();
    let stop = tokio::spawn(async move { tasks.stop(Duration::from_secs(10)).await });
    dc.tasks.draining().await;
    while TcpStream::connect(dc.address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(!dc.health.is_ready(), "/readyz fails before the port closes");
    stream.write_all(&content(CHUNK_LEN)).await.unwrap();
    let answer = read_answer(&mut stream).await;
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert_eq!(stop.await.unwrap(), Stopped::Clean);
}

#[tokio::test]
async fn http_2_clients_are_told_to_go() {
    let dc = Datacenter::start();
    let (sender, connection) = h2::client::handshake(dc.connect("h2").await).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut sender = sender.ready().await.unwrap();
    let request = http::Request::get("https://localhost/v1").body(()).unwrap();
    let (answer, _) = sender.send_request(request, true).unwrap();
    assert_eq!(answer.await.unwrap().status(), 401);
    assert_eq!(dc.tasks.stop(Duration::from_secs(10)).await, Stopped::Clean);
    driver.await.unwrap().ok();
    assert!(sender.ready().await.is_err());
}

#[tokio::test]
async fn a_kill_drops_port_and_connections_at_once() {
    let dc = Datacenter::start();
    let mut idle = dc.connect("http/1.1").await;
    let request = head("GET /v1", &format!("Authorization: Bearer {}\r\n", dc.token), 0);
    idle.write_all(request.replace("Connection: close\r\n", "").as_bytes()).await.unwrap();
    assert_eq!(read_answer(&mut idle).await.status, 200);
    dc.tasks.kill().await;
    assert!(TcpStream::connect(dc.address).await.is_err());
    let end = idle.read(&mut [0; 1]).await;
    assert!(matches!(end, Ok(0) | Err(_)), "no answer, no goodbye");
    assert_eq!(dc.metrics.connections.get(), 0);
    assert_eq!(dc.memory.used(), 0);
}

#[tokio::test]
async fn a_busy_port_is_named() {
    let dc = Datacenter::start();
    let material =
        sluice_node::material::ClusterMaterial::generate("b", &[(crate::client::HERE, "b")]).unwrap();
    let clock = sluice_node::clock::SystemClock::shared();
    let config = EdgeConfig {
        listen: dc.address,
        dc: "b".into(),
        tls: sluice_node::tls::edge_server(&material, clock.clone()).unwrap(),
        settings: crate::client::quick(),
    };
    let sessions = sluice_session::MemorySessions::new(
        crate::client::HERE,
        &material,
        clock.clone(),
        dc.revocations.clone(),
    )
    .unwrap();
    let access = sluice_node::access::ContextVerifier::new(
        &material,
        crate::client::HERE,
        clock,
        dc.revocations.clone(),
    );
    let parts = sluice_worker::WorkerParts {
        dc: "b".into(),
        store: dc.store.clone(),
        slots: dc.slots.clone(),
        access: Arc::new(access),
        memory: dc.memory.clone(),
        elsewhere: None,
        metrics: dc.metrics.clone(),
        tasks: dc.tasks.clone(),
        rates: Arc::new(sluice_worker::Rates::new(sluice_node::clock::SystemClock::shared(), None)),
    };
    let parts = EdgeParts {
        sessions: Arc::new(sessions),
        workers: Arc::new(sluice_worker::Worker::new(parts, sluice_worker::WorkerSettings::default())),
        tenants: dc.tenants.clone(),
        memory: dc.memory.clone(),
        metrics: dc.metrics.clone(),
        health: dc.health.clone(),
        leaving: tokio::sync::watch::channel(sluice_proto::calls::Leaving::default()).1,
    };
    let error = Edge::bind(config, parts).err().unwrap();
    assert!(matches!(error, EdgeError::Busy { .. }));
    assert!(error.to_string().contains(&dc.address.to_string()), "{error}");
}
