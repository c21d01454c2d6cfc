//! The stream of chunks in which the receiver grants the credit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sluice_edge::EdgeSettings;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::FileId;
use sluice_engine::limits::CHUNK_LEN;
use sluice_proto::ingest::upload_response::Answer;
use sluice_proto::ingest::{Begin, Receipt, State, StatusRequest, Terms, UploadRequest, UploadResponse};
use sluice_worker::Pace;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::client::{Datacenter, TENANT};
use crate::grpc::{Client, client, new_file, problem};
use crate::use_cases::{ID, content};

const OTHER: &str = "0293e4a0-7b1c-7def-8123-456789abcdef";
const PIECE: usize = 64 << 10;

/// One end of a stream.
struct Stream {
    requests: Option<mpsc::Sender<UploadRequest>>,
    answers: Streaming<UploadResponse>,
    terms: Terms,
}

impl Stream {
    async fn open(client: &mut Client) -> Self {
        let (requests, receiver) = mpsc::channel(1);
        let mut answers = client.upload(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        let first = answers.message().await.unwrap().unwrap().answer;
        let Some(Answer::Terms(terms)) = first else { panic!("{first:?}") };
        assert!(terms.credit >= terms.max_piece && terms.max_piece as usize >= PIECE);
        Self { requests: Some(requests), answers, terms }
    }

    async fn send(&self, request: UploadRequest) {
        // A stream that has ended takes no more, and says why.
        let _ = self.requests.as_ref().unwrap().send(request).await;
    }

    async fn begin(&self, run: u64, id: &str, start: u64, length: u64) {
        let begin = Begin { id: id.into(), start, length, values: Bytes::new() };
        self.send(UploadRequest { run, begin: Some(begin), data: Bytes::new() }).await;
    }

    async fn bytes(&self, run: u64, data: impl Into<Bytes>) {
        self.send(UploadRequest { run, begin: None, data: data.into() }).await;
    }

    async fn answer(&mut self) -> Result<Option<Answer>, Status> {
        let answer =
            timeout(Duration::from_secs(20), self.answers.message()).await.expect("an answer in time");
        answer.map(|answer| answer.map(|answer| answer.answer.unwrap()))
    }

    /// The next answer that ends a run, or the stream.
    async fn outcome(&mut self) -> Result<(u64, Result<Receipt, String>), Status> {
        loop {
            match self.answer().await?.expect("the stream goes on") {
                Answer::Grant(_) => {}
                Answer::Stored(stored) => return Ok((stored.run, Ok(stored.receipt.unwrap()))),
                Answer::Refused(refused) => {
                    let problem = refused.problem.unwrap();
                    assert!(problem.dc == "dc-a" && problem.trace.len() == 32 && !problem.title.is_empty());
                    return Ok((refused.run, Err(problem.code)));
                }
                Answer::Terms(again) => panic!("{again:?}"),
            }
        }
    }

    /// The status with which the stream ends.
    async fn end(&mut self) -> (Code, String) {
        loop {
            match self.outcome().await {
                Ok(_) => {}
                Err(status) => return problem(&status),
            }
        }
    }
}

/// A run that an honest client has to send.
struct Outgoing {
    data: Bytes,
    credit: u64,
}

/// Sends runs as they are granted, and returns what became of each, and the most bytes that were under way.
async fn send_all(stream: &mut Stream, runs: Vec<(String, u64, Bytes)>) -> Vec<(u64, Receipt)> {
    let mut waiting: Vec<_> = runs.into_iter().rev().collect();
    let mut open = BTreeMap::<u64, Outgoing>::new();
    let (mut next, mut done) = (0, Vec::new());
    while !waiting.is_empty() || !open.is_empty() {
        while open.len() < stream.terms.runs as usize
            && let Some((id, start, data)) = waiting.pop()
        {
            next += 1;
            stream.begin(next, &id, start, data.len() as u64).await;
            open.insert(next, Outgoing { data, credit: stream.terms.credit.into() });
        }
        for (run, outgoing) in &mut open {
            while !outgoing.data.is_empty() {
                let len = outgoing.data.len().min(PIECE);
                if len as u64 > outgoing.credit {
                    break;
                }
                outgoing.credit -= len as u64;
                let piece = outgoing.data.split_to(len);
                stream.bytes(*run, piece).await;
            }
        }
        match stream.answer().await.unwrap().unwrap() {
            Answer::Grant(grant) => {
                if let Some(outgoing) = open.get_mut(&grant.run) {
                    outgoing.credit += grant.bytes;
                }
            }
            Answer::Stored(stored) => {
                open.remove(&stored.run).unwrap();
                done.push((stored.run, stored.receipt.unwrap()));
            }
            other => panic!("{other:?}"),
        }
    }
    done
}

fn file(id: &str) -> FileId {
    FileId::derive(TENANT, id.parse().unwrap())
}

/// Makes the store take a file's pieces one by one.
fn slow(dc: &Datacenter, id: &str) -> Arc<Semaphore> {
    let permits = Arc::new(Semaphore::new(0));
    dc.store.slow.lock().unwrap().insert(file(id), permits.clone());
    permits
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = timeout(Duration::from_secs(20), async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what}");
}

#[tokio::test]
async fn runs_of_several_files_go_over_one_stream_in_any_order() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    let (one, other) = (Bytes::from(content(11 * CHUNK_LEN + 77)), Bytes::from(content(CHUNK_LEN * 3)));
    client.create(new_file(ID, one.len() as u64)).await.unwrap();
    client.create(new_file(OTHER, other.len() as u64)).await.unwrap();
    let run = |id: &str, data: &Bytes, start: u64, count: u64| {
        let from = (start << 20) as usize;
        let to = data.len().min(((start + count) << 20) as usize);
        (id.to_owned(), start, data.slice(from..to))
    };
    let runs =
        vec![run(ID, &one, 8, 4), run(OTHER, &other, 2, 1), run(ID, &one, 0, 8), run(OTHER, &other, 0, 2)];
    let mut stream = Stream::open(&mut client).await;
    let done = send_all(&mut stream, runs).await;
    let new: u64 = done.iter().map(|(_, receipt)| receipt.new_chunks).sum();
    assert_eq!((done.len(), new), (4, 15));
    let (_, last) = done.iter().find(|(run, _)| *run == 1).unwrap();
    let value = ChainingValue::of_chunk(ChunkIndex::new(9).unwrap(), &one[9 << 20..10 << 20]).unwrap();
    assert_eq!((&last.values[32..64], last.start), (&value.as_bytes()[..], 8));
    stream.requests = None;
    assert!(stream.answer().await.unwrap().is_none(), "it ends with OK");
    for (id, bytes) in [(ID, &one), (OTHER, &other)] {
        let status = StatusRequest { id: id.into(), wait_for: State::Complete.into(), timeout_secs: None };
        let status = client.status(status).await.unwrap().into_inner();
        assert_eq!(&status.root[..], &Root::of_bytes(bytes).as_bytes()[..]);
    }
    let text = dc.metrics.encode().unwrap();
    assert!(text.contains(r#"sluice_chunks_total{dc="dc-a",door="grpc",outcome="stored"} 15"#), "{text}");
    until("the call is counted", || {
        let text = dc.metrics.encode().unwrap();
        text.contains(r#"rpc_method="sluice.v1.Ingest/Upload",rpc_response_status_code="OK""#)
    })
    .await;
    assert_eq!(dc.memory.used(), 0);
}

#[tokio::test]
async fn a_slow_store_slows_the_sender_and_memory_stays_flat() {
    let dc = Datacenter::patient();
    let permits = slow(&dc, ID);
    let mut client = client(&dc).await;
    let mut stream = Stream::open(&mut client).await;
    let runs = u64::from(stream.terms.runs);
    let credit = u64::from(stream.terms.credit);
    client.create(new_file(ID, runs * CHUNK_LEN)).await.unwrap();
    let idle = dc.memory.used();
    // What the store does not take is not granted again: so much is sent, and no more.
    let whole = Bytes::from(content(CHUNK_LEN));
    let mut sent = vec![0; runs as usize];
    for run in 1..=runs {
        stream.begin(run, ID, run - 1, CHUNK_LEN).await;
        while sent[run as usize - 1] < credit {
            let from = sent[run as usize - 1] as usize;
            stream.bytes(run, whole.slice(from..from + PIECE)).await;
            sent[run as usize - 1] += PIECE as u64;
        }
    }
    until("every run is paid for", || dc.memory.used() == idle + runs * credit).await;
    let silence = timeout(Duration::from_millis(300), stream.answers.message()).await;
    assert!(silence.is_err(), "nothing is granted: {silence:?}");

    // As the store takes pieces, as many are granted, one for one.
    let mut granted = 0;
    for pieces in [1, 3, 8] {
        permits.add_permits(pieces);
        granted += pieces as u64 * PIECE as u64;
        let mut heard = 0;
        while heard < pieces as u64 * PIECE as u64 {
            let answer = stream.answer().await.unwrap().unwrap();
            let Answer::Grant(grant) = answer else { panic!("{answer:?}") };
            heard += grant.bytes;
            let at = &mut sent[grant.run as usize - 1];
            let (from, to) = (*at as usize, (*at + grant.bytes) as usize);
            stream.bytes(grant.run, whole.slice(from..to)).await;
            *at = to as u64;
        }
        assert_eq!(sent.iter().sum::<u64>(), runs * credit + granted);
        assert_eq!(dc.memory.used(), idle + runs * credit, "what is paid for stays the same");
    }
    let silence = timeout(Duration::from_millis(300), stream.answers.message()).await;
    assert!(silence.is_err(), "nothing more is granted: {silence:?}");

    // The store is well again, and all of it arrives.
    permits.add_permits(1 << 20);
    let mut stored = 0;
    while stored < runs {
        match stream.answer().await.unwrap().unwrap() {
            Answer::Grant(grant) => {
                let at = &mut sent[grant.run as usize - 1];
                let to = (*at + grant.bytes).min(CHUNK_LEN);
                if *at < to {
                    stream.bytes(grant.run, whole.slice(*at as usize..to as usize)).await;
                    *at = to;
                }
            }
            Answer::Stored(_) => stored += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(dc.store.chunks(file(ID)), runs as usize);
    assert_eq!(dc.memory.used(), idle);
}

#[tokio::test]
async fn a_run_that_waits_for_the_store_keeps_no_other_from_going_on() {
    let dc = Datacenter::patient();
    let permits = slow(&dc, ID);
    let mut client = client(&dc).await;
    client.create(new_file(ID, CHUNK_LEN)).await.unwrap();
    client.create(new_file(OTHER, 4 * CHUNK_LEN)).await.unwrap();
    let mut stream = Stream::open(&mut client).await;
    let whole = Bytes::from(content(4 * CHUNK_LEN));
    stream.begin(1, ID, 0, CHUNK_LEN).await;
    for piece in whole[..stream.terms.credit as usize].chunks(PIECE) {
        stream.bytes(1, Bytes::copy_from_slice(piece)).await;
    }
    let mut at = 0;
    let mut credit = u64::from(stream.terms.credit);
    stream.begin(2, OTHER, 0, whole.len() as u64).await;
    loop {
        while at < whole.len() && credit >= PIECE as u64 {
            stream.bytes(2, whole.slice(at..at + PIECE)).await;
            (at, credit) = (at + PIECE, credit - PIECE as u64);
        }
        match stream.answer().await.unwrap().unwrap() {
            Answer::Grant(grant) => {
                assert_eq!(grant.run, 2, "the other waits for the store");
                credit += grant.bytes;
            }
            Answer::Stored(stored) => {
                assert_eq!((stored.run, stored.receipt.unwrap().new_chunks), (2, 4));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    permits.add_permits(1 << 20);
    let mut at = stream.terms.credit as usize;
    loop {
        match stream.answer().await.unwrap().unwrap() {
            Answer::Grant(grant) => {
                let to = (at + grant.bytes as usize).min(CHUNK_LEN as usize);
                stream.bytes(1, whole.slice(at..to)).await;
                at = to;
            }
            Answer::Stored(stored) => return assert_eq!(stored.run, 1),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_run_that_is_refused_ends_no_other() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    client.create(new_file(ID, 4 * CHUNK_LEN + 5)).await.unwrap();
    let mut stream = Stream::open(&mut client).await;
    let whole = content(CHUNK_LEN);
    let piece = |from: usize| Bytes::copy_from_slice(&whole[from..from + PIECE]);
    let mut run = 0;
    for (id, start, length, values, name) in [
        ("x", 0, CHUNK_LEN, 0, "invalid-id"),
        (ID, u64::MAX, CHUNK_LEN, 0, "chunk-index"),
        (ID, 5, CHUNK_LEN, 0, "chunk-index"),
        (ID, 1, CHUNK_LEN - 1, 0, "chunk-length"),
        (ID, 4, 6, 0, "chunk-length"),
        (ID, 0, 0, 0, "chunk-length"),
        (ID, 1, 2 * CHUNK_LEN, 0, "chunk-alignment"),
        (ID, 0, 3 * CHUNK_LEN, 0, "chunk-alignment"),
        (ID, 0, 9 * CHUNK_LEN, 0, "chunk-alignment"),
        (ID, 0, u64::MAX, 0, "chunk-alignment"),
        (ID, 0, CHUNK_LEN, 31, "invalid-parameter"),
        (ID, 0, CHUNK_LEN, 64, "invalid-parameter"),
        (ID, 0, CHUNK_LEN, 32 * 9, "invalid-parameter"),
    ] {
        run += 1;
        let begin = Begin { id: id.into(), start, length, values: vec![7; values].into() };
        // Bytes that are on their way meanwhile are nobody's fault.
        let data = if length >= CHUNK_LEN - 1 { piece(0) } else { Bytes::new() };
        stream.send(UploadRequest { run, begin: Some(begin), data }).await;
        if length >= CHUNK_LEN - 1 {
            stream.bytes(run, piece(PIECE)).await;
        }
        let outcome = stream.outcome().await.unwrap();
        assert_eq!((outcome.0, outcome.1.unwrap_err().as_str()), (run, name), "{start} {length} {values}");
    }
    // Bytes that are not what was announced, more than were announced, and other bytes than are stored.
    let begin = Begin { id: ID.into(), start: 4, length: 5, values: vec![7; 32].into() };
    stream.send(UploadRequest { run: 100, begin: Some(begin), data: Bytes::from_static(b"12345") }).await;
    assert_eq!(stream.outcome().await.unwrap(), (100, Err("chunk-value".into())));
    stream.begin(101, ID, 4, 5).await;
    stream.bytes(101, &b"123456"[..]).await;
    assert_eq!(stream.outcome().await.unwrap(), (101, Err("chunk-length".into())));
    stream.begin(102, ID, 4, 5).await;
    stream.bytes(102, &b"12345"[..]).await;
    assert_eq!(stream.outcome().await.unwrap().1.unwrap().new_chunks, 1);
    stream.begin(103, ID, 4, 5).await;
    stream.bytes(103, &b"12346"[..]).await;
    assert_eq!(stream.outcome().await.unwrap(), (103, Err("chunk-conflict".into())));
    // What never came whole is refused when the client closes its half.
    stream.begin(104, ID, 0, CHUNK_LEN).await;
    stream.bytes(104, piece(0)).await;
    stream.requests = None;
    assert_eq!(stream.outcome().await.unwrap(), (104, Err("truncated".into())));
    assert!(stream.answer().await.unwrap().is_none(), "and the stream has ended well");
    assert_eq!((dc.store.chunks(file(ID)), dc.memory.used()), (1, 0));
}

#[tokio::test]
async fn who_sends_past_a_credit_is_cut_off_by_name() {
    let dc = Datacenter::patient();
    slow(&dc, ID);
    let mut client = client(&dc).await;
    client.create(new_file(ID, 64 * CHUNK_LEN)).await.unwrap();
    let exceeded = (Code::FailedPrecondition, "credit-exceeded".to_owned());
    let piece = Bytes::from(content(PIECE as u64));

    let mut stream = Stream::open(&mut client).await;
    stream.begin(1, ID, 0, CHUNK_LEN).await;
    for _ in 0..=stream.terms.credit as usize / PIECE {
        stream.bytes(1, piece.clone()).await;
    }
    assert_eq!(stream.end().await, exceeded, "more bytes");

    let mut stream = Stream::open(&mut client).await;
    for run in 0..=u64::from(stream.terms.runs) {
        stream.begin(run + 1, ID, run, CHUNK_LEN).await;
    }
    assert_eq!(stream.end().await, exceeded, "more runs");

    // A run that was refused is no way to send for ever.
    let mut stream = Stream::open(&mut client).await;
    stream.begin(1, "x", 0, CHUNK_LEN).await;
    assert_eq!(stream.outcome().await.unwrap().1.unwrap_err(), "invalid-id");
    for _ in 0..=stream.terms.credit as usize / PIECE {
        stream.bytes(1, piece.clone()).await;
    }
    assert_eq!(stream.end().await, exceeded, "more bytes for a run that is answered");
    until("all is given back", || dc.memory.used() == 0).await;
    assert_eq!(dc.store.chunks(file(ID)), 0);
}

#[tokio::test]
async fn messages_that_make_no_sense_end_the_stream_by_name() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    client.create(new_file(ID, 8 * CHUNK_LEN)).await.unwrap();
    let begin = |run| UploadRequest {
        run,
        begin: Some(Begin { id: ID.into(), start: 0, length: CHUNK_LEN, values: Bytes::new() }),
        data: Bytes::new(),
    };
    let data = |run, len: usize| UploadRequest { run, begin: None, data: vec![0; len].into() };
    let invalid = (Code::InvalidArgument, "invalid-parameter".to_owned());
    for (what, messages) in [
        ("nothing at all", vec![UploadRequest::default()]),
        ("run 0 is never higher", vec![begin(0)]),
        ("the same number again", vec![begin(7), begin(7)]),
        ("a lower number", vec![begin(7), begin(6)]),
        ("bytes of no run", vec![data(1, PIECE)]),
        ("crumbs", vec![begin(1), data(1, 100)]),
    ] {
        let mut stream = Stream::open(&mut client).await;
        for message in messages {
            stream.send(message).await;
        }
        assert_eq!(stream.end().await, invalid, "{what}");
    }
    let mut stream = Stream::open(&mut client).await;
    stream.send(begin(1)).await;
    stream.bytes(1, vec![0; stream.terms.max_piece as usize + (8 << 10)]).await;
    assert_eq!(stream.end().await, (Code::OutOfRange, "too-large".into()));
    until("all is given back", || dc.memory.used() == 0).await;
}

#[tokio::test]
async fn runs_past_the_memory_budget_are_refused_one_by_one() {
    let dc = Datacenter::made(EdgeSettings::default(), 1 << 20, Pace::default());
    slow(&dc, ID);
    let mut client = client(&dc).await;
    client.create(new_file(ID, 8 * CHUNK_LEN)).await.unwrap();
    let mut stream = Stream::open(&mut client).await;
    stream.begin(1, ID, 0, CHUNK_LEN).await;
    stream.begin(2, ID, 1, CHUNK_LEN).await;
    let (run, outcome) = stream.outcome().await.unwrap();
    assert_eq!((run, outcome.unwrap_err().as_str()), (2, "overloaded"));
    assert!(dc.metrics.encode().unwrap().contains(r#"reason="memory"} 1"#));
    // And a stream for which there is no room at all is refused as a whole.
    let (_keep, receiver) = mpsc::channel(1);
    let error = client.upload(ReceiverStream::new(receiver)).await.unwrap_err();
    assert_eq!(problem(&error), (Code::Unavailable, "overloaded".into()));
}

#[tokio::test]
async fn streams_that_stall_are_ended_by_name() {
    let settings = EdgeSettings { idle: Duration::from_secs(3), ..EdgeSettings::default() };
    let dc = Datacenter::with(settings, 64 << 20);
    let mut client = client(&dc).await;
    client.create(new_file(ID, CHUNK_LEN)).await.unwrap();
    let mut stream = Stream::open(&mut client).await;
    assert_eq!(stream.end().await, (Code::DeadlineExceeded, "timeout".into()), "no run");
    // A run whose bytes do not come is refused by the worker; what follows is the stream without one.
    let mut stream = Stream::open(&mut client).await;
    stream.begin(1, ID, 0, CHUNK_LEN).await;
    stream.bytes(1, vec![0; PIECE]).await;
    assert_eq!(stream.outcome().await.unwrap(), (1, Err("timeout".into())));
    assert_eq!(stream.end().await, (Code::DeadlineExceeded, "timeout".into()));
    until("all is given back", || dc.memory.used() == 0).await;
    assert_eq!(dc.store.chunks(file(ID)), 0);
    assert!(dc.metrics.encode().unwrap().contains(r#"reason="stalled"} 2"#));
}

#[tokio::test]
async fn a_stream_that_breaks_off_stores_nothing_half() {
    let dc = Datacenter::patient();
    let mut client = client(&dc).await;
    client.create(new_file(ID, CHUNK_LEN)).await.unwrap();
    let stream = Stream::open(&mut client).await;
    stream.begin(1, ID, 0, CHUNK_LEN).await;
    stream.bytes(1, vec![0; PIECE]).await;
    until("the run has begun", || dc.memory.used() > 600 << 10).await;
    drop(stream);
    until("the stream is gone", || dc.memory.used() == 0).await;
    assert_eq!(dc.store.chunks(file(ID)), 0);
    until("it counts as cancelled", || {
        let text = dc.metrics.encode().unwrap();
        text.contains(r#"rpc_method="sluice.v1.Ingest/Upload",rpc_response_status_code="CANCELLED""#)
    })
    .await;
}

#[tokio::test]
async fn a_datacenter_that_stops_finishes_the_runs_and_begins_none() {
    let dc = Datacenter::patient();
    let permits = slow(&dc, ID);
    let mut client = client(&dc).await;
    client.create(new_file(ID, CHUNK_LEN)).await.unwrap();
    let mut stream = Stream::open(&mut client).await;
    let whole = Bytes::from(content(CHUNK_LEN));
    let credit = stream.terms.credit as usize;
    stream.begin(1, ID, 0, CHUNK_LEN).await;
    stream.bytes(1, whole.slice(..credit)).await;
    until("the run has begun", || dc.memory.used() > 600 << 10).await;
    let tasks = dc.tasks.clone();
    let stop = tokio::spawn(async move { tasks.stop(Duration::from_secs(20)).await });
    dc.tasks.draining().await;
    permits.add_permits(1 << 20);
    let mut at = credit;
    let receipt = loop {
        match stream.answer().await.unwrap().unwrap() {
            Answer::Grant(grant) => {
                let to = (at + grant.bytes as usize).min(CHUNK_LEN as usize);
                stream.bytes(1, whole.slice(at..to)).await;
                at = to;
            }
            Answer::Stored(stored) => break stored.receipt.unwrap(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(receipt.new_chunks, 1);
    assert_eq!(stream.end().await, (Code::Unavailable, "stopping".into()));
    assert_eq!(stop.await.unwrap(), sluice_node::shutdown::Stopped::Clean);
}
