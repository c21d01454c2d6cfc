//! The cryptographic material of a cluster: certificates, signing keys, the token key, the ticket secret.
//!
//! [`ClusterMaterial::generate`] makes all of it for development; [`save`](ClusterMaterial::save) and
//! [`load`](ClusterMaterial::load) keep it in a directory (`disk.rs` fixes the format). Public halves are known for
//! every datacenter; secrets may be absent, and [`only`](ClusterMaterial::only) takes away those that one datacenter
//! has no need of. Owned by the composition, read at start; nothing has to be stopped.
//!
//! | purpose | what | whose |
//! | --- | --- | --- |
//! | clients → edges | one certificate for `edge.<cluster>.sluice`, one name below it, localhost and loopback | shared by all edges |
//! | datacenter ↔ datacenter | a certificate for `dc-<number>.peer.<cluster>.sluice`, client and server | one each |
//! | process ↔ process of a datacenter | a certificate for `<role>.dc-<number>.<cluster>.sluice`, client and server | one for each role and datacenter |
//! | commands, contexts | Ed25519 keys, used for nothing else | one each |
//! | tokens | one Ed25519 key; only who mints tokens has the secret half | the cluster's |
//! | TLS tickets | one secret, from which keys are derived by time | shared by all edges |
//!
//! During a rotation there are two of what is rotated.
//! Certificates and keys give way to others while processes run: certificates in an [`Identity`] each, keys and CA all at
//! once (`keys.rs`). Whoever uses a key asks for it each time.

mod disk;
mod identity;
mod issue;
mod keys;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::pki_types::CertificateDer;
use sluice_engine::ids::{DcId, Timestamp};
use sluice_engine::keys::{ClusterTag, KeyRing, Purpose, SigningKey};
use sluice_engine::limits::{CLOCK_TOLERANCE_MS, MAX_DCS};
use sluice_engine::share::Shares;
use tokio::sync::watch;

pub use self::identity::Identity;
pub use self::keys::{KeyKind, Stage};
use self::keys::{KeySet, Keys};

use crate::clock::{Clock as _, SystemClock};
use crate::role::Role;
use crate::tls::{self, Trust};
use crate::token::{TokenMint, TokenVerifier};

/// The longest name of a cluster or datacenter: it becomes part of a DNS name.
const MAX_NAME_LEN: usize = 40;

/// Why there is no material, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    /// A name cannot be part of a DNS name.
    #[error("{what} {got:?} must be 1 to {MAX_NAME_LEN} of a-z, 0-9 and inner hyphens")]
    Name {
        /// What it should name.
        what: &'static str,
        /// What came.
        got: String,
    },
    /// A datacenter is given twice, or is the address of all, or there are none or too many.
    #[error("the list of datacenters is not acceptable: {0}")]
    Datacenters(String),
    /// No such datacenter.
    #[error("{0} is not part of the cluster")]
    UnknownDc(DcId),
    /// A secret is needed that is not kept here.
    #[error("the secret of {0} is not part of this material")]
    Absent(String),
    /// Keys or certificates could not be made.
    #[error("{what} could not be made: {reason}")]
    Issue {
        /// What.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// Something is not what it was, and is kept for as long as the process runs.
    #[error("{0} changed: that takes effect at the next start, and nothing was renewed")]
    Changed(&'static str),
    /// The keys are of a revision that was left behind.
    #[error("the keys are of revision {came}, and those that are used of revision {held}: copy the newest")]
    Older {
        /// What is used.
        held: u64,
        /// What came.
        came: u64,
    },
    /// A new certificate would be refused by whoever sees it.
    #[error("the new certificate of {whose} is not accepted, and nothing was renewed: {reason}")]
    Renewal {
        /// Whose.
        whose: String,
        /// Why.
        reason: String,
    },
    /// A file is needed that is not there.
    #[error("{path} is missing: make the material anew, or copy it whole")]
    Missing {
        /// Which.
        path: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{path} is garbled: expected {expected}")]
    Garbled {
        /// Which.
        path: PathBuf,
        /// What it should hold.
        expected: &'static str,
    },
    /// The disk failed.
    #[error("{path} cannot be read or written: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}

/// Why a certificate is of no use to whoever shows it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CertificateError {
    /// Its time is over.
    #[error("the certificate of {whose} in {path} has expired")]
    Expired {
        /// Whose.
        whose: String,
        /// The file that it is in.
        path: PathBuf,
        /// The last moment at which it was good.
        since: Timestamp,
    },
    /// Its time has not come.
    #[error("the certificate of {whose} in {path} is not valid yet")]
    NotYet {
        /// Whose.
        whose: String,
        /// The file that it is in.
        path: PathBuf,
        /// The first moment at which it is good.
        from: Timestamp,
    },
    /// Others refuse it whatever the time is.
    #[error("the certificate of {whose} in {path} is accepted by nobody: {reason}")]
    Refused {
        /// Whose.
        whose: String,
        /// The file that it is in.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// What belongs to one datacenter, beside its keys.
#[derive(Clone)]
struct DcMaterial {
    name: String,
    peer: Option<Identity>,
    roles: BTreeMap<Role, Identity>,
}

/// The cryptographic material of a cluster, or the part of it that one datacenter needs. Clones share certificates and
/// keys; a part shares certificates only.
#[derive(Clone)]
pub struct ClusterMaterial {
    name: String,
    shares: Shares,
    dcs: BTreeMap<DcId, DcMaterial>,
    edge: Option<Identity>,
    keys: Arc<ArcSwap<Keys>>,
    /// The revision, for whoever wants to know when it changes.
    changes: Arc<watch::Sender<u64>>,
}

impl fmt::Debug for ClusterMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterMaterial({}, {} datacenters)", self.name, self.dcs.len())
    }
}

impl ClusterMaterial {
    /// Makes new material for a cluster of these datacenters, for development: everything in one place.
    pub fn generate(name: &str, dcs: &[(DcId, &str)]) -> Result<Self, MaterialError> {
        check_name("cluster name", name)?;
        check_dcs(dcs.iter().map(|(dc, name)| (*dc, *name)))?;
        issue::generate(name, dcs, SystemClock.now())
    }

    /// The same for a cluster that divides its slots into so many shares, in every datacenter.
    #[must_use]
    pub fn dividing(self, shares: Shares) -> Self {
        Self { shares, ..self }
    }

    /// Into how many shares every datacenter divides its slots.
    pub fn shares(&self) -> Shares {
        self.shares
    }

    /// Writes the material to a directory, which is made if need be: each file atomically, secrets for the owner only.
    pub fn save(&self, directory: &Path) -> Result<(), MaterialError> {
        disk::save(self, directory)
    }

    /// Reads what [`save`](Self::save) wrote. Files of secrets may be absent; garbled ones are an error.
    pub fn load(directory: &Path) -> Result<Self, MaterialError> {
        disk::load(directory, true)
    }

    /// The same without certificates but the CA's, whether or not they are sound: to [make them anew](Self::reissued).
    pub fn load_keys(directory: &Path) -> Result<Self, MaterialError> {
        disk::load(directory, false)
    }

    /// The part that one datacenter needs: no secrets of others, of the CA, or of whoever mints tokens.
    pub fn only(&self, me: DcId) -> Result<Self, MaterialError> {
        self.dc(me)?;
        let mut part = self.clone();
        for (_, other) in part.dcs.iter_mut().filter(|(dc, _)| **dc != me) {
            other.peer = None;
            other.roles.clear();
        }
        part.with_keys(|keys| {
            keys.ca.all_mut().for_each(|ca| ca.key = None);
            keys.tokens.all_mut().for_each(|key| key.secret = None);
            for (_, other) in keys.dcs.iter_mut().filter(|(dc, _)| **dc != me) {
                other.commands.all_mut().chain(other.contexts.all_mut()).for_each(|key| key.seed = None);
            }
        })
    }

    /// The part that a process of one role in one datacenter needs: its own certificate; for an edge that towards clients,
    /// and the secret of tickets; for a session service the key of contexts; for an aggregator what it needs among
    /// datacenters.
    pub fn only_role(&self, me: DcId, role: Role) -> Result<Self, MaterialError> {
        let mut part = self.only(me)?;
        if role != Role::Edge {
            part.edge = None;
        }
        if let Some(own) = part.dcs.get_mut(&me) {
            own.roles.retain(|held, _| *held == role);
            if role != Role::Aggregator {
                own.peer = None;
            }
        }
        part.with_keys(|keys| {
            if role != Role::Edge {
                keys.tickets = None;
            }
            if let Some(own) = keys.dcs.get_mut(&me) {
                if role != Role::Session {
                    own.contexts.all_mut().for_each(|key| key.seed = None);
                }
                if role != Role::Aggregator {
                    own.commands.all_mut().for_each(|key| key.seed = None);
                }
            }
        })
    }

    /// The same with other keys, which are its own.
    fn with_keys(self, change: impl FnOnce(&mut KeySet)) -> Result<Self, MaterialError> {
        self.try_with_keys(|set| {
            change(set);
            Ok(())
        })
    }

    fn try_with_keys(
        self,
        change: impl FnOnce(&mut KeySet) -> Result<(), MaterialError>,
    ) -> Result<Self, MaterialError> {
        let mut set = self.keys.load().set.clone();
        change(&mut set)?;
        let (revision, keys) = (set.revision, Keys::new(&self.name, set)?);
        let (keys, changes) = (Arc::new(ArcSwap::from_pointee(keys)), Arc::new(watch::Sender::new(revision)));
        Ok(Self { keys, changes, ..self })
    }

    /// The same with new certificates, and new keys of these. It takes the key of the CA.
    pub fn reissued(&self) -> Result<Self, MaterialError> {
        self.reissued_at(SystemClock.now())
    }

    /// The same as if it were another time: long ago, and the certificates have expired by now.
    pub fn reissued_at(&self, now: Timestamp) -> Result<Self, MaterialError> {
        let reissued = issue::reissue(self, now)?;
        reissued.check_chains(now)?;
        Ok(reissued)
    }

    /// The same one step on in the rotation of each of these kinds of keys. It takes all secrets.
    pub fn rotated(&self, kinds: &[KeyKind]) -> Result<Self, MaterialError> {
        let now = SystemClock.now();
        let rotated = issue::rotate(self, kinds, now)?;
        rotated.check_chains(now)?;
        Ok(rotated)
    }

    /// How many steps of rotations were made.
    pub fn revision(&self) -> u64 {
        self.keys.load().set.revision
    }

    /// Where the rotation of a kind of keys stands; `None`: there is one key, and no rotation.
    pub fn stage(&self, kind: KeyKind) -> Option<Stage> {
        self.keys.load().set.stages.get(&kind).copied()
    }

    /// Takes over the keys and certificates of `fresh`, wherever this material or a clone of it is used, and the
    /// certificates also where a part of it is; says how many of these are other ones. All or nothing: keys have to
    /// follow those that are used, and each certificate has to be signed by a CA that is known then, for its name, and
    /// for `now`. All else must be what it was.
    pub fn renew(&self, fresh: &Self, now: Timestamp) -> Result<usize, MaterialError> {
        self.check_same(fresh)?;
        let (held, keys) = (self.keys.load(), fresh.keys.load_full());
        held.set.check_followed_by(&keys.set)?;
        let set = keys.set.clone().no_more_than(&held.set);
        let mut pairs = Vec::new();
        for (name, _, mine) in self.identities() {
            let new = fresh.identities().find(|(other, ..)| *other == name);
            let (.., new) = new.ok_or_else(|| MaterialError::Absent(name.clone()))?;
            let is_other = mine.chain() != new.chain();
            if is_other || set != held.set {
                fresh.check_chain(name, new, now)?;
            }
            if is_other {
                pairs.push((mine, new));
            }
        }
        // First whom to trust, then what others have to trust.
        if set != held.set {
            let revision = set.revision;
            self.keys.store(Arc::new(Keys::new(&self.name, set)?));
            self.changes.send_replace(revision);
        }
        pairs.iter().for_each(|(mine, new)| mine.renew(new));
        Ok(pairs.len())
    }

    fn check_chains(&self, now: Timestamp) -> Result<(), MaterialError> {
        self.identities().try_for_each(|(name, _, new)| self.check_chain(name, new, now))
    }

    fn check_chain(&self, whose: String, new: &Identity, now: Timestamp) -> Result<(), MaterialError> {
        self.accepts(&whose, &new.chain(), now).map_err(|reason| MaterialError::Renewal { whose, reason })
    }

    /// Whether whoever has this material takes a chain for the certificate of this name; if not, why.
    fn accepts(&self, whose: &str, chain: &[CertificateDer<'static>], now: Timestamp) -> Result<(), String> {
        tls::check_chain(&self.trust(), whose, whose != self.edge_tls_name(), chain, now)
    }

    /// Whether others take every certificate that is held, at `now`. One that begins a moment later is taken for good, since
    /// clocks differ. The material is that of `directory`, whose file is named.
    pub fn check_certificates(&self, directory: &Path, now: Timestamp) -> Result<(), CertificateError> {
        let moment = |secs: u64| Timestamp::new(secs.saturating_mul(1000));
        for (whose, file, identity) in self.identities() {
            let (path, chain) = (disk::found(directory.join(file)), identity.chain());
            let until = chain.iter().filter_map(tls::not_after).min();
            if let Some(until) = until.filter(|until| *until < now.number() / 1000) {
                return Err(CertificateError::Expired { whose, path, since: moment(until) });
            }
            let from = chain.iter().filter_map(tls::not_before).max();
            let from = from.map_or(now, moment);
            if from > now.plus(CLOCK_TOLERANCE_MS) {
                return Err(CertificateError::NotYet { whose, path, from });
            }
            let accepted = self.accepts(&whose, &chain, now.max(from));
            accepted.map_err(|reason| CertificateError::Refused { whose, path, reason })?;
        }
        Ok(())
    }

    fn check_same(&self, other: &Self) -> Result<(), MaterialError> {
        let differs = [
            (self.name != other.name, "the name of the cluster"),
            (self.shares != other.shares, "the number of shares"),
            (!self.dcs().eq(other.dcs()), "a datacenter"),
        ];
        match differs.into_iter().find(|(differs, _)| *differs) {
            Some((_, what)) => Err(MaterialError::Changed(what)),
            None => Ok(()),
        }
    }

    /// Every certificate that is held: the name that it is for, the file that it is kept in, and itself.
    fn identities(&self) -> impl Iterator<Item = (String, PathBuf, &Identity)> {
        let edge = self.edge.iter();
        let edge = edge.map(|identity| (self.edge_tls_name(), disk::chain_file(None, "edge"), identity));
        edge.chain(self.dcs.iter().flat_map(|(dc, part)| {
            let peer = part
                .peer
                .iter()
                .map(|identity| (self.peer_tls_name(*dc), disk::chain_file(Some(*dc), "peer"), identity));
            peer.chain(part.roles.iter().map(|(role, identity)| {
                let file = disk::chain_file(Some(*dc), role.name());
                (self.role_tls_name(*dc, *role), file, identity)
            }))
        }))
    }

    /// When certificates expire, the first of each purpose, in seconds since 1970: `ca`, `edge` (towards clients), `peer`
    /// (between datacenters), `inside` (between processes of one). What cannot be read is left out.
    pub fn expiries(&self) -> BTreeMap<&'static str, u64> {
        let mut first = BTreeMap::new();
        let mut note = |purpose, certificate: &CertificateDer<'_>| {
            if let Some(at) = tls::not_after(certificate) {
                let noted = first.entry(purpose).or_insert(at);
                *noted = at.min(*noted);
            }
        };
        self.cas().iter().for_each(|ca| note("ca", ca));
        let (edge, dcs) = (self.edge.iter().map(|identity| ("edge", identity)), self.dcs.values());
        let inside = dcs.clone().flat_map(|dc| dc.roles.values()).map(|identity| ("inside", identity));
        let peer = dcs.flat_map(|dc| &dc.peer).map(|identity| ("peer", identity));
        for (purpose, identity) in edge.chain(peer).chain(inside) {
            identity.chain().iter().for_each(|certificate| note(purpose, certificate));
        }
        first
    }

    /// Name of the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is signed with every message, so that clusters cannot be confused.
    pub fn tag(&self) -> ClusterTag {
        ClusterTag::of_name(&self.name)
    }

    /// The datacenters, in order of number.
    pub fn dcs(&self) -> impl Iterator<Item = (DcId, &str)> {
        self.dcs.iter().map(|(dc, material)| (*dc, material.name.as_str()))
    }

    /// Name of a datacenter.
    pub fn dc_name(&self, dc: DcId) -> Option<&str> {
        self.dcs.get(&dc).map(|material| material.name.as_str())
    }

    /// The datacenter with this name.
    pub fn dc_named(&self, name: &str) -> Option<DcId> {
        self.dcs().find(|(_, candidate)| *candidate == name).map(|(dc, _)| dc)
    }

    /// The certificates of the CA, the one that issues first.
    pub fn cas(&self) -> Vec<CertificateDer<'static>> {
        self.keys.load().set.ca.all().map(|ca| ca.certificate.clone()).collect()
    }

    /// The certificates of the CA in PEM, for clients.
    pub fn ca_pem(&self) -> String {
        self.cas().iter().map(disk::certificate_pem).collect()
    }

    /// Waits until whoever has shown these certificates is trusted no more, since their CA ended. Connections on which
    /// nothing else says who speaks end with that.
    pub async fn distrusts(&self, chain: Option<&[CertificateDer<'static>]>) {
        let mut changes = self.changes.subscribe();
        loop {
            let now = SystemClock.now();
            if !chain.is_some_and(|chain| tls::is_trusted(&self.trust(), chain, now)) {
                return;
            }
            // The sender lives as long as the material.
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Whom to trust now.
    pub(crate) fn trust(&self) -> Arc<Trust> {
        self.keys.load().trust.clone()
    }

    /// The one name under which every edge of the cluster is known to TLS.
    pub fn edge_tls_name(&self) -> String {
        format!("edge.{}.sluice", self.name)
    }

    /// The name under which a datacenter is known to its peers.
    pub fn peer_tls_name(&self, dc: DcId) -> String {
        peer_tls_name(&self.name, dc)
    }

    /// The name under which processes of a role are known inside a datacenter.
    pub fn role_tls_name(&self, dc: DcId, role: Role) -> String {
        role_tls_name(&self.name, dc, role)
    }

    /// The certificate of a role in a datacenter, and its key.
    pub fn role_identity(&self, dc: DcId, role: Role) -> Result<&Identity, MaterialError> {
        let held = self.dc(dc)?.roles.get(&role);
        held.ok_or_else(|| MaterialError::Absent(self.role_tls_name(dc, role)))
    }

    /// The role that a TLS name belongs to, and its datacenter.
    pub(crate) fn role_of_name(&self, name: &str) -> Option<(DcId, Role)> {
        let all = self.dcs.keys().flat_map(|dc| Role::ALL.map(|role| (*dc, role)));
        all.into_iter().find(|(dc, role)| self.role_tls_name(*dc, *role) == name)
    }

    /// The datacenter that a peer's TLS name belongs to.
    pub(crate) fn dc_of_peer_name(&self, name: &str) -> Option<DcId> {
        self.dcs.keys().copied().find(|dc| self.peer_tls_name(*dc) == name)
    }

    /// The certificate of the edges, and its key.
    pub fn edge_identity(&self) -> Result<&Identity, MaterialError> {
        self.edge.as_ref().ok_or_else(|| MaterialError::Absent("the edges".into()))
    }

    /// A datacenter's certificate towards its peers, and its key.
    pub fn peer_identity(&self, dc: DcId) -> Result<&Identity, MaterialError> {
        self.dc(dc)?.peer.as_ref().ok_or_else(|| MaterialError::Absent(self.peer_tls_name(dc)))
    }

    /// The key with which a datacenter signs commands now.
    pub fn command_key(&self, dc: DcId) -> Result<Arc<SigningKey>, MaterialError> {
        self.dc(dc)?;
        self.keys.load().signing(Purpose::Command, dc)
    }

    /// The key with which a datacenter signs session contexts now.
    pub fn context_key(&self, dc: DcId) -> Result<Arc<SigningKey>, MaterialError> {
        self.dc(dc)?;
        self.keys.load().signing(Purpose::Context, dc)
    }

    /// The public keys with which commands are verified now.
    pub fn command_ring(&self) -> Arc<KeyRing> {
        self.keys.load().command_ring.clone()
    }

    /// The public keys with which session contexts are verified now.
    pub fn context_ring(&self) -> Arc<KeyRing> {
        self.keys.load().context_ring.clone()
    }

    /// Makes tokens, where the secret half of the token key is kept.
    pub fn token_mint(&self) -> Result<TokenMint, MaterialError> {
        let keys = self.keys.load();
        let key = keys.set.tokens.current.secret.as_ref();
        let key = key.ok_or_else(|| MaterialError::Absent("the token key".into()))?;
        TokenMint::new(&self.name, &key.0)
            .map_err(|error| MaterialError::Issue { what: "the token mint", reason: error.to_string() })
    }

    /// Verifies tokens as of now.
    pub fn token_verifier(&self) -> Arc<TokenVerifier> {
        self.keys.load().tokens.clone()
    }

    /// The secrets of TLS tickets, the one for new tickets first.
    pub fn ticket_secrets(&self) -> Result<Vec<[u8; 32]>, MaterialError> {
        let keys = self.keys.load();
        let secrets = keys.set.tickets.as_ref().map(|secrets| secrets.all().copied().collect());
        secrets.ok_or_else(|| MaterialError::Absent("the TLS tickets".into()))
    }

    fn dc(&self, dc: DcId) -> Result<&DcMaterial, MaterialError> {
        self.dcs.get(&dc).ok_or(MaterialError::UnknownDc(dc))
    }
}

fn peer_tls_name(cluster: &str, dc: DcId) -> String {
    format!("dc-{}.peer.{cluster}.sluice", dc.number())
}

fn role_tls_name(cluster: &str, dc: DcId, role: Role) -> String {
    format!("{role}.dc-{}.{cluster}.sluice", dc.number())
}

fn check_name(what: &'static str, name: &str) -> Result<(), MaterialError> {
    let letters = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    let length = (1..=MAX_NAME_LEN).contains(&name.len());
    if letters && length && !name.starts_with('-') && !name.ends_with('-') {
        Ok(())
    } else {
        Err(MaterialError::Name { what, got: name.chars().take(64).collect() })
    }
}

fn check_dcs<'a>(dcs: impl Iterator<Item = (DcId, &'a str)>) -> Result<(), MaterialError> {
    let mut names = BTreeMap::new();
    let mut numbers = BTreeMap::new();
    for (dc, name) in dcs {
        check_name("datacenter name", name)?;
        if dc == DcId::EVERY {
            return Err(MaterialError::Datacenters(format!("number {} means all of them", dc.number())));
        }
        if numbers.insert(dc, ()).is_some() {
            return Err(MaterialError::Datacenters(format!("number {} is given twice", dc.number())));
        }
        if names.insert(name, ()).is_some() {
            return Err(MaterialError::Datacenters(format!("name {name} is given twice")));
        }
    }
    if (1..=MAX_DCS).contains(&numbers.len()) {
        Ok(())
    } else {
        Err(MaterialError::Datacenters(format!("{} of them, expected 1 to {MAX_DCS}", numbers.len())))
    }
}
