//! Spans on their way to a collector: OTLP over HTTP or gRPC, as the environment says (OpenTelemetry's `OTEL_*`).
//!
//! | variable | what |
//! | --- | --- |
//! | `OTEL_EXPORTER_OTLP_ENDPOINT`, `…_TRACES_ENDPOINT` | where the collector is; without either nothing is exported |
//! | `OTEL_EXPORTER_OTLP_PROTOCOL`, `…_TRACES_PROTOCOL` | `http/protobuf` (otherwise) or `grpc` |
//! | `OTEL_EXPORTER_OTLP_CERTIFICATE`, `…_TRACES_CERTIFICATE` | file of the CA, in PEM: needed for https, which gRPC does not speak here |
//! | `OTEL_EXPORTER_OTLP_HEADERS`, `…_TIMEOUT`, and of traces | as specified |
//! | `OTEL_TRACES_SAMPLER`, `OTEL_TRACES_SAMPLER_ARG` | which traces are recorded; otherwise those of recorded parents, and all that begin here |
//! | `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES` | as specified; otherwise the service is `sluice-<role>` |
//! | `OTEL_BSP_*` | the queue: otherwise 2,048 spans, what does not fit is dropped and counted in the log |
//! | `OTEL_SDK_DISABLED=true`, `OTEL_TRACES_EXPORTER=none` | nothing is exported |
//!
//! A thread of its own exports what a bounded queue holds; nobody waits for it. The process has one exporter, which ends
//! with [`finish`].

use std::env;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry::KeyValue;
use opentelemetry::trace::{SpanKind, TracerProvider as _};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SamplingDecision, SdkTracerProvider, ShouldSample};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use sluice_proto::trace::TraceId;
use tokio::runtime::Handle;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::registry::LookupSpan;

use crate::tls;

/// The most that is read of what a collector answers.
const MAX_ANSWER: usize = 64 << 10;

/// How long one export may take, however long the environment lets it.
const LONGEST_EXPORT: Duration = Duration::from_secs(30);

/// How long the last spans may take to be sent.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// Why spans cannot be exported as the environment says.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A variable says what cannot be done.
    #[error("{variable} is {got:?}, expected {expected}")]
    Variable {
        /// Which.
        variable: &'static str,
        /// What it says.
        got: String,
        /// What it may say.
        expected: &'static str,
    },
    /// The certificates to trust cannot be had.
    #[error("the CA of the collector cannot be read from {path}: {reason}")]
    Ca {
        /// Where they should be.
        path: String,
        /// Why.
        reason: String,
    },
    /// The exporter does not take what it was told.
    #[error("spans cannot be exported: {0}")]
    Refused(String),
}

struct Exporter {
    provider: SdkTracerProvider,
    sampler: RootSampler,
}

static EXPORTER: OnceLock<Exporter> = OnceLock::new();

/// Decides which traces that begin here are recorded.
#[derive(Clone, Debug)]
pub(super) struct RootSampler(Sampler);

impl RootSampler {
    /// Whether a trace of which nobody has decided it is recorded.
    pub(super) fn wants(&self, trace: TraceId) -> bool {
        let trace = opentelemetry::TraceId::from_bytes(trace.to_bytes());
        let asked = self.0.should_sample(None, trace, "", &SpanKind::Server, &[], &[]);
        asked.decision == SamplingDecision::RecordAndSample
    }
}

/// The sampler, if spans are exported.
pub(super) fn sampler() -> Option<&'static RootSampler> {
    EXPORTER.get().map(|exporter| &exporter.sampler)
}

/// What turns spans into exported ones, if the environment says where to.
pub(super) fn layer<S>(
    role: &str,
    dc: Option<&str>,
) -> Result<Option<Box<dyn Layer<S> + Send + Sync>>, ExportError>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    let Some(endpoint) = endpoint() else { return Ok(None) };
    let (sampler, root) = samplers(said("OTEL_TRACES_SAMPLER").as_deref(), said("OTEL_TRACES_SAMPLER_ARG"))?;
    let mut resource = Resource::builder();
    if said("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(format!("sluice-{role}"));
    }
    resource = resource.with_attributes(dc.map(|dc| KeyValue::new("sluice.dc", dc.to_owned())));
    let provider = SdkTracerProvider::builder()
        .with_resource(
            resource.with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))).build(),
        )
        .with_sampler(sampler)
        .with_batch_exporter(exporter(&endpoint)?)
        .build();
    let tracer = provider.tracer("sluice");
    // The first counts; logging is not started twice.
    let _ = EXPORTER.set(Exporter { provider, sampler: RootSampler(root) });
    let ours = |metadata: &Metadata<'_>| metadata.is_span() && metadata.target().starts_with("sluice");
    let filter = filter_fn(ours).with_max_level_hint(LevelFilter::INFO);
    let layer = tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_level(false)
        .with_target(false)
        .with_tracked_inactivity(false);
    Ok(Some(layer.with_filter(filter).boxed()))
}

/// Sends what waits, and ends.
pub(super) async fn finish() {
    if let Some(exporter) = EXPORTER.get() {
        let provider = exporter.provider.clone();
        // It blocks; and whoever ends has no use for knowing that some spans are lost.
        let _ = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(LAST_SPANS)).await;
    }
}

/// What a variable says, if anything.
fn said(variable: &'static str) -> Option<String> {
    env::var(variable).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// What the variable of traces says, or that of all signals.
fn of_traces(traces: &'static str, all: &'static str) -> Option<(&'static str, String)> {
    said(traces).map(|value| (traces, value)).or_else(|| said(all).map(|value| (all, value)))
}

/// Where spans go.
fn endpoint() -> Option<(&'static str, String)> {
    let disabled = said("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let elsewhere = said("OTEL_TRACES_EXPORTER").is_some_and(|value| value != "otlp");
    if disabled || elsewhere {
        return None;
    }
    of_traces("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
}

/// What is recorded, and what of that begins here.
fn samplers(name: Option<&str>, argument: Option<String>) -> Result<(Sampler, Sampler), ExportError> {
    let ratio = || match argument.as_deref().map_or(Ok(1.0), str::parse) {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(Sampler::TraceIdRatioBased(ratio)),
        Ok(_) | Err(_) => Err(ExportError::Variable {
            variable: "OTEL_TRACES_SAMPLER_ARG",
            got: argument.clone().unwrap_or_default(),
            expected: "a number from 0 to 1",
        }),
    };
    let of_parents = |root: Sampler| (Sampler::ParentBased(Box::new(root.clone())), root);
    let always = |root: Sampler| (root.clone(), root);
    match name {
        None | Some("parentbased_always_on") => Ok(of_parents(Sampler::AlwaysOn)),
        Some("parentbased_always_off") => Ok(of_parents(Sampler::AlwaysOff)),
        Some("parentbased_traceidratio") => ratio().map(of_parents),
        Some("always_on") => Ok(always(Sampler::AlwaysOn)),
        Some("always_off") => Ok(always(Sampler::AlwaysOff)),
        Some("traceidratio") => ratio().map(always),
        Some(other) => Err(ExportError::Variable {
            variable: "OTEL_TRACES_SAMPLER",
            got: other.to_owned(),
            expected: "always_on, always_off or traceidratio, or one of these after parentbased_",
        }),
    }
}

fn exporter((variable, endpoint): &(&'static str, String)) -> Result<SpanExporter, ExportError> {
    let refused = |error: opentelemetry_otlp::ExporterBuildError| ExportError::Refused(error.to_string());
    let uri = url::Url::parse(endpoint).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let secure = uri.map(|url| url.scheme() == "https").ok_or_else(|| ExportError::Variable {
        variable,
        got: endpoint.clone(),
        expected: "a URL such as http://localhost:4318",
    })?;
    let protocol = of_traces("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL");
    match protocol.as_ref().map(|(_, name)| name.as_str()) {
        None | Some("http/protobuf") => {
            let exporter = SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary);
            exporter.with_http_client(Collector::new(secure)?).build().map_err(refused)
        }
        Some("grpc") if secure => Err(ExportError::Variable {
            variable,
            got: endpoint.clone(),
            expected: "http, or http/protobuf for OTEL_EXPORTER_OTLP_PROTOCOL: gRPC is not encrypted here",
        }),
        Some("grpc") => SpanExporter::builder().with_tonic().build().map_err(refused),
        Some(other) => Err(ExportError::Variable {
            variable: protocol.as_ref().map_or("OTEL_EXPORTER_OTLP_PROTOCOL", |(variable, _)| variable),
            got: other.to_owned(),
            expected: "http/protobuf or grpc",
        }),
    }
}

/// HTTP to the collector, over the one TLS. Its connections are tasks of the runtime, while the exporter is a thread.
struct Collector {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    runtime: Handle,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Collector")
    }
}

impl Collector {
    fn new(secure: bool) -> Result<Self, ExportError> {
        let ca = of_traces("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE");
        let mut trusted = RootCertStore::empty();
        match ca {
            Some((_, path)) => {
                let failed = |reason: String| ExportError::Ca { path: path.clone(), reason };
                let certificates =
                    CertificateDer::pem_file_iter(&path).map_err(|error| failed(error.to_string()))?;
                for certificate in certificates {
                    let certificate = certificate.map_err(|error| failed(error.to_string()))?;
                    trusted.add(certificate).map_err(|error| failed(error.to_string()))?;
                }
            }
            None if secure => {
                return Err(ExportError::Variable {
                    variable: "OTEL_EXPORTER_OTLP_CERTIFICATE",
                    got: String::new(),
                    expected: "the file of a CA, since the collector is at https",
                });
            }
            None => {}
        }
        let config = ClientConfig::builder_with_provider(Arc::new(tls::provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| ExportError::Refused(error.to_string()))?
            .with_root_certificates(trusted)
            .with_no_client_auth();
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(config).https_or_http().enable_http1().build();
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { client, runtime: Handle::current() })
    }
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        // Timers and connections are had on the runtime only, and whoever asks is no part of it.
        let exchange = self.runtime.spawn(async move {
            let exchange = async {
                let (head, body) = client.request(request.map(Full::new)).await?.into_parts();
                let body = Limited::new(body, MAX_ANSWER).collect().await?.to_bytes();
                Ok::<_, HttpError>(Response::from_parts(head, body))
            };
            tokio::time::timeout(LONGEST_EXPORT, exchange).await?
        });
        exchange.await?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samplers_are_those_of_the_specification_and_no_others() {
        let of = |name: &str, argument: Option<&str>| {
            samplers(Some(name), argument.map(str::to_owned)).map(|both| format!("{both:?}"))
        };
        assert_eq!(of("always_off", None).unwrap(), "(AlwaysOff, AlwaysOff)");
        assert!(of("parentbased_traceidratio", Some("0.25")).unwrap().ends_with("TraceIdRatioBased(0.25))"));
        for (name, argument) in
            [("sometimes", None), ("traceidratio", Some("2")), ("traceidratio", Some("x"))]
        {
            assert!(of(name, argument).unwrap_err().to_string().contains("expected"), "{name} {argument:?}");
        }
    }
}
