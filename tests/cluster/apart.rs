//! Tenants kept apart at every door: whatever is asked under the id of another's file, in whatever state that is, is answered
//! word for word as under an id that nobody ever used.
//!
//! The same questions are asked twice, each time by a tenant who has nothing: of another's file, and of none. What was
//! answered must be the same but for ids and traces, from the first question to the last: also while the asker makes a file
//! of its own under that id, and ends it.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use http::Method;
use sluice::datacenter::DatacenterSettings;
use sluice_aggregator::AggregatorSettings;
use sluice_client::WaitFor;
use sluice_engine::hash::Root;
use sluice_engine::ids::{DcId, TenantId};
use sluice_proto::http::CreateFile;
use sluice_proto::ingest::{
    Begin, CreateRequest, DeleteRequest, ListRequest, PutRequest, ReadRequest, SettleRequest, State,
    StatusRequest, TreeRequest, UploadRequest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};
use uuid::Uuid;

use crate::bed::{A, B, Bed, MIB, STRANGER, Web, chunk, eventually, new_file, noise};
use crate::ingest::Ingest;

/// Bytes of the files that are made: a chunk, and a short one.
const SIZE: usize = MIB + 5;

/// What was answered, question by question.
type Said = Vec<String>;

/// Somebody who asks under an id, over HTTP.
struct Asker<'a> {
    web: &'a Web,
    token: String,
    id: Uuid,
    said: Said,
}

impl Asker<'_> {
    async fn ask(&mut self, dc: DcId, method: Method, path: &str, headers: &[(&str, &str)], body: Bytes) {
        let asked = format!("{method} {path} at {dc}");
        let answer = self.web.ask_with(&self.token, dc, method, path, headers, body).await.unwrap();
        let trace = answer.headers.get("trace-id").map_or("", |trace| trace.to_str().unwrap()).to_owned();
        assert_eq!(trace.len(), 32, "{asked}");
        let mut headers: Vec<String> = answer
            .headers
            .iter()
            .filter(|(name, _)| *name != "date")
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        headers.sort();
        let body = match std::str::from_utf8(&answer.body) {
            Ok(text) => text.to_owned(),
            Err(_) => blake3::hash(&answer.body).to_string(),
        };
        let said = format!("{asked}: {} {headers:?} {body}", answer.status);
        self.said.push(said.replace(&trace, "TRACE").replace(&self.id.to_string(), "ID"));
    }

    /// About the file.
    async fn about(&mut self, dc: DcId, method: Method, rest: &str, body: impl Into<Bytes>) {
        let path = format!("/files/{}{rest}", self.id);
        self.ask(dc, method, &path, &[], body.into()).await;
    }

    /// All that can be asked of a file without making one.
    async fn look(&mut self, dc: DcId) {
        for (method, rest, body) in [
            (Method::GET, "", ""),
            (Method::GET, "?wait=complete&timeout=0", ""),
            (Method::GET, "/content", ""),
            (Method::HEAD, "/content", ""),
            (Method::GET, "/tree?start=0&level=1", ""),
            (Method::PATCH, "", r#"{"size":1048581}"#),
            (Method::PATCH, "", r#"{"size":5}"#),
            (Method::DELETE, "", ""),
        ] {
            self.about(dc, method, rest, body).await;
        }
        self.ask(dc, Method::GET, "/files", &[], Bytes::new()).await;
    }

    async fn create(&mut self, dc: DcId, file: &CreateFile) {
        let body = serde_json::to_vec(file).unwrap();
        self.ask(dc, Method::POST, "/files", &[("content-type", "application/json")], body.into()).await;
    }

    async fn whole(&mut self, dc: DcId, bytes: &'static [u8]) {
        let said = format!(r#"{{"id":"{}"}}"#, self.id);
        self.ask(dc, Method::POST, "/files", &[("file-metadata", &said)], Bytes::from_static(bytes)).await;
    }

    /// A file is made of a record and chunks, the last of which comes first.
    async fn make(&mut self) {
        let bytes = noise(180, SIZE);
        for last in [chunk(&bytes, 1), chunk(&bytes, 1), noise(181, 5)] {
            self.about(B, Method::PUT, "/chunks/1", last).await;
        }
        self.look(B).await;
        self.create(B, &new_file(self.id, SIZE)).await;
        self.create(B, &new_file(self.id, SIZE + 1)).await;
        self.about(B, Method::PUT, "/chunks/0", chunk(&bytes, 0)).await;
        self.about(B, Method::GET, "?wait=assembled&timeout=30", "").await;
    }

    /// The file is looked at and ended.
    async fn end(&mut self) {
        self.look(B).await;
        for method in [Method::GET, Method::DELETE] {
            self.about(B, method, "", "").await;
        }
        self.about(B, Method::PUT, "/chunks/0", noise(180, MIB)).await;
        self.whole(B, b"whole").await;
    }
}

fn asker(web: &Web, tenant: u64, id: Uuid) -> Asker<'_> {
    Asker { web, token: web.token(TenantId::new(tenant)), id, said: Said::new() }
}

/// In chunks, over HTTP.
async fn in_chunks(web: &Web, tenant: u64, id: Uuid) -> Said {
    let mut asker = asker(web, tenant, id);
    asker.look(A).await;
    asker.look(B).await;
    asker.make().await;
    asker.end().await;
    asker.said
}

/// Whole, over HTTP.
async fn whole(web: &Web, tenant: u64, id: Uuid) -> Said {
    let mut asker = asker(web, tenant, id);
    for bytes in [&b"whole"[..], b"whole", b"other"] {
        asker.whole(B, bytes).await;
    }
    asker.end().await;
    asker.said
}

/// The words of an answer over gRPC.
fn words<T: std::fmt::Debug>(answer: Result<Response<T>, Status>, id: Uuid) -> String {
    let said = match answer {
        Ok(answer) => format!("OK {:?}", answer.into_inner()),
        Err(status) => {
            let said = |name| status.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
            let trace = said("trace-id").unwrap_or_default();
            // A map in there comes in any order.
            let mut details = String::from_utf8_lossy(status.details()).replace(&trace, "TRACE").into_bytes();
            details.sort_unstable();
            format!(
                "{:?} {} {:?} {:?} {details:?}",
                status.code(),
                status.message().replace(&trace, "TRACE"),
                said("sluice-problem"),
                said("sluice-hint")
            )
        }
    };
    said.replace(&id.to_string(), "ID")
}

async fn look_over_grpc(door: &mut Ingest, id: Uuid, said: &mut Said) {
    let (name, file) = (id.to_string(), id);
    let status = StatusRequest { id: name.clone(), wait_for: State::Unspecified.into(), timeout_secs: None };
    said.push(words(door.status(status).await, file));
    said.push(words(door.tree(TreeRequest { id: name.clone(), start: 0, level: 1 }).await, file));
    let read = match door.read(ReadRequest { id: name.clone(), ..ReadRequest::default() }).await {
        Ok(pieces) => {
            let pieces: Vec<_> = pieces.into_inner().collect().await;
            let ended = pieces.iter().find_map(|piece| piece.as_ref().err().map(Status::code));
            let opened = pieces.iter().find_map(|piece| piece.as_ref().ok()?.opened.clone());
            let bytes = pieces.into_iter().flatten().flat_map(|piece| piece.data).collect::<Vec<u8>>();
            format!("{opened:?} {} {ended:?}", blake3::hash(&bytes))
        }
        Err(status) => words::<()>(Err(status), file),
    };
    said.push(read);
    for size in [SIZE as u64, 5] {
        said.push(words(door.settle(SettleRequest { id: name.clone(), size }).await, file));
    }
    said.push(words(door.delete(DeleteRequest { id: name }).await, file));
    said.push(words(door.list(ListRequest::default()).await, file));
}

/// One run over a stream, and what becomes of it.
pub(crate) async fn run_over_grpc(door: &mut Ingest, id: Uuid, start: u64, data: Bytes) -> String {
    let (requests, receiver) = mpsc::channel(2);
    let mut answers = door.upload(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    let begin = Begin { id: id.to_string(), start, length: data.len() as u64, values: Bytes::new() };
    requests.send(UploadRequest { run: 1, begin: Some(begin), data }).await.unwrap();
    drop(requests);
    let mut said = String::new();
    while let Some(answer) = answers.message().await.unwrap() {
        let answer = answer.answer.unwrap();
        let trace = match &answer {
            sluice_proto::ingest::upload_response::Answer::Refused(refused) => {
                refused.problem.as_ref().unwrap().trace.clone()
            }
            _ => "-".repeat(99),
        };
        said.push_str(&format!("{answer:?}").replace(&trace, "TRACE").replace(&id.to_string(), "ID"));
    }
    said
}

/// Over gRPC: in chunks, or whole.
async fn over_grpc(web: &Web, tenant: u64, id: Uuid, body: Option<&'static [u8]>) -> Said {
    let token = web.token(TenantId::new(tenant));
    let (mut a, mut b) = (web.ingest(A, &token), web.ingest(B, &token));
    let mut said = Said::new();
    let create = |size: usize| CreateRequest {
        id: id.to_string(),
        size: body.is_none().then_some(size as u64),
        body: body.map(Bytes::from_static),
        ..CreateRequest::default()
    };
    look_over_grpc(&mut a, id, &mut said).await;
    look_over_grpc(&mut b, id, &mut said).await;
    if body.is_some() {
        for _ in 0..2 {
            said.push(words(b.create(create(0)).await, id));
        }
    } else {
        let bytes = noise(180, SIZE);
        let put = |index, data| PutRequest { id: id.to_string(), index, data, value: Bytes::new() };
        said.push(run_over_grpc(&mut b, id, 1, chunk(&bytes, 1)).await);
        for last in [chunk(&bytes, 1), noise(181, 5)] {
            said.push(words(b.put(put(1, last)).await, id));
        }
        look_over_grpc(&mut b, id, &mut said).await;
        for size in [SIZE, SIZE + 1] {
            said.push(words(b.create(create(size)).await, id));
        }
        said.push(words(b.put(put(0, chunk(&bytes, 0))).await, id));
        let wait_for = State::Assembled.into();
        let wait = StatusRequest { id: id.to_string(), wait_for, timeout_secs: Some(30) };
        said.push(words(b.status(wait).await, id));
    }
    look_over_grpc(&mut b, id, &mut said).await;
    said.push(words(b.create(create(SIZE)).await, id));
    said.push(run_over_grpc(&mut b, id, 1, noise(180, 5)).await);
    said
}

/// A file of somebody in every state, each with what it is.
async fn files_of_somebody(bed: &Bed) -> Vec<(&'static str, Uuid)> {
    let bytes = noise(182, SIZE);
    let assembled = bed.upload(&[A, B], bytes.clone(), WaitFor::Assembled).await.id;
    bed.reach(B, assembled, sluice_proto::http::State::Assembled).await;
    let unfinished = bed.create(A, SIZE).await;
    bed.put_ok(A, unfinished, 0, chunk(&bytes, 0)).await;
    let open = Uuid::now_v7();
    assert_eq!(bed.post(B, &CreateFile { size: None, ..new_file(open, 0) }).await.status, 201);
    let small = Uuid::now_v7();
    let kept = bed.post_whole(A, &serde_json::json!({ "id": small }), "whole").await.unwrap();
    assert_eq!(kept.status, 201);
    let dropped = bed.create(B, SIZE).await;
    assert_eq!(bed.delete(B, dropped).await, 204);
    let conflict = Uuid::now_v7();
    let expected_root = Some(Root::of_bytes(b"something else").to_string());
    let created = bed.post(A, &CreateFile { expected_root, ..new_file(conflict, SIZE) }).await;
    assert_eq!(created.status, 201, "{:?}", created.body);
    for index in 0..2 {
        bed.put_ok(A, conflict, index, chunk(&bytes, index as usize)).await;
    }
    for dc in [A, B] {
        bed.reach(dc, conflict, sluice_proto::http::State::Conflict).await;
    }
    let orphan = Uuid::now_v7();
    assert_eq!(bed.put(B, orphan, 1, chunk(&bytes, 1)).await.unwrap().status, 202);
    vec![
        ("assembled", assembled),
        ("unfinished", unfinished),
        ("of an open size", open),
        ("small", small),
        ("dropped", dropped),
        ("in conflict", conflict),
        ("without metadata", orphan),
    ]
}

/// What its owner hears of each file.
async fn as_the_owner_sees(bed: &Bed, files: &[(&'static str, Uuid)]) -> Vec<(u16, Vec<u64>)> {
    let mut seen = Vec::new();
    for (_, id) in files {
        let answer = bed.get(B, &format!("/files/{id}"), &[]).await;
        let status = serde_json::from_slice::<sluice_proto::http::FileStatus>(&answer.body);
        let counts = status.map(|status| vec![status.state as u64, status.chunks, status.missing_chunks]);
        seen.push((answer.status.as_u16(), counts.unwrap_or_default()));
    }
    seen
}

/// Asks everything about these files of somebody else, at every door, and about none.
async fn are_kept_apart(bed: &Bed, files: &[(&'static str, Uuid)]) {
    let before = as_the_owner_sees(bed, files).await;
    // Each asker is somebody new, who has nothing else.
    let mut next = STRANGER.number();
    let mut somebody = || {
        next += 1;
        next
    };
    for door in ["chunks over HTTP", "whole over HTTP", "chunks over gRPC", "whole over gRPC"] {
        let ask = async |tenant: u64, id: Uuid| match door {
            "chunks over HTTP" => in_chunks(bed, tenant, id).await,
            "whole over HTTP" => whole(bed, tenant, id).await,
            "chunks over gRPC" => over_grpc(bed, tenant, id, None).await,
            _ => over_grpc(bed, tenant, id, Some(b"whole")).await,
        };
        let none = ask(somebody(), Uuid::now_v7()).await;
        assert!(none.len() >= 15, "{none:#?}");
        let asked = files.iter().map(|(what, id)| (*what, *id, somebody())).collect::<Vec<_>>();
        let all = join_all(asked.into_iter().map(async |(what, id, tenant)| (what, ask(tenant, id).await)));
        for (what, theirs) in all.await {
            for (theirs, none) in theirs.iter().zip(&none) {
                assert_eq!(theirs, none, "{door}, of a file that is {what}");
            }
            assert_eq!(theirs.len(), none.len());
        }
    }
    assert_eq!(as_the_owner_sees(bed, files).await, before, "nobody's file was touched");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_question_about_a_file_of_another_tenant_is_answered_as_about_none() {
    let bed = Bed::start(2).await;
    are_kept_apart(&bed, &files_of_somebody(&bed).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_about_a_file_that_waits_for_its_assembly_are_answered_as_about_none() {
    let absent_after = Duration::from_secs(600);
    let aggregator = AggregatorSettings { absent_after, ..AggregatorSettings::default() };
    let mut bed = Bed::reserve(2, DatacenterSettings { aggregator, ..DatacenterSettings::default() });
    // What dc-a dials can be cut: it hears of dc-b's chunks then, and cannot fetch them.
    let wire = bed.wire(A, B).await;
    for dc in [A, B] {
        bed.cluster.start(dc).await.unwrap();
    }
    let is_up = async |up: f64| (bed.metric(A, "sluice_peer_up", "peer=\"dc-b\"").await == up).then_some(());
    eventually("a link", async || is_up(1.0).await).await;
    let (id, bytes) = (bed.create(A, SIZE).await, noise(182, SIZE));
    eventually("the metadata at dc-b", async || {
        let put = bed.put(B, id, 1, chunk(&bytes, 1)).await.unwrap();
        assert!(put.status.is_success(), "{:?}", put.body);
        (put.status == 200).then_some(())
    })
    .await;
    wire.cut();
    eventually("a lost link", async || is_up(0.0).await).await;
    bed.put_ok(A, id, 0, chunk(&bytes, 0)).await;
    eventually("a complete file", async || {
        let status: sluice_proto::http::FileStatus = bed.get(A, &format!("/files/{id}"), &[]).await.json();
        (status.state == sluice_proto::http::State::Complete).then_some(())
    })
    .await;
    are_kept_apart(&bed, &[("complete", id)]).await;
    let status: sluice_proto::http::FileStatus = bed.get(A, &format!("/files/{id}"), &[]).await.json();
    assert_eq!(status.state, sluice_proto::http::State::Complete, "it was so all the while");
}
