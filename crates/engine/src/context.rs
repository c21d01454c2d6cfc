//! The session context: the signed copy of a session that travels with every internal request.
//!
//! Whoever acts on a request verifies its context itself (G4). It lives at most five minutes, so a verdict may be
//! cached until it ends. Layout, integers big-endian, then 64 bytes of Ed25519 over `"sluice/context/v1\0"` ‖
//! cluster tag ‖ body:
//!
//! | bytes | field |
//! | --- | --- |
//! | 4 | `SLX` and version: 1, or 2 with a quota in files |
//! | 4 | key id |
//! | 2 | issuing DC |
//! | 16 | session |
//! | 8 | tenant |
//! | 4 | scopes, a bit each; a bit that a reader does not know grants nothing |
//! | 8 | rate in bytes a second; 0: no limit |
//! | 8 | quota in bytes; 0: no limit |
//! | 8 | quota in files, never 0; in version 2 only |
//! | 8 | revocation epoch |
//! | 8 | issued at, Unix ms |
//! | 8 | ends at, Unix ms |
//! | 1 + 2·n | allowed DCs, rising; none: all |
//!
//! A context without a quota in files is of version 1, so that processes that know no other take it.

use std::collections::BTreeSet;
use std::fmt;

use uuid::Uuid;

use crate::ids::{DcId, KeyId, RevocationEpoch, SessionId, TenantId, Timestamp};
use crate::keys::{KeyError, KeyRing, SIGNATURE_LEN, SigningKey};
use crate::limits::{CLOCK_TOLERANCE_MS, MAX_CONTEXT_LIFE_MS, MAX_DCS};

const MAGIC: [u8; 4] = *b"SLX\x01";
const MAGIC_WITH_FILES: [u8; 4] = *b"SLX\x02";

/// Up to the quota in bytes, and from there up to the allowed datacenters.
const HEAD_LEN: usize = 54;
const TAIL_LEN: usize = 25;
const FILES_LEN: usize = 8;

/// The longest signed context, in bytes.
pub const MAX_SIGNED_LEN: usize = HEAD_LEN + FILES_LEN + TAIL_LEN + 2 * MAX_DCS + SIGNATURE_LEN;

/// One thing a session may do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u32)]
pub enum Scope {
    /// Create files and send chunks.
    Write = 1,
    /// Read contents, status and lists.
    Read = 2,
    /// Delete files.
    Delete = 4,
    /// Revoke the tokens of any tenant, ask where a tenant stands, drain a datacenter: for who runs the cluster.
    Operate = 8,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 4] = [Self::Write, Self::Read, Self::Delete, Self::Operate];

    /// What a tenant may be allowed; none of it concerns another tenant.
    pub const OF_TENANTS: [Self; 3] = [Self::Write, Self::Read, Self::Delete];

    /// The name used in tokens.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::Delete => "delete",
            Self::Operate => "operate",
        }
    }

    /// The scope with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.name() == name)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a session may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Scopes(u32);

impl Scopes {
    /// Everything that a tenant may be allowed.
    pub fn all() -> Self {
        Scope::OF_TENANTS.into_iter().collect()
    }

    /// Whether the scope is among them.
    pub const fn has(self, scope: Scope) -> bool {
        self.0 & scope as u32 != 0
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<T: IntoIterator<Item = Scope>>(scopes: T) -> Self {
        Self(scopes.into_iter().fold(0, |bits, scope| bits | scope as u32))
    }
}

/// What is known of a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SessionContext {
    /// The session.
    pub session: SessionId,
    /// Whose it is.
    pub tenant: TenantId,
    /// What it may do.
    pub scopes: Scopes,
    /// Bytes a second; 0: no limit.
    pub rate: u64,
    /// Bytes that the tenant may store; 0: no limit.
    pub quota: u64,
    /// Files that the tenant may have; 0: no limit.
    pub quota_files: u64,
    /// Compared with REVOKE facts.
    pub revocation: RevocationEpoch,
    /// Who issued it.
    pub issuer: DcId,
    /// When it was issued.
    pub issued_at: Timestamp,
    /// When it ends: at most five minutes later.
    pub ends_at: Timestamp,
    /// Where it may be used; empty: everywhere.
    pub allowed: BTreeSet<DcId>,
}

/// A context as it travels: bytes that nobody has verified yet.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SignedContext(Vec<u8>);

/// Why a context does not count.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ContextError {
    /// Not the bytes of a context.
    #[error("not a session context: {0}")]
    Malformed(&'static str),
    /// Unknown key, another datacenter's, or a signature that does not hold.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// It has ended.
    #[error("the session context ended {ago_ms} ms ago, {CLOCK_TOLERANCE_MS} ms are tolerated")]
    Expired {
        /// How long ago, in milliseconds: more than the tolerance of 60 s for clocks.
        ago_ms: u64,
    },
    /// It begins in the future, or lives too long.
    #[error(
        "the session context is dated {ahead_ms} ms ahead of this clock, {CLOCK_TOLERANCE_MS} ms are tolerated"
    )]
    NotYet {
        /// How far ahead, in milliseconds.
        ahead_ms: u64,
    },
    /// It may not be used in this datacenter.
    #[error("the session may not use {dc}")]
    NotHere {
        /// This datacenter.
        dc: DcId,
    },
    /// It was revoked.
    #[error("the session was revoked")]
    Revoked,
    /// It may not do this.
    #[error("the session lacks the scope {0}")]
    Scope(Scope),
}

impl ContextError {
    /// The error's name in the protocol.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::Key(error) => error.code(),
            Self::Expired { .. } => "expired",
            Self::NotYet { .. } => "not-yet",
            Self::NotHere { .. } => "not-here",
            Self::Revoked => "revoked",
            Self::Scope(_) => "scope",
        }
    }
}

impl SessionContext {
    /// Signs the context.
    pub fn sign(&self, key: &SigningKey) -> SignedContext {
        let mut out = Vec::with_capacity(MAX_SIGNED_LEN);
        out.extend_from_slice(if self.quota_files == 0 { &MAGIC } else { &MAGIC_WITH_FILES });
        out.extend_from_slice(&key.id().number().to_be_bytes());
        out.extend_from_slice(&self.issuer.number().to_be_bytes());
        out.extend_from_slice(self.session.uuid().as_bytes());
        out.extend_from_slice(&self.tenant.number().to_be_bytes());
        out.extend_from_slice(&self.scopes.0.to_be_bytes());
        out.extend_from_slice(&self.rate.to_be_bytes());
        out.extend_from_slice(&self.quota.to_be_bytes());
        if self.quota_files > 0 {
            out.extend_from_slice(&self.quota_files.to_be_bytes());
        }
        out.extend_from_slice(&self.revocation.number().to_be_bytes());
        out.extend_from_slice(&self.issued_at.number().to_be_bytes());
        out.extend_from_slice(&self.ends_at.number().to_be_bytes());
        out.push(self.allowed.len().min(MAX_DCS) as u8);
        for dc in self.allowed.iter().take(MAX_DCS) {
            out.extend_from_slice(&dc.number().to_be_bytes());
        }
        let signature = key.sign(&out);
        out.extend_from_slice(&signature);
        SignedContext(out)
    }

    /// Refuses what the session may not do.
    pub fn require(&self, scope: Scope) -> Result<(), ContextError> {
        if self.scopes.has(scope) { Ok(()) } else { Err(ContextError::Scope(scope)) }
    }

    /// Refuses a context that is out of its time, or not for this datacenter. What a cached verdict must still pass.
    pub fn check(&self, me: DcId, now: Timestamp) -> Result<(), ContextError> {
        let ahead_ms = self.issued_at.since(now);
        if ahead_ms > CLOCK_TOLERANCE_MS {
            return Err(ContextError::NotYet { ahead_ms });
        }
        let ago_ms = now.since(self.ends_at);
        if ago_ms > CLOCK_TOLERANCE_MS {
            return Err(ContextError::Expired { ago_ms });
        }
        if self.allowed.is_empty() || self.allowed.contains(&me) {
            Ok(())
        } else {
            Err(ContextError::NotHere { dc: me })
        }
    }
}

impl SignedContext {
    /// Takes bytes that came from elsewhere; they prove nothing until [`verify`](Self::verify).
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, ContextError> {
        if bytes.len() > MAX_SIGNED_LEN { Err(ContextError::Malformed("too long")) } else { Ok(Self(bytes)) }
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Verifies form, signature, time and place.
    pub fn verify(&self, ring: &KeyRing, me: DcId, now: Timestamp) -> Result<SessionContext, ContextError> {
        let malformed = ContextError::Malformed;
        let Some((body, signature)) = self.0.split_last_chunk::<SIGNATURE_LEN>() else {
            return Err(malformed("cut short"));
        };
        let Some((head, rest)) = body.split_first_chunk::<HEAD_LEN>() else {
            return Err(malformed("cut short"));
        };
        let with_files = match &head[..4] {
            magic if magic == MAGIC => false,
            magic if magic == MAGIC_WITH_FILES => true,
            _ => return Err(malformed("magic or version")),
        };
        let (files, rest) =
            rest.split_at_checked(if with_files { FILES_LEN } else { 0 }).unwrap_or((rest, &[]));
        let Some((tail, allowed)) = rest.split_first_chunk::<TAIL_LEN>() else {
            return Err(malformed("cut short"));
        };
        let number_in = |bytes: &[u8], at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_be_bytes(number)
        };
        let number = |at| number_in(head, at);
        let key = KeyId::new((number(4) >> 32) as u32);
        let issuer = DcId::new((number(8) >> 48) as u16);
        ring.verify(key, issuer, body, signature)?;

        let mut session = [0; 16];
        session.copy_from_slice(&head[10..26]);
        let count = usize::from(tail[TAIL_LEN - 1]);
        if allowed.len() != 2 * count || count > MAX_DCS {
            return Err(malformed("allowed datacenters"));
        }
        let allowed: Vec<DcId> =
            allowed.chunks_exact(2).map(|b| DcId::new(u16::from_be_bytes([b[0], b[1]]))).collect();
        if !allowed.is_sorted_by(|a, b| a < b) {
            return Err(malformed("allowed datacenters do not rise"));
        }
        let quota_files = if with_files { number_in(files, 0) } else { 0 };
        if with_files && quota_files == 0 {
            return Err(malformed("version 2 without a quota in files"));
        }
        let context = SessionContext {
            session: SessionId::new(Uuid::from_bytes(session)),
            tenant: TenantId::new(number(26)),
            scopes: Scopes((number(34) >> 32) as u32),
            rate: number(38),
            quota: number(46),
            quota_files,
            revocation: RevocationEpoch::new(number_in(tail, 0)),
            issuer,
            issued_at: Timestamp::new(number_in(tail, 8)),
            ends_at: Timestamp::new(number_in(tail, 16)),
            allowed: allowed.into_iter().collect(),
        };
        if context.ends_at.since(context.issued_at) > MAX_CONTEXT_LIFE_MS {
            return Err(malformed("lives too long"));
        }
        context.check(me, now)?;
        Ok(context)
    }
}

impl fmt::Debug for SignedContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignedContext({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{ClusterTag, Purpose};

    const HERE: DcId = DcId::new(1);
    const NOW: Timestamp = Timestamp::new(1_763_640_000_000);

    fn key(cluster: &str) -> SigningKey {
        SigningKey::from_seed(Purpose::Context, ClusterTag::of_name(cluster), HERE, KeyId::new(5), &[5; 32])
            .unwrap()
    }

    fn ring() -> KeyRing {
        let key = key("test");
        KeyRing::new(Purpose::Context, ClusterTag::of_name("test"), [(key.id(), key.public())])
    }

    fn context() -> SessionContext {
        SessionContext {
            session: SessionId::new(Uuid::from_u128(42)),
            tenant: TenantId::new(7),
            scopes: [Scope::Write, Scope::Read].into_iter().collect(),
            rate: 1,
            quota: 2,
            quota_files: 0,
            revocation: RevocationEpoch::new(3),
            issuer: HERE,
            issued_at: NOW,
            ends_at: NOW.plus(MAX_CONTEXT_LIFE_MS),
            allowed: [HERE, DcId::new(2)].into(),
        }
    }

    #[test]
    fn round_trip_with_golden_bytes() {
        let signed = context().sign(&key("test"));
        assert_eq!(
            blake3::hash(signed.as_bytes()).to_hex().as_str(),
            "c769b569718c3525b6cfad3f3099c94fe647be3dedfa7c61f16c4400ef146bd6"
        );
        assert_eq!(signed.verify(&ring(), HERE, NOW), Ok(context()));
        assert!(signed.as_bytes().len() <= MAX_SIGNED_LEN);
    }

    #[test]
    fn a_quota_in_files_makes_it_version_two() {
        let limited = SessionContext { quota_files: 9, ..context() };
        let signed = limited.sign(&key("test"));
        assert_eq!(
            blake3::hash(signed.as_bytes()).to_hex().as_str(),
            "08ce8755f940b907260b02b28325b73979da0fc7fd0e13ace089fbe4feb704fc"
        );
        assert_eq!(
            (signed.as_bytes()[3], signed.as_bytes().len()),
            (2, 8 + context().sign(&key("test")).0.len())
        );
        assert_eq!(signed.verify(&ring(), HERE, NOW), Ok(limited.clone()));
        let everywhere = (1..=MAX_DCS as u16).map(DcId::new).collect();
        let longest = SessionContext { allowed: everywhere, ..limited }.sign(&key("test"));
        assert_eq!(longest.as_bytes().len(), MAX_SIGNED_LEN);
        assert!(longest.verify(&ring(), HERE, NOW).is_ok());
        // There is one form of each context.
        let mut none = signed.as_bytes()[..signed.as_bytes().len() - SIGNATURE_LEN].to_vec();
        none[HEAD_LEN..HEAD_LEN + FILES_LEN].fill(0);
        let signature = key("test").sign(&none);
        none.extend_from_slice(&signature);
        assert_eq!(
            SignedContext(none).verify(&ring(), HERE, NOW),
            Err(ContextError::Malformed("version 2 without a quota in files"))
        );
    }

    #[test]
    fn refusals_are_named() {
        let signed = context().sign(&key("test"));
        let verify = |signed: &SignedContext, now| signed.verify(&ring(), HERE, now);
        let end = context().ends_at;
        assert!(verify(&signed, end.plus(CLOCK_TOLERANCE_MS)).is_ok());
        assert!(matches!(
            verify(&signed, end.plus(CLOCK_TOLERANCE_MS + 1)),
            Err(ContextError::Expired { ago_ms: 60_001 })
        ));
        let early = Timestamp::new(NOW.number() - CLOCK_TOLERANCE_MS - 1);
        assert!(matches!(verify(&signed, early), Err(ContextError::NotYet { .. })));
        let foreign = context().sign(&key("another"));
        assert_eq!(verify(&foreign, NOW), Err(ContextError::Key(KeyError::Signature)));
        assert_eq!(
            signed.verify(&ring(), DcId::new(9), NOW),
            Err(ContextError::NotHere { dc: DcId::new(9) })
        );
        assert_eq!(context().require(Scope::Delete), Err(ContextError::Scope(Scope::Delete)));
        let long = SessionContext { ends_at: end.plus(1), ..context() };
        assert_eq!(verify(&long.sign(&key("test")), NOW), Err(ContextError::Malformed("lives too long")));
    }

    #[test]
    fn no_flipped_or_missing_byte_is_accepted() {
        let limited = SessionContext { quota_files: 9, ..context() };
        for signed in [context(), limited].map(|context| context.sign(&key("test"))) {
            unforgeable(&signed);
        }
    }

    fn unforgeable(signed: &SignedContext) {
        for i in 0..signed.as_bytes().len() {
            let mut bytes = signed.as_bytes().to_vec();
            bytes[i] ^= 0x10;
            assert!(
                SignedContext::from_bytes(bytes).unwrap().verify(&ring(), HERE, NOW).is_err(),
                "byte {i}"
            );
            let cut = SignedContext::from_bytes(signed.as_bytes()[..i].to_vec()).unwrap();
            assert!(cut.verify(&ring(), HERE, NOW).is_err(), "cut at {i}");
        }
    }
}
