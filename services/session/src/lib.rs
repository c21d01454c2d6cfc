//! The session service: tokens in, signed session contexts out.
//!
//! [`MemorySessions`] is the embedded default, owned by the composition of one datacenter. A token proves itself, so
//! nothing has to be stored to verify it; what is kept is a bounded cache of the contexts in use. A session begins
//! with its token's first request and is named by the token, so every datacenter knows it by the same id, and losing
//! this cache loses nothing. Revocations are shared with the datacenter's other services. It has no tasks, and
//! nothing to stop.

use std::fmt;

use async_trait::async_trait;
use quick_cache::sync::Cache;
use sluice_engine::context::{SessionContext, SignedContext};
use sluice_engine::ids::{DcId, RevocationEpoch, SessionId, TenantId, Timestamp};
use sluice_engine::keys::SigningKey;
use sluice_engine::limits::{CLOCK_TOLERANCE_MS, MAX_CONTEXT_LIFE_MS};
use sluice_node::access::Revocations;
use sluice_node::clock::SharedClock;
use sluice_node::token::{TokenError, TokenVerifier, VerifiedToken};
use sluice_proto::calls::Sessions;
use sluice_proto::problem::{Problem, Refusal};

/// Contexts kept: at about 500 bytes each a few MiB. A session beyond that costs a verification per request.
const CONTEXTS: usize = 8192;

/// A context is renewed when less than this of its life is left, in milliseconds: longer than any one internal call.
const RENEW_BEFORE_MS: u64 = 60 * 1000;

/// What is kept of a session: by the digest of its token, never the token.
#[derive(Clone)]
struct Issued {
    signed: SignedContext,
    session: SessionId,
    tenant: TenantId,
    epoch: RevocationEpoch,
    issued_at: Timestamp,
    renew_at: Timestamp,
}

/// Sessions of one datacenter, in memory.
pub struct MemorySessions {
    me: DcId,
    verifier: TokenVerifier,
    key: SigningKey,
    clock: SharedClock,
    revocations: Revocations,
    issued: Cache<[u8; 32], Issued>,
}

impl fmt::Debug for MemorySessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemorySessions({}, {} in use)", self.me, self.issued.len())
    }
}

impl MemorySessions {
    /// The sessions of `me`, whose contexts are signed with `key`.
    pub fn new(
        me: DcId,
        verifier: TokenVerifier,
        key: SigningKey,
        clock: SharedClock,
        revocations: Revocations,
    ) -> Self {
        Self { me, verifier, key, clock, revocations, issued: Cache::new(CONTEXTS) }
    }

    /// Voids the tenant's tokens and contexts of an epoch older than this, here and now. The caller makes it known
    /// to other datacenters (REVOKE).
    pub fn revoke_tenant(&self, tenant: TenantId, epoch: RevocationEpoch) {
        self.revocations.revoke_tenant(tenant, epoch);
    }

    /// Voids a session's token and contexts of an epoch older than this, here and now.
    pub fn revoke_session(&self, session: SessionId, epoch: RevocationEpoch) {
        self.revocations.revoke_session(session, epoch);
    }

    fn context_of(&self, token: &str) -> Result<SignedContext, Refusal> {
        if token.is_empty() {
            return Err(Refusal::new(Problem::Unauthenticated, "the request has no token")
                .hint("send Authorization: Bearer <token>"));
        }
        let now = self.clock.now();
        let digest = *blake3::hash(token.as_bytes()).as_bytes();
        let issued = match self.issued.get(&digest).filter(|issued| issued.is_fresh(now)) {
            Some(issued) => issued,
            None => {
                let token = self.verifier.verify(token, now).map_err(|error| refusal(&error))?;
                let issued = self.issue(token, now)?;
                self.issued.insert(digest, issued.clone());
                issued
            }
        };
        if self.revocations.is_revoked(issued.tenant, issued.session, issued.epoch) {
            return Err(Refusal::new(Problem::RevokedToken, "the token was revoked")
                .hint("ask whoever issued it for a new one"));
        }
        Ok(issued.signed)
    }

    fn issue(&self, token: VerifiedToken, now: Timestamp) -> Result<Issued, Refusal> {
        if !token.dcs.is_empty() && !token.dcs.contains(&self.me) {
            return Err(Refusal::new(Problem::Forbidden, "the token may not be used in this datacenter")
                .hint("use a datacenter that the token allows"));
        }
        // No longer than the token; what is left of a token's tolerance is left of its context's.
        let ends_at = now.plus(MAX_CONTEXT_LIFE_MS).min(token.ends_at);
        let left = ends_at.since(now);
        let context = SessionContext {
            session: token.session,
            tenant: token.tenant,
            scopes: token.scopes,
            rate: token.rate,
            quota: token.quota,
            revocation: token.epoch,
            issuer: self.me,
            issued_at: now,
            ends_at,
            allowed: token.dcs.into_iter().collect(),
        };
        Ok(Issued {
            signed: context.sign(&self.key),
            session: context.session,
            tenant: context.tenant,
            epoch: context.revocation,
            issued_at: now,
            renew_at: now.plus(left.saturating_sub(RENEW_BEFORE_MS.min(left / 2))),
        })
    }
}

impl Issued {
    /// Whether it is to be used, not renewed. A clock that was set back makes it stale, since others would find it
    /// dated in the future.
    fn is_fresh(&self, now: Timestamp) -> bool {
        now < self.renew_at && self.issued_at.since(now) < CLOCK_TOLERANCE_MS / 2
    }
}

#[async_trait]
impl Sessions for MemorySessions {
    async fn context(&self, token: &str) -> Result<SignedContext, Refusal> {
        self.context_of(token)
    }
}

/// Says on the wire why a token does not count: the one place where that is decided.
fn refusal(error: &TokenError) -> Refusal {
    let detail = error.to_string();
    match error {
        TokenError::Invalid(_) => {
            Refusal::new(Problem::InvalidToken, detail).hint("use a token that this cluster issued")
        }
        TokenError::Expired { .. } => {
            Refusal::new(Problem::ExpiredToken, detail).hint("ask whoever issued it for a new one")
        }
        TokenError::NotYet { .. } => {
            Refusal::new(Problem::InvalidToken, detail).hint("wait, or compare the clocks")
        }
        TokenError::Key => Refusal::new(Problem::Internal, detail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_engine::context::Scope;
    use sluice_node::access::ContextVerifier;
    use sluice_node::clock::ManualClock;
    use sluice_node::material::ClusterMaterial;
    use sluice_node::token::{TokenGrant, TokenMint};
    use std::sync::Arc;
    use std::time::Duration;

    const A: DcId = DcId::new(1);
    const B: DcId = DcId::new(2);
    const NOW: Timestamp = Timestamp::new(1_763_640_000_000);

    struct Setup {
        clock: Arc<ManualClock>,
        mint: TokenMint,
        sessions: MemorySessions,
        elsewhere: ContextVerifier,
    }

    /// The sessions of A, and a verifier of B that no revocation has reached.
    fn setup() -> Setup {
        let material = ClusterMaterial::generate("test", &[(A, "dc-a"), (B, "dc-b")]).unwrap();
        let clock = ManualClock::at(NOW);
        let sessions = MemorySessions::new(
            A,
            material.token_verifier(),
            material.context_key(A).unwrap(),
            clock.clone(),
            Revocations::new(),
        );
        let elsewhere = ContextVerifier::new(material.context_ring(), B, clock.clone(), Revocations::new());
        Setup { clock, mint: material.token_mint().unwrap(), sessions, elsewhere }
    }

    fn grant(lifetime_secs: u64) -> TokenGrant {
        TokenGrant::everything(TenantId::new(7), "acme", Duration::from_secs(lifetime_secs))
    }

    fn problem(result: Result<SignedContext, Refusal>) -> Problem {
        result.unwrap_err().problem
    }

    #[tokio::test]
    async fn a_context_counts_anywhere_is_cached_and_renewed() {
        let Setup { clock, mint, sessions, elsewhere } = setup();
        let token = mint.mint(&grant(3600), NOW).unwrap();
        let first = sessions.context(&token).await.unwrap();
        let context = elsewhere.require(&first, Scope::Write).unwrap();
        assert_eq!(context.tenant, TenantId::new(7));
        assert_eq!(context.ends_at.since(context.issued_at), MAX_CONTEXT_LIFE_MS);

        clock.advance(MAX_CONTEXT_LIFE_MS - RENEW_BEFORE_MS - 1);
        assert_eq!(sessions.context(&token).await.unwrap(), first);
        clock.advance(1);
        let second = sessions.context(&token).await.unwrap();
        assert_ne!(second, first);
        let renewed = elsewhere.verify(&second).unwrap();
        assert_eq!((renewed.session, renewed.tenant), (context.session, context.tenant));
        clock.set(Timestamp::new(NOW.number() - 40_000));
        assert_ne!(sessions.context(&token).await.unwrap(), second, "a clock set back makes it stale");
        assert_eq!(sessions.issued.len(), 1);
    }

    #[tokio::test]
    async fn a_context_does_not_outlive_its_token() {
        let Setup { clock, mint, sessions, elsewhere } = setup();
        let token = mint.mint(&grant(30), NOW).unwrap();
        let context = elsewhere.verify(&sessions.context(&token).await.unwrap()).unwrap();
        assert_eq!(context.ends_at, NOW.plus(30_000));
        clock.advance(90_000);
        assert!(sessions.context(&token).await.is_ok(), "60 s are tolerated");
        clock.advance(1_000);
        assert_eq!(problem(sessions.context(&token).await), Problem::ExpiredToken);
    }

    #[tokio::test]
    async fn tokens_that_do_not_count_are_refused_by_name() {
        let Setup { mint, sessions, .. } = setup();
        assert_eq!(problem(sessions.context("").await), Problem::Unauthenticated);
        assert_eq!(problem(sessions.context("x.y.z").await), Problem::InvalidToken);
        let elsewhere = TokenGrant { dcs: vec![B], ..grant(60) };
        let token = mint.mint(&elsewhere, NOW).unwrap();
        assert_eq!(problem(sessions.context(&token).await), Problem::Forbidden);
        let early = mint.mint(&grant(600), NOW.plus(120_000)).unwrap();
        assert_eq!(problem(sessions.context(&early).await), Problem::InvalidToken);
    }

    #[tokio::test]
    async fn a_revoked_token_stays_revoked_though_its_context_is_cached() {
        let Setup { mint, sessions, elsewhere, .. } = setup();
        let (one, two) = (mint.mint(&grant(60), NOW).unwrap(), mint.mint(&grant(60), NOW).unwrap());
        let session = elsewhere.verify(&sessions.context(&one).await.unwrap()).unwrap().session;
        sessions.revoke_session(session, RevocationEpoch::new(1));
        assert_eq!(problem(sessions.context(&one).await), Problem::RevokedToken);
        sessions.issued.clear();
        assert_eq!(problem(sessions.context(&one).await), Problem::RevokedToken, "after a restart too");
        assert!(sessions.context(&two).await.is_ok());

        sessions.revoke_tenant(TenantId::new(7), RevocationEpoch::new(1));
        assert_eq!(problem(sessions.context(&two).await), Problem::RevokedToken);
        let newer = TokenGrant { epoch: RevocationEpoch::new(1), ..grant(60) };
        assert!(sessions.context(&mint.mint(&newer, NOW).unwrap()).await.is_ok());
    }
}
