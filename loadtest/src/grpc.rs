//! Files through the gRPC door: runs over `Upload` streams, as much of each as is granted, and back over `Read`.
//!
//! A [`Streams`] belongs to one measurement. Its connections are driven by tasks that end with it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use sluice_engine::limits::CHUNK_LEN;
use sluice_proto::ingest::ingest_client::IngestClient;
use sluice_proto::ingest::upload_response::Answer;
use sluice_proto::ingest::{
    Begin, CreateRequest, FileStatus, Grant, ReadRequest, Refused, State, StatusRequest, Stored, Terms,
    UploadRequest, UploadResponse,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use uuid::Uuid;

use crate::client::{Target, WINDOW};
use crate::content::Content;
use crate::upload::{Acknowledged, Until, nth_run, parts};

/// The fewest bytes that are sent at once, unless they end their run: what is granted at once.
const PIECE: u64 = 64 << 10;

/// Messages that wait for the connection. The server's credit is the bound of what is under way; this is some of it.
const MESSAGES: usize = 32;

/// Sends its token with each call.
#[derive(Clone)]
struct Bearer(MetadataValue<Ascii>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

type Client = IngestClient<InterceptedService<Channel, Bearer>>;

/// Clients of the gRPC doors of a cluster.
pub(crate) struct Streams {
    /// One connection to each datacenter, and where to open more.
    doors: Vec<(Target, Client)>,
    /// Runs at once, dealt out to the datacenters.
    at_once: usize,
}

impl Streams {
    pub(crate) async fn open(targets: &[(String, Target)], at_once: usize) -> anyhow::Result<Self> {
        let mut doors = Vec::new();
        for (_, target) in targets {
            doors.push((target.clone(), connect(target).await?));
        }
        Ok(Self { doors, at_once })
    }

    fn first(&self) -> Client {
        self.doors[0].1.clone()
    }

    /// Uploads the first `size` bytes of the content, and answers with its id and what was acknowledged.
    pub(crate) async fn upload(
        &self,
        content: &Content,
        size: u64,
        until: Until,
    ) -> anyhow::Result<(Uuid, Vec<Acknowledged>)> {
        let id = Uuid::now_v7();
        let began = Instant::now();
        let file = CreateRequest { id: id.to_string(), size: Some(size), ..CreateRequest::default() };
        self.first().create(file).await?;
        let next = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        for (nth, (target, client)) in self.doors.iter().enumerate() {
            let share = (self.at_once + self.doors.len() - 1 - nth) / self.doors.len();
            let mut left = share.max(1);
            let mut client = client.clone();
            loop {
                let stream = Stream::open(client, content.clone(), id, began).await?;
                let at_once = left.min(stream.terms.runs as usize);
                left -= at_once;
                tasks.spawn(stream.send(at_once, size, next.clone()));
                if left == 0 {
                    break;
                }
                // A stream has no more open than its terms allow; each has a connection's window to itself.
                client = connect(target).await?;
            }
        }
        let mut all = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            all.extend(ended??);
        }
        all.sort_by_key(|acknowledged: &Acknowledged| acknowledged.at);
        self.wait(id, until).await?;
        Ok((id, all))
    }

    /// Waits until a file is so far.
    pub(crate) async fn wait(&self, id: Uuid, until: Until) -> anyhow::Result<()> {
        let wanted = match until {
            Until::Acknowledged => return Ok(()),
            Until::Complete => State::Complete,
            Until::Assembled => State::Assembled,
        };
        loop {
            let status = self.status(id, wanted).await?;
            match status.state() {
                state if state == wanted || state == State::Assembled => return Ok(()),
                State::Receiving | State::Complete => {}
                other => bail!("the file is {other:?}"),
            }
        }
    }

    /// The root of a complete file, as the cluster tells it.
    pub(crate) async fn root(&self, id: Uuid) -> anyhow::Result<Option<String>> {
        let root = self.status(id, State::Unspecified).await?.root;
        Ok(<[u8; 32]>::try_from(&root[..]).ok().map(|root| blake3::Hash::from_bytes(root).to_string()))
    }

    async fn status(&self, id: Uuid, wait_for: State) -> anyhow::Result<FileStatus> {
        let timeout_secs = (wait_for != State::Unspecified).then_some(60);
        let asked = StatusRequest { id: id.to_string(), wait_for: wait_for.into(), timeout_secs };
        Ok(self.first().status(asked).await?.into_inner())
    }

    /// Reads `size` bytes, a part over each of as many streams as there are runs at once.
    pub(crate) async fn download(&self, id: Uuid, size: u64) -> anyhow::Result<()> {
        let mut tasks = JoinSet::new();
        for (nth, part) in parts(size, self.at_once as u64).into_iter().enumerate() {
            let client = self.doors[nth % self.doors.len()].1.clone();
            tasks.spawn(async move {
                let len = part.end - part.start;
                let got = read(client, id, part, |_| {}).await?;
                ensure!(got == len, "{got} bytes of {id} came, expected {len}");
                Ok(())
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        Ok(())
    }

    /// Reads a file over one stream, and hashes what comes.
    pub(crate) async fn hash(&self, id: Uuid, size: u64) -> anyhow::Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        let take = |bytes: &[u8]| {
            hasher.update(bytes);
        };
        read(self.first(), id, 0..size, take).await?;
        Ok(hasher.finalize())
    }
}

async fn connect(target: &Target) -> anyhow::Result<Client> {
    let to = target.clone();
    let connector = tower::service_fn(move |_| {
        let target = to.clone();
        async move { target.open().await.map(TokioIo::new) }
    });
    // The name is only what requests carry: the connector knows where to go.
    let endpoint = Endpoint::from_static("https://localhost")
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    let channel = endpoint
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("cannot reach {}", target.address))?;
    let bearer = Bearer(target.token.as_deref().unwrap_or_default().parse()?);
    Ok(IngestClient::with_interceptor(channel, bearer))
}

async fn read(
    mut client: Client,
    id: Uuid,
    range: Range<u64>,
    mut take: impl FnMut(&[u8]),
) -> anyhow::Result<u64> {
    let length = Some(range.end - range.start);
    let asked = ReadRequest { id: id.to_string(), offset: range.start, length, ..ReadRequest::default() };
    let mut parts = client.read(asked).await?.into_inner();
    let mut len = 0;
    while let Some(part) = parts.message().await? {
        take(&part.data);
        len += part.data.len() as u64;
    }
    Ok(len)
}

/// An `Upload` stream whose terms are known.
struct Stream {
    requests: mpsc::Sender<UploadRequest>,
    answers: Streaming<UploadResponse>,
    terms: Terms,
    content: Content,
    id: Uuid,
    began: Instant,
}

/// A run that is on its way.
struct Open {
    bytes: u64,
    /// What was not sent yet.
    left: Range<u64>,
    credit: u64,
    asked: Instant,
}

impl Stream {
    async fn open(mut client: Client, content: Content, id: Uuid, began: Instant) -> anyhow::Result<Self> {
        let (requests, receiver) = mpsc::channel(MESSAGES);
        let mut answers = client.upload(ReceiverStream::new(receiver)).await?.into_inner();
        match answers.message().await?.and_then(|answer| answer.answer) {
            Some(Answer::Terms(terms)) => Ok(Self { requests, answers, terms, content, id, began }),
            other => bail!("an Upload stream began with {other:?} instead of its terms"),
        }
    }

    /// Takes runs of the file as long as there are any, so many at once.
    async fn send(
        mut self,
        at_once: usize,
        size: u64,
        next: Arc<AtomicU64>,
    ) -> anyhow::Result<Vec<Acknowledged>> {
        let (mut open, mut done, mut number) = (BTreeMap::new(), Vec::new(), 0);
        loop {
            while open.len() < at_once
                && let Some(range) = nth_run(size, next.fetch_add(1, Ordering::Relaxed))
            {
                number += 1;
                open.insert(number, self.begin(number, range).await?);
            }
            if open.is_empty() {
                return Ok(done);
            }
            for (number, run) in &mut open {
                self.send_credit(*number, run).await?;
            }
            match self.answers.message().await?.and_then(|answer| answer.answer) {
                Some(Answer::Grant(Grant { run, bytes })) => {
                    // What is granted to a run that has all its bytes on their way is of no use to it.
                    if let Some(run) = open.get_mut(&run) {
                        run.credit += bytes;
                    }
                }
                Some(Answer::Stored(Stored { run, receipt })) => {
                    let Some(run) = open.remove(&run) else { bail!("run {run} was answered twice") };
                    let new_chunks = receipt.map_or(0, |receipt| receipt.new_chunks);
                    ensure!(new_chunks == run.bytes.div_ceil(CHUNK_LEN), "a run was there already");
                    let (at, latency) = (self.began.elapsed(), run.asked.elapsed());
                    done.push(Acknowledged { at, latency, bytes: run.bytes });
                }
                Some(Answer::Refused(Refused { run, problem })) => {
                    bail!("run {run} was refused: {:?}", problem.unwrap_or_default())
                }
                Some(Answer::Terms(_)) | None => bail!("an Upload stream ended before its runs"),
            }
        }
    }

    async fn begin(&mut self, number: u64, range: Range<u64>) -> anyhow::Result<Open> {
        let bytes = range.end - range.start;
        let start = range.start / CHUNK_LEN;
        let begin = Begin { id: self.id.to_string(), start, length: bytes, values: Bytes::new() };
        let asked = Instant::now();
        self.say(UploadRequest { run: number, begin: Some(begin), data: Bytes::new() }).await?;
        Ok(Open { bytes, left: range, credit: self.terms.credit.into(), asked })
    }

    /// Sends what a run has credit for, but no crumbs.
    async fn send_credit(&mut self, number: u64, run: &mut Open) -> anyhow::Result<()> {
        loop {
            let left = run.left.end - run.left.start;
            let len = left.min(run.credit).min(self.terms.max_piece.into());
            if len == 0 || (len < PIECE && len < left) {
                return Ok(());
            }
            let data = self.content.bytes(run.left.start..run.left.start + len);
            run.left.start += len;
            run.credit -= len;
            self.say(UploadRequest { run: number, begin: None, data }).await?;
        }
    }

    async fn say(&mut self, request: UploadRequest) -> anyhow::Result<()> {
        if self.requests.send(request).await.is_ok() {
            return Ok(());
        }
        // Why the server takes no more is what it says at the end.
        while self.answers.message().await?.is_some() {}
        bail!("an Upload stream ended before its runs")
    }
}
