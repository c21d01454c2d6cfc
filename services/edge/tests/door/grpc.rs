//! The gRPC door as clients use it, and every way to ask it wrongly.

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use sluice_edge::EdgeSettings;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{RevocationEpoch, TenantId, Timestamp};
use sluice_engine::limits::{CHUNK_LEN, MAX_FILE_LEN};
use sluice_engine::revocations::Revocation;
use sluice_node::token::TokenGrant;
use sluice_proto::ingest::ingest_client::IngestClient;
use sluice_proto::ingest::{
    AboutRequest, CreateRequest, DeleteRequest, ListRequest, PutRequest, ReadRequest, SettleRequest, State,
    StatusRequest, TreeRequest,
};
use sluice_worker::Pace;
use tokio_stream::StreamExt;
use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

use crate::client::{Datacenter, everything, now};
use crate::use_cases::{ID, content};

/// Adds a token to every call.
#[derive(Clone)]
pub(crate) struct Authorization(Option<String>);

impl Interceptor for Authorization {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(authorization) = &self.0 {
            request.metadata_mut().insert("authorization", authorization.parse().unwrap());
        }
        Ok(request)
    }
}

pub(crate) type Client = IngestClient<InterceptedService<Channel, Authorization>>;

/// A connection of its own to a datacenter.
pub(crate) async fn channel(dc: &Datacenter) -> Channel {
    let stream = dc.connect("h2").await;
    let mut once = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let io = once.take().ok_or_else(|| std::io::Error::other("there is one connection"));
        async move { io }
    });
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector)
}

/// A client with this token.
pub(crate) async fn client_as(dc: &Datacenter, authorization: Option<String>) -> Client {
    IngestClient::with_interceptor(channel(dc).await, Authorization(authorization))
}

pub(crate) async fn client(dc: &Datacenter) -> Client {
    client_as(dc, Some(format!("Bearer {}", dc.token))).await
}

/// The code and the problem of a status, whose form is checked.
#[track_caller]
pub(crate) fn problem(status: &Status) -> (Code, String) {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "sluice");
    assert_eq!(status.metadata().get("sluice-problem").unwrap(), info.reason.as_str());
    assert!(status.message().ends_with(&format!("({})", info.reason)), "{status:?}");
    let request = details.request_info().unwrap();
    assert_eq!((request.serving_data.as_str(), info.metadata["dc"].as_str()), ("dc-a", "dc-a"));
    assert_eq!(request.request_id.len(), 32);
    let retries = [Code::Unavailable, Code::ResourceExhausted, Code::DeadlineExceeded];
    assert_eq!(details.retry_info().is_some(), retries.contains(&status.code()), "{status:?}");
    assert_eq!(status.metadata().contains_key("grpc-retry-pushback-ms"), details.retry_info().is_some());
    (status.code(), info.reason.clone())
}

#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(
    result: Result<tonic::Response<T>, Status>,
    code: Code,
    name: &str,
) {
    assert_eq!(problem(&result.unwrap_err()), (code, name.to_owned()));
}

pub(crate) fn new_file(id: &str, size: u64) -> CreateRequest {
    CreateRequest { id: id.into(), size: Some(size), name: "a.bin".into(), ..CreateRequest::default() }
}

fn put(index: u64, data: &[u8]) -> PutRequest {
    PutRequest { id: ID.into(), index, data: Bytes::copy_from_slice(data), value: Bytes::new() }
}

fn read(offset: u64, length: Option<u64>) -> ReadRequest {
    ReadRequest { id: ID.into(), offset, length, expected_root: Bytes::new() }
}

fn status_of(id: &str) -> StatusRequest {
    StatusRequest { id: id.into(), wait_for: State::Unspecified.into(), timeout_secs: None }
}

/// What comes of a read: the range that was opened, and its bytes.
async fn bytes(client: &mut Client, request: ReadRequest) -> Result<(u64, Vec<u8>), Status> {
    let mut stream = client.read(request).await?.into_inner();
    let opened = stream.message().await?.unwrap().opened.unwrap();
    let mut bytes = Vec::new();
    while let Some(piece) = stream.message().await? {
        assert!(piece.opened.is_none() && piece.data.len() <= 1 << 20);
        bytes.extend_from_slice(&piece.data);
    }
    assert_eq!(opened.length, bytes.len() as u64);
    Ok((opened.offset, bytes))
}

#[tokio::test]
async fn a_file_goes_in_and_comes_out() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    let size = 2 * CHUNK_LEN + 5;
    let data = content(size);
    let root = Root::of_bytes(&data);
    let created = client.create(new_file(ID, size)).await.unwrap();
    assert_eq!(created.metadata().get("sluice-dc").unwrap(), "dc-a");
    let created = created.into_inner();
    let status = created.status.unwrap();
    assert!(created.created && status.root.is_empty());
    assert_eq!((status.chunks, status.state(), status.size), (3, State::Receiving, Some(size)));
    assert!(!client.create(new_file(ID, size)).await.unwrap().into_inner().created, "a retry");

    let chunk = |i: u64| &data[(i << 20) as usize..((i + 1) << 20).min(size) as usize];
    let value = |i: u64| {
        let value = ChainingValue::of_chunk(ChunkIndex::new(i).unwrap(), chunk(i)).unwrap();
        Bytes::copy_from_slice(value.as_bytes())
    };
    let mut waiting = client.clone();
    let wait = StatusRequest { wait_for: State::Complete.into(), timeout_secs: Some(20), ..status_of(ID) };
    let waited = tokio::spawn(async move { waiting.status(wait).await });
    for i in [2, 0, 1] {
        let request = PutRequest { value: value(i), ..put(i, chunk(i)) };
        let receipt = client.put(request).await.unwrap().into_inner();
        assert_eq!((receipt.start, &receipt.values, receipt.new_chunks), (i, &value(i), 1));
        assert!(receipt.dc == "dc-a" && !receipt.provisional);
    }
    let again = client.put(put(1, chunk(1))).await.unwrap().into_inner();
    assert_eq!(again.new_chunks, 0, "the same bytes get the same answer");
    let status = waited.await.unwrap().unwrap().into_inner();
    assert_eq!((status.state(), &status.root[..]), (State::Assembled, &root.as_bytes()[..]));

    assert!(bytes(&mut client, read(0, None)).await.unwrap() == (0, data.clone()));
    let part = bytes(&mut client, read(CHUNK_LEN - 3, Some(7))).await.unwrap();
    let from = (CHUNK_LEN - 3) as usize;
    assert_eq!(part, (CHUNK_LEN - 3, data[from..from + 7].to_vec()));
    assert_eq!(bytes(&mut client, read(size - 2, Some(99))).await.unwrap().1, &data[size as usize - 2..]);

    let tree = TreeRequest { id: ID.into(), start: 0, level: 1 };
    let tree = client.tree(tree).await.unwrap().into_inner();
    assert_eq!(tree.chunk_values, [value(0), value(1)]);
    let about = client.about(AboutRequest {}).await.unwrap().into_inner();
    assert_eq!((about.cluster.as_str(), about.dc.as_str()), ("test", "dc-a"));

    let text = dc.metrics.encode().unwrap();
    assert!(text.contains(r#"sluice_chunks_total{dc="dc-a",door="grpc",outcome="stored"} 3"#), "{text}");
    let counted = r#"rpc_method="sluice.v1.Ingest/Put",rpc_response_status_code="OK"} "#;
    let count = text.lines().find(|line| line.contains("seconds_count") && line.contains(counted));
    assert!(count.is_some_and(|line| line.ends_with(" 4")), "{text}");
    assert!(!text.contains(ID), "a file id is never a label");

    for _ in 0..2 {
        client.delete(DeleteRequest { id: ID.into() }).await.unwrap();
    }
    refused(client.status(status_of(ID)).await, Code::NotFound, "dropped");
    assert_eq!(dc.memory.used(), 0);
}

#[tokio::test]
async fn lists_go_on_where_a_page_ended_and_empty_files_are_read() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    let other = "0293e4a0-7b1c-7def-8123-456789abcdef";
    client.create(new_file(other, 7)).await.unwrap();
    client.create(new_file(ID, 0)).await.unwrap();
    let page = ListRequest { limit: 1, ..ListRequest::default() };
    let page = client.list(page).await.unwrap().into_inner();
    assert_eq!((page.files[0].id.as_str(), page.next.as_str()), (ID, ID));
    let page = ListRequest { after: page.next, ..ListRequest::default() };
    let page = client.list(page).await.unwrap().into_inner();
    assert_eq!((page.files[0].id.as_str(), page.next.as_str()), (other, ""));
    let assembled = ListRequest { state: State::Assembled.into(), ..ListRequest::default() };
    assert_eq!(client.list(assembled).await.unwrap().into_inner().files.len(), 1);
    assert_eq!(bytes(&mut client, read(0, None)).await.unwrap(), (0, Vec::new()));
    let made = client.create(new_file("", 3)).await.unwrap().into_inner();
    assert_eq!(made.status.unwrap().id.as_bytes()[14], b'7', "the server makes an id of version 7");
    let early = PutRequest { id: other.replace("0293", "0393"), ..put(5, &content(CHUNK_LEN)) };
    assert!(client.put(early).await.unwrap().into_inner().provisional, "the metadata has not come yet");
}

#[tokio::test]
async fn a_small_file_goes_in_with_one_call() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    let data = content(CHUNK_LEN);
    let whole = |size, body: &[u8]| {
        let body = Some(Bytes::copy_from_slice(body));
        CreateRequest { size, body, metadata: [("k".into(), "v".repeat(2048))].into(), ..new_file(ID, 0) }
    };
    for is_new in [true, false] {
        // With its size or without.
        let size = is_new.then_some(CHUNK_LEN);
        let created = client.create(whole(size, &data)).await.unwrap().into_inner();
        assert_eq!(created.created, is_new);
        let status = created.status.unwrap();
        assert_eq!((status.state(), status.size), (State::Assembled, Some(CHUNK_LEN)));
        assert_eq!(status.root, Root::of_bytes(&data).as_bytes()[..]);
    }
    assert_eq!(bytes(&mut client, read(0, None)).await.unwrap(), (0, data));
    refused(client.create(whole(None, b"else")).await, Code::AlreadyExists, "metadata-conflict");
    let text = dc.metrics.encode().unwrap();
    for (outcome, count) in [("stored", 1), ("known", 1), ("metadata-conflict", 1)] {
        let line =
            format!(r#"sluice_whole_files_total{{dc="dc-a",door="grpc",outcome="{outcome}"}} {count}"#);
        assert!(text.contains(&line), "{text}");
    }
    assert_eq!(dc.memory.used(), 0);
}

#[tokio::test]
async fn chunks_that_do_not_fit() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    client.create(new_file(ID, 4 * CHUNK_LEN + 5)).await.unwrap();
    let mut full = content(CHUNK_LEN);
    for (index, len, code, name) in [
        (5, CHUNK_LEN, Code::OutOfRange, "chunk-index"),
        (u64::MAX, CHUNK_LEN, Code::OutOfRange, "chunk-index"),
        (1, CHUNK_LEN - 1, Code::InvalidArgument, "chunk-length"),
        (4, 6, Code::InvalidArgument, "chunk-length"),
        (0, 0, Code::InvalidArgument, "chunk-length"),
    ] {
        refused(client.put(put(index, &full[..len as usize])).await, code, name);
    }
    refused(client.put(put(0, &content(CHUNK_LEN + 1))).await, Code::InvalidArgument, "chunk-length");
    refused(client.put(put(0, &content(2 * CHUNK_LEN))).await, Code::OutOfRange, "too-large");
    let wrong = PutRequest { value: vec![7; 32].into(), ..put(0, &full) };
    refused(client.put(wrong).await, Code::InvalidArgument, "chunk-value");
    for len in [1, 31, 33, 64, 32 * 9] {
        let malformed = PutRequest { value: vec![7; len].into(), ..put(0, &full) };
        refused(client.put(malformed).await, Code::InvalidArgument, "invalid-parameter");
    }
    let nameless = PutRequest { id: "x".into(), ..put(0, &full) };
    refused(client.put(nameless).await, Code::InvalidArgument, "invalid-id");
    client.put(put(0, &full)).await.unwrap();
    full[77] ^= 1;
    refused(client.put(put(0, &full)).await, Code::AlreadyExists, "chunk-conflict");
    let text = dc.metrics.encode().unwrap();
    assert!(text.contains(r#"{dc="dc-a",door="grpc",outcome="chunk-conflict"} 1"#), "{text}");
    assert_eq!(dc.memory.used(), 0);
}

#[tokio::test]
async fn metadata_that_is_none() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    let create = |change: &dyn Fn(&mut CreateRequest)| {
        let mut request = new_file(ID, 1);
        change(&mut request);
        request
    };
    let entry = |key: &str, value: String| {
        let key = key.to_owned();
        move |r: &mut CreateRequest| drop(r.metadata.insert(key.clone(), value.clone()))
    };
    let many = |r: &mut CreateRequest| r.metadata.extend((0..65).map(|i| (format!("k{i}"), "v".into())));
    for request in [
        create(&|r| r.name = "n".repeat(1025)),
        create(&|r| r.name = "a\0b".into()),
        create(&|r| r.content_type = "text/ül".into()),
        create(&|r| r.expires_in = 99_999_999_999),
        create(&|r| r.body = Some(vec![1, 2].into())),
        create(&entry("", "v".into())),
        create(&entry("k", "v".repeat(2049))),
        create(&many),
    ] {
        refused(client.create(request).await, Code::InvalidArgument, "invalid-metadata");
    }
    let id = create(&|r| r.id = "xyz".into());
    refused(client.create(id).await, Code::InvalidArgument, "invalid-id");
    let root = create(&|r| r.expected_root = vec![1; 31].into());
    refused(client.create(root).await, Code::InvalidArgument, "invalid-parameter");
    let huge = create(&|r| r.name = "n".repeat(CHUNK_LEN as usize + 70_000));
    refused(client.create(huge).await, Code::OutOfRange, "too-large");
    let long = create(&|r| r.body = Some(content(CHUNK_LEN + 1).into()));
    refused(client.create(long).await, Code::OutOfRange, "too-large");
    let size = create(&|r| r.size = Some(MAX_FILE_LEN + 1));
    refused(client.create(size).await, Code::OutOfRange, "too-large");
    // More fields than any file has: refused before they unfold.
    let fields = create(&|r| r.metadata.extend((0..5000).map(|i| (i.to_string(), String::new()))));
    refused(client.create(fields).await, Code::InvalidArgument, "invalid-parameter");
    client.create(new_file(ID, 5)).await.unwrap();
    refused(client.create(new_file(ID, 6)).await, Code::AlreadyExists, "metadata-conflict");
}

#[tokio::test]
async fn parameters_that_are_none() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    client.create(new_file(ID, 5)).await.unwrap();
    let other = "0293e4a0-7b1c-7def-8123-456789abcdef";
    let invalid = (Code::InvalidArgument, "invalid-parameter");
    for (request, (code, name)) in [
        (status_of("xyz"), (Code::InvalidArgument, "invalid-id")),
        (status_of(other), (Code::NotFound, "not-found")),
        (StatusRequest { wait_for: 17, ..status_of(ID) }, invalid),
        (StatusRequest { wait_for: State::Dropped.into(), ..status_of(ID) }, invalid),
        (StatusRequest { timeout_secs: Some(61), ..status_of(ID) }, invalid),
    ] {
        refused(client.status(request).await, code, name);
    }
    for request in [
        ListRequest { limit: 1001, ..ListRequest::default() },
        ListRequest { state: -1, ..ListRequest::default() },
    ] {
        refused(client.list(request).await, invalid.0, invalid.1);
    }
    let after = ListRequest { after: "x".into(), ..ListRequest::default() };
    refused(client.list(after).await, Code::InvalidArgument, "invalid-id");
    for (start, level) in [(1, 1), (0, 13), (0, 300), (u64::MAX, 0)] {
        refused(client.tree(TreeRequest { id: ID.into(), start, level }).await, invalid.0, invalid.1);
    }
    refused(client.read(read(0, None)).await, Code::FailedPrecondition, "incomplete");
    client.put(put(0, &content(5))).await.unwrap();
    for (offset, length) in [(5, None), (0, Some(0)), (u64::MAX, Some(u64::MAX))] {
        refused(client.read(read(offset, length)).await, Code::OutOfRange, "range");
    }
    let another = ReadRequest { expected_root: vec![1; 32].into(), ..read(0, None) };
    refused(client.read(another).await, Code::FailedPrecondition, "precondition");
    let root = Bytes::copy_from_slice(Root::of_bytes(&content(5)).as_bytes());
    let same = ReadRequest { expected_root: root, ..read(0, None) };
    assert_eq!(bytes(&mut client, same).await.unwrap().1, content(5));
    let malformed = ReadRequest { expected_root: vec![1; 3].into(), ..read(0, None) };
    refused(client.read(malformed).await, invalid.0, invalid.1);
    let gone = client.delete(DeleteRequest { id: other.into() }).await;
    refused(gone, Code::NotFound, "not-found");
}

#[tokio::test]
async fn a_size_that_was_left_open_is_settled_once() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    let open = CreateRequest { size: None, ..new_file(ID, 0) };
    let status = client.create(open).await.unwrap().into_inner().status.unwrap();
    assert_eq!((status.size, status.chunks), (None, 0));
    refused(client.put(put(0, b"short")).await, Code::FailedPrecondition, "size-open");
    client.put(put(0, &content(CHUNK_LEN))).await.unwrap();
    let settle = |size| SettleRequest { id: ID.into(), size };
    refused(client.settle(settle(MAX_FILE_LEN + 1)).await, Code::OutOfRange, "too-large");
    for _ in 0..2 {
        let status = client.settle(settle(CHUNK_LEN + 5)).await.unwrap().into_inner();
        assert_eq!((status.size, status.chunks, status.state()), (Some(CHUNK_LEN + 5), 2, State::Receiving));
    }
    refused(client.settle(settle(CHUNK_LEN)).await, Code::AlreadyExists, "size-conflict");
    client.put(put(1, b"short")).await.unwrap();
    assert_eq!(client.status(status_of(ID)).await.unwrap().into_inner().state(), State::Assembled);
}

#[tokio::test]
async fn what_the_store_refuses_has_the_same_name_here() {
    use sluice_store::StoreError;
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    client.create(new_file(ID, 5)).await.unwrap();
    for (error, code, name) in [
        (StoreError::Full { free: 1, reserve: 2 }, Code::ResourceExhausted, "volume-full"),
        (StoreError::ReadOnly { reason: "a test".into() }, Code::Unavailable, "read-only"),
        (StoreError::Closing, Code::Unavailable, "stopping"),
        (StoreError::ClaimLost, Code::DeadlineExceeded, "timeout"),
    ] {
        *dc.store.fail.lock().unwrap() = Some(error);
        refused(client.put(put(0, &content(5))).await, code, name);
    }
}

#[tokio::test]
async fn tokens_are_refused_by_name() {
    let dc = Datacenter::patient();
    let mint = |grant: &TokenGrant| format!("Bearer {}", dc.mint.mint(grant, now()).unwrap());
    let earlier = Timestamp::new(now().number() - 7_200_000);
    let expired = format!("Bearer {}", dc.mint.mint(&everything(), earlier).unwrap());
    let revoked = mint(&TokenGrant { tenant: TenantId::new(8), ..everything() });
    dc.revocations.apply(Revocation {
        tenant: TenantId::new(8),
        session: None,
        epoch: RevocationEpoch::new(1),
    });
    let stranger = format!("Bearer {}", Datacenter::patient().token);
    let elsewhere = mint(&TokenGrant { dcs: vec![sluice_engine::ids::DcId::new(2)], ..everything() });
    let reader = mint(&TokenGrant { scopes: vec![sluice_engine::context::Scope::Read], ..everything() });
    for (authorization, code, name) in [
        (None, Code::Unauthenticated, "unauthenticated"),
        (Some("Basic YTpi".into()), Code::Unauthenticated, "invalid-token"),
        (Some("Bearer garbage".into()), Code::Unauthenticated, "invalid-token"),
        (Some(stranger), Code::Unauthenticated, "invalid-token"),
        (Some(expired), Code::Unauthenticated, "expired-token"),
        (Some(revoked), Code::Unauthenticated, "revoked-token"),
        (Some(elsewhere), Code::PermissionDenied, "forbidden"),
        (Some(reader), Code::PermissionDenied, "forbidden"),
    ] {
        let mut client = client_as(&dc, authorization).await;
        refused(client.put(put(0, &content(CHUNK_LEN))).await, code, name);
        refused(client.create(new_file(ID, 1)).await, code, name);
    }
    // What only the inside may set changes nothing, and another tenant's file is as if it did not exist.
    let mut owner = client(&dc).await;
    owner.create(new_file(ID, 0)).await.unwrap();
    let mut other =
        client_as(&dc, Some(mint(&TokenGrant { tenant: TenantId::new(9), ..everything() }))).await;
    let mut request = Request::new(status_of(ID));
    for (name, value) in [("sluice-context", "00"), ("x-sluice-tenant", "7"), ("sluice-dc", "dc-z")] {
        request.metadata_mut().insert(name, value.parse().unwrap());
    }
    refused(other.status(request).await, Code::NotFound, "not-found");
}

#[tokio::test]
async fn a_trace_is_carried_on() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    let mut request = Request::new(AboutRequest {});
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.metadata_mut().insert("traceparent", trace.parse().unwrap());
    let answer = client.about(request).await.unwrap();
    assert_eq!(answer.metadata().get("trace-id").unwrap(), "0af7651916cd43dd8448eb211c80319c");
}

#[tokio::test]
async fn past_a_bound_calls_are_shed() {
    let dc = Datacenter::made(EdgeSettings::default(), 2 << 20, Pace::default());
    let mut client = client(&dc).await;
    client.create(new_file(ID, CHUNK_LEN)).await.unwrap();
    let all = dc.memory.try_take((2 << 20) - (64 << 10)).unwrap();
    refused(client.put(put(0, &content(CHUNK_LEN))).await, Code::Unavailable, "overloaded");
    drop(all);
    client.put(put(0, &content(CHUNK_LEN))).await.unwrap();
    assert_eq!(dc.memory.used(), 0);

    let settings = EdgeSettings { requests: 1, ..EdgeSettings::default() };
    let dc = Datacenter::made(settings, 2 << 20, Pace::default());
    let mut client = self::client(&dc).await;
    let ask = HealthCheckRequest { service: String::new() };
    let _open = HealthClient::new(channel(&dc).await).watch(ask).await.unwrap();
    refused(client.about(AboutRequest {}).await, Code::Unavailable, "overloaded");
    let text = dc.metrics.encode().unwrap();
    assert!(text.contains(r#"reason="requests"} 1"#), "{text}");
}

#[tokio::test]
async fn health_follows_readiness() {
    let dc = Datacenter::patient();
    let mut health = HealthClient::new(channel(&dc).await);
    let ask = |service: &str| HealthCheckRequest { service: service.into() };
    for service in ["", "sluice.v1.Ingest"] {
        let answer = health.check(ask(service)).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
    }
    assert_eq!(health.check(ask("x")).await.unwrap_err().code(), Code::NotFound);
    let mut watch = health.watch(ask("sluice.v1.Ingest")).await.unwrap().into_inner();
    let mut unknown = health.watch(ask("x")).await.unwrap().into_inner();
    assert_eq!(unknown.next().await.unwrap().unwrap().status(), ServingStatus::ServiceUnknown);
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
    dc.health.set_serving(false);
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(health.check(ask("")).await.unwrap().into_inner().status(), ServingStatus::NotServing);
    dc.health.set_serving(true);
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let stop = tokio::spawn({
        let tasks = dc.tasks.clone();
        async move { tasks.stop(std::time::Duration::from_secs(10)).await }
    });
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert!(watch.next().await.is_none() && unknown.next().await.is_none());
    assert_eq!(
        stop.await.unwrap(),
        sluice_node::shutdown::Stopped::Clean,
        "no watcher keeps it from stopping"
    );
}

#[tokio::test]
async fn reflection_describes_the_service() {
    macro_rules! ask {
        ($version:ident, $dc:expr) => {{
            use tonic_reflection::pb::$version::ServerReflectionRequest;
            use tonic_reflection::pb::$version::server_reflection_client::ServerReflectionClient;
            use tonic_reflection::pb::$version::server_reflection_request::MessageRequest;
            use tonic_reflection::pb::$version::server_reflection_response::MessageResponse;
            let mut client = ServerReflectionClient::new(channel($dc).await);
            let ask =
                |message| ServerReflectionRequest { host: String::new(), message_request: Some(message) };
            let (send, requests) = tokio::sync::mpsc::channel(4);
            send.send(ask(MessageRequest::ListServices(String::new()))).await.unwrap();
            send.send(ask(MessageRequest::FileContainingSymbol("sluice.v1.Ingest".into()))).await.unwrap();
            let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
            let mut answers = client.server_reflection_info(requests).await.unwrap().into_inner();
            let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
            let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
            let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
            assert!(names.contains(&"sluice.v1.Ingest") && names.contains(&"grpc.health.v1.Health"));
            let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
            let MessageResponse::FileDescriptorResponse(files) = answer else { panic!("{answer:?}") };
            let file = String::from_utf8_lossy(&files.file_descriptor_proto[0]).into_owned();
            assert!(file.contains("UploadRequest"));
            (send, answers)
        }};
    }
    let dc = Datacenter::patient();
    let (_open, mut answers) = ask!(v1, &dc);
    let (_also, mut others) = ask!(v1alpha, &dc);
    // Streams that are never closed keep nothing from stopping.
    let stopped = dc.tasks.stop(std::time::Duration::from_secs(10));
    let (stopped, one, other) = tokio::join!(stopped, answers.message(), others.message());
    assert_eq!(stopped, sluice_node::shutdown::Stopped::Clean);
    assert_eq!((one.unwrap(), other.unwrap()), (None, None));
}

#[tokio::test]
async fn the_http_door_is_where_it_was() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    client.create(new_file(ID, 5)).await.unwrap();
    assert_eq!(dc.ask(&format!("GET /v1/files/{ID}"), b"").await.status, 200);
    // Over HTTP/1.1 there is no gRPC.
    let call = dc.ask_with("POST /sluice.v1.Ingest/About", "Content-Type: application/grpc\r\n", b"").await;
    assert_eq!(call.problem(), (404, "no-route".into()));
    let _: MetadataMap = client.about(AboutRequest {}).await.unwrap().metadata().clone();
}
