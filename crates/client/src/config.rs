//! What a client must be told: where the edges are, who it is, whom it trusts, and how patient it is.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::header::HeaderValue;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig as TlsConfig, RootCertStore};
use sluice_proto::trace::TraceContext;

/// How a [`Client`](crate::Client) is set up.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Where the edges answer, one URL per datacenter, such as `https://127.0.0.1:8443`. At least one. The first
    /// that answers takes the metadata of new files.
    pub urls: Vec<String>,
    /// The bearer token that every request carries.
    pub token: Token,
    /// The certificates to trust, in PEM, and no others.
    pub ca_pem: Vec<u8>,
    /// Requests in flight at once, over all URLs, at most. Memory stays below this times 8 MiB. Default: 32.
    pub jobs: usize,
    /// Whether only as many are used, for each URL, as make it faster: more on long links, fewer when a datacenter
    /// pushes back or requests are lost. Otherwise all are, unless one pushes back. Default: true.
    pub adaptive: bool,
    /// When to give up on what fails.
    pub retry: RetryPolicy,
    /// How long to wait for what makes no progress.
    pub timeouts: Timeouts,
    /// The step of a trace that every request follows from, if there is one; otherwise a client's requests are a trace of
    /// their own. Servers name it in their answers, errors and logs.
    pub trace: Option<TraceContext>,
}

impl ClientConfig {
    /// The defaults around what has none.
    pub fn new(urls: Vec<String>, token: Token, ca_pem: Vec<u8>) -> Self {
        let (retry, timeouts) = (RetryPolicy::default(), Timeouts::default());
        Self { urls, token, ca_pem, jobs: 32, adaptive: true, retry, timeouts, trace: None }
    }
}

/// When to try again, and when to give up.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// How long to go on while no URL gives a useful answer; counted from the last one that did. Default: 5 min.
    pub retry_for: Duration,
    /// The first pause after a failure; it doubles with each further one, and has jitter. Default: 100 ms.
    pub first_pause: Duration,
    /// The longest pause that is not asked for by the server. Default: 5 s.
    pub longest_pause: Duration,
    /// How often a chunk request is sent to one URL before its stripe moves to another. Default: 2.
    pub tries_per_url: u32,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            retry_for: Duration::from_secs(300),
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(5),
            tries_per_url: 2,
        }
    }
}

/// How long to wait for one thing.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For a connection. Default: 10 s.
    pub connect: Duration,
    /// For the answer to a request whose body is sent, over what the request itself asks the server to wait.
    /// Default: 30 s.
    pub answer: Duration,
    /// For the next bytes of a body, in either direction. Default: 20 s.
    pub stall: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(30),
            stall: Duration::from_secs(20),
        }
    }
}

/// A bearer token. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Wraps a token; white space around it, such as a file's last newline, is dropped.
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }

    /// The value of the `Authorization` header.
    pub(crate) fn header(&self) -> Result<HeaderValue, ConfigError> {
        if self.0.is_empty() {
            return Err(ConfigError::Token { reason: "it is empty" });
        }
        let mut value = HeaderValue::try_from(format!("Bearer {}", self.0))
            .map_err(|_| ConfigError::Token { reason: "it holds what no header may hold" })?;
        value.set_sensitive(true);
        Ok(value)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Why a configuration makes no client.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No URL was given.
    #[error("no URL of a datacenter is configured")]
    NoUrl,
    /// A URL is malformed, or not https.
    #[error("{url:?} is no URL of a datacenter: {reason}")]
    Url {
        /// What came.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The token is malformed.
    #[error("the token cannot be used: {reason}")]
    Token {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The certificates to trust are malformed, or there are none.
    #[error("the certificates to trust cannot be used: {reason}")]
    Ca {
        /// What is wrong with them.
        reason: String,
    },
    /// TLS cannot be set up.
    #[error("TLS cannot be set up: {reason}")]
    Tls {
        /// Why.
        reason: String,
    },
    /// Nothing could be sent.
    #[error("jobs must be from 1 to {limit}, got {got}")]
    Jobs {
        /// What came.
        got: usize,
        /// The most.
        limit: usize,
    },
}

/// The most requests in flight at once: 2 GiB of buffers.
pub const MAX_JOBS: usize = 256;

/// TLS that trusts these certificates only, with the provider named rather than found.
pub(crate) fn tls(ca_pem: &[u8]) -> Result<TlsConfig, ConfigError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca_pem) {
        let certificate = certificate.map_err(|error| ConfigError::Ca { reason: error.to_string() })?;
        roots.add(certificate).map_err(|error| ConfigError::Ca { reason: error.to_string() })?;
    }
    if roots.is_empty() {
        return Err(ConfigError::Ca { reason: "there is no certificate in PEM".into() });
    }
    let config = TlsConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| ConfigError::Tls { reason: error.to_string() })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_trimmed_checked_and_never_shown() {
        let token = Token::new(" secret\n");
        assert_eq!(format!("{token:?}"), "Token(…)");
        let header = token.header().unwrap();
        assert_eq!(header.to_str().unwrap(), "Bearer secret");
        assert!(header.is_sensitive());
        assert!(Token::new("\n").header().is_err());
        assert!(Token::new("a\nb").header().is_err());
    }

    #[test]
    fn no_certificate_is_no_trust() {
        assert!(matches!(tls(b""), Err(ConfigError::Ca { .. })));
        assert!(matches!(tls(b"nonsense"), Err(ConfigError::Ca { .. })));
    }
}
