//! Everything about a file but its bytes: create, list, status, tree, delete; and where the caller is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use http_body::Body;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{BadHash, Root};
use sluice_engine::ids::ClientFileId;
use sluice_engine::limits::{CHUNK_LEN, UNIT_LEVEL};
use sluice_engine::metadata::MetadataFields;
use sluice_engine::span::Place;
use sluice_node::clock;
use sluice_proto::calls::{ListQuery, NewFile, Wait, Way};
use sluice_proto::http::{CreateFile, FileStatus, SettleFile, State as FileState};
use sluice_proto::problem::{Problem, Refusal};

use crate::App;
use crate::answer::{Answer, invalid, json, sent_on};
use crate::chunks::{DOOR, content_length, refuse_encoding};
use crate::routes::{Caller, file_id, way};

/// The longest body of JSON, in bytes: four times the longest metadata record.
const MAX_JSON_LEN: usize = 64 << 10;

/// What is said of a file whose bytes are the body: the JSON that creates a file.
const FILE_METADATA: &str = "file-metadata";

/// Files in a page, unless the client says how many, and at most.
const PAGE: usize = 100;
const MAX_PAGE: usize = 1000;

/// How long a client that names no time waits for a state, and how long at most, in seconds.
const WAIT_SECS: u64 = 30;
const MAX_WAIT_SECS: u64 = 60;

/// Parameters of the path, or a problem with them.
pub(crate) type PathOf<T> = Result<Path<T>, PathRejection>;

/// The parameters of a path.
pub(crate) fn path<T>(path: PathOf<T>) -> Result<T, Refusal> {
    path.map(|Path(parameters)| parameters).map_err(|error| invalid(error.body_text()))
}

fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Refusal> {
    query.map(|Query(parameters)| parameters).map_err(|error| invalid(error.body_text()))
}

/// `GET /v1`
pub(crate) async fn about(State(app): State<Arc<App>>, Caller(context): Caller) -> Answer {
    json(StatusCode::OK, &app.parts.workers.about(&context).await?)
}

/// `POST /v1/files`
pub(crate) async fn create(State(app): State<Arc<App>>, Caller(context): Caller, request: Request) -> Answer {
    if request.headers().contains_key(FILE_METADATA) {
        return create_whole(&app, &context, request).await;
    }
    let (way, target) = (way(&request), request.uri().path().to_owned());
    let body = json_body(&app, request).await?;
    let new = NewFile { way, ..new_file(&body)? };
    let created = app.parts.workers.create(&context, new).await;
    created_answer(created.map_err(|refusal| sent_on(refusal, &target))?)
}

/// `POST /v1/files` with the file's bytes as its body, and what is said of it in a header.
async fn create_whole(app: &App, context: &SignedContext, request: Request) -> Answer {
    let began = Instant::now();
    let target = request.uri().path().to_owned();
    let result = take_whole(app, context, request).await;
    count_whole(app, DOOR, began, &result);
    created_answer(result.map_err(|refusal| sent_on(refusal, &target))?)
}

/// Counts a file that came whole, and how long it took.
pub(crate) fn count_whole(
    app: &App,
    door: &'static str,
    began: Instant,
    result: &Result<(bool, FileStatus), Refusal>,
) {
    let metrics = &app.parts.metrics;
    match result {
        Ok((is_new, _)) => {
            metrics.chunk_ack.observe(began.elapsed().as_secs_f64());
            metrics.count_whole(door, if *is_new { "stored" } else { "known" });
        }
        Err(refusal) => metrics.count_whole(door, refusal.problem.code()),
    }
}

/// Makes a file that is created one that comes whole, with so many bytes.
pub(crate) fn make_whole(new: &mut NewFile, len: u64) -> Result<(), Refusal> {
    if len > CHUNK_LEN {
        let detail = format!("the body has {len} bytes, a file of one request at most {CHUNK_LEN}");
        return Err(Refusal::new(Problem::TooLarge, detail)
            .hint("create the file without its bytes, and send them as chunks"));
    }
    if let Some(size) = new.fields.size.filter(|size| *size != len) {
        let detail = format!("size is {size}, and the body has {len} bytes");
        return Err(Refusal::new(Problem::InvalidMetadata, detail).hint("leave size out: the body says it"));
    }
    new.fields.size = Some(len);
    Ok(())
}

async fn take_whole(
    app: &App,
    context: &SignedContext,
    request: Request,
) -> Result<(bool, FileStatus), Refusal> {
    refuse_encoding(request.headers())?;
    let said = request.headers().get(FILE_METADATA).map_or(&[][..], HeaderValue::as_bytes);
    let mut new = NewFile { way: way(&request), ..new_file(said)? };
    // An empty body may come without a length.
    let len = match request.body().size_hint().exact() {
        Some(len) => len,
        None => content_length(request.headers())?,
    };
    make_whole(&mut new, len)?;
    app.parts.workers.admit_whole(context, new.id, len).await?;
    let memory = app.parts.memory.try_take(len).inspect_err(|_| app.parts.metrics.count_shed("memory"))?;
    let patience = app.settings.patience(len);
    let body = Limited::new(request.into_body(), CHUNK_LEN as usize).collect();
    let bytes = match tokio::time::timeout(patience, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(_)) => {
            return Err(Refusal::new(Problem::Truncated, "the body ended early").hint("send the file again"));
        }
        Err(_) => {
            app.parts.metrics.count_shed("slow-body");
            return Err(Refusal::new(Problem::Timeout, "the body took too long to arrive"));
        }
    };
    if bytes.len() as u64 != len {
        let detail = format!("the body ended after {} bytes, expected {len}", bytes.len());
        return Err(Refusal::new(Problem::Truncated, detail).hint("send the file again"));
    }
    // It is stored to its end, also when its client goes away.
    app.parts.workers.create_whole(context, new, memory.pay_for(bytes)).await
}

fn created_answer((is_new, status): (bool, FileStatus)) -> Answer {
    let id = status.id;
    let code = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    let mut response = json(code, &status)?;
    if let Ok(location) = HeaderValue::try_from(format!("/v1/files/{id}")) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

pub(crate) async fn json_body(app: &App, request: Request) -> Result<Bytes, Refusal> {
    let too_large = || {
        Refusal::new(Problem::TooLarge, format!("the body is longer than {MAX_JSON_LEN} bytes"))
            .hint("metadata goes here; send the file's bytes with PUT /v1/files/{id}/chunks/{index}")
    };
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    if declared
        .and_then(|length| length.parse::<u64>().ok())
        .is_some_and(|length| length > MAX_JSON_LEN as u64)
    {
        return Err(too_large());
    }
    let body = Limited::new(request.into_body(), MAX_JSON_LEN).collect();
    match tokio::time::timeout(app.settings.json, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(Refusal::new(Problem::Truncated, "the body ended early")),
        Err(_) => {
            app.parts.metrics.count_shed("slow-body");
            Err(Refusal::new(Problem::Timeout, "the body took too long to arrive"))
        }
    }
}

/// A body that is one JSON object: its members have names, which a list has not.
pub(crate) fn object<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    let invalid = |detail: String| Refusal::new(Problem::InvalidMetadata, detail);
    let text = std::str::from_utf8(body)
        .map_err(|error| invalid(format!("the body is not UTF-8 from byte {} on", error.valid_up_to())))?;
    if text.trim_start().starts_with('[') {
        return Err(invalid("the body is a list, expected an object".into()));
    }
    serde_json::from_str(text).map_err(|error| invalid(error.to_string()))
}

fn new_file(body: &[u8]) -> Result<NewFile, Refusal> {
    let invalid = |detail: String| Refusal::new(Problem::InvalidMetadata, detail);
    let file: CreateFile = object(body)?;
    let expected_root = match file.expected_root.as_deref().map(str::parse::<Root>).transpose() {
        Ok(root) => root,
        Err(error @ BadHash { .. }) => return Err(invalid(format!("expected_root: {error}"))),
    };
    Ok(NewFile {
        id: file.id.map_or_else(clock::new_file_id, ClientFileId::new),
        fields: MetadataFields {
            size: file.size,
            expiry_secs: file.expires_in,
            expected_root,
            name: file.name,
            content_type: file.content_type,
            user: file.metadata,
        },
        home: file.home,
        way: Way::Direct,
    })
}

/// `PATCH /v1/files/{id}`
pub(crate) async fn settle(
    State(app): State<Arc<App>>,
    Caller(context): Caller,
    id: PathOf<String>,
    request: Request,
) -> Answer {
    let id = file_id(&path(id)?)?;
    let body = json_body(&app, request).await?;
    let SettleFile { size } = object(&body)?;
    json(StatusCode::OK, &app.parts.workers.settle(&context, id, settled(size)?).await?)
}

/// The size of a file, once and for all.
pub(crate) fn settled(size: u64) -> Result<Geometry, Refusal> {
    Geometry::new(size).map_err(|error| Refusal::new(Problem::TooLarge, error.to_string()))
}

/// Parameters of `GET /v1/files`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ListParameters {
    state: Option<String>,
    limit: Option<usize>,
    after: Option<String>,
}

/// `GET /v1/files`
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Caller(context): Caller,
    parameters: Result<Query<ListParameters>, QueryRejection>,
) -> Answer {
    let ListParameters { state, limit, after } = query(parameters)?;
    let state = state.as_deref().map(state_named).transpose()?;
    let after = after.as_deref().map(file_id).transpose()?;
    let limit = page_limit(limit)?;
    json(StatusCode::OK, &app.parts.workers.list(&context, ListQuery { state, after, limit }).await?)
}

/// How many files a page holds.
pub(crate) fn page_limit(limit: Option<usize>) -> Result<usize, Refusal> {
    let limit = limit.unwrap_or(PAGE);
    if (1..=MAX_PAGE).contains(&limit) {
        Ok(limit)
    } else {
        Err(invalid(format!("limit is {limit}, expected 1 to {MAX_PAGE}")))
    }
}

fn state_named(name: &str) -> Result<FileState, Refusal> {
    FileState::from_name(name).ok_or_else(|| {
        let name: String = name.chars().take(40).collect();
        let states = FileState::ALL.map(FileState::name).join(", ");
        invalid(format!("there is no state {name:?}, expected one of {states}"))
    })
}

/// Parameters of `GET /v1/files/{id}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StatusParameters {
    wait: Option<String>,
    timeout: Option<u64>,
}

/// `GET /v1/files/{id}`
pub(crate) async fn status(
    State(app): State<Arc<App>>,
    Caller(context): Caller,
    id: PathOf<String>,
    parameters: Result<Query<StatusParameters>, QueryRejection>,
) -> Answer {
    let id = file_id(&path(id)?)?;
    let wait = wait(query(parameters)?)?;
    json(StatusCode::OK, &app.parts.workers.status(&context, id, wait).await?)
}

fn wait(StatusParameters { wait, timeout }: StatusParameters) -> Result<Option<Wait>, Refusal> {
    wait_for(wait.as_deref().map(state_named).transpose()?, timeout)
}

/// Which state is waited for, and how long.
pub(crate) fn wait_for(state: Option<FileState>, secs: Option<u64>) -> Result<Option<Wait>, Refusal> {
    let secs = secs.unwrap_or(WAIT_SECS);
    if secs > MAX_WAIT_SECS {
        return Err(invalid(format!("timeout is {secs} s, at most {MAX_WAIT_SECS} s can be waited for")));
    }
    let Some(state) = state else { return Ok(None) };
    match state {
        FileState::Complete | FileState::Assembled => {
            Ok(Some(Wait { state, timeout: Duration::from_secs(secs) }))
        }
        FileState::Receiving | FileState::Conflict | FileState::Dropped => {
            Err(invalid(format!("{} cannot be waited for, expected complete or assembled", state.name())))
        }
    }
}

/// Parameters of `GET /v1/files/{id}/tree`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TreeParameters {
    #[serde(default)]
    start: u64,
    #[serde(default)]
    level: u8,
}

/// `GET /v1/files/{id}/tree`
pub(crate) async fn tree(
    State(app): State<Arc<App>>,
    Caller(context): Caller,
    id: PathOf<String>,
    parameters: Result<Query<TreeParameters>, QueryRejection>,
) -> Answer {
    let id = file_id(&path(id)?)?;
    let TreeParameters { start, level } = query(parameters)?;
    let place = place(start, level)?;
    json(StatusCode::OK, &app.parts.workers.tree(&context, id, place).await?)
}

/// A place whose chunks can be listed.
pub(crate) fn place(start: u64, level: u8) -> Result<Place, Refusal> {
    if level > UNIT_LEVEL {
        return Err(invalid(format!("level is {level}, values are listed up to level {UNIT_LEVEL}")));
    }
    Place::new(start, level).map_err(|error| invalid(error.to_string()))
}

/// `DELETE /v1/files/{id}`
pub(crate) async fn remove(
    State(app): State<Arc<App>>,
    Caller(context): Caller,
    id: PathOf<String>,
) -> Answer {
    let id = file_id(&path(id)?)?;
    end(&app, &context, id).await?;
    Ok(no_content())
}

/// Ends a file. Again is as good as once.
pub(crate) async fn end(app: &App, context: &SignedContext, id: ClientFileId) -> Result<(), Refusal> {
    match app.parts.workers.remove(context, id).await {
        Err(refusal) if refusal.problem == Problem::Dropped => Ok(()),
        result => result,
    }
}

fn no_content() -> Response {
    let mut response = Response::default();
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}
