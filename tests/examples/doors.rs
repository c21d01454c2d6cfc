//! What a byte costs the server through each door: CPU seconds per GiB of HTTP/1.1 PUTs and of gRPC streams, side by
//! side, against a `sluice dev` that runs already. Only the ratio counts.
//!
//! ```sh
//! . data/env && cargo run --release -p sluice-tests --example doors -- PID [MIB] [ROUNDS]
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::try_join_all;
use hyper_util::rt::TokioIo;
use sluice_node::tls;
use sluice_proto::ingest::ingest_client::IngestClient;
use sluice_proto::ingest::upload_response::Answer;
use sluice_proto::ingest::{Begin, CreateRequest, DeleteRequest, UploadRequest};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Connections at once, through either door.
const CONNECTIONS: u64 = 4;

/// Bytes of a run: 8 chunks.
const RUN: u64 = 8 << 20;

/// Bytes of a piece on a stream.
const PIECE: usize = 128 << 10;

struct Server {
    url: String,
    token: String,
    ca: CertificateDer<'static>,
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let pid: u32 = args.next().ok_or("the server's process id is missing")?.parse()?;
    let mib: u64 = args.next().map_or(Ok(1024), |mib| mib.parse())?;
    let rounds: usize = args.next().map_or(Ok(5), |rounds| rounds.parse())?;
    let variable = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set: . DIR/env"));
    let url = variable("SLUICE_URL")?.split(',').next().unwrap_or_default().to_owned();
    let token = std::fs::read_to_string(variable("SLUICE_TOKEN_FILE")?)?.trim().to_owned();
    let ca = CertificateDer::from_pem_file(variable("SLUICE_CA")?)?;
    tls::install_provider();
    let server = Server { url, token, ca };
    let data = Bytes::from(noise());
    let runs = mib * (1 << 20) / RUN;
    let gib = (runs * RUN) as f64 / f64::from(1 << 30);
    let mut ratios = Vec::new();
    for round in 0..rounds {
        let (before, began) = (cpu(pid)?, Instant::now());
        http(&server, &data, runs).await?;
        let (between, at_http) = (cpu(pid)?, began.elapsed());
        let began = Instant::now();
        grpc(&server, &data, runs).await?;
        let (after, at_grpc) = (cpu(pid)?, began.elapsed());
        let (http, grpc) = ((between - before) / gib, (after - between) / gib);
        println!(
            "round {round}: HTTP/1.1 {http:.2} CPU-s/GiB in {at_http:.1?}, gRPC {grpc:.2} in {at_grpc:.1?}, ratio {:.2}",
            grpc / http
        );
        ratios.push(grpc / http);
    }
    ratios.sort_by(f64::total_cmp);
    println!("gRPC costs {:.2} times what HTTP/1.1 costs (median)", ratios[ratios.len() / 2]);
    Ok(())
}

fn noise() -> Vec<u8> {
    let mut bytes = vec![0; RUN as usize];
    blake3::Hasher::new_derive_key("sluice doors noise").finalize_xof().fill(&mut bytes);
    bytes
}

/// User and system time of a process, in seconds. The kernel counts them in hundredths.
fn cpu(pid: u32) -> Result<f64, Failure> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|field| field.parse::<f64>().ok()).ok_or("no such field");
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}

/// The runs of each connection.
fn parts(runs: u64) -> impl Iterator<Item = Vec<u64>> {
    (0..CONNECTIONS).map(move |part| (part..runs).step_by(CONNECTIONS as usize).collect())
}

async fn http(server: &Server, data: &Bytes, runs: u64) -> Result<(), Failure> {
    let id = create(server, runs).await?;
    let uploads = parts(runs).map(|part| {
        let (data, id) = (data.clone(), id.clone());
        async move {
            let tls = tls::edge_client(std::slice::from_ref(&server.ca), &[b"http/1.1"])?;
            let client = reqwest::Client::builder().tls_backend_preconfigured(tls).no_proxy().build()?;
            for run in part {
                let url = format!("{}/v1/files/{id}/chunks/{}", server.url, run * 8);
                let request = client.put(url).bearer_auth(&server.token).body(data.clone());
                request.send().await?.error_for_status()?;
            }
            Ok::<_, Failure>(())
        }
    });
    try_join_all(uploads).await?;
    remove(server, id).await
}

async fn grpc(server: &Server, data: &Bytes, runs: u64) -> Result<(), Failure> {
    let id = create(server, runs).await?;
    try_join_all(parts(runs).map(|part| stream(server, data.clone(), id.clone(), part))).await?;
    remove(server, id).await
}

async fn channel(server: &Server) -> Result<Channel, Failure> {
    let tls = Arc::new(tls::edge_client(std::slice::from_ref(&server.ca), &[b"h2"])?);
    let address = server.url.trim_start_matches("https://").to_owned();
    let connector = tower::service_fn(move |_| {
        let (tls, address) = (tls.clone(), address.clone());
        async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
            Ok::<_, std::io::Error>(TokioIo::new(TlsConnector::from(tls).connect(name, stream).await?))
        }
    });
    Ok(Endpoint::from_static("http://localhost").connect_with_connector(connector).await?)
}

fn authorized<T>(server: &Server, message: T) -> Result<tonic::Request<T>, Failure> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {}", server.token).parse()?);
    Ok(request)
}

async fn create(server: &Server, runs: u64) -> Result<String, Failure> {
    let id = Uuid::now_v7().to_string();
    let file = CreateRequest { id: id.clone(), size: Some(runs * RUN), ..CreateRequest::default() };
    IngestClient::new(channel(server).await?).create(authorized(server, file)?).await?;
    Ok(id)
}

async fn remove(server: &Server, id: String) -> Result<(), Failure> {
    let request = authorized(server, DeleteRequest { id })?;
    IngestClient::new(channel(server).await?).delete(request).await?;
    Ok(())
}

/// Sends runs over one stream, as they are granted.
async fn stream(server: &Server, data: Bytes, id: String, mut part: Vec<u64>) -> Result<(), Failure> {
    let (requests, receiver) = mpsc::channel(64);
    let mut client = IngestClient::new(channel(server).await?);
    let request = authorized(server, ReceiverStream::new(receiver))?;
    let mut answers = client.upload(request).await?.into_inner();
    let first = answers.message().await?.and_then(|answer| answer.answer);
    let Some(Answer::Terms(terms)) = first else { return Err("no terms came".into()) };
    let mut open = BTreeMap::<u64, (Bytes, u64)>::new();
    let mut number = 0;
    while !part.is_empty() || !open.is_empty() {
        // As much at once as a client has that sends one run after the other, and one to hide the sync.
        while open.len() < 2
            && let Some(run) = part.pop()
        {
            number += 1;
            let begin = Begin { id: id.clone(), start: run * 8, length: RUN, values: Bytes::new() };
            requests.send(UploadRequest { run: number, begin: Some(begin), data: Bytes::new() }).await?;
            open.insert(number, (data.clone(), terms.credit.into()));
        }
        for (run, (rest, credit)) in &mut open {
            while !rest.is_empty() && *credit >= PIECE as u64 {
                *credit -= PIECE as u64;
                let data = rest.split_to(PIECE);
                requests.send(UploadRequest { run: *run, begin: None, data }).await?;
            }
        }
        match answers.message().await?.and_then(|answer| answer.answer) {
            Some(Answer::Grant(grant)) => {
                if let Some((_, credit)) = open.get_mut(&grant.run) {
                    *credit += grant.bytes;
                }
            }
            Some(Answer::Stored(stored)) => drop(open.remove(&stored.run)),
            other => return Err(format!("unexpected: {other:?}").into()),
        }
    }
    Ok(())
}
