//! One URL: each operation of `/v1` as one request, without any retry.
//!
//! An answer is parsed here, once: afterwards it is a typed body or a [`ClientError`]. A body that stands still is
//! given up after the stall timeout, in either direction, so that a datacenter that dies without a word is noticed.

use std::error::Error;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RANGE, RETRY_AFTER};
use http::{Method, StatusCode};
use serde::de::DeserializeOwned;
use sluice_engine::drain::Phase;
use sluice_engine::hash::ChainingValue;
use sluice_proto::http::{
    About, ChunkReceipt, CreateFile, DrainStatus, FilePage, FileStatus, ProblemDetails, Revoke,
    RevokedTokens, SettleFile, StartDrain, State, TenantStatus, TreeNode,
};
use sluice_proto::problem::Problem;
use tokio::time::{Instant, timeout};
use url::Url;
use uuid::Uuid;

use crate::config::{ConfigError, Timeouts};
use crate::error::ClientError;
use crate::hosts::Hosts;
use crate::refused::{Operation, Refused};
use crate::wire::{Answer, Request, Wire};

/// The largest answer that is read into memory: a page of a list, or the values of 4,096 chunks.
const MAX_ANSWER: usize = 8 << 20;

/// The longest that a server may keep its callers away.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Says that a client goes where it is sent.
const PREFER: &str = "prefer";

/// How long a datacenter is asked not to send requests on, after that led to nothing.
const STAYS: Duration = Duration::from_secs(30);

/// How often one request may be sent on.
const MAX_REDIRECTS: usize = 3;

/// Which files to list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListFilter {
    /// Only those in this state.
    pub state: Option<State>,
    /// How many at most; the server has a limit of its own.
    pub limit: Option<usize>,
    /// Only those with ids above.
    pub after: Option<Uuid>,
}

/// What to do about the drain of a datacenter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DrainRequest {
    /// See it.
    Show,
    /// Begin it, or change how it goes on.
    Begin {
        /// Name of the datacenter that takes over.
        to: String,
        /// How far to hand over.
        phase: Phase,
        /// Whether files move too.
        evacuate: bool,
    },
    /// End it.
    End,
}

/// The edge at one URL.
#[derive(Debug)]
pub(crate) struct Door {
    /// Its place in the configuration.
    pub(crate) url: usize,
    wire: Wire,
    hosts: Arc<Hosts>,
    base: Url,
    authorization: HeaderValue,
    timeouts: Timeouts,
    /// The datacenter's name, once it has said it.
    dc: OnceLock<String>,
    /// Until when it asks not to be sent on.
    stays: Mutex<Option<Instant>>,
}

impl Door {
    pub(crate) fn new(
        wire: Wire,
        hosts: Arc<Hosts>,
        (place, url): (usize, &str),
        authorization: HeaderValue,
        timeouts: Timeouts,
    ) -> Result<Self, ConfigError> {
        let bad = |reason: String| ConfigError::Url { url: url.to_owned(), reason };
        let mut base = Url::parse(url.trim()).map_err(|error| bad(error.to_string()))?;
        if base.scheme() != "https" {
            return Err(bad("expected https".into()));
        }
        if !base.path().ends_with('/') {
            let path = format!("{}/", base.path());
            base.set_path(&path);
        }
        base.set_query(None);
        base.set_fragment(None);
        hosts.add(&base);
        let (dc, stays) = (OnceLock::new(), Mutex::default());
        Ok(Self { url: place, wire, hosts, base, authorization, timeouts, dc, stays })
    }

    /// The datacenter's name, or the URL until it is known.
    pub(crate) fn name(&self) -> String {
        self.dc.get().cloned().unwrap_or_else(|| self.base.as_str().trim_end_matches('/').to_owned())
    }

    pub(crate) async fn about(&self) -> Result<About, ClientError> {
        let request = self.request(Method::GET, "v1", Operation::About)?;
        let about: About = self.json(Operation::About, request, Duration::ZERO).await?.1;
        let urls = about.dcs.iter().filter_map(|dc| dc.url.as_deref());
        urls.filter_map(|url| Url::parse(url).ok()).for_each(|url| self.hosts.add(&url));
        Ok(about)
    }

    /// Whether it was new, and where it stands.
    pub(crate) async fn create(
        &self,
        id: Uuid,
        file: &CreateFile,
    ) -> Result<(bool, FileStatus), ClientError> {
        let operation = Operation::Create { id };
        let request = self.request(Method::POST, "v1/files", operation)?.json(file);
        let (status, body) = self.json(operation, request, Duration::ZERO).await?;
        Ok((status == StatusCode::CREATED, body))
    }

    /// Says how large a file is that was created without a size.
    pub(crate) async fn settle(&self, id: Uuid, size: u64) -> Result<FileStatus, ClientError> {
        let operation = Operation::Settle { id };
        let request = self.request(Method::PATCH, &format!("v1/files/{id}"), operation)?;
        Ok(self.json(operation, request.json(&SettleFile { size }), Duration::ZERO).await?.1)
    }

    /// Metadata and bytes in one request.
    pub(crate) async fn create_whole(
        &self,
        id: Uuid,
        file: &CreateFile,
        bytes: Bytes,
    ) -> Result<(bool, FileStatus), ClientError> {
        let operation = Operation::Create { id };
        let request = self
            .request(Method::POST, "v1/files", operation)?
            .header("file-metadata", header_json(file))
            .header("content-type", "application/octet-stream")
            .body(bytes);
        let watch = request.watch.clone();
        let answer = async {
            let response = self.check(operation, self.send(operation, request).await?).await?;
            let new = response.status() == StatusCode::CREATED;
            Ok((new, self.parse(operation, response).await?))
        };
        tokio::select! {
            created = answer => created,
            () = watch.stalled(self.timeouts.stall, self.timeouts.answer) => {
                Err(self.unreachable(operation, "it stood still".into()))
            }
        }
    }

    pub(crate) async fn put_chunks(
        &self,
        id: Uuid,
        start: u64,
        values: &[ChainingValue],
        bytes: Bytes,
    ) -> Result<ChunkReceipt, ClientError> {
        let operation = Operation::Chunks { start, count: values.len() as u64 };
        let announced: Vec<String> = values.iter().map(ToString::to_string).collect();
        let request = self
            .request(Method::PUT, &format!("v1/files/{id}/chunks/{start}"), operation)?
            .header("chunk-value", announced.join(","))
            .header("content-type", "application/octet-stream")
            .body(bytes);
        let watch = request.watch.clone();
        let answer = async {
            let response = self.check(operation, self.send(operation, request).await?).await?;
            self.parse(operation, response).await
        };
        tokio::select! {
            receipt = answer => receipt,
            () = watch.stalled(self.timeouts.stall, self.timeouts.answer) => {
                Err(self.unreachable(operation, "it stood still".into()))
            }
        }
    }

    /// With `wait`, the server answers when the state is reached or the time is up.
    pub(crate) async fn status(
        &self,
        id: Uuid,
        wait: Option<(State, Duration)>,
    ) -> Result<FileStatus, ClientError> {
        let operation = Operation::Status { id };
        let mut request = self.request(Method::GET, &format!("v1/files/{id}"), operation)?;
        let mut extra = Duration::ZERO;
        if let Some((state, longest)) = wait {
            extra = longest;
            request = request.query("wait", state.name()).query("timeout", longest.as_secs().max(1));
        }
        Ok(self.json(operation, request, extra).await?.1)
    }

    pub(crate) async fn list(&self, filter: ListFilter) -> Result<FilePage, ClientError> {
        let operation = Operation::List;
        let mut request = self.request(Method::GET, "v1/files", operation)?;
        if let Some(state) = filter.state {
            request = request.query("state", state.name());
        }
        if let Some(limit) = filter.limit {
            request = request.query("limit", limit);
        }
        if let Some(after) = filter.after {
            request = request.query("after", after);
        }
        Ok(self.json(operation, request, Duration::ZERO).await?.1)
    }

    pub(crate) async fn revoke(&self, revoke: &Revoke) -> Result<RevokedTokens, ClientError> {
        let operation = Operation::Revoke { tenant: revoke.tenant };
        let request = self.request(Method::POST, "v1/admin/revocations", operation)?.json(revoke);
        Ok(self.json(operation, request, Duration::ZERO).await?.1)
    }

    pub(crate) async fn tenant(&self, tenant: u64) -> Result<TenantStatus, ClientError> {
        let operation = Operation::Tenant { tenant };
        let request = self.request(Method::GET, &format!("v1/admin/tenants/{tenant}"), operation)?;
        Ok(self.json(operation, request, Duration::ZERO).await?.1)
    }

    pub(crate) async fn tree(&self, id: Uuid, start: u64, level: u8) -> Result<TreeNode, ClientError> {
        let operation = Operation::Tree { start, level };
        let request = self
            .request(Method::GET, &format!("v1/files/{id}/tree"), operation)?
            .query("start", start)
            .query("level", level);
        Ok(self.json(operation, request, Duration::ZERO).await?.1)
    }

    /// Shows, begins, or ends the datacenter's drain.
    pub(crate) async fn drain(&self, request: &DrainRequest) -> Result<DrainStatus, ClientError> {
        let (operation, path) = (Operation::Drain, "v1/drain");
        let request = match request {
            DrainRequest::Show => self.request(Method::GET, path, operation)?,
            DrainRequest::End => self.request(Method::DELETE, path, operation)?,
            DrainRequest::Begin { to, phase, evacuate } => {
                let body = StartDrain { to: to.clone(), phase: phase.name().to_owned(), evacuate: *evacuate };
                self.request(Method::PUT, path, operation)?.json(&body)
            }
        };
        Ok(self.json(operation, request, Duration::ZERO).await?.1)
    }

    pub(crate) async fn remove(&self, id: Uuid) -> Result<(), ClientError> {
        let operation = Operation::Remove { id };
        let request = self.request(Method::DELETE, &format!("v1/files/{id}"), operation)?;
        let answer = async { self.check(operation, self.send(operation, request).await?).await };
        self.in_time(operation, Duration::ZERO, answer).await.map(|_| ())
    }

    /// The `len` bytes from `offset`, which are those of `operation`'s chunks.
    pub(crate) async fn content(
        &self,
        id: Uuid,
        offset: u64,
        len: usize,
        operation: Operation,
    ) -> Result<Vec<u8>, ClientError> {
        let last = offset + (len as u64).saturating_sub(1);
        let request = self
            .request(Method::GET, &format!("v1/files/{id}/content"), operation)?
            .header(RANGE, format!("bytes={offset}-{last}"));
        let opened = async { self.check(operation, self.send(operation, request).await?).await };
        let mut response = self.in_time(operation, Duration::ZERO, opened).await?;
        // A server may answer a range that is the whole file with 200; anything else must be the part asked for.
        let whole = response.status() == StatusCode::OK && offset == 0;
        if response.status() != StatusCode::PARTIAL_CONTENT && !whole {
            let cause = format!("expected a part (206), got {}", response.status());
            return Err(self.malformed(operation, cause, trace(response.headers())));
        }
        let mut bytes = Vec::with_capacity(len);
        while let Some(piece) = self.piece(operation, &mut response).await? {
            if bytes.len() + piece.len() > len {
                let cause = format!("more than the {len} bytes asked for");
                return Err(self.malformed(operation, cause, trace(response.headers())));
            }
            bytes.extend_from_slice(&piece);
        }
        if bytes.len() < len {
            let cause = format!("the body ended after {} of {len} bytes", bytes.len());
            return Err(self.unreachable(operation, cause));
        }
        Ok(bytes)
    }

    fn request(&self, method: Method, path: &str, operation: Operation) -> Result<Request, ClientError> {
        let url = self
            .base
            .join(path)
            .map_err(|error| self.malformed(operation, format!("no URL for {path}: {error}"), None))?;
        let request = Request::new(method, url).header(AUTHORIZATION, self.authorization.clone());
        let stays = self.stays().is_some_and(|until| Instant::now() < until);
        // Where it is sent it goes, unless that led nowhere just now.
        Ok(if stays { request } else { request.header(PREFER, "redirect") })
    }

    /// Asks not to be sent on for a while.
    fn stay(&self) {
        *self.stays() = Some(Instant::now() + STAYS);
    }

    fn stays(&self) -> MutexGuard<'_, Option<Instant>> {
        // One value, whole at any time.
        self.stays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn json<T: DeserializeOwned>(
        &self,
        operation: Operation,
        request: Request,
        extra: Duration,
    ) -> Result<(StatusCode, T), ClientError> {
        let answer = async {
            let response = self.check(operation, self.send(operation, request).await?).await?;
            let status = response.status();
            Ok((status, self.parse(operation, response).await?))
        };
        self.in_time(operation, extra, answer).await
    }

    async fn in_time<T>(
        &self,
        operation: Operation,
        extra: Duration,
        answer: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        let longest = self.timeouts.answer + extra;
        match timeout(longest, answer).await {
            Ok(result) => result,
            Err(_) => Err(self.unreachable(operation, format!("no answer in {} s", longest.as_secs_f32()))),
        }
    }

    /// Sends a request, and follows where it is sent on to, with all that belongs to it. Where that leads to nobody, or to a
    /// datacenter that refuses for reasons of its own, the first one is to do it itself.
    async fn send(&self, operation: Operation, mut request: Request) -> Result<Answer, ClientError> {
        let first = request.url.clone();
        let mut trip = Trip { door: self, is_away: false };
        let (mut sent_on, mut is_back) = (0, false);
        loop {
            let sent = self.wire.send(&request).await;
            let leads_nowhere = sent.as_ref().map_or(true, |answer| is_no_verdict(answer.status()));
            if trip.is_away && leads_nowhere && !is_back {
                trip.ends_in_vain();
                is_back = true;
                request.url = first.clone();
                request.forget(PREFER);
                continue;
            }
            let mut answer = sent.map_err(|error| match untrusted(&*error) {
                Some(cause) => ClientError::Untrusted { at: self.name(), operation, cause },
                None => self.unreachable(operation, root_cause(&*error)),
            })?;
            if !matches!(answer.status(), StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT) {
                if let Some(dc) = text(answer.headers(), "sluice-dc").filter(|_| !trip.is_away) {
                    // The first name stays: one URL is one datacenter.
                    let _ = self.dc.set(dc);
                }
                answer.is_from_elsewhere = std::mem::take(&mut trip.is_away);
                return Ok(answer);
            }
            if sent_on == MAX_REDIRECTS {
                // Datacenters that point at one another will not do so for long.
                let cause = format!("it was sent on more than {MAX_REDIRECTS} times");
                return Err(self.unreachable(operation, cause));
            }
            sent_on += 1;
            request.url = self.sent_on_to(operation, &request.url, answer.headers()).await?;
            trip.is_away = true;
        }
    }

    /// Where an answer sends a request on to, if that is a host of this cluster: the token goes nowhere else.
    async fn sent_on_to(
        &self,
        operation: Operation,
        from: &Url,
        headers: &HeaderMap,
    ) -> Result<Url, ClientError> {
        let location = text(headers, LOCATION.as_str()).unwrap_or_default();
        let Ok(to) = from.join(&location) else {
            let cause = format!("it sends on to {location:?}, which is no URL");
            return Err(self.malformed(operation, cause, trace(headers)));
        };
        // A datacenter that this client was not told of may be one all the same: those that it trusts know. What asks
        // must not be sent on itself.
        if !self.hosts.has(&to) && operation != Operation::About {
            Box::pin(self.about()).await?;
        }
        if self.hosts.has(&to) {
            return Ok(to);
        }
        let cause = "it is no https URL of a datacenter of this cluster".to_owned();
        Err(ClientError::SentAway { at: self.name(), operation, to: to.into(), cause })
    }

    /// Passes what succeeded; turns the rest into an error.
    async fn check(&self, operation: Operation, response: Answer) -> Result<Answer, ClientError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let trace = trace(response.headers());
        let retry_after = text(response.headers(), RETRY_AFTER.as_str())
            .and_then(|seconds| seconds.parse().ok())
            .map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
        let body = self.body(operation, response).await.unwrap_or_default();
        let refused = match serde_json::from_slice::<ProblemDetails>(&body) {
            Ok(problem) => Refused {
                code: problem.code().to_owned(),
                problem: Problem::from_code(problem.code()),
                dc: problem.dc,
                operation,
                status: status.as_u16(),
                detail: problem.detail,
                hint: problem.hint,
                trace: Some(problem.trace).filter(|trace| !trace.is_empty()).or(trace),
                retry_after,
            },
            // Not from an edge: from a proxy before it that found none, or from something else altogether.
            Err(_) if matches!(status.as_u16(), 502..=504) => {
                return Err(self.unreachable(operation, format!("something before it answered {status}")));
            }
            Err(_) => {
                let cause = format!("{status} without problem details");
                return Err(self.malformed(operation, cause, trace));
            }
        };
        Err(ClientError::Refused(Box::new(refused)))
    }

    async fn parse<T: DeserializeOwned>(
        &self,
        operation: Operation,
        response: Answer,
    ) -> Result<T, ClientError> {
        let trace = trace(response.headers());
        let body = self.body(operation, response).await?;
        serde_json::from_slice(&body).map_err(|error| self.malformed(operation, error.to_string(), trace))
    }

    async fn body(&self, operation: Operation, mut response: Answer) -> Result<Vec<u8>, ClientError> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece(operation, &mut response).await? {
            if body.len() + piece.len() > MAX_ANSWER {
                let cause = format!("over {MAX_ANSWER} bytes");
                return Err(self.malformed(operation, cause, trace(response.headers())));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }

    async fn piece(&self, operation: Operation, response: &mut Answer) -> Result<Option<Bytes>, ClientError> {
        let cause = match timeout(self.timeouts.stall, response.chunk()).await {
            Ok(Ok(piece)) => return Ok(piece),
            Ok(Err(error)) => root_cause(&*error),
            Err(_) => "it stood still".into(),
        };
        if response.is_from_elsewhere {
            self.stay();
        }
        Err(self.unreachable(operation, cause))
    }

    fn unreachable(&self, operation: Operation, cause: String) -> ClientError {
        ClientError::Unreachable { at: self.name(), operation, cause }
    }

    fn malformed(&self, operation: Operation, cause: String, trace: Option<String>) -> ClientError {
        ClientError::Malformed { at: self.name(), operation, cause, trace }
    }
}

/// A request on its way, which may be that to another datacenter. One that is given up there, by whoever lost patience, led
/// nowhere.
struct Trip<'a> {
    door: &'a Door,
    is_away: bool,
}

impl Trip<'_> {
    fn ends_in_vain(&mut self) {
        self.is_away = false;
        self.door.stay();
    }
}

impl Drop for Trip<'_> {
    fn drop(&mut self) {
        if self.is_away {
            self.ends_in_vain();
        }
    }
}

/// Whether an answer says nothing of a request, only that it could not be taken there now, or not of this token: each
/// datacenter has clocks, quotas and rates of its own, and a token counts only where it is meant to.
fn is_no_verdict(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    )
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn trace(headers: &HeaderMap) -> Option<String> {
    text(headers, "trace-id")
}

/// The innermost cause: `hyper` wraps it in words that say nothing.
fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// What is wrong with the server's certificate, if that is why there is no connection: waiting does not mend it.
fn untrusted(error: &(dyn Error + 'static)) -> Option<String> {
    let mut cause = error;
    loop {
        // An I/O error passes over what it wraps when it is asked for its source.
        let wrapped = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let tls = wrapped.and_then(|error| error.downcast_ref::<rustls::Error>());
        if let Some(rustls::Error::InvalidCertificate(reason)) = tls {
            return Some(format!("its certificate does not hold: {reason:?}"));
        }
        cause = match wrapped {
            Some(wrapped) => wrapped,
            None => cause.source()?,
        };
    }
}

/// JSON that may stand in a header: what is not ASCII is escaped.
fn header_json(file: &CreateFile) -> String {
    let json = serde_json::to_string(file).unwrap_or_default();
    let mut out = String::with_capacity(json.len());
    for unit in json.encode_utf16() {
        match u8::try_from(unit) {
            Ok(byte @ 0x20..0x7F) => out.push(char::from(byte)),
            Ok(_) | Err(_) => out.push_str(&format!("\\u{unit:04x}")),
        }
    }
    out
}
