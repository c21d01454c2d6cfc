//! TLS: who may connect to whom, and how a client that is moved resumes.
//!
//! TLS 1.3 only, aws-lc-rs for the ciphers, no early data anywhere. Edges issue stateless tickets under keys that
//! every datacenter derives ([`TicketKeys`]), and keep no session cache. Listeners between datacenters demand a
//! certificate and issue no tickets, so that a certificate is checked on every connection. Nothing here has to be
//! stopped.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ProducesTickets, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};
use sluice_engine::ids::{DcId, Timestamp};
use webpki::EndEntityCert;

use crate::clock::{SharedClock, random_bytes};
use crate::material::{ClusterMaterial, Identity, MaterialError};
use crate::role::Role;

/// How long one ticket key is used, in seconds. A ticket is good for one to two such periods.
const TICKET_PERIOD_SECS: u64 = 6 * 3600;

/// Bytes before a ticket's ciphertext: period (8) and salt (16).
const TICKET_HEAD: usize = 24;

/// The longest ticket that is looked at, in bytes.
const MAX_TICKET_LEN: usize = 16 << 10;

/// Why a TLS configuration cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The material lacks something.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// rustls does not take it.
    #[error("TLS does not take the certificate or key of {whose}: {reason}")]
    Refused {
        /// Whose certificate or key.
        whose: String,
        /// What rustls says.
        reason: String,
    },
}

/// Why a verified certificate is not that of a datacenter of this cluster.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PeerError {
    /// There is none.
    #[error("the peer showed no certificate")]
    Missing,
    /// It names no datacenter, or several, or one that is not in the configuration.
    #[error("the peer's certificate does not name one datacenter of this cluster")]
    Name,
}

/// Makes aws-lc-rs the provider of the process. May be called again; the first provider stays.
pub fn install_provider() {
    // An error means that one is installed already.
    let _ = provider().install_default();
}

/// aws-lc-rs, with AES-128-GCM first: the fastest by far on machines with AES instructions, and strong enough.
pub(crate) fn provider() -> CryptoProvider {
    let cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    CryptoProvider { cipher_suites, ..default_provider() }
}

fn refused(whose: impl Into<String>) -> impl FnOnce(rustls::Error) -> TlsError {
    let whose = whose.into();
    move |error| TlsError::Refused { whose, reason: error.to_string() }
}

fn roots(cas: &[CertificateDer<'static>]) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for ca in cas {
        roots.add(ca.clone()).map_err(refused("the CA"))?;
    }
    Ok(Arc::new(roots))
}

/// Whom to trust: whoever shows a certificate of one of these CAs, in either direction.
pub(crate) struct Trust {
    servers: Arc<WebPkiServerVerifier>,
    clients: Arc<dyn ClientCertVerifier>,
}

impl Trust {
    /// Trust in certificates of these CAs.
    pub(crate) fn new(cas: &[CertificateDer<'static>]) -> Result<Self, TlsError> {
        fn bad(error: impl fmt::Display) -> TlsError {
            TlsError::Refused { whose: "the CA".into(), reason: error.to_string() }
        }
        let (roots, provider) = (roots(cas)?, Arc::new(provider()));
        let servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
        let clients = WebPkiClientVerifier::builder_with_provider(roots, provider);
        Ok(Self { servers: servers.build().map_err(bad)?, clients: clients.build().map_err(bad)? })
    }
}

/// Whom to trust as of each handshake.
struct TrustNow(ClusterMaterial);

impl fmt::Debug for TrustNow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TrustNow")
    }
}

impl ServerCertVerifier for TrustNow {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.0.trust().servers.verify_server_cert(leaf, between, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.trust().servers.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.trust().servers.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.trust().servers.supported_verify_schemes()
    }
}

impl ClientCertVerifier for TrustNow {
    /// None: whoever calls has one certificate, and shows it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.0.trust().clients.verify_client_cert(leaf, between, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.trust().clients.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.trust().clients.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.trust().clients.supported_verify_schemes()
    }
}

/// What a process connects to a server with that is none of Sluice's; whoever one of `cas` vouches for is believed.
pub fn outside_client(cas: &[CertificateDer<'static>]) -> Result<ClientConfig, TlsError> {
    let config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(refused("clients"))?
        .with_root_certificates(roots(cas)?)
        .with_no_client_auth();
    Ok(config)
}

/// What an edge listens with: the cluster's one TLS name, HTTP/2 and HTTP/1.1, tickets, no client certificates.
pub fn edge_server(material: &ClusterMaterial, clock: SharedClock) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(refused("edges"))?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(material.edge_identity()?.clone()));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = Arc::new(TicketKeys::new(material, clock)?);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    // What 0-RTT carries can be replayed (fault 48).
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// What a client connects to an edge with. It verifies the cluster's one TLS name, [`edge_name`], whatever address it
/// connects to; with that name as the server name a session resumes at any datacenter.
pub fn edge_client(cas: &[CertificateDer<'static>], alpn: &[&[u8]]) -> Result<ClientConfig, TlsError> {
    let mut config = outside_client(cas)?;
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(config)
}

/// The server name that clients ask for and verify.
pub fn edge_name(material: &ClusterMaterial) -> Result<ServerName<'static>, TlsError> {
    server_name(material.edge_tls_name())
}

/// The server name by which a datacenter is known to its peers.
pub fn peer_name(material: &ClusterMaterial, dc: DcId) -> Result<ServerName<'static>, TlsError> {
    server_name(material.peer_tls_name(dc))
}

fn server_name(name: String) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.clone())
        .map_err(|error| TlsError::Refused { whose: name, reason: error.to_string() })
}

/// What a datacenter listens with for its peers: a certificate is demanded, and no ticket is issued (fault 47).
pub fn peer_server(material: &ClusterMaterial, me: DcId) -> Result<Arc<ServerConfig>, TlsError> {
    mutual_server(material, material.peer_identity(me)?, b"h2")
}

/// What a datacenter connects to its peers with; the name to verify is [`peer_name`].
pub fn peer_client(material: &ClusterMaterial, me: DcId) -> Result<Arc<ClientConfig>, TlsError> {
    mutual_client(material, material.peer_identity(me)?, b"h2")
}

/// Which datacenter a certificate that TLS has verified belongs to: the first of `certificates` names exactly one.
pub fn peer_dc(
    material: &ClusterMaterial,
    certificates: Option<&[CertificateDer<'_>]>,
) -> Result<DcId, PeerError> {
    only_name(certificates, |name| material.dc_of_peer_name(name))
}

/// What a process of a role listens with for others of its datacenter, as [`peer_server`].
pub fn role_server(material: &ClusterMaterial, me: DcId, role: Role) -> Result<Arc<ServerConfig>, TlsError> {
    mutual_server(material, material.role_identity(me, role)?, b"http/1.1")
}

/// What a process of a role connects to others of its datacenter with; the name to verify is [`role_name`].
pub fn role_client(material: &ClusterMaterial, me: DcId, role: Role) -> Result<Arc<ClientConfig>, TlsError> {
    mutual_client(material, material.role_identity(me, role)?, b"http/1.1")
}

/// The server name by which a role is known inside its datacenter.
pub fn role_name(material: &ClusterMaterial, me: DcId, role: Role) -> Result<ServerName<'static>, TlsError> {
    server_name(material.role_tls_name(me, role))
}

/// Which role, of which datacenter, a certificate that TLS has verified belongs to.
pub fn peer_role(
    material: &ClusterMaterial,
    certificates: Option<&[CertificateDer<'_>]>,
) -> Result<(DcId, Role), PeerError> {
    only_name(certificates, |name| material.role_of_name(name))
}

fn only_name<T>(
    certificates: Option<&[CertificateDer<'_>]>,
    whose: impl FnOnce(&str) -> Option<T>,
) -> Result<T, PeerError> {
    let leaf = certificates.and_then(<[_]>::first).ok_or(PeerError::Missing)?;
    let certificate = EndEntityCert::try_from(leaf).map_err(|_| PeerError::Name)?;
    let mut names = certificate.valid_dns_names();
    match (names.next(), names.next()) {
        (Some(name), None) => whose(name).ok_or(PeerError::Name),
        (None, _) | (Some(_), Some(_)) => Err(PeerError::Name),
    }
}

fn mutual_server(
    material: &ClusterMaterial,
    identity: &Identity,
    alpn: &[u8],
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(refused("peers"))?
        .with_client_cert_verifier(Arc::new(TrustNow(material.clone())))
        .with_cert_resolver(Arc::new(identity.clone()));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

fn mutual_client(
    material: &ClusterMaterial,
    identity: &Identity,
    alpn: &[u8],
) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(refused("peers"))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustNow(material.clone())))
        .with_client_cert_resolver(Arc::new(identity.clone()));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// Whether `trust` would take a chain for this name, at this time; if not, why. `mutual`: of a client, too, and for this
/// name only.
pub(crate) fn check_chain(
    trust: &Trust,
    name: &str,
    mutual: bool,
    chain: &[CertificateDer<'static>],
    now: Timestamp,
) -> Result<(), String> {
    fn reason(error: impl fmt::Display) -> String {
        error.to_string()
    }
    let (leaf, between) = chain.split_first().ok_or("it is empty")?;
    let now = UnixTime::since_unix_epoch(Duration::from_millis(now.number()));
    let named = server_name(name.to_owned()).map_err(reason)?;
    trust.servers.verify_server_cert(leaf, between, &named, &[], now).map_err(reason)?;
    if mutual {
        trust.clients.verify_client_cert(leaf, between, now).map_err(reason)?;
        only_name(Some(chain), |only| (only == name).then_some(())).map_err(reason)?;
    }
    Ok(())
}

/// Whether a client that shows this chain is let in.
pub(crate) fn is_trusted(trust: &Trust, chain: &[CertificateDer<'static>], now: Timestamp) -> bool {
    let now = UnixTime::since_unix_epoch(Duration::from_millis(now.number()));
    chain
        .split_first()
        .is_some_and(|(leaf, between)| trust.clients.verify_client_cert(leaf, between, now).is_ok())
}

/// When a certificate expires, in seconds since 1970: what a verifier says of it at the end of time.
pub(crate) fn not_after(certificate: &CertificateDer<'_>) -> Option<u64> {
    match refused_at(certificate, Duration::from_secs(u64::from(u32::MAX) << 4))? {
        webpki::Error::CertExpired { not_after, .. } => Some(not_after.as_secs()),
        _ => None,
    }
}

/// From when on a certificate counts, in seconds since 1970: what a verifier says of it at the beginning of time.
pub(crate) fn not_before(certificate: &CertificateDer<'_>) -> Option<u64> {
    match refused_at(certificate, Duration::ZERO)? {
        webpki::Error::CertNotValidYet { not_before, .. } => Some(not_before.as_secs()),
        _ => None,
    }
}

/// Why a certificate does not count at a time since 1970.
fn refused_at(certificate: &CertificateDer<'_>, time: Duration) -> Option<webpki::Error> {
    let time = UnixTime::since_unix_epoch(time);
    let algorithms = provider().signature_verification_algorithms.all;
    // Nobody is believed for it: the certificate vouches for itself, and the answer is never yes.
    let anchor = webpki::anchor_from_trusted_cert(certificate).ok()?;
    let entity = EndEntityCert::try_from(certificate).ok()?;
    let usage = webpki::KeyUsage::server_auth();
    entity.verify_for_usage(algorithms, &[anchor], &[], time, usage, None, None).err()
}

/// Ticket keys that every datacenter derives from the cluster's secret, so that a client resumes at any of them.
///
/// One key per period of six hours; a ticket of the previous, the current or the next period (of a datacenter whose
/// clock is ahead) is taken. Layout: period (8 bytes, big-endian) ‖ salt (16) ‖ AES-256-GCM ciphertext and tag. The
/// key is derived from secret, period and salt, and used once, so the nonce is zero. Resumption authenticates no one.
/// While the secret is rotated, tickets of either are taken.
pub struct TicketKeys {
    material: ClusterMaterial,
    clock: SharedClock,
}

impl fmt::Debug for TicketKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketKeys")
    }
}

impl TicketKeys {
    /// The keys of the cluster, whose secret has to be there.
    pub fn new(material: &ClusterMaterial, clock: SharedClock) -> Result<Self, MaterialError> {
        material.ticket_secrets()?;
        Ok(Self { material: material.clone(), clock })
    }

    fn period(&self) -> u64 {
        self.clock.now().number() / 1000 / TICKET_PERIOD_SECS
    }

    fn secrets(&self) -> Vec<[u8; 32]> {
        self.material.ticket_secrets().unwrap_or_default()
    }
}

fn ticket_key(secret: &[u8; 32], head: &[u8]) -> Option<LessSafeKey> {
    let input = [&secret[..], head].concat();
    let key = blake3::derive_key("sluice 2026-11 tls ticket key v1", &input);
    UnboundKey::new(&AES_256_GCM, &key).ok().map(LessSafeKey::new)
}

impl ProducesTickets for TicketKeys {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        TICKET_PERIOD_SECS as u32
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let mut ticket = Vec::with_capacity(TICKET_HEAD + plain.len() + AES_256_GCM.tag_len());
        ticket.extend_from_slice(&self.period().to_be_bytes());
        ticket.extend_from_slice(&random_bytes::<16>());
        let key = ticket_key(self.secrets().first()?, &ticket)?;
        ticket.extend_from_slice(plain);
        let (_, body) = ticket.split_at_mut(TICKET_HEAD);
        let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
        let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), body).ok()?;
        ticket.extend_from_slice(tag.as_ref());
        Some(ticket)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        if cipher.len() > MAX_TICKET_LEN {
            return None;
        }
        let (head, body) = cipher.split_at_checked(TICKET_HEAD)?;
        let period = u64::from_be_bytes(*head.first_chunk()?);
        if period.abs_diff(self.period()) > 1 {
            return None;
        }
        self.secrets().iter().find_map(|secret| {
            let mut body = body.to_vec();
            let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
            let plain = ticket_key(secret, head)?.open_in_place(nonce, Aad::empty(), &mut body).ok()?.len();
            body.truncate(plain);
            Some(body)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock as _, ManualClock, SystemClock};
    use crate::material::KeyKind;
    use rustls::HandshakeKind;
    use sluice_engine::ids::Timestamp;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

    const A: DcId = DcId::new(1);
    const B: DcId = DcId::new(2);

    fn material(name: &str) -> ClusterMaterial {
        ClusterMaterial::generate(name, &[(A, "dc-a"), (B, "dc-b")]).unwrap()
    }

    type Ends = (client::TlsStream<tokio::io::DuplexStream>, server::TlsStream<tokio::io::DuplexStream>);

    /// Connects, and says one byte each way, so that tickets and late refusals arrive.
    async fn connect(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
        name: ServerName<'static>,
    ) -> std::io::Result<Ends> {
        let (near, far) = duplex(64 << 10);
        let accept = async {
            let mut stream = TlsAcceptor::from(server).accept(far).await?;
            stream.write_all(b"s").await?;
            stream.read_u8().await?;
            Ok::<_, std::io::Error>(stream)
        };
        let connect = async {
            let mut stream = TlsConnector::from(client).connect(name, near).await?;
            stream.write_all(b"c").await?;
            stream.read_u8().await?;
            Ok::<_, std::io::Error>(stream)
        };
        tokio::try_join!(connect, accept)
    }

    #[tokio::test]
    async fn a_client_resumes_at_another_datacenter_without_a_full_handshake() {
        let material = material("test");
        let [here, there] = [0, 1].map(|_| edge_server(&material, SystemClock::shared()).unwrap());
        let client = Arc::new(edge_client(&material.cas(), &[b"http/1.1"]).unwrap());
        let name = edge_name(&material).unwrap();
        let (first, _) = connect(client.clone(), here, name.clone()).await.unwrap();
        assert_eq!(first.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(first.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        for local in ["localhost", "127.0.0.1", "::1"] {
            let local = ServerName::try_from(local).unwrap();
            assert!(connect(client.clone(), there.clone(), local).await.is_ok(), "browsers and curl");
        }
        let (second, _) = connect(client.clone(), there, name.clone()).await.unwrap();
        assert_eq!(second.get_ref().1.handshake_kind(), Some(HandshakeKind::Resumed));
        assert!(!second.get_ref().1.is_early_data_accepted());

        let stranger = edge_server(&self::material("test"), SystemClock::shared()).unwrap();
        assert!(connect(client, stranger, name).await.is_err(), "another CA");
    }

    #[tokio::test]
    async fn ticket_keys_rotate_at_every_datacenter_without_a_failed_handshake() {
        let material = material("test");
        let start = Timestamp::new(1_763_640_000_000);
        // One clock is a minute ahead, so that the two are in different periods for a while.
        let clocks = [ManualClock::at(start), ManualClock::at(start.plus(60_000))];
        let servers = [0, 1].map(|dc: usize| edge_server(&material, clocks[dc].clone()).unwrap());
        let client = Arc::new(edge_client(&material.cas(), &[b"http/1.1"]).unwrap());
        let name = edge_name(&material).unwrap();
        let kind = async |dc: usize| {
            let (stream, _) = connect(client.clone(), servers[dc].clone(), name.clone()).await.unwrap();
            stream.get_ref().1.handshake_kind()
        };
        let pass = |part: u64| {
            clocks.iter().for_each(|clock| clock.advance(TICKET_PERIOD_SECS * 1000 / part));
        };
        assert_eq!(kind(0).await, Some(HandshakeKind::Full));
        // Through six rotations at both, each time at the other one.
        for step in 0..6 * 7 {
            pass(7);
            assert_eq!(kind((step + 1) % 2).await, Some(HandshakeKind::Resumed), "step {step}");
        }
        // Away from where a period begins for one of them only.
        pass(7);
        // A client keeps some tickets, and may try an old one: now it has none of an earlier period.
        for _ in 0..8 {
            kind(0).await;
        }
        // Within the minute in which one has rotated and the other has not, in both directions.
        let left = TICKET_PERIOD_SECS * 1000 - clocks[1].now().number() % (TICKET_PERIOD_SECS * 1000);
        clocks.iter().for_each(|clock| clock.advance(left));
        for dc in [1, 0, 1, 0] {
            assert_eq!(kind(dc).await, Some(HandshakeKind::Resumed));
        }
        // Who comes back after both keys are gone shakes hands in full: nothing fails.
        (0..3).for_each(|_| pass(1));
        assert_eq!(kind(0).await, Some(HandshakeKind::Full));
    }

    #[tokio::test]
    async fn certificates_are_renewed_under_configurations_that_are_in_use() {
        let material = material("test");
        let clock = SystemClock::shared();
        let now = clock.now();
        let edge = edge_server(&material, clock).unwrap();
        let part = material.only(A).unwrap();
        let peers = (peer_client(&part, A).unwrap(), peer_server(&material.only(B).unwrap(), B).unwrap());
        let reissued = material.reissued().unwrap();
        let shown = async || {
            let client = Arc::new(edge_client(&material.cas(), &[b"h2"]).unwrap());
            let (client, _) = connect(client, edge.clone(), edge_name(&material).unwrap()).await.unwrap();
            client.get_ref().1.peer_certificates().unwrap().to_vec()
        };
        let before = material.edge_identity().unwrap().chain();
        assert_eq!(shown().await, before);

        // Refused as a whole: another CA, another time, another key, no certificate.
        let refused = |fresh: &ClusterMaterial, now| part.renew(fresh, now).unwrap_err().to_string();
        let other = self::material("test");
        assert!(refused(&other, now).contains("the keys of commands changed"));
        assert!(
            refused(&other.rotated(&KeyKind::ALL).unwrap(), now).contains("the keys of commands changed")
        );
        let ages_later = Timestamp::new(now.number() + 20 * 365 * 86_400_000);
        let expired = refused(&reissued, ages_later);
        assert!(expired.contains("not accepted") && expired.contains("expired"), "{expired}");
        assert!(refused(&reissued.only(B).unwrap(), now).contains("is not part of this material"));
        assert_eq!(shown().await, before);

        // The edge's, a peer's, and one for each role; who shares the material sees them.
        let roles = Role::ALL.len();
        assert_eq!(part.renew(&reissued, now).unwrap(), 2 + roles);
        assert_eq!(part.renew(&reissued, now).unwrap(), 0);
        assert_eq!(shown().await, reissued.edge_identity().unwrap().chain());
        assert_ne!(shown().await, before);
        let (_, server) = connect(peers.0, peers.1, peer_name(&material, B).unwrap()).await.unwrap();
        let seen = server.get_ref().1.peer_certificates().map(<[_]>::to_vec);
        assert_eq!(seen, Some(reissued.peer_identity(A).unwrap().chain()));
        assert_eq!(peer_dc(&material, seen.as_deref()), Ok(A));
    }

    #[tokio::test]
    async fn the_ca_and_the_secret_of_tickets_are_rotated_under_configurations_that_are_in_use() {
        let mut all = material("test");
        let clock = SystemClock::shared();
        let parts = [A, B].map(|dc| all.only(dc).unwrap());
        let listens = [A, B].map(|dc| peer_server(&parts[usize::from(dc == B)], dc).unwrap());
        let dials = [A, B].map(|dc| peer_client(&parts[usize::from(dc == B)], dc).unwrap());
        let edges = [0, 1].map(|dc: usize| edge_server(&parts[dc], clock.clone()).unwrap());
        let name = edge_name(&all).unwrap();
        let mut client = Arc::new(edge_client(&all.cas(), &[b"h2"]).unwrap());
        let kind = async |client: &Arc<ClientConfig>, dc: usize| {
            let (stream, _) = connect(client.clone(), edges[dc].clone(), name.clone()).await?;
            Ok::<_, std::io::Error>(stream.get_ref().1.handshake_kind().unwrap())
        };
        let meet = async || {
            for (from, to) in [(0, B), (1, A)] {
                let server = listens[1 - from].clone();
                connect(dials[from].clone(), server, peer_name(&parts[from], to).unwrap()).await.unwrap();
            }
        };
        assert_eq!(kind(&client, 0).await.unwrap(), HandshakeKind::Full);
        let first = client.clone();
        for step in 1..=3 {
            all = all.rotated(&[KeyKind::Ca, KeyKind::Tickets]).unwrap();
            // One is a step ahead of the other for a while, in both directions.
            for part in &parts {
                part.renew(&all, clock.now()).unwrap();
                meet().await;
                for dc in [1, 0, 1] {
                    assert_eq!(kind(&client, dc).await.unwrap(), HandshakeKind::Resumed, "step {step}, {dc}");
                }
            }
            // Whoever took over the file that says whom to trust shakes hands in full, too.
            client = Arc::new(edge_client(&all.cas(), &[b"h2"]).unwrap());
            for dc in [0, 1] {
                assert!(kind(&client, dc).await.is_ok());
            }
        }
        // Who trusts the CA that ended alone is no longer let in, nor shows anybody a certificate that counts.
        let mut old = ClientConfig::clone(&first);
        old.resumption = Resumption::disabled();
        assert!(kind(&Arc::new(old), 0).await.is_err());
        let stranger = peer_client(&material("test").only(B).unwrap(), B).unwrap();
        assert!(connect(stranger, listens[0].clone(), peer_name(&all, A).unwrap()).await.is_err());
    }

    #[tokio::test]
    async fn peers_know_one_another_and_nobody_else_gets_in() {
        let material = material("test");
        let server = peer_server(&material, A).unwrap();
        let client = peer_client(&material, B).unwrap();
        let name = peer_name(&material, A).unwrap();
        for _ in 0..2 {
            let (near, far) = connect(client.clone(), server.clone(), name.clone()).await.unwrap();
            assert_eq!(peer_dc(&material, far.get_ref().1.peer_certificates()), Ok(B));
            assert_eq!(peer_dc(&material, near.get_ref().1.peer_certificates()), Ok(A));
            assert_eq!(near.get_ref().1.handshake_kind(), Some(HandshakeKind::Full), "never resumed");
        }
        assert!(connect(client.clone(), server.clone(), peer_name(&material, B).unwrap()).await.is_err());
        let nobody = Arc::new(edge_client(&material.cas(), &[b"h2"]).unwrap());
        assert!(connect(nobody, server.clone(), name.clone()).await.is_err());
        let other = self::material("test");
        assert!(connect(peer_client(&other, B).unwrap(), server, name).await.is_err());
        assert_eq!(peer_dc(&material, None), Err(PeerError::Missing));
        let edge = &material.edge_identity().unwrap().chain();
        assert_eq!(peer_dc(&material, Some(edge)), Err(PeerError::Name));
    }

    #[test]
    fn tickets_last_one_to_two_periods_and_are_the_clusters_own() {
        let start = Timestamp::new(1_763_640_000_000);
        let (clock, material) = (ManualClock::at(start), material("test"));
        let tickets = |material: &ClusterMaterial, clock| TicketKeys::new(material, clock).unwrap();
        let keys = tickets(&material, clock.clone());
        let ticket = keys.encrypt(b"session").unwrap();
        assert_eq!(keys.decrypt(&ticket).as_deref(), Some(&b"session"[..]));
        assert_eq!(tickets(&self::material("test"), clock.clone()).decrypt(&ticket), None);
        for at in [0, 8, 24, ticket.len() - 1] {
            let mut bad = ticket.clone();
            bad[at] ^= 1;
            assert_eq!(keys.decrypt(&bad), None, "byte {at}");
        }
        assert_eq!(keys.decrypt(&ticket[..20]), None);
        clock.advance(TICKET_PERIOD_SECS * 1000);
        assert!(keys.decrypt(&ticket).is_some(), "the previous key");
        clock.advance(TICKET_PERIOD_SECS * 1000);
        assert_eq!(keys.decrypt(&ticket), None);
        let early = tickets(&material, ManualClock::at(start));
        let ahead = ManualClock::at(start.plus(TICKET_PERIOD_SECS * 1000));
        let ticket = tickets(&material, ahead).encrypt(b"s").unwrap();
        assert!(early.decrypt(&ticket).is_some(), "the next key");
    }
}
