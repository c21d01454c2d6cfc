//! A tenant's token: a JWT signed with the cluster's token key (EdDSA, RFC 8037), which any datacenter verifies alone.
//!
//! | claim | meaning |
//! | --- | --- |
//! | `iss` | name of the cluster |
//! | `sub` | name of the tenant |
//! | `tenant` | number of the tenant |
//! | `scopes` | of `write`, `read`, `delete`; and `operate`, for who runs the cluster |
//! | `quota` · `rate` | bytes the tenant may store · bytes a second; 0: no limit |
//! | `quota_files` | files the tenant may have; absent or 0: no limit |
//! | `dcs` | numbers of the datacenters where it may be used; empty: all |
//! | `epoch` | compared with revocations: the Unix milliseconds at which `sluice admin token mint` made it |
//! | `iat` · `nbf` · `exp` | Unix seconds; 60 s are tolerated |
//! | `jti` | a UUIDv7: names the token, and the session that begins with its first request |
//!
//! The algorithm is pinned: a token that names another (or `none`) is refused before its signature is looked at.
//! Because the session is named by the token, every datacenter knows it by the same id, and a revoked session stays
//! revoked when a session service restarts.

use std::fmt;
use std::time::Duration;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde::{Deserialize, Serialize};
use sluice_engine::context::{Scope, Scopes};
use sluice_engine::ids::{DcId, RevocationEpoch, SessionId, TenantId, Timestamp};
use sluice_engine::limits::{CLOCK_TOLERANCE_MS, MAX_DCS};
use uuid::Uuid;

/// The longest token that is looked at, in bytes.
pub const MAX_TOKEN_LEN: usize = 4096;

/// What a token says, as it travels.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    tenant: u64,
    scopes: Vec<String>,
    quota: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    quota_files: u64,
    rate: u64,
    #[serde(default)]
    dcs: Vec<u16>,
    epoch: u64,
    iat: u64,
    nbf: u64,
    exp: u64,
    jti: Uuid,
}

/// What a token grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenGrant {
    /// Whose it is.
    pub tenant: TenantId,
    /// Name of the tenant, for people.
    pub tenant_name: String,
    /// What it allows.
    pub scopes: Vec<Scope>,
    /// Bytes that the tenant may store; 0: no limit.
    pub quota: u64,
    /// Files that the tenant may have; 0: no limit.
    pub quota_files: u64,
    /// Bytes a second; 0: no limit.
    pub rate: u64,
    /// How long it lives.
    pub lifetime: Duration,
    /// Where it may be used; empty: everywhere.
    pub dcs: Vec<DcId>,
    /// Tokens of an epoch older than a revocation's are void.
    pub epoch: RevocationEpoch,
}

impl TokenGrant {
    /// Everything that a tenant may be allowed, everywhere, without limits, for this long.
    pub fn everything(tenant: TenantId, tenant_name: impl Into<String>, lifetime: Duration) -> Self {
        Self {
            tenant,
            tenant_name: tenant_name.into(),
            scopes: Scope::OF_TENANTS.to_vec(),
            quota: 0,
            quota_files: 0,
            rate: 0,
            lifetime,
            dcs: Vec::new(),
            epoch: RevocationEpoch::default(),
        }
    }
}

/// A token that was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedToken {
    /// The session that the token stands for.
    pub session: SessionId,
    /// Whose it is.
    pub tenant: TenantId,
    /// Name of the tenant.
    pub tenant_name: String,
    /// What it allows.
    pub scopes: Scopes,
    /// Bytes that the tenant may store; 0: no limit.
    pub quota: u64,
    /// Files that the tenant may have; 0: no limit.
    pub quota_files: u64,
    /// Bytes a second; 0: no limit.
    pub rate: u64,
    /// Where it may be used; empty: everywhere.
    pub dcs: Vec<DcId>,
    /// Compared with revocations.
    pub epoch: RevocationEpoch,
    /// When it ends.
    pub ends_at: Timestamp,
}

/// What a token says of itself, believed by nobody: for people who look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnverifiedToken {
    /// Name of the cluster.
    pub cluster: String,
    /// The session that the token stands for.
    pub session: SessionId,
    /// Whose it is.
    pub tenant: TenantId,
    /// Name of the tenant.
    pub tenant_name: String,
    /// What it allows, also what this version does not know.
    pub scopes: Vec<String>,
    /// Bytes that the tenant may store; 0: no limit.
    pub quota: u64,
    /// Files that the tenant may have; 0: no limit.
    pub quota_files: u64,
    /// Bytes a second; 0: no limit.
    pub rate: u64,
    /// Where it may be used; empty: everywhere.
    pub dcs: Vec<DcId>,
    /// Compared with revocations.
    pub epoch: RevocationEpoch,
    /// When it begins.
    pub begins_at: Timestamp,
    /// When it ends.
    pub ends_at: Timestamp,
}

impl UnverifiedToken {
    /// Reads a token without a look at its signature.
    pub fn read(token: &str) -> Result<Self, TokenError> {
        if token.len() > MAX_TOKEN_LEN {
            return Err(TokenError::Invalid("too long"));
        }
        let claims = jsonwebtoken::dangerous::insecure_decode_claims::<Claims>(token)
            .map_err(|error| TokenError::Invalid(reason(error.kind())))?;
        Ok(Self {
            cluster: claims.iss,
            session: SessionId::new(claims.jti),
            tenant: TenantId::new(claims.tenant),
            tenant_name: claims.sub,
            scopes: claims.scopes,
            quota: claims.quota,
            quota_files: claims.quota_files,
            rate: claims.rate,
            dcs: claims.dcs.into_iter().map(DcId::new).collect(),
            epoch: RevocationEpoch::new(claims.epoch),
            begins_at: Timestamp::new(claims.nbf.saturating_mul(1000)),
            ends_at: Timestamp::new(claims.exp.saturating_mul(1000)),
        })
    }
}

/// Why a token is not minted, or does not count.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    /// Not a token, or not of this cluster's making. Says nothing of the token's contents.
    #[error("the token is not one of this cluster: {0}")]
    Invalid(&'static str),
    /// Past its end, beyond the tolerance for clocks.
    #[error("the token expired {ago_secs} s ago, 60 s are tolerated")]
    Expired {
        /// How long ago, in seconds.
        ago_secs: u64,
    },
    /// Its time has not come.
    #[error("the token is valid in {ahead_secs} s, 60 s are tolerated")]
    NotYet {
        /// How far ahead, in seconds.
        ahead_secs: u64,
    },
    /// The key does not sign.
    #[error("the token key cannot sign")]
    Key,
}

impl TokenError {
    /// The error's name in the protocol.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::Expired { .. } => "expired",
            Self::NotYet { .. } => "not-yet",
            Self::Key => "key",
        }
    }
}

/// Makes tokens. Holds the secret key.
pub struct TokenMint {
    cluster: String,
    key: EncodingKey,
    public: [u8; 32],
}

impl fmt::Debug for TokenMint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenMint({})", self.cluster)
    }
}

impl TokenMint {
    /// A mint with this Ed25519 key, in PKCS#8.
    pub fn new(cluster: &str, pkcs8: &[u8]) -> Result<Self, TokenError> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(pkcs8).map_err(|_| TokenError::Key)?;
        let mut public = [0; 32];
        public.copy_from_slice(pair.public_key().as_ref());
        Ok(Self { cluster: cluster.to_owned(), key: EncodingKey::from_ed_der(pkcs8), public })
    }

    /// The public half, with which any datacenter verifies.
    pub fn public(&self) -> [u8; 32] {
        self.public
    }

    /// Makes a token that counts from `now` on.
    pub fn mint(&self, grant: &TokenGrant, now: Timestamp) -> Result<String, TokenError> {
        let secs = now.number() / 1000;
        let claims = Claims {
            iss: self.cluster.clone(),
            sub: grant.tenant_name.clone(),
            tenant: grant.tenant.number(),
            scopes: grant.scopes.iter().map(|scope| scope.name().to_owned()).collect(),
            quota: grant.quota,
            quota_files: grant.quota_files,
            rate: grant.rate,
            dcs: grant.dcs.iter().map(|dc| dc.number()).collect(),
            epoch: grant.epoch.number(),
            iat: secs,
            nbf: secs,
            exp: secs.saturating_add(grant.lifetime.as_secs()),
            jti: id_at(now),
        };
        let header = Header::new(Algorithm::EdDSA);
        let token = jsonwebtoken::encode(&header, &claims, &self.key).map_err(|_| TokenError::Key)?;
        if token.len() > MAX_TOKEN_LEN { Err(TokenError::Invalid("too long")) } else { Ok(token) }
    }
}

/// Verifies tokens of one cluster.
pub struct TokenVerifier {
    cluster: String,
    /// The one that is used first.
    keys: Vec<DecodingKey>,
    validation: Validation,
}

impl fmt::Debug for TokenVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenVerifier({})", self.cluster)
    }
}

impl TokenVerifier {
    /// A verifier with the public halves of the cluster's token keys: one, or two while they are rotated.
    pub fn new(cluster: &str, publics: &[[u8; 32]]) -> Self {
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_required_spec_claims(&["exp", "nbf", "iss", "sub"]);
        validation.set_issuer(&[cluster]);
        // Times are checked here, against the clock that was passed in.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        let keys = publics.iter().map(|public| DecodingKey::from_ed_der(public)).collect();
        Self { cluster: cluster.to_owned(), keys, validation }
    }

    /// What is signed with any of the keys.
    fn claims(&self, token: &str) -> Result<Claims, ErrorKind> {
        let mut refused = ErrorKind::InvalidSignature;
        for key in &self.keys {
            match jsonwebtoken::decode::<Claims>(token, key, &self.validation) {
                Ok(data) => return Ok(data.claims),
                Err(error) => refused = error.into_kind(),
            }
            if !matches!(refused, ErrorKind::InvalidSignature) {
                break;
            }
        }
        Err(refused)
    }

    /// Verifies form, algorithm, signature, issuer and time.
    pub fn verify(&self, token: &str, now: Timestamp) -> Result<VerifiedToken, TokenError> {
        if token.len() > MAX_TOKEN_LEN {
            return Err(TokenError::Invalid("too long"));
        }
        let claims = self.claims(token).map_err(|kind| TokenError::Invalid(reason(&kind)))?;
        let now = now.number() / 1000;
        let tolerance = CLOCK_TOLERANCE_MS / 1000;
        if now > claims.exp.saturating_add(tolerance) {
            return Err(TokenError::Expired { ago_secs: now - claims.exp });
        }
        if claims.nbf > now.saturating_add(tolerance) {
            return Err(TokenError::NotYet { ahead_secs: claims.nbf - now });
        }
        if claims.dcs.len() > MAX_DCS {
            return Err(TokenError::Invalid("too many datacenters"));
        }
        Ok(VerifiedToken {
            session: SessionId::new(claims.jti),
            tenant: TenantId::new(claims.tenant),
            tenant_name: claims.sub,
            // A scope that this version does not know grants nothing.
            scopes: claims.scopes.iter().filter_map(|name| Scope::from_name(name)).collect(),
            quota: claims.quota,
            quota_files: claims.quota_files,
            rate: claims.rate,
            dcs: claims.dcs.into_iter().map(DcId::new).collect(),
            epoch: RevocationEpoch::new(claims.epoch),
            ends_at: Timestamp::new(claims.exp.saturating_mul(1000)),
        })
    }
}

/// Whether a claim goes without saying.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A UUIDv7 that begins with this time, which is what a revocation by id goes by.
fn id_at(now: Timestamp) -> Uuid {
    let (secs, ms) = (now.number() / 1000, now.number() % 1000);
    Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, secs, ms as u32 * 1_000_000))
}

/// Names the reason without repeating anything of the token.
fn reason(kind: &ErrorKind) -> &'static str {
    match kind {
        ErrorKind::InvalidSignature => "the signature does not hold",
        ErrorKind::InvalidIssuer => "another cluster's",
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName | ErrorKind::MissingAlgorithm => {
            "the algorithm is not EdDSA"
        }
        ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidClaimFormat(_) => "a claim is missing",
        _ => "malformed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::rand::SystemRandom;

    const NOW: Timestamp = Timestamp::new(1_763_640_000_000);

    fn mint(cluster: &str) -> TokenMint {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        TokenMint::new(cluster, pkcs8.as_ref()).unwrap()
    }

    fn grant() -> TokenGrant {
        TokenGrant {
            quota: 5,
            quota_files: 4,
            rate: 6,
            dcs: vec![DcId::new(2)],
            epoch: RevocationEpoch::new(9),
            ..TokenGrant::everything(TenantId::new(7), "acme", Duration::from_secs(100))
        }
    }

    #[test]
    fn what_is_minted_is_verified() {
        let mint = mint("test");
        let verifier = TokenVerifier::new("test", &[mint.public()]);
        let token = verifier.verify(&mint.mint(&grant(), NOW).unwrap(), NOW).unwrap();
        assert_eq!((token.tenant, token.tenant_name.as_str()), (TenantId::new(7), "acme"));
        assert_eq!((token.quota, token.quota_files, token.rate), (5, 4, 6));
        assert_eq!(token.epoch, RevocationEpoch::new(9));
        assert_eq!(token.dcs, [DcId::new(2)]);
        assert_eq!(token.scopes, Scopes::all());
        let id = token.session.uuid();
        assert_eq!(id.get_version_num(), 7);
        assert_eq!(id.as_u128() >> 80, u128::from(NOW.number()));
        assert_ne!(verifier.verify(&mint.mint(&grant(), NOW).unwrap(), NOW).unwrap().session.uuid(), id);
    }

    #[test]
    fn a_limit_that_is_none_goes_without_saying() {
        let mint = mint("test");
        let said = |quota_files| {
            let token = mint.mint(&TokenGrant { quota_files, ..grant() }, NOW).unwrap();
            let claims = jsonwebtoken::dangerous::insecure_decode_claims::<serde_json::Value>(token).unwrap();
            claims.get("quota_files").cloned()
        };
        assert_eq!((said(0), said(3)), (None, Some(3.into())));
    }

    #[test]
    fn times_are_tolerated_by_sixty_seconds_and_no_more() {
        let mint = mint("test");
        let verifier = TokenVerifier::new("test", &[mint.public()]);
        let token = mint.mint(&grant(), NOW).unwrap();
        assert!(verifier.verify(&token, NOW.plus(160_000)).is_ok());
        assert_eq!(verifier.verify(&token, NOW.plus(161_000)), Err(TokenError::Expired { ago_secs: 61 }));
        let early = |secs: u64| Timestamp::new(NOW.number() - secs * 1000);
        assert!(verifier.verify(&token, early(60)).is_ok());
        assert_eq!(verifier.verify(&token, early(61)), Err(TokenError::NotYet { ahead_secs: 61 }));
    }

    #[test]
    fn forged_foreign_and_unsigned_tokens_are_refused() {
        let (ours, theirs) = (mint("test"), mint("test"));
        let verifier = TokenVerifier::new("test", &[ours.public()]);
        let forged = theirs.mint(&grant(), NOW).unwrap();
        assert_eq!(verifier.verify(&forged, NOW), Err(TokenError::Invalid("the signature does not hold")));
        let foreign = TokenVerifier::new("other", &[ours.public()]);
        let token = ours.mint(&grant(), NOW).unwrap();
        assert_eq!(foreign.verify(&token, NOW), Err(TokenError::Invalid("another cluster's")));
        // {"alg":"none","typ":"JWT"} and {"alg":"HS256","typ":"JWT"} before the same claims.
        let payload = token.split('.').nth(1).unwrap();
        for header in ["eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0", "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9"] {
            for signature in ["", "AAAA"] {
                let token = format!("{header}.{payload}.{signature}");
                assert!(matches!(verifier.verify(&token, NOW), Err(TokenError::Invalid(_))));
            }
        }
        for token in ["", ".", "..", "a.b.c", &"x".repeat(MAX_TOKEN_LEN + 1)] {
            assert!(matches!(verifier.verify(token, NOW), Err(TokenError::Invalid(_))));
        }
    }
}
