//! Plain requests to a running cluster, as any client may make them.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use reqwest::{Method, StatusCode};
use sluice_node::material::ClusterMaterial;
use sluice_node::tls;
use uuid::Uuid;

/// How long an answer may take on a machine that is busy with everything else.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client of all datacenters of one process.
#[derive(Clone)]
pub(crate) struct Web {
    http: reqwest::Client,
    token: String,
    urls: Vec<String>,
}

/// What was answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T, String> {
        serde_json::from_slice(&self.body)
            .map_err(|error| format!("{}: {error}: {:?}", self.status, self.body))
    }

    /// Whether the same request may succeed later.
    pub(crate) fn passes(&self) -> bool {
        matches!(self.status.as_u16(), 408 | 429 | 503)
    }
}

impl Web {
    /// A client for the cluster in `data`, which answers at `urls`.
    pub(crate) fn new(data: &Path, urls: &[String]) -> Self {
        let material = ClusterMaterial::load(&data.join("keys")).unwrap();
        let tls = tls::edge_client(&material.cas(), &[b"http/1.1"]).unwrap();
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .no_proxy()
            .timeout(PATIENCE)
            .build()
            .unwrap();
        let token = std::fs::read_to_string(data.join("token")).unwrap().trim().to_owned();
        Self { http, token, urls: urls.to_vec() }
    }

    /// Asks one datacenter about one file; an error if no whole answer came.
    pub(crate) async fn ask(
        &self,
        dc: usize,
        method: Method,
        id: Uuid,
        rest: &str,
        headers: &[(&str, String)],
        body: impl Into<reqwest::Body>,
    ) -> Result<Answer, reqwest::Error> {
        self.request(method, &format!("{}/v1/files/{id}{rest}", self.urls[dc]), headers, body).await
    }

    /// Creates a file at one datacenter.
    pub(crate) async fn create(&self, dc: usize, body: String) -> Result<Answer, reqwest::Error> {
        let headers = [("content-type", "application/json".to_owned())];
        self.request(Method::POST, &format!("{}/v1/files", self.urls[dc]), &headers, body).await
    }

    /// Creates a file with its bytes at one datacenter.
    pub(crate) async fn create_whole(
        &self,
        dc: usize,
        said: String,
        bytes: Bytes,
    ) -> Result<Answer, reqwest::Error> {
        let headers = [("file-metadata", said), ("content-type", "application/octet-stream".to_owned())];
        self.request(Method::POST, &format!("{}/v1/files", self.urls[dc]), &headers, bytes).await
    }

    async fn request(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, String)],
        body: impl Into<reqwest::Body>,
    ) -> Result<Answer, reqwest::Error> {
        let mut request = self.http.request(method, url).bearer_auth(&self.token).body(body);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let response = request.send().await?;
        let status = response.status();
        Ok(Answer { status, body: response.bytes().await? })
    }
}
