//! The session service: tokens in, signed session contexts out.
//!
//! [`MemorySessions`] is the embedded default, owned by the composition of one datacenter. A token proves itself, so
//! nothing has to be stored to verify it; what is kept is a bounded cache of the contexts in use. A session begins
//! with its token's first request and is named by the token, so every datacenter knows it by the same id, and losing
//! this cache loses nothing. Revocations are shared with the datacenter's other services. It has no tasks, and
//! nothing to stop.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use quick_cache::sync::Cache;
use sluice_engine::context::{SessionContext, SignedContext};
use sluice_engine::ids::{DcId, RevocationEpoch, SessionId, TenantId, Timestamp};
use sluice_engine::limits::{CLOCK_TOLERANCE_MS, MAX_CONTEXT_LIFE_MS};
use sluice_node::access::Revocations;
use sluice_node::clock::SharedClock;
use sluice_node::material::{ClusterMaterial, MaterialError};
use sluice_node::token::{TokenError, VerifiedToken};
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
    ends_at: Timestamp,
    /// Of the keys that verified the token and signed the context.
    revision: u64,
}

/// Where the session services of a datacenter note which sessions have begun.
#[async_trait]
pub trait Records: Send + Sync + 'static {
    /// Notes that a session has begun, or goes on, for at most `life`. Refuses while that cannot be noted: then nobody
    /// knows what is revoked, either.
    async fn begin(&self, session: SessionId, tenant: TenantId, life: Duration) -> Result<(), Refusal>;
}

/// Sessions of one datacenter, in memory.
pub struct MemorySessions {
    me: DcId,
    material: ClusterMaterial,
    clock: SharedClock,
    revocations: Revocations,
    issued: Cache<[u8; 32], Issued>,
    records: Option<Arc<dyn Records>>,
}

impl fmt::Debug for MemorySessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemorySessions({}, {} in use)", self.me, self.issued.len())
    }
}

impl MemorySessions {
    /// The sessions of `me`, with the keys of `material` as they are each time; its key of contexts has to be there.
    pub fn new(
        me: DcId,
        material: &ClusterMaterial,
        clock: SharedClock,
        revocations: Revocations,
    ) -> Result<Self, MaterialError> {
        material.context_key(me)?;
        let (material, issued) = (material.clone(), Cache::new(CONTEXTS));
        Ok(Self { me, material, clock, revocations, issued, records: None })
    }

    /// The same sessions, noted in `records` whenever a context is made: while that fails, contexts that were made live on,
    /// and no new ones are.
    #[must_use]
    pub fn noted_in(self, records: Arc<dyn Records>) -> Self {
        Self { records: Some(records), ..self }
    }

    async fn context_of(&self, token: &str) -> Result<SignedContext, Refusal> {
        if token.is_empty() {
            return Err(Refusal::new(Problem::Unauthenticated, "the request has no token")
                .hint("send Authorization: Bearer <token>"));
        }
        let now = self.clock.now();
        let digest = *blake3::hash(token.as_bytes()).as_bytes();
        let kept = self.issued.get(&digest);
        let revision = self.material.revision();
        let fresh = kept.as_ref().filter(|issued| issued.is_fresh(now) && issued.revision == revision);
        let issued = match fresh {
            Some(issued) => issued.clone(),
            None => match self.begin(token, now, revision).await {
                Ok(issued) => {
                    self.issued.insert(digest, issued.clone());
                    issued
                }
                // A context lives to its end.
                Err(refusal) if refusal.problem == Problem::Unavailable => {
                    kept.filter(|issued| issued.lives(now)).ok_or(refusal)?
                }
                Err(refusal) => return Err(refusal),
            },
        };
        if self.revocations.is_revoked(issued.tenant, issued.session, issued.epoch) {
            return Err(Refusal::new(Problem::RevokedToken, "the token was revoked")
                .hint("ask whoever issued it for a new one"));
        }
        Ok(issued.signed)
    }

    /// Begins a session, or makes it go on.
    async fn begin(&self, token: &str, now: Timestamp, revision: u64) -> Result<Issued, Refusal> {
        let token = self.material.token_verifier().verify(token, now).map_err(|error| refusal(&error))?;
        let (session, tenant, ends_at) = (token.session, token.tenant, token.ends_at);
        let issued = self.issue(token, now, revision)?;
        if let Some(records) = &self.records {
            let life = Duration::from_millis(ends_at.since(now) + CLOCK_TOLERANCE_MS);
            records.begin(session, tenant, life).await?;
        }
        Ok(issued)
    }

    fn issue(&self, token: VerifiedToken, now: Timestamp, revision: u64) -> Result<Issued, Refusal> {
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
            quota_files: token.quota_files,
            revocation: token.epoch,
            issuer: self.me,
            issued_at: now,
            ends_at,
            allowed: token.dcs.into_iter().collect(),
        };
        let key = self.material.context_key(self.me);
        let key = key.map_err(|error| Refusal::new(Problem::Internal, error.to_string()))?;
        Ok(Issued {
            signed: context.sign(&key),
            session: context.session,
            tenant: context.tenant,
            epoch: context.revocation,
            issued_at: now,
            renew_at: now.plus(left.saturating_sub(RENEW_BEFORE_MS.min(left / 2))),
            ends_at,
            revision,
        })
    }
}

impl Issued {
    /// Whether it is to be used, not renewed. A clock that was set back makes it stale, since others would find it
    /// dated in the future.
    fn is_fresh(&self, now: Timestamp) -> bool {
        now < self.renew_at && self.lives(now)
    }

    /// Whether it still counts.
    fn lives(&self, now: Timestamp) -> bool {
        now < self.ends_at && self.issued_at.since(now) < CLOCK_TOLERANCE_MS / 2
    }
}

#[async_trait]
impl Sessions for MemorySessions {
    async fn context(&self, token: &str) -> Result<SignedContext, Refusal> {
        self.context_of(token).await
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
    use sluice_engine::revocations::Revocation;
    use sluice_node::access::ContextVerifier;
    use sluice_node::clock::{Clock as _, ManualClock, SystemClock};
    use sluice_node::material::KeyKind;
    use sluice_node::token::{TokenGrant, TokenMint};

    const A: DcId = DcId::new(1);
    const B: DcId = DcId::new(2);
    const NOW: Timestamp = Timestamp::new(1_763_640_000_000);

    struct Setup {
        clock: Arc<ManualClock>,
        material: ClusterMaterial,
        mint: TokenMint,
        sessions: MemorySessions,
        elsewhere: ContextVerifier,
    }

    /// The sessions of A, and a verifier of B that no revocation has reached.
    fn setup() -> Setup {
        let material = ClusterMaterial::generate("test", &[(A, "dc-a"), (B, "dc-b")]).unwrap();
        let clock = ManualClock::at(NOW);
        let part = material.only(A).unwrap();
        let sessions = MemorySessions::new(A, &part, clock.clone(), Revocations::new()).unwrap();
        let elsewhere = ContextVerifier::new(&part, B, clock.clone(), Revocations::new());
        let mint = material.token_mint().unwrap();
        Setup { clock, material, mint, sessions, elsewhere }
    }

    fn grant(lifetime_secs: u64) -> TokenGrant {
        TokenGrant::everything(TenantId::new(7), "acme", Duration::from_secs(lifetime_secs))
    }

    fn problem(result: Result<SignedContext, Refusal>) -> Problem {
        result.unwrap_err().problem
    }

    #[tokio::test]
    async fn a_context_counts_anywhere_is_cached_and_renewed() {
        let Setup { clock, mint, sessions, elsewhere, .. } = setup();
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
    async fn sessions_go_on_while_keys_are_rotated_and_tokens_end_with_their_key() {
        let Setup { material, mint, sessions, elsewhere, .. } = setup();
        let token = mint.mint(&grant(3600), NOW).unwrap();
        let mut contexts = vec![sessions.context(&token).await.unwrap()];
        let mut all = material;
        for step in 1..=3 {
            all = all.rotated(&[KeyKind::Contexts]).unwrap();
            sessions.material.renew(&all, SystemClock.now()).unwrap();
            contexts.push(sessions.context(&token).await.unwrap());
            for context in &contexts[step - 1..] {
                assert!(elsewhere.verify(context).is_ok() || step == 3, "one step behind");
            }
        }
        assert_eq!(contexts[0], contexts[1], "signed with the same key in the same moment");
        assert_ne!(contexts[1], contexts[2]);
        assert_eq!(
            elsewhere.verify(&contexts[1]).unwrap_err().problem,
            Problem::Unavailable,
            "its key ended"
        );
        assert!(elsewhere.verify(&contexts[3]).is_ok());

        for step in 1..=3 {
            all = all.rotated(&[KeyKind::Tokens]).unwrap();
            sessions.material.renew(&all, SystemClock.now()).unwrap();
            let new = all.token_mint().unwrap().mint(&grant(60), NOW).unwrap();
            assert!(sessions.context(&new).await.is_ok(), "step {step}");
            assert_eq!(sessions.context(&token).await.is_ok(), step < 3, "step {step}");
        }
        assert_eq!(problem(sessions.context(&token).await), Problem::InvalidToken);
        assert_eq!(sessions.material.revision(), 6);
    }

    #[tokio::test]
    async fn a_context_does_not_outlive_its_token() {
        let Setup { clock, mint, sessions, elsewhere, .. } = setup();
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
        let revoke = |session| {
            let (tenant, epoch) = (TenantId::new(7), RevocationEpoch::new(1));
            sessions.revocations.apply(Revocation { tenant, session, epoch });
        };
        revoke(Some(session));
        assert_eq!(problem(sessions.context(&one).await), Problem::RevokedToken);
        sessions.issued.clear();
        assert_eq!(problem(sessions.context(&one).await), Problem::RevokedToken, "after a restart too");
        assert!(sessions.context(&two).await.is_ok());

        revoke(None);
        assert_eq!(problem(sessions.context(&two).await), Problem::RevokedToken);
        let newer = TokenGrant { epoch: RevocationEpoch::new(1), ..grant(60) };
        assert!(sessions.context(&mint.mint(&newer, NOW).unwrap()).await.is_ok());
    }

    /// Fault 34, as the session service plays it.
    #[tokio::test]
    async fn while_sessions_cannot_be_noted_living_contexts_work_and_logins_fail() {
        struct Notebook(std::sync::atomic::AtomicBool);

        #[async_trait]
        impl Records for Notebook {
            async fn begin(&self, _: SessionId, _: TenantId, _: Duration) -> Result<(), Refusal> {
                match self.0.load(std::sync::atomic::Ordering::SeqCst) {
                    true => Ok(()),
                    false => Err(Refusal::new(Problem::Unavailable, "down")),
                }
            }
        }

        let Setup { clock, mint, sessions, elsewhere, .. } = setup();
        let notebook = Arc::new(Notebook(true.into()));
        let sessions = sessions.noted_in(notebook.clone());
        let (old, new) = (mint.mint(&grant(3600), NOW).unwrap(), mint.mint(&grant(3600), NOW).unwrap());
        let living = sessions.context(&old).await.unwrap();
        notebook.0.store(false, std::sync::atomic::Ordering::SeqCst);
        assert_eq!(problem(sessions.context(&new).await), Problem::Unavailable);
        assert_eq!(sessions.context(&old).await.unwrap(), living);
        clock.advance(MAX_CONTEXT_LIFE_MS - RENEW_BEFORE_MS);
        assert!(elsewhere.verify(&living).is_ok());
        assert_eq!(sessions.context(&old).await.unwrap(), living, "not renewed, and not at its end");
        clock.advance(RENEW_BEFORE_MS);
        assert_eq!(problem(sessions.context(&old).await), Problem::Unavailable);
        notebook.0.store(true, std::sync::atomic::Ordering::SeqCst);
        assert!(sessions.context(&old).await.is_ok());
        assert!(sessions.context(&new).await.is_ok());
    }
}
