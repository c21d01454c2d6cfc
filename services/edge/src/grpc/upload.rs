//! A stream of chunks, in which the receiver grants the credit.
//!
//! Each [`Run`] may send [`CREDIT`] bytes that the store has not taken; for what it takes, as much again is granted.
//! So what waits in memory is bounded by the credit of the runs that are open, is paid for out of the memory budget
//! when a run begins, and a run that waits for the store keeps no other from going on.
//!
//! One task owns a stream: it reads the client's messages, drives the worker calls of its runs, and answers as they
//! end. It is spawned on the datacenter's [`Shutdown`](sluice_node::shutdown::Shutdown), and ends when the client has
//! half-closed and every run is answered, when the client breaks a rule, goes away, is silent without a run or does
//! not take its answers, and when the datacenter drains: then it begins no run, and finishes those it has. Dropping a
//! run loses nothing that was acknowledged.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::task::AtomicWaker;
use futures_util::{FutureExt, Stream, StreamExt};
use sluice_engine::context::SignedContext;
use sluice_node::budget::MemoryPermit;
use sluice_node::telemetry;
use sluice_proto::calls::{PutChunks, Way};
use sluice_proto::http::ChunkReceipt;
use sluice_proto::ingest::upload_response::Answer;
use sluice_proto::ingest::{Begin, Grant, Refused, Stored, Terms, UploadRequest, UploadResponse};
use sluice_proto::problem::{Problem, Refusal};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::call::Call;
use super::convert;
use super::ingest::{DOOR, chunk_index, misplaced};
use crate::chunks::count;
use crate::routes::{file_id, log};

/// Runs that may be open at once on one stream: enough to hide a sync behind the bytes of the others.
const RUNS: usize = 16;

/// Bytes of a run that may be on their way or waiting for the store.
const CREDIT: u32 = 256 << 10;

/// The longest piece: all of a run's credit.
pub(super) const MAX_PIECE: u32 = CREDIT;

/// The shortest piece that does not end its run, so that what is kept beside each piece stays small.
const MIN_PIECE: u32 = 4 << 10;

/// As much is granted at once, unless the run has nothing else to go on with.
const GRANT: u64 = CREDIT as u64 / 4;

/// Pieces that may wait for the store: more do not fit in the credit.
const PIECES: usize = (CREDIT / MIN_PIECE) as usize + 1;

/// Answers that wait for the client to take them: one for each run.
const ANSWERS: usize = RUNS;

/// Opens a stream.
pub(super) fn open(
    call: Call,
    context: SignedContext,
    requests: Streaming<UploadRequest>,
) -> ReceiverStream<Result<UploadResponse, Status>> {
    let (answers, taken) = mpsc::channel(ANSWERS);
    let tasks = call.app.tasks.clone();
    let upload = Upload { call, context, answers, open: BTreeMap::new(), highest: 0, forgiven: 0 };
    tasks.spawn(telemetry::carried(upload.serve(requests)));
    ReceiverStream::new(taken)
}

/// Why a stream ends.
enum End {
    /// The client takes no answers any more.
    Gone,
    /// The client's connection broke, or its messages are none: as tonic says it.
    Broken(Status),
    /// A rule was broken, or there is nothing more to do.
    Refused(Refusal),
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// One stream of one client.
struct Upload {
    call: Call,
    context: SignedContext,
    answers: mpsc::Sender<Result<UploadResponse, Status>>,
    /// Runs that were begun, and not answered.
    open: BTreeMap<u64, Run>,
    /// The highest number of a run so far.
    highest: u64,
    /// Bytes that may be on their way to runs that were answered before they came.
    forgiven: u64,
}

/// A run on its way in.
struct Run {
    /// Bytes that the client may send now.
    credit: u64,
    /// Bytes of the run that have not come.
    left: u64,
    /// Bytes that wait for the store.
    queued: u64,
    /// Bytes that the store took and for which nothing was granted yet.
    owed: u64,
    /// Where pieces go; closed when all have come.
    pieces: Option<mpsc::Sender<Bytes>>,
    /// Bytes that the store took since anybody looked.
    taken: Arc<TakenBytes>,
    /// Pays for the credit.
    _memory: MemoryPermit,
}

/// A worker's call on its way to its answer.
type Putting = Pin<Box<dyn Future<Output = (u64, Instant, Result<ChunkReceipt, Refusal>)> + Send>>;

/// What happened to the runs.
enum Progress {
    /// One has its answer.
    Answered(u64, Instant, Result<ChunkReceipt, Refusal>),
    /// The store took bytes of some.
    Taken,
}

impl Upload {
    async fn serve(mut self, mut requests: Streaming<UploadRequest>) {
        let end = match self.run(&mut requests).await {
            Ok(()) | Err(End::Gone) => return,
            Err(End::Broken(status)) => status,
            Err(End::Refused(refusal)) => {
                log(&refusal);
                self.call.status(&refusal)
            }
        };
        // The runs are dropped before the client hears of it, so that what it sends anew waits for nobody.
        self.open.clear();
        let patience = self.call.app.settings.idle;
        let _ = timeout(patience, self.answers.send(Err(end))).await;
    }

    async fn run(&mut self, requests: &mut Streaming<UploadRequest>) -> Result<(), End> {
        let (app, answers) = (self.call.app.clone(), self.answers.clone());
        let mut gone = pin!(answers.closed());
        let mut draining = pin!(app.tasks.draining());
        let mut runs = FuturesUnordered::<Putting>::new();
        let (mut is_closed, mut is_draining) = (false, false);
        let mut heard = tokio::time::Instant::now();
        let terms = Terms { runs: RUNS as u32, credit: CREDIT, max_piece: MAX_PIECE, min_piece: MIN_PIECE };
        self.say(Answer::Terms(terms)).await?;
        loop {
            if self.open.is_empty() {
                if is_closed {
                    return Ok(());
                }
                if is_draining {
                    return Err(stopping().into());
                }
            }
            tokio::select! {
                message = requests.message(), if !is_closed => match message {
                    Ok(Some(message)) => {
                        heard = tokio::time::Instant::now();
                        if let Some(put) = self.take(message, is_draining).await? {
                            runs.push(put);
                        }
                    }
                    Ok(None) => {
                        is_closed = true;
                        // What is not complete now never will be.
                        self.open.values_mut().for_each(|run| run.pieces = None);
                    }
                    Err(status) => return Err(End::Broken(status)),
                },
                progress = progress(&mut runs, &self.open), if !runs.is_empty() => match progress {
                    Progress::Answered(run, began, result) => {
                        heard = tokio::time::Instant::now();
                        count(&app, DOOR, began, &result);
                        self.answer(run, result).await?;
                    }
                    Progress::Taken => self.grant().await?,
                },
                () = &mut gone => return Err(End::Gone),
                () = &mut draining, if !is_draining => is_draining = true,
                () = sleep_until(heard + app.settings.idle), if self.open.is_empty() => {
                    app.parts.metrics.count_shed("stalled");
                    let secs = app.settings.idle.as_secs();
                    return Err(Refusal::new(
                        Problem::Timeout,
                        format!("the stream said nothing for {secs} s, and has no run open"),
                    )
                    .hint("half-close a stream that is not used")
                    .into());
                }
            }
        }
    }

    /// Takes a message; returns the call of the run that it begins, if it does.
    async fn take(&mut self, message: UploadRequest, is_draining: bool) -> Result<Option<Putting>, End> {
        let UploadRequest { run, begin, data } = message;
        let put = match begin {
            None if data.is_empty() => {
                return Err(misplaced("a message neither begins a run nor carries bytes").into());
            }
            None => None,
            Some(_) if run <= self.highest => {
                let highest = self.highest;
                return Err(misplaced(format!(
                    "run {run} begins after run {highest}, expected a higher number"
                ))
                .into());
            }
            Some(_) if self.open.len() == RUNS => {
                return Err(
                    exceeded(format!("run {run} begins while {RUNS} are open, which is the most")).into()
                );
            }
            Some(begin) => {
                self.highest = run;
                let begun = if is_draining { Err(stopping()) } else { self.begin(run, begin) };
                match begun {
                    Ok(put) => Some(put),
                    Err(refusal) => {
                        count(&self.call.app, DOOR, Instant::now(), &Err(refusal.clone()));
                        self.answer(run, Err(refusal)).await?;
                        None
                    }
                }
            }
        };
        if !data.is_empty() {
            self.bytes(run, data)?;
        }
        Ok(put)
    }

    /// Begins a run: pays for its credit, and passes it on to the workers.
    fn begin(&mut self, number: u64, begin: Begin) -> Result<Putting, Refusal> {
        let Begin { id, start, length, values } = begin;
        let (id, start) = (file_id(&id)?, chunk_index(start)?);
        let expected = convert::optional_values(&values)?;
        let app = self.call.app.clone();
        let memory = app.parts.memory.try_take(CREDIT.into());
        let memory = memory.inspect_err(|_| app.parts.metrics.count_shed("memory"))?;
        let (sender, receiver) = mpsc::channel(PIECES);
        let taken = Arc::new(TakenBytes::default());
        let body = Pieces { receiver, passed: 0, taken: taken.clone() }.boxed();
        let put = PutChunks { id, start, len: length, expected, body, way: Way::Direct };
        let run = Run {
            credit: CREDIT.into(),
            left: length,
            queued: 0,
            owed: 0,
            pieces: (length > 0).then_some(sender),
            taken,
            _memory: memory,
        };
        self.open.insert(number, run);
        let context = self.context.clone();
        let began = Instant::now();
        Ok(async move { (number, began, app.parts.workers.put_chunks(&context, put).await) }.boxed())
    }

    /// Passes on the next bytes of a run.
    fn bytes(&mut self, number: u64, data: Bytes) -> Result<(), Refusal> {
        let len = data.len() as u64;
        let Some(run) = self.open.get_mut(&number) else {
            if number > self.highest {
                return Err(misplaced(format!("bytes came for run {number}, which was not begun")));
            }
            // They were on their way when the run was answered.
            let left = self.forgiven.checked_sub(len);
            self.forgiven = left
                .ok_or_else(|| exceeded(format!("{len} bytes came for run {number}, which is answered")))?;
            return Ok(());
        };
        if len > run.credit {
            let credit = run.credit;
            return Err(exceeded(format!("{len} bytes came for run {number}, {credit} were granted")));
        }
        if len < run.left.min(MIN_PIECE.into()) {
            return Err(misplaced(format!(
                "a piece of {len} bytes came for run {number}, expected {MIN_PIECE} unless it ends the run"
            )));
        }
        run.credit -= len;
        run.queued += len;
        if let Some(pieces) = &run.pieces {
            // There is room for all that the credit allows. A worker that wants no more has refused the run, and is
            // about to say so.
            let _ = pieces.try_send(data);
        }
        // A piece that goes past the end is passed on too: the worker says what is wrong.
        run.left = run.left.saturating_sub(len);
        if run.left == 0 {
            (run.pieces, run.credit) = (None, 0);
        }
        Ok(())
    }

    /// Grants as much again as the store has taken.
    async fn grant(&mut self) -> Result<(), End> {
        let mut grants = Vec::new();
        for (number, run) in &mut self.open {
            let taken = run.taken.bytes.swap(0, Ordering::Acquire);
            run.queued = run.queued.saturating_sub(taken);
            run.owed += taken;
            let is_due = run.owed >= GRANT || run.queued == 0;
            if run.left > 0 && run.owed > 0 && is_due {
                run.credit += run.owed;
                grants.push(Grant { run: *number, bytes: std::mem::take(&mut run.owed) });
            }
        }
        for grant in grants {
            self.say(Answer::Grant(grant)).await?;
        }
        Ok(())
    }

    /// Answers a run, which is closed by that.
    async fn answer(&mut self, number: u64, result: Result<ChunkReceipt, Refusal>) -> Result<(), End> {
        // A run that was refused as it began had its credit all the same.
        self.forgiven += self.open.remove(&number).map_or(u64::from(CREDIT), |run| run.credit);
        let answer = match result {
            Ok(receipt) => Answer::Stored(Stored { run: number, receipt: Some(convert::receipt(receipt)) }),
            Err(refusal) => {
                log(&refusal);
                Answer::Refused(Refused { run: number, problem: Some(self.call.problem(&refusal)) })
            }
        };
        self.say(answer).await
    }

    /// Says something to the client, which has to take it in time. Meanwhile nothing else goes on.
    async fn say(&self, answer: Answer) -> Result<(), End> {
        let answer = self.answers.send(Ok(UploadResponse { answer: Some(answer) }));
        match timeout(self.call.app.settings.idle, answer).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Gone),
            Err(_) => {
                self.call.app.parts.metrics.count_shed("stalled");
                Err(Refusal::new(Problem::Timeout, "the client does not take its answers").into())
            }
        }
    }
}

/// What happens next to the runs. They are driven by this.
async fn progress(runs: &mut FuturesUnordered<Putting>, open: &BTreeMap<u64, Run>) -> Progress {
    poll_fn(|cx| {
        if let Poll::Ready(Some((run, began, result))) = runs.poll_next_unpin(cx) {
            return Poll::Ready(Progress::Answered(run, began, result));
        }
        // Whoever takes may be another task.
        for run in open.values() {
            run.taken.waker.register(cx.waker());
        }
        if open.values().any(|run| run.taken.bytes.load(Ordering::Acquire) > 0) {
            return Poll::Ready(Progress::Taken);
        }
        Poll::Pending
    })
    .await
}

/// More came than was granted.
fn exceeded(detail: String) -> Refusal {
    Refusal::new(Problem::CreditExceeded, detail)
        .hint("send what the terms and the grants allow, and wait for more")
}

fn stopping() -> Refusal {
    Refusal::new(Problem::Stopping, "the datacenter is stopping").hint("go on at another datacenter")
}

/// The bytes of a run as the worker takes them. What it asks for next it has stored before.
struct Pieces {
    receiver: mpsc::Receiver<Bytes>,
    passed: u64,
    taken: Arc<TakenBytes>,
}

/// What the worker has taken and was not granted again yet.
#[derive(Debug, Default)]
struct TakenBytes {
    bytes: AtomicU64,
    waker: AtomicWaker,
}

impl Stream for Pieces {
    type Item = Result<Bytes, Refusal>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let passed = std::mem::take(&mut self.passed);
        if passed > 0 {
            self.taken.bytes.fetch_add(passed, Ordering::Release);
            self.taken.waker.wake();
        }
        let piece = self.receiver.poll_recv(cx);
        if let Poll::Ready(Some(bytes)) = &piece {
            self.passed = bytes.len() as u64;
        }
        piece.map(|bytes| bytes.map(Ok))
    }
}
