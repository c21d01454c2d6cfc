//! The gRPC door of a cluster's datacenters.

use std::sync::Arc;

use hyper_util::rt::TokioIo;
use sluice_engine::ids::DcId;
use sluice_node::tls;
use sluice_proto::ingest::ingest_client::IngestClient;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::bed::Web;

/// Adds a token to every call.
#[derive(Clone)]
pub(crate) struct Authorization(AsciiMetadataValue);

impl Interceptor for Authorization {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

pub(crate) type Ingest = IngestClient<InterceptedService<Channel, Authorization>>;

impl Web {
    /// A gRPC client of a datacenter, with this token.
    pub(crate) fn ingest(&self, dc: DcId, token: &str) -> Ingest {
        let tls = Arc::new(tls::edge_client(&self.material().cas(), &[b"h2"]).unwrap());
        let address = self.url(dc).trim_start_matches("https://").to_owned();
        let connector = tower::service_fn(move |_| {
            let (tls, address) = (TlsConnector::from(tls.clone()), address.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
                Ok::<_, std::io::Error>(TokioIo::new(tls.connect(name, stream).await?))
            }
        });
        let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector);
        let authorization = Authorization(format!("Bearer {token}").parse().unwrap());
        IngestClient::with_interceptor(channel, authorization)
    }
}

/// The code of the problem that a call was refused with.
#[track_caller]
pub(crate) fn problem<T: std::fmt::Debug>(result: Result<tonic::Response<T>, Status>) -> String {
    let status = result.unwrap_err();
    let problem = status.metadata().get("sluice-problem");
    problem.unwrap_or_else(|| panic!("{status:?}")).to_str().unwrap().to_owned()
}
