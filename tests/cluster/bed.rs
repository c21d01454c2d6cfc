//! What tests stand on: a cluster in a temporary directory, clients for it, and plain HTTP requests.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use sluice::cluster::{Cluster, ClusterConfig};
use sluice::datacenter::DatacenterSettings;
use sluice_client::{
    Client, ClientConfig, DownloadOptions, Order, SharedObserver, Source, Target, Token, UploadOptions,
    Uploaded, WaitFor, unobserved,
};
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::{ChunkHasher, Root};
use sluice_engine::ids::{ClientFileId, DcId, FileId, TenantId};
use sluice_engine::share::Shares;
use sluice_node::clock::{Clock, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::tls;
use sluice_node::token::TokenGrant;
use sluice_proto::http::{ChunkReceipt, CreateFile, FileStatus, ProblemDetails, State};
use tempfile::TempDir;
use tokio::sync::watch;
use uuid::Uuid;

use crate::wire::Wire;

pub(crate) const A: DcId = DcId::new(1);
pub(crate) const B: DcId = DcId::new(2);
pub(crate) const C: DcId = DcId::new(3);

pub(crate) const MIB: usize = 1 << 20;

/// The tenant of every request that names no other.
pub(crate) const TENANT: TenantId = TenantId::new(7);

/// Somebody else.
pub(crate) const STRANGER: TenantId = TenantId::new(8);

/// How long anything may take. Two cores may be busy with all tests at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Into how many shares the slots of every cluster here are divided: `SLUICE_TEST_SHARES`, or one.
fn shares() -> Shares {
    let count = std::env::var("SLUICE_TEST_SHARES").map_or(1, |count| count.parse().unwrap());
    Shares::new(count).unwrap()
}

/// A cluster in a directory of its own.
pub(crate) struct Bed {
    pub(crate) cluster: Cluster,
    pub(crate) web: Web,
    #[allow(dead_code, reason = "held for its drop")]
    dir: TempDir,
}

/// What is needed to talk to a cluster, whatever happens to its datacenters meanwhile.
#[derive(Clone)]
pub(crate) struct Web {
    http: reqwest::Client,
    material: ClusterMaterial,
    edges: BTreeMap<DcId, String>,
    admins: BTreeMap<DcId, String>,
}

impl Deref for Bed {
    type Target = Web;

    fn deref(&self) -> &Web {
        &self.web
    }
}

/// The answer to a plain request.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    /// The code of the problem that it is.
    pub(crate) fn problem(&self) -> String {
        let details: ProblemDetails = serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{}: {error}: {:?}", self.status, self.body));
        details.code().to_owned()
    }

    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{}: {error}: {:?}", self.status, self.body))
    }
}

impl Bed {
    /// A running cluster of dc-a, dc-b and so on.
    pub(crate) async fn start(dcs: u16) -> Self {
        let mut bed = Self::reserve(dcs, DatacenterSettings::default());
        for dc in 1..=dcs {
            bed.cluster.start(DcId::new(dc)).await.unwrap();
        }
        bed
    }

    /// A cluster of which nothing runs yet.
    pub(crate) fn reserve(dcs: u16, settings: DatacenterSettings) -> Self {
        Self::divided(dcs, settings, shares())
    }

    /// The same whose slots are divided into so many shares.
    pub(crate) fn divided(dcs: u16, settings: DatacenterSettings, shares: Shares) -> Self {
        let names = ["dc-a", "dc-b", "dc-c", "dc-d"];
        let dcs: Vec<(DcId, &str)> = (1..=dcs).map(DcId::new).zip(names).collect();
        Self::of(ClusterMaterial::generate("test", &dcs).unwrap().dividing(shares), settings)
    }

    /// The same of this material.
    pub(crate) fn of(material: ClusterMaterial, settings: DatacenterSettings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut tls = tls::edge_client(&material.cas(), &[b"http/1.1"]).unwrap();
        // Connections are many and short: what a ticket saves is not worth its lock.
        tls.resumption = tokio_rustls::rustls::client::Resumption::disabled();
        let http = reqwest::Client::builder().tls_backend_preconfigured(tls).no_proxy().build().unwrap();
        let config = ClusterConfig { settings, ..ClusterConfig::new(material.clone(), dir.path()) };
        let cluster = Cluster::new(config).unwrap();
        let edges = cluster.dcs().map(|dc| (dc.dc, dc.url())).collect();
        let admins = cluster.dcs().map(|dc| (dc.dc, dc.admin_url())).collect();
        Self { cluster, web: Web { http, material, edges, admins }, dir }
    }

    /// Puts a wire that can be cut where `from`, which has not started yet, dials `to`.
    pub(crate) async fn wire(&mut self, from: DcId, to: DcId) -> Wire {
        let wire = Wire::to(self.cluster.config(to).unwrap().ports.peer.address()).await;
        let peers = &mut self.cluster.config_mut(from).unwrap().peers;
        peers.iter_mut().find(|peer| peer.dc == to).unwrap().address = wire.address.to_string();
        wire
    }

    /// Name of a file inside the cluster.
    pub(crate) fn file_id(id: Uuid) -> FileId {
        FileId::derive(TENANT, ClientFileId::new(id))
    }

    /// The first segment of a file's bytes, on the disk of a datacenter.
    pub(crate) fn data_file(&self, dc: DcId, id: Uuid) -> PathBuf {
        let file = Self::file_id(id);
        let slot = format!("{:03x}", file.slot().number());
        let directory = self.cluster.config(dc).unwrap().place.directory().unwrap();
        directory.join("chunks").join(slot).join(file.to_string()).join("data-0")
    }
}

impl Web {
    pub(crate) fn url(&self, dc: DcId) -> &str {
        &self.edges[&dc]
    }

    pub(crate) fn token(&self, tenant: TenantId) -> String {
        self.mint(&TokenGrant::everything(tenant, "test", Duration::from_secs(3600)))
    }

    pub(crate) fn mint(&self, grant: &TokenGrant) -> String {
        self.material.token_mint().unwrap().mint(grant, SystemClock.now()).unwrap()
    }

    pub(crate) fn material(&self) -> &ClusterMaterial {
        &self.material
    }

    /// Whom to trust.
    pub(crate) fn ca_pem(&self) -> String {
        self.material.ca_pem()
    }

    /// A client of these datacenters, in this order.
    pub(crate) fn client(&self, dcs: &[DcId]) -> Client {
        self.client_with(dcs, |_| {})
    }

    /// The same, configured otherwise.
    pub(crate) fn client_with(&self, dcs: &[DcId], change: impl FnOnce(&mut ClientConfig)) -> Client {
        let urls = dcs.iter().map(|dc| self.url(*dc).to_owned()).collect();
        let ca = self.material.ca_pem().into_bytes();
        let mut config = ClientConfig::new(urls, Token::new(&self.token(TENANT)), ca);
        config.retry.retry_for = PATIENCE;
        config.retry.longest_pause = Duration::from_millis(200);
        change(&mut config);
        Client::new(config).unwrap()
    }

    /// A plain request of a tenant.
    pub(crate) async fn ask_as(
        &self,
        tenant: TenantId,
        dc: DcId,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> reqwest::Result<Answer> {
        self.ask_with(&self.token(tenant), dc, method, path, headers, body).await
    }

    /// A plain request with a token.
    pub(crate) async fn ask_with(
        &self,
        token: &str,
        dc: DcId,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> reqwest::Result<Answer> {
        let mut request = self
            .http
            .request(method, format!("{}/v1{path}", self.url(dc)))
            .bearer_auth(token)
            .timeout(PATIENCE)
            .body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await?;
        let (status, headers) = (response.status(), response.headers().clone());
        Ok(Answer { status, headers, body: response.bytes().await? })
    }

    /// A plain request with this token.
    pub(crate) async fn ask_as_operator(
        &self,
        token: &str,
        dc: DcId,
        method: Method,
        path: &str,
        body: impl Into<reqwest::Body>,
    ) -> Answer {
        let url = format!("{}/v1{path}", self.url(dc));
        let request = self.http.request(method, url).bearer_auth(token).timeout(PATIENCE).body(body);
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        Answer { status, headers, body: response.bytes().await.unwrap() }
    }

    pub(crate) async fn get(&self, dc: DcId, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.ask_as(TENANT, dc, Method::GET, path, headers, "").await.unwrap()
    }

    /// Sends whole chunks from `start` on.
    pub(crate) async fn put(
        &self,
        dc: DcId,
        id: Uuid,
        start: u64,
        bytes: impl Into<Bytes>,
    ) -> reqwest::Result<Answer> {
        let path = format!("/files/{id}/chunks/{start}");
        self.ask_as(TENANT, dc, Method::PUT, &path, &[], bytes.into()).await
    }

    /// The same, where it must be taken.
    pub(crate) async fn put_ok(
        &self,
        dc: DcId,
        id: Uuid,
        start: u64,
        bytes: impl Into<Bytes>,
    ) -> ChunkReceipt {
        let answer = self.put(dc, id, start, bytes).await.unwrap();
        assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
        answer.json()
    }

    pub(crate) async fn post(&self, dc: DcId, file: &CreateFile) -> Answer {
        let body = serde_json::to_vec(file).unwrap();
        let json = [("content-type", "application/json")];
        self.ask_as(TENANT, dc, Method::POST, "/files", &json, body).await.unwrap()
    }

    /// A whole file in one request.
    pub(crate) async fn post_whole(
        &self,
        dc: DcId,
        file: &serde_json::Value,
        bytes: impl Into<Bytes>,
    ) -> reqwest::Result<Answer> {
        let said = file.to_string();
        self.ask_as(TENANT, dc, Method::POST, "/files", &[("file-metadata", said.as_str())], bytes.into())
            .await
    }

    /// A new file of `size` bytes.
    pub(crate) async fn create(&self, dc: DcId, size: usize) -> Uuid {
        let id = Uuid::now_v7();
        let answer = self.post(dc, &new_file(id, size)).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{:?}", answer.body);
        id
    }

    pub(crate) async fn delete(&self, dc: DcId, id: Uuid) -> StatusCode {
        let answer = self.ask_as(TENANT, dc, Method::DELETE, &format!("/files/{id}"), &[], "").await;
        answer.unwrap().status
    }

    /// Where a file stands once it is complete, assembled, or in conflict, says this datacenter.
    pub(crate) async fn reach(&self, dc: DcId, id: Uuid, state: State) -> FileStatus {
        if state == State::Conflict {
            // A small file is assembled where it came, until another is heard of.
            return eventually("a conflict", async || {
                let status: FileStatus = self.get(dc, &format!("/files/{id}"), &[]).await.json();
                (status.state == State::Conflict).then_some(status)
            })
            .await;
        }
        let waited = if state == State::Assembled { State::Assembled } else { State::Complete };
        let status = self.client(&[dc]).wait(id, waited, PATIENCE).await.unwrap();
        assert_eq!(status.state, state, "at {dc}: {status:?}");
        status
    }

    /// Where a file stands once it can be read there.
    pub(crate) async fn readable(&self, dc: DcId, id: Uuid) -> FileStatus {
        let status = self.client(&[dc]).wait(id, State::Complete, PATIENCE).await.unwrap();
        assert!([State::Complete, State::Assembled].contains(&status.state), "at {dc}: {status:?}");
        status
    }

    /// The answer to a request for the status, once it has this HTTP status.
    pub(crate) async fn answers(&self, dc: DcId, id: Uuid, status: u16) -> Answer {
        let path = format!("/files/{id}");
        eventually("the status", async || {
            let answer = self.get(dc, &path, &[]).await;
            (answer.status.as_u16() == status).then_some(answer)
        })
        .await
    }

    /// Sends bytes through the client library, in an order that is the test's own.
    pub(crate) async fn upload(&self, dcs: &[DcId], bytes: impl Into<Bytes>, wait: WaitFor) -> Uploaded {
        let options = UploadOptions { wait, ..shuffled() };
        self.client(dcs).upload(&Source::memory(bytes), &options, unobserved()).await.unwrap()
    }

    /// Reads a file through one datacenter, verified by the client library.
    pub(crate) async fn read(&self, dc: DcId, id: Uuid, root: Root) -> Vec<u8> {
        read(&self.client(&[dc]), id, root).await
    }

    /// The sum of one metric's values at the admin port, over label sets that contain `labels`.
    pub(crate) async fn metric(&self, dc: DcId, name: &str, labels: &str) -> f64 {
        let url = format!("{}/metrics", self.admins[&dc]);
        let text = self.http.get(url).send().await.unwrap().text().await.unwrap();
        text.lines()
            .filter(|line| line.starts_with(name) && line.contains(labels))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }
}

/// Options of an upload whose order is shuffled all over.
pub(crate) fn shuffled() -> UploadOptions {
    UploadOptions { order: Order::Shuffled { seed: 42, inside: true }, ..UploadOptions::default() }
}

pub(crate) fn new_file(id: Uuid, size: usize) -> CreateFile {
    CreateFile { id: Some(id), size: Some(size as u64), name: "test.bin".into(), ..CreateFile::default() }
}

/// Reads a whole file, verified.
pub(crate) async fn read(client: &Client, id: Uuid, root: Root) -> Vec<u8> {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let target = Target::Writer(Box::new(Collect(bytes.clone())));
    let options = DownloadOptions { range: None, expected_root: Some(root) };
    client.download(id, target, &options, unobserved()).await.unwrap();
    std::mem::take(&mut *bytes.lock().unwrap())
}

struct Collect(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Collect {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Asks again and again until there is an answer.
pub(crate) async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(begun.elapsed() < PATIENCE, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Pseudo-random bytes, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    blake3::Hasher::new_derive_key("sluice tests noise")
        .update(&seed.to_be_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

/// Chunk number `index` of these bytes.
pub(crate) fn chunk(bytes: &Bytes, index: usize) -> Bytes {
    bytes.slice(index * MIB..bytes.len().min((index + 1) * MIB))
}

/// The chaining value of a chunk, as a client computes it.
pub(crate) fn value(index: u64, bytes: &[u8]) -> String {
    let mut hasher = ChunkHasher::new(ChunkIndex::new(index).unwrap());
    hasher.update(bytes);
    hasher.finish().unwrap().to_string()
}

/// One acknowledgement: datacenter, first chunk, number of chunks.
pub(crate) type Acknowledged = (String, u64, u64);

/// An observer that hears every acknowledgement.
pub(crate) fn acknowledgements() -> (SharedObserver, watch::Receiver<Vec<Acknowledged>>) {
    let (sender, receiver) = watch::channel(Vec::new());
    let observer = move |event: &sluice_client::Event<'_>| {
        if let sluice_client::Event::Acknowledged { dc, start, count, .. } = event {
            sender.send_modify(|seen| seen.push(((*dc).to_owned(), *start, *count)));
        }
    };
    (Arc::new(observer), receiver)
}

/// Chunks in a list of acknowledgements.
pub(crate) fn chunks_in(seen: &[Acknowledged]) -> u64 {
    seen.iter().map(|(_, _, count)| count).sum()
}
