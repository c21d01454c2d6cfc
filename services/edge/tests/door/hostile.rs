//! Clients that are slow, silent, broken, or too many.

use std::time::Duration;

use sluice_engine::ids::FileId;
use sluice_engine::limits::CHUNK_LEN;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::client::{Datacenter, TENANT, head, quick, read_answer};
use crate::use_cases::{ID, content};

fn authorization(dc: &Datacenter) -> String {
    format!("Authorization: Bearer {}\r\n", dc.token)
}

fn put(dc: &Datacenter, more: &str, len: u64) -> String {
    head(&format!("PUT /v1/files/{ID}/chunks/0"), &format!("{}{more}", authorization(dc)), len as usize)
}

fn stored(dc: &Datacenter) -> usize {
    dc.store.chunks(FileId::derive(TENANT, ID.parse().unwrap()))
}

/// Returns once the condition holds.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = timeout(Duration::from_secs(10), async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what}");
}

#[tokio::test]
async fn a_reset_or_short_body_is_never_a_chunk() {
    let dc = Datacenter::start();
    dc.create(ID, CHUNK_LEN).await;
    let mut stream = dc.connect("http/1.1").await;
    stream.write_all(put(&dc, "", CHUNK_LEN).as_bytes()).await.unwrap();
    stream.write_all(&content(CHUNK_LEN - 1)).await.unwrap();
    // Until the edge has the request, there is nothing to break off.
    until("the request arrived", || dc.memory.used() > 0).await;
    let (tcp, _) = stream.into_inner();
    tcp.set_zero_linger().unwrap();
    drop(tcp);
    until("the request ended", || dc.memory.used() == 0).await;
    assert_eq!(stored(&dc), 0);
    assert!(!dc.metrics.encode().unwrap().contains(r#"outcome="stored""#));

    let mut stream = dc.connect("http/1.1").await;
    stream.write_all(put(&dc, "", CHUNK_LEN).as_bytes()).await.unwrap();
    stream.write_all(&content(CHUNK_LEN - 1)).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok();
    assert!(answer.starts_with(b"HTTP/1.1 400"), "a client that can still read is told");
    until("the request ended", || dc.memory.used() == 0).await;
    assert_eq!(stored(&dc), 0);
}

#[tokio::test]
async fn a_body_longer_than_declared_is_no_part_of_the_chunk() {
    let dc = Datacenter::start();
    dc.create(ID, CHUNK_LEN).await;
    // Beyond the declared length lies the next request, which this is not.
    let answer = dc.raw(&put(&dc, "", CHUNK_LEN), &content(CHUNK_LEN + 9)).await;
    assert_eq!(answer.status, 200);
    assert_eq!(stored(&dc), 1);
}

#[tokio::test]
async fn bodies_that_trickle_or_stop_are_cut_by_name() {
    let dc = Datacenter::start();
    dc.create(ID, CHUNK_LEN).await;
    let mut silent = dc.connect("http/1.1").await;
    silent.write_all(put(&dc, "", CHUNK_LEN).as_bytes()).await.unwrap();
    assert_eq!(read_answer(&mut silent).await.problem(), (408, "timeout".into()));

    let dripping = dc.connect("http/1.1").await;
    let (mut reader, mut writer) = tokio::io::split(dripping);
    writer.write_all(put(&dc, "", CHUNK_LEN).as_bytes()).await.unwrap();
    let drip = async {
        while writer.write_all(b"x").await.is_ok() && writer.flush().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let mut answer = [0; 12];
    tokio::select! {
        () = drip => panic!("cut before it was answered"),
        read = timeout(Duration::from_secs(10), reader.read_exact(&mut answer)) => {
            read.unwrap().unwrap();
        }
    }
    assert_eq!(&answer, b"HTTP/1.1 408");

    let mut json = dc.connect("http/1.1").await;
    let request = head("POST /v1/files", &authorization(&dc), 100);
    json.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(read_answer(&mut json).await.problem(), (408, "timeout".into()));
    assert_eq!(dc.memory.used(), 0);
}

#[tokio::test]
async fn a_client_that_asks_first_is_answered_before_it_sends() {
    let dc = Datacenter::start();
    dc.create(ID, CHUNK_LEN).await;
    let mut stream = dc.connect("http/1.1").await;
    stream.write_all(put(&dc, "Expect: 100-continue\r\n", CHUNK_LEN).as_bytes()).await.unwrap();
    assert_eq!(read_answer(&mut stream).await.status, 100);
    stream.write_all(&content(CHUNK_LEN)).await.unwrap();
    assert_eq!(read_answer(&mut stream).await.status, 200);

    let mut stream = dc.connect("http/1.1").await;
    let path = format!("PUT /v1/files/{ID}/chunks/7");
    let expecting = format!("{}Expect: 100-continue\r\n", authorization(&dc));
    stream.write_all(head(&path, &expecting, 1 << 20).as_bytes()).await.unwrap();
    assert_eq!(read_answer(&mut stream).await.problem(), (400, "chunk-index".into()), "and no 100");
}

#[tokio::test]
async fn a_client_that_asks_first_and_is_refused_hears_why_and_no_100() {
    let dc = Datacenter::with(quick(), 300 << 10);
    dc.create(ID, CHUNK_LEN).await;
    let all = dc.memory.try_take(260 << 10).unwrap();
    let put = |more: &str, len: u64| {
        let headers = format!("{more}Expect: 100-continue\r\n");
        head(&format!("PUT /v1/files/{ID}/chunks/0"), &headers, len as usize)
            .replace("Connection: close\r\n", "")
    };
    let known = authorization(&dc);
    let value = format!("{known}Chunk-Value: zz\r\n");
    let json = head("POST /v1/files", &format!("{known}Expect: 100-continue\r\n"), 1 << 20);
    for (request, expected) in [
        (put("", CHUNK_LEN), (401, "unauthenticated")),
        (put("Authorization: Bearer x.y.z\r\n", CHUNK_LEN), (401, "invalid-token")),
        (put(&known, CHUNK_LEN), (503, "overloaded")),
        (put(&value, 5), (400, "invalid-parameter")),
        (json, (413, "too-large")),
        (put(&known, 5), (400, "chunk-length")),
    ] {
        let mut stream = dc.connect("http/1.1").await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let answer = read_answer(&mut stream).await;
        assert_eq!(answer.problem(), (expected.0, expected.1.to_owned()), "and no 100");
        // Nobody can tell whether a body follows: the connection ends rather than take it for a request.
        let mut rest = Vec::new();
        let end = timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
        assert!(end.is_ok() && rest.is_empty(), "{expected:?}: {:?}", String::from_utf8_lossy(&rest));
    }
    drop(all);
    assert_eq!(stored(&dc), 0);
    // Once it was asked for and taken, the connection goes on.
    let mut stream = dc.connect("http/1.1").await;
    for _ in 0..2 {
        stream.write_all(put(&known, CHUNK_LEN).as_bytes()).await.unwrap();
        assert_eq!(read_answer(&mut stream).await.status, 100);
        stream.write_all(&content(CHUNK_LEN)).await.unwrap();
        assert_eq!(read_answer(&mut stream).await.status, 200);
    }
}

#[tokio::test]
async fn a_refused_request_leaves_its_connection_usable() {
    let dc = Datacenter::start();
    dc.create(ID, CHUNK_LEN).await;
    let mut stream = dc.connect("http/1.1").await;
    let keep = |request: String| request.replace("Connection: close\r\n", "");
    let refused = keep(head(&format!("PUT /v1/files/{ID}/chunks/0"), "", 1 << 20));
    stream.write_all(refused.as_bytes()).await.unwrap();
    stream.write_all(&content(CHUNK_LEN)).await.unwrap();
    assert_eq!(read_answer(&mut stream).await.problem(), (401, "unauthenticated".into()));
    stream.write_all(keep(put(&dc, "", CHUNK_LEN)).as_bytes()).await.unwrap();
    stream.write_all(&content(CHUNK_LEN)).await.unwrap();
    assert_eq!(read_answer(&mut stream).await.status, 200);
}

#[tokio::test]
async fn headers_are_bounded() {
    let dc = Datacenter::start();
    let long = format!("X-Long: {}\r\n", "x".repeat(40 << 10));
    let many: String = (0..200).map(|i| format!("X-{i}: 1\r\n")).collect();
    for flood in [long, many] {
        let answer = dc.ask_with("GET /v1", &flood, b"").await;
        assert_eq!(answer.status, 431);
    }
    let bad = dc.raw("GET /v1 HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n", b"").await;
    assert_eq!(bad.status, 400);
    let smuggled = format!(
        "PUT /v1/files/{ID}/chunks/0 HTTP/1.1\r\nHost: x\r\n{}Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        authorization(&dc)
    );
    assert_eq!(dc.raw(&smuggled, b"").await.status, 400);
}

#[tokio::test]
async fn silent_connections_are_closed() {
    let dc = Datacenter::start();
    let mut tcp = TcpStream::connect(dc.address).await.unwrap();
    let mut byte = [0; 1];
    let closed = timeout(Duration::from_secs(10), tcp.read(&mut byte)).await.expect("closed in time");
    assert!(matches!(closed, Ok(0) | Err(_)), "half-open TLS");

    let mut tls = dc.connect("http/1.1").await;
    let closed = timeout(Duration::from_secs(10), tls.read_to_end(&mut Vec::new())).await;
    assert!(closed.is_ok(), "no request");

    let mut slow = dc.connect("http/1.1").await;
    slow.write_all(b"GET /v1 HTT").await.unwrap();
    let closed = timeout(Duration::from_secs(10), slow.read_to_end(&mut Vec::new())).await;
    assert!(closed.is_ok(), "half a head");
    until("all are gone", || dc.metrics.connections.get() == 0).await;
}

#[tokio::test]
async fn past_a_bound_work_is_shed() {
    let dc = Datacenter::with(quick(), 300 << 10);
    dc.create(ID, CHUNK_LEN).await;
    let all = dc.memory.try_take(260 << 10).unwrap();
    let answer = dc.raw(&put(&dc, "", CHUNK_LEN), &content(CHUNK_LEN)).await;
    assert_eq!(answer.problem(), (503, "overloaded".into()));
    drop(all);
    assert_eq!(dc.raw(&put(&dc, "", CHUNK_LEN), &content(CHUNK_LEN)).await.status, 200);

    let settings = sluice_edge::EdgeSettings { connections: 1, ..quick() };
    let dc = Datacenter::with(settings, 64 << 20);
    let _one = dc.connect("http/1.1").await;
    let mut second = TcpStream::connect(dc.address).await.unwrap();
    assert!(matches!(second.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    let text = dc.metrics.encode().unwrap();
    assert!(text.contains(r#"sluice_shed_total{dc="dc-a",reason="connections"} 1"#), "{text}");
}

/// One HTTP/2 frame (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// `GET https://x/`, in HPACK.
const HEADERS: [u8; 6] = [0x82, 0x84, 0x87, 0x41, 0x01, b'x'];

const DATA: u8 = 0;
const HEADER: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// Floods an HTTP/2 connection with frames, and returns once the edge has hung up.
async fn flood(dc: &Datacenter, mut frames: impl FnMut(u32) -> Vec<u8>) {
    let mut stream = dc.connect("h2").await;
    let opening = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, b"")].concat();
    stream.write_all(&opening).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let write = async {
        for i in 0..100_000 {
            if writer.write_all(&frames(i)).await.is_err() {
                return;
            }
        }
        std::future::pending::<()>().await;
    };
    let read = async { reader.read_to_end(&mut Vec::new()).await };
    let hung_up = async {
        tokio::select! {
            () = write => {}
            _ = read => {}
        }
    };
    timeout(Duration::from_secs(30), hung_up).await.expect("the edge hangs up");
    // And is as well as before.
    assert_eq!(dc.ask("GET /v1", b"").await.status, 200);
    until("the connection is gone", || dc.metrics.connections.get() == 0).await;
}

#[tokio::test]
async fn rapid_resets_end_the_http_2_connection() {
    let dc = Datacenter::start();
    flood(&dc, |i| {
        let pair =
            |stream| [frame(HEADER, END_HEADERS, stream, &HEADERS), frame(RESET, 0, stream, &[0, 0, 0, 8])];
        (0..100).flat_map(|j| pair(2 * (100 * i + j) + 1).concat()).collect()
    })
    .await;
}

#[tokio::test]
async fn endless_headers_end_the_http_2_connection() {
    let dc = Datacenter::start();
    // A literal header of 16 KiB, in a frame that is never the last.
    let literal = [&[0x00, 0x01, b'x', 0x7F, 0xE1, 0x7D][..], &[b'v'; 16_000]].concat();
    flood(&dc, |i| if i == 0 { frame(HEADER, 0, 1, &HEADERS) } else { frame(CONTINUATION, 0, 1, &literal) })
        .await;
}

#[tokio::test]
async fn empty_data_frames_end_the_http_2_connection() {
    let dc = Datacenter::start();
    flood(&dc, |i| {
        if i == 0 { frame(HEADER, END_HEADERS, 1, &HEADERS) } else { frame(DATA, 0, 1, b"").repeat(100) }
    })
    .await;
}
