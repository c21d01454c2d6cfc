//! An identity: a certificate chain and its key, as they are now.
//!
//! Clones share it, so that a renewal reaches every TLS configuration that was made of it: handshakes from then on show
//! the new chain, and connections that are open stay.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{Error, SignatureScheme};

use crate::tls;

/// A certificate chain and its key.
#[derive(Clone)]
pub struct Identity(Arc<ArcSwap<Held>>);

struct Held {
    certified: Arc<CertifiedKey>,
    key: PrivateKeyDer<'static>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity")
    }
}

impl Identity {
    /// A chain, leaf first, and the key of the leaf in PKCS#8; an error if they do not belong together.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, Error> {
        let certified = Arc::new(CertifiedKey::from_der(chain, key.clone_key(), &tls::provider())?);
        Ok(Self(Arc::new(ArcSwap::from_pointee(Held { certified, key }))))
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.0.load().certified.cert.clone()
    }

    /// The key of the leaf, in PKCS#8.
    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        self.0.load().key.clone_key()
    }

    /// From now on the chain and the key of `other`, for whoever shares this.
    pub(super) fn renew(&self, other: &Self) {
        self.0.store(other.0.load_full());
    }
}

impl ResolvesServerCert for Identity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().certified.clone())
    }
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
