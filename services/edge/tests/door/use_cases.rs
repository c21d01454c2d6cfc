//! What clients do: create, upload, wait, read, list, delete.

use bytes::Bytes;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::limits::CHUNK_LEN;
use sluice_proto::http::{About, ChunkReceipt, FilePage, FileStatus, State, TreeNode};

use crate::client::Datacenter;

pub(crate) const ID: &str = "0193e4a0-7b1c-7def-8123-456789abcdef";

pub(crate) fn content(len: u64) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

#[tokio::test]
async fn a_file_goes_in_and_comes_out() {
    let dc = Datacenter::start();
    let size = 3 * CHUNK_LEN + 5;
    let bytes = content(size);
    let created = dc.create(ID, size).await;
    assert_eq!((created.status, created.header("location")), (201, Some(format!("/v1/files/{ID}").as_str())));
    let status: FileStatus = created.json();
    assert_eq!((status.chunks, status.state), (4, State::Receiving));
    assert_eq!(dc.create(ID, size).await.status, 200, "a retry");

    let incomplete = dc.ask(&format!("GET /v1/files/{ID}/content"), b"").await;
    assert_eq!(incomplete.problem(), (409, "incomplete".into()));

    let chunk = |i: u64| &bytes[(i << 20) as usize..((i + 1) << 20).min(size) as usize];
    let value = |i: u64| ChainingValue::of_chunk(ChunkIndex::new(i).unwrap(), chunk(i)).unwrap().to_string();
    let pair = &bytes[..2 << 20];
    let values = format!("Chunk-Value: {}, {}\r\n", value(0), value(1));
    let put = dc.ask_with(&format!("PUT /v1/files/{ID}/chunks/0"), &values, pair).await;
    assert_eq!(put.status, 200);
    let receipt: ChunkReceipt = put.json();
    assert_eq!((receipt.values, receipt.new_chunks), (vec![value(0), value(1)], 2));

    let path = format!("GET /v1/files/{ID}?wait=complete&timeout=20");
    let waiting = dc.ask(&path, b"");
    let rest = async {
        for i in [3, 2] {
            let put = dc.ask(&format!("PUT /v1/files/{ID}/chunks/{i}"), chunk(i)).await;
            assert_eq!(put.status, 200);
        }
    };
    let (waited, ()) = tokio::join!(waiting, rest);
    let status: FileStatus = waited.json();
    let root = Root::of_bytes(&bytes).to_string();
    assert_eq!((status.state, status.root.as_deref()), (State::Assembled, Some(root.as_str())));

    let again: ChunkReceipt = dc.ask(&format!("PUT /v1/files/{ID}/chunks/2"), chunk(2)).await.json();
    assert_eq!(again.new_chunks, 0, "the same bytes get the same answer");

    let whole = dc.ask(&format!("GET /v1/files/{ID}/content"), b"").await;
    assert_eq!(whole.status, 200);
    assert!(whole.body == bytes);
    assert_eq!(whole.header("etag"), Some(format!("\"{root}\"").as_str()));
    assert_eq!(whole.header("accept-ranges"), Some("bytes"));
    assert_eq!(whole.header("content-type"), Some("application/octet-stream"));
    assert_eq!(
        whole.header("content-disposition"),
        Some("attachment; filename=\"a.bin\"; filename*=UTF-8''a.bin")
    );
    assert_eq!(whole.header("sluice-dc"), Some("dc-a"));
    let text = dc.metrics.encode().unwrap();
    assert!(text.contains(r#"sluice_chunks_total{dc="dc-a",door="http",outcome="stored"} 4"#), "{text}");
    assert!(text.contains(r#"http_route="/v1/files/{id}/chunks/{index}""#));
    assert!(!text.contains(ID), "a file id is never a label");
}

async fn uploaded(dc: &Datacenter, size: u64) -> Bytes {
    let bytes = Bytes::from(content(size));
    assert_eq!(dc.create(ID, size).await.status, 201);
    for (i, chunk) in bytes.chunks(CHUNK_LEN as usize).enumerate() {
        assert_eq!(dc.ask(&format!("PUT /v1/files/{ID}/chunks/{i}"), chunk).await.status, 200);
    }
    bytes
}

#[tokio::test]
async fn ranges_and_conditions() {
    let dc = Datacenter::start();
    let size = 2 * CHUNK_LEN + 9;
    let bytes = uploaded(&dc, size).await;
    let etag = format!("\"{}\"", Root::of_bytes(&bytes));
    let get = format!("GET /v1/files/{ID}/content");
    let ask = async |headers: &str| dc.ask_with(&get, headers, b"").await;

    let part = ask("Range: bytes=1048570-1048580\r\n").await;
    assert_eq!(part.status, 206);
    assert_eq!(part.header("content-range"), Some(format!("bytes 1048570-1048580/{size}").as_str()));
    assert_eq!(part.body, &bytes[1_048_570..=1_048_580]);
    assert_eq!(ask("Range: bytes=-9\r\n").await.body, &bytes[2 << 20..]);
    assert_eq!(ask("Range: bytes=0-1,4-5\r\n").await.status, 200, "several ranges: the whole");

    let outside = ask(&format!("Range: bytes={size}-\r\n")).await;
    assert_eq!(outside.problem(), (416, "range".into()));
    assert_eq!(outside.header("content-range"), Some(format!("bytes */{size}").as_str()));
    let known = ask(&format!("If-None-Match: {etag}\r\n")).await;
    assert_eq!((known.status, known.header("etag")), (304, Some(etag.as_str())));
    assert_eq!(ask("If-Match: \"other\"\r\n").await.problem(), (412, "precondition".into()));
    assert_eq!(ask(&format!("If-Range: {etag}\r\nRange: bytes=0-0\r\n")).await.status, 206);
    assert_eq!(ask("If-Range: \"other\"\r\nRange: bytes=0-0\r\n").await.status, 200);

    let authorization = format!("Authorization: Bearer {}\r\n", dc.token);
    let mut stream = dc.connect("http/1.1").await;
    let head = crate::client::head(&get.replace("GET", "HEAD"), &authorization, 0);
    let answer = read_all(&mut stream, &head).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(
        answer.contains(&format!("content-length: {size}\r\n")) && answer.ends_with("\r\n\r\n"),
        "{answer}"
    );
}

async fn read_all(
    stream: &mut tokio_rustls::client::TlsStream<tokio::net::TcpStream>,
    request: &str,
) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn lists_trees_and_where_am_i() {
    let dc = Datacenter::start();
    uploaded(&dc, CHUNK_LEN + 1).await;
    let other = "0293e4a0-7b1c-7def-8123-456789abcdef";
    dc.create(other, 7).await;
    let about: About = dc.ask("GET /v1", b"").await.json();
    assert_eq!((about.cluster.as_str(), about.dc.as_str()), ("test", "dc-a"));
    let page: FilePage = dc.ask("GET /v1/files?limit=1", b"").await.json();
    assert_eq!((page.files.len(), page.next.map(|id| id.to_string()).as_deref()), (1, Some(ID)));
    let page: FilePage = dc.ask(&format!("GET /v1/files?after={ID}"), b"").await.json();
    assert_eq!((page.files[0].id.to_string().as_str(), page.next), (other, None));
    let page: FilePage = dc.ask("GET /v1/files?state=assembled", b"").await.json();
    assert_eq!(page.files.len(), 1);
    let node: TreeNode = dc.ask(&format!("GET /v1/files/{ID}/tree?start=0&level=1"), b"").await.json();
    assert_eq!(node.chunk_values.len(), 2);
}

#[tokio::test]
async fn an_empty_file_is_read_and_a_deleted_one_is_gone() {
    let dc = Datacenter::start();
    assert_eq!(dc.create(ID, 0).await.status, 201);
    let empty = dc.ask(&format!("GET /v1/files/{ID}/content"), b"").await;
    assert_eq!((empty.status, empty.body.len()), (200, 0));
    let delete = format!("DELETE /v1/files/{ID}");
    assert_eq!(dc.ask(&delete, b"").await.status, 204);
    assert_eq!(dc.ask(&delete, b"").await.status, 204, "again");
    assert_eq!(dc.ask(&format!("GET /v1/files/{ID}"), b"").await.problem(), (410, "dropped".into()));
    assert_eq!(dc.create(ID, 0).await.problem(), (410, "dropped".into()));
}

#[tokio::test]
async fn the_server_names_a_file_whose_client_does_not() {
    let dc = Datacenter::start();
    let created = dc.ask("POST /v1/files", br#"{"size":1}"#).await;
    let status: FileStatus = created.json();
    assert_eq!((created.status, status.id.get_version_num()), (201, 7));
    let put = dc.ask(&format!("PUT /v1/files/{ID}/chunks/5"), &content(CHUNK_LEN)).await;
    assert_eq!(put.status, 202, "the metadata has not come yet");
    assert!(put.json::<ChunkReceipt>().provisional);
}

#[tokio::test]
async fn http_2_uploads_and_downloads() {
    let dc = Datacenter::start();
    let bytes = Bytes::from(content(CHUNK_LEN));
    dc.create(ID, CHUNK_LEN).await;
    let (mut sender, connection) = h2::client::handshake(dc.connect("h2").await).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = |method: &str, path: &str| {
        http::Request::builder()
            .method(method)
            .uri(format!("https://localhost{path}"))
            .header("authorization", format!("Bearer {}", dc.token))
    };
    let put = request("PUT", &format!("/v1/files/{ID}/chunks/0")).header("content-length", CHUNK_LEN);
    let (answer, mut body) = sender.send_request(put.body(()).unwrap(), false).unwrap();
    let mut rest = bytes.clone();
    while !rest.is_empty() {
        body.reserve_capacity(rest.len());
        let n = std::future::poll_fn(|cx| body.poll_capacity(cx)).await.unwrap().unwrap();
        let piece = rest.split_to(n.min(rest.len()));
        body.send_data(piece, rest.is_empty()).unwrap();
    }
    assert_eq!(answer.await.unwrap().status(), 200);

    sender = sender.ready().await.unwrap();
    let get = request("GET", &format!("/v1/files/{ID}/content")).body(()).unwrap();
    let (answer, _) = sender.send_request(get, true).unwrap();
    let mut body = answer.await.unwrap().into_body();
    let mut read = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece.unwrap();
        body.flow_control().release_capacity(piece.len()).unwrap();
        read.extend_from_slice(&piece);
    }
    assert!(read == bytes);

    sender = sender.ready().await.unwrap();
    let unsized_put = request("PUT", &format!("/v1/files/{ID}/chunks/0")).body(()).unwrap();
    let (answer, _open) = sender.send_request(unsized_put, false).unwrap();
    assert_eq!(answer.await.unwrap().status(), 411);

    // A client that is refused while it sends sees why.
    sender = sender.ready().await.unwrap();
    let uri = format!("https://localhost/v1/files/{ID}/chunks/0");
    let put = http::Request::put(uri).header("content-length", CHUNK_LEN).body(()).unwrap();
    let (answer, mut body) = sender.send_request(put, false).unwrap();
    body.send_data(bytes, true).unwrap();
    assert_eq!(answer.await.unwrap().status(), 401);
    drop(sender);
    driver.abort();
}

#[tokio::test]
async fn a_size_may_be_settled_later_and_only_once() {
    let dc = Datacenter::start();
    let bytes = content(CHUNK_LEN + 5);
    let open = format!(r#"{{"id":"{ID}","name":"stream"}}"#);
    let settle = async |body: &str| dc.ask(&format!("PATCH /v1/files/{ID}"), body.as_bytes()).await;
    assert_eq!(settle(r#"{"size":5}"#).await.problem(), (404, "not-found".into()));
    let created = dc.ask("POST /v1/files", open.as_bytes()).await;
    assert_eq!(created.status, 201);
    assert!(String::from_utf8_lossy(&created.body).contains(r#""size":null"#), "said, not left out");
    let put =
        async |index: u64, bytes: &[u8]| dc.ask(&format!("PUT /v1/files/{ID}/chunks/{index}"), bytes).await;
    let (full, rest) = bytes.split_at(CHUNK_LEN as usize);
    assert_eq!(put(1, rest).await.problem(), (409, "size-open".into()));
    assert_eq!(put(0, full).await.status, 200);
    for body in ["", "{}", r#"{"size":null}"#, r#"{"size":-1}"#, "[5]", r#"{"size":5,"name":"x"}"#] {
        assert_eq!(settle(body).await.problem(), (400, "invalid-metadata".into()), "{body}");
    }
    assert_eq!(settle(r#"{"size":99999999999999999}"#).await.problem(), (413, "too-large".into()));
    let body = format!(r#"{{"size":{}}}"#, bytes.len());
    for _ in 0..2 {
        let settled = settle(&body).await;
        assert_eq!((settled.status, settled.json::<FileStatus>().size), (200, Some(bytes.len() as u64)));
    }
    assert_eq!(settle(r#"{"size":7}"#).await.problem(), (409, "size-conflict".into()));
    assert_eq!(put(1, &rest[1..]).await.problem(), (400, "chunk-length".into()));
    assert_eq!(put(1, rest).await.status, 200);
    let status: FileStatus = dc.ask(&format!("GET /v1/files/{ID}"), b"").await.json();
    assert_eq!((status.state, status.root), (State::Assembled, Some(Root::of_bytes(&bytes).to_string())));
    assert!(dc.ask(&format!("GET /v1/files/{ID}/content"), b"").await.body == bytes);
}
