//! What connections cost a server that is a process of its own: idle ones, silent ones, slow ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use sluice_node::descriptors::raise_descriptors;
use sluice_node::tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::Home;
use crate::cluster::Dev;

/// How many connections there are at once. By hand: `SLUICE_CONNECTIONS=5000`, with `--release`.
fn connections() -> usize {
    std::env::var("SLUICE_CONNECTIONS").map_or(400, |count| count.parse().unwrap())
}

/// A server and its clients.
struct Server {
    dev: Dev,
    address: String,
    admin: String,
    ca: CertificateDer<'static>,
}

impl Server {
    fn start(home: &Home) -> Self {
        raise_descriptors();
        let dev = Dev::start(home, &[]);
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let dc = &dev.said["dcs"][0];
        let address = text(&dc["url"]).replace("https://", "");
        let admin = text(&dc["admin"]).replace("http://", "");
        let ca = CertificateDer::from_pem_file(text(&dev.said["ca"])).unwrap();
        Self { dev, address, admin, ca }
    }

    async fn connect(&self, alpn: &[u8]) -> TlsStream<TcpStream> {
        let mut config = tls::edge_client(std::slice::from_ref(&self.ca), &[alpn]).unwrap();
        config.resumption = rustls::client::Resumption::disabled();
        let stream = TcpStream::connect(&self.address).await.unwrap();
        let name = ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    /// One that has asked something, over HTTP/1.1.
    async fn asked(&self) -> TlsStream<TcpStream> {
        let mut stream = self.connect(b"http/1.1").await;
        stream.write_all(b"GET /v1 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut piece = [0; 1024];
            let n = stream.read(&mut piece).await.unwrap();
            assert!(n > 0, "{}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&piece[..n]);
        }
        assert!(answer.starts_with(b"HTTP/1.1 401"));
        stream
    }

    /// One that has exchanged settings, over HTTP/2.
    async fn settled(&self) -> TlsStream<TcpStream> {
        let mut stream = self.connect(b"h2").await;
        // The preface, settings, a ping.
        let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        hello.extend_from_slice(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
        hello.extend_from_slice(&[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        stream.write_all(&hello).await.unwrap();
        let mut answer = Vec::new();
        while !answer.windows(8).any(|window| window == [1, 2, 3, 4, 5, 6, 7, 8]) {
            let mut piece = [0; 1024];
            let n = stream.read(&mut piece).await.unwrap();
            assert!(n > 0, "{answer:?}");
            answer.extend_from_slice(&piece[..n]);
        }
        stream
    }

    /// Bytes of memory that the server has of its own.
    fn memory(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.dev.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    /// Client connections that the server has open.
    async fn open(&self) -> usize {
        let mut stream = TcpStream::connect(&self.admin).await.unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let line = text.lines().find(|line| line.starts_with("sluice_connections")).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    async fn until_open(&self, count: usize) {
        let waited = tokio::time::timeout(Duration::from_secs(60), async {
            while self.open().await != count {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(waited.await.is_ok(), "{} are open, expected {count}", self.open().await);
    }
}

/// Bytes for each connection of a kind, which stay open while they are counted. Each kind has a server of its own: what
/// memory the allocator keeps of one kind is there for the next.
async fn cost(what: &str, connect: impl AsyncFn(&Server) -> TlsStream<TcpStream>) -> usize {
    let home = Home::new(None);
    let server = Server::start(&home);
    // What the first ones bring about stays, and is not theirs.
    let warm = [connect(&server).await, connect(&server).await];
    drop(warm);
    server.until_open(0).await;
    let before = server.memory();
    let mut open = Vec::new();
    for _ in 0..connections() {
        open.push(connect(&server).await);
    }
    // Some may be closed as idle meanwhile, when there are very many.
    let count = server.open().await;
    let each = server.memory().saturating_sub(before) / count;
    println!("{count} idle connections, {what}: {:.1} KiB each", each as f64 / 1024.0);
    drop(open);
    server.until_open(0).await;
    each
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_cost_little_memory() {
    let silent = cost("silent after TLS", async |server| server.connect(b"http/1.1").await).await;
    let asked = cost("HTTP/1.1 after a request", Server::asked).await;
    let settled = cost("HTTP/2", Server::settled).await;
    // Few connections carry the allocator's slack, too; what thousands cost each is in ARCHITECTURE.md.
    for each in [silent, asked, settled] {
        assert!(each < 64 << 10, "{each} bytes");
    }
}

/// How long honest requests take, one after the other on new connections: the median and the slowest of a hundred.
async fn honest(server: &Server) -> (Duration, Duration) {
    let mut times = Vec::new();
    for _ in 0..100 {
        let began = Instant::now();
        drop(server.asked().await);
        times.push(began.elapsed());
    }
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() - 1])
}

/// Fault 41 at full size: thousands that are silent before TLS, silent after it, or send a byte a second.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: cargo test --release -p sluice --test cli -- --ignored --nocapture thousands"]
async fn thousands_that_say_nothing_or_little_cost_little_and_are_sent_away() {
    let home = Home::new(None);
    let server = Arc::new(Server::start(&home));
    let count = std::env::var("SLUICE_CONNECTIONS").map_or(10_000, |count| count.parse().unwrap());
    let alone = honest(&server).await;
    server.until_open(0).await;
    let before = server.memory();
    let mut raw = Vec::new();
    let mut silent = Vec::new();
    let mut slow = tokio::task::JoinSet::new();
    for i in 0..count {
        match i % 3 {
            0 => raw.push(TcpStream::connect(&server.address).await.unwrap()),
            1 => silent.push(server.connect(b"h2").await),
            _ => {
                let mut stream = server.connect(b"http/1.1").await;
                slow.spawn(async move {
                    for byte in b"GET /v1 HTTP/1.1\r\nHost: x\r\nX: ".iter().chain(std::iter::repeat(&b'x')) {
                        // The pace of the attack, which no result depends on.
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        if stream.write_all(&[*byte]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
    }
    let open = server.open().await;
    let each = server.memory().saturating_sub(before) / open.max(1);
    let beside = honest(&server).await;
    println!("{open} of {count} are open, at {:.1} KiB each", each as f64 / 1024.0);
    println!("honest requests, median and slowest of 100: alone {alone:.2?}, beside them {beside:.2?}");
    assert!(each < 64 << 10, "{each} bytes");
    server.until_open(0).await;
    while slow.join_next().await.is_some() {}
    let after = server.memory().saturating_sub(before);
    println!("all were sent away; {} KiB more than before", after >> 10);
    assert_eq!(server.asked().await.get_ref().0.peer_addr().unwrap().to_string(), server.address);
}
