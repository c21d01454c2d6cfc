//! Where Redis is, and how it lets us in.
//!
//! `redis://[user@]host[:port][/database]`, or `rediss://` with TLS. The password is no part of it, since configuration
//! files are shown and sent around: it is read from a file of its own.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use sluice_node::tls;
use url::Url;

/// Where Redis listens unless told otherwise.
const PORT: u16 = 6379;

/// The longest file of a password that is read, in bytes.
const MAX_PASSWORD_LEN: u64 = 4096;

/// How long an answer may take. Everything asked is done in well under a millisecond.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long connecting may take: resolving the name, TLS, the password.
const CONNECT: Duration = Duration::from_secs(2);

/// Why a configuration makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not the URL of a Redis.
    #[error("expected redis://host:port or rediss://host:port, {0}")]
    Url(String),
    /// A file cannot be read, or does not hold what it should.
    #[error("{what}: {path}: {reason}")]
    File {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

/// Where Redis is, how it lets us in, and how long it is waited for.
#[derive(Clone)]
pub struct RedisConfig {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) database: i64,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<String>,
    pub(crate) tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    /// How long an answer may take.
    pub patience: Duration,
    /// How long connecting may take.
    pub connect: Duration,
}

impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedisConfig({})", self.address())
    }
}

impl RedisConfig {
    /// As `url` says, with the password in the file, if there is one; `ca` is a file of the certificates that a server
    /// with TLS is checked against, and has to be given for `rediss`.
    pub fn new(url: &str, password: Option<&Path>, ca: Option<&Path>) -> Result<Self, ConfigError> {
        // The URL itself is not repeated: it may hold what should not be in it.
        let wrong = |what: &str| ConfigError::Url(what.to_owned());
        let parsed = Url::parse(url).map_err(|error| ConfigError::Url(error.to_string()))?;
        let with_tls = match parsed.scheme() {
            "redis" => false,
            "rediss" => true,
            _ => return Err(wrong("the scheme is another")),
        };
        if parsed.password().is_some() {
            return Err(wrong("the password belongs into a file of its own"));
        }
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(wrong("it has more than user, host, port and number of the database"));
        }
        let host =
            parsed.host_str().filter(|host| !host.is_empty()).ok_or_else(|| wrong("it names no host"))?;
        // Brackets of IPv6 are the URL's.
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let database = match parsed.path().trim_start_matches('/') {
            "" => 0,
            number => {
                number.parse::<u16>().map(i64::from).map_err(|_| wrong("the database is not a number"))?
            }
        };
        let tls = match (with_tls, ca) {
            (true, Some(ca)) => {
                let name = ServerName::try_from(host.clone()).map_err(|_| wrong("TLS knows no such host"))?;
                Some((client(ca)?, name))
            }
            (true, None) => return Err(wrong("and with TLS the file of its CA")),
            (false, None) => None,
            (false, Some(_)) => return Err(wrong("a CA is for rediss only")),
        };
        Ok(Self {
            host,
            port: parsed.port().unwrap_or(PORT),
            database,
            user: Some(parsed.username().to_owned()).filter(|user| !user.is_empty()),
            password: password.map(secret).transpose()?,
            tls,
            patience: PATIENCE,
            connect: CONNECT,
        })
    }

    /// `host:port`, for people.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// The first line of the file.
fn secret(path: &Path) -> Result<String, ConfigError> {
    let wrong = |reason: String| ConfigError::File {
        what: "the password of Redis",
        path: path.display().to_string(),
        reason,
    };
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_PASSWORD_LEN).read_to_string(&mut text))
        .map_err(|error| wrong(error.to_string()))?;
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(line.to_owned()),
        _ => Err(wrong("it is empty".to_owned())),
    }
}

fn client(path: &Path) -> Result<Arc<ClientConfig>, ConfigError> {
    let wrong = |reason: String| ConfigError::File {
        what: "the CA of Redis",
        path: path.display().to_string(),
        reason,
    };
    let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let certificates: Vec<CertificateDer<'static>> = pem::parse_many(bytes)
        .map_err(|error| wrong(error.to_string()))?
        .into_iter()
        .filter(|block| block.tag() == "CERTIFICATE")
        .map(|block| CertificateDer::from(block.into_contents()))
        .collect();
    if certificates.is_empty() {
        return Err(wrong("there is no certificate in it".to_owned()));
    }
    let config = tls::outside_client(&certificates).map_err(|error| wrong(error.to_string()))?;
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(url: &str) -> Result<RedisConfig, String> {
        RedisConfig::new(url, None, None).map_err(|error| error.to_string())
    }

    #[test]
    fn a_url_says_where_and_as_whom() {
        let config = of("redis://sluice@cache.dc-a:7000/3").unwrap();
        assert_eq!((config.address().as_str(), config.database), ("cache.dc-a:7000", 3));
        assert_eq!(config.user.as_deref(), Some("sluice"));
        assert_eq!(of("redis://[::1]").unwrap().address(), "::1:6379");
        assert_eq!(of("redis://cache/").unwrap().database, 0);
    }

    #[test]
    fn what_is_wrong_is_named_without_the_password() {
        let error = of("redis://:hunter2@cache:1").unwrap_err();
        assert!(error.contains("file of its own") && !error.contains("hunter2"), "{error}");
        for (url, says) in [
            ("http://cache", "scheme"),
            ("cache:6379", "scheme"),
            ("redis:///1", "no host"),
            ("redis://cache/x", "number"),
            ("redis://cache?a=b", "more than"),
            ("rediss://cache", "CA"),
            ("", "relative"),
        ] {
            let error = of(url).unwrap_err();
            assert!(error.contains(says), "{url}: {error}");
        }
    }

    #[test]
    fn a_password_is_a_line_of_a_file_and_never_shown() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("password");
        std::fs::write(&file, "hunter2\n").unwrap();
        let config = RedisConfig::new("redis://cache", Some(&file), None).unwrap();
        assert_eq!(config.password.as_deref(), Some("hunter2"));
        assert!(!format!("{config:?}").contains("hunter2"));
        std::fs::write(&file, "\n").unwrap();
        let error = RedisConfig::new("redis://cache", Some(&file), None).unwrap_err().to_string();
        assert!(error.contains("it is empty"), "{error}");
        let error = RedisConfig::new("rediss://cache", None, Some(&file)).unwrap_err().to_string();
        assert!(error.contains("no certificate"), "{error}");
    }
}
