//! Upload: the chunks of one source over all URLs at once, until the cluster has every one of them.
//!
//! The call's own task makes the metadata durable, asks every URL what is there already, and starts `jobs` workers.
//! A worker takes a job from the [`Plan`], reads and hashes it in a blocking task, sends it, and notes what was
//! acknowledged. Every value also goes into a span tree here, whose root must be the server's in the end. Workers
//! are tasks of a `JoinSet`: they end when the plan is done, and are aborted when one fails or the call is dropped.
//!
//! A file of at most one chunk of which nothing is known goes in one request (`whole.rs`).
//!
//! At any moment a worker holds one buffer of at most 8 MiB, and nothing else that grows with the file.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, ChunkHasher, Root};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::SpanTree;
use sluice_proto::http::{ChunkReceipt, CreateFile, FileStatus, State};
use tokio::sync::Notify;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use crate::Client;
use crate::chunk_set::ChunkSet;
use crate::client::Statuses;
use crate::creation::Creation;
use crate::doors::{First, Ticket, gave_up};
use crate::error::ClientError;
use crate::event::{Event, SharedObserver};
use crate::plan::{Job, Next, Order, Plan};
use crate::settle;
use crate::source::{BufferPool, Source};

/// What is said of a file when it is uploaded, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UploadOptions {
    /// The file's id; a new UUIDv7 if absent. With an id, what the cluster holds already is not sent again.
    pub id: Option<Uuid>,
    /// That the id was made for this upload: nobody has to be asked what there is.
    pub is_new: bool,
    /// File name; may be empty.
    pub name: String,
    /// Content type; may be empty.
    pub content_type: String,
    /// User metadata.
    pub metadata: BTreeMap<String, String>,
    /// Seconds after the last progress at which the file expires; 0: never.
    pub expires_in: u64,
    /// The root that the whole must have.
    pub expected_root: Option<Root>,
    /// Name of the datacenter that should reassemble the file; by default the first that answers.
    pub home: Option<String>,
    /// In which order chunks are sent.
    pub order: Order,
    /// What to wait for in the end.
    pub wait: WaitFor,
}

/// How far a file must be before an upload returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WaitFor {
    /// Every chunk acknowledged.
    Acknowledged,
    /// Every chunk known to be somewhere, and the root confirmed.
    #[default]
    Complete,
    /// The whole file in its home.
    Assembled,
}

impl WaitFor {
    pub(crate) const fn state(self) -> Option<State> {
        match self {
            Self::Acknowledged => None,
            Self::Complete => Some(State::Complete),
            Self::Assembled => Some(State::Assembled),
        }
    }
}

/// What an upload did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uploaded {
    /// The file.
    pub id: Uuid,
    /// Size in bytes.
    pub size: u64,
    /// The root of what was sent.
    pub root: Root,
    /// Where the file stands.
    pub state: State,
    /// The datacenter that reassembles it.
    pub home: String,
    /// Chunks that were sent and acknowledged, again counted again.
    pub chunks_sent: u64,
    /// Chunks that were there already.
    pub chunks_skipped: u64,
}

impl UploadOptions {
    /// The body that creates the file; the same for the same options. Without a size, that is settled later.
    pub fn create_file(&self, id: Uuid, size: Option<u64>) -> CreateFile {
        CreateFile {
            id: Some(id),
            size,
            name: self.name.clone(),
            content_type: self.content_type.clone(),
            metadata: self.metadata.clone(),
            expires_in: self.expires_in,
            expected_root: self.expected_root.map(|root| root.to_string()),
            home: self.home.clone(),
        }
    }
}

impl Client {
    /// Uploads `source`, or what the cluster lacks of it.
    ///
    /// Fails with [`GaveUp`](ClientError::GaveUp) when no URL answered usefully for
    /// [`retry_for`](crate::RetryPolicy::retry_for): the same call with the same id then goes on from there. A
    /// refusal that no waiting heals ends it at once, as does any contradiction between what was sent and what
    /// the cluster has.
    pub async fn upload(
        &self,
        source: &Source,
        options: &UploadOptions,
        observer: SharedObserver,
    ) -> Result<Uploaded, ClientError> {
        let file = Geometry::new(source.size())?;
        let id = options.id.unwrap_or_else(Uuid::now_v7);
        let known = self.what_is_known(id, options, &observer).await?;
        // Its home is where it arrives, so one that is wanted elsewhere goes the long way.
        if file.chunks() <= 1
            && known.known.is_empty()
            && options.home.is_none()
            && let Some(uploaded) = self.upload_whole(id, file, source, options, &observer).await?
        {
            return Ok(uploaded);
        }
        let (creation, status) = self.create(id, file, options, &known.known, &observer).await?;
        let known = self.known_now(id, known, &creation, &status, &observer).await?;
        let mut held = settle::held(&known);
        settle::survey(self, id, file, &known, &mut held).await;
        let chunks = file.chunks();
        observer.observe(&Event::Planned { chunks, bytes: file.size(), held: held.len() });

        let upload = Arc::new(Upload {
            client: self.clone(),
            id,
            file,
            creation: Arc::new(creation),
            source: source.clone(),
            observer,
            pool: Arc::default(),
            state: Mutex::new(Progress {
                plan: Plan::new(file, held, self.doors().len(), options.order),
                tree: SpanTree::new(file),
                only_root: None,
                sent: 0,
                skipped: 0,
                useful_at: Instant::now(),
                last: None,
            }),
            changed: Notify::new(),
        });
        upload.run_plan().await?;
        upload.finish(options, status).await
    }

    /// What the datacenters know of a file that may have been begun before.
    pub(crate) async fn what_is_known(
        &self,
        id: Uuid,
        options: &UploadOptions,
        observer: &SharedObserver,
    ) -> Result<Statuses, ClientError> {
        if options.id.is_none() || options.is_new {
            Ok(Statuses::default())
        } else {
            self.statuses(id, None, observer).await
        }
    }

    /// What they know now that the file is created: those that lacked the metadata can say what they hold.
    pub(crate) async fn known_now(
        &self,
        id: Uuid,
        before: Statuses,
        creation: &Creation,
        status: &FileStatus,
        observer: &SharedObserver,
    ) -> Result<Vec<(usize, FileStatus)>, ClientError> {
        if !before.some_lack_it {
            return Ok(before.known);
        }
        creation.tell_others(creation.url, &status.home).await;
        let now = self.statuses(id, Some(creation), observer).await?.known;
        now.iter().try_for_each(|(_, status)| settle::check_alive(status))?;
        Ok(now)
    }

    /// Creates the file where it is known, or else at the first URL that answers.
    async fn create(
        &self,
        id: Uuid,
        file: Geometry,
        options: &UploadOptions,
        known: &[(usize, FileStatus)],
        observer: &SharedObserver,
    ) -> Result<(Creation, FileStatus), ClientError> {
        for (_, status) in known {
            settle::check_alive(status)?;
            if let Some(theirs) = status.size.filter(|size| *size != file.size()) {
                return Err(ClientError::SizeDiffers { id, ours: file.size(), theirs });
            }
        }
        let body = options.create_file(id, Some(file.size()));
        let first = known.first().map_or(First::Configured, |(url, _)| First::Url(*url));
        Creation::begin(self, id, body, first, observer).await
    }
}

/// One upload under way, shared by its workers.
pub(crate) struct Upload {
    pub(crate) client: Client,
    pub(crate) id: Uuid,
    pub(crate) file: Geometry,
    pub(crate) creation: Arc<Creation>,
    source: Source,
    pub(crate) observer: SharedObserver,
    pool: Arc<BufferPool>,
    state: Mutex<Progress>,
    /// Rung when work was settled or given back.
    changed: Notify,
}

pub(crate) struct Progress {
    pub(crate) plan: Plan,
    tree: SpanTree,
    /// The root of a file of one chunk, which its chaining value does not give.
    only_root: Option<Root>,
    sent: u64,
    skipped: u64,
    /// When a chunk was last acknowledged or found to be there.
    useful_at: Instant,
    last: Option<ClientError>,
}

/// A job, read and hashed.
struct Piece {
    bytes: Bytes,
    values: Vec<ChainingValue>,
    only_root: Option<Root>,
}

impl Upload {
    /// The end of a stream's upload: all was sent, and nothing can be read again.
    pub(crate) fn of_stream(
        creation: &Arc<Creation>,
        observer: &SharedObserver,
        file: Geometry,
        tree: SpanTree,
        only_root: Option<Root>,
        (sent, skipped): (u64, u64),
    ) -> Self {
        let all = ChunkSet::new().complement(file.chunks());
        Self {
            client: creation.client.clone(),
            id: creation.id,
            file,
            creation: creation.clone(),
            source: Source::gone(file.size()),
            observer: observer.clone(),
            pool: Arc::default(),
            state: Mutex::new(Progress {
                plan: Plan::new(file, all, creation.client.doors().len(), Order::Ascending),
                tree,
                only_root,
                sent,
                skipped,
                useful_at: Instant::now(),
                last: None,
            }),
            changed: Notify::new(),
        }
    }

    /// Waits for what was asked for, once everything was sent.
    pub(crate) async fn finish(
        self: Arc<Self>,
        options: &UploadOptions,
        status: FileStatus,
    ) -> Result<Uploaded, ClientError> {
        let root = self.local_root()?;
        self.check_source(options.expected_root, root).await?;
        let status = match options.wait.state() {
            Some(wanted) => self.settle(wanted, root).await?,
            None => status,
        };
        let progress = self.progress();
        Ok(Uploaded {
            id: self.id,
            size: self.file.size(),
            root,
            state: status.state,
            home: status.home,
            chunks_sent: progress.sent,
            chunks_skipped: progress.skipped,
        })
    }

    /// Whether what was lost can be read and sent again.
    pub(crate) fn can_resend(&self) -> bool {
        !self.source.is_gone()
    }

    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        // Each change under the lock is whole; a panic elsewhere leaves it meaningful.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works the plan off.
    pub(crate) async fn run_plan(self: &Arc<Self>) -> Result<(), ClientError> {
        self.progress().useful_at = Instant::now();
        let mut workers = JoinSet::new();
        for _ in 0..self.client.jobs() {
            let upload = self.clone();
            workers.spawn(async move { upload.work().await });
        }
        while let Some(ended) = workers.join_next().await {
            let result = ended.unwrap_or_else(|error| Err(ClientError::Task { cause: error.to_string() }));
            if let Err(error) = result {
                workers.shutdown().await;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn work(&self) -> Result<(), ClientError> {
        loop {
            let changed = self.changed.notified();
            let doors_changed = self.client.doors().changed();
            let (next, ticket) = {
                let mut progress = self.progress();
                let next = progress.plan.next(&self.client.doors().usable());
                let ticket = match &next {
                    Next::Job { url, job } if job.send => Some(self.client.doors().enter(*url)),
                    Next::Job { .. } | Next::Wait | Next::Done => None,
                };
                (next, ticket)
            };
            match next {
                Next::Done => {
                    self.changed.notify_waiters();
                    return Ok(());
                }
                Next::Wait => {
                    let until = self.deadline()?;
                    let awake = self.client.doors().next_awake();
                    // Either something changed or it is time: both mean "look again".
                    tokio::select! {
                        () = changed => {}
                        () = doors_changed => {}
                        () = sleep_until(awake.map_or(until, |at| at.min(until))) => {}
                    }
                }
                Next::Job { job, .. } => {
                    let piece = self.read(&job).await?;
                    match ticket {
                        Some(ticket) => self.send(ticket, job, piece).await?,
                        None => self.skip(&job),
                    }
                    self.changed.notify_waiters();
                }
            }
        }
    }

    /// When to give up; an error if that has passed and no URL can be asked.
    fn deadline(&self) -> Result<Instant, ClientError> {
        let retry_for = self.client.doors().policy().retry_for;
        let mut progress = self.progress();
        let deadline = progress.useful_at + retry_for;
        let now = Instant::now();
        if now < deadline {
            return Ok(deadline);
        }
        match progress.last.take() {
            Some(last) => Err(gave_up(now - progress.useful_at, Some(last))),
            // Requests are in flight, and their own timeouts watch over them.
            None => Ok(now + Duration::from_secs(1)),
        }
    }

    /// Reads and hashes a job's chunks, and merges their values.
    async fn read(&self, job: &Job) -> Result<Piece, ClientError> {
        let (source, pool, file) = (self.source.clone(), self.pool.clone(), self.file);
        let chunks = job.chunks.clone();
        let piece = spawn_blocking(move || read_piece(&source, &pool, file, chunks))
            .await
            .map_err(|error| ClientError::Task { cause: error.to_string() })??;
        let mut progress = self.progress();
        for (chunk, value) in job.chunks.clone().zip(&piece.values) {
            let place = Place::of_chunk(ChunkIndex::new(chunk)?);
            progress.tree.insert(Span::new(place, *value)).map_err(|contradiction| {
                self.source.changed(format!("chunk {chunk} was read twice and differs: {contradiction}"))
            })?;
        }
        progress.only_root = progress.only_root.or(piece.only_root);
        drop(progress);
        Ok(piece)
    }

    fn skip(&self, job: &Job) {
        let (start, count) = (job.chunks.start, job.chunks.end - job.chunks.start);
        {
            let mut progress = self.progress();
            progress.plan.settled();
            progress.skipped += count;
            progress.useful_at = Instant::now();
        }
        let bytes = self.file.range_len(job.chunks.start, job.chunks.end);
        self.observer.observe(&Event::Skipped { start, count, bytes });
    }

    /// Sends a piece to the ticket's URL, a few times if need be; what fails goes back to the plan.
    async fn send(&self, ticket: Ticket<'_>, job: Job, piece: Piece) -> Result<(), ClientError> {
        let door = ticket.door();
        let start = job.chunks.start;
        let mut tries = 1;
        loop {
            match door.put_chunks(self.id, start, &piece.values, piece.bytes.clone()).await {
                Ok(receipt) => {
                    ticket.carried(piece.bytes.len() as u64, receipt.busy, &self.observer);
                    self.acknowledged(&ticket, &job, &piece, &receipt)?;
                    if receipt.provisional {
                        self.creation.unheard_of(&door).await?;
                    }
                    return Ok(());
                }
                Err(error) if error.is_transient() => {
                    let policy = self.client.doors().policy();
                    // What the server asks to come later for is not asked again at once.
                    if tries < policy.tries_per_url && error.retry_after().is_none() {
                        sleep(self.client.doors().pause(tries)).await;
                        tries += 1;
                        continue;
                    }
                    self.creation.refused_by(&door, &error).await?;
                    ticket.failed(&error, &self.observer);
                    let url = ticket.url;
                    drop(ticket);
                    let mut progress = self.progress();
                    progress.plan.give_back(url, job);
                    progress.last = Some(error);
                    drop(progress);
                    if self.client.doors().usable().is_empty() {
                        self.deadline()?;
                    }
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn acknowledged(
        &self,
        ticket: &Ticket<'_>,
        job: &Job,
        piece: &Piece,
        receipt: &ChunkReceipt,
    ) -> Result<(), ClientError> {
        let (start, count) = (job.chunks.start, piece.values.len() as u64);
        check_receipt(start, &piece.values, receipt)?;
        {
            let mut progress = self.progress();
            progress.plan.settled();
            progress.sent += count;
            progress.useful_at = Instant::now();
            progress.last = None;
        }
        self.observer.observe(&Event::Acknowledged {
            url: ticket.url,
            dc: &receipt.dc,
            start,
            count,
            bytes: piece.bytes.len() as u64,
            provisional: receipt.provisional,
        });
        Ok(())
    }

    /// The root of the source, all of which was read.
    fn local_root(&self) -> Result<Root, ClientError> {
        let progress = self.progress();
        progress.only_root.or_else(|| progress.tree.root()).ok_or_else(|| ClientError::Task {
            cause: format!("{} of {} chunks were read", progress.tree.covered(), self.file.chunks()),
        })
    }

    /// Checks that the source was one and the same all along, and the one that was expected.
    async fn check_source(&self, expected: Option<Root>, root: Root) -> Result<(), ClientError> {
        let source = self.source.clone();
        spawn_blocking(move || source.check_unchanged())
            .await
            .map_err(|error| ClientError::Task { cause: error.to_string() })??;
        match expected {
            Some(expected) if expected != root => Err(ClientError::ExpectedRoot { expected, got: root }),
            Some(_) | None => Ok(()),
        }
    }

    /// Makes these chunks, acknowledged before and missing now, the work to do.
    pub(crate) async fn resend(self: &Arc<Self>, chunks: &ChunkSet) -> Result<(), ClientError> {
        self.observer.observe(&Event::Resending { chunks: chunks.len() });
        let held = chunks.complement(self.file.chunks());
        self.progress().plan.refill(held);
        self.run_plan().await
    }
}

fn read_piece(
    source: &Source,
    pool: &Arc<BufferPool>,
    file: Geometry,
    chunks: std::ops::Range<u64>,
) -> Result<Piece, ClientError> {
    let len = file.range_len(chunks.start, chunks.end) as usize;
    let bytes = source.read(chunks.start * CHUNK_LEN, len, pool)?;
    let values = hash_chunks(chunks, &bytes)?;
    let only_root = (file.chunks() == 1).then(|| Root::of_bytes(&bytes));
    Ok(Piece { bytes, values, only_root })
}

/// The values of chunks, from their bytes.
pub(crate) fn hash_chunks(
    chunks: std::ops::Range<u64>,
    bytes: &[u8],
) -> Result<Vec<ChainingValue>, ClientError> {
    let mut values = Vec::with_capacity((chunks.end - chunks.start) as usize);
    for (chunk, part) in chunks.zip(bytes.chunks(CHUNK_LEN as usize)) {
        let mut hasher = ChunkHasher::new(ChunkIndex::new(chunk)?);
        hasher.update(part);
        values.extend(hasher.finish());
    }
    Ok(values)
}

/// Checks that what a datacenter says it stored is what was sent.
pub(crate) fn check_receipt(
    start: u64,
    values: &[ChainingValue],
    receipt: &ChunkReceipt,
) -> Result<(), ClientError> {
    let other = (0..).zip(values).find(|(i, ours)| receipt.values.get(*i) != Some(&ours.to_string()));
    match other {
        Some((i, _)) => Err(ClientError::Content { dc: receipt.dc.clone(), chunk: start + i as u64 }),
        None => Ok(()),
    }
}
