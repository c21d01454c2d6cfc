//! Traces as a collector gets them: of real processes in two datacenters, over OTLP.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::post;
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use prost::Message as _;
use serde_json::Value;
use sluice_engine::ids::DcId;
use sluice_node::clock::SystemClock;
use sluice_node::material::ClusterMaterial;
use tokio_rustls::TlsAcceptor;
use uuid::Uuid;

use crate::Home;
use crate::divided::Divided;
use crate::fake::noise;
use crate::processes::{Running, Site, any, done, eventually};

const MIB: usize = 1 << 20;

/// What no span and no line may show.
const SECRET: &str = "these are the contents of a file";

/// One span, as it was exported.
#[derive(Clone, Debug)]
struct Span {
    service: String,
    dc: String,
    name: String,
    trace: String,
    id: String,
    parent: String,
    /// Everything that it says, for a search.
    said: BTreeMap<String, String>,
}

impl Span {
    /// Which process it is of, and its name.
    fn shown(&self) -> String {
        format!("{}@{} {}", self.service.trim_start_matches("sluice-"), self.dc, self.name)
    }
}

/// All that a collector was sent.
struct Spans(Vec<Span>);

impl Spans {
    /// Those of a name, in a datacenter.
    fn named(&self, name: &str, dc: &str) -> Vec<&Span> {
        self.0.iter().filter(|span| span.name == name && span.dc == dc).collect()
    }

    /// The one with which a command of the client began.
    fn of_command(&self, name: &str) -> &Span {
        let root = self.0.iter().find(|span| span.name == name).expect("the client's span");
        assert_eq!((root.service.as_str(), root.parent.as_str()), ("sluice-cli", ""));
        root
    }

    /// The way up from a span to that with which its trace began.
    fn way<'a>(&'a self, span: &'a Span) -> Vec<&'a Span> {
        let mut way = vec![span];
        let mut at = span;
        while let Some(parent) = self.0.iter().find(|other| other.id == at.parent) {
            assert_eq!(parent.trace, span.trace);
            way.push(parent);
            at = parent;
        }
        assert_eq!(at.parent, "", "a parent of {span:?} was not exported");
        way
    }

    /// Some span of this trace has this way up, of each process and what it did there.
    fn has_way(&self, trace: &str, way: &[&str]) {
        let last = self.0.iter().filter(|span| span.trace == trace && span.shown() == way[0]);
        let found: Vec<Vec<String>> =
            last.map(|span| self.way(span).into_iter().map(Span::shown).collect()).collect();
        assert!(found.iter().any(|found| found == way), "{way:#?} is none of {found:#?}");
    }
}

/// A collector: takes OTLP over HTTP, and keeps all of it.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

fn text(value: Option<AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        Some(any_value::Value::BoolValue(is)) => is.to_string(),
        other => format!("{other:?}"),
    }
}

fn said(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    attributes.into_iter().map(|pair| (pair.key, text(pair.value))).collect()
}

async fn take(State(collector): State<Collector>, headers: HeaderMap, body: Bytes) -> Vec<u8> {
    assert_eq!(headers["content-type"], "application/x-protobuf");
    collector.keep(ExportTraceServiceRequest::decode(body).unwrap());
    ExportTraceServiceResponse::default().encode_to_vec()
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.keep(request.into_inner());
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    fn keep(&self, request: ExportTraceServiceRequest) {
        let mut spans = self.0.lock().unwrap();
        for group in request.resource_spans {
            let resource = said(group.resource.unwrap().attributes);
            for span in group.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                spans.push(Span {
                    service: resource["service.name"].clone(),
                    dc: resource.get("sluice.dc").cloned().unwrap_or_default(),
                    name: span.name,
                    trace: hex::encode(span.trace_id),
                    id: hex::encode(span.span_id),
                    parent: hex::encode(span.parent_span_id),
                    said: said(span.attributes),
                });
            }
        }
    }

    /// Begins to listen; returns where.
    async fn start(&self) -> String {
        let routes = Router::new().route("/v1/traces", post(take)).with_state(self.clone());
        Self::serve(routes).await
    }

    /// The same for gRPC.
    async fn start_grpc(&self) -> String {
        Self::serve(tonic::service::Routes::new(TraceServiceServer::new(self.clone())).into_axum_router())
            .await
    }

    async fn serve(routes: Router) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
        at
    }

    /// The same as over HTTP, behind TLS.
    async fn start_secure(&self, tls: Arc<rustls::ServerConfig>) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = format!("https://{}", listener.local_addr().unwrap());
        let routes = Router::new().route("/v1/traces", post(take)).with_state(self.clone());
        tokio::spawn(async move {
            loop {
                let stream = listener.accept().await.unwrap().0;
                let (tls, routes) = (TlsAcceptor::from(tls.clone()), routes.clone());
                tokio::spawn(async move {
                    // Who does not trust it breaks off.
                    let Ok(stream) = tls.accept(stream).await else { return };
                    let service = hyper_util::service::TowerToHyperService::new(routes);
                    let connection = hyper::server::conn::http1::Builder::new();
                    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        at
    }

    fn spans(&self) -> Spans {
        Spans(self.0.lock().unwrap().clone())
    }
}

/// Has processes that begin in a home from now on export their spans.
fn export(home: &mut Home, collector: &str) {
    home.variables = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.to_owned()),
        ("OTEL_BSP_SCHEDULE_DELAY", "100".to_owned()),
    ];
}

/// The processes of two datacenters, the second of which has an edge and a session service of its own.
struct Traced {
    site: Site,
    collector: String,
    edge: String,
}

impl Traced {
    fn new(collector: String) -> Self {
        let mut site = Site::new(&["dc-a", "dc-b"]);
        export(&mut site.home, &collector);
        let (edge, session) = (any(), any());
        let write = |role: &str, listen: std::net::SocketAddr, more: &str| {
            let text = format!(
                "role = \"{role}\"\ndc = \"dc-b\"\nkeys = \"keys/roles/dc-b/{role}\"\nlisten = \"{listen}\"\n\
                 admin = \"127.0.0.1:0\"\nlog = \"warn,sluice_edge=debug\"\n{more}"
            );
            site.home.write(&format!("{role}.toml"), text.as_bytes());
        };
        write("session", session.address(), "");
        let inside = site.inside[1].address();
        write(
            "edge",
            edge.address(),
            &format!("sessions = \"{}\"\nworkers = \"{inside}\"\n", session.address()),
        );
        let at = format!("https://{}", edge.address());
        Self { site, collector, edge: at }
    }

    fn command(&self, args: &[&str]) -> std::process::Command {
        self.site.home.command(args)
    }

    /// Starts a process whose log is a file.
    fn start(&self, verb: &str, file: &str) -> Running {
        let log = std::fs::File::create(self.site.home.path(&format!("{file}.log"))).unwrap();
        let args = [verb, "--config", &format!("{file}.toml"), "--json"];
        let child = self.command(&args).stderr(log).stdout(Stdio::null()).spawn().unwrap();
        Running(child)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_follows_a_chunk_from_its_client_to_its_home_in_another_datacenter() {
    let collector = Collector::default();
    let traced = Traced::new(collector.start().await);
    let home = &traced.site.home;
    let processes = [
        traced.start("dc", "dc-a"),
        traced.start("dc", "dc-b"),
        traced.start("session", "session"),
        traced.start("edge", "edge"),
    ];
    let bytes: Vec<u8> = SECRET.bytes().cycle().take((2 << 20) + 17).collect();
    home.write("file", &bytes);
    let put = ["put", "file", "--home", "dc-a", "--wait", "assembled", "--url", &traced.edge];
    let id = done(traced.command(&put).output().unwrap().into());
    let id = id.trim();

    // What is refused names its trace, which is the one that is exported and logged.
    let unknown = Uuid::now_v7().to_string();
    let refused = traced.command(&["status", &unknown, "--url", &traced.edge, "--json"]).output().unwrap();
    let refused: Value = serde_json::from_slice(&refused.stdout).unwrap();
    let refused_trace = refused["error"]["trace"].as_str().unwrap().to_owned();
    processes.into_iter().for_each(Running::stop);

    let spans = collector.spans();
    let root = spans.of_command("sluice put");
    // By names, and where they were.
    let way = |span: &Span| -> Vec<String> {
        spans.way(span).into_iter().map(|span| format!("{} {}", span.dc, span.name)).collect()
    };
    let up = |names: &[&str]| -> Vec<String> { names.iter().map(|name| (*name).to_owned()).collect() };
    let chunk = ["dc-b PUT /v1/files/{id}/chunks/{index}", " sluice put"];
    let stored = [&["dc-b store", "dc-b /v1/workers/put"][..], &chunk].concat();
    let registered = [&["dc-b register", "dc-b /v1/workers/put"][..], &chunk].concat();
    let heard = [&["dc-a have"][..], &registered].concat();
    let pulled = [&["dc-a pull"][..], &heard].concat();
    for (name, dc, expected) in [
        ("store", "dc-b", stored),
        ("register", "dc-b", registered),
        ("have", "dc-a", heard.clone()),
        ("pull", "dc-a", pulled.clone()),
        ("sluice.peer.v1.Peer/Values", "dc-b", [&["dc-b sluice.peer.v1.Peer/Values"][..], &pulled].concat()),
        ("sluice.peer.v1.Peer/Chunks", "dc-b", [&["dc-b sluice.peer.v1.Peer/Chunks"][..], &pulled].concat()),
        ("assemble", "dc-a", [&["dc-a assemble"][..], &heard].concat()),
    ] {
        let found = spans.named(name, dc);
        assert!(!found.is_empty(), "no span {name} of {dc} in {:#?}", spans.0);
        for span in found {
            assert_eq!((way(span), &span.trace), (up(&expected), &root.trace));
        }
    }
    let asked = spans.named("/v1/sessions/context", "dc-b");
    assert_eq!(way(asked[0]).last().unwrap(), " sluice put", "the session service, asked once");
    let edge = spans.0.iter().find(|span| span.name.starts_with("PUT ")).unwrap();
    assert_eq!(
        (edge.service.as_str(), edge.said["file"].as_str(), edge.said["tenant"].as_str()),
        ("sluice-edge", id, "7")
    );
    assert_eq!(edge.said["http.response.status_code"], "200");
    assert_eq!(edge.said["trace"], edge.trace);

    // The refusal: one id, whoever tells it.
    assert!(
        spans.0.iter().any(|span| span.name == "sluice status" && span.trace == refused_trace),
        "{refused}"
    );
    let log = std::fs::read_to_string(home.path("edge.log")).unwrap();
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let line = lines.iter().find(|line| line["message"] == "a request was refused").expect("a line of it");
    assert_eq!((&line["trace"], &line["dc"]), (&Value::from(refused_trace), &Value::from("dc-b")));
    assert_eq!((&line["file"], &line["tenant"]), (&Value::from(unknown), &Value::from(7)));

    // Neither tokens nor contents, anywhere.
    let token = std::fs::read_to_string(home.path("token")).unwrap();
    let logs = ["dc-a", "dc-b", "session", "edge"]
        .map(|name| std::fs::read_to_string(home.path(&format!("{name}.log"))));
    let all = format!("{:?}{:?}", spans.0, logs.map(Result::unwrap));
    assert!(!all.contains(token.trim()) && !all.contains(SECRET));
    let traces: BTreeSet<&str> = spans.0.iter().map(|span| span.trace.as_str()).collect();
    assert!(traces.len() < spans.0.len());
}

/// What begins with the client, and goes on in whatever comes behind the edge of `dc-a`.
const CHUNK: [&str; 2] = ["edge@dc-a PUT /v1/files/{id}/chunks/{index}", "cli@ sluice put"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_goes_through_a_process_of_every_role_to_a_home_in_another_datacenter() {
    let collector = Collector::default();
    let mut divided = Divided::sharing(1, 1, None);
    export(&mut divided.site.home, &collector.start().await);
    let processes = ["worker", "aggregator-0", "session", "edge"].map(|name| divided.begin(name));
    let b = divided.site.start("dc-b");
    divided.site.home.write("file", &noise(71, 2 * MIB + 17));
    done(divided.run(0, &["put", "file", "--home", "dc-b", "--wait", "assembled"]));
    processes.into_iter().chain([b]).for_each(Running::stop);

    let spans = collector.spans();
    let root = spans.of_command("sluice put");
    let worker = [&["worker@dc-a /v1/workers/put"][..], &CHUNK].concat();
    let registered = [&["aggregator@dc-a /v1/slots/register", "worker@dc-a register"][..], &worker].concat();
    let pulled = [&["dc@dc-b pull", "dc@dc-b have"][..], &registered].concat();
    let values = [&["aggregator@dc-a sluice.peer.v1.Peer/Values"][..], &pulled].concat();
    let chunks = [&["aggregator@dc-a sluice.peer.v1.Peer/Chunks"][..], &pulled].concat();
    for way in [
        [&["worker@dc-a store"][..], &worker].concat(),
        // The home asks the aggregator, which has it from its worker.
        [&["worker@dc-a /v1/store/values"][..], &values].concat(),
        [&["worker@dc-a /v1/store/read-chunk"][..], &chunks].concat(),
        [&["dc@dc-b assemble", "dc@dc-b have"][..], &registered].concat(),
    ] {
        spans.has_way(&root.trace, &way);
    }
    let asked = spans.named("/v1/sessions/context", "dc-a");
    assert_eq!((asked[0].service.as_str(), &asked[0].trace), ("sluice-session", &root.trace));
    assert_eq!(spans.way(asked[0]).last().unwrap().id, root.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_is_passed_on_to_another_datacenter_and_pulled_back_is_of_one_trace() {
    let collector = Collector::default();
    let mut divided = Divided::sharing(1, 1, None);
    export(&mut divided.site.home, &collector.start().await);
    let file = divided.site.home.path("worker.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    // Without it clients are not sent there.
    let url = format!("url = \"{}\"\n", divided.site.urls[1]);
    assert!(text.contains(&url), "{text}");
    std::fs::write(&file, format!("upload_rate = \"4MiB\"\n{}", text.replace(&url, ""))).unwrap();
    let processes = ["worker", "aggregator-0", "session", "edge"].map(|name| divided.begin(name));
    let b = divided.site.start("dc-b");
    eventually("a link", || {
        let up = divided.metric("aggregator-0", "sluice_peer_up{dc=\"dc-a\",peer=\"dc-b\"} ");
        up.filter(|up| *up == 1)
    });
    divided.site.home.write("file", &noise(72, 64 * MIB));
    // Few at once: what is passed on later comes when the other datacenter has heard of the file.
    done(divided.run(0, &["put", "file", "--home", "dc-a", "--wait", "assembled", "--jobs", "2"]));
    processes.into_iter().chain([b]).for_each(Running::stop);

    let spans = collector.spans();
    let root = spans.of_command("sluice put");
    let worker = [&["worker@dc-a /v1/workers/put"][..], &CHUNK].concat();
    let passed = [&["dc@dc-b /v1/workers/put"][..], &worker].concat();
    let heard = [&["aggregator@dc-a have", "dc@dc-b register"][..], &passed].concat();
    let pulled = [&["aggregator@dc-a pull"][..], &heard].concat();
    for way in [
        [&["worker@dc-a store"][..], &worker].concat(),
        [&["dc@dc-b store"][..], &passed].concat(),
        [&["dc@dc-b sluice.peer.v1.Peer/Chunks"][..], &pulled].concat(),
        [&["worker@dc-a /v1/store/run"][..], &pulled].concat(),
    ] {
        spans.has_way(&root.trace, &way);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_reach_a_collector_over_grpc_and_over_tls() {
    sluice_node::tls::install_provider();
    let collectors = [(); 3].map(|()| Collector::default());
    let traced = Traced::new(collectors[0].start_grpc().await);
    let material = ClusterMaterial::load(&traced.site.home.path("keys/authority")).unwrap();
    let tls = || sluice_node::tls::edge_server(&material, SystemClock::shared()).unwrap();
    let secure = [collectors[1].start_secure(tls()).await, collectors[2].start_secure(tls()).await];
    let ca = traced.site.home.path("ca.pem");
    // Of a CA that did not sign the collector's certificate.
    let other = ClusterMaterial::generate("test", &[(DcId::new(1), "dc-a")]).unwrap();
    traced.site.home.write("other.pem", other.ca_pem().as_bytes());
    let other = traced.site.home.path("other.pem");
    for (at, variables) in [
        (&traced.collector, vec![("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc".as_ref())]),
        (&secure[0], vec![("OTEL_EXPORTER_OTLP_CERTIFICATE", ca.as_os_str())]),
        (&secure[1], vec![("OTEL_EXPORTER_OTLP_CERTIFICATE", other.as_os_str())]),
    ] {
        // Nobody is there to ask; the span says so.
        let mut command = traced.command(&["ls", "--retry-for", "0s"]);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", at).envs(variables);
        let ended: crate::Ended = command.output().unwrap().into();
        assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    }
    let heard = collectors.each_ref().map(|collector| collector.spans().0.len());
    assert_eq!(heard, [1, 1, 0]);
    assert_eq!(collectors[0].spans().0[0].name, "sluice ls");
    assert_eq!(collectors[1].spans().0[0].service, "sluice-cli");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_exported_keeps_nobody_waiting() {
    // Nobody is there.
    let gone = any();
    let traced = Traced::new(format!("http://{}", gone.address()));
    let dc = traced.start("dc", "dc-a");
    traced.site.home.write("file", b"a small one");
    let url = &traced.site.urls[0];
    eventually("an upload", || {
        let put = traced.command(&["put", "file", "--url", url]).output().unwrap();
        (put.status.code() == Some(0)).then_some(())
    });
    dc.stop();

    // What the environment says and nobody understands is an error at the start, with what was expected.
    for (variable, value) in [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://collector"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector:4318"),
    ] {
        let mut command = traced.command(&["dc", "--config", "dc-a.toml"]);
        let ended: crate::Ended = command.env(variable, value).output().unwrap().into();
        assert_eq!(ended.code, Some(2), "{variable}: {}", ended.stderr);
        assert!(ended.stderr.contains("expected") && ended.stderr.contains("OTEL_"), "{}", ended.stderr);
    }
}
