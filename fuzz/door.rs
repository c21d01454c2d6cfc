//! Requests that are not quite HTTP, or not quite this API: each gets an answer that names what is wrong, and the
//! datacenter goes on.

use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use bolero::TypeGenerator;
use bytes::Bytes;
use sluice_node::tls;
use sluice_proto::problem::Problem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use uuid::Uuid;

use crate::bed::{A, Bed, TENANT, noise};
use crate::times;

const METHODS: [&str; 8] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"];
const NAMES: [&str; 12] = [
    "Chunk-Value",
    "Range",
    "If-Match",
    "If-None-Match",
    "If-Range",
    "Content-Type",
    "Expect",
    "traceparent",
    "sluice-context",
    "Transfer-Encoding",
    "Host",
    "Accept",
];
const VALUES: [&str; 14] = [
    "bytes=0-9",
    "bytes=-1",
    "bytes=5-2,9-",
    "bytes=18446744073709551615-",
    "*",
    "\"x\"",
    "W/\"x\"",
    "application/json",
    "chunked",
    "100-continue",
    "00",
    "0,0",
    "text/plain; charset=\u{7f}",
    "",
];
const PIECES: [&str; 20] = [
    "v1",
    "files",
    "chunks",
    "content",
    "tree",
    "0",
    "1",
    "-1",
    "18446744073709551615",
    "36507222016",
    "..",
    "%2e",
    "%00",
    "%ff",
    "?wait=complete&timeout=0",
    "?start=0&level=0",
    "?start=x",
    "?limit=0&after=y",
    "?state=",
    "",
];

#[derive(Clone, Debug, TypeGenerator)]
enum Place {
    /// One of the routes, with the file that is there.
    Route(u8),
    /// A path of pieces.
    Pieces(Vec<u8>),
    /// Anything at all.
    Noise(Vec<u8>),
}

#[derive(Clone, Debug, TypeGenerator)]
enum Length {
    Right,
    None,
    Says(u32),
    Noise(Vec<u8>),
}

#[derive(Clone, Debug, TypeGenerator)]
enum Body {
    Chunk,
    Json(u8),
    Noise(Vec<u8>),
}

#[derive(Clone, Debug, TypeGenerator)]
struct Request {
    method: u8,
    place: Place,
    token: u8,
    headers: Vec<(u8, u8)>,
    strange: Option<Vec<u8>>,
    length: Length,
    body: Body,
}

struct World {
    bed: Bed,
    runtime: Runtime,
    tls: TlsConnector,
    token: String,
    file: Uuid,
    bytes: Bytes,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (bed, file, bytes) = runtime.block_on(async {
        let bed = Bed::start(1).await;
        let bytes = noise(99, 100);
        let file = bed.create(A, bytes.len()).await;
        bed.put_ok(A, file, 0, bytes.clone()).await;
        (bed, file, bytes)
    });
    let config = tls::edge_client(&bed.cluster.material().cas(), &[b"http/1.1"]).unwrap();
    let token = bed.web.token(TENANT);
    World { tls: TlsConnector::from(std::sync::Arc::new(config)), bed, runtime, token, file, bytes }
});

impl Request {
    fn bytes(&self, world: &World) -> Vec<u8> {
        let pick = |list: &'static [&'static str], i: u8| list[usize::from(i) % list.len()];
        let mut out = pick(&METHODS, self.method).as_bytes().to_vec();
        out.push(b' ');
        let file = world.file;
        match &self.place {
            Place::Route(route) => {
                let path = match route % 7 {
                    0 => "/v1".to_owned(),
                    1 => "/v1/files".to_owned(),
                    2 => format!("/v1/files/{file}"),
                    3 => format!("/v1/files/{file}/chunks/{}", route / 7 % 3),
                    4 => format!("/v1/files/{file}/content"),
                    5 => format!("/v1/files/{file}/tree?start={}&level={}", route / 7 % 3, route / 21),
                    _ => format!("/v1/files/{}", Uuid::from_u128(u128::from(*route))),
                };
                out.extend_from_slice(path.as_bytes());
            }
            Place::Pieces(pieces) => {
                for piece in pieces.iter().take(8) {
                    out.push(b'/');
                    out.extend_from_slice(pick(&PIECES, *piece).as_bytes());
                }
            }
            Place::Noise(noise) => out.extend_from_slice(noise),
        }
        out.extend_from_slice(b" HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n");
        match self.token % 8 {
            0 => {}
            1 => out.extend_from_slice(b"Authorization: Bearer x.y.z\r\n"),
            2 => out.extend_from_slice(b"Authorization: Basic eDp5\r\n"),
            _ => out.extend_from_slice(format!("Authorization: Bearer {}\r\n", world.token).as_bytes()),
        }
        for (name, value) in self.headers.iter().take(6) {
            out.extend_from_slice(
                format!("{}: {}\r\n", pick(&NAMES, *name), pick(&VALUES, *value)).as_bytes(),
            );
        }
        if let Some(strange) = &self.strange {
            out.extend_from_slice(b"X-Strange: ");
            out.extend_from_slice(strange);
            out.extend_from_slice(b"\r\n");
        }
        let body = match &self.body {
            Body::Chunk => world.bytes.to_vec(),
            Body::Json(0..=40) => format!(r#"{{"id":"{file}","size":100}}"#).into_bytes(),
            Body::Json(41..=80) => br#"{"size":-1,"name":"\u0000"}"#.to_vec(),
            Body::Json(81..=120) => br#"{"size":18446744073709551615,"home":"nowhere"}"#.to_vec(),
            Body::Json(121..=160) => [&b"["[..]; 3000].concat(),
            Body::Json(_) => br#"{"size":5,"metadata":{"":"x"},"unknown":1}"#.to_vec(),
            Body::Noise(noise) => noise.clone(),
        };
        match &self.length {
            Length::Right => out.extend_from_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes()),
            Length::None => {}
            Length::Says(len) => out.extend_from_slice(format!("Content-Length: {len}\r\n").as_bytes()),
            Length::Noise(noise) => {
                out.extend_from_slice(b"Content-Length: ");
                out.extend_from_slice(noise);
                out.extend_from_slice(b"\r\n");
            }
        }
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(&body);
        out
    }
}

/// What came back until the other side closed.
async fn ask(world: &World, request: &[u8]) -> Vec<u8> {
    let address = world.bed.cluster.config(A).unwrap().ports.edge.address();
    let name = ServerName::try_from(world.bed.cluster.material().edge_tls_name()).unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let mut stream = world.tls.connect(name, stream).await.unwrap();
    // A refusal may come, and the connection close, before all of it is written.
    let _ = stream.write_all(request).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    answer
}

#[test]
fn requests() {
    static SEEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    bolero::check!().with_type::<Request>().with_iterations(times(2_000)).for_each(|request| {
        let world = &*WORLD;
        let bytes = request.bytes(world);
        let answer = world.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(60), ask(world, &bytes))
                .await
                .expect("no answer, no end")
        });
        let Some(head) = answer.windows(4).position(|four| four == b"\r\n\r\n") else {
            // Not HTTP at all, or it ended in the middle of the head.
            assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
            return;
        };
        let text = String::from_utf8_lossy(&answer[..head]).into_owned();
        let status: u16 = text[9..12].parse().unwrap();
        assert!(status != 500, "{text}");
        SEEN.lock().unwrap().insert(status);
        let lower = text.to_lowercase();
        if status >= 400 && lower.contains("sluice-dc:") && !text.contains("\r\nallow") {
            assert!(lower.contains("application/problem+json"), "{text}");
            let body = String::from_utf8_lossy(&answer[head + 4..]).into_owned();
            if !body.is_empty() {
                let json: serde_json::Value = serde_json::from_str(&body).unwrap();
                let code = json["type"].as_str().unwrap().rsplit('/').next().unwrap();
                assert!(Problem::from_code(code).is_some(), "{body}");
                assert!(!json["detail"].as_str().unwrap().is_empty(), "{body}");
            }
        }
    });
    // The inputs reach what they are for: some of them are right, and the others wrong in different ways.
    let seen = SEEN.lock().unwrap().clone();
    assert!([200, 400, 401, 404, 405].iter().all(|status| seen.contains(status)), "{seen:?}");
    let world = &*WORLD;
    // All of it left no trace: the file is there unless somebody deleted it, and others can come.
    world.runtime.block_on(async {
        let before = world.bed.get(A, &format!("/files/{}", world.file), &[]).await;
        assert!([200, 410].contains(&before.status.as_u16()), "{before:?}");
        let bytes = noise(7, 3000);
        let id = world.bed.create(A, bytes.len()).await;
        world.bed.put_ok(A, id, 0, bytes.clone()).await;
        let content = world.bed.readable(A, id).await;
        assert_eq!(content.root.unwrap(), blake3::hash(&bytes).to_string());
        assert_eq!(world.bed.metric(A, "sluice_integrity_failures_total", "").await, 0.0);
    });
}
