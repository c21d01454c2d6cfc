//! Calls that no library makes: byte by byte over HTTP/2.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request};
use prost::Message;
use sluice_engine::limits::CHUNK_LEN;
use sluice_proto::ingest::{CreateRequest, PutRequest, StatusRequest};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::client::Datacenter;
use crate::grpc::problem;
use crate::use_cases::{ID, content};

/// A message as it stands on the wire.
fn framed(message: &[u8]) -> Vec<u8> {
    [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat()
}

/// How a call goes on after its bytes.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    End,
    Silence,
    Drip,
}

/// Makes a call of these bytes, and returns the status that it ends with.
async fn call(
    dc: &Datacenter,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
    then: Then,
) -> Status {
    let (sender, connection) = h2::client::handshake(dc.connect("h2").await).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut request = Request::post(format!("https://localhost/{path}"))
        .header("te", "trailers")
        .header("authorization", format!("Bearer {}", dc.token));
    if !headers.iter().any(|(name, _)| *name == "content-type") {
        request = request.header("content-type", "application/grpc");
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut sender = sender.ready().await.unwrap();
    let (answer, mut stream) = sender.send_request(request.body(()).unwrap(), false).unwrap();
    let mut body = body.into();
    let send = async {
        while !body.is_empty() {
            stream.reserve_capacity(body.len());
            let Some(Ok(room)) = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await else { break };
            if stream.send_data(body.split_to(room.min(body.len())), false).is_err() {
                break;
            }
        }
        while then == Then::Drip && stream.send_data(Bytes::from_static(b"x"), false).is_ok() {
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
        if then == Then::End {
            let _ = stream.send_data(Bytes::new(), true);
        } else {
            std::future::pending::<()>().await;
        }
    };
    let receive = async {
        let answer = answer.await.unwrap();
        assert_eq!(answer.status(), 200);
        if let Some(status) = Status::from_header_map(answer.headers()) {
            return status;
        }
        let mut body = answer.into_body();
        while let Some(piece) = body.data().await {
            body.flow_control().release_capacity(piece.unwrap().len()).unwrap();
        }
        let trailers: HeaderMap = body.trailers().await.unwrap().unwrap();
        Status::from_header_map(&trailers).unwrap()
    };
    let received = async {
        tokio::pin!(receive);
        tokio::select! {
            status = &mut receive => return status,
            () = send => {}
        }
        receive.await
    };
    let status = timeout(Duration::from_secs(20), received).await.expect("an answer in time");
    driver.abort();
    status
}

const CREATE: &str = "sluice.v1.Ingest/Create";
const PUT: &str = "sluice.v1.Ingest/Put";
const UPLOAD: &str = "sluice.v1.Ingest/Upload";

#[tokio::test]
async fn what_is_no_message_is_refused_by_name() {
    let dc = Datacenter::patient();
    let message = framed(&CreateRequest { size: Some(1), ..CreateRequest::default() }.encode_to_vec());
    let invalid = (Code::InvalidArgument, "invalid-parameter");
    let truncated = (Code::InvalidArgument, "truncated");
    // A group in a group in a group, as deep as a message is long.
    let deep = framed(&[0x53].repeat(60_000));
    let nested = {
        // The body of a begin in a begin in a begin: an unknown field inside, as far as the protocol is concerned.
        let mut inner = Vec::new();
        for _ in 0..300 {
            let mut outer = vec![0x12];
            prost::encoding::encode_varint(inner.len() as u64, &mut outer);
            outer.extend_from_slice(&inner);
            inner = outer;
        }
        framed(&inner)
    };
    for (what, path, body, expected) in [
        ("garbage", CREATE, framed(&[0xFF; 40]), invalid),
        ("not UTF-8", CREATE, framed(&[0x1A, 2, 0xFF, 0xFE]), invalid),
        ("groups without end", CREATE, deep.clone(), invalid),
        ("groups without end", UPLOAD, deep, invalid),
        ("nested without sense", UPLOAD, nested, invalid),
        ("a map without end", CREATE, framed(&[0x2A, 0].repeat(30_000)), invalid),
        ("a second message", CREATE, [message.clone(), message.clone()].concat(), invalid),
        ("no message", CREATE, Vec::new(), truncated),
        ("half a prefix", CREATE, message[..3].to_vec(), truncated),
        ("half a message", CREATE, message[..6].to_vec(), truncated),
        ("half a message", UPLOAD, vec![0, 0, 0, 1, 0, 7], truncated),
        ("4 GiB", CREATE, vec![0, 0xFF, 0xFF, 0xFF, 0xFF, 7], (Code::OutOfRange, "too-large")),
        ("4 GiB", UPLOAD, vec![0, 0xFF, 0xFF, 0xFF, 0xFF, 7], (Code::OutOfRange, "too-large")),
        ("2 MiB", PUT, vec![0, 0, 0x20, 0, 0, 7], (Code::OutOfRange, "too-large")),
        ("compressed", CREATE, vec![1, 0, 0, 0, 1, 7], (Code::Unimplemented, "encoding")),
        ("compressed", UPLOAD, vec![1, 0, 0, 0, 1, 7], (Code::Unimplemented, "encoding")),
        ("no such flag", PUT, vec![9, 0, 0, 0, 1, 7], (Code::Unimplemented, "encoding")),
        ("no such method", "sluice.v1.Ingest/Format", message.clone(), (Code::Unimplemented, "no-route")),
        ("no such service", "sluice.v2.Ingest/Create", message.clone(), (Code::Unimplemented, "no-route")),
        ("no path", "", message.clone(), (Code::Unimplemented, "no-route")),
    ] {
        let status = call(&dc, path, &[], body, Then::End).await;
        let (code, name) = problem(&status);
        assert_eq!((code, name.as_str()), expected, "{what} to {path}: {status:?}");
    }
    for encoding in ["gzip", "deflate", "zstd", "x"] {
        let status = call(&dc, CREATE, &[("grpc-encoding", encoding)], message.clone(), Then::End).await;
        assert_eq!(problem(&status), (Code::Unimplemented, "encoding".into()), "{encoding}");
    }
    let identity = call(&dc, CREATE, &[("grpc-encoding", "identity")], message, Then::End).await;
    assert_eq!(identity.code(), Code::Ok);
    assert_eq!(dc.memory.used(), 0);
}

#[tokio::test]
async fn messages_that_trickle_or_stop_are_cut_by_name() {
    let dc = Datacenter::start();
    let put = PutRequest { id: ID.into(), index: 0, data: content(CHUNK_LEN).into(), value: Bytes::new() };
    let whole = framed(&put.encode_to_vec());
    let late = (Code::DeadlineExceeded, "timeout".to_owned());
    for (what, path, body, then) in [
        ("no message", CREATE, Vec::new(), Then::Silence),
        ("half a prefix", CREATE, vec![0, 0], Then::Silence),
        ("half a message", UPLOAD, vec![0, 0, 0, 0, 200, 7], Then::Silence),
        ("a byte now and then", CREATE, vec![0, 0, 0, 0x80, 0], Then::Drip),
        ("a byte now and then", UPLOAD, vec![0, 0, 0, 0x80, 0], Then::Drip),
        ("a call that does not end", CREATE, framed(&[]), Then::Silence),
    ] {
        let status = call(&dc, path, &[], body, then).await;
        assert_eq!(problem(&status), late, "{what} to {path}: {status:?}");
    }
    assert_eq!(dc.memory.used(), 0);
    assert!(dc.metrics.encode().unwrap().contains(r#"reason="slow-body"} 6"#));
    // One that ends in time is taken, however it is cut.
    assert_eq!(call(&dc, PUT, &[], whole, Then::End).await.code(), Code::Ok);
}

#[tokio::test]
async fn the_time_that_a_client_gives_a_call_is_kept_by_the_server() {
    let dc = Datacenter::patient();
    let create = CreateRequest { id: ID.into(), size: Some(5), ..CreateRequest::default() };
    let created = call(&dc, CREATE, &[], framed(&create.encode_to_vec()), Then::End).await;
    assert_eq!(created.code(), Code::Ok);
    let late = (Code::DeadlineExceeded, "timeout".to_owned());
    let wait = StatusRequest { id: ID.into(), wait_for: 2, timeout_secs: Some(60) };
    let wait = framed(&wait.encode_to_vec());
    let soon = [("grpc-timeout", "200m")];
    assert_eq!(problem(&call(&dc, "sluice.v1.Ingest/Status", &soon, wait, Then::End).await), late);
    assert_eq!(problem(&call(&dc, UPLOAD, &soon, Vec::new(), Then::Silence).await), late, "a stream");
    let malformed = [("grpc-timeout", "soon")];
    let status = call(&dc, "sluice.v1.Ingest/About", &malformed, framed(&[]), Then::End).await;
    assert_eq!(problem(&status), (Code::InvalidArgument, "invalid-parameter".into()));
    let waited = timeout(Duration::from_secs(20), async {
        while dc.memory.used() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "what the stream had is given back");
}

#[tokio::test]
async fn calls_that_are_given_up_at_once_end_the_connection_and_cost_nothing() {
    let dc = Datacenter::patient();
    let (mut sender, connection) = h2::client::handshake(dc.connect("h2").await).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut given_up = 0;
    while given_up < 20_000 {
        let Ok(ready) = sender.ready().await else { break };
        sender = ready;
        let request = Request::post(format!("https://localhost/{UPLOAD}"))
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .header("authorization", format!("Bearer {}", dc.token));
        let Ok((answer, mut stream)) = sender.send_request(request.body(()).unwrap(), false) else { break };
        stream.send_reset(h2::Reason::CANCEL);
        drop(answer);
        given_up += 1;
    }
    let ended = timeout(Duration::from_secs(20), driver).await;
    // Either the edge has hung up, or it has served and forgotten every one of them.
    if let Ok(ended) = ended {
        assert!(ended.unwrap().is_err() || given_up < 20_000);
    }
    let waited = timeout(Duration::from_secs(20), async {
        while dc.memory.used() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "memory is given back");
    assert_eq!(dc.ask("GET /v1", b"").await.status, 200);
}
