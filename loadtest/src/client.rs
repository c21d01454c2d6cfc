//! A lean client: one TLS connection, HTTP/1.1 or HTTP/2, requests one after the other or at once. It speaks to Sluice
//! and to its peers alike, so that what differs between them is the server.
//!
//! The connection is driven by a task that ends with it.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sluice_proto::http::{CreateFile, FileStatus};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Bytes that may be on their way on an HTTP/2 stream or connection, towards us.
pub(crate) const WINDOW: u32 = 4 << 20;

/// What is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Door {
    /// HTTP/1.1: a connection for each request at once.
    #[default]
    Http1,
    /// HTTP/2: one connection to each datacenter.
    Http2,
    /// gRPC: a stream of runs for every sixteen requests at once.
    Grpc,
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http1 => "HTTP/1.1",
            Self::Http2 => "HTTP/2",
            Self::Grpc => "gRPC",
        })
    }
}

/// A server, and what it takes to speak to it.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    name: ServerName<'static>,
    tls: TlsConnector,
    door: Door,
    pub(crate) token: Option<String>,
}

type RequestBody = BoxBody<Bytes, std::convert::Infallible>;

/// A connection to a server.
pub(crate) struct Connection {
    sender: Sender,
    target: Target,
}

enum Sender {
    One(http1::SendRequest<RequestBody>),
    Two(http2::SendRequest<RequestBody>),
}

impl Target {
    /// A server at an address, under a certificate that `ca_pem` vouches for.
    pub(crate) fn new(
        address: SocketAddr,
        name: &str,
        ca_pem: &[u8],
        door: Door,
        token: Option<&str>,
    ) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca_pem).context("the CA is no PEM")?)?;
        // One cipher for everybody: servers differ in which they would choose.
        let cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
        let provider = CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() };
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = match door {
            Door::Http1 => vec![b"http/1.1".to_vec()],
            Door::Http2 | Door::Grpc => vec![b"h2".to_vec()],
        };
        let name = ServerName::try_from(name.to_owned())?;
        let token = token.map(|token| format!("Bearer {token}"));
        Ok(Self { address, name, tls: TlsConnector::from(Arc::new(config)), door, token })
    }

    /// Opens a TLS connection, and says nothing on it.
    pub(crate) async fn open(&self) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        self.tls.connect(self.name.clone(), stream).await
    }

    /// Opens a connection.
    pub(crate) async fn connect(&self) -> anyhow::Result<Connection> {
        let io = TokioIo::new(self.open().await.with_context(|| format!("cannot reach {}", self.address))?);
        let sender = match self.door {
            Door::Http1 => {
                let (sender, connection) = http1::handshake(io).await?;
                tokio::spawn(connection);
                Sender::One(sender)
            }
            Door::Http2 | Door::Grpc => {
                let mut builder = http2::Builder::new(TokioExecutor::new());
                builder.initial_stream_window_size(WINDOW).initial_connection_window_size(WINDOW);
                let (sender, connection) = builder.handshake(io).await?;
                tokio::spawn(connection);
                Sender::Two(sender)
            }
        };
        Ok(Connection { sender, target: self.clone() })
    }

    /// Opens as many connections as requests are made at once.
    pub(crate) async fn lanes(&self, count: usize) -> anyhow::Result<Vec<Connection>> {
        let mut lanes = vec![self.connect().await?];
        while lanes.len() < count {
            let lane = match &lanes[0].sender {
                Sender::One(_) => self.connect().await?,
                Sender::Two(sender) => {
                    Connection { sender: Sender::Two(sender.clone()), target: self.clone() }
                }
            };
            lanes.push(lane);
        }
        Ok(lanes)
    }
}

impl Connection {
    async fn send(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(header::HeaderName, String)],
        body: RequestBody,
    ) -> anyhow::Result<Response<Incoming>> {
        let uri = match self.sender {
            Sender::One(_) => path.to_owned(),
            Sender::Two(_) => format!("https://{}{path}", self.target.address),
        };
        let mut request = Request::builder().method(method).uri(uri);
        if matches!(self.sender, Sender::One(_)) {
            request = request.header(header::HOST, self.target.address.to_string());
        }
        if let Some(token) = &self.target.token {
            request = request.header(header::AUTHORIZATION, token);
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(body)?;
        let response = match &mut self.sender {
            Sender::One(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Sender::Two(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        };
        response.with_context(|| format!("{method} {path} at {}", self.target.address))
    }

    /// Sends a request with a body, and awaits a 2xx and its body.
    pub(crate) async fn put<B>(&mut self, method: &str, path: &str, body: B) -> anyhow::Result<Bytes>
    where
        B: http_body::Body<Data = Bytes, Error = std::convert::Infallible> + Send + Sync + 'static,
    {
        let kind = [(header::CONTENT_TYPE, "application/octet-stream".to_owned())];
        let response = self.send(method, path, &kind, body.boxed()).await?;
        read(method, path, response).await
    }

    /// Creates a file whose bytes are the body.
    pub(crate) async fn create<B>(&mut self, file: &CreateFile, body: B) -> anyhow::Result<FileStatus>
    where
        B: http_body::Body<Data = Bytes, Error = std::convert::Infallible> + Send + Sync + 'static,
    {
        let said = [
            (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
            (header::HeaderName::from_static("file-metadata"), serde_json::to_string(file)?),
        ];
        let response = self.send("POST", "/v1/files", &said, body.boxed()).await?;
        Ok(serde_json::from_slice(&read("POST", "/v1/files", response).await?)?)
    }

    /// Sends and awaits JSON.
    pub(crate) async fn json<T: DeserializeOwned>(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<T> {
        let kind = [(header::CONTENT_TYPE, "application/json".to_owned())];
        let body = match body {
            Some(body) => Full::new(Bytes::from(serde_json::to_vec(body)?)).boxed(),
            None => Empty::new().boxed(),
        };
        let response = self.send(method, path, &kind, body).await?;
        Ok(serde_json::from_slice(&read(method, path, response).await?)?)
    }

    /// Asks to remove something.
    pub(crate) async fn delete(&mut self, path: &str) -> anyhow::Result<()> {
        let response = self.send("DELETE", path, &[], Empty::new().boxed()).await?;
        read("DELETE", path, response).await.map(|_| ())
    }

    /// Reads a range, gives each piece to `take`, and answers how many bytes came.
    pub(crate) async fn get(
        &mut self,
        path: &str,
        range: std::ops::Range<u64>,
        mut take: impl FnMut(&[u8]),
    ) -> anyhow::Result<u64> {
        let asked = [(header::RANGE, format!("bytes={}-{}", range.start, range.end - 1))];
        let response = self.send("GET", path, &asked, Empty::new().boxed()).await?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            let status = response.status();
            let body = read("GET", path, response).await?;
            bail!("GET {path}: {status} with {} bytes, expected a part", body.len());
        }
        let mut body = response.into_body();
        let mut len = 0;
        while let Some(frame) = body.frame().await {
            if let Ok(data) =
                frame.with_context(|| format!("GET {path} broke off after {len} bytes"))?.into_data()
            {
                take(&data);
                len += data.len() as u64;
            }
        }
        Ok(len)
    }
}

async fn read(method: &str, path: &str, response: Response<Incoming>) -> anyhow::Result<Bytes> {
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    if !status.is_success() {
        bail!("{method} {path}: {status}: {}", String::from_utf8_lossy(&body));
    }
    Ok(body)
}
