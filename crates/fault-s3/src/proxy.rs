//! A proxy that does to each request what a test says.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// A request that came by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What S3 calls it.
    pub operation: &'static str,
    /// The key, with its prefix; of lists, the prefix that is listed.
    pub key: String,
    /// The number of the part, if it is about one.
    pub part: Option<u32>,
}

/// What is done to a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Refused with 503 SlowDown, and not done.
    SlowDown,
    /// Refused with 403 AccessDenied, and not done.
    Forbidden,
    /// Refused with 400 InvalidArgument, and not done.
    Invalid,
    /// Not done, and the connection closed.
    Lost,
    /// Done, and the connection closed instead of an answer.
    AnswerLost,
    /// The connection closed; done once [`Proxy::land`] is called.
    Late,
    /// Not done, and never answered.
    Hangs,
    /// Answered with 200, and an error inside; not done.
    ErrorInside,
    /// Done; from the list that is answered, keys are left out that have this in them.
    Without(String),
    /// Done; one bit of the body that is answered is turned.
    Garbled,
}

type Rule = Box<dyn Fn(&Seen) -> Option<Fault> + Send + Sync>;

struct State {
    upstream: SocketAddr,
    rule: Mutex<Rule>,
    seen: Mutex<Vec<Seen>>,
    landing: Notify,
    landed: Mutex<Vec<StatusCode>>,
}

/// A proxy. Dropping it ends it.
pub struct Proxy {
    address: SocketAddr,
    state: Arc<State>,
    _tasks: JoinSet<()>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({} -> {})", self.address, self.state.upstream)
    }
}

impl Proxy {
    /// A proxy before a server, which does nothing to requests yet.
    pub async fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            upstream,
            rule: Mutex::new(Box::new(|_| None)),
            seen: Mutex::new(Vec::new()),
            landing: Notify::new(),
            landed: Mutex::new(Vec::new()),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, state.clone()));
        Self { address, state, _tasks: tasks }
    }

    /// Where it listens, as a URL.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Does to each request from now on what `rule` says; `None` passes it on.
    pub fn rule(&self, rule: impl Fn(&Seen) -> Option<Fault> + Send + Sync + 'static) {
        *self.state.rule.lock().unwrap() = Box::new(rule);
    }

    /// Does nothing to requests from now on.
    pub fn behave(&self) {
        self.rule(|_| None);
    }

    /// The requests that came by since this was asked last.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.state.seen.lock().unwrap())
    }

    /// Lets requests land now that were [late](Fault::Late), and waits for `count` of them: how each was answered.
    pub async fn land(&self, count: usize) -> Vec<StatusCode> {
        self.state.landing.notify_waiters();
        tokio::time::timeout(Duration::from_secs(30), async {
            loop {
                let landed = self.state.landed.lock().unwrap().clone();
                if landed.len() >= count {
                    return landed;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("what is late lands when it is told to")
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let state = state.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| answer(state.clone(), request));
            // A service that fails closes the connection: that is what tells the client nothing.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
        while connections.try_join_next().is_some() {}
    }
}

/// That the connection is closed without an answer.
#[derive(Debug)]
struct Silence;

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no answer")
    }
}

impl std::error::Error for Silence {}

async fn answer(state: Arc<State>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Silence> {
    let seen = name(&request);
    state.seen.lock().unwrap().push(seen.clone());
    let fault = (state.rule.lock().unwrap())(&seen);
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Silence)?.to_bytes();
    let request = Request::from_parts(head, Full::new(body));
    let refused = |status: u16, code: &str| {
        let body = format!(
            "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>"
        );
        let response = Response::builder().status(status).header("content-type", "application/xml");
        Ok(response.body(Full::new(Bytes::from(body))).unwrap())
    };
    match fault {
        None => pass(&state, request).await,
        Some(Fault::SlowDown) => refused(503, "SlowDown"),
        Some(Fault::Forbidden) => refused(403, "AccessDenied"),
        Some(Fault::Invalid) => refused(400, "InvalidArgument"),
        Some(Fault::ErrorInside) => refused(200, "InternalError"),
        Some(Fault::Lost) => Err(Silence),
        Some(Fault::AnswerLost) => {
            pass(&state, request).await?;
            Err(Silence)
        }
        Some(Fault::Late) => {
            tokio::spawn(async move {
                state.landing.notified().await;
                if let Ok(answer) = pass(&state, request).await {
                    state.landed.lock().unwrap().push(answer.status());
                }
            });
            Err(Silence)
        }
        Some(Fault::Hangs) => {
            let never: Infallible = std::future::pending().await;
            match never {}
        }
        Some(Fault::Without(text)) => {
            let (mut head, body) = pass(&state, request).await?.into_parts();
            let body = body.collect().await.map_err(|_| Silence)?.to_bytes();
            let kept = without(&String::from_utf8_lossy(&body), &text);
            head.headers.remove("content-length");
            Ok(Response::from_parts(head, Full::new(Bytes::from(kept))))
        }
        Some(Fault::Garbled) => {
            let (head, body) = pass(&state, request).await?.into_parts();
            let mut body = body.collect().await.map_err(|_| Silence)?.to_bytes().to_vec();
            if let Some(byte) = body.first_mut() {
                *byte ^= 1;
            }
            Ok(Response::from_parts(head, Full::new(Bytes::from(body))))
        }
    }
}

/// A list without the objects that have a text in their keys.
fn without(list: &str, text: &str) -> String {
    let mut kept = String::new();
    let mut rest = list;
    while let Some((before, object)) = rest.split_once("<Contents>") {
        kept.push_str(before);
        let (object, after) = object.split_once("</Contents>").unwrap_or((object, ""));
        if !object.contains(text) {
            kept.push_str("<Contents>");
            kept.push_str(object);
            kept.push_str("</Contents>");
        }
        rest = after;
    }
    kept + rest
}

async fn pass(state: &State, request: Request<Full<Bytes>>) -> Result<Response<Full<Bytes>>, Silence> {
    let stream = TcpStream::connect(state.upstream).await.map_err(|_| Silence)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|_| Silence)?;
    let connection = tokio::spawn(connection);
    let (head, body) = sender.send_request(request).await.map_err(|_| Silence)?.into_parts();
    let body = body.collect().await.map_err(|_| Silence)?.to_bytes();
    drop(sender);
    connection.abort();
    Ok(Response::from_parts(head, Full::new(body)))
}

/// What S3 calls a request.
fn name<B>(request: &Request<B>) -> Seen {
    let uri = request.uri();
    let query: HashMap<&str, &str> =
        uri.query().unwrap_or("").split('&').map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect();
    let has = |name: &str| query.contains_key(name);
    let path = uri.path().trim_start_matches('/');
    let key = path.split_once('/').map_or("", |(_, key)| key);
    let copies = request.headers().contains_key("x-amz-copy-source");
    let operation = match request.method().as_str() {
        "PUT" if has("partNumber") && copies => "UploadPartCopy",
        "PUT" if has("partNumber") => "UploadPart",
        "PUT" => "PutObject",
        "GET" if has("list-type") => "ListObjectsV2",
        "GET" if has("uploads") => "ListMultipartUploads",
        "GET" => "GetObject",
        "HEAD" => "HeadObject",
        "POST" if has("delete") => "DeleteObjects",
        "POST" if has("uploads") => "CreateMultipartUpload",
        "POST" if has("uploadId") => "CompleteMultipartUpload",
        "DELETE" if has("uploadId") => "AbortMultipartUpload",
        _ => "something else",
    };
    let listed = query.get("prefix").map(|prefix| prefix.replace("%2F", "/"));
    let part = query.get("partNumber").and_then(|part| part.parse().ok());
    Seen { operation, key: listed.unwrap_or_else(|| key.to_owned()), part }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_left_out_of_a_list() {
        let list = "<List><Contents><Key>a</Key></Contents><Contents><Key>b</Key></Contents><More/></List>";
        assert_eq!(without(list, ">b<"), "<List><Contents><Key>a</Key></Contents><More/></List>");
        assert_eq!(without(list, "x"), list);
    }
}
