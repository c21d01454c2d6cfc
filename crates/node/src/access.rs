//! Access: who may do what, here and now (G4).
//!
//! Every service that acts on a request holds a [`ContextVerifier`] and asks it first. Verdicts are cached until
//! their context ends, since an Ed25519 verification costs 50 µs; what can change meanwhile (time, revocations) is
//! checked every time, and what was verified with keys of an earlier revision is verified again. [`Revocations`] are shared by the services of a datacenter, and fed from REVOKE facts.
//! Nothing has to be stopped.

use std::sync::{Arc, PoisonError, RwLock};

use quick_cache::sync::Cache;
use sluice_engine::context::{ContextError, Scope, SessionContext, SignedContext};
use sluice_engine::ids::{DcId, RevocationEpoch, SessionId, TenantId};
use sluice_engine::keys::KeyError;
use sluice_engine::revocations::{Revocation, Revoked, Revoking};
use sluice_proto::problem::{Problem, Refusal};

use crate::clock::SharedClock;
use crate::material::ClusterMaterial;

/// Verdicts kept: at about 500 bytes each a few MiB, enough for every session that is active in five minutes.
const VERDICTS: usize = 8192;

/// What is revoked, as the services of a datacenter know it. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Revocations(Arc<RwLock<Revoked>>);

impl Revocations {
    /// Nothing is revoked.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens and contexts are void from now on. [`Revoking::Full`]: there is no room, and they are not.
    pub fn apply(&self, revocation: Revocation) -> Revoking {
        self.0.write().unwrap_or_else(PoisonError::into_inner).take(revocation)
    }

    /// Whether a context or token of this epoch is void.
    pub fn is_revoked(&self, tenant: TenantId, session: SessionId, epoch: RevocationEpoch) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_revoked(tenant, session, epoch)
    }

    /// All of it, as it stands.
    pub fn all(&self) -> Revoked {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Verifies session contexts for one datacenter. Shared by its services.
#[derive(Debug)]
pub struct ContextVerifier {
    material: ClusterMaterial,
    me: DcId,
    clock: SharedClock,
    revocations: Revocations,
    verdicts: Cache<SignedContext, Verdict>,
}

/// That a signature holds.
#[derive(Clone, Debug)]
struct Verdict {
    context: Arc<SessionContext>,
    /// Of the keys with which it was verified: a key that has ended since ends it.
    revision: u64,
}

impl ContextVerifier {
    /// A verifier for `me` with the context keys of every datacenter, as they are each time.
    pub fn new(material: &ClusterMaterial, me: DcId, clock: SharedClock, revocations: Revocations) -> Self {
        Self { material: material.clone(), me, clock, revocations, verdicts: Cache::new(VERDICTS) }
    }

    /// Of the keys with which it verifies now.
    pub fn revision(&self) -> u64 {
        self.material.revision()
    }

    /// Verifies form, signature, time, place and revocation, and that the session has the scope.
    pub fn require(&self, signed: &SignedContext, scope: Scope) -> Result<Arc<SessionContext>, Refusal> {
        let context = self.verify(signed)?;
        context.require(scope).map_err(|error| refusal(&error))?;
        Ok(context)
    }

    /// Verifies form, signature, time, place and revocation: for what every session may do.
    pub fn verify(&self, signed: &SignedContext) -> Result<Arc<SessionContext>, Refusal> {
        let context = self.verdict(signed).map_err(|error| refusal(&error))?;
        // For the lines and the spans of what is done for it.
        tracing::Span::current().record("tenant", context.tenant.number());
        Ok(context)
    }

    fn verdict(&self, signed: &SignedContext) -> Result<Arc<SessionContext>, ContextError> {
        let (now, revision) = (self.clock.now(), self.material.revision());
        let context = match self.verdicts.get(signed).filter(|verdict| verdict.revision == revision) {
            Some(Verdict { context, .. }) => {
                if let Err(error) = context.check(self.me, now) {
                    self.verdicts.remove(signed);
                    return Err(error);
                }
                context
            }
            None => {
                let context = Arc::new(signed.verify(&self.material.context_ring(), self.me, now)?);
                self.verdicts.insert(signed.clone(), Verdict { context: context.clone(), revision });
                context
            }
        };
        if self.revocations.is_revoked(context.tenant, context.session, context.revocation) {
            return Err(ContextError::Revoked);
        }
        Ok(context)
    }
}

/// Says on the wire why a context does not count: the one place where that is decided.
pub fn refusal(error: &ContextError) -> Refusal {
    let detail = error.to_string();
    match error {
        ContextError::Malformed(_) => Refusal::new(Problem::InvalidToken, detail),
        ContextError::Key(key) => match key {
            // The key may come with a later configuration: not a verdict on the session.
            KeyError::Unknown(_) => Refusal::new(Problem::Unavailable, detail),
            KeyError::WrongDc { .. } | KeyError::Signature => Refusal::new(Problem::InvalidToken, detail),
        },
        // Contexts are renewed before they end: where one has ended, clocks differ.
        ContextError::Expired { .. } => {
            Refusal::new(Problem::ExpiredToken, detail).hint("compare the clocks of the datacenters")
        }
        ContextError::NotYet { .. } => {
            Refusal::new(Problem::InvalidToken, detail).hint("compare the clocks of the datacenters")
        }
        ContextError::NotHere { .. } => {
            Refusal::new(Problem::Forbidden, detail).hint("use a datacenter that the token allows")
        }
        ContextError::Revoked => Refusal::new(Problem::RevokedToken, detail).hint("ask for a new token"),
        ContextError::Scope(scope) => {
            Refusal::new(Problem::Forbidden, detail).hint(format!("use a token with the scope {scope}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use sluice_engine::ids::Timestamp;
    use sluice_engine::keys::SigningKey;
    use sluice_engine::limits::{CLOCK_TOLERANCE_MS, MAX_CONTEXT_LIFE_MS};
    use uuid::Uuid;

    const HERE: DcId = DcId::new(1);
    const NOW: Timestamp = Timestamp::new(1_763_640_000_000);

    struct Setup {
        clock: Arc<ManualClock>,
        revocations: Revocations,
        verifier: ContextVerifier,
        key: Arc<SigningKey>,
    }

    fn setup() -> Setup {
        let material = ClusterMaterial::generate("test", &[(HERE, "dc-a")]).unwrap();
        let key = material.context_key(HERE).unwrap();
        let clock = ManualClock::at(NOW);
        let revocations = Revocations::new();
        let verifier = ContextVerifier::new(&material, HERE, clock.clone(), revocations.clone());
        Setup { clock, revocations, verifier, key }
    }

    fn context() -> SessionContext {
        SessionContext {
            session: SessionId::new(Uuid::from_u128(42)),
            tenant: TenantId::new(7),
            scopes: [Scope::Read].into_iter().collect(),
            rate: 0,
            quota: 0,
            quota_files: 0,
            revocation: RevocationEpoch::new(3),
            issuer: HERE,
            issued_at: NOW,
            ends_at: NOW.plus(MAX_CONTEXT_LIFE_MS),
            allowed: [].into(),
        }
    }

    fn problem(result: Result<Arc<SessionContext>, Refusal>) -> Problem {
        result.unwrap_err().problem
    }

    #[test]
    fn a_cached_verdict_still_ends_and_is_still_revoked() {
        let Setup { clock, revocations, verifier, key } = setup();
        let signed = context().sign(&key);
        assert_eq!(*verifier.require(&signed, Scope::Read).unwrap(), context());
        assert_eq!(problem(verifier.require(&signed, Scope::Write)), Problem::Forbidden);
        assert_eq!(verifier.verdicts.len(), 1);

        let (tenant, session) = (TenantId::new(7), Some(context().session));
        revocations.apply(Revocation { tenant, session: None, epoch: RevocationEpoch::new(3) });
        assert!(verifier.verify(&signed).is_ok(), "of the same epoch");
        revocations.apply(Revocation { tenant, session, epoch: RevocationEpoch::new(4) });
        assert_eq!(problem(verifier.verify(&signed)), Problem::RevokedToken);

        clock.advance(MAX_CONTEXT_LIFE_MS + CLOCK_TOLERANCE_MS + 1);
        assert_eq!(problem(verifier.verify(&signed)), Problem::ExpiredToken);
        assert_eq!(verifier.verdicts.len(), 0);
    }

    #[test]
    fn an_unknown_key_means_later_and_a_forged_signature_never() {
        let Setup { verifier, key, .. } = setup();
        let mut bytes = context().sign(&key).as_bytes().to_vec();
        bytes[7] ^= 1;
        let unknown = SignedContext::from_bytes(bytes.clone()).unwrap();
        assert_eq!(problem(verifier.verify(&unknown)), Problem::Unavailable);
        bytes[7] ^= 1;
        bytes[20] ^= 1;
        let forged = SignedContext::from_bytes(bytes).unwrap();
        assert_eq!(problem(verifier.verify(&forged)), Problem::InvalidToken);
    }
}
