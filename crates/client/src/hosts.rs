//! Which hosts belong to the cluster: where a request may be sent on to, and where the token may go.
//!
//! Those of the configuration, and those that a datacenter named which had proven itself by the configured CA. That CA
//! alone is not enough: it may vouch for others too.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use url::Url;

/// The hosts of one cluster, as far as they are known. Shared by its doors.
#[derive(Debug, Default)]
pub(crate) struct Hosts(Mutex<BTreeSet<String>>);

impl Hosts {
    /// Adds the host of a URL; what is not https is none.
    pub(crate) fn add(&self, url: &Url) {
        if url.scheme() == "https" {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(origin(url));
        }
    }

    /// Whether a URL leads to one of them.
    pub(crate) fn has(&self, url: &Url) -> bool {
        url.scheme() == "https"
            && self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&origin(url))
    }
}

fn origin(url: &Url) -> String {
    url.origin().ascii_serialization()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_its_scheme_name_and_port() {
        let url = |text: &str| Url::parse(text).unwrap();
        let hosts = Hosts::default();
        hosts.add(&url("https://dc-a.example:8443/some/path?x"));
        hosts.add(&url("http://plain.example"));
        hosts.add(&url("https://[::1]"));
        for known in ["https://dc-a.example:8443", "https://DC-A.example:8443/v1", "https://[::1]:443/x"] {
            assert!(hosts.has(&url(known)), "{known}");
        }
        for other in [
            "http://dc-a.example:8443",
            "https://dc-a.example",
            "https://dc-a.example:8444",
            "https://dc-a.example.evil:8443",
            "https://dc-a.example:8443@evil.example/",
            "http://plain.example",
            "https://plain.example",
        ] {
            assert!(!hosts.has(&url(other)), "{other}");
        }
    }
}
